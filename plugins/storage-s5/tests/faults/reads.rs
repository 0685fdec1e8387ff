//! Reading from portals that are not as they should be.

use std::time::Duration;

use fabstir_plugin_api::prelude::*;
use serde_json::json;

use crate::troublemaker::{Portal, Trouble, Troublemaker};
use crate::{Instance, MIB, noise};

/// A troublemaker and a good portal that both have a blob, an instance that has put it, and one that knows nothing of it.
async fn two_copies(bytes: &[u8]) -> (Troublemaker, Portal, Instance, Instance, String) {
    let (bad, good) = (Troublemaker::start().await, Portal::start(&[]));
    let portals = [&*bad.url, &good.url];
    let knowing = Instance::new(&portals, json!({ "copies": 2 })).await;
    let id = knowing.put(bytes).await.expect("is put").id;
    let stranger = Instance::new(&portals, json!({})).await;
    (bad, good, knowing, stranger, id)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_portal_fails_no_read_when_another_one_is_good() {
    let bytes = noise(3 * MIB + 1000, 1);
    let (bad, _good, knowing, _, id) = two_copies(&bytes).await;
    let middle = 3 * MIB as u64 / 2;
    for trouble in [
        Trouble::OtherBytes { from: 0 },
        Trouble::OtherBytes { from: middle },
        Trouble::Truncated { after: middle },
        Trouble::Truncated { after: 0 },
        Trouble::Breaks { after: middle },
        Trouble::Stalls { after: 0 },
        Trouble::Stalls { after: middle },
        Trouble::Endless,
        Trouble::Status(500),
        Trouble::Status(404),
        Trouble::Status(403),
        Trouble::Status(302),
    ] {
        bad.makes(trouble.clone());
        assert_eq!(knowing.whole(&id).await.as_deref(), Ok(&bytes[..]), "{trouble:?}");
        let (part, error) = knowing.read(&id, 100, Some(2 * MIB as u64)).await;
        assert_eq!((&part[..], error), (&bytes[100..100 + 2 * MIB], None), "{trouble:?}");
        // One that knows nothing of the blob has to fetch it whole first.
        let stranger = Instance::new(&[&bad.url, &_good.url], json!({ "spool_max_bytes": 8 * MIB })).await;
        let (part, error) = stranger.read(&id, middle, Some(10)).await;
        assert_eq!((&part[..], error), (&bytes[middle as usize..][..10], None), "{trouble:?}");
        assert!(bad.requests() >= 3, "it was asked first, each time: {trouble:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_byte_is_given_away_that_is_not_of_the_blob() {
    let bytes = noise(3 * MIB + 1000, 2);
    let bad = Troublemaker::start().await;
    let knowing = Instance::new(&[&bad.url], json!({})).await;
    let id = knowing.put(&bytes).await.expect("is put").id;
    let stranger = Instance::new(&[&bad.url], json!({})).await;

    bad.makes(Trouble::OtherBytes { from: 3 * MIB as u64 / 2 });
    let (came, error) = knowing.read(&id, 0, None).await;
    assert_eq!(error.expect("is told").code, Code::Corrupt);
    assert_eq!(came, bytes[..MIB], "what comes before the wrong byte is right, MiB by MiB");
    let (came, error) = knowing.read(&id, 5, Some(2 * MIB as u64)).await;
    assert_eq!((error.expect("is told").code, came), (Code::Corrupt, bytes[5..MIB].to_vec()));
    let (came, error) = stranger.read(&id, 5, Some(10)).await;
    assert_eq!((error.expect("is told").code, came), (Code::Corrupt, Vec::new()));

    bad.makes(Trouble::Truncated { after: 2000 });
    assert_eq!(stranger.whole(&id).await.unwrap_err().code, Code::Corrupt);
    bad.makes(Trouble::None);
    assert_eq!(stranger.whole(&id).await.as_deref(), Ok(&bytes[..]), "a portal that has mended itself is believed its bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_that_was_read_once_is_read_in_parts_afterwards() {
    let bytes = noise(5 * MIB, 3);
    let (_bad, good, _, _, id) = two_copies(&bytes).await;
    let counter = Troublemaker::before(good).await;
    let stranger = Instance::new(&[&counter.url], json!({})).await;
    assert_eq!(
        stranger.s5.head(&Cx::new(), id.clone()).await.unwrap_err().code,
        Code::NotFound,
        "no word of a portal is passed on as a size"
    );
    assert_eq!(stranger.read(&id, 4 * MIB as u64, Some(3)).await, (bytes[4 * MIB..][..3].to_vec(), None));
    assert_eq!(stranger.s5.head(&Cx::new(), id.clone()).await.map(|entry| entry.size), Ok(5 * MIB as u64));
    // A portal that breaks off later than the one group that is needed.
    counter.makes(Trouble::Breaks { after: MIB as u64 });
    let again = stranger.again().await;
    assert_eq!(again.read(&id, 4 * MIB as u64, Some(3)).await, (bytes[4 * MIB..][..3].to_vec(), None));
    assert_eq!(again.listed().await, 0, "what is only read is not listed");
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_is_missing_only_where_every_portal_says_so() {
    let (bad, good) = (Troublemaker::start().await, Portal::start(&[]));
    let instance = Instance::new(&[&bad.url, &good.url], json!({})).await;
    let nowhere = "0".repeat(64);
    assert_eq!(instance.whole(&nowhere).await.unwrap_err().code, Code::NotFound);
    bad.makes(Trouble::Status(500));
    let error = instance.whole(&nowhere).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable, "{error}");
    assert!(error.message.contains("status 500") && error.retry_after_ms.is_some(), "{error:?}");
    bad.makes(Trouble::TooMany { seconds: 300, times: 1 });
    let busy = instance.whole(&nowhere).await.unwrap_err();
    assert_eq!(busy.code, Code::Overloaded, "{busy}");
    assert!((290_000..=300_000).contains(&busy.retry_after_ms.expect("a time")), "{busy:?}");
    bad.requests();
    instance.whole(&nowhere).await.unwrap_err();
    assert_eq!(bad.requests(), 0, "who wants to be left alone is left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn portal_that_comes_to_no_end_is_given_up_for_the_next_one() {
    let bytes = noise(MIB + 1000, 4);
    let (bad, _good, _, _, id) = two_copies(&bytes).await;
    bad.makes(Trouble::Trickles { pause: Duration::from_millis(500) });
    // A MiB comes within the time, each time, and the end never.
    let stranger = Instance::new(&[&bad.url, &_good.url], json!({ "timeout_ms": 3000 })).await;
    let whole = tokio::time::timeout(Duration::from_secs(60), stranger.whole(&id)).await.expect("the next portal is asked");
    assert_eq!(whole.as_deref(), Ok(&bytes[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn portal_that_sends_without_end_fills_neither_disk_nor_memory() {
    let bad = Troublemaker::start().await;
    let instance = Instance::new(&[&bad.url], json!({ "spool_max_bytes": 4 * MIB })).await;
    bad.makes(Trouble::Endless);
    let error = instance.whole(&"1".repeat(64)).await.unwrap_err();
    assert_eq!(error.code, Code::Full, "{error}");
}
