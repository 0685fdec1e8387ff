//! The worker process: this same program, opening one plugin and passing frames between it and the node.

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use fabstir_plugin_api::abi::{Closed, Port, Received};
use fabstir_plugin_api::frame::Inbox;
use fabstir_plugin_api::{ipc, library};
use tokio::process::Command;

/// The subcommand that makes this program a worker.
pub const SUBCOMMAND: &str = "plugin-worker";

/// A worker's command line, not started yet.
pub(crate) fn command(file: &Path, arguments: &[&str]) -> std::io::Result<Command> {
    // The link leads to this very program even if its file has been replaced since.
    let program = if cfg!(target_os = "linux") { PathBuf::from("/proc/self/exe") } else { std::env::current_exe()? };
    let mut command = Command::new(program);
    command.arg(SUBCOMMAND).arg(file).args(arguments);
    // ggml would start a debugger to print a backtrace when it aborts.
    command.env("GGML_NO_BACKTRACE", "1");
    Ok(command)
}

/// Runs the worker: `plugin-worker FILE [--probe] [--memory=BYTES]`. Its connection to the node is its standard input.
pub fn main() -> ExitCode {
    let (mut file, mut probe, mut memory) = (None, false, None);
    for argument in std::env::args_os().skip(2) {
        match argument.to_str().and_then(|text| text.strip_prefix("--memory=")).map(str::parse) {
            Some(Ok(bytes)) => memory = Some(bytes),
            Some(Err(error)) => {
                eprintln!("--memory is a number of bytes: {error}");
                return ExitCode::from(2);
            }
            None if argument == "--probe" => probe = true,
            None => file = Some(PathBuf::from(argument)),
        }
    }
    let Some(file) = file else {
        eprintln!("a worker needs the plugin's file; it is started by the node, not by hand");
        return ExitCode::from(2);
    };
    if let Err(error) = end_with_parent() {
        eprintln!("no thread could be started: {error}");
        return ExitCode::FAILURE;
    }
    // A terminal's Ctrl-C and a service manager's SIGTERM reach every process of the node at once. The node drains first, and ends
    // its workers after that by closing their connection.
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: ignoring a signal installs no code.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    limit(libc::RLIMIT_CORE as u32, 0);
    if let Some(bytes) = memory {
        limit(libc::RLIMIT_DATA as u32, bytes);
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime could be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = match probe {
        true => runtime.block_on(crate::loader::probe_child(&file)).map(|answer| println!("{answer}")),
        false => runtime.block_on(serve(&file)),
    };
    if let Err(error) = &result {
        eprintln!("{error}");
    }
    use std::io::Write;
    // Whatever the plugin still runs ends with the process. Its exit handlers are not run: they may wait for such threads.
    let _ = std::io::stdout().flush();
    // SAFETY: `_exit` only ends the process.
    unsafe { libc::_exit(i32::from(result.is_err())) }
}

/// Ends this process soon after the node has ended, even while a plugin's initialiser holds the thread that would hear of it.
fn end_with_parent() -> std::io::Result<()> {
    let parent = std::os::unix::process::parent_id();
    std::thread::Builder::new().name("parent-watch".into()).spawn(move || {
        while std::os::unix::process::parent_id() == parent {
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
        // SAFETY: `_exit` only ends the process.
        unsafe { libc::_exit(1) }
    })?;
    Ok(())
}

fn limit(resource: u32, value: u64) {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: the structure lives through the call. A limit that cannot be set is the system's to refuse: lower ones always can.
    let result = unsafe { libc::setrlimit(resource as _, &limit) };
    if result != 0 {
        eprintln!("a limit could not be set: {}", std::io::Error::last_os_error());
    }
}

async fn serve(file: &Path) -> Result<(), String> {
    // SAFETY: the node passes the socket as standard input, and nothing else in this process uses descriptor 0.
    let socket = std::os::unix::net::UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    socket.set_nonblocking(true).map_err(|error| format!("the connection to the node cannot be used: {error}"))?;
    let socket = tokio::net::UnixStream::from_std(socket).map_err(|error| format!("standard input is no socket: {error}"))?;
    let relay = Arc::new(Relay::default());
    let to_host = ipc::carry(socket, relay.clone());
    let started = start(file, to_host.clone());
    match started {
        Ok(plugin) => {
            // Nothing was delivered before: the reader task runs on this thread, which has not waited yet.
            let _ = relay.plugin.set(plugin);
        }
        Err(error) => {
            to_host.close(&error);
            // The goodbye leaves with the next turn of the runtime.
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            return Err(error);
        }
    }
    relay.ended.notified().await;
    Ok(())
}

fn start(file: &Path, to_host: Port) -> Result<Port, String> {
    // SAFETY: the node has checked the file against the operator's policy, and this process exists to contain it.
    let root = unsafe { library::open(file) }.map_err(|error| error.to_string())?;
    root.connect(Arc::new(ToHost(to_host))).map_err(|error| error.to_string())
}

/// Frames from the node, on their way to the plugin.
#[derive(Default)]
struct Relay {
    plugin: OnceLock<Port>,
    ended: tokio::sync::Notify,
}

impl Inbox for Relay {
    fn deliver(&self, frame: Received) -> Result<(), Closed> {
        self.plugin.get().ok_or(Closed)?.forward(frame)
    }

    fn close(&self, reason: &str) {
        if let Some(plugin) = self.plugin.get() {
            plugin.close(reason);
        }
        self.ended.notify_one();
    }
}

/// Frames from the plugin, on their way to the node.
struct ToHost(Port);

impl Inbox for ToHost {
    fn deliver(&self, frame: Received) -> Result<(), Closed> {
        self.0.forward(frame)
    }

    fn close(&self, reason: &str) {
        self.0.close(reason);
    }
}
