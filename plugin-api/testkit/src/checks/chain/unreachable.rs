//! What can be known without a chain, and what cannot.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabstir_plugin_api::chain::*;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::Code;

use super::actor::patient_stream;
use super::key::Key;
use super::{EVERY_SURE, hash_of, is_hash, order, session_terms, unique, voucher, without_chain};
use crate::harness::{During, Harness, Instance, patient, refused};
use crate::report::Outcome;

/// What a call may take that asks a chain which is not there.
const LIMIT: Duration = Duration::from_secs(10);

/// How long silence must last to be believed.
const SILENCE: Duration = Duration::from_millis(300);

fn limited() -> Cx {
    Cx::new().with_timeout(LIMIT)
}

pub async fn network_is_configured(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let network = answers_alone(&instance).await?;
    ensure!(
        network.chain.split_once(':').is_some_and(|(kind, name)| !kind.is_empty() && !name.is_empty()),
        "no CAIP-2: {network:?}"
    );
    ensure!(!network.coin.is_empty() && !network.contracts.is_empty(), "the network is {network:?}");
    for contract in &network.contracts {
        let digits = contract.strip_prefix("0x").unwrap_or_default();
        ensure!(digits.len() == 40 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()), "{contract} is no account");
    }
    ensure!(is_hash(&network.domain), "the domain is {:?}", network.domain);

    let lonely = harness.connect()?;
    match without_chain(harness, &lonely)? {
        Ok(config) => {
            lonely.configure(&config).await.during("configure without a chain")?;
            let alone = answers_alone(&lonely).await.context("without a chain")?;
            ensure!(alone == network, "the network is {network:?}, without a chain {alone:?}");
            Ok(Outcome::Pass)
        }
        Err(skip) => {
            Ok(Outcome::warn(format!("only checked with the chain that is configured: {}", skip.reason().unwrap_or_default())))
        }
    }
}

/// What answers without asking anybody, does.
async fn answers_alone(instance: &Instance) -> Result<ChainNetwork> {
    let chain = instance.client::<dyn Chain>();
    let network = chain.network(&limited()).await.during("network")?;
    let (one, other) = ("1f".repeat(32), "20".repeat(32));
    let name = chain.model_id(&limited(), one.clone()).await.during("model_id")?;
    ensure!(is_hash(&name), "the name of a model is {name:?}");
    ensure!(chain.model_id(&limited(), one.clone()).await.during("model_id")? == name, "a model has two names");
    ensure!(chain.model_id(&limited(), other).await.during("model_id")? != name, "two models have one name");
    for malformed in ["", &one[..63], &format!("{one}0"), &format!("0x{one}"), &"g".repeat(64), &"é".repeat(32)] {
        let answer = chain.model_id(&limited(), malformed.to_owned()).await;
        refused(&format!("model_id of {malformed:?}"), answer, &[Code::InvalidArgument])?;
    }
    chain.offer_payload(&limited(), session_terms()).await.during("offer_payload")?;
    let session = chain.session_id(&limited(), session_terms()).await.during("session_id")?;
    ensure!(is_hash(&session), "the name of a session is {session:?}");
    let payload = chain.voucher_payload(&limited(), voucher(1)).await.during("voucher_payload")?;
    let key = Key::made_of("alone");
    let signature = key.sign(&payload);
    chain.signer(&limited(), payload, signature).await.during("signer")?;
    Ok(network)
}

pub async fn unreachable_is_an_error(harness: &Harness) -> Result<Outcome> {
    let instance = harness.connect()?;
    let config = match without_chain(harness, &instance)? {
        Ok(config) => config,
        Err(skip) => return Ok(skip),
    };
    instance.configure(&config).await.during("configure without a chain")?;
    let chain = instance.client::<dyn Chain>();
    let account = Key::made_of("lonely").account;
    let unavailable = &[Code::Unavailable];
    refused("heads without a chain", chain.heads(&limited()).await, unavailable)?;
    for sure in EVERY_SURE {
        refused(&format!("job ({sure:?}) without a chain"), chain.job(&limited(), 1, sure).await, unavailable)?;
        let answer = chain.session(&limited(), hash_of("session"), sure).await;
        refused(&format!("session ({sure:?}) without a chain"), answer, unavailable)?;
    }
    refused("balances without a chain", chain.balances(&limited(), account.clone()).await, unavailable)?;

    // What is ordered is kept until there is a chain; until then nothing of it is guessed.
    let mut signings = chain.begin(&patient_stream(), account).await.during("begin without a chain")?;
    let act = Act::CancelJob { job: 1 };
    refused("quote without a chain", chain.quote(&limited(), act.clone()).await, unavailable)?;
    let key = unique("lonely");
    let taken = chain.act(&limited(), order(&key, &act)).await.during("act without a chain")?;
    ensure!(taken.state == ProgressState::Planned, "an order without a chain is at {taken:?}");
    let signing = tokio::time::timeout(SILENCE, signings.next()).await;
    ensure!(signing.is_err(), "without a chain, the stream of begin says {:?}", signing.ok());
    let waits = chain.progress(&limited(), key).await.during("progress without a chain")?;
    ensure!(waits.state == ProgressState::Planned, "an order without a chain is at {waits:?}");

    match chain.events(&patient_stream(), Since::Beginning).await {
        Ok(mut events) => {
            let told = tokio::time::timeout(SILENCE, events.next()).await;
            ensure!(told.is_err(), "without a chain, the events tell {:?}", told.ok());
        }
        answer => drop(refused("events without a chain", answer, unavailable)?),
    }
    instance.plugin.health(&patient()).await.during("health without a chain")?;
    Ok(Outcome::Pass)
}
