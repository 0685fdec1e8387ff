//! The worker process: this same program, opening one plugin and giving it its connection to the node.

use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

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
    let result = if probe { self::probe(&file) } else { serve(&file) };
    if let Err(error) = &result {
        eprintln!("{error}");
    }
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

fn probe(file: &Path) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("no runtime could be started: {error}"))?;
    println!("{}", runtime.block_on(crate::loader::probe_child(file))?);
    Ok(())
}

/// Opens the plugin, gives it the connection to the node, and returns when the node has ended it.
fn serve(file: &Path) -> Result<(), String> {
    // SAFETY: the node passes the socket as standard input, and nothing else in this process uses descriptor 0.
    let mut socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    let started = socket.try_clone().map_err(|error| format!("standard input is no socket: {error}")).and_then(|theirs| {
        // SAFETY: the node has checked the file against the operator's policy, and this process exists to contain it.
        let root = unsafe { library::open(file) }.map_err(|error| error.to_string())?;
        root.connect_socket(theirs).map_err(|error| error.to_string())
    });
    if let Err(error) = started {
        // A node that is gone needs no goodbye.
        let _ = socket.write_all(&ipc::goodbye(&error));
        return Err(error);
    }
    wait_for_end(&socket);
    Ok(())
}

/// Waits until the node has closed its end. The plugin's own threads read the connection; they may hang, this one does not.
fn wait_for_end(socket: &UnixStream) {
    let ended = if cfg!(target_os = "linux") { libc::POLLRDHUP } else { libc::POLLHUP };
    let mut watched = libc::pollfd { fd: socket.as_raw_fd(), events: ended, revents: 0 };
    // SAFETY: one descriptor, open for as long as the call takes.
    while unsafe { libc::poll(&mut watched, 1, -1) } < 0 && std::io::Error::last_os_error().kind() == ErrorKind::Interrupted {}
}
