//! Workloads of the benches, and the way they compare.
//!
//! Everything that is compared runs in the same process and in turns, A B C A B C, so that a change of the machine's speed meets all
//! alike. What is quoted is the median over the rounds and its ratio to the floor of the same run.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fabstir_host::config::{Limits, PluginEntry};
use fabstir_host::supervisor::Connected;
use fabstir_plugin_api::abi::Port;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::frame::Inbox;
use fabstir_plugin_api::inference::{Format, Generation, Inference, Input, Sampling};
use fabstir_plugin_api::interface::Interface;
use fabstir_plugin_api::plugin::{Configure, Plugin};

pub mod answer;
pub mod cpu;
pub mod floor;
pub mod model;
pub mod table;

/// A plugin's end, however it is reached.
pub struct Plugged {
    pub plugin: Arc<dyn Plugin>,
    pub inference: Arc<dyn Inference>,
    /// Keeps the connection open.
    _open: Box<dyn Send + Sync>,
}

/// Where the built plugins lie: beside the benches' own folder.
pub fn library(name: &str) -> PathBuf {
    let here = std::env::current_exe().expect("a running program has a path");
    let folder = here.parent().and_then(|deps| deps.parent()).expect("benches run from target/PROFILE/deps");
    let path = folder.join(format!("lib{}.so", name.replace('-', "_")));
    assert!(path.is_file(), "{} is missing: build the plugins first, as `make bench` does", path.display());
    path
}

impl Plugged {
    fn new(session: &fabstir_plugin_api::session::Session, open: Box<dyn Send + Sync>) -> Self {
        Self {
            plugin: <dyn Plugin as Interface>::client(session.clone()),
            inference: <dyn Inference as Interface>::client(session.clone()),
            _open: open,
        }
    }

    /// Opened in this process, as `isolation = "in-process"` does.
    pub fn in_process(name: &str) -> Self {
        let connected = Connected::in_process(&library(name), name).expect("the plugin opens");
        Self::new(&connected.session.clone(), Box::new(connected))
    }

    /// Opened in a worker process, as `isolation = "process"` does. This program is the worker.
    pub fn worker(name: &str) -> Self {
        let entry = PluginEntry {
            id: name.into(),
            use_: name.into(),
            enabled: true,
            isolation: None,
            rank: 0,
            limits: Limits::default(),
            config: Default::default(),
            origin: Default::default(),
        };
        let folder = std::env::current_dir().expect("a running program has a folder");
        let connected = Connected::worker(&library(name), &entry, &folder).expect("the worker starts");
        Self::new(&connected.session.clone(), Box::new(connected))
    }

    /// Linked into this program: the same frames, without a library in between.
    pub fn linked(connect: fn(Port) -> Result<Arc<dyn Inbox>, String>) -> Self {
        let session = fabstir_host::supervisor::host_session("linked");
        session.attach(Port::new(connect(Port::new(session.inbox())).expect("the plugin starts")));
        Self::new(&session.clone(), Box::new(session))
    }

    pub async fn configure(self, config: serde_json::Value) -> Self {
        let configure = Configure {
            instance: "bench".into(),
            state_dir: std::env::temp_dir(),
            config: config.to_string(),
            log_level: "error".into(),
        };
        self.plugin.configure(&Cx::new(), configure).await.expect("the plugin takes its configuration");
        self
    }
}

/// A request for text, greedy and without limits but `tokens`.
pub fn generation(model: &str, prompt: &str, tokens: Option<u32>) -> Generation {
    Generation {
        model: model.into(),
        input: Input::Text(prompt.into()),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: tokens,
        stop: vec![],
        format: Format::Text,
        logprobs: None,
        cache_salt: String::new(),
        priority: 0,
    }
}

/// A context as the node gives every call: with a deadline.
pub fn cx() -> Cx {
    Cx::new().with_timeout(Duration::from_secs(600))
}

/// Runs `in_flight` callers at a time, each making its share of `total` calls, and returns the time per call.
pub async fn time_calls<Fut>(total: usize, in_flight: usize, caller: impl Fn(usize) -> Fut) -> Duration
where
    Fut: Future<Output = ()> + Send + 'static,
{
    let each = total / in_flight;
    let start = Instant::now();
    let tasks: Vec<_> = (0..in_flight).map(|_| tokio::spawn(caller(each))).collect();
    for task in tasks {
        task.await.expect("a call does not panic");
    }
    start.elapsed() / (each * in_flight) as u32
}

/// When this program was started as a plugin worker, becomes one and does not return.
pub fn become_worker_if_asked() {
    if std::env::args().nth(1).as_deref() == Some(fabstir_host::supervisor::worker::SUBCOMMAND) {
        fabstir_host::supervisor::worker::main();
    }
}

/// Settings that libraries read before `main`, so that the program starts over with them. Workers inherit them.
///
/// OpenMP's threads sleep where they wait for each other, as in the node. And memory comes in huge pages: with small ones, copies of
/// the same model differed in speed by up to 6 % from one start of the program to the next, which is more than what is measured.
pub fn settle() {
    let settings = [("OMP_WAIT_POLICY", "passive"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")];
    if settings.iter().any(|(name, value)| std::env::var_os(name).is_none_or(|found| found != *value)) {
        let program = std::env::current_exe().expect("a running program has a path");
        let error = Command::new(program).args(std::env::args_os().skip(1)).envs(settings).exec();
        panic!("this program cannot start over: {error}");
    }
}

/// A runtime like the node's.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("threads start")
}
