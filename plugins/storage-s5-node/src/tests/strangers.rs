//! Nodes that are not there, not friendly, or not what they say.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iroh::endpoint::{Connection, presets};
use iroh::protocol::{AcceptError, ProtocolHandler, Router};
use iroh::{Endpoint, SecretKey};
use s5_blobs::{ALPN_ACL, ALPN_PUBLIC, BlobsServer, PermitAllBlobAcl, ServerMode};
use s5_core::Hash;
use s5_store_local::LocalStore;

use super::*;

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
        let codes = [Code::Denied, Code::NotFound];
        assert!(codes.contains(&error.code), "an S5 node does not tell a refusal from no entry: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_that_cannot_be_asked_leaves_it_open_whether_a_blob_is_there() {
    let (_socket, gone) = dead();
    let host = Instance::new(json!({ "serve_public": true })).await;
    let id = host.put(b"here").await.expect("is put");
    let both = Instance::new(json!({ "peers": [gone, host.as_peer().await], "timeout_ms": 6000 })).await;
    let started = Instant::now();
    assert_eq!(both.whole(&id).await.as_deref(), Ok(&b"here"[..]), "another one has it");
    assert!(
        started.elapsed() < Duration::from_millis(5500),
        "and nobody waits for the one that is gone: {:?}",
        started.elapsed()
    );
    let error = both.whole(NOWHERE).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable, "{error}");
    assert!(error.message.contains("no answer within 6s") && error.retry_after_ms.is_some(), "{error:?}");
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
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
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
