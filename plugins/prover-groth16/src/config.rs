//! What the operator may set.

use std::collections::HashSet;
use std::path::PathBuf;

use fabstir_plugin_api::prelude::*;

/// The `config` table of a prover-groth16 entry in `plugins.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The models whose output heads can be proven, besides the statement `commitment`. Default: `[]`.
    /// Example: `[{ name = "tiny-chat", path = "models/tiny-chat/tiny-chat-q8_0.gguf" }]`.
    pub models: Vec<ModelConfig>,
    /// How many positions of an answer the contract that checks a head draws, 1 to 8: each costs a proof, and about 260,000 gas. It is part
    /// of the program of a head: with another number, another contract has to be named to the market. Default: `4`. Example: `2`.
    pub samples: u32,
    /// Threads that prove and make keys. Default: `1`. Example: `4`.
    pub threads: u32,
    /// The most memory that making keys or proving may need by estimate, in MiB: more is refused before it begins. Default: `2048`.
    /// Example: `8192`.
    pub max_memory_mib: u64,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Its name in the statement `output-head:NAME`: letters, digits, `.`, `_` and `-`, at most 64. Example: `tiny-chat`.
    pub name: String,
    /// The GGUF file, one file with its output head in F32, F16, BF16 or Q8_0. A relative path starts at the working directory of the
    /// process. Example: `models/tiny-chat/tiny-chat-q8_0.gguf`.
    pub path: PathBuf,
    /// The digest that the model has on the market, 64 lower-case hexadecimal digits: needed where it is served with another chat
    /// template than the one in its file, and it spares reading a large file at every start. Default: made from the file.
    /// Example: `f3a6...`.
    #[serde(default)]
    pub digest: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { models: Vec::new(), samples: 4, threads: 1, max_memory_mib: 2048 }
    }
}

impl Config {
    /// Refuses values that fit their types and make no sense.
    pub fn check(&self) -> Result<()> {
        let within = |key: &str, value: u64, most: u64| match value {
            value if (1..=most).contains(&value) => Ok(()),
            _ => Err(PluginError::invalid(format!("`{key}` is {value}: set it to 1 to {most}"))),
        };
        within("samples", self.samples.into(), 8)?;
        within("threads", self.threads.into(), 1024)?;
        within("max_memory_mib", self.max_memory_mib, 1 << 24)?;
        let mut names = HashSet::new();
        for ModelConfig { name, digest, .. } in &self.models {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            if name.is_empty() || name.len() > 64 || !name.bytes().all(allowed) {
                return Err(PluginError::invalid("a model's `name` has 1 to 64 letters, digits, `.`, `_` and `-`"));
            }
            if !names.insert(name) {
                return Err(PluginError::invalid(format!("two models are called `{name}`: give each a name of its own")));
            }
            if digest.as_deref().is_some_and(|digest| !is_digest(digest)) {
                return Err(PluginError::invalid(format!("the `digest` of `{name}` has not 64 lower-case hexadecimal digits")));
            }
        }
        Ok(())
    }
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str) -> Result<Config, String> {
        let config: Config = serde_json::from_str(json).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.message)?;
        Ok(config)
    }

    #[test]
    fn every_key_has_a_default() {
        let config = check("{}").unwrap();
        assert_eq!((config.models.len(), config.samples, config.threads, config.max_memory_mib), (0, 4, 1, 2048));
    }

    #[test]
    fn numbers_out_of_range_are_refused_by_name() {
        for key in ["samples", "threads", "max_memory_mib"] {
            assert!(check(&format!(r#"{{"{key}": 0}}"#)).unwrap_err().contains(key));
            assert!(check(&format!(r#"{{"{key}": 1}}"#)).is_ok());
        }
        assert!(check(r#"{"samples": 9}"#).is_err());
    }

    #[test]
    fn models_have_names_of_their_own_and_whole_digests() {
        let model = |name: &str, rest: &str| format!(r#"{{"name": "{name}", "path": "x.gguf"{rest}}}"#);
        let models = |models: &[String]| check(&format!(r#"{{"models": [{}]}}"#, models.join(",")));
        assert!(models(&[model("a", ""), model("b", &format!(r#", "digest": "{}""#, "0f".repeat(32)))]).is_ok());
        assert!(models(&[model("a", ""), model("a", "")]).unwrap_err().contains("two models"));
        assert!(models(&[model("a/b", "")]).is_err());
        assert!(models(&[model("", "")]).is_err());
        assert!(models(&[model("a", r#", "digest": "0F""#)]).unwrap_err().contains("digest"));
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(check(r#"{"model": []}"#).unwrap_err().contains("model"));
        assert!(check(r#"{"models": [{"name": "a", "path": "b", "file": "c"}]}"#).unwrap_err().contains("file"));
    }
}
