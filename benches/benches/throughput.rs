//! How fast do answers come through the plugin boundary?
//!
//! Compared, in turns and in one run: a bare loop over llama.cpp, the plugin's engine without a boundary, the plugin opened in this
//! process, and in a worker process. One thread, greedy. Load:
//!
//! 1. A model of so little that a token costs hardly more than what surrounds it: what engine, plugin and host add to a token, in CPU
//!    time. Nothing in it depends on the model but the size of the vocabulary, which is the same in both.
//! 2. A model of TinyLlama's shape (22 layers, width 2048, Q4_0, 550 MB), answers of 24 tokens: the speed itself, and what share of
//!    it the addition is. On a machine that others use too, two runs of the very same work differ by a percent or more, so the
//!    share says what the ratio of speeds cannot.
//! 3. The same, four answers at a time.
//!
//! What is quoted is CPU time of all processes together, from the question to the answer's end.
//!
//! `make bench` runs it. `-- --profile=NAME` lets one candidate run for a profiler.

use std::time::{Duration, Instant};

use fabstir_benches::answer::{Answer, Direct, Shape, from_engine, from_plugin};
use fabstir_benches::cpu::Processes;
use fabstir_benches::table::{Rounds, bar, print_machine};
use fabstir_benches::{Plugged, become_worker_if_asked, cx, generation, model, runtime, settle};
use fabstir_plugin_api::inference::Generation;
use inference_llama_cpp::config::ModelConfig;
use inference_llama_cpp::engine::Engine;
use tokio::runtime::Runtime;

const STREAMS: usize = 4;
const PREFILL_CHUNK: u32 = 128;
const SHAPE: Shape = Shape { context: 256, batch: PREFILL_CHUNK + STREAMS as u32, threads: 1 };

/// One word, so that reading it is a step like those that generate.
const PROMPT: &str = "The";

/// The models, and how long their answers are.
const MODELS: [(&str, model::Dimensions, u32); 2] = [("little", model::LITTLE, 240), ("large", model::LARGE, 24)];
const LITTLE: usize = 0;
const LARGE: usize = 1;

/// Rounds of the little model; time for the tables of the large one, and rounds even where the time is up.
const LITTLE_ROUNDS: usize = 200;
const TIME: Duration = Duration::from_secs(110);
const SEVERAL_TIME: Duration = Duration::from_secs(50);
const LEAST_ROUNDS: usize = 5;

const NAMES: [&str; 4] = ["llama.cpp directly", "engine", "in process", "worker"];
const ENGINE: usize = 1;

/// What a token took, in microseconds.
struct Cost {
    cpu: f64,
    clock: f64,
}

struct Subjects {
    runtime: Runtime,
    processes: Processes,
    direct: [Direct; 2],
    engine: [Engine; 2],
    plugged: [Plugged; 2],
    /// Requests so far: each has a prompt cache of its own, so that each reads its prompt.
    asked: usize,
}

impl Subjects {
    fn load() -> Self {
        let paths = MODELS.map(|(_, dimensions, _)| model::random(dimensions));
        let runtime = runtime();
        // The engines first: they silence llama.cpp's log.
        let engine = [LITTLE, LARGE].map(|model| {
            let config = ModelConfig {
                context: Some(SHAPE.context),
                parallel: STREAMS as u32,
                threads: Some(SHAPE.threads as u32),
                prefill_chunk: PREFILL_CHUNK,
                ..ModelConfig::new(MODELS[model].0, &paths[model])
            };
            Engine::load(&config, |_| true).expect("the model loads")
        });
        let direct = [LITTLE, LARGE].map(|model| Direct::load(&paths[model], SHAPE));
        let models = [LITTLE, LARGE].map(|model| {
            serde_json::json!({
                "id": MODELS[model].0, "path": paths[model], "context": SHAPE.context, "parallel": STREAMS,
                "threads": SHAPE.threads, "prefill_chunk": PREFILL_CHUNK,
            })
        });
        let config = serde_json::json!({ "models": models });
        let plugged = runtime.block_on(async {
            let plugged = [
                Plugged::in_process("inference-llama-cpp").configure(config.clone()).await,
                Plugged::worker("inference-llama-cpp").configure(config).await,
            ];
            for plugged in &plugged {
                for (name, ..) in MODELS {
                    plugged.inference.load(&cx(), name.into()).await.expect("the plugin loads the model");
                }
            }
            plugged
        });
        Self { processes: Processes::now(), runtime, direct, engine, plugged, asked: 0 }
    }

    /// Asks a candidate other than the bare loop for `streams` answers at a time.
    fn ask(&mut self, model: usize, candidate: usize, streams: usize) -> Vec<Answer> {
        let (name, _, tokens) = MODELS[model];
        let requests: Vec<Generation> = (0..streams)
            .map(|_| {
                self.asked += 1;
                Generation { cache_salt: self.asked.to_string(), ..generation(name, PROMPT, Some(tokens)) }
            })
            .collect();
        if candidate == ENGINE {
            let answers: Vec<_> = requests.iter().map(|request| from_engine(&self.engine[model], request)).collect();
            answers.into_iter().map(|answer| answer.recv().expect("the engine answers")).collect()
        } else {
            from_plugged(&self.runtime, &self.plugged[candidate - ENGINE - 1], requests)
        }
    }

    fn one(&mut self, model: usize, candidate: usize) -> Cost {
        self.time(model, |subjects| match candidate {
            0 => vec![subjects.direct[model].answer(PROMPT, MODELS[model].2)],
            _ => subjects.ask(model, candidate, 1),
        })
    }

    fn several(&mut self, candidate: usize) -> Cost {
        self.time(LARGE, |subjects| subjects.ask(LARGE, candidate, STREAMS))
    }

    fn time(&mut self, model: usize, ask: impl FnOnce(&mut Self) -> Vec<Answer>) -> Cost {
        let before = self.processes.used();
        let began = Instant::now();
        let answers = ask(self);
        let clock = began.elapsed();
        let cpu = self.processes.used() - before;
        assert!(answers.iter().all(|answer| answer.tokens() == MODELS[model].2), "every answer has the same length");
        let each = 1e6 / f64::from(answers.iter().map(Answer::tokens).sum::<u32>());
        Cost { cpu: cpu.as_secs_f64() * each, clock: clock.as_secs_f64() * each }
    }
}

/// Asks as the node does: each request in a task of its own.
fn from_plugged(runtime: &Runtime, plugged: &Plugged, requests: Vec<Generation>) -> Vec<Answer> {
    runtime.block_on(async {
        let ask = |request| {
            let inference = plugged.inference.clone();
            tokio::spawn(async move { from_plugin(&*inference, request).await })
        };
        let tasks: Vec<_> = requests.into_iter().map(ask).collect();
        futures::future::join_all(tasks).await.into_iter().map(|answer| answer.expect("no panic")).collect()
    })
}

/// Rounds until `over` says so, each candidate once a round and every second round in the opposite order.
fn measure(
    title: &str,
    names: &[&'static str],
    over: impl Fn(usize, Duration) -> bool,
    mut run: impl FnMut(usize) -> Cost,
) -> [Rounds; 2] {
    let table = |by| Rounds::new(format!("{title}: {by} of a token"), "us", names);
    let mut tables = [table("CPU time"), table("time by the clock")];
    let began = Instant::now();
    for round in 0.. {
        if over(round, began.elapsed()) {
            break;
        }
        for turn in 0..names.len() {
            let candidate = if round % 2 == 0 { turn } else { names.len() - 1 - turn };
            let cost = run(candidate);
            tables[0].add(candidate, cost.cpu);
            tables[1].add(candidate, cost.clock);
        }
    }
    tables.iter().for_each(Rounds::print);
    tables
}

fn table(subjects: &mut Subjects) {
    // What the first step of each allocates is not part of its speed.
    for model in [LITTLE, LARGE] {
        for candidate in 0..NAMES.len() {
            subjects.one(model, candidate);
        }
    }
    let timed = |time| move |rounds, elapsed| rounds >= LEAST_ROUNDS && elapsed > time;
    let [little, _] =
        measure("little model", &NAMES, |rounds, _| rounds == LITTLE_ROUNDS, |candidate| subjects.one(LITTLE, candidate));
    let [one, _] = measure("large model, one answer", &NAMES, timed(TIME), |candidate| subjects.one(LARGE, candidate));
    println!("\nspeed of the large model as a share of llama.cpp called directly, from what is added to a token");
    let token = one.median(0);
    for (candidate, least) in [(ENGINE + 1, 0.99), (ENGINE + 2, 0.98)] {
        let (added, error) = little.difference(candidate);
        println!("  {}: {added:.1} +- {error:.1} us added to the {token:.0} us of a token", NAMES[candidate]);
        // The least favourable end of what was measured.
        bar(NAMES[candidate], token / (token + added + error), least, false);
    }
    let [_, _] = measure("large model, four answers at a time", &NAMES[ENGINE..], timed(SEVERAL_TIME), |candidate| {
        subjects.several(candidate + ENGINE)
    });
}

fn main() {
    become_worker_if_asked();
    settle();
    print_machine();
    let mut subjects = Subjects::load();
    match std::env::args().find_map(|argument| argument.strip_prefix("--profile=").map(str::to_owned)) {
        None => table(&mut subjects),
        Some(name) => {
            let candidate = NAMES.iter().position(|candidate| *candidate == name).expect("the name of a candidate");
            let began = Instant::now();
            while began.elapsed() < Duration::from_secs(20) {
                println!("{name}: {:.2} us of CPU time a token", subjects.one(LITTLE, candidate).cpu);
            }
        }
    }
    print_machine();
}
