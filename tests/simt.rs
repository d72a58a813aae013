//! The SIMT machine proves itself: every planted bug is found, in every order of the threads, and reported so that a reader
//! knows where and why; its corrected twin passes with the right result. And what an instruction means is what plain Rust
//! computes.

use crate::devices::{download, upload};
use crate::random::Random;
use half::bf16;
use ponder::device::host::{HostOptions, Order};
use ponder::device::{Buffer, Device, Launch, TensorMapSpec};
use ponder::kernels::planted::abi::*;
use ponder::kernels::planted::*;

const T: usize = PLANTED_THREADS as usize;

/// Every access checked; the threads in both fixed orders and in five random ones.
fn hostile() -> Vec<HostOptions> {
    let random = (1..=5).map(|seed| HostOptions::checked(Order::Random, seed));
    [HostOptions::checked(Order::Ascending, 1), HostOptions::checked(Order::Descending, 1)]
        .into_iter()
        .chain(random)
        .collect()
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
fn copies_out_of_order_are_found() {
    let cause = &["reads shared byte|which thread", "bulk_load|which nothing has written yet"];
    with_barriers(&MISSING_MBARRIER_WAIT, cause).prove_words(1, next_thread);
    Planted::new(&MISSING_CP_ASYNC_WAIT, &["reads shared byte|which thread", "cp_async|an asynchronous copy"])
        .prove_words(1, next_thread);
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
