//! The host's end of one instance, in this process or in a worker.

use std::any::Any;
use std::collections::VecDeque;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fabstir_plugin_api::error::{PluginError, Result};
use fabstir_plugin_api::interface::Interface;
use fabstir_plugin_api::logging::Record;
use fabstir_plugin_api::plugin::Plugin;
use fabstir_plugin_api::session::{Incoming, Role, Serve, ServeFuture, Session};
use fabstir_plugin_api::{ipc, library};
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Child;
use tokio::sync::{Notify, watch};

use super::worker;
use crate::config::PluginEntry;
use crate::loader::{LoadError, Step};

/// Panics within a minute that make an instance unfit.
const PANICS: usize = 5;

/// The host's end of a connection, for a plugin that is linked into the program.
pub fn host_session(id: &str) -> Session {
    Session::new(Role::Host, End::new(id), tokio::runtime::Handle::current())
}

/// Lines that a worker's end is explained with: what broke is often followed by where.
const LAST_WORDS: usize = 3;

/// Bytes of a line that are read at once.
const LONGEST_LINE: u64 = 64 << 10;

type LastWords = Arc<Mutex<VecDeque<String>>>;

/// An instance that frames can be exchanged with.
pub struct Connected {
    pub session: Session,
    pub plugin: Arc<dyn Plugin>,
    end: Arc<End>,
    /// Kills the worker process, where there is one.
    kill: Arc<Notify>,
    /// How the worker process ended, once it has; `None` in this process.
    exit: Option<watch::Receiver<Option<String>>>,
}

impl Connected {
    /// Opens the library in this process and starts an instance.
    pub fn in_process(file: &Path, id: &str) -> std::result::Result<Self, LoadError> {
        // SAFETY: the operator's policy lets this file run, and its manifest was read.
        let root = unsafe { library::open(file) }
            .map_err(|error| LoadError::new(Step::Connect, "P601", format!("the plugin cannot be opened: {error}")))?;
        let end = End::new(id);
        let session = Session::new(Role::Host, end.clone(), tokio::runtime::Handle::current());
        let port = root
            .connect(session.inbox())
            .map_err(|error| LoadError::new(Step::Connect, "P602", format!("the plugin does not start: {error}")))?;
        session.attach(port);
        Ok(Self::new(session, end, Arc::default(), None))
    }

    /// Starts a worker process that opens the library, and connects to it.
    pub fn worker(file: &Path, entry: &PluginEntry, folder: &Path) -> std::result::Result<Self, LoadError> {
        let failed =
            |why: std::io::Error| LoadError::new(Step::Connect, "P603", format!("no worker process could be started: {why}"));
        let (near, far) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        near.set_nonblocking(true).map_err(failed)?;
        let mut arguments = Vec::new();
        if let Some(memory) = entry.limits.memory {
            arguments.push(format!("--memory={}", memory.0));
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut child = worker::command(file, &arguments)
            .map_err(failed)?
            .current_dir(folder)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(far)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let end = End::new(&entry.id);
        let session = Session::new(Role::Host, end.clone(), tokio::runtime::Handle::current());
        let socket = tokio::net::UnixStream::from_std(near).map_err(failed)?;
        ipc::carry(socket, &session);

        let last = LastWords::default();
        let out = child.stdout.take().map(|out| tokio::spawn(log_lines(out, entry.id.clone(), last.clone())));
        let err = child.stderr.take().map(|err| tokio::spawn(log_lines(err, entry.id.clone(), last.clone())));
        let kill = Arc::new(Notify::new());
        let (exited, exit) = watch::channel(None);
        let (watched, stop) = (session.clone(), kill.clone());
        tokio::spawn(async move {
            let reason = wait(child, &stop).await;
            // The last words may still be in the pipes.
            for lines in [out, err].into_iter().flatten() {
                let _ = tokio::time::timeout(Duration::from_millis(200), lines).await;
            }
            let last: Vec<String> = last.lock().drain(..).collect();
            let reason = if last.is_empty() { reason } else { format!("{reason}; its last words: {}", last.join(" / ")) };
            exited.send_replace(Some(reason.clone()));
            watched.close(&reason);
        });
        Ok(Self::new(session, end, kill, Some(exit)))
    }

    fn new(session: Session, end: Arc<End>, kill: Arc<Notify>, exit: Option<watch::Receiver<Option<String>>>) -> Self {
        let plugin = <dyn Plugin as Interface>::client(session.clone());
        Self { session, plugin, end, kill, exit }
    }

    /// Waits until the instance cannot go on, and says why.
    pub async fn failed(&self) -> String {
        let mut failure = self.end.failure.subscribe();
        let reason = match failure.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "its connection is gone".into(),
        };
        // The process's end says more than the socket's.
        if self.session.is_closed()
            && let Some(mut exit) = self.exit.clone()
        {
            let known = tokio::time::timeout(Duration::from_secs(1), exit.wait_for(Option::is_some)).await;
            if let Ok(Ok(exit)) = known
                && let Some(exit) = &*exit
            {
                // That the connection ended says nothing more; any other reason does.
                return if reason == ipc::ENDED || reason == *exit { exit.clone() } else { format!("{reason}; {exit}") };
            }
        }
        reason
    }

    /// Ends the instance without asking it. A worker process is killed; in this process what hangs stays behind.
    pub async fn end(&self, reason: &str, grace: Duration) {
        self.session.close(reason);
        let Some(mut exit) = self.exit.clone() else { return };
        if tokio::time::timeout(grace, exit.wait_for(Option::is_some)).await.is_err() {
            self.kill.notify_one();
            // Killed processes end.
            let _ = tokio::time::timeout(Duration::from_secs(5), exit.wait_for(Option::is_some)).await;
        }
    }
}

impl Drop for Connected {
    /// An instance that nobody holds any more, as when its start is interrupted, must not run on.
    fn drop(&mut self) {
        self.session.close("the instance was given up");
        self.kill.notify_one();
    }
}

async fn wait(mut child: Child, stop: &Notify) -> String {
    let status = tokio::select! {
        status = child.wait() => status,
        () = stop.notified() => {
            // Fails only if the process has just ended by itself.
            let _ = child.start_kill();
            child.wait().await
        }
    };
    match status {
        Ok(status) => match std::os::unix::process::ExitStatusExt::signal(&status) {
            Some(signal) => format!("the worker process was ended by signal {signal} ({})", signal_name(signal)),
            None => format!("the worker process ended with status {}", status.code().unwrap_or(-1)),
        },
        Err(error) => format!("the worker process cannot be waited for: {error}"),
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGABRT => "SIGABRT, an abort",
        libc::SIGSEGV => "SIGSEGV, a bad memory access",
        libc::SIGBUS => "SIGBUS, a bad memory access",
        libc::SIGILL => "SIGILL, an instruction that this processor lacks",
        libc::SIGFPE => "SIGFPE, a bad calculation",
        libc::SIGKILL => "SIGKILL",
        libc::SIGTERM => "SIGTERM",
        _ => "a signal",
    }
}

async fn log_lines(pipe: impl AsyncRead + Unpin, id: String, last: LastWords) {
    let mut pipe = BufReader::new(pipe);
    let mut line = Vec::new();
    // A line without an end is cut, so that it cannot fill the node's memory.
    while let Ok(1..) = (&mut pipe).take(LONGEST_LINE).read_until(b'\n', &mut line).await {
        let text: String = String::from_utf8_lossy(&line).trim_end().chars().take(500).collect();
        line.clear();
        if !text.is_empty() {
            tracing::debug!(target: "plugin", plugin = %id, "{text}");
            let mut last = last.lock();
            if last.len() == LAST_WORDS {
                last.pop_front();
            }
            last.push_back(text);
        }
    }
}

/// What the host does for a plugin: it takes its log, and hears of its end.
struct End {
    id: String,
    failure: watch::Sender<Option<String>>,
    panics: Mutex<VecDeque<Instant>>,
}

impl End {
    fn new(id: &str) -> Arc<Self> {
        Arc::new(Self { id: id.to_owned(), failure: watch::Sender::new(None), panics: Mutex::default() })
    }

    fn fail(&self, reason: String) {
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                *failure = Some(reason);
            }
            first
        });
    }

    fn panicked(&self) {
        let mut panics = self.panics.lock();
        let now = Instant::now();
        panics.retain(|panic| now.duration_since(*panic) < Duration::from_secs(60));
        panics.push_back(now);
        if panics.len() >= PANICS {
            drop(panics);
            self.fail(format!("it panicked {PANICS} times within a minute"));
        }
    }
}

impl Serve for End {
    fn admit(&self, method: &str) -> Result<Option<Box<dyn Any + Send>>> {
        Err(PluginError::unimplemented(method))
    }

    fn serve(&self, call: Incoming) -> ServeFuture {
        let method = call.method().to_owned();
        Box::pin(async move { Err(PluginError::unimplemented(&method)) })
    }

    fn log(&self, record: Record) {
        if record.is_panic() {
            self.panicked();
        }
        let fields: Vec<String> = record.fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let (plugin, from, fields, text) = (&self.id, &record.target, fields.join(" "), &record.message);
        match record.level {
            0 | 1 => tracing::error!(target: "plugin", %plugin, from, fields, "{text}"),
            2 => tracing::warn!(target: "plugin", %plugin, from, fields, "{text}"),
            3 => tracing::info!(target: "plugin", %plugin, from, fields, "{text}"),
            4 => tracing::debug!(target: "plugin", %plugin, from, fields, "{text}"),
            _ => tracing::trace!(target: "plugin", %plugin, from, fields, "{text}"),
        }
    }

    fn fault(&self, error: &PluginError) {
        tracing::warn!(plugin = %self.id, %error, "The plugin sent a frame that breaks the protocol.");
    }

    fn closed(&self, reason: &str) {
        self.fail(reason.to_owned());
    }
}
