//! Making keys, making proofs and checking them.

use std::path::Path;
use std::sync::Arc;

use fabstir_plugin_api::prelude::*;
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use tracing::info;

use crate::circuit::{BASE, Bound, Circuit, LEGS, Output};
use crate::config::Config;
use crate::error::EzklError;
use crate::field::{self, Word};
use crate::keys::{self, CIRCUIT, Cabinet, Keys, PK, Record, SETTINGS, SRS, VK, VKA, Workplace};
use crate::pace::{Pace, Steps, Tell};
use crate::public::{self, Claimed};
use crate::worker::{Bench, Launch, Limit, Took, Turn};

const COMPILING: &str = "compiling the circuit";
const SETTING_UP: &str = "making the development set-up";
const MAKING_KEYS: &str = "making the keys";
const FOR_CONTRACT: &str = "making the contract's key";
const COMPUTING: &str = "computing the circuit";
const PROVING: &str = "proving";
const CHECKING: &str = "checking the proof";

const PREPARE: [&str; 7] = [COMPILING, SETTING_UP, MAKING_KEYS, FOR_CONTRACT, COMPUTING, PROVING, CHECKING];
const PROVE: [&str; 3] = [COMPUTING, PROVING, CHECKING];

/// Everything that proofs are made and checked with.
#[derive(Debug)]
pub struct Engine {
    circuits: Vec<Arc<Circuit>>,
    cabinet: Cabinet,
    /// Checks have a worker of their own, so that none waits for a proof that is being made.
    making: Bench,
    checking: Bench,
    preparing: Limit,
    proving: Limit,
}

/// What ezkl tells of a compiled circuit.
#[derive(Deserialize)]
struct Compiled {
    k: u32,
    rows: u64,
    inputs: Vec<u32>,
    outputs: Vec<u32>,
    shapes: Vec<Vec<usize>>,
}

#[derive(Deserialize)]
struct Computed {
    outputs: Vec<Vec<String>>,
}

#[derive(Deserialize)]
struct Made {
    instances: Vec<String>,
    proof: String,
}

/// One piece of work at the bench where proofs are made.
struct Job<'a> {
    circuit: &'a Arc<Circuit>,
    turn: Turn<'a>,
    steps: Steps<'a>,
}

impl Engine {
    pub fn new(config: &Config, circuits: Vec<Circuit>, cabinet: Cabinet) -> Self {
        let launch = Launch { python: config.python(), memory: config.memory(), threads: config.threads };
        Self {
            circuits: circuits.into_iter().map(Arc::new).collect(),
            cabinet,
            making: Bench::new(launch.clone()),
            checking: Bench::new(launch),
            preparing: Limit { time: config.prepare_timeout(), key: "prepare_timeout_ms" },
            proving: Limit { time: config.prove_timeout(), key: "prove_timeout_ms" },
        }
    }

    /// Starts the worker that checks, which shows that there is one to be had.
    pub async fn start(&self) -> Result<(), EzklError> {
        self.checking.turn().await.ask::<String>("starting", self.proving, "version", json!({})).await.map(drop)
    }

    pub fn circuits(&self) -> &[Arc<Circuit>] {
        &self.circuits
    }

    pub fn circuit(&self, id: &str) -> Result<&Arc<Circuit>, EzklError> {
        let known = || self.circuits.iter().map(|circuit| format!("`{}`", circuit.id)).collect::<Vec<_>>().join(", ");
        let found = self.circuits.iter().find(|circuit| circuit.id == id);
        found.ok_or_else(|| EzklError::UnknownStatement { asked: id.chars().take(80).collect(), known: known() })
    }

    /// The keys of a circuit where they are made; blocks on the disk, shortly.
    pub fn keys(&self, circuit: &Circuit) -> Result<Option<Keys>, EzklError> {
        self.cabinet.find(circuit)
    }

    /// Checks the key of the contract; blocks on the disk, shortly.
    pub fn check_contract_key(&self, circuit: &Circuit, keys: &Keys) -> Result<(), EzklError> {
        self.cabinet.check(circuit, keys, &[VKA])
    }

    /// What was measured of a circuit.
    pub fn pace(&self, circuit: &Circuit) -> Pace {
        self.cabinet.pace(circuit).and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }

    /// Makes the keys of a circuit, or checks those that are there.
    pub async fn prepare(&self, id: &str, tell: Tell<'_>) -> Result<(), EzklError> {
        let circuit = self.circuit(id)?;
        let turn = self.making.turn().await;
        match self.cabinet.find(circuit)? {
            Some(keys) => self.checked(circuit, keys, &keys::ALL).await.map(drop),
            None => {
                let steps = Steps::new(tell, &PREPARE, &self.pace(circuit));
                let mut job = Job { circuit, turn, steps };
                let (_, cpu_ms, took) = self.make_keys(&mut job).await?;
                self.measured(job, Some(cpu_ms), took);
                Ok(())
            }
        }
    }

    /// Makes a proof.
    pub async fn prove(&self, task: Task, tell: Tell<'_>) -> Result<Proof, EzklError> {
        let circuit = self.circuit(&task.statement)?;
        let bound = fits(circuit, &task)?;
        let turn = self.making.turn().await;
        let (found, pace) = (self.cabinet.find(circuit)?, self.pace(circuit));
        let (mut job, keys, prepared) = match found {
            Some(keys) => {
                let keys = self.checked(circuit, keys, &[CIRCUIT, SETTINGS, VK, PK, SRS]).await?;
                (Job { circuit, turn, steps: Steps::new(tell, &PROVE, &pace) }, keys, None)
            }
            None => {
                let steps = Steps::new(tell, &[&PREPARE[..], &PROVE].concat(), &pace);
                let mut job = Job { circuit, turn, steps };
                let (keys, cpu_ms, _) = self.make_keys(&mut job).await?;
                (job, keys, Some(cpu_ms))
            }
        };
        let values = public::values(circuit, &task.witness, keys.record.input_scale)?;
        let (proof, took) = self.make_proof(&mut job, &keys, &bound, &values, task.about).await?;
        if proof.proof.len() != keys.record.proof_bytes {
            return Err(EzklError::BadProof(format!(
                "it has {} bytes instead of {}",
                proof.proof.len(),
                keys.record.proof_bytes
            )));
        }
        self.measured(job, prepared, took);
        Ok(proof)
    }

    /// Checks a proof against what it says that it is about.
    pub async fn verify(&self, proof: &Proof) -> Result<Verdict, EzklError> {
        let circuit = self.circuit(&proof.statement)?;
        let unknown = |here: String| EzklError::UnknownProgram { asked: proof.program.chars().take(80).collect(), here };
        let keys = self.cabinet.find(circuit)?.ok_or_else(|| unknown("none are made".into()))?;
        if proof.system != crate::SYSTEM || proof.program != keys.record.program {
            return Err(unknown(keys.record.program));
        }
        let keys = self.checked(circuit, keys, &[SETTINGS, VK, SRS]).await?;
        // What follows the last byte that a proof needs would not be looked at.
        if proof.proof.len() != keys.record.proof_bytes {
            let why = format!("a proof has {} bytes here, this one {}", keys.record.proof_bytes, proof.proof.len());
            return Ok(Verdict { holds: false, why: Some(why) });
        }
        let work = self.workplace().await?;
        self.check(circuit, &keys, &work, proof, &mut self.checking.turn().await).await
    }

    /// The check itself: the public numbers are made from what the proof is about and what it claims.
    async fn check(
        &self,
        circuit: &Circuit,
        keys: &Keys,
        work: &Workplace,
        proof: &Proof,
        turn: &mut Turn<'_>,
    ) -> Result<Verdict, EzklError> {
        let not = |why: String| Ok(Verdict { holds: false, why: Some(why) });
        let bound = match circuit.bind(&proof.about) {
            Ok(bound) => bound,
            Err(why) => return not(why),
        };
        let claimed = match Claimed::read(circuit, &keys.record.outputs, &proof.claim) {
            Ok(claimed) => claimed,
            Err(why) => return not(why),
        };
        let message: Vec<_> = bound.preimage.iter().map(field::to_ezkl).collect();
        let (hash, _): (String, _) = turn.ask(CHECKING, self.proving, "poseidon", json!({ "message": message })).await?;
        let words = claimed.words(bound.subject, word(CHECKING, Some(&hash))?);
        if words.concat() != proof.public_inputs {
            return not("the public inputs are not those of what the proof is about and what it claims".into());
        }
        let instances: Vec<_> = circuit.instances(&words).iter().map(field::to_ezkl).collect();
        let with = json!({
            "instances": instances, "proof": hex::encode(&proof.proof), "file": work.path("check"),
            "settings": keys.path(SETTINGS), "vk": keys.path(VK), "srs": keys.path(SRS),
        });
        let (verdict, _): (Verdict, _) = turn.ask(CHECKING, self.proving, "verify", with).await?;
        if verdict.holds {
            return Ok(verdict);
        }
        let said = verdict.why.map_or_else(String::new, |why| format!(" ({why})"));
        not(format!("it is no proof of these public inputs under these keys{said}"))
    }

    /// Makes keys and one proof with them, so that what is kept is known to work; nothing is kept if it is not. Answers with the keys, the
    /// processor time of it all, and what the proof took.
    async fn make_keys(&self, job: &mut Job<'_>) -> Result<(Keys, u64, Took), EzklError> {
        let circuit = job.circuit;
        let (work, scratch) = (self.workplace().await?, self.workplace().await?);
        let [settings, compiled, vk, pk, srs, vka] = [SETTINGS, CIRCUIT, VK, PK, SRS, VKA].map(|file| work.path(file));
        let onnx = scratch.path("onnx");
        write(&onnx, &circuit.onnx)?;
        let calibration = circuit.calibration().map(|examples| (scratch.path("examples"), examples.to_string()));
        if let Some((path, examples)) = &calibration {
            write(path, examples.as_bytes())?;
        }
        let config = circuit.model.as_ref().map(|model| &model.config);
        let with = json!({
            "onnx": onnx, "settings": settings, "compiled": compiled, "base": BASE, "legs": LEGS,
            "scale": config.map_or(0, |config| config.scale()), "range_checks": config.is_some(), "k": circuit.fixed_k(),
            "variables": circuit.model.iter().flat_map(|model| &model.open).map(|name| (name, 1)).collect::<Vec<_>>(),
            "calibration": calibration.as_ref().map(|(path, _)| path),
        });
        let (shape, took): (Compiled, _) = job.ask(COMPILING, self.preparing, "circuit", with).await?;
        if let Some(config) = config
            && shape.k > config.max_k()
        {
            return Err(EzklError::TooBig { statement: circuit.id.clone(), k: shape.k, rows: shape.rows, max_k: config.max_k() });
        }
        let mut cpu_ms = took.cpu_ms;
        let record = record(circuit, &shape)?;
        for (doing, what, with) in [
            (SETTING_UP, "srs", json!({ "path": srs, "k": shape.k })),
            (MAKING_KEYS, "setup", json!({ "compiled": compiled, "vk": vk, "pk": pk, "srs": srs })),
            (FOR_CONTRACT, "vka", json!({ "vk": vk, "settings": settings, "vka": vka, "srs": srs })),
        ] {
            let ((), took) = job.ask(doing, self.preparing, what, with).await?;
            cpu_ms += took.cpu_ms;
        }

        let mut keys = Keys { folder: work.folder().to_owned(), record };
        let zero = field::to_hex(&Word::default());
        let model = circuit.model.as_ref();
        let digest = model.map_or_else(|| "00".repeat(32), |model| model.digest.clone());
        let about = About {
            subject: field::to_hex(&field::from_integer(1)),
            job: None,
            model: digest,
            input: zero.clone(),
            output: zero,
        };
        let bound = circuit.bind(&about).map_err(EzklError::BadTask)?;
        let witness = model.map_or(Witness::None, |model| Witness::Inputs(vec![model.examples[0].clone()]));
        let values = public::values(circuit, &witness, keys.record.input_scale)?;
        let (proof, took) = self.make_proof(job, &keys, &bound, &values, about).await?;
        cpu_ms += took.cpu_ms;
        keys.record.proof_bytes = proof.proof.len();

        let (cabinet, owned) = (self.cabinet.clone(), circuit.clone());
        let keys = blocking(move || cabinet.install(&owned, work, keys.record)).await?;
        info!(statement = circuit.id, k = keys.record.k, rows = keys.record.rows, cpu_ms, "Keys are made.");
        Ok((keys, cpu_ms, took))
    }

    /// Makes a proof and checks it.
    async fn make_proof(
        &self,
        job: &mut Job<'_>,
        keys: &Keys,
        bound: &Bound,
        values: &[Word],
        about: About,
    ) -> Result<(Proof, Took), EzklError> {
        let (circuit, record) = (job.circuit, &keys.record);
        let work = self.workplace().await?;
        let witness = work.path("witness");
        let with = json!({
            "inputs": circuit.inputs(bound, values), "data": work.path("input"), "witness": witness,
            "compiled": keys.path(CIRCUIT), "vk": keys.path(VK), "srs": keys.path(SRS),
        });
        let computed = job.ask(COMPUTING, self.proving, "witness", with).await;
        // The inputs are in range, and the circuit was computed before: what it can fail at are numbers on the way.
        let left_range = |error| match error {
            EzklError::Failed { said, .. } if said.contains("synthesis error") => EzklError::OutOfRange,
            other => other,
        };
        let (computed, first): (Computed, Took) = computed.map_err(left_range)?;
        let with = json!({
            "witness": witness, "compiled": keys.path(CIRCUIT), "pk": keys.path(PK), "proof": work.path("made"), "srs": keys.path(SRS),
        });
        let (made, second): (Made, Took) = job.ask(PROVING, self.proving, "prove", with).await?;
        let proof = hex::decode(&made.proof).map_err(|error| EzklError::Nonsense { doing: PROVING, said: error.to_string() })?;

        // The commitments are told by the proof. The check below makes that of what it is about anew.
        let mut told = made.instances.iter();
        let computed: Result<Vec<Vec<_>>, _> =
            computed.outputs.iter().map(|words| words.iter().map(|text| word(COMPUTING, Some(text))).collect()).collect();
        let claim = match public::outputs(circuit, &record.outputs, &computed?) {
            Some(outputs) => Claim::Outputs { inputs: field::to_hex(&word(PROVING, told.next())?), outputs },
            None if circuit.model.is_some() => return Err(EzklError::OutOfRange),
            None => Claim::None,
        };
        let claimed = Claimed::read(circuit, &record.outputs, &claim).map_err(EzklError::BadProof)?;
        let words = claimed.words(bound.subject, word(PROVING, told.next())?);
        let proof = Proof {
            statement: circuit.id.clone(),
            system: crate::SYSTEM.into(),
            program: record.program.clone(),
            about,
            claim,
            public_inputs: words.concat(),
            proof,
        };
        let verdict = job.steps.step(CHECKING, self.check(circuit, keys, &work, &proof, &mut job.turn)).await?;
        match verdict {
            Verdict { holds: true, .. } => {
                Ok((proof, Took { cpu_ms: first.cpu_ms + second.cpu_ms, peak: first.peak.max(second.peak) }))
            }
            Verdict { why, .. } => Err(EzklError::BadProof(why.unwrap_or_default())),
        }
    }

    /// Writes down what work took.
    fn measured(&self, job: Job<'_>, prepare_cpu_ms: Option<u64>, took: Took) {
        let mut pace = self.pace(job.circuit);
        pace.steps.extend(job.steps.took());
        pace.prepare_cpu_ms = prepare_cpu_ms.or(pace.prepare_cpu_ms);
        pace.prove_cpu_ms = Some(took.cpu_ms);
        pace.memory = Some(took.peak).filter(|peak| *peak > 0);
        self.cabinet.set_pace(job.circuit, &serde_json::to_string(&pace).unwrap_or_default());
    }

    /// The keys, once these files are what the record says.
    async fn checked(&self, circuit: &Arc<Circuit>, keys: Keys, files: &'static [&'static str]) -> Result<Keys, EzklError> {
        let (cabinet, circuit) = (self.cabinet.clone(), circuit.clone());
        blocking(move || cabinet.check(&circuit, &keys, files).map(|()| keys)).await
    }

    async fn workplace(&self) -> Result<Workplace, EzklError> {
        let cabinet = self.cabinet.clone();
        blocking(move || cabinet.workplace()).await
    }
}

impl Job<'_> {
    async fn ask<T: serde::de::DeserializeOwned>(
        &mut self,
        doing: &'static str,
        limit: Limit,
        what: &str,
        with: Value,
    ) -> Result<(T, Took), EzklError> {
        self.steps.step(doing, self.turn.ask(doing, limit, what, with)).await
    }
}

/// Whether a task is one of the statement's, and the numbers that it is bound to.
pub fn fits(circuit: &Circuit, task: &Task) -> Result<Bound, EzklError> {
    let bad = |why: String| Err(EzklError::BadTask(why));
    match (&circuit.model, &task.witness) {
        (None, Witness::None) => {}
        (None, _) => return bad("a commitment takes no witness: what it is about is all".into()),
        (Some(model), Witness::Inputs(inputs)) => match &**inputs {
            [input] if input.len() == model.input => {}
            [input] => return bad(format!("the input has {} numbers, `{}` takes {}", input.len(), circuit.id, model.input)),
            _ => return bad(format!("{} inputs came, `{}` takes one", inputs.len(), circuit.id)),
        },
        (Some(_), _) => return bad("a model's witness is its inputs".into()),
    }
    circuit.bind(&task.about).map_err(EzklError::BadTask)
}

/// What is known of keys before they are made.
fn record(circuit: &Circuit, shape: &Compiled) -> Result<Record, EzklError> {
    let outputs =
        shape.shapes.iter().zip(&shape.outputs).map(|(dims, scale)| Output { length: dims.iter().product(), scale: *scale });
    let mut outputs: Vec<_> = outputs.collect();
    let subject = Output { length: if circuit.model.is_some() { crate::circuit::LIMBS } else { 1 }, scale: 0 };
    if outputs.pop() != Some(subject) || shape.inputs.last() != Some(&0) {
        let said = format!("the subject is not its last output: {:?}, scales {:?}", shape.shapes, shape.outputs);
        return Err(EzklError::Nonsense { doing: COMPILING, said });
    }
    Ok(Record {
        recipe: String::new(),
        program: field::to_hex(&Word::default()),
        k: shape.k,
        rows: shape.rows,
        input_scale: shape.inputs[0],
        outputs,
        proof_bytes: 0,
        files: Default::default(),
    })
}

fn word(doing: &'static str, text: Option<&String>) -> Result<Word, EzklError> {
    let word = text.and_then(|text| field::from_ezkl(text));
    word.ok_or_else(|| EzklError::Nonsense { doing, said: "a number that is no element of the field".into() })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), EzklError> {
    std::fs::write(path, bytes).map_err(EzklError::io("write", path))
}

/// Runs work that blocks on a thread that may.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, EzklError> + Send + 'static) -> Result<T, EzklError> {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(stopped) if stopped.is_panic() => std::panic::resume_unwind(stopped.into_panic()),
        Err(_) => Err(EzklError::Ending),
    }
}
