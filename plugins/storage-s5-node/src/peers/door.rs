//! The ways into another node: as one whom it has named, or as anybody.

use std::time::Duration;

use blob_folder::Id;
use bytes::Bytes;
use iroh::EndpointAddr;
use iroh::endpoint::{
    ConnectOptions, ConnectingError, Connection, ConnectionError, QuicTransportConfig, TransportErrorCode, VarInt,
};
use irpc::channel::mpsc;
use irpc::rpc::RemoteService;
use irpc_iroh::IrohRemoteConnection;
use s5_blobs::rpc::{ALPN_ACL, ALPN_PUBLIC, AuthChallenge, AuthProve, DownloadBlob, Query, RpcProto};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::{Fault, Peer, Peers};
use crate::serving::code;

/// What TLS says where two sides have no protocol in common.
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// Pieces that wait for the disk.
const WAITING: usize = 8;

/// What may be on its way from a peer: so much in each of its round trips.
const WINDOW: u32 = 2 << 20;

/// The most that is repeated of what a peer says.
const WORDS: usize = 200;

/// A connection to a peer, which ends with this.
pub(super) struct Line<S: RemoteService> {
    pub client: irpc::Client<S>,
    connection: Connection,
}

impl<S: RemoteService> Line<S> {
    /// Waits for an answer, and not for ever.
    pub async fn answer<T>(&self, limit: Duration, asked: impl Future<Output = Result<T, irpc::Error>>) -> Result<T, Fault> {
        match timeout(limit, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.told().unwrap_or_else(|| Fault::Unreachable(words(&format!("{error:#}"))))),
            Err(_) => Err(Fault::Unreachable(format!("no answer within {limit:?}"))),
        }
    }

    /// What the peer said when it closed the connection.
    fn told(&self) -> Option<Fault> {
        self.connection.close_reason().and_then(|why| told(&why))
    }
}

/// A blob that a peer has, by its own word.
pub(super) struct Offer {
    pub size: u64,
    line: Line<RpcProto>,
    _place: OwnedSemaphorePermit,
}

impl Offer {
    /// Begins to read. The pieces end early where the peer has not what it said.
    pub async fn download(&self, id: Id, limit: Duration) -> Result<mpsc::Receiver<Bytes>, Fault> {
        let request = DownloadBlob { hash: id.0, offset: 0, max_len: Some(self.size) };
        self.line.answer(limit, self.line.client.server_streaming(request, WAITING)).await
    }

    /// Why the pieces ended before their time.
    pub fn broken(&self, error: &mpsc::RecvError) -> Fault {
        match self.line.told() {
            Some(Fault::Unreachable(why)) => Fault::Unreachable(format!("it broke off: {why}")),
            _ => Fault::Unreachable(words(&format!("it broke off: {error:#}"))),
        }
    }
}

impl Peers {
    /// Asks a peer for a blob at both doors. That it has none is known only where one has let us in, and none has failed.
    pub(super) async fn offer(&self, peer: &Peer, id: Id) -> Result<Option<Offer>, Fault> {
        let Ok(Ok(place)) = timeout(self.timeout, peer.places.clone().acquire_owned()).await else {
            return Err(Fault::Unreachable("this node asks and reads much from it already".into()));
        };
        let mut outcomes = Vec::new();
        for door in [ALPN_ACL, ALPN_PUBLIC] {
            match self.offer_at(peer, door, id).await {
                Ok(Some((size, line))) => return Ok(Some(Offer { size, line, _place: place })),
                Ok(None) => outcomes.push(Ok(None)),
                Err(fault @ (Fault::Refused(_) | Fault::Busy)) => outcomes.push(Err(fault)),
                // What does not answer at one door does not at the other.
                Err(fault) => return Err(fault),
            }
        }
        let weight = |outcome: &Result<_, Fault>| match outcome {
            Err(Fault::Refused(_)) => 0,
            Ok(_) => 1,
            Err(_) => 2,
        };
        outcomes.into_iter().max_by_key(weight).unwrap_or(Ok(None))
    }

    async fn offer_at(&self, peer: &Peer, door: &[u8], id: Id) -> Result<Option<(u64, Line<RpcProto>)>, Fault> {
        let line = self.enter::<RpcProto>(peer, door).await?;
        if door == ALPN_ACL {
            self.prove(peer, &line).await?;
        }
        let query = Query { hash: id.0, location_types: Default::default(), blinded: false };
        let found = line.answer(self.timeout, line.client.rpc(query)).await?;
        Ok(found.size.filter(|_| found.exists).map(|size| (size, line)))
    }

    /// Proves that this node is who it says, to be read as one whom the peer has named.
    async fn prove(&self, peer: &Peer, line: &Line<RpcProto>) -> Result<(), Fault> {
        let me = *self.secret.public().as_bytes();
        let nonce = line.answer(self.timeout, line.client.rpc(AuthChallenge::default())).await?.nonce;
        let binding = s5_blobs::Client::f02_binding(&nonce, &me, peer.id.as_bytes());
        let signature = self.secret.sign(&s5_blobs::Client::f02_signed_message(&binding)).to_bytes();
        let proof = AuthProve::from_sig(me, signature);
        line.answer(self.timeout, line.client.rpc(proof)).await?.map_err(|why| Fault::Refused(words(&why)))
    }

    /// Connects to a peer, which has proved to be the one that is meant.
    pub(super) async fn enter<S: RemoteService>(&self, peer: &Peer, alpn: &[u8]) -> Result<Line<S>, Fault> {
        let endpoint = self.online.endpoint()?;
        let address = EndpointAddr::new(peer.id).with_ip_addr(peer.address);
        let options = ConnectOptions::new().with_transport_config(transport());
        let connected = timeout(self.timeout, async {
            let connecting = endpoint.connect_with_opts(address, alpn, options).await;
            let connecting = connecting.map_err(|error| Fault::Unreachable(words(&format!("{error:#}"))))?;
            connecting.await.map_err(|error| refused(&error, alpn))
        });
        let connection = match connected.await {
            Ok(connected) => connected?,
            Err(_) => return Err(Fault::Unreachable(format!("no answer within {:?}", self.timeout))),
        };
        Ok(Line { client: irpc::Client::boxed(IrohRemoteConnection::new(connection.clone())), connection })
    }
}

/// How this node reads from others, who begin nothing themselves.
fn transport() -> QuicTransportConfig {
    QuicTransportConfig::builder()
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(2 * WINDOW))
        .datagram_receive_buffer_size(None)
        .build()
}

/// A peer's own words, which may be anything, of any length.
pub(super) fn words(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).take(WORDS).collect()
}

/// Why there is no connection.
fn refused(error: &ConnectingError, alpn: &[u8]) -> Fault {
    let ConnectingError::ConnectionError { source, .. } = error else {
        return Fault::Unreachable(words(&format!("{error:#}")));
    };
    let none = TransportErrorCode::crypto(NO_APPLICATION_PROTOCOL);
    let has_none = match source {
        ConnectionError::ConnectionClosed(closed) => closed.error_code == none,
        ConnectionError::TransportError(error) => error.code == none,
        _ => false,
    };
    match has_none {
        true => Fault::Refused(format!("it does not serve {}", String::from_utf8_lossy(alpn))),
        false => told(source).unwrap_or_else(|| Fault::Unreachable(words(&format!("{error:#}")))),
    }
}

/// What a peer says when it closes a connection.
fn told(closed: &ConnectionError) -> Option<Fault> {
    let ConnectionError::ApplicationClosed(closed) = closed else { return None };
    match u32::try_from(closed.error_code.into_inner()).ok()? {
        code::NOT_ALLOWED => Some(Fault::Refused("this node is not in its `allow`".into())),
        code::BUSY => Some(Fault::Busy),
        code::FAILED => Some(Fault::Unreachable("it cannot read what it has".into())),
        _ => None,
    }
}
