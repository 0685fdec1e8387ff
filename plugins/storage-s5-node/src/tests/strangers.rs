//! Nodes that are not there, not friendly, or not what they say.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iroh::endpoint::{Connection, ConnectionError, presets};
use iroh::protocol::{AcceptError, ProtocolHandler, Router};
use iroh::{Endpoint, SecretKey};
use s5_blobs::rpc::{AuthChallengeResponse, QueryResponse, RpcMessage, RpcProto};
use s5_blobs::{ALPN_ACL, ALPN_PUBLIC, BlobsServer, PermitAllBlobAcl, ServerMode};
use s5_core::{Hash, StreamMessage};
use s5_registry::{GetResponse, RegistryRpcMessage};
use s5_store_local::LocalStore;

use super::*;
use crate::record;
use crate::serving::code;

const NOWHERE: &str = "00000000000000000000000000000000000000000000000000000000000000ff";

async fn endpoint() -> Endpoint {
    let builder = Endpoint::builder(presets::Minimal).clear_ip_transports();
    builder.bind_addr("127.0.0.1:0").expect("an address").bind().await.expect("binds")
}

fn as_peer(router: &Router) -> Value {
    let endpoint = router.endpoint();
    json!({ "node": endpoint.id().to_string(), "address": endpoint.bound_sockets()[0].to_string() })
}

/// Says yes to every connection and nothing after that.
#[derive(Debug)]
struct Silent;

impl ProtocolHandler for Silent {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        connection.closed().await;
        Ok(())
    }
}

/// S5's own server on S5's own store, which does not look at what it serves.
async fn careless(store: &TempDir) -> Router {
    let stores = HashMap::from([("all".into(), LocalStore::new(store.path()).to_blob_store())]);
    let endpoint = endpoint().await;
    let me = *endpoint.id().as_bytes();
    let server = BlobsServer::new(stores, HashMap::new(), None).with_acl(Arc::new(PermitAllBlobAcl)).with_local_iroh_pubkey(me);
    let public = server.clone().with_mode(ServerMode::Public);
    Router::builder(endpoint).accept(ALPN_PUBLIC, public).accept(ALPN_ACL, server).spawn()
}

/// A peer that is no more: its address is bound, so that nobody else takes it, and never answers.
fn dead() -> (std::net::UdpSocket, Value) {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("binds");
    let address = socket.local_addr().expect("has one").to_string();
    let node = SecretKey::generate().public().to_string();
    (socket, json!({ "node": node, "address": address }))
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_allowed_is_refused() {
    let friend = Instance::new(json!({})).await;
    let host = Instance::new(json!({ "allow": [friend.id().await] })).await;
    let closed = Instance::new(json!({})).await;
    let id = host.put(b"for a friend").await.expect("is put");
    closed.put(b"for a friend").await.expect("is put");
    for door in [&host, &closed] {
        let stranger = Instance::new(json!({ "peers": [door.as_peer().await] })).await;
        let error = stranger.whole(&id).await.unwrap_err();
        assert_eq!(error.code, Code::Denied, "{error}");
        let error = stranger.s5.pointer(&Cx::new(), stranger.id().await).await.unwrap_err();
        assert_eq!(error.code, Code::Denied, "a refusal is not an answer that there is none: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_that_cannot_be_asked_leaves_it_open_whether_a_blob_is_there() {
    let (_socket, gone) = dead();
    let host = Instance::new(json!({ "serve_public": true })).await;
    let id = host.put(b"here").await.expect("is put");
    let both = Instance::new(json!({ "peers": [gone.clone(), host.as_peer().await], "timeout_ms": 60_000 })).await;
    let started = Instant::now();
    assert_eq!(both.whole(&id).await.as_deref(), Ok(&b"here"[..]), "another one has it");
    assert!(started.elapsed() < Duration::from_secs(50), "and nobody waits for the one that is gone: {:?}", started.elapsed());
    let both = both.again(json!({ "peers": [gone, host.as_peer().await], "timeout_ms": 1000 })).await;
    let error = both.whole(NOWHERE).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable, "{error}");
    assert!(error.message.contains("no answer within 1s") && error.retry_after_ms.is_some(), "{error:?}");
    // What is here needs nobody.
    let id = both.put(b"own").await.expect("is put");
    assert_eq!(both.whole(&id).await.as_deref(), Ok(&b"own"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_that_does_not_answer_is_given_up() {
    let silent = Router::builder(endpoint().await).accept(ALPN_PUBLIC, Silent).accept(ALPN_ACL, Silent).spawn();
    let instance = Instance::new(json!({ "peers": [as_peer(&silent)], "timeout_ms": 1000 })).await;
    let started = Instant::now();
    let error = instance.whole(NOWHERE).await.unwrap_err();
    assert!(error.code == Code::Unavailable && error.message.contains("no answer within 1s"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    silent.shutdown().await.expect("ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_node_at_a_peers_address_is_not_the_peer() {
    let host = Instance::new(json!({ "serve_public": true })).await;
    let id = host.put(b"x").await.expect("is put");
    let mut other = host.as_peer().await;
    other["node"] = SecretKey::generate().public().to_string().into();
    let instance = Instance::new(json!({ "peers": [other], "timeout_ms": 2000 })).await;
    assert_eq!(instance.whole(&id).await.unwrap_err().code, Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_byte_is_given_away_that_is_not_of_the_blob() {
    let bytes = noise(3 * MIB, 9);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let theirs = LocalStore::new(folder.path()).to_blob_store();
    let hash: Hash = theirs.import_bytes(bytes.clone().into()).await.expect("is put").hash;
    let file = folder.path().join(theirs.blob_path_for_hash(hash));
    let careless = careless(&folder).await;
    let instance = Instance::new(json!({ "peers": [as_peer(&careless)] })).await;
    let id = hash.to_hex();
    assert_eq!(instance.whole(&id).await.as_deref(), Ok(&bytes[..]), "an S5 node that is not of this crate");

    let mut changed = bytes.clone();
    changed[2 * MIB] ^= 1;
    std::fs::write(&file, &changed).expect("is written");
    let (came, error) = instance.read(&id, 0, None).await;
    assert_eq!((came.len(), error.expect("is told").code), (0, Code::Corrupt));
    let (came, error) = instance.read(&id, 5, Some(10)).await;
    assert_eq!((came.len(), error.expect("is told").code), (0, Code::Corrupt), "parts are checked too");
    std::fs::write(&file, &bytes[..MIB]).expect("is written");
    assert_eq!(instance.whole(&id).await.unwrap_err().code, Code::Corrupt);

    // One that has it right is enough.
    let good = Instance::new(json!({ "serve_public": true })).await;
    good.put(&bytes).await.expect("is put");
    let both = Instance::new(json!({ "peers": [as_peer(&careless), good.as_peer().await] })).await;
    assert_eq!(both.whole(&id).await.as_deref(), Ok(&bytes[..]));
    careless.shutdown().await.expect("ends");
}

impl Instance {
    async fn connect(&self, from: &Endpoint, door: &[u8]) -> Connection {
        let (node, address) = self.address().await;
        let address = iroh::EndpointAddr::new(node.parse().expect("an id")).with_ip_addr(address);
        from.connect(address, door).await.expect("the handshake is for all")
    }
}

/// With what a connection ends.
async fn end_of(connection: &Connection) -> Option<u32> {
    match connection.closed().await {
        ConnectionError::ApplicationClosed(closed) => u32::try_from(closed.error_code.into_inner()).ok(),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_turned_away_by_their_ids_and_take_no_places_of_friends() {
    let (host, guest) = pair().await;
    let id = host.put(b"for a friend").await.expect("is put");
    let stranger = endpoint().await;
    for door in [ALPN_ACL, s5_registry::ALPN] {
        for _ in 0..300 {
            let connection = host.connect(&stranger, door).await;
            assert_eq!(end_of(&connection).await, Some(code::NOT_ALLOWED));
        }
    }
    assert_eq!(guest.whole(&id).await.as_deref(), Ok(&b"for a friend"[..]));
    stranger.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_has_some_places_and_a_request_is_small() {
    let host = Instance::new(json!({ "serve_public": true })).await;
    let id = host.put(b"for all").await.expect("is put");
    let greedy = endpoint().await;
    let mut held = Vec::new();
    for _ in 0..64 {
        let connection = host.connect(&greedy, ALPN_PUBLIC).await;
        // It has a place as soon as it has an answer.
        let client = irpc::Client::<RpcProto>::boxed(irpc_iroh::IrohRemoteConnection::new(connection.clone()));
        client.rpc(s5_blobs::rpc::AuthChallenge::default()).await.expect("is answered");
        held.push(connection);
    }
    let one_more = host.connect(&greedy, ALPN_PUBLIC).await;
    assert_eq!(end_of(&one_more).await, Some(code::BUSY));
    let other = Instance::new(json!({ "peers": [host.as_peer().await] })).await;
    assert_eq!(other.whole(&id).await.as_deref(), Ok(&b"for all"[..]));

    let connection = held.pop().expect("one of them");
    let (mut tx, _rx) = connection.open_bi().await.expect("opens");
    // 4,097 bytes, it says.
    tx.write_all(&[0x81, 0x20]).await.expect("is sent");
    assert_eq!(end_of(&connection).await, Some(code::NO_REQUEST));
    greedy.close().await;
}

/// How a peer may answer that means no good.
#[derive(Debug, Clone)]
enum Liar {
    /// Says that a blob has so many bytes, and sends the others.
    Blob(u64, Vec<u8>),
    /// Sends pieces without a byte, for ever.
    Nothing,
    Entry(Vec<u8>),
}

impl ProtocolHandler for Liar {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        if connection.alpn() == s5_registry::ALPN {
            while let Ok(Some(message)) = irpc_iroh::read_request::<s5_registry::RpcProto>(&connection).await {
                if let (RegistryRpcMessage::Get(asked), Self::Entry(entry)) = (message, self) {
                    let _ = asked.tx.send(GetResponse { message: Some(entry.clone()) }).await;
                }
            }
            return Ok(());
        }
        while let Ok(Some(message)) = irpc_iroh::read_request::<RpcProto>(&connection).await {
            let (size, bytes) = match self {
                Self::Blob(size, bytes) => (*size, &bytes[..]),
                _ => (1, &[][..]),
            };
            match message {
                RpcMessage::AuthChallenge(asked) => drop(asked.tx.send(AuthChallengeResponse { nonce: [0; 32] }).await),
                RpcMessage::AuthProve(asked) => drop(asked.tx.send(Ok(())).await),
                RpcMessage::Query(asked) => {
                    drop(asked.tx.send(QueryResponse { exists: true, size: Some(size), ..Default::default() }).await);
                }
                RpcMessage::DownloadBlob(asked) if matches!(self, Self::Nothing) => {
                    // Faster than that, QUIC gives up by itself.
                    while asked.tx.send(bytes::Bytes::new()).await.is_ok() {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
                RpcMessage::DownloadBlob(asked) => drop(asked.tx.send(bytes.to_vec().into()).await),
                _ => {}
            }
        }
        Ok(())
    }
}

async fn liar(liar: Liar) -> Router {
    let router = Router::builder(endpoint().await).accept(ALPN_ACL, liar.clone()).accept(s5_registry::ALPN, liar);
    router.spawn()
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_that_lies_about_a_size_fills_no_disk_and_no_memory() {
    for (lie, expected, word) in [
        (Liar::Blob(u64::MAX, vec![1; 10]), Code::Full, "blobs leave"),
        (Liar::Blob(20, vec![1; 10]), Code::Unavailable, "broke off"),
        (Liar::Blob(5, vec![1; 10]), Code::Corrupt, "10 or more came"),
        (Liar::Blob(10, vec![1; 10]), Code::Corrupt, "expected the blob"),
        (Liar::Nothing, Code::Unavailable, "took longer"),
    ] {
        let peer = liar(lie.clone()).await;
        let timeout_ms = if matches!(lie, Liar::Nothing) { 2000 } else { 20_000 };
        let instance = Instance::new(json!({ "peers": [as_peer(&peer)], "timeout_ms": timeout_ms })).await;
        let error = instance.whole(NOWHERE).await.unwrap_err();
        assert!(error.code == expected && error.message.contains(word), "{lie:?}: {error}");
        // A thread of its own removes what came.
        let left = || std::fs::read_dir(instance.state.path().join("blobs/.tmp")).expect("is there").count();
        let gone = async {
            while left() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), gone).await.expect("nothing stays of it");
        peer.shutdown().await.expect("ends");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entry_of_another_key_is_no_pointer_and_is_not_taken_for_a_refusal() {
    let other = ed25519_dalek::SigningKey::from_bytes(&[3; 32]);
    let entry = StreamMessage::sign_ed25519_registry(&other, record::VAULT, Hash::EMPTY, 1).expect("is signed");
    let peer = liar(Liar::Entry(entry.serialize().to_vec())).await;
    let instance = Instance::new(json!({ "peers": [as_peer(&peer)] })).await;
    let key = instance.id().await;
    assert_eq!(instance.s5.pointer(&Cx::new(), key).await.unwrap_err().code, Code::Corrupt);
    peer.shutdown().await.expect("ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_that_has_not_what_it_says_does_not_keep_another_from_it() {
    let bytes = noise(MIB, 4);
    let good = Instance::new(json!({ "serve_public": true })).await;
    let id = good.put(&bytes).await.expect("is put");
    let bad = [liar(Liar::Blob(20, vec![1; 10])).await, liar(Liar::Nothing).await];
    let peers = json!([as_peer(&bad[0]), as_peer(&bad[1]), good.as_peer().await]);
    let instance = Instance::new(json!({ "peers": peers, "timeout_ms": 3000 })).await;
    assert_eq!(instance.whole(&id).await.as_deref(), Ok(&bytes[..]));
    for peer in bad {
        peer.shutdown().await.expect("ends");
    }
}
