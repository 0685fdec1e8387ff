//! The messages of a session: MessagePack maps whose key `t` says what they are. Unknown messages and unknown keys are ignored.

use std::fmt;
use std::time::Duration;

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::inference::{Chunk, Generation};
use serde::{Deserialize, Serialize};

/// The version that this node speaks.
pub const VERSION: u32 = 1;

/// The largest message, in bytes: what a transport carries in one piece.
pub const MAX_MESSAGE: usize = 1 << 20;

/// The most answers' pieces that may be under way in one request.
pub const MAX_WINDOW: u32 = 256;

/// How long a node keeps a session whose connection broke.
pub const LINGER: Duration = Duration::from_secs(60);

/// Names a session to the two that are in it, and to nobody else: 16 random bytes, as 32 hexadecimal digits.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }
}

/// Whoever reads a log must not be able to take a session over.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.get(..6).unwrap_or("?"))
    }
}

/// From the one who asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", rename_all = "snake_case")]
pub enum Ask {
    /// Begins a session. The first message of a conversation, or `Resume` is.
    Hello { version: u32 },
    /// Goes on with a session whose connection broke.
    Resume { session: Token, requests: Vec<From> },
    /// Asks for an answer of which at most `window` pieces may be under way.
    Infer { id: u64, request: Box<Generation>, window: u32, timeout_ms: u64 },
    /// Every piece before `next` has been read.
    Read { id: u64, next: u64 },
    /// The answer is not wanted any more.
    Cancel { id: u64 },
    /// The session is over. Without it, the node keeps it for a while.
    Bye,
    #[serde(other)]
    Unknown,
}

/// Where a request goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct From {
    pub id: u64,
    /// The first piece that has not arrived.
    pub next: u64,
    /// Every piece before this one has been read, which the node may not have heard.
    pub read: u64,
}

/// From the node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", rename_all = "snake_case")]
pub enum Tell {
    /// The session has begun: how long it is kept when the connection breaks, and how many requests may run in it.
    Welcome { version: u32, session: Token, linger_ms: u64, requests: u32 },
    /// The session goes on. Requests that are not named here are not known any more.
    Resumed { requests: Vec<u64> },
    /// The session does not begin, or does not go on. The conversation ends.
    Refused(PluginError),
    /// Piece `seq` of an answer, counted from 0. The last one is `done`.
    Chunk { id: u64, seq: u64, chunk: Chunk },
    /// The answer ends, or never begins, for this reason. It takes the place of piece `seq`.
    Failed { id: u64, seq: u64, refusal: PluginError },
    #[serde(other)]
    Unknown,
}

/// The bytes of a message.
///
/// # Errors
/// Where they are more than a transport carries.
pub fn encode(message: &impl Serialize) -> Result<Blob, PluginError> {
    let bytes = rmp_serde::to_vec_named(message)
        .map_err(|error| PluginError::internal(format!("a message of the session cannot be written: {error}")))?;
    if bytes.len() > MAX_MESSAGE {
        let message = format!("a request over the network has at most {MAX_MESSAGE} bytes, and this one has {}", bytes.len());
        return Err(PluginError::invalid(message));
    }
    Ok(bytes.into())
}

/// # Errors
/// Where the bytes are no message.
pub fn decode<'a, M: Deserialize<'a>>(bytes: &'a [u8]) -> Result<M, PluginError> {
    rmp_serde::from_slice(bytes).map_err(|error| PluginError::new(Code::Protocol, format!("no message of a session: {error}")))
}

#[cfg(test)]
mod tests {
    use fabstir_plugin_api::inference::{Done, Finish, Text, Usage};

    use super::*;
    use crate::scheduler::tests::request;

    #[test]
    fn every_message_reads_back_as_it_was_written() {
        let refusal = PluginError::new(Code::Overloaded, "busy").retry_after(Duration::from_millis(1500));
        let asks = [
            Ask::Hello { version: 1 },
            Ask::Resume { session: Token::random(), requests: vec![From { id: 3, next: 7, read: 5 }] },
            Ask::Infer { id: 1, request: Box::new(request("the prompt")), window: 64, timeout_ms: 1000 },
            Ask::Read { id: 1, next: 32 },
            Ask::Cancel { id: 1 },
            Ask::Bye,
        ];
        for ask in asks {
            assert_eq!(decode::<Ask>(&encode(&ask).expect("fits")).expect("reads"), ask);
        }
        let text = Text { text: "wörd ".into(), tokens: 1, logprobs: Vec::new() };
        let done = Done { finish: Finish::Stop, usage: Usage::default(), timings: Default::default() };
        let tells = [
            Tell::Welcome { version: 1, session: Token::random(), linger_ms: 60_000, requests: 64 },
            Tell::Resumed { requests: vec![1, 2] },
            Tell::Refused(refusal.clone()),
            Tell::Chunk { id: 1, seq: 0, chunk: Chunk::Text(text) },
            Tell::Chunk { id: 1, seq: 1, chunk: Chunk::Done(done) },
            Tell::Failed { id: 1, seq: 2, refusal },
        ];
        for tell in tells {
            assert_eq!(decode::<Tell>(&encode(&tell).expect("fits")).expect("reads"), tell);
        }
    }

    #[test]
    fn messages_of_a_later_version_are_ignored() {
        let later = serde_json::json!({ "t": "voucher", "amount": [1, { "deep": "x" }], "sig": "ab" });
        assert_eq!(decode::<Ask>(&rmp_serde::to_vec_named(&later).expect("encodes")).expect("reads"), Ask::Unknown);
        let more = serde_json::json!({ "t": "hello", "version": 1, "agent": "another/1.0" });
        assert_eq!(decode::<Ask>(&rmp_serde::to_vec_named(&more).expect("encodes")).expect("reads"), Ask::Hello { version: 1 });
    }

    #[test]
    fn garbage_is_an_error_and_no_panic() {
        let good = encode(&Ask::Infer { id: 1, request: Box::new(request("p")), window: 4, timeout_ms: 9 }).expect("fits");
        for end in 0..good.len() {
            assert!(decode::<Ask>(&good[..end]).is_err(), "cut at {end}");
        }
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 0x55;
            let _ = decode::<Ask>(&bad);
        }
        assert!(
            encode(&Ask::Infer { id: 1, request: Box::new(request(&"p".repeat(MAX_MESSAGE))), window: 4, timeout_ms: 9 })
                .is_err()
        );
    }
}
