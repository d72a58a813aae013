//! `/v1/messages`: Anthropic's interface.

use super::conversation::{self, Channels};
use super::errors::{ApiError, ApiResult};
use super::fields::Fields;
use super::generation::GenerationRequest;
use super::openai::{self, Counts};
use super::sse::Events;
use super::{Dialect, ServerState, blocking, body, json, parameters};
use crate::budget::BudgetRequest;
use crate::chat::Message;
use crate::engine::Update;
use crate::sequence::{Answer, Channel, FinishReason};
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::sync::Arc;

pub struct Messages {
    id: String,
    model: String,
    prompt_tokens: usize,
    thinks: bool,
    counts: Counts,
    channels: Channels,
    /// Content blocks so far, the open one included.
    blocks: usize,
    open: Option<Channel>,
    stop: (Option<FinishReason>, Option<String>),
}

impl Dialect for Messages {
    fn parse(mut fields: Fields, state: &ServerState) -> ApiResult<(GenerationRequest, Messages)> {
        openai::check_model(&mut fields, state)?;
        let stream = fields.boolean("stream")?.unwrap_or(false);
        if let Some(stop) = fields.take("stop_sequences") {
            fields.put("stop", stop);
        }
        let mut request = parameters::sampling(&mut fields)?;
        request.max_tokens = fields.count("max_tokens", parameters::MOST_TOKENS)?;
        if request.max_tokens.is_none() {
            return Err(fields.error("max_tokens", "this interface wants it to be said"));
        }
        let mut unknown = Vec::new();
        let (prompt, budget) = prompt(&mut fields, state, &mut unknown)?;
        request.budget = budget;
        unknown.extend(fields.unknown()?);
        let messages = Messages {
            id: state.new_id("msg_"),
            model: state.settings.model_name.clone(),
            prompt_tokens: prompt.len(),
            thinks: state.service.frontend().delimiters_of(&request.budget)?.is_some(),
            counts: Counts::default(),
            channels: Channels::default(),
            blocks: 0,
            open: None,
            stop: (None, None),
        };
        let id = messages.id.clone();
        Ok((GenerationRequest { id, prompts: vec![prompt], n: 1, request, stream, unknown }, messages))
    }

    fn refusal(error: &ApiError) -> Value {
        let kind = match error.kind() {
            "service_unavailable_error" => "overloaded_error",
            "server_error" => "api_error",
            kind => kind,
        };
        json!({"type": "error", "error": {"type": kind, "message": error.message}})
    }

    fn begin(&mut self, events: &mut Events) {
        events.named(&json!({"type": "message_start", "message": self.message(json!([]))}));
    }

    fn update(&mut self, _choice: usize, update: Update, events: &mut Events) {
        if let Some(token) = &update.token {
            self.counts = Counts::of(token);
        }
        for piece in &update.text {
            let Some((channel, text)) = self.channels.show(piece) else { continue };
            if self.open != Some(channel) {
                self.close(events);
                let block = block(channel, "");
                events.named(&json!({"type": "content_block_start", "index": self.blocks, "content_block": block}));
                self.open = Some(channel);
                self.blocks += 1;
            }
            let delta = match channel {
                Channel::Reasoning => json!({"type": "thinking_delta", "thinking": text}),
                _ => json!({"type": "text_delta", "text": text}),
            };
            events.named(&json!({"type": "content_block_delta", "index": self.blocks - 1, "delta": delta}));
        }
        if update.finish.is_some() {
            self.stop = (update.finish, update.stop_string);
        }
    }

    fn end(&mut self, events: &mut Events) {
        self.close(events);
        let mut delta = json!({
            "type": "message_delta",
            "delta": {"stop_reason": self.stop_reason(), "stop_sequence": self.stop.1},
            "usage": self.usage(),
        });
        if self.thinks {
            delta["thinking"] = self.counts.thinking();
        }
        events.named(&delta);
        events.named(&json!({"type": "message_stop"}));
    }

    fn fail(&mut self, error: &ApiError, events: &mut Events) {
        events.named(&Messages::refusal(error));
    }

    fn whole(&mut self, answers: &[Answer]) -> Value {
        let answer = &answers[0];
        if let Some(last) = answer.tokens.last() {
            self.counts = Counts::of(last);
        }
        self.stop = (answer.finish, answer.stop_string.clone());
        let blocks =
            [Channel::Reasoning, Channel::Answer].map(|channel| (channel, conversation::text(answer, channel)));
        let blocks = blocks.iter().filter(|(_, text)| !text.is_empty()).map(|(channel, text)| block(*channel, text));
        let mut message = self.message(blocks.collect());
        if self.thinks {
            message["thinking"] = self.counts.thinking();
        }
        message
    }
}

/// Nothing is signed: thinking that comes back is not used.
fn block(channel: Channel, text: &str) -> Value {
    match channel {
        Channel::Reasoning => json!({"type": "thinking", "thinking": text, "signature": ""}),
        _ => json!({"type": "text", "text": text}),
    }
}

impl Messages {
    fn close(&mut self, events: &mut Events) {
        if self.open.take().is_some() {
            events.named(&json!({"type": "content_block_stop", "index": self.blocks - 1}));
        }
    }

    fn stop_reason(&self) -> Option<&'static str> {
        Some(match self.stop {
            (_, Some(_)) => "stop_sequence",
            (Some(FinishReason::Length), _) => "max_tokens",
            (Some(_), _) => "end_turn",
            (None, None) => return None,
        })
    }

    fn usage(&self) -> Value {
        // As Anthropic counts, what was found is not in the input.
        json!({
            "input_tokens": self.prompt_tokens - self.counts.found as usize,
            "cache_read_input_tokens": self.counts.found,
            "output_tokens": self.counts.generated,
        })
    }

    fn message(&self, content: Value) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": self.stop_reason(),
            "stop_sequence": self.stop.1,
            "usage": self.usage(),
        })
    }
}

/// The prompt, and how long may be thought.
fn prompt(fields: &mut Fields, state: &ServerState, unknown: &mut Vec<String>) -> ApiResult<(Vec<u32>, BudgetRequest)> {
    let (system, _) = conversation::content("system", fields.take("system"))?;
    let mut messages = conversation::messages(fields, "messages")?;
    if messages.last().is_some_and(|last| last.role == "assistant") {
        return Err(
            fields.error("messages", "the last one must not be the assistant's: this server begins answers itself")
        );
    }
    if !system.is_empty() {
        messages.insert(0, Message::new("system", system));
    }
    let thinking = parameters::thinking(fields, state)?;
    let variables: Map<String, Value> = parameters::template_variables(&thinking, state, unknown)?;
    Ok((state.service.frontend().encode_chat_with(&messages, &variables, &thinking.budget)?, thinking.budget))
}

/// How many tokens the prompt of a request has.
pub async fn count_tokens(State(state): State<Arc<ServerState>>, request: Request) -> Response {
    let count = async {
        let body = body(&state, request).await?;
        blocking(&state, move |state| {
            let (prompt, _) = prompt(&mut Fields::parse(&body)?, state, &mut Vec::new())?;
            Ok(json(&json!({"input_tokens": prompt.len()})))
        })
        .await
    };
    count.await.unwrap_or_else(|error: ApiError| error.response(&Messages::refusal(&error)))
}
