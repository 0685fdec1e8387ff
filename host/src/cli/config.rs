//! `fabstir-node config`.

use std::fmt::Write;

use clap::{Args, Subcommand};
use serde_json::json;

use super::{ConfigArgs, Failure, print};
use crate::config::Loaded;

/// Checks and shows the configuration.
#[derive(Debug, Args)]
pub struct ConfigCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Reads the configuration and reports everything that is wrong with it.
    ///
    /// Nothing is started, and no plugin is opened: `fabstir-node plugin doctor` goes on from there.
    Check(ConfigArgs),
    /// Shows the merged configuration, each value with its source.
    ///
    /// A source is `default`, a line of the file, an environment variable or a flag.
    Show(ConfigArgs),
}

impl ConfigCommand {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        match self.action {
            Action::Check(args) => check(&args.load()?, json),
            Action::Show(args) => show(&args.load()?, json),
        }
    }
}

fn check(loaded: &Loaded, json: bool) -> Result<(), Failure> {
    let name = loaded.file.as_ref().map_or("no file, the defaults".to_string(), |file| file.display().to_string());
    let (on, off): (Vec<_>, Vec<_>) = loaded.config.plugin.iter().partition(|entry| entry.enabled);
    let list = |entries: &[&crate::config::PluginEntry]| entries.iter().map(|entry| entry.id.clone()).collect::<Vec<_>>();
    let (on, off) = (list(&on), list(&off));
    let mut text = format!("{name}: good");
    match on.len() {
        0 => text.push_str(", but it starts no plugin"),
        _ => write!(text, ", starts {}", on.join(", ")).expect("a String takes any text"),
    }
    if !off.is_empty() {
        write!(text, "; switched off: {}", off.join(", ")).expect("a String takes any text");
    }
    Ok(print(json, &json!({ "file": loaded.file, "plugins": on, "disabled": off }), text)?)
}

fn show(loaded: &Loaded, json: bool) -> Result<(), Failure> {
    let rows: Vec<(String, String)> = loaded
        .settings
        .iter()
        .map(|setting| (format!("{} = {}", setting.key, setting.value), setting.source.to_string()))
        .collect();
    // A long value gets its source on the line below instead of pushing all others aside.
    let width = rows.iter().map(|(text, _)| text.chars().count()).filter(|width| *width <= 70).max().unwrap_or(0);
    let mut text = String::new();
    for (setting, source) in rows {
        let gap = if setting.chars().count() > width { format!("\n{:width$}", "") } else { String::new() };
        writeln!(text, "{setting:<width$}{gap}  # {source}").expect("a String takes any text");
    }
    Ok(print(json, &json!({ "file": loaded.file, "settings": loaded.settings }), text.trim_end())?)
}
