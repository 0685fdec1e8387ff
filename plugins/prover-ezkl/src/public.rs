//! From what a proof is about and what it claims to its public numbers, and back.

use fabstir_plugin_api::prelude::*;

use crate::circuit::{Circuit, Output, dequantise, quantise, requantise};
use crate::error::EzklError;
use crate::field::{self, Word};

/// What a proof says besides what it is bound to, as numbers.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Claimed {
    /// Poseidon of a model's input.
    pub inputs: Option<Word>,
    pub outputs: Vec<Word>,
}

impl Claimed {
    /// Reads a claim.
    ///
    /// # Errors
    /// A sentence, where it is none that this circuit can make.
    pub fn read(circuit: &Circuit, outputs: &[Output], claim: &Claim) -> Result<Self, String> {
        match (&circuit.model, claim) {
            (None, Claim::None) => Ok(Self::default()),
            (Some(_), Claim::Outputs { inputs, outputs: values }) => {
                let inputs = field::from_hex(inputs).filter(field::is_element).ok_or("`claim.inputs` is no commitment")?;
                let lengths = outputs.iter().map(|output| output.length);
                if !lengths.eq(values.iter().map(Vec::len)) {
                    return Err("`claim.outputs` has not as many numbers as the model gives".into());
                }
                let integers = outputs
                    .iter()
                    .zip(values)
                    .flat_map(|(output, values)| values.iter().map(|value| requantise(*value, output.scale)));
                let integers: Option<Vec<_>> = integers.collect();
                let integers = integers.ok_or("`claim.outputs` has a number that no proof can state")?;
                Ok(Self { inputs: Some(inputs), outputs: integers.into_iter().map(field::from_integer).collect() })
            }
            (None, _) => Err("a commitment claims nothing more".into()),
            (Some(_), _) => Err("a model's proof claims outputs".into()),
        }
    }

    /// The public numbers as the contract takes them; `hash` is the commitment to what the proof is about.
    pub fn words(self, subject: Word, hash: Word) -> Vec<Word> {
        [subject].into_iter().chain(self.inputs).chain([hash]).chain(self.outputs).collect()
    }
}

/// The integers that a witness puts into the circuit.
///
/// # Errors
/// `BadTask` for numbers that are none or too large.
pub fn values(circuit: &Circuit, witness: &Witness, scale: u32) -> Result<Vec<Word>, EzklError> {
    let (Some(_), Witness::Inputs(inputs)) = (&circuit.model, witness) else { return Ok(Vec::new()) };
    let integers = inputs.iter().flatten().map(|value| quantise(*value, scale).map(field::from_integer));
    integers.collect::<Option<_>>().ok_or_else(|| {
        let most = dequantise(crate::circuit::LARGEST, scale);
        EzklError::BadTask(format!("the input has numbers that are not finite or beyond +-{most}: scale them down"))
    })
}

/// A model's outputs, from the numbers that its circuit gives.
pub fn outputs(circuit: &Circuit, outputs: &[Output], computed: &[Vec<Word>]) -> Option<Vec<Vec<f32>>> {
    circuit.model.as_ref()?;
    let read = |(output, words): (&Output, &Vec<Word>)| {
        let values = words.iter().map(|word| Some(dequantise(field::to_integer(word)?, output.scale)));
        values.collect::<Option<Vec<_>>>().filter(|values| values.len() == output.length)
    };
    outputs.iter().zip(computed).map(read).collect()
}
