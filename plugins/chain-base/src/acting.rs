//! The chain as the outbox sees it, and the question to whoever has the key.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use ethers::providers::{JsonRpcClient, Middleware, Provider, ProviderError, RpcError as _};
use ethers::types::transaction::eip2718::TypedTransaction;
use ethers::types::{Address, BlockId, BlockNumber, Bytes, Eip1559TransactionRequest, H256, TransactionReceipt, U256};
use ethers::utils::keccak256;
use fabstir_plugin_api::prelude::*;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::hex::account_text;
use crate::outbox::{BlockRef, Fees, Hash, Intent, Receipt, Refused, Rpc, RpcError, SendError, Signer, View};
use crate::rpc::{CallError, Pinned, Pool};
use crate::signed;

/// What is offered to block producers where the chain's recent blocks say nothing: a thousandth of a gwei, which Base's need.
const LEAST_PRIORITY: u128 = 1_000_000;
/// How many of the last blocks say what others pay.
const BLOCKS_OF_FEES: u64 = 5;

/// A part of the chain that could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    #[error(transparent)]
    Provider(#[from] ProviderError),
    #[error("the endpoint has no {0}")]
    Missing(&'static str),
}

/// How the chain and an account stand, by one endpoint.
async fn view<C: JsonRpcClient>(provider: &Provider<C>, account: Address) -> Result<View, Unread> {
    let latest = block(provider, BlockNumber::Latest).await?;
    let (safe, finalized) = tokio::try_join!(block(provider, BlockNumber::Safe), block(provider, BlockNumber::Finalized))?;
    let at = |number: u64| Some(BlockId::Number(number.into()));
    let count = async { provider.get_transaction_count(account, at(latest.number)).await.map_err(Unread::from) };
    let safe_count = async { provider.get_transaction_count(account, at(safe.number)).await.map_err(Unread::from) };
    let (count, safe_count, fees) = tokio::try_join!(count, safe_count, fees(provider))?;
    Ok(View { latest, safe, finalized, count: count.as_u64(), safe_count: safe_count.as_u64(), fees })
}

async fn block<C: JsonRpcClient>(provider: &Provider<C>, tag: BlockNumber) -> Result<BlockRef, Unread> {
    let block = provider.get_block(tag).await?.ok_or(Unread::Missing("such block"))?;
    match (block.number, block.hash) {
        (Some(number), Some(hash)) => Ok(BlockRef { number: number.as_u64(), hash: hash.0 }),
        _ => Err(Unread::Missing("number for a block")),
    }
}

/// Twice the next block's base fee, which six full blocks in a row may reach, and the median of what others give on top.
pub async fn fees<C: JsonRpcClient>(provider: &Provider<C>) -> Result<Fees, Unread> {
    let history = provider.fee_history(BLOCKS_OF_FEES, BlockNumber::Latest, &[50.0]).await?;
    let next = history.base_fee_per_gas.last().ok_or(Unread::Missing("base fee"))?;
    let mut rewards: Vec<U256> = history.reward.iter().filter_map(|block| block.first().copied()).collect();
    rewards.sort();
    let median = rewards.get(rewards.len() / 2).copied().unwrap_or_default();
    let priority_fee = saturated(median).max(LEAST_PRIORITY);
    Ok(Fees { max_fee: saturated(*next).saturating_mul(2).saturating_add(priority_fee), priority_fee })
}

/// A fee so large that it is above every cap, however large it is.
fn saturated(value: U256) -> u128 {
    if value.bits() > 128 { u128::MAX } else { value.as_u128() }
}

/// The receipt of a transaction, as far as the outbox needs it.
async fn receipt<C: JsonRpcClient>(provider: &Provider<C>, hash: Hash) -> Result<Option<Receipt>, Unread> {
    let Some(found) = provider.get_transaction_receipt(H256(hash)).await? else { return Ok(None) };
    let (Some(number), Some(block)) = (found.block_number, found.block_hash) else { return Ok(None) };
    let succeeded = found.status.ok_or(Unread::Missing("outcome for a transaction"))?.as_u64() == 1;
    Ok(Some(Receipt { hash, block: BlockRef { number: number.as_u64(), hash: block.0 }, succeeded, fee: fee(&found) }))
}

/// All that a transaction cost beside its value: gas, and where the chain posts its blocks to another one, the share of that.
fn fee(receipt: &TransactionReceipt) -> Option<u128> {
    let gas = receipt.gas_used?.checked_mul(receipt.effective_gas_price?)?;
    let below = match receipt.other.get("l1Fee") {
        Some(fee) => serde_json::from_value::<U256>(fee.clone()).ok()?,
        None => U256::zero(),
    };
    let whole = gas.checked_add(below)?;
    (whole.bits() <= 128).then(|| whole.as_u128())
}

/// The hash of the canonical block at a height.
async fn canonical<C: JsonRpcClient>(provider: &Provider<C>, height: u64) -> Result<Option<Hash>, Unread> {
    Ok(provider.get_block(height).await?.and_then(|block| block.hash).map(|hash| hash.0))
}

/// How many transactions of the account the chain holds up to a height.
async fn count_at<C: JsonRpcClient>(provider: &Provider<C>, account: Address, height: u64) -> Result<u64, Unread> {
    Ok(provider.get_transaction_count(account, Some(BlockId::Number(height.into()))).await?.as_u64())
}

/// The account at work on the chain, for the outbox.
pub struct Chained {
    pub pool: Pool,
    pub account: Address,
    /// The final block of the last view: an endpoint that is behind it may be on a fork of the past.
    final_: AtomicU64,
}

impl Chained {
    pub fn new(pool: Pool, account: Address) -> Self {
        Self { pool, account, final_: AtomicU64::new(0) }
    }

    async fn one(&self) -> Result<Provider<Pinned>, RpcError> {
        self.pool.pinned().await.map(Provider::new).map_err(|error| RpcError(error.to_string()))
    }

    /// An endpoint that is not behind what was seen before.
    async fn current(&self) -> Result<Provider<Pinned>, RpcError> {
        let provider = self.one().await?;
        let final_ = block(&provider, BlockNumber::Finalized).await.map_err(unread)?.number;
        match final_ >= self.final_.load(Ordering::Acquire) {
            true => Ok(provider),
            false => Err(RpcError(format!("the endpoint is behind: its final block is {final_}"))),
        }
    }
}

fn unread(error: Unread) -> RpcError {
    RpcError(error.to_string())
}

#[async_trait]
impl Rpc for Chained {
    async fn view(&self) -> Result<View, RpcError> {
        let view = view(&self.one().await?, self.account).await.map_err(unread)?;
        self.final_.fetch_max(view.finalized.number, Ordering::AcqRel);
        Ok(view)
    }

    async fn send_raw(&self, raw: &[u8]) -> Result<(), SendError> {
        match Provider::new(self.pool.clone()).send_raw_transaction(Bytes::from(raw.to_vec())).await {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::warn!(%error, "A transaction was not taken.");
                Err(refusal(&error))
            }
        }
    }

    async fn receipt(&self, hash: Hash) -> Result<Option<Receipt>, RpcError> {
        receipt(&self.current().await?, hash).await.map_err(unread)
    }

    async fn block_hash(&self, number: u64) -> Result<Option<Hash>, RpcError> {
        canonical(&self.current().await?, number).await.map_err(unread)
    }

    async fn count_at(&self, number: u64) -> Result<u64, RpcError> {
        count_at(&self.current().await?, self.account, number).await.map_err(unread)
    }

    async fn sent_in(&self, number: u64) -> Result<(Hash, Vec<(u64, Hash)>), RpcError> {
        let read = self.current().await?.get_block_with_txs(number).await.map_err(|error| unread(error.into()))?;
        let block = read.ok_or_else(|| unread(Unread::Missing("such block")))?;
        let hash = block.hash.ok_or_else(|| unread(Unread::Missing("hash for a block")))?;
        let ours = block.transactions.iter().filter(|sent| sent.from == self.account);
        Ok((hash.0, ours.map(|sent| (sent.nonce.as_u64(), sent.hash.0)).collect()))
    }
}

/// What the words of an endpoint mean; those of geth, reth, erigon and anvil are known.
fn refusal(error: &ProviderError) -> SendError {
    if let Some(CallError::RateLimited { .. }) = CallError::of(error) {
        return SendError::RateLimited;
    }
    let Some(answer) = error.as_error_response() else { return SendError::Unreachable };
    let words = answer.message.to_lowercase();
    let says = |phrases: &[&str]| phrases.iter().any(|phrase| words.contains(phrase));
    if says(&["already known", "already imported", "known transaction"]) {
        SendError::AlreadyKnown
    } else if says(&["nonce too low", "nonce is too low"]) {
        SendError::NonceTooLow
    } else if says(&["underpriced", "fee too low", "less than block base fee", "lower than the block base fee", "tip cap"]) {
        SendError::Underpriced
    } else if says(&["insufficient funds", "insufficient balance"]) {
        SendError::InsufficientFunds
    } else if says(&["rate limit", "too many requests"]) {
        SendError::RateLimited
    } else {
        SendError::Unreachable
    }
}

/// Asks whoever listens to sign.
pub struct Asking {
    pub chain_id: u64,
    pub questions: Arc<Questions>,
}

#[async_trait]
impl Signer for Asking {
    async fn sign(&self, intent: &Intent, nonce: u64, fees: Fees) -> Result<(Vec<u8>, Hash), Refused> {
        let transaction = transaction(self.chain_id, intent, nonce, fees);
        let signature = self.questions.ask(&intent.key, transaction.rlp().to_vec()).await.map_err(|why| match why {
            Some(why) => Refused { why, forever: true },
            None => Refused { why: "nobody who holds the key listens".into(), forever: false },
        })?;
        raw(&transaction, &signature).map_err(|error| Refused { why: error.message, forever: false })
    }
}

/// A transaction that is to be signed.
fn transaction(chain_id: u64, intent: &Intent, nonce: u64, fees: Fees) -> TypedTransaction {
    let request = Eip1559TransactionRequest::new()
        .chain_id(chain_id)
        .to(Address::from(intent.to))
        .value(U256::from(intent.value))
        .data(Bytes::from(intent.data.clone()))
        .gas(intent.gas_limit)
        .nonce(nonce)
        .max_fee_per_gas(U256::from(fees.max_fee))
        .max_priority_fee_per_gas(U256::from(fees.priority_fee))
        .access_list(Vec::new());
    TypedTransaction::Eip1559(request)
}

/// What must be signed, and who waits for it.
#[derive(Default)]
pub struct Questions {
    ids: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Whom to ask: there while the host listens.
    listener: Option<Sender<Signing>>,
    waiting: HashMap<u64, Waiting>,
}

struct Waiting {
    payload: Payload,
    answer: oneshot::Sender<Result<Signature, String>>,
}

impl Questions {
    /// From now on this listener is asked; those who wait for an earlier one wait no more.
    pub fn listen(&self, listener: Sender<Signing>) {
        let mut state = self.state.lock();
        state.waiting.clear();
        state.listener = Some(listener);
    }

    /// Whether nobody listens.
    pub fn is_unheard(&self) -> bool {
        self.state.lock().listener.as_ref().is_none_or(Sender::is_closed)
    }

    /// The signature over the payload; `Err(Some)` is a refusal, `Err(None)`: nobody listens, or nobody does any more.
    pub async fn ask(&self, key: &str, payload: Payload) -> Result<Signature, Option<String>> {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        let listener = {
            let mut state = self.state.lock();
            let listener = state.listener.clone().ok_or(None)?;
            state.waiting.insert(id, Waiting { payload: payload.clone(), answer });
            listener
        };
        let asked = async {
            listener.send(Signing { id, key: key.to_owned(), payload }).await.map_err(|_| None)?;
            tokio::select! {
                answered = answered => answered.map_err(|_| None)?.map_err(Some),
                () = listener.closed() => Err(None),
            }
        };
        let result = asked.await;
        self.state.lock().waiting.remove(&id);
        result
    }

    /// Takes an answer. One that nobody waits for is ignored.
    ///
    /// # Errors
    /// `InvalidArgument` for a signature that is not this account's over what was asked; the question stays.
    pub fn answer(&self, account: Address, answer: Signed) -> Result<()> {
        let mut state = self.state.lock();
        let Some(waiting) = state.waiting.get(&answer.id) else { return Ok(()) };
        let told = match answer.signature {
            Some(signature) => {
                let signer = signed::signer(&waiting.payload, &signature)?;
                if signer != account {
                    let (signer, account) = (account_text(signer), account_text(account));
                    return Err(PluginError::invalid(format!("the signature is {signer}'s, not {account}'s over this payload")));
                }
                Ok(signature)
            }
            None => Err(answer.refusal.unwrap_or_else(|| "it was not signed, and no reason was given".into())),
        };
        if let Some(waiting) = state.waiting.remove(&answer.id) {
            // Who asked may have given up in this moment.
            let _ = waiting.answer.send(told);
        }
        Ok(())
    }
}

/// The bytes of a signed transaction, and its hash.
fn raw(transaction: &TypedTransaction, signature: &[u8]) -> Result<(Vec<u8>, Hash)> {
    let mut signature = signed::signature(signature)?;
    // A transaction says which of two points it is, without the 27 that it has elsewhere.
    signature.v -= 27;
    let raw = transaction.rlp_signed(&signature).to_vec();
    let hash = keccak256(&raw);
    Ok((raw, hash))
}
