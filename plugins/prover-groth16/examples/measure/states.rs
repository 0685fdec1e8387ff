//! Random states that stand for a model's: normal numbers of mean 0, as the final norm leaves them but for its weights.

use std::path::Path;

use prover_groth16::gguf::Model;
use prover_groth16::head::{Head, State};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

pub fn head(path: &Path) -> Result<Head, Box<dyn std::error::Error>> {
    let model = Model::read(path)?;
    Ok(Head::round(model.width, &model.weights()?)?)
}

/// The token that the rounded head chooses.
pub fn choice(head: &Head, values: &[f32]) -> Result<u32, Box<dyn std::error::Error>> {
    Ok(head.argmax(&State::round(values, head.width())?).0)
}

pub fn random(width: usize, count: usize, seed: u64) -> Vec<Vec<f32>> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut normal = move || {
        let (radius, angle) = (random.gen_range(f64::MIN_POSITIVE..1.0), random.gen_range(0.0..std::f64::consts::TAU));
        ((-2.0 * f64::ln(radius)).sqrt() * f64::cos(angle)) as f32
    };
    (0..count).map(|_| (0..width).map(|_| normal()).collect()).collect()
}
