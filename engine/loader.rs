//! A model's weights from a checkpoint to the device, in the layout that the kernels want: first what goes where is written
//! down, for all that may be loaded together, then several threads do it, a piece at a time. Must not know the forward pass.

use crate::Result;
use crate::checkpoint::{Checkpoint, TensorView};
use crate::config::ModelConfig;
use crate::device::{Buffer, Device, Uploader};
use crate::model::{Layer, Weights};
use crate::ops::{self, KvScales, Linear, Norm};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

/// Gate and up, and the halves of each head of q and k, are interleaved by blocks of so many rows, so that a thread of the
/// products has both of what belongs together (kernels/epilogue.cuh, kernels/rope.cuh).
const INTERLEAVE: usize = 8;

/// Bytes of an element on the device.
const ELEMENT: usize = 2;

/// Bytes that a thread reads, and copies, at a time.
const PIECE: usize = 4 << 20;

/// At the most; more would not make a disk or a bus faster.
const THREADS: usize = 8;

/// A tensor [rows][..], perhaps of heads of so many rows whose halves are to be interleaved.
struct Part {
    name: String,
    rows: usize,
    head: Option<usize>,
}

/// Elements of one or two tensors that fill a range of a buffer: a block of the first, a block of the second, and so on.
struct Piece<'a> {
    buffer: Arc<Buffer>,
    /// Bytes.
    offset: usize,
    /// Each with the element that it begins with.
    sources: Vec<(TensorView<'a>, usize)>,
    /// Elements of each source.
    elements: usize,
    block: usize,
}

impl Piece<'_> {
    fn bytes(&self) -> usize {
        self.sources.len() * self.elements * ELEMENT
    }

    fn upload(&self, checkpoint: &Checkpoint, keep: bool, uploader: &mut Uploader) -> Result<()> {
        let all = || self.sources.iter().map(|(tensor, begin)| tensor.elements(*begin..begin + self.elements));
        all().try_for_each(|bytes| checkpoint.read(bytes))?;
        uploader.upload(&self.buffer, self.offset, self.bytes(), |out| {
            for (i, out) in out.chunks_mut(self.block * ELEMENT).enumerate() {
                let (tensor, begin) = &self.sources[i % self.sources.len()];
                let at = begin + i / self.sources.len() * self.block;
                tensor.bf16(at..at + out.len() / ELEMENT, out);
            }
            Ok(())
        })?;
        all().for_each(|bytes| checkpoint.release(bytes, keep));
        Ok(())
    }
}

/// Buffers are given out at once, to be filled by [`Loader::flush`].
pub(crate) struct Loader<'a> {
    device: &'a Device,
    weights: Weights<'a>,
    eps: f32,
    /// Dummy tensors so far: each has its own seed.
    made: u64,
    /// What [`Loader::flush`] loads.
    pieces: Vec<Piece<'a>>,
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
        Loader { device, weights, eps, made: 0, pieces: Vec::new(), done: 0, all, progress }
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
        let linear = |weight, bias, n, k| Linear::new(self.device, weight, bias, n, k);
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
                let buffer = self.device.alloc(size * ELEMENT)?;
                self.device.upload(&buffer, 0, bytemuck::cast_slice(&vec![half::bf16::ONE; size]))?;
                self.advance(size * ELEMENT);
                buffer.into()
            }
        };
        Ok(Norm { weight, eps: self.eps })
    }

    pub fn matrix(&mut self, name: &str, rows: usize, k: usize) -> Result<Arc<Buffer>> {
        self.stacked(&[Part { name: name.into(), rows, head: None }], &[k])
    }

    /// Tensors below one another.
    fn stacked(&mut self, parts: &[Part], rest: &[usize]) -> Result<Arc<Buffer>> {
        let row: usize = rest.iter().product();
        let bytes = parts.iter().map(|p| p.rows * row * ELEMENT).sum();
        let Weights::Checkpoint(checkpoint) = self.weights else { return self.dummy(bytes) };
        let buffer = Arc::new(self.device.alloc_to_fill(bytes)?);
        let mut offset = 0;
        for part in parts {
            let tensor = checkpoint.weights(&part.name, &[&[part.rows], rest].concat())?;
            let elements = part.rows * row;
            match part.head {
                None => self.fill(&buffer, offset, vec![(tensor, 0)], elements, elements),
                Some(dim) => {
                    let half = dim / 2 * row;
                    for head in (0..elements).step_by(2 * half) {
                        let halves = vec![(tensor, head), (tensor, head + half)];
                        self.fill(&buffer, offset + head * ELEMENT, halves, half, INTERLEAVE * row);
                    }
                }
            }
            offset += elements * ELEMENT;
        }
        Ok(buffer)
    }

    /// Two matrices [rows][k]: eight rows of the first, then eight of the second.
    fn interleaved(&mut self, first: &str, second: &str, rows: usize, k: usize) -> Result<Arc<Buffer>> {
        let bytes = 2 * rows * k * ELEMENT;
        let Weights::Checkpoint(checkpoint) = self.weights else { return self.dummy(bytes) };
        let sources = vec![(checkpoint.weights(first, &[rows, k])?, 0), (checkpoint.weights(second, &[rows, k])?, 0)];
        let buffer = Arc::new(self.device.alloc_to_fill(bytes)?);
        self.fill(&buffer, 0, sources, rows * k, INTERLEAVE * k);
        Ok(buffer)
    }

    /// Notes that a range of the buffer is to be filled with so many elements of each source, in turns of `block`.
    fn fill(
        &mut self,
        to: &Arc<Buffer>,
        offset: usize,
        from: Vec<(TensorView<'a>, usize)>,
        elements: usize,
        block: usize,
    ) {
        let step = match from.len() {
            1 => PIECE / ELEMENT,
            count => (PIECE / ELEMENT / count / block).max(1) * block,
        };
        self.pieces.extend((0..elements).step_by(step).map(|begin| Piece {
            buffer: to.clone(),
            offset: offset + begin * from.len() * ELEMENT,
            sources: from.iter().map(|&(tensor, first)| (tensor, first + begin)).collect(),
            elements: step.min(elements - begin),
            block: block.min(step),
        }));
    }

    /// Loads all that has been asked for so far: what is launched after that finds it on the device.
    ///
    /// # Errors
    /// The first of any thread; the others stop at their next piece.
    pub fn flush(&mut self) -> Result<()> {
        let Weights::Checkpoint(checkpoint) = self.weights else { return Ok(()) };
        let pieces = std::mem::take(&mut self.pieces);
        let largest = pieces.iter().map(Piece::bytes).max().unwrap_or(0);
        let threads = THREADS.min(pieces.len());
        let uploaders = (0..threads).map(|_| self.device.uploader(largest)).collect::<Result<Vec<_>>>()?;
        // The host target's weights lie where the system caches files. What does not fit beside them it would drop before the
        // next start anyway, but only after it has looked for memory for all of it, which takes longer than the copying.
        let keep = !self.device.is_host() || 2 * checkpoint.bytes() <= self.device.memory()?.0;
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let (sender, loaded) = mpsc::channel();
            for mut uploader in uploaders {
                let (sender, pieces, next) = (sender.clone(), &pieces, &next);
                scope.spawn(move || {
                    while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = piece.upload(checkpoint, keep, &mut uploader).map(|()| piece.bytes());
                        // Nobody listens any more where another thread has failed.
                        if sender.send(result).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            loaded.into_iter().try_for_each(|bytes| bytes.map(|bytes| self.advance(bytes)))
        })
    }

    fn dummy(&mut self, bytes: usize) -> Result<Arc<Buffer>> {
        let buffer = self.device.alloc(bytes)?;
        self.device.launch(&ops::random(self.device, &buffer, bytes / ELEMENT, self.made, DUMMY_DEVIATION))?;
        self.made += 1;
        self.advance(bytes);
        Ok(buffer.into())
    }

    fn advance(&mut self, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(self.done, self.all);
    }
}

/// Of dummy weights: what models are initialised with, so that activations stay near 1.
const DUMMY_DEVIATION: f32 = 0.02;
