//! One generation, for everybody who asks for it while it runs.
//!
//! There is no task: whoever reads on ahead of the others polls the plugin's answer, and what it says goes into a log that all read. So the
//! fastest reader sets the pace, as it would alone; whoever joins late reads the log from its beginning; and the generation is cancelled when
//! the last reader leaves, whichever that is. The log is as long as one answer, which the model's context bounds.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker, ready};

use fabstir_plugin_api::inference::Chunk;
use futures::StreamExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::{Entry, Found, Key};
use crate::scheduler::{Answer, Refused};

/// What came of the beginning.
pub(super) enum Begun {
    /// It was answered before.
    Kept { entry: Entry, found: Found },
    /// With what was read of it already: its first chunk, or that it failed.
    Generating(Answer, Option<Result<Chunk, Refused>>),
}

/// How it begins. It runs until its first reader has it, or the last has gone.
pub(super) type Beginning = BoxFuture<'static, Result<Begun, Refused>>;

/// What is done with an answer that is whole.
pub(super) type Keep = Box<dyn FnOnce(&Answer, &[Chunk]) + Send>;

/// The generations that can be joined.
#[derive(Default)]
pub(super) struct Flights(Mutex<HashMap<Key, Weak<Flight>>>);

struct Flight {
    state: Mutex<State>,
    wakers: Arc<Wakers>,
    readers: AtomicU64,
    /// Where it stands, if it can be joined.
    listed: Option<(Arc<Flights>, Key)>,
}

struct State {
    phase: Phase,
    log: Vec<Chunk>,
    plugin: String,
    found: Found,
    keep: Option<Keep>,
}

#[expect(clippy::large_enum_variant, reason = "a flight generates for nearly all of its life, and there are few of them")]
enum Phase {
    Beginning(Beginning),
    Generating(Answer),
    /// With what ended it, unless its answer is whole.
    Over(Option<Refused>),
}

/// The tasks of all readers. A plugin's answer wakes the task that polled it last, whose reader may have left: so it wakes all.
#[derive(Default)]
struct Wakers(Mutex<HashMap<u64, Waker>>);

impl Wakers {
    fn wake_all_but(&self, number: Option<u64>) {
        // Taken out first: nobody is woken under the lock.
        let wakers: Vec<Waker> = self.0.lock().extract_if(|reader, _| Some(*reader) != number).map(|(_, waker)| waker).collect();
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Wake for Wakers {
    fn wake(self: Arc<Self>) {
        self.wake_all_but(None);
    }
}

impl Flights {
    /// A reader of the generation with this key: of the one that is under way, or of a new one. And whether it is a new one.
    pub fn join(self: &Arc<Self>, key: Key, begin: impl FnOnce() -> (Beginning, Keep)) -> (Reader, bool) {
        let mut flights = self.0.lock();
        let running = flights.get(&key).and_then(Weak::upgrade);
        if let Some(flight) = running.as_ref().filter(|flight| !flight.is_over()) {
            return (Reader::new(flight.clone()), false);
        }
        let (beginning, keep) = begin();
        let flight = Flight::new(beginning, keep, Some((self.clone(), key)));
        flights.insert(key, Arc::downgrade(&flight));
        // Not before: the last reader of a flight that is over takes the same lock.
        drop(flights);
        drop(running);
        (Reader::new(flight), true)
    }
}

/// A reader of a generation that nobody else can join.
pub(super) fn alone(beginning: Beginning, keep: Keep) -> Reader {
    Reader::new(Flight::new(beginning, keep, None))
}

impl Flight {
    fn new(beginning: Beginning, keep: Keep, listed: Option<(Arc<Flights>, Key)>) -> Arc<Flight> {
        let phase = Phase::Beginning(beginning);
        let state = State { phase, log: Vec::new(), plugin: String::new(), found: Found::Miss, keep: Some(keep) };
        Arc::new(Flight { state: Mutex::new(state), wakers: Arc::default(), readers: AtomicU64::new(0), listed })
    }

    fn is_over(&self) -> bool {
        matches!(self.state.lock().phase, Phase::Over(_))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Some((flights, key)) = &self.listed else { return };
        let mut flights = flights.0.lock();
        // Another may have taken its place.
        if flights.get(key).is_some_and(|flight| flight.strong_count() == 0) {
            flights.remove(key);
        }
    }
}

impl State {
    /// Goes on by one step; `Pending` when there is nothing to be had yet.
    fn step(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match &mut self.phase {
            Phase::Beginning(beginning) => match ready!(beginning.as_mut().poll(context)) {
                Ok(Begun::Generating(answer, first)) => {
                    self.plugin = answer.plugin().to_owned();
                    self.phase = Phase::Generating(answer);
                    if first.is_some() {
                        self.take(first);
                    }
                }
                Ok(Begun::Kept { entry, found }) => {
                    self.plugin = entry.plugin;
                    self.found = found;
                    self.log = entry.chunks;
                    self.phase = Phase::Over(None);
                }
                Err(refused) => self.phase = Phase::Over(Some(refused)),
            },
            Phase::Generating(answer) => {
                let item = ready!(answer.poll_next_unpin(context));
                self.take(item);
            }
            Phase::Over(_) => {}
        }
        Poll::Ready(())
    }

    /// Takes in what the answer says next; `None` at its end.
    fn take(&mut self, item: Option<Result<Chunk, Refused>>) {
        let Phase::Generating(answer) = &self.phase else { return };
        match item {
            Some(Ok(chunk)) => {
                let done = matches!(chunk, Chunk::Done(_));
                self.log.push(chunk);
                if done {
                    if let Some(keep) = self.keep.take() {
                        keep(answer, &self.log);
                    }
                    self.phase = Phase::Over(None);
                }
            }
            Some(Err(refused)) => self.phase = Phase::Over(Some(refused)),
            None => self.phase = Phase::Over(None),
        }
    }
}

/// One client's place in a generation.
pub(super) struct Reader {
    flight: Arc<Flight>,
    number: u64,
    next: usize,
    /// It was told of the end.
    ended: bool,
}

impl Reader {
    fn new(flight: Arc<Flight>) -> Reader {
        let number = flight.readers.fetch_add(1, Ordering::Relaxed);
        Reader { flight, number, next: 0, ended: false }
    }

    /// Returns once the answer has begun: which plugin gives it, and whether it was given before.
    pub async fn begun(&mut self) -> Result<(String, Found), Refused> {
        poll_fn(|context| {
            self.poll(context, |state| match &state.phase {
                Phase::Beginning(_) => None,
                Phase::Over(Some(refused)) if state.log.is_empty() => Some(Err(refused.clone())),
                _ => Some(Ok((state.plugin.clone(), state.found))),
            })
        })
        .await
    }

    /// The next chunk; `None` after the end. A dropped call loses nothing.
    pub async fn next(&mut self) -> Option<Result<Chunk, Refused>> {
        if self.ended {
            return None;
        }
        let at = self.next;
        let item = poll_fn(|context| {
            self.poll(context, |state| match (state.log.get(at), &state.phase) {
                (Some(chunk), _) => Some(Some(Ok(chunk.clone()))),
                (None, Phase::Over(refused)) => Some(refused.clone().map(Err)),
                (None, _) => None,
            })
        })
        .await;
        self.next += 1;
        self.ended = !matches!(item, Some(Ok(Chunk::Text(_))));
        item
    }

    /// Takes steps until there is what is looked for.
    fn poll<T>(&self, context: &mut Context<'_>, look: impl Fn(&State) -> Option<T>) -> Poll<T> {
        // Noted before anything is polled, so that no call to wake up falls between.
        self.flight.wakers.0.lock().insert(self.number, context.waker().clone());
        let mut stepped = false;
        let polled = {
            let mut state = self.flight.state.lock();
            let waker = Waker::from(self.flight.wakers.clone());
            loop {
                if let Some(found) = look(&state) {
                    break Poll::Ready(found);
                }
                if state.step(&mut Context::from_waker(&waker)).is_pending() {
                    break Poll::Pending;
                }
                stepped = true;
            }
        };
        if stepped {
            // The others find here what they wait for, and nothing else tells them.
            self.flight.wakers.wake_all_but(Some(self.number));
        }
        polled
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.flight.wakers.0.lock().remove(&self.number);
    }
}
