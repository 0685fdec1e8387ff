//! Reading the chain: blocks, and what the contracts hold.

use std::sync::Arc;

use ethers::abi::Detokenize;
use ethers::contract::FunctionCall;
use ethers::providers::{JsonRpcClient, Middleware, Provider};
use ethers::types::{Address, BlockId, BlockNumber, U256};
use fabstir_plugin_api::prelude::*;

use crate::config::Settings;
use crate::contracts::escrow::{self, ComputeEscrow};
use crate::contracts::nodes::NodeRegistry;
use crate::contracts::proofs::ProofHub;
use crate::error::unread;
use crate::hex::{account_text, amount, hash_text};

/// The contracts, read through an endpoint or several.
pub struct Reading<C> {
    provider: Arc<Provider<C>>,
    escrow: ComputeEscrow<Provider<C>>,
    nodes: NodeRegistry<Provider<C>>,
    proofs: ProofHub<Provider<C>>,
}

impl<C: JsonRpcClient + 'static> Reading<C> {
    pub fn new(provider: Arc<Provider<C>>, settings: &Settings) -> Self {
        let escrow = ComputeEscrow::new(settings.escrow, provider.clone());
        let nodes = NodeRegistry::new(settings.nodes, provider.clone());
        let proofs = ProofHub::new(settings.proofs, provider.clone());
        Self { provider, escrow, nodes, proofs }
    }

    pub async fn heads(&self) -> Result<Heads> {
        let (latest, safe, final_) = tokio::try_join!(self.head(Sure::Latest), self.head(Sure::Safe), self.head(Sure::Final))?;
        Ok(Heads { latest, safe, final_ })
    }

    async fn head(&self, sure: Sure) -> Result<Block> {
        let found = self.provider.get_block(tag(sure)).await.map_err(unread)?;
        // A node that has just begun has no safe block yet.
        let block = found.ok_or_else(|| PluginError::unavailable(format!("the endpoint knows no {sure:?} block")))?;
        let (Some(number), Some(hash)) = (block.number, block.hash) else {
            return Err(PluginError::unavailable("the endpoint gave a block without a number"));
        };
        Ok(Block { number: number.as_u64(), hash: hash_text(hash), time_s: seconds(block.timestamp)? })
    }

    pub async fn job(&self, job: JobId, sure: Sure) -> Result<Job> {
        let none = || PluginError::not_found(format!("no job {job} was posted"));
        let view = self.held(self.escrow.jobs(job.into()), sure).await?.ok_or_else(none)?;
        let state = match view.state {
            0 => return Err(none()),
            1 => JobState::Open,
            2 => JobState::Claimed,
            3 => JobState::Delivered,
            4 => JobState::Proven,
            5 => JobState::Challenged,
            6 => JobState::Settled,
            7 => JobState::Refunded,
            _ => JobState::Unknown,
        };
        let is_over = matches!(state, JobState::Settled | JobState::Refunded);
        Ok(Job {
            client: account_text(view.client),
            input_commitment: hash_text(view.input_commitment),
            host: (!view.host.is_zero()).then(|| account_text(view.host)),
            until_s: (!is_over).then_some(view.deadline),
            attempts: view.attempts,
            proven: view.proven,
            terms: terms(view),
            state,
        })
    }

    pub async fn subject(&self, job: JobId, sure: Sure) -> Result<Hash32> {
        let state = self.job(job, sure).await?.state;
        if matches!(state, JobState::Open | JobState::Claimed) {
            return Err(PluginError::not_found(format!("job {job} is not delivered yet, so no proof can name it")));
        }
        let word = self.held(self.escrow.statement_of(job.into()), sure).await?;
        word.map(hash_text).ok_or_else(|| PluginError::not_found(format!("no job {job} was posted")))
    }

    pub async fn proof_statement(&self, kind: u8, program: [u8; 32]) -> Result<String> {
        let says = self.proofs.statement_of(kind, program).call().await.map_err(unread)?;
        match says.is_empty() {
            true => Err(PluginError::not_found(format!("no contract checks proofs of kind {kind} of {}", hash_text(program)))),
            false => Ok(says),
        }
    }

    pub async fn draw(&self, job: JobId) -> Result<Hash32> {
        let view = self.held(self.escrow.jobs(job.into()), Sure::Latest).await?;
        let Some(traced_at) = view.map(|view| view.traced_at).filter(|block| *block != 0) else {
            return Err(PluginError::not_found(format!("job {job} has no trace to draw positions of")));
        };
        let block = self.provider.get_block(traced_at + 1).await.map_err(unread)?;
        let hash = block.and_then(|block| block.hash);
        hash.map(hash_text).ok_or_else(|| PluginError::unavailable(format!("block {} is not there yet", traced_at + 1)))
    }

    pub async fn session(&self, session: [u8; 32], sure: Sure) -> Result<Session> {
        let none = || PluginError::not_found(format!("no session {} was opened", hash_text(session)));
        let view = self.held(self.escrow.sessions(session), sure).await?.ok_or_else(none)?;
        let state = match view.state {
            0 => return Err(none()),
            1 => SessionState::Active,
            2 => SessionState::Closing { settle_by_s: view.settle_by },
            3 => SessionState::Settled,
            _ => SessionState::Unknown,
        };
        Ok(Session {
            host: account_text(view.host),
            client: account_text(view.client),
            coin: account_text(view.token),
            deposit: Amount(view.deposit),
            paid: Amount(view.paid),
            expires_s: view.expiry,
            settle_window_s: view.settle_window_secs,
            state,
        })
    }

    /// What the escrow contract holds in the block that is this sure; `None` where that block is older than the contract.
    async fn held<T: Detokenize>(&self, call: FunctionCall<Arc<Provider<C>>, Provider<C>, T>, sure: Sure) -> Result<Option<T>> {
        let error = match call.block(at(sure)).call().await {
            Ok(held) => return Ok(Some(held)),
            Err(error) => error,
        };
        let has_code = async |block: BlockId| match self.provider.get_code(self.escrow.address(), Some(block)).await {
            Ok(code) => Ok(!code.is_empty()),
            Err(error) => Err(unread(error)),
        };
        match !has_code(at(sure)).await? && has_code(at(Sure::Latest)).await? {
            true => Ok(None),
            false => Err(unread(error)),
        }
    }

    pub async fn balances(&self, account: Address) -> Result<Balances> {
        let coin = async { self.provider.get_balance(account, None).await.map_err(unread) };
        let credit = async { self.escrow.credits(Address::zero(), account).call().await.map_err(unread) };
        let returned = async { self.nodes.credits(account).call().await.map_err(unread) };
        let node = async { self.nodes.node(account).call().await.map_err(unread) };
        let (coin, credit, returned, node) = tokio::try_join!(coin, credit, returned, node)?;
        Ok(Balances {
            coin: amount(coin)?,
            credit: amount(credit)?,
            returned: amount(returned)?,
            stake: Amount(node.stake),
            bonded: Amount(node.locked),
            exits_at_s: (node.exit_at != 0).then_some(node.exit_at),
            payout: (!node.payout.is_zero()).then(|| account_text(node.payout)),
        })
    }
}

fn terms(view: escrow::Job) -> JobTerms {
    JobTerms {
        model: hash_text(view.model_id),
        coin: account_text(view.token),
        max_amount: Amount(view.max_amount),
        price_input_per_mtok: Amount(view.price_in_per_m_tok),
        price_output_per_mtok: Amount(view.price_out_per_m_tok),
        max_input_tokens: view.max_in_tokens,
        max_output_tokens: view.max_out_tokens,
        claim_by_s: view.claim_by,
        deliver_s: view.deliver_secs.into(),
        prove_s: view.prove_secs.into(),
        challenge_s: view.challenge_secs.into(),
        resolve_s: view.resolve_secs.into(),
        max_attempts: view.max_attempts,
        host_bond: Amount(view.host_bond),
        challenge_bond: Amount(view.challenge_bond),
        proof_kind: view.proof_kind,
        program: hash_text(view.program_id),
        arbiter: account_text(view.arbiter),
    }
}

pub fn tag(sure: Sure) -> BlockNumber {
    match sure {
        Sure::Latest => BlockNumber::Latest,
        Sure::Safe => BlockNumber::Safe,
        Sure::Final => BlockNumber::Finalized,
    }
}

fn at(sure: Sure) -> BlockId {
    BlockId::Number(tag(sure))
}

fn seconds(time: U256) -> Result<u64> {
    match time.bits() <= 64 {
        true => Ok(time.as_u64()),
        false => Err(PluginError::internal("a block has a time of more than 64 bits")),
    }
}
