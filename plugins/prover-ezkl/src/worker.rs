//! The Python process that has the ezkl wheel, and the bench at which it works.
//!
//! A worker takes one request at a time. Whoever drops a request that is under way ends the worker with it: there is no other way to
//! stop the wheel. The next request starts a new one.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tracing::{debug, warn};

use crate::error::EzklError;

const SCRIPT: &str = include_str!("worker.py");

/// How long a worker may take from its start to its first answer.
const START: Duration = Duration::from_secs(60);

/// Lines of standard error that are kept to say why a worker ended.
const KEPT: usize = 40;

/// How workers are started.
#[derive(Debug, Clone)]
pub struct Launch {
    pub python: PathBuf,
    pub memory: u64,
    pub threads: Option<u32>,
}

/// How long a step may take, and the key that says so.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    pub time: Duration,
    pub key: &'static str,
}

/// What a step took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Took {
    pub cpu_ms: u64,
    /// The most memory that was resident, in bytes; 0 where the system does not tell.
    pub peak: u64,
}

/// A place for one worker, which is started when there is work.
#[derive(Debug)]
pub struct Bench {
    launch: Launch,
    worker: tokio::sync::Mutex<Option<Worker>>,
}

/// The bench, for as long as one piece of work takes.
pub struct Turn<'a> {
    launch: &'a Launch,
    worker: tokio::sync::MutexGuard<'a, Option<Worker>>,
}

impl Bench {
    pub fn new(launch: Launch) -> Self {
        Self { launch, worker: tokio::sync::Mutex::default() }
    }

    /// Waits until the bench is free.
    pub async fn turn(&self) -> Turn<'_> {
        Turn { launch: &self.launch, worker: self.worker.lock().await }
    }
}

impl Turn<'_> {
    /// Has one thing done: calls the function `what` of the script. A dropped future ends the worker.
    pub async fn ask<T: serde::de::DeserializeOwned>(
        &mut self,
        doing: &'static str,
        limit: Limit,
        what: &str,
        with: Value,
    ) -> Result<(T, Took), EzklError> {
        let worker = match self.worker.take() {
            Some(worker) if worker.is_alive() => worker,
            _ => Worker::start(self.launch).await?,
        };
        // Held here while it works: whatever ends this future drops it, and that ends the process.
        let (answer, took) = worker.ask(doing, limit, what, with).await?;
        *self.worker = Some(worker);
        let answer = serde_json::from_value(answer).map_err(|error| EzklError::Nonsense { doing, said: error.to_string() })?;
        Ok((answer, took))
    }
}

/// A running process. Dropping it kills it.
#[derive(Debug)]
struct Worker {
    child: Arc<Mutex<Child>>,
    requests: mpsc::Sender<Request>,
    memory: u64,
}

struct Request {
    line: String,
    answer: oneshot::Sender<Result<String, End>>,
}

/// How a worker came to its end.
struct End {
    status: Option<ExitStatus>,
    /// The last lines of its standard error.
    said: String,
}

#[derive(Deserialize)]
struct Answer {
    ok: Option<Value>,
    error: Option<String>,
    #[serde(default)]
    memory: bool,
    cpu_ms: u64,
    peak: Option<u64>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.lock().kill();
    }
}

impl Worker {
    async fn start(launch: &Launch) -> Result<Self, EzklError> {
        let began = Instant::now();
        let worker = Self::spawn(launch).await?;
        let python = || launch.python.clone();
        let limit = Limit { time: START, key: "" };
        let found = match worker.ask("starting", limit, "version", json!({})).await {
            Ok((found, _)) => found,
            // The script fails before its first answer: it has no ezkl, or is no Python.
            Err(EzklError::Died { how, killed: false, .. }) => return Err(EzklError::NoEzkl { python: python(), said: how }),
            Err(EzklError::TimedOut { .. }) => {
                return Err(EzklError::NoEzkl { python: python(), said: format!("no answer within {} s", START.as_secs()) });
            }
            Err(error) => return Err(error),
        };
        match found.as_str() {
            Some(crate::EZKL) => {}
            other => return Err(EzklError::OtherEzkl { python: python(), found: other.unwrap_or("of no version").to_owned() }),
        }
        debug!(ms = began.elapsed().as_millis() as u64, "A worker has started.");
        Ok(worker)
    }

    async fn spawn(launch: &Launch) -> Result<Self, EzklError> {
        let mut command = Command::new(&launch.python);
        command.args(["-I", "-c", SCRIPT]).arg(std::process::id().to_string()).arg(launch.memory.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A backtrace of the wheel has no names and takes memory where there is none left.
        command.env("RUST_BACKTRACE", "0").env_remove("RUST_LOG");
        if let Some(threads) = launch.threads {
            command.env("RAYON_NUM_THREADS", threads.to_string());
        }
        let (requests, inbox) = mpsc::channel();
        let (started, child) = oneshot::channel();
        // The process ends with the thread that starts it, so that thread stays for as long as the process does.
        std::thread::Builder::new()
            .name("ezkl-worker".into())
            .spawn(move || match command.spawn() {
                Ok(mut child) => {
                    let (Some(input), Some(output), Some(errors)) =
                        (child.stdin.take(), child.stdout.take(), child.stderr.take())
                    else {
                        unreachable!("the three were asked for as pipes")
                    };
                    let child = Arc::new(Mutex::new(child));
                    if started.send(Ok(child.clone())).is_err() {
                        let _ = child.lock().kill();
                    }
                    attend(&child, &inbox, input, BufReader::new(output), errors);
                }
                Err(error) => drop(started.send(Err(error))),
            })
            .map_err(|source| EzklError::NoPython { python: launch.python.clone(), source })?;
        let child = child.await.map_err(|_| EzklError::Ending)?;
        let child = child.map_err(|source| EzklError::NoPython { python: launch.python.clone(), source })?;
        Ok(Self { child, requests, memory: launch.memory })
    }

    fn is_alive(&self) -> bool {
        matches!(self.child.lock().try_wait(), Ok(None))
    }

    async fn ask(&self, doing: &'static str, limit: Limit, what: &str, with: Value) -> Result<(Value, Took), EzklError> {
        let line = format!("{}\n", json!({ "do": what, "with": with }));
        let (answer, answered) = oneshot::channel();
        // Where the thread has gone, its half of `answered` has gone too.
        let _ = self.requests.send(Request { line, answer });
        let answered = tokio::time::timeout(limit.time, answered).await;
        let answered = answered.map_err(|_| EzklError::TimedOut { doing, limit: limit.time, key: limit.key })?;
        let line = answered
            .map_err(|_| EzklError::Died { doing, how: "before it was asked".into(), killed: true })?
            .map_err(|end| self.ended(doing, &end))?;
        let answer: Answer =
            serde_json::from_str(&line).map_err(|error| EzklError::Nonsense { doing, said: error.to_string() })?;
        let took = Took { cpu_ms: answer.cpu_ms, peak: answer.peak.unwrap_or(0) };
        match answer {
            Answer { memory: true, .. } => Err(EzklError::OutOfMemory { doing, limit: self.memory }),
            Answer { error: Some(said), .. } if is_of_memory(&said) => Err(EzklError::OutOfMemory { doing, limit: self.memory }),
            Answer { error: Some(said), .. } => Err(EzklError::Failed { doing, said }),
            Answer { ok, .. } => Ok((ok.unwrap_or(Value::Null), took)),
        }
    }

    fn ended(&self, doing: &'static str, end: &End) -> EzklError {
        if is_of_memory(&end.said) {
            return EzklError::OutOfMemory { doing, limit: self.memory };
        }
        let status = match end.status {
            Some(status) => match status.signal() {
                Some(signal) => format!("signal {signal}"),
                None => format!("code {}", status.code().unwrap_or_default()),
            },
            None => "no status".into(),
        };
        let last = end.said.lines().last().unwrap_or_default();
        let how = if last.is_empty() { status } else { format!("{status}, its last words: {last}") };
        warn!(doing, %how, "A worker ended by itself.");
        EzklError::Died { doing, how, killed: end.status.is_some_and(|status| status.signal().is_some()) }
    }
}

/// Whether these are the words of a process that got no more memory: of Rust's allocator, of Python, or of the system, which also gives no
/// stack for another thread.
fn is_of_memory(said: &str) -> bool {
    let words =
        ["memory allocation of", "MemoryError", "Cannot allocate memory", "failed to spawn thread", "can't start new thread"];
    words.iter().any(|word| said.contains(word))
}

/// Carries requests and answers until the worker has ended or is dropped.
fn attend(
    child: &Mutex<Child>,
    requests: &mpsc::Receiver<Request>,
    mut input: impl Write,
    mut output: impl BufRead,
    errors: impl Read + Send,
) {
    let said = Mutex::new(VecDeque::new());
    std::thread::scope(|scope| {
        let listener = std::thread::Builder::new().name("ezkl-stderr".into()).spawn_scoped(scope, || listen(errors, &said));
        while let Ok(Request { line, answer }) = requests.recv() {
            let mut got = String::new();
            let sent = input.write_all(line.as_bytes()).and_then(|()| input.flush());
            match sent.and_then(|()| output.read_line(&mut got)) {
                Ok(read) if read > 0 => drop(answer.send(Ok(got))),
                _ => {
                    let status = reap(child);
                    if let Ok(listener) = listener {
                        // Every line that it wrote is there before they are judged.
                        let _ = listener.join();
                    }
                    let said = said.lock().make_contiguous().join("\n");
                    drop(answer.send(Err(End { status, said })));
                    return;
                }
            }
        }
        let _ = child.lock().kill();
        reap(child);
    });
}

/// Waits for the end of a process that has closed its output, and makes sure that it comes.
fn reap(child: &Mutex<Child>) -> Option<ExitStatus> {
    for _ in 0..200 {
        if let Ok(Some(status)) = child.lock().try_wait() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut child = child.lock();
    let _ = child.kill();
    child.wait().ok()
}

fn listen(errors: impl Read, said: &Mutex<VecDeque<String>>) {
    for line in BufReader::new(errors).split(b'\n').map_while(Result::ok) {
        let line: String = String::from_utf8_lossy(&line).trim_end().chars().take(500).collect();
        if line.is_empty() {
            continue;
        }
        let mut said = said.lock();
        if said.len() == KEPT {
            said.pop_front();
        }
        said.push_back(line);
    }
}
