//! One account at work: its outbox, the orders in it, and how far they are.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use ethers::abi::AbiDecode;
use ethers::contract::EthCall;
use ethers::providers::{Middleware, Provider};
use ethers::types::{Address, H256};
use fabstir_plugin_api::prelude::*;
use parking_lot::Mutex;
use tokio::sync::RwLock;
use tokio::sync::broadcast::error::RecvError;

use crate::act::Call;
use crate::acting::{Asking, Chained, Questions};
use crate::config::Settings;
use crate::contracts::escrow::{OpenSessionCall, PostJobCall};
use crate::error::unread;
use crate::outbox::{
    Change, Driver, DriverError, Intent, LedgerError, Outbox, OutboxError, Pace, Policy, Receipt, RedbLedger, Row, State, Stuck,
};
use crate::rpc::Pool;
use crate::{act, hex, price, signed, tell};

/// How many orders are told at once where a reader fell behind.
const NEWEST: usize = 1024;

pub struct Office {
    pub account: Address,
    pub questions: Arc<Questions>,
    chain_id: u64,
    escrow: Address,
    pool: Pool,
    /// `None` once it is closed.
    driver: RwLock<Option<Driver>>,
    /// The number of each job that an order has posted, by the transaction.
    posted: Mutex<HashMap<[u8; 32], JobId>>,
}

impl Office {
    /// Takes up what the account has under way. Needs no endpoint.
    ///
    /// # Errors
    /// `Unavailable` where another process has the account's outbox open.
    pub async fn open(folder: &Path, settings: &Settings, pool: Pool, account: Address) -> Result<Self> {
        let owner = format!("eip155:{}:{account:#x}", settings.chain_id);
        let path = folder.join(format!("outbox-{}-{account:#x}.redb", settings.chain_id));
        let patience_ms = settings.patience.as_millis() as u64;
        let query_ms = settings.poll.as_millis() as u64;
        let policy = Policy { patience_ms, query_ms, ..Policy::default() };
        let outbox = tokio::task::spawn_blocking(move || Outbox::open(RedbLedger::open(&path, &owner)?, policy)).await;
        let outbox = outbox.map_err(|error| PluginError::internal(format!("the outbox cannot be opened: {error}")))?;
        let outbox = outbox.map_err(outbox_error)?;
        let questions = Arc::<Questions>::default();
        let pace = Pace { head: settings.poll, tick: settings.poll.min(Pace::default().tick), ..Pace::default() };
        let chained = Arc::new(Chained::new(pool.clone(), account));
        let asking = Arc::new(Asking { chain_id: settings.chain_id, questions: questions.clone() });
        Ok(Self {
            account,
            questions,
            chain_id: settings.chain_id,
            escrow: settings.escrow,
            pool,
            driver: RwLock::new(Some(Driver::start(outbox, chained, asking, pace))),
            posted: Mutex::default(),
        })
    }

    /// Ends the work; what is under way stays in the ledger.
    pub async fn close(&self) {
        if let Some(driver) = self.driver.write().await.take() {
            driver.stop().await;
        }
    }

    pub async fn act(&self, settings: &Settings, order: Order) -> Result<Progress> {
        let call = act::call(settings, self.account, &order.act)?;
        let intent = Intent {
            key: order.key,
            to: call.to.0,
            value: call.value,
            gas_limit: act::gas(&order.act, &call.data),
            data: call.data,
            deadline_s: None,
            fee_cap: settings.max_fee_per_gas,
        };
        let row = self.with(async |driver| driver.plan(intent).await).await?;
        self.progress_of(Change { row, stuck: None }).await
    }

    pub async fn progress(&self, key: String) -> Result<Progress> {
        let row = self.with(async |driver| driver.row(key.clone()).await).await?;
        let row = row.ok_or_else(|| PluginError::not_found(format!("no order has the key `{key}`")))?;
        let open = self.with(async |driver| driver.open_rows().await).await?;
        let stuck = open.into_iter().find(|change| change.row.intent.key == key).and_then(|change| change.stuck);
        self.progress_of(Change { row, stuck }).await
    }

    pub async fn progresses(self: Arc<Self>) -> Result<Stream<Progress>> {
        // Listened to before the open ones are read: nothing falls between the two.
        let mut changes = self.with(async |driver| Ok(driver.changes())).await?;
        let open = self.with(async |driver| driver.open_rows().await).await?;
        let (listener, stream) = Stream::channel(64);
        tokio::spawn(async move {
            let mut next = open;
            loop {
                for change in next {
                    if listener.send(self.told(change).await).await.is_err() {
                        return;
                    }
                }
                let received = tokio::select! {
                    received = changes.recv() => received,
                    () = listener.closed() => return,
                };
                next = match received {
                    Ok(change) => vec![change],
                    // Each order's newest state makes up for what was missed.
                    Err(RecvError::Lagged(_)) => match self.with(async |driver| driver.newest(NEWEST).await).await {
                        Ok(rows) => rows.into_iter().map(|row| Change { row, stuck: None }).collect(),
                        Err(error) => {
                            listener.try_fail(error);
                            return;
                        }
                    },
                    Err(RecvError::Closed) => return,
                };
            }
        });
        Ok(stream)
    }

    async fn with<T>(&self, work: impl AsyncFnOnce(&Driver) -> Result<T, DriverError>) -> Result<T> {
        let driver = self.driver.read().await;
        let driver = driver.as_ref().ok_or_else(|| PluginError::unavailable("the account is acted for no more"))?;
        work(driver).await.map_err(|error| match error {
            DriverError::Outbox(error) => outbox_error(error),
            DriverError::Stopped => PluginError::unavailable("the outbox has stopped: its log says why"),
        })
    }

    /// A change on the stream: what an order has made may be told later, where it cannot be read now.
    async fn told(&self, change: Change) -> Progress {
        match self.progress_of(change.clone()).await {
            Ok(progress) => progress,
            Err(error) => {
                tracing::debug!(order = %change.row.intent.key, %error, "What an order has made is not known yet.");
                progress_without(change, None)
            }
        }
    }

    async fn progress_of(&self, change: Change) -> Result<Progress> {
        let made = self.made(&change.row).await?;
        let refused = receipt(&change.row.state).filter(|receipt| !receipt.succeeded);
        let why = match refused {
            Some(receipt) => Some(self.refusal(&change.row.intent, receipt.block.number).await),
            None => None,
        };
        let progress = progress_without(change, made);
        Ok(Progress { why: why.or(progress.why), ..progress })
    }

    /// Why the contract refused a call, by asking again what the block before says to it.
    async fn refusal(&self, intent: &Intent, block: u64) -> String {
        let call = Call { to: intent.to.into(), value: intent.value, data: intent.data.clone() };
        let why = price::refused(&self.pool, self.account, call, block.saturating_sub(1)).await;
        why.unwrap_or_else(|| "the contract refused it; why cannot be read any more".into())
    }

    /// What the order of a row has made: the session's id, which follows from its terms, or the job's number, which the chain gives.
    async fn made(&self, row: &Row) -> Result<Option<String>> {
        let Some(receipt) = receipt(&row.state).filter(|receipt| receipt.succeeded) else { return Ok(None) };
        let data = &row.intent.data;
        if data.starts_with(&OpenSessionCall::selector()) {
            let call = OpenSessionCall::decode(data);
            let call = call.map_err(|error| PluginError::internal(format!("an order cannot be read back: {error}")))?;
            return signed::session_id(self.chain_id, self.escrow, &tell::session_terms(call.t)).map(Some);
        }
        if data.starts_with(&PostJobCall::selector()) {
            return self.posted(receipt.hash).await.map(|job| Some(job.to_string()));
        }
        Ok(None)
    }

    async fn posted(&self, transaction: [u8; 32]) -> Result<JobId> {
        if let Some(job) = self.posted.lock().get(&transaction) {
            return Ok(*job);
        }
        let provider = Provider::new(self.pool.clone());
        let receipt = provider.get_transaction_receipt(H256(transaction)).await.map_err(unread)?;
        let receipt = receipt.ok_or_else(|| PluginError::unavailable("the transaction's receipt is not there at the moment"))?;
        for log in receipt.logs.into_iter().filter(|log| log.address == self.escrow) {
            if let Some(MarketEvent::JobPosted { job, .. }) = tell::event(log.topics, log.data.to_vec())? {
                self.posted.lock().insert(transaction, job);
                return Ok(job);
            }
        }
        Err(PluginError::internal("the contract took a job and did not say its number"))
    }
}

fn receipt(state: &State) -> Option<Receipt> {
    match state {
        State::Mined(receipt) | State::Safe(receipt) | State::Final(receipt) | State::Reverted(receipt) => Some(*receipt),
        State::Planned | State::Signed | State::Broadcast | State::Replaced { .. } | State::Dead { .. } => None,
    }
}

fn progress_without(Change { row, stuck }: Change, made: Option<String>) -> Progress {
    let receipt = receipt(&row.state);
    let (state, ended) = match &row.state {
        State::Planned => (ProgressState::Planned, None),
        State::Signed | State::Broadcast => (ProgressState::Sent, None),
        State::Mined(Receipt { succeeded: false, .. }) | State::Safe(Receipt { succeeded: false, .. }) => {
            (ProgressState::Reverted { final_: false }, None)
        }
        State::Mined(_) => (ProgressState::Mined, None),
        State::Safe(_) => (ProgressState::Safe, None),
        State::Final(_) => (ProgressState::Final, None),
        State::Reverted(_) => (ProgressState::Reverted { final_: true }, None),
        // Its block may still be taken back, and the order be carried out after all.
        State::Replaced { settled: false, .. } => {
            (ProgressState::Sent, Some("another transaction of this account has taken its nonce".to_owned()))
        }
        State::Replaced { settled: true, .. } => {
            (ProgressState::Dead, Some("another transaction of this account took its nonce".to_owned()))
        }
        State::Dead { why } => (ProgressState::Dead, Some(why.clone())),
    };
    Progress {
        state,
        transaction: receipt.map(|receipt| receipt.hash).or(row.attempts.last().map(|attempt| attempt.hash)).map(hex::hash_text),
        block: receipt.map(|receipt| receipt.block.number),
        fee: receipt.and_then(|receipt| receipt.fee).map(Amount),
        made,
        why: ended.or_else(|| stuck.map(held_up)),
        key: row.intent.key,
    }
}

fn held_up(stuck: Stuck) -> String {
    match stuck {
        Stuck::FeeCap => "it is not taken for the most that `max_fee_per_gas_wei` allows".into(),
        Stuck::InsufficientFunds => "the account cannot pay for it".into(),
        Stuck::Signer { why } => why,
        Stuck::ForeignNonce => "another transaction of this account is in a block that is not safe yet".into(),
        Stuck::NonceUsed => "its nonce is used, and no endpoint shows by what".into(),
        Stuck::NonceGap => "a transaction before it is missing: the next order fills the gap".into(),
    }
}

fn outbox_error(error: OutboxError) -> PluginError {
    match error {
        OutboxError::KeyTaken { .. } | OutboxError::KeyLength { .. } => PluginError::invalid(error.to_string()),
        OutboxError::Full { .. } => PluginError::new(Code::Full, error.to_string()),
        OutboxError::Ledger(LedgerError::Foreign { .. }) => PluginError::invalid(error.to_string()),
        OutboxError::Ledger(LedgerError::Storage(why)) => PluginError::unavailable(format!(
            "the outbox cannot be used: {why}. Another process may act for this account, or the disk may be full"
        )),
        error => PluginError::internal(error.to_string()),
    }
}
