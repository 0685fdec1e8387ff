//! The prover kind on top of the engine.

use std::path::Path;
use std::sync::Arc;

use fabstir_plugin_api::prelude::*;
use tracing::warn;

use crate::circuit::Circuit;
use crate::config::Config;
use crate::contract;
use crate::engine::{self, Engine, blocking};
use crate::error::EzklError;
use crate::keys::Cabinet;

/// Proofs by EZKL, as a prover plugin.
pub struct Ezkl {
    engine: Arc<Engine>,
}

impl Ezkl {
    /// Reads the models, opens the folder for keys, and starts a worker.
    pub(crate) async fn start(state: &Path, config: Config) -> Result<Self, EzklError> {
        let state = state.to_owned();
        let engine = blocking(move || {
            let mut circuits = vec![Circuit::commitment()];
            for model in &config.models {
                circuits.push(Circuit::of_model(model)?);
            }
            Ok(Engine::new(&config, circuits, Cabinet::open(&state)?))
        });
        let engine = Arc::new(engine.await?);
        engine.start().await?;
        Ok(Self { engine })
    }

    async fn statement(&self, circuit: &Arc<Circuit>) -> Result<Statement, EzklError> {
        let (engine, circuit) = (self.engine.clone(), circuit.clone());
        blocking(move || statement(&engine, &circuit)).await
    }
}

impl Lifecycle for Ezkl {}

#[async_trait]
impl Prover for Ezkl {
    async fn statements(&self, _: &Cx) -> Result<Vec<Statement>> {
        let mut statements = Vec::new();
        for circuit in self.engine.circuits() {
            statements.push(self.statement(circuit).await?);
        }
        Ok(statements)
    }

    async fn prepare(&self, cx: &Cx, statement: String) -> Result<Stream<Preparing>> {
        let circuit = self.engine.circuit(&statement)?.clone();
        let (sender, stream) = cx.stream();
        let engine = self.engine.clone();
        tokio::spawn(async move {
            let teller = sender.clone();
            // A stage that nobody reads in time is not worth waiting for.
            let tell = move |stage| drop(teller.try_send(Preparing::Progress(stage)));
            let work = async {
                engine.prepare(&circuit.id, &tell).await?;
                let engine = engine.clone();
                blocking(move || self::statement(&engine, &circuit)).await
            };
            deliver(&sender, work, Preparing::Ready).await;
        });
        Ok(stream)
    }

    async fn estimate(&self, _: &Cx, statement: String) -> Result<Estimate> {
        let circuit = self.engine.circuit(&statement)?.clone();
        let engine = self.engine.clone();
        let estimate = blocking(move || {
            let (keys, pace) = (engine.keys(&circuit)?, engine.pace(&circuit));
            Ok(Estimate {
                prepare_cpu_ms: if keys.is_some() { Some(0) } else { pace.prepare_cpu_ms },
                prove_cpu_ms: pace.prove_cpu_ms,
                memory: pace.memory,
                proof_bytes: keys.map(|keys| keys.record.proof_bytes as u64),
            })
        });
        Ok(estimate.await?)
    }

    async fn prove(&self, cx: &Cx, task: Task) -> Result<Stream<Proving>> {
        engine::fits(self.engine.circuit(&task.statement)?, &task)?;
        let (sender, stream) = cx.stream();
        let engine = self.engine.clone();
        tokio::spawn(async move {
            let teller = sender.clone();
            let tell = move |stage| drop(teller.try_send(Proving::Progress(stage)));
            deliver(&sender, engine.prove(task, &tell), Proving::Proof).await;
        });
        Ok(stream)
    }

    async fn verify(&self, _: &Cx, proof: Proof) -> Result<Verdict> {
        Ok(self.engine.verify(&proof).await?)
    }

    async fn verifier(&self, _: &Cx, statement: String) -> Result<Contract> {
        let circuit = self.engine.circuit(&statement)?.clone();
        let engine = self.engine.clone();
        let made = blocking(move || {
            let keys = engine.keys(&circuit)?.ok_or_else(|| EzklError::NotPrepared(circuit.id.clone()))?;
            engine.check_contract_key(&circuit, &keys)?;
            contract::of(&circuit, &keys)
        });
        Ok(made.await?)
    }
}

/// Sends what work comes to, or its error. A consumer that leaves ends the work: the future is dropped.
async fn deliver<T, I: Send + 'static>(
    sender: &Sender<I>,
    work: impl Future<Output = Result<T, EzklError>>,
    item: impl FnOnce(T) -> I,
) {
    tokio::select! {
        biased;
        () = sender.closed() => {}
        done = work => match done {
            // An error means that the consumer has just left.
            Ok(done) => drop(sender.send(item(done)).await),
            Err(error) => {
                warn!(%error, "No proof.");
                sender.clone().fail(error.into()).await;
            }
        }
    }
}

/// A statement in words. Blocks on the disk, shortly.
fn statement(engine: &Engine, circuit: &Circuit) -> Result<Statement, EzklError> {
    let program = match engine.keys(circuit) {
        Ok(keys) => keys.map(|keys| keys.record.program),
        // They were set aside just now, so there are none.
        Err(EzklError::Corrupt { .. }) => None,
        Err(error) => return Err(error),
    };
    let (kind, says, leaves_open) = match &circuit.model {
        None => (
            ProofKind::Commitment,
            "Whoever made the proof knew a subject and digests of a model, an input and an output that have the stated Poseidon hash, and \
             the subject is the stated one."
                .to_owned(),
            "Whether any inference ran: it binds four values to each other, and nothing else. On a chain only the subject is compared: the \
             hash of the others is the prover's own there."
                .to_owned(),
        ),
        Some(model) => (
            ProofKind::OnnxModel,
            format!(
                "The ONNX model with digest {}, with its numbers rounded to {} binary places, gives the stated outputs for an input that \
                 has the stated Poseidon hash.",
                model.digest,
                model.config.scale()
            ),
            "Whether that input is the one that the digest of the input names: who has it can hash it and compare. How far the rounded \
             model is from the one in floating point. Whether the model is any good."
                .to_owned(),
        ),
    };
    Ok(Statement {
        id: circuit.id.clone(),
        kind,
        system: crate::SYSTEM.into(),
        program,
        model: circuit.model.as_ref().map(|model| model.digest.clone()),
        says,
        leaves_open,
        trusts: "A development set-up: the reference string was made on the prover's machine by ezkl's gen_srs, and whoever ran that could \
                 have kept its secret and forge proofs with it. Also ezkl 23.0.5, and on a chain its reusable verifier, which its makers \
                 call experimental."
            .into(),
        is_development: true,
    })
}
