//! Vectors for texts: a context of its own, on a thread of its own, from the first time that someone asks.
//!
//! A text is read in chunks like a prompt, and the vectors of its tokens are pooled here. So the buffers stay small however long
//! the text is: llama.cpp's own pooling needs the whole text in one batch. A model that is made for embedding alone, such as BERT, looks at
//! each token in the light of all: it gets the whole text in one step, and its context, which is short, bounds the buffers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::context::{Batch, Context, DecodeError, Shape};
use super::model::Model;
use super::threads::Threads;
use crate::config::CacheType;
use crate::error::Error;

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    Mean,
    First,
    Last,
}

impl Pooling {
    /// By the number in `{architecture}.pooling_type`. A model that does not say is one that continues text: mean.
    pub fn of(number: Option<u64>) -> Result<Self, Error> {
        match number {
            None | Some(0 | 1) => Ok(Pooling::Mean),
            Some(2) => Ok(Pooling::First),
            Some(3) => Ok(Pooling::Last),
            Some(_) => Err(Error::Invalid("this model ranks texts, it does not embed them".into())),
        }
    }
}

/// Tokens per step of a model that continues text. Every token of a step also gets logits, which nobody reads but which take memory.
const CHUNK: u32 = 64;

/// Tokens per step.
pub fn step(model: &Model, context: u32) -> u32 {
    if model.is_causal() { CHUNK } else { context }
}

/// Callers that may wait behind the one being served.
const QUEUE: usize = 8;

/// What is asked for.
pub enum Work {
    /// One vector for each text.
    Embed(Vec<Vec<i32>>),
    /// The vectors of a text's last tokens as they are, so many of them.
    States { text: Vec<i32>, last: usize },
}

/// The vectors that were asked for.
pub type Vectors = Result<Vec<Vec<f32>>, Error>;

struct Job {
    work: Work,
    gone: Box<dyn Fn() -> bool + Send>,
    answer: Sender<Vectors>,
}

/// The thread that embeds.
pub struct Embedder {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Embedder {
    pub fn start(
        name: String,
        model: Arc<Model>,
        context: u32,
        threads: Threads,
        pooling: Pooling,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, Error> {
        let step = step(&model, context);
        let shape = Shape {
            context,
            sequences: 1,
            batch: step,
            cache_keys: CacheType::F16,
            cache_values: CacheType::F16,
            embeddings: true,
        };
        let (mut context, _) = Context::new(model, &shape, stop.clone())?;
        context.set_threads(threads.prompt);
        let (jobs, queue) = sync_channel(QUEUE);
        let thread = thread::Builder::new()
            .name(name)
            .spawn(move || serve(&mut context, step as usize, pooling, &queue, &stop))
            .map_err(|error| Error::Failed(format!("no thread for embeddings: {error}")))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Queues work. The answer comes on the receiver; none comes if the engine stops.
    pub fn ask(&self, work: Work, gone: impl Fn() -> bool + Send + 'static) -> Result<Receiver<Vectors>, Error> {
        let (answer, receiver) = channel();
        let jobs = self.jobs.as_ref().expect("only drop takes the queue away");
        match jobs.try_send(Job { work, gone: Box::new(gone), answer }) {
            Ok(()) => Ok(receiver),
            Err(TrySendError::Full(_)) => Err(Error::Busy { parallel: 1, retry_after: Duration::from_millis(500) }),
            Err(TrySendError::Disconnected(_)) => Err(Error::Failed("embeddings ended".into())),
        }
    }
}

impl Drop for Embedder {
    /// Returns when the thread has ended: after the step that it is in.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(context: &mut Context, step: usize, pooling: Pooling, queue: &Receiver<Job>, stop: &AtomicBool) {
    let mut batch = Batch::new(step);
    while let Ok(job) = queue.recv() {
        let gone = || stop.load(Ordering::Relaxed) || (job.gone)();
        let vectors = match &job.work {
            Work::Embed(texts) => texts.iter().map(|text| embed(context, &mut batch, step, text, pooling, &gone)).collect(),
            Work::States { text, last } => states(context, &mut batch, step, text, *last, &gone),
        };
        // A caller that has gone does not need the answer.
        let _ = job.answer.send(vectors);
    }
}

fn embed(
    context: &mut Context,
    batch: &mut Batch,
    step: usize,
    text: &[i32],
    pooling: Pooling,
    gone: &dyn Fn() -> bool,
) -> Result<Vec<f32>, Error> {
    let mut pooled: Vec<f32> = Vec::new();
    read(context, batch, step, text, gone, |_, vector| match pooling {
        _ if pooled.is_empty() => pooled = vector.to_vec(),
        Pooling::Mean => pooled.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value),
        Pooling::First => {}
        Pooling::Last => pooled.copy_from_slice(vector),
    })?;
    normalise(pooled)
}

fn states(
    context: &mut Context,
    batch: &mut Batch,
    step: usize,
    text: &[i32],
    last: usize,
    gone: &dyn Fn() -> bool,
) -> Result<Vec<Vec<f32>>, Error> {
    let mut states = Vec::with_capacity(last);
    read(context, batch, step, text, gone, |place, vector| {
        if place + last >= text.len() {
            states.push(vector.to_vec());
        }
    })?;
    Ok(states)
}

/// Reads a text from an empty cache, and shows the vector of each of its tokens.
fn read(
    context: &mut Context,
    batch: &mut Batch,
    step: usize,
    text: &[i32],
    gone: &dyn Fn() -> bool,
    mut show: impl FnMut(usize, &[f32]),
) -> Result<(), Error> {
    context.truncate(0, 0);
    for (number, chunk) in text.chunks(step).enumerate() {
        if gone() {
            return Err(Error::Abandoned);
        }
        batch.clear();
        for (place, &token) in chunk.iter().enumerate() {
            batch.add(token, number * step + place, 0, true);
        }
        context.decode(batch).map_err(|error| match error {
            DecodeError::Stopped => Error::Abandoned,
            DecodeError::Failed(code) => Error::Failed(format!("llama.cpp could not compute the embedding (code {code})")),
        })?;
        for place in 0..chunk.len() {
            let vector = context.embedding(place).ok_or_else(|| Error::Failed("llama.cpp computed no embedding".into()))?;
            show(number * step + place, vector);
        }
    }
    Ok(())
}

/// Brings a vector to length 1. Dividing by the number of tokens before would change nothing.
fn normalise(mut vector: Vec<f32>) -> Result<Vec<f32>, Error> {
    let length = vector.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    if !length.is_finite() || length == 0.0 {
        return Err(Error::Failed("the model computed a vector without a direction: its file is probably damaged".into()));
    }
    vector.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    Ok(vector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one() {
        assert_eq!(normalise(vec![3.0, 4.0]).unwrap(), [0.6, 0.8]);
        assert!(normalise(vec![0.0; 3]).is_err());
        assert!(normalise(vec![f32::NAN, 1.0]).is_err());
    }

    #[test]
    fn the_model_says_how_to_pool() {
        assert_eq!(Pooling::of(None), Ok(Pooling::Mean));
        assert_eq!(Pooling::of(Some(3)), Ok(Pooling::Last));
        assert!(Pooling::of(Some(4)).is_err());
    }
}
