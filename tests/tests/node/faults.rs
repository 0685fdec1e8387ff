//! Plugins that break while they work, and a node that must not.

use std::time::{Duration, Instant};

use fabstir_tests::process::{gone, send};
use fabstir_tests::{LIMIT, Node, Place, Told, chat, eventually};

const ECHO: &str = "[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\nconfig = { delay_ms = 20 }\n";

fn faulty(keys: &str, config: &str) -> String {
    format!("{ECHO}[[plugin]]\nid = 'faulty'\nuse = 'inference-faulty'\n{keys}\n[plugin.config]\n{config}\n")
}

async fn both(config: &str) -> Node {
    let node = Node::start(config).await;
    node.serves("echo").await;
    node.serves("faulty").await;
    node
}

/// A stream of words from echo that lasts about as many times 20 ms.
async fn bystander(node: &Node, words: usize) -> impl Future<Output = ()> + use<> {
    let events = node.stream(chat("echo", &"word ".repeat(words))).await;
    async move {
        let told = events.rest().await;
        assert!(told.is_whole() && told.pieces == words, "a request to another plugin was disturbed: {told:?}");
    }
}

/// What is left to a stream whose plugin broke: its text so far, and an error.
#[track_caller]
fn broke_off(told: &Told, text: &str) {
    let error = told.error.as_ref().unwrap_or_else(|| panic!("no error in {told:?}"));
    assert_eq!(told.text, text, "{told:?}");
    assert!(error["message"].is_string() && error["type"].is_string() && told.finish.is_none(), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_ends_what_had_begun_and_nothing_else() {
    let node = both(&faulty("", "delay_ms = 20\nload_ms = 300")).await;
    let first = node.worker("inference-faulty", None).await;
    let took = node.log().lines().find_map(|line| {
        let line = line.split_once("Plugin ready.").filter(|(_, fields)| fields.contains("plugin=faulty"))?.1;
        line.split_once("took_ms=")?.1.split_whitespace().next()?.parse::<u64>().ok()
    });
    let load = Duration::from_millis(took.expect("the log says how long the start took"));

    let other = bystander(&node, 150).await;
    let other = tokio::spawn(other);
    // Two that have said nothing yet, one that waits for a longer time than the worker lives, and one that brings it down.
    let silent = async |prompt: &'static str| node.ask("faulty", prompt).await;
    let breaking = async {
        let mut events = node.stream(chat("faulty", "one two three !wait:200 !abort four")).await;
        assert_eq!(events.text().await, "one ");
        let told = events.rest().await;
        (told, Instant::now())
    };
    let ready = async {
        let (told, broke) = breaking.await;
        assert_eq!(node.ask_patiently("faulty", "and again").await, "and again");
        (told, broke.elapsed())
    };
    let (a, b, (told, back)) = tokio::join!(silent("!wait:600 first"), silent("!wait:900 second one"), ready);
    assert_eq!((a.as_str(), b.as_str()), ("first", "second one"));
    broke_off(&told, "two three ");
    let again = node.worker("inference-faulty", Some(first)).await;
    other.await.expect("the other plugin's stream is whole");
    println!("after abort() a request was answered within {back:?}; its plugin loads in {load:?}");
    assert!(back < load + Duration::from_secs(1), "ready again after {back:?}, load time {load:?}");
    assert!(again != first && node.workers().len() == 2, "{:?}", node.workers());
    node.logged(&["signal 6 (SIGABRT, an abort)", "an abort was asked for"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_is_replaced_and_its_silent_requests_are_answered() {
    let node = both(&faulty("", "delay_ms = 20")).await;
    let worker = node.worker("inference-faulty", None).await;
    let mut begun = node.stream(chat("faulty", &"word ".repeat(500))).await;
    begun.text().await;
    let silent = node.ask("faulty", "!wait:3000 here");
    let killing = async {
        eventually("both are in the plugin", LIMIT, async || (node.running("faulty").await == 2.0).then_some(())).await;
        send(worker, libc::SIGKILL);
    };
    let (answer, ()) = tokio::join!(silent, killing);
    assert_eq!(answer, "here");
    let told = begun.rest().await;
    assert!(told.error.is_some() && told.finish.is_none(), "{told:?}");
    node.worker("inference-faulty", Some(worker)).await;
    assert!(node.metric("fabstir_request_retries_total", &[]).await >= Some(1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_always_kills_is_given_up_after_its_retries() {
    let node = both(&faulty("", "")).await;
    let other = tokio::spawn(bystander(&node, 100).await);
    let reply = node.chat(&chat("faulty", "!abort")).await;
    assert_eq!(reply.status, 503, "{reply:#?}");
    assert!(reply.retry_after >= Some(1), "{reply:#?}");
    assert_eq!(node.ask_patiently("faulty", "the next one").await, "the next one");
    other.await.expect("the other plugin's stream is whole");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_plugin_is_replaced() {
    let node = both(&faulty("", "")).await;
    let worker = node.worker("inference-faulty", None).await;
    let began = Instant::now();
    let told = node.stream(chat("faulty", "one !wait:200 !hang two")).await.rest();
    let asking = async {
        eventually("the worker was replaced", 2 * LIMIT, async || {
            assert_eq!(node.ask("echo", "meanwhile").await, "meanwhile");
            (!node.workers().iter().any(|known| known.pid == worker)).then_some(())
        })
        .await;
    };
    let (told, ()) = tokio::join!(told, asking);
    broke_off(&told, "one ");
    assert_eq!(node.ask_patiently("faulty", "works").await, "works");
    println!("a plugin whose threads were all blocked served again after {:?}", began.elapsed());
    node.logged(&["it did not answer 3 heartbeats"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_takes_memory_without_end_meets_its_limit() {
    let node = both(&faulty("limits = { memory = '512MiB' }", "")).await;
    let before = node.memory();
    let told = node.stream(chat("faulty", "one !wait:200 !allocate two")).await.rest().await;
    broke_off(&told, "one ");
    assert_eq!(node.ask_patiently("faulty", "works").await, "works");
    node.logged(&["signal 6 (SIGABRT, an abort); its last words: ", "memory allocation of"]).await;
    assert!(node.memory() < before + (64 << 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_ends_its_own_request_alone() {
    for isolation in ["process", "in-process"] {
        let config = faulty(&format!("isolation = '{isolation}'"), "delay_ms = 20");
        let node = both(&format!("[scheduler]\nretries = 0\n{config}")).await;
        let workers = node.workers();
        let beside = node.stream(chat("faulty", &"word ".repeat(40))).await;
        let reply = node.chat(&chat("faulty", "!panic")).await;
        reply.refusal(500, "internal_error");
        assert!(!reply.text.contains("asks for a panic"), "a panic's own words are for the log: {reply:#?}");
        let told = node.stream(chat("faulty", "one !panic two")).await.rest().await;
        broke_off(&told, "one ");
        let told = beside.rest().await;
        assert!(told.is_whole() && told.pieces == 40, "{told:?}");
        assert_eq!(node.workers(), workers, "nothing was restarted");
        node.logged(&["Plugin code panicked."]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_answers_end_their_own_stream_alone() {
    let node = both(&faulty("", "")).await;
    let workers = node.workers();
    for prompt in ["one !error two", "one !vanish two"] {
        let told = node.stream(chat("faulty", prompt)).await.rest().await;
        broke_off(&told, "one ");
        let reply = node.chat(&chat("faulty", prompt)).await;
        assert!(reply.status >= 500 && reply.body["error"]["message"].is_string(), "{reply:#?}");
    }
    assert_eq!(node.ask_patiently("faulty", "works").await, "works");
    assert_eq!(node.workers(), workers);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_waits_for_its_reader_and_stops_with_it() {
    for isolation in ["process", "in-process"] {
        let node = both(&faulty(&format!("isolation = '{isolation}'"), "")).await;
        let mut flood = node.stream(chat("faulty", "!flood")).await;
        flood.text().await;
        let before = node.memory();
        // Nobody reads from now on. What the sockets take is bounded; the rest must wait in the plugin.
        for _ in 0..50 {
            assert_eq!(node.ask("echo", "meanwhile").await, "meanwhile");
        }
        let grown = node.memory().saturating_sub(before);
        println!("{isolation}: the node grew by {} KiB while nobody read a flood", grown >> 10);
        assert!(grown < 32 << 20, "the node grew by {} MiB", grown >> 20);
        drop(flood);
        eventually("the slot is free", LIMIT, async || (node.running("faulty").await == 0.0).then_some(())).await;
        assert_eq!(node.ask_patiently("faulty", "works").await, "works");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_break_the_protocol_end_the_sender_alone() {
    let node = both(&faulty("", "")).await;
    for prompt in ["one !wait:200 !garbage", "one !wait:200 !overrun"] {
        let other = tokio::spawn(bystander(&node, 100).await);
        let before = node.memory();
        let began = Instant::now();
        let rest = tokio::time::timeout(LIMIT, node.stream(chat("faulty", prompt)).await.rest()).await;
        let told = rest.unwrap_or_else(|_| panic!("{prompt}: the stream never ended"));
        let ended = began.elapsed();
        assert!(told.error.is_some() && told.finish.is_none() && told.text.starts_with("one "), "{prompt}: {told:?}");
        other.await.expect("the other plugin's stream is whole");
        let grown = node.memory().saturating_sub(before);
        println!("{prompt}: ended after {ended:?}, and the node grew by {} KiB", grown >> 10);
        assert!(grown < 64 << 20, "{prompt}: the node grew by {} MiB", grown >> 20);
        assert_eq!(node.ask_patiently("faulty", "works").await, "works");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_and_words_that_nobody_asked_for_are_thrown_away() {
    for prompt in ["one !wait:50 !frames", "one !wait:50 !shout"] {
        let node = both(&faulty("", "")).await;
        let before = node.memory();
        let mut flooding = node.stream(chat("faulty", prompt)).await;
        flooding.text().await;
        bystander(&node, 150).await.await;
        assert_eq!(node.ask("faulty", "works beside it").await, "works beside it");
        let grown = node.memory().saturating_sub(before);
        println!("{prompt}: the node grew by {} KiB in 3 s", grown >> 10);
        assert!(grown < 32 << 20, "{prompt}: the node grew by {} MiB", grown >> 20);
        drop(flooding);
        eventually("the slot is free", LIMIT, async || (node.running("faulty").await == 0.0).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_breaks_again_and_again_is_quarantined() {
    let place = Place::new(&faulty("", "init = 'abort'"));
    let node = Node::launch(place, &[]);
    node.healthy().await;
    let began = Instant::now();
    eventually("the plugin is quarantined", 2 * LIMIT, async || node.log().contains("The plugin is quarantined").then_some(()))
        .await;
    println!("quarantined {:?} after the start", began.elapsed());
    assert_eq!(node.ask("echo", "one").await, "one");
    node.chat(&chat("faulty", "x")).await.refusal(404, "model_not_found");
    // A changed entry is a new beginning.
    node.place.configure(&faulty("", ""));
    node.signal(libc::SIGHUP);
    node.serves("faulty").await;
    assert_eq!(node.ask_patiently("faulty", "works").await, "works");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_kills_the_plugin_takes_no_other_along() {
    let node = both(&faulty("", "")).await;
    // Each of these ends two instances.
    for number in 0..2 {
        let innocent = node.ask_patiently("faulty", "!wait:2000 all the same");
        let killer = async {
            eventually("the innocent one is inside", LIMIT, async || (node.running("faulty").await >= 1.0).then_some(())).await;
            node.chat(&chat("faulty", &format!("!abort {number}"))).await
        };
        let (answer, reply) = tokio::join!(innocent, killer);
        assert_eq!(answer, "all the same");
        assert_eq!(reply.status, 503, "{reply:#?}");
    }
    assert_eq!(node.ask_patiently("faulty", "still there").await, "still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_streams_end_and_leaves_nothing_behind() {
    let mut node = both(&faulty("", "delay_ms = 20")).await;
    let workers = node.workers();
    assert_eq!(workers.len(), 2, "{workers:?}");
    let mut events = node.stream(chat("faulty", &"word ".repeat(180))).await;
    events.text().await;
    let whole = chat("echo", &"word ".repeat(150));
    let asking = async {
        let reply = node.chat(&whole).await;
        assert_eq!((reply.status, reply.content().len()), (200, 750), "{reply:#?}");
    };
    let ending = async {
        eventually("both run", LIMIT, async || (node.running("echo").await + node.running("faulty").await == 2.0).then_some(()))
            .await;
        node.signal(libc::SIGTERM);
        let told = events.rest().await;
        assert!(told.is_whole() && told.pieces == 179, "{told:?}");
    };
    tokio::join!(asking, ending);
    assert_eq!(node.exit(LIMIT).await, 0);
    for worker in workers {
        gone(worker.pid, LIMIT).await;
    }
    assert!(node.log().contains("Stopped."));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sigterm_ends_at_once() {
    let mut node = both(&faulty("", "delay_ms = 20")).await;
    let workers = node.workers();
    let mut events = node.stream(chat("faulty", "one !wait:60000 two")).await;
    events.text().await;
    node.signal(libc::SIGTERM);
    node.logged(&["Draining"]).await;
    let began = Instant::now();
    node.signal(libc::SIGTERM);
    let code = node.exit(LIMIT).await;
    assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
    println!("a second SIGTERM ended the node with {code} after {:?}", began.elapsed());
    for worker in workers {
        gone(worker.pid, LIMIT).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_worker_outlives_a_node_that_was_killed() {
    let node = both(&faulty("", "")).await;
    // One of them busy, and one hung for good.
    let mut busy = node.stream(chat("echo", &"word ".repeat(500))).await;
    busy.text().await;
    let mut hung = node.stream(chat("faulty", "one !wait:200 !hang")).await;
    hung.text().await;
    // Half a second of words: time enough for the other to hang.
    for _ in 0..25 {
        busy.text().await;
    }
    let workers = node.workers();
    assert_eq!(workers.len(), 2);
    node.signal(libc::SIGKILL);
    for worker in workers {
        gone(worker.pid, LIMIT).await;
    }
}
