//! `ponder serve` as its users have it: the program, asked by a browser, by OpenAI's client, by `ponder bench serve`, by
//! monitoring. Browser and client are fetched by `make test`; without them their tests say so and pass.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

pub struct Serving {
    pub program: Child,
    pub address: String,
    /// What it has said since it listens.
    pub log: Arc<Mutex<Vec<String>>>,
}

fn ponder(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ponder"));
    command.args(args);
    command
}

impl Serving {
    pub fn start(args: &[&str]) -> Serving {
        let mut command = ponder(&["serve", "models/modulo"]);
        let port: &[&str] = if args.contains(&"--port") { &[] } else { &["--port", "0"] };
        let mut program = command.args(port).args(args).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(program.stderr.take().unwrap()).lines();
        let address = lines.by_ref().map(|line| line.unwrap()).find_map(|line| {
            let (_, rest) = line.split_once("http://")?;
            Some(rest.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect())
        });
        let log = Arc::new(Mutex::new(Vec::new()));
        let said = log.clone();
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| said.lock().unwrap().push(line)));
        Serving { program, address: address.expect("it says where it listens"), log }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    /// One number of /metrics; labels are not looked at.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics");
        let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).rsplit(' ').next().unwrap().parse().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// Runs a script of tests/ with a tool of .toolchain/, if that is there.
fn run_script(tool: &str, program: &str, args: &[&str]) {
    let tool = Path::new(".toolchain").join(tool);
    if !tool.exists() {
        eprintln!("not tested: {} is not there (make clients)", tool.display());
        return;
    }
    let program = if program.is_empty() { tool.join("bin/python") } else { program.into() };
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_page_shows_what_budget_forcing_does() {
    let server = Serving::start(&["--device", "host"]);
    run_script("chromium", "python3", &["tests/page.py", &server.url(), "target/page"]);
}

#[test]
fn openais_client_gets_what_it_expects() {
    let server = Serving::start(&["--device", "host", "--api-key", "secret"]);
    run_script("openai", "", &["tests/openai_client.py", &server.url(), "secret"]);
}

/// Names of metrics in a text.
fn metrics_in(text: &str) -> std::collections::BTreeSet<String> {
    let begin = |at: usize| ["vllm:", "ponder:"].iter().any(|prefix| text[at..].starts_with(prefix));
    let name = |at: usize| text[at..].chars().take_while(|c| c.is_alphanumeric() || [':', '_'].contains(c)).collect();
    let places = text.char_indices().map(|(at, _)| at);
    places.filter(|&at| begin(at)).map(name).collect()
}

#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let dashboard = std::fs::read_to_string("docs/grafana.json").unwrap();
    serde_json::from_str::<Value>(&dashboard).expect("JSON");
    let source = metrics_in(&std::fs::read_to_string("engine/server/metrics.rs").unwrap());
    let asked = metrics_in(&dashboard);
    assert!(asked.len() > 15, "{asked:?}");
    for name in asked {
        assert!(source.contains(name.trim_end_matches("_bucket")), "{name}");
    }
}

#[test]
fn bench_serve_measures_what_metrics_count() {
    let server = Serving::start(&["--device", "sim:h100"]);
    let json = std::env::temp_dir().join(format!("ponder-bench-serve-{}.json", std::process::id()));
    let path = json.to_str().unwrap();
    let run = |extra: &[&str]| -> Value {
        let args = ["bench", "serve", &server.url(), "--json", path];
        let output = ponder(&args).args(extra).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap()
    };
    let closed = run(&[
        "--requests",
        "12",
        "--input-tokens",
        "40",
        "--output-tokens",
        "20",
        "--max-concurrency",
        "3",
        "--warmup",
        "0",
    ]);
    assert_eq!((&closed["completed"], &closed["failed"]), (&12.into(), &0.into()), "{}", closed["errors"]);
    assert_eq!(closed["total_input_tokens"], 12 * 40);
    assert_eq!(closed["total_output_tokens"], 12 * 20);
    assert!(closed["itls"].as_array().unwrap().iter().all(|itls| itls.as_array().unwrap().len() < 20));
    for name in ["ttft", "tpot", "itl", "e2el"] {
        let of = |what: &str| {
            closed[format!("{what}_{name}_ms")].as_f64().unwrap_or_else(|| panic!("{what} {name}: {closed}"))
        };
        assert!(
            0.0 <= of("p50") && of("p50") <= of("p90") && of("p90") <= of("p99") && of("mean") <= of("p99"),
            "{name}"
        );
    }
    assert_eq!(server.metric("vllm:prompt_tokens_total"), 12.0 * 40.0);
    assert_eq!(server.metric("vllm:generation_tokens_total"), 12.0 * 20.0);
    assert_eq!(server.metric("vllm:e2e_request_latency_seconds_count"), 12.0);
    assert_eq!(server.metric("vllm:inter_token_latency_seconds_count"), 12.0 * 19.0);
    assert_eq!(server.metric("vllm:num_requests_running"), 0.0);

    let open = run(&[
        "--chat",
        "--input-tokens",
        "20",
        "--requests",
        "10",
        "--request-rate",
        "200",
        "--range-ratio",
        "0.5",
        "--goodput",
        "e2el:60000",
        "--extra-body",
        "{\"thinking_token_budget\": 8}",
    ]);
    assert_eq!(open["completed"], 10, "{}", open["errors"]);
    assert_eq!(open["request_goodput"], open["request_throughput"], "every answer keeps such a goal");
    assert!(server.metric("ponder:thinking_forced_ends_total") > 0.0);

    let trace = std::env::temp_dir().join(format!("ponder-trace-{}.jsonl", std::process::id()));
    let lines = [(0, 30, 5), (40, 20, 7)].map(|(at, input, output)| {
        format!("{{\"timestamp\": {at}, \"input_length\": {input}, \"output_length\": {output}, \"hash_ids\": []}}\n")
    });
    std::fs::write(&trace, lines.concat()).unwrap();
    let traced = run(&["--trace", trace.to_str().unwrap()]);
    assert_eq!(traced["output_lens"], serde_json::json!([5, 7]));
    assert!(traced["duration"].as_f64().unwrap() >= 0.04);
    std::fs::remove_file(trace).unwrap();
    std::fs::remove_file(json).unwrap();

    for (args, words) in [
        (["127.0.0.1:1", "--goodput", "ttft:1"], "http://"),
        (["http://127.0.0.1:1", "--goodput", "speed:1"], "ttft:MS"),
        (["http://127.0.0.1:1", "--goodput", "ttft:1"], "cannot connect"),
        (["http://127.0.0.1:1", "--trace", "missing.jsonl"], "missing.jsonl"),
        (["http://127.0.0.1:1", "--extra-body", "[]"], "JSON object"),
    ] {
        let output = ponder(&["bench", "serve"]).args(args).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && message.contains(words), "{args:?}: {message}");
    }
}
