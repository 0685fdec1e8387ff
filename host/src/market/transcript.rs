//! What both sides of a paid session agree was said: a hash that each voucher carries.
//!
//! ```text
//! root of a first voucher   SHA-256("fabstir-session-1\0" || before || session || len(node) || node || len(client) || client)
//! answer                    SHA-256(len(infer) || infer || len(piece 0) || piece 0 || ... || len(last) || last)
//! root of a later voucher   SHA-256(root before || answer), once for each answer
//! ```
//!
//! `infer` and the pieces are the bytes of their messages, lengths are 4 bytes, big endian, `node` and `client` are peer ids.
//! `before` is the root that the session had when it was last spoken to, or 32 zeros. The answers are those that have come to their end since
//! the voucher before, in the order in which the client names them; how they are spread over vouchers makes no difference.

use fabstir_plugin_api::chain::{Hash32, SessionId};
use fabstir_plugin_api::transport::PeerId;
use sha2::{Digest, Sha256};

const DOMAIN: &[u8] = b"fabstir-session-1\0";

/// The hash of nothing said yet.
pub fn nothing() -> Hash32 {
    format!("0x{}", "0".repeat(64))
}

/// The root of a first voucher: it binds the session to the two peers that speak in it, so that no third one can speak for them.
pub fn begin(before: &Hash32, session: &SessionId, node: &PeerId, client: &PeerId) -> Hash32 {
    let mut hash = Sha256::new();
    hash.update(DOMAIN);
    hash.update(bytes(before));
    hash.update(bytes(session));
    for peer in [node, client] {
        update(&mut hash, peer.0.as_bytes());
    }
    hex(hash)
}

/// The root after these answers.
pub fn after(root: &Hash32, answers: &[[u8; 32]]) -> Hash32 {
    answers.iter().fold(root.clone(), |root, answer| {
        let mut hash = Sha256::new();
        hash.update(bytes(&root));
        hash.update(answer);
        hex(hash)
    })
}

/// The hash of one answer, as its pieces come.
#[derive(Debug, Clone)]
pub struct AnswerHash(Sha256);

impl AnswerHash {
    /// Begins with the message that asked for it.
    pub fn new(infer: &[u8]) -> Self {
        let mut hash = Self(Sha256::new());
        hash.piece(infer);
        hash
    }

    pub fn piece(&mut self, message: &[u8]) {
        update(&mut self.0, message);
    }

    pub fn end(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

fn update(hash: &mut Sha256, bytes: &[u8]) {
    // A message is at most a MiB long.
    hash.update((bytes.len() as u32).to_be_bytes());
    hash.update(bytes);
}

/// The bytes of a hash. Whatever is none stands for itself: it can only lead to another root than the right one.
fn bytes(hash: &Hash32) -> Vec<u8> {
    hex::decode(hash.trim_start_matches("0x")).unwrap_or_else(|_| hash.as_bytes().to_vec())
}

fn hex(hash: Sha256) -> Hash32 {
    format!("0x{}", hex::encode(hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_depends_on_all_that_was_said_and_on_who_said_it() {
        let peer = |name: &str| PeerId(name.into());
        let (one, two) = (format!("0x{}", "1".repeat(64)), format!("0x{}", "2".repeat(64)));
        let root = begin(&nothing(), &one, &peer("node"), &peer("client"));
        assert_eq!(root.len(), 66);
        for other in [
            begin(&nothing(), &two, &peer("node"), &peer("client")),
            begin(&two, &one, &peer("node"), &peer("client")),
            begin(&nothing(), &one, &peer("client"), &peer("node")),
            begin(&nothing(), &one, &peer("nodec"), &peer("lient")),
        ] {
            assert_ne!(root, other);
        }
        let answer = |pieces: &[&str]| {
            let mut hash = AnswerHash::new(b"infer");
            pieces.iter().for_each(|piece| hash.piece(piece.as_bytes()));
            hash.end()
        };
        let (first, second) = (answer(&["a", "b"]), answer(&["ab"]));
        assert_ne!(first, second);
        assert_eq!(after(&root, &[]), root);
        assert_ne!(after(&root, &[first, second]), after(&root, &[second, first]));
        assert_eq!(after(&root, &[first, second]), after(&after(&root, &[first]), &[second]));
    }
}
