//! An instance that acts for an account, and what becomes of its orders.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::chain::*;
use fabstir_plugin_api::stream::Stream;
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use super::key::Key;
use super::{LOOK, SOON, same_account};
use crate::harness::{During, Harness, Instance, patient};
use crate::report::Outcome;

/// An instance on a chain, and an account that has money there.
pub struct Actor {
    pub instance: Instance,
    pub chain: Arc<dyn Chain>,
    pub key: Key,
    pub heads: Heads,
}

impl Actor {
    /// Starts an instance for the development account of a check, or says why the check must be skipped.
    pub async fn start(harness: &Harness, whose: &str) -> Result<Result<Self, Outcome>> {
        Self::with_money(harness.start().await?, Key::development(whose)).await
    }

    /// The instance that follows another one, on what it has kept.
    pub async fn restart(harness: &Harness, before: Self) -> Result<Self> {
        let Self { instance, key, heads, .. } = before;
        let state_dir = instance.state_dir().to_owned();
        instance.shutdown().await?;
        let instance = harness.connect_in(state_dir)?;
        instance.configure(instance.config()).await.during("configure after a restart")?;
        let chain = instance.client::<dyn Chain>();
        Ok(Self { instance, chain, key, heads })
    }

    async fn with_money(instance: Instance, key: Key) -> Result<Result<Self, Outcome>> {
        let chain = instance.client::<dyn Chain>();
        let heads = match super::heads(&chain).await? {
            Ok(heads) => heads,
            Err(skip) => return Ok(Err(skip)),
        };
        let actor = Self { instance, chain, key, heads };
        if actor.balances().await?.coin.0 == 0 {
            return Ok(Err(Outcome::skip(format!(
                "{} has no money: point the configuration to a development chain, such as anvil with its own accounts",
                actor.key.account
            ))));
        }
        Ok(Ok(actor))
    }

    pub async fn balances(&self) -> Result<Balances> {
        self.chain.balances(&patient(), self.key.account.clone()).await.during("balances")
    }

    pub async fn begin(&self) -> Result<Stream<Signing>> {
        self.chain.begin(&patient_stream(), self.key.account.clone()).await.during("begin")
    }

    /// Acts from now on, and signs whatever is asked.
    pub async fn sign_all(&self) -> Result<Signer> {
        Ok(Signer::over(self.begin().await?, self.chain.clone(), self.key.clone()))
    }

    pub async fn act(&self, key: &str, act: &Act) -> Result<Progress> {
        let progress = self.chain.act(&patient(), super::order(key, act)).await.during("act")?;
        ensure!(progress.key == key, "act of {key} answered with the progress of {}", progress.key);
        Ok(progress)
    }

    pub async fn sign(&self, signing: &Signing) -> Result<()> {
        let signature = Some(self.key.sign(&signing.payload));
        self.chain.signed(&patient(), Signed { id: signing.id, signature, refusal: None }).await.during("signed")
    }

    /// Waits until an order is in a block and carried out.
    pub async fn carried_out(&self, key: &str) -> Result<Progress> {
        self.settled(key, is_carried_out).await
    }

    /// Waits until an order has failed for good, or is in a block and refused.
    pub async fn failed(&self, key: &str) -> Result<Progress> {
        self.settled(key, has_failed).await
    }

    async fn settled(&self, key: &str, wanted: fn(ProgressState) -> bool) -> Result<Progress> {
        let deadline = Instant::now() + SOON;
        loop {
            let progress = self.chain.progress(&patient(), key.into()).await.during("progress")?;
            if wanted(progress.state) {
                return Ok(progress);
            }
            if is_carried_out(progress.state) || has_failed(progress.state) {
                bail!("the order {key} came to another end: {progress:?}");
            }
            ensure!(Instant::now() < deadline, "after {} s the order {key} is at {progress:?}", SOON.as_secs());
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Carries an act out under a key, with somebody signing.
    pub async fn done(&self, key: &str, act: &Act) -> Result<Progress> {
        self.act(key, act).await?;
        self.carried_out(key).await
    }

    /// The jobs of this account that have been posted with an input, as the events of the whole market tell it.
    pub async fn posted(&self, input: &str) -> Result<Vec<(JobId, JobTerms)>> {
        let heads = self.chain.heads(&patient()).await.during("heads")?;
        let mut found = Vec::new();
        for notice in super::events::told_up_to(&self.chain, None, heads.latest.number).await? {
            if let Notice::Event { event: MarketEvent::JobPosted { job, client, terms, input_commitment, .. }, .. } = notice
                && input_commitment == input
            {
                ensure!(same_account(&client, &self.key.account), "the job {job} was posted by {client}");
                found.push((job, terms));
            }
        }
        Ok(found)
    }

    /// The one job that has been posted with an input.
    pub async fn posted_once(&self, input: &str) -> Result<(JobId, JobTerms)> {
        match &self.posted(input).await?[..] {
            [posted] => Ok(posted.clone()),
            [] => bail!("no event tells of the job that was posted"),
            several => bail!("one order has posted {} jobs", several.len()),
        }
    }
}

pub fn is_carried_out(state: ProgressState) -> bool {
    matches!(state, ProgressState::Mined | ProgressState::Safe | ProgressState::Final)
}

pub fn has_failed(state: ProgressState) -> bool {
    matches!(state, ProgressState::Reverted { .. } | ProgressState::Dead)
}

/// A context for streams that are read for as long as a check runs.
pub fn patient_stream() -> fabstir_plugin_api::context::Cx {
    fabstir_plugin_api::context::Cx::new()
}

/// The next thing to be signed, which must come and be for this order.
pub async fn asked(signings: &mut Stream<Signing>, key: &str) -> Result<Signing> {
    let next = tokio::time::timeout(SOON, signings.next()).await;
    let next = next.with_context(|| format!("nothing is asked to be signed for the order {key}"))?;
    let signing = next.context("the stream of begin has ended")?.during("the stream of begin")?;
    ensure!(signing.key == key, "a signature is asked for {}, where {key} is the only order", signing.key);
    ensure!(!signing.payload.is_empty(), "a signature over nothing is asked for");
    Ok(signing)
}

/// Signs whatever is asked, until it is dropped.
pub struct Signer {
    task: JoinHandle<()>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Signer {
    pub fn over(mut signings: Stream<Signing>, chain: Arc<dyn Chain>, key: Key) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let noted = asked.clone();
        let task = tokio::spawn(async move {
            while let Some(Ok(signing)) = signings.next().await {
                noted.lock().push(signing.key);
                let signature = Some(key.sign(&signing.payload));
                let answer = Signed { id: signing.id, signature, refusal: None };
                if let Err(error) = chain.signed(&patient(), answer).await {
                    // The order then gets nowhere, and the check says which.
                    eprintln!("a right signature was answered with {}", crate::harness::told(&error));
                }
            }
        });
        Self { task, asked }
    }

    /// The orders that signatures were asked for.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().clone()
    }
}

impl Drop for Signer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
