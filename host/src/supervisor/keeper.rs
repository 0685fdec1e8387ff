//! One plugin's keeper: a task that sees to it from the first start to the last.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::plugin::Health;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::budget::{Budget, During};
use super::start::{Running, StartError};
use super::{Shared, State};
use crate::config::PluginEntry;
use crate::loader::{Artifact, LoadError, Step};

/// How often a running plugin is asked how it is.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// Heartbeats without an answer, each as long as the pause, after which a plugin counts as hung.
const MISSED: u32 = 3;

pub(super) enum Command {
    /// Take this entry over as a new generation, if it or its file differs.
    Replace(Box<PluginEntry>, Answer),
    Stop,
}

type Answer = oneshot::Sender<Result<&'static str, LoadError>>;

pub(super) struct Keeper {
    shared: Arc<Shared>,
    entry: PluginEntry,
    commands: mpsc::Receiver<Command>,
    budget: Budget,
    /// Old generations on their way out.
    retiring: JoinSet<()>,
}

/// What to do after a phase has ended.
enum Next {
    Start(Option<Artifact>),
    End,
}

impl Keeper {
    pub fn new(shared: Arc<Shared>, entry: PluginEntry, commands: mpsc::Receiver<Command>) -> Self {
        Self { shared, entry, commands, budget: Budget::default(), retiring: JoinSet::new() }
    }

    pub async fn run(mut self) {
        let mut next = Next::Start(None);
        while let Next::Start(artifact) = next {
            next = match self.starting(artifact).await {
                Ok(running) => self.running(running).await,
                Err(next) => next,
            };
        }
        while self.retiring.join_next().await.is_some() {}
        self.shared.board.withdraw(&self.entry, State::Stopped);
    }

    /// Starts a generation; returns what comes instead if that fails or a command intervenes.
    async fn starting(&mut self, artifact: Option<Artifact>) -> Result<Running, Next> {
        let began = Instant::now();
        let started = {
            let (shared, entry) = (self.shared.clone(), self.entry.clone());
            let progress = |state| shared.board.post(&entry, state);
            tokio::select! {
                started = shared.start(&entry, artifact, &progress) => started,
                command = self.commands.recv() => return Err(self.interrupted(command)),
            }
        };
        match started {
            Ok(running) => {
                let took_ms = began.elapsed().as_millis() as u64;
                let artifact = &running.artifact.manifest;
                // What the log says is so already.
                self.shared.board.publish(&self.entry, &running);
                tracing::info!(plugin = %self.entry.id, name = %artifact.name, version = %artifact.version, took_ms, "Plugin ready.");
                Ok(running)
            }
            Err(StartError { error, again, artifact }) => {
                tracing::error!(plugin = %self.entry.id, "{error}");
                let why = error.message.clone();
                Err(self.after_fault(why, again, During::Itself, artifact).await)
            }
        }
    }

    /// Takes a command that came while nothing runs.
    fn interrupted(&mut self, command: Option<Command>) -> Next {
        match command {
            Some(Command::Replace(entry, answer)) => {
                self.entry = *entry;
                self.budget = Budget::default();
                // Whoever asked may have left.
                let _ = answer.send(Ok("restarted"));
                Next::Start(None)
            }
            Some(Command::Stop) | None => Next::End,
        }
    }

    /// Waits out the pause before the next start, or in quarantine for a command.
    async fn after_fault(&mut self, why: String, again: bool, during: During, artifact: Option<Artifact>) -> Next {
        let pause = if again { self.budget.fault(Instant::now(), during) } else { None };
        match pause {
            Some(pause) => {
                let in_ms = pause.as_millis() as u64;
                self.shared.board.withdraw(&self.entry, State::Restarting { why: why.clone(), in_ms });
                tracing::warn!(plugin = %self.entry.id, why, in_ms, "The plugin is started again.");
                tokio::select! {
                    () = tokio::time::sleep(pause) => Next::Start(artifact),
                    command = self.commands.recv() => self.interrupted(command),
                }
            }
            None => {
                let faults = self.budget.faults();
                self.shared.board.withdraw(&self.entry, State::Quarantined { why: why.clone() });
                tracing::error!(plugin = %self.entry.id, why, faults, "The plugin is quarantined until the configuration is read again.");
                let command = self.commands.recv().await;
                self.interrupted(command)
            }
        }
    }

    /// Watches a generation until it fails or the keeper ends. A replacement takes its place without leaving this function.
    async fn running(&mut self, mut running: Running) -> Next {
        let mut pulse = Pulse { missed: 0, shown: running.state() };
        loop {
            let connected = running.connected.clone();
            let command = tokio::select! {
                why = connected.failed() => return self.fallen(running, why).await,
                why = heartbeat(&self.shared, &self.entry, &running, &mut pulse) => return self.fallen(running, why).await,
                command = self.commands.recv() => command,
            };
            match command {
                Some(Command::Replace(entry, answer)) => {
                    running = match self.replace(running, *entry, answer).await {
                        Ok(running) => running,
                        Err(next) => return next,
                    };
                    pulse = Pulse { missed: 0, shown: running.state() };
                    self.shared.board.post(&self.entry, running.state());
                }
                Some(Command::Stop) | None => return self.stop(running).await,
            }
        }
    }

    async fn stop(&mut self, running: Running) -> Next {
        self.shared.board.withdraw(&self.entry, State::Draining);
        retire(self.shared.clone(), self.entry.id.clone(), running).await;
        Next::End
    }

    /// Takes a generation that cannot go on out of service.
    async fn fallen(&mut self, running: Running, why: String) -> Next {
        let during = if running.in_flight.is_or_was_busy() { During::Work } else { During::Itself };
        running.in_flight.drain();
        self.shared.board.withdraw(&self.entry, State::Restarting { why: why.clone(), in_ms: 0 });
        running.connected.end(&why, Duration::from_millis(100)).await;
        self.after_fault(why, true, during, Some(running.artifact)).await
    }

    /// Starts a new generation while the old one serves. Returns the one that serves afterwards, or what comes if none does.
    async fn replace(&mut self, mut running: Running, entry: PluginEntry, answer: Answer) -> Result<Running, Next> {
        let connected = running.connected.clone();
        let (hash, old) = (running.artifact.sha256.clone(), self.entry.clone());
        let next = successor(self.shared.clone(), entry.clone(), old, hash);
        tokio::pin!(next);
        let mut fallen = None;
        let result = loop {
            tokio::select! {
                result = &mut next => break result,
                why = connected.failed(), if fallen.is_none() => {
                    running.in_flight.drain();
                    self.shared.board.withdraw(&self.entry, State::Restarting { why: why.clone(), in_ms: 0 });
                    fallen = Some(why);
                }
                command = self.commands.recv() => match command {
                    Some(Command::Replace(_, answer)) => {
                        let busy = LoadError::new(Step::Connect, "P610", "a replacement is under way");
                        // Whoever asked may have left.
                        let _ = answer.send(Err(busy.fix("ask again when it has ended")));
                    }
                    // What is starting ends with its future.
                    Some(Command::Stop) | None => return Err(self.stop(running).await),
                },
            }
        };
        let outcome = match result {
            Ok(Some(new)) => {
                self.entry = entry;
                self.budget = Budget::default();
                self.shared.board.publish(&self.entry, &new);
                let old = std::mem::replace(&mut running, new);
                fallen = None;
                tracing::info!(plugin = %self.entry.id, generation = running.generation, "A new generation has taken over.");
                while self.retiring.try_join_next().is_some() {}
                self.retiring.spawn(retire(self.shared.clone(), self.entry.id.clone(), old));
                Ok("replaced")
            }
            Ok(None) => {
                self.entry = entry;
                Ok("unchanged")
            }
            Err(error) => Err(error),
        };
        let _ = answer.send(outcome);
        match fallen {
            Some(why) => Err(self.fallen(running, why).await),
            None => {
                // The rank may have changed, which orders the routes.
                self.shared.board.publish(&self.entry, &running);
                Ok(running)
            }
        }
    }
}

/// The generation that is to follow; `None` when nothing but the rank differs.
async fn successor(
    shared: Arc<Shared>,
    entry: PluginEntry,
    old: PluginEntry,
    hash: String,
) -> Result<Option<Running>, LoadError> {
    let loader = shared.loader.read().clone();
    let artifact = loader.prepare(&entry).await?;
    if artifact.sha256 == hash && same_instance(&entry, &old) {
        return Ok(None);
    }
    // The old generation serves meanwhile: its state stays on the board.
    shared.start(&entry, Some(artifact), &|_| {}).await.map(Some).map_err(|failed| failed.error)
}

/// Whether two entries make the same instance: all but the rank, which only orders the routes.
fn same_instance(new: &PluginEntry, old: &PluginEntry) -> bool {
    let (new_limits, old_limits) = (&new.limits, &old.limits);
    new.config == old.config
        && new.isolation == old.isolation
        && new_limits.memory == old_limits.memory
        && new_limits.in_flight == old_limits.in_flight
}

/// What the heartbeats have told so far.
struct Pulse {
    missed: u32,
    shown: State,
}

/// Asks a plugin how it is, again and again; returns why it is to be started anew.
async fn heartbeat(shared: &Shared, entry: &PluginEntry, running: &Running, pulse: &mut Pulse) -> String {
    loop {
        tokio::time::sleep(HEARTBEAT).await;
        let cx = Cx::new().with_timeout(HEARTBEAT);
        let health = match running.connected.plugin.ping(&cx, Blob::new()).await {
            Ok(_) => running.connected.plugin.health(&cx).await,
            Err(error) => Err(error),
        };
        let state = match health {
            Ok(Health::Failed { reason }) => return reason,
            Ok(Health::Degraded { reason }) => State::Degraded { why: reason },
            Ok(_) => running.state(),
            Err(error) => {
                pulse.missed += 1;
                let missed = pulse.missed;
                tracing::warn!(plugin = %entry.id, missed, %error, "The plugin did not answer a heartbeat.");
                if missed >= MISSED {
                    return format!("it did not answer {MISSED} heartbeats: {error}");
                }
                continue;
            }
        };
        pulse.missed = 0;
        if state != pulse.shown {
            shared.board.post(entry, state.clone());
            pulse.shown = state;
        }
    }
}

/// Lets a generation finish what it has begun, and ends it.
async fn retire(shared: Arc<Shared>, id: String, old: Running) {
    old.in_flight.drain();
    let limit = shared.drain_timeout();
    let cx = Cx::new().with_timeout(limit);
    let drained = async {
        old.in_flight.drained().await;
        old.connected.plugin.drain(&cx).await
    };
    if !matches!(tokio::time::timeout(limit, drained).await, Ok(Ok(()))) {
        let left = old.in_flight.count();
        tracing::warn!(plugin = %id, left, "The plugin was not idle when its time to drain was over.");
    }
    let cx = Cx::new().with_timeout(Duration::from_secs(12));
    if let Err(error) = old.connected.plugin.shutdown(&cx).await {
        tracing::warn!(plugin = %id, %error, "The plugin did not shut down by itself.");
    }
    old.connected.end("the node has ended this instance", Duration::from_secs(3)).await;
}
