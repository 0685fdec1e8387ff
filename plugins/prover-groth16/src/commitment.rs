//! The statement `commitment`: whoever made the proof knew the digests of model, input and output behind a commitment.

use ark_bn254::Fr;
use ark_r1cs_std::alloc::AllocVar;
use ark_r1cs_std::eq::EqGadget;
use ark_r1cs_std::fields::fp::FpVar;
use ark_relations::gr1cs::{ConstraintSynthesizer, ConstraintSystemRef, SynthesisError};

use crate::poseidon;
use crate::wire::Word;

/// What is fixed by the circuit: changed with it, so that keys of another circuit are not taken for its own.
pub const CIRCUIT: &str = "commitment 1";

/// A subject and the digests that it is about.
#[derive(Debug, Clone)]
pub struct Receipt {
    subject: Fr,
    /// Model, input and output, each as two numbers of 128 bits, the higher first.
    halves: [Fr; 6],
}

impl Receipt {
    pub fn new(subject: Fr, model: &Word, input: &Word, output: &Word) -> Self {
        let [m, i, o] = [model, input, output].map(halves);
        Self { subject, halves: [m[0], m[1], i[0], i[1], o[0], o[1]] }
    }

    /// The public inputs: the subject, and the commitment to all seven numbers.
    pub fn inputs(&self) -> [Fr; 2] {
        let numbers = [&[self.subject][..], &self.halves].concat();
        [self.subject, poseidon::hash(&numbers)]
    }
}

fn halves(digest: &Word) -> [Fr; 2] {
    let half = |at: usize| digest[at..at + 16].iter().fold(0, |number: u128, byte| number << 8 | u128::from(*byte));
    [Fr::from(half(0)), Fr::from(half(16))]
}

impl ConstraintSynthesizer<Fr> for &Receipt {
    fn generate_constraints(self, cs: ConstraintSystemRef<Fr>) -> Result<(), SynthesisError> {
        let [subject, commitment] = self.inputs();
        let subject = FpVar::new_input(cs.clone(), || Ok(subject))?;
        let commitment = FpVar::new_input(cs.clone(), || Ok(commitment))?;
        let mut numbers = vec![subject];
        for half in self.halves {
            numbers.push(FpVar::new_witness(cs.clone(), || Ok(half))?);
        }
        poseidon::hash_in(cs, &numbers)?.enforce_equal(&commitment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::groth16::tests::Filled;

    #[test]
    fn the_commitment_binds_all_seven_numbers() {
        let words = [[2; 32], [3; 32], [4; 32]];
        let inputs = |words: &[Word; 3]| Receipt::new(Fr::from(1u8), &words[0], &words[1], &words[2]).inputs();
        let commitment = inputs(&words)[1];
        assert_ne!(Receipt::new(Fr::from(2u8), &words[0], &words[1], &words[2]).inputs()[1], commitment);
        for (which, byte) in (0..3).flat_map(|which| [(which, 0), (which, 15), (which, 16), (which, 31)]) {
            let mut other = words;
            other[which][byte] ^= 1;
            assert_ne!(inputs(&other)[1], commitment, "word {which}, byte {byte}");
        }
        let swapped = [words[1], words[0], words[2]];
        assert_ne!(inputs(&swapped)[1], commitment);
    }

    #[test]
    fn no_variable_can_be_changed() {
        let receipt = Receipt::new(Fr::from(1u8), &[2; 32], &[3; 32], &[4; 32]);
        let mut filled = Filled::of(&receipt);
        assert!(filled.is_satisfied());
        assert_eq!(filled.public, 3);
        assert_eq!(filled.free(), [0usize; 0]);
    }
}
