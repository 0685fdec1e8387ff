//! A key that an operator's nodes have in common: by it they share what nobody else is to read.

use std::path::Path;

use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

use super::node_key::{IdentityError, NodeKey};

/// Bytes of a nonce, in front of what is sealed.
const NONCE: usize = 24;

/// 32 secret bytes in a file that the operator copies to each node. Everything that it is used for has a key of its own, derived from them.
pub struct GroupKey(NodeKey);

impl GroupKey {
    /// The key in a file, which is made, with 64 hexadecimal digits and for its owner alone, where there is none. Blocks on the disk.
    pub fn load_or_create(path: &Path) -> Result<GroupKey, IdentityError> {
        NodeKey::load_or_create_at(path).map(GroupKey)
    }

    /// A key to sign for one purpose with.
    pub fn signing(&self, purpose: &str) -> NodeKey {
        NodeKey::from_seed(&self.derive(purpose))
    }

    /// The bytes as only holders of this key can read them, and only for the same purpose.
    ///
    /// # Errors
    /// `Random`, and no other.
    pub fn seal(&self, purpose: &str, plain: &[u8]) -> Result<Vec<u8>, IdentityError> {
        let mut sealed = vec![0; NONCE];
        // So long that two nodes never draw the same.
        getrandom::fill(&mut sealed).map_err(IdentityError::Random)?;
        let nonce = *XNonce::from_slice(&sealed);
        let payload = Payload { msg: plain, aad: purpose.as_bytes() };
        sealed.extend(self.cipher(purpose).encrypt(&nonce, payload).expect("what is in memory is shorter than 256 GiB"));
        Ok(sealed)
    }

    /// What was sealed with this key for this purpose; `None` for everything else.
    pub fn open(&self, purpose: &str, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, sealed) = sealed.split_at_checked(NONCE)?;
        let payload = Payload { msg: sealed, aad: purpose.as_bytes() };
        self.cipher(purpose).decrypt(XNonce::from_slice(nonce), payload).ok()
    }

    fn cipher(&self, purpose: &str) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new((&*self.derive(purpose)).into())
    }

    fn derive(&self, purpose: &str) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(blake3::derive_key(purpose, &*self.0.secret()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_the_file_reads_what_is_sealed_for_the_same_purpose() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("group.key");
        let (one, other) = (GroupKey::load_or_create(&path).unwrap(), GroupKey::load_or_create(&path).unwrap());
        let sealed = one.seal("a", b"text").unwrap();
        assert_eq!(other.open("a", &sealed).as_deref(), Some(&b"text"[..]));
        assert_ne!(sealed, one.seal("a", b"text").unwrap());
        assert_eq!(other.open("b", &sealed), None);
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(other.open("a", &changed), None, "{at}");
            assert_eq!(other.open("a", &sealed[..at]), None, "{at}");
        }
        assert_eq!(one.signing("s").public_key(), other.signing("s").public_key());
        assert_ne!(one.signing("s").public_key(), one.signing("t").public_key());
        let stranger = GroupKey::load_or_create(&folder.path().join("other.key")).unwrap();
        assert_eq!(stranger.open("a", &sealed), None);
    }
}
