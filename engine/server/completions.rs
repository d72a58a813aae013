//! `/v1/completions`: text, or token ids, that the model goes on with.

use super::errors::{ApiError, ApiResult};
use super::fields::{Fields, token_ids};
use super::generation::{GenerationRequest, MAX_PROMPTS};
use super::openai::{self, Counts, Head, StreamOptions};
use super::sse::Events;
use super::{Dialect, ServerState, parameters};
use crate::engine::Update;
use crate::sequence::{Answer, FinishReason};
use serde_json::{Value, json};

pub struct Completion {
    head: Head,
    prompt_tokens: usize,
    options: StreamOptions,
    counts: Vec<Counts>,
}

/// What OpenAI takes for an absent `max_tokens`.
const DEFAULT_TOKENS: u32 = 16;

impl Dialect for Completion {
    fn parse(mut fields: Fields, state: &ServerState) -> ApiResult<(GenerationRequest, Completion)> {
        let head = Head::take(&mut fields, state, "cmpl-", "text_completion")?;
        let prompts = prompts(&mut fields, state)?;
        let n = openai::answers(&mut fields)?;
        let options = StreamOptions::take(&mut fields)?;
        let mut request = parameters::sampling(&mut fields)?;
        request.max_tokens = Some(fields.count("max_tokens", parameters::MOST_TOKENS)?.unwrap_or(DEFAULT_TOKENS));
        request.budget = parameters::thinking(&mut fields, state)?.budget;
        let unknown = fields.unknown()?;
        let completion = Completion {
            head,
            prompt_tokens: prompts.iter().map(Vec::len).sum(),
            options,
            counts: vec![Counts::default(); prompts.len() * n as usize],
        };
        Ok((GenerationRequest { prompts, n, request, stream: options.stream, unknown }, completion))
    }

    fn update(&mut self, index: usize, update: Update, events: &mut Events) {
        if let Some(token) = &update.token {
            self.counts[index] = Counts::of(token);
        }
        let text: String = update.text.iter().map(|piece| piece.text.as_str()).collect();
        if text.is_empty() && update.finish.is_none() {
            return;
        }
        let choice = json!({
            "index": index,
            "text": text,
            "logprobs": null,
            "finish_reason": update.finish.map(FinishReason::name),
        });
        let mut chunk = self.head.json(json!([choice]));
        if self.options.continuous_usage {
            chunk.insert("usage".into(), self.usage());
        }
        events.data(&chunk.into());
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
                self.counts[index] = Counts::of(last);
            }
            choices.push(json!({
                "index": index,
                "text": answer.text(),
                "logprobs": null,
                "finish_reason": answer.finish.map(FinishReason::name),
            }));
        }
        let mut whole = self.head.json(choices.into());
        whole.insert("usage".into(), self.usage());
        whole.into()
    }
}

impl Completion {
    fn usage(&self) -> Value {
        openai::usage(self.prompt_tokens, self.counts.iter().copied())
    }
}

/// A string, token ids, or a list of either.
fn prompts(fields: &mut Fields, state: &ServerState) -> ApiResult<Vec<Vec<u32>>> {
    let wrong = || ApiError::field("prompt", "not a string, a list of strings, token ids or a list of those");
    let encode = |text: &str| Ok(state.service.frontend().tokenizer.encode(text)?);
    let list = match fields.take("prompt") {
        Some(Value::String(text)) => return Ok(vec![encode(&text)?]),
        Some(Value::Array(list)) if list.first().is_some_and(Value::is_number) => {
            return Ok(vec![token_ids(&list).ok_or_else(wrong)?]);
        }
        Some(Value::Array(list)) if !list.is_empty() => list,
        _ => return Err(wrong()),
    };
    if list.len() > MAX_PROMPTS {
        return Err(ApiError::field("prompt", format!("{} prompts are more than {MAX_PROMPTS}", list.len())));
    }
    let prompt = |value: &Value| match value {
        Value::String(text) => encode(text),
        Value::Array(ids) => token_ids(ids).ok_or_else(wrong),
        _ => Err(wrong()),
    };
    list.iter().map(prompt).collect()
}
