//! Pointers, for which every peer is asked, since each may have an old one.

use std::time::Duration;

use bytes::Bytes;
use fabstir_plugin_api::storage::Pointer;
use futures::future::join_all;
use s5_core::{StreamKey, StreamMessage};
use s5_registry::{ALPN, GetRequest, RpcProto, SetRequest};
use tokio::time::timeout;

use super::door::{Line, words};
use super::{Fault, Peer, Peers, failed};
use crate::error::NodeError;
use crate::record;
use crate::registry::Registry;

/// The most time that a peer may take of a call, however long it may take for a blob. A move asks twice, and whoever calls waits.
const LIMIT: Duration = Duration::from_secs(15);

impl Peers {
    /// The newest known revision of a pointer.
    pub async fn pointer(&self, own: &Registry, key: &str) -> Result<Pointer, NodeError> {
        match self.newest(own, key).await? {
            (Some(pointer), _) => Ok(pointer),
            // That there is none is known only where all have said so.
            (None, faults) if faults.is_empty() => Err(NodeError::NoPointer(key.to_owned())),
            (None, faults) => Err(failed("reading the pointer", None, faults)),
        }
    }

    /// Moves a pointer, here and then on the peers that let this node write. It has been read back from here when it returns.
    pub async fn set_pointer(&self, own: &Registry, pointer: &Pointer) -> Result<(), NodeError> {
        let entry = record::entry(pointer)?;
        let is_old = |known: &Pointer| known.revision >= pointer.revision && known != pointer;
        let old = |known: &Pointer| NodeError::OldRevision { revision: pointer.revision, known: known.revision };
        if let Some(known) = self.newest(own, &pointer.key).await?.0.filter(is_old) {
            return Err(old(&known));
        }
        match own.store(entry.clone()).await?.and_then(|entry| record::pointer(&pointer.key, &entry)) {
            Some(kept) if kept == *pointer => {}
            Some(known) if is_old(&known) => return Err(old(&known)),
            _ => return Err(NodeError::Refused { doing: "moving the pointer", why: "the registry did not keep it".into() }),
        }
        let (message, key) = (&entry, &*pointer.key);
        let moves = self.list.iter().map(|peer| async move { (peer, self.set_at(peer, message, key).await) });
        for (peer, answer) in join_all(moves).await {
            match answer {
                Ok(Some(known)) if is_old(&known) => return Err(old(&known)),
                Ok(Some(known)) if known == *pointer => peer.answered(),
                Ok(_) => peer.failed(&Fault::Wrong("it took a pointer, and still has an older one".into())),
                Err(why) => peer.failed(&why),
            }
        }
        Ok(())
    }

    /// The newest revision that this node or a peer has, and what went wrong with the others.
    async fn newest(&self, own: &Registry, key: &str) -> Result<(Option<Pointer>, Vec<(&Peer, Fault)>), NodeError> {
        let place = record::place(key)?;
        let answers = join_all(self.list.iter().map(|peer| async move { (peer, self.get_at(peer, &place, key).await) }));
        let (kept, answers) = tokio::join!(own.entry(&place), answers);
        let mut newest = kept?.and_then(|entry| record::pointer(key, &entry));
        let mut faults = Vec::new();
        for (peer, answer) in answers {
            match answer {
                Ok(found) => {
                    peer.answered();
                    let known = newest.as_ref().map(|pointer| pointer.revision);
                    // What is here counts where a peer has another one of the same revision.
                    newest = found.filter(|found| known.is_none_or(|known| found.revision > known)).or(newest);
                }
                Err(why) => {
                    peer.failed(&why);
                    faults.push((peer, why));
                }
            }
        }
        Ok((newest, faults))
    }

    async fn get_at(&self, peer: &Peer, place: &StreamKey, key: &str) -> Result<Option<Pointer>, Fault> {
        self.in_time(async {
            let line = self.enter::<RpcProto>(peer, ALPN).await?;
            self.read(&line, place, key).await
        })
        .await
    }

    /// All of an exchange with a peer has one limit.
    async fn in_time<T>(&self, exchange: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
        let limit = self.timeout.min(LIMIT);
        timeout(limit, exchange).await.unwrap_or_else(|_| Err(Fault::Unreachable(format!("no answer within {limit:?}"))))
    }

    async fn read(&self, line: &Line<RpcProto>, place: &StreamKey, key: &str) -> Result<Option<Pointer>, Fault> {
        let found = line.answer(self.timeout, line.client.rpc(GetRequest { key: place.storage_key() })).await?;
        let Some(bytes) = found.message else { return Ok(None) };
        // Reading it checks its signature.
        let entry = StreamMessage::deserialize(Bytes::from(bytes)).map_err(|why| Fault::Wrong(why.to_string()))?;
        match record::pointer(key, &entry) {
            Some(pointer) => Ok(Some(pointer)),
            None => Err(Fault::Wrong("it sent an entry that is no pointer of this key".into())),
        }
    }

    /// Stores an entry on a peer, and gives back what it has now: one that has a newer one says yes and does nothing.
    async fn set_at(&self, peer: &Peer, entry: &StreamMessage, key: &str) -> Result<Option<Pointer>, Fault> {
        self.in_time(async {
            let line = self.enter::<RpcProto>(peer, ALPN).await?;
            let set = SetRequest { message: entry.serialize().to_vec() };
            line.answer(self.timeout, line.client.rpc(set)).await?.map_err(|why| Fault::Refused(words(&why)))?;
            self.read(&line, &entry.key, key).await
        })
        .await
    }
}
