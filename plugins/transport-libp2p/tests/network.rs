//! What a network of real nodes on the loopback does: many of them, bad ones among them, and some that come and go.

#[path = "network/hostile.rs"]
mod hostile;
#[path = "network/node.rs"]
mod node;

use std::collections::HashSet;
use std::process::Command;
use std::time::{Duration, Instant};

use fabstir_plugin_api::plugin::Health;
use fabstir_plugin_api::prelude::*;
use futures::{AsyncReadExt, AsyncWriteExt};
use serde_json::json;

use hostile::Hostile;
use node::{Node, blob, resident, topic, until};

const ECHO: &str = "/test/echo/1";

#[tokio::test(flavor = "multi_thread")]
async fn all_of_a_hundred_providers_are_found() {
    const MANY: usize = 100;
    let first = Node::start(json!({})).await;
    let offered = topic("tiny-chat");
    let began = Instant::now();
    let mut nodes = vec![];
    for _ in 0..MANY {
        let node = Node::start(json!({ "bootstrap": [first.address()] })).await;
        node.transport.advertise(&Cx::new(), offered.clone()).await.expect("advertises");
        nodes.push(node);
    }
    let started = began.elapsed();
    let visitor = Node::visitor(json!({ "bootstrap": [first.address()] })).await;
    let expected: HashSet<PeerId> = nodes.iter().map(|node| node.id.clone()).collect();
    let began = Instant::now();
    loop {
        let search = Instant::now();
        let mut found = visitor.transport.find(&Cx::new(), offered.clone()).await.expect("searches");
        let (mut ids, mut first_after) = (HashSet::new(), None);
        while let Some(peer) = found.next().await {
            first_after.get_or_insert_with(|| search.elapsed());
            let peer = peer.expect("no error");
            assert!(!peer.addresses.is_empty(), "{} was found without an address", peer.id);
            assert!(ids.insert(peer.id), "a peer was found twice");
        }
        if ids == expected {
            println!(
                "{MANY} nodes started and advertised in {started:?}; all found in {:?}, the first after {first_after:?}",
                search.elapsed()
            );
            break;
        }
        println!("{} of {MANY} found in {:?}", ids.len(), search.elapsed());
        assert!(began.elapsed() < Duration::from_secs(60), "{} of {MANY} are found after a minute", ids.len());
    }
    // Any of them is reached by its id alone.
    let last = nodes.last().expect("there are a hundred");
    let _echo = last.echo(ECHO).await;
    assert_eq!(visitor.ask(&last.id, &[], ECHO, &[blob(b"hello")]).await.expect("answers"), [blob(b"hello")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_streams_of_one_peer_cost_little_and_disturb_nobody() {
    const STREAMS: usize = 10_000;
    let victim = Node::start(json!({})).await;
    let honest = Node::start(json!({})).await;
    let _echo = victim.echo(ECHO).await;
    let _unanswered = victim.transport.listen(&Cx::new(), "/test/silent/1".into()).await.expect("listens");
    let to = victim.addresses.clone();
    assert_eq!(honest.ask(&victim.id, &to, ECHO, &[blob(b"before")]).await.expect("answers").len(), 1);

    let mut hostile = Hostile::start();
    let before = resident();
    let began = Instant::now();
    let (mut held, mut failed, mut slowest) = (vec![], 0, Duration::ZERO);
    while held.len() + failed < STREAMS {
        let batch = 200.min(STREAMS - held.len() - failed);
        for answer in hostile.open(&victim.addresses[0], "/test/silent/1", batch).await {
            match answer {
                // Held open, unread.
                Some(stream) => held.push(stream),
                None => failed += 1,
            }
        }
        let asked = Instant::now();
        let answer = honest.ask(&victim.id, &to, ECHO, &[blob(b"during")]).await.expect("an honest peer is served");
        assert_eq!(answer, [blob(b"during")]);
        slowest = slowest.max(asked.elapsed());
    }
    // The attacker is in this process too, so its own cost is in the figure.
    let grown = resident().saturating_sub(before);
    println!(
        "{} streams held and {failed} lost in {:?}: memory of both sides grew by {:.1} MiB; an honest peer's slowest answer took {slowest:?}",
        held.len(),
        began.elapsed(),
        grown as f64 / 1048576.0
    );
    assert!(grown < 128 << 20, "memory grew by {grown} bytes");
    drop((held, hostile));
    assert_eq!(honest.ask(&victim.id, &to, ECHO, &[blob(b"after")]).await.expect("answers"), [blob(b"after")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_its_own_conversation_and_nothing_else() {
    let victim = Node::start(json!({ "streams_per_peer": 8 })).await;
    let honest = Node::start(json!({})).await;
    let echo = victim.echo(ECHO).await;
    let mut hostile = Hostile::start();
    let mut noise = 1_u64;
    for round in 0..200 {
        let mut stream = hostile.open(&victim.addresses[0], ECHO, 1).await.pop().flatten().expect("a stream opens");
        let mut status = [9];
        stream.read_exact(&mut status).await.expect("a status comes");
        assert_eq!(status, [0], "round {round}: a place that garbage had was not freed");
        let bytes: Vec<u8> = (0..round * 7 + 1)
            .map(|_| {
                noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (noise >> 56) as u8 | 0x80
            })
            .collect();
        // Four bytes and more of a length are never one; what is shorter is cut off.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.flush().await;
        if round % 2 == 0 {
            drop(stream);
        } else {
            let _ = stream.close().await;
            let mut rest = vec![];
            let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await.expect("it is reset");
        }
    }
    assert_eq!(honest.ask(&victim.id, &victim.addresses, ECHO, &[blob(b"well")]).await.expect("answers"), [blob(b"well")]);
    drop(echo);
    victim.instance_is_free().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_takes_nothing_loses_its_conversation() {
    let victim = Node::start(json!({ "stall_s": 1 })).await;
    let mut arrivals = victim.transport.listen(&Cx::new(), ECHO.into()).await.expect("listens");
    let mut hostile = Hostile::start();
    let stream = hostile.open(&victim.addresses[0], ECHO, 1).await.pop().flatten().expect("a stream opens");
    let arrival = arrivals.next().await.expect("arrives").expect("no error");
    let endless = Stream::from_items((0..u64::MAX).map(|_| blob(&[7; 65_536])));
    let before = resident();
    let mut incoming = victim.transport.accept(&Cx::new(), arrival.id, endless).await.expect("accepts");
    let began = Instant::now();
    let error = incoming.next().await.expect("an error").expect_err("it is given up");
    println!(
        "given up after {:?}, memory grew by {:.1} MiB: {error}",
        began.elapsed(),
        resident().saturating_sub(before) as f64 / 1048576.0
    );
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.message.contains("took nothing"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(8));
    drop((stream, arrivals, incoming));
    victim.instance_is_free().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_ends_and_never_closes_holds_nothing() {
    let victim = Node::start(json!({ "streams_per_peer": 4 })).await;
    let echo = victim.echo(ECHO).await;
    let mut hostile = Hostile::start();
    let mut held = vec![];
    for round in 0..20 {
        let mut stream = hostile.open(&victim.addresses[0], ECHO, 1).await.pop().flatten().expect("a stream opens");
        let mut status = [9];
        stream.read_exact(&mut status).await.expect("a status comes");
        assert_eq!(status, [0], "round {round}: a place was not freed");
        stream.write_all(b"\x02hi\x00").await.expect("writes");
        stream.flush().await.expect("flushes");
        let mut reply = [0; 4];
        stream.read_exact(&mut reply).await.expect("the reply comes");
        assert_eq!(&reply, b"\x02hi\x00");
        held.push(stream);
        // Its place is free as soon as both directions have ended.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(echo);
    victim.instance_is_free().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn places_are_limited_for_each_peer_and_not_for_others() {
    let victim = Node::start(json!({ "streams_per_peer": 4, "waiting": 100 })).await;
    let (greedy, honest) = (Node::start(json!({})).await, Node::start(json!({})).await);
    let _echo = victim.echo(ECHO).await;
    let mut open = vec![];
    let busy = loop {
        let (sender, outgoing) = Stream::channel(1);
        let to = Destination { peer: victim.id.clone(), addresses: victim.addresses.clone(), protocol: ECHO.into() };
        match greedy.transport.open(&Cx::new(), to, outgoing).await {
            Ok(incoming) => open.push((sender, incoming)),
            Err(error) => break error,
        }
    };
    assert_eq!((open.len(), busy.code), (4, Code::Overloaded));
    assert_eq!(honest.ask(&victim.id, &victim.addresses, ECHO, &[blob(b"x")]).await.expect("answers"), [blob(b"x")]);
    open.clear();
    until("a place is free again", async || greedy.ask(&victim.id, &[], ECHO, &[blob(b"y")]).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bootstrap_that_is_gone_hurts_nobody_and_is_joined_when_it_is_back() {
    let secret = vec![42; 32];
    let first = Node::with_secret(json!({}), secret.clone()).await;
    let (id, address) = (first.id.clone(), first.address());
    let listen = address.rsplit_once("/p2p/").expect("ends with the id").0.to_owned();
    first.stop().await;

    let one = Node::start(json!({ "bootstrap": [address] })).await;
    until("a lonely node says so", async || matches!(one.health().await, Health::Degraded { .. })).await;
    let offered = topic("bootstrap");
    one.transport.advertise(&Cx::new(), offered.clone()).await.expect("is no error with nobody there");

    let first = Node::with_secret(json!({ "listen": [listen] }), secret).await;
    assert_eq!(first.id, id);
    let began = Instant::now();
    until("the node joins", async || one.health().await == Health::Ready).await;
    println!("joined {:?} after the bootstrap was back", began.elapsed());
    let other = Node::start(json!({ "bootstrap": [address] })).await;
    until("what was advertised before is found", async || other.find(&offered).await == [one.id.clone()]).await;
    println!("found {:?} after the bootstrap was back", began.elapsed());

    // Gone again: the two others still find and reach each other.
    first.stop().await;
    until("the bootstrap is missed", async || !other.peers().await.contains(&id)).await;
    let late = topic("late");
    other.transport.advertise(&Cx::new(), late.clone()).await.expect("advertises");
    until("a running network goes on", async || one.find(&late).await == [other.id.clone()]).await;
    let _echo = other.echo(ECHO).await;
    assert_eq!(one.ask(&other.id, &[], ECHO, &[blob(b"on")]).await.expect("answers"), [blob(b"on")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn advertisements_are_repeated_and_forgotten_when_they_are_not() {
    let config = json!({ "record_ttl_s": 4, "republish_s": 1 });
    let (one, other) = (Node::start(config.clone()).await, Node::start(config).await);
    other.dial(&one).await;
    let offered = topic("repeated");
    one.transport.advertise(&Cx::new(), offered.clone()).await.expect("advertises");
    until("it is found", async || other.find(&offered).await == [one.id.clone()]).await;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(9) {
        let found = other.find(&offered).await;
        assert!(found == std::slice::from_ref(&one.id), "forgotten after {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    one.transport.withdraw(&Cx::new(), offered.clone()).await.expect("withdraws");
    let began = Instant::now();
    until("it is forgotten", async || other.find(&offered).await.is_empty()).await;
    assert!(began.elapsed() < Duration::from_secs(12), "remembered for {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_over_quic_keep_their_promises() {
    let quic = json!({ "listen": ["/ip4/127.0.0.1/udp/0/quic-v1"] });
    let (one, other) = (Node::start(quic.clone()).await, Node::start(quic).await);
    assert!(one.address().contains("/quic-v1"), "{}", one.address());
    let echo = one.echo(ECHO).await;
    let words: Vec<Blob> = (0..300).map(|number| blob(&vec![number as u8; 1 + number * 400])).collect();
    assert_eq!(other.ask(&one.id, &one.addresses, ECHO, &words).await.expect("answers"), words);
    drop(echo);

    // A conversation that is dropped must not look like one that ended.
    let mut arrivals = one.transport.listen(&Cx::new(), "/test/dropped/1".into()).await.expect("listens");
    for drops_opener in [true, false] {
        let to = Destination { peer: one.id.clone(), addresses: vec![], protocol: "/test/dropped/1".into() };
        let ((say_one, from_one), (say_two, from_two)) = (Stream::channel(4), Stream::channel(4));
        let (cx, opened) = (Cx::new(), async {
            let arrival = arrivals.next().await.expect("arrives").expect("no error");
            one.transport.accept(&Cx::new(), arrival.id, from_two).await
        });
        let (opener, acceptor) = tokio::join!(other.transport.open(&cx, to, from_one), opened);
        let (mut at_opener, mut at_acceptor) = (opener.expect("opens"), acceptor.expect("accepts"));
        say_one.send(blob(b"one")).await.expect("sends");
        assert_eq!(at_acceptor.next().await.expect("comes").expect("no error"), blob(b"one"));
        say_two.send(blob(b"two")).await.expect("sends");
        assert_eq!(at_opener.next().await.expect("comes").expect("no error"), blob(b"two"));
        let mut left = if drops_opener {
            drop(at_opener);
            at_acceptor
        } else {
            drop(at_acceptor);
            at_opener
        };
        let error = left.next().await.expect("is told").expect_err("it was given up");
        assert_eq!(error.code, Code::Unavailable);
    }
    drop(arrivals);
    one.instance_is_free().await;
    other.instance_is_free().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_of_the_network_are_told() {
    let (one, other) = (Node::start(json!({})).await, Node::start(json!({})).await);
    other.dial(&one).await;
    let metrics = one.plugin.metrics(&Cx::new()).await.expect("tells");
    for name in ["libp2p_swarm_connections_incoming", "libp2p_kad_", "libp2p_identify_", "libp2p_bandwidth_bytes"] {
        assert!(metrics.contains(name), "{name} is missing in:\n{metrics}");
    }
}

/// Set where the test below runs again, inside a network of its own.
const INSIDE: &str = "TRANSPORT_LIBP2P_TEST_INSIDE";

const OWN_NETWORK: &str = "ip link set lo up && ip link add v0 type veth peer name v1 && ip addr add 10.99.0.1/24 dev v0 \
    && ip link set v0 up multicast on && ip link set v1 up && exec \"$0\" --exact \"$1\" --nocapture";

/// Whether this is the inner of two runs of a test, which has a network of its own. The outer one makes it; nothing is left to do there.
fn has_own_network(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let program = std::env::current_exe().expect("a running program has a path");
    let allowed = Command::new("unshare").args(["-rn", "ip", "link", "set", "lo", "up"]).output();
    if !allowed.as_ref().is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: this system allows no network namespaces ({allowed:?}); it needs `unshare -rn` and `ip`");
        return false;
    }
    let inside =
        Command::new("unshare").args(["-rn", "bash", "-c", OWN_NETWORK]).arg(program).arg(test).env(INSIDE, "1").output();
    let inside = inside.expect("unshare ran a moment ago");
    println!("{}", String::from_utf8_lossy(&inside.stdout));
    assert!(inside.status.success(), "{}", String::from_utf8_lossy(&inside.stderr));
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_on_one_network_find_each_other_with_mdns() {
    if !has_own_network("nodes_on_one_network_find_each_other_with_mdns") {
        return;
    }
    let config = json!({ "listen": ["/ip4/10.99.0.1/tcp/0"], "mdns": true });
    let one = Node::start(config.clone()).await;
    let mut events = one.transport.events(&Cx::new()).await.expect("tells");
    let began = Instant::now();
    let other = Node::start(config).await;
    let (mut discovered, mut connected) = (None, None);
    while discovered.is_none() || connected.is_none() {
        let event = tokio::time::timeout(Duration::from_secs(20), events.next()).await.expect("an event comes");
        match event.expect("events go on").expect("no error") {
            Event::Discovered { peer, .. } if peer == other.id => discovered = Some(began.elapsed()),
            Event::Connected { peer } if peer == other.id => connected = Some(began.elapsed()),
            _ => {}
        }
    }
    println!("found after {discovered:?}, connected after {connected:?}");
    let offered = topic("mdns");
    other.transport.advertise(&Cx::new(), offered.clone()).await.expect("advertises");
    until("an offer is found on the local network", async || one.find(&offered).await == [other.id.clone()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_on_the_local_network_that_had_no_room_is_joined_once_it_has() {
    if !has_own_network("a_node_on_the_local_network_that_had_no_room_is_joined_once_it_has") {
        return;
    }
    let listen = json!(["/ip4/10.99.0.1/tcp/0"]);
    let full = Node::start(json!({ "listen": listen, "mdns": true, "connections": 1 })).await;
    let first = Node::start(json!({ "listen": listen, "bootstrap": [full.address()] })).await;
    until("the only place is taken", async || full.peers().await == [first.id.clone()]).await;
    // It listens nowhere, so that only its own attempts can meet the other.
    let late = Node::visitor(json!({ "mdns": true })).await;
    let mut events = late.transport.events(&Cx::new()).await.expect("tells");
    let turned_away = async {
        while let Some(event) = events.next().await {
            if matches!(event.expect("no error"), Event::Disconnected { peer } if peer == full.id) {
                return;
            }
        }
        panic!("events go on");
    };
    tokio::time::timeout(Duration::from_secs(20), turned_away)
        .await
        .expect("it is turned away, for the first or the second time");
    assert_eq!(full.peers().await, [first.id.clone()]);
    first.stop().await;
    until("the other is joined", async || full.peers().await == [late.id.clone()]).await;
}
