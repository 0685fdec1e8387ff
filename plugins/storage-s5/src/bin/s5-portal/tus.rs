//! Uploads in chunks: `POST`, `PATCH` and `HEAD` under `/s5/upload/tus`.
//!
//! An upload is two files: its bytes so far, which are its offset, and what they must become.

use std::io;
use std::path::PathBuf;

use axum::extract::{Path as Captured, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use storage_s5::cid::{Cid, Id};
use tokio::fs::{self, File};
use uuid::Uuid;

use crate::reply::Refusal;
use crate::{Portal, Shared, blobs};

/// What an upload must become.
#[derive(Serialize, Deserialize)]
struct Goal {
    id: String,
    size: u64,
}

impl Portal {
    fn bytes_of(&self, upload: Uuid) -> PathBuf {
        self.dir.join("tus").join(format!("{upload}.bytes"))
    }

    fn goal_of(&self, upload: Uuid) -> PathBuf {
        self.dir.join("tus").join(format!("{upload}.json"))
    }

    async fn goal(&self, upload: Uuid) -> Result<Goal, Refusal> {
        let text = fs::read(self.goal_of(upload)).await?;
        Ok(serde_json::from_slice(&text).map_err(io::Error::from)?)
    }

    async fn end(&self, upload: Uuid) -> Result<(), Refusal> {
        for file in [self.goal_of(upload), self.bytes_of(upload)] {
            match fs::remove_file(file).await {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }
}

pub async fn create(State(portal): Shared, headers: HeaderMap) -> Result<impl IntoResponse, Refusal> {
    speaks_tus(&headers)?;
    let size = number(&headers, "upload-length")?;
    let id = headers.get("upload-metadata").and_then(|value| hash_of(value.to_str().ok()?));
    let id = id.ok_or_else(|| Refusal::new(400, "Upload-Metadata has no `hash` with the BLAKE3 hash of the blob"))?;
    if portal.size(&Cid { id, size: Some(size) }).await.is_ok() {
        return Err(Refusal::new(409, "the blob is here already"));
    }
    let upload = Uuid::new_v4();
    let goal = serde_json::to_vec(&Goal { id: id.to_string(), size }).map_err(io::Error::from)?;
    fs::write(portal.bytes_of(upload), b"").await?;
    fs::write(portal.goal_of(upload), goal).await?;
    Ok((StatusCode::CREATED, [("tus-resumable", "1.0.0".to_owned()), ("location", format!("/s5/upload/tus/{upload}"))]))
}

pub async fn offset(State(portal): Shared, Captured(name): Captured<String>) -> Result<impl IntoResponse, Refusal> {
    let upload = named(&name)?;
    let goal = portal.goal(upload).await?;
    let offset = fs::metadata(portal.bytes_of(upload)).await?.len();
    let headers = [("upload-offset", offset), ("upload-length", goal.size)].map(|(name, value)| (name, value.to_string()));
    Ok((headers, [("tus-resumable", "1.0.0"), ("cache-control", "no-store")]))
}

pub async fn append(
    State(portal): Shared,
    Captured(name): Captured<String>,
    request: Request,
) -> Result<impl IntoResponse, Refusal> {
    speaks_tus(request.headers())?;
    let kind = request.headers().get(header::CONTENT_TYPE);
    if kind.is_none_or(|kind| kind != "application/offset+octet-stream") {
        return Err(Refusal::new(415, "a chunk's type is application/offset+octet-stream"));
    }
    let from = number(request.headers(), "upload-offset")?;
    let upload = named(&name)?;
    let goal = portal.goal(upload).await?;
    let mut file = File::options().append(true).open(portal.bytes_of(upload)).await?;
    // The lock goes with the file: who comes while another chunk is written is told so, and who dies lets go of it.
    let file_lock = file.try_clone().await?.into_std().await;
    file_lock.try_lock().map_err(|_| Refusal::new(423, "another chunk is being written"))?;
    let offset = file.metadata().await?.len();
    if offset != from {
        return Err(Refusal::new(409, format!("the upload is at byte {offset}")));
    }
    if !blobs::append(&mut file, request.into_body().into_data_stream(), goal.size - offset).await? {
        return Err(Refusal::new(413, format!("the upload has {} bytes", goal.size)));
    }
    let offset = file.metadata().await?.len();
    if offset == goal.size {
        let id = blobs::hash(&portal.bytes_of(upload)).await?;
        if id.to_string() != goal.id {
            portal.end(upload).await?;
            return Err(Refusal::new(400, "the bytes do not have the announced hash"));
        }
        portal.adopt(portal.bytes_of(upload), id).await?;
        portal.end(upload).await?;
    }
    Ok((StatusCode::NO_CONTENT, [("tus-resumable", "1.0.0".to_owned()), ("upload-offset", offset.to_string())]))
}

fn named(upload: &str) -> Result<Uuid, Refusal> {
    Uuid::parse_str(upload).map_err(|_| Refusal::missing())
}

fn speaks_tus(headers: &HeaderMap) -> Result<(), Refusal> {
    match headers.get("tus-resumable") {
        Some(version) if version == "1.0.0" => Ok(()),
        _ => Err(Refusal::new(412, "this portal speaks tus 1.0.0")),
    }
}

fn number(headers: &HeaderMap, name: &str) -> Result<u64, Refusal> {
    let number = headers.get(name).and_then(|value| value.to_str().ok()?.parse().ok());
    number.ok_or_else(|| Refusal::new(400, format!("{name} is missing, or no number")))
}

/// The blob of `hash ..` among the metadata: base64 of base64url of the hash with the byte before it that says BLAKE3.
fn hash_of(metadata: &str) -> Option<Id> {
    let encoded = metadata.split(',').find_map(|pair| pair.trim().strip_prefix("hash "))?;
    let text = STANDARD.decode(encoded.trim()).ok()?;
    Id::of_multihash(&URL_SAFE_NO_PAD.decode(text).ok()?)
}
