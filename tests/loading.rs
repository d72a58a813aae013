//! Model folders: config, checkpoint, tokenizer, chat template, delimiters; what is good is read as it is, and what is bad is
//! refused with a message that names it.

use crate::random::Random;
use ponder::chat::{ChatTemplate, Message};
use ponder::checkpoint::{Checkpoint, Dtype, parse_header, parse_index};
use ponder::config::{Architecture, ModelConfig};
use ponder::device::Device;
use ponder::device::host::HostOptions;
use ponder::hub;
use ponder::model::{Model, Weights};
use ponder::rope::{Rope, Scaling};
use ponder::thinking::{Delimiters, PROFILES, Profile, ThinkingChoice};
use ponder::tokenizer::{Detokenizer, Tokenizer};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

const MODEL: &str = "models/modulo";

fn tokenizer() -> Tokenizer {
    Tokenizer::load(Path::new(MODEL), 512).unwrap()
}

/// A folder of its own that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("ponder-loading-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Folder {
        std::fs::write(self.0.join(name), bytes).unwrap();
        self
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The error of something that must fail, which has to mention all of `words`.
#[track_caller]
pub fn refused<T>(result: ponder::Result<T>, words: &[&str]) {
    let Err(e) = result else { panic!("accepted; should be refused with {words:?}") };
    let message = e.to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} does not mention {word:?}");
    }
    assert_eq!(e.exit_code(), 2);
}

// ---- config.json ----

fn config_json() -> Value {
    serde_json::from_slice(&std::fs::read(format!("{MODEL}/config.json")).unwrap()).unwrap()
}

fn parse_config(value: &Value) -> ponder::Result<ModelConfig> {
    ModelConfig::parse(value.to_string().as_bytes(), Path::new("config.json"), None, Path::new(""))
}

#[test]
fn the_tiny_model_has_its_shape() {
    let c = ModelConfig::load(Path::new(MODEL)).unwrap();
    assert_eq!(c.architecture, Architecture::Qwen2);
    assert_eq!((c.hidden_size, c.intermediate_size, c.num_layers), (256, 704, 4));
    assert_eq!((c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size), (4, 2, 64, 512));
    assert_eq!((c.rope.theta, c.max_position_embeddings), (10000.0, 4096));
    assert!(c.tie_word_embeddings && c.qkv_bias && !c.qk_norm);
    assert_eq!(c.eos_token_ids, [2, 0]);
}

#[test]
fn both_spellings_of_rope() {
    let mut config = config_json();
    config["rope_parameters"] = Value::Null;
    let rope = |config: &Value| parse_config(config).unwrap().rope;
    let plain = |theta| Rope { theta, scaling: Scaling::None };
    assert_eq!(rope(&config), plain(1e4), "the reference implementation's default");
    config["rope_theta"] = json!(1e6);
    assert_eq!(rope(&config), plain(1e6));
    config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
    assert_eq!(rope(&config), plain(5e5));
    let yarn = Rope {
        theta: 1e6,
        scaling: Scaling::Yarn {
            factor: 4.0,
            original: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
            truncate: true,
        },
    };
    config["rope_scaling"] = json!({"type": "yarn", "factor": 4});
    assert_eq!(rope(&config), yarn);
    assert_eq!(parse_config(&config).unwrap().max_position_embeddings, 16384);
    config["rope_scaling"] = Value::Null;
    config["rope_parameters"] = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6});
    assert_eq!(rope(&config), yarn);
    config["rope_parameters"] = json!({"rope_type": "dynamic", "factor": 4.0});
    assert_eq!(rope(&config), plain(1e6));
    assert_eq!(parse_config(&config).unwrap().max_position_embeddings, 4096, "beyond, it would depend on the calls");
}

#[test]
fn families_differ_in_biases_norms_and_windows() {
    let mut plain = config_json();
    plain.as_object_mut().unwrap().retain(|field, _| field != "layer_types" && field != "sliding_window");
    let of = |class: &str, changes: &[(&str, Value)]| {
        let mut config = plain.clone();
        config["architectures"] = json!([class]);
        changes.iter().for_each(|(field, value)| config[field] = value.clone());
        let c = parse_config(&config).unwrap();
        (c.qkv_bias, c.o_bias, c.qk_norm, c.windows)
    };
    let none = vec![None; 4];
    let on = ("use_sliding_window", json!(true));
    assert_eq!(of("Qwen2ForCausalLM", &[]), (true, false, false, none.clone()));
    assert_eq!(of("Qwen3ForCausalLM", &[]), (false, false, true, none.clone()));
    assert_eq!(of("Qwen3ForCausalLM", &[("attention_bias", json!(true))]), (true, true, true, none.clone()));
    assert_eq!(of("LlamaForCausalLM", &[("attention_bias", json!(true))]), (true, true, false, none.clone()));
    assert_eq!(of("LlamaForCausalLM", &[("sliding_window", json!(7))]), (false, false, false, none.clone()));
    assert_eq!(of("MistralForCausalLM", &[("sliding_window", Value::Null)]), (false, false, false, none.clone()));
    assert_eq!(of("MistralForCausalLM", &[("sliding_window", json!(7))]).3, [Some(7); 4]);
    let layers = ("max_window_layers", json!(3));
    assert_eq!(of("Qwen2ForCausalLM", &[("sliding_window", json!(9)), layers.clone()]).3, none);
    let window = [on.clone(), ("sliding_window", json!(9)), layers];
    assert_eq!(of("Qwen2ForCausalLM", &window).3, [None, None, None, Some(9)]);
    let types = json!(["full_attention", "sliding_attention", "full_attention", "full_attention"]);
    let window = [on, ("sliding_window", json!(9)), ("layer_types", types)];
    assert_eq!(of("Qwen3ForCausalLM", &window).3, [None, Some(9), None, None]);
    assert_eq!(of("MistralForCausalLM", &[]).3, [Some(4096); 4], "absent, it is what the family's class says");
}

#[test]
fn generation_config() {
    let parse = |text: &Value| {
        let path = Path::new("generation_config.json");
        ModelConfig::parse(config_json().to_string().as_bytes(), path, Some(text.to_string().as_bytes()), path)
    };
    let c = parse(&json!({"eos_token_id": [5, 2, 9], "min_p": 0.1, "top_k": 20, "num_beams": 1})).unwrap();
    assert_eq!(c.eos_token_ids, [2, 5, 9], "of both files");
    assert_eq!((c.defaults.min_p, c.defaults.top_k, c.defaults.top_p), (Some(0.1), Some(20), None));
    refused(parse(&json!({"num_beams": 4})), &["num_beams"]);
    refused(parse(&json!({"suppress_tokens": [1]})), &["suppress_tokens"]);
    refused(parse(&json!({"eos_token_id": [512]})), &["eos_token_id", "512"]);
}

#[test]
fn bad_configs_are_refused() {
    let cases: &[(&str, Value, &[&str])] = &[
        ("architectures", json!(["MambaForCausalLM"]), &["MambaForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"]),
        ("architectures", json!("x"), &["architectures"]),
        ("hidden_size", Value::Null, &["hidden_size", "missing"]),
        ("hidden_size", json!(-1), &["hidden_size", "-1"]),
        ("hidden_size", json!(1e30), &["hidden_size"]),
        ("hidden_size", json!(u64::MAX), &["hidden_size"]),
        ("hidden_size", json!("256"), &["hidden_size"]),
        ("hidden_size", json!(257), &["hidden_size", "257"]),
        ("hidden_size", json!(192), &["head_dim", "48"]),
        ("num_key_value_heads", json!(3), &["num_key_value_heads"]),
        ("num_attention_heads", json!(0), &["num_attention_heads"]),
        ("intermediate_size", json!(700), &["intermediate_size", "64"]),
        ("num_hidden_layers", json!(1.5), &["num_hidden_layers"]),
        ("vocab_size", json!(511), &["vocab_size"]),
        ("hidden_act", json!("gelu"), &["hidden_act", "gelu"]),
        ("use_sliding_window", json!("yes"), &["use_sliding_window"]),
        ("layer_types", json!(["full_attention"]), &["layer_types", "1 entries for 4"]),
        ("layer_types", json!(vec!["sliding_attention"; 4]), &["layer_types", "sliding_window"]),
        ("layer_types", json!(vec!["linear_attention"; 4]), &["layer_types", "linear_attention"]),
        ("mlp_bias", json!(true), &["mlp_bias"]),
        ("quantization_config", json!({"quant_method": "gptq"}), &["quantization_config.quant_method", "gptq"]),
        ("partial_rotary_factor", json!(0.5), &["partial_rotary_factor"]),
        ("rms_norm_eps", json!("tiny"), &["rms_norm_eps"]),
        ("rope_parameters", json!({"rope_type": "longrope", "rope_theta": 1e4}), &["rope_parameters", "longrope"]),
        ("rope_parameters", json!({"rope_type": "linear"}), &["rope_parameters", "factor is missing"]),
        ("rope_parameters", json!({"rope_type": "yarn", "factor": -2}), &["rope_parameters", "factor is -2"]),
        ("rope_parameters", json!({"rope_type": "yarn", "factor": 2, "beta_fast": 0.5}), &["beta_fast"]),
        ("rope_parameters", json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}), &["high_freq_factor"]),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
            &["rope_parameters", "high_freq_factor"],
        ),
        ("rope_parameters", json!({"full_attention": {"rope_theta": 1e4}}), &["rope_parameters", "full_attention"]),
        ("rope_parameters", json!({"partial_rotary_factor": 0.25}), &["partial_rotary_factor"]),
        ("rope_scaling", json!({"type": "su"}), &["rope_scaling", "su"]),
        ("rope_parameters", json!({"rope_theta": 1.0}), &["rope_theta"]),
        ("rope_theta", json!([]), &["rope_theta"]),
        ("eos_token_id", json!(512), &["eos_token_id", "512"]),
        ("eos_token_id", json!([1, -2]), &["eos_token_id", "-2"]),
        ("tie_word_embeddings", json!(1), &["tie_word_embeddings"]),
    ];
    for (field, value, words) in cases {
        let mut config = config_json();
        config[field] = value.clone();
        refused(parse_config(&config), &[&["config.json"], *words].concat());
    }
    let parse = |text: &[u8]| ModelConfig::parse(text, Path::new("config.json"), None, Path::new(""));
    refused(parse(b"{"), &["config.json", "JSON"]);
    refused(parse(b"[]"), &["config.json", "object"]);
    refused(parse(&[0xff, 0xfe]), &["config.json", "JSON"]);
    refused(ModelConfig::load(Path::new("/nowhere")), &["/nowhere/config.json"]);
}

// ---- safetensors ----

/// A file of this header and data.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn the_tiny_model_has_its_tensors() {
    let c = Checkpoint::open(Path::new(MODEL)).unwrap();
    let embedding = c.weights("model.embed_tokens.weight", &[512, 256]).unwrap();
    assert_eq!((embedding.dtype, embedding.bytes.len()), (Dtype::Bf16, 512 * 256 * 2));
    assert!(!c.has("lm_head.weight"));
    refused(c.tensor("lm_head.weight", &[512, 256]), &["lm_head.weight", "missing"]);
    refused(c.tensor("model.norm.weight", &[255]), &["model.norm.weight", "[256]", "[255]"]);
}

#[test]
fn bad_headers_are_refused() {
    let cases: &[(&str, &[&str])] = &[
        (
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#,
            &["\"a\"", "twice"],
        ),
        (
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}}"#,
            &["\"b\"", "overlap"],
        ),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, &["0 to 8", "no tensor"]),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, &["8 of 16"]),
        (r#"{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}"#, &["\"a\"", "16 bytes"]),
        (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#, &["\"a\""]),
        (r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}}"#, &["\"a\"", "[3]"]),
        (r#"{"a":{"dtype":"F31","shape":[4],"data_offsets":[0,16]}}"#, &["F31"]),
        (r#"{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}"#, &["\"a\"", "shape"]),
        (r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}"#, &["\"a\""]),
        (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0]}}"#, &["\"a\"", "data_offsets"]),
        (r#"{"a":{"shape":[4],"data_offsets":[0,16]}}"#, &["\"a\"", "dtype"]),
        (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"x":1}}"#, &["\"a\"", "\"x\""]),
        (r#"{"a":7}"#, &["\"a\"", "object"]),
        ("{", &["header"]),
        ("[]", &["header"]),
        (r#"{} x"#, &["header"]),
    ];
    for (header, words) in cases {
        let problem = parse_header(header.as_bytes(), 16).expect_err(header);
        for word in *words {
            assert!(problem.contains(word), "{problem:?} does not mention {word:?}");
        }
    }
    let good = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
    assert_eq!(parse_header(good.as_bytes(), 16).unwrap()[0].1.shape, [2, 2]);
}

#[test]
fn bad_files_are_refused() {
    let folder = Folder::new("files");
    let good = safetensors(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, &[0; 16]);
    refused(Checkpoint::open(Path::new("/nowhere")), &["/nowhere", "no such model folder"]);
    refused(Checkpoint::open(&folder.0), &["model.safetensors"]);
    let cases: &[(&[u8], &[&str])] = &[
        (b"", &["model.safetensors", "truncated"]),
        (b"1234567", &["truncated"]),
        (&u64::MAX.to_le_bytes(), &["header claims"]),
        (&good[..40], &["header claims"]),
        (&good[..good.len() - 1], &["\"a\"", "15 bytes"]),
        (&safetensors("\u{feff}{}", &[]), &["header"]),
    ];
    for (bytes, words) in cases {
        folder.write("model.safetensors", bytes);
        refused(Checkpoint::open(&folder.0), words);
    }
    folder.write("model.safetensors", &good);
    assert!(Checkpoint::open(&folder.0).unwrap().has("a"));
}

#[test]
fn shards() {
    let folder = Folder::new("shards");
    let shard = |name: &str| {
        safetensors(&format!(r#"{{"{name}":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}}}"#), b"1234")
    };
    folder.write("1.safetensors", shard("a")).write("2.safetensors", shard("b"));
    let index = |a: &str, b: &str| json!({"weight_map": {"a": a, "b": b}}).to_string();
    folder.write("model.safetensors.index.json", index("1.safetensors", "2.safetensors"));
    let checkpoint = Checkpoint::open(&folder.0).unwrap();
    assert_eq!(checkpoint.tensor("b", &[4]).unwrap().bytes, b"1234");
    assert_eq!(checkpoint.bytes(), 8);

    folder.write("model.safetensors.index.json", index("1.safetensors", "1.safetensors"));
    refused(Checkpoint::open(&folder.0), &["\"b\"", "1.safetensors"]);
    folder.write("model.safetensors.index.json", index("1.safetensors", "3.safetensors"));
    refused(Checkpoint::open(&folder.0), &["3.safetensors"]);
    folder.write("2.safetensors", shard("a"));
    folder.write("model.safetensors.index.json", index("1.safetensors", "2.safetensors"));
    refused(Checkpoint::open(&folder.0), &["\"a\"", "another shard"]);
    for outside in ["../1.safetensors", "/etc/1.safetensors", "x/1.safetensors", ".safetensors", "1.bin"] {
        let problem = parse_index(index(outside, "2.safetensors").as_bytes()).expect_err(outside);
        assert!(problem.contains(outside), "{problem}");
    }
    assert!(parse_index(b"{}").unwrap_err().contains("weight_map"));
}

/// What lies behind the names: no loop, pipe or folder is waited for, followed for ever or mapped.
#[test]
fn links_that_lead_nowhere() {
    use std::os::unix::fs::symlink;
    let folder = Folder::new("links");
    let at = |name: &str| folder.0.join(name);
    let again = |name: &str| {
        let _ = std::fs::remove_file(at(name));
        at(name)
    };
    symlink("model.safetensors", again("model.safetensors")).unwrap();
    refused(Checkpoint::open(&folder.0), &["model.safetensors", "symbolic links"]);
    symlink("gone.safetensors", again("model.safetensors")).unwrap();
    refused(Checkpoint::open(&folder.0), &["model.safetensors", "No such file"]);
    symlink(".", again("model.safetensors")).unwrap();
    refused(Checkpoint::open(&folder.0), &["model.safetensors", "not a file"]);
    let pipe = again("model.safetensors");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    refused(Checkpoint::open(&folder.0), &["model.safetensors", "not a file"]);
    symlink("b.json", at("model.safetensors.index.json")).unwrap();
    symlink("model.safetensors.index.json", at("b.json")).unwrap();
    refused(Checkpoint::open(&folder.0), &["model.safetensors.index.json", "symbolic links"]);
    again("b.json");
    folder.write("b.json", json!({"weight_map": {"a": "1.safetensors", "b": 7}}).to_string());
    refused(Checkpoint::open(&folder.0), &["model.safetensors.index.json", "\"b\"", "file name"]);
    folder.write("b.json", r#"{"weight_map": {"a": "1.safetensors"}, "weight_map": {}}"#);
    refused(Checkpoint::open(&folder.0), &["weight_map", "twice"]);
    // A cache's snapshots are links to files elsewhere: those are what the user asked for.
    folder.write("b.json", json!({"weight_map": {"a": "1.safetensors"}}).to_string());
    let blob = Folder::new("blob");
    blob.write("a", safetensors(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, b"1234"));
    symlink(blob.0.join("a"), at("1.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(&folder.0).unwrap();
    assert_eq!(checkpoint.tensor("a", &[4]).unwrap().bytes, b"1234");
    refused(checkpoint.weights("a", &[4]), &["\"a\"", "U8", "bf16"]);
}

/// A tiny model of models/golden, to be damaged.
struct Damaged {
    folder: Folder,
    config: Value,
    header: Map<String, Value>,
    data: Vec<u8>,
}

impl Damaged {
    fn new(model: &str) -> Damaged {
        let golden = Path::new("models/golden");
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(golden.join(format!("{model}.json"))).unwrap()).unwrap();
        let weights = json["weights"].as_str().unwrap_or(model);
        let file = std::fs::read(golden.join(format!("{weights}.safetensors"))).unwrap();
        let start = 8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
        let header = serde_json::from_slice(&file[8..start]).unwrap();
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let folder = Folder::new(&format!("damaged-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        Damaged { folder, config: json["config"].take(), header, data: file[start..].to_vec() }
    }

    /// What the header says of a tensor.
    fn says(&mut self, tensor: &str, field: &str, value: Value) {
        self.header[tensor][field] = value;
    }

    fn file(&self) -> Vec<u8> {
        safetensors(&Value::Object(self.header.clone()).to_string(), &self.data)
    }

    /// Its only file.
    fn write(&self) {
        self.folder.write("model.safetensors", self.file());
    }

    /// As two shards that have all tensors, and an index that looks for all in "1.safetensors" but for `other`.
    fn write_shards(&self, other: &str, of_other: &str) {
        let of = |name: &String| (name.clone(), json!(if name == other { of_other } else { "1.safetensors" }));
        let map: Map<String, Value> = self.header.keys().filter(|name| *name != "__metadata__").map(of).collect();
        self.folder.write("model.safetensors.index.json", json!({"weight_map": map}).to_string());
        self.folder.write("1.safetensors", self.file());
    }

    fn load(&self) -> ponder::Result<()> {
        let checkpoint = Checkpoint::open(&self.folder.0)?;
        self.load_opened(&checkpoint)
    }

    fn load_opened(&self, checkpoint: &Checkpoint) -> ponder::Result<()> {
        let path = Path::new("config.json");
        let mut config = ModelConfig::parse(self.config.to_string().as_bytes(), path, None, path).unwrap();
        let weights = Weights::from(checkpoint);
        config.weight_types = weights.types(&config, false)?;
        let device = Device::host(HostOptions::default());
        Model::load(&device, &config, weights, 64, &mut |_, _| {}).map(|_| ())
    }
}

/// From the folder to the device: whatever is wrong is an error that names file and tensor; nothing panics, hangs or is loaded.
#[test]
fn damaged_checkpoints_are_refused() {
    use std::os::unix::fs::symlink;
    const TENSOR: &str = "model.layers.1.mlp.down_proj.weight";
    const OTHER: &str = "model.layers.0.self_attn.q_proj.weight";
    const FILE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    let whole = Damaged::new("llama");
    whole.write();
    whole.load().unwrap();

    // What the index says, and what is behind the names.
    for outside in ["../1.safetensors", "/tmp/1.safetensors", "x/1.safetensors", "..", ""] {
        let model = Damaged::new("llama");
        model.write_shards(TENSOR, outside);
        refused(model.load(), &[INDEX, TENSOR, &format!("{outside:?}")]);
    }
    let model = Damaged::new("llama");
    model.write_shards(TENSOR, "2.safetensors");
    refused(model.load(), &["2.safetensors", "No such file"]);
    symlink("2.safetensors", model.folder.0.join("2.safetensors")).unwrap();
    refused(model.load(), &["2.safetensors", "symbolic links"]);
    std::fs::remove_file(model.folder.0.join("2.safetensors")).unwrap();
    std::fs::create_dir(model.folder.0.join("2.safetensors")).unwrap();
    refused(model.load(), &["2.safetensors", "not a file"]);
    let model = Damaged::new("llama");
    symlink(INDEX, model.folder.0.join(INDEX)).unwrap();
    refused(model.load(), &[INDEX, "symbolic links"]);
    let model = Damaged::new("llama");
    model.write_shards(TENSOR, "2.safetensors");
    model.folder.write("2.safetensors", model.file());
    refused(model.load(), &["2.safetensors", "another shard"]);
    let model = Damaged::new("llama");
    model.write_shards("of nobody", "");
    let index = std::fs::read_to_string(model.folder.0.join(INDEX)).unwrap();
    model.folder.write(INDEX, index.replace(TENSOR, "of.another.name"));
    refused(model.load(), &[INDEX, "\"of.another.name\"", "1.safetensors"]);

    // What a header says of one tensor.
    let lies: &[(&str, Value, &[&str])] = &[
        ("dtype", json!("F32"), &["does not fill"]),
        ("dtype", json!("U8"), &["does not fill"]),
        ("dtype", json!("I16"), &["is I16", "bf16, fp16 and fp32"]),
        ("dtype", json!("F4"), &["F4"]),
        ("shape", json!([128, 64]), &["[128, 64]", "does not fill"]),
        ("shape", json!([64, 256]), &["[64, 256]", "[128, 128]"]),
        ("shape", json!([128, 128, 1]), &["[128, 128, 1]", "[128, 128]"]),
        ("shape", json!([u64::MAX, u64::MAX]), &["does not fill"]),
        ("shape", json!([1u64 << 63, 2, 128]), &["does not fill"]),
        ("shape", json!([-128, -128]), &["shape"]),
        ("data_offsets", json!([0, u64::MAX]), &["not within"]),
        ("data_offsets", json!([u64::MAX, 0]), &["not within"]),
        ("data_offsets", json!([0, 32768]), &["overlaps"]),
    ];
    for (field, value, words) in lies {
        let mut model = Damaged::new("llama");
        model.says(TENSOR, field, value.clone());
        model.write();
        refused(model.load(), &[&[FILE, TENSOR], *words].concat());
    }
    // Bytes where numbers of two are needed, and as many as it says.
    let mut model = Damaged::new("llama");
    let end = model.data.len();
    model.header.retain(|name, _| name != TENSOR);
    model.header.insert(TENSOR.into(), json!({"dtype": "U8", "shape": [128, 128], "data_offsets": [end, end + 16384]}));
    model.data.extend([0; 16384]);
    model.write();
    refused(model.load(), &[FILE, "belong to no tensor"]);
    let begin = whole.header[TENSOR]["data_offsets"][0].clone();
    model.header.insert(
        "filler".into(),
        json!({"dtype": "U8", "shape": [32768], "data_offsets": [begin, begin.as_u64().unwrap() + 32768]}),
    );
    model.write();
    refused(model.load(), &[FILE, TENSOR, "is U8", "bf16, fp16 and fp32"]);
    let mut model = Damaged::new("llama");
    model.header.retain(|name, _| name != "lm_head.weight");
    let text = Value::Object(model.header.clone()).to_string().replace(OTHER, TENSOR);
    model.folder.write(FILE, safetensors(&text, &model.data));
    refused(model.load(), &[FILE, TENSOR, "twice"]);

    // Files that end too early, before they are opened and after.
    let file = whole.file();
    for length in [0, 7, 8, 100, file.len() / 2, file.len() - 1] {
        whole.folder.write(FILE, &file[..length]);
        refused(whole.load(), &[FILE]);
    }
    whole.write();
    let checkpoint = Checkpoint::open(&whole.folder.0).unwrap();
    std::fs::File::options()
        .write(true)
        .open(whole.folder.0.join(FILE))
        .unwrap()
        .set_len(file.len() as u64 / 2)
        .unwrap();
    refused(whole.load_opened(&checkpoint), &[FILE, "truncated"]);

    // Weights of fp8.
    let mut model = Damaged::new("fp8-channel");
    let begin = model.header[OTHER]["data_offsets"][0].as_u64().unwrap() as usize;
    model.data[begin + 300] = 0x7f;
    model.write();
    refused(model.load(), &[FILE, OTHER, "NaN"]);
    let mut model = Damaged::new("fp8-channel");
    let scale = format!("{OTHER}_scale");
    let taken = model.header.shift_remove(&scale).expect("a scale");
    model.header.insert("filler".into(), taken);
    model.write();
    refused(model.load(), &[FILE, OTHER, "no scale"]);
}

// ---- the hub's cache ----

#[test]
fn models_by_name() {
    let cache = Folder::new("hub");
    let missing = hub::find(&cache.0, "o/m").unwrap_err();
    assert!(missing.contains("models--o--m/refs/main") && missing.contains("--download"), "{missing}");
    let model = cache.0.join("models--o--m");
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::create_dir_all(model.join("snapshots/0a1b")).unwrap();
    std::fs::write(model.join("refs/main"), "0a1b\n").unwrap();
    assert_eq!(hub::find(&cache.0, "o/m").unwrap(), model.join("snapshots/0a1b"));
    for commit in ["", "ffff", "../.."] {
        std::fs::write(model.join("refs/main"), commit).unwrap();
        let problem = hub::find(&cache.0, "o/m").unwrap_err();
        assert!(problem.contains("snapshots") && problem.contains(&format!("{commit:?}")), "{problem}");
    }
    std::fs::remove_dir_all(model).unwrap();
    for folder in [MODEL, "/nowhere", "./a/b", "a/b/c", "nowhere"] {
        let resolved = hub::resolve(Path::new(folder), false, |_, _| unreachable!("nothing is fetched"));
        assert_eq!(resolved.unwrap(), Path::new(folder), "no name");
    }
}

// ---- tokenizer ----

#[test]
fn fixture_prompts_have_their_ids() {
    let fixtures: Value = serde_json::from_slice(&std::fs::read(format!("{MODEL}/fixtures.json")).unwrap()).unwrap();
    let tokenizer = tokenizer();
    for case in fixtures["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["prompt_ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), ids);
        assert_eq!(tokenizer.decode(&ids), text);
    }
    assert_eq!(tokenizer.real_tokens(), 382);
    assert_eq!(tokenizer.vocab_size(), 512);
}

#[test]
fn a_tokenizer_must_fit_its_model() {
    refused(Tokenizer::load(Path::new(MODEL), 380).map(|_| ()), &["tokenizer.json", "vocab_size is 380"]);
    refused(Tokenizer::load(Path::new("/nowhere"), 512).map(|_| ()), &["/nowhere/tokenizer.json"]);
    let folder = Folder::new("tokenizer");
    folder.write("tokenizer.json", "{}");
    refused(Tokenizer::load(&folder.0, 512).map(|_| ()), &["tokenizer.json"]);
}

#[test]
fn characters_are_never_split() {
    let tokenizer = tokenizer();
    let mut random = Random(7);
    let alphabet =
        ['a', ' ', '\n', '\u{e9}', '\u{4e2d}', '\u{1f914}', '\u{1f468}', '\u{200d}', '7', '\u{7ff}', '\u{fffd}'];
    for _ in 0..500 {
        let text: String =
            (0..random.below(20)).map(|_| alphabet[random.below(alphabet.len() as u32) as usize]).collect();
        let mut detokenizer = Detokenizer::default();
        let mut out = String::new();
        for id in tokenizer.encode(&text).unwrap() {
            out += &detokenizer.push(tokenizer.token_bytes(id));
            assert!(text.starts_with(&out), "{out:?} is not the beginning of {text:?}");
        }
        out += &detokenizer.finish();
        assert_eq!(out, text);
    }
    let mut broken = Detokenizer::default();
    assert_eq!(broken.push(&[b'a', 0xf0, 0x9f]), "a");
    assert_eq!(broken.push(b"b"), "\u{fffd}b");
    assert_eq!(broken.push(&[0xe4, 0xb8]), "");
    assert_eq!(broken.finish(), "\u{fffd}");
}

#[test]
fn traits_follow_the_bytes() {
    let tokenizer = tokenizer();
    let traits = tokenizer.traits();
    assert_eq!(traits.len(), 512);
    // The truth, by decoding: after any sequence of tokens, the bytes that are missing.
    let mut random = Random(3);
    for _ in 0..2000 {
        let text: String = (0..3).map(|_| ['x', '\u{e9}', '\u{4e2d}', '\u{1f914}'][random.below(4) as usize]).collect();
        let (mut missing, mut bytes) = (0u8, Vec::new());
        for id in tokenizer.encode(&text).unwrap() {
            bytes.extend_from_slice(tokenizer.token_bytes(id));
            let t = traits[id as usize];
            let continuation = t >> 2 & 7;
            missing = if continuation > 0 { missing.saturating_sub(continuation) } else { t & 3 };
            let whole = match std::str::from_utf8(&bytes) {
                Ok(_) => true,
                Err(e) => e.error_len().is_some(),
            };
            assert_eq!(missing == 0, whole, "{text:?} after {bytes:?}");
        }
    }
    for id in 0..512u32 {
        let bytes = tokenizer.token_bytes(id);
        assert_eq!(traits[id as usize] & 64 != 0, !bytes.is_empty());
        assert_eq!(traits[id as usize] & 32 != 0, bytes.ends_with(b"\n"));
    }
}

// ---- chat template ----

fn template(source: &str) -> ponder::Result<ChatTemplate> {
    ChatTemplate::parse(source.into(), Path::new("chat.jinja"), "<s>".into(), "</s>".into())
}

fn render(source: &str) -> ponder::Result<String> {
    let extra = json!({"x": {"a": [1, "\u{e9}<\n", null, 1.5, {}], "b": true}});
    template(source)?.render(&[Message::new("user", "Hi")], true, extra.as_object().unwrap())
}

#[test]
fn the_tiny_models_prompt() {
    let template = ChatTemplate::load(Path::new(MODEL)).unwrap().unwrap();
    let prompt = template.render(&[Message::new("user", "Q?")], true, &serde_json::Map::new()).unwrap();
    assert_eq!(
        prompt,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n\
         <|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn hugging_faces_dialect() {
    let cases = [
        ("{{ bos_token }}{{ messages[0].content.upper() }}{{ eos_token }}", "<s>HI</s>"),
        ("{% if add_generation_prompt %}\n  yes\n{% endif %}\n", "  yes\n"),
        ("{{ x | tojson }}", "{\"a\": [1, \"\u{e9}<\\n\", null, 1.5, {}], \"b\": true}"),
        ("{{ x.b | tojson }} {{ [] | tojson }}", "true []"),
        ("{{ {'k': [1]} | tojson(indent=2) }}", "{\n  \"k\": [\n    1\n  ]\n}"),
        ("{{ '\u{e9}' | tojson(ensure_ascii=true) }}", "\"\\u00e9\""),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}.", "."),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 'a,b'.split(',')[1] }}", "b"),
    ];
    for (source, expected) in cases {
        assert_eq!(render(source).unwrap(), expected, "{source}");
    }
}

#[test]
fn bad_templates_are_refused() {
    let cases: &[(&str, &[&str])] = &[
        ("{% if %}", &["chat.jinja", "line 1"]),
        ("\n{{ raise_exception('no system message') }}", &["no system message", "line 2"]),
        ("{{ messages.nothing() }}", &["chat.jinja"]),
        ("{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}", &["chat.jinja"]),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", &["chat.jinja"]),
        ("{{ strftime_now('%Q%!') }}", &["strftime_now"]),
        ("{{ 1 | nofilter }}", &["nofilter"]),
        // Panics of minijinja 2.24: an error here, like the others.
        ("{{ missing[::-1][::-1][0] }}", &["chat.jinja", "does not survive", "index out of bounds"]),
        ("{{ '%.70000f' | format(1.5) }}", &["chat.jinja", "does not survive"]),
    ];
    for (source, words) in cases {
        refused(render(source), words);
    }
    let folder = Folder::new("template");
    assert!(ChatTemplate::load(&folder.0).unwrap().is_none());
    folder.write("tokenizer_config.json", "{");
    refused(ChatTemplate::load(&folder.0).map(|_| ()), &["tokenizer_config.json"]);
    folder.write("tokenizer_config.json", r#"{"chat_template": [{"name": "tool", "template": "x"}]}"#);
    refused(ChatTemplate::load(&folder.0).map(|_| ()), &["default"]);
    folder.write("tokenizer_config.json", r#"{"chat_template": "x", "bos_token": {"content": "B"}}"#);
    folder.write("chat_template.jinja", "{{ bos_token }}");
    let found = ChatTemplate::load(&folder.0).unwrap().unwrap();
    assert_eq!(found.render(&[], false, &serde_json::Map::new()).unwrap(), "B");
}

// ---- delimiters ----

fn profile(name: &str) -> ThinkingChoice {
    ThinkingChoice::Profile(Profile::named(name).unwrap())
}

/// A tokenizer of the tiny model's with these tokens added.
fn tokenizer_with(folder: &Folder, tokens: &[&str]) -> Tokenizer {
    let mut json: Value = serde_json::from_slice(&std::fs::read(format!("{MODEL}/tokenizer.json")).unwrap()).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    for (i, token) in tokens.iter().enumerate() {
        let mut entry = added[0].clone();
        (entry["id"], entry["content"]) = (json!(382 + i), json!(token));
        added.push(entry);
    }
    folder.write("tokenizer.json", json.to_string());
    Tokenizer::load(&folder.0, 512).unwrap()
}

#[test]
fn every_family_thinks_in_its_own_way() {
    let folder = Folder::new("profiles");
    // The tiny vocabulary spells; a word of its own keeps the sentence within what can be injected.
    let words =
        "Considering the limited time by the user, I have to give the solution based on the thinking directly now.";
    let qwen3 = ["<think>", "</think>", words];
    let r1 = ["<think>", "</think>", "<\u{ff5c}Assistant\u{ff5c}>"];
    let sentence: &str = &format!("{words}\n</think>\n\n");
    // What the vocabulary has, and what is found: start, end, end string, whether that stands on a line of its own.
    type Case<'a> = (&'a [&'a str], &'a str, Option<[&'a str; 3]>, bool);
    let cases: &[Case] = &[
        (&qwen3, "think-tags", Some(["<think>", "</think>", sentence]), false),
        (&r1, "deepseek-r1", Some(["<think>", "</think>", "</think>\n\n"]), true),
        (&["<think>"], "s1", None, false),
    ];
    for (tokens, name, found, new_line) in cases {
        let tokenizer = tokenizer_with(&folder, tokens);
        let auto = Delimiters::resolve(&ThinkingChoice::Auto, &folder.0, &tokenizer).unwrap();
        assert_eq!(auto.is_some(), found.is_some(), "{name}");
        if let (Some(auto), Some([start, end, end_string])) = (auto, found) {
            assert_eq!(Delimiters::resolve(&profile(name), &folder.0, &tokenizer).unwrap().as_ref(), Some(&auto));
            let texts = [&auto.start, &auto.end, &auto.end_string].map(|ids| tokenizer.decode(ids));
            assert_eq!(texts, [*start, *end, *end_string], "{name}");
            assert_eq!((auto.start_in_prompt, auto.newline.is_some()), (false, *new_line), "{name}");
            assert_eq!(tokenizer.decode(&auto.ignore_strings[0]), "Wait");
        }
    }
    assert!(Profile::named("gpt").is_none());
    let names = PROFILES.each_ref().map(|p| p.name);
    assert_eq!(names, ["s1", "deepseek-r1", "think-tags"]);
    // thinking.json goes before the family.
    let tokenizer = tokenizer_with(&folder, &qwen3);
    folder.write("thinking.json", r#"{"start": "<think>", "end": "</think>", "ignore_strings": ["Hmm"]}"#);
    let own = Delimiters::resolve(&ThinkingChoice::Auto, &folder.0, &tokenizer).unwrap().unwrap();
    assert_eq!(tokenizer.decode(&own.ignore_strings[0]), "Hmm");
    assert_eq!(own.end_string, own.end);
}

#[test]
fn s1s_delimiters() {
    let tokenizer = tokenizer();
    let text = |ids: &[u32]| tokenizer.decode(ids);
    let auto = Delimiters::resolve(&ThinkingChoice::Auto, Path::new(MODEL), &tokenizer).unwrap().unwrap();
    let s1 = Delimiters::resolve(&profile("s1"), Path::new("/nowhere"), &tokenizer).unwrap().unwrap();
    assert_eq!(auto, s1);
    assert_eq!(text(&s1.start), "<|im_start|>think");
    assert_eq!(s1.end, [1]);
    assert_eq!(text(&s1.close), "<|im_start|>answer");
    assert_eq!(text(&s1.end_string), "<|im_start|>answer\nFinal Answer:");
    assert_eq!(text(&[s1.newline.unwrap()]), "\n");
    assert_eq!(text(&s1.ignore_strings[0]), "Wait");
    assert!(s1.start_in_prompt);
}

#[test]
fn delimiters_that_cannot_be_had() {
    let tokenizer = tokenizer();
    let resolve = |choice: &ThinkingChoice, folder: &Path| Delimiters::resolve(choice, folder, &tokenizer);
    refused(resolve(&profile("think-tags"), Path::new(MODEL)), &["<think>"]);
    assert_eq!(resolve(&ThinkingChoice::None, Path::new(MODEL)).unwrap(), None);
    assert_eq!(resolve(&ThinkingChoice::Auto, Path::new("/nowhere")).unwrap(), None);
    let explicit = |start: &str, end: &str| {
        resolve(&ThinkingChoice::Explicit { start: start.into(), end: end.into() }, Path::new(MODEL))
    };
    assert_eq!(tokenizer.decode(&explicit("[think]", "[/think]").unwrap().unwrap().end), "[/think]");
    refused(explicit("a", ""), &["thinking_end"]);
    refused(explicit("a", "zqzqzqzqzqzqzqzqzqzq"), &["end", "at most 8"]);

    let folder = Folder::new("thinking");
    let cases: &[(&str, &[&str])] = &[
        ("{", &["thinking.json"]),
        (r#"{"start": "a"}"#, &["thinking.json", "end"]),
        (r#"{"start": "a", "end": ""}"#, &["thinking.json", "end"]),
        (r#"{"start": "a", "end": "b", "budget": 1}"#, &["budget"]),
        (r#"{"start": "a", "end": "b", "close": "c"}"#, &["close"]),
        (r#"{"start": "a", "end": "b", "ignore_strings": ["1","2","3","4","5","6","7","8","9"]}"#, &["ignore_strings"]),
        (&json!({"start": "a", "end": "b", "end_string": "7".repeat(65)}).to_string(), &["end_string", "at most 64"]),
    ];
    for (text, words) in cases {
        folder.write("thinking.json", text);
        refused(resolve(&ThinkingChoice::Auto, &folder.0), words);
    }
}
