//! How the next token is chosen.
//!
//! The order is llama.cpp's: logit bias, penalties, top-k, typical, top-p, min-p, temperature, a draw. A grammar is asked about
//! the chosen token first and about the whole vocabulary only if it says no: with large vocabularies that saves most of the time.

use std::hash::{BuildHasher, Hasher, RandomState};

use fabstir_plugin_api::inference::{Format, Sampling};
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;
use llama_cpp_2::token::logit_bias::LlamaLogitBias;

use crate::engine::model::Model;
use crate::error::Error;
use crate::grammar;

/// Below this a temperature is as good as 0, and the division by it would overflow.
const COLDEST: f32 = 1e-5;

/// The state of one generation's sampling.
pub struct Sampler {
    /// Bias and penalties: what shifts logits before anything is cut off.
    adjust: Option<LlamaSampler>,
    /// The cuts, the temperature and the draw; `None` takes the likeliest token.
    draw: Option<LlamaSampler>,
    grammar: Option<LlamaSampler>,
    /// Whether the same request must give the same answer again.
    pub repeatable: bool,
}

/// Scratch space for one vocabulary, shared by all generations of an engine.
pub struct Candidates(LlamaTokenDataArray);

impl Candidates {
    pub fn new(vocabulary: usize) -> Self {
        Self(LlamaTokenDataArray::new(Vec::with_capacity(vocabulary), false))
    }

    fn fill(&mut self, logits: &[f32]) {
        self.0.data.clear();
        self.0.data.extend((0i32..).zip(logits).map(|(token, &logit)| LlamaTokenData::new(LlamaToken::new(token), logit, 0.0)));
        self.0.selected = None;
        self.0.sorted = false;
    }
}

impl Sampler {
    /// Checks every value and prepares the chain.
    ///
    /// # Errors
    /// `Invalid` for a value out of range, a token that the model does not have, or a grammar that cannot be parsed.
    pub fn new(model: &Model, sampling: &Sampling, format: &Format, context: u32) -> Result<Self, Error> {
        check(sampling, model.vocabulary())?;
        let vocabulary = model.vocabulary() as i32;
        let mut adjust = Vec::new();
        if !sampling.logit_bias.is_empty() {
            let biases: Vec<_> = sampling
                .logit_bias
                .iter()
                .map(|(&token, &bias)| LlamaLogitBias::new(LlamaToken::new(token as i32), bias))
                .collect();
            adjust.push(LlamaSampler::logit_bias(vocabulary, &biases));
        }
        let penalises = sampling.repeat_penalty != 1.0 || sampling.frequency_penalty != 0.0 || sampling.presence_penalty != 0.0;
        if penalises && sampling.repeat_last_n > 0 {
            // Nothing lies further back than the context is long, and llama.cpp allocates as much as it is told.
            let last_n = sampling.repeat_last_n.min(context) as i32;
            adjust.push(LlamaSampler::penalties(
                vocabulary,
                last_n,
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            ));
        }
        let greedy = sampling.temperature < COLDEST;
        Ok(Self {
            adjust: (!adjust.is_empty()).then(|| LlamaSampler::chain(adjust, true)),
            draw: (!greedy).then(|| draw(sampling)),
            grammar: grammar::sampler(model, format)?,
            repeatable: greedy || sampling.seed.is_some(),
        })
    }

    /// Tells the penalties of a prompt. The grammar begins with the answer.
    pub fn read(&mut self, prompt: &[i32]) {
        if let Some(adjust) = &mut self.adjust {
            for &token in prompt {
                adjust.accept(LlamaToken::new(token));
            }
        }
    }

    /// Chooses a token. The caller tells it back with `accept`, unless the token ends the answer.
    pub fn sample(&mut self, logits: &[f32], candidates: &mut Candidates) -> Result<i32, Error> {
        let token = self.choose(logits, candidates, false)?;
        let Some(grammar) = &mut self.grammar else { return Ok(token) };
        let mut alone = LlamaTokenDataArray::new(vec![LlamaTokenData::new(LlamaToken::new(token), 1.0, 0.0)], false);
        alone.apply_sampler(grammar);
        if alone.data[0].logit().is_finite() {
            return Ok(token);
        }
        self.choose(logits, candidates, true)
    }

    /// Takes note of a chosen token that did not end the answer.
    pub fn accept(&mut self, token: i32) -> Result<(), Error> {
        if let Some(adjust) = &mut self.adjust {
            adjust.accept(LlamaToken::new(token));
        }
        if let Some(grammar) = &mut self.grammar {
            grammar
                .try_accept(LlamaToken::new(token))
                .map_err(|_| Error::Failed("the grammar allows no continuation of its own answer".into()))?;
        }
        Ok(())
    }

    fn choose(&mut self, logits: &[f32], candidates: &mut Candidates, with_grammar: bool) -> Result<i32, Error> {
        if !with_grammar && self.adjust.is_none() && self.draw.is_none() {
            return likeliest((0i32..).zip(logits.iter().copied()));
        }
        if logits.iter().any(|logit| logit.is_nan()) {
            return Err(not_a_number());
        }
        candidates.fill(logits);
        let candidates = &mut candidates.0;
        if let Some(adjust) = &mut self.adjust {
            candidates.apply_sampler(adjust);
        }
        if with_grammar && let Some(grammar) = &mut self.grammar {
            candidates.apply_sampler(grammar);
        }
        match &mut self.draw {
            None => likeliest(candidates.data.iter().map(|candidate| (candidate.id().0, candidate.logit()))),
            Some(draw) => {
                candidates.apply_sampler(draw);
                let chosen = candidates.selected.and_then(|place| candidates.data.get(place));
                // A draw among tokens that the grammar forbids all would come back here, and llama.cpp aborts on accepting it.
                chosen.filter(|chosen| chosen.logit().is_finite()).map(|chosen| chosen.id().0).ok_or_else(dead_end)
            }
        }
    }
}

fn draw(sampling: &Sampling) -> LlamaSampler {
    let mut chain = Vec::new();
    if sampling.top_k > 0 {
        chain.push(LlamaSampler::top_k(i32::try_from(sampling.top_k).unwrap_or(i32::MAX)));
    }
    if sampling.typical_p < 1.0 {
        chain.push(LlamaSampler::typical(sampling.typical_p, 1));
    }
    if sampling.top_p < 1.0 {
        chain.push(LlamaSampler::top_p(sampling.top_p, 1));
    }
    if sampling.min_p > 0.0 {
        chain.push(LlamaSampler::min_p(sampling.min_p, 1));
    }
    if sampling.temperature != 1.0 {
        chain.push(LlamaSampler::temp(sampling.temperature));
    }
    let seed = sampling.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish() as u32);
    // llama.cpp takes the largest number to mean "draw a seed".
    let seed = if seed == u32::MAX { 0x5eed } else { seed };
    chain.push(LlamaSampler::dist(seed));
    LlamaSampler::chain(chain, true)
}

fn likeliest(candidates: impl Iterator<Item = (i32, f32)>) -> Result<i32, Error> {
    let mut best = (None, f32::NEG_INFINITY);
    for (token, logit) in candidates {
        if logit > best.1 {
            best = (Some(token), logit);
        } else if logit.is_nan() {
            return Err(not_a_number());
        }
    }
    best.0.ok_or_else(dead_end)
}

fn dead_end() -> Error {
    Error::Failed("no token is left to choose: the grammar forbids all that the model can say here".into())
}

fn not_a_number() -> Error {
    Error::Failed("the model computed NaN: its file is probably damaged".into())
}

fn check(sampling: &Sampling, vocabulary: u32) -> Result<(), Error> {
    let within = |name: &str, value: f32, least: f32, most: f32| {
        if (least..=most).contains(&value) {
            Ok(())
        } else {
            Err(Error::Invalid(format!("`{name}` is {value}, it must be {least} to {most}")))
        }
    };
    within("temperature", sampling.temperature, 0.0, 5.0)?;
    within("top_p", sampling.top_p, 0.0, 1.0)?;
    within("min_p", sampling.min_p, 0.0, 1.0)?;
    within("typical_p", sampling.typical_p, 0.0, 1.0)?;
    within("repeat_penalty", sampling.repeat_penalty, 0.01, 10.0)?;
    within("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)?;
    within("presence_penalty", sampling.presence_penalty, -2.0, 2.0)?;
    for (&token, &bias) in &sampling.logit_bias {
        if token >= vocabulary {
            return Err(Error::Invalid(format!("`logit_bias` names token {token}, but the model has {vocabulary}")));
        }
        within(&format!("logit_bias[{token}]"), bias, -100.0, 100.0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_checked() {
        assert!(check(&Sampling::default(), 10).is_ok());
        type Spoil = fn(&mut Sampling);
        let spoilt: [(&str, Spoil); 10] = [
            ("temperature", |s| s.temperature = 5.1),
            ("temperature", |s| s.temperature = f32::NAN),
            ("top_p", |s| s.top_p = -0.1),
            ("min_p", |s| s.min_p = 2.0),
            ("typical_p", |s| s.typical_p = f32::INFINITY),
            ("repeat_penalty", |s| s.repeat_penalty = 0.0),
            ("frequency_penalty", |s| s.frequency_penalty = 2.5),
            ("presence_penalty", |s| s.presence_penalty = -3.0),
            ("logit_bias", |s| _ = s.logit_bias.insert(10, 0.0)),
            ("logit_bias[3]", |s| _ = s.logit_bias.insert(3, 101.0)),
        ];
        for (name, spoil) in spoilt {
            let mut sampling = Sampling::default();
            spoil(&mut sampling);
            let error = check(&sampling, 10).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn the_likeliest_token_is_found_and_nan_is_not() {
        let pairs = |logits: &[f32]| (0i32..).zip(logits.to_vec()).collect::<Vec<_>>();
        assert_eq!(likeliest(pairs(&[0.1, 3.0, 3.0, -1.0]).into_iter()), Ok(1));
        assert!(likeliest(pairs(&[0.1, f32::NAN]).into_iter()).is_err());
        assert!(likeliest(pairs(&[f32::NEG_INFINITY; 2]).into_iter()).is_err());
    }
}
