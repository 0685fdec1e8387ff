//! How far work is, told from how long it took before on this machine.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::{Duration, Instant};

use fabstir_plugin_api::prelude::*;

/// How often a long step says how far it is.
const TELL: Duration = Duration::from_secs(1);

/// Told of every stage.
pub type Tell<'a> = &'a (dyn Fn(Stage) + Send + Sync);

/// What was measured of one circuit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pace {
    /// Milliseconds on the wall's clock of each step.
    pub steps: BTreeMap<String, u64>,
    pub prepare_cpu_ms: Option<u64>,
    pub prove_cpu_ms: Option<u64>,
    /// The most memory that proving took, in bytes.
    pub memory: Option<u64>,
}

/// Work that is made of steps, and tells where it is.
pub struct Steps<'a> {
    tell: Tell<'a>,
    /// How long each step took the last time; empty where that is not known of all.
    planned: Vec<u64>,
    at: usize,
    took: BTreeMap<String, u64>,
}

impl<'a> Steps<'a> {
    /// Work of these steps, in this order.
    pub fn new(tell: Tell<'a>, names: &[&'static str], pace: &Pace) -> Self {
        let planned: Option<Vec<_>> = names.iter().map(|name| pace.steps.get(*name).copied()).collect();
        Self { tell, planned: planned.unwrap_or_default(), at: 0, took: BTreeMap::new() }
    }

    /// Takes the next step, telling of it at its beginning and every second.
    pub async fn step<T>(&mut self, name: &'static str, work: impl Future<Output = T>) -> T {
        let began = Instant::now();
        let mut work = pin!(work);
        let mut clock = tokio::time::interval_at((began + TELL).into(), TELL);
        (self.tell)(self.stage(name, 0));
        loop {
            tokio::select! {
                biased;
                done = &mut work => {
                    self.at += 1;
                    self.took.insert(name.into(), began.elapsed().as_millis() as u64);
                    return done;
                }
                _ = clock.tick() => (self.tell)(self.stage(name, began.elapsed().as_millis() as u64)),
            }
        }
    }

    /// How long each step took.
    pub fn took(self) -> BTreeMap<String, u64> {
        self.took
    }

    fn stage(&self, name: &'static str, elapsed: u64) -> Stage {
        let Some(usual) = self.planned.get(self.at) else { return Stage { doing: name.into(), percent: None, left_ms: None } };
        let all: u64 = self.planned.iter().sum();
        let done: u64 = self.planned[..self.at].iter().sum();
        // A step that takes longer than before stands still at its end.
        let done = done + elapsed.min(*usual);
        Stage { doing: name.into(), percent: Some((done * 100 / all.max(1)).min(99) as u8), left_ms: Some(all - done) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_took_ten_seconds_before_is_half_done_after_five() {
        let tell = |_: Stage| {};
        let unknown = Steps::new(&tell, &["a", "b"], &Pace::default());
        assert_eq!(unknown.stage("a", 1), Stage { doing: "a".into(), percent: None, left_ms: None });

        let pace = Pace { steps: [("a".into(), 8_000), ("b".into(), 2_000)].into(), ..Pace::default() };
        let mut steps = Steps::new(&tell, &["a", "b"], &pace);
        assert_eq!(steps.stage("a", 5_000), Stage { doing: "a".into(), percent: Some(50), left_ms: Some(5_000) });
        steps.at = 1;
        assert_eq!(steps.stage("b", 60_000), Stage { doing: "b".into(), percent: Some(99), left_ms: Some(0) });
    }

    #[tokio::test]
    async fn a_step_is_told_when_it_begins() {
        let told = parking_lot::Mutex::new(Vec::new());
        let tell = |stage: Stage| told.lock().push(stage.doing);
        let mut steps = Steps::new(&tell, &["a"], &Pace::default());
        assert_eq!(steps.step("a", async { 7 }).await, 7);
        assert_eq!(*told.lock(), ["a"]);
        assert!(steps.took().contains_key("a"));
    }
}
