//! What the operator may set.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fabstir_plugin_api::prelude::*;

const MEMORY: u64 = 4 << 30;
const PREPARE: u64 = 1_800_000;
const PROVE: u64 = 600_000;
const SCALE: u32 = 7;
const MAX_K: u32 = 16;

/// The largest circuit that the wheel's own set-up makes in a sensible time.
const LARGEST_K: u32 = 22;

/// The `config` table of a prover-ezkl entry in `plugins.toml`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The Python interpreter that has ezkl 23.0.5. A relative path starts at the folder of the configuration file.
    /// Default: `$XDG_CACHE_HOME/fabstir-node/ezkl/bin/python3`, where `make ezkl` puts it (`~/.cache` where XDG_CACHE_HOME is not set).
    /// Example: "/opt/ezkl/bin/python3".
    pub python: Option<PathBuf>,
    /// The most memory that one worker process may take, in bytes. There are two: one makes proofs, one checks them.
    /// Default: `4294967296` (4 GiB). Example: 8589934592.
    pub memory_bytes: Option<u64>,
    /// Threads of a worker. Default: one for each processor. Example: 2.
    pub threads: Option<u32>,
    /// The longest that one step of making keys may take, in milliseconds. Default: `1800000`. Example: 7200000.
    pub prepare_timeout_ms: Option<u64>,
    /// The longest that one step of making or checking a proof may take, in milliseconds. Default: `600000`. Example: 1800000.
    pub prove_timeout_ms: Option<u64>,
    /// ONNX models that can be proven, each as the statement `onnx-model:NAME`. Default: none.
    /// Example: [{ name = "classifier", path = "plugins/prover-ezkl/examples/classifier.onnx" }].
    pub models: Vec<ModelConfig>,
}

/// A small model to be proven end to end.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The name in the statement: lower-case letters, digits, `-`, `_` and `.`. Example: "classifier".
    pub name: String,
    /// The ONNX file: one input. A relative path starts at the folder of the configuration file. Example: "models/classifier.onnx".
    pub path: PathBuf,
    /// A JSON file with examples of the input, `[[0.1, 0.2], [0.3, 0.4]]`, each flattened in row-major order. From them comes how much
    /// room the circuit has for numbers that are looked up in tables. Default: eight rows of normally distributed numbers.
    /// Example: "models/classifier.examples.json".
    #[serde(default)]
    pub calibration: Option<PathBuf>,
    /// The binary places that numbers keep behind the point: what is proven is the model with numbers so rounded.
    /// Default: `7`. Example: 10.
    #[serde(default)]
    pub scale: Option<u32>,
    /// The largest circuit, as the binary logarithm of its rows. At 16 a proof takes about 45 s of processor time and 2.2 GB of memory,
    /// and each step more about doubles both. Default: `16`. Example: 17.
    #[serde(default)]
    pub max_k: Option<u32>,
}

impl Config {
    /// The interpreter.
    pub fn python(&self) -> PathBuf {
        if let Some(python) = &self.python {
            return python.clone();
        }
        let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cache = folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
        cache.unwrap_or_default().join("fabstir-node/ezkl/bin/python3")
    }

    pub fn memory(&self) -> u64 {
        self.memory_bytes.unwrap_or(MEMORY)
    }

    pub fn prepare_timeout(&self) -> Duration {
        Duration::from_millis(self.prepare_timeout_ms.unwrap_or(PREPARE))
    }

    pub fn prove_timeout(&self) -> Duration {
        Duration::from_millis(self.prove_timeout_ms.unwrap_or(PROVE))
    }

    /// Refuses values that fit their types and make no sense.
    pub fn check(&self) -> Result<()> {
        for (key, value) in [("prepare_timeout_ms", self.prepare_timeout_ms), ("prove_timeout_ms", self.prove_timeout_ms)] {
            if value == Some(0) {
                return Err(PluginError::invalid(format!(
                    "`{key}` is 0, so nothing would ever end in time: leave it out for the default"
                )));
            }
        }
        if self.threads == Some(0) {
            return Err(PluginError::invalid("`threads` is 0: leave it out for one on each processor"));
        }
        if self.memory() < 64 << 20 {
            return Err(PluginError::invalid("`memory_bytes` is below 64 MiB, which the worker needs to start"));
        }
        for (at, model) in self.models.iter().enumerate() {
            model.check()?;
            if self.models[..at].iter().any(|other| other.name == model.name) {
                return Err(PluginError::invalid(format!("two `models` are called `{}`: rename one", model.name)));
            }
        }
        Ok(())
    }
}

impl ModelConfig {
    pub fn scale(&self) -> u32 {
        self.scale.unwrap_or(SCALE)
    }

    pub fn max_k(&self) -> u32 {
        self.max_k.unwrap_or(MAX_K)
    }

    fn check(&self) -> Result<()> {
        let name = &self.name;
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte);
        if name.is_empty() || name.len() > 64 || !name.bytes().all(fits) {
            return Err(PluginError::invalid("`models.name` is 1 to 64 lower-case letters, digits, `-`, `_` and `.`"));
        }
        if !(1..=16).contains(&self.scale()) {
            return Err(PluginError::invalid(format!("`models.scale` of `{name}` is {}: take 1 to 16", self.scale())));
        }
        if !(8..=LARGEST_K).contains(&self.max_k()) {
            return Err(PluginError::invalid(format!("`models.max_k` of `{name}` is {}: take 8 to {LARGEST_K}", self.max_k())));
        }
        if self.path == Path::new("") {
            return Err(PluginError::invalid(format!("`models.path` of `{name}` is empty: name an ONNX file")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str) -> String {
        let error = serde_json::from_str::<Config>(json).unwrap().check().unwrap_err();
        assert_eq!(error.code, Code::InvalidArgument);
        error.message
    }

    #[test]
    fn defaults_are_what_their_comments_say() {
        let config: Config = serde_json::from_str(r#"{"models": [{"name": "a", "path": "a.onnx"}]}"#).unwrap();
        config.check().unwrap();
        assert!(config.python().ends_with("fabstir-node/ezkl/bin/python3"));
        assert_eq!(config.memory(), 4_294_967_296);
        assert_eq!(config.prepare_timeout(), Duration::from_secs(1800));
        assert_eq!(config.prove_timeout(), Duration::from_secs(600));
        assert_eq!((config.models[0].scale(), config.models[0].max_k()), (7, 16));
    }

    #[test]
    fn each_key_refuses_what_makes_no_sense_and_says_its_name() {
        for (json, key) in [
            (r#"{"memory_bytes": 1000}"#, "memory_bytes"),
            (r#"{"threads": 0}"#, "threads"),
            (r#"{"prepare_timeout_ms": 0}"#, "prepare_timeout_ms"),
            (r#"{"prove_timeout_ms": 0}"#, "prove_timeout_ms"),
            (r#"{"models": [{"name": "A b", "path": "a"}]}"#, "models.name"),
            (r#"{"models": [{"name": "a", "path": ""}]}"#, "models.path"),
            (r#"{"models": [{"name": "a", "path": "a", "scale": 30}]}"#, "models.scale"),
            (r#"{"models": [{"name": "a", "path": "a", "max_k": 40}]}"#, "models.max_k"),
            (r#"{"models": [{"name": "a", "path": "a"}, {"name": "a", "path": "b"}]}"#, "called `a`"),
        ] {
            assert!(refused(json).contains(key), "{json}");
        }
    }

    #[test]
    fn python_is_the_interpreter_that_is_named() {
        let config: Config = serde_json::from_str(r#"{"python": "/opt/ezkl/bin/python3"}"#).unwrap();
        assert_eq!(config.python(), Path::new("/opt/ezkl/bin/python3"));
    }

    #[test]
    fn unknown_keys_are_refused() {
        for json in [r#"{"interpreter": "x"}"#, r#"{"models": [{"name": "a", "path": "a", "scales": 7}]}"#] {
            assert!(serde_json::from_str::<Config>(json).unwrap_err().to_string().contains("unknown field"));
        }
    }
}
