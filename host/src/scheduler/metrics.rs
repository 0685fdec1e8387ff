//! What the scheduler counts. Where vLLM has a series of the same meaning it is offered under that name too, so that dashboards
//! made for it work: the label is `model_name` for that reason.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfModel {
    model_name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfCause {
    cause: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfFinish {
    model_name: String,
    finished_reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OfOutcome {
    outcome: &'static str,
}

type Histograms = Family<OfModel, Histogram, fn() -> Histogram>;

#[derive(Clone)]
pub(super) struct Metrics {
    pub waiting: Gauge,
    pub waiting_tokens: Gauge,
    running: Family<OfModel, Gauge>,
    admitted: Family<OfModel, Counter>,
    refused: Family<OfCause, Counter>,
    retries: Family<OfCause, Counter>,
    promises: Family<OfOutcome, Counter>,
    finished: Family<OfFinish, Counter>,
    queue_time: Histograms,
    first_token: Histograms,
    inter_token: Histograms,
    whole: Histograms,
    prompt_tokens: Family<OfModel, Counter>,
    generation_tokens: Family<OfModel, Counter>,
}

impl Metrics {
    pub fn new() -> Self {
        let long: fn() -> Histogram = || Histogram::new(LONG);
        let short: fn() -> Histogram = || Histogram::new(SHORT);
        Self {
            waiting: Gauge::default(),
            waiting_tokens: Gauge::default(),
            running: Family::default(),
            admitted: Family::default(),
            refused: Family::default(),
            retries: Family::default(),
            promises: Family::default(),
            finished: Family::default(),
            queue_time: Family::new_with_constructor(long),
            first_token: Family::new_with_constructor(long),
            inter_token: Family::new_with_constructor(short),
            whole: Family::new_with_constructor(long),
            prompt_tokens: Family::default(),
            generation_tokens: Family::default(),
        }
    }

    pub fn register(&self, registry: &mut Registry) {
        for prefix in ["fabstir_", "vllm:"] {
            let mut histogram = |name: &str, help: &str, family: &Histograms| {
                registry.register(format!("{prefix}{name}"), help, family.clone());
            };
            histogram("request_queue_time_seconds", "Time from arrival to a slot", &self.queue_time);
            histogram("time_to_first_token_seconds", "Time from arrival to the first token", &self.first_token);
            histogram("inter_token_latency_seconds", "Time between two tokens of one answer", &self.inter_token);
            histogram("e2e_request_latency_seconds", "Time from arrival to the end of the answer", &self.whole);
            let mut counter = |name: &str, help: &str, family: &Family<OfModel, Counter>| {
                registry.register(format!("{prefix}{name}"), help, family.clone());
            };
            counter("prompt_tokens", "Prompt tokens read", &self.prompt_tokens);
            counter("generation_tokens", "Tokens generated", &self.generation_tokens);
            registry.register(format!("{prefix}num_requests_running"), "Requests that hold a slot", self.running.clone());
            registry.register(format!("{prefix}num_requests_waiting"), "Requests that wait for a slot", self.waiting.clone());
            registry.register(format!("{prefix}request_success"), "Answers that ended well", self.finished.clone());
        }
        registry.register("fabstir_queue_tokens", "Prompt tokens that wait, estimated", self.waiting_tokens.clone());
        registry.register("fabstir_requests_admitted", "Requests let in", self.admitted.clone());
        registry.register("fabstir_requests_refused", "Requests not let in or failed, by cause", self.refused.clone());
        registry.register("fabstir_request_retries", "Requests given to a plugin again, by cause", self.retries.clone());
        registry.register("fabstir_retry_after_promises", "Retry-After times given, kept and broken", self.promises.clone());
    }

    pub fn admitted(&self, model: &str) {
        self.admitted.get_or_create(&of(model)).inc();
    }

    pub fn refused(&self, cause: &str) {
        self.refused.get_or_create(&OfCause { cause: cause.replace(' ', "_") }).inc();
    }

    pub fn retried(&self, cause: &str) {
        self.retries.get_or_create(&OfCause { cause: cause.replace(' ', "_") }).inc();
    }

    pub fn promise(&self, outcome: &'static str) {
        self.promises.get_or_create(&OfOutcome { outcome }).inc();
    }

    /// The instruments of one model, looked up once per answer instead of once per token.
    pub fn of_model(&self, model: &str) -> ModelMetrics {
        let of = of(model);
        ModelMetrics {
            running: self.running.get_or_create(&of).clone(),
            queue_time: self.queue_time.get_or_create(&of).clone(),
            first_token: self.first_token.get_or_create(&of).clone(),
            inter_token: self.inter_token.get_or_create(&of).clone(),
            whole: self.whole.get_or_create(&of).clone(),
            prompt_tokens: self.prompt_tokens.get_or_create(&of).clone(),
            generation_tokens: self.generation_tokens.get_or_create(&of).clone(),
        }
    }

    pub fn finished(&self, model: &str, reason: &str) {
        self.finished.get_or_create(&OfFinish { model_name: model.to_owned(), finished_reason: reason.to_owned() }).inc();
    }
}

#[derive(Clone)]
pub(super) struct ModelMetrics {
    pub running: Gauge,
    pub queue_time: Histogram,
    pub first_token: Histogram,
    pub inter_token: Histogram,
    pub whole: Histogram,
    pub prompt_tokens: Counter,
    pub generation_tokens: Counter,
}

fn of(model: &str) -> OfModel {
    OfModel { model_name: model.to_owned() }
}

// vLLM's bounds, thinned out: seconds for whole stages, and finer ones for single tokens, where a small model takes under 1 ms.
const LONG: [f64; 18] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0];
const SHORT: [f64; 15] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5];
