//! A model's weights on the device and its forward pass as a list of launches, straight through: prefill by matrix products
//! over many rows, decode by products that stream the weights once. Differences between models are data.
//! Must not know requests, nor when a step runs.

use crate::checkpoint::Checkpoint;
use crate::config::{LayerTypes, ModelConfig, WeightType};
use crate::device::{Buffer, Device, Launch};
use crate::kernels::params::{MAX_DECODE_ROWS, PAGE_TOKENS};
use crate::kv_cache::KvCache;
use crate::loader::{self, Loader};
use crate::ops::{
    self, Epilogue, Heads, Input, KvScales, KvType, Linear, Norm, Operand, Output, Pages, Quantised, RopeInto, Rows,
    Tiles, Tokens, Workspace,
};
use crate::slots::Slots;
use crate::{Error, Result};
use std::sync::Arc;

/// Where the weights come from.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    Checkpoint(&'a Checkpoint),
    /// Made on the device, for benches: norms of 1, everything else random, the same on every device.
    Dummy,
}

impl Weights<'_> {
    /// What each layer's matrices are kept as: as the checkpoint has them, and with `quantize` nothing in bf16. For
    /// [`ModelConfig::weight_types`].
    ///
    /// # Errors
    /// Tensors that are missing, of the wrong shape, or of types that do not go together.
    pub fn types(self, c: &ModelConfig, quantize: bool) -> Result<Vec<LayerTypes>> {
        (0..c.num_layers).map(|layer| loader::layer_types(self, c, layer, quantize)).collect()
    }
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

pub(crate) struct Layer {
    pub input_norm: Norm,
    pub qkv: Linear,
    pub qk_norm: Option<(Norm, Norm)>,
    pub o: Linear,
    pub post_norm: Norm,
    pub gate_up: Linear,
    pub down: Linear,
    pub kv_scales: KvScales,
}

/// What kernels of a decode step do together. Turned off, it takes more launches, or more bytes, to the same tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fusion {
    /// Products of q, k and v and of gate and up normalise what they read.
    pub norm: bool,
    /// The product of q, k and v rotates and appends to the cache, where no norm of heads stands between them.
    pub rope: bool,
    /// Products of o and down add to the residual stream.
    pub residual: bool,
    /// The product of gate and up makes silu(gate) * up.
    pub silu: bool,
    /// The query heads of a KV head read keys and values together.
    pub packed_gqa: bool,
}

impl Default for Fusion {
    fn default() -> Self {
        Fusion { norm: true, rope: true, residual: true, silu: true, packed_gqa: true }
    }
}

/// What flows through a step; every buffer has room for `rows` rows. Reused by every layer.
pub struct Activations {
    /// [rows][hidden], the residual stream.
    residual: Buffer,
    normed: Buffer,
    /// What products of prefill, and of many rows of decode, read where weights are fp8: [rows][their largest k].
    quantised: Option<Quantised>,
    /// [rows][(q + 2 kv) heads * dim].
    qkv: Buffer,
    /// [rows][q heads * dim].
    q: Buffer,
    attention: Buffer,
    /// [rows][intermediate].
    mlp: Buffer,
    /// [64][vocab] fp32. Where silu is not fused, of gate and up before: [64][2 intermediate].
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
        let quantised = if c.is_fp8() { Quantised::bytes(rows, longest(c)) } else { 0 };
        (rows as usize * columns * 2 + decode * logit_columns(c) * 4) as u64 + quantised + workspace
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
            quantised: c.is_fp8().then(|| Quantised::new(device, rows, longest(c))).transpose()?,
            qkv: matrix(heads.columns() as usize)?,
            q: matrix(q_columns)?,
            attention: matrix(q_columns)?,
            mlp: matrix(c.intermediate_size)?,
            logits: device.alloc(decode * logit_columns(c) * 4)?,
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

/// Columns of the widest decode product that leaves fp32.
fn logit_columns(c: &ModelConfig) -> usize {
    c.vocab_size.max(2 * c.intermediate_size)
}

/// k of the longest product of a layer.
fn longest(c: &ModelConfig) -> usize {
    c.hidden_size.max(c.intermediate_size).max(c.num_heads * c.head_dim)
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
    let vectors = 2 * c.hidden_size
        + if c.qkv_bias { heads.columns() as usize } else { 0 }
        + if c.o_bias { c.hidden_size } else { 0 }
        + if c.qk_norm { 2 * heads.dim as usize } else { 0 };
    let tables = if c.tie_word_embeddings { 1 } else { 2 } * c.vocab_size * c.hidden_size;
    layer_bytes(c) + 2 * (c.num_layers * vectors + tables + c.hidden_size) as u64
}

/// n and k of the matrices of a layer: q, k and v; o; gate and up; down.
fn shapes(c: &ModelConfig) -> [[usize; 2]; 4] {
    let (columns, q) = (heads(c).columns() as usize, c.num_heads * c.head_dim);
    let (hidden, inner) = (c.hidden_size, c.intermediate_size);
    [[columns, hidden], [hidden, q], [2 * inner, hidden], [hidden, inner]]
}

/// Elements of the matrices that every token is multiplied with, the head left out.
pub fn layer_elements(c: &ModelConfig) -> u64 {
    (c.num_layers * shapes(c).iter().map(|[n, k]| n * k).sum::<usize>()) as u64
}

/// Bytes of those matrices, with their scales.
pub fn layer_bytes(c: &ModelConfig) -> u64 {
    let bytes = |([n, k], kind): ([usize; 2], WeightType)| match kind {
        WeightType::Bf16 => 2 * n * k,
        WeightType::Fp8Rows => n * k + 4 * n,
        WeightType::Fp8Blocks => n * k + 4 * ops::block_scales(n, k),
    };
    let layer = |t: &LayerTypes| shapes(c).into_iter().zip([t.qkv, t.o, t.gate_up, t.down]).map(bytes).sum::<usize>();
    c.weight_types.iter().map(layer).sum::<usize>() as u64
}

/// Bytes of weights that a decode step must read at the least: each once.
pub fn decode_weight_bytes(c: &ModelConfig) -> u64 {
    layer_bytes(c) + 2 * (c.vocab_size * c.hidden_size) as u64
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
        let mut loader = Loader::new(device, weights, config, progress)?;
        let (c, h) = (config, config.hidden_size);
        let embedding = loader.matrix("model.embed_tokens.weight", c.vocab_size, h)?;
        let layers = (0..c.num_layers).map(|i| loader.layer(c, i)).collect::<Result<_>>()?;
        let head_weight = match c.tie_word_embeddings {
            true => embedding.clone(),
            false => loader.matrix("lm_head.weight", c.vocab_size, h)?,
        };
        let final_norm = loader.norm("model.norm.weight", h)?;
        loader.flush()?;
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
        let gemm = |x: Operand, w: &Linear, epilogue, out: &Buffer| ops::gemm(device, x, w, count, epilogue, out);
        let quantised = || a.quantised.as_ref().expect("made for such a model");
        let normed = |norm, w: &Linear| match w.is_fp8() {
            false => (ops::rms_norm(&a.residual, norm, None, count, &a.normed), Operand::Bf16(&a.normed)),
            true => (ops::rms_norm_fp8(&a.residual, norm, count, quantised()), Operand::Fp8(quantised())),
        };
        let add = |x: &Buffer, w: &Linear| -> Result<Vec<Launch>> {
            let product = |x: Operand| gemm(x, w, Epilogue::Residual, &a.residual);
            match w.is_fp8() {
                false => Ok(vec![product(Operand::Bf16(x))?]),
                true => Ok(vec![ops::quantise(x, w.k(), count, quantised()), product(Operand::Fp8(quantised()))?]),
            }
        };
        let tokens = Tokens::Prompt(step.tokens, step.positions);
        let mut launches = vec![self.embed(slots, &step.rows, tokens, a)];
        for (i, layer) in self.layers.iter().enumerate() {
            let (pages, window) = (cache.layer(i), self.config.windows[i]);
            let qk_norm = layer.qk_norm.as_ref().map(|(q, k)| (q, k));
            let (norm, x) = normed(&layer.input_norm, &layer.qkv);
            launches.extend([
                norm,
                gemm(x, &layer.qkv, Epilogue::Plain, &a.qkv)?,
                ops::rope_append(&a.qkv, qk_norm, &self.rope_into(&step.rows, &pages, a)),
                ops::attn_prefill(device, &a.q, heads, window, &step.tiles, &pages, &a.attention, &a.workspace)?,
            ]);
            launches.extend(add(&a.attention, &layer.o)?);
            let (norm, x) = normed(&layer.post_norm, &layer.gate_up);
            launches.extend([norm, gemm(x, &layer.gate_up, Epilogue::Silu, &a.mlp)?]);
            launches.extend(add(&a.mlp, &layer.down)?);
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
        fusion: Fusion,
    ) -> Result<Vec<Launch>> {
        let (heads, n) = (self.heads(), rows.count);
        let gemv =
            |input: Input, w: &Linear, output: Output| ops::gemv(&self.device, input, w, n, output, &a.workspace);
        let quantised = || a.quantised.as_ref().expect("made for such a model");
        let normed = |norm, w: &Linear, launches: &mut Vec<Launch>| {
            if ops::gemv_reads_fp8(w, n) {
                launches.push(ops::rms_norm_summed_fp8(&a.residual, norm, n, quantised(), &a.workspace));
                return Input::Fp8(quantised());
            }
            if fusion.norm {
                return Input::Normed(&a.residual, norm);
            }
            launches.push(ops::rms_norm_summed(&a.residual, norm, n, &a.normed, &a.workspace));
            Input::Plain(&a.normed)
        };
        let add = |x: &Buffer, w: &Linear, launches: &mut Vec<Launch>| -> Result<()> {
            let x = match ops::gemv_reads_fp8(w, n) {
                false => Input::Plain(x),
                true => {
                    launches.push(ops::quantise(x, w.k(), n, quantised()));
                    Input::Fp8(quantised())
                }
            };
            if fusion.residual {
                launches.push(gemv(x, w, Output::Residual(&a.residual))?);
            } else {
                launches.push(gemv(x, w, Output::Matrix(&a.normed))?);
                launches.push(ops::add_residual(&a.normed, &a.residual, n, self.config.hidden_size, &a.workspace));
            }
            Ok(())
        };
        let mut launches = vec![self.embed(slots, rows, Tokens::Slots(&a.workspace), a)];
        for (i, layer) in self.layers.iter().enumerate() {
            let (pages, window) = (cache.layer(i), self.config.windows[i]);
            let into = self.rope_into(rows, &pages, a);
            let (out, next) = (&a.attention, Some(&layer.o));
            let x = normed(&layer.input_norm, &layer.qkv, &mut launches);
            match layer.qk_norm.as_ref().map(|(q, k)| (q, k)) {
                None if fusion.rope => launches.push(gemv(x, &layer.qkv, Output::Rope(&into))?),
                qk_norm => launches
                    .extend([gemv(x, &layer.qkv, Output::Matrix(&a.qkv))?, ops::rope_append(&a.qkv, qk_norm, &into)]),
            }
            let packed = fusion.packed_gqa;
            launches.push(ops::attn_decode(&a.q, heads, packed, window, rows, keys, &pages, out, next, &a.workspace));
            add(out, &layer.o, &mut launches)?;
            let x = normed(&layer.post_norm, &layer.gate_up, &mut launches);
            match fusion.silu {
                true => launches.push(gemv(x, &layer.gate_up, Output::Silu(&a.mlp))?),
                false => launches.extend([
                    gemv(x, &layer.gate_up, Output::Logits(&a.logits))?,
                    ops::silu_mul(&a.logits, n, self.config.intermediate_size, &a.mlp),
                ]),
            }
            add(&a.mlp, &layer.down, &mut launches)?;
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
