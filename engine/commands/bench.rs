//! `ponder bench`: measures kernels or a whole model, prints a table and writes JSON.

use super::output::Printer;
use crate::args::{
    BenchArgs, BenchCommand, BudgetBenchArgs, HostBenchArgs, KernelBenchArgs, LatencyArgs, LoadArgs, LoadBenchArgs,
    PerplexityArgs, ServeBenchArgs, ThroughputArgs,
};
use crate::bench::kernels::{self, Measurement};
use crate::bench::load::{self, Load};
use crate::bench::serve::{self, Arrival};
use crate::bench::{Report, Roofline, budget, host, loading, perplexity};
use crate::chat::Message;
use crate::config::ModelConfig;
use crate::device::Device;
use crate::executor::ExecutorOptions;
use crate::frontend::Frontend;
use crate::kernels::params::{MAX_DECODE_ROWS, PAGE_TOKENS};
use crate::thinking::ThinkingChoice;
use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

pub fn run(args: &BenchArgs) -> Result<()> {
    match &args.command {
        BenchCommand::Kernels(args) => kernels(args),
        BenchCommand::Host(args) => host_work(args),
        BenchCommand::Load(args) => load_weights(args),
        BenchCommand::Budget(args) => thinking_budget(args),
        BenchCommand::Perplexity(args) => text_perplexity(args),
        BenchCommand::Latency(args) => latency(args),
        BenchCommand::Throughput(args) => throughput(args),
        BenchCommand::Serve(args) => serve(args),
    }
}

fn kernels(args: &KernelBenchArgs) -> Result<()> {
    let device = Device::open(args.device.parse()?)?;
    let options = kernels::Options {
        shapes: args.shapes.clone(),
        filter: args.filter.clone(),
        all_tiles: args.all_tiles,
        seconds: args.seconds,
    };
    let mut printer = Printer::new();
    let mut heading = Some(format!("{}\n{}\n", device.describe(), Measurement::heading()));
    kernels::run(&device, &options, &mut |results| {
        printer.write(&heading.take().unwrap_or_default())?;
        printer.write(&(results.last().expect("called after each").line() + "\n"))?;
        // Each time, so that a run that is cut short leaves what it has.
        args.json.as_ref().map_or(Ok(()), |path| Report::new("ponder-bench-kernels", &device, results).save(path))
    })
}

fn host_work(args: &HostBenchArgs) -> Result<()> {
    let mut printer = Printer::new();
    let device = Device::open("sim:h100,fp8,instant".parse()?)?;
    printer.write(&format!("{}\n{}\n", device.describe(), host::Measurement::heading()))?;
    let mut results = Vec::new();
    for &sequences in &args.sequences {
        let frontend = match args.path.join("tokenizer.json").exists() {
            true => Frontend::open(&args.path, &ThinkingChoice::Auto)?,
            false => Frontend::without_text(&args.path)?,
        };
        let options = ExecutorOptions { max_slots: sequences + 1, ..ExecutorOptions::default() };
        let mut engine = super::load(frontend, None, &device, &options)?;
        let measurement = host::run(&mut engine, sequences, args.steps)?;
        printer.write(&(measurement.line() + "\n"))?;
        results.push(measurement);
    }
    let report = Report::new("ponder-bench-host", &device, results);
    args.json.as_ref().map_or(Ok(()), |path| report.save(path))
}

fn load_weights(args: &LoadBenchArgs) -> Result<()> {
    let config = ModelConfig::load(&args.path)?;
    let device = Device::open(args.device.parse()?)?;
    let measured = super::with_loading_bar(|progress| loading::run(&args.path, &config, &device, progress))?;
    let peak = measured.peak_resident_bytes.map(|bytes| format!("; at most {:.2} GB of memory", bytes as f64 / 1e9));
    Printer::new().write(&format!(
        "{}\n{:.2} GB of {} in {:.2} s, {:.2} GB/s{}\n",
        device.describe(),
        measured.bytes as f64 / 1e9,
        args.path.display(),
        measured.seconds,
        measured.bytes_per_second / 1e9,
        peak.unwrap_or_default()
    ))?;
    let mut report = Report::new("ponder-bench-load", &device, measured);
    report.args = Some(json!({"model": args.path}));
    args.json.as_ref().map_or(Ok(()), |path| report.save(path))
}

fn thinking_budget(args: &BudgetBenchArgs) -> Result<()> {
    let (frontend, checkpoint, device) = super::open(&args.model)?;
    let prompt = frontend.encode_chat(&[Message::new("user", &args.question)])?;
    let mut engine = super::load(frontend, checkpoint.as_ref(), &device, &super::options(&args.model))?;
    let mut printer = Printer::new();
    printer.write(&format!("{}\n{}\n", device.describe(), budget::Measurement::heading()))?;
    let mut results = Vec::new();
    for &n_ignore in &args.n_ignore {
        let measurement = budget::run(&mut engine, &prompt, n_ignore)?;
        printer.write(&(measurement.line() + "\n"))?;
        results.push(measurement);
    }
    let mut report = Report::new("ponder-bench-budget", &device, results);
    let decode_loop = args.model.source.decode_loop.name();
    report.args = Some(json!({"model": args.model.source.path, "question": args.question, "decode_loop": decode_loop}));
    args.json.as_ref().map_or(Ok(()), |path| report.save(path))
}

fn text_perplexity(args: &PerplexityArgs) -> Result<()> {
    let text = std::fs::read_to_string(&args.file).map_err(|e| Error::io(&args.file, e))?;
    let (frontend, checkpoint, device) = super::open(&args.model)?;
    let tokens = frontend.tokenizer.encode(&text)?;
    let mut engine = super::load(frontend, checkpoint.as_ref(), &device, &super::options(&args.model))?;
    let context = args.context.unwrap_or(2048.min(engine.context() as usize - 1));
    let stride = args.stride.unwrap_or(context / 2);
    let bar = ProgressBar::with_draw_target(Some(tokens.len() as u64), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("judging {bar:40} {pos} of {len} tokens, {per_sec}, {eta} left");
    bar.set_style(style.expect("a valid template"));
    let measured = perplexity::run(&mut engine, &tokens, context, stride, &mut |judged| bar.set_position(judged))?;
    bar.finish_and_clear();
    let mut printer = Printer::new();
    printer.write(&format!(
        "{}\n{} tokens of {}, in windows of {context}, {stride} apart\nperplexity {:.4} +- {:.4}, {:.4} bits per byte; {:.1} s\n",
        device.describe(),
        measured.tokens,
        args.file.display(),
        measured.perplexity,
        measured.standard_error,
        measured.bits_per_byte,
        measured.seconds
    ))?;
    let mut report = Report::new("ponder-bench-perplexity", &device, measured);
    report.args =
        Some(json!({"model": args.model.source.path, "file": args.file, "context": context, "stride": stride}));
    args.json.as_ref().map_or(Ok(()), |path| report.save(path))
}

fn latency(args: &LatencyArgs) -> Result<()> {
    if args.batch > MAX_DECODE_ROWS {
        return Err(Error::Usage(format!("--batch {}: {MAX_DECODE_ROWS} at most fit into one step", args.batch)));
    }
    measure("ponder-bench-latency", "batch", args.batch, &args.load)
}

fn throughput(args: &ThroughputArgs) -> Result<()> {
    measure("ponder-bench-throughput", "requests", args.requests, &args.load)
}

fn usage<T>(argument: &str, parsed: std::result::Result<T, String>) -> Result<T> {
    parsed.map_err(|problem| Error::Usage(format!("{argument}: {problem}")))
}

fn serve(args: &ServeBenchArgs) -> Result<()> {
    let count = args.requests as usize;
    let (rate, shape, range) = (args.request_rate, args.burstiness, args.range_ratio);
    if !shape.is_finite() {
        return Err(Error::Usage("--burstiness inf: write a number".into()));
    }
    let load = serve::Load {
        server: usage("URL", args.server.parse::<serve::Server>())?.with_key(args.api_key.clone()),
        model: args.served_model.clone(),
        chat: args.chat,
        arrivals: match &args.trace {
            Some(path) => Arrival::trace(path, count)?,
            None => Arrival::random(count, rate, shape, args.input_tokens, args.output_tokens, range, args.seed),
        },
        max_concurrency: args.max_concurrency.map(|n| n as usize),
        warmup: args.warmup as usize,
        extra_body: args.extra_body.clone(),
        goals: args.goodput.iter().map(|goal| usage("--goodput", goal.parse())).collect::<Result<_>>()?,
        seed: args.seed,
    };
    let bar = ProgressBar::with_draw_target(Some(load.arrivals.len() as u64), ProgressDrawTarget::stderr());
    let (load, answers, seconds) = serve::run(load, {
        let bar = bar.clone();
        move |done| bar.set_position(done as u64)
    })?;
    bar.finish_and_clear();
    let summary = serve::Summary::new(&load, rate, shape, &answers, seconds);
    Printer::new().write(&summary.table())?;
    args.json.as_ref().map_or(Ok(()), |path| crate::bench::save(path, &summary))
}

/// `what` there are `requests` of, in the words of the flags.
fn measure(schema: &'static str, what: &str, requests: u32, args: &LoadArgs) -> Result<()> {
    let frontend = Frontend::without_text(&args.model.path)?;
    let checkpoint = super::checkpoint(&args.model)?;
    let device = Device::open(args.model.device.parse()?)?;
    // Just as much room as these requests need, and the page for each that the scheduler keeps back.
    let length = args.input_tokens + args.output_tokens;
    let rows = requests.min(MAX_DECODE_ROWS);
    let options = ExecutorOptions {
        max_context: Some(length),
        pages: Some(rows * (length.div_ceil(PAGE_TOKENS) + 1)),
        kv_type: super::kv_type(&args.model),
        quantize: args.model.quantize.is_some(),
        graphs: !args.model.no_graphs,
        prefill_chunk: args.model.prefill_chunk,
        decode_loop: super::decode_loop(&args.model),
        ..ExecutorOptions::default()
    };
    let mut engine = super::load(frontend, checkpoint.as_ref(), &device, &options)?;
    let load = Load {
        requests,
        input_tokens: args.input_tokens,
        output_tokens: args.output_tokens,
        iterations: args.iterations,
        warmup: args.warmup,
    };
    let telemetry = super::telemetry(&args.model, &device);
    let outcome = load::run(&mut engine, &load, rows, Roofline::of(&device), telemetry.as_ref())?;
    Printer::new().write(&format!(
        "{}\n{}: {requests} x {} prompt tokens, {} output tokens\n\n{}",
        device.describe(),
        args.model.path.display(),
        args.input_tokens,
        args.output_tokens,
        outcome.table()
    ))?;
    let mut report = Report::new(schema, &device, outcome);
    report.args = Some(json!({
        "model": args.model.path,
        "load_format": args.model.load_format.name(),
        "decode_loop": args.model.decode_loop.name(),
        what: requests,
        "input_tokens": args.input_tokens,
        "output_tokens": args.output_tokens,
        "iterations": args.iterations,
        "warmup": args.warmup,
    }));
    args.json.as_ref().map_or(Ok(()), |path| report.save(path))
}
