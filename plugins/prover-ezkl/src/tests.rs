//! Promises of the plugin, kept with the real wheel. `make ezkl` installs it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fabstir_plugin_api::prelude::*;
use tempfile::TempDir;

use crate::{Config, Ezkl, ModelConfig};

mod chain;
mod faults;

/// A plugin on a folder of its own.
pub struct Subject {
    pub plugin: Ezkl,
    pub state: TempDir,
    pub config: Config,
}

impl Subject {
    pub async fn start(config: Config) -> Self {
        let state = TempDir::new().unwrap();
        let plugin = Ezkl::start(state.path(), config.clone()).await.unwrap();
        Self { plugin, state, config }
    }

    pub async fn prepare(&self, statement: &str) -> Result<Statement> {
        let items = self.plugin.prepare(&Cx::new(), statement.into()).await?.collect().await?;
        match items.into_iter().next_back() {
            Some(Preparing::Ready(statement)) => Ok(statement),
            other => panic!("prepare ended with {other:?}"),
        }
    }

    pub async fn prove(&self, task: Task) -> Result<Proof> {
        let items = self.plugin.prove(&Cx::new(), task).await?.collect().await?;
        match items.into_iter().next_back() {
            Some(Proving::Proof(proof)) => Ok(proof),
            other => panic!("prove ended with {other:?}"),
        }
    }

    pub async fn verify(&self, proof: Proof) -> Result<Verdict> {
        self.plugin.verify(&Cx::new(), proof).await
    }

    /// The ids of this plugin's workers: its memory bound tells them from those of other tests in this process.
    pub fn workers(&self) -> Vec<i32> {
        let mark = format!("\0{}\0", self.config.memory());
        let ours = |id: &i32| {
            let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).ends_with(&mark)
        };
        let ids = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        ids.filter(ours).collect()
    }
}

/// A configuration whose workers can be told from others.
pub fn config(memory_mib: u64) -> Config {
    Config { memory_bytes: Some((memory_mib << 20) + u64::from(std::process::id())), ..Config::default() }
}

pub fn crate_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

pub fn classifier() -> ModelConfig {
    let examples = crate_folder().join("examples");
    ModelConfig {
        name: "classifier".into(),
        path: examples.join("classifier.onnx"),
        calibration: Some(examples.join("classifier.examples.json")),
        scale: None,
        max_k: Some(14),
    }
}

pub fn about() -> About {
    let hex = |byte: &str| format!("0x{}", byte.repeat(32));
    About { subject: format!("0x00{}", "9f".repeat(31)), job: None, model: "0a".repeat(32), input: hex("bb"), output: hex("cc") }
}

pub fn commitment() -> Task {
    Task { statement: "commitment".into(), about: about(), witness: Witness::None }
}

/// Other proofs than this one: in what it is about, what it claims, its public inputs, and `bits` single bits of its bytes.
fn others(proof: &Proof, bits: usize) -> Vec<Proof> {
    let mut others = Vec::new();
    let mut other = |change: &dyn Fn(&mut Proof)| {
        let mut changed = proof.clone();
        change(&mut changed);
        assert_ne!(changed, *proof);
        others.push(changed);
    };
    for at in 2..66 {
        let turn = move |text: &mut String, at: usize| {
            let digit = if &text[at..=at] == "1" { "2" } else { "1" };
            text.replace_range(at..=at, digit);
        };
        other(&|proof| turn(&mut proof.about.subject, at));
        other(&|proof| turn(&mut proof.about.model, at - 2));
        other(&|proof| turn(&mut proof.about.input, at));
        other(&|proof| turn(&mut proof.about.output, at));
        if let Claim::Outputs { .. } = proof.claim {
            other(&|proof| {
                if let Claim::Outputs { inputs, .. } = &mut proof.claim {
                    turn(inputs, at);
                }
            });
        }
    }
    if let Claim::Outputs { outputs, .. } = &proof.claim {
        let smallest = 1.0 / 16384.0;
        for at in 0..outputs[0].len() {
            for by in [smallest, -smallest, 1.0, f32::NAN] {
                other(&|proof| {
                    if let Claim::Outputs { outputs, .. } = &mut proof.claim {
                        outputs[0][at] += by;
                    }
                });
            }
        }
        other(&|proof| proof.claim = Claim::None);
    } else {
        other(&|proof| proof.claim = Claim::Outputs { inputs: proof.about.input.clone(), outputs: Vec::new() });
    }
    for at in 0..proof.public_inputs.len() {
        other(&|proof| proof.public_inputs[at] ^= 1 << (at % 8));
    }
    other(&|proof| proof.public_inputs.truncate(proof.public_inputs.len() - 1));
    other(&|proof| proof.public_inputs.push(0));
    other(&|proof| proof.public_inputs.clear());
    for at in 0..bits {
        let byte = at * proof.proof.len() / bits;
        other(&|proof| proof.proof[byte] ^= 1 << (at % 8));
    }
    other(&|proof| proof.proof.fill(0));
    other(&|proof| proof.proof.fill(0xff));
    other(&|proof| proof.proof.clear());
    other(&|proof| proof.proof.push(0));
    other(&|proof| proof.proof.truncate(proof.proof.len() - 1));
    others
}

/// Holds every other proof against the plugin and returns how many there were.
async fn none_hold(subject: &Subject, others: Vec<Proof>) -> usize {
    let before = subject.workers();
    let count = others.len();
    for other in others {
        let verdict = subject.verify(other.clone()).await.unwrap();
        assert!(!verdict.holds && verdict.why.is_some(), "it holds: {other:?}");
    }
    assert_eq!(subject.workers(), before, "a check has cost a worker");
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commitment_is_proven_within_two_cpu_seconds_and_nothing_else_holds() {
    let subject = Subject::start(config(2048)).await;
    let before = subject.plugin.statements(&Cx::new()).await.unwrap();
    assert_eq!((before.len(), &before[0].program, before[0].is_development), (1, &None, true));
    let missing = subject.plugin.verifier(&Cx::new(), "commitment".into()).await.unwrap_err();
    assert_eq!(missing.code, Code::Unavailable);

    let prepared = subject.prepare("commitment").await.unwrap();
    let proof = subject.prove(commitment()).await.unwrap();
    assert_eq!(Some(&proof.program), prepared.program.as_ref());
    assert_eq!((proof.public_inputs.len(), &proof.public_inputs[1..32]), (64, &[0x9f; 31][..]));
    assert_eq!(subject.verify(proof.clone()).await.unwrap(), Verdict { holds: true, why: None });

    let took = subject.plugin.estimate(&Cx::new(), "commitment".into()).await.unwrap();
    println!("commitment: {took:?}");
    assert_eq!((took.prepare_cpu_ms, took.proof_bytes), (Some(0), Some(proof.proof.len() as u64)));
    assert!(took.prove_cpu_ms.unwrap() <= 2000, "{took:?}");

    // A proof that is good for another job is none for this one.
    let elsewhere = About { subject: format!("0x00{}", "9e".repeat(31)), ..about() };
    let replayed = subject.prove(Task { about: elsewhere, ..commitment() }).await.unwrap().proof;
    assert!(!subject.verify(Proof { proof: replayed, ..proof.clone() }).await.unwrap().holds);

    let began = Instant::now();
    let count = none_hold(&subject, others(&proof, 700)).await;
    println!("{count} other proofs do not hold, checked in {:?}", began.elapsed());
    assert!(count >= 1000);
    assert!(subject.verify(proof).await.unwrap().holds);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proof_under_other_keys_or_of_another_statement_is_not_known() {
    let (one, two) = (Subject::start(config(2100)).await, Subject::start(config(2100)).await);
    let proof = one.prove(commitment()).await.unwrap();
    let unknown = two.verify(proof.clone()).await.unwrap_err();
    assert_eq!(unknown.code, Code::NotFound);
    two.prepare("commitment").await.unwrap();
    assert_eq!(two.verify(proof.clone()).await.unwrap_err().code, Code::NotFound);
    for other in [Proof { statement: "x".into(), ..proof.clone() }, Proof { system: "groth16-bn254".into(), ..proof.clone() }] {
        assert_eq!(one.verify(other).await.unwrap_err().code, Code::NotFound);
    }
    // Keys are there for who comes back.
    let again = Ezkl::start(one.state.path(), one.config.clone()).await.unwrap();
    assert!(again.verify(&Cx::new(), proof).await.unwrap().holds);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_proven_end_to_end_and_its_outputs_are_the_rounded_models() {
    let subject = Subject::start(Config { models: vec![classifier()], ..config(2200) }).await;
    let id = "onnx-model:classifier";
    let began = Instant::now();
    let statement = subject.prepare(id).await.unwrap();
    println!("prepared in {:?}", began.elapsed());
    let model = statement.model.clone().unwrap();
    assert!(statement.says.contains(&model));

    let text = std::fs::read(crate_folder().join("examples/classifier.examples.json")).unwrap();
    let examples: Vec<Vec<f32>> = serde_json::from_slice(&text).unwrap();
    let about = About { model, ..about() };
    let task = |input: Vec<f32>| Task { statement: id.into(), about: about.clone(), witness: Witness::Inputs(vec![input]) };
    let stages = subject.plugin.prove(&Cx::new(), task(examples[0].clone())).await.unwrap().collect().await.unwrap();
    let told = |item: &Proving| matches!(item, Proving::Progress(Stage { percent: Some(_), left_ms: Some(_), .. }));
    assert!(stages.iter().any(told), "no stage tells how far it is: {stages:?}");
    let Some(Proving::Proof(proof)) = stages.into_iter().next_back() else { panic!("no proof") };
    println!("{:?}", subject.plugin.estimate(&Cx::new(), id.into()).await.unwrap());

    let Claim::Outputs { outputs, .. } = &proof.claim else { panic!("{:?}", proof.claim) };
    println!("outputs {outputs:?}, {} bytes of proof, {} of public inputs", proof.proof.len(), proof.public_inputs.len());
    // What classifier.py prints for its first example.
    for (proven, floating) in outputs[0].iter().zip([7.8814, -4.2918, 0.1195, -5.7275]) {
        assert!((proven - floating).abs() < 0.2, "{outputs:?}");
    }
    assert!(subject.verify(proof.clone()).await.unwrap().holds);
    let count = none_hold(&subject, others(&proof, 200)).await;
    println!("{count} other proofs do not hold");

    // Another input has another commitment.
    let second = subject.prove(task(examples[1].clone())).await.unwrap();
    assert_ne!(second.claim, proof.claim);
    let swapped = Proof { claim: second.claim, public_inputs: second.public_inputs, ..proof };
    assert!(!subject.verify(swapped).await.unwrap().holds);

    let refused = |witness: Witness, about: About| subject.prove(Task { statement: id.into(), about, witness });
    let huge = refused(Witness::Inputs(vec![vec![16_000.0; 16]]), about.clone()).await.unwrap_err();
    assert_eq!((huge.code, huge.message.contains("scale the model's input down")), (Code::InvalidArgument, true), "{huge}");
    for witness in
        [Witness::None, Witness::Inputs(vec![]), Witness::Inputs(vec![vec![0.0; 15]]), Witness::Inputs(vec![vec![f32::NAN; 16]])]
    {
        assert_eq!(refused(witness, about.clone()).await.unwrap_err().code, Code::InvalidArgument);
    }
    let other = About { model: "0a".repeat(32), ..about.clone() };
    assert_eq!(refused(Witness::Inputs(vec![vec![0.0; 16]]), other).await.unwrap_err().code, Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_needs_a_larger_circuit_is_refused_with_the_figures() {
    let model = ModelConfig { max_k: Some(12), ..classifier() };
    let subject = Subject::start(Config { models: vec![model], ..config(2300) }).await;
    let error = subject.prepare("onnx-model:classifier").await.unwrap_err();
    assert_eq!(error.code, Code::Full);
    assert!(error.message.contains("2^13") && error.message.contains("`max_k` is 12"), "{error}");
    assert_eq!(std::fs::read_dir(subject.state.path().join("work")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_wheel_the_start_says_what_to_do() {
    let state = TempDir::new().unwrap();
    let python = |path: &str| Config { python: Some(path.into()), ..Config::default() };
    for path in ["/usr/bin/python3", "/nowhere/python3", "/bin/true"] {
        let error = Ezkl::start(state.path(), python(path)).await.err().unwrap().at_start();
        assert_eq!(error.code, Code::InvalidArgument);
        assert!(error.message.contains("run `make ezkl`") && error.message.contains("23.0.5"), "{error}");
    }
    let model = ModelConfig { path: "/nowhere.onnx".into(), ..classifier() };
    let error = Ezkl::start(state.path(), Config { models: vec![model], ..Config::default() }).await.err().unwrap();
    assert!(error.to_string().contains("/nowhere.onnx"));
}

/// Waits for something that has to become true soon.
pub async fn soon(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(30), "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
