//! How often and how soon a plugin is started again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Faults within this time count together.
const WINDOW: Duration = Duration::from_secs(600);
/// The pause before each restart within the window. One more fault than that quarantines.
const PAUSES: [Duration; 5] =
    [Duration::ZERO, Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(15)];

#[derive(Default)]
pub(super) struct Budget {
    faults: VecDeque<Instant>,
}

impl Budget {
    /// Notes a fault: the pause before the next start, or `None` when there is to be none.
    pub fn fault(&mut self, now: Instant) -> Option<Duration> {
        while self.faults.front().is_some_and(|first| now.duration_since(*first) > WINDOW) {
            self.faults.pop_front();
        }
        let pause = PAUSES.get(self.faults.len()).copied();
        self.faults.push_back(now);
        pause
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
        let pauses: Vec<_> = (0..6).map(|_| budget.fault(now)).collect();
        assert_eq!(pauses[0], Some(Duration::ZERO));
        assert!(pauses[..5].is_sorted());
        assert_eq!(pauses[5], None);
    }

    #[test]
    fn faults_that_lie_long_ago_are_forgiven() {
        let mut budget = Budget::default();
        let now = Instant::now();
        for _ in 0..5 {
            budget.fault(now);
        }
        assert_eq!(budget.fault(now + WINDOW + Duration::from_secs(1)), Some(Duration::ZERO));
    }
}
