//! Paid sessions, against clients that do not play by the rules: the shipped binary with the real plugins on a development chain.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use fabstir_host::market::journal::{self, sessions};
use fabstir_host::market::transcript;
use fabstir_host::network::session::wire::Ask;
use fabstir_plugin_api::chain::{Account, Act, Amount, Session, SessionState, Sure, Voucher};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::Code;
use fabstir_tests::dev_chain::DevChain;
use fabstir_tests::market::{self, CLIENT, NODE, OTHER_CLIENT};
use fabstir_tests::payer::{Offered, Payer, Talk};
use fabstir_tests::peers::Provider;
use fabstir_tests::{LIMIT, Node, eventually};

const ECHO: &str = "[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nconfig = { delay_ms = 1 }\n";
const DEPOSIT: u128 = 9_000_000_000_000_000;

fn cx() -> Cx {
    Cx::new().with_timeout(LIMIT)
}

fn words(count: usize) -> String {
    "word ".repeat(count).trim_end().to_owned()
}

/// The voucher that pays for this many tokens in all.
fn voucher(first: &Voucher, offered: &Offered, input_tokens: u64, output_tokens: u64) -> Voucher {
    Voucher { amount: offered.prices().of(input_tokens, output_tokens), input_tokens, output_tokens, ..first.clone() }
}

/// What the node's journal has of a session.
fn kept(node: &Node, id: &str) -> Option<sessions::SessionRow> {
    let connection = journal::look(&node.place.path().join("data")).expect("the journal opens")?;
    sessions::get(&connection, &id.to_owned()).expect("the journal reads")
}

async fn paid(payer: &Payer, account: Account) -> u128 {
    payer.desk.chain.balances(&cx(), account).await.expect("balances").credit.0
}

/// The session, once the contract has settled it.
async fn settled(payer: &Payer, id: &str, limit: Duration) -> Session {
    eventually("the session is settled", limit, async || {
        let session = payer.desk.chain.session(&cx(), id.to_owned(), Sure::Latest).await.ok()?;
        (session.state == SessionState::Settled).then_some(session)
    })
    .await
}

/// A node that is paid, and a client in conversation with it.
async fn paid_node(chain: &DevChain, market: &str) -> (Provider, Payer, Talk) {
    let provider = market::node(chain, NODE, market, ECHO).await;
    let payer = Payer::start(chain, CLIENT).await;
    let talk = payer.talk(&provider.address).await;
    (provider, payer, talk)
}

/// Tokens that a prompt of so many of [`words`] counts as until the answer's end.
fn prompt_tokens(words: usize) -> u64 {
    (words * 5 - 1).div_ceil(4) as u64 + 4
}

/// Pays as an honest client does, until the answer's end or until nothing more comes. Returns what has arrived, and the last voucher.
async fn pay_as_it_comes(
    payer: &Payer,
    talk: &mut Talk,
    offered: &Offered,
    first: &Voucher,
    count: usize,
    mut stop: impl FnMut(u64) -> bool,
) -> (u64, Voucher) {
    let (id, mut heard) = talk.ask("echo", &words(count), Some(&first.session)).await;
    let mut last = first.clone();
    while talk.read(id, &mut heard, LIMIT).await {
        let better = voucher(first, offered, prompt_tokens(count), heard.output_tokens);
        if better.amount.0 - last.amount.0 >= offered.credit.0 / 4 {
            let signature = payer.sign(&better).await;
            last = better.clone();
            talk.say(&Ask::Pay { voucher: Box::new(better), signature, answers: vec![] }).await;
        }
        if stop(heard.output_tokens) {
            break;
        }
    }
    (heard.output_tokens, last)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paid_session_is_two_transactions_and_every_wei_is_accounted_for() {
    let chain = DevChain::start().expect("a chain");
    let (provider, payer, mut talk) = paid_node(&chain, "").await;
    let before =
        (payer.desk.chain.heads(&cx()).await.expect("heads").latest.number, paid(&payer, market::PAYOUT.address.into()).await);

    let (offered, first) = payer.session(&mut talk, "echo", DEPOSIT).await;
    let (output_tokens, _) = pay_as_it_comes(&payer, &mut talk, &offered, &first, 600, |_| false).await;
    assert_eq!(output_tokens, 600);
    let last = voucher(&first, &offered, 800, output_tokens);
    assert_eq!(talk.pay(&last, payer.sign(&last).await).await, None);
    assert_eq!(kept(&provider.node, &first.session).expect("is kept").voucher, last);

    let id = talk.id();
    talk.say(&Ask::Settle { id, paid_by: first.session.clone() }).await;
    talk.about(id).await;
    let session = settled(&payer, &first.session, LIMIT).await;
    assert_eq!(session.paid, last.amount);
    assert_eq!(paid(&payer, market::PAYOUT.address.into()).await - before.1, last.amount.0, "the payout account has it");
    assert_eq!(paid(&payer, payer.desk.account.clone()).await, DEPOSIT - last.amount.0, "and the client the rest");
    let blocks = payer.desk.chain.heads(&cx()).await.expect("heads").latest.number - before.0;
    assert_eq!(blocks, 2, "this chain makes a block for each transaction");
    eventually("the journal says so", LIMIT, async || {
        let row = kept(&provider.node, &first.session)?;
        (row.state == sessions::SessionState::Settled && row.paid == Some(last.amount)).then_some(())
    })
    .await;
    // Over means over.
    let refused = payer.fund(&mut talk, &offered, &first).await.expect_err("is settled");
    assert!(refused.message.contains("closed"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn vouchers_that_promise_nothing_are_not_taken() {
    let chain = DevChain::start().expect("a chain");
    let provider = market::node(&chain, NODE, "", ECHO).await;
    let payer = Payer::start(&chain, CLIENT).await;
    let stranger = Payer::start(&chain, OTHER_CLIENT).await;
    let mut talk = payer.talk(&provider.address).await;
    let (offered, first) = payer.session(&mut talk, "echo", DEPOSIT).await;

    let good = voucher(&first, &offered, 100, 100);
    let cases = [
        ("of another account", good.clone(), stranger.sign(&good).await, "not signed by the client"),
        ("for another contract", good.clone(), payer.sign_for_elsewhere(&good).await, "not signed by the client"),
        ("for another host", Voucher { host: stranger.desk.account.clone(), ..good.clone() }, vec![], "another host"),
        ("above the deposit", Voucher { amount: Amount(DEPOSIT + 1), ..good.clone() }, vec![], "the deposit is"),
        ("without a signature", good.clone(), vec![], "signature"),
        ("with a damaged one", good.clone(), vec![7; 65], "sign"),
    ];
    for (what, voucher, signature, expected) in cases {
        let signature = if signature.is_empty() && what.starts_with("for") { payer.sign(&voucher).await } else { signature };
        let why = talk.pay(&voucher, signature).await.unwrap_or_else(|| panic!("a voucher {what} was taken"));
        assert!(why.message.contains(expected), "{what}: {why}");
        assert_eq!(kept(&provider.node, &first.session).expect("is kept").voucher, first, "{what}");
    }
    let elsewhere = Voucher { session: transcript::nothing(), ..good.clone() };
    let why = talk.pay(&elsewhere, payer.sign(&elsewhere).await).await.expect("is for no session");
    assert_eq!(why.code, Code::NotFound);

    assert_eq!(talk.pay(&good, payer.sign(&good).await).await, None);
    assert_eq!(talk.pay(&good, payer.sign(&good).await).await, None, "a replay changes nothing");
    let delta = voucher(&first, &offered, 10, 10);
    let why = talk.pay(&delta, payer.sign(&delta).await).await.expect("promises less");
    assert!(why.message.contains("since the beginning"), "{why}");
    assert_eq!(kept(&provider.node, &first.session).expect("is kept").voucher, good);

    // Another peer cannot speak in the session, whatever it has heard.
    let mut theirs = stranger.talk(&provider.address).await;
    assert_eq!(theirs.pay(&good, payer.sign(&good).await).await.expect("is a stranger").code, Code::NotFound);
    let stolen = stranger.fund_with(&mut theirs, &offered, transcript::nothing(), &first, payer.sign(&first).await).await;
    assert!(stolen.expect_err("is bound to another peer").message.contains("two peers"));
    let (id, mut heard) = theirs.ask("echo", "free", Some(&first.session)).await;
    assert!(!theirs.read(id, &mut heard, LIMIT).await);
    assert_eq!(heard.end.expect("ends").expect_err("is refused").code, Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_delivered_for_a_deposit_that_is_not_there() {
    let chain = DevChain::start().expect("a chain");
    let (_provider, payer, mut talk) = paid_node(&chain, "sure_above_wei = 10_000_000_000_000_000\n").await;

    // Without a session there is a price, and no answer.
    let (id, mut heard) = talk.ask("echo", "free", None).await;
    assert!(!talk.read(id, &mut heard, LIMIT).await);
    let refused = heard.end.expect("ends").expect_err("is refused");
    assert_eq!(refused.code, Code::Denied);
    assert!(refused.message.contains("4000000000000000000 for a million generated"), "{refused}");
    assert_eq!(payer.offer(&mut talk, "another").await.expect_err("is not served").code, Code::NotFound);

    let offered = payer.offer(&mut talk, "echo").await.expect("an offer");
    let first = payer.first(&talk, &offered).await;
    let unseen = payer.fund(&mut talk, &offered, &first).await.expect_err("is not on the chain");
    assert_eq!(unseen.code, Code::Unavailable, "{unseen}");
    assert!(unseen.retry_after_ms.is_some());

    // Terms of the client's own making.
    let mut cheap = offered.clone();
    cheap.terms.price_output_per_mtok = Amount(1);
    let cheap_first = payer.first(&talk, &cheap).await;
    let refused = payer.fund(&mut talk, &cheap, &cheap_first).await.expect_err("was not offered");
    assert!(refused.message.contains("not offered"), "{refused}");

    // A deposit that is large has to be safe, which takes this chain some blocks.
    payer.deposit(&offered, 10 * DEPOSIT).await;
    let early = payer.fund(&mut talk, &offered, &first).await.expect_err("is not safe yet");
    assert_eq!(early.code, Code::Unavailable);
    assert!(early.message.contains("safe"), "{early}");
    chain.mine(100).await;
    eventually("the deposit is safe", LIMIT, async || payer.fund(&mut talk, &offered, &first).await.ok()).await;

    // A client that closes its session gets nothing more in it.
    let small = payer.offer(&mut talk, "echo").await.expect("an offer");
    let id = payer.deposit(&small, DEPOSIT).await;
    payer.desk.follow("close".into(), Act::CloseSession { session: id }, LIMIT).await.expect("closes");
    let small_first = payer.first(&talk, &small).await;
    let closed = payer.fund(&mut talk, &small, &small_first).await.expect_err("is closed");
    assert!(closed.message.contains("closed on the chain"), "{closed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_cannot_be_asked_is_no_reason_to_believe_a_client() {
    let mut chain = DevChain::start().expect("a chain");
    let (_provider, payer, mut talk) = paid_node(&chain, "").await;
    let offered = payer.offer(&mut talk, "echo").await.expect("an offer");
    payer.deposit(&offered, DEPOSIT).await;
    let first = payer.first(&talk, &offered).await;
    chain.pause();
    let refused = payer.fund(&mut talk, &offered, &first).await.expect_err("cannot be checked");
    assert!(matches!(refused.code, Code::Unavailable | Code::DeadlineExceeded), "{refused:?}");
    let (id, mut heard) = talk.ask("echo", "free", Some(&first.session)).await;
    assert!(!talk.read(id, &mut heard, LIMIT).await);
    assert!(heard.end.expect("ends").is_err());
    chain.resume();
    eventually("the chain is asked again", LIMIT, async || payer.fund(&mut talk, &offered, &first).await.ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_pay_gets_the_credit_and_one_prompt() {
    let chain = DevChain::start().expect("a chain");
    let (provider, payer, mut talk) = paid_node(&chain, "credit_tokens = 64\nvoucher_timeout_s = 1\n").await;
    let (offered, first) = payer.session(&mut talk, "echo", DEPOSIT).await;
    let (id, mut heard) = talk.ask("echo", &words(500), Some(&first.session)).await;
    while talk.read(id, &mut heard, LIMIT).await {}
    let refused = heard.end.expect("ends").expect_err("is cut off");
    assert_eq!(refused.code, Code::DeadlineExceeded, "{refused}");
    assert!(heard.output_tokens <= 64, "{} tokens", heard.output_tokens);
    // What it took along is what the operator is told.
    let exposed = eventually("earnings tell what is exposed", LIMIT, async || {
        let told = provider.node.place.ran(&["earnings", "--json"]).json()["sessions"]["exposed"].clone();
        (told["count"] == 1).then_some(told)
    })
    .await;
    let taken = offered.prices().of(prompt_tokens(500), heard.output_tokens);
    assert_eq!(exposed["amount"], taken.to_string(), "{exposed}");
    // And a second request does not begin.
    let (id, mut heard) = talk.ask("echo", "more", Some(&first.session)).await;
    while talk.read(id, &mut heard, LIMIT).await {}
    assert_eq!(heard.output_tokens, 0);
    assert!(heard.end.expect("ends").is_err());
    // Once it pays, it is served again.
    let due = voucher(&first, &offered, 700, 64);
    assert_eq!(talk.pay(&due, payer.sign(&due).await).await, None);
    let (id, mut heard) = talk.ask("echo", "a b c", Some(&first.session)).await;
    while talk.read(id, &mut heard, LIMIT).await {}
    assert_eq!(heard.output_tokens, 3, "{heard:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_gone_is_settled_after_a_while_with_its_last_voucher() {
    let chain = DevChain::start().expect("a chain");
    let (_provider, payer, mut talk) = paid_node(&chain, "idle_settle_s = 1\n").await;
    let (offered, first) = payer.session(&mut talk, "echo", DEPOSIT).await;
    let last = voucher(&first, &offered, 300, 200);
    assert_eq!(talk.pay(&last, payer.sign(&last).await).await, None);
    drop(talk);
    // It is looked at every 15 s.
    let session = settled(&payer, &first.session, 2 * LIMIT).await;
    assert_eq!(session.paid, last.amount);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_closes_early_still_pays_its_last_voucher() {
    let chain = DevChain::start().expect("a chain");
    let (_provider, payer, mut talk) = paid_node(&chain, "settle_window_s = 30\n").await;
    let (offered, first) = payer.session(&mut talk, "echo", DEPOSIT).await;
    let last = voucher(&first, &offered, 300, 200);
    assert_eq!(talk.pay(&last, payer.sign(&last).await).await, None);
    payer.desk.follow("close".into(), Act::CloseSession { session: first.session.clone() }, LIMIT).await.expect("closes");
    let session = settled(&payer, &first.session, 2 * LIMIT).await;
    assert_eq!(session.paid, last.amount);
}

/// Fifty times the node is killed between tokens that it has given out and the voucher for them. What is lost is never more than the credit,
/// and what was promised is paid in the end, once.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_node_loses_at_most_the_credit() {
    const RUNS: usize = 50;
    const CREDIT: u64 = 64;
    let chain = DevChain::start().expect("a chain");
    let mut provider = market::node(&chain, NODE, &format!("credit_tokens = {CREDIT}\nidle_settle_s = 2\n"), ECHO).await;
    let payer = Payer::start(&chain, CLIENT).await;
    let before = paid(&payer, market::PAYOUT.address.into()).await;
    let (mut sessions, mut most_lost, mut credit) = (HashSet::new(), 0, 0);
    for run in 0..RUNS {
        let mut talk = payer.talk(&provider.address).await;
        let (offered, first) = payer.session(&mut talk, "echo", DEPOSIT).await;
        let kill_at = 5 + (run as u64 * 37) % 240;
        let pid = provider.node.pid();
        let kill = |tokens: u64| {
            let now = tokens >= kill_at;
            if now {
                // SAFETY: a system call without pointers, on a process that this test has started and not waited for.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            now
        };
        let (received, signed) = pay_as_it_comes(&payer, &mut talk, &offered, &first, 400, kill).await;
        assert!(received >= kill_at, "run {run}: only {received} tokens came");
        let stored = kept(&provider.node, &first.session).expect("is kept").voucher;
        assert!(stored.amount <= signed.amount, "run {run}: more is kept than was signed");
        let lost = offered.prices().of(prompt_tokens(400), received).0 - stored.amount.0;
        let prompt = if stored.amount.0 == 0 { offered.prices().of(prompt_tokens(400), 1).0 } else { 0 };
        most_lost = most_lost.max(lost.saturating_sub(prompt));
        assert!(lost <= offered.credit.0.max(prompt), "run {run}: {lost} wei of {received} tokens were given out for nothing");
        credit = offered.credit.0;
        if stored.amount.0 > 0 {
            sessions.insert(first.session.clone());
        }
        let node = provider.node.relaunch(&[]);
        node.healthy().await;
        node.serves("echo").await;
        eventually("the node is back at its desk", LIMIT, async || {
            let log = node.log();
            let times = |line: &str| log.matches(line).count() == run + 2;
            (times("Acting in the market.") && times("Joined the network.")).then_some(())
        })
        .await;
        provider = Provider::of(node).await;
    }
    println!(
        "{RUNS} kills: at most {most_lost} wei were lost, the credit is {credit}; {} sessions had a voucher",
        sessions.len()
    );
    assert!(sessions.len() > RUNS / 2, "most kills come after a voucher");
    let began = Instant::now();
    // Looked at now: a node that is being killed may still have kept one voucher more.
    let owed: u128 = sessions.iter().map(|session| kept(&provider.node, session).expect("is kept").voucher.amount.0).sum();
    // Many at once make the next blocks dearer, and a chain that makes none by itself lets the rest wait until more is offered.
    eventually("all that was promised is paid", Duration::from_secs(180), async || {
        (paid(&payer, market::PAYOUT.address.into()).await - before == owed).then_some(())
    })
    .await;
    println!("all of it was settled within {:?}", began.elapsed());
    for session in &sessions {
        let on_chain = payer.desk.chain.session(&cx(), session.clone(), Sure::Latest).await.expect("a session");
        assert_eq!(on_chain.state, SessionState::Settled);
        assert_eq!(on_chain.paid, kept(&provider.node, session).expect("is kept").voucher.amount);
    }
}

/// Ends a session as its client does, and waits until the contract has paid the last voucher.
async fn settle_and_see(payer: &Payer, talk: &mut Talk, last: &Voucher) {
    let id = talk.id();
    talk.say(&Ask::Settle { id, paid_by: last.session.clone() }).await;
    talk.about(id).await;
    let session = settled(payer, &last.session, 2 * LIMIT).await;
    assert_eq!(session.paid, last.amount);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_delivery_and_loses_no_voucher() {
    let chain = DevChain::start().expect("a chain");
    let place = market::node_place(&chain, NODE, "voucher_timeout_s = 2\ncredit_tokens = 64\n", ECHO);
    // A disk with room for some vouchers: the journal alone is on it.
    let disk = place.path().join("data/market");
    std::fs::create_dir_all(&disk).expect("a folder can be made");
    let mount = |arguments: &[&str]| {
        let done = std::process::Command::new("mount").args(arguments).arg(&disk).status().expect("mount can be started");
        assert!(done.success(), "a small disk can be mounted: this test needs root");
    };
    mount(&["-t", "tmpfs", "-o", "size=256k", "tmpfs"]);
    let mounted = Mounted(disk.clone());
    let node = Node::launch(place, &[]);
    node.healthy().await;
    node.logged(&["Acting in the market."]).await;
    let provider = Provider::of(node).await;
    let payer = Payer::start(&chain, CLIENT).await;
    let mut talk = payer.talk(&provider.address).await;
    let (offered, first) = payer.session(&mut talk, "echo", DEPOSIT).await;

    let (mut output_tokens, mut refused) = (0, None);
    for _ in 0..500 {
        output_tokens += 1;
        let better = voucher(&first, &offered, 0, output_tokens);
        refused = talk.pay(&better, payer.sign(&better).await).await;
        if refused.is_some() {
            break;
        }
    }
    let refused = refused.expect("the disk is full at some time");
    assert_eq!(refused.code, Code::Full, "{refused:?}");
    assert!(refused.message.contains("disk is full"), "{refused}");
    println!("the disk was full at voucher {output_tokens}");
    let stored = kept(&provider.node, &first.session).expect("is kept").voucher;
    assert_eq!(stored.output_tokens, output_tokens - 1, "what was taken is on disk, and nothing else");

    // What the node cannot keep does not count: it delivers no more than its credit on top of what it has kept.
    let (id, mut heard) = talk.ask("echo", &words(300), Some(&first.session)).await;
    while talk.read(id, &mut heard, LIMIT).await {
        let better = voucher(&first, &offered, prompt_tokens(300), output_tokens + heard.output_tokens);
        let signature = payer.sign(&better).await;
        talk.say(&Ask::Pay { voucher: Box::new(better), signature, answers: vec![] }).await;
    }
    assert!(heard.end.as_ref().is_some_and(Result::is_err), "{heard:?}");
    assert!(heard.output_tokens <= 64, "{} tokens were given out for vouchers that are nowhere", heard.output_tokens);

    // With room it goes on, in the same session.
    mount(&["-o", "remount,size=16m"]);
    let last = voucher(&first, &offered, prompt_tokens(300), output_tokens + heard.output_tokens);
    assert_eq!(talk.pay(&last, payer.sign(&last).await).await, None);
    assert_eq!(kept(&provider.node, &first.session).expect("is kept").voucher, last);
    settle_and_see(&payer, &mut talk, &last).await;
    drop(provider);
    drop(mounted);
}

/// A small disk, taken away at the end of its test.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a node that was killed may hold a file of it for a moment.
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_are_taken_back_change_nothing_about_what_is_paid() {
    let chain = DevChain::start().expect("a chain");
    let provider = market::node(&chain, NODE, "settle_window_s = 30\n", ECHO).await;
    let payer = Payer::start(&chain, CLIENT).await;
    let before = paid(&payer, market::PAYOUT.address.into()).await;
    chain.mine(80).await;
    let mut owed = 0;
    for depth in [1, 7, 64] {
        let mut talk = payer.talk(&provider.address).await;
        let (offered, first) = payer.session(&mut talk, "echo", DEPOSIT).await;
        let last = voucher(&first, &offered, 200, 100);
        assert_eq!(talk.pay(&last, payer.sign(&last).await).await, None);
        chain.mine(depth - 1).await;
        // The deposit is in the deepest of the blocks that go.
        chain.ask("anvil_reorg", serde_json::json!([depth, []])).await.expect("blocks are taken back");
        settle_and_see(&payer, &mut talk, &last).await;
        owed += last.amount.0;
        // And the settlement itself: it comes again.
        chain.mine(depth - 1).await;
        chain.ask("anvil_reorg", serde_json::json!([depth, []])).await.expect("blocks are taken back");
        assert_eq!(settled(&payer, &first.session, 2 * LIMIT).await.paid, last.amount, "the settlement is there again");
        println!("depth {depth}: both were taken back, and both came again");
    }
    assert_eq!(paid(&payer, market::PAYOUT.address.into()).await - before, owed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_that_the_pool_forgets_or_that_is_too_cheap_is_sent_again() {
    let chain = DevChain::start().expect("a chain");
    let (_provider, payer, mut talk) = paid_node(&chain, "").await;
    let (offered, first) = payer.session(&mut talk, "echo", DEPOSIT).await;
    let last = voucher(&first, &offered, 300, 900);
    assert_eq!(talk.pay(&last, payer.sign(&last).await).await, None);

    let pending = async || {
        let content = chain.ask("txpool_status", serde_json::json!([])).await.expect("the pool answers");
        content["pending"].as_str() != Some("0x0")
    };
    chain.ask("evm_setAutomine", serde_json::json!([false])).await.expect("no block comes by itself");
    let id = talk.id();
    talk.say(&Ask::Settle { id, paid_by: first.session.clone() }).await;
    talk.about(id).await;
    eventually("the settlement is in the pool", LIMIT, async || pending().await.then_some(())).await;
    chain.ask("anvil_dropAllTransactions", serde_json::json!([])).await.expect("the pool forgets");
    eventually("it is in the pool again", 2 * LIMIT, async || pending().await.then_some(())).await;
    // Now the chain becomes dearer than it was offered for.
    let dear = serde_json::json!(["0x4a817c800"]);
    chain.ask("anvil_setNextBlockBaseFeePerGas", dear).await.expect("the next block is dear");
    chain.mine(1).await;
    let nonce = |what: &str| chain.ask("eth_getTransactionCount", serde_json::json!([NODE.address, what]));
    let before = nonce("latest").await.expect("a count");
    chain.ask("evm_setAutomine", serde_json::json!([true])).await.expect("blocks come by themselves");
    let session = eventually("the session is settled", 3 * LIMIT, async || {
        chain.mine(1).await;
        let session = payer.desk.chain.session(&cx(), first.session.clone(), Sure::Latest).await.ok()?;
        (session.state == SessionState::Settled).then_some(session)
    })
    .await;
    assert_eq!(session.paid, last.amount);
    let after = nonce("latest").await.expect("a count");
    println!("the node's count of transactions went from {before} to {after}");
    assert_eq!(nonce("pending").await.expect("a count"), after, "nothing is left in the pool");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_starts_without_its_chain_and_is_paid_once_it_is_there() {
    let mut chain = DevChain::start().expect("a chain");
    let place = market::node_place(&chain, NODE, "", ECHO);
    let payer = Payer::start(&chain, CLIENT).await;
    chain.pause();
    let node = Node::launch(place, &[]);
    node.healthy().await;
    let provider = Provider::of(node).await;
    let mut talk = payer.talk(&provider.address).await;
    let (id, mut heard) = talk.ask("echo", "free", None).await;
    assert!(!talk.read(id, &mut heard, LIMIT).await);
    assert!(heard.end.expect("ends").is_err(), "nothing is free because the chain is away");
    chain.resume();
    provider.node.logged(&["Acting in the market."]).await;
    let (offered, first) = payer.session(&mut talk, "echo", DEPOSIT).await;
    let (output_tokens, _) = pay_as_it_comes(&payer, &mut talk, &offered, &first, 100, |_| false).await;
    assert_eq!(output_tokens, 100);
}
