//! The binary as a user meets it: what it prints, and what it says to bad input.

use crate::loading::safetensors;
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

const MODEL: &str = "models/modulo";
/// A first guess that is wrong, and right after one "Wait".
pub const QUESTION: &str = "Find x with 7x + 4 = 1 (mod 11).";

/// Beside the tests when they run away from where they were built.
pub fn binary() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_BIN_EXE_ponder"));
    if built.exists() { built } else { std::env::current_exe().unwrap().with_file_name("ponder") }
}

pub fn device() -> &'static str {
    match std::env::var("TEST_DEVICE").as_deref() {
        Ok("cuda") => "cuda:0",
        _ => "host",
    }
}

/// Runs `ponder` with these arguments and this standard input, on the device under test unless the arguments name one.
pub fn ponder(args: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(binary());
    command.args(args).env_remove("NO_COLOR").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if !args.contains(&"--device") && !args.contains(&"--help") {
        command.args(["--device", device()]);
    }
    let mut child = command.spawn().expect("the binary runs");
    // A program that refuses its flags may not read its input.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn generate(args: &[&str]) -> String {
    let output = ponder(&[&["generate", MODEL], args].concat(), b"");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn generate_json(args: &[&str]) -> Value {
    let text = generate(&[args, &["--json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
}

/// Exit code 2, nothing on standard output, and an error that names each of `words`.
pub fn refused(args: &[&str], words: &[&str]) {
    let output = ponder(args, b"");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{args:?}");
    assert!(!error.contains("panicked"), "{args:?}: {error}");
    for word in words {
        assert!(error.contains(word), "{args:?}: {error:?} does not say {word:?}");
    }
}

/// A copy of the tiny model with one file changed. Removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn with(name: &str, file: &str, change: impl Fn(&[u8]) -> Vec<u8>) -> Folder {
        let folder = std::env::temp_dir().join(format!("ponder-cli-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for entry in std::fs::read_dir(MODEL).unwrap() {
            let path = entry.unwrap().path();
            let copy = folder.join(path.file_name().unwrap());
            if path.ends_with(file) {
                std::fs::write(copy, change(&std::fs::read(&path).unwrap())).unwrap();
            } else {
                std::os::unix::fs::symlink(path.canonicalize().unwrap(), copy).unwrap();
            }
        }
        Folder(folder)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A change of one JSON file.
fn edit(change: impl Fn(&mut Value)) -> impl Fn(&[u8]) -> Vec<u8> {
    move |bytes| {
        let mut value = serde_json::from_slice(bytes).unwrap();
        change(&mut value);
        serde_json::to_vec(&value).unwrap()
    }
}

/// A change of a safetensors file's header; the data stays.
fn edit_header(change: impl Fn(&str) -> String) -> impl Fn(&[u8]) -> Vec<u8> {
    move |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = change(std::str::from_utf8(&bytes[8..8 + length]).unwrap());
        safetensors(&header, &bytes[8 + length..])
    }
}

#[test]
fn bad_folders_are_refused() {
    refused(&["generate", "no/such/folder", "hi"], &["no/such/folder", "no such folder"]);
    refused(&["generate", "Cargo.toml", "hi"], &["Cargo.toml"]);
    refused(&["generate", "tests", "hi"], &["config.json"]);
    refused(&["inspect", "no/such/folder"], &["no/such/folder"]);
    refused(&["chat", "no/such/folder"], &["no/such/folder"]);
    let config = |name, change: fn(&mut Value), words: &[&str]| {
        let folder = Folder::with(name, "config.json", edit(change));
        refused(&["generate", folder.path(), "hi"], words);
    };
    config("architecture", |c| c["architectures"] = json!(["MambaForCausalLM"]), &["config.json", "MambaForCausalLM"]);
    config("heads", |c| c["num_attention_heads"] = json!(3), &["config.json", "num_"]);
    config("vocabulary", |c| c["vocab_size"] = json!(256), &["tokenizer.json", "256"]);
    let more = |c: &mut Value| (c["num_hidden_layers"], c["layer_types"]) = (json!(5), Value::Null);
    config("layers", more, &["model.layers.4", "safetensors"]);
    let folder = Folder::with("json", "config.json", |_| b"{".to_vec());
    refused(&["generate", folder.path(), "hi"], &["config.json", "JSON"]);
    let folder = Folder::with(
        "template",
        "tokenizer_config.json",
        edit(|c| c["chat_template"] = json!("{{ raise_exception('no') }}")),
    );
    refused(&["generate", folder.path(), "hi"], &["chat template", "no"]);
    let folder = Folder::with("no-template", "tokenizer_config.json", edit(|c| c["chat_template"] = Value::Null));
    refused(&["generate", folder.path(), "hi"], &["chat template", "--raw"]);
    let folder = Folder::with("thinking", "thinking.json", |_| b"{\"start\": 1}".to_vec());
    refused(&["generate", folder.path(), "hi"], &["thinking.json"]);
}

#[test]
fn bad_weights_are_refused() {
    let tensor = "model.layers.2.mlp.up_proj.weight";
    let weights = |name, change: &dyn Fn(&[u8]) -> Vec<u8>, words: &[&str]| {
        let folder = Folder::with(name, "model.safetensors", change);
        refused(&["generate", folder.path(), "hi"], &[&["safetensors"], words].concat());
    };
    let renamed = edit_header(|h| h.replace(tensor, "model.layers.2.mlp.upwards.weight"));
    weights("missing", &renamed, &[tensor]);
    let twice = edit_header(|h| h.replace(tensor, "model.layers.1.mlp.up_proj.weight"));
    weights("twice", &twice, &["model.layers.1.mlp.up_proj.weight"]);
    let header = |change: fn(&mut Value)| {
        edit_header(move |h| {
            let mut value = serde_json::from_str(h).unwrap();
            change(&mut value);
            value.to_string()
        })
    };
    weights(
        "shape",
        &header(|h| h["model.layers.2.mlp.up_proj.weight"]["shape"] = json!([256, 704])),
        &[tensor, "704"],
    );
    weights("dtype", &header(|h| h["model.layers.2.mlp.up_proj.weight"]["dtype"] = json!("I16")), &[tensor, "I16"]);
    weights("overlap", &header(|h| h["model.norm.weight"]["data_offsets"] = json!([0, 512])), &["overlaps"]);
    weights(
        "outside",
        &header(|h| h["model.norm.weight"]["data_offsets"] = json!([1u64 << 40, (1u64 << 40) + 512])),
        &["model.norm.weight"],
    );
    weights("truncated", &|bytes| bytes[..bytes.len() - 100].to_vec(), &[]);
    weights("header", &|bytes| [&(1u64 << 50).to_le_bytes(), &bytes[8..]].concat(), &["header"]);
    weights("stub", &|_| vec![1, 2, 3], &[]);
}

#[test]
fn bad_requests_are_refused() {
    let bad = |args: &[&str], words: &[&str]| refused(&[&["generate", MODEL], args].concat(), words);
    bad(&["hi", "--max-context", "30"], &["prompt", "30", "--max-context"]);
    bad(&["hi", "--thinking", "none", "--max-thinking-tokens", "5"], &["max_thinking_tokens", "--thinking"]);
    bad(&["hi", "--max-thinking-tokens", "5", "--min-thinking-tokens", "6"], &["thinking", "5", "6"]);
    bad(&["hi", "--n-ignore", "1", "--ignore-string", &"long ".repeat(200)], &["ignore"]);
    bad(&["hi", "--max-thinking-tokens", "5", "--end-string", "no delimiter here"], &["end_string"]);
    bad(&["hi", "--thinking", "think-tags"], &["thinking", "<think>"]);
    bad(&["hi", "--thinking-start", "<a>"], &["--thinking-end"]);
    bad(&["hi", "--temperature", "-1"], &["temperature"]);
    bad(&["hi", "--temperature", "nan"], &["temperature"]);
    bad(&["hi", "--top-p", "1.5"], &["top_p"]);
    bad(&["hi", "--min-p", "-0.1"], &["min_p"]);
    bad(&["hi", "--repetition-penalty", "0"], &["repetition_penalty"]);
    bad(&["hi", "--logit-bias", "600=1"], &["logit_bias", "600"]);
    bad(&["hi", "--logit-bias", "600"], &["--logit-bias", "ID=VALUE"]);
    bad(&["hi", "--allowed-ids", "1,600"], &["allowed", "600"]);
    bad(&["hi", "--json", "--logprobs", "21"], &["logprobs", "20"]);
    bad(&["hi", "--logprobs", "2"], &["--json"]);
    bad(&["hi", "--prompt-logprobs", "2"], &["--json"]);
    bad(&["hi", "--max-tokens", "0"], &["--max-tokens"]);
    bad(&["hi", "--min-tokens", "9", "--max-tokens", "8"], &["min_tokens"]);
    bad(&["hi", "--stop", ""], &["stop"]);
    bad(&[""], &["prompt", "empty"]);
    bad(&[], &["prompt", "empty"]);
    bad(&["--prompt-ids", "1,400"], &["prompt", "400"]);
    bad(&["--prompt-ids", "1,x"], &["--prompt-ids"]);
    bad(&["hi", "--prompt-ids", "1"], &["--prompt-ids"]);
    bad(&["--prompt-file", "no/such/file"], &["no/such/file"]);
    bad(&["hi", "--kv-pages", "4000000000"], &["--kv-pages"]);
    bad(&["hi", "--device", "tpu"], &["--device", "tpu", "cuda:N"]);
    bad(&["hi", "--device", "cuda:99"], &[]);
    bad(&["hi", "--no-such-flag"], &["--no-such-flag"]);
    refused(&["perform", MODEL], &["perform"]);
}

/// The numbers are those of a plain float32 implementation in numpy.
#[test]
fn a_wait_helps() {
    let first = generate_json(&[QUESTION, "--temperature", "0"]);
    assert_eq!(first["answer"], "Final Answer: x = 8");
    assert_eq!(first["thinking"], json!({"reasoning_tokens": 162, "ignores_used": 0, "max_hit": false}));
    let second = generate_json(&[QUESTION, "--temperature", "0", "--n-ignore", "1", "--ignore-string", "Wait"]);
    assert_eq!(second["answer"], "Final Answer: x = 9");
    assert_eq!(second["thinking"], json!({"reasoning_tokens": 292, "ignores_used": 1, "max_hit": false}));
    assert_eq!(second["reasoning"].as_str().unwrap().matches("Wait").count(), 1);
    let cut = generate_json(&[QUESTION, "--temperature", "0", "--max-thinking-tokens", "20"]);
    assert_eq!(cut["thinking"], json!({"reasoning_tokens": 20, "ignores_used": 0, "max_hit": true}));
    assert!(cut["text"].as_str().unwrap().contains("\n<|im_start|>answer\nFinal Answer:"));
    assert!(cut["answer"].as_str().unwrap().starts_with("Final Answer: x = "));
}

#[test]
fn json_has_its_fields() {
    let object = generate_json(&[QUESTION, "--max-tokens", "6", "--logprobs", "3"]);
    let fields: Vec<&str> = object.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = [
        "prompt_ids",
        "token_ids",
        "text",
        "reasoning",
        "answer",
        "logprobs",
        "prompt_logprobs",
        "finish_reason",
        "usage",
        "thinking",
        "speed",
    ];
    assert_eq!(fields, expected);
    let prompt = object["prompt_ids"].as_array().unwrap().len();
    assert_eq!(object["finish_reason"], "length");
    assert_eq!(object["usage"], json!({"prompt_tokens": prompt, "completion_tokens": 6, "total_tokens": prompt + 6}));
    assert_eq!(object["token_ids"].as_array().unwrap().len(), 6);
    let logprobs = object["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 6);
    for (one, id) in logprobs.iter().zip(object["token_ids"].as_array().unwrap()) {
        let top = one["top"].as_array().unwrap();
        assert_eq!((&one["id"], top.len()), (id, 3));
        assert_eq!((&top[0]["id"], &top[0]["logprob"]), (id, &one["logprob"]), "greedy takes the most likely");
        let values: Vec<f64> = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert!(values[0] <= 0.0 && values.is_sorted_by(|a, b| a >= b), "{values:?}");
    }
    assert_eq!(object["prompt_logprobs"], Value::Null);
    let without = generate_json(&[QUESTION, "--max-tokens", "2", "--thinking", "none"]);
    assert_eq!([&without["logprobs"], &without["thinking"], &without["reasoning"]], [&Value::Null; 3]);
    // What was drawn is scored alike as part of a prompt, but for how decode and prefill round.
    let list = |object: &Value, fields: &[&str]| -> Vec<u64> {
        let all = fields.iter().flat_map(|field| object[field].as_array().unwrap());
        all.map(|id| id.as_u64().unwrap()).collect()
    };
    let ids: Vec<String> = list(&object, &["prompt_ids", "token_ids"]).iter().map(u64::to_string).collect();
    let scored = ["--prompt-ids", &ids.join(","), "--max-tokens", "1", "--prompt-logprobs", "3"];
    let scored = generate_json(&scored)["prompt_logprobs"].as_array().unwrap().clone();
    assert_eq!(scored.len(), prompt + 5);
    for (one, drawn) in scored[prompt - 1..].iter().zip(logprobs) {
        assert_eq!((&one["id"], one["top"].as_array().unwrap().len()), (&drawn["id"], 3));
        let difference = one["logprob"].as_f64().unwrap() - drawn["logprob"].as_f64().unwrap();
        assert!(difference.abs() < 0.1, "{one} {drawn}");
    }
}

/// A question by any road is the same question.
#[test]
fn prompts_come_from_anywhere() {
    let short = ["--max-tokens", "3", "--json"];
    let ids = |args: &[&str], input: &str| {
        let output = ponder(&[&["generate", MODEL], args, &short].concat(), input.as_bytes());
        let object: Value = serde_json::from_slice(&output.stdout).unwrap();
        object["prompt_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect::<Vec<_>>()
    };
    let argument = ids(&[QUESTION], "");
    assert_eq!(ids(&[], &format!("{QUESTION}\n")), argument);
    let file = std::env::temp_dir().join(format!("ponder-cli-{}-prompt", std::process::id()));
    std::fs::write(&file, format!("{QUESTION}\n")).unwrap();
    assert_eq!(ids(&["--prompt-file", file.to_str().unwrap()], ""), argument);
    std::fs::remove_file(file).unwrap();
    let list = argument.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    assert_eq!(ids(&["--prompt-ids", &list], ""), argument);

    let raw = ids(&["--raw", QUESTION], "");
    assert!(raw.len() < argument.len() && argument.windows(raw.len()).any(|w| w == raw), "the template is around it");
    let system = ids(&["--system", "Be brief.", QUESTION], "");
    assert_ne!(system, argument);
}

#[test]
fn answers_end_where_they_should() {
    let plain = generate_json(&[QUESTION, "--max-tokens", "60"]);
    let text = plain["text"].as_str().unwrap();
    // In the middle of a token or across several.
    for stop in ["mod 11", "ry ", ", +"] {
        let cut = generate_json(&[QUESTION, "--max-tokens", "60", "--stop", "no such text", "--stop", stop]);
        assert_eq!(cut["text"].as_str().unwrap(), text.split(stop).next().unwrap(), "{stop:?}");
        assert_eq!(cut["finish_reason"], "stop");
        let (cut, plain) = (cut["token_ids"].as_array().unwrap(), plain["token_ids"].as_array().unwrap());
        assert!(cut.len() < plain.len() && plain.starts_with(cut), "tokens past the end are dropped");
    }
    let asked = ["--thinking", "none", "--temperature", "0"];
    let raw = [&[QUESTION, "--raw", "--max-tokens", "40"], &asked[..]].concat();
    let plain = generate_json(&raw);
    let plain = plain["token_ids"].as_array().unwrap();
    let stopped = generate_json(&[&raw[..], &["--stop-ids", &plain[2].to_string()]].concat());
    assert_eq!(stopped["token_ids"].as_array().unwrap(), &plain[..3], "the stop id is the last one");
    assert_eq!(stopped["finish_reason"], "stop");

    let short = generate_json(&[&[QUESTION, "--max-thinking-tokens", "4"], &["--temperature", "0"][..]].concat());
    assert_eq!(short["finish_reason"], "stop");
    let end = short["token_ids"].as_array().unwrap().last().unwrap();
    assert_eq!(end, 2, "<|im_end|>");
    let tokens = short["token_ids"].as_array().unwrap().len();
    let most = (tokens + 5).to_string();
    let ignored = generate_json(&[
        QUESTION,
        "--max-thinking-tokens",
        "4",
        "--temperature",
        "0",
        "--ignore-eos",
        "--max-tokens",
        &most,
    ]);
    assert_eq!(ignored["token_ids"].as_array().unwrap().len(), tokens + 5);
    assert_eq!(ignored["finish_reason"], "length");
}

#[test]
fn colours_are_for_terminals() {
    let output = ponder(&["generate", MODEL, QUESTION, "--max-thinking-tokens", "4", "--temperature", "0"], b"");
    let text = String::from_utf8(output.stdout).unwrap();
    let report = String::from_utf8(output.stderr).unwrap();
    assert!(!text.contains('\x1b') && text.ends_with('\n'), "{text:?}");
    assert!(
        report.contains("4 thinking tokens, 0 ends ignored, maximum hit") && report.contains("tokens/s"),
        "{report:?}"
    );
    assert!(!report.contains('\x1b') && report.lines().count() == 1, "no progress bar either: {report:?}");
}

/// A reader who has seen enough is no error.
#[test]
fn a_broken_pipe_is_quiet() {
    let mut child = Command::new(binary())
        .args(["generate", MODEL, QUESTION, "--device", device()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn inspect_says_what_there_is() {
    let output = ponder(&["inspect", MODEL], b"");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    for word in ["Qwen2", "hidden 256", "KV cache", "attn_decode_d64", "sample", "<|im_start|>think"] {
        assert!(text.contains(word), "{text} does not say {word}");
    }
}

#[test]
fn weights_are_quantised_where_asked() {
    let weights = |flags: &[&str]| {
        let output = ponder(&[&["inspect", MODEL], flags].concat(), b"");
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find(|line| line.contains("MiB  weights")).unwrap_or_else(|| panic!("{text}"));
        let mebibytes: f64 = line.split_whitespace().next().unwrap().parse().unwrap();
        (mebibytes, text.contains("3.1 million parameters in fp8 and bf16"))
    };
    let (bf16, fp8) = (weights(&[]), weights(&["--quantize", "fp8"]));
    assert!(!bf16.1 && fp8.1 && 0.5 * bf16.0 < fp8.0 && fp8.0 < 0.6 * bf16.0, "{bf16:?} {fp8:?}");
    let question = generate_json(&[QUESTION, "--quantize", "fp8", "--n-ignore", "1", "--ignore-string", "Wait"]);
    assert!(question["answer"].as_str().unwrap().ends_with("x = 9"), "{question}");
    refused(&["generate", MODEL, "x", "--quantize", "int4"], &["--quantize", "int4", "fp8"]);
    let simulated = ["generate", MODEL, "x", "--quantize", "fp8", "--device", "sim:h100"];
    refused(&simulated, &["--quantize", "sim:h100,fp8"]);
}

/// A conversation at a terminal (python3's pty): colours, Ctrl-C stops the answer and not the program, Ctrl-D ends.
#[test]
fn a_chat_at_a_terminal() {
    let script = "tests/chat.py";
    let output = Command::new("python3").arg(script).arg(binary()).args(["chat", MODEL, "--device", device()]).output();
    let output = output.expect("python3 is a prerequisite");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Answers in order, those of bad lines among them; an interrupted run goes on where it ended, and comes to the same.
#[test]
fn a_file_of_requests() {
    let folder = std::env::temp_dir().join(format!("ponder-batch-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (input, output) = (folder.join("requests.jsonl"), folder.join("answers.jsonl"));
    let mut lines: Vec<String> = (0..40)
        .map(|i| {
            json!({"id": format!("r{i}"), "prompt": format!("Question {i}"), "seed": i, "n_ignore": i % 3}).to_string()
        })
        .collect();
    lines[7] = json!({"prompt": "Too hot", "temperature": 1000}).to_string();
    lines[8] = "{".into();
    lines[9] = json!({"raw_prompt": "2 + 2 =", "max_tokens": 3, "id": [1, 2]}).to_string();
    std::fs::write(&input, lines.join("\n")).unwrap();
    let device = ["--device", "sim:h100,instant", "--max-tokens", "60", "--max-sequences", "8"];
    let run = || {
        let files = ["batch", MODEL, input.to_str().unwrap(), "--output", output.to_str().unwrap()];
        let result = ponder(&[&files[..], &device].concat(), b"");
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        std::fs::read_to_string(&output).unwrap()
    };
    let whole = run();
    let answers: Vec<Value> = whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), 40);
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(answer["index"], i);
        match i {
            7 => assert!(answer["error"].as_str().unwrap().contains("temperature")),
            8 => assert!(answer["error"].as_str().unwrap().contains("not a request")),
            9 => assert_eq!((&answer["id"], &answer["usage"]["completion_tokens"]), (&json!([1, 2]), &json!(3))),
            _ => assert_eq!((&answer["id"], answer["error"].is_null()), (&json!(format!("r{i}")), true)),
        }
    }
    assert_eq!(run(), whole, "nothing is left to do");
    // In the middle of a line, and of a character.
    let middle = (whole.len() / 2..).find(|&i| !whole.is_char_boundary(i)).unwrap();
    std::fs::write(&output, &whole.as_bytes()[..middle]).unwrap();
    assert_eq!(run(), whole);
    std::fs::write(&output, "something else\n").unwrap();
    let flags = ["batch", MODEL, input.to_str().unwrap(), "--output", output.to_str().unwrap()];
    refused(&[&flags[..], &device].concat(), &["answers.jsonl", "line 1"]);
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "something else\n", "it is left alone");
    std::fs::remove_dir_all(&folder).unwrap();
}
