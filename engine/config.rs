//! A model folder's config.json and generation_config.json, read into [`ModelConfig`] with every field checked: what gets
//! past here is a shape that the kernels can run. Knows no weights and no device.

use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// Model families that the launch list fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Qwen2,
}

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
    pub rope_theta: f64,
    pub tie_word_embeddings: bool,
    pub qkv_bias: bool,
    pub qk_norm: bool,
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
    pub repetition_penalty: Option<f32>,
}

/// Largest value of any size field: far beyond every model, and small enough that no product of four overflows 64 bits.
const MAX_SIZE: u64 = 1 << 24;

impl ModelConfig {
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
        if fields.bool("use_sliding_window")? == Some(true) {
            return fields.bad("use_sliding_window", "sliding-window attention is not supported".into());
        }
        let rms_norm_eps = fields.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(0.0..=1.0).contains(&rms_norm_eps) {
            return fields.bad("rms_norm_eps", format!("{rms_norm_eps} is not between 0 and 1"));
        }

        let mut eos_token_ids = Vec::new();
        fields.token_ids("eos_token_id", vocab_size, &mut eos_token_ids)?;
        let mut defaults = SamplingDefaults::default();
        if let Some(generation) = generation {
            let fields = Fields::parse(generation, generation_path)?;
            fields.token_ids("eos_token_id", vocab_size, &mut eos_token_ids)?;
            defaults = SamplingDefaults {
                do_sample: fields.bool("do_sample")?,
                temperature: fields.number("temperature")?.map(|x| x as f32),
                top_p: fields.number("top_p")?.map(|x| x as f32),
                top_k: fields.number("top_k")?.map(|x| x.clamp(0.0, MAX_SIZE as f64) as u32),
                repetition_penalty: fields.number("repetition_penalty")?.map(|x| x as f32),
            };
        }
        Ok(ModelConfig {
            architecture,
            hidden_size,
            intermediate_size,
            num_layers: fields.size("num_hidden_layers")?,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size,
            max_position_embeddings: fields.size("max_position_embeddings")?,
            rms_norm_eps: rms_norm_eps as f32,
            rope_theta: fields.rope_theta()?,
            tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: true,
            qk_norm: false,
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
        match name.or(self.string("model_type")?) {
            Some("Qwen2ForCausalLM" | "qwen2") => Ok(Architecture::Qwen2),
            Some(other) => self.bad("architectures", format!("{other:?} is not supported: \"Qwen2ForCausalLM\" is")),
            None => self.bad("architectures", "missing: is this a Hugging Face model folder?".into()),
        }
    }

    /// `rope_theta` at the root, or the newer `rope_parameters.rope_theta`. Only plain RoPE.
    fn rope_theta(&self) -> Result<f64> {
        let mut theta = self.number("rope_theta")?;
        for name in ["rope_parameters", "rope_scaling"] {
            let Some(value) = self.get(name) else { continue };
            let Value::Object(object) = value else { return self.bad(name, format!("{value} is not an object")) };
            let inner = Fields { path: self.path, object: object.clone() };
            let kind = match inner.string("rope_type")? {
                Some(kind) => Some(kind),
                None => inner.string("type")?,
            };
            if kind.is_some_and(|kind| kind != "default") {
                return self.bad(name, format!("RoPE of type {:?} is not supported: \"default\" is", kind.unwrap()));
            }
            theta = inner.number("rope_theta")?.or(theta);
        }
        match theta {
            Some(theta) if theta > 1.0 => Ok(theta),
            Some(theta) => self.bad("rope_theta", format!("{theta} is not greater than 1")),
            None => self.bad("rope_theta", "missing (also in rope_parameters)".into()),
        }
    }
}
