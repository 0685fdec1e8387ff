//! Putting blobs on portals that are not as they should be.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use axum::http::Method;
use fabstir_plugin_api::prelude::*;
use serde_json::json;

use crate::troublemaker::{Portal, Trouble, Troublemaker};
use crate::{Instance, MIB, noise};

#[tokio::test(flavor = "multi_thread")]
async fn blob_goes_to_the_next_portal_when_one_does_not_take_it() {
    let (bad, good) = (Troublemaker::start().await, Portal::start(&[]));
    for (seed, trouble) in (0..).zip([
        Trouble::Status(500),
        Trouble::Status(413),
        Trouble::Status(507),
        Trouble::OtherName,
        Trouble::TooMany { seconds: 300, times: 1 },
    ]) {
        let instance = Instance::new(&[&bad.url, &good.url], json!({})).await;
        bad.makes(trouble.clone());
        let bytes = noise(1000, seed);
        let id = instance.put(&bytes).await.unwrap_or_else(|error| panic!("{trouble:?}: {error}")).id;
        let only_good = Instance::new(&[&good.url], json!({})).await;
        assert_eq!(only_good.whole(&id).await.as_deref(), Ok(&bytes[..]), "{trouble:?}");
    }
    let nobody = Instance::new(&["http://127.0.0.1:9", &good.url], json!({})).await;
    nobody.put(&noise(10, 99)).await.expect("a portal that is down is passed over");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_portal_has_acknowledged_is_not_stored() {
    let bad = Troublemaker::start().await;
    let instance = Instance::new(&[&bad.url, "http://127.0.0.1:9"], json!({})).await;
    let bytes = noise(1000, 1);
    bad.makes(Trouble::OtherName);
    let error = instance.put(&bytes).await.unwrap_err();
    assert!(error.message.contains("another one") && error.message.contains("127.0.0.1:9"), "{error}");
    bad.makes(Trouble::Status(401));
    let only = Instance::new(&[&bad.url], json!({})).await;
    assert_eq!(only.put(&bytes).await.unwrap_err().code, Code::Denied);
    bad.makes(Trouble::Status(503));
    assert_eq!(only.put(&bytes).await.unwrap_err().code, Code::Unavailable);
    assert_eq!((instance.listed().await, only.listed().await), (0, 0));
    let two = Instance::new(&[&bad.url, "http://127.0.0.1:9"], json!({ "copies": 2 })).await;
    bad.makes(Trouble::None);
    assert_eq!(two.put(&bytes).await.unwrap_err().code, Code::Unavailable, "one copy of two is not enough");
    assert_eq!(two.listed().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn short_rest_is_waited_for_and_a_long_one_is_told() {
    let bad = Troublemaker::start().await;
    let instance = Instance::new(&[&bad.url], json!({ "timeout_ms": 4000 })).await;
    bad.makes(Trouble::TooMany { seconds: 1, times: 1 });
    let began = Instant::now();
    instance.put(&noise(10, 1)).await.expect("is put after the rest");
    assert!(began.elapsed() >= Duration::from_secs(1));
    bad.makes(Trouble::TooMany { seconds: 100, times: 1 });
    let error = instance.put(&noise(10, 2)).await.unwrap_err();
    assert_eq!(error.code, Code::Overloaded, "{error}");
    assert!(error.retry_after_ms.is_some_and(|wait| (90_000..=100_000).contains(&wait)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn upload_that_breaks_off_goes_on_where_it_was() {
    let bad = Troublemaker::start().await;
    let instance = Instance::new(&[&bad.url], json!({ "chunk_bytes": 4 * MIB })).await;
    let bytes = noise(6 * MIB, 1);
    // Every request that carries more breaks off: the upload cannot end, but it moves.
    bad.makes(Trouble::Breaks { after: 3 * MIB as u64 });
    let first = instance.put(&bytes).await;
    bad.makes(Trouble::None);
    bad.requests();
    let again = instance.again().await;
    let id = again.put(&bytes).await.expect("the second put ends").id;
    if first.is_err() {
        let sent = bad.bytes(&Method::PATCH);
        assert!(sent < 6 * MIB as u64, "{sent} bytes were sent again");
    }
    assert_eq!(again.whole(&id).await.as_deref(), Ok(&bytes[..]));
    assert_eq!(
        std::fs::read_dir(again.state.path().join("uploads")).expect("a folder").count(),
        0,
        "nothing is left to go on with"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn put_that_is_given_up_is_resumed_by_the_next_instance() {
    let counter = Troublemaker::start().await;
    let instance = Instance::new(&[&counter.url], json!({ "timeout_ms": 10_000 })).await;
    let bytes = noise(12 * MIB, 2);
    {
        let put = instance.put(&bytes);
        let some_chunks = async {
            while counter.bytes(&Method::PATCH) < 6 * MIB as u64 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::select! {
            done = put => drop(done.expect("is put")),
            () = some_chunks => {}
        }
    }
    let cut_off = instance.listed().await == 0;
    counter.requests();
    let again = instance.again().await;
    let id = again.put(&bytes).await.expect("is put").id;
    let sent = counter.bytes(&Method::PATCH);
    println!("cut off: {cut_off}; sent again: {sent} of {} bytes", bytes.len());
    assert!(sent <= 11 * MIB as u64, "{sent} bytes were sent again");
    assert_eq!(again.whole(&id).await.as_deref(), Ok(&bytes[..]));
    counter.requests();
    again.put(&bytes).await.expect("is there");
    assert_eq!(counter.bytes(&Method::PATCH), 0, "what is there is not sent again");
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_are_on_as_many_portals_as_the_configuration_says_and_all_are_deleted() {
    let (first, second, third) = (Troublemaker::start().await, Portal::start(&[]), Portal::start(&[]));
    let instance = Instance::new(&[&first.url, &second.url, &third.url], json!({ "copies": 2 })).await;
    let bytes = noise(3 * MIB, 1);
    let id = instance.put(&bytes).await.expect("is put").id;
    let has = async |url: &str| Instance::new(&[url], json!({})).await.whole(&id).await.is_ok();
    assert_eq!((has(&first.url).await, has(&second.url).await, has(&third.url).await), (true, true, false));

    first.makes(Trouble::Status(500));
    let error = instance.s5.delete(&Cx::new(), id.clone()).await.unwrap_err();
    assert_eq!((error.code, instance.listed().await), (Code::Unavailable, 1), "a copy that cannot be deleted is not forgotten");
    first.makes(Trouble::Status(401));
    let error = instance.s5.delete(&Cx::new(), id.clone()).await.unwrap_err();
    assert_eq!((error.code, instance.listed().await), (Code::Denied, 1), "nor one that another token deletes");
    first.makes(Trouble::None);
    assert_eq!(instance.s5.delete(&Cx::new(), id.clone()).await, Ok(true));
    assert_eq!((has(&first.url).await, has(&second.url).await, instance.listed().await), (false, false, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_copy_is_put_anew() {
    let (first, second) = (Portal::start(&[]), Portal::start(&[]));
    let bytes = noise(1000, 1);
    let instance = Instance::new(&[&first.url], json!({})).await;
    let id = instance.put(&bytes).await.expect("is put").id;
    let behind_our_back = Instance::new(&[&first.url], json!({})).await;
    behind_our_back.put(&bytes).await.expect("is there");
    assert_eq!(behind_our_back.s5.delete(&Cx::new(), id.clone()).await, Ok(true));
    assert_eq!(instance.whole(&id).await.unwrap_err().code, Code::NotFound);
    instance.put(&bytes).await.expect("is put again");
    assert_eq!(instance.whole(&id).await.as_deref(), Ok(&bytes[..]));
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_copy_is_repaired_when_the_blob_is_put_again() {
    let portal = Portal::start(&[]);
    // In one request, and in chunks.
    for (seed, size) in [(1, 1000), (2, 3 * MIB)] {
        let instance = Instance::new(&[&portal.url], json!({})).await;
        let bytes = noise(size, seed);
        let id = instance.put(&bytes).await.expect("is put").id;
        portal.rot(&id);
        assert_eq!(instance.whole(&id).await.unwrap_err().code, Code::Corrupt);
        instance.put(&bytes).await.expect("is put again");
        assert_eq!(instance.whole(&id).await.as_deref(), Ok(&bytes[..]), "{size} bytes");

        // One that does not know that it is there, as after its state folder was lost.
        portal.rot(&id);
        let stranger = Instance::new(&[&portal.url], json!({})).await;
        stranger.put(&bytes).await.expect("is put again");
        assert_eq!(stranger.whole(&id).await.as_deref(), Ok(&bytes[..]), "{size} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_that_cannot_be_repaired_is_made_on_another_portal() {
    let (bad, good) = (Troublemaker::start().await, Portal::start(&[]));
    for (seed, size) in [(1, 1000), (2, 3 * MIB)] {
        let instance = Instance::new(&[&bad.url, &good.url], json!({})).await;
        bad.makes(Trouble::None);
        let bytes = noise(size, seed);
        let id = instance.put(&bytes).await.expect("is put").id;
        bad.makes(Trouble::OtherBytes { from: 10 });
        instance.put(&bytes).await.expect("is put on the other one");
        assert_eq!(instance.whole(&id).await.as_deref(), Ok(&bytes[..]), "{size} bytes");
        bad.makes(Trouble::None);
        assert_eq!(instance.s5.delete(&Cx::new(), id.clone()).await, Ok(true));
        for url in [&bad.url, &good.url] {
            let only = Instance::new(&[url], json!({})).await;
            assert_eq!(only.whole(&id).await.unwrap_err().code, Code::NotFound, "a copy that was damaged is deleted, too: {url}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn upload_that_does_not_get_on_is_given_up_for_the_next_portal() {
    let (bad, good) = (Troublemaker::start().await, Portal::start(&[]));
    for (seed, trouble) in (0..).zip([Trouble::Dribbles, Trouble::Nibbles]) {
        let instance = Instance::new(&[&bad.url, &good.url], json!({})).await;
        bad.makes(trouble.clone());
        let bytes = noise(2 * MIB, seed);
        let put = tokio::time::timeout(Duration::from_secs(60), instance.put(&bytes)).await;
        let id = put.unwrap_or_else(|_| panic!("it is held: {trouble:?}")).expect("is put").id;
        assert!(bad.requests() < 20, "{trouble:?}");
        assert_eq!(instance.whole(&id).await.as_deref(), Ok(&bytes[..]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn portal_that_was_away_is_not_forgotten() {
    let (first, second) = (Troublemaker::start().await, Portal::start(&[]));
    let instance = Instance::new(&[&first.url, &second.url], json!({})).await;
    let bytes = noise(1000, 1);
    let id = instance.put(&bytes).await.expect("is put").id;
    first.makes(Trouble::Status(500));
    instance.put(&bytes).await.expect("is put on the other one");
    first.makes(Trouble::None);
    assert_eq!(instance.s5.delete(&Cx::new(), id.clone()).await, Ok(true));
    let only_first = Instance::new(&[&first.url], json!({})).await;
    assert_eq!(only_first.whole(&id).await.unwrap_err().code, Code::NotFound, "its copy is deleted, too");
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_on_a_portal_that_is_not_configured_any_more_is_not_forgotten() {
    let (first, second) = (Portal::start(&[]), Portal::start(&[]));
    let both = Instance::new(&[&first.url, &second.url], json!({ "copies": 2 })).await;
    let id = both.put(&noise(1000, 1)).await.expect("is put").id;
    let one = Instance::within(both.state, &[&first.url], json!({})).await;
    let error = one.s5.delete(&Cx::new(), id.clone()).await.unwrap_err();
    assert!(error.code == Code::Denied && error.message.contains(&second.url), "{error}");
    assert_eq!(one.listed().await, 1);
    let both = Instance::within(one.state, &[&first.url, &second.url], json!({})).await;
    assert_eq!((both.s5.delete(&Cx::new(), id).await, both.listed().await), (Ok(true), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn token_lets_in_and_is_in_no_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("token");
    std::fs::write(&file, "s3cret\n").expect("a file");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).expect("a mode");
    let portal = Portal::start(&["--token-file", file.to_str().expect("a path")]);
    let without = Instance::new(&[&portal.url], json!({})).await;
    let refused = without.put(b"bytes").await.unwrap_err();
    assert!(refused.code == Code::Denied && refused.message.contains("401"), "{refused}");
    let wrong = Instance::new(&[], json!({ "portals": [{ "url": portal.url, "token": "another-token" }] })).await;
    let refused = wrong.put(b"bytes").await.unwrap_err();
    assert!(refused.code == Code::Denied && !refused.message.contains("another-token"), "{refused}");
    let with = Instance::new(&[], json!({ "portals": [{ "url": portal.url, "token_file": file }] })).await;
    with.put(b"bytes").await.expect("is let in");
    with.put(&noise(3 * MIB, 1)).await.expect("is let in, in chunks too");
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disk_is_told_and_the_next_blob_fits() {
    let portal = Portal::start(&[]);
    let quota = Instance::new(&[&portal.url], json!({ "spool_max_bytes": MIB })).await;
    let error = quota.put(&noise(MIB + 1, 1)).await.unwrap_err();
    assert!(error.code == Code::Full && error.message.contains("spool_max_bytes"), "{error}");
    quota.put(&noise(MIB, 2)).await.expect("fits");

    let state = tempfile::tempdir().expect("a folder");
    let spool = state.path().join("spool");
    std::fs::create_dir(&spool).expect("a folder");
    let mount = |arguments: &[&str]| {
        let ran = std::process::Command::new(arguments[0]).args(&arguments[1..]).arg(&spool).output();
        ran.is_ok_and(|ran| ran.status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs"]) {
        return println!("SKIPPED: a disk of 1 MiB needs the right to mount one; run the test as root");
    }
    let instance = Instance::within(state, &[&portal.url], json!({})).await;
    let (large, small) = (instance.put(&noise(3 * MIB, 3)).await, instance.put(&noise(1000, 4)).await);
    assert!(mount(&["umount"]), "the disk is in use by nobody");
    let error = large.unwrap_err();
    assert!(error.code == Code::Full && error.message.contains("disk is full"), "{error}");
    small.expect("fits, once the first is gone");
}
