//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::Edge;
use super::error::ApiError;
use crate::scheduler::ServedModelInfo;

pub(super) async fn list(State(edge): State<Arc<Edge>>) -> Json<Value> {
    let data: Vec<Value> = edge.scheduler.models().iter().map(|model| describe(&edge, model)).collect();
    Json(json!({ "object": "list", "data": data }))
}

/// Ids may hold slashes, as those of models from a hub do.
pub(super) async fn one(State(edge): State<Arc<Edge>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let models = edge.scheduler.models();
    match models.iter().find(|model| model.id == id) {
        Some(model) => Ok(Json(describe(&edge, model))),
        None => {
            let served: Vec<&str> = models.iter().map(|model| model.id.as_str()).collect();
            let id: String = id.chars().take(128).collect();
            Err(ApiError::model_not_found(format!("there is no model `{id}`; served here: {}", served.join(", "))))
        }
    }
}

/// `max_model_len` is vLLM's name for the context. `generates` is ours: false for a model that only embeds.
fn describe(edge: &Edge, model: &ServedModelInfo) -> Value {
    json!({
        "id": model.id,
        "object": "model",
        "created": edge.started,
        "owned_by": model.plugin,
        "max_model_len": model.context,
        "generates": model.generates,
    })
}
