//! The circuit of an output head.
//!
//! Weights are constants, so a logit is a sum and costs nothing: what costs is that each logit is compared with the largest. With M the
//! largest logit, `l_j` that of token j and `p_j` = 1 for each j from the chosen token on:
//!
//! - `s_j = p_j - p_{j-1}` is 0 or 1 (with `p_{-1}` = 0 and 1 for the last `p`), so exactly one of them is 1: the chosen token's;
//! - `d_j = M - l_j - (1 - p_j)` has a fixed number of bits, so it is not negative: M is at least every logit, and larger than those before
//!   the chosen token's;
//! - `s_j d_j = 0`: M is the chosen token's logit.
//!
//! So for a state there is one token, the first of the largest. The number of bits is such that every state has a proof, and far below
//! the field's 253, so nothing wraps around.

use ark_bn254::Fr;
use ark_ff::{AdditiveGroup, Field, One, Zero};
use ark_r1cs_std::fields::fp::{AllocatedFp, FpVar};
use ark_relations::gr1cs::{ConstraintSynthesizer, ConstraintSystemRef, LinearCombination, SynthesisError, Variable};

use super::{Head, PACKED, State};
use crate::poseidon;

type Terms = LinearCombination<Fr>;

/// Bits of a value of the state.
const VALUE_BITS: usize = 16;

/// The token that a head chooses for a state.
pub struct Choice<'a> {
    pub head: &'a Head,
    pub subject: Fr,
    pub position: u32,
    pub token: u32,
    pub state: &'a State,
    /// Whether nobody waits for the circuit any more: then building it ends with an error.
    pub ended: &'a dyn Fn() -> bool,
}

impl ConstraintSynthesizer<Fr> for Choice<'_> {
    fn generate_constraints(self, cs: ConstraintSystemRef<Fr>) -> Result<(), SynthesisError> {
        let inputs = [self.subject, self.position.into(), self.token.into(), self.state.commitment()];
        let mut public = Vec::new();
        for input in inputs {
            public.push(cs.new_input_variable(|| Ok(input))?);
        }
        // Groth16 binds every public input by itself; a constraint of its own leaves no doubt about those that no other has.
        for (variable, value) in public.iter().zip(inputs).take(2) {
            let square = cs.new_witness_variable(|| Ok(value.square()))?;
            cs.enforce_r1cs_constraint(|| (*variable).into(), || (*variable).into(), || square.into())?;
        }
        let state = self.state_values(&cs)?;
        self.state_hash(&cs, &state, public[3])?;
        self.token(&cs, &state, public[2])
    }
}

impl Choice<'_> {
    /// The values of the state, each of 16 bits.
    fn state_values(&self, cs: &ConstraintSystemRef<Fr>) -> Result<Vec<Variable>, SynthesisError> {
        let mut values = Vec::with_capacity(self.head.width());
        for value in &self.state.0 {
            let variable = cs.new_witness_variable(|| Ok(Fr::from(*value)))?;
            let mut sum = bits(cs, (i64::from(*value) + (1 << 15)) as u64, VALUE_BITS)?;
            sum.0.push((-Fr::from(1u32 << 15), Variable::One));
            equal(cs, sum, variable.into())?;
            values.push(variable);
        }
        Ok(values)
    }

    fn state_hash(&self, cs: &ConstraintSystemRef<Fr>, state: &[Variable], stated: Variable) -> Result<(), SynthesisError> {
        let shift = Fr::from(1u32 << 16);
        let mut numbers = vec![FpVar::Constant(Fr::from(state.len() as u64))];
        for (values, packed) in state.chunks(PACKED).zip(self.state.packed()) {
            let variable = cs.new_witness_variable(|| Ok(packed))?;
            let (mut sum, mut factor, mut offset) = (Vec::new(), Fr::one(), Fr::zero());
            for value in values {
                sum.push((factor, *value));
                offset += factor * Fr::from(1u32 << 15);
                factor *= shift;
            }
            sum.push((offset, Variable::One));
            equal(cs, LinearCombination(sum), variable.into())?;
            numbers.push(FpVar::Var(AllocatedFp::new(Some(packed), variable, cs.clone())));
        }
        match poseidon::hash_in(cs.clone(), &numbers)? {
            FpVar::Var(hash) => equal(cs, hash.variable.into(), stated.into()),
            FpVar::Constant(hash) => equal(cs, LinearCombination(vec![(hash, Variable::One)]), stated.into()),
        }
    }

    fn token(&self, cs: &ConstraintSystemRef<Fr>, state: &[Variable], stated: Variable) -> Result<(), SynthesisError> {
        let (tokens, chosen) = (self.head.tokens(), self.token as usize);
        let logits = self.head.logits(self.state);
        // A token that is not there has no logit; the constraints then refuse whatever stands here.
        let most = logits.get(chosen).copied().unwrap_or_default();
        let largest = cs.new_witness_variable(|| Ok(Fr::from(most)))?;
        let (mut before, mut sum) = (Terms::zero(), Vec::with_capacity(tokens));
        for (token, row) in self.head.rows().enumerate() {
            if token % 64 == 0 && (self.ended)() {
                return Err(SynthesisError::AssignmentMissing);
            }
            let reached = token >= chosen;
            let from_here: Terms = match token + 1 == tokens {
                true => Variable::One.into(),
                false => cs.new_witness_variable(|| Ok(Fr::from(reached)))?.into(),
            };
            let is_chosen = from_here.clone() - &before;
            cs.enforce_r1cs_constraint(|| is_chosen.clone(), || is_chosen.clone() - Variable::One, Terms::zero)?;

            let difference = bits(cs, (most - logits[token] - i64::from(!reached)) as u64, self.head.range_bits)?;
            let mut whole = Vec::with_capacity(row.len() + 3);
            whole.extend(
                row.iter().zip(state).filter(|(weight, _)| **weight != 0).map(|(weight, value)| (-Fr::from(*weight), *value)),
            );
            whole.push((Fr::one(), largest));
            whole.push((-Fr::one(), Variable::One));
            equal(cs, difference.clone(), LinearCombination(whole) + &from_here)?;
            cs.enforce_r1cs_constraint(|| difference, || is_chosen, Terms::zero)?;

            // 1 for each token before the chosen one.
            sum.push((Fr::one(), Variable::One));
            sum.extend(from_here.iter().map(|(factor, variable)| (-*factor, *variable)));
            before = from_here;
        }
        let mut sum = LinearCombination(sum);
        sum.compactify();
        equal(cs, sum, stated.into())
    }
}

/// The sum of `count` bits that make up `number`.
fn bits(cs: &ConstraintSystemRef<Fr>, number: u64, count: usize) -> Result<Terms, SynthesisError> {
    let (mut sum, mut factor) = (Vec::with_capacity(count), Fr::one());
    for at in 0..count {
        let bit = cs.new_witness_variable(|| Ok(Fr::from(number >> at & 1)))?;
        cs.enforce_r1cs_constraint(|| bit.into(), || LinearCombination::from(bit) - Variable::One, Terms::zero)?;
        sum.push((factor, bit));
        factor.double_in_place();
    }
    Ok(LinearCombination(sum))
}

fn equal(cs: &ConstraintSystemRef<Fr>, one: Terms, other: Terms) -> Result<(), SynthesisError> {
    cs.enforce_r1cs_constraint(|| one, || Variable::One.into(), || other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::groth16::{self, tests::Filled};
    use crate::work::Work;

    /// 5 tokens of 17 values: more than one packed number.
    fn head() -> Head {
        Head::of(17, (0..5 * 17).map(|at: i32| ((at * 7919) % 1009 - 500) as i16).collect())
    }

    fn state() -> State {
        State((0..17).map(|at: i32| ((at * 104_729) % 60_001 - 30_000) as i16).collect())
    }

    fn choice<'a>(head: &'a Head, state: &'a State, token: u32) -> Choice<'a> {
        Choice { head, subject: Fr::from(11u8), position: 3, token, state, ended: &|| false }
    }

    fn provable(head: &Head, state: &State) -> Vec<u32> {
        (0..head.tokens() as u32 + 2).filter(|token| Filled::of(choice(head, state, *token)).is_satisfied()).collect()
    }

    #[test]
    fn exactly_the_argmax_can_be_proven_and_of_equal_logits_the_first() {
        let (head, state) = (head(), state());
        assert_eq!(provable(&head, &state), [head.argmax(&state).0]);
        let ties = Head::of(1, vec![1, 5, 5, 2, 5]);
        assert_eq!(provable(&ties, &State(vec![3])), [1]);
        assert_eq!(provable(&ties, &State(vec![-3])), [0]);
        assert_eq!(provable(&ties, &State(vec![0])), [0]);
        let extremes = Head::of(2, vec![32767, -32768, -32768, 32767]);
        assert_eq!(provable(&extremes, &State(vec![-32768, 32767])), [1]);
        assert_eq!(provable(&extremes, &State(vec![32767, -32768])), [0]);
    }

    #[test]
    fn no_variable_can_be_changed() {
        let (head, state) = (head(), state());
        let mut filled = Filled::of(choice(&head, &state, head.argmax(&state).0));
        assert!(filled.is_satisfied());
        assert_eq!(filled.public, 5);
        assert_eq!(filled.free(), [0usize; 0]);
    }

    #[test]
    fn a_proof_is_bound_to_each_public_input() {
        let (head, state) = (head(), state());
        let token = head.argmax(&state).0;
        let work = Work::new(2, &|| false, &|_, _| {});
        let key = groth16::set_up(choice(&head, &State::empty(17), 0), &work).unwrap();
        let proof = groth16::prove(choice(&head, &state, token), &key, &work).unwrap();
        let inputs = [Fr::from(11u8), Fr::from(3u8), token.into(), state.commitment()];
        let prepared = key.vk.clone().into();
        assert!(groth16::holds(&prepared, &inputs, &proof));
        for which in 0..4 {
            let mut other = inputs;
            other[which] += Fr::one();
            assert!(!groth16::holds(&prepared, &other, &proof), "input {which}");
        }
        assert!(!groth16::holds(&prepared, &inputs[..3], &proof));
        // What is not true has no proof, whatever the prover does.
        let other = (token + 1) % 5;
        let lie = groth16::prove(choice(&head, &state, other), &key, &work).unwrap();
        assert!(!groth16::holds(&prepared, &[inputs[0], inputs[1], other.into(), inputs[3]], &lie));
    }
}
