//! Blobs: `POST /s5/upload`, `GET /CID`, `DELETE /s5/delete/CID`.

use std::io;
use std::path::{Path, PathBuf};

use axum::Json;
use axum::body::Body;
use axum::extract::{Path as Captured, Request, State};
use axum::http::{HeaderMap, Response, header};
use bytes::Bytes;
use futures::stream::try_unfold;
use futures::{Stream, StreamExt};
use serde_json::{Value, json};
use storage_s5::cid::{Cid, Id};
use tempfile::NamedTempFile;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::task::spawn_blocking;

use crate::reply::Refusal;
use crate::{Portal, Shared};

/// What deployed portals take in one request, and so this one.
const MOST_AT_ONCE: u64 = 32 << 20;

/// Bytes that are read from a file at once.
const PIECE: u64 = 256 << 10;

impl Portal {
    pub fn blob(&self, id: Id) -> PathBuf {
        self.dir.join("blobs").join(id.to_string())
    }

    /// A blob's size, if it is here.
    pub async fn size(&self, cid: &Cid) -> Result<u64, Refusal> {
        let found = tokio::fs::metadata(self.blob(cid.id)).await?.len();
        // A name with another size is the name of no blob.
        cid.size.is_none_or(|size| size == found).then_some(found).ok_or_else(Refusal::missing)
    }

    /// Gives a file of bytes its name, once it is on the disk.
    pub async fn adopt(&self, file: PathBuf, id: Id) -> Result<(), Refusal> {
        let (to, folder) = (self.blob(id), self.dir.join("blobs"));
        let adopt = move || {
            std::fs::File::open(&file)?.sync_all()?;
            std::fs::rename(&file, to)?;
            std::fs::File::open(folder)?.sync_all()
        };
        Ok(spawn_blocking(adopt).await.map_err(io::Error::other)??)
    }
}

/// The hash of a file.
pub async fn hash(path: &Path) -> Result<Id, Refusal> {
    let path = path.to_owned();
    let hash = move || {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(std::fs::File::open(path)?)?;
        Ok(hasher.finalize().into())
    };
    Ok(spawn_blocking(hash).await.map_err(io::Error::other)?.map_err(|error: io::Error| error)?)
}

/// Appends a body to a file, up to `most` bytes; whether it ended within them.
pub async fn append<E: std::fmt::Display>(
    file: &mut File,
    mut body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    most: u64,
) -> Result<bool, Refusal> {
    let mut left = most;
    while let Some(piece) = body.next().await {
        let piece = match piece {
            Ok(piece) => piece,
            Err(error) => {
                // What has come is kept: an upload goes on behind it.
                file.flush().await?;
                return Err(Refusal::new(400, format!("the body broke off: {error}")));
            }
        };
        if piece.len() as u64 > left {
            return Ok(false);
        }
        left -= piece.len() as u64;
        file.write_all(&piece).await?;
    }
    file.flush().await?;
    Ok(true)
}

pub async fn upload(State(portal): Shared, request: Request) -> Result<Json<Value>, Refusal> {
    let incoming = NamedTempFile::new_in(portal.dir.join("incoming"))?;
    let mut file = File::from_std(incoming.reopen()?);
    let boundary =
        request.headers().get(header::CONTENT_TYPE).and_then(|value| multer::parse_boundary(value.to_str().ok()?).ok());
    let body = request.into_body().into_data_stream();
    let whole = match boundary {
        None => append(&mut file, body, MOST_AT_ONCE).await?,
        Some(boundary) => {
            let mut form = multer::Multipart::new(body, boundary);
            loop {
                match form.next_field().await.map_err(|error| Refusal::new(400, error.to_string()))? {
                    Some(field) if field.name() == Some("file") => break append(&mut file, field, MOST_AT_ONCE).await?,
                    Some(_) => {}
                    None => return Err(Refusal::new(400, "the form has no field called file")),
                }
            }
        }
    };
    if !whole {
        return Err(Refusal::new(413, "a blob of more than 32 MiB goes to /s5/upload/tus"));
    }
    let id = hash(incoming.path()).await?;
    let size = Some(file.metadata().await?.len());
    portal.adopt(incoming.path().to_owned(), id).await?;
    Ok(Json(json!({ "cid": Cid { id, size }.legacy() })))
}

pub async fn download(
    State(portal): Shared,
    Captured(name): Captured<String>,
    headers: HeaderMap,
) -> Result<Response<Body>, Refusal> {
    let cid = Cid::parse(&name)?;
    let size = portal.size(&cid).await?;
    let range = headers.get(header::RANGE).map(|range| range.to_str().ok().and_then(|range| part(range, size)));
    let (from, to) = match range {
        None => (0, size),
        Some(Some(part)) => part,
        Some(None) => return Err(Refusal::new(416, format!("the range is not within the blob's {size} bytes"))),
    };
    let mut file = File::open(portal.blob(cid.id)).await?;
    file.seek(io::SeekFrom::Start(from)).await?;
    let bytes = try_unfold((file, to - from), |(mut file, left)| async move {
        if left == 0 {
            return io::Result::Ok(None);
        }
        let mut piece = vec![0; PIECE.min(left) as usize];
        file.read_exact(&mut piece).await?;
        let left = left - piece.len() as u64;
        Ok(Some((Bytes::from(piece), (file, left))))
    });
    let answer = Response::builder().header(header::ACCEPT_RANGES, "bytes").header(header::CONTENT_LENGTH, to - from);
    let answer = match range {
        None => answer,
        Some(_) => answer.status(206).header(header::CONTENT_RANGE, format!("bytes {from}-{}/{size}", to - 1)),
    };
    answer.body(Body::from_stream(bytes)).map_err(|error| Refusal::new(500, error.to_string()))
}

pub async fn delete(State(portal): Shared, Captured(name): Captured<String>) -> Result<(), Refusal> {
    let cid = Cid::parse(&name)?;
    portal.size(&cid).await?;
    Ok(tokio::fs::remove_file(portal.blob(cid.id)).await?)
}

/// The bytes that `bytes=FIRST-LAST` or `bytes=FIRST-` means: the first of them, and the one after the last.
fn part(range: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.parse().ok()?;
    let end = match last {
        "" => size,
        last => last.parse::<u64>().ok()?.saturating_add(1).min(size),
    };
    (first < end).then_some((first, end))
}
