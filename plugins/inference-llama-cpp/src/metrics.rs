//! What an instance counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The counts of one model. Cheap to clone; clones count together.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    pub prompt_tokens: Counter,
    pub cached_tokens: Counter,
    pub generated_tokens: Counter,
    pub active: Gauge,
}

/// The counts of all models, by name.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    prompt_tokens: Family<Labels, Counter>,
    cached_tokens: Family<Labels, Counter>,
    generated_tokens: Family<Labels, Counter>,
    active: Family<Labels, Gauge>,
}

type Labels = Vec<(String, String)>;

impl Metrics {
    pub fn register(&self, registry: &mut Registry) {
        registry.register("llama_prompt_tokens", "Prompt tokens received", self.prompt_tokens.clone());
        registry.register("llama_cached_tokens", "Prompt tokens that were in the cache already", self.cached_tokens.clone());
        registry.register("llama_generated_tokens", "Tokens generated", self.generated_tokens.clone());
        registry.register("llama_active_generations", "Generations that hold a slot", self.active.clone());
    }

    /// The counts of one model.
    pub fn of(&self, model: &str) -> Counters {
        let labels = vec![("model".to_owned(), model.to_owned())];
        Counters {
            prompt_tokens: self.prompt_tokens.get_or_create(&labels).clone(),
            cached_tokens: self.cached_tokens.get_or_create(&labels).clone(),
            generated_tokens: self.generated_tokens.get_or_create(&labels).clone(),
            active: self.active.get_or_create(&labels).clone(),
        }
    }
}
