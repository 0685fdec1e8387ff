//! A running node.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, mpsc};
use std::time::Duration;

use crate::process::{self, Worker};
use crate::{LIMIT, Place, eventually};

/// A node with its folder. Dropped, it is killed; its log is printed where the test has failed.
pub struct Node {
    pub place: Place,
    pub url: String,
    pub(crate) http: reqwest::Client,
    child: Child,
    log: PathBuf,
    /// What it has printed after the line with its address.
    out: Mutex<mpsc::Receiver<String>>,
}

impl Node {
    /// Starts a node and waits until it is healthy.
    pub async fn start(config: &str) -> Self {
        let node = Self::launch(Place::new(config), &[]);
        node.healthy().await;
        node
    }

    /// Starts a node and waits until it listens, which it does before any plugin is ready.
    pub fn launch(place: Place, arguments: &[&str]) -> Self {
        let arguments: Vec<&str> = ["run"].iter().chain(arguments).copied().collect();
        Self::start_command(place, &arguments)
    }

    /// Starts a subcommand that serves on a port, and waits until it listens.
    pub fn start_command(place: Place, arguments: &[&str]) -> Self {
        let log = place.path().join("log");
        let mut command = place.command();
        // A node of an earlier launch in the same folder has a log worth keeping.
        let file = File::options().create(true).append(true).open(&log).expect("a log can be written");
        command.args(arguments).stdout(Stdio::piped()).stderr(file);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let lines = BufReader::new(child.stdout.take().expect("its output is a pipe")).lines();
        let (line, out) = mpsc::channel();
        // The thread ends with the node, whose end of the pipe it reads.
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|text| line.send(text)));
        let http = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().expect("a client can be made");
        let mut node = Self { place, url: String::new(), http, child, log, out: Mutex::new(out) };
        let first = node.lines().recv_timeout(LIMIT).unwrap_or_else(|_| panic!("the node did not start to listen"));
        node.url = first.strip_prefix("Listening on ").unwrap_or_else(|| panic!("it printed {first:?}")).to_owned();
        assert!(node.url.starts_with("http://127.0.0.1:"), "{}", node.url);
        node
    }

    /// Ends the node by force and starts it again in the same folder.
    pub fn relaunch(self, arguments: &[&str]) -> Self {
        Self::launch(self.into_place(), arguments)
    }

    /// Ends the node by force, unless it has ended, and gives its folder back.
    pub fn into_place(mut self) -> Place {
        self.end();
        std::mem::replace(&mut self.place, Place::new(""))
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits until `/health` answers with 200.
    pub async fn healthy(&self) {
        eventually("the node is healthy", 2 * LIMIT, async || (self.get("/health").await.status == 200).then_some(())).await;
    }

    /// Waits until a model is served.
    pub async fn serves(&self, model: &str) {
        eventually(&format!("{model} is served"), 2 * LIMIT, async || {
            self.models().await.iter().any(|id| id == model).then_some(())
        })
        .await;
    }

    /// Everything that the node has logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).expect("the log is there")).into_owned()
    }

    /// Waits until the log holds each of these texts.
    pub async fn logged(&self, texts: &[&str]) {
        for text in texts {
            eventually(&format!("the log says {text:?}"), LIMIT, async || self.log().contains(text).then_some(())).await;
        }
    }

    /// The worker of a plugin, by the plugin's name, as soon as there is one that is not `before`.
    pub async fn worker(&self, plugin: &str, before: Option<i32>) -> i32 {
        let file = plugin.replace('-', "_");
        eventually(&format!("{plugin} has a worker other than {before:?}"), LIMIT, async || {
            self.workers().into_iter().find(|worker| worker.file.contains(&file) && Some(worker.pid) != before)
        })
        .await
        .pid
    }

    pub fn workers(&self) -> Vec<Worker> {
        process::workers(self.pid())
    }

    pub fn memory(&self) -> u64 {
        process::memory(self.pid())
    }

    pub fn signal(&self, signal: i32) {
        process::send(self.pid(), signal);
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// Waits until the node has ended by itself: its exit code, or minus the signal's number.
    pub async fn exit(&mut self, limit: Duration) -> i32 {
        let status: ExitStatus =
            eventually("the node ends", limit, async || self.child.try_wait().expect("a child can be waited for")).await;
        status.code().unwrap_or_else(|| -status.signal().unwrap_or(0))
    }

    /// Lines on standard output after the first.
    pub fn further_output(&self) -> Vec<String> {
        self.lines().try_iter().collect()
    }

    /// Lines on standard output after the first, up to its end: the node has ended, or ends now.
    pub fn output_to_the_end(&self) -> Vec<String> {
        let lines = self.lines();
        std::iter::from_fn(|| lines.recv_timeout(LIMIT).ok()).collect()
    }

    fn lines(&self) -> MutexGuard<'_, mpsc::Receiver<String>> {
        self.out.lock().expect("nobody panics with it")
    }

    fn end(&mut self) {
        // Fails only if it has ended by itself, and then it is waited for all the same.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- the last lines of the node's log\n{}\n---", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
    }
}
