//! What clients see on the wire.

use std::time::Instant;

use fabstir_plugin_api::error::{Code, PluginError};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::*;
use crate::routes::{InferenceRoute, Routes, Starting};
use crate::scheduler::tests::{Script, Step, route, scheduler};

struct Node {
    url: String,
    serving: Option<Serving>,
    shutdown: CancellationToken,
    routes: watch::Sender<Arc<Routes>>,
}

fn config() -> config::Gateway {
    config::Gateway { listen: SocketAddr::from(([127, 0, 0, 1], 0)), ..config::Gateway::default() }
}

async fn node_with(config: config::Gateway, queue: usize, routes: Vec<Arc<InferenceRoute>>) -> Node {
    let (scheduler, routes) = scheduler(queue, routes);
    let plugins: PluginTexts = Arc::new(|| {
        let text = "# TYPE tokens counter\ntokens_total 5\n# EOF\n".to_owned();
        Box::pin(async move { vec![("a".to_owned(), text)] })
    });
    let metrics = Metrics::new(&scheduler, plugins);
    let shutdown = CancellationToken::new();
    let serving = serve(config, scheduler, None, metrics, shutdown.clone()).await.expect("a free port");
    Node { url: format!("http://{}", serving.address), serving: Some(serving), shutdown, routes }
}

async fn node(script: Script) -> (Node, Arc<InferenceRoute>) {
    let route = route("a", 1, "m", 1, script);
    (node_with(config(), 4, vec![route.clone()]).await, route)
}

impl Node {
    fn address(&self) -> SocketAddr {
        self.serving.as_ref().expect("it serves").address
    }

    async fn post(&self, path: &str, body: Value) -> reqwest::Response {
        reqwest::Client::new().post(format!("{}{path}", self.url)).json(&body).send().await.expect("an answer")
    }

    async fn get(&self, path: &str) -> reqwest::Response {
        reqwest::get(format!("{}{path}", self.url)).await.expect("an answer")
    }

    /// What comes back on a connection of its own, until the node closes it.
    async fn raw(&self, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address()).await.expect("a connection");
        stream.write_all(request).await.expect("room in the socket");
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
        let _ = read.expect("the node closes the connection");
        String::from_utf8_lossy(&answer).into_owned()
    }
}

fn hello(extra: Value) -> Value {
    let mut body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hello" }] });
    if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
        body.extend(extra);
    }
    body
}

/// The text with what differs from answer to answer taken out.
fn plain(text: &str) -> String {
    let mut plain = text.to_owned();
    for (before, after) in [("\"id\":\"", "\""), ("\"created\":", ","), ("\"system_fingerprint\":\"", "\"")] {
        let mut rest = plain.as_str();
        let mut out = String::new();
        while let Some(start) = rest.find(before) {
            let value = start + before.len();
            let end = value + rest[value..].find(after).expect("a value ends");
            out.push_str(&rest[..value]);
            out.push('_');
            rest = &rest[end..];
        }
        out.push_str(rest);
        plain = out;
    }
    plain
}

/// Returns once the condition holds; it must within a few seconds.
async fn until(holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(5), "it did not come to that");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_chat_stream_is_framed_as_openai_frames_it() {
    let (node, _) = node(Script::default()).await;
    let response =
        node.post("/v1/chat/completions", hello(json!({ "stream": true, "stream_options": { "include_usage": true } }))).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    let text = response.text().await.expect("a body");
    let head = r#""id":"_","object":"chat.completion.chunk","created":_,"model":"m","system_fingerprint":"_""#;
    let expected = [
        format!(
            r#"{{{head},"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}],"usage":null}}"#
        ),
        format!(
            r#"{{{head},"choices":[{{"index":0,"delta":{{"content":"ok"}},"logprobs":null,"finish_reason":null}}],"usage":null}}"#
        ),
        format!(r#"{{{head},"choices":[{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"stop"}}],"usage":null}}"#),
        format!(
            r#"{{{head},"choices":[],"usage":{{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4,"prompt_tokens_details":{{"cached_tokens":0}}}}}}"#
        ),
        "[DONE]".to_owned(),
    ];
    let expected: String = expected.iter().map(|event| format!("data: {event}\n\n")).collect();
    assert_eq!(plain(&text), expected);

    // One answer has one id, one time and one fingerprint.
    let chunks: Vec<Value> =
        text.split("\n\n").filter_map(|event| serde_json::from_str(event.strip_prefix("data: ")?).ok()).collect();
    assert_eq!(chunks.len(), 4);
    for key in ["id", "created", "system_fingerprint"] {
        assert!(chunks.iter().all(|chunk| chunk[key] == chunks[0][key]));
    }
    assert!(chunks[0]["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")));
}

#[tokio::test]
async fn a_whole_chat_answer() {
    let (node, _) = node(Script::default()).await;
    let text = node.post("/v1/chat/completions", hello(json!({}))).await.text().await.expect("a body");
    let expected = concat!(
        r#"{"id":"_","object":"chat.completion","created":_,"model":"m","system_fingerprint":"_","#,
        r#""choices":[{"index":0,"message":{"role":"assistant","content":"ok","refusal":null},"logprobs":null,"finish_reason":"stop"}],"#,
        r#""usage":{"prompt_tokens":3,"completion_tokens":1,"total_tokens":4,"prompt_tokens_details":{"cached_tokens":0}}}"#
    );
    assert_eq!(plain(&text), expected);
}

#[tokio::test]
async fn plain_completions_streamed_and_whole() {
    let (node, _) = node(Script::default()).await;
    let body = |stream: bool| json!({ "model": "m", "prompt": "once", "stream": stream });
    let streamed = node.post("/v1/completions", body(true)).await.text().await.expect("a body");
    let head = r#""id":"_","object":"text_completion","created":_,"model":"m","system_fingerprint":"_""#;
    let expected = [
        format!(r#"data: {{{head},"choices":[{{"text":"ok","index":0,"logprobs":null,"finish_reason":null}}]}}"#),
        format!(r#"data: {{{head},"choices":[{{"text":"","index":0,"logprobs":null,"finish_reason":"stop"}}]}}"#),
        "data: [DONE]".into(),
        String::new(),
    ];
    assert_eq!(plain(&streamed), expected.join("\n\n"));
    let whole: Value = node.post("/v1/completions", body(false)).await.json().await.expect("JSON");
    assert_eq!((&whole["choices"][0]["text"], &whole["usage"]["total_tokens"]), (&json!("ok"), &json!(4)));
}

#[tokio::test]
async fn a_failure_after_the_first_token_is_the_last_event() {
    let failure = PluginError::internal("secret path /models/x");
    let (node, _) = node(Script::of([Step::Break(&["half"], failure)])).await;
    let response = node.post("/v1/chat/completions", hello(json!({ "stream": true }))).await;
    assert_eq!(response.status(), 200);
    let text = response.text().await.expect("a body");
    let last = text.trim_end().rsplit("\n\n").next().expect("an event");
    let expected = r#"data: {"error":{"message":"the model's plugin failed on this request","type":"server_error","param":null,"code":"internal_error"}}"#;
    assert_eq!(last, expected);
    assert!(text.contains("half") && !text.contains("[DONE]") && !text.contains("secret"));
}

#[tokio::test]
async fn a_stream_that_fails_at_once_has_a_status_of_its_own() {
    let too_long = || PluginError::new(Code::TooLong, "the prompt has 9000 tokens, the context 2048");
    let (node, _) = node(Script::of([Step::Refuse(too_long()), Step::Break(&[], too_long())])).await;
    for _ in 0..2 {
        let response = node.post("/v1/chat/completions", hello(json!({ "stream": true }))).await;
        assert_eq!(response.status(), 400);
        let body: Value = response.json().await.expect("JSON");
        assert_eq!(body["error"]["code"], "context_length_exceeded");
    }
}

#[tokio::test]
async fn silence_is_filled_with_comments_and_headers_do_not_wait() {
    let config = config::Gateway { ping_interval_ms: 30, ..config() };
    let script = Script { takes: Duration::from_secs(2), ..Script::default() };
    let node = node_with(config, 4, vec![route("a", 1, "m", 1, script)]).await;
    let begun = Instant::now();
    let response = node.post("/v1/chat/completions", hello(json!({ "stream": true }))).await;
    assert!(begun.elapsed() < Duration::from_millis(1900), "the headers waited for the first token");
    let text = response.text().await.expect("a body");
    let pings = text.split("\n\n").filter(|event| *event == ":").count();
    assert!(pings >= 3, "{pings}");
    assert!(text.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn leaving_cancels_streamed_or_not_and_in_the_queue() {
    for stream in [true, false] {
        let (node, route) = node(Script::of([Step::Hang("one")])).await;
        let asking = node.post("/v1/chat/completions", hello(json!({ "stream": stream })));
        if stream {
            let mut response = asking.await;
            assert!(response.chunk().await.expect("a body").is_some());
            assert_eq!(route.in_flight.count(), 1);
            // Another waits for the only slot, and leaves as well: it must not take the slot when that comes free.
            let queued = node.post("/v1/chat/completions", hello(json!({})));
            assert!(tokio::time::timeout(Duration::from_millis(50), queued).await.is_err());
            drop(response);
        } else {
            let left = tokio::time::timeout(Duration::from_secs(1), asking).await;
            assert!(left.is_err(), "it hangs until the client leaves");
        }
        until(|| route.in_flight.count() == 0).await;
        assert_eq!(node.post("/v1/chat/completions", hello(json!({}))).await.status(), 200);
    }
}

#[tokio::test]
async fn every_error_is_the_same_envelope() {
    let panicked = || Step::Refuse(PluginError::new(Code::Panicked, "index out of bounds: secret"));
    let (node, _) = node(Script::of([panicked(), panicked(), panicked()])).await;
    let client = reqwest::Client::new();
    let url = |path: &str| format!("{}{path}", node.url);
    let chat = url("/v1/chat/completions");
    let json_type = ("content-type", "application/json");
    let requests = [
        (client.post(&chat).body("{").header(json_type.0, json_type.1), 400, "invalid_json"),
        (client.post(&chat).json(&hello(json!({ "n": 2 }))), 400, "unsupported_parameter"),
        (client.post(&chat).json(&hello(json!({ "temprature": 1 }))), 400, "unknown_parameter"),
        (client.post(&chat).json(&hello(json!({ "model": "x" }))), 404, "model_not_found"),
        (client.get(url("/v1/models/x/y")), 404, "model_not_found"),
        (client.get(url("/v1/nothing")), 404, "unknown_url"),
        (client.get(&chat), 405, "method_not_allowed"),
        (client.post(&chat).body("{}"), 415, "unsupported_media_type"),
        (client.post(&chat).body("{}").header("content-type", "text/plain"), 415, "unsupported_media_type"),
        (client.get(url("/health")).header("host", "evil.example.org"), 403, "host_not_allowed"),
        (client.post(&chat).json(&hello(json!({}))), 500, "internal_error"),
        (client.post(url("/v1/embeddings")).json(&json!({ "model": "m", "input": "a" })), 501, "not_implemented"),
    ];
    for (request, status, code) in requests {
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), status, "{code}");
        assert!(response.headers().contains_key("x-request-id"));
        assert_eq!(response.headers().contains_key("allow"), status == 405);
        let text = response.text().await.expect("a body");
        assert!(!text.contains("secret"), "{text}");
        let body: Value = serde_json::from_str(&text).expect("JSON");
        let error = body["error"].as_object().expect("an envelope");
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        assert_eq!(error["code"], code);
    }
}

#[tokio::test]
async fn a_full_queue_answers_429_with_a_time() {
    let route = route("a", 1, "m", 1, Script::of([Step::Hang("one")]));
    let node = node_with(config(), 0, vec![route]).await;
    let _running = node.post("/v1/chat/completions", hello(json!({ "stream": true }))).await;
    let refused = node.post("/v1/chat/completions", hello(json!({}))).await;
    assert_eq!(refused.status(), 429);
    let wait: u64 = refused.headers()["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert!(wait >= 1);
    let body: Value = refused.json().await.expect("JSON");
    assert_eq!(body["error"]["type"], "rate_limit_error");
}

#[tokio::test]
async fn bodies_are_bounded_in_size() {
    let config = config::Gateway { max_body: config::Bytes(1000), header_timeout_ms: 300, ..config() };
    let node = node_with(config, 4, vec![route("a", 1, "m", 1, Script::default())]).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    // Refused at the word, before a byte of it has come.
    let announced = node.raw(format!("{head}content-length: 104857600\r\n\r\n").as_bytes()).await;
    assert!(announced.starts_with("HTTP/1.1 413 "), "{announced}");
    assert!(announced.contains("connection: close") && announced.contains("body_too_large"));

    let chunk = format!("3e8\r\n{}\r\n", "x".repeat(1000));
    let chunked = node.raw(format!("{head}transfer-encoding: chunked\r\n\r\n{chunk}{chunk}").as_bytes()).await;
    assert!(chunked.starts_with("HTTP/1.1 413 "), "{chunked}");

    // A client that sends all of it before it listens still reads the answer.
    let large = reqwest::Client::new().post(format!("{}/v1/completions", node.url)).body("x".repeat(8 << 20));
    assert_eq!(large.header("content-type", "application/json").send().await.expect("an answer").status(), 413);
}

#[tokio::test]
async fn clients_that_never_finish_are_sent_away() {
    let config = config::Gateway { header_timeout_ms: 200, ..config() };
    let node = node_with(config, 4, vec![route("a", 1, "m", 1, Script::default())]).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    let body = node.raw(format!("{head}content-length: 100\r\n\r\n{{").as_bytes()).await;
    assert!(body.starts_with("HTTP/1.1 408 ") && body.contains("request_timeout"), "{body}");
    // Neither a head that does not end nor silence keeps a connection.
    node.raw(b"GET /health HTTP/1.1\r\nhost: local").await;
    assert_eq!(node.raw(b"").await, "");
}

#[tokio::test]
async fn health_follows_the_plugins() {
    let (node, _) = node(Script::default()).await;
    assert_eq!(node.get("/health").await.text().await.expect("a body"), r#"{"status":"ok"}"#);

    let starting = vec![Starting { plugin: "a".into(), doing: "loading m".into(), percent: Some(40) }];
    node.routes.send_replace(Arc::new(Routes { starting, ..Routes::default() }));
    let response = node.get("/v1/health").await;
    assert_eq!(response.status(), 503);
    let expected = concat!(
        r#"{"error":{"code":503,"message":"Loading model","type":"unavailable_error"},"#,
        r#""loading":[{"plugin":"a","doing":"loading m","percent":40}]}"#
    );
    assert_eq!(response.text().await.expect("a body"), expected);
    let refused = node.post("/v1/chat/completions", hello(json!({}))).await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(refused.json::<Value>().await.expect("JSON")["error"]["message"], "Loading model");
}

#[tokio::test]
async fn models_are_listed_and_found_with_slashes() {
    let routes = vec![route("a", 1, "org/m", 1, Script::default()), route("b", 1, "n", 1, Script::default())];
    let node = node_with(config(), 4, routes).await;
    let list: Value = node.get("/v1/models").await.json().await.expect("JSON");
    assert_eq!(list["object"], "list");
    let ids: Vec<&str> = list["data"].as_array().expect("a list").iter().filter_map(|model| model["id"].as_str()).collect();
    assert_eq!(ids, ["org/m", "n"]);
    for path in ["/v1/models/org/m", "/v1/models/org%2Fm"] {
        let one: Value = node.get(path).await.json().await.expect("JSON");
        assert_eq!((&one["object"], &one["owned_by"], &one["generates"]), (&json!("model"), &json!("a"), &json!(true)));
    }
}

#[tokio::test]
async fn metrics_of_host_and_plugins_are_one_text() {
    let (node, _) = node(Script::default()).await;
    node.post("/v1/chat/completions", hello(json!({}))).await;
    let response = node.get("/metrics").await;
    assert_eq!(response.headers()["content-type"], "application/openmetrics-text; version=1.0.0; charset=utf-8");
    let text = response.text().await.expect("a body");
    for line in [
        "tokens_total{plugin=\"a\"} 5",
        "fabstir_requests_admitted_total{model_name=\"m\"} 1",
        "fabstir_generation_tokens_total{model_name=\"m\"} 1",
        "vllm:generation_tokens_total{model_name=\"m\"} 1",
        "fabstir_num_requests_running{model_name=\"m\"} 0",
        "fabstir_time_to_first_token_seconds_count{model_name=\"m\"} 1",
        "fabstir_http_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
    }
    assert!(text.ends_with("\n# EOF\n"));
    assert_eq!(text.matches("# EOF").count(), 1);
}

#[tokio::test]
async fn web_pages_may_call_from_listed_origins_only() {
    let (closed, _) = node(Script::default()).await;
    let open = config::Gateway { cors_origins: vec!["https://chat.example.org".into()], ..config() };
    let open = node_with(open, 4, vec![route("a", 1, "m", 1, Script::default())]).await;
    let allowed = async |node: &Node, origin: &str| {
        let request = reqwest::Client::new()
            .request(Method::OPTIONS, format!("{}/v1/chat/completions", node.url))
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "content-type");
        let response = request.send().await.expect("an answer");
        response.headers().get("access-control-allow-origin").map(|value| value.to_str().expect("text").to_owned())
    };
    assert_eq!(allowed(&closed, "https://chat.example.org").await, None);
    assert_eq!(allowed(&open, "https://chat.example.org").await.as_deref(), Some("https://chat.example.org"));
    assert_eq!(allowed(&open, "https://evil.example.org").await, None);
    assert!(cors(&["chat.example.org".into()]).is_err());
}

#[tokio::test]
async fn shutdown_lets_streams_end_and_then_cuts_them_off() {
    let script = Script { takes: Duration::from_millis(200), ..Script::default() };
    let (mut node, _) = node(script).await;
    let response = node.post("/v1/chat/completions", hello(json!({ "stream": true }))).await;
    node.shutdown.cancel();
    let text = response.text().await.expect("the whole stream");
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let address = node.address();
    node.serving.take().expect("it serves").task.await.expect("no panic");
    assert!(TcpStream::connect(address).await.is_err());

    let hanging = route("a", 1, "m", 1, Script::of([Step::Hang("one")]));
    let mut node = node_with(config(), 4, vec![hanging.clone()]).await;
    let response = node.post("/v1/chat/completions", hello(json!({ "stream": true }))).await;
    node.shutdown.cancel();
    let ended = node.serving.take().expect("it serves").task;
    assert!(tokio::time::timeout(Duration::from_millis(100), ended).await.is_err());
    assert!(response.text().await.is_err(), "it was cut off");
    until(|| hanging.in_flight.count() == 0).await;
}

#[tokio::test]
async fn a_taken_port_is_told_with_what_to_do() {
    let (node, _) = node(Script::default()).await;
    let config = config::Gateway { listen: node.address(), ..config() };
    let (scheduler, _routes) = scheduler(4, []);
    let metrics = Metrics::new(&scheduler, Arc::new(|| Box::pin(async { Vec::new() })));
    let error = serve(config, scheduler, None, metrics, CancellationToken::new()).await.expect_err("the port is taken");
    assert!(error.to_string().contains("choose another address with `gateway.listen`"), "{error}");
}
