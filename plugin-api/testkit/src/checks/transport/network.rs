//! Joining, names, and who offers what.

use super::*;
use crate::report::Outcome;

/// A pair of RFC 8032, section 7.1, test 1.
const SECRET: &str = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
const PUBLIC: &str = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).filter_map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).ok()).collect()
}

pub async fn join_and_dial(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let transport = instance.client::<dyn Transport>();
    let apart = [
        ("addresses", transport.addresses(&patient()).await.err()),
        ("peers", transport.peers(&patient()).await.err()),
        ("events", transport.events(&patient()).await.err()),
        ("find", transport.find(&patient(), topic("apart")).await.err()),
        ("listen", transport.listen(&patient(), "/check/apart".into()).await.err()),
        ("advertise", transport.advertise(&patient(), topic("apart")).await.err()),
    ];
    for (what, error) in apart {
        let code = error.as_ref().map(|error| error.code);
        ensure!(code == Some(Code::Unavailable), "`{what}` before `join` was answered with {error:?}, not with Unavailable");
    }
    invalid("join with a key of 31 bytes", transport.join(&patient(), Join { secret_key: vec![1; 31], role: Role::Node }).await)?;
    drop(instance);

    let first = Node::start(harness, Role::Node).await?;
    let second = Node::start(harness, Role::Node).await?;
    let visitor = Node::start(harness, Role::Visitor).await?;
    invalid("a second join", first.transport.join(&patient(), Join { secret_key: secret(), role: Role::Node }).await)?;
    ensure!(visitor.addresses.is_empty(), "a visitor says that it can be dialled at {:?}", visitor.addresses);

    let mut events = first.transport.events(&patient()).await.during("events")?;
    second.dial(&first).await?;
    visitor.dial(&first).await?;
    // Once more is no error.
    second.dial(&first).await?;
    until("both nodes are known to the one that they dialled", async || {
        let peers = first.peers().await?;
        Ok(peers.contains(&second.id) && peers.contains(&visitor.id))
    })
    .await?;
    ensure!(
        second.peers().await? == [first.id.clone()],
        "a node that has dialled one other has these peers: {:?}",
        second.peers().await?
    );

    let left = visitor.id.clone();
    visitor.instance.shutdown().await?;
    let (mut connected, mut disconnected) = (vec![], vec![]);
    while !disconnected.contains(&left) {
        let event = tokio::time::timeout(SOON, events.next()).await.context("no event says that a peer has left")?;
        match event.context("the events ended")?.during("events")? {
            Event::Connected { peer } => connected.push(peer),
            Event::Disconnected { peer } => disconnected.push(peer),
            _ => {}
        }
    }
    ensure!(connected.contains(&second.id) && connected.contains(&left), "the events say that {connected:?} connected");

    for address in ["", "nonsense", "/ip4/127.0.0.1/tcp/x", "\0"] {
        invalid(&format!("dial of {address:?}"), first.transport.dial(&patient(), address.into()).await)?;
    }
    let gone = second.addresses.clone();
    second.instance.shutdown().await?;
    until("the other node sees that one has gone", async || Ok(first.peers().await?.is_empty())).await?;
    for address in gone {
        refused("dial of a node that has gone", first.transport.dial(&patient(), address).await, &[Code::Unavailable])?;
    }
    Ok(Outcome::Pass)
}

pub async fn peers_are_authenticated(harness: &Harness) -> Result<Outcome> {
    let instance = harness.connect()?;
    instance.configure(&beside_others(&instance).await?).await.during("configure")?;
    let known = Node::join(instance, Role::Node, bytes(SECRET)).await?;
    let (first, second) = Node::pair(harness).await?;
    for node in [&known, &first] {
        let id = node.transport.peer_id(&patient(), bytes(PUBLIC)).await.during("peer_id")?;
        ensure!(id == known.id, "peer_id of a public key is {id}, its owner joined as {}", known.id);
    }
    for length in [0, 31, 33] {
        invalid(&format!("peer_id of {length} bytes"), first.transport.peer_id(&patient(), vec![1; length]).await)?;
    }
    // `talk` insists that the acceptor sees the opener's own id.
    talk(&second, &first, 1).await?;
    talk(&first, &second, 1).await?;
    talk(&known, &first, 1).await?;

    // An address that names another peer than the one that answers there.
    let stranger = Node::start(harness, Role::Visitor).await?;
    for address in first.addresses.iter().filter(|address| address.contains(&first.id.0)) {
        let wrong = address.replace(&first.id.0, &second.id.0);
        let what = "dial of an address that names another peer";
        refused(what, stranger.transport.dial(&patient(), wrong.clone()).await, &[Code::Unavailable])?;
        let to = Destination { peer: known.id.clone(), addresses: vec![address.clone()], protocol: "/check/nobody".into() };
        let what = "a conversation with a peer at another's address";
        refused(what, stranger.transport.open(&patient(), to, Stream::from_items([])).await, &[Code::Unavailable])?;
    }
    let nobody = Destination { peer: PeerId("nobody".into()), addresses: vec![], protocol: "/check/nobody".into() };
    invalid("a conversation with no peer's id", first.transport.open(&patient(), nobody, Stream::from_items([])).await)?;
    Ok(Outcome::Pass)
}

pub async fn advertise_find_withdraw(harness: &Harness) -> Result<Outcome> {
    let first = Node::start(harness, Role::Node).await?;
    let (offered, other) = (topic("offered"), topic("not offered"));
    // Nobody is there yet: it is said as soon as there is somebody.
    first.transport.advertise(&patient(), offered.clone()).await.during("advertise with no peers")?;
    let second = Node::start(harness, Role::Node).await?;
    second.dial(&first).await?;
    until(
        "what was advertised before there were peers is found",
        async || Ok(second.find(&offered).await? == [first.id.clone()]),
    )
    .await?;
    ensure!(second.find(&other).await?.is_empty(), "find gives peers that offer something else");
    ensure!(first.find(&offered).await?.is_empty(), "find gives the node itself, or peers that offer nothing");

    second.transport.advertise(&patient(), offered.clone()).await.during("advertise")?;
    second.transport.advertise(&patient(), offered.clone()).await.during("a second advertise of the same")?;
    until("the other node's offer is found", async || Ok(first.find(&offered).await? == [second.id.clone()])).await?;

    // A visitor that knows one node finds both, and reaches the other by its id alone.
    let visitor = Node::start(harness, Role::Visitor).await?;
    visitor.dial(&second).await?;
    let mut both = vec![first.id.clone(), second.id.clone()];
    both.sort();
    until("a visitor finds both nodes", async || Ok(visitor.find(&offered).await? == both)).await?;
    let protocol = unique("/check/found");
    let arrivals = first.listen(&protocol).await?;
    let _echo = Echo::start(first.transport.clone(), arrivals);
    let to = Destination { peer: first.id.clone(), addresses: vec![], protocol };
    let back = asked(&*visitor.transport, to, vec![Blob::from(&b"found you"[..])]).await?;
    ensure!(back == [Blob::from(&b"found you"[..])], "a peer that was found does not answer");

    for node in [&first, &second] {
        node.transport.withdraw(&patient(), offered.clone()).await.during("withdraw")?;
        node.transport.withdraw(&patient(), offered.clone()).await.during("a second withdraw")?;
    }
    for length in [0, 31, 33] {
        let wrong = Topic(vec![1; length]);
        invalid(&format!("advertise of a topic of {length} bytes"), first.transport.advertise(&patient(), wrong.clone()).await)?;
        invalid(&format!("find of a topic of {length} bytes"), first.transport.find(&patient(), wrong).await)?;
    }
    Ok(Outcome::Pass)
}

pub async fn find_sees_many(harness: &Harness) -> Result<Outcome> {
    // More than the 20 at which libp2p stops.
    const MANY: usize = 32;
    let offered = topic("many");
    let first = Node::start(harness, Role::Node).await?;
    let mut nodes = vec![];
    for _ in 0..MANY {
        let node = Node::start(harness, Role::Node).await?;
        node.dial(&first).await?;
        node.transport.advertise(&patient(), offered.clone()).await.during("advertise")?;
        nodes.push(node);
    }
    let visitor = Node::start(harness, Role::Visitor).await?;
    visitor.dial(&first).await?;
    let began = Instant::now();
    let (mut found, mut took) = (0, Duration::ZERO);
    while found < MANY {
        ensure!(began.elapsed() < SOON * 2, "{found} of {MANY} nodes are found after {} s", SOON.as_secs() * 2);
        let search = Instant::now();
        found = visitor.find(&offered).await?.len();
        took = search.elapsed();
    }
    eprintln!("{found} nodes found in {took:?}");
    Ok(Outcome::Pass)
}

pub async fn visitor_cannot_advertise(harness: &Harness) -> Result<Outcome> {
    let node = Node::start(harness, Role::Node).await?;
    let visitor = Node::start(harness, Role::Visitor).await?;
    visitor.dial(&node).await?;
    invalid("advertise by a visitor", visitor.transport.advertise(&patient(), topic("visitor")).await)?;
    visitor.transport.withdraw(&patient(), topic("visitor")).await.during("withdraw by a visitor")?;
    ensure!(visitor.transport.addresses(&patient()).await.during("addresses")?.is_empty(), "a visitor has addresses");
    ensure!(node.find(&topic("visitor")).await?.is_empty(), "a visitor is found");
    Ok(Outcome::Pass)
}
