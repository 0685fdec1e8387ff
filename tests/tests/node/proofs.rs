//! Proofs of posted jobs and of files, through the shipped binary, with real provers and a development chain.

use std::fs;

use fabstir_tests::dev_chain::DevChain;
use fabstir_tests::market::{CLIENT, NODE, PAYOUT, node_place, place};
use fabstir_tests::peers::{NET, Provider};
use fabstir_tests::posting::{Clients, RESULT_EVENT, number};
use fabstir_tests::{LIMIT, Node, Place, eventually, tiny_chat};
use serde_json::{Value, json};

const STORAGE: &str = "[[plugin]]\nid = 'disk'\nuse = 'storage-disk'\n";
const GROTH16: &str = "[[plugin]]\nid = 'groth16'\nuse = 'prover-groth16'\n";
const DIGEST: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const MOST: &str = "0.1eth";

/// As [`GROTH16`], with the head of the model that is served, of which two tokens are proven.
fn head() -> String {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-chat/tiny-chat-q8_0.gguf");
    format!("{GROTH16}\n[plugin.config]\nsamples = 2\nmodels = [{{ name = 'tiny-chat', path = '{model}' }}]\n")
}

/// Deploys what checks proofs of a statement, and names it in ProofHub. Returns the program.
fn verifier(chain: &DevChain, place: &Place, statement: &str) -> String {
    let file = place.path().join("verifier.json");
    let path = file.to_str().expect("a path of text");
    let written = place.ran(&["proof", "contract", statement, "-o", path, "--json"]).json();
    let deployed = chain.name_verifier(&file).expect("the contract is deployed");
    assert_eq!(deployed["program"], written["program"]);
    written["program"].as_str().expect("a text").to_owned()
}

/// A node that serves the small model and proves, with its contract deployed, and the program that it proves by.
pub async fn proving_node(chain: &DevChain, prover: &str, statement: &str) -> (Provider, String) {
    proving_node_with(chain, prover, statement, "").await
}

/// Such a node, with more lines for its market.
async fn proving_node_with(chain: &DevChain, prover: &str, statement: &str, market: &str) -> (Provider, String) {
    let market = format!("sure_above_wei = 1_000_000_000_000_000_000\n{market}");
    let place = node_place(chain, NODE, &market, &format!("{STORAGE}{prover}{}", tiny_chat()));
    let program = verifier(chain, &place, statement);
    let node = Node::launch(place, &[]);
    node.healthy().await;
    node.serves("tiny-chat").await;
    node.logged(&["Acting in the market."]).await;
    (Provider::of(node).await, program)
}

/// The proof of job 1 goes to a file, and holds against the chain.
fn saved(node: &Place) {
    let file = node.path().join("saved.json");
    let file = file.to_str().expect("a path of text");
    node.ran(&["proof", "save", "1", "-o", file]);
    let held = node.ran(&["verify", file, "--job", "1"]).out;
    assert!(held.contains("The proof holds.") && held.contains("job 1, subject"), "{held}");
    let none = node.run(&["proof", "save", "2", "-o", file, "--json"]);
    assert_eq!(none.json()["error"]["code"], "nothing", "{none:#?}");
}

/// What `job post --wait` tells of a job with a proof.
fn posted(client: &Place, node: &Provider, proof: &str) -> Value {
    let post = ["job", "post", "--json", "--model", "tiny-chat", "--max", MOST, "--temperature", "0", "--wait", "--proof", proof];
    let bootstrap = ["--bootstrap", node.address.as_str(), "What is the capital of France?"];
    client.ran(&[&post[..], &bootstrap].concat()).json()
}

#[tokio::test]
async fn a_job_that_asks_for_a_proof_is_proven_to_the_contract_and_paid() {
    let chain = DevChain::start().expect("a chain");
    let (node, program) = proving_node(&chain, GROTH16, "commitment").await;
    let client = place(&chain, CLIENT, "", "", NET);

    let told = posted(&client, &node, &format!("commitment:{program}"));
    assert!(told["output"]["text"].as_str().is_some_and(|text| text.contains("Paris")), "{told:#}");
    assert!(told["proof_says"].as_str().is_some_and(|says| says.contains("It leaves open:")), "{told:#}");
    let status = client.ran(&["job", "status", "1", "--json"]).json();
    assert_eq!((status["job"]["state"].as_str(), status["job"]["proven"].as_bool()), (Some("proven"), Some(true)), "{status:#}");
    // A proof of another thing is no proof of this job.
    let place = &node.node.place;
    let (input, file) = (place.file("input", "x"), place.path().join("proof.json"));
    let (input, file) = (input.to_str().expect("a path of text"), file.to_str().expect("a path of text"));
    place.ran(&["prove", "commitment", "--model", DIGEST, "--input", input, "--output", input, "-o", file]);
    let other = place.run(&["verify", file, "--job", "1", "--json"]);
    assert_eq!(other.json()["error"]["code"], "does_not_hold", "{other:#?}");
    assert!(other.out.contains("not about job 1") && other.out.contains("its subject is"), "{other:#?}");

    saved(&node.node.place);
    let accepted = client.ran(&["job", "accept", "1", "--json"]).json();
    assert_ne!(accepted["division"]["to_host"], "0", "{accepted:#}");
    eventually("the node knows of its pay", LIMIT, async || {
        let jobs = node.node.place.ran(&["jobs", "--json"]).json();
        (jobs["jobs"][0]["state"] == "settled").then_some(())
    })
    .await;
}

#[tokio::test]
async fn tokens_of_an_answer_are_proven_at_positions_that_a_later_block_draws() {
    let chain = DevChain::start().expect("a chain");
    let (node, program) = proving_node(&chain, &head(), "output-head:tiny-chat").await;
    let client = place(&chain, CLIENT, "", "", NET);
    let proof = format!("output-head:{program}");
    let post = ["job", "post", "--json", "--model", "tiny-chat", "--max", MOST, "--temperature", "0", "--proof", &proof];
    let more = ["--max-output-tokens", "32", "--bootstrap", node.address.as_str(), "What is the capital of France?"];
    assert_eq!(client.ran(&[&post[..], &more].concat()).json()["id"], 1);
    let status = eventually("the contract has the proof", 3 * LIMIT, async || {
        // The block that draws comes by itself on every other chain.
        chain.mine(1).await;
        let status = client.ran(&["job", "status", "1", "--json"]).json();
        (status["job"]["state"] == "proven").then_some(status)
    })
    .await;
    assert!(status["result"]["trace"].as_str().is_some_and(|root| root.len() == 66), "{status:#}");
    saved(&node.node.place);
}

#[tokio::test]
async fn a_job_whose_proof_nobody_can_make_is_declined_and_one_without_a_verifier_is_not_posted() {
    let chain = DevChain::start().expect("a chain");
    let (node, program) = proving_node(&chain, GROTH16, "commitment").await;
    let client = place(&chain, CLIENT, "", "", NET);
    let other = format!("commitment:0x{}", "77".repeat(32));
    let post = ["job", "post", "--json", "--model", "tiny-chat", "--max", MOST, "--bootstrap", &node.address, "--proof"];
    let refused = client.run(&[&post[..], &[&other, "x"]].concat());
    assert_eq!((refused.code, refused.json()["error"]["code"].as_str()), (1, Some("no_verifier")), "{refused:#?}");

    // Too little time for a proof: the node says so.
    let program = format!("commitment:{program}");
    let posted = client.ran(&[&post[..], &[&program, "--prove-within", "10", "x"]].concat()).json();
    assert_eq!(posted["id"], 1, "{posted:#}");
    let why = eventually("the node has looked at it", LIMIT, async || {
        let jobs = node.node.place.ran(&["jobs", "--json"]).json();
        (jobs["jobs"][0]["state"] == "declined").then(|| jobs["jobs"][0].clone())
    })
    .await;
    assert_eq!(why["cause"], "proof", "{why:#}");
}

#[tokio::test]
async fn a_node_that_is_killed_before_its_proof_proves_after_its_start() {
    let chain = DevChain::start().expect("a chain");
    let (mut node, program) = proving_node(&chain, GROTH16, "commitment").await;
    let client = place(&chain, CLIENT, "", "", NET);
    let post =
        ["job", "post", "--json", "--model", "tiny-chat", "--max", MOST, "--temperature", "0", "--bootstrap", &node.address];
    let posted =
        client.ran(&[&post[..], &["--proof", &format!("commitment:{program}"), "What is the capital of Italy?"]].concat());
    assert_eq!(posted.json()["id"], 1);
    node.node.logged(&["Job submitted."]).await;
    node.node.signal(libc::SIGKILL);
    node.node.exit(LIMIT).await;
    let node = Node::launch(node.node.into_place(), &[]);
    node.healthy().await;
    eventually("the contract has the proof", 2 * LIMIT, async || {
        let status = client.ran(&["job", "status", "1", "--json"]).json();
        (status["job"]["state"] == "proven").then_some(())
    })
    .await;
}

#[tokio::test]
async fn keys_that_were_damaged_are_made_again_before_anything_is_promised() {
    let chain = DevChain::start().expect("a chain");
    let place = node_place(&chain, NODE, "", &format!("{STORAGE}{GROTH16}{}", tiny_chat()));
    place.ran(&["proof", "prepare", "commitment"]);
    let program = |place: &Place| place.ran(&["proof", "ls", "--json"]).json()["statements"][0]["statement"]["program"].clone();
    let before = program(&place);
    let keys = file_below(place.path(), "proving").expect("the keys are there");
    let mut bytes = fs::read(&keys).expect("reads");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&keys, bytes).expect("writes");
    let node = Node::launch(place, &[]);
    node.logged(&["Keys of proofs are made anew.", "Jobs can be proven."]).await;
    let after = program(&node.place);
    assert!(after.is_string() && after != before, "{before} {after}");
}

/// The first file of this name below a folder.
pub fn file_below(folder: &std::path::Path, name: &str) -> Option<std::path::PathBuf> {
    fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).find_map(|path| match path.is_dir() {
        true => file_below(&path, name),
        false => path.file_name().is_some_and(|found| found == name).then_some(path),
    })
}

#[tokio::test]
async fn a_proof_that_the_chain_takes_back_with_its_result_is_made_at_the_new_positions() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let (node, program) = proving_node(&chain, &head(), "output-head:tiny-chat").await;
    let client = place(&chain, CLIENT, "", "", NET);
    let proof = format!("output-head:{program}");
    let post = ["job", "post", "--json", "--model", "tiny-chat", "--max", MOST, "--temperature", "0", "--proof", &proof];
    // The client has an hour to say something: whoever looked again only then would be late with the proof.
    let more = [
        "--challenge-within",
        "3600",
        "--max-output-tokens",
        "32",
        "--bootstrap",
        &node.address,
        "What is the capital of France?",
    ];
    assert_eq!(client.ran(&[&post[..], &more].concat()).json()["id"], 1);
    let proven = async |draw: bool| {
        eventually("the contract has the proof", 3 * LIMIT, async || {
            if draw {
                chain.mine(1).await;
            }
            let status = client.ran(&["job", "status", "1", "--json"]).json();
            (status["job"]["state"] == "proven").then_some(())
        })
        .await;
    };
    proven(true).await;
    eventually("the node knows that it is proven", LIMIT, async || {
        let jobs = node.node.place.ran(&["jobs", "--json"]).json();
        (jobs["jobs"][0]["state"] == "submitted").then_some(())
    })
    .await;
    // Its end was looked up by now.
    tokio::time::sleep(std::time::Duration::from_secs(7)).await;
    let newest = number(&clients.rpc("eth_blockNumber", json!([])).await) as u64;
    let depth = newest - clients.block_of(RESULT_EVENT, 1).await + 1;
    chain.ask("anvil_reorg", json!([depth, []])).await.expect("blocks are taken back");
    chain.mine(1).await;
    node.node.logged(&["The chain has taken blocks back."]).await;
    eventually("the result is there again", LIMIT, async || (clients.told(RESULT_EVENT, 1).await == 1).then_some(())).await;
    proven(true).await;
}

#[tokio::test]
async fn a_result_that_was_proven_is_upheld_by_the_arbiter_that_its_node_accepts() {
    const ARBITER: &str = "0x00000000000000000000000000000000000a4b17";
    const BOND: u128 = 10_000_000_000_000_000;
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let (node, program) =
        proving_node_with(&chain, GROTH16, "commitment", &format!("arbiters = ['{ARBITER}']\nleast_resolve_s = 600\n")).await;
    let client = place(&chain, CLIENT, "", "", NET);
    let proof = format!("commitment:{program}");
    let post = ["job", "post", "--json", "--model", "tiny-chat", "--max", MOST, "--proof", &proof, "--bootstrap", &node.address];
    let terms = ["--challenge-within", "600", "--challenge-bond", "0.01eth", "--resolve-within", "600"];
    let ask = |arbiter: &str| {
        let more = ["--arbiter", arbiter, "What is the capital of France?"];
        client.ran(&[&post[..], &terms, &more].concat()).json()
    };
    // Whose rulings nobody here accepts, takes the node's bond for the asking.
    assert_eq!(ask("0x00000000000000000000000000000000000000e1")["id"], 1);
    let declined = eventually("the node has looked at it", LIMIT, async || {
        let jobs = node.node.place.ran(&["jobs", "--json"]).json();
        (jobs["jobs"][0]["state"] == "declined").then(|| jobs["jobs"][0].clone())
    })
    .await;
    assert_eq!(declined["cause"], "arbiter", "{declined:#}");

    assert_eq!(ask(ARBITER)["id"], 2);
    let early = client.run(&["job", "challenge", "1", "--json"]);
    assert_eq!((early.code, early.json()["error"]["code"].as_str()), (1, Some("nothing")), "{early:#?}");
    eventually("the contract has the proof", 2 * LIMIT, async || {
        let status = client.ran(&["job", "status", "2", "--json"]).json();
        (status["job"]["state"] == "proven").then_some(())
    })
    .await;
    let evidence = client.file("evidence", "Paris is not what was asked.");
    let path = evidence.to_str().expect("a path of text");
    let challenged = client.ran(&["job", "challenge", "2", "--reason", "3", "--evidence", path, "--json"]).json();
    assert_eq!(challenged["job"]["state"], "challenged", "{challenged:#}");
    assert!(challenged["evidence"].as_str().is_some_and(|hash| !hash.contains("0000000000")), "{challenged:#}");
    node.node.logged(&["Its client objects to a result"]).await;
    let unruled = client.run(&["job", "resolve", "2", "--json"]);
    assert_eq!((unruled.code, unruled.json()["error"]["code"].as_str()), (1, Some("refused")), "{unruled:#?}");

    // It answers every question with two words: the host wins, and 10,000 of 10,000 of the bond.
    let ruling = "0x60015f5261271060205260405ff3";
    chain.ask("anvil_setCode", json!([ARBITER, ruling])).await.expect("the arbiter has code");
    // Its client has no reason to have that carried out, and the node does.
    eventually("the node knows of its pay", LIMIT, async || {
        let jobs = node.node.place.ran(&["jobs", "--state", "settled", "--json"]).json();
        (jobs["jobs"][0]["id"] == 2).then_some(())
    })
    .await;
    let job = client.ran(&["job", "status", "2", "--json"]).json();
    assert_eq!(job["job"]["state"], "settled", "{job:#}");
    let paid = clients.credit(PAYOUT.address).await;
    assert!(paid > BOND, "the price, and the bond of the challenge: {paid}");
    let again = client.run(&["job", "resolve", "2", "--json"]);
    assert_eq!(again.json()["error"]["code"], "nothing", "{again:#?}");
}

#[test]
fn a_proof_in_a_file_holds_for_its_files_and_for_nothing_else() {
    let place = Place::new(GROTH16);
    let (input, output) = (place.file("input", "What is the capital of France?"), place.file("output", "Paris."));
    let path = |path: &std::path::Path| path.to_str().expect("a path of text").to_owned();
    let (input, output, file) = (path(&input), path(&output), path(&place.path().join("proof.json")));
    let ls = place.ran(&["proof", "ls", "--json"]).json();
    let statement = &ls["statements"][0]["statement"];
    assert_eq!((statement["id"].as_str(), statement["is_development"].as_bool()), (Some("commitment"), Some(true)), "{ls:#}");
    place.ran(&["prove", "commitment", "--model", DIGEST, "--input", &input, "--output", &output, "-o", &file]);
    let held = place.ran(&["verify", &file, "--input", &input, "--output", &output]).out;
    assert!(held.contains("The proof holds.") && held.contains("leaves open"), "{held}");
    let shown = place.ran(&["proof", "show", &file]).out;
    assert!(shown.contains("`verify` checks it") && shown.contains(DIGEST), "{shown}");

    let other = path(&place.file("other", "Rome."));
    let refused = place.run(&["verify", &file, "--output", &other, "--json"]);
    assert_eq!(refused.json()["error"]["code"], "does_not_hold", "{refused:#?}");

    let proof: Value = serde_json::from_str(&fs::read_to_string(&file).expect("reads")).expect("JSON");
    let verify = |change: &dyn Fn(&mut Value)| {
        let mut changed = proof.clone();
        change(&mut changed);
        fs::write(&file, changed.to_string()).expect("writes");
        let ran = place.run(&["verify", &file, "--json"]);
        (ran.code, ran.json()["error"]["code"].as_str().unwrap_or("holds").to_owned())
    };
    assert_eq!(verify(&|_| ()), (0, "holds".into()));
    let flip = |text: &Value, at: usize| {
        let mut text = text.as_str().expect("a text").to_owned();
        let digit = if &text[at..=at] == "0" { "1" } else { "0" };
        text.replace_range(at..=at, digit);
        Value::from(text)
    };
    let does_not = (1, "does_not_hold".to_owned());
    assert_eq!(verify(&|file| file["proof"] = flip(&file["proof"], 100)), does_not);
    assert_eq!(verify(&|file| file["public_inputs"] = flip(&file["public_inputs"], 100)), does_not);
    for part in ["model", "input", "output", "subject"] {
        assert_eq!(verify(&|file| file["about"][part] = flip(&file["about"][part], 40)), does_not, "{part}");
    }
    assert_eq!(verify(&|file| file["statement"]["program"] = flip(&file["statement"]["program"], 40)).1, "unchecked");
    assert_eq!(verify(&|file| file["about"]["job"] = 7.into()), (2, "usage".into()));
}
