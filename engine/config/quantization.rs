//! What config.json says of quantised weights: fp8 (e4m3) is accepted in the spellings of Qwen and DeepSeek and of
//! compressed-tensors, everything else refused by its name. Which tensors are fp8 is said by the files and not here.

use super::Fields;
use crate::Result;
use serde_json::{Map, Value, json};

/// What numbers of a matrix share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fp8Scales {
    PerTensor,
    /// Each row of the matrix, an output channel.
    PerChannel,
    /// 128 rows and columns.
    PerBlock,
}

/// An object in config.json and the way to it.
struct Section<'a> {
    file: &'a Fields<'a>,
    path: String,
    object: &'a Map<String, Value>,
}

/// `quantization_config`, or `compression_config` as compressed-tensors called it before.
pub(super) fn parse(file: &Fields) -> Result<Option<Fp8Scales>> {
    let both = Section { file, path: String::new(), object: &file.object };
    let Some(section) = both.section("quantization_config")?.or(both.section("compression_config")?) else {
        return Ok(None);
    };
    match section.get("quant_method").as_str() {
        Some("fp8") => section.fp8().map(Some),
        Some("compressed-tensors") => section.compressed_tensors().map(Some),
        _ => section.one_of("quant_method", &[json!("fp8"), json!("compressed-tensors")]).map(|_| None),
    }
}

impl<'a> Section<'a> {
    fn bad<T>(&self, field: &str, problem: String) -> Result<T> {
        self.file.bad(&self.path_of(field), problem)
    }

    fn path_of(&self, field: &str) -> String {
        if self.path.is_empty() { field.into() } else { format!("{}.{field}", self.path) }
    }

    /// Null where absent.
    fn get(&self, field: &str) -> &'a Value {
        self.object.get(field).unwrap_or(&Value::Null)
    }

    fn section(&self, field: &str) -> Result<Option<Section<'a>>> {
        match self.get(field) {
            Value::Null => Ok(None),
            Value::Object(object) => Ok(Some(Section { file: self.file, path: self.path_of(field), object })),
            other => self.bad(field, format!("{other} is not an object")),
        }
    }

    fn required(&self, field: &str) -> Result<Section<'a>> {
        self.section(field)?.map_or_else(|| self.bad(field, "missing".into()), Ok)
    }

    /// Where null is among the values, the field may be absent.
    fn one_of(&self, field: &str, values: &[Value]) -> Result<&'a Value> {
        let value = self.get(field);
        if values.contains(value) {
            return Ok(value);
        }
        let known: Vec<String> = values.iter().filter(|v| !v.is_null()).map(Value::to_string).collect();
        let verb = if known.len() == 1 { "is" } else { "are" };
        let known = format!("{} {verb}", known.join(" and "));
        match value {
            Value::Null => self.bad(field, format!("missing: {known} supported")),
            other => self.bad(field, format!("{other} is not supported: {known}")),
        }
    }

    fn is_empty(&self) -> bool {
        self.object.is_empty()
    }

    /// As Qwen, DeepSeek and AutoFP8 have it.
    fn fp8(&self) -> Result<Fp8Scales> {
        self.one_of("activation_scheme", &[Value::Null, json!("dynamic"), json!("static")])?;
        self.one_of("fmt", &[Value::Null, json!("e4m3")])?;
        self.one_of("scale_fmt", &[Value::Null, json!("float")])?;
        self.one_of("kv_cache_scheme", &[Value::Null, json!("static")])?;
        match self.one_of("weight_block_size", &[Value::Null, json!([128, 128])])? {
            Value::Null => Ok(Fp8Scales::PerTensor),
            _ => Ok(Fp8Scales::PerBlock),
        }
    }

    /// Those of the first group, where groups differ.
    fn compressed_tensors(&self) -> Result<Fp8Scales> {
        let formats = [json!("float-quantized"), json!("naive-quantized")];
        self.one_of("format", &formats)?;
        if let Some(sparsity) = self.section("sparsity_config")?.filter(|s| !s.is_empty()) {
            sparsity.one_of("format", &[json!("dense")])?;
        }
        if self.section("transform_config")?.is_some_and(|t| !t.is_empty()) {
            return self.bad("transform_config", "transformed weights are not supported".into());
        }
        if let Some(scheme) = self.section("kv_cache_scheme")? {
            scheme.float8()?;
            scheme.one_of("strategy", &[Value::Null, json!("tensor")])?;
        }
        let groups = self.required("config_groups")?;
        let mut scales = None;
        for name in groups.object.keys() {
            let group = groups.required(name)?;
            group.one_of("format", &[&[Value::Null], &formats[..]].concat())?;
            if let Some(activations) = group.section("input_activations")? {
                activations.float8()?;
            }
            group.one_of("output_activations", &[Value::Null])?;
            let weights = group.required("weights")?;
            weights.float8()?;
            let strategies = [json!("tensor"), json!("channel"), json!("block")];
            let of_group = match weights.one_of("strategy", &strategies)?.as_str() {
                Some("tensor") => Fp8Scales::PerTensor,
                Some("channel") => Fp8Scales::PerChannel,
                _ => {
                    weights.one_of("block_structure", &[json!([128, 128])])?;
                    Fp8Scales::PerBlock
                }
            };
            scales.get_or_insert(of_group);
        }
        scales.map_or_else(|| self.bad("config_groups", "empty".into()), Ok)
    }

    /// Numbers of 8 bits, symmetric about 0.
    fn float8(&self) -> Result<()> {
        self.one_of("type", &[json!("float")])?;
        self.one_of("num_bits", &[json!(8)])?;
        self.one_of("symmetric", &[Value::Null, json!(true)]).map(|_| ())
    }
}
