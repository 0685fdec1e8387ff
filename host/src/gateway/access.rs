//! One name, one log line and two measurements per request; and the last resort against a panic in a handler.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tracing::{error, info};

use super::Edge;
use super::error::ApiError;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRequest {
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRoute {
    route: String,
}

#[derive(Clone)]
pub(super) struct HttpMetrics {
    requests: Family<OfRequest, Counter>,
    seconds: Family<OfRoute, Histogram, fn() -> Histogram>,
}

impl HttpMetrics {
    pub fn register(registry: &mut Registry) -> Self {
        let histogram: fn() -> Histogram = || Histogram::new([0.001, 0.005, 0.025, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0]);
        let metrics = Self { requests: Family::default(), seconds: Family::new_with_constructor(histogram) };
        registry.register("fabstir_http_requests", "HTTP requests answered", metrics.requests.clone());
        registry.register("fabstir_http_response_seconds", "Time from a request's head to its answer's", metrics.seconds.clone());
        metrics
    }
}

/// Wraps every route, the one that is not there included. The path is logged and nothing of the body, the query or the key is.
pub(super) async fn observe(State(edge): State<Arc<Edge>>, request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let method = request.method().clone();
    // Only known routes become labels: a scan of made-up paths must not fill memory with series.
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let begun = Instant::now();
    let mut response = next.run(request).await;
    let took = begun.elapsed();
    let status = response.status().as_u16();
    info!(id = %id.to_str().unwrap_or_default(), %method, route, status, ms = took.as_millis() as u64, "Answered.");
    edge.http.requests.get_or_create(&OfRequest { route: route.clone(), status }).inc();
    edge.http.seconds.get_or_create(&OfRoute { route }).observe(took.as_secs_f64());
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The client's own id where it is short and plain, so that it can follow its request; else a new one.
fn request_id(request: &Request) -> HeaderValue {
    let plain = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=64).contains(&bytes.len()) && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
    };
    request.headers().get(&REQUEST_ID).filter(plain).cloned().unwrap_or_else(|| {
        let id = format!("req_{}", uuid::Uuid::new_v4().simple());
        HeaderValue::try_from(id).expect("letters and digits are a header value")
    })
}

pub(super) fn on_panic(panic: Box<dyn Any + Send>) -> Response {
    let cause = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    error!(cause = cause.unwrap_or("unknown"), "A request handler panicked.");
    ApiError::internal().into_response()
}
