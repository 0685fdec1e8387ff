//! Nodes with an S5 node of their own in a plugin, which fetch from each other what they have not.

use fabstir_tests::{Node, Place, chat, eventually};

use crate::sharing::{ECHO, KEY, ask, knows, sharing};

/// The plugin with settings, and one that a node can be started with.
fn plugin(settings: &str) -> String {
    format!("{ECHO}[[plugin]]\nid = 's5-node'\nuse = 'storage-s5-node'\n[plugin.config]\ntimeout_ms = 3000\n{settings}\n")
}

/// What another node writes into `peers` to read from this one, as this one's log has it.
async fn as_peer(node: &Node) -> String {
    let line = eventually("the S5 node is up", fabstir_tests::LIMIT, async || {
        node.log().lines().rev().find(|line| line.contains("The S5 node is up.")).map(str::to_owned)
    })
    .await;
    let field = |name: &str| {
        let value = line.split(&format!("{name}=")).nth(1).unwrap_or_else(|| panic!("{line}"));
        value.split_whitespace().next().expect("a value").trim_matches('"').to_owned()
    };
    format!("peers = [{{ node = '{}', address = '{}' }}]", field("node"), field("address"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_one_node_is_read_on_another_and_not_without_leave() {
    let keeper = Node::start(&plugin("serve_public = true")).await;
    keeper.place.file("in", "what the other one wants");
    let id = keeper.place.ran(&["storage", "put", "in", "--plugin", "s5-node"]).out.trim().to_owned();

    let reader = Place::new(&plugin(&as_peer(&keeper).await));
    let storage = |arguments: &[&str]| reader.run(&[&["storage"], arguments, &["--plugin", "s5-node"]].concat());
    assert_eq!(storage(&["get", &id]).out, "what the other one wants");
    let refusal = |id: &str| {
        let ran = storage(&["get", id, "-o", "out", "--json"]);
        assert_ne!(ran.code, 0, "{ran:#?}");
        ran.json()["error"]["code"].as_str().expect("a code").to_owned()
    };
    assert_eq!(storage(&["ls"]).out, "", "what is fetched is not kept");
    assert_eq!(refusal(&"0".repeat(64)), "not_found");

    let place = keeper.into_place();
    assert_eq!(refusal(&id), "unreachable", "nobody can say whether there is such a blob");

    // Its port is another one from now on.
    std::fs::remove_file(place.path().join("log")).expect("it has one");
    place.configure(&plugin(""));
    let keeper = Node::launch(place, &[]);
    reader.configure(&plugin(&as_peer(&keeper).await));
    assert_eq!(refusal(&id), "denied", "without `allow` nobody is let in");
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
