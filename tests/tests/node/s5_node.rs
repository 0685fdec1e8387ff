//! Nodes with an S5 node of their own in a plugin, which fetch from each other what they have not.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fabstir_tests::{LIMIT, Node, Place, Ran, chat, eventually, process};

use crate::sharing::{ECHO, KEY, ask, knows, sharing};

/// The plugin with settings, and one that a node can be started with.
fn plugin(settings: &str) -> String {
    format!("{ECHO}[[plugin]]\nid = 's5-node'\nuse = 'storage-s5-node'\n[plugin.config]\ntimeout_ms = 20000\n{settings}\n")
}

/// What another node writes into `peers` to read from this one, as this one's log has it.
async fn as_peer(node: &Node) -> String {
    let line = eventually("the S5 node is up", LIMIT, async || {
        node.log().lines().rev().find(|line| line.contains("The S5 node is up.")).map(str::to_owned)
    })
    .await;
    let field = |name: &str| {
        let value = line.split(&format!("{name}=")).nth(1).unwrap_or_else(|| panic!("{line}"));
        value.split_whitespace().next().expect("a value").trim_matches('"').to_owned()
    };
    format!("peers = [{{ node = '{}', address = '{}' }}]", field("node"), field("address"))
}

/// Starts a node in the folder of one that has ended. Its port is another one from now on.
fn again(place: Place, settings: &str) -> Node {
    fs::remove_file(place.path().join("log")).expect("it has one");
    place.configure(&plugin(settings));
    Node::launch(place, &[])
}

fn storage(place: &Place, arguments: &[&str]) -> Ran {
    place.run(&[&["storage"], arguments, &["--plugin", "s5-node"]].concat())
}

/// What a command that has to succeed prints.
#[track_caller]
fn told(place: &Place, arguments: &[&str]) -> String {
    let ran = storage(place, arguments);
    assert_eq!(ran.code, 0, "{arguments:?}: {ran:#?}");
    ran.out.trim().to_owned()
}

/// The code of an error.
#[track_caller]
fn refusal(ran: Ran) -> String {
    assert_ne!(ran.code, 0, "{ran:#?}");
    ran.json()["error"]["code"].as_str().expect("a code").to_owned()
}

/// A node that serves a file to everybody, and the file's id.
async fn keeper(bytes: &[u8]) -> (Node, String) {
    let keeper = Node::start(&plugin("serve_public = true")).await;
    keeper.place.file("in", bytes);
    let id = told(&keeper.place, &["put", "in"]);
    (keeper, id)
}

/// The files below a folder of this name in the state of a node.
fn files_in(place: &Path, name: &str) -> Vec<PathBuf> {
    let (mut left, mut found) = (vec![place.to_owned()], Vec::new());
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.path() {
                path if path.is_dir() => left.push(path),
                path if path.components().any(|part| part.as_os_str() == name) => found.push(path),
                _ => {}
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_one_node_is_read_on_another_and_not_without_leave() {
    let keeper = Node::start(&plugin("serve_public = true")).await;
    keeper.place.file("in", "what the other one wants");
    let id = keeper.place.ran(&["storage", "put", "in", "--plugin", "s5-node"]).out.trim().to_owned();

    let reader = Place::new(&plugin(&as_peer(&keeper).await));
    assert_eq!(told(&reader, &["get", &id]), "what the other one wants");
    assert_eq!(told(&reader, &["ls"]), "", "what is fetched is not kept");
    let get = |id: &str| refusal(storage(&reader, &["get", id, "-o", "out", "--json"]));
    assert_eq!(get(&"0".repeat(64)), "not_found");

    let place = keeper.into_place();
    let hasty = fs::read_to_string(reader.path().join("plugins.toml")).expect("reads").replace("20000", "1000");
    reader.configure(&hasty);
    assert_eq!(get(&id), "unreachable", "nobody can say whether there is such a blob");

    let keeper = again(place, "");
    reader.configure(&plugin(&as_peer(&keeper).await));
    assert_eq!(get(&id), "denied", "without `allow` nobody is let in");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_shared_without_any_portal() {
    let one = sharing(KEY, "s5-node", "storage-s5-node", "serve_public = true").await;
    let other = sharing(KEY, "s5-node", "storage-s5-node", &as_peer(&one).await).await;
    for number in 0..3 {
        let body = chat("echo", &format!("asked of one {number}"));
        assert_eq!(ask(&one, &body, "").await.1, "miss");
        knows(&other, &body).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_keeps_its_files_and_its_name() {
    let (one, id) = keeper(b"outlives its node").await;
    let name = |peer: &str| peer.split('\'').nth(1).expect("a node id").to_owned();
    let before = name(&as_peer(&one).await);

    // A put that is killed on its way leaves nothing that anybody sees, and nothing at all after the next start.
    let large = fs::File::create(one.place.path().join("large")).expect("a file");
    large.set_len(2 << 30).expect("it has holes");
    let mut put = one.place.command();
    let mut put = put.args(["storage", "put", "large", "--plugin", "s5-node"]).spawn().expect("it starts");
    let coming = |place: &Place| files_in(place.path(), ".tmp");
    eventually("some of it has come", LIMIT, async || {
        assert!(put.try_wait().expect("it is ours").is_none(), "it has ended before its time");
        let some = |path: &PathBuf| fs::metadata(path).is_ok_and(|file| file.len() > 1 << 20);
        coming(&one.place).iter().any(some).then_some(())
    })
    .await;
    process::stop(put.id() as i32);
    assert_eq!(coming(&one.place).len(), 1);
    put.kill().and_then(|()| put.wait()).expect("it ends");

    let one = again(one.into_place(), "serve_public = true");
    let peer = as_peer(&one).await;
    assert_eq!(name(&peer), before, "its id is what others know it by");
    assert_eq!(coming(&one.place), [] as [PathBuf; 0]);
    let list = told(&one.place, &["ls"]);
    assert!(list.contains(&id) && list.lines().count() == 1, "{list}");
    let reader = Place::new(&plugin(&peer));
    assert_eq!(told(&reader, &["get", &id]), "outlives its node");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_hangs_or_is_damaged_is_passed_over() {
    let bytes = b"what two nodes have";
    let ((bad, id), (good, _)) = (keeper(bytes).await, keeper(bytes).await);
    let (bad_peer, good_peer) = (as_peer(&bad).await, as_peer(&good).await);
    let both = format!("{}, {}", bad_peer.trim_end_matches(']'), good_peer.trim_start_matches("peers = ["));

    // A byte on its disk is another one.
    let files = files_in(bad.place.path(), "blob3");
    let [file] = &files[..] else { panic!("{files:?}") };
    fs::write(file, b"what two nodes hAve").expect("it is ours");
    let reader = Place::new(&plugin(&bad_peer));
    assert_eq!(refusal(storage(&reader, &["get", &id, "-o", "out", "--json"])), "not_found");
    assert_eq!(refusal(storage(&bad.place, &["get", &id, "-o", "out", "--json"])), "corrupt");
    reader.configure(&plugin(&both));
    assert_eq!(told(&reader, &["get", &id]).as_bytes(), bytes);
    // A put of the right bytes repairs it.
    assert_eq!(told(&bad.place, &["put", "in"]), id);
    reader.configure(&plugin(&bad_peer));
    assert_eq!(told(&reader, &["get", &id]).as_bytes(), bytes);

    // It takes packets, and says nothing.
    process::stop(bad.pid());
    reader.configure(&plugin(&both));
    let began = Instant::now();
    assert_eq!(told(&reader, &["get", &id]).as_bytes(), bytes);
    assert!(began.elapsed() < Duration::from_secs(20), "nobody waits for it where another node has the file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_full_takes_nothing_more_and_loses_nothing() {
    let small = Place::new(&plugin("max_bytes = 1000"));
    small.file("fits", [1; 600]);
    small.file("does not", [2; 401]);
    let id = told(&small, &["put", "fits"]);
    let ran = storage(&small, &["put", "does not", "--json"]);
    let message = ran.json()["error"]["message"].as_str().expect("a message").to_owned();
    assert_eq!(refusal(ran), "full");
    assert!(message.contains("400 bytes of `max_bytes` 1000 bytes are left"), "{message}");
    let list = told(&small, &["ls"]);
    assert!(list.contains(&id) && list.lines().count() == 1, "{list}");

    // What is fetched takes room while it comes.
    let (keeper, theirs) = keeper(&[3; 500]).await;
    small.configure(&plugin(&format!("max_bytes = 1000\n{}", as_peer(&keeper).await)));
    assert_eq!(refusal(storage(&small, &["get", &theirs, "-o", "out", "--json"])), "full");
    told(&small, &["rm", &id]);
    told(&small, &["get", &theirs, "-o", "out"]);
    assert_eq!(fs::read(small.path().join("out")).expect("it has come"), [3; 500]);
}
