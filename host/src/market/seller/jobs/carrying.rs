//! One job, from its claim to its result in the contract: a state machine whose states are the journal's.
//!
//! A step is written down, then acted on. What cannot be done at the moment is tried again as long as the job's time allows; what can never
//! be done is given up, since that costs a tenth of what being late costs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::chain::{Act, Hash32, JobResult, Sure};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::inference::{Chunk, Done, Input};
use fabstir_plugin_api::prover::{About, Claim, Proof, Task, Witness};
use fabstir_plugin_api::storage::Expect;
use fabstir_plugin_api::stream::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::traced::{Could, is_traced};
use super::verdict::{Cause, OnChain, for_answer, paid_output};
use super::{AGAIN, CALL, Shared};
use crate::clock::now_ms;
use crate::market::journal::JournalError;
use crate::market::journal::jobs::{JobRow, State, Step};
use crate::market::posting::{JobInput, JobOutput, ResultRef};
use crate::market::proving::{self, Provable};
use crate::market::{Desk, DeskError};
use crate::scheduler::{Refused, estimated_tokens};

/// What is left of a job's time for handing its result in. Seconds.
const MARGIN_S: u64 = 15;
/// How long an order is followed before the chain is looked at again.
const FOLLOW: Duration = Duration::from_secs(60);
/// How long after its last moment a claim may still be seen. Seconds.
const LATE_S: u64 = 120;
/// The pause before an answer is read once more whose states were others than those that were committed to.
const READ_AGAIN: Duration = Duration::from_secs(10);
/// The pause before a proof is ordered once more that was not sent, or came to nothing.
const SEND_AGAIN: Duration = Duration::from_secs(30);
/// The pause before the contract is asked once more whether it takes a proof.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// And where that was so often.
const ASK_SELDOM: Duration = Duration::from_secs(60);
const OFTEN: u32 = 24;
/// How often a proof is sent, for a fee each time, that the contract refuses without saying why.
const MOST_SENT: u32 = 3;
/// What the contract calls a proof that its verifier does not accept.
const REJECTED: &str = "ProofRejected";
/// The pieces in which a result is stored.
const PIECE: usize = 256 << 10;

/// Why a step was not made, where it can be made later.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Chain(#[from] PluginError),
    #[error(transparent)]
    Desk(#[from] DeskError),
    #[error("{why}")]
    Wait { why: String, after: Duration },
}

fn wait(why: impl Into<String>, after: Duration) -> Trouble {
    Trouble::Wait { why: why.into(), after }
}

/// The row after a step; `None` where an event has changed it meanwhile, and there is nothing left to do.
type Next = Result<Option<JobRow>, Trouble>;

/// Counts a job among those that are coming, until it generates or ends.
struct Coming(Arc<Shared>);

impl Coming {
    fn new(shared: Arc<Shared>) -> Self {
        shared.coming.fetch_add(1, Ordering::Relaxed);
        Self(shared)
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.coming.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) struct Carrier {
    shared: Arc<Shared>,
    slots: Arc<Semaphore>,
    slot: Option<OwnedSemaphorePermit>,
    coming: Option<Coming>,
    /// The states that its result has committed to. After a start they are read anew.
    states: Option<Vec<Vec<f32>>>,
    /// How often its proof was sent and refused, and how often the contract has said that it would refuse it.
    reverted: u32,
    refused: u32,
}

impl Carrier {
    pub fn new(shared: Arc<Shared>, slots: Arc<Semaphore>, slot: Option<OwnedSemaphorePermit>) -> Self {
        Self { coming: Some(Coming::new(shared.clone())), shared, slots, slot, states: None, reverted: 0, refused: 0 }
    }

    /// Carries a job on from the state that it is in. Ends when there is nothing left to do, or, once the node stops, with the first
    /// step that cannot be made at once.
    pub async fn carry(mut self, mut row: JobRow) {
        let mut told = String::new();
        loop {
            let stepped = match row.state {
                State::Claiming => self.claim(&row).await,
                State::Claimed | State::Working => self.work(&row).await,
                State::Stored | State::Submitting => self.submit(&row).await,
                State::Proving => self.prove(&row).await,
                State::Proved => self.hand_in_proof(&row).await,
                State::Abandoning => self.abandon(&row).await,
                _ => return,
            };
            let trouble = match stepped {
                Ok(Some(next)) => {
                    row = next;
                    continue;
                }
                Ok(None) => return,
                Err(trouble) => trouble,
            };
            if told != trouble.to_string() {
                told = trouble.to_string();
                tracing::warn!(job = row.id, state = %row.state, error = %trouble, "A job is held up; trying again.");
            }
            let pause = if let Trouble::Wait { after, .. } = trouble { after } else { AGAIN };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                // The journal keeps it for the next start.
                () = self.shared.stop.cancelled() => return,
            }
        }
    }

    fn desk(&self) -> &Desk {
        &self.shared.desk
    }

    async fn step(&self, row: &JobRow, step: Step) -> Next {
        Ok(self.shared.seller.journal.step_job(row.id, row.state, step).await?)
    }

    async fn over(&self, row: &JobRow, to: State, cause: Cause, why: impl Into<String>) -> Next {
        let why = why.into();
        match (to, cause) {
            (State::Missed, Cause::Lost) => tracing::info!(job = row.id, "Job lost: another node was first."),
            _ => tracing::warn!(job = row.id, cause = cause.word(), why, to = %to, "Job is given up."),
        }
        self.step(row, Step::to(to).because(cause.word(), why)).await
    }

    /// Seconds until a moment of the contracts' clock.
    fn left(&self, until_s: u64) -> Duration {
        Duration::from_secs(until_s.saturating_sub(self.shared.clock.now_s()))
    }

    /// Orders the claim, or follows it, until the chain says whose the job is.
    async fn claim(&self, row: &JobRow) -> Next {
        let (key, act) = (format!("claim-{}-{}", row.id, row.attempt), Act::ClaimJob { job: row.id });
        self.desk().order(key.clone(), act.clone()).await?;
        let after_ms = now_ms().saturating_sub(row.seen_ms);
        tracing::info!(job = row.id, after_ms, max_wei = %row.terms.max_amount, model = row.model, "Job taken: its claim is ordered.");
        let outcome = self.desk().follow(key, act, FOLLOW).await;
        if let Err(error @ (DeskError::Pending { .. } | DeskError::Plugin(_))) = outcome {
            return Err(error.into());
        }
        // A block shows what has come of the order; whose the job is, only the contract does.
        match self.shared.on_chain(row, Sure::Latest).await? {
            OnChain::Ours { .. } => {
                tracing::info!(job = row.id, "Job claimed.");
                // Its result may be there, where the chain has taken an earlier claim back.
                let to = if row.result.is_some() { State::Stored } else { State::Claimed };
                self.step(row, Step::to(to)).await
            }
            OnChain::ClaimedAnother => {
                self.over(row, State::Abandoning, Cause::Reorg, "another job has its number now, and was claimed in its place")
                    .await
            }
            OnChain::Delivered { owes_proof: true, .. } => self.step(row, Step::to(State::Proving)).await,
            OnChain::Delivered { .. } | OnChain::Settled => self.step(row, Step::to(State::Submitted)).await,
            OnChain::Taken => self.over(row, State::Missed, Cause::Lost, "another node was first").await,
            OnChain::Refunded => self.over(row, State::Missed, Cause::Gone, "its client took it back before the claim").await,
            OnChain::Another => self.over(row, State::Missed, Cause::Reorg, "another job has its number now").await,
            OnChain::Open | OnChain::Absent | OnChain::Unknown => match outcome {
                Err(DeskError::Dead { why }) => {
                    let why = why.unwrap_or_else(|| "its claim was not sent".into());
                    self.over(row, State::Missed, Cause::Fee, why).await
                }
                Err(error) => self.over(row, State::Missed, Cause::Refused, error.to_string()).await,
                Ok(_) if self.shared.clock.now_s() > row.terms.claim_by_s.saturating_add(LATE_S) => {
                    self.over(row, State::Missed, Cause::Reorg, "the chain has taken its claim back").await
                }
                // Taken back, and sent again by the plugin; or the endpoint that was asked is behind the one that told.
                Ok(_) => Err(wait("its claim is in a block, and the contract does not show it yet", Duration::from_millis(500))),
            },
        }
    }

    /// Has the model work on it, and stores what comes of it.
    async fn work(&mut self, row: &JobRow) -> Next {
        if self.slot.is_none() {
            let slot = self.slots.clone().acquire_owned().await;
            self.slot = Some(slot.map_err(|_| wait("the node ends", AGAIN))?);
        }
        let until_s = match self.shared.on_chain(row, Sure::Latest).await? {
            OnChain::Ours { until_s } => until_s,
            OnChain::Open | OnChain::Absent => return self.step(row, Step::to(State::Claiming)).await,
            other => return self.not_ours(row, &other).await,
        };
        if self.shared.seller.peer.get().is_none() && !self.left(until_s).is_zero() {
            return Err(wait("the node has not joined the network yet", Duration::from_millis(200)));
        }
        let row = match row.state {
            State::Working => row.clone(),
            _ => match self.step(row, Step::to(State::Working)).await? {
                Some(row) => row,
                None => return Ok(None),
            },
        };
        let end_s = until_s.saturating_sub(MARGIN_S);
        let (output, tokens) = match self.output(&row, end_s).await? {
            Ok(answered) => answered,
            Err((cause, why)) => return self.over(&row, State::Abandoning, cause, why).await,
        };
        // Those of an answer before this one.
        self.states = None;
        let trace = match is_traced(&row.terms) {
            false => None,
            true => match self.trace(&row, &tokens, end_s).await {
                Ok(trace) => Some(trace),
                Err((cause, why)) => return self.over(&row, State::Abandoning, cause, why).await,
            },
        };
        let result = match self.store(&row, &output, end_s).await? {
            Ok(result) => JobResult { trace, ..result },
            Err((cause, why)) => return self.over(&row, State::Abandoning, cause, why).await,
        };
        let stored = self.step(&row, Step { result: Some(result), tokens: Some(tokens), ..Step::to(State::Stored) }).await;
        self.slot = None;
        stored
    }

    /// The model's answer, with its tokens where they are traced, or why there is none to be had in time.
    async fn output(&mut self, row: &JobRow, end_s: u64) -> Result<Result<Answered, (Cause, String)>, Trouble> {
        let input = match JobInput::read(&row.input_ref, &row.input_commitment) {
            Ok(input) => input,
            Err(error) => return Ok(Err((Cause::Input, error.to_string()))),
        };
        let mut failed_before = false;
        loop {
            if self.left(end_s).is_zero() {
                return Ok(Err((Cause::Time, "there is no time left for the work".into())));
            }
            let models = self.shared.models().await?;
            let served = || models.iter().filter(|model| model.id == row.terms.model);
            let Some(model) = served().find(|model| model.is_free).or_else(|| served().next()) else {
                return Err(wait(format!("the model {} is not served at the moment", row.terms.model), AGAIN));
            };
            self.coming = None;
            let within = for_answer(is_traced(&row.terms), self.left(end_s));
            let refused = match self.generate(row, &input, &model.name, within).await {
                Ok((output, tokens)) => return Ok(Ok((within_terms(row, output), tokens))),
                Err(refused) => refused,
            };
            let because = |cause| Ok(Err((cause, refused.to_string())));
            match refused.code {
                Code::TooLong => return because(Cause::TooLong),
                Code::InvalidArgument | Code::Unimplemented => return because(Cause::Input),
                Code::DeadlineExceeded => return because(Cause::Time),
                Code::Overloaded => tokio::time::sleep(refused.retry_after.unwrap_or(AGAIN).min(self.left(end_s))).await,
                _ if failed_before => return because(Cause::Failed),
                _ => {
                    failed_before = true;
                    tracing::warn!(job = row.id, error = %refused, "The work on a job failed; trying once more.");
                    tokio::time::sleep(AGAIN.min(self.left(end_s))).await;
                }
            }
        }
    }

    async fn generate(&self, row: &JobRow, input: &JobInput, model: &str, within: Duration) -> Result<Answered, Refused> {
        // No more than is paid for, whatever the terms allow.
        let most = match self.shared.counted(row, model).await {
            Ok(Ok(Some(counted))) => counted.answer(&row.terms),
            // The model says by itself what it does not take.
            _ => paid_output(&row.terms, estimated_tokens(&Input::Messages(input.messages.clone()))),
        };
        let mut request = input.generation(model, most);
        // One client's jobs may share what was read of their prompts; nobody else learns from the time it takes.
        request.cache_salt = format!("job:{}", row.client);
        let is_traced = is_traced(&row.terms);
        request.logprobs = is_traced.then_some(0);
        let mut answer = self.shared.seller.scheduler.generate(Cx::new().with_timeout(within), request).await?;
        let (mut text, mut tokens) = (String::new(), Vec::new());
        loop {
            match answer.next().await {
                Some(Ok(Chunk::Text(piece))) => {
                    text.push_str(&piece.text);
                    tokens.extend(piece.logprobs.iter().map(|logprob| logprob.token));
                }
                Some(Ok(Chunk::Done(Done { finish, mut usage, .. }))) => {
                    if is_traced {
                        // What is counted is what can be proven.
                        usage.completion_tokens = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
                    }
                    return Ok((JobOutput { text, finish, usage }, tokens));
                }
                Some(Err(refused)) => return Err(refused),
                None => {
                    let message = "the answer ended without its last piece".into();
                    return Err(Refused { code: Code::Internal, message, retry_after: None });
                }
            }
        }
    }

    /// The root over the answer's tokens and states, or why none of it can be proven in time.
    async fn trace(&mut self, row: &JobRow, tokens: &[u32], end_s: u64) -> Result<Hash32, (Cause, String)> {
        let mut told = false;
        // Giving up early lets the next job come; what has not passed in half of the time will not.
        let end_s = end_s.saturating_sub(self.left(end_s).as_secs() / 2);
        loop {
            let left = self.left(end_s);
            if left.is_zero() {
                return Err((Cause::Time, "there is no time left to commit to its tokens".into()));
            }
            let error = match self.traced(row, tokens, left).await {
                Ok(traced) => return traced,
                // There is no such trace, now or later; giving up costs a tenth of what being late does.
                Err(error)
                    if matches!(
                        error.code,
                        Code::InvalidArgument | Code::Unimplemented | Code::NotFound | Code::Full | Code::Denied | Code::Corrupt
                    ) =>
                {
                    return Err((Cause::Proof, error.to_string()));
                }
                Err(error) => error,
            };
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(job = row.id, code = %error.code, %error, "An answer's tokens cannot be committed to; trying again.");
            }
            tokio::time::sleep(AGAIN.min(self.left(end_s))).await;
        }
    }

    async fn traced(&mut self, row: &JobRow, tokens: &[u32], within: Duration) -> Could<Hash32> {
        let provable = self.shared.provable(&row.terms).await.ok_or_else(|| unprovable(row))?;
        if self.states.is_none() {
            match self.shared.states(row, tokens, within).await? {
                Ok(states) => self.states = Some(states),
                Err(because) => return Ok(Err(because)),
            }
        }
        let states = self.states.clone().unwrap_or_default();
        let id = provable.statement.id.clone();
        Ok(Ok(provable.prover.trace(&Cx::new().with_timeout(within), id, tokens.to_vec(), states).await?))
    }

    /// Where the positions of a job's proof are drawn, if its proof is about positions.
    async fn draw(&self, row: &JobRow) -> Result<Option<Hash32>, PluginError> {
        match is_traced(&row.terms) {
            true => Ok(Some(self.desk().chain.draw(&Cx::new().with_timeout(CALL), row.id).await?)),
            false => Ok(None),
        }
    }

    /// What is proven of a delivered result: at the positions that a later block has drawn, by the states that it has committed to.
    async fn witness(
        &mut self,
        row: &JobRow,
        provable: &Provable,
        result: &JobResult,
        draw: Hash32,
        within: Duration,
    ) -> Result<Result<Witness, (Cause, String)>, Trouble> {
        let tokens = row.tokens.clone();
        if let Some(states) = self.states.clone() {
            return Ok(Ok(Witness::Answer { tokens, states, draw }));
        }
        let states = match self.shared.states(row, &tokens, within).await? {
            Ok(states) => states,
            Err(because) => return Ok(Err(because)),
        };
        let (cx, id) = (Cx::new().with_timeout(within), provable.statement.id.clone());
        match provable.prover.trace(&cx, id, tokens.clone(), states.clone()).await {
            Ok(root) if Some(&root) == result.trace.as_ref() => {}
            // Computed in another order, sums of floats are others. No proof of these states would be accepted.
            Ok(_) => return Err(wait("its states, read anew, are not those of its result; reading them once more", READ_AGAIN)),
            Err(error) if error.code == Code::InvalidArgument => {
                return Err(wait(format!("its states, read anew, are not those of its result: {error}"), READ_AGAIN));
            }
            Err(error) => return Err(error.into()),
        }
        self.states = Some(states.clone());
        Ok(Ok(Witness::Answer { tokens, states, draw }))
    }

    /// Keeps the result in the best place that takes it.
    async fn store(&self, row: &JobRow, output: &JobOutput, end_s: u64) -> Result<Result<JobResult, (Cause, String)>, Trouble> {
        let (bytes, output_commitment) = match output.document() {
            Ok(document) => document,
            Err(error) => return Ok(Err((Cause::TooLong, error.to_string()))),
        };
        let Some(peer) = self.shared.seller.peer.get().cloned() else {
            return Ok(Err((Cause::Network, "the node has no name in the network".into())));
        };
        let id = output_commitment.trim_start_matches("0x").to_owned();
        let mut why = "no storage plugin is ready".to_owned();
        loop {
            let places: Vec<_> = self.shared.seller.routes.borrow().storage.clone();
            for place in places {
                let expect = Expect { id: Some(id.clone()), size: Some(bytes.len() as u64) };
                let pieces: Vec<Blob> = bytes.chunks(PIECE).map(|piece| piece.to_vec().into()).collect();
                let cx = Cx::new().with_timeout(self.left(end_s).max(Duration::from_secs(1)));
                match place.client.put(&cx, expect, Stream::from_items(pieces)).await {
                    Ok(_) => {
                        let usage = output.usage;
                        return Ok(Ok(JobResult {
                            output_commitment,
                            trace: None,
                            input_tokens: usage.prompt_tokens.into(),
                            output_tokens: usage.completion_tokens.into(),
                            result_ref: ResultRef { peer, id }.to_string(),
                        }));
                    }
                    Err(error) => {
                        tracing::error!(job = row.id, plugin = %place.plugin, code = %error.code, %error, "A result was not stored.");
                        why = error.to_string();
                    }
                }
            }
            if self.left(end_s).is_zero() {
                return Ok(Err((Cause::Storage, why)));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Hands the result in.
    async fn submit(&mut self, row: &JobRow) -> Next {
        // The work is done: the next job may come.
        (self.slot, self.coming) = (None, None);
        let Some(result) = row.result.clone() else { return self.step(row, Step::to(State::Claimed)).await };
        let row = match row.state {
            State::Submitting => row.clone(),
            _ => {
                match self.shared.on_chain(row, Sure::Latest).await? {
                    OnChain::Ours { until_s } if !self.left(until_s).is_zero() => {}
                    OnChain::Ours { .. } => {
                        return self.over(row, State::Failed, Cause::Time, "its time to be delivered went by").await;
                    }
                    OnChain::Open | OnChain::Absent => return self.step(row, Step::to(State::Claiming)).await,
                    other => return self.not_ours(row, &other).await,
                }
                match self.step(row, Step::to(State::Submitting)).await? {
                    Some(row) => row,
                    None => return Ok(None),
                }
            }
        };
        let act = Act::SubmitResult { job: row.id, result };
        let outcome = self.desk().follow(format!("submit-{}-{}", row.id, row.attempt), act, FOLLOW).await;
        match outcome {
            Ok(done) => {
                tracing::info!(job = row.id, block = done.block, "Job submitted.");
                let to = if row.terms.proof_kind == 0 { State::Submitted } else { State::Proving };
                self.step(&row, Step::to(to)).await
            }
            Err(error @ (DeskError::Pending { .. } | DeskError::Plugin(_))) => Err(error.into()),
            // Not carried out, and never will be under this key: the state above decides anew.
            Err(error) => {
                tracing::warn!(job = row.id, %error, "A result was not handed in.");
                match self.shared.on_chain(&row, Sure::Latest).await? {
                    OnChain::Ours { until_s } if !self.left(until_s).is_zero() => {
                        tokio::time::sleep(AGAIN).await;
                        self.step(&row, Step { anew: true, ..Step::to(State::Stored) }).await
                    }
                    OnChain::Ours { .. } => self.over(&row, State::Failed, Cause::Time, error.to_string()).await,
                    OnChain::Open | OnChain::Absent => self.step(&row, Step { anew: true, ..Step::to(State::Claiming) }).await,
                    other => self.not_ours(&row, &other).await,
                }
            }
        }
    }

    /// Has the proof made that the job's terms ask for.
    async fn prove(&mut self, row: &JobRow) -> Next {
        (self.slot, self.coming) = (None, None);
        let end_s = match self.shared.on_chain(row, Sure::Latest).await? {
            OnChain::Delivered { until_s, owes_proof: true, .. } => until_s.saturating_sub(MARGIN_S),
            OnChain::Ours { .. } | OnChain::Open | OnChain::Absent => return self.step(row, Step::to(State::Stored)).await,
            other => return self.not_ours(row, &other).await,
        };
        if self.left(end_s).is_zero() {
            return self.over(row, State::Failed, Cause::Proof, "there is no time left for its proof").await;
        }
        let Some(result) = &row.result else {
            return self.over(row, State::Failed, Cause::Proof, "its result is not in this node's journal").await;
        };
        let program = &row.terms.program;
        let provable = self.shared.provable(&row.terms).await.ok_or_else(|| unprovable(row))?;
        let Some(model) = self.shared.digest(&row.terms.model).await? else {
            return Err(wait(format!("the model {} is not served at the moment", row.terms.model), AGAIN));
        };
        let subject = self.desk().chain.subject(&Cx::new().with_timeout(CALL), row.id, Sure::Latest).await?;
        let draw = self.draw(row).await?;
        // It may be there already, where only its order has come to nothing.
        if row.proof.as_ref().is_some_and(|proof| is_of(proof, &subject, draw.as_ref())) {
            return self.step(row, Step::to(State::Proved)).await;
        }
        let (input, output) = (row.input_commitment.clone(), result.output_commitment.clone());
        let about = About { subject, job: Some(row.id), model, input, output };
        let witness = match draw {
            None => Witness::None,
            Some(draw) => match self.witness(row, &provable, result, draw, self.left(end_s)).await? {
                Ok(witness) => witness,
                Err((cause, why)) => return self.over(row, State::Failed, cause, why).await,
            },
        };
        let task = Task { statement: provable.statement.id.clone(), about, witness };
        let begun = Instant::now();
        match proving::prove(&*provable.prover, program, task, self.left(end_s)).await {
            Ok(proof) => {
                tracing::info!(
                    job = row.id,
                    statement = provable.statement.id,
                    ms = begun.elapsed().as_millis() as u64,
                    "Job proven."
                );
                // One that was ordered before was of something else: this one's order has another key.
                let anew = row.proof.is_some();
                self.step(row, Step { proof: Some(proof), anew, ..Step::to(State::Proved) }).await
            }
            // There is no such proof, now or later.
            Err(error) if matches!(error.code, Code::InvalidArgument | Code::Unimplemented) => {
                self.over(row, State::Failed, Cause::Proof, error.to_string()).await
            }
            Err(error) => {
                if error.code == Code::Corrupt {
                    self.shared.seller.prepared.forget(&provable);
                }
                Err(error.into())
            }
        }
    }

    /// Hands the proof in. What the contract would refuse is not sent: each refusal costs a fee.
    async fn hand_in_proof(&mut self, row: &JobRow) -> Next {
        (self.slot, self.coming) = (None, None);
        let Some(proof) = row.proof.clone() else {
            return self.step(row, Step::to(State::Proving)).await;
        };
        let act = Act::SubmitProof { job: row.id, public_inputs: proof.public_inputs.clone(), proof: proof.proof.clone() };
        let outcome = match self.desk().quote(act.clone()).await {
            Ok(_) => self.desk().follow(format!("proof-{}-{}", row.id, row.attempt), act, FOLLOW).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(done) => {
                tracing::info!(job = row.id, block = done.block, "Proof accepted.");
                self.step(row, Step::to(State::Submitted)).await
            }
            Err(error @ (DeskError::Pending { .. } | DeskError::Plugin(_))) => Err(error.into()),
            Err(error) => self.refused_proof(row, &proof, error).await,
        }
    }

    /// What to do about a proof that the contract does not take, or that was not sent.
    async fn refused_proof(&mut self, row: &JobRow, proof: &Proof, error: DeskError) -> Next {
        let until_s = match self.shared.on_chain(row, Sure::Latest).await? {
            OnChain::Delivered { until_s, owes_proof: true, .. } => until_s,
            OnChain::Ours { .. } | OnChain::Open | OnChain::Absent => return self.step(row, Step::to(State::Stored)).await,
            other => return self.not_ours(row, &other).await,
        };
        if self.left(until_s).is_zero() {
            return self.over(row, State::Failed, Cause::Proof, error.to_string()).await;
        }
        let subject = self.desk().chain.subject(&Cx::new().with_timeout(CALL), row.id, Sure::Latest).await?;
        let draw = self.draw(row).await?;
        self.reverted += u32::from(matches!(error, DeskError::Reverted { .. }));
        match after_refusal(proof, &subject, draw.as_ref(), &error, self.reverted) {
            AfterRefusal::AskAgain => {
                self.refused += 1;
                let pause = if self.refused < OFTEN { ASK_AGAIN } else { ASK_SELDOM };
                Err(wait(error.to_string(), pause.min(self.left(until_s))))
            }
            AfterRefusal::ProveAnew => self.step(row, Step { anew: true, ..Step::to(State::Proving) }).await,
            AfterRefusal::GiveUp => self.over(row, State::Failed, Cause::Proof, error.to_string()).await,
            AfterRefusal::SendAnew => {
                tracing::warn!(job = row.id, %error, "A proof was not handed in; it is sent again.");
                tokio::time::sleep(SEND_AGAIN.min(self.left(until_s))).await;
                self.step(row, Step { anew: true, ..Step::to(State::Proved) }).await
            }
        }
    }

    /// Where a job goes that is no longer this node's to work on.
    async fn not_ours(&self, row: &JobRow, on_chain: &OnChain) -> Next {
        match on_chain {
            OnChain::Delivered { owes_proof: true, .. } => self.step(row, Step::to(State::Proving)).await,
            OnChain::Delivered { .. } | OnChain::Settled => self.step(row, Step::to(State::Submitted)).await,
            OnChain::ClaimedAnother => {
                self.over(row, State::Abandoning, Cause::Reorg, "another job has its number now, and was claimed in its place")
                    .await
            }
            OnChain::Another => self.over(row, State::Failed, Cause::Reorg, "another job has its number now").await,
            OnChain::Taken => self.over(row, State::Failed, Cause::Lost, "another node has claimed it").await,
            OnChain::Refunded => self.over(row, State::Failed, Cause::Gone, "its client has its money back").await,
            OnChain::Ours { .. } | OnChain::Open | OnChain::Absent | OnChain::Unknown => {
                Err(wait("the chain shows it in a state that this node does not know", AGAIN))
            }
        }
    }

    /// Gives the claim back, as long as that is possible.
    async fn abandon(&mut self, row: &JobRow) -> Next {
        (self.slot, self.coming) = (None, None);
        let act = Act::AbandonJob { job: row.id };
        let key = format!("abandon-{}-{}", row.id, row.attempt);
        let outcome = match self.desk().quote(act.clone()).await {
            Ok(_) => self.desk().follow(key, act, FOLLOW).await.map(drop),
            // Given back already, or no longer this node's.
            Err(DeskError::Refused(_)) => Ok(()),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => {}
            Err(error @ (DeskError::Pending { .. } | DeskError::Plugin(_))) => return Err(error.into()),
            Err(error) => tracing::warn!(job = row.id, %error, "A job could not be given back: its bond is lost."),
        }
        self.step(row, Step::to(State::Failed)).await
    }
}

/// What is done about a proof that was not taken.
#[derive(Debug, PartialEq, Eq)]
enum AfterRefusal {
    /// Blocks were taken back, and it is of another result, or at positions that are drawn no longer.
    ProveAnew,
    /// It was not sent, which costs nothing. The endpoint may be behind the one that told the draw, and know no hash of its block yet.
    AskAgain,
    /// It is of what the contract has, and so would be every other: making it again leads to the same end, at a fee each time.
    GiveUp,
    /// Nothing is wrong with it.
    SendAnew,
}

/// Whether a proof is about what the contract has now.
fn is_of(proof: &Proof, subject: &Hash32, draw: Option<&Hash32>) -> bool {
    let drawn = if let Claim::Answer { draw, .. } = &proof.claim { Some(draw) } else { None };
    proof.about.subject == *subject && drawn == draw
}

fn after_refusal(proof: &Proof, subject: &Hash32, draw: Option<&Hash32>, error: &DeskError, reverted: u32) -> AfterRefusal {
    if !is_of(proof, subject, draw) {
        return AfterRefusal::ProveAnew;
    }
    match error {
        DeskError::Refused(_) => AfterRefusal::AskAgain,
        DeskError::Reverted { why: Some(why), .. } if why.contains(REJECTED) => AfterRefusal::GiveUp,
        DeskError::Reverted { .. } if reverted >= MOST_SENT => AfterRefusal::GiveUp,
        _ => AfterRefusal::SendAnew,
    }
}

fn unprovable(row: &JobRow) -> PluginError {
    PluginError::unavailable(format!("no prover plugin proves by the program {} at the moment", row.terms.program))
}

/// An answer, with its tokens where they are traced.
type Answered = (JobOutput, Vec<u32>);

/// The answer, with no more tokens than the job's terms pay for: no more can be charged, whatever a plugin counts.
fn within_terms(row: &JobRow, mut output: JobOutput) -> JobOutput {
    let most = |tokens: u64| u32::try_from(tokens).unwrap_or(u32::MAX);
    let usage = &mut output.usage;
    usage.prompt_tokens = usage.prompt_tokens.min(most(row.terms.max_input_tokens));
    usage.completion_tokens = usage.completion_tokens.min(most(row.terms.max_output_tokens));
    output
}

#[cfg(test)]
mod tests {
    use fabstir_plugin_api::inference::{Finish, Usage};

    use super::super::verdict::tests::row;
    use super::*;

    #[test]
    fn a_proof_that_is_rejected_is_made_again_only_if_it_would_be_another() {
        let word = |digit: &str| format!("0x{}", digit.repeat(64));
        let about = About { subject: word("1"), job: Some(1), model: String::new(), input: word("2"), output: word("3") };
        let proof = |claim| Proof {
            statement: String::new(),
            system: String::new(),
            program: word("4"),
            about: about.clone(),
            claim,
            public_inputs: vec![],
            proof: vec![],
        };
        let rejected = || DeskError::Refused("ProofRejected(ProofRejected { job_id: 1 })".into());
        let reverted = |why: Option<&str>| DeskError::Reverted { transaction: None, why: why.map(str::to_owned) };
        let receipt = proof(Claim::None);
        let after = |subject: &str, error| after_refusal(&receipt, &word(subject), None, &error, 1);
        assert_eq!(after("1", reverted(Some("ProofRejected"))), AfterRefusal::GiveUp);
        assert_eq!(after("5", rejected()), AfterRefusal::ProveAnew);
        let answer = proof(Claim::Answer { trace: word("6"), tokens: 1, draw: word("7") });
        assert_eq!(after_refusal(&answer, &word("1"), Some(&word("8")), &rejected(), 0), AfterRefusal::ProveAnew);
        // An endpoint that lags knows no hash of the block that draws, so that no proof of this kind holds there yet.
        assert_eq!(after_refusal(&answer, &word("1"), Some(&word("7")), &rejected(), 0), AfterRefusal::AskAgain);
        assert_eq!(after("1", DeskError::Refused("insufficient funds".into())), AfterRefusal::AskAgain);
        // What says nothing about the proof costs no bond, unless it costs a fee again and again.
        for error in [reverted(None), DeskError::Dead { why: None }] {
            assert_eq!(after("1", error), AfterRefusal::SendAnew);
        }
        assert_eq!(after_refusal(&receipt, &word("1"), None, &reverted(None), MOST_SENT), AfterRefusal::GiveUp);
    }

    #[test]
    fn no_more_is_charged_than_the_terms_pay_for() {
        let output = |prompt_tokens, completion_tokens| JobOutput {
            text: "x".into(),
            finish: Finish::Stop,
            usage: Usage { prompt_tokens, completion_tokens, cached_tokens: 0 },
        };
        assert_eq!(within_terms(&row(1), output(100, 50)), output(100, 50));
        assert_eq!(within_terms(&row(1), output(101, 51)), output(100, 50));
    }
}
