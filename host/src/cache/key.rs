//! What an answer depends on, as 32 bytes.

use fabstir_plugin_api::inference::{Format, Generation, Input, Sampling};
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::routes::Routes;
use crate::scheduler::ServedModelInfo;

/// The name of an answer: BLAKE3 of everything that it depends on. Two requests with the same key are the same request, from the same tenant,
/// to the same model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Key(pub [u8; 32]);

/// Part of every key: a later encoding of the same request shares no key with this one.
const ENCODING: &[u8] = b"fabstir cached answer 1\n";
const SPACE: &[u8] = b"fabstir space of questions 1\n";

/// The model that has to have given an answer.
///
/// Where the plugin knows a digest of the file and its chat template, that is the model, whoever serves it under whatever name. Otherwise it is
/// the model's name in this plugin, as the plugin's file and its settings are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    Digest(String),
    Name { plugin: String, setup: String, model: String },
}

impl Identity {
    /// The identity of a model that `plugin` serves at this moment.
    pub fn new(digest: Option<&str>, plugin: &str, model: &str, routes: &Routes) -> Identity {
        if let Some(digest) = digest {
            return Identity::Digest(digest.to_owned());
        }
        let route = routes.inference.iter().find(|route| route.plugin == plugin);
        let setup = route.map(|route| route.setup.clone()).unwrap_or_default();
        Identity::Name { plugin: plugin.to_owned(), setup, model: model.to_owned() }
    }
}

/// The canonical encoding: the order of the fields is the order here, maps are sorted by key, and a number is written in one way only.
#[derive(Serialize)]
struct Asked<'a> {
    tenant: &'a str,
    model: &'a Identity,
    /// Chat templates may tell the model the date.
    day: i64,
    /// Where the client sets no limit, an answer ends with the context.
    context: u32,
    input: &'a Input,
    sampling: &'a Sampling,
    max_tokens: Option<u32>,
    stop: &'a [String],
    format: &'a Format,
    logprobs: Option<u32>,
}

impl Key {
    /// The key of a request. Its tenant is its cache salt; its priority changes nothing in the answer.
    pub fn new(identity: &Identity, model: &ServedModelInfo, request: &Generation) -> Key {
        Key::of(ENCODING, identity, model, request)
    }

    /// What requests have in common that differ in their question alone, which `request` has without it, and whose vectors `embedder` made.
    pub fn of_space(identity: &Identity, model: &ServedModelInfo, embedder: &Identity, request: &Generation) -> Key {
        let rest = Key::of(SPACE, identity, model, request);
        let embedder = serde_json::to_vec(embedder).expect("texts are JSON");
        Key(*blake3::keyed_hash(&rest.0, &embedder).as_bytes())
    }

    fn of(encoding: &[u8], identity: &Identity, model: &ServedModelInfo, request: &Generation) -> Key {
        let Generation { input, sampling, max_tokens, stop, format, logprobs, cache_salt, model: _, priority: _ } = request;
        let asked = Asked {
            tenant: cache_salt,
            model: identity,
            day: clock::local_day(),
            context: model.context,
            input,
            sampling,
            max_tokens: *max_tokens,
            stop,
            format,
            logprobs: *logprobs,
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(encoding);
        serde_json::to_writer(&mut hasher, &asked).expect("texts and numbers are JSON, and a hasher takes any bytes");
        Key(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::tests::request;

    fn model(digest: Option<&str>) -> ServedModelInfo {
        let digest = digest.map(str::to_owned);
        ServedModelInfo { id: "m".into(), plugin: "p".into(), context: 100, parallel: 1, digest, generates: true }
    }

    fn key(model: &ServedModelInfo, request: &Generation) -> Key {
        Key::new(&Identity::new(model.digest.as_deref(), &model.plugin, &model.id, &Routes::default()), model, request)
    }

    #[test]
    fn everything_that_changes_the_answer_changes_the_key() {
        let base = request("hello");
        let sampled = |change: fn(&mut Sampling)| {
            let mut request = request("hello");
            change(&mut request.sampling);
            request
        };
        let others = [
            request("hello "),
            Generation { input: Input::Tokens(vec![1]), ..base.clone() },
            Generation { cache_salt: "other".into(), ..base.clone() },
            Generation { max_tokens: Some(5), ..base.clone() },
            Generation { stop: vec!["x".into()], ..base.clone() },
            Generation { format: Format::Json, ..base.clone() },
            Generation { logprobs: Some(0), ..base.clone() },
            sampled(|sampling| sampling.temperature = 0.0),
            sampled(|sampling| sampling.seed = Some(0)),
            sampled(|sampling| sampling.top_p = 0.5),
            sampled(|sampling| sampling.logit_bias = [(1, 1.0)].into()),
        ];
        let mut keys: Vec<Key> = others.iter().map(|other| key(&model(None), other)).collect();
        keys.push(key(&model(None), &base));
        keys.push(key(&model(Some("d")), &base));
        keys.push(key(&ServedModelInfo { context: 99, ..model(None) }, &base));
        for (i, one) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|other| other != one), "{i}");
        }
    }

    #[test]
    fn a_models_name_is_no_part_of_it_where_the_file_is_known() {
        let renamed = ServedModelInfo { id: "n".into(), plugin: "q".into(), ..model(Some("d")) };
        let base = request("hello");
        assert_eq!(key(&model(Some("d")), &base), key(&renamed, &Generation { model: "n".into(), priority: 9, ..base }));
    }
}
