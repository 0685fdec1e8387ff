//! What can be proven, and how a task or a claim becomes public inputs.

use std::sync::Arc;

use ark_bn254::Fr;
use ark_relations::gr1cs::{ConstraintSynthesizer, ConstraintSystemRef, SynthesisError};
use fabstir_plugin_api::prelude::*;

use crate::commitment::{self, Receipt};
use crate::config::ModelConfig;
use crate::error::Error;
use crate::gguf::Model;
use crate::head::{self, Choice, Head, State};
use crate::wire::{self, Word};

/// The proof system, as statements and proofs name it.
pub const SYSTEM: &str = "groth16-bn254";

const TRUSTS: &str = "Whoever made the keys: they were made by one node alone from its own randomness, and who kept that randomness can prove \
                      anything. Then Groth16 over BN254 and the Poseidon hash";

/// A statement before its keys.
pub struct Known {
    pub id: String,
    /// What its circuit is: keys lie under this, and belong to nothing else.
    pub circuit: Word,
    pub subject: Subject,
}

pub enum Subject {
    Commitment,
    /// `hash` is that of the head's bytes, as they were when `circuit` was made from it.
    Head {
        model: Model,
        digest: String,
        hash: Word,
    },
}

/// A task that is one of the statement's, before anything costly is done.
pub enum Asked {
    Receipt(Receipt),
    Answer { subject: Fr, job: Option<u64>, tokens: Vec<u32>, states: Vec<Vec<f32>>, draw: Word },
}

impl Known {
    pub fn commitment() -> Self {
        Self { id: "commitment".into(), circuit: circuit(commitment::CIRCUIT, &[]), subject: Subject::Commitment }
    }

    /// Reads the model's header and its head, and its whole file where the configuration does not give its digest.
    pub fn head(config: &ModelConfig) -> Result<Self, Error> {
        let model = Model::read(&config.path)?;
        let hash = model.head_hash()?;
        let circuit = circuit(head::CIRCUIT, &hash);
        let digest = config.digest.clone().map_or_else(|| model.digest(), Ok)?;
        Ok(Self { id: format!("output-head:{}", config.name), circuit, subject: Subject::Head { model, digest, hash } })
    }

    /// The statement as the node and its clients read it.
    pub fn statement(&self, program: Option<&Word>) -> Statement {
        let program = program.map(wire::hash_text);
        let system = SYSTEM.to_owned();
        match &self.subject {
            Subject::Commitment => Statement {
                id: self.id.clone(),
                kind: ProofKind::Commitment,
                system,
                program,
                model: None,
                says: "Whoever made the proof knew the digests of model, input and output that the commitment C is the Poseidon hash of, together \
                       with the subject."
                    .into(),
                leaves_open: "That any inference ran, that the output came from the model or the input, and that bytes with these digests exist: it \
                              is a receipt that cannot be moved to another subject. On a chain only the subject is compared: C is the prover's own there."
                    .into(),
                trusts: format!("{TRUSTS}."),
                is_development: true,
            },
            Subject::Head { model, digest, .. } => Statement {
                id: self.id.clone(),
                kind: ProofKind::OutputHead,
                system,
                program,
                model: Some(digest.clone()),
                says: format!(
                    "At each position that the draw gives, the token that the trace has there is the first with the largest logit that the output \
                     head of the model {digest}, {} x {} and rounded to 16 bits, gives for the state of {} numbers of 16 bits whose commitment the \
                     trace has there.",
                    model.tokens, model.width, model.width
                ),
                leaves_open: "Where the states came from: nothing ties them to the input, to the layers below the head or to the tokens before, and \
                              nothing ties the tokens to the text of the output. Who makes the trace chooses both, and an answer of its own can be \
                              proven as long as the head gives its tokens for some states. Positions that were not drawn. Tokens that were sampled rather than chosen as the likeliest, and those few where rounding changes which \
                              token that is, have no proof."
                    .into(),
                trusts: format!(
                    "{TRUSTS}. That the program was made from this model's head: making it again needs the model's file, and gives other keys. Where \
                     positions are drawn by a block's hash, whoever makes that block"
                ) + ".",
                is_development: true,
            },
        }
    }

    /// What making keys or proving takes at most, in bytes: an estimate from the size of the circuit.
    pub fn memory(&self) -> u64 {
        match &self.subject {
            Subject::Commitment => 16 << 20,
            Subject::Head { model, .. } => head::memory(model.width, model.tokens),
        }
    }

    /// Holds a task against the statement.
    ///
    /// # Errors
    /// `Task`, with what does not fit.
    pub fn read(&self, task: &Task) -> Result<Asked, Error> {
        let refuse = |reason: String| Error::Task(reason);
        let about = Words::of(&task.about).map_err(refuse)?;
        match (&self.subject, &task.witness) {
            (Subject::Commitment, Witness::None) => Ok(Asked::Receipt(about.receipt())),
            (Subject::Head { model, digest, .. }, Witness::Answer { tokens, states, draw }) => {
                same_model(digest, &task.about).map_err(refuse)?;
                check_answer(model, tokens, states).map_err(refuse)?;
                let draw =
                    wire::hash(draw).ok_or_else(|| refuse("the draw is not `0x` and 64 lower-case hexadecimal digits".into()))?;
                let (tokens, states) = (tokens.clone(), states.clone());
                Ok(Asked::Answer { subject: about.subject, job: task.about.job, tokens, states, draw })
            }
            (Subject::Commitment, _) => Err(Error::Task("a commitment is proven without a witness: send `none`".into())),
            (Subject::Head { .. }, _) => {
                let why = "an output head is proven from an answer and its trace, which a node has of posted jobs: use `job post --proof`";
                Err(Error::Task(why.into()))
            }
        }
    }

    /// The subject of what a proof is about, if that is this statement's model.
    ///
    /// # Errors
    /// Why no proof about it can hold.
    pub fn subject_of(&self, about: &About) -> Result<Fr, String> {
        if let Subject::Head { digest, .. } = &self.subject {
            same_model(digest, about)?;
        }
        Ok(Words::of(about)?.subject)
    }

    /// The public inputs of a commitment.
    ///
    /// # Errors
    /// Why no proof about this can hold.
    pub fn receipt(&self, about: &About) -> Result<Receipt, String> {
        Ok(Words::of(about)?.receipt())
    }

    /// The program that proofs of this statement are by, under keys of this program. Of a head, how many positions are drawn is part of it.
    pub fn program(&self, key_program: &Word, samples: u32) -> Word {
        match &self.subject {
            Subject::Commitment => *key_program,
            Subject::Head { .. } => wire::keccak(&[&key_program[..], &wire::word_of(samples.into())].concat()),
        }
    }
}

fn circuit(revision: &str, head: &[u8]) -> Word {
    let mut hasher = blake3::Hasher::new_derive_key("fabstir prover-groth16 circuit");
    hasher.update(revision.as_bytes()).update(head);
    hasher.finalize().into()
}

/// Whether an answer has one state of the model before each of its tokens, and tokens of the model.
pub fn check_answer(model: &Model, tokens: &[u32], states: &[Vec<f32>]) -> Result<(), String> {
    if tokens.is_empty() || tokens.len() != states.len() {
        return Err(format!(
            "the answer has {} tokens and {} states: one state before each of one token or more",
            tokens.len(),
            states.len()
        ));
    }
    if let Some(values) = states.iter().find(|values| values.len() != model.width) {
        return Err(format!("a state has {} values, those of this model have {}", values.len(), model.width));
    }
    match tokens.iter().find(|token| **token as usize >= model.tokens) {
        Some(token) => Err(format!("no proof of it exists: the model has {} tokens, and no token {token}", model.tokens)),
        None => Ok(()),
    }
}

fn same_model(digest: &str, about: &About) -> Result<(), String> {
    if about.model == digest {
        return Ok(());
    }
    Err(format!("it is about the model {}, and this head is that of {digest}", about.model))
}

/// What a proof is bound to, read.
struct Words {
    subject: Fr,
    raw: [Word; 4],
}

impl Words {
    fn of(about: &About) -> Result<Self, String> {
        let hash = |what: &str, text: &str| {
            wire::hash(text).ok_or(format!("the {what} is not `0x` and 64 lower-case hexadecimal digits"))
        };
        let raw = [
            hash("subject", &about.subject)?,
            wire::hash(&format!("0x{}", about.model)).ok_or("the model's digest has not 64 lower-case hexadecimal digits")?,
            hash("input", &about.input)?,
            hash("output", &about.output)?,
        ];
        if raw[0][0] != 0 {
            return Err("the subject is not below 2^248".into());
        }
        let subject = wire::input(&raw[0]).ok_or("the subject is no number of the field")?;
        Ok(Self { subject, raw })
    }

    fn receipt(&self) -> Receipt {
        Receipt::new(self.subject, &self.raw[1], &self.raw[2], &self.raw[3])
    }
}

/// What is proven: the circuit with what it needs.
pub enum Ready {
    Receipt(Receipt),
    Choice { head: Arc<Head>, subject: Fr, position: u32, token: u32, state: State },
}

impl Ready {
    /// The circuit of a statement without anything to prove, for its keys.
    pub fn empty(known: &Known) -> Result<Self, Error> {
        Ok(match &known.subject {
            Subject::Commitment => Self::Receipt(Receipt::new(Fr::from(0u8), &[0; 32], &[0; 32], &[0; 32])),
            Subject::Head { model, hash, .. } => {
                let state = State::empty(model.width);
                Self::Choice { head: Arc::new(read_head(model, hash)?), subject: Fr::from(0u8), position: 0, token: 0, state }
            }
        })
    }

    /// Something true, about nothing: for how long its proof takes.
    pub fn example(known: &Known) -> Result<Self, Error> {
        Ok(match Self::empty(known)? {
            Self::Choice { head, subject, position, .. } => {
                let state = State::round(&vec![1.0; head.width()], head.width())?;
                let (token, _) = head.argmax(&state);
                Self::Choice { head, subject, position, token, state }
            }
            receipt => receipt,
        })
    }

    pub fn inputs(&self) -> Vec<Fr> {
        match self {
            Self::Receipt(receipt) => receipt.inputs().to_vec(),
            Self::Choice { subject, position, token, state, .. } => {
                vec![*subject, (*position).into(), (*token).into(), state.commitment()]
            }
        }
    }
}

/// A circuit that stops being built when nobody waits for it.
pub struct Circuit<'a> {
    pub ready: &'a Ready,
    pub ended: &'a dyn Fn() -> bool,
}

impl ConstraintSynthesizer<Fr> for Circuit<'_> {
    fn generate_constraints(self, cs: ConstraintSystemRef<Fr>) -> Result<(), SynthesisError> {
        match self.ready {
            Ready::Receipt(receipt) => receipt.generate_constraints(cs),
            Ready::Choice { head, subject, position, token, state } => {
                let (subject, position, token) = (*subject, *position, *token);
                Choice { head, subject, position, token, state, ended: self.ended }.generate_constraints(cs)
            }
        }
    }
}

/// Whether the head chooses this token for this state.
///
/// # Errors
/// `Task`, with both logits, where it chooses another.
pub fn choose(head: &Head, position: u32, token: u32, state: &State) -> Result<(), Error> {
    let (best, logits) = head.argmax(state);
    if best == token {
        return Ok(());
    }
    Err(Error::Task(format!(
        "no proof of it exists: at position {position} the rounded head gives token {best} the logit {} and token {token} {}",
        logits[best as usize], logits[token as usize]
    )))
}

pub fn read_head(model: &Model, hash: &Word) -> Result<Head, Error> {
    Head::round(model.width, &model.weights_of(hash)?).map_err(|reason| model.refused(reason))
}
