//! From a generation to an HTTP answer, streamed or whole.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::header;
use axum::response::{IntoResponse, Response};
use fabstir_plugin_api::inference::{Chunk, Done, Finish, Generation, Text, TokenLogprob, Usage};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::Edge;
use super::common::Common;
use super::error::ApiError;
use super::limits::Caller;
use super::{caching, sse};
use crate::cache::Telling;
use crate::scheduler::Refused;

/// How long a stream's headers wait for its first chunk. A request that fails at once, as over a prompt that is too long, still
/// gets a status of its own; any other has its headers when it starts, not when its first token comes.
const FIRST_CHUNK: Duration = Duration::from_millis(100);

/// How answers of one form look. `usage` says whether chunks carry `usage: null`.
pub(super) trait Shape: Send + 'static {
    const ID: &'static str;
    const OBJECT: &'static str;
    const CHUNK: &'static str;

    /// The chunk before any text.
    fn opening(&mut self, head: &Head, usage: bool) -> Option<String>;
    fn piece(&mut self, head: &Head, text: &Text, usage: bool) -> String;
    /// The chunk that says why the answer ended.
    fn closing(&mut self, head: &Head, finish: Finish, usage: bool) -> String;
    /// The chunk after the last, with no choices.
    fn usage(&mut self, head: &Head, usage: Usage) -> String;
    /// All of it in one body.
    fn whole(self, head: &Head, text: &str, logprobs: &[TokenLogprob], finish: Finish, usage: Usage) -> String;
}

/// What every chunk of one answer repeats.
#[derive(Debug, Serialize)]
pub(super) struct Head {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: String,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct WireUsage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
}

impl From<Usage> for WireUsage {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: PromptDetails { cached_tokens: usage.cached_tokens },
        }
    }
}

pub(super) fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::Stop | Finish::Unknown => "stop",
    }
}

/// JSON has no infinity: the value that OpenAI writes for a token that cannot come.
pub(super) fn wire_logprob(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

pub(super) async fn reply<S: Shape>(
    edge: &Edge,
    caller: Caller,
    common: &Common,
    generation: Generation,
    shape: S,
) -> Result<Response, ApiError> {
    let (mut answer, x_cache) = match &edge.cache {
        None => (Telling::from(edge.scheduler.generate(caller.cx(edge), generation).await?), None),
        Some(cache) => {
            let answer = cache.answer(caller.cx(edge), generation, caching::wish(caller.headers(), common.cache_prompt)).await?;
            let answer = answer.ok_or_else(ApiError::not_kept)?;
            let x_cache = caching::told(answer.found);
            (answer, Some(x_cache))
        }
    };
    let x_cache = x_cache.map(|value| [(caching::X_CACHE, value)]);
    let head = Head {
        id: format!("{}{}", S::ID, uuid::Uuid::new_v4().simple()),
        object: if common.stream { S::CHUNK } else { S::OBJECT },
        created: now(),
        model: common.model.clone(),
        system_fingerprint: fingerprint(&answer.plugin, &common.model),
    };
    if !common.stream {
        let (text, logprobs, done) = collect(answer).await?;
        let body = shape.whole(&head, &text, &logprobs, done.finish, done.usage);
        return Ok((x_cache, [(header::CONTENT_TYPE, "application/json")], body).into_response());
    }
    let first = match tokio::time::timeout(FIRST_CHUNK, answer.next()).await {
        Ok(Some(Err(refused))) => return Err(refused.into()),
        Ok(first) => first.and_then(Result::ok),
        Err(_) => None,
    };
    Ok((x_cache, sse::response(answer, first, head, shape, common.include_usage, edge.ping_interval)).into_response())
}

async fn collect(mut answer: Telling) -> Result<(String, Vec<TokenLogprob>, Done), ApiError> {
    let mut text = String::new();
    let mut logprobs = Vec::new();
    while let Some(chunk) = answer.next().await {
        match chunk? {
            Chunk::Text(piece) => {
                text.push_str(&piece.text);
                logprobs.extend(piece.logprobs);
            }
            Chunk::Done(done) => return Ok((text, logprobs, done)),
        }
    }
    Err(ended_early().into())
}

/// An answer that is over without having said so.
pub(super) fn ended_early() -> Refused {
    let code = fabstir_plugin_api::error::Code::Internal;
    Refused { code, message: "the answer ended without its last chunk".into(), retry_after: None }
}

/// Changes when another backend answers: with the same seed the answer may then differ.
fn fingerprint(plugin: &str, model: &str) -> String {
    let mut hash = Sha256::new();
    for part in [env!("CARGO_PKG_VERSION"), plugin, model] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    format!("fp_{}", hex::encode(&hash.finalize()[..5]))
}

pub(super) fn now() -> u64 {
    // A clock before 1970 is told as 1970.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

pub(super) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("structs of texts and numbers are JSON")
}
