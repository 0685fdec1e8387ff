//! One question, asked in different ways: llama.cpp called directly, the plugin's engine without the boundary, and a plugin.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use fabstir_plugin_api::inference::{Chunk, Done, Generation, Inference, Text};
use inference_llama_cpp::engine::{Engine, Flow, Sink};
use inference_llama_cpp::error::Error;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::sampling::LlamaSampler;

use crate::cx;

/// When the pieces of an answer came.
pub struct Answer {
    pub asked: Instant,
    /// Each piece's moment and the tokens that it stands for.
    pub pieces: Vec<(Instant, u32)>,
}

impl Answer {
    fn new() -> Self {
        Self { asked: Instant::now(), pieces: Vec::new() }
    }

    fn push(&mut self, tokens: u32) {
        self.pieces.push((Instant::now(), tokens));
    }

    pub fn first_token(&self) -> Duration {
        self.pieces[0].0 - self.asked
    }

    pub fn tokens(&self) -> u32 {
        self.pieces.iter().map(|piece| piece.1).sum()
    }

    /// The mean time between tokens after the first piece.
    pub fn between_tokens(&self) -> Duration {
        let (first, last) = (self.pieces[0], self.pieces[self.pieces.len() - 1]);
        (last.0 - first.0) / (self.tokens() - first.1).max(1)
    }
}

/// What every candidate computes with.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Tokens of one prompt and its answer.
    pub context: u32,
    /// The most tokens of one step.
    pub batch: u32,
    pub threads: i32,
}

/// A bare loop over llama.cpp: what there would be without engine, plugin and host.
pub struct Direct {
    model: &'static LlamaModel,
    context: LlamaContext<'static>,
    batch: LlamaBatch<'static>,
}

impl Direct {
    /// The model stays in memory until the program ends.
    pub fn load(path: &Path, shape: Shape) -> Self {
        static BACKEND: OnceLock<LlamaBackend> = OnceLock::new();
        // An engine in this program may have set it up already.
        let backend = BACKEND.get_or_init(|| LlamaBackend::init().unwrap_or(LlamaBackend {}));
        let model = LlamaModel::load_from_file(backend, path, &LlamaModelParams::default()).expect("the model loads");
        let model: &'static LlamaModel = Box::leak(Box::new(model));
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(shape.context))
            .with_n_batch(shape.batch)
            .with_n_ubatch(shape.batch)
            .with_n_threads(shape.threads)
            .with_n_threads_batch(shape.threads)
            .with_no_perf(true);
        let context = model.new_context(backend, params).expect("the context is made");
        Self { model, context, batch: LlamaBatch::new(shape.batch as usize, 1) }
    }

    pub fn answer(&mut self, prompt: &str, most: u32) -> Answer {
        let mut answer = Answer::new();
        let vocabulary = self.model.vocab();
        let mut sampler = LlamaSampler::greedy();
        self.context.clear_kv_cache();
        self.batch.clear();
        let tokens = vocabulary.tokenize(prompt.as_bytes(), true, true);
        for (position, &token) in tokens.iter().enumerate() {
            self.batch.add(token, position as i32, &[0], position + 1 == tokens.len()).expect("the prompt fits one batch");
        }
        let mut text = String::new();
        let mut bytes = Vec::new();
        let mut position = tokens.len() as i32;
        loop {
            self.context.decode(&mut self.batch).expect("the step is computed");
            let token = sampler.sample(&self.context, self.batch.n_tokens() - 1);
            if vocabulary.is_eog(token) {
                break;
            }
            bytes.clear();
            vocabulary.token_to_piece_into(token, &mut bytes, false, None);
            text.push_str(&String::from_utf8_lossy(&bytes));
            answer.push(1);
            if answer.pieces.len() as u32 == most {
                break;
            }
            self.batch.clear();
            self.batch.add(token, position, &[0], true).expect("one token fits");
            position += 1;
        }
        std::hint::black_box(text);
        answer
    }
}

/// Notes the pieces on the engine's own thread: nobody else is woken before the answer is whole.
struct Notes {
    answer: Answer,
    whole: Sender<Answer>,
}

impl Sink for Notes {
    fn piece(&mut self, text: Text) -> Flow {
        self.answer.push(text.tokens);
        Flow::Go
    }

    fn done(mut self: Box<Self>, last: Option<Text>, _: Done) {
        if let Some(text) = last {
            self.piece(text);
        }
        self.whole.send(self.answer).expect("the bench waits for the answer");
    }

    fn fail(self: Box<Self>, error: Error) {
        panic!("the engine fails: {error}");
    }

    fn gone(&self) -> bool {
        false
    }
}

/// Asks the engine without a boundary.
pub fn from_engine(engine: &Engine, generation: &Generation) -> Receiver<Answer> {
    let (whole, answer) = channel();
    let notes = Notes { answer: Answer::new(), whole };
    engine.generate(generation, Box::new(notes)).expect("the engine takes the request");
    answer
}

/// Asks a plugin, in this process or another.
pub async fn from_plugin(inference: &dyn Inference, generation: Generation) -> Answer {
    let mut answer = Answer::new();
    let mut stream = inference.generate(&cx(), generation).await.expect("the plugin takes the request");
    while let Some(chunk) = stream.next().await {
        if let Chunk::Text(text) = chunk.expect("no error") {
            answer.push(text.tokens);
        }
    }
    answer
}
