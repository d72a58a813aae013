//! The HTTP server: dialects of OpenAI (as vLLM speaks them) and Anthropic over one [`Service`].
//!
//! Each dialect parses its body into a [`GenerationRequest`](generation::GenerationRequest) and renders the events of a
//! [`Generation`](generation::Generation) as a [`Dialect`]; everything between is the same for all. Prompts are parsed, rendered and
//! encoded on threads that may block, a few at a time; nothing here ever waits for the engine but by events, and the engine never
//! waits for anything here. Knows no device.

mod chat;
mod completions;
mod conversation;
mod errors;
mod fields;
mod form;
mod generation;
mod information;
pub mod kv_events;
mod listener;
mod messages;
mod metrics;
mod openai;
mod page;
mod parameters;
mod responses;
mod sse;
mod tools;
mod traces;

pub use errors::ApiError;
pub use listener::{serve, serve_router};
pub use parameters::EffortTable;
pub use traces::Traces;

use crate::engine::{RequestId, Update};
use crate::guide::Grammar;
use crate::kernels::params::PAGE_TOKENS;
use crate::sequence::{Answer, FinishReason};
use crate::service::Service;
use crate::structured::Compiler;
use crate::telemetry::Telemetry;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use errors::ApiResult;
use fields::Fields;
use form::Form;
use generation::{Arrival, Generation, GenerationRequest};
use metrics::Metrics;
use serde_json::Value;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Semaphore, watch};

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What clients call the model.
    pub model_name: String,
    /// Without it, everybody may ask.
    pub api_key: Option<String>,
    /// Nobody but this machine can ask: pages of elsewhere, shown by its browser, must not either.
    pub loopback: bool,
    /// Bytes of a body.
    pub max_body: usize,
    /// Answers waiting and being made; more are refused.
    pub max_answers: u32,
    pub max_connections: usize,
    pub request_timeout: Duration,
    /// A head, a body, or a client that takes what it is sent, must not be slower.
    pub header_timeout: Duration,
    pub body_timeout: Duration,
    pub write_timeout: Duration,
    /// How long requests may go on after the signal to end.
    pub shutdown_timeout: Duration,
    /// Silence after which a stream says that it is alive.
    pub sse_ping: Duration,
    /// Work without a step for that long is the end of health.
    pub stall: Duration,
    pub efforts: EffortTable,
    /// Where a span of each request goes.
    pub traces: Option<Traces>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            model_name: "ponder".into(),
            api_key: None,
            loopback: false,
            max_body: 8 << 20,
            max_answers: 1024,
            max_connections: 1024,
            request_timeout: Duration::from_secs(3600),
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            shutdown_timeout: Duration::from_secs(60),
            sse_ping: Duration::from_secs(15),
            stall: Duration::from_secs(30),
            efforts: EffortTable::default(),
            traces: None,
        }
    }
}

/// What all requests share.
pub struct ServerState {
    pub service: Arc<Service>,
    pub settings: Settings,
    metrics: Metrics,
    /// None without a GPU.
    telemetry: Option<Telemetry>,
    /// Seconds since 1970.
    started: u64,
    /// Answers waiting and being made.
    open: AtomicU32,
    /// Answers of each request under way, by the id of its response.
    running: Mutex<HashMap<String, Vec<RequestId>>>,
    random: RandomState,
    next_number: AtomicU64,
    /// Bodies being parsed and encoded.
    parsing: Semaphore,
    unknown_fields: Mutex<HashMap<String, u64>>,
    /// Made when the first answer of a given form is asked for.
    compiler: OnceLock<Compiler>,
    phase: watch::Sender<Phase>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Serving,
    /// What comes by connections of before is finished, others are not accepted.
    Draining,
    Failed,
}

/// Characters of a client's name for its request that the log shows.
const MAX_REQUEST_ID: usize = 128;
/// Names of unknown fields that are remembered; what comes beyond is counted as one.
const MAX_UNKNOWN_NAMES: usize = 256;

impl ServerState {
    pub fn new(service: Service, telemetry: Option<Telemetry>, settings: Settings) -> Arc<ServerState> {
        Arc::new(ServerState {
            metrics: Metrics::new(&settings.model_name, PAGE_TOKENS, service.stats().pages, telemetry.is_some()),
            telemetry,
            service: Arc::new(service),
            settings,
            started: seconds_since_1970(),
            open: AtomicU32::new(0),
            running: Mutex::default(),
            random: RandomState::new(),
            next_number: AtomicU64::new(0),
            parsing: Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)),
            unknown_fields: Mutex::default(),
            compiler: OnceLock::new(),
            phase: watch::Sender::new(Phase::Serving),
        })
    }

    /// Answers waiting and being made.
    pub fn open_answers(&self) -> u32 {
        self.open.load(Ordering::Relaxed)
    }

    /// How often each field that nobody knows has been sent.
    pub fn unknown_fields(&self) -> HashMap<String, u64> {
        self.unknown_fields.lock().expect("nobody panics with it").clone()
    }

    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// A failure is never taken back.
    fn set_phase(&self, phase: Phase) {
        self.phase.send_if_modified(|current| {
            let changes = *current != Phase::Failed && *current != phase;
            if changes {
                *current = phase;
            }
            changes
        });
    }

    /// Waits for the engine to fail.
    async fn failure(&self) {
        let mut phase = self.phase.subscribe();
        // The sender is here.
        let _ = phase.wait_for(|&phase| phase == Phase::Failed).await;
    }

    fn engine_has_failed(&self) {
        self.set_phase(Phase::Failed);
    }

    fn note_unknown(&self, names: &[String]) {
        let mut counts = self.unknown_fields.lock().expect("nobody panics with it");
        for name in names {
            let name = if counts.len() < MAX_UNKNOWN_NAMES || counts.contains_key(name) { name } else { "others" };
            let count = counts.entry(name.into()).or_insert(0);
            *count += 1;
            self.metrics.unknown_field(name);
            if *count == 1 {
                tracing::warn!(field = name, "a request has a field that this server does not know: it is ignored");
            }
        }
    }

    /// False: no such request is under way.
    fn end_thinking(&self, id: &str) -> bool {
        let running = self.running.lock().expect("nobody panics with it");
        let Some(answers) = running.get(id) else { return false };
        answers.iter().for_each(|&answer| self.service.end_thinking(answer));
        true
    }

    /// Every request under way ends, and says that it was cancelled.
    fn cancel_all(&self) {
        let running = self.running.lock().expect("nobody panics with it");
        running.values().flatten().for_each(|&answer| self.service.cancel(answer));
    }

    /// What guides an answer to be of this form.
    ///
    /// # Errors
    /// A form that cannot be guaranteed, named by its field.
    fn grammar(&self, form: Option<Form>) -> ApiResult<Option<Grammar>> {
        let Some((field, structure)) = form else { return Ok(None) };
        let compiler = match self.compiler.get() {
            Some(compiler) => compiler,
            None => {
                let frontend = self.service.frontend();
                let made = Compiler::new(&frontend.tokenizer, &frontend.config.eos_token_ids)?;
                self.compiler.get_or_init(|| made)
            }
        };
        Ok(Some(compiler.compile(field, &structure)?))
    }

    /// A number that nobody can tell before.
    fn random_seed(&self) -> u64 {
        self.random.hash_one(self.next_number.fetch_add(1, Ordering::Relaxed))
    }

    /// A name for a response: "chatcmpl-" and the like, and a number.
    fn new_id(&self, prefix: &str) -> String {
        format!("{prefix}{:016x}", self.random_seed())
    }
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// How a dialect renders what becomes of its request: as a whole, or event by event.
trait Dialect: Send {
    fn begin(&mut self, _events: &mut sse::Events) {}
    fn update(&mut self, choice: usize, update: Update, events: &mut sse::Events);
    fn end(&mut self, events: &mut sse::Events);
    /// Instead of the end.
    fn fail(&mut self, error: &ApiError, events: &mut sse::Events);
    /// Instead of all events.
    fn whole(&mut self, answers: &[Answer]) -> Value;
    /// The body of a request that is refused.
    fn refusal(error: &ApiError) -> Value
    where
        Self: Sized,
    {
        error.json()
    }
    /// # Errors
    /// What cannot be served.
    fn parse(fields: Fields, state: &ServerState) -> ApiResult<(GenerationRequest, Self)>
    where
        Self: Sized;
}

/// All routes. Those that are public need no key.
pub fn router(state: Arc<ServerState>) -> Router {
    Router::new()
        .route("/", get(page::index))
        .route("/page.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/metrics", get(metrics::metrics))
        .route("/health", get(information::health))
        .route("/ready", get(information::ready))
        .route("/ping", get(information::health))
        .route("/version", get(information::version))
        .route("/v1/models", get(information::models))
        .route("/v1/models/{*name}", get(information::model))
        .route("/tokenize", post(information::tokenize))
        .route("/detokenize", post(information::detokenize))
        .route("/v1/chat/completions", generating::<chat::Chat>())
        .route("/v1/chat/completions/control", post(information::control))
        .route("/v1/chat/completions/render", rendering::<chat::Chat>())
        .route("/v1/completions", generating::<completions::Completion>())
        .route("/v1/completions/render", rendering::<completions::Completion>())
        .route("/v1/responses", generating::<responses::Responses>())
        .route("/v1/messages", generating::<messages::Messages>())
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .fallback(async || ApiError::new(StatusCode::NOT_FOUND, "there is nothing at this address"))
        .method_not_allowed_fallback(async || ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "not with this method"))
        .layer(from_fn_with_state(state.clone(), guard))
        .with_state(state)
}

/// Needs no key: what load balancers and monitoring ask, and the page, which asks for the key.
const PUBLIC: &[&str] = &["/health", "/ready", "/ping", "/metrics", "/", "/page.css", "/page.js"];

/// What holds for every request: where a browser may come from, the key, the id that comes back.
async fn guard(State(state): State<Arc<ServerState>>, request: Request, next: Next) -> Response {
    if !origin_is_welcome(request.headers(), state.settings.loopback) {
        return ApiError::new(StatusCode::FORBIDDEN, "a page of elsewhere must not ask").into_response();
    }
    if let Some(key) = &state.settings.api_key
        && !PUBLIC.contains(&request.uri().path())
    {
        let given = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
        let bearer = given("authorization").and_then(|value| value.strip_prefix("Bearer "));
        // Digests compare in constant time.
        let digest = |key: &str| blake3::hash(key.as_bytes());
        if !bearer.or(given("x-api-key")).is_some_and(|given| digest(given) == digest(key)) {
            let message = "no valid API key: send it as \"Authorization: Bearer KEY\"";
            return ApiError::new(StatusCode::UNAUTHORIZED, message).into_response();
        }
    }
    let id = request.headers().get("x-request-id").cloned();
    let path = request.uri().path().chars().take(MAX_REQUEST_ID).collect::<String>();
    let mut response = next.run(request).await;
    if response.status().is_client_error() || response.status().is_server_error() {
        let request_id = id.as_ref().and_then(|id| id.to_str().ok());
        tracing::info!(path, request_id, status = response.status().as_u16(), "refused");
    }
    if let Some(id) = id {
        response.headers_mut().insert("x-request-id", id);
    }
    response
}

/// Only browsers say where a request comes from: it must be a page of this server. And where nobody but this machine can ask, the
/// server must have been called by a name of this machine, not by one that somebody has made to point at it.
fn origin_is_welcome(headers: &HeaderMap, loopback: bool) -> bool {
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let Some(origin) = text(header::ORIGIN) else { return true };
    let host = text(header::HOST).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let here = ["localhost", "127.0.0.1", "[::1]"].contains(&name);
    origin.split_once("://").is_some_and(|(_, from)| from == host) && (here || !loopback)
}

/// Whether a request to this address would be taken, without anything being made for it. For fuzz targets.
///
/// # Errors
/// What the client would be told.
pub fn judge(address: &str, body: &[u8], state: &ServerState) -> std::result::Result<(), ApiError> {
    let fields = Fields::parse(body)?;
    let wanted = match address {
        "/v1/completions" => completions::Completion::parse(fields, state)?.0,
        "/v1/responses" => responses::Responses::parse(fields, state)?.0,
        "/v1/messages" => messages::Messages::parse(fields, state)?.0,
        _ => chat::Chat::parse(fields, state)?.0,
    };
    for prompt in wanted.prompts {
        let request = crate::Request { prompt, ..wanted.request.clone() };
        state.service.frontend().accept(&request, 0, state.service.context())?;
    }
    Ok(())
}

fn generating<D: Dialect + 'static>() -> MethodRouter<Arc<ServerState>> {
    post(async |State(state): State<Arc<ServerState>>, request: Request| {
        generate::<D>(&state, request).await.unwrap_or_else(|error| error.response(&D::refusal(&error)))
    })
}

/// {"token_ids"}: the prompt of a request, for routers that want to know who has its beginning in the cache.
fn rendering<D: Dialect + 'static>() -> MethodRouter<Arc<ServerState>> {
    post(async |State(state): State<Arc<ServerState>>, request: Request| {
        let body = body(&state, request).await?;
        blocking(&state, move |state| {
            let (wanted, _) = D::parse(Fields::parse(&body)?, state)?;
            match wanted.prompts.as_slice() {
                [prompt] => Ok(json(&serde_json::json!({"token_ids": prompt}))),
                _ => Err(ApiError::field("prompt", "one at a time")),
            }
        })
        .await
    })
}

async fn generate<D: Dialect + 'static>(state: &Arc<ServerState>, request: Request) -> ApiResult<Response> {
    if state.phase() == Phase::Failed {
        return Err(ApiError::engine_failed());
    }
    let request_id = request.headers().get("x-request-id").and_then(|value| value.to_str().ok());
    let request_id = request_id.map(|id| id.chars().take(MAX_REQUEST_ID).collect());
    let trace = match state.settings.traces {
        Some(_) => Traces::parent(request.headers()),
        None => opentelemetry::Context::new(),
    };
    let body = body(state, request).await?;
    let arrival = Arrival { at: Instant::now(), request_id, trace };
    let (generation, mut dialect, stream) = blocking(state, move |state| {
        let (wanted, dialect) = D::parse(Fields::parse(&body)?, state)?;
        Ok((Generation::start(state, &wanted, arrival)?, dialect, wanted.stream))
    })
    .await?;
    if stream {
        return Ok(sse::response(state, generation, Box::new(dialect)));
    }
    let answers = tokio::time::timeout(state.settings.request_timeout, collect(generation));
    let answers = answers.await.unwrap_or_else(|_| Err(timed_out()))?;
    Ok(json(&dialect.whole(&answers)))
}

fn json(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

/// Runs what takes long on a thread that may; as many at a time as there are cores.
async fn blocking<T: Send + 'static>(
    state: &Arc<ServerState>,
    run: impl FnOnce(&Arc<ServerState>) -> ApiResult<T> + Send + 'static,
) -> ApiResult<T> {
    let _permit = state.parsing.acquire().await.expect("never closed");
    let state = state.clone();
    let result = tokio::task::spawn_blocking(move || run(&state)).await;
    result.unwrap_or_else(|_| Err(ApiError::bug()))
}

/// The body of a request, as JSON, in time and within the limit.
async fn body(state: &ServerState, request: Request) -> ApiResult<Bytes> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
        let message = "the body must be JSON: send \"Content-Type: application/json\"";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    if request.headers().contains_key(header::CONTENT_ENCODING) {
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "the body must not be compressed"));
    }
    let most = state.settings.max_body;
    let read = tokio::time::timeout(state.settings.body_timeout, axum::body::to_bytes(request.into_body(), most));
    match read.await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(error)) if is_too_long(&error) => {
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has more than {most} bytes")))
        }
        Ok(Err(_)) => Err(ApiError::new(StatusCode::BAD_REQUEST, "the body breaks off")),
        Err(_) => Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body does not arrive in time")),
    }
}

fn is_too_long(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.to_string() == "length limit exceeded")
}

async fn collect(mut generation: Generation) -> ApiResult<Vec<Answer>> {
    let mut answers = vec![Answer::default(); generation.choices()];
    while let Some(event) = generation.next().await {
        let event = event?;
        if let Some(error) = failure(&event.update) {
            return Err(error);
        }
        answers[event.choice].stop_string = event.update.stop_string;
        answers[event.choice].extend(event.update.token, event.update.text, event.update.finish);
    }
    Ok(answers)
}

/// An end that is no answer.
fn failure(update: &Update) -> Option<ApiError> {
    match update.finish? {
        FinishReason::Error => {
            let message = "the model's logits are not finite, or no token is left to draw: this answer cannot go on";
            Some(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message))
        }
        FinishReason::Cancelled => Some(ApiError::unavailable("the server has cancelled this request")),
        FinishReason::Stop | FinishReason::Length => None,
    }
}

fn timed_out() -> ApiError {
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, "the answer took longer than this server allows: ask for fewer tokens")
}
