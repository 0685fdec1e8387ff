//! How long does a person wait for the first token, and for each one after it?
//!
//! Load: "What is the capital of France?" to tiny-chat, one question at a time, greedy, on one thread; the prompt is read anew each
//! time. Compared, in turns and in one run: the plugin's engine without a boundary, the plugin opened in this process, and in a worker
//! process. `inference-echo` beside them is the boundary with no model behind it. A model this small
//! hides nothing of it.
//!
//! `make bench` runs it. With `-- --table` only the tables are made, without criterion's own measurements.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use criterion::Criterion;
use fabstir_benches::answer::{Answer, from_engine, from_plugin};
use fabstir_benches::cpu::Processes;
use fabstir_benches::table::{Rounds, print_machine};
use fabstir_benches::{Plugged, become_worker_if_asked, cx, generation, model, runtime, settle};
use fabstir_plugin_api::inference::{Generation, Input, Message};
use inference_llama_cpp::config::ModelConfig;
use inference_llama_cpp::engine::Engine;

const ROUNDS: usize = 400;
const TOKENS: u32 = 16;

const NAMES: [&str; 5] = ["engine", "in process", "worker", "echo, in process", "echo, worker"];

struct Subjects {
    processes: Processes,
    engine: Arc<Engine>,
    /// A plugin and the model to ask it for.
    plugged: [(Plugged, &'static str); 4],
    /// Requests so far: each has a prompt cache of its own, so that each reads its prompt.
    asked: AtomicUsize,
}

impl Subjects {
    async fn load() -> Self {
        let path = model::tiny_chat();
        let model = ModelConfig { threads: Some(1), ..ModelConfig::new("tiny-chat", &path) };
        let engine = Engine::load(&model, |_| true).expect("the model loads");
        let llama = serde_json::json!({ "models": [{ "id": "tiny-chat", "path": path, "threads": 1 }] });
        let echo = serde_json::json!({});
        let plugged = [
            (Plugged::in_process("inference-llama-cpp").configure(llama.clone()).await, "tiny-chat"),
            (Plugged::worker("inference-llama-cpp").configure(llama).await, "tiny-chat"),
            (Plugged::in_process("inference-echo").configure(echo.clone()).await, "echo"),
            (Plugged::worker("inference-echo").configure(echo).await, "echo"),
        ];
        for (plugged, model) in &plugged {
            plugged.inference.load(&cx(), (*model).into()).await.expect("the plugin loads the model");
        }
        Self { processes: Processes::now(), engine: Arc::new(engine), plugged, asked: AtomicUsize::new(0) }
    }

    fn request(&self, model: &str) -> Generation {
        let question = Message { role: "user".into(), content: "What is the capital of France?".into(), name: None };
        Generation {
            input: Input::Messages(vec![question]),
            cache_salt: self.asked.fetch_add(1, Ordering::Relaxed).to_string(),
            ..generation(model, "", Some(TOKENS))
        }
    }

    async fn ask(&self, candidate: usize) -> Answer {
        match candidate.checked_sub(1) {
            None => {
                let (engine, request) = (self.engine.clone(), self.request("tiny-chat"));
                let answer =
                    tokio::task::spawn_blocking(move || from_engine(&engine, &request).recv().expect("the engine answers"));
                answer.await.expect("no panic")
            }
            Some(place) => {
                let (plugged, model) = &self.plugged[place];
                from_plugin(&*plugged.inference, self.request(model)).await
            }
        }
    }
}

async fn table(subjects: &Subjects) {
    let mut first = Rounds::new("time to first token", "us", &NAMES);
    let mut between = Rounds::new("time between tokens, mean of an answer", "us", &NAMES);
    let mut work = Rounds::new("CPU time of a whole answer", "us", &NAMES);
    for candidate in 0..NAMES.len() {
        subjects.ask(candidate).await;
    }
    for _ in 0..ROUNDS {
        for candidate in 0..NAMES.len() {
            let before = subjects.processes.used();
            let answer = subjects.ask(candidate).await;
            let used = subjects.processes.used() - before;
            first.add(candidate, answer.first_token().as_secs_f64() * 1e6);
            work.add(candidate, used.as_secs_f64() * 1e6);
            between.add(candidate, answer.between_tokens().as_secs_f64() * 1e6);
        }
    }
    for table in [first, between, work] {
        table.print();
        for (candidate, name) in NAMES.iter().enumerate() {
            let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|p| table.percentile(candidate, p));
            println!("  {name:<24} p50 {p50:.0} us, p90 {p90:.0} us, p99 {p99:.0} us");
        }
    }
}

fn measure(criterion: &mut Criterion, runtime: &tokio::runtime::Runtime, subjects: &Arc<Subjects>) {
    let mut group = criterion.benchmark_group("first_token");
    for (candidate, name) in NAMES.iter().enumerate() {
        group.bench_function(*name, |bench| {
            bench.iter_custom(|calls| {
                let subjects = subjects.clone();
                let task = runtime.spawn(async move {
                    let mut time = std::time::Duration::ZERO;
                    for _ in 0..calls {
                        time += subjects.ask(candidate).await.first_token();
                    }
                    time
                });
                runtime.block_on(task).expect("no panic")
            });
        });
    }
    group.finish();
}

fn main() {
    become_worker_if_asked();
    settle();
    print_machine();
    let runtime = runtime();
    let subjects = Arc::new(runtime.block_on(Subjects::load()));
    let tabled = subjects.clone();
    runtime.block_on(runtime.spawn(async move { table(&tabled).await })).expect("no panic");
    if !std::env::args().any(|argument| argument == "--table") {
        let mut criterion = Criterion::default().configure_from_args();
        measure(&mut criterion, &runtime, &subjects);
        criterion.final_summary();
    }
    print_machine();
}
