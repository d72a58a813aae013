//! A model folder's config.json and generation_config.json, read into [`ModelConfig`] with every field checked: what gets
//! past here is a shape that the kernels can run, and a field that changes the result is honoured or refused by its name.
//! Absent fields mean what they mean to the reference implementation. Knows no weights and no device.

mod quantization;

use crate::rope::{Rope, Scaling};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

pub use quantization::Fp8Scales;

/// What the numbers of a matrix are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightType {
    #[default]
    Bf16,
    /// e4m3 with a scale for each row.
    Fp8Rows,
    /// e4m3 with a scale for each 128 rows and columns.
    Fp8Blocks,
}

/// Of a layer's products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerTypes {
    pub qkv: WeightType,
    pub o: WeightType,
    pub gate_up: WeightType,
    pub down: WeightType,
}

impl LayerTypes {
    pub fn of(all: WeightType) -> LayerTypes {
        LayerTypes { qkv: all, o: all, gate_up: all, down: all }
    }
}

/// Model families that the launch list fits. What differs between them is in [`ModelConfig`], as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// And Qwen2.5.
    Qwen2,
    Qwen3,
    Llama,
    Mistral,
}

/// Names in config.json: `architectures`, `model_type`.
const ARCHITECTURES: [(&str, &str, Architecture); 4] = [
    ("Qwen2ForCausalLM", "qwen2", Architecture::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Architecture::Qwen3),
    ("LlamaForCausalLM", "llama", Architecture::Llama),
    ("MistralForCausalLM", "mistral", Architecture::Mistral),
];

/// The shape of a model, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    /// 64 or 128.
    pub head_dim: usize,
    /// Rows of the embedding table; the tokenizer may know fewer.
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope: Rope,
    pub tie_word_embeddings: bool,
    pub qkv_bias: bool,
    /// Of the product after attention.
    pub o_bias: bool,
    /// Heads of q and k are RMS-normalised.
    pub qk_norm: bool,
    /// [layers]: how many tokens, itself included, a token attends to; None: all before it.
    pub windows: Vec<Option<u32>>,
    /// That there are fp8 weights, and how they are scaled. Which of them: see [`crate::checkpoint::Checkpoint::fp8`].
    pub quantization: Option<Fp8Scales>,
    /// What each layer's matrices are kept as. All bf16 until [`crate::model::Weights::types`] has seen the tensors.
    pub weight_types: Vec<LayerTypes>,
    /// Any of them ends an answer; from both files, without repeats.
    pub eos_token_ids: Vec<u32>,
    pub defaults: SamplingDefaults,
}

/// What generation_config.json says of sampling.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

/// Fields of generation_config.json that would change the result and that nothing here does; with what they say where they do
/// nothing.
const UNKNOWN_SAMPLING: [(&str, f64); 8] = [
    ("num_beams", 1.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("penalty_alpha", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("suppress_tokens", f64::NAN),
    ("bad_words_ids", f64::NAN),
];

/// Largest value of any size field: far beyond every model, and small enough that no product of four overflows 64 bits.
const MAX_SIZE: u64 = 1 << 24;
const MAX_LAYERS: usize = 1024;

impl ModelConfig {
    /// Whether any matrix is.
    pub fn is_fp8(&self) -> bool {
        self.weight_types.iter().any(|&types| types != LayerTypes::default())
    }

    /// # Errors
    /// Unreadable files, fields that are missing, of the wrong type or out of range, and models that no kernel fits.
    pub fn load(folder: &Path) -> Result<ModelConfig> {
        let path = folder.join("config.json");
        let config = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let generation_path = folder.join("generation_config.json");
        let generation = match std::fs::read(&generation_path) {
            Ok(bytes) => Some(bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io(generation_path, e)),
        };
        ModelConfig::parse(&config, &path, generation.as_deref(), &generation_path)
    }

    /// The same from bytes; paths are for messages.
    pub fn parse(config: &[u8], path: &Path, generation: Option<&[u8]>, generation_path: &Path) -> Result<ModelConfig> {
        let fields = Fields::parse(config, path)?;
        let architecture = fields.architecture()?;
        let hidden_size = fields.size("hidden_size")?;
        let num_heads = fields.size("num_attention_heads")?;
        let num_kv_heads =
            if fields.has("num_key_value_heads") { fields.size("num_key_value_heads")? } else { num_heads };
        let head_dim = if fields.has("head_dim") {
            fields.size("head_dim")?
        } else if architecture == Architecture::Qwen3 {
            128
        } else if hidden_size % num_heads == 0 {
            hidden_size / num_heads
        } else {
            return fields
                .bad("hidden_size", format!("{hidden_size} is not a multiple of num_attention_heads, {num_heads}"));
        };
        if head_dim != 64 && head_dim != 128 {
            return fields.bad("head_dim", format!("heads of {head_dim} are not supported: 64 and 128 are"));
        }
        if num_heads % num_kv_heads != 0 {
            return fields.bad(
                "num_key_value_heads",
                format!("{num_kv_heads} does not divide num_attention_heads, {num_heads}"),
            );
        }
        if num_heads / num_kv_heads > 16 {
            return fields.bad(
                "num_key_value_heads",
                format!(
                    "{} query heads for each key/value head are not supported: up to 16 are",
                    num_heads / num_kv_heads
                ),
            );
        }
        let intermediate_size = fields.size("intermediate_size")?;
        for (name, size) in [("hidden_size", hidden_size), ("intermediate_size", intermediate_size)] {
            if size % 64 != 0 {
                return fields.bad(name, format!("{size} is not a multiple of 64, as the matrix kernels need"));
            }
        }
        if hidden_size > 8192 {
            return fields.bad("hidden_size", format!("{hidden_size} is more than the norm kernel's 8192"));
        }
        let vocab_size = fields.size("vocab_size")?;
        if vocab_size % 8 != 0 {
            return fields.bad("vocab_size", format!("{vocab_size} is not a multiple of 8: pad the embedding table"));
        }
        match fields.string("hidden_act")? {
            None | Some("silu") => {}
            Some(other) => return fields.bad("hidden_act", format!("{other:?} is not supported: \"silu\" is")),
        }
        if fields.bool("mlp_bias")? == Some(true) {
            return fields.bad("mlp_bias", "biases in the MLP are not supported".into());
        }
        let num_layers = fields.size("num_hidden_layers")?;
        if num_layers > MAX_LAYERS {
            return fields.bad("num_hidden_layers", format!("{num_layers} is more than {MAX_LAYERS}"));
        }
        let max_position_embeddings = fields.size("max_position_embeddings")?;
        let rope = fields.rope(max_position_embeddings)?;
        let rms_norm_eps = fields.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(0.0..=1.0).contains(&rms_norm_eps) {
            return fields.bad("rms_norm_eps", format!("{rms_norm_eps} is not between 0 and 1"));
        }

        let attention_bias = matches!(architecture, Architecture::Qwen3 | Architecture::Llama)
            && fields.bool("attention_bias")?.unwrap_or(false);

        let mut eos_token_ids = Vec::new();
        fields.token_ids("eos_token_id", vocab_size, &mut eos_token_ids)?;
        let mut defaults = SamplingDefaults::default();
        if let Some(generation) = generation {
            let fields = Fields::parse(generation, generation_path)?;
            for (name, neutral) in UNKNOWN_SAMPLING {
                if fields.get(name).is_some_and(|value| value.as_f64() != Some(neutral)) {
                    return fields.bad(name, "cannot be honoured: remove it".into());
                }
            }
            fields.token_ids("eos_token_id", vocab_size, &mut eos_token_ids)?;
            defaults = SamplingDefaults {
                do_sample: fields.bool("do_sample")?,
                temperature: fields.number("temperature")?.map(|x| x as f32),
                top_p: fields.number("top_p")?.map(|x| x as f32),
                top_k: fields.number("top_k")?.map(|x| x.clamp(0.0, MAX_SIZE as f64) as u32),
                min_p: fields.number("min_p")?.map(|x| x as f32),
                repetition_penalty: fields.number("repetition_penalty")?.map(|x| x as f32),
            };
        }
        Ok(ModelConfig {
            architecture,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size,
            max_position_embeddings: positions(max_position_embeddings, &rope),
            rms_norm_eps: rms_norm_eps as f32,
            rope,
            tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: architecture == Architecture::Qwen2 || attention_bias,
            o_bias: attention_bias,
            qk_norm: architecture == Architecture::Qwen3,
            windows: fields.windows(architecture, num_layers)?,
            quantization: quantization::parse(&fields)?,
            weight_types: vec![LayerTypes::default(); num_layers],
            eos_token_ids,
            defaults,
        })
    }
}

/// One JSON object and the file it came from.
struct Fields<'a> {
    path: &'a Path,
    object: Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn parse(bytes: &[u8], path: &'a Path) -> Result<Fields<'a>> {
        let value: Value =
            serde_json::from_slice(bytes).map_err(|e| Error::model(path, format!("not valid JSON: {e}")))?;
        match value {
            Value::Object(object) => Ok(Fields { path, object }),
            _ => Err(Error::model(path, "not a JSON object")),
        }
    }

    fn bad<T>(&self, field: &str, problem: String) -> Result<T> {
        Err(Error::model(self.path, format!("field {field:?}: {problem}")))
    }

    /// Null counts as absent, as in the reference implementation.
    fn get(&self, field: &str) -> Option<&Value> {
        self.object.get(field).filter(|v| !v.is_null())
    }

    fn has(&self, field: &str) -> bool {
        self.get(field).is_some()
    }

    fn size(&self, field: &str) -> Result<usize> {
        match self.get(field) {
            None => self.bad(field, "missing".into()),
            Some(v) => match v.as_u64() {
                Some(n) if (1..=MAX_SIZE).contains(&n) => Ok(n as usize),
                _ => self.bad(field, format!("{v} is not a whole number from 1 to {MAX_SIZE}")),
            },
        }
    }

    fn number(&self, field: &str) -> Result<Option<f64>> {
        match self.get(field) {
            None => Ok(None),
            Some(v) => match v.as_f64() {
                Some(x) if x.is_finite() => Ok(Some(x)),
                _ => self.bad(field, format!("{v} is not a number")),
            },
        }
    }

    fn bool(&self, field: &str) -> Result<Option<bool>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(v) => self.bad(field, format!("{v} is not true or false")),
        }
    }

    fn string(&self, field: &str) -> Result<Option<&str>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(v) => self.bad(field, format!("{v} is not a string")),
        }
    }

    /// A token id or a list of them, appended without repeats.
    fn token_ids(&self, field: &str, vocab_size: usize, ids: &mut Vec<u32>) -> Result<()> {
        let values = match self.get(field) {
            None => return Ok(()),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        if values.len() > 64 {
            return self.bad(field, format!("{} ids are too many", values.len()));
        }
        for value in values {
            match value.as_u64() {
                Some(id) if id < vocab_size as u64 => {
                    if !ids.contains(&(id as u32)) {
                        ids.push(id as u32);
                    }
                }
                _ => return self.bad(field, format!("{value} is not a token id below vocab_size, {vocab_size}")),
            }
        }
        Ok(())
    }

    fn architecture(&self) -> Result<Architecture> {
        let name = match self.get("architectures") {
            Some(Value::Array(names)) if names.len() == 1 => names[0].as_str(),
            Some(v) => return self.bad("architectures", format!("{v} is not a list of one name")),
            None => None,
        };
        let Some(name) = name.or(self.string("model_type")?) else {
            return self.bad("architectures", "missing: is this a Hugging Face model folder?".into());
        };
        match ARCHITECTURES.iter().find(|(class, model_type, _)| name == *class || name == *model_type) {
            Some(&(.., architecture)) => Ok(architecture),
            None => {
                let known = ARCHITECTURES.map(|(class, ..)| class).join(", ");
                self.bad("architectures", format!("{name:?} is not supported: {known} are"))
            }
        }
    }

    /// `rope_scaling` beside `rope_theta`, or the newer `rope_parameters`, which holds both.
    fn rope(&self, max_positions: usize) -> Result<Rope> {
        let name = if self.has("rope_scaling") { "rope_scaling" } else { "rope_parameters" };
        let object = match self.get(name) {
            None => Map::new(),
            Some(Value::Object(object)) => object.clone(),
            Some(value) => return self.bad(name, format!("{value} is not an object")),
        };
        if let Some((layers, _)) = object.iter().find(|(_, value)| value.is_object()) {
            return self.bad(name, format!("{layers:?}: angles of its own for a kind of layers are not supported"));
        }
        let inner = Fields { path: self.path, object };
        let theta = inner.number("rope_theta")?.or(self.number("rope_theta")?).unwrap_or(10_000.0);
        if theta <= 1.0 {
            return self.bad("rope_theta", format!("{theta} is not greater than 1"));
        }
        for fields in [self, &inner] {
            if fields.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
                return fields.bad("partial_rotary_factor", "heads that are rotated in part are not supported".into());
            }
        }
        let kind = if inner.has("rope_type") { inner.string("rope_type")? } else { inner.string("type")? };
        let positive = |field: &str, default: Option<f64>| match inner.number(field)?.or(default) {
            Some(x) if x > 0.0 => Ok(x),
            Some(x) => self.bad(name, format!("{field} is {x}, not greater than 0")),
            None => self.bad(name, format!("{field} is missing")),
        };
        let original = || positive("original_max_position_embeddings", Some(max_positions as f64));
        let scaling = match kind {
            None | Some("default") => Scaling::None,
            // Begins to differ from none beyond max_position_embeddings, where the reference implementation's result depends on
            // how often it was called; no context goes there.
            Some("dynamic") => {
                positive("factor", None)?;
                Scaling::None
            }
            Some("linear") => Scaling::Linear { factor: positive("factor", None)? },
            Some("llama3") => {
                let low_freq_factor = positive("low_freq_factor", None)?;
                let high_freq_factor = positive("high_freq_factor", None)?;
                if high_freq_factor <= low_freq_factor {
                    return self.bad(name, "high_freq_factor is not greater than low_freq_factor".into());
                }
                let factor = positive("factor", None)?;
                Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original: original()? }
            }
            Some("yarn") => {
                let original = original()?;
                let factor = positive("factor", Some(max_positions as f64 / original))?;
                let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
                let given = inner.number("attention_factor")?;
                let attention_factor = match (given, inner.number("mscale")?, inner.number("mscale_all_dim")?) {
                    (Some(given), ..) => given,
                    (None, Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scale(mscale) / scale(all),
                    _ => scale(1.0),
                };
                let beta_fast = positive("beta_fast", Some(32.0))?;
                let beta_slow = positive("beta_slow", Some(1.0))?;
                if beta_fast < beta_slow {
                    return self.bad(name, "beta_fast is less than beta_slow".into());
                }
                let truncate = inner.bool("truncate")?.unwrap_or(true);
                Scaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate }
            }
            Some(kind) => {
                let known = "default, linear, dynamic, llama3 and yarn";
                return self.bad(name, format!("RoPE of type {kind:?} is not supported: {known} are"));
            }
        };
        Ok(Rope { theta, scaling })
    }

    /// Of each layer. Qwen's are on by `use_sliding_window`, from layer `max_window_layers` on unless `layer_types` says which;
    /// Mistral's unless `sliding_window` is null.
    fn windows(&self, architecture: Architecture, layers: usize) -> Result<Vec<Option<u32>>> {
        let qwen = matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3);
        let on = match architecture {
            Architecture::Llama => false,
            Architecture::Mistral => self.object.get("sliding_window") != Some(&Value::Null),
            _ => self.bool("use_sliding_window")?.unwrap_or(false),
        };
        let window = match on {
            false => None,
            true if self.has("sliding_window") => Some(self.size("sliding_window")? as u32),
            // The default of all three; null turns the windows of Qwen off, too.
            true => (!self.object.contains_key("sliding_window")).then_some(4096),
        };
        if qwen && self.has("layer_types") {
            let Some(Value::Array(types)) = self.get("layer_types") else {
                return self.bad("layer_types", "not a list".into());
            };
            if types.len() != layers {
                return self.bad("layer_types", format!("{} entries for {layers} layers", types.len()));
            }
            let of = |kind: &Value| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") if window.is_some() => Ok(window),
                Some("sliding_attention") => {
                    self.bad("layer_types", "sliding_attention without a sliding_window".into())
                }
                _ => self
                    .bad("layer_types", format!("{kind} is not supported: full_attention and sliding_attention are")),
            };
            return types.iter().map(of).collect();
        }
        let first = match qwen {
            true if self.get("max_window_layers").and_then(Value::as_u64) == Some(0) => 0,
            true if self.has("max_window_layers") => self.size("max_window_layers")?,
            true => 28,
            false => 0,
        };
        Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect())
    }
}

/// The longest context: YaRN's factor is often given without having been multiplied into `max_position_embeddings`.
fn positions(max_position_embeddings: usize, rope: &Rope) -> usize {
    match rope.scaling {
        Scaling::Yarn { factor, original, .. } => {
            max_position_embeddings.max((factor * original).min(MAX_SIZE as f64) as usize)
        }
        _ => max_position_embeddings,
    }
}
