//! What OpenAI's dialects share: counts, log probabilities, the head of a response.

use super::ServerState;
use super::errors::{ApiError, ApiResult};
use super::fields::Fields;
use super::generation::MAX_ANSWERS;
use crate::batch::{Score, TokenEvent};
use crate::sequence::Answer;
use crate::tokenizer::Tokenizer;
use axum::http::StatusCode;
use serde_json::{Map, Value, json};

/// What every chunk of a response begins with.
#[derive(Clone)]
pub struct Head {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
}

impl Head {
    /// # Errors
    /// A model that is not served here.
    pub fn take(fields: &mut Fields, state: &ServerState, prefix: &str, object: &'static str) -> ApiResult<Head> {
        check_model(fields, state)?;
        let model = state.settings.model_name.clone();
        Ok(Head { id: state.new_id(prefix), object, created: super::seconds_since_1970(), model })
    }

    pub fn json(&self, choices: Value) -> Map<String, Value> {
        let head = json!({
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        match head {
            Value::Object(map) => map,
            _ => unreachable!("written as an object"),
        }
    }
}

/// Absent is as good as right.
pub fn check_model(fields: &mut Fields, state: &ServerState) -> ApiResult<()> {
    match fields.string("model")? {
        Some(name) if name != state.settings.model_name => {
            let message = format!("the model {name:?} is not here: this server has {:?}", state.settings.model_name);
            let error = ApiError::new(StatusCode::NOT_FOUND, message);
            Err(ApiError { param: Some("model".into()), code: Some("model_not_found"), ..error })
        }
        _ => Ok(()),
    }
}

pub fn answers(fields: &mut Fields) -> ApiResult<u32> {
    Ok(fields.integer("n", 1..=i64::from(MAX_ANSWERS))?.unwrap_or(1) as u32)
}

/// `stream_options`.
#[derive(Clone, Copy, Default)]
pub struct StreamOptions {
    pub stream: bool,
    /// Usage in a chunk of its own at the end.
    pub usage: bool,
    /// Usage in every chunk.
    pub continuous_usage: bool,
}

impl StreamOptions {
    pub fn take(fields: &mut Fields) -> ApiResult<StreamOptions> {
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let mut options = StreamOptions { stream, ..Default::default() };
        if let Some(mut object) = fields.object("stream_options")? {
            if !stream {
                return Err(fields.error("stream_options", "only with stream"));
            }
            options.usage = object.boolean("include_usage")?.unwrap_or(false);
            options.continuous_usage = object.boolean("continuous_usage_stats")?.unwrap_or(false);
        }
        Ok(options)
    }
}

/// Counts of one answer so far, as the sampler has them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub generated: u32,
    pub reasoning: u32,
    pub ignores_used: u32,
    pub max_hit: bool,
    /// By a technique of steering.
    pub stopped: bool,
    /// Tokens of the prompt that were not computed anew.
    pub found: u32,
}

impl Counts {
    pub fn of(token: &TokenEvent) -> Counts {
        Counts {
            generated: token.generated,
            reasoning: token.reasoning_tokens,
            ignores_used: token.ignores_used,
            max_hit: token.max_hit,
            stopped: token.stopped,
            found: token.found_tokens,
        }
    }

    /// `thinking` of a response.
    pub fn thinking(&self) -> Value {
        let mut thinking = json!({
            "reasoning_tokens": self.reasoning,
            "ignores_used": self.ignores_used,
            "max_hit": self.max_hit,
        });
        if self.stopped {
            thinking["stopped"] = true.into();
        }
        thinking
    }
}

/// Of all answers, `n` to each prompt; each prompt counts once.
pub fn usage(prompt_tokens: usize, n: usize, counts: impl Iterator<Item = Counts> + Clone) -> Value {
    let found: u32 = counts.clone().step_by(n).map(|c| c.found).sum();
    let (generated, reasoning) =
        counts.fold((0usize, 0u32), |(all, thought), c| (all + c.generated as usize, thought + c.reasoning));
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": found},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    })
}

/// Only without a stream, as in vLLM.
pub fn take_prompt_logprobs(fields: &mut Fields, options: StreamOptions) -> ApiResult<Option<u32>> {
    let top = super::parameters::top_logprobs(fields, "prompt_logprobs")?;
    match top {
        Some(_) if options.stream => Err(fields.error("prompt_logprobs", "not with stream")),
        top => Ok(top),
    }
}

/// What the first answer to a prompt says of it: null for its first token, then {"id": {"logprob", "rank", "decoded_token"}}.
pub fn prompt_logprobs(tokenizer: &Tokenizer, answers: &[Answer]) -> Value {
    let entry = |id: u32, logprob: f32, rank: u32| {
        let text = token_text(tokenizer, id);
        (id.to_string(), json!({"logprob": finite(logprob), "rank": rank, "decoded_token": text}))
    };
    let position = |score: &Score| {
        let mut entries = Map::new();
        entries.extend(score.top.iter().zip(1..).map(|(&(id, logprob), rank)| entry(id, logprob, rank)));
        entries.extend([entry(score.token, score.logprob, score.rank)]);
        Value::Object(entries)
    };
    std::iter::once(Value::Null).chain(scores(answers).iter().map(position)).collect()
}

/// Of the answers to one prompt the first brings what is known of the prompt.
pub fn scores(answers: &[Answer]) -> &[Score] {
    answers.first().and_then(|answer| answer.tokens.first()).map_or(&[], |token| &token.prompt)
}

/// JSON has no infinity; this is OpenAI's number for what cannot be.
pub fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// A token as text; bytes of a part of a character as they are in the vocabulary.
pub fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()
}
