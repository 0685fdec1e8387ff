//! The first time that code of a plugin runs: in a child process, for one question, under a time limit.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use fabstir_plugin_api::plugin::Description;
use tokio::io::AsyncReadExt;

use super::display;
use super::error::{LoadError, Step};
use super::trust::replace;
use crate::supervisor::worker;

/// The most that a child may say, in bytes.
const MAX_ANSWER: u64 = 4 << 20;

/// Asks the copy for its description. The answer lies beside the copy afterwards, and the next time is read from there: the copy's
/// folder is named by its hash, so the answer cannot be another file's.
pub(super) async fn probe(source: &Path, copy: &Path, limit: Duration) -> Result<Description, LoadError> {
    let remembered = copy.with_file_name(".description");
    if let Ok(text) = tokio::fs::read(&remembered).await
        && let Ok(description) = serde_json::from_slice(&text)
    {
        return Ok(description);
    }
    let error = |code, message: String| LoadError::new(Step::Probe, code, message).note("file", display(source));
    let failed = |why: std::io::Error| error("P401", format!("no child process could be started: {why}"));
    let mut child = worker::command(copy, &["--probe"])
        .map_err(failed)?
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let both = async {
        let out = async {
            match stdout {
                Some(stdout) => stdout.take(MAX_ANSWER).read_to_end(&mut out).await.map(drop),
                None => Ok(()),
            }
        };
        let err = async {
            match stderr {
                Some(stderr) => stderr.take(MAX_ANSWER).read_to_end(&mut err).await.map(drop),
                None => Ok(()),
            }
        };
        tokio::try_join!(out, err)?;
        child.wait().await
    };
    let status = match tokio::time::timeout(limit, both).await {
        Ok(status) => status.map_err(failed)?,
        Err(_) => {
            return Err(error("P402", format!("the plugin did not answer within {} s of being opened", limit.as_secs()))
                .note("child", "killed")
                .fix("its start-up code hangs: report it to the plugin's author"));
        }
    };
    let said = String::from_utf8_lossy(&err);
    let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing").to_owned();
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return Err(error("P403", format!("the plugin crashed while being probed: signal {signal}"))
            .note("it said", last)
            .fix("report it to the plugin's author"));
    }
    if !status.success() {
        return Err(error("P404", "the plugin cannot be opened".into()).note("found", last));
    }
    let description: Description =
        serde_json::from_slice(&out).map_err(|why| error("P405", format!("the plugin's description cannot be read: {why}")))?;
    if let Err(why) = replace(&remembered, &out, 0o600) {
        tracing::warn!(error = %why, file = %remembered.display(), "A probe's answer could not be kept.");
    }
    Ok(description)
}

/// The child's side: opens the file, asks, prints the answer.
pub async fn probe_child(file: &Path) -> Result<String, String> {
    use fabstir_plugin_api::context::Cx;
    let instance = crate::supervisor::Connected::in_process(file, "probe").map_err(|error| error.to_string())?;
    let cx = Cx::new().with_timeout(Duration::from_secs(15));
    let description = instance.plugin.describe(&cx).await.map_err(|error| format!("describe failed: {error}"))?;
    serde_json::to_string(&description).map_err(|error| error.to_string())
}
