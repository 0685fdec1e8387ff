//! What is acknowledged survives `kill -9`.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use super::*;

/// Tells the child which folder it works on, and where its own random numbers begin.
const FOLDER: &str = "STORAGE_DISK_CRASH_FOLDER";
const SEED: &str = "STORAGE_DISK_CRASH_SEED";

const KILLS: u64 = 100;
const DIMENSIONS: usize = 16;

/// The smallest generator that will do.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// What the child says before a change, and again when the change is acknowledged. `P KEY SEED` or `D KEY`.
fn change(vectors: &Vectors, random: &mut u64) {
    let keys = self::random(random) % 4 + 1;
    let put = self::random(random) % 3 > 0;
    let lines: Vec<String> = (0..keys)
        .map(|_| {
            let key = self::random(random) % (SMALLEST * 2);
            if put { format!("P {key} {}", self::random(random)) } else { format!("D {key}") }
        })
        .collect();
    println!("try {}", lines.join(";"));
    if put {
        let all = lines.iter().map(|line| parse_put(line).1).collect();
        vectors.put("large", all, ALWAYS).unwrap();
    } else {
        let keys: Vec<String> = lines.iter().map(|line| format!("key {}", &line[2..])).collect();
        vectors.delete("large", Some(&keys), ALWAYS).unwrap();
    }
    println!("done");
}

fn parse_put(line: &str) -> (String, Vector) {
    let (key, seed) = line[2..].split_once(' ').unwrap();
    let key = format!("key {key}");
    (key.clone(), Vector { key, ..vector(seed.parse().unwrap(), DIMENSIONS) })
}

/// Not a test of its own: the process that is killed.
#[test]
fn child_of_kill_test() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let mut seed: u64 = std::env::var(SEED).unwrap().parse().unwrap();
    let vectors = open(Path::new(&folder));
    loop {
        // Now and then it ends well, and leaves a snapshot.
        if random(&mut seed) % 200 == 0 {
            vectors.close();
            return;
        }
        change(&vectors, &mut seed);
    }
}

fn apply(oracle: &mut Oracle, line: &str) {
    for change in line.split(';') {
        if change.starts_with('P') {
            let (key, vector) = parse_put(change);
            oracle.0.insert(key, vector);
        } else {
            oracle.0.remove(&format!("key {}", &change[2..]));
        }
    }
}

#[test]
fn kill_at_any_moment_loses_nothing_acknowledged_and_returns_nothing_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let mut oracle = Oracle::default();
    let first: Vec<Vector> = (0..SMALLEST + 200).map(|seed| vector(seed, DIMENSIONS)).collect();
    oracle.put(&first);
    let vectors = open(folder.path());
    vectors.put("large", first, ALWAYS).unwrap();
    wait_for_index(&vectors, "large");
    vectors.close();
    drop(vectors);

    let (mut dice, mut killed, mut changes) = (42, 0, 0);
    while killed < KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "vectors::tests::crash::child_of_kill_test", "--nocapture", "--test-threads=1"]);
        child.env(FOLDER, folder.path()).env(SEED, random(&mut dice).to_string());
        let mut child = child.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let output = child.stdout.take().unwrap();
        let pid = child.id();
        // It dies a random time after it has begun to work.
        let wait = Duration::from_micros(random(&mut dice) % 60_000);
        let (began, begun) = std::sync::mpsc::channel();
        let killer = thread::spawn(move || {
            let _ = begun.recv_timeout(Duration::from_secs(20));
            thread::sleep(wait);
            // SAFETY: the child is ours, and not waited for before this thread has ended.
            unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
        });
        let mut pending: Option<String> = None;
        for line in BufReader::new(output).lines() {
            let line = line.unwrap();
            // The first line of a test has its name before it.
            if let Some(at) = line.find("try ") {
                let _ = began.send(());
                pending = Some(line[at + 4..].to_owned());
            } else if line == "done" {
                apply(&mut oracle, &pending.take().unwrap());
                changes += 1;
            }
        }
        killer.join().unwrap();
        killed += u64::from(child.wait().unwrap().signal() == Some(libc::SIGKILL));

        // Whether the last change is stored is open; if it is, it is whole.
        let vectors = open(folder.path());
        let stored = everything(&vectors);
        let mut with_pending = Oracle(oracle.0.clone());
        if let Some(pending) = &pending {
            apply(&mut with_pending, pending);
        }
        if stored == keys(&with_pending) && pending.is_some() {
            oracle = with_pending;
        }
        assert_eq!(stored, keys(&oracle), "after {killed} kills and {changes} changes, with {pending:?} under way");
        if killed % 10 == 0 {
            wait_for_index(&vectors, "large");
        }
        let recall = (0..5).map(|seed| {
            let values = values(2_000_000 + 10 * killed + seed, DIMENSIONS);
            oracle.recall(&find(&vectors, "large", values.clone(), 10), &values, 10)
        });
        assert!(recall.sum::<f64>() / 5.0 > 0.9);
    }
    println!("{killed} kills, {changes} acknowledged changes, {} vectors at the end", oracle.0.len());
}

/// Key and data of all that is stored, read from the rows.
fn everything(vectors: &Vectors) -> Vec<(String, Vec<u8>)> {
    let keeper = vectors.keeper(ALWAYS, 0).unwrap();
    let reading = keeper.truth().read().unwrap();
    let namespace = reading.namespace("large").unwrap().unwrap();
    let mut all = Vec::new();
    reading
        .scan(&namespace, 0..u64::MAX, |_, row| {
            all.push((row.key.to_owned(), row.data.to_vec()));
            Ok(true)
        })
        .unwrap();
    all.sort();
    all
}

fn keys(oracle: &Oracle) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = oracle.0.values().map(|vector| (vector.key.clone(), vector.data.clone())).collect();
    all.sort();
    all
}
