//! How long requests hold a slot, as measured.

use std::collections::HashMap;
use std::time::Duration;

/// The share of a new measurement in the mean; the deviation follows at the same pace.
const WEIGHT: f64 = 0.15;

/// The rate assumed for a model until its first request has ended. Slower than most: an estimate that proves too long costs a
/// refused client some waiting, one that proves too short breaks a promise.
const ASSUMED_TOKENS_PER_SECOND: f64 = 30.0;

/// The answer's length assumed where the client set none.
const ASSUMED_TOKENS: u32 = 256;

#[derive(Default)]
pub(super) struct ServiceTimes(HashMap<String, Measured>);

#[derive(Clone, Copy)]
struct Measured {
    mean: f64,
    deviation: f64,
}

impl ServiceTimes {
    /// Notes that a request held a slot of `model` for this long.
    pub fn record(&mut self, model: &str, held: Duration) {
        let held = held.as_secs_f64();
        match self.0.get_mut(model) {
            Some(measured) => {
                measured.deviation += WEIGHT * ((held - measured.mean).abs() - measured.deviation);
                measured.mean += WEIGHT * (held - measured.mean);
            }
            // Half the first value as its deviation, as TCP does for its first round trip (RFC 6298, 2.2).
            None => {
                self.0.insert(model.to_owned(), Measured { mean: held, deviation: held / 2.0 });
            }
        }
    }

    /// The time to reckon with for one request: the mean and one deviation, or an assumption from the answer's length.
    pub fn estimate(&self, model: &str, max_tokens: Option<u32>) -> Duration {
        let seconds = match self.0.get(model) {
            Some(measured) => measured.mean + measured.deviation,
            None => f64::from(max_tokens.unwrap_or(ASSUMED_TOKENS)) / ASSUMED_TOKENS_PER_SECOND,
        };
        // An hour bounds what one absurd `max_tokens` can claim.
        Duration::from_secs_f64(seconds.clamp(0.001, 3600.0))
    }

    /// Forgets models that nobody serves any more.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.0.retain(|model, _| keep(model));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unmeasured_model_is_judged_by_the_answers_length() {
        let times = ServiceTimes::default();
        assert_eq!(times.estimate("m", Some(60)), Duration::from_secs(2));
        assert!(times.estimate("m", None) > Duration::from_secs(8));
    }

    #[test]
    fn the_estimate_lies_above_the_mean_and_follows_change() {
        let mut times = ServiceTimes::default();
        for _ in 0..50 {
            times.record("m", Duration::from_secs(1));
            times.record("m", Duration::from_secs(3));
        }
        let estimate = times.estimate("m", None);
        assert!(estimate > Duration::from_millis(2500) && estimate < Duration::from_secs(4), "{estimate:?}");
        for _ in 0..50 {
            times.record("m", Duration::from_millis(10));
        }
        assert!(times.estimate("m", None) < Duration::from_millis(100));
    }
}
