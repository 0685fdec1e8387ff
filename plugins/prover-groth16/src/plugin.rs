//! The prover kind on top of the work: every step that computes or touches the disk runs on a thread that may block.

use std::path::PathBuf;
use std::sync::Arc;

use fabstir_plugin_api::prelude::*;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use crate::config::Config;
use crate::error::Error;
use crate::prover::{Place, Prover as Work};
use crate::store::Store;

/// Statements about work, proven in Groth16.
pub struct Groth16 {
    work: Arc<Work>,
    /// Held by whoever makes keys or proves: one after the other, so that memory is that of one.
    turn: Arc<Mutex<()>>,
    /// Held by whoever makes a trace, which takes no keys: a result that waits for it cannot wait for proofs of others.
    trace_turn: Arc<Mutex<()>>,
}

impl Groth16 {
    /// Reads the models and the keys.
    ///
    /// # Errors
    /// `InvalidArgument` for a configuration that makes no sense, and for a model that cannot be read or proven.
    pub async fn open(state_dir: PathBuf, config: Config) -> Result<Self> {
        config.check()?;
        let work = blocking(move || Work::open(&config, Store::open(&state_dir)?)).await?;
        Ok(Self { work: Arc::new(work), turn: Arc::default(), trace_turn: Arc::default() })
    }

    /// Starts long work whose stream ends with one item, or with an error.
    fn start<T, W>(&self, cx: &Cx, progress: fn(Stage) -> T, work: W) -> Stream<T>
    where
        T: Send + 'static,
        W: FnOnce(&Work, crate::prover::Told<'_>, crate::prover::Ended<'_>) -> Result<T, Error> + Send + 'static,
    {
        let (sender, stream) = cx.stream();
        let (cx, turn, prover) = (cx.clone(), self.turn.clone(), self.work.clone());
        tokio::spawn(async move {
            if turn.try_lock().is_err() {
                let waits = Stage { doing: "waiting for other work to end".into(), percent: None, left_ms: None };
                // There is room for the first item.
                let _ = sender.try_send(progress(waits));
            }
            let turn = tokio::select! {
                turn = turn.lock_owned() => turn,
                () = sender.closed() => return,
                () = cx.cancelled() => return,
            };
            let watched = sender.clone();
            let done = spawn_blocking(move || {
                let _turn = turn;
                // A stage that finds no room is overtaken by the next.
                let told = |stage: Stage| drop(watched.try_send(progress(stage)));
                let ended = || watched.is_closed() || cx.is_cancelled();
                work(&prover, &told, &ended)
            });
            match done.await {
                // Who has left needs neither.
                Ok(Ok(last)) => drop(sender.send(last).await),
                Ok(Err(error)) => sender.fail(error.into()).await,
                Err(stopped) if stopped.is_panic() => {
                    sender.fail(PluginError::new(Code::Panicked, "the work ended in a panic: see the log")).await;
                }
                Err(_) => sender.fail(PluginError::unavailable("the plugin is shutting down")).await,
            }
        });
        stream
    }

    fn place(&self, statement: &str) -> Result<Place> {
        Ok(self.work.place(statement)?)
    }
}

impl Lifecycle for Groth16 {}

#[async_trait]
impl Prover for Groth16 {
    async fn statements(&self, _: &Cx) -> Result<Vec<Statement>> {
        Ok(self.work.statements())
    }

    async fn prepare(&self, cx: &Cx, statement: String) -> Result<Stream<Preparing>> {
        let place = self.place(&statement)?;
        Ok(self.start(cx, Preparing::Progress, move |work, told, ended| work.prepare(place, told, ended).map(Preparing::Ready)))
    }

    async fn estimate(&self, _: &Cx, statement: String) -> Result<Estimate> {
        let place = self.place(&statement)?;
        let work = self.work.clone();
        blocking(move || Ok(work.estimate(place))).await
    }

    async fn prove(&self, cx: &Cx, task: Task) -> Result<Stream<Proving>> {
        let place = self.place(&task.statement)?;
        let asked = self.work.read(place, &task)?;
        let about = task.about;
        let prove = move |work: &Work, told: crate::prover::Told<'_>, ended: crate::prover::Ended<'_>| {
            work.prove(place, about, asked, told, ended).map(Proving::Proof)
        };
        Ok(self.start(cx, Proving::Progress, prove))
    }

    async fn verify(&self, _: &Cx, proof: Proof) -> Result<Verdict> {
        let place = self.place(&proof.statement)?;
        let work = self.work.clone();
        blocking(move || work.verify(place, &proof)).await
    }

    async fn trace(&self, cx: &Cx, statement: String, tokens: Vec<u32>, states: Vec<Vec<f32>>) -> Result<Hash32> {
        let place = self.place(&statement)?;
        let turn = tokio::select! {
            turn = self.trace_turn.clone().lock_owned() => turn,
            () = cx.cancelled() => return Err(Error::Ended.into()),
        };
        let (work, cx) = (self.work.clone(), cx.clone());
        blocking(move || {
            let _turn = turn;
            work.trace(place, &tokens, &states, &|| cx.is_cancelled())
        })
        .await
    }

    async fn verifier(&self, _: &Cx, statement: String) -> Result<Contract> {
        let place = self.place(&statement)?;
        let work = self.work.clone();
        blocking(move || work.verifier(place)).await
    }
}

/// Runs work that blocks on a thread that may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T> {
    match spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(stopped) if stopped.is_panic() => std::panic::resume_unwind(stopped.into_panic()),
        Err(_) => Err(PluginError::unavailable("the plugin is shutting down")),
    }
}
