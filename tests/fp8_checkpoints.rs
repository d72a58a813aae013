//! Checkpoints of fp8 weights: what config.json may say of them, matrices with their scales in every shape and spelling, and the
//! tiny models of models/golden/fp8.py.

use crate::loading::{refused, safetensors};
use half::{bf16, f16};
use ponder::checkpoint::{Checkpoint, Scales};
use ponder::config::{Fp8Scales, ModelConfig};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

// ---- config.json ----

fn parse(field: &str, quantization: &Value) -> ponder::Result<Option<Fp8Scales>> {
    let mut config: Value = serde_json::from_slice(&std::fs::read("models/modulo/config.json").unwrap()).unwrap();
    config[field] = quantization.clone();
    let path = Path::new("config.json");
    ModelConfig::parse(config.to_string().as_bytes(), path, None, path).map(|c| c.quantization)
}

/// What llm-compressor writes.
fn compressed(strategy: &str) -> Value {
    let block = if strategy == "block" { json!([128, 128]) } else { Value::Null };
    let numbers = json!({"num_bits": 8, "type": "float", "symmetric": true, "group_size": null, "actorder": null});
    let mut weights = numbers.clone();
    weights["strategy"] = json!(strategy);
    weights["block_structure"] = block;
    let mut activations = numbers;
    activations["dynamic"] = json!(true);
    activations["strategy"] = json!("token");
    json!({
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "weights": weights, "input_activations": activations, "output_activations": null, "targets": ["Linear"],
        }},
    })
}

/// `value` with what is at `path` (of "a.b.c") changed.
fn with(mut value: Value, path: &str, to: Value) -> Value {
    let at = path.split('.').fold(&mut value, |at, field| &mut at[field]);
    *at = to;
    value
}

#[test]
fn configs_of_fp8() {
    let accepted = |quantization: Value, scales: Fp8Scales| {
        for field in ["quantization_config", "compression_config"] {
            assert_eq!(parse(field, &quantization).unwrap(), Some(scales), "{field}: {quantization}");
        }
    };
    assert_eq!(parse("quantization_config", &Value::Null).unwrap(), None);
    accepted(json!({"quant_method": "fp8"}), Fp8Scales::PerTensor);
    accepted(
        json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"], "kv_cache_scheme": "static"}),
        Fp8Scales::PerTensor,
    );
    let block = json!({
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate_proj"],
    });
    accepted(block, Fp8Scales::PerBlock);
    accepted(compressed("tensor"), Fp8Scales::PerTensor);
    accepted(compressed("channel"), Fp8Scales::PerChannel);
    accepted(compressed("block"), Fp8Scales::PerBlock);
    accepted(with(compressed("tensor"), "format", json!("naive-quantized")), Fp8Scales::PerTensor);
    let no_activations = with(compressed("tensor"), "config_groups.group_0.input_activations", Value::Null);
    accepted(no_activations, Fp8Scales::PerTensor);
    let cache = json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": "tensor", "dynamic": false});
    accepted(with(compressed("tensor"), "kv_cache_scheme", cache), Fp8Scales::PerTensor);
    accepted(with(compressed("tensor"), "sparsity_config", json!({"format": "dense"})), Fp8Scales::PerTensor);
}

#[test]
fn other_quantisations_are_refused() {
    let method = |name: &str| json!({ "quant_method": name });
    for name in ["gptq", "awq", "bitsandbytes", "fbgemm_fp8", "mxfp4", "modelopt"] {
        refused(
            parse("quantization_config", &method(name)),
            &["config.json", "quantization_config.quant_method", name, "\"fp8\" and \"compressed-tensors\" are"],
        );
    }
    let fp8 = |field: &str, value: Value| with(method("fp8"), field, value);
    let ct = |path: &str, value: Value| with(compressed("channel"), path, value);
    let group = |path: &str, value: Value| ct(&format!("config_groups.group_0.{path}"), value);
    let cases: &[(Value, &[&str])] = &[
        (json!("fp8"), &["not an object"]),
        (json!({}), &["quant_method", "missing"]),
        (json!({"quant_method": 8}), &["quant_method", "8 is not supported"]),
        (fp8("weight_block_size", json!([64, 128])), &["weight_block_size", "[64,128]", "[128,128] is"]),
        (fp8("activation_scheme", json!("none")), &["activation_scheme", "none", "\"dynamic\" and \"static\" are"]),
        (fp8("fmt", json!("e5m2")), &["quantization_config.fmt", "e5m2", "e4m3"]),
        (fp8("scale_fmt", json!("ue8m0")), &["scale_fmt", "ue8m0"]),
        (fp8("kv_cache_scheme", json!("int8")), &["kv_cache_scheme", "int8"]),
        (ct("format", json!("pack-quantized")), &["quantization_config.format", "pack-quantized", "float-quantized"]),
        (
            ct("sparsity_config", json!({"format": "sparse-24-bitmask"})),
            &["sparsity_config.format", "sparse-24-bitmask"],
        ),
        (ct("transform_config", json!({"config_groups": {}})), &["transform_config"]),
        (ct("kv_cache_scheme", json!({"num_bits": 8, "type": "int"})), &["kv_cache_scheme.type", "int"]),
        (ct("config_groups", json!({})), &["config_groups", "empty"]),
        (ct("config_groups", Value::Null), &["config_groups", "missing"]),
        (ct("config_groups", json!([])), &["config_groups", "[] is not an object"]),
        (ct("config_groups.group_1", json!({})), &["config_groups.group_1.weights", "missing"]),
        (group("format", json!("int-quantized")), &["config_groups.group_0.format", "int-quantized"]),
        (group("weights.num_bits", json!(4)), &["config_groups.group_0.weights.num_bits", "4", "8 is"]),
        (group("weights.type", json!("int")), &["weights.type", "\"int\" is not supported", "\"float\" is"]),
        (group("weights.type", Value::Null), &["weights.type", "missing"]),
        (group("weights.symmetric", json!(false)), &["weights.symmetric", "false"]),
        (group("weights.strategy", json!("group")), &["weights.strategy", "group", "\"channel\""]),
        (group("weights.strategy", json!("block")), &["weights.block_structure", "missing", "[128,128]"]),
        (group("input_activations.num_bits", json!(4)), &["input_activations.num_bits", "4"]),
        (group("input_activations.type", json!("int")), &["input_activations.type", "int"]),
        (group("output_activations", json!({"num_bits": 8})), &["output_activations"]),
    ];
    for (quantization, words) in cases {
        refused(parse("quantization_config", quantization), words);
    }
    refused(parse("compression_config", &fp8("fmt", json!("e5m2"))), &["compression_config.fmt"]);
}

// ---- matrices and their scales ----

/// A checkpoint of a few tensors in a folder that goes with it.
struct Tensors {
    folder: PathBuf,
    header: Map<String, Value>,
    data: Vec<u8>,
}

impl Tensors {
    fn new(name: &str) -> Tensors {
        let folder = std::env::temp_dir().join(format!("ponder-fp8-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Tensors { folder, header: Map::new(), data: Vec::new() }
    }

    fn with(mut self, name: &str, dtype: &str, shape: &[usize], bytes: &[u8]) -> Tensors {
        let begin = self.data.len();
        self.data.extend(bytes);
        self.header
            .insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, self.data.len()]}));
        self
    }

    /// "x.weight" of that shape, whose numbers are the bytes 0 to 99 again and again.
    fn weight(self, dtype: &str, [n, k]: [usize; 2]) -> Tensors {
        let size = if dtype.starts_with("F8") { 1 } else { 2 };
        let bytes: Vec<u8> = (0..n * k * size).map(|i| (i % 100) as u8).collect();
        self.with("x.weight", dtype, &[n, k], &bytes)
    }

    fn f32(self, name: &str, shape: &[usize], numbers: &[f32]) -> Tensors {
        self.with(name, "F32", shape, bytemuck::cast_slice(numbers))
    }

    fn open(&self) -> Checkpoint {
        let header = Value::Object(self.header.clone()).to_string();
        std::fs::write(self.folder.join("model.safetensors"), safetensors(&header, &self.data)).unwrap();
        Checkpoint::open(&self.folder).unwrap()
    }

    fn scales(&self, shape: [usize; 2]) -> Scales {
        self.open().fp8("x.weight", shape).unwrap().expect("fp8").scales
    }

    fn refused(&self, shape: [usize; 2], words: &[&str]) {
        refused(self.open().fp8("x.weight", shape).map(|_| ()), words);
    }
}

impl Drop for Tensors {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn e4m3(test: &str, shape: [usize; 2]) -> Tensors {
    Tensors::new(test).weight("F8_E4M3", shape)
}

#[test]
fn scales_of_every_shape() {
    let numbers = |n: usize| (0..n).map(|i| 0.5 + i as f32).collect::<Vec<_>>();
    let e4m3 = |shape| e4m3("shapes", shape);
    for name in ["x.weight_scale", "x.weight_scale_inv"] {
        for shape in [&[][..], &[1], &[1, 1]] {
            assert_eq!(e4m3([3, 2]).f32(name, shape, &[0.25]).scales([3, 2]), Scales::Tensor(0.25));
        }
        for shape in [&[3][..], &[3, 1]] {
            assert_eq!(e4m3([3, 200]).f32(name, shape, &numbers(3)).scales([3, 200]), Scales::Rows(numbers(3)));
        }
        for (shape, blocks) in [([256, 384], [2, 3]), ([192, 320], [2, 3]), ([129, 64], [2, 1]), ([2, 129], [1, 2])] {
            let all = numbers(blocks[0] * blocks[1]);
            assert_eq!(e4m3(shape).f32(name, &blocks, &all).scales(shape), Scales::Blocks(all));
        }
    }
    let halves: Vec<u8> = [1.5, 0.001].iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let scales = e4m3([2, 2]).with("x.weight_scale", "F16", &[2], &halves).scales([2, 2]);
    assert_eq!(scales, Scales::Rows(vec![1.5, f16::from_f32(0.001).to_f32()]));
    let scales = e4m3([2, 2]).with("x.weight_scale", "BF16", &[], &bf16::from_f32(0.75).to_le_bytes()).scales([2, 2]);
    assert_eq!(scales, Scales::Tensor(0.75));
}

#[test]
fn a_matrix_by_pieces() {
    let shape = [3, 200];
    let checkpoint = e4m3("pieces", shape).f32("x.weight_scale", &[], &[1.0]);
    let checkpoint = checkpoint.open();
    let view = checkpoint.fp8("x.weight", shape).unwrap().unwrap();
    assert_eq!(view.bytes.len(), 600);
    assert_eq!(view.piece(0..600).unwrap(), view.bytes);
    assert_eq!(view.piece(201..204).unwrap(), [1, 2, 3]);
    for nan in [0x7f, 0xff] {
        let mut bytes = [0x7e; 600];
        bytes[400] = nan;
        let tensors = Tensors::new("nan").with("x.weight", "F8_E4M3", &shape, &bytes);
        let checkpoint = tensors.f32("x.weight_scale", &[], &[1.0]).open();
        let view = checkpoint.fp8("x.weight", shape).unwrap().unwrap();
        assert_eq!(view.piece(0..400).unwrap(), [0x7e; 400]);
        assert!(view.piece(401..600).is_ok());
        refused(view.piece(300..401), &["model.safetensors", "\"x.weight\"", "NaN"]);
    }
}

#[test]
fn scales_that_cannot_be() {
    let shape = [192, 320];
    let e4m3 = || e4m3("bad", shape);
    e4m3().refused(shape, &["model.safetensors", "\"x.weight\"", "no scale", "\"x.weight_scale\" is missing"]);
    e4m3()
        .f32("x.weight_scale", &[], &[1.0])
        .f32("x.weight_scale_inv", &[], &[1.0])
        .refused(shape, &["\"x.weight\"", "two scales", "\"x.weight_scale\"", "\"x.weight_scale_inv\"", "remove"]);
    e4m3().f32("x.weight_scale", &[], &[1.0]).refused([192, 256], &["\"x.weight\"", "[192, 320]", "[192, 256]"]);
    for wrong in [&[2][..], &[320], &[1, 192], &[3, 2], &[2, 2], &[192, 320], &[1, 1, 1], &[0]] {
        e4m3()
            .f32("x.weight_scale", wrong, &vec![1.0; wrong.iter().product()])
            .refused(shape, &["\"x.weight_scale\"", &format!("{wrong:?}"), "[192, 1]", "[2, 3]"]);
    }
    for (number, said) in
        [(0.0, "0e0"), (-1.0, "-1e0"), (f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::MIN_POSITIVE / 2.0, "e-39")]
    {
        let mut scales = [1.0; 6];
        scales[5] = number;
        e4m3().f32("x.weight_scale_inv", &[2, 3], &scales).refused(shape, &["\"x.weight_scale_inv\"", said, "above 0"]);
    }
    let half_infinity = f16::INFINITY.to_le_bytes();
    e4m3().with("x.weight_scale", "F16", &[], &half_infinity).refused(shape, &["\"x.weight_scale\"", "inf"]);
    e4m3().with("x.weight_scale", "U8", &[1], &[1]).refused(shape, &["\"x.weight_scale\"", "U8", "fp32"]);
}

#[test]
fn matrices_of_other_types() {
    let shape = [2, 4];
    let tensors = |dtype| Tensors::new("types").weight(dtype, shape);
    assert!(tensors("BF16").open().fp8("x.weight", shape).unwrap().is_none());
    refused(tensors("BF16").open().fp8("y.weight", shape).map(|_| ()), &["\"y.weight\"", "missing"]);
    tensors("F8_E5M2").f32("x.weight_scale", &[], &[1.0]).refused(shape, &["\"x.weight\"", "F8E5M2", "e4m3"]);
    for name in ["x.weight_scale", "x.weight_scale_inv"] {
        tensors("BF16").f32(name, &[], &[1.0]).refused(shape, &[name, "\"x.weight\"", "Bf16"]);
    }
    let fp8 = tensors("F8_E4M3").f32("x.weight_scale", &[], &[1.0]).open();
    refused(fp8.weights("x.weight", &shape).map(|_| ()), &["\"x.weight\"", "F8E4M3", "bf16"]);
}

// ---- models ----

#[test]
fn tiny_models_have_their_matrices() {
    let golden = Path::new("models/golden");
    for (name, quantization, shapes) in [
        ("fp8-tensor", Fp8Scales::PerTensor, [1, 1, 1]),
        ("fp8-channel", Fp8Scales::PerChannel, [192, 192, 192]),
        ("fp8-block", Fp8Scales::PerBlock, [2, 2, 2]),
        ("fp8-block-ragged", Fp8Scales::PerBlock, [4, 4, 6]),
    ] {
        let model: Value =
            serde_json::from_slice(&std::fs::read(golden.join(format!("{name}.json"))).unwrap()).unwrap();
        let path = Path::new("config.json");
        let c = ModelConfig::parse(model["config"].to_string().as_bytes(), path, None, path).unwrap();
        assert_eq!(c.quantization, Some(quantization), "{name}");
        let tensors = Tensors::new(name);
        std::fs::copy(golden.join(format!("{name}.safetensors")), tensors.folder.join("model.safetensors")).unwrap();
        let checkpoint = Checkpoint::open(&tensors.folder).unwrap();
        let (h, q) = (c.hidden_size, c.num_heads * c.head_dim);
        let matrices =
            [("self_attn.q_proj", [q, h]), ("self_attn.o_proj", [h, q]), ("mlp.down_proj", [h, c.intermediate_size])];
        for ((matrix, shape), count) in matrices.into_iter().zip(shapes) {
            let view = checkpoint.fp8(&format!("model.layers.0.{matrix}.weight"), shape).unwrap().expect("fp8");
            assert!(view.piece(0..shape[0] * shape[1]).is_ok());
            let (kind, scales) = match &view.scales {
                Scales::Tensor(_) => (Fp8Scales::PerTensor, 1),
                Scales::Rows(scales) => (Fp8Scales::PerChannel, scales.len()),
                Scales::Blocks(scales) => (Fp8Scales::PerBlock, scales.len()),
            };
            assert_eq!((kind, scales), (quantization, count), "{name}, {matrix}");
        }
        let down = checkpoint.fp8("model.layers.1.mlp.down_proj.weight", [h, c.intermediate_size]).unwrap();
        assert_eq!(down.is_none(), name == "fp8-block-ragged", "{name}: one MLP was left in bf16");
        assert!(checkpoint.fp8("lm_head.weight", [c.vocab_size, h]).unwrap().is_none());
    }
}
