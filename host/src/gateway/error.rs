//! Errors as OpenAI's clients expect them.

use std::borrow::Cow;
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use fabstir_plugin_api::error::Code;
use serde_json::{Value, json};

use crate::scheduler::Refused;

/// `{"error": {"message", "type", "param", "code"}}` with its status. The message is a sentence that any client may see.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    pub status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<Duration>,
    /// The rest of the request is not read: the connection ends with the answer.
    close: bool,
}

const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: impl Into<Option<&'static str>>, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code: code.into(), retry_after: None, close: false }
    }

    /// The request does not say what it should.
    pub fn invalid(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, "invalid_value", message).about(param)
    }

    /// The request asks for something this node does not do.
    pub fn unsupported(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, "unsupported_parameter", message).about(param)
    }

    pub fn missing(param: &'static str) -> Self {
        let message = format!("the parameter `{param}` is required");
        Self::new(StatusCode::BAD_REQUEST, INVALID, "missing_required_parameter", message).about(param)
    }

    pub fn unknown_parameter(param: String, message: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, "unknown_parameter", message).about(param)
    }

    pub fn not_json(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, "invalid_json", message)
    }

    pub fn not_json_type(found: &str) -> Self {
        let message = format!("the body must come as `content-type: application/json`, not `{found}`");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, "unsupported_media_type", message)
    }

    pub fn body_too_large(limit: u64) -> Self {
        let message = format!("the body is larger than the {limit} bytes that this node accepts");
        Self { close: true, ..Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "body_too_large", message) }
    }

    pub fn body_too_slow(limit: Duration) -> Self {
        let message = format!("the body did not arrive within {} ms", limit.as_millis());
        Self { close: true, ..Self::new(StatusCode::REQUEST_TIMEOUT, "timeout_error", "request_timeout", message) }
    }

    pub fn body_broken() -> Self {
        Self { close: true, ..Self::new(StatusCode::BAD_REQUEST, INVALID, "invalid_body", "the body broke off") }
    }

    pub fn no_such_route(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, "unknown_url", format!("there is nothing at `{path}`"))
    }

    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        let message = format!("`{path}` does not take {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed", message)
    }

    pub fn foreign_host() -> Self {
        let message = "this node listens for its own machine only: call it as localhost or 127.0.0.1";
        Self::new(StatusCode::FORBIDDEN, INVALID, "host_not_allowed", message)
    }

    pub fn model_not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, "model_not_found", message).about("model")
    }

    /// The status is the one that RFC 9111 has for it (5.2.1.7).
    pub fn not_kept() -> Self {
        let message = "there is no kept answer to this request, and `cache-control: only-if-cached` wants no other";
        Self::new(StatusCode::GATEWAY_TIMEOUT, "cache_error", "not_cached", message)
    }

    pub fn internal() -> Self {
        let message = "something went wrong inside the node; its log says what";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal_error", message)
    }

    fn about(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into().into_owned());
        self
    }

    pub fn body(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        use StatusCode as S;
        let Refused { code, message, retry_after } = refused;
        let error = match code {
            Code::InvalidArgument => Self::new(S::BAD_REQUEST, INVALID, "invalid_value", message),
            Code::TooLong => Self::new(S::BAD_REQUEST, INVALID, "context_length_exceeded", message).about("messages"),
            Code::NotFound => Self::model_not_found(message),
            Code::Unimplemented => Self::new(S::NOT_IMPLEMENTED, INVALID, "not_implemented", message),
            Code::Overloaded => Self::new(S::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full", message),
            Code::Unavailable | Code::Cancelled | Code::Full => {
                Self::new(S::SERVICE_UNAVAILABLE, "unavailable_error", "unavailable", message)
            }
            Code::DeadlineExceeded => Self::new(S::GATEWAY_TIMEOUT, "timeout_error", "deadline_exceeded", message),
            Code::Denied => Self::new(S::PAYMENT_REQUIRED, "payment_error", "payment_required", message),
            Code::Panicked | Code::Corrupt | Code::Protocol | Code::Internal | Code::Unknown => {
                Self::new(S::INTERNAL_SERVER_ERROR, "server_error", "internal_error", message)
            }
        };
        // A 503 always names a time, so that clients know to come back; where nothing is known, soon.
        let soon = (error.status == S::SERVICE_UNAVAILABLE).then_some(Duration::from_secs(1));
        Self { retry_after: retry_after.or(soon), ..error }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let retryable = matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        if let Some(wait) = self.retry_after.filter(|_| retryable) {
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.close {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: Code) -> ApiError {
        Refused { code, message: "why".into(), retry_after: Some(Duration::from_millis(2001)) }.into()
    }

    #[test]
    fn every_code_has_its_status() {
        let statuses = [
            (Code::InvalidArgument, 400),
            (Code::TooLong, 400),
            (Code::NotFound, 404),
            (Code::Overloaded, 429),
            (Code::Unavailable, 503),
            (Code::Unimplemented, 501),
            (Code::DeadlineExceeded, 504),
            (Code::Denied, 402),
            (Code::Panicked, 500),
            (Code::Internal, 500),
            (Code::Protocol, 500),
        ];
        for (code, status) in statuses {
            assert_eq!(refused(code).status.as_u16(), status, "{code}");
        }
    }

    #[test]
    fn the_envelope_is_whole_and_retry_after_is_rounded_up() {
        assert_eq!(
            refused(Code::TooLong).body().to_string(),
            r#"{"error":{"message":"why","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}"#
        );
        assert_eq!(refused(Code::Overloaded).into_response().headers()["retry-after"], "3");
        assert_eq!(refused(Code::Unavailable).into_response().headers()["retry-after"], "3");
        assert!(refused(Code::TooLong).into_response().headers().get("retry-after").is_none());
        let unknown = Refused { code: Code::Unavailable, message: String::new(), retry_after: None };
        assert_eq!(ApiError::from(unknown).into_response().headers()["retry-after"], "1");
    }
}
