//! `POST /v1/completions`: text in, more of it out, and no template between.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use fabstir_plugin_api::inference::{Finish, Generation, Input, Text, TokenLogprob, Usage};
use serde::Serialize;

use super::Edge;
use super::common::{self, Common, MOST_LOGPROBS};
use super::error::ApiError;
use super::fields::Fields;
use super::limits;
use super::prompt::Prompts;
use super::reply::{Head, Shape, WireUsage, finish_reason, json, reply, wire_logprob};

const KEYS: &[&str] = &["prompt", "logprobs", "echo", "suffix", "best_of"];

/// OpenAI's default length for this form.
const MAX_TOKENS: u32 = 16;

pub(super) async fn handle(State(edge): State<Arc<Edge>>, request: Request) -> Result<Response, ApiError> {
    let (caller, body) = limits::json_body(&edge, request).await?;
    let (common, generation) = parse(&body, caller.key())?;
    drop(body);
    let shape = Completion { logprobs: generation.logprobs, offset: 0 };
    reply(&edge, caller, &common, generation, shape).await
}

fn parse(body: &[u8], key: Option<&str>) -> Result<(Common, Generation), ApiError> {
    let mut fields = Fields::parse(body, &[common::KEYS, KEYS])?;
    fields.only("echo", &["false"], "this node does not repeat the prompt; leave it out")?;
    fields.only("suffix", &["\"\""], "this node does not fill in between; leave it out")?;
    fields.only("best_of", &["1"], "this node gives one answer per request; leave it out")?;
    let common = Common::take(&mut fields, key)?;
    let logprobs = match fields.take::<u32>("logprobs")? {
        Some(top) if top > MOST_LOGPROBS => {
            return Err(ApiError::invalid("logprobs", format!("`logprobs` is at most {MOST_LOGPROBS}, and is {top}")));
        }
        logprobs => logprobs,
    };
    let Prompts(mut prompts) = fields.require("prompt")?;
    let input = match (prompts.pop(), prompts.is_empty()) {
        (Some(input), true) => input,
        (None, _) => return Err(ApiError::invalid("prompt", "`prompt` is empty")),
        (Some(_), false) => {
            let message = "`prompt`: this node takes one prompt per request; send one request for each";
            return Err(ApiError::unsupported("prompt", message));
        }
    };
    if matches!(&input, Input::Tokens(tokens) if tokens.is_empty()) {
        return Err(ApiError::invalid("prompt", "`prompt` is empty"));
    }
    let generation = Generation {
        model: common.model.clone(),
        input,
        sampling: common.sampling.clone(),
        max_tokens: Some(common.max_tokens.unwrap_or(MAX_TOKENS)),
        stop: common.stop.clone(),
        format: common.format.clone(),
        logprobs,
        cache_salt: common.cache_salt.clone(),
        priority: 0,
    };
    Ok((common, generation))
}

/// How plain completions look.
struct Completion {
    logprobs: Option<u32>,
    /// Characters of the answer so far: where the next token begins.
    offset: usize,
}

#[derive(Serialize)]
struct Body<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [Choice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<WireUsage>>,
}

#[derive(Serialize)]
struct Choice<'a> {
    text: &'a str,
    index: u32,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
}

/// The lists run in parallel, one entry per token.
#[derive(Serialize)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Option<Vec<BTreeMap<String, f32>>>,
    text_offset: Vec<usize>,
}

impl Completion {
    fn logprobs(&mut self, tokens: &[TokenLogprob]) -> Option<Logprobs> {
        let top = self.logprobs?;
        let mut lists = Logprobs {
            tokens: Vec::with_capacity(tokens.len()),
            token_logprobs: Vec::with_capacity(tokens.len()),
            top_logprobs: (top > 0).then(Vec::new),
            text_offset: Vec::with_capacity(tokens.len()),
        };
        for token in tokens {
            lists.tokens.push(String::from_utf8_lossy(&token.bytes).into_owned());
            lists.token_logprobs.push(wire_logprob(token.logprob));
            if let Some(alternatives) = &mut lists.top_logprobs {
                let named =
                    token.top.iter().map(|top| (String::from_utf8_lossy(&top.bytes).into_owned(), wire_logprob(top.logprob)));
                alternatives.push(named.collect());
            }
            lists.text_offset.push(self.offset);
            // A character starts with a byte that is not a continuation, and may end in a later token.
            self.offset += token.bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
        }
        Some(lists)
    }

    fn chunk(&self, head: &Head, text: &str, logprobs: Option<Logprobs>, finish: Option<&'static str>, usage: bool) -> String {
        let choice = Choice { text, index: 0, logprobs, finish_reason: finish };
        json(&Body { head, choices: &[choice], usage: usage.then_some(None) })
    }
}

impl Shape for Completion {
    const ID: &'static str = "cmpl-";
    const OBJECT: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";

    fn opening(&mut self, _: &Head, _: bool) -> Option<String> {
        None
    }

    fn piece(&mut self, head: &Head, text: &Text, usage: bool) -> String {
        let logprobs = self.logprobs(&text.logprobs);
        self.chunk(head, &text.text, logprobs, None, usage)
    }

    fn closing(&mut self, head: &Head, finish: Finish, usage: bool) -> String {
        self.chunk(head, "", None, Some(finish_reason(finish)), usage)
    }

    fn usage(&mut self, head: &Head, usage: Usage) -> String {
        json(&Body { head, choices: &[], usage: Some(Some(usage.into())) })
    }

    fn whole(mut self, head: &Head, text: &str, logprobs: &[TokenLogprob], finish: Finish, usage: Usage) -> String {
        let logprobs = self.logprobs(logprobs);
        let choice = Choice { text, index: 0, logprobs, finish_reason: Some(finish_reason(finish)) };
        json(&Body { head, choices: &[choice], usage: Some(Some(usage.into())) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_length_is_openais() {
        let (_, generation) = parse(br#"{"model": "m", "prompt": "once"}"#, None).expect("good");
        assert_eq!((generation.max_tokens, generation.input), (Some(16), Input::Text("once".into())));
        let (_, generation) = parse(br#"{"model": "m", "prompt": [[1, 2]], "max_tokens": 9}"#, None).expect("good");
        assert_eq!((generation.max_tokens, generation.input), (Some(9), Input::Tokens(vec![1, 2])));
    }

    #[test]
    fn what_this_node_does_not_do_is_refused_by_name() {
        for (setting, expected) in [
            (r#""echo": true"#, "echo"),
            (r#""suffix": "end""#, "suffix"),
            (r#""best_of": 2"#, "best_of"),
            (r#""logprobs": 21"#, "logprobs"),
            (r#""logprobs": true"#, "logprobs"),
            (r#""messages": []"#, "messages"),
        ] {
            let error = parse(format!(r#"{{"model": "m", "prompt": "x", {setting}}}"#).as_bytes(), None).expect_err(setting);
            assert_eq!(error.body()["error"]["param"], expected);
        }
        for prompt in ["[]", r#"["a", "b"]"#, "[[]]", "7"] {
            let error = parse(format!(r#"{{"model": "m", "prompt": {prompt}}}"#).as_bytes(), None).expect_err(prompt);
            assert_eq!(error.body()["error"]["param"], "prompt");
        }
    }

    #[test]
    fn offsets_count_characters_over_split_ones() {
        let token = |bytes: &[u8]| TokenLogprob { token: 0, bytes: bytes.into(), logprob: -1.0, top: Vec::new() };
        let mut shape = Completion { logprobs: Some(0), offset: 0 };
        let first = shape.logprobs(&[token(b"ab"), token(&[0xC3]), token(&[0xA9]), token(b"c")]).expect("asked for");
        assert_eq!(first.text_offset, [0, 2, 3, 3]);
        let second = shape.logprobs(&[token(b"d")]).expect("asked for");
        assert_eq!(second.text_offset, [4]);
        assert!(first.top_logprobs.is_none());
    }
}
