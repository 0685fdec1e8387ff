//! Paid sessions: what a client is offered, whether it has funded it, and its vouchers.
//!
//! ```text
//! Price   terms for one client, signed; nothing is kept
//! Fund    the deposit is on the chain as the terms say, and the first voucher binds it to this peer: journal, then a tab
//! Pay     a better voucher: journal, then delivery goes on
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::chain::{
    Account, Amount, Hash32, Session, SessionId, SessionState as OnChain, Signature, Sure, Terms, Voucher,
};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::transport::PeerId;
use parking_lot::Mutex;

use super::tab::{AnswerName, Judged, Tab};
use super::{Desk, DeskError, Seller};
use crate::clock::now_ms;
use crate::market::journal::sessions::{self, SessionRow, SessionState};
use crate::market::{NATIVE, transcript};

/// How long the chain may take to answer a question that a client waits for.
const QUESTION: Duration = Duration::from_secs(10);
/// How long an offer can be taken.
const OFFER: Duration = Duration::from_secs(600);
/// When a client asks again whether its deposit has been seen.
const NOT_SEEN: Duration = Duration::from_millis(500);

/// What a client is offered.
pub struct Offered {
    pub terms: Terms,
    pub signature: Signature,
    pub credit: Amount,
    pub sure_above: Amount,
}

/// What a client shows to have its session taken up.
pub struct Funding {
    pub terms: Terms,
    pub offer: Signature,
    pub before: Hash32,
    pub voucher: Voucher,
    pub signature: Signature,
}

/// The sessions that this node delivers in.
#[derive(Default)]
pub struct Tabs(Mutex<HashMap<SessionId, Arc<Tab>>>);

impl Tabs {
    pub fn get(&self, id: &SessionId) -> Option<Arc<Tab>> {
        self.0.lock().get(id).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Tab>> {
        self.0.lock().values().cloned().collect()
    }

    pub fn insert(&self, tab: Arc<Tab>) {
        self.0.lock().insert(tab.id.clone(), tab);
    }

    pub fn remove(&self, id: &SessionId) {
        self.0.lock().remove(id);
    }
}

fn cx() -> Cx {
    Cx::new().with_timeout(QUESTION)
}

fn denied(message: impl Into<String>) -> PluginError {
    PluginError::new(Code::Denied, message)
}

impl From<DeskError> for PluginError {
    fn from(error: DeskError) -> Self {
        match error {
            DeskError::Plugin(error) => error,
            error => PluginError::new(Code::Denied, error.to_string()),
        }
    }
}

impl Seller {
    /// How much is delivered ahead of vouchers.
    fn credit(&self) -> Amount {
        self.prices.of(0, self.config.credit_tokens.into())
    }

    /// The digest of a model that is served now, by which the chain knows it.
    fn digest(&self, model: &str) -> Result<String> {
        let served = self.scheduler.generating().find(|served| served.id == model);
        let served = served.ok_or_else(|| PluginError::not_found(format!("the model `{model}` is not served here")))?;
        served.digest.ok_or_else(|| denied(format!("the model `{model}` has no digest, by which a contract could name it")))
    }

    /// Offers a model to a client.
    pub async fn offer(&self, model: &str, client: Account) -> Result<Offered> {
        let desk = self.desk()?;
        let digest = self.digest(model)?;
        if self.prices.is_free() {
            return Err(PluginError::invalid("nothing is charged here: ask without a session"));
        }
        let nonce: [u8; 32] = rand_bytes()?;
        let now = now_ms() / 1000;
        let terms = Terms {
            host: desk.account.clone(),
            client,
            model: desk.chain.model_id(&cx(), digest).await?,
            coin: NATIVE.into(),
            price_input_per_mtok: Amount(self.prices.input_per_mtok),
            price_output_per_mtok: Amount(self.prices.output_per_mtok),
            expires_s: now + self.config.session_s,
            settle_window_s: self.config.settle_window_s,
            valid_until_s: now + OFFER.as_secs(),
            nonce: format!("0x{}", hex::encode(nonce)),
        };
        let payload = desk.chain.offer_payload(&cx(), terms.clone()).await?;
        let signature = desk.sign(&payload)?;
        Ok(Offered { terms, signature, credit: self.credit(), sure_above: Amount(self.config.sure_above_wei.into()) })
    }

    /// Takes a session up for this peer, once it is certain that it can pay.
    ///
    /// # Errors
    /// `Unavailable` while the deposit cannot be seen, or is not safe enough: ask again.
    pub async fn fund(&self, peer: &PeerId, funding: Funding) -> Result<Arc<Tab>> {
        let Funding { terms, offer, before, voucher, signature } = funding;
        let desk = self.desk()?;
        let own = self.peer.get().ok_or_else(|| PluginError::unavailable("the node has not joined the network"))?;
        // Terms that this account has signed are terms that this node has made.
        let payload = desk.chain.offer_payload(&cx(), terms.clone()).await?;
        if terms.host != desk.account || desk.chain.signer(&cx(), payload, offer).await? != desk.account {
            return Err(denied("these terms were not offered by this node"));
        }
        let id = desk.chain.session_id(&cx(), terms.clone()).await?;
        if voucher.session != id || voucher.host != terms.host {
            return Err(PluginError::invalid("the first voucher is not for the session of these terms"));
        }
        if voucher.transcript != transcript::begin(&before, &id, own, peer) {
            return Err(denied("the first voucher does not bind the session to the two peers that speak in it"));
        }
        self.signed_by(&desk, &voucher, &signature, &terms.client).await?;
        let deposit = self.deposit(&desk, &id, &terms).await?;
        if deposit < self.credit() {
            let message =
                format!("a deposit of {deposit} wei is too small: at least the credit, {} wei, is asked for", self.credit());
            return Err(denied(message));
        }
        if voucher.amount > deposit {
            return Err(PluginError::invalid(format!("{} wei are promised, and the deposit is {deposit}", voucher.amount)));
        }
        let row = SessionRow {
            terms,
            peer: peer.clone(),
            deposit,
            state: SessionState::Open,
            voucher: voucher.clone(),
            signature: signature.clone(),
            exposed: Amount(0),
            paid: None,
            why: None,
            opened_ms: 0,
            changed_ms: 0,
        };
        let kept = row.clone();
        self.journal.write(move |transaction| Ok(keep(transaction, &kept))).await??;
        let tab = match self.tabs.get(&id) {
            Some(tab) => {
                tab.go_on(peer.clone(), deposit, voucher, signature);
                tab
            }
            None => {
                let tab = Tab::new(&row, self.credit(), Duration::from_secs(self.config.voucher_timeout_s));
                self.tabs.insert(tab.clone());
                tab
            }
        };
        tracing::info!(session = %tab.id, client = %tab.terms.client, %peer, %deposit, "A client has funded a session.");
        Ok(tab)
    }

    /// The deposit, as the chain has it.
    async fn deposit(&self, desk: &Desk, id: &SessionId, terms: &Terms) -> Result<Amount> {
        let not_seen = |why: &str| PluginError::unavailable(format!("the deposit {why}")).retry_after(NOT_SEEN);
        let session = match desk.chain.session(&cx(), id.clone(), Sure::Latest).await {
            Err(error) if error.code == Code::NotFound => return Err(not_seen("is not on the chain yet")),
            session => session?,
        };
        check(&session, terms)?;
        if session.deposit.0 >= self.config.sure_above_wei.into() {
            let safe = match desk.chain.session(&cx(), id.clone(), Sure::Safe).await {
                Err(error) if error.code == Code::NotFound => {
                    return Err(not_seen("is large, and not in a safe block yet").retry_after(4 * NOT_SEEN));
                }
                safe => safe?,
            };
            check(&safe, terms)?;
            return Ok(safe.deposit.min(session.deposit));
        }
        Ok(session.deposit)
    }

    async fn signed_by(&self, desk: &Desk, voucher: &Voucher, signature: &Signature, client: &Account) -> Result<()> {
        let payload = desk.chain.voucher_payload(&cx(), voucher.clone()).await?;
        let signer = desk.chain.signer(&cx(), payload, signature.clone()).await?;
        match signer == *client {
            true => Ok(()),
            false => Err(denied("the voucher is not signed by the client of this session")),
        }
    }

    /// The tab that pays for a request of this peer for this model. `None` where nothing is charged.
    pub async fn tab_for(&self, peer: &PeerId, model: &str, paid_by: Option<&SessionId>) -> Result<Option<Arc<Tab>>> {
        let Some(id) = paid_by else {
            return match self.prices.is_free() {
                true => Ok(None),
                false => Err(denied(format!(
                    "this node is paid: {} wei for a million tokens read and {} for a million generated; fund a session first",
                    self.prices.input_per_mtok, self.prices.output_per_mtok
                ))),
            };
        };
        let tab = self.tab_of(peer, id)?;
        if tab.terms.expires_s <= now_ms() / 1000 {
            return Err(denied("the session's time is over: fund another one"));
        }
        // The contract names a model by its digest; what is asked for here is a name.
        let digest = self.digest(model)?;
        match self.desk()?.chain.model_id(&cx(), digest).await? == tab.terms.model {
            true => Ok(Some(tab)),
            false => Err(denied(format!("the session is for another model than `{model}`"))),
        }
    }

    fn tab_of(&self, peer: &PeerId, id: &SessionId) -> Result<Arc<Tab>> {
        let unknown = || PluginError::not_found("there is no such session with this peer: fund it first");
        self.tabs.get(id).filter(|tab| tab.peer() == *peer).ok_or_else(unknown)
    }

    /// Takes a voucher: once this returns it is on disk, and delivery goes on.
    pub async fn pay(&self, peer: &PeerId, voucher: Voucher, signature: Signature, answers: &[AnswerName]) -> Result<()> {
        let tab = self.tab_of(peer, &voucher.session)?;
        if tab.judge(&voucher)? == Judged::Known {
            return Ok(());
        }
        let desk = self.desk()?;
        self.signed_by(&desk, &voucher, &signature, &tab.terms.client).await?;
        if voucher.transcript != tab.root_after(answers) {
            // It is worth its money all the same.
            tracing::warn!(session = %tab.id, "A client's voucher carries another transcript than this node's.");
        }
        let kept = (voucher.clone(), signature.clone());
        if self.journal.write(move |transaction| sessions::pay(transaction, &kept.0, &kept.1)).await? {
            tab.take(voucher, signature, answers);
        }
        Ok(())
    }

    /// Ends a session at its client's wish.
    pub fn end(&self, peer: &PeerId, id: &SessionId) -> Result<Amount> {
        let tab = self.tab_of(peer, id)?;
        let (voucher, _) = tab.voucher();
        if voucher.amount.0 == 0 {
            return Err(denied("nothing was promised in this session: its client can close it on the chain"));
        }
        self.settling.now(id);
        Ok(voucher.amount)
    }
}

/// Keeps a funded session, unless it is known as one that is over.
fn keep(transaction: &rusqlite::Transaction<'_>, row: &SessionRow) -> Result<()> {
    match sessions::get(transaction, &row.voucher.session)? {
        Some(known) if known.state != SessionState::Open => Err(denied("the session is being settled, or was")),
        Some(known)
            if known.voucher.amount > row.voucher.amount
                || known.voucher.input_tokens > row.voucher.input_tokens
                || known.voucher.output_tokens > row.voucher.output_tokens =>
        {
            let message =
                format!("{} wei were promised in this session before, not {}", known.voucher.amount, row.voucher.amount);
            Err(PluginError::invalid(message))
        }
        _ => Ok(sessions::fund(transaction, row)?),
    }
}

/// Whether the session on the chain is the one of the terms, and can still pay.
fn check(session: &Session, terms: &Terms) -> Result<()> {
    if session.state != OnChain::Active {
        return Err(denied("the session is closed on the chain"));
    }
    let same = session.host == terms.host
        && session.client == terms.client
        && session.coin == terms.coin
        && session.expires_s == terms.expires_s
        && session.settle_window_s == terms.settle_window_s;
    match same {
        true => Ok(()),
        false => Err(denied("the session on the chain was opened under other terms")),
    }
}

fn rand_bytes() -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| PluginError::internal(format!("the system gives no random numbers: {error}")))?;
    Ok(bytes)
}
