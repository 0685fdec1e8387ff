//! One loaded model and the thread that generates with it.
//!
//! Plain Rust: the engine speaks the data types of the inference interface, so that each has one home, and knows nothing of
//! calls, streams or the host. A program can use it directly:
//!
//! ```no_run
//! # use inference_llama_cpp::{config::ModelConfig, engine::{Engine, Sink}, error::Error};
//! # fn run(generation: &fabstir_plugin_api::inference::Generation, sink: Box<dyn Sink>) -> Result<(), Error> {
//! let engine = Engine::load(&ModelConfig::new("tiny-chat", "models/tiny-chat/tiny-chat-q8_0.gguf"), |_| true)?;
//! engine.generate(generation, sink)?;
//! # Ok(())
//! # }
//! ```

mod batcher;
mod context;
mod embed;
mod logprobs;
pub mod model;
mod slot;
mod threads;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fabstir_plugin_api::inference::{Done, Generation, Input, Message, Text};

use self::batcher::{Batcher, Command, Job};
use self::context::{Batch, Context, Shape};
use self::embed::{Embedder, Pooling, Work};
use self::model::Model;
use self::threads::Threads;
use crate::config::{GPU_BUILD, ModelConfig};
use crate::error::Error;
use crate::gguf::Header;
use crate::memory::{self, Misfit};
use crate::metrics::Counters;
use crate::sampler::Sampler;

/// Where a generation's answer goes. Called on the engine's thread, which serves everyone: nothing here may block.
pub trait Sink: Send {
    /// Called once, before anything else. A sink that answers [`Flow::Wait`] keeps `resume`.
    fn start(&mut self, _resume: Resume) {}

    /// Takes the next piece of the answer.
    fn piece(&mut self, text: Text) -> Flow;

    /// The answer is complete; `last` is its last piece where one was held back.
    fn done(self: Box<Self>, last: Option<Text>, done: Done);

    /// The generation ended before its time.
    fn fail(self: Box<Self>, error: Error);

    /// Whether nobody reads any more. Asked before every step.
    fn gone(&self) -> bool;
}

/// Whether to go on after a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    Go,
    /// The piece was taken, but there is no room for another before `resume` is called. The generation stands still meanwhile.
    Wait,
    /// Nobody reads any more: free the slot.
    Stop,
}

/// Lets a generation go on that stands still.
pub struct Resume {
    commands: Sender<Command>,
    ticket: u64,
}

impl Resume {
    pub fn resume(&self) {
        // The engine may have ended meanwhile; then there is nothing to resume.
        let _ = self.commands.send(Command::Resume(self.ticket));
    }
}

/// A checked request, ready to run.
pub struct Request {
    prompt: Vec<i32>,
    sampler: Sampler,
    /// The most tokens to generate.
    most: u32,
    stop: Vec<String>,
    logprobs: Option<usize>,
    salt: String,
    priority: i32,
}

/// What a loaded model takes and gives.
#[derive(Debug, Clone, Copy)]
pub struct Info {
    /// Tokens that one generation may span.
    pub context: u32,
    pub parallel: u32,
    /// Bytes of the buffers that llama.cpp reported; `None` if it reported none.
    pub memory: Option<u64>,
    pub load_time: Duration,
    pub threads: i32,
    pub prompt_threads: i32,
}

/// What the engine's thread and its callers share.
struct Shared {
    id: String,
    parallel: u32,
    busy: AtomicU32,
    /// Set to end the thread; decodes look at it too.
    stop: Arc<AtomicBool>,
    /// The way to the thread; `None` once it takes no more.
    commands: Mutex<Option<Sender<Command>>>,
    /// How long generations take, in milliseconds: a moving average.
    average_ms: AtomicU64,
    counters: Counters,
}

/// The right to use one slot, from the call until the slot is free again.
pub struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
        self.0.counters.active.dec();
    }
}

impl Shared {
    fn reserve(self: &Arc<Self>) -> Result<Place, Error> {
        let taken =
            self.busy.fetch_update(Ordering::AcqRel, Ordering::Acquire, |busy| (busy < self.parallel).then_some(busy + 1));
        if taken.is_err() {
            // Slots come free at this rate, if those that run are as long as those before.
            let wait = self.average_ms.load(Ordering::Relaxed) / u64::from(self.parallel);
            return Err(Error::Busy { parallel: self.parallel, retry_after: Duration::from_millis(wait.clamp(20, 30_000)) });
        }
        self.counters.active.inc();
        Ok(Place(self.clone()))
    }

    fn commands(&self) -> MutexGuard<'_, Option<Sender<Command>>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_duration(&self, duration: Duration) {
        let old = self.average_ms.load(Ordering::Relaxed);
        let new = (old * 7 + duration.as_millis() as u64) / 8;
        self.average_ms.store(new, Ordering::Relaxed);
    }
}

/// A loaded model. Dropping it ends what runs and frees its memory.
pub struct Engine {
    shared: Arc<Shared>,
    model: Arc<Model>,
    info: Info,
    threads: Threads,
    pooling: Result<Pooling, Error>,
    embedder: Mutex<Option<Embedder>>,
    /// What the embedder's own context takes.
    embedding_bytes: u64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Texts that end an answer, at most.
const MOST_STOPS: usize = 16;

/// Alternatives per token, at most.
const MOST_LOGPROBS: u32 = 20;

impl Engine {
    /// Loads a model and starts its thread. Blocks for as long as that takes.
    ///
    /// `progress` hears shares from 0 to 1; it abandons the load by answering `false`.
    pub fn load(config: &ModelConfig, progress: impl FnMut(f32) -> bool + 'static) -> Result<Self, Error> {
        Self::load_counted(config, Counters::default(), progress)
    }

    /// Like `load`, counting into `counters`.
    pub fn load_counted(
        config: &ModelConfig,
        counters: Counters,
        progress: impl FnMut(f32) -> bool + 'static,
    ) -> Result<Self, Error> {
        let began = Instant::now();
        let header = Header::read(&config.path)?;
        let context = memory::context(&header, config).map_err(|reason| Error::Load { model: config.id.clone(), reason })?;
        check_memory(&header, config, context)?;
        let (model, weights) = Model::load(config, &header, progress)?;
        let model = Arc::new(model);
        let (commands, receiver) = channel();
        let shared = Arc::new(Shared {
            id: config.id.clone(),
            parallel: config.parallel,
            busy: AtomicU32::new(0),
            stop: Arc::new(AtomicBool::new(false)),
            commands: Mutex::new(Some(commands.clone())),
            average_ms: AtomicU64::new(1000),
            counters,
        });
        let (announce, announced) = channel();
        let work = {
            let (shared, model, config) = (shared.clone(), model.clone(), config.clone());
            move || match make_context(model.clone(), &config, context, shared.stop.clone()) {
                Ok((context, batch, threads, cache)) => {
                    // The loader waits for this, so it is there to hear it.
                    let _ = announce.send(Ok((context.context, threads, cache)));
                    let chunk = config.prefill_chunk as usize;
                    serve(
                        &shared,
                        &mut Batcher::new(shared.clone(), model, context, batch, chunk, threads, (commands, receiver)),
                    );
                }
                Err(error) => drop(announce.send(Err(error))),
            }
        };
        let (thread, (context, threads, cache)) = if model.is_causal() {
            let thread = thread::Builder::new()
                .name(thread_name("llama", &config.id))
                .spawn(work)
                .map_err(|error| Error::Failed(format!("no thread for model `{}`: {error}", config.id)))?;
            let ready =
                announced.recv().unwrap_or_else(|_| Err(Error::Failed("the engine's thread ended while starting".into())));
            match ready {
                Ok(ready) => (Some(thread), ready),
                Err(error) => {
                    // It has said why it ends; a panic on top would say no more.
                    let _ = thread.join();
                    return Err(error);
                }
            }
        } else {
            // Such models are small, and two threads that wait for each other at each layer are slower than one.
            let threads = config.threads.map_or(1, |threads| i32::try_from(threads.min(512)).unwrap_or(1));
            (None, (context, Threads { decode: threads, prompt: threads }, 0))
        };
        let info = Info {
            context,
            parallel: config.parallel,
            memory: Some(weights + cache).filter(|&bytes| bytes > 0),
            load_time: began.elapsed(),
            threads: threads.decode,
            prompt_threads: threads.prompt,
        };
        let pooling = Pooling::of(header.of_architecture("pooling_type"));
        let embedding = ModelConfig { parallel: 1, prefill_chunk: embed::step(&model, context), ..config.clone() };
        let embedding = memory::estimate(&header, &embedding, context);
        // Logits for every token of a step, which the estimate counts for one token per sequence.
        let embedding_bytes = embedding.cache
            + embedding.compute
            + if model.is_causal() { u64::from(embed::step(&model, context)) * u64::from(model.vocabulary()) * 4 } else { 0 };
        Ok(Self {
            shared,
            model,
            info,
            threads,
            pooling,
            embedder: Mutex::new(None),
            embedding_bytes,
            thread: Mutex::new(thread),
        })
    }

    pub fn info(&self) -> Info {
        self.info
    }

    /// Whether the model continues text: one that does not only embeds.
    pub fn generates(&self) -> bool {
        self.model.is_causal()
    }

    /// Whether the engine takes requests. It stops doing so when it is closed, or when a fault ended its thread.
    pub fn is_open(&self) -> bool {
        self.shared.commands().is_some()
    }

    /// Starts a generation. Everything that follows happens through `sink`.
    ///
    /// # Errors
    /// `Busy` when every slot generates, and whatever is wrong with the request. Then the sink is dropped unused.
    pub fn generate(&self, generation: &Generation, sink: Box<dyn Sink>) -> Result<(), Error> {
        self.start(self.reserve()?, generation, sink)
    }

    /// The first half of `generate`, and the quick one: a slot, or `Busy`.
    pub fn reserve(&self) -> Result<Place, Error> {
        self.shared.reserve()
    }

    /// The second half of `generate`: templates, tokens and grammars can take milliseconds.
    pub fn start(&self, place: Place, generation: &Generation, sink: Box<dyn Sink>) -> Result<(), Error> {
        let submitted = Instant::now();
        let request = self.request(generation)?;
        let job = Box::new(Job { request, sink, submitted, place });
        match &*self.shared.commands() {
            Some(commands) if commands.send(Command::Generate(job)).is_ok() => Ok(()),
            _ => Err(Error::Unloaded(self.shared.id.clone())),
        }
    }

    /// Renders messages with the model's chat template.
    pub fn render(&self, messages: &[Message]) -> Result<String, Error> {
        if messages.is_empty() {
            return Err(Error::Invalid("there are no messages".into()));
        }
        self.model.template()?.render(messages)
    }

    /// The tokens of a text; with `special`, read as a prompt would be.
    pub fn tokenize(&self, text: &str, special: bool) -> Result<Vec<i32>, Error> {
        if special { self.model.tokenize_prompt(text) } else { self.model.tokenize(text, false) }
    }

    /// Turns inputs into vectors of length 1, and says how many tokens they have. Blocks until they are done, until `gone`
    /// answers `true` or until the engine is closed.
    pub fn embed(&self, inputs: &[Input], gone: impl Fn() -> bool + Send + 'static) -> Result<(Vec<Vec<f32>>, u32), Error> {
        self.pooling.clone()?;
        let texts = inputs.iter().map(|input| self.embeddable(input)).collect::<Result<Vec<_>, _>>()?;
        let tokens = texts.iter().map(|text| text.len() as u32).sum();
        Ok((self.ask_embedder(Work::Embed(texts), gone)?, tokens))
    }

    /// The model's last state at each of the last `last` tokens, read anew. Blocks like [`Self::embed`].
    pub fn states(&self, tokens: &[u32], last: u32, gone: impl Fn() -> bool + Send + 'static) -> Result<Vec<Vec<f32>>, Error> {
        let text = self.embeddable(&Input::Tokens(tokens.to_vec()))?;
        let last = last as usize;
        if last == 0 || last > text.len() {
            return Err(Error::Invalid(format!(
                "`last` is {last}, and there are {} tokens: 1 to as many were expected",
                text.len()
            )));
        }
        self.ask_embedder(Work::States { text, last }, gone)
    }

    fn ask_embedder(&self, work: Work, gone: impl Fn() -> bool + Send + 'static) -> embed::Vectors {
        // A model that does not embed texts still has states.
        let pooling = self.pooling.clone().unwrap_or(Pooling::Mean);
        let unloaded = || Error::Unloaded(self.shared.id.clone());
        let answer = {
            let mut embedder = self.embedder();
            if !self.is_open() {
                return Err(unloaded());
            }
            let running = match embedder.take() {
                Some(running) => running,
                None => {
                    self.check_embedding_memory()?;
                    let (model, stop) = (self.model.clone(), self.shared.stop.clone());
                    let name = thread_name("embed", &self.shared.id);
                    Embedder::start(name, model, self.info.context, self.threads, pooling, stop)?
                }
            };
            embedder.insert(running).ask(work, gone)?
        };
        match answer.recv() {
            Ok(Ok(vectors)) => Ok(vectors),
            Ok(Err(Error::Abandoned)) if !self.shared.stop.load(Ordering::Relaxed) => Err(Error::Abandoned),
            Ok(Err(Error::Abandoned)) | Err(_) => Err(unloaded()),
            Ok(Err(error)) => Err(error),
        }
    }

    /// Ends what runs with `Unloaded` and joins the threads. The memory is free when the engine is dropped.
    pub fn close(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(commands) = &*self.shared.commands() {
            // If the thread has ended already, it needs no waking.
            let _ = commands.send(Command::Wake);
        }
        *self.embedder() = None;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_none() {
            // Nobody else says that nothing is taken any more.
            self.shared.commands().take();
        }
        if let Some(thread) = thread {
            // A panic on it was caught and logged there.
            let _ = thread.join();
        }
    }

    fn check_embedding_memory(&self) -> Result<(), Error> {
        match memory::free() {
            Some(free) if free < self.embedding_bytes => {
                let misfit = Misfit {
                    needed: self.embedding_bytes,
                    free,
                    place: "memory for embeddings".into(),
                    context: None,
                    smaller_file: false,
                };
                Err(Error::Memory { model: self.shared.id.clone(), misfit })
            }
            _ => Ok(()),
        }
    }

    fn embedder(&self) -> MutexGuard<'_, Option<Embedder>> {
        self.embedder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a request so thoroughly that nothing in it can reach one of llama.cpp's asserts.
    fn request(&self, generation: &Generation) -> Result<Request, Error> {
        if generation.stop.len() > MOST_STOPS || generation.stop.iter().any(String::is_empty) {
            return Err(Error::Invalid(format!("`stop` takes at most {MOST_STOPS} texts, none of them empty")));
        }
        if generation.logprobs.is_some_and(|top| top > MOST_LOGPROBS) {
            return Err(Error::Invalid(format!("`logprobs` is at most {MOST_LOGPROBS}")));
        }
        if generation.max_tokens == Some(0) {
            return Err(Error::Invalid("`max_tokens` is 0: nothing would be generated".into()));
        }
        if !self.model.is_causal() {
            let id = &self.shared.id;
            return Err(Error::Invalid(format!("`{id}` embeds texts and does not continue them: ask a chat model")));
        }
        let prompt = self.prompt(&generation.input)?;
        let context = self.info.context;
        let answer = generation.max_tokens.unwrap_or(1);
        let length = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        if length.saturating_add(answer) > context {
            return Err(Error::TooLong { prompt: length, answer, context });
        }
        Ok(Request {
            sampler: Sampler::new(&self.model, &generation.sampling, &generation.format, context)?,
            most: generation.max_tokens.unwrap_or(context - length),
            stop: generation.stop.clone(),
            logprobs: generation.logprobs.map(|top| top as usize),
            salt: generation.cache_salt.clone(),
            priority: generation.priority,
            prompt,
        })
    }

    fn prompt(&self, input: &Input) -> Result<Vec<i32>, Error> {
        let prompt = match input {
            Input::Text(text) => self.model.tokenize_prompt(text)?,
            Input::Messages(messages) => self.model.tokenize_prompt(&self.render(messages)?)?,
            Input::Tokens(tokens) => self.given(tokens)?,
        };
        if prompt.is_empty() {
            return Err(Error::Invalid("the prompt is empty".into()));
        }
        Ok(prompt)
    }

    fn embeddable(&self, input: &Input) -> Result<Vec<i32>, Error> {
        let text = match input {
            Input::Text(text) => self.model.tokenize_whole(text)?,
            Input::Tokens(tokens) => self.given(tokens)?,
            Input::Messages(_) => return Err(Error::Invalid("only texts and tokens can be embedded, not messages".into())),
        };
        let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
        if length > self.info.context {
            return Err(Error::TooLong { prompt: length, answer: 0, context: self.info.context });
        }
        if text.is_empty() {
            return Err(Error::Invalid("a text to be embedded is empty".into()));
        }
        Ok(text)
    }

    fn given(&self, tokens: &[u32]) -> Result<Vec<i32>, Error> {
        // An id that is no i32 becomes negative, which no token is.
        let tokens: Vec<i32> = tokens.iter().map(|&token| i32::try_from(token).unwrap_or(-1)).collect();
        self.model.check_tokens(&tokens)?;
        Ok(tokens)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}

/// What tools such as `top` show of a thread: 15 bytes at most.
fn thread_name(work: &str, model: &str) -> String {
    let mut name = format!("{work} {model}").replace('\0', "");
    while name.len() > 15 {
        name.pop();
    }
    name
}

/// Refuses a model that does not fit, before anything of it is loaded.
fn check_memory(header: &Header, config: &ModelConfig, context: u32) -> Result<(), Error> {
    let estimate = memory::estimate(header, config, context);
    let gpus = if GPU_BUILD { free_on_gpus() } else { None };
    let layers = if gpus.is_some() { config.gpu_layers.unwrap_or(u32::MAX) } else { 0 };
    let split = memory::split(header, &estimate, layers);
    let misfit = |misfit: Misfit| Error::Memory { model: config.id.clone(), misfit };
    if let Some(free) = gpus {
        memory::fit(header, config, context, split.gpu, free, "GPU memory").map_err(misfit)?;
    }
    if let Some(free) = memory::free() {
        memory::fit(header, config, context, split.host, free, "memory").map_err(misfit)?;
    }
    Ok(())
}

/// Free bytes on all GPUs together; `None` without a GPU.
fn free_on_gpus() -> Option<u64> {
    use llama_cpp_2::LlamaBackendDeviceType::{Gpu, IntegratedGpu};
    let devices = llama_cpp_2::list_llama_ggml_backend_devices();
    let gpus: Vec<u64> = devices
        .iter()
        .filter(|device| matches!(device.device_type, Gpu | IntegratedGpu))
        .map(|device| device.memory_free as u64)
        .collect();
    (!gpus.is_empty()).then(|| gpus.iter().sum())
}

/// The context that generations share, with the thread counts that suit it. Also returns the bytes it took.
fn make_context(
    model: Arc<Model>,
    config: &ModelConfig,
    context: u32,
    stop: Arc<AtomicBool>,
) -> Result<(Context, Batch, Threads, u64), Error> {
    // A step holds one token of each generation and a chunk of a prompt.
    let batch = config.prefill_chunk + config.parallel;
    let shape = Shape {
        context,
        sequences: config.parallel,
        batch,
        cache_keys: config.cache_keys,
        cache_values: config.cache_values,
        embeddings: false,
    };
    let failed = |reason: String| Error::Load { model: config.id.clone(), reason };
    let (mut context, allocated) = Context::new(model, &shape, stop).map_err(|error| failed(error.to_string()))?;
    let mut batch = Batch::new(batch as usize);
    let threads = match config.threads {
        Some(threads) => {
            let threads = i32::try_from(threads.min(512)).unwrap_or(1);
            Threads { decode: threads, prompt: threads }
        }
        None => {
            let threads =
                threads::choose(&mut context, &mut batch).map_err(|_| failed("a first step could not be computed".into()))?;
            let Threads { decode, prompt } = threads;
            tracing::info!(model = %config.id, threads = decode, prompt_threads = prompt, "Chose threads by timing.");
            threads
        }
    };
    Ok((context, batch, threads, allocated))
}

/// The engine thread's life. However it ends, everyone who waits for an answer hears of it.
fn serve(shared: &Shared, batcher: &mut Batcher) {
    let error = match catch_unwind(AssertUnwindSafe(|| batcher.run())) {
        Ok(()) => Error::Unloaded(shared.id.clone()),
        Err(_) => {
            tracing::error!(model = %shared.id, "The engine panicked; the model must be loaded again.");
            Error::Failed(format!("the engine of model `{}` panicked", shared.id))
        }
    };
    // From here on nothing is accepted, so nothing can slip in behind.
    shared.commands().take();
    batcher.fail_all(&error);
}
