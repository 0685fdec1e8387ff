//! A funded session, as the one who pays in it sees it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::chain::{Amount, Hash32, SessionId, Signature, Voucher};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::inference::Usage;
use fabstir_plugin_api::transport::PeerId;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::Buyer;
use super::tally::{Proposal, Tally};
use crate::clock::now_ms;
use crate::market::journal::purchases::{self, Bought, PurchaseState};
use crate::market::{Prices, coins, transcript};

/// How long a session may be unused before it is given back.
const IDLE: Duration = Duration::from_secs(300);
/// A session is not begun with requests that its end would cut off so soon.
const SOON_OVER: Duration = Duration::from_secs(120);
/// The part of the credit that is paid at a time: often enough that the node never waits, and no more often.
const STEPS: u128 = 4;
/// The part of a deposit that is to be left for an answer which may be as long.
const PART: u128 = 4;
/// How long the plugin may take to say what is to be signed.
const CALL: Duration = Duration::from_secs(10);
/// Answers that a repeated voucher names, in case that those before it were lost.
const MOST_NAMED: usize = 1024;
/// How long a node may wait for more than has arrived, without a piece meanwhile, until the two counts are known to differ for good.
const AT_ODDS: Duration = Duration::from_secs(5);

/// A session in which this account pays.
///
/// Pieces are counted as they arrive; one task at a time signs and sends ([`Purchase::step`] says what comes next). Each voucher is in
/// the journal before anybody sees it.
pub struct Purchase {
    pub bought: Bought,
    pub credit: Amount,
    pub(super) buyer: Arc<Buyer>,
    state: Mutex<State>,
    changed: Notify,
    taken: watch::Sender<Taken>,
}

/// Whether the node has taken the session up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    Not,
    Yes,
    Refused(PluginError),
}

struct State {
    tally: Tally,
    /// The newest voucher, as it was sent.
    sent: Option<Payment>,
    /// Answers that vouchers have named since the session was last taken up.
    named: VecDeque<u64>,
    to_fund: bool,
    to_repeat: bool,
    /// What reminders are answered with, even where little is due.
    all: bool,
    /// Nothing new is asked in it.
    retired: bool,
    /// Not even those who use it are waited for.
    cut: bool,
    users: usize,
    quiet: Instant,
    /// Since when the node has waited for more than is due.
    at_odds: Option<Instant>,
    /// What was promised when the node last complained.
    complaint: Option<Amount>,
}

/// A voucher, fit to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payment {
    pub voucher: Voucher,
    pub signature: Signature,
    /// The answers that it agrees to.
    pub answers: Vec<u64>,
}

/// What is to be done for a purchase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Have the node take the session up.
    Fund,
    /// Sign and send what is due.
    Pay,
    /// Send the newest voucher again.
    Repeat,
    /// Have it settled: nothing more is asked in it.
    Settle,
    /// Nothing before that time, unless something changes.
    Wait(Instant),
}

/// What a request may come to.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    pub prompt_tokens: u64,
    /// Tokens of its answer.
    pub most: u64,
}

/// Somebody's use of a purchase, from before a request goes out until its answer is whole.
pub struct Ticket(Arc<Purchase>);

impl Ticket {
    pub fn purchase(&self) -> &Arc<Purchase> {
        &self.0
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.users -= 1;
        state.quiet = Instant::now();
        drop(state);
        self.0.changed.notify_one();
    }
}

impl Purchase {
    pub(super) fn new(buyer: Arc<Buyer>, bought: Bought, credit: Amount) -> Arc<Self> {
        let state = State {
            tally: Tally::new(&bought.terms, bought.deposit, bought.voucher.clone()),
            sent: None,
            named: VecDeque::new(),
            to_fund: true,
            to_repeat: false,
            all: false,
            retired: false,
            cut: false,
            users: 0,
            quiet: Instant::now(),
            at_odds: None,
            complaint: None,
        };
        let (state, changed) = (Mutex::new(state), Notify::new());
        Arc::new(Self { bought, credit, buyer, state, changed, taken: watch::Sender::new(Taken::Not) })
    }

    pub fn session(&self) -> &SessionId {
        &self.bought.session
    }

    /// What a prompt of so many tokens costs.
    fn prompt(&self, tokens: u64) -> Amount {
        let terms = &self.bought.terms;
        Prices { input_per_mtok: terms.price_input_per_mtok.0, output_per_mtok: terms.price_output_per_mtok.0 }.of(tokens, 0)
    }

    /// Uses it for a request with a prompt of so many tokens and an answer of at most so many. `None` where its deposit or its time is too
    /// near their end; with `anyhow`, a deposit that may end in the middle of the answer is good enough.
    pub fn enter(self: &Arc<Self>, request: Request, anyhow: bool) -> Option<Ticket> {
        let Request { prompt_tokens, most } = request;
        let terms = &self.bought.terms;
        let answer = Prices { input_per_mtok: 0, output_per_mtok: terms.price_output_per_mtok.0 }.of(0, most);
        let answer = if anyhow { Amount(0) } else { answer.min(Amount(self.bought.deposit.0 / PART)) };
        let needed = self.prompt(prompt_tokens).0.saturating_add(self.credit.max(answer).0);
        let mut state = self.state.lock();
        let in_time = now_ms() / 1000 + SOON_OVER.as_secs() < self.bought.terms.expires_s;
        if state.retired || !in_time || state.tally.room().0 < needed {
            return None;
        }
        state.users += 1;
        drop(state);
        Some(Ticket(self.clone()))
    }

    /// Lets nobody use it from now on; it is settled once the last answer is whole.
    pub fn retire(&self) {
        self.state.lock().retired = true;
        self.changed.notify_one();
    }

    /// Has it settled now, whoever uses it.
    pub fn cut(&self) {
        let mut state = self.state.lock();
        (state.retired, state.cut) = (true, true);
        drop(state);
        self.changed.notify_one();
    }

    pub fn is_retired(&self) -> bool {
        self.state.lock().retired
    }

    pub fn is_cut(&self) -> bool {
        self.state.lock().cut
    }

    /// The node does not know it any more, or not what was said in it.
    pub fn lost(&self) {
        self.state.lock().tally.forget_answers();
        // A refusal stays one.
        self.taken.send_if_modified(|taken| {
            *taken == Taken::Yes && {
                *taken = Taken::Not;
                true
            }
        });
    }

    /// Waits until the node has taken it up.
    ///
    /// # Errors
    /// Why it does not.
    pub async fn taken(&self) -> Result<()> {
        let mut taken = self.taken.subscribe();
        loop {
            match taken.borrow_and_update().clone() {
                Taken::Yes => return Ok(()),
                Taken::Refused(why) => return Err(why),
                Taken::Not => {
                    self.state.lock().to_fund = true;
                    self.changed.notify_one();
                }
            }
            // The sender is here.
            let _ = taken.changed().await;
        }
    }

    /// Tells those who wait for it.
    pub fn tell_taken(&self, taken: Taken) {
        if matches!(taken, Taken::Refused(_)) {
            self.retire();
        }
        self.taken.send_replace(taken);
    }

    /// Sends the newest voucher again: it may have been lost.
    pub fn repeat(&self) {
        self.state.lock().to_repeat = true;
        self.changed.notify_one();
    }

    /// Waits until there may be another step.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What is to be done now.
    pub fn step(&self) -> Step {
        let state = self.state.lock();
        let idle = state.users == 0 && state.quiet.elapsed() >= IDLE;
        if state.to_fund {
            // One who leaves needs nothing taken up that it owes nothing for.
            return if state.cut && state.tally.due() <= state.tally.last().amount { Step::Settle } else { Step::Fund };
        }
        let (least, lag) = self.tact(&state);
        if state.tally.next(least, lag).is_some() {
            return Step::Pay;
        }
        if state.to_repeat && state.sent.is_some() {
            return Step::Repeat;
        }
        if state.cut || idle || state.retired && state.users == 0 {
            return Step::Settle;
        }
        Step::Wait(if state.users == 0 { state.quiet + IDLE } else { Instant::now() + IDLE })
    }

    /// How much is promised at a time, and how far what is not certain may be behind.
    fn tact(&self, state: &State) -> (Amount, Amount) {
        let leaves = state.retired && state.users == 0 || state.cut;
        match state.all || leaves {
            true => (Amount(1), Amount(0)),
            false => (Amount((self.credit.0 / STEPS).max(1)), Amount(self.credit.0 / STEPS)),
        }
    }

    /// A request goes out: `message` are its bytes.
    pub fn asked(&self, id: u64, message: &[u8], prompt_tokens: u64, most_output: u64) {
        self.state.lock().tally.asked(id, message, prompt_tokens, most_output);
    }

    /// A piece has arrived that counts so many tokens.
    ///
    /// # Errors
    /// `Protocol` where that is more than can be.
    pub fn text(&self, id: u64, message: &[u8], tokens: u32) -> Result<()> {
        self.count(|tally| tally.text(id, message, tokens))
    }

    /// The last piece of an answer has arrived.
    ///
    /// # Errors
    /// As `text`.
    pub fn done(&self, id: u64, message: &[u8], usage: &Usage) -> Result<()> {
        self.count(|tally| tally.done(id, message, usage))
    }

    fn count(&self, count: impl FnOnce(&mut Tally) -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        let counted = count(&mut state.tally);
        state.at_odds = None;
        // A node that counts what cannot be is not asked again.
        state.retired |= counted.is_err();
        drop(state);
        self.changed.notify_one();
        counted
    }

    /// Nothing more comes for a request.
    pub fn end(&self, id: u64) {
        self.state.lock().tally.end(id);
        self.changed.notify_one();
    }

    /// The answer to a request is not wanted any more.
    pub fn give_up(&self, id: u64) {
        self.state.lock().tally.give_up(id);
    }

    /// The node waits until so much is paid.
    ///
    /// # Errors
    /// Where that will never be: then nothing new is asked in this session either.
    pub fn reminded(&self, amount: Amount) -> Result<()> {
        let coin = &self.buyer.desk.network.coin;
        let mut state = self.state.lock();
        let (due, deposit) = (state.tally.due(), state.tally.deposit());
        if amount > deposit {
            state.retired = true;
            return Err(used_up(deposit, coin));
        }
        (state.all, state.to_repeat) = (true, true);
        let at_odds = due < amount && due <= state.tally.last().amount;
        let since = at_odds.then(|| *state.at_odds.get_or_insert_with(Instant::now));
        let for_good = since.is_some_and(|since| since.elapsed() >= AT_ODDS);
        state.retired |= for_good;
        drop(state);
        self.changed.notify_one();
        // Reminders overtake pieces: up to the credit the node may be ahead.
        if amount.0.saturating_sub(due.0) > self.credit.0 {
            tracing::warn!(session = %self.session(), theirs = %amount, ours = %due, "A node counts more than has arrived: it is paid what has.");
        }
        match for_good {
            true => Err(PluginError::unavailable(format!(
                "the node waits for {amount} wei in all, and only {due} wei are due for what has arrived"
            ))),
            false => Ok(()),
        }
    }

    /// The node has not taken a voucher.
    ///
    /// # Errors
    /// The same, where it has happened before and nothing was promised since: then nothing new is asked in this session either.
    pub fn complained(&self, why: &PluginError) -> Result<()> {
        tracing::warn!(session = %self.session(), code = %why.code, %why, "A node has not taken a voucher.");
        let mut state = self.state.lock();
        let promised = state.tally.last().amount;
        let again = state.complaint.replace(promised) == Some(promised);
        state.retired |= again;
        // With its root begun anew, both sides start from the same.
        state.to_fund = true;
        drop(state);
        self.changed.notify_one();
        if again { Err(why.clone()) } else { Ok(()) }
    }

    /// Why an answer was cut off that the node calls denied.
    pub fn denied(&self, why: PluginError) -> PluginError {
        let mut state = self.state.lock();
        state.retired = true;
        let (room, deposit) = (state.tally.room(), state.tally.deposit());
        drop(state);
        self.changed.notify_one();
        match room < self.credit {
            true => used_up(deposit, &self.buyer.desk.network.coin),
            false => why,
        }
    }

    /// The voucher with which the node takes it up: for what was promised so far, bound to the two peers that speak.
    pub async fn first(&self, own: &PeerId) -> Result<Funding> {
        let (before, proposal) = {
            let mut state = self.state.lock();
            state.to_fund = false;
            let before = state.tally.last().transcript.clone();
            let root = transcript::begin(&before, self.session(), &self.bought.peer, own);
            (before, state.tally.again(root))
        };
        let signature = self.sign(&proposal).await?;
        let mut state = self.state.lock();
        state.tally.promised(&proposal);
        state.tally.forget_answers();
        state.named.clear();
        state.sent = None;
        Ok(Funding { before, voucher: proposal.voucher, signature })
    }

    /// Signs what is due, and keeps it. `None` where nothing is.
    pub async fn pay(&self) -> Result<Option<Payment>> {
        let proposal = {
            let state = self.state.lock();
            let (_, lag) = self.tact(&state);
            state.tally.next(Amount(1), lag)
        };
        let Some(proposal) = proposal else { return Ok(None) };
        let signature = self.sign(&proposal).await?;
        let mut state = self.state.lock();
        state.tally.promised(&proposal);
        let Proposal { voucher, answers } = proposal;
        state.named.extend(&answers);
        let too_many = state.named.len().saturating_sub(MOST_NAMED);
        state.named.drain(..too_many);
        let payment = Payment { voucher, signature, answers };
        (state.sent, state.to_repeat, state.all) = (Some(payment.clone()), false, false);
        Ok(Some(payment))
    }

    /// The newest voucher once more, with all the answers that it stands for.
    pub fn newest(&self) -> Option<Payment> {
        let mut state = self.state.lock();
        (state.to_repeat, state.all) = (false, false);
        let answers = state.named.iter().copied().collect();
        state.sent.clone().map(|sent| Payment { answers, ..sent })
    }

    async fn sign(&self, proposal: &Proposal) -> Result<Signature> {
        let desk = &self.buyer.desk;
        let payload = desk.chain.voucher_payload(&Cx::new().with_timeout(CALL), proposal.voucher.clone()).await?;
        let signature = desk.sign(&payload)?;
        let (voucher, kept) = (proposal.voucher.clone(), signature.clone());
        let promised = move |connection: &rusqlite::Transaction<'_>| purchases::promise(connection, &voucher, &kept, now_ms());
        self.buyer.journal.write(promised).await?;
        Ok(signature)
    }

    /// The node has said that it settles.
    pub async fn settling(&self, amount: Amount) {
        if amount > self.state.lock().tally.last().amount {
            tracing::warn!(session = %self.session(), %amount, "A node says that it settles more than was promised, which the contract refuses.");
        }
        self.buyer.note(self.session(), PurchaseState::Closing, Some("the node settles it")).await;
    }
}

/// What a node needs to take a session up, besides its own terms.
#[derive(Debug, Clone)]
pub struct Funding {
    pub before: Hash32,
    pub voucher: Voucher,
    pub signature: Signature,
}

fn used_up(deposit: Amount, coin: &str) -> PluginError {
    let message = format!(
        "the deposit of {} for this session is used up, and the answer is cut off: ask again to go on in another session, or allow more \
         with --max-spend",
        coins(deposit, coin)
    );
    PluginError::new(Code::Denied, message)
}
