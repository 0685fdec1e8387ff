//! How often and how soon a plugin is started again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Faults within this time count together.
const WINDOW: Duration = Duration::from_secs(600);
/// The pause before each restart within the window. One more fault than that quarantines.
const PAUSES: [Duration; 5] =
    [Duration::ZERO, Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(15)];

/// What a plugin did when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum During {
    /// It started, or had nothing to do: the fault is its own.
    Itself,
    /// It answered requests, one of which may be to blame. A client that can write such a request must not be able to switch the
    /// plugin off for everybody, so such faults make the pauses longer and never quarantine.
    Work,
}

#[derive(Default)]
pub(super) struct Budget {
    faults: VecDeque<(Instant, During)>,
}

impl Budget {
    /// Notes a fault: the pause before the next start, or `None` when there is to be none.
    pub fn fault(&mut self, now: Instant, during: During) -> Option<Duration> {
        // Beyond twice the pauses nothing more can be told from older ones.
        while self.faults.len() > 2 * PAUSES.len() || self.faults.front().is_some_and(|(at, _)| now.duration_since(*at) > WINDOW)
        {
            self.faults.pop_front();
        }
        let pause = PAUSES[self.faults.len().min(PAUSES.len() - 1)];
        let own = self.faults.iter().filter(|(_, during)| *during == During::Itself).count();
        self.faults.push_back((now, during));
        (during == During::Work || own < PAUSES.len()).then_some(pause)
    }

    pub fn faults(&self) -> usize {
        self.faults.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_restart_is_at_once_and_the_sixth_fault_is_the_last() {
        let mut budget = Budget::default();
        let now = Instant::now();
        let pauses: Vec<_> = (0..6).map(|_| budget.fault(now, During::Itself)).collect();
        assert_eq!(pauses[0], Some(Duration::ZERO));
        assert!(pauses[..5].is_sorted());
        assert_eq!(pauses[5], None);
    }

    #[test]
    fn faults_at_work_slow_restarts_down_and_never_end_them() {
        let mut budget = Budget::default();
        let now = Instant::now();
        let pauses: Vec<_> = (0..50).map(|_| budget.fault(now, During::Work)).collect();
        assert_eq!((pauses[0], pauses[49]), (Some(Duration::ZERO), Some(PAUSES[4])));
        assert_eq!(budget.fault(now, During::Itself), Some(PAUSES[4]));
    }

    #[test]
    fn faults_that_lie_long_ago_are_forgiven() {
        let mut budget = Budget::default();
        let now = Instant::now();
        for _ in 0..5 {
            budget.fault(now, During::Itself);
        }
        assert_eq!(budget.fault(now + WINDOW + Duration::from_secs(1), During::Itself), Some(Duration::ZERO));
    }
}
