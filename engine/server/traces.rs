//! OpenTelemetry: a span for each request, sent by OTLP over HTTP from a thread of its own. Attributes are named as the conventions for
//! generative AI and vLLM name them. A collector that cannot be reached costs spans, never a request.

use super::generation::Account;
use crate::{Error, Result};
use axum::http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Span, SpanKind, Status, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::time::{Duration, SystemTime};

const PATH: &str = "/v1/traces";
/// For a collector to take what it is sent.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    model: String,
}

impl Traces {
    /// To a collector like `http://localhost:4318`. Not from within an asynchronous runtime.
    ///
    /// # Errors
    /// What is no such address.
    pub fn to(collector: &str, model: &str) -> Result<Traces> {
        let refuse = |problem: String| Error::Usage(format!("--otlp-traces-endpoint {collector}: {problem}"));
        if !collector.starts_with("http://") {
            return Err(refuse("say it as http://HOST:PORT".into()));
        }
        let base = collector.trim_end_matches('/');
        let endpoint = if base.ends_with(PATH) { base.to_string() } else { base.to_string() + PATH };
        let exporter = SpanExporter::builder().with_http().with_endpoint(endpoint).with_timeout(PATIENCE);
        let exporter = exporter.build().map_err(|e| refuse(e.to_string()))?;
        let service = Resource::builder_empty().with_service_name("ponder").build();
        let provider = SdkTracerProvider::builder().with_resource(service).with_batch_exporter(exporter).build();
        Ok(Traces { provider, model: model.into() })
    }

    /// Whose part a request is, as its `traceparent` says.
    pub(super) fn parent(headers: &HeaderMap) -> Context {
        TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers))
    }

    /// A request that is over.
    pub(super) fn record(&self, response: &str, told: &Account, outcome: &'static str) {
        let total = told.arrival.at.elapsed();
        let end = SystemTime::now();
        let mut attributes = vec![
            KeyValue::new("gen_ai.response.model", self.model.clone()),
            KeyValue::new("gen_ai.response.id", response.to_string()),
            KeyValue::new("gen_ai.usage.prompt_tokens", told.prompt_tokens as i64),
            KeyValue::new("gen_ai.usage.completion_tokens", told.tokens as i64),
            KeyValue::new("gen_ai.usage.reasoning_tokens", told.thinking_tokens as i64),
            KeyValue::new("gen_ai.latency.e2e", total.as_secs_f64()),
            KeyValue::new("ponder.outcome", outcome),
        ];
        attributes.extend(told.arrival.request_id.clone().map(|id| KeyValue::new("gen_ai.request.id", id)));
        attributes.extend(
            told.first_token
                .map(|at| KeyValue::new("gen_ai.latency.time_to_first_token", (at - told.arrival.at).as_secs_f64())),
        );
        let tracer = self.provider.tracer("ponder");
        let span = tracer.span_builder("llm_request").with_kind(SpanKind::Server).with_start_time(end - total);
        let mut span = span.with_attributes(attributes).start_with_context(&tracer, &told.arrival.trace);
        if told.failed {
            span.set_status(Status::error(outcome));
        }
        span.end_with_timestamp(end);
    }

    /// Sends what has not been sent yet.
    pub fn finish(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(PATIENCE) {
            tracing::warn!("spans are lost: {error}");
        }
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}
