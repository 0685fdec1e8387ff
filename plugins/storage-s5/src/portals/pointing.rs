//! Pointers, which every portal is asked for, since each may have an old one.

use futures::future::join_all;
use tracing::warn;

use super::Portals;
use crate::error::S5Error;
use crate::pointer::{Entry, Key};
use crate::portal::Fault;

impl Portals {
    /// The newest revision that any portal has, and what went wrong with the others.
    async fn newest(&self, key: Key) -> (Option<Entry>, Vec<(usize, Fault)>) {
        let answers = join_all(self.list.iter().map(|portal| portal.entry(key))).await;
        let (mut newest, mut faults): (Option<Entry>, _) = (None, Vec::new());
        for (place, answer) in answers.into_iter().enumerate() {
            match answer {
                Ok(found) => {
                    newest = newest.into_iter().chain(found).max_by_key(Entry::revision);
                }
                Err(why) => {
                    warn!(portal = self.list[place].name(), %why, "A portal has no answer for a pointer that counts.");
                    faults.push((place, why));
                }
            }
        }
        (newest, faults)
    }

    /// The newest known revision of a pointer.
    pub async fn entry(&self, key: Key) -> Result<Entry, S5Error> {
        match self.newest(key).await {
            (Some(entry), _) => Ok(entry),
            // That there is none is known only where all have said so.
            (None, faults) if faults.is_empty() => Err(S5Error::NoPointer(key.to_hex())),
            (None, faults) => Err(self.failed("reading the pointer", &faults)),
        }
    }

    /// Moves a pointer on all portals. As many as have to keep a blob have given it back when it returns.
    pub async fn set_entry(&self, entry: &Entry) -> Result<(), S5Error> {
        let is_old = |known: &Entry| known.revision() >= entry.revision() && known != entry;
        let old = |known: &Entry| S5Error::OldRevision { revision: entry.revision(), known: known.revision() };
        if let Some(known) = self.newest(entry.key()).await.0.filter(is_old) {
            return Err(old(&known));
        }
        let moves = self.list.iter().map(|portal| async move {
            portal.set_entry(entry).await?;
            match portal.entry(entry.key()).await? {
                Some(back) if back == *entry => Ok(Ok(())),
                Some(other) if is_old(&other) => Ok(Err(other)),
                _ => Err(Fault::Wrong("it took the pointer, and still has an older one".into())),
            }
        });
        let (mut moved, mut newer, mut faults) = (0, None, Vec::new());
        for (place, answer) in join_all(moves).await.into_iter().enumerate() {
            match answer {
                Ok(Ok(())) => moved += 1,
                Ok(Err(other)) => newer = Some(other),
                Err(why) => {
                    warn!(portal = self.list[place].name(), %why, "A portal did not take a pointer.");
                    faults.push((place, why));
                }
            }
        }
        match newer {
            Some(other) => Err(old(&other)),
            None if moved >= self.copies => Ok(()),
            None => Err(self.failed("moving the pointer", &faults)),
        }
    }
}
