//! Spans of requests, as a collector gets them.

use crate::clients::Serving;
use crate::server::{CHAT, JSON, question};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

/// What one connection has sent: head and body.
fn received(stream: &mut TcpStream) -> (String, Vec<u8>) {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let (mut bytes, mut some) = (Vec::new(), [0; 4096]);
    loop {
        let n = stream.read(&mut some).unwrap();
        assert!(n > 0, "it breaks off: {}", String::from_utf8_lossy(&bytes));
        bytes.extend_from_slice(&some[..n]);
        let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse::<usize>();
        if bytes.len() >= end + 4 + length.unwrap() {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
            return (head, bytes[end + 4..].to_vec());
        }
    }
}

#[test]
fn a_collector_gets_a_span_of_each_request() {
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", collector.local_addr().unwrap());
    let mut server = Serving::start(&["--device", "sim:h100,instant", "--otlp-traces-endpoint", &endpoint]);
    let body = question("?").to_string();
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{JSON}X-Request-Id: mine-8\r\nTraceparent: 00-{trace}-00f067aa0ba902b7-01\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    // What is left to send is sent at the end.
    let pid = server.program.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let (mut connection, _) = collector.accept().unwrap();
    let (head, span) = received(&mut connection);
    assert!(head.starts_with("post /v1/traces ") && head.contains("application/x-protobuf"), "{head}");
    let holds = |bytes: &[u8]| span.windows(bytes.len()).any(|w| w == bytes);
    let trace: Vec<u8> = (0..16).map(|i| u8::from_str_radix(&trace[2 * i..2 * i + 2], 16).unwrap()).collect();
    assert!(holds(&trace), "a part of the client's trace");
    for text in ["ponder", "llm_request", "mine-8", "chatcmpl-", "answered", "gen_ai.usage.completion_tokens"] {
        assert!(holds(text.as_bytes()), "{text} is not in {}", String::from_utf8_lossy(&span));
    }
    assert!(server.program.wait().unwrap().success());
}

#[test]
fn a_collector_that_is_not_there_costs_no_request() {
    let nowhere = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", nowhere.local_addr().unwrap());
    drop(nowhere);
    let mut server = Serving::start(&["--device", "sim:h100,instant", "--otlp-traces-endpoint", &endpoint]);
    let body = question("?").to_string();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{JSON}Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }
    let start = Instant::now();
    assert!(Command::new("kill").args(["-TERM", &server.program.id().to_string()]).status().unwrap().success());
    assert!(server.program.wait().unwrap().success());
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    let refused = Command::new(env!("CARGO_BIN_EXE_ponder"))
        .args(["serve", "models/modulo", "--otlp-traces-endpoint", "collector:4318"])
        .output()
        .unwrap();
    let problem = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && problem.contains("http://HOST:PORT"), "{problem}");
}
