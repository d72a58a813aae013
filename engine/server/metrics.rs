//! `/metrics`: Prometheus text, under vLLM's names where a number means the same, under `ponder:` where only this engine has it.
//!
//! Latencies are the server's: from the whole body of a request being there, so that queueing, parsing and preemption count, to a
//! token's text being ready to be sent. Counts of tokens are the sampler's.

use super::{Phase, ServerState};
use crate::batch::TokenEvent;
use crate::engine::Update;
use crate::scheduler::Counters;
use crate::sequence::FinishReason;
use crate::stepper::Stats;
use crate::telemetry::Reading;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus::core::{Atomic, GenericCounter, GenericGauge};
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};
use std::sync::{Arc, Mutex};
use std::time::Instant;

const SECONDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];

/// 1, 2, 5, 10, ... tokens.
fn token_buckets() -> Vec<f64> {
    (0..6).flat_map(|power| [1.0, 2.0, 5.0].map(|n| n * 10f64.powi(power))).collect()
}

pub struct Metrics {
    registry: Registry,
    /// What the engine counts is read when somebody asks.
    engine: Engine,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    thinking_tokens: IntCounter,
    forced_ends: IntCounter,
    ignored_ends: IntCounter,
    injected_tokens: IntCounter,
    success: IntCounterVec,
    corrupted: IntCounter,
    unknown_fields: IntCounterVec,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    per_output_token: Histogram,
    end_to_end: Histogram,
    prompt_length: Histogram,
    answer_length: Histogram,
    thinking_length: Histogram,
}

struct Engine {
    running: IntGauge,
    waiting: IntGauge,
    kv_usage: Gauge,
    preemptions: IntCounter,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    healthy: IntGauge,
    /// What was told last: Prometheus' counters only grow.
    told: Mutex<Counters>,
    /// None where nobody would tell.
    gpu: Option<Gpu>,
}

struct Gpu {
    joules: prometheus::Counter,
    watts: Gauge,
    memory_used: IntGauge,
    memory: IntGauge,
    sm_clock: IntGauge,
    memory_clock: IntGauge,
    temperature: IntGauge,
    /// Joules that were told last.
    told: Mutex<Option<f64>>,
}

/// Times of one answer.
pub struct Watch {
    arrived: Instant,
    first: Option<Instant>,
    last: Instant,
    token: Option<Last>,
}

struct Last {
    generated: u32,
    reasoning: u32,
    ignores_used: u32,
}

impl Metrics {
    pub fn new(model: &str, page_tokens: u32, pages: u32, has_gpu: bool) -> Metrics {
        let labels = [("model_name", model), ("engine", "0")].map(|(k, v)| (k.to_string(), v.to_string()));
        let registry = Registry::new_custom(None, Some(labels.into())).expect("labels are well formed");
        let add = Adding(&registry);
        let cache = Opts::new("vllm:cache_config_info", "The KV cache.")
            .const_label("block_size", page_tokens.to_string())
            .const_label("num_gpu_blocks", pages.to_string())
            .const_label("cache_dtype", "bfloat16");
        add.add(IntGauge::with_opts(cache)).set(1);
        let engine = Engine {
            running: add.gauge("vllm:num_requests_running", "Sequences that have a seat."),
            waiting: add.gauge("vllm:num_requests_waiting", "Sequences that wait for one."),
            kv_usage: add.gauge("vllm:kv_cache_usage_perc", "Share of the KV pages that sequences hold, 0 to 1."),
            preemptions: add.counter("vllm:num_preemptions_total", "Sequences that gave their pages to others."),
            prefix_queries: add.counter("vllm:prefix_cache_queries_total", "Tokens looked for in the prefix cache."),
            prefix_hits: add.counter("vllm:prefix_cache_hits_total", "Tokens found there."),
            healthy: add.gauge("ponder:healthy", "1 while the engine runs."),
            told: Mutex::default(),
            gpu: has_gpu.then(|| Gpu::new(&add)),
        };
        Metrics {
            engine,
            prompt_tokens: add.counter("vllm:prompt_tokens_total", "Tokens of prompts."),
            generation_tokens: add
                .counter("vllm:generation_tokens_total", "Tokens of answers, thinking and injected ones too."),
            thinking_tokens: add.counter("ponder:thinking_tokens_total", "Tokens of thinking."),
            forced_ends: add.counter("ponder:thinking_forced_ends_total", "Answers whose thinking met its maximum."),
            ignored_ends: add
                .counter("ponder:thinking_ignored_ends_total", "Ends of thinking that were not let through."),
            injected_tokens: add.counter("ponder:injected_tokens_total", "Tokens that were forced and not drawn."),
            success: add.counters("vllm:request_success_total", "Answers that ended.", "finished_reason"),
            corrupted: add.counter("vllm:corrupted_requests_total", "Answers whose logits were not finite."),
            unknown_fields: add.counters(
                "ponder:unknown_fields_total",
                "Fields of requests that nobody knows.",
                "field",
            ),
            time_to_first_token: add.histogram("vllm:time_to_first_token_seconds", "From arrival.", &SECONDS),
            inter_token: add.histogram("vllm:inter_token_latency_seconds", "Between tokens of an answer.", &SECONDS),
            per_output_token: add.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Of each answer, the mean time between its tokens.",
                &SECONDS,
            ),
            end_to_end: add.histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", &SECONDS),
            prompt_length: add.histogram("vllm:request_prompt_tokens", "Of each prompt.", &token_buckets()),
            answer_length: add.histogram("vllm:request_generation_tokens", "Of each answer.", &token_buckets()),
            thinking_length: add.histogram("ponder:request_thinking_tokens", "Of each answer.", &token_buckets()),
            registry,
        }
    }

    pub fn unknown_field(&self, name: &str) {
        self.unknown_fields.with_label_values(&[name]).inc();
    }

    pub fn watch(&self, arrived: Instant, prompt_tokens: usize) -> Watch {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
        self.prompt_length.observe(prompt_tokens as f64);
        Watch { arrived, first: None, last: arrived, token: None }
    }

    /// An update is about to be rendered.
    pub fn note(&self, watch: &mut Watch, update: &Update) {
        if let Some(token) = &update.token {
            self.note_token(watch, token);
        }
        let Some(finish) = update.finish else { return };
        self.success
            .with_label_values(&[if finish == FinishReason::Cancelled { "abort" } else { finish.name() }])
            .inc();
        if finish == FinishReason::Error {
            self.corrupted.inc();
        }
        self.end_to_end.observe(watch.arrived.elapsed().as_secs_f64());
        let (Some(first), Some(token)) = (watch.first, &watch.token) else { return };
        self.answer_length.observe(f64::from(token.generated));
        self.thinking_length.observe(f64::from(token.reasoning));
        if token.generated > 1 {
            let mean = (watch.last - first).as_secs_f64() / f64::from(token.generated - 1);
            self.per_output_token.observe(mean);
        }
    }

    fn note_token(&self, watch: &mut Watch, token: &TokenEvent) {
        let now = Instant::now();
        match watch.first {
            None => {
                watch.first = Some(now);
                self.time_to_first_token.observe((now - watch.arrived).as_secs_f64());
            }
            Some(_) => self.inter_token.observe((now - watch.last).as_secs_f64()),
        }
        watch.last = now;
        let before = watch.token.get_or_insert(Last { generated: 0, reasoning: 0, ignores_used: 0 });
        self.generation_tokens.inc_by(u64::from(token.generated - before.generated));
        self.thinking_tokens.inc_by(u64::from(token.reasoning_tokens - before.reasoning));
        self.ignored_ends.inc_by(u64::from(token.ignores_used - before.ignores_used));
        self.injected_tokens.inc_by(u64::from(token.injected));
        *before =
            Last { generated: token.generated, reasoning: token.reasoning_tokens, ignores_used: token.ignores_used };
        // Said with every token from then on: counted once, with the last.
        if token.finish.is_some() {
            self.forced_ends.inc_by(u64::from(token.max_hit));
        }
    }

    fn text(&self, stats: Stats, reading: Reading, healthy: bool) -> Vec<u8> {
        self.engine.note(stats, reading, healthy);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("a Vec takes everything");
        text
    }
}

impl Engine {
    fn note(&self, stats: Stats, reading: Reading, healthy: bool) {
        self.running.set(stats.running as i64);
        self.waiting.set(stats.waiting as i64);
        self.kv_usage.set(f64::from(stats.pages_used) / f64::from(stats.pages.max(1)));
        self.healthy.set(healthy.into());
        let mut told = self.told.lock().expect("nobody panics with it");
        let (now, before) = (stats.counters, *told);
        *told = now;
        self.preemptions.inc_by(now.preemptions - before.preemptions);
        let looked_for = |counters: Counters| counters.prefilled_tokens + counters.found_tokens;
        self.prefix_queries.inc_by(looked_for(now) - looked_for(before));
        self.prefix_hits.inc_by(now.found_tokens - before.found_tokens);
        self.gpu.iter().for_each(|gpu| gpu.note(reading));
    }
}

impl Gpu {
    fn new(add: &Adding) -> Gpu {
        Gpu {
            joules: add.counter("ponder:energy_joules_total", "Energy of the GPU since the server started."),
            watts: add.gauge("ponder:power_watts", "Power of the GPU."),
            memory_used: add.gauge("ponder:gpu_memory_used_bytes", "Memory of the GPU in use, by anybody."),
            memory: add.gauge("ponder:gpu_memory_bytes", "Memory of the GPU."),
            sm_clock: add.gauge("ponder:gpu_sm_clock_hertz", "Clock of the multiprocessors."),
            memory_clock: add.gauge("ponder:gpu_memory_clock_hertz", "Clock of the memory."),
            temperature: add.gauge("ponder:gpu_temperature_celsius", "Temperature of the GPU."),
            told: Mutex::default(),
        }
    }

    fn note(&self, reading: Reading) {
        let mut told = self.told.lock().expect("nobody panics with it");
        let used = reading.joules.zip(*told).map_or(0.0, |(now, before)| (now - before).max(0.0));
        *told = reading.joules.or(*told);
        self.joules.inc_by(used);
        self.watts.set(reading.watts.unwrap_or(0.0));
        let set = |gauge: &IntGauge, value: Option<u64>| value.iter().for_each(|&value| gauge.set(value as i64));
        set(&self.memory_used, reading.memory_used);
        set(&self.memory, reading.memory);
        set(&self.sm_clock, reading.sm_hertz);
        set(&self.memory_clock, reading.memory_hertz);
        set(&self.temperature, reading.celsius);
    }
}

/// Makes metrics and registers them. Names are written here, once each.
struct Adding<'a>(&'a Registry);

impl Adding<'_> {
    fn add<C: prometheus::core::Collector + Clone + 'static>(&self, metric: prometheus::Result<C>) -> C {
        let metric = metric.expect("names are well formed");
        self.0.register(Box::new(metric.clone())).expect("names differ");
        metric
    }

    fn counter<P: Atomic + 'static>(&self, name: &str, help: &str) -> GenericCounter<P> {
        self.add(GenericCounter::new(name, help))
    }

    fn gauge<P: Atomic + 'static>(&self, name: &str, help: &str) -> GenericGauge<P> {
        self.add(GenericGauge::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, label: &str) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), &[label]))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }
}

pub async fn metrics(State(state): State<Arc<ServerState>>) -> Response {
    let reading = state.telemetry.as_ref().map(|telemetry| telemetry.read()).unwrap_or_default();
    let text = state.metrics.text(state.service.stats(), reading, state.phase() != Phase::Failed);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}
