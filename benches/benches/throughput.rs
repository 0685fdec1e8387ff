//! How fast do answers come through the plugin boundary?
//!
//! Load: a model of TinyLlama's shape with random weights (22 layers, width 2048, Q4_0, 550 MB), answers of 24
//! tokens, greedy, on one thread. Compared, in turns and in one run: a bare loop over llama.cpp, the plugin's engine without
//! a boundary, the plugin opened in this process, and in a worker process; then four answers at a time. Last, what the boundary
//! takes when there is no model behind it: `inference-echo` with a pause before each word, so that each is sent by itself.
//!
//! What is quoted is the speed per second of CPU time of all processes together, from the question to the answer's end: on a machine
//! that does other work too, a second by the clock says little.
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
const TOKENS: u32 = 24;

/// Time for the table of one answer and of several, and rounds even where the time is up.
const TIME: Duration = Duration::from_secs(110);
const SEVERAL_TIME: Duration = Duration::from_secs(50);
const LEAST_ROUNDS: usize = 5;

const NAMES: [&str; 4] = ["llama.cpp directly", "engine", "in process", "worker"];
const ENGINE: usize = 1;

/// Tokens per second.
struct Speed {
    by_cpu: f64,
    by_clock: f64,
}

struct Subjects {
    runtime: Runtime,
    processes: Processes,
    direct: Direct,
    engine: Engine,
    plugged: [Plugged; 2],
    echo: [Plugged; 2],
    /// Requests so far: each has a prompt cache of its own, so that each reads its prompt.
    asked: usize,
}

impl Subjects {
    fn load() -> Self {
        let path = model::random();
        let runtime = runtime();
        // The engine first: it silences llama.cpp's log.
        let engine = Engine::load(
            &ModelConfig {
                context: Some(SHAPE.context),
                parallel: STREAMS as u32,
                threads: Some(SHAPE.threads as u32),
                prefill_chunk: PREFILL_CHUNK,
                ..ModelConfig::new("random", &path)
            },
            |_| true,
        )
        .expect("the model loads");
        let direct = Direct::load(&path, SHAPE);
        let config = serde_json::json!({ "models": [{
            "id": "random", "path": path, "context": SHAPE.context, "parallel": STREAMS, "threads": SHAPE.threads,
            "prefill_chunk": PREFILL_CHUNK,
        }] });
        let paced = serde_json::json!({ "delay_ms": 2 });
        let (plugged, echo) = runtime.block_on(async {
            let plugged = [
                Plugged::in_process("inference-llama-cpp").configure(config.clone()).await,
                Plugged::worker("inference-llama-cpp").configure(config).await,
            ];
            for plugged in &plugged {
                plugged.inference.load(&cx(), "random".into()).await.expect("the plugin loads the model");
            }
            let echo = [
                Plugged::in_process("inference-echo").configure(paced.clone()).await,
                Plugged::worker("inference-echo").configure(paced).await,
            ];
            (plugged, echo)
        });
        Self { processes: Processes::now(), runtime, direct, engine, plugged, echo, asked: 0 }
    }

    fn request(&mut self) -> Generation {
        self.asked += 1;
        Generation { cache_salt: self.asked.to_string(), ..generation("random", PROMPT, Some(TOKENS)) }
    }

    /// Asks a candidate other than the bare loop for `streams` answers at a time.
    fn ask(&mut self, candidate: usize, streams: usize) -> Vec<Answer> {
        let requests: Vec<Generation> = (0..streams).map(|_| self.request()).collect();
        let answers: Vec<Answer> = if candidate == ENGINE {
            let answers: Vec<_> = requests.iter().map(|request| from_engine(&self.engine, request)).collect();
            answers.into_iter().map(|answer| answer.recv().expect("the engine answers")).collect()
        } else {
            let plugged = &self.plugged[candidate - ENGINE - 1];
            from_plugged(&self.runtime, plugged, requests)
        };
        assert!(answers.iter().all(|answer| answer.tokens() == TOKENS), "every answer has the same length");
        answers
    }

    fn one(&mut self, candidate: usize) -> Speed {
        self.time(|subjects| match candidate {
            0 => vec![subjects.direct.answer(PROMPT, TOKENS)],
            _ => subjects.ask(candidate, 1),
        })
    }

    fn several(&mut self, candidate: usize) -> Speed {
        self.time(|subjects| subjects.ask(candidate, STREAMS))
    }

    fn echo(&mut self, candidate: usize) -> Speed {
        let request = generation("echo", &"word ".repeat(200), None);
        self.time(|subjects| from_plugged(&subjects.runtime, &subjects.echo[candidate], vec![request]))
    }

    fn time(&mut self, ask: impl FnOnce(&mut Self) -> Vec<Answer>) -> Speed {
        let before = self.processes.used();
        let began = Instant::now();
        let answers = ask(self);
        let clock = began.elapsed();
        let cpu = self.processes.used() - before;
        let tokens = f64::from(answers.iter().map(Answer::tokens).sum::<u32>());
        Speed { by_cpu: tokens / cpu.as_secs_f64(), by_clock: tokens / clock.as_secs_f64() }
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

/// Rounds until the time is up, each candidate once a round and every second round in the opposite order.
fn measure(title: &str, names: &[&'static str], time: Duration, mut run: impl FnMut(usize) -> Speed) -> [Rounds; 2] {
    let mut tables =
        [Rounds::new(format!("{title}, by CPU time"), "t/s", names), Rounds::new(format!("{title}, by the clock"), "t/s", names)];
    let began = Instant::now();
    for round in 0.. {
        if round >= LEAST_ROUNDS && began.elapsed() > time {
            break;
        }
        for turn in 0..names.len() {
            let candidate = if round % 2 == 0 { turn } else { names.len() - 1 - turn };
            let speed = run(candidate);
            tables[0].add(candidate, speed.by_cpu);
            tables[1].add(candidate, speed.by_clock);
        }
    }
    tables.iter().for_each(Rounds::print);
    tables
}

fn table(subjects: &mut Subjects) {
    // What the first step of each allocates is not part of its speed.
    for candidate in 0..NAMES.len() {
        subjects.one(candidate);
    }
    let [one, _] = measure("one answer", &NAMES, TIME, |candidate| subjects.one(candidate));
    bar("in process / directly", one.ratio(2), 0.99, false);
    bar("worker / directly", one.ratio(3), 0.98, false);
    let [four, _] =
        measure("four answers at a time", &NAMES[ENGINE..], SEVERAL_TIME, |candidate| subjects.several(candidate + ENGINE));
    bar("in process / engine", four.ratio(1), 0.99, false);
    bar("worker / engine", four.ratio(2), 0.98, false);

    let mut echo = Rounds::new("echo: CPU time of one token alone", "us", &NAMES[2..]);
    for _ in 0..9 {
        for candidate in 0..2 {
            echo.add(candidate, 1e6 / subjects.echo(candidate).by_cpu);
        }
    }
    echo.print();
    let token = 1e6 / one.median(0);
    for (candidate, name) in NAMES[2..].iter().enumerate() {
        let share = 100.0 * echo.median(candidate) / token;
        println!("  {name}: {share:.2} % of the {token:.0} us that llama.cpp takes for a token");
    }
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
                println!("{name}: {:.2} t/s by CPU time", subjects.one(candidate).by_cpu);
            }
        }
    }
    print_machine();
}
