//! `/v1/responses`: OpenAI's newer interface, for text. Nothing is stored: whoever goes on with a conversation sends all of it.

use super::conversation::{self, Channels};
use super::errors::{ApiError, ApiResult};
use super::fields::Fields;
use super::generation::GenerationRequest;
use super::openai::{self, Counts};
use super::sse::Events;
use super::{Dialect, ServerState, form, parameters};
use crate::chat::Message;
use crate::engine::Update;
use crate::sequence::{Answer, Channel, FinishReason};
use serde_json::{Value, json};

pub struct Responses {
    id: String,
    created: u64,
    model: String,
    /// Echoed.
    instructions: Option<String>,
    max_tokens: Option<u32>,
    prompt_tokens: usize,
    thinks: bool,
    counts: Counts,
    finish: Option<FinishReason>,
    channels: Channels,
    /// The items that are complete, and the one being written: its channel and its text.
    output: Vec<Value>,
    item: Option<(Channel, String)>,
    sequence_number: u64,
}

impl Dialect for Responses {
    fn parse(mut fields: Fields, state: &ServerState) -> ApiResult<(GenerationRequest, Responses)> {
        openai::check_model(&mut fields, state)?;
        let instructions = fields.string("instructions")?;
        let mut messages: Vec<Message> = instructions.iter().map(|text| Message::new("system", text)).collect();
        messages.extend(input(&mut fields)?);
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let mut request = parameters::sampling(&mut fields)?;
        request.max_tokens = fields.count("max_output_tokens", parameters::MOST_TOKENS)?;
        if let Some(mut text) = fields.object("text")? {
            text.take("verbosity");
            if let Some(format) = text.object("format")? {
                let form = form::json_format(format, false)?.map(|structure| ("text.format", structure));
                request.grammar = state.grammar(form)?;
            }
        }
        if fields.string("truncation")?.is_some_and(|kind| kind != "disabled") {
            return Err(fields.error("truncation", "prompts are not cut here: only disabled"));
        }
        if !fields.array("include")?.unwrap_or_default().is_empty() {
            return Err(fields.error("include", "there is nothing more to include: leave it out"));
        }
        if fields.integer("top_logprobs", 0..=20)?.is_some_and(|top| top > 0) {
            return Err(fields.error("top_logprobs", "not in this interface: ask /v1/chat/completions"));
        }
        fields.take("stream_options");
        let thinking = parameters::thinking(&mut fields, state)?;
        let mut unknown = Vec::new();
        let variables = parameters::template_variables(&thinking, state, &mut unknown)?;
        unknown.extend(fields.unknown()?);
        request.budget = thinking.budget;
        let prompt = state.service.frontend().encode_chat_with(&messages, &variables, &request.budget)?;
        let responses = Responses {
            id: state.new_id("resp_"),
            created: super::seconds_since_1970(),
            model: state.settings.model_name.clone(),
            instructions,
            max_tokens: request.max_tokens,
            prompt_tokens: prompt.len(),
            thinks: state.service.frontend().delimiters_of(&request.budget)?.is_some(),
            counts: Counts::default(),
            finish: None,
            channels: Channels::default(),
            output: Vec::new(),
            item: None,
            sequence_number: 0,
        };
        let id = responses.id.clone();
        Ok((GenerationRequest { id, prompts: vec![prompt], n: 1, request, stream, unknown }, responses))
    }

    fn begin(&mut self, events: &mut Events) {
        for kind in ["response.created", "response.in_progress"] {
            let response = self.response("in_progress");
            self.event(kind, json!({"response": response}), events);
        }
    }

    fn update(&mut self, _choice: usize, update: Update, events: &mut Events) {
        if let Some(token) = &update.token {
            self.counts = Counts::of(token);
        }
        for piece in &update.text {
            let Some((channel, text)) = self.channels.show(piece) else { continue };
            if self.item.as_ref().is_none_or(|(open, _)| *open != channel) {
                self.close_item(events);
                self.open_item(channel, events);
            }
            let (_, so_far) = self.item.as_mut().expect("it is open");
            so_far.push_str(text);
            let kind = names(channel).1;
            let mut delta = json!({
                "item_id": self.item_id(),
                "output_index": self.output.len(),
                "content_index": 0,
                "delta": text,
            });
            if channel == Channel::Answer {
                delta["logprobs"] = json!([]);
            }
            self.event(&format!("{kind}.delta"), delta, events);
        }
        self.finish = self.finish.or(update.finish);
    }

    fn end(&mut self, events: &mut Events) {
        self.close_item(events);
        let status = self.status();
        let response = self.response(status);
        self.event(&format!("response.{status}"), json!({"response": response}), events);
    }

    fn fail(&mut self, error: &ApiError, events: &mut Events) {
        let mut response = self.response("failed");
        response["error"] = json!({"code": error.code.unwrap_or(error.kind()), "message": error.message});
        self.event("response.failed", json!({"response": response}), events);
    }

    fn whole(&mut self, answers: &[Answer]) -> Value {
        let answer = &answers[0];
        if let Some(last) = answer.tokens.last() {
            self.counts = Counts::of(last);
        }
        self.finish = answer.finish;
        for channel in [Channel::Reasoning, Channel::Answer] {
            let text = conversation::text(answer, channel);
            if !text.is_empty() {
                let item = self.item(channel, &text, "completed");
                self.output.push(item);
            }
        }
        self.response(self.status())
    }
}

/// What an item, and its text, are called.
fn names(channel: Channel) -> (&'static str, &'static str, &'static str) {
    match channel {
        Channel::Reasoning => ("reasoning", "response.reasoning_text", "reasoning_text"),
        _ => ("message", "response.output_text", "output_text"),
    }
}

impl Responses {
    fn event(&mut self, kind: &str, mut json: Value, events: &mut Events) {
        json["type"] = kind.into();
        json["sequence_number"] = self.sequence_number.into();
        self.sequence_number += 1;
        events.named(&json);
    }

    fn item_id(&self) -> String {
        format!("item_{}_{}", self.output.len(), self.id)
    }

    fn part(channel: Channel, text: &str) -> Value {
        match channel {
            Channel::Reasoning => json!({"type": "reasoning_text", "text": text}),
            _ => json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []}),
        }
    }

    fn item(&self, channel: Channel, text: &str, status: &str) -> Value {
        let mut item = json!({"id": self.item_id(), "type": names(channel).0, "status": status, "content": []});
        match channel {
            Channel::Reasoning => item["summary"] = json!([]),
            _ => item["role"] = "assistant".into(),
        }
        if status != "in_progress" {
            item["content"] = json!([Responses::part(channel, text)]);
        }
        item
    }

    fn open_item(&mut self, channel: Channel, events: &mut Events) {
        let index = self.output.len();
        let item = self.item(channel, "", "in_progress");
        self.event("response.output_item.added", json!({"output_index": index, "item": item}), events);
        let part = Responses::part(channel, "");
        let added = json!({"item_id": self.item_id(), "output_index": index, "content_index": 0, "part": part});
        self.event("response.content_part.added", added, events);
        self.item = Some((channel, String::new()));
    }

    fn close_item(&mut self, events: &mut Events) {
        let Some((channel, text)) = self.item.take() else { return };
        let index = self.output.len();
        let (_, kind, _) = names(channel);
        let place = json!({"item_id": self.item_id(), "output_index": index, "content_index": 0});
        let mut done = place.clone();
        done["text"] = text.as_str().into();
        if channel == Channel::Answer {
            done["logprobs"] = json!([]);
        }
        self.event(&format!("{kind}.done"), done, events);
        let mut done = place;
        done["part"] = Responses::part(channel, &text);
        self.event("response.content_part.done", done, events);
        let item = self.item(channel, &text, "completed");
        self.output.push(item.clone());
        self.event("response.output_item.done", json!({"output_index": index, "item": item}), events);
    }

    fn status(&self) -> &'static str {
        if self.finish == Some(FinishReason::Length) { "incomplete" } else { "completed" }
    }

    fn response(&self, status: &str) -> Value {
        let usage = json!({
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.counts.found},
            "output_tokens": self.counts.generated,
            "output_tokens_details": {"reasoning_tokens": self.counts.reasoning},
            "total_tokens": self.prompt_tokens + self.counts.generated as usize,
        });
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": null,
            "incomplete_details": (status == "incomplete").then(|| json!({"reason": "max_output_tokens"})),
            "instructions": self.instructions,
            "max_output_tokens": self.max_tokens,
            "model": self.model,
            "output": self.output,
            "parallel_tool_calls": false,
            "previous_response_id": null,
            "store": false,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "usage": (status != "in_progress").then_some(usage),
        });
        if self.thinks {
            response["thinking"] = self.counts.thinking();
        }
        response
    }
}

/// A text, or the items of a conversation. What was thought earlier is left out, as templates do.
fn input(fields: &mut Fields) -> ApiResult<Vec<Message>> {
    match fields.take("input") {
        Some(Value::String(text)) => Ok(vec![Message::new("user", text)]),
        Some(Value::Array(items)) => {
            let mut messages: Vec<Value> = Vec::with_capacity(items.len());
            for (i, item) in items.into_iter().enumerate() {
                match item["type"].as_str() {
                    Some("reasoning") => {}
                    None | Some("message") => messages.push(item),
                    Some(kind) => {
                        return Err(ApiError::field(
                            format!("input[{i}].type"),
                            format!("{kind:?} cannot be read here"),
                        ));
                    }
                }
            }
            fields.put("input", messages.into());
            conversation::messages(fields, "input")
        }
        _ => Err(ApiError::field("input", "not a string or a list of items")),
    }
}
