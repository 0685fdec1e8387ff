//! The statement `output-head`: for a committed state, a token is the argmax of a model's output head.
//!
//! Proven is arithmetic on whole numbers, so both sides are rounded. A positive factor changes no argmax, so each side is scaled to use
//! all of its 16 bits: the head by its largest weight, once, and every state by its own largest value. With the weights of the default
//! model and 20,000 random states that changed 4 tokens.

mod circuit;

use ark_bn254::Fr;
use ark_ff::Zero;

use crate::error::Error;
use crate::poseidon;

pub use circuit::Choice;

/// What is fixed by circuit, rounding and packing: changed with them, so that keys of another circuit are not taken for its own.
pub const CIRCUIT: &str = "output-head 1";

/// The largest number that a rounded weight or value has.
const LARGEST: f64 = i16::MAX as f64;

/// Values in one number of the field: 15 x 16 bits.
const PACKED: usize = 15;

/// A model's output head in whole numbers.
#[derive(Debug)]
pub struct Head {
    width: usize,
    /// One row for each token, in order of token.
    weights: Vec<i16>,
    range_bits: usize,
}

/// A model's last state in whole numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State(Vec<i16>);

/// What making keys for a head of this size or proving with it takes at most, in bytes.
pub fn memory(width: usize, tokens: usize) -> u64 {
    let (width, tokens) = (width as u64, tokens as u64);
    let range_bits = 32 + u64::from(width.max(1).ilog2());
    let constraints = tokens * (range_bits + 3) + 17 * width;
    let terms = tokens * (width + 3 * range_bits);
    constraints * 1800 + terms * 80
}

impl Head {
    /// Rounds a head. `weights` has one row of `width` for each token.
    ///
    /// # Errors
    /// Says what is wrong with the weights.
    pub fn round(width: usize, weights: &[f32]) -> Result<Self, String> {
        if width == 0 || weights.len() / width < 2 {
            return Err("an output head has two rows or more".into());
        }
        let largest = largest(weights).ok_or("the output head has weights that are no finite numbers, or all are 0")?;
        Ok(Self::of(width, weights.iter().map(|weight| scaled(*weight, largest)).collect()))
    }

    fn of(width: usize, weights: Vec<i16>) -> Self {
        let sum = |row: &[i16]| row.iter().map(|weight| u64::from(weight.unsigned_abs())).sum::<u64>();
        let sum = weights.chunks_exact(width).map(sum).max().unwrap_or(0);
        // A logit is at most 2^15 times that, in either direction; two of them differ by at most twice as much, and by 1 for a tie.
        let largest = 2 * (1 << 15) * sum + 1;
        Self { width, weights, range_bits: (u64::BITS - largest.leading_zeros()) as usize }
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn tokens(&self) -> usize {
        self.weights.len() / self.width
    }

    fn rows(&self) -> impl Iterator<Item = &[i16]> {
        self.weights.chunks_exact(self.width)
    }

    fn logits(&self, state: &State) -> Vec<i64> {
        let product = |row: &[i16]| row.iter().zip(&state.0).map(|(w, h)| i64::from(*w) * i64::from(*h)).sum();
        self.rows().map(product).collect()
    }

    /// The token with the largest logit, the first of those that are equal, as llama.cpp chooses without sampling; and all logits.
    pub fn argmax(&self, state: &State) -> (u32, Vec<i64>) {
        let logits = self.logits(state);
        let best = (0..logits.len()).fold(0, |best, token| if logits[token] > logits[best] { token } else { best });
        (best as u32, logits)
    }
}

impl State {
    /// Rounds a state of the model.
    ///
    /// # Errors
    /// `Task` when it is none.
    pub fn round(values: &[f32], width: usize) -> Result<Self, Error> {
        if values.len() != width {
            return Err(Error::Task(format!("the state has {} values, those of this model have {width}", values.len())));
        }
        let largest =
            largest(values).ok_or_else(|| Error::Task("the state has values that are no finite numbers, or all are 0".into()))?;
        Ok(Self(values.iter().map(|value| scaled(*value, largest)).collect()))
    }

    /// No state of a model, for the shape of its circuit alone.
    pub fn empty(width: usize) -> Self {
        Self(vec![0; width])
    }

    /// What stands for the state: the Poseidon hash of its length and of its values, each plus 2^15, 15 in one number from the lowest
    /// 16 bits up.
    pub fn commitment(&self) -> Fr {
        let mut numbers = vec![Fr::from(self.0.len() as u64)];
        numbers.extend(self.packed());
        poseidon::hash(&numbers)
    }

    fn packed(&self) -> impl Iterator<Item = Fr> {
        let shift = Fr::from(1u32 << 16);
        let packed = move |values: &[i16]| {
            values
                .iter()
                .rev()
                .fold(Fr::zero(), |number, value| number * shift + Fr::from((i32::from(*value) + (1 << 15)) as u32))
        };
        self.0.chunks(PACKED).map(packed)
    }
}

/// The largest magnitude, if all are finite numbers and one is not 0.
fn largest(values: &[f32]) -> Option<f64> {
    let largest = values.iter().try_fold(0f32, |largest, value| value.is_finite().then(|| largest.max(value.abs())))?;
    (largest > 0.0).then_some(f64::from(largest))
}

fn scaled(value: f32, largest: f64) -> i16 {
    (f64::from(value) / largest * LARGEST).round() as i16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_scaled_by_their_own_largest_value() {
        let state = State::round(&[0.5, -1.0, 0.0], 3).unwrap();
        assert_eq!(state.0, [16384, -32767, 0]);
        assert_eq!(State::round(&[5.0, -10.0, 0.0], 3).unwrap(), state, "a positive factor changes nothing");
        assert_ne!(State::round(&[0.5, -1.0, 0.0, 0.0], 4).unwrap().commitment(), state.commitment());
    }

    #[test]
    fn what_is_no_state_is_refused() {
        for values in [&[1.0][..], &[1.0, f32::NAN], &[f32::INFINITY, 1.0], &[0.0, -0.0], &[]] {
            assert!(matches!(State::round(values, 2), Err(Error::Task(_))), "{values:?}");
        }
        assert!(Head::round(2, &[1.0, 2.0]).is_err());
        assert!(Head::round(2, &[1.0, 2.0, f32::NAN, 0.0]).is_err());
        assert!(Head::round(1, &[0.0, 0.0]).is_err());
    }

    #[test]
    fn every_difference_of_two_logits_fits_its_range() {
        let head = Head::of(3, vec![32767, -32768, 32767, -32768, 32767, -32768]);
        let state = State(vec![-32768, 32767, -32768]);
        let logits = head.logits(&state);
        assert!(i128::from(logits[1]) - i128::from(logits[0]) < 1 << head.range_bits);
        assert!(head.range_bits <= 34);
    }

    #[test]
    fn of_equal_logits_the_first_is_the_largest() {
        let head = Head::of(1, vec![1, 5, 5, 2]);
        assert_eq!(head.argmax(&State(vec![3])).0, 1);
        assert_eq!(head.argmax(&State(vec![-3])).0, 0);
        assert_eq!(head.argmax(&State(vec![0])).0, 0);
    }
}
