//! Advertisements that this node keeps for others, and its own.
//!
//! libp2p's store forgets after two days at the earliest, keeps 20 providers of a key and takes whatever comes. This one keeps only
//! what has the form of our topics, under the shard that the provider belongs to, within bounds for all keys, for each key and for each
//! provider, and shows nothing whose time is over.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use libp2p::kad::store::{Error as KadError, RecordStore, Result as KadResult};
use libp2p::kad::{ProviderRecord, Record, RecordKey};
use libp2p::{Multiaddr, PeerId};

use crate::topics::{shard_in, shard_of};

/// What a store holds at most.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub keys: usize,
    pub providers_per_key: usize,
    pub keys_per_provider: usize,
    /// Advertisements in all.
    pub records: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { keys: 16_384, providers_per_key: 64, keys_per_provider: 256, records: 65_536 }
    }
}

/// Addresses that are kept of one advertisement, and the bytes that one may have.
pub const ADDRESSES: usize = 4;
const ADDRESS_BYTES: usize = 128;

/// Why an advertisement is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the key is not one of ours")]
    Key,
    #[error("the provider belongs to another shard")]
    Shard,
    #[error("the store is full")]
    Full,
    #[error("the key has as many providers as are kept of one")]
    KeyFull,
    #[error("the provider is kept under as many keys as are allowed to one")]
    ProviderFull,
}

/// One advertisement.
#[derive(Debug, Clone)]
struct Kept {
    provider: PeerId,
    addresses: Vec<Multiaddr>,
    /// `None` for this node's own, which hold until they are withdrawn.
    expires: Option<Instant>,
}

impl Kept {
    fn holds(&self, now: Instant) -> bool {
        self.expires.is_none_or(|expires| now < expires)
    }
}

/// The store, with the clock that it goes by.
pub struct Records<C = fn() -> Instant> {
    own: PeerId,
    ttl: Duration,
    bounds: Bounds,
    clock: C,
    keys: HashMap<RecordKey, VecDeque<Kept>>,
    per_provider: HashMap<PeerId, usize>,
    count: usize,
}

impl Records {
    pub fn new(own: PeerId, ttl: Duration) -> Self {
        Self::with_clock(own, ttl, Bounds::default(), Instant::now)
    }
}

impl<C: Fn() -> Instant> Records<C> {
    pub fn with_clock(own: PeerId, ttl: Duration, bounds: Bounds, clock: C) -> Self {
        Self { own, ttl, bounds, clock, keys: HashMap::new(), per_provider: HashMap::new(), count: 0 }
    }

    /// Keeps an advertisement from now until its time is over, anew where it is kept already.
    pub fn keep(&mut self, key: &RecordKey, provider: PeerId, mut addresses: Vec<Multiaddr>) -> Result<(), Refused> {
        let shard = shard_in(key).ok_or(Refused::Key)?;
        if shard != shard_of(&provider) {
            return Err(Refused::Shard);
        }
        addresses.retain(|address| address.len() <= ADDRESS_BYTES);
        addresses.truncate(ADDRESSES);
        let expires = (provider != self.own).then(|| (self.clock)() + self.ttl);
        let kept = Kept { provider, addresses, expires };
        if let Some(known) = self.keys.get_mut(key).and_then(|all| all.iter_mut().find(|known| known.provider == provider)) {
            *known = kept;
            return Ok(());
        }
        if provider != self.own {
            self.check_room(key, &provider)?;
        }
        self.keys.entry(key.clone()).or_default().push_back(kept);
        *self.per_provider.entry(provider).or_default() += 1;
        self.count += 1;
        Ok(())
    }

    fn check_room(&mut self, key: &RecordKey, provider: &PeerId) -> Result<(), Refused> {
        let refused = self.lacks_room(key, provider);
        if refused.is_some() {
            // What is over may be all that takes the room.
            self.forget();
        }
        if refused.is_none() { Ok(()) } else { self.lacks_room(key, provider).map_or(Ok(()), Err) }
    }

    fn lacks_room(&self, key: &RecordKey, provider: &PeerId) -> Option<Refused> {
        let bounds = &self.bounds;
        let of_key = self.keys.get(key).map(VecDeque::len);
        if self.per_provider.get(provider).is_some_and(|keys| *keys >= bounds.keys_per_provider) {
            return Some(Refused::ProviderFull);
        }
        if of_key.is_some_and(|providers| providers >= bounds.providers_per_key) {
            return Some(Refused::KeyFull);
        }
        (self.count >= bounds.records || (of_key.is_none() && self.keys.len() >= bounds.keys)).then_some(Refused::Full)
    }

    /// Frees the room of everything whose time is over.
    pub fn forget(&mut self) {
        let now = (self.clock)();
        let (per_provider, count) = (&mut self.per_provider, &mut self.count);
        self.keys.retain(|_, all| {
            all.retain(|kept| {
                let holds = kept.holds(now);
                if !holds {
                    *count -= 1;
                    uncount(per_provider, &kept.provider);
                }
                holds
            });
            !all.is_empty()
        });
    }

    /// Where a provider can be dialled, as it said with its advertisement.
    pub fn addresses(&self, key: &RecordKey, provider: &PeerId) -> Vec<Multiaddr> {
        let kept = self.keys.get(key).and_then(|all| all.iter().find(|kept| kept.provider == *provider));
        kept.map(|kept| kept.addresses.clone()).unwrap_or_default()
    }

    /// Advertisements that are kept, those included whose time is over and that have not been looked at since.
    pub fn len(&self) -> usize {
        self.count
    }
}

fn uncount(per_provider: &mut HashMap<PeerId, usize>, provider: &PeerId) {
    if let Some(keys) = per_provider.get_mut(provider) {
        *keys -= 1;
        if *keys == 0 {
            per_provider.remove(provider);
        }
    }
}

/// What libp2p asks. There are no records with values here, so all that concerns those is empty.
impl<C: Fn() -> Instant> RecordStore for Records<C> {
    type RecordsIter<'a>
        = std::iter::Empty<Cow<'a, Record>>
    where
        Self: 'a;
    type ProvidedIter<'a>
        = std::vec::IntoIter<Cow<'a, ProviderRecord>>
    where
        Self: 'a;

    fn get(&self, _: &RecordKey) -> Option<Cow<'_, Record>> {
        None
    }

    fn put(&mut self, _: Record) -> KadResult<()> {
        Err(KadError::MaxRecords)
    }

    fn remove(&mut self, _: &RecordKey) {}

    fn records(&self) -> Self::RecordsIter<'_> {
        std::iter::empty()
    }

    fn add_provider(&mut self, record: ProviderRecord) -> KadResult<()> {
        self.keep(&record.key, record.provider, record.addresses).map_err(|_| KadError::MaxProvidedKeys)
    }

    /// libp2p passes on the first 20 of these. Each time others come first, so that who asks several nodes learns of all.
    fn providers(&self, key: &RecordKey) -> Vec<ProviderRecord> {
        let Some(all) = self.keys.get(key) else { return vec![] };
        let now = (self.clock)();
        let mut shown: Vec<ProviderRecord> = all
            .iter()
            .filter(|kept| kept.holds(now))
            .map(|kept| ProviderRecord {
                key: key.clone(),
                provider: kept.provider,
                // libp2p would look at the real clock.
                expires: None,
                addresses: kept.addresses.clone(),
            })
            .collect();
        if shown.len() > 1 {
            let first = u64::from_le_bytes(random()) as usize % shown.len();
            shown.rotate_left(first);
        }
        shown
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        let own = |all: &VecDeque<Kept>| all.iter().any(|kept| kept.provider == self.own);
        let provided: Vec<_> = self
            .keys
            .iter()
            .filter(|(_, all)| own(all))
            .map(|(key, _)| Cow::Owned(ProviderRecord::new(key.clone(), self.own, vec![])))
            .collect();
        provided.into_iter()
    }

    fn remove_provider(&mut self, key: &RecordKey, provider: &PeerId) {
        let Some(all) = self.keys.get_mut(key) else { return };
        let before = all.len();
        all.retain(|kept| kept.provider != *provider);
        if all.len() < before {
            self.count -= 1;
            uncount(&mut self.per_provider, provider);
        }
        if all.is_empty() {
            self.keys.remove(key);
        }
    }
}

/// Eight bytes that nobody can foresee.
fn random() -> [u8; 8] {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish().to_le_bytes()
}

#[cfg(test)]
mod tests;
