//! How chat answers look on the wire.

use std::borrow::Cow;

use fabstir_plugin_api::inference::{Finish, Text, TokenLogprob, Usage};
use serde::Serialize;

use crate::gateway::reply::{Head, Shape, WireUsage, finish_reason, json, wire_logprob};

pub(in crate::gateway) struct Chat {
    pub logprobs: bool,
}

#[derive(Serialize)]
struct Chunk<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [ChunkChoice<'a>],
    /// Null in every chunk but the last where usage was asked for, absent where not.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<WireUsage>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[derive(Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    head: &'a Head,
    choices: [Choice<'a>; 1],
    usage: WireUsage,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    message: Said<'a>,
    logprobs: Option<Logprobs<'a>>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct Said<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

struct Logprobs<'a>(&'a [TokenLogprob]);

impl Serialize for Logprobs<'_> {
    fn serialize<S: serde::Serializer>(&self, json: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Content<'a> {
            content: Vec<Token<'a>>,
            refusal: Option<()>,
        }
        #[derive(Serialize)]
        struct Token<'a> {
            #[serde(flatten)]
            one: Alternative<'a>,
            top_logprobs: Vec<Alternative<'a>>,
        }
        #[derive(Serialize)]
        struct Alternative<'a> {
            token: Cow<'a, str>,
            logprob: f32,
            bytes: &'a [u8],
        }
        fn alternative(bytes: &[u8], logprob: f32) -> Alternative<'_> {
            Alternative { token: String::from_utf8_lossy(bytes), logprob: wire_logprob(logprob), bytes }
        }
        let content = self.0.iter().map(|token| Token {
            one: alternative(&token.bytes, token.logprob),
            top_logprobs: token.top.iter().map(|top| alternative(&top.bytes, top.logprob)).collect(),
        });
        Content { content: content.collect(), refusal: None }.serialize(json)
    }
}

impl Chat {
    fn chunk(
        &self,
        head: &Head,
        delta: Delta<'_>,
        logprobs: &[TokenLogprob],
        finish: Option<&'static str>,
        usage: bool,
    ) -> String {
        let logprobs = (self.logprobs && finish.is_none() && delta.role.is_none()).then_some(Logprobs(logprobs));
        let choice = ChunkChoice { index: 0, delta, logprobs, finish_reason: finish };
        json(&Chunk { head, choices: &[choice], usage: usage.then_some(None) })
    }
}

impl Shape for Chat {
    const ID: &'static str = "chatcmpl-";
    const OBJECT: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";

    fn opening(&mut self, head: &Head, usage: bool) -> Option<String> {
        let delta = Delta { role: Some("assistant"), content: Some("") };
        Some(self.chunk(head, delta, &[], None, usage))
    }

    fn piece(&mut self, head: &Head, text: &Text, usage: bool) -> String {
        let delta = Delta { role: None, content: Some(&text.text) };
        self.chunk(head, delta, &text.logprobs, None, usage)
    }

    fn closing(&mut self, head: &Head, finish: Finish, usage: bool) -> String {
        self.chunk(head, Delta::default(), &[], Some(finish_reason(finish)), usage)
    }

    fn usage(&mut self, head: &Head, usage: Usage) -> String {
        json(&Chunk { head, choices: &[], usage: Some(Some(usage.into())) })
    }

    fn whole(self, head: &Head, text: &str, logprobs: &[TokenLogprob], finish: Finish, usage: Usage) -> String {
        let choice = Choice {
            index: 0,
            message: Said { role: "assistant", content: text, refusal: None },
            logprobs: self.logprobs.then_some(Logprobs(logprobs)),
            finish_reason: finish_reason(finish),
        };
        json(&Whole { head, choices: [choice], usage: usage.into() })
    }
}
