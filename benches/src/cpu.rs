//! CPU time, which says what work costs on a machine that others use too.

use std::fs;
use std::time::{Duration, Instant};

/// This process and its workers.
pub struct Processes(Vec<libc::clockid_t>);

/// A point on both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    pub wall: Instant,
    /// CPU time used until then, by all processes and threads together.
    pub cpu: Duration,
}

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

    pub fn moment(&self) -> Moment {
        let cpu = self.0.iter().map(|&clock| {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: writes one time.
            let failed = unsafe { libc::clock_gettime(clock, &mut time) };
            assert_eq!(failed, 0, "a worker died");
            Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
        });
        Moment { cpu: cpu.sum(), wall: Instant::now() }
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
