//! `ponder bench kernels`: every kernel alone, at the shapes of real models.
//!
//! What is measured: one launch, between two events behind a launch that makes L2 cold (see [`Device::time_after`]), without
//! programmatic dependence; several times within a time limit, of which the median counts. All data is random, because tensor
//! cores that multiply zeros draw less power and clock higher. On the host target nothing is made cold, and the time is that
//! of the simulation: it says nothing about a GPU. Not yet run on a GPU; there, lines that a kernel asks L2 to keep (x of a gemv,
//! K and V of attn_prefill) may outlast the product that makes it cold.

use super::{Roofline, percentile};
use crate::batch::{PageEntry, SamplingParams, SlotSetup};
use crate::device::{Buffer, Device, Launch};
use crate::kernels::params::{MAX_DECODE_ROWS, PAGE_TOKENS, TRAIT_REAL};
use crate::kv_cache::KvCache;
use crate::ops::{
    self, Epilogue, Heads, Input, KvScales, KvType, Linear, Norm, Operand, Output, Quantised, RopeInto, Rows, Scales,
    Tiles, Tokens, Workspace,
};
use crate::slots::Slots;
use crate::tiles::{ChunkRows, prefill_tiles};
use crate::tiling::{TILE_ROWS, Tiling};
use crate::{Error, Result};
use serde::Serialize;
use std::sync::Arc;
use std::time::Instant;

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// What the kernel is for: qkv, down, head, prefill, ...
    pub name: &'static str,
    pub model: &'static str,
    /// gemm, gemv, attn_prefill, attn_decode, sample, norm, embed, rope, random or unfused.
    pub op: &'static str,
    pub kernel: &'static str,
    /// Blocks in a cluster.
    pub cluster: u32,
    pub shape: serde_json::Map<String, serde_json::Value>,
    pub us: Microseconds,
    /// That must move at the least, and be computed.
    pub bytes: u64,
    pub flops: u64,
    pub gb_per_s: f64,
    pub tflop_per_s: f64,
    /// None on the host target.
    pub roofline_percent: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Microseconds {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub runs: usize,
}

impl Measurement {
    /// What stands above the lines.
    pub fn heading() -> String {
        format!(
            "{:<13} {:<12} {:<11} {:<47} {:<21} {:>10} {:<33} {:>9} {:>9} {:>10}",
            "model", "op", "name", "shape", "kernel", "us", "(min .. max, runs)", "GB/s", "TFLOP/s", "% roofline"
        )
    }

    /// A line under [`Measurement::heading`].
    pub fn line(&self) -> String {
        let us = &self.us;
        format!(
            "{:<86} {:<21} {:>10.2} {:<33} {:>9.1} {:>9.2} {:>10}",
            label(self.model, self.op, self.name, &self.shape),
            if self.cluster == 1 { self.kernel.into() } else { format!("{} x{}", self.kernel, self.cluster) },
            us.median,
            format!("({:.2} .. {:.2}, {})", us.min, us.max, us.runs),
            self.gb_per_s,
            self.tflop_per_s,
            self.roofline_percent.map_or("-".into(), |p| format!("{p:.1}")),
        )
    }
}

/// A dimension's name in the table.
fn short(key: &str) -> &str {
    match key {
        "q_heads" => "q",
        "kv_heads" => "kv",
        "head_dim" => "d",
        "sequences" => "seqs",
        _ => key,
    }
}

/// What a filter is held against, and the beginning of a line.
fn label(model: &str, op: &str, name: &str, shape: &serde_json::Map<String, serde_json::Value>) -> String {
    let visible = shape.iter().filter(|(key, _)| *key != "causal");
    let shape: Vec<String> = visible.map(|(key, value)| format!("{}={value}", short(key))).collect();
    format!("{model:<13} {op:<12} {name:<11} {}", shape.join(" "))
}

/// A model's matrices and heads, and how large the cases are.
struct Shape {
    name: &'static str,
    hidden: u32,
    intermediate: u32,
    heads: Heads,
    vocab: u32,
    qkv_bias: bool,
    sizes: &'static Sizes,
}

struct Sizes {
    decode_rows: &'static [u32],
    prefill_rows: &'static [u32],
    /// Sequences and the keys of each.
    decode: &'static [(u32, u32)],
    /// Chunks: the position of the first token, and how many tokens.
    prefill: &'static [(&'static str, &'static [(u32, u32)])],
}

const SMALL: Sizes = Sizes {
    decode_rows: &[1, 16, 20, 40],
    prefill_rows: &[100, 300],
    decode: &[(1, 100), (4, 300)],
    prefill: &[("prefill", &[(0, 100)]), ("chunk", &[(130, 70)])],
};

const FULL: Sizes = Sizes {
    decode_rows: &[1, 8, 16, 32, 64],
    prefill_rows: &[128, 512, 2048, 8192],
    decode: &[(1, 1024), (1, 8192), (1, 32768), (16, 1024), (16, 8192), (16, 32768)],
    prefill: &[
        ("prefill", &[(0, 512)]),
        ("prefill", &[(0, 2048)]),
        ("prefill", &[(0, 4096)]),
        ("prefill", &[(0, 8192)]),
        ("prefill", &[(0, 16384)]),
        ("ragged", &[(0, 100), (0, 3000), (0, 37), (0, 900), (1000, 500), (0, 2047), (5000, 64), (0, 1544)]),
        ("chunk", &[(8192, 2048)]),
    ],
};

/// From the models' config.json.
const SHAPES: [Shape; 6] = [
    shape("tiny", 256, 320, (4, 2, 64), 1024, true, &SMALL),
    shape("tiny-d128", 256, 320, (4, 1, 128), 1024, false, &SMALL),
    shape("llama-3.2-1b", 2048, 8192, (32, 8, 64), 128_256, false, &FULL),
    shape("llama-3.1-8b", 4096, 14336, (32, 8, 128), 128_256, false, &FULL),
    shape("qwen2.5-7b", 3584, 18944, (28, 4, 128), 152_064, true, &FULL),
    shape("qwen2.5-32b", 5120, 27648, (40, 8, 128), 152_064, true, &FULL),
];

/// Products of fp8 weights.
const GEMM_FP8: &str = "gemm_fp8";
const GEMV_FP8: &str = "gemv_fp8";

/// Products of square matrices, which everybody quotes.
const SQUARE: &str = "square";
const SQUARES: [u32; 2] = [4096, 8192];

const fn shape(
    name: &'static str,
    hidden: u32,
    intermediate: u32,
    (query, kv, dim): (u32, u32, u32),
    vocab: u32,
    qkv_bias: bool,
    sizes: &'static Sizes,
) -> Shape {
    Shape { name, hidden, intermediate, heads: Heads { query, kv, dim }, vocab, qkv_bias, sizes }
}

/// Names for `--shapes`.
pub fn shape_names() -> Vec<&'static str> {
    SHAPES.iter().map(|s| s.name).chain([SQUARE]).collect()
}

/// What to measure, and how long.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Of [`shape_names`], or "all"; empty: the tiny ones on the host target, else all others.
    pub shapes: Vec<String>,
    pub filter: Option<String>,
    /// Of prefill products: every tile that there is a kernel for, not only the one that the cost model picks.
    pub all_tiles: bool,
    /// For each case.
    pub seconds: f64,
}

/// Measures; `progress` sees everything so far after each case.
///
/// # Errors
/// Shapes that nobody knows, a filter that nothing matches, too little memory, a device that fails.
pub fn run(device: &Device, options: &Options, progress: &mut dyn FnMut(&[Measurement]) -> Result<()>) -> Result<()> {
    let names = shape_names();
    if let Some(unknown) = options.shapes.iter().find(|s| *s != "all" && !names.contains(&s.as_str())) {
        return Err(Error::Usage(format!("--shapes {unknown}: there are {}, and all", names.join(", "))));
    }
    let wanted = |name: &str| match options.shapes.as_slice() {
        [] => device.is_host() == name.starts_with("tiny"),
        some => some.iter().any(|s| s == name || s == "all"),
    };
    let mut bench = Bench {
        device,
        options,
        model: "",
        cold: if device.is_host() { None } else { Some(Cold::new(device)?) },
        seed: 0,
        results: Vec::new(),
        progress,
    };
    for shape in SHAPES.iter().filter(|s| wanted(s.name)) {
        bench.model = shape.name;
        bench.products(shape)?;
        bench.attention(shape)?;
        bench.rows(shape)?;
        bench.sampler(shape)?;
    }
    if wanted(SQUARE) {
        bench.model = SQUARE;
        for n in SQUARES {
            for op in ["gemm", GEMM_FP8] {
                bench.gemm(op, "product", n, n, false, Epilogue::Plain, &[n])?;
            }
        }
    }
    if bench.results.is_empty() {
        let filter = options.filter.as_deref().unwrap_or_default();
        return Err(Error::Usage(format!("--filter {filter:?}: no line of the table contains that")));
    }
    Ok(())
}

/// A launch that leaves nothing useful in L2: a product that reads a matrix of 128 MiB, more than twice the L2 of an H100.
/// Its lines are clean: after a fill the measured kernel would wait for dirty ones to be written back.
struct Cold {
    launch: Launch,
    _buffers: (Arc<Buffer>, Buffer, Buffer),
}

impl Cold {
    fn new(device: &Device) -> Result<Cold> {
        const SIDE: usize = 8192;
        const ROWS: usize = 128;
        let buffers =
            (Arc::new(device.alloc(SIDE * SIDE * 2)?), device.alloc(ROWS * SIDE * 2)?, device.alloc(ROWS * SIDE * 2)?);
        let (w, x, out) = &buffers;
        device.launch(&ops::random(device, w, SIDE * SIDE, 1, 0.02))?;
        device.launch(&ops::random(device, x, ROWS * SIDE, 2, 1.0))?;
        let linear = Linear::new(device, w.clone(), None, SIDE, SIDE)?;
        let launch = ops::gemm(device, x, &linear, ROWS as u32, Epilogue::Plain, out)?;
        Ok(Cold { launch, _buffers: buffers })
    }
}

type Dimensions<'a> = &'a [(&'static str, u32)];

struct Bench<'a> {
    device: &'a Device,
    options: &'a Options,
    model: &'static str,
    cold: Option<Cold>,
    seed: u64,
    results: Vec<Measurement>,
    progress: &'a mut dyn FnMut(&[Measurement]) -> Result<()>,
}

/// A batch of sequences in a KV cache of one layer: random keys and values, and what says which row belongs where.
struct Sequences {
    cache: KvCache,
    /// [rows] i32.
    slot: Buffer,
    position: Buffer,
    chunks: Vec<ChunkRows>,
    rows: u32,
    keys: u64,
    pairs: u64,
}

impl Bench<'_> {
    // ---- the cases ----

    fn products(&mut self, s: &Shape) -> Result<()> {
        let (qkv, q) = (s.heads.columns(), s.heads.query * s.heads.dim);
        let matrices = [
            ("qkv", qkv, s.hidden, s.qkv_bias, Epilogue::Plain),
            ("o", s.hidden, q, false, Epilogue::Residual),
            ("gate_up", 2 * s.intermediate, s.hidden, false, Epilogue::Silu),
            ("down", s.hidden, s.intermediate, false, Epilogue::Residual),
        ];
        for (name, n, k, bias, epilogue) in matrices {
            for op in ["gemm", GEMM_FP8] {
                self.gemm(op, name, n, k, bias, epilogue, s.sizes.prefill_rows)?;
            }
            for op in ["gemv", GEMV_FP8] {
                self.gemv(op, name, n, k, bias, s)?;
            }
        }
        if s.name.starts_with("tiny") {
            // What models with norms of q and k do, none of which is among the shapes; and what only an ablation does.
            for op in ["gemv", GEMV_FP8] {
                self.gemv(op, "qkv_plain", qkv, s.hidden, s.qkv_bias, s)?;
            }
            self.gemv("gemv", "plain", qkv, s.hidden, s.qkv_bias, s)?;
            self.gemv("gemv", "rope", qkv, s.hidden, s.qkv_bias, s)?;
            self.gemv("gemv", "silu", 2 * s.intermediate, s.hidden, false, s)?;
            self.gemv("gemv", "gate_up_f32", 2 * s.intermediate, s.hidden, false, s)?;
            self.unfused(s)?;
        }
        self.gemv("gemv", "head", s.vocab, s.hidden, false, s)
    }

    #[allow(clippy::too_many_arguments)]
    fn gemm(
        &mut self,
        op: &'static str,
        name: &'static str,
        n: u32,
        k: u32,
        bias: bool,
        epilogue: Epilogue,
        rows: &[u32],
    ) -> Result<()> {
        let wanted = self.wanted(op, name, rows.iter().map(|&rows| [("rows", rows), ("n", n), ("k", k)]));
        let Some(most) = wanted.iter().map(|shape| shape[0].1).max() else { return Ok(()) };
        let w = self.linear(n, k, bias, op == GEMM_FP8)?;
        let x = self.random(most as usize * k as usize, 1.0)?;
        let out = self.random(most as usize * n as usize, 1.0)?;
        let quantised = Quantised::new(self.device, most, k as usize)?;
        self.device.launch(&ops::quantise(&x, k as usize, most, &quantised))?;
        let x = if op == GEMM_FP8 { Operand::Fp8(&quantised) } else { Operand::Bf16(&x) };
        for shape in wanted {
            let rows = shape[0].1;
            if !self.options.all_tiles {
                let launch = ops::gemm(self.device, x, &w, rows, epilogue, &out)?;
                self.measure(op, name, &shape, &launch)?;
                continue;
            }
            for &(columns, _) in ops::gemm_kernels(epilogue, bias, w.is_fp8()) {
                for cluster in if rows > TILE_ROWS { 1..=2 } else { 1..=1 } {
                    let tiling = Tiling { columns, cluster };
                    let launch = ops::gemm_tiled(self.device, x, &w, rows, epilogue, &out, tiling)?;
                    self.measure(op, name, &shape, &launch)?;
                }
            }
        }
        Ok(())
    }

    fn gemv(&mut self, op: &'static str, name: &'static str, n: u32, k: u32, bias: bool, s: &Shape) -> Result<()> {
        let rows = s.sizes.decode_rows.iter();
        let wanted = self.wanted(op, name, rows.map(|&rows| [("rows", rows), ("n", n), ("k", k)]));
        if wanted.is_empty() {
            return Ok(());
        }
        let w = self.linear(n, k, bias, op == GEMV_FP8)?;
        let x = self.random((MAX_DECODE_ROWS * k) as usize, 1.0)?;
        let out = self.random((MAX_DECODE_ROWS * n) as usize * 2, 1.0)?;
        let norm = Norm { weight: self.random(k as usize, 1.0)?.into(), eps: 1e-6 };
        let cos_sin = self.random_f32((100 * s.heads.dim) as usize, 1.0)?;
        let workspace = Workspace::new(self.device, n as usize, n.max(k) as usize, s.heads, None)?;
        let quantised = Quantised::new(self.device, MAX_DECODE_ROWS, k as usize)?;
        self.device.launch(&ops::quantise(&x, k as usize, MAX_DECODE_ROWS, &quantised))?;
        for shape in wanted {
            let count = shape[0].1;
            let sequences = self.sequences(s.heads, KvType::Bf16, &vec![(99, 1); count as usize])?;
            let (rows, pages) = (sequences.rows(), sequences.cache.layer(0));
            let into = RopeInto { heads: s.heads, cos_sin: &cos_sin, rows: &rows, pages: &pages, q: &out };
            let (input, output) = match name {
                "qkv" => (Input::Normed(&x, &norm), Output::Rope(&into)),
                "qkv_plain" => (Input::Normed(&x, &norm), Output::Matrix(&out)),
                "plain" => (Input::Plain(&x), Output::Matrix(&out)),
                "rope" => (Input::Plain(&x), Output::Rope(&into)),
                "gate_up" => (Input::Normed(&x, &norm), Output::Silu(&out)),
                "silu" => (Input::Plain(&x), Output::Silu(&out)),
                "gate_up_f32" => (Input::Normed(&x, &norm), Output::Logits(&out)),
                "head" => (Input::Plain(&x), Output::Logits(&out)),
                _ => (Input::Plain(&x), Output::Residual(&out)),
            };
            let input = if ops::gemv_reads_fp8(&w, count) { Input::Fp8(&quantised) } else { input };
            let launch = ops::gemv(self.device, input, &w, count, output, &workspace)?;
            self.measure(op, name, &shape, &launch)?;
        }
        Ok(())
    }

    /// What an ablation takes out of the products of decode.
    fn unfused(&mut self, s: &Shape) -> Result<()> {
        let (hidden, inner, most) = (s.hidden as usize, s.intermediate as usize, MAX_DECODE_ROWS as usize);
        let (x, out) = (self.random(most * hidden, 1.0)?, self.random(most * hidden.max(inner), 1.0)?);
        let gate_up = self.random_f32(most * 2 * inner, 1.0)?;
        let norm = Norm { weight: self.random(hidden, 1.0)?.into(), eps: 1e-6 };
        let workspace = Workspace::new(self.device, 1, hidden, s.heads, None)?;
        let shapes = |key, columns| s.sizes.decode_rows.iter().map(move |&rows| [("rows", rows), (key, columns)]);
        for shape in self.wanted("unfused", "norm", shapes("hidden", s.hidden)) {
            let launch = ops::rms_norm_summed(&x, &norm, shape[0].1, &out, &workspace);
            self.measure("unfused", "norm", &shape, &launch)?;
        }
        for shape in self.wanted("unfused", "residual", shapes("hidden", s.hidden)) {
            let launch = ops::add_residual(&x, &out, shape[0].1, hidden, &workspace);
            self.measure("unfused", "residual", &shape, &launch)?;
        }
        for shape in self.wanted("unfused", "silu", shapes("inner", s.intermediate)) {
            let launch = ops::silu_mul(&gate_up, shape[0].1, inner, &out);
            self.measure("unfused", "silu", &shape, &launch)?;
        }
        Ok(())
    }

    fn attention(&mut self, s: &Shape) -> Result<()> {
        let kv_type = |name| if name == "fp8" { KvType::Fp8 } else { KvType::Bf16 };
        let heads = [("q_heads", s.heads.query), ("kv_heads", s.heads.kv), ("head_dim", s.heads.dim)];
        let dimensions = |sequences: &[(u32, u32)], causal: u32| {
            let rows = sequences.iter().map(|&(_, tokens)| tokens).sum();
            let keys = sequences.iter().map(|&(position, tokens)| position + tokens).sum();
            let rest = [("rows", rows), ("keys", keys), ("sequences", sequences.len() as u32), ("causal", causal)];
            [&heads[..], &rest].concat()
        };
        let in_fp8 = s.sizes.prefill.iter().filter(|(name, _)| *name == "prefill").map(|(_, chunks)| ("fp8", chunks));
        let in_bf16 = s.sizes.prefill.iter().map(|(name, chunks)| (*name, chunks));
        for (name, chunks) in in_bf16.chain(in_fp8) {
            let wanted = self.wanted("attn_prefill", name, [dimensions(chunks, 1)]);
            let [shape] = wanted.as_slice() else { continue };
            let sequences = self.sequences(s.heads, kv_type(name), chunks)?;
            let elements = (sequences.rows * s.heads.query * s.heads.dim) as usize;
            let (q, out) = (self.random(elements, 1.0)?, self.device.alloc(elements * 2)?);
            let tiles = prefill_tiles(&sequences.chunks, s.heads.dim, s.heads.group());
            let (list, count) = (self.upload(&tiles)?, self.upload(&[tiles.len() as i32])?);
            let tiles = Tiles {
                tiles: &list,
                device_count: &count,
                count: tiles.len() as u32,
                rows: sequences.rows,
                pairs: sequences.pairs,
                keys: sequences.keys,
            };
            let workspace = Workspace::new(self.device, 1, 1, s.heads, None)?;
            let pages = sequences.cache.layer(0);
            let launch = ops::attn_prefill(self.device, &q, s.heads, None, &tiles, &pages, &out, &workspace)?;
            self.measure("attn_prefill", name, shape, &launch)?;
        }
        let of_type = |name| s.sizes.decode.iter().map(move |size| (name, size));
        for (name, &(batch, keys)) in of_type("decode").chain(of_type("fp8")) {
            let chunks = vec![(keys - 1, 1); batch as usize];
            let wanted = self.wanted("attn_decode", name, [dimensions(&chunks, 0)]);
            let [shape] = wanted.as_slice() else { continue };
            let sequences = self.sequences(s.heads, kv_type(name), &chunks)?;
            let elements = (batch * s.heads.query * s.heads.dim) as usize;
            let (q, out) = (self.random(elements, 1.0)?, self.device.alloc(elements * 2)?);
            let workspace = Workspace::new(self.device, 1, 1, s.heads, None)?;
            let (rows, pages) = (sequences.rows(), sequences.cache.layer(0));
            let launch =
                ops::attn_decode(&q, s.heads, true, None, &rows, sequences.keys, &pages, &out, None, &workspace);
            self.measure("attn_decode", name, shape, &launch)?;
        }
        Ok(())
    }

    /// What works on one row at a time: embedding, norms, rotation. And the kernel that makes all this data.
    fn rows(&mut self, s: &Shape) -> Result<()> {
        let rows: Vec<u32> = s.sizes.decode_rows.iter().chain(s.sizes.prefill_rows).copied().collect();
        let hidden = s.hidden as usize;
        let shapes = || rows.iter().map(|&rows| [("rows", rows), ("hidden", s.hidden)]);
        for [(_, count), _] in self.wanted("embed", "embed", shapes()) {
            let shape = [("rows", count), ("hidden", s.hidden)];
            let table = self.random(s.vocab as usize * hidden, 0.02)?;
            let slots = self.slots(s.vocab, 1, &sampling(0.0, 0, 1.0))?;
            let tokens: Vec<i32> = (0..count).map(|i| (i.wrapping_mul(2_654_435_761) % s.vocab) as i32).collect();
            let (slot, tokens) = (self.upload(&vec![1i32; count as usize])?, self.upload(&tokens)?);
            let positions = self.upload(&(0..count as i32).collect::<Vec<_>>())?;
            let (position, out) =
                (self.device.alloc(count as usize * 4)?, self.device.alloc(count as usize * hidden * 2)?);
            let rows = Rows { count, slot: &slot, position: &position };
            let tokens = Tokens::Prompt(&tokens, &positions);
            let launch = ops::embed(&table, &slots.states, &rows, tokens, &out, hidden, s.vocab as usize);
            self.measure("embed", "embed", &shape, &launch)?;
        }
        let norm = Norm { weight: self.random(hidden, 1.0)?.into(), eps: 1e-6 };
        for shape in self.wanted("norm", "norm", shapes()) {
            let count = shape[0].1;
            let x = self.random(count as usize * hidden, 1.0)?;
            let out = self.device.alloc(count as usize * hidden * 2)?;
            self.measure("norm", "norm", &shape, &ops::rms_norm(&x, &norm, None, count, &out))?;
        }
        let workspace = Workspace::new(self.device, 1, hidden, s.heads, None)?;
        for (name, k, rows) in [
            ("norm_fp8", s.hidden, s.sizes.prefill_rows),
            ("norm_summed_fp8", s.hidden, s.sizes.decode_rows),
            ("quantise", s.intermediate, s.sizes.prefill_rows),
        ] {
            for shape in self.wanted("norm", name, rows.iter().map(|&rows| [("rows", rows), ("hidden", k)])) {
                let (count, k) = (shape[0].1, k as usize);
                let x = self.random(count as usize * k, 1.0)?;
                let out = Quantised::new(self.device, count, k)?;
                let launch = match name {
                    "norm_fp8" => ops::rms_norm_fp8(&x, &norm, count, &out),
                    "norm_summed_fp8" => ops::rms_norm_summed_fp8(&x, &norm, count, &out, &workspace),
                    _ => ops::quantise(&x, k, count, &out),
                };
                self.measure("norm", name, &shape, &launch)?;
            }
        }
        let heads = [("q_heads", s.heads.query), ("kv_heads", s.heads.kv), ("head_dim", s.heads.dim)];
        let shapes = rows.iter().map(|&rows| [&[("rows", rows)], &heads[..]].concat());
        for shape in self.wanted("rope", "rope", shapes) {
            let count = shape[0].1;
            // In decode each row is a sequence of its own.
            let chunks = if count <= MAX_DECODE_ROWS { vec![(99, 1); count as usize] } else { vec![(0, count)] };
            let sequences = self.sequences(s.heads, KvType::Bf16, &chunks)?;
            let qkv = self.random((count * s.heads.columns()) as usize, 1.0)?;
            let q = self.device.alloc((count * s.heads.query * s.heads.dim) as usize * 2)?;
            let cos_sin = self.random_f32((count.max(100) * s.heads.dim) as usize, 1.0)?;
            let (rows, pages) = (sequences.rows(), sequences.cache.layer(0));
            let into = RopeInto { heads: s.heads, cos_sin: &cos_sin, rows: &rows, pages: &pages, q: &q };
            let launch = ops::rope_append(&qkv, None, &into);
            self.measure("rope", "rope", &shape, &launch)?;
        }
        let count = s.hidden * s.intermediate;
        for shape in self.wanted("random", "weights", [[("count", count)]]) {
            let out = self.device.alloc(count as usize * 2)?;
            self.measure("random", "weights", &shape, &ops::random(self.device, &out, count as usize, 1, 0.02))?;
        }
        for shape in self.wanted("random", "quantise", [[("count", count)]]) {
            let (n, k) = (s.intermediate as usize, s.hidden as usize);
            let w = self.random(n * k, 0.02)?;
            let (out, scales) = (self.device.alloc(n * k)?, self.device.alloc(n * 4)?);
            self.measure("random", "quantise", &shape, &ops::quantise_weight(&w, n, k, &out, &scales))?;
        }
        Ok(())
    }

    fn sampler(&mut self, s: &Shape) -> Result<()> {
        for (name, sampling) in [("greedy", sampling(0.0, 0, 1.0)), ("top_k_top_p", sampling(1.0, 50, 0.9))] {
            let rows = s.sizes.decode_rows.iter();
            for shape in self.wanted("sample", name, rows.map(|&rows| [("rows", rows), ("vocab", s.vocab)])) {
                let count = shape[0].1;
                let slots = self.slots(s.vocab, count, &sampling)?;
                let logits = self.random_f32((count * s.vocab) as usize, 3.0)?;
                let row_slot = self.upload(&(1..=count as i32).collect::<Vec<_>>())?;
                let launch = ops::sample(slots.sample_params(), &logits, &row_slot, count, None);
                self.measure("sample", name, &shape, &launch)?;
            }
        }
        Ok(())
    }

    // ---- what they are made of ----

    fn random(&mut self, count: usize, deviation: f32) -> Result<Buffer> {
        let buffer = self.device.alloc(count * 2)?;
        self.randomise(&buffer, count, deviation)?;
        Ok(buffer)
    }

    /// [count] fp32: the upper half of each is a random bf16, and the lower half adds less than an ulp of that.
    fn random_f32(&mut self, count: usize, deviation: f32) -> Result<Buffer> {
        self.random(2 * count, deviation)
    }

    fn randomise(&mut self, buffer: &Buffer, count: usize, deviation: f32) -> Result<()> {
        self.seed += 1;
        self.device.launch(&ops::random(self.device, buffer, count, self.seed, deviation))
    }

    fn upload<T: bytemuck::NoUninit>(&self, data: &[T]) -> Result<Buffer> {
        let buffer = self.device.alloc(size_of_val(data))?;
        self.device.upload(&buffer, 0, bytemuck::cast_slice(data))?;
        Ok(buffer)
    }

    fn linear(&mut self, n: u32, k: u32, bias: bool, fp8: bool) -> Result<Linear> {
        let bias = if bias { Some(self.random(n as usize, 0.02)?.into()) } else { None };
        let (n, k) = (n as usize, k as usize);
        let weight = self.random(n * k, 0.02)?;
        if !fp8 {
            return Linear::new(self.device, Arc::new(weight), bias, n, k);
        }
        let (out, scales) = (self.device.alloc(n * k)?, self.device.alloc(n * 4)?);
        self.device.launch(&ops::quantise_weight(&weight, n, k, &out, &scales))?;
        Linear::fp8(self.device, Arc::new(out), Scales::Rows(Arc::new(scales)), bias, n, k)
    }

    /// Active slots 1 to `count`, which never end.
    fn slots(&self, vocab: u32, count: u32, sampling: &SamplingParams) -> Result<Slots> {
        let slots = Slots::new(self.device, count + 1, &vec![TRAIT_REAL as u8; vocab as usize])?;
        for slot in 1..=count {
            slots.admit(&SlotSetup {
                slot,
                serial: slot,
                tokens: vec![1],
                max_generated: i32::MAX as u32,
                max_length: i32::MAX as u32,
                eos_ids: Vec::new(),
                sampling: sampling.clone(),
                budget: None,
                guided: false,
            })?;
        }
        Ok(slots)
    }

    /// Of each sequence (position of the first new token, new tokens). Their pages alternate, as if they had grown together.
    fn sequences(&mut self, heads: Heads, kv_type: KvType, chunks: &[(u32, u32)]) -> Result<Sequences> {
        let pages_of = |&(position, tokens): &(u32, u32)| (position + tokens).div_ceil(PAGE_TOKENS);
        let longest = chunks.iter().map(pages_of).max().expect("a sequence");
        let mut page = 0;
        let mut entries = Vec::new();
        for index in 0..longest {
            for (i, _) in chunks.iter().enumerate().filter(|(_, chunk)| index < pages_of(chunk)) {
                page += 1;
                entries.push(PageEntry { slot: i as u32 + 1, index, page });
            }
        }
        entries.sort_by_key(|e| (e.slot, e.index));
        let cache = KvCache::new(
            self.device,
            heads,
            kv_type,
            &[KvScales::default()],
            page + 1,
            chunks.len() as u32 + 1,
            longest,
        )?;
        cache.set_pages(self.device, &entries)?;
        let layer = cache.layer(0);
        // In fp8 some of that is NaN, which takes as long as anything.
        for values in [layer.k, layer.v] {
            self.randomise(values, values.bytes() / 2, 1.0)?;
        }
        let (mut slot, mut position) = (Vec::new(), Vec::new());
        let (mut keys, mut pairs) = (0, 0);
        let mut rows = Vec::new();
        for (i, &(first, tokens)) in chunks.iter().enumerate() {
            rows.push(ChunkRows { slot: i as u32 + 1, first_row: slot.len() as u32, tokens, position: first });
            slot.extend(vec![i as i32 + 1; tokens as usize]);
            position.extend((first..first + tokens).map(|p| p as i32));
            let (first, tokens) = (first as u64, tokens as u64);
            keys += first + tokens;
            pairs += first * tokens + tokens * (tokens + 1) / 2;
        }
        let count = slot.len() as u32;
        let (slot, position) = (self.upload(&slot)?, self.upload(&position)?);
        Ok(Sequences { cache, slot, position, chunks: rows, rows: count, keys, pairs })
    }

    // ---- measuring ----

    /// Those shapes that pass the filter.
    fn wanted<D: AsRef<[(&'static str, u32)]>>(
        &self,
        op: &str,
        name: &str,
        shapes: impl IntoIterator<Item = D>,
    ) -> Vec<D> {
        let filter = self.options.filter.as_deref().unwrap_or_default();
        let passes = |shape: &D| label(self.model, op, name, &map(shape.as_ref())).contains(filter);
        shapes.into_iter().filter(passes).collect()
    }

    fn measure(&mut self, op: &'static str, name: &'static str, shape: Dimensions, launch: &Launch) -> Result<()> {
        const WARM_UP: usize = 2;
        const LEAST: usize = 5;
        const MOST: usize = 1000;
        let once = || match &self.cold {
            Some(cold) => self.device.time_after(&cold.launch, launch),
            None => self.device.time(launch),
        };
        for _ in 0..WARM_UP {
            once()?;
        }
        let start = Instant::now();
        let mut times = Vec::new();
        while times.len() < LEAST || (times.len() < MOST && start.elapsed().as_secs_f64() < self.options.seconds) {
            times.push(once()?);
        }
        times.sort_by(f64::total_cmp);
        let median = percentile(&times, 50.0);
        // Tensor cores multiply e4m3 twice as fast.
        let bf16_flops = if [GEMM_FP8, GEMV_FP8].contains(&op) { launch.flops / 2 } else { launch.flops };
        let us = Microseconds {
            median: median * 1e6,
            min: times[0] * 1e6,
            max: times[times.len() - 1] * 1e6,
            runs: times.len(),
        };
        let measurement = Measurement {
            name,
            model: self.model,
            op,
            kernel: launch.kernel.name.to_str().expect("names are ASCII"),
            cluster: launch.cluster,
            shape: map(shape),
            us,
            bytes: launch.bytes,
            flops: launch.flops,
            gb_per_s: launch.bytes as f64 / median / 1e9,
            tflop_per_s: launch.flops as f64 / median / 1e12,
            roofline_percent: Roofline::of(self.device).map(|r| r.percent(launch.bytes, bf16_flops, median)),
        };
        self.results.push(measurement);
        (self.progress)(&self.results)
    }
}

impl Sequences {
    fn rows(&self) -> Rows<'_> {
        Rows { count: self.rows, slot: &self.slot, position: &self.position }
    }
}

fn sampling(temperature: f32, top_k: u32, top_p: f32) -> SamplingParams {
    SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 1,
        logprobs: None,
        prompt_logprobs: None,
        logit_bias: Vec::new(),
        allowed: None,
        stop_ids: Vec::new(),
        ignore_eos: true,
        min_tokens: 0,
    }
}

fn map(shape: Dimensions) -> serde_json::Map<String, serde_json::Value> {
    shape.iter().map(|&(key, value)| (key.into(), value.into())).collect()
}
