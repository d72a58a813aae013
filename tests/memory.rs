//! The memory plan: exact where buffers are made, and what does not fit is refused before anything is allocated.

use crate::modulo;
use ponder::checkpoint::Checkpoint;
use ponder::config::ModelConfig;
use ponder::device::Device;
use ponder::device::host::HostOptions;
use ponder::executor::{DecodeLoop, ExecutorOptions, MemoryPlan};
use ponder::frontend::Frontend;
use ponder::model::Weights;
use ponder::thinking::ThinkingChoice;
use ponder::{Engine, Error};
use std::path::Path;

/// A prime number of everything, so that no size is another's by chance.
#[test]
fn what_is_planned_is_allocated() {
    let default = ExecutorOptions { pages: Some(29), ..Default::default() };
    let cases = [
        default.clone(),
        ExecutorOptions { max_slots: 5, prefill_chunk: 37, max_context: Some(300), ..default.clone() },
        ExecutorOptions { deterministic: true, decode_loop: DecodeLoop::Device, ..default.clone() },
        ExecutorOptions { quantize: true, prefill_chunk: 37, ..default.clone() },
        ExecutorOptions { pages: None, kv_memory: Some(5 << 20), graphs: false, ..default },
    ];
    for options in cases {
        let mut frontend = Frontend::open(Path::new(modulo::FOLDER), &ThinkingChoice::Auto).unwrap();
        let checkpoint = Checkpoint::open(Path::new(modulo::FOLDER)).unwrap();
        frontend.config.weight_types = Weights::from(&checkpoint).types(&frontend.config, options.quantize).unwrap();
        let device = Device::host(HostOptions::default());
        let plan = MemoryPlan::new(&device, &frontend.config, &options).unwrap();
        let engine = Engine::new(frontend, (&checkpoint).into(), &device, &options, &mut |_, _| {}).unwrap();
        assert_eq!(device.allocated(), plan.bytes(), "{options:?}: {plan:?}");
        assert_eq!(engine.context(), plan.context);
        let graphs = options.graphs.then_some(0);
        assert_eq!(*engine.memory(), MemoryPlan { graphs, free: engine.memory().free, ..plan }, "kept to");
        drop(engine);
        assert_eq!(device.allocated(), 0, "given back");
    }
}

#[test]
fn what_fits_is_known_before() {
    let config = ModelConfig::load(Path::new("benches/models/qwen2.5-32b")).unwrap();
    let plan = |options: ExecutorOptions| {
        let device = Device::open("sim:h100".parse().unwrap()).unwrap();
        MemoryPlan::new(&device, &config, &options)
    };
    let utilization = |f| ExecutorOptions { memory_utilization: Some(f), ..Default::default() };
    let page = |plan: &MemoryPlan| plan.kv_cache / u64::from(plan.pages);
    let all: u64 = 80 << 30;
    for f in [0.9, 1.0] {
        let plan = plan(utilization(f)).unwrap();
        let usable = (all as f64 * f) as u64;
        // But for one page, and for tables that a shorter context makes smaller.
        assert!(plan.bytes() <= usable && plan.bytes() + page(&plan) + (64 << 20) > usable, "{plan:?}");
    }
    let problem = plan(utilization(0.5)).unwrap_err().to_string();
    assert!(problem.contains("not enough memory") && problem.contains("40960.0 MiB can be had"), "{problem}");

    let kv = |bytes| ExecutorOptions { kv_memory: Some(bytes), ..Default::default() };
    let small = plan(kv(3 << 30)).unwrap();
    assert!(small.kv_cache <= 3 << 30 && small.kv_cache + page(&small) > 3 << 30, "{small:?}");
    assert_eq!(small.context, (small.pages - 1) * 64);
    assert!(matches!(plan(kv(1 << 20)), Err(Error::Usage(problem)) if problem.contains("--kv-memory")));
    let problem = plan(kv(40 << 30)).unwrap_err().to_string();
    assert!(problem.contains("not enough memory") && problem.contains("--kv-memory"), "{problem}");
}
