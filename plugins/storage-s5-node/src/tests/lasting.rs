//! What outlives an instance, and what happens while one takes over from another.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::*;

/// Tells the child which folder it works on.
const FOLDER: &str = "STORAGE_S5_NODE_CRASH_FOLDER";

#[tokio::test(flavor = "multi_thread")]
async fn restart_keeps_blobs_and_identity() {
    let instance = Instance::new(json!({})).await;
    let (id, node) = (instance.put(b"stays").await.expect("is put"), instance.id().await);
    let key = instance.state.path().join("node.key");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&key).expect("is there").permissions());
    assert_eq!(mode & 0o777, 0o600, "nobody else may read the key");
    let instance = instance.again(json!({})).await;
    assert_eq!((instance.whole(&id).await.as_deref(), instance.id().await), (Ok(&b"stays"[..]), node));

    let Instance { s5, state, config } = instance;
    s5.shutdown().await;
    std::fs::write(&key, "no key").expect("is written");
    let config: Config = serde_json::from_value(config).expect("a configuration");
    let error = S5Node::open(config, state.path()).await.err().expect("is refused");
    assert!(error.message.contains("node.key"), "no other identity takes its place: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn next_instance_takes_over_the_address_when_it_is_free() {
    // An address of this test's own: the port is free for a moment, and others take free ports.
    let [_, .., high, low] = std::process::id().to_be_bytes();
    let own = format!("127.77.{high}.{low}:0");
    let first = Instance::new(json!({ "serve_public": true, "listen": own })).await;
    let id = first.put(b"served by both").await.expect("is put");
    let listen = first.address().await.1.to_string();
    let config: Config = serde_json::from_value(json!({ "serve_public": true, "listen": listen })).expect("a configuration");
    let second = S5Node::open(config, first.state.path()).await.expect("opens beside the first");
    assert!(matches!(second.health().await, Health::Degraded { .. }));
    let head = second.head(&Cx::new(), id.clone()).await.expect("what is here needs no address");
    assert_eq!(head.size, 14);
    let guest = Instance::new(json!({ "peers": [first.as_peer().await] })).await;
    assert!(guest.whole(&id).await.is_ok());

    first.s5.shutdown().await;
    let Instance { s5, state: _state, .. } = first;
    drop(s5);
    wait_until_ready(&second).await;
    assert_eq!(guest.whole(&id).await.as_deref(), Ok(&b"served by both"[..]));
    second.shutdown().await;
}

/// As a command on the command line does while the node runs.
#[tokio::test(flavor = "multi_thread")]
async fn second_instance_on_an_address_asks_others_too() {
    let (host, guest) = pair().await;
    let id = host.put(b"of another node").await.expect("is put");
    let listen = guest.address().await.1.to_string();
    let config: Config =
        serde_json::from_value(json!({ "listen": listen, "peers": [host.as_peer().await] })).expect("a configuration");
    let second = S5Node::open(config, guest.state.path()).await.expect("opens beside the first");
    assert!(matches!(second.health().await, Health::Degraded { .. }));
    for _ in 0..3 {
        let mut stream = second.get(&Cx::new(), id.clone(), Range::default()).await.expect("is asked from another port");
        assert_eq!(stream.next().await.expect("has bytes").expect("comes").as_ref(), b"of another node");
        assert_eq!(guest.whole(&id).await.as_deref(), Ok(&b"of another node"[..]), "and the first asks as before");
    }
    second.shutdown().await;
    assert_eq!(guest.whole(&id).await.as_deref(), Ok(&b"of another node"[..]));
}

/// Not a test of its own: the process that is killed.
#[tokio::test(flavor = "multi_thread")]
async fn child_of_kill_test() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let node = S5Node::open(Config::default(), std::path::Path::new(&folder)).await.expect("opens");
    for number in 0u64.. {
        let pieces = [noise(50_000, number as u8), number.to_le_bytes().to_vec()].map(Blob::from);
        let entry = node.put(&Cx::new(), Expect::default(), Stream::from_items(pieces)).await.expect("is put");
        println!("kept {}", entry.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_acknowledged_survives_kill_9() {
    let state = tempfile::tempdir().expect("a folder can be made");
    let mut kept = Vec::new();
    for round in 0..5 {
        let mut child = Command::new(std::env::current_exe().expect("is known"))
            .args(["--exact", "tests::lasting::child_of_kill_test", "--nocapture"])
            .env(FOLDER, state.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(child.stdout.take().expect("is piped")).lines();
        let enough = 10 + 7 * round;
        while kept.len() < enough * (round + 1) {
            let line = lines.next().expect("goes on").expect("is text");
            if let Some((_, id)) = line.split_once("kept ") {
                kept.push(id.to_owned());
            }
        }
        child.kill().expect("is killed");
        child.wait().expect("is dead");
        // What was still in the pipe is acknowledged too.
        kept.extend(lines.map_while(Result::ok).filter_map(|line| line.split_once("kept ").map(|(_, id)| id.to_owned())));
        let node = S5Node::open(Config::default(), state.path()).await.expect("opens");
        for id in &kept {
            let id = id.get(..64).unwrap_or_default();
            // The last line may be cut off.
            if id.len() == 64 {
                let mut stream = node.get(&Cx::new(), id.to_owned(), Range::default()).await.expect("is there");
                while let Some(piece) = stream.next().await {
                    piece.expect("and whole");
                }
            }
        }
        node.shutdown().await;
    }
    assert_eq!(std::fs::read_dir(state.path().join("blobs/.tmp")).expect("is there").count(), 0);
}
