//! The parameters that chat and plain completions share.

use std::collections::BTreeMap;

use fabstir_plugin_api::inference::{Format, Sampling};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::error::ApiError;
use super::fields::Fields;

/// Keys that [`Common::take`] reads or refuses.
pub(super) const KEYS: &[&str] = &[
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "repeat_last_n",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "stop",
    "max_tokens",
    "grammar",
    "cache_prompt",
    "stream",
    "stream_options",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "n",
];

/// Alternatives per token; more than OpenAI gives, and than anyone reads.
pub(super) const MOST_LOGPROBS: u32 = 20;

/// What a client may ask for in either form.
#[derive(Debug)]
pub(super) struct Common {
    pub model: String,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub max_tokens: Option<u32>,
    /// `Text`, or the client's own grammar.
    pub format: Format,
    pub cache_salt: String,
    /// Whether anything of this request may be kept for a later one.
    pub cache_prompt: bool,
    pub stream: bool,
    /// Whether a stream ends with a chunk that says what it used.
    pub include_usage: bool,
}

impl Common {
    /// `key` is the client's API key, where it sent one.
    pub fn take(fields: &mut Fields<'_>, key: Option<&str>) -> Result<Self, ApiError> {
        let model: String = fields.require("model")?;
        if model.is_empty() {
            return Err(ApiError::invalid("model", "`model` is empty"));
        }
        fields.only("n", &["1"], "this node gives one answer per request; send the request again for another")?;
        fields.only("store", &["false"], "this node keeps no answers to be fetched later; leave it out")?;
        fields.only("service_tier", &["\"auto\"", "\"default\""], "this node has one tier; leave it out")?;
        // Said about the request rather than asked of the node: there is nothing to honour.
        fields.take::<BTreeMap<String, String>>("metadata")?;
        fields.take::<String>("safety_identifier")?;
        fields.take::<String>("prompt_cache_key")?;

        let user: Option<String> = fields.take("user")?;
        let cache_prompt = fields.take("cache_prompt")?.unwrap_or(true);
        let cache_salt = match cache_prompt {
            true => salt(key, user.as_deref()),
            // A salt of its own shares prefixes with nobody.
            false => uuid::Uuid::new_v4().simple().to_string(),
        };
        let (stream, include_usage) = streaming(fields)?;
        Ok(Self {
            model,
            sampling: sampling(fields)?,
            stop: stop(fields)?,
            max_tokens: max_tokens(fields, "max_tokens")?,
            format: fields.take("grammar")?.map_or(Format::Text, Format::Gbnf),
            cache_salt,
            cache_prompt,
            stream,
            include_usage,
        })
    }
}

pub(super) fn max_tokens(fields: &mut Fields<'_>, key: &'static str) -> Result<Option<u32>, ApiError> {
    match fields.take::<i64>(key)? {
        None => Ok(None),
        Some(number) => match u32::try_from(number) {
            Ok(number) if number > 0 => Ok(Some(number)),
            _ => Err(ApiError::invalid(key, format!("`{key}` must be at least 1, and is {number}: leave it out for no limit"))),
        },
    }
}

fn sampling(fields: &mut Fields<'_>) -> Result<Sampling, ApiError> {
    let default = Sampling::default();
    let bias: BTreeMap<String, f32> = fields.take("logit_bias")?.unwrap_or_default();
    let logit_bias = bias.into_iter().map(|(token, bias)| match token.parse::<u32>() {
        Ok(token) if (-100.0..=100.0).contains(&bias) => Ok((token, bias)),
        Ok(_) => Err(ApiError::invalid("logit_bias", format!("the bias of token {token} must lie between -100 and 100"))),
        Err(_) => {
            Err(ApiError::invalid("logit_bias", format!("`{}` is no token id", token.chars().take(32).collect::<String>())))
        }
    });
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0, 5.0)?.unwrap_or(default.temperature),
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(default.top_p),
        top_k: fields.take("top_k")?.unwrap_or(default.top_k),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(default.min_p),
        typical_p: fields.number("typical_p", 0.0, 1.0)?.unwrap_or(default.typical_p),
        repeat_penalty: fields.number("repeat_penalty", 0.01, 10.0)?.unwrap_or(default.repeat_penalty),
        repeat_last_n: fields.take("repeat_last_n")?.unwrap_or(default.repeat_last_n),
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(default.frequency_penalty),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(default.presence_penalty),
        logit_bias: logit_bias.collect::<Result<_, _>>()?,
        // OpenAI's seeds are 64 bits wide: both halves count, and small seeds stay what they are.
        seed: fields.take::<i64>("seed")?.map(|seed| (seed ^ (seed >> 32)) as u32),
    })
}

fn stop(fields: &mut Fields<'_>) -> Result<Vec<String>, ApiError> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a text or a list of texts")]
    enum Stop {
        One(String),
        Several(Vec<String>),
    }
    let stop = match fields.take("stop")? {
        None => Vec::new(),
        Some(Stop::One(stop)) => vec![stop],
        Some(Stop::Several(stops)) => stops,
    };
    if stop.len() > 16 {
        return Err(ApiError::invalid("stop", format!("`stop` takes at most 16 texts, and has {}", stop.len())));
    }
    if stop.iter().any(String::is_empty) {
        return Err(ApiError::invalid("stop", "`stop` holds an empty text, which would end every answer before it begins"));
    }
    Ok(stop)
}

fn streaming(fields: &mut Fields<'_>) -> Result<(bool, bool), ApiError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Options {
        include_usage: Option<bool>,
        include_obfuscation: Option<bool>,
    }
    let stream = fields.take("stream")?.unwrap_or(false);
    let options: Option<Options> = fields.take("stream_options")?;
    match options {
        Some(_) if !stream => Err(ApiError::invalid("stream_options", "`stream_options` needs `stream: true`")),
        Some(Options { include_obfuscation: Some(true), .. }) => {
            Err(ApiError::unsupported("stream_options.include_obfuscation", "this node does not pad its chunks; leave it out"))
        }
        Some(options) => Ok((stream, options.include_usage.unwrap_or(false))),
        None => Ok((stream, false)),
    }
}

/// Keeps the prompt caches of two clients apart. Hashed, so that a plugin never sees a key.
fn salt(key: Option<&str>, user: Option<&str>) -> String {
    if key.is_none() && user.is_none() {
        return String::new();
    }
    let mut hash = Sha256::new();
    for part in [key, user] {
        let part = part.unwrap_or_default();
        // The length first, so that no two pairs write the same bytes.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex::encode(&hash.finalize()[..16])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn common(body: &str) -> Result<Common, String> {
        let mut fields = Fields::parse(body.as_bytes(), &[KEYS]).expect("an object of known keys");
        Common::take(&mut fields, Some("key")).map_err(|error| error.body()["error"]["param"].as_str().unwrap_or("-").to_owned())
    }

    #[test]
    fn every_setting_arrives() {
        let body = r#"{"model": "m", "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "typical_p": 0.9,
            "repeat_penalty": 1.1, "repeat_last_n": 9, "frequency_penalty": -2, "presence_penalty": 2, "logit_bias": {"5": -100},
            "seed": 42, "stop": "end", "max_tokens": 3, "stream": true, "stream_options": {"include_usage": true}}"#;
        let common = common(body).expect("all of it is good");
        let sampling = Sampling {
            temperature: 0.0,
            top_p: 0.5,
            top_k: 7,
            min_p: 0.1,
            typical_p: 0.9,
            repeat_penalty: 1.1,
            repeat_last_n: 9,
            frequency_penalty: -2.0,
            presence_penalty: 2.0,
            logit_bias: BTreeMap::from([(5, -100.0)]),
            seed: Some(42),
        };
        assert_eq!(common.sampling, sampling);
        assert_eq!((common.stop.as_slice(), common.max_tokens), (&["end".to_owned()][..], Some(3)));
        assert!(common.stream && common.include_usage);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let wrong = [
            (r#""n": 2"#, "n"),
            (r#""temperature": -1"#, "temperature"),
            (r#""top_k": -1"#, "top_k"),
            (r#""stop": ["a", ""]"#, "stop"),
            (r#""stop": 7"#, "stop"),
            (r#""logit_bias": {"x": 1}"#, "logit_bias"),
            (r#""logit_bias": {"5": 101}"#, "logit_bias"),
            (r#""max_tokens": 0"#, "max_tokens"),
            (r#""max_tokens": -1"#, "max_tokens"),
            (r#""store": true"#, "store"),
            (r#""service_tier": "flex""#, "service_tier"),
            (r#""stream_options": {"include_usage": true}"#, "stream_options"),
            (r#""stream": true, "stream_options": {"usage": true}"#, "stream_options.usage"),
        ];
        for (setting, param) in wrong {
            assert_eq!(common(&format!(r#"{{"model": "m", {setting}}}"#)).expect_err(setting), param);
        }
        assert_eq!(common("{}").expect_err("no model"), "model");
    }

    #[test]
    fn harmless_keys_are_accepted() {
        let body = r#"{"model": "m", "n": 1, "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto"}"#;
        assert!(common(body).is_ok());
    }

    #[test]
    fn seeds_are_folded_and_small_ones_kept() {
        let seed = |seed: i64| common(&format!(r#"{{"model": "m", "seed": {seed}}}"#)).expect("good").sampling.seed;
        assert_eq!(seed(7), Some(7));
        assert_eq!(seed(i64::from(u32::MAX)), Some(u32::MAX));
        assert_ne!(seed(1 << 40), seed(0));
    }

    #[test]
    fn salts_tell_clients_apart() {
        assert_eq!(salt(None, None), "");
        let salts = [
            salt(Some("a"), None),
            salt(Some("b"), None),
            salt(Some("a"), Some("b")),
            salt(None, Some("a")),
            salt(Some("ab"), None),
        ];
        for (i, one) in salts.iter().enumerate() {
            assert!(salts[i + 1..].iter().all(|other| other != one));
        }
        let apart = |body| common(body).expect("good").cache_salt;
        assert_ne!(apart(r#"{"model": "m", "cache_prompt": false}"#), apart(r#"{"model": "m", "cache_prompt": false}"#));
        assert_eq!(apart(r#"{"model": "m", "cache_prompt": true}"#), apart(r#"{"model": "m"}"#));
    }
}
