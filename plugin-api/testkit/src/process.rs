//! What the operating system knows of this process: memory, threads, open files.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Bytes of memory that are resident.
pub fn resident() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("this system does not tell a process's memory")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().context("VmRSS is no number")?;
    Ok(kib << 10)
}

/// Hands memory that is free back to the system, so that what is taken next shows in [`resident`].
pub fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The threads that run, by id, with their names.
pub fn threads() -> Result<BTreeMap<u32, String>> {
    let mut threads = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/task").context("this system does not tell a process's threads")? {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().and_then(|id| id.parse().ok()) else { continue };
        // A thread that has ended since the folder was read has no name any more.
        if let Ok(name) = fs::read_to_string(entry.path().join("comm")) {
            threads.insert(id, name.trim().to_owned());
        }
    }
    Ok(threads)
}

/// How many files are open.
pub fn open_files() -> Result<usize> {
    Ok(fs::read_dir("/proc/self/fd").context("this system does not tell a process's files")?.count())
}

/// Threads that were not there before, waiting up to `limit` for them to end. Empty if all have ended.
pub fn threads_since(before: &BTreeMap<u32, String>, limit: Duration) -> Result<Vec<String>> {
    let deadline = Instant::now() + limit;
    loop {
        let new: Vec<String> = threads()?.into_iter().filter(|(id, _)| !before.contains_key(id)).map(|(_, name)| name).collect();
        if new.is_empty() || Instant::now() > deadline {
            return Ok(new);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Watches how much memory is resident at most, on a thread of its own.
pub struct Peak {
    highest: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Peak {
    pub fn watch() -> Result<Self> {
        let highest = Arc::new(AtomicU64::new(resident()?));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, ended) = (highest.clone(), stop.clone());
        std::thread::Builder::new().name("peak".into()).spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                if let Ok(now) = resident() {
                    shared.fetch_max(now, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        })?;
        Ok(Self { highest, stop })
    }

    pub fn highest(&self) -> u64 {
        self.highest.load(Ordering::Relaxed)
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A size for people.
pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / 1_048_576.0)
}
