//! What the cache counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::veto::Veto;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfLayer {
    layer: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfCause {
    cause: &'static str,
}

#[derive(Clone, Default)]
pub(super) struct Metrics {
    pub lookups: Counter,
    hits: Family<OfLayer, Counter>,
    vetoes: Family<OfCause, Counter>,
    pub stored: Counter,
    pub evicted: Counter,
    pub tokens_saved: Counter,
    pub questions: Counter,
    pub questions_forgotten: Counter,
    pub shared: Counter,
    pub taken_in: Counter,
    pub entries: Gauge,
    pub bytes: Gauge,
}

impl Metrics {
    pub fn register(&self, registry: &mut Registry) {
        registry.register("fabstir_cache_lookups", "Requests that a kept answer would have done for", self.lookups.clone());
        registry.register(
            "fabstir_cache_hits",
            "Requests answered without a generation of their own, by layer",
            self.hits.clone(),
        );
        registry.register(
            "fabstir_cache_vetoes",
            "Questions that were near and ask something else, by what",
            self.vetoes.clone(),
        );
        registry.register("fabstir_cache_stored", "Answers kept", self.stored.clone());
        registry.register("fabstir_cache_evicted", "Kept answers given up for want of room", self.evicted.clone());
        registry.register("fabstir_cache_tokens_saved", "Tokens of answers that were not generated", self.tokens_saved.clone());
        registry.register(
            "fabstir_cache_questions",
            "Questions that can be found in other words from now on",
            self.questions.clone(),
        );
        registry.register(
            "fabstir_cache_questions_forgotten",
            "Questions that cannot be found any more, because their answers are gone",
            self.questions_forgotten.clone(),
        );
        registry.register("fabstir_cache_shared", "Answers put where other nodes find them", self.shared.clone());
        registry.register("fabstir_cache_taken_in", "Answers of other nodes that were taken in", self.taken_in.clone());
        registry.register("fabstir_cache_entries", "Answers that are kept", self.entries.clone());
        registry.register("fabstir_cache_bytes", "Bytes of the answers that are kept", self.bytes.clone());
    }

    pub fn veto(&self, veto: Veto) {
        self.vetoes.get_or_create(&OfCause { cause: veto.word() }).inc();
    }

    pub fn hit(&self, layer: &'static str) {
        self.hits.get_or_create(&OfLayer { layer }).inc();
    }
}
