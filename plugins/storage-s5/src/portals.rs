//! Several portals that serve as one place.
//!
//! What one does wrong is its own matter as long as another one does it right: a blob goes to the next portal, and is read on from the next
//! one at the byte where the last one failed.

mod keeping;
mod pointing;
mod reading;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tracing::warn;

use crate::cid::Id;
use crate::config::Settings;
use crate::error::S5Error;
use crate::ledger::Ledger;
use crate::portal::{Fault, Portal};
use crate::spool::Spool;

/// How often all portals are asked before it is given up.
const ROUNDS: u32 = 3;

/// When to come back, where no portal has said.
const LATER: Duration = Duration::from_secs(5);

/// The portals, and what is known of the blobs on them.
#[derive(Debug)]
pub struct Portals {
    list: Vec<Portal>,
    ledger: Arc<Ledger>,
    spool: Arc<Spool>,
    copies: usize,
    timeout: Duration,
    /// Blobs that are being put or deleted: one at a time does it.
    turns: Mutex<HashMap<Id, Weak<tokio::sync::Mutex<()>>>>,
}

impl Portals {
    /// Opens the folder of an instance. Asks no portal.
    pub fn open(settings: &Settings, state_dir: &Path) -> Result<Self, S5Error> {
        let client = |error: reqwest::Error| S5Error::Io {
            doing: "prepare HTTPS with",
            path: "the certificates of this program".into(),
            source: std::io::Error::other(error),
        };
        Ok(Self {
            list: Portal::all(settings).map_err(client)?,
            ledger: Arc::new(Ledger::open(state_dir)?),
            spool: Spool::open(state_dir.join("spool"), settings.spool_max)?,
            copies: settings.copies,
            timeout: settings.timeout,
            turns: Mutex::default(),
        })
    }

    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    pub fn spool(&self) -> &Arc<Spool> {
        &self.spool
    }

    /// The lock of a blob.
    fn turn(&self, id: Id) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock();
        if let Some(turn) = turns.get(&id).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        turns.insert(id, Arc::downgrade(&turn));
        turn
    }

    /// Waits before the next round, if there is one: none of these faults may pass with time, or it would take too long.
    async fn wait(&self, round: u32, faults: &[(usize, Fault)]) -> bool {
        let wait = faults.iter().filter_map(|(_, fault)| fault.wait(round, self.timeout)).min();
        match wait.filter(|_| round + 1 < ROUNDS) {
            Some(wait) => {
                tokio::time::sleep(wait).await;
                true
            }
            None => false,
        }
    }

    /// One error for what all portals did.
    fn failed(&self, doing: &'static str, faults: &[(usize, Fault)]) -> S5Error {
        let mut why: Vec<String> = faults.iter().map(|(place, fault)| format!("{}: {fault}", self.list[*place].name())).collect();
        why.dedup();
        let why = why.join("; ");
        let rest = |fault: &Fault| match fault {
            Fault::Busy(rest) => Some(*rest),
            _ => None,
        };
        let rests = faults.iter().filter_map(|(_, fault)| rest(fault));
        let unreachable = faults.iter().any(|(_, fault)| matches!(fault, Fault::Unreachable(_)));
        match (rests.min(), unreachable) {
            (None, false) => S5Error::Refused { doing, why },
            (rest, unreachable) => {
                S5Error::Portals { doing, why, retry_after: rest.unwrap_or(LATER), busy: rest.is_some() && !unreachable }
            }
        }
    }

    fn told(&self, place: usize, doing: &str, id: Id, fault: &Fault) {
        match fault {
            Fault::Missing => {}
            why => warn!(portal = self.list[place].name(), blob = %id, %why, "A portal failed at {doing}."),
        }
    }
}
