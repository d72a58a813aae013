//! The fields of a JSON body, taken one by one; what is left when a dialect has taken all it knows is judged as well: a field that
//! is known but not served is refused, one about thinking is refused, any other one is accepted and counted.

use super::errors::{ApiError, ApiResult};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

#[derive(Clone, Default)]
pub struct Fields {
    map: Map<String, Value>,
    /// What stands before the names of these fields in messages: "thinking.".
    prefix: String,
}

/// Strings that a client gives to be looked for or forced: how many, and how long each.
pub const MAX_STRINGS: usize = 16;
pub const MAX_STRING_BYTES: usize = 256;

impl Fields {
    /// # Errors
    /// A body that is not a JSON object.
    pub fn parse(body: &[u8]) -> ApiResult<Fields> {
        let not_json = |problem: String| ApiError::new(axum::http::StatusCode::BAD_REQUEST, problem);
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Fields { map, prefix: String::new() }),
            Ok(_) => Err(not_json("the body is not a JSON object".into())),
            Err(e) => Err(not_json(format!("the body is not valid JSON: {e}"))),
        }
    }

    /// As messages call it.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub fn error(&self, name: &str, problem: impl std::fmt::Display) -> ApiError {
        ApiError::field(self.path(name), problem)
    }

    /// The value of a field, which is taken out. null is as good as absent.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// Under another name, or in another shape.
    pub fn put(&mut self, name: &str, value: Value) {
        self.map.insert(name.into(), value);
    }

    fn typed<T>(&mut self, name: &str, wanted: &str, read: impl FnOnce(Value) -> Option<T>) -> ApiResult<Option<T>> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.error(name, format!("not {wanted}"))),
            },
        }
    }

    pub fn boolean(&mut self, name: &str) -> ApiResult<Option<bool>> {
        self.typed(name, "true or false", |value| value.as_bool())
    }

    pub fn string(&mut self, name: &str) -> ApiResult<Option<String>> {
        self.typed(name, "a string", |value| match value {
            Value::String(text) => Some(text),
            _ => None,
        })
    }

    pub fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> ApiResult<Option<i64>> {
        let wanted = format!("an integer from {} to {}", range.start(), range.end());
        self.typed(name, &wanted, |value| value.as_i64().filter(|n| range.contains(n)))
    }

    /// A count: 0 and up.
    pub fn count(&mut self, name: &str, most: u32) -> ApiResult<Option<u32>> {
        Ok(self.integer(name, 0..=i64::from(most))?.map(|n| n as u32))
    }

    /// Ranges are judged where all requests are (`sampling.rs`); here a number must be one as f32.
    pub fn number(&mut self, name: &str) -> ApiResult<Option<f32>> {
        self.typed(name, "a finite number", |value| value.as_f64().map(|x| x as f32).filter(|x| x.is_finite()))
    }

    pub fn object(&mut self, name: &str) -> ApiResult<Option<Fields>> {
        let prefix = self.path(name) + ".";
        self.typed(name, "an object", |value| match value {
            Value::Object(map) => Some(Fields { map, prefix }),
            _ => None,
        })
    }

    pub fn array(&mut self, name: &str) -> ApiResult<Option<Vec<Value>>> {
        self.typed(name, "an array", |value| match value {
            Value::Array(items) => Some(items),
            _ => None,
        })
    }

    /// One string or a list of them.
    pub fn strings(&mut self, name: &str) -> ApiResult<Option<Vec<String>>> {
        let list = match self.take(name) {
            None => return Ok(None),
            Some(Value::Array(list)) => list,
            Some(one) => vec![one],
        };
        if list.len() > MAX_STRINGS {
            return Err(self.error(name, format!("{} strings are more than {MAX_STRINGS}", list.len())));
        }
        let mut strings = Vec::with_capacity(list.len());
        for value in list {
            match value {
                Value::String(text) if text.len() <= MAX_STRING_BYTES => strings.push(text),
                Value::String(text) => {
                    let problem = format!("a string of {} bytes: at most {MAX_STRING_BYTES}", text.len());
                    return Err(self.error(name, problem));
                }
                _ => return Err(self.error(name, "not a string or a list of strings")),
            }
        }
        Ok(Some(strings))
    }

    /// Token ids; whether the model has them is judged where all requests are.
    pub fn ids(&mut self, name: &str, most: usize) -> ApiResult<Option<Vec<u32>>> {
        let Some(list) = self.array(name)? else { return Ok(None) };
        if list.len() > most {
            return Err(self.error(name, format!("{} token ids are more than {most}", list.len())));
        }
        let ids = token_ids(&list).ok_or_else(|| self.error(name, "not a list of token ids"))?;
        Ok(Some(ids))
    }

    /// For an object whose every entry is data.
    pub fn into_entries(self) -> Map<String, Value> {
        self.map
    }

    /// Of those that nobody has taken.
    pub fn names(&self) -> Vec<&str> {
        self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str()).collect()
    }

    /// What nobody has taken: the names of unknown fields.
    ///
    /// # Errors
    /// One that asks for something this server does not do, or that may be about thinking.
    pub fn unknown(self) -> ApiResult<Vec<String>> {
        let mut names = Vec::new();
        for (name, value) in &self.map {
            let always = ALWAYS.contains(&name.as_str());
            if value.is_null() || IGNORED.contains(&name.as_str()) || always && *value == Value::Bool(true) {
                continue;
            }
            if always {
                return Err(self.error(name, "this server cannot do without: leave the field out"));
            }
            if let Some((_, harmless)) = UNSUPPORTED.iter().find(|(field, _)| field == name) {
                if is_default(value) || value.as_str().is_some_and(|text| text == *harmless) {
                    continue;
                }
                return Err(self.error(name, "this server cannot do that: leave the field out"));
            }
            if let Some(path) = about_thinking(name, value) {
                let problem = "this server knows no such field about thinking. It knows thinking_token_budget, \
                               min_thinking_tokens, exact_thinking_tokens, thinking_n_ignore, thinking_n_ignore_str, thinking_end_str, \
                               thinking_delimiters, thinking_steering, reasoning_effort and thinking.budget_tokens";
                return Err(self.error(&path, problem));
            }
            names.push(self.path(name).chars().take(64).collect());
        }
        Ok(names)
    }
}

pub fn token_ids(list: &[Value]) -> Option<Vec<u32>> {
    list.iter().map(|value| value.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

/// Known, and without a bearing on the text.
const IGNORED: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "session_id",
    "verbosity",
    "parallel_tool_calls",
];

/// What is always so.
const ALWAYS: &[&str] = &["add_generation_prompt", "separate_reasoning", "stream_reasoning"];

/// Known fields that ask for what is not done here, and a string that asks for nothing.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("best_of", ""),
    ("continue_final_message", ""),
    ("add_special_tokens", ""),
    ("echo", ""),
    ("return_tokens_as_token_ids", ""),
    ("logprob_token_ids", ""),
    ("spaces_between_special_tokens", ""),
    ("response_format", ""),
    ("structured_outputs", ""),
    ("structural_tag", ""),
    ("guided_json", ""),
    ("guided_regex", ""),
    ("guided_choice", ""),
    ("guided_grammar", ""),
    ("tools", ""),
    ("tool_choice", "none"),
    ("audio", ""),
    ("modalities", "text"),
    ("prediction", ""),
    ("web_search_options", ""),
    ("functions", ""),
    ("function_call", "none"),
    ("suffix", ""),
    ("use_beam_search", ""),
    ("length_penalty", ""),
    ("bad_words", ""),
    ("documents", ""),
    ("mm_processor_kwargs", ""),
    ("chat_template", ""),
    ("prompt_embeds", ""),
    ("logits_processors", ""),
    ("kv_transfer_params", ""),
    ("repetition_detection", ""),
    ("truncate_prompt_tokens", ""),
    ("background", ""),
    ("previous_response_id", ""),
    ("conversation", ""),
    ("container", ""),
    ("mcp_servers", ""),
];

/// false, an empty list, ["text"]: nothing is asked for.
fn is_default(value: &Value) -> bool {
    match value {
        Value::Bool(asked) => !asked,
        Value::Array(items) => items.iter().all(|item| item == "text"),
        Value::Object(map) => map.is_empty() || (map.len() == 1 && map.get("type").is_some_and(|kind| kind == "text")),
        Value::Number(n) => n.as_f64() == Some(1.0),
        _ => false,
    }
}

/// Where a field speaks of thinking, itself or something in it.
pub fn about_thinking(name: &str, value: &Value) -> Option<String> {
    let lower = name.to_ascii_lowercase();
    let asks = !matches!(value, Value::Null);
    if asks && ["think", "reason", "budget"].iter().any(|word| lower.contains(word)) {
        return Some(name.into());
    }
    let inner = match value {
        Value::Object(map) => map.iter().find_map(|(name, value)| about_thinking(name, value)),
        Value::Array(items) => items.iter().find_map(|item| about_thinking("", item)),
        _ => None,
    };
    inner.map(|path| if name.is_empty() { path } else { format!("{name}.{path}") })
}
