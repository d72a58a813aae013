//! The matrix products of prefill and decode against float64 truth: odd sizes, clipped tiles, every epilogue, tiles cut
//! between blocks; the same bits under every order of the threads and on replay.
//!
//! Operands are small multiples of 1/8, so that every sum is exact in fp32 whatever its order: but for silu, which goes
//! through exp, the kernels must return exactly the truth.

use crate::devices::{devices, download, upload};
use crate::fp8_products::sum_squares;
use crate::random::Random;
use crate::reference::{Epilogue, linear};
use half::bf16;
use ponder::batch::PageEntry;
use ponder::device::{Buffer, Device, Launch, TensorMapSpec};
use ponder::kernels::params::{
    AddResidualParams, GEMM_SHARED, GEMV_SHARED_M8, GEMV_SHARED_M16, GEMV_SHARED_M32, GEMV_SHARED_M64, GemmParams,
    GemvParams, SiluMulParams, TensorMap, UNFUSED_THREADS,
};
use ponder::kv_cache::KvCache;
use ponder::ops::{self, Heads, Input, KvScales, KvType, Linear, Norm, Output, RopeInto, Rows, Workspace};
use ponder::tiling::{self, Product, Tiling};
use std::sync::Arc;

/// Multiples of 1/8 from -1 to 1.
fn eighths(random: &mut Random, count: usize) -> Vec<bf16> {
    (0..count).map(|_| bf16::from_f32((random.below(17) as f32 - 8.0) / 8.0)).collect()
}

struct Case {
    rows: usize,
    n: usize,
    k: usize,
    epilogue: Epilogue,
    x: Vec<bf16>,
    w: Vec<bf16>,
    /// Bias or residual.
    extra: Vec<bf16>,
}

impl Case {
    fn new(random: &mut Random, rows: usize, n: usize, k: usize, epilogue: Epilogue) -> Case {
        let (x, w) = (eighths(random, rows * k), eighths(random, n * k));
        let extra = match epilogue {
            Epilogue::Bias => eighths(random, n),
            Epilogue::Residual => eighths(random, rows * n),
            _ => Vec::new(),
        };
        Case { rows, n, k, epilogue, x, w, extra }
    }

    /// Columns of c.
    fn width(&self) -> usize {
        if self.epilogue == Epilogue::Silu { self.n / 2 } else { self.n }
    }

    fn check(&self, c: &[f64], what: &str) {
        let truth = linear(&self.x, &self.w, self.k, self.epilogue, &self.extra);
        let tolerance = if self.epilogue == Epilogue::Silu { 1.0 / 128.0 } else { 0.0 };
        assert_eq!(c.len(), truth.len());
        for (i, (got, want)) in c.iter().zip(&truth).enumerate() {
            assert!(
                (got - want).abs() <= tolerance * want.abs(),
                "{what}: {:?} of {} x {} x {}: row {}, column {}: {got} but {want} is right",
                self.epilogue,
                self.rows,
                self.n,
                self.k,
                i / self.width(),
                i % self.width(),
            );
        }
    }
}

fn map(device: &Device, buffer: &Buffer, rows: usize, columns: usize, boxes: [u32; 2]) -> TensorMap {
    let spec = TensorMapSpec {
        address: buffer.address(),
        dims: [columns as u64, rows as u64],
        strides: [2, columns as u64 * 2],
        r#box: boxes,
        swizzle: true,
    };
    device.tensor_map(&spec).unwrap()
}

/// What `launch` leaves in `c`: the same after one run and after two replays, each of which may overlap its predecessor.
fn run_and_replay<T: bytemuck::Pod + PartialEq>(device: &Device, launch: &Launch, c: &Buffer, what: &str) -> Vec<T> {
    device.launch(launch).unwrap();
    let first: Vec<T> = download(device, c);
    device.fill(c, 0, c.bytes(), 0xff).unwrap();
    device.begin_capture().unwrap();
    device.launch(launch).unwrap();
    device.launch(launch).unwrap();
    let graph = device.end_capture().unwrap();
    device.replay(&graph).unwrap();
    device.replay(&graph).unwrap();
    assert!(first == download::<T>(device, c), "{what}: a replay gives other bits");
    first
}

fn gemm_launch(device: &Device, case: &Case, tiling: Tiling, grid: u32, operands: [&Buffer; 4]) -> Launch {
    let [x, w, extra, c] = operands;
    let (epilogue, bias) = match case.epilogue {
        Epilogue::Plain => (ops::Epilogue::Plain, false),
        Epilogue::Bias => (ops::Epilogue::Plain, true),
        Epilogue::Residual => (ops::Epilogue::Residual, false),
        Epilogue::Silu => (ops::Epilogue::Silu, false),
        Epilogue::Logits => unreachable!("prefill makes its logits by gemv"),
    };
    let kernel = ops::gemm_kernels(epilogue, bias, false).iter().find(|k| k.0 == tiling.columns).unwrap().1;
    let columns = tiling.columns / if case.epilogue == Epilogue::Silu { 2 } else { 1 };
    let panel = if columns.is_multiple_of(64) { 64 } else { 32 };
    let mut params = GemmParams {
        a_map: map(device, x, case.rows, case.k, [64, 128]),
        w_map: map(device, w, case.n, case.k, [64, tiling.columns / 2]),
        c_map: map(device, c, case.rows, case.width(), [panel, 64]),
        rows: case.rows as i32,
        n: case.n as i32,
        k: case.k as i32,
        ..Default::default()
    };
    match case.epilogue {
        Epilogue::Bias => params.bias = extra.pointer(),
        Epilogue::Residual => params.residual_map = map(device, extra, case.rows, case.n, [panel, 64]),
        _ => {}
    }
    let grid = [grid * tiling.cluster, 1, 1];
    Launch { cluster: tiling.cluster, shared_bytes: GEMM_SHARED, pdl: true, ..kernel.launch(grid, params) }
}

/// `groups`: clusters in the grid.
fn gemm(device: &Device, case: &Case, tiling: Tiling, groups: u32) {
    let what = format!("{}, {tiling:?}, {groups} groups", device.describe());
    let (x, w, extra) = (upload(device, &case.x), upload(device, &case.w), upload(device, &case.extra));
    let c = device.alloc(case.rows * case.width() * 2).unwrap();
    let launch = gemm_launch(device, case, tiling, groups, [&x, &w, &extra, &c]);
    let bits: Vec<bf16> = run_and_replay(device, &launch, &c, &what);
    case.check(&bits.iter().map(|v| v.to_f64()).collect::<Vec<_>>(), &what);
}

/// A product of decode. Where x is normalised on its way, each of its rows has one magnitude, a power of two, so that the norm is exact.
struct Decode {
    case: Case,
    /// Before the norm.
    x: Vec<bf16>,
    norm: Vec<bf16>,
}

impl Decode {
    fn new(random: &mut Random, rows: usize, n: usize, k: usize, (normed, epilogue): (bool, Epilogue)) -> Decode {
        let mut case = Case::new(random, rows, n, k, epilogue);
        if !normed {
            return Decode { x: case.x.clone(), case, norm: Vec::new() };
        }
        let norm = eighths(random, k);
        let (mut x, mut normed) = (Vec::new(), Vec::new());
        for i in 0..rows * k {
            let sign = if random.below(2) == 0 { 1.0 } else { -1.0 };
            x.push(bf16::from_f32(sign * f32::powi(2.0, (i / k % 5) as i32 - 2)));
            normed.push(bf16::from_f32(sign * norm[i % k].to_f32()));
        }
        case.x = normed;
        Decode { case, x, norm }
    }
}

/// Of the kernels that are an epilogue by themselves.
fn apart_grid(columns: usize) -> [u32; 3] {
    [columns.div_ceil(16 * UNFUSED_THREADS as usize) as u32, 1, 1]
}

fn squares(values: &[bf16]) -> Vec<f32> {
    values.chunks(64).map(|c| c.iter().map(|v| v.to_f32() * v.to_f32()).sum()).collect()
}

fn gemv(device: &Device, decode: &Decode, tokens: usize, grid: u32) {
    use ponder::kernels::*;
    let case = &decode.case;
    let what = format!("{}, {tokens} tokens, grid {grid}", device.describe());
    let size = [8, 16, 32, 64].iter().position(|&t| t == tokens).unwrap();
    let plain: [&'static Kernel<GemvParams>; 4] = [&GEMV_M8, &GEMV_M16, &GEMV_M32, &GEMV_M64];
    let (logits, norm_logits): ([&'static Kernel<GemvParams>; 4], [&'static Kernel<GemvParams>; 4]) = (
        [&GEMV_LOGITS_M8, &GEMV_LOGITS_M16, &GEMV_LOGITS_M32, &GEMV_LOGITS_M64],
        [&GEMV_NORM_LOGITS_M8, &GEMV_NORM_LOGITS_M16, &GEMV_NORM_LOGITS_M32, &GEMV_NORM_LOGITS_M64],
    );
    let normed = !decode.norm.is_empty();
    let unrounded = if normed { norm_logits[size] } else { logits[size] };
    let of_size = match (case.epilogue, normed) {
        (Epilogue::Plain | Epilogue::Bias, true) => [&GEMV_NORM_M8, &GEMV_NORM_M16, &GEMV_NORM_M32, &GEMV_NORM_M64],
        (Epilogue::Plain | Epilogue::Bias, false) => plain,
        (Epilogue::Silu, true) => [&GEMV_NORM_SILU_M8, &GEMV_NORM_SILU_M16, &GEMV_NORM_SILU_M32, &GEMV_NORM_SILU_M64],
        (Epilogue::Silu, false) => [&GEMV_SILU_M8, &GEMV_SILU_M16, &GEMV_SILU_M32, &GEMV_SILU_M64],
        (Epilogue::Residual, _) => [&GEMV_RESIDUAL_M8, &GEMV_RESIDUAL_M16, &GEMV_RESIDUAL_M32, &GEMV_RESIDUAL_M64],
        (Epilogue::Logits, _) => [unrounded; 4],
    };
    let shared = [GEMV_SHARED_M8, GEMV_SHARED_M16, GEMV_SHARED_M32, GEMV_SHARED_M64];
    let (logits, adds) = (case.epilogue == Epilogue::Logits, case.epilogue == Epilogue::Residual);
    let (x, w) = (upload(device, &decode.x), upload(device, &case.w));
    let (extra, norm, x_squares) =
        (upload(device, &case.extra), upload(device, &decode.norm), upload(device, &squares(&decode.x)));
    let c = device.alloc(case.rows * case.width() * if logits { 4 } else { 2 }).unwrap();
    let c_squares = device.alloc(case.rows * case.n.div_ceil(64) * 4).unwrap();
    let partial = device.alloc(grid as usize * 2 * tokens * 64 * 4).unwrap();
    let ticket = upload(device, &vec![0u32; case.n.div_ceil(64)]);
    let params = GemvParams {
        w_map: map(device, &w, case.n, case.k, [64, 64]),
        x_map: map(device, &x, case.rows, case.k, [64, tokens as u32]),
        norm: norm.pointer(),
        squares: x_squares.pointer(),
        bias: if case.epilogue == Epilogue::Bias { extra.pointer() } else { std::ptr::null() },
        c: c.pointer(),
        squares_out: c_squares.pointer(),
        logits: c.pointer(),
        partial: partial.pointer(),
        ticket: ticket.pointer(),
        rows: case.rows as i32,
        n: case.n as i32,
        k: case.k as i32,
        ..Default::default()
    };
    let product = |kernel: &'static Kernel<GemvParams>, params| Launch {
        shared_bytes: shared[size],
        pdl: true,
        ..kernel.launch([grid, 1, 1], params)
    };
    let launch = product(of_size[size], params);
    let values: Vec<f64> = if logits {
        run_and_replay::<f32>(device, &launch, &c, &what).iter().map(|&v| f64::from(v)).collect()
    } else if adds {
        device.upload(&c, 0, bytemuck::cast_slice(&case.extra)).unwrap();
        device.launch(&launch).unwrap();
        let sum: Vec<bf16> = download(device, &c);
        let sum_squares = download::<f32>(device, &c_squares);
        for (got, want) in sum_squares.iter().zip(squares(&sum)) {
            assert!((got - want).abs() <= 1e-6 * want, "{what}: sum of squares {got} but {want} is right");
        }
        // In two launches, the same bits.
        let rounded = device.alloc(c.bytes()).unwrap();
        device.launch(&product(plain[size], GemvParams { c: rounded.pointer(), ..params })).unwrap();
        device.upload(&c, 0, bytemuck::cast_slice(&case.extra)).unwrap();
        let (x, residual, squares) = (rounded.pointer(), c.pointer(), c_squares.pointer());
        let params = AddResidualParams { x, residual, squares, rows: params.rows, hidden: params.n };
        device.launch(&Launch { pdl: true, ..ADD_RESIDUAL.launch(apart_grid(case.rows * case.n), params) }).unwrap();
        assert!(sum == download::<bf16>(device, &c), "{what}: other sums in two launches");
        assert!(sum_squares == download::<f32>(device, &c_squares), "{what}: other squares in two launches");
        sum.iter().map(|v| v.to_f64()).collect()
    } else {
        let bits = run_and_replay::<bf16>(device, &launch, &c, &what);
        if case.epilogue == Epilogue::Silu {
            let sums = device.alloc(case.rows * case.n * 4).unwrap();
            device.launch(&product(unrounded, GemvParams { logits: sums.pointer(), ..params })).unwrap();
            let (gate_up, out) = (sums.pointer(), c.pointer());
            let params = SiluMulParams { gate_up, out, rows: params.rows, inner: params.n / 2 };
            device.fill(&c, 0, c.bytes(), 0xff).unwrap();
            device.launch(&Launch { pdl: true, ..SILU_MUL.launch(apart_grid(case.rows * case.n), params) }).unwrap();
            assert!(bits == download::<bf16>(device, &c), "{what}: other bits in two launches");
        }
        bits.iter().map(|v| v.to_f64()).collect()
    };
    case.check(&values, &what);
    assert!(download::<u32>(device, &ticket).iter().all(|&t| t == 0), "{what}: tickets are not back at zero");
}

const GEMM_EPILOGUES: [Epilogue; 4] = [Epilogue::Plain, Epilogue::Bias, Epilogue::Residual, Epilogue::Silu];
/// Whether x is normalised on its way, and what follows.
const GEMV_PRODUCTS: [(bool, Epilogue); 9] = [
    (true, Epilogue::Plain),
    (true, Epilogue::Bias),
    (true, Epilogue::Silu),
    (false, Epilogue::Residual),
    (false, Epilogue::Logits),
    (false, Epilogue::Plain),
    (false, Epilogue::Bias),
    (false, Epilogue::Silu),
    (true, Epilogue::Logits),
];

/// Widths of tiles that an epilogue has kernels for.
fn widths(epilogue: Epilogue) -> &'static [u32] {
    if epilogue == Epilogue::Silu { &[128, 192, 256] } else { &tiling::WIDTHS }
}

#[test]
fn gemm_is_right_for_every_kernel_and_odd_sizes() {
    let sizes = [
        (1, 64, 64),
        (7, 192, 192),
        (64, 128, 64),
        (127, 320, 128),
        (128, 256, 704),
        (129, 448, 64),
        (130, 512, 64),
        (200, 64, 448),
        (255, 384, 192),
        (257, 256, 128),
        (300, 576, 64),
    ];
    for device in devices() {
        let mut random = Random(1);
        let mut next = 0;
        for epilogue in GEMM_EPILOGUES {
            for &columns in widths(epilogue) {
                for cluster in [1, 2] {
                    let (rows, n, k) = sizes[next % sizes.len()];
                    next += 1;
                    let tiling = Tiling { columns, cluster };
                    let groups = tiling.groups(Product { rows, n, k });
                    gemm(
                        &device,
                        &Case::new(&mut random, rows as usize, n as usize, k as usize, epilogue),
                        tiling,
                        groups,
                    );
                }
            }
        }
    }
}

#[test]
fn gemm_blocks_walk_over_many_tiles() {
    let device = devices().remove(0);
    let mut random = Random(2);
    for (rows, n, k) in [(300, 576, 192), (1000, 320, 64)] {
        for (epilogue, columns, cluster) in [
            (Epilogue::Residual, 160, 1),
            (Epilogue::Residual, 96, 2),
            (Epilogue::Silu, 192, 2),
            (Epilogue::Plain, 256, 1),
            (Epilogue::Bias, 128, 2),
        ] {
            gemm(&device, &Case::new(&mut random, rows, n, k, epilogue), Tiling { columns, cluster }, 2);
        }
    }
}

/// More than the 16 tiles along m that share a strip of w: the numbering of tiles must not miss or repeat one.
#[test]
fn gemm_numbers_tiles_beyond_one_group() {
    let device = devices().remove(0);
    let case = Case::new(&mut Random(3), 128 * 18 + 5, 192, 64, Epilogue::Plain);
    for cluster in [1, 2] {
        gemm(&device, &case, Tiling { columns: 128, cluster }, 3);
    }
}

#[test]
fn gemm_adds_into_the_residual_in_place() {
    let case = Case::new(&mut Random(4), 150, 320, 128, Epilogue::Residual);
    for device in devices() {
        let (x, w, c) = (upload(&device, &case.x), upload(&device, &case.w), upload(&device, &case.extra));
        let launch = gemm_launch(&device, &case, Tiling { columns: 256, cluster: 1 }, 4, [&x, &w, &c, &c]);
        device.launch(&launch).unwrap();
        let sum: Vec<bf16> = download(&device, &c);
        case.check(&sum.iter().map(|v| v.to_f64()).collect::<Vec<_>>(), &device.describe());
    }
}

/// On the 132 SMs of an H100.
fn chosen(rows: u32, n: u32, k: u32) -> Tiling {
    tiling::choose(Product { rows, n, k }, tiling::WIDTHS.into_iter(), 132, true)
}

#[test]
fn tilings_fill_the_waves() {
    // A large square: wide tiles in pairs, because alone they are bound by L2.
    let square = chosen(8192, 8192, 8192);
    assert!(square.columns >= 192 && square.cluster == 2, "{square:?}");
    // 4 x 20 tiles of 256 columns leave 52 SMs idle; 4 x 32 of 160 only 4.
    assert_eq!(chosen(512, 5120, 5120).columns, 160);
    // 2 x 56 tiles of 128 would do as well as 2 x 38 of 192: what counts is that all run at once, and the smallest finish first.
    let small = chosen(256, 3584, 3584);
    assert!(small.groups(Product { rows: 256, n: 3584, k: 3584 }) * small.cluster <= 132, "{small:?}: one wave");
    assert_eq!(chosen(64, 4096, 4096), Tiling { columns: 96, cluster: 1 }, "one row of tiles: no pairs, many tiles");
}

/// No tiling that there is beats the chosen one in the model, nor is the model blind to a wave.
#[test]
fn the_chosen_tiling_has_the_least_clocks() {
    let mut random = Random(8);
    for _ in 0..1000 {
        let [rows, n, k] = [8192, 37888, 18944].map(|most: u32| 64 * (1 + random.below(most / 64)));
        let product = Product { rows, n, k };
        let best = chosen(rows, n, k).clocks(product, 132);
        for columns in tiling::WIDTHS {
            for cluster in [1, 2] {
                assert!(best <= Tiling { columns, cluster }.clocks(product, 132) || rows <= 128, "{product:?}");
            }
        }
    }
    let full = Tiling { columns: 128, cluster: 1 };
    let wave = |n| full.clocks(Product { rows: 128, n, k: 4096 }, 132);
    assert!(wave(128 * 132) < 11 * wave(128 * 122) / 10);
    assert!(wave(128 * 133) > 19 * wave(128 * 132) / 10);
}

#[test]
fn gemv_is_right_for_every_batch_and_epilogue() {
    for device in devices() {
        let mut random = Random(5);
        for (i, rows) in (1..=16).chain([17, 20, 31, 32, 33, 47, 63, 64]).enumerate() {
            let decode = Decode::new(&mut random, rows, 192, 704, GEMV_PRODUCTS[i % 9]);
            gemv(&device, &decode, [8, 16, 32, 64].into_iter().find(|&t| rows <= t).unwrap(), 2);
            if rows <= 8 {
                gemv(&device, &decode, 16, 3);
            }
        }
        for (tokens, product) in [16, 32, 64].into_iter().flat_map(|t| GEMV_PRODUCTS.map(|product| (t, product))) {
            gemv(&device, &Decode::new(&mut random, tokens - 1, 192, 192, product), tokens, 3);
        }
    }
}

/// Shares that end inside of a tile, tiles cut into two, three and every one of their steps, shares of one step.
#[test]
fn gemv_sums_cut_tiles() {
    for device in devices() {
        let mut random = Random(6);
        for (n, k, grid) in [(64, 64, 1), (64, 192, 2), (128, 704, 3), (192, 1024, 5), (64, 704, 6), (320, 256, 10)] {
            for product in GEMV_PRODUCTS {
                gemv(&device, &Decode::new(&mut random, 3, n, k, product), 8, grid);
            }
            gemv(&device, &Decode::new(&mut random, 13, n, k, (true, Epilogue::Bias)), 16, grid);
        }
        gemv(&device, &Decode::new(&mut random, 21, 192, 1024, (false, Epilogue::Residual)), 32, 5);
        gemv(&device, &Decode::new(&mut random, 50, 192, 1024, (false, Epilogue::Residual)), 64, 5);
    }
}

/// A vocabulary need not be a multiple of the tile; an intermediate size neither.
#[test]
fn gemv_clips_the_last_tile() {
    let device = devices().remove(0);
    let mut random = Random(7);
    for product in GEMV_PRODUCTS.into_iter().filter(|(_, epilogue)| *epilogue != Epilogue::Residual) {
        gemv(&device, &Decode::new(&mut random, 5, 336, 128, product), 8, 2);
    }
}

/// The fused product of q, k and v is, bit for bit, the norm, the product alone and then rope_append.
#[test]
fn gemv_normalises_rotates_and_appends_as_kernels_apart_do() {
    let positions = [5, -1, 63, 64, 127, 0, 130];
    for device in devices() {
        let mut random = Random(9);
        for (rows, query, kv, dim) in [(7, 4, 1, 64), (3, 2, 2, 128), (30, 5, 1, 128), (40, 2, 1, 64)] {
            let heads = Heads { query, kv, dim };
            let (n, k) = (heads.columns() as usize, 192);
            let decode = Decode::new(&mut random, rows, n, k, (true, Epilogue::Bias));
            let weight = Arc::new(upload(&device, &decode.case.w));
            let w = Linear::new(&device, weight, Some(upload(&device, &decode.case.extra).into()), n, k).unwrap();
            let norm = Norm { weight: upload(&device, &decode.norm).into(), eps: 0.0 };
            let workspace = Workspace::new(&device, n, k, heads, None).unwrap();
            let (x, count) = (upload(&device, &decode.x), rows as u32);
            sum_squares(&device, &x, count, k, &workspace);

            let of_row = |i: usize| positions[i % positions.len()];
            let slot = upload(&device, &(1..=rows as i32).collect::<Vec<_>>());
            let position = upload(&device, &(0..rows).map(of_row).collect::<Vec<i32>>());
            let rows_of = Rows { count, slot: &slot, position: &position };
            let cos_sin: Vec<f32> =
                (0..131 * dim).map(|_| random.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0).collect();
            let cos_sin = upload(&device, &cos_sin);
            // The last page first.
            let entry = |i: u32| PageEntry { slot: i / 3 + 1, index: i % 3, page: 3 * count - i };
            let entries: Vec<PageEntry> = (0..3 * count).map(entry).collect();
            let scales = KvScales { k: 0.37, v: 1.9 };
            let normed = device.alloc(rows * k * 2).unwrap();
            let run = |kind: KvType, fused_norm: bool, fused_rope: bool| {
                let cache = KvCache::new(&device, heads, kind, &[scales], 3 * count + 1, count + 1, 3).unwrap();
                cache.set_pages(&device, &entries).unwrap();
                let (q, qkv) = (device.alloc(rows * (query * dim) as usize * 2), device.alloc(rows * n * 2));
                let (q, qkv) = (q.unwrap(), qkv.unwrap());
                let pages = cache.layer(0);
                let into = RopeInto { heads, cos_sin: &cos_sin, rows: &rows_of, pages: &pages, q: &q };
                let input = if fused_norm { Input::Normed(&x, &norm) } else { Input::Plain(&normed) };
                let output = if fused_rope { Output::Rope(&into) } else { Output::Matrix(&qkv) };
                if !fused_norm {
                    device.launch(&ops::rms_norm_summed(&x, &norm, count, &normed, &workspace)).unwrap();
                }
                device.launch(&ops::gemv(&device, input, &w, count, output, &workspace).unwrap()).unwrap();
                if !fused_rope {
                    device.launch(&ops::rope_append(&qkv, None, &into)).unwrap();
                }
                [&q, pages.k, pages.v].map(|b| download::<u16>(&device, b))
            };
            for kind in [KvType::Bf16, KvType::Fp8] {
                let fused = run(kind, true, true);
                for (norm, rope) in [(true, false), (false, true), (false, false)] {
                    let what = format!("{}: {rows} rows, {heads:?}, {kind:?}", device.describe());
                    assert!(fused == run(kind, norm, rope), "{what}: norm fused {norm}, rope fused {rope}");
                }
            }
        }
    }
}
