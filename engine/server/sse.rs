//! Server-sent events: the body of a response that streams. It reads events when the connection can take more, so that a slow
//! client holds up nobody.

use super::Dialect;
use super::ServerState;
use super::errors::ApiError;
use super::generation::{Event, Generation};
use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::Response;
use hyper::body::Frame;
use serde_json::Value;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep};

/// Events that wait to be sent.
#[derive(Default)]
pub struct Events(Vec<u8>);

/// Bytes of events that are sent at once, where more than one wait.
const ENOUGH: usize = 16 << 10;

impl Events {
    pub fn data(&mut self, json: &Value) {
        self.0.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut self.0, json).expect("a Vec takes everything");
        self.0.extend_from_slice(b"\n\n");
    }

    /// With a name, which is its `type`.
    pub fn named(&mut self, json: &Value) {
        let name = json["type"].as_str().expect("events with names say their type");
        self.0.extend_from_slice(format!("event: {name}\n").as_bytes());
        self.data(json);
    }

    pub fn done(&mut self) {
        self.0.extend_from_slice(b"data: [DONE]\n\n");
    }
}

struct Stream {
    generation: Option<Generation>,
    dialect: Box<dyn Dialect>,
    events: Events,
    deadline: Pin<Box<Sleep>>,
    /// When nothing has been sent for that long, a comment is, so that proxies keep the connection.
    ping: Duration,
    silence: Pin<Box<Sleep>>,
}

pub fn response(state: &ServerState, generation: Generation, mut dialect: Box<dyn Dialect>) -> Response {
    let mut events = Events::default();
    dialect.begin(&mut events);
    let ping = state.settings.sse_ping;
    let mut response = Response::new(Body::new(Stream {
        generation: Some(generation),
        dialect,
        events,
        deadline: Box::pin(sleep(state.settings.request_timeout)),
        ping,
        silence: Box::pin(sleep(ping)),
    }));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

impl Stream {
    fn end(&mut self, error: Option<ApiError>) {
        self.generation = None;
        match error {
            None => self.dialect.end(&mut self.events),
            Some(error) => self.dialect.fail(&error, &mut self.events),
        }
    }
}

impl HttpBody for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        while this.events.0.len() < ENOUGH {
            let Some(generation) = &mut this.generation else { break };
            match generation.poll_next(context) {
                Poll::Ready(Some(Ok(Event { choice, update }))) => match super::failure(&update) {
                    None => this.dialect.update(choice, update, &mut this.events),
                    Some(error) => this.end(Some(error)),
                },
                Poll::Ready(Some(Err(error))) => this.end(Some(error)),
                Poll::Ready(None) => this.end(None),
                Poll::Pending if this.deadline.as_mut().poll(context).is_ready() => this.end(Some(super::timed_out())),
                Poll::Pending => break,
            }
        }
        if this.events.0.is_empty() {
            if this.generation.is_none() {
                return Poll::Ready(None);
            }
            ready!(this.silence.as_mut().poll(context));
            this.events.0.extend_from_slice(b": ping\n\n");
        }
        this.silence.as_mut().reset(Instant::now() + this.ping);
        Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut this.events.0).into()))))
    }
}
