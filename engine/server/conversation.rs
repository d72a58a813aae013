//! The messages of a request, as all dialects of chat send them, and the prompt that they make; and the two texts of an answer,
//! thinking and answer, without the space before them.

use super::errors::{ApiError, ApiResult};
use super::fields::Fields;
use super::tools::{self, Tools};
use super::{ServerState, parameters};
use crate::chat::Message;
use crate::sequence::{Answer, Channel, Piece};
use serde_json::Value;

/// Turns of a conversation.
const MAX_MESSAGES: usize = 4096;

/// The prompt of a conversation, for those who only want to know its tokens.
pub fn prompt(mut fields: Fields, state: &ServerState) -> ApiResult<Vec<u32>> {
    let messages = messages(&mut fields, "messages")?;
    let thinking = parameters::thinking(&mut fields, state)?;
    let mut variables = parameters::template_variables(&thinking, state, &mut Vec::new())?;
    variables.extend(Tools::take(&mut fields, state)?.map(|tools| ("tools".into(), tools.list)));
    Ok(state.service.frontend().encode_chat_with(&messages, &variables, &thinking.budget)?)
}

/// The conversation so far, from a field.
pub fn messages(fields: &mut Fields, name: &str) -> ApiResult<Vec<Message>> {
    let list = fields.array(name)?.unwrap_or_default();
    if list.is_empty() {
        return Err(fields.error(name, "there must be at least one"));
    }
    if list.len() > MAX_MESSAGES {
        return Err(fields.error(name, format!("{} are more than {MAX_MESSAGES}", list.len())));
    }
    list.into_iter().enumerate().map(|(i, value)| message(&format!("{name}[{i}]"), value)).collect()
}

fn message(path: &str, value: Value) -> ApiResult<Message> {
    let wrong = |name: &str, problem: &str| ApiError::field(format!("{path}{name}"), problem);
    let Value::Object(mut map) = value else { return Err(wrong("", "not an object")) };
    let role = match map.shift_remove("role") {
        Some(Value::String(role)) if role == "developer" => "system".into(),
        Some(Value::String(role)) if ["system", "user", "assistant", "tool"].contains(&role.as_str()) => role,
        _ => return Err(wrong(".role", "none of system, developer, user, assistant and tool")),
    };
    let calls =
        tools::earlier_calls(&format!("{path}.tool_calls"), map.shift_remove("tool_calls").unwrap_or_default())?;
    let (content, thought) = content(&format!("{path}.content"), map.shift_remove("content"))?;
    let said = |name: &str| map.get(name).and_then(|value| value.as_str()).map(String::from);
    let reasoning_content = said("reasoning_content").or(said("reasoning")).or(thought).filter(|_| role == "assistant");
    let tool_call_id = said("tool_call_id");
    Ok(Message {
        reasoning_content,
        tool_calls: calls,
        tool_call_id,
        name: said("name"),
        ..Message::new(&role, content)
    })
}

/// A string or parts of text, and what parts of thinking say.
pub fn content(path: &str, value: Option<Value>) -> ApiResult<(String, Option<String>)> {
    let parts = match value {
        None | Some(Value::Null) => return Ok((String::new(), None)),
        Some(Value::String(text)) => return Ok((text, None)),
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err(ApiError::field(path, "not a string or a list of parts")),
    };
    let (mut content, mut thought) = (String::new(), None::<String>);
    for part in &parts {
        let text = match part["type"].as_str() {
            Some("text" | "input_text" | "output_text") => part["text"].as_str().map(|text| content.push_str(text)),
            Some("thinking") => part["thinking"].as_str().map(|text| thought.get_or_insert_default().push_str(text)),
            Some("redacted_thinking") => Some(()),
            _ => None,
        };
        text.ok_or_else(|| ApiError::field(path, "only parts of type text can be read"))?;
    }
    Ok((content, thought))
}

/// What of an answer has been sent: text before which only space has come is sent without it.
#[derive(Default)]
pub struct Channels {
    reasoning: bool,
    answer: bool,
}

impl Channels {
    /// What is to be sent of a piece, if anything.
    pub fn show<'a>(&mut self, piece: &'a Piece) -> Option<(Channel, &'a str)> {
        let begun = match piece.channel {
            Channel::Delimiter => return None,
            Channel::Reasoning => &mut self.reasoning,
            Channel::Answer => &mut self.answer,
        };
        let text = if *begun { piece.text.as_str() } else { piece.text.trim_start() };
        *begun |= !text.is_empty();
        (!text.is_empty()).then_some((piece.channel, text))
    }
}

/// All that [`Channels`] would show of a channel.
pub fn text(answer: &Answer, channel: Channel) -> String {
    let text: String = answer.pieces.iter().filter(|p| p.channel == channel).map(|p| p.text.as_str()).collect();
    text.trim_start().into()
}
