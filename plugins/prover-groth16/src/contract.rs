//! The contracts that check proofs on a chain, ready to be deployed.

use fabstir_plugin_api::prelude::Contract;
use serde::Deserialize;

use crate::error::Error;
use crate::groth16::VerifyingKey;
use crate::statement::Subject;
use crate::wire::{self, word_of};

const GROTH16: &str = include_str!("../../chain-base/contracts/artifacts/Groth16Verifier.json");
const HEAD: &str = include_str!("../../chain-base/contracts/artifacts/HeadVerifier.json");

#[derive(Deserialize)]
struct Artifact {
    bytecode: String,
}

/// The contract for a statement under these keys. That of an output head is two: one checks a proof, and the other, which is named to
/// the market, draws positions and asks the first about each.
pub fn of(subject: &Subject, key: &VerifyingKey, samples: u32) -> Result<Contract, Error> {
    // uint256[]: where it begins, how many there are, and they.
    let words = wire::key_words(key);
    let arguments = [word_of(32), word_of(words.len() as u64)];
    let checks = [code(GROTH16)?, arguments.concat(), words.concat()].concat();
    Ok(match subject {
        Subject::Commitment => Contract { name: "Groth16Verifier".into(), creation: vec![checks] },
        Subject::Head { .. } => {
            // The address of the first is the second argument.
            let draws = [code(HEAD)?, word_of(samples.into()).to_vec()].concat();
            Contract { name: "HeadVerifier".into(), creation: vec![checks, draws] }
        }
    })
}

fn code(artifact: &str) -> Result<Vec<u8>, Error> {
    let artifact: Artifact = serde_json::from_str(artifact).map_err(|error| Error::Internal(error.to_string()))?;
    hex::decode(artifact.bytecode.trim_start_matches("0x")).map_err(|error| Error::Internal(error.to_string()))
}
