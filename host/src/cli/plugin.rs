//! `fabstir-node plugin`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::{ConfigArgs, Failure, print};
use crate::config::Config;
use crate::loader::{LoadError, Loader};

mod check;
mod doctor;
mod inspect;
mod list;

/// Inspects, checks and locks plugins.
#[derive(Debug, Args)]
pub struct Plugin {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Lists the plugins of the configuration, and those that are installed but not used.
    ///
    /// Reads files only; nothing of a plugin is run.
    List(ConfigArgs),
    Inspect(inspect::Inspect),
    Check(check::Check),
    Doctor(doctor::Doctor),
    /// Writes the SHA-256 of plugin files to the lock file, which makes them known.
    ///
    /// Do this after you have built or installed a plugin that you trust. Entries of other plugins stay.
    Lock {
        /// The libraries, or names of installed plugins; without any, those of the configuration's plugins.
        #[arg(value_name = "FILE")]
        files: Vec<String>,

        #[command(flatten)]
        config: ConfigArgs,
    },
}

impl Plugin {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        match self.action {
            Action::List(config) => list::list(&config.load()?.config, json),
            Action::Inspect(inspect) => inspect.execute(json),
            Action::Check(check) => check.execute(json),
            Action::Doctor(doctor) => doctor.execute(json),
            Action::Lock { files, config } => lock(&files, &config.load()?.config, json),
        }
    }
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        let message = error.to_string();
        Self { exit: Self::FAILED, message, json: json!({ "error": error }) }
    }
}

/// The file that was named on the command line: a path from here, or the name of an installed plugin.
fn named(loader: &Loader, name: &str) -> Result<PathBuf, LoadError> {
    let path = PathBuf::from(name);
    if path.is_file() {
        return Ok(std::path::absolute(&path).unwrap_or(path));
    }
    // A relative path that names no file must not be looked for at the configuration's folder, where another file may lie.
    match name.contains('/') {
        true => loader.find(&std::path::absolute(&path).unwrap_or(path).to_string_lossy()),
        false => loader.find(name),
    }
}

fn lock(names: &[String], config: &Config, json: bool) -> Result<(), Failure> {
    let loader = Loader::new(config);
    let files: Result<Vec<PathBuf>, LoadError> = match names.is_empty() {
        // A plugin that is switched off need not be installed.
        true => config
            .plugin
            .iter()
            .map(|entry| (entry, loader.find(&entry.use_)))
            .filter(|(entry, found)| entry.enabled || found.is_ok())
            .map(|(_, found)| found)
            .collect(),
        false => names.iter().map(|name| named(&loader, name)).collect(),
    };
    let mut files = files?;
    files.sort();
    files.dedup();
    if files.is_empty() {
        return Err(Failure::new(
            Failure::USAGE,
            "usage",
            "there is nothing to lock: name a file, or add a [[plugin]] to plugins.toml",
        ));
    }
    let locked = loader.lock(&files)?;
    let lock = &config.plugins.trust.lock;
    let rows: Vec<String> = locked.iter().map(|one| format!("{}  {} {}", one.sha256, one.name, one.version)).collect();
    let text = format!("{}\nwritten to {}", rows.join("\n"), lock.display());
    Ok(print(json, &json!({ "lock": lock, "plugins": locked }), text)?)
}
