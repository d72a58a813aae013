//! Several `ponder serve` behind a router: what the cache knows is told, requests go where their beginning is known, and none is lost
//! while one server after another is restarted. Router and load balancer are fetched by `make test`; without them their tests say so
//! and pass.

use crate::clients::Serving;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use zeromq::{Socket, SocketRecv, SubSocket};

const CHAT: &str = "/v1/chat/completions";

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The body of an answer, if its status is 200. HTTP/1.0: what comes is the body, in no chunks.
fn post(address: &str, path: &str, body: &Value) -> Result<String, String> {
    let body = body.to_string();
    let mut reply = String::new();
    let mut exchange = || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        write!(
            stream,
            "POST {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        stream.read_to_string(&mut reply)
    };
    exchange().map_err(|error| error.to_string())?;
    match reply.split_once("\r\n\r\n") {
        Some((head, body)) if head.split(' ').nth(1) == Some("200") => Ok(body.into()),
        _ => Err(reply),
    }
}

/// Of several pages.
fn long_question(topic: &str) -> Value {
    json!({"model": "modulo", "messages": [{"role": "user", "content": format!("{topic}: {}", "1 + 2 ".repeat(150))}], "max_tokens": 8})
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_cache_is_told() {
    let endpoint = format!("tcp://127.0.0.1:{}", free_port());
    let server = Serving::start(&["--device", "sim:h100,instant", "--kv-events", &endpoint]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut socket = SubSocket::new();
    runtime.block_on(async {
        socket.connect(&endpoint).await.unwrap();
        socket.subscribe("").await.unwrap();
        // Whoever subscribes is heard a moment later.
        tokio::time::sleep(Duration::from_millis(300)).await;
    });
    let mut salted = long_question("secret");
    salted["cache_salt"] = "mine".into();
    post(&server.address, CHAT, &salted).unwrap();
    let asked = long_question("open");
    let rendered = post(&server.address, "/v1/chat/completions/render", &asked).unwrap();
    let prompt = serde_json::from_str::<Value>(&rendered).unwrap()["token_ids"].as_array().unwrap().clone();
    assert!(prompt.len() > 200, "{}", prompt.len());
    post(&server.address, CHAT, &asked).unwrap();

    let (mut told, mut last, mut number) = (Vec::new(), Value::Null, 0u64);
    while told.len() + 64 <= prompt.len() {
        let message = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), socket.recv()).await });
        let frames = message.expect("it is told").unwrap().into_vec();
        assert_eq!((frames.len(), frames[0].len()), (3, 0));
        assert_eq!(frames[1].as_ref(), number.to_be_bytes());
        number += 1;
        let (time, events, rank): (f64, Vec<Value>, u32) = rmp_serde::from_slice(&frames[2]).unwrap();
        assert!(time > 1.7e9 && rank == 0);
        for event in events {
            assert_eq!(
                (&event["type"], &event["block_size"], &event["medium"]),
                (&json!("BlockStored"), &json!(64), &json!("GPU"))
            );
            assert_eq!(event["parent_block_hash"], last, "each follows the one before");
            last = event["block_hashes"][0].clone();
            told.extend(event["token_ids"].as_array().unwrap().iter().cloned());
        }
    }
    assert_eq!(told[..], prompt[..told.len()], "what is another tenant's is told to nobody");
}

/// A program that stands before the servers.
struct Front {
    program: Child,
    address: String,
}

impl Drop for Front {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

impl Front {
    /// None, and it is said, where the tool is not there.
    fn start(
        tool: &str,
        program: &str,
        args: impl FnOnce(u16) -> Vec<String>,
        env: &[(&str, String)],
    ) -> Option<Front> {
        let path = Path::new(".toolchain").join(tool).join(program);
        if !path.exists() {
            eprintln!("not tested: {} is not there (make clients)", path.display());
            return None;
        }
        let port = free_port();
        let mut command = Command::new(path);
        command.args(args(port)).env("LISTEN", format!("127.0.0.1:{port}")).envs(env.iter().cloned());
        let program = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let front = Front { program, address: format!("127.0.0.1:{port}") };
        wait_for("it answers", || post(&front.address, CHAT, &long_question("first")).is_ok());
        Some(front)
    }
}

/// Two servers and vllm-router, which knows what each of them has in its cache.
fn behind_the_router() -> Option<([Serving; 2], [Vec<String>; 2], Front)> {
    let start = |_| {
        let (port, events) = (free_port().to_string(), format!("tcp://127.0.0.1:{}", free_port()));
        let args = ["--device", "sim:h100", "--port", &port, "--kv-events", &events].map(String::from).to_vec();
        (serve(&args), args)
    };
    let [(one, first), (two, second)] = [0, 1].map(start);
    let args = |port: u16| {
        let mut args = vec!["--host", "127.0.0.1", "--port"].into_iter().map(String::from).collect::<Vec<_>>();
        args.extend([port.to_string(), "--prometheus-port".into(), free_port().to_string()]);
        args.extend(
            ["--policy", "kv_aware", "--kv-event-model", "modulo", "--kv-event-block-size", "64"].map(String::from),
        );
        args.extend(["--health-check-interval-secs", "1", "--health-failure-threshold", "1"].map(String::from));
        args.extend(["--health-success-threshold", "1", "--cb-timeout-duration-secs", "1"].map(String::from));
        args.extend(["--worker-urls".into(), one.url(), two.url()]);
        for (server, flags) in [(&one, &first), (&two, &second)] {
            args.extend(["--kv-event-source".into(), format!("{}={}", server.url(), flags[5])]);
        }
        args
    };
    let front = Front::start("vllm-router", "bin/vllm-router", args, &[])?;
    Some(([one, two], [first, second], front))
}

fn serve(args: &[String]) -> Serving {
    Serving::start(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn requests_go_where_their_beginning_is_known() {
    let Some((servers, _, front)) = behind_the_router() else { return };
    for (i, topic) in ["alpha", "beta", "gamma", "delta"].into_iter().enumerate() {
        let (knows, other) = (&servers[i % 2], &servers[1 - i % 2]);
        post(&knows.address, CHAT, &long_question(topic)).unwrap();
        // What is told takes a moment to arrive.
        std::thread::sleep(Duration::from_millis(300));
        let made = |server: &Serving| server.metric("vllm:prompt_tokens_total");
        let before = (made(knows), made(other));
        (0..6).for_each(|_| drop(post(&front.address, CHAT, &long_question(topic)).unwrap()));
        assert!(made(knows) > before.0, "{topic}");
        assert_eq!(made(other), before.1, "{topic} is known elsewhere");
    }
}

/// One server after the other ends and comes back, while four clients ask without a pause.
fn restart_one_by_one(servers: &mut [Serving; 2], args: &[Vec<String>; 2], front: &Front) {
    let done = AtomicBool::new(false);
    let answers = std::thread::scope(|scope| {
        let ask = |client: usize| {
            let (front, done) = (&front, &done);
            move || {
                let mut answers = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let body = json!({
                        "model": "modulo",
                        "messages": [{"role": "user", "content": format!("{client} and {}?", answers.len())}],
                        "stream": client < 2,
                        "max_tokens": 200,
                        "ignore_eos": true,
                    });
                    answers.push(post(&front.address, CHAT, &body));
                }
                answers
            }
        };
        let clients: Vec<_> = (0..4).map(|client| scope.spawn(ask(client))).collect();
        for (server, args) in servers.iter_mut().zip(args) {
            assert!(Command::new("kill").arg(server.program.id().to_string()).status().unwrap().success());
            assert!(server.program.wait().unwrap().success(), "it ends with 0");
            // The others do its work while it is away.
            std::thread::sleep(Duration::from_millis(500));
            *server = serve(args);
            wait_for("it is asked again", || server.metric("vllm:generation_tokens_total") > 0.0);
        }
        done.store(true, Ordering::Relaxed);
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(answers.len() > 8);
    for answer in answers {
        let text = answer.unwrap_or_else(|error| panic!("a request is lost: {error}"));
        assert!(text.contains("data: [DONE]") || text.contains("\"completion_tokens\":200"), "{text}");
    }
}

#[test]
fn a_rolling_restart_behind_the_router_loses_nothing() {
    let Some((mut servers, args, front)) = behind_the_router() else { return };
    restart_one_by_one(&mut servers, &args, &front);
}

#[test]
fn a_rolling_restart_behind_haproxy_loses_nothing() {
    let args = [0, 1].map(|_| ["--device", "sim:h100", "--port", &free_port().to_string()].map(String::from).to_vec());
    let mut servers = [serve(&args[0]), serve(&args[1])];
    let env = [("SERVER_1", servers[0].address.clone()), ("SERVER_2", servers[1].address.clone())];
    let config = |_| ["-f", "docs/haproxy.cfg"].map(String::from).to_vec();
    let Some(front) = Front::start("haproxy", "haproxy", config, &env) else { return };
    restart_one_by_one(&mut servers, &args, &front);
}
