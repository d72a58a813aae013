//! The benches: what they report and refuse, the kernel that makes their data, and models of dummy weights.

use crate::cli::{device, ponder, refused};
use crate::devices::{devices, download};
use half::bf16;
use ponder::batch::{Batch, PrefillChunk, Work};
use ponder::bench::{Roofline, percentile};
use ponder::config::ModelConfig;
use ponder::device::Device;
use ponder::executor::{Executor, ExecutorOptions};
use ponder::kernels::ALL;
use ponder::model::Weights;
use ponder::ops;
use serde_json::Value;
use std::path::{Path, PathBuf};

// ---- random data ----

/// `count` elements between others that must stay.
fn random(device: &Device, count: usize, seed: u64, deviation: f32) -> Vec<bf16> {
    let buffer = device.alloc((count + 5) * 2).unwrap();
    device.fill(&buffer, 0, buffer.bytes(), 0x77).unwrap();
    device.launch(&ops::random(device, &buffer, count, seed, deviation)).unwrap();
    let mut values: Vec<bf16> = download(device, &buffer);
    assert!(values[count..].iter().all(|x| x.to_bits() == 0x7777), "{count} elements, and more were written");
    values.truncate(count);
    values
}

#[test]
fn random_data_is_the_same_everywhere_at_any_size() {
    let long = random(&devices()[0], 9000, 7, 0.5);
    for device in devices() {
        for count in [1, 7, 8, 9, 2047, 2049, 9000] {
            assert_eq!(random(&device, count, 7, 0.5), long[..count], "{count} on {}", device.describe());
        }
        assert_ne!(random(&device, 100, 8, 0.5), long[..100], "another seed");
        assert_ne!(random(&device, 100, 7 + (1 << 32), 0.5), long[..100], "a seed's upper half");
    }
}

#[test]
fn random_data_is_normal_enough() {
    let device = devices().pop().unwrap();
    let values: Vec<f64> = random(&device, 1 << 18, 3, 2.0).iter().map(|x| x.to_f64()).collect();
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let moment = |n: i32| values.iter().map(|x| (x / 2.0).powi(n)).sum::<f64>() / count;
    // Of the mean of so many the deviation is 2 / 512.
    assert!(mean.abs() < 4.0 * 2.0 / 512.0, "mean {mean}");
    assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
    assert!((moment(4) - 2.7).abs() < 0.1, "kurtosis {}", moment(4));
    let within = values.iter().filter(|x| x.abs() <= 2.0).count() as f64 / count;
    assert!((within - 0.67).abs() < 0.005, "{within} within one deviation");
    let neighbours = values.windows(2).map(|w| w[0] * w[1] / 4.0).sum::<f64>() / count;
    assert!(neighbours.abs() < 0.01, "neighbours correlate: {neighbours}");
    let distance8 = values.windows(5).map(|w| w[0] * w[4] / 4.0).sum::<f64>() / count;
    assert!(distance8.abs() < 0.01, "the halves of a vector correlate: {distance8}");
}

// ---- dummy weights ----

/// Logits after a prompt of a model with dummy weights.
fn dummy_logits(device: &Device) -> Vec<f32> {
    let config = ModelConfig::load(Path::new(crate::modulo::FOLDER)).unwrap();
    let traits = vec![64; config.vocab_size];
    let options = ExecutorOptions { graphs: false, ..Default::default() };
    let mut executor = Executor::new(device, &config, Weights::Dummy, &traits, &options, &mut |_, _| {}).unwrap();
    let chunk = PrefillChunk { slot: 1, tokens: (0..70).collect(), position: 0, last: true, scoring: None };
    let pages = (0..2).map(|i| ponder::batch::PageEntry { slot: 1, index: i, page: i + 1 }).collect();
    executor.submit(&Batch { pages, work: Work::Prefill(vec![chunk]), ..Default::default() }).unwrap();
    executor.logits(1).unwrap()
}

#[test]
fn dummy_weights_are_the_same_each_time_and_their_logits_finite() {
    let device = devices().pop().unwrap();
    let logits = dummy_logits(&device);
    assert!(logits.iter().all(|x| x.is_finite()));
    let (least, most) = logits.iter().fold((f32::MAX, f32::MIN), |(a, b), &x| (a.min(x), b.max(x)));
    assert!(most - least > 0.1, "all logits are the same: {least} to {most}");
    assert_eq!(logits, dummy_logits(&device));
}

/// A folder with config.json alone. Removed when dropped.
struct Config(PathBuf);

impl Config {
    fn new(name: &str) -> Config {
        let folder = std::env::temp_dir().join(format!("ponder-bench-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::copy(Path::new(crate::modulo::FOLDER).join("config.json"), folder.join("config.json")).unwrap();
        Config(folder)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

// ---- reports ----

#[test]
fn the_roofline_is_what_memory_or_arithmetic_need() {
    let roofline = Roofline { bytes_per_second: 2e12, flops_per_second: 1e15, element_bytes: 2 };
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    near(roofline.percent(4_000_000, 0, 4e-6), 50.0);
    near(roofline.percent(4_000_000, 3_000_000_000, 4e-6), 75.0);
    near(roofline.percent(0, 0, 1.0), 0.0);
}

#[test]
fn percentiles_are_values_that_were_measured() {
    let values: Vec<f64> = (1..=10).map(f64::from).collect();
    assert_eq!([0.0, 50.0, 90.0, 99.0, 100.0].map(|p| percentile(&values, p)), [1.0, 5.0, 9.0, 10.0, 10.0]);
    assert_eq!(percentile(&[4.0], 50.0), 4.0);
}

/// Runs `ponder bench` with `--json`; what it printed and wrote.
fn bench(name: &str, args: &[&str]) -> (String, Value) {
    let file = std::env::temp_dir().join(format!("ponder-bench-{}-{name}.json", std::process::id()));
    let output = ponder(&[&["bench"], args, &["--json", file.to_str().unwrap()]].concat(), b"");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let json = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    chrono::DateTime::parse_from_rfc3339(json["date"].as_str().unwrap()).unwrap();
    assert!(!json["commit"].as_str().unwrap().is_empty());
    assert_eq!(json["roofline"].is_null(), device() == "host");
    (String::from_utf8(output.stdout).unwrap(), json)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

#[test]
fn every_kernel_is_measured() {
    let (table, json) = bench("kernels", &["kernels", "--shapes", "tiny,tiny-d128", "--all-tiles", "--seconds", "0"]);
    assert_eq!(json["schema"], "ponder-bench-kernels");
    let results = json["results"].as_array().unwrap();
    for r in results {
        let us = ["min", "median", "max"].map(|key| number(&r["us"][key]));
        assert!(0.0 < us[0] && us[0] <= us[1] && us[1] <= us[2] && number(&r["us"]["runs"]) >= 5.0, "{r}");
        assert!(number(&r["bytes"]) > 0.0, "{r}");
        assert!(r["shape"].as_object().unwrap().values().all(Value::is_u64), "{r}");
        let seconds = us[1] * 1e-6;
        let rate = |key, per_second: f64| assert!((number(&r[key]) - per_second).abs() <= per_second * 1e-6, "{r}");
        rate("gb_per_s", number(&r["bytes"]) / seconds / 1e9);
        rate("tflop_per_s", number(&r["flops"]) / seconds / 1e12);
        let ops = [
            "gemm",
            "gemv",
            "gemm_fp8",
            "gemv_fp8",
            "attn_prefill",
            "attn_decode",
            "sample",
            "norm",
            "embed",
            "rope",
            "random",
            "unfused",
        ];
        assert!(ops.contains(&r["op"].as_str().unwrap()), "{r}");
        let line = table.lines().filter(|l| l.contains(r["kernel"].as_str().unwrap()));
        assert!(line.count() > 0, "not in the table: {r}");
    }
    let find = |name: &str| results.iter().find(|r| r["kernel"] == name);
    // All but the one that is nothing without a loop around it.
    for kernel in ALL.iter().map(|k| k.name.to_str().unwrap()).filter(|&name| name != "decode_loop") {
        assert!(find(kernel).is_some(), "{kernel} is in no line: give it a shape in engine/bench/kernels.rs");
    }
    let product = find("gemv_residual_m8").unwrap();
    let [rows, n, k] = ["rows", "n", "k"].map(|key| number(&product["shape"][key]));
    assert_eq!(number(&product["flops"]), 2.0 * rows * n * k);
    assert_eq!(number(&product["bytes"]), 2.0 * (n * k + rows * k + 2.0 * rows * n));
}

#[test]
fn a_filter_leaves_the_lines_that_contain_it() {
    let (table, json) =
        bench("filter", &["kernels", "--shapes", "tiny", "--filter", "gemv         down", "--seconds", "0"]);
    let results = json["results"].as_array().unwrap();
    assert_eq!(results.len(), 4);
    assert!(results.iter().all(|r| r["name"] == "down" && r["op"] == "gemv" && r["model"] == "tiny"));
    assert_eq!(table.lines().count(), 2 + 4, "{table}");
}

#[test]
fn bad_flags_are_refused() {
    refused(&["bench", "kernels", "--shapes", "tiny,llama-9"], &["llama-9", "tiny-d128", "qwen2.5-32b"]);
    refused(&["bench", "kernels", "--shapes", "tiny", "--filter", "no such line"], &["--filter", "no such line"]);
    refused(&["bench", "kernels", "--seconds", "-1"], &["--seconds"]);
    let folder = Config::new("refused");
    let model = folder.path();
    refused(&["bench", "latency", model], &["model.safetensors"]);
    refused(&["bench", "latency", model, "--load-format", "gguf"], &["--load-format", "dummy"]);
    refused(&["bench", "latency", model, "--load-format", "dummy", "--batch", "65"], &["--batch 65", "64"]);
    refused(&["bench", "throughput", "no/such/folder"], &["no/such/folder"]);
    let long = ["bench", "throughput", model, "--load-format", "dummy", "--input-tokens", "100000"];
    refused(&long, &["max_context"]);
    let nowhere = ["bench", "kernels", "--shapes", "tiny", "--filter", "rope", "--json", "no/such/folder/x.json"];
    let output = ponder(&nowhere, b"");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no/such/folder/x.json"));
}

#[test]
fn latency_and_throughput_need_only_a_config() {
    let folder = Config::new("load");
    let load = [folder.path(), "--load-format", "dummy", "--input-tokens", "20", "--output-tokens", "6"];
    let load = [&load[..], &["--iterations", "2", "--warmup", "1"]].concat();
    let (table, json) = bench("latency", &[&["latency"], &load[..], &["--batch", "3"]].concat());
    assert_eq!(json["schema"], "ponder-bench-latency");
    assert_eq!((&json["args"]["batch"], &json["args"]["load_format"]), (&3.into(), &"dummy".into()));
    let results = &json["results"];
    for key in ["time_to_first_token_ms", "time_per_output_token_ms"] {
        let p = ["min", "p50", "p90", "p99", "max"].map(|p| number(&results[key][p]));
        assert!(p[0] > 0.0 && p.is_sorted(), "{key}: {p:?}");
    }
    let tokens = 3.0 * 6.0;
    let seconds = number(&results["seconds"]);
    assert!((number(&results["output_tokens_per_second"]) - tokens / seconds).abs() < 1e-6 * tokens / seconds);
    assert!(table.contains("to the first token") && table.contains("output tokens/s"), "{table}");

    let (_, json) = bench("throughput", &[&["throughput"], &load[..], &["--requests", "19"]].concat());
    assert_eq!(json["schema"], "ponder-bench-throughput");
    let (output, total) =
        (number(&json["results"]["output_tokens_per_second"]), number(&json["results"]["total_tokens_per_second"]));
    assert!((total / output - 26.0 / 6.0).abs() < 1e-9, "20 prompt tokens for 6 others: {output} and {total}");
}

/// Against Hugging Face in float32, in the same windows.
#[test]
fn perplexity_is_hugging_faces() {
    let fixtures: Value =
        serde_json::from_slice(&std::fs::read(format!("{}/fixtures.json", crate::modulo::FOLDER)).unwrap()).unwrap();
    let expected = &fixtures["perplexity"];
    let file = std::env::temp_dir().join(format!("ponder-perplexity-{}.txt", std::process::id()));
    std::fs::write(&file, expected["text"].as_str().unwrap()).unwrap();
    let (context, stride) = (expected["context"].to_string(), expected["stride"].to_string());
    let file = file.to_str().unwrap();
    let windows = ["perplexity", crate::modulo::FOLDER, file, "--context", &context, "--stride", &stride];
    let (table, json) = bench("perplexity", &windows);
    assert_eq!(json["schema"], "ponder-bench-perplexity");
    let results = &json["results"];
    assert_eq!(results["tokens"], expected["tokens"]);
    for name in ["perplexity", "bits_per_byte"] {
        let (got, wanted) = (number(&results[name]), number(&expected[name]));
        assert!((got / wanted - 1.0).abs() < 0.01, "{name}: {got}, and in float32 {wanted}");
    }
    assert!(table.contains("perplexity") && table.contains("bits per byte"), "{table}");
    let refused = |more: [&str; 2], words: &str| {
        let output = ponder(&[&["bench"], &windows[..3], &more].concat(), b"");
        let problem = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && problem.contains(words), "{more:?}: {problem}");
    };
    refused(["--context", "100000"], "--context 100000");
    refused(["--stride", "0"], "--stride 0");
    std::fs::write(file, "x").unwrap();
    refused(["--context", "8"], "two");
    std::fs::remove_file(file).unwrap();
}

#[test]
fn weights_alone_are_loaded() {
    let (line, json) = bench("load", &["load", crate::modulo::FOLDER]);
    assert_eq!(json["schema"], "ponder-bench-load");
    let results = &json["results"];
    let file = std::fs::metadata(format!("{}/model.safetensors", crate::modulo::FOLDER)).unwrap().len() as f64;
    let bytes = number(&results["bytes"]);
    assert!(bytes < file && file < 1.01 * bytes, "{bytes} of {file}: all but the header");
    assert!((number(&results["bytes_per_second"]) * number(&results["seconds"]) / bytes - 1.0).abs() < 1e-6);
    assert!(number(&results["peak_resident_bytes"]) > bytes);
    assert!(line.contains("GB/s"), "{line}");
    let output = ponder(&["bench", "load", "benches/models/qwen2.5-7b"], b"");
    assert!(output.status.code() == Some(2) && String::from_utf8_lossy(&output.stderr).contains("model.safetensors"));
}

#[test]
fn every_token_is_judged_once() {
    use ponder::bench::perplexity::windows;
    for tokens in 2..60 {
        for context in 2..12 {
            for stride in 1..context {
                let mut known = 1;
                for window in windows(tokens, context, stride) {
                    assert!(window.end - window.begin <= context && window.judged > 0);
                    assert_eq!(window.end - window.judged, known, "{tokens} {context} {stride}");
                    assert!(known - window.begin >= (context - stride).min(known), "what comes before is there");
                    known = window.end;
                }
                assert_eq!(known, tokens);
            }
        }
    }
}

/// The bench itself fails where the loop gives other tokens.
#[test]
fn one_request_prefills_less_than_the_loop() {
    let question = crate::modulo::problem(4).question();
    let args = ["budget", crate::modulo::FOLDER, "--n-ignore", "0,1", "--question", &question];
    let (table, json) = bench("budget", &args);
    assert_eq!(json["schema"], "ponder-bench-budget");
    assert_eq!((table.lines().count(), json["results"].as_array().unwrap().len()), (5, 2), "{table}");
    for (n_ignore, measurement) in json["results"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&measurement["n_ignore"], &measurement["calls"]), (&n_ignore.into(), &(n_ignore + 2).into()));
        let prefilled = |run: &str| number(&measurement[run]["prefilled_tokens"]);
        let (one, cached, alone) =
            (prefilled("one_request"), prefilled("calls_with_prefix_cache"), prefilled("calls_alone"));
        assert!(one < cached && cached < alone, "{measurement}");
        // Each call's prompt holds the first one's.
        assert!(alone > one * (n_ignore + 2) as f64, "{measurement}");
    }
}

/// The same weights, the same greedy answer; and every token has a finite log-probability.
#[test]
fn a_dummy_model_answers() {
    let args =
        ["generate", crate::modulo::FOLDER, "--load-format", "dummy", "--prompt-ids", "5,6,7", "--max-tokens", "8"];
    let args = [&args[..], &["--temperature", "0", "--ignore-eos", "--json", "--logprobs", "2"]].concat();
    let answer = || -> Value {
        let output = ponder(&args, b"");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (first, second) = (answer(), answer());
    assert_eq!(first["token_ids"].as_array().unwrap().len(), 8);
    assert_eq!(first["token_ids"], second["token_ids"]);
    assert!(first["logprobs"].as_array().unwrap().iter().all(|t| number(&t["logprob"]) < 0.0));
}
