//! `/v1/chat/completions`.

use super::conversation::{self, Channels};
use super::errors::{ApiError, ApiResult};
use super::fields::Fields;
use super::generation::GenerationRequest;
use super::openai::{self, Counts, Head, StreamOptions};
use super::sse::Events;
use super::tools::{CallParser, Part, Tools};
use super::{Dialect, ServerState, form, parameters};
use crate::batch::TokenEvent;
use crate::engine::Update;
use crate::sequence::{Answer, Channel, FinishReason};
use crate::service::Service;
use serde_json::{Map, Value, json};
use std::sync::Arc;

pub struct Chat {
    service: Arc<Service>,
    head: Head,
    prompt_tokens: usize,
    options: StreamOptions,
    logprobs: bool,
    reasoning: bool,
    /// Token ids of the answers are to be told.
    ids: bool,
    prompt_logprobs: bool,
    thinks: bool,
    tools: Option<Tools>,
    choices: Vec<Choice>,
}

/// One answer under way.
#[derive(Default)]
struct Choice {
    counts: Counts,
    started: bool,
    channels: Channels,
    calls: CallParser,
    /// Of tokens whose text is yet to be sent.
    logprobs: Vec<Value>,
    ids: Vec<u32>,
}

const ID_PREFIX: &str = "chatcmpl-";

impl Dialect for Chat {
    fn parse(mut fields: Fields, state: &ServerState) -> ApiResult<(GenerationRequest, Chat)> {
        let head = Head::take(&mut fields, state, ID_PREFIX, "chat.completion")?;
        let id = head.id.clone();
        let messages = conversation::messages(&mut fields, "messages")?;
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
        let ids = fields.boolean("return_token_ids")?.unwrap_or(false);
        request.sampling.prompt_logprobs = openai::take_prompt_logprobs(&mut fields, options)?;
        request.sampling.logprobs = logprobs.then_some(top.unwrap_or(0));
        let reasoning = fields.boolean("include_reasoning")?.unwrap_or(true);
        let thinking = parameters::thinking(&mut fields, state)?;
        let form = form::take(&mut fields)?;
        let tools = Tools::take(&mut fields, state)?;
        let mut unknown = Vec::new();
        let mut variables = parameters::template_variables(&thinking, state, &mut unknown)?;
        unknown.extend(fields.unknown()?);
        request.budget = thinking.budget;
        let form = match &tools {
            Some(tools) => tools.form(form)?,
            None => form,
        };
        request.grammar = state.grammar(form)?;
        variables.extend(tools.iter().map(|tools| ("tools".into(), tools.list.clone())));
        let prompt = state.service.frontend().encode_chat_with(&messages, &variables, &request.budget)?;
        let chat = Chat {
            service: state.service.clone(),
            head,
            prompt_tokens: prompt.len(),
            options,
            logprobs,
            reasoning,
            ids,
            prompt_logprobs: request.sampling.prompt_logprobs.is_some(),
            thinks: state.service.frontend().delimiters_of(&request.budget)?.is_some(),
            tools,
            choices: (0..n).map(|_| Choice::default()).collect(),
        };
        Ok((GenerationRequest { id, prompts: vec![prompt], n, request, stream: options.stream, unknown }, chat))
    }

    fn begin(&mut self, _events: &mut Events) {
        self.head.object = "chat.completion.chunk";
    }

    fn update(&mut self, index: usize, update: Update, events: &mut Events) {
        if let Some(token) = &update.token {
            self.choices[index].counts = Counts::of(token);
            if self.ids {
                self.choices[index].ids.push(token.token);
            }
            if self.logprobs {
                let logprob = self.logprob(token);
                self.choices[index].logprobs.push(logprob);
            }
        }
        for piece in &update.text {
            let Some((channel, text)) = self.choices[index].channels.show(piece) else { continue };
            match channel {
                Channel::Reasoning if !self.reasoning => {}
                Channel::Reasoning => {
                    let names = ["reasoning", "reasoning_content"];
                    let delta = names.map(|name| (name.to_string(), text.into())).into_iter().collect();
                    self.chunk(index, delta, piece.injected, None, events);
                }
                _ if self.tools.is_some() => {
                    let parts = self.choices[index].calls.push(text);
                    self.send_parts(index, parts, events);
                }
                _ => self.send_content(index, text, piece.injected, events),
            }
        }
        if update.finish.is_some() {
            let rest = self.choices[index].calls.finish();
            self.send_parts(index, rest, events);
            self.chunk(index, Map::new(), false, Some(&update), events);
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
            let mut message = self.message(index, conversation::text(answer, Channel::Answer));
            let reasoning = conversation::text(answer, Channel::Reasoning);
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
                "finish_reason": answer.finish.map(|finish| self.finish_reason(index, finish)),
                "stop_reason": answer.stop_string,
            });
            if self.ids {
                choice["token_ids"] = answer.tokens.iter().map(|token| token.token).collect();
            }
            self.add_thinking(index, &mut choice);
            choices.push(choice);
        }
        let mut whole = self.head.json(choices.into());
        whole.insert("usage".into(), self.usage());
        if self.prompt_logprobs {
            let scores = openai::prompt_logprobs(&self.service.frontend().tokenizer, answers);
            whole.insert("prompt_logprobs".into(), scores);
        }
        whole.into()
    }
}

impl Chat {
    fn send_content(&mut self, index: usize, text: &str, injected: bool, events: &mut Events) {
        self.chunk(index, Map::from_iter([("content".into(), text.into())]), injected, None, events);
    }

    /// A call goes out when it is complete.
    fn send_parts(&mut self, index: usize, parts: Vec<Part>, events: &mut Events) {
        // Calls before these.
        let calls = parts.iter().filter(|part| matches!(part, Part::Call { .. })).count();
        let mut number = self.choices[index].calls.calls - calls;
        for part in parts {
            match part {
                Part::Text(text) => self.send_content(index, &text, false, events),
                Part::Call { name, arguments } => {
                    let mut call = self.call(index, number, name, arguments);
                    call["index"] = number.into();
                    number += 1;
                    self.chunk(index, Map::from_iter([("tool_calls".into(), json!([call]))]), false, None, events);
                }
            }
        }
    }

    fn call(&self, index: usize, number: usize, name: String, arguments: String) -> Value {
        let response = self.head.id.strip_prefix(ID_PREFIX).expect("it begins so");
        json!({
            "id": format!("call_{response}_{index}_{number}"),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        })
    }

    fn message(&mut self, index: usize, text: String) -> Value {
        if self.tools.is_none() {
            return json!({"role": "assistant", "content": text});
        }
        let parser = &mut self.choices[index].calls;
        let mut parts = parser.push(&text);
        parts.extend(parser.finish());
        let (mut content, mut calls) = (String::new(), Vec::new());
        for part in parts {
            match part {
                Part::Text(text) => content += &text,
                Part::Call { name, arguments } => calls.push(self.call(index, calls.len(), name, arguments)),
            }
        }
        match calls.is_empty() {
            true => json!({"role": "assistant", "content": content}),
            false => {
                let content = Some(content).filter(|content| !content.is_empty());
                json!({"role": "assistant", "content": content, "tool_calls": calls})
            }
        }
    }

    fn finish_reason(&self, index: usize, finish: FinishReason) -> &'static str {
        match &self.tools {
            Some(tools) if finish == FinishReason::Stop && self.choices[index].calls.calls > 0 => tools.finish_reason(),
            _ => finish.name(),
        }
    }

    fn chunk(
        &mut self,
        index: usize,
        mut delta: Map<String, Value>,
        injected: bool,
        last: Option<&Update>,
        events: &mut Events,
    ) {
        let finish = last.and_then(|update| update.finish).map(|finish| self.finish_reason(index, finish));
        let choice = &mut self.choices[index];
        if !choice.started {
            choice.started = true;
            delta.insert("role".into(), "assistant".into());
            if last.is_some() {
                delta.insert("content".into(), "".into());
            }
        }
        let logprobs = std::mem::take(&mut choice.logprobs);
        let ids = std::mem::take(&mut choice.ids);
        let mut json = json!({
            "index": index,
            "delta": delta,
            "logprobs": self.logprobs.then(|| json!({"content": logprobs})),
            "finish_reason": finish,
        });
        if self.ids {
            json["token_ids"] = ids.into();
        }
        if injected {
            json["injected"] = true.into();
        }
        if let Some(update) = last {
            json["stop_reason"] = update.stop_string.as_deref().into();
        }
        if last.is_some() || self.options.continuous_usage {
            self.add_thinking(index, &mut json);
        }
        let mut chunk = self.head.json(json!([json]));
        if self.options.continuous_usage {
            chunk.insert("usage".into(), self.usage());
        }
        events.data(&chunk.into());
    }

    fn add_thinking(&self, index: usize, choice: &mut Value) {
        if self.thinks {
            choice["thinking"] = self.choices[index].counts.thinking();
        }
    }

    fn usage(&self) -> Value {
        openai::usage(self.prompt_tokens, self.choices.len(), self.choices.iter().map(|choice| choice.counts))
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
