//! `/v1/chat/completions`.

use super::errors::{ApiError, ApiResult};
use super::fields::Fields;
use super::generation::GenerationRequest;
use super::openai::{self, Counts, Head, StreamOptions};
use super::sse::Events;
use super::{Dialect, ServerState, parameters};
use crate::batch::TokenEvent;
use crate::chat::Message;
use crate::engine::Update;
use crate::sequence::{Answer, Channel, FinishReason};
use crate::service::Service;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Turns of a conversation.
const MAX_MESSAGES: usize = 4096;

pub struct Chat {
    service: Arc<Service>,
    head: Head,
    prompt_tokens: usize,
    options: StreamOptions,
    logprobs: bool,
    reasoning: bool,
    choices: Vec<Choice>,
}

/// One answer under way.
#[derive(Default)]
struct Choice {
    counts: Counts,
    started: bool,
    /// Whether any text has been sent in a channel: what precedes it there is space.
    reasoning: bool,
    answer: bool,
    /// Log probabilities of tokens whose text is yet to be sent.
    logprobs: Vec<Value>,
}

impl Dialect for Chat {
    fn parse(mut fields: Fields, state: &ServerState) -> ApiResult<(GenerationRequest, Chat)> {
        let head = Head::take(&mut fields, state, "chatcmpl-", "chat.completion")?;
        let messages = messages(&mut fields)?;
        let n = openai::answers(&mut fields)?;
        let options = StreamOptions::take(&mut fields)?;
        let mut request = parameters::sampling(&mut fields)?;
        let deprecated = fields.count("max_tokens", parameters::MOST_TOKENS)?;
        request.max_tokens = fields.count("max_completion_tokens", parameters::MOST_TOKENS)?.or(deprecated);
        let logprobs = fields.boolean("logprobs")?.unwrap_or(false);
        let top = parameters::top_logprobs(&mut fields, "top_logprobs")?;
        if top.is_some_and(|k| k > 0) && !logprobs {
            return Err(fields.error("top_logprobs", "only with logprobs"));
        }
        request.sampling.logprobs = logprobs.then_some(top.unwrap_or(0));
        let reasoning = fields.boolean("include_reasoning")?.unwrap_or(true);
        let thinking = parameters::thinking(&mut fields, state)?;
        let mut unknown = Vec::new();
        let variables = parameters::template_variables(&thinking, state, &mut unknown)?;
        unknown.extend(fields.unknown()?);
        request.budget = thinking.budget;
        let prompt = state.service.frontend().encode_chat_with(&messages, &variables)?;
        let chat = Chat {
            service: state.service.clone(),
            head,
            prompt_tokens: prompt.len(),
            options,
            logprobs,
            reasoning,
            choices: (0..n).map(|_| Choice::default()).collect(),
        };
        Ok((GenerationRequest { prompts: vec![prompt], n, request, stream: options.stream, unknown }, chat))
    }

    fn begin(&mut self, _events: &mut Events) {
        self.head.object = "chat.completion.chunk";
    }

    fn update(&mut self, index: usize, update: Update, events: &mut Events) {
        if let Some(token) = &update.token {
            self.choices[index].counts = Counts::of(token);
            if self.logprobs {
                let logprob = self.logprob(token);
                self.choices[index].logprobs.push(logprob);
            }
        }
        for piece in &update.text {
            let choice = &mut self.choices[index];
            let (begun, names): (_, &[&str]) = match piece.channel {
                Channel::Delimiter => continue,
                Channel::Reasoning if !self.reasoning => continue,
                Channel::Reasoning => (&mut choice.reasoning, &["reasoning", "reasoning_content"]),
                Channel::Answer => (&mut choice.answer, &["content"]),
            };
            let text = if *begun { piece.text.as_str() } else { piece.text.trim_start() };
            if !text.is_empty() {
                *begun = true;
                let delta = names.iter().map(|name| (name.to_string(), text.into())).collect();
                self.chunk(index, delta, piece.injected, None, events);
            }
        }
        if let Some(finish) = update.finish {
            self.chunk(index, Map::new(), false, Some(finish), events);
        }
    }

    fn end(&mut self, events: &mut Events) {
        if self.options.usage {
            let mut chunk = self.head.json(json!([]));
            chunk.insert("usage".into(), self.usage());
            events.data(&chunk.into());
        }
        events.done();
    }

    fn fail(&mut self, error: &ApiError, events: &mut Events) {
        events.data(&error.json());
        events.done();
    }

    fn whole(&mut self, answers: &[Answer]) -> Value {
        let mut choices = Vec::with_capacity(answers.len());
        for (index, answer) in answers.iter().enumerate() {
            if let Some(last) = answer.tokens.last() {
                self.choices[index].counts = Counts::of(last);
            }
            let text = |channel| {
                let pieces = answer.pieces.iter().filter(|piece| piece.channel == channel);
                let text: String = pieces.map(|piece| piece.text.as_str()).collect();
                text.trim_start().to_string()
            };
            let mut message = json!({"role": "assistant", "content": text(Channel::Answer)});
            let reasoning = text(Channel::Reasoning);
            if self.reasoning && !reasoning.is_empty() {
                message["reasoning"] = reasoning.as_str().into();
                message["reasoning_content"] = reasoning.into();
            }
            let logprobs: Option<Vec<Value>> =
                self.logprobs.then(|| answer.tokens.iter().map(|token| self.logprob(token)).collect());
            let mut choice = json!({
                "index": index,
                "message": message,
                "logprobs": logprobs.map(|content| json!({"content": content})),
                "finish_reason": answer.finish.map(FinishReason::name),
            });
            self.add_thinking(index, &mut choice);
            choices.push(choice);
        }
        let mut whole = self.head.json(choices.into());
        whole.insert("usage".into(), self.usage());
        whole.into()
    }
}

impl Chat {
    fn chunk(
        &mut self,
        index: usize,
        mut delta: Map<String, Value>,
        injected: bool,
        finish: Option<FinishReason>,
        events: &mut Events,
    ) {
        let choice = &mut self.choices[index];
        if !choice.started {
            choice.started = true;
            delta.insert("role".into(), "assistant".into());
            if finish.is_some() {
                delta.insert("content".into(), "".into());
            }
        }
        let logprobs = std::mem::take(&mut choice.logprobs);
        let mut json = json!({
            "index": index,
            "delta": delta,
            "logprobs": self.logprobs.then(|| json!({"content": logprobs})),
            "finish_reason": finish.map(FinishReason::name),
        });
        if injected {
            json["injected"] = true.into();
        }
        if finish.is_some() {
            self.add_thinking(index, &mut json);
        }
        let mut chunk = self.head.json(json!([json]));
        if self.options.continuous_usage {
            chunk.insert("usage".into(), self.usage());
        }
        events.data(&chunk.into());
    }

    fn add_thinking(&self, index: usize, choice: &mut Value) {
        if self.service.frontend().delimiters.is_some() {
            choice["thinking"] = self.choices[index].counts.thinking();
        }
    }

    fn usage(&self) -> Value {
        openai::usage(self.prompt_tokens, self.choices.iter().map(|choice| choice.counts))
    }

    fn logprob(&self, token: &TokenEvent) -> Value {
        let tokenizer = &self.service.frontend().tokenizer;
        let entry = |id: u32, logprob: f32| {
            json!({
                "token": openai::token_text(tokenizer, id),
                "logprob": openai::finite(logprob),
                "bytes": tokenizer.token_bytes(id),
            })
        };
        let mut json = entry(token.token, token.logprob);
        json["top_logprobs"] = token.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
        json
    }
}

/// The prompt of a conversation, for those who only want to know its tokens.
pub fn prompt(fields: &mut Fields, state: &ServerState) -> ApiResult<Vec<u32>> {
    let messages = messages(fields)?;
    let thinking = parameters::thinking(fields, state)?;
    let variables = parameters::template_variables(&thinking, state, &mut Vec::new())?;
    Ok(state.service.frontend().encode_chat_with(&messages, &variables)?)
}

/// The conversation so far.
fn messages(fields: &mut Fields) -> ApiResult<Vec<Message>> {
    let list = fields.array("messages")?.unwrap_or_default();
    if list.is_empty() {
        return Err(fields.error("messages", "there must be at least one"));
    }
    if list.len() > MAX_MESSAGES {
        return Err(fields.error("messages", format!("{} are more than {MAX_MESSAGES}", list.len())));
    }
    list.into_iter().enumerate().map(|(i, value)| message(fields, i, value)).collect()
}

fn message(fields: &Fields, index: usize, value: Value) -> ApiResult<Message> {
    let wrong = |name: &str, problem: &str| Err(fields.error(&format!("messages[{index}]{name}"), problem));
    let Value::Object(mut map) = value else { return wrong("", "not an object") };
    let role = match map.shift_remove("role") {
        Some(Value::String(role)) if role == "developer" => "system".into(),
        Some(Value::String(role)) if ["system", "user", "assistant", "tool"].contains(&role.as_str()) => role,
        _ => return wrong(".role", "none of system, developer, user, assistant and tool"),
    };
    let content = match map.shift_remove("content") {
        Some(Value::String(text)) => text,
        None | Some(Value::Null) => String::new(),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| match part["type"].as_str() {
                Some("text" | "input_text" | "output_text") => part["text"].as_str().map(String::from),
                _ => None,
            };
            match parts.iter().map(text).collect::<Option<String>>() {
                Some(text) => text,
                None => return wrong(".content", "only parts of type text can be read"),
            }
        }
        Some(_) => return wrong(".content", "not a string or a list of parts"),
    };
    Ok(Message::new(&role, content))
}
