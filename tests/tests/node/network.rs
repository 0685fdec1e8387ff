//! Strangers find a node and are answered. Figures are printed:
//! `cargo nextest run --release -p fabstir-tests network:: --no-capture`.

use std::time::{Duration, Instant};

use fabstir_tests::peers::{NET, Provider, Wire, connect, net_from};
use fabstir_tests::place::finish;
use fabstir_tests::{LIMIT, Node, Place, Told, chat, eventually, tiny_chat};
use futures::future::join_all;

const ECHO: &str = "[[plugin]]\nid = 'echo'\nuse = 'inference-echo'\n";

fn slow_echo(delay_ms: u32) -> String {
    format!("{ECHO}config = {{ delay_ms = {delay_ms}, parallel = 128 }}\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_finds_the_node_and_gets_an_answer_from_the_real_model() {
    let provider = Provider::start(&tiny_chat()).await;
    provider.node.serves("tiny-chat").await;
    let stranger = Place::new(NET);
    let bootstrap = ["--bootstrap", provider.address.as_str()];

    let found = stranger.ran(&[&["find", "tiny-chat", "--json"], &bootstrap[..]].concat()).json();
    let node = &found["nodes"][0];
    assert!(provider.address.ends_with(node["peer"].as_str().expect("an id")), "{found:#}");
    let model = &node["models"][0];
    assert_eq!((model["name"].as_str(), model["free"].as_u64(), model["slots"].as_u64()), (Some("tiny-chat"), Some(4), Some(4)));
    let digest = model["digest"].as_str().expect("a model from a file has a digest").to_owned();
    assert_eq!(digest.len(), 64);

    let table = stranger.ran(&[&["find"], &bootstrap[..]].concat()).out;
    assert!(table.contains("tiny-chat") && table.contains("4 of 4"), "{table}");
    let peers = stranger.ran(&[&["peers", "--wait", "1"], &bootstrap[..]].concat()).out;
    assert!(peers.contains("fabstir-node/"), "{peers}");

    // By name and by the digest of the very file.
    for model in ["tiny-chat", &digest] {
        let asked = ["chat", "What is the capital of France?", "--network", "--model", model, "--temperature", "0"];
        let answer = stranger.ran(&[&asked[..], &bootstrap[..]].concat()).out;
        assert!(answer.contains("Paris"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_only_embeds_is_not_offered_to_others() {
    let embeds = "[[plugin]]\nid = 'embeds'\nuse = 'inference-faulty'\nconfig = { model = 'embeds', generates = false }\n";
    let provider = Provider::start(&format!("{embeds}{ECHO}")).await;
    provider.node.serves("embeds").await;
    provider.node.serves("echo").await;
    let listed = provider.node.get("/v1/models").await;
    let says = |id: &str| {
        let model = listed.body["data"].as_array().expect("a list").iter().find(|model| model["id"] == id);
        model.expect("it is listed")["generates"].as_bool()
    };
    assert_eq!((says("echo"), says("embeds")), (Some(true), Some(false)), "its own clients are told");

    let stranger = Place::new(NET);
    let find = |model: &[&str]| stranger.run(&[&["find"], model, &["--json", "--bootstrap", &provider.address]].concat());
    let found = find(&["echo"]).json();
    let names: Vec<_> = found["nodes"][0]["models"].as_array().expect("a list").iter().map(|model| &model["name"]).collect();
    assert_eq!(names, ["echo"], "{found:#}");
    let nobody = find(&["embeds"]);
    assert!(!nobody.out.contains("\"name\""), "{nobody:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn any_client_of_the_local_port_is_served_by_the_network() {
    let provider = Provider::start(&slow_echo(0)).await;
    let local = connect("echo", &[&provider.address]).await;
    assert_eq!(local.models().await, ["echo"]);
    assert_eq!(local.ask("echo", "one two three").await, "one two three");
    let told = local.stream(chat("echo", &"word ".repeat(500))).await.rest().await;
    assert!(told.is_whole() && told.text == "word ".repeat(500), "{told:?}");
    let metrics = provider.node.get("/metrics").await.text;
    for name in ["libp2p_swarm_connections_established", "libp2p_kad_", "fabstir_peer_sessions"] {
        assert!(metrics.contains(name), "no {name} in /metrics");
    }
    // What the node refuses, the client is told in the node's words.
    let long = local.chat(&chat("echo", &"w ".repeat(5000))).await;
    assert!(long.refusal(400, "context_length_exceeded").contains("4096"), "{long:#?}");
    local.chat(&chat("other", "x")).await.refusal(404, "model_not_found");
    let large = local.chat(&chat("echo", &"w".repeat(2 << 20))).await;
    assert!(large.refusal(400, "invalid_value").contains("1048576"), "{large:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_frees_the_remote_slot() {
    let provider = Provider::start(&slow_echo(20)).await;
    let local = connect("echo", &[&provider.address]).await;
    let mut events = local.stream(chat("echo", &"word ".repeat(2000))).await;
    events.text().await;
    assert_eq!(provider.node.running("echo").await, 1.0);
    drop(events);
    eventually("the slot is free", LIMIT, async || (provider.node.running("echo").await == 0.0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_goes_on_after_the_connection_broke() {
    let provider = Provider::start(&slow_echo(10)).await;
    let wire = Wire::to(provider.port()).await.expect("a wire");
    let local = connect("echo", &[&provider.address_behind(wire.port)]).await;
    let words: String = (0..400).map(|number| format!("word{number} ")).collect();
    let mut events = local.stream(chat("echo", &words)).await;
    let mut text = events.text().await;
    for _ in 0..3 {
        for _ in 0..20 {
            text += &events.text().await;
        }
        wire.cut_for(Duration::from_millis(300)).await;
    }
    let told = events.rest().await;
    text += &told.text;
    assert!(told.is_whole() && text == words, "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_holds_the_node_back_and_loses_nothing_when_the_connection_breaks() {
    let provider = Provider::start(&format!("{ECHO}config = {{ context = 300000 }}\n")).await;
    let wire = Wire::to(provider.port()).await.expect("a wire");
    let local = connect("echo", &[&provider.address_behind(wire.port)]).await;
    let words: String = (0..60_000).map(|number| format!("w{number} ")).collect();
    let mut events = local.stream(chat("echo", &words)).await;
    let mut text = events.text().await;
    for _ in 0..3 {
        // Long enough for everything between the two to be full.
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(provider.node.running("echo").await, 1.0, "nobody has held the node back");
        wire.cut_for(Duration::from_millis(300)).await;
        text += &events.text().await;
    }
    text += &events.rest().await.text;
    assert!(text == words, "{} of {} bytes came through", text.len(), words.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_has_produced_nothing_goes_to_the_next_node() {
    let hub = Provider::start(ECHO).await;
    let faulty = "[[plugin]]\nid = 'faulty'\nuse = 'inference-faulty'\n";
    let entries = format!("{}{faulty}", net_from(&hub.address));
    let mut first = Provider::of(Node::start(&entries).await).await;
    let mut second = Provider::of(Node::start(&entries).await).await;
    let local = connect("faulty", &[&hub.address]).await;
    eventually("both nodes are known", LIMIT, async || (local.log().matches("Found a node.").count() == 2).then_some(())).await;
    let asking = local.ask("faulty", "!wait:3000 here");
    let killing = async {
        let busy = eventually("one of them has the request", LIMIT, async || {
            let running = (first.node.running("faulty").await, second.node.running("faulty").await);
            (running.0 + running.1 == 1.0).then_some(running.0 == 1.0)
        })
        .await;
        let node = if busy { &mut first } else { &mut second };
        node.node.signal(libc::SIGKILL);
        node.node.exit(LIMIT).await;
    };
    let began = Instant::now();
    let (answer, ()) = tokio::join!(asking, killing);
    assert_eq!(answer, "here");
    println!("answered by the other node {:?} after it was asked", began.elapsed());
}

/// The answer is complete, or the client is told that it is not.
#[track_caller]
fn whole_or_told(told: &Told, words: &str) -> bool {
    let whole = told.is_whole() && told.text == words;
    let told_so = told.error.as_ref().is_some_and(|error| error["type"].is_string()) && !told.done;
    assert!(whole != told_so, "{told:?}");
    whole
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_killed_under_its_streams_leaves_a_whole_answer_or_an_error_and_never_a_hang() {
    let words = "word ".repeat(60);
    // All at the same time: whoever has got a part of an answer waits a minute for its node to come back.
    let runs = join_all((0..20).map(|run| killed_after(&words, Duration::from_millis(25 * run)))).await;
    let whole = runs.iter().filter(|whole| **whole).count();
    println!("20 nodes killed under a stream: {whole} answers were complete, {} ended with an error, 0 hung", 20 - whole);
}

/// Whether an answer was complete whose node was killed so long after its first piece.
async fn killed_after(words: &str, pause: Duration) -> bool {
    let mut provider = Provider::start(&slow_echo(5)).await;
    let local = connect("echo", &[&provider.address]).await;
    let mut events = local.stream(chat("echo", words)).await;
    let first = events.text().await;
    let killing = async {
        tokio::time::sleep(pause).await;
        provider.node.signal(libc::SIGKILL);
        provider.node.exit(LIMIT).await;
    };
    let (told, ()) = tokio::join!(tokio::time::timeout(4 * LIMIT, events.rest()), killing);
    let mut told = told.expect("no stream hangs");
    told.text.insert_str(0, &first);
    whole_or_told(&told, words)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_drains_ends_its_answers_and_is_not_offered_any_more() {
    let mut provider = Provider::start(&slow_echo(10)).await;
    let local = connect("echo", &[&provider.address]).await;
    let words = "word ".repeat(100);
    let mut events = local.stream(chat("echo", &words)).await;
    let first = events.text().await;
    provider.node.signal(libc::SIGTERM);
    let told = events.rest().await;
    assert!(told.is_whole() && first + &told.text == words, "{told:?}");
    assert_eq!(provider.node.exit(LIMIT).await, 0);
    let found = Place::new(NET).run(&["find", "echo", "--wait", "1", "--bootstrap", &provider.address]);
    assert_eq!(found.code, 4, "{found:#?}");
    assert!(found.err.contains("nobody answers at"), "{found:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transport_that_is_replaced_joins_anew_under_the_same_key() {
    let provider = Provider::start(ECHO).await;
    let (_, id) = provider.address.rsplit_once('/').expect("an id");
    provider.node.place.configure(&format!("{}{ECHO}", NET.replace("mdns = false", "mdns = false, waiting = 32")));
    provider.node.signal(libc::SIGHUP);
    eventually("it has joined again", LIMIT, async || {
        (provider.node.log().matches("Joined the network.").count() == 2).then_some(())
    })
    .await;
    let id = id.to_owned();
    let again = Provider::of(provider.node).await;
    assert!(again.address.ends_with(&id), "{}", again.address);
    let found = Place::new(NET).ran(&["find", "echo", "--json", "--bootstrap", &again.address]).json();
    assert_eq!(found["nodes"][0]["peer"], id.as_str(), "{found:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_sessions_stream_at_the_same_time() {
    let provider = Provider::start(&slow_echo(5)).await;
    // Ten strangers, each with ten clients.
    let bootstrap = [provider.address.as_str()];
    let strangers = join_all((0..10).map(|_| connect("echo", &bootstrap))).await;
    let words = "word ".repeat(100);
    for stranger in &strangers {
        stranger.ask("echo", "the session stands").await;
    }
    let client = async |stranger: &Node| {
        let began = Instant::now();
        let told = stranger.stream(chat("echo", &words)).await.rest().await;
        assert!(told.is_whole() && told.text == words, "{told:?}");
        told.first.expect("there is text") - began
    };
    let began = Instant::now();
    let clients = strangers.iter().flat_map(|stranger| (0..10).map(|_| client(stranger)));
    let mut first: Vec<Duration> = join_all(clients).await;
    first.sort();
    let (median, worst) = (first[50], first[98]);
    println!("100 answers at a time in {:?}: first piece after {median:?} (median), {worst:?} (p99)", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_path_beside_the_path_over_http() {
    let provider = Provider::start(&slow_echo(0)).await;
    let local = connect("echo", &[&provider.address]).await;
    let time = async |node: &Node| {
        let began = Instant::now();
        let told = node.stream(chat("echo", "one two three")).await.rest().await;
        assert!(told.is_whole(), "{told:?}");
        (told.first.expect("there is text") - began).as_secs_f64() * 1e3
    };
    let (mut direct, mut remote) = (Vec::new(), Vec::new());
    for _ in 0..200 {
        direct.push(time(&provider.node).await);
        remote.push(time(&local).await);
    }
    let mut added: Vec<f64> = remote.iter().zip(&direct).map(|(remote, direct)| remote - direct).collect();
    for values in [&mut direct, &mut remote, &mut added] {
        values.sort_by(f64::total_cmp);
    }
    let median = |values: &[f64]| values[values.len() / 2];
    println!(
        "first piece over HTTP {:.2} ms, over the network {:.2} ms: {:.2} ms more (medians of 200, in turns)",
        median(&direct),
        median(&remote),
        median(&added)
    );
}

/// Three network namespaces, two links: `a` and `b` see only the hub between them, which passes on what they send each other.
struct Lab(String);

impl Lab {
    /// `None` where namespaces are not permitted.
    fn build() -> Option<Self> {
        let lab = Self(format!("fabstir-{}", std::process::id()));
        let script = "set -e; n=$1; for i in a b hub; do ip netns add $n-$i; ip -n $n-$i link set lo up; done; \
            for i in a:1 b:2; do k=${i#*:}; i=${i%:*}; \
            ip -n $n-hub link add name $i type veth peer name eth0 netns $n-$i; \
            ip -n $n-hub addr add 10.99.$k.1/24 dev $i; ip -n $n-hub link set dev $i up multicast on; \
            ip -n $n-$i addr add 10.99.$k.2/24 dev eth0; ip -n $n-$i link set dev eth0 up multicast on; \
            ip -n $n-$i route add default via 10.99.$k.1; done; ip netns exec $n-hub sysctl -qw net.ipv4.ip_forward=1";
        let built = std::process::Command::new("sh").args(["-c", script, "sh", &lab.0]).output().ok()?;
        if !built.status.success() {
            eprintln!("SKIPPED, as network namespaces are not permitted here: {}", String::from_utf8_lossy(&built.stderr));
            return None;
        }
        Some(lab)
    }

    fn command(&self, place: &Place, host: &str, arguments: &[&str]) -> std::process::Command {
        let own = place.command();
        let mut command = std::process::Command::new("ip");
        command.args(["netns", "exec", &format!("{}-{host}", self.0)]).arg(own.get_program()).args(arguments);
        command.current_dir(place.path()).env("HOME", place.path()).stdin(std::process::Stdio::null());
        command
    }

    /// Starts a node on a host, and returns it with its address.
    async fn start(&self, place: &Place, host: &str) -> (Killed, String) {
        let log = place.path().join("log");
        let file = std::fs::File::create(&log).expect("a log can be written");
        let mut command = self.command(place, host, &["run"]);
        let child = command.stdout(std::process::Stdio::null()).stderr(file).spawn().expect("the node starts");
        let address = eventually("the node has joined", LIMIT, async || {
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            let line = log.lines().find(|line| line.contains("Joined the network.") && log.contains("Ready."))?;
            line.split([' ', '"', '=']).find(|word| word.starts_with("/ip4/10.99.")).map(str::to_owned)
        })
        .await;
        (Killed(child), address)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in ["a", "b", "hub"] {
            // What was never made cannot be removed.
            let _ = std::process::Command::new("ip").args(["netns", "del", &format!("{}-{host}", self.0)]).output();
        }
    }
}

/// A process that ends with the test.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_meet_on_one_link_by_themselves_and_over_two_links_through_a_third() {
    let Some(lab) = Lab::build() else { return };
    let net = |address: &str, more: &str| {
        format!("[[plugin]]\nid = 'net'\nuse = 'transport-libp2p'\nconfig = {{ listen = ['/ip4/{address}/tcp/0']{more} }}\n")
    };
    let hub = Place::new(&net("0.0.0.0", ""));
    let log = hub.path().join("log");
    let mut command = lab.command(&hub, "hub", &["run"]);
    let file = std::fs::File::create(&log).expect("a log can be written");
    let _hub = Killed(command.stdout(std::process::Stdio::null()).stderr(file).spawn().expect("the hub starts"));
    let hub_id = eventually("the hub has joined", LIMIT, async || {
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        Some(log.split_once("Joined the network.")?.1.split_once("peer=")?.1.split_whitespace().next()?.to_owned())
    })
    .await;
    let hub_port = std::fs::read_to_string(&log).expect("a log");
    let hub_port = hub_port.split_once("/tcp/").expect("a port").1;
    let hub_port: String = hub_port.chars().take_while(char::is_ascii_digit).collect();

    // Its model is on the hub's first link; the hub has none.
    let a = Place::new(&format!("{}{ECHO}", net("10.99.1.2", "")));
    let (_a, _) = lab.start(&a, "a").await;

    // On the same link: no address is named, the hub's namespace sees what `a` says on it.
    let began = Instant::now();
    let asked = finish(
        lab.command(&Place::new(&net("10.99.1.1", "")), "hub", &["chat", "--network", "--model", "echo", "on one link"]),
        "",
        LIMIT,
    );
    println!("on one link, nobody named: answered {:?} after the command was started", began.elapsed());
    assert_eq!((asked.code, asked.out.trim()), (0, "on one link"), "{asked:#?}");

    // On the other link: only the hub's address is named.
    let stranger = Place::new(&net("10.99.2.2", ", mdns = false"));
    let bootstrap = format!("/ip4/10.99.2.1/tcp/{hub_port}/p2p/{hub_id}");
    let began = Instant::now();
    let arguments = ["chat", "--network", "--model", "echo", "--bootstrap", &bootstrap, "over two links"];
    let asked = finish(lab.command(&stranger, "b", &arguments), "", LIMIT);
    println!("over two links, the hub named: answered {:?} after the command was started", began.elapsed());
    assert_eq!((asked.code, asked.out.trim()), (0, "over two links"), "{asked:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_commands_end_in_clear_errors() {
    let nothing = Place::new(ECHO).run(&["find", "echo"]);
    assert_eq!(nothing.code, 3, "{nothing:#?}");
    assert!(nothing.err.contains("use = \"transport-libp2p\""), "{nothing:#?}");
    let nobody = Place::new(NET).run(&["find", "echo", "--wait", "0.5"]);
    assert_eq!(nobody.code, 1, "{nobody:#?}");
    assert!(nobody.err.contains("nobody who offers `echo` was found"), "{nobody:#?}");
    let wrong = Place::new(NET).run(&["find", "echo", "--bootstrap", "not an address"]);
    assert_eq!(wrong.code, 4, "{wrong:#?}");
    let unnamed = Place::new(NET).run(&["chat", "--network", "hi"]);
    assert_eq!(unnamed.code, 2, "{unnamed:#?}");
    assert!(unnamed.err.contains("--model"), "{unnamed:#?}");
    let unmet = Place::new(NET).run(&["chat", "--network", "--model", "echo", "--wait", "0.5", "hi"]);
    assert_eq!(unmet.code, 1, "{unmet:#?}");
    assert!(
        unmet.err.contains("nobody who offers the model was found within") && unmet.err.contains("--bootstrap"),
        "{unmet:#?}"
    );
}

#[test]
fn what_a_killed_visit_has_left_goes_with_the_next_and_one_that_goes_on_keeps_its_own() {
    let (place, temporary) = (Place::new(NET), tempfile::tempdir().expect("a folder"));
    let visits = || -> Vec<std::path::PathBuf> {
        let entries = std::fs::read_dir(temporary.path()).expect("can be read");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        paths.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("fabstir-visit-"))).collect()
    };
    let visit = || {
        let mut command = place.command();
        command.env("TMPDIR", temporary.path()).args(["find", "echo", "--wait", "60"]);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        Killed(command.spawn().expect("a visit starts"))
    };
    let begun = |count: usize| {
        let began = Instant::now();
        while visits().len() < count {
            assert!(began.elapsed() < LIMIT, "a visit has its folder");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let killed = visit();
    begun(1);
    let left = visits().remove(0);
    drop(killed);
    let _goes_on = visit();
    begun(2);
    let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    let is_old = |path: &std::path::Path| {
        std::fs::metadata(path).and_then(|folder| folder.modified()).is_ok_and(|time| time <= hour_ago + Duration::from_secs(1))
    };
    // The one that goes on may have written into its folder once more, and it is its lock that shall keep it, not its age.
    for _ in 0..10 {
        for path in visits() {
            std::fs::File::open(path).and_then(|folder| folder.set_modified(hour_ago)).expect("a folder's time can be set");
        }
        let mut next = place.command();
        next.env("TMPDIR", temporary.path()).args(["find", "echo", "--wait", "0.1"]);
        let next = finish(next, "", LIMIT);
        assert!(next.err.contains("nobody who offers"), "{next:#?}");
        let stays = visits();
        assert!(stays.len() == 1 && !stays.contains(&left), "{stays:?}");
        if is_old(&stays[0]) {
            return;
        }
    }
    panic!("its folder is never left alone");
}
