//! What the transport kind promises.
//!
//! Several instances of the library run in the process of a check and talk to each other. The configuration must let them run beside
//! each other: on addresses of this machine and ports of the system's choice. Where the plugin's configuration has the keys `listen` and
//! `mdns`, as one over libp2p has, the checks set them so for the instances that they start themselves.

mod network;
mod talk;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::frame::Writer;
use fabstir_plugin_api::stream::{Sender, Stream};
use fabstir_plugin_api::transport::*;

use super::streams::LongStream;
use crate::harness::{During, Harness, Instance, patient, refused, told};

pub use network::{advertise_find_withdraw, find_sees_many, join_and_dial, peers_are_authenticated, visitor_cannot_advertise};
pub use talk::{
    busy_is_told, conversation_round_trip, drop_gives_up, half_close, many_conversations, messages_keep_their_bounds,
    slow_peer_holds_back, unknown_protocol_is_unimplemented,
};

/// The largest message.
const MESSAGE: usize = 1 << 20;

/// How long something may take that takes milliseconds on a machine with nothing else to do.
const SOON: Duration = Duration::from_secs(10);

/// An instance that has joined, and its name in the network.
struct Node {
    instance: Instance,
    transport: Arc<dyn Transport>,
    id: PeerId,
    addresses: Vec<Address>,
}

impl Node {
    async fn start(harness: &Harness, role: Role) -> Result<Self> {
        let instance = harness.connect()?;
        instance.configure(&beside_others(&instance).await?).await.during("configure")?;
        Self::join(instance, role, secret()).await
    }

    async fn join(instance: Instance, role: Role, secret_key: Vec<u8>) -> Result<Self> {
        let transport = instance.client::<dyn Transport>();
        let joined = transport.join(&patient(), Join { secret_key, role }).await.during("join")?;
        let addresses = transport.addresses(&patient()).await.during("addresses")?;
        ensure!(role == Role::Visitor || !addresses.is_empty(), "a node that has joined has no address");
        Ok(Self { instance, transport, id: joined.id, addresses })
    }

    /// A node that listens, and one more that has dialled it.
    async fn pair(harness: &Harness) -> Result<(Self, Self)> {
        let (first, second) = (Self::start(harness, Role::Node).await?, Self::start(harness, Role::Node).await?);
        second.dial(&first).await?;
        Ok((first, second))
    }

    async fn dial(&self, other: &Node) -> Result<()> {
        let address = other.addresses.first().context("the other node has no address")?;
        let answered = self.transport.dial(&patient(), address.clone()).await.during("dial")?;
        ensure!(answered == other.id, "dial of {address} was answered by {answered}, not by {}", other.id);
        Ok(())
    }

    async fn peers(&self) -> Result<Vec<PeerId>> {
        Ok(self.transport.peers(&patient()).await.during("peers")?.into_iter().map(|peer| peer.id).collect())
    }

    async fn listen(&self, protocol: &str) -> Result<Stream<Arrival>> {
        self.transport.listen(&patient(), protocol.into()).await.during("listen")
    }

    /// Begins a conversation with another node, at the addresses where it listens.
    async fn open(&self, to: &Node, protocol: &str, outgoing: Stream<Blob>) -> Result<Stream<Blob>, PluginError> {
        let to = Destination { peer: to.id.clone(), addresses: to.addresses.clone(), protocol: protocol.into() };
        self.transport.open(&patient(), to, outgoing).await
    }

    /// Who offers a topic, without repetition.
    async fn find(&self, topic: &Topic) -> Result<Vec<PeerId>> {
        let found = self.transport.find(&patient(), topic.clone()).await.during("find")?.collect().await.during("find")?;
        let mut ids: Vec<PeerId> = found.into_iter().map(|peer| peer.id).collect();
        ids.sort();
        let count = ids.len();
        ids.dedup();
        ensure!(ids.len() == count, "find gave a peer twice");
        Ok(ids)
    }
}

/// Takes the next arrival of a listener and begins the conversation.
async fn accept(node: &Node, arrivals: &mut Stream<Arrival>, outgoing: Stream<Blob>) -> Result<(PeerId, Stream<Blob>)> {
    let arrival = next_arrival(arrivals).await?;
    let incoming = node.transport.accept(&patient(), arrival.id, outgoing).await.during("accept")?;
    Ok((arrival.peer, incoming))
}

async fn next_arrival(arrivals: &mut Stream<Arrival>) -> Result<Arrival> {
    let next = tokio::time::timeout(SOON, arrivals.next()).await.context("no conversation arrived")?;
    next.context("the listener ended")?.during("listen")
}

/// Both ends of a conversation, each with what it sends and what comes to it.
struct Talk {
    opener: (Sender<Blob>, Stream<Blob>),
    acceptor: (Sender<Blob>, Stream<Blob>),
}

/// Begins a conversation between two nodes, which hold back after `capacity` messages.
async fn talk(opener: &Node, acceptor: &Node, capacity: usize) -> Result<Talk> {
    let protocol = unique("/check/talk");
    let mut arrivals = acceptor.listen(&protocol).await?;
    let (to_acceptor, from_opener) = Stream::channel(capacity);
    let (to_opener, from_acceptor) = Stream::channel(capacity);
    let accepted = accept(acceptor, &mut arrivals, from_acceptor);
    let (opened, accepted) = tokio::join!(opener.open(acceptor, &protocol, from_opener), accepted);
    let (peer, at_acceptor) = accepted?;
    ensure!(peer == opener.id, "the conversation arrived as one with {peer}, {} opened it", opener.id);
    Ok(Talk { opener: (to_acceptor, opened.during("open")?), acceptor: (to_opener, at_acceptor) })
}

/// The next message, which must come.
async fn hear(incoming: &mut Stream<Blob>) -> Result<Blob> {
    let next = tokio::time::timeout(SOON, incoming.next()).await.context("no message came")?;
    next.context("the conversation ended where a message was due")?.during("a message")
}

/// Insists that no more messages come, and no error.
async fn hear_end(incoming: &mut Stream<Blob>) -> Result<()> {
    match tokio::time::timeout(SOON, incoming.next()).await.context("the end of the conversation did not come")? {
        None => Ok(()),
        Some(Ok(message)) => bail!("a message of {} bytes came where the end was due", message.len()),
        Some(Err(error)) => bail!("the conversation ended with `{}` where its end was due", told(&error)),
    }
}

/// Reads until the conversation breaks off, and gives the error.
async fn hear_break(incoming: &mut Stream<Blob>) -> Result<PluginError> {
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline {
        match tokio::time::timeout(SOON, incoming.next()).await.context("the conversation did not break off")? {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Ok(error),
            None => bail!("the conversation ended as if the peer had said all it wanted"),
        }
    }
    bail!("messages still come from a peer that has given up")
}

/// Waits until something holds.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !holds().await? {
        ensure!(began.elapsed() < SOON, "{what} within {} s", SOON.as_secs());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// The given configuration, changed so that several instances run beside each other where the plugin has the keys for it.
async fn beside_others(instance: &Instance) -> Result<String> {
    let schema: serde_json::Value =
        serde_json::from_str(&instance.describe().await?.config_schema).context("the schema is not JSON")?;
    let mut config: serde_json::Value = serde_json::from_str(instance.config()).context("the configuration is not JSON")?;
    for (key, value) in [("listen", serde_json::json!(["/ip4/127.0.0.1/tcp/0"])), ("mdns", serde_json::json!(false))] {
        if schema["properties"].get(key).is_some() {
            config[key] = value;
        }
    }
    Ok(config.to_string())
}

/// A key that no other node has.
fn secret() -> Vec<u8> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    blake3::hash(format!("{} {now} {}", std::process::id(), unique("key")).as_bytes()).as_bytes().to_vec()
}

/// A name that nothing else in this process has.
fn unique(name: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("{name}/{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn topic(name: &str) -> Topic {
    Topic(blake3::hash(name.as_bytes()).as_bytes().to_vec())
}

/// The instance's client, which has joined the network before or does so now.
async fn joined(instance: &Instance) -> Result<Arc<dyn Transport>> {
    let transport = instance.client::<dyn Transport>();
    match transport.addresses(&patient()).await {
        Ok(_) => {}
        Err(error) if error.code == Code::Unavailable => {
            transport.join(&patient(), Join { secret_key: secret(), role: Role::Node }).await.during("join")?;
        }
        Err(error) => bail!("addresses: {}", told(&error)),
    }
    Ok(transport)
}

/// A visitor comes, talks with the node and leaves.
pub(super) async fn exercise(harness: &Harness, instance: &Instance) -> Result<()> {
    let transport = joined(instance).await?;
    let visitor = Node::start(harness, Role::Visitor).await?;
    let addresses = transport.addresses(&patient()).await.during("addresses")?;
    let address = addresses.first().context("a node that has joined has no address")?;
    let id = visitor.transport.dial(&patient(), address.clone()).await.during("dial")?;

    let protocol = unique("/check/exercise");
    let mut arrivals = transport.listen(&patient(), protocol.clone()).await.during("listen")?;
    let outgoing = Stream::from_items([Blob::from(&b"a question"[..])]);
    let to = Destination { peer: id, addresses, protocol };
    let answer = async {
        let arrival = next_arrival(&mut arrivals).await?;
        ensure!(arrival.peer == visitor.id, "the conversation arrived as one with {}, not with {}", arrival.peer, visitor.id);
        let (reply, replies) = Stream::channel(1);
        let mut questions = transport.accept(&patient(), arrival.id, replies).await.during("accept")?;
        while let Some(question) = questions.next().await {
            reply.send(question.during("a question")?).await.during("a reply")?;
        }
        Ok(())
    };
    let hear = async {
        let replies = visitor.transport.open(&patient(), to, outgoing).await.during("open")?.collect().await.during("a reply")?;
        ensure!(replies == [Blob::from(&b"a question"[..])], "{} replies came to one question", replies.len());
        Ok(())
    };
    tokio::try_join!(answer, hear)?;
    drop(arrivals);

    let offered = topic("exercise");
    transport.advertise(&patient(), offered.clone()).await.during("advertise")?;
    transport.find(&patient(), offered.clone()).await.during("find")?.collect().await.during("find")?;
    transport.withdraw(&patient(), offered).await.during("withdraw")?;
    drop(transport.events(&patient()).await.during("events")?);
    transport.peers(&patient()).await.during("peers")?;
    visitor.instance.shutdown().await
}

/// A hundred conversations at once, each with its own words.
pub(super) async fn hundred(harness: &Harness, instance: &Instance) -> Result<()> {
    let transport = joined(instance).await?;
    let visitor = Node::start(harness, Role::Visitor).await?;
    let addresses = transport.addresses(&patient()).await.during("addresses")?;
    let address = addresses.first().context("a node that has joined has no address")?;
    let id = visitor.transport.dial(&patient(), address.clone()).await.during("dial")?;
    let protocol = unique("/check/hundred");
    let arrivals = transport.listen(&patient(), protocol.clone()).await.during("listen")?;
    let echo = Echo::start(transport, arrivals);
    let calls = (0..100_u8).map(|number| {
        let to = Destination { peer: id.clone(), addresses: addresses.clone(), protocol: protocol.clone() };
        let transport = visitor.transport.clone();
        async move {
            let words: Vec<Blob> = (0..4).map(|part| Blob::from(vec![number, part])).collect();
            let back = asked(&*transport, to, words.clone()).await?;
            ensure!(back == words, "conversation {number} got the words of another");
            Ok(())
        }
    });
    futures::future::try_join_all(calls).await?;
    drop(echo);
    visitor.instance.shutdown().await
}

/// Says all these messages and hears the answers to the end. A peer that is busy is asked again.
async fn asked(transport: &dyn Transport, to: Destination, words: Vec<Blob>) -> Result<Vec<Blob>> {
    let deadline = Instant::now() + SOON * 2;
    loop {
        match transport.open(&patient(), to.clone(), Stream::from_items(words.clone())).await {
            Ok(incoming) => return incoming.collect().await.during("an answer"),
            Err(error) if error.code == Code::Overloaded && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => bail!("open: {}", told(&error)),
        }
    }
}

/// Answers every conversation with its own words, until it is dropped.
struct Echo(tokio::task::JoinHandle<()>);

impl Echo {
    fn start(transport: Arc<dyn Transport>, mut arrivals: Stream<Arrival>) -> Self {
        Self(tokio::spawn(async move {
            while let Some(Ok(arrival)) = arrivals.next().await {
                let transport = transport.clone();
                tokio::spawn(async move {
                    let (reply, replies) = Stream::channel(8);
                    // A peer that has given up needs no answer.
                    let Ok(mut words) = transport.accept(&patient(), arrival.id, replies).await else { return };
                    while let Some(Ok(word)) = words.next().await {
                        if reply.send(word).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a partner sends in a conversation that is to be long: enough that keeping all of it would show.
const LONG: usize = 48 << 20;
const PIECE: usize = 64 << 10;

/// A conversation with a partner that has much to say and wants to hear nothing.
pub(super) async fn long_stream(harness: &Harness, instance: &Instance) -> Result<LongStream> {
    joined(instance).await?;
    let partner = Node::start(harness, Role::Node).await?;
    let protocol = unique("/check/long");
    let mut arrivals = partner.listen(&protocol).await?;
    let destination = Destination { peer: partner.id.clone(), addresses: partner.addresses.clone(), protocol };
    let transport = partner.transport.clone();
    let speaker = tokio::spawn(async move {
        while let Some(Ok(arrival)) = arrivals.next().await {
            let speech = Stream::from_items((0..LONG / PIECE).map(|number| Blob::from(vec![number as u8; PIECE])));
            let transport = transport.clone();
            tokio::spawn(async move {
                // The conversation goes on until it is given up, or has been heard to the end.
                if let Ok(mut incoming) = transport.accept(&patient(), arrival.id, speech).await {
                    while let Some(Ok(_)) = incoming.next().await {}
                }
            });
        }
    });
    let partner: Box<dyn Any + Send> = Box::new((partner.instance, Echo(speaker)));
    let arguments = Box::new(move |writer: &mut Writer| writer.value(&destination));
    Ok(LongStream { method: "transport.open", arguments, parallel: 32, takes_stream: true, _partner: Some(partner) })
}

/// Insists that a call is refused as one that this kind of argument makes wrong.
fn invalid<T>(what: &str, result: Result<T, PluginError>) -> Result<()> {
    refused(what, result, &[Code::InvalidArgument]).map(drop)
}
