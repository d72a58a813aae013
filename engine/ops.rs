//! One function per kernel: shapes and buffers become a [`Launch`] with its grid, shared memory, tensor maps, and what it must
//! move and compute at the least. Decides tile sizes and grids; knows no model and no step.

use crate::device::{Buffer, Device, Launch, TensorMapSpec};
use crate::kernels;
use crate::kernels::params::*;
use crate::tiles::prefill_tile_tokens;
use crate::tiling::{self, Product, Tiling};
use crate::{Error, Result};
use std::sync::Arc;

const GEMV_TILE_ROWS: u64 = 64;
/// Of a row of the weights in a step.
const GEMV_STEP_BYTES: u64 = 256;
/// Most memory for the partial results of sequences that are cut at fixed pages; where more would be needed, pieces are longer.
const SPLIT_BYTES: usize = 64 << 20;
/// Neighbours in the residual stream whose squares are summed together.
const SQUARES: usize = 64;
const BF16: u64 = 2;
/// What attention and the sampler read ahead into L2, of 50 MB: what HBM gives while they wait for latencies.
const ATTN_PREFETCH: u64 = 16 << 20;
const SAMPLE_PREFETCH: u64 = 20 << 20;
/// A block of the sampler holds its share of a row's logits in shared memory; up to 8 blocks share a row.
pub const MAX_VOCAB: usize = 8 * 50_000;

/// A weight matrix [n][k], perhaps with a bias [n], and what TMA must know of it.
pub struct Linear {
    weight: Arc<Buffer>,
    /// Where it is e4m3 and not bf16.
    scales: Option<Scales>,
    bias: Option<Arc<Buffer>>,
    n: u64,
    k: u64,
    /// For the widths of `tiling`: boxes of half a tile.
    gemm_maps: [TensorMap; tiling::WIDTHS.len()],
    gemv_map: TensorMap,
}

/// What the numbers of a matrix [n][k] in e4m3 are to be multiplied with, fp32.
pub enum Scales {
    /// [n].
    Rows(Arc<Buffer>),
    /// [k / SCALE_GROUP, rounded up][n / SCALE_ROWS].
    Blocks(Arc<Buffer>),
}

/// Activations in e4m3: what a product of fp8 weights reads, in prefill or of many rows of decode.
pub struct Quantised {
    /// [rows][k].
    numbers: Buffer,
    /// [k / SCALE_GROUP, rounded up][stride] fp32.
    scales: Buffer,
    stride: u32,
}

/// What a product of prefill multiplies, [rows][k].
#[derive(Clone, Copy)]
pub enum Operand<'a> {
    Bf16(&'a Buffer),
    Fp8(&'a Quantised),
}

impl<'a> From<&'a Buffer> for Operand<'a> {
    fn from(x: &'a Buffer) -> Self {
        Operand::Bf16(x)
    }
}

/// What a product of prefill does with its sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// Rounds them; adds the matrix's bias, if it has one.
    Plain,
    /// Adds them, and the matrix's bias, if it has one, to the output.
    Residual,
    /// silu(gate) * up of neighbouring blocks of 8 columns: half as many columns.
    Silu,
}

/// Which sequences' tokens are the rows of a step, in device memory.
pub struct Rows<'a> {
    pub count: u32,
    /// [count] i32.
    pub slot: &'a Buffer,
    /// [count] i32, written by `embed`.
    pub position: &'a Buffer,
}

/// Heads of attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub query: u32,
    pub kv: u32,
    /// 64 or 128.
    pub dim: u32,
}

impl Heads {
    /// Query heads per KV head.
    pub fn group(self) -> u32 {
        self.query / self.kv
    }

    /// Columns of q, k and v side by side.
    pub fn columns(self) -> u32 {
        (self.query + 2 * self.kv) * self.dim
    }

    fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// What keys and values are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    #[default]
    Bf16,
    /// e4m3, each number divided by the scale of its layer's K or V, and no larger than 448 then.
    Fp8,
}

impl KvType {
    pub fn name(self) -> &'static str {
        match self {
            KvType::Bf16 => "bf16",
            KvType::Fp8 => "fp8",
        }
    }

    /// Of one number.
    pub fn bytes(self) -> u64 {
        match self {
            KvType::Bf16 => BF16,
            KvType::Fp8 => 1,
        }
    }
}

/// What the numbers in a layer's fp8 pages are to be multiplied with. 1 serves wherever no key or value exceeds 448.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KvScales {
    pub k: f32,
    pub v: f32,
}

impl Default for KvScales {
    fn default() -> Self {
        KvScales { k: 1.0, v: 1.0 }
    }
}

/// K and V of one layer: [pages][kv heads][64 tokens][dim], and where each sequence's pages lie.
pub struct Pages<'a> {
    pub k: &'a Buffer,
    pub v: &'a Buffer,
    pub kind: KvType,
    /// Of fp8; 1 for bf16.
    pub scales: KvScales,
    pub k_map: TensorMap,
    pub v_map: TensorMap,
    /// [slots][max_pages] i32.
    pub block_table: &'a Buffer,
    pub max_pages: u32,
}

/// Scratch of the kernels that merge parts; kernels use it one after the other.
pub struct Workspace {
    /// The largest grid.
    blocks: u32,
    partial: Buffer,
    ticket: Buffer,
    /// Attention of decode cuts each sequence after so many pages; 0: where the blocks' shares of all of them end.
    split_pages: u32,
    /// Sums of squares of the residual stream: from what writes it to the norm in the product that reads it.
    squares: Buffer,
}

impl Workspace {
    /// For products of up to `n` columns, a residual stream of `hidden`, and attention with these heads. `fixed_splits`: pages of
    /// the longest sequence and the fewest that a piece of one may have, if a row's attention must not depend on the other rows.
    pub fn new(
        device: &Device,
        n: usize,
        hidden: usize,
        heads: Heads,
        fixed_splits: Option<(u32, u32)>,
    ) -> Result<Workspace> {
        let sizes = WorkspaceSizes::new(device, n, hidden, heads, fixed_splits);
        let ticket = device.alloc(sizes.tickets)?;
        device.fill(&ticket, 0, sizes.tickets, 0)?;
        let partial = device.alloc(sizes.partial)?;
        let squares = device.alloc(sizes.squares)?;
        device.fill(&squares, 0, sizes.squares, 0)?;
        Ok(Workspace { blocks: device.processors(), partial, ticket, split_pages: sizes.split_pages, squares })
    }

    /// Bytes that a new one takes.
    pub fn bytes(device: &Device, n: usize, hidden: usize, heads: Heads, fixed_splits: Option<(u32, u32)>) -> u64 {
        let sizes = WorkspaceSizes::new(device, n, hidden, heads, fixed_splits);
        (sizes.partial + sizes.tickets + sizes.squares) as u64
    }
}

/// In bytes.
struct WorkspaceSizes {
    partial: usize,
    tickets: usize,
    squares: usize,
    split_pages: u32,
}

impl WorkspaceSizes {
    fn new(device: &Device, n: usize, hidden: usize, heads: Heads, fixed_splits: Option<(u32, u32)>) -> WorkspaceSizes {
        let blocks = device.processors() as usize;
        let gemv = MAX_DECODE_ROWS as usize * GEMV_TILE_ROWS as usize;
        let attention = (heads.group() * (heads.dim + 2)) as usize;
        let pieces = |max_pages: u32, split| (MAX_DECODE_ROWS * heads.kv * max_pages.div_ceil(split)) as usize;
        let split_pages = fixed_splits.map_or(0, |(max_pages, least)| {
            let fits = |split: &u32| pieces(max_pages, *split) * attention * 4 <= SPLIT_BYTES;
            std::iter::successors(Some(least), |split: &u32| Some(split * 2))
                .find(fits)
                .expect("some split is the longest")
        });
        let split = fixed_splits.map_or(0, |(max_pages, _)| pieces(max_pages, split_pages) * attention);
        // Of attention one for each row and, if they are not packed, query head.
        let tickets = n.div_ceil(GEMV_TILE_ROWS as usize).max((MAX_DECODE_ROWS * heads.query) as usize);
        WorkspaceSizes {
            partial: (blocks * 2 * gemv.max(attention)).max(split) * 4,
            tickets: tickets * 4,
            squares: MAX_DECODE_ROWS as usize * hidden.div_ceil(SQUARES) * 4,
            split_pages,
        }
    }
}

impl Quantised {
    /// The scales of a tile come whole, also those of rows that there are not, and of the other tile of a pair.
    fn stride(rows: u32) -> u32 {
        rows.next_multiple_of(2 * tiling::TILE_ROWS)
    }

    /// For up to `rows` rows of up to `k`.
    pub fn new(device: &Device, rows: u32, k: usize) -> Result<Quantised> {
        let stride = Quantised::stride(rows);
        let scales = device.alloc(k.div_ceil(SCALE_GROUP as usize) * stride as usize * 4)?;
        Ok(Quantised { numbers: device.alloc(rows as usize * k)?, scales, stride })
    }

    /// [rows][k] e4m3, and fp32 [k / SCALE_GROUP, rounded up][room for rows].
    pub fn buffers(&self) -> (&Buffer, &Buffer) {
        (&self.numbers, &self.scales)
    }

    /// Bytes that a new one takes.
    pub fn bytes(rows: u32, k: usize) -> u64 {
        let scales = k.div_ceil(SCALE_GROUP as usize) * Quantised::stride(rows) as usize * 4;
        (rows as usize * k + scales) as u64
    }
}

/// Bytes of the numbers of a row of k in e4m3, and of their scales.
fn quantised_row_bytes(k: u64) -> u64 {
    k + 4 * k.div_ceil(u64::from(SCALE_GROUP))
}

/// Of elements of 16 bits, or pairs of e4m3. `boxes`: columns and rows of what TMA moves at once.
fn matrix_map(device: &Device, buffer: &Buffer, rows: u64, columns: u64, boxes: [u32; 2]) -> Result<TensorMap> {
    device.tensor_map(&TensorMapSpec {
        address: buffer.address(),
        dims: [columns, rows],
        strides: [BF16, columns * BF16],
        r#box: boxes,
        swizzle: true,
    })
}

impl Linear {
    /// In bf16. n: a multiple of 64, or of 16 for [`Output::Logits`]; k: a multiple of 64.
    pub fn new(device: &Device, weight: Arc<Buffer>, bias: Option<Arc<Buffer>>, n: usize, k: usize) -> Result<Linear> {
        Linear::of(device, weight, None, bias, [n as u64, k as u64])
    }

    /// In e4m3. n and k: multiples of 64.
    pub fn fp8(
        device: &Device,
        weight: Arc<Buffer>,
        scales: Scales,
        bias: Option<Arc<Buffer>>,
        n: usize,
        k: usize,
    ) -> Result<Linear> {
        assert!(n.is_multiple_of(64));
        let count = match &scales {
            Scales::Rows(_) => n,
            Scales::Blocks(_) => block_scales(n, k),
        };
        let (Scales::Rows(buffer) | Scales::Blocks(buffer)) = &scales;
        assert_eq!(buffer.bytes(), count * 4);
        Linear::of(device, weight, Some(scales), bias, [n as u64, k as u64])
    }

    fn of(
        device: &Device,
        weight: Arc<Buffer>,
        scales: Option<Scales>,
        bias: Option<Arc<Buffer>>,
        [n, k]: [u64; 2],
    ) -> Result<Linear> {
        let mut linear = Linear {
            weight,
            scales,
            bias,
            n,
            k,
            gemm_maps: [TensorMap::default(); tiling::WIDTHS.len()],
            gemv_map: TensorMap::default(),
        };
        assert!(linear.weight.bytes() as u64 >= linear.bytes() && n.is_multiple_of(16) && k.is_multiple_of(64));
        let map = |rows| matrix_map(device, &linear.weight, n, linear.words(), [64, rows]);
        let (gemm_maps, gemv_map) = (tiling::WIDTHS.map(|width| map(width / 2)), map(GEMV_TILE_ROWS as u32)?);
        for (to, map) in linear.gemm_maps.iter_mut().zip(gemm_maps) {
            *to = map?;
        }
        linear.gemv_map = gemv_map;
        Ok(linear)
    }

    /// Bytes of a weight.
    fn element(&self) -> u64 {
        if self.scales.is_some() { 1 } else { BF16 }
    }

    fn bytes(&self) -> u64 {
        self.n * self.k * self.element()
    }

    /// Elements of 16 bits, or pairs of e4m3, in a row: how tensor maps and tilings count k.
    fn words(&self) -> u64 {
        self.k * self.element() / BF16
    }

    fn scale_bytes(&self) -> u64 {
        match &self.scales {
            None => 0,
            Some(Scales::Rows(buffer) | Scales::Blocks(buffer)) => buffer.bytes() as u64,
        }
    }

    fn scales(&self) -> WeightScales {
        let null = std::ptr::null;
        let (rows, blocks) = match &self.scales {
            None => (null(), null()),
            Some(Scales::Rows(rows)) => (rows.pointer::<f32>().cast_const(), null()),
            Some(Scales::Blocks(blocks)) => (null(), blocks.pointer::<f32>().cast_const()),
        };
        WeightScales { rows, blocks }
    }

    pub fn is_fp8(&self) -> bool {
        self.scales.is_some()
    }

    pub fn k(&self) -> usize {
        self.k as usize
    }

    /// So many bytes of the weights, each of `blocks` blocks its share of them.
    fn prefetch(&self, bytes: u64, blocks: u32) -> Prefetch {
        let all = self.bytes();
        let share = (bytes.min(all) / blocks as u64).next_multiple_of(128);
        Prefetch { weights: self.weight.pointer(), bytes: all, share }
    }

    fn bias<T>(&self) -> *const T {
        self.bias.as_ref().map_or(std::ptr::null(), |b| b.pointer())
    }

    fn width(&self, epilogue: Epilogue) -> u64 {
        if epilogue == Epilogue::Silu { self.n / 2 } else { self.n }
    }

    /// Bytes of the operands and the result of a product with `rows` rows.
    fn traffic(&self, rows: u64, epilogue: Epilogue) -> u64 {
        let result = match epilogue {
            Epilogue::Plain | Epilogue::Silu => BF16,
            Epilogue::Residual => 2 * BF16,
        };
        let row = if self.is_fp8() { quantised_row_bytes(self.k) } else { self.k * BF16 };
        self.bytes() + self.scale_bytes() + rows * (row + self.width(epilogue) * result)
    }

    fn product(&self, rows: u32) -> Product {
        Product { rows, n: self.n as u32, k: self.words() as u32 }
    }

    /// Where the weights lie.
    pub fn weight(&self) -> &Arc<Buffer> {
        &self.weight
    }
}

/// Scales of a matrix that has them by blocks.
pub fn block_scales(n: usize, k: usize) -> usize {
    k.div_ceil(SCALE_GROUP as usize) * (n / SCALE_ROWS as usize)
}

/// out [rows][n] = x [rows][k] w^T, for prefill; x in fp8 if w is.
pub fn gemm<'a>(
    device: &Device,
    x: impl Into<Operand<'a>>,
    w: &Linear,
    rows: u32,
    epilogue: Epilogue,
    out: &Buffer,
) -> Result<Launch> {
    // On the host target the blocks of a cluster share a core: they would only wait for each other.
    let widths = gemm_kernels(epilogue, w.bias.is_some(), w.is_fp8()).iter().map(|&(width, _)| width);
    let tiling = tiling::choose(w.product(rows), widths, device.processors(), !device.is_host());
    gemm_tiled(device, x, w, rows, epilogue, out, tiling)
}

type OfWidth = (u32, &'static kernels::Kernel<GemmParams>);

/// The kernels of an epilogue, each with the width of its tiles.
pub fn gemm_kernels(epilogue: Epilogue, bias: bool, fp8: bool) -> &'static [OfWidth] {
    use crate::kernels::*;
    static PLAIN: [OfWidth; 5] =
        [(96, &GEMM_N96), (128, &GEMM_N128), (160, &GEMM_N160), (192, &GEMM_N192), (256, &GEMM_N256)];
    static BIAS: [OfWidth; 5] = [
        (96, &GEMM_BIAS_N96),
        (128, &GEMM_BIAS_N128),
        (160, &GEMM_BIAS_N160),
        (192, &GEMM_BIAS_N192),
        (256, &GEMM_BIAS_N256),
    ];
    static RESIDUAL: [OfWidth; 5] = [
        (96, &GEMM_RESIDUAL_N96),
        (128, &GEMM_RESIDUAL_N128),
        (160, &GEMM_RESIDUAL_N160),
        (192, &GEMM_RESIDUAL_N192),
        (256, &GEMM_RESIDUAL_N256),
    ];
    static SILU: [OfWidth; 3] = [(128, &GEMM_SILU_N128), (192, &GEMM_SILU_N192), (256, &GEMM_SILU_N256)];
    static FP8: [OfWidth; 3] = [(96, &GEMM_FP8_N96), (128, &GEMM_FP8_N128), (192, &GEMM_FP8_N192)];
    static FP8_BIAS: [OfWidth; 3] = [(96, &GEMM_FP8_BIAS_N96), (128, &GEMM_FP8_BIAS_N128), (192, &GEMM_FP8_BIAS_N192)];
    static FP8_RESIDUAL: [OfWidth; 3] =
        [(96, &GEMM_FP8_RESIDUAL_N96), (128, &GEMM_FP8_RESIDUAL_N128), (192, &GEMM_FP8_RESIDUAL_N192)];
    static FP8_SILU: [OfWidth; 2] = [(128, &GEMM_FP8_SILU_N128), (192, &GEMM_FP8_SILU_N192)];
    match (epilogue, fp8) {
        (Epilogue::Plain, false) if bias => &BIAS,
        (Epilogue::Plain, false) => &PLAIN,
        (Epilogue::Residual, false) => &RESIDUAL,
        (Epilogue::Silu, false) => &SILU,
        (Epilogue::Plain, true) if bias => &FP8_BIAS,
        (Epilogue::Plain, true) => &FP8,
        (Epilogue::Residual, true) => &FP8_RESIDUAL,
        (Epilogue::Silu, true) => &FP8_SILU,
    }
}

/// The same with a tiling of one's own.
pub fn gemm_tiled<'a>(
    device: &Device,
    x: impl Into<Operand<'a>>,
    w: &Linear,
    rows: u32,
    epilogue: Epilogue,
    out: &Buffer,
    tiling: Tiling,
) -> Result<Launch> {
    let kernels = gemm_kernels(epilogue, w.bias.is_some(), w.is_fp8());
    let of_width = kernels.iter().find(|(width, _)| *width == tiling.columns);
    let (_, kernel) = of_width.expect("a kernel for this width");
    let map = tiling::WIDTHS.iter().position(|&w| w == tiling.columns).expect("every kernel's width is there");
    let columns = tiling.columns / if epilogue == Epilogue::Silu { 2 } else { 1 };
    let panel = if columns.is_multiple_of(64) { 64 } else { 32 };
    let c_map = matrix_map(device, out, rows as u64, w.width(epilogue), [panel, tiling::TILE_ROWS / 2])?;
    let (x, a_scales, stride) = match (x.into(), w.is_fp8()) {
        (Operand::Bf16(x), false) => (x, std::ptr::null(), 0),
        (Operand::Fp8(x), true) => (&x.numbers, x.scales.pointer::<f32>().cast_const(), x.stride),
        _ => unreachable!("both operands in fp8 or none"),
    };
    let params = GemmParams {
        a_map: matrix_map(device, x, rows as u64, w.words(), [64, tiling::TILE_ROWS])?,
        w_map: w.gemm_maps[map],
        c_map,
        residual_map: c_map,
        bias: w.bias(),
        a_scales,
        w_scales: w.scales(),
        rows: rows as i32,
        n: w.n as i32,
        k: w.k as i32,
        a_scales_stride: stride as i32,
        ..Default::default()
    };
    let groups = tiling.groups(w.product(rows));
    let blocks = groups.min(device.processors() / tiling.cluster).max(1) * tiling.cluster;
    Ok(Launch {
        cluster: tiling.cluster,
        shared_bytes: GEMM_SHARED,
        pdl: true,
        bytes: w.traffic(rows as u64, epilogue),
        flops: 2 * rows as u64 * w.n * w.k,
        ..kernel.launch([blocks, 1, 1], params)
    })
}

/// What a decode product multiplies, [rows][k].
#[derive(Clone, Copy)]
pub enum Input<'a> {
    Plain(&'a Buffer),
    /// RMS-normalised on its way. Its sums of squares are in the workspace: `embed` or the last [`Output::Residual`] left them.
    Normed(&'a Buffer, &'a Norm),
    /// Where [`gemv_reads_fp8`] says so.
    Fp8(&'a Quantised),
}

/// Where the result of a decode product goes. A bias of the matrix is added but for silu and logits.
#[derive(Clone, Copy)]
pub enum Output<'a> {
    /// [rows][n].
    Matrix(&'a Buffer),
    /// Rotated to q, and k and v to their pages.
    Rope(&'a RopeInto<'a>),
    /// silu(gate) * up of neighbouring blocks of 8 columns, [rows][n / 2].
    Silu(&'a Buffer),
    /// Added to the residual stream [rows][n]; the sums of squares go to the workspace.
    Residual(&'a Buffer),
    /// [rows][n] fp32, not rounded.
    Logits(&'a Buffer),
}

type OfRows = [&'static kernels::Kernel<GemvParams>; GEMV_ROWS.len()];

/// A decode product streams the weights once for so many rows at the most.
pub const GEMV_ROWS: [u32; 4] = [8, 16, 32, 64];
const GEMV_SHARED: [u32; GEMV_ROWS.len()] = [GEMV_SHARED_M8, GEMV_SHARED_M16, GEMV_SHARED_M32, GEMV_SHARED_M64];
const GEMV_FP8_SHARED: [u32; GEMV_ROWS.len()] =
    [GEMV_FP8_SHARED_M8, GEMV_FP8_SHARED_M16, GEMV_FP8_SHARED_M32, GEMV_FP8_SHARED_M64];

/// Whether a decode product of so many rows wants its input in e4m3, made so by a launch of its own. Of fewer rows it converts it
/// itself, faster than the weights come.
pub fn gemv_reads_fp8(w: &Linear, rows: u32) -> bool {
    w.is_fp8() && rows > GEMV_ROWS[2]
}

/// The decode products that there are. `norm`: of the input, by whomever. In fp8 the last one reads e4m3.
fn gemv_kernels(norm: bool, output: Output, fp8: bool) -> OfRows {
    use crate::kernels::*;
    match (norm, output, fp8) {
        (true, Output::Matrix(_), false) => [&GEMV_NORM_M8, &GEMV_NORM_M16, &GEMV_NORM_M32, &GEMV_NORM_M64],
        (true, Output::Rope(_), false) => {
            [&GEMV_NORM_ROPE_M8, &GEMV_NORM_ROPE_M16, &GEMV_NORM_ROPE_M32, &GEMV_NORM_ROPE_M64]
        }
        (true, Output::Silu(_), false) => {
            [&GEMV_NORM_SILU_M8, &GEMV_NORM_SILU_M16, &GEMV_NORM_SILU_M32, &GEMV_NORM_SILU_M64]
        }
        (false, Output::Matrix(_), false) => [&GEMV_M8, &GEMV_M16, &GEMV_M32, &GEMV_M64],
        (false, Output::Rope(_), false) => [&GEMV_ROPE_M8, &GEMV_ROPE_M16, &GEMV_ROPE_M32, &GEMV_ROPE_M64],
        (false, Output::Silu(_), false) => [&GEMV_SILU_M8, &GEMV_SILU_M16, &GEMV_SILU_M32, &GEMV_SILU_M64],
        (true, Output::Logits(_), false) => {
            [&GEMV_NORM_LOGITS_M8, &GEMV_NORM_LOGITS_M16, &GEMV_NORM_LOGITS_M32, &GEMV_NORM_LOGITS_M64]
        }
        (false, Output::Residual(_), false) => {
            [&GEMV_RESIDUAL_M8, &GEMV_RESIDUAL_M16, &GEMV_RESIDUAL_M32, &GEMV_RESIDUAL_M64]
        }
        (false, Output::Logits(_), false) => [&GEMV_LOGITS_M8, &GEMV_LOGITS_M16, &GEMV_LOGITS_M32, &GEMV_LOGITS_M64],
        (_, Output::Matrix(_), true) => [&GEMV_FP8_NORM_M8, &GEMV_FP8_NORM_M16, &GEMV_FP8_NORM_M32, &GEMV_FP8_M64],
        (_, Output::Rope(_), true) => {
            [&GEMV_FP8_NORM_ROPE_M8, &GEMV_FP8_NORM_ROPE_M16, &GEMV_FP8_NORM_ROPE_M32, &GEMV_FP8_ROPE_M64]
        }
        (_, Output::Silu(_), true) => {
            [&GEMV_FP8_NORM_SILU_M8, &GEMV_FP8_NORM_SILU_M16, &GEMV_FP8_NORM_SILU_M32, &GEMV_FP8_SILU_M64]
        }
        (false, Output::Residual(_), true) => {
            [&GEMV_FP8_RESIDUAL_M8, &GEMV_FP8_RESIDUAL_M16, &GEMV_FP8_RESIDUAL_M32, &GEMV_FP8_RESIDUAL_M64]
        }
        _ => unreachable!("no model needs this product"),
    }
}

/// A product of up to 64 rows: decode, and the logits of prefill.
pub fn gemv(
    device: &Device,
    input: Input,
    w: &Linear,
    rows: u32,
    output: Output,
    workspace: &Workspace,
) -> Result<Launch> {
    assert!((1..=MAX_DECODE_ROWS).contains(&rows));
    let size = GEMV_ROWS.iter().position(|&most| rows <= most).expect("checked above");
    let kernel = gemv_kernels(matches!(input, Input::Normed(..)), output, w.is_fp8())[size];
    assert_eq!(matches!(input, Input::Fp8(_)), gemv_reads_fp8(w, rows));
    let (x, words, row_bytes) = match input {
        Input::Plain(x) | Input::Normed(x, _) => (x, w.k, w.k * BF16),
        Input::Fp8(x) => (&x.numbers, w.words(), quantised_row_bytes(w.k)),
    };
    let mut params = GemvParams {
        w_map: w.gemv_map,
        x_map: matrix_map(device, x, rows as u64, words, [64, GEMV_ROWS[size]])?,
        x: x.pointer(),
        scales: w.scales(),
        bias: w.bias(),
        partial: workspace.partial.pointer(),
        ticket: workspace.ticket.pointer(),
        rows: rows as i32,
        n: w.n as i32,
        k: w.k as i32,
        ..Default::default()
    };
    match input {
        Input::Plain(_) => {}
        Input::Normed(_, norm) => {
            params.norm = norm.weight.pointer();
            params.eps = norm.eps;
            params.squares = workspace.squares.pointer();
        }
        Input::Fp8(x) => {
            params.x_scales = x.scales.pointer();
            params.x_scales_stride = x.stride as i32;
        }
    }
    let result = match output {
        Output::Matrix(c) => {
            params.c = c.pointer();
            w.n * BF16
        }
        Output::Rope(into) => {
            params.rope = into.params();
            into.row_bytes()
        }
        Output::Silu(c) => {
            params.c = c.pointer();
            w.n / 2 * BF16
        }
        Output::Residual(c) => {
            params.c = c.pointer();
            params.squares_out = workspace.squares.pointer();
            w.n * 2 * BF16
        }
        Output::Logits(logits) => {
            params.logits = logits.pointer();
            w.n * 4
        }
    };
    let steps = w.n.div_ceil(GEMV_TILE_ROWS) * (w.k * w.element()).div_ceil(GEMV_STEP_BYTES);
    Ok(Launch {
        shared_bytes: if w.is_fp8() { GEMV_FP8_SHARED[size] } else { GEMV_SHARED[size] },
        pdl: true,
        bytes: w.bytes() + w.scale_bytes() + rows as u64 * (row_bytes + result),
        flops: 2 * rows as u64 * w.n * w.k,
        ..kernel.launch([steps.min(workspace.blocks as u64) as u32, 1, 1], params)
    })
}

/// Where a row's token comes from.
#[derive(Clone, Copy)]
pub enum Tokens<'a> {
    /// Tokens and positions of prompts, each [rows] i32.
    Prompt(&'a Buffer, &'a Buffer),
    /// The slots know; sums of squares are left in the workspace.
    Slots(&'a Workspace),
}

/// out [rows][hidden] = the embeddings of the rows' tokens. `table` [vocab][hidden], `slots` [slots] of SlotState.
pub fn embed(
    table: &Buffer,
    slots: &Buffer,
    rows: &Rows,
    tokens: Tokens,
    out: &Buffer,
    hidden: usize,
    vocab: usize,
) -> Launch {
    let null = std::ptr::null;
    let (prompt_token, prompt_position, squares): (_, _, *mut f32) = match tokens {
        Tokens::Prompt(token, position) => {
            (token.pointer::<i32>().cast_const(), position.pointer::<i32>().cast_const(), std::ptr::null_mut())
        }
        Tokens::Slots(workspace) => (null(), null(), workspace.squares.pointer()),
    };
    let params = EmbedParams {
        table: table.pointer(),
        slots: slots.pointer(),
        row_slot: rows.slot.pointer(),
        prompt_token,
        prompt_position,
        row_position: rows.position.pointer(),
        out: out.pointer(),
        squares,
        rows: rows.count as i32,
        hidden: hidden as i32,
        vocab: vocab as i32,
        ..Default::default()
    };
    let bytes = 2 * BF16 * rows.count as u64 * hidden as u64;
    Launch { pdl: true, bytes, ..kernels::EMBED.launch([rows.count, 1, 1], params) }
}

/// An RMSNorm's weight [hidden] and epsilon.
pub struct Norm {
    pub weight: Arc<Buffer>,
    pub eps: f32,
}

fn norm_params(x: &Buffer, norm: &Norm, rows: u32, out: &Buffer) -> NormParams {
    NormParams {
        x: x.pointer(),
        weight: norm.weight.pointer(),
        out: out.pointer(),
        rows: rows as i32,
        hidden: (norm.weight.bytes() as u64 / BF16) as i32,
        eps: norm.eps,
        ..Default::default()
    }
}

/// out[i] = norm(x[i]), or of x[row_index[i]]; [rows][hidden].
pub fn rms_norm(x: &Buffer, norm: &Norm, row_index: Option<&Buffer>, rows: u32, out: &Buffer) -> Launch {
    let row_index = row_index.map_or(std::ptr::null(), |i| i.pointer());
    let params = NormParams { row_index, ..norm_params(x, norm, rows, out) };
    let bytes = (2 * rows as u64 + 1) * norm.weight.bytes() as u64;
    Launch { shared_bytes: NORM_SHARED, pdl: true, bytes, ..kernels::RMS_NORM.launch([rows, 1, 1], params) }
}

/// The same, from the sums of squares in the workspace: to the bit what [`Input::Normed`] makes of x.
pub fn rms_norm_summed(x: &Buffer, norm: &Norm, rows: u32, out: &Buffer, workspace: &Workspace) -> Launch {
    let params = NormParams { squares: workspace.squares.pointer(), ..norm_params(x, norm, rows, out) };
    let bytes = (2 * rows as u64 + 1) * norm.weight.bytes() as u64;
    Launch { pdl: true, bytes, ..kernels::RMS_NORM_SUMMED.launch([rows, 1, 1], params) }
}

/// out = norm(x) in e4m3; x [rows][hidden].
pub fn rms_norm_fp8(x: &Buffer, norm: &Norm, rows: u32, out: &Quantised) -> Launch {
    let (params, bytes) = norm_fp8_params(x, norm, rows, out);
    Launch { shared_bytes: NORM_SHARED, pdl: true, bytes, ..kernels::RMS_NORM_FP8.launch([rows, 1, 1], params) }
}

/// The same, from the sums of squares in the workspace: to the bit what a product makes of [`Input::Normed`] on its way.
pub fn rms_norm_summed_fp8(x: &Buffer, norm: &Norm, rows: u32, out: &Quantised, workspace: &Workspace) -> Launch {
    let (params, bytes) = norm_fp8_params(x, norm, rows, out);
    let params = NormParams { squares: workspace.squares.pointer(), ..params };
    Launch { pdl: true, bytes, ..kernels::RMS_NORM_SUMMED_FP8.launch([rows, 1, 1], params) }
}

/// And the bytes moved.
fn norm_fp8_params(x: &Buffer, norm: &Norm, rows: u32, out: &Quantised) -> (NormParams, u64) {
    let params = NormParams {
        out: std::ptr::null_mut(),
        out_fp8: out.numbers.pointer(),
        scales: out.scales.pointer(),
        scales_stride: out.stride as i32,
        ..norm_params(x, norm, rows, &out.numbers)
    };
    let hidden = norm.weight.bytes() as u64 / BF16;
    (params, rows as u64 * (hidden * BF16 + quantised_row_bytes(hidden)) + hidden * BF16)
}

/// out = x in e4m3; x [rows][k].
pub fn quantise(x: &Buffer, k: usize, rows: u32, out: &Quantised) -> Launch {
    let params = QuantiseParams {
        x: x.pointer(),
        out: out.numbers.pointer(),
        scales: out.scales.pointer(),
        rows: rows as i32,
        k: k as i32,
        scales_stride: out.stride as i32,
        ..Default::default()
    };
    let grid = [(k as u32).div_ceil(8 * QUANTISE_THREADS), rows, 1];
    let bytes = rows as u64 * (k as u64 * BF16 + quantised_row_bytes(k as u64));
    Launch { pdl: true, bytes, ..kernels::QUANTISE.launch(grid, params) }
}

/// out [n][k] = w [n][k] in e4m3, and the scales [n] of its rows.
pub fn quantise_weight(w: &Buffer, n: usize, k: usize, out: &Buffer, scales: &Buffer) -> Launch {
    assert!(w.bytes() >= n * k * 2 && out.bytes() >= n * k && scales.bytes() >= n * 4);
    let params =
        QuantiseWeightParams { w: w.pointer(), out: out.pointer(), scales: scales.pointer(), n: n as i32, k: k as i32 };
    let bytes = (n * k * 3 + n * 4) as u64;
    Launch {
        shared_bytes: QUANTISE_SHARED,
        pdl: true,
        bytes,
        ..kernels::QUANTISE_WEIGHT.launch([n as u32, 1, 1], params)
    }
}

/// residual [rows][hidden] += x, as [`Output::Residual`] does it; the sums of squares go to the workspace.
pub fn add_residual(x: &Buffer, residual: &Buffer, rows: u32, hidden: usize, workspace: &Workspace) -> Launch {
    let params = AddResidualParams {
        x: x.pointer(),
        residual: residual.pointer(),
        squares: workspace.squares.pointer(),
        rows: rows as i32,
        hidden: hidden as i32,
    };
    let elements = rows as u64 * hidden as u64;
    Launch { pdl: true, bytes: 3 * BF16 * elements, ..kernels::ADD_RESIDUAL.launch(unfused_grid(elements), params) }
}

/// out [rows][inner] = silu(gate) * up, as [`Output::Silu`] makes it. `gate_up`: [rows][2 inner] fp32, interleaved as there.
pub fn silu_mul(gate_up: &Buffer, rows: u32, inner: usize, out: &Buffer) -> Launch {
    let params =
        SiluMulParams { gate_up: gate_up.pointer(), out: out.pointer(), rows: rows as i32, inner: inner as i32 };
    let elements = rows as u64 * inner as u64;
    let bytes = elements * (2 * 4 + BF16);
    Launch { pdl: true, bytes, ..kernels::SILU_MUL.launch(unfused_grid(2 * elements), params) }
}

/// Of so many columns in all rows.
fn unfused_grid(columns: u64) -> [u32; 3] {
    [columns.div_ceil(16 * UNFUSED_THREADS as u64) as u32, 1, 1]
}

/// Where q, k and v of a step's rows go.
pub struct RopeInto<'a> {
    pub heads: Heads,
    /// [positions][dim / 2][2] fp32.
    pub cos_sin: &'a Buffer,
    pub rows: &'a Rows<'a>,
    pub pages: &'a Pages<'a>,
    /// [rows][query heads][dim].
    pub q: &'a Buffer,
}

impl RopeInto<'_> {
    /// Written for one row.
    fn row_bytes(&self) -> u64 {
        let (query, kv) = (self.heads.query as u64 * BF16, 2 * self.heads.kv as u64 * self.pages.kind.bytes());
        (query + kv) * self.heads.dim as u64
    }

    fn params(&self) -> Rope {
        let quantise = |scale: f32| if self.pages.kind == KvType::Fp8 { 1.0 / scale } else { 0.0 };
        Rope {
            cos_sin: self.cos_sin.pointer(),
            row_position: self.rows.position.pointer(),
            row_slot: self.rows.slot.pointer(),
            block_table: self.pages.block_table.pointer(),
            q: self.q.pointer(),
            k_pages: self.pages.k.pointer(),
            v_pages: self.pages.v.pointer(),
            k_quantise: quantise(self.pages.scales.k),
            v_quantise: quantise(self.pages.scales.v),
            q_heads: self.heads.query as i32,
            kv_heads: self.heads.kv as i32,
            head_dim: self.heads.dim as i32,
            max_pages: self.pages.max_pages as i32,
        }
    }
}

/// qkv [rows][heads.columns()], heads of q and k interleaved (kernels/rope.cuh), to rotated q; k and v to their pages. `norms`:
/// of q and k heads, where the model has them.
pub fn rope_append(qkv: &Buffer, norms: Option<(&Norm, &Norm)>, into: &RopeInto) -> Launch {
    let (heads, rows) = (into.heads, into.rows);
    let kernel = if heads.dim == 64 { &kernels::ROPE_APPEND_D64 } else { &kernels::ROPE_APPEND_D128 };
    let params = RopeParams {
        qkv: qkv.pointer(),
        q_norm: norms.map_or(std::ptr::null(), |(q, _)| q.weight.pointer()),
        k_norm: norms.map_or(std::ptr::null(), |(_, k)| k.weight.pointer()),
        norm_eps: norms.map_or(0.0, |(q, _)| q.eps),
        rope: into.params(),
        rows: rows.count as i32,
    };
    let threads = rows.count * heads.columns() / 16;
    let bytes = rows.count as u64 * (heads.columns() as u64 * BF16 + into.row_bytes() + heads.dim as u64 * 4);
    Launch { pdl: true, bytes, ..kernel.launch([threads.div_ceil(ROPE_THREADS), 1, 1], params) }
}

/// What attention must move for each column of a head: q and its result, K and V.
fn attention_bytes(rows: u32, heads: Heads, keys: u64, kind: KvType) -> u64 {
    2 * rows as u64 * heads.query as u64 * BF16 + 2 * keys * heads.kv as u64 * kind.bytes()
}

/// A work list of attn_prefill in device memory, and how much work it is.
pub struct Tiles<'a> {
    /// [count] of PrefillTile.
    pub tiles: &'a Buffer,
    /// [1] i32.
    pub device_count: &'a Buffer,
    pub count: u32,
    /// Query tokens in them.
    pub rows: u32,
    /// (query, key) pairs that are not masked, of one head.
    pub pairs: u64,
    /// Keys of all sequences.
    pub keys: u64,
}

/// Causal attention of chunks of prompts: q, out [rows][query heads][dim]. `window`: how many tokens each attends to, itself
/// included; None: all.
#[allow(clippy::too_many_arguments)]
pub fn attn_prefill(
    device: &Device,
    q: &Buffer,
    heads: Heads,
    window: Option<u32>,
    tiles: &Tiles,
    pages: &Pages,
    out: &Buffer,
    workspace: &Workspace,
) -> Result<Launch> {
    let (dim, group) = (heads.dim as u64, heads.group() as u64);
    let q_map = device.tensor_map(&TensorMapSpec {
        address: q.address(),
        dims: [dim, group, heads.kv as u64, tiles.rows as u64],
        strides: [BF16, dim * BF16, group * dim * BF16, heads.query as u64 * dim * BF16],
        r#box: [64, group as u32, 1, prefill_tile_tokens(heads.dim, heads.group())],
        swizzle: true,
    })?;
    let (kernel, shared_bytes) = match (heads.dim, pages.kind) {
        (64, KvType::Bf16) => (&kernels::ATTN_PREFILL_D64, ATTN_PREFILL_SHARED_D64),
        (_, KvType::Bf16) => (&kernels::ATTN_PREFILL_D128, ATTN_PREFILL_SHARED_D128),
        (64, KvType::Fp8) => (&kernels::ATTN_PREFILL_D64_FP8, ATTN_PREFILL_SHARED_D64_FP8),
        (_, KvType::Fp8) => (&kernels::ATTN_PREFILL_D128_FP8, ATTN_PREFILL_SHARED_D128_FP8),
    };
    let params = AttnPrefillParams {
        k_map: pages.k_map,
        v_map: pages.v_map,
        q_map,
        tiles: tiles.tiles.pointer(),
        tile_count: tiles.device_count.pointer(),
        block_table: pages.block_table.pointer(),
        ticket: workspace.ticket.pointer(),
        out: out.pointer(),
        q_heads: heads.query as i32,
        kv_heads: heads.kv as i32,
        max_pages: pages.max_pages as i32,
        window: window.unwrap_or(NO_WINDOW) as i32,
        scale: heads.scale() * pages.scales.k,
        v_scale: pages.scales.v,
    };
    let pairs = tiles.pairs.min(tiles.rows as u64 * window.unwrap_or(NO_WINDOW) as u64);
    Ok(Launch {
        shared_bytes,
        pdl: true,
        bytes: dim * attention_bytes(tiles.rows, heads, tiles.keys, pages.kind),
        flops: 4 * pairs * heads.query as u64 * dim,
        ..kernel.launch([(tiles.count * heads.kv).min(device.processors()), 1, 1], params)
    })
}

/// Attention of one query token per row: q, out [rows][query heads][dim]. `packed`: the query heads of a KV head read K and V
/// together. `keys`: of all rows together, for the report. `next`: the product that follows, whose weights are read ahead.
#[allow(clippy::too_many_arguments)]
pub fn attn_decode(
    q: &Buffer,
    heads: Heads,
    packed: bool,
    window: Option<u32>,
    rows: &Rows,
    keys: u64,
    pages: &Pages,
    out: &Buffer,
    next: Option<&Linear>,
    workspace: &Workspace,
) -> Launch {
    let (kernel, shared_bytes) = match (heads.dim, pages.kind) {
        (64, KvType::Bf16) => (&kernels::ATTN_DECODE_D64, ATTN_DECODE_SHARED_D64),
        (_, KvType::Bf16) => (&kernels::ATTN_DECODE_D128, ATTN_DECODE_SHARED_D128),
        (64, KvType::Fp8) => (&kernels::ATTN_DECODE_D64_FP8, ATTN_DECODE_SHARED_D64_FP8),
        (_, KvType::Fp8) => (&kernels::ATTN_DECODE_D128_FP8, ATTN_DECODE_SHARED_D128_FP8),
    };
    let groups = if packed { heads.kv } else { heads.query };
    let params = AttnDecodeParams {
        k_map: pages.k_map,
        v_map: pages.v_map,
        q: q.pointer(),
        row_position: rows.position.pointer(),
        row_slot: rows.slot.pointer(),
        block_table: pages.block_table.pointer(),
        partial: workspace.partial.pointer(),
        ticket: workspace.ticket.pointer(),
        out: out.pointer(),
        rows: rows.count as i32,
        q_heads: heads.query as i32,
        groups: groups as i32,
        groups_per_kv_head: (groups / heads.kv) as i32,
        max_pages: pages.max_pages as i32,
        prefetch: next.map_or(Prefetch::default(), |w| w.prefetch(ATTN_PREFETCH, workspace.blocks)),
        split_pages: workspace.split_pages as i32,
        window: window.unwrap_or(NO_WINDOW) as i32,
        scale: heads.scale() * pages.scales.k,
        v_scale: pages.scales.v,
        ..Default::default()
    };
    let dim = heads.dim as u64;
    let keys = keys.min(rows.count as u64 * window.unwrap_or(NO_WINDOW) as u64);
    Launch {
        shared_bytes,
        pdl: true,
        bytes: dim * attention_bytes(rows.count, Heads { kv: groups, ..heads }, keys, pages.kind),
        flops: 4 * keys * heads.query as u64 * dim,
        ..kernel.launch([workspace.blocks, 1, 1], params)
    }
}

/// The next token of each row from logits [rows][vocab] fp32. `params` names the slots' memory; its logits, rows and row_slot
/// are filled in here. `next`: the first product of the next step, whose weights are read ahead.
pub fn sample(params: SampleParams, logits: &Buffer, row_slot: &Buffer, rows: u32, next: Option<&Linear>) -> Launch {
    let vocab = params.vocab as u32;
    // About 20,000 logits, 80 KB, for a block: 40 for each of its threads.
    let cluster = vocab.div_ceil(20_000).next_power_of_two().min(8);
    let params = SampleParams {
        logits: logits.pointer(),
        row_slot: row_slot.pointer(),
        prefetch: next.map(|w| w.prefetch(SAMPLE_PREFETCH, cluster * rows)).unwrap_or_default(),
        rows: rows as i32,
        ..params
    };
    Launch {
        cluster,
        shared_bytes: SAMPLE_SHARED_BASE + 4 * vocab.div_ceil(cluster).next_multiple_of(4),
        pdl: true,
        bytes: rows as u64 * vocab as u64 * 4,
        ..kernels::SAMPLE.launch([cluster, rows, 1], params)
    }
}

/// Ends a pass of the loop on the device that `condition` belongs to ([`Device::begin_loop`]). `params`: of the `sample` before.
pub fn decode_loop(params: SampleParams, row_slot: &Buffer, rows: u32, condition: u64) -> Launch {
    let SampleParams { slots, ring, step, .. } = params;
    let row_slot = row_slot.pointer::<i32>();
    let params = DecodeLoopParams { slots, row_slot, ring, step, condition, rows: rows as i32, ..Default::default() };
    Launch { pdl: true, ..kernels::DECODE_LOOP.launch([1, 1, 1], params) }
}

/// out [count] = random bf16 of mean 0; the same seed gives the same bits on every device.
pub fn random(device: &Device, out: &Buffer, count: usize, seed: u64, deviation: f32) -> Launch {
    assert!(out.bytes() >= count * BF16 as usize);
    let params = RandomParams {
        out: out.pointer(),
        count: count as u64,
        seed_low: seed as u32,
        seed_high: (seed >> 32) as u32,
        deviation,
        ..Default::default()
    };
    let blocks = (count as u64).div_ceil(8 * RANDOM_THREADS as u64).clamp(1, 8 * device.processors() as u64);
    let bytes = BF16 * count as u64;
    Launch { pdl: true, bytes, ..kernels::RANDOM_NORMAL.launch([blocks as u32, 1, 1], params) }
}

/// # Errors
/// A vocabulary that the sampler cannot hold.
pub fn check_vocab(vocab: usize) -> Result<()> {
    if vocab > MAX_VOCAB {
        return Err(Error::Device(format!("a vocabulary of {vocab} is more than the sampler holds, {MAX_VOCAB}")));
    }
    Ok(())
}
