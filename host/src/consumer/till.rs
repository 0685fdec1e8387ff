//! Paying one node: a session is opened with the first request that it is asked to answer, kept for those that follow, and given back when
//! nothing is asked any more.
//!
//! ```text
//! ready --> Price --> check --> a session of before, or a new one on the chain --> payer: Fund, Pay, .., Settle
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::transport::PeerId;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared, join_all};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::link::Link;
use crate::market::Prices;
use crate::market::buyer::{Buyer, Funding, Offered, Payment, Purchase, Request, Step, Taken, Ticket};
use crate::network::capability::Offer;
use crate::network::session::wire::{Ask, Tell};

/// How long a node may take to see a deposit, and the pauses between questions where it names none.
const FUNDING: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// The pause before a payment is tried again that could not be signed or kept.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a session may take to be opened, or given back, once nothing more is asked.
const CLOSING: Duration = Duration::from_secs(10);
/// How often a session that cannot pay for a request is replaced before the request is given back.
const ROUNDS: usize = 3;

/// What pays one node.
pub(super) struct Till {
    buyer: Arc<Buyer>,
    link: Arc<Link>,
    node: PeerId,
    /// What this side of the link is called.
    own: PeerId,
    slot: Mutex<Slot>,
    payers: Mutex<Vec<Payer>>,
    closed: AtomicBool,
}

struct Payer {
    purchase: Arc<Purchase>,
    task: AbortOnDropHandle<()>,
}

/// The session that the next request is paid from.
enum Slot {
    Empty,
    Opening(Opening),
    Open(Arc<Purchase>),
}

/// The one attempt that everybody waits for; it goes on when one of them leaves. `None` where the node charges nothing.
type Opening = Shared<BoxFuture<'static, Result<Option<Arc<Purchase>>>>>;

impl Till {
    pub fn new(buyer: Arc<Buyer>, link: Arc<Link>, node: PeerId, own: PeerId) -> Arc<Self> {
        let (slot, payers, closed) = (Mutex::new(Slot::Empty), Mutex::default(), AtomicBool::new(false));
        Arc::new(Self { buyer, link, node, own, slot, payers, closed })
    }

    /// A session that pays for a request. `None` where the node charges nothing after all.
    ///
    /// # Errors
    /// `Denied` where the budget does not allow it; `Unavailable` where this node does not.
    pub async fn ready(self: &Arc<Self>, offer: &Offer, request: Request) -> Result<Option<Ticket>> {
        for _ in 0..ROUNDS {
            if self.closed.load(Ordering::Acquire) {
                break;
            }
            let opening = match self.enter(offer, request) {
                Ok(ticket) => {
                    ticket.purchase().taken().await?;
                    return Ok(Some(ticket));
                }
                Err(opening) => opening,
            };
            match opening.await {
                Ok(None) => return Ok(None),
                Ok(Some(purchase)) => {
                    if let Some(ticket) = purchase.enter(request, true) {
                        return Ok(Some(ticket));
                    }
                }
                // Where there is no money for another session, what is left in this one is better than nothing.
                Err(error) => match self.last_resort(request) {
                    Some(ticket) => return Ok(Some(ticket)),
                    None => return Err(error),
                },
            }
        }
        Err(PluginError::unavailable("no session with this node can pay for this request"))
    }

    /// Uses the session that there is, or says which one is waited for.
    fn enter(self: &Arc<Self>, offer: &Offer, request: Request) -> Result<Ticket, Opening> {
        let mut slot = self.slot.lock();
        let before = match &*slot {
            Slot::Opening(opening) => return Err(opening.clone()),
            Slot::Open(purchase) => match purchase.enter(request, false) {
                Some(ticket) => return Ok(ticket),
                None => Some(purchase.clone()),
            },
            Slot::Empty => None,
        };
        let (till, offer) = (self.clone(), offer.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            let opened = till.open(&offer, request.prompt_tokens).await;
            *till.slot.lock() = match (&opened, before) {
                (Ok(Some(purchase)), before) => {
                    if let Some(before) = before {
                        before.retire();
                    }
                    Slot::Open(purchase.clone())
                }
                (Err(_), Some(before)) => Slot::Open(before),
                _ => Slot::Empty,
            };
            opened
        }));
        let ended = |error: tokio::task::JoinError| Err(PluginError::unavailable(format!("a session was not opened: {error}")));
        let opening = task.map(move |opened| opened.unwrap_or_else(ended)).boxed().shared();
        *slot = Slot::Opening(opening.clone());
        Err(opening)
    }

    fn last_resort(&self, request: Request) -> Option<Ticket> {
        match &*self.slot.lock() {
            Slot::Open(purchase) => purchase.enter(request, true),
            _ => None,
        }
    }

    async fn open(&self, offer: &Offer, prompt_tokens: u64) -> Result<Option<Arc<Purchase>>> {
        let (model, client) = (offer.name.clone(), self.buyer.desk.account.clone());
        let offered = match self.link.call(|id| Ask::Price { id, model, client }).await {
            Ok(Tell::Offer { terms, signature, credit, .. }) => Offered { terms: *terms, signature, credit },
            Ok(_) => {
                return Err(PluginError::new(Code::Protocol, "the node answered a question about its price with another word"));
            }
            // It tells a price, and has no account to be paid to.
            Err(error) if error.code == Code::InvalidArgument => return Ok(None),
            Err(error) => return Err(elsewhere("the node makes no offer", error)),
        };
        let prices = Prices { input_per_mtok: offer.price_input_wei_per_mtok, output_per_mtok: offer.price_output_wei_per_mtok };
        self.buyer.check(&offered, prices, offer.digest.as_deref()).await?;
        if let Some(purchase) = self.buyer.resume(&self.node, &offered, prompt_tokens).await? {
            match self.take_up(&purchase).await {
                Ok(()) => return Ok(Some(purchase)),
                Err(error) => {
                    tracing::warn!(session = %purchase.session(), %error, "A session of before is not gone on with.");
                }
            }
        }
        let purchase = self.buyer.open(&self.node, &offer.name, offered, prompt_tokens).await?;
        self.take_up(&purchase).await?;
        Ok(Some(purchase))
    }

    async fn take_up(&self, purchase: &Arc<Purchase>) -> Result<()> {
        self.link.pays(purchase);
        let task = tokio::spawn(pay(self.link.clone(), purchase.clone(), self.own.clone()));
        {
            let mut payers = self.payers.lock();
            payers.retain(|payer| !payer.task.is_finished());
            payers.push(Payer { purchase: purchase.clone(), task: AbortOnDropHandle::new(task) });
        }
        purchase.taken().await
    }

    /// Gives every session back: what has arrived is paid, and the node is told to settle.
    pub async fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let slot = std::mem::replace(&mut *self.slot.lock(), Slot::Empty);
        if let Slot::Opening(opening) = slot {
            // One that takes longer is looked after by its journal.
            let _ = tokio::time::timeout(CLOSING, opening).await;
        }
        let payers = std::mem::take(&mut *self.payers.lock());
        payers.iter().for_each(|payer| payer.purchase.cut());
        let tasks = join_all(payers.into_iter().map(|payer| payer.task));
        if tokio::time::timeout(CLOSING, tasks).await.is_err() {
            tracing::warn!(peer = %self.node, "A node does not say that it settles.");
        }
    }
}

/// An error after which another node may do better.
fn elsewhere(what: &str, error: PluginError) -> PluginError {
    match error.code {
        Code::Overloaded | Code::Unavailable => error,
        _ => PluginError::unavailable(format!("{what}: {error}")),
    }
}

/// Does what is to be done for a purchase, one thing after the other, until it is given back.
async fn pay(link: Arc<Link>, purchase: Arc<Purchase>, own: PeerId) {
    loop {
        match purchase.step() {
            Step::Fund => fund(&link, &purchase, &own).await,
            Step::Pay => match purchase.pay().await {
                Ok(Some(payment)) => send(&link, payment),
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(session = %purchase.session(), code = %error.code, %error, "A node cannot be paid.");
                    let why = PluginError::new(Code::Denied, format!("the node cannot be paid: {error}"));
                    link.fail_paid(purchase.session(), &why);
                    tokio::time::sleep(AGAIN).await;
                }
            },
            Step::Repeat => {
                if let Some(payment) = purchase.newest() {
                    send(&link, payment);
                }
            }
            Step::Settle => return settle(&link, &purchase).await,
            Step::Wait(until) => tokio::select! {
                () = purchase.changed() => {}
                () = tokio::time::sleep_until(until) => {}
            },
        }
    }
}

fn send(link: &Link, payment: Payment) {
    let Payment { voucher, signature, answers } = payment;
    if let Err(error) = link.send(&Ask::Pay { voucher: Box::new(voucher), signature, answers }) {
        // It is in the journal, and goes out with the next word that is spoken.
        tracing::debug!(code = %error.code, %error, "A voucher is not sent yet.");
    }
}

/// Has the node take the session up, as soon as it sees the deposit.
async fn fund(link: &Link, purchase: &Purchase, own: &PeerId) {
    let until = Instant::now() + FUNDING;
    let refused = |error| Taken::Refused(elsewhere("the node does not take the session up", error));
    let Funding { before, voucher, signature } = match purchase.first(own).await {
        Ok(funding) => funding,
        Err(error) => return purchase.tell_taken(refused(error)),
    };
    loop {
        let (terms, offer) = (Box::new(purchase.bought.terms.clone()), purchase.bought.offer.clone());
        let (before, voucher, signature) = (before.clone(), Box::new(voucher.clone()), signature.clone());
        let told = link.call(|id| Ask::Fund { id, terms, offer, before, voucher, signature }).await;
        let error = match told {
            Ok(Tell::Funded { .. }) => return purchase.tell_taken(Taken::Yes),
            Ok(_) => PluginError::new(Code::Protocol, "another word than funded"),
            Err(error) => error,
        };
        let pause = error.retry_after_ms.map_or(PAUSE, Duration::from_millis).clamp(PAUSE / 10, LONGEST_PAUSE);
        if !error.code.is_retryable() || Instant::now() + pause >= until || purchase.is_cut() {
            return purchase.tell_taken(refused(error));
        }
        tokio::time::sleep(pause).await;
    }
}

async fn settle(link: &Link, purchase: &Purchase) {
    let paid_by = purchase.session().clone();
    match link.call(|id| Ask::Settle { id, paid_by }).await {
        Ok(Tell::Settling { amount, .. }) => purchase.settling(amount).await,
        Ok(_) => tracing::debug!(session = %purchase.session(), "The node answered with another word than settling."),
        Err(error) => tracing::debug!(session = %purchase.session(), code = %error.code, %error, "The node does not settle."),
    }
}
