//! Clients that pay: the shipped binary on both sides, with the real plugins on a development chain.

use std::time::Duration;

use fabstir_tests::dev_chain::DevChain;
use fabstir_tests::http::with;
use fabstir_tests::market::{self, CLIENT, NODE, PAYOUT};
use fabstir_tests::peers::{NET, Provider, Wire, connect};
use fabstir_tests::{LIMIT, Node, Place, chat, eventually};
use futures::future::join_all;
use serde_json::{Value, json};

/// What one word costs, read and generated: see [`market::PRICES`].
const READ: u128 = 1_000_000_000_000;
const GENERATED: u128 = 4_000_000_000_000;
/// Deposits of these tests are not waited for until they are safe.
const NODE_MARKET: &str = "sure_above_wei = 1000000000000000000";

fn echo(delay_ms: u32) -> String {
    format!("[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nconfig = {{ delay_ms = {delay_ms}, parallel = 64 }}\n")
}

fn words(count: usize) -> String {
    "word ".repeat(count).trim_end().to_owned()
}

fn wei(value: &Value) -> u128 {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no amount: {value}"))
}

fn client_place(chain: &DevChain) -> Place {
    market::place(chain, CLIENT, "", "", NET)
}

/// `connect` with money to spend, which prints its receipts as JSON.
async fn paying(place: Place, most: &str, bootstrap: &[&str]) -> Node {
    let mut arguments = vec!["connect", "--model", "echo", "--listen", "127.0.0.1:0", "--log", "info", "--json"];
    arguments.extend(["--max-spend", most]);
    arguments.extend(bootstrap.iter().flat_map(|address| ["--bootstrap", address]));
    let node = Node::start_command(place, &arguments);
    node.healthy().await;
    node
}

/// Ends a client as Ctrl-C does: its receipts.
async fn receipts(client: &mut Node) -> Vec<Value> {
    client.signal(libc::SIGINT);
    assert_eq!(client.exit(2 * LIMIT).await, 0);
    let told: Value = serde_json::from_str(&client.output_to_the_end().join("\n")).expect("receipts");
    told["purchases"].as_array().expect("a list").clone()
}

async fn transactions(chain: &DevChain, account: market::Account) -> u64 {
    let count = chain.ask("eth_getTransactionCount", json!([account.address, "latest"])).await.expect("a count");
    u64::from_str_radix(count.as_str().expect("text").trim_start_matches("0x"), 16).expect("a number")
}

fn balances(place: &Place) -> Value {
    place.ran(&["market", "status", "--json"]).json()["balances"].clone()
}

fn payout(chain: &DevChain) -> u128 {
    wei(&balances(&market::place(chain, PAYOUT, "", "", ""))["credit"])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paid_answer_costs_what_the_receipt_says_to_the_wei_and_takes_two_transactions() {
    let chain = DevChain::start().expect("a chain");
    let provider = market::node(&chain, NODE, NODE_MARKET, &echo(1)).await;
    let place = client_place(&chain);
    let (before, paid_out) = (balances(&place), payout(&chain));
    let sent = (transactions(&chain, CLIENT).await, transactions(&chain, NODE).await);
    let mut client = paying(place, "0.1eth", &[&provider.address]).await;

    let told = client.stream(chat("echo", &words(600))).await.rest().await;
    assert!(told.is_whole() && told.text == words(600), "{told:?}");
    let receipts = receipts(&mut client).await;
    let [receipt] = receipts.as_slice() else { panic!("one session: {receipts:#?}") };

    assert_eq!(
        (receipt["voucher"]["input_tokens"].as_u64(), receipt["voucher"]["output_tokens"].as_u64()),
        (Some(600), Some(600))
    );
    assert_eq!(wei(&receipt["to_host"]), 600 * (READ + GENERATED), "{receipt:#}");
    assert_eq!(wei(&receipt["deposit"]), wei(&receipt["to_host"]) + wei(&receipt["to_client"]));
    assert_eq!(receipt["state"], "over");
    let after = balances(&client.place);
    assert_eq!(wei(&after["credit"]) - wei(&before["credit"]), wei(&receipt["to_client"]));
    assert_eq!(wei(&before["coin"]) - wei(&after["coin"]), wei(&receipt["deposit"]) + wei(&receipt["fee"]));
    assert_eq!(payout(&chain) - paid_out, wei(&receipt["to_host"]));
    let now = (transactions(&chain, CLIENT).await, transactions(&chain, NODE).await);
    assert_eq!((now.0 - sent.0, now.1 - sent.1), (1, 1));
    assert!(!provider.node.log().contains("another transcript"), "both sides agree on what was said");

    let listed = client.place.ran(&["purchases", "--json"]).json();
    assert_eq!(listed["purchases"][0]["session"], receipt["session"]);
    let table = client.place.ran(&["purchases"]).out;
    assert!(table.contains("over") && table.contains("0.003 ETH"), "{table}");
    client.place.ran(&["market", "withdraw"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_money_only_free_nodes_are_asked_and_where_there_are_none_the_price_is_told() {
    let chain = DevChain::start().expect("a chain");
    let priced = market::node(&chain, NODE, NODE_MARKET, &echo(0)).await;
    let dear = connect("echo", &[&priced.address]).await;
    let refused = dear.chat(&chat("echo", "one two")).await;
    let message = refused.refusal(402, "payment_required");
    assert!(message.contains("--max-spend") && message.contains("1 ETH") && message.contains("4 ETH"), "{message}");

    let free = Provider::start(&echo(0)).await;
    let both = connect("echo", &[&priced.address, &free.address]).await;
    eventually("both nodes are known", 2 * LIMIT, async || (both.log().matches("Found a node.").count() == 2).then_some(()))
        .await;
    both.logged(&["without --max-spend it is not asked"]).await;
    for _ in 0..5 {
        assert_eq!(both.ask("echo", "one two").await, "one two");
    }
    // Where money may be spent, the cheapest still comes first.
    let mut paying = paying(client_place(&chain), "0.1eth", &[&priced.address, &free.address]).await;
    eventually("both nodes are known", 2 * LIMIT, async || (paying.log().matches("Found a node.").count() == 2).then_some(()))
        .await;
    assert_eq!(paying.ask("echo", "one two").await, "one two");
    assert!(receipts(&mut paying).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_the_same_time_share_one_session() {
    let chain = DevChain::start().expect("a chain");
    let provider = market::node(&chain, NODE, NODE_MARKET, &echo(2)).await;
    let mut client = paying(client_place(&chain), "0.2eth", &[&provider.address]).await;
    let ask = async |count: usize| {
        let told = client.stream(chat("echo", &words(count))).await.rest().await;
        assert!(told.is_whole() && told.text == words(count), "{told:?}");
    };
    join_all((1..=16).map(|number| ask(20 * number))).await;
    join_all((1..=16).map(|number| ask(20 * number))).await;
    let receipts = receipts(&mut client).await;
    let [receipt] = receipts.as_slice() else { panic!("one session: {receipts:#?}") };
    let words: u128 = 2 * (1..=16).map(|number| 20 * number).sum::<u128>();
    assert_eq!(wei(&receipt["to_host"]), words * (READ + GENERATED), "{receipt:#}");
    assert!(!provider.node.log().contains("another transcript"), "both sides agree on what was said");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_that_is_used_up_is_a_clear_error_and_nothing_more_is_spent() {
    let chain = DevChain::start().expect("a chain");
    let provider = market::node(&chain, NODE, NODE_MARKET, &echo(0)).await;
    // Room for 600 words.
    let mut client = paying(client_place(&chain), "0.003eth", &[&provider.address]).await;
    let told = client.stream(chat("echo", &words(1000))).await.rest().await;
    let error = told.error.as_ref().unwrap_or_else(|| panic!("is cut off: {told:?}"));
    assert!(error["message"].as_str().is_some_and(|message| message.contains("0.003 ETH")), "{error}");
    let refused = client.chat(&chat("echo", "more")).await;
    let message = refused.refusal(402, "payment_required");
    assert!(message.contains("--max-spend 0.003 ETH"), "{message}");
    let receipts = receipts(&mut client).await;
    let spent: u128 = receipts.iter().map(|receipt| wei(&receipt["to_host"])).sum();
    assert!(spent <= 3_000_000_000_000_000 && spent > 2_000_000_000_000_000, "{receipts:#?}");

    let little = client_place(&chain);
    let mut little = paying(little, "10gwei", &[&provider.address]).await;
    let refused = little.chat(&chat("echo", "more")).await;
    assert!(refused.refusal(402, "payment_required").contains("0.00000001 ETH"), "{refused:#?}");
    little.signal(libc::SIGINT);
    assert_eq!(little.exit(LIMIT).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_used_up_is_followed_by_another_within_the_budget() {
    let chain = DevChain::start().expect("a chain");
    let provider = market::node(&chain, NODE, &format!("{NODE_MARKET}\ncredit_tokens = 16"), &echo(0)).await;
    // A deposit is a quarter of the budget: 500 words.
    let mut client = paying(client_place(&chain), "0.01eth", &[&provider.address]).await;
    for _ in 0..6 {
        assert_eq!(client.ask("echo", &words(200)).await, words(200));
    }
    let receipts = receipts(&mut client).await;
    assert_eq!(receipts.len(), 3, "{receipts:#?}");
    let spent: u128 = receipts.iter().map(|receipt| wei(&receipt["to_host"])).sum();
    // A prompt that turns out to have fewer tokens than it was taken for has been paid by then: its session's next one would be cheaper.
    let (exact, taken_for) = (6 * 200 * (READ + GENERATED), (200 * 5_u128).div_ceil(4) + 4);
    assert!((exact..=exact + 3 * (taken_for - 200) * READ).contains(&spent), "{spent} {receipts:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_goes_on_after_the_connection_broke_is_paid_once() {
    let chain = DevChain::start().expect("a chain");
    let provider = market::node(&chain, NODE, NODE_MARKET, &echo(5)).await;
    let wire = Wire::to(provider.port()).await.expect("a wire");
    let mut client = paying(client_place(&chain), "0.1eth", &[&provider.address_behind(wire.port)]).await;
    let mut events = client.stream(chat("echo", &words(600))).await;
    let mut text = events.text().await;
    for _ in 0..3 {
        for _ in 0..20 {
            text += &events.text().await;
        }
        wire.cut_for(Duration::from_millis(300)).await;
    }
    let told = events.rest().await;
    text += &told.text;
    assert!(told.is_whole() && text == words(600), "{told:?}");
    let receipts = receipts(&mut client).await;
    assert_eq!(wei(&receipts[0]["to_host"]), 600 * (READ + GENERATED), "{receipts:#?}");
    assert!(!provider.node.log().contains("another transcript"), "both sides agree on what was said");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_given_up_do_not_stop_a_session() {
    let chain = DevChain::start().expect("a chain");
    let provider = market::node(&chain, NODE, NODE_MARKET, &echo(1)).await;
    let mut client = paying(client_place(&chain), "0.1eth", &[&provider.address]).await;
    for _ in 0..10 {
        let mut events = client.stream(chat("echo", &words(500))).await;
        for _ in 0..5 {
            events.text().await;
        }
        drop(events);
    }
    assert_eq!(client.ask("echo", &words(300)).await, words(300));
    let receipts = receipts(&mut client).await;
    for receipt in &receipts {
        assert_eq!(wei(&receipt["deposit"]), wei(&receipt["to_host"]) + wei(&receipt["to_client"]), "{receipts:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_client_gets_back_what_it_has_not_used() {
    let chain = DevChain::start().expect("a chain");
    let provider = market::node(&chain, NODE, NODE_MARKET, &echo(5)).await;
    let mut client = paying(client_place(&chain), "0.1eth", &[&provider.address]).await;
    let mut events = client.stream(chat("echo", &words(1000))).await;
    for _ in 0..300 {
        events.text().await;
    }
    client.signal(libc::SIGKILL);
    client.exit(LIMIT).await;
    let left = client.place.ran(&["purchases", "--json"]).json();
    let promised = wei(&left["purchases"][0]["voucher"]["amount"]);
    assert!(promised > 0 && left["purchases"][0]["state"] == "open", "{left:#}");

    // It goes on in the session that it has left, and pays no other deposit.
    let place = std::mem::replace(&mut client.place, Place::new(""));
    let mut again = paying(place, "0.1eth", &[&provider.address]).await;
    assert_eq!(again.ask("echo", &words(100)).await, words(100));
    // The last voucher is signed after the last piece has been passed on.
    eventually("the answer is paid", LIMIT, async || {
        let bought = again.place.ran(&["purchases", "--json"]).json();
        (wei(&bought["purchases"][0]["voucher"]["amount"]) >= promised + 99 * (READ + GENERATED)).then_some(())
    })
    .await;
    again.signal(libc::SIGKILL);
    again.exit(LIMIT).await;
    let bought = again.place.ran(&["purchases", "--json"]).json()["purchases"].as_array().expect("a list").clone();
    assert_eq!(bought.len(), 1, "{bought:#?}");

    // Closed from here, and the node hands in what it was promised.
    let closed = again.place.ran(&["market", "reclaim", "--json"]).json();
    assert_eq!(closed["purchases"][0]["state"], "closing", "{closed:#}");
    let over = eventually("the node has handed its voucher in", 2 * LIMIT, async || {
        let told = again.place.ran(&["market", "reclaim", "--json"]).json()["purchases"][0].clone();
        (told["state"] == "over").then_some(told)
    })
    .await;
    assert_eq!(wei(&over["to_host"]), wei(&over["voucher"]["amount"]), "{over:#}");
    assert_eq!(wei(&over["deposit"]), wei(&over["to_host"]) + wei(&over["to_client"]));
    assert_eq!(wei(&balances(&again.place)["credit"]), wei(&over["to_client"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paid_chat_answers_and_tells_what_it_has_paid() {
    let chain = DevChain::start().expect("a chain");
    let provider = market::node(&chain, NODE, NODE_MARKET, &echo(0)).await;
    let place = client_place(&chain);
    let network = ["--network", "--model", "echo", "--bootstrap", &provider.address];
    let prompt = words(200);
    let asked = place.ran(&[&["chat", &prompt, "--max-spend", "0.1eth"], &network[..]].concat());
    assert_eq!(asked.out.trim(), prompt);
    assert!(asked.err.contains("paid 0.001 ETH of a deposit of 0.025 ETH"), "{}", asked.err);
    let asked = place.ran(&[&["chat", &prompt, "--max-spend", "0.1eth", "--json"], &network[..]].concat()).json();
    assert_eq!(asked["answer"].as_str(), Some(prompt.as_str()), "{asked:#}");
    assert_eq!(asked["purchases"].as_array().map(Vec::len), Some(1), "{asked:#}");
    // What a client bounds itself, it does not pay for.
    let mut client = paying(place, "0.1eth", &[&provider.address]).await;
    let body = with(chat("echo", &words(300)), json!({ "max_tokens": 50 }));
    assert_eq!(client.chat(&body).await.content().trim_end(), words(50));
    let receipts = receipts(&mut client).await;
    assert_eq!(wei(&receipts[0]["to_host"]), 300 * READ + 50 * GENERATED, "{receipts:#?}");
}

#[test]
fn spending_takes_a_key_and_a_chain() {
    let nothing = Place::new(NET);
    let arguments = ["connect", "--model", "echo", "--listen", "127.0.0.1:0", "--max-spend", "0.1eth", "--json"];
    let no_account = nothing.run(&arguments);
    assert_eq!((no_account.code, &no_account.json()["error"]["code"]), (3, &json!("no_account")), "{no_account:#?}");
    let chain = DevChain::start().expect("a chain");
    let place = client_place(&chain);
    let away = place.run(&[&arguments[..], &["--set", "plugin.base.config.rpc=[\"http://127.0.0.1:9\"]"]].concat());
    assert_eq!((away.code, &away.json()["error"]["code"]), (4, &json!("unreachable")), "{away:#?}");
    place.configure(&format!("[keys]\npassword_file = 'password'\n[market]\nkey = 'hot'\n{NET}"));
    let no_chain = place.run(&arguments);
    assert_eq!((no_chain.code, &no_chain.json()["error"]["code"]), (3, &json!("no_chain")), "{no_chain:#?}");
    let no_unit = place.run(&["connect", "--model", "echo", "--max-spend", "1"]);
    assert!(no_unit.code == 2 && no_unit.err.contains("0.05eth"), "{no_unit:#?}");
}
