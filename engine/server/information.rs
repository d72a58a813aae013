//! What can be asked of the server itself: health, models, tokens.

use super::errors::{ApiError, ApiResult};
use super::fields::{Fields, token_ids};
use super::{Phase, ServerState, blocking, body, json};
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;

type Shared = State<Arc<ServerState>>;

/// Whether steps are made where there is work.
pub async fn health(State(state): Shared) -> ApiResult<()> {
    if state.phase() == Phase::Failed {
        return Err(ApiError::engine_failed());
    }
    let stalled = state.service.stalled();
    if stalled > state.settings.stall {
        let message = format!("the engine has work and has made no step for {} s", stalled.as_secs());
        return Err(ApiError::unavailable(message));
    }
    Ok(())
}

/// Whether new requests are welcome.
pub async fn ready(state: Shared) -> ApiResult<()> {
    if state.phase() == Phase::Draining {
        return Err(ApiError::unavailable("the server is shutting down"));
    }
    health(state).await
}

pub async fn version() -> Response {
    json(&json!({"version": env!("CARGO_PKG_VERSION")}))
}

pub async fn models(State(state): Shared) -> Response {
    json(&json!({"object": "list", "data": [description(&state)]}))
}

pub async fn model(State(state): Shared, Path(name): Path<String>) -> ApiResult<Response> {
    match name == state.settings.model_name {
        true => Ok(json(&description(&state))),
        false => Err(ApiError::new(StatusCode::NOT_FOUND, "there is no such model here")),
    }
}

fn description(state: &ServerState) -> Value {
    json!({
        "id": state.settings.model_name,
        "object": "model",
        "created": state.started,
        "owned_by": "ponder",
        "root": state.settings.model_name,
        "parent": null,
        "max_model_len": state.service.context(),
    })
}

/// {"prompt"} or {"messages"} to {"tokens", "count", "max_model_len"}.
pub async fn tokenize(State(state): Shared, request: Request) -> ApiResult<Response> {
    let body = body(&state, request).await?;
    blocking(&state, move |state| {
        let mut fields = Fields::parse(&body)?;
        let tokens = match fields.string("prompt")? {
            Some(text) => state.service.frontend().encode(&text)?,
            None => super::conversation::prompt(fields, state)?,
        };
        Ok(json(&json!({"tokens": tokens, "count": tokens.len(), "max_model_len": state.service.context()})))
    })
    .await
}

/// {"id", "action": "reasoning_end"}: the thinking of a request under way ends now, and its answer follows.
pub async fn control(State(state): Shared, request: Request) -> ApiResult<Response> {
    let body = body(&state, request).await?;
    let mut fields = Fields::parse(&body)?;
    let (id, action) = (fields.string("id")?, fields.string("action")?);
    if action.as_deref() != Some("reasoning_end") {
        return Err(fields.error("action", "the only one is reasoning_end"));
    }
    let Some(id) = id else { return Err(fields.error("id", "the id of the response must be said")) };
    match state.end_thinking(&id) {
        true => Ok(json(&json!({"id": id, "action": action}))),
        false => Err(ApiError::new(StatusCode::NOT_FOUND, "no such request is under way")),
    }
}

/// {"tokens"} to {"prompt"}.
pub async fn detokenize(State(state): Shared, request: Request) -> ApiResult<Response> {
    let body = body(&state, request).await?;
    blocking(&state, move |state| {
        let mut fields = Fields::parse(&body)?;
        let ids = fields.array("tokens")?.and_then(|list| token_ids(&list));
        let ids = ids.ok_or_else(|| ApiError::field("tokens", "not a list of token ids"))?;
        let tokenizer = &state.service.frontend().tokenizer;
        if let Some(id) = ids.iter().find(|&&id| tokenizer.token_bytes(id).is_empty()) {
            return Err(ApiError::field("tokens", format!("{id} is not the id of a token of this model")));
        }
        Ok(json(&json!({"prompt": tokenizer.decode(&ids)})))
    })
    .await
}
