//! Under which topics a node is found.
//!
//! This is part of the protocol: nodes that derive a topic in another way do not find each other.

use fabstir_plugin_api::transport::Topic;
use sha2::{Digest, Sha256};

/// The topic of the nodes that serve this very model: the SHA-256 of `fabstir/model/1/` and the model's digest, 64 lower-case hex
/// digits.
pub fn of_model(digest: &str) -> Topic {
    topic("fabstir/model/1/", digest)
}

/// The topic of the nodes that serve a model under this name, whichever model that is: the SHA-256 of `fabstir/name/1/` and the name.
pub fn of_name(name: &str) -> Topic {
    topic("fabstir/name/1/", name)
}

fn topic(kind: &str, what: &str) -> Topic {
    Topic(Sha256::new().chain_update(kind).chain_update(what).finalize().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_never_change() {
        let digest = "0123456789abcdef".repeat(4);
        assert_eq!(hex::encode(of_model(&digest).0), "5d767e9f184caf17cf5010cafd1203b81a88081be230c31f9750e9a81c880747");
        assert_eq!(hex::encode(of_name("tiny-chat").0), "ac368481f05a94e4c6b892ea8b1d952af9656a26126a4310a057f02b4b03f861");
        assert_eq!(hex::encode(of_name("").0), "e07c2d912197f1a46d9389fccb929184890cd47cbe27dee1ab9a28d636385f88");
    }

    #[test]
    fn a_name_is_no_digest() {
        let digest = "0".repeat(64);
        assert_ne!(of_model(&digest), of_name(&digest));
    }
}
