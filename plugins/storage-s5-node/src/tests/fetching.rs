//! Blobs that another node has.

use std::os::unix::fs::FileExt;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn blob_that_a_peer_keeps_is_read_as_if_it_were_here() {
    let (host, guest) = pair().await;
    for (size, seed) in [(0, 1), (1, 2), (3 * MIB + 17, 3)] {
        let bytes = noise(size, seed);
        let id = host.put(&bytes).await.expect("is put");
        assert_eq!(guest.whole(&id).await.as_deref(), Ok(&bytes[..]), "{size}");
    }
    let bytes = noise(3 * MIB + 17, 3);
    let id = blake3::hash(&bytes).to_hex();
    let part = guest.read(&id, 2 * MIB as u64, Some(5)).await;
    assert_eq!(part, (bytes[2 * MIB..][..5].to_vec(), None));
    let past = guest.read(&id, 4 * MIB as u64, None).await.1.expect("is told");
    assert_eq!(past.code, Code::InvalidArgument);

    assert_eq!(guest.listed().await, 0, "what is only read is not kept");
    assert_eq!(guest.s5.head(&Cx::new(), id.to_string()).await.unwrap_err().code, Code::NotFound);
    assert_eq!(guest.s5.delete(&Cx::new(), id.to_string()).await, Ok(false));
    assert_eq!(std::fs::read_dir(guest.state.path().join("blobs/.tmp")).unwrap().count(), 0, "nor left behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn public_node_serves_everybody_and_takes_from_nobody() {
    let host = Instance::new(json!({ "serve_public": true })).await;
    let guest = Instance::new(json!({ "peers": [host.as_peer().await] })).await;
    let id = host.put(b"for all").await.expect("is put");
    assert_eq!(guest.whole(&id).await.as_deref(), Ok(&b"for all"[..]));
    let many = (0..20).map(|_| guest.whole(&id));
    for came in futures::future::join_all(many).await {
        assert_eq!(came.as_deref(), Ok(&b"for all"[..]));
    }
    assert_eq!(guest.whole(&"0".repeat(64)).await.unwrap_err().code, Code::NotFound, "the peer says that it has none");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_at_a_peer_is_not_there() {
    let (host, guest) = pair().await;
    let bytes = noise(2 * MIB, 5);
    let id = host.put(&bytes).await.expect("is put");
    assert_eq!(guest.whole(&id).await.as_deref(), Ok(&bytes[..]));
    let file = std::fs::OpenOptions::new().write(true).open(host.file(&id)).expect("it is there");
    file.write_all_at(b"!", MIB as u64).expect("is written");
    let error = guest.whole(&id).await.unwrap_err();
    assert_eq!(error.code, Code::NotFound, "nobody is sent a byte of it: {error}");
    let (came, error) = host.read(&id, 0, None).await;
    assert_eq!(error.expect("is told").code, Code::Corrupt);
    assert_eq!(came.len(), MIB, "the last piece is held back");
    file.set_len(MIB as u64).expect("is cut");
    assert_eq!(guest.whole(&id).await.unwrap_err().code, Code::NotFound);
    assert_eq!(host.whole(&id).await.unwrap_err().code, Code::Corrupt);

    host.put(&bytes).await.expect("a put repairs it");
    assert_eq!(guest.whole(&id).await.as_deref(), Ok(&bytes[..]));
    assert_eq!(host.s5.delete(&Cx::new(), id.clone()).await, Ok(true));
    assert_eq!(guest.whole(&id).await.unwrap_err().code, Code::NotFound);
}

/// A blob that is too large to be read through while another node waits.
const LARGE: usize = 16 * MIB + 5;

#[tokio::test(flavor = "multi_thread")]
async fn large_blob_of_before_the_start_is_sent_while_it_is_checked() {
    let (host, guest) = pair().await;
    let bytes = noise(LARGE, 7);
    let id = host.put(&bytes).await.expect("is put");
    let known = |host: &Instance| {
        let store = &host.s5.node.store;
        let id = blob_folder::Id::parse(&id).expect("an id");
        let opened = store.open_file(id).expect("is read").expect("is there");
        store.verdict(id, opened.stamp)
    };
    assert_eq!(known(&host), Some(true), "what was put needs no second look");
    let mut config = host.config.clone();
    config["listen"] = host.address().await.1.to_string().into();
    let host = host.again(config.clone()).await;
    wait_until_ready(&host.s5).await;
    assert_eq!(known(&host), None);
    let part = guest.read(&id, 5, Some(10)).await;
    assert_eq!(part, (bytes[5..15].to_vec(), None));
    assert_eq!(known(&host), Some(true), "it was checked on its way");

    let host = host.again(config).await;
    wait_until_ready(&host.s5).await;
    let file = std::fs::OpenOptions::new().write(true).open(host.file(&id)).expect("it is there");
    file.write_all_at(b"!!", 3 * MIB as u64).expect("is written");
    let error = guest.whole(&id).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable, "it breaks off before its end: {error}");
    assert_eq!(known(&host), Some(false));
    assert_eq!(guest.whole(&id).await.unwrap_err().code, Code::NotFound, "from then on it is not there");
    host.put(&bytes).await.expect("a put repairs it");
    assert_eq!(guest.whole(&id).await.as_deref(), Ok(&bytes[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn s5s_own_client_reads_parts() {
    let bytes = noise(3 * MIB, 11);
    let guest = Instance::new(json!({})).await;
    let public = Instance::new(json!({ "serve_public": true })).await;
    let id = public.put(&bytes).await.expect("is put");
    let (node, address) = public.address().await;
    let address = iroh::EndpointAddr::new(node.parse().expect("an id")).with_ip_addr(address);
    let client = s5_blobs::Client::connect_with_addr(guest.s5.node.endpoint(), address, s5_blobs::ALPN_PUBLIC);
    let hash = crate::layout::hash(blob_folder::Id::parse(&id).expect("an id"));
    let part = client.download_bytes(hash, MIB as u64, Some(100)).await.expect("is read");
    assert_eq!(part, bytes[MIB..][..100]);
}

#[tokio::test(flavor = "multi_thread")]
async fn fetched_blob_takes_no_more_disk_than_is_allowed() {
    let (host, guest) = pair().await;
    let id = host.put(&noise(2 * MIB, 6)).await.expect("is put");
    let peers = json!([host.as_peer().await]);
    let guest = guest.again(json!({ "peers": peers, "max_bytes": MIB })).await;
    assert_eq!(guest.whole(&id).await.unwrap_err().code, Code::Full);
    let guest = guest.again(json!({ "peers": [host.as_peer().await], "max_bytes": 3 * MIB })).await;
    for _ in 0..3 {
        guest.whole(&id).await.expect("its room is given back each time");
    }
}

/// The memory that this process has had at most since the last call.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("is told");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("is told");
    let peak: usize = line.trim().trim_end_matches(" kB").parse().expect("a number");
    std::fs::write("/proc/self/clear_refs", "5").expect("is reset");
    peak << 10
}

#[tokio::test(flavor = "multi_thread")]
async fn large_blob_passes_through_in_bounded_memory() {
    if std::env::var_os("NEXTEST").is_none() {
        eprintln!("skipped: the memory of this process is not this test's alone; `cargo nextest run` gives it one");
        return;
    }
    const SIZE: usize = 64 * MIB;
    let (host, guest) = pair().await;
    let id = host.put(&noise(MIB, 8)).await.expect("is put");
    guest.whole(&id).await.expect("is fetched");
    peak();
    let before = peak();
    let pieces = (0..SIZE / MIB).map(|seed| Blob::from(noise(MIB, seed as u8)));
    let expect = Expect { id: None, size: Some(SIZE as u64) };
    let entry = host.s5.put(&Cx::new(), expect, Stream::from_items(pieces)).await.expect("is put");
    let mut stream = guest.s5.get(&Cx::new(), entry.id.clone(), Range::default()).await.expect("is fetched");
    let mut hasher = blake3::Hasher::new();
    while let Some(piece) = stream.next().await {
        hasher.update(&piece.expect("comes"));
    }
    assert_eq!(hasher.finalize().to_hex().as_str(), entry.id);
    let grown = peak().saturating_sub(before) / MIB;
    println!("memory of both nodes grew by {grown} MiB for a blob of 64 MiB");
    assert!(grown < 32, "memory of both nodes grew by {grown} MiB for a blob of 64 MiB");
}
