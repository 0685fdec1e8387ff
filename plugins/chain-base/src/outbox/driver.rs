//! Runs the machine against an endpoint and a signer: one task, which decides nothing of its own.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use thiserror::Error;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, warn};

use super::{
    Action, BlockRef, Change, Event, Fees, Hash, Intent, Ledger, Outbox, OutboxError, Receipt, Row, SendError, Used, View,
};

/// The chain, for one account.
///
/// Every call may fail, and none is answered from a guess: what an endpoint does not know is an error or, where the type says so,
/// `None`. Everything but `view` and `send_raw` must come from endpoints whose own finalized block is not below that of the last view
/// given out: one that was left behind on a fork is not to be asked.
#[async_trait]
pub trait Rpc: Send + Sync + 'static {
    /// The heads, the account's counts at them and the market's fees, all from one endpoint. A count of pending transactions is not
    /// one of these.
    async fn view(&self) -> Result<View, RpcError>;

    /// Hands in a signed transaction, to as many endpoints as there are. `Ok` when one took it.
    async fn send_raw(&self, raw: &[u8]) -> Result<(), SendError>;

    /// The receipt of a transaction; `None` where the endpoint has none.
    async fn receipt(&self, hash: Hash) -> Result<Option<Receipt>, RpcError>;

    /// The hash of the canonical block at a height; `None` where there is none yet.
    async fn block_hash(&self, number: u64) -> Result<Option<Hash>, RpcError>;

    /// How many transactions of the account the chain holds up to a height. An endpoint that has pruned it answers with an error.
    async fn count_at(&self, number: u64) -> Result<u64, RpcError>;

    /// The hash of the canonical block at a height, and nonce and hash of each transaction of the account in it.
    async fn sent_in(&self, number: u64) -> Result<(Hash, Vec<(u64, Hash)>), RpcError>;
}

/// Who holds the key.
#[async_trait]
pub trait Signer: Send + Sync + 'static {
    /// The signed bytes of the intent with exactly this nonce and these fees, and the hash of the transaction. Asked for again when it
    /// takes longer than an answer may take; what was given up is not sent.
    async fn sign(&self, intent: &Intent, nonce: u64, fees: Fees) -> Result<(Vec<u8>, Hash), Refused>;
}

/// A call to the chain that was not answered.
#[derive(Debug, Error)]
#[error("the chain was not read: {0}")]
pub struct RpcError(pub String);

/// A signature that was not given.
#[derive(Debug, Error)]
#[error("not signed: {why}")]
pub struct Refused {
    pub why: String,
    /// Asking again is of no use: an intent that was never signed is dead.
    pub forever: bool,
}

/// How often the driver looks, and how much it asks at once.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Between two looks at the heads, and the most that is waited after failures.
    pub head: Duration,
    pub head_backoff: Duration,
    /// Between two looks at what is due.
    pub tick: Duration,
    /// The longest that one action may take. Not longer than the policy's `answer_ms`.
    pub answer: Duration,
    /// How many actions are under way at once.
    pub at_once: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(2),
            head_backoff: Duration::from_secs(60),
            tick: Duration::from_millis(500),
            answer: Duration::from_secs(30),
            at_once: 16,
        }
    }
}

/// Why the driver did not do what it was asked.
#[derive(Debug, Error)]
pub enum DriverError {
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    #[error("the outbox has stopped")]
    Stopped,
}

type Reply<T> = oneshot::Sender<Result<T, OutboxError>>;

enum Command {
    Plan(Intent, Reply<Row>),
    Row(String, Reply<Option<Row>>),
    Open(Reply<Vec<Change>>),
    Newest(usize, Reply<Vec<Row>>),
}

/// An outbox at work. Dropping it ends its task soon; [`Driver::stop`] waits for that.
pub struct Driver {
    commands: mpsc::Sender<Command>,
    changes: broadcast::Sender<Change>,
    task: JoinHandle<()>,
}

impl Driver {
    /// Starts the task. The endpoint does not have to answer yet.
    pub fn start<L: Ledger>(outbox: Outbox<L>, rpc: Arc<dyn Rpc>, signer: Arc<dyn Signer>, pace: Pace) -> Self {
        let (commands, inbox) = mpsc::channel(64);
        let changes = broadcast::Sender::new(1_024);
        let hands = Hands { rpc, signer, slots: Arc::new(Semaphore::new(pace.at_once.max(1))), pace };
        let task = tokio::spawn(run(outbox, hands, inbox, changes.clone()));
        Self { commands, changes, task }
    }

    /// Takes an intent; it is on disk when this returns. See [`Outbox::plan`].
    pub async fn plan(&self, intent: Intent) -> Result<Row, DriverError> {
        self.ask(|reply| Command::Plan(intent, reply)).await
    }

    /// The row of a key, closed ones too.
    pub async fn row(&self, key: String) -> Result<Option<Row>, DriverError> {
        self.ask(|reply| Command::Row(key, reply)).await
    }

    /// Every row that is not closed, with what holds it up.
    pub async fn open_rows(&self) -> Result<Vec<Change>, DriverError> {
        self.ask(Command::Open).await
    }

    /// The newest rows, closed ones too, newest first.
    pub async fn newest(&self, limit: usize) -> Result<Vec<Row>, DriverError> {
        self.ask(|reply| Command::Newest(limit, reply)).await
    }

    /// Each change from now on. A reader that falls more than 1,024 behind is told so by the channel and asks for the rows again.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// Ends the task and waits for it, then the ledger is closed. What is under way is given up: a transaction that left may be mined,
    /// and the next start finds it.
    pub async fn stop(self) {
        drop(self.commands);
        if let Err(error) = self.task.await {
            warn!(%error, "The outbox did not end well.");
        }
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, DriverError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| DriverError::Stopped)?;
        Ok(answer.await.map_err(|_| DriverError::Stopped)??)
    }
}

/// Between two events of the loop.
enum Wake {
    Asked(Command),
    Answered(Event),
    Head(Result<View, RpcError>),
    Tick,
}

async fn run<L: Ledger>(outbox: Outbox<L>, hands: Hands, mut inbox: mpsc::Receiver<Command>, changes: broadcast::Sender<Change>) {
    let pace = hands.pace;
    let (mut work, mut heads) = (JoinSet::new(), JoinSet::new());
    let (mut head_at, mut head_failures, mut disk_failures) = (Instant::now(), 0_u32, 0_u32);
    let mut due_at = Instant::now();
    let mut outbox = Some(outbox);
    loop {
        if heads.is_empty() && head_at <= Instant::now() {
            let (rpc, limit) = (hands.rpc.clone(), pace.answer);
            heads.spawn(async move {
                timeout(limit, rpc.view()).await.unwrap_or_else(|_| Err(RpcError("no answer in time".to_owned())))
            });
        }
        let tick_at = Instant::now() + pace.tick;
        let wake = tokio::select! {
            command = inbox.recv() => match command {
                Some(command) => Wake::Asked(command),
                None => break,
            },
            // A task that panicked has answered nothing; its question is overdue after a while.
            Some(answer) = work.join_next() => answer.map_or(Wake::Tick, Wake::Answered),
            Some(view) = heads.join_next() => Wake::Head(view.unwrap_or_else(|error| Err(RpcError(error.to_string())))),
            () = sleep_until(tick_at) => Wake::Tick,
        };
        let wake = match wake {
            Wake::Head(view) => {
                head_failures = if view.is_ok() { 0 } else { head_failures.saturating_add(1) };
                head_at = Instant::now() + (pace.head * (1 << head_failures.min(10))).min(pace.head.max(pace.head_backoff));
                match view {
                    Ok(view) => Wake::Answered(Event::Head(view)),
                    Err(error) => {
                        debug!(%error, failures = head_failures, "The heads were not read.");
                        Wake::Tick
                    }
                }
            }
            wake => wake,
        };
        let is_due = due_at <= Instant::now();
        // The disk takes its time, and the runtime's threads are not there to wait for it.
        let turned = blocking(&mut outbox, move |outbox| turn(outbox, wake, is_due)).await;
        let Some(turned) = turned else { break };
        for change in turned.changes {
            // Nobody may be listening.
            let _ = changes.send(change);
        }
        for action in turned.actions {
            work.spawn(hands.clone().carry_out(action));
        }
        if turned.has_failed {
            // A disk that is full now is full in a moment too.
            disk_failures = disk_failures.saturating_add(1);
            due_at = Instant::now() + (pace.tick * (1 << disk_failures.min(10))).min(pace.head_backoff);
        } else if is_due {
            disk_failures = 0;
        }
    }
    work.shutdown().await;
    heads.shutdown().await;
}

#[derive(Default)]
struct Turned {
    changes: Vec<Change>,
    actions: Vec<Action>,
    has_failed: bool,
}

/// One turn of the machine: what happened, and what is due then.
fn turn<L: Ledger>(outbox: &mut Outbox<L>, wake: Wake, is_due: bool) -> Turned {
    let mut turned = Turned::default();
    let now_ms =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
    // Whoever asked may have left; what was asked is done all the same.
    match wake {
        Wake::Asked(Command::Plan(intent, reply)) => {
            let row = outbox.plan(intent, now_ms);
            turned.changes.extend(row.iter().map(|row| Change { row: row.clone(), stuck: None }));
            let _ = reply.send(row);
        }
        Wake::Asked(Command::Row(key, reply)) => drop(reply.send(outbox.row(&key))),
        Wake::Asked(Command::Open(reply)) => drop(reply.send(Ok(outbox.open_rows()))),
        Wake::Asked(Command::Newest(limit, reply)) => drop(reply.send(outbox.newest(limit))),
        Wake::Answered(event) => match outbox.on(now_ms, event) {
            Ok(changes) => turned.changes.extend(changes),
            Err(error) => {
                warn!(%error, "The outbox could not keep what has happened; it asks again.");
                turned.has_failed = true;
            }
        },
        Wake::Head(_) | Wake::Tick => {}
    }
    if is_due && !turned.has_failed {
        match outbox.due(now_ms) {
            Ok(due) => {
                turned.changes.extend(due.changes);
                turned.actions = due.actions;
            }
            Err(error) => {
                warn!(%error, "The outbox does nothing while its ledger fails.");
                turned.has_failed = true;
            }
        }
    }
    turned
}

/// Lends the machine to a thread that may block. `None` after a panic there: what is on disk is right, and a new start reads it.
async fn blocking<M: Send + 'static, T: Send + 'static>(
    machine: &mut Option<M>,
    work: impl FnOnce(&mut M) -> T + Send + 'static,
) -> Option<T> {
    let mut lent = machine.take()?;
    let done = tokio::task::spawn_blocking(move || {
        let result = work(&mut lent);
        (lent, result)
    });
    match done.await {
        Ok((lent, result)) => {
            *machine = Some(lent);
            Some(result)
        }
        Err(error) => {
            warn!(%error, "The outbox has stopped.");
            None
        }
    }
}

/// What carries actions out.
#[derive(Clone)]
struct Hands {
    rpc: Arc<dyn Rpc>,
    signer: Arc<dyn Signer>,
    slots: Arc<Semaphore>,
    pace: Pace,
}

impl Hands {
    async fn carry_out(self, action: Action) -> Event {
        let limit = self.pace.answer;
        match action {
            Action::Sign { key, id, intent, nonce, fees } => {
                // A person may have to be asked: that must not keep the chain's slots.
                let given_up = || Refused { why: "the signer did not answer in time".to_owned(), forever: false };
                match timeout(limit, self.signer.sign(&intent, nonce, fees)).await.unwrap_or_else(|_| Err(given_up())) {
                    Ok((raw, hash)) => Event::Signed { key, id, raw, hash },
                    Err(Refused { why, forever }) => Event::Refused { key, id, why, forever },
                }
            }
            Action::Broadcast { key, id, raw } => {
                let sent = self.within(limit, self.rpc.send_raw(&raw)).await;
                Event::Sent { key, id, outcome: sent.unwrap_or(Err(SendError::Unreachable)) }
            }
            Action::Look { key, id, hashes, height } => match self.within(limit, self.look(&hashes, height)).await {
                Some(Ok((receipt, canonical))) => Event::Looked { key, id, receipt, canonical },
                failed => self.failed(key, id, failed.and_then(Result::err)),
            },
            Action::Find { key, id, nonce } => match self.within(limit, self.find(nonce)).await {
                Some(Ok(used)) => Event::Found { key, id, used },
                failed => self.failed(key, id, failed.and_then(Result::err)),
            },
        }
    }

    fn failed(&self, key: String, id: u64, error: Option<RpcError>) -> Event {
        debug!(key, error = error.map_or("no answer in time".to_owned(), |error| error.to_string()), "The chain was not read.");
        Event::Failed { key, id }
    }

    async fn within<T>(&self, limit: Duration, call: impl Future<Output = T>) -> Option<T> {
        let slotted = async {
            let _slot = self.slots.acquire().await.ok()?;
            Some(call.await)
        };
        timeout(limit, slotted).await.ok().flatten()
    }

    async fn look(&self, hashes: &[Hash], height: Option<u64>) -> Result<(Option<Receipt>, Option<Hash>), RpcError> {
        let mut receipt = None;
        for hash in hashes {
            receipt = self.rpc.receipt(*hash).await?;
            if receipt.is_some() {
                break;
            }
        }
        // After the receipt: a reorg between the two shows as a difference, the other way round it would not.
        let canonical = match height {
            Some(height) => self.rpc.block_hash(height).await?,
            None => None,
        };
        Ok((receipt, canonical))
    }

    /// Goes back from the newest block in growing steps until the nonce is free, then halves the way to the block that used it. The
    /// transaction is shown or there is no answer.
    async fn find(&self, nonce: u64) -> Result<Option<Used>, RpcError> {
        let view = self.rpc.view().await?;
        if view.count <= nonce {
            return Ok(None);
        }
        let (mut used_at, mut step) = (view.latest.number, 1);
        let mut free_at = loop {
            let Some(before) = used_at.checked_sub(step).or((used_at > 0).then_some(0)) else { return Ok(None) };
            if self.rpc.count_at(before).await? <= nonce {
                break before;
            }
            (used_at, step) = (before, step * 2);
        };
        while used_at - free_at > 1 {
            let middle = free_at + (used_at - free_at) / 2;
            if self.rpc.count_at(middle).await? > nonce { used_at = middle } else { free_at = middle }
        }
        let (hash, sent) = self.rpc.sent_in(used_at).await?;
        let by = sent.into_iter().find(|(used, _)| *used == nonce).map(|(_, by)| by);
        Ok(by.map(|by| Used { by, block: BlockRef { number: used_at, hash } }))
    }
}

#[cfg(test)]
mod tests;
