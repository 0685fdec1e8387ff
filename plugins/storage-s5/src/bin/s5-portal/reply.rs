//! Answers that say no.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

/// A status and a sentence.
#[derive(Debug)]
pub struct Refusal {
    status: u16,
    why: String,
}

impl Refusal {
    pub fn new(status: u16, why: impl Into<String>) -> Self {
        Self { status, why: why.into() }
    }

    pub fn missing() -> Self {
        Self::new(404, "there is no such thing here")
    }
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        let status = match error.kind() {
            std::io::ErrorKind::NotFound => 404,
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => 507,
            _ => 500,
        };
        Self::new(status, error.to_string())
    }
}

impl From<storage_s5::cid::NameError> for Refusal {
    fn from(error: storage_s5::cid::NameError) -> Self {
        Self::new(400, error.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, self.why).into_response()
    }
}
