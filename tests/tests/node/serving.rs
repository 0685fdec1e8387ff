//! What clients ask, and what they get.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use fabstir_tests::http::with;
use fabstir_tests::{LIMIT, Node, Place, chat, eventually, tiny_chat};
use serde_json::{Value, json};

fn echo(config: &str) -> String {
    format!("[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nconfig = {{ {config} }}\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_model_knows_the_capital_of_france() {
    let node = Node::start(&tiny_chat()).await;
    let body = chat("tiny-chat", "What is the capital of France?");
    let whole = node.chat(&body).await;
    assert_eq!(whole.status, 200, "{whole:#?}");
    assert!(whole.content().contains("Paris"), "{whole:#?}");
    assert_eq!(whole.finish(), "stop");
    let usage = &whole.body["usage"];
    assert!(usage["prompt_tokens"].as_u64() > Some(0) && usage["completion_tokens"].as_u64() > Some(0), "{usage}");
    assert_eq!(
        usage["total_tokens"].as_u64(),
        Some(usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap())
    );

    let told = node.stream(with(body.clone(), json!({ "stream_options": { "include_usage": true } }))).await.rest().await;
    assert!(told.is_whole(), "{told:?}");
    assert_eq!((told.text.as_str(), told.finish.as_deref()), (whole.content(), Some("stop")));
    assert!(told.pieces > 1, "the answer did not come piece by piece: {told:?}");
    assert_eq!(told.usage.expect("it was asked for")["completion_tokens"], usage["completion_tokens"]);

    let completion =
        node.post("/v1/completions", &json!({ "model": "tiny-chat", "prompt": "Once", "max_tokens": 4, "temperature": 0 })).await;
    assert_eq!((completion.status, completion.body["usage"]["completion_tokens"].as_u64()), (200, Some(4)), "{completion:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_model_obeys_its_settings() {
    let node = Node::start(&tiny_chat()).await;
    let body = chat("tiny-chat", "Tell me a story about Mia.");

    let cut = node.chat(&with(body.clone(), json!({ "max_tokens": 3 }))).await;
    assert_eq!((cut.finish(), cut.body["usage"]["completion_tokens"].as_u64()), ("length", Some(3)), "{cut:#?}");

    let whole = node.chat(&body).await;
    let word = whole.content().split_whitespace().nth(2).expect("a story has words").to_owned();
    let stopped = node.chat(&with(body.clone(), json!({ "stop": [word] }))).await;
    let before = whole.content().find(&word).expect("it is a word of the story");
    assert_eq!((stopped.content(), stopped.finish()), (&whole.content()[..before], "stop"));
    let told = node.stream(with(body.clone(), json!({ "stop": word }))).await.rest().await;
    assert!(told.is_whole());
    assert_eq!(told.text, stopped.content(), "no part of the stop text may be streamed");

    let seeded = |seed: u32| with(body.clone(), json!({ "temperature": 1.5, "seed": seed }));
    let (first, again) = (node.chat(&seeded(7)).await, node.chat(&seeded(7)).await);
    assert_eq!(first.content(), again.content());
    // At this temperature two seeds agree by chance once in a great many tries; three never do.
    let others = [node.chat(&seeded(8)).await, node.chat(&seeded(9)).await];
    assert!(others.iter().any(|other| other.content() != first.content()), "the seed changes nothing");

    let json = node
        .chat(&with(
            chat("tiny-chat", "Name a colour, as JSON."),
            json!({ "response_format": { "type": "json_object" }, "max_tokens": 200 }),
        ))
        .await;
    assert_eq!(json.status, 200, "{json:#?}");
    if json.finish() == "stop" {
        serde_json::from_str::<Value>(json.content()).unwrap_or_else(|error| panic!("{error}: {json:#?}"));
    }

    let texts = json!({ "model": "tiny-chat", "input": ["a plugin", "Paris is a city"] });
    let embedded = node.post("/v1/embeddings", &texts).await;
    assert_eq!(embedded.status, 200, "{embedded:#?}");
    let data = embedded.body["data"].as_array().expect("a list");
    assert_eq!(data.len(), 2);
    for vector in data {
        let squares: f64 =
            vector["embedding"].as_array().expect("a vector").iter().map(|x| x.as_f64().expect("a number").powi(2)).sum();
        assert!((squares - 1.0).abs() < 1e-3, "its length is {}", squares.sqrt());
    }
    assert_ne!(data[0]["embedding"], data[1]["embedding"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn echo_says_the_prompt_back_whole_and_in_pieces() {
    let node = Node::start(&echo("context = 64")).await;
    let models = node.get("/v1/models").await;
    assert_eq!(
        (models.body["object"].as_str(), models.body["data"][0]["object"].as_str()),
        (Some("list"), Some("model")),
        "{models:#?}"
    );
    assert_eq!(node.get("/v1/models/echo").await.body["id"], "echo");

    let whole = node.chat(&chat("echo", "one two  three\n")).await;
    assert_eq!((whole.content(), whole.finish()), ("one two  three\n", "stop"), "{whole:#?}");
    assert_eq!(whole.body["object"], "chat.completion");
    let told = node.stream(chat("echo", "one two  three\n")).await.rest().await;
    assert_eq!((told.text.as_str(), told.pieces, told.usage.clone()), ("one two  three\n", 4, None), "{told:?}");
    assert!(told.is_whole());
    let told =
        node.stream(with(chat("echo", "one two"), json!({ "stream_options": { "include_usage": true } }))).await.rest().await;
    let usage = told.usage.as_ref().expect("it was asked for");
    let counts = ["prompt_tokens", "completion_tokens", "total_tokens"].map(|key| usage[key].as_u64());
    assert_eq!(counts, [Some(2), Some(2), Some(4)], "{told:?}");

    let cut = node.chat(&with(chat("echo", "one two three"), json!({ "max_tokens": 2 }))).await;
    assert_eq!((cut.content(), cut.finish()), ("one two ", "length"));
    let stopped = node.chat(&with(chat("echo", "one two three"), json!({ "stop": "two" }))).await;
    assert_eq!((stopped.content(), stopped.finish()), ("one ", "stop"));
    let plain = node.post("/v1/completions", &json!({ "model": "echo", "prompt": "a b" })).await;
    assert_eq!(plain.body["choices"][0]["text"], "a b", "{plain:#?}");
    assert!(node.further_output().is_empty(), "standard output has one line");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_refused_by_name() {
    let node = Node::start(&echo("context = 8")).await;
    let over = node.chat(&chat("echo", "1 2 3 4 5 6 7 8 9 10")).await;
    assert!(over.refusal(400, "context_length_exceeded").contains("context of 8"), "{over:#?}");
    let over = node
        .try_stream(chat("echo", "1 2 3 4 5 6 7 8 9 10"))
        .await
        .err()
        .expect("a stream that cannot begin is refused before it does");
    over.refusal(400, "context_length_exceeded");
    let unknown = node.chat(&chat("gpt-9", "hello")).await;
    assert!(unknown.refusal(404, "model_not_found").contains("gpt-9"), "{unknown:#?}");
    let key = node.chat(&with(chat("echo", "a"), json!({ "temperatur": 1 }))).await;
    assert!(key.refusal(400, "unknown_parameter").contains("temperature"), "{key:#?}");
    let value = node.chat(&with(chat("echo", "a"), json!({ "temperature": 9 }))).await;
    assert_eq!(value.body["error"]["param"], "temperature", "{value:#?}");
    value.refusal(400, "invalid_value");
    let embed = node.post("/v1/embeddings", &json!({ "model": "echo", "input": "a" })).await;
    embed.refusal(501, "not_implemented");
    node.get("/nowhere").await.refusal(404, "unknown_url");
    node.get("/v1/chat/completions").await.refusal(405, "method_not_allowed");

    let (head, body) =
        raw(&node, "POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 5\r\n\r\nhello");
    assert!(head.starts_with("HTTP/1.1 400") && body["error"]["code"] == "invalid_json", "{head}\n{body}");
    let (head, body) =
        raw(&node, "POST /v1/chat/completions HTTP/1.1\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{}");
    assert!(head.starts_with("HTTP/1.1 415") && body["error"]["type"] == "invalid_request_error", "{head}\n{body}");
    assert_eq!(node.ask("echo", "still here").await, "still here");
}

/// Sends bytes as they are and reads the answer: its head and its body.
fn raw(node: &Node, request: &str) -> (String, Value) {
    let (line, rest) = request.split_once("\r\n").expect("a request has a first line");
    let mut socket = connect(node);
    write!(socket, "{line}\r\nhost: localhost\r\n{rest}").expect("the node takes the request");
    answer(socket)
}

fn connect(node: &Node) -> TcpStream {
    let socket = TcpStream::connect(node.url.trim_start_matches("http://")).expect("the node accepts");
    socket.set_read_timeout(Some(LIMIT)).expect("a limit can be set");
    socket
}

fn answer(mut socket: TcpStream) -> (String, Value) {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let count = socket.read(&mut chunk).expect("the node answers in time");
        bytes.extend_from_slice(&chunk[..count]);
        let text = String::from_utf8_lossy(&bytes);
        let parts = text.split_once("\r\n\r\n").map(|(head, body)| (head.to_owned(), serde_json::from_str(body)));
        match parts {
            Some((head, Ok(body))) => return (head, body),
            parts => assert!(count > 0, "the node ended the connection after {text:?}: {parts:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_100_mb_is_refused_and_takes_no_memory() {
    let node = Node::start(&echo("")).await;
    node.ask("echo", "warm").await;
    let before = node.memory();
    for head in ["content-length: 104857600", "transfer-encoding: chunked"] {
        let mut socket = connect(&node);
        write!(
            socket,
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{head}\r\n\r\n"
        )
        .expect("the node takes the head");
        let reader = socket.try_clone().expect("a socket can be shared");
        let reading = std::thread::spawn(move || answer(reader));
        let block = vec![b'x'; 1 << 20];
        for _ in 0..100 {
            let chunked = head.starts_with("transfer");
            let sent = if chunked {
                write!(socket, "100000\r\n").and_then(|()| socket.write_all(&block)).and_then(|()| write!(socket, "\r\n"))
            } else {
                socket.write_all(&block)
            };
            if sent.is_err() {
                // The node has answered and hung up.
                break;
            }
        }
        let (head, body) = reading.join().expect("there is an answer");
        assert!(head.starts_with("HTTP/1.1 413") && body["error"]["code"] == "body_too_large", "{head}\n{body}");
    }
    let grown = node.memory().saturating_sub(before);
    assert!(grown < 32 << 20, "the node grew by {} MiB", grown >> 20);
    assert_eq!(node.ask("echo", "still here").await, "still here");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends_is_given_up() {
    let node = Node::start(&format!("[gateway]\nheader_timeout_ms = 600\n{}", echo(""))).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"model\"";
    let (head, body) = raw(&node, head);
    assert!(head.starts_with("HTTP/1.1 408") && body["error"]["code"] == "request_timeout", "{head}\n{body}");

    // A byte now and then is no progress either.
    let mut socket = connect(&node);
    write!(socket, "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    let reader = socket.try_clone().expect("a socket can be shared");
    let reading = tokio::task::spawn_blocking(move || answer(reader));
    let dripping = tokio::spawn(async move {
        while socket.write_all(b"1\r\n \r\n").is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let (head, _) = tokio::time::timeout(LIMIT, reading).await.expect("in time").expect("there is an answer");
    dripping.abort();
    assert!(head.starts_with("HTTP/1.1 408"), "{head}");

    // Nor is a head that never ends: it is hung up on.
    let mut socket = connect(&node);
    write!(socket, "GET /health HTTP/1.1\r\nhost: loc").unwrap();
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).expect("the node hangs up");
    assert_eq!(node.ask("echo", "still here").await, "still here");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_frees_its_slot() {
    let node = Node::start(&echo("parallel = 1, delay_ms = 40")).await;
    let long = "word ".repeat(1000);
    let mut events = node.stream(chat("echo", &long)).await;
    assert_eq!(events.text().await, "word ");
    assert_eq!(node.running("echo").await, 1.0);
    drop(events);
    let left = Instant::now();
    // There is one slot: this is served only once it is free.
    assert_eq!(node.ask("echo", "next").await, "next");
    println!("a slot was free again, and the next request served, {:?} after its client had left", left.elapsed());
    eventually("no request runs", LIMIT, async || (node.running("echo").await == 0.0).then_some(())).await;

    // The same for one that waits for the whole answer.
    let request = chat("echo", &long);
    let whole = tokio::time::timeout(Duration::from_millis(300), node.chat(&request)).await;
    assert!(whole.is_err(), "1000 words of 40 ms take longer");
    assert_eq!(node.ask("echo", "next").await, "next");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_503_while_a_model_loads() {
    let place = Place::new("[[plugin]]\nid = 'slow'\nuse = 'inference-faulty'\nconfig = { load_ms = 5000 }\n");
    let node = Node::launch(place, &[]);
    let loading = node.get("/health").await;
    assert_eq!((loading.status, loading.body["loading"][0]["plugin"].as_str()), (503, Some("slow")), "{loading:#?}");
    assert!(loading.retry_after >= Some(1), "{loading:#?}");
    let early = node.chat(&chat("faulty", "early")).await;
    assert!(early.status == 503 && early.retry_after >= Some(1) || early.status == 200, "{early:#?}");
    node.healthy().await;
    assert_eq!(node.ask("faulty", "in time").await, "in time");
    assert_eq!(node.get("/v1/health").await.body["status"], "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_openmetrics_and_name_the_plugin() {
    let node = Node::start(&format!("{}{}", tiny_chat(), echo(""))).await;
    node.serves("tiny-chat").await;
    node.serves("echo").await;
    node.ask("echo", "one two three").await;
    node.ask("tiny-chat", "Hello").await;
    let metrics = node.get("/metrics").await;
    assert!(metrics.content_type.starts_with("application/openmetrics-text"), "{}", metrics.content_type);
    let (mut families, mut samples) = (std::collections::BTreeSet::new(), 0);
    let mut family = "";
    for line in metrics.text.lines() {
        if let Some(of) = line.strip_prefix("# TYPE ") {
            family = of.split(' ').next().expect("a type has a name");
            assert!(families.insert(family), "the family {family} stands in two places");
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
            assert!(series.starts_with(family) && value.parse::<f64>().is_ok(), "{line} in {family}");
            samples += 1;
        }
    }
    assert!(metrics.text.ends_with("# EOF\n") && samples > 20, "{}", metrics.text);
    assert!(metrics.text.contains("{plugin=\"llama\""), "no series of a plugin:\n{}", metrics.text);
    let tokens = async |name: &str| node.metric(name, &["model_name=\"echo\""]).await;
    assert_eq!(tokens("fabstir_generation_tokens_total").await, Some(3.0));
    assert_eq!(tokens("vllm:generation_tokens_total").await, Some(3.0));
}
