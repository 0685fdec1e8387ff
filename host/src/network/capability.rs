//! What a node says of itself, signed: who it is, which models it serves at which price, and how busy it is.
//!
//! Whoever asks sends 16 random bytes, and they come back in the answer, so that no answer can be kept and given again. On the wire an
//! answer is one MessagePack map, at most [`MAX_RECORD`] bytes long:
//!
//! ```text
//! record      bin      the record, itself a MessagePack map: the fields of `Record` and `Offer` by their names
//! key         bin 32   the node's Ed25519 public key
//! signature   bin 64   Ed25519 over "fabstir-capability-1\0" and the bytes of `record`
//! ```
//!
//! Prices are text, decimal digits without a leading zero: wei of a token with 18 decimals do not fit 64 bits, and many languages have
//! no larger number. Keys that a reader does not know are ignored, in all three maps. What a record says is the word of the node and no
//! more: that it is signed says who to hold to it.
//!
//! A reader first takes the message apart ([`Sealed::read`]), asks the transport whose key that is, and then lets
//! [`Sealed::open`] judge it.

use std::time::Duration;

use fabstir_plugin_api::transport::PeerId;
use serde::{Deserialize, Serialize};

use crate::identity::{self, NodeKey};

mod wire;

/// The name of the protocol with its version.
pub const PROTOCOL: &str = "/fabstir/capability/1";

/// Bytes of a whole message, at most.
pub const MAX_RECORD: usize = 4096;
/// Models in one record, at most.
pub const MAX_OFFERS: usize = 64;
/// Bytes of a model's name, at most.
pub const MAX_NAME: usize = 128;
/// Bytes of what the node's software calls itself, at most.
pub const MAX_AGENT: usize = 64;
/// How long a record may be good for.
pub const MAX_LIFETIME: Duration = Duration::from_secs(600);
/// How far the clock of the node may be ahead of the reader's.
pub const MAX_SKEW: Duration = Duration::from_secs(60);

const DOMAIN: &[u8] = b"fabstir-capability-1\0";

/// What a node says of itself in answer to one question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The node that speaks.
    pub peer: PeerId,
    /// What its software calls itself: `fabstir-node/0.1.0`. At most [`MAX_AGENT`] bytes.
    pub agent: String,
    /// When it was said, in milliseconds since 1970.
    pub issued_ms: u64,
    /// Until when it holds, in milliseconds since 1970; at most [`MAX_LIFETIME`] later.
    pub expires_ms: u64,
    /// The asker's random bytes.
    #[serde(with = "wire::bin")]
    pub nonce: [u8; 16],
    /// The models that it serves now, no two of one name. At most [`MAX_OFFERS`].
    pub models: Vec<Offer>,
}

/// A model that a node serves, and for how much.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The name to ask for, at most [`MAX_NAME`] bytes.
    pub name: String,
    /// Which model that is, where the node knows: [`Loaded::digest`](fabstir_plugin_api::inference::Loaded::digest).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Tokens that one generation may span, prompt and answer together.
    pub context: u32,
    /// Generations that run at the same time.
    pub slots: u32,
    /// Generations that could have begun at once when this was said.
    pub free: u32,
    /// The price of a million tokens read.
    #[serde(with = "wire::decimal")]
    pub price_input_wei_per_mtok: u128,
    /// The price of a million tokens generated.
    #[serde(with = "wire::decimal")]
    pub price_output_wei_per_mtok: u128,
}

/// Why a record was not made, or not believed. No message repeats a text of the record: it may come from anybody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    /// Of making one: there are more models than a message has room for.
    #[error("the record of {models} models takes {bytes} bytes, {MAX_RECORD} are allowed: offer the first {fit} of them")]
    TooManyModels { models: usize, bytes: usize, fit: usize },
    /// Longer than any record; it was not read.
    #[error("the record has {bytes} bytes, {MAX_RECORD} are allowed")]
    TooLarge { bytes: usize },
    #[error("the record cannot be read: {reason}")]
    Unreadable { reason: String },
    /// The key that came with it is not that of the peer that was asked.
    #[error("the record is signed by another node than the one that was asked")]
    AnotherKey,
    /// The record was changed, or another key made the signature.
    #[error("the signature of the record is wrong: {0}")]
    Signature(#[from] identity::VerifyError),
    /// Rightly signed, but in the name of another.
    #[error("the record is about another node than the one that signed it")]
    AnotherPeer,
    /// An answer to another question: an old one, given again.
    #[error("the record answers another question than the one that was asked")]
    AnotherQuestion,
    #[error("the record expired {by_ms} ms ago: compare the clocks of both nodes if it has just been made")]
    Expired { by_ms: u64 },
    #[error("the record comes from {by_ms} ms in the future, {} are allowed: compare the clocks of both nodes", MAX_SKEW.as_millis())]
    FromTheFuture { by_ms: u64 },
    /// It ends before it begins, or holds for longer than anybody may rely on.
    #[error("the record holds from {issued_ms} to {expires_ms}: that must be more than 0 and at most {} ms", MAX_LIFETIME.as_millis())]
    Lifetime { issued_ms: u64, expires_ms: u64 },
    #[error("the record offers {offers} models, {MAX_OFFERS} are allowed")]
    TooManyOffers { offers: usize },
    /// A text that nobody should be shown.
    #[error("{what} of the record {fault}")]
    Text { what: &'static str, fault: TextFault },
    #[error("a model's digest is not 64 lower-case hex digits")]
    Digest,
    #[error("two models have the same name")]
    SameName,
    #[error("a model has a context of 0 tokens")]
    NoContext,
    #[error("a model has {free} free slots of {slots}")]
    Slots { slots: u32, free: u32 },
}

/// What is wrong with a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TextFault {
    #[error("is empty")]
    Empty,
    #[error("has {bytes} bytes, {most} are allowed")]
    TooLong { bytes: usize, most: usize },
    /// Control and formatting characters: they let a text look like another one in a terminal.
    #[error("has characters that cannot be seen")]
    Invisible,
}

/// A message whose signature has not been checked yet: nothing of it is to be believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    record: Vec<u8>,
    key: [u8; 32],
    signature: [u8; 64],
}

impl Record {
    /// Signs the record and puts it into the form in which it is sent.
    ///
    /// # Errors
    /// `TooManyModels` when the message would be too large. Otherwise what readers would refuse is refused here: a node hears of it
    /// before others do.
    pub fn seal(&self, key: &NodeKey) -> Result<Vec<u8>, CapabilityError> {
        self.check()?;
        let bytes = self.sealed(key)?;
        if bytes.len() <= MAX_RECORD {
            return Ok(bytes);
        }
        let mut shorter = self.clone();
        while shorter.models.pop().is_some() {
            if shorter.sealed(key)?.len() <= MAX_RECORD {
                let (models, fit) = (self.models.len(), shorter.models.len());
                return Err(CapabilityError::TooManyModels { models, bytes: bytes.len(), fit });
            }
        }
        // Too large without any model: only a peer id of kilobytes does that.
        Err(CapabilityError::TooLarge { bytes: bytes.len() })
    }

    fn sealed(&self, key: &NodeKey) -> Result<Vec<u8>, CapabilityError> {
        let record = rmp_serde::to_vec_named(self).map_err(wire::unreadable)?;
        let signature = key.sign(&signed(&record));
        Ok(Sealed { record, key: key.public_key(), signature }.write())
    }

    /// What holds for every record, whoever reads it and when.
    fn check(&self) -> Result<(), CapabilityError> {
        let (issued_ms, expires_ms) = (self.issued_ms, self.expires_ms);
        if expires_ms <= issued_ms || u128::from(expires_ms - issued_ms) > MAX_LIFETIME.as_millis() {
            return Err(CapabilityError::Lifetime { issued_ms, expires_ms });
        }
        if self.models.len() > MAX_OFFERS {
            return Err(CapabilityError::TooManyOffers { offers: self.models.len() });
        }
        check_text("the software's name", &self.agent, MAX_AGENT)?;
        for (place, offer) in self.models.iter().enumerate() {
            offer.check()?;
            if self.models[..place].iter().any(|other| other.name == offer.name) {
                return Err(CapabilityError::SameName);
            }
        }
        Ok(())
    }
}

impl Offer {
    fn check(&self) -> Result<(), CapabilityError> {
        check_text("a model's name", &self.name, MAX_NAME)?;
        let is_hex = |digest: &str| digest.len() == 64 && digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if self.digest.as_deref().is_some_and(|digest| !is_hex(digest)) {
            return Err(CapabilityError::Digest);
        }
        if self.context == 0 {
            return Err(CapabilityError::NoContext);
        }
        if self.slots < self.free {
            return Err(CapabilityError::Slots { slots: self.slots, free: self.free });
        }
        Ok(())
    }
}

impl Sealed {
    /// Takes a message apart. Checks its size and its shape, and nothing else.
    ///
    /// # Errors
    /// `TooLarge` and `Unreadable`.
    pub fn read(bytes: &[u8]) -> Result<Sealed, CapabilityError> {
        if bytes.len() > MAX_RECORD {
            return Err(CapabilityError::TooLarge { bytes: bytes.len() });
        }
        wire::read(bytes)
    }

    /// The key that the message came with; [`Transport::peer_id`] says whose it is.
    ///
    /// [`Transport::peer_id`]: fabstir_plugin_api::transport::Transport::peer_id
    pub fn key(&self) -> &[u8; 32] {
        &self.key
    }

    /// The record, if it is to be believed: `peer_of_key` is whose [`key`](Self::key) that is, `peer` who was asked, `nonce` what was sent
    /// along with the question, `now_ms` the time in milliseconds since 1970.
    ///
    /// # Errors
    /// Every variant but `TooManyModels` and `TooLarge`. Who speaks is settled first, then what was signed is read, then whether it is an
    /// answer to this question and still holds, and at last whether it makes sense.
    pub fn open(&self, peer_of_key: &PeerId, peer: &PeerId, nonce: &[u8; 16], now_ms: u64) -> Result<Record, CapabilityError> {
        if peer_of_key != peer {
            return Err(CapabilityError::AnotherKey);
        }
        identity::verify(&self.key, &signed(&self.record), &self.signature)?;
        let record: Record = wire::record(&self.record)?;
        if &record.peer != peer {
            return Err(CapabilityError::AnotherPeer);
        }
        if &record.nonce != nonce {
            return Err(CapabilityError::AnotherQuestion);
        }
        if record.expires_ms <= now_ms {
            return Err(CapabilityError::Expired { by_ms: now_ms - record.expires_ms });
        }
        let ahead_ms = record.issued_ms.saturating_sub(now_ms);
        if u128::from(ahead_ms) > MAX_SKEW.as_millis() {
            return Err(CapabilityError::FromTheFuture { by_ms: ahead_ms });
        }
        record.check()?;
        Ok(record)
    }
}

/// What the signature is over: no message of another purpose begins like this.
fn signed(record: &[u8]) -> Vec<u8> {
    [DOMAIN, record].concat()
}

fn check_text(what: &'static str, text: &str, most: usize) -> Result<(), CapabilityError> {
    let fault = if text.trim().is_empty() {
        TextFault::Empty
    } else if text.len() > most {
        TextFault::TooLong { bytes: text.len(), most }
    } else if text.chars().any(is_invisible) {
        TextFault::Invisible
    } else {
        return Ok(());
    };
    Err(CapabilityError::Text { what, fault })
}

/// Control characters, and those of Unicode that are not seen but change how the others are shown: directions, joiners, separators of
/// lines, tags.
fn is_invisible(c: char) -> bool {
    let formats = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
    c.is_control() || formats
}

#[cfg(test)]
mod tests;
