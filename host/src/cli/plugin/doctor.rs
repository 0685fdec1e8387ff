//! `fabstir-node plugin doctor`.

use std::fmt::Write;
use std::time::Duration;

use clap::Args;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::plugin::Configure;
use serde_json::{Value, json};

use super::super::{ConfigArgs, Failure, print};
use crate::config::{Config, PluginEntry};
use crate::loader::{Artifact, LoadError, Loader, Step};
use crate::supervisor::Connected;

/// Says why a plugin is not ready: each step on the way there, with its verdict.
///
/// Goes through the steps of `run` for each plugin: finds, reads, resolves, trusts, probes it, checks its settings and starts an
/// instance of it in a process of its own, which ends again. No model is loaded, and a running node is not disturbed.
#[derive(Debug, Args)]
pub struct Doctor {
    /// The id of one plugin; without it, all of them.
    id: Option<String>,

    #[command(flatten)]
    config: ConfigArgs,
}

/// How long an instance may take to accept its settings.
const PATIENCE: Duration = Duration::from_secs(60);

impl Doctor {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.config.load()?.config;
        let entries: Vec<&PluginEntry> =
            config.plugin.iter().filter(|entry| self.id.as_ref().is_none_or(|id| *id == entry.id)).collect();
        if let (Some(id), true) = (&self.id, entries.is_empty()) {
            let known: Vec<&str> = config.plugin.iter().map(|entry| entry.id.as_str()).collect();
            let known = if known.is_empty() { "there is none".to_string() } else { format!("there are: {}", known.join(", ")) };
            return Err(Failure::new(
                Failure::FAILED,
                "unknown_plugin",
                format!("the configuration has no plugin with the id `{id}`; {known}"),
            ));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime =
            runtime.map_err(|error| Failure::new(Failure::FAILED, "runtime", format!("cannot start a thread: {error}")))?;
        let loader = Loader::new(&config);
        let verdicts: Vec<Verdict> =
            entries.into_iter().map(|entry| runtime.block_on(examine(&loader, &config, entry))).collect();
        // What is switched off is examined, and keeps nothing from working.
        let good = verdicts.iter().all(|verdict| verdict.error.is_none() || !verdict.enabled);
        let value = json!({ "good": good, "plugins": verdicts.iter().map(Verdict::to_json).collect::<Vec<_>>() });
        let text = match verdicts.is_empty() {
            true => "The configuration has no plugins.".to_string(),
            false => verdicts.iter().map(Verdict::to_text).collect::<Vec<_>>().join("\n\n"),
        };
        print(json, &value, text)?;
        if good { Ok(()) } else { Err(Failure::silent()) }
    }
}

/// How far a plugin came.
struct Verdict {
    id: String,
    enabled: bool,
    artifact: Option<Artifact>,
    /// What stopped it, and at which step.
    error: Option<LoadError>,
}

async fn examine(loader: &Loader, config: &Config, entry: &PluginEntry) -> Verdict {
    let mut verdict = Verdict { id: entry.id.clone(), enabled: entry.enabled, artifact: None, error: None };
    match loader.prepare(entry).await {
        Err(error) => verdict.error = Some(error),
        Ok(artifact) => {
            verdict.error = start(&artifact, config, entry).await.err();
            verdict.artifact = Some(artifact);
        }
    }
    verdict
}

/// Starts an instance with the operator's settings and an empty folder for its state, and ends it.
async fn start(artifact: &Artifact, config: &Config, entry: &PluginEntry) -> Result<(), LoadError> {
    let failed = |code, message: String| LoadError::new(Step::Connect, code, message);
    let state = tempfile::tempdir()
        .map_err(|error| failed("P609", format!("no folder for the state of a trial can be made: {error}")))?;
    let connected = Connected::worker(&artifact.copy, entry, &config.base_dir)?;
    let configure = Configure {
        instance: entry.id.clone(),
        state_dir: state.path().into(),
        config: Value::Object(entry.config.clone()).to_string(),
        log_level: "error".into(),
    };
    let cx = Cx::new().with_timeout(PATIENCE);
    let result = tokio::select! {
        answer = connected.plugin.configure(&cx, configure) => {
            let refused = |error| failed("P503", format!("its configuration was refused: {error}"));
            answer.map_err(|error| refused(error).note("at", entry.origin.to_string()))
        }
        why = connected.failed() => Err(failed("P604", format!("the plugin ended while starting: {why}"))),
    };
    let result = match result {
        // The call may hear of the end before its cause is known.
        Err(_) if connected.session.is_closed() => {
            Err(failed("P604", format!("the plugin ended while starting: {}", connected.failed().await)))
        }
        result => result,
    };
    if result.is_ok() {
        // The process is ended right after, whatever the answer is.
        let _ = connected.plugin.shutdown(&Cx::new().with_timeout(Duration::from_secs(10))).await;
    }
    connected.end("the examination is over", Duration::from_secs(1)).await;
    result
}

impl Verdict {
    /// Each step, and whether it went well; `None` for those that were not reached.
    fn steps(&self) -> impl Iterator<Item = (Step, Option<bool>)> {
        let failed = self.error.as_ref().map(|error| error.step);
        Step::ALL.into_iter().map(move |step| {
            let good = match failed {
                Some(failed) if step == failed => Some(false),
                Some(failed) if step > failed => None,
                _ => Some(true),
            };
            (step, good)
        })
    }

    fn to_text(&self) -> String {
        let mut text = self.id.clone();
        if let Some(artifact) = &self.artifact {
            write!(text, "  {} {}  {}", artifact.manifest.name, artifact.manifest.version, artifact.source.display())
                .expect("a String takes any text");
        }
        if !self.enabled {
            text.push_str("  (switched off: `enabled = false`)");
        }
        for (step, good) in self.steps() {
            let word = match good {
                Some(true) => "ok",
                Some(false) => "FAILED",
                None => "-",
            };
            write!(text, "\n  {word:<6}  {step}").expect("a String takes any text");
            if let (Some(false), Some(error)) = (good, &self.error) {
                for line in error.to_string().lines() {
                    write!(text, "\n            {line}").expect("a String takes any text");
                }
            }
        }
        text
    }

    fn to_json(&self) -> Value {
        let word = |good| match good {
            Some(true) => "ok",
            Some(false) => "failed",
            None => "not reached",
        };
        json!({
            "id": self.id,
            "enabled": self.enabled,
            "file": self.artifact.as_ref().map(|artifact| &artifact.source),
            "sha256": self.artifact.as_ref().map(|artifact| &artifact.sha256),
            "steps": self.steps().map(|(step, good)| json!({ "step": step, "verdict": word(good) })).collect::<Vec<_>>(),
            "error": self.error,
        })
    }
}
