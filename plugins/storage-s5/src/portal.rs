//! One portal, over its HTTP API. What it says is believed of itself only: bytes and entries are checked by those who ask for them.

mod fault;
mod tus;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Body, Client, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::time::{Instant, timeout};
use tracing::warn;
use zeroize::Zeroizing;

use crate::cid::Cid;
use crate::config::Settings;
use crate::pointer::{Entry, Key, MOST_DATA, Wire};
use crate::spool::Spooled;
use crate::tree::GROUP;

pub use fault::Fault;
pub use tus::{Stored, UploadError};

/// The longest JSON that a portal may answer with, and the most of its words that an error repeats.
const LONGEST_ANSWER: usize = 64 << 10;
const LONGEST_WHY: usize = 200;
/// How long a portal is left alone that wants it and does not say how long.
const REST: Duration = Duration::from_secs(5);
/// The longest time that is taken from what it says.
const LONGEST_REST: Duration = Duration::from_secs(600);

/// A portal.
#[derive(Debug)]
pub struct Portal {
    url: Url,
    token: Option<Zeroizing<String>>,
    client: Client,
    timeout: Duration,
    single_max: u64,
    chunk: u64,
    rest_until: Mutex<Option<Instant>>,
}

#[derive(Deserialize)]
struct Uploaded {
    cid: String,
}

impl Portal {
    /// The portals of a configuration, in its order. Asks nobody.
    pub fn all(settings: &Settings) -> Result<Vec<Self>, reqwest::Error> {
        // The environment is read in one place, so no proxy is taken from it. A redirect would lead a token to who knows whom.
        let client = Client::builder().no_proxy().redirect(Policy::none()).connect_timeout(settings.timeout);
        let client = client.user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION"))).build()?;
        let portal = |(url, token): &(Url, Option<Zeroizing<String>>)| Self {
            url: url.clone(),
            token: token.clone(),
            client: client.clone(),
            timeout: settings.timeout,
            single_max: settings.single_max,
            chunk: settings.chunk,
            rest_until: Mutex::new(None),
        };
        Ok(settings.portals.iter().map(portal).collect())
    }

    /// Its address, which holds no secret.
    pub fn name(&self) -> &str {
        self.url.as_str()
    }

    /// Sends a blob in one request.
    async fn upload(&self, cid: &Cid, blob: &Spooled) -> Result<(), Fault> {
        let size = blob.tree.size();
        // The boundary is the blob's own hash: bytes that hold it cannot be found.
        let boundary = cid.id.to_string();
        let head = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"blob\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n"
        );
        let tail = format!("\r\n--{boundary}--\r\n");
        let length = head.len() as u64 + size + tail.len() as u64;
        let one = |text: String| futures::stream::iter([Ok(Bytes::from(text))]);
        let body = one(head).chain(blob.read(0, size)).chain(one(tail));
        let request = self.client.post(self.at("s5/upload")).header(CONTENT_LENGTH, length);
        let request = request.header(CONTENT_TYPE, format!("multipart/form-data; boundary={boundary}"));
        let answer: Uploaded = self.json(self.send_body(request, body).await?).await?;
        match Cid::parse(&answer.cid) {
            Ok(named) if named.id == cid.id && named.size.is_none_or(|named| named == size) => Ok(()),
            _ => Err(Fault::Wrong(format!("it took the blob for another one: {}", excerpt(&answer.cid)))),
        }
    }

    /// Whether it says that it has the blob, with the right size.
    pub async fn holds(&self, cid: &Cid) -> Result<bool, Fault> {
        match self.read(cid, 0, Some(1)).await {
            Ok(part) => Ok(part.size.is_none() || part.size == cid.size),
            Err(Fault::Missing) => Ok(false),
            // Of an empty blob there is no first byte.
            Err(Fault::Refused { status: 416, .. }) if cid.size == Some(0) => Ok(true),
            Err(fault) => Err(fault),
        }
    }

    /// Begins to read a blob from one place up to another, or to its end.
    pub async fn read(&self, cid: &Cid, from: u64, to: Option<u64>) -> Result<Part, Fault> {
        let mut request = self.client.get(self.at(&cid.legacy()));
        if from > 0 || to.is_some() {
            let last = to.map(|to| (to - 1).to_string()).unwrap_or_default();
            request = request.header(RANGE, format!("bytes={from}-{last}"));
        }
        let response = self.send(request).await?;
        let (starts, size) = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = response.headers().get(CONTENT_RANGE).and_then(|range| content_range(range.to_str().ok()?));
                range.ok_or_else(|| Fault::Wrong("it does not say which part of the blob it sends".into()))?
            }
            // It knows no ranges and sends everything.
            _ => (0, response.content_length()),
        };
        let skip = from.checked_sub(starts).ok_or_else(|| Fault::Wrong("it sends another part of the blob".into()))?;
        Ok(Part { response, size, skip, came: Bytes::new(), timeout: self.timeout })
    }

    /// Asks it to let go of a blob, and says whether it had it.
    pub async fn delete(&self, cid: &Cid) -> Result<bool, Fault> {
        match self.send(self.client.delete(self.at(&format!("s5/delete/{}", cid.legacy())))).await {
            Ok(_) => Ok(true),
            Err(Fault::Missing) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// A pointer, if it has one that its key has signed.
    pub async fn entry(&self, key: Key) -> Result<Option<Entry>, Fault> {
        let mut url = self.at("s5/registry");
        url.query_pairs_mut().append_pair("pk", &key.to_base64());
        let response = match self.send(self.client.get(url)).await {
            Err(Fault::Missing) => return Ok(None),
            response => response?,
        };
        let wire: Wire = self.json(response).await?;
        match wire.check(MOST_DATA) {
            Ok(entry) if entry.key() == key => Ok(Some(entry)),
            Ok(_) => Err(Fault::Wrong("it answers with the pointer of another key".into())),
            Err(error) => Err(Fault::Wrong(format!("its pointer does not count: {error}"))),
        }
    }

    /// Gives it a pointer. That it answers well does not say that it has taken it: read it back.
    pub async fn set_entry(&self, entry: &Entry) -> Result<(), Fault> {
        self.send(self.client.post(self.at("s5/registry")).json(&entry.to_wire())).await.map(|_| ())
    }

    fn at(&self, path: &str) -> Url {
        let mut url = self.url.clone();
        url.set_path(&format!("{}{path}", self.url.path()));
        url
    }

    /// Sends a request and waits for the head of its answer.
    async fn send(&self, request: RequestBuilder) -> Result<Response, Fault> {
        self.answered(request, tokio::time::sleep(self.timeout)).await
    }

    /// The same with a body that may take long, as long as some of it is taken now and then.
    async fn send_body(
        &self,
        request: RequestBuilder,
        body: impl Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    ) -> Result<Response, Fault> {
        let taken = Arc::new(AtomicU64::new(0));
        let count = taken.clone();
        let body = body.inspect(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let stalled = async {
            loop {
                let before = taken.load(Ordering::Relaxed);
                tokio::time::sleep(self.timeout).await;
                if taken.load(Ordering::Relaxed) == before {
                    return;
                }
            }
        };
        self.answered(request.body(Body::wrap_stream(body)), stalled).await
    }

    async fn answered(&self, request: RequestBuilder, late: impl Future<Output = ()>) -> Result<Response, Fault> {
        let rest = self.rest_until.lock().map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
        if !rest.is_zero() {
            return Err(Fault::Busy(rest));
        }
        let request = match &self.token {
            Some(token) => request.bearer_auth(token.as_str()),
            None => request,
        };
        let response = tokio::select! {
            response = request.send() => response.map_err(Fault::unreachable)?,
            () = late => return Err(Fault::Unreachable(format!("it did not answer, or take more, within {} ms", self.timeout.as_millis()))),
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let asked_for = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        if status == StatusCode::TOO_MANY_REQUESTS || (status == StatusCode::SERVICE_UNAVAILABLE && asked_for.is_some()) {
            let rest = asked_for.map_or(REST, Duration::from_secs).min(LONGEST_REST);
            warn!(
                portal = self.name(),
                rest_s = rest.as_secs(),
                "The portal wants fewer requests: it is left alone for a while."
            );
            *self.rest_until.lock() = Some(Instant::now() + rest);
            return Err(Fault::Busy(rest));
        }
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => Err(Fault::Missing),
            // That of an upload whose broken connection the portal has not noticed yet.
            StatusCode::LOCKED => Err(Fault::Unreachable("it is still busy with an earlier part of the upload".into())),
            _ if status.is_server_error() => Err(Fault::Unreachable(format!("it answered with status {}", status.as_u16()))),
            _ => {
                // What it says is a help, not a need.
                let words = timeout(self.timeout, short(response)).await.ok().and_then(Result::ok).unwrap_or_default();
                Err(Fault::Refused { status: status.as_u16(), why: excerpt(&String::from_utf8_lossy(&words)) })
            }
        }
    }

    async fn json<T: for<'de> Deserialize<'de>>(&self, response: Response) -> Result<T, Fault> {
        let late = |_| Fault::Unreachable(format!("its answer did not end within {} ms", self.timeout.as_millis()));
        let body = timeout(self.timeout, short(response)).await.map_err(late)??;
        serde_json::from_slice(&body).map_err(|error| Fault::Wrong(format!("its answer is not what S5 portals say: {error}")))
    }
}

/// A body that has no reason to be long.
async fn short(mut response: Response) -> Result<Vec<u8>, Fault> {
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(Fault::unreachable)? {
        body.extend_from_slice(&piece);
        if body.len() > LONGEST_ANSWER {
            return Err(Fault::Wrong(format!("its answer is longer than {LONGEST_ANSWER} bytes")));
        }
    }
    Ok(body)
}

/// A portal's own words, for an error: one short line of them.
fn excerpt(words: &str) -> String {
    words.split_whitespace().collect::<Vec<_>>().join(" ").chars().filter(|char| !char.is_control()).take(LONGEST_WHY).collect()
}

/// Where a part starts, and how long the whole is, by `bytes 0-9/100`.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, size) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, size.parse().ok()))
}

/// Bytes of a blob as they come from a portal. Nobody has checked them.
#[derive(Debug)]
pub struct Part {
    response: Response,
    /// How long the blob is, by the portal's own word.
    pub size: Option<u64>,
    /// Bytes before those that were asked for.
    skip: u64,
    came: Bytes,
    timeout: Duration,
}

impl Part {
    /// The next `most` bytes, at most a group; fewer only at the end.
    pub async fn up_to(&mut self, most: u64) -> Result<Vec<u8>, Fault> {
        let limit = self.timeout;
        let mut bytes = Vec::with_capacity(most.min(GROUP) as usize);
        let fill = async {
            while (bytes.len() as u64) < most {
                let Some(mut piece) = self.piece().await? else { break };
                bytes.extend_from_slice(&piece.split_to(piece.len().min(most as usize - bytes.len())));
                self.came = piece;
            }
            Ok(())
        };
        match timeout(limit, fill).await {
            Ok(filled) => filled.map(|()| bytes),
            Err(_) => Err(Fault::Unreachable(format!("it did not send a MiB within {} ms", limit.as_millis()))),
        }
    }

    async fn piece(&mut self) -> Result<Option<Bytes>, Fault> {
        if !self.came.is_empty() {
            return Ok(Some(std::mem::take(&mut self.came)));
        }
        while let Some(mut piece) = self.response.chunk().await.map_err(Fault::unreachable)? {
            let skipped = piece.split_to((piece.len() as u64).min(self.skip) as usize).len();
            self.skip -= skipped as u64;
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_of_an_answer_is_read_with_and_without_a_size() {
        assert_eq!(content_range("bytes 5-9/100"), Some((5, Some(100))));
        assert_eq!(content_range("bytes 0-0/*"), Some((0, None)));
        assert_eq!(content_range("bytes */100"), None);
        assert_eq!(content_range("5-9/100"), None);
    }

    #[test]
    fn words_of_a_portal_are_cut_to_one_line() {
        assert_eq!(excerpt("no\r\n\tsuch \u{1b}[31mthing"), "no such [31mthing");
        assert_eq!(excerpt(&"x".repeat(1000)).len(), LONGEST_WHY);
    }
}
