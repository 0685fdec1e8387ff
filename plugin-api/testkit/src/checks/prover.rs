//! What the prover kind promises.
//!
//! Proofs are made of a statement `commitment`, which every prover can be configured to have and which costs little: what holds of it
//! holds of the machinery. A plugin without one is checked for what it says and refuses.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::prover::*;
use fabstir_plugin_api::stream::Stream;

use crate::harness::{During, Harness, Instance, patient, refused};
use crate::report::Outcome;

/// How long a prover may take to notice that nobody waits for it.
const GRACE: Duration = Duration::from_secs(5);

pub(super) async fn exercise(instance: &Instance) -> Result<()> {
    statements(&*instance.client::<dyn Prover>()).await.map(drop)
}

pub(super) async fn hundred(instance: &Instance) -> Result<()> {
    let prover = instance.client::<dyn Prover>();
    let alone = prover.statements(&patient()).await.during("statements")?;
    let calls = (0..100).map(|_| async {
        let told = prover.statements(&patient()).await.during("statements")?;
        ensure!(told == alone, "statements gives another answer among a hundred than alone");
        Ok(())
    });
    futures::future::try_join_all(calls).await.map(drop)
}

/// The statements, each of which must say everything that one has to know.
async fn statements(prover: &dyn Prover) -> Result<Vec<Statement>> {
    let statements = prover.statements(&patient()).await.during("statements")?;
    for statement in &statements {
        let Statement { id, system, says, leaves_open, trusts, .. } = statement;
        let words = [id, system, says, leaves_open, trusts];
        ensure!(words.iter().all(|text| !text.trim().is_empty()), "a statement leaves something unsaid: {statement:?}");
        ensure!(statement.kind.number().is_some(), "`{id}` is of no kind");
        ensure!(statement.program.as_deref().is_none_or(is_hash), "the program of `{id}` is no hash: {statement:?}");
        let same = statements.iter().filter(|other| other.id == *id).count();
        ensure!(same == 1, "{same} statements are called `{id}`");
    }
    Ok(statements)
}

fn is_hash(text: &str) -> bool {
    let digits = text.strip_prefix("0x").unwrap_or_default();
    digits.len() == 64 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn hash(of: &str) -> String {
    format!("0x{}", blake3::hash(of.as_bytes()).to_hex())
}

fn task(statement: &str) -> Task {
    let about = About {
        subject: format!("0x00{}", &hash("subject")[4..]),
        job: None,
        model: hash("model")[2..].to_owned(),
        input: hash("input"),
        output: hash("output"),
    };
    Task { statement: statement.to_owned(), about, witness: Witness::None }
}

/// A witness of an output head.
fn answer() -> Witness {
    Witness::Answer { tokens: vec![0], states: vec![vec![1.0]], draw: hash("draw") }
}

/// An instance and its statement about receipts, if it has one.
async fn with_commitment(harness: &Harness) -> Result<Option<(Instance, String)>> {
    let instance = harness.start().await?;
    Ok(commitment(&instance).await?.map(|statement| (instance, statement)))
}

async fn commitment(instance: &Instance) -> Result<Option<String>> {
    let statements = statements(&*instance.client::<dyn Prover>()).await?;
    Ok(statements.into_iter().find(|statement| statement.kind == ProofKind::Commitment).map(|statement| statement.id))
}

fn no_commitment() -> Result<Outcome> {
    Ok(Outcome::skip("no statement of the kind `commitment` with this configuration"))
}

/// Reads to the last item, which must come after every stage of the work and alone.
async fn last<T: Send + 'static>(what: &str, mut stream: Stream<T>, is_last: impl Fn(&T) -> bool) -> Result<T, PluginError> {
    let mut found = None;
    while let Some(item) = stream.next().await {
        let item = item?;
        if found.is_some() {
            return Err(PluginError::internal(format!("{what} sends something after its last item")));
        }
        if is_last(&item) {
            found = Some(item);
        }
    }
    found.ok_or_else(|| PluginError::internal(format!("{what} ended without its last item")))
}

async fn prepare(prover: &dyn Prover, statement: &str) -> Result<Statement, PluginError> {
    let stream = prover.prepare(&patient(), statement.to_owned()).await?;
    match last("prepare", stream, |step| matches!(step, Preparing::Ready(_))).await? {
        Preparing::Ready(statement) => Ok(statement),
        other => Err(PluginError::internal(format!("prepare ended with {other:?}"))),
    }
}

async fn prove(prover: &dyn Prover, task: &Task) -> Result<Proof, PluginError> {
    let stream = prover.prove(&patient(), task.clone()).await?;
    match last("prove", stream, |step| matches!(step, Proving::Proof(_))).await? {
        Proving::Proof(proof) => Ok(proof),
        other => Err(PluginError::internal(format!("prove ended with {other:?}"))),
    }
}

pub async fn statements_are_told_in_full(harness: &Harness) -> Result<Outcome> {
    let (one, other) = (harness.start().await?, harness.start().await?);
    let prover = one.client::<dyn Prover>();
    let told = statements(&*prover).await?;
    ensure!(!told.is_empty(), "the plugin can prove nothing with this configuration");
    ensure!(statements(&*prover).await? == told, "the second answer differs from the first");
    ensure!(statements(&*other.client::<dyn Prover>()).await? == told, "another instance gives another answer");
    for Statement { id, kind, model, program, .. } in &told {
        ensure!(program.is_none(), "`{id}` has a program, and nothing was prepared");
        let about_one = matches!(kind, ProofKind::OutputHead | ProofKind::OnnxModel);
        ensure!(!about_one || model.is_some(), "`{id}` is about a model and does not say which");
        prover.estimate(&patient(), id.clone()).await.during("estimate")?;
    }
    let nothing = "zz-no-such-statement".to_owned();
    let not_found = [Code::NotFound];
    refused("prepare of an unknown statement", prepare(&*prover, &nothing).await, &not_found)?;
    refused("prove of an unknown statement", prove(&*prover, &task(&nothing)).await, &not_found)?;
    refused("estimate of an unknown statement", prover.estimate(&patient(), nothing).await, &not_found)?;
    Ok(Outcome::Pass)
}

pub async fn program_outlives_the_instance(harness: &Harness) -> Result<Outcome> {
    let Some((instance, id)) = with_commitment(harness).await? else { return no_commitment() };
    let prover = instance.client::<dyn Prover>();
    let ready = prepare(&*prover, &id).await.during("prepare")?;
    let program = ready.program.clone().context("a prepared statement has no program")?;
    ensure!(is_hash(&program), "the program is no hash: {program}");
    ensure!(prepare(&*prover, &id).await.during("prepare, once more")? == ready, "prepared again, it is another statement");
    ensure!(statements(&*prover).await?.contains(&ready), "`statements` does not have what `prepare` answered");
    let proof = prove(&*prover, &task(&id)).await.during("prove")?;

    let state_dir = instance.state_dir().to_owned();
    instance.shutdown().await?;
    let instance = configured(harness, state_dir).await?;
    let prover = instance.client::<dyn Prover>();
    ensure!(statements(&*prover).await?.contains(&ready), "after a restart it is another statement");
    let verdict = prover.verify(&patient(), proof).await.during("verify after a restart")?;
    ensure!(verdict.holds, "a proof from before a restart does not hold: {verdict:?}");
    ensure!(prepare(&*prover, &id).await.during("prepare after a restart")? == ready, "after a restart other keys are made");
    Ok(Outcome::Pass)
}

async fn configured(harness: &Harness, state_dir: PathBuf) -> Result<Instance> {
    let instance = harness.connect_in(state_dir)?;
    instance.configure(instance.config()).await.during("configure")?;
    Ok(instance)
}

pub async fn proof_binds_what_it_is_about(harness: &Harness) -> Result<Outcome> {
    let Some((instance, id)) = with_commitment(harness).await? else { return no_commitment() };
    let prover = instance.client::<dyn Prover>();
    let task = task(&id);
    let proof = prove(&*prover, &task).await.during("prove")?;
    ensure!(proof.statement == id && proof.about == task.about, "the proof is about something else: {proof:?}");
    let ready = statements(&*prover).await?.into_iter().find(|statement| statement.id == id).context("the statement has gone")?;
    ensure!(ready.program.as_ref() == Some(&proof.program) && ready.system == proof.system, "the proof is of another program");
    let subject = proof.public_inputs.get(..32).map(|word| format!("0x{}", hex_of(word)));
    ensure!(subject.as_ref() == Some(&task.about.subject), "the public inputs do not begin with the subject");
    let verdict = prover.verify(&patient(), proof.clone()).await.during("verify")?;
    ensure!(verdict.holds && verdict.why.is_none(), "the proof does not hold: {verdict:?}");

    let mut wrong = Vec::new();
    for at in positions(proof.proof.len()) {
        let mut other = proof.clone();
        other.proof[at] ^= 1;
        wrong.push((format!("byte {at} of the proof changed"), other));
    }
    for at in positions(proof.public_inputs.len()) {
        let mut other = proof.clone();
        other.public_inputs[at] ^= 1;
        wrong.push((format!("byte {at} of the public inputs changed"), other));
    }
    for (what, change) in about_something_else() {
        let mut other = proof.clone();
        change(&mut other.about);
        wrong.push((what.to_owned(), other));
    }
    let claim = Claim::Answer { trace: hash("trace"), tokens: 1, draw: hash("draw") };
    wrong.push(("another claim".into(), Proof { claim, ..proof.clone() }));
    wrong.push(("no proof at all".into(), Proof { proof: Vec::new(), ..proof.clone() }));
    wrong.push(("another byte at the end".into(), Proof { proof: [&proof.proof[..], &[0]].concat(), ..proof.clone() }));
    wrong.push(("no public inputs".into(), Proof { public_inputs: Vec::new(), ..proof.clone() }));
    wrong.push(("zeros for a proof".into(), Proof { proof: vec![0; proof.proof.len()], ..proof.clone() }));
    for (what, other) in wrong {
        let verdict = prover.verify(&patient(), other).await.during(&format!("verify with {what}"))?;
        ensure!(!verdict.holds, "with {what} the proof still holds");
        ensure!(verdict.why.is_some_and(|why| !why.is_empty()), "with {what} it does not hold, and nothing says why");
    }
    let not_found = [Code::NotFound];
    let other = Proof { program: hash("program"), ..proof.clone() };
    refused("verify of an unknown program", prover.verify(&patient(), other).await, &not_found)?;
    let other = Proof { statement: "zz-no-such-statement".into(), ..proof.clone() };
    refused("verify of an unknown statement", prover.verify(&patient(), other).await, &not_found)?;

    // The same words, proven for another subject, are another proof.
    let mut another = task.clone();
    about_something_else()[0].1(&mut another.about);
    let replayed = Proof { proof: prove(&*prover, &another).await.during("prove")?.proof, ..proof };
    ensure!(!prover.verify(&patient(), replayed).await.during("verify")?.holds, "a proof for another subject holds");
    Ok(Outcome::Pass)
}

type Change = fn(&mut About);

fn about_something_else() -> [(&'static str, Change); 8] {
    [
        ("another subject", |about| about.subject = format!("0x00{}", &hash("another subject")[4..])),
        ("another model", |about| about.model = hash("another model")[2..].to_owned()),
        ("another input", |about| about.input = hash("another input")),
        ("another output", |about| about.output = hash("another output")),
        ("input and output swapped", |about| std::mem::swap(&mut about.input, &mut about.output)),
        ("a subject that no field has", |about| about.subject = format!("0x{}", "f".repeat(64))),
        ("a model that is no digest", |about| about.model = "zz".into()),
        ("an output that is no hash", |about| about.output = String::new()),
    ]
}

/// Every byte of something short, and some of something long: the first, the last and 256 in between.
fn positions(length: usize) -> impl Iterator<Item = usize> {
    (0..length).step_by((length / 256).max(1)).chain(length.checked_sub(1))
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub async fn false_task_is_refused(harness: &Harness) -> Result<Outcome> {
    let Some((instance, id)) = with_commitment(harness).await? else { return no_commitment() };
    let prover = instance.client::<dyn Prover>();
    let mut wrong = vec![
        ("a witness of another kind", Task { witness: answer(), ..task(&id) }),
        ("a witness of another kind", Task { witness: Witness::Inputs(vec![vec![1.0]]), ..task(&id) }),
    ];
    for (what, change) in &about_something_else()[5..] {
        let mut other = task(&id);
        change(&mut other.about);
        wrong.push((what, other));
    }
    for (what, task) in wrong {
        refused(&format!("a task with {what}"), prove(&*prover, &task).await, &[Code::InvalidArgument])?;
    }
    prove(&*prover, &task(&id)).await.during("prove after tasks that were refused")?;
    Ok(Outcome::Pass)
}

pub async fn abandoned_work_ends(harness: &Harness) -> Result<Outcome> {
    let Some((instance, id)) = with_commitment(harness).await? else { return no_commitment() };
    let prover = instance.client::<dyn Prover>();
    for _ in 0..3 {
        drop(prover.prepare(&patient(), id.clone()).await.during("prepare")?);
        drop(prover.prove(&patient(), task(&id)).await.during("prove")?);
        let mut stream = prover.prove(&patient(), task(&id)).await.during("prove")?;
        stream.next().await.context("prove ended without an item")?.during("prove")?;
    }
    // Whatever was under way has ended in time, and left nothing half made.
    let began = Instant::now();
    instance.drain(GRACE).await.context("after work was given up")?;
    let ended = began.elapsed();
    let state_dir = instance.state_dir().to_owned();
    instance.shutdown().await?;
    let instance = configured(harness, state_dir).await?;
    let prover = instance.client::<dyn Prover>();
    prepare(&*prover, &id).await.during("prepare after work was given up")?;
    let proof = prove(&*prover, &task(&id)).await.during("prove after work was given up")?;
    ensure!(prover.verify(&patient(), proof).await.during("verify")?.holds, "the proof does not hold");
    ensure!(ended < GRACE, "work that was given up went on for {ended:?}");
    Ok(Outcome::Pass)
}

pub async fn work_is_told_and_measured(harness: &Harness) -> Result<Outcome> {
    let Some((instance, id)) = with_commitment(harness).await? else { return no_commitment() };
    let prover = instance.client::<dyn Prover>();
    let estimate = prover.estimate(&patient(), id.clone()).await.during("estimate")?;
    let untimed = estimate.prepare_cpu_ms.is_none() && estimate.prove_cpu_ms.is_none() && estimate.memory.is_none();
    ensure!(untimed, "nothing ran yet, and the estimate has figures: {estimate:?}");
    let mut stream = prover.prove(&patient(), task(&id)).await.during("prove")?;
    let (mut stages, mut proof) = (0, None);
    while let Some(step) = stream.next().await {
        match step.during("prove")? {
            Proving::Progress(stage) => {
                ensure!(proof.is_none(), "a stage comes after the proof: {stage:?}");
                ensure!(!stage.doing.is_empty() && stage.percent.is_none_or(|percent| percent <= 100), "no stage: {stage:?}");
                stages += 1;
            }
            Proving::Proof(made) => proof = Some(made),
            Proving::Unknown => bail!("prove sends something unknown"),
        }
    }
    ensure!(stages > 0, "the proof came without a stage before it");
    let proof = proof.context("prove ended without a proof")?;
    let estimate = prover.estimate(&patient(), id).await.during("estimate")?;
    ensure!(estimate.prove_cpu_ms.is_some(), "a proof was made, and the estimate has no figure for it: {estimate:?}");
    ensure!(estimate.prepare_cpu_ms == Some(0), "it is prepared, and that would still take {:?} ms", estimate.prepare_cpu_ms);
    ensure!(
        estimate.proof_bytes.is_none_or(|bytes| bytes == proof.proof.len() as u64),
        "a proof has {} bytes, the estimate says {:?}",
        proof.proof.len(),
        estimate.proof_bytes
    );
    Ok(Outcome::Pass)
}

pub async fn damaged_keys_are_told(harness: &Harness) -> Result<Outcome> {
    let Some((instance, id)) = with_commitment(harness).await? else { return no_commitment() };
    let ready = prepare(&*instance.client::<dyn Prover>(), &id).await.during("prepare")?;
    let state_dir = instance.state_dir().to_owned();
    instance.shutdown().await?;
    let files = files_below(&state_dir)?;
    let Some(largest) = files.iter().max_by_key(|(_, size)| *size).map(|(path, _)| path.clone()) else {
        return Ok(Outcome::skip("the plugin keeps nothing in its folder for state"));
    };
    let mut bytes = std::fs::read(&largest)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&largest, bytes)?;

    let instance = configured(harness, state_dir).await?;
    let prover = instance.client::<dyn Prover>();
    let what = format!("prepare with a changed bit in {}", largest.file_name().unwrap_or_default().display());
    let error = refused(&what, prepare(&*prover, &id).await, &[Code::Corrupt])?;
    ensure!(!error.message.is_empty(), "`Corrupt` without a word of what");
    let again = prepare(&*prover, &id).await.during("prepare after damaged keys were set aside")?;
    ensure!(again.program.is_some() && again.says == ready.says, "what was made anew is another statement");
    let proof = prove(&*prover, &task(&id)).await.during("prove with keys made anew")?;
    ensure!(prover.verify(&patient(), proof).await.during("verify")?.holds, "the proof does not hold");
    Ok(Outcome::Pass)
}

fn files_below(folder: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        match entry.metadata()? {
            kind if kind.is_dir() => files.extend(files_below(&entry.path())?),
            kind => files.push((entry.path(), kind.len())),
        }
    }
    Ok(files)
}

pub async fn verifier_is_ready_to_deploy(harness: &Harness) -> Result<Outcome> {
    let declares = |method: &str| {
        let provided = harness.manifest.provides.iter().filter(|provided| provided.kind == "prover");
        provided.flat_map(|provided| &provided.methods).any(|declared| declared == method)
    };
    if !declares("verifier") {
        return Ok(Outcome::skip("the plugin has no contracts"));
    }
    let Some((instance, id)) = with_commitment(harness).await? else { return no_commitment() };
    let prover = instance.client::<dyn Prover>();
    let early = prover.verifier(&patient(), id.clone()).await;
    refused("the contract before `prepare`", early, &[Code::Unavailable])?;
    prepare(&*prover, &id).await.during("prepare")?;
    let contract = prover.verifier(&patient(), id.clone()).await.during("verifier")?;
    ensure!(!contract.name.is_empty(), "the contract has no name");
    ensure!(contract.creation.iter().all(|code| code.len() > 32) && !contract.creation.is_empty(), "there is no code to deploy");
    ensure!(prover.verifier(&patient(), id).await.during("verifier")? == contract, "the second answer differs from the first");
    let nothing = prover.verifier(&patient(), "zz-no-such-statement".into()).await;
    refused("the contract of an unknown statement", nothing, &[Code::NotFound])?;
    Ok(Outcome::Pass)
}
