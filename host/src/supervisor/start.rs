//! Starting one generation: connect, configure, load its models.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fabstir_plugin_api::chain::Chain;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::inference::{Inference, Loaded};
use fabstir_plugin_api::interface::Interface;
use fabstir_plugin_api::manifest::Manifest;
use fabstir_plugin_api::plugin::{Configure, Health};
use fabstir_plugin_api::prover::Prover;
use fabstir_plugin_api::storage::Storage;
use fabstir_plugin_api::transport::Transport;

use super::{Connected, Shared, State};
use crate::config::{Isolation, LogLevels, PluginEntry};
use crate::loader::{Artifact, LoadError, Step};
use crate::routes::{InFlight, InferenceRoute, Route, ServedModel};

/// A generation that works.
pub(super) struct Running {
    pub generation: u64,
    pub connected: Arc<Connected>,
    pub in_flight: Arc<InFlight>,
    pub route: Option<Arc<InferenceRoute>>,
    pub transport: Option<Arc<Route<dyn Transport>>>,
    pub chain: Option<Arc<Route<dyn Chain>>>,
    pub storage: Option<Arc<Route<dyn Storage>>>,
    pub prover: Option<Arc<Route<dyn Prover>>>,
    /// Kept, so that a restart needs no second check of the file.
    pub artifact: Artifact,
    degraded: Option<String>,
}

impl Running {
    pub fn state(&self) -> State {
        match &self.degraded {
            None => State::Ready,
            Some(why) => State::Degraded { why: why.clone() },
        }
    }
}

/// Why a generation did not start.
#[derive(Debug)]
pub(super) struct StartError {
    pub error: LoadError,
    /// Whether another try may go better without anything being changed.
    pub again: bool,
    pub artifact: Option<Artifact>,
}

impl Shared {
    /// Starts a generation of `entry`, from `known` if the file was checked before. `progress` hears what it is doing.
    pub(super) async fn start(
        &self,
        entry: &PluginEntry,
        known: Option<Artifact>,
        progress: &(dyn Fn(State) + Send + Sync),
    ) -> Result<Running, StartError> {
        let doing = |doing: &str| progress(State::Starting { doing: doing.to_owned(), percent: None });
        let artifact = match known {
            // A restart trusts the copy no more than the first start did.
            Some(artifact) => {
                let (loader, copy) = (self.loader.read().clone(), artifact.clone());
                let checked = tokio::task::spawn_blocking(move || loader.check_again(&copy)).await;
                let checked = checked.unwrap_or_else(|error| Err(failed("P307", format!("the copy cannot be checked: {error}"))));
                checked.map_err(|error| StartError { error, again: false, artifact: None })?;
                artifact
            }
            None => {
                doing("checking its file");
                let loader = self.loader.read().clone();
                loader.prepare(entry).await.map_err(|error| StartError { error, again: false, artifact: None })?
            }
        };
        let started = self.start_checked(entry, &artifact, progress).await;
        started.map_err(|(error, again)| StartError { error, again, artifact: Some(artifact) })
    }

    async fn start_checked(
        &self,
        entry: &PluginEntry,
        artifact: &Artifact,
        progress: &(dyn Fn(State) + Send + Sync),
    ) -> Result<Running, (LoadError, bool)> {
        let limit = Duration::from_millis(entry.limits.start_timeout_ms);
        let deadline = Instant::now() + limit;
        progress(State::Starting { doing: "starting".into(), percent: None });
        let isolation = isolation(entry, &artifact.manifest);
        if isolation == Isolation::InProcess && entry.limits.memory.is_some() {
            let error = failed("P611", format!("plugin `{}` has a memory limit and runs in the node", entry.id));
            let fix = "set `isolation = \"process\"`, or remove `limits.memory`";
            return Err((error.note("at", entry.origin.to_string()).fix(fix), false));
        }
        let suspect = match isolation {
            Isolation::InProcess => Some(Arc::new(Suspect::mark(self, entry, artifact)?)),
            Isolation::Process => None,
        };
        let connected = match isolation {
            Isolation::Process => {
                let folder = self.config.read().base_dir.clone();
                Connected::worker(&artifact.copy, entry, &folder).map_err(|error| (error, true))?
            }
            Isolation::InProcess => {
                let (file, id) = (artifact.copy.clone(), entry.id.clone());
                // Opening runs the file's initialisers: not on a thread that others wait for. The note stays while it goes on,
                // even if nobody waits any more.
                let note = suspect.clone();
                let opened = tokio::task::spawn_blocking(move || {
                    let opened = Connected::in_process(&file, &id);
                    drop(note);
                    opened
                });
                match tokio::time::timeout(limit, opened).await {
                    Ok(Ok(opened)) => opened.map_err(|error| (error, false))?,
                    Ok(Err(error)) => return Err((failed("P601", format!("the plugin cannot be opened: {error}")), false)),
                    Err(_) => return Err((hung(entry), false)),
                }
            }
        };
        let connected = Arc::new(connected);
        let prepared = tokio::select! {
            prepared = self.prepare(entry, artifact, &connected, deadline, progress) => prepared,
            why = connected.failed() => Err((ended(why), true)),
        };
        // A worker that dies fails the call under way before it is known how it ended, which says more than the call's error.
        let prepared = match prepared {
            Err(_) if connected.session.is_closed() => Err((ended(connected.failed().await), true)),
            prepared => prepared,
        };
        match prepared {
            Ok((route, in_flight, generation, degraded)) => {
                drop(suspect);
                let transport = way::<dyn Transport>(entry, artifact, &connected, generation);
                let chain = way::<dyn Chain>(entry, artifact, &connected, generation);
                let storage = way::<dyn Storage>(entry, artifact, &connected, generation);
                let prover = way::<dyn Prover>(entry, artifact, &connected, generation);
                let artifact = artifact.clone();
                Ok(Running { generation, connected, in_flight, route, transport, chain, storage, prover, artifact, degraded })
            }
            Err(error) => {
                connected.end("the plugin did not start", Duration::from_secs(1)).await;
                drop(suspect);
                Err(error)
            }
        }
    }

    async fn prepare(
        &self,
        entry: &PluginEntry,
        artifact: &Artifact,
        connected: &Arc<Connected>,
        deadline: Instant,
        progress: &(dyn Fn(State) + Send + Sync),
    ) -> Result<(Option<Arc<InferenceRoute>>, Arc<InFlight>, u64, Option<String>), (LoadError, bool)> {
        let cx = || Cx::new().with_deadline(Some(deadline));
        let (data_dir, log_level) = {
            let config = self.config.read();
            (config.node.data_dir.clone(), LogLevels::parse(&config.node.log).of_plugin(&entry.id).to_string())
        };
        let configure = Configure {
            instance: entry.id.clone(),
            state_dir: data_dir.join("state").join(&entry.id),
            config: serde_json::Value::Object(entry.config.clone()).to_string(),
            log_level,
        };
        connected.plugin.configure(&cx(), configure).await.map_err(|error| {
            let again = error.code != Code::InvalidArgument;
            (not_started(entry, "P503", "its configuration was refused", error), again)
        })?;
        let serves = provides::<dyn Inference>(&artifact.manifest);
        let in_flight = InFlight::new(entry.limits.in_flight);
        let generation = self.next_generation();
        if !serves {
            return Ok((None, in_flight, generation, None));
        }
        let inference = <dyn Inference as Interface>::client(connected.session.clone());
        let known =
            inference.models(&cx()).await.map_err(|error| (not_started(entry, "P605", "it names no models", error), true))?;
        let (mut models, mut refused, mut again) = (Vec::new(), Vec::new(), false);
        for model in known {
            let load_cx = cx();
            let load = inference.load(&load_cx, model.id.clone());
            let watch = watch_progress(connected, &model.id, progress);
            let loaded = tokio::select! { loaded = load => loaded, never = watch => match never {} };
            match loaded {
                Ok(loaded) => {
                    let parallel = loaded.parallel.max(1);
                    let Loaded { context, digest, generates, .. } = loaded;
                    models.push(ServedModel { id: model.id, context, parallel, digest, generates })
                }
                // Nothing else can be asked of it in time either.
                Err(error) if error.code == Code::DeadlineExceeded => return Err((hung(entry), true)),
                Err(error) => {
                    again |= !matches!(error.code, Code::InvalidArgument | Code::NotFound);
                    tracing::error!(plugin = %entry.id, model = %model.id, code = %error.code, %error, "A model could not be loaded.");
                    refused.push(format!("model `{}`: {error}", model.id));
                }
            }
        }
        if models.is_empty() {
            let why = if refused.is_empty() { "it has no models".to_owned() } else { refused.join("; ") };
            return Err((failed("P606", format!("plugin `{}` serves nothing: {why}", entry.id)), again));
        }
        let degraded = (!refused.is_empty()).then(|| refused.join("; "));
        let settings = serde_json::Value::Object(entry.config.clone()).to_string();
        let setup = blake3::hash(format!("{} {settings}", artifact.sha256).as_bytes()).to_hex().to_string();
        let (plugin, in_flight_too) = (entry.id.clone(), in_flight.clone());
        let route = InferenceRoute { plugin, generation, models, setup, inference, in_flight: in_flight_too };
        Ok((Some(Arc::new(route)), in_flight, generation, degraded))
    }
}

/// The way to a kind whose calls nobody balances, where the plugin provides it.
fn way<K: Interface + ?Sized>(
    entry: &PluginEntry,
    artifact: &Artifact,
    connected: &Connected,
    generation: u64,
) -> Option<Arc<Route<K>>> {
    provides::<K>(&artifact.manifest)
        .then(|| Arc::new(Route { plugin: entry.id.clone(), generation, client: K::client(connected.session.clone()) }))
}

fn provides<K: Interface + ?Sized>(manifest: &Manifest) -> bool {
    manifest.provides.iter().any(|provided| provided.kind == K::KIND)
}

/// Where a plugin runs: as the operator says, or else so that a fault in inference code does not take the node along.
pub fn isolation(entry: &PluginEntry, manifest: &Manifest) -> Isolation {
    let is_apart = provides::<dyn Inference>(manifest) || provides::<dyn Prover>(manifest);
    entry.isolation.unwrap_or(if is_apart { Isolation::Process } else { Isolation::InProcess })
}

/// Shows how far a model's load is, until dropped.
async fn watch_progress(
    connected: &Connected,
    model: &str,
    progress: &(dyn Fn(State) + Send + Sync),
) -> std::convert::Infallible {
    loop {
        let cx = Cx::new().with_timeout(Duration::from_secs(2));
        let state = match connected.plugin.health(&cx).await {
            Ok(Health::Starting { doing, percent }) => State::Starting { doing, percent },
            _ => State::Starting { doing: format!("loading {model}"), percent: None },
        };
        progress(state);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn failed(code: &'static str, message: String) -> LoadError {
    LoadError::new(Step::Connect, code, message)
}

fn ended(why: String) -> LoadError {
    failed("P604", format!("the plugin ended while starting: {why}"))
}

fn hung(entry: &PluginEntry) -> LoadError {
    failed("P607", format!("plugin `{}` was not ready within {} ms", entry.id, entry.limits.start_timeout_ms))
        .fix("raise `limits.start_timeout_ms` if it needs longer")
}

fn not_started(entry: &PluginEntry, code: &'static str, what: &str, error: PluginError) -> LoadError {
    if error.code == Code::DeadlineExceeded {
        return hung(entry);
    }
    failed(code, format!("plugin `{}`: {what}: {error}", entry.id)).note("at", entry.origin.to_string())
}

/// A note on disk that a plugin is being started inside the node. It is taken back when the start has ended, well or badly; a note
/// that is there at the next start names the plugin that took the node along. Whoever has written it holds a lock on it: a command that
/// starts the same plugin at the same time is told from a node that has ended.
struct Suspect(Option<(PathBuf, File)>);

impl Suspect {
    fn mark(shared: &Shared, entry: &PluginEntry, artifact: &Artifact) -> Result<Self, (LoadError, bool)> {
        let folder = shared.config.read().node.data_dir.join("starting");
        let path = folder.join(&entry.id);
        let unusable = |why: io::Error| (failed("P609", format!("{} cannot be written: {why}", path.display())), true);
        fs::create_dir_all(&folder).map_err(unusable)?;
        let (mut note, is_ours) = open_note(&path).map_err(unusable)?;
        let mut before = String::new();
        // What is no text is none of ours.
        let _ = note.read_to_string(&mut before);
        let (hash, process) = before.split_once('\n').unwrap_or((&before, ""));
        // In this process it hangs in an earlier start.
        if hash == artifact.sha256 && (is_ours || process == std::process::id().to_string()) {
            let error = failed("P608", format!("the node ended last time while plugin `{}` was being started", entry.id))
                .note("file", artifact.source.display().to_string())
                .fix(format!("set `isolation = \"process\"`, replace the plugin, or remove {} to try again", path.display()));
            return Err((error, false));
        }
        if !is_ours {
            return Ok(Self(None));
        }
        let text = format!("{}\n{}", artifact.sha256, std::process::id());
        let written = note.set_len(0).and_then(|()| note.rewind()).and_then(|()| note.write_all(text.as_bytes()));
        written.map_err(unusable)?;
        Ok(Self(Some((path, note))))
    }
}

/// Makes a note, or opens the one that is there, and says whether the lock on it is ours; else another start has it.
fn open_note(path: &Path) -> io::Result<(File, bool)> {
    loop {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            // It was taken back between the two lines.
            Ok(()) if file.metadata()?.nlink() == 0 => continue,
            Ok(()) => return Ok((file, true)),
            Err(TryLockError::WouldBlock) => return Ok((file, false)),
            // Some file systems have no locks.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => return Ok((file, true)),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

impl Drop for Suspect {
    fn drop(&mut self) {
        if let Some((path, _)) = &self.0
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(%error, file = %path.display(), "A start's note could not be removed.");
        }
    }
}
