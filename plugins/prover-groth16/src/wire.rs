//! Numbers and points as contracts have them: big-endian words of 32 bytes, points as EIP-196 and EIP-197 write them.

use ark_bn254::{Fq, Fq2, Fr, G1Affine, G2Affine};
use ark_ec::AffineRepr;
use ark_ff::{BigInteger, PrimeField};
use fabstir_plugin_api::prelude::Hash32;
use sha3::{Digest, Keccak256};

use crate::groth16::{Proof, VerifyingKey};

/// Bytes of a proof: A, B and C.
pub const PROOF_BYTES: usize = 256;

pub type Word = [u8; 32];

/// A number as a word.
pub fn word(number: impl PrimeField) -> Word {
    let mut word = [0; 32];
    let bytes = number.into_bigint().to_bytes_be();
    word[32 - bytes.len()..].copy_from_slice(&bytes);
    word
}

/// A whole number as a word.
pub fn word_of(number: u64) -> Word {
    let mut word = [0; 32];
    word[24..].copy_from_slice(&number.to_be_bytes());
    word
}

/// The number that a word is, if it is one of the field: there is one word for each number.
pub fn number<F: PrimeField<BigInt = ark_ff::BigInt<4>>>(word: &Word) -> Option<F> {
    let mut limbs = [0; 4];
    for (limb, bytes) in limbs.iter_mut().rev().zip(word.chunks_exact(8)) {
        *limb = bytes.iter().fold(0, |limb, byte| limb << 8 | u64::from(*byte));
    }
    F::from_bigint(ark_ff::BigInt(limbs))
}

/// 32 bytes from `0x` and 64 lower-case hexadecimal digits.
pub fn hash(text: &str) -> Option<Word> {
    let digits = text.strip_prefix("0x").filter(|digits| !digits.bytes().any(|byte| byte.is_ascii_uppercase()))?;
    let mut word = [0; 32];
    hex::decode_to_slice(digits, &mut word).ok()?;
    Some(word)
}

pub fn hash_text(word: &Word) -> Hash32 {
    format!("0x{}", hex::encode(word))
}

pub fn keccak(bytes: &[u8]) -> Word {
    Keccak256::digest(bytes).into()
}

pub fn proof_bytes(proof: &Proof) -> Vec<u8> {
    [g1(&proof.a).concat(), g2(&proof.b).concat(), g1(&proof.c).concat()].concat()
}

/// A proof from its bytes, if they are the one way to write three points that are on their curves, in their groups and not at infinity.
pub fn proof(bytes: &[u8]) -> Option<Proof> {
    if bytes.len() != PROOF_BYTES {
        return None;
    }
    let words: Vec<Word> = bytes.chunks_exact(32).filter_map(|word| word.try_into().ok()).collect();
    Some(Proof { a: g1_of(&words[..2])?, b: g2_of(&words[2..6])?, c: g1_of(&words[6..])? })
}

/// A verifying key as the contract takes it: alpha, beta, gamma, delta, and one point for the constant 1 and for each public input.
pub fn key_words(key: &VerifyingKey) -> Vec<Word> {
    let mut words = g1(&key.alpha_g1).to_vec();
    for point in [&key.beta_g2, &key.gamma_g2, &key.delta_g2] {
        words.extend(g2(point));
    }
    words.extend(key.gamma_abc_g1.iter().flat_map(g1));
    words
}

/// Which circuit under which keys: Keccak-256 of the words of the verifying key.
pub fn program(key: &VerifyingKey) -> Word {
    keccak(&key_words(key).concat())
}

fn g1(point: &G1Affine) -> [Word; 2] {
    let (x, y) = point.xy().unwrap_or_default();
    [word(x), word(y)]
}

fn g2(point: &G2Affine) -> [Word; 4] {
    let (x, y) = point.xy().unwrap_or_default();
    [word(x.c1), word(x.c0), word(y.c1), word(y.c0)]
}

fn g1_of(words: &[Word]) -> Option<G1Affine> {
    let point = G1Affine::new_unchecked(number::<Fq>(&words[0])?, number::<Fq>(&words[1])?);
    // Zeros stand for infinity. The curve's order is that of the group.
    (!point.is_zero() && point.is_on_curve()).then_some(point)
}

fn g2_of(words: &[Word]) -> Option<G2Affine> {
    let part = |at: usize| number::<Fq>(&words[at]);
    let point = G2Affine::new_unchecked(Fq2::new(part(1)?, part(0)?), Fq2::new(part(3)?, part(2)?));
    (!point.is_zero() && point.is_on_curve() && point.is_in_correct_subgroup_assuming_on_curve()).then_some(point)
}

/// A public input as a number.
pub fn input(word: &Word) -> Option<Fr> {
    number(word)
}

#[cfg(test)]
mod tests {
    use ark_bn254::{Bn254, G1Projective, G2Projective};
    use ark_ec::CurveGroup;
    use ark_ec::pairing::Pairing;
    use ark_ff::{Field, UniformRand};

    use super::*;

    fn some_proof() -> Proof {
        let random = &mut rand::rngs::OsRng;
        Proof {
            a: G1Projective::rand(random).into_affine(),
            b: G2Projective::rand(random).into_affine(),
            c: G1Projective::rand(random).into_affine(),
        }
    }

    #[test]
    fn numbers_have_one_word_each() {
        let largest = -Fr::from(1u8);
        assert_eq!(input(&word(largest)), Some(largest));
        let mut one_more = word(largest);
        one_more[31] += 1;
        assert_eq!(input(&one_more), None, "the modulus is not another way to write 0");
        assert_eq!(input(&[0xff; 32]), None);
        assert_eq!(input(&word_of(7)), Some(Fr::from(7u8)));
    }

    #[test]
    fn proofs_come_back_and_no_other_bytes_are_one() {
        let made = some_proof();
        let bytes = proof_bytes(&made);
        assert_eq!(proof(&bytes), Some(made));
        assert_eq!(proof(&bytes[1..]), None);
        assert_eq!(proof(&[&bytes[..], &[0]].concat()), None);
        assert_eq!(proof(&[0; PROOF_BYTES]), None, "points at infinity are no proof");
        for at in [0, 64, 192] {
            let mut other = bytes.clone();
            other[at..at + 32].fill(0xff);
            assert_eq!(proof(&other), None, "coordinates beyond the modulus");
        }
    }

    #[test]
    fn points_of_the_twist_outside_the_group_are_refused() {
        let outside = (0..u64::MAX)
            .find_map(|at| G2Affine::get_point_from_x_unchecked(Fq2::new(Fq::from(at), Fq::ONE), false))
            .filter(|point| point.is_on_curve() && !point.is_in_correct_subgroup_assuming_on_curve())
            .unwrap();
        assert_eq!(proof(&proof_bytes(&Proof { b: outside, ..some_proof() })), None);
    }

    #[test]
    fn the_generator_is_written_as_the_precompile_has_it() {
        // EIP-197 gives P2 in this order: the imaginary part first.
        let generator = g2(&<Bn254 as Pairing>::G2Affine::generator());
        assert_eq!(hex::encode(generator[0]), "198e9393920d483a7260bfb731fb5d25f1aa493335a9e71297e485b7aef312c2");
        assert_eq!(g1(&G1Affine::generator()), [word_of(1), word_of(2)]);
    }
}
