//! What a client is told when something is wrong: OpenAI's shape and status codes. Messages name the field and the fix; nothing of
//! the inside (paths, addresses) gets into them.

use crate::Error;
use axum::http::header::{HeaderValue, RETRY_AFTER};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// For programs, where the status does not say it all.
    pub code: Option<&'static str>,
    /// Seconds after which to try again.
    pub retry_after: Option<u32>,
}

pub type ApiResult<T> = std::result::Result<T, ApiError>;

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A field that cannot be served as it is.
    pub fn field(name: impl Into<String>, problem: impl std::fmt::Display) -> ApiError {
        let name = name.into();
        let message = format!("{name}: {problem}");
        ApiError { param: Some(name), ..ApiError::new(StatusCode::BAD_REQUEST, message) }
    }

    /// Not now.
    pub fn unavailable(message: impl Into<String>) -> ApiError {
        ApiError { retry_after: Some(1), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    pub fn bug() -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "this request has found a bug")
    }

    pub fn engine_failed() -> ApiError {
        let message = "the engine has failed and the server is going down: nothing more can be answered";
        ApiError { code: Some("engine_failed"), ..ApiError::unavailable(message) }
    }

    /// As OpenAI names the classes.
    pub fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        }
    }

    pub fn json(&self) -> Value {
        let code = self.code.map_or(Value::from(self.status.as_u16()), Value::from);
        json!({"error": {"message": self.message, "type": self.kind(), "param": self.param, "code": code}})
    }

    /// The response with another body, for dialects with a shape of their own.
    pub fn response(&self, body: &Value) -> Response {
        let mut response =
            (self.status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.response(&self.json())
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        match error {
            Error::Request { parameter, problem } => {
                let code =
                    (parameter == "prompt" && problem.contains("leave no room")).then_some("context_length_exceeded");
                ApiError { code, ..ApiError::field(field_name(parameter), problem) }
            }
            // The template does not take these messages; where it lies is nobody's business.
            Error::Model { problem, .. } => ApiError::field("messages", problem),
            Error::Usage(problem) => ApiError::new(StatusCode::BAD_REQUEST, problem),
            _ => ApiError::engine_failed(),
        }
    }
}

/// The field that sets a parameter of the engine.
fn field_name(parameter: &'static str) -> &'static str {
    match parameter {
        "max_thinking_tokens" => "thinking_token_budget",
        "n_ignore" => "thinking_n_ignore",
        "ignore_string" => "thinking_n_ignore_str",
        "end_string" => "thinking_end_str",
        "avoid_words" => "thinking_steering.avoid_words",
        "switch_penalty" => "thinking_steering.switch_penalty",
        "switch_window" => "thinking_steering.switch_window",
        "switch_words" => "thinking_steering.switch_words",
        "brake_margin" => "thinking_steering.brake_margin",
        "end_bias" => "thinking_steering.end_bias",
        "end_bias_ramp" => "thinking_steering.end_bias_ramp",
        "stop_confidence" => "thinking_steering.stop_confidence",
        "stop_streak" => "thinking_steering.stop_streak",
        "stop_after" => "thinking_steering.stop_after",
        "loop_repeats" => "thinking_steering.loop_repeats",
        "stop_ids" => "stop_token_ids",
        "allowed_ids" => "allowed_token_ids",
        other => other,
    }
}
