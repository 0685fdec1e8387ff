//! Proofs by EZKL, through the shipped binary. Need its engine: `make ezkl`.

use std::fs;
use std::path::Path;

use fabstir_tests::dev_chain::DevChain;
use fabstir_tests::market::{CLIENT, place};
use fabstir_tests::peers::{NET, Provider};
use fabstir_tests::{LIMIT, Place, eventually, process, repository};
use serde_json::{Value, json};

use crate::proofs::{file_below, proving_node};

/// The plugin with its engine and further settings.
fn prover(settings: &str) -> String {
    let variable = |name: &str| std::env::var_os(name).map(std::path::PathBuf::from);
    let cache = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache"))).unwrap_or_default();
    let python = cache.join("fabstir-node/ezkl/bin/python3");
    assert!(python.exists(), "{} is not there; `make ezkl` makes it", python.display());
    let python = python.display();
    format!("[[plugin]]\nid = 'ezkl'\nuse = 'prover-ezkl'\n\n[plugin.config]\npython = '{python}'\n{settings}\n\n")
}

fn path(path: &Path) -> String {
    path.to_str().expect("a path of text").to_owned()
}

#[test]
fn an_onnx_model_is_proven_end_to_end_and_no_other_outputs_are() {
    let examples = repository().join("plugins/prover-ezkl/examples");
    let prover = prover(&format!(
        "models = [{{ name = 'classifier', path = '{}', calibration = '{}' }}]",
        examples.join("classifier.onnx").display(),
        examples.join("classifier.examples.json").display()
    ));
    let place = Place::new(&prover);
    let rows: Value = serde_json::from_slice(&fs::read(examples.join("classifier.examples.json")).expect("reads")).expect("JSON");
    let values = path(&place.file("values.json", json!([rows[0]]).to_string()));
    let (input, output) = (path(&place.file("input", "a row")), path(&place.file("output", "a class")));
    let file = path(&place.path().join("proof.json"));
    let ls = place.ran(&["proof", "ls", "--json"]).json();
    let statements = ls["statements"].as_array().expect("a list").iter().map(|listed| &listed["statement"]);
    let statement = statements.into_iter().find(|statement| statement["id"] == "onnx-model:classifier");
    let digest = statement.and_then(|statement| statement["model"].as_str()).unwrap_or_else(|| panic!("{ls:#}"));
    let about = ["--model", digest, "--input", &input, "--output", &output];

    let without = place.run(&[&["prove", "onnx-model:classifier", "--json"], &about[..]].concat());
    assert_ne!(without.code, 0, "there are no values to prove anything about");

    place.ran(&[&["prove", "onnx-model:classifier", "--values", &values, "-o", &file], &about[..]].concat());
    let held = place.ran(&["verify", &file, "--input", &input, "--output", &output]).out;
    assert!(held.contains("The proof holds.") && held.contains("leaves open"), "{held}");

    let proof: Value = serde_json::from_str(&fs::read_to_string(&file).expect("reads")).expect("JSON");
    let refused = |what: &str, changed: Value| {
        fs::write(&file, changed.to_string()).expect("writes");
        let ran = place.run(&["verify", &file, "--json"]);
        assert_eq!(ran.code, 1, "{what}: {ran:#?}");
    };
    let mut outputs = proof.clone();
    let claimed = &mut outputs["claim"]["outputs"];
    assert!(claimed.is_object() || claimed.is_array(), "{proof:#}");
    change(claimed);
    refused("other outputs", outputs);
    let mut cut = proof.clone();
    let bytes = cut["proof"].as_str().map(str::len);
    if let Some(length) = bytes {
        cut["proof"] = json!(&proof["proof"].as_str().expect("a text")[..length / 2]);
        refused("half a proof", cut);
    }
    let mut other = proof.clone();
    other["about"]["model"] = json!(digest.replace(|_: char| true, "1"));
    refused("another model", other);
}

/// Changes the first number that it finds.
fn change(value: &mut Value) -> bool {
    match value {
        Value::Array(items) => items.iter_mut().any(change),
        Value::Object(fields) => fields.values_mut().any(change),
        Value::Number(number) => {
            *value = json!(number.as_f64().expect("a number") + 1.0);
            true
        }
        _ => false,
    }
}

/// The processes in which EZKL runs for a node.
fn engines(node: &Provider) -> Vec<i32> {
    let prover = node.node.workers().into_iter().find(|worker| worker.file.contains("prover_ezkl"));
    prover.map(|worker| process::children(worker.pid)).unwrap_or_default()
}

async fn proven_though(settings: &str, fault: i32) {
    let prover = prover(settings);
    let chain = DevChain::start().expect("a chain");
    let (node, program) = proving_node(&chain, &prover, "commitment").await;
    let client = place(&chain, CLIENT, "", "", NET);
    let proof = format!("commitment:{program}");
    let post = ["job", "post", "--json", "--model", "tiny-chat", "--max", "0.1eth", "--temperature", "0", "--proof", &proof];
    let posted = client.ran(&[&post[..], &["--bootstrap", &node.address, "What is the capital of France?"]].concat()).json();
    assert_eq!(posted["id"], 1, "{posted:#}");
    node.node.logged(&["Job submitted."]).await;
    // Whatever it is at, proving or waiting for work.
    let hit = engines(&node);
    assert!(!hit.is_empty(), "no engine runs");
    hit.iter().for_each(|pid| process::send(*pid, fault));
    let status = eventually("the contract has the proof", 4 * LIMIT, async || {
        let status = client.ran(&["job", "status", "1", "--json"]).json();
        (status["job"]["state"] == "proven").then_some(status)
    })
    .await;
    assert_eq!(status["job"]["proven"], true, "{status:#}");
    let accepted = client.ran(&["job", "accept", "1", "--json"]).json();
    assert_ne!(accepted["division"]["to_host"], "0", "{accepted:#}");
}

#[tokio::test]
async fn a_job_is_proven_by_ezkl_although_its_engine_is_killed() {
    proven_though("", libc::SIGKILL).await;
}

#[tokio::test]
async fn a_job_is_proven_by_ezkl_although_its_engine_hangs() {
    proven_though("prove_timeout_ms = 8000", libc::SIGSTOP).await;
}

#[tokio::test]
async fn keys_that_are_damaged_while_a_node_runs_are_made_anew() {
    let prover = prover("");
    let chain = DevChain::start().expect("a chain");
    let (node, program) = proving_node(&chain, &prover, "commitment").await;
    node.node.logged(&["Jobs can be proven."]).await;
    let keys = file_below(node.node.place.path(), "pk").expect("the keys are there");
    let mut bytes = fs::read(&keys).expect("reads");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&keys, bytes).expect("writes");
    // The job is lost, since nobody has its keys any more.
    let client = place(&chain, CLIENT, "", "", NET);
    let proof = format!("commitment:{program}");
    let post = ["job", "post", "--json", "--model", "tiny-chat", "--max", "0.1eth", "--temperature", "0", "--proof", &proof];
    client.ran(&[&post[..], &["--bootstrap", &node.address, "What is the capital of France?"]].concat());
    let key = "Jobs can be proven. plugin=ezkl statement=\"commitment\" program=\"";
    eventually("there are other keys", 4 * LIMIT, async || {
        let log = node.node.log();
        log.split(key).skip(1).any(|rest| !rest.starts_with(&program)).then_some(())
    })
    .await;
}
