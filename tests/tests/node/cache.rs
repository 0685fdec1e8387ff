//! Answers that are given again.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use fabstir_tests::http::with;
use fabstir_tests::{LIMIT, Node, Place, chat, eventually};
use serde_json::{Value, json};

/// Echo in the node itself, with a cache that waits for its disk, however long that takes.
fn echo(cache: &str, settings: &str) -> String {
    format!(
        "[cache]\nenabled = true\nlook_ms = 10000\n{cache}\n[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nisolation = 'in-process'\n\
         config = {{ {settings} }}\n"
    )
}

/// An answer, with what it says of the cache.
struct Told {
    status: u16,
    x_cache: String,
    body: Value,
}

impl Told {
    fn is_hit(&self) -> bool {
        assert_eq!(self.status, 200, "{}", self.body);
        assert!(self.x_cache == "miss" || self.x_cache.starts_with("hit; layer="), "{}", self.x_cache);
        self.x_cache != "miss"
    }

    fn content(&self) -> &str {
        self.body["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("no content in {}", self.body))
    }
}

async fn ask(node: &Node, body: &Value, headers: &[(&str, &str)]) -> Told {
    let mut request = reqwest::Client::new().post(format!("{}/v1/chat/completions", node.url)).json(body);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = request.send().await.expect("the node answers");
    let x_cache = response.headers().get("x-cache").map(|value| value.to_str().expect("text").to_owned()).unwrap_or_default();
    Told { status: response.status().as_u16(), x_cache, body: response.json().await.expect("JSON") }
}

async fn generated(node: &Node) -> f64 {
    node.metric("fabstir_generation_tokens_total", &["model_name=\"echo\""]).await.unwrap_or(0.0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_ask_is_answered_from_the_cache_and_says_so() {
    let node = Node::start(&echo("", "")).await;
    let body = chat("echo", "one two three");
    let first = ask(&node, &body, &[]).await;
    assert!(!first.is_hit());
    let second = ask(&node, &body, &[]).await;
    assert!(second.x_cache.starts_with("hit; layer=exact; age="), "{}", second.x_cache);
    assert_eq!(second.content(), first.content());
    assert_eq!(second.body["choices"], first.body["choices"]);
    assert_eq!(second.body["system_fingerprint"], first.body["system_fingerprint"]);
    assert_ne!(second.body["id"], first.body["id"], "it is another answer");
    let usage = &second.body["usage"];
    assert_eq!((&usage["completion_tokens"], &usage["prompt_tokens"]), (&json!(3), &json!(3)));
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 3, "no prompt token was read");
    assert_eq!(first.body["usage"]["prompt_tokens_details"]["cached_tokens"], 0);

    let streamed = node.stream(with(body, json!({ "stream_options": { "include_usage": true } }))).await.rest().await;
    assert!(streamed.is_whole());
    assert_eq!((streamed.text.as_str(), streamed.pieces), ("one two three", 3), "in the pieces in which it was said");
    assert_eq!(streamed.usage.expect("it was asked for")["prompt_tokens_details"]["cached_tokens"], 3);

    assert_eq!(generated(&node).await, 3.0);
    let count = async |name: &str| node.metric(name, &[]).await;
    assert_eq!(count("fabstir_cache_lookups_total").await, Some(3.0));
    assert_eq!(node.metric("fabstir_cache_hits_total", &["layer=\"exact\""]).await, Some(2.0));
    assert_eq!(
        (count("fabstir_cache_stored_total").await, count("fabstir_cache_tokens_saved_total").await),
        (Some(1.0), Some(6.0))
    );
    assert_eq!(count("fabstir_cache_entries").await, Some(1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_come_out_otherwise_is_generated() {
    let node = Node::start(&echo("", "")).await;
    let drawn = with(chat("echo", "a"), json!({ "temperature": 1 }));
    for _ in 0..2 {
        assert!(!ask(&node, &drawn, &[]).await.is_hit());
    }
    assert!(!ask(&node, &drawn, &[("x-cache", "any")]).await.is_hit(), "nobody who asked before let it be kept");
    assert!(ask(&node, &drawn, &[("x-cache", "any")]).await.is_hit());
    assert!(!ask(&node, &drawn, &[]).await.is_hit());
    let seeded = with(drawn, json!({ "seed": 7 }));
    assert!(!ask(&node, &seeded, &[]).await.is_hit());
    assert!(ask(&node, &seeded, &[]).await.is_hit());
    let settings = [
        json!({ "seed": 8 }),
        json!({ "max_tokens": 5 }),
        json!({ "stop": "z" }),
        json!({ "top_p": 0.5 }),
        json!({ "user": "somebody" }),
        json!({ "cache_prompt": false }),
        json!({ "messages": [{ "role": "system", "content": "Be brief." }, { "role": "user", "content": "a" }] }),
    ];
    for setting in settings {
        assert!(!ask(&node, &with(seeded.clone(), setting.clone()), &[]).await.is_hit(), "{setting}");
    }
    assert!(!ask(&node, &with(seeded, json!({ "cache_prompt": false })), &[]).await.is_hit(), "it was not to be kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_control_means_what_the_standard_says() {
    let node = Node::start(&echo("", "")).await;
    let body = chat("echo", "a b");
    let control = async |directives: &str| ask(&node, &body, &[("cache-control", directives)]).await;
    let refused = control("only-if-cached").await;
    assert_eq!((refused.status, &refused.body["error"]["code"]), (504, &json!("not_cached")), "{}", refused.body);
    assert!(!control("no-store").await.is_hit());
    assert_eq!(control("only-if-cached").await.status, 504, "it was not to be stored");
    assert!(!control("").await.is_hit());
    assert!(control("only-if-cached").await.is_hit());
    assert!(!control("no-store").await.is_hit());
    assert!(!control("no-cache").await.is_hit());
    assert!(control("max-age=60").await.is_hit());
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(!control("max-age=0").await.is_hit());
    assert!(control("max-stale").await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_what_is_kept_and_a_broken_file_is_set_aside() {
    let node = Node::start(&echo("", "")).await;
    let body = chat("echo", "a b");
    assert!(!ask(&node, &body, &[]).await.is_hit());
    // By a look the write is known to be through.
    assert!(ask(&node, &body, &[]).await.is_hit());
    let node = node.relaunch(&[]);
    node.healthy().await;
    assert!(ask(&node, &body, &[]).await.is_hit());

    let place = node.into_place();
    let file = place.path().join("data/cache/answers.sqlite");
    place.file("data/cache/answers.sqlite", vec![b'x'; 8192]);
    let _ = std::fs::remove_file(place.path().join("data/cache/answers.sqlite-wal"));
    let node = Node::launch(place, &[]);
    node.healthy().await;
    assert!(!ask(&node, &body, &[]).await.is_hit());
    assert!(ask(&node, &body, &[]).await.is_hit());
    node.logged(&["cannot be used, and is set aside"]).await;
    assert!(file.with_extension("sqlite.aside").exists());

    // And one that breaks under a running node.
    std::fs::write(&file, vec![b'x'; 1 << 16]).expect("it can be written over");
    eventually("the cache works again", LIMIT, async || {
        let words = format!("again {}", rand::random::<u64>());
        ask(&node, &chat("echo", &words), &[]).await.is_hit();
        ask(&node, &chat("echo", &words), &[]).await.is_hit().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_never_meet_and_each_can_be_erased() {
    let node = Node::start(&echo("", "")).await;
    let body = chat("echo", "a secret");
    let keys = ["Bearer alice", "Bearer bob"];
    for key in keys {
        assert!(!ask(&node, &body, &[("authorization", key)]).await.is_hit(), "{key}");
        assert!(ask(&node, &body, &[("authorization", key)]).await.is_hit(), "{key}");
    }
    // What is found is written.
    assert!(!ask(&node, &body, &[]).await.is_hit());
    assert!(ask(&node, &body, &[]).await.is_hit());
    let stats = node.place.ran(&["cache", "stats", "--json"]).json();
    let tenants: Vec<&str> =
        stats["tenants"].as_array().expect("a list").iter().filter_map(|share| share["name"].as_str()).collect();
    assert_eq!((tenants.len(), tenants.iter().collect::<HashSet<_>>().len()), (3, 3), "{stats:#}");
    assert_eq!((&stats["models"][0]["name"], &stats["models"][0]["hits"]), (&json!("echo"), &json!(3)), "{stats:#}");
    assert!(!stats.to_string().contains("alice"), "a key is nowhere to be read");
    let text = node.place.ran(&["cache", "stats"]).out;
    assert!(text.contains("TOKENS SAVED") && text.contains("\n-  "), "{text}");

    assert_eq!(node.place.ran(&["cache", "flush", "--tenant", "-", "--json"]).json()["removed"], 1);
    assert!(!ask(&node, &body, &[]).await.is_hit());
    assert!(ask(&node, &body, &[("authorization", keys[0])]).await.is_hit());
    assert_eq!(node.place.ran(&["cache", "flush", "--json"]).json()["removed"], 3);
    for key in keys {
        assert!(!ask(&node, &body, &[("authorization", key)]).await.is_hit(), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_clients_who_ask_the_same_share_one_generation() {
    let node = Node::start(&echo("", "delay_ms = 20, parallel = 2")).await;
    let words = "word ".repeat(150);
    let body = chat("echo", &words);
    let mut first = node.stream(body.clone()).await;
    assert_eq!(first.text().await, "word ");
    let late = (0..20).map(|number| {
        let (node, body) = (&node, body.clone());
        async move {
            match number % 2 {
                0 => ask(node, &body, &[]).await.content().to_owned(),
                _ => node.stream(body).await.rest().await.text,
            }
        }
    });
    let late = futures::future::join_all(late).await;
    assert!(late.iter().all(|text| *text == words), "{late:?}");
    assert_eq!(first.rest().await.text, words["word ".len()..]);
    assert_eq!(generated(&node).await, 150.0);
    assert_eq!(node.metric("fabstir_cache_hits_total", &["layer=\"flight\""]).await, Some(20.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leaves_takes_nobody_along_and_the_last_ends_the_generation() {
    let node = Node::start(&echo("", "delay_ms = 20, parallel = 1")).await;
    let words = "word ".repeat(40);
    let mut first = node.stream(chat("echo", &words)).await;
    assert_eq!(first.text().await, "word ");
    let mut second = node.stream(chat("echo", &words)).await;
    assert_eq!(second.text().await, "word ");
    drop(first);
    let told = second.rest().await;
    assert!(told.is_whole() && told.text == words["word ".len()..], "{told:?}");

    let long = "other ".repeat(1000);
    let mut leaving = Vec::new();
    for _ in 0..2 {
        let mut client = node.stream(chat("echo", &long)).await;
        assert_eq!(client.text().await, "other ");
        leaving.push(client);
    }
    drop(leaving);
    // There is one slot.
    assert_eq!(node.ask("echo", "next").await, "next");
    assert!(!ask(&node, &with(chat("echo", &long), json!({ "max_tokens": 1 })), &[]).await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_broke_off_is_not_kept() {
    let config = "[cache]\nenabled = true\n[scheduler]\nretries = 0\n[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nconfig = { delay_ms = 30 }\n";
    let node = Node::start(config).await;
    let body = chat("echo", &"word ".repeat(50));
    let mut broken = node.stream(body.clone()).await;
    broken.text().await;
    let worker = node.worker("inference-echo", None).await;
    fabstir_tests::process::send(worker, libc::SIGKILL);
    assert!(broken.rest().await.error.is_some());
    node.worker("inference-echo", Some(worker)).await;
    eventually("it answers again", LIMIT, async || {
        let told = ask(&node, &body, &[]).await;
        (told.status == 200).then(|| assert!(!told.is_hit()))
    })
    .await;
    // One that came while the plugin started is answered past the cache.
    eventually("a whole answer is kept", LIMIT, async || ask(&node, &body, &[]).await.is_hit().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cache_gives_up_the_least_useful_and_an_old_answer_is_not_given() {
    let node = Node::start(&echo("max_bytes = '64KiB'", "")).await;
    let favourite = chat("echo", &"favourite ".repeat(20));
    ask(&node, &favourite, &[]).await;
    for number in 0..60 {
        assert!(!ask(&node, &chat("echo", &format!("{number} {}", "filler ".repeat(60))), &[]).await.is_hit());
        if number < 20 {
            assert!(ask(&node, &favourite, &[]).await.is_hit(), "{number}");
        }
    }
    let (bytes, evicted) = (node.metric("fabstir_cache_bytes", &[]).await, node.metric("fabstir_cache_evicted_total", &[]).await);
    assert!(
        bytes.is_some_and(|bytes| bytes <= 65536.0) && evicted.is_some_and(|evicted| evicted >= 1.0),
        "{bytes:?} {evicted:?}"
    );

    let node = Node::start(&echo("ttl_s = 1", "")).await;
    assert!(!ask(&node, &favourite, &[]).await.is_hit());
    eventually("it is too old", LIMIT, async || {
        let told = ask(&node, &favourite, &[("cache-control", "only-if-cached")]).await;
        (told.status == 504).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_model_of_the_same_name_has_not_said_it() {
    let entry = |context: u32| echo("", &format!("context = {context}"));
    let node = Node::start(&entry(100)).await;
    let body = chat("echo", "a b");
    assert!(!ask(&node, &body, &[]).await.is_hit());
    assert!(ask(&node, &body, &[]).await.is_hit());
    node.place.configure(&entry(200));
    let node = node.relaunch(&[]);
    node.healthy().await;
    assert!(!ask(&node, &body, &[]).await.is_hit());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_setting_there_is_no_cache() {
    let node = Node::start("[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\n").await;
    for _ in 0..2 {
        let told = ask(&node, &chat("echo", "a"), &[("cache-control", "only-if-cached")]).await;
        assert_eq!((told.status, told.x_cache.as_str()), (200, ""));
    }
    assert!(!node.place.path().join("data/cache").exists());
    assert!(node.place.ran(&["cache", "stats"]).out.contains("no answers are kept"));
    assert_eq!(node.place.ran(&["cache", "flush", "--json"]).json()["removed"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hit_takes_milliseconds_and_a_miss_hardly_more_than_without() {
    let plain = Node::launch(Place::new("[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nisolation = 'in-process'\n"), &[]);
    plain.healthy().await;
    let cached = Node::start(&echo("", "")).await;
    let clients = [reqwest::Client::new(), reqwest::Client::new()];
    let time = async |client: &reqwest::Client, node: &Node, body: &Value| {
        let began = Instant::now();
        let response = client.post(format!("{}/v1/chat/completions", node.url)).json(body).send().await.expect("an answer");
        let hit = response.headers().get("x-cache").is_some_and(|value| value != "miss");
        response.bytes().await.expect("a body");
        (began.elapsed(), hit)
    };
    let (mut without, mut misses, mut hits) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..300 {
        let body = chat("echo", &format!("question {number} of a few words"));
        without.push(time(&clients[0], &plain, &body).await.0);
        let (took, hit) = time(&clients[1], &cached, &body).await;
        assert!(!hit);
        misses.push(took);
        let (took, hit) = time(&clients[1], &cached, &body).await;
        assert!(hit);
        hits.push(took);
    }
    let share = |times: &mut Vec<Duration>, share: f64| {
        times.sort();
        times[(times.len() as f64 * share) as usize]
    };
    for (name, times) in [("without a cache", &mut without), ("a miss", &mut misses), ("a hit", &mut hits)] {
        println!("{name}: p50 {:?}, p95 {:?}", share(times, 0.5), share(times, 0.95));
    }
    assert!(share(&mut hits, 0.95) <= Duration::from_millis(20));
    assert!(share(&mut misses, 0.5) <= share(&mut without, 0.5) + Duration::from_millis(10));
}
