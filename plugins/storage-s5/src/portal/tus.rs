//! Uploads that go on where they broke off: the tus protocol, version 1.0.0, as S5 portals speak it.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use blob_folder::blocking;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::{Method, RequestBuilder, Url};
use tracing::{debug, info};

use super::{Fault, Portal};
use crate::cid::Cid;
use crate::error::S5Error;
use crate::ledger::Ledger;
use crate::spool::Spooled;

/// Breaks after which an upload is given up that has not got on between them. What was sent is kept for the next try.
const BREAKS: u32 = 3;

/// How much further an upload has to be to have got on, or at the end of a chunk. What the portal says of its offset costs it nothing: with a
/// byte at a time it could hold an upload for ever.
const STEP: u64 = 1 << 20;

/// What became of a blob that a portal was to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// It was sent, and acknowledged.
    Sent,
    /// The portal says that it has it already, and has taken nothing.
    WasThere,
}

/// How an upload is getting on.
struct Progress {
    /// The farthest place from which it was counted.
    reached: u64,
    /// Breaks since then.
    breaks: u32,
}

impl Progress {
    /// Notes where the upload is, in a chunk that ends at `end`; says whether it has got on.
    fn is_at(&mut self, offset: u64, end: u64) -> bool {
        let has_got_on = offset > self.reached && offset >= end.min(self.reached.saturating_add(STEP));
        if has_got_on {
            *self = Self { reached: offset, breaks: 0 };
        }
        has_got_on
    }

    /// Counts a break; says whether there may be another try.
    fn may_break(&mut self) -> bool {
        self.breaks += 1;
        self.breaks < BREAKS
    }
}

impl Portal {
    /// Sends a blob, in one request or in chunks by its size. When it returns, the portal has said that it has it.
    pub async fn store(&self, cid: &Cid, blob: &Spooled, ledger: &Arc<Ledger>) -> Result<Stored, UploadError> {
        let size = blob.tree.size();
        if size <= self.single_max {
            self.upload(cid, blob).await?;
            return Ok(Stored::Sent);
        }
        let Some((url, mut offset)) = self.begin(cid, size, ledger).await? else {
            return Ok(Stored::WasThere);
        };
        let mut progress = Progress { reached: offset, breaks: 0 };
        while offset < size {
            let end = size.min(offset + self.chunk);
            let broke = match self.chunk(&url, blob, offset, end).await {
                Ok(next) if next > offset && next <= end => {
                    if !progress.is_at(next, end) && !progress.may_break() {
                        return Err(
                            Fault::Wrong(format!("of bytes {offset} to {end} it takes {} at a time", next - offset)).into()
                        );
                    }
                    offset = next;
                    continue;
                }
                Ok(next) => return Err(Fault::Wrong(format!("after bytes {offset} to {end} it says it has {next}")).into()),
                Err(fault) => fault,
            };
            let pause = broke.wait(progress.breaks, self.timeout);
            // A chunk that it took without an answer has moved the offset.
            let wait = match (pause, &broke) {
                (Some(wait), _) => wait,
                (None, Fault::Refused { status: 409, .. }) => Duration::ZERO,
                _ => return Err(broke.into()),
            };
            if !progress.may_break() {
                return Err(broke.into());
            }
            debug!(portal = self.name(), blob = %cid.id, offset, why = %broke, "The upload broke off, and goes on.");
            tokio::time::sleep(wait).await;
            match self.offset(&url, size).await {
                Ok(now) => {
                    // Where a part of the chunk has come that is worth it, it moves.
                    progress.is_at(now, end);
                    offset = now;
                }
                // It ended the upload, and its answer was lost.
                Err(Fault::Missing) => break,
                Err(_) => {}
            }
        }
        self.remember(cid, ledger, None).await?;
        self.acknowledged(cid).await?;
        Ok(Stored::Sent)
    }

    /// Where the upload is and how far: a new one, or one that broke off. `None` where the portal says that it has the blob.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upload_that_does_not_get_on_is_given_up() {
        let mut progress = Progress { reached: 0, breaks: 0 };
        // A byte at a time, and back again.
        for offset in [1, 2, 1] {
            assert!(!progress.is_at(offset, 4 * STEP));
        }
        assert!(progress.may_break());
        assert!(progress.is_at(STEP, 4 * STEP), "a MiB counts");
        assert!(progress.is_at(STEP + 100, STEP + 100), "and the end of a chunk, however small");
        assert!(!progress.is_at(STEP + 100, STEP + 100), "but not twice");
        assert!(progress.may_break() && progress.may_break() && !progress.may_break());
    }
}
