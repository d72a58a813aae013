//! The HTTP server over real sockets: on a simulated GPU, and with the tiny model on the device under test.

use crate::modulo;
use ponder::device::Device;
use ponder::executor::ExecutorOptions;
use ponder::frontend::Frontend;
use ponder::model::Weights;
use ponder::server::{self, ServerState, Settings};
use ponder::thinking::ThinkingChoice;
use ponder::{Engine, Service};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

struct Server {
    address: SocketAddr,
    state: Arc<ServerState>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<ponder::Result<()>>>,
}

impl Server {
    fn start(engine: Engine, settings: Settings) -> Server {
        let state = ServerState::new(Service::start(engine), settings);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (end, ended) = oneshot::channel::<()>();
        let shared = state.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                server::serve(listener, shared, async { drop(ended.await) }).await
            })
        });
        Server { address, state, end: Some(end), thread: Some(thread) }
    }

    fn simulated() -> Server {
        Server::start(simulated_engine(), Settings::default())
    }

    /// With the tiny model.
    fn real() -> Server {
        Server::start(modulo::engine(&ThinkingChoice::Auto), Settings::default())
    }

    /// What was accepted is finished.
    fn end(&mut self) -> ponder::Result<()> {
        drop(self.end.take());
        self.thread.take().unwrap().join().unwrap()
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // A server may refuse before it has read everything.
        let _ = stream.write_all(body);
        stream
    }

    fn get(&self, path: &str) -> Reply {
        Reply::read(self.send("GET", path, "", b""))
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        Reply::read(self.send("POST", path, JSON, body.to_string().as_bytes()))
    }

    /// The whole answer, which must be one.
    fn ask(&self, path: &str, body: &Value) -> Value {
        let reply = self.post(path, body);
        assert_eq!(reply.status, 200, "{}", reply.text);
        reply.json()
    }

    /// The events of a stream, without the last, which must be [DONE].
    fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = true.into();
        let reply = self.post(path, &body);
        assert_eq!(reply.status, 200, "{}", reply.text);
        let mut events: Vec<&str> = reply.text.split_terminator("\n\n").collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{}", reply.text);
        events.iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }

    /// Nothing is left of what was asked.
    fn wait_until_idle(&self) {
        let start = Instant::now();
        loop {
            let stats = self.state.service.stats();
            if (stats.waiting, stats.running, stats.pages_used, self.state.open_answers()) == (0, 0, 0, 0) {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "{stats:?}, {} open", self.state.open_answers());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end().unwrap();
        }
    }
}

const JSON: &str = "Content-Type: application/json\r\n";
const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

struct Reply {
    status: u16,
    head: String,
    text: String,
}

impl Reply {
    fn read(mut stream: TcpStream) -> Reply {
        let mut bytes = Vec::new();
        // A refusal may be followed by a reset, where the body was not read.
        let _ = stream.read_to_end(&mut bytes);
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        Reply { status, head: head.to_ascii_lowercase(), text: if chunked { unchunked(body) } else { body.into() } }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }
}

/// A body that came in chunks, as far as it came.
fn unchunked(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        text += &rest[..length.min(rest.len())];
        body = rest.get(length + 2..).unwrap_or("");
    }
    text
}

fn simulated_engine() -> Engine {
    let frontend = Frontend::open(Path::new(modulo::FOLDER), &ThinkingChoice::Auto).unwrap();
    let device = Device::open("sim:h100,instant".parse().unwrap()).unwrap();
    let options = ExecutorOptions { max_slots: 33, pages: Some(120), max_context: Some(1024), ..Default::default() };
    Engine::new(frontend, Weights::Dummy, &device, &options, &mut |_, _| {}).unwrap()
}

fn question(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "max_tokens": 60})
}

#[test]
fn an_answer_and_the_same_as_a_stream() {
    let server = Server::real();
    let mut body = question(&modulo::problem(0).question());
    body["temperature"] = 0.into();
    body["thinking_token_budget"] = 24.into();
    let whole = server.ask(CHAT, &body);
    let message = &whole["choices"][0]["message"];
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "ponder");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop", "{whole}");
    assert_eq!(whole["choices"][0]["thinking"], json!({"reasoning_tokens": 24, "ignores_used": 0, "max_hit": true}));
    assert!(message["content"].as_str().unwrap().starts_with("Final Answer:"), "{whole}");
    assert_eq!(message["reasoning"], message["reasoning_content"]);
    let usage = &whole["usage"];
    let reasoning = usage["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    assert!(0 < reasoning && reasoning < usage["completion_tokens"].as_u64().unwrap(), "{usage}");

    body["stream_options"] = json!({"include_usage": true});
    let mut events = server.stream(CHAT, body.clone());
    let last = events.pop().unwrap();
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), usage));
    let (mut joined, mut injected) = (Value::Null, false);
    let (mut reasoning, mut content) = (String::new(), String::new());
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event.get("usage"), None, "only when asked");
        let choice = &event["choices"][0];
        assert_eq!(choice["delta"].get("role").is_some(), i == 0);
        let text = |name: &str| choice["delta"][name].as_str().unwrap_or_default();
        assert_eq!(text("reasoning"), text("reasoning_content"));
        assert_eq!(choice["finish_reason"].is_null(), i + 1 < events.len());
        let any = text("reasoning").len() + text("content").len();
        assert!(any > 0 || i + 1 == events.len(), "a chunk without a token: {event}");
        injected |= choice["injected"] == true;
        reasoning += text("reasoning");
        content += text("content");
        joined = choice["thinking"].clone();
    }
    assert_eq!(message["reasoning"], reasoning.as_str());
    assert_eq!(message["content"], content.as_str());
    assert_eq!(joined, whole["choices"][0]["thinking"]);
    assert!(injected, "the end string was forced");
}

#[test]
fn completions_of_text_and_ids() {
    let server = Server::real();
    let text = modulo::problem(1).question();
    let ids = server.ask("/tokenize", &json!({"prompt": text}))["tokens"].clone();
    assert_eq!(server.ask("/detokenize", &json!({"tokens": ids}))["prompt"], text.as_str());
    let ask = |prompt: Value| server.ask(COMPLETIONS, &json!({"prompt": prompt, "max_tokens": 8, "temperature": 0}));
    let one = ask(text.clone().into());
    let both = ask(json!([ids, text]));
    assert_eq!(one["choices"][0]["text"], ask(ids)["choices"][0]["text"]);
    for index in 0..2 {
        assert_eq!(both["choices"][index]["index"], index);
        assert_eq!(both["choices"][index]["text"], one["choices"][0]["text"]);
    }
    assert_eq!(both["usage"]["completion_tokens"], 16);
    let events = server.stream(COMPLETIONS, json!({"prompt": text, "max_tokens": 8, "temperature": 0}));
    let joined: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(one["choices"][0]["text"], joined.as_str());
}

#[test]
fn health_models_and_what_is_not_there() {
    let server = Server::simulated();
    assert_eq!((server.get("/health").status, server.get("/ready").status), (200, 200));
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "ponder");
    assert_eq!(models["data"][0]["max_model_len"], 1024);
    assert_eq!(server.get("/v1/models/ponder").status, 200);
    assert_eq!(server.get("/v1/models/other").status, 404);
    assert!(server.get("/version").json()["version"].is_string());
    assert_eq!(server.get("/nowhere").json()["error"]["type"], "not_found_error");
    assert_eq!(server.get(CHAT).status, 405);
}
