//! OpenAI's own clients, unmodified: `tests/clients/setup.sh` installs them, each in the version that it names.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use fabstir_tests::place::finish;
use fabstir_tests::{Node, repository, tiny_chat};

/// Where `setup.sh` puts the clients.
fn installed() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"))).expect("a user has a home");
    let folder = cache.join("fabstir-node/clients");
    let recipe =
        |name: &str| std::fs::read(repository().join("tests/clients").join(name)).expect("the recipe is in the repository");
    let same = |name: &str| std::fs::read(folder.join(name)).is_ok_and(|known| known == recipe(name));
    assert!(
        same("requirements.txt") && same("package.json"),
        "OpenAI's clients are not installed in {}: run tests/clients/setup.sh, or `make test`",
        folder.display()
    );
    folder
}

/// A node with the default model, and with one slot that is easily filled.
async fn node() -> Node {
    let narrow = "[scheduler]\nqueue = 1\n[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nconfig = { parallel = 1, delay_ms = 20, context = 64 }\n";
    let node = Node::start(&format!("{narrow}{}", tiny_chat())).await;
    node.serves("tiny-chat").await;
    node.serves("echo").await;
    node
}

async fn passes(node: &Node, mut command: Command) {
    command.arg(&node.url).env("NO_PROXY", "127.0.0.1").env("no_proxy", "127.0.0.1");
    let ran =
        tokio::task::spawn_blocking(move || finish(command, "", Duration::from_secs(120))).await.expect("the command was run");
    assert_eq!(ran.code, 0, "{}\n{}", ran.out, ran.err);
    println!("{}", ran.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_for_python_works_unmodified() {
    let folder = installed();
    let node = node().await;
    let mut command = Command::new(folder.join("python/bin/python"));
    command.arg(repository().join("tests/clients/openai_client.py"));
    passes(&node, command).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_for_node_works_unmodified() {
    let folder = installed();
    let node = node().await;
    // A script finds its packages from its own folder upwards.
    let script = folder.join("openai_client.mjs");
    std::fs::copy(repository().join("tests/clients/openai_client.mjs"), &script).expect("the script can be copied");
    let mut command = Command::new("node");
    command.arg(script);
    passes(&node, command).await;
}
