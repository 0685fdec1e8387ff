//! What happens when workers are ended, hang or run out of memory, and when files are damaged.

use std::time::{Duration, Instant};

use fabstir_plugin_api::prelude::*;

use super::{Subject, about, classifier, commitment, config, soon};
use crate::Config;
use crate::circuit::Circuit;
use crate::error::EzklError;
use crate::keys::{self, Cabinet, Record};
use crate::worker::{Bench, Launch, Limit};

/// Begins to make the keys of the model, which takes seconds, and returns when a worker is at it.
async fn at_work(subject: &Subject) -> (Stream<Preparing>, i32) {
    let before = subject.workers();
    let stream = subject.plugin.prepare(&Cx::new(), "onnx-model:classifier".into()).await.unwrap();
    soon("a worker at work", || subject.workers().len() > before.len()).await;
    let worker = subject.workers().into_iter().find(|id| !before.contains(id)).unwrap();
    (stream, worker)
}

async fn until(stream: &mut Stream<Preparing>, doing: &str) {
    while !matches!(stream.next().await.unwrap().unwrap(), Preparing::Progress(stage) if stage.doing == doing) {}
}

fn signal(worker: i32, signal: &str) {
    assert!(std::process::Command::new("kill").args([signal, &worker.to_string()]).status().unwrap().success());
}

/// Whether the last thread of a process has ended; one that is still ending looks alive to who waits for it.
fn is_over(worker: i32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{worker}/task")).map_or(0, Iterator::count);
    let status = std::fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
    threads <= 1 && status.rsplit(')').next().is_none_or(|rest| rest.is_empty() || rest.starts_with(" Z"))
}

/// Reads to the end, and returns the error there.
async fn error_of(stream: Stream<Preparing>) -> PluginError {
    stream.collect().await.unwrap_err()
}

async fn works(subject: &Subject) {
    let proof = subject.prove(commitment()).await.unwrap();
    assert!(subject.verify(proof).await.unwrap().holds);
    let work = subject.state.path().join("work");
    soon("an empty workplace", || std::fs::read_dir(&work).unwrap().count() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_ends_the_worker_at_once_and_leaves_nothing() {
    let subject = Subject::start(Config { models: vec![classifier()], ..config(1100) }).await;
    let (mut stream, worker) = at_work(&subject).await;
    until(&mut stream, "making the keys").await;
    let began = Instant::now();
    drop(stream);
    soon("the end of the worker", || !subject.workers().contains(&worker)).await;
    println!("ended {:?} after the drop", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(subject.plugin.statements(&Cx::new()).await.unwrap()[1].program, None);
    works(&subject).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_is_unavailable_and_the_next_call_has_another() {
    let subject = Subject::start(Config { models: vec![classifier()], ..config(1200) }).await;
    let (stream, worker) = at_work(&subject).await;
    signal(worker, "-KILL");
    let error = error_of(stream).await;
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.message.contains("signal 9"), "{error}");
    works(&subject).await;
    // One that dies while it waits is not even noticed.
    for worker in subject.workers() {
        signal(worker, "-KILL");
        soon("the end of the worker", || is_over(worker)).await;
    }
    works(&subject).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_hangs_is_ended_when_its_time_is_over() {
    let limits = Config { prepare_timeout_ms: Some(20_000), models: vec![classifier()], ..config(1300) };
    let subject = Subject::start(limits).await;
    let (mut stream, worker) = at_work(&subject).await;
    until(&mut stream, "making the keys").await;
    signal(worker, "-STOP");
    let error = error_of(stream).await;
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.message.contains("within") && error.message.contains("_ms`"), "{error}");
    soon("the end of the worker", || !subject.workers().contains(&worker)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn out_of_memory_is_full_and_names_the_bound() {
    let subject = Subject::start(Config { models: vec![classifier()], threads: Some(2), ..config(100) }).await;
    let error = subject.prepare("onnx-model:classifier").await.unwrap_err();
    assert_eq!(error.code, Code::Full, "{error}");
    assert!(error.message.contains("`memory_bytes` is"), "{error}");
    works(&subject).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_keys_are_corrupt_once_and_then_made_again() {
    let subject = Subject::start(config(1400)).await;
    let mut last = None;
    for file in ["vk", "srs", "settings", "pk", "circuit", "record"] {
        let prepared = subject.prepare("commitment").await.unwrap();
        assert_ne!(prepared.program, last, "the keys are new ones");
        let proof = subject.prove(commitment()).await.unwrap();
        let keys = std::fs::read_dir(subject.state.path().join("keys")).unwrap().map(|entry| entry.unwrap().path());
        let folder = keys.into_iter().find(|path| path.extension().is_none()).unwrap();
        let mut bytes = std::fs::read(folder.join(file)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        std::fs::write(folder.join(file), bytes).unwrap();

        let error = match file {
            "pk" | "circuit" => subject.prove(commitment()).await.unwrap_err(),
            _ => subject.verify(proof.clone()).await.unwrap_err(),
        };
        assert_eq!(error.code, Code::Corrupt, "{file}: {error}");
        assert!(error.message.contains(file) && error.message.contains(".bad"), "{error}");
        assert_eq!(subject.verify(proof).await.unwrap_err().code, Code::NotFound);
        last = prepared.program;
    }
    // A file that is missing is as bad as one that is damaged.
    subject.prepare("commitment").await.unwrap();
    let keys = std::fs::read_dir(subject.state.path().join("keys")).unwrap().map(|entry| entry.unwrap().path());
    let folder = keys.into_iter().find(|path| path.extension().is_none()).unwrap();
    std::fs::remove_file(folder.join("pk")).unwrap();
    assert_eq!(subject.prepare("commitment").await.unwrap_err().code, Code::Corrupt);
    works(&subject).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_could_not_be_made_is_an_error_and_no_verdict() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(1501);
    let bench = Bench::new(Launch { python: config.python(), memory: config.memory(), threads: config.threads });
    let path = |name: &str| folder.path().join(name);
    // Settings that the wheel can read, and keys that are none.
    let with = serde_json::json!({
        "instances": [], "proof": "00", "file": path("check"), "settings": path("settings"), "vk": path("vk"), "srs": path("srs"),
    });
    std::fs::write(path("vk"), "no keys").unwrap();
    std::fs::write(path("srs"), "no string").unwrap();
    let limit = Limit { time: Duration::from_secs(60), key: "prove_timeout_ms" };
    let asked = bench.turn().await.ask::<Verdict>("checking", limit, "verify", with).await;
    assert!(matches!(asked, Err(EzklError::Failed { .. })), "{asked:?}");
}

#[test]
fn keys_under_the_name_of_another_circuit_are_none() {
    let state = tempfile::tempdir().unwrap();
    let cabinet = Cabinet::open(state.path()).unwrap();
    let circuit = Circuit::commitment();
    let made = cabinet.workplace().unwrap();
    for file in keys::ALL {
        std::fs::write(made.path(file), file).unwrap();
    }
    let record = Record {
        recipe: String::new(),
        program: String::new(),
        k: 1,
        rows: 1,
        input_scale: 0,
        outputs: Vec::new(),
        proof_bytes: 1,
        files: Default::default(),
    };
    cabinet.install(&circuit, made, record).unwrap();
    assert!(cabinet.find(&circuit).unwrap().is_some());
    let other = Circuit { recipe: "0".repeat(64), ..Circuit::commitment() };
    let folder = state.path().join("keys");
    std::fs::rename(folder.join(&circuit.recipe), folder.join(&other.recipe)).unwrap();
    assert!(matches!(cabinet.find(&other), Err(EzklError::Corrupt { .. })));
    assert!(cabinet.find(&other).unwrap().is_none(), "they were set aside");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_is_none_of_the_statements_is_refused_before_any_work() {
    let subject = Subject::start(config(1500)).await;
    let before = subject.workers();
    let cx = Cx::new();
    let task = |about: About, witness: Witness| subject.plugin.prove(&cx, Task { about, witness, ..commitment() });
    let state = Witness::Answer { tokens: vec![1], states: vec![vec![0.0]], draw: String::new() };
    assert_eq!(task(about(), state).await.err().unwrap().code, Code::InvalidArgument);
    let huge = About { subject: format!("0x{}", "ff".repeat(32)), ..about() };
    assert_eq!(task(huge, Witness::None).await.err().unwrap().code, Code::InvalidArgument);
    let unknown = subject.plugin.prove(&cx, Task { statement: "output-head:x".into(), ..commitment() });
    assert_eq!(unknown.await.err().unwrap().code, Code::NotFound);
    assert_eq!(subject.plugin.estimate(&cx, "x".into()).await.unwrap_err().code, Code::NotFound);
    assert_eq!(subject.workers(), before);
}
