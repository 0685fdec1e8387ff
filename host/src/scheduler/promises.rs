//! What refused clients were told, and the places kept for them when they come back.
//!
//! A `Retry-After` that only names the mean wait sends everyone back at once, into the next refusal. So each refusal is a promise
//! with a place of its own: the refused stand in an invisible line behind the queue, each told when its turn comes, and a
//! newcomer is let in only if every promise can still be kept.
//!
//! A client is known by its request: who sends the same body again is the one that came back. Clients that send the very same body
//! are one client to it: among them, a newcomer may take the place of one that was promised it.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// How long after its due time a place stays empty for its client. Longer would leave places unused for clients that gave up.
const HELD: Duration = Duration::from_secs(3);

/// How long after its due time a client is still recognised, and let in even if the queue is full.
const REMEMBERED: Duration = Duration::from_secs(60);

/// More promises than this are not written down, which bounds memory: those clients may be refused twice.
const MOST: usize = 4096;

/// How far a request is from being let in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// How many requests must leave before this one fits; zero or less when it fits now.
    pub over: i64,
    /// The time between two requests leaving, on the slow side.
    pub spacing: Duration,
}

impl Load {
    /// Requests that will have left after `wait`.
    fn departures(&self, wait: Duration) -> i64 {
        (wait.as_secs_f64() / self.spacing.as_secs_f64().max(1e-6)) as i64
    }
}

#[derive(Default)]
pub(super) struct Promises {
    /// By due time, then by the order in which they were made; the value is the request's fingerprint.
    made: BTreeMap<(Instant, u64), u64>,
    next: u64,
}

impl Promises {
    /// Whether a newcomer fits without breaking a promise.
    pub fn leave_room(&mut self, now: Instant, load: Load) -> bool {
        self.forget(now);
        load.over <= 0
            && self.held(now).zip(1..).all(|(due, ahead)| {
                let departures = load.departures(due.saturating_duration_since(now));
                load.over + ahead - departures <= 0
            })
    }

    /// Whether this request was promised a place by now. The promise is used up.
    pub fn redeem(&mut self, now: Instant, request: u64) -> bool {
        self.forget(now);
        let mine = self.made.iter().take_while(|((due, _), _)| *due <= now).find(|(_, made_to)| **made_to == request);
        match mine.map(|(key, _)| *key) {
            Some(key) => self.made.remove(&key).is_some(),
            None => false,
        }
    }

    /// Promises a place to a refused request: the time to come back after, in whole seconds.
    pub fn make(&mut self, now: Instant, load: Load, request: u64) -> Duration {
        self.forget(now);
        let ahead = self.held(now).count() as i64;
        let wait = load.spacing.mul_f64((load.over + ahead).max(1) as f64);
        // Nobody overtakes: a promise made later is due later.
        let last = self.made.last_key_value().map(|((due, _), _)| due.saturating_duration_since(now)).unwrap_or_default();
        let wait = whole_seconds(wait.max(last));
        if self.made.len() < MOST {
            self.made.insert((now + wait, self.next), request);
            self.next += 1;
        }
        wait
    }

    pub fn is_empty(&self) -> bool {
        self.made.is_empty()
    }

    /// The due times for which a place is or will be kept, soonest first.
    fn held(&self, now: Instant) -> impl Iterator<Item = Instant> {
        self.made.keys().map(|(due, _)| *due).filter(move |due| *due + HELD > now)
    }

    fn forget(&mut self, now: Instant) {
        while let Some(first) = self.made.first_entry()
            && first.key().0 + REMEMBERED <= now
        {
            first.remove();
        }
    }
}

/// Rounded up, at least one: what the header can say.
fn whole_seconds(wait: Duration) -> Duration {
    Duration::from_secs((wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(spacing_ms: u64) -> Load {
        Load { over: 1, spacing: Duration::from_millis(spacing_ms) }
    }

    #[test]
    fn successive_refusals_are_told_later_times() {
        let mut promises = Promises::default();
        let now = Instant::now();
        let waits: Vec<u64> = (0..8).map(|request| promises.make(now, full(500), request).as_secs()).collect();
        assert_eq!(waits, [1, 1, 2, 2, 3, 3, 4, 4]);
    }

    #[test]
    fn a_wait_is_rounded_up_to_whole_seconds() {
        assert_eq!(whole_seconds(Duration::from_millis(1)).as_secs(), 1);
        assert_eq!(whole_seconds(Duration::from_millis(2000)).as_secs(), 2);
        assert_eq!(whole_seconds(Duration::from_millis(2001)).as_secs(), 3);
        assert_eq!(whole_seconds(Duration::ZERO).as_secs(), 1);
    }

    #[test]
    fn a_newcomer_does_not_take_a_promised_place() {
        let mut promises = Promises::default();
        let now = Instant::now();
        let wait = promises.make(now, full(1000), 7);
        // One place is free at the due time: it is the promised one.
        let one_free = Load { over: 0, spacing: Duration::from_secs(1) };
        assert!(!promises.leave_room(now + wait, one_free));
        // Two free places leave room for both.
        assert!(promises.leave_room(now + wait, Load { over: -1, ..one_free }));
        assert!(promises.redeem(now + wait, 7));
        assert!(promises.leave_room(now + wait, one_free));
    }

    #[test]
    fn a_newcomer_fits_if_it_will_have_left_in_time() {
        let mut promises = Promises::default();
        let now = Instant::now();
        promises.make(now, Load { over: 10, spacing: Duration::from_secs(1) }, 7);
        assert!(promises.leave_room(now, Load { over: 0, spacing: Duration::from_secs(1) }));
        // With slower departures the same newcomer would still be there.
        assert!(!promises.leave_room(now, Load { over: 0, spacing: Duration::from_secs(20) }));
    }

    #[test]
    fn a_promise_is_redeemed_once_not_early_and_not_by_another() {
        let mut promises = Promises::default();
        let now = Instant::now();
        let wait = promises.make(now, full(1000), 7);
        assert!(!promises.redeem(now, 7), "too early");
        assert!(!promises.redeem(now + wait, 8), "another request");
        assert!(promises.redeem(now + wait, 7));
        assert!(!promises.redeem(now + wait, 7), "used up");
    }

    #[test]
    fn a_place_is_held_shortly_and_its_client_remembered_longer() {
        let mut promises = Promises::default();
        let now = Instant::now();
        let due = now + promises.make(now, full(1000), 7);
        let one_free = Load { over: 0, spacing: Duration::from_secs(1) };
        assert!(promises.leave_room(due + HELD, one_free), "the place is no longer kept empty");
        assert!(promises.redeem(due + HELD, 7), "but its client is still welcome");

        let due = now + promises.make(now, full(1000), 9);
        assert!(!promises.redeem(due + REMEMBERED, 9));
        assert!(promises.is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let mut promises = Promises::default();
        let now = Instant::now();
        for request in 0..2 * MOST as u64 {
            promises.make(now, full(1), request);
        }
        assert_eq!(promises.made.len(), MOST);
    }
}
