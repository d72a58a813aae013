//! The commands of the `ponder` binary: each reads its flags, drives an engine and prints.

mod batch;
mod bench;
mod chat;
mod generate;
mod inspect;
mod output;
mod profile;
mod serve;
mod study;

use crate::args::{Args, Command, DecodeLoopKind, KvCacheDtype, LoadFormat, ModelArgs, SourceArgs};
use crate::checkpoint::Checkpoint;
use crate::device::{Device, DeviceChoice};
use crate::engine::Engine;
use crate::executor::{DecodeLoop, ExecutorOptions};
use crate::frontend::Frontend;
use crate::model::Weights;
use crate::ops::KvType;
use crate::telemetry::Telemetry;
use crate::{Error, Result, hub};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::path::PathBuf;

pub fn run(mut args: Args) -> Result<()> {
    if let Some(source) = args.command.source() {
        source.path = locate(source)?;
    }
    match args.command {
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Batch(args) => batch::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Study(args) => study::run(&args),
    }
}

/// The model's folder, fetched from the hub before if flags say so, with a progress bar if somebody is watching.
fn locate(args: &SourceArgs) -> Result<PathBuf> {
    let bar = bytes_bar("fetching");
    let folder = hub::resolve(&args.path, args.download, shown_by(&bar));
    bar.finish_and_clear();
    folder.map_err(|problem| Error::model(&args.path, problem))
}

fn bytes_bar(what: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = format!("{what} {{bar:40}} {{bytes}} of {{total_bytes}}, {{bytes_per_sec}}");
    bar.with_style(ProgressStyle::with_template(&style).expect("a valid template"))
}

/// Bytes that have come, bytes in all.
fn shown_by(bar: &ProgressBar) -> impl Fn(u64, u64) + Send + Sync + use<> {
    let bar = bar.clone();
    move |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    }
}

/// Everything but the weights: what is wrong with flags, model folder or device is said before they load.
fn open(args: &ModelArgs) -> Result<(Frontend, Option<Checkpoint>, Device)> {
    let choice = args.source.device.parse()?;
    let frontend = Frontend::open(&args.source.path, &args.thinking())?;
    Ok((frontend, checkpoint(&args.source)?, Device::open(choice)?))
}

/// None for dummy weights.
fn checkpoint(args: &SourceArgs) -> Result<Option<Checkpoint>> {
    match args.load_format {
        LoadFormat::Safetensors => Checkpoint::open(&args.path).map(Some),
        LoadFormat::Dummy => Ok(None),
    }
}

/// Loads the weights, with a progress bar if somebody is watching, and says what memory is taken.
fn load(
    frontend: Frontend,
    checkpoint: Option<&Checkpoint>,
    device: &Device,
    options: &ExecutorOptions,
) -> Result<Engine> {
    let weights = checkpoint.map_or(Weights::Dummy, Weights::Checkpoint);
    let engine = with_loading_bar(|progress| Engine::new(frontend, weights, device, options, progress))?;
    let memory = inspect::memory_line(engine.memory());
    if tracing::enabled!(tracing::Level::INFO) {
        tracing::info!("{memory}");
    } else if std::io::stderr().is_terminal() {
        eprintln!("{memory}");
    }
    Ok(engine)
}

/// Bytes loaded and bytes in all, shown while `load` runs.
fn with_loading_bar<T>(load: impl FnOnce(&mut dyn FnMut(u64, u64)) -> Result<T>) -> Result<T> {
    let bar = bytes_bar("loading");
    let loaded = load(&mut shown_by(&bar));
    bar.finish_and_clear();
    loaded
}

fn options(args: &ModelArgs) -> ExecutorOptions {
    let default = ExecutorOptions::default();
    ExecutorOptions {
        max_slots: args.max_sequences.map_or(default.max_slots, |n| n + 1),
        max_context: args.max_context,
        pages: args.kv_pages,
        kv_memory: args.kv_memory,
        kv_type: kv_type(&args.source),
        quantize: args.source.quantize.is_some(),
        memory_utilization: args.gpu_memory_utilization,
        graphs: !args.source.no_graphs,
        prefill_chunk: args.source.prefill_chunk,
        decode_loop: decode_loop(&args.source),
        deterministic: args.deterministic,
        ..default
    }
}

fn kv_type(args: &SourceArgs) -> KvType {
    match args.kv_cache_dtype {
        KvCacheDtype::Auto | KvCacheDtype::Bf16 => KvType::Bf16,
        KvCacheDtype::Fp8 => KvType::Fp8,
    }
}

fn decode_loop(args: &SourceArgs) -> DecodeLoop {
    match args.decode_loop {
        DecodeLoopKind::Step => DecodeLoop::Step,
        DecodeLoopKind::Multi => DecodeLoop::Multi,
        DecodeLoopKind::Device => DecodeLoop::Device,
    }
}

/// What the driver knows of the GPU in use; none on the host target.
fn telemetry(args: &SourceArgs, device: &Device) -> Option<Telemetry> {
    match args.device.parse() {
        Ok(DeviceChoice::Cuda(ordinal)) => Telemetry::open(ordinal),
        _ if device.is_host() || device.simulated().is_some() => None,
        _ => Telemetry::open(0),
    }
}
