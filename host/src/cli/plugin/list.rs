//! `fabstir-node plugin list`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use fabstir_plugin_api::manifest::Manifest;
use serde_json::{Value, json};

use super::super::{Failure, print, table};
use crate::config::{Config, Isolation, PluginEntry};
use crate::loader::{LoadError, Loader, inspect};
use crate::supervisor::isolation;

pub fn list(config: &Config, json: bool) -> Result<(), Failure> {
    let loader = Loader::new(config);
    let used: Vec<(&PluginEntry, Found)> = config
        .plugin
        .iter()
        .map(|entry| {
            let found = loader.find(&entry.use_).and_then(|file| inspect(&file).map(|manifest| (file, manifest)));
            (entry, found)
        })
        .collect();
    let files: BTreeSet<&Path> = used.iter().filter_map(|(_, found)| Some(found.as_ref().ok()?.0.as_path())).collect();
    // The same plugin may lie in several folders; only the first of them is ever found by name.
    let mut names: BTreeSet<String> = used.iter().filter_map(|(_, found)| Some(found.as_ref().ok()?.1.name.clone())).collect();
    let unused: Vec<(PathBuf, Manifest)> = loader
        .installed()
        .into_iter()
        .filter(|file| !files.contains(file.as_path()))
        .filter_map(|file| Some((file.clone(), inspect(&file).ok()?)))
        .filter(|(_, manifest)| names.insert(manifest.name.clone()))
        .collect();

    if json {
        let value = json!({
            "plugins": used.iter().map(|(entry, found)| entry_json(entry, found)).collect::<Vec<_>>(),
            "unused": unused.iter().map(|(file, manifest)| json!({ "file": file, "manifest": manifest })).collect::<Vec<_>>(),
        });
        return Ok(print(true, &value, "")?);
    }
    let mut rows = vec![["ID", "PLUGIN", "VERSION", "KIND", "RUNS IN", "RANK", "WHAT IT IS"].map(str::to_string)];
    rows.extend(used.iter().map(|(entry, found)| row(entry, found)));
    let mut text = table(&rows);
    if !unused.is_empty() {
        let rows: Vec<[String; 4]> = unused
            .iter()
            .map(|(_, manifest)| [manifest.name.clone(), manifest.version.clone(), kinds(manifest), manifest.description.clone()])
            .collect();
        text.push_str(&format!("\n\nInstalled, and not in the configuration:\n{}", table(&rows)));
    }
    Ok(print(false, &Value::Null, text)?)
}

/// The file of an entry and what it says of itself, or why there is none.
type Found = Result<(PathBuf, Manifest), LoadError>;

fn row(entry: &PluginEntry, found: &Found) -> [String; 7] {
    let (version, kind, what) = match found {
        Ok((_, manifest)) => (manifest.version.clone(), kinds(manifest), manifest.description.clone()),
        Err(error) => ("-".into(), "-".into(), format!("{}: {}", error.code, error.message)),
    };
    let runs_in = match found {
        _ if !entry.enabled => "(off)",
        Err(_) => "-",
        Ok((_, manifest)) => match isolation(entry, manifest) {
            Isolation::Process => "process",
            Isolation::InProcess => "node",
        },
    };
    [entry.id.clone(), entry.use_.clone(), version, kind, runs_in.into(), entry.rank.to_string(), what]
}

fn kinds(manifest: &Manifest) -> String {
    manifest.provides.iter().map(|provided| provided.kind.as_str()).collect::<Vec<_>>().join(", ")
}

fn entry_json(entry: &PluginEntry, found: &Found) -> Value {
    let mut value = json!({
        "id": entry.id, "use": entry.use_, "enabled": entry.enabled, "isolation": entry.isolation, "rank": entry.rank,
        "at": entry.origin.to_string(),
    });
    match found {
        Ok((file, manifest)) => {
            value["file"] = json!(file);
            value["manifest"] = json!(manifest);
        }
        Err(error) => value["error"] = json!(error),
    }
    value
}
