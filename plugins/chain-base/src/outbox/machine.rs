//! The rules, without a clock, a task or a connection: what is due, and what follows from what came of it.
//!
//! Every question carries an id and remembers the view of the chain at the moment it was asked. An answer counts for that moment only:
//! one that arrives late is either the one waited for or ignored, so a receipt from before a reorg never meets a finalized height from
//! after it.

mod answers;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use thiserror::Error;

use self::answers::At;
use super::{Change, Fees, Hash, Intent, Ledger, LedgerError, Receipt, Row, State, Stuck, Used, View};

/// Times and limits.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// How long a transaction may wait for a block before a dearer one replaces it. Half of it where the deadline is near.
    pub patience_ms: u64,
    /// After how long the bytes of a transaction that is in no block are sent again.
    pub resend_ms: u64,
    /// After how long the chain is asked again about a row.
    pub query_ms: u64,
    /// After how long an answer is not waited for any more.
    pub answer_ms: u64,
    /// The wait after a failure: doubled with each one up to the second.
    pub backoff_ms: (u64, u64),
    /// How many rows may be open.
    pub max_open: usize,
    /// How many transactions are signed for one intent at most.
    pub max_attempts: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            patience_ms: 20_000,
            resend_ms: 30_000,
            query_ms: 4_000,
            answer_ms: 30_000,
            backoff_ms: (1_000, 60_000),
            max_open: 1_000,
            max_attempts: 32,
        }
    }
}

/// Something to do. Each is answered by the event of the same `key` and `id`, or by none: then it is due again after a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Sign the intent with exactly this nonce and these fees: `Signed` or `Refused`.
    Sign { key: String, id: u64, intent: Intent, nonce: u64, fees: Fees },
    /// Hand these bytes to the chain: `Sent`.
    Broadcast { key: String, id: u64, raw: Vec<u8> },
    /// Ask for the receipts of these transactions, and for the hash of the canonical block at `height` if there is one: `Looked`.
    Look { key: String, id: u64, hashes: Vec<Hash>, height: Option<u64> },
    /// Find out in which canonical block this nonce was used, and by which transaction: `Found`.
    Find { key: String, id: u64, nonce: u64 },
}

/// What came of an action, or how the chain stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Head(View),
    Signed {
        key: String,
        id: u64,
        raw: Vec<u8>,
        hash: Hash,
    },
    /// The signer did not sign. `forever`: an intent that was never signed is dead.
    Refused {
        key: String,
        id: u64,
        why: String,
        forever: bool,
    },
    Sent {
        key: String,
        id: u64,
        outcome: Result<(), SendError>,
    },
    /// `receipt`: the one that any of the hashes has, or `None` where the endpoint has none. `canonical`: the hash at the height asked
    /// for, `None` where the endpoint has no block there.
    Looked {
        key: String,
        id: u64,
        receipt: Option<Receipt>,
        canonical: Option<Hash>,
    },
    Found {
        key: String,
        id: u64,
        used: Option<Used>,
    },
    /// A look or a search that could not be made. Nothing follows from it but a wait.
    Failed {
        key: String,
        id: u64,
    },
}

/// Why an endpoint did not take a transaction, in its own words sorted by what follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SendError {
    #[error("it is known already")]
    AlreadyKnown,
    #[error("its nonce is used")]
    NonceTooLow,
    #[error("it offers too little")]
    Underpriced,
    #[error("the account cannot pay for it")]
    InsufficientFunds,
    #[error("the endpoint takes no more for now")]
    RateLimited,
    /// Also for an answer that was lost or not understood: the transaction may be out.
    #[error("the endpoint did not answer")]
    Unreachable,
}

/// Why an intent was not planned or an event not taken in.
#[derive(Debug, Error)]
pub enum OutboxError {
    #[error("`{key}` is the key of another intent")]
    KeyTaken { key: String },
    #[error("a key has 1 to 200 bytes, not {length}")]
    KeyLength { length: usize },
    #[error("{limit} intents are open, which is the limit: wait until one is final")]
    Full { limit: usize },
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// What is to be done now, and what has changed by the passing of time alone.
#[derive(Debug, Default)]
pub struct Due {
    pub actions: Vec<Action>,
    pub changes: Vec<Change>,
}

/// The state machine over a ledger. See the [module](super).
pub struct Outbox<L> {
    ledger: L,
    policy: Policy,
    /// By number. What is beside the row is for this process only.
    open: BTreeMap<u64, Tracked>,
    numbers: HashMap<String, u64>,
    next_number: u64,
    next_id: u64,
    view: Option<View>,
}

struct Tracked {
    row: Row,
    stuck: Option<Stuck>,
    sign: Slot,
    send: Slot,
    look: Slot,
    find: Slot,
    /// When an endpoint first took the last transaction, and the newest block then. Patience begins here: an endpoint that is out of
    /// reach, or a chain that stands still, is no reason to pay more.
    taken: Option<(u64, u64)>,
    /// The last transaction was refused for its fees: the patience is over.
    underpriced: bool,
    /// The nonce is used in a safe block and no receipt explains it.
    unexplained: bool,
}

/// A question, when it may be asked again, and how often it failed in a row.
#[derive(Default)]
struct Slot {
    asked: Option<Asked>,
    not_before_ms: u64,
    failures: u32,
}

struct Asked {
    id: u64,
    until_ms: u64,
    view: Option<View>,
    /// Fees of a signature that was asked for, with its nonce.
    fees: Option<(u64, Fees)>,
}

impl Slot {
    /// Free to ask now; an answer that is overdue counts as a failure.
    fn is_due(&mut self, now_ms: u64, policy: &Policy) -> bool {
        if self.asked.as_ref().is_some_and(|asked| asked.until_ms <= now_ms) {
            self.asked = None;
            self.failed(now_ms, policy);
        }
        self.asked.is_none() && self.not_before_ms <= now_ms
    }

    /// The question with this id, if it is the one that is waited for.
    fn take(&mut self, id: u64) -> Option<Asked> {
        self.asked.take_if(|asked| asked.id == id)
    }

    fn failed(&mut self, now_ms: u64, policy: &Policy) {
        let (first, most) = policy.backoff_ms;
        self.not_before_ms = now_ms + first.saturating_mul(1 << self.failures.min(20)).min(most);
        self.failures = self.failures.saturating_add(1);
    }

    fn again_at(&mut self, ms: u64) {
        self.not_before_ms = ms;
        self.failures = 0;
    }
}

impl Tracked {
    fn new(row: Row) -> Self {
        let slot = Slot::default;
        Self {
            row,
            stuck: None,
            sign: slot(),
            send: slot(),
            look: slot(),
            find: slot(),
            taken: None,
            underpriced: false,
            unexplained: false,
        }
    }

    /// Long enough for the last transaction to be replaced by a dearer one.
    fn has_waited(&self, now_ms: u64, view: &View, policy: &Policy) -> bool {
        if self.stuck == Some(Stuck::InsufficientFunds) {
            return false;
        }
        // A deadline that is near is worth paying for earlier.
        let left_ms = self.row.intent.deadline_s.map(|deadline| deadline.saturating_mul(1_000).saturating_sub(now_ms));
        let is_near = left_ms.is_some_and(|left| left < policy.patience_ms.saturating_mul(4));
        let patience_ms = if is_near { policy.patience_ms / 2 } else { policy.patience_ms };
        let has_been_passed_over =
            self.taken.is_some_and(|(ms, number)| now_ms.saturating_sub(ms) >= patience_ms && view.latest.number > number);
        self.underpriced || has_been_passed_over
    }

    fn change(&self) -> Change {
        Change { row: self.row.clone(), stuck: self.stuck.clone() }
    }

    fn hold(&mut self, stuck: Option<Stuck>, changes: &mut Vec<Change>) {
        if self.stuck != stuck {
            self.stuck = stuck;
            changes.push(self.change());
        }
    }

    /// Ends a hold for which the reason is gone, and no other.
    fn release(&mut self, reason: impl Fn(&Stuck) -> bool, changes: &mut Vec<Change>) {
        if self.stuck.as_ref().is_some_and(reason) {
            self.hold(None, changes);
        }
    }

    /// Disk first, memory after: on an error nothing has changed.
    fn put(&mut self, ledger: &mut impl Ledger, row: Row, changes: &mut Vec<Change>) -> Result<(), LedgerError> {
        if row == self.row {
            return Ok(());
        }
        ledger.put(&row)?;
        if row.state.block().is_some() {
            self.stuck = None;
        }
        self.row = row;
        changes.push(self.change());
        Ok(())
    }

    fn set(&mut self, ledger: &mut impl Ledger, state: State, changes: &mut Vec<Change>) -> Result<(), LedgerError> {
        self.put(ledger, Row { state, ..self.row.clone() }, changes)
    }
}

impl<L: Ledger> Outbox<L> {
    /// Takes up where the ledger ends. What is in no block is due to be sent again at once, with the same bytes.
    pub fn open(ledger: L, policy: Policy) -> Result<Self, OutboxError> {
        let rows = ledger.open_rows()?;
        let next_number = ledger.newest(1)?.first().map_or(0, |row| row.number + 1);
        let numbers = rows.iter().map(|row| (row.intent.key.clone(), row.number)).collect();
        let open = rows.into_iter().map(|row| (row.number, Tracked::new(row))).collect();
        Ok(Self { ledger, policy, open, numbers, next_number, next_id: 0, view: None })
    }

    /// Takes an intent; it is on disk when this returns. A key that is known already is not taken again: its row is returned.
    pub fn plan(&mut self, intent: Intent, now_ms: u64) -> Result<Row, OutboxError> {
        if let Some(row) = self.row(&intent.key)? {
            return if row.intent.is_same_act(&intent) { Ok(row) } else { Err(OutboxError::KeyTaken { key: intent.key }) };
        }
        let (length, limit) = (intent.key.len(), self.policy.max_open);
        if length == 0 || length > 200 {
            return Err(OutboxError::KeyLength { length });
        }
        if self.open.len() >= limit {
            return Err(OutboxError::Full { limit });
        }
        let number = self.next_number;
        let row = Row { number, intent, planned_ms: now_ms, nonce: None, attempts: Vec::new(), state: State::Planned };
        self.ledger.put(&row)?;
        self.next_number += 1;
        self.numbers.insert(row.intent.key.clone(), number);
        self.open.insert(number, Tracked::new(row.clone()));
        Ok(row)
    }

    /// The row of a key, closed ones too.
    pub fn row(&self, key: &str) -> Result<Option<Row>, OutboxError> {
        match self.numbers.get(key).and_then(|number| self.open.get(number)) {
            Some(tracked) => Ok(Some(tracked.row.clone())),
            None => Ok(self.ledger.row(key)?),
        }
    }

    /// Every row that is not closed, in the order in which they were planned, with what holds it up.
    pub fn open_rows(&self) -> Vec<Change> {
        self.open.values().map(Tracked::change).collect()
    }

    /// The newest rows, closed ones too, newest first.
    pub fn newest(&self, limit: usize) -> Result<Vec<Row>, OutboxError> {
        Ok(self.ledger.newest(limit)?)
    }

    /// What is to be done now. What it returns is under way from then on and not returned again before it is answered or overdue.
    ///
    /// # Errors
    /// Of the ledger: then nothing is under way that was not before, and it is to be called again after a while.
    pub fn due(&mut self, now_ms: u64) -> Result<Due, OutboxError> {
        let mut due = Due::default();
        if let Err(error) = self.bury(now_ms, &mut due) {
            // What has changed must be told before the error is.
            return if due.changes.is_empty() { Err(error.into()) } else { Ok(due) };
        }
        if !due.changes.is_empty() {
            return Ok(due);
        }
        // Read before anything is put under way, so that an error leaves all as it was.
        let free = self.free_nonce()?;
        let held: BTreeSet<u64> = self.open.values().filter_map(|tracked| tracked.row.nonce).collect();
        let gap = self.view.is_some_and(|view| held.first().is_some_and(|lowest| view.count < *lowest));
        // Two signatures for new nonces at once would be for the same one.
        let mut may_bind = !self.open.values().any(|tracked| tracked.row.nonce.is_none() && tracked.sign.asked.is_some());
        let (policy, view) = (self.policy, self.view);
        let asked = |next_id: &mut u64, fees| {
            *next_id += 1;
            Some(Asked { id: *next_id, until_ms: now_ms + policy.answer_ms, view, fees })
        };
        for tracked in self.open.values_mut() {
            let key = tracked.row.intent.key.clone();
            let Some(nonce) = tracked.row.nonce else {
                let is_due = tracked.sign.is_due(now_ms, &policy);
                let Some(view) = view.filter(|_| may_bind && is_due) else { continue };
                // A foreign transaction is in the chain and may yet be taken back: a nonce above it could wait for ever.
                let Some(nonce) = free.filter(|free| *free >= view.count) else {
                    tracked.hold(Some(Stuck::ForeignNonce), &mut due.changes);
                    may_bind = false;
                    continue;
                };
                tracked.release(|stuck| *stuck == Stuck::ForeignNonce, &mut due.changes);
                may_bind = false;
                let fees = view.fees.within(tracked.row.intent.fee_cap);
                tracked.sign.asked = asked(&mut self.next_id, Some((nonce, fees)));
                due.actions.push(Action::Sign { key, id: self.next_id, intent: tracked.row.intent.clone(), nonce, fees });
                continue;
            };
            if matches!(tracked.row.state, State::Signed | State::Broadcast) {
                let is_used = view.is_some_and(|view| view.count > nonce);
                if !is_used
                    && tracked.send.is_due(now_ms, &policy)
                    && let Some(attempt) = tracked.row.attempts.last()
                {
                    tracked.send.asked = asked(&mut self.next_id, None);
                    due.actions.push(Action::Broadcast { key: key.clone(), id: self.next_id, raw: attempt.raw.clone() });
                }
                // Only the transaction that the chain waits for is made dearer: those behind it gain nothing by it.
                if let Some(view) = view.filter(|view| view.count == nonce)
                    && tracked.sign.is_due(now_ms, &policy)
                    && tracked.has_waited(now_ms, &view, &policy)
                    && let Some(last) = tracked.row.attempts.last()
                {
                    let dearer = last.fees.above(view.fees, tracked.row.intent.fee_cap);
                    match dearer.filter(|_| tracked.row.attempts.len() < policy.max_attempts) {
                        Some(fees) => {
                            tracked.sign.asked = asked(&mut self.next_id, Some((nonce, fees)));
                            let intent = tracked.row.intent.clone();
                            due.actions.push(Action::Sign { key: key.clone(), id: self.next_id, intent, nonce, fees });
                        }
                        None if tracked.stuck.is_none() => tracked.hold(Some(Stuck::FeeCap), &mut due.changes),
                        None => {}
                    }
                }
                if gap && held.first() == Some(&nonce) {
                    tracked.hold(Some(Stuck::NonceGap), &mut due.changes);
                } else {
                    tracked.release(|stuck| *stuck == Stuck::NonceGap, &mut due.changes);
                }
                if tracked.unexplained && tracked.find.is_due(now_ms, &policy) {
                    tracked.find.asked = asked(&mut self.next_id, None);
                    due.actions.push(Action::Find { key: key.clone(), id: self.next_id, nonce });
                }
            }
            if tracked.look.is_due(now_ms, &policy) {
                tracked.look.asked = asked(&mut self.next_id, None);
                let hashes = tracked.row.attempts.iter().rev().map(|attempt| attempt.hash).collect();
                let height = tracked.row.state.block().map(|block| block.number);
                due.actions.push(Action::Look { key, id: self.next_id, hashes, height });
            }
        }
        Ok(due)
    }

    /// Takes in what came of an action. An answer that is not waited for any more is ignored.
    ///
    /// # Errors
    /// Of the ledger: then the rows are as they were, and what was answered is asked again in its time.
    pub fn on(&mut self, now_ms: u64, event: Event) -> Result<Vec<Change>, OutboxError> {
        let mut changes = Vec::new();
        let key = match &event {
            Event::Head(view) => {
                // Final blocks are not taken back: who says less lags behind, and what it says of nonces is old.
                if self.view.is_none_or(|before| before.finalized.number <= view.finalized.number) {
                    self.view = Some(*view);
                }
                return Ok(changes);
            }
            Event::Signed { key, .. } | Event::Refused { key, .. } | Event::Sent { key, .. } => key,
            Event::Looked { key, .. } | Event::Found { key, .. } | Event::Failed { key, .. } => key,
        };
        let Some(number) = self.numbers.get(key).copied() else { return Ok(changes) };
        let Some(tracked) = self.open.get_mut(&number) else { return Ok(changes) };
        let newest = self.view.map_or(0, |view| view.latest.number);
        let mut at = At { now_ms, newest, policy: &self.policy, ledger: &mut self.ledger, tracked, changes: &mut changes };
        match event {
            Event::Head(_) => {}
            Event::Signed { id, raw, hash, .. } => at.signed(id, raw, hash)?,
            Event::Refused { id, why, forever, .. } => at.refused(id, why, forever)?,
            Event::Sent { id, outcome, .. } => at.sent(id, outcome)?,
            Event::Looked { id, receipt, canonical, .. } => at.looked(id, receipt, canonical)?,
            Event::Found { id, used, .. } => at.found(id, used)?,
            Event::Failed { id, .. } => {
                for slot in [&mut at.tracked.look, &mut at.tracked.find] {
                    if slot.take(id).is_some() {
                        slot.failed(now_ms, &self.policy);
                    }
                }
            }
        }
        self.close(number);
        Ok(changes)
    }

    /// The nonce for the next intent: the smallest that the chain does not call used in a safe block and that no row ever had. The first
    /// of a ledger follows the chain's newest block: what the account did before is not foreign. `None` before the chain was seen.
    fn free_nonce(&self) -> Result<Option<u64>, LedgerError> {
        let is_needed = self.open.values().any(|tracked| tracked.row.nonce.is_none());
        let Some(view) = self.view.filter(|_| is_needed) else { return Ok(None) };
        let safe = view.safe_count.min(view.count);
        let from = match self.ledger.first_nonce()? {
            None => view.count,
            // What is below was the account's own doing before this ledger, as long as the chain still has it.
            Some(first) if first <= view.count => safe.max(first),
            Some(_) => safe,
        };
        self.ledger.free_nonce(from).map(Some)
    }

    /// Ends the intents whose deadline passed before anything was signed for them.
    fn bury(&mut self, now_ms: u64, due: &mut Due) -> Result<(), LedgerError> {
        let is_late = |tracked: &Tracked| {
            let is_waiting = tracked.row.nonce.is_none() && tracked.sign.asked.is_none();
            is_waiting && tracked.row.intent.deadline_s.is_some_and(|deadline| deadline.saturating_mul(1_000) <= now_ms)
        };
        let late: Vec<u64> = self.open.iter().filter(|(_, tracked)| is_late(tracked)).map(|(number, _)| *number).collect();
        for number in late {
            if let Some(tracked) = self.open.get_mut(&number) {
                let state = State::Dead { why: "its deadline passed before it was signed".to_owned() };
                tracked.set(&mut self.ledger, state, &mut due.changes)?;
            }
            self.close(number);
        }
        Ok(())
    }

    fn close(&mut self, number: u64) {
        if let Some(tracked) = self.open.get(&number).filter(|tracked| tracked.row.state.is_closed()) {
            self.numbers.remove(&tracked.row.intent.key);
            self.open.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests;
