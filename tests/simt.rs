//! The SIMT machine proves itself: every planted bug is found, in every order of the threads, and reported so that a reader
//! knows where and why; its corrected twin passes with the right result. And what an instruction means is what plain Rust
//! computes.

use crate::devices::{download, upload};
use crate::random::Random;
use ponder::device::host::{HostOptions, Order};
use ponder::device::{Device, Launch};
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
    /// Words that the report of the bug holds.
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
                assert!(report.contains(word), "{name}, {options:?}: no {word:?} in: {report}");
            }
        }
    }

    /// With [`T`] words in and out per block; `rounds` of them where a kernel works on several.
    fn prove_words(&self, rounds: usize, truth: impl Fn(&[u32]) -> Vec<u32>) {
        let mut random = Random(7);
        let words: Vec<u32> = (0..self.blocks as usize * rounds * T).map(|_| random.below(1 << 30) as u32).collect();
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
fn accesses_outside_are_found() {
    Planted::new(&SHARED_OUT_OF_BOUNDS, &["thread 127", "writes shared bytes [512,516)", "out of bounds"])
        .prove_words(1, same);
    Planted::new(&GLOBAL_OUT_OF_BOUNDS, &["thread 127", "writes 4 bytes", "outside of all device memory"])
        .prove_words(1, same);
}

#[test]
fn divergence_is_found() {
    Planted::new(&DIVERGENT_SHUFFLE, &["divergent warp", "shuffle (line "])
        .prove_words(1, |words| (0..T).map(|t| words[t ^ 1]).collect());
    Planted::new(&DIVERGENT_SYNC_THREADS, &["deadlock", "64 threads", "sync_threads()"]).prove_words(1, same);
}

fn with_barriers(kernel: &'static ponder::kernels::Kernel<PlantedParams>, cause: &'static [&'static str]) -> Planted {
    Planted { shared_bytes: PLANTED_COPY_SHARED, ..Planted::new(kernel, cause) }
}

#[test]
fn barriers_out_of_step_are_found() {
    with_barriers(&LOST_ARRIVE, &["deadlock", "the mbarrier at shared byte 520"]).prove_words(1, next_thread);
    with_barriers(&TRANSACTION_UNDERFLOW, &["the mbarrier at shared byte 512", "16 bytes more than were expected"])
        .prove_words(1, next_thread);
    with_barriers(&TRANSACTION_OVERFLOW, &["deadlock", "the mbarrier at shared byte 512"]).prove_words(1, next_thread);
}

#[test]
fn copies_out_of_order_are_found() {
    with_barriers(&EARLY_RELEASE, &["race", "bulk_load", "reads"]).prove_words(4, same);
    with_barriers(&MISSING_PROXY_FENCE, &["bulk_store reads shared byte", "no fence_proxy_async()"])
        .prove_words(1, same);
    with_barriers(&OVERWRITTEN_STORE_SOURCE, &["bulk_store", "overwritten before bulk_wait_read()"])
        .prove_words(1, |words| words.to_vec());
}
