//! `GET /metrics`: the host's metrics and those of every plugin, as one OpenMetrics text.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tracing::warn;

use super::Edge;
use crate::scheduler::Scheduler;

/// Asks every ready plugin for its metrics: plugin id and OpenMetrics text of each that answered.
pub type PluginTexts = Arc<dyn Fn() -> BoxFuture<'static, Vec<(String, String)>> + Send + Sync>;

/// Where `/metrics` comes from.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    plugins: PluginTexts,
}

impl Metrics {
    /// The scheduler's metrics and those of the plugins; the gateway adds its own.
    pub fn new(scheduler: &Scheduler, plugins: PluginTexts) -> Self {
        let mut registry = Registry::default();
        scheduler.register(&mut registry);
        Self { registry: Arc::new(Mutex::new(registry)), plugins }
    }

    /// Adds metrics of another part of the host.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.registry.lock())
    }
}

/// How long plugins may take to answer; a scrape without them is better than none.
const PLUGINS_ANSWER_WITHIN: Duration = Duration::from_secs(2);

pub(super) async fn handle(State(edge): State<Arc<Edge>>) -> Response {
    let plugins = tokio::time::timeout(PLUGINS_ANSWER_WITHIN, (edge.metrics.plugins)()).await.unwrap_or_else(|_| {
        warn!("Plugins took too long to tell their metrics.");
        Vec::new()
    });
    let mut host = String::new();
    // Writing into a String cannot fail.
    let _ = prometheus_client::encoding::text::encode(&mut host, &edge.metrics.registry.lock());
    let mut families = Families::default();
    families.add(&host, None);
    for (plugin, text) in &plugins {
        families.add(text, Some(plugin));
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], families.text()).into_response()
}

/// Metric families of several texts, each with its head once and its samples together, as OpenMetrics demands.
#[derive(Default)]
struct Families {
    order: Vec<Family>,
    by_name: HashMap<String, usize>,
}

struct Family {
    head: Vec<String>,
    kind: String,
    samples: Vec<String>,
}

impl Families {
    /// Adds one text; its samples get the label `plugin`, where there is one.
    ///
    /// A family whose type differs from that of the same name before it is left out, and so is what is no OpenMetrics.
    fn add(&mut self, text: &str, plugin: Option<&str>) {
        let mut current: Option<usize> = None;
        // HELP and UNIT may stand before or after TYPE.
        let mut pending: Vec<(&str, &str)> = Vec::new();
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (keyword, name, rest) = (words.next(), words.next(), words.next().unwrap_or_default());
                match (keyword, name) {
                    (Some("TYPE"), Some(name)) => {
                        current = self.open(name, rest, plugin);
                        let Some(index) = current else { continue };
                        for (of, line) in pending.drain(..) {
                            if of == name {
                                self.order[index].describe(line);
                            }
                        }
                    }
                    (Some("HELP" | "UNIT"), Some(name)) => match current {
                        Some(index) if self.by_name.get(name) == Some(&index) => self.order[index].describe(line),
                        _ => pending.push((name, line)),
                    },
                    _ => {}
                }
            } else if let (Some(index), Some(sample)) = (current, sample(line, plugin)) {
                self.order[index].samples.push(sample);
            }
        }
    }

    fn open(&mut self, name: &str, kind: &str, plugin: Option<&str>) -> Option<usize> {
        let index = *self.by_name.entry(name.to_owned()).or_insert_with(|| {
            self.order.push(Family { head: vec![format!("# TYPE {name} {kind}")], kind: kind.to_owned(), samples: Vec::new() });
            self.order.len() - 1
        });
        if self.order[index].kind != kind {
            warn!(plugin, metric = name, kind, "Metric left out: another of its name has a different type.");
            return None;
        }
        Some(index)
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for line in self.order.iter().flat_map(|family| family.head.iter().chain(&family.samples)) {
            text.push_str(line);
            text.push('\n');
        }
        text.push_str("# EOF\n");
        text
    }
}

impl Family {
    /// Takes a HELP or UNIT line, once each: the first text's words count.
    fn describe(&mut self, line: &str) {
        let keyword = &line[..line.len().min(6)];
        if !self.head.iter().any(|known| known.starts_with(keyword)) {
            self.head.push(line.to_owned());
        }
    }
}

/// A sample line with the plugin's label, or `None` for a line that is no sample.
fn sample(line: &str, plugin: Option<&str>) -> Option<String> {
    let name_ends = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':')).filter(|end| *end > 0)?;
    let (name, rest) = line.split_at(name_ends);
    let Some(plugin) = plugin else { return Some(line.to_owned()) };
    let plugin = plugin.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
    match rest.strip_prefix('{') {
        Some(rest) if rest.starts_with('}') => Some(format!("{name}{{plugin=\"{plugin}\"{rest}")),
        Some(rest) => {
            // The plugin's own label of that name steps back, as Prometheus itself has it.
            let rest = rest.strip_prefix("plugin=").map_or(rest.to_owned(), |value| format!("exported_plugin={value}"));
            let rest = rest.replace("\",plugin=\"", "\",exported_plugin=\"");
            Some(format!("{name}{{plugin=\"{plugin}\",{rest}"))
        }
        None => rest.starts_with(' ').then(|| format!("{name}{{plugin=\"{plugin}\"}}{rest}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_of_several_plugins_become_one_text() {
        let host = "# HELP up Whether.\n# TYPE up gauge\nup 1\n# EOF\n";
        let llama = "# HELP tokens Tokens.\n# TYPE tokens counter\n# UNIT tokens tokens\n\
            tokens_total{kind=\"a\"} 5\ntokens_total{} 6\n# TYPE up gauge\nup 3\n# EOF\n";
        let echo = "# TYPE tokens counter\n# HELP tokens Others.\ntokens_total{plugin=\"x\"} 7\n# EOF\n";
        let mut families = Families::default();
        families.add(host, None);
        families.add(llama, Some("llama"));
        families.add(echo, Some("e\"cho"));
        let expected = "# TYPE up gauge\n# HELP up Whether.\nup 1\nup{plugin=\"llama\"} 3\n\
            # TYPE tokens counter\n# HELP tokens Tokens.\n# UNIT tokens tokens\n\
            tokens_total{plugin=\"llama\",kind=\"a\"} 5\ntokens_total{plugin=\"llama\"} 6\n\
            tokens_total{plugin=\"e\\\"cho\",exported_plugin=\"x\"} 7\n# EOF\n";
        assert_eq!(families.text(), expected);
    }

    #[test]
    fn a_clash_of_types_and_garbage_are_left_out() {
        let mut families = Families::default();
        families.add("# TYPE a gauge\na 1\n# EOF\n", None);
        families.add("# TYPE a counter\na_total 1\n# TYPE b gauge\n}{ nonsense\nb 2\n", Some("p"));
        families.add("complete nonsense\n# TYPE\n", Some("q"));
        assert_eq!(families.text(), "# TYPE a gauge\na 1\n# TYPE b gauge\nb{plugin=\"p\"} 2\n# EOF\n");
    }

    #[test]
    fn a_histogram_stays_together() {
        let text = "# TYPE h histogram\nh_bucket{le=\"1.0\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 3\nh_count 2\n# EOF\n";
        let mut families = Families::default();
        families.add(text, Some("p"));
        assert!(families.text().contains("h_bucket{plugin=\"p\",le=\"+Inf\"} 2\nh_sum{plugin=\"p\"} 3\n"));
    }
}
