//! The messages of a session: MessagePack maps whose key `t` says what they are. Unknown messages and unknown keys are ignored.

use std::fmt;
use std::time::Duration;

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::chain::{Account, Amount, Hash32, SessionId, Signature, Terms, Voucher};
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::inference::{Chunk, Generation, Text};
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

impl Token {
    /// All of it: not for logs.
    pub fn secret(&self) -> &str {
        &self.0
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
    /// Asks for an answer of which at most `window` pieces may be under way, paid from this funded session. Without one it is free, or refused.
    Infer {
        id: u64,
        request: Box<Generation>,
        window: u32,
        timeout_ms: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        paid_by: Option<SessionId>,
    },
    /// Every piece before `next` has been read.
    Read { id: u64, next: u64 },
    /// The answer is not wanted any more.
    Cancel { id: u64 },
    /// For how much this model would be served to this account: answered with an offer, or with why there is none.
    Price { id: u64, model: String, client: Account },
    /// A session is funded under these terms, of which `offer` is the node's own signature. The voucher is the first one here: for what
    /// has been promised so far, with the root that binds it to both peers and to `before`.
    Fund { id: u64, terms: Box<Terms>, offer: Signature, before: Hash32, voucher: Box<Voucher>, signature: Signature },
    /// Pays for what has arrived; `answers` have come to their end since the voucher before, in this order.
    Pay { voucher: Box<Voucher>, signature: Signature, answers: Vec<u64> },
    /// Nothing more will be asked in this funded session: it may be settled.
    Settle { id: u64, paid_by: SessionId },
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
    /// The node's terms with its signature, and how much it delivers ahead of what is paid. `sure_above`: a deposit of at least so much
    /// has to be in a safe block.
    Offer { id: u64, terms: Box<Terms>, signature: Signature, credit: Amount, sure_above: Amount },
    /// The session can pay for requests.
    Funded { id: u64, deposit: Amount },
    /// Delivery waits until this much is paid in all: the node's count of what it has delivered.
    Due { paid_by: SessionId, amount: Amount, input_tokens: u64, output_tokens: u64 },
    /// A voucher was not taken; delivery goes on with a better one.
    Unpaid { paid_by: SessionId, why: PluginError },
    /// The funded session is on its way to being settled, for this amount.
    Settling { id: u64, amount: Amount },
    #[serde(other)]
    Unknown,
}

/// The tokens of a piece as both sides count them: one that says no text is one token at most, and none has more tokens than bytes,
/// whatever anybody says.
pub fn tokens_of(text: &Text) -> u32 {
    text.tokens.min(text.text.len().clamp(1, u32::MAX as usize) as u32)
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
    use fabstir_plugin_api::inference::{Done, Finish, Usage};

    use super::*;
    use crate::scheduler::tests::request;

    #[test]
    fn every_message_reads_back_as_it_was_written() {
        let refusal = PluginError::new(Code::Overloaded, "busy").retry_after(Duration::from_millis(1500));
        let session: SessionId = format!("0x{}", "5".repeat(64));
        let account = |digit: &str| format!("0x{}", digit.repeat(40));
        let terms = Terms {
            host: account("1"),
            client: account("2"),
            model: session.clone(),
            coin: account("0"),
            price_input_per_mtok: Amount(u128::MAX),
            price_output_per_mtok: Amount(7),
            expires_s: 10,
            settle_window_s: 20,
            valid_until_s: 5,
            nonce: session.clone(),
        };
        let voucher = Voucher {
            session: session.clone(),
            host: account("1"),
            amount: Amount(1 << 70),
            input_tokens: 4,
            output_tokens: 5,
            transcript: session.clone(),
        };
        let signature = vec![200; 65];
        let asks = [
            Ask::Price { id: 9, model: "m".into(), client: account("2") },
            Ask::Fund {
                id: 10,
                terms: Box::new(terms.clone()),
                offer: signature.clone(),
                before: session.clone(),
                voucher: Box::new(voucher.clone()),
                signature: signature.clone(),
            },
            Ask::Pay { voucher: Box::new(voucher), signature: signature.clone(), answers: vec![1, 2] },
            Ask::Settle { id: 11, paid_by: session.clone() },
            Ask::Hello { version: 1 },
            Ask::Resume { session: Token::random(), requests: vec![From { id: 3, next: 7, read: 5 }] },
            Ask::Infer { id: 1, request: Box::new(request("the prompt")), window: 64, timeout_ms: 1000, paid_by: None },
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
            Tell::Offer { id: 9, terms: Box::new(terms), signature, credit: Amount(3), sure_above: Amount(4) },
            Tell::Funded { id: 10, deposit: Amount(5) },
            Tell::Due { paid_by: session.clone(), amount: Amount(6), input_tokens: 1, output_tokens: 2 },
            Tell::Unpaid { paid_by: session, why: refusal.clone() },
            Tell::Settling { id: 11, amount: Amount(7) },
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
    fn nobody_sells_more_tokens_than_bytes() {
        let text = |text: &str, tokens| Text { text: text.into(), tokens, logprobs: Vec::new() };
        for (piece, counted) in [(text("ab", 9), 2), (text("", 9), 1), (text("", 0), 0), (text("abc", 2), 2)] {
            assert_eq!(tokens_of(&piece), counted, "{piece:?}");
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
        let good = encode(&Ask::Infer { id: 1, request: Box::new(request("p")), window: 4, timeout_ms: 9, paid_by: None })
            .expect("fits");
        for end in 0..good.len() {
            assert!(decode::<Ask>(&good[..end]).is_err(), "cut at {end}");
        }
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 0x55;
            let _ = decode::<Ask>(&bad);
        }
        assert!(
            encode(&Ask::Infer {
                id: 1,
                request: Box::new(request(&"p".repeat(MAX_MESSAGE))),
                window: 4,
                timeout_ms: 9,
                paid_by: None
            })
            .is_err()
        );
    }
}
