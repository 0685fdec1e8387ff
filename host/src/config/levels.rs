//! `node.log`, taken apart: levels of the node's own parts, and levels of plugins.

use std::collections::HashMap;

use tracing::level_filters::LevelFilter;

/// The target of everything that plugins say. Which plugin it was is in the event's field `plugin`.
pub const PLUGIN: &str = "plugin";

/// What a log filter says: a level, and `target=level`, where `plugin::ID` is a plugin's target.
#[derive(Debug, Clone)]
pub struct LogLevels {
    /// The parts that concern the node's own targets, and the most that any plugin may say.
    pub targets: String,
    plugins: HashMap<String, LevelFilter>,
    /// For plugins that the filter does not name.
    other_plugins: LevelFilter,
}

impl LogLevels {
    pub fn parse(filter: &str) -> Self {
        let mut plugins = HashMap::new();
        let mut other_plugins = None;
        let mut general = LevelFilter::OFF;
        let mut targets = Vec::new();
        for part in filter.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (target, level) = part.rsplit_once('=').unwrap_or(("", part));
            match (target.strip_prefix("plugin::"), level.trim().parse::<LevelFilter>()) {
                (Some(id), Ok(level)) => {
                    plugins.insert(id.to_string(), level);
                    continue;
                }
                (None, Ok(level)) if target == PLUGIN => other_plugins = Some(level),
                (None, Ok(level)) if target.is_empty() => general = level,
                _ => {}
            }
            targets.push(part.to_string());
        }
        let other_plugins = other_plugins.unwrap_or(general);
        let most = plugins.values().copied().chain([other_plugins]).max().unwrap_or(other_plugins);
        targets.push(format!("{PLUGIN}={most}"));
        Self { targets: targets.join(","), plugins, other_plugins }
    }

    pub fn of_plugin(&self, id: &str) -> LevelFilter {
        self.plugins.get(id).copied().unwrap_or(self.other_plugins)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugins_own_level_goes_before_the_general_one() {
        let of = |filter: &str, id: &str| LogLevels::parse(filter).of_plugin(id);
        assert_eq!(of("info,plugin::llama=debug", "llama"), LevelFilter::DEBUG);
        assert_eq!(of("warn,plugin::llama=debug", "echo"), LevelFilter::WARN);
        assert_eq!(of("warn,plugin=debug", "echo"), LevelFilter::DEBUG);
        assert_eq!(of("hyper=trace", "echo"), LevelFilter::OFF);
    }
}
