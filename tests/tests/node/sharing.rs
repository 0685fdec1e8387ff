//! Answers that several nodes of one operator share, through a portal that none of them trusts.

use std::time::{Duration, Instant};

use fabstir_tests::http::with;
use fabstir_tests::portal::Portal;
use fabstir_tests::{LIMIT, Node, Place, chat, eventually, process};
use serde_json::{Value, json};

pub const ECHO: &str = "[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nisolation = 'in-process'\n\n";

/// Starts a node that shares what it says with those that have the same key, in this storage.
pub async fn sharing(key: &str, id: &str, plugin: &str, config: &str) -> Node {
    let place = Place::new(&format!(
        "[cache]\nenabled = true\nlook_ms = 10000\nshared = {{ storage = '{id}', key_file = 'shared.key', every_s = 1 }}\n\n{ECHO}\
         [[plugin]]\nid = '{id}'\nuse = '{plugin}'\n[plugin.config]\ntimeout_ms = 1000\n{config}\n"
    ));
    let file = place.file("shared.key", key);
    std::fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("it is ours");
    let node = Node::launch(place, &[]);
    node.healthy().await;
    node
}

async fn start(portal: &Portal, key: &str) -> Node {
    sharing(key, "s5", "storage-s5", &format!("portals = [{{ url = '{}' }}]", portal.url)).await
}

/// The status, and what the answer says of the cache.
pub async fn ask(node: &Node, body: &Value, control: &str) -> (u16, String) {
    let request = reqwest::Client::new().post(format!("{}/v1/chat/completions", node.url)).json(body);
    let response = request.header("cache-control", control).send().await.expect("the node answers");
    let x_cache = response.headers().get("x-cache").map(|value| value.to_str().expect("text").to_owned()).unwrap_or_default();
    (response.status().as_u16(), x_cache)
}

/// Waits until a node has an answer without having said it.
pub async fn knows(node: &Node, body: &Value) {
    eventually("the answer is shared", LIMIT, async || {
        let (status, x_cache) = ask(node, body, "only-if-cached").await;
        assert!(status == 504 || x_cache.starts_with("hit; layer=exact"), "{status} {x_cache}");
        (status == 200).then_some(())
    })
    .await;
}

async fn forgets(node: &Node, body: &Value) {
    eventually("the answer is erased", LIMIT, async || (ask(node, body, "only-if-cached").await.0 == 504).then_some(())).await;
}

pub const KEY: &str = "5f1d0c0e4b7a6938271605f4e3d2c1b0a99887766554433221100ffeeddccbba\n";
const OTHER_KEY: &str = "0f1d0c0e4b7a6938271605f4e3d2c1b0a99887766554433221100ffeeddccbba\n";

#[tokio::test(flavor = "multi_thread")]
async fn what_one_node_has_said_another_one_knows_and_no_stranger() {
    let portal = Portal::start();
    let (one, other, stranger) = (start(&portal, KEY).await, start(&portal, KEY).await, start(&portal, OTHER_KEY).await);
    let questions: Vec<Value> = (0..3).map(|number| chat("echo", &format!("a secret of {number}"))).collect();
    assert_eq!(ask(&one, &questions[0], "").await.1, "miss");
    knows(&other, &questions[0]).await;
    // Both write at the same time; nothing is lost by it.
    assert_eq!(ask(&one, &questions[1], "").await.1, "miss");
    assert_eq!(ask(&other, &questions[2], "").await.1, "miss");
    knows(&other, &questions[1]).await;
    knows(&one, &questions[2]).await;
    assert!(one.metric("fabstir_cache_shared_total", &[]).await >= Some(2.0));
    assert!(other.metric("fabstir_cache_taken_in_total", &[]).await >= Some(2.0));
    let tenant = with(questions[0].clone(), json!({ "user": "somebody else" }));
    assert_eq!(ask(&other, &tenant, "only-if-cached").await.0, 504, "another tenant's answer is nobody's business");

    assert_eq!(ask(&stranger, &questions[0], "only-if-cached").await.0, 504);
    assert!(stranger.metric("fabstir_cache_taken_in_total", &[]).await == Some(0.0));
    for blob in std::fs::read_dir(portal.blob("")).expect("a folder").flatten() {
        let bytes = std::fs::read(blob.path()).expect("it can be read");
        assert!(!bytes.windows(8).any(|window| window == b"a secret"), "the portal could read along");
    }

    // What is erased on one node is erased on the other, is not taken in again, and leaves the portal.
    let flushed = one.place.ran(&["cache", "flush", "--tenant", "-", "--json"]).json();
    assert_eq!(flushed["removed"], 3, "{flushed}");
    for node in [&one, &other] {
        for question in &questions {
            forgets(node, question).await;
        }
    }
    let later = chat("echo", "said later");
    assert_eq!(ask(&one, &later, "").await.1, "miss");
    knows(&other, &later).await;
    for question in &questions {
        assert_eq!(ask(&one, question, "only-if-cached").await.0, 504);
    }
    eventually("only what lives is on the portal", LIMIT, async || {
        // One pack and one list; the other node's packs held nothing that was left.
        let blobs = std::fs::read_dir(portal.blob("")).expect("a folder").flatten().count();
        (blobs <= 3).then_some(())
    })
    .await;

    // A node that starts anew learns all of it.
    let third = start(&portal, KEY).await;
    knows(&third, &later).await;
    assert_eq!(ask(&third, &questions[0], "only-if-cached").await.0, 504);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_portal_delays_nobody_and_what_was_said_meanwhile_is_shared_later() {
    let portal = Portal::start();
    let (one, other) = (start(&portal, KEY).await, start(&portal, KEY).await);
    let before = chat("echo", "before");
    assert_eq!(ask(&one, &before, "").await.1, "miss");
    knows(&other, &before).await;

    // It takes connections, and says nothing.
    process::stop(portal.pid());
    one.logged(&["Answers are not shared."]).await;
    let mut times = Vec::new();
    for number in 0..50 {
        let body = chat("echo", &format!("meanwhile {number}"));
        let began = Instant::now();
        assert_eq!(ask(&one, &body, "").await.1, "miss");
        times.push(began.elapsed());
        assert!(ask(&one, &body, "").await.1.starts_with("hit; layer=exact"));
    }
    times.sort();
    println!("a miss beside a dead portal: p50 {:?}, p95 {:?}", times[25], times[47]);
    assert!(times[25] < Duration::from_millis(500), "{times:?}");
    process::send(portal.pid(), libc::SIGCONT);
    knows(&other, &chat("echo", "meanwhile 49")).await;
    one.logged(&["Answers are shared again."]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_was_changed_is_not_taken_in() {
    let portal = Portal::start();
    let (one, witness) = (start(&portal, KEY).await, start(&portal, KEY).await);
    let body = chat("echo", "said once");
    assert_eq!(ask(&one, &body, "").await.1, "miss");
    // Only when another node has it, the pointer is out as well.
    knows(&witness, &body).await;
    drop((one, witness));
    for blob in std::fs::read_dir(portal.blob("")).expect("a folder").flatten().map(|blob| blob.path()) {
        let mut bytes = std::fs::read(&blob).expect("it can be read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&blob, bytes).expect("it can be written");
    }
    let other = start(&portal, KEY).await;
    other.logged(&["Answers are not shared."]).await;
    assert_eq!(ask(&other, &body, "only-if-cached").await.0, 504);
    assert_eq!(ask(&other, &body, "").await.1, "miss");
}
