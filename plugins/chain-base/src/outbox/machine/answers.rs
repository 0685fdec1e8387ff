//! What follows from an answer, for the row that asked.

use super::super::{Attempt, BlockRef, Change, Hash, Ledger, LedgerError, Receipt, State, Stuck, Used};
use super::{Policy, SendError, Slot, Tracked};

/// One event at its row.
pub(super) struct At<'a, L> {
    pub now_ms: u64,
    pub newest: u64,
    pub policy: &'a Policy,
    pub ledger: &'a mut L,
    pub tracked: &'a mut Tracked,
    pub changes: &'a mut Vec<Change>,
}

impl<L: Ledger> At<'_, L> {
    pub fn signed(&mut self, id: u64, raw: Vec<u8>, hash: Hash) -> Result<(), LedgerError> {
        let Some((nonce, fees)) = self.tracked.sign.take(id).and_then(|asked| asked.fees) else { return Ok(()) };
        // In case the write fails.
        self.tracked.sign.failed(self.now_ms, self.policy);
        let mut row = self.tracked.row.clone();
        match row.state {
            State::Planned => (row.state, row.nonce) = (State::Signed, Some(nonce)),
            State::Signed | State::Broadcast => {}
            // A block has answered meanwhile; these bytes are not needed and nobody has seen them.
            _ => return Ok(()),
        }
        row.attempts.push(Attempt { fees, raw, hash, signed_ms: self.now_ms });
        self.tracked.put(self.ledger, row, self.changes)?;
        // A pool that calls each one too cheap does not drive the fees up as fast as it can answer.
        self.tracked.sign.again_at(self.now_ms + self.policy.patience_ms / 8);
        (self.tracked.taken, self.tracked.underpriced) = (None, false);
        self.tracked.release(|stuck| matches!(stuck, Stuck::Signer { .. } | Stuck::FeeCap), self.changes);
        // What is under way are the bytes before these.
        self.tracked.send = Slot::default();
        Ok(())
    }

    pub fn refused(&mut self, id: u64, why: String, forever: bool) -> Result<(), LedgerError> {
        if self.tracked.sign.take(id).is_none() {
            return Ok(());
        }
        self.tracked.sign.failed(self.now_ms, self.policy);
        if forever && self.tracked.row.nonce.is_none() {
            return self.tracked.set(self.ledger, State::Dead { why }, self.changes);
        }
        self.tracked.hold(Some(Stuck::Signer { why }), self.changes);
        Ok(())
    }

    pub fn sent(&mut self, id: u64, outcome: Result<(), SendError>) -> Result<(), LedgerError> {
        if self.tracked.send.take(id).is_none() {
            return Ok(());
        }
        self.tracked.send.failed(self.now_ms, self.policy);
        match outcome {
            Ok(()) | Err(SendError::AlreadyKnown) => {
                if self.tracked.row.state == State::Signed {
                    self.tracked.set(self.ledger, State::Broadcast, self.changes)?;
                }
                self.tracked.send.again_at(self.now_ms + self.policy.resend_ms);
                self.tracked.taken.get_or_insert((self.now_ms, self.newest));
                self.tracked.release(|stuck| *stuck == Stuck::InsufficientFunds, self.changes);
            }
            // Perhaps by one of ours: only a receipt says so.
            Err(SendError::NonceTooLow) => self.tracked.look.again_at(self.now_ms),
            Err(SendError::Underpriced) => self.tracked.underpriced = true,
            Err(SendError::InsufficientFunds) => self.tracked.hold(Some(Stuck::InsufficientFunds), self.changes),
            Err(SendError::RateLimited | SendError::Unreachable) => {}
        }
        Ok(())
    }

    pub fn looked(&mut self, id: u64, receipt: Option<Receipt>, canonical: Option<Hash>) -> Result<(), LedgerError> {
        let Some(view) = self.tracked.look.take(id).map(|asked| asked.view) else { return Ok(()) };
        // A row in a block only waits for others to be built on it.
        let pace = if self.tracked.row.state.block().is_some() { 4 } else { 1 };
        self.tracked.look.again_at(self.now_ms + pace * self.policy.query_ms);
        let block = self.tracked.row.state.block();
        // Nobody says that the block is gone while nothing else is shown at its height.
        let is_there = block.is_some_and(|block| canonical == Some(block.hash));
        let is_gone = block.is_some_and(|block| canonical.is_some_and(|canonical| canonical != block.hash));
        let receipt = receipt.filter(|receipt| self.tracked.row.attempts.iter().any(|attempt| attempt.hash == receipt.hash));
        let level = |block: BlockRef| {
            view.map_or((false, false), |view| (block.number <= view.safe.number, block.number <= view.finalized.number))
        };
        if let Some(receipt) = receipt {
            let is_same = is_there && block == Some(receipt.block) && !matches!(self.tracked.row.state, State::Replaced { .. });
            let state = match level(receipt.block) {
                (_, true) if is_same && receipt.succeeded => State::Final(receipt),
                (_, true) if is_same => State::Reverted(receipt),
                (true, _) if is_same => State::Safe(receipt),
                _ => State::Mined(receipt),
            };
            self.tracked.unexplained = false;
            if matches!(state, State::Mined(_)) && !is_same {
                // The first sight of it is worth a second one soon.
                self.tracked.look.again_at(self.now_ms);
            }
            return self.tracked.set(self.ledger, state, self.changes);
        }
        if is_gone {
            self.tracked.set(self.ledger, State::Broadcast, self.changes)?;
            self.tracked.send = Slot::default();
            self.tracked.taken = None;
            self.tracked.look.again_at(self.now_ms);
            return Ok(());
        }
        match self.tracked.row.state {
            State::Replaced { used, settled: false } if is_there && level(used.block).1 => {
                self.tracked.set(self.ledger, State::Replaced { used, settled: true }, self.changes)
            }
            State::Signed | State::Broadcast => {
                let is_used = self.tracked.row.nonce.is_some_and(|nonce| view.is_some_and(|view| view.safe_count > nonce));
                self.tracked.unexplained = is_used;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    pub fn found(&mut self, id: u64, used: Option<Used>) -> Result<(), LedgerError> {
        let Some(asked) = self.tracked.find.take(id) else { return Ok(()) };
        self.tracked.find.failed(self.now_ms, self.policy);
        let is_waiting = matches!(self.tracked.row.state, State::Signed | State::Broadcast);
        let Some(used) = used.filter(|_| is_waiting) else {
            if is_waiting {
                self.tracked.hold(Some(Stuck::NonceUsed), self.changes);
            }
            return Ok(());
        };
        if self.tracked.row.attempts.iter().any(|attempt| attempt.hash == used.by) {
            // Ours after all, and its receipt was withheld.
            self.tracked.look.again_at(self.now_ms);
            return Ok(());
        }
        if asked.view.is_some_and(|view| used.block.number <= view.safe.number) {
            self.tracked.set(self.ledger, State::Replaced { used, settled: false }, self.changes)?;
            self.tracked.unexplained = false;
            self.tracked.find = Slot::default();
        }
        Ok(())
    }
}
