//! Who waits, who runs, and who is next. No clock and no task of its own: the scheduler turns it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::error::Code;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::refused::Refused;
use crate::routes::{InFlightGuard, InferenceRoute, Routes};

/// How long a request waits for a plugin that is starting again.
const RESTART_LIMIT: Duration = Duration::from_secs(300);

/// How long a request waits when its model is served by nobody and nothing is starting: the gap between a crash and its restart.
const GONE_LIMIT: Duration = Duration::from_secs(5);

/// A request's rank in the queue; the least is the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// Whoever had a slot already and lost it through no fault of its own goes first.
    pub newcomer: bool,
    pub priority: Reverse<i32>,
    pub deadline: Due,
    pub arrival: u64,
}

impl Lane {
    /// The plugin generation that the lane is of.
    fn instance(&self) -> (String, u64) {
        (self.plugin.clone(), self.generation)
    }
}

/// A deadline as the queue orders it: none comes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    At(Instant),
    Never,
}

/// One model of one generation of a plugin: where slots are counted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Lane {
    pub plugin: String,
    pub generation: u64,
    pub model: String,
}

/// A route that failed this request, and until when it is not tried again.
#[derive(Debug, Clone)]
pub(super) struct Avoided {
    pub plugin: String,
    pub generation: u64,
    pub until: Instant,
}

pub(super) struct Waiter {
    pub model: String,
    /// Prompt tokens, estimated.
    pub tokens: u64,
    pub avoid: Vec<Avoided>,
    /// Whether a plugin has failed while this request ran in it: it may be what made it fail.
    pub suspect: bool,
    /// Since when nobody has served the model.
    pub orphaned: Option<Instant>,
    pub answer: oneshot::Sender<Result<Ticket, Refused>>,
}

/// The right to run on a route.
pub(super) struct Ticket {
    pub route: Arc<InferenceRoute>,
    pub lane: Lane,
    pub inside: InFlightGuard,
    pub suspect: bool,
}

#[derive(Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Place, Waiter>,
    tokens: u64,
    running: HashMap<Lane, u32>,
    /// Plugin generations in which a suspect runs. There is one in each at most: the next failure then tells which request it was, and
    /// takes none of the others along.
    suspects: HashSet<(String, u64)>,
    /// Lanes whose plugin said `Overloaded`, and until when it is left alone.
    held_back: HashMap<Lane, Instant>,
}

impl Queue {
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn waiting_tokens(&self) -> u64 {
        self.tokens
    }

    pub fn waiting_for(&self, model: &str) -> usize {
        self.waiting.values().filter(|waiter| waiter.model == model).count()
    }

    pub fn enter(&mut self, place: Place, waiter: Waiter) {
        self.tokens += waiter.tokens;
        self.waiting.insert(place, waiter);
    }

    /// Takes a request out; `false` when it is not there any more, because it was given a ticket or a refusal.
    pub fn leave(&mut self, place: &Place) -> bool {
        match self.waiting.remove(place) {
            Some(waiter) => {
                self.tokens -= waiter.tokens;
                true
            }
            None => false,
        }
    }

    pub fn release(&mut self, lane: &Lane) {
        if let Some(running) = self.running.get_mut(lane) {
            *running -= 1;
            if *running == 0 {
                self.running.remove(lane);
            }
        }
    }

    /// Lets the next suspect into a lane's plugin: the one there has ended, or has produced output.
    pub fn clear_suspect(&mut self, lane: &Lane) {
        self.suspects.remove(&lane.instance());
    }

    pub fn hold_back(&mut self, lane: Lane, until: Instant) {
        self.held_back.insert(lane, until);
    }

    /// Running requests by lane.
    pub fn running(&self) -> impl Iterator<Item = (&Lane, u32)> {
        self.running.iter().map(|(lane, running)| (lane, *running))
    }

    /// Slots of a model that are free now, over all its routes.
    pub fn free(&self, routes: &Routes, model: &str, now: Instant) -> u32 {
        lanes(routes, model)
            .filter(|(_, lane, _)| !self.is_held_back(lane, now))
            .map(|(_, lane, parallel)| parallel.saturating_sub(self.running.get(&lane).copied().unwrap_or(0)))
            .sum()
    }

    /// Gives out every free slot, in the order of the queue, and sends those away whose model has gone for too long.
    pub fn turn(&mut self, routes: &Routes, now: Instant) {
        self.held_back.retain(|_, until| *until > now);
        let places: Vec<Place> = self.waiting.keys().copied().collect();
        for place in places {
            let Some(waiter) = self.waiting.get_mut(&place) else { continue };
            // What has passed must not be named as the next turn, or the clock would never rest.
            waiter.avoid.retain(|avoided| avoided.until > now);
            if lanes(routes, &waiter.model).next().is_none() {
                let since = *waiter.orphaned.get_or_insert(now);
                if now >= since + orphan_limit(routes) {
                    let message = format!("no plugin serves `{}` any more", waiter.model);
                    self.answer(&place, Err(Refused::new(Code::Unavailable, message)));
                }
                continue;
            }
            waiter.orphaned = None;
            let waiter = &self.waiting[&place];
            if let Some(ticket) = self.ticket(routes, waiter, now) {
                *self.running.entry(ticket.lane.clone()).or_default() += 1;
                if ticket.suspect {
                    self.suspects.insert(ticket.lane.instance());
                }
                self.answer(&place, Ok(ticket));
            }
        }
    }

    /// When `turn` has something to do next, if nothing else happens before.
    pub fn next_turn(&self, routes: &Routes) -> Option<Instant> {
        let avoided = self.waiting.values().flat_map(|waiter| waiter.avoid.iter().map(|avoided| avoided.until));
        let orphaned = self.waiting.values().filter_map(|waiter| Some(waiter.orphaned? + orphan_limit(routes)));
        self.held_back.values().copied().chain(avoided).chain(orphaned).min()
    }

    fn ticket(&self, routes: &Routes, waiter: &Waiter, now: Instant) -> Option<Ticket> {
        lanes(routes, &waiter.model).find_map(|(route, lane, parallel)| {
            let avoided = waiter.avoid.iter().any(|a| a.plugin == lane.plugin && a.generation == lane.generation);
            let busy = self.running.get(&lane).is_some_and(|running| *running >= parallel);
            let behind_another = waiter.suspect && self.suspects.contains(&lane.instance());
            if avoided || busy || behind_another || self.is_held_back(&lane, now) {
                return None;
            }
            Some(Ticket { inside: route.in_flight.enter()?, route: route.clone(), lane, suspect: waiter.suspect })
        })
    }

    fn answer(&mut self, place: &Place, answer: Result<Ticket, Refused>) {
        let Some(waiter) = self.waiting.remove(place) else { return };
        self.tokens -= waiter.tokens;
        // Whoever gives up leaves the queue before its receiver goes, so this fails only between those two steps.
        if let Err(Ok(ticket)) = waiter.answer.send(answer) {
            self.release(&ticket.lane);
            if ticket.suspect {
                self.clear_suspect(&ticket.lane);
            }
        }
    }

    fn is_held_back(&self, lane: &Lane, now: Instant) -> bool {
        self.held_back.get(lane).is_some_and(|until| *until > now)
    }
}

/// The lanes that serve a model, best rank first.
fn lanes<'a>(routes: &'a Routes, model: &'a str) -> impl Iterator<Item = (&'a Arc<InferenceRoute>, Lane, u32)> {
    routes.inference.iter().filter_map(move |route| {
        let served = route.serves(model)?;
        let lane = Lane { plugin: route.plugin.clone(), generation: route.generation, model: model.to_owned() };
        Some((route, lane, served.parallel.max(1)))
    })
}

fn orphan_limit(routes: &Routes) -> Duration {
    if routes.starting.is_empty() { GONE_LIMIT } else { RESTART_LIMIT }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Script, route};
    use super::*;
    use crate::routes::Starting;

    fn place(priority: i32, due: Option<Instant>, arrival: u64) -> Place {
        let deadline = due.map_or(Due::Never, Due::At);
        Place { newcomer: true, priority: Reverse(priority), deadline, arrival }
    }

    fn waiter(model: &str) -> (Waiter, oneshot::Receiver<Result<Ticket, Refused>>) {
        let (answer, receiver) = oneshot::channel();
        (Waiter { model: model.into(), tokens: 10, avoid: Vec::new(), suspect: false, orphaned: None, answer }, receiver)
    }

    fn serving(plugins: &[(&str, u32)]) -> Routes {
        let inference = plugins.iter().map(|(plugin, parallel)| route(plugin, 1, "m", *parallel, Script::default())).collect();
        Routes { inference, ..Routes::default() }
    }

    #[test]
    fn order_is_lost_slots_then_priority_then_deadline_then_arrival() {
        let now = Instant::now();
        let soon = Some(now + Duration::from_secs(1));
        let late = Some(now + Duration::from_secs(9));
        let mut places = [
            place(0, None, 1),
            place(0, late, 2),
            place(0, soon, 3),
            place(0, soon, 4),
            place(5, None, 5),
            Place { newcomer: false, ..place(-1, None, 6) },
        ];
        places.sort();
        assert_eq!(places.iter().map(|place| place.arrival).collect::<Vec<_>>(), [6, 5, 3, 4, 2, 1]);
    }

    #[test]
    fn the_best_rank_fills_first_and_slots_are_given_once() {
        let routes = serving(&[("best", 1), ("second", 1)]);
        let now = Instant::now();
        let mut queue = Queue::default();
        let mut receivers = Vec::new();
        for arrival in 0..3 {
            let (waiter, receiver) = waiter("m");
            queue.enter(place(0, None, arrival), waiter);
            receivers.push(receiver);
        }
        queue.turn(&routes, now);
        let first = receivers[0].try_recv().expect("a ticket").expect("a ticket");
        let second = receivers[1].try_recv().expect("a ticket").expect("a ticket");
        assert_eq!((first.lane.plugin.as_str(), second.lane.plugin.as_str()), ("best", "second"));
        assert!(receivers[2].try_recv().is_err());
        assert_eq!((queue.waiting(), queue.waiting_tokens()), (1, 10));

        queue.release(&second.lane);
        queue.turn(&routes, now);
        let third = receivers[2].try_recv().expect("a ticket").expect("a ticket");
        assert_eq!(third.lane.plugin, "second");
    }

    #[test]
    fn one_models_queue_does_not_block_another() {
        let mut routes = serving(&[("a", 1)]);
        routes.inference.push(route("b", 1, "other", 1, Script::default()));
        let now = Instant::now();
        let mut queue = Queue::default();
        let receivers: Vec<_> = ["m", "m", "other"]
            .into_iter()
            .zip(0..)
            .map(|(model, arrival)| {
                let (waiter, receiver) = waiter(model);
                queue.enter(place(0, None, arrival), waiter);
                receiver
            })
            .collect();
        queue.turn(&routes, now);
        let got: Vec<bool> = receivers.into_iter().map(|mut receiver| receiver.try_recv().is_ok()).collect();
        assert_eq!(got, [true, false, true]);
    }

    #[test]
    fn a_draining_route_gets_nothing() {
        let routes = serving(&[("a", 1)]);
        routes.inference[0].in_flight.drain();
        let mut queue = Queue::default();
        let (waiter, mut receiver) = waiter("m");
        queue.enter(place(0, None, 0), waiter);
        queue.turn(&routes, Instant::now());
        assert!(receiver.try_recv().is_err());
        assert_eq!(queue.waiting(), 1);
    }

    #[test]
    fn an_overloaded_lane_rests_and_an_avoided_route_is_passed_over() {
        let routes = serving(&[("a", 4), ("b", 4)]);
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut queue = Queue::default();
        queue.hold_back(Lane { plugin: "a".into(), generation: 1, model: "m".into() }, later);
        let (mut waiter, mut receiver) = waiter("m");
        waiter.avoid.push(Avoided { plugin: "b".into(), generation: 1, until: later });
        queue.enter(place(0, None, 0), waiter);
        queue.turn(&routes, now);
        assert!(receiver.try_recv().is_err());
        assert_eq!(queue.next_turn(&routes), Some(later));
        queue.turn(&routes, later);
        assert_eq!(receiver.try_recv().expect("a ticket").expect("a ticket").lane.plugin, "a");
    }

    #[test]
    fn suspects_go_one_by_one_and_others_beside_them() {
        let routes = serving(&[("a", 4)]);
        let now = Instant::now();
        let mut queue = Queue::default();
        let mut receivers: Vec<_> = [true, true, false]
            .into_iter()
            .zip(0..)
            .map(|(suspect, arrival)| {
                let (waiter, receiver) = waiter("m");
                queue.enter(place(0, None, arrival), Waiter { suspect, ..waiter });
                receiver
            })
            .collect();
        queue.turn(&routes, now);
        let first = receivers[0].try_recv().expect("a ticket").expect("a ticket");
        assert!(receivers[1].try_recv().is_err() && receivers[2].try_recv().is_ok());
        queue.clear_suspect(&first.lane);
        queue.turn(&routes, now);
        assert!(receivers[1].try_recv().expect("a ticket").expect("a ticket").suspect);
    }

    #[test]
    fn an_orphan_waits_longer_while_something_starts() {
        let now = Instant::now();
        let mut routes = Routes::default();
        let mut queue = Queue::default();
        let (waiter, mut receiver) = waiter("m");
        queue.enter(place(0, None, 0), waiter);
        routes.starting.push(Starting { plugin: "a".into(), doing: "loading".into(), percent: None });
        queue.turn(&routes, now);
        queue.turn(&routes, now + GONE_LIMIT);
        assert!(receiver.try_recv().is_err());
        routes.starting.clear();
        queue.turn(&routes, now + GONE_LIMIT);
        let refused = receiver.try_recv().expect("an answer").err().expect("a refusal");
        assert_eq!(refused.code, Code::Unavailable);
    }
}
