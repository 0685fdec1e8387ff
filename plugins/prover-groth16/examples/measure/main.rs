//! What set-up, proofs and checks cost, and how often rounding changes a token: run it in the root of the repository with
//! `cargo run --release -p prover-groth16 --example measure`. Everything runs on one thread; processor time is that of the process, and
//! memory is its peak, so each statement has a process of its own: give `commitment` or `head` to measure one, and nothing for both.

mod states;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use fabstir_plugin_api::prelude::*;
use prover_groth16::gguf::Model;
use prover_groth16::{Config, Groth16, ModelConfig};

const MODEL: &str = "models/tiny-chat/tiny-chat-q8_0.gguf";
const STATES: usize = 20_000;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    match std::env::args().nth(1).as_deref() {
        Some("commitment") => statement("commitment", Witness::None).await,
        Some("head") => {
            let head = states::head(Path::new(MODEL))?;
            let values = states::random(head.width(), 1, 1).remove(0);
            let token = states::choice(&head, &values)?;
            let draw = format!("0x{}", "0".repeat(64));
            statement("output-head:tiny-chat", Witness::Answer { tokens: vec![token], states: vec![values], draw }).await
        }
        _ => {
            for name in ["commitment", "head"] {
                Command::new(std::env::current_exe()?).arg(name).status()?;
            }
            agreement()
        }
    }
}

async fn statement(id: &str, witness: Witness) -> Result<(), Box<dyn std::error::Error>> {
    let state_dir = tempfile::tempdir()?;
    let model = ModelConfig { name: "tiny-chat".into(), path: MODEL.into(), digest: None };
    let config = Config { models: vec![model], samples: 1, ..Config::default() };
    let prover = Groth16::open(state_dir.path().to_owned(), config).await?;
    let known = prover.statements(&Cx::new()).await?.into_iter().find_map(|statement| statement.model);
    let zero = format!("0x{}", "0".repeat(64));
    let about = About { subject: zero.clone(), job: None, model: known.ok_or("no model")?, input: zero.clone(), output: zero };
    let task = Task { statement: id.into(), about, witness };

    let mut clock = Clock::start();
    let mut stream = prover.prepare(&Cx::new(), id.into()).await?;
    while let Some(step) = stream.next().await {
        step?;
    }
    clock.lap(&format!("{id}: set-up"));
    let mut proof = None;
    for _ in 0..3 {
        reset_peak();
        clock = Clock::start();
        let mut stream = prover.prove(&Cx::new(), task.clone()).await?;
        while let Some(step) = stream.next().await {
            if let Proving::Proof(made) = step? {
                proof = Some(made);
            }
        }
        clock.lap(&format!("{id}: proof"));
    }
    let proof = proof.ok_or("no proof")?;
    clock = Clock::start();
    for _ in 0..100 {
        if !prover.verify(&Cx::new(), proof.clone()).await?.holds {
            return Err("the proof does not hold".into());
        }
    }
    clock.lap(&format!("{id}: 100 checks"));
    let keys: u64 = files(&state_dir.path().join("keys"))?;
    println!(
        "{id}: proof {} bytes, keys {:.1} MB, {:?}",
        proof.proof.len(),
        keys as f64 / 1e6,
        prover.estimate(&Cx::new(), id.into()).await?
    );
    let mut slowest = Duration::ZERO;
    for tenths in (0..30).step_by(3) {
        let mut stream = prover.prove(&Cx::new(), task.clone()).await?;
        slowest = slowest.max(given_up(&prover, &mut stream, tenths).await?);
    }
    println!("{id}: a proof that is given up ends within {slowest:?}");
    slowest = Duration::ZERO;
    for tenths in (0..75).step_by(15) {
        std::fs::remove_dir_all(state_dir.path().join("keys"))?;
        std::fs::create_dir(state_dir.path().join("keys"))?;
        let mut stream = prover.prepare(&Cx::new(), id.into()).await?;
        slowest = slowest.max(given_up(&prover, &mut stream, tenths).await?);
    }
    println!("{id}: a set-up that is given up ends within {slowest:?}");
    Ok(())
}

/// Reads a stream for so long and drops it: how long until other work can begin, which is when this has ended.
async fn given_up<T: Send + 'static>(prover: &Groth16, stream: &mut Stream<T>, tenths: u64) -> Result<Duration> {
    let until = tokio::time::sleep(Duration::from_millis(100 * tenths + 50));
    tokio::pin!(until);
    loop {
        tokio::select! {
            () = &mut until => break,
            step = stream.next() => if step.transpose()?.is_none() { break },
        }
    }
    *stream = Stream::from_items([]);
    let dropped = Instant::now();
    // Checking small keys, or making them, is little work.
    let mut other = prover.prepare(&Cx::new(), "commitment".into()).await?;
    while let Some(step) = other.next().await {
        match step? {
            Preparing::Progress(stage) if stage.doing.starts_with("waiting") => {}
            _ => return Ok(dropped.elapsed()),
        }
    }
    Ok(dropped.elapsed())
}

fn files(folder: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        bytes += if entry.metadata()?.is_dir() { files(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(bytes)
}

/// How often the rounded head chooses another token than the head in floats.
fn agreement() -> Result<(), Box<dyn std::error::Error>> {
    let model = Model::read(Path::new(MODEL))?;
    let (weights, head) = (model.weights()?, states::head(Path::new(MODEL))?);
    let mut differ = 0;
    for values in states::random(model.width, STATES, 2) {
        let logit = |row: &[f32]| row.iter().zip(&values).map(|(w, h)| f64::from(*w) * f64::from(*h)).sum::<f64>();
        let logits: Vec<f64> = weights.chunks_exact(model.width).map(logit).collect();
        let best = (0..logits.len()).fold(0, |best, token| if logits[token] > logits[best] { token } else { best });
        differ += usize::from(states::choice(&head, &values)? as usize != best);
    }
    println!("rounding changes {differ} of {STATES} tokens, for random states of normal numbers");
    Ok(())
}

struct Clock {
    wall: Instant,
    cpu: Duration,
}

impl Clock {
    fn start() -> Self {
        Self { wall: Instant::now(), cpu: cpu() }
    }

    fn lap(&self, what: &str) {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("unknown").trim().to_owned();
        println!(
            "{what}: {:.3} CPU s, {:.3} s, peak memory {peak}",
            (cpu() - self.cpu).as_secs_f64(),
            self.wall.elapsed().as_secs_f64()
        );
    }
}

fn reset_peak() {
    // Where that is not allowed, the peak is that of the set-up.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Processor time of the process.
fn cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is ours, and a call that fails leaves it as it is.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
