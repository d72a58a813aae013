//! A model's weights on the device and its forward pass as a list of launches, straight through: prefill by matrix products
//! over many rows, decode by products that stream the weights once. Differences between models are data.
//! Must not know requests, nor when a step runs.

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::device::{Buffer, Device, Launch};
use crate::kernels::params::{MAX_DECODE_ROWS, PAGE_TOKENS};
use crate::kv_cache::KvCache;
use crate::ops::{
    self, Epilogue, Heads, Input, KvScales, KvType, Linear, Norm, Output, Pages, RopeInto, Rows, Tiles, Tokens,
    Workspace,
};
use crate::slots::Slots;
use crate::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// Gate and up, and the halves of each head of q and k, are interleaved by blocks of so many rows, so that a thread of the
/// products has both of what belongs together (kernels/epilogue.cuh, kernels/rope.cuh).
const INTERLEAVE: usize = 8;

/// Where the weights come from.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    Checkpoint(&'a Checkpoint),
    /// Made on the device, for benches: norms of 1, everything else random, the same on every device.
    Dummy,
}

impl<'a> From<&'a Checkpoint> for Weights<'a> {
    fn from(checkpoint: &'a Checkpoint) -> Self {
        Weights::Checkpoint(checkpoint)
    }
}

pub struct Model {
    pub config: ModelConfig,
    device: Device,
    embedding: Arc<Buffer>,
    layers: Vec<Layer>,
    final_norm: Norm,
    head: Linear,
    /// [positions][head_dim / 2][2] fp32.
    cos_sin: Buffer,
}

struct Layer {
    input_norm: Norm,
    qkv: Linear,
    qk_norm: Option<(Norm, Norm)>,
    o: Linear,
    post_norm: Norm,
    gate_up: Linear,
    down: Linear,
    kv_scales: KvScales,
}

/// What flows through a step; every buffer has room for `rows` rows. Reused by every layer.
pub struct Activations {
    /// [rows][hidden], the residual stream.
    residual: Buffer,
    normed: Buffer,
    /// [rows][(q + 2 kv) heads * dim].
    qkv: Buffer,
    /// [rows][q heads * dim].
    q: Buffer,
    attention: Buffer,
    /// [rows][intermediate].
    mlp: Buffer,
    /// [64][vocab] fp32.
    pub logits: Buffer,
    workspace: Workspace,
}

impl Activations {
    /// What new ones take.
    pub fn bytes(device: &Device, c: &ModelConfig, rows: u32, fixed_splits: Option<(u32, u32)>) -> u64 {
        let rows = rows.max(MAX_DECODE_ROWS);
        let (heads, decode) = (heads(c), MAX_DECODE_ROWS as usize);
        let columns =
            2 * c.hidden_size + (heads.columns() + 2 * heads.query * heads.dim) as usize + c.intermediate_size;
        let workspace = Workspace::bytes(device, widest(c), c.hidden_size, heads, fixed_splits);
        (rows as usize * columns * 2 + decode * c.vocab_size * 4) as u64 + workspace
    }

    /// `rows`: of a prefill step. `fixed_splits`: see [`Workspace::new`].
    pub fn new(device: &Device, c: &ModelConfig, rows: u32, fixed_splits: Option<(u32, u32)>) -> Result<Activations> {
        let rows = rows.max(MAX_DECODE_ROWS);
        let heads = heads(c);
        let decode = MAX_DECODE_ROWS as usize;
        let matrix = |columns: usize| device.alloc(rows as usize * columns * 2);
        let q_columns = (heads.query * heads.dim) as usize;
        Ok(Activations {
            residual: matrix(c.hidden_size)?,
            normed: matrix(c.hidden_size)?,
            qkv: matrix(heads.columns() as usize)?,
            q: matrix(q_columns)?,
            attention: matrix(q_columns)?,
            mlp: matrix(c.intermediate_size)?,
            logits: device.alloc(decode * c.vocab_size * 4)?,
            workspace: Workspace::new(device, widest(c), c.hidden_size, heads, fixed_splits)?,
        })
    }
}

/// A prefill step in device memory.
pub struct PrefillStep<'a> {
    pub rows: Rows<'a>,
    /// [rows] i32 each.
    pub tokens: &'a Buffer,
    pub positions: &'a Buffer,
    pub tiles: Tiles<'a>,
    /// Rows whose logits are sampled, and their slots; [sampled] i32 each.
    pub last_rows: &'a Buffer,
    pub last_slots: &'a Buffer,
    pub sampled: u32,
}

pub fn heads(c: &ModelConfig) -> Heads {
    Heads { query: c.num_heads as u32, kv: c.num_kv_heads as u32, dim: c.head_dim as u32 }
}

/// Columns of the widest decode product.
fn widest(c: &ModelConfig) -> usize {
    (2 * c.intermediate_size).max(c.vocab_size).max(heads(c).columns() as usize)
}

/// Bytes of the table of rotations.
pub fn rotation_bytes(c: &ModelConfig, positions: u32) -> u64 {
    u64::from(positions) * c.head_dim as u64 * 4
}

/// Bytes that the weights take on the device.
pub fn weight_bytes(c: &ModelConfig) -> u64 {
    let heads = heads(c);
    let q = (heads.query * heads.dim) as usize;
    let layer = (heads.columns() as usize + q + 3 * c.intermediate_size) * c.hidden_size
        + 2 * c.hidden_size
        + if c.qkv_bias { heads.columns() as usize } else { 0 }
        + if c.o_bias { c.hidden_size } else { 0 }
        + if c.qk_norm { 2 * heads.dim as usize } else { 0 };
    let tables = if c.tie_word_embeddings { 1 } else { 2 } * c.vocab_size * c.hidden_size;
    2 * (c.num_layers * layer + tables + c.hidden_size) as u64
}

/// Elements of the matrices that every token is multiplied with, the head left out.
pub fn layer_elements(c: &ModelConfig) -> u64 {
    let heads = heads(c);
    let q = (heads.query * heads.dim) as usize;
    (c.num_layers * (heads.columns() as usize + q + 3 * c.intermediate_size) * c.hidden_size) as u64
}

/// Bytes of weights that a decode step must read at the least: each once.
pub fn decode_weight_bytes(c: &ModelConfig) -> u64 {
    let head = (c.vocab_size * c.hidden_size) as u64;
    2 * (layer_elements(c) + head)
}

/// Bytes of K and V of so many tokens.
pub fn key_bytes(c: &ModelConfig, kind: KvType, keys: u64) -> u64 {
    keys * KvCache::page_bytes(c.num_layers, heads(c), kind) / PAGE_TOKENS as u64
}

/// Operations that a prompt of so many tokens costs at the least.
pub fn prefill_flops(c: &ModelConfig, tokens: u64) -> u64 {
    let pairs = tokens * (tokens + 1) / 2;
    let attention = 4 * pairs * (c.num_heads * c.head_dim * c.num_layers) as u64;
    2 * tokens * layer_elements(c) + 2 * (c.vocab_size * c.hidden_size) as u64 + attention
}

impl Model {
    /// Loads the weights. `positions`: the longest sequence. `progress` hears of bytes done and bytes in all.
    ///
    /// # Errors
    /// Tensors that are missing or of the wrong shape or type, a shape that no kernel fits, too little memory.
    pub fn load(
        device: &Device,
        config: &ModelConfig,
        weights: Weights,
        positions: u32,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model> {
        check_shape(config)?;
        let (eps, all) = (config.rms_norm_eps, weight_bytes(config));
        let mut loader = Loader { device, weights, eps, made: 0, done: 0, all, progress };
        let (c, h) = (config, config.hidden_size);
        let embedding = Arc::new(loader.matrix("model.embed_tokens.weight", c.vocab_size, h)?);
        let layers = (0..c.num_layers).map(|i| loader.layer(c, i)).collect::<Result<_>>()?;
        let head_weight = match c.tie_word_embeddings {
            true => embedding.clone(),
            false => Arc::new(loader.matrix("lm_head.weight", c.vocab_size, h)?),
        };
        let final_norm = loader.norm("model.norm.weight", h)?;
        let head = Linear::new(device, head_weight, None, c.vocab_size, h)?;
        let table = c.rope.cos_sin(positions as usize, c.head_dim);
        let cos_sin = device.alloc(table.len() * 4)?;
        device.upload(&cos_sin, 0, bytemuck::cast_slice(&table))?;
        Ok(Model { config: config.clone(), device: device.clone(), embedding, layers, final_norm, head, cos_sin })
    }

    fn heads(&self) -> Heads {
        heads(&self.config)
    }

    /// Of each layer, as the checkpoint has them.
    pub fn kv_scales(&self) -> Vec<KvScales> {
        self.layers.iter().map(|layer| layer.kv_scales).collect()
    }

    fn embed(&self, slots: &Slots, rows: &Rows, tokens: Tokens, to: &Activations) -> Launch {
        let c = &self.config;
        ops::embed(&self.embedding, &slots.states, rows, tokens, &to.residual, c.hidden_size, c.vocab_size)
    }

    /// Chunks of prompts; samples the next token of those that end.
    pub fn prefill(&self, step: &PrefillStep, cache: &KvCache, slots: &Slots, a: &Activations) -> Result<Vec<Launch>> {
        let (device, heads, count) = (&self.device, self.heads(), step.rows.count);
        let gemm = |x, w, epilogue, out| ops::gemm(device, x, w, count, epilogue, out);
        let tokens = Tokens::Prompt(step.tokens, step.positions);
        let mut launches = vec![self.embed(slots, &step.rows, tokens, a)];
        for (i, layer) in self.layers.iter().enumerate() {
            let (pages, window) = (cache.layer(i), self.config.windows[i]);
            let qk_norm = layer.qk_norm.as_ref().map(|(q, k)| (q, k));
            launches.extend([
                ops::rms_norm(&a.residual, &layer.input_norm, None, count, &a.normed),
                gemm(&a.normed, &layer.qkv, Epilogue::Plain, &a.qkv)?,
                ops::rope_append(&a.qkv, qk_norm, &self.rope_into(&step.rows, &pages, a)),
                ops::attn_prefill(device, &a.q, heads, window, &step.tiles, &pages, &a.attention, &a.workspace)?,
                gemm(&a.attention, &layer.o, Epilogue::Residual, &a.residual)?,
                ops::rms_norm(&a.residual, &layer.post_norm, None, count, &a.normed),
                gemm(&a.normed, &layer.gate_up, Epilogue::Silu, &a.mlp)?,
                gemm(&a.mlp, &layer.down, Epilogue::Residual, &a.residual)?,
            ]);
        }
        if step.sampled > 0 {
            launches.extend(self.logits((step.last_rows, step.sampled), a)?);
            launches.push(ops::sample(slots.sample_params(), &a.logits, step.last_slots, step.sampled, None));
        }
        Ok(launches)
    }

    /// The logits of some rows of a prefill that has been: [count][vocab], of at most as many rows as decode has.
    pub fn logits(&self, (rows, count): (&Buffer, u32), a: &Activations) -> Result<[Launch; 2]> {
        let into = Output::Logits(&a.logits);
        Ok([
            ops::rms_norm(&a.residual, &self.final_norm, Some(rows), count, &a.normed),
            ops::gemv(&self.device, Input::Plain(&a.normed), &self.head, count, into, &a.workspace)?,
        ])
    }

    /// One token for each row. The same launches for every step of so many rows; `keys`, the tokens of all rows' sequences,
    /// is for the report alone.
    pub fn decode(
        &self,
        rows: &Rows,
        keys: u64,
        cache: &KvCache,
        slots: &Slots,
        a: &Activations,
    ) -> Result<Vec<Launch>> {
        let (heads, n) = (self.heads(), rows.count);
        let gemv =
            |input: Input, w: &Linear, output: Output| ops::gemv(&self.device, input, w, n, output, &a.workspace);
        let mut launches = vec![self.embed(slots, rows, Tokens::Slots(&a.workspace), a)];
        for (i, layer) in self.layers.iter().enumerate() {
            let (pages, window) = (cache.layer(i), self.config.windows[i]);
            let into = self.rope_into(rows, &pages, a);
            let normed = Input::Normed(&a.residual, &layer.input_norm);
            match &layer.qk_norm {
                None => launches.push(gemv(normed, &layer.qkv, Output::Rope(&into))?),
                Some((q, k)) => launches.extend([
                    gemv(normed, &layer.qkv, Output::Matrix(&a.qkv))?,
                    ops::rope_append(&a.qkv, Some((q, k)), &into),
                ]),
            }
            launches.extend([
                ops::attn_decode(&a.q, heads, window, rows, keys, &pages, &a.attention, Some(&layer.o), &a.workspace),
                gemv(Input::Plain(&a.attention), &layer.o, Output::Residual(&a.residual))?,
                gemv(Input::Normed(&a.residual, &layer.post_norm), &layer.gate_up, Output::Silu(&a.mlp))?,
                gemv(Input::Plain(&a.mlp), &layer.down, Output::Residual(&a.residual))?,
            ]);
        }
        launches.extend([
            ops::rms_norm(&a.residual, &self.final_norm, None, n, &a.normed),
            gemv(Input::Plain(&a.normed), &self.head, Output::Logits(&a.logits))?,
            ops::sample(slots.sample_params(), &a.logits, rows.slot, n, self.layers.first().map(|l| &l.qkv)),
        ]);
        Ok(launches)
    }

    fn rope_into<'a>(&'a self, rows: &'a Rows, pages: &'a Pages, a: &'a Activations) -> RopeInto<'a> {
        RopeInto { heads: self.heads(), cos_sin: &self.cos_sin, rows, pages, q: &a.q }
    }
}

/// # Errors
/// A shape that no kernel fits.
fn check_shape(c: &ModelConfig) -> Result<()> {
    let heads = heads(c);
    let fits = |what: &str, value: usize, multiple: usize| match value.is_multiple_of(multiple) {
        true => Ok(()),
        false => Err(Error::Device(format!("{what} is {value}: the kernels need a multiple of {multiple}"))),
    };
    fits("hidden_size", c.hidden_size, 64)?;
    fits("intermediate_size", c.intermediate_size, 64)?;
    fits("vocab_size", c.vocab_size, 16)?;
    ops::check_vocab(c.vocab_size)?;
    if c.hidden_size > 8192 {
        return Err(Error::Device(format!("hidden_size is {}: the kernels take 8192 at most", c.hidden_size)));
    }
    if heads.group() > 16 {
        return Err(Error::Device(format!("{} query heads per KV head: the kernels take 16 at most", heads.group())));
    }
    Ok(())
}

/// A tensor [rows][..], perhaps of heads of so many rows whose halves are to be interleaved.
struct Part {
    name: String,
    rows: usize,
    head: Option<usize>,
}

/// A block of `a`, a block of `b`, and so on.
fn alternating<'a>(a: &'a [u8], b: &'a [u8], block: usize) -> impl Iterator<Item = &'a u8> {
    a.chunks(block).zip(b.chunks(block)).flat_map(|(a, b)| [a, b]).flatten()
}

struct Loader<'a> {
    device: &'a Device,
    weights: Weights<'a>,
    eps: f32,
    /// Dummy tensors so far: each has its own seed.
    made: u64,
    done: u64,
    all: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl Loader<'_> {
    fn layer(&mut self, c: &ModelConfig, index: usize) -> Result<Layer> {
        let name = |suffix: &str| format!("model.layers.{index}.{suffix}");
        let (h, inner) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let part = |kind: &str, which: &str, rows: usize, head: Option<usize>| Part {
            name: name(&format!("self_attn.{which}_proj.{kind}")),
            rows,
            head,
        };
        let parts = |kind| {
            let head = Some(c.head_dim);
            [part(kind, "q", q, head), part(kind, "k", kv, head), part(kind, "v", kv, None)]
        };
        let qkv_weight = self.stacked(&parts("weight"), &[h])?;
        let qkv_bias = if c.qkv_bias { Some(self.stacked(&parts("bias"), &[])?) } else { None };
        let qk_norm = match c.qk_norm {
            true => Some((
                self.norm(&name("self_attn.q_norm.weight"), c.head_dim)?,
                self.norm(&name("self_attn.k_norm.weight"), c.head_dim)?,
            )),
            false => None,
        };
        let o = self.matrix(&name("self_attn.o_proj.weight"), h, q)?;
        let o_bias = match c.o_bias {
            true => Some(self.stacked(&[Part { name: name("self_attn.o_proj.bias"), rows: h, head: None }], &[])?),
            false => None,
        };
        let gate_up = self.interleaved(&name("mlp.gate_proj.weight"), &name("mlp.up_proj.weight"), inner, h)?;
        let down = self.matrix(&name("mlp.down_proj.weight"), h, inner)?;
        let linear = |weight, bias, n, k| Linear::new(self.device, Arc::new(weight), bias, n, k);
        Ok(Layer {
            qkv: linear(qkv_weight, qkv_bias, q + 2 * kv, h)?,
            o: linear(o, o_bias, h, q)?,
            gate_up: linear(gate_up, None, 2 * inner, h)?,
            down: linear(down, None, h, inner)?,
            qk_norm,
            input_norm: self.norm(&name("input_layernorm.weight"), h)?,
            post_norm: self.norm(&name("post_attention_layernorm.weight"), h)?,
            kv_scales: self.kv_scales(index)?,
        })
    }

    /// Those of compressed-tensors, ModelOpt or vLLM; 1 where there are none.
    fn kv_scales(&self, layer: usize) -> Result<KvScales> {
        let Weights::Checkpoint(checkpoint) = self.weights else { return Ok(KvScales::default()) };
        let scale = |which: &str| -> Result<f32> {
            let spellings =
                [format!("{which}_scale"), format!("{which}_proj.{which}_scale"), format!("attn.{which}_scale")];
            let names = spellings.map(|name| format!("model.layers.{layer}.self_attn.{name}"));
            let name = names.iter().find(|name| checkpoint.has(name));
            name.map_or(Ok(1.0), |name| checkpoint.scale(name))
        };
        Ok(KvScales { k: scale("k")?, v: scale("v")? })
    }

    fn norm(&mut self, name: &str, size: usize) -> Result<Norm> {
        let weight = match self.weights {
            Weights::Checkpoint(_) => self.stacked(&[Part { name: name.into(), rows: size, head: None }], &[])?,
            Weights::Dummy => {
                let buffer = self.device.alloc(size * 2)?;
                self.device.upload(&buffer, 0, bytemuck::cast_slice(&vec![half::bf16::ONE; size]))?;
                self.advance(size * 2);
                buffer
            }
        };
        Ok(Norm { weight, eps: self.eps })
    }

    fn matrix(&mut self, name: &str, rows: usize, k: usize) -> Result<Buffer> {
        self.stacked(&[Part { name: name.into(), rows, head: None }], &[k])
    }

    /// Tensors below one another.
    fn stacked(&mut self, parts: &[Part], rest: &[usize]) -> Result<Buffer> {
        let row = rest.iter().product::<usize>() * 2;
        let bytes = parts.iter().map(|p| p.rows * row).sum();
        let Weights::Checkpoint(checkpoint) = self.weights else { return self.dummy(bytes) };
        let buffer = self.device.alloc(bytes)?;
        let mut at = 0;
        for part in parts {
            let tensor = checkpoint.weights(&part.name, &[&[part.rows], rest].concat())?;
            let unit = part.head.unwrap_or(1) * row;
            for piece in pieces(part.rows * row / 2, unit) {
                let piece = tensor.bf16(piece);
                match part.head {
                    None => self.device.upload(&buffer, at, &piece)?,
                    Some(dim) => {
                        let halves = piece.chunks(unit).map(|head| head.split_at(dim / 2 * row));
                        let staged: Vec<u8> =
                            halves.flat_map(|(a, b)| alternating(a, b, INTERLEAVE * row)).copied().collect();
                        self.device.upload(&buffer, at, &staged)?;
                    }
                }
                at += piece.len();
                self.advance(piece.len());
            }
        }
        Ok(buffer)
    }

    /// Two matrices [rows][k]: eight rows of the first, then eight of the second.
    fn interleaved(&mut self, first: &str, second: &str, rows: usize, k: usize) -> Result<Buffer> {
        let Weights::Checkpoint(checkpoint) = self.weights else { return self.dummy(2 * rows * k * 2) };
        let first = checkpoint.weights(first, &[rows, k])?;
        let second = checkpoint.weights(second, &[rows, k])?;
        let buffer = self.device.alloc(2 * rows * k * 2)?;
        let block = INTERLEAVE * k * 2;
        let mut at = 0;
        for piece in pieces(rows * k, block) {
            let (a, b) = (first.bf16(piece.clone()), second.bf16(piece));
            let staged: Vec<u8> = alternating(&a, &b, block).copied().collect();
            self.device.upload(&buffer, at, &staged)?;
            at += staged.len();
            self.advance(staged.len());
        }
        Ok(buffer)
    }

    fn dummy(&mut self, bytes: usize) -> Result<Buffer> {
        let buffer = self.device.alloc(bytes)?;
        self.device.launch(&ops::random(self.device, &buffer, bytes / 2, self.made, DUMMY_DEVIATION))?;
        self.made += 1;
        self.advance(bytes);
        Ok(buffer)
    }

    fn advance(&mut self, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(self.done, self.all);
    }
}

/// Of dummy weights: what models are initialised with, so that activations stay near 1.
const DUMMY_DEVIATION: f32 = 0.02;

/// Bytes uploaded at a time, so that the progress is seen.
const PIECE: usize = 16 << 20;

/// Elements in pieces of about that many bytes, each a multiple of `unit` bytes.
fn pieces(elements: usize, unit: usize) -> impl Iterator<Item = Range<usize>> {
    let step = unit * (PIECE / unit).max(1) / 2;
    (0..elements).step_by(step).map(move |at| at..elements.min(at + step))
}
