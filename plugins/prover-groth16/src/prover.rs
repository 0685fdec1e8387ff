//! The work itself, in plain blocking Rust: keys, proofs, checks, contracts.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ark_bn254::Fr;
use fabstir_plugin_api::prelude::*;
use tracing::{info, warn};

use crate::config::Config;
use crate::contract;
use crate::error::Error;
use crate::groth16::{self, PreparedKey, ProvingKey};
use crate::statement::{Asked, Circuit, Known, Ready, SYSTEM, Subject};
use crate::store::{Measured, Store, Took};
use crate::trace;
use crate::wire::{self, Word};
use crate::work::Work;

mod answer;

use answer::Answer;

/// Everything that an instance can prove.
pub struct Prover {
    known: Vec<Known>,
    /// The verifying keys that were read, in order of `known`.
    keys: Mutex<Vec<Option<Arc<Keys>>>>,
    store: Store,
    threads: usize,
    samples: u32,
    max_memory: u64,
}

/// What proofs are checked with.
pub struct Keys {
    /// As statements and proofs name it.
    pub program: Word,
    /// That of the keys alone.
    key_program: Word,
    pub key: PreparedKey,
}

/// One statement: its place in the list.
#[derive(Clone, Copy)]
pub struct Place(usize);

/// What hears of the work: what is done, how many percent, and how many milliseconds are left.
pub type Told<'a> = &'a (dyn Fn(Stage) + Sync);

/// Says whether nobody waits for the work any more.
pub type Ended<'a> = &'a (dyn Fn() -> bool + Sync);

impl Prover {
    /// Reads the models' heads, and the keys that are kept. Keys that are damaged are no error yet: `prepare` says so.
    pub fn open(config: &Config, store: Store) -> Result<Self, Error> {
        let mut known = vec![Known::commitment()];
        for model in &config.models {
            known.push(Known::head(model)?);
        }
        let keys = Mutex::new(known.iter().map(|_| None).collect());
        let prover = Self {
            known,
            keys,
            store,
            threads: config.threads as usize,
            samples: config.samples,
            max_memory: config.max_memory_mib << 20,
        };
        for at in 0..prover.known.len() {
            if let Err(error) = prover.keys(Place(at)) {
                warn!(statement = %prover.known[at].id, %error, "Keys cannot be used: prepare the statement.");
            }
        }
        Ok(prover)
    }

    pub fn statements(&self) -> Vec<Statement> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let program = |at: usize| keys[at].as_ref().map(|keys| &keys.program);
        self.known.iter().enumerate().map(|(at, known)| known.statement(program(at))).collect()
    }

    pub fn place(&self, statement: &str) -> Result<Place, Error> {
        let at = self.known.iter().position(|known| known.id == statement);
        let names = || self.known.iter().map(|known| format!("`{}`", known.id)).collect::<Vec<_>>().join(", ");
        at.map(Place).ok_or_else(|| Error::NoStatement { asked: statement.to_owned(), known: names() })
    }

    fn known(&self, place: Place) -> &Known {
        &self.known[place.0]
    }

    pub fn read(&self, place: Place, task: &Task) -> Result<Asked, Error> {
        self.known(place).read(task)
    }

    /// The keys for checking, if there are keys: from memory, or from the disk.
    fn keys(&self, place: Place) -> Result<Option<Arc<Keys>>, Error> {
        let mut all = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if all[place.0].is_none()
            && let Some(key) = self.store.verifying(&self.known(place).circuit)?
        {
            let key_program = wire::program(&key);
            let program = self.known(place).program(&key_program, self.samples);
            all[place.0] = Some(Arc::new(Keys { program, key_program, key: key.into() }));
        }
        Ok(all[place.0].clone())
    }

    /// Makes keys where there are none, checks those that are there, measures a proof where none was made yet, and gives the statement.
    pub fn prepare(&self, place: Place, told: Told<'_>, ended: Ended<'_>) -> Result<Statement, Error> {
        let known = self.known(place);
        self.forget(place);
        let checked = self.keys(place).and_then(|keys| match keys {
            Some(keys) => self.store.proving(&known.circuit, &keys.key_program).map(|_| true),
            None => Ok(false),
        });
        let there = checked.map_err(|error| {
            self.forget(place);
            self.store.set_aside(&known.circuit, error)
        })?;
        if !there {
            self.set_up(place, told, ended)?;
        }
        let keys = self.prepared(place)?;
        if self.store.measured(&known.circuit).prove.is_none() {
            let ready = Ready::example(known)?;
            let (_, took) = self.timed(None, told, ended, |work| {
                let key = self.store.proving(&known.circuit, &keys.key_program)?;
                proven(&keys.key, &ready, &key, work, ended)
            })?;
            self.note(known, Measured { prove: Some(took), ..self.store.measured(&known.circuit) });
        }
        Ok(known.statement(Some(&keys.program)))
    }

    fn forget(&self, place: Place) {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)[place.0] = None;
    }

    fn prepared(&self, place: Place) -> Result<Arc<Keys>, Error> {
        self.keys(place)?.ok_or_else(|| Error::NotPrepared(self.known(place).id.clone()))
    }

    fn set_up(&self, place: Place, told: Told<'_>, ended: Ended<'_>) -> Result<(), Error> {
        let known = self.known(place);
        self.room(known)?;
        let measured = self.store.measured(&known.circuit);
        let (key, took) = self.timed(measured.prepare, told, ended, |work| {
            let ready = Ready::empty(known)?;
            groth16::set_up(Circuit { ready: &ready, ended }, work)
        })?;
        self.store.keep(&known.circuit, &key)?;
        info!(statement = %known.id, program = %wire::hash_text(&wire::program(&key.vk)), cpu_ms = took.cpu_ms, "Keys were made.");
        self.note(known, Measured { prepare: Some(took), ..measured });
        Ok(())
    }

    /// Proves, and checks what it has made.
    pub fn prove(&self, place: Place, about: About, asked: Asked, told: Told<'_>, ended: Ended<'_>) -> Result<Proof, Error> {
        let known = self.known(place);
        self.room(known)?;
        // What is not true is refused before keys are made for it.
        let answer = match &asked {
            Asked::Receipt(_) => None,
            Asked::Answer { tokens, states, .. } => Some(Answer::read(known, tokens, states, ended)?),
        };
        if self.keys(place)?.is_none() {
            self.set_up(place, told, ended)?;
        }
        let keys = self.prepared(place)?;
        let before = self.store.measured(&known.circuit).prove.map(|took| took.times(self.proofs(known)));
        let ((claim, public_inputs, proof), took) = self.timed(before, told, ended, |work| {
            (told)(Stage { doing: "reading the keys".into(), percent: Some(0), left_ms: before.map(|took| took.wall_ms) });
            let key = self.store.proving(&known.circuit, &keys.key_program)?;
            let one = |ready: &Ready| proven(&keys.key, ready, &key, work, ended);
            match (asked, answer) {
                (Asked::Answer { subject, job, draw, .. }, Some(answer)) => {
                    let word = wire::word(subject);
                    let positions = trace::draw(&draw, &word, self.samples, answer.tokens());
                    let opened = |position| answer.opening(position, one(&answer.ready(subject, position))?);
                    let openings = positions.into_iter().map(opened).collect::<Result<Vec<_>, _>>()?;
                    Ok((answer.claim(&draw), answer::public_inputs(&word, job), trace::encode(&openings)))
                }
                (Asked::Receipt(receipt), _) => {
                    let ready = Ready::Receipt(receipt);
                    let proof = one(&ready)?;
                    Ok((Claim::None, words(&ready.inputs()), proof))
                }
                (Asked::Answer { .. }, None) => Err(Error::Internal("an answer was not read".into())),
            }
        })?;
        let took = took.shared(self.proofs(known));
        self.note(known, Measured { prove: Some(took), ..self.store.measured(&known.circuit) });
        Ok(Proof {
            statement: known.id.clone(),
            system: SYSTEM.into(),
            program: wire::hash_text(&keys.program),
            about,
            claim,
            public_inputs,
            proof,
        })
    }

    /// How many proofs of the circuit a proof of the statement is.
    fn proofs(&self, known: &Known) -> u64 {
        match &known.subject {
            Subject::Commitment => 1,
            Subject::Head { .. } => self.samples.into(),
        }
    }

    pub fn verify(&self, place: Place, proof: &Proof) -> Result<Verdict, Error> {
        let known = self.known(place);
        let keys = self.keys(place)?;
        let has = keys.as_ref().map_or("none yet".into(), |keys| wire::hash_text(&keys.program));
        let Some(keys) = keys.filter(|_| proof.program == has) else {
            return Err(Error::NoProgram { statement: known.id.clone(), program: proof.program.clone(), has });
        };
        let checked = match (&known.subject, &proof.claim) {
            _ if proof.system != SYSTEM => Err(format!("it is a proof of another system than {SYSTEM}")),
            (Subject::Commitment, Claim::None) => receipt(known, &keys.key, proof),
            (Subject::Head { .. }, Claim::Answer { .. }) => answer::check(known, &keys.key, self.samples, proof),
            _ => Err("the claim is not one of this statement's".into()),
        };
        Ok(Verdict { holds: checked.is_ok(), why: checked.err() })
    }

    /// The root over an answer, if all of it could be proven.
    pub fn trace(&self, place: Place, tokens: &[u32], states: &[Vec<f32>], ended: Ended<'_>) -> Result<Hash32, Error> {
        Ok(wire::hash_text(&Answer::read(self.known(place), tokens, states, ended)?.root()))
    }

    pub fn estimate(&self, place: Place) -> Estimate {
        let known = self.known(place);
        let measured = self.store.measured(&known.circuit);
        let prepared = matches!(self.keys(place), Ok(Some(_)));
        Estimate {
            prepare_cpu_ms: if prepared { Some(0) } else { measured.prepare.map(|took| took.cpu_ms) },
            prove_cpu_ms: measured.prove.map(|took| took.times(self.proofs(known)).cpu_ms),
            memory: measured.prove.and_then(|took| took.memory),
            // That of an answer grows with its tokens, by the paths to them.
            proof_bytes: matches!(known.subject, Subject::Commitment).then_some(wire::PROOF_BYTES as u64),
        }
    }

    pub fn verifier(&self, place: Place) -> Result<Contract, Error> {
        let keys = self.prepared(place)?;
        contract::of(&self.known(place).subject, &keys.key.vk, self.samples)
    }

    /// Refuses work that needs more memory than it may have.
    fn room(&self, known: &Known) -> Result<(), Error> {
        let needed = known.memory();
        if needed <= self.max_memory {
            return Ok(());
        }
        let what = match &known.subject {
            Subject::Commitment => known.id.clone(),
            Subject::Head { model, .. } => format!("`{}`, whose head is {} x {},", known.id, model.tokens, model.width),
        };
        Err(Error::Memory { what, needed_mib: needed.div_ceil(1 << 20), allowed_mib: self.max_memory >> 20 })
    }

    /// Does work, tells of it, and measures it.
    fn timed<T>(
        &self,
        before: Option<Took>,
        told: Told<'_>,
        ended: Ended<'_>,
        work: impl FnOnce(&Work<'_>) -> Result<T, Error>,
    ) -> Result<(T, Took), Error> {
        let began = Instant::now();
        let left = || before.map(|took| took.wall_ms.saturating_sub(began.elapsed().as_millis() as u64));
        let step =
            |doing: &'static str, percent: u8| told(Stage { doing: doing.into(), percent: Some(percent), left_ms: left() });
        let memory = Memory::watch();
        let watched = Work::new(self.threads, ended, &step);
        let made = work(&watched);
        let took = Took { cpu_ms: watched.cpu_ms(), wall_ms: began.elapsed().as_millis() as u64, memory: memory.grown() };
        give_back();
        Ok((made?, took))
    }

    fn note(&self, known: &Known, measured: Measured) {
        if let Err(error) = self.store.measure(&known.circuit, &measured) {
            warn!(statement = %known.id, %error, "What the work took could not be noted.");
        }
    }
}

/// A proof, in bytes, that holds.
fn proven(key: &PreparedKey, ready: &Ready, proving: &ProvingKey, work: &Work<'_>, ended: Ended<'_>) -> Result<Vec<u8>, Error> {
    let proof = wire::proof_bytes(&groth16::prove(Circuit { ready, ended }, proving, work)?);
    work.check()?;
    match wire::proof(&proof).is_some_and(|proof| groth16::holds(key, &ready.inputs(), &proof)) {
        true => Ok(proof),
        false => Err(Error::Internal("the proof that was made does not hold: it is not handed out".into())),
    }
}

fn words(inputs: &[Fr]) -> Vec<u8> {
    inputs.iter().flat_map(|input| wire::word(*input)).collect()
}

/// Checks a proof of a commitment.
///
/// # Errors
/// Why it does not hold.
fn receipt(known: &Known, key: &PreparedKey, proof: &Proof) -> Result<(), String> {
    let inputs = known.receipt(&proof.about)?.inputs();
    if words(&inputs) != proof.public_inputs {
        return Err("its public inputs are not those of what it says".into());
    }
    let points = wire::proof(&proof.proof).ok_or("it is not three points of the curve in 256 bytes")?;
    match groth16::holds(key, &inputs, &points) {
        true => Ok(()),
        false => Err("it does not prove this".into()),
    }
}

/// The process's memory, watched for its peak.
struct Memory(Option<u64>);

impl Memory {
    fn watch() -> Self {
        give_back();
        // 5 resets the peak to the present; where that is not allowed, nothing is known.
        let reset = fs::write("/proc/self/clear_refs", "5").ok();
        Self(reset.and_then(|()| status("VmRSS:")))
    }

    fn grown(&self) -> Option<u64> {
        Some(status("VmHWM:")?.saturating_sub(self.0?))
    }
}

/// Gives the memory of work that has ended back to the system, which the allocator would keep for each thread.
fn give_back() {
    // SAFETY: it touches nothing that is in use, and may be called from any thread.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// A line of the process's status, in bytes.
fn status(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests;
