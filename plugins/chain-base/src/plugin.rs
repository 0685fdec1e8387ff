//! The kind's trait: translation between it and the chain.

use std::sync::Arc;

use async_trait::async_trait;
use ethers::providers::Provider;
use ethers::types::Address;
use fabstir_plugin_api::prelude::*;
use tokio::sync::Mutex;

use crate::config::Settings;
use crate::following::follow;
use crate::log::{self, Reader};
use crate::office::Office;
use crate::price::{Gas, price};
use crate::reading::Reading;
use crate::rpc::{Limits, Pool};
use crate::{act, hex, signed};

/// How many notices wait for a slow reader.
const WAITING_NOTICES: usize = 256;

/// A chain of Ethereum's kind with the market's contracts on it.
pub struct BaseChain {
    host: Host,
    settings: Settings,
    domain: [u8; 32],
    pool: Pool,
    reading: Reading<Pool>,
    /// The account that is acted for.
    office: Mutex<Option<Arc<Office>>>,
}

impl BaseChain {
    pub fn new(host: Host, settings: Settings) -> Result<Self> {
        let pool = Pool::new(&settings.rpc, settings.chain_id, Limits::default());
        let pool = pool.map_err(|error| PluginError::invalid(format!("`rpc`: {error}")))?;
        let reading = Reading::new(Arc::new(Provider::new(pool.clone())), &settings);
        let domain = signed::domain(settings.chain_id, settings.escrow);
        Ok(Self { host, settings, domain, pool, reading, office: Mutex::default() })
    }

    /// The office that is open.
    async fn office(&self) -> Result<Arc<Office>> {
        let none = || PluginError::invalid("no account is acted for: call `begin` first");
        self.office.lock().await.clone().ok_or_else(none)
    }
}

#[async_trait]
impl Chain for BaseChain {
    async fn network(&self, _: &Cx) -> Result<ChainNetwork> {
        let Settings { escrow, nodes, models, proofs, chain_id, .. } = self.settings;
        Ok(ChainNetwork {
            chain: format!("eip155:{chain_id}"),
            coin: "ETH".into(),
            contracts: [escrow, nodes, models, proofs].map(hex::account_text).into(),
            domain: hex::hash_text(self.domain),
        })
    }

    async fn heads(&self, _: &Cx) -> Result<Heads> {
        self.reading.heads().await
    }

    async fn events(&self, _: &Cx, since: Since) -> Result<Stream<Notice>> {
        let after = match since {
            Since::Beginning => None,
            Since::After(cursor) => {
                Some(cursor.0.parse::<log::Cursor>().map_err(|error| PluginError::invalid(error.to_string()))?)
            }
        };
        let reader = Reader::new(self.settings.first_block, after);
        let (listener, stream) = Stream::channel(WAITING_NOTICES);
        tokio::spawn(follow(self.pool.clone(), self.settings.escrow, reader, self.settings.poll, listener));
        Ok(stream)
    }

    async fn job(&self, _: &Cx, job: JobId, sure: Sure) -> Result<Job> {
        self.reading.job(job, sure).await
    }

    async fn subject(&self, _: &Cx, job: JobId, sure: Sure) -> Result<Hash32> {
        self.reading.subject(job, sure).await
    }

    async fn proof_statement(&self, _: &Cx, kind: u8, program: Hash32) -> Result<String> {
        self.reading.proof_statement(kind, hex::hash("program", &program)?).await
    }

    async fn draw(&self, _: &Cx, job: JobId) -> Result<Hash32> {
        self.reading.draw(job).await
    }

    async fn session(&self, _: &Cx, session: SessionId, sure: Sure) -> Result<Session> {
        self.reading.session(hex::hash("session", &session)?, sure).await
    }

    async fn balances(&self, _: &Cx, account: Account) -> Result<Balances> {
        self.reading.balances(hex::account("account", &account)?).await
    }

    async fn model_id(&self, _: &Cx, digest: String) -> Result<ModelId> {
        signed::model_id(&digest)
    }

    async fn offer_payload(&self, _: &Cx, terms: Terms) -> Result<Payload> {
        signed::offer(self.domain, &terms)
    }

    async fn session_id(&self, _: &Cx, terms: Terms) -> Result<SessionId> {
        // Terms that cannot be offered make no session, even where what is wrong with them is not part of its name.
        signed::offer(self.domain, &terms)?;
        signed::session_id(self.settings.chain_id, self.settings.escrow, &terms)
    }

    async fn voucher_payload(&self, _: &Cx, voucher: Voucher) -> Result<Payload> {
        signed::voucher(self.domain, &voucher)
    }

    async fn signer(&self, _: &Cx, payload: Payload, signature: Signature) -> Result<Account> {
        signed::signer(&payload, &signature).map(hex::account_text)
    }

    async fn begin(&self, _: &Cx, account: Account) -> Result<Stream<Signing>> {
        let account = hex::account("account", &account)?;
        let mut office = self.office.lock().await;
        match &*office {
            Some(open) if open.account == account => {}
            // Whoever listened has gone: so may the other account.
            Some(open) if open.questions.is_unheard() => {
                if let Some(open) = office.take() {
                    open.close().await;
                }
            }
            Some(open) => {
                let other = hex::account_text(open.account);
                return Err(PluginError::invalid(format!("{other} is acted for: drop its stream first")));
            }
            None => {}
        }
        let open = match &*office {
            Some(open) => open.clone(),
            None => {
                let open = Office::open(self.host.state_dir(), &self.settings, self.pool.clone(), account).await?;
                office.insert(Arc::new(open)).clone()
            }
        };
        let (listener, stream) = Stream::channel(16);
        open.questions.listen(listener);
        Ok(stream)
    }

    async fn signed(&self, _: &Cx, answer: Signed) -> Result<()> {
        let office = self.office().await?;
        office.questions.answer(office.account, answer)
    }

    async fn act(&self, _: &Cx, order: Order) -> Result<Progress> {
        self.office().await?.act(&self.settings, order).await
    }

    async fn progress(&self, _: &Cx, key: String) -> Result<Progress> {
        self.office().await?.progress(key).await
    }

    async fn progresses(&self, _: &Cx) -> Result<Stream<Progress>> {
        self.office().await?.progresses().await
    }

    async fn quote(&self, _: &Cx, act: Act) -> Result<Quote> {
        let account: Address = self.office().await?.account;
        let call = act::call(&self.settings, account, &act)?;
        let gas = Gas { limit: act::gas(&act, &call.data), likely: act::likely_gas(&act, &call.data) };
        price(&self.pool, account, call, gas, self.settings.max_fee_per_gas).await
    }
}

#[async_trait]
impl Lifecycle for BaseChain {
    async fn shutdown(&self) {
        if let Some(office) = self.office.lock().await.take() {
            office.close().await;
        }
    }
}
