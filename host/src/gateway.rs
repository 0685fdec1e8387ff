//! The client edge: HTTP as OpenAI speaks it. Nothing else in the host knows HTTP.
//!
//! ```text
//! POST /v1/chat/completions   chat.rs          GET /v1/models[/{id}]     models.rs
//! POST /v1/completions        completions.rs   GET /health, /v1/health   health.rs
//! POST /v1/embeddings         embeddings.rs    GET /metrics              metrics.rs
//! ```
//!
//! - A parameter is honoured or refused by name, never ignored.
//! - Every error, on every route, is the same envelope.
//! - A client that leaves cancels its generation, streamed or not: the answer is dropped with the connection.
//! - What a client can send is bounded in size and time, and so is the number of connections.
//! - On loopback only local names are answered, and web pages may call only from listed origins.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};
use tracing::{info, warn};

use crate::cache::Cache;
use crate::config;
use crate::scheduler::Scheduler;

mod access;
mod caching;
mod chat;
mod common;
mod completions;
mod embeddings;
mod error;
mod fields;
mod health;
mod limits;
mod listener;
mod metrics;
mod models;
mod prompt;
mod reply;
mod sse;
#[cfg(test)]
mod tests;

pub use metrics::{Metrics, PluginTexts};

use error::ApiError;

/// What every request may need.
struct Edge {
    scheduler: Arc<Scheduler>,
    /// `None` where every answer is generated.
    cache: Option<Arc<Cache>>,
    metrics: Metrics,
    http: access::HttpMetrics,
    max_body: u64,
    header_timeout: Duration,
    request_timeout: Duration,
    ping_interval: Duration,
    loopback_only: bool,
    /// Unix time in seconds.
    started: u64,
}

/// A gateway at work.
#[derive(Debug)]
pub struct Serving {
    /// Where it listens, with the port that was taken where 0 was asked for.
    pub address: SocketAddr,
    /// Ends once shutdown was asked for and every connection has ended. Dropping it cuts off those that are left.
    pub task: AbortOnDropHandle<()>,
}

/// Why the gateway does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot listen on {address}: {source}; is another node running? choose another address with `gateway.listen`")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("`{origin}` in `gateway.cors_origins` is no origin: write it as \"https://example.org\"")]
    Origin { origin: String },
}

/// Listens, and answers until `shutdown` is cancelled; then accepts nothing more and lets running answers end.
pub async fn serve(
    config: config::Gateway,
    scheduler: Arc<Scheduler>,
    cache: Option<Arc<Cache>>,
    metrics: Metrics,
    shutdown: CancellationToken,
) -> Result<Serving, ServeError> {
    let cors = cors(&config.cors_origins)?;
    let bind_error = |source| ServeError::Bind { address: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(bind_error)?;
    let address = listener.local_addr().map_err(bind_error)?;
    let http = metrics.register(access::HttpMetrics::register);
    let header_timeout = Duration::from_millis(config.header_timeout_ms);
    let edge = Arc::new(Edge {
        scheduler,
        cache,
        metrics,
        http,
        max_body: config.max_body.0,
        header_timeout,
        request_timeout: Duration::from_millis(config.request_timeout_ms),
        ping_interval: Duration::from_millis(config.ping_interval_ms),
        loopback_only: address.ip().is_loopback(),
        started: reply::now(),
    });
    if !edge.loopback_only {
        warn!(%address, "The gateway is open to other machines, without API keys: whoever reaches it may use the node.");
    }
    info!(%address, "Gateway listens.");
    let task = tokio::spawn(listener::run(listener, router(edge, cors), header_timeout, shutdown));
    Ok(Serving { address, task: AbortOnDropHandle::new(task) })
}

fn router(edge: Arc<Edge>, cors: Option<CorsLayer>) -> Router {
    let router = Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/embeddings", post(embeddings::handle))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/health", get(health::handle))
        .route("/v1/health", get(health::handle))
        .route("/metrics", get(metrics::handle))
        .fallback(async |request: Request| ApiError::no_such_route(request.uri().path()))
        .method_not_allowed_fallback(async |request: Request| {
            ApiError::method_not_allowed(request.method().as_str(), request.uri().path())
        })
        .layer(CatchPanicLayer::custom(access::on_panic));
    let router = match cors {
        Some(cors) => router.layer(cors),
        None => router,
    };
    // Outermost last: every answer is observed, those of the layers within included.
    router
        .layer(middleware::from_fn_with_state(edge.clone(), limits::check_host))
        .layer(middleware::from_fn_with_state(edge.clone(), access::observe))
        .with_state(edge)
}

/// `None` when no web page may call: then no CORS header is ever sent.
fn cors(origins: &[String]) -> Result<Option<CorsLayer>, ServeError> {
    if origins.is_empty() {
        return Ok(None);
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        let origins = origins.iter().map(|origin| {
            let value = HeaderValue::from_str(origin).ok().filter(|_| origin.contains("://"));
            value.ok_or_else(|| ServeError::Origin { origin: origin.clone() })
        });
        AllowOrigin::list(origins.collect::<Result<Vec<_>, _>>()?)
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([
            header::AUTHORIZATION,
            header::CACHE_CONTROL,
            header::CONTENT_TYPE,
            caching::X_CACHE,
            HeaderName::from_static("x-request-id"),
        ])
        .expose_headers([header::RETRY_AFTER, caching::X_CACHE, HeaderName::from_static("x-request-id")])
        .max_age(Duration::from_secs(600));
    Ok(Some(layer))
}
