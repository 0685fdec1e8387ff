//! The log of a running node: to standard error, for people or as JSON lines.

use std::fmt::Debug;
use std::io::IsTerminal;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Filter, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt};

use super::Failure;
use crate::config::{LogLevels, PLUGIN};

/// Starts the log with the configuration's filter.
pub fn start(filter: &str, json: bool) -> Result<(), Failure> {
    let wrong = |error: &dyn std::fmt::Display| Failure::new(Failure::FAILED, "log", format!("cannot start the log: {error}"));
    let levels = Levels::parse(filter).map_err(|error| wrong(&error))?;
    let lines = fmt::layer::<Registry>().with_writer(std::io::stderr);
    let lines = match json {
        true => lines.json().flatten_event(true).with_filter(levels).boxed(),
        false => lines.with_ansi(std::io::stderr().is_terminal()).with_filter(levels).boxed(),
    };
    tracing_subscriber::registry().with(lines).try_init().map_err(|error| wrong(&error))
}

/// A filter that knows `plugin::ID=level`. A target is fixed where code is compiled, and ids are not known then, so the plugin is
/// told apart by a field, which [`EnvFilter`] cannot do for events.
struct Levels {
    targets: EnvFilter,
    levels: LogLevels,
}

impl Levels {
    fn parse(filter: &str) -> Result<Self, tracing_subscriber::filter::ParseError> {
        let levels = LogLevels::parse(filter);
        Ok(Self { targets: EnvFilter::builder().parse(&levels.targets)?, levels })
    }
}

impl<S: Subscriber> Filter<S> for Levels {
    fn enabled(&self, metadata: &Metadata<'_>, context: &Context<'_, S>) -> bool {
        Filter::<S>::enabled(&self.targets, metadata, context)
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        Filter::<S>::callsite_enabled(&self.targets, metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Filter::<S>::max_level_hint(&self.targets)
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        if event.metadata().target() != PLUGIN {
            return true;
        }
        let mut id = PluginId(String::new());
        event.record(&mut id);
        *event.metadata().level() <= self.levels.of_plugin(&id.0)
    }
}

/// Reads the field `plugin` of an event.
struct PluginId(String);

impl Visit for PluginId {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "plugin" {
            self.0 = value.into();
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "plugin" {
            self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What of a few events is logged under a filter.
    fn logged(filter: &str) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let layer = fmt::layer::<Registry>()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .without_time()
            .with_level(false)
            .with_target(false);
        let log = tracing_subscriber::registry().with(layer.with_filter(Levels::parse(filter).unwrap()));
        tracing::subscriber::with_default(log, || {
            for id in ["llama", "echo"] {
                tracing::debug!(target: "plugin", plugin = %id, "debug-{id}");
                tracing::info!(target: "plugin", plugin = %id, "info-{id}");
            }
            tracing::debug!("debug-node");
            tracing::info!("info-node");
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| line.split_whitespace().next().unwrap_or_default()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn one_plugin_can_be_heard_better_or_worse_than_the_rest() {
        assert_eq!(logged("info"), "info-llama info-echo info-node");
        assert_eq!(logged("info,plugin::llama=debug"), "debug-llama info-llama info-echo info-node");
        assert_eq!(logged("debug,plugin::llama=off"), "debug-echo info-echo debug-node info-node");
        assert_eq!(logged("info,plugin=off"), "info-node");
        assert_eq!(logged("warn,plugin::echo=info"), "info-echo");
    }
}
