//! A plugin that breaks one promise at a time, as its configuration says. With it the suite proves that its checks can fail.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fabstir_plugin_api::prelude::*;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

const CONTEXT: u32 = 512;
const SLOTS: usize = 4;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    /// The promise to break, as one of the words in this file. Default: none.
    #[serde(default)]
    fault: String,
}

pub struct Faulty {
    fault: String,
    answers: AtomicUsize,
    slots: Arc<Semaphore>,
    blobs: Mutex<BTreeMap<String, Arc<[u8]>>>,
}

impl Faulty {
    fn has(&self, fault: &str) -> bool {
        self.fault == fault
    }

    fn known(&self, model: &str) -> Result<()> {
        if model == "words" || self.has("any-model") { Ok(()) } else { Err(PluginError::not_found("no such model")) }
    }
}

impl Lifecycle for Faulty {}

#[plugin(provides = [Inference(embed), Storage])]
async fn init(_: Host, config: Config) -> Result<Faulty> {
    match config.fault.as_str() {
        "hangs" => std::future::pending().await,
        "exits" => std::process::exit(3),
        "leaks-thread" => drop(std::thread::spawn(|| std::thread::sleep(Duration::from_secs(3600)))),
        "leaks-memory" => drop(std::hint::black_box(vec![1u8; 64 << 10].leak())),
        "leaks-file" => std::mem::forget(std::fs::File::open("/dev/null")),
        _ => {}
    }
    let slots = if config.fault == "one-slot" { 1 } else { SLOTS };
    Ok(Faulty {
        fault: config.fault,
        answers: AtomicUsize::new(0),
        slots: Arc::new(Semaphore::new(slots)),
        blobs: Mutex::default(),
    })
}

#[async_trait]
impl Inference for Faulty {
    async fn models(&self, _: &Cx) -> Result<Vec<Model>> {
        Ok(vec![Model { id: "words".into(), loaded: !self.has("forgets-load"), context: Some(CONTEXT), bytes: None }])
    }

    async fn load(&self, _: &Cx, model: String) -> Result<Loaded> {
        self.known(&model)?;
        Ok(Loaded { model, context: CONTEXT, parallel: SLOTS as u32, memory: None, load_ms: 0, digest: None, generates: true })
    }

    async fn unload(&self, _: &Cx, _: String) -> Result<()> {
        Ok(())
    }

    async fn generate(&self, _: &Cx, request: Generation) -> Result<Stream<Chunk>> {
        self.known(&request.model)?;
        match self.fault.as_str() {
            "panics" => panic!("a fault that was asked for"),
            "aborts" => std::process::abort(),
            "stalls" => std::thread::sleep(Duration::from_secs(3600)),
            _ => {}
        }
        if !self.has("ignores-stop") && (request.stop.len() > 16 || request.stop.iter().any(String::is_empty)) {
            return Err(PluginError::invalid("at most 16 stop texts, none empty"));
        }
        let mut prompt = match request.input {
            Input::Text(text) => text,
            Input::Messages(turns) => turns.into_iter().map(|turn| turn.content).collect(),
            Input::Tokens(_) => return Err(PluginError::invalid("no tokens")),
        };
        let words = |text: &str| text.split_inclusive(' ').map(str::to_owned).collect::<Vec<_>>();
        let prompt_tokens = words(&prompt).len() as u32;
        let limit = request.max_tokens.unwrap_or(1);
        if prompt_tokens.saturating_add(limit) > CONTEXT && !self.has("takes-all") {
            return Err(PluginError::new(Code::TooLong, format!("over the context of {CONTEXT}")));
        }
        let slot = self.slots.clone().try_acquire_owned();
        let mut slot = Some(slot.map_err(|_| PluginError::new(Code::Overloaded, "busy").retry_after(Duration::from_millis(5)))?);
        let number = self.answers.fetch_add(1, Ordering::Relaxed);
        if self.has("ignores-seed") {
            prompt.insert_str(0, &format!("{number} "));
        }
        let limit = if self.has("ignores-max-tokens") { usize::MAX } else { limit as usize };
        let said: String = words(&prompt).into_iter().take(limit).collect();
        let stop = request.stop.iter().filter(|_| !self.has("ignores-stop")).filter_map(|stop| said.find(stop.as_str())).min();
        let finish = if stop.is_none() && said.len() < prompt.len() { Finish::Length } else { Finish::Stop };
        let said = words(&said[..stop.unwrap_or(said.len())]);

        let fault = self.fault.clone();
        let (sender, stream) = Stream::channel(4);
        tokio::spawn(async move {
            let mut usage = Usage { prompt_tokens, completion_tokens: said.len() as u32, cached_tokens: 0 };
            for text in said {
                if sender.send(Chunk::Text(Text { text, tokens: 1, logprobs: Vec::new() })).await.is_err()
                    && fault == "leaks-slot"
                {
                    slot.take().into_iter().for_each(tokio::sync::OwnedSemaphorePermit::forget);
                }
            }
            if fault == "one-slot" {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            if fault == "miscounts" {
                usage.completion_tokens += 2;
            }
            if fault != "no-done" {
                // The consumer may have gone.
                let _ = sender.send(Chunk::Done(Done { finish, usage, timings: Timings::default() })).await;
            }
            drop(slot);
        });
        Ok(stream)
    }

    async fn embed(&self, _: &Cx, request: Embed) -> Result<Embeddings> {
        self.known(&request.model)?;
        let vector = |input: &Input| {
            let Input::Text(text) = input else { return vec![1.0, 0.0] };
            let angle = text.len() as f32 / 100.0;
            if self.has("long-vectors") { vec![angle, 2.0] } else { vec![angle.cos(), angle.sin()] }
        };
        Ok(Embeddings { vectors: request.inputs.iter().map(vector).collect(), prompt_tokens: 1 })
    }
}

#[async_trait]
impl Storage for Faulty {
    async fn put(&self, _: &Cx, expect: Expect, mut data: Stream<Blob>) -> Result<Entry> {
        let mut bytes = Vec::new();
        while let Some(piece) = data.next().await {
            match piece {
                Ok(piece) => bytes.extend_from_slice(&piece),
                Err(error) if !self.has("stores-half") => return Err(error),
                Err(_) => break,
            }
        }
        let entry = Entry { id: blake3::hash(&bytes).to_hex().to_string(), size: bytes.len() as u64 };
        let wrong = expect.id.is_some_and(|id| id != entry.id) || expect.size.is_some_and(|size| size != entry.size);
        if wrong && !self.has("ignores-expect") {
            return Err(PluginError::invalid("other bytes were announced"));
        }
        if self.has("changes-bytes")
            && let Some(first) = bytes.first_mut()
        {
            *first ^= 1;
        }
        self.blobs.lock().insert(entry.id.clone(), bytes.into());
        Ok(entry)
    }

    async fn get(&self, _: &Cx, id: String, range: Range) -> Result<Stream<Blob>> {
        let bytes = self.blobs.lock().get(&id).cloned().ok_or_else(|| PluginError::not_found("no such blob"))?;
        let size = bytes.len() as u64;
        if range.offset > size {
            return Err(PluginError::invalid("past the end"));
        }
        let mut end = range.offset.saturating_add(range.length.unwrap_or(u64::MAX)).min(size);
        if self.has("short-ranges") && range.length.is_some() {
            end = end.saturating_sub(1).max(range.offset);
        }
        let (start, end) = (range.offset as usize, end as usize);
        let pieces = (start..end).step_by(1 << 20).map(move |at| Blob::from(&bytes[at..end.min(at + (1 << 20))]));
        if self.has("piles-up") {
            // All pieces at once, whether or not anybody reads.
            let (sender, stream) = Stream::channel(1 << 20);
            let copies: Vec<Blob> = pieces.collect();
            tokio::spawn(async move {
                for piece in copies {
                    if sender.send(piece).await.is_err() {
                        return;
                    }
                }
            });
            return Ok(stream);
        }
        Ok(Stream::from_items(pieces))
    }

    async fn head(&self, _: &Cx, id: String) -> Result<Entry> {
        match self.blobs.lock().get(&id) {
            Some(bytes) => Ok(Entry { id, size: bytes.len() as u64 }),
            None if self.has("finds-all") => Ok(Entry { id, size: 0 }),
            None => Err(PluginError::not_found("no such blob")),
        }
    }

    async fn delete(&self, _: &Cx, id: String) -> Result<bool> {
        let mut blobs = self.blobs.lock();
        if self.has("keeps-deleted") { Ok(blobs.contains_key(&id)) } else { Ok(blobs.remove(&id).is_some()) }
    }

    async fn list(&self, _: &Cx) -> Result<Stream<Entry>> {
        let mut all: Vec<Entry> =
            self.blobs.lock().iter().map(|(id, bytes)| Entry { id: id.clone(), size: bytes.len() as u64 }).collect();
        match self.fault.as_str() {
            "unordered" => all.reverse(),
            "lists-twice" => all.extend(all.clone()),
            _ => {}
        }
        Ok(Stream::from_items(all))
    }
}
