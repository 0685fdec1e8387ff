//! What storages promise that move pointers.
//!
//! A pointer can be neither deleted nor moved back, so each run has keys of its own. Data is 32 bytes long everywhere, as a blob's id is:
//! there are registries that hold nothing else.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use ed25519_dalek::{Signature, Signer, SigningKey};
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::storage::*;

use super::restarted;
use crate::harness::{During, Harness, patient, refused};
use crate::report::Outcome;

/// Skips where the plugin moves no pointers, which it need not.
fn undeclared(harness: &Harness) -> Option<Outcome> {
    super::undeclared(harness, &["pointer", "pointer_payload", "pointer_set"])
}

/// The holder of a key that no other run has.
struct Holder(SigningKey);

impl Holder {
    fn new(check: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos());
        let seed = blake3::hash(format!("plugin check {check} {} {now}", std::process::id()).as_bytes());
        Self(SigningKey::from_bytes(seed.as_bytes()))
    }

    fn key(&self) -> String {
        self.0.verifying_key().to_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn unsigned(&self, revision: u64, data: &str) -> Pointer {
        Pointer { key: self.key(), revision, data: blake3::hash(data.as_bytes()).as_bytes().to_vec(), signature: Vec::new() }
    }

    /// A pointer with the signature that moves it.
    async fn signed(&self, storage: &dyn Storage, revision: u64, data: &str) -> Result<Pointer> {
        let pointer = self.unsigned(revision, data);
        let payload = storage.pointer_payload(&patient(), pointer.clone()).await.during("pointer_payload")?;
        let signed = storage.pointer_payload(&patient(), Pointer { signature: vec![0; 64], ..pointer.clone() }).await;
        ensure!(signed.during("pointer_payload")? == payload, "what is to be signed depends on the signature");
        Ok(Pointer { signature: self.0.sign(&payload).to_bytes().to_vec(), ..pointer })
    }

    async fn moves(&self, storage: &dyn Storage, revision: u64, data: &str) -> Result<Pointer> {
        let pointer = self.signed(storage, revision, data).await?;
        set(storage, &pointer).await.during(&format!("pointer_set of revision {revision}"))?;
        Ok(pointer)
    }
}

async fn set(storage: &dyn Storage, pointer: &Pointer) -> Result<(), PluginError> {
    storage.pointer_set(&patient(), pointer.clone()).await
}

async fn get(storage: &dyn Storage, key: &str) -> Result<Pointer, PluginError> {
    storage.pointer(&patient(), key.to_owned()).await
}

async fn is_unknown(storage: &dyn Storage, what: &str, key: &str) -> Result<()> {
    refused(what, get(storage, key).await, &[Code::NotFound]).map(drop)
}

pub async fn read_back(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let (holder, other) = (Holder::new("read back"), Holder::new("read back, another"));
    is_unknown(&*storage, "a pointer that was never set", &holder.key()).await?;
    for (revision, data) in [(1, "first"), (2, "second"), (1000, "far"), ((1 << 48) - 1, "last")] {
        let moved = holder.moves(&*storage, revision, data).await?;
        let back = get(&*storage, &holder.key()).await.during("pointer")?;
        ensure!(back == moved, "revision {revision} was set, and {back:?} came back");
    }
    let back = get(&*storage, &holder.key()).await.during("pointer")?;
    let payload = storage.pointer_payload(&patient(), back.clone()).await.during("pointer_payload")?;
    let signature = Signature::from_slice(&back.signature)?;
    ensure!(holder.0.verifying_key().verify_strict(&payload, &signature).is_ok(), "the signature that came back is none");
    is_unknown(&*storage, "another key's pointer that was never set", &other.key()).await?;
    Ok(Outcome::Pass)
}

pub async fn older_is_refused(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let holder = Holder::new("older");
    // So long that it stands in no message by chance, such as in the digits of a key.
    let known = 570_031;
    let kept = holder.moves(&*storage, known, "kept").await?;
    for (what, revision) in
        [("an older revision", known - 1), ("the first revision", 1), ("other data at the known revision", known)]
    {
        let pointer = holder.signed(&*storage, revision, "other").await?;
        let error = refused(&format!("pointer_set of {what}"), set(&*storage, &pointer).await, &[Code::InvalidArgument])?;
        ensure!(error.message.contains(&known.to_string()), "the known revision, {known}, is not named: {error}");
        ensure!(get(&*storage, &holder.key()).await.during("pointer")? == kept, "{what} was refused, and moved the pointer");
    }
    holder.moves(&*storage, known + 1, "newer").await?;
    Ok(Outcome::Pass)
}

pub async fn forged_is_refused(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let (holder, other) = (Holder::new("forged"), Holder::new("forged, another"));
    let good = holder.signed(&*storage, 5, "good").await?;
    let mut bent = good.signature.clone();
    bent[40] ^= 1;
    for (what, forged) in [
        ("a changed signature", Pointer { signature: bent, ..good.clone() }),
        ("no signature", Pointer { signature: Vec::new(), ..good.clone() }),
        ("a signature of 63 bytes", Pointer { signature: good.signature[..63].to_vec(), ..good.clone() }),
        ("a signature of zeros", Pointer { signature: vec![0; 64], ..good.clone() }),
        ("the signature of another revision", Pointer { revision: 6, ..good.clone() }),
        ("the signature of other data", Pointer { data: vec![7; 32], ..good.clone() }),
        ("another's signature", Pointer { signature: other.signed(&*storage, 5, "good").await?.signature, ..good.clone() }),
    ] {
        refused(&format!("pointer_set with {what}"), set(&*storage, &forged).await, &[Code::InvalidArgument])?;
        is_unknown(&*storage, &format!("the pointer after pointer_set with {what}"), &holder.key()).await?;
    }
    set(&*storage, &good).await.during("pointer_set")?;
    ensure!(get(&*storage, &holder.key()).await.during("pointer")? == good, "another pointer came back");
    Ok(Outcome::Pass)
}

pub async fn senseless_is_refused(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let holder = Holder::new("senseless");
    let good = holder.signed(&*storage, 5, "good").await?;
    let key = holder.key();
    // The second coordinate of no point of the curve.
    let no_point = format!("02{}", "0".repeat(62));
    let invalid = &[Code::InvalidArgument];
    for bad in ["", "no key", "../../etc/passwd", &key[1..], &format!("{key}00"), &key.replace(|_| true, "G"), &no_point] {
        let pointer = Pointer { key: bad.to_owned(), ..good.clone() };
        refused(
            &format!("pointer_payload of the key {bad:?}"),
            storage.pointer_payload(&patient(), pointer.clone()).await,
            invalid,
        )?;
        refused(&format!("pointer_set of the key {bad:?}"), set(&*storage, &pointer).await, invalid)?;
        let codes = &[Code::InvalidArgument, Code::NotFound];
        refused(&format!("pointer of the key {bad:?}"), get(&*storage, bad).await, codes)?;
    }
    for (what, pointer) in [
        ("a revision of 2^48", Pointer { revision: 1 << 48, ..good.clone() }),
        ("49 bytes of data", Pointer { data: vec![1; 49], ..good.clone() }),
    ] {
        refused(&format!("pointer_payload of {what}"), storage.pointer_payload(&patient(), pointer.clone()).await, invalid)?;
        refused(&format!("pointer_set of {what}"), set(&*storage, &pointer).await, invalid)?;
    }
    is_unknown(&*storage, "the pointer after all that", &key).await?;
    Ok(Outcome::Pass)
}

pub async fn survive_restart(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let holder = Holder::new("restart");
    let moved = holder.moves(&*storage, 9, "before").await?;
    let next = restarted(harness, instance).await?;
    let storage = next.client::<dyn Storage>();
    ensure!(get(&*storage, &holder.key()).await.during("pointer after a restart")? == moved, "a restart changed the pointer");
    let old = holder.signed(&*storage, 8, "older").await?;
    refused("an older revision after a restart", set(&*storage, &old).await, &[Code::InvalidArgument])?;
    holder.moves(&*storage, 10, "after").await?;
    Ok(Outcome::Pass)
}
