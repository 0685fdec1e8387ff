//! Questions that mean the same, answered with one answer. Needs the embedding model: `make embedding-model`.

use std::time::{Duration, Instant};

use fabstir_host::cache::veto::{Question, Veto};
use fabstir_tests::{LIMIT, Node, chat, eventually, repository};
use serde_json::{Value, json};

/// Longer than a vector ever takes: echo's answers could begin before it is made.
const PATIENT: &str = ", wait_ms = 10000";

/// Echo, whose answer shows which question it answers, the model that embeds, and a place for vectors. With the settings of a cache that
/// compares questions, or without a cache.
fn config(semantic: Option<&str>) -> String {
    let model = repository().join("models/all-minilm/all-minilm-l6-v2-q8_0.gguf");
    assert!(model.is_file(), "{} is not there; `make embedding-model` makes it", model.display());
    let cache = semantic
        .map(|settings| format!("[cache]\nenabled = true\nlook_ms = 10000\nsemantic = {{ model = 'all-minilm'{settings} }}\n"));
    let cache = cache.unwrap_or_default();
    format!(
        "{cache}[[plugin]]\nid = 'disk'\nuse = 'storage-disk'\n\
         [[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nisolation = 'in-process'\n[[plugin]]\nid = 'llama'\n\
         use = 'inference-llama-cpp'\n[[plugin.config.models]]\nid = 'all-minilm'\npath = '{}'\nthreads = 1\n",
        model.display()
    )
}

async fn start(semantic: Option<&str>) -> Node {
    let node = Node::start(&config(semantic)).await;
    node.serves("all-minilm").await;
    node.serves("echo").await;
    node
}

/// What was said, what the answer says of the cache, and how long it took.
async fn ask(client: &reqwest::Client, node: &Node, body: &Value) -> (String, String, Duration) {
    let began = Instant::now();
    let response = client.post(format!("{}/v1/chat/completions", node.url)).json(body).send().await.expect("the node answers");
    let x_cache = response.headers().get("x-cache").map(|value| value.to_str().expect("text").to_owned()).unwrap_or_default();
    let body: Value = response.json().await.expect("JSON");
    let text = body["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{body}")).to_owned();
    (text, x_cache, began.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_in_other_words_has_the_same_answer_and_another_question_has_not() {
    let node = start(Some(PATIENT)).await;
    let client = reqwest::Client::new();
    // The first vector takes longer than a request waits for one.
    embed(&node, &["Hello".to_owned()]).await;
    let first = "How do I boil an egg?";
    assert_eq!(ask(&client, &node, &chat("echo", first)).await.1, "miss");
    placed(&node, 1.0).await;
    let (text, x_cache, _) = ask(&client, &node, &chat("echo", "What's the best way to boil an egg?")).await;
    assert_eq!(text, first, "{x_cache}");
    assert!(x_cache.starts_with("hit; layer=semantic; similarity=0.9"), "{x_cache}");
    for other in ["How do I poach an egg?", "How do I boil a dozen eggs?", "How do I boil an egg without cracking it?"] {
        assert_eq!(ask(&client, &node, &chat("echo", other)).await.0, other);
    }
    // Or the restart would come before all of them are.
    placed(&node, 4.0).await;
    let mut conversation = chat("echo", "Explain how to boil an egg, please.");
    let turns = [json!({ "role": "user", "content": "Hello" }), json!({ "role": "assistant", "content": "Hello!" })];
    let question = conversation["messages"][0].take();
    conversation["messages"] = json!([turns[0], turns[1], question]);
    assert_eq!(ask(&client, &node, &conversation).await.1, "miss", "a conversation means what was said before, too");

    let node = node.relaunch(&[]);
    node.serves("all-minilm").await;
    node.serves("echo").await;
    embed(&node, &["Hello".to_owned()]).await;
    // So does the first look at the vectors.
    assert_eq!(ask(&client, &node, &chat("echo", "Who was the first on the moon?")).await.1, "miss");
    placed(&node, 1.0).await;
    let (text, x_cache, _) = ask(&client, &node, &chat("echo", "How should I boil an egg?")).await;
    assert_eq!((text.as_str(), x_cache.contains("semantic")), (first, true), "{x_cache}");
    node.place.ran(&["cache", "flush"]);
    let again = "How can I boil an egg?";
    assert_eq!(ask(&client, &node, &chat("echo", again)).await.0, again, "what was erased is not found under other words");
    // And so do the vectors: of the first question, and of the four others.
    let gone = async || (node.metric("fabstir_cache_questions_forgotten_total", &[]).await == Some(5.0)).then_some(());
    eventually("the vectors are deleted", LIMIT, gone).await;
}

/// Waits until so many questions of this run can be found in other words.
async fn placed(node: &Node, questions: f64) {
    let placed = async || (node.metric("fabstir_cache_questions_total", &[]).await >= Some(questions)).then_some(());
    eventually("the question can be found", LIMIT, placed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_place_for_vectors_questions_are_not_compared_and_the_log_says_so() {
    let config = config(Some(PATIENT));
    let portal = fabstir_tests::portal::Portal::start();
    let s5 = format!("use = 'storage-s5'\nconfig = {{ portals = [{{ url = '{}' }}] }}", portal.url);
    let node = Node::start(&config.replace("use = 'storage-disk'", &s5)).await;
    node.serves("all-minilm").await;
    node.serves("echo").await;
    let client = reqwest::Client::new();
    for question in ["How do I boil an egg?", "How should I boil an egg?"] {
        assert_eq!(ask(&client, &node, &chat("echo", question)).await.0, question);
    }
    node.logged(&["no storage plugin keeps vectors"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_embeds_is_not_asked_to_go_on() {
    let node = start(None).await;
    assert!(node.chat(&chat("all-minilm", "a")).await.refusal(400, "invalid_value").contains("embeds texts"));
    assert_eq!(node.get("/v1/models/all-minilm").await.body["generates"], false);
    let texts = ["How do I boil an egg?", "What's the best way to boil an egg?", "The moon is far away."];
    let vectors = embed(&node, &texts.map(str::to_owned)).await;
    assert!(cosine(&vectors[0], &vectors[1]) > 0.85 && cosine(&vectors[0], &vectors[2]) < 0.3);
}

async fn embed(node: &Node, texts: &[String]) -> Vec<Vec<f64>> {
    let mut vectors = Vec::new();
    for texts in texts.chunks(32) {
        let reply = node.post("/v1/embeddings", &json!({ "model": "all-minilm", "input": texts })).await;
        assert_eq!(reply.status, 200, "{reply:#?}");
        for datum in reply.body["data"].as_array().expect("a list") {
            let vector = datum["embedding"].as_array().expect("a vector");
            vectors.push(vector.iter().map(|number| number.as_f64().expect("a number")).collect());
        }
    }
    vectors
}

fn cosine(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(a, b)| a * b).sum()
}

/// A pair of questions: whether they mean the same, how alike their vectors are, and what keeps them apart.
struct Pair {
    same: bool,
    similarity: f64,
    veto: Option<Veto>,
}

/// The share of the paraphrases and of the near-duplicates that a rule takes for the same.
fn shares(pairs: &[&Pair], takes: impl Fn(&Pair) -> bool) -> (f64, f64) {
    let share = |same: bool| {
        let of: Vec<&&Pair> = pairs.iter().filter(|pair| pair.same == same).collect();
        of.iter().filter(|pair| takes(pair)).count() as f64 / of.len() as f64
    };
    (share(true), share(false))
}

#[tokio::test(flavor = "multi_thread")]
async fn words_that_change_the_answer_are_seen_where_vectors_do_not_see_them() {
    let node = start(None).await;
    let file = repository().join("models/all-minilm/questions.json");
    let families: Vec<Value> = serde_json::from_slice(&std::fs::read(file).expect("it can be read")).expect("JSON");
    let (mut dev, mut held_out) = (Vec::new(), Vec::new());
    for (number, family) in families.iter().enumerate() {
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let same: Vec<String> = family["same"].as_array().expect("a list").iter().map(text).collect();
        let other: Vec<String> = family["other"].as_array().expect("a list").iter().map(|other| text(&other[1])).collect();
        let all = [same.clone(), other].concat();
        let vectors = embed(&node, &all).await;
        let questions: Vec<Question> = all.iter().map(|text| Question::new(text)).collect();
        let pairs = (0..all.len()).flat_map(|one| (one + 1..all.len()).map(move |other| (one, other)));
        for (one, other) in pairs.filter(|(one, other)| *other < same.len() || *one < 2) {
            let (similarity, veto) = (cosine(&vectors[one], &vectors[other]), questions[one].differs(&questions[other]));
            let pair = Pair { same: other < same.len(), similarity, veto };
            if number % 2 == 0 { dev.push(pair) } else { held_out.push(pair) }
        }
    }
    let (dev, held_out): (Vec<&Pair>, Vec<&Pair>) = (dev.iter().collect(), held_out.iter().collect());
    let threshold = f64::from(fabstir_host::config::Semantic::default().threshold_permille) / 1000.0;
    // The threshold that a cache without the words would need for as few false hits on the same pairs.
    let plain = |pairs: &[&Pair]| {
        let mut others: Vec<f64> = pairs.iter().filter(|pair| !pair.same).map(|pair| pair.similarity).collect();
        others.sort_by(|one, other| other.total_cmp(one));
        let least = others[others.len() / 100];
        (least, shares(pairs, |pair| pair.similarity > least))
    };
    for (name, pairs) in [("dev", &dev), ("held out", &held_out)] {
        let count = |same| pairs.iter().filter(|pair| pair.same == same).count();
        let (hits, wrong) = shares(pairs, |pair| pair.veto.is_none() && pair.similarity >= threshold);
        let (least, (plain_hits, plain_wrong)) = plain(pairs);
        let (at_hits, at_wrong) = shares(pairs, |pair| pair.similarity >= threshold);
        println!("{name}: {} paraphrases, {} near-duplicates", count(true), count(false));
        println!("  words and {threshold}: {:.1} % hits, {:.1} % false hits", 100.0 * hits, 100.0 * wrong);
        println!("  {least:.4} alone: {:.1} % hits, {:.1} % false hits", 100.0 * plain_hits, 100.0 * plain_wrong);
        println!("  {threshold} alone: {:.1} % hits, {:.1} % false hits", 100.0 * at_hits, 100.0 * at_wrong);
        assert!(count(true) + count(false) >= 390, "too few pairs");
        assert!(wrong <= 0.01 && hits > 2.0 * plain_hits, "{name}");
    }
    for veto in Veto::ALL {
        let by = held_out.iter().filter(|pair| pair.veto == Some(veto));
        let (same, other): (Vec<&&Pair>, Vec<&&Pair>) = by.partition(|pair| pair.same);
        println!("  kept apart by {}: {} near-duplicates, {} paraphrases", veto.word(), other.len(), same.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn looking_for_other_words_costs_a_miss_milliseconds() {
    let (plain, node, patient) = (start(None).await, start(Some("")).await, start(Some(PATIENT)).await);
    let clients = [reqwest::Client::new(), reqwest::Client::new(), reqwest::Client::new()];
    let (mut without, mut misses, mut hits) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..100 {
        let body = chat("echo", &format!("What is the capital of the province number {number}?"));
        without.push(ask(&clients[0], &plain, &body).await.2);
        let (_, x_cache, took) = ask(&clients[1], &node, &body).await;
        assert_eq!(x_cache, "miss");
        misses.push(took);
        ask(&clients[2], &patient, &body).await;
        let (_, x_cache, took) =
            ask(&clients[2], &patient, &chat("echo", &format!("Which is the capital of the province number {number}?"))).await;
        if x_cache.contains("semantic") {
            hits.push(took);
        }
    }
    let share = |times: &mut Vec<Duration>, share: f64| {
        times.sort();
        times[(times.len() as f64 * share) as usize]
    };
    assert!(hits.len() >= 10, "{} hits", hits.len());
    for (name, times) in [("without a cache", &mut without), ("a miss", &mut misses), ("a semantic hit", &mut hits)] {
        println!("{name}: p50 {:?}, p95 {:?}, of {}", share(times, 0.5), share(times, 0.95), times.len());
    }
}
