//! What a call would cost now, and whether it would be refused. Nothing is sent.

use ethers::abi::AbiDecode;
use ethers::providers::{Middleware, Provider, ProviderError, RpcError};
use ethers::types::transaction::eip2718::TypedTransaction;
use ethers::types::{Address, BlockNumber, Bytes, Eip1559TransactionRequest, H160, U256};
use ethers::utils::id;
use fabstir_plugin_api::prelude::*;

use crate::act::Call;
use crate::acting::fees;
use crate::contracts::{escrow, nodes};
use crate::error::unread;
use crate::hex::amount;
use crate::rpc::Pool;

/// Where chains of the OP Stack say what posting a transaction to the layer below costs.
const GAS_PRICE_ORACLE: H160 = H160([0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x0f]);

/// The gas of a call.
pub struct Gas {
    /// The most that it may use.
    pub limit: u64,
    /// What it uses, as far as one can tell without having tried.
    pub likely: u64,
}

/// `cap` is the most that is offered for a unit of gas.
pub async fn price(pool: &Pool, account: Address, call: Call, gas: Gas, cap: u128) -> Result<Quote> {
    let Gas { limit, likely } = gas;
    let provider = Provider::new(pool.pinned().await.map_err(unread)?);
    let transaction = transaction(account, call);
    let (gas, refusal) = match provider.estimate_gas(&transaction, None).await {
        Ok(gas) => (gas, None),
        Err(error) => (U256::from(likely), Some(refusal(&error).ok_or_else(|| unread(error))?)),
    };
    let history = provider.fee_history(1_u64, BlockNumber::Latest, &[50.0]).await.map_err(unread)?;
    let base = history.base_fee_per_gas.last().copied().unwrap_or_default();
    let reward = history.reward.first().and_then(|block| block.first()).copied().unwrap_or_default();
    let here = gas.saturating_mul(base.saturating_add(reward));
    let below = posting(&provider, &transaction).await?;
    let offered = fees(&provider).await.map_err(unread)?.within(cap);
    let most = Some(Amount(offered.max_fee.saturating_mul(limit.into())));
    Ok(Quote { fee: amount(here.saturating_add(below))?, most, refusal })
}

/// Why a call would have been refused after this block; `None` where it would not have been, or that cannot be read.
pub async fn refused(pool: &Pool, account: Address, call: Call, block: u64) -> Option<String> {
    let provider = Provider::new(pool.clone());
    match provider.call(&transaction(account, call), Some(block.into())).await {
        Ok(_) => None,
        Err(error) => refusal(&error),
    }
}

fn transaction(account: Address, call: Call) -> TypedTransaction {
    let request =
        Eip1559TransactionRequest::new().from(account).to(call.to).value(U256::from(call.value)).data(Bytes::from(call.data));
    TypedTransaction::Eip1559(request)
}

/// The share of the layer below; nothing on a chain that has no such layer.
async fn posting<C: ethers::providers::JsonRpcClient>(provider: &Provider<C>, transaction: &TypedTransaction) -> Result<U256> {
    if provider.get_code(GAS_PRICE_ORACLE, None).await.map_err(unread)?.is_empty() {
        return Ok(U256::zero());
    }
    let data = ethers::abi::encode(&[ethers::abi::Token::Bytes(transaction.rlp().to_vec())]);
    let question = Eip1559TransactionRequest::new().to(GAS_PRICE_ORACLE).data([&id("getL1Fee(bytes)")[..], &data].concat());
    let answer = provider.call(&TypedTransaction::Eip1559(question), None).await.map_err(unread)?;
    if answer.len() != 32 {
        return Err(unread(format!("the gas price oracle answered {} bytes where 32 are due", answer.len())));
    }
    Ok(U256::from_big_endian(&answer))
}

/// The chain's own refusal, in words; `None` where the chain did not answer.
fn refusal(error: &ProviderError) -> Option<String> {
    let answer = error.as_error_response()?;
    let is_refusal = answer.message.to_lowercase().contains("revert") || answer.code == 3;
    let reason = answer.data.as_ref().and_then(|data| data.as_str()).and_then(|data| data.parse::<Bytes>().ok()).and_then(reason);
    match reason {
        Some(reason) => Some(reason),
        None if is_refusal || answer.message.to_lowercase().contains("insufficient funds") => Some(answer.message.clone()),
        None => None,
    }
}

fn reason(data: Bytes) -> Option<String> {
    if let Ok(error) = escrow::ComputeEscrowErrors::decode(&data) {
        return Some(format!("{error:?}"));
    }
    nodes::NodeRegistryErrors::decode(&data).ok().map(|error| format!("{error:?}"))
}
