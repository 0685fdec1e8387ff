//! Proofs of posted jobs: which of the prover plugins can make one that a job asks for, and having it made.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::chain::{Chain, ChainNetwork, Hash32, JobTerms, ModelId};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::prover::{Preparing, Proof, ProofKind, Prover, Proving, Statement, Task};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::routes::{Route, Routes};

/// How long a prover may take to say what it proves.
const ASK: Duration = Duration::from_secs(5);
/// How long it may take to make its keys. A quarter of an hour is what the largest circuits take that fit into a contract.
const PREPARE: Duration = Duration::from_secs(1800);

/// When the keys of proofs are looked after again, where something was in the way that passes, and where it does not.
const SOON: Duration = Duration::from_secs(15);
const LATER: Duration = Duration::from_secs(300);

/// A statement that can be proven now, and who proves it.
#[derive(Clone)]
pub struct Provable {
    pub kind: ProofKind,
    pub program: Hash32,
    pub statement: Statement,
    /// What the chain calls the model that it is about, where it is about one.
    pub model: Option<ModelId>,
    /// Processor time that a proof takes, in milliseconds, where it was measured.
    pub takes_ms: Option<u64>,
    /// The size of a proof, in bytes, where that is always the same.
    pub proof_bytes: Option<u64>,
    /// Whether its keys were looked through since its plugin started.
    pub is_checked: bool,
    /// The plugin and its generation.
    plugin: (String, u64),
    pub prover: Arc<dyn Prover>,
}

impl Provable {
    /// Whether its proofs are what a job asks for.
    pub fn is_of(&self, terms: &JobTerms) -> bool {
        self.kind.number() == Some(terms.proof_kind)
            && self.program == terms.program
            && is_about(terms.proof_kind, self.model.as_ref(), &terms.model)
    }
}

/// Whether proofs about a model are what a job wants that names another one. A receipt is about any.
pub fn is_about(kind: u8, model: Option<&ModelId>, asked: &ModelId) -> bool {
    model.map_or(ProofKind::Commitment.number() == Some(kind), |model| model == asked)
}

/// Whether the same question may be answered in a moment.
fn passes(error: &PluginError) -> bool {
    error.code.is_retryable() || error.code == Code::DeadlineExceeded
}

/// What can be proven now, and whether more is on its way.
#[derive(Default)]
pub struct Provables {
    pub ready: Vec<Provable>,
    pub is_preparing: bool,
}

/// Whether money on a chain is worth nothing: the numbers of the development chains of Hardhat, anvil and Ganache.
pub fn is_development(network: &ChainNetwork) -> bool {
    matches!(network.chain.as_str(), "eip155:31337" | "eip155:1337")
}

/// Of which statements the keys were looked after, by plugin, generation and statement, and whether they are good.
#[derive(Default)]
pub struct Prepared {
    known: Mutex<HashMap<(String, u64, String), bool>>,
    /// Rings where keys turned out to be damaged.
    pub damaged: Notify,
}

impl Prepared {
    fn of(&self, route: &Route<dyn Prover>, statement: &str) -> Option<bool> {
        self.known.lock().get(&(route.plugin.clone(), route.generation, statement.to_owned())).copied()
    }

    /// Has the keys of a statement looked after once more, before anything else is promised by them.
    pub fn forget(&self, provable: &Provable) {
        let (plugin, generation) = provable.plugin.clone();
        self.known.lock().remove(&(plugin, generation, provable.statement.id.clone()));
        self.damaged.notify_one();
    }
}

/// What the prover plugins can prove now for jobs of a chain. Where somebody may know the secret of a set-up, its proofs are for
/// development chains alone.
pub async fn provable(routes: &Routes, chain: &dyn Chain, network: &ChainNetwork, prepared: &Prepared) -> Provables {
    let mut found = Provables::default();
    for route in &routes.prover {
        let cx = Cx::new().with_timeout(ASK);
        let statements = match route.client.statements(&cx).await {
            Ok(statements) => statements,
            Err(error) => {
                // It may in a moment: nothing is known about what it proves.
                found.is_preparing |= passes(&error);
                tracing::warn!(plugin = %route.plugin, %error, "A prover does not say what it proves.");
                continue;
            }
        };
        for statement in statements {
            if statement.is_development && !is_development(network) {
                continue;
            }
            let Some(program) = statement.program.clone() else {
                // What could not be made is made again, and nobody waits for that.
                found.is_preparing |= prepared.of(route, &statement.id).is_none();
                continue;
            };
            let model = match &statement.model {
                None => None,
                Some(digest) => match chain.model_id(&cx, digest.clone()).await {
                    Ok(id) => Some(id),
                    Err(error) => {
                        found.is_preparing |= passes(&error);
                        continue;
                    }
                },
            };
            let estimate = match route.client.estimate(&Cx::new().with_timeout(ASK), statement.id.clone()).await {
                Ok(estimate) => estimate,
                Err(error) => {
                    // It may tell in a moment.
                    found.is_preparing |= passes(&error);
                    Default::default()
                }
            };
            let checked = prepared.of(route, &statement.id);
            found.is_preparing |= checked.is_none();
            found.ready.push(Provable {
                kind: statement.kind,
                program,
                model,
                takes_ms: estimate.prove_cpu_ms,
                proof_bytes: estimate.proof_bytes,
                is_checked: checked == Some(true),
                plugin: (route.plugin.clone(), route.generation),
                prover: route.client.clone(),
                statement,
            });
        }
    }
    found
}

/// Checks the keys of every statement, makes those that are not there, one after the other, and sees how long proofs take. Returns after how long
/// that is to be done once more, where not all of it was. A bond that is put up for a proof is lost where its keys turn out to be damaged.
pub async fn prepare(routes: &Routes, network: &ChainNetwork, prepared: &Prepared) -> Option<Duration> {
    let is_there =
        |plugin: &str, generation| routes.prover.iter().any(|route| route.plugin == plugin && route.generation == generation);
    prepared.known.lock().retain(|(plugin, generation, _), _| is_there(plugin, *generation));
    let mut again = None;
    let mut due = Vec::new();
    for route in &routes.prover {
        match route.client.statements(&Cx::new().with_timeout(ASK)).await {
            Ok(statements) => due.extend(statements.into_iter().map(|statement| (route, statement))),
            Err(_) => again = Some(SOON),
        }
    }
    due.retain(|(route, statement)| prepared.of(route, &statement.id) != Some(true));
    // What is there is looked through in no time; what is not may take long.
    due.sort_by_key(|(_, statement)| statement.program.is_none());
    for (route, statement) in due {
        if statement.is_development && !is_development(network) {
            tracing::warn!(
                plugin = %route.plugin, statement = statement.id, chain = network.chain,
                "Its set-up is for development, so that no proofs of it are made for jobs of this chain."
            );
            continue;
        }
        let lasts = match look_after(route, &statement.id).await {
            Ok(()) => false,
            Err(error) if passes(&error) => {
                again = Some(SOON);
                continue;
            }
            Err(_) => true,
        };
        if lasts {
            again = again.or(Some(LATER));
        }
        prepared.known.lock().insert((route.plugin.clone(), route.generation, statement.id), !lasts);
    }
    again
}

async fn look_after(route: &Route<dyn Prover>, statement: &str) -> Result<()> {
    tracing::info!(plugin = %route.plugin, statement, "Looking after the keys of proofs.");
    let made = match make(&*route.client, statement).await {
        // What was damaged is out of the way now.
        Err(error) if error.code == Code::Corrupt => {
            tracing::warn!(plugin = %route.plugin, statement, %error, "Keys of proofs are made anew.");
            make(&*route.client, statement).await
        }
        made => made,
    };
    match made {
        Ok(made) => {
            tracing::info!(plugin = %route.plugin, statement, program = made.program, "Jobs can be proven.");
            Ok(())
        }
        Err(error) => {
            tracing::error!(plugin = %route.plugin, statement, %error, "No keys of proofs could be made.");
            Err(error)
        }
    }
}

/// Makes what proofs of a statement need.
pub async fn make(prover: &dyn Prover, statement: &str) -> Result<Statement> {
    let mut steps = prover.prepare(&Cx::new().with_timeout(PREPARE), statement.to_owned()).await?;
    while let Some(step) = steps.next().await {
        match step? {
            Preparing::Ready(statement) => return Ok(statement),
            Preparing::Progress(stage) => {
                tracing::debug!(statement, doing = stage.doing, percent = stage.percent, "Preparing proofs.")
            }
            Preparing::Unknown => {}
        }
    }
    Err(PluginError::new(Code::Internal, "the prover ended its work without a last word"))
}

/// Makes a proof, and compares it with what was asked for.
pub async fn prove(prover: &dyn Prover, program: &str, task: Task, within: Duration) -> Result<Proof> {
    let about = task.about.clone();
    let mut steps = prover.prove(&Cx::new().with_timeout(within), task).await?;
    while let Some(step) = steps.next().await {
        match step? {
            Proving::Proof(proof) => {
                let is_asked =
                    proof.program == program && proof.about == about && starts_with(&proof.public_inputs, &about.subject);
                return match is_asked {
                    true => Ok(proof),
                    false => Err(PluginError::new(Code::Internal, "the prover has proven something else than was asked for")),
                };
            }
            Proving::Progress(stage) => {
                tracing::debug!(doing = stage.doing, percent = stage.percent, left_ms = stage.left_ms, "Proving.")
            }
            Proving::Unknown => {}
        }
    }
    Err(PluginError::new(Code::Internal, "the prover ended its work without a proof"))
}

/// Whether public inputs name this subject, as the contract reads them.
fn starts_with(public_inputs: &[u8], subject: &str) -> bool {
    let word = subject.strip_prefix("0x").and_then(|digits| hex::decode(digits).ok());
    word.is_some_and(|word| word.len() == 32 && public_inputs.starts_with(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_inputs_begin_with_the_whole_subject() {
        let subject = format!("0x00{}", "ab".repeat(31));
        let mut inputs = hex::decode(subject.trim_start_matches("0x")).expect("digits");
        assert!(starts_with(&inputs, &subject));
        inputs.push(7);
        assert!(starts_with(&inputs, &subject));
        assert!(!starts_with(&inputs[..31], &subject));
        assert!(!starts_with(&inputs, "0x"));
        assert!(!starts_with(&inputs, "00ab"));
        inputs[31] ^= 1;
        assert!(!starts_with(&inputs, &subject));
    }

    #[test]
    fn only_chains_whose_money_is_worth_nothing_are_for_development() {
        let on = |chain: &str| {
            is_development(&ChainNetwork {
                chain: chain.into(),
                coin: String::new(),
                contracts: Vec::new(),
                domain: String::new(),
            })
        };
        assert!(on("eip155:31337") && on("eip155:1337"));
        assert!(!on("eip155:8453") && !on("eip155:84532") && !on("eip155:1") && !on(""));
    }
}
