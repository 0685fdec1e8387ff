//! Requests to a node, and what it answers.

use std::time::Instant;

use reqwest::{Response, StatusCode};
use serde_json::{Value, json};

use crate::{LIMIT, Node, eventually};

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub retry_after: Option<u64>,
    pub content_type: String,
    /// `Null` where the body is not JSON.
    pub body: Value,
    pub text: String,
}

impl Reply {
    async fn of(response: Response) -> Self {
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        let (status, retry_after, content_type) =
            (response.status().as_u16(), header("retry-after").parse().ok(), header("content-type"));
        let text = response.text().await.unwrap_or_default();
        Self { status, retry_after, content_type, body: serde_json::from_str(&text).unwrap_or(Value::Null), text }
    }

    /// What the model said, in a chat.
    pub fn content(&self) -> &str {
        self.body["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("no content in {self:#?}"))
    }

    pub fn finish(&self) -> &str {
        self.body["choices"][0]["finish_reason"].as_str().unwrap_or_else(|| panic!("no finish reason in {self:#?}"))
    }

    /// Asserts an error in OpenAI's envelope, and returns its sentence.
    #[track_caller]
    pub fn refusal(&self, status: u16, code: &str) -> &str {
        let error = &self.body["error"];
        assert_eq!((self.status, error["code"].as_str()), (status, Some(code)), "{self:#?}");
        assert!(error["type"].is_string() && error.get("param").is_some(), "{self:#?}");
        error["message"].as_str().unwrap_or_else(|| panic!("no message in {self:#?}"))
    }
}

/// The body of a chat with one message, at temperature 0.
pub fn chat(model: &str, prompt: &str) -> Value {
    json!({ "model": model, "messages": [{ "role": "user", "content": prompt }], "temperature": 0 })
}

/// `body` with further keys.
pub fn with(mut body: Value, further: Value) -> Value {
    let further = further.as_object().expect("keys and values").clone();
    body.as_object_mut().expect("keys and values").extend(further);
    body
}

/// A stream of events, as it arrives.
pub struct Events {
    response: Response,
    buffer: String,
    /// The end marker has come.
    pub done: bool,
}

/// What a streamed chat said, from its first event to its last.
#[derive(Debug, Default, Clone)]
pub struct Told {
    pub text: String,
    /// Events that brought text.
    pub pieces: usize,
    pub finish: Option<String>,
    pub usage: Option<Value>,
    pub error: Option<Value>,
    /// Whether `[DONE]` ended it.
    pub done: bool,
    /// Why the connection broke, if it did.
    pub broken: Option<String>,
    /// When the text began and ended.
    pub first: Option<Instant>,
    pub last: Option<Instant>,
}

impl Told {
    /// Whether it ended as a good answer does.
    pub fn is_whole(&self) -> bool {
        self.done && self.finish.is_some() && self.error.is_none() && self.broken.is_none()
    }

    pub fn take(&mut self, event: &Value) {
        if let Some(error) = event.get("error") {
            self.error = Some(error.clone());
        }
        if event["usage"].is_object() {
            self.usage = Some(event["usage"].clone());
        }
        let choice = &event["choices"][0];
        if let Some(text) = choice["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
            self.text.push_str(text);
            self.pieces += 1;
            let now = Instant::now();
            self.first.get_or_insert(now);
            self.last = Some(now);
        }
        if let Some(finish) = choice["finish_reason"].as_str() {
            assert!(self.finish.replace(finish.to_owned()).is_none(), "two finish reasons");
        }
    }
}

impl Events {
    /// The next event; `None` after the end marker and at the end of the connection.
    pub async fn next(&mut self) -> Result<Option<Value>, reqwest::Error> {
        loop {
            if let Some((event, rest)) = self.buffer.split_once("\n\n") {
                let data: String = event.lines().filter_map(|line| line.strip_prefix("data:")).map(str::trim).collect();
                self.buffer = rest.to_owned();
                match data.as_str() {
                    // A comment, which keeps the connection open.
                    "" => continue,
                    "[DONE]" => {
                        self.done = true;
                        return Ok(None);
                    }
                    data => {
                        return Ok(Some(serde_json::from_str(data).unwrap_or_else(|error| panic!("no JSON ({error}): {data}"))));
                    }
                }
            }
            match self.response.chunk().await? {
                Some(bytes) => self.buffer.push_str(std::str::from_utf8(&bytes).expect("events are whole characters")),
                None => return Ok(None),
            }
        }
    }

    /// The next piece of text.
    pub async fn text(&mut self) -> String {
        let mut told = Told::default();
        while told.pieces == 0 {
            let event = self.next().await.expect("the connection holds").expect("there is more text");
            told.take(&event);
        }
        told.text
    }

    /// Reads to the end.
    pub async fn rest(mut self) -> Told {
        let mut told = Told::default();
        loop {
            match self.next().await {
                Ok(Some(event)) => told.take(&event),
                Ok(None) => break,
                Err(error) => {
                    told.broken = Some(error.to_string());
                    break;
                }
            }
        }
        told.done = self.done;
        told
    }
}

impl Node {
    pub async fn get(&self, path: &str) -> Reply {
        Reply::of(self.http.get(format!("{}{path}", self.url)).send().await.expect("the node answers")).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        Reply::of(self.http.post(format!("{}{path}", self.url)).json(body).send().await.expect("the node answers")).await
    }

    pub async fn chat(&self, body: &Value) -> Reply {
        self.post("/v1/chat/completions", body).await
    }

    /// What one model says to one prompt.
    pub async fn ask(&self, model: &str, prompt: &str) -> String {
        let reply = self.chat(&chat(model, prompt)).await;
        assert_eq!(reply.status, 200, "{reply:#?}");
        reply.content().to_owned()
    }

    /// Asks again and again for as long as the model is only loading.
    pub async fn ask_patiently(&self, model: &str, prompt: &str) -> String {
        let body = chat(model, prompt);
        eventually(&format!("{model} answers"), LIMIT, async || {
            let reply = self.chat(&body).await;
            assert!(matches!(reply.status, 200 | 503), "{reply:#?}");
            (reply.status == 200).then(|| reply.content().to_owned())
        })
        .await
    }

    /// Begins a streamed chat; the refusal if it does not begin.
    pub async fn try_stream(&self, body: Value) -> Result<Events, Reply> {
        let body = with(body, json!({ "stream": true }));
        let sent = self.http.post(format!("{}/v1/chat/completions", self.url)).json(&body).send();
        let response = sent.await.expect("the node answers");
        match response.status() {
            StatusCode::OK => Ok(Events { response, buffer: String::new(), done: false }),
            _ => Err(Reply::of(response).await),
        }
    }

    pub async fn stream(&self, body: Value) -> Events {
        self.try_stream(body).await.unwrap_or_else(|reply| panic!("{reply:#?}"))
    }

    pub async fn models(&self) -> Vec<String> {
        let reply = self.get("/v1/models").await;
        let ids = reply.body["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str());
        ids.map(str::to_owned).collect()
    }

    /// The value of a metric's series whose labels hold each of `labels`, as in `model_name="echo"`; `None` where there is none.
    pub async fn metric(&self, name: &str, labels: &[&str]) -> Option<f64> {
        let text = self.get("/metrics").await.text;
        let line = text.lines().find(|line| {
            let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']));
            rest.is_some_and(|rest| labels.iter().all(|label| rest.contains(label)))
        })?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// Requests that hold a slot of a model.
    pub async fn running(&self, model: &str) -> f64 {
        self.metric("fabstir_num_requests_running", &[&format!("model_name=\"{model}\"")]).await.unwrap_or(0.0)
    }
}
