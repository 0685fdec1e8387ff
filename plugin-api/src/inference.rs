//! Inference: prompts in, tokens out.

use std::collections::BTreeMap;

use async_trait::async_trait;
use fabstir_plugin_macros::interface;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::context::Cx;
use crate::error::Result;
use crate::stream::Stream;

/// Turns prompts into tokens.
///
/// The host calls `load` once per model, then `generate` many times and from several tasks at once.
/// Dropping the stream cancels: the slot and its KV memory are free again within one decode step.
#[interface(kind = "inference", version = "1.0")]
#[async_trait]
pub trait Inference: Send + Sync {
    /// The models this plugin can serve with its present configuration, loaded or not.
    ///
    /// Called once after `configure`; answers from memory.
    async fn models(&self, cx: &Cx) -> Result<Vec<Model>>;

    /// Makes a model ready to generate and says what it takes. Loading a loaded model returns at once with the same answer.
    ///
    /// May take minutes; the deadline of `cx` covers it. Progress shows in `health`. A dropped call abandons the load.
    ///
    /// # Errors
    /// `NotFound` when no such model is configured. `InvalidArgument` when the file is not a model this plugin can read.
    /// `Full` when the model does not fit: the message names what it needs, what is free and what would fit.
    async fn load(&self, cx: &Cx, model: String) -> Result<Loaded>;

    /// Frees a model's memory. Generations that run on it end with `Unavailable`. Unloading an unloaded model is no error.
    async fn unload(&self, cx: &Cx, model: String) -> Result<()>;

    /// Starts one generation and returns at once; the first token arrives on the stream.
    ///
    /// The stream ends with one [`Chunk::Done`] after any number of [`Chunk::Text`]s, or with an error.
    ///
    /// # Errors
    /// `NotFound` when the model is not loaded. `Overloaded` when no slot is free: the scheduler asks again after `retry_after`.
    /// `TooLong` when the prompt and `max_tokens` exceed the context: the client is told, nobody retries.
    /// `InvalidArgument` for a sampling value, grammar or schema that cannot be honoured: nothing is ever ignored; and on a model that does
    /// not generate.
    async fn generate(&self, cx: &Cx, request: Generation) -> Result<Stream<Chunk>>;

    /// Turns texts into vectors, one per input and in the same order.
    #[optional]
    async fn embed(&self, cx: &Cx, request: Embed) -> Result<Embeddings>;

    /// What the model made of a text before it chose: its last state, after the final norm and before the output head, at each of the last
    /// positions. Reads the tokens anew, from an empty cache and alone, so that the same model gives the same states for them.
    ///
    /// # Errors
    /// As `generate`.
    #[optional]
    async fn states(&self, cx: &Cx, request: States) -> Result<Vec<Vec<f32>>>;

    /// The tokens of a text, as the model would read it.
    #[optional]
    async fn tokenize(&self, cx: &Cx, request: Tokenize) -> Result<Vec<u32>>;

    /// Renders messages with the model's own chat template, exactly as `generate` would before it tokenises.
    #[optional]
    async fn apply_template(&self, cx: &Cx, request: Template) -> Result<String>;
}

/// A model that can be served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Model {
    /// The name that clients ask for; unique within the plugin.
    pub id: String,
    /// Whether `generate` works on it now.
    pub loaded: bool,
    /// The longest prompt plus answer in tokens, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<u32>,
    /// The size of the model's file in bytes, where there is a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

/// What a loaded model takes and gives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Loaded {
    pub model: String,
    /// Tokens that one generation may span, prompt and answer together.
    pub context: u32,
    /// Generations that run at the same time; more wait in the host, never in the plugin.
    pub parallel: u32,
    /// Bytes of memory held for weights, KV cache and buffers, where the backend can tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// The time that loading took, in milliseconds.
    #[serde(default)]
    pub load_ms: u64,
    /// BLAKE3 of the model's file and of the chat template that it is used with, 64 lower-case hex digits, where there is a file: the
    /// same model has the same digest on every node.
    ///
    /// What is hashed, in its plain mode, is one sequence of bytes: for each file of the model in the order of its parts, the file's
    /// length as 8 bytes little-endian and then its bytes; after the last file the template's length in the same form and then its
    /// text in UTF-8. A model without a template ends with the length 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Whether `generate` works on it. False for a model that only embeds: it is offered to nobody who wants text. Left out, it is true.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub generates: bool,
}

fn yes() -> bool {
    true
}

fn is_yes(generates: &bool) -> bool {
    *generates
}

/// One request for text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Generation {
    /// A model id of `models`.
    pub model: String,
    pub input: Input,
    #[serde(default)]
    pub sampling: Sampling,
    /// The most tokens to generate. `None` generates until the model stops or the context is full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Texts that end the answer; the stop text itself is not part of it. At most 16, none empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// What the answer must look like.
    #[serde(default)]
    pub format: Format,
    /// How many alternatives to report with each token; `None` reports no log-probabilities, 0 those of the chosen tokens only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// Separates prompt caches: two requests share cached prefixes only if their salts are equal. Derived from the tenant by the host.
    #[serde(default)]
    pub cache_salt: String,
    /// Higher goes first when generations compete for one batch. 0 is normal.
    #[serde(default)]
    pub priority: i32,
}

/// A prompt, in one of the forms that clients have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// Raw text; no template is applied.
    Text(String),
    /// A conversation, rendered with the model's chat template.
    Messages(Vec<Message>),
    /// Tokens of this model.
    Tokens(Vec<u32>),
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Message {
    /// `system`, `user`, `assistant`, or another role that the model's template knows.
    pub role: String,
    pub content: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// How the next token is chosen. Every default leaves the model's distribution as it is, but for the temperature's 1.0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Sampling {
    /// 0 takes the likeliest token; up to 5. Default 1.
    pub temperature: f32,
    /// Keeps the fewest tokens whose probabilities add up to this. 1 keeps all.
    pub top_p: f32,
    /// Keeps this many of the likeliest tokens. 0 keeps all.
    pub top_k: u32,
    /// Drops tokens less likely than this share of the likeliest. 0 drops none.
    pub min_p: f32,
    /// Locally typical sampling. 1 is off.
    pub typical_p: f32,
    /// Divides the logits of tokens seen in the last `repeat_last_n`. 1 is off.
    pub repeat_penalty: f32,
    /// How far back penalties look, in tokens. Default 64.
    pub repeat_last_n: u32,
    /// Subtracted from a token's logit once for each time it occurred. -2 to 2, 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from a token's logit if it occurred at all. -2 to 2, 0 is off.
    pub presence_penalty: f32,
    /// Added to the logits of single tokens: token id to bias, -100 (never) to 100 (always).
    pub logit_bias: BTreeMap<u32, f32>,
    /// The same seed, request and plugin give the same answer. `None` draws one.
    pub seed: Option<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: None,
        }
    }
}

/// A constraint on the answer's form, enforced token by token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    #[default]
    Text,
    /// A JSON object.
    Json,
    /// JSON that is valid for this JSON Schema, given as text.
    JsonSchema(String),
    /// A grammar in llama.cpp's GBNF notation, start symbol `root`.
    Gbnf(String),
}

/// One step of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Chunk {
    /// More of the answer: whole UTF-8 characters, of one or several tokens.
    Text(Text),
    /// The last item of every stream that ended well.
    Done(Done),
}

/// A piece of the answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Text {
    pub text: String,
    /// How many tokens this piece stands for; 0 where text was held back and comes out late.
    pub tokens: u32,
    /// One entry per token, where the request asked for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprob>,
}

/// A generated token, with the natural logarithm of its probability under the model, before any sampling setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TokenLogprob {
    pub token: u32,
    /// The token's bytes, which need not be whole characters.
    pub bytes: Vec<u8>,
    pub logprob: f32,
    /// The likeliest tokens at this place, likeliest first.
    #[serde(default)]
    pub top: Vec<TopLogprob>,
}

/// One alternative to a generated token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TopLogprob {
    pub token: u32,
    pub bytes: Vec<u8>,
    pub logprob: f32,
}

/// How a generation ended, what it used and how long it took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Done {
    pub finish: Finish,
    pub usage: Usage,
    pub timings: Timings,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended its answer, or a stop text came up.
    Stop,
    /// `max_tokens` or the end of the context was reached.
    Length,
    /// A reason of a newer interface.
    #[serde(other)]
    Unknown,
}

/// Tokens that a generation used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    /// Prompt tokens that did not have to be read again.
    #[serde(default)]
    pub cached_tokens: u32,
}

/// Time spent in the plugin, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Timings {
    /// From the call to the first prompt token being read.
    pub queue_ms: f64,
    /// Reading the prompt.
    pub prompt_ms: f64,
    /// From the first generated token to the last.
    pub generate_ms: f64,
}

/// Texts to be turned into vectors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Embed {
    pub model: String,
    /// Texts, or token lists of this model.
    pub inputs: Vec<Input>,
}

/// Vectors, one per input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Embeddings {
    /// Each of Euclidean length 1.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens read in all.
    pub prompt_tokens: u32,
}

/// A text to be split into tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Tokenize {
    pub model: String,
    pub text: String,
    /// Whether `<|...|>`-like control tokens in the text are read as such, and the model's BOS is put in front where it wants one.
    #[serde(default)]
    pub special: bool,
}

/// Messages to be rendered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Template {
    pub model: String,
    pub messages: Vec<Message>,
}

/// Which states are asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct States {
    pub model: String,
    /// Prompt and answer together, as tokens of this model.
    pub tokens: Vec<u32>,
    /// How many positions from the end: the state of position `i` is what token `i + 1` was chosen by.
    pub last: u32,
}
