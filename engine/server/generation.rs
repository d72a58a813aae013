//! A request in no dialect: what to generate, under way, and its events. All dialects parse into [`GenerationRequest`] and render
//! from [`Generation`]; what all of them share (limits, counting, cancelling when the client goes) is here.

use super::ServerState;
use super::errors::{ApiError, ApiResult};
use super::metrics::Watch;
use crate::Result;
use crate::engine::Update;
use crate::frontend::Request;
use crate::sequence::FinishReason;
use crate::service::Ticket;
use axum::http::StatusCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Prompts of one request; answers to each of them.
pub const MAX_PROMPTS: usize = 64;
pub const MAX_ANSWERS: u32 = 128;

pub struct GenerationRequest {
    /// Of the response.
    pub id: String,
    pub prompts: Vec<Vec<u32>>,
    /// Answers to each prompt.
    pub n: u32,
    /// Everything but the prompt.
    pub request: Request,
    pub stream: bool,
    /// Field names that nobody knows.
    pub unknown: Vec<String>,
}

/// What has become of choice `choice`: prompt `choice / n`, its answer `choice % n`.
pub struct Event {
    pub choice: usize,
    pub update: Update,
}

/// A request under way. Dropped, as with the connection of a client that has gone, it cancels what has not ended.
pub struct Generation {
    state: Arc<ServerState>,
    id: String,
    updates: UnboundedReceiver<(usize, Result<Update>)>,
    /// By choice.
    watches: Vec<Watch>,
    /// Of the choices without an end.
    tickets: Vec<Option<Ticket>>,
    open: usize,
    choices: u32,
    told: Account,
}

/// How a request came.
pub struct Arrival {
    pub at: Instant,
    /// What the client calls it (`x-request-id`).
    pub request_id: Option<String>,
    /// Of which trace it is a part.
    pub trace: opentelemetry::Context,
}

/// What log and trace say of a request when it is over.
pub struct Account {
    pub arrival: Arrival,
    pub first_token: Option<Instant>,
    pub prompt_tokens: usize,
    pub tokens: u64,
    pub thinking_tokens: u64,
    pub failed: bool,
}

impl Generation {
    /// # Errors
    /// What the engine refuses, and everything at a time when there is too much to do already.
    pub fn start(state: &Arc<ServerState>, wanted: &GenerationRequest, arrival: Arrival) -> ApiResult<Generation> {
        state.note_unknown(&wanted.unknown);
        let choices = wanted.prompts.len() as u32 * wanted.n;
        let admit = |open: u32| open.checked_add(choices).filter(|&open| open <= state.settings.max_answers);
        if choices > state.settings.max_answers {
            let most = state.settings.max_answers;
            return Err(ApiError::field(
                "n",
                format!("{choices} answers are more than this server makes at a time, {most}"),
            ));
        }
        if state.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, admit).is_err() {
            let message =
                format!("{} answers are waiting or being made: try again later", state.open.load(Ordering::Relaxed));
            return Err(ApiError { retry_after: Some(1), ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, message) });
        }
        let (sender, updates) = unbounded_channel();
        let arrived = arrival.at;
        let mut generation = Generation {
            state: state.clone(),
            id: wanted.id.clone(),
            updates,
            watches: Vec::new(),
            tickets: Vec::new(),
            open: choices as usize,
            choices,
            told: Account {
                arrival,
                first_token: None,
                prompt_tokens: wanted.prompts.iter().map(Vec::len).sum(),
                tokens: 0,
                thinking_tokens: 0,
                failed: false,
            },
        };
        let seed = wanted.request.sampling.seed.unwrap_or_else(|| state.random_seed());
        let mut request = wanted.request.clone();
        for prompt in &wanted.prompts {
            request.prompt.clone_from(prompt);
            let mut parent = None;
            for answer in 0..wanted.n {
                // Of a prompt the first answer tells all.
                request.sampling.prompt_logprobs = wanted.request.sampling.prompt_logprobs.filter(|_| answer == 0);
                request.sampling.seed = Some(seed.wrapping_add(u64::from(answer)));
                let (sender, choice) = (sender.clone(), generation.tickets.len());
                // Whoever has gone has cancelled.
                let sink = Box::new(move |update| drop(sender.send((choice, update))));
                let ticket = state.service.submit_to(&request, parent, sink)?;
                parent = parent.or(Some(ticket.id()));
                generation.tickets.push(Some(ticket));
                generation.watches.push(state.metrics.watch(arrived, prompt.len()));
            }
        }
        let ids = generation.tickets.iter().flatten().map(Ticket::id).collect();
        state.running.lock().expect("nobody panics with it").insert(wanted.id.clone(), ids);
        Ok(generation)
    }

    /// The next event; None after the end of all choices.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<ApiResult<Event>>> {
        if self.open == 0 {
            return Poll::Ready(None);
        }
        let Poll::Ready(next) = self.updates.poll_recv(context) else { return Poll::Pending };
        // Without a sender, or with an error: no step will follow.
        let Some((choice, Ok(update))) = next else {
            self.state.engine_has_failed();
            (self.open, self.told.failed) = (0, true);
            return Poll::Ready(Some(Err(ApiError::engine_failed())));
        };
        self.state.metrics.note(&mut self.watches[choice], &update);
        if let Some(token) = &update.token {
            self.told.first_token.get_or_insert_with(Instant::now);
            self.told.tokens += 1;
            self.told.thinking_tokens += u64::from(token.reasoning);
        }
        self.told.failed |= matches!(update.finish, Some(FinishReason::Error));
        if update.finish.is_some() {
            self.tickets[choice] = None;
            self.open -= 1;
        }
        Poll::Ready(Some(Ok(Event { choice, update })))
    }

    pub fn choices(&self) -> usize {
        self.choices as usize
    }

    pub async fn next(&mut self) -> Option<ApiResult<Event>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.state.running.lock().expect("nobody panics with it").remove(&self.id);
        self.state.open.fetch_sub(self.choices, Ordering::Relaxed);
        let told = &self.told;
        let outcome = match (told.failed, self.open) {
            (true, _) => "failed",
            (false, 0) => "answered",
            (false, _) => "cancelled",
        };
        if let Some(traces) = &self.state.settings.traces {
            traces.record(&self.id, told, outcome);
        }
        tracing::info!(
            response = self.id,
            request_id = told.arrival.request_id,
            choices = self.choices,
            prompt_tokens = told.prompt_tokens,
            tokens = told.tokens,
            thinking_tokens = told.thinking_tokens,
            first_token_ms = told.first_token.map(|at| (at - told.arrival.at).as_millis() as u64),
            total_ms = told.arrival.at.elapsed().as_millis() as u64,
            outcome,
            "request"
        );
    }
}
