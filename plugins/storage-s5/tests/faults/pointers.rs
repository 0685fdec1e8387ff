//! Pointers on portals that are not as they should be.

use ed25519_dalek::{Signer, SigningKey};
use fabstir_plugin_api::prelude::*;
use serde_json::json;
use storage_s5::pointer::{Entry, Key, MOST_DATA};

use crate::Instance;
use crate::troublemaker::{Portal, Trouble, Troublemaker};

fn signing() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

fn key() -> String {
    hex::encode(signing().verifying_key().to_bytes())
}

async fn signed(instance: &Instance, revision: u64, data: &[u8]) -> Result<Pointer> {
    let mut pointer = Pointer { key: key(), revision, data: data.to_vec(), signature: Vec::new() };
    let payload = instance.s5.pointer_payload(&Cx::new(), pointer.clone()).await?;
    pointer.signature = signing().sign(&payload).to_bytes().to_vec();
    Ok(pointer)
}

async fn set(instance: &Instance, revision: u64, data: &[u8]) -> Result<()> {
    instance.s5.pointer_set(&Cx::new(), signed(instance, revision, data).await?).await
}

async fn get(instance: &Instance) -> Result<(u64, Vec<u8>)> {
    instance.s5.pointer(&Cx::new(), key()).await.map(|pointer| (pointer.revision, pointer.data))
}

#[tokio::test(flavor = "multi_thread")]
async fn newest_revision_counts_whoever_has_an_older_one() {
    let (first, second) = (Troublemaker::start().await, Portal::start(&[]));
    let both = Instance::new(&[&first.url, &second.url], json!({ "copies": 2 })).await;
    assert_eq!(get(&both).await.unwrap_err().code, Code::NotFound);
    set(&both, 1, b"old").await.expect("is moved");
    let only_second = Instance::new(&[&second.url], json!({})).await;
    set(&only_second, 5, b"new").await.expect("is moved");
    assert_eq!(get(&both).await, Ok((5, b"new".to_vec())));

    for older in [4, 5] {
        let error = set(&both, older, b"other").await.unwrap_err();
        assert!(error.code == Code::InvalidArgument && error.message.contains("known revision 5"), "{error}");
    }
    set(&both, 5, b"new").await.expect("the same pointer may be set again, where it is missing");
    first.makes(Trouble::Status(500));
    assert_eq!(get(&both).await, Ok((5, b"new".to_vec())), "one that does not answer is passed over");
    set(&both, 6, b"newer").await.unwrap_err();
    first.makes(Trouble::None);
    set(&both, 6, b"newer").await.expect("and goes through when it is back");
    assert_eq!(get(&both).await, Ok((6, b"newer".to_vec())));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_key_has_not_signed_is_passed_over() {
    let (bad, good) = (Troublemaker::start().await, Portal::start(&[]));
    let both = Instance::new(&[&bad.url, &good.url], json!({})).await;
    set(&both, 3, b"true").await.expect("is moved");
    let mut forged = Entry::new(
        Key::parse(&key()).unwrap(),
        3,
        b"true".to_vec(),
        &signed(&both, 3, b"true").await.unwrap().signature,
        MOST_DATA,
    )
    .unwrap()
    .to_wire();
    forged.revision = 9;
    bad.makes(Trouble::Pointer(json!(forged)));
    assert_eq!(get(&both).await, Ok((3, b"true".to_vec())));
    let only_bad = Instance::new(&[&bad.url], json!({})).await;
    let error = get(&only_bad).await.unwrap_err();
    assert!(
        error.code == Code::Denied && error.message.contains("signature"),
        "that it lies does not mean that there is none: {error}"
    );

    let other = SigningKey::from_bytes(&[8; 32]);
    let (revision, data) = (12, b"another's".to_vec());
    let signature = other.sign(&storage_s5::pointer::payload(revision, &data)).to_bytes();
    let other_key = Key::parse(&hex::encode(other.verifying_key().to_bytes())).unwrap();
    let of_another = Entry::new(other_key, revision, data, &signature, MOST_DATA).unwrap().to_wire();
    bad.makes(Trouble::Pointer(json!(of_another)));
    assert_eq!(get(&both).await, Ok((3, b"true".to_vec())));
}

#[tokio::test(flavor = "multi_thread")]
async fn portal_that_says_yes_and_does_nothing_is_found_out() {
    let bad = Troublemaker::start().await;
    let instance = Instance::new(&[&bad.url], json!({})).await;
    bad.makes(Trouble::ForgetsPointers);
    let error = set(&instance, 1, b"x").await.unwrap_err();
    assert!(error.message.contains("still has an older one"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pointers_beyond_the_bounds_are_refused_before_anybody_is_asked() {
    let counter = Troublemaker::start().await;
    let instance = Instance::new(&[&counter.url], json!({})).await;
    for (revision, data, word) in [(1u64 << 48, vec![], "2^48"), (1, vec![0; 49], "48 bytes")] {
        let error = signed(&instance, revision, &data).await.unwrap_err();
        assert!(error.code == Code::InvalidArgument && error.message.contains(word), "{error}");
    }
    let good = signed(&instance, 1, b"x").await.unwrap();
    for wrong in [
        Pointer { revision: 1 << 48, ..good.clone() },
        Pointer { data: b"y".to_vec(), ..good.clone() },
        Pointer { key: "zz".into(), ..good.clone() },
        Pointer { signature: vec![0; 63], ..good.clone() },
    ] {
        assert_eq!(instance.s5.pointer_set(&Cx::new(), wrong).await.unwrap_err().code, Code::InvalidArgument);
    }
    assert_eq!(counter.requests(), 0);
    let last = signed(&instance, (1 << 48) - 1, &[9; 48]).await.unwrap();
    instance.s5.pointer_set(&Cx::new(), last).await.expect("the last revision there is");
    assert_eq!(get(&instance).await, Ok(((1 << 48) - 1, vec![9; 48])));
}
