//! The layers, laid over each other: the final values, and where each comes from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use figment::value::{Dict, Map as Profiles};
use figment::{Figment, Metadata, Profile, Provider};
use serde::Deserialize;
use serde_json::Value;

use super::file::File;
use super::problem::{Place, Problem};
use super::schema::{Check, Schema, nearest};
use super::sources::Setting;
use super::{Cache, Config, Gateway, Keys, Market, Network, Node, Origin, PluginEntry, Plugins, Scheduler};

/// One source of values, in which plugins are keyed by id.
pub(super) struct Layer {
    pub place: Place,
    pub values: Value,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.place.to_string())
    }

    fn data(&self) -> Result<Profiles<Profile, Dict>, figment::Error> {
        let values = figment::value::Value::serialize(&self.values)?.into_dict().unwrap_or_default();
        Ok(Profile::Default.collect(values))
    }
}

/// The sources, laid over each other.
pub(super) struct Merged<'a> {
    figment: Figment,
    /// In the order in which they were laid.
    places: Vec<Place>,
    file: Option<&'a File>,
    origins: BTreeMap<String, Origin>,
}

/// [`Config`] with its plugins keyed by id.
#[derive(Deserialize)]
struct Keyed {
    node: Node,
    gateway: Gateway,
    scheduler: Scheduler,
    cache: Cache,
    network: Network,
    keys: Keys,
    market: Market,
    plugins: Plugins,
    plugin: BTreeMap<String, PluginEntry>,
}

/// A key names a plugin that is none of the configured ones.
fn no_plugin(named: &str, ids: &[&str], key: &str, place: Place) -> Problem {
    let mut problem = Problem::new("C105", place, format!("there is no plugin with the id `{named}`")).key(key);
    problem.nearest = nearest(named, ids.iter().copied()).map(str::to_string);
    problem.note("plugins", if ids.is_empty() { "none".into() } else { ids.join(", ") })
}

impl<'a> Merged<'a> {
    pub fn new(layers: Vec<Layer>, file: Option<&'a File>, origins: BTreeMap<String, Origin>) -> Self {
        let mut figment = Figment::new();
        let mut places = Vec::new();
        for layer in layers {
            places.push(layer.place.clone());
            figment = figment.merge(layer);
        }
        Self { figment, places, file, origins }
    }

    pub fn config(&self) -> Result<Config, Vec<Problem>> {
        // Entries that only the environment or a flag made have not been held against the schema as a whole.
        let mut problems = Vec::new();
        for (id, entry) in self.figment.find_value("plugin").ok().and_then(|plugins| plugins.into_dict()).unwrap_or_default() {
            let known = self.origins.contains_key(&id);
            let place = self.source(&format!("plugin.{id}.id"));
            let mut check = Check { place: &|_| place.clone(), plugin_id: &|_| None, problems: Vec::new() };
            if !known && entry.find_ref("use").is_none() {
                let ids: Vec<&str> = self.origins.keys().map(String::as_str).collect();
                problems.push(no_plugin(&id, &ids, &format!("plugin.{id}"), place.clone()));
            } else if !known
                && let Some(schema) =
                    Schema::root().property("plugin").and_then(Schema::items).and_then(|entry| entry.property("id"))
            {
                check.value(&mut vec!["plugin".into(), id.clone(), "id".into()], &Value::from(id.as_str()), schema);
                problems.append(&mut check.problems);
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let keyed: Keyed = self.figment.extract().map_err(|error| self.figment_problems(error))?;
        let Keyed { node, gateway, scheduler, cache, network, keys, market, plugins, plugin } = keyed;
        let mut plugin: Vec<PluginEntry> = plugin.into_values().collect();
        for entry in &mut plugin {
            entry.origin = self.origins.get(&entry.id).cloned().unwrap_or_default();
        }
        plugin.sort_by_key(|entry| if entry.origin.line == 0 { usize::MAX } else { entry.origin.line });
        if let Some(named) = cache.shared.storage.as_ref().filter(|_| cache.enabled)
            && !plugin.iter().any(|entry| entry.id == *named)
        {
            let ids: Vec<&str> = plugin.iter().map(|entry| entry.id.as_str()).collect();
            let key = "cache.shared.storage";
            return Err(vec![no_plugin(named, &ids, key, self.source(key))]);
        }
        Ok(Config { node, gateway, scheduler, cache, network, keys, market, plugins, plugin, base_dir: PathBuf::new() })
    }

    fn figment_problems(&self, errors: figment::Error) -> Vec<Problem> {
        let problem = |error: figment::Error| {
            let key = error.path.join(".");
            Problem::new("C103", self.source(&key), format!("`{key}` does not fit: {}", error.kind)).key(key)
        };
        errors.into_iter().map(problem).collect()
    }

    /// Where the value of a key comes from.
    pub fn source(&self, key: &str) -> Place {
        let name = self.figment.find_metadata(key).map(|metadata| metadata.name.to_string());
        let place = self.places.iter().rev().find(|place| Some(place.to_string()) == name).cloned().unwrap_or(Place::Default);
        match (&place, self.file) {
            (Place::File { .. }, Some(file)) => {
                let mut path: Vec<String> = key.split('.').map(str::to_string).collect();
                if let [list, id, ..] = &mut path[..]
                    && list == "plugin"
                {
                    let entries = file.values.get("plugin").and_then(Value::as_array).into_iter().flatten();
                    let index = entries.into_iter().position(|entry| entry["id"] == id.as_str()).unwrap_or_default();
                    *id = index.to_string();
                }
                file.place(&path)
            }
            _ => place,
        }
    }

    /// Every key of the final configuration with its source.
    pub fn settings(&self, config: &Config) -> Vec<Setting> {
        let mut settings = Vec::new();
        let mut whole = serde_json::to_value(config).expect("the configuration's types all have a JSON form");
        let plugins = whole.as_object_mut().and_then(|whole| whole.remove("plugin"));
        self.gather(String::new(), whole, &mut settings);
        for entry in plugins.as_ref().and_then(Value::as_array).into_iter().flatten() {
            let id = entry["id"].as_str().unwrap_or_default();
            self.gather(format!("plugin.{id}"), entry.clone(), &mut settings);
        }
        settings
    }

    fn gather(&self, key: String, value: Value, settings: &mut Vec<Setting>) {
        match value {
            Value::Object(table) if !table.is_empty() => {
                for (name, inner) in table {
                    let key = if key.is_empty() { name } else { format!("{key}.{name}") };
                    self.gather(key, inner, settings);
                }
            }
            value => {
                // find_metadata falls back to the table around a key, whose source says nothing about a key that is not there.
                let source = if self.figment.contains(&key) { self.source(&key) } else { Place::Default };
                settings.push(Setting { key, value, source });
            }
        }
    }
}
