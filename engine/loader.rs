//! A model's weights from a checkpoint to the device, in the layout that the kernels want: first what goes where is written
//! down, for all that may be loaded together, then several threads do it, a piece at a time. Must not know the forward pass.

use crate::Result;
use crate::checkpoint::{Checkpoint, Fp8View, SCALE_BLOCK, Scales, TensorView};
use crate::config::{LayerTypes, ModelConfig, WeightType};
use crate::device::{Buffer, Device, Uploader};
use crate::model::{self, Layer, Weights};
use crate::ops::{self, KvScales, Linear, Norm};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

/// Gate and up, and the halves of each head of q and k, are interleaved by blocks of so many rows, so that a thread of the
/// products has both of what belongs together (kernels/epilogue.cuh, kernels/rope.cuh).
const INTERLEAVE: usize = 8;

/// Bytes that a thread reads, and copies, at a time.
const PIECE: usize = 4 << 20;

/// At the most; more would not make a disk or a bus faster.
const THREADS: usize = 8;

/// Bytes of bf16 that wait to be quantised, about: a layer of a large model, or many of a small one.
const WAITING: usize = 1 << 30;

/// A tensor [rows][..], perhaps of heads of so many rows whose halves are to be interleaved.
struct Part {
    name: String,
    rows: usize,
    head: Option<usize>,
}

/// The matrix of a product: tensors [rows][k] below one another, or eight rows of the first by turns with eight of the second.
enum Matrix {
    Stacked(Vec<Part>),
    Alternating([Part; 2]),
}

impl Matrix {
    fn parts(&self) -> &[Part] {
        match self {
            Matrix::Stacked(parts) => parts,
            Matrix::Alternating(parts) => parts,
        }
    }

    fn rows(&self) -> usize {
        self.parts().iter().map(|part| part.rows).sum()
    }

    /// Of each [`INTERLEAVE`] rows on the device: which tensor they are of, and the first of them there.
    fn groups(&self) -> Vec<(usize, usize)> {
        let counts = |part: &Part| part.rows / INTERLEAVE;
        match self {
            Matrix::Stacked(parts) => {
                let of_part = |(i, part): (usize, &Part)| {
                    let head = part.head.map(|dim| dim / INTERLEAVE);
                    // Of a head's groups, the even ones are its first half and the odd ones its second.
                    let place = move |group: usize| match head {
                        None => group,
                        Some(n) => group / n * n + group % 2 * (n / 2) + group % n / 2,
                    };
                    (0..counts(part)).map(move |group| (i, place(group) * INTERLEAVE))
                };
                parts.iter().enumerate().flat_map(of_part).collect()
            }
            Matrix::Alternating([first, _]) => {
                (0..2 * counts(first)).map(|group| (group % 2, group / 2 * INTERLEAVE)).collect()
            }
        }
    }
}

/// The four matrices of a layer, in the order of [`LayerTypes`].
fn matrices(c: &ModelConfig, layer: usize) -> [Matrix; 4] {
    let (h, inner) = (c.hidden_size, c.intermediate_size);
    let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    let part = |name: &str, rows, head| Part { name: format!("model.layers.{layer}.{name}.weight"), rows, head };
    let head = Some(c.head_dim);
    [
        Matrix::Stacked(vec![
            part("self_attn.q_proj", q, head),
            part("self_attn.k_proj", kv, head),
            part("self_attn.v_proj", kv, None),
        ]),
        Matrix::Stacked(vec![part("self_attn.o_proj", h, None)]),
        Matrix::Alternating([part("mlp.gate_proj", inner, None), part("mlp.up_proj", inner, None)]),
        Matrix::Stacked(vec![part("mlp.down_proj", h, None)]),
    ]
}

/// k of each of them.
fn columns(c: &ModelConfig) -> [usize; 4] {
    [c.hidden_size, c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size]
}

/// What a layer's matrices are to be on the device.
///
/// # Errors
/// Tensors that are missing, of the wrong shape, or that are one matrix and not of one type.
pub(crate) fn layer_types(weights: Weights, c: &ModelConfig, layer: usize, quantize: bool) -> Result<LayerTypes> {
    let wide = if quantize { WeightType::Fp8Rows } else { WeightType::Bf16 };
    let Weights::Checkpoint(checkpoint) = weights else { return Ok(LayerTypes::of(wide)) };
    let type_of = |(matrix, k): (Matrix, usize)| -> Result<WeightType> {
        let views = matrix.parts().iter().map(|part| checkpoint.fp8(&part.name, [part.rows, k]));
        let views = views.collect::<Result<Vec<_>>>()?;
        let any = |is: fn(&Option<Fp8View>) -> bool| views.iter().position(is);
        let wides = any(|view| view.is_none());
        let narrow = any(|view| view.is_some());
        let rows = any(|view| view.as_ref().is_some_and(|view| matches!(view.scales, Scales::Rows(_))));
        let blocks = any(|view| view.as_ref().is_some_and(|view| matches!(view.scales, Scales::Blocks(_))));
        // One scale for a tensor goes with any.
        if let Some((first, other)) = wides.zip(narrow).or(rows.zip(blocks)) {
            let [first, other] = [first.min(other), first.max(other)].map(|i| &matrix.parts()[i].name);
            let problem =
                "are of one matrix on the device, and one is fp8 or has scales of another kind: make them alike";
            return Err(checkpoint.problem(format!("tensors {first:?} and {other:?} {problem}")));
        }
        Ok(match (narrow, blocks) {
            (None, _) => wide,
            (_, Some(_)) => WeightType::Fp8Blocks,
            _ => WeightType::Fp8Rows,
        })
    };
    let [qkv, o, gate_up, down] =
        matrices(c, layer).into_iter().zip(columns(c)).map(type_of).collect::<Result<Vec<_>>>()?[..]
    else {
        unreachable!("four matrices")
    };
    Ok(LayerTypes { qkv, o, gate_up, down })
}

/// A tensor on its way.
#[derive(Clone)]
enum Source<'a> {
    /// Becomes bf16.
    Wide(TensorView<'a>),
    /// Stays e4m3.
    Fp8(Arc<Fp8View<'a>>),
}

impl<'a> Source<'a> {
    /// Bytes of an element on the device.
    fn element(&self) -> usize {
        match self {
            Source::Wide(_) => 2,
            Source::Fp8(_) => 1,
        }
    }

    /// The bytes of a range of the elements, as the file has them.
    fn elements(&self, range: Range<usize>) -> &'a [u8] {
        match self {
            Source::Wide(tensor) => tensor.elements(range),
            Source::Fp8(view) => &view.bytes[range],
        }
    }

    fn write(&self, range: Range<usize>, out: &mut [u8]) -> Result<()> {
        match self {
            Source::Wide(tensor) => tensor.bf16(range, out),
            Source::Fp8(view) => out.copy_from_slice(view.piece(range)?),
        }
        Ok(())
    }
}

/// Elements of one or two tensors that fill a range of a buffer: a block of the first, a block of the second, and so on.
struct Piece<'a> {
    buffer: Arc<Buffer>,
    /// Bytes.
    offset: usize,
    /// Each with the element that it begins with.
    sources: Vec<(Source<'a>, usize)>,
    /// Elements of each source.
    elements: usize,
    block: usize,
}

impl Piece<'_> {
    /// Of an element.
    fn element(&self) -> usize {
        self.sources[0].0.element()
    }

    fn bytes(&self) -> usize {
        self.sources.len() * self.elements * self.element()
    }

    fn upload(&self, checkpoint: &Checkpoint, keep: bool, uploader: &mut Uploader) -> Result<()> {
        let all = || self.sources.iter().map(|(source, begin)| source.elements(*begin..begin + self.elements));
        all().try_for_each(|bytes| checkpoint.read(bytes))?;
        uploader.upload(&self.buffer, self.offset, self.bytes(), |out| {
            out.chunks_mut(self.block * self.element()).enumerate().try_for_each(|(i, out)| {
                let (source, begin) = &self.sources[i % self.sources.len()];
                let at = begin + i / self.sources.len() * self.block;
                source.write(at..at + out.len() / self.element(), out)
            })
        })?;
        all().for_each(|bytes| checkpoint.release(bytes, keep));
        Ok(())
    }
}

/// A matrix [n][k] that is bf16 first and e4m3 in the end.
struct Quantising {
    wide: Arc<Buffer>,
    out: Arc<Buffer>,
    /// [n].
    scales: Arc<Buffer>,
    n: usize,
    k: usize,
}

/// Buffers are given out at once, to be filled by [`Loader::flush`].
pub(crate) struct Loader<'a> {
    device: &'a Device,
    weights: Weights<'a>,
    eps: f32,
    /// Dummy tensors so far: each has its own seed.
    made: u64,
    /// What [`Loader::flush`] loads, and what it quantises then.
    pieces: Vec<Piece<'a>>,
    quantising: Vec<Quantising>,
    /// One for each thread, from the first flush on.
    uploaders: Vec<Uploader>,
    done: u64,
    all: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Loader<'a> {
    /// `progress` hears of bytes done and bytes in all, before they are quantised.
    ///
    /// # Errors
    /// Those of [`layer_types`].
    pub fn new(
        device: &'a Device,
        weights: Weights<'a>,
        c: &ModelConfig,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Loader<'a>> {
        let as_they_come = ModelConfig { weight_types: weights.types(c, false)?, ..c.clone() };
        Ok(Loader {
            device,
            weights,
            eps: c.rms_norm_eps,
            made: 0,
            pieces: Vec::new(),
            quantising: Vec::new(),
            uploaders: Vec::new(),
            done: 0,
            all: model::weight_bytes(&as_they_come),
            progress,
        })
    }

    pub fn layer(&mut self, c: &ModelConfig, index: usize) -> Result<Layer> {
        let name = |suffix: &str| format!("model.layers.{index}.{suffix}");
        let (types, [k_hidden, k_heads, _, k_inner]) = (c.weight_types[index], columns(c));
        let [qkv, o, gate_up, down] = matrices(c, index);
        let bias = |matrix: &Matrix| -> Matrix {
            let name = |part: &Part| part.name.replace(".weight", ".bias");
            let parts = matrix.parts().iter();
            Matrix::Stacked(parts.map(|p| Part { name: name(p), rows: p.rows, head: p.head }).collect())
        };
        let qkv_bias = if c.qkv_bias { Some(self.wide(&bias(&qkv), &[])?) } else { None };
        let qk_norm = match c.qk_norm {
            true => Some((
                self.norm(&name("self_attn.q_norm.weight"), c.head_dim)?,
                self.norm(&name("self_attn.k_norm.weight"), c.head_dim)?,
            )),
            false => None,
        };
        let o_bias = if c.o_bias { Some(self.wide(&bias(&o), &[])?) } else { None };
        Ok(Layer {
            qkv: self.linear(&qkv, k_hidden, qkv_bias, types.qkv)?,
            o: self.linear(&o, k_heads, o_bias, types.o)?,
            gate_up: self.linear(&gate_up, k_hidden, None, types.gate_up)?,
            down: self.linear(&down, k_inner, None, types.down)?,
            qk_norm,
            input_norm: self.norm(&name("input_layernorm.weight"), c.hidden_size)?,
            post_norm: self.norm(&name("post_attention_layernorm.weight"), c.hidden_size)?,
            kv_scales: self.kv_scales(index)?,
        })
    }

    /// A matrix [n][k] as `kind` says.
    fn linear(&mut self, matrix: &Matrix, k: usize, bias: Option<Arc<Buffer>>, kind: WeightType) -> Result<Linear> {
        let n = matrix.rows();
        if kind == WeightType::Bf16 {
            return Linear::new(self.device, self.wide(matrix, &[k])?, bias, n, k);
        }
        if let Some(views) = self.fp8_views(matrix, k)? {
            let scales = self.scales(matrix, &views, k, kind)?;
            let sources = views.into_iter().map(|view| Source::Fp8(Arc::new(view))).collect();
            return Linear::fp8(self.device, self.place(matrix, sources, k)?, scales, bias, n, k);
        }
        let (out, scales) = (Arc::new(self.device.alloc_to_fill(n * k)?), Arc::new(self.device.alloc(n * 4)?));
        let wide = self.wide(matrix, &[k])?;
        self.quantising.push(Quantising { wide, out: out.clone(), scales: scales.clone(), n, k });
        if self.quantising.iter().map(|q| q.wide.bytes()).sum::<usize>() >= WAITING {
            self.flush()?;
        }
        Linear::fp8(self.device, out, ops::Scales::Rows(scales), bias, n, k)
    }

    /// The tensors of a matrix, where the checkpoint has them in fp8.
    fn fp8_views(&self, matrix: &Matrix, k: usize) -> Result<Option<Vec<Fp8View<'a>>>> {
        let Weights::Checkpoint(checkpoint) = self.weights else { return Ok(None) };
        matrix.parts().iter().map(|part| checkpoint.fp8(&part.name, [part.rows, k])).collect()
    }

    /// The scales of a matrix, in the order of its rows on the device.
    fn scales(&mut self, matrix: &Matrix, views: &[Fp8View], k: usize, kind: WeightType) -> Result<ops::Scales> {
        let (groups, blocks) = (matrix.groups(), k.div_ceil(SCALE_BLOCK));
        let by_rows = kind == WeightType::Fp8Rows;
        let of_group = |&(i, row): &(usize, usize), block: usize| match &views[i].scales {
            Scales::Tensor(scale) => vec![*scale; if by_rows { INTERLEAVE } else { 1 }],
            Scales::Rows(scales) => scales[row..row + INTERLEAVE].to_vec(),
            Scales::Blocks(scales) => vec![scales[row / SCALE_BLOCK * blocks + block]],
        };
        let columns = if by_rows { 1 } else { blocks };
        let numbers: Vec<f32> =
            (0..columns).flat_map(|block| groups.iter().flat_map(move |group| of_group(group, block))).collect();
        let buffer = Arc::new(self.device.alloc(numbers.len() * 4)?);
        self.device.upload(&buffer, 0, bytemuck::cast_slice(&numbers))?;
        self.advance(buffer.bytes());
        Ok(if by_rows { ops::Scales::Rows(buffer) } else { ops::Scales::Blocks(buffer) })
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
            Weights::Checkpoint(_) => {
                self.wide(&Matrix::Stacked(vec![Part { name: name.into(), rows: size, head: None }]), &[])?
            }
            Weights::Dummy => {
                let buffer = self.device.alloc(size * 2)?;
                self.device.upload(&buffer, 0, bytemuck::cast_slice(&vec![half::bf16::ONE; size]))?;
                self.advance(size * 2);
                buffer.into()
            }
        };
        Ok(Norm { weight, eps: self.eps })
    }

    pub fn matrix(&mut self, name: &str, rows: usize, k: usize) -> Result<Arc<Buffer>> {
        self.wide(&Matrix::Stacked(vec![Part { name: name.into(), rows, head: None }]), &[k])
    }

    /// In bf16: a matrix whose rows are of the shape `rest`, which is none for a vector.
    fn wide(&mut self, matrix: &Matrix, rest: &[usize]) -> Result<Arc<Buffer>> {
        let row: usize = rest.iter().product();
        let Weights::Checkpoint(checkpoint) = self.weights else { return self.dummy(matrix.rows() * row * 2) };
        let tensor = |part: &Part| checkpoint.weights(&part.name, &[&[part.rows], rest].concat()).map(Source::Wide);
        let sources = matrix.parts().iter().map(tensor).collect::<Result<_>>()?;
        self.place(matrix, sources, row)
    }

    /// A buffer for the matrix's tensors, each [rows][row], and notes on what goes where.
    fn place(&mut self, matrix: &Matrix, sources: Vec<Source<'a>>, row: usize) -> Result<Arc<Buffer>> {
        let element = sources[0].element();
        let buffer = Arc::new(self.device.alloc_to_fill(matrix.rows() * row * element)?);
        let parts = match matrix {
            Matrix::Stacked(parts) => parts,
            Matrix::Alternating([first, _]) => {
                let sources = sources.into_iter().map(|source| (source, 0)).collect();
                self.fill(&buffer, 0, sources, first.rows * row, INTERLEAVE * row);
                return Ok(buffer);
            }
        };
        let mut offset = 0;
        for (part, source) in parts.iter().zip(sources) {
            let elements = part.rows * row;
            match part.head {
                None => self.fill(&buffer, offset, vec![(source, 0)], elements, elements),
                Some(dim) => {
                    let half = dim / 2 * row;
                    for head in (0..elements).step_by(2 * half) {
                        let halves = vec![(source.clone(), head), (source.clone(), head + half)];
                        self.fill(&buffer, offset + head * element, halves, half, INTERLEAVE * row);
                    }
                }
            }
            offset += elements * element;
        }
        Ok(buffer)
    }

    /// Notes that a range of the buffer is to be filled with so many elements of each source, in turns of `block`.
    fn fill(&mut self, to: &Arc<Buffer>, offset: usize, from: Vec<(Source<'a>, usize)>, elements: usize, block: usize) {
        let element = from[0].0.element();
        let step = match from.len() {
            1 => PIECE / element,
            count => (PIECE / element / count / block).max(1) * block,
        };
        self.pieces.extend((0..elements).step_by(step).map(|begin| Piece {
            buffer: to.clone(),
            offset: offset + begin * from.len() * element,
            sources: from.iter().map(|(source, first)| (source.clone(), first + begin)).collect(),
            elements: step.min(elements - begin),
            block: block.min(step),
        }));
    }

    /// Loads all that has been asked for so far: what is launched after that finds it on the device.
    ///
    /// # Errors
    /// The first of any thread; the others stop at their next piece.
    pub fn flush(&mut self) -> Result<()> {
        if let Weights::Checkpoint(checkpoint) = self.weights {
            self.upload(checkpoint)?;
        }
        for q in std::mem::take(&mut self.quantising) {
            self.device.launch(&ops::quantise_weight(&q.wide, q.n, q.k, &q.out, &q.scales))?;
        }
        Ok(())
    }

    fn upload(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let pieces = std::mem::take(&mut self.pieces);
        if self.uploaders.is_empty() {
            self.uploaders = (0..THREADS).map(|_| self.device.uploader(PIECE)).collect::<Result<_>>()?;
        }
        let mut uploaders = std::mem::take(&mut self.uploaders);
        // The host target's weights lie where the system caches files. What does not fit beside them it would drop before the
        // next start anyway, but only after it has looked for memory for all of it, which takes longer than the copying.
        let keep = !self.device.is_host() || 2 * checkpoint.bytes() <= self.device.memory()?.0;
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let (sender, loaded) = mpsc::channel();
            for uploader in &mut uploaders {
                let (sender, pieces, next) = (sender.clone(), &pieces, &next);
                scope.spawn(move || {
                    while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = piece.upload(checkpoint, keep, uploader).map(|()| piece.bytes());
                        // Nobody listens any more where another thread has failed.
                        if sender.send(result).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            loaded.into_iter().try_for_each(|bytes| bytes.map(|bytes| self.advance(bytes)))
        })?;
        self.uploaders = uploaders;
        Ok(())
    }

    fn dummy(&mut self, bytes: usize) -> Result<Arc<Buffer>> {
        let buffer = self.device.alloc_to_fill(bytes)?;
        self.device.launch(&ops::random(self.device, &buffer, bytes / 2, self.made, DUMMY_DEVIATION))?;
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
