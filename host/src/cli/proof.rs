//! `fabstir-node prove`, `verify` and `proof`: proofs of work, made and checked with the prover plugins of the configuration.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use fabstir_plugin_api::chain::{Chain, Hash32, Job as Posting, JobId, JobResult, ModelId, Sure};
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::prover::{About, Claim, Estimate, Proof, ProofKind, Prover, Statement, Task, Witness};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::account::{cx, history, of_plugin, with_chain};
use super::network::on_threads;
use super::{ConfigArgs, Failure, log, print, table};
use crate::config::Config;
use crate::market::history::{job_of, result_in};
use crate::market::{journal, proving};
use crate::supervisor::{Alone, entries};

/// How long reading the market's history may take.
const HISTORY: Duration = Duration::from_secs(120);
/// The longest that a proof may take to be made.
const PROVE: Duration = Duration::from_secs(3600);
/// The largest file of a proof, in bytes.
const MAX_FILE: u64 = 16 << 20;
/// What the subject of a proof that is about no posted job is made of, besides what it is about.
const SUBJECT: &str = "fabstir-node 2026 subject of a proof about no job";

/// Proves something about a model, an input and an output.
///
/// What is proven is what the statement says, and nothing more: `proof ls` shows each in words. The proof goes to a file, from which
/// `verify` checks it and `proof show` tells what it is.
#[derive(Debug, Args)]
pub struct Prove {
    /// What is to be proven, as `proof ls` calls it.
    statement: String,

    /// The model's digest: 64 hexadecimal digits, as `find --json` shows them.
    #[arg(long, value_name = "DIGEST", value_parser = digest)]
    model: String,

    /// The file with the input.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,

    /// The file with the output.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,

    /// For an ONNX model: a JSON file with its inputs, a list of lists of numbers, each flattened in row-major order.
    #[arg(long, value_name = "FILE")]
    values: Option<PathBuf>,

    /// Where the proof goes.
    #[arg(long, short = 'o', value_name = "FILE", default_value = "proof.json")]
    out: PathBuf,

    #[command(flatten)]
    shared: Shared,
}

/// Checks a proof from a file.
///
/// It holds only if its statement is one of a prover plugin here, under the same keys. Without --input and --output, what it is about is
/// taken as it stands in the file; with --job, its model, input, output and, where it is about tokens, their trace, their number and the
/// draw must be those that the chain has of that job. Exits with 1 if it does not hold, or cannot be checked.
#[derive(Debug, Args)]
pub struct Verify {
    /// The proof's file.
    file: PathBuf,

    /// The file that must be its input.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,

    /// The file that must be its output.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// The job that it must be about.
    #[arg(long, value_name = "NUMBER")]
    job: Option<JobId>,

    #[command(flatten)]
    shared: Shared,
}

/// Shows what can be proven here, and what a proof says.
#[derive(Debug, Args)]
pub struct ProofCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Lists what the prover plugins can prove, in words.
    Ls(Shared),
    /// Makes the keys of a statement, which its first proof would do otherwise.
    Prepare {
        /// What is to be proven, as `proof ls` calls it.
        statement: String,
        #[command(flatten)]
        shared: Shared,
    },
    /// Shows what a proof in a file says, and what it leaves open. Checks nothing.
    Show {
        /// The proof's file.
        file: PathBuf,
    },
    /// Writes the proof that this node has made for a posted job to a file.
    ///
    /// It reads the node's journal, whether the node runs or not. `verify FILE --job ID` holds the file
    /// against all that the chain has of the job.
    Save {
        /// The job's number.
        job: JobId,
        /// Where the proof goes.
        #[arg(long, short = 'o', value_name = "FILE", default_value = "proof.json")]
        out: PathBuf,
        #[command(flatten)]
        shared: Shared,
    },
    /// Writes the contract that checks proofs of a statement, ready to be deployed.
    ///
    /// `verifier.mjs` beside the market's contracts deploys the file and names it in ProofHub.
    Contract {
        /// What is to be proven, as `proof ls` calls it.
        statement: String,
        /// Where the contract goes.
        #[arg(long, short = 'o', value_name = "FILE", default_value = "verifier.json")]
        out: PathBuf,
        #[command(flatten)]
        shared: Shared,
    },
}

/// What the commands share that start prover plugins.
#[derive(Debug, Args)]
struct Shared {
    /// The plugin to use, by its id. Without it, every prover of the configuration.
    #[arg(long, value_name = "ID")]
    plugin: Option<String>,

    /// What is logged, to standard error.
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    log: String,

    #[command(flatten)]
    config: ConfigArgs,
}

/// A proof, and what its maker says that it means.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProofFile {
    statement: Statement,
    about: About,
    claim: Claim,
    /// Bytes as `0x` and hexadecimal digits.
    public_inputs: String,
    proof: String,
}

/// A prover that runs for this command, and what it says.
struct Running {
    plugin: String,
    alone: Alone<dyn Prover>,
    statements: Vec<Statement>,
}

fn digest(text: &str) -> Result<String, String> {
    match text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        true => Ok(text.to_lowercase()),
        false => Err("64 hexadecimal digits were expected".into()),
    }
}

impl Shared {
    fn prepare(&self, json: bool) -> Result<Config, Failure> {
        let config = self.config.load()?.config;
        log::start(&self.log, json)?;
        Ok(config)
    }

    /// Starts the provers, works with them and ends them.
    fn with_provers<T>(&self, config: &Config, work: impl AsyncFnOnce(&[Running]) -> Result<T, Failure>) -> Result<T, Failure> {
        on_threads(async {
            let known = entries::<dyn Prover>(config);
            let meant: Vec<_> = known.iter().filter(|entry| self.plugin.as_ref().is_none_or(|id| *id == entry.id)).collect();
            if meant.is_empty() {
                let ids: Vec<&str> = known.iter().map(|entry| entry.id.as_str()).collect();
                let message = match (&self.plugin, &ids[..]) {
                    (Some(id), [_, ..]) => format!("no prover of the configuration is called `{id}`; there are {}", ids.join(", ")),
                    _ => "no plugin of the configuration is a prover: add one to plugins.toml, as the comments of the shipped file show".into(),
                };
                return Err(Failure::new(Failure::CONFIG, "no_prover", message));
            }
            let mut running = Vec::new();
            let begun = async {
                for entry in meant {
                    let alone = Alone::start_entry(config.clone(), entry.clone(), |routes| &routes.prover).await?;
                    let statements = alone.client.statements(&cx()).await;
                    running.push(Running { plugin: entry.id.clone(), alone, statements: Vec::new() });
                    let last = running.last_mut().expect("was just added");
                    last.statements = statements.map_err(|error| of_plugin(&error))?;
                }
                Ok(())
            };
            let done = match begun.await {
                Ok(()) => work(&running).await,
                Err(failure) => Err(failure),
            };
            for one in running {
                one.alone.end().await;
            }
            done
        })
    }
}

/// The prover of a statement.
fn prover_of<'a>(running: &'a [Running], id: &str) -> Result<(&'a Running, &'a Statement), Failure> {
    let found = |one: &'a Running| one.statements.iter().find(|statement| statement.id == id).map(|statement| (one, statement));
    running.iter().find_map(found).ok_or_else(|| {
        // Two provers may prove the same.
        let known: BTreeSet<&str> =
            running.iter().flat_map(|one| one.statements.iter().map(|statement| statement.id.as_str())).collect();
        let known = known.into_iter().collect::<Vec<_>>().join(", ");
        let why = format!(
            "`{id}` is no statement of a prover here; there are {known}: others want a model in the prover's configuration"
        );
        Failure::new(Failure::FAILED, "no_statement", why)
    })
}

fn unproven(error: &PluginError) -> Failure {
    match error.code {
        Code::InvalidArgument => Failure::new(Failure::FAILED, "untrue", format!("there is no such proof: {error}")),
        _ => of_plugin(error),
    }
}

/// The hash of a file's bytes, as commitments have it.
fn commitment(path: &Path) -> Result<Hash32, Failure> {
    let cannot = |error| Failure::new(Failure::FAILED, "file", format!("{} cannot be read: {error}", path.display()));
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(path).map_err(cannot)?).map_err(cannot)?;
    Ok(format!("0x{}", hasher.finalize().to_hex()))
}

/// The subject of a proof that is about no posted job.
fn subject(model: &str, input: &str, output: &str) -> Hash32 {
    let mut hasher = blake3::Hasher::new_derive_key(SUBJECT);
    for part in [model, input, output] {
        hasher.update(part.as_bytes()).update(b"\n");
    }
    // One byte less, so that it is an element of every 254-bit field.
    let hash = hasher.finalize();
    format!("0x00{}", hex::encode(&hash.as_bytes()[..31]))
}

fn write(path: &Path, value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::new(Failure::FAILED, "file", error))?;
    let cannot = |error| Failure::new(Failure::FAILED, "file", format!("{} cannot be written: {error}", path.display()));
    fs::write(path, format!("{text}\n")).map_err(cannot)
}

fn read(path: &Path) -> Result<ProofFile, Failure> {
    let cannot = |why: String| Failure::new(Failure::FAILED, "file", format!("{} is no proof: {why}", path.display()));
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|error| cannot(error.to_string()))?;
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(|error| cannot(error.to_string()))?;
    if text.len() as u64 > MAX_FILE {
        return Err(cannot(format!("it has more than {MAX_FILE} bytes")));
    }
    serde_json::from_str(&text).map_err(|error| cannot(error.to_string()))
}

impl ProofFile {
    fn of(statement: Statement, proof: Proof) -> Self {
        let text = |bytes: &[u8]| format!("0x{}", hex::encode(bytes));
        let statement = Statement { program: Some(proof.program), ..statement };
        Self {
            statement,
            about: proof.about,
            claim: proof.claim,
            public_inputs: text(&proof.public_inputs),
            proof: text(&proof.proof),
        }
    }

    fn proof(&self, path: &Path) -> Result<Proof, Failure> {
        let bytes = |name: &str, text: &str| {
            let digits = text.strip_prefix("0x").and_then(|digits| hex::decode(digits).ok());
            let message = || format!("{}: `{name}` is no text of 0x and hexadecimal digits", path.display());
            digits.ok_or_else(|| Failure::new(Failure::FAILED, "file", message()))
        };
        let program = self.statement.program.clone();
        let none = || Failure::new(Failure::FAILED, "file", format!("{}: its statement names no program", path.display()));
        Ok(Proof {
            statement: self.statement.id.clone(),
            system: self.statement.system.clone(),
            program: program.ok_or_else(none)?,
            about: self.about.clone(),
            claim: self.claim.clone(),
            public_inputs: bytes("public_inputs", &self.public_inputs)?,
            proof: bytes("proof", &self.proof)?,
        })
    }
}

impl Prove {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.shared.prepare(json)?;
        let (input, output) = (commitment(&self.input)?, commitment(&self.output)?);
        let subject = subject(&self.model, &input, &output);
        let about = About { subject, job: None, model: self.model.clone(), input, output };
        let witness = self.witness()?;
        let file = self.shared.with_provers(&config, async |running| {
            let (prover, statement) = prover_of(running, &self.statement)?;
            let client = &*prover.alone.client;
            let statement = match statement.program {
                Some(_) => statement.clone(),
                None => proving::make(client, &statement.id).await.map_err(|error| of_plugin(&error))?,
            };
            let program = statement.program.clone().unwrap_or_default();
            let task = Task { statement: statement.id.clone(), about, witness };
            let proof = proving::prove(client, &program, task, PROVE).await.map_err(|error| unproven(&error))?;
            Ok(ProofFile::of(statement, proof))
        })?;
        write(&self.out, &file)?;
        let text = format!(
            "{} holds the proof, of {} bytes.\n{}",
            self.out.display(),
            (file.proof.len() - 2) / 2,
            words(&file.statement)
        );
        Ok(print(json, &json!(file), text)?)
    }

    fn witness(&self) -> Result<Witness, Failure> {
        let Some(path) = &self.values else { return Ok(Witness::None) };
        let cannot = |why: String| Failure::new(Failure::FAILED, "file", format!("{} has no inputs: {why}", path.display()));
        let text = fs::read_to_string(path).map_err(|error| cannot(error.to_string()))?;
        Ok(Witness::Inputs(serde_json::from_str(&text).map_err(|error| cannot(error.to_string()))?))
    }
}

impl Verify {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.shared.prepare(json)?;
        let file = read(&self.file)?;
        let proof = file.proof(&self.file)?;
        self.check_files(&proof.about)?;
        self.check_subject(&config, &proof)?;
        let (statement, verdict) = self.shared.with_provers(&config, async |running| {
            let mut unknown =
                PluginError::not_found(format!("no prover here proves `{}` by the program {}", proof.statement, proof.program));
            for one in running {
                let is_it = |known: &&Statement| {
                    known.kind == file.statement.kind
                        && known.system == proof.system
                        && known.program.as_ref() == Some(&proof.program)
                };
                let Some(known) = one.statements.iter().find(is_it) else { continue };
                // Named as the prover here names it.
                let proof = Proof { statement: known.id.clone(), ..proof.clone() };
                match one.alone.client.verify(&cx().with_timeout(PROVE), proof).await {
                    Ok(verdict) => return Ok((known.clone(), verdict)),
                    Err(error) => unknown = error,
                }
            }
            let message = format!("it could not be checked, which says nothing about it: {unknown}");
            Err(Failure::new(Failure::FAILED, "unchecked", message))
        })?;
        if !verdict.holds {
            let why = verdict.why.unwrap_or_else(|| "the prover does not say why".into());
            return Err(Failure::new(Failure::FAILED, "does_not_hold", format!("the proof does not hold: {why}")));
        }
        let value = json!({ "holds": true, "statement": statement, "about": file.about, "claim": file.claim });
        Ok(print(json, &value, format!("The proof holds.\n{}\n{}", words(&statement), about_words(&file)))?)
    }

    fn check_files(&self, about: &About) -> Result<(), Failure> {
        for (name, path, stated) in [("input", &self.input, &about.input), ("output", &self.output, &about.output)] {
            let Some(path) = path else { continue };
            if commitment(path)? != *stated {
                let message = format!("the proof is not about this {name}: {} has another hash", path.display());
                return Err(Failure::new(Failure::FAILED, "does_not_hold", message));
            }
        }
        Ok(())
    }

    /// Whether the proof is about the job, or about none.
    fn check_subject(&self, config: &Config, proof: &Proof) -> Result<(), Failure> {
        let About { subject: stated, job, model, input, output } = &proof.about;
        let not = |message: String| Err(Failure::new(Failure::FAILED, "does_not_hold", message));
        let Some(id) = self.job else {
            return match (job, subject(model, input, output) == *stated) {
                (None, true) => Ok(()),
                (Some(job), _) => {
                    let message = format!("it is about a job of a market: give --job {job}, so that the chain can be asked");
                    Err(Failure::new(Failure::USAGE, "usage", message))
                }
                (None, false) => not("its subject is not made from its model, input and output".into()),
            };
        };
        let delivered = on_threads(with_chain(config, async |chain| Delivered::read(chain, id, model, &proof.claim).await))?;
        match delivered.differs(proof) {
            Some(what) => not(format!("the proof is not about job {id} of this market: {what}")),
            None => Ok(()),
        }
    }
}

/// What the chain has of a job that a proof is held against.
struct Delivered {
    id: JobId,
    subject: Hash32,
    job: Posting,
    /// What the chain calls the model that the proof names.
    model: ModelId,
    result: JobResult,
    /// Where positions of it were drawn, if the proof is about positions.
    draw: Option<Hash32>,
}

impl Delivered {
    async fn read(chain: &Arc<dyn Chain>, id: JobId, model: &str, claim: &Claim) -> Result<Self, Failure> {
        let failed = |error: PluginError| of_plugin(&error);
        let subject = chain.subject(&cx(), id, Sure::Latest).await.map_err(failed)?;
        let job = chain.job(&cx(), id, Sure::Latest).await.map_err(failed)?;
        let model = chain.model_id(&cx(), model.to_owned()).await.map_err(failed)?;
        let happened = history(chain, move |event| job_of(event) == Some(id), HISTORY).await?;
        let none = || Failure::new(Failure::FAILED, "no_result", format!("the chain tells of no result of job {id}"));
        let result = result_in(happened.events()).cloned().ok_or_else(none)?;
        let draw = match claim {
            Claim::Answer { .. } if result.trace.is_some() => Some(chain.draw(&cx(), id).await.map_err(failed)?),
            _ => None,
        };
        Ok(Self { id, subject, job, model, result, draw })
    }

    /// What of a proof is not what the chain has.
    fn differs(&self, proof: &Proof) -> Option<String> {
        let (about, terms, result) = (&proof.about, &self.job.terms, &self.result);
        let named = about.job.map_or_else(|| "none".into(), |job| job.to_string());
        let mut compared = vec![
            ("subject", about.subject.clone(), self.subject.clone()),
            ("job", named, self.id.to_string()),
            ("model", self.model.clone(), terms.model.clone()),
            ("input", about.input.clone(), self.job.input_commitment.clone()),
            ("output", about.output.clone(), result.output_commitment.clone()),
        ];
        if terms.proof_kind != 0 {
            compared.push(("program", proof.program.clone(), terms.program.clone()));
        }
        if let Claim::Answer { trace, tokens, draw } = &proof.claim {
            let known = |word: &Option<Hash32>| word.clone().unwrap_or_else(|| "none".into());
            compared.push(("trace", trace.clone(), known(&result.trace)));
            compared.push(("number of tokens", tokens.to_string(), result.output_tokens.to_string()));
            compared.push(("draw", draw.clone(), known(&self.draw)));
        }
        let other = compared.into_iter().find(|(_, stated, known)| stated != known)?;
        Some(format!("its {} is {}, that of the job {}", other.0, other.1, other.2))
    }
}

impl ProofCommand {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        match self.action {
            Action::Ls(shared) => ls(&shared, json),
            Action::Prepare { statement, shared } => {
                let config = shared.prepare(json)?;
                let made = shared.with_provers(&config, async |running| {
                    let (prover, statement) = prover_of(running, &statement)?;
                    proving::make(&*prover.alone.client, &statement.id).await.map_err(|error| of_plugin(&error))
                })?;
                let text = format!("{} is ready; its program is {}", made.id, made.program.as_deref().unwrap_or("not told"));
                Ok(print(json, &json!(made), text)?)
            }
            Action::Show { file } => {
                let proof = read(&file)?;
                let text = format!(
                    "Its maker says the following; `verify` checks it.\n{}\n{}\n{} bytes of proof, {} of public inputs",
                    words(&proof.statement),
                    about_words(&proof),
                    (proof.proof.len().saturating_sub(2)) / 2,
                    (proof.public_inputs.len().saturating_sub(2)) / 2,
                );
                Ok(print(json, &json!(proof), text)?)
            }
            Action::Save { job, out, shared } => save(&shared, job, &out, json),
            Action::Contract { statement, out, shared } => contract(&shared, &statement, &out, json),
        }
    }
}

fn ls(shared: &Shared, json: bool) -> Result<(), Failure> {
    let config = shared.prepare(json)?;
    let known = shared.with_provers(&config, async |running| {
        let mut known = Vec::new();
        for one in running {
            for statement in &one.statements {
                let estimate = one.alone.client.estimate(&cx(), statement.id.clone()).await.map_err(|error| of_plugin(&error))?;
                known.push((one.plugin.clone(), statement.clone(), estimate));
            }
        }
        Ok(known)
    })?;
    let lines: Vec<String> = known.iter().map(|(plugin, statement, estimate)| told(plugin, statement, estimate)).collect();
    let values: Vec<_> = known
        .iter()
        .map(|(plugin, statement, estimate)| json!({ "plugin": plugin, "statement": statement, "estimate": estimate }))
        .collect();
    Ok(print(json, &json!({ "statements": values }), lines.join("\n\n"))?)
}

fn save(shared: &Shared, id: JobId, out: &Path, json: bool) -> Result<(), Failure> {
    let config = shared.prepare(json)?;
    let known = match journal::look(&config.node.data_dir)? {
        Some(journal) => journal::jobs::row(&journal, id)?,
        None => None,
    };
    let proof = known.and_then(|row| row.proof).ok_or_else(|| {
        let message = format!("this node has made no proof for job {id}: `fabstir-node jobs` lists what it has worked on");
        Failure::new(Failure::FAILED, "nothing", message)
    })?;
    let file = shared.with_provers(&config, async |running| {
        // Its words are those of its statement, as long as that has the same keys.
        let (_, statement) = prover_of(running, &proof.statement)?;
        match statement.program.as_ref() == Some(&proof.program) {
            true => Ok(ProofFile::of(statement.clone(), proof.clone())),
            false => {
                let message = format!("the keys of `{}` are others than those of the proof for job {id}", statement.id);
                Err(Failure::new(Failure::FAILED, "other_keys", message))
            }
        }
    })?;
    write(out, &file)?;
    let text = format!("{} holds the proof for job {id}.\n{}", out.display(), words(&file.statement));
    Ok(print(json, &json!(file), text)?)
}

fn contract(shared: &Shared, id: &str, out: &Path, json: bool) -> Result<(), Failure> {
    let config = shared.prepare(json)?;
    let (statement, contract) = shared.with_provers(&config, async |running| {
        let (prover, statement) = prover_of(running, id)?;
        let statement = match statement.program {
            Some(_) => statement.clone(),
            None => proving::make(&*prover.alone.client, &statement.id).await.map_err(|error| of_plugin(&error))?,
        };
        let contract = prover.alone.client.verifier(&cx(), statement.id.clone()).await.map_err(|error| match error.code {
            Code::Unimplemented => {
                let message = format!("no contract can check proofs of `{id}`: {} makes none", prover.plugin);
                Failure::new(Failure::FAILED, "no_contract", message)
            }
            _ => of_plugin(&error),
        })?;
        Ok((statement, contract))
    })?;
    let creation: Vec<String> = contract.creation.iter().map(|code| format!("0x{}", hex::encode(code))).collect();
    let says = format!("{} It leaves open: {} It trusts: {}", statement.says, statement.leaves_open, statement.trusts);
    let value = json!({
        "name": contract.name, "kind": statement.kind.number(), "program": statement.program, "statement": says, "creation": creation,
        "is_development": statement.is_development,
    });
    write(out, &value)?;
    let text = format!("{} holds the contract {} for proofs of `{}`", out.display(), contract.name, statement.id);
    Ok(print(json, &value, text)?)
}

fn kind_word(kind: ProofKind) -> String {
    json!(kind).as_str().unwrap_or("unknown").to_owned()
}

/// What a statement is, in words.
fn words(statement: &Statement) -> String {
    let set_up = match statement.is_development {
        true => "for development: whoever made the keys could forge proofs",
        false => "as the statement says under trusts",
    };
    let mut rows = vec![
        ["statement".to_owned(), format!("{} ({}, {})", statement.id, kind_word(statement.kind), statement.system)],
        ["program".into(), statement.program.clone().unwrap_or_else(|| "none yet: `proof prepare` makes its keys".into())],
        ["says".into(), statement.says.clone()],
        ["leaves open".into(), statement.leaves_open.clone()],
        ["trusts".into(), statement.trusts.clone()],
        ["set-up".into(), set_up.into()],
    ];
    rows.extend(statement.model.as_ref().map(|model| ["model".into(), model.clone()]));
    table(&rows)
}

fn told(plugin: &str, statement: &Statement, estimate: &Estimate) -> String {
    let ms = |ms: Option<u64>| ms.map_or("not measured here yet".into(), |ms| format!("{:.1} CPU seconds", ms as f64 / 1000.0));
    let takes = format!("{} to prove, {} to prepare", ms(estimate.prove_cpu_ms), ms(estimate.prepare_cpu_ms));
    format!("{}\n{}", words(statement), table(&[["takes      ".into(), takes], ["plugin".into(), plugin.to_owned()]]))
}

/// What a proof is about, in words.
fn about_words(file: &ProofFile) -> String {
    let About { subject, job, model, input, output } = &file.about;
    let about = job.map_or("no posted job".to_owned(), |job| format!("job {job}"));
    let mut rows = vec![
        ["about      ".to_owned(), format!("{about}, subject {subject}")],
        ["model".into(), model.clone()],
        ["input".into(), input.clone()],
        ["output".into(), output.clone()],
    ];
    rows.extend(match &file.claim {
        Claim::Answer { trace, tokens, draw } => {
            Some(["claim".into(), format!("at positions that {draw} draws, of {tokens} tokens under the root {trace}")])
        }
        Claim::Outputs { outputs, .. } => Some(["claim".into(), format!("outputs {outputs:?}")]),
        Claim::None | Claim::Unknown => None,
    });
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_is_of_all_three_and_fits_every_field() {
        let one = subject("a", "b", "c");
        assert!(one.starts_with("0x00") && one.len() == 66);
        for other in [subject("x", "b", "c"), subject("a", "x", "c"), subject("a", "b", "x"), subject("ab", "", "c")] {
            assert_ne!(one, other);
        }
    }

    /// A change of a proof, and the word for what is not the job's then.
    type Change = (&'static str, fn(&mut Proof));

    #[test]
    fn a_proof_is_a_jobs_only_with_all_that_the_chain_has_of_it() {
        let word = |digit: &str| format!("0x{}", digit.repeat(64));
        let about = About { subject: word("1"), job: Some(7), model: "2".repeat(64), input: word("3"), output: word("4") };
        let claim = Claim::Answer { trace: word("6"), tokens: 9, draw: word("7") };
        let proof = Proof {
            statement: "output-head:tiny".into(),
            system: "groth16-bn254".into(),
            program: word("5"),
            about,
            claim,
            public_inputs: vec![],
            proof: vec![],
        };
        let mut row = crate::market::seller::jobs::example(7);
        (row.terms.model, row.terms.program, row.terms.proof_kind) = (word("2"), word("5"), 2);
        let job = Posting {
            client: row.client,
            terms: row.terms,
            input_commitment: word("3"),
            state: fabstir_plugin_api::chain::JobState::Proven,
            host: None,
            until_s: None,
            attempts: 1,
            proven: true,
        };
        let result = JobResult {
            output_commitment: word("4"),
            trace: Some(word("6")),
            input_tokens: 1,
            output_tokens: 9,
            result_ref: String::new(),
        };
        let mut delivered = Delivered { id: 7, subject: word("1"), job, model: word("2"), result, draw: Some(word("7")) };
        assert_eq!(delivered.differs(&proof), None);
        fn claim_of(proof: &mut Proof, change: impl FnOnce(&mut Hash32, &mut u32, &mut Hash32)) {
            let Claim::Answer { trace, tokens, draw } = &mut proof.claim else { unreachable!("it is one") };
            change(trace, tokens, draw);
        }
        // A maker who chooses the draw, or makes a tree of one leaf, proves what is easy.
        let changes: [Change; 8] = [
            ("job", |proof| proof.about.job = Some(9)),
            ("subject", |proof| proof.about.subject = "0x".into()),
            ("input", |proof| proof.about.input = "0x".into()),
            ("output", |proof| proof.about.output = "0x".into()),
            ("program", |proof| proof.program = "0x".into()),
            ("trace", |proof| claim_of(proof, |trace, _, _| *trace = "0x".into())),
            ("number of tokens", |proof| claim_of(proof, |_, tokens, _| *tokens = 1)),
            ("draw", |proof| claim_of(proof, |_, _, draw| *draw = "0x".into())),
        ];
        for (what, change) in changes {
            let mut other = proof.clone();
            change(&mut other);
            assert!(delivered.differs(&other).is_some_and(|why| why.contains(what)), "{what}");
        }
        delivered.model = word("8");
        assert!(delivered.differs(&proof).is_some_and(|why| why.contains("model")));
        (delivered.model, delivered.result.trace, delivered.draw) = (word("2"), None, None);
        assert!(delivered.differs(&proof).is_some_and(|why| why.contains("trace")), "its job has none");
    }

    #[test]
    fn a_file_gives_back_the_proof_that_went_in() {
        let word = |digit: &str| format!("0x{}", digit.repeat(64));
        let about = About { subject: word("1"), job: Some(7), model: "2".repeat(64), input: word("3"), output: word("4") };
        let proof = Proof {
            statement: "commitment".into(),
            system: "groth16-bn254".into(),
            program: word("5"),
            about,
            claim: Claim::None,
            public_inputs: vec![1, 2],
            proof: vec![0, 255],
        };
        let statement = Statement {
            id: "commitment".into(),
            kind: ProofKind::Commitment,
            system: "groth16-bn254".into(),
            program: None,
            model: None,
            says: "s".into(),
            leaves_open: "l".into(),
            trusts: "t".into(),
            is_development: true,
        };
        let file = ProofFile::of(statement, proof.clone());
        let text = serde_json::to_string(&file).expect("JSON");
        let mut back: ProofFile = serde_json::from_str(&text).expect("reads back");
        assert_eq!(back.proof(Path::new("f")).expect("is whole"), proof);
        back.proof = "0x0".into();
        assert!(back.proof(Path::new("f")).is_err());
    }
}
