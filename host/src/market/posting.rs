//! What a posted job asks for and what comes of it, as the documents that both sides hash.
//!
//! The input is a JSON document with the names of OpenAI's chat completions, carried by the job itself as a `data:` URL (RFC 2397); its
//! commitment is the BLAKE3 hash of the document's bytes. The output is a JSON document too, kept by the node under its BLAKE3 hash, which
//! is the commitment as well. `fabstir://PEER/HASH` says which node has it.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fabstir_plugin_api::chain::Hash32;
use fabstir_plugin_api::inference::{Finish, Generation, Input, Message, Sampling, Usage};
use fabstir_plugin_api::transport::PeerId;
use serde::{Deserialize, Serialize};

/// How an input is carried.
const INLINE: &str = "data:application/json;base64,";
const SCHEME: &str = "fabstir://";

/// The largest input, in bytes: it stands in the chain's log, and whoever posts it pays for each byte.
pub const MAX_INPUT: usize = 16 << 10;
/// What inference plugins take, by the contract of their kind.
const MOST_TEMPERATURE: f32 = 5.0;
const MOST_STOPS: usize = 16;
/// The largest output, in bytes.
pub const MAX_OUTPUT: usize = 1 << 20;

/// Why an input or an output is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PostingError {
    #[error("the input is carried in another way than `{INLINE}`")]
    Carrier,
    #[error("the {what} has {bytes} bytes, {most} are allowed")]
    TooLarge { what: &'static str, bytes: usize, most: usize },
    #[error("the {what} is not what its commitment says")]
    Commitment { what: &'static str },
    #[error("the {what} cannot be read: {reason}")]
    Unreadable { what: &'static str, reason: String },
    #[error("the input has no message")]
    Empty,
    #[error("`{name}` of the input is {value}: {allowed}")]
    Setting { name: &'static str, value: String, allowed: &'static str },
    #[error("this names no result: `fabstir://`, the node's name, `/` and 64 hexadecimal digits were expected")]
    Reference,
}

/// What a job asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobInput {
    pub messages: Vec<Message>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
}

impl JobInput {
    /// Its commitment, and how the job carries it.
    pub fn carried(&self) -> Result<(Hash32, String), PostingError> {
        self.check()?;
        let bytes = json("input", self, MAX_INPUT)?;
        Ok((commitment(&bytes), format!("{INLINE}{}", STANDARD.encode(&bytes))))
    }

    /// Reads what a job carries, if it is what its commitment says.
    pub fn read(input_ref: &str, commitment: &Hash32) -> Result<JobInput, PostingError> {
        let text = input_ref.strip_prefix(INLINE).ok_or(PostingError::Carrier)?;
        let too_large = |bytes| PostingError::TooLarge { what: "input", bytes, most: MAX_INPUT };
        if text.len() > MAX_INPUT.div_ceil(3) * 4 {
            return Err(too_large(text.len() / 4 * 3));
        }
        let bytes = STANDARD.decode(text).map_err(|error| unreadable("input", error))?;
        if bytes.len() > MAX_INPUT {
            return Err(too_large(bytes.len()));
        }
        check("input", &bytes, commitment)?;
        let input: JobInput = serde_json::from_slice(&bytes).map_err(|error| unreadable("input", error))?;
        input.check()?;
        Ok(input)
    }

    /// Refuses what no inference plugin takes, by the ranges of their contract: what is found out only after the claim costs the node a part
    /// of its bond.
    fn check(&self) -> Result<(), PostingError> {
        if self.messages.is_empty() {
            return Err(PostingError::Empty);
        }
        let within = |name, value: Option<f32>, most, allowed| match value {
            Some(value) if !(0.0..=most).contains(&value) => {
                Err(PostingError::Setting { name, value: value.to_string(), allowed })
            }
            _ => Ok(()),
        };
        within("temperature", self.temperature, MOST_TEMPERATURE, "0 to 5 is allowed")?;
        within("top_p", self.top_p, 1.0, "0 to 1 is allowed")?;
        if self.stop.len() > MOST_STOPS || self.stop.iter().any(String::is_empty) {
            let value = format!("{:?}", self.stop);
            return Err(PostingError::Setting { name: "stop", value, allowed: "up to 16 texts are allowed, none of them empty" });
        }
        Ok(())
    }

    /// The request to the model that is called so here. `most` tokens are paid for.
    pub fn generation(&self, model: &str, most: u64) -> Generation {
        let usual = Sampling::default();
        Generation {
            model: model.to_owned(),
            input: Input::Messages(self.messages.clone()),
            sampling: Sampling {
                temperature: self.temperature.unwrap_or(usual.temperature),
                top_p: self.top_p.unwrap_or(usual.top_p),
                seed: self.seed,
                ..usual
            },
            max_tokens: Some(u32::try_from(most).unwrap_or(u32::MAX)),
            stop: self.stop.clone(),
            format: Default::default(),
            logprobs: None,
            cache_salt: String::new(),
            priority: 0,
        }
    }
}

/// What came of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobOutput {
    /// The answer.
    pub text: String,
    pub finish: Finish,
    pub usage: Usage,
}

impl JobOutput {
    /// The document's bytes and their commitment.
    pub fn document(&self) -> Result<(Vec<u8>, Hash32), PostingError> {
        let bytes = json("output", self, MAX_OUTPUT)?;
        let commitment = commitment(&bytes);
        Ok((bytes, commitment))
    }

    /// Reads a document, if it is what the commitment says.
    pub fn read(bytes: &[u8], commitment: &Hash32) -> Result<JobOutput, PostingError> {
        check("output", bytes, commitment)?;
        serde_json::from_slice(bytes).map_err(|error| unreadable("output", error))
    }
}

/// Where the output of a job is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultRef {
    pub peer: PeerId,
    /// Its content id: BLAKE3, 64 hexadecimal digits.
    pub id: String,
}

impl fmt::Display for ResultRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.peer, self.id)
    }
}

impl FromStr for ResultRef {
    type Err = PostingError;

    fn from_str(text: &str) -> Result<Self, PostingError> {
        let parts = text.strip_prefix(SCHEME).and_then(|rest| rest.split_once('/'));
        let is_peer = |peer: &str| !peer.is_empty() && peer.len() <= 128 && peer.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let is_id = |id: &str| id.len() == 64 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match parts {
            Some((peer, id)) if is_peer(peer) && is_id(id) => Ok(ResultRef { peer: PeerId(peer.into()), id: id.into() }),
            _ => Err(PostingError::Reference),
        }
    }
}

fn commitment(bytes: &[u8]) -> Hash32 {
    format!("0x{}", blake3::hash(bytes).to_hex())
}

fn check(what: &'static str, bytes: &[u8], expected: &Hash32) -> Result<(), PostingError> {
    match commitment(bytes) == *expected {
        true => Ok(()),
        false => Err(PostingError::Commitment { what }),
    }
}

fn json(what: &'static str, value: &impl Serialize, most: usize) -> Result<Vec<u8>, PostingError> {
    let bytes = serde_json::to_vec(value).map_err(|error| unreadable(what, error))?;
    match bytes.len() > most {
        true => Err(PostingError::TooLarge { what, bytes: bytes.len(), most }),
        false => Ok(bytes),
    }
}

fn unreadable(what: &'static str, error: impl fmt::Display) -> PostingError {
    PostingError::Unreadable { what, reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(content: &str) -> JobInput {
        let message = Message { role: "user".into(), content: content.into(), name: None };
        JobInput { messages: vec![message], temperature: Some(0.0), top_p: None, seed: Some(7), stop: vec![] }
    }

    #[test]
    fn an_input_reads_back_only_as_what_was_committed_to() {
        let (commitment, carried) = input("Wörter").carried().expect("fits");
        assert_eq!(JobInput::read(&carried, &commitment), Ok(input("Wörter")));
        let (other, other_carried) = input("Worte").carried().expect("fits");
        assert_eq!(JobInput::read(&carried, &other), Err(PostingError::Commitment { what: "input" }));
        assert_eq!(JobInput::read(&other_carried, &commitment), Err(PostingError::Commitment { what: "input" }));
        assert_eq!(JobInput::read("ipfs://x", &commitment), Err(PostingError::Carrier));
        assert!(matches!(JobInput::read(&format!("{INLINE}***"), &commitment), Err(PostingError::Unreadable { .. })));
        assert!(matches!(input(&"x".repeat(MAX_INPUT)).carried(), Err(PostingError::TooLarge { .. })));
        let unknown = br#"{"messages":[{"role":"user","content":"x"}],"tools":[]}"#;
        let carried = format!("{INLINE}{}", STANDARD.encode(unknown));
        let refused = JobInput::read(&carried, &super::commitment(unknown)).expect_err("asks for what is not honoured");
        assert!(refused.to_string().contains("tools"), "{refused}");
    }

    #[test]
    fn what_no_model_takes_is_neither_carried_nor_read() {
        let changes: [fn(&mut JobInput); 5] = [
            |input| input.temperature = Some(5.5),
            |input| input.top_p = Some(1.5),
            |input| input.stop = vec![String::new()],
            |input| input.stop = vec!["x".into(); 17],
            |input| input.messages.clear(),
        ];
        for change in changes {
            let mut wrong = input("x");
            change(&mut wrong);
            assert!(wrong.carried().is_err(), "{wrong:?}");
            let bytes = serde_json::to_vec(&wrong).expect("can be written");
            let carried = format!("{INLINE}{}", STANDARD.encode(&bytes));
            assert!(JobInput::read(&carried, &super::commitment(&bytes)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_reference_is_a_node_and_a_hash() {
        let text = format!("fabstir://12D3KooWabc/{}", "0a".repeat(32));
        assert_eq!(text.parse::<ResultRef>().expect("is one").to_string(), text);
        for wrong in ["", "fabstir://", "s5://x", &text[..text.len() - 1], "fabstir:///0a", &text.replace("0a0a", "0A0A")] {
            assert_eq!(wrong.parse::<ResultRef>(), Err(PostingError::Reference), "{wrong}");
        }
    }

    #[test]
    fn an_output_is_checked_against_its_commitment() {
        let output = JobOutput { text: "Paris.".into(), finish: Finish::Stop, usage: Usage::default() };
        let (bytes, commitment) = output.document().expect("fits");
        assert_eq!(JobOutput::read(&bytes, &commitment), Ok(output));
        let mut changed = bytes.clone();
        changed[10] ^= 1;
        assert_eq!(JobOutput::read(&changed, &commitment), Err(PostingError::Commitment { what: "output" }));
    }
}
