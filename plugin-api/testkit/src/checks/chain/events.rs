//! What has happened in the market, and what has not.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::chain::*;
use fabstir_plugin_api::error::Code;

use super::actor::{Actor, patient_stream};
use super::{EVERY_SURE, SOON, hash_of, heads, is_hash, posting, unique};
use crate::harness::{During, Harness, patient, refused};
use crate::report::Outcome;

/// Everything that is told after a cursor, up to the first word that this block has been reached.
pub async fn told_up_to(chain: &Arc<dyn Chain>, after: Option<Cursor>, number: u64) -> Result<Vec<Notice>> {
    let mut notices = Vec::new();
    let reading = async {
        let mut stream = chain.events(&patient_stream(), after.map_or(Since::Beginning, Since::After)).await.during("events")?;
        loop {
            let notice = stream.next().await.context("the stream of events has ended")?.during("the stream of events")?;
            let reached = matches!(&notice, Notice::UpTo { block, .. } if block.number >= number);
            notices.push(notice);
            if reached {
                return Ok(());
            }
        }
    };
    match tokio::time::timeout(SOON, reading).await {
        Ok(read) => read.map(|()| notices),
        Err(_) => {
            let last = notices.last();
            bail!("after {} s the events have not come up to block {number}; the last word is {last:?}", SOON.as_secs())
        }
    }
}

/// The events among notices up to a block, each with its place: what others do on the same chain meanwhile comes later.
fn events_of(notices: &[Notice], reached: u64) -> Result<Vec<(Cursor, Block, MarketEvent)>> {
    let mut events = Vec::new();
    for notice in notices {
        match notice {
            Notice::Event { cursor, block, event } if block.number <= reached => {
                events.push((cursor.clone(), block.clone(), event.clone()));
            }
            Notice::Event { .. } | Notice::UpTo { .. } => {}
            Notice::Back { .. } | Notice::Unknown => bail!("a chain that takes nothing back is told with {notice:?}"),
        }
    }
    Ok(events)
}

pub async fn unknown_is_not_found(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let chain = instance.client::<dyn Chain>();
    if let Err(skip) = heads(&chain).await? {
        return Ok(skip);
    }
    for sure in EVERY_SURE {
        for job in [0, u64::MAX] {
            refused(&format!("job {job} ({sure:?})"), chain.job(&patient(), job, sure).await, &[Code::NotFound])?;
        }
        let session = hash_of(&unique("no session"));
        refused(&format!("an unknown session ({sure:?})"), chain.session(&patient(), session, sure).await, &[Code::NotFound])?;
        for malformed in ["", "0x", "0x12", &"f".repeat(64), &format!("0x{}", "g".repeat(64))] {
            let what = format!("the session {malformed:?}");
            let answer = chain.session(&patient(), malformed.into(), sure).await;
            refused(&what, answer, &[Code::InvalidArgument, Code::NotFound])?;
        }
    }
    let _signings =
        chain.begin(&patient_stream(), crate::checks::chain::key::Key::made_of("unknown").account).await.during("begin")?;
    refused("an order that was never taken", chain.progress(&patient(), unique("no order")).await, &[Code::NotFound])?;
    Ok(Outcome::Pass)
}

pub async fn events_resume(harness: &Harness) -> Result<Outcome> {
    const JOBS: usize = 3;
    /// Cursors from which the stream is read again, counted from the newest.
    const AGAIN: usize = 12;

    let actor = match Actor::start(harness, "events-resume").await? {
        Ok(actor) => actor,
        Err(skip) => return Ok(skip),
    };
    for foreign in ["", "zz", "no cursor", "🦀"] {
        let answer = actor.chain.events(&patient(), Since::After(Cursor(foreign.into()))).await;
        refused(&format!("events after the cursor {foreign:?}"), answer, &[Code::InvalidArgument])?;
    }

    let before = actor.chain.heads(&patient()).await.during("heads")?.latest.number;
    let earlier = told_up_to(&actor.chain, None, before).await?;
    let Some(Notice::UpTo { cursor: start, .. }) = earlier.last().cloned() else { bail!("the stream has no end of what was") };

    // One reader is there while things happen; all later readers must be told the same.
    let watching = {
        let (chain, start, account) = (actor.chain.clone(), start.clone(), actor.key.account.clone());
        async move {
            let mut stream = chain.events(&patient_stream(), Since::After(start)).await.during("events")?;
            let mut notices = Vec::new();
            let mut ours = 0;
            while ours < 2 * JOBS {
                let notice = stream.next().await.context("the stream of events has ended")?.during("the stream of events")?;
                ours += usize::from(is_of(&notice, &account));
                notices.push(notice);
            }
            Ok(notices)
        }
    };
    let acting = async {
        let _signer = actor.sign_all().await?;
        let mut inputs = Vec::new();
        for _ in 0..JOBS {
            let (input, act) = posting(&actor.heads);
            let made = actor.done(&unique("post"), &act).await?.made.context("a posted job has no number")?;
            let job = made.parse().with_context(|| format!("a job's number is {made:?}"))?;
            actor.done(&unique("cancel"), &Act::CancelJob { job }).await?;
            inputs.push((input, job));
        }
        Ok::<_, anyhow::Error>(inputs)
    };
    let both = async { tokio::try_join!(watching, acting) };
    let both = tokio::time::timeout(2 * SOON, both).await;
    let (live, inputs) = both.context("not all events of jobs that were posted and cancelled are told while one waits")??;

    let reached = actor.chain.heads(&patient()).await.during("heads")?.latest.number;
    let all = told_up_to(&actor.chain, Some(start), reached).await?;
    let events = events_of(&all, reached)?;
    let ours = events.iter().filter_map(|(_, _, event)| match event {
        MarketEvent::JobPosted { job, input_commitment, .. } => Some((input_commitment.clone(), *job)),
        _ => None,
    });
    let ours: Vec<_> = ours.filter(|(input, _)| inputs.iter().any(|(known, _)| known == input)).collect();
    ensure!(ours == inputs, "{inputs:?} were posted in this order, the events tell {ours:?}");
    ensure!(events.windows(2).all(|pair| pair[0].1.number <= pair[1].1.number), "the events are not in the order of blocks");
    for (_, block, event) in &events {
        ensure!(is_hash(&block.hash) && block.time_s > 0, "{event:?} is told in the block {block:?}");
    }

    let live = events_of(&live, reached)?;
    ensure!(events.starts_with(&live), "who waited was told {live:?}, who came later {events:?}");

    let first = all.len().saturating_sub(AGAIN);
    for (number, notice) in all.iter().enumerate().skip(first) {
        let (Notice::Event { cursor, .. } | Notice::UpTo { cursor, .. }) = notice else { continue };
        let due = events_of(&all[number + 1..], reached)?;
        let told = events_of(&told_up_to(&actor.chain, Some(cursor.clone()), reached).await?, reached)?;
        ensure!(told == due, "after {cursor:?}, {due:?} had followed; read again, it is {told:?}");
    }

    // A cursor is kept for another day.
    let actor = Actor::restart(harness, actor).await?;
    if let Some((cursor, _, _)) = events.first() {
        let told = events_of(&told_up_to(&actor.chain, Some(cursor.clone()), reached).await?, reached)?;
        ensure!(told == events[1..], "after a restart, other events follow the cursor {cursor:?}");
    }
    Ok(Outcome::Pass)
}

/// Whether a notice tells that this account has posted a job or got one back.
fn is_of(notice: &Notice, account: &str) -> bool {
    match notice {
        Notice::Event { event: MarketEvent::JobPosted { client, .. } | MarketEvent::JobRefunded { client, .. }, .. } => {
            super::same_account(client, account)
        }
        _ => false,
    }
}
