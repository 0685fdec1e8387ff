//! Posted jobs, from the contract through the node and back: the shipped binary, the real contracts, a development chain. Figures are printed:
//! `cargo nextest run --release -p fabstir-tests jobs:: --no-capture`.

use std::time::Instant;

use fabstir_host::market::posting::ResultRef;
use fabstir_plugin_api::error::Code;
use fabstir_tests::dev_chain::DevChain;
use fabstir_tests::market::{CLIENT, NODE, OTHER_CLIENT, OTHER_NODE, OWNER, PAYOUT, node, node_place};
use fabstir_tests::payer::Payer;
use fabstir_tests::posting::{CLAIM_EVENT, CLAIMED, Clients, DELIVERED, Held, Job, OPEN, REFUNDED, RESULT_EVENT, SETTLED};
use fabstir_tests::{LIMIT, Node, Place, eventually, tiny_chat};
use serde_json::{Value, json};

const DISK: &str = "[[plugin]]\nid = 'disk'\nuse = 'storage-disk'\n";
/// What the model of these tests says that it is.
const DIGEST: &str = "f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0";
/// Fees of many jobs in one day.
const FEES: &str = "daily_fee_wei = 5_000_000_000_000_000_000\n";

/// A model that does what its prompt says, and a place for results.
fn entries() -> String {
    format!("[[plugin]]\nid = 'faulty'\nuse = 'inference-faulty'\nconfig = {{ digest = '{DIGEST}', parallel = 4 }}\n{DISK}")
}

fn job(prompt: &str) -> Job {
    Job::of(DIGEST, prompt)
}

async fn is_in(clients: &Clients, job: u64, state: u128) -> Held {
    eventually(&format!("job {job} is in state {state}"), LIMIT, async || {
        let held = clients.job(job).await;
        (held.state == state).then_some(held)
    })
    .await
}

/// What the node's journal has of a job.
fn noted(place: &Place, job: u64) -> Value {
    let jobs = place.ran(&["jobs", "--last", "5000", "--json"]).json()["jobs"].clone();
    let found = jobs.as_array().expect("a list").iter().find(|row| row["id"] == job).cloned();
    found.unwrap_or(Value::Null)
}

async fn is_noted(place: &Place, job: u64, state: &str) -> Value {
    eventually(&format!("the node notes job {job} as {state}"), LIMIT, async || {
        let row = noted(place, job);
        (row["state"] == state).then_some(row)
    })
    .await
}

fn wei(value: &Value) -> u128 {
    value.as_str().and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("{value} is no amount"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_posted_job_is_answered_by_the_real_model_and_paid_to_the_wei() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let provider = node(&chain, NODE, "", &format!("{}{DISK}", tiny_chat())).await;
    provider.node.serves("tiny-chat").await;
    let found =
        Place::new(fabstir_tests::peers::NET).ran(&["find", "tiny-chat", "--json", "--bootstrap", &provider.address]).json();
    let digest = found["nodes"][0]["models"][0]["digest"].as_str().expect("a digest").to_owned();

    let asked = Job::of(&digest, "What is the capital of France?");
    let before = clients.balance(CLIENT.address).await;
    let id = clients.post(CLIENT, &asked).await;
    let held = is_in(&clients, id, DELIVERED).await;
    assert_eq!(held.host, NODE.address.to_lowercase());
    assert!(held.in_tokens > 0 && held.in_tokens <= 64 && held.out_tokens > 0, "{held:?}");
    let row = is_noted(&provider.node.place, id, "submitted").await;
    assert_eq!(row["result"]["output_commitment"], format!("0x{}", held.output));
    let (_, peer) = provider.address.rsplit_once('/').expect("an id");
    assert_eq!(row["result"]["result_ref"], format!("fabstir://{peer}/{}", held.output));

    // What the contract has of the result is what lies in the node's storage.
    let stored = stored(&provider.node.place, &held.output);
    assert_eq!(hex::encode(blake3(&stored)), held.output);
    let document: Value = serde_json::from_slice(&stored).expect("a document");
    assert!(document["text"].as_str().is_some_and(|text| text.contains("Paris")), "{document:#}");
    assert_eq!(document["usage"]["completion_tokens"], held.out_tokens as u64);

    // A stranger fetches it by its hash, and nothing else.
    let stranger = Payer::start(&chain, OTHER_CLIENT).await;
    let named = row["result"]["result_ref"].as_str().expect("a text").parse::<ResultRef>().expect("a reference");
    let commitment = format!("0x{}", held.output);
    let got = stranger.result(&provider.address, &named, &commitment).await.expect("the result comes");
    assert_eq!(document["text"], got.text.as_str());
    let unknown = ResultRef { id: "00".repeat(32), ..named.clone() };
    let nothing = stranger.result(&provider.address, &unknown, &commitment).await.expect_err("no job has it");
    assert_eq!(nothing.code, Code::NotFound, "{nothing}");
    let wrong = stranger.result(&provider.address, &named, &format!("0x{}", unknown.id)).await.expect_err("another one");
    assert_eq!(wrong.code, Code::Corrupt, "{wrong}");

    let fees = clients.posting_fee(id).await + clients.accept(CLIENT, id).await;
    let row = is_noted(&provider.node.place, id, "settled").await;
    let price = (held.in_tokens * asked.price_in + held.out_tokens * asked.price_out).div_ceil(1_000_000);
    assert_eq!(wei(&row["paid"]), price);
    assert_eq!(clients.credit(PAYOUT.address).await, price);
    assert_eq!(clients.credit(CLIENT.address).await, asked.max_amount - price, "what was not used is the client's");
    let spent = before - clients.balance(CLIENT.address).await;
    assert_eq!(spent, asked.max_amount + fees, "the client has put down the amount and paid two fees");
    let listed = provider.node.place.ran(&["jobs", "--state", "settled"]).out;
    assert!(listed.contains("tiny-chat"), "{listed}");
    let why = provider.node.place.ran(&["why", "--json"]).json();
    assert_eq!((why["seen"].as_u64(), why["won"].as_u64()), (Some(1), Some(1)), "{why:#}");

    // A client that says nothing: anyone may have it settled once its time is over, and the node does.
    let silent = clients.post(CLIENT, &Job { challenge_secs: 10, ..asked.clone() }).await;
    is_noted(&provider.node.place, silent, "submitted").await;
    clients.rpc("evm_increaseTime", json!([60])).await;
    clients.rpc("evm_mine", json!([])).await;
    is_in(&clients, silent, SETTLED).await;
    let row = is_noted(&provider.node.place, silent, "settled").await;
    assert_eq!(clients.credit(PAYOUT.address).await, price + wei(&row["paid"]));

    // Of few bytes and many tokens: only the model knows, and it is asked before a bond is put up.
    let wordy = Job { prompt: "xq zv kj ".repeat(20), ..asked };
    let id = clients.post(CLIENT, &wordy).await;
    let row = is_noted(&provider.node.place, id, "declined").await;
    assert_eq!((row["cause"].as_str(), clients.told(CLAIM_EVENT, id).await), (Some("too_long"), 0), "{row:#}");
}

fn blake3(bytes: &[u8]) -> Vec<u8> {
    blake3::hash(bytes).as_bytes().to_vec()
}

/// A blob of the node's storage, wherever it keeps it.
fn stored(place: &Place, id: &str) -> Vec<u8> {
    fn files(folder: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.path() {
                path if path.is_dir() => files(&path, found),
                path => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    files(place.path(), &mut found);
    let named = found.iter().find(|path| path.to_string_lossy().replace('/', "").ends_with(id));
    std::fs::read(named.unwrap_or_else(|| panic!("no blob {id}"))).expect("a file can be read")
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_nodes_one_claims_a_job_and_the_other_does_no_work() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let first = node(&chain, NODE, "", &entries()).await;
    let second = node(&chain, OTHER_NODE, "", &entries()).await;
    for node in [&first.node, &second.node] {
        node.serves("faulty").await;
        node.logged(&["Acting in the market."]).await;
    }
    for round in 0..5 {
        let id = clients.post(CLIENT, &job(&format!("round {round}"))).await;
        let held = is_in(&clients, id, DELIVERED).await;
        let (winner, loser) = if held.host == NODE.address.to_lowercase() { (&first, &second) } else { (&second, &first) };
        is_noted(&winner.node.place, id, "submitted").await;
        let lost = is_noted(&loser.node.place, id, "missed").await;
        assert_eq!(lost["cause"], "lost", "{lost:#}");
        assert_eq!(lost["result"], Value::Null);
        assert_eq!((clients.told(CLAIM_EVENT, id).await, clients.told(RESULT_EVENT, id).await), (1, 1));
    }
    let ended = async |node: &Node| node.metric("fabstir_request_success_total", &[]).await.unwrap_or(0.0);
    assert_eq!(ended(&first.node).await + ended(&second.node).await, 5.0, "a model has worked on a job that was lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_are_not_worth_taking_are_left_and_why_tells_the_cause_of_each() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let provider = node(&chain, NODE, "max_bond_wei = 1_000_000_000_000_000\n", &entries()).await;
    let place = &provider.node.place;
    provider.node.serves("faulty").await;
    let good = job("hello");
    let wrong = [
        ("price", Job { price_out: good.price_out - 1, ..good.clone() }),
        ("bond", Job { bond: good.bond + 1, ..good.clone() }),
        ("model", Job { digest: "00".repeat(32), ..good.clone() }),
        ("input", Job { is_honest: false, ..good.clone() }),
        ("too_long", Job { max_in: 1, ..good.clone() }),
        ("time", Job { deliver_secs: 20, ..good.clone() }),
        ("amount", Job { max_amount: 1_000_000, ..good.clone() }),
        // More than all of its fees, and less than three times as much.
        ("fee", Job { max_amount: 1_000_000_000_000_000, ..good.clone() }),
    ];
    clients.name_verifier(OWNER).await;
    let mut posted = vec![("proof", clients.post(CLIENT, &Job { proof_kind: 1, ..good.clone() }).await)];
    for (cause, job) in &wrong {
        posted.push((cause, clients.post(CLIENT, job).await));
    }
    let taken = clients.post(CLIENT, &good).await;
    is_in(&clients, taken, DELIVERED).await;
    for (cause, id) in posted {
        let state = if cause == "fee" { "seen" } else { "declined" };
        let row = is_noted(place, id, state).await;
        eventually(&format!("job {id} waits for lower fees"), LIMIT, async || (noted(place, id)["cause"] == cause).then_some(()))
            .await;
        assert!(row["state"] != "claimed" && clients.job(id).await.state == OPEN, "{row:#}");
    }
    let why = place.ran(&["why", "--json"]).json();
    let causes = why["causes"].as_array().expect("a list");
    for cause in ["price", "bond", "model", "input", "too_long", "time", "amount", "fee", "proof"] {
        let told = causes.iter().find(|told| told["cause"] == cause).unwrap_or_else(|| panic!("no {cause}: {why:#}"));
        assert_eq!(told["not_won"].as_u64().unwrap_or(0) + told["waiting"].as_u64().unwrap_or(0), 1, "{told:#}");
        assert!(told["advice"].as_str().is_some_and(|advice| advice.len() > 20));
    }
    println!("{}", place.ran(&["why"]).out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_only_embeds_is_not_sold() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let digest = "e0".repeat(32);
    let embeds = format!(
        "{}[[plugin]]\nid = 'embeds'\nuse = 'inference-faulty'\n\
         config = {{ model = 'embeds', digest = '{digest}', generates = false }}\n",
        entries()
    );
    let provider = node(&chain, NODE, "", &embeds).await;
    provider.node.serves("embeds").await;
    provider.node.serves("faulty").await;
    let for_it = clients.post(CLIENT, &Job::of(&digest, "hello")).await;
    is_noted(&provider.node.place, for_it, "declined").await;
    let taken = clients.post(CLIENT, &job("hello")).await;
    is_in(&clients, taken, DELIVERED).await;
    assert_eq!(noted(&provider.node.place, for_it)["cause"], "model", "it is as if it were not served");
    assert_eq!(clients.job(for_it).await.state, OPEN);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_killed_after_its_claim_and_after_its_result_finishes_the_job_once() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let mut node = node(&chain, NODE, FEES, &entries()).await.node;
    node.serves("faulty").await;

    // In the middle of the work.
    let id = clients.post(CLIENT, &job("!wait:6000 after the claim")).await;
    is_noted(&node.place, id, "working").await;
    node.signal(libc::SIGKILL);
    node.exit(LIMIT).await;
    node = node.relaunch(&[]);
    let held = is_in(&clients, id, DELIVERED).await;
    assert_eq!((held.attempts, clients.told(CLAIM_EVENT, id).await, clients.told(RESULT_EVENT, id).await), (1, 1, 1));
    is_noted(&node.place, id, "submitted").await;

    // While its claim waits for a block.
    clients.rpc("evm_setAutomine", json!([false])).await;
    let sent = clients.post_unmined(CLIENT, &job("before the claim is mined")).await;
    clients.rpc("evm_mine", json!([])).await;
    let id = clients.posted(&sent).await;
    is_noted(&node.place, id, "claiming").await;
    node.signal(libc::SIGKILL);
    node.exit(LIMIT).await;
    node = node.relaunch(&[]);
    eventually("the claim is in the pool", LIMIT, async || {
        clients.rpc("evm_mine", json!([])).await;
        (clients.job(id).await.state >= CLAIMED).then_some(())
    })
    .await;

    // With its result on disk, and the transaction that hands it in on its way.
    is_noted(&node.place, id, "submitting").await;
    node.signal(libc::SIGKILL);
    node.exit(LIMIT).await;
    node = node.relaunch(&[]);
    eventually("the result is in a block", LIMIT, async || {
        clients.rpc("evm_mine", json!([])).await;
        (clients.job(id).await.state == DELIVERED).then_some(())
    })
    .await;
    clients.rpc("evm_setAutomine", json!([true])).await;
    is_noted(&node.place, id, "submitted").await;
    assert_eq!((clients.told(CLAIM_EVENT, id).await, clients.told(RESULT_EVENT, id).await), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_fails_twice_is_given_back_for_a_tenth_of_its_bond_and_the_node_goes_on() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let provider = node(&chain, NODE, FEES, &entries()).await;
    provider.node.serves("faulty").await;
    let asked = job("!error");
    let id = clients.post(CLIENT, &asked).await;
    is_in(&clients, id, REFUNDED).await;
    let row = is_noted(&provider.node.place, id, "failed").await;
    assert_eq!(row["cause"], "failed", "{row:#}");
    assert_eq!(
        clients.credit(CLIENT.address).await,
        asked.max_amount + asked.bond / 10,
        "the client has all of it, and a tenth of the bond"
    );
    let next = clients.post(CLIENT, &job("and then")).await;
    is_in(&clients, next, DELIVERED).await;
    // An answer that is longer than was paid for is charged as what was paid for.
    let long = clients.post(CLIENT, &Job { max_out: 3, ..job("one two three four five") }).await;
    assert_eq!(is_in(&clients, long, DELIVERED).await.out_tokens, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_jobs_posted_while_the_node_was_down_are_caught_up_with() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let place = node_place(&chain, NODE, &format!("{FEES}jobs = 4\n"), &entries());
    let good = job("of the backlog");
    let cheap = Job { price_out: 1, ..good.clone() };
    let jobs: Vec<Job> =
        (0..1000).map(|number| if number % 100 == 99 || number < 500 { good.clone() } else { cheap.clone() }).collect();
    let posted = clients.post_all(OTHER_CLIENT, &jobs).await;
    let wanted: Vec<u64> = posted.clone().filter(|id| (id - posted.start) % 100 == 99).collect();
    clients.cancel_all(OTHER_CLIENT, posted.clone().take(500).filter(|id| !wanted.contains(id))).await;

    let began = Instant::now();
    let node = Node::launch(place, &[]);
    for id in &wanted {
        is_in(&clients, *id, DELIVERED).await;
    }
    println!("caught up with 1000 jobs and finished the {} good ones {:?} after the start", wanted.len(), began.elapsed());
    let why = eventually("every job is in the journal", LIMIT, async || {
        let why = node.place.ran(&["why", "--json"]).json();
        (why["seen"] == 1000 && why["won"] == wanted.len() as u64 && why["waiting"] == 0).then_some(why)
    })
    .await;
    let count =
        |cause: &str| why["causes"].as_array().and_then(|causes| causes.iter().find(|told| told["cause"] == cause).cloned());
    assert_eq!(count("gone").expect("cancelled ones")["not_won"], 495, "{why:#}");
    assert_eq!(count("price").expect("cheap ones")["not_won"], 495, "{why:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_ordered_soon_after_the_posting_is_seen() {
    const ROUNDS: usize = 40;
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let provider = node(&chain, NODE, FEES, &entries()).await;
    provider.node.serves("faulty").await;
    let mut whole = Vec::new();
    for round in 0..ROUNDS {
        let began = Instant::now();
        let id = clients.post(CLIENT, &job(&format!("round {round}"))).await;
        eventually("the job is claimed", LIMIT, async || (clients.job(id).await.state >= CLAIMED).then_some(())).await;
        whole.push(began.elapsed());
        is_in(&clients, id, DELIVERED).await;
    }
    let log = provider.node.log();
    let mut ordered: Vec<u64> = log
        .lines()
        .filter(|line| line.contains("its claim is ordered"))
        .filter_map(|line| line.split_once("after_ms=")?.1.split_whitespace().next()?.parse().ok())
        .collect();
    assert_eq!(ordered.len(), ROUNDS, "{log}");
    ordered.sort();
    whole.sort();
    let p95 = ROUNDS * 95 / 100;
    println!(
        "{ROUNDS} jobs: claim ordered {} ms (median), {} ms (p95), {} ms (worst) after the posting was seen; \
         claimed in a block {:?} (median), {:?} (p95) after it was posted",
        ordered[ROUNDS / 2],
        ordered[p95],
        ordered[ROUNDS - 1],
        whole[ROUNDS / 2],
        whole[p95]
    );
    assert!(ordered[p95] < 2000, "{ordered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_chain_takes_back_leaves_the_node_consistent() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let provider = node(&chain, NODE, FEES, &entries()).await;
    let place = &provider.node.place;
    provider.node.serves("faulty").await;
    // A posting that is gone, with the claim after it, while the model works.
    let before = clients.rpc("eth_blockNumber", json!([])).await;
    let gone = clients.post(CLIENT, &job("!wait:6000 never paid for")).await;
    is_noted(place, gone, "working").await;
    let depth = fabstir_tests::posting::number(&clients.rpc("eth_blockNumber", json!([])).await)
        - fabstir_tests::posting::number(&before);
    clients.rpc("anvil_reorg", json!([depth, []])).await;
    clients.rpc("anvil_mine", json!(["0x2"])).await;
    provider.node.logged(&["The chain has taken blocks back."]).await;
    eventually("the job is given up", LIMIT, async || {
        let state = noted(place, gone)["state"].clone();
        (state == "missed" || state == "failed").then_some(())
    })
    .await;
    // Another job gets the same number, and is another job.
    let again = clients.post(OTHER_CLIENT, &job("another one")).await;
    assert_eq!(again, gone, "the number is free again");
    let held = is_in(&clients, again, DELIVERED).await;
    let row = is_noted(place, again, "submitted").await;
    assert_eq!(row["client"], OTHER_CLIENT.address);
    assert_eq!(row["result"]["output_commitment"], format!("0x{}", held.output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_job_is_claimed_only_once_its_block_is_safe_and_a_cancelled_one_never() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let provider = node(&chain, NODE, "sure_above_wei = 5_000_000_000_000_001\n", &entries()).await;
    let place = &provider.node.place;
    provider.node.serves("faulty").await;
    let large = Job { max_amount: 5_000_000_000_000_001, ..job("a large one") };
    let (cancelled, kept) = (clients.post(CLIENT, &large).await, clients.post(CLIENT, &large).await);
    eventually("it waits for its block to be safe", LIMIT, async || {
        noted(place, kept)["why"].as_str().is_some_and(|why| why.contains("safe")).then_some(())
    })
    .await;
    clients.cancel_all(CLIENT, [cancelled]).await;
    let small = clients.post(CLIENT, &job("a small one")).await;
    is_in(&clients, small, DELIVERED).await;
    assert_eq!(clients.job(kept).await.state, OPEN);
    assert_eq!(is_noted(place, cancelled, "missed").await["cause"], "gone");
    clients.rpc("anvil_mine", json!(["0x80"])).await;
    is_in(&clients, kept, DELIVERED).await;
    assert_eq!((clients.job(cancelled).await.state, clients.told(CLAIM_EVENT, cancelled).await), (REFUNDED, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_stopped_ends_the_job_in_work_and_takes_no_new_one() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let mut provider = node(&chain, NODE, "", &entries()).await;
    provider.node.serves("faulty").await;
    let running = clients.post(CLIENT, &job("!wait:6000 to the end")).await;
    is_noted(&provider.node.place, running, "working").await;
    provider.node.signal(libc::SIGTERM);
    provider.node.logged(&["Draining"]).await;
    let late = clients.post(CLIENT, &job("too late")).await;
    assert_eq!(provider.node.exit(LIMIT).await, 0);
    assert_eq!((clients.job(running).await.state, clients.job(late).await.state), (DELIVERED, OPEN));
    let log = provider.node.log();
    assert!(!log.contains("cut off"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_cancelled_under_its_claim_costs_no_work() {
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let provider = node(&chain, NODE, FEES, &entries()).await;
    let place = &provider.node.place;
    provider.node.serves("faulty").await;
    let admitted = provider.node.metric("fabstir_requests_admitted_total", &[]).await;

    clients.rpc("evm_setAutomine", json!([false])).await;
    let sent = clients.post_unmined(CLIENT, &job("never worked on")).await;
    clients.rpc("evm_mine", json!([])).await;
    let id = clients.posted(&sent).await;
    is_noted(place, id, "claiming").await;
    // Both are in the pool now, and the client pays more to be first.
    clients.cancel_dearly(CLIENT, id).await;
    eventually("the claim is in the pool too", LIMIT, async || {
        let status = clients.rpc("txpool_status", json!([])).await;
        (status["pending"] == "0x2").then_some(())
    })
    .await;
    clients.rpc("evm_mine", json!([])).await;
    clients.rpc("evm_setAutomine", json!([true])).await;
    assert_eq!(is_in(&clients, id, REFUNDED).await.attempts, 0);
    let row = eventually("the node has given it up", LIMIT, async || {
        let row = noted(place, id);
        (row["state"] == "missed" || row["state"] == "failed").then_some(row)
    })
    .await;
    assert!(row["result"].is_null(), "{row:#}");
    assert_eq!(provider.node.metric("fabstir_requests_admitted_total", &[]).await, admitted, "no model was asked");
    // It goes on with others.
    let next = clients.post(CLIENT, &job("the next one")).await;
    is_in(&clients, next, DELIVERED).await;
}

/// Twenty times the node is killed at a moment that nobody chose, somewhere between seeing a job and having handed its result in.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_at_any_moment_works_each_job_to_its_end_once() {
    const RUNS: u64 = 20;
    let chain = DevChain::start().expect("a chain");
    let clients = Clients::of(&chain);
    let mut node = node(&chain, NODE, FEES, &entries()).await.node;
    node.serves("faulty").await;
    let before = clients.credit(PAYOUT.address).await;
    let mut found = std::collections::BTreeMap::<String, u32>::new();
    let mut price = 0;
    for run in 0..RUNS {
        let asked = job("!wait:40 once");
        let id = clients.post(CLIENT, &asked).await;
        tokio::time::sleep(std::time::Duration::from_millis(run * 11)).await;
        node.signal(libc::SIGKILL);
        node.exit(LIMIT).await;
        let state = noted(&node.place, id)["state"].as_str().unwrap_or("unknown").to_owned();
        *found.entry(state).or_default() += 1;
        node = node.relaunch(&[]);
        let held = is_in(&clients, id, DELIVERED).await;
        assert_eq!((clients.told(CLAIM_EVENT, id).await, clients.told(RESULT_EVENT, id).await), (1, 1), "run {run}");
        price += (held.in_tokens * asked.price_in + held.out_tokens * asked.price_out).div_ceil(1_000_000);
        clients.accept(CLIENT, id).await;
        is_noted(&node.place, id, "settled").await;
    }
    println!("{RUNS} kills found the journal at {found:?}");
    assert_eq!(clients.credit(PAYOUT.address).await - before, price, "the ledger is the chain's, to the wei");
}
