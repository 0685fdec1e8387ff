//! Orders, from here to the chain and back.

use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::chain::{Act, Chain, ChainNetwork, Order, Progress, ProgressState, Quote, Signature, Signed};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::stream::Stream;
use tokio_util::task::AbortOnDropHandle;

use crate::identity::{Account, Policy, Signer};

/// How long a call that asks the chain may take.
const CALL: Duration = Duration::from_secs(30);
/// The most orders of one name that are looked through for the next free one.
const MOST_ORDERS: u32 = 100_000;

/// Why an order was not carried out, or is not known to be.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    #[error(transparent)]
    Plugin(#[from] PluginError),
    #[error("this is not signed: {0}")]
    Unsigned(#[from] crate::identity::Refusal),
    /// What the plugin says of its chain is not what a chain of Ethereum's kind is: nothing can be signed for it safely.
    #[error("the plugin names {0:?}, which this node cannot hold signatures to")]
    Network(String),
    /// Nothing was sent.
    #[error("the contract would refuse this: {0}")]
    Refused(String),
    #[error("the contract refused this, and the fee is gone{}: {}", sent(transaction), why.as_deref().unwrap_or("it does not say why"))]
    Reverted { transaction: Option<String>, why: Option<String> },
    #[error("this was not done, and will not be: {}", why.as_deref().unwrap_or("the plugin does not say why"))]
    Dead { why: Option<String> },
    /// It may still happen.
    #[error(
        "this is not done after {} s{}: the order `{key}` is kept and goes on with the next command that acts for this account{}",
        waited.as_secs(), sent(transaction), why.as_ref().map_or_else(String::new, |why| format!(" ({why})"))
    )]
    Pending { key: String, waited: Duration, transaction: Option<String>, why: Option<String> },
}

fn sent(transaction: &Option<String>) -> String {
    transaction.as_ref().map_or_else(String::new, |hash| format!(" (transaction {hash})"))
}

/// The most that an account spends.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// What one transaction sends along.
    pub value_wei: u128,
    /// What the fees of one transaction, and of one day, can come to.
    pub fee_wei: u128,
    pub daily_fee_wei: u128,
}

/// What may be signed for this network: transactions to the market's contracts on its chain, and its own typed data.
fn policy(network: &ChainNetwork, limits: Limits) -> Result<Policy, DeskError> {
    let wrong = |what: &str| DeskError::Network(what.chars().take(100).collect());
    fn bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        hex::decode_to_slice(text.strip_prefix("0x")?, &mut bytes).ok()?;
        Some(bytes)
    }
    let chain_id = network.chain.strip_prefix("eip155:").and_then(|number| number.parse().ok());
    let contract = |contract: &String| bytes(contract).ok_or_else(|| wrong(contract));
    Ok(Policy {
        chain_id: chain_id.ok_or_else(|| wrong(&network.chain))?,
        contracts: network.contracts.iter().map(contract).collect::<Result<_, _>>()?,
        domains: vec![bytes(&network.domain).ok_or_else(|| wrong(&network.domain))?],
        max_value_wei: limits.value_wei,
        max_fee_wei: limits.fee_wei,
        daily_fee_wei: limits.daily_fee_wei,
    })
}

/// One account that acts in the market.
pub struct Desk {
    pub chain: Arc<dyn Chain>,
    pub network: ChainNetwork,
    pub account: String,
    signer: Arc<Signer>,
    /// Ends with the desk: then nothing more is signed.
    signing: AbortOnDropHandle<()>,
}

impl Desk {
    /// Acts for this account from now on, within limits.
    pub async fn begin(chain: Arc<dyn Chain>, account: impl Into<Arc<Account>>, limits: Limits) -> Result<Self, DeskError> {
        let network = chain.network(&cx()).await?;
        let policy = policy(&network, limits)?;
        let account = account.into();
        let address = account.address().to_string();
        let questions = chain.begin(&Cx::new(), address.clone()).await?;
        let signer = Arc::new(Signer::new(account, policy));
        let signing = tokio::spawn(sign(chain.clone(), signer.clone(), questions));
        Ok(Self { chain, network, account: address, signer, signing: AbortOnDropHandle::new(signing) })
    }

    /// Acts no more: what was ordered goes on when somebody acts for the account again.
    pub fn leave(&self) {
        self.signing.abort();
    }

    /// Signs an offer or a voucher, of which these are the bytes.
    ///
    /// # Errors
    /// `Unsigned` where the policy does not know them for one.
    pub fn sign(&self, payload: &[u8]) -> Result<Signature, DeskError> {
        Ok(self.signer.sign(payload)?.to_vec())
    }

    /// What may still be signed for in fees today, in wei.
    pub fn fees_left(&self) -> u128 {
        self.signer.fees_left()
    }

    /// What an act would cost.
    ///
    /// # Errors
    /// `Refused` where the contract would not do it.
    pub async fn quote(&self, act: Act) -> Result<Quote, DeskError> {
        let quote = self.chain.quote(&cx(), act).await?;
        match quote.refusal {
            Some(refusal) => Err(DeskError::Refused(refusal)),
            None => Ok(quote),
        }
    }

    /// Orders an act and waits until it is in a block. `name` says what it is; an order of this name that is under way is followed, and
    /// not made a second time: so a command that was cut off is simply given again.
    pub async fn carry_out(&self, name: &str, act: Act, within: Duration) -> Result<Progress, DeskError> {
        let key = self.next(name).await?;
        self.follow(key, act, within).await
    }

    /// Places an order and returns once it is on disk; it is carried out from then on. An order with this key that was placed before is
    /// not placed again.
    pub async fn order(&self, key: String, act: Act) -> Result<Progress, DeskError> {
        Ok(self.chain.act(&cx(), Order { key, act }).await?)
    }

    /// Orders an act under a key of the caller's and waits until it is in a block, as [`Self::carry_out`] does.
    pub async fn follow(&self, key: String, act: Act, within: Duration) -> Result<Progress, DeskError> {
        // Before the order: what it does meanwhile is not missed.
        let mut changes = self.chain.progresses(&Cx::new()).await?;
        let mut progress = self.order(key.clone(), act).await?;
        let wait = async {
            loop {
                if let Some(outcome) = outcome(&progress) {
                    return outcome;
                }
                match changes.next().await {
                    Some(Ok(change)) if change.key == key => progress = change,
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error.into()),
                    None => return Err(PluginError::unavailable("the chain plugin has ended").into()),
                }
            }
        };
        let waited = tokio::time::timeout(within, wait).await;
        waited.unwrap_or_else(|_| {
            let Progress { transaction, why, .. } = progress;
            Err(DeskError::Pending { key, waited: within, transaction, why })
        })
    }

    /// The key of the order of this name that is under way, or else of the one after the last.
    async fn next(&self, name: &str) -> Result<String, DeskError> {
        for number in 0..MOST_ORDERS {
            let key = format!("{name}-{number}");
            match self.chain.progress(&cx(), key.clone()).await {
                Ok(progress) if outcome(&progress).is_some() => {}
                Ok(_) => return Ok(key),
                Err(error) if error.code == Code::NotFound => return Ok(key),
                Err(error) => return Err(error.into()),
            }
        }
        Err(PluginError::new(Code::Full, format!("{MOST_ORDERS} orders `{name}` were given: no more are counted")).into())
    }
}

/// What has become of an order; `None` while that is open.
fn outcome(progress: &Progress) -> Option<Result<Progress, DeskError>> {
    match progress.state {
        ProgressState::Mined | ProgressState::Safe | ProgressState::Final => Some(Ok(progress.clone())),
        ProgressState::Reverted { .. } => {
            Some(Err(DeskError::Reverted { transaction: progress.transaction.clone(), why: progress.why.clone() }))
        }
        ProgressState::Dead => Some(Err(DeskError::Dead { why: progress.why.clone() })),
        ProgressState::Planned | ProgressState::Sent | ProgressState::Unknown => None,
    }
}

/// Answers what is to be signed, until the plugin asks no more.
async fn sign(chain: Arc<dyn Chain>, signer: Arc<Signer>, mut questions: Stream<fabstir_plugin_api::chain::Signing>) {
    while let Some(question) = questions.next().await {
        let question = match question {
            Ok(question) => question,
            Err(error) => return tracing::warn!(code = %error.code, %error, "The chain plugin asks for no more signatures."),
        };
        let answer = match signer.sign(&question.payload) {
            Ok(signature) => Signed { id: question.id, signature: Some(signature.to_vec()), refusal: None },
            Err(refusal) => {
                tracing::error!(order = %question.key, %refusal, "A transaction was not signed.");
                Signed { id: question.id, signature: None, refusal: Some(refusal.to_string()) }
            }
        };
        if let Err(error) = chain.signed(&cx(), answer).await {
            tracing::warn!(order = %question.key, code = %error.code, %error, "A signature was not taken.");
        }
    }
}

fn cx() -> Cx {
    Cx::new().with_timeout(CALL)
}
