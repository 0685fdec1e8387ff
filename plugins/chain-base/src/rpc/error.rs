//! What can go wrong with a call, and what a JSON-RPC error says about the endpoint that gave it.

use std::time::Duration;

use ethers::providers::{JsonRpcError, ProviderError, RpcError};
use thiserror::Error;

/// Why a list of endpoints cannot be used. An endpoint is named by its place in the list, since its URL may hold a secret.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UrlError {
    #[error("no endpoint is given: at least one http:// or https:// URL is needed")]
    None,
    #[error("endpoint {place} is no URL: {why}")]
    Url { place: usize, why: String },
    /// A subscription ends with its connection, and then says nothing of what it has missed: the chain is followed by asking.
    #[error(
        "endpoint {place} has a {scheme}:// URL: only http:// and https:// are supported; most providers offer the same endpoint there"
    )]
    Scheme { place: usize, scheme: String },
    #[error("the HTTP client cannot be made: {0}")]
    Client(String),
}

/// Why a call has no result.
#[derive(Debug, Error)]
pub enum CallError {
    /// No endpoint could be reached, or each failed for a reason of its own: the text names them all.
    #[error("no endpoint answers: {why}")]
    Unreachable { why: String },
    /// Every endpoint that could have answered wants fewer requests.
    #[error("the endpoints want fewer requests: try again in {} s", retry_after.as_secs_f32().ceil())]
    RateLimited { retry_after: Duration },
    /// Every endpoint that answers is of another chain.
    #[error("the endpoints are of chain {found}, this is for chain {expected}: check their URLs")]
    WrongChain { expected: u64, found: u64 },
    /// The chain's answer is this error.
    #[error("{} ({})", .0.message, .0.code)]
    Rpc(JsonRpcError),
    /// What an endpoint sent is no answer to what it was asked.
    #[error("{endpoint} sent what is no answer: {why}")]
    Malformed {
        endpoint: String,
        why: String,
        #[source]
        source: Option<serde_json::Error>,
    },
}

impl CallError {
    /// The error of this pool inside one of ethers, if it comes from there.
    pub fn of(error: &ProviderError) -> Option<&Self> {
        match error {
            ProviderError::JsonRpcClientError(inner) => {
                let inner: &(dyn std::error::Error + 'static) = &**inner;
                inner.downcast_ref()
            }
            _ => None,
        }
    }
}

impl RpcError for CallError {
    fn as_error_response(&self) -> Option<&JsonRpcError> {
        match self {
            Self::Rpc(error) => Some(error),
            _ => None,
        }
    }

    fn as_serde_error(&self) -> Option<&serde_json::Error> {
        match self {
            Self::Malformed { source, .. } => source.as_ref(),
            _ => None,
        }
    }
}

impl From<CallError> for ProviderError {
    fn from(error: CallError) -> Self {
        Self::JsonRpcClientError(Box::new(error))
    }
}

/// What one endpoint had instead of a result.
#[derive(Debug, Error)]
pub(super) enum Fault {
    #[error("{0}")]
    Unreachable(String),
    #[error("it wants no requests for {} s", .0.as_secs_f32().ceil())]
    RateLimited(Duration),
    #[error("it is of chain {0}")]
    WrongChain(u64),
    #[error("{} ({})", .0.message, .0.code)]
    Rpc(JsonRpcError),
    #[error("{why}")]
    Malformed { why: String, source: Option<serde_json::Error> },
}

/// What a JSON-RPC error means for the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The chain's answer: any endpoint would give it.
    Answer,
    /// This endpoint cannot answer now, another one may.
    Elsewhere,
    /// The same, and it wants fewer requests.
    TooMany,
}

pub(super) fn meaning(error: &JsonRpcError) -> Meaning {
    let message = error.message.to_ascii_lowercase();
    let says = |texts: &[&str]| texts.iter().any(|text| message.contains(text));
    // Providers use the code of a limit on requests for a limit on results as well; and a revert may say anything.
    if range_too_large(error) || says(&["revert"]) {
        return Meaning::Answer;
    }
    let limits = ["rate limit", "too many requests", "limit exceeded", "capacity exceeded", "compute units", "request count"];
    if matches!(error.code, 429 | -32005 | -32029) || says(&limits) && !says(&["gas"]) {
        return Meaning::TooMany;
    }
    let now =
        ["header not found", "unknown block", "block not found", "missing trie node", "server busy", "overloaded", "temporarily"];
    let gone = ["service unavailable", "backend", "upstream", "timed out", "timeout", "no healthy"];
    if error.code == -32002 || says(&now) || says(&gone) || message == "internal error" {
        return Meaning::Elsewhere;
    }
    Meaning::Answer
}

/// Whether an error says that a range of blocks has too many blocks, or too many logs, for one answer.
pub fn range_too_large(error: &JsonRpcError) -> bool {
    let message = error.message.to_ascii_lowercase();
    let says = |texts: &[&str]| texts.iter().any(|text| message.contains(text));
    says(&[
        "block range",
        "range too large",
        "range is too large",
        "range limit",
        "range exceeds",
        "exceeds the range",
        "eth_getlogs is limited to",
        "query returned more than",
        "response size",
        "response is too big",
        "too many results",
        "too many logs",
        "too many blocks",
        "max results",
        "log limit",
        "logs matched by query exceeds",
        "query timeout",
    ])
}

/// Whether a refusal to broadcast says that the endpoint has the transaction already.
pub(super) fn known_already(error: &JsonRpcError) -> bool {
    let message = error.message.to_ascii_lowercase();
    ["already known", "known transaction", "already imported", "already exists"].iter().any(|text| message.contains(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: i64, message: &str) -> JsonRpcError {
        JsonRpcError { code, message: message.into(), data: None }
    }

    #[test]
    fn what_the_chain_answers_is_told_from_what_an_endpoint_lacks() {
        for (code, message, means) in [
            (3, "execution reverted: limit exceeded", Meaning::Answer),
            (-32000, "nonce too low", Meaning::Answer),
            (-32000, "insufficient funds for gas * price + value", Meaning::Answer),
            (-32000, "exceeds block gas limit", Meaning::Answer),
            (-32000, "replacement transaction underpriced", Meaning::Answer),
            (-32601, "the method eth_foo does not exist", Meaning::Answer),
            (-32005, "query returned more than 10000 results. Try with this block range [0x1, 0x2].", Meaning::Answer),
            (-32602, "eth_getLogs is limited to a 5 block range", Meaning::Answer),
            (-32000, "header not found", Meaning::Elsewhere),
            (-32603, "Internal error", Meaning::Elsewhere),
            (-32000, "Server busy, try again", Meaning::Elsewhere),
            (-32005, "daily request count exceeded", Meaning::TooMany),
            (-32005, "limit exceeded", Meaning::TooMany),
            (-32016, "over rate limit", Meaning::TooMany),
        ] {
            assert_eq!(meaning(&error(code, message)), means, "{message}");
        }
    }

    #[test]
    fn ranges_that_are_refused_are_known_in_the_words_of_several_providers() {
        for message in [
            "query returned more than 10000 results",
            "Log response size exceeded. You can make eth_getLogs requests with up to a 2K block range",
            "eth_getLogs is limited to a 10,000 range",
            "block range is too wide",
            "exceed maximum block range: 5000",
            "query exceeds max results 20000, retry with the range 1-2",
        ] {
            assert!(range_too_large(&error(-32000, message)), "{message}");
        }
        assert!(!range_too_large(&error(-32000, "nonce too low")));
    }
}
