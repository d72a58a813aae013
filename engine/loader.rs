//! A model's weights from a checkpoint to the device, in the layout that the kernels want.
//! Must not know the forward pass.

use crate::Result;
use crate::config::ModelConfig;
use crate::device::{Buffer, Device};
use crate::model::{Layer, Weights};
use crate::ops::{self, KvScales, Linear, Norm};
use std::ops::Range;
use std::sync::Arc;

/// Gate and up, and the halves of each head of q and k, are interleaved by blocks of so many rows, so that a thread of the
/// products has both of what belongs together (kernels/epilogue.cuh, kernels/rope.cuh).
const INTERLEAVE: usize = 8;

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

pub(crate) struct Loader<'a> {
    device: &'a Device,
    weights: Weights<'a>,
    eps: f32,
    /// Dummy tensors so far: each has its own seed.
    made: u64,
    done: u64,
    all: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Loader<'a> {
    /// `all`: bytes that `progress` hears of, with those done.
    pub fn new(
        device: &'a Device,
        weights: Weights<'a>,
        eps: f32,
        all: u64,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Loader<'a> {
        Loader { device, weights, eps, made: 0, done: 0, all, progress }
    }

    pub fn layer(&mut self, c: &ModelConfig, index: usize) -> Result<Layer> {
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

    pub fn norm(&mut self, name: &str, size: usize) -> Result<Norm> {
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

    pub fn matrix(&mut self, name: &str, rows: usize, k: usize) -> Result<Buffer> {
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
