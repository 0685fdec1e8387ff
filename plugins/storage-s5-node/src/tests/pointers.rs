//! Pointers here and on other nodes.

use ed25519_dalek::{Signer, SigningKey};
use s5_core::{MessageType, RegistryApi, StreamMessage};
use s5_registry::RemoteRegistry;

use super::*;
use crate::record;

fn key() -> String {
    hex::encode(SigningKey::from_bytes(&[7; 32]).verifying_key().to_bytes())
}

fn signed(revision: u64, seed: u8) -> Pointer {
    let mut pointer = Pointer { key: key(), revision, data: vec![seed; 32], signature: Vec::new() };
    let payload = record::payload(&pointer).expect("fits");
    pointer.signature = SigningKey::from_bytes(&[7; 32]).sign(&payload).to_bytes().to_vec();
    pointer
}

async fn set(instance: &Instance, revision: u64, seed: u8) -> Result<()> {
    instance.s5.pointer_set(&Cx::new(), signed(revision, seed)).await
}

async fn get(instance: &Instance) -> Result<Pointer> {
    instance.s5.pointer(&Cx::new(), key()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn newest_revision_counts_whoever_has_an_older_one() {
    let (host, guest) = pair().await;
    assert_eq!(get(&guest).await.unwrap_err().code, Code::NotFound);
    set(&guest, 3, 1).await.expect("is moved");
    assert_eq!(get(&host).await, Ok(signed(3, 1)), "the peer lets this node write, and has it too");
    set(&host, 7, 2).await.expect("is moved");
    assert_eq!(get(&guest).await, Ok(signed(7, 2)), "read from the peer, which has a newer one");
    for older in [6, 7] {
        let error = set(&guest, older, 3).await.unwrap_err();
        assert!(error.code == Code::InvalidArgument && error.message.contains("known revision 7"), "{error}");
    }
    set(&guest, 7, 2).await.expect("the same pointer may be set again, where it is missing");
    assert_eq!(get(&host).await, Ok(signed(7, 2)));

    // With the peer gone, what is here is given, and a move is made here.
    let peer = host.as_peer().await;
    host.s5.shutdown().await;
    drop(host);
    let guest = guest.again(json!({ "peers": [peer], "timeout_ms": 1000 })).await;
    assert_eq!(get(&guest).await, Ok(signed(7, 2)));
    set(&guest, 8, 4).await.expect("is moved");
    assert_eq!(get(&guest).await, Ok(signed(8, 4)));
    let unknown = hex::encode(SigningKey::from_bytes(&[9; 32]).verifying_key().to_bytes());
    let error = guest.s5.pointer(&Cx::new(), unknown).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable, "that there is none is known only where all have said so: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_only_read_moves_nothing() {
    let host = Instance::new(json!({ "serve_public": true })).await;
    set(&host, 2, 1).await.expect("is moved");
    let guest = Instance::new(json!({ "peers": [host.as_peer().await] })).await;
    assert_eq!(get(&guest).await, Ok(signed(2, 1)));
    set(&guest, 3, 2).await.expect("is moved here");
    assert_eq!(get(&guest).await, Ok(signed(3, 2)));
    assert_eq!(get(&host).await, Ok(signed(2, 1)), "and not there");
}

/// What others may do with S5's own client.
#[tokio::test(flavor = "multi_thread")]
async fn guests_neither_delete_nor_turn_back_what_is_kept() {
    let (host, guest) = pair().await;
    for revision in 1..=3 {
        set(&host, revision, revision as u8).await.expect("is moved");
    }
    let (node, address) = host.address().await;
    let address = iroh::EndpointAddr::new(node.parse().expect("an id")).with_ip_addr(address);
    let endpoint = guest.s5.node.endpoint();
    let registry = RemoteRegistry::connect(endpoint, address);
    let place = record::place(&key()).expect("a key");
    assert_eq!(registry.get(&place).await.expect("is read").map(|entry| entry.revision), Some(3));
    registry.delete(&place).await.expect_err("entries are not deleted");
    // The type of an entry is not signed; S5's registry would take this one in place of a newer one.
    let mut older = record::entry(&signed(1, 1)).expect("is signed");
    older.type_id = MessageType::Stream;
    registry.set(older).await.expect_err("an entry of another type is refused");
    let unsigned = StreamMessage::new(
        MessageType::Registry,
        s5_core::StreamKey::Local([1; 32]),
        1,
        s5_core::Hash::EMPTY,
        Box::new([]),
        None,
    );
    registry.set(unsigned.expect("an entry")).await.expect_err("so is what nobody has signed");
    assert_eq!(get(&host).await, Ok(signed(3, 3)));
}

/// S5's clients subscribe; a connection that is gone leaves nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn who_subscribes_and_goes_takes_no_place() {
    let (host, guest) = pair().await;
    set(&host, 1, 1).await.expect("is moved");
    let (node, address) = host.address().await;
    let address = iroh::EndpointAddr::new(node.parse().expect("an id")).with_ip_addr(address);
    let place = record::place(&key()).expect("a key");
    for _ in 0..300 {
        let client = s5_registry::Client::connect(guest.s5.node.endpoint(), address.clone());
        let mut events = client.subscribe(vec![place], 1).await.expect("is taken");
        assert!(!matches!(events.recv().await, Ok(Some(_))), "nobody is told of what comes later");
    }
    assert_eq!(get(&guest).await, Ok(signed(1, 1)));
}

/// The address of a peer that never answers takes the time of two questions, and the move is made here between them.
#[tokio::test(flavor = "multi_thread")]
async fn move_is_made_here_whoever_is_silent() {
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").expect("binds");
    let address = silent.local_addr().expect("has one").to_string();
    let node = iroh::SecretKey::generate().public().to_string();
    let instance = Instance::new(json!({ "peers": [{ "node": node, "address": address }], "timeout_ms": 1000 })).await;
    set(&instance, 1, 1).await.expect("is moved");
    let place = record::place(&key()).expect("a key");
    // The caller gives up while the peer is offered the next one.
    let kept = async {
        while instance.s5.node.registry.entry(&place).await.expect("is read").map(|entry| entry.revision) != Some(2) {
            tokio::task::yield_now().await;
        }
    };
    let moved = set(&instance, 2, 2);
    tokio::select! {
        () = kept => {}
        moved = moved => moved.expect("is moved"),
    }
    assert_eq!(get(&instance).await, Ok(signed(2, 2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn pointers_that_do_not_fit_are_refused_by_name() {
    let instance = Instance::new(json!({})).await;
    let long = Pointer { data: b"not a hash".to_vec(), ..signed(1, 1) };
    for refused in
        [instance.s5.pointer_payload(&Cx::new(), long.clone()).await.map(drop), instance.s5.pointer_set(&Cx::new(), long).await]
    {
        let error = refused.unwrap_err();
        assert!(error.code == Code::InvalidArgument && error.message.contains("32 bytes"), "{error}");
    }
    assert_eq!(get(&instance).await.unwrap_err().code, Code::NotFound);
}
