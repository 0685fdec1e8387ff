//! What one client owes in one paid session.
//!
//! ```text
//! due     what the tokens that were delivered cost
//! vouched what the best voucher promises, which is on disk
//! credit  how far the first may be ahead of the second
//! ```
//!
//! A request's prompt counts from its first piece on, as far as it can be told without the model, and exactly at the end. So one who does not
//! pay takes along at most the credit and one prompt of each request that was let in together.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fabstir_plugin_api::chain::{Amount, Hash32, SessionId, Signature, Terms, Voucher};
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::inference::{Text, Usage};
use fabstir_plugin_api::transport::PeerId;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::market::Prices;
use crate::market::journal::sessions::SessionRow;
use crate::market::transcript::{self, AnswerHash};
use crate::network::session::wire::tokens_of;

/// How often a client that does not pay is told what is due.
const REMIND: Duration = Duration::from_secs(1);

/// Answers that are remembered for transcripts. A client that names none of so many agrees on none.
const MOST_ANSWERS: usize = 65_536;

/// Names an answer: the conversation's session, and the request in it.
pub type AnswerName = (String, u64);

/// One paid session while the node runs.
pub struct Tab {
    pub id: SessionId,
    pub terms: Terms,
    pub prices: Prices,
    pub credit: Amount,
    /// How long delivery waits for a voucher.
    patience: Duration,
    state: Mutex<State>,
    /// Tells those who wait that a voucher has come, or none will.
    changed: Notify,
    running: AtomicUsize,
}

struct State {
    peer: PeerId,
    deposit: Amount,
    /// The best voucher that is on disk, and its signature.
    voucher: Voucher,
    signature: Signature,
    /// What was promised beyond the tokens that were named with it, when this peer came: it stays due.
    before: Amount,
    /// What was delivered in all.
    input_tokens: u64,
    output_tokens: u64,
    /// Prompts of requests that were let in and have brought no piece yet.
    coming: u64,
    /// The answers that have come to their end and are in no transcript yet, and those that are.
    answers: HashMap<AnswerName, [u8; 32]>,
    agreed: HashSet<AnswerName>,
    used: Instant,
    /// Why nothing more is delivered.
    ended: Option<PluginError>,
}

/// What a client is to pay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    pub amount: Amount,
    pub input_tokens: u64,
    pub output_tokens: u64,
}

/// What a voucher would change.
#[derive(Debug, PartialEq, Eq)]
pub enum Judged {
    /// It promises more, or the same for more.
    Better,
    /// It is the one that is known.
    Known,
}

impl Tab {
    /// A tab of a session whose first voucher is on disk.
    pub fn new(row: &SessionRow, credit: Amount, patience: Duration) -> Arc<Self> {
        let SessionRow { terms, peer, deposit, voucher, signature, .. } = row.clone();
        let prices = Prices { input_per_mtok: terms.price_input_per_mtok.0, output_per_mtok: terms.price_output_per_mtok.0 };
        let state = State {
            peer,
            deposit,
            before: beyond(prices, &voucher),
            input_tokens: voucher.input_tokens,
            output_tokens: voucher.output_tokens,
            coming: 0,
            answers: HashMap::new(),
            agreed: HashSet::new(),
            used: Instant::now(),
            ended: None,
            signature,
            voucher: voucher.clone(),
        };
        let id = voucher.session;
        let (changed, running) = (Notify::new(), AtomicUsize::new(0));
        Arc::new(Self { id, terms, prices, credit, patience, state: Mutex::new(state), changed, running })
    }

    /// Goes on with a peer and its first voucher, which is on disk. What the client has counted and this node has not counts too.
    pub fn go_on(&self, peer: PeerId, deposit: Amount, voucher: Voucher, signature: Signature) {
        let mut state = self.state.lock();
        state.input_tokens = state.input_tokens.max(voucher.input_tokens);
        state.output_tokens = state.output_tokens.max(voucher.output_tokens);
        // What was promised is due, whatever tokens were named with it.
        let counted = self.prices.of(state.input_tokens, state.output_tokens);
        state.before = state.before.max(Amount(voucher.amount.0.saturating_sub(counted.0)));
        (state.peer, state.deposit) = (peer, deposit);
        // Another may have been stored since this one was.
        if voucher.amount >= state.voucher.amount {
            (state.voucher, state.signature) = (voucher, signature);
        }
        state.answers.clear();
        state.agreed.clear();
        state.used = Instant::now();
        drop(state);
        self.changed.notify_waiters();
    }

    pub fn peer(&self) -> PeerId {
        self.state.lock().peer.clone()
    }

    pub fn deposit(&self) -> Amount {
        self.state.lock().deposit
    }

    pub fn voucher(&self) -> (Voucher, Signature) {
        let state = self.state.lock();
        (state.voucher.clone(), state.signature.clone())
    }

    pub fn due(&self) -> Due {
        self.due_of(&self.state.lock())
    }

    fn due_of(&self, state: &State) -> Due {
        let (input_tokens, output_tokens) = (state.input_tokens, state.output_tokens);
        Due { amount: self.cost(state, 0, 0), input_tokens, output_tokens }
    }

    /// What all comes to with so many tokens more. What cannot be counted is more than anybody's deposit.
    fn cost(&self, state: &State, input_tokens: u64, output_tokens: u64) -> Amount {
        let input_tokens = state.input_tokens.saturating_add(input_tokens);
        let output_tokens = state.output_tokens.saturating_add(output_tokens);
        Amount(self.prices.of(input_tokens, output_tokens).0.saturating_add(state.before.0))
    }

    /// What was delivered and is promised by no voucher.
    pub fn exposure(&self) -> Amount {
        let state = self.state.lock();
        Amount(self.due_of(&state).amount.0.saturating_sub(state.voucher.amount.0))
    }

    /// Whether nobody has used it for so long.
    pub fn is_idle(&self, time: Duration) -> bool {
        self.running.load(Ordering::Acquire) == 0 && self.state.lock().used.elapsed() >= time
    }

    /// Delivers nothing more, for this reason.
    pub fn end(&self, why: PluginError) {
        self.state.lock().ended.get_or_insert(why);
        self.changed.notify_waiters();
    }

    /// Judges a voucher by what it says; who has signed it is for the caller to find out.
    pub fn judge(&self, voucher: &Voucher) -> Result<Judged> {
        let state = self.state.lock();
        if let Some(why) = &state.ended {
            return Err(why.clone());
        }
        let known = &state.voucher;
        if voucher.session != known.session || voucher.host != known.host {
            return Err(PluginError::invalid("the voucher is for another session or another host"));
        }
        if voucher == known {
            return Ok(Judged::Known);
        }
        let lowered = voucher.amount < known.amount
            || voucher.input_tokens < known.input_tokens
            || voucher.output_tokens < known.output_tokens;
        if lowered {
            let message = format!(
                "a voucher is for everything since the beginning, and this one promises {} wei for {} and {} tokens, less than the one \
                 before: {} wei for {} and {}",
                voucher.amount,
                voucher.input_tokens,
                voucher.output_tokens,
                known.amount,
                known.input_tokens,
                known.output_tokens
            );
            return Err(PluginError::invalid(message));
        }
        if voucher.amount > state.deposit {
            let message = format!("the voucher promises {} wei, and the deposit is {}", voucher.amount, state.deposit);
            return Err(PluginError::invalid(message));
        }
        Ok(Judged::Better)
    }

    /// The root that a voucher after these answers should have. Those that were counted before are left out.
    pub fn root_after(&self, answers: &[AnswerName]) -> Hash32 {
        let state = self.state.lock();
        let hashes = answers.iter().filter(|name| !state.agreed.contains(*name)).filter_map(|name| state.answers.get(name));
        transcript::after(&state.voucher.transcript, &hashes.copied().collect::<Vec<_>>())
    }

    /// Takes a better voucher, which is on disk: delivery goes on.
    pub fn take(&self, voucher: Voucher, signature: Signature, answers: &[AnswerName]) {
        let mut state = self.state.lock();
        for name in answers {
            if state.answers.remove(name).is_some() {
                state.agreed.insert(name.clone());
            }
        }
        // Another may have been stored since this one was judged.
        if voucher.amount >= state.voucher.amount {
            (state.voucher, state.signature) = (voucher, signature);
        }
        state.used = Instant::now();
        drop(state);
        self.changed.notify_waiters();
    }

    /// Begins to count for one request. `infer` is the message that asked for it, `prompt_tokens` an estimate.
    pub fn meter(self: &Arc<Self>, name: AnswerName, infer: &[u8], prompt_tokens: u64) -> Meter {
        self.running.fetch_add(1, Ordering::AcqRel);
        let hash = AnswerHash::new(infer);
        Meter { tab: self.clone(), name, hash, prompt_tokens, let_in: false, begun: false, output_tokens: 0 }
    }

    /// Counts these tokens as soon as the credit allows it; `remind` tells the client what is due meanwhile. `coming` is a prompt that is let
    /// in or, once its first piece is there, counts as read.
    async fn count(&self, coming: Coming, output_tokens: u64, remind: &(dyn Fn(Due) + Sync)) -> Result<()> {
        let began = Instant::now();
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before the state is read, so that no voucher slips in between.
            changed.as_mut().enable();
            let due = {
                let mut state = self.state.lock();
                if let Some(why) = &state.ended {
                    return Err(why.clone());
                }
                let now = self.cost(&state, 0, 0).0;
                let vouched = state.voucher.amount.0;
                let (let_in, prompt_tokens) = match coming {
                    // Room for a token of each: nothing is read that could not be answered.
                    Coming::Asked(tokens) => (state.coming.saturating_add(tokens), 0),
                    Coming::Read(tokens) => (0, tokens),
                    Coming::Nothing => (0, 0),
                };
                let least = output_tokens.max(u64::from(let_in > 0));
                if self.cost(&state, let_in.saturating_add(prompt_tokens), least) > state.deposit {
                    let message = format!("the deposit of {} wei is used up: fund another session", state.deposit);
                    return Err(PluginError::new(Code::Denied, message));
                }
                // A prompt needs no credit of its own, and neither does a piece for one who owes nothing.
                let piece = self.cost(&state, 0, output_tokens).0;
                if now <= vouched || piece.saturating_sub(vouched) <= self.credit.0 {
                    if let Coming::Asked(tokens) = coming {
                        state.coming = state.coming.saturating_add(tokens);
                    }
                    state.coming -= prompt_tokens.min(state.coming);
                    state.input_tokens = state.input_tokens.saturating_add(prompt_tokens);
                    state.output_tokens = state.output_tokens.saturating_add(output_tokens);
                    state.used = Instant::now();
                    return Ok(());
                }
                self.due_of(&state)
            };
            let left = self.patience.saturating_sub(began.elapsed());
            if left.is_zero() {
                let message = format!(
                    "no voucher came within {} s for what was delivered: {} wei are due",
                    self.patience.as_secs(),
                    due.amount
                );
                return Err(PluginError::new(Code::DeadlineExceeded, message));
            }
            remind(due);
            // A reminder that is lost is repeated.
            let _ = tokio::time::timeout(REMIND.min(left), changed).await;
        }
    }
}

/// The prompt of a request, on its way into the count.
#[derive(Clone, Copy)]
enum Coming {
    Nothing,
    Asked(u64),
    Read(u64),
}

/// What a voucher promises beyond the tokens that it names.
fn beyond(prices: Prices, voucher: &Voucher) -> Amount {
    Amount(voucher.amount.0.saturating_sub(prices.of(voucher.input_tokens, voucher.output_tokens).0))
}

/// Counts what one request delivers.
pub struct Meter {
    tab: Arc<Tab>,
    name: AnswerName,
    hash: AnswerHash,
    /// The estimate, which counts from the first piece on.
    prompt_tokens: u64,
    let_in: bool,
    begun: bool,
    output_tokens: u64,
}

impl Meter {
    pub fn session(&self) -> &SessionId {
        &self.tab.id
    }

    /// Waits until the session owes little enough for another request to begin.
    ///
    /// # Errors
    /// `Denied` where the deposit does not have its prompt and those of others that were let in.
    pub async fn admit(&mut self, remind: &(dyn Fn(Due) + Sync)) -> Result<()> {
        self.tab.count(Coming::Asked(self.prompt_tokens), 0, remind).await?;
        self.let_in = true;
        Ok(())
    }

    /// Waits until this piece may be delivered, and counts it.
    pub async fn release(&mut self, text: &Text, message: &[u8], remind: &(dyn Fn(Due) + Sync)) -> Result<()> {
        let tokens = tokens_of(text).into();
        let coming = if self.begun { Coming::Nothing } else { Coming::Read(self.prompt_tokens) };
        self.tab.count(coming, tokens, remind).await?;
        self.begun = true;
        self.output_tokens += tokens;
        self.hash.piece(message);
        Ok(())
    }

    /// Counts the end of an answer exactly.
    pub fn done(mut self, usage: &Usage, message: &[u8]) {
        self.hash.piece(message);
        let mut state = self.tab.state.lock();
        let estimated = if self.begun { self.prompt_tokens } else { 0 };
        let others = state.input_tokens.saturating_sub(estimated);
        state.input_tokens = others.saturating_add(usage.prompt_tokens.into());
        let too_many = self.output_tokens.saturating_sub(usage.completion_tokens.into());
        state.output_tokens -= too_many.min(state.output_tokens);
        let hash = std::mem::replace(&mut self.hash, AnswerHash::new(&[]));
        if state.answers.len() + state.agreed.len() >= MOST_ANSWERS {
            state.answers.clear();
            state.agreed.clear();
        }
        state.answers.insert(self.name.clone(), hash.end());
        state.used = Instant::now();
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.tab.running.fetch_sub(1, Ordering::AcqRel);
        if self.let_in && !self.begun {
            let mut state = self.tab.state.lock();
            state.coming -= self.prompt_tokens.min(state.coming);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::market::journal::sessions::tests::row;

    const CREDIT: u64 = 100;

    fn hash(digit: &str) -> Hash32 {
        format!("0x{}", digit.repeat(64))
    }

    fn voucher(amount: u128, input_tokens: u64, output_tokens: u64) -> Voucher {
        Voucher { amount: Amount(amount), input_tokens, output_tokens, ..row().voucher }
    }

    /// A tab on which a token read or generated costs one wei, and so many may be ahead.
    fn tab(deposit: u128, patience: Duration) -> Arc<Tab> {
        Tab::new(&SessionRow { deposit: Amount(deposit), ..row() }, Amount(CREDIT.into()), patience)
    }

    fn piece(tokens: u32) -> Text {
        Text { text: "x".repeat(tokens as usize), tokens, logprobs: vec![] }
    }

    fn nobody(_: Due) {}

    #[tokio::test]
    async fn delivery_stops_at_the_credit_and_goes_on_with_a_voucher() {
        let tab = tab(10_000, Duration::from_secs(2));
        let mut meter = tab.meter(("s".into(), 1), b"infer", 30);
        for _ in 0..100 - 30 {
            meter.release(&piece(1), b"piece", &nobody).await.expect("is within the credit");
        }
        assert_eq!(tab.exposure(), Amount(100));
        let stopped = meter.release(&piece(1), b"piece", &nobody).await.expect_err("is beyond it");
        assert_eq!(stopped.code, Code::DeadlineExceeded);
        assert_eq!(tab.due(), Due { amount: Amount(100), input_tokens: 30, output_tokens: 70 });

        let waiting = {
            let tab = tab.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                tab.take(voucher(60, 30, 30), vec![], &[]);
            })
        };
        meter.release(&piece(40), b"piece", &nobody).await.expect("a voucher came");
        waiting.await.expect("ends");
        assert_eq!(tab.exposure(), Amount(80));
    }

    #[tokio::test]
    async fn whoever_does_not_pay_takes_along_the_credit_and_one_prompt() {
        let tab = tab(1_000_000, Duration::from_millis(1));
        // As many requests as it likes, with prompts that are dearer than the credit.
        for id in 0..20 {
            let mut meter = tab.meter(("s".into(), id), b"infer", 5000);
            while meter.release(&piece(7), b"piece", &nobody).await.is_ok() {}
        }
        assert!(tab.exposure() <= Amount(u128::from(CREDIT) + 5000), "{}", tab.exposure());
    }

    #[tokio::test]
    async fn a_piece_dearer_than_the_credit_waits_until_nothing_is_owed() {
        let tab = tab(10_000, Duration::from_millis(1));
        let mut meter = tab.meter(("s".into(), 1), b"infer", 0);
        meter.release(&piece(400), b"piece", &nobody).await.expect("nothing was owed");
        meter.release(&piece(1), b"piece", &nobody).await.expect_err("much is owed");
        tab.take(voucher(400, 0, 400), vec![], &[]);
        meter.release(&piece(400), b"piece", &nobody).await.expect("nothing is owed");
    }

    #[tokio::test]
    async fn the_deposit_is_never_exceeded() {
        let tab = tab(150, Duration::from_millis(1));
        let mut meter = tab.meter(("s".into(), 1), b"infer", 0);
        meter.release(&piece(100), b"piece", &nobody).await.expect("is covered");
        tab.take(voucher(100, 0, 100), vec![], &[]);
        let stopped = meter.release(&piece(51), b"piece", &nobody).await.expect_err("is not covered");
        assert_eq!(stopped.code, Code::Denied);
        assert!(stopped.message.contains("used up"), "{stopped}");
        meter.release(&piece(50), b"piece", &nobody).await.expect("is covered to the wei");
    }

    #[tokio::test]
    async fn a_prompt_that_the_deposit_does_not_have_is_not_read() {
        let tab = tab(100, Duration::from_millis(1));
        let mut first = tab.meter(("s".into(), 1), b"infer", 60);
        first.admit(&nobody).await.expect("is there");
        let mut second = tab.meter(("s".into(), 2), b"infer", 60);
        assert_eq!(second.admit(&nobody).await.expect_err("is not there for both").code, Code::Denied);
        drop(first);
        second.admit(&nobody).await.expect("is there again");
        second.release(&piece(10), b"piece", &nobody).await.expect("is there");
        assert_eq!(tab.due().amount, Amount(70));
    }

    #[tokio::test]
    async fn whatever_tokens_a_client_names_it_gets_no_more_for_its_money() {
        // None at all: what was promised is due all the same, and the credit is not given anew.
        let tab = tab(1000, Duration::from_millis(1));
        tab.go_on(PeerId("peer".into()), Amount(1000), voucher(500, 0, 0), vec![]);
        let mut meter = tab.meter(("s".into(), 1), b"infer", 0);
        let mut got = 0;
        while meter.release(&piece(1), b"piece", &nobody).await.is_ok() {
            got += 1;
        }
        assert_eq!(got, CREDIT);
        // More than can be counted: nothing comes at all.
        tab.go_on(PeerId("peer".into()), Amount(1000), voucher(500, 0, u64::MAX), vec![]);
        meter.release(&piece(1), b"piece", &nobody).await.expect_err("is more than the deposit");
        // A lower one than is known does not replace it.
        tab.go_on(PeerId("peer".into()), Amount(1000), voucher(1, 0, 0), vec![]);
        assert_eq!(tab.voucher().0.amount, Amount(500));
    }

    #[test]
    fn a_voucher_is_for_all_that_was_delivered_and_never_for_less_than_before() {
        let tab = tab(1000, Duration::ZERO);
        assert_eq!(tab.judge(&voucher(0, 0, 0)), Ok(Judged::Known));
        assert_eq!(tab.judge(&voucher(300, 100, 200)), Ok(Judged::Better));
        tab.take(voucher(300, 100, 200), vec![], &[]);
        assert_eq!(tab.judge(&voucher(300, 100, 200)), Ok(Judged::Known), "replayed");
        // The amount since the last one, in place of the whole.
        let delta = tab.judge(&voucher(50, 0, 50)).expect_err("is a delta");
        assert!(delta.message.contains("since the beginning"), "{delta}");
        assert!(tab.judge(&voucher(299, 100, 200)).is_err());
        assert!(tab.judge(&voucher(300, 99, 200)).is_err());
        assert!(tab.judge(&voucher(300, 100, 199)).is_err());
        assert!(tab.judge(&voucher(1001, 100, 200)).is_err());
        assert_eq!(tab.judge(&voucher(1000, 100, 200)), Ok(Judged::Better));
        assert!(tab.judge(&Voucher { session: hash("8"), ..voucher(400, 100, 200) }).is_err());
        assert!(tab.judge(&Voucher { host: format!("0x{}", "3".repeat(40)), ..voucher(400, 100, 200) }).is_err());
        tab.end(PluginError::new(Code::Denied, "settling"));
        assert!(tab.judge(&voucher(400, 100, 200)).is_err());
    }

    #[tokio::test]
    async fn the_end_of_an_answer_counts_exactly_and_agrees_on_a_transcript() {
        let tab = tab(1000, Duration::ZERO);
        let name = ("s".to_owned(), 1);
        let mut meter = tab.meter(name.clone(), b"infer", 30);
        meter.release(&piece(9), b"piece", &nobody).await.expect("is within the credit");
        let usage = Usage { prompt_tokens: 41, completion_tokens: 8, cached_tokens: 0 };
        meter.done(&usage, b"last");
        assert_eq!(tab.due(), Due { amount: Amount(49), input_tokens: 41, output_tokens: 8 });
        let mut answer = AnswerHash::new(b"infer");
        answer.piece(b"piece");
        answer.piece(b"last");
        let root = transcript::after(&hash("0"), &[answer.end()]);
        assert_eq!(tab.root_after(std::slice::from_ref(&name)), root);
        tab.take(Voucher { transcript: root.clone(), ..voucher(49, 41, 8) }, vec![], std::slice::from_ref(&name));
        assert_eq!(tab.root_after(&[name]), root, "an answer counts once, however often it is named");
        assert!(!tab.is_idle(Duration::from_secs(5)));
        assert!(tab.is_idle(Duration::ZERO));
    }
}
