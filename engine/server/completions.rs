//! `/v1/completions`: text, or token ids, that the model goes on with; and how likely each token was, the prompt's as well, as
//! evaluation harnesses ask for it.

use super::errors::{ApiError, ApiResult};
use super::fields::{Fields, token_ids};
use super::generation::{GenerationRequest, MAX_PROMPTS};
use super::openai::{self, Counts, Head, StreamOptions};
use super::sse::Events;
use super::{Dialect, ServerState, form, parameters};
use crate::batch::Score;
use crate::engine::Update;
use crate::sequence::{Answer, FinishReason};
use crate::service::Service;
use crate::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};
use std::sync::Arc;

pub struct Completion {
    service: Arc<Service>,
    head: Head,
    prompts: Vec<Vec<u32>>,
    /// Answers to each prompt.
    n: usize,
    options: StreamOptions,
    /// The prompt is part of the text.
    echo: bool,
    /// All of it: the token that has to be drawn is not told.
    only_echo: bool,
    logprobs: bool,
    prompt_logprobs: bool,
    /// Token ids are to be told.
    ids: bool,
    choices: Vec<Choice>,
}

/// One answer under way.
#[derive(Default)]
struct Choice {
    counts: Counts,
    started: bool,
    /// Of tokens whose text is yet to be sent.
    logprobs: Logprobs,
    ids: Vec<u32>,
    /// Characters of the tokens before.
    offset: usize,
}

/// The legacy shape: a column for each property of a token.
#[derive(Default)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
}

/// What OpenAI takes for an absent `max_tokens`.
const DEFAULT_TOKENS: u32 = 16;

impl Dialect for Completion {
    fn parse(mut fields: Fields, state: &ServerState) -> ApiResult<(GenerationRequest, Completion)> {
        let head = Head::take(&mut fields, state, "cmpl-", "text_completion")?;
        let id = head.id.clone();
        let prompts = prompts(&mut fields, state)?;
        let n = openai::answers(&mut fields)?;
        if fields.integer("best_of", 1..=i64::from(u32::MAX))?.is_some_and(|best| best != i64::from(n)) {
            return Err(
                fields.error("best_of", "this server makes no more answers than it sends: leave it out, or as n")
            );
        }
        let options = StreamOptions::take(&mut fields)?;
        let mut request = parameters::sampling(&mut fields)?;
        let max_tokens = fields.count("max_tokens", parameters::MOST_TOKENS)?.unwrap_or(DEFAULT_TOKENS);
        let echo = fields.boolean("echo")?.unwrap_or(false);
        let only_echo = echo && max_tokens == 0;
        request.max_tokens = Some(if only_echo { 1 } else { max_tokens });
        let logprobs = parameters::top_logprobs(&mut fields, "logprobs")?;
        let ids = fields.boolean("return_token_ids")?.unwrap_or(false);
        let asked = openai::take_prompt_logprobs(&mut fields, options)?;
        request.sampling.logprobs = logprobs;
        // An echo is reported on as the answer is.
        let echoed = logprobs.filter(|_| echo);
        request.sampling.prompt_logprobs = asked.max(echoed);
        request.budget = parameters::thinking(&mut fields, state)?.budget;
        request.grammar = state.grammar(form::take(&mut fields)?)?;
        let unknown = fields.unknown()?;
        let completion = Completion {
            service: state.service.clone(),
            head,
            n: n as usize,
            options,
            echo,
            only_echo,
            logprobs: logprobs.is_some(),
            prompt_logprobs: asked.is_some(),
            ids,
            choices: (0..prompts.len() * n as usize).map(|_| Choice::default()).collect(),
            prompts: prompts.clone(),
        };
        Ok((GenerationRequest { id, prompts, n, request, stream: options.stream, unknown }, completion))
    }

    fn update(&mut self, index: usize, update: Update, events: &mut Events) {
        let mut text = String::new();
        if let Some(token) = &update.token {
            let (tokenizer, choice) = (&self.service.frontend().tokenizer, &mut self.choices[index]);
            choice.counts = Counts::of(token);
            if self.echo && !choice.started {
                let prompt = &self.prompts[index / self.n];
                text = tokenizer.decode(prompt);
                if self.logprobs {
                    choice.logprobs.prompt(tokenizer, prompt, &token.prompt, &mut choice.offset);
                }
            }
            choice.started = true;
            if self.only_echo {
                choice.counts.generated = 0;
            }
            if self.ids && !self.only_echo {
                choice.ids.push(token.token);
            }
            if self.logprobs && !self.only_echo {
                choice.logprobs.push(tokenizer, token.token, Some(token.logprob), &token.top, &mut choice.offset);
            }
        }
        if !self.only_echo {
            text.extend(update.text.iter().map(|piece| piece.text.as_str()));
        }
        if text.is_empty() && update.finish.is_none() {
            return;
        }
        let choice = &mut self.choices[index];
        let logprobs = std::mem::take(&mut choice.logprobs);
        let mut json = json!({
            "index": index,
            "text": text,
            "logprobs": self.logprobs.then(|| logprobs.json()),
            "finish_reason": update.finish.map(FinishReason::name),
        });
        if self.ids {
            json["token_ids"] = std::mem::take(&mut choice.ids).into();
        }
        if update.finish.is_some() {
            json["stop_reason"] = update.stop_string.into();
        }
        let mut chunk = self.head.json(json!([json]));
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
        let service = self.service.clone();
        let tokenizer = &service.frontend().tokenizer;
        let mut choices = Vec::with_capacity(answers.len());
        for (prompt, answers) in self.prompts.iter().zip(answers.chunks(self.n)) {
            let scores = openai::scores(answers);
            for answer in answers {
                let index = choices.len();
                let choice = &mut self.choices[index];
                if let Some(last) = answer.tokens.last() {
                    choice.counts = Counts::of(last);
                }
                let told = if self.only_echo { &[] } else { answer.tokens.as_slice() };
                if self.only_echo {
                    choice.counts.generated = 0;
                }
                let mut text = if self.only_echo { String::new() } else { answer.text() };
                if self.echo {
                    text.insert_str(0, &tokenizer.decode(prompt));
                }
                if self.logprobs {
                    if self.echo {
                        choice.logprobs.prompt(tokenizer, prompt, scores, &mut choice.offset);
                    }
                    for token in told {
                        choice.logprobs.push(
                            tokenizer,
                            token.token,
                            Some(token.logprob),
                            &token.top,
                            &mut choice.offset,
                        );
                    }
                }
                let mut json = json!({
                    "index": index,
                    "text": text,
                    "logprobs": self.logprobs.then(|| choice.logprobs.json()),
                    "finish_reason": answer.finish.map(FinishReason::name),
                    "stop_reason": answer.stop_string,
                });
                if self.prompt_logprobs {
                    json["prompt_logprobs"] = openai::prompt_logprobs(tokenizer, answers);
                }
                if self.ids {
                    json["prompt_token_ids"] = prompt.as_slice().into();
                    json["token_ids"] = told.iter().map(|token| token.token).collect();
                }
                choices.push(json);
            }
        }
        let mut whole = self.head.json(choices.into());
        whole.insert("usage".into(), self.usage());
        whole.into()
    }
}

impl Completion {
    fn usage(&self) -> Value {
        let prompt_tokens = self.prompts.iter().map(Vec::len).sum();
        openai::usage(prompt_tokens, self.n, self.choices.iter().map(|choice| choice.counts))
    }
}

impl Logprobs {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32, logprob: Option<f32>, top: &[(u32, f32)], offset: &mut usize) {
        let text = openai::token_text(tokenizer, id);
        self.text_offset.push(*offset);
        *offset += text.chars().count();
        self.token_logprobs.push(logprob.map(openai::finite));
        self.top_logprobs.push(match logprob {
            None => Value::Null,
            // The token itself is always among them.
            Some(logprob) => {
                let all = top.iter().copied().chain([(id, logprob)]);
                let entry = |(id, logprob)| (openai::token_text(tokenizer, id), openai::finite(logprob).into());
                Value::Object(all.map(entry).collect::<Map<_, _>>())
            }
        });
        self.tokens.push(text);
    }

    /// Nothing is known of the first token of a prompt.
    fn prompt(&mut self, tokenizer: &Tokenizer, prompt: &[u32], scores: &[Score], offset: &mut usize) {
        self.push(tokenizer, prompt[0], None, &[], offset);
        for score in scores {
            self.push(tokenizer, score.token, Some(score.logprob), &score.top, offset);
        }
    }

    fn json(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}

/// A string, token ids, or a list of either.
fn prompts(fields: &mut Fields, state: &ServerState) -> ApiResult<Vec<Vec<u32>>> {
    let wrong = || ApiError::field("prompt", "not a string, a list of strings, token ids or a list of those");
    let encode = |text: &str| Ok(state.service.frontend().encode(text)?);
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
