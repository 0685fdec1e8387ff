//! Groth16 over BN254: keys, proofs, checks.
//!
//! Set-up and proof follow the formulas of ark-groth16's generator and prover, with its reduction and its types, but in pieces: its own
//! functions cannot be ended, and this work must end as soon as nobody waits for it. Checks are ark-groth16's own, every proof made here
//! passes one, and a test holds the keys made here against its prover.

use ark_bn254::{Bn254, Fr, G1Projective, G2Projective};
use ark_ec::scalar_mul::{BatchMulPreprocessing, ScalarMul};
use ark_ec::{AffineRepr, CurveGroup, VariableBaseMSM};
use ark_ff::{Field, PrimeField, UniformRand, Zero};
use ark_groth16::r1cs_to_qap::{LibsnarkReduction, R1CSToQAP};
use ark_poly::{EvaluationDomain, GeneralEvaluationDomain};
use ark_relations::gr1cs::{
    ConstraintSynthesizer, ConstraintSystem, ConstraintSystemRef, OptimizationGoal, SynthesisError, SynthesisMode,
};
use rand::RngCore;
use rand::rngs::OsRng;

use crate::error::Error;
use crate::work::{Part, Work};

pub type Proof = ark_groth16::Proof<Bn254>;
pub type ProvingKey = ark_groth16::ProvingKey<Bn254>;
pub type VerifyingKey = ark_groth16::VerifyingKey<Bn254>;
pub type PreparedKey = ark_groth16::PreparedVerifyingKey<Bn254>;

type Domain = GeneralEvaluationDomain<Fr>;
type Scalar = <Fr as PrimeField>::BigInt;

/// Points that are made in one piece: about 20 ms.
const MADE: usize = 1 << 11;

/// Points that are added up in one piece. Larger pieces cost less in all; one of these takes up to 0.3 s.
const ADDED: usize = 1 << 13;

/// Makes keys from the randomness of the operating system. What they are made from is forgotten, and not wiped from memory.
pub fn set_up(circuit: impl ConstraintSynthesizer<Fr>, work: &Work<'_>) -> Result<ProvingKey, Error> {
    work.begin(Part { doing: "building the circuit", from: 0, to: 5 })?;
    let cs = synthesise(circuit, SynthesisMode::Setup)?;
    work.check()?;
    let size = cs.num_constraints() + cs.num_instance_variables();
    let domain = Domain::new(size).ok_or(SynthesisError::PolynomialDegreeTooLarge)?;
    let t = domain.sample_element_outside_domain(&mut OsRng);
    let instance = cs.num_instance_variables();
    let (a, b, c, zt, _, raw) = LibsnarkReduction::instance_map_with_evaluation::<Fr, Domain>(cs, &t)?;
    work.check()?;

    let [alpha, beta, gamma, delta] = [(); 4].map(|()| nonzero(&mut OsRng));
    let inverse = |of: Fr| of.inverse().ok_or(SynthesisError::DivisionByZero);
    let (gamma_inverse, delta_inverse) = (inverse(gamma)?, inverse(delta)?);
    let combined = |at: usize| beta * a[at] + alpha * b[at] + c[at];
    let gamma_abc: Vec<Fr> = (0..instance).map(|at| combined(at) * gamma_inverse).collect();
    let l: Vec<Fr> = (instance..a.len()).map(|at| combined(at) * delta_inverse).collect();
    drop(c);
    let h = LibsnarkReduction::h_query_scalars::<Fr, Domain>(raw - 1, t, zt, delta_inverse)?;

    let (g1, g2) = (G1Projective::rand(&mut OsRng), G2Projective::rand(&mut OsRng));
    let table = BatchMulPreprocessing::new(g2, b.len());
    let b_g2_query = multiples(work, Part { doing: "making the keys", from: 10, to: 45 }, &table, &b)?;
    let table = BatchMulPreprocessing::new(g1, a.len() + b.len() + h.len() + l.len());
    let a_query = multiples(work, Part { doing: "making the keys", from: 45, to: 58 }, &table, &a)?;
    let b_g1_query = multiples(work, Part { doing: "making the keys", from: 58, to: 71 }, &table, &b)?;
    let h_query = multiples(work, Part { doing: "making the keys", from: 71, to: 85 }, &table, &h)?;
    let l_query = multiples(work, Part { doing: "making the keys", from: 85, to: 98 }, &table, &l)?;
    Ok(ProvingKey {
        vk: VerifyingKey {
            alpha_g1: (g1 * alpha).into_affine(),
            beta_g2: (g2 * beta).into_affine(),
            gamma_g2: (g2 * gamma).into_affine(),
            delta_g2: (g2 * delta).into_affine(),
            gamma_abc_g1: table.batch_mul(&gamma_abc),
        },
        beta_g1: (g1 * beta).into_affine(),
        delta_g1: (g1 * delta).into_affine(),
        a_query,
        b_g1_query,
        b_g2_query,
        h_query,
        l_query,
    })
}

/// Proves. What the circuit was given must be true; a proof of anything else does not pass [`holds`].
pub fn prove(circuit: impl ConstraintSynthesizer<Fr>, key: &ProvingKey, work: &Work<'_>) -> Result<Proof, Error> {
    work.begin(Part { doing: "building the circuit", from: 5, to: 20 })?;
    let cs = synthesise(circuit, SynthesisMode::Prove { construct_matrices: true, generate_lc_assignments: false })?;
    work.begin(Part { doing: "dividing polynomials", from: 20, to: 35 })?;
    let h = LibsnarkReduction::witness_map::<Fr, Domain>(cs.clone())?;
    let (instance, witness) = (cs.instance_assignment()?, cs.witness_assignment()?);
    drop(cs);

    let scalars = |values: &[Fr]| -> Vec<Scalar> { values.iter().map(|value| value.into_bigint()).collect() };
    // The first variable is the constant 1.
    let all = scalars(&[&instance[1..], &witness[..]].concat());
    let part = |from, to| Part { doing: "adding up points", from, to };
    let h_sum = sum::<G1Projective>(work, part(35, 60), &key.h_query, &scalars(&h))?;
    drop(h);
    let l_sum = sum::<G1Projective>(work, part(60, 67), &key.l_query, &all[instance.len() - 1..])?;
    let a_sum = sum::<G1Projective>(work, part(67, 73), &key.a_query[1..], &all)?;
    let b_g1_sum = sum::<G1Projective>(work, part(73, 80), &key.b_g1_query[1..], &all)?;
    let b_g2_sum = sum::<G2Projective>(work, part(80, 97), &key.b_g2_query[1..], &all)?;

    let (r, s) = (Fr::rand(&mut OsRng), Fr::rand(&mut OsRng));
    let a = key.delta_g1 * r + key.a_query[0] + a_sum + key.vk.alpha_g1;
    let b_g1 = key.delta_g1 * s + key.b_g1_query[0] + b_g1_sum + key.beta_g1;
    let b_g2 = key.vk.delta_g2 * s + key.b_g2_query[0] + b_g2_sum + key.vk.beta_g2;
    let c = a * s + b_g1 * r - key.delta_g1 * (r * s) + l_sum + h_sum;
    Ok(Proof { a: a.into_affine(), b: b_g2.into_affine(), c: c.into_affine() })
}

/// Whether a proof holds for these public inputs. Its points must lie on their curves and in their groups.
pub fn holds(key: &PreparedKey, inputs: &[Fr], proof: &Proof) -> bool {
    inputs.len() + 1 == key.vk.gamma_abc_g1.len()
        && ark_groth16::Groth16::<Bn254>::verify_proof(key, proof, inputs).unwrap_or(false)
}

fn synthesise(circuit: impl ConstraintSynthesizer<Fr>, mode: SynthesisMode) -> Result<ConstraintSystemRef<Fr>, SynthesisError> {
    let cs = ConstraintSystem::new_ref();
    cs.set_optimization_goal(OptimizationGoal::Constraints);
    cs.set_mode(mode);
    circuit.generate_constraints(cs.clone())?;
    cs.finalize();
    Ok(cs)
}

fn nonzero(random: &mut impl RngCore) -> Fr {
    loop {
        let number = Fr::rand(random);
        if !number.is_zero() {
            return number;
        }
    }
}

fn multiples<G>(work: &Work<'_>, part: Part, table: &BatchMulPreprocessing<G>, of: &[Fr]) -> Result<Vec<G::MulBase>, Error>
where
    G: ScalarMul<ScalarField = Fr>,
{
    let pieces: Vec<&[Fr]> = of.chunks(MADE).collect();
    Ok(work.pieces(part, pieces.len(), |number| table.batch_mul(pieces[number]))?.concat())
}

fn sum<G>(work: &Work<'_>, part: Part, bases: &[G::MulBase], scalars: &[Scalar]) -> Result<G, Error>
where
    G: VariableBaseMSM<ScalarField = Fr>,
{
    if bases.len() > scalars.len() {
        return Err(Error::Internal("the keys are for a larger circuit".into()));
    }
    let pieces: Vec<_> = bases.chunks(ADDED).zip(scalars.chunks(ADDED)).collect();
    let sums = work.pieces(part, pieces.len(), |number| G::msm_bigint(pieces[number].0, pieces[number].1))?;
    Ok(sums.into_iter().sum())
}

/// Whether a key's points can be what a set-up makes: it was read from somewhere.
pub fn is_sound(key: &VerifyingKey) -> bool {
    let on_g1 = |point: &ark_bn254::G1Affine| !point.is_zero() && point.is_on_curve();
    let on_g2 =
        |point: &ark_bn254::G2Affine| !point.is_zero() && point.is_on_curve() && point.is_in_correct_subgroup_assuming_on_curve();
    on_g1(&key.alpha_g1)
        && [&key.beta_g2, &key.gamma_g2, &key.delta_g2].into_iter().all(on_g2)
        && key.gamma_abc_g1.iter().all(on_g1)
}

#[cfg(test)]
pub(crate) mod tests {
    use ark_relations::gr1cs::{Matrix, R1CS_PREDICATE_LABEL};

    use super::*;
    use crate::commitment::Receipt;

    /// A circuit with what it is given, whose values can be changed. `ConstraintSystem` keeps sums, and does not see such a change.
    pub(crate) struct Filled {
        matrices: Vec<Matrix<Fr>>,
        pub(crate) public: usize,
        pub(crate) values: Vec<Fr>,
    }

    impl Filled {
        pub(crate) fn of(circuit: impl ConstraintSynthesizer<Fr>) -> Self {
            let mode = SynthesisMode::Prove { construct_matrices: true, generate_lc_assignments: false };
            let cs = synthesise(circuit, mode).unwrap();
            let values = [cs.instance_assignment().unwrap(), cs.witness_assignment().unwrap()].concat();
            let matrices = cs.to_matrices().unwrap().remove(R1CS_PREDICATE_LABEL).unwrap();
            Self { matrices, public: cs.num_instance_variables(), values }
        }

        pub(crate) fn is_satisfied(&self) -> bool {
            let sum = |row: &Vec<(Fr, usize)>| row.iter().map(|(factor, at)| *factor * self.values[*at]).sum::<Fr>();
            (0..self.matrices[0].len()).all(|row| {
                let [a, b, c] = [0, 1, 2].map(|matrix| sum(&self.matrices[matrix][row]));
                a * b == c
            })
        }

        /// The values, but for the constant 1, that can be changed while the circuit stays satisfied.
        pub(crate) fn free(&mut self) -> Vec<usize> {
            let count = self.values.len();
            let is_free = |at: &usize| {
                self.values[*at] += Fr::from(1u8);
                let satisfied = self.is_satisfied();
                self.values[*at] -= Fr::from(1u8);
                satisfied
            };
            (1..count).filter(is_free).collect()
        }
    }

    fn receipt(subject: u8) -> Receipt {
        Receipt::new(subject.into(), &[2; 32], &[3; 32], &[4; 32])
    }

    #[test]
    fn keys_and_proofs_are_those_of_ark_groth16() {
        type Theirs = ark_groth16::Groth16<Bn254>;
        let (receipt, work) = (receipt(1), Work::new(2, &|| false, &|_, _| {}));
        let ours = set_up(&receipt, &work).unwrap();
        let theirs = Theirs::generate_random_parameters_with_reduction(&receipt, &mut OsRng).unwrap();
        for key in [&ours, &theirs] {
            let proofs = [
                prove(&receipt, key, &work).unwrap(),
                Theirs::create_random_proof_with_reduction(&receipt, key, &mut OsRng).unwrap(),
            ];
            for proof in proofs {
                assert!(holds(&key.vk.clone().into(), &receipt.inputs(), &proof));
                assert!(is_sound(&key.vk));
            }
        }
        let proof = prove(&receipt, &ours, &work).unwrap();
        assert!(!holds(&theirs.vk.into(), &receipt.inputs(), &proof), "keys are their own");
        assert_ne!(proof, prove(&receipt, &ours, &work).unwrap(), "proofs are blinded");
    }

    #[test]
    fn work_that_nobody_waits_for_ends() {
        let work = Work::new(1, &|| true, &|_, _| {});
        assert!(matches!(set_up(&receipt(1), &work), Err(Error::Ended)));
    }
}
