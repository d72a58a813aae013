//! The form that a request wants its answer to have: `response_format`, vLLM's `structured_outputs` and its older `guided_*`.

use super::errors::{ApiError, ApiResult};
use super::fields::Fields;
use crate::structured::Structure;
use serde_json::Value;

/// What is to be guided, and the field that asks for it.
pub type Form = (&'static str, Structure);

/// Strings that an answer is chosen from.
const MAX_CHOICES: usize = 1024;

/// # Errors
/// Fields that are not what they should be, forms that this server cannot guarantee, more than one of them.
pub fn take(fields: &mut Fields) -> ApiResult<Option<Form>> {
    let mut forms = Vec::new();
    if let Some(format) = fields.object("response_format")? {
        forms.extend(json_format(format, true)?.map(|structure| ("response_format", structure)));
    }
    if let Some(mut object) = fields.object("structured_outputs")? {
        for (name, kind) in ["json", "regex", "choice", "grammar"].into_iter().zip(KINDS) {
            forms.extend(structure(&mut object, kind, name)?.map(|structure| ("structured_outputs", structure)));
        }
        if object.boolean("json_object")? == Some(true) {
            forms.push(("structured_outputs", Structure::JsonObject));
        }
        // Whitespace is where the usual printers put it.
        object.boolean("disable_any_whitespace")?;
        object.boolean("disable_fallback")?;
        object.boolean("disable_additional_properties")?;
        if let Some(name) = object.names().first() {
            return Err(object.error(name, "only json, regex, choice, grammar and json_object"));
        }
    }
    for (name, kind) in ["guided_json", "guided_regex", "guided_choice", "guided_grammar"].into_iter().zip(KINDS) {
        forms.extend(structure(fields, kind, name)?.map(|structure| (name, structure)));
    }
    match forms.len() {
        0 | 1 => Ok(forms.pop()),
        _ => Err(ApiError::field(forms[1].0, "an answer has one form: leave out all fields but one that ask for any")),
    }
}

/// `response_format`, or `text.format` of the responses dialect, in which the schema stands without an object around it.
///
/// # Errors
/// Other types than text, json_object and json_schema.
pub fn json_format(mut format: Fields, wrapped: bool) -> ApiResult<Option<Structure>> {
    let kind = format.string("type")?;
    match kind.as_deref() {
        Some("text") => Ok(None),
        // With a schema, as llama.cpp has it.
        Some("json_object") => {
            Ok(Some(schema(&mut format, "schema")?.map_or(Structure::JsonObject, Structure::Schema)))
        }
        Some("json_schema") => {
            let path = format.path(if wrapped { "json_schema.schema" } else { "schema" });
            let mut inner = if wrapped { format.object("json_schema")?.unwrap_or_default() } else { format };
            match schema(&mut inner, "schema")? {
                Some(schema) => Ok(Some(Structure::Schema(schema))),
                None => Err(ApiError::field(path, "missing: give the JSON schema as an object")),
            }
        }
        _ => Err(format.error("type", "none of text, json_object and json_schema")),
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Json,
    Regex,
    Choice,
    Grammar,
}

const KINDS: [Kind; 4] = [Kind::Json, Kind::Regex, Kind::Choice, Kind::Grammar];

fn structure(fields: &mut Fields, kind: Kind, name: &str) -> ApiResult<Option<Structure>> {
    Ok(match kind {
        Kind::Json => schema(fields, name)?.map(Structure::Schema),
        Kind::Regex => fields.string(name)?.map(Structure::Regex),
        Kind::Grammar => fields.string(name)?.map(Structure::Lark),
        Kind::Choice => {
            let Some(list) = fields.array(name)? else { return Ok(None) };
            if list.is_empty() || list.len() > MAX_CHOICES {
                return Err(fields.error(name, format!("give 1 to {MAX_CHOICES} strings")));
            }
            let text = |choice: &Value| choice.as_str().filter(|text| !text.is_empty()).map(String::from);
            let choices: Option<Vec<String>> = list.iter().map(text).collect();
            Some(Structure::Choice(choices.ok_or_else(|| fields.error(name, "not a list of strings"))?))
        }
    })
}

/// A schema, or one in a string.
fn schema(fields: &mut Fields, name: &str) -> ApiResult<Option<Value>> {
    let Some(value) = fields.take(name) else { return Ok(None) };
    let value = match value {
        Value::String(text) => serde_json::from_str(&text).map_err(|e| fields.error(name, format!("not JSON: {e}")))?,
        value => value,
    };
    match value {
        Value::Object(_) => Ok(Some(value)),
        _ => Err(fields.error(name, "not a JSON schema: it must be an object")),
    }
}
