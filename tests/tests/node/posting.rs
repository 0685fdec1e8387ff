//! Jobs that a client posts, through the shipped binary, on a development chain.

use fabstir_tests::dev_chain::DevChain;
use std::fs;
use std::path::{Path, PathBuf};

use fabstir_tests::market::{CLIENT, NODE, OTHER_CLIENT, PRICES, node, place};
use fabstir_tests::peers::NET;
use fabstir_tests::{LIMIT, Place, Ran, eventually, tiny_chat};
use serde_json::Value;

/// The digest of a model that nobody offers.
const DIGEST: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const MAX: u128 = 10_000_000_000_000_000;
const PRICED: [&str; 4] = ["--price-input", "1eth", "--price-output", "4eth"];

/// `job post` with this amount put down, and more arguments.
fn post(place: &Place, max: &str, more: &[&str]) -> Ran {
    let posted = ["job", "post", "--json", "--model", DIGEST, "--max", max];
    place.run(&[&posted[..], &PRICED[..], more].concat())
}

/// The message of an error with this code.
#[track_caller]
fn refusal(ran: &Ran, code: &str) -> String {
    assert_ne!(ran.code, 0, "{ran:#?}");
    let error = &ran.json()["error"];
    assert_eq!(error["code"], code, "{ran:#?}");
    error["message"].as_str().expect("a message").to_owned()
}

#[track_caller]
fn wei(value: &Value) -> u128 {
    value.as_str().and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("{value} is no amount"))
}

/// What the account has in coin and in credit.
#[track_caller]
fn balances(place: &Place) -> (u128, u128) {
    let balances = &place.ran(&["market", "status", "--json"]).json()["balances"];
    (wei(&balances["coin"]), wei(&balances["credit"]))
}

#[test]
fn a_job_that_nobody_claims_is_taken_back_and_every_wei_is_accounted_for() {
    let chain = DevChain::start().expect("a chain");
    let client = place(&chain, CLIENT, "", "", "");
    assert!(client.ran(&["job", "status"]).out.contains("No job was posted"));
    let before = balances(&client);

    let posted = post(&client, "0.01eth", &["What is the capital of France?"]);
    assert_eq!(posted.code, 0, "{posted:#?}");
    let posted = posted.json();
    assert_eq!(posted["id"], 1);
    let fee = wei(&posted["order"]["fee"]);
    assert_eq!(balances(&client), (before.0 - MAX - fee, before.1), "what was put down and the fee, to the wei");

    let status = client.ran(&["job", "status", "1", "--json"]).json();
    let job = &status["job"];
    assert_eq!((job["state"].as_str(), status["mine"].as_bool()), (Some("open"), Some(true)), "{status:#}");
    assert_eq!(job["client"], CLIENT.address);
    assert_eq!(job["terms"], posted["terms"]);
    assert_eq!(job["terms"]["max_input_tokens"], 128, "30 bytes and what the template adds, rounded up");
    assert_eq!(wei(&job["terms"]["host_bond"]), MAX / 50);
    assert_eq!(status["posted"]["order_key"], posted["order"]["key"]);
    let left = job["until_s"].as_u64().expect("a deadline") - status["now_s"].as_u64().expect("a time");
    assert!((500..=600).contains(&left), "{left} s are left to claim it");
    let told = client.ran(&["job", "status", "1"]).out;
    assert!(told.contains("is open until") && told.contains("job cancel 1"), "{told}");
    let listed = client.ran(&["job", "status"]).out;
    assert!(listed.contains("open") && listed.contains("0.01 ETH") && listed.contains(DIGEST), "{listed}");

    // There is nothing to fetch or to accept yet, and it is nobody else's to take back.
    assert!(refusal(&client.run(&["job", "result", "1", "--json"]), "no_result").contains("is open until"));
    assert!(refusal(&client.run(&["job", "accept", "1", "--json"]), "nothing").contains("nothing to accept"));
    let other = place(&chain, OTHER_CLIENT, "", "", "");
    assert!(refusal(&other.run(&["job", "cancel", "1", "--json"]), "not_yours").contains(CLIENT.address));
    assert_eq!(other.ran(&["job", "status", "1", "--json"]).json()["mine"], false);
    assert!(refusal(&client.run(&["job", "status", "2", "--json"]), "no_job").contains("no job 2"));

    let cancelled = client.ran(&["job", "cancel", "1", "--json"]).json();
    assert_eq!(cancelled["job"]["state"], "refunded");
    let fees = fee + wei(&cancelled["orders"][0]["fee"]);
    assert_eq!(balances(&client), (before.0 - MAX - fees, before.1 + MAX), "the whole amount is credit");
    let status = client.ran(&["job", "status", "1", "--json"]).json();
    let division = &status["division"];
    assert_eq!((wei(&division["to_host"]), wei(&division["to_client"])), (0, MAX), "{status:#}");
    assert!(client.ran(&["job", "status", "1"]).out.contains("0.01 ETH came back"));
    assert!(refusal(&client.run(&["job", "cancel", "1", "--json"]), "over").contains("nothing is left"));

    let withdrawn = client.ran(&["market", "withdraw", "--json"]).json();
    let fees = fees + wei(&withdrawn["fee"]);
    assert_eq!(balances(&client), (before.0 - fees, before.1), "fees are all that it has cost");
}

#[test]
fn a_prompt_that_is_posted_twice_is_two_jobs() {
    let chain = DevChain::start().expect("a chain");
    let client = place(&chain, CLIENT, "", "", "");
    for id in 1..=2 {
        let posted = post(&client, "0.01eth", &["the same"]);
        assert_eq!(posted.json()["id"], id, "{posted:#?}");
    }
    let jobs = client.ran(&["job", "status", "--json"]).json();
    let numbers: Vec<_> = jobs["jobs"].as_array().expect("a list").iter().map(|job| job["posted"]["job"].as_u64()).collect();
    assert_eq!(numbers, [Some(1), Some(2)]);
}

#[test]
fn what_cannot_be_posted_is_refused_with_the_next_step_and_costs_nothing() {
    let chain = DevChain::start().expect("a chain");
    let client = place(&chain, CLIENT, "", "", NET);
    let before = balances(&client);

    let no_unit = post(&client, "1", &["x"]);
    assert_eq!(no_unit.code, 2, "{no_unit:#?}");
    assert!(no_unit.err.contains("0.05eth"), "{no_unit:#?}");
    let one_price = client.run(&["job", "post", "--model", DIGEST, "--max", "1eth", "--price-input", "1gwei", "x"]);
    assert!(one_price.code == 2 && one_price.err.contains("--price-output"), "{one_price:#?}");
    assert!(refusal(&post(&client, "1eth", &[" "]), "usage").contains("empty"));
    assert!(refusal(&post(&client, "1eth", &["--temperature", "9", "x"]), "usage").contains("0 to 5"));
    let attempts = post(&client, "1eth", &["--attempts", "9", "x"]);
    assert_eq!(attempts.code, 2, "{attempts:#?}");

    // 128 tokens at a coin for a million, and one at four.
    let low = refusal(&post(&client, "0.0001eth", &["x"]), "max_too_low");
    assert!(low.contains("132000000000000 wei") && low.contains("128 tokens") && low.contains("100000000000000 wei"), "{low}");
    assert_eq!(post(&client, "0.000132eth", &["x"]).code, 0, "exactly enough is enough");
    assert_eq!(client.ran(&["job", "cancel", "1", "--json"]).json()["job"]["state"], "refunded");
    let large = refusal(&post(&client, "1eth", &[&"x".repeat(17 << 10)]), "input_too_large");
    assert!(large.contains("16384 are allowed"), "{large}");

    let nobody = ["job", "post", "--json", "--model", "no-such-model", "--max", "1eth", "x"];
    assert!(refusal(&client.run(&nobody), "nobody").contains("--bootstrap"));
    // More than the account has.
    let broke = post(&client, "1000000eth", &["x"]);
    assert!(["refused", "plugin"].contains(&broke.json()["error"]["code"].as_str().expect("a code")), "{broke:#?}");
    let deaf = place(&chain, OTHER_CLIENT, "", "", "");
    let no_transport = ["job", "post", "--json", "--model", "x", "--max", "1eth", "x"];
    assert!(refusal(&deaf.run(&no_transport), "no_transport").contains("transport-libp2p"));

    let (coin, credit) = balances(&client);
    assert_eq!(credit, before.1 + 132_000_000_000_000);
    let jobs = client.ran(&["job", "status", "--json"]).json();
    assert_eq!(jobs["jobs"].as_array().expect("a list").len(), 1, "{jobs:#}");
    assert!(before.0 - coin < MAX, "what was refused has cost nothing");
}

#[test]
fn while_the_chain_is_away_nothing_is_posted_and_nothing_is_forgotten() {
    let chain = DevChain::start().expect("a chain");
    let client = place(&chain, CLIENT, "", "", "");
    let away = ["--set", "plugin.base.config.rpc=[\"http://127.0.0.1:9\"]"];
    let unreached = post(&client, "0.01eth", &[&away[..], &["x"]].concat());
    assert_eq!(unreached.code, 4, "{unreached:#?}");
    refusal(&unreached, "unreachable");
    assert!(client.ran(&["job", "status"]).out.contains("No job was posted"), "it was not even ordered");

    // What is not signed will not be sent: the job is as if it had never been asked for.
    let dear = post(&client, "0.01eth", &["--set", "market.max_fee_wei=1", "x"]);
    assert!(refusal(&dear, "dead").contains("the limit is 1"));
    assert!(client.ran(&["job", "status"]).out.contains("No job was posted"));

    // A command that does not wait leaves the order behind; the next one that acts for the account carries it out.
    let hasty = post(&client, "0.01eth", &["--within", "0", "x"]);
    assert!(refusal(&hasty, "pending").contains("job status"), "{hasty:#?}");
    let second = post(&client, "0.02eth", &["y"]);
    assert_eq!(second.code, 0, "{second:#?}");
    let jobs = client.ran(&["job", "status", "--json"]).json();
    let jobs = jobs["jobs"].as_array().expect("a list");
    let mut numbers: Vec<u64> = jobs.iter().filter_map(|job| job["posted"]["job"].as_u64()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 2], "{jobs:#?}");
    assert!(jobs.iter().all(|job| job["job"]["state"] == "open"), "{jobs:#?}");
}

#[test]
fn nothing_earned_is_said_so_with_and_without_a_chain() {
    let chain = DevChain::start().expect("a chain");
    let node = place(&chain, CLIENT, "", "", "");
    let earned = node.ran(&["earnings", "--json"]).json();
    assert_eq!((wei(&earned["earned"]), wei(&earned["outstanding"])), (0, 0), "{earned:#}");
    assert_eq!(wei(&earned["chain"]["final"]), 0);
    assert_eq!(earned["chain"]["payout"], Value::Null);
    let table = node.ran(&["earnings"]).out;
    assert!(table.contains("earned in all") && table.contains("no node of the market"), "{table}");
    let away = ["earnings", "--wait", "3", "--set", "plugin.base.config.rpc=[\"http://127.0.0.1:9\"]"];
    let away = node.ran(&away);
    assert!(away.out.contains("not known") && away.out.contains("earned in all"), "{away:#?}");
    assert!(away.err.contains("cannot be asked"), "a warning says why: {away:#?}");
    let alone = Place::new("").ran(&["earnings", "--json"]).json();
    assert!(alone["chain"].is_null() && alone["chain_error"].as_str().is_some_and(|why| why.contains("keys new")), "{alone:#}");
}

/// Below the amount from which on a node waits for a safe block, which a development chain has late.
const HALF: u128 = MAX / 2;
/// Where a node's storage keeps its results.
const DISK: &str = "[[plugin]]\nid = 'disk'\nuse = 'storage-disk'\n";

/// The files of a folder and of those below it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_worked_its_result_checked_and_accepting_it_pays_the_node() {
    let chain = DevChain::start().expect("a chain");
    let provider = node(&chain, NODE, "", &format!("{}{DISK}", tiny_chat())).await;
    provider.node.serves("tiny-chat").await;
    let client = place(&chain, CLIENT, "", "", NET);
    let bootstrap = ["--bootstrap", provider.address.as_str()];
    let before = balances(&client);

    // By the model's name, at the price that its node asks, and waited for.
    let post = ["job", "post", "--json", "--model", "tiny-chat", "--max", "0.005eth", "--temperature", "0", "--wait"];
    let posted = client.ran(&[&post[..], &bootstrap, &["What is the capital of France?"]].concat()).json();
    assert!(posted["output"]["text"].as_str().is_some_and(|text| text.contains("Paris")), "{posted:#}");
    assert!(PRICES.replace('_', "").contains(posted["terms"]["price_output_per_mtok"].as_str().expect("a price")), "{posted:#}");
    let fee = wei(&posted["order"]["fee"]);

    let fetched = client.ran(&[&["job", "result", "1", "--json"], &bootstrap[..]].concat()).json();
    assert_eq!((&fetched["output"], &fetched["result"]), (&posted["output"], &posted["result"]));
    let told = client.ran(&["job", "status", "1"]).out;
    assert!(told.contains("has a result") && told.contains("--accept") && told.contains("tokens read"), "{told}");
    assert!(refusal(&client.run(&["job", "cancel", "1", "--json"]), "delivered").contains("job result 1"));
    let earned = eventually("the node notes what it has handed in", LIMIT, async || {
        let earned = provider.node.place.ran(&["earnings", "--json"]).json();
        (earned["jobs"]["submitted"]["count"] == 1).then_some(earned)
    })
    .await;
    let price = wei(&earned["outstanding"]);
    assert!(price > 0 && price < HALF && wei(&earned["earned"]) == 0, "{earned:#}");

    let accepted = client.ran(&[&["job", "result", "1", "--accept", "--json"], &bootstrap[..]].concat()).json();
    assert_eq!(accepted["output"], posted["output"]);
    let division = &accepted["division"];
    assert_eq!((wei(&division["to_host"]), wei(&division["to_client"])), (price, HALF - price), "{accepted:#}");
    let fees = fee + wei(&accepted["order"]["fee"]);
    assert_eq!(balances(&client), (before.0 - HALF - fees, before.1 + HALF - price), "to the wei");
    assert!(client.ran(&["job", "status", "1"]).out.contains("is paid"));
    assert!(refusal(&client.run(&["job", "accept", "1", "--json"]), "nothing").contains("is paid"));
    let earned = eventually("the node notes its pay", LIMIT, async || {
        let earned = provider.node.place.ran(&["earnings", "--json"]).json();
        (wei(&earned["earned"]) == price).then_some(earned)
    })
    .await;
    assert_eq!((wei(&earned["outstanding"]), wei(&earned["chain"]["mined"])), (0, price), "{earned:#}");
    assert_eq!(wei(&earned["chain"]["credit"]), price, "it waits for the payout account");
    let table = provider.node.place.ran(&["earnings"]).out;
    assert!(table.contains("1 job") && table.contains("to be withdrawn"), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_gives_another_result_than_it_has_committed_to_is_not_believed_and_not_accepted() {
    let chain = DevChain::start().expect("a chain");
    let provider = node(&chain, NODE, "", &format!("{}{DISK}", tiny_chat())).await;
    provider.node.serves("tiny-chat").await;
    let client = place(&chain, CLIENT, "", "", NET);
    let bootstrap = ["--bootstrap", provider.address.as_str()];
    let post = ["job", "post", "--json", "--model", "tiny-chat", "--max", "0.005eth", "--challenge-within", "600", "--wait"];
    let posted = client.ran(&[&post[..], &bootstrap, &["Hello"]].concat()).json();
    let text = posted["output"]["text"].as_str().expect("a text");

    let data = provider.node.place.path().join("data");
    let holds = |file: &PathBuf| fs::read(file).is_ok_and(|bytes| bytes.windows(9).any(|window| window == b"\"finish\":"));
    let kept: Vec<PathBuf> =
        files(&data).into_iter().filter(|file| file.starts_with(data.join("state/disk")) && holds(file)).collect();
    assert_eq!(kept.len(), 1, "one result is kept: {kept:?}");
    let bytes = fs::read(&kept[0]).expect("it can be read");
    let lie = String::from_utf8(bytes.clone()).expect("a document is text").replacen("\"text\":\"", "\"text\":\"No. ", 1);
    fs::write(&kept[0], &lie).expect("it can be written");
    for more in [&[][..], &["--accept"]] {
        let lied = client.run(&[&["job", "result", "1", "--json"], more, &bootstrap].concat());
        assert_ne!(lied.code, 0, "{lied:#?}");
        assert!(!lied.out.contains(text) && !lied.out.contains("No. "), "what was not checked is not shown: {lied:#?}");
    }
    assert_eq!(client.ran(&["job", "status", "1", "--json"]).json()["job"]["state"], "delivered");

    fs::write(&kept[0], &bytes).expect("it can be written");
    let fetched = client.run(&[&["job", "result", "1", "--json"], &bootstrap[..]].concat());
    assert_eq!(fetched.json()["output"], posted["output"], "{fetched:#?}");
    // A node that is away is an error too, with the next step.
    drop(provider);
    let away = client.run(&["job", "result", "1", "--json"]);
    assert!(refusal(&away, "unreachable").contains("--bootstrap"), "{away:#?}");
}
