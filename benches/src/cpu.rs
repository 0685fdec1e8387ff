//! CPU time, which says what work costs on a machine that others use too.

use std::fs;
use std::thread;
use std::time::Duration;

/// This process and its workers.
pub struct Processes(Vec<libc::clockid_t>);

impl Processes {
    /// This process and those children of it that run now. Children that are idle add nothing, so that one sum serves every
    /// candidate.
    pub fn now() -> Self {
        let workers = children().into_iter().map(|child| {
            let mut clock = 0;
            // SAFETY: writes one number; the child is ours and not waited for, so its number is still its own.
            let failed = unsafe { libc::clock_getcpuclockid(child, &mut clock) };
            assert_eq!(failed, 0, "a child's clock can be read");
            clock
        });
        Self([libc::CLOCK_PROCESS_CPUTIME_ID].into_iter().chain(workers).collect())
    }

    /// CPU time used until now, by all processes and threads together. To be asked while they have nothing to do: the kernel counts
    /// a thread that runs on another core only up to its last tick, milliseconds ago. So this waits for them to fall asleep first.
    pub fn used(&self) -> Duration {
        thread::sleep(Duration::from_millis(5));
        let used = self.0.iter().map(|&clock| {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: writes one time.
            let failed = unsafe { libc::clock_gettime(clock, &mut time) };
            assert_eq!(failed, 0, "a worker died");
            Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
        });
        used.sum()
    }
}

/// The processes whose parent is this one.
fn children() -> Vec<libc::pid_t> {
    let me = std::process::id().to_string();
    let is_child = |process: &libc::pid_t| {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // The name is in brackets and may hold anything; the state and the parent follow it.
        stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)).is_some_and(|parent| parent == me)
    };
    let processes = fs::read_dir("/proc").expect("Linux has /proc").flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}
