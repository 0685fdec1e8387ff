//! Uploads that go on where they broke off: the tus protocol, version 1.0.0, as S5 portals speak it.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::{Method, RequestBuilder, Url};
use tracing::{debug, info};

use super::{Fault, Portal};
use crate::cid::Cid;
use crate::error::S5Error;
use crate::ledger::Ledger;
use crate::spool::{Spooled, blocking};

/// Breaks in a row, with nothing sent between them, after which an upload is given up. What was sent is kept for the next try.
const BREAKS: u32 = 3;

impl Portal {
    /// Sends a blob, in one request or in chunks by its size. When it returns, the portal has said that it has it.
    pub async fn store(&self, cid: &Cid, blob: &Spooled, ledger: &Arc<Ledger>) -> Result<(), UploadError> {
        let size = blob.tree.size();
        if size <= self.single_max {
            return Ok(self.upload(cid, blob).await?);
        }
        let Some((url, mut offset)) = self.begin(cid, size, ledger).await? else {
            return self.acknowledged(cid).await;
        };
        let mut breaks = 0;
        while offset < size {
            let end = size.min(offset + self.chunk);
            let broke = match self.chunk(&url, blob, offset, end).await {
                Ok(next) if next > offset && next <= end => {
                    (offset, breaks) = (next, 0);
                    continue;
                }
                Ok(next) => return Err(Fault::Wrong(format!("after bytes {offset} to {end} it says it has {next}")).into()),
                Err(fault) => fault,
            };
            let again = broke.wait(breaks, self.timeout).filter(|_| breaks + 1 < BREAKS);
            // A chunk that it took without an answer has moved the offset.
            let wait = match (again, &broke) {
                (Some(wait), _) => wait,
                (None, Fault::Refused { status: 409, .. }) if breaks + 1 < BREAKS => Duration::ZERO,
                _ => return Err(broke.into()),
            };
            debug!(portal = self.name(), blob = %cid.id, offset, why = %broke, "The upload broke off, and goes on.");
            breaks += 1;
            tokio::time::sleep(wait).await;
            match self.offset(&url, size).await {
                Ok(now) => {
                    // Part of the chunk has come: it moves.
                    if now > offset {
                        breaks = 0;
                    }
                    offset = now;
                }
                // It ended the upload, and its answer was lost.
                Err(Fault::Missing) => break,
                Err(_) => {}
            }
        }
        self.remember(cid, ledger, None).await?;
        self.acknowledged(cid).await
    }

    /// Where the upload is and how far: a new one, or one that broke off. `None` where the portal has the blob.
    async fn begin(&self, cid: &Cid, size: u64, ledger: &Arc<Ledger>) -> Result<Option<(Url, u64)>, UploadError> {
        let (id, name, known) = (cid.id, self.name().to_owned(), ledger.clone());
        let begun = blocking(move || known.upload(id, &name)).await?;
        if let Some(url) = begun.and_then(|url| url.parse::<Url>().ok()).filter(|url| url.origin() == self.url.origin()) {
            match self.offset(&url, size).await {
                Ok(offset) => {
                    info!(portal = self.name(), blob = %cid.id, offset, size, "The upload goes on where it broke off.");
                    return Ok(Some((url, offset)));
                }
                // It has forgotten it, or ended it.
                Err(Fault::Missing | Fault::Refused { .. } | Fault::Wrong(_)) => self.remember(cid, ledger, None).await?,
                Err(fault) => return Err(fault.into()),
            }
        }
        let created = match self.create(cid, size, false).await {
            // Portals of an older version know the legacy hash only.
            Err(Fault::Refused { status: 400 | 415 | 422, .. }) => self.create(cid, size, true).await,
            created => created,
        };
        match created {
            Ok(url) => {
                self.remember(cid, ledger, Some(url.to_string())).await?;
                Ok(Some((url, 0)))
            }
            Err(Fault::Refused { status: 409, .. }) => Ok(None),
            Err(fault) => Err(fault.into()),
        }
    }

    async fn create(&self, cid: &Cid, size: u64, legacy: bool) -> Result<Url, Fault> {
        let hash = STANDARD.encode(URL_SAFE_NO_PAD.encode(cid.id.multihash(legacy)));
        let request = self.tus(Method::POST, self.at("s5/upload/tus")).header("Upload-Length", size);
        let response = self.send(request.header("Upload-Metadata", format!("hash {hash}")).header(CONTENT_LENGTH, 0)).await?;
        let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let no_place = || Fault::Wrong("it does not say where the upload goes".into());
        let found = response.url().join(location.ok_or_else(no_place)?).map_err(|_| no_place())?;
        if found.host() != self.url.host() {
            return Err(Fault::Wrong("it wants the upload at another host, which would get the token".into()));
        }
        // Behind a proxy, a portal may not know its own scheme and port.
        let mut url = self.url.clone();
        url.set_path(found.path());
        url.set_query(found.query());
        Ok(url)
    }

    /// How many bytes of an upload the portal has.
    async fn offset(&self, url: &Url, size: u64) -> Result<u64, Fault> {
        let response = self.send(self.tus(Method::HEAD, url.clone())).await?;
        upload_offset(response.headers())
            .filter(|&offset| offset <= size)
            .ok_or_else(|| Fault::Wrong("it does not say how far the upload is".into()))
    }

    /// Sends some bytes; returns how many it has then.
    async fn chunk(&self, url: &Url, blob: &Spooled, from: u64, to: u64) -> Result<u64, Fault> {
        let request = self.tus(Method::PATCH, url.clone()).header("Upload-Offset", from).header(CONTENT_LENGTH, to - from);
        let request = request.header(CONTENT_TYPE, "application/offset+octet-stream");
        let response = self.send_body(request, blob.read(from, to)).await?;
        upload_offset(response.headers()).ok_or_else(|| Fault::Wrong("it does not say how far the upload is".into()))
    }

    /// An upload in chunks has no answer that names the blob, so it is asked for.
    async fn acknowledged(&self, cid: &Cid) -> Result<(), UploadError> {
        match self.holds(cid).await? {
            true => Ok(()),
            false => Err(Fault::Wrong("it took the blob, and does not have it".into()).into()),
        }
    }

    async fn remember(&self, cid: &Cid, ledger: &Arc<Ledger>, url: Option<String>) -> Result<(), S5Error> {
        let (id, name, ledger) = (cid.id, self.name().to_owned(), ledger.clone());
        blocking(move || ledger.set_upload(id, &name, url.as_deref())).await
    }

    fn tus(&self, method: Method, url: Url) -> RequestBuilder {
        self.client.request(method, url).header("Tus-Resumable", "1.0.0")
    }
}

fn upload_offset(headers: &HeaderMap) -> Option<u64> {
    headers.get("Upload-Offset")?.to_str().ok()?.trim().parse().ok()
}

/// Why a portal does not have a blob.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    #[error(transparent)]
    Portal(#[from] Fault),
    /// What was to be remembered of it could not be.
    #[error(transparent)]
    Own(#[from] S5Error),
}
