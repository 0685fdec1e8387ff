//! Pointers: `GET` and `POST` under `/s5/registry`.

use std::io;
use std::path::PathBuf;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use storage_s5::pointer::{Key, Wire};

use crate::reply::Refusal;
use crate::{Portal, Shared};

/// What deployed portals let an entry hold.
const MOST_DATA: usize = 64;

#[derive(Deserialize)]
pub struct Asked {
    pk: String,
}

impl Portal {
    fn entry(&self, key: Key) -> PathBuf {
        self.dir.join("registry").join(key.to_hex())
    }
}

pub async fn get(State(portal): Shared, Query(asked): Query<Asked>) -> Result<Json<Wire>, Refusal> {
    let key = Key::of_base64(&asked.pk).map_err(|error| Refusal::new(400, error.to_string()))?;
    let text = tokio::fs::read(portal.entry(key)).await?;
    Ok(Json(serde_json::from_slice(&text).map_err(io::Error::from)?))
}

pub async fn set(State(portal): Shared, Json(wire): Json<Wire>) -> Result<StatusCode, Refusal> {
    let entry = wire.check(MOST_DATA).map_err(|error| Refusal::new(400, error.to_string()))?;
    let path = portal.entry(entry.key());
    let _changing = portal.changing.lock().await;
    match tokio::fs::read(&path).await {
        Ok(text) => {
            let known: Wire = serde_json::from_slice(&text).map_err(io::Error::from)?;
            if known == entry.to_wire() {
                return Ok(StatusCode::NO_CONTENT);
            }
            if known.revision >= wire.revision {
                return Err(Refusal::new(400, format!("revision {} is not above {}", wire.revision, known.revision)));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let text = serde_json::to_vec(&entry.to_wire()).map_err(io::Error::from)?;
    let new = path.with_extension("new");
    let write = move || {
        std::fs::write(&new, text)?;
        std::fs::File::open(&new)?.sync_all()?;
        std::fs::rename(&new, path)
    };
    tokio::task::spawn_blocking(write).await.map_err(io::Error::other)??;
    Ok(StatusCode::NO_CONTENT)
}
