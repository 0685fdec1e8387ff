//! Results whose client says nothing: once its time to object is over, anyone may have the job settled. And those that it objects to: anyone may
//! have the arbiter's ruling carried out, and the client has no reason to where it goes against it.

use std::collections::HashMap;
use std::time::Duration;

use fabstir_plugin_api::chain::{Act, JobId, ProgressState, Sure};
use fabstir_plugin_api::error::PluginError;
use tokio::time::Instant;

use super::{LaneError, Shared};
use crate::market::journal::jobs::{JobRow, State, Step};
use crate::market::seller::jobs::verdict::{Cause, OnChain};
use crate::market::{DeskError, NATIVE};

/// The pause between two looks.
const PAUSE: Duration = Duration::from_secs(5);
/// Results that are looked at together.
const MOST: usize = 10_000;
/// How long an order that was not carried out is left alone. Seconds.
const REST_S: u64 = 600;
/// How often an arbiter is asked whether it rules. Seconds.
const RULING_S: u64 = 20;

#[derive(Default)]
pub(super) struct Due {
    looked: Option<Instant>,
    /// When each result is looked at again, since its client has no more to say then, in seconds since 1970.
    until_s: HashMap<JobId, u64>,
}

impl Due {
    /// Has everything settled whose time has come.
    pub async fn settle(&mut self, shared: &Shared) -> Result<(), LaneError> {
        if self.looked.is_some_and(|looked| looked.elapsed() < PAUSE) {
            return Ok(());
        }
        self.looked = Some(Instant::now());
        let rows = shared.seller.journal.jobs(&[State::Submitted], MOST).await?;
        self.until_s.retain(|id, _| rows.iter().any(|row| row.id == *id));
        for row in rows {
            let known = self.until_s.get(&row.id).copied();
            if known.is_some_and(|until_s| until_s >= shared.clock.now_s()) {
                continue;
            }
            if let Err(error) = self.settle_one(shared, &row, known.is_some()).await {
                match error {
                    DeskError::Plugin(error) => {
                        tracing::warn!(job = row.id, %error, "A result's end cannot be looked at; trying again.")
                    }
                    error => tracing::warn!(job = row.id, %error, "A job was not settled; trying again later."),
                }
                self.until_s.insert(row.id, shared.clock.now_s() + PAUSE.as_secs());
            }
        }
        Ok(())
    }

    /// The chain has taken blocks back: what was read of it may not be so any more.
    pub fn forget(&mut self) {
        (self.looked, self.until_s) = (None, HashMap::new());
    }

    /// Its client has objected to it: what was known of its end is so no more.
    pub fn look_at(&mut self, job: JobId) {
        self.looked = None;
        self.until_s.remove(&job);
    }

    async fn step(&self, shared: &Shared, id: JobId, step: Step) -> Result<(), DeskError> {
        let stepped = shared.seller.journal.step_job(id, State::Submitted, step).await;
        Ok(stepped.map(drop).map_err(PluginError::from)?)
    }

    async fn settle_one(&mut self, shared: &Shared, row: &JobRow, is_known: bool) -> Result<(), DeskError> {
        let id = row.id;
        let until_s = match shared.on_chain(row, Sure::Latest).await? {
            OnChain::Delivered { owes_proof: true, .. } => {
                // The chain has taken the proof back, and what was sent again was refused.
                let proving = Step { anew: true, ..Step::to(State::Proving) };
                return self.step(shared, id, proving).await;
            }
            OnChain::Delivered { until_s, objected: true, .. } if until_s >= shared.clock.now_s() => {
                self.until_s.insert(id, shared.clock.now_s() + RULING_S);
                return self.end(shared, row, "resolve", Act::Resolve { job: id }).await;
            }
            OnChain::Delivered { until_s, .. } => until_s,
            OnChain::Taken | OnChain::Another | OnChain::ClaimedAnother => {
                let failed = Step::to(State::Failed).because(Cause::Reorg.word(), "the chain has taken this node's claim back");
                return self.step(shared, id, failed).await;
            }
            // Its event is on its way, or the outbox sends again what a block has lost.
            _ => return Ok(()),
        };
        // An objection may be in a block that the endpoint which was asked has not seen.
        let look_s = if row.terms.arbiter == NATIVE { until_s } else { until_s.min(shared.clock.now_s() + RULING_S) };
        self.until_s.insert(id, look_s);
        if until_s >= shared.clock.now_s() || !is_known {
            return Ok(());
        }
        // The contracts' clock may be a little behind this machine's.
        self.until_s.insert(id, shared.clock.now_s() + 1);
        self.end(shared, row, "expire", Act::ExpireJob { job: id }).await
    }

    /// Has a job ended, if the contract does it and it brings more than it costs.
    async fn end(&mut self, shared: &Shared, row: &JobRow, name: &str, act: Act) -> Result<(), DeskError> {
        let id = row.id;
        let quote = match shared.desk.quote(act.clone()).await {
            Ok(quote) => quote,
            Err(DeskError::Refused(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        self.until_s.insert(id, shared.clock.now_s() + REST_S);
        if quote.fee.0 > row.terms.max_amount.0.saturating_add(row.terms.host_bond.0) {
            tracing::warn!(job = id, fee = %quote.fee, "Having a job settled costs more than it brings; waiting.");
            return Ok(());
        }
        let order = shared.desk.order(format!("{name}-{id}-{}", row.attempt), act).await?;
        if matches!(order.state, ProgressState::Dead | ProgressState::Reverted { .. }) {
            // The next one has a key of its own.
            let anew = Step { anew: true, ..Step::to(State::Submitted) };
            self.step(shared, id, anew).await?;
            tracing::warn!(job = id, why = order.why, "A job was not settled; trying again later.");
        } else {
            tracing::info!(job = id, by = name, "Job is to be settled.");
        }
        Ok(())
    }
}
