//! Repeats the prompt word by word, and goes wrong where a word says so: a test writes the fault into its prompt.
//!
//! | word | what happens when its turn comes |
//! | --- | --- |
//! | `!wait:MS` | nothing, for so long |
//! | `!panic` | a panic: in `generate` itself if it is the first word, else in the task that speaks |
//! | `!abort`, `!exit` | the process ends |
//! | `!hang` | every thread of the plugin's runtime is blocked for ever |
//! | `!allocate` | memory is taken without end |
//! | `!flood` | text without end, as fast as it is taken |
//! | `!shout` | bytes without end, and without the end of a line, on standard error |
//! | `!error` | the stream ends with an error |
//! | `!vanish` | the stream ends without its last chunk |
//! | `!garbage`, `!frames`, `!overrun` | see [`wire`]; only in a worker |
//!
//! The `config` table can name a fault for `init` and for `load` as well.

mod fault;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use fabstir_plugin_api::prelude::*;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use fault::Fault;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    /// The name of the one model. Default `"faulty"`.
    model: Option<String>,
    /// What it says that the model is: 64 hexadecimal digits. Default: nothing.
    digest: Option<String>,
    /// Whether it says that it continues text. Default true.
    generates: Option<bool>,
    /// Pause before each word, in milliseconds. Default 0.
    delay_ms: Option<u64>,
    /// Generations that run at the same time. Default 64.
    parallel: Option<u16>,
    /// How long loading takes, in milliseconds. Default 0.
    load_ms: Option<u64>,
    /// What goes wrong in `init`.
    init: Option<Fault>,
    /// What goes wrong in `load`.
    load: Option<Fault>,
}

struct Faulty {
    loaded: Loaded,
    delay: Duration,
    load: Option<Fault>,
    slots: Arc<Semaphore>,
}

impl Lifecycle for Faulty {}

#[plugin(provides = [Inference])]
async fn init(_: Host, config: Config) -> Result<Faulty> {
    if let Some(fault) = config.init {
        return Err(fault.strike().await);
    }
    let parallel = config.parallel.unwrap_or(64).into();
    let model = config.model.unwrap_or_else(|| "faulty".into());
    let loaded = Loaded {
        model,
        context: 65_536,
        parallel,
        memory: None,
        load_ms: config.load_ms.unwrap_or(0),
        digest: config.digest,
        generates: config.generates.unwrap_or(true),
    };
    let delay = Duration::from_millis(config.delay_ms.unwrap_or(0));
    Ok(Faulty { loaded, delay, load: config.load, slots: Arc::new(Semaphore::new(parallel as usize)) })
}

#[async_trait]
impl Inference for Faulty {
    async fn models(&self, _: &Cx) -> Result<Vec<Model>> {
        Ok(vec![Model { id: self.loaded.model.clone(), loaded: true, context: Some(self.loaded.context), bytes: None }])
    }

    async fn load(&self, _: &Cx, _: String) -> Result<Loaded> {
        tokio::time::sleep(Duration::from_millis(self.loaded.load_ms)).await;
        match self.load {
            Some(fault) => Err(fault.strike().await),
            None => Ok(self.loaded.clone()),
        }
    }

    async fn unload(&self, _: &Cx, _: String) -> Result<()> {
        Ok(())
    }

    async fn generate(&self, cx: &Cx, request: Generation) -> Result<Stream<Chunk>> {
        let prompt = match request.input {
            Input::Text(text) => text,
            Input::Messages(turns) => turns.into_iter().next_back().map(|turn| turn.content).unwrap_or_default(),
            Input::Tokens(_) => return Err(PluginError::invalid("no tokens")),
        };
        assert!(!prompt.starts_with("!panic"), "the prompt asks for a panic");
        let busy = || PluginError::new(Code::Overloaded, "every slot is taken").retry_after(Duration::from_millis(50));
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| busy())?;
        let (sender, stream) = cx.stream();
        tokio::spawn(speak(prompt, self.delay, sender, slot));
        Ok(stream)
    }
}

async fn speak(prompt: String, delay: Duration, sender: Sender<Chunk>, _slot: OwnedSemaphorePermit) -> Result<()> {
    let began = Instant::now();
    let prompt_tokens = prompt.split_whitespace().count() as u32;
    let mut usage = Usage { prompt_tokens, ..Usage::default() };
    for word in prompt.split_inclusive(char::is_whitespace) {
        if let Some(command) = word.trim_end().strip_prefix('!') {
            match command.split_once(':') {
                Some(("wait", ms)) => tokio::time::sleep(Duration::from_millis(ms.parse().unwrap_or(0))).await,
                _ => match command {
                    "vanish" => return Ok(()),
                    "flood" => loop {
                        sender.send(text(&"flood ".repeat(100))).await?;
                    },
                    "shout" => wire::shout(),
                    "garbage" => wire::garbage(),
                    "frames" => wire::frames(),
                    "overrun" => wire::overrun(),
                    _ => match Fault::named(command) {
                        Some(fault) => {
                            sender.fail(fault.strike().await).await;
                            return Ok(());
                        }
                        None => return Err(PluginError::invalid(format!("no fault is called {command}"))),
                    },
                },
            }
            continue;
        }
        if !delay.is_zero() {
            // Either the pause passes or the listener leaves, which `send` then reports.
            let _ = tokio::time::timeout(delay, sender.closed()).await;
        }
        sender.send(text(word)).await?;
        usage.completion_tokens += 1;
    }
    let timings = Timings { generate_ms: began.elapsed().as_secs_f64() * 1e3, ..Timings::default() };
    sender.send(Chunk::Done(Done { finish: Finish::Stop, usage, timings })).await
}

fn text(text: &str) -> Chunk {
    Chunk::Text(Text { text: text.to_owned(), tokens: 1, logprobs: Vec::new() })
}
