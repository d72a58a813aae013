//! `ponder study ablation`: the same requests with one acceleration technique after the other turned off, and where the time of a
//! decode step goes. What a device cannot show is not made up: the host target gives launches, bytes and FLOPs, a simulated GPU
//! the time by its roofline, a GPU the time by the clock.

use super::folder::{Folder, Journal};
use super::plot::{Waterfall, save_waterfall};
use super::random::Random;
use crate::bench::Report;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::device::Device;
use crate::engine::{Engine, RequestId};
use crate::executor::{DecodeLoop, ExecutorOptions, KernelCost, Techniques};
use crate::frontend::{Frontend, Request};
use crate::kernels::params::{MAX_DECODE_ROWS, PAGE_TOKENS};
use crate::model::{Fusion, Weights};
use crate::sampling::SamplingRequest;
use crate::{Error, Result};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// Of an H100 by its data sheet: for the time that bytes and FLOPs need at the least where no device is there to say.
const H100_BYTES_PER_SECOND: f64 = 3.35e12;
const H100_FLOPS_PER_SECOND: f64 = 989e12;

const EVERYTHING_ON: &str = "everything on";
const ROTATION_NOT_FUSED: &str = "rotation not fused";
const NO_PACKED_GQA: &str = "no packed GQA";

/// The work.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Work {
    pub requests: u32,
    pub input_tokens: u32,
    /// How many of them all prompts begin with.
    pub shared_tokens: u32,
    pub output_tokens: u32,
    pub seed: u64,
}

/// A way of doing it.
struct Variant {
    name: &'static str,
    options: ExecutorOptions,
    /// Requests may use what others have computed of the same beginning.
    prefix_cache: bool,
    /// What a simulated GPU knows of.
    simulated: bool,
}

impl Variant {
    /// Its decode steps have other kernels, or other work for them; or it is the one that the others are compared with.
    fn has_own_step(&self) -> bool {
        let of_step = |t: Techniques| (t.fusion, t.split_kv, t.buckets);
        self.name == EVERYTHING_ON || of_step(self.options.techniques) != of_step(Techniques::default())
    }
}

/// What a variant has cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    pub name: String,
    /// Kernels run, in all.
    pub kernels: u64,
    /// Kernels and recorded lists that the host has launched.
    pub launch_calls: u64,
    /// That had to move, and to be computed.
    pub bytes: u64,
    pub flops: u64,
    /// Of the whole work. None on the host target.
    pub seconds: Option<f64>,
    /// A decode step of all requests, the largest share first. Empty on a simulated device, and where it is that of everything on.
    pub step: Vec<Share>,
    /// The answers' tokens, hashed.
    pub tokens: String,
    /// The same as with everything on.
    pub same_tokens: bool,
}

/// A kernel's share of a decode step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Share {
    pub kernel: String,
    pub launches: u64,
    pub bytes: u64,
    pub flops: u64,
    /// On a GPU each kernel alone, by the clock; else what an H100's roofline allows.
    pub seconds: f64,
}

impl Cost {
    /// All kernels of the decode step, if there are any.
    pub fn step_total(&self) -> Option<Share> {
        let total = |of: fn(&Share) -> u64| self.step.iter().map(of).sum();
        (!self.step.is_empty()).then(|| Share {
            kernel: "the step".into(),
            launches: total(|s| s.launches),
            bytes: total(|s| s.bytes),
            flops: total(|s| s.flops),
            seconds: self.step.iter().map(|s| s.seconds).sum(),
        })
    }
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Results {
    pub model: String,
    /// The first with everything on.
    pub variants: Vec<Cost>,
}

/// What is run, and where.
pub struct Subject<'a> {
    pub name: String,
    pub folder: &'a Path,
    pub checkpoint: Option<&'a Checkpoint>,
    pub device: &'a Device,
    pub work: Work,
}

/// Runs every variant that the folder does not know yet, and writes results, report and plots.
///
/// # Errors
/// Work that does not fit, a device that fails, a folder that cannot be written or belongs to another study.
pub fn run(subject: &Subject, folder: &Folder, bar: &ProgressBar) -> Result<Results> {
    let Subject { device, work, .. } = subject;
    if work.shared_tokens >= work.input_tokens {
        let problem = format!("--shared-tokens {}: prompts of {} must differ", work.shared_tokens, work.input_tokens);
        return Err(Error::Usage(problem));
    }
    let settings = json!({"study": "ablation", "model": subject.name, "device": device.describe(), "work": work});
    let (mut journal, known) = Journal::open::<Cost>(&folder.path("answers.jsonl"), &settings)?;
    let mut known: BTreeMap<String, Cost> = known.into_iter().map(|cost| (cost.name.clone(), cost)).collect();
    let simulated = device.simulated().is_some();
    let mut config = ModelConfig::load(subject.folder)?;
    config.weight_types = subject.weights().types(&config, false)?;
    let variants: Vec<Variant> = variants(work, &config).into_iter().filter(|v| v.simulated || !simulated).collect();
    bar.set_length(variants.len() as u64);
    let mut costs = Vec::<Cost>::new();
    for variant in &variants {
        let cost = match known.remove(variant.name) {
            Some(cost) => cost,
            None => {
                let mut cost = subject.cost(variant)?;
                cost.same_tokens = costs.first().is_none_or(|base| base.tokens == cost.tokens);
                journal.append(&cost)?;
                cost
            }
        };
        costs.push(cost);
        bar.inc(1);
    }
    let results = Results { model: subject.name.clone(), variants: costs };
    let mut report = Report::new("ponder-study-ablation", device, results);
    report.args = Some(settings);
    folder.write_results(&report)?;
    plots(&report.results, device, folder)?;
    folder.write("report.md", &markdown(&report, work, device))?;
    Ok(report.results)
}

fn variants(work: &Work, config: &ModelConfig) -> Vec<Variant> {
    let length = work.input_tokens + work.output_tokens;
    let options = || ExecutorOptions {
        max_context: Some(length),
        // And the page for each that the scheduler keeps back.
        pages: Some(work.requests.min(MAX_DECODE_ROWS) * (length.div_ceil(PAGE_TOKENS) + 1)),
        prefill_chunk: 256,
        ..ExecutorOptions::default()
    };
    let variant = |name, options| Variant { name, options, prefix_cache: true, simulated: false };
    let technique = |name, change: fn(&mut Techniques)| {
        let mut options = options();
        change(&mut options.techniques);
        variant(name, options)
    };
    let whole = (work.requests * work.input_tokens).min(1 << 16);
    let all = [
        Variant { simulated: true, ..variant(EVERYTHING_ON, options()) },
        variant("no graph", ExecutorOptions { graphs: false, ..options() }),
        technique("no PDL", |t| t.pdl = false),
        technique("no run-ahead", |t| t.run_ahead = 1),
        technique("norms not fused", |t| t.fusion.norm = false),
        technique(ROTATION_NOT_FUSED, |t| t.fusion.rope = false),
        technique("residual not fused", |t| t.fusion.residual = false),
        technique("silu not fused", |t| t.fusion.silu = false),
        Variant { simulated: true, ..technique(NO_PACKED_GQA, |t| t.fusion.packed_gqa = false) },
        technique("no split-KV", |t| t.split_kv = false),
        technique("no batch buckets", |t| t.buckets = false),
        Variant { prefix_cache: false, simulated: true, ..variant("no prefix cache", options()) },
        Variant {
            simulated: true,
            ..variant("no chunked prefill", ExecutorOptions { prefill_chunk: whole, ..options() })
        },
        variant("four steps a launch", ExecutorOptions { decode_loop: DecodeLoop::Multi, ..options() }),
        variant("loop on the device", ExecutorOptions { decode_loop: DecodeLoop::Device, ..options() }),
    ];
    let can_be_turned_off = |v: &Variant| match v.name {
        // Where norms of heads stand between the product and the rotation, these are never fused.
        ROTATION_NOT_FUSED => !config.qk_norm,
        NO_PACKED_GQA => config.num_heads > config.num_kv_heads,
        _ => true,
    };
    // Products of fp8 weights are fused with the rotation or not; with the others always.
    let has_kernels = |v: &Variant| {
        let Fusion { norm, residual, silu, .. } = v.options.techniques.fusion;
        !config.is_fp8() || (norm && residual && silu)
    };
    all.into_iter().filter(|v| can_be_turned_off(v) && has_kernels(v)).collect()
}

impl Subject<'_> {
    fn weights(&self) -> Weights<'_> {
        self.checkpoint.map_or(Weights::Dummy, Weights::Checkpoint)
    }

    fn engine(&self, options: &ExecutorOptions) -> Result<Engine> {
        Engine::new(Frontend::without_text(self.folder)?, self.weights(), self.device, options, &mut |_, _| {})
    }

    /// All requests, submitted together.
    fn submit(&self, engine: &mut Engine, prefix_cache: bool) -> Result<Vec<RequestId>> {
        let (work, vocab) = (&self.work, engine.frontend.config.vocab_size);
        let mut random = Random::of(work.seed, "shared prompt");
        let shared: Vec<u32> = (0..work.shared_tokens).map(|_| random.below(vocab) as u32).collect();
        (0..work.requests)
            .map(|i| {
                let mut random = Random::of(work.seed, &format!("prompt {i}"));
                let own = (work.shared_tokens..work.input_tokens).map(|_| random.below(vocab) as u32);
                engine.submit(&Request {
                    prompt: shared.iter().copied().chain(own).collect(),
                    max_tokens: Some(work.output_tokens),
                    sampling: SamplingRequest { temperature: Some(0.0), ignore_eos: true, ..Default::default() },
                    // Nothing is shared between tenants.
                    tenant: if prefix_cache { String::new() } else { i.to_string() },
                    ..Default::default()
                })
            })
            .collect()
    }

    fn cost(&self, variant: &Variant) -> Result<Cost> {
        let mut engine = self.engine(&variant.options)?;
        let calls = engine.launch_calls();
        let start = engine.now();
        let mut answers: BTreeMap<RequestId, Vec<u32>> =
            self.submit(&mut engine, variant.prefix_cache)?.into_iter().map(|id| (id, Vec::new())).collect();
        while !engine.is_idle() {
            for update in engine.step()? {
                let answer = answers.get_mut(&update.request).expect("updates are of open requests");
                answer.extend(update.token.map(|t| t.token));
            }
        }
        let seconds = (engine.now() - start).as_secs_f64();
        let calls = engine.launch_calls() - calls;
        drop(engine);
        let (all, step) = match self.device.simulated() {
            Some(_) => Default::default(),
            None => (self.profile(variant)?, if variant.has_own_step() { self.step(variant)? } else { Vec::new() }),
        };
        let tokens: Vec<Vec<u32>> = answers.into_values().collect();
        Ok(Cost {
            name: variant.name.into(),
            kernels: all.launches,
            launch_calls: calls,
            bytes: all.bytes,
            flops: all.flops,
            seconds: (!self.device.is_host()).then_some(seconds),
            step,
            tokens: blake3::hash(serde_json::to_string(&tokens).expect("numbers").as_bytes()).to_hex().to_string(),
            same_tokens: true,
        })
    }

    /// The sum of all kernels of the work.
    fn profile(&self, variant: &Variant) -> Result<KernelCost> {
        let mut engine = self.engine(&ExecutorOptions { profile: true, ..variant.options.clone() })?;
        self.submit(&mut engine, variant.prefix_cache)?;
        while !engine.is_idle() {
            engine.step()?;
        }
        let sum = |a: KernelCost, b: KernelCost| KernelCost {
            launches: a.launches + b.launches,
            seconds: a.seconds + b.seconds,
            bytes: a.bytes + b.bytes,
            flops: a.flops + b.flops,
        };
        Ok(engine.profile().map(|(_, cost)| cost).fold(KernelCost::default(), sum))
    }

    /// The kernels of one decode step of all requests: the one after each has its first token.
    fn step(&self, variant: &Variant) -> Result<Vec<Share>> {
        let mut options = variant.options.clone();
        // So that one step of the engine is one of the model.
        (options.profile, options.techniques.run_ahead) = (true, 1);
        let mut engine = self.engine(&options)?;
        let ids = self.submit(&mut engine, variant.prefix_cache)?;
        let mut begun = 0;
        while begun < ids.len() {
            let first = |u: &crate::engine::Update| u.token.as_ref().is_some_and(|t| t.generated == 1);
            begun += engine.step()?.iter().filter(|u| first(u)).count();
        }
        let before: BTreeMap<&str, KernelCost> = engine.profile().collect();
        engine.step()?;
        let shares = engine.profile().filter_map(|(kernel, after)| {
            let before = before.get(kernel).copied().unwrap_or_default();
            let (bytes, flops) = (after.bytes - before.bytes, after.flops - before.flops);
            let least = (bytes as f64 / H100_BYTES_PER_SECOND).max(flops as f64 / H100_FLOPS_PER_SECOND);
            let seconds = if self.device.is_host() { least } else { after.seconds - before.seconds };
            let launches = after.launches - before.launches;
            (launches > 0).then(|| Share { kernel: kernel.into(), launches, bytes, flops, seconds })
        });
        let mut shares: Vec<Share> = shares.collect();
        shares.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(shares)
    }
}

fn plots(r: &Results, device: &Device, folder: &Folder) -> Result<()> {
    let base = &r.variants[0];
    if let Some(total) = base.step_total() {
        let mut bars = Vec::new();
        let mut at = 0.0;
        for share in &base.step {
            let to = at + share.seconds * 1e6;
            bars.push((share.kernel.clone(), at, to, share_label(share, &total)));
            at = to;
        }
        bars.push((total.kernel.clone(), 0.0, at, share_label(&total, &total)));
        let how = if device.is_host() { "by an H100's roofline" } else { "each kernel alone" };
        let title = format!("A decode step of {}", r.model);
        save_waterfall(&Waterfall { title, x: format!("microseconds, {how}"), bars }, &folder.path("step"))?;
    }
    let bars = r.variants.iter().map(|v| {
        let (length, label) = match (v.seconds, base.seconds) {
            (Some(seconds), Some(of_base)) => {
                (seconds * 1e3, format!("{:.1}{}", seconds * 1e3, change(seconds, of_base)))
            }
            _ => {
                let megabytes = v.bytes as f64 / 1e6;
                let change = change(megabytes, base.bytes as f64 / 1e6);
                (megabytes, format!("{megabytes:.0}{change}, {} kernels, {} launches", v.kernels, v.launch_calls))
            }
        };
        (v.name.clone(), 0.0, length, label)
    });
    let x = if device.is_host() { "megabytes that the whole work moves" } else { "milliseconds of the whole work" };
    let waterfall =
        Waterfall { title: format!("One technique at a time, {}", r.model), x: x.into(), bars: bars.collect() };
    save_waterfall(&waterfall, &folder.path("techniques"))
}

fn share_label(share: &Share, total: &Share) -> String {
    format!("{:.2} us, {:.0} %", share.seconds * 1e6, 100.0 * share.seconds / total.seconds)
}

/// In percent, if there is any that would be seen.
fn change(value: f64, base: f64) -> String {
    let percent = 100.0 * (value / base - 1.0);
    if percent.abs() < 0.05 { String::new() } else { format!(" ({percent:+.1} %)") }
}

fn markdown(report: &Report<Results>, work: &Work, device: &Device) -> String {
    let r = &report.results;
    let base = &r.variants[0];
    let mut text = format!(
        "# What acceleration techniques do for {}\n\n{} requests of {} prompt tokens, of which {} are the same, and {} output tokens; \
         seed {}. Device: {}. Commit: {}. {}.\n\n![techniques](techniques.png)\n\n",
        r.model,
        work.requests,
        work.input_tokens,
        work.shared_tokens,
        work.output_tokens,
        work.seed,
        report.device,
        report.commit,
        report.date
    );
    let cell = |value: Option<f64>, base: Option<f64>, digits: usize| match (value, base) {
        (Some(value), Some(base)) => format!("{value:.digits$}{}", change(value, base)),
        _ => "-".into(),
    };
    let column = |name: &str, digits, of: &dyn Fn(&Cost) -> Option<f64>| -> Vec<String> {
        let cells = r.variants.iter().map(|v| cell(of(v), of(base), digits));
        std::iter::once(name.to_string()).chain(cells).collect()
    };
    // Not counted where no kernel runs.
    let counted = |name: &str, digits, of: &dyn Fn(&Cost) -> f64| {
        column(name, digits, &|cost| (cost.kernels > 0).then(|| of(cost)))
    };
    let of_step =
        |name: &str, digits, of: &dyn Fn(Share) -> f64| column(name, digits, &|cost| cost.step_total().map(of));
    let first = |name: &str, of: &dyn Fn(&Cost) -> String| -> Vec<String> {
        std::iter::once(name.to_string()).chain(r.variants.iter().map(of)).collect()
    };
    let mut columns = vec![
        first("", &|cost| cost.name.clone()),
        counted("kernels", 0, &|cost| cost.kernels as f64),
        counted("launches by the host", 0, &|cost| cost.launch_calls as f64),
        counted("MB", 2, &|cost| cost.bytes as f64 / 1e6),
        counted("GFLOP", 3, &|cost| cost.flops as f64 / 1e9),
        column("ms", 3, &|cost| cost.seconds.map(|s| s * 1e3)),
        of_step("a decode step: kernels", 0, &|step| step.launches as f64),
        of_step("MB of it", 3, &|step| step.bytes as f64 / 1e6),
        of_step("us of it", 3, &|step| step.seconds * 1e6),
        first("same tokens", &|cost| if cost.same_tokens { "yes".into() } else { "**no**".into() }),
    ];
    columns.retain(|column| column[1..].iter().any(|cell| cell != "-"));
    for line in 0..=r.variants.len() {
        let cells: Vec<&str> = columns.iter().map(|column| column[line].as_str()).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
        if line == 0 {
            let _ = writeln!(text, "|{}", "---|".repeat(columns.len()));
        }
    }
    text += match (device.is_host(), device.simulated().is_some()) {
        (true, _) => {
            "\nOn the host target nothing is timed: PDL, run-ahead and split-KV change neither launches nor bytes, and what they are \
             worth only a GPU can say; nor what kernels cost by their number, which is most of what fusing them saves. A dash: the step of \
             everything on.\n"
        }
        (_, true) => {
            "\nSimulated time: bytes and FLOPs by the roofline. Only techniques that change those are listed.\n"
        }
        _ => {
            "\nTime by the clock, from submitting all requests to the last token. A dash: the step of everything on.\n"
        }
    };
    if let Some(total) = base.step_total() {
        let how = match device.is_host() {
            true => "the time that its bytes or FLOPs take at the least on an H100 (3.35 TB/s, 989 TFLOP/s)",
            false => "measured, each kernel alone and with the time of launching it",
        };
        let _ = write!(
            text,
            "\n## A decode step\n\nOf all requests, after their first token, everything on. Time: {how}. `results.json` has the same \
             of each line above with a step of its own.\n\n![step](step.png)\n\n| kernel | launches | MB | GFLOP | us |\n|---|---|---|---|---|\n"
        );
        for s in base.step.iter().chain([&total]) {
            let (bytes, flops) = (s.bytes as f64 / 1e6, s.flops as f64 / 1e9);
            let _ =
                writeln!(text, "| {} | {} | {bytes:.3} | {flops:.4} | {:.3} |", s.kernel, s.launches, s.seconds * 1e6);
        }
    }
    text
}
