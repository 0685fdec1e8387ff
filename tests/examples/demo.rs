//! The whole market on one machine, with real money of a development chain: `make demo`.
//!
//! All five kinds of plugins in one run: nodes that are found over libp2p, paid on a chain, and answer with llama.cpp; a job whose result lies on
//! S5 and is proven to a contract; the same question again, from the cache; a proof that was tampered with, refused. At the end every account
//! is compared with what it had, to the wei. `--keep` leaves all of it up.

use std::fmt::Display;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use fabstir_host::market::coins;
use fabstir_plugin_api::chain::Amount;
use fabstir_tests::dev_chain::DevChain;
use fabstir_tests::market::{Account, CLIENT, NODE, OTHER_NODE, PAYOUT, place};
use fabstir_tests::peers::{NET, Provider, net_from};
use fabstir_tests::portal::Portal;
use fabstir_tests::{LIMIT, Node, Place, artifact, chat, eventually, tiny_chat};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

const QUESTIONS: [&str; 5] = [
    "What is the capital of France?",
    "What is the capital of Italy?",
    "What is the capital of Japan?",
    "What is the capital of Spain?",
    "What is the capital of Norway?",
];
const PROVER: &str = "[[plugin]]\nid = 'groth16'\nuse = 'prover-groth16'\n";
/// What is proven of the posted job.
const STATEMENT: &str = "commitment";
/// What the client puts down at most, for a session and for a job.
const MOST: &str = "0.1eth";
/// At these prices a few short answers are worth more than the fees of their settlement. In wei for a million tokens.
const SECTIONS: &str = "[cache]\nenabled = true\n\n[network]\nprice_input_wei_per_mtok = 2_000_000_000_000_000_000\nprice_output_wei_per_mtok = 8_000_000_000_000_000_000";
/// A development chain has safe blocks late: the nodes do not wait for them below this amount.
const MARKET: &str = "sure_above_wei = 1_000_000_000_000_000_000";
const STAKE: &str = "1eth";
/// How long the node may take to hand in the vouchers of a session that is over.
const SETTLED: Duration = Duration::from_secs(60);

/// The selectors of ProofHub's `verifierOf` and of a verifier's `verify`.
const VERIFIER_OF: &str = "f0c03050";
const VERIFY: &str = "5bf48e3a";

/// What does not work or add up ends the demo with a sentence.
type Told<T> = Result<T, String>;

#[tokio::main]
async fn main() -> ExitCode {
    let keep = std::env::args().skip(1).any(|argument| argument == "--keep");
    // From here on Ctrl-C kills nothing: what was made goes when it goes out of scope.
    let mut interrupt = signal(SignalKind::interrupt()).expect("signals can be received");
    let ended = tokio::select! {
        ended = walk() => ended,
        _ = interrupt.recv() => Err("interrupted".into()),
    };
    match ended {
        Ok(stage) => {
            if keep {
                stage.tell();
                interrupt.recv().await;
            }
            stage.end().await;
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("\nThe demo has failed: {why}");
            ExitCode::FAILURE
        }
    }
}

/// What runs, and where its files are.
struct Stage {
    chain: DevChain,
    /// Ends with the rest.
    _portal: Portal,
    nodes: [Provider; 2],
    client: Place,
}

async fn walk() -> Told<Stage> {
    let began = Instant::now();
    step("A chain, and the market's contracts on it");
    let chain = DevChain::start()?;
    let config = chain.config();
    line("chain", format!("anvil, {}, number {}", config["rpc"][0].as_str().unwrap_or("?"), config["chain_id"]));
    line("escrow", text(&config["contracts"]["escrow"]));
    line("nodes", text(&config["contracts"]["nodes"]));

    let portal = Portal::start();
    line("S5 portal", &portal.url);
    let storage = format!("[[plugin]]\nid = 's5'\nuse = 'storage-s5'\nconfig = {{ portals = [{{ url = '{}' }}] }}\n", portal.url);

    let client = place(&chain, CLIENT, "", "", &format!("{NET}{storage}"));
    let payout = place(&chain, PAYOUT, "", "", "");
    let block = number(&chain.ask("eth_blockNumber", json!([])).await?)?;
    let mut before = vec![total(&client)?, total(&payout)?];

    step("Two nodes, each with a stake; the second knows only the first");
    let first = place(&chain, NODE, SECTIONS, MARKET, &format!("{NET}{storage}{PROVER}{}", tiny_chat()));
    before.push(total(&first)?);
    let program = verifier(&chain, &first)?;
    let first = start(first, "node 1").await?;
    let entries = format!("{}{storage}{}", net_from(&first.address), tiny_chat());
    let second = place(&chain, OTHER_NODE, SECTIONS, MARKET, &entries);
    before.push(total(&second)?);
    let nodes = [first, start(second, "node 2").await?];

    step("A client finds them, and begins at the first only");
    let bootstrap = ["--bootstrap", nodes[0].address.as_str()];
    discover(&client, &bootstrap).await?;

    step(&format!("A session that is paid by vouchers, for {MOST} at most"));
    let client = session(client, &nodes).await?;

    step(&format!("A job that is posted for any node that proves its result, with {MOST} put down"));
    job(&client, &bootstrap, &program)?;
    tampered(&chain, &program).await?;

    step("The same question again, at the first node");
    again(&nodes[0]).await?;

    step("What came of it");
    let withdrawn = client.run(&["market", "withdraw", "--json"]);
    if withdrawn.code != 0 {
        return Err(format!("nothing came back to the client: {withdrawn:#?}"));
    }
    let paid = receipts(&client, &nodes).await?;
    let places = [&client, &payout, &nodes[0].node.place, &nodes[1].node.place];
    adds_up(&chain, block, &before, places, paid).await?;
    println!("\nEverything adds up, {:.0} s after the start.", began.elapsed().as_secs_f64());
    Ok(Stage { chain, _portal: portal, nodes, client })
}

/// Registers a node and starts it.
async fn start(place: Place, name: &str) -> Told<Provider> {
    let registered = place.ran(&["market", "register", "--stake", STAKE, "--payout", PAYOUT.address, "--json"]).json();
    line(name, format!("stake {STAKE}, {}", receipt(&registered)));
    let node = Node::launch(place, &[]);
    node.healthy().await;
    node.serves("tiny-chat").await;
    node.logged(&["Acting in the market."]).await;
    let provider = Provider::of(node).await;
    line("", &provider.address);
    Ok(provider)
}

async fn discover(client: &Place, bootstrap: &[&str]) -> Told<()> {
    let began = Instant::now();
    let find = [&["find", "tiny-chat", "--json"], bootstrap].concat();
    let found = eventually("both nodes are found", LIMIT, async || {
        let found = client.ran(&find).json();
        (found["nodes"].as_array().map_or(0, Vec::len) == 2).then_some(found)
    })
    .await;
    for node in found["nodes"].as_array().into_iter().flatten() {
        let model = &node["models"][0];
        line(
            text(&model["name"]),
            format!(
                "{} for a million tokens generated, {} of {} slots free, {:.1} ms away",
                eth(wei(&model["price_output_wei_per_mtok"])?),
                model["free"],
                model["slots"],
                node["latency_ms"].as_f64().unwrap_or(0.0),
            ),
        );
        line("", text(&node["peer"]));
    }
    line("found in", format!("{:.1} s", began.elapsed().as_secs_f64()));
    Ok(())
}

/// One answer, streamed through a local port of the client, and the settlement of its session.
async fn session(client: Place, nodes: &[Provider; 2]) -> Told<Place> {
    let arguments =
        ["connect", "--model", "tiny-chat", "--listen", "127.0.0.1:0", "--max-spend", MOST, "--bootstrap", &nodes[0].address];
    let mut local = Node::start_command(client, &arguments);
    local.healthy().await;
    for question in QUESTIONS {
        let began = Instant::now();
        let told = local.stream(chat("tiny-chat", question)).await.rest().await;
        if !told.is_whole() {
            return Err(format!("the answer was not whole: {told:?}"));
        }
        let first = told.first.map_or(0.0, |first| (first - began).as_secs_f64());
        line(
            "asked",
            format!(
                "{question} {} ({first:.2} s to the first token, {:.2} s in all)",
                told.text.trim(),
                began.elapsed().as_secs_f64()
            ),
        );
    }
    local.signal(libc::SIGINT);
    local.exit(2 * LIMIT).await;
    eventually("a node has settled the session", SETTLED, async || {
        let settled = nodes.iter().any(|node| earnings(node)["sessions"]["settled"]["count"].as_u64() == Some(1));
        settled.then_some(())
    })
    .await;
    let client = local.into_place();
    for bought in client.ran(&["purchases", "--json"]).json()["purchases"].as_array().into_iter().flatten() {
        let (paid, deposit, back) = (wei(&bought["to_host"])?, wei(&bought["deposit"])?, wei(&bought["to_client"])?);
        line("settled", format!("{} to the node of a deposit of {}, {} back", eth(paid), eth(deposit), eth(back)));
        line("", format!("session {}", text(&bought["session"])));
    }
    Ok(client)
}

/// Deploys the contract that checks what the node proves. Returns its program.
fn verifier(chain: &DevChain, node: &Place) -> Told<String> {
    let file = node.path().join("verifier.json");
    let written = node.ran(&["proof", "contract", STATEMENT, "-o", file.to_str().ok_or("a path of no text")?, "--json"]).json();
    let deployed = chain.name_verifier(&file)?;
    line("verifier", format!("{} at {}", text(&written["name"]), text(&deployed["verifier"])));
    line("program", text(&written["program"]));
    Ok(text(&written["program"]).to_owned())
}

fn job(client: &Place, bootstrap: &[&str], program: &str) -> Told<()> {
    let began = Instant::now();
    let proof = format!("{STATEMENT}:{program}");
    let post =
        ["job", "post", "--json", "--model", "tiny-chat", "--max", MOST, "--temperature", "0", "--wait", "--proof", &proof];
    let posted = client.run(&[&post[..], bootstrap, &QUESTIONS[..1]].concat());
    if posted.code != 0 {
        return Err(format!("the job was not worked: {posted:#?}"));
    }
    let posted = posted.json();
    line("posted", format!("job {}, {}", posted["id"], receipt(&posted["order"])));
    line("answered", text(&posted["output"]["text"]).trim());
    line(
        "result",
        format!(
            "{} tokens read, {} generated, {}",
            posted["result"]["input_tokens"],
            posted["result"]["output_tokens"],
            text(&posted["result"]["result_ref"])
        ),
    );
    let id = text(&posted["result"]["output_commitment"]).trim_start_matches("0x");
    let stored = client.ran(&["storage", "get", id]).out;
    line("on S5", format!("{} bytes under {id}", stored.len()));
    line("proven", text(&posted["proof_says"]));
    line("time", format!("{:.1} s from the order to the proven result", began.elapsed().as_secs_f64()));
    let accepted = client.ran(&["job", "accept", &posted["id"].to_string(), "--json"]).json();
    line("accepted", receipt(&accepted["order"]));
    let division = &accepted["division"];
    line("divided", format!("{} to the node, {} back", eth(wei(&division["to_host"])?), eth(wei(&division["to_client"])?)));
    Ok(())
}

/// The proof of the job as the chain has it, checked by its contract; then with one bit of it turned.
async fn tampered(chain: &DevChain, program: &str) -> Told<()> {
    let submitted = transactions(chain, 0).await?.into_iter().find(|sent| sent.what == "submitProof");
    let hash = submitted.ok_or("no proof was handed in")?.hash;
    let sent = chain.ask("eth_getTransactionByHash", json!([hash])).await?;
    // After the selector: the job, where the two texts begin, and each with its length. A verifier takes the same with the program in place
    // of the job.
    let input = hex::decode(text(&sent["input"]).trim_start_matches("0x")).map_err(|error| error.to_string())?;
    let texts = input.get(4 + 32..).ok_or("a proof was handed in that is none")?;
    let program = program.trim_start_matches("0x");
    let proofs = text(&chain.config()["contracts"]["proofs"]).to_owned();
    let named = json!([{ "to": proofs, "data": format!("0x{VERIFIER_OF}{:064x}{program}", 1) }, "latest"]);
    let verifier = chain.ask("eth_call", named).await?;
    let verifier = text(&verifier).get(26..).ok_or("no verifier is named")?.to_owned();
    let holds = async |texts: &[u8]| {
        let data = format!("0x{VERIFY}{program}{}", hex::encode(texts));
        let answer = chain.ask("eth_call", json!([{ "to": format!("0x{verifier}"), "data": data }, "latest"])).await;
        answer.is_ok_and(|answer| text(&answer).ends_with('1'))
    };
    let mut changed = texts.to_vec();
    *changed.last_mut().ok_or("a proof was handed in that is none")? ^= 1;
    match (holds(texts).await, holds(&changed).await) {
        (true, false) => {
            line("tampered", "the contract accepts the proof, and refuses it with one bit turned");
            Ok(())
        }
        (whole, turned) => Err(format!("the contract says {whole} to the proof and {turned} to one that was tampered with")),
    }
}

/// Asks a node twice at its own port: the second answer comes from its cache.
async fn again(node: &Provider) -> Told<()> {
    let mut question = chat("tiny-chat", QUESTIONS[0]);
    question["temperature"] = json!(0);
    let client = reqwest::Client::builder().no_proxy().build().map_err(|error| error.to_string())?;
    for expected in ["miss", "hit; layer=exact"] {
        let began = Instant::now();
        let asked = client.post(format!("{}/v1/chat/completions", node.node.url)).json(&question).send().await;
        let reply = asked.map_err(|error| error.to_string())?;
        let told = reply.headers().get("x-cache").and_then(|told| told.to_str().ok()).unwrap_or("nothing").to_owned();
        let answer: Value = reply.json().await.map_err(|error| error.to_string())?;
        let took = began.elapsed().as_secs_f64() * 1e3;
        line(
            "answered",
            format!("{} in {took:.1} ms, x-cache: {told}", text(&answer["choices"][0]["message"]["content"]).trim()),
        );
        if !told.starts_with(expected) {
            return Err(format!("the answer tells {told} of the cache, and not {expected}"));
        }
    }
    Ok(())
}

/// What the nodes were paid, as the client and the nodes tell it: they have to agree.
async fn receipts(client: &Place, nodes: &[Provider; 2]) -> Told<u128> {
    let purchases = client.ran(&["purchases", "--json"]).json();
    let mut paid = 0;
    for bought in purchases["purchases"].as_array().into_iter().flatten() {
        paid += wei(&bought["to_host"]).map_err(|_| format!("a session is not over: {bought:#}"))?;
    }
    let jobs = client.ran(&["job", "status", "1", "--json"]).json();
    paid += wei(&jobs["division"]["to_host"])?;
    let mut earned = 0;
    for (at, node) in nodes.iter().enumerate() {
        let told = eventually("the node knows of its pay", LIMIT, async || {
            let told = earnings(node);
            (wei(&told["outstanding"]) == Ok(0)).then_some(told)
        })
        .await;
        line(&format!("node {} earned", at + 1), eth(wei(&told["earned"])?));
        earned += wei(&told["earned"])?;
    }
    line("client paid", eth(paid));
    match paid == earned {
        true => Ok(paid),
        false => Err(format!("the client tells of {paid} wei, and the nodes of {earned}")),
    }
}

fn earnings(node: &Provider) -> Value {
    node.node.place.ran(&["earnings", "--json"]).json()
}

/// Compares every account with what it had: payments and the fees of its own transactions are all that may have changed it.
async fn adds_up(chain: &DevChain, block: u64, before: &[u128], places: [&Place; 4], paid: u128) -> Told<()> {
    let sent = transactions(chain, block).await?;
    let accounts = [("client", CLIENT), ("payout", PAYOUT), ("node 1", NODE), ("node 2", OTHER_NODE)];
    println!();
    for Sent { block, from, what, hash, fee } in &sent {
        let name = accounts.iter().find(|(_, account)| same(account, from)).map_or("owner", |(name, _)| name);
        println!("  block {block:<3} {name:<7} {what:<15} fee {:<24} {hash}", eth(*fee));
    }
    println!("\n  {:<7} {:>27} {:>27} {:>27} {:>25}", "", "before", "after", "paid or earned", "fees");
    for (((name, account), before), place) in accounts.iter().zip(before).zip(places) {
        let (after, moved) = (total(place)?, if *name == "client" || *name == "payout" { paid } else { 0 });
        let fees: u128 = sent.iter().filter(|sent| same(account, &sent.from)).map(|sent| sent.fee).sum();
        let (expected, sign) = match *name {
            "client" => (before - moved - fees, "-"),
            _ => (before + moved - fees, ""),
        };
        println!("  {name:<7} {:>27} {:>27} {:>27} {:>25}", eth(*before), eth(after), format!("{sign}{}", eth(moved)), eth(fees));
        if after != expected {
            return Err(format!("{name} should have {expected} wei, and has {after}"));
        }
    }
    Ok(())
}

fn same(account: &Account, address: &str) -> bool {
    account.address.eq_ignore_ascii_case(address)
}

/// Everything that is an account's: coin, credit and stake.
fn total(place: &Place) -> Told<u128> {
    let balances = &place.ran(&["market", "status", "--json"]).json()["balances"];
    ["coin", "credit", "returned", "stake"].iter().map(|name| wei(&balances[*name])).sum()
}

/// A transaction that an account has sent.
struct Sent {
    block: u64,
    from: String,
    what: String,
    hash: String,
    fee: u128,
}

/// Every transaction after a block, and what it has cost, as the chain itself tells it.
async fn transactions(chain: &DevChain, after: u64) -> Told<Vec<Sent>> {
    let latest = number(&chain.ask("eth_blockNumber", json!([])).await?)?;
    let mut sent = Vec::new();
    for block in after + 1..=latest {
        let found = chain.ask("eth_getBlockByNumber", json!([format!("0x{block:x}"), true])).await?;
        for transaction in found["transactions"].as_array().into_iter().flatten() {
            let receipt = chain.ask("eth_getTransactionReceipt", json!([transaction["hash"]])).await?;
            let fee = u128::from(number(&receipt["gasUsed"])?) * u128::from(number(&receipt["effectiveGasPrice"])?);
            let refused = if receipt["status"] == "0x1" { "" } else { ", refused" };
            sent.push(Sent {
                block,
                from: text(&transaction["from"]).to_owned(),
                what: format!("{}{refused}", called(text(&transaction["input"]))),
                hash: text(&transaction["hash"]).to_owned(),
                fee,
            });
        }
    }
    Ok(sent)
}

/// The contract's function that a transaction calls: its input begins with 4 bytes of the Keccak-256 hash of the function's signature.
fn called(input: &str) -> &str {
    let names = [
        ("0xa14bf389", "register"),
        ("0xbe8ae42f", "openSession"),
        ("0x9f6f687a", "topUp"),
        ("0x7cdac3c9", "settle"),
        ("0xe0c89833", "settleAndClose"),
        ("0x3ade240b", "closeSession"),
        ("0x10ff8628", "finalizeSession"),
        ("0xcb50ea47", "postJob"),
        ("0xe3e4b9fb", "claimJob"),
        ("0x953fb676", "abandonJob"),
        ("0x1ed88784", "submitResult"),
        ("0x796fd7f9", "submitProof"),
        ("0x34295bfa", "setVerifier"),
        ("0x172257c7", "acceptResult"),
        ("0xbf81bf43", "expire"),
        ("0xf940e385", "withdraw"),
    ];
    // What begins otherwise, and is long, deploys a contract.
    let selector = input.get(..10).unwrap_or(input);
    names.iter().find(|(of, _)| *of == selector).map_or(selector, |(_, name)| name)
}

impl Stage {
    /// How to go on with it.
    fn tell(&self) {
        let Self { chain, nodes, client, .. } = self;
        let (program, folder) = (artifact("fabstir-node"), client.path());
        println!("\nIt stays up until Ctrl-C.\n");
        line("chain", text(&chain.config()["rpc"][0]));
        for (at, node) in nodes.iter().enumerate() {
            line(
                &format!("node {}", at + 1),
                format!("{} for OpenAI clients, files in {}", node.node.url, node.node.place.path().display()),
            );
        }
        println!("\n  cd {}", folder.display());
        let bootstrap = &nodes[0].address;
        for command in [
            format!("job post --model tiny-chat --max {MOST} --bootstrap {bootstrap} --wait \"{}\"", QUESTIONS[0]),
            format!("connect --model tiny-chat --max-spend {MOST} --bootstrap {bootstrap}"),
            "purchases".into(),
            "market status".into(),
        ] {
            println!("  {} {command}", program.display());
        }
    }

    /// Ends it in order.
    async fn end(self) {
        for mut node in self.nodes {
            node.node.signal(libc::SIGTERM);
            node.node.exit(LIMIT).await;
        }
    }
}

fn step(what: &str) {
    println!("\n{what}");
}

fn line(name: &str, what: impl Display) {
    println!("  {name:<10} {what}");
}

fn receipt(order: &Value) -> String {
    let fee = wei(&order["fee"]).map_or("?".into(), eth);
    format!("block {}, fee {fee}, {}", order["block"], text(&order["transaction"]))
}

fn eth(wei: u128) -> String {
    coins(Amount(wei), "ETH")
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

/// An amount, as the command line tells it.
fn wei(value: &Value) -> Told<u128> {
    let digits = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    digits.parse().map_err(|_| format!("{value} is no amount"))
}

/// A number, as a chain tells it.
fn number(value: &Value) -> Told<u64> {
    let digits = value.as_str().and_then(|text| text.strip_prefix("0x"));
    digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).ok_or_else(|| format!("{value} is no number of a chain"))
}
