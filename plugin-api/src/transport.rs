//! Transport: other nodes, found and talked to.

use std::fmt;

use async_trait::async_trait;
use fabstir_plugin_macros::interface;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::abi::Blob;
use crate::context::Cx;
use crate::error::Result;
use crate::stream::Stream;

/// Finds other nodes and carries messages to them and back.
///
/// The host calls `join` once and before anything else; until then every other method answers `Unavailable`. A conversation with a
/// peer is a pair of streams of messages, one in each direction. A message arrives whole, in order and as it was sent, or the stream
/// that it was on ends with an error. Peers are authenticated: what comes on a conversation comes from the peer that it is with.
///
/// # Conversations
///
/// - The stream that the caller gives is sent to the peer. Its end says that no more follows; the other direction goes on.
/// - The stream that the caller gets ends when the peer has said that no more follows, or with `Unavailable` when the connection broke
///   or the peer gave the conversation up.
/// - Dropping the stream that one got, or sending an error on the other, gives up both directions at once.
/// - A peer that does not read holds its sender back. Nothing piles up but what is under way.
/// - A message has 1 byte to 1 MiB. One of another size gives the conversation up: with `InvalidArgument` on the side that sent it.
/// - A peer that takes nothing of what is sent to it for as long as the configuration allows has given the conversation up.
#[interface(kind = "transport", version = "1.0")]
#[async_trait]
pub trait Transport: Send + Sync {
    /// Takes part in the network from now on, under the given key. Called once; again only after it failed.
    ///
    /// Returns when the plugin listens, or, for a [`Role::Visitor`], as soon as it can dial: peers may not have been met yet.
    ///
    /// # Errors
    /// `InvalidArgument` for a key that is none, or when the node has joined already. `Denied` or `Internal` when an address cannot be listened on: the message names it.
    async fn join(&self, cx: &Cx, join: Join) -> Result<Peer>;

    /// The id that the owner of an ed25519 public key has in this network; lets the host check that a signature is a peer's.
    ///
    /// # Errors
    /// `InvalidArgument` unless the key has 32 bytes and is a point of the curve.
    async fn peer_id(&self, cx: &Cx, public_key: Vec<u8>) -> Result<PeerId>;

    /// Under which addresses this node can be dialled, as far as it knows; empty for a visitor.
    async fn addresses(&self, cx: &Cx) -> Result<Vec<Address>>;

    /// Who is connected now.
    async fn peers(&self, cx: &Cx) -> Result<Vec<Peer>>;

    /// What happens from now on. A reader that falls behind by more than 256 events misses the oldest of them, and is told by
    /// [`Event::Missed`].
    async fn events(&self, cx: &Cx) -> Result<Stream<Event>>;

    /// Connects to a node by its address, and says who answered.
    ///
    /// # Errors
    /// `InvalidArgument` for an address that this transport cannot read. `Unavailable` when nobody answers there, or another peer than
    /// the address names.
    async fn dial(&self, cx: &Cx, address: Address) -> Result<PeerId>;

    /// Says in the network that this node offers something, until `withdraw` or the end of the instance. What was said is repeated in
    /// time, and is forgotten by others within 45 minutes after the last time.
    ///
    /// Returns when it has been said to the peers nearest to the topic, or at once where no peer has been met yet: then it is said as
    /// soon as there are some. Advertising a topic again says it anew.
    ///
    /// # Errors
    /// `InvalidArgument` for a visitor: nobody could reach it. `Full` past the number of topics that the configuration allows.
    async fn advertise(&self, cx: &Cx, topic: Topic) -> Result<()>;

    /// Stops repeating it. Others forget it when its time is over. Withdrawing what was not advertised is no error.
    async fn withdraw(&self, cx: &Cx, topic: Topic) -> Result<()>;

    /// Who offers this besides this node, each peer once and as soon as it is known; ends when everybody has been asked. A node that
    /// is just meeting its first peers waits for them, 3 seconds at most. The list is a hint: whoever is on it may have gone, and what
    /// it says of itself it must say itself. `open` reaches a peer of the list by its id alone.
    ///
    /// # Errors
    /// `InvalidArgument` for a topic that has not 32 bytes; so do `advertise` and `withdraw`.
    async fn find(&self, cx: &Cx, topic: Topic) -> Result<Stream<Peer>>;

    /// Takes conversations of this protocol from now on, until the stream is dropped. One listener per protocol.
    ///
    /// Those that nobody accepts wait, as many as the configuration allows; more are refused, and the peer is told that this node is
    /// busy.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is no `/…`, that the transport itself speaks, or when somebody listens for it already.
    async fn listen(&self, cx: &Cx, protocol: Protocol) -> Result<Stream<Arrival>>;

    /// Begins a conversation that has arrived: `outgoing` goes to the peer, its messages come back.
    ///
    /// # Errors
    /// `NotFound` when it has been accepted already, its peer has given up, or it has waited for more than 10 seconds.
    async fn accept(&self, cx: &Cx, arrival: u64, outgoing: Stream<Blob>) -> Result<Stream<Blob>>;

    /// Begins a conversation with a peer: `outgoing` goes to it, its messages come back. Connects first where that is needed.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no id of a peer or no name of a protocol. `Unavailable` when the peer cannot be reached. `Unimplemented` when it does not speak the protocol. `Overloaded` when it said
    /// that it is busy.
    async fn open(&self, cx: &Cx, to: Destination, outgoing: Stream<Blob>) -> Result<Stream<Blob>>;
}

/// The name of a peer, which follows from its key. Text of the transport's own form: a libp2p peer id in base58.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct PeerId(pub String);

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a peer can be dialled: text of the transport's own form, a multiaddress that ends with the peer's id where that is known.
pub type Address = String;

/// The name of a protocol with its version: `/fabstir/session/1`.
pub type Protocol = String;

/// How this node takes part.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Join {
    /// The node's ed25519 secret key, 32 bytes. Held in memory only, for as long as the instance lives.
    pub secret_key: Vec<u8>,
    pub role: Role,
}

impl fmt::Debug for Join {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Join").field("role", &self.role).finish_non_exhaustive()
    }
}

/// What others can expect of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Listens, and keeps records for others.
    Node,
    /// Comes for a while to find and to ask: does not listen, and is not asked for anything.
    Visitor,
}

/// A node, as it was met or heard of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Peer {
    pub id: PeerId,
    /// Where it can be dialled, as far as it is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<Address>,
    /// What its software calls itself, where it said so: `fabstir-node/0.1.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
    /// The time to it and back in milliseconds, as last measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
}

/// What can be offered and looked for: 32 bytes that both sides derive from its name in the same way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Topic(pub Vec<u8>);

/// Whom to talk to, about what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Destination {
    pub peer: PeerId,
    /// Where to dial it if it is not connected, besides the addresses that the plugin knows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<Address>,
    pub protocol: Protocol,
}

/// A conversation that a peer wants to begin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Arrival {
    /// To be given to `accept`, within 10 seconds.
    pub id: u64,
    pub peer: PeerId,
}

/// Something that happened in the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// This node can now be dialled at this address.
    Listening { address: Address },
    /// The address is not valid any more.
    Expired { address: Address },
    /// A peer was found on the local network.
    Discovered { peer: PeerId, address: Address },
    /// The first connection to a peer stands.
    Connected { peer: PeerId },
    /// The last connection to a peer has ended.
    Disconnected { peer: PeerId },
    /// This many events were lost, because the reader was behind.
    Missed { count: u64 },
    /// An event of a newer interface.
    #[serde(other)]
    Unknown,
}
