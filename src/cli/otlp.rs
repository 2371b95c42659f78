//! Spans of requests for a collector of OpenTelemetry (`--otlp-traces-endpoint`): OTLP over HTTP, in protobuf. Names of spans and
//! attributes are vLLM's; what requests say is in none of them.

use std::{
    future::Future,
    pin::Pin,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, ensure};
use opentelemetry::{
    Context, KeyValue, SpanId, TraceFlags, TraceId,
    trace::{
        Span, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt, TraceState, Tracer, TracerProvider,
    },
};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracer, SdkTracerProvider},
};
use spark_engine::server::{Observer, RequestReport, TraceParent};

use super::trust;

/// Longest that a collector may take for a batch.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Where OTLP over HTTP expects spans.
const PATH: &str = "/v1/traces";
/// Variable that chooses a form; vLLM's default is another one.
const PROTOCOL: &str = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL";

/// Sends a span for every request that has ended. Batches are sent by a thread of its own; a collector that does not answer costs
/// spans, and nothing else.
pub(crate) struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// Sends to `endpoint`, to which OTLP's path is added if it has none.
    ///
    /// # Errors
    /// An address or a form that is not HTTP's.
    pub(crate) fn to(endpoint: &str) -> anyhow::Result<Self> {
        let flag = "--otlp-traces-endpoint";
        let rest = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
        let rest = rest.with_context(|| {
            format!("{flag} {endpoint}: must begin with http:// or https://; spans are sent as OTLP over HTTP (port 4318)")
        })?;
        let protocol = std::env::var(PROTOCOL).unwrap_or_default();
        ensure!(
            matches!(protocol.as_str(), "" | "http/protobuf"),
            "{PROTOCOL}={protocol}: only http/protobuf is supported"
        );
        let has_path = rest.trim_end_matches('/').contains('/');
        let url =
            if has_path { endpoint.to_owned() } else { format!("{}{PATH}", endpoint.trim_end_matches('/')) };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Client::new(endpoint)?)
            .with_endpoint(url)
            .with_timeout(TIMEOUT)
            .build()
            .with_context(|| format!("{flag} {endpoint}"))?;
        // OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES count more than the name given here.
        let name = std::env::var("OTEL_SERVICE_NAME").ok().filter(|name| !name.is_empty());
        let resource = Resource::builder()
            .with_service_name(name.unwrap_or_else(|| "spark-engine".to_owned()))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let tracer = provider.tracer("spark-engine");
        Ok(Self { provider, tracer })
    }

    /// Sends what is left.
    pub(crate) fn finish(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(Duration::from_secs(3)) {
            tracing::warn!("spans of the last requests may be lost: {error}");
        }
    }
}

impl Observer for Traces {
    fn request(&self, report: &RequestReport) {
        // Spans have times of the wall clock.
        let wall = |moment: Instant| SystemTime::now() - moment.elapsed();
        let builder = SpanBuilder::from_name("llm_request")
            .with_kind(SpanKind::Server)
            .with_start_time(wall(report.arrived))
            .with_attributes(attributes(report));
        let parent = report.trace.as_ref().map_or_else(Context::new, |parent| {
            Context::new().with_remote_span_context(span_context(parent))
        });
        let mut span = self.tracer.build_with_context(builder, &parent);
        if report.ends.contains(&"error") {
            span.set_status(Status::error("the engine has failed"));
        }
        span.end_with_timestamp(wall(report.ended));
    }
}

fn span_context(parent: &TraceParent) -> SpanContext {
    let flags = if parent.is_sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
    let state = parent.state.as_deref().and_then(|state| state.parse().ok()).unwrap_or(TraceState::NONE);
    let (trace, span) = (TraceId::from_bytes(parent.trace_id), SpanId::from_bytes(parent.span_id));
    SpanContext::new(trace, span, flags, true, state)
}

/// vLLM's.
fn attributes(report: &RequestReport) -> Vec<KeyValue> {
    let count =
        |name: &'static str, count: usize| KeyValue::new(name, i64::try_from(count).unwrap_or(i64::MAX));
    let seconds = |name: &'static str, time: Duration| KeyValue::new(name, time.as_secs_f64());
    // By way of decimal digits: 0.7 as an f32 is another number as an f64.
    let number = |value: f32| value.to_string().parse::<f64>().unwrap_or_default();
    let mut attributes = vec![
        KeyValue::new("gen_ai.request.id", report.id.clone()),
        KeyValue::new("gen_ai.response.model", report.model.clone()),
        count("gen_ai.request.max_tokens", report.max_tokens),
        KeyValue::new("gen_ai.request.temperature", number(report.temperature)),
        KeyValue::new("gen_ai.request.top_p", number(report.top_p)),
        count("gen_ai.request.n", report.n),
        count("gen_ai.usage.num_sequences", report.num_sequences),
        count("gen_ai.usage.prompt_tokens", report.num_prompt_tokens),
        count("gen_ai.usage.completion_tokens", report.num_output_tokens),
        seconds("gen_ai.latency.e2e", report.ended.saturating_duration_since(report.arrived)),
        count("spark.cached_tokens", report.num_cached_tokens),
        count("spark.images", report.num_images),
        KeyValue::new("spark.finish", report.ends.join(",")),
    ];
    if let Some(time) = report.time_to_first_token {
        attributes.push(seconds("gen_ai.latency.time_to_first_token", time));
    }
    if let Some(phases) = report.phases {
        attributes.extend([
            seconds("gen_ai.latency.time_in_queue", phases.queued),
            seconds("gen_ai.latency.time_in_model_prefill", phases.prefill),
            seconds("gen_ai.latency.time_in_model_decode", phases.decode),
            seconds("gen_ai.latency.time_in_model_inference", phases.prefill + phases.decode),
            count("spark.preemptions", phases.num_preemptions),
        ]);
    }
    attributes
}

/// The client of downloads, as the exporter wants one. It blocks the thread of batches, which does nothing else.
#[derive(Debug)]
struct Client(ureq::Agent);

impl Client {
    fn new(endpoint: &str) -> anyhow::Result<Self> {
        let config = ureq::Agent::config_builder()
            .tls_config(trust::for_requests_to(endpoint)?)
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .build();
        Ok(Self(config.into()))
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let mut post = self.0.post(parts.uri.to_string());
        for (name, value) in &parts.headers {
            post = post.header(name.as_str(), value.to_str()?);
        }
        let mut response = post.send(&body[..])?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_vec()?;
        Ok(Response::builder().status(status).body(text.into())?)
    }
}

impl HttpClient for Client {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move { self.send(request) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_is_not_https_is_refused() {
        for endpoint in ["grpc://collector:4317", "collector:4318", ""] {
            let error = Traces::to(endpoint).err().unwrap().to_string();
            assert!(error.contains("--otlp-traces-endpoint") && error.contains("http://"), "{error}");
        }
    }
}
