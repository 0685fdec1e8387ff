//! How many CPU threads to compute on.
//!
//! The threads of a step wait for each other at every layer. A small model waits longer than it computes and runs several times
//! faster on one thread than on two; a large one needs all cores. The number of cores does not tell, so a few steps are timed.

use std::thread;
use std::time::{Duration, Instant};

use super::context::{Batch, Context, DecodeError};

/// Threads for steps of single tokens, and for steps that read a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threads {
    pub decode: i32,
    pub prompt: i32,
}

/// Steps that read fewer prompt tokens than this run like those that generate.
pub const PROMPT_STEP: usize = 16;

/// A prompt step for timing: long enough to be bound by computing, short enough for a large model on one core.
const TIMED_PROMPT: usize = 32;

/// Fewer threads win unless more are faster by this factor: they leave cores to others.
const WORTH: f64 = 1.03;

/// Once this much slower than the best, still fewer threads are not tried.
const HOPELESS: f64 = 1.5;

const ENOUGH: Duration = Duration::from_millis(150);

/// Times both kinds of steps, from all cores downwards, and leaves the cache empty.
pub fn choose(context: &mut Context, batch: &mut Batch) -> Result<Threads, DecodeError> {
    let decode = fastest(context, batch, 1)?;
    let prompt = fastest(context, batch, TIMED_PROMPT.min(batch.room()).min(context.context as usize))?;
    context.truncate(0, 0);
    Ok(Threads { decode, prompt })
}

fn fastest(context: &mut Context, batch: &mut Batch, tokens: usize) -> Result<i32, DecodeError> {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get().min(64)) as i32;
    let mut best = (cores, f64::INFINITY);
    let mut threads = cores;
    while threads >= 1 {
        let time = step_time(context, batch, tokens, threads)?.as_secs_f64();
        tracing::debug!(threads, tokens, ms = time * 1e3, "Timed a step.");
        if time <= best.1 * WORTH {
            best = (threads, time.min(best.1));
        } else if time > best.1 * HOPELESS {
            break;
        }
        threads /= 2;
    }
    Ok(best.0)
}

/// The shortest of a few equal steps after one for warming up: other work on the machine only ever makes a step longer.
fn step_time(context: &mut Context, batch: &mut Batch, tokens: usize, threads: i32) -> Result<Duration, DecodeError> {
    context.set_threads(threads);
    let mut best = Duration::MAX;
    let began = Instant::now();
    let mut position = 0;
    for round in 0..12 {
        if position == 0 || position + tokens > context.context as usize {
            context.truncate(0, 0);
            position = 0;
        }
        batch.clear();
        for place in 0..tokens {
            batch.add(0, position + place, 0, place + 1 == tokens);
        }
        position += tokens;
        let step = Instant::now();
        context.decode(batch)?;
        if round > 0 {
            best = best.min(step.elapsed());
            if began.elapsed() > ENOUGH {
                break;
            }
        }
    }
    batch.clear();
    Ok(best)
}
