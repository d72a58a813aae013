//! The server in bad times: a device that fails, clients that do not read, handlers that panic, an end that comes too early, a process
//! that is killed.

use crate::clients::Serving;
use crate::modulo;
use crate::server::{CHAT, JSON, Reply, Server, question, simulated_engine, slow_engine};
use axum::routing::get;
use ponder::Engine;
use ponder::config::ModelConfig;
use ponder::device::host::HostOptions;
use ponder::device::{Device, Launch};
use ponder::executor::ExecutorOptions;
use ponder::frontend::Frontend;
use ponder::kernels::planted::EVERYBODY_WAITS;
use ponder::kernels::planted::abi::{PLANTED_SHARED, PlantedParams};
use ponder::model::Weights;
use ponder::server::{Settings, router};
use ponder::thinking::ThinkingChoice;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A stream of so many tokens.
fn long(tokens: u32) -> Value {
    let mut body = question("?");
    body["stream"] = true.into();
    body["ignore_eos"] = true.into();
    body["max_tokens"] = tokens.into();
    body
}

/// A kernel that waits for ever comes between the engine's own.
#[test]
fn a_device_that_fails_is_told_to_all_and_ends_the_server() {
    let frontend = Frontend::open(Path::new(modulo::FOLDER), &ThinkingChoice::Auto).unwrap();
    let device = Device::host(HostOptions::default());
    let engine = Engine::new(frontend, Weights::Dummy, &device, &ExecutorOptions::default(), &mut |_, _| {}).unwrap();
    let mut server = Server::start(engine, Settings::default());
    let body = long(900).to_string();
    let mut streams: Vec<TcpStream> = (0..3).map(|_| server.send("POST", CHAT, JSON, body.as_bytes())).collect();
    let whole = server.send("POST", CHAT, JSON, body.replace("\"stream\":true", "\"stream\":false").as_bytes());
    let mut begun = vec![0; 300];
    for stream in &mut streams {
        stream.read_exact(&mut begun).unwrap();
    }
    let launch = EVERYBODY_WAITS.launch([1, 1, 1], PlantedParams { planted: 1, ..Default::default() });
    device.launch(&Launch { shared_bytes: PLANTED_SHARED, ..launch }).unwrap();
    for mut stream in streams {
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("\"code\":\"engine_failed\"") && rest.contains("data: [DONE]"), "{rest}");
    }
    let whole = Reply::read(whole);
    assert_eq!((whole.status, &whole.json()["error"]["code"]), (503, &json!("engine_failed")));
    let error = server.end().unwrap_err();
    assert_eq!(error.exit_code(), 1, "{error}");
    assert!(TcpStream::connect(server.address).is_err(), "nobody is let in any more");
}

#[test]
fn who_is_cut_off_at_the_end_hears_so() {
    let settings = Settings { shutdown_timeout: Duration::from_millis(100), ..Settings::default() };
    let mut server = Server::start(very_slow_engine(), settings);
    let mut streams: Vec<TcpStream> =
        (0..4).map(|_| server.send("POST", CHAT, JSON, long(20_000).to_string().as_bytes())).collect();
    for stream in &mut streams {
        stream.read_exact(&mut [0; 400]).unwrap();
    }
    let before = Instant::now();
    server.end().unwrap();
    assert!(before.elapsed() < Duration::from_secs(5), "{:?}", before.elapsed());
    for mut stream in streams {
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("cancelled this request") && rest.contains("data: [DONE]"), "{rest}");
    }
}

/// In real time, some 10 ms a step, so that a long answer takes minutes.
fn very_slow_engine() -> Engine {
    let mut frontend = Frontend::open(Path::new(modulo::FOLDER), &ThinkingChoice::Auto).unwrap();
    let large = ModelConfig::load(Path::new("benches/models/qwen2.5-32b")).unwrap();
    let (vocab_size, eos_token_ids) = (frontend.config.vocab_size, frontend.config.eos_token_ids.clone());
    frontend.config = ModelConfig { vocab_size, eos_token_ids, ..large };
    let device = Device::open("sim:h100".parse().unwrap()).unwrap();
    Engine::new(frontend, Weights::Dummy, &device, &ExecutorOptions::default(), &mut |_, _| {}).unwrap()
}

/// A connection that was let in before the end may bring its request a moment after it.
#[test]
fn a_request_on_its_way_is_served() {
    let mut server = Server::start(slow_engine(), Settings::default());
    let mut early: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(server.address).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(50));
    let body = long(20).to_string();
    let ask = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        let head = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: {}\r\n\r\n{body}", body.len());
        early.iter_mut().for_each(|stream| stream.write_all(head.as_bytes()).unwrap());
        early.into_iter().map(Reply::read).collect::<Vec<_>>()
    });
    server.end().unwrap();
    for reply in ask.join().unwrap() {
        assert!(reply.status == 200 && reply.text.ends_with("data: [DONE]\n\n"), "{}", reply.text);
    }
}

/// Far more than the system's buffers hold, and nobody reads it.
#[test]
fn a_client_that_does_not_read_is_given_up() {
    let settings = Settings { write_timeout: Duration::from_millis(300), ..Settings::default() };
    let server = Server::start(simulated_engine(), settings);
    let mut body = long(900);
    body["n"] = 64.into();
    body["logprobs"] = true.into();
    let dead = server.send("POST", CHAT, JSON, body.to_string().as_bytes());
    let asked = server.ask(CHAT, &question("Others go on?"));
    assert!(asked["usage"]["completion_tokens"].as_u64().unwrap() > 0);
    server.wait_until_idle();
    drop(dead);
}

#[test]
fn health_knows_whether_steps_are_made() {
    let server = Server::start(very_slow_engine(), Settings { stall: Duration::from_millis(1), ..Settings::default() });
    assert_eq!(server.get("/health").status, 200);
    let mut busy = server.send("POST", CHAT, JSON, long(20_000).to_string().as_bytes());
    busy.read_exact(&mut [0; 400]).unwrap();
    // A step takes some 10 ms: most of the time the last one was more than 1 ms ago.
    let told: Vec<u16> = (0..40).map(|_| server.get("/health").status).collect();
    assert!(told.contains(&503), "{told:?}");
    drop(busy);
    server.wait_until_idle();
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_handler_that_panics_stops_nobody_else() {
    let panics = async || -> &str { panic!("on purpose") };
    let server =
        Server::start_with(slow_engine(), Settings::default(), move |state| router(state).route("/panic", get(panics)));
    let stream = server.send("POST", CHAT, JSON, long(400).to_string().as_bytes());
    for _ in 0..20 {
        let reply = server.get("/panic");
        assert_eq!((reply.status, reply.json()["error"]["type"].as_str()), (500, Some("server_error")));
    }
    assert!(Reply::read(stream).text.ends_with("data: [DONE]\n\n"));
    assert_eq!(server.get("/health").status, 200);
}

/// Bytes of memory that a process has.
fn resident(program: u32) -> u64 {
    let pages = std::fs::read_to_string(format!("/proc/{program}/statm")).unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn send(address: &str, head: &str, body: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body);
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    String::from_utf8_lossy(&reply).lines().next().unwrap_or_default().to_string()
}

#[test]
fn the_log_names_each_request() {
    let server = Serving::start(&["--device", "sim:h100,instant", "--log-json"]);
    let body = question("?").to_string();
    let head = |path: &str, length: usize| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\n{JSON}X-Request-Id: mine-7\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    assert!(send(&server.address, &head(CHAT, body.len()), body.as_bytes()).starts_with("HTTP/1.1 200"));
    assert!(send(&server.address, &head("/nowhere", 0), b"").starts_with("HTTP/1.1 404"));
    let said = |message: &str| -> Value {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let entries: Vec<Value> =
                server.log.lock().unwrap().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
            if let Some(entry) = entries.iter().find(|entry| entry["fields"]["message"] == message) {
                return entry["fields"].clone();
            }
            assert!(Instant::now() < deadline, "{entries:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let answered = said("request");
    assert_eq!((&answered["request_id"], &answered["outcome"]), (&json!("mine-7"), &json!("answered")));
    assert!(answered["response"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(answered["prompt_tokens"].as_u64().unwrap() > 10 && answered["tokens"].as_u64().unwrap() > 0);
    assert!(answered["first_token_ms"].as_u64().unwrap() <= answered["total_ms"].as_u64().unwrap());
    let refused = said("refused");
    let expected = (json!("/nowhere"), json!(404), json!("mine-7"));
    assert_eq!((&refused["path"], &refused["status"], &refused["request_id"]), (&expected.0, &expected.1, &expected.2));
}

/// Whatever comes, memory stays and so does the server; killed, it is back as soon as it was there at first.
#[test]
fn floods_and_kills() {
    let start = |port: &str| {
        let before = Instant::now();
        let server = Serving::start(&["--device", "sim:h100,instant", "--port", port]);
        (server, before.elapsed())
    };
    let (mut server, first) = start("0");
    let address = server.address.clone();
    let post = |body: &[u8]| {
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{JSON}Connection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        send(&address, &head, body)
    };
    let deep = "[".repeat(1 << 20);
    let many = format!("{{\"messages\": [{}]}}", vec!["{\"role\": \"user\", \"content\": \"x\"}"; 100_000].join(", "));
    let bias: Vec<String> = (0..200_000).map(|i| format!("\"{i}\": 1")).collect();
    let bias = format!("{{\"messages\": [], \"logit_bias\": {{{}}}}}", bias.join(", "));
    let tools = format!("{{\"messages\": [], \"tools\": [{}]}}", vec!["{\"type\": \"function\"}"; 100_000].join(", "));
    let long = format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"{}\"}}]}}", "x ".repeat(3 << 20));
    let stops = format!("{{\"messages\": [], \"stop\": [{}]}}", vec!["\"x\""; 500_000].join(", "));
    let floods: Vec<&[u8]> = vec![
        deep.as_bytes(),
        many.as_bytes(),
        bias.as_bytes(),
        tools.as_bytes(),
        long.as_bytes(),
        stops.as_bytes(),
        b"{\"messages\": \"\xff\xfe\"}",
        b"{\"messages\": [], \"temperature\": 1e999}",
        b"{\"messages\": [], \"temperature\": NaN}",
        b"",
    ];
    let round = || {
        for flood in &floods {
            let reply = post(flood);
            let what = String::from_utf8_lossy(&flood[..flood.len().min(80)]).into_owned();
            assert!(reply.starts_with("HTTP/1.1 4"), "{what}: {reply:?}");
        }
        let headers: String = (0..50_000).map(|i| format!("x-{i}: {i}\r\n")).collect();
        let reply = send(&address, &format!("GET /health HTTP/1.1\r\nHost: x\r\n{headers}\r\n"), b"");
        assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 4"), "{reply}");
    };
    // The allocator keeps what the first rounds needed.
    (0..2).for_each(|_| round());
    let before = resident(server.program.id());
    (0..6).for_each(|_| round());
    let after = resident(server.program.id());
    assert!(after < before + (48 << 20), "{before} bytes have become {after}");
    assert!(
        send(&address, "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"").starts_with("HTTP/1.1 200")
    );

    // SIGKILL
    server.program.kill().unwrap();
    server.program.wait().unwrap();
    let (server, again) = start(address.rsplit(':').next().unwrap());
    assert_eq!(server.address, address);
    assert!(again < 2 * first + Duration::from_secs(2), "{first:?} at first, then {again:?}");
    assert!(post(question("?").to_string().as_bytes()).starts_with("HTTP/1.1 200"));
}
