//! The client's side of the OpenAI API, as far as a chat needs it.

use std::io;
use std::time::{Duration, Instant};

use reqwest::{Response, StatusCode, header};
use serde_json::{Value, json};

use super::super::Failure;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    #[error("`{url}` is not the address of a node: write something like http://127.0.0.1:8080")]
    BadUrl { url: String },
    #[error("no node answers at {url} ({cause}): start one with `fabstir-node run`, or name another with --url")]
    Unreachable { url: String, cause: String },
    #[error("the node does not serve `{wanted}`; it serves {}", list(.served))]
    UnknownModel { wanted: String, served: Vec<String> },
    #[error("the node serves no model: name one in plugins.toml; `fabstir-node plugin doctor` says why a plugin is not ready")]
    NoModel,
    /// 429: asking again after `retry_after` may work.
    #[error("{message}")]
    Busy { retry_after: Duration, message: String },
    /// 503: the node is starting.
    #[error("{message}")]
    Loading { message: String },
    #[error(
        "nobody who offers the model was found within {} s: name a node with --bootstrap, or look longer with --wait",
        .within.as_secs_f64()
    )]
    Nobody { within: Duration },
    #[error("{reason} Gave up after {} s.", .after.as_secs())]
    GaveUp { reason: String, after: Duration },
    #[error("the node refused the request ({status}): {message}")]
    Refused { status: u16, message: String },
    #[error("the answer broke off: {0}")]
    Broken(String),
    #[error("stopped")]
    Stopped,
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

impl From<ChatError> for Failure {
    fn from(error: ChatError) -> Self {
        let (exit, code) = match &error {
            ChatError::Unreachable { .. } => (Failure::UNREACHABLE, "unreachable"),
            ChatError::BadUrl { .. } => (Failure::USAGE, "bad_url"),
            ChatError::UnknownModel { .. } | ChatError::NoModel => (Failure::FAILED, "model_not_found"),
            ChatError::Nobody { .. } => (Failure::FAILED, "nobody"),
            ChatError::Busy { .. } => (Failure::FAILED, "busy"),
            ChatError::Loading { .. } => (Failure::FAILED, "loading"),
            ChatError::GaveUp { .. } | ChatError::Refused { .. } => (Failure::FAILED, "refused"),
            ChatError::Broken(_) => (Failure::FAILED, "broken"),
            ChatError::Stopped => (Failure::FAILED, "stopped"),
            ChatError::Output(error) => return io::Error::from(error.kind()).into(),
        };
        Failure::new(exit, code, &error)
    }
}

/// A part of an answer, as it arrives.
pub enum Event<'a> {
    Text(&'a str),
}

/// A whole answer.
#[derive(Debug, Default)]
pub struct Answer {
    pub text: String,
    pub finish_reason: Option<String>,
    /// Tokens of the answer, as the node counted them.
    pub tokens: Option<u64>,
    usage: Option<Value>,
    /// What the node measured.
    timings: Option<Value>,
    first: Option<Duration>,
    total: Duration,
}

impl Answer {
    /// Tokens per second after the first; `None` where nothing was counted, and where the answer came so fast that the figure would
    /// say more about the connection than about the model.
    fn rate(&self) -> Option<f64> {
        const SHORTEST: Duration = Duration::from_millis(50);
        let after_first = self.tokens?.checked_sub(1)?;
        let time = self.total - self.first?;
        (time >= SHORTEST).then(|| after_first as f64 / time.as_secs_f64())
    }

    /// How fast it came, in words.
    pub fn speed(&self) -> String {
        let ms = |time: Duration| format!("{:.0} ms", time.as_secs_f64() * 1e3);
        let tokens =
            self.tokens.map(|tokens| format!("{tokens} {} in {}", if tokens == 1 { "token" } else { "tokens" }, ms(self.total)));
        let rate = self.rate().map(|rate| format!("{rate:.1} tokens/s"));
        let first = self.first.map(|first| format!("first after {}", ms(first)));
        let parts: Vec<String> = [tokens, rate, first].into_iter().flatten().collect();
        if parts.is_empty() { "not measured".into() } else { parts.join(", ") }
    }

    pub fn to_json(&self, model: &str) -> Value {
        let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        json!({
            "model": model,
            "answer": self.text,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "timings": {
                "first_token_ms": self.first.map(ms),
                "total_ms": ms(self.total),
                "tokens_per_second": self.rate(),
                "node": self.timings,
            },
        })
    }
}

/// A connection to one node.
pub struct Client {
    http: reqwest::Client,
    url: String,
}

impl Client {
    /// `url` may end with `/v1`, as other clients write it.
    pub fn new(url: &str) -> Result<Self, ChatError> {
        let url = url.trim();
        let whole = if url.contains("://") { url.to_string() } else { format!("http://{url}") };
        let bare = whole.trim_end_matches('/').trim_end_matches("/v1").to_string();
        if !reqwest::Url::parse(&bare).is_ok_and(|parsed| parsed.scheme() == "http" && parsed.has_host()) {
            return Err(ChatError::BadUrl { url: url.into() });
        }
        // The node sends a sign of life every few seconds, so a silence this long means that it is gone. A proxy of the
        // environment has no business between a terminal and its own node.
        let http = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(Duration::from_secs(600))
            .no_proxy()
            .build();
        let http = http.map_err(|error| ChatError::Unreachable { url: bare.clone(), cause: cause(&error) })?;
        Ok(Self { http, url: bare })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// The names of the models that the node serves and that continue text. A server of another maker does not say which do.
    pub async fn models(&self) -> Result<Vec<String>, ChatError> {
        let response = self.http.get(format!("{}/v1/models", self.url)).send().await.map_err(|error| self.unreachable(&error))?;
        let body = self.accepted(response).await?.json::<Value>().await.map_err(|error| lost(&error))?;
        let listed = body["data"].as_array().into_iter().flatten().filter(|model| model["generates"] != false);
        let models: Vec<String> = listed.filter_map(|model| Some(model["id"].as_str()?.to_string())).collect();
        if models.is_empty() {
            return Err(self.not_ready().await);
        }
        Ok(models)
    }

    /// Asks, and hands over the answer's parts as they arrive. Dropping the future closes the connection, which stops the node's
    /// work.
    pub async fn answer(&self, request: &Value, mut show: impl FnMut(Event<'_>) -> io::Result<()>) -> Result<Answer, ChatError> {
        let started = Instant::now();
        let sent = self.http.post(format!("{}/v1/chat/completions", self.url)).json(request).send().await;
        let response = sent.map_err(|error| self.unreachable(&error))?;
        let mut response = match self.accepted(response).await {
            Err(ChatError::Refused { status: 404, .. }) if !self.serves(request).await => {
                let wanted = request["model"].as_str().unwrap_or_default().to_string();
                return Err(ChatError::UnknownModel { wanted, served: self.models().await.unwrap_or_default() });
            }
            Err(ChatError::Loading { .. }) => return Err(self.not_ready().await),
            response => response?,
        };
        let mut answer = Answer::default();
        let mut events = Events::default();
        while let Some(bytes) = response.chunk().await.map_err(|error| lost(&error))? {
            events.feed(&bytes)?;
            while let Some(data) = events.next() {
                answer.total = started.elapsed();
                if data == "[DONE]" {
                    return Ok(answer);
                }
                if let Some(text) = answer.take(&data)? {
                    answer.first.get_or_insert(answer.total);
                    show(Event::Text(&text))?;
                    answer.text.push_str(&text);
                }
            }
        }
        Err(ChatError::Broken("the node closed the connection before the end".into()))
    }

    /// Why the node serves nothing at the moment: `Loading` if waiting helps.
    async fn not_ready(&self) -> ChatError {
        let health = match self.http.get(format!("{}/health", self.url)).send().await {
            Ok(health) => health,
            Err(error) => return self.unreachable(&error),
        };
        if health.status().is_success() {
            return ChatError::Loading { message: "The node has just become ready.".into() };
        }
        let body = health.json::<Value>().await.unwrap_or_default();
        let doing: Vec<String> = body["loading"].as_array().into_iter().flatten().map(describe_start).collect();
        if doing.is_empty() {
            ChatError::NoModel
        } else {
            ChatError::Loading { message: format!("The node is starting: {}.", doing.join("; ")) }
        }
    }

    async fn serves(&self, request: &Value) -> bool {
        let served = self.models().await.unwrap_or_default();
        request["model"].as_str().is_some_and(|model| served.iter().any(|served| served == model))
    }

    fn unreachable(&self, error: &reqwest::Error) -> ChatError {
        ChatError::Unreachable { url: self.url.clone(), cause: cause(error) }
    }

    /// The response, if it is a good one.
    async fn accepted(&self, response: Response) -> Result<Response, ChatError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let seconds =
            response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse::<u64>().ok());
        let text = response.text().await.unwrap_or_default();
        let message =
            serde_json::from_str::<Value>(&text).ok().and_then(|body| Some(body["error"]["message"].as_str()?.to_string()));
        let message = message.unwrap_or_else(|| format!("{} sent no reason, so it may not be a node", self.url));
        Err(match status {
            StatusCode::TOO_MANY_REQUESTS => {
                ChatError::Busy { retry_after: Duration::from_secs(seconds.unwrap_or(1)), message: sentence(&message) }
            }
            StatusCode::SERVICE_UNAVAILABLE => ChatError::Loading { message: sentence(&message) },
            status => ChatError::Refused { status: status.as_u16(), message },
        })
    }
}

impl Answer {
    /// Takes one event in, and returns the text that it adds.
    fn take(&mut self, data: &str) -> Result<Option<String>, ChatError> {
        let event: Value =
            serde_json::from_str(data).map_err(|_| ChatError::Broken("the node sent something that is not JSON".into()))?;
        if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
            return Err(ChatError::Broken(error["message"].as_str().unwrap_or("the node gave no reason").into()));
        }
        if event["usage"].is_object() {
            self.tokens = event["usage"]["completion_tokens"].as_u64();
            self.usage = Some(event["usage"].clone());
        }
        if event["timings"].is_object() {
            self.timings = Some(event["timings"].clone());
        }
        let choice = &event["choices"][0];
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish_reason = Some(reason.into());
        }
        Ok(choice["delta"]["content"].as_str().filter(|text| !text.is_empty()).map(str::to_string))
    }
}

/// `llama is loading tiny-chat, 40 %`.
fn describe_start(starting: &Value) -> String {
    let percent = starting["percent"].as_u64().map_or(String::new(), |percent| format!(", {percent} %"));
    format!(
        "{} is {}{percent}",
        starting["plugin"].as_str().unwrap_or("a plugin"),
        starting["doing"].as_str().unwrap_or("starting")
    )
}

/// Cuts a stream of bytes into the `data:` lines of server-sent events.
#[derive(Default)]
struct Events {
    bytes: Vec<u8>,
    /// How much of `bytes` was read already.
    read: usize,
}

/// The longest line that is taken from a node.
const LONGEST_LINE: usize = 16 << 20;

impl Events {
    fn feed(&mut self, bytes: &[u8]) -> Result<(), ChatError> {
        self.bytes.drain(..std::mem::take(&mut self.read));
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > LONGEST_LINE {
            return Err(ChatError::Broken("the node sent a line without an end".into()));
        }
        Ok(())
    }

    /// The next whole event. Comments, which the node sends as signs of life, are passed over.
    fn next(&mut self) -> Option<String> {
        loop {
            let length = self.bytes[self.read..].iter().position(|byte| *byte == b'\n')?;
            let line = String::from_utf8_lossy(&self.bytes[self.read..self.read + length]);
            let data = line.trim_end_matches('\r').strip_prefix("data:").map(|data| data.trim_start().to_string());
            self.read += length + 1;
            if data.is_some() {
                return data;
            }
        }
    }
}

fn lost(error: &reqwest::Error) -> ChatError {
    ChatError::Broken(format!("the connection to the node was lost ({})", cause(error)))
}

/// The innermost reason, which says more than "error sending request".
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

fn sentence(message: &str) -> String {
    let mut letters = message.trim().trim_end_matches('.').chars();
    let first = letters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", letters.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_wherever_the_bytes_are_cut() {
        let stream = ":\n\ndata: {\"a\":\"é\"}\r\n\r\n: ping\n\ndata:[DONE]\n\n".as_bytes();
        for cut in 0..stream.len() {
            let mut events = Events::default();
            let mut seen = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                events.feed(part).expect("short lines");
                seen.extend(std::iter::from_fn(|| events.next()));
            }
            assert_eq!(seen, ["{\"a\":\"é\"}", "[DONE]"], "cut at {cut}");
        }
    }

    #[test]
    fn an_answer_gathers_text_usage_and_reason() {
        let mut answer = Answer::default();
        assert_eq!(
            answer.take(r#"{"choices":[{"delta":{"role":"assistant"},"finish_reason":null}],"usage":null}"#).unwrap(),
            None
        );
        assert_eq!(answer.take(r#"{"choices":[{"delta":{"content":"Paris"}}]}"#).unwrap().as_deref(), Some("Paris"));
        answer.take(r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#).unwrap();
        answer.take(r#"{"choices":[],"usage":{"completion_tokens":3}}"#).unwrap();
        assert_eq!((answer.finish_reason.as_deref(), answer.tokens), (Some("stop"), Some(3)));
        let error = answer.take(r#"{"error":{"message":"the plugin died"}}"#).unwrap_err();
        assert_eq!(error.to_string(), "the answer broke off: the plugin died");
    }

    #[test]
    fn a_speed_that_was_not_measured_is_not_told() {
        let mut answer = Answer {
            tokens: Some(1),
            first: Some(Duration::from_millis(20)),
            total: Duration::from_millis(20),
            ..Answer::default()
        };
        assert_eq!(answer.speed(), "1 token in 20 ms, first after 20 ms");
        assert_eq!(answer.to_json("m")["timings"]["tokens_per_second"], Value::Null);
        answer.tokens = Some(11);
        answer.total = Duration::from_millis(120);
        assert_eq!(answer.speed(), "11 tokens in 120 ms, 100.0 tokens/s, first after 20 ms");
    }

    #[test]
    fn addresses_are_taken_as_people_write_them() {
        for url in ["http://127.0.0.1:8080", "http://127.0.0.1:8080/", "http://127.0.0.1:8080/v1", "127.0.0.1:8080"] {
            assert_eq!(Client::new(url).expect(url).url(), "http://127.0.0.1:8080");
        }
        for url in ["", "https://example.org", "ftp://x", "http://"] {
            assert!(matches!(Client::new(url), Err(ChatError::BadUrl { .. })), "{url}");
        }
    }
}
