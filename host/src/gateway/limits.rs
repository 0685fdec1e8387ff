//! What a client may send: how much, how slowly, of which type, and under which name it may call this node.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use fabstir_plugin_api::context::Cx;
use http_body_util::BodyExt;
use tokio::time::Instant;

use super::Edge;
use super::error::ApiError;

/// Who asks, as far as the headers say.
pub(super) struct Caller(Parts);

impl Caller {
    /// The API key, where one was sent. It is no secret here: it only keeps prompt caches apart.
    pub fn key(&self) -> Option<&str> {
        let value = self.0.headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim()).filter(|key| !key.is_empty())
    }

    pub fn headers(&self) -> &HeaderMap {
        &self.0.headers
    }

    /// The context for a call on this caller's behalf.
    pub fn cx(&self, edge: &Edge) -> Cx {
        let cx = Cx::new().with_timeout(edge.request_timeout);
        match self.0.headers.get("traceparent").and_then(|value| value.to_str().ok()) {
            Some(traceparent) if traceparent.len() <= 128 => cx.with_traceparent(traceparent),
            _ => cx,
        }
    }
}

/// Reads a JSON request: all of it, within the bounds of size and time.
pub(super) async fn json_body(edge: &Edge, request: Request) -> Result<(Caller, Bytes), ApiError> {
    let (parts, body) = request.into_parts();
    let limit = edge.max_body;
    let announced = parts.headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let body = match announced {
        Some(length) if length > limit => Err((body, ApiError::body_too_large(limit))),
        _ => match content_type_error(&parts.headers) {
            Some(error) => Err((body, error)),
            None => read(body, limit, edge.header_timeout).await,
        },
    };
    match body {
        Ok(body) => Ok((Caller(parts), body)),
        Err((rest, error)) => {
            // A client that waits for `100 Continue` sends nothing more: asking for the rest would only make it start.
            if !parts.headers.contains_key(header::EXPECT) {
                discard(rest, edge.header_timeout);
            }
            Err(error)
        }
    }
}

async fn read(mut body: Body, limit: u64, timeout: Duration) -> Result<Bytes, (Body, ApiError)> {
    let ends = Instant::now() + timeout;
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    loop {
        let frame = match tokio::time::timeout_at(ends, body.frame()).await {
            Err(_) => return Err((Body::empty(), ApiError::body_too_slow(timeout))),
            Ok(None) if all.is_empty() => return Ok(first),
            Ok(None) => return Ok(all.freeze()),
            Ok(Some(Err(_))) => return Err((Body::empty(), ApiError::body_broken())),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        if (first.len().max(all.len()) + data.len()) as u64 > limit {
            return Err((body, ApiError::body_too_large(limit)));
        }
        // Most bodies come in one piece, and are not copied.
        if first.is_empty() && all.is_empty() {
            first = data;
        } else {
            if all.is_empty() {
                all.extend_from_slice(&std::mem::take(&mut first));
            }
            all.extend_from_slice(&data);
        }
    }
}

/// Reads on and throws away while the refusal is under way. Closing a socket with unread data resets it, and most clients would
/// report that reset instead of the answer.
fn discard(mut body: Body, timeout: Duration) {
    tokio::spawn(tokio::time::timeout(timeout, async move { while let Some(Ok(_)) = body.frame().await {} }));
}

/// `application/json` alone. Web pages cannot send that type to a foreign address without asking first, and asking is refused
/// unless CORS is configured: it is what keeps a page from using a node on its visitor's machine.
fn content_type_error(headers: &HeaderMap) -> Option<ApiError> {
    let value = headers.get(header::CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let value = value.unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim();
    let good = essence.eq_ignore_ascii_case("application/json");
    (!good).then(|| ApiError::not_json_type(&essence.chars().take(64).collect::<String>()))
}

/// Refuses foreign names on a node that only its own machine may use. A web page whose own name was pointed at 127.0.0.1 (DNS
/// rebinding) is of the same origin as this node to its browser; the `Host` header gives it away.
pub(super) async fn check_host(State(edge): State<Arc<Edge>>, request: Request, next: Next) -> Response {
    if edge.loopback_only {
        let authority = request.uri().authority().cloned();
        let header = request.headers().get(header::HOST);
        // HTTP/1.0 clients send none; browsers always do.
        let named = authority.map(Some).or_else(|| header.map(|value| Authority::try_from(value.as_bytes()).ok()));
        if let Some(name) = named
            && !name.is_some_and(|name| is_loopback_name(name.host()))
        {
            return ApiError::foreign_host().into_response();
        }
    }
    next.run(request).await
}

fn is_loopback_name(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_its_own() {
        for good in ["localhost", "LOCALHOST", "127.0.0.1", "127.0.0.9", "[::1]"] {
            assert!(is_loopback_name(good), "{good}");
        }
        for bad in ["example.org", "localhost.example.org", "127.0.0.1.nip.io", "10.0.0.1", "", "[::2]"] {
            assert!(!is_loopback_name(bad), "{bad}");
        }
    }

    #[test]
    fn only_json_is_json() {
        let refused = |value: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::CONTENT_TYPE, value.parse().expect("a header"));
            }
            content_type_error(&headers).is_some()
        };
        assert!(!refused(Some("application/json")));
        assert!(!refused(Some("Application/JSON; charset=utf-8")));
        assert!(refused(Some("text/plain")));
        assert!(refused(Some("application/jsonx")));
        assert!(refused(None));
    }
}
