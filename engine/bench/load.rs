//! `ponder bench latency` and `ponder bench throughput`: requests of exact lengths through the whole engine, and when each of
//! their tokens came. Prompts are random ids, end of sequence is ignored, drawing is greedy.

use super::{Roofline, percentile};
use crate::config::ModelConfig;
use crate::engine::{Engine, RequestId};
use crate::frontend::Request;
use crate::model;
use crate::ops::KvType;
use crate::sampling::SamplingRequest;
use crate::sequence::FinishReason;
use crate::telemetry::Telemetry;
use crate::{Error, Result};
use serde::Serialize;
use std::collections::BTreeMap;

/// What the engine is given to do.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests, submitted together.
    pub requests: u32,
    pub input_tokens: u32,
    pub output_tokens: u32,
    pub iterations: u32,
    /// Iterations before them that do not count.
    pub warmup: u32,
}

/// Some measurements, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Milliseconds {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub mean: f64,
    pub min: f64,
    pub max: f64,
}

/// What came of it, over all iterations.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// From submission, of each request.
    pub time_to_first_token_ms: Milliseconds,
    /// Between a request's tokens. Where all requests fit into one step, only while all of them decode: from when every one
    /// has its first token until one has its last. None without such a time.
    pub time_per_output_token_ms: Option<Milliseconds>,
    /// Of one iteration, from the submission to the last token: the median iteration.
    pub seconds: f64,
    pub output_tokens_per_second: f64,
    /// Prompts count as well.
    pub total_tokens_per_second: f64,
    /// Of the time until every request has its first token, how much the tensor cores need for the prompts at the least.
    pub prefill_roofline_percent: Option<f64>,
    /// Of the median time per output token, how much memory needs for weights, K and V at the least.
    pub decode_roofline_percent: Option<f64>,
    /// Bytes that such a step reads at the least, half of the answers being there.
    pub decode_step_bytes: u64,
    /// For each token of an answer, prefill included.
    pub joules_per_output_token: Option<f64>,
}

impl Milliseconds {
    /// None without any measurement.
    fn of(mut seconds: Vec<f64>) -> Option<Milliseconds> {
        seconds.sort_by(f64::total_cmp);
        let (&min, &max) = (seconds.first()?, seconds.last()?);
        let mean = seconds.iter().sum::<f64>() / seconds.len() as f64;
        let p = |percent| percentile(&seconds, percent) * 1e3;
        Some(Milliseconds {
            p50: p(50.0),
            p90: p(90.0),
            p99: p(99.0),
            mean: mean * 1e3,
            min: min * 1e3,
            max: max * 1e3,
        })
    }
}

/// Seconds since the submission at which each request's tokens came.
type Timeline = Vec<Vec<f64>>;

/// `rows`: requests in one step.
///
/// # Errors
/// Lengths that the engine has no room for, a device that fails, logits that are not finite.
pub fn run(
    engine: &mut Engine,
    load: &Load,
    rows: u32,
    roofline: Option<Roofline>,
    telemetry: Option<&Telemetry>,
) -> Result<Outcome> {
    for iteration in 0..load.warmup {
        iterate(engine, load, iteration)?;
    }
    let joules = || telemetry.and_then(Telemetry::joules);
    let before = joules();
    let timelines: Vec<Timeline> =
        (0..load.iterations).map(|iteration| iterate(engine, load, load.warmup + iteration)).collect::<Result<_>>()?;
    let joules = joules().zip(before).map(|(after, before)| after - before);
    let kv_type = engine.memory().kv_type;
    Ok(Outcome::new(&engine.frontend.config, load, rows, kv_type, &timelines, roofline, joules))
}

fn iterate(engine: &mut Engine, load: &Load, iteration: u32) -> Result<Timeline> {
    let start = engine.now();
    let mut index = BTreeMap::<RequestId, usize>::new();
    for i in 0..load.requests {
        let seed = iteration as u64 * load.requests as u64 + i as u64;
        let request = Request {
            prompt: prompt(seed, load.input_tokens, engine.frontend.config.vocab_size as u32),
            max_tokens: Some(load.output_tokens),
            sampling: SamplingRequest { temperature: Some(0.0), ignore_eos: true, ..Default::default() },
            ..Default::default()
        };
        index.insert(engine.submit(&request)?, i as usize);
    }
    let mut timeline = vec![Vec::with_capacity(load.output_tokens as usize); load.requests as usize];
    while !engine.is_idle() {
        let updates = engine.step()?;
        let now = (engine.now() - start).as_secs_f64();
        for update in updates {
            if update.finish == Some(FinishReason::Error) {
                return Err(Error::Device("the model's logits are not finite: nothing can be measured with it".into()));
            }
            timeline[index[&update.request]].push(now);
        }
    }
    Ok(timeline)
}

/// Random ids, different for every request so that nothing can be shared (splitmix64).
fn prompt(seed: u64, tokens: u32, vocab: u32) -> Vec<u32> {
    let mut state = seed << 32;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % vocab as u64) as u32
    };
    (0..tokens).map(|_| next()).collect()
}

impl Outcome {
    fn new(
        config: &ModelConfig,
        load: &Load,
        rows: u32,
        kv_type: KvType,
        timelines: &[Timeline],
        roofline: Option<Roofline>,
        joules: Option<f64>,
    ) -> Outcome {
        let (input, output) = (load.input_tokens as u64, load.output_tokens as u64);
        let mut first = Vec::new();
        let mut gaps = Vec::new();
        let (mut prefilled, mut whole) = (Vec::new(), Vec::new());
        for timeline in timelines {
            assert!(timeline.iter().all(|t| t.len() as u64 == output), "answers have the length asked for");
            first.extend(timeline.iter().map(|t| t[0]));
            let all_decode = timeline.iter().map(|t| t[0]).fold(0.0, f64::max);
            let one_is_done = timeline.iter().map(|t| t[t.len() - 1]).fold(f64::INFINITY, f64::min);
            let together = load.requests <= rows;
            let steady = |pair: &&[f64]| !together || (pair[0] >= all_decode && pair[1] <= one_is_done);
            gaps.extend(timeline.iter().flat_map(|t| t.windows(2).filter(steady)).map(|pair| pair[1] - pair[0]));
            prefilled.push(all_decode);
            whole.push(timeline.iter().map(|t| t[t.len() - 1]).fold(0.0, f64::max));
        }
        let median = |mut seconds: Vec<f64>| {
            seconds.sort_by(f64::total_cmp);
            percentile(&seconds, 50.0)
        };
        let (prefilled, seconds) = (median(prefilled), median(whole));
        let tokens = load.requests as u64 * output;
        let weights = match roofline {
            // Of a simulated GPU whose fp8 the model does not know of.
            Some(r) if r.element_bytes == 1 && !config.is_fp8() => model::decode_weight_bytes(config) / 2,
            _ => model::decode_weight_bytes(config),
        };
        let keys = rows.min(load.requests) as u64 * (input + output / 2);
        let step_bytes = weights + model::key_bytes(config, kv_type, keys);
        let prompts = load.requests as u64 * model::prefill_flops(config, input);
        let per_token = Milliseconds::of(gaps);
        Outcome {
            time_to_first_token_ms: Milliseconds::of(first).expect("there are requests"),
            time_per_output_token_ms: per_token,
            seconds,
            output_tokens_per_second: tokens as f64 / seconds,
            total_tokens_per_second: (tokens + load.requests as u64 * input) as f64 / seconds,
            prefill_roofline_percent: roofline.map(|r| r.percent(0, prompts, prefilled)),
            decode_roofline_percent: roofline.zip(per_token).map(|(r, t)| r.percent(step_bytes, 0, t.p50 * 1e-3)),
            decode_step_bytes: step_bytes,
            joules_per_output_token: joules.map(|j| j / (tokens * timelines.len() as u64) as f64),
        }
    }

    /// For people.
    pub fn table(&self) -> String {
        let times = |name: &str, t: &Milliseconds| {
            format!(
                "{name:<24} {:>10.3} {:>10.3} {:>10.3} {:>10.3} {:>10.3} {:>10.3}\n",
                t.p50, t.p90, t.p99, t.mean, t.min, t.max
            )
        };
        let mut text = format!(
            "{:<24} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}\n",
            "milliseconds", "p50", "p90", "p99", "mean", "min", "max"
        );
        text += &times("to the first token", &self.time_to_first_token_ms);
        text += &self.time_per_output_token_ms.map_or(String::new(), |t| times("per output token", &t));
        text += &format!("\noutput tokens/s          {:>10.1}\n", self.output_tokens_per_second);
        text += &format!("prompt and output        {:>10.1}\n", self.total_tokens_per_second);
        let percent = |name: &str, value: Option<f64>| {
            value.map_or(String::new(), |v| format!("{name:<24} {v:>10.1} % of the roofline\n"))
        };
        text += &percent("prefill", self.prefill_roofline_percent);
        text += &percent("decode", self.decode_roofline_percent);
        text + &self.joules_per_output_token.map_or(String::new(), |j| format!("{:<24} {j:>10.3}\n", "J/output token"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig::load(std::path::Path::new("models/modulo")).unwrap()
    }

    /// Two requests, one second late; tokens every 10 ms, and the second starts and ends one step later.
    #[test]
    fn times_are_taken_where_all_requests_decode() {
        let timeline: Timeline = vec![vec![1.0, 1.05, 1.06, 1.07], vec![1.05, 1.06, 1.07, 1.09]];
        let load = Load { requests: 2, input_tokens: 10, output_tokens: 4, iterations: 1, warmup: 0 };
        let roofline = Roofline { bytes_per_second: 1e9, flops_per_second: 1e12, element_bytes: 2 };
        let o = Outcome::new(
            &config(),
            &load,
            16,
            KvType::Bf16,
            std::slice::from_ref(&timeline),
            Some(roofline),
            Some(4.0),
        );
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6 * b.abs(), "{a} is not {b}");
        near(o.time_to_first_token_ms.mean, 1025.0);
        near(o.time_to_first_token_ms.p50, 1000.0);
        let gap = o.time_per_output_token_ms.unwrap();
        near(gap.min, 10.0);
        near(gap.max, 10.0);
        near(o.seconds, 1.09);
        near(o.output_tokens_per_second, 8.0 / 1.09);
        near(o.total_tokens_per_second, 28.0 / 1.09);
        near(o.joules_per_output_token.unwrap(), 0.5);
        near(o.decode_roofline_percent.unwrap(), o.decode_step_bytes as f64 / 1e9 / 0.010 * 100.0);
        let narrow = Roofline { element_bytes: 1, ..roofline };
        let half = Outcome::new(&config(), &load, 16, KvType::Fp8, &[timeline], Some(narrow), None);
        near(half.decode_roofline_percent.unwrap(), o.decode_roofline_percent.unwrap() / 2.0);
        let flops = 2.0 * model::prefill_flops(&config(), 10) as f64;
        near(o.prefill_roofline_percent.unwrap(), flops / 1e12 / 1.05 * 100.0);
    }

    #[test]
    fn one_token_answers_have_no_time_between_tokens() {
        let load = Load { requests: 1, input_tokens: 3, output_tokens: 1, iterations: 1, warmup: 0 };
        let o = Outcome::new(&config(), &load, 16, KvType::Bf16, &[vec![vec![0.5]]], None, None);
        assert_eq!(o.time_per_output_token_ms, None);
        assert_eq!((o.seconds, o.decode_roofline_percent), (0.5, None));
    }

    #[test]
    fn a_decode_step_reads_every_weight_but_the_embedding_table() {
        let c = config();
        let tables = (c.vocab_size * c.hidden_size * 2) as u64;
        let norms = ((2 * c.num_layers + 1) * c.hidden_size * 2) as u64;
        let biases = (c.num_layers * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim * 2) as u64;
        let other = if c.tie_word_embeddings { 0 } else { tables };
        assert_eq!(model::decode_weight_bytes(&c), model::weight_bytes(&c) - norms - biases - other);
        let numbers = 7 * (2 * c.num_layers * c.num_kv_heads * c.head_dim) as u64;
        for kind in [KvType::Bf16, KvType::Fp8] {
            assert_eq!(model::key_bytes(&c, kind, 7), numbers * kind.bytes());
        }
    }

    #[test]
    fn prompts_differ_and_stay_in_the_vocabulary() {
        let (a, b) = (prompt(0, 500, 320), prompt(1, 500, 320));
        assert_ne!(a, b);
        assert!(a.iter().chain(&b).all(|&id| id < 320));
        assert_eq!(a, prompt(0, 500, 320));
    }
}
