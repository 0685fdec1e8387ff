//! Pointers in S5's form: entries of its registry.
//!
//! The holder of an Ed25519 key signs `07 | revision | length | data`, with the revision in 8 bytes, little-endian. The key itself is not
//! signed. An entry travels as JSON whose bytes are base64url: `{pk, revision, data, signature}`, and `pk` begins with `ed`.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::{Signature, VerifyingKey};
use serde::{Deserialize, Serialize};

/// What the signed bytes begin with.
const RECORD: u8 = 0x07;
/// What a public key begins with.
const ED25519: u8 = 0xed;
/// Programs in JavaScript cannot count further without loss.
pub const REVISIONS: u64 = 1 << 48;
/// The most that the specification lets an entry hold. Portals take a little more.
pub const MOST_DATA: usize = 48;

/// Why something is no entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    #[error("a pointer's key is an Ed25519 public key as 64 lower-case hexadecimal digits")]
    Key,
    #[error("the revision {0} is not below 2^48, which is the most that S5 counts to")]
    Revision(u64),
    #[error("a pointer holds at most {MOST_DATA} bytes, these are {0}")]
    Data(usize),
    #[error("the signature is not one of this key over this revision and data: sign what `pointer_payload` gives")]
    Signature,
    #[error("it is not in the form of an entry")]
    Form,
}

/// A public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl Key {
    /// Reads 64 lower-case hexadecimal digits that are a point of the curve.
    pub fn parse(text: &str) -> Result<Self, EntryError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| EntryError::Key)?;
        if text.bytes().any(|byte| byte.is_ascii_uppercase()) || VerifyingKey::from_bytes(&bytes).is_err() {
            return Err(EntryError::Key);
        }
        Ok(Self(bytes))
    }

    /// As portals write it.
    pub fn to_base64(self) -> String {
        URL_SAFE_NO_PAD.encode([&[ED25519], &self.0[..]].concat())
    }

    /// Reads what portals write.
    pub fn of_base64(text: &str) -> Result<Self, EntryError> {
        match URL_SAFE_NO_PAD.decode(text).map_err(|_| EntryError::Key)?.as_slice() {
            [ED25519, key @ ..] => Ok(Self(key.try_into().map_err(|_| EntryError::Key)?)),
            _ => Err(EntryError::Key),
        }
    }

    pub fn to_hex(self) -> String {
        hex::encode(self.0)
    }
}

/// A signed entry. Holding one proves that its key has signed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    key: Key,
    revision: u64,
    data: Vec<u8>,
    signature: [u8; 64],
}

impl Entry {
    /// Checks everything, the signature last.
    pub fn new(key: Key, revision: u64, data: Vec<u8>, signature: &[u8], most_data: usize) -> Result<Self, EntryError> {
        check(revision, &data, most_data)?;
        let signature: [u8; 64] = signature.try_into().map_err(|_| EntryError::Signature)?;
        let verifying = VerifyingKey::from_bytes(&key.0).map_err(|_| EntryError::Key)?;
        let signed = verifying.verify_strict(&payload(revision, &data), &Signature::from_bytes(&signature));
        signed.map_err(|_| EntryError::Signature)?;
        Ok(Self { key, revision, data, signature })
    }

    pub fn key(&self) -> Key {
        self.key
    }

    pub fn revision(&self) -> u64 {
        self.revision
    }

    pub fn data(&self) -> &[u8] {
        &self.data
    }

    pub fn signature(&self) -> &[u8; 64] {
        &self.signature
    }

    pub fn to_wire(&self) -> Wire {
        Wire {
            pk: self.key.to_base64(),
            revision: self.revision,
            data: URL_SAFE_NO_PAD.encode(&self.data),
            signature: URL_SAFE_NO_PAD.encode(self.signature),
        }
    }
}

/// An entry as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wire {
    pub pk: String,
    pub revision: u64,
    pub data: String,
    pub signature: String,
}

impl Wire {
    /// The entry, if it is one. `most_data` is what it may hold.
    pub fn check(&self, most_data: usize) -> Result<Entry, EntryError> {
        let bytes = |text: &str| URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|_| EntryError::Form);
        Entry::new(Key::of_base64(&self.pk)?, self.revision, bytes(&self.data)?, &bytes(&self.signature)?, most_data)
    }
}

/// Refuses what cannot be an entry, whoever signs it.
pub fn check(revision: u64, data: &[u8], most_data: usize) -> Result<(), EntryError> {
    match (revision < REVISIONS, data.len() <= most_data) {
        (false, _) => Err(EntryError::Revision(revision)),
        (_, false) => Err(EntryError::Data(data.len())),
        _ => Ok(()),
    }
}

/// The bytes that are signed. `data` has at most 255.
pub fn payload(revision: u64, data: &[u8]) -> Vec<u8> {
    [&[RECORD], &revision.to_le_bytes()[..], &[data.len() as u8], data].concat()
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::{Signer, SigningKey};

    use super::*;

    fn signed(revision: u64, data: &[u8]) -> Result<Entry, EntryError> {
        let key = SigningKey::from_bytes(&[7; 32]);
        let signature = key.sign(&payload(revision, data));
        Entry::new(Key(key.verifying_key().to_bytes()), revision, data.to_vec(), &signature.to_bytes(), MOST_DATA)
    }

    #[test]
    fn entry_is_the_one_that_libs5_writes() {
        let data = [&[0x1f], &blake3::hash(b"Hello, world!").as_bytes()[..]].concat();
        let entry = signed(300, &data).unwrap();
        // As it travels between nodes: 07, the key, then what is signed without its first byte, and the signature.
        let record = [&[RECORD, ED25519], &entry.key.0[..], &payload(300, &data)[1..], &entry.signature].concat();
        assert_eq!(
            hex::encode(record),
            "07edea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c2c01000000000000211fede5c0b10f2ec4979c69b52f\
             61e42ff5b413519ce09be0f14d098dcfe5f6f98da7539715c4ab4e9ce0917467178ad7fe401c50322cffe3d26154905a642bcffd66964364\
             0e111e2cd9cd26931c525dbe656d080092ba148a3f4cc0f7ed46b100"
        );
        assert_eq!(entry.to_wire().check(MOST_DATA), Ok(entry));
    }

    #[test]
    fn bounds_are_those_of_s5() {
        assert_eq!(signed(REVISIONS - 1, &[0; MOST_DATA]).unwrap().revision(), (1 << 48) - 1);
        assert_eq!(signed(REVISIONS, b""), Err(EntryError::Revision(1 << 48)));
        assert_eq!(signed(1, &[0; MOST_DATA + 1]), Err(EntryError::Data(49)));
    }

    #[test]
    fn nothing_of_an_entry_can_be_changed() {
        let good = signed(5, b"data").unwrap().to_wire();
        let other =
            URL_SAFE_NO_PAD.encode([&[ED25519], &SigningKey::from_bytes(&[8; 32]).verifying_key().to_bytes()[..]].concat());
        let changed = [
            Wire { revision: 6, ..good.clone() },
            Wire { data: URL_SAFE_NO_PAD.encode(b"date"), ..good.clone() },
            Wire { pk: other, ..good.clone() },
            Wire { signature: URL_SAFE_NO_PAD.encode([0; 64]), ..good.clone() },
        ];
        for wire in changed {
            assert_eq!(wire.check(MOST_DATA), Err(EntryError::Signature), "{wire:?}");
        }
        assert_eq!(Wire { data: "!".into(), ..good.clone() }.check(MOST_DATA), Err(EntryError::Form));
        assert_eq!(Wire { pk: "7e0".into(), ..good }.check(MOST_DATA), Err(EntryError::Key));
    }
}
