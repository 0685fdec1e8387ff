//! Directions and the cosine between them: what is exact about finding vectors.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::error::{Result, VectorError};

/// The most numbers that a vector may have.
pub const MAX_NUMBERS: usize = 4096;

/// Bytes of one number as it is stored.
const NUMBER: usize = size_of::<f32>();

/// A vector of length 1. The cosine of two of them is the sum of the products of their numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Direction(Vec<f32>);

impl Direction {
    /// The direction of a vector.
    ///
    /// # Errors
    /// `Length`, `NotFinite`, `Zero`.
    pub fn of(mut values: Vec<f32>) -> Result<Self> {
        if !(1..=MAX_NUMBERS).contains(&values.len()) {
            return Err(VectorError::Length(values.len()));
        }
        if !values.iter().all(|value| value.is_finite()) {
            return Err(VectorError::NotFinite);
        }
        // Squares of the smallest and the largest `f32` fit an `f64`, so nothing is lost and nothing overflows.
        let length = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
        if length == 0.0 {
            return Err(VectorError::Zero);
        }
        values.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
        Ok(Self(values))
    }

    pub fn numbers(&self) -> &[f32] {
        &self.0
    }

    /// The form in which a direction is stored: little-endian numbers, one after the other.
    pub fn write_to(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.0.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// Reads what [`Direction::write_to`] wrote.
    pub fn read(stored: &[u8]) -> Vec<f32> {
        stored.as_chunks::<NUMBER>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
    }

    /// The cosine of the angle to a direction in stored form, which has as many numbers.
    pub fn cosine(&self, stored: &[u8]) -> f32 {
        // Eight sums beside each other, which the compiler makes into vector instructions.
        const LANES: usize = 8;
        let (ours, rest) = self.0.as_chunks::<LANES>();
        let (theirs, stored_rest) = stored.as_chunks::<{ LANES * NUMBER }>();
        let mut sums = [0f32; LANES];
        for (ours, theirs) in ours.iter().zip(theirs) {
            let theirs = theirs.as_chunks::<NUMBER>().0;
            for lane in 0..LANES {
                sums[lane] += ours[lane] * f32::from_le_bytes(theirs[lane]);
            }
        }
        let rest = rest.iter().zip(stored_rest.as_chunks::<NUMBER>().0);
        let rest: f32 = rest.map(|(ours, theirs)| ours * f32::from_le_bytes(*theirs)).sum();
        (sums.iter().sum::<f32>() + rest).clamp(-1.0, 1.0)
    }
}

/// A row and how near it is. The nearest is the least, so that a heap has the farthest on top; of equals, the older row is nearer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    pub cosine: f32,
    pub row: u64,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        other.cosine.total_cmp(&self.cosine).then(self.row.cmp(&other.row))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The nearest of all candidates that it is shown, never more of them than are wanted.
#[derive(Debug)]
pub struct Nearest {
    limit: usize,
    at_least: f32,
    heap: BinaryHeap<Candidate>,
}

impl Nearest {
    pub fn new(limit: usize, at_least: f32) -> Self {
        Self { limit, at_least, heap: BinaryHeap::with_capacity(limit + 1) }
    }

    pub fn offer(&mut self, candidate: Candidate) {
        if candidate.cosine < self.at_least {
            return;
        }
        if self.heap.len() < self.limit {
            self.heap.push(candidate);
        } else if let Some(mut farthest) = self.heap.peek_mut()
            && candidate < *farthest
        {
            *farthest = candidate;
        }
    }

    /// Nearest first.
    pub fn into_sorted(self) -> Vec<Candidate> {
        self.heap.into_sorted_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(direction: &Direction) -> Vec<u8> {
        let mut bytes = Vec::new();
        direction.write_to(&mut bytes);
        bytes
    }

    #[test]
    fn cosine_is_that_of_the_textbook_whatever_the_length() {
        for dimension in [1, 2, 7, 8, 9, 31, 384, MAX_NUMBERS] {
            let number = |seed: usize, at: usize| ((seed * 7919 + at * 104_729) % 2003) as f32 / 1001.5 - 1.0;
            for scale in [1e-40f32, 1.0, 1e37] {
                let a: Vec<f32> = (0..dimension).map(|at| number(1, at) * scale).collect();
                let b: Vec<f32> = (0..dimension).map(|at| number(2, at)).collect();
                let product = |x: &[f32], y: &[f32]| -> f64 { x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum() };
                let expected = product(&a, &b) / (product(&a, &a).sqrt() * product(&b, &b).sqrt());
                let cosine = Direction::of(a).unwrap().cosine(&stored(&Direction::of(b).unwrap()));
                assert!((f64::from(cosine) - expected).abs() < 1e-5, "{dimension} {scale}: {cosine} {expected}");
            }
        }
    }

    #[test]
    fn what_has_no_direction_is_refused() {
        assert!(matches!(Direction::of(vec![]), Err(VectorError::Length(0))));
        assert!(matches!(Direction::of(vec![1.0; MAX_NUMBERS + 1]), Err(VectorError::Length(_))));
        assert!(matches!(Direction::of(vec![0.0, -0.0]), Err(VectorError::Zero)));
        for none in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(matches!(Direction::of(vec![1.0, none]), Err(VectorError::NotFinite)));
        }
        let smallest = Direction::of(vec![f32::from_bits(1), 0.0]).unwrap();
        assert_eq!(smallest.numbers(), [1.0, 0.0]);
        assert_eq!(Direction::read(&stored(&smallest)), [1.0, 0.0]);
    }

    #[test]
    fn nearest_keeps_the_best_and_the_older_of_equals() {
        let mut nearest = Nearest::new(3, 0.0);
        for (row, cosine) in [(0, 0.5), (1, 0.9), (2, 0.5), (3, -0.1), (4, 0.7), (5, 0.5)] {
            nearest.offer(Candidate { cosine, row });
        }
        let rows: Vec<u64> = nearest.into_sorted().iter().map(|candidate| candidate.row).collect();
        assert_eq!(rows, [1, 4, 0]);
        let mut none = Nearest::new(0, -1.0);
        none.offer(Candidate { cosine: 1.0, row: 0 });
        assert!(none.into_sorted().is_empty());
    }
}
