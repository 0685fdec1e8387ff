use std::collections::HashMap;
use std::fs;
use std::path::Path;

use fabstir_plugin_api::prelude::*;

use super::*;
use crate::small_disk::on_a_small_disk;

mod crash;

pub(super) const ALWAYS: &dyn Fn() -> bool = &|| true;

pub(super) fn open(folder: &Path) -> Vectors {
    with(folder, None, 1 << 30)
}

fn with(folder: &Path, max_bytes: Option<u64>, index_bytes: u64) -> Vectors {
    Vectors::new(folder.to_owned(), Limits { max_bytes, index_bytes, searches: 2 })
}

/// Numbers that look random and are the same in every run.
pub(super) fn values(seed: u64, dimensions: usize) -> Vec<f32> {
    let mut bytes = vec![0; dimensions * 4];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes.as_chunks().0.iter().map(|number| i32::from_le_bytes(*number) as f32 / i32::MAX as f32).collect()
}

pub(super) fn vector(seed: u64, dimensions: usize) -> Vector {
    Vector { key: format!("key {seed}"), values: values(seed, dimensions), data: seed.to_le_bytes().to_vec() }
}

fn query(values: Vec<f32>, limit: u32) -> VectorQuery {
    VectorQuery { values, limit, at_least: None }
}

pub(super) fn find(vectors: &Vectors, namespace: &str, values: Vec<f32>, limit: u32) -> Vec<Near> {
    vectors.find(namespace, query(values, limit), ALWAYS).unwrap()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let product = |x: &[f32], y: &[f32]| -> f64 { x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum() };
    product(a, b) / (product(a, a) * product(b, b)).sqrt()
}

/// What is stored, kept beside the vectors: every answer is compared with it.
#[derive(Default)]
pub(super) struct Oracle(HashMap<String, Vector>);

impl Oracle {
    fn put(&mut self, vectors: &[Vector]) {
        self.0.extend(vectors.iter().map(|vector| (vector.key.clone(), vector.clone())));
    }

    /// Whatever was found is stored, and so near. Says which share of the nearest was found.
    fn recall(&self, near: &[Near], values: &[f32], limit: usize) -> f64 {
        for found in near {
            let stored = self.0.get(&found.key).unwrap_or_else(|| panic!("{} was found and is not stored", found.key));
            assert_eq!(found.data, stored.data, "{}", found.key);
            let exact = cosine(values, &stored.values);
            assert!((f64::from(found.similarity) - exact).abs() < 1e-5, "{}: {} and {exact}", found.key, found.similarity);
        }
        assert!(near.windows(2).all(|pair| pair[0].similarity >= pair[1].similarity), "nearest first");
        let mut all: Vec<f64> = self.0.values().map(|stored| cosine(values, &stored.values)).collect();
        all.sort_by(|a, b| b.total_cmp(a));
        all.truncate(limit);
        let Some(farthest) = all.last() else { return 1.0 };
        near.iter().filter(|found| f64::from(found.similarity) >= farthest - 1e-6).count() as f64 / all.len() as f64
    }
}

fn indexed(vectors: &Vectors, namespace: &str) -> bool {
    let keeper = vectors.keeper(ALWAYS, 0).unwrap();
    let found = keeper.truth().read().unwrap().namespace(namespace).unwrap().unwrap();
    keeper.space(namespace, &found).is_indexed()
}

pub(super) fn wait_for_index(vectors: &Vectors, namespace: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !indexed(vectors, namespace) {
        assert!(Instant::now() < deadline, "no index came");
        thread::sleep(Duration::from_millis(5));
    }
}

fn snapshot_file(vectors: &Vectors, namespace: &str) -> PathBuf {
    let keeper = vectors.keeper(ALWAYS, 0).unwrap();
    let found = keeper.truth().read().unwrap().namespace(namespace).unwrap().unwrap();
    snapshot::path(&vectors.folder, found.number)
}

/// A namespace that is large enough for an index, with what it should hold.
pub(super) fn large(vectors: &Vectors, dimensions: usize) -> Oracle {
    let mut oracle = Oracle::default();
    for start in (0..SMALLEST + 500).step_by(500) {
        let batch: Vec<Vector> = (start..start + 500).map(|seed| vector(seed, dimensions)).collect();
        oracle.put(&batch);
        vectors.put("large", batch, ALWAYS).unwrap();
    }
    oracle
}

fn mean_recall(vectors: &Vectors, oracle: &Oracle, dimensions: usize) -> f64 {
    let queries = (0..30).map(|seed| {
        let values = values(1_000_000 + seed, dimensions);
        oracle.recall(&find(vectors, "large", values.clone(), 10), &values, 10)
    });
    queries.sum::<f64>() / 30.0
}

#[test]
fn small_namespace_is_searched_exactly_and_apart_from_others() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    let mut oracle = Oracle::default();
    let all: Vec<Vector> = (0..300).map(|seed| vector(seed, 24)).collect();
    oracle.put(&all);
    vectors.put("a", all, ALWAYS).unwrap();
    vectors.put("b", vec![vector(7, 3)], ALWAYS).unwrap();
    for seed in 1000..1020 {
        let values = values(seed, 24);
        assert_eq!(oracle.recall(&find(&vectors, "a", values.clone(), 10), &values, 10), 1.0);
    }
    assert_eq!(find(&vectors, "a", values(5, 24), 1)[0].key, "key 5");
    assert_eq!(find(&vectors, "a", values(5, 24), 1000).len(), 300);
    assert_eq!(find(&vectors, "b", values(7, 3), 1000).len(), 1);
    assert_eq!(find(&vectors, "nothing", values(7, 3), 10), []);
    assert_eq!(find(&vectors, "a", values(5, 24), 0), []);

    let near = VectorQuery { values: values(5, 24), limit: 1000, at_least: Some(0.9) };
    let near = vectors.find("a", near, ALWAYS).unwrap();
    assert_eq!(near.len(), 1);
    assert!(near[0].similarity > 0.9999 && near[0].similarity <= 1.0);
}

#[test]
fn replaced_vector_is_found_by_its_new_direction_alone() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    vectors.put("a", vec![vector(1, 8), vector(2, 8)], ALWAYS).unwrap();
    // Twice in one call: the last one counts.
    let twice = [vector(3, 8), vector(4, 8)].map(|vector| Vector { key: "key 1".into(), ..vector });
    vectors.put("a", twice.to_vec(), ALWAYS).unwrap();
    let all = find(&vectors, "a", values(4, 8), 10);
    assert_eq!((all.len(), all[0].key.as_str(), &*all[0].data), (2, "key 1", &4u64.to_le_bytes()[..]));
    assert!(find(&vectors, "a", values(1, 8), 1)[0].similarity < 0.999);
}

#[test]
fn delete_counts_what_was_there_and_the_last_one_ends_the_namespace() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    let keys = |keys: &[&str]| keys.iter().map(|key| key.to_string()).collect::<Vec<_>>();
    let delete = |keys: Option<&[String]>| vectors.delete("a", keys, ALWAYS).unwrap();
    assert_eq!(delete(None), 0);
    vectors.put("a", (0..5).map(|seed| vector(seed, 8)).collect(), ALWAYS).unwrap();
    assert_eq!(delete(Some(&keys(&["key 1", "key 1", "no such key"]))), 1);
    assert_eq!(delete(Some(&[])), 0);
    assert_eq!(find(&vectors, "a", values(1, 8), 10).len(), 4);
    assert_eq!(delete(Some(&keys(&["key 0", "key 2", "key 3", "key 4"]))), 4);
    assert_eq!(find(&vectors, "a", values(1, 8), 10), []);
    // It may begin anew with vectors of another length.
    vectors.put("a", vec![vector(1, 9)], ALWAYS).unwrap();
    assert_eq!(delete(None), 1);
    vectors.put("a", vec![vector(1, 8)], ALWAYS).unwrap();
}

#[test]
fn what_makes_no_sense_is_refused_and_stores_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    vectors.put("a", vec![vector(0, 8)], ALWAYS).unwrap();
    let bad = |change: &dyn Fn(&mut Vector)| {
        let mut bad = vector(2, 8);
        change(&mut bad);
        let code = vectors.put("a", vec![vector(1, 8), bad], ALWAYS).map_err(|error| PluginError::from(error).code);
        assert_eq!(code, Err(Code::InvalidArgument));
    };
    bad(&|vector| vector.values.truncate(7));
    bad(&|vector| vector.values.clear());
    bad(&|vector| vector.values = vec![1.0; 4097]);
    bad(&|vector| vector.values[3] = f32::NAN);
    bad(&|vector| vector.values[3] = f32::INFINITY);
    bad(&|vector| vector.values.fill(0.0));
    bad(&|vector| vector.key = "k".repeat(129));
    bad(&|vector| vector.data = vec![0; 4097]);
    assert!(vectors.put(&"n".repeat(129), vec![vector(1, 8)], ALWAYS).is_err());
    assert_eq!(find(&vectors, "a", values(1, 8), 10).len(), 1);

    for (values, limit, at_least) in [
        (values(1, 7), 1, None),
        (vec![0.0; 8], 1, None),
        (vec![f32::NAN; 8], 1, None),
        (vec![], 1, None),
        (values(1, 8), 1001, None),
        (values(1, 8), 1, Some(f32::NAN)),
    ] {
        let error = vectors.find("a", VectorQuery { values, limit, at_least }, ALWAYS).unwrap_err();
        assert_eq!(PluginError::from(error).code, Code::InvalidArgument);
    }
    assert!(matches!(vectors.find("no such", query(vec![0.0], 1), ALWAYS), Err(VectorError::Zero)));

    let longest = Vector { key: "k".repeat(128), values: vec![1.0; 4096], data: vec![9; 4096] };
    vectors.put(&"n".repeat(128), vec![longest.clone()], ALWAYS).unwrap();
    assert_eq!(find(&vectors, &"n".repeat(128), vec![1.0; 4096], 1)[0].data, longest.data);
}

#[test]
fn given_up_put_stores_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    assert!(matches!(vectors.put("a", vec![vector(1, 8)], &|| false), Err(VectorError::Cancelled)));
    assert_eq!(find(&vectors, "a", values(1, 8), 10), []);
}

#[test]
fn index_follows_puts_replacements_and_deletes() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    let mut oracle = large(&vectors, 16);
    wait_for_index(&vectors, "large");
    assert!(mean_recall(&vectors, &oracle, 16) > 0.98);

    let replacements: Vec<Vector> =
        (0..200).map(|seed| Vector { key: format!("key {seed}"), ..vector(5000 + seed, 16) }).collect();
    vectors.put("large", replacements.clone(), ALWAYS).unwrap();
    oracle.put(&replacements);
    let deleted: Vec<String> = (1000..1400).map(|seed| format!("key {seed}")).collect();
    assert_eq!(vectors.delete("large", Some(&deleted), ALWAYS).unwrap(), 400);
    oracle.0.retain(|key, _| !deleted.contains(key));
    assert!(indexed(&vectors, "large"));
    assert!(mean_recall(&vectors, &oracle, 16) > 0.98);
    for seed in [5000, 5100, 5199] {
        assert_eq!(find(&vectors, "large", values(seed, 16), 1)[0].key, format!("key {}", seed - 5000));
    }
    for seed in [1000, 1200, 1399] {
        assert!(find(&vectors, "large", values(seed, 16), 5).iter().all(|near| !deleted.contains(&near.key)));
    }
}

#[test]
fn snapshot_is_taken_up_again_with_what_changed_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    let mut oracle = large(&vectors, 16);
    wait_for_index(&vectors, "large");
    vectors.close();
    let path = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.ends_with("index-0"));
    let saved = fs::read(path.as_ref().unwrap()).unwrap();

    // Changes after the snapshot, and the snapshot of before them: as after a crash.
    let vectors = open(folder.path());
    wait_for_index(&vectors, "large");
    let more: Vec<Vector> = (0..50).map(|seed| Vector { key: format!("key {seed}"), ..vector(9000 + seed, 16) }).collect();
    oracle.put(&more);
    vectors.put("large", more, ALWAYS).unwrap();
    vectors.delete("large", Some(&["key 2000".to_owned()]), ALWAYS).unwrap();
    oracle.0.remove("key 2000");
    drop(vectors);
    assert_eq!(fs::read(path.as_ref().unwrap()).unwrap(), saved, "nothing was saved on the way");
    let truth = truth::Truth::open(folder.path(), None).unwrap();
    let now = truth.read().unwrap().namespace("large").unwrap().unwrap();
    let loaded = snapshot::load(folder.path(), 0, 16, now.logged.unwrap()..=now.next, 2);
    assert_eq!(loaded.map(|(index, _)| index.len()).unwrap(), SMALLEST as usize + 500);
    drop(truth);

    let vectors = open(folder.path());
    find(&vectors, "large", values(1, 16), 1);
    wait_for_index(&vectors, "large");
    assert!(mean_recall(&vectors, &oracle, 16) > 0.98);
    assert_eq!(find(&vectors, "large", values(9010, 16), 1)[0].key, "key 10");
    assert!(find(&vectors, "large", values(2000, 16), 1)[0].similarity < 0.9999);
}

#[test]
fn damaged_foreign_or_missing_snapshot_is_never_used() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    let oracle = large(&vectors, 16);
    wait_for_index(&vectors, "large");
    let path = snapshot_file(&vectors, "large");
    vectors.close();
    let good = fs::read(&path).unwrap();
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        Some(bytes)
    };
    let footer = good.len() - 96;
    let mut cases = vec![
        None,
        changed(&|bytes| bytes.clear()),
        changed(&|bytes| bytes.truncate(50)),
        changed(&|bytes| bytes.truncate(footer)),
        changed(&|bytes| drop(bytes.drain(1000..2000))),
        changed(&|bytes| bytes.truncate(bytes.len() - 1)),
        changed(&|bytes| bytes[footer + 15] += 1), // the layout's version
        changed(&|bytes| bytes[footer + 16] += 1), // usearch's version
        changed(&|bytes| bytes[footer + 32] += 1), // the namespace
        changed(&|bytes| bytes[footer + 40] ^= 1), // the time
    ];
    // One bit anywhere.
    cases.extend((0..20).map(|part| changed(&|bytes| bytes[good.len() / 20 * part + 3] ^= 0x10)));
    for (case, bytes) in cases.into_iter().enumerate() {
        match bytes {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let vectors = open(folder.path());
        let now = vectors.keeper(ALWAYS, 0).unwrap().truth().read().unwrap().namespace("large").unwrap().unwrap();
        let loaded = snapshot::load(folder.path(), now.number, now.dimensions, now.logged.unwrap()..=now.next, 2);
        assert!(loaded.is_err(), "case {case} was taken for a snapshot");
        // Answered from the rows at first, and from an index made anew afterwards.
        assert!(mean_recall(&vectors, &oracle, 16) > 0.98, "case {case}");
        wait_for_index(&vectors, "large");
        assert!(mean_recall(&vectors, &oracle, 16) > 0.98, "case {case}");
        vectors.close();
        assert!(
            snapshot::load(folder.path(), now.number, now.dimensions, 0..=now.next, 2).is_ok(),
            "case {case} was not repaired"
        );
    }
}

#[test]
fn leftovers_of_ended_namespaces_and_unfinished_snapshots_are_removed_at_start() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    vectors.put("a", vec![vector(1, 8)], ALWAYS).unwrap();
    vectors.close();
    for name in ["index-0", "index-0.new", "index-7", "index-7.new", "index", "notes"] {
        fs::write(folder.path().join(name), b"x").unwrap();
    }
    let vectors = open(folder.path());
    find(&vectors, "a", values(1, 8), 1);
    let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["index", "index-0", "notes", "vectors.redb"]);
}

#[test]
fn deleted_namespace_leaves_no_snapshot_and_its_name_begins_anew() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    large(&vectors, 16);
    wait_for_index(&vectors, "large");
    vectors.close();
    let vectors = open(folder.path());
    let path = snapshot_file(&vectors, "large");
    assert!(path.exists());
    assert_eq!(vectors.delete("large", None, ALWAYS).unwrap(), SMALLEST + 500);
    assert!(!path.exists());
    assert_eq!(find(&vectors, "large", values(1, 16), 10), []);
    let oracle = large(&vectors, 12);
    wait_for_index(&vectors, "large");
    assert!(mean_recall(&vectors, &oracle, 12) > 0.98);
}

#[test]
fn index_that_does_not_fit_the_memory_is_done_without() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = with(folder.path(), None, 100_000);
    let oracle = large(&vectors, 16);
    assert_eq!(mean_recall(&vectors, &oracle, 16), 1.0);
    assert!(!indexed(&vectors, "large"));
}

#[test]
fn indexes_make_room_for_each_other() {
    let folder = tempfile::tempdir().unwrap();
    // Room for one of them.
    let vectors = with(folder.path(), None, index::Index::estimate(SMALLEST + 1500, 8));
    for name in ["first", "second"] {
        vectors.put(name, (0..SMALLEST).map(|seed| vector(seed, 8)).collect(), ALWAYS).unwrap();
        wait_for_index(&vectors, name);
    }
    let keeper = vectors.keeper(ALWAYS, 0).unwrap();
    let first = keeper.truth().read().unwrap().namespace("first").unwrap().unwrap();
    // To ask is to use it: then it is made anew, and the other one goes.
    assert!(!keeper.space("first", &first).is_indexed());
    assert_eq!(find(&vectors, "first", values(5, 8), 1)[0].key, "key 5");
    wait_for_index(&vectors, "first");
}

#[test]
fn quota_counts_rows_and_deleting_makes_room() {
    let folder = tempfile::tempdir().unwrap();
    let one = (2 + "key 1".len() + 8 * 4 + 8) as u64;
    let vectors = with(folder.path(), Some(2 * one), 1 << 30);
    vectors.put("a", vec![vector(1, 8), vector(2, 8)], ALWAYS).unwrap();
    let full = vectors.put("b", vec![vector(3, 8)], ALWAYS).unwrap_err();
    assert!(matches!(full, VectorError::QuotaFull { wanted, max_bytes } if wanted == 3 * one && max_bytes == 2 * one), "{full}");
    assert_eq!(find(&vectors, "b", values(3, 8), 1), []);
    vectors.put("a", vec![vector(2, 8)], ALWAYS).expect("what is replaced makes room");
    vectors.delete("a", Some(&["key 1".into()]), ALWAYS).unwrap();
    vectors.close();
    let vectors = with(folder.path(), Some(2 * one), 1 << 30);
    vectors.put("b", vec![vector(3, 8)], ALWAYS).unwrap();
    assert!(vectors.put("b", vec![vector(4, 8)], ALWAYS).is_err(), "what was stored before the start counts");
}

#[test]
fn second_instance_waits_for_the_first_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path());
    first.put("a", vec![vector(1, 8)], ALWAYS).unwrap();
    let second = open(folder.path());
    thread::scope(|scope| {
        let found = scope.spawn(|| find(&second, "a", values(1, 8), 1));
        thread::sleep(Duration::from_millis(100));
        first.close();
        assert_eq!(found.join().unwrap()[0].key, "key 1");
    });
    assert!(matches!(first.find("a", query(values(1, 8), 1), ALWAYS), Err(VectorError::Closed(_))));
    let third = open(folder.path());
    let refused = third.find("a", query(values(1, 8), 1), &|| false).unwrap_err();
    assert!(matches!(refused, VectorError::InUse(_)), "{refused}");
}

#[test]
fn many_at_once_find_what_was_put_and_nothing_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = open(folder.path());
    large(&vectors, 16);
    wait_for_index(&vectors, "large");
    thread::scope(|scope| {
        let vectors = &vectors;
        for writer in [0u64, 1] {
            scope.spawn(move || {
                for round in 0..40 {
                    let seed = 100_000 * (writer + 1) + round;
                    vectors.put("large", vec![vector(seed, 16)], ALWAYS).unwrap();
                    assert_eq!(find(vectors, "large", values(seed, 16), 1)[0].key, format!("key {seed}"));
                    vectors.delete("large", Some(&[format!("key {seed}")]), ALWAYS).unwrap();
                    let near = find(vectors, "large", values(seed, 16), 10);
                    assert!(near.len() == 10 && near.iter().all(|near| near.key != format!("key {seed}")));
                }
            });
        }
    });
}

#[test]
fn full_disk_is_told_and_loses_nothing() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path();
    on_a_small_disk(path, c"size=8m", || {
        let folder = path.join("vectors");
        let vectors = open(&folder);
        let batch = |start: u64| (start..start + 20).map(|seed| vector(seed, 384)).collect::<Vec<_>>();
        let mut oracle = Oracle::default();
        let mut next = 0;
        let mut told = Vec::new();
        // Another file takes the room that is left, so that the database itself meets the full disk, too.
        let hog = path.join("hog");
        for round in 0..200 {
            let batch = batch(next);
            match vectors.put("a", batch.clone(), ALWAYS) {
                Ok(()) => oracle.put(&batch),
                Err(full) => {
                    assert!(matches!(full, VectorError::DiskFull { .. }), "{full}");
                    told.push(full.to_string());
                    assert_eq!(PluginError::from(full).code, Code::Full);
                    if told.len() > 3 {
                        break;
                    }
                }
            }
            next += 20;
            if round == 60 {
                let left = Disk::of(path).unwrap().free - SPARE - 40_000;
                fs::write(&hog, vec![1; left as usize]).unwrap();
            }
            if round % 10 == 0 || !told.is_empty() {
                let values = values(1_000_000 + round, 384);
                let near = find(&vectors, "a", values.clone(), 1000);
                assert_eq!(near.len(), oracle.0.len().min(1000));
                assert_eq!(oracle.recall(&near[..10.min(near.len())], &values, 10), 1.0);
            }
        }
        assert!(!told.is_empty(), "the disk was never full");
        println!("{}", told.join("\n"));
        fs::remove_file(hog).unwrap();
        vectors.put("a", batch(next), ALWAYS).expect("there is room again");
        oracle.put(&batch(next));
        vectors.close();
        assert_eq!(find(&open(&folder), "a", values(1, 384), 1000).len(), oracle.0.len().min(1000));
    });
}
