//! Where in the distributed hash table an advertisement lies.
//!
//! libp2p shows a searcher at most 20 providers of a key and drops the others without a word, so that the 21st node with a model would
//! be invisible. A topic is therefore spread over [`SHARDS`] keys. Part of the protocol, and the same in every implementation:
//!
//! ```text
//! key   = "/fabstir/topic/1/" (17 bytes) | topic (32 bytes) | shard (1 byte, 0 to 15)
//! shard = the upper four bits of the first byte of SHA-256(the provider's peer id in its binary form)
//! ```
//!
//! A provider advertises under the one key of its own shard; a searcher asks for all of them. A node keeps an advertisement only under
//! the shard that follows from its provider, so that nobody crowds a shard at will.

use libp2p::PeerId;
use libp2p::kad::RecordKey;
use sha2::{Digest, Sha256};

use crate::error::NetworkError;

/// Keys that a topic is spread over.
pub const SHARDS: u8 = 16;

const PREFIX: &[u8] = b"/fabstir/topic/1/";
const LENGTH: usize = PREFIX.len() + 32 + 1;

/// What can be advertised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Topic([u8; 32]);

impl TryFrom<fabstir_plugin_api::transport::Topic> for Topic {
    type Error = NetworkError;

    fn try_from(topic: fabstir_plugin_api::transport::Topic) -> Result<Self, NetworkError> {
        topic.0.try_into().map(Self).map_err(|bytes: Vec<u8>| NetworkError::Topic(bytes.len()))
    }
}

impl Topic {
    /// The key under which this provider advertises the topic.
    pub fn key_of(&self, provider: &PeerId) -> RecordKey {
        self.key(shard_of(provider))
    }

    /// Every key under which somebody may advertise the topic.
    pub fn keys(&self) -> impl Iterator<Item = RecordKey> + '_ {
        (0..SHARDS).map(|shard| self.key(shard))
    }

    fn key(&self, shard: u8) -> RecordKey {
        let mut key = Vec::with_capacity(LENGTH);
        key.extend_from_slice(PREFIX);
        key.extend_from_slice(&self.0);
        key.push(shard);
        key.into()
    }
}

/// The shard that a provider belongs to, in every topic.
pub fn shard_of(provider: &PeerId) -> u8 {
    Sha256::digest(provider.to_bytes())[0] >> 4
}

/// The shard of a key, or `None` where the key is none of ours.
pub fn shard_in(key: &RecordKey) -> Option<u8> {
    let key: &[u8] = key.as_ref();
    let shard = *key.last()?;
    (key.len() == LENGTH && key.starts_with(PREFIX) && shard < SHARDS).then_some(shard)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topic(byte: u8) -> Topic {
        Topic([byte; 32])
    }

    #[test]
    fn the_key_is_prefix_topic_and_shard() {
        // An ed25519 key of 32 bytes of 7. Id and shard were computed by another program.
        let keypair = libp2p::identity::Keypair::ed25519_from_bytes([7; 32]).unwrap();
        let peer = keypair.public().to_peer_id();
        let key = topic(0xab).key_of(&peer);
        let bytes: &[u8] = key.as_ref();
        assert_eq!(&bytes[..17], b"/fabstir/topic/1/");
        assert_eq!(&bytes[17..49], [0xab; 32]);
        assert_eq!(bytes.len(), 50);
        assert_eq!(bytes[49], shard_of(&peer));
        assert_eq!(peer.to_string(), "12D3KooWRawPbxPtP1eZaJpumGnyWX2DcUyd3RQnydr3eAto4Az7");
        assert_eq!(shard_of(&peer), 15);
    }

    #[test]
    fn every_key_of_a_topic_has_its_own_shard_and_no_other_key_has_one() {
        let shards: Vec<Option<u8>> = topic(1).keys().map(|key| shard_in(&key)).collect();
        assert_eq!(shards, (0..SHARDS).map(Some).collect::<Vec<_>>());
        let good = topic(1).key(3).to_vec();
        let too_long = [&good[..], &[0]].concat();
        let past_the_last = [&good[..49], &[SHARDS]].concat();
        let foreign = [b"/foreign/topic/1/", &good[17..]].concat();
        for bad in [&[][..], &good[..49], &too_long, &past_the_last, &foreign] {
            assert_eq!(shard_in(&bad.to_vec().into()), None, "{bad:?}");
        }
    }

    #[test]
    fn providers_are_spread_evenly() {
        let mut count = [0; SHARDS as usize];
        for _ in 0..16_000 {
            count[shard_of(&PeerId::random()) as usize] += 1;
        }
        assert!(count.iter().all(|shard| (800..1200).contains(shard)), "{count:?}");
    }

    #[test]
    fn a_topic_has_32_bytes() {
        let made = |length| Topic::try_from(fabstir_plugin_api::transport::Topic(vec![0; length]));
        assert!(made(32).is_ok());
        assert!(matches!(made(31), Err(NetworkError::Topic(31))));
        assert!(matches!(made(0), Err(NetworkError::Topic(0))));
    }
}
