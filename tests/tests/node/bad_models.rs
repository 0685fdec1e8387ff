//! Model files that cannot be loaded.

use fabstir_tests::{LIMIT, Node, Place, chat, eventually, gguf, repository};

const ECHO: &str = "[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\n";

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_model_file_ends_in_a_clear_error_and_the_others_serve() {
    let good = repository().join("models/tiny-chat/tiny-chat-q8_0.gguf");
    let bytes = std::fs::read(&good).expect("the default model can be read");
    let place = Place::new("");
    place.file("text.gguf", "this is no model");
    place.file("empty.gguf", "");
    place.file("truncated.gguf", &bytes[..bytes.len() / 2]);
    place.file("header.gguf", &bytes[..100]);
    let mut garbage = bytes.clone();
    garbage[24..60_000].fill(0xff);
    place.file("garbage.gguf", garbage);
    gguf::announcing(&place.path().join("huge.gguf"), 256 << 30);
    let entry = |id: &str, path: &str, further: &str| {
        format!(
            "[[plugin]]\nid = '{id}'\nuse = 'inference-llama-cpp'\n[[plugin.config.models]]\nid = '{id}'\npath = '{path}'\nthreads = 1\n{further}\n"
        )
    };
    let mut config = format!("{ECHO}{}", entry("good", &good.display().to_string(), ""));
    for id in ["text", "empty", "truncated", "header", "garbage", "huge", "nowhere"] {
        config += &entry(id, &format!("{id}.gguf"), "");
    }
    config += &entry("long", &good.display().to_string(), "context = 100000");
    place.configure(&config);
    let node = Node::launch(place, &[]);
    node.serves("echo").await;
    node.serves("good").await;
    for (id, words) in [
        ("text", "is not a GGUF file"),
        ("empty", "is not a GGUF file"),
        ("truncated", "is truncated"),
        ("header", "header.gguf is"),
        ("garbage", "garbage.gguf is damaged"),
        ("huge", "needs 256."),
        ("nowhere", "nowhere.gguf"),
        ("long", "`context` is 100000"),
    ] {
        let told = async || {
            let log = node.log();
            let told = log
                .lines()
                .any(|line| line.contains(&format!("model `{id}`")) && line.contains(words) && line.contains("serves nothing"));
            told.then_some(())
        };
        eventually(&format!("the log says of {id} {words:?}"), 2 * LIMIT, told).await;
        let reply = node.chat(&chat(id, "hello")).await;
        assert!(matches!(reply.status, 404 | 503), "{reply:#?}");
    }
    // What does not fit says what would.
    node.logged(&[" free", "try a"]).await;
    assert_eq!(node.ask("echo", "still here").await, "still here");
    assert!(node.ask("good", "What is the capital of France?").await.contains("Paris"));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_model_beside_a_good_one_degrades_the_plugin_and_no_more() {
    let good = repository().join("models/tiny-chat/tiny-chat-q8_0.gguf");
    let place = Place::new("");
    place.file("text.gguf", "this is no model");
    let models = format!(
        "[[plugin.config.models]]\nid = 'good'\npath = '{}'\nthreads = 1\n[[plugin.config.models]]\nid = 'bad'\npath = 'text.gguf'\n",
        good.display()
    );
    place.configure(&format!("[[plugin]]\nid = 'llama'\nuse = 'inference-llama-cpp'\n{models}"));
    let node = Node::launch(place, &[]);
    node.healthy().await;
    assert_eq!(node.models().await, ["good"]);
    node.logged(&["A model could not be loaded.", "is not a GGUF file"]).await;
    let reply = node.chat(&chat("good", &"word ".repeat(3000))).await;
    assert!(reply.refusal(400, "context_length_exceeded").contains("2048"), "{reply:#?}");
}
