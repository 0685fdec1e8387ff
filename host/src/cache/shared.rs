//! Answers that an operator's nodes have in common, in a storage plugin that all of them reach.
//!
//! ```text
//! pointer --> list of packs --> pack: answers, with their questions and vectors
//! (signed)    (sealed)          (sealed)
//! ```
//!
//! Every node puts its new answers into packs of its own, and the packs into the one list that the pointer names. It reads the packs of
//! others into its own store: so requests are answered from this machine's disk, and a storage that is slow, or gone, delays none.
//!
//! Two nodes may write a list at the same time, and one of them is overwritten. Nothing is lost by it: each sees at its next round that its
//! packs are not in the list, and puts them there again. What was erased on one node stays in the list for as long as it could come back,
//! and each node erases it and makes its packs anew without it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::storage::{Expect, Pointer, Range, Storage};
use fabstir_plugin_api::stream::Stream;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{info, warn};

use super::key::Key;
use super::metrics::Metrics;
use super::neighbours::Neighbours;
use super::store::{Fresh, Part, Store};
use crate::clock::now_ms;
use crate::identity::{GroupKey, NodeKey};
use crate::routes::Routes;

const LIST: &str = "fabstir-node cache list 1";
const PACK: &str = "fabstir-node cache pack 1";
const POINTER: &str = "fabstir-node cache pointer 1";

/// Answers go into packs of about so many bytes. Some of less are as many pointers; with more than so many they are made into fewer.
const PACK_BYTES: u64 = 1 << 20;
const MOST_SMALL: usize = 16;

/// Packs that one round makes, and reads: the next one goes on.
const PACKS_PER_ROUND: usize = 64;

/// No pack is larger, whatever its list says: one answer may exceed [`PACK_BYTES`].
const LARGEST: u64 = 64 << 20;

/// Packs in a list. The newest stay.
const MOST_LISTED: usize = 4096;

/// How long one call to the storage may take, and one question to the store.
const CALL: Duration = Duration::from_secs(60);
const STORE: Duration = Duration::from_secs(10);

/// How often a list is written again that another node wrote first.
const TRIES: usize = 4;

/// A pack as the list has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed {
    /// Bytes of the blob.
    pub size: u64,
    pub made_ms: u64,
    /// When nothing in it is wanted any more.
    pub until_ms: u64,
}

/// Until when what was kept for a tenant is erased; for all, where there is no name.
pub(super) type Erased = BTreeMap<Option<String>, u64>;

/// What the pointer names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct List {
    /// By content id.
    packs: BTreeMap<String, Listed>,
    erased: Vec<(Option<String>, u64)>,
}

#[derive(Serialize, Deserialize)]
struct Pack {
    answers: Vec<Fresh>,
}

/// What keeps this node's answers and those of others together.
pub(super) struct Sharing {
    /// The id of the storage plugin.
    pub plugin: String,
    pub key: GroupKey,
    pub every: Duration,
    pub ttl: Duration,
    pub routes: watch::Receiver<Arc<Routes>>,
    pub store: Store,
    pub neighbours: Arc<Neighbours>,
    pub metrics: Metrics,
}

/// Why a round was not finished. The next one begins where it stopped.
#[derive(Debug, thiserror::Error)]
enum Unfinished {
    #[error("the storage plugin `{0}` is not ready: see that it is enabled, and what the log says of its start")]
    NoPlugin(String),
    #[error("the storage failed: {0}")]
    Storage(#[from] PluginError),
    #[error("the store of kept answers does not answer")]
    Store,
    #[error("the system gives no random numbers")]
    Random,
    #[error("{0} was not sealed with this node's key: see that all nodes have the same `cache.shared.key_file`")]
    Foreign(String),
    #[error("other nodes write the list all the time")]
    Busy,
}

impl Sharing {
    /// Goes on for as long as it is polled.
    pub async fn run(self) {
        let mut well = None;
        loop {
            let done = self.round().await;
            match &done {
                Ok(()) if well == Some(false) => info!("Answers are shared again."),
                Ok(()) if well.is_none() => info!(storage = self.plugin, "Answers are shared with nodes that have the same key."),
                // Plugins start after the cache.
                Err(Unfinished::NoPlugin(_)) if well.is_none() && !self.routes.borrow().starting.is_empty() => {}
                Err(error) if well != Some(false) => warn!(%error, "Answers are not shared."),
                _ => {}
            }
            let waiting = matches!(done, Err(Unfinished::NoPlugin(_))) && well.is_none();
            if !waiting {
                well = Some(done.is_ok());
            }
            tokio::time::sleep(if waiting { self.every.min(Duration::from_secs(1)) } else { self.every }).await;
        }
    }

    async fn round(&self) -> Result<(), Unfinished> {
        let routes = self.routes.borrow().storage.clone();
        let route = routes.into_iter().find(|route| route.plugin == self.plugin);
        let place = route.ok_or_else(|| Unfinished::NoPlugin(self.plugin.clone()))?.client.clone();
        let place = &*place;
        // What was erased is out of this node's packs before anybody is asked.
        self.ask(|shelf| shelf.merge_packs(PACK_BYTES / 2, MOST_SMALL)).await?;
        self.ask(|shelf| shelf.part()).await?;
        self.pack(place).await?;
        let signer = self.key.signing(POINTER);
        for _ in 0..TRIES {
            let (revision, list) = self.list(place, &signer).await?;
            let erased = list.erased.iter().cloned().collect();
            self.ask(move |shelf| shelf.erase_too(&erased)).await?;
            let part = self.ask(|shelf| shelf.part()).await?;
            self.take_in(place, &list, &part).await?;
            let wanted = merged(&list, &part, now_ms(), self.ttl);
            if wanted == list {
                self.ask(move |shelf| shelf.listed(revision, None)).await?;
                return self.clear(place, &part).await;
            }
            match self.publish(place, &signer, revision.max(part.revision) + 1, &wanted).await {
                Ok(()) => {
                    if let Some(before) = &part.own_list {
                        // What is left of it is sealed, and small.
                        let _ = place.delete(&cx(), before.clone()).await;
                    }
                    return self.clear(place, &part).await;
                }
                // Another node's revision is in force by now.
                Err(Unfinished::Storage(error)) if error.code == Code::InvalidArgument => {}
                Err(error) => return Err(error),
            }
        }
        Err(Unfinished::Busy)
    }

    /// Puts new answers into packs.
    async fn pack(&self, place: &dyn Storage) -> Result<(), Unfinished> {
        for _ in 0..PACKS_PER_ROUND {
            let answers = self.ask(|shelf| shelf.unshared(PACK_BYTES)).await?;
            if answers.is_empty() {
                break;
            }
            let keys: Vec<Key> = answers.iter().map(|fresh| fresh.key).collect();
            let newest = answers.iter().map(|fresh| fresh.entry.stored_ms).max().unwrap_or_default();
            let made_ms = now_ms();
            let (id, size) = self.put(place, PACK, &Pack { answers }).await?;
            let listed = Listed { size, made_ms, until_ms: newest + self.ttl.as_millis() as u64 };
            self.metrics.shared.inc_by(keys.len() as u64);
            self.ask(move |shelf| shelf.packed(&id, listed, &keys)).await?;
        }
        Ok(())
    }

    /// The list that is in force, and its revision; an empty one where there is none yet.
    async fn list(&self, place: &dyn Storage, signer: &NodeKey) -> Result<(u64, List), Unfinished> {
        let pointer = match place.pointer(&cx(), hex::encode(signer.public_key())).await {
            Ok(pointer) => pointer,
            Err(error) if error.code == Code::NotFound => return Ok((0, List::default())),
            Err(error) => return Err(error.into()),
        };
        match self.get(place, LIST, hex::encode(&pointer.data)).await {
            Ok(list) => Ok((pointer.revision, list)),
            // Its node has deleted it, after it wrote another; or it is lost. Whatever is not in the new one is put there again.
            Err(Unfinished::Storage(error)) if error.code == Code::NotFound => Ok((pointer.revision, List::default())),
            Err(error) => Err(error),
        }
    }

    /// Reads the packs of others, the newest first.
    async fn take_in(&self, place: &dyn Storage, list: &List, part: &Part) -> Result<(), Unfinished> {
        let ours = |id: &String| part.own.contains_key(id) || part.read.contains(id) || part.dropped.contains(id);
        let mut packs: Vec<(&String, &Listed)> = list.packs.iter().filter(|(id, _)| !ours(id)).collect();
        packs.retain(|(_, listed)| listed.size <= LARGEST && listed.until_ms > now_ms());
        packs.sort_by_key(|(_, listed)| std::cmp::Reverse(listed.made_ms));
        for (id, listed) in packs.into_iter().take(PACKS_PER_ROUND) {
            let pack = match self.get::<Pack>(place, PACK, id.clone()).await {
                Ok(pack) => pack,
                // Its node has put the answers into another by now; or it is lost.
                Err(Unfinished::Storage(error)) if matches!(error.code, Code::NotFound | Code::Corrupt) => continue,
                Err(error) => return Err(error),
            };
            let (id, listed) = (id.clone(), *listed);
            let taken = self.ask(move |shelf| shelf.take_in(&id, listed, pack.answers)).await?;
            self.metrics.taken_in.inc_by(taken);
            self.neighbours.notice();
        }
        Ok(())
    }

    async fn publish(&self, place: &dyn Storage, signer: &NodeKey, revision: u64, list: &List) -> Result<(), Unfinished> {
        let (id, _) = self.put(place, LIST, list).await?;
        let data = hex::decode(&id).map_err(|_| PluginError::internal("the storage gave an id that is none"))?;
        let key = hex::encode(signer.public_key());
        let mut pointer = Pointer { key, revision, data, signature: Vec::new() };
        pointer.signature = signer.sign(&place.pointer_payload(&cx(), pointer.clone()).await?).to_vec();
        place.pointer_set(&cx(), pointer).await?;
        self.ask(move |shelf| shelf.listed(revision, Some(&id))).await
    }

    /// Deletes the blobs of own packs that stand in no list any more.
    async fn clear(&self, place: &dyn Storage, part: &Part) -> Result<(), Unfinished> {
        for id in part.dropped.clone() {
            place.delete(&cx(), id.clone()).await?;
            self.ask(move |shelf| shelf.forget_pack(&id)).await?;
        }
        Ok(())
    }

    /// Stores something sealed, and says under which id and how large.
    async fn put(&self, place: &dyn Storage, purpose: &str, what: &impl Serialize) -> Result<(String, u64), Unfinished> {
        let plain = rmp_serde::to_vec_named(what).map_err(|error| PluginError::internal(error.to_string()))?;
        let sealed = self.key.seal(purpose, &plain).map_err(|_| Unfinished::Random)?;
        let size = sealed.len() as u64;
        let expect = Expect { id: Some(blake3::hash(&sealed).to_hex().to_string()), size: Some(size) };
        let pieces: Vec<Blob> = sealed.chunks(PIECE).map(Blob::from).collect();
        Ok((place.put(&cx(), expect, Stream::from_items(pieces)).await?.id, size))
    }

    async fn get<T: DeserializeOwned>(&self, place: &dyn Storage, purpose: &str, id: String) -> Result<T, Unfinished> {
        let mut stream = place.get(&cx(), id.clone(), Range::default()).await?;
        let mut sealed = Vec::new();
        while let Some(piece) = stream.next().await {
            sealed.extend_from_slice(&piece?);
            if sealed.len() as u64 > LARGEST {
                return Err(PluginError::new(Code::Corrupt, "it is larger than what nodes share").into());
            }
        }
        let plain = self.key.open(purpose, &sealed).ok_or_else(|| Unfinished::Foreign(id.clone()))?;
        Ok(rmp_serde::from_slice(&plain).map_err(|error| PluginError::new(Code::Corrupt, format!("{id}: {error}")))?)
    }

    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut super::store::Shelf) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Unfinished> {
        self.store.ask(STORE, work).await.ok_or(Unfinished::Store)
    }
}

/// Pieces in which a blob travels.
const PIECE: usize = 1 << 20;

fn cx() -> Cx {
    Cx::new().with_timeout(CALL)
}

/// The list as this node would have it: without what is out of date, and with its own part as it is now.
fn merged(list: &List, part: &Part, now_ms: u64, ttl: Duration) -> List {
    let mut packs = list.packs.clone();
    packs.retain(|id, listed| listed.until_ms > now_ms && !part.dropped.contains(id));
    packs.extend(part.own.iter().map(|(id, listed)| (id.clone(), *listed)));
    if packs.len() > MOST_LISTED {
        let mut made: Vec<u64> = packs.values().map(|listed| listed.made_ms).collect();
        made.sort_unstable();
        let oldest = made[made.len() - MOST_LISTED];
        packs.retain(|_, listed| listed.made_ms >= oldest);
    }
    let mut erased: Erased = list.erased.iter().cloned().collect();
    for (tenant, at_ms) in &part.erased {
        let known = erased.entry(tenant.clone()).or_default();
        *known = (*known).max(*at_ms);
    }
    erased.retain(|_, at_ms| *at_ms + ttl.as_millis() as u64 > now_ms);
    List { packs, erased: erased.into_iter().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(made_ms: u64) -> Listed {
        Listed { size: 1, made_ms, until_ms: made_ms + 1000 }
    }

    #[test]
    fn a_list_is_what_others_have_put_there_and_this_nodes_part() {
        let mut list = List::default();
        for (id, made_ms) in [("theirs", 5000), ("old", 3000), ("mine, dropped", 5000)] {
            list.packs.insert(id.into(), listed(made_ms));
        }
        list.erased = vec![(None, 3000), (Some("a".into()), 4800), (Some("b".into()), 4900)];
        let mut part = Part::default();
        part.own.insert("mine".into(), listed(4900));
        part.dropped.push("mine, dropped".into());
        part.erased = [(Some("a".into()), 4950), (Some("b".into()), 4000)].into();
        let wanted = merged(&list, &part, 5000, Duration::from_secs(1));
        assert_eq!(wanted.packs.keys().collect::<Vec<_>>(), ["mine", "theirs"]);
        assert_eq!(wanted.erased, [(Some("a".to_owned()), 4950), (Some("b".to_owned()), 4900)]);
        part.dropped.clear();
        assert_eq!(merged(&wanted, &part, 5000, Duration::from_secs(1)), wanted, "and then it stays as it is");
    }

    #[test]
    fn a_list_is_bounded_and_the_newest_packs_stay() {
        let mut list = List::default();
        for number in 0..MOST_LISTED as u64 + 10 {
            list.packs.insert(format!("{number:08}"), Listed { size: 1, made_ms: number, until_ms: u64::MAX });
        }
        let wanted = merged(&list, &Part::default(), 1, Duration::from_secs(1));
        assert_eq!(wanted.packs.len(), MOST_LISTED);
        assert_eq!(wanted.packs.keys().next().map(String::as_str), Some("00000010"));
    }
}
