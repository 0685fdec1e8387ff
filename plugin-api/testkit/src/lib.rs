//! The conformance suite: holds any built plugin library against what the plugin contract promises.
//!
//! Every check has a name that one can type, runs in a process of its own under a time limit, and ends as pass, warn, fail, crash or
//! skip, the last four with a reason. The library is used as the node uses it: opened, connected, and spoken to in frames.
//!
//! A plugin's author writes `tests/conformance.rs`, with `harness = false` for it in `Cargo.toml`:
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use fabstir_plugin_testkit::{Subject, built_library};
//!
//! fn main() -> ExitCode {
//!     fabstir_plugin_testkit::main(Subject { library: built_library("inference_echo"), config: serde_json::json!({}) })
//! }
//! ```
//!
//! Then `cargo test --test conformance` runs all checks, and `cargo test --test conformance -- max-tokens` one of them. cargo-nextest
//! sees each check as a test. `fabstir-node plugin check FILE` is the same suite for a library without its sources.

mod checks;
mod child;
mod harness;
mod process;
mod program;
mod report;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::checks::CHECKS;
use crate::harness::Harness;

pub use crate::checks::Check;
pub use crate::child::report as report_to_parent;
pub use crate::program::{built_library, main};
pub use crate::report::{Outcome, Ran, Report};

/// What is checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    /// The built library.
    pub library: PathBuf,
    /// The `config` table that instances are started with.
    pub config: serde_json::Value,
}

/// How a suite is run.
pub struct Options<'a> {
    /// The names of the checks to run; none runs all.
    pub only: &'a [String],
    /// The time that a check may take. Some take a multiple of it, see [`Check::patience`].
    pub timeout: Duration,
    /// Makes the command that runs one check: it must lead to [`run_one`] and [`report_to_parent`].
    pub child: &'a dyn Fn(&Subject, &str) -> Result<Command>,
    /// Hears of each check as it ends.
    pub watch: &'a dyn Fn(&Ran),
}

/// The time that a check may take by default.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Every check there is, in the order in which they run.
pub fn checks() -> &'static [Check] {
    CHECKS
}

/// Runs the suite, one process after the other.
///
/// Checks of kinds that the library does not provide are skipped without a process. Nothing of the library is executed here.
///
/// # Errors
/// A name in `only` that no check has.
pub fn run(subject: &Subject, options: &Options<'_>) -> Result<Report> {
    if let Some(unknown) = options.only.iter().find(|name| !CHECKS.iter().any(|check| check.name == **name)) {
        let names: Vec<&str> = CHECKS.iter().map(|check| check.name).collect();
        anyhow::bail!("no check is called `{unknown}`; there are: {}", names.join(", "));
    }
    let manifest = harness::manifest(&subject.library).ok();
    let mut checks = Vec::new();
    for check in CHECKS.iter().filter(|check| options.only.is_empty() || options.only.iter().any(|name| name == check.name)) {
        let began = Instant::now();
        let provided =
            |kind: &str| manifest.as_ref().is_none_or(|found| found.provides.iter().any(|provided| provided.kind == kind));
        let outcome = match check.kind {
            Some(kind) if !provided(kind) => Outcome::skip(format!("the plugin provides no {kind}")),
            _ => match (options.child)(subject, check.name) {
                Ok(command) => child::watch(command, options.timeout * check.patience),
                Err(error) => Outcome::crash(format!("the process of the check cannot be started: {error:#}")),
            },
        };
        let ran = Ran { name: check.name.to_owned(), took_ms: began.elapsed().as_millis() as u64, outcome };
        (options.watch)(&ran);
        checks.push(ran);
    }
    Ok(Report { library: subject.library.clone(), checks })
}

/// Runs one check in this process, which the library may take down or leave in any state: end it soon afterwards.
pub fn run_one(subject: &Subject, name: &str) -> Outcome {
    let Some(check) = CHECKS.iter().find(|check| check.name == name) else {
        return Outcome::fail(format!("no check is called `{name}`"));
    };
    let checked = || -> Result<Outcome> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("check").enable_all().build()?;
        runtime.block_on(async {
            let harness = Harness::open(subject)?;
            let outcome = (check.run)(&harness).await?;
            Ok(match harness.first_fault() {
                Some(fault) => Outcome::fail(format!("the plugin broke the frame protocol: {fault}")),
                None => outcome,
            })
        })
    };
    checked().unwrap_or_else(|error| Outcome::fail(format!("{error:#}")))
}
