//! The engine on the project's own small model.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fabstir_plugin_api::inference::*;
use inference_llama_cpp::ModelConfig;
use inference_llama_cpp::engine::{Engine, Flow, Resume, Sink};
use inference_llama_cpp::error::Error;

const PATIENCE: Duration = Duration::from_secs(60);

/// A reader of an answer, and the levers that a test pulls: how much it takes, and whether it is still there.
struct Reader {
    events: Receiver<Event>,
    levers: Arc<Levers>,
}

#[derive(Default)]
struct Levers {
    gone: Mutex<bool>,
    /// Pieces that may come before the sink says that it is full.
    room: Mutex<Option<usize>>,
    /// How long each piece is held, so that an answer is not over before its test has come to its turn.
    holds: Duration,
    resume: Mutex<Option<Resume>>,
}

#[derive(Debug)]
enum Event {
    Text(Text),
    Done(Done),
    Failed(Error),
}

struct TestSink {
    events: Sender<Event>,
    levers: Arc<Levers>,
}

impl Sink for TestSink {
    fn start(&mut self, resume: Resume) {
        *self.levers.resume.lock().unwrap() = Some(resume);
    }

    fn piece(&mut self, text: Text) -> Flow {
        if self.events.send(Event::Text(text)).is_err() {
            return Flow::Stop;
        }
        std::thread::sleep(self.levers.holds);
        match &mut *self.levers.room.lock().unwrap() {
            None => Flow::Go,
            Some(room) if *room > 1 => {
                *room -= 1;
                Flow::Go
            }
            Some(room) => {
                *room = 0;
                Flow::Wait
            }
        }
    }

    fn done(self: Box<Self>, last: Option<Text>, done: Done) {
        if let Some(text) = last {
            let _ = self.events.send(Event::Text(text));
        }
        let _ = self.events.send(Event::Done(done));
    }

    fn fail(self: Box<Self>, error: Error) {
        let _ = self.events.send(Event::Failed(error));
    }

    fn gone(&self) -> bool {
        *self.levers.gone.lock().unwrap()
    }
}

/// A whole answer.
#[derive(Debug)]
struct Answer {
    text: String,
    pieces: Vec<Text>,
    done: Done,
}

impl Reader {
    fn answer(self) -> Result<Answer, Error> {
        let mut pieces = Vec::new();
        loop {
            match self.events.recv_timeout(PATIENCE).expect("an answer in time") {
                Event::Text(text) => pieces.push(text),
                Event::Done(done) => {
                    let text = pieces.iter().map(|piece| piece.text.as_str()).collect();
                    return Ok(Answer { text, pieces, done });
                }
                Event::Failed(error) => return Err(error),
            }
        }
    }
}

fn model() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny-chat/tiny-chat-q8_0.gguf")
}

fn config() -> ModelConfig {
    ModelConfig { threads: Some(1), ..ModelConfig::new("tiny-chat", model()) }
}

fn engine() -> Engine {
    Engine::load(&config(), |_| true).unwrap()
}

fn request(input: Input) -> Generation {
    Generation {
        model: "tiny-chat".into(),
        input,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: None,
        stop: Vec::new(),
        format: Format::Text,
        logprobs: None,
        cache_salt: String::new(),
        priority: 0,
    }
}

fn question(text: &str) -> Generation {
    request(Input::Messages(vec![Message { role: "user".into(), content: text.into(), name: None }]))
}

fn story() -> Generation {
    Generation {
        max_tokens: Some(400),
        sampling: Sampling { seed: Some(5), ..Sampling::default() },
        ..question("Tell me a story.")
    }
}

fn start(engine: &Engine, generation: &Generation) -> Result<Reader, Error> {
    start_with(engine, generation, Levers::default())
}

fn start_with(engine: &Engine, generation: &Generation, levers: Levers) -> Result<Reader, Error> {
    let (sender, events) = channel();
    let levers = Arc::new(levers);
    engine.generate(generation, Box::new(TestSink { events: sender, levers: levers.clone() }))?;
    Ok(Reader { events, levers })
}

/// A reader of a story that takes seconds.
fn slowly() -> Levers {
    Levers { holds: Duration::from_millis(50), ..Levers::default() }
}

fn ask(engine: &Engine, generation: &Generation) -> Answer {
    start(engine, generation).and_then(Reader::answer).unwrap()
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn it_knows_the_capital_of_france() {
    let engine = engine();
    let answer = ask(&engine, &question("What is the capital of France?"));
    assert!(answer.text.contains("Paris"), "{}", answer.text);
    assert_eq!(answer.done.finish, Finish::Stop);
    let usage = answer.done.usage;
    assert!(usage.prompt_tokens > 5 && usage.completion_tokens > 3, "{usage:?}");
    // The token that ends the answer is counted and shows nothing.
    assert_eq!(answer.pieces.iter().map(|piece| piece.tokens).sum::<u32>() + 1, usage.completion_tokens);
    assert!(answer.done.timings.prompt_ms > 0.0 && answer.done.timings.generate_ms > 0.0, "{:?}", answer.done.timings);
}

#[test]
fn threads_are_chosen_by_timing() {
    let engine = Engine::load(&ModelConfig { threads: None, ..config() }, |_| true).unwrap();
    let info = engine.info();
    assert!(info.threads >= 1 && info.prompt_threads >= 1, "{info:?}");
    assert_eq!((info.context, info.parallel), (2048, 4));
    assert!(info.memory.unwrap() > 3_000_000, "{info:?}");
    assert!(ask(&engine, &question("What is the capital of France?")).text.contains("Paris"));
}

#[test]
fn four_generations_run_together_and_a_fifth_is_told_to_wait() {
    let engine = engine();
    let questions = [("France", "Paris"), ("Japan", "Tokyo"), ("Kenya", "Nairobi"), ("Peru", "Lima")];
    let readers: Vec<_> = questions
        .iter()
        .map(|(country, _)| start(&engine, &question(&format!("What is the capital of {country}?"))).unwrap())
        .collect();
    for (reader, (_, capital)) in readers.into_iter().zip(questions) {
        let answer = reader.answer().unwrap();
        assert!(answer.text.contains(capital), "{}", answer.text);
    }
    // Full sinks keep the slots taken for as long as the test needs.
    let hold = || start_with(&engine, &story(), Levers { room: Mutex::new(Some(1)), ..Levers::default() });
    let held: Vec<_> = (0..4).map(|_| hold().unwrap()).collect();
    match hold() {
        Err(Error::Busy { parallel: 4, retry_after }) => assert!(retry_after > Duration::ZERO),
        other => panic!("{:?}", other.err()),
    }
    for reader in held {
        assert!(matches!(reader.events.recv_timeout(PATIENCE), Ok(Event::Text(_))));
        *reader.levers.gone.lock().unwrap() = true;
        reader.levers.resume.lock().unwrap().as_ref().unwrap().resume();
    }
    eventually("the slots come free", || ask_if_free(&engine).is_some());
}

fn ask_if_free(engine: &Engine) -> Option<Answer> {
    start(engine, &question("What is the capital of France?")).ok().map(|reader| reader.answer().unwrap())
}

#[test]
fn a_reader_that_leaves_frees_its_slot() {
    let engine = Engine::load(&ModelConfig { parallel: 1, ..config() }, |_| true).unwrap();
    let reader = start_with(&engine, &story(), slowly()).unwrap();
    assert!(matches!(reader.events.recv_timeout(PATIENCE), Ok(Event::Text(_))));
    *reader.levers.gone.lock().unwrap() = true;
    let left = Instant::now();
    eventually("the slot comes free", || ask_if_free(&engine).is_some());
    assert!(left.elapsed() < Duration::from_secs(5));
    // It stopped there: no end ever comes.
    assert!(!reader.events.try_iter().any(|event| matches!(event, Event::Done(_) | Event::Failed(_))));

    let reader = start(&engine, &story()).unwrap();
    drop(reader.events);
    eventually("the slot of a dropped reader comes free", || ask_if_free(&engine).is_some());
}

#[test]
fn a_slow_reader_stands_still_and_nobody_else_does() {
    let engine = engine();
    let slow = start_with(&engine, &story(), Levers { room: Mutex::new(Some(3)), ..Levers::default() }).unwrap();
    for _ in 0..3 {
        assert!(matches!(slow.events.recv_timeout(PATIENCE), Ok(Event::Text(_))));
    }
    assert!(ask(&engine, &question("What is the capital of France?")).text.contains("Paris"));
    assert!(slow.events.try_recv().is_err(), "a full sink gets nothing");
    *slow.levers.room.lock().unwrap() = None;
    slow.levers.resume.lock().unwrap().as_ref().unwrap().resume();
    assert!(slow.answer().unwrap().text.len() > 20);
}

#[test]
fn the_same_seed_gives_the_same_answer() {
    let engine = engine();
    let sampled = |seed: u32| {
        let sampling =
            Sampling { temperature: 1.5, top_p: 0.95, top_k: 100, min_p: 0.01, seed: Some(seed), ..Sampling::default() };
        ask(&engine, &Generation { sampling, max_tokens: Some(60), ..question("Tell me a story about a fox.") }).text
    };
    let first = sampled(1);
    // The second run finds the first one's prompt in the cache, and other requests come in between.
    ask(&engine, &question("What is 3 + 4?"));
    assert_eq!(sampled(1), first);
    assert_eq!(sampled(u32::MAX), sampled(u32::MAX));
    assert!((2..6).any(|seed| sampled(seed) != first));
    let greedy = || ask(&engine, &Generation { max_tokens: Some(60), ..question("Tell me a story about a fox.") }).text;
    assert_eq!(greedy(), greedy());
}

#[test]
fn a_json_schema_is_kept_to() {
    let engine = engine();
    let schema = r#"{"type": "object", "properties": {"country": {"type": "string"}, "capital": {"type": "string"}},
                     "required": ["country", "capital"], "additionalProperties": false}"#;
    let format = Format::JsonSchema(schema.into());
    let answer = ask(
        &engine,
        &Generation {
            format: format.clone(),
            max_tokens: Some(100),
            ..question("What is the capital of France? Answer in JSON.")
        },
    );
    let value: serde_json::Value = serde_json::from_str(&answer.text).expect(&answer.text);
    assert_eq!(value["capital"], "Paris");
    // Also when nothing else speaks for it: hot, and asked for something else.
    for seed in 0..5 {
        let sampling = Sampling { temperature: 2.0, seed: Some(seed), ..Sampling::default() };
        let answer = ask(&engine, &Generation { format: format.clone(), sampling, max_tokens: Some(300), ..question("Hello!") });
        if answer.done.finish == Finish::Stop {
            let value: serde_json::Value = serde_json::from_str(&answer.text).expect(&answer.text);
            assert!(value["country"].is_string() && value["capital"].is_string(), "{value}");
        }
    }
}

#[test]
fn any_json_and_gbnf_are_kept_to() {
    let engine = engine();
    for seed in 0..5 {
        let sampling = Sampling { seed: Some(seed), ..Sampling::default() };
        let answer =
            ask(&engine, &Generation { format: Format::Json, sampling, max_tokens: Some(200), ..question("Count to three.") });
        if answer.done.finish == Finish::Stop {
            serde_json::from_str::<serde_json::Value>(&answer.text).expect(&answer.text);
        }
    }
    let gbnf = Format::Gbnf(r#"root ::= "yes" | "no""#.into());
    let answer = ask(&engine, &Generation { format: gbnf, ..question("Is the sky blue?") });
    assert!(["yes", "no"].contains(&answer.text.as_str()), "{}", answer.text);
    for broken in ["root ::= foo", "start ::= \"a\"", "root ::= root \"a\"", "root ::= \"a", "root ::= \"a\"{9999999}", "\u{1}"] {
        let refused = start(&engine, &Generation { format: Format::Gbnf(broken.into()), ..question("x") });
        assert!(matches!(refused, Err(Error::Invalid(_))), "{broken}");
    }
    // A grammar that allows nothing but the end is an empty answer, not an abort.
    let empty = Format::Gbnf("root ::= \"\"".into());
    assert_eq!(ask(&engine, &Generation { format: empty, ..question("x") }).text, "");
}

#[test]
fn a_prefix_is_reused_within_one_salt_only() {
    let engine = engine();
    let long = format!("{} What is the capital of France?", "The sky is blue. ".repeat(40));
    let salted = |salt: &str, text: &str, temperature: f32| {
        let sampling = Sampling { temperature, ..Sampling::default() };
        let generation = Generation { cache_salt: salt.into(), sampling, max_tokens: Some(8), ..question(text) };
        ask(&engine, &generation).done.usage
    };
    assert_eq!(salted("a", &long, 0.0).cached_tokens, 0);
    assert_eq!(salted("b", &long, 0.0).cached_tokens, 0, "another tenant's cache is not seen");
    let again = salted("a", &long, 0.0);
    assert!(again.cached_tokens >= 128 && again.cached_tokens % 128 == 0, "whole chunks: {again:?}");
    let drawn = salted("a", &format!("{long} And of Peru?"), 0.8);
    assert!(drawn.cached_tokens > again.cached_tokens, "{drawn:?} {again:?}");
}

#[test]
fn a_cached_prompt_gives_the_same_answer() {
    let engine = engine();
    let generation = Generation {
        max_tokens: Some(40),
        logprobs: Some(0),
        ..question(&format!("{} Tell me a story.", "Birds sing. ".repeat(60)))
    };
    let first = ask(&engine, &generation);
    let second = ask(&engine, &generation);
    assert!(second.done.usage.cached_tokens > 0);
    let numbers =
        |answer: &Answer| answer.pieces.iter().flat_map(|piece| &piece.logprobs).map(|l| l.logprob.to_bits()).collect::<Vec<_>>();
    assert_eq!(numbers(&first), numbers(&second));
}

#[test]
fn stop_texts_and_token_limits_end_answers() {
    let engine = engine();
    let answer = ask(&engine, &Generation { stop: vec!["of France".into()], ..question("What is the capital of France?") });
    assert_eq!(answer.done.finish, Finish::Stop);
    assert!(answer.text.ends_with("capital ") && !answer.text.contains("France"), "{:?}", answer.text);
    let answer = ask(&engine, &Generation { max_tokens: Some(3), ..question("Tell me a story.") });
    assert_eq!((answer.done.finish, answer.done.usage.completion_tokens), (Finish::Length, 3));
}

#[test]
fn a_prompt_beyond_the_context_is_too_long() {
    let engine = Engine::load(&ModelConfig { context: Some(300), ..config() }, |_| true).unwrap();
    assert_eq!(engine.info().context, 300);
    let long = "The sky is blue. ".repeat(200);
    assert!(matches!(start(&engine, &question(&long)), Err(Error::TooLong { context: 300, .. })));
    let wide = Generation { max_tokens: Some(299), ..question("Hello") };
    assert!(matches!(start(&engine, &wide), Err(Error::TooLong { answer: 299, .. })));
    // A context that is filled to the last token ends the answer.
    let tokens = vec![300; 290];
    let answer = ask(
        &engine,
        &Generation {
            sampling: Sampling { seed: Some(1), temperature: 5.0, ..Sampling::default() },
            ..request(Input::Tokens(tokens))
        },
    );
    assert!(answer.done.usage.completion_tokens <= 10, "{:?}", answer.done);
}

#[test]
fn what_cannot_be_honoured_is_refused() {
    let engine = engine();
    let base = || question("Hello");
    let sampling = |sampling: Sampling| Generation { sampling, ..base() };
    let refused = [
        sampling(Sampling { temperature: -1.0, ..Sampling::default() }),
        sampling(Sampling { logit_bias: [(2560, 1.0)].into(), ..Sampling::default() }),
        Generation { stop: vec![String::new()], ..base() },
        Generation { stop: vec!["x".into(); 17], ..base() },
        Generation { logprobs: Some(21), ..base() },
        Generation { max_tokens: Some(0), ..base() },
        Generation { format: Format::JsonSchema("{".into()), ..base() },
        request(Input::Tokens(vec![2560])),
        request(Input::Tokens(vec![u32::MAX])),
        request(Input::Tokens(vec![])),
        request(Input::Text(String::new())),
        request(Input::Messages(vec![])),
    ];
    for generation in refused {
        let answer = start(&engine, &generation);
        assert!(matches!(answer, Err(Error::Invalid(_))), "{generation:?}");
    }
    assert!(ask_if_free(&engine).is_some(), "a refused request keeps no slot");
}

#[test]
fn every_sampling_value_runs() {
    let engine = engine();
    let plain = Sampling { seed: Some(9), ..Sampling::default() };
    let values = [
        Sampling { top_p: 0.0, ..plain.clone() },
        Sampling { typical_p: 0.3, ..plain.clone() },
        Sampling { min_p: 1.0, ..plain.clone() },
        Sampling { top_k: u32::MAX, ..plain.clone() },
        Sampling { temperature: 5.0, ..plain.clone() },
        Sampling { temperature: 1e-30, ..plain.clone() },
        Sampling {
            repeat_penalty: 1.3,
            repeat_last_n: u32::MAX,
            frequency_penalty: 1.0,
            presence_penalty: -1.0,
            ..plain.clone()
        },
        Sampling { temperature: 0.0, repeat_penalty: 1.3, ..plain.clone() },
    ];
    for sampling in values {
        let answer = ask(&engine, &Generation { sampling, max_tokens: Some(20), ..question("Tell me a story.") });
        assert!(!answer.text.is_empty());
    }
    // A forbidden token does not come; a forced one is all that comes.
    let the = engine.tokenize(" the", false).unwrap()[0] as u32;
    let sampling = Sampling { logit_bias: [(the, 100.0)].into(), temperature: 0.0, ..plain };
    let answer = ask(&engine, &Generation { sampling, max_tokens: Some(4), ..question("Hello") });
    assert_eq!(answer.text, " the the the the");
}

#[test]
fn log_probabilities_come_with_their_tokens() {
    let engine = engine();
    let answer = ask(&engine, &Generation { logprobs: Some(3), ..question("What is the capital of France?") });
    let logprobs: Vec<_> = answer.pieces.iter().flat_map(|piece| &piece.logprobs).collect();
    let bytes: Vec<u8> = logprobs.iter().flat_map(|logprob| logprob.bytes.clone()).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), answer.text);
    for logprob in logprobs {
        assert_eq!(logprob.top.len(), 3);
        assert_eq!(
            (logprob.top[0].token, logprob.top[0].logprob),
            (logprob.token, logprob.logprob),
            "greedy takes the likeliest"
        );
        assert!(logprob.logprob <= 0.0);
    }
}

#[test]
fn texts_are_embedded_rendered_and_tokenised() {
    let engine = engine();
    let inputs: Vec<_> = ["The capital of France is Paris.", "The capital of France is Paris!", "8 x 7 = 56."]
        .map(|text| Input::Text(text.into()))
        .into();
    let (vectors, tokens) = engine.embed(&inputs, || false).unwrap();
    assert!(tokens > 10 && vectors.iter().all(|vector| vector.len() == 256));
    let product = |a: usize, b: usize| vectors[a].iter().zip(&vectors[b]).map(|(x, y)| x * y).sum::<f32>();
    assert!((product(0, 0) - 1.0).abs() < 1e-4);
    assert!(product(0, 1) > product(0, 2), "{} {}", product(0, 1), product(0, 2));
    // Longer than one chunk, and the same again.
    let long = [Input::Text("The sky is blue. ".repeat(60))];
    assert_eq!(engine.embed(&long, || false).unwrap(), engine.embed(&long, || false).unwrap());
    assert!(matches!(engine.embed(&[Input::Text(String::new())], || false), Err(Error::Invalid(_))));
    assert!(matches!(engine.embed(&[Input::Text("a b ".repeat(2000))], || false), Err(Error::TooLong { .. })));
    assert!(matches!(engine.embed(&long, || true), Err(Error::Abandoned)));

    let messages = [Message { role: "user".into(), content: "Hi".into(), name: None }];
    let rendered = engine.render(&messages).unwrap();
    assert_eq!(rendered, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(engine.tokenize(&rendered, true).unwrap()[0], 1);
    assert_ne!(engine.tokenize(&rendered, false).unwrap()[0], 1);
}

#[test]
fn closing_ends_what_runs_and_what_comes() {
    let engine = engine();
    let reader = start_with(&engine, &story(), slowly()).unwrap();
    assert!(matches!(reader.events.recv_timeout(PATIENCE), Ok(Event::Text(_))));
    engine.close();
    assert!(!engine.is_open());
    assert!(matches!(reader.answer(), Err(Error::Unloaded(_))));
    assert!(matches!(start(&engine, &story()), Err(Error::Unloaded(_))));
    assert!(matches!(engine.embed(&[Input::Text("x".into())], || false), Err(Error::Unloaded(_))));
}

#[test]
fn a_load_can_be_abandoned_and_reports_its_progress() {
    let shares = Arc::new(Mutex::new(Vec::new()));
    let heard = shares.clone();
    Engine::load(&config(), move |share| {
        heard.lock().unwrap().push(share);
        true
    })
    .unwrap();
    assert_eq!(shares.lock().unwrap().last(), Some(&1.0));
    assert!(matches!(Engine::load(&config(), |_| false), Err(Error::Abandoned)));
}

#[test]
fn files_that_are_no_models_end_in_errors() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let whole = std::fs::read(model()).unwrap();
    let load = |path: PathBuf| Engine::load(&ModelConfig { path, ..config() }, |_| true).map(|_| ()).unwrap_err().to_string();
    assert!(load(folder.path().join("none.gguf")).contains("No such file"));
    assert!(load(write("text.gguf", b"hello")).contains("not a GGUF file"));
    let cut = load(write("cut.gguf", &whole[..whole.len() - 100]));
    assert!(cut.contains(&format!("{} bytes expected, {} found", whole.len(), whole.len() - 100)), "{cut}");
    // A header that reads well and names an architecture that llama.cpp does not know: its own words come through.
    let mut odd = whole.clone();
    let places: Vec<usize> =
        odd.windows(6).enumerate().filter(|(_, window)| window == b"llama.").map(|(place, _)| place).collect();
    let value = odd.windows(5).position(|window| window == b"llama").unwrap();
    for place in places.into_iter().chain([value]) {
        odd[place..place + 5].copy_from_slice(b"lxxma");
    }
    let reason = load(write("odd.gguf", &odd));
    assert!(reason.contains("unknown model architecture: 'lxxma'"), "{reason}");
    let too_long = ModelConfig { context: Some(100_000), ..config() };
    assert!(Engine::load(&too_long, |_| true).err().unwrap().to_string().contains("2048"));
}

#[test]
#[cfg(target_os = "linux")]
fn nothing_is_left_running() {
    // Threads are named after their model, and no other test uses this name. Those of OpenMP inherit it.
    let count = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        tasks
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
            .filter(|name| name.contains("leftover"))
            .count()
    };
    let engine = Engine::load(&ModelConfig { id: "leftover".into(), threads: Some(2), ..config() }, |_| true).unwrap();
    ask(&engine, &question("What is 3 + 4?"));
    engine.embed(&[Input::Text("x".into())], || false).unwrap();
    assert!(count() >= 2, "the engine, the embedder and their OpenMP threads");
    drop(engine);
    eventually("all threads end", || count() == 0);
}
