//! Reading blobs. No byte leaves here that was not checked.
//!
//! Where the blob's tree is known, its groups come one by one from whichever portal has them right. Where it is not, the whole blob is
//! fetched to the disk and hashed before its first byte is given away; its tree is known from then on.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use blob_folder::{blocking, finished};
use bytes::Bytes;
use futures::TryStreamExt;
use tokio::time::Instant;
use tracing::debug;

use super::{Portals, ROUNDS};
use crate::cid::{Cid, Id};
use crate::error::S5Error;
use crate::portal::{Fault, Part};
use crate::spool::Spooled;
use crate::tree::{GROUP, Tree};

/// How often `timeout_ms` fits into the time that a portal has for a blob of unknown size in the first round; in each further round it is so many
/// times more.
const PATIENCE: u32 = 8;

/// Bytes per second with which the last one that is asked may go on for as long as there is room.
const LEAST_RATE: u64 = 1 << 20;

/// A read that has begun.
pub struct Reading {
    source: Source,
    /// What is still to come.
    left: Range<u64>,
}

enum Source {
    Portals(Box<Groups>),
    Spool(Spooled),
}

impl Portals {
    /// Begins to read a part of a blob.
    pub async fn read(self: &Arc<Self>, id: Id, offset: u64, length: Option<u64>) -> Result<Reading, S5Error> {
        let ledger = self.ledger.clone();
        let (source, size) = match blocking(move || ledger.known(id)).await? {
            Some(known) => {
                let size = known.tree.size();
                // Those that are known to have it first.
                let mut order: Vec<usize> = (0..self.list.len()).collect();
                order.sort_by_key(|&place| !known.portals.iter().any(|name| name == self.list[place].name()));
                (Source::Portals(Box::new(Groups::new(self.clone(), known.tree, order))), size)
            }
            None => {
                let blob = self.fetch(id).await?;
                let size = blob.tree.size();
                (Source::Spool(blob), size)
            }
        };
        if offset > size {
            return Err(S5Error::PastTheEnd { offset, size });
        }
        let end = offset + (size - offset).min(length.unwrap_or(u64::MAX));
        Ok(Reading { source, left: offset..end })
    }

    /// Fetches a whole blob of which nothing is known but its id.
    async fn fetch(&self, id: Id) -> Result<Spooled, S5Error> {
        let cid = Cid { id, size: None };
        let mut order: Vec<usize> = (0..self.list.len()).collect();
        let (mut faults, mut own) = (Vec::new(), None);
        for round in 0..ROUNDS {
            let asked = std::mem::take(&mut order);
            let portals = asked.len();
            for place in asked {
                let fault = match self.fetch_from(place, &cid, self.patience(round, portals)).await {
                    Ok(Ok(blob)) => {
                        if !blob.tree.nodes().is_empty() {
                            let (ledger, tree) = (self.ledger.clone(), blob.tree.clone());
                            blocking(move || ledger.learn(tree)).await?;
                        }
                        return Ok(blob);
                    }
                    Ok(Err(fault)) => fault,
                    // There may be no room because a portal sends without end what is not the blob.
                    Err(full @ (S5Error::SpoolFull { .. } | S5Error::DiskFull { .. })) => {
                        own = Some(full);
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                self.told(place, "sending a blob", id, &fault);
                if may_pass(&fault) {
                    order.push(place);
                }
                faults.push((place, fault));
            }
            if order.is_empty() || !self.wait(round, &faults).await {
                break;
            }
            faults.retain(|(place, _)| !order.contains(place));
        }
        match own {
            Some(full) => Err(full),
            None => Err(self.unread(id, &faults)),
        }
    }

    /// How long a portal may take to send a blob of which nobody knows how large it is. It gets little time while there are others to ask, and
    /// more in each round: one that never comes to an end costs minutes then, and one that is only slow is not given up for good.
    fn patience(&self, round: u32, portals: usize) -> Patience {
        let round = if portals == 1 { ROUNDS - 1 } else { round };
        Patience { began: Instant::now(), limit: self.timeout * PATIENCE.pow(round + 1), is_last: round + 1 == ROUNDS }
    }

    async fn fetch_from(&self, place: usize, cid: &Cid, patience: Patience) -> Result<Result<Spooled, Fault>, S5Error> {
        let mut part = match self.list[place].read(cid, 0, None).await {
            Ok(part) => part,
            Err(fault) => return Ok(Err(fault)),
        };
        // What it says of the size is good enough to see that there is no room for it.
        let (sender, task) = self.spool.receive::<Vec<u8>>(part.size);
        let mut came = 0;
        loop {
            let piece = match part.up_to(GROUP).await {
                Ok(piece) => piece,
                Err(fault) => return Ok(Err(fault)),
            };
            came += piece.len() as u64;
            let is_last = (piece.len() as u64) < GROUP;
            if !is_last && patience.is_over(came) {
                let late = format!("it has not come to the blob's end within {} s", patience.limit.as_secs_f32());
                return Ok(Err(Fault::Unreachable(late)));
            }
            // A spool that takes no more says why below.
            if sender.send(piece).await.is_err() || is_last {
                break;
            }
        }
        drop(sender);
        let blob = match finished(task).await {
            // That it sends another number of bytes than it said is its fault, and not that of whoever asks.
            Err(S5Error::TooFew { .. }) => return Ok(Err(wrong_bytes(true))),
            Err(S5Error::TooMany { .. }) => return Ok(Err(wrong_bytes(false))),
            blob => blob?,
        };
        Ok(match blob.tree.id() == cid.id {
            true => Ok(blob),
            false => Err(wrong_bytes(part.size.is_some_and(|size| size != blob.tree.size()))),
        })
    }

    /// One error for a blob that nobody sends as it should be.
    fn unread(&self, id: Id, faults: &[(usize, Fault)]) -> S5Error {
        let any = |is: fn(&Fault) -> bool| faults.iter().any(|(_, fault)| is(fault));
        match self.failed("reading the blob", faults) {
            _ if faults.iter().all(|(_, fault)| *fault == Fault::Missing) => S5Error::NotFound(id),
            S5Error::Refused { why, .. } if any(|fault| matches!(fault, Fault::Wrong(_))) => S5Error::Corrupt { id, why },
            error => error,
        }
    }
}

/// How long a portal may go on sending.
struct Patience {
    began: Instant,
    limit: Duration,
    /// Whether nobody is asked after it.
    is_last: bool,
}

impl Patience {
    /// Whether it has had its time, by what has come so far. Where nobody is asked after it, only one that is slow has.
    fn is_over(&self, came: u64) -> bool {
        let took = self.began.elapsed();
        took > self.limit && !(self.is_last && came / LEAST_RATE >= took.as_secs())
    }
}

fn wrong_bytes(is_short: bool) -> Fault {
    Fault::Wrong(if is_short { "it ended the blob too early" } else { "its bytes are not those of the blob" }.into())
}

/// Whether a portal with this fault may be asked again within the same read.
fn may_pass(fault: &Fault) -> bool {
    matches!(fault, Fault::Unreachable(_) | Fault::Busy(_))
}

impl Reading {
    /// The next bytes, at most 1 MiB of them; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, S5Error> {
        let Range { start, end } = self.left;
        if start == end {
            return Ok(None);
        }
        let piece = match &mut self.source {
            Source::Portals(groups) => {
                let (group, begins) = (start / GROUP, start / GROUP * GROUP);
                let read = groups.next(group, end).await;
                let mut bytes = read.map_err(|faults| groups.portals.unread(groups.cid.id, &faults))?;
                bytes.truncate((end - begins).min(GROUP) as usize);
                bytes.drain(..(start - begins) as usize);
                bytes
            }
            Source::Spool(blob) => {
                let to = end.min(start + GROUP);
                let pieces: Vec<Bytes> =
                    blob.read(start, to).try_collect().await.map_err(S5Error::io("read in", "the spool".as_ref()))?;
                pieces.concat()
            }
        };
        self.left.start += piece.len() as u64;
        Ok(Some(piece))
    }
}

/// The groups of a blob whose tree is known.
pub(super) struct Groups {
    portals: Arc<Portals>,
    cid: Cid,
    tree: Tree,
    /// The portals that may still be asked, the one that does it at present first.
    order: Vec<usize>,
    /// Those that may not, and why.
    out: Vec<(usize, Fault)>,
    /// What comes in, of which portal, and the group that is next.
    part: Option<(usize, u64, Part)>,
}

impl Groups {
    pub fn new(portals: Arc<Portals>, tree: Tree, order: Vec<usize>) -> Self {
        let cid = Cid { id: tree.id(), size: Some(tree.size()) };
        Self { portals, cid, tree, order, out: Vec::new(), part: None }
    }

    /// The bytes of a group, or what each portal did wrong. Groups up to the byte `end` will be wanted after it.
    pub async fn next(&mut self, group: u64, end: u64) -> Result<Vec<u8>, Vec<(usize, Fault)>> {
        let mut faults = Vec::new();
        for round in 0..ROUNDS {
            faults.clear();
            for _ in 0..self.order.len() {
                let place = self.order[0];
                let fault = match self.of(place, group, end).await {
                    Ok(bytes) => return Ok(bytes),
                    Err(fault) => fault,
                };
                self.part = None;
                self.portals.told(place, "sending a blob", self.cid.id, &fault);
                if may_pass(&fault) {
                    self.order.rotate_left(1);
                    faults.push((place, fault));
                } else {
                    self.order.remove(0);
                    self.out.push((place, fault));
                }
                debug!(blob = %self.cid.id, group, "The read goes on at another portal.");
            }
            if self.order.is_empty() || !self.portals.wait(round, &faults).await {
                break;
            }
        }
        faults.extend(self.out.iter().cloned());
        Err(faults)
    }

    async fn of(&mut self, place: usize, group: u64, end: u64) -> Result<Vec<u8>, Fault> {
        if !matches!(self.part, Some((from, next, _)) if (from, next) == (place, group)) {
            let whole_groups = end.next_multiple_of(GROUP).min(self.tree.size());
            let to = (whole_groups < self.tree.size()).then_some(whole_groups);
            self.part = Some((place, group, self.portals.list[place].read(&self.cid, group * GROUP, to).await?));
        }
        let Some((_, next, part)) = &mut self.part else { return Err(Fault::Missing) };
        let length = self.tree.length(group);
        let bytes = part.up_to(length).await?;
        if !self.tree.holds(group, &bytes) {
            return Err(wrong_bytes((bytes.len() as u64) < length));
        }
        *next += 1;
        Ok(bytes)
    }
}
