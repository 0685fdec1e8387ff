//! Blobs out of the storage plugins.

use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::storage::Storage;
use serde_json::{Value, json};

use super::{Failure, not_started, of_storage, only, print};
use crate::config::{Config, PluginEntry};
use crate::supervisor::{Alone, AloneError, entries};

/// What came of one blob in one plugin.
struct Outcome {
    id: String,
    plugin: String,
    deleted: Result<bool, Failure>,
}

/// Deletes blobs in every enabled storage plugin, or in the one that is named, and tells where they were. One that fails keeps the others from
/// nothing.
pub(super) async fn everywhere(mut config: Config, plugin: Option<String>, ids: &[String], json: bool) -> Result<(), Failure> {
    if let Some(id) = &plugin {
        only(&mut config, id)?;
    }
    let mut places = entries::<dyn Storage>(&config);
    // One that is named may be used although the node does not.
    places.retain(|entry| entry.enabled || plugin.is_some());
    if places.is_empty() {
        return Err(not_started(AloneError::None { kind: "storage" }));
    }
    let mut outcomes = Vec::new();
    for place in places {
        in_one(&config, place, ids, &mut outcomes).await;
    }
    tell(ids, outcomes, json)
}

async fn in_one(config: &Config, place: PluginEntry, ids: &[String], outcomes: &mut Vec<Outcome>) {
    let plugin = place.id.clone();
    let started = Alone::start_entry(config.clone(), place, |routes| &routes.storage).await;
    let started = match started {
        Ok(started) => started,
        Err(error) => {
            let why = error.to_string();
            let failed = |id: &String| Outcome {
                id: id.clone(),
                plugin: plugin.clone(),
                deleted: Err(Failure::new(Failure::FAILED, "plugin", &why)),
            };
            return outcomes.extend(ids.iter().map(failed));
        }
    };
    for id in ids {
        let deleted = started.client.delete(&Cx::new(), id.clone()).await.map_err(of_storage);
        outcomes.push(Outcome { id: id.clone(), plugin: plugin.clone(), deleted });
    }
    started.end().await;
}

fn tell(ids: &[String], outcomes: Vec<Outcome>, json: bool) -> Result<(), Failure> {
    let (mut shown, mut lines, mut exit) = (Vec::new(), Vec::new(), None);
    for id in ids {
        let of_blob = outcomes.iter().filter(|outcome| outcome.id == *id);
        let mut is_told = false;
        for Outcome { plugin, deleted, .. } in of_blob {
            let mut value = json!({ "id": id, "plugin": plugin, "deleted": matches!(deleted, Ok(true)) });
            match deleted {
                Ok(true) => lines.push(format!("deleted  {id}  {plugin}")),
                Ok(false) => {}
                Err(why) => {
                    lines.push(format!("FAILED   {id}  {plugin}: {}", why.text()));
                    value["error"] = why.json["error"].clone();
                    exit.get_or_insert(why.exit);
                }
            }
            is_told |= !matches!(deleted, Ok(false));
            shown.push(value);
        }
        if !is_told {
            lines.push(format!("nowhere  {id}"));
            exit.get_or_insert(Failure::FAILED);
        }
    }
    print(json, &Value::from(shown), lines.join("\n"))?;
    exit.map_or(Ok(()), |exit| Err(Failure { exit, ..Failure::silent() }))
}
