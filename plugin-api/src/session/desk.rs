//! Calls that have come in, and the tasks that serve them.
//!
//! Waking a task costs as much as all the rest of a null call. So a task that is done with a call takes the next one that waits
//! before it goes to sleep, and no further task is woken while as many are at it as there are threads to run them. One whose call has
//! to wait for something stops being counted until its call goes on.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;

use super::Inner;
use super::serving::{Incoming, serve};

/// Tasks that may be at it: as many as a plugin's runtime has threads.
const MOST_ACTIVE: usize = 2;
/// Tasks that are kept for a next call. More end when they have nothing to do.
const MOST_IDLE: usize = 64;
/// Calls that a task serves before it lets others run on its thread.
const TURN: u32 = 64;
/// How often a task looks for a next call before it goes to sleep: for some microseconds, less than a sleep and a waking cost.
const LOOKS: u32 = 150;
/// How long calls may wait while nobody takes one, as when every task at it runs code that blocks its thread.
const PATIENCE: Duration = Duration::from_millis(5);

#[derive(Default)]
pub(super) struct Desk {
    state: Mutex<State>,
    /// How many calls wait, to be seen without the lock.
    waiting: AtomicUsize,
}

#[derive(Default)]
struct State {
    calls: VecDeque<Incoming>,
    /// Tasks that will take a call as soon as they are done with the one at hand.
    active: usize,
    idle: Vec<Arc<Bell>>,
    /// Counts the calls that were taken.
    taken: u64,
    /// Whether somebody looks after calls that wait.
    watched: bool,
    closed: bool,
}

impl Desk {
    /// Ends the tasks that have nothing to do, and drops the calls that nobody has taken.
    pub fn close(&self) {
        let (idle, calls) = {
            let mut state = self.state.lock();
            state.closed = true;
            (std::mem::take(&mut state.idle), std::mem::take(&mut state.calls))
        };
        idle.iter().for_each(|bell| bell.ring(Ring::End));
        drop(calls);
    }
}

impl Inner {
    /// Has a call served. Runs on the caller's thread, so it does no more than find a task for it.
    pub(super) fn hand_over(self: &Arc<Self>, call: Incoming) {
        let mut state = self.desk.0.state.lock();
        if state.closed {
            drop(state);
            return;
        }
        state.calls.push_back(call);
        self.desk.0.waiting.store(state.calls.len(), Ordering::Relaxed);
        if state.active < MOST_ACTIVE {
            drop(state);
            self.engage();
        } else if !std::mem::replace(&mut state.watched, true) {
            let taken = state.taken;
            drop(state);
            self.runtime.spawn(watch(Arc::downgrade(self), taken));
        }
    }

    /// Has one more task take calls.
    fn engage(self: &Arc<Self>) {
        let mut state = self.desk.0.state.lock();
        state.active += 1;
        match state.idle.pop() {
            Some(bell) => {
                drop(state);
                bell.ring(Ring::Work);
            }
            None => {
                drop(state);
                self.runtime.spawn(work(Active(self.clone())));
            }
        }
    }
}

/// A task's being at it.
struct Active(Arc<Inner>);

impl Active {
    fn next_call(&self) -> Option<Incoming> {
        let desk = &self.0.desk.0;
        for _ in 0..LOOKS {
            if desk.waiting.load(Ordering::Relaxed) > 0 {
                let mut state = desk.state.lock();
                if let Some(call) = state.calls.pop_front() {
                    desk.waiting.store(state.calls.len(), Ordering::Relaxed);
                    state.taken += 1;
                    return Some(call);
                }
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Offers the task for later calls; `false` where there are enough, or none will come.
    fn may_wait(&self, bell: &Arc<Bell>) -> bool {
        let mut state = self.0.desk.0.state.lock();
        let wanted = !state.closed && state.idle.len() < MOST_IDLE;
        if wanted {
            state.idle.push(bell.clone());
        }
        wanted
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let mut state = self.0.desk.0.state.lock();
        state.active -= 1;
        // One that came after the last look must not wait for the next.
        let needed = !state.calls.is_empty() && state.active < MOST_ACTIVE;
        drop(state);
        if needed {
            self.0.engage();
        }
    }
}

/// Serves one call after the other. While it sleeps it holds no session: it would keep it alive.
async fn work(mut active: Active) {
    let bell = Arc::<Bell>::default();
    loop {
        let inner = active.0.clone();
        let mut turn = 0;
        while let Some(call) = active.next_call() {
            let mut served = pin!(serve(&inner, call));
            if futures::poll!(&mut served).is_pending() {
                drop(active);
                served.await;
                inner.desk.0.state.lock().active += 1;
                active = Active(inner.clone());
            }
            turn += 1;
            if turn % TURN == 0 {
                tokio::task::yield_now().await;
            }
        }
        if !active.may_wait(&bell) {
            return;
        }
        let weak = Arc::downgrade(&inner);
        drop((active, inner));
        if !std::future::poll_fn(|context| bell.poll_heard(context)).await {
            return;
        }
        // Whoever rang has counted this task already.
        let Some(inner) = weak.upgrade() else { return };
        active = Active(inner);
    }
}

/// Engages another task as long as calls wait and nobody takes them.
async fn watch(inner: Weak<Inner>, mut taken: u64) {
    loop {
        tokio::time::sleep(PATIENCE).await;
        let Some(inner) = inner.upgrade() else { return };
        let stuck = {
            let mut state = inner.desk.0.state.lock();
            if state.calls.is_empty() {
                state.watched = false;
                return;
            }
            std::mem::replace(&mut taken, state.taken) == state.taken
        };
        if stuck {
            inner.engage();
        }
    }
}

/// Wakes one sleeping task.
#[derive(Default)]
struct Bell(Mutex<Ring>);

#[derive(Default)]
enum Ring {
    #[default]
    Silent,
    Awaited(Waker),
    Work,
    End,
}

impl Bell {
    fn ring(&self, ring: Ring) {
        let before = std::mem::replace(&mut *self.0.lock(), ring);
        if let Ring::Awaited(task) = before {
            task.wake();
        }
    }

    /// Whether there is work, once that is known.
    fn poll_heard(&self, context: &Context<'_>) -> Poll<bool> {
        let mut ring = self.0.lock();
        match std::mem::take(&mut *ring) {
            Ring::Work => Poll::Ready(true),
            Ring::End => Poll::Ready(false),
            Ring::Silent | Ring::Awaited(_) => {
                *ring = Ring::Awaited(context.waker().clone());
                Poll::Pending
            }
        }
    }
}
