//! Posted jobs: seen on the chain, judged, claimed, worked on, handed in and paid.
//!
//! ```text
//! events --> note --> look --> claim --> work --> store --> submit (--> prove) --> settle
//!            (journal)  |        \__________________________________/
//!                       |          carrying.rs, one task each
//!                       +-- verdict.rs (whether), Lane::check (what the chain says)
//! ```
//!
//! Every arrow is in the journal before it is acted on, and every state can be entered from there alone: a job that was under way when the
//! node ended is carried on by the same task that a new one gets. An order's key is made of the job's number and its attempt, so that an
//! order that was placed is followed, and not placed again.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use fabstir_plugin_api::chain::{Act, Cursor, Job, JobId, JobResult, ModelId, Notice, Quote, Since, Sure};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::prover::ProofKind;
use fabstir_plugin_api::stream::Stream;
use futures::FutureExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{AGAIN, Seller};
use crate::clock::now_ms;
use crate::market::journal::JournalError;
use crate::market::journal::jobs::{self, JobRow, Meant, State, Step};
use crate::market::proving::{Provable, Provables};
use crate::market::{Desk, DeskError};

mod carrying;
mod due;
mod traced;
mod verdict;

pub use verdict::Cause;
#[cfg(test)]
pub(crate) use verdict::tests::row as example;

use carrying::Carrier;
use due::Due;
use traced::is_traced;
use verdict::{Fees, OnChain, Promised, Proves, Purse, Served, Standing, Verdict, compare, fees, judge, owed};

/// How long a call that reads the chain may take.
const CALL: Duration = Duration::from_secs(10);
/// Notices that one write of the journal takes together.
const MOST_NOTICES: usize = 1024;
/// Jobs that are looked at together. Those behind them come when these are done with.
const MOST_LOOKED: usize = 1024;
/// Jobs in work that are carried on after a start.
const MOST_IN_WORK: usize = 4096;
/// What a proof may have, in bytes, whose size is not known before it is made: eight tokens of a long answer.
const PROOF_BYTES: u64 = 7 << 10;
/// What the name of a result takes: a node's name and a hash.
const RESULT_REF_BYTES: usize = 128;
/// The pause before a job is looked at again whose fees are too high.
const FEES_AGAIN: Duration = Duration::from_secs(15);
/// How often what has waited is looked at again.
const TICK: Duration = Duration::from_secs(1);
/// How long the cursor may be behind what was read where nothing has happened: a start reads so much again, and no more.
const CURSOR_AGE: Duration = Duration::from_secs(30);

/// Why the lane stands still. It is tried again.
#[derive(Debug, thiserror::Error)]
enum LaneError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("the chain: {0}")]
    Chain(#[from] PluginError),
}

/// The contracts' clock: the newest block's time, or this machine's where that is later, as it will be in the next block.
#[derive(Default)]
struct Clock(AtomicU64);

impl Clock {
    fn block(&self, time_s: u64) {
        self.0.fetch_max(time_s, Ordering::Relaxed);
    }

    fn now_s(&self) -> u64 {
        self.0.load(Ordering::Relaxed).max(now_ms() / 1000)
    }
}

/// What the lane and the tasks of its jobs share.
struct Shared {
    seller: Arc<Seller>,
    desk: Arc<Desk>,
    stop: CancellationToken,
    clock: Clock,
    /// Jobs that are taken and do not generate yet: each will want a slot that is still free now.
    coming: AtomicU32,
}

impl Shared {
    /// A job as the chain has it; `None` where it has none.
    async fn job(&self, id: JobId, sure: Sure) -> Result<Option<Job>, PluginError> {
        match self.desk.chain.job(&Cx::new().with_timeout(CALL), id, sure).await {
            Ok(job) => Ok(Some(job)),
            Err(error) if error.code == Code::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn on_chain(&self, row: &JobRow, sure: Sure) -> Result<OnChain, PluginError> {
        Ok(compare(row, self.job(row.id, sure).await?.as_ref(), &self.desk.account))
    }

    /// The digest of the model that has this name on the chain, where it is served.
    async fn digest(&self, id: &ModelId) -> Result<Option<String>, PluginError> {
        for digest in self.seller.scheduler.models().into_iter().filter_map(|model| model.digest) {
            if self.desk.chain.model_id(&Cx::new().with_timeout(CALL), digest.clone()).await.is_ok_and(|known| known == *id) {
                return Ok(Some(digest));
            }
        }
        Ok(None)
    }

    /// The models that are served and have a name on the chain.
    async fn models(&self) -> Result<Vec<Served>, PluginError> {
        let coming = self.coming.load(Ordering::Relaxed);
        let mut models = Vec::new();
        for model in self.seller.scheduler.generating() {
            let Some(digest) = model.digest else { continue };
            let id: ModelId = match self.desk.chain.model_id(&Cx::new().with_timeout(CALL), digest).await {
                Ok(id) => id,
                // A plugin of another maker may say something else than a digest: then this model has no name there.
                Err(error) if error.code == Code::InvalidArgument => continue,
                Err(error) => return Err(error),
            };
            let is_free = self.seller.scheduler.free(&model.id) > coming;
            models.push(Served { name: model.id, id, context: model.context, is_free });
        }
        Ok(models)
    }
}

/// Takes jobs and carries them on until `stop`; then takes no new one, lets those in work end, and returns.
pub async fn run(seller: &Arc<Seller>, desk: &Arc<Desk>, stop: &CancellationToken) {
    let takes = seller.config.jobs > 0;
    let shared = Arc::new(Shared {
        seller: seller.clone(),
        desk: desk.clone(),
        stop: stop.clone(),
        clock: Clock::default(),
        coming: AtomicU32::new(0),
    });
    // One for what was taken before no more jobs were wanted.
    let slots = Arc::new(Semaphore::new(seller.config.jobs.max(1) as usize));
    let mut lane = Lane {
        shared,
        takes,
        slots,
        tasks: JoinSet::new(),
        running: HashMap::new(),
        later: HashMap::new(),
        due: Due::default(),
        is_up: false,
        marked: None,
    };
    loop {
        let error = match lane.watch().await {
            Ok(()) => break,
            Err(error) => error,
        };
        tracing::warn!(%error, "Posted jobs are not followed at the moment; trying again.");
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            () = stop.cancelled() => break,
        }
    }
    while lane.tasks.join_next().await.is_some() {}
}

/// Bytes that a chain charges as much for as for those of a proof: none is zero, and they do not compress.
fn filler(bytes: u64) -> Vec<u8> {
    let mut filler = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX).min(1 << 20)];
    blake3::Hasher::new().finalize_xof().fill(&mut filler);
    filler.iter_mut().for_each(|byte| *byte |= 1);
    filler
}

/// What was found out about a job from the chain.
enum Checked {
    Good,
    Wait(Cause, String),
    /// To be noted: it can be over, or this node's already.
    Step(Step),
}

struct Lane {
    shared: Arc<Shared>,
    /// Whether new jobs are wanted.
    takes: bool,
    /// One for each job that may be in work.
    slots: Arc<Semaphore>,
    tasks: JoinSet<()>,
    running: HashMap<JobId, AbortHandle>,
    /// Jobs that are not looked at before this moment.
    later: HashMap<JobId, Instant>,
    due: Due,
    /// Whether all that has happened so far is in the journal.
    is_up: bool,
    /// The last cursor in the journal, and when it was written.
    marked: Option<(Cursor, Instant)>,
}

impl Lane {
    async fn watch(&mut self) -> Result<(), LaneError> {
        let in_work = self.shared.seller.journal.jobs(&State::IN_WORK, 1).await?;
        let submitted = self.shared.seller.journal.jobs(&[State::Submitted], 1).await?;
        if !self.takes && in_work.is_empty() && submitted.is_empty() {
            self.shared.stop.cancelled().await;
            return Ok(());
        }
        let mut routes = self.shared.seller.routes.clone();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut notices = self.events().await?;
        loop {
            let look;
            let mut carry = false;
            tokio::select! {
                () = self.shared.stop.cancelled() => return Ok(()),
                notice = notices.next() => {
                    let first = notice.unwrap_or_else(|| Err(PluginError::unavailable("the chain plugin tells no more events")))?;
                    let was_up = self.is_up;
                    look = self.note(first, &mut notices).await? || self.is_up != was_up;
                    carry = look;
                }
                Some(ended) = self.tasks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!(%error, "The work on a job ended by a fault of this program; it is carried on.");
                    }
                    look = true;
                }
                changed = routes.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    look = true;
                }
                _ = tick.tick() => (look, carry) = (true, true),
            }
            if carry {
                self.carry_on().await?;
            }
            if look && self.is_up {
                self.look().await?;
                self.due.settle(&self.shared).await?;
            }
        }
    }

    /// The name of the cursor in the journal: that of another market means nothing here.
    fn mark(&self) -> String {
        format!("jobs of {}", self.shared.desk.network.domain)
    }

    async fn events(&mut self) -> Result<Stream<Notice>, LaneError> {
        let name = self.mark();
        let known = self.shared.seller.journal.write(move |transaction| jobs::mark(transaction, &name)).await?;
        let chain = &self.shared.desk.chain;
        let since = known.map_or(Since::Beginning, |cursor| Since::After(Cursor(cursor)));
        match chain.events(&Cx::new(), since.clone()).await {
            Err(error) if error.code == Code::InvalidArgument && since != Since::Beginning => {
                tracing::warn!(%error, "The chain plugin does not know how far it was read; reading from the beginning.");
                Ok(chain.events(&Cx::new(), Since::Beginning).await?)
            }
            events => Ok(events?),
        }
    }

    /// Writes down what is told, as much together as has come; says whether a job has to be looked at.
    async fn note(&mut self, first: Notice, notices: &mut Stream<Notice>) -> Result<bool, LaneError> {
        let mut batch = vec![first];
        while batch.len() < MOST_NOTICES
            && let Some(next) = notices.next().now_or_never()
        {
            match next {
                Some(Ok(notice)) => batch.push(notice),
                // Told again by the next read, once this much is written.
                _ => break,
            }
        }
        let mut cursor = None;
        let mut has_events = false;
        for notice in &batch {
            match notice {
                Notice::Event { cursor: at, block, .. } => {
                    (cursor, has_events) = (Some(at.clone()), true);
                    self.shared.clock.block(block.time_s);
                }
                Notice::UpTo { cursor: at, block } => {
                    cursor = Some(at.clone());
                    self.shared.clock.block(block.time_s);
                }
                Notice::Back { cursor: at, .. } => (cursor, has_events) = (at.clone().or(cursor), true),
                Notice::Unknown => {}
            }
        }
        if batch.iter().any(|notice| matches!(notice, Notice::Back { .. })) {
            self.due.forget();
        }
        self.is_up = matches!(batch.last(), Some(Notice::UpTo { .. }));
        let is_old = self.marked.as_ref().is_none_or(|(at, when)| Some(at) != cursor.as_ref() && when.elapsed() > CURSOR_AGE);
        if !has_events && !is_old {
            return Ok(false);
        }
        let (account, takes, name) = (self.shared.desk.account.clone(), self.takes, self.mark());
        let mark = cursor.clone();
        let meant = self
            .shared
            .seller
            .journal
            .write(move |transaction| {
                let mut meant = Vec::new();
                for notice in &batch {
                    match notice {
                        Notice::Event { block, event, .. } => {
                            meant.push(jobs::note(transaction, &account, takes, block.number, event)?);
                        }
                        Notice::Back { number, .. } => {
                            jobs::back(transaction, *number)?;
                            tracing::warn!(number, "The chain has taken blocks back.");
                            meant.push(Meant::Seen(0));
                        }
                        Notice::UpTo { .. } | Notice::Unknown => {}
                    }
                }
                if let Some(Cursor(cursor)) = &mark {
                    jobs::set_mark(transaction, &name, cursor)?;
                }
                Ok(meant)
            })
            .await?;
        if let Some(cursor) = cursor {
            self.marked = Some((cursor, Instant::now()));
        }
        Ok(self.act_on(&meant))
    }

    /// Tells of what has happened, and ends what need not be done any more.
    fn act_on(&mut self, meant: &[Meant]) -> bool {
        for meant in meant {
            match meant {
                Meant::Settled { job, paid } => {
                    tracing::info!(job, paid_wei = %paid, "Job settled.");
                    self.drop_task(*job);
                }
                Meant::Over { job, cause, worked: true } => {
                    tracing::warn!(job, cause, "Job is over, and not paid.");
                    self.drop_task(*job);
                }
                Meant::Challenged(job) => {
                    tracing::warn!(job, "Its client objects to a result: the arbiter of its terms decides.");
                    self.due.look_at(*job);
                }
                Meant::Over { .. } | Meant::Seen(_) | Meant::Nothing => {}
            }
        }
        meant.iter().any(|meant| *meant != Meant::Nothing)
    }

    /// The journal says that it is over: what the task would still do is of no use.
    fn drop_task(&mut self, job: JobId) {
        if let Some(task) = self.running.remove(&job) {
            task.abort();
        }
    }

    /// Gives every job in work that has no task one.
    async fn carry_on(&mut self) -> Result<(), LaneError> {
        self.running.retain(|_, task| !task.is_finished());
        for row in self.shared.seller.journal.jobs(&State::IN_WORK, MOST_IN_WORK).await? {
            if !self.running.contains_key(&row.id) {
                tracing::info!(job = row.id, state = %row.state, "Job is carried on.");
                let slot = self.slots.clone().try_acquire_owned().ok();
                self.carry(row, slot);
            }
        }
        Ok(())
    }

    fn carry(&mut self, row: JobRow, slot: Option<OwnedSemaphorePermit>) {
        let id = row.id;
        let carrier = Carrier::new(self.shared.clone(), self.slots.clone(), slot);
        self.running.insert(id, self.tasks.spawn(carrier.carry(row)));
    }

    /// Looks at every job that may be taken, and takes what there is room for.
    async fn look(&mut self) -> Result<(), LaneError> {
        if !self.takes {
            return Ok(());
        }
        let journal = self.shared.seller.journal.clone();
        let rows = journal.jobs(&[State::Seen], MOST_LOOKED).await?;
        if rows.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        self.later.retain(|_, until| *until > now);
        let asks_proof = rows.iter().any(|row| row.terms.proof_kind != 0);
        let mut standing = self.standing(asks_proof).await?;
        let mut good = Vec::new();
        let mut verdicts = Vec::new();
        for row in rows {
            if self.later.contains_key(&row.id) && row.terms.claim_by_s > standing.now_s {
                continue;
            }
            match judge(&row, &standing) {
                Verdict::Take(model) => {
                    standing.promise(&row.terms);
                    good.push((row, model));
                }
                verdict => verdicts.push((row.id, verdict)),
            }
        }
        let now_s = standing.now_s;
        let write = journal.write(move |transaction| {
            // Before the verdicts: what has waited for something tells for what.
            jobs::miss(transaction, now_s)?;
            for (id, verdict) in verdicts {
                match verdict {
                    Verdict::Decline(cause, why) => {
                        let declined = Step::to(State::Declined).because(cause.word(), why);
                        jobs::step(transaction, id, State::Seen, &declined)?;
                    }
                    Verdict::Wait(cause, why) => jobs::waits(transaction, id, cause.word(), &why)?,
                    Verdict::Take(_) => {}
                }
            }
            Ok(())
        });
        write.await?;
        self.take(good).await
    }

    /// Takes these jobs in their order, as many as there is room for.
    async fn take(&mut self, good: Vec<(JobRow, String)>) -> Result<(), LaneError> {
        let journal = self.shared.seller.journal.clone();
        let mut full = Vec::new();
        for (row, model) in good {
            let coming = self.shared.coming.load(Ordering::Relaxed);
            let is_free = self.shared.seller.scheduler.free(&model) > coming;
            let slot = if is_free { self.slots.clone().try_acquire_owned().ok() } else { None };
            let Some(slot) = slot else {
                full.push(row.id);
                continue;
            };
            let id = row.id;
            match self.check(&row, &model).await {
                Ok(Checked::Good) => {
                    let claiming = Step { model: Some(model), ..Step::to(State::Claiming) };
                    if let Some(row) = journal.step_job(id, State::Seen, claiming).await? {
                        self.carry(row, Some(slot));
                    }
                }
                Ok(Checked::Step(step)) => {
                    tracing::debug!(job = id, to = %step.to, because = ?step.because, "Job is not taken.");
                    journal.step_job(id, State::Seen, step).await?;
                }
                Ok(Checked::Wait(cause, why)) => {
                    self.later.insert(id, Instant::now() + if cause == Cause::Fee { FEES_AGAIN } else { AGAIN });
                    journal.write(move |transaction| jobs::waits(transaction, id, cause.word(), &why)).await?;
                }
                Err(error) => {
                    // What cannot be checked is not taken; the chain is asked again.
                    self.later.insert(id, Instant::now() + AGAIN);
                    tracing::warn!(job = id, %error, "A job cannot be checked; trying again.");
                    break;
                }
            }
        }
        if !full.is_empty() {
            let why = "as many jobs as may be are in work, or no slot is free";
            let waiting = journal
                .write(move |transaction| full.iter().try_for_each(|id| jobs::waits(transaction, *id, Cause::Room.word(), why)));
            waiting.await?;
        }
        Ok(())
    }

    /// Asks the chain about a job: whether it is as it was told, whether it can be claimed, and what all of it costs. Asks the model how long its
    /// input is, since what is found out after the claim costs a part of the bond.
    async fn check(&self, row: &JobRow, model: &str) -> Result<Checked, DeskError> {
        let is_large = row.terms.max_amount.0 >= self.shared.seller.config.sure_above_wei.into();
        let sure = if is_large { Sure::Safe } else { Sure::Latest };
        let job = async { self.shared.on_chain(row, sure).await.map_err(DeskError::from) };
        // All at a time: other nodes look at it too.
        let claim = self.shared.desk.quote(Act::ClaimJob { job: row.id });
        let (on_chain, claim, later, counted) = tokio::join!(job, claim, self.later_fees(row), self.shared.counted(row, model));
        let over = |to, cause: Cause, why: &str| Ok(Checked::Step(Step::to(to).because(cause.word(), why)));
        match on_chain? {
            OnChain::Open => {}
            OnChain::Absent if is_large => return Ok(Checked::Wait(Cause::Amount, "its block is not safe yet".into())),
            OnChain::Absent => return Ok(Checked::Wait(Cause::Amount, "the chain does not show it".into())),
            OnChain::Unknown => return Ok(Checked::Wait(Cause::Amount, "the chain shows it in an unknown state".into())),
            OnChain::Another | OnChain::ClaimedAnother => {
                return over(State::Declined, Cause::Amount, "the contract holds another job than was told");
            }
            OnChain::Taken => return over(State::Missed, Cause::Lost, "another node was first"),
            OnChain::Refunded => return over(State::Missed, Cause::Gone, "its client has its money back"),
            // Claimed in another life of this node, of which the journal is gone.
            OnChain::Ours { .. } => return Ok(Checked::Step(Step::to(State::Claimed))),
            // What its proof needs is in the journal that is gone.
            OnChain::Delivered { .. } | OnChain::Settled => return Ok(Checked::Step(Step::to(State::Submitted))),
        }
        let claim = match claim {
            Ok(quote) => quote,
            Err(DeskError::Refused(why)) => {
                return match why {
                    why if why.contains("JobWrongState") => over(State::Missed, Cause::Lost, "another node was first"),
                    why if why.contains("DeadlinePassed") => over(State::Missed, Cause::Time, "its time to be claimed went by"),
                    why if why.contains("NodeExcluded") => over(State::Declined, Cause::Refused, &why),
                    why if why.contains("BondExceedsFreeStake") => Ok(Checked::Wait(Cause::Bond, why)),
                    why => Ok(Checked::Wait(Cause::Refused, why)),
                };
            }
            Err(error) => return Err(error),
        };
        match counted {
            Ok(Ok(counted)) => {
                if let Some(Err((cause, why))) = counted.map(|counted| counted.fits(&row.terms)) {
                    return over(State::Declined, cause, &why);
                }
            }
            Ok(Err((cause, why))) => return over(State::Declined, cause, &why),
            Err(error) => return Ok(Checked::Wait(Cause::Model, format!("its input cannot be counted at the moment: {error}"))),
        }
        let quotes: Vec<(&str, Quote)> = [("claiming it", claim)].into_iter().chain(later?).collect();
        let max_fee_wei = self.shared.seller.config.max_fee_wei.into();
        let in_work = self.shared.seller.journal.jobs(&State::IN_WORK, MOST_IN_WORK).await.map_err(PluginError::from)?;
        let owed = owed(&in_work, &quotes, max_fee_wei);
        let purse = Purse { max_fee_wei, today_wei: self.shared.desk.fees_left().saturating_sub(owed) };
        match fees(&quotes, row.terms.max_amount, purse) {
            Fees::Good => Ok(Checked::Good),
            Fees::High(why) => Ok(Checked::Wait(Cause::Fee, why)),
            Fees::TooHigh(why) => over(State::Declined, Cause::Fee, &why),
        }
    }

    /// What handing in the result of this job would cost now, and its proof where its terms ask for one. The contract would refuse both, and the
    /// quotes say what they cost all the same.
    async fn later_fees(&self, row: &JobRow) -> Result<Vec<(&'static str, Quote)>, DeskError> {
        let hash = || format!("0x{}", hex::encode(filler(32)));
        let result = JobResult {
            output_commitment: hash(),
            trace: is_traced(&row.terms).then(hash),
            input_tokens: row.terms.max_input_tokens,
            output_tokens: row.terms.max_output_tokens,
            result_ref: "x".repeat(RESULT_REF_BYTES),
        };
        let mut acts = vec![("handing its result in", Act::SubmitResult { job: row.id, result })];
        if row.terms.proof_kind != 0 {
            let bytes = self.shared.provable(&row.terms).await.and_then(|known| known.proof_bytes).unwrap_or(PROOF_BYTES);
            acts.push((
                "handing its proof in",
                Act::SubmitProof { job: row.id, public_inputs: filler(64), proof: filler(bytes) },
            ));
        }
        let quote = async |(what, act)| Ok((what, self.shared.desk.chain.quote(&Cx::new().with_timeout(CALL), act).await?));
        futures::future::try_join_all(acts.into_iter().map(quote)).await
    }

    /// How this node stands at the moment.
    async fn standing(&self, asks_proof: bool) -> Result<Standing, LaneError> {
        let seller = &self.shared.seller;
        let models = self.shared.models().await?;
        let routes = seller.routes.borrow().clone();
        let provables = match asks_proof {
            true => self.shared.provables().await,
            false => Provables::default(),
        };
        let proves = |known: Provable| {
            let Provable { kind, program, model, takes_ms, is_checked, .. } = known;
            kind.number().map(|kind| Proves { kind, program, model, takes_ms, is_checked })
        };
        let promised = match asks_proof {
            true => seller.journal.jobs(&State::PROMISED, MOST_IN_WORK).await?,
            false => Vec::new(),
        };
        let mut standing = Standing {
            models,
            // The inputs of an ONNX model stand in no job, so that none can be proven.
            proves: provables.ready.into_iter().filter(|known| known.kind != ProofKind::OnnxModel).filter_map(proves).collect(),
            is_starting: !routes.starting.is_empty() || provables.is_preparing,
            can_store: !routes.storage.is_empty(),
            is_in_network: match (seller.peer.get(), routes.transport.is_empty()) {
                (Some(_), _) => Some(true),
                (None, true) => Some(false),
                (None, false) => None,
            },
            prices: seller.prices,
            promised: Promised::default(),
            arbiters: seller.config.arbiters.clone(),
            max_bond_wei: seller.config.max_bond_wei.into(),
            least_resolve_s: seller.config.least_resolve_s,
            max_wait_s: seller.config.max_wait_s,
            now_s: self.shared.clock.now_s(),
        };
        for row in promised.iter().filter(|row| row.terms.proof_kind != 0) {
            standing.promise(&row.terms);
        }
        Ok(standing)
    }
}
