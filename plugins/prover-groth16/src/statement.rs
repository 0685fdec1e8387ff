//! What can be proven, and how a task or a claim becomes public inputs.

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
    Head { model: Model, digest: String },
}

/// A task that is one of the statement's, before anything costly is done.
pub enum Asked {
    Receipt(Receipt),
    Choice { subject: Fr, position: u32, token: u32, values: Vec<f32> },
}

impl Known {
    pub fn commitment() -> Self {
        Self { id: "commitment".into(), circuit: circuit(commitment::CIRCUIT, &[]), subject: Subject::Commitment }
    }

    /// Reads the model's header and its head, and its whole file where the configuration does not give its digest.
    pub fn head(config: &ModelConfig) -> Result<Self, Error> {
        let model = Model::read(&config.path)?;
        let circuit = circuit(head::CIRCUIT, &model.head_hash()?);
        let digest = config.digest.clone().map_or_else(|| model.digest(), Ok)?;
        Ok(Self { id: format!("output-head:{}", config.name), circuit, subject: Subject::Head { model, digest } })
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
                              is a receipt that cannot be moved to another subject."
                    .into(),
                trusts: format!("{TRUSTS}."),
                is_development: true,
            },
            Subject::Head { model, digest } => Statement {
                id: self.id.clone(),
                kind: ProofKind::OutputHead,
                system,
                program,
                model: Some(digest.clone()),
                says: format!(
                    "At the stated position, the token is the first with the largest logit that the model's output head, {} x {} and rounded to 16 \
                     bits, gives for the state of {} numbers of 16 bits behind the stated commitment.",
                    model.tokens, model.width, model.width
                ),
                leaves_open: "Where the state came from: the layers below the head, the prompt and the tokens before are not part of it. Positions that \
                              were not drawn. Tokens that were sampled rather than chosen as the likeliest, and those few where rounding changes which \
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
            (Subject::Head { model, digest }, Witness::State { position, values, token }) => {
                same_model(digest, &task.about).map_err(refuse)?;
                if values.len() != model.width {
                    return Err(Error::Task(format!(
                        "the state has {} values, those of this model have {}",
                        values.len(),
                        model.width
                    )));
                }
                if *token as usize >= model.tokens {
                    return Err(Error::Task(format!(
                        "no proof of it exists: the model has {} tokens, and no token {token}",
                        model.tokens
                    )));
                }
                Ok(Asked::Choice { subject: about.subject, position: *position, token: *token, values: values.clone() })
            }
            (Subject::Commitment, _) => Err(Error::Task("a commitment is proven without a witness: send `none`".into())),
            (Subject::Head { .. }, _) => Err(Error::Task("an output head is proven from a state: send `state`".into())),
        }
    }

    /// The public inputs of a claim.
    ///
    /// # Errors
    /// Why no proof with this claim can hold.
    pub fn inputs(&self, about: &About, claim: &Claim) -> Result<Vec<Fr>, String> {
        let words = Words::of(about)?;
        match (&self.subject, claim) {
            (Subject::Commitment, Claim::None) => Ok(words.receipt().inputs().to_vec()),
            (Subject::Head { digest, .. }, Claim::Token { position, token, state }) => {
                same_model(digest, about)?;
                let state = wire::hash(state)
                    .and_then(|state| wire::input(&state))
                    .ok_or("the state's commitment is no number of the field")?;
                Ok(vec![words.subject, (*position).into(), (*token).into(), state])
            }
            _ => Err("the claim is not one of this statement's".into()),
        }
    }
}

fn circuit(revision: &str, head: &[u8]) -> Word {
    let mut hasher = blake3::Hasher::new_derive_key("fabstir prover-groth16 circuit");
    hasher.update(revision.as_bytes()).update(head);
    hasher.finalize().into()
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
    Choice { head: Head, subject: Fr, position: u32, token: u32, state: State },
}

impl Ready {
    /// The circuit of a statement without anything to prove, for its keys.
    pub fn empty(known: &Known) -> Result<Self, Error> {
        Ok(match &known.subject {
            Subject::Commitment => Self::Receipt(Receipt::new(Fr::from(0u8), &[0; 32], &[0; 32], &[0; 32])),
            Subject::Head { model, .. } => {
                let state = State::empty(model.width);
                Self::Choice { head: read_head(model)?, subject: Fr::from(0u8), position: 0, token: 0, state }
            }
        })
    }

    /// The circuit of a task.
    ///
    /// # Errors
    /// `Task` when what it states is not true.
    pub fn of(known: &Known, asked: Asked) -> Result<Self, Error> {
        match (&known.subject, asked) {
            (Subject::Commitment, Asked::Receipt(receipt)) => Ok(Self::Receipt(receipt)),
            (Subject::Head { model, .. }, Asked::Choice { subject, position, token, values }) => {
                let head = read_head(model)?;
                let state = State::round(&values, head.width())?;
                let (best, logits) = head.argmax(&state);
                if best != token {
                    return Err(Error::Task(format!(
                        "no proof of it exists: at position {position} the rounded head gives token {best} the logit {} and token {token} {}",
                        logits[best as usize], logits[token as usize]
                    )));
                }
                Ok(Self::Choice { head, subject, position, token, state })
            }
            _ => Err(Error::Internal("a task was read for another statement".into())),
        }
    }

    pub fn inputs(&self) -> Vec<Fr> {
        match self {
            Self::Receipt(receipt) => receipt.inputs().to_vec(),
            Self::Choice { subject, position, token, state, .. } => {
                vec![*subject, (*position).into(), (*token).into(), state.commitment()]
            }
        }
    }

    pub fn claim(&self) -> Claim {
        match self {
            Self::Receipt(_) => Claim::None,
            Self::Choice { position, token, state, .. } => {
                Claim::Token { position: *position, token: *token, state: wire::hash_text(&wire::word(state.commitment())) }
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

fn read_head(model: &Model) -> Result<Head, Error> {
    Head::round(model.width, &model.weights()?).map_err(|reason| model.refused(reason))
}
