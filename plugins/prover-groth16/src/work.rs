//! Long work in pieces: on several threads, with its progress told and its processor time counted, and ended between two pieces.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use crate::error::Error;

/// What long work is done with.
pub struct Work<'a> {
    threads: usize,
    ended: &'a (dyn Fn() -> bool + Sync),
    told: &'a (dyn Fn(&'static str, u8) + Sync),
    /// Processor time of the other threads, in nanoseconds.
    elsewhere: AtomicU64,
    began: u64,
}

/// A part of the work: what it is called, and from which to which percent of the whole it goes.
#[derive(Clone, Copy)]
pub struct Part {
    pub doing: &'static str,
    pub from: u8,
    pub to: u8,
}

impl<'a> Work<'a> {
    /// `ended` says whether nobody waits for the work any more; `told` hears what is done and how many percent of the whole are.
    pub fn new(threads: usize, ended: &'a (dyn Fn() -> bool + Sync), told: &'a (dyn Fn(&'static str, u8) + Sync)) -> Self {
        Self { threads: threads.max(1), ended, told, elsewhere: AtomicU64::new(0), began: thread_cpu_ns() }
    }

    /// Begins a part that is not done in pieces.
    ///
    /// # Errors
    /// `Ended`, as everywhere.
    pub fn begin(&self, part: Part) -> Result<(), Error> {
        (self.told)(part.doing, part.from);
        self.check()
    }

    pub fn check(&self) -> Result<(), Error> {
        if (self.ended)() { Err(Error::Ended) } else { Ok(()) }
    }

    /// Does `count` pieces, in any order, and gives what they made, in order.
    pub fn pieces<T: Send>(&self, part: Part, count: usize, piece: impl Fn(usize) -> T + Sync) -> Result<Vec<T>, Error> {
        self.begin(part)?;
        let (next, done, stop) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
        let share = || {
            let mut made = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count || stop.load(Ordering::Relaxed) {
                    return made;
                }
                if (self.ended)() {
                    stop.store(true, Ordering::Relaxed);
                    return made;
                }
                made.push((number, piece(number)));
                let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                let span = usize::from(part.to - part.from);
                (self.told)(part.doing, part.from + (span * done / count) as u8);
            }
        };
        let mut made = thread::scope(|scope| {
            let others: Vec<_> = (1..self.threads.min(count))
                .map(|_| {
                    scope.spawn(|| {
                        let made = share();
                        self.elsewhere.fetch_add(thread_cpu_ns(), Ordering::Relaxed);
                        made
                    })
                })
                .collect();
            let mut made = share();
            for other in others {
                made.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            made
        });
        if made.len() < count {
            return Err(Error::Ended);
        }
        made.sort_unstable_by_key(|(number, _)| *number);
        Ok(made.into_iter().map(|(_, made)| made).collect())
    }

    /// Processor time so far, in milliseconds, at least 1. To be asked from the thread that made this.
    pub fn cpu_ms(&self) -> u64 {
        let here = thread_cpu_ns().saturating_sub(self.began);
        ((here + self.elsewhere.load(Ordering::Relaxed)) / 1_000_000).max(1)
    }
}

/// Processor time of this thread, in nanoseconds.
fn thread_cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is ours, and a call that fails leaves it as it is.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: Part = Part { doing: "counting", from: 10, to: 30 };

    #[test]
    fn pieces_come_back_in_order_and_the_progress_reaches_its_end() {
        let highest = AtomicUsize::new(0);
        let told = |_: &'static str, percent: u8| {
            highest.fetch_max(percent.into(), Ordering::Relaxed);
        };
        for threads in [1, 3] {
            let work = Work::new(threads, &|| false, &told);
            let squares = work.pieces(PART, 100, |number| number * number).unwrap();
            assert!(squares.iter().enumerate().all(|(number, square)| *square == number * number));
            assert_eq!(highest.load(Ordering::Relaxed), 30);
        }
    }

    #[test]
    fn work_that_nobody_waits_for_ends_between_two_pieces() {
        let done = AtomicUsize::new(0);
        let ended = || done.load(Ordering::Relaxed) >= 5;
        for threads in [1, 2] {
            done.store(0, Ordering::Relaxed);
            let work = Work::new(threads, &ended, &|_, _| {});
            let outcome = work.pieces(PART, 1000, |_| done.fetch_add(1, Ordering::Relaxed));
            assert!(matches!(outcome, Err(Error::Ended)));
            assert!(done.load(Ordering::Relaxed) <= 5 + threads);
        }
    }
}
