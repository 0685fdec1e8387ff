//! The ways into another node: as one whom it has named, or as anybody.

use std::time::Duration;

use bytes::Bytes;
use iroh::EndpointAddr;
use iroh::endpoint::{ConnectError, ConnectingError, Connection, ConnectionError, TransportErrorCode};
use irpc::channel::mpsc;
use irpc::rpc::RemoteService;
use irpc_iroh::IrohRemoteConnection;
use s5_blobs::rpc::{ALPN_ACL, ALPN_PUBLIC, AuthChallenge, AuthProve, DownloadBlob, Query, RpcProto};
use tokio::time::timeout;

use super::{Fault, Peer, Peers};
use crate::store::Id;

/// What TLS says where two sides have no protocol in common.
const NO_APPLICATION_PROTOCOL: u8 = 120;

/// Pieces that wait for the disk.
const WAITING: usize = 8;

/// The most that is repeated of what a peer says.
const WORDS: usize = 200;

/// A blob that a peer has, by its own word.
pub(super) struct Offer {
    pub size: u64,
    client: irpc::Client<RpcProto>,
}

impl Offer {
    /// Begins to read. The pieces end early where the peer has not what it said.
    pub async fn download(&self, id: Id, limit: Duration) -> Result<mpsc::Receiver<Bytes>, Fault> {
        let request = DownloadBlob { hash: *id.0.as_bytes(), offset: 0, max_len: Some(self.size) };
        answer(limit, self.client.server_streaming(request, WAITING)).await
    }
}

impl Peers {
    /// Asks a peer for a blob at both doors. That it has none is known only where one has let us in.
    pub(super) async fn offer(&self, peer: &Peer, id: Id) -> Result<Option<Offer>, Fault> {
        let mut outcome = None;
        for door in [ALPN_ACL, ALPN_PUBLIC] {
            match self.offer_at(peer, door, id).await {
                Ok(Some(offer)) => return Ok(Some(offer)),
                Ok(None) => outcome = Some(Ok(None)),
                Err(Fault::Refused(why)) => outcome = outcome.or(Some(Err(Fault::Refused(why)))),
                Err(fault) => return Err(fault),
            }
        }
        outcome.unwrap_or(Ok(None))
    }

    async fn offer_at(&self, peer: &Peer, door: &[u8], id: Id) -> Result<Option<Offer>, Fault> {
        let client = self.enter::<RpcProto>(peer, door).await?;
        if door == ALPN_ACL {
            self.prove(peer, &client).await?;
        }
        let query = Query { hash: *id.0.as_bytes(), location_types: Default::default(), blinded: false };
        let found = answer(self.timeout, client.rpc(query)).await?;
        match (found.exists, found.size) {
            (true, Some(size)) => Ok(Some(Offer { size, client })),
            _ => Ok(None),
        }
    }

    /// Proves that this node is who it says, to be read as one whom the peer has named.
    async fn prove(&self, peer: &Peer, client: &irpc::Client<RpcProto>) -> Result<(), Fault> {
        let me = *self.secret.public().as_bytes();
        let nonce = answer(self.timeout, client.rpc(AuthChallenge::default())).await?.nonce;
        let binding = s5_blobs::Client::f02_binding(&nonce, &me, peer.id.as_bytes());
        let signature = self.secret.sign(&s5_blobs::Client::f02_signed_message(&binding)).to_bytes();
        let proof = AuthProve::from_sig(me, signature);
        answer(self.timeout, client.rpc(proof)).await?.map_err(|why| Fault::Refused(words(&why)))
    }

    /// Connects to a peer, which has proved to be the one that is meant. The connection ends with the client.
    pub(super) async fn enter<S: RemoteService>(&self, peer: &Peer, alpn: &[u8]) -> Result<irpc::Client<S>, Fault> {
        let endpoint = self.online.endpoint(self.timeout).await?;
        let address = EndpointAddr::new(peer.id).with_ip_addr(peer.address);
        let connection: Connection = match timeout(self.timeout, endpoint.connect(address, alpn)).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) if has_no_protocol(&error) => {
                return Err(Fault::Refused(format!("it does not serve {}", String::from_utf8_lossy(alpn))));
            }
            Ok(Err(error)) => return Err(Fault::Unreachable(words(&format!("{error:#}")))),
            Err(_) => return Err(Fault::Unreachable(format!("no answer within {:?}", self.timeout))),
        };
        Ok(irpc::Client::boxed(IrohRemoteConnection::new(connection)))
    }
}

/// Waits for an answer, and not for ever.
pub(super) async fn answer<T>(limit: Duration, asked: impl Future<Output = Result<T, irpc::Error>>) -> Result<T, Fault> {
    match timeout(limit, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Fault::Unreachable(words(&format!("{error:#}")))),
        Err(_) => Err(Fault::Unreachable(format!("no answer within {limit:?}"))),
    }
}

/// A peer's own words, which may be anything, of any length.
pub(super) fn words(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).take(WORDS).collect()
}

fn has_no_protocol(error: &ConnectError) -> bool {
    let (ConnectError::Connection { source, .. }
    | ConnectError::Connecting { source: ConnectingError::ConnectionError { source, .. }, .. }) = error
    else {
        return false;
    };
    let none = TransportErrorCode::crypto(NO_APPLICATION_PROTOCOL);
    match source {
        ConnectionError::ConnectionClosed(closed) => closed.error_code == none,
        ConnectionError::TransportError(error) => error.code == none,
        _ => false,
    }
}
