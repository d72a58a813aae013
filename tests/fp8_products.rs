//! Products of fp8 weights, and what makes fp8 of activations and weights, against float64 models of the same quantisation: odd
//! sizes, clipped tiles, every epilogue, scales of rows and of blocks, tiles cut between blocks; the same bits on replay.
//!
//! The tensor cores keep sums of fp8 to 14 bits, as the SIMT machine does. So a sum may be off by 2^-12 of what its terms are
//! without their signs, which is a hundredth of what a wrong scale would do.

use crate::devices::{devices, download, upload};
use crate::random::Random;
use crate::reference::{Epilogue, e4m3_to_f64, quantise, round, round_e4m3};
use half::bf16;
use ponder::batch::PageEntry;
use ponder::device::{Buffer, Device, Launch};
use ponder::kv_cache::KvCache;
use ponder::ops::{self, Heads, Input, KvScales, KvType, Linear, Norm, Output, Quantised, RopeInto, Rows, Scales};
use ponder::ops::{Operand, Workspace};
use ponder::tiling::{Product, Tiling};
use std::sync::Arc;

const LOST: f64 = 1.0 / 4096.0;
const HEADS: Heads = Heads { query: 1, kv: 1, dim: 64 };

/// From -4 to 4, some rows a thousand times larger than others, and zeros.
fn values(random: &mut Random, rows: usize, k: usize) -> Vec<bf16> {
    let number = |i: usize, r: u32| (f64::from(r) / f64::from(1 << 19) - 1.0) * 2f64.powi((i / k % 5) as i32 * 3 - 8);
    (0..rows * k)
        .map(|i| if random.below(9) == 0 { bf16::ZERO } else { bf16::from_f64(number(i, random.below(1 << 20))) })
        .collect()
}

/// Numbers of e4m3 of 8 at the most.
fn e4m3(random: &mut Random, count: usize) -> Vec<u8> {
    (0..count).map(|_| (random.below(0x51) | random.below(2) << 7) as u8).collect()
}

fn scales(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| (0.5 + random.below(1 << 10) as f32 / 512.0) / 64.0).collect()
}

/// w [n][k] in e4m3, and the scale of each of its numbers.
struct Weights {
    numbers: Vec<u8>,
    rows: Option<Vec<f32>>,
    blocks: Vec<f32>,
    n: usize,
    k: usize,
}

impl Weights {
    fn new(random: &mut Random, n: usize, k: usize, by_rows: bool) -> Weights {
        let blocks = if by_rows { Vec::new() } else { scales(random, ops::block_scales(n, k)) };
        Weights { numbers: e4m3(random, n * k), rows: by_rows.then(|| scales(random, n)), blocks, n, k }
    }

    fn number(&self, row: usize, at: usize) -> f64 {
        let scale = match &self.rows {
            Some(rows) => rows[row],
            None => self.blocks[at / 128 * (self.n / 8) + row / 8],
        };
        e4m3_to_f64(self.numbers[row * self.k + at]) * f64::from(scale)
    }

    fn linear(&self, device: &Device, bias: Option<&[bf16]>) -> Linear {
        let scales = match &self.rows {
            Some(rows) => Scales::Rows(upload(device, rows).into()),
            None => Scales::Blocks(upload(device, &self.blocks).into()),
        };
        let bias = bias.map(|bias| upload(device, bias).into());
        Linear::fp8(device, upload(device, &self.numbers).into(), scales, bias, self.n, self.k).unwrap()
    }
}

/// A sum and what it may be off by.
#[derive(Clone, Copy)]
struct Sum(f64, f64);

/// x [rows][k] w^T.
fn sums(x: &[bf16], w: &Weights) -> Vec<Sum> {
    let x: Vec<f64> = quantise(x, w.k).iter().map(|(number, scale)| number * scale).collect();
    let w_numbers: Vec<f64> = (0..w.n * w.k).map(|i| w.number(i / w.k, i % w.k)).collect();
    let dot = |a: &[f64], b: &[f64]| {
        let terms = a.iter().zip(b).map(|(a, b)| a * b);
        terms.fold(Sum(0.0, 0.0), |sum, term| Sum(sum.0 + term, sum.1 + term.abs() * LOST))
    };
    x.chunks(w.k).flat_map(|row| w_numbers.chunks(w.k).map(move |column| dot(row, column))).collect()
}

/// `extra`: the bias [n] or the residual [rows][n].
fn truth(x: &[bf16], w: &Weights, epilogue: Epilogue, extra: &[bf16]) -> Vec<Sum> {
    let sums = sums(x, w);
    let added = |(i, sum): (usize, &Sum)| match epilogue {
        Epilogue::Bias => Sum(sum.0 + extra[i % w.n].to_f64(), sum.1),
        Epilogue::Residual => Sum(round(sum.0) + extra[i].to_f64(), sum.1 + sum.0.abs() / 128.0),
        _ => *sum,
    };
    if epilogue != Epilogue::Silu {
        return sums.iter().enumerate().map(added).collect();
    }
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let product = |(gate, up): (&Sum, &Sum)| {
        let lost = 1.1 * gate.1 * (up.0.abs() + up.1) + silu(gate.0).abs() * up.1;
        Sum(silu(gate.0) * up.0, lost)
    };
    sums.chunks(16).flat_map(|block| block[..8].iter().zip(&block[8..]).map(product)).collect()
}

fn check(got: &[bf16], truth: &[Sum], what: &str) {
    assert_eq!(got.len(), truth.len());
    for (i, (got, Sum(want, lost))) in got.iter().zip(truth).enumerate() {
        let off = (got.to_f64() - want).abs();
        assert!(off <= lost + want.abs() / 128.0, "{what}: {i}: {got}, but {want} is right, give or take {lost}");
    }
}

/// What `launch` leaves in `c`, which holds `before`: the same when it is replayed, overlapping its predecessor.
fn run(device: &Device, launches: &[Launch], c: &Buffer, before: &[bf16], what: &str) -> Vec<bf16> {
    let once = || {
        device.upload(c, 0, bytemuck::cast_slice(before)).unwrap();
        device.begin_capture().unwrap();
        launches.iter().for_each(|launch| device.launch(launch).unwrap());
        device.replay(&device.end_capture().unwrap()).unwrap();
        download::<bf16>(device, c)
    };
    let first = once();
    assert!(first == once(), "{what}: a replay gives other bits");
    first
}

// ---- what makes fp8 ----

fn check_quantised(numbers: &[u8], scales: &[f32], stride: usize, x: &[bf16], k: usize, what: &str) {
    for (i, (number, scale)) in quantise(x, k).into_iter().enumerate() {
        let (row, at) = (i / k, i % k);
        let (got, got_scale) = (e4m3_to_f64(numbers[i]), f64::from(scales[at / 128 * stride + row]));
        assert_eq!(got, number, "{what}: row {row}, {at}: {} with scale {scale}", x[i]);
        assert!((got_scale - scale).abs() <= scale * 1e-6, "{what}: row {row}, {at}: scale {got_scale}, not {scale}");
    }
}

#[test]
fn activations_become_fp8_by_groups() {
    for device in devices() {
        let mut random = Random(1);
        for k in [64, 128, 192, 1088, 8192, 9216] {
            let x = values(&mut random, 3, k);
            let out = Quantised::new(&device, 3, k).unwrap();
            device.launch(&ops::quantise(&upload(&device, &x), k, 3, &out)).unwrap();
            let (numbers, scales) = out.buffers();
            let what = format!("{}, k {k}", device.describe());
            check_quantised(&download(&device, numbers), &download(&device, scales), 256, &x, k, &what);
        }
    }
}

/// What the norm makes is exact where each row has one magnitude, a power of two.
#[test]
fn the_norm_makes_fp8() {
    for device in devices() {
        let mut random = Random(2);
        for hidden in [64, 192, 1088, 8192] {
            let weight = values(&mut random, 1, hidden);
            let signs: Vec<f32> = (0..3 * hidden).map(|_| [-1.0, 1.0][random.below(2) as usize]).collect();
            let scaled = |i: usize| bf16::from_f32(signs[i] * [0.25, 1.0, 8.0][i / hidden]);
            let x: Vec<bf16> = (0..3 * hidden).map(scaled).collect();
            let normed: Vec<bf16> =
                (0..3 * hidden).map(|i| bf16::from_f32(signs[i] * weight[i % hidden].to_f32())).collect();
            let norm = Norm { weight: upload(&device, &weight).into(), eps: 0.0 };
            let out = Quantised::new(&device, 3, hidden).unwrap();
            device.launch(&ops::rms_norm_fp8(&upload(&device, &x), &norm, 3, &out)).unwrap();
            let (numbers, scales) = out.buffers();
            let what = format!("{}, hidden {hidden}", device.describe());
            check_quantised(&download(&device, numbers), &download(&device, scales), 256, &normed, hidden, &what);
        }
    }
}

#[test]
fn weights_become_fp8_by_rows() {
    for device in devices() {
        let mut random = Random(3);
        for k in [64, 1088] {
            let w = values(&mut random, 5, k);
            let (out, scales) = (device.alloc(5 * k).unwrap(), device.alloc(5 * 4).unwrap());
            device.launch(&ops::quantise_weight(&upload(&device, &w), 5, k, &out, &scales)).unwrap();
            let (out, scales) = (download::<u8>(&device, &out), download::<f32>(&device, &scales));
            for (row, w) in w.chunks(k).enumerate() {
                let most = w.iter().fold(0f32, |most, x| most.max(x.to_f32().abs()));
                assert!((scales[row] - most / 448.0).abs() <= scales[row] * 1e-6);
                for (at, w) in w.iter().enumerate() {
                    let want = round_e4m3(f64::from(w.to_f32() * (448.0 / most)));
                    assert_eq!(e4m3_to_f64(out[row * k + at]), want, "row {row}, {at}");
                }
            }
        }
    }
}

/// A NaN stays one, so that a model that has gone wrong is found out.
#[test]
fn nan_and_infinity_are_not_hidden() {
    for device in devices() {
        for bad in [bf16::NAN, bf16::INFINITY] {
            let mut x = vec![bf16::ONE; 256];
            x[130] = bad;
            let out = Quantised::new(&device, 1, 256).unwrap();
            device.launch(&ops::quantise(&upload(&device, &x), 256, 1, &out)).unwrap();
            let numbers: Vec<u8> = download(&device, out.buffers().0);
            assert!(e4m3_to_f64(numbers[130]).is_nan(), "{bad}");
            assert!(numbers[..128].iter().all(|&x| e4m3_to_f64(x) == 448.0), "the other group is as it was");
        }
    }
}

// ---- prefill ----

const EPILOGUES: [Epilogue; 4] = [Epilogue::Plain, Epilogue::Bias, Epilogue::Residual, Epilogue::Silu];

fn gemm(
    device: &Device,
    random: &mut Random,
    [rows, n, k]: [usize; 3],
    epilogue: Epilogue,
    tiling: Tiling,
    by_rows: bool,
) {
    let what = format!("{}, {epilogue:?} of {rows} x {n} x {k}, {tiling:?}, by rows: {by_rows}", device.describe());
    let (x, w) = (values(random, rows, k), Weights::new(random, n, k, by_rows));
    let extra = values(random, if epilogue == Epilogue::Residual { rows } else { 1 }, n);
    let bias = (epilogue == Epilogue::Bias).then_some(extra.as_slice());
    let linear = w.linear(device, bias);
    let quantised = Quantised::new(device, rows as u32, k).unwrap();
    let width = if epilogue == Epilogue::Silu { n / 2 } else { n };
    let c = device.alloc(rows * width * 2).unwrap();
    let (kind, before) = match epilogue {
        Epilogue::Residual => (ops::Epilogue::Residual, extra.clone()),
        Epilogue::Silu => (ops::Epilogue::Silu, vec![bf16::NAN; rows * width]),
        _ => (ops::Epilogue::Plain, vec![bf16::NAN; rows * width]),
    };
    let x_buffer = upload(device, &x);
    let operand = Operand::Fp8(&quantised);
    let launches = [
        ops::quantise(&x_buffer, k, rows as u32, &quantised),
        ops::gemm_tiled(device, operand, &linear, rows as u32, kind, &c, tiling).unwrap(),
    ];
    check(&run(device, &launches, &c, &before, &what), &truth(&x, &w, epilogue, &extra), &what);
}

#[test]
fn gemm_is_right_for_every_kernel_and_odd_sizes() {
    let sizes = [[1, 64, 64], [7, 192, 192], [64, 128, 320], [129, 448, 64], [200, 64, 448], [257, 256, 128]];
    for device in devices() {
        let mut random = Random(4);
        let mut next = 0;
        for epilogue in EPILOGUES {
            let columns = if epilogue == Epilogue::Silu { &[128, 192][..] } else { &[96, 128, 192] };
            for (columns, cluster) in columns.iter().flat_map(|&columns| [(columns, 1), (columns, 2)]) {
                gemm(&device, &mut random, sizes[next % 6], epilogue, Tiling { columns, cluster }, next % 2 == 0);
                next += 1;
            }
        }
    }
}

#[test]
fn gemm_walks_over_many_tiles() {
    let device = devices().remove(0);
    let mut random = Random(5);
    for (epilogue, columns, cluster) in
        [(Epilogue::Residual, 96, 2), (Epilogue::Silu, 192, 1), (Epilogue::Bias, 128, 2)]
    {
        let tiling = Tiling { columns, cluster };
        assert!(tiling.groups(Product { rows: 700, n: 576, k: 96 }) > device.processors());
        for by_rows in [false, true] {
            gemm(&device, &mut random, [700, 576, 192], epilogue, tiling, by_rows);
        }
    }
}

// ---- decode ----

/// Leaves in the workspace the sums of squares of x [rows][k]: a product that adds nothing to it.
pub fn sum_squares(device: &Device, x: &Buffer, rows: u32, k: usize, workspace: &Workspace) {
    let zero = Arc::new(upload(device, &vec![bf16::ZERO; k * 64]));
    let zero = Linear::new(device, zero, None, k, 64).unwrap();
    let ones = upload(device, &vec![bf16::ONE; rows as usize * 64]);
    let adds = ops::gemv(device, Input::Plain(&ones), &zero, rows, Output::Residual(x), workspace).unwrap();
    device.launch(&adds).unwrap();
}

/// As `the_norm_makes_fp8` has it: x [rows][k] whose norm is exact, and the norm.
fn normed(random: &mut Random, rows: usize, weight: &[bf16]) -> (Vec<bf16>, Vec<bf16>) {
    let k = weight.len();
    let signs: Vec<f32> = (0..rows * k).map(|_| [-1.0, 1.0][random.below(2) as usize]).collect();
    let x = (0..rows * k).map(|i| bf16::from_f32(signs[i] * [0.25, 1.0, 8.0][i / k % 3]));
    let normed = (0..rows * k).map(|i| bf16::from_f32(signs[i] * weight[i % k].to_f32()));
    (x.collect(), normed.collect())
}

/// The launches of a product of x [rows][k] or, with a norm, of what it makes of x, whose squares are in the workspace. `room` is
/// for x in e4m3.
fn product(
    device: &Device,
    (x, norm, room): (&Buffer, Option<&Norm>, &Quantised),
    w: &Linear,
    rows: u32,
    output: Output,
    workspace: &Workspace,
) -> Vec<Launch> {
    let gemv = |input: Input| ops::gemv(device, input, w, rows, output, workspace).unwrap();
    if !ops::gemv_reads_fp8(w, rows) {
        return vec![gemv(norm.map_or(Input::Plain(x), |norm| Input::Normed(x, norm)))];
    }
    let before = match norm {
        Some(norm) => ops::rms_norm_summed_fp8(x, norm, rows, room, workspace),
        None => ops::quantise(x, w.k(), rows, room),
    };
    vec![before, gemv(Input::Fp8(room))]
}

/// `grid`: blocks, no more than the device has processors.
fn gemv(device: &Device, random: &mut Random, [rows, n, k]: [usize; 3], epilogue: Epilogue, grid: u32, by_rows: bool) {
    let what = format!("{}, {epilogue:?} of {rows} x {n} x {k}, grid {grid}, by rows: {by_rows}", device.describe());
    let w = Weights::new(random, n, k, by_rows);
    let workspace = Workspace::new(device, n, n.max(k), HEADS, None).unwrap();
    let adds = epilogue == Epilogue::Residual;
    let extra = values(random, if adds { rows } else { 1 }, n);
    let linear = w.linear(device, (epilogue == Epilogue::Bias).then_some(&extra));
    let norm = values(random, 1, k);
    let (x, seen) = match adds {
        true => {
            let x = values(random, rows, k);
            (x.clone(), x)
        }
        false => normed(random, rows, &norm),
    };
    let (x, norm) = (upload(device, &x), Norm { weight: upload(device, &norm).into(), eps: 0.0 });
    if !adds {
        sum_squares(device, &x, rows as u32, k, &workspace);
    }
    let width = if epilogue == Epilogue::Silu { n / 2 } else { n };
    let c = device.alloc(rows * width * 2).unwrap();
    let output = match epilogue {
        Epilogue::Residual => Output::Residual(&c),
        Epilogue::Silu => Output::Silu(&c),
        _ => Output::Matrix(&c),
    };
    let room = Quantised::new(device, rows as u32, k).unwrap();
    let input = (&x, (!adds).then_some(&norm), &room);
    let mut launches = product(device, input, &linear, rows as u32, output, &workspace);
    let blocks = &mut launches.last_mut().expect("the product").grid[0];
    *blocks = grid.min(*blocks);
    let before = if adds { extra.clone() } else { vec![bf16::NAN; rows * width] };
    check(&run(device, &launches, &c, &before, &what), &truth(&seen, &w, epilogue, &extra), &what);
}

#[test]
fn gemv_is_right_for_every_batch_and_epilogue() {
    for device in devices() {
        let mut random = Random(6);
        for (i, rows) in [1, 2, 3, 5, 8, 9, 13, 16, 17, 24, 31, 32, 33, 40, 57, 64].into_iter().enumerate() {
            // Each epilogue with each size of kernel.
            let epilogue = EPILOGUES[(i + i / 4) % 4];
            gemv(&device, &mut random, [rows, 192, 704], epilogue, 2, i % 2 == 0);
        }
    }
}

/// Shares that end inside of a tile, tiles cut into two, three and all of their steps; k that ends in either box of a step.
#[test]
fn gemv_sums_cut_tiles() {
    for device in devices() {
        let mut random = Random(7);
        for (i, (n, k, grid)) in
            [(64, 64, 1), (64, 192, 1), (128, 704, 3), (192, 1024, 4), (64, 1088, 4), (320, 320, 3), (128, 3968, 2)]
                .into_iter()
                .enumerate()
        {
            for epilogue in EPILOGUES {
                gemv(&device, &mut random, [3, n, k], epilogue, grid, i % 2 == 0);
            }
            gemv(&device, &mut random, [13, n, k], Epilogue::Bias, grid, i % 2 == 1);
        }
        gemv(&device, &mut random, [21, 192, 1024], Epilogue::Residual, 4, false);
        gemv(&device, &mut random, [50, 192, 1024], Epilogue::Residual, 4, false);
        gemv(&device, &mut random, [64, 192, 1088], Epilogue::Silu, 4, true);
    }
}

/// The fused product of q, k and v is, bit for bit, the product alone and then rope_append.
#[test]
fn gemv_rotates_and_appends_as_rope_append_does() {
    let positions = [5, -1, 63, 64, 127, 0, 130];
    for device in devices() {
        let mut random = Random(8);
        for (rows, query, kv, dim) in [(7, 4, 1, 64), (40, 2, 1, 128)] {
            let heads = Heads { query, kv, dim };
            let (n, k) = (heads.columns() as usize, 192);
            let w = Weights::new(&mut random, n, k, false);
            let weight = values(&mut random, 1, k);
            let linear = w.linear(&device, Some(&values(&mut random, 1, n)));
            let (x, norm) =
                (normed(&mut random, rows, &weight).0, Norm { weight: upload(&device, &weight).into(), eps: 0.0 });
            let (x, count) = (upload(&device, &x), rows as u32);
            let workspace = Workspace::new(&device, n, k, heads, None).unwrap();
            sum_squares(&device, &x, count, k, &workspace);
            let slot = upload(&device, &(1..=rows as i32).collect::<Vec<_>>());
            let position = upload(&device, &(0..rows).map(|i| positions[i % 7]).collect::<Vec<i32>>());
            let rows_of = Rows { count, slot: &slot, position: &position };
            let cos_sin: Vec<f32> =
                (0..131 * dim).map(|_| random.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0).collect();
            let cos_sin = upload(&device, &cos_sin);
            let entry = |i: u32| PageEntry { slot: i / 3 + 1, index: i % 3, page: 3 * count - i };
            let entries: Vec<PageEntry> = (0..3 * count).map(entry).collect();
            let run = |fused: bool| {
                let kinds = (KvType::Bf16, [KvScales::default()]);
                let cache = KvCache::new(&device, heads, kinds.0, &kinds.1, 3 * count + 1, count + 1, 3).unwrap();
                cache.set_pages(&device, &entries).unwrap();
                let q = device.alloc(rows * (query * dim) as usize * 2).unwrap();
                let qkv = device.alloc(rows * n * 2).unwrap();
                let pages = cache.layer(0);
                let into = RopeInto { heads, cos_sin: &cos_sin, rows: &rows_of, pages: &pages, q: &q };
                let output = if fused { Output::Rope(&into) } else { Output::Matrix(&qkv) };
                let room = Quantised::new(&device, count, k).unwrap();
                let launches = product(&device, (&x, Some(&norm), &room), &linear, count, output, &workspace);
                launches.iter().for_each(|launch| device.launch(launch).unwrap());
                if !fused {
                    device.launch(&ops::rope_append(&qkv, None, &into)).unwrap();
                }
                [&q, pages.k, pages.v].map(|b| download::<u16>(&device, b))
            };
            assert!(run(true) == run(false), "{}: {rows} rows, {heads:?}", device.describe());
        }
    }
}
