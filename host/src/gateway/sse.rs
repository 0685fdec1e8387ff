//! Answers as server-sent events, framed as OpenAI frames them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use fabstir_plugin_api::inference::Chunk;
use tracing::debug;

use super::error::ApiError;
use super::reply::{Head, Shape, ended_early};
use crate::cache::Telling;
use crate::scheduler::Refused;

/// A comment: clients skip it, and proxies see that the connection lives.
const PING: Bytes = Bytes::from_static(b":\n\n");
const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

pub(super) fn response<S: Shape>(
    answer: Telling,
    first: Option<Chunk>,
    head: Head,
    shape: S,
    usage: bool,
    ping: Duration,
) -> Response {
    let mut events = Events { answer, head, shape, usage, ping, ready: VecDeque::new(), over: false };
    events.open();
    if let Some(chunk) = first {
        events.take(Some(Ok(chunk)));
    }
    // Dropping the body, as when the client leaves, drops the answer, which cancels the generation.
    let body = futures::stream::unfold(events, |mut events| async {
        let event = events.next().await?;
        Some((Ok::<_, Infallible>(event), events))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Tells nginx not to collect the stream before it passes it on.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(body)).into_response()
}

struct Events<S> {
    answer: Telling,
    head: Head,
    shape: S,
    usage: bool,
    ping: Duration,
    ready: VecDeque<Bytes>,
    over: bool,
}

impl<S: Shape> Events<S> {
    fn open(&mut self) {
        let opening = self.shape.opening(&self.head, self.usage);
        self.ready.extend(opening.map(event));
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.over {
                return None;
            }
            match tokio::time::timeout(self.ping, self.answer.next()).await {
                Ok(item) => self.take(item),
                Err(_) => return Some(PING),
            }
        }
    }

    fn take(&mut self, item: Option<Result<Chunk, Refused>>) {
        match item {
            // Text that is held back until its characters are whole makes no event.
            Some(Ok(Chunk::Text(text))) if text.text.is_empty() && text.logprobs.is_empty() => {}
            Some(Ok(Chunk::Text(text))) => self.ready.push_back(event(self.shape.piece(&self.head, &text, self.usage))),
            Some(Ok(Chunk::Done(done))) => {
                self.over = true;
                self.ready.push_back(event(self.shape.closing(&self.head, done.finish, self.usage)));
                if self.usage {
                    self.ready.push_back(event(self.shape.usage(&self.head, done.usage)));
                }
                self.ready.push_back(DONE);
            }
            Some(Err(refused)) => self.fail(refused),
            None => self.fail(ended_early()),
        }
    }

    /// The status is out already, so the error is the last event, and `[DONE]` does not follow.
    fn fail(&mut self, refused: Refused) {
        self.over = true;
        self.ready.push_back(event(ApiError::from(refused).body().to_string()));
    }
}

impl<S> Drop for Events<S> {
    fn drop(&mut self) {
        if !self.over {
            debug!(id = %self.head.id, "Client left before the answer ended.");
        }
    }
}

fn event(json: String) -> Bytes {
    Bytes::from(format!("data: {json}\n\n"))
}
