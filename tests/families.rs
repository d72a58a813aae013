//! Every model family and option against Hugging Face (models/golden: tiny random checkpoints, fp32 on the same bf16 weights),
//! steps driven by hand: greedy tokens and logits, by prefill whole and in pieces and by decode; and the same checkpoints in
//! other element types and in shards.

use crate::devices::devices;
use crate::loading::{refused, safetensors};
use crate::model::{Runner, serving, worst};
use crate::random::Random;
use crate::reference::{e4m3_to_f64, round_e4m3};
use half::{bf16, f16};
use ponder::checkpoint::{Checkpoint, Dtype, parse_file};
use ponder::config::ModelConfig;
use ponder::device::Device;
use ponder::executor::ExecutorOptions;
use ponder::model::{Fusion, Weights};
use ponder::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

const FOLDER: &str = "models/golden";

/// Of logits with a standard deviation of 4: what bf16 activations cost, the worst and the root mean square of 512. Leaving out
/// any of the options moves a logit by 2.8 or more.
const TOLERANCE: (f32, f32) = (0.3, 0.1);

/// Of models whose weights are fp8, against a float64 model of the same quantisation: what activations in e4m3, which a last bit of
/// bf16 may round the other way, make of the rounding (models/golden/fp8.py).
const TOLERANCE_FP8: (f32, f32) = (0.75, 0.25);

#[derive(Deserialize)]
struct Golden {
    weights: String,
    config: Value,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    first_logits: Vec<f32>,
    last_logits: Vec<f32>,
}

impl Golden {
    fn load(name: &str) -> Golden {
        let text = std::fs::read(Path::new(FOLDER).join(format!("{name}.json"))).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    fn config(&self) -> ModelConfig {
        let path = Path::new("config.json");
        ModelConfig::parse(self.config.to_string().as_bytes(), path, None, path).unwrap()
    }

    /// The weights in a folder of their own.
    fn folder(&self, name: &str) -> Folder {
        let folder = Folder::new(name);
        let weights = Path::new(FOLDER).join(format!("{}.safetensors", self.weights));
        std::fs::copy(weights, folder.0.join("model.safetensors")).unwrap();
        folder
    }

    fn runner(&self, folder: &Folder) -> Runner {
        self.runner_with(&serving(), folder, ExecutorOptions { graphs: false, ..Default::default() })
    }

    fn runner_with(&self, device: &Device, folder: &Folder, options: ExecutorOptions) -> Runner {
        let tokenizer = Tokenizer::without_text(self.config().vocab_size);
        Runner::open(device, self.config(), &Checkpoint::open(&folder.0).unwrap(), &tokenizer, options)
    }
}

/// Goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("ponder-families-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// A file of safetensors.
    fn write(&self, name: &str, header: Map<String, Value>, data: &[u8]) {
        std::fs::write(self.0.join(name), safetensors(&Value::Object(header).to_string(), data)).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn check(name: &str) {
    check_within(name, TOLERANCE);
}

fn check_within(name: &str, tolerance: (f32, f32)) {
    let golden = Golden::load(name);
    let folder = golden.folder(name);
    let mut runner = golden.runner(&folder);
    for (i, case) in golden.cases.iter().enumerate() {
        let wanted = &case.greedy_ids;
        let close = |logits: &[f32], truth: &[f32], what: &str| {
            let squares = logits.iter().zip(truth).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
            let errors = (worst(logits, truth), (squares / truth.len() as f32).sqrt());
            let good = errors.0 <= tolerance.0 && errors.1 <= tolerance.1;
            assert!(good, "{name}, case {i}, {what}: logits are off by {errors:?}");
        };
        for piece in [29, 512] {
            let (event, logits) = runner.prefill(&case.prompt_ids, piece, wanted.len() as u32);
            close(&logits, &case.first_logits, &format!("prefill in pieces of {piece}"));
            assert_eq!(event.token, wanted[0], "{name}, case {i} in pieces of {piece}");
        }
        // Decode goes on from the last of these prefills.
        let mut logits = Vec::new();
        for (n, &token) in wanted.iter().enumerate().skip(1) {
            let event;
            (event, logits) = runner.decode((case.prompt_ids.len() + n) as u32);
            assert_eq!(event.token, token, "{name}, case {i}, token {n}");
        }
        close(&logits, &case.last_logits, "decode");
        // And says of the last position what prefill says.
        let whole = [&case.prompt_ids[..], &wanted[..wanted.len() - 1]].concat();
        let (_, logits) = runner.prefill(&whole, 512, 1);
        close(&logits, &case.last_logits, "prefill of the whole");
    }
}

#[test]
fn qwen2() {
    ["qwen2", "qwen2-tied", "qwen2-window", "qwen2-layer-types", "qwen2-yarn"].iter().for_each(|name| check(name));
}

#[test]
fn qwen3() {
    ["qwen3", "qwen3-tied", "qwen3-bias", "qwen3-window", "qwen3-yarn"].iter().for_each(|name| check(name));
}

#[test]
fn llama() {
    ["llama", "llama-tied", "llama-bias"].iter().for_each(|name| check(name));
}

#[test]
fn llama_rope_scaling() {
    ["llama-llama3", "llama-linear", "llama-linear-parameters", "llama-dynamic", "llama-yarn-mscale"]
        .iter()
        .for_each(|name| check(name));
}

#[test]
fn mistral() {
    ["mistral", "mistral-page", "mistral-no-window"].iter().for_each(|name| check(name));
}

#[test]
fn fp8_by_tensor_and_row() {
    ["fp8-tensor", "fp8-channel"].iter().for_each(|name| check_within(name, TOLERANCE_FP8));
}

#[test]
fn fp8_by_block() {
    ["fp8-block", "fp8-block-ragged"].iter().for_each(|name| check_within(name, TOLERANCE_FP8));
}

/// --quantize makes of bf16 the very matrices that a checkpoint of fp8 by rows would have.
#[test]
fn quantised_at_load_is_as_quantised_before() {
    let golden = Golden::load("qwen3-bias");
    let (wide, narrow) = (golden.folder("quantise"), Folder::new("quantised"));
    let file = std::fs::read(wide.0.join("model.safetensors")).unwrap();
    let (start, tensors) = parse_file(&file).unwrap();
    let (mut header, mut data) = (Map::new(), Vec::new());
    let mut add = |name: &str, dtype: &str, shape: &[usize], bytes: &[u8]| {
        let begin = data.len();
        data.extend(bytes);
        header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]}));
    };
    let e4m3: Vec<f64> = (0..=255).map(e4m3_to_f64).collect();
    for (name, tensor) in &tensors {
        let bytes = &file[start + tensor.begin..start + tensor.end];
        if !name.ends_with("_proj.weight") {
            add(name, "BF16", &tensor.shape, bytes);
            continue;
        }
        let numbers: Vec<f32> = bytes.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect();
        let (mut rows, mut scales) = (Vec::new(), Vec::new());
        for row in numbers.chunks(tensor.shape[1]) {
            let most = row.iter().fold(0f32, |most, x| most.max(x.abs()));
            scales.push(most * (1.0 / 448.0));
            rows.extend(row.iter().map(|x| {
                let number = round_e4m3(f64::from(x * (448.0 / most)));
                let same =
                    |byte: &usize| e4m3[*byte] == number && e4m3[*byte].is_sign_negative() == number.is_sign_negative();
                (0..256).find(same).expect("a number of e4m3") as u8
            }));
        }
        add(name, "F8_E4M3", &tensor.shape, &rows);
        add(&format!("{name}_scale"), "F32", &[scales.len(), 1], bytemuck::cast_slice(&scales));
    }
    narrow.write("model.safetensors", header, &data);
    let logits = |folder: &Folder, quantize: bool| {
        let options = ExecutorOptions { graphs: false, quantize, ..Default::default() };
        let mut runner = golden.runner_with(&serving(), folder, options);
        let prompt = &golden.cases[0].prompt_ids;
        let first = runner.prefill(prompt, 512, 2).1;
        [first, runner.decode(prompt.len() as u32 + 1).1]
    };
    let [quantised, before, plain] = [logits(&wide, true), logits(&narrow, false), logits(&wide, false)];
    assert!(quantised == before, "other bits");
    assert!(quantised != plain, "nothing was quantised");
}

/// q, k and v are one matrix on the device: of one of them in bf16 and the others in fp8 nothing can be made.
#[test]
fn matrices_of_two_types_are_refused() {
    let golden = Golden::load("fp8-channel");
    let (from, folder) = (golden.folder("alike"), Folder::new("unlike"));
    let file = std::fs::read(from.0.join("model.safetensors")).unwrap();
    let (start, tensors) = parse_file(&file).unwrap();
    let k_proj = "model.layers.1.self_attn.k_proj.weight";
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, tensor) in tensors {
        let bytes = &file[start + tensor.begin..start + tensor.end];
        let begin = data.len();
        let dtype = match tensor.dtype {
            Dtype::F8E4M3 if name == k_proj => {
                data.extend(std::iter::repeat_n([0, 0], bytes.len()).flatten());
                "BF16"
            }
            _ if name == format!("{k_proj}_scale") => continue,
            other => {
                data.extend(bytes);
                match other {
                    Dtype::F8E4M3 => "F8_E4M3",
                    Dtype::Bf16 => "BF16",
                    Dtype::F32 => "F32",
                    _ => unreachable!("fp8.py writes no other"),
                }
            }
        };
        header.insert(name, json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]}));
    }
    folder.write("model.safetensors", header, &data);
    let checkpoint = Checkpoint::open(&folder.0).unwrap();
    for quantize in [false, true] {
        let types = Weights::from(&checkpoint).types(&golden.config(), quantize);
        refused(types, &["model.safetensors", "layers.1.self_attn.q_proj.weight", k_proj, "one is fp8", "alike"]);
    }
}

/// What the kernels of a decode step do together they do apart with the same bits: each part of it, and all of them; checked, too.
/// Between them the models have every bias, norms of heads and several query heads to a KV head.
#[test]
fn kernels_apart_give_the_bits_of_fused_ones() {
    let off: [fn(&mut Fusion); 5] = [
        |fusion| fusion.norm = false,
        |fusion| fusion.rope = false,
        |fusion| fusion.residual = false,
        |fusion| fusion.silu = false,
        |fusion| fusion.packed_gqa = false,
    ];
    for name in ["llama-bias", "qwen3"] {
        let golden = Golden::load(name);
        let (folder, case) = (golden.folder(&format!("{name}-apart")), &golden.cases[0]);
        let run = |device: &Device, off: &[fn(&mut Fusion)]| {
            // Heads that are not packed are more pieces of work, which must be cut at the same pages.
            let mut options = ExecutorOptions { graphs: false, deterministic: true, ..Default::default() };
            off.iter().for_each(|off| off(&mut options.techniques.fusion));
            let mut runner = golden.runner_with(device, &folder, options);
            runner.prefill(&case.prompt_ids, 512, 4);
            let length = case.prompt_ids.len() as u32;
            let logits: Vec<f32> = (1..4).flat_map(|n| runner.decode(length + n).1).collect();
            let kernels = runner.executor.decode_launches(1, 0).unwrap().len();
            (logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), kernels)
        };
        let (fused, fused_kernels) = run(&serving(), &[]);
        for (i, part) in off.iter().enumerate() {
            let (bits, kernels) = run(&serving(), &[*part]);
            assert!(bits == fused, "{name}: part {i}");
            let changes_launches = i < 4 && !(name == "qwen3" && i == 1);
            assert_eq!(kernels > fused_kernels, changes_launches, "{name}: part {i}");
        }
        for device in devices() {
            assert!(run(&device, &off).0 == fused, "{name}: all, {}", device.describe());
        }
    }
}

/// Writes the weights of `golden` in so many shards, each number made of the bits of a bf16.
fn rewrite(golden: &Golden, folder: &Folder, dtype: &str, shards: usize, number: impl Fn(bf16, usize) -> Vec<u8>) {
    let file = std::fs::read(Path::new(FOLDER).join(format!("{}.safetensors", golden.weights))).unwrap();
    let (start, tensors) = parse_file(&file).unwrap();
    let mut files = vec![(Map::new(), Vec::new()); shards];
    let mut index = Map::new();
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        let (header, data) = &mut files[i % shards];
        let begin = data.len();
        let numbers = file[start + tensor.begin..start + tensor.end].as_chunks().0.iter().enumerate();
        data.extend(numbers.flat_map(|(n, &x)| number(bf16::from_le_bytes(x), n)));
        index.insert(name.clone(), json!(format!("{}.safetensors", i % shards)));
        header.insert(name, json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]}));
    }
    for (i, (header, data)) in files.into_iter().enumerate() {
        folder.write(&format!("{i}.safetensors"), header, &data);
    }
    std::fs::write(folder.0.join("model.safetensors.index.json"), json!({"weight_map": index}).to_string()).unwrap();
}

/// Numbers of fp16 and fp32 that lie nearest to the bf16 they are made from, on either side.
#[test]
fn other_element_types_and_shards_give_the_same_bits() {
    let golden = Golden::load("qwen3-bias");
    let logits = |folder: &Folder| golden.runner(folder).prefill(&golden.cases[0].prompt_ids, 512, 1).1;
    let reference = logits(&golden.folder("bf16"));
    let wide = Folder::new("fp32");
    rewrite(&golden, &wide, "F32", 3, |x, n| {
        let noise = [0, 0x7fff, 1, 0x1234][n % 4];
        (x.to_f32().to_bits() + noise).to_le_bytes().to_vec()
    });
    assert!(logits(&wide) == reference, "fp32");
    let half = Folder::new("fp16");
    rewrite(&golden, &half, "F16", 2, |x, n| {
        let exact = f16::from_f32(x.to_f32());
        assert_eq!(exact.to_f32(), x.to_f32(), "golden.py makes numbers of both types");
        let noise = if exact == f16::ZERO { 0 } else { [0, 3, 1][n % 3] };
        (exact.to_bits() + noise).to_le_bytes().to_vec()
    });
    assert!(logits(&half) == reference, "fp16");
}

/// Matrices that are loaded in several pieces, against plain loops: a layer whose attention adds nothing, and one token.
#[test]
fn matrices_larger_than_a_piece() {
    const HIDDEN: usize = 1024;
    const INNER: usize = 4160;
    let mut config = Golden::load("llama").config;
    config["num_hidden_layers"] = json!(1);
    config["hidden_size"] = json!(HIDDEN);
    config["intermediate_size"] = json!(INNER);
    let vocab = config["vocab_size"].as_u64().unwrap() as usize;
    let number = |name: &str| config[name].as_u64().unwrap() as usize;
    let dim = number("head_dim");
    let (q, kv) = (number("num_attention_heads") * dim, number("num_key_value_heads") * dim);
    let mut random = Random(5);
    let (mut header, mut data) = (Map::new(), Vec::new());
    let mut tensor = |name: &str, shape: &[usize], mean: f32, deviation: f32| -> Vec<f64> {
        let count = shape.iter().product();
        // Evenly distributed.
        let mut next = || 3f32.sqrt() * (random.below(1 << 16) as f32 / f32::from(1u16 << 15) - 1.0);
        let numbers: Vec<bf16> = (0..count).map(|_| bf16::from_f32(mean + deviation * next())).collect();
        let begin = data.len();
        data.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
        header.insert(name.into(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, data.len()]}));
        numbers.iter().map(|x| x.to_f64()).collect()
    };
    let embedding = tensor("model.embed_tokens.weight", &[vocab, HIDDEN], 0.0, 0.5);
    let of_width = (HIDDEN as f32).powf(-0.5);
    for (which, rows) in [("q", q), ("k", kv), ("v", kv)] {
        tensor(&format!("model.layers.0.self_attn.{which}_proj.weight"), &[rows, HIDDEN], 0.0, of_width);
    }
    tensor("model.layers.0.self_attn.o_proj.weight", &[HIDDEN, q], 0.0, 0.0);
    tensor("model.layers.0.input_layernorm.weight", &[HIDDEN], 1.0, 0.0);
    let norm = tensor("model.layers.0.post_attention_layernorm.weight", &[HIDDEN], 1.0, 0.2);
    let gate = tensor("model.layers.0.mlp.gate_proj.weight", &[INNER, HIDDEN], 0.0, of_width);
    let up = tensor("model.layers.0.mlp.up_proj.weight", &[INNER, HIDDEN], 0.0, of_width);
    let down = tensor("model.layers.0.mlp.down_proj.weight", &[HIDDEN, INNER], 0.0, (INNER as f32).powf(-0.5));
    let last_norm = tensor("model.norm.weight", &[HIDDEN], 1.0, 0.2);
    let head = tensor("lm_head.weight", &[vocab, HIDDEN], 0.0, 4.0 * of_width);

    const TOKEN: usize = 77;
    let times = |matrix: &[f64], x: &[f64]| -> Vec<f64> {
        matrix.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let normed = |x: &[f64], weight: &[f64]| -> Vec<f64> {
        let scale = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + 1e-6).powf(-0.5);
        x.iter().zip(weight).map(|(x, w)| x * w * scale).collect()
    };
    let x = &embedding[TOKEN * HIDDEN..][..HIDDEN];
    let n = normed(x, &norm);
    let inner: Vec<f64> =
        times(&gate, &n).iter().zip(times(&up, &n)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    let sum: Vec<f64> = x.iter().zip(times(&down, &inner)).map(|(x, y)| x + y).collect();
    let truth: Vec<f32> = times(&head, &normed(&sum, &last_norm)).iter().map(|&x| x as f32).collect();

    let folder = Folder::new("pieces");
    folder.write("model.safetensors", header, &data);
    let golden = Golden { config, ..Golden::load("llama") };
    let (_, logits) = golden.runner(&folder).prefill(&[TOKEN as u32], 512, 1);
    let error = worst(&logits, &truth);
    assert!(error <= TOLERANCE.0, "logits are off by {error}");
}
