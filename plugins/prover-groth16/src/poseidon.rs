//! The hash of the circuits: a Poseidon sponge over the scalar field of BN254.
//!
//! State of 3, rate 2, capacity 1, exponent 5, 8 full and 57 partial rounds: 128 bits of security by the Poseidon paper. Constants and
//! matrix come from the Grain LFSR that the paper describes, as arkworks implements it; a test pins what comes out.

use std::sync::OnceLock;

use ark_bn254::Fr;
use ark_crypto_primitives::sponge::constraints::CryptographicSpongeVar;
use ark_crypto_primitives::sponge::poseidon::constraints::PoseidonSpongeVar;
use ark_crypto_primitives::sponge::poseidon::{PoseidonConfig, PoseidonSponge, find_poseidon_ark_and_mds};
use ark_crypto_primitives::sponge::{CryptographicSponge, FieldBasedCryptographicSponge};
use ark_ff::PrimeField;
use ark_r1cs_std::fields::fp::FpVar;
use ark_relations::gr1cs::{ConstraintSystemRef, SynthesisError};

const RATE: usize = 2;
const FULL_ROUNDS: usize = 8;
const PARTIAL_ROUNDS: usize = 57;
const EXPONENT: u64 = 5;

fn parameters() -> &'static PoseidonConfig<Fr> {
    static PARAMETERS: OnceLock<PoseidonConfig<Fr>> = OnceLock::new();
    PARAMETERS.get_or_init(|| {
        let bits = u64::from(Fr::MODULUS_BIT_SIZE);
        let (constants, matrix) = find_poseidon_ark_and_mds(bits, RATE, FULL_ROUNDS as u64, PARTIAL_ROUNDS as u64, 0);
        PoseidonConfig::new(FULL_ROUNDS, PARTIAL_ROUNDS, EXPONENT, matrix, constants, RATE, 1)
    })
}

/// Absorbs the numbers and squeezes one. How many there are is not part of it: each use has a fixed number of them.
pub fn hash(numbers: &[Fr]) -> Fr {
    let mut sponge = PoseidonSponge::new(parameters());
    sponge.absorb(&numbers);
    sponge.squeeze_native_field_elements(1)[0]
}

/// The same in a circuit.
pub fn hash_in(cs: ConstraintSystemRef<Fr>, numbers: &[FpVar<Fr>]) -> Result<FpVar<Fr>, SynthesisError> {
    let mut sponge = PoseidonSpongeVar::new(cs, parameters());
    sponge.absorb(&numbers)?;
    let mut squeezed = sponge.squeeze_field_elements(1)?;
    squeezed.pop().ok_or(SynthesisError::AssignmentMissing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire;

    #[test]
    fn the_parameters_are_those_that_proofs_were_made_with() {
        let parameters = parameters();
        let constants = [&parameters.ark, &parameters.mds].into_iter().flatten().flatten();
        let bytes: Vec<u8> = constants.flat_map(|number| wire::word(*number)).collect();
        assert_eq!(blake3::hash(&bytes).to_hex().as_str(), "07c814a8e53deafe09a9474db7783f7a108b7443a93119195da31d3d3e846361");
        let hashed = hash(&[1u8, 2, 3].map(Fr::from));
        assert_eq!(hex::encode(wire::word(hashed)), "1e706b0afc828a5262be1773734e80df7fa9c0aa25c8fd5dfb008122a62e65ca");
    }
}
