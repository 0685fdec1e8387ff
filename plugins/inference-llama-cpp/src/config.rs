//! What an operator writes in the plugin's `config` table.

use std::collections::BTreeSet;
use std::path::PathBuf;

use fabstir_plugin_api::prelude::*;

use crate::error::Error;

/// The models that this instance may load.
///
/// ```toml
/// [[plugin.config.models]]
/// id = "tiny-chat"
/// path = "models/tiny-chat/tiny-chat-q8_0.gguf"
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The GGUF models that can be loaded, each under a name of its own. At least one.
    pub models: Vec<ModelConfig>,
}

/// One GGUF model and how to run it.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The name that clients ask for. No default. Example: `"tiny-chat"`.
    pub id: String,

    /// The GGUF file; of a split model the first part. A relative path starts at the working directory of the process.
    /// No default. Example: `"models/tiny-chat/tiny-chat-q8_0.gguf"`.
    pub path: PathBuf,

    /// Tokens that one generation may span, prompt and answer together. Default: what the model was trained on, at most 4096.
    /// Example: `8192`.
    #[serde(default)]
    pub context: Option<u32>,

    /// Generations that run at the same time, 1 to 256; each has a context of its own in memory. Default 4. Example: `8`.
    #[serde(default = "default_parallel")]
    pub parallel: u32,

    /// Layers that are computed on the GPU, counted from the last. Default: all in a build for GPUs, 0 in a build without.
    /// Example: `24`.
    #[serde(default)]
    pub gpu_layers: Option<u32>,

    /// CPU threads. Default: measured while loading, because small models are slower on two threads than on one. Example: `8`.
    #[serde(default)]
    pub threads: Option<u32>,

    /// Prompt tokens that are read in one step, 16 to 4096. While a prompt is read, other answers wait for one such step, and so
    /// does a cancel. Default: 128, in a build for GPUs 512. Example: `64`.
    #[serde(default = "default_prefill_chunk")]
    pub prefill_chunk: u32,

    /// Number format of the cached keys. Smaller ones take less memory and cost some quality. Default `"f16"`. Example: `"q8_0"`.
    #[serde(default)]
    pub cache_keys: CacheType,

    /// Number format of the cached values. Default `"f16"`. Example: `"q8_0"`.
    #[serde(default)]
    pub cache_values: CacheType,
}

/// A number format of the KV cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CacheType {
    F32,
    #[default]
    F16,
    Bf16,
    #[serde(rename = "q8_0")]
    Q8,
    #[serde(rename = "q4_0")]
    Q4,
}

impl CacheType {
    pub(crate) fn ggml(self) -> llama_cpp_sys_2::ggml_type {
        match self {
            CacheType::F32 => llama_cpp_sys_2::GGML_TYPE_F32,
            CacheType::F16 => llama_cpp_sys_2::GGML_TYPE_F16,
            CacheType::Bf16 => llama_cpp_sys_2::GGML_TYPE_BF16,
            CacheType::Q8 => llama_cpp_sys_2::GGML_TYPE_Q8_0,
            CacheType::Q4 => llama_cpp_sys_2::GGML_TYPE_Q4_0,
        }
    }

    /// Bytes that 32 values take; the quantised formats store blocks of 32 with a scale.
    pub(crate) fn bytes_per_32(self) -> u64 {
        match self {
            CacheType::F32 => 128,
            CacheType::F16 | CacheType::Bf16 => 64,
            CacheType::Q8 => 34,
            CacheType::Q4 => 18,
        }
    }
}

/// Whether this build computes on GPUs.
pub const GPU_BUILD: bool = cfg!(any(feature = "cuda", feature = "vulkan", feature = "metal"));

/// llama.cpp's own limit on sequences in one context.
const MOST_PARALLEL: u32 = 256;

fn default_parallel() -> u32 {
    4
}

fn default_prefill_chunk() -> u32 {
    if GPU_BUILD { 512 } else { 128 }
}

impl ModelConfig {
    /// A model with every setting at its default.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            context: None,
            parallel: default_parallel(),
            gpu_layers: None,
            threads: None,
            prefill_chunk: default_prefill_chunk(),
            cache_keys: CacheType::default(),
            cache_values: CacheType::default(),
        }
    }

    fn validate(&self) -> Result<(), String> {
        let id = &self.id;
        if id.is_empty() {
            return Err("a model has an empty `id`: give it the name that clients ask for".into());
        }
        if !(1..=MOST_PARALLEL).contains(&self.parallel) {
            return Err(format!("model `{id}`: `parallel` is {}, it must be 1 to {MOST_PARALLEL}", self.parallel));
        }
        if !(16..=4096).contains(&self.prefill_chunk) {
            return Err(format!("model `{id}`: `prefill_chunk` is {}, it must be 16 to 4096", self.prefill_chunk));
        }
        if self.threads == Some(0) {
            return Err(format!("model `{id}`: `threads` is 0: leave it out to have it measured"));
        }
        if self.context.is_some_and(|context| context < 16) {
            return Err(format!("model `{id}`: `context` must be at least 16 tokens"));
        }
        if self.gpu_layers.is_some_and(|layers| layers > 0) && !GPU_BUILD {
            return Err(format!(
                "model `{id}`: `gpu_layers` needs a build of this plugin for a GPU (feature cuda, vulkan or metal): leave it out"
            ));
        }
        Ok(())
    }
}

impl Config {
    /// Checks what the schema cannot say.
    pub fn validate(&self) -> Result<(), Error> {
        if self.models.is_empty() {
            return Err(Error::Config("`models` is empty: name at least one GGUF file".into()));
        }
        let mut ids = BTreeSet::new();
        for model in &self.models {
            model.validate().map_err(Error::Config)?;
            if !ids.insert(model.id.as_str()) {
                return Err(Error::Config(format!("two models are called `{}`: ids must differ", model.id)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Config, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    fn refusal(model: &str) -> String {
        let config = parse(&format!("{{\"models\": [{model}]}}")).expect("parses");
        config.validate().expect_err("is refused").to_string()
    }

    #[test]
    fn two_keys_are_enough() {
        let config = parse(r#"{"models": [{"id": "a", "path": "a.gguf"}]}"#).unwrap();
        config.validate().unwrap();
        assert_eq!(config.models[0], ModelConfig::new("a", "a.gguf"));
    }

    #[test]
    fn every_key_is_read() {
        let config = parse(
            r#"{"models": [{"id": "a", "path": "a.gguf", "context": 512, "parallel": 2, "gpu_layers": 0, "threads": 3,
                "prefill_chunk": 64, "cache_keys": "q8_0", "cache_values": "bf16"}]}"#,
        )
        .unwrap();
        config.validate().unwrap();
        let model = &config.models[0];
        assert_eq!((model.context, model.parallel, model.gpu_layers), (Some(512), 2, Some(0)));
        assert_eq!((model.threads, model.prefill_chunk), (Some(3), 64));
        assert_eq!((model.cache_keys, model.cache_values), (CacheType::Q8, CacheType::Bf16));
    }

    #[test]
    fn unknown_keys_are_refused() {
        let error = parse(r#"{"models": [{"id": "a", "path": "a", "contxt": 1}]}"#).unwrap_err();
        assert!(error.contains("contxt"), "{error}");
        let error = parse(r#"{"models": [], "model": 1}"#).unwrap_err();
        assert!(error.contains("`model`"), "{error}");
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (model, word) in [
            (r#"{"id": "", "path": "a"}"#, "`id`"),
            (r#"{"id": "a", "path": "a", "parallel": 0}"#, "`parallel`"),
            (r#"{"id": "a", "path": "a", "parallel": 257}"#, "`parallel`"),
            (r#"{"id": "a", "path": "a", "prefill_chunk": 8}"#, "`prefill_chunk`"),
            (r#"{"id": "a", "path": "a", "threads": 0}"#, "`threads`"),
            (r#"{"id": "a", "path": "a", "context": 1}"#, "`context`"),
            (r#"{"id": "a", "path": "a"}, {"id": "a", "path": "b"}"#, "two models"),
        ] {
            let error = refusal(model);
            assert!(error.contains(word), "{error}");
        }
        assert!(parse(r#"{"models": []}"#).unwrap().validate().is_err());
    }

    #[test]
    #[cfg(not(any(feature = "cuda", feature = "vulkan", feature = "metal")))]
    fn gpu_layers_need_a_gpu_build() {
        assert!(refusal(r#"{"id": "a", "path": "a", "gpu_layers": 1}"#).contains("`gpu_layers`"));
    }
}
