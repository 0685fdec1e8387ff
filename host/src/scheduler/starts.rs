//! Which plugins are on their way, and what they served before.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::routes::Routes;

/// The time to ask again after where nothing can be told.
const SOON: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Starts {
    since: HashMap<String, Instant>,
    /// The models of each plugin when it was last ready.
    served: HashMap<String, Vec<String>>,
}

impl Starts {
    pub fn observe(&mut self, routes: &Routes, now: Instant) {
        let starting = |plugin: &str| routes.starting.iter().any(|starting| starting.plugin == plugin);
        self.since.retain(|plugin, _| starting(plugin));
        self.served.retain(|plugin, _| starting(plugin));
        for starting in &routes.starting {
            self.since.entry(starting.plugin.clone()).or_insert(now);
        }
        for route in &routes.inference {
            let models = route.models.iter().map(|model| model.id.clone()).collect();
            self.served.insert(route.plugin.clone(), models);
        }
    }

    /// Whether a plugin that is starting served this model before.
    pub fn may_bring(&self, routes: &Routes, model: &str) -> bool {
        routes
            .starting
            .iter()
            .any(|starting| self.served.get(&starting.plugin).is_some_and(|models| models.iter().any(|served| served == model)))
    }

    /// When to ask again: as far as the progress so far foretells, at most a minute.
    pub fn ready_in(&self, routes: &Routes, now: Instant) -> Duration {
        let foretold = routes.starting.iter().filter_map(|starting| {
            let percent = f64::from(starting.percent.filter(|percent| (1..=100).contains(percent))?);
            let spent = now.saturating_duration_since(*self.since.get(&starting.plugin)?);
            Some(spent.mul_f64((100.0 - percent) / percent))
        });
        let wait = foretold.min().unwrap_or(SOON);
        Duration::from_secs((wait.as_secs_f64().ceil() as u64).clamp(1, 60))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::Starting;

    #[test]
    fn progress_foretells_the_rest() {
        let mut starts = Starts::default();
        let now = Instant::now();
        let starting = |percent| Routes {
            starting: vec![Starting { plugin: "llama".into(), doing: "loading".into(), percent }],
            ..Routes::default()
        };
        starts.observe(&starting(None), now);
        assert_eq!(starts.ready_in(&starting(None), now), SOON);
        assert_eq!(starts.ready_in(&starting(Some(25)), now + Duration::from_secs(4)), Duration::from_secs(12));
        assert_eq!(starts.ready_in(&starting(Some(0)), now + Duration::from_secs(4)), SOON);
    }
}
