//! What becomes of an order: carried out once, refused by its signer, or refused by the contract.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::chain::*;
use fabstir_plugin_api::error::Code;
use parking_lot::Mutex;

use super::actor::{Actor, asked, has_failed, is_carried_out, patient_stream};
use super::key::Key;
use super::{EVERY_SURE, LOOK, MILLI, SOON, ZEROS, is_hash, order, posting, same_account, unique};
use crate::harness::{During, Harness, patient, refused};
use crate::report::Outcome;

/// The number of the job that an order has made.
fn job_made(progress: &Progress) -> Result<JobId> {
    let made = progress.made.as_deref().context("an order that has posted a job does not tell its number")?;
    made.parse().with_context(|| format!("the number of a posted job is {made:?}"))
}

/// What an order has cost. Its transaction and block are told along with it.
fn fee_of(progress: &Progress) -> Result<u128> {
    let Progress { transaction: Some(transaction), block: Some(_), fee: Some(Amount(fee)), .. } = progress else {
        bail!("an order in a block lacks its transaction, block or fee: {progress:?}");
    };
    ensure!(is_hash(transaction), "{transaction:?} is no transaction");
    ensure!(*fee > 0, "an order in a block has cost nothing");
    Ok(*fee)
}

pub async fn order_is_carried_out(harness: &Harness) -> Result<Outcome> {
    let actor = match Actor::start(harness, "order-is-carried-out").await? {
        Ok(actor) => actor,
        Err(skip) => return Ok(skip),
    };
    let _signer = actor.sign_all().await?;
    let stages = Stages::watch(&actor).await?;
    let (input, act) = posting(&actor.heads);
    let quote = actor.chain.quote(&patient(), act.clone()).await.during("quote")?;
    ensure!(quote.refusal.is_none() && quote.fee.0 > 0, "a job that can be posted is quoted with {quote:?}");

    let start = actor.balances().await?;
    let key = unique("post");
    let taken = actor.act(&key, &act).await?;
    ensure!(!has_failed(taken.state), "a new order begins at {taken:?}");
    let posted = actor.carried_out(&key).await?;
    let (job, fee) = (job_made(&posted)?, fee_of(&posted)?);
    ensure!(quote.most.is_none_or(|most| most.0 >= fee), "a fee of {fee} is more than was quoted: {quote:?}");
    stages.were_in_order(&key).await?;

    let after = actor.balances().await?;
    let (had, has) = (start.coin.0, after.coin.0);
    ensure!(had.checked_sub(MILLI + fee) == Some(has), "of {had}, a deposit of {MILLI} and a fee of {fee} have left {has}");
    ensure!(after.credit == start.credit, "posting a job has changed the credit from {} to {}", start.credit, after.credit);

    let terms = super::job_terms_of(&act);
    let Job { client, terms: read, input_commitment, state, host, until_s, attempts, proven } =
        actor.chain.job(&patient(), job, Sure::Latest).await.during("job")?;
    ensure!(same_account(&client, &actor.key.account), "the job was posted by {client}");
    ensure!(read == terms, "posted under {terms:?}, the job stands under {read:?}");
    ensure!(input_commitment == input, "the job's input is {input_commitment}, not {input}");
    ensure!(
        (state, attempts, proven) == (JobState::Open, 0, false),
        "a new job is {state:?} after {attempts} attempts, proven: {proven}"
    );
    ensure!(host.is_none(), "a job that nobody has claimed is held by {host:?}");
    ensure!(until_s == Some(terms.claim_by_s), "a job to be claimed by {} is open until {until_s:?}", terms.claim_by_s);
    let (told, event_terms) = actor.posted_once(&input).await?;
    ensure!(told == job, "the order has made the job {job}, the event tells of {told}");
    ensure!(event_terms == terms, "posted under {terms:?}, the event tells {event_terms:?}");

    let key = unique("cancel");
    let cancel_fee = fee_of(&actor.done(&key, &Act::CancelJob { job }).await?)?;
    let refunded = actor.balances().await?;
    ensure!(
        refunded.credit.0 == after.credit.0 + MILLI,
        "a cancelled job of {MILLI} has made {} of {}",
        refunded.credit,
        after.credit
    );
    ensure!(refunded.coin.0 + cancel_fee == has, "cancelling for {cancel_fee} has made {} of {has}", refunded.coin);
    let state = actor.chain.job(&patient(), job, Sure::Latest).await.during("job")?.state;
    ensure!(state == JobState::Refunded, "a cancelled job is {state:?}");

    let key = unique("withdraw");
    let withdraw = Act::Withdraw { coin: ZEROS.into(), to: actor.key.account.clone() };
    let withdraw_fee = fee_of(&actor.done(&key, &withdraw).await?)?;
    let end = actor.balances().await?;
    ensure!(end.credit.0 == 0, "{} is left of the credit after all was withdrawn", end.credit);
    ensure!(
        end.coin.0 + withdraw_fee == refunded.coin.0 + refunded.credit.0,
        "withdrawing {} for {withdraw_fee} has made {} of {}",
        refunded.credit,
        end.coin,
        refunded.coin
    );
    for sure in EVERY_SURE {
        // Where the chain has not come so far, it does not know the job; it never knows another.
        match actor.chain.job(&patient(), job, sure).await {
            Ok(read) => ensure!(read.terms == terms, "the job's terms are others when asked {sure:?}"),
            Err(error) if error.code == Code::NotFound && sure != Sure::Latest => {}
            Err(error) => bail!("job ({sure:?}): {}", crate::harness::told(&error)),
        }
    }
    Ok(Outcome::Pass)
}

/// The stages that orders come to, as `progresses` tells them.
struct Stages {
    seen: Arc<Mutex<Vec<Progress>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Stages {
    async fn watch(actor: &Actor) -> Result<Self> {
        let mut stream = actor.chain.progresses(&patient_stream()).await.during("progresses")?;
        let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
        let noted = seen.clone();
        let task = tokio::spawn(async move {
            while let Some(Ok(progress)) = stream.next().await {
                noted.lock().push(progress);
            }
        });
        Ok(Self { seen, task })
    }

    /// An order was told until it was carried out, and never went back.
    async fn were_in_order(&self, key: &str) -> Result<()> {
        let deadline = Instant::now() + SOON;
        loop {
            let states: Vec<ProgressState> =
                self.seen.lock().iter().filter(|progress| progress.key == key).map(|progress| progress.state).collect();
            if states.last().is_some_and(|state| is_carried_out(*state)) {
                let ranks: Option<Vec<u8>> = states.iter().map(|state| rank(*state)).collect();
                let ranks = ranks.with_context(|| format!("an order that is carried out went through {states:?}"))?;
                ensure!(ranks.is_sorted(), "an order that nothing held up went through {states:?}");
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "progresses tells {states:?} of an order that is carried out");
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl Drop for Stages {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How far along the good way a state is.
fn rank(state: ProgressState) -> Option<u8> {
    match state {
        ProgressState::Planned => Some(0),
        ProgressState::Sent => Some(1),
        ProgressState::Mined => Some(2),
        ProgressState::Safe => Some(3),
        ProgressState::Final => Some(4),
        ProgressState::Reverted { .. } | ProgressState::Dead | ProgressState::Unknown => None,
    }
}

pub async fn same_key_is_one_order(harness: &Harness) -> Result<Outcome> {
    let actor = match Actor::start(harness, "same-key-is-one-order").await? {
        Ok(actor) => actor,
        Err(skip) => return Ok(skip),
    };
    let _signer = actor.sign_all().await?;
    let (input, act) = posting(&actor.heads);
    let (other_input, other) = posting(&actor.heads);
    let key = unique("twice");
    let (first, second) = tokio::join!(actor.act(&key, &act), actor.act(&key, &act));
    first.and(second).context("one order, twice at once")?;
    let under_way = actor.chain.act(&patient(), order(&key, &other)).await;
    refused("another act under the key of an order that is under way", under_way, &[Code::InvalidArgument])?;

    let posted = actor.carried_out(&key).await?;
    let again = actor.act(&key, &act).await?;
    ensure!(is_carried_out(again.state) && again.made == posted.made, "carried out as {posted:?}, ordered again it is {again:?}");
    let late = actor.chain.act(&patient(), order(&key, &other)).await;
    refused("another act under the key of an order that is carried out", late, &[Code::InvalidArgument])?;
    let long = order(&"k".repeat(201), &other);
    refused("a key of 201 bytes", actor.chain.act(&patient(), long).await, &[Code::InvalidArgument])?;

    // What follows comes after anything that the orders before could still send.
    let longest = format!("{:k<200}", unique("longest/"));
    let cancel = Act::CancelJob { job: job_made(&posted)? };
    actor.done(&longest, &cancel).await.context("an order with a key of 200 bytes")?;
    let (job, _) = actor.posted_once(&input).await?;
    ensure!(job == job_made(&posted)?, "the order has made the job {:?}, the event tells of {job}", posted.made);
    ensure!(actor.posted(&other_input).await?.is_empty(), "an act that was refused was carried out");

    let actor = Actor::restart(harness, actor).await?;
    let _signer = actor.sign_all().await?;
    let again = actor.act(&key, &act).await?;
    ensure!(is_carried_out(again.state) && again.made == posted.made, "after a restart, an order carried out is {again:?}");
    let late = actor.chain.act(&patient(), order(&key, &other)).await;
    refused("another act under a key that is known from before a restart", late, &[Code::InvalidArgument])?;
    actor.done(&unique("withdraw"), &Act::Withdraw { coin: ZEROS.into(), to: actor.key.account.clone() }).await?;
    actor.posted_once(&input).await?;
    Ok(Outcome::Pass)
}

pub async fn refusal_is_final(harness: &Harness) -> Result<Outcome> {
    const REFUSAL: &str = "the check does not pay for this";

    let actor = match Actor::start(harness, "refusal-is-final").await? {
        Ok(actor) => actor,
        Err(skip) => return Ok(skip),
    };
    let mut signings = actor.begin().await?;
    let before = actor.balances().await?.coin;
    let (input, act) = posting(&actor.heads);
    let key = unique("refused");
    actor.act(&key, &act).await?;
    let signing = asked(&mut signings, &key).await?;
    let no = Signed { id: signing.id, signature: None, refusal: Some(REFUSAL.into()) };
    actor.chain.signed(&patient(), no).await.during("signed with a refusal")?;
    let dead = actor.failed(&key).await?;
    ensure!(dead.state == ProgressState::Dead, "an order that was not signed ends as {dead:?}");
    let why = dead.why.as_deref().unwrap_or_default();
    ensure!(why.contains(REFUSAL), "the signer said {REFUSAL:?}, the order tells {why:?}");
    ensure!(dead.made.is_none(), "an order that was not signed has made {:?}", dead.made);
    let balances = actor.balances().await?;
    ensure!(balances.coin == before, "an order that was not signed has made {} of {before}", balances.coin);

    // A late signature changes nothing, and neither does ordering it again.
    actor.sign(&signing).await.context("an answer that is not waited for any more")?;
    let again = actor.act(&key, &act).await?;
    ensure!(again.state == ProgressState::Dead, "refused, ordered again under the same key: {again:?}");

    let (next_input, next) = posting(&actor.heads);
    let next_key = unique("next");
    actor.act(&next_key, &next).await?;
    let signing = asked(&mut signings, &next_key).await.context("after an order that was not signed")?;
    actor.sign(&signing).await?;
    actor.carried_out(&next_key).await.context("after an order that was not signed")?;
    actor.posted_once(&next_input).await?;
    ensure!(actor.posted(&input).await?.is_empty(), "an order that was not signed was carried out");
    Ok(Outcome::Pass)
}

pub async fn wrong_signature_is_refused(harness: &Harness) -> Result<Outcome> {
    let actor = match Actor::start(harness, "wrong-signature-is-refused").await? {
        Ok(actor) => actor,
        Err(skip) => return Ok(skip),
    };
    let mut signings = actor.begin().await?;
    let (input, act) = posting(&actor.heads);
    let key = unique("wrong signature");
    actor.act(&key, &act).await?;
    let signing = asked(&mut signings, &key).await?;

    let right = actor.key.sign(&signing.payload);
    let changed = |change: &dyn Fn(&mut Signature)| {
        let mut signature = right.clone();
        change(&mut signature);
        signature
    };
    let wrong = [
        ("another account's", Key::made_of("somebody else").sign(&signing.payload)),
        ("one over other bytes", actor.key.sign(b"other bytes")),
        ("one of 64 bytes", right[..64].to_vec()),
        ("one of 66 bytes", changed(&|signature| signature.push(0))),
        ("an empty one", Vec::new()),
        ("one with the other parity", changed(&|signature| signature[64] = 55 - signature[64])),
        ("one that ends with 0 or 1", changed(&|signature| signature[64] -= 27)),
        ("one with the higher s", actor.key.sign_with_high_s(&signing.payload)),
    ];
    for (what, signature) in wrong {
        let answer = Signed { id: signing.id, signature: Some(signature), refusal: None };
        refused(&format!("a wrong signature, {what},"), actor.chain.signed(&patient(), answer).await, &[Code::InvalidArgument])?;
        let progress = actor.chain.progress(&patient(), key.clone()).await.during("progress")?;
        ensure!(progress.state == ProgressState::Planned, "after a wrong signature, {what}, the order is at {progress:?}");
    }
    actor.sign(&signing).await.context("the right signature, after wrong ones")?;
    actor.carried_out(&key).await?;
    actor.sign(&signing).await.context("the right signature, once more")?;
    actor.posted_once(&input).await?;
    Ok(Outcome::Pass)
}

pub async fn revert_is_told(harness: &Harness) -> Result<Outcome> {
    let actor = match Actor::start(harness, "revert-is-told").await? {
        Ok(actor) => actor,
        Err(skip) => return Ok(skip),
    };
    let other = match Actor::start(harness, "revert-is-told, somebody else").await? {
        Ok(actor) => actor,
        Err(skip) => return Ok(skip),
    };
    let (_signer, _other_signer) = (actor.sign_all().await?, other.sign_all().await?);
    let (_, act) = posting(&other.heads);
    let theirs = job_made(&other.done(&unique("theirs"), &act).await?)?;

    for (what, job) in [("somebody else's job", theirs), ("a job that nobody has posted", u64::MAX)] {
        let act = Act::CancelJob { job };
        let quote = actor.chain.quote(&patient(), act.clone()).await.during(&format!("quote of cancelling {what}"))?;
        ensure!(quote.refusal.is_some_and(|why| !why.is_empty()), "cancelling {what} is quoted without a refusal");
        ensure!(quote.fee.0 > 0, "nothing says what cancelling {what} would cost if it were not refused");
        let key = unique("cancel");
        actor.act(&key, &act).await?;
        let failed = actor.failed(&key).await.with_context(|| format!("cancelling {what}"))?;
        ensure!(failed.why.as_ref().is_some_and(|why| !why.is_empty()), "cancelling {what} failed without a why: {failed:?}");
    }
    let state = actor.chain.job(&patient(), theirs, Sure::Latest).await.during("job")?.state;
    ensure!(state == JobState::Open, "somebody else's job is {state:?}");

    // Two orders of which one can succeed: each was possible when it was given.
    let (_, act) = posting(&actor.heads);
    let ours = job_made(&actor.done(&unique("ours"), &act).await.context("after orders that failed")?)?;
    let keys = [unique("cancel"), unique("cancel")];
    let cancel = Act::CancelJob { job: ours };
    let (first, second) = tokio::join!(actor.act(&keys[0], &cancel), actor.act(&keys[1], &cancel));
    first.and(second)?;
    let mut ends = Vec::new();
    for key in &keys {
        ends.push(end_of(&actor, key).await?);
    }
    let good = ends.iter().filter(|progress| is_carried_out(progress.state)).count();
    ensure!(good == 1, "a job was cancelled twice, and the orders ended as {ends:?}");
    let bad = ends.iter().find(|progress| has_failed(progress.state));
    ensure!(bad.is_some_and(|progress| progress.why.is_some()), "an order failed without a why: {ends:?}");
    other.done(&unique("cancel"), &Act::CancelJob { job: theirs }).await?;
    Ok(Outcome::Pass)
}

/// How an order has ended, one way or the other.
async fn end_of(actor: &Actor, key: &str) -> Result<Progress> {
    let deadline = Instant::now() + SOON;
    loop {
        let progress = actor.chain.progress(&patient(), key.into()).await.during("progress")?;
        if is_carried_out(progress.state) || has_failed(progress.state) {
            return Ok(progress);
        }
        ensure!(Instant::now() < deadline, "after {} s an order is at {progress:?}", SOON.as_secs());
        tokio::time::sleep(LOOK).await;
    }
}
