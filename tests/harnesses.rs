//! `ponder serve` under programs that others wrote to judge servers, as they are and offline: lm-evaluation-harness with two small
//! tasks of our own (tests/harnesses) and guidellm. They are fetched by `make clients`; without them their tests say so and pass.

use crate::clients::Serving;
use crate::server::{CHAT, COMPLETIONS, JSON, Reply};
use serde_json::{Value, json};
use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whatever else runs, an answer is the one that is got by asking alone.
fn serving() -> Serving {
    Serving::start(&["--device", "host", "--deterministic"])
}

fn ask(server: &Serving, path: &str, body: &Value) -> Value {
    let (mut stream, body) = (TcpStream::connect(&server.address).unwrap(), body.to_string());
    let head = format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{JSON}");
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let reply = Reply::read(stream);
    assert_eq!(reply.status, 200, "{}", reply.text);
    reply.json()
}

/// A folder for what a tool writes, with nothing in it.
fn fresh_folder(name: &str) -> PathBuf {
    let folder = Path::new("target/harnesses").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder.canonicalize().unwrap()
}

/// Runs a tool of .toolchain/. False: it is not there.
fn run(tool: &str, args: &[&str], folder: &Path) -> bool {
    let program = Path::new(".toolchain").join(tool).join("bin").join(tool);
    if !program.exists() {
        eprintln!("not tested: {} is not there (make clients)", program.display());
        return false;
    }
    let mut command = Command::new(program);
    command.args(args).env("HF_HUB_OFFLINE", "1").env("HF_HOME", folder.join("cache")).env("NO_PROXY", "127.0.0.1");
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{said}");
    true
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// lm-eval's results, and the folder where it logged each question.
fn evaluate(name: &str, server: &Serving, model: &str, path: &str, tasks: &str) -> Option<(Value, PathBuf)> {
    let folder = fresh_folder(name);
    let model_args = format!("model=modulo,base_url={}{path},tokenizer=models/modulo,num_concurrent=4", server.url());
    let args = ["run", "--model", model, "--model_args", &model_args, "--tasks", tasks];
    let budget = ["--gen_kwargs", r#"{"thinking_token_budget": 100}"#];
    let options = ["--include_path", "tests/harnesses", "--apply_chat_template", "--log_samples"];
    let results = folder.join("results.json");
    let output = ["--output_path", results.to_str().unwrap()];
    run("lm-eval", &[&args[..], &budget, &options, &output].concat(), &folder)
        .then(|| (read_json(&written(&folder, "results_")), folder))
}

/// The file whose name begins so.
fn written(folder: &Path, prefix: &str) -> PathBuf {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found = files.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix));
    found.next().unwrap_or_else(|| panic!("no {prefix} in {}", folder.display()))
}

fn samples(folder: &Path, task: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(written(folder, &format!("samples_{task}_2"))).unwrap();
    let samples: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(samples.len(), 4);
    samples
}

/// How likely the model finds this continuation, by what the server says of each token of an echo; and whether each was the
/// likeliest. The harness counts white space at the end of the context to the continuation.
fn loglikelihood(server: &Serving, context: &str, continuation: &str) -> (f64, bool) {
    let prompt = format!("{context}{continuation}");
    let body = json!({"prompt": prompt, "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0});
    let logprobs = &ask(server, COMPLETIONS, &body)["choices"][0]["logprobs"];
    let (begin, end) = (context.trim_end().chars().count() as u64, prompt.chars().count() as u64);
    let offsets = logprobs["text_offset"].as_array().unwrap();
    let within = (0..offsets.len()).filter(|&i| (begin..end).contains(&offsets[i].as_u64().unwrap()));
    within.fold((0.0, true), |(sum, greedy), i| {
        let logprob = logprobs["token_logprobs"][i].as_f64().unwrap();
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        (sum + logprob, greedy && top.values().all(|other| other.as_f64().unwrap() <= logprob))
    })
}

/// The number behind "x = ", as the task's filter takes it.
fn answer_in(text: &str) -> &str {
    let number = text.split("Final Answer: x = ").nth(1).unwrap_or("");
    number.split(|c: char| !c.is_ascii_digit()).next().unwrap()
}

fn accuracy(right: impl Iterator<Item = bool>) -> f64 {
    let right: Vec<bool> = right.collect();
    right.iter().filter(|&&right| right).count() as f64 / right.len() as f64
}

#[test]
fn lm_eval_scores_and_generates_by_completions() {
    let server = serving();
    let tasks = "modulo_choice,modulo";
    let Some((results, folder)) = evaluate("completions", &server, "local-completions", COMPLETIONS, tasks) else {
        return;
    };

    let chosen = samples(&folder, "modulo_choice").into_iter().map(|sample| {
        let scores = [0, 1].map(|choice| {
            let pair = &sample["arguments"][format!("gen_args_{choice}")];
            let said = &sample["filtered_resps"][choice];
            let part = |name: &str| pair[name].as_str().unwrap();
            let (sum, greedy) = loglikelihood(&server, part("arg_0"), part("arg_1"));
            let (theirs, likeliest) = (said[0].as_str().unwrap(), said[1].as_str().unwrap());
            assert!((theirs.parse::<f64>().unwrap() - sum).abs() < 1e-6, "{theirs} is not {sum}: {sample}");
            assert_eq!(likeliest, if greedy { "True" } else { "False" }, "{sample}");
            sum
        });
        let choice = usize::from(scores[1] > scores[0]);
        choice as u64 == sample["doc"]["right"].as_u64().unwrap()
    });
    assert_eq!(results["results"]["modulo_choice"]["acc,none"], accuracy(chosen));

    let answered = samples(&folder, "modulo").into_iter().map(|sample| {
        let pair = &sample["arguments"]["gen_args_0"];
        let body = json!({
            "prompt": pair["arg_0"], "max_tokens": 700, "temperature": 0, "stop": ["<|im_end|>"], "thinking_token_budget": 100
        });
        let text = ask(&server, COMPLETIONS, &body)["choices"][0]["text"].clone();
        assert_eq!(sample["resps"][0][0], text);
        answer_in(text.as_str().unwrap()) == sample["doc"]["answer"]
    });
    assert_eq!(results["results"]["modulo"]["exact_match,answer"], accuracy(answered));
}

#[test]
fn lm_eval_asks_in_chats() {
    let server = serving();
    let Some((results, folder)) = evaluate("chat", &server, "local-chat-completions", CHAT, "modulo") else { return };
    let answered = samples(&folder, "modulo").into_iter().map(|sample| {
        let messages = json!([{"role": "user", "content": sample["doc"]["question"]}]);
        let body = json!({"messages": messages, "max_tokens": 700, "temperature": 0, "thinking_token_budget": 100});
        let content = ask(&server, CHAT, &body)["choices"][0]["message"]["content"].clone();
        assert_eq!(sample["resps"][0][0], content);
        answer_in(content.as_str().unwrap()) == sample["doc"]["answer"]
    });
    assert_eq!(results["results"]["modulo"]["exact_match,answer"], accuracy(answered));
}

#[test]
fn guidellm_counts_what_metrics_count() {
    let server = serving();
    let url = server.url();
    let args = ["benchmark", "run", "--target", &url, "--processor", "models/modulo"];
    let load = ["--rate-type", "concurrent", "--rate", "2", "--max-requests", "6"];
    let data = ["--data", "prompt_tokens=40,output_tokens=12"];
    let folder = fresh_folder("guidellm");
    let path = folder.join("results.json");
    let output = ["--output-path", path.to_str().unwrap()];
    if !run("guidellm", &[&args[..], &load, &data, &output].concat(), &folder) {
        return;
    }
    let report = read_json(&path);
    let [benchmark] = &report["benchmarks"].as_array().unwrap()[..] else { panic!("one benchmark") };
    let totals = json!({"successful": 6, "errored": 0, "incomplete": 0, "total": 6});
    assert_eq!(benchmark["request_totals"], totals);
    let requests = benchmark["requests"]["successful"].as_array().unwrap();
    for request in requests {
        let prompt = ask(&server, "/tokenize", &json!({"prompt": request["prompt"]}));
        assert_eq!((&request["prompt_tokens"], &request["output_tokens"]), (&prompt["count"], &12.into()), "{request}");
        let of = |name: &str| request[name].as_f64().unwrap();
        assert!(0.0 < of("time_to_first_token_ms") && of("time_to_first_token_ms") <= 1000.0 * of("request_latency"));
    }
    // Each of its processes tries the connection first, by a token after this text.
    let tries = server.metric("vllm:e2e_request_latency_seconds_count") - 6.0;
    let tried = ask(&server, "/tokenize", &json!({"prompt": "Test connection"}))["count"].as_f64().unwrap();
    let sum = |name: &str| requests.iter().map(|request| request[name].as_f64().unwrap()).sum::<f64>();
    assert_eq!(sum("prompt_tokens") + tries * tried, server.metric("vllm:prompt_tokens_total"));
    assert_eq!(sum("output_tokens") + tries, server.metric("vllm:generation_tokens_total"));
}
