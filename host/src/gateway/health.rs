//! `GET /health`: whether requests can be served. Public, and free of secrets.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Edge;
use crate::scheduler::Readiness;

pub(super) async fn handle(State(edge): State<Arc<Edge>>) -> Response {
    let (message, loading) = match edge.scheduler.readiness() {
        Readiness::Ready => return Json(json!({ "status": "ok" })).into_response(),
        Readiness::Loading(starting) => ("Loading model", starting),
        Readiness::Nothing => ("No model is served", Vec::new()),
    };
    let loading: Vec<Value> = loading
        .iter()
        .map(|starting| json!({ "plugin": starting.plugin, "doing": starting.doing, "percent": starting.percent }))
        .collect();
    let error = json!({ "code": 503, "message": message, "type": "unavailable_error" });
    let body = Json(json!({ "error": error, "loading": loading }));
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], body).into_response()
}
