//! Pointers in S5's form: entries of its registry, third version.
//!
//! The holder of an Ed25519 key signs `s5-reg-v3: | key | vault id | revision | 1e | hash`, with the revision in 8 bytes, big-endian. The
//! vault id keeps what one key signs for one purpose apart from what it signs for another; ours is [`VAULT`].

use ed25519_dalek::VerifyingKey;
use fabstir_plugin_api::storage::Pointer;
use s5_core::stream::types::SIG_DOMAIN_TAG_V3;
use s5_core::{Hash, MULTIHASH_BLAKE3, MessageType, StreamKey, StreamMessage};

/// Where our pointers are among a key's entries.
pub const VAULT: [u8; 16] = *b"fabstir-pointers";

/// Revisions of pointers stay below it.
const REVISIONS: u64 = 1 << 48;

/// Why something is no pointer that S5's registry can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("a pointer's key is an Ed25519 public key as 64 lower-case hexadecimal digits")]
    Key,
    #[error("the revision {0} is not below 2^48")]
    Revision(u64),
    #[error(
        "an entry of this registry holds a hash of 32 bytes, such as a blob's id; these are {0}: store the data as a blob, and point to its id"
    )]
    Data(usize),
    #[error("the signature is not one of this key over this revision and data: sign what `pointer_payload` gives")]
    Signature,
}

/// The place of a pointer in the registry.
pub fn place(key: &str) -> Result<StreamKey, RecordError> {
    let mut pubkey = [0; 32];
    hex::decode_to_slice(key, &mut pubkey).map_err(|_| RecordError::Key)?;
    if key.bytes().any(|byte| byte.is_ascii_uppercase()) || VerifyingKey::from_bytes(&pubkey).is_err() {
        return Err(RecordError::Key);
    }
    Ok(StreamKey::Vault { pubkey, vault_id: VAULT })
}

/// The bytes that are signed.
pub fn payload(pointer: &Pointer) -> Result<Vec<u8>, RecordError> {
    let StreamKey::Vault { pubkey, vault_id } = place(&pointer.key)? else { return Err(RecordError::Key) };
    let hash = hash(pointer)?;
    let revision = pointer.revision.to_be_bytes();
    Ok([SIG_DOMAIN_TAG_V3, &pubkey, &vault_id, &revision, &[MULTIHASH_BLAKE3], &hash].concat())
}

/// The entry that a pointer is. Its signature is checked.
pub fn entry(pointer: &Pointer) -> Result<StreamMessage, RecordError> {
    let key = place(&pointer.key)?;
    let hash = Hash::from_bytes(hash(pointer)?);
    let signature = pointer.signature.clone().into_boxed_slice();
    StreamMessage::new(MessageType::Registry, key, pointer.revision, hash, signature, None).map_err(|_| RecordError::Signature)
}

/// The pointer that an entry is, if it is one under this key. Whoever has made a [`StreamMessage`] has checked its signature.
pub fn pointer(key: &str, entry: &StreamMessage) -> Option<Pointer> {
    let is_this = is_pointer(entry) && place(key) == Ok(entry.key);
    is_this.then(|| Pointer {
        key: key.to_owned(),
        revision: entry.revision,
        data: entry.hash.as_bytes().to_vec(),
        signature: entry.signature.to_vec(),
    })
}

/// Whether an entry is a pointer, under whatever key.
pub fn is_pointer(entry: &StreamMessage) -> bool {
    // The signature covers neither the type of a message nor, for our purpose, more than a hash.
    entry.type_id == MessageType::Registry
        && matches!(entry.key, StreamKey::Vault { vault_id: VAULT, .. })
        && entry.revision < REVISIONS
        && entry.data.is_none()
}

fn hash(pointer: &Pointer) -> Result<[u8; 32], RecordError> {
    if pointer.revision >= REVISIONS {
        return Err(RecordError::Revision(pointer.revision));
    }
    pointer.data[..].try_into().map_err(|_| RecordError::Data(pointer.data.len()))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use ed25519_dalek::{Signer, SigningKey};

    use super::*;

    fn signed(revision: u64, data: &[u8]) -> Pointer {
        let signing = SigningKey::from_bytes(&[7; 32]);
        let key = hex::encode(signing.verifying_key().to_bytes());
        let mut pointer = Pointer { key, revision, data: data.to_vec(), signature: Vec::new() };
        if let Ok(payload) = payload(&pointer) {
            pointer.signature = signing.sign(&payload).to_bytes().to_vec();
        }
        pointer
    }

    #[test]
    fn entry_is_the_one_that_s5_signs() {
        let pointer = signed(300, &[9; 32]);
        let entry = entry(&pointer).unwrap();
        let signing = SigningKey::from_bytes(&[7; 32]);
        assert_eq!(entry, StreamMessage::sign_ed25519_registry(&signing, VAULT, Hash::from_bytes([9; 32]), 300).unwrap());
        assert_eq!(super::pointer(&pointer.key, &entry), Some(pointer));
    }

    #[test]
    fn bounds_are_told() {
        assert_eq!(entry(&signed(REVISIONS, &[0; 32])), Err(RecordError::Revision(REVISIONS)));
        entry(&signed(REVISIONS - 1, &[0; 32])).unwrap();
        for size in [0, 31, 33, 48] {
            assert_eq!(payload(&signed(1, &vec![0; size])), Err(RecordError::Data(size)));
        }
        for key in ["", "zz", &"A".repeat(64), &"02".repeat(32)] {
            assert_eq!(payload(&Pointer { key: key.into(), ..signed(1, &[0; 32]) }), Err(RecordError::Key), "{key}");
        }
    }

    #[test]
    fn nothing_of_an_entry_can_be_changed() {
        let good = signed(5, &[1; 32]);
        let other = hex::encode(SigningKey::from_bytes(&[8; 32]).verifying_key().to_bytes());
        for changed in [
            Pointer { revision: 6, ..good.clone() },
            Pointer { data: vec![2; 32], ..good.clone() },
            Pointer { key: other, ..good.clone() },
            Pointer { signature: vec![0; 64], ..good.clone() },
            Pointer { signature: Vec::new(), ..good.clone() },
        ] {
            assert_eq!(entry(&changed), Err(RecordError::Signature), "{changed:?}");
        }
    }

    #[test]
    fn entries_of_other_kinds_are_no_pointers() {
        let good = signed(5, &[1; 32]);
        let mut changed = entry(&good).unwrap();
        // The type is not signed: a peer may write another one.
        changed.type_id = MessageType::Stream;
        assert_eq!(pointer(&good.key, &changed), None);
        let signing = SigningKey::from_bytes(&[7; 32]);
        let hash = Hash::from_bytes([1; 32]);
        let elsewhere = StreamMessage::sign_ed25519_registry(&signing, [0; 16], hash, 5).unwrap();
        assert_eq!(pointer(&good.key, &elsewhere), None);
        let more =
            StreamMessage::sign_ed25519_registry_with_data(&signing, VAULT, hash, 5, Some(Bytes::from_static(b"x"))).unwrap();
        assert_eq!(pointer(&good.key, &more), None);
    }
}
