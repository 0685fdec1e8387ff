//! `fabstir-node plugin inspect`.

use std::fmt::Write;

use clap::Args;
use fabstir_plugin_api::manifest::Manifest;
use serde_json::{Value, json};

use super::super::{ConfigArgs, Failure, print};
use super::named;
use crate::config::Policy;
use crate::loader::{LoadError, Loader, inspect};

/// Shows what a plugin file is: identity, versions, methods, needs, settings.
///
/// All but the settings is read from the file, without running anything of it. The settings are asked of the plugin in a child
/// process, and only if the configuration's policy trusts the file or --probe is given.
#[derive(Debug, Args)]
pub struct Inspect {
    /// The library, or the name of an installed plugin.
    file: String,

    /// Runs the plugin in a child process to learn its settings, even if it is not trusted.
    #[arg(long)]
    probe: bool,

    #[command(flatten)]
    config: ConfigArgs,
}

impl Inspect {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.config.load()?.config;
        let mut loader = Loader::new(&config);
        let file = named(&loader, &self.file)?;
        let manifest = inspect(&file)?;
        if self.probe {
            loader.plugins.trust.policy = Policy::Any;
        }
        let settings = settings(&loader, &file.to_string_lossy());
        let mut value = json!({ "file": file, "manifest": manifest });
        match &settings {
            Ok(schema) => value["config_schema"] = schema.clone(),
            Err(error) => value["config_schema_error"] = json!(error),
        }
        let text = format!("{}\nfile         {}\n\n{}", describe(&manifest), file.display(), describe_settings(&settings));
        Ok(print(json, &value, text.trim_end())?)
    }
}

/// The schema of the plugin's `config` table, asked of the plugin itself.
fn settings(loader: &Loader, file: &str) -> Result<Value, LoadError> {
    let checked = loader.check(file)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| {
        LoadError::new(crate::loader::Step::Probe, "P401", format!("no child process could be started: {error}"))
    })?;
    let description = runtime.block_on(loader.probe(&checked))?;
    // The plugin promises a schema; one that is no JSON is shown as it is.
    Ok(serde_json::from_str(&description.config_schema).unwrap_or(Value::String(description.config_schema)))
}

fn describe(manifest: &Manifest) -> String {
    let mut text = format!("{} {}\n{}\n\n", manifest.name, manifest.version, manifest.description);
    let needs = if manifest.needs.is_empty() { "nothing".to_string() } else { manifest.needs.join(", ") };
    let build = if manifest.debug { "with debug assertions" } else { "release" };
    let mut row = |label: &str, value: &str| writeln!(text, "{label:<11}  {value}").expect("a String takes any text");
    for provided in &manifest.provides {
        row("provides", &format!("{} {}: {}", provided.kind, provided.version, provided.methods.join(", ")));
    }
    row("needs", &needs);
    row("licence", &manifest.license);
    row("plugin-api", &format!("{} (port {})", manifest.plugin_api, manifest.port));
    row("built for", &format!("{} on {}, {build}, panics {}", manifest.os, manifest.arch, manifest.panic));
    text.trim_end().to_string()
}

fn describe_settings(settings: &Result<Value, LoadError>) -> String {
    match settings {
        Err(error) => {
            format!("The settings are not shown, because the plugin was not run:\n{error}\n\n--probe runs it in a child process.")
        }
        Ok(schema) => {
            let mut text = String::from("settings");
            properties(schema, schema, 1, &mut text);
            text
        }
    }
}

/// Lists the keys of a table, and those of the tables within it.
fn properties(root: &Value, schema: &Value, depth: usize, text: &mut String) {
    // A schema that refers to itself would otherwise have no end.
    const DEEPEST: usize = 6;
    let Some(keys) = target(root, schema)["properties"].as_object().filter(|keys| !keys.is_empty() && depth < DEEPEST) else {
        if depth == 1 {
            text.push_str(": none");
        }
        return;
    };
    let required = target(root, schema)["required"].as_array().cloned().unwrap_or_default();
    for (key, of) in keys {
        let inner = target(root, of);
        let list = inner["items"].as_object().is_some_and(|items| !items.is_empty());
        let note = if required.iter().any(|name| name == key) { " (required)" } else { "" };
        let kind = if list { "[[..]]" } else { "" };
        let meaning = of["description"].as_str().or_else(|| inner["description"].as_str()).unwrap_or_default();
        let indent = "  ".repeat(depth);
        write!(text, "\n{indent}{key}{kind}{note}").expect("a String takes any text");
        for line in meaning.lines().map(str::trim).filter(|line| !line.is_empty()) {
            write!(text, "\n{indent}    {line}").expect("a String takes any text");
        }
        properties_below(root, if list { &inner["items"] } else { inner }, depth + 1, text);
    }
}

fn properties_below(root: &Value, schema: &Value, depth: usize, text: &mut String) {
    if target(root, schema)["properties"].is_object() {
        properties(root, schema, depth, text);
    }
}

/// Follows a `$ref` within the schema, and the one alternative of an `anyOf` that is not null.
fn target<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(path) = schema["$ref"].as_str().and_then(|path| path.strip_prefix('#')) {
        return root.pointer(path).map_or(schema, |inner| target(root, inner));
    }
    let mut others = schema["anyOf"].as_array().into_iter().flatten().filter(|one| one["type"] != "null");
    match (others.next(), others.next()) {
        (Some(only), None) => target(root, only),
        _ => schema,
    }
}
