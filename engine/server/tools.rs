//! Functions that the model may call: the fields that tell of them, and the calls in its answers.
//!
//! A call is text of the answer, as the models of Nous Research and Qwen write it:
//! `<tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call>`. If the model may choose, its answer is free and calls are found
//! in it; if it must call, or must keep to a function's schema (`strict`), a grammar guides it.

use super::ServerState;
use super::errors::{ApiError, ApiResult};
use super::fields::Fields;
use super::form::Form;
use crate::structured::{InPlace, Structure, Tool};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
/// Functions of one request.
const MAX_TOOLS: usize = 128;

/// What `tools`, `tool_choice` and `parallel_tool_calls` say; nothing if the model is not to call any.
pub struct Tools {
    functions: Vec<Tool>,
    strict: bool,
    /// As it came, for the template.
    pub list: Value,
    choice: ToolChoice,
    parallel: bool,
}

#[derive(PartialEq)]
enum ToolChoice {
    Auto,
    Required,
    Named,
}

impl Tools {
    /// # Errors
    /// Fields that are not what they should be; a choice of what is not there; a template that would not tell the model of them.
    pub fn take(fields: &mut Fields, state: &ServerState) -> ApiResult<Option<Tools>> {
        let list = fields.array("tools")?.unwrap_or_default();
        let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
        let wanted = fields.take("tool_choice");
        if list.len() > MAX_TOOLS {
            return Err(fields.error("tools", format!("{} are more than {MAX_TOOLS}", list.len())));
        }
        let mut functions = Vec::with_capacity(list.len());
        let mut strict = false;
        for (i, tool) in list.iter().enumerate() {
            let (function, keeps) = function(&format!("tools[{i}]"), tool)?;
            if functions.iter().any(|f: &Tool| f.name == function.name) {
                return Err(fields.error("tools", format!("two of them are called {:?}", function.name)));
            }
            functions.push(function);
            strict |= keeps;
        }
        let mut tools = Tools { functions, strict, list: list.into(), choice: ToolChoice::Auto, parallel };
        match &wanted {
            Some(Value::String(choice)) if choice == "none" => return Ok(None),
            None if tools.functions.is_empty() => return Ok(None),
            Some(_) if tools.functions.is_empty() => {
                return Err(fields.error("tool_choice", "there is nothing to choose from: give tools"));
            }
            None => {}
            Some(Value::String(choice)) if choice == "auto" => {}
            Some(Value::String(choice)) if choice == "required" => tools.choice = ToolChoice::Required,
            Some(Value::Object(choice)) if choice.get("type").is_some_and(|kind| kind == "function") => {
                let name = choice.get("function").and_then(|function| function["name"].as_str());
                let Some(name) = name.or(choice.get("name").and_then(Value::as_str)) else {
                    return Err(fields.error("tool_choice.function.name", "missing"));
                };
                tools.functions.retain(|function| function.name == name);
                if tools.functions.is_empty() {
                    return Err(fields.error("tool_choice.function.name", format!("{name:?} is none of the tools")));
                }
                tools.choice = ToolChoice::Named;
            }
            Some(_) => {
                let problem = "none of \"none\", \"auto\", \"required\" and {\"type\": \"function\", \"function\": {\"name\": NAME}}";
                return Err(fields.error("tool_choice", problem));
            }
        }
        if tools.choice == ToolChoice::Auto && !state.service.frontend().writes_calls_as(OPEN) {
            let problem = "the model's chat template has no calls of tools in <tool_call> tags, so it would not make any: \
                           leave them out, or force a call by tool_choice";
            return Err(fields.error("tools", problem));
        }
        Ok(Some(tools))
    }

    /// What must guide the answer so that it is of this form or makes these calls; None: it is free.
    ///
    /// # Errors
    /// A form beside which no calls can be made.
    pub fn form(&self, answer: Option<Form>) -> ApiResult<Option<Form>> {
        let in_place = match (&self.choice, answer) {
            (ToolChoice::Auto, None) if !self.strict => return Ok(None),
            (ToolChoice::Auto, None) => InPlace::Text,
            (ToolChoice::Auto, Some((_, Structure::Schema(schema)))) => InPlace::Json(schema),
            (ToolChoice::Auto, Some((_, Structure::JsonObject))) => InPlace::Json(json!({"type": "object"})),
            (ToolChoice::Auto, Some((field, _))) => {
                return Err(ApiError::field(field, "beside tools, an answer can only be free or JSON"));
            }
            _ => InPlace::Nothing,
        };
        let parallel = self.parallel && self.choice != ToolChoice::Named;
        Ok(Some(("tools", Structure::Tools { tools: self.functions.clone(), in_place, parallel })))
    }

    /// Of an answer that has called. OpenAI's servers say so only where the model has chosen to.
    pub fn finish_reason(&self) -> &'static str {
        if self.choice == ToolChoice::Named { "stop" } else { "tool_calls" }
    }
}

fn function(path: &str, tool: &Value) -> ApiResult<(Tool, bool)> {
    if tool["type"] != "function" {
        return Err(ApiError::field(format!("{path}.type"), "only \"function\""));
    }
    let function = &tool["function"];
    let name = function["name"].as_str().unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.len() > 128 || !name.chars().all(plain) {
        let problem = "not a name of 1 to 128 letters, digits, _, - and .";
        return Err(ApiError::field(format!("{path}.function.name"), problem));
    }
    let parameters = match &function["parameters"] {
        Value::Null => json!({"type": "object", "properties": {}}),
        Value::Object(schema) => Value::Object(schema.clone()),
        _ => return Err(ApiError::field(format!("{path}.function.parameters"), "not a JSON schema")),
    };
    Ok((Tool { name: name.into(), parameters }, function["strict"] == true))
}

/// The calls of an earlier answer, as templates want them: their arguments are JSON in a string for clients, an object for templates.
///
/// # Errors
/// What is no list of calls.
pub fn earlier_calls(path: &str, value: Value) -> ApiResult<Option<Value>> {
    let wrong = |i: usize, problem: &str| ApiError::field(format!("{path}[{i}]"), problem);
    let calls = match value {
        Value::Null => return Ok(None),
        Value::Array(calls) if calls.is_empty() => return Ok(None),
        Value::Array(calls) => calls,
        _ => return Err(ApiError::field(path, "not a list of calls")),
    };
    let call = |(i, mut call): (usize, Value)| {
        let function = call.get_mut("function").and_then(Value::as_object_mut);
        let Some(function) = function.filter(|function| function.get("name").is_some_and(Value::is_string)) else {
            return Err(wrong(i, "not a call: function.name is missing"));
        };
        let arguments = match function.get("arguments") {
            None | Some(Value::Null) => Value::Object(Map::new()),
            Some(Value::Object(arguments)) => Value::Object(arguments.clone()),
            Some(Value::String(text)) if text.trim().is_empty() => Value::Object(Map::new()),
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(Value::Object(arguments)) => Value::Object(arguments),
                _ => return Err(wrong(i, "function.arguments is not a JSON object in a string")),
            },
            Some(_) => return Err(wrong(i, "function.arguments is not a JSON object in a string")),
        };
        function.insert("arguments".into(), arguments);
        Ok(call)
    };
    Ok(Some(calls.into_iter().enumerate().map(call).collect::<ApiResult<Vec<Value>>>()?.into()))
}

/// A part of an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Part {
    Text(String),
    Call {
        name: String,
        /// JSON, as the model wrote it.
        arguments: String,
    },
}

/// Finds calls in the text of an answer as it comes. What may yet be part of one is held back; what looks like one and is not is text.
#[derive(Default)]
pub struct CallParser {
    held: String,
    inside: bool,
    pub calls: usize,
}

#[derive(Deserialize)]
struct Written<'a> {
    name: String,
    #[serde(borrow, alias = "parameters")]
    arguments: &'a RawValue,
}

impl CallParser {
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held += text;
        let mut parts = Vec::new();
        // Where the next end of a call is looked for.
        let mut from = 0;
        loop {
            if !self.inside {
                let Some(open) = self.held.find(OPEN) else { break };
                let before = self.held[..open].trim_end().to_string();
                add_text(&mut parts, before);
                self.held.drain(..open + OPEN.len());
                (self.inside, from) = (true, 0);
            }
            let Some(close) = self.held[from..].find(CLOSE).map(|at| from + at) else { break };
            match serde_json::from_str::<Written>(self.held[..close].trim()) {
                Ok(Written { name, arguments }) => {
                    self.calls += 1;
                    parts.push(Part::Call { name, arguments: arguments.get().into() });
                }
                // It stands in a string of the arguments.
                Err(error) if error.is_eof() => {
                    from = close + CLOSE.len();
                    continue;
                }
                Err(_) => add_text(&mut parts, format!("{OPEN}{}{CLOSE}", &self.held[..close])),
            }
            self.held.drain(..close + CLOSE.len());
            self.inside = false;
        }
        if !self.inside {
            let may_open = (1..OPEN.len()).rev().find(|&n| self.held.ends_with(&OPEN[..n])).unwrap_or(0);
            let settled = self.held[..self.held.len() - may_open].trim_end().len();
            add_text(&mut parts, self.held.drain(..settled).collect());
        }
        parts
    }

    /// What was held back.
    pub fn finish(&mut self) -> Vec<Part> {
        let held = std::mem::take(&mut self.held);
        let mut parts = Vec::new();
        if std::mem::take(&mut self.inside) {
            add_text(&mut parts, OPEN.to_string() + &held);
        } else if self.calls == 0 || !held.trim().is_empty() {
            add_text(&mut parts, held);
        }
        parts
    }
}

fn add_text(parts: &mut Vec<Part>, text: String) {
    if !text.is_empty() {
        parts.push(Part::Text(text));
    }
}

#[cfg(test)]
mod tests {
    use super::{CallParser, Part};

    /// However the text is cut, the same parts.
    fn parts(text: &str) -> Vec<Part> {
        let divided = |size: usize| {
            let mut parser = CallParser::default();
            let characters: Vec<char> = text.chars().collect();
            let mut parts: Vec<Part> = Vec::new();
            let pieces = characters.chunks(size).map(|piece| parser.push(&piece.iter().collect::<String>()));
            let all: Vec<Vec<Part>> = pieces.collect();
            for part in all.into_iter().flatten().chain(parser.finish()) {
                match (parts.last_mut(), part) {
                    (Some(Part::Text(before)), Part::Text(text)) => *before += &text,
                    (_, part) => parts.push(part),
                }
            }
            parts
        };
        let whole = divided(usize::MAX);
        for size in [1, 2, 3, 7, 11] {
            assert_eq!(divided(size), whole, "{text:?} in pieces of {size}");
        }
        whole
    }

    fn text(text: &str) -> Part {
        Part::Text(text.into())
    }

    fn call(name: &str, arguments: &str) -> Part {
        Part::Call { name: name.into(), arguments: arguments.into() }
    }

    #[test]
    fn calls_are_found_wherever_the_text_is_cut() {
        assert_eq!(parts("Nothing < here, \n nor <tool"), [text("Nothing < here, \n nor <tool")]);
        let one = "I look.\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"x\": 1.50}}\n</tool_call>";
        assert_eq!(parts(one), [text("I look."), call("find", "{\"x\": 1.50}")]);
        assert_eq!(
            parts(&format!("{one}\n{one} ")),
            [text("I look."), call("find", "{\"x\": 1.50}"), text("\nI look."), call("find", "{\"x\": 1.50}")]
        );
        let tricky =
            "<tool_call>{\"arguments\": {\"text\": \"</tool_call> <tool_call>\"}, \"name\": \"say\"}</tool_call>";
        assert_eq!(parts(tricky), [call("say", "{\"text\": \"</tool_call> <tool_call>\"}")]);
    }

    #[test]
    fn what_is_no_call_is_text() {
        for not_a_call in
            ["<tool_call>find it</tool_call>", "<tool_call>{\"name\": 3}</tool_call>!", "<tool_call>\n{\"name"]
        {
            assert_eq!(parts(not_a_call), [text(not_a_call)]);
        }
    }
}
