//! Repeats the prompt word by word: a whole inference plugin, to read first and to copy. What to say is in `answer.rs`.

mod answer;

use std::{sync::Arc, time::Duration};

use fabstir_plugin_api::prelude::*;
use tokio::sync::Semaphore;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    /// Pause before each word, in milliseconds. Default 0. Example: 20.
    delay_ms: Option<u64>,
    /// Generations that run at the same time. Default 64.
    parallel: Option<u16>,
    /// Words that a prompt and its answer may have together. Default 4096.
    context: Option<u32>,
}

/// Names the model everywhere. There is no file to hash, so it is the SHA-256 of `inference-echo`.
const DIGEST: &str = "b81583ae0e5d795af9fdb519b071cdb8d527531cbbd6e2ad2a5999a746179ec1";

pub struct Echo {
    loaded: Loaded,
    delay: Duration,
    slots: Arc<Semaphore>,
}

impl Lifecycle for Echo {}

#[plugin(provides = [Inference])]
async fn init(_: Host, config: Config) -> Result<Echo> {
    let (parallel, context) = (config.parallel.unwrap_or(64).into(), config.context.unwrap_or(4096));
    let digest = Some(DIGEST.into());
    let loaded = Loaded { model: "echo".into(), context, parallel, memory: None, load_ms: 0, digest, generates: true };
    let delay = Duration::from_millis(config.delay_ms.unwrap_or(0));
    Ok(Echo { loaded, delay, slots: Arc::new(Semaphore::new(parallel as usize)) })
}

#[async_trait]
impl Inference for Echo {
    async fn models(&self, _: &Cx) -> Result<Vec<Model>> {
        Ok(vec![Model { id: self.loaded.model.clone(), loaded: true, context: Some(self.loaded.context), bytes: None }])
    }

    async fn load(&self, _: &Cx, model: String) -> Result<Loaded> {
        answer::known(&model).map(|()| self.loaded.clone())
    }

    async fn unload(&self, _: &Cx, _: String) -> Result<()> {
        Ok(()) // The model is one line of code: there is no memory to free.
    }

    async fn generate(&self, cx: &Cx, request: Generation) -> Result<Stream<Chunk>> {
        let answer = answer::to(request, self.loaded.context)?;
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| answer::busy(self.delay))?;
        let (sender, stream) = cx.stream();
        tokio::spawn(answer::speak(answer, self.delay, sender, slot));
        Ok(stream)
    }
}
