//! Who is acted for, and what an order lives through.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::chain::*;
use fabstir_plugin_api::error::Code;

use super::actor::{Actor, asked, patient_stream};
use super::key::Key;
use super::{LOOK, SOON, order, posting, unique, without_chain};
use crate::harness::{During, Harness, patient, refused, told};
use crate::report::Outcome;

pub async fn one_account_at_a_time(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let chain = instance.client::<dyn Chain>();
    let (one, other) = (Key::made_of("one").account, Key::made_of("other").account);
    for malformed in ["", "0x", "0x12", "nobody", &one[..41], &format!("{one}0"), &format!("0x{}", "g".repeat(40))] {
        let answer = chain.begin(&patient_stream(), malformed.into()).await;
        refused(&format!("begin for the account {malformed:?}"), answer, &[Code::InvalidArgument])?;
    }
    let act = Act::CancelJob { job: 1 };
    let unasked = chain.act(&patient(), order(&unique("unasked"), &act)).await;
    refused("an order while no account is acted for", unasked, &[Code::InvalidArgument])?;

    let signings = chain.begin(&patient_stream(), one.clone()).await.during("begin")?;
    let second = chain.begin(&patient_stream(), other.clone()).await;
    refused("begin for a second account", second, &[Code::InvalidArgument])?;

    // Another process with the same state is as good as this one's twin: it must not send what this one sends.
    let twin = harness.connect_in(instance.state_dir().to_owned())?;
    match twin.configure(twin.config()).await {
        Ok(()) => {
            let begun = twin.client::<dyn Chain>().begin(&patient_stream(), one.clone()).await;
            refused("begin in a second instance on the same state", begun, &[Code::Unavailable])?;
        }
        Err(error) if error.code == Code::Unavailable => {}
        Err(error) => bail!("configure of a second instance on the same state: {}", told(&error)),
    }
    drop(twin);

    drop(signings);
    let deadline = Instant::now() + SOON;
    loop {
        match chain.begin(&patient_stream(), other.clone()).await {
            Ok(_) => return Ok(Outcome::Pass),
            // That the stream is gone has to arrive first.
            Err(error) if error.code == Code::InvalidArgument && Instant::now() < deadline => tokio::time::sleep(LOOK).await,
            Err(error) => bail!("begin after the stream for another account was dropped: {}", told(&error)),
        }
    }
}

pub async fn order_survives_restart(harness: &Harness) -> Result<Outcome> {
    let actor = match Actor::start(harness, "order-survives-restart").await? {
        Ok(actor) => actor,
        Err(skip) => return Ok(skip),
    };

    // Asked for a signature, and ended before the answer.
    let (input, act) = posting(&actor.heads);
    let key = unique("unanswered");
    let mut signings = actor.begin().await?;
    actor.act(&key, &act).await?;
    asked(&mut signings, &key).await?;
    drop(signings);
    let actor = Actor::restart(harness, actor).await?;
    let mut signings = actor.begin().await?;
    let progress = actor.chain.progress(&patient(), key.clone()).await.during("progress after a restart")?;
    ensure!(progress.state == ProgressState::Planned, "an order that was not signed is at {progress:?} after a restart");
    let signing = asked(&mut signings, &key).await.context("after a restart")?;
    actor.sign(&signing).await?;
    actor.carried_out(&key).await.context("after a restart before the signature")?;
    actor.posted_once(&input).await.context("after a restart before the signature")?;
    drop(signings);

    // Signed, and ended at once.
    let actor = Actor::restart(harness, actor).await?;
    let (input, act) = posting(&actor.heads);
    let key = unique("just answered");
    let mut signings = actor.begin().await?;
    actor.act(&key, &act).await?;
    let signing = asked(&mut signings, &key).await?;
    actor.sign(&signing).await?;
    drop(signings);
    let actor = Actor::restart(harness, actor).await?;
    let signer = actor.sign_all().await?;
    actor.carried_out(&key).await.context("after a restart right after the signature")?;
    // What follows comes after anything that the order before could still send.
    let (next_input, next) = posting(&actor.heads);
    actor.done(&unique("next"), &next).await?;
    actor.posted_once(&input).await.context("after a restart right after the signature")?;
    actor.posted_once(&next_input).await?;
    drop(signer);

    // Ordered while there is no chain.
    let Actor { instance, key: account, heads, .. } = actor;
    let Ok(config) = without_chain(harness, &instance)? else { return Ok(Outcome::Pass) };
    let state_dir = instance.state_dir().to_owned();
    instance.shutdown().await?;
    let instance = harness.connect_in(state_dir)?;
    instance.configure(&config).await.during("configure without a chain")?;
    let chain = instance.client::<dyn Chain>();
    let lonely = Actor { instance, chain, key: account, heads };
    let signer = lonely.sign_all().await.context("without a chain")?;
    let (input, act) = posting(&lonely.heads);
    let key = unique("without a chain");
    let taken = lonely.act(&key, &act).await.context("without a chain")?;
    ensure!(taken.state == ProgressState::Planned, "an order without a chain is at {taken:?}");
    drop(signer);
    let actor = Actor::restart(harness, lonely).await?;
    let signer = actor.sign_all().await?;
    actor.carried_out(&key).await.context("ordered without a chain, after a restart with one")?;
    actor.posted_once(&input).await?;
    let strange = signer.asked().into_iter().find(|asked| *asked != key);
    ensure!(strange.is_none(), "a signature was asked for {strange:?}, which is over");
    Ok(Outcome::Pass)
}
