//! Processes as `/proc` shows them.

use std::fs;
use std::time::Duration;

use crate::eventually;

/// A worker process of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    pub pid: i32,
    /// The library that it has opened.
    pub file: String,
}

/// The workers that a process has started and that still run; probes are not among them.
pub fn workers(parent: i32) -> Vec<Worker> {
    children(parent).into_iter().filter_map(worker).collect()
}

/// The processes that a process has started and that still run.
pub fn children(parent: i32) -> Vec<i32> {
    let pids = fs::read_dir("/proc").expect("the process table is there").flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| is_child(*pid, parent)).collect()
}

fn is_child(pid: i32, parent: i32) -> bool {
    // The fields after the name, which is in parentheses and may hold anything: state, then the parent.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let (state, of) = (fields.next(), fields.next());
    state.is_some_and(|state| state != "Z") && of.and_then(|of| of.parse().ok()) == Some(parent)
}

fn worker(pid: i32) -> Option<Worker> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let arguments: Vec<&str> = line.split(|byte| *byte == 0).map(|part| std::str::from_utf8(part).unwrap_or_default()).collect();
    match arguments[..] {
        [_, "plugin-worker", file, ref rest @ ..] if !rest.contains(&"--probe") => Some(Worker { pid, file: file.to_owned() }),
        _ => None,
    }
}

pub fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().unwrap_or_default().split_whitespace().next();
    state.is_some_and(|state| state != "Z")
}

pub async fn gone(pid: i32, limit: Duration) {
    eventually(&format!("process {pid} is gone"), limit, async || (!is_alive(pid)).then_some(())).await;
}

/// Resident memory, in bytes.
pub fn memory(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a running process has memory");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number of KiB") * 1024
}

/// Stops a process, and waits until it has: on a machine with much to do some of its threads go on for a while.
pub fn stop(pid: i32) {
    send(pid, libc::SIGSTOP);
    let state = |task: &fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().next().map(str::to_owned)
    };
    let begun = std::time::Instant::now();
    loop {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there").flatten();
        let running = tasks.filter(|task| state(task).is_some_and(|state| state != "T")).count();
        if running == 0 {
            return;
        }
        assert!(begun.elapsed() < crate::LIMIT, "{running} threads of {pid} do not stop");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn send(pid: i32, signal: i32) {
    // SAFETY: the number is that of a child of the test, or of a child of that child, found a moment ago.
    let sent = unsafe { libc::kill(pid, signal) };
    assert_eq!(sent, 0, "signal {signal} to {pid}: {}", std::io::Error::last_os_error());
}
