//! The contracts that check proofs on an Ethereum chain.
//!
//! EZKL generates one contract that serves every circuit, and for each circuit a key (the VKA) that goes into every call. The adapter
//! `EzklVerifier` keeps that key in its own code, so neither a compiler nor anybody else's registration is needed.

use fabstir_plugin_api::prelude::*;
use serde::de::Error;

use crate::circuit::{Circuit, LIMBS};
use crate::error::EzklError;
use crate::field::{self, Word};
use crate::keys::{Keys, VKA};

/// What `artifacts/make.sh` has compiled of what EZKL generates.
const REUSABLE: &str = include_str!("../artifacts/Halo2VerifierReusable.json");
const ADAPTER: &str = include_str!("../../chain-base/contracts/artifacts/EzklVerifier.json");

/// The longest key that fits the code of one contract (EIP-170), behind one byte that keeps it from being run.
const LARGEST_KEY: usize = 24_575;

/// The two contracts of a circuit, in the order of their deployment: the adapter's last argument is the address of the other.
pub fn of(circuit: &Circuit, keys: &Keys) -> Result<Contract, EzklError> {
    let path = keys.path(VKA);
    let file = std::fs::read(&path).map_err(EzklError::io("read", &path))?;
    let nonsense = |said: String| EzklError::Nonsense { doing: "making the contract", said };
    // The file is a count of 8 bytes and so many words.
    let key = file.get(8..).filter(|words| words.len() % 32 == 0 && !words.is_empty());
    let key = key.ok_or_else(|| nonsense(format!("a key of {} bytes", file.len())))?;
    if key.len() > LARGEST_KEY {
        return Err(nonsense(format!("a key of {} bytes, a contract holds {LARGEST_KEY}: take a smaller model", key.len())));
    }
    let words =
        keys.record.outputs.iter().map(|output| output.length).sum::<usize>() + if circuit.model.is_some() { 3 } else { 2 };
    let limbs = if circuit.model.is_some() { LIMBS } else { 0 };
    let program = field::from_hex(&keys.record.program).ok_or_else(|| nonsense("a program that is no word".into()))?;
    let number = |value: usize| field::from_integer(value as i64);
    // The ABI's form of (bytes32, uint256, uint256, uint256, bytes): the place of the bytes, counted from the first word, then they.
    let arguments: [Word; 6] =
        [program, number(keys.record.proof_bytes), number(words), number(limbs), number(5 * 32), number(key.len())];
    let code = |artifact| bytecode(artifact).map_err(|error| nonsense(error.to_string()));
    Ok(Contract {
        name: "EzklVerifier".into(),
        creation: vec![code(REUSABLE)?, [&code(ADAPTER)?[..], &arguments.concat(), key].concat()],
    })
}

fn bytecode(artifact: &str) -> Result<Vec<u8>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Artifact {
        bytecode: String,
    }
    let artifact: Artifact = serde_json::from_str(artifact)?;
    hex::decode(artifact.bytecode.trim_start_matches("0x")).map_err(serde_json::Error::custom)
}
