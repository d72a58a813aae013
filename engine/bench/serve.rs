//! `ponder bench serve`: requests to a running server, whichever speaks OpenAI's dialect, and when each piece of each answer
//! came. Keys and meanings of the results are those of vLLM's `bench serve`, so that its plots and tables take them.

use super::percentile;
use crate::{Error, Result};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Gamma};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// What is asked of a server, and how.
pub struct Load {
    pub server: Server,
    /// Empty: the first that the server names.
    pub model: String,
    /// /v1/chat/completions with words, else /v1/completions with token ids, whose lengths are exact.
    pub chat: bool,
    pub arrivals: Vec<Arrival>,
    /// Requests under way at a time; others wait, and their time counts from when they are sent.
    /// None: no limit.
    pub max_concurrency: Option<usize>,
    /// Requests before all that do not count.
    pub warmup: usize,
    /// Fields of each request's body that come on top or instead.
    pub extra_body: Map<String, Value>,
    pub goals: Vec<Goal>,
    pub seed: u64,
}

/// http://HOST:PORT[/PREFIX]
#[derive(Clone, Debug)]
pub struct Server {
    authority: String,
    prefix: String,
    api_key: Option<String>,
}

/// A request to come, seconds after the start; tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    pub at: f64,
    pub input: u32,
    pub output: u32,
}

/// A limit that a good answer keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    of: Latency,
    milliseconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Latency {
    /// Time to first token.
    Ttft,
    /// Time per output token after the first.
    Tpot,
    /// End to end.
    E2el,
}

/// Seconds from sending.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    input: u32,
    output: u32,
    sent: f64,
    ttft: f64,
    /// Between pieces.
    itls: Vec<f64>,
    e2el: f64,
    text: String,
    /// Empty: none.
    error: String,
}

/// The file that vLLM's `bench serve` writes, by its names.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub date: String,
    pub endpoint_type: &'static str,
    pub backend: &'static str,
    pub model_id: String,
    pub num_prompts: usize,
    /// "inf", or requests per second.
    pub request_rate: Value,
    pub burstiness: f64,
    pub max_concurrency: Option<usize>,
    pub duration: f64,
    pub completed: usize,
    pub failed: usize,
    pub total_input_tokens: u64,
    pub total_output_tokens: u64,
    pub request_throughput: f64,
    pub request_goodput: Option<f64>,
    pub output_throughput: f64,
    pub total_token_throughput: f64,
    /// mean_ttft_ms, median_, std_, p50_, p90_, p99_; the same for tpot, itl and e2el.
    #[serde(flatten)]
    pub latencies: Map<String, Value>,
    pub input_lens: Vec<u32>,
    pub output_lens: Vec<u32>,
    pub ttfts: Vec<f64>,
    pub itls: Vec<Vec<f64>>,
    pub generated_texts: Vec<String>,
    pub errors: Vec<String>,
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Server, String> {
        let rest = text.strip_prefix("http://").ok_or("write http://HOST:PORT (https is not spoken here)")?;
        let (authority, prefix) = rest.split_once('/').map_or((rest, ""), |(authority, path)| (authority, path));
        if authority.is_empty() {
            return Err("write http://HOST:PORT".into());
        }
        let authority = match authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
            true => authority.to_string(),
            false => format!("{authority}:80"),
        };
        // Other tools' base URLs end in /v1.
        let prefix = prefix.trim_end_matches('/').trim_end_matches("v1").trim_end_matches('/');
        let prefix = if prefix.is_empty() { String::new() } else { format!("/{prefix}") };
        Ok(Server { authority, prefix, api_key: None })
    }
}

impl FromStr for Goal {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Goal, String> {
        let problem = || "write ttft:MS, tpot:MS or e2el:MS".to_string();
        let (name, milliseconds) = text.split_once(':').ok_or_else(problem)?;
        let of = match name {
            "ttft" => Latency::Ttft,
            "tpot" => Latency::Tpot,
            "e2el" => Latency::E2el,
            _ => return Err(problem()),
        };
        let milliseconds =
            milliseconds.parse().ok().filter(|ms: &f64| ms.is_finite() && *ms > 0.0).ok_or_else(problem)?;
        Ok(Goal { of, milliseconds })
    }
}

impl Arrival {
    /// `count` requests at `rate` per second (infinite: all at once). The gaps are gamma distributed with shape `burstiness`: 1 is a
    /// Poisson process, less comes in bursts, more is steadier. Lengths are drawn from `1 - range` to `1 + range` of those
    /// given.
    pub fn random(
        count: usize,
        rate: f64,
        burstiness: f64,
        input: u32,
        output: u32,
        range: f64,
        seed: u64,
    ) -> Vec<Arrival> {
        let mut random = StdRng::seed_from_u64(seed);
        let gaps =
            rate.is_finite().then(|| Gamma::new(burstiness, 1.0 / (rate * burstiness)).expect("checked by the flags"));
        let mut at = 0.0;
        let length = |mean: u32, random: &mut StdRng| {
            let (low, high) = (mean as f64 * (1.0 - range), mean as f64 * (1.0 + range));
            random.random_range(low.round().max(1.0) as u32..=high.round().max(1.0) as u32)
        };
        let mut arrivals = Vec::with_capacity(count);
        for _ in 0..count {
            arrivals.push(Arrival { at, input: length(input, &mut random), output: length(output, &mut random) });
            at += gaps.map_or(0.0, |gaps| gaps.sample(&mut random));
        }
        arrivals
    }

    /// A trace: on each line `{"timestamp": MS, "input_length": N, "output_length": N}`, other fields ignored.
    ///
    /// # Errors
    /// A file that cannot be read, a line that is none.
    pub fn trace(path: &Path, most: usize) -> Result<Vec<Arrival>> {
        #[derive(Deserialize)]
        struct Line {
            timestamp: f64,
            input_length: u32,
            output_length: u32,
        }
        let bad = |problem: String| Error::Usage(format!("--trace {}: {problem}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(most);
        let mut arrivals = Vec::new();
        for (number, line) in lines {
            let Line { timestamp, input_length, output_length } =
                serde_json::from_str(line).map_err(|e| bad(format!("line {}: {e}", number + 1)))?;
            if !(timestamp >= 0.0 && input_length > 0 && output_length > 0) {
                return Err(bad(format!("line {}: a time or a length is not positive", number + 1)));
            }
            arrivals.push(Arrival { at: timestamp / 1e3, input: input_length, output: output_length });
        }
        match arrivals.is_empty() {
            true => Err(bad("no requests in it".into())),
            false => Ok(arrivals),
        }
    }
}

impl Server {
    pub fn with_key(mut self, api_key: Option<String>) -> Server {
        self.api_key = api_key;
        self
    }

    async fn send(&self, method: &str, path: &str, body: Vec<u8>) -> std::result::Result<Response<Incoming>, String> {
        let stream = TcpStream::connect(&self.authority).await.map_err(|e| format!("cannot connect: {e}"))?;
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
        // Ends with the answer.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.prefix))
            .header("host", &self.authority)
            .header("content-type", "application/json");
        if let Some(key) = &self.api_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|e| e.to_string())?;
        sender.send_request(request).await.map_err(|e| e.to_string())
    }

    /// A whole JSON answer.
    async fn json(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value> {
        let problem = |e: String| Error::Usage(format!("http://{}{}{path}: {e}", self.authority, self.prefix));
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let response = self.send(method, path, body).await.map_err(problem)?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|e| problem(e.to_string()))?.to_bytes();
        match status {
            StatusCode::OK => serde_json::from_slice(&body).map_err(|e| problem(e.to_string())),
            _ => Err(problem(format!("{status}: {}", String::from_utf8_lossy(&body)))),
        }
    }
}

/// Asks everything; `progress` hears of each answer.
///
/// # Errors
/// A server that cannot be reached, or that has no model. Requests that fail are counted.
pub fn run(mut load: Load, progress: impl Fn(usize) + Send + Sync + 'static) -> Result<(Load, Vec<Answer>, f64)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Error::Usage(format!("no runtime for the client: {e}")))?;
    runtime.block_on(async {
        if load.model.is_empty() {
            let models = load.server.json("GET", "/v1/models", None).await?;
            let first = models["data"][0]["id"].as_str();
            load.model =
                first.ok_or_else(|| Error::Usage("the server names no model: give --served-model".into()))?.into();
        }
        let ids = match load.chat {
            true => Vec::new(),
            false => known_ids(&load).await?,
        };
        let load = Arc::new(load);
        let bodies: Vec<Vec<u8>> = (0..load.arrivals.len()).map(|i| body(&load, i, &ids)).collect();
        for body in bodies.iter().cycle().take(load.warmup) {
            let answer = ask(&load, body.clone(), Instant::now()).await;
            if !answer.error.is_empty() {
                return Err(Error::Usage(format!("a first request failed: {}", answer.error)));
            }
        }
        let seats = Arc::new(Semaphore::new(load.max_concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
        let start = Instant::now();
        let mut tasks = JoinSet::new();
        for (i, body) in bodies.into_iter().enumerate() {
            let (load, seats) = (load.clone(), seats.clone());
            tokio::time::sleep_until(start + Duration::from_secs_f64(load.arrivals[i].at)).await;
            tasks.spawn(async move {
                let _seat = seats.acquire().await.expect("never closed");
                (i, ask(&load, body, start).await)
            });
        }
        let mut answers = vec![Answer::default(); load.arrivals.len()];
        let mut done = 0;
        while let Some(finished) = tasks.join_next().await {
            let (i, answer) = finished.expect("a request does not panic");
            answers[i] = answer;
            done += 1;
            progress(done);
        }
        let seconds = start.elapsed().as_secs_f64();
        let load = Arc::into_inner(load).expect("every task has ended");
        Ok((load, answers, seconds))
    })
}

/// Ids of tokens that the model has, by its own tokenizer, for prompts to be made of.
async fn known_ids(load: &Load) -> Result<Vec<u32>> {
    let text = "The quick brown fox jumps over the lazy dog 0123456789 times; try 7 * 8 = 56 (mod 13), x + y - z.";
    let answer = load.server.json("POST", "/tokenize", Some(json!({"model": load.model, "prompt": text}))).await?;
    let ids: Vec<u32> =
        answer["tokens"].as_array().into_iter().flatten().filter_map(|id| id.as_u64()).map(|id| id as u32).collect();
    match ids.is_empty() {
        true => Err(Error::Usage("the server's /tokenize gives no tokens: use --chat".into())),
        false => Ok(ids),
    }
}

fn body(load: &Load, i: usize, ids: &[u32]) -> Vec<u8> {
    const WORDS: [&str; 8] = ["river", "stone", "count", "seven", "light", "north", "paper", "green"];
    let mut random = StdRng::seed_from_u64(load.seed ^ (i as u64) << 32);
    let Arrival { input, output, .. } = load.arrivals[i];
    let mut body = Map::new();
    if load.chat {
        let words = (0..input).map(|_| *WORDS.choose(&mut random).expect("some")).collect::<Vec<_>>().join(" ");
        body.insert("messages".into(), json!([{"role": "user", "content": [{"type": "text", "text": words}]}]));
        body.insert("max_completion_tokens".into(), output.into());
    } else {
        let prompt: Vec<u32> = (0..input).map(|_| *ids.choose(&mut random).expect("some")).collect();
        body.insert("prompt".into(), prompt.into());
        body.insert("max_tokens".into(), output.into());
    }
    body.insert("model".into(), load.model.clone().into());
    body.insert("temperature".into(), 0.0.into());
    body.insert("ignore_eos".into(), true.into());
    body.insert("stream".into(), true.into());
    body.insert("stream_options".into(), json!({"include_usage": true}));
    body.extend(load.extra_body.clone());
    serde_json::to_vec(&body).expect("plain values")
}

async fn ask(load: &Load, body: Vec<u8>, start: Instant) -> Answer {
    let mut answer = Answer { sent: start.elapsed().as_secs_f64(), ..Answer::default() };
    if let Err(error) = follow(load, body, start, &mut answer).await {
        answer.error = error;
    }
    answer
}

async fn follow(load: &Load, body: Vec<u8>, start: Instant, answer: &mut Answer) -> std::result::Result<(), String> {
    let path = if load.chat { "/v1/chat/completions" } else { "/v1/completions" };
    let response = load.server.send("POST", path, body).await?;
    let status = response.status();
    let mut body = response.into_body();
    if status != StatusCode::OK {
        let text = body.collect().await.map_err(|e| e.to_string())?.to_bytes();
        return Err(format!("{status}: {}", String::from_utf8_lossy(&text)));
    }
    let mut lines = Vec::new();
    let (mut last, mut pieces, mut usage, mut ended) = (answer.sent, 0, None, false);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|e| format!("the stream broke off: {e}"))?.into_data() else { continue };
        let now = start.elapsed().as_secs_f64();
        lines.extend_from_slice(&data);
        while let Some(end) = lines.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = lines.drain(..=end).collect();
            let Some(data) = line.trim_ascii().strip_prefix(b"data:") else { continue };
            if data.trim_ascii() == b"[DONE]" {
                ended = true;
                continue;
            }
            let event: Value = serde_json::from_slice(data).map_err(|e| format!("an event that is no JSON: {e}"))?;
            if let Some(message) = event["error"]["message"].as_str() {
                return Err(message.into());
            }
            if event["usage"].is_object() {
                usage = Some(event["usage"].clone());
            }
            let choice = &event["choices"][0];
            if choice.is_object() {
                let delta = &choice["delta"];
                let texts = [&choice["text"], &delta["reasoning_content"], &delta["content"]];
                answer.text.extend(texts.into_iter().filter_map(Value::as_str));
                if pieces == 0 {
                    answer.ttft = now - answer.sent;
                } else {
                    answer.itls.push(now - last);
                }
                (last, pieces) = (now, pieces + 1);
            }
        }
    }
    if !ended {
        return Err("the stream ended without [DONE]".into());
    }
    let count = |name: &str| usage.as_ref().and_then(|usage| usage[name].as_u64()).map(|n| n as u32);
    answer.e2el = last - answer.sent;
    answer.input = count("prompt_tokens").unwrap_or_default();
    answer.output = count("completion_tokens").unwrap_or(pieces);
    match answer.output {
        0 => Err("an answer without tokens".into()),
        _ => Ok(()),
    }
}

impl Answer {
    /// None for an answer of one token.
    fn tpot(&self) -> Option<f64> {
        (self.output > 1).then(|| (self.e2el - self.ttft) / (self.output - 1) as f64)
    }

    fn keeps(&self, goal: &Goal) -> bool {
        let seconds = match goal.of {
            Latency::Ttft => self.ttft,
            Latency::Tpot => self.tpot().unwrap_or(0.0),
            Latency::E2el => self.e2el,
        };
        seconds * 1e3 <= goal.milliseconds
    }
}

impl Summary {
    pub fn new(load: &Load, rate: f64, burstiness: f64, answers: &[Answer], duration: f64) -> Summary {
        let good: Vec<&Answer> = answers.iter().filter(|answer| answer.error.is_empty()).collect();
        let per_second = |n: f64| n / duration;
        let total_input_tokens = good.iter().map(|a| a.input as u64).sum();
        let total_output_tokens = good.iter().map(|a| a.output as u64).sum();
        let mut latencies = Map::new();
        for (name, seconds) in [
            ("ttft", good.iter().map(|a| a.ttft).collect::<Vec<_>>()),
            ("tpot", good.iter().filter_map(|a| a.tpot()).collect()),
            ("itl", good.iter().flat_map(|a| a.itls.iter().copied()).collect()),
            ("e2el", good.iter().map(|a| a.e2el).collect()),
        ] {
            latencies.extend(distribution(name, seconds));
        }
        let keeping = good.iter().filter(|answer| load.goals.iter().all(|goal| answer.keeps(goal))).count();
        Summary {
            date: chrono::Utc::now().format("%Y%m%d-%H%M%S").to_string(),
            endpoint_type: if load.chat { "openai-chat" } else { "openai" },
            backend: if load.chat { "openai-chat" } else { "openai" },
            model_id: load.model.clone(),
            num_prompts: answers.len(),
            request_rate: if rate.is_finite() { rate.into() } else { "inf".into() },
            burstiness,
            max_concurrency: load.max_concurrency,
            duration,
            completed: good.len(),
            failed: answers.len() - good.len(),
            total_input_tokens,
            total_output_tokens,
            request_throughput: per_second(good.len() as f64),
            request_goodput: (!load.goals.is_empty()).then(|| per_second(keeping as f64)),
            output_throughput: per_second(total_output_tokens as f64),
            total_token_throughput: per_second((total_input_tokens + total_output_tokens) as f64),
            latencies,
            input_lens: answers.iter().map(|a| a.input).collect(),
            output_lens: answers.iter().map(|a| a.output).collect(),
            ttfts: answers.iter().map(|a| a.ttft).collect(),
            itls: answers.iter().map(|a| a.itls.clone()).collect(),
            generated_texts: answers.iter().map(|a| a.text.clone()).collect(),
            errors: answers.iter().map(|a| a.error.clone()).collect(),
        }
    }

    pub fn table(&self) -> String {
        let mut lines = vec![
            format!(
                "{} of {} requests in {:.2} s, {} failed",
                self.completed, self.num_prompts, self.duration, self.failed
            ),
            format!("{:>12.2} requests/s", self.request_throughput),
            format!("{:>12.2} output tokens/s", self.output_throughput),
            format!("{:>12.2} tokens/s, prompts too", self.total_token_throughput),
        ];
        if let Some(goodput) = self.request_goodput {
            lines.push(format!("{goodput:>12.2} requests/s within the goals"));
        }
        lines.push(format!("{:<28}{:>10}{:>10}{:>10}{:>10}", "milliseconds", "mean", "p50", "p90", "p99"));
        for (name, meaning) in [
            ("ttft", "time to first token"),
            ("tpot", "time per output token"),
            ("itl", "between pieces"),
            ("e2el", "end to end"),
        ] {
            let of = |what: &str| {
                self.latencies.get(&format!("{what}_{name}_ms")).and_then(Value::as_f64).unwrap_or(f64::NAN)
            };
            let row = ["mean", "p50", "p90", "p99"].map(|what| format!("{:>10.2}", of(what)));
            lines.push(format!("{meaning:<28}{}", row.concat()));
        }
        if let Some(error) = self.errors.iter().find(|error| !error.is_empty()) {
            lines.push(format!("the first failure: {error}"));
        }
        lines.join("\n") + "\n"
    }
}

fn distribution(name: &str, mut seconds: Vec<f64>) -> Map<String, Value> {
    let mut map = Map::new();
    if seconds.is_empty() {
        return map;
    }
    seconds.sort_by(f64::total_cmp);
    let mean = seconds.iter().sum::<f64>() / seconds.len() as f64;
    let variance = seconds.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / seconds.len() as f64;
    let p = |percent| percentile(&seconds, percent);
    for (what, value) in [
        ("mean", mean),
        ("median", p(50.0)),
        ("std", variance.sqrt()),
        ("p50", p(50.0)),
        ("p90", p(90.0)),
        ("p95", p(95.0)),
        ("p99", p(99.0)),
    ] {
        map.insert(format!("{what}_{name}_ms"), (value * 1e3).into());
    }
    map
}
