//! `POST /v1/chat/completions`.

use std::fmt;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use fabstir_plugin_api::inference::{Format, Generation, Input, Message};
use serde::de::{self, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::Edge;
use super::common::{self, Common, MOST_LOGPROBS};
use super::error::ApiError;
use super::fields::Fields;
use super::limits;
use super::reply::reply;

mod shape;

use shape::Chat;

const KEYS: &[&str] = &[
    "messages",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "modalities",
    "audio",
    "prediction",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
];

pub(super) async fn handle(State(edge): State<Arc<Edge>>, request: Request) -> Result<Response, ApiError> {
    let (caller, body) = limits::json_body(&edge, request).await?;
    let (common, generation) = parse(&body, caller.key())?;
    drop(body);
    let shape = Chat { logprobs: generation.logprobs.is_some() };
    reply(&edge, caller, &common, generation, shape).await
}

fn parse(body: &[u8], key: Option<&str>) -> Result<(Common, Generation), ApiError> {
    let mut fields = Fields::parse(body, &[common::KEYS, KEYS])?;
    const NO_TOOLS: &str = "this node does not call tools; leave it out";
    fields.only("tools", &["[]"], NO_TOOLS)?;
    fields.only("tool_choice", &["\"none\"", "\"auto\""], NO_TOOLS)?;
    fields.only("functions", &["[]"], NO_TOOLS)?;
    fields.only("function_call", &["\"none\"", "\"auto\""], NO_TOOLS)?;
    // Says how tools would be called; without tools either value is honoured.
    fields.take::<bool>("parallel_tool_calls")?;
    if fields.take::<Vec<String>>("modalities")?.is_some_and(|modalities| modalities != ["text"]) {
        return Err(ApiError::unsupported("modalities", "`modalities`: this node answers in text only"));
    }
    fields.only("audio", &[], "this node answers in text only; leave it out")?;
    fields.only("prediction", &[], "this node takes no predicted output; leave it out")?;
    fields.only("reasoning_effort", &[], "this node cannot steer reasoning; leave it out")?;
    fields.only("verbosity", &[], "this node cannot steer verbosity; leave it out")?;
    fields.only("web_search_options", &[], "this node does not search the web; leave it out")?;

    let mut common = Common::take(&mut fields, key)?;
    let longest = common::max_tokens(&mut fields, "max_completion_tokens")?;
    if common.max_tokens.is_some() && longest.is_some() && common.max_tokens != longest {
        let message = "`max_tokens` and `max_completion_tokens` are one setting with two names, and differ";
        return Err(ApiError::invalid("max_completion_tokens", message));
    }
    common.max_tokens = common.max_tokens.or(longest);
    if let Some(format) = fields.take::<ResponseFormat>("response_format")? {
        let format = format.check()?;
        if format != Format::Text && common.format != Format::Text {
            return Err(ApiError::invalid("response_format", "`response_format` and `grammar` exclude each other"));
        }
        if format != Format::Text {
            common.format = format;
        }
    }

    let wanted = fields.take("logprobs")?.unwrap_or(false);
    let logprobs = match fields.take::<u32>("top_logprobs")? {
        Some(_) if !wanted => return Err(ApiError::invalid("top_logprobs", "`top_logprobs` needs `logprobs: true`")),
        Some(top) if top > MOST_LOGPROBS => {
            return Err(ApiError::invalid("top_logprobs", format!("`top_logprobs` is at most {MOST_LOGPROBS}, and is {top}")));
        }
        top => wanted.then_some(top.unwrap_or(0)),
    };

    let messages: Vec<WireMessage> = fields.require("messages")?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` is empty"));
    }
    let messages = messages.into_iter().enumerate().map(|(i, message)| message.check(i)).collect::<Result<_, _>>()?;
    let generation = Generation {
        model: common.model.clone(),
        input: Input::Messages(messages),
        sampling: common.sampling.clone(),
        max_tokens: common.max_tokens,
        stop: common.stop.clone(),
        format: common.format.clone(),
        logprobs,
        cache_salt: common.cache_salt.clone(),
        priority: 0,
    };
    Ok((common, generation))
}

/// A message as it comes. What clients echo from an earlier answer (`refusal: null`, `tool_calls: []`) is accepted when empty.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireMessage {
    role: String,
    content: Option<Content>,
    name: Option<String>,
    refusal: Option<IgnoredAny>,
    tool_calls: Option<Vec<IgnoredAny>>,
    function_call: Option<IgnoredAny>,
    tool_call_id: Option<IgnoredAny>,
    audio: Option<IgnoredAny>,
    annotations: Option<Vec<IgnoredAny>>,
}

impl WireMessage {
    fn check(self, index: usize) -> Result<Message, ApiError> {
        let at = |field: &str| format!("messages[{index}].{field}");
        let role = match self.role.as_str() {
            "system" | "user" | "assistant" => self.role,
            // OpenAI's newer name for the same thing; templates know the older.
            "developer" => "system".into(),
            "tool" | "function" => {
                return Err(ApiError::unsupported(at("role"), format!("`{}`: this node does not call tools", at("role"))));
            }
            _ => {
                let message = format!("`{}` must be system, developer, user or assistant", at("role"));
                return Err(ApiError::invalid(at("role"), message));
            }
        };
        let extra = [
            ("refusal", self.refusal.is_some()),
            ("tool_calls", self.tool_calls.is_some_and(|calls| !calls.is_empty())),
            ("function_call", self.function_call.is_some()),
            ("tool_call_id", self.tool_call_id.is_some()),
            ("audio", self.audio.is_some()),
            ("annotations", self.annotations.is_some_and(|annotations| !annotations.is_empty())),
        ];
        if let Some((field, _)) = extra.into_iter().find(|(_, given)| *given) {
            return Err(ApiError::unsupported(at(field), format!("`{}`: this node reads text only; leave it out", at(field))));
        }
        let Some(Content(parts)) = self.content else {
            return Err(ApiError::invalid(at("content"), format!("`{}` is missing", at("content"))));
        };
        let mut content = String::new();
        for (number, part) in parts.into_iter().enumerate() {
            match part {
                Part { kind, text: Some(text) } if kind == "text" => content.push_str(&text),
                Part { kind, .. } => {
                    let at = at(&format!("content[{number}]"));
                    let kind: String = kind.chars().take(32).collect();
                    let message =
                        format!("`{at}`: this node reads parts of type text, with a `text`; this one is of type {kind}");
                    return Err(ApiError::unsupported(at, message));
                }
            }
        }
        Ok(Message { role, content, name: self.name })
    }
}

/// A text, or a list of parts.
struct Content(Vec<Part>);

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Content;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a text or a list of parts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                self.visit_string(text.to_owned())
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
                Ok(Content(vec![Part { kind: "text".into(), text: Some(text) }]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Content, A::Error> {
                let mut content = Vec::new();
                while let Some(part) = parts.next_element()? {
                    content.push(part);
                }
                Ok(Content(content))
            }
        }
        json.deserialize_any(Either)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResponseFormat<'a> {
    #[serde(rename = "type")]
    kind: String,
    #[serde(borrow)]
    json_schema: Option<JsonSchema<'a>>,
}

/// `strict` is accepted either way: the schema is always enforced.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonSchema<'a> {
    #[serde(rename = "name")]
    _name: String,
    #[serde(borrow)]
    schema: Option<&'a RawValue>,
    #[serde(rename = "strict")]
    _strict: Option<bool>,
    #[serde(rename = "description")]
    _description: Option<String>,
}

impl ResponseFormat<'_> {
    fn check(self) -> Result<Format, ApiError> {
        match (self.kind.as_str(), self.json_schema) {
            ("text", None) => Ok(Format::Text),
            ("json_object", None) => Ok(Format::Json),
            ("json_schema", Some(JsonSchema { schema: Some(schema), .. })) => Ok(Format::JsonSchema(schema.get().to_owned())),
            ("json_schema", _) => {
                let param = "response_format.json_schema.schema";
                Err(ApiError::invalid(param, format!("`{param}` is required with the type json_schema")))
            }
            ("text" | "json_object", Some(_)) => {
                let param = "response_format.json_schema";
                Err(ApiError::invalid(param, format!("`{param}` needs the type json_schema")))
            }
            _ => {
                let message = "`response_format.type` must be text, json_object or json_schema";
                Err(ApiError::invalid("response_format.type", message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(body: &str) -> String {
        let error = parse(body.as_bytes(), None).expect_err(body);
        error.body()["error"]["param"].as_str().unwrap_or("-").to_owned()
    }

    #[test]
    fn messages_come_as_text_and_as_parts() {
        let body = r#"{"model": "m", "max_completion_tokens": 7, "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}], "name": "ann"},
            {"role": "assistant", "content": "hi", "refusal": null, "tool_calls": [], "annotations": []}]}"#;
        let (_, generation) = parse(body.as_bytes(), None).expect("good");
        let message = |role: &str, content: &str, name: Option<&str>| Message {
            role: role.into(),
            content: content.into(),
            name: name.map(Into::into),
        };
        let expected =
            vec![message("system", "be brief", None), message("user", "hello", Some("ann")), message("assistant", "hi", None)];
        assert_eq!(generation.input, Input::Messages(expected));
        assert_eq!(generation.max_tokens, Some(7));
    }

    #[test]
    fn what_this_node_does_not_do_is_refused_by_name() {
        let hello = r#""model": "m", "messages": [{"role": "user", "content": "hello"}]"#;
        for (setting, expected) in [
            (r#""tools": [{"type": "function"}]"#, "tools"),
            (r#""tool_choice": "required""#, "tool_choice"),
            (r#""modalities": ["text", "audio"]"#, "modalities"),
            (r#""audio": {}"#, "audio"),
            (r#""reasoning_effort": "low""#, "reasoning_effort"),
            (r#""top_logprobs": 2"#, "top_logprobs"),
            (r#""logprobs": true, "top_logprobs": 21"#, "top_logprobs"),
            (r#""max_tokens": 1, "max_completion_tokens": 2"#, "max_completion_tokens"),
            (r#""response_format": {"type": "xml"}"#, "response_format.type"),
            (r#""response_format": {"type": "json_schema"}"#, "response_format.json_schema.schema"),
            (r#""response_format": {"type": "json_object"}, "grammar": "root ::= \"a\"""#, "response_format"),
            (r#""best_of": 2"#, "best_of"),
        ] {
            assert_eq!(param(&format!("{{{hello}, {setting}}}")), expected);
        }
        for (message, expected) in [
            (r#"{"role": "tool", "content": "x"}"#, "messages[0].role"),
            (r#"{"role": "king", "content": "x"}"#, "messages[0].role"),
            (r#"{"role": "user"}"#, "messages[0].content"),
            (r#"{"role": "user", "content": 7}"#, "messages[0].content"),
            (r#"{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}"#, "messages[0].content[0]"),
            (r#"{"role": "assistant", "content": "x", "tool_calls": [1]}"#, "messages[0].tool_calls"),
            (r#"{"role": "user", "content": "x", "colour": 1}"#, "messages[0].colour"),
        ] {
            assert_eq!(param(&format!(r#"{{"model": "m", "messages": [{message}]}}"#)), expected);
        }
        assert_eq!(param(r#"{"model": "m", "messages": []}"#), "messages");
        assert_eq!(param(r#"{"model": "m"}"#), "messages");
    }

    #[test]
    fn formats_and_logprobs_arrive() {
        let parsed = |setting: &str| {
            let body = format!(r#"{{"model": "m", "messages": [{{"role": "user", "content": "x"}}], {setting}}}"#);
            parse(body.as_bytes(), None).expect("good").1
        };
        let schema = r#""response_format": {"type": "json_schema",
            "json_schema": {"name": "n", "strict": true, "schema": {"b": 1, "a": 2}}}"#;
        assert_eq!(parsed(schema).format, Format::JsonSchema(r#"{"b": 1, "a": 2}"#.into()));
        assert_eq!(parsed(r#""response_format": {"type": "json_object"}"#).format, Format::Json);
        assert_eq!(parsed(r#""grammar": "root ::= \"a\"""#).format, Format::Gbnf(r#"root ::= "a""#.into()));
        assert_eq!(parsed(r#""logprobs": true"#).logprobs, Some(0));
        assert_eq!(parsed(r#""logprobs": true, "top_logprobs": 3"#).logprobs, Some(3));
        assert_eq!(parsed(r#""logprobs": false"#).logprobs, None);
    }
}
