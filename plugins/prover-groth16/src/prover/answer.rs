//! Whole answers: their trace, and what is proven of them at positions that a later block draws.

use std::sync::Arc;

use ark_bn254::Fr;
use fabstir_plugin_api::prelude::*;

use crate::error::Error;
use crate::groth16::{self, PreparedKey};
use crate::head::{Head, State};
use crate::statement::{Known, Ready, Subject, check_answer, choose, read_head};
use crate::trace::{self, Leaf, Opening};
use crate::wire::{self, Word, word_of};

use super::Ended;

/// An answer of which every token could be proven.
pub struct Answer {
    head: Arc<Head>,
    states: Vec<State>,
    leaves: Vec<Leaf>,
    root: Word,
}

impl Answer {
    /// # Errors
    /// `Task` where it is none of the statement's model, and where at some position there is no proof. `Ended`.
    pub fn read(known: &Known, tokens: &[u32], states: &[Vec<f32>], ended: Ended<'_>) -> Result<Self, Error> {
        let Subject::Head { model, hash, .. } = &known.subject else {
            return Err(Error::Task("a commitment is about no states: ask an output head".into()));
        };
        check_answer(model, tokens, states).map_err(Error::Task)?;
        let head = Arc::new(read_head(model, hash)?);
        let states: Vec<State> = states.iter().map(|values| State::round(values, model.width)).collect::<Result<_, _>>()?;
        let mut leaves = Vec::with_capacity(tokens.len());
        for (position, (token, state)) in (0..).zip(tokens.iter().zip(&states)) {
            if ended() {
                return Err(Error::Ended);
            }
            choose(&head, position, *token, state)?;
            leaves.push(Leaf { position, token: *token, state: wire::word(state.commitment()) });
        }
        let root = trace::root(&leaves).ok_or_else(|| Error::Task("the answer has no token".into()))?;
        Ok(Self { head, states, leaves, root })
    }

    pub fn tokens(&self) -> u32 {
        self.leaves.len() as u32
    }

    pub fn root(&self) -> Word {
        self.root
    }

    /// The circuit at a position that was drawn.
    pub fn ready(&self, subject: Fr, position: u32) -> Ready {
        let at = position as usize;
        let (token, state) = (self.leaves[at].token, self.states[at].clone());
        Ready::Choice { head: self.head.clone(), subject, position, token, state }
    }

    pub fn opening(&self, position: u32, proof: Vec<u8>) -> Result<Opening, Error> {
        let path = trace::path(&self.leaves, position).ok_or_else(|| Error::Internal("a drawn position has no leaf".into()))?;
        Ok(Opening { leaf: self.leaves[position as usize], path, proof })
    }

    pub fn claim(&self, draw: &Word) -> Claim {
        Claim::Answer { trace: wire::hash_text(&self.root), tokens: self.tokens(), draw: wire::hash_text(draw) }
    }
}

/// As `HeadVerifier` takes them: the subject, and the number of the job.
pub fn public_inputs(subject: &Word, job: Option<u64>) -> Vec<u8> {
    [*subject, word_of(job.unwrap_or(0))].concat()
}

/// Checks a proof of an answer.
///
/// # Errors
/// Why it does not hold.
pub fn check(known: &Known, key: &PreparedKey, samples: u32, proof: &Proof) -> Result<(), String> {
    let Claim::Answer { trace: root, tokens, draw } = &proof.claim else {
        return Err("the claim is not one of this statement's".into());
    };
    let subject = known.subject_of(&proof.about)?;
    let word = wire::word(subject);
    let (root, draw) =
        wire::hash(root).zip(wire::hash(draw)).ok_or("trace and draw are `0x` and 64 lower-case hexadecimal digits each")?;
    if proof.public_inputs != public_inputs(&word, proof.about.job) {
        return Err("its public inputs are not those of what it says".into());
    }
    let openings = trace::decode(&proof.proof, samples as usize)
        .ok_or_else(|| format!("it is not {samples} openings as the contract takes them"))?;
    let positions = trace::draw(&draw, &word, samples, *tokens);
    if positions.is_empty() || !positions.iter().eq(openings.iter().map(|opening| &opening.leaf.position)) {
        return Err(format!("it does not open the {samples} positions that were drawn"));
    }
    for Opening { leaf, path, proof } in &openings {
        if !trace::leads(leaf, path, u64::from(*tokens), &root) {
            return Err(format!("position {} does not lead to the trace", leaf.position));
        }
        let state = wire::input(&leaf.state).ok_or("a state's commitment is no number of the field")?;
        let inputs = [subject, leaf.position.into(), leaf.token.into(), state];
        if !wire::proof(proof).is_some_and(|proof| groth16::holds(key, &inputs, &proof)) {
            return Err(format!("position {} is not proven", leaf.position));
        }
    }
    Ok(())
}
