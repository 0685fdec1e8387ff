//! The places where generations run, and what each remembers of the last one.

use std::time::Instant;

use fabstir_plugin_api::inference::TokenLogprob;

use super::context::Context;
use super::{Place, Request, Sink};
use crate::text::TextStream;

/// A part of the KV cache and the generation that uses it, if any.
pub struct Slot {
    pub sequence: i32,
    /// The tokens whose keys and values are in the cache, from position 0.
    pub cells: Vec<i32>,
    /// How many of them were read in whole chunks with nothing else in the batch: reading them again gives the same numbers, bit
    /// by bit.
    pub exact: usize,
    /// Whose tokens they are.
    salt: String,
    last_used: u64,
    pub generation: Option<Box<Running>>,
}

/// A generation on its way.
pub struct Running {
    pub ticket: u64,
    pub request: Request,
    /// The chosen token that is not in the cache yet; `None` while the prompt is being read.
    pub next: Option<i32>,
    pub generated: u32,
    pub cached: u32,
    pub text: TextStream,
    /// Tokens and log-probabilities that belong to text which has not gone out yet.
    pub unsent_tokens: u32,
    pub unsent_logprobs: Vec<TokenLogprob>,
    /// The sink has no room: nothing is computed until it resumes.
    pub paused: bool,
    pub sink: Box<dyn Sink>,
    pub submitted: Instant,
    pub began: Option<Instant>,
    pub first_token: Option<Instant>,
    pub last_token: Option<Instant>,
    /// Given back when the generation is dropped.
    pub place: Place,
}

/// Of a prompt shorter than this share in common, a slot that has not been used for longest is a better choice: it keeps what
/// others hold.
const WORTHWHILE_SHARE: usize = 10;

impl Slot {
    pub fn new(sequence: i32) -> Self {
        Self { sequence, cells: Vec::new(), exact: 0, salt: String::new(), last_used: 0, generation: None }
    }

    /// How many tokens of this request's prompt need not be read again. At least one is always read, for its logits.
    ///
    /// A request that must be repeatable takes only what was read in whole chunks, at the places where it would read them itself:
    /// a different batch rounds differently.
    fn reusable(&self, request: &Request, chunk: usize) -> usize {
        if self.salt != request.salt {
            return 0;
        }
        let common = self.cells.iter().zip(&request.prompt).take_while(|(held, asked)| held == asked).count();
        let common = common.min(request.prompt.len() - 1);
        if request.sampler.repeatable { common.min(self.exact) / chunk * chunk } else { common }
    }

    /// Makes the slot this request's own and returns how many tokens of its prompt are in the cache.
    pub fn take(&mut self, context: &mut Context, request: &Request, chunk: usize, now: u64) -> usize {
        let kept = context.truncate(self.sequence, self.reusable(request, chunk));
        self.cells.truncate(kept);
        self.exact = self.exact.min(kept);
        self.salt.clone_from(&request.salt);
        self.last_used = now;
        kept
    }

    /// Drops what the cache holds.
    pub fn forget(&mut self, context: &mut Context) {
        context.truncate(self.sequence, 0);
        self.cells.clear();
        self.exact = 0;
    }
}

/// The free slot that suits a request best: the one that holds most of its prompt, or else the one unused for longest.
pub fn best(slots: &[Slot], request: &Request, chunk: usize) -> Option<usize> {
    let free = || slots.iter().enumerate().filter(|(_, slot)| slot.generation.is_none());
    let (place, common) = free()
        .map(|(place, slot)| (place, slot.reusable(request, chunk)))
        .max_by_key(|&(place, common)| (common, usize::MAX - place))?;
    if common > 0 && common * WORTHWHILE_SHARE >= request.prompt.len() {
        return Some(place);
    }
    free().min_by_key(|(_, slot)| slot.last_used).map(|(place, _)| place)
}
