//! The CUDA target without a GPU: tests/fake/cuda.c stands in for libcuda and writes down every call. Because a process finds
//! its driver only once, each test runs [`child`] in a process of its own.

use ponder::batch::{Batch, PrefillChunk, Work};
use ponder::checkpoint::Checkpoint;
use ponder::config::ModelConfig;
use ponder::device::{AlignedWords, Device, DeviceChoice, Launch, TensorMapSpec};
use ponder::executor::{BUCKETS, DecodeLoop, Executor, ExecutorOptions};
use ponder::kernels::params::{ROPE_THREADS, RopeParams};
use ponder::kernels::{ALL, ROPE_APPEND_D64};
use ponder::ops::GEMV_ROWS;
use ponder::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The folder of the stand-in for libcuda.so.
fn fake_driver() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
        std::fs::create_dir_all(&folder).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-o"]).arg(folder.join("libcuda.so.1")).arg("tests/fake/cuda.c");
        assert!(cc.status().expect("a C compiler").success());
        folder
    })
}

/// Runs a scenario of [`child`] against the stand-in; its calls, or what it printed after "error: ".
fn run(scenario: &str, environment: &[(&str, &str)]) -> (Vec<String>, Option<String>) {
    let table =
        |k: &&ponder::device::KernelEntry| format!("{} {} {} ", k.name.to_str().unwrap(), k.params_bytes, k.threads);
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["cuda::child", "--exact", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", fake_driver())
        .env("PONDER_FAKE_SCENARIO", scenario)
        .env("FAKE_KERNELS", ALL.iter().map(table).collect::<String>())
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}\n{}", String::from_utf8_lossy(&output.stdout));
    let calls = log.lines().filter_map(|l| l.strip_prefix("cuda: ")).map(String::from).collect();
    (calls, log.lines().find_map(|l| l.strip_prefix("error: ")).map(String::from))
}

fn rope() -> Launch {
    let params = RopeParams { rows: 5, norm_eps: 1.0, ..Default::default() };
    Launch { cluster: 4, shared_bytes: 99, pdl: true, ..ROPE_APPEND_D64.launch([1, 2, 3], params) }
}

/// How the stand-in sums up the params it is given.
fn sum(params: &[AlignedWords]) -> u32 {
    let bytes = params.iter().flat_map(|words| words.0).flat_map(u64::to_ne_bytes);
    bytes.take(size_of::<RopeParams>()).fold(0, |sum: u32, byte| sum.wrapping_mul(31).wrapping_add(byte as u32))
}

#[test]
#[ignore = "run by the other tests of this file, which give it a driver"]
fn child() {
    let Ok(scenario) = std::env::var("PONDER_FAKE_SCENARIO") else { return };
    let device = match Device::open(DeviceChoice::Cuda(0)) {
        Ok(device) => device,
        Err(e) => return eprintln!("error: {e}"),
    };
    match scenario.as_str() {
        "open" => {
            assert_eq!(device.describe(), "Fake GPU (cuda:0)");
            assert_eq!(device.processors(), 132);
        }
        "memory" => {
            let buffer = device.alloc(1000).unwrap();
            assert_eq!(buffer.address() % 1024, 0);
            device.fill(&buffer, 0, 1000, 3).unwrap();
            device.upload(&buffer, 8, &[1, 2]).unwrap();
            let mut bytes = [0; 4];
            device.download(&buffer, 7, &mut bytes).unwrap();
            assert_eq!(bytes, [3, 1, 2, 3]);
            let pinned = device.alloc_pinned(64).unwrap();
            assert_eq!(pinned.pointer::<u8>(), pinned.host());
            // Too much is an error, but not a broken device.
            eprintln!("error: {}", device.alloc(1 << 40).err().unwrap());
            device.synchronize().unwrap();
        }
        "uploads" => {
            const THREADS: usize = 3;
            const ROUNDS: usize = 20;
            let buffer = device.alloc(1 + THREADS * ROUNDS * 50).unwrap();
            device.fill(&buffer, 0, 1, 99).unwrap();
            std::thread::scope(|scope| {
                for thread in 0..THREADS {
                    let (device, buffer) = (&device, &buffer);
                    scope.spawn(move || {
                        let mut uploader = device.uploader(50).unwrap();
                        for round in 0..ROUNDS {
                            let fill = |to: &mut [u8]| {
                                to.fill((thread * ROUNDS + round) as u8);
                                Ok(())
                            };
                            uploader.upload(buffer, 1 + (thread * ROUNDS + round) * 50, 50, fill).unwrap();
                        }
                        let refuse = |_: &mut [u8]| Err(ponder::Error::Usage("a bad file".into()));
                        let error = uploader.upload(buffer, 0, 1, refuse).unwrap_err();
                        assert_eq!(error.to_string(), "a bad file");
                    });
                }
            });
            let mut bytes = vec![0; buffer.bytes()];
            device.download(&buffer, 0, &mut bytes).unwrap();
            let written = (0..THREADS * ROUNDS).flat_map(|i| [i as u8; 50]);
            assert!(bytes.into_iter().eq([99].into_iter().chain(written)));
        }
        "launch" => {
            device.launch(&rope()).unwrap();
            assert_eq!(device.time(&rope()).unwrap(), 2.5e-3);
            let before = Launch { grid: [7, 1, 1], ..rope() };
            assert_eq!(device.time_after(&before, &rope()).unwrap(), 2.5e-3);
        }
        "graph" => {
            device.begin_capture().unwrap();
            device.launch(&rope()).unwrap();
            let graph = device.end_capture().unwrap();
            assert_eq!(graph.launches.len(), 1);
            device.replay(&graph).unwrap();
            device.replay(&graph).unwrap();
        }
        "loop" => {
            assert_eq!(device.begin_loop().unwrap(), 77);
            device.launch(&rope()).unwrap();
            let graph = device.end_capture().unwrap();
            assert!(graph.repeats && graph.launches.len() == 1);
            device.replay(&graph).unwrap();
        }
        "failure" => {
            let first = device.launch(&Launch { grid: [0, 1, 1], ..rope() }).unwrap_err().to_string();
            assert_eq!(device.synchronize().unwrap_err().to_string(), first);
            assert_eq!(device.launch(&rope()).unwrap_err().to_string(), first);
            eprintln!("error: {first}");
        }
        "map" => {
            let (dims, strides, r#box) = ([640, 7], [2, 1280], [64, 8]);
            let map = device.tensor_map(&TensorMapSpec { address: 4096, dims, strides, r#box, swizzle: true }).unwrap();
            assert_eq!(map.opaque, [0x0707_0707_0707_0707; 16]);
        }
        "model" => {
            let mut executor = executor(&device, DecodeLoop::Step);
            let chunk = PrefillChunk { slot: 1, tokens: vec![300; 20], position: 0, last: true, scoring: None };
            executor.submit(&Batch { work: Work::Prefill(vec![chunk]), ..Default::default() }).unwrap();
            for slots in [vec![1], vec![1, 2, 3]] {
                executor.submit(&Batch { work: Work::Decode { slots, steps: 1 }, ..Default::default() }).unwrap();
            }
            assert_eq!(executor.in_flight(), 3);
        }
        "several" | "device loop" => {
            let loops = scenario == "device loop";
            let mut executor = executor(&device, if loops { DecodeLoop::Device } else { DecodeLoop::Multi });
            let most = executor.decode_steps();
            assert_eq!(most, if loops { 32 } else { 4 });
            let mut submit = |steps, wait| {
                executor.submit(&Batch { work: Work::Decode { slots: vec![1], steps }, ..Default::default() }).unwrap();
                assert_eq!(executor.is_looping(), loops && steps > 1);
                if wait && loops {
                    // Nothing has run, and the stand-in says that all is over.
                    executor.break_in();
                    assert_eq!(executor.wait().unwrap(), None);
                    assert!(!executor.is_looping() && executor.in_flight() == 0);
                }
            };
            submit(1, false);
            submit(most, true);
            submit(3, true);
        }
        _ => unreachable!(),
    }
}

fn executor(device: &Device, decode_loop: DecodeLoop) -> Executor {
    let folder = Path::new(crate::modulo::FOLDER);
    let config = ModelConfig::load(folder).unwrap();
    let traits = Tokenizer::load(folder, config.vocab_size).unwrap().traits();
    let checkpoint = Checkpoint::open(folder).unwrap();
    let options = ExecutorOptions { decode_loop, ..Default::default() };
    Executor::new(device, &config, (&checkpoint).into(), &traits, &options, &mut |_, _| {}).unwrap()
}

/// Several steps are what one step is, so often, each kernel with programmatic dependence on the one before; a loop's body is
/// one step and the kernel that ends it. To the last byte of the params.
#[test]
fn loops_are_made_of_the_same_steps() {
    let launches = |calls: &[String]| -> Vec<String> {
        let launches = calls.iter().filter(|c| c.starts_with("launch ") && *c != "launch graph");
        launches.inspect(|l| assert!(l.contains("attribute 6 = 1"), "{l}")).cloned().collect()
    };
    for scenario in ["several", "device loop"] {
        let calls = run(scenario, &[("FAKE_FREE", "1000000000")]).0;
        let mut captures = Vec::new();
        let mut rest = &calls[..];
        while let Some(begin) = rest.iter().position(|c| c.starts_with("begin capture")) {
            let end = rest.iter().position(|c| c == "end capture").unwrap();
            captures.push(launches(&rest[begin..end]));
            rest = &rest[end + 1..];
        }
        assert_eq!(captures.len(), 2 * BUCKETS.len());
        for (bucket, pair) in BUCKETS.iter().zip(captures.chunks(2)) {
            let (one, many) = (&pair[0], &pair[1]);
            assert!(one.len() > 8 && one.last().unwrap().starts_with("launch sample"));
            if scenario == "several" {
                assert_eq!(*many, vec![one.clone(); 4].concat(), "{bucket} rows");
            } else {
                let (last, step) = many.split_last().unwrap();
                assert_eq!(step, one, "{bucket} rows");
                assert!(last.starts_with("launch decode_loop grid 1 1 1 block 32 shared 0"), "{last}");
            }
        }
        let replays: Vec<&str> = calls.iter().filter(|c| c.starts_with("launch graph")).map(|c| &c[..]).collect();
        // One step, then as many as one launch has, then three: none of those is launched alone where there is a loop.
        let wanted = if scenario == "several" { 1 + 1 + 3 } else { 1 + 1 + 1 };
        assert_eq!(replays.len(), wanted, "{replays:?}");
    }
}

#[test]
fn a_loop_is_the_body_of_a_conditional_node() {
    let calls = run("loop", &[]).0;
    let from = calls.iter().position(|c| c == "create graph").unwrap();
    let before = [
        "create graph",
        "create condition, at launch 1, flags 1",
        "add conditional node, kind 1, 1 body, after 0 nodes",
        "begin capture of the body after 0 nodes, mode 1",
    ];
    assert_eq!(calls[from..][..4], before);
    assert!(calls[from + 4].starts_with("launch rope_append_d64"));
    let after = ["end capture", "instantiate graph 0x7", "destroy graph 0x7", "upload graph", "launch graph"];
    assert_eq!(calls[from + 5..][..5], after);
}

/// The launches of a model: decode steps are captured, one graph for each bucket, and only replayed from then on; a prefill is
/// launched kernel by kernel. Every kernel may start before its predecessor ends.
#[test]
fn a_model_is_captured_at_the_start_and_replayed() {
    let calls = run("model", &[("FAKE_FREE", "1000000000")]).0;
    let kernels = |calls: &[String]| -> Vec<String> {
        let launches = calls.iter().filter_map(|c| c.strip_prefix("launch ").filter(|c| *c != "graph"));
        launches
            .inspect(|l| assert!(l.contains("attribute 6 = 1"), "{l}"))
            .map(|l| l.split(' ').next().unwrap().into())
            .collect()
    };
    let mut rest = &calls[..];
    for bucket in BUCKETS {
        let begin = rest.iter().position(|c| c.starts_with("begin capture")).unwrap();
        let end = rest.iter().position(|c| c == "end capture").unwrap();
        let m = GEMV_ROWS.into_iter().find(|&rows| bucket <= rows).unwrap();
        let of_layer = ["gemv_norm_rope", "attn_decode", "gemv_residual", "gemv_norm_silu", "gemv_residual"];
        let sized =
            |name: &&str| if *name == "attn_decode" { "attn_decode_d64".into() } else { format!("{name}_m{m}") };
        let layer: Vec<String> = of_layer.iter().map(sized).collect();
        let mut wanted = vec!["embed".to_string()];
        wanted.extend((0..4).flat_map(|_| layer.clone()));
        wanted.extend(["rms_norm", &format!("gemv_logits_m{m}"), "sample"].map(String::from));
        assert_eq!(kernels(&rest[begin..end]), wanted, "{bucket} rows");
        rest = &rest[end + 1..];
    }
    let prefill = kernels(rest);
    let layer = "rms_norm gemm_bias_n96 rope_append_d64 attn_prefill_d64 gemm_residual_n96 rms_norm gemm_silu_n128 gemm_residual_n96";
    assert_eq!(prefill.join(" "), ["embed", layer, layer, layer, layer, "rms_norm gemv_logits_m8 sample"].join(" "));
    assert_eq!(rest.iter().filter(|c| *c == "launch graph").count(), 2);
}

#[test]
fn kernels_are_loaded_at_the_start() {
    let (calls, error) = run("open", &[]);
    assert_eq!(error, None);
    // That of a loop waits for the first one.
    for kernel in ALL.iter().filter(|k| k.name.to_bytes() != b"decode_loop") {
        let name = kernel.name.to_str().unwrap();
        // All the shared memory of an SM but the kernel's static kilobyte.
        assert!(calls.contains(&format!("{name} attribute 8 = 231424")), "{calls:?}");
        assert!(calls.contains(&format!("{name} loaded")), "{calls:?}");
    }
}

#[test]
fn what_cannot_run_is_refused() {
    for (environment, says) in [
        (("FAKE_VERSION", "12040"), "the NVIDIA driver is for CUDA 12.4: 13.0 is needed"),
        (("FAKE_CAPABILITY", "89"), "cuda:0 is a Fake GPU of compute capability 8.9: the kernels need 9.0"),
        (("FAKE_KERNELS", "gemm 8 32"), "is in no cubin: build again"),
    ] {
        let error = run("open", &[environment]).1.unwrap();
        assert!(error.contains(says), "{error}");
    }
    let first = ALL[0].name.to_str().unwrap();
    for (bytes, threads) in [(ALL[0].params_bytes + 8, ALL[0].threads), (ALL[0].params_bytes, ALL[0].threads + 32)] {
        let error = run("open", &[("FAKE_KERNELS", &format!("{first} {bytes} {threads}"))]).1.unwrap();
        assert!(error.contains(first) && error.contains("build again"), "{error}");
    }
}

#[test]
fn memory_is_aligned_cached_and_given_back() {
    let (calls, error) = run("memory", &[]);
    assert!(error.unwrap().contains("has 1000 of 2000 bytes of memory free, and 1099511627776 more are needed"));
    // Mapped and portable, not write-combined.
    let host = calls.iter().position(|c| c == "allocate 64 host bytes, flags 3").unwrap();
    assert_eq!(calls[host + 1..], ["synchronize", "synchronize", "free host", "free", "destroy stream"]);
}

/// Each thread fills page-locked memory of its own, a pair that takes turns, and no faster than it is copied: the stand-in copies
/// as late as it can.
#[test]
fn threads_upload_through_staging_memory() {
    let calls = run("uploads", &[]).0;
    let count = |call: &str| calls.iter().filter(|c| *c == call).count();
    assert_eq!(count("allocate 50 host bytes, flags 3"), 3 * 2);
    assert_eq!(count("copy 50 bytes"), 3 * 20);
    assert_eq!((count("free host"), count("destroy event")), (3 * 2, 3 * 2));
}

#[test]
fn a_launch_reaches_the_driver_whole() {
    let calls = run("launch", &[]).0;
    let launch = |pdl: u32| {
        let (threads, sum) = (ROPE_THREADS, sum(&rope().params));
        format!(
            "launch rope_append_d64 grid 1 2 3 block {threads} shared 99 attribute 4 = 4 attribute 6 = {pdl} params {sum}"
        )
    };
    let from = calls.iter().position(|c| c.starts_with("launch")).unwrap();
    assert_eq!(calls[from], launch(1));
    let timed = ["record event", &launch(0), "record event", "synchronize"];
    assert_eq!(calls[from + 1], "synchronize");
    assert_eq!(calls[from + 2..][..4], timed);
    // Behind another launch: nothing waits between that and the events.
    let before = calls.iter().position(|c| c.starts_with("launch rope_append_d64 grid 7 1 1")).unwrap();
    assert_eq!(calls[before - 1], "synchronize");
    assert_eq!(calls[before + 1..][..4], timed);
}

#[test]
fn a_step_is_captured_once_and_replayed() {
    let calls = run("graph", &[]).0;
    let from = calls.iter().position(|c| c == "begin capture, mode 1").unwrap();
    assert!(calls[from + 1].starts_with("launch rope_append_d64"));
    let rest =
        ["end capture", "instantiate graph 0x5", "destroy graph 0x5", "upload graph", "launch graph", "launch graph"];
    assert_eq!(calls[from + 2..][..6], rest);
    assert_eq!(calls[from + 8..], ["destroy executable graph", "destroy stream"]);
}

#[test]
fn the_first_error_is_final() {
    let (calls, error) = run("failure", &[]);
    assert!(error.unwrap().starts_with("CUDA cuLaunchKernelEx failed: rope_append_d64, grid [0, 1, 1]"));
    assert_eq!(calls.iter().filter(|c| c.starts_with("launch")).count(), 1);
}

#[test]
fn tensor_maps_are_bf16_and_swizzled() {
    let map = "tensor map of type 9, rank 2, dims 640 7, stride 1280, box 64 8, element strides 1 1, swizzle 3";
    assert!(run("map", &[]).0.iter().any(|c| c == map));
}
