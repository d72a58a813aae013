//! The SIMT machine proves itself: every planted bug is found, in every order of the threads, and reported so that a reader
//! knows where and why; its corrected twin passes with the right result. And what an instruction means is what plain Rust
//! computes.

use crate::devices::{download, upload};
use crate::random::Random;
use crate::reference::e4m3_to_f64;
use half::bf16;
use ponder::device::host::{HostOptions, Order};
use ponder::device::{Buffer, Device, Launch, TensorMapSpec};
use ponder::kernels::RMS_NORM;
use ponder::kernels::params::{NORM_SHARED, NormParams};
use ponder::kernels::planted::abi::*;
use ponder::kernels::planted::*;

const T: usize = PLANTED_THREADS as usize;

/// Every access checked; the threads in both fixed orders and in five random ones. With the address sanitizer the plain
/// kernels run, because those are what it is compiled into.
fn hostile() -> Vec<HostOptions> {
    let checked = |order, seed| HostOptions { checked: !cfg!(feature = "asan"), ..HostOptions::checked(order, seed) };
    let random = (1..=5).map(|seed| checked(Order::Random, seed));
    [checked(Order::Ascending, 1), checked(Order::Descending, 1)].into_iter().chain(random).collect()
}

/// A bug and its corrected twin.
struct Planted {
    kernel: &'static ponder::kernels::Kernel<PlantedParams>,
    blocks: u32,
    cluster: u32,
    shared_bytes: u32,
    /// Words that the report of the bug holds; with a bar between them, one of several.
    cause: &'static [&'static str],
}

impl Planted {
    fn new(kernel: &'static ponder::kernels::Kernel<PlantedParams>, cause: &'static [&'static str]) -> Planted {
        Planted { kernel, blocks: 1, cluster: 1, shared_bytes: PLANTED_SHARED, cause }
    }

    fn launch(&self, params: PlantedParams) -> Launch {
        Launch {
            cluster: self.cluster,
            shared_bytes: self.shared_bytes,
            ..self.kernel.launch([self.blocks, 1, 1], params)
        }
    }

    /// Runs both under every order: `run` launches and gives what came out, which of the twin is `truth`.
    fn prove<Out: PartialEq + std::fmt::Debug>(
        &self,
        truth: &Out,
        run: impl Fn(&Device, &dyn Fn(PlantedParams) -> Launch) -> ponder::Result<Out>,
    ) {
        for options in hostile() {
            let launch = |planted| move |params| self.launch(PlantedParams { planted, ..params });
            let fixed = run(&Device::host(options), &launch(0));
            let name = self.launch(PlantedParams::default()).kernel.name.to_str().unwrap();
            match fixed {
                Ok(out) => assert_eq!(out, *truth, "{name}, {options:?}"),
                Err(e) => panic!("the corrected {name}, {options:?}: {e}"),
            }
            if !options.checked {
                continue;
            }
            let Err(report) = run(&Device::host(options), &launch(1)) else {
                panic!("{name}, {options:?}: the planted bug is not found");
            };
            let report = report.to_string();
            for word in [&format!("kernel {name}"), "block (", "thread "].into_iter().chain(self.cause.iter().copied())
            {
                assert!(word.split('|').any(|w| report.contains(w)), "{name}, {options:?}: no {word:?} in: {report}");
            }
        }
    }

    /// With [`T`] words in and out per block; `rounds` of them where a kernel works on several.
    fn prove_words(&self, rounds: usize, truth: impl Fn(&[u32]) -> Vec<u32>) {
        let mut random = Random(7);
        let words: Vec<u32> = (0..self.blocks as usize * rounds * T).map(|_| random.below(1 << 30)).collect();
        self.prove(&truth(&words), |device, launch| {
            let (input, out, counter) =
                (upload(device, &words), upload(device, &vec![0u32; words.len()]), upload(device, &[0u32]));
            let params = PlantedParams {
                input: input.pointer(),
                out: out.pointer(),
                counter: counter.pointer(),
                ..Default::default()
            };
            device.launch(&launch(params))?;
            device.synchronize()?;
            Ok(download::<u32>(device, &out))
        });
    }
}

fn next_thread(words: &[u32]) -> Vec<u32> {
    (0..words.len()).map(|t| words[(t + 1) % T]).collect()
}

fn same(words: &[u32]) -> Vec<u32> {
    words.to_vec()
}

#[test]
fn races_are_found() {
    let race = &["race", "shared byte", "with no barrier in between"];
    Planted::new(&MISSING_SYNC_THREADS, race).prove_words(1, next_thread);
    Planted::new(&SHARED_RACE, race).prove_words(1, |words| {
        (0..T).map(|t| (t % 8..T).step_by(8).fold(0, |sum: u32, s| sum.wrapping_add(words[s]))).collect()
    });
}

#[test]
fn races_between_blocks_are_found() {
    let race = &["race", "wrote|reads", "with no barrier or fence in between"];
    let planted = Planted { blocks: 5, ..Planted::new(&GLOBAL_RACE, race) };
    planted.prove_words(1, |words| (0..words.len()).map(|i| if i == 0 { 5 } else { 0 }).collect());
    let planted = Planted { blocks: 2, ..Planted::new(&FLAG_WITHOUT_FENCE, race) };
    planted.prove_words(1, |words| words[..T].iter().copied().chain(words[..T].iter().map(|x| x + 1)).collect());
}

/// Memory that no launch has written is nobody's, in whichever launch: more of them than the checker can tell apart.
#[test]
fn what_nobody_wrote_races_with_nobody() {
    let device = Device::host(hostile()[0]);
    let (x, weight) = (upload(&device, &[bf16::ONE; 128]), upload(&device, &[bf16::ONE; 64]));
    let out = upload(&device, &[bf16::ZERO; 128]);
    let (x, weight, to) = (x.pointer(), weight.pointer(), out.pointer());
    let params = NormParams { x, weight, out: to, rows: 2, hidden: 64, eps: 0.0, ..Default::default() };
    let launch = Launch { shared_bytes: NORM_SHARED, ..RMS_NORM.launch([2, 1, 1], params) };
    for _ in 0..2100 {
        device.launch(&launch).unwrap();
    }
    assert_eq!(download::<bf16>(&device, &out), [bf16::ONE; 128]);
}

#[test]
fn accesses_outside_are_found() {
    Planted::new(&SHARED_OUT_OF_BOUNDS, &["thread 127", "writes shared bytes [512,516)", "out of bounds"])
        .prove_words(1, same);
    Planted::new(&GLOBAL_OUT_OF_BOUNDS, &["thread 127", "writes 4 bytes", "outside of all device memory"])
        .prove_words(1, same);
}

#[test]
fn uninitialised_shared_memory_is_found() {
    Planted::new(&UNINITIALISED_SHARED, &["reads shared byte", "which nothing has written yet"])
        .prove_words(1, next_thread);
}

/// A block of a cluster must outlive its peers' accesses to its shared memory.
#[test]
fn an_early_exit_is_found() {
    let exchange = |words: &[u32]| [&words[T..], &words[..T]].concat();
    let planted = Planted { blocks: 2, cluster: 2, ..Planted::new(&EARLY_EXIT, &["exit", "shared memory"]) };
    planted.prove_words(1, exchange);
}

/// The second of two launches that may overlap reads what the first writes.
#[test]
fn a_read_before_the_wait_for_the_launch_before_is_found() {
    let words: Vec<u32> = (0..T as u32).collect();
    let cause = &["reads 4 bytes", "which an earlier launch has written, before pdl_wait()"];
    Planted::new(&READ_BEFORE_PDL_WAIT, cause).prove(&words, |device, launch| {
        let buffers = [upload(device, &words), upload(device, &words), upload(device, &words)];
        let copy = |from: usize, to: usize| PlantedParams {
            input: buffers[from].pointer(),
            out: buffers[to].pointer(),
            ..Default::default()
        };
        device.launch(&launch(copy(0, 1)))?;
        device.launch(&Launch { pdl: true, ..launch(copy(1, 2)) })?;
        device.synchronize()?;
        Ok(download::<u32>(device, &buffers[2]))
    });
}

/// The third launch reads what the first has written, which has completed if the second lets it start only behind its wait.
#[test]
fn a_launch_of_dependents_before_the_wait_is_found() {
    let words: Vec<u32> = (0..T as u32).collect();
    let cause = &["reads 4 bytes", "which an earlier launch has written, before pdl_wait()"];
    Planted::new(&LAUNCH_DEPENDENTS_BEFORE_PDL_WAIT, cause).prove(&words, |device, launch| {
        let buffers = [0; 4].map(|_| upload(device, &words));
        for (i, (from, to)) in [(0, 1), (0, 2), (1, 3)].into_iter().enumerate() {
            let params =
                PlantedParams { input: buffers[from].pointer(), out: buffers[to].pointer(), ..Default::default() };
            device.launch(&Launch { pdl: i > 0, ..launch(params) })?;
        }
        device.synchronize()?;
        Ok(download::<u32>(device, &buffers[3]))
    });
}

#[test]
fn divergence_is_found() {
    Planted::new(&PARTIAL_SETMAXNREG, &["setmaxnreg is for whole warpgroups", "threads 0 and 64"]).prove_words(1, same);
    Planted::new(&DIVERGENT_SHUFFLE, &["divergent warp", "shuffle (line "])
        .prove_words(1, |words| (0..T).map(|t| words[t ^ 1]).collect());
    Planted::new(
        &DIVERGENT_SYNC_THREADS,
        &["deadlock", "64 threads", "sync_threads(), where 64 of 128", "have exited"],
    )
    .prove_words(1, same);
}

fn with_barriers(kernel: &'static ponder::kernels::Kernel<PlantedParams>, cause: &'static [&'static str]) -> Planted {
    Planted { shared_bytes: PLANTED_COPY_SHARED, ..Planted::new(kernel, cause) }
}

#[test]
fn barriers_out_of_step_are_found() {
    with_barriers(&LOST_ARRIVE, &["deadlock", "the mbarrier at shared byte 520", "1 of 128 arrivals"])
        .prove_words(1, next_thread);
    with_barriers(&TRANSACTION_UNDERFLOW, &["the mbarrier at shared byte 512", "16 bytes more than were expected"])
        .prove_words(1, next_thread);
    let cause = &["deadlock", "the mbarrier at shared byte 512", "0 of 1 arrivals and 16 bytes are missing"];
    with_barriers(&TRANSACTION_OVERFLOW, cause).prove_words(1, next_thread);
}

#[test]
fn a_deadlock_says_who_waits_for_what() {
    let cause = &[
        "32 threads (first: block (0,0,0), thread 0) wait for the mbarrier at shared byte 520, phase 0: 128 of 128 arrivals",
        "32 threads (first: block (0,0,0), thread 32) wait for named barrier 3, where 32 of 64 threads are",
        "20 threads (first: block (0,0,0), thread 64) wait for sync_warp (line ",
        "44 threads (first: block (0,0,0), thread 84) wait for the cluster barrier",
    ];
    with_barriers(&EVERYBODY_WAITS, cause).prove_words(1, same);
}

#[test]
fn copies_out_of_order_are_found() {
    let cause = &["reads shared byte|which thread", "bulk_load|which nothing has written yet"];
    with_barriers(&MISSING_MBARRIER_WAIT, cause).prove_words(1, next_thread);
    Planted::new(&MISSING_CP_ASYNC_WAIT, &["reads shared byte|which thread", "cp_async|an asynchronous copy"])
        .prove_words(1, next_thread);
    with_barriers(&CP_ASYNC_AT_EXIT, &["exits with a cp_async in flight"]).prove_words(1, same);
    with_barriers(&EARLY_RELEASE, &["race", "bulk_load", "reads"]).prove_words(4, same);
    with_barriers(&MISSING_PROXY_FENCE, &["bulk_store reads shared byte", "no fence_proxy_async()"])
        .prove_words(1, same);
    with_barriers(&OVERWRITTEN_STORE_SOURCE, &["bulk_store", "overwritten before bulk_wait_read()"])
        .prove_words(1, |words| words.to_vec());
}

/// A [`TILE`] x [`TILE`] operand of wgmma and the map of its one box.
struct Tile {
    values: Vec<bf16>,
    buffer: Buffer,
    map: TensorMap,
}

const TILE: usize = 64;

/// Small integers, whose products and sums are exact.
fn integers(random: &mut Random, count: usize) -> Vec<bf16> {
    (0..count).map(|_| bf16::from_f32(random.below(17) as f32 - 8.0)).collect()
}

/// bf16 [dims, innermost first], densely; boxes.
fn tensor_map<const RANK: usize>(
    device: &Device,
    buffer: &Buffer,
    dims: [usize; RANK],
    r#box: [usize; RANK],
    swizzle: bool,
) -> TensorMap {
    let mut strides = [2; RANK];
    for i in 1..RANK {
        strides[i] = strides[i - 1] * dims[i - 1] as u64;
    }
    let spec = TensorMapSpec {
        address: buffer.address(),
        dims: dims.map(|d| d as u64),
        strides,
        r#box: r#box.map(|b| b as u32),
        swizzle,
    };
    bytemuck::cast(device.tensor_map(&spec).unwrap())
}

impl Tile {
    fn new(device: &Device, seed: u64) -> Tile {
        let values = integers(&mut Random(seed), TILE * TILE);
        let buffer = upload(device, &values);
        let map = tensor_map(device, &buffer, [TILE, TILE], [TILE, TILE], true);
        Tile { values, buffer, map }
    }
}

/// a b^T for row-major a [m][k] and b [n][k].
fn product(a: &[bf16], b: &[bf16], k: usize) -> Vec<f32> {
    let dot = |a: &[bf16], b: &[bf16]| a.iter().zip(b).map(|(a, b)| a.to_f32() * b.to_f32()).sum();
    a.chunks(k).flat_map(|row| b.chunks(k).map(move |column| dot(row, column))).collect()
}

#[test]
fn wgmma_out_of_order_is_found() {
    let prove = |kernel, times: f32, cause| {
        let device = Device::host(HostOptions::default());
        let (a, b) = (Tile::new(&device, 1), Tile::new(&device, 2));
        let truth: Vec<f32> = product(&a.values, &b.values, TILE).iter().map(|x| x * times).collect();
        let planted = Planted { shared_bytes: PLANTED_WGMMA_SHARED, ..Planted::new(kernel, cause) };
        planted.prove(&truth, |device, launch| {
            let (a, b, out) = (Tile::new(device, 1), Tile::new(device, 2), device.alloc(TILE * TILE * 4)?);
            let params = PlantedParams {
                map: a.map,
                other_map: b.map,
                input: a.buffer.pointer(),
                out: out.pointer(),
                ..Default::default()
            };
            device.launch(&launch(params))?;
            device.synchronize()?;
            Ok(download::<f32>(device, &out))
        });
    };
    prove(&MISSING_WGMMA_WAIT, 1.0, &["accumulators of a wgmma in flight are read before wgmma_wait()"]);
    prove(&OVERWRITTEN_A_REGISTERS, 1.0, &["registers of A of a wgmma in flight are overwritten before wgmma_wait()"]);
    prove(&WRONG_SWIZZLE, 1.0, &["wgmma: operand B is read with swizzle 0", "wrote it with swizzle 1"]);
    prove(&WRONG_STRIDE, 1.0, &["wgmma: operand A", "stride 512", "wrong stride"]);
    prove(&UNFENCED_OPERAND, 1.0, &["wgmma reads shared byte", "no fence_proxy_async()"]);
    prove(&RELEASE_BEFORE_WGMMA_WAIT, 2.0, &["race", "tma_load", "a wgmma in flight"]);
}

// ---- what instructions mean ----

/// Every order with checks, and the machine as it serves.
fn everywhere() -> impl Iterator<Item = Device> {
    hostile().into_iter().chain([HostOptions::default()]).map(Device::host)
}

/// Launches `blocks` blocks, in clusters of `cluster`, and waits.
fn run(
    device: &Device,
    kernel: &'static ponder::kernels::Kernel<PlantedParams>,
    [blocks, cluster]: [u32; 2],
    params: PlantedParams,
) {
    let launch = Launch { cluster, shared_bytes: MEANING_SHARED, ..kernel.launch([blocks, 1, 1], params) };
    device.launch(&launch).unwrap();
    device.synchronize().unwrap();
}

fn random_words(seed: u64, count: usize) -> Vec<u32> {
    let mut random = Random(seed);
    (0..count).map(|_| random.below(1 << 31) * 2 + random.below(2)).collect()
}

/// A box of a tensor: dimensions, the box's size and where it begins, innermost first.
struct BoxCase {
    dims: Vec<usize>,
    r#box: Vec<usize>,
    at: Vec<i32>,
    swizzle: bool,
}

impl BoxCase {
    fn all() -> Vec<BoxCase> {
        let case = |dims: &[usize], r#box: &[usize], at: &[i32], swizzle| BoxCase {
            dims: dims.into(),
            r#box: r#box.into(),
            at: at.into(),
            swizzle,
        };
        vec![
            case(&[200], &[64], &[16], false),
            case(&[200], &[64], &[170], false),
            case(&[200], &[64], &[-16], true),
            case(&[72, 9], &[24, 4], &[3, 2], false),
            case(&[72, 9], &[64, 16], &[0, 0], true),
            case(&[72, 9], &[64, 16], &[16, -5], true),
            case(&[40, 7, 3], &[16, 3, 2], &[32, 5, 2], false),
            case(&[136, 7, 3], &[64, 5, 2], &[120, -1, 0], true),
            case(&[64, 3, 4, 2], &[64, 2, 3, 2], &[0, 1, 2, 0], true),
            case(&[48, 3, 4, 2], &[8, 3, 2, 2], &[-8, -1, -1, -1], false),
            case(&[48, 3, 4, 2], &[16, 3, 2, 2], &[41, 1, 3, 1], false),
        ]
    }

    fn bytes(&self) -> usize {
        self.r#box.iter().product::<usize>() * 2
    }

    /// For every element of the box: its index in shared memory, and in the tensor if it lies inside.
    fn elements(&self) -> Vec<(usize, Option<usize>)> {
        let place = |element: usize| {
            let (mut rest, mut index, mut step) = (element, Some(0), 1);
            for ((&dim, &size), &at) in self.dims.iter().zip(&self.r#box).zip(&self.at) {
                let coordinate = at + (rest % size) as i32;
                let inside = coordinate >= 0 && coordinate < dim as i32;
                index = index.filter(|_| inside).map(|i| i + coordinate as usize * step);
                (rest, step) = (rest / size, step * dim);
            }
            let byte = element * 2;
            let swizzled = if self.swizzle { byte ^ ((byte >> 7 & 7) << 4) } else { byte };
            (swizzled / 2, index)
        };
        (0..self.bytes() / 2).map(place).collect()
    }

    fn params(&self, device: &Device, tensor: &Buffer) -> PlantedParams {
        fn map<const RANK: usize>(device: &Device, tensor: &Buffer, case: &BoxCase) -> TensorMap {
            let [dims, r#box] = [&case.dims, &case.r#box].map(|v| v[..].try_into().unwrap());
            tensor_map::<RANK>(device, tensor, dims, r#box, case.swizzle)
        }
        let rank = self.dims.len();
        let map = [map::<1>, map::<2>, map::<3>, map::<4>][rank - 1](device, tensor, self);
        let mut coordinates = [0; 4];
        coordinates[..rank].copy_from_slice(&self.at);
        PlantedParams { map, mode: rank as i32, bytes: self.bytes() as i32, coordinates, ..Default::default() }
    }

    fn describe(&self) -> String {
        format!("box {:?} at {:?} of {:?}, swizzle {}", self.r#box, self.at, self.dims, self.swizzle)
    }
}

#[test]
fn tensor_loads_clip_and_swizzle() {
    for case in BoxCase::all() {
        let tensor: Vec<u16> = (1..=case.dims.iter().product::<usize>() as u16).collect();
        let mut truth = vec![0u16; case.bytes() / 2];
        for (to, from) in case.elements() {
            truth[to] = from.map_or(0, |i| tensor[i]);
        }
        for device in everywhere() {
            let (buffer, out) = (upload(&device, &tensor), device.alloc(case.bytes()).unwrap());
            run(&device, &LOAD_BOX, [1, 1], PlantedParams { out: out.pointer(), ..case.params(&device, &buffer) });
            assert_eq!(download::<u16>(&device, &out), truth, "{}", case.describe());
        }
    }
}

#[test]
fn tensor_stores_clip_and_swizzle() {
    for case in BoxCase::all() {
        let image: Vec<u16> = (1..=case.bytes() as u16 / 2).collect();
        let mut truth = vec![0u16; case.dims.iter().product()];
        for (from, to) in case.elements() {
            if let Some(to) = to {
                truth[to] = image[from];
            }
        }
        for device in everywhere() {
            let (input, out) = (upload(&device, &image), upload(&device, &vec![0u16; truth.len()]));
            let params = PlantedParams { input: input.pointer(), ..case.params(&device, &out) };
            run(&device, &STORE_BOX, [1, 1], params);
            assert_eq!(download::<u16>(&device, &out), truth, "{}", case.describe());
        }
    }
}

/// One block over some words.
fn transform(
    device: &Device,
    kernel: &'static ponder::kernels::Kernel<PlantedParams>,
    input: &[u32],
    out_words: usize,
    params: PlantedParams,
) -> Vec<u32> {
    let (input, out) = (upload(device, input), device.alloc(out_words * 4).unwrap());
    run(device, kernel, [1, 1], PlantedParams { input: input.pointer(), out: out.pointer(), ..params });
    download(device, &out)
}

/// Lane l holds, of matrix i, elements (l / 4, 2 (l % 4)) and the next one in register i.
#[test]
fn matrices_lie_in_fragments() {
    let words = random_words(21, 128);
    let values: &[u16] = bytemuck::cast_slice(&words);
    for mode in 0..4 {
        let mut truth = vec![0u16; 256];
        for (lane, matrix, half) in (0..256).map(|i| (i / 8, i / 2 % 4, i % 2)) {
            let (row, column) = (lane / 4, 2 * (lane % 4) + half);
            let [row, column] = if mode % 2 == 1 { [column, row] } else { [row, column] };
            let (register, element) = ((lane * 4 + matrix) * 2 + half, matrix * 64 + row * 8 + column);
            let [to, from] = if mode < 2 { [register, element] } else { [element, register] };
            truth[to] = values[from];
        }
        for device in everywhere() {
            let params = PlantedParams { mode, ..Default::default() };
            let out = transform(&device, &MATRIX_FRAGMENTS, &words, 128, params);
            assert_eq!(bytemuck::cast_slice::<u32, u16>(&out), truth, "mode {mode}");
        }
    }
}

fn pair(low: bf16, high: bf16) -> u32 {
    low.to_bits() as u32 | (high.to_bits() as u32) << 16
}

/// Register i of lane l of a 16 x 16 fragment of A that begins at a row and a column of `a` [..][k].
fn a_fragment(a: &[bf16], k: usize, row: usize, column: usize, lane: usize, i: usize) -> u32 {
    let at = (row + lane / 4 + 8 * (i % 2)) * k + column + 2 * (lane % 4) + 8 * (i / 2);
    pair(a[at], a[at + 1])
}

#[test]
fn mma_multiplies_fragments() {
    let mut random = Random(22);
    let (a, b, c) = (integers(&mut random, 16 * 16), integers(&mut random, 8 * 16), integers(&mut random, 16 * 8));
    let place = |lane: usize, i: usize| (lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2;
    let registers = |lane: usize| {
        let a = (0..4).map(move |i| (i, lane)).map(|(i, lane)| a_fragment(&a, 16, 0, 0, lane, i));
        let b = (0..2).map(|i| lane / 4 * 16 + 2 * (lane % 4) + 8 * i).map(|at| pair(b[at], b[at + 1]));
        let c = (0..4).map(|i| c[place(lane, i)].to_f32().to_bits());
        a.chain(b).chain(c).collect::<Vec<_>>()
    };
    let input: Vec<u32> = (0..32).flat_map(registers).collect();
    let sum = product(&a, &b, 16);
    let truth: Vec<f32> = (0..128).map(|r| place(r / 4, r % 4)).map(|at| sum[at] + c[at].to_f32()).collect();
    for device in everywhere() {
        let out = transform(&device, &MMA_FRAGMENTS, &input, 128, PlantedParams::default());
        assert_eq!(out.iter().map(|&x| f32::from_bits(x)).collect::<Vec<_>>(), truth);
    }
}

fn transposed(matrix: &[bf16], columns: usize) -> Vec<bf16> {
    (0..columns).flat_map(|c| matrix.iter().skip(c).step_by(columns).copied()).collect()
}

#[test]
fn wgmma_multiplies_what_its_descriptors_describe() {
    for (kernel, n) in [(&WGMMA_N8, 8), (&WGMMA_N64, 64), (&WGMMA_N96, 96), (&WGMMA_N256, 256)] {
        let mut random = Random(23);
        let (a, b) = (integers(&mut random, TILE * TILE), integers(&mut random, n * TILE));
        let registers: Vec<u32> =
            (0..T * 16).map(|r| a_fragment(&a, TILE, r / 16 / 32 * 16, r / 4 % 4 * 16, r / 16 % 32, r % 4)).collect();
        let sum = product(&a, &b, TILE);
        let place = |thread: usize, i: usize| {
            let (row, column) =
                (thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (thread % 4) + i % 2);
            row * n + column
        };
        let truth: Vec<f32> = (0..T * n / 2).map(|r| 1.0 + sum[place(r / (n / 2), r % (n / 2))]).collect();
        // Bit 0: A from registers; 1: A is [k][m]; 2: B is [k][n].
        for mode in (0..8).filter(|mode| mode & 3 != 3 && (mode & 4 == 0 || n % 64 == 0)) {
            for device in everywhere() {
                let a = upload(&device, &if mode & 2 != 0 { transposed(&a, TILE) } else { a.clone() });
                let map = tensor_map(&device, &a, [TILE, TILE], [TILE, TILE], true);
                let b = upload(&device, &if mode & 4 != 0 { transposed(&b, TILE) } else { b.clone() });
                let other_map = match mode & 4 {
                    0 => tensor_map(&device, &b, [TILE, n], [TILE, n], true),
                    _ => tensor_map(&device, &b, [n, TILE], [TILE, TILE], true),
                };
                let params = PlantedParams { map, other_map, mode, ..Default::default() };
                let out = transform(&device, kernel, &registers, T * n / 2, params);
                assert!(out.iter().map(|&x| f32::from_bits(x)).eq(truth.iter().copied()), "n {n}, mode {mode}");
            }
        }
    }
}

/// e4m3, and that its sums keep 14 bits.
#[test]
fn wgmma_of_e4m3_loses_what_hopper_loses() {
    const K: usize = 128;
    let mut random = Random(29);
    // 0, 1/2, 1, -1, 2, 3: sums of 128 products are multiples of 1/4 below 2^11, which 13 bits hold.
    let numbers = [0, 0x30, 0x38, 0xb8, 0x40, 0x44];
    let mut numbers = |count: usize| (0..count).map(|_| numbers[random.below(6) as usize]).collect::<Vec<u8>>();
    let (mut a, mut b) = (numbers(64 * K), numbers(16 * K));
    // The last row and column: 448 * 448, and in another instruction 1, which is lost.
    for last in [&mut a[63 * K..], &mut b[15 * K..]] {
        last.fill(0);
        (last[5], last[100]) = (0x7e, 0x38);
    }
    let sum = |row: usize, column: usize| {
        (0..K).map(|k| e4m3_to_f64(a[row * K + k]) * e4m3_to_f64(b[column * K + k])).sum::<f64>()
    };
    assert_eq!(sum(63, 15), 448.0 * 448.0 + 1.0);
    for device in everywhere() {
        let (a, b) = (upload(&device, &a), upload(&device, &b));
        let map = tensor_map(&device, &a, [64, 64], [64, 64], true);
        let other_map = tensor_map(&device, &b, [64, 16], [64, 16], true);
        let params = PlantedParams { map, other_map, ..Default::default() };
        let out = transform(&device, &WGMMA_E4M3, &[0], T * 8, params);
        for (r, &bits) in out.iter().enumerate() {
            let (thread, i) = (r / 8, r % 8);
            let row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2);
            let column = 8 * (i / 4) + 2 * (thread % 4) + i % 2;
            let truth = if (row, column) == (63, 15) { 448.0 * 448.0 } else { sum(row, column) };
            assert_eq!(f64::from(f32::from_bits(bits)), truth, "row {row}, column {column}");
        }
    }
}

#[test]
fn clusters_share_memory() {
    let words = random_words(24, T);
    for device in everywhere() {
        for blocks in [1u32, 2, 4, 8] {
            // The map moves 16-bit values, two to a word.
            let (input, out) = (upload(&device, &words), device.alloc(blocks as usize * T * 4).unwrap());
            let map = tensor_map(&device, &input, [64, 4], [64, 4], false);
            let params = PlantedParams { map, out: out.pointer(), ..Default::default() };
            run(&device, &CLUSTER_EXCHANGE, [blocks, blocks], params);
            let from = |rank: u32| (rank + blocks - 1) % blocks;
            let truth: Vec<u32> =
                (0..blocks).flat_map(|rank| words.iter().map(move |w| w.wrapping_add(from(rank)))).collect();
            assert_eq!(download::<u32>(&device, &out), truth, "{blocks} blocks");

            let out = device.alloc(blocks as usize * 4).unwrap();
            let params = PlantedParams { input: input.pointer(), out: out.pointer(), ..Default::default() };
            run(&device, &CLUSTER_ARRIVALS, [blocks, blocks], params);
            assert_eq!(download::<u32>(&device, &out), words[..blocks as usize]);
        }
    }
}

#[test]
fn copies_bring_what_they_are_told() {
    let words = random_words(25, T);
    let complements: Vec<u32> = words.iter().map(|w| !w).collect();
    for device in everywhere() {
        for mode in 0..2 {
            for bytes in [0, 4, 8, 16] {
                let params = PlantedParams { mode, bytes, ..Default::default() };
                let truth: Vec<u32> = (0..T).map(|t| if t as i32 % 4 * 4 < bytes { words[t] } else { 0 }).collect();
                assert_eq!(transform(&device, &CP_ASYNC_COPY, &words, T, params), truth, "mode {mode}, {bytes} bytes");
            }
            let params = PlantedParams { mode, ..Default::default() };
            assert_eq!(transform(&device, &BULK_COPY, &words, T, params), complements, "mode {mode}");
        }
    }
}

#[test]
fn named_barriers_order_their_threads() {
    let words = random_words(26, 256);
    let truth: Vec<u32> = (0..256).map(|i| words[i ^ 1]).collect();
    for device in everywhere() {
        assert_eq!(transform(&device, &NAMED_BARRIERS, &words, 256, PlantedParams::default()), truth);
    }
}

#[test]
fn warps_exchange_and_vote() {
    let words = random_words(27, T);
    let truth = |t: usize| {
        let (warp, lane) = (&words[t / 32 * 32..][..32], t % 32);
        let x = warp[lane];
        let ballot = warp.iter().enumerate().fold(0, |bits, (i, w)| bits | (w & 1) << i);
        [
            warp[lane ^ 5],
            warp[x as usize % 32],
            warp[if lane < 3 { lane } else { lane - 3 }],
            ballot,
            warp.iter().any(|w| w % 64 == 0) as u32,
            warp.iter().all(|w| w % 64 != 0) as u32,
            (warp.iter().map(|w| w % 1024).sum::<u32>() as f32).to_bits(),
            1,
        ]
    };
    let truth: Vec<u32> = (0..T).flat_map(truth).collect();
    for device in everywhere() {
        assert_eq!(transform(&device, &COLLECTIVES, &words, 8 * T, PlantedParams::default()), truth);
    }
}

/// More blocks than there are cores wait for each other: they must all run at once.
#[test]
fn blocks_that_wait_for_each_other_run_together() {
    const BLOCKS: usize = 40;
    let words: Vec<u32> = random_words(28, BLOCKS).iter().map(|w| w % 1000).collect();
    for device in everywhere() {
        let (input, counter) = (upload(&device, &words), upload(&device, &[0u32]));
        let out = device.alloc(2 * BLOCKS * 4).unwrap();
        let params = PlantedParams {
            input: input.pointer(),
            out: out.pointer(),
            counter: counter.pointer(),
            ..Default::default()
        };
        run(&device, &GRID_BARRIER, [BLOCKS as u32, 1], params);
        assert_eq!(download::<u32>(&device, &out)[..BLOCKS], vec![words.iter().sum::<u32>(); BLOCKS]);
    }
}

/// The figures at the head of kernels/simt/machine.cpp. Run with `--ignored --nocapture` on an idle machine.
#[test]
#[ignore = "measures, and asserts nothing"]
fn what_the_machine_itself_costs() {
    let checked = HostOptions::checked(Order::Ascending, 1);
    for (what, options) in [("plain", HostOptions::default()), ("checked", checked)] {
        let device = Device::host(HostOptions { workers: 1, ..options });
        let best = |blocks, rounds| {
            let params = PlantedParams { mode: rounds, ..Default::default() };
            let launch = BARRIERS_ALONE.launch([blocks, 1, 1], params);
            (0..50).map(|_| device.time(&launch).unwrap()).fold(f64::INFINITY, f64::min) * 1e9
        };
        let (launch, blocks, rounds) = (best(1, 0), best(65, 0), best(1, 1001));
        let switch = (rounds - launch) / (1001 * T) as f64;
        let block = (blocks - launch) / 64.0;
        println!(
            "{what}: {switch:.1} ns a switch, {block:.0} ns a block of {T} threads, {launch:.0} ns a launch of one"
        );
    }
}
