//! The engine's thread: several generations in one batch.
//!
//! Every step takes one token of each generation that is answering, and then up to a chunk of prompt tokens of those that are
//! still reading. So a long prompt delays the others by one chunk at a time, and whoever leaves is gone after one step.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use fabstir_plugin_api::inference::{Done, Finish, Text, Timings, TokenLogprob, TopLogprob, Usage};

use super::context::{Batch, Context, DecodeError};
use super::logprobs::logprobs;
use super::model::Model;
use super::slot::{Running, Slot, best};
use super::threads::{PROMPT_STEP, Threads};
use super::{Flow, Place, Request, Resume, Shared, Sink};
use crate::error::Error;
use crate::sampler::Candidates;
use crate::text::TextStream;

/// What the engine's thread is told.
pub enum Command {
    Generate(Box<Job>),
    /// The sink of this generation has room again.
    Resume(u64),
    /// Look at `stop`.
    Wake,
}

pub struct Job {
    pub request: Request,
    pub sink: Box<dyn Sink>,
    pub submitted: Instant,
    pub place: Place,
}

pub struct Batcher {
    shared: Arc<Shared>,
    model: Arc<Model>,
    context: Context,
    batch: Batch,
    /// Prompt tokens per step.
    chunk: usize,
    threads: Threads,
    slots: Vec<Slot>,
    commands: Receiver<Command>,
    /// For the resume handles of sinks.
    resume: Sender<Command>,
    candidates: Candidates,
    bytes: Vec<u8>,
    /// Slots whose logits are due in this step, with the entries where they are.
    due: Vec<(usize, usize)>,
    /// Slots that read prompt tokens in this step.
    reading: Vec<usize>,
    tickets: u64,
}

impl Batcher {
    pub fn new(
        shared: Arc<Shared>,
        model: Arc<Model>,
        context: Context,
        batch: Batch,
        chunk: usize,
        threads: Threads,
        commands: (Sender<Command>, Receiver<Command>),
    ) -> Self {
        let slots = (0..shared.parallel as i32).map(Slot::new).collect();
        let candidates = Candidates::new(model.vocabulary() as usize);
        Self {
            shared,
            model,
            context,
            batch,
            chunk,
            threads,
            slots,
            commands: commands.1,
            resume: commands.0,
            candidates,
            bytes: Vec::with_capacity(64),
            due: Vec::new(),
            reading: Vec::new(),
            tickets: 0,
        }
    }

    /// Runs until `stop` is set.
    pub fn run(&mut self) {
        loop {
            let idle = !self.slots.iter().any(|slot| slot.generation.as_ref().is_some_and(|running| !running.paused));
            if idle {
                match self.commands.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => return,
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command);
            }
            if self.shared.stop.load(Ordering::Relaxed) {
                return;
            }
            self.let_go();
            self.fill();
            if self.batch.len() > 0 {
                self.step();
            }
        }
    }

    /// Ends everything that runs or waits, with this error. Called once `Shared` accepts no more.
    pub fn fail_all(&mut self, error: &Error) {
        for slot in &mut self.slots {
            if let Some(running) = slot.generation.take() {
                running.fail(error.clone());
            }
        }
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Generate(job) = command {
                job.sink.fail(error.clone());
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Generate(job) => self.begin(*job),
            Command::Resume(ticket) => {
                let mut running = self.slots.iter_mut().filter_map(|slot| slot.generation.as_mut());
                if let Some(running) = running.find(|running| running.ticket == ticket) {
                    running.paused = false;
                }
            }
            Command::Wake => {}
        }
    }

    fn begin(&mut self, job: Job) {
        let Job { mut request, mut sink, submitted, place } = job;
        let Some(chosen) = best(&self.slots, &request, self.chunk) else {
            // Unreachable: there are as many places as slots, and a place is given back after its slot is free.
            return sink.fail(Error::Failed("no slot is free".into()));
        };
        self.tickets += 1;
        let slot = &mut self.slots[chosen];
        let cached = slot.take(&mut self.context, &request, self.chunk, self.tickets) as u32;
        request.sampler.read(&request.prompt);
        sink.start(Resume { commands: self.resume.clone(), ticket: self.tickets });
        self.shared.counters.prompt_tokens.inc_by(request.prompt.len() as u64);
        self.shared.counters.cached_tokens.inc_by(cached.into());
        slot.generation = Some(Box::new(Running {
            ticket: self.tickets,
            next: None,
            generated: 0,
            cached,
            text: TextStream::new(std::mem::take(&mut request.stop)),
            unsent_tokens: 0,
            unsent_logprobs: Vec::new(),
            paused: false,
            request,
            sink,
            submitted,
            began: None,
            first_token: None,
            last_token: None,
            place,
        }));
    }

    /// Frees the slots of those whose consumers have gone.
    fn let_go(&mut self) {
        for slot in &mut self.slots {
            if slot.generation.as_ref().is_some_and(|running| running.sink.gone()) {
                slot.generation = None;
            }
        }
    }

    /// Puts the next step together.
    fn fill(&mut self) {
        self.batch.clear();
        self.due.clear();
        self.reading.clear();
        for (place, slot) in self.slots.iter().enumerate() {
            match &slot.generation {
                Some(running) if !running.paused => match running.next {
                    Some(token) => {
                        let entry = self.batch.add(token, slot.cells.len(), slot.sequence, true);
                        self.due.push((place, entry));
                    }
                    None => self.reading.push(place),
                },
                _ => {}
            }
        }
        let slots = &self.slots;
        let order = |place: &usize| {
            slots[*place].generation.as_ref().map(|running| (std::cmp::Reverse(running.request.priority), running.ticket))
        };
        self.reading.sort_by_key(order);
        let mut budget = self.chunk;
        let mut readers = 0;
        for &place in &self.reading {
            if budget == 0 {
                break;
            }
            let slot = &mut self.slots[place];
            let Some(running) = &mut slot.generation else { continue };
            running.began.get_or_insert_with(Instant::now);
            let prompt = &running.request.prompt;
            let from = slot.cells.len();
            // Chunks begin at multiples of their size where they can, so that the same prompt is always read in the same way.
            let aligned = self.chunk - from % self.chunk;
            let count = (prompt.len() - from).min(budget).min(aligned);
            for (position, &token) in prompt.iter().enumerate().skip(from).take(count) {
                let last = position + 1 == prompt.len();
                let entry = self.batch.add(token, position, slot.sequence, last);
                if last {
                    self.due.push((place, entry));
                }
            }
            let alone = self.batch.len() == count;
            if alone && slot.exact == from && count == self.chunk {
                slot.exact = from + count;
            }
            slot.cells.extend_from_slice(&prompt[from..from + count]);
            budget -= count;
            readers += 1;
        }
        self.reading.truncate(readers);
    }

    fn step(&mut self) {
        let read = self.batch.len() - self.due.iter().filter(|(place, _)| !self.reading.contains(place)).count();
        self.context.set_threads(if read >= PROMPT_STEP { self.threads.prompt } else { self.threads.decode });
        match self.context.decode(&mut self.batch) {
            Ok(()) => {}
            // The loop sees the reason.
            Err(DecodeError::Stopped) => return,
            Err(DecodeError::Failed(code)) => return self.fail_step(code),
        }
        for place in 0..self.due.len() {
            let (place, entry) = self.due[place];
            if let Err(error) = self.advance(place, entry)
                && let Some(running) = self.slots[place].generation.take()
            {
                running.fail(error);
            }
        }
    }

    /// The computation failed: those in the batch end, the others go on.
    fn fail_step(&mut self, code: i32) {
        tracing::error!(model = %self.shared.id, code, tokens = self.batch.len(), "llama.cpp could not compute a step.");
        let mut places: Vec<usize> = self.due.iter().map(|&(place, _)| place).chain(self.reading.iter().copied()).collect();
        places.sort_unstable();
        places.dedup();
        for place in places {
            let slot = &mut self.slots[place];
            slot.forget(&mut self.context);
            if let Some(running) = slot.generation.take() {
                running.fail(Error::Failed(format!("llama.cpp could not compute this step (code {code})")));
            }
        }
    }

    /// Chooses the next token of a slot and sends what it brings.
    fn advance(&mut self, place: usize, entry: usize) -> Result<(), Error> {
        let slot = &mut self.slots[place];
        let Some(running) = &mut slot.generation else { return Ok(()) };
        let logits = self.context.logits(entry).ok_or_else(|| Error::Failed("llama.cpp computed no logits".into()))?;
        if let Some(token) = running.next.take() {
            slot.cells.push(token);
        }
        let token = running.request.sampler.sample(logits, &mut self.candidates)?;
        let now = Instant::now();
        running.first_token.get_or_insert(now);
        running.last_token = Some(now);
        running.generated += 1;
        self.shared.counters.generated_tokens.inc();
        if self.model.ends(token) {
            self.finish(place, Finish::Stop, String::new(), false);
            return Ok(());
        }
        running.request.sampler.accept(token)?;
        self.bytes.clear();
        self.model.bytes_into(token, &mut self.bytes);
        if let Some(top) = running.request.logprobs {
            running.unsent_logprobs.push(report(&self.model, logits, token, top));
        }
        running.unsent_tokens += 1;
        let output = running.text.push(&self.bytes);
        if output.stopped {
            self.finish(place, Finish::Stop, output.text, true);
        } else if running.generated >= running.request.most {
            self.finish(place, Finish::Length, output.text, false);
        } else {
            running.next = Some(token);
            if !output.text.is_empty() {
                let text = running.piece(output.text);
                match running.sink.piece(text) {
                    Flow::Go => {}
                    Flow::Wait => running.paused = true,
                    Flow::Stop => slot.generation = None,
                }
            }
        }
        Ok(())
    }

    /// Sends the end of an answer and frees the slot. What it holds stays for the next request that begins alike.
    fn finish(&mut self, place: usize, finish: Finish, mut text: String, stop_text: bool) {
        let Some(mut running) = self.slots[place].generation.take() else { return };
        text.push_str(&running.text.finish());
        // Tokens that show nothing are still part of the answer; those that made up the stop text are not.
        let more = !text.is_empty() || (running.unsent_tokens > 0 && !stop_text);
        let last = more.then(|| running.piece(text));
        let done = Done { finish, usage: running.usage(), timings: running.timings() };
        self.shared.note_duration(running.submitted.elapsed());
        let Running { sink, place, .. } = *running;
        // The place first: whoever reads the end and asks again finds it free.
        drop(place);
        sink.done(last, done);
    }
}

impl Running {
    fn fail(self, error: Error) {
        drop(self.place);
        self.sink.fail(error);
    }

    fn piece(&mut self, text: String) -> Text {
        Text { text, tokens: std::mem::take(&mut self.unsent_tokens), logprobs: std::mem::take(&mut self.unsent_logprobs) }
    }

    fn usage(&self) -> Usage {
        Usage { prompt_tokens: self.request.prompt.len() as u32, completion_tokens: self.generated, cached_tokens: self.cached }
    }

    fn timings(&self) -> Timings {
        let ms = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64() * 1e3,
            _ => Duration::ZERO.as_secs_f64(),
        };
        Timings {
            queue_ms: ms(Some(self.submitted), self.began),
            prompt_ms: ms(self.began, self.first_token),
            generate_ms: ms(self.first_token, self.last_token),
        }
    }
}

fn report(model: &Model, logits: &[f32], token: i32, top: usize) -> TokenLogprob {
    let (logprob, likeliest) = logprobs(logits, token, top);
    let top = likeliest
        .into_iter()
        .map(|(token, logprob)| TopLogprob { token: token as u32, bytes: model.spelling(token), logprob })
        .collect();
    TokenLogprob { token: token as u32, bytes: model.spelling(token), logprob, top }
}
