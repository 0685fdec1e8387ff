//! What the storage kind promises.
//!
//! The configuration may point to a store that is in use: checks delete what they put, and tolerate what else is there.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::frame::{Kind, Writer};
use fabstir_plugin_api::storage::*;
use fabstir_plugin_api::stream::Stream;

pub mod pointers;
pub mod vectors;

use super::streams::LongStream;
use crate::harness::{During, Harness, Instance, patient, refused, told};
use crate::process;
use crate::report::Outcome;

/// The largest piece that a stream of bytes may have.
const PIECE: usize = 1 << 20;

/// A well-formed id that no bytes have which a check puts.
const NOWHERE: &str = "00000000000000000000000000000000000000000000000000000000000000ff";

/// Skips where the plugin does not declare these methods, which it need not.
fn undeclared(harness: &Harness, methods: &[&str]) -> Option<Outcome> {
    let storages = harness.manifest.provides.iter().filter(|provided| provided.kind == "storage");
    let declared: Vec<&str> = storages.flat_map(|provided| &provided.methods).map(String::as_str).collect();
    let missing = methods.iter().find(|method| !declared.contains(method));
    missing.map(|method| Outcome::skip(format!("the plugin does not declare `{method}`")))
}

/// The instance that comes after another has ended, on its state.
async fn restarted(harness: &Harness, instance: Instance) -> Result<Instance> {
    let state_dir = instance.state_dir().to_owned();
    instance.shutdown().await?;
    let next = harness.connect_in(state_dir)?;
    next.configure(next.config()).await.during("configure")?;
    Ok(next)
}

/// Bytes that look random, are the same in every run, and are found nowhere else.
fn noise(size: usize, seed: &str) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new().update(b"fabstir plugin check ").update(seed.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn id_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Bytes as a stream in pieces of `piece` bytes.
fn pieces(bytes: &[u8], piece: usize) -> Stream<Blob> {
    let pieces: Vec<Blob> = bytes.chunks(piece).map(Blob::from).collect();
    Stream::from_items(pieces)
}

async fn put(storage: &dyn Storage, bytes: &[u8]) -> Result<Entry, PluginError> {
    storage.put(&patient(), Expect::default(), pieces(bytes, PIECE)).await
}

async fn get(storage: &dyn Storage, id: &str, range: Range) -> Result<Vec<u8>, PluginError> {
    let mut stream = storage.get(&patient(), id.to_owned(), range).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        if piece.len() > PIECE {
            return Err(PluginError::internal(format!("a piece of {} bytes, over the limit of 1 MiB", piece.len())));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

async fn remove(storage: &dyn Storage, id: &str) -> Result<bool> {
    storage.delete(&patient(), id.to_owned()).await.during("delete")
}

async fn is_absent(storage: &dyn Storage, what: &str, id: &str) -> Result<()> {
    refused(what, storage.head(&patient(), id.to_owned()).await, &[Code::NotFound]).map(drop)
}

pub(super) async fn exercise(instance: &Instance) -> Result<()> {
    let storage = instance.client::<dyn Storage>();
    let bytes = noise(5000, "exercise");
    let entry = put(&*storage, &bytes).await.during("put")?;
    ensure!(entry == Entry { id: id_of(&bytes), size: 5000 }, "put of 5000 bytes answered {entry:?}");
    ensure!(storage.head(&patient(), entry.id.clone()).await.during("head")? == entry, "head differs from what put said");
    ensure!(get(&*storage, &entry.id, Range::default()).await.during("get")? == bytes, "get gives other bytes than were put");
    let listed = storage.list(&patient()).await.during("list")?.collect().await.during("list")?;
    ensure!(listed.contains(&entry), "list does not have what was put");
    ensure!(remove(&*storage, &entry.id).await?, "delete says that the blob was not there");
    Ok(())
}

pub(super) async fn long_stream(instance: &Instance) -> Result<LongStream> {
    stream_of(instance, 8 * PIECE).await
}

/// A read of a blob of this size.
pub(super) async fn stream_of(instance: &Instance, size: usize) -> Result<LongStream> {
    let storage = instance.client::<dyn Storage>();
    let entry = storage.put(&patient(), Expect::default(), endless("long", size)).await.during("put")?;
    let arguments = Box::new(move |writer: &mut Writer| {
        writer.value(&entry.id)?;
        writer.value(&Range::default())
    });
    Ok(LongStream { method: "storage.get", arguments, parallel: 32, takes_stream: false, _partner: None })
}

/// A consumer that stops for a while and then reads on, over the session as the node uses it, gets all the bytes.
pub(super) async fn pausing_reader(instance: &Instance) -> Result<()> {
    const SIZE: usize = 32 * PIECE;
    let storage = instance.client::<dyn Storage>();
    let entry = storage.put(&patient(), Expect::default(), endless("pausing", SIZE)).await.during("put")?;
    let mut stream = storage.get(&patient(), entry.id.clone(), Range::default()).await.during("get")?;
    let mut bytes = 0;
    while let Some(piece) = stream.next().await {
        if bytes == 0 {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        bytes += piece.during("get by a consumer that pauses")?.len();
    }
    ensure!(bytes == SIZE, "a consumer that pauses got {bytes} of {SIZE} bytes");
    remove(&*storage, &entry.id).await.map(drop)
}

/// `size` bytes, made piece by piece as they are read.
fn endless(seed: &'static str, size: usize) -> Stream<Blob> {
    let count = size.div_ceil(PIECE);
    Stream::from_items((0..count).map(move |number| {
        let length = PIECE.min(size - number * PIECE);
        Blob::from(noise(length, &format!("{seed} {number}")))
    }))
}

pub(super) async fn hundred(instance: &Instance) -> Result<()> {
    let storage = instance.client::<dyn Storage>();
    let calls = (0..100usize).map(|number| {
        let storage = storage.clone();
        async move {
            let bytes = noise(100 * number, &format!("hundred {number}"));
            let entry = put(&*storage, &bytes).await.during("put")?;
            ensure!(entry.id == id_of(&bytes), "put {number} answered with the id of another");
            let back = get(&*storage, &entry.id, Range::default()).await.during("get")?;
            ensure!(back == bytes, "get {number} gives the bytes of another");
            remove(&*storage, &entry.id).await
        }
    });
    futures::future::try_join_all(calls).await.map(drop)
}

pub async fn put_get_round_trip(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    for (size, piece) in [(0, 1), (1, 1), (1000, 7), (PIECE, PIECE), (3 * PIECE + 7, PIECE), (3 * PIECE + 7, 50_000)] {
        let bytes = noise(size, "round trip");
        let entry = storage.put(&patient(), Expect::default(), pieces(&bytes, piece)).await.during("put")?;
        ensure!(entry == Entry { id: id_of(&bytes), size: size as u64 }, "put of {size} bytes answered {entry:?}");
        let back = get(&*storage, &entry.id, Range::default()).await.during("get")?;
        ensure!(back == bytes, "{size} bytes put, {} other bytes came back", back.len());
        ensure!(storage.head(&patient(), entry.id.clone()).await.during("head")? == entry, "head differs from what put said");
        remove(&*storage, &entry.id).await?;
    }
    let empty_pieces = [&b"ab"[..], b"", b"", b"c"].map(Blob::from);
    let entry = storage.put(&patient(), Expect::default(), Stream::from_items(empty_pieces)).await.during("put")?;
    ensure!(entry == Entry { id: id_of(b"abc"), size: 3 }, "pieces without bytes change the blob");

    // What was put is there after a restart.
    instance.plugin.shutdown(&patient()).await.during("shutdown")?;
    let state_dir = instance.state_dir().to_owned();
    drop(instance);
    let next = harness.connect_in(state_dir)?;
    next.configure(next.config()).await.during("configure")?;
    let storage = next.client::<dyn Storage>();
    let back = get(&*storage, &entry.id, Range::default()).await.during("get after a restart")?;
    ensure!(back == b"abc", "a restart changed the bytes");
    remove(&*storage, &entry.id).await?;
    Ok(Outcome::Pass)
}

pub async fn ranges(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let bytes = noise(PIECE + 1000, "ranges");
    let size = bytes.len();
    let id = put(&*storage, &bytes).await.during("put")?.id;
    let lengths = [None, Some(0), Some(1), Some(1000), Some(PIECE), Some(size), Some(usize::MAX)];
    for offset in [0, 1, 999, PIECE - 1, PIECE, size - 1, size] {
        for length in lengths {
            let range = Range { offset: offset as u64, length: length.map(|length| length as u64) };
            let expected = &bytes[offset..length.map_or(size, |length| size.min(offset.saturating_add(length)))];
            let part = get(&*storage, &id, range).await.during(&format!("get of {range:?}"))?;
            ensure!(part == expected, "{range:?} of {size} bytes gave {} bytes, {} were due", part.len(), expected.len());
        }
    }
    for offset in [size as u64 + 1, u64::MAX] {
        let range = Range { offset, length: Some(1) };
        refused("a range past the end", get(&*storage, &id, range).await, &[Code::InvalidArgument])?;
    }
    remove(&*storage, &id).await?;
    Ok(Outcome::Pass)
}

pub async fn missing_is_not_found(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    refused("get of a missing blob", get(&*storage, NOWHERE, Range::default()).await, &[Code::NotFound])?;
    is_absent(&*storage, "head of a missing blob", NOWHERE).await?;
    ensure!(!remove(&*storage, NOWHERE).await?, "delete says that a missing blob was there");

    let climbing = format!("../../../{}", &NOWHERE[9..]);
    let upper = NOWHERE.to_uppercase();
    let malformed =
        ["", ".", "..", "/etc/passwd", "../../../../../../../../etc/passwd", &climbing, &upper, &NOWHERE[1..], "\0", "%2e%2e"];
    for id in malformed {
        let codes = &[Code::InvalidArgument, Code::NotFound];
        refused(&format!("get of the id {id:?}"), get(&*storage, id, Range::default()).await, codes)?;
        refused(&format!("head of the id {id:?}"), storage.head(&patient(), id.into()).await, codes)?;
        match storage.delete(&patient(), id.into()).await {
            Ok(false) => {}
            answer => drop(refused(&format!("delete of the id {id:?}"), answer, codes)?),
        }
    }
    Ok(Outcome::Pass)
}

pub async fn wrong_expectation_stores_nothing(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let bytes = noise(200_000, "expectation");
    let (id, size) = (id_of(&bytes), bytes.len() as u64);
    remove(&*storage, &id).await?;
    let expecting = |id: Option<&str>, size: Option<u64>| {
        let expect = Expect { id: id.map(str::to_owned), size };
        let (storage, data) = (storage.clone(), pieces(&bytes, 10_000));
        async move { storage.put(&patient(), expect, data).await }
    };
    for (what, expected, announced) in [
        ("put of bytes with another id", Some(NOWHERE), None),
        ("put with an id that is none", Some("no id"), None),
        ("put of more bytes than announced", None, Some(size - 1)),
        ("put of fewer bytes than announced", None, Some(size + 1)),
    ] {
        refused(what, expecting(expected, announced).await, &[Code::InvalidArgument])?;
        is_absent(&*storage, &format!("head after {what}"), &id).await?;
        is_absent(&*storage, &format!("head of the announced id after {what}"), NOWHERE).await?;
    }
    let entry = expecting(Some(&id), Some(size)).await.during("put with the right id and size")?;
    ensure!(entry == Entry { id: id.clone(), size }, "put answered {entry:?}");
    remove(&*storage, &id).await?;
    Ok(Outcome::Pass)
}

pub async fn put_twice(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let bytes = noise(300_000, "twice");
    let first = put(&*storage, &bytes).await.during("put")?;
    ensure!(put(&*storage, &bytes).await.during("a second put")? == first, "a second put gives another answer");
    remove(&*storage, &first.id).await?;

    let at_once = (0..16).map(|_| put(&*storage, &bytes));
    for entry in futures::future::join_all(at_once).await {
        ensure!(entry.during("16 puts of one blob at once")? == first, "puts at once give different answers");
    }
    let back = get(&*storage, &first.id, Range::default()).await.during("get")?;
    ensure!(back == bytes, "16 puts at once damaged the blob");
    let listed = storage.list(&patient()).await.during("list")?.collect().await.during("list")?;
    let count = listed.iter().filter(|entry| entry.id == first.id).count();
    ensure!(count == 1, "the blob is listed {count} times");
    ensure!(remove(&*storage, &first.id).await?, "the blob was not there");
    is_absent(&*storage, "head after one delete", &first.id).await?;
    Ok(Outcome::Pass)
}

pub async fn delete(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let (kept, bytes) = (noise(1000, "kept"), noise(1000, "deleted"));
    let kept = put(&*storage, &kept).await.during("put")?.id;
    let id = put(&*storage, &bytes).await.during("put")?.id;
    ensure!(remove(&*storage, &id).await?, "delete says that the blob was not there");
    ensure!(!remove(&*storage, &id).await?, "a second delete says that the blob was there");
    is_absent(&*storage, "head of a deleted blob", &id).await?;
    refused("get of a deleted blob", get(&*storage, &id, Range::default()).await, &[Code::NotFound])?;
    storage.head(&patient(), kept.clone()).await.during("head of another blob")?;
    put(&*storage, &bytes).await.during("put after delete")?;
    ensure!(get(&*storage, &id, Range::default()).await.during("get after a second put")? == bytes, "other bytes came back");
    remove(&*storage, &id).await?;
    remove(&*storage, &kept).await?;
    Ok(Outcome::Pass)
}

pub async fn list_in_order(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let mut ours = Vec::new();
    for number in 0..300usize {
        ours.push(put(&*storage, &noise(number, &format!("list {number}"))).await.during("put")?);
    }
    let mut listed = storage.list(&patient()).await.during("list")?.collect().await.during("list")?;
    ensure!(listed.windows(2).all(|pair| pair[0].id < pair[1].id), "the list is not in order of id, or has a blob twice");
    let mine: std::collections::BTreeSet<&str> = ours.iter().map(|entry| entry.id.as_str()).collect();
    listed.retain(|entry| mine.contains(entry.id.as_str()));
    ours.sort_by(|a, b| a.id.cmp(&b.id));
    ours.dedup();
    ensure!(listed == ours, "{} blobs put, {} of them listed, or with other sizes", ours.len(), listed.len());

    let mut unread = storage.list(&patient()).await.during("list")?;
    unread.next().await.context("the second list is empty")?.during("list")?;
    drop(unread);
    for entry in &ours {
        ensure!(remove(&*storage, &entry.id).await?, "a listed blob was not there");
    }
    Ok(Outcome::Pass)
}

pub async fn large_blob_in_bounded_memory(harness: &Harness) -> Result<Outcome> {
    const SIZE: usize = 256 << 20;
    const ALLOWED: u64 = 64 << 20;
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    exercise(&instance).await?;
    let Ok(before) = process::resident() else { return Ok(Outcome::skip("this system does not tell a process's memory")) };

    let sample = process::Peak::watch()?;
    let entry = match storage.put(&patient(), Expect { id: None, size: Some(SIZE as u64) }, endless("large", SIZE)).await {
        Ok(entry) => entry,
        Err(error) if error.code == Code::Full => return Ok(Outcome::skip(error.message)),
        Err(error) => bail!("put: {}", told(&error)),
    };
    ensure!(entry.size == SIZE as u64, "put of {SIZE} bytes answered {}", entry.size);
    let mut stream = storage.get(&patient(), entry.id.clone(), Range::default()).await.during("get")?;
    let mut hasher = blake3::Hasher::new();
    while let Some(piece) = stream.next().await {
        hasher.update(&piece.during("get")?);
    }
    ensure!(hasher.finalize().to_hex().as_str() == entry.id, "the bytes that came back have another id");
    let grown = sample.highest().saturating_sub(before);
    remove(&*storage, &entry.id).await?;
    let (size, grown_mib) = (process::mib(SIZE as u64), process::mib(grown));
    ensure!(grown < ALLOWED, "memory grew by {grown_mib} for a blob of {size}");
    eprintln!("memory grew by {grown_mib} for a blob of {size}");
    Ok(Outcome::Pass)
}

pub async fn cancelled_put_stores_nothing(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let bytes = noise(3 * PIECE, "cancelled");
    let id = id_of(&bytes);
    remove(&*storage, &id).await?;

    // All bytes have come and the end has not: the caller gives up.
    let (sender, data) = Stream::channel(4);
    let cx = patient();
    let put = storage.put(&cx, Expect::default(), data);
    let feed = async {
        for piece in bytes.chunks(PIECE) {
            sender.send(Blob::from(piece)).await.during("sending a piece")?;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        anyhow::Ok(())
    };
    tokio::select! {
        answer = put => bail!("put ended before its bytes did: {answer:?}"),
        fed = feed => fed?,
    }
    is_absent(&*storage, "head after a cancelled put", &id).await?;

    // The bytes end with an error.
    let (sender, data) = Stream::channel(4);
    let feed = async {
        for piece in bytes.chunks(PIECE) {
            sender.send(Blob::from(piece)).await.during("sending a piece")?;
        }
        sender.fail(PluginError::internal("the source of the bytes failed")).await;
        anyhow::Ok(())
    };
    let (answer, fed) = tokio::join!(storage.put(&cx, Expect::default(), data), feed);
    fed?;
    if let Ok(entry) = answer {
        bail!("put of bytes that ended with an error stored {} of them", entry.size);
    }
    is_absent(&*storage, "head after a put whose bytes failed", &id).await?;
    exercise(&instance).await?;
    instance.drain(Duration::from_secs(5)).await?;
    Ok(Outcome::Pass)
}

/// A put whose bytes never end is over at its deadline.
pub(super) async fn late_put(harness: &Harness) -> Result<()> {
    let instance = harness.start().await?;
    let deadline = Duration::from_millis(300);
    let mut call = instance.raw("storage.put", Some(deadline), 0, |writer| writer.value(&Expect::default()))?;
    loop {
        let head = call.next_of(deadline + Duration::from_secs(2)).await?;
        match (head.kind, head.error) {
            // Leave to send bytes, and the news that no more are wanted.
            (Kind::Credit | Kind::Cancel, _) => {}
            (Kind::Reply, Some(error)) if error.code == Code::DeadlineExceeded => break,
            (kind, error) => bail!("a put that is late was answered with {kind:?} {error:?}, not with DeadlineExceeded"),
        }
    }
    let storage: Arc<dyn Storage> = instance.client();
    is_absent(&*storage, "head of no bytes after a late put", &id_of(b"")).await?;
    instance.drain(Duration::from_secs(5)).await
}
