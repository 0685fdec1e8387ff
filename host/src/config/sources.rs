//! Where settings come from: the file, the environment, the flags. Reads them and checks each on its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::file::{self, File};
use super::merged::{Layer, Merged};
use super::problem::{Place, Problem, Problems};
use super::schema::{Check, Schema, nearest};
use super::{Config, Origin};

const PREFIX: &str = "FABSTIR_";

/// What a configuration is made from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The file named by `--config`.
    pub file: Option<PathBuf>,
    /// Where the process was started: relative paths in flags and variables start here.
    pub current_dir: PathBuf,
    pub environment: Vec<(String, String)>,
    pub flags: Vec<Flag>,
}

/// A flag that sets a key.
#[derive(Debug, Clone)]
pub struct Flag {
    /// As it was given: `--listen 127.0.0.1:0`.
    pub shown: String,
    /// `gateway.listen`, or `plugin.ID.rank`.
    pub key: String,
    pub value: String,
}

/// A configuration and where each part of it comes from.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub config: Config,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    /// Every key that has a value, in the order of the documentation.
    pub settings: Vec<Setting>,
}

/// One key of the merged configuration.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Setting {
    /// `gateway.listen`, or `plugin.ID.rank`.
    pub key: String,
    pub value: Value,
    pub source: Place,
}

impl Sources {
    /// The process's own current folder and environment.
    pub fn of_process(file: Option<PathBuf>, flags: Vec<Flag>) -> Self {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())))
            .collect();
        Self { file, current_dir: std::env::current_dir().unwrap_or_default(), environment, flags }
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.environment
            .iter()
            .find(|(variable, _)| variable == name)
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }

    /// The file to read, and its name in messages.
    fn find(&self) -> Option<(PathBuf, PathBuf)> {
        if let Some(named) = &self.file {
            return Some((self.current_dir.join(named), named.clone()));
        }
        let here = self.current_dir.join("plugins.toml");
        if here.exists() {
            return Some((here, "plugins.toml".into()));
        }
        let home = self.variable("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        let home = home.or_else(|| self.variable("HOME").map(|home| Path::new(home).join(".config")))?;
        let path = home.join("fabstir-node/plugins.toml");
        path.exists().then(|| (path.clone(), path))
    }

    /// Reads, merges and checks everything. All that is wrong is reported, not only what is found first.
    pub fn load(&self) -> Result<Loaded, Problems> {
        let file = match self.find() {
            None => None,
            Some((path, shown)) => Some((File::read(&path, &shown).map_err(|problem| Problems(vec![*problem]))?, path)),
        };
        let mut problems = Vec::new();
        let mut layers = vec![Layer { place: Place::Default, values: defaults() }];
        let mut origins = BTreeMap::new();
        if let Some((file, _)) = &file {
            check_file(file, &mut problems, &mut origins);
            layers.push(Layer { place: file.place(&[]), values: by_id(file) });
        }
        let ids: Vec<String> = origins.keys().cloned().collect();
        for over in self.overrides(&ids, &mut problems) {
            layers.push(over);
        }
        if !problems.is_empty() {
            return Err(Problems(problems));
        }
        let base_dir = file.as_ref().and_then(|(_, path)| path.parent()).unwrap_or(&self.current_dir);
        let base_dir = std::path::absolute(base_dir).unwrap_or_else(|_| base_dir.into());
        let merged = Merged::new(layers, file.as_ref().map(|(file, _)| file), origins);
        let mut config = merged.config().map_err(Problems)?;
        self.resolve_paths(&mut config, &merged, &base_dir);
        config.base_dir = base_dir;
        let settings = merged.settings(&config);
        Ok(Loaded { config, file: file.map(|(file, _)| file.path), settings })
    }

    /// The layers of the environment and of the flags, one per setting so that each keeps its name.
    fn overrides(&self, ids: &[String], problems: &mut Vec<Problem>) -> Vec<Layer> {
        let mut layers = Vec::new();
        let mut variables: Vec<_> = self.environment.iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
        variables.sort();
        for (name, text) in variables {
            let place = Place::Environment { variable: name.clone() };
            match variable_path(name, ids) {
                Some(path) => layers.extend(layer(path, text, place, problems)),
                None => problems.extend(misspelt_variable(name, place)),
            }
        }
        for flag in &self.flags {
            let path: Vec<String> = flag.key.split('.').map(str::to_string).collect();
            layers.extend(layer(path, &flag.value, Place::Flag { flag: flag.shown.clone() }, problems));
        }
        layers
    }

    /// Makes the paths that the node uses absolute. Those in the file start at its folder, those of flags and variables where the
    /// process was started.
    fn resolve_paths(&self, config: &mut Config, merged: &Merged, base_dir: &Path) {
        let resolve = |key: &str, path: &mut PathBuf| {
            let base = match merged.source(key) {
                Place::Environment { .. } | Place::Flag { .. } => &self.current_dir,
                Place::Default | Place::File { .. } => base_dir,
            };
            let home = self.variable("HOME").map(PathBuf::from);
            *path = match (path.strip_prefix("~"), home) {
                (Ok(rest), Some(home)) => home.join(rest),
                _ => std::path::absolute(base.join(&path)).unwrap_or_else(|_| base.join(&path)),
            };
        };
        resolve("node.data_dir", &mut config.node.data_dir);
        resolve("plugins.trust.lock", &mut config.plugins.trust.lock);
        if let Some(file) = &mut config.keys.password_file {
            resolve("keys.password_file", file);
        }
        if let Some(file) = &mut config.cache.shared.key_file {
            resolve("cache.shared.key_file", file);
        }
        for dir in &mut config.plugins.dirs {
            resolve("plugins.dirs", dir);
        }
    }
}

fn defaults() -> Value {
    let mut defaults = serde_json::to_value(Config::default()).expect("the configuration's types all have a JSON form");
    defaults["plugin"] = json!({});
    defaults
}

/// Checks the file as it is written, and notes the place of each plugin.
fn check_file(file: &File, problems: &mut Vec<Problem>, origins: &mut BTreeMap<String, Origin>) {
    let plugin_id =
        |entry: &str| Some(file.values.get("plugin")?.get(entry.parse::<usize>().ok()?)?.get("id")?.as_str()?.to_string());
    let mut check = Check { place: &|path| file.place(path), plugin_id: &plugin_id, problems: Vec::new() };
    check.value(&mut Vec::new(), &Value::Object(file.values.clone()), Schema::root());
    problems.append(&mut check.problems);

    let entries = file.values.get("plugin").and_then(Value::as_array).map_or(0, Vec::len);
    for index in 0..entries {
        let Some(id) = plugin_id(&index.to_string()) else { continue };
        let here = file.place(&["plugin".into(), index.to_string()]);
        let Place::File { line, .. } = here else { continue };
        match origins.get(&id) {
            None => {
                origins.insert(id, Origin { file: file.path.clone(), line });
            }
            Some(first) => problems.push(
                Problem::new(
                    "C106",
                    file.place(&["plugin".into(), index.to_string(), "id".into()]),
                    format!("two plugins have the id `{id}`"),
                )
                .key(format!("plugin.{index}.id"))
                .note("entries", format!("[[plugin]] at {first} and at {}:{line}", file.path.display()))
                .fix("give one of them another id"),
            ),
        }
    }
    let trust = file.values.get("plugins").and_then(|plugins| plugins.get("trust"));
    let keys = trust.and_then(|trust| trust.get("keys")).and_then(Value::as_array).map_or(0, Vec::len);
    if keys == 0 && trust.and_then(|trust| trust.get("policy")).and_then(Value::as_str) == Some("signed") {
        let place = file.place(&["plugins".into(), "trust".into(), "policy".into()]);
        let problem = Problem::new(
            "C107",
            place,
            "`plugins.trust.policy` is \"signed\", but no key is trusted, so no plugin could be loaded",
        );
        problems.push(
            problem.key("plugins.trust.keys").fix("add the public keys to `plugins.trust.keys`, or choose the policy \"known\""),
        );
    }
}

/// The file's values, with the plugins keyed by id instead of listed.
fn by_id(file: &File) -> Value {
    let mut values = file.values.clone();
    let entries = match values.remove("plugin") {
        Some(Value::Array(entries)) => entries,
        _ => Vec::new(),
    };
    let keyed: Map<String, Value> =
        entries.into_iter().filter_map(|entry| Some((entry.get("id")?.as_str()?.to_string(), entry))).collect();
    values.insert("plugin".into(), Value::Object(keyed));
    Value::Object(values)
}

/// `FABSTIR_GATEWAY__LISTEN` as `gateway.listen`. `None` for a name without `__`, which is no setting.
fn variable_path(name: &str, ids: &[String]) -> Option<Vec<String>> {
    let mut path: Vec<String> = name.strip_prefix(PREFIX)?.split("__").map(str::to_ascii_lowercase).collect();
    if path.len() < 2 {
        return None;
    }
    // The name of a variable cannot hold the `-` that an id may.
    if path[0] == "plugin"
        && let Some(id) = ids.iter().find(|id| id.replace('-', "_") == path[1])
    {
        path[1].clone_from(id);
    }
    Some(path)
}

fn variable_name(path: &[String]) -> String {
    format!("{PREFIX}{}", path.join("__").to_ascii_uppercase().replace('-', "_"))
}

/// A variable such as `FABSTIR_LISTEN` or `FABSTIR_GATEWAY_LISTEN` would be ignored, which its author could hardly have meant.
fn misspelt_variable(name: &str, place: Place) -> Option<Problem> {
    let rest = name.strip_prefix(PREFIX)?;
    let sections = Schema::root().properties()?;
    let meant = sections.keys().filter_map(|section| Some((section, Schema::root().property(section)?.properties()?))).find_map(
        |(section, keys)| {
            let key = keys
                .keys()
                .find(|key| key.eq_ignore_ascii_case(rest) || format!("{section}_{key}").eq_ignore_ascii_case(rest))?;
            Some(variable_name(&[section.clone(), key.clone()]))
        },
    )?;
    let problem = Problem::new("C102", place, format!("the environment variable {name} is not a setting"));
    let mut problem = problem.key(name).fix(format!("write {meant}"));
    problem.nearest = Some(meant);
    Some(problem)
}

/// One setting of the environment or of a flag as a layer; adds to `problems` and returns `None` when it does not fit.
fn layer(path: Vec<String>, text: &str, place: Place, problems: &mut Vec<Problem>) -> Option<Layer> {
    let mut check = Check { place: &|_| place.clone(), plugin_id: &|_| None, problems: Vec::new() };
    let mut schema = Some(Schema::root());
    for (depth, name) in path.iter().enumerate() {
        let Some(within) = schema else { break };
        schema = match within.items().filter(|_| depth == 1) {
            // Plugins are named by id here, and may be new.
            Some(entry) => Some(entry),
            None if within.is_open() => None,
            None => match within.property(name) {
                Some(inner) => Some(inner),
                None => {
                    problems.push(unknown_override(&check, &path[..=depth], within, &place));
                    return None;
                }
            },
        };
    }
    let value = coerce(text, schema);
    match schema {
        Some(schema) if path.len() < 2 || (path.len() == 2 && path[0] == "plugin") => {
            let keys = schema.properties().or_else(|| schema.items()?.properties()).into_iter().flatten();
            let keys: Vec<&str> = keys.map(|(key, _)| key.as_str()).collect();
            let problem =
                Problem::new("C103", place, format!("`{}` is not a single value, so it cannot be set here", path.join(".")));
            problems.push(problem.key(path.join(".")).note("its keys", keys.join(", ")));
            return None;
        }
        Some(schema) => check.value(&mut path.clone(), &value, schema),
        None => {}
    }
    let fine = check.problems.is_empty();
    problems.append(&mut check.problems);
    let mut values = path.iter().rev().fold(value, |inner, name| json!({ name.as_str(): inner }));
    if path[0] == "plugin" {
        values["plugin"][path[1].as_str()]["id"] = path[1].as_str().into();
    }
    fine.then_some(Layer { place, values })
}

fn unknown_override(check: &Check<'_>, path: &[String], within: Schema, place: &Place) -> Problem {
    let mut problem = check.unknown(path, within);
    if let (Some((name, table)), Place::Environment { variable }) = (path.split_last(), place) {
        let known = within.properties().into_iter().flatten().map(|(known, _)| known.as_str());
        if let Some(near) = nearest(name, known) {
            let meant = variable_name(&[table, &[near.to_string()]].concat());
            let rest = variable.strip_prefix(&variable_name(path)).unwrap_or_default();
            problem.fix = Some(format!("write {meant}{rest} instead of {variable}"));
        }
    }
    problem
}

/// Reads text as the value that its key takes.
fn coerce(text: &str, schema: Option<Schema>) -> Value {
    let Some(schema) = schema else {
        return file::literal(text).unwrap_or_else(|| text.into());
    };
    if schema.accepts("integer")
        && let Ok(number) = text.trim().replace('_', "").parse::<i64>()
    {
        return number.into();
    }
    if schema.accepts("string") {
        return text.into();
    }
    match text.trim() {
        "true" => true.into(),
        "false" => false.into(),
        "" if schema.accepts("array") => json!([]),
        list if schema.accepts("array") && !list.starts_with('[') => {
            list.split(',').map(|item| Value::from(item.trim())).collect()
        }
        other => file::literal(other).unwrap_or_else(|| text.into()),
    }
}
