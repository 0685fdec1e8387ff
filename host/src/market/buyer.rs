//! This account as one who pays: what it may spend, and the sessions that it has funded.
//!
//! ```text
//! budget.rs    how much, and in which deposits
//! offered.rs   what a node offers, before anything is paid for it
//! tally.rs     what a session has come to: counts and vouchers, and nothing else
//! purchase.rs  a funded session: counted, signed, kept, in this order
//! sweep.rs     what is left of sessions that are over, and of those that a crash has left behind
//! ```
//!
//! A session is two transactions: its opening, which this account sends, and its settlement, which the node sends. What the node does not
//! settle, this account closes.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use fabstir_plugin_api::chain::{Act, Amount, Chain, ProgressState, SessionId, SessionState, Sure, Voucher};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::transport::PeerId;
use parking_lot::Mutex;
use serde::Serialize;

use super::journal::purchases::{self, Bought, PurchaseState};
use super::{Desk, DeskError, Journal, JournalError, Limits, Prices, coins, transcript};
use crate::clock::now_ms;
use crate::config::Config;
use crate::identity::Account;
use crate::supervisor::{Alone, AloneError};

mod budget;
mod offered;
mod purchase;
mod sweep;
mod tally;

pub use budget::BudgetError;
pub use offered::Offered;
pub use purchase::{Funding, Payment, Purchase, Request, Step, Taken, Ticket};
pub use sweep::Sweep;

use budget::Budget;
use offered::{Expected, is};

/// How long the chain may take to answer.
const CALL: Duration = Duration::from_secs(30);
/// Tokens of an answer that a node may want to be owed: a deposit is so many times as much.
const MOST_CREDIT: u64 = 16_384;
/// How long a deposit may take to be in a block.
const OPENING: Duration = Duration::from_secs(120);
/// A session of before is gone on with only where it lasts so much longer.
const WORTH_ITS_TIME: Duration = Duration::from_secs(600);

/// Why nothing can be bought.
#[derive(Debug, thiserror::Error)]
pub enum BuyerError {
    #[error(transparent)]
    Plugin(#[from] AloneError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Desk(#[from] DeskError),
}

/// The account that pays, for as long as a command runs.
pub struct Buyer {
    pub desk: Desk,
    journal: Journal,
    /// Gone once it was ended.
    plugin: Mutex<Option<Alone<dyn Chain>>>,
    budget: Mutex<Budget>,
    /// The sessions of this run, each with what was promised in it before.
    used: Mutex<BTreeMap<SessionId, Used>>,
}

struct Used {
    purchase: Weak<Purchase>,
    before: Amount,
}

/// What came of a purchase.
#[derive(Debug, Clone, Serialize)]
pub struct Receipt {
    #[serde(flatten)]
    pub bought: Bought,
    /// The transaction that has paid the deposit in, and its fee.
    pub transaction: Option<String>,
    pub fee: Option<Amount>,
}

impl Buyer {
    /// Starts the chain plugin, and acts for the account from now on. `most` is all that may be
    /// spent, fees aside.
    pub async fn begin(config: &Config, account: Account, most: Amount) -> Result<Arc<Self>, BuyerError> {
        let journal = Journal::open(&config.node.data_dir)?;
        let plugin = Alone::start(config.clone(), |routes| &routes.chain).await?;
        let limits = Limits {
            value_wei: most.0,
            fee_wei: config.market.max_fee_wei.into(),
            daily_fee_wei: config.market.daily_fee_wei.into(),
        };
        let desk = match Desk::begin(plugin.client.clone(), account, limits).await {
            Ok(desk) => desk,
            Err(error) => {
                plugin.end().await;
                return Err(error.into());
            }
        };
        // One who cannot reach the chain hears so before anything else.
        if let Err(error) = desk.chain.heads(&cx()).await {
            drop(desk);
            plugin.end().await;
            return Err(DeskError::from(error).into());
        }
        let budget = Mutex::new(Budget::new(most, desk.network.coin.clone()));
        Ok(Arc::new(Self { desk, journal, plugin: Mutex::new(Some(plugin)), budget, used: Mutex::default() }))
    }

    /// Ends the chain plugin.
    pub async fn end(&self) {
        self.desk.leave();
        let plugin = self.plugin.lock().take();
        if let Some(plugin) = plugin {
            plugin.end().await;
        }
    }

    /// Whether an offer is what the node told everybody, and signed by the host that it names. `prices` are those that it told, `digest`
    /// that of the model.
    ///
    /// # Errors
    /// `Unavailable` with what is wrong.
    pub async fn check(&self, offered: &Offered, prices: Prices, digest: Option<&str>) -> Result<()> {
        let chain = &self.desk.chain;
        let digest = digest.ok_or_else(|| PluginError::unavailable("the node does not say which very model it offers"))?;
        let model = chain.model_id(&cx(), digest.to_owned()).await?;
        let payload = chain.offer_payload(&cx(), offered.terms.clone()).await?;
        let signer = chain.signer(&cx(), payload, offered.signature.clone()).await?;
        // Deposits are made in multiples of it.
        let most = prices.of(0, MOST_CREDIT);
        if offered.credit > most {
            let coin = &self.desk.network.coin;
            let (credit, most) = (coins(offered.credit, coin), coins(most, coin));
            return Err(PluginError::unavailable(format!("the node wants to be {credit} ahead, and {most} are taken")));
        }
        let expected = Expected { client: self.desk.account.clone(), model, prices, now_s: now_ms() / 1000 };
        expected.check(&offered.terms, &signer)
    }

    /// A session with this node that was opened before and can pay for a prompt of so many tokens; what was under way is followed.
    pub async fn resume(self: &Arc<Self>, node: &PeerId, offered: &Offered, prompt_tokens: u64) -> Result<Option<Arc<Purchase>>> {
        let needed = offered.credit.0.saturating_add(prices(offered).of(prompt_tokens, 0).0);
        for bought in self.unfinished().await? {
            let (terms, fresh) = (&bought.terms, &offered.terms);
            let same = bought.peer == *node
                && is(&terms.host, &fresh.host)
                && is(&terms.model, &fresh.model)
                && terms.price_input_per_mtok <= fresh.price_input_per_mtok
                && terms.price_output_per_mtok <= fresh.price_output_per_mtok;
            let left = Amount(bought.deposit.0.saturating_sub(bought.voucher.amount.0));
            let lasts = now_ms() / 1000 + WORTH_ITS_TIME.as_secs() < terms.expires_s;
            let free = !self.is_used(&bought.session);
            if !same || left.0 < needed || !lasts || !free || bought.state == PurchaseState::Closing {
                continue;
            }
            if !self.budget.lock().take(&bought.session, left) {
                continue;
            }
            if bought.state == PurchaseState::Opening
                && let Err(error) = self.pay_in(&bought).await
            {
                tracing::warn!(session = %bought.session, code = %error.code, %error, "A session that was being opened is not there.");
                continue;
            }
            match self.desk.chain.session(&cx(), bought.session.clone(), Sure::Latest).await {
                Ok(session) if session.state == SessionState::Active => return Ok(Some(self.purchase(bought, offered.credit))),
                // What came of it is looked after later.
                _ => self.budget.lock().spent(&bought.session, Amount(0)),
            }
        }
        Ok(None)
    }

    /// Opens a session under an offer that was checked, for a request with a prompt of so many tokens.
    ///
    /// # Errors
    /// `Denied` where the budget or the account does not have it. `Unavailable` where it did not work, or has not yet.
    pub async fn open(
        self: &Arc<Self>,
        node: &PeerId,
        model: &str,
        offered: Offered,
        prompt_tokens: u64,
    ) -> Result<Arc<Purchase>> {
        self.refresh().await;
        let prompt = prices(&offered).of(prompt_tokens, 0);
        let Offered { terms, signature, credit } = offered;
        let session = self.desk.chain.session_id(&cx(), terms.clone()).await?;
        let deposit = self.budget.lock().deposit(&session, credit, prompt)?;
        let now = now_ms();
        let voucher = Voucher {
            session: session.clone(),
            host: terms.host.clone(),
            amount: Amount(0),
            input_tokens: 0,
            output_tokens: 0,
            transcript: transcript::nothing(),
        };
        let bought = Bought {
            session: session.clone(),
            terms,
            offer: signature,
            peer: node.clone(),
            model: model.to_owned(),
            deposit,
            state: PurchaseState::Opening,
            voucher,
            signature: Vec::new(),
            to_host: None,
            to_client: None,
            why: None,
            opened_ms: now,
            changed_ms: now,
        };
        if let Err(error) = self.affordable(&bought).await {
            // Nothing was ordered.
            self.budget.lock().spent(&session, Amount(0));
            return Err(error);
        }
        let row = bought.clone();
        self.journal.write(move |connection| purchases::begin(connection, &row)).await?;
        let purchase = self.purchase(bought, credit);
        self.pay_in(&purchase.bought).await?;
        Ok(purchase)
    }

    /// Whether the contract would take the deposit, and the account has it.
    async fn affordable(&self, bought: &Bought) -> Result<()> {
        let coin = &self.desk.network.coin;
        let has = self.desk.chain.balances(&cx(), self.desk.account.clone()).await?.coin;
        if has < bought.deposit {
            let message = format!(
                "the account {} has {}, and the deposit is {}: send it money, or lower --max-spend",
                self.desk.account,
                coins(has, coin),
                coins(bought.deposit, coin)
            );
            return Err(PluginError::new(Code::Denied, message));
        }
        match self.desk.quote(opening(bought)).await {
            Ok(quote) if has.0 < bought.deposit.0.saturating_add(quote.fee.0) => {
                let message = format!(
                    "the account {} has {}, and the deposit of {} with a fee of about {} is more: send it money, or lower --max-spend",
                    self.desk.account,
                    coins(has, coin),
                    coins(bought.deposit, coin),
                    coins(quote.fee, coin)
                );
                Err(PluginError::new(Code::Denied, message))
            }
            Ok(_) => Ok(()),
            Err(DeskError::Plugin(error)) => Err(error),
            // It is this node's offer that the contract does not take: another's may do.
            Err(error) => Err(PluginError::unavailable(error.to_string())),
        }
    }

    /// Pays a deposit in, or follows it where that was ordered already.
    async fn pay_in(&self, bought: &Bought) -> Result<()> {
        let session = &bought.session;
        let deposit = coins(bought.deposit, &self.desk.network.coin);
        tracing::info!(%session, host = %bought.terms.host, %deposit, "Opening a paid session.");
        let error = match self.desk.follow(order(session), opening(bought), OPENING).await {
            Ok(progress) => {
                let transaction = progress.transaction.as_deref().unwrap_or("?");
                tracing::info!(%session, transaction, "A paid session is open.");
                let named = session.clone();
                let open = move |connection: &rusqlite::Transaction<'_>| {
                    purchases::moved(connection, &named, PurchaseState::Open, None, now_ms())
                };
                return Ok(self.journal.write(open).await?);
            }
            Err(error) => error,
        };
        // What was certainly not paid in can be spent otherwise.
        if matches!(error, DeskError::Unsigned(_) | DeskError::Dead { .. }) && self.is_absent(session).await {
            self.note(session, PurchaseState::Over, Some(&error.to_string())).await;
            self.spent(session, Amount(0));
        }
        tracing::warn!(%session, %error, "A paid session was not opened.");
        match error {
            DeskError::Plugin(error) => Err(error),
            DeskError::Unsigned(_) | DeskError::Dead { .. } => {
                Err(PluginError::new(Code::Denied, format!("the deposit was not paid in: {error}")))
            }
            error => Err(PluginError::unavailable(format!("the deposit was not paid in: {error}"))),
        }
    }

    async fn is_absent(&self, session: &SessionId) -> bool {
        let looked = self.desk.chain.session(&cx(), session.clone(), Sure::Latest).await;
        looked.is_err_and(|error| error.code == Code::NotFound)
    }

    fn purchase(self: &Arc<Self>, bought: Bought, credit: Amount) -> Arc<Purchase> {
        let (session, before) = (bought.session.clone(), bought.voucher.amount);
        let purchase = Purchase::new(self.clone(), bought, credit);
        self.used.lock().insert(session, Used { purchase: Arc::downgrade(&purchase), before });
        purchase
    }

    /// Whether somebody of this run asks, or may ask, in this session.
    fn is_used(&self, session: &SessionId) -> bool {
        self.used.lock().get(session).is_some_and(|used| used.purchase.upgrade().is_some_and(|purchase| !purchase.is_retired()))
    }

    /// What this run has spent in a session that has cost so much in all.
    fn spent(&self, session: &SessionId, in_all: Amount) {
        let before = self.used.lock().get(session).map_or(Amount(0), |used| used.before);
        self.budget.lock().spent(session, Amount(in_all.0.saturating_sub(before.0)));
    }

    /// Every session of this account that is not known to be over, the newest first.
    async fn unfinished(&self) -> Result<Vec<Bought>> {
        let mut all = self.journal.write(|connection| purchases::all(connection)).await?;
        all.retain(|bought| bought.state != PurchaseState::Over && is(&bought.terms.client, &self.desk.account));
        Ok(all)
    }

    /// Notes how far a purchase is. What cannot be noted is found out from the chain later.
    async fn note(&self, session: &SessionId, state: PurchaseState, why: Option<&str>) {
        let (named, why) = (session.clone(), why.map(str::to_owned));
        let moved =
            move |connection: &rusqlite::Transaction<'_>| purchases::moved(connection, &named, state, why.as_deref(), now_ms());
        if let Err(error) = self.journal.write(moved).await {
            tracing::error!(%session, %error, "What became of a session is not in the journal.");
        }
    }

    /// The sessions of this run, each with what came of it.
    pub async fn receipts(&self) -> Result<Vec<Receipt>> {
        let mut bought = self.journal.write(|connection| purchases::all(connection)).await?;
        {
            let used = self.used.lock();
            bought.retain(|bought| used.contains_key(&bought.session));
        }
        let mut receipts = Vec::new();
        for bought in bought.into_iter().rev() {
            // A transaction that the plugin does not tell is left out of the receipt, and not the receipt.
            let progress = self.desk.chain.progress(&cx(), order(&bought.session)).await.ok();
            let progress = progress.filter(|progress| !matches!(progress.state, ProgressState::Planned | ProgressState::Dead));
            let (transaction, fee) = progress.map_or((None, None), |progress| (progress.transaction, progress.fee));
            receipts.push(Receipt { bought, transaction, fee });
        }
        Ok(receipts)
    }
}

fn prices(offered: &Offered) -> Prices {
    let terms = &offered.terms;
    Prices { input_per_mtok: terms.price_input_per_mtok.0, output_per_mtok: terms.price_output_per_mtok.0 }
}

/// The order that pays a session's deposit in.
fn order(session: &SessionId) -> String {
    format!("open-{session}")
}

fn opening(bought: &Bought) -> Act {
    Act::OpenSession { terms: bought.terms.clone(), deposit: bought.deposit, offer: bought.offer.clone() }
}

fn cx() -> Cx {
    Cx::new().with_timeout(CALL)
}
