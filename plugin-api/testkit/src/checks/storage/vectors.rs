//! What storages promise that keep vectors.
//!
//! Namespaces here have names of their own and are deleted afterwards, so that a store in use may be checked.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::storage::*;

use super::restarted;
use crate::harness::{During, Harness, patient, refused};
use crate::report::Outcome;

const DIMENSIONS: usize = 48;

/// How far a similarity may be from the exact one.
const TOLERANCE: f64 = 1e-3;

/// Skips where the plugin keeps no vectors, which it need not.
fn undeclared(harness: &Harness) -> Option<Outcome> {
    super::undeclared(harness, &["vectors_put", "vectors_find", "vectors_delete"])
}

fn named(check: &str) -> String {
    format!("plugin check {check}")
}

/// Numbers from -1 to 1 that look random and are the same in every run.
fn values(seed: u64, dimensions: usize) -> Vec<f32> {
    let bytes = super::noise(dimensions * 4, &format!("vector {seed}"));
    bytes.as_chunks().0.iter().map(|number| (f64::from(i32::from_le_bytes(*number)) / f64::from(i32::MAX)) as f32).collect()
}

fn vector(seed: u64) -> Vector {
    Vector { key: format!("key {seed}"), values: values(seed, DIMENSIONS), data: seed.to_le_bytes().to_vec() }
}

fn vectors(seeds: std::ops::Range<u64>) -> Vec<Vector> {
    seeds.map(vector).collect()
}

async fn put(storage: &dyn Storage, namespace: &str, vectors: Vec<Vector>) -> Result<(), PluginError> {
    storage.vectors_put(&patient(), namespace.to_owned(), vectors).await
}

async fn find(storage: &dyn Storage, namespace: &str, values: Vec<f32>, limit: u32) -> Result<Vec<Near>, PluginError> {
    storage.vectors_find(&patient(), namespace.to_owned(), VectorQuery { values, limit, at_least: None }).await
}

/// Deletes some vectors, or all.
async fn remove(storage: &dyn Storage, namespace: &str, keys: Option<&[String]>) -> Result<u64> {
    storage.vectors_delete(&patient(), namespace.to_owned(), keys.map(<[String]>::to_vec)).await.during("vectors_delete")
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let product = |x: &[f32], y: &[f32]| -> f64 { x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum() };
    product(a, b) / (product(a, a) * product(b, b)).sqrt()
}

/// Compares what was found with a look at every vector that is stored.
fn compare(stored: &BTreeMap<String, Vector>, values: &[f32], limit: usize, found: &[Near]) -> Result<()> {
    let mut exact: Vec<f64> = stored.values().map(|vector| cosine(values, &vector.values)).collect();
    exact.sort_by(|a, b| b.total_cmp(a));
    exact.truncate(limit);
    ensure!(found.len() == exact.len(), "{} of {} vectors found where {limit} were wanted", found.len(), stored.len());
    for (near, exact) in found.iter().zip(exact) {
        let Some(vector) = stored.get(&near.key) else { anyhow::bail!("`{}` was found and is not stored", near.key) };
        ensure!(near.data == vector.data, "`{}` came with the data of another", near.key);
        let own = cosine(values, &vector.values);
        let told = f64::from(near.similarity);
        ensure!((told - own).abs() < TOLERANCE, "the similarity of `{}` is {own}, not {told}", near.key);
        ensure!((own - exact).abs() < TOLERANCE, "`{}`, similar by {own}, was found where one by {exact} was due", near.key);
    }
    Ok(())
}

fn by_key(vectors: Vec<Vector>) -> BTreeMap<String, Vector> {
    vectors.into_iter().map(|vector| (vector.key.clone(), vector)).collect()
}

pub async fn round_trip(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let name = named("round trip");
    remove(&*storage, &name, None).await?;
    ensure!(
        find(&*storage, &name, values(1, DIMENSIONS), 10).await.during("vectors_find")?.is_empty(),
        "an empty namespace gives some"
    );
    ensure!(remove(&*storage, &name, None).await? == 0, "an empty namespace had vectors to delete");

    put(&*storage, &name, vectors(0..20)).await.during("vectors_put")?;
    let mut stored = by_key(vectors(0..20));
    let found = find(&*storage, &name, values(7, DIMENSIONS), 3).await.during("vectors_find")?;
    compare(&stored, &values(7, DIMENSIONS), 3, &found)?;
    ensure!(
        found[0].key == "key 7" && f64::from(found[0].similarity) > 1.0 - TOLERANCE,
        "a stored vector is not its own nearest"
    );

    // Only the direction counts; and what is not similar enough is left out.
    let longer = values(7, DIMENSIONS).iter().map(|value| value * 1000.0).collect();
    let query = VectorQuery { values: longer, limit: 1000, at_least: Some(0.99) };
    let found = storage.vectors_find(&patient(), name.clone(), query).await.during("vectors_find with `at_least`")?;
    ensure!(found.len() == 1 && found[0].key == "key 7", "`at_least` 0.99 gave {} vectors", found.len());

    // A vector under a stored key takes its place.
    let other = Vector { key: "key 7".into(), ..vector(77) };
    put(&*storage, &name, vec![other.clone()]).await.during("vectors_put of a stored key")?;
    stored.insert("key 7".into(), other);
    for seed in [7, 77] {
        let found = find(&*storage, &name, values(seed, DIMENSIONS), 1000).await.during("vectors_find")?;
        compare(&stored, &values(seed, DIMENSIONS), 1000, &found)?;
    }
    ensure!(remove(&*storage, &name, None).await? == 20, "a whole namespace of 20 vectors had another number to delete");
    ensure!(
        find(&*storage, &name, values(1, DIMENSIONS), 10).await.during("vectors_find")?.is_empty(),
        "a deleted namespace gives some"
    );
    Ok(Outcome::Pass)
}

pub async fn nearest_first(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let name = named("nearest first");
    remove(&*storage, &name, None).await?;
    put(&*storage, &name, vectors(0..500)).await.during("vectors_put")?;
    let stored = by_key(vectors(0..500));
    for seed in 1000..1030 {
        for limit in [1, 10, 100] {
            let values = values(seed, DIMENSIONS);
            let found = find(&*storage, &name, values.clone(), limit).await.during("vectors_find")?;
            compare(&stored, &values, limit as usize, &found)?;
        }
    }
    ensure!(remove(&*storage, &name, None).await? == 500, "500 vectors were put, another number was there");
    Ok(Outcome::Pass)
}

pub async fn namespaces_are_apart(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let (one, other) = (named("one"), named("one/other"));
    for name in [&one, &other] {
        remove(&*storage, name, None).await?;
    }
    put(&*storage, &one, vectors(0..10)).await.during("vectors_put")?;
    let short = Vector { key: "key 1".into(), values: vec![1.0, 2.0, 3.0], data: vec![] };
    put(&*storage, &other, vec![short]).await.during("vectors_put of another length in another namespace")?;
    let found = find(&*storage, &other, vec![1.0, 2.0, 3.0], 1000).await.during("vectors_find")?;
    ensure!(found.len() == 1 && found[0].data.is_empty(), "a namespace of one vector gave {}", found.len());
    ensure!(remove(&*storage, &other, None).await? == 1, "a namespace of one vector had another number to delete");
    let found = find(&*storage, &one, values(1, DIMENSIONS), 1000).await.during("vectors_find")?;
    compare(&by_key(vectors(0..10)), &values(1, DIMENSIONS), 1000, &found)?;
    ensure!(remove(&*storage, &one, None).await? == 10, "deleting one namespace changed another");
    Ok(Outcome::Pass)
}

pub async fn deleted_are_never_found(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let name = named("deleted");
    remove(&*storage, &name, None).await?;
    let mut stored = by_key(vectors(0..200));
    put(&*storage, &name, vectors(0..200)).await.during("vectors_put")?;
    for start in (0..150).step_by(30) {
        let keys: Vec<String> = (start..start + 30).map(|seed| format!("key {seed}")).collect();
        ensure!(remove(&*storage, &name, Some(&keys)).await? == 30, "30 stored vectors were deleted, another number was there");
        ensure!(remove(&*storage, &name, Some(&keys)).await? == 0, "deleted vectors were there once more");
        stored.retain(|key, _| !keys.contains(key));
        for seed in start..start + 30 {
            let values = values(seed, DIMENSIONS);
            let found = find(&*storage, &name, values.clone(), 20).await.during("vectors_find")?;
            compare(&stored, &values, 20, &found)?;
        }
    }
    ensure!(remove(&*storage, &name, None).await? == 50, "50 vectors were left, another number was there");
    Ok(Outcome::Pass)
}

pub async fn senseless_is_refused(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let name = named("senseless");
    remove(&*storage, &name, None).await?;
    put(&*storage, &name, vectors(0..3)).await.during("vectors_put")?;
    let bad = |values: Vec<f32>| Vector { key: "bad".into(), values, data: vec![] };
    let with_nan = || [vec![f32::NAN], vec![1.0; DIMENSIONS - 1]].concat();
    let with_infinity = || [vec![f32::INFINITY], vec![1.0; DIMENSIONS - 1]].concat();
    let invalid = &[Code::InvalidArgument];
    for (what, bad_one) in [
        ("a vector of another length", bad(vec![1.0; DIMENSIONS + 1])),
        ("a vector without numbers", bad(vec![])),
        ("a vector of 4,097 numbers", bad(vec![1.0; 4097])),
        ("a vector of zeros", bad(vec![0.0; DIMENSIONS])),
        ("a vector with what is no number", bad(with_nan())),
        ("a vector with infinity", bad(with_infinity())),
        ("a key of 129 bytes", Vector { key: "k".repeat(129), ..vector(5) }),
        ("data of 4,097 bytes", Vector { data: vec![0; 4097], ..vector(5) }),
    ] {
        // Beside a good one: all are stored, or none.
        refused(&format!("vectors_put of {what}"), put(&*storage, &name, vec![vector(4), bad_one]).await, invalid)?;
    }
    refused("vectors_put to a name of 129 bytes", put(&*storage, &"n".repeat(129), vectors(0..1)).await, invalid)?;
    for (what, values) in [
        ("another length", vec![1.0; DIMENSIONS + 1]),
        ("zeros only", vec![0.0; DIMENSIONS]),
        ("what is no number", with_nan()),
        ("infinity", with_infinity()),
    ] {
        refused(&format!("vectors_find of {what}"), find(&*storage, &name, values, 1).await, invalid)?;
    }
    let found = find(&*storage, &name, values(4, DIMENSIONS), 1000).await.during("vectors_find")?;
    compare(&by_key(vectors(0..3)), &values(4, DIMENSIONS), 1000, &found)?;
    remove(&*storage, &name, None).await?;
    Ok(Outcome::Pass)
}

pub async fn survive_restart(harness: &Harness) -> Result<Outcome> {
    if let Some(skip) = undeclared(harness) {
        return Ok(skip);
    }
    let instance = harness.start().await?;
    let storage = instance.client::<dyn Storage>();
    let name = named("restart");
    remove(&*storage, &name, None).await?;
    put(&*storage, &name, vectors(0..100)).await.during("vectors_put")?;
    remove(&*storage, &name, Some(&["key 5".to_owned()])).await?;
    let next = restarted(harness, instance).await?;
    let storage = next.client::<dyn Storage>();
    let mut stored = by_key(vectors(0..100));
    stored.remove("key 5");
    let found = find(&*storage, &name, values(5, DIMENSIONS), 1000).await.during("vectors_find after a restart")?;
    compare(&stored, &values(5, DIMENSIONS), 1000, &found)?;
    ensure!(remove(&*storage, &name, None).await? == 99, "a restart changed how many vectors there are");
    Ok(Outcome::Pass)
}
