//! Holding a plugin's `config` table against the schema that the plugin gives for it.
//!
//! Keys are checked here, where file and line are known. Types and values are the plugin's own business: its `configure` answers
//! for them before anything is started.

use fabstir_plugin_api::plugin::Description;
use serde_json::{Map, Value};

use super::error::{LoadError, Step};
use crate::config::PluginEntry;

pub(super) fn check(description: &Description, entry: &PluginEntry) -> Result<(), LoadError> {
    let schema: Value = serde_json::from_str(&description.config_schema).map_err(|why| {
        LoadError::new(
            Step::Configure,
            "P501",
            format!("`{}` gives a configuration schema that is not JSON: {why}", description.name),
        )
    })?;
    let mut found = Vec::new();
    walk(&schema, &schema, &Value::Object(entry.config.clone()), "config", &mut found);
    match found.into_iter().next() {
        None => Ok(()),
        Some((message, nearest)) => {
            let mut error = LoadError::new(Step::Configure, "P502", format!("plugin `{}`: {message}", entry.id))
                .note("plugin", format!("{} at {}", entry.use_, entry.origin));
            if let Some(nearest) = nearest {
                error = error.note("nearest", nearest);
            }
            Err(error.fix(format!("see `fabstir-node plugin inspect {}`", entry.use_)))
        }
    }
}

type Finding = (String, Option<String>);

fn walk(root: &Value, schema: &Value, value: &Value, path: &str, found: &mut Vec<Finding>) {
    let schema = target(root, schema);
    match value {
        Value::Object(values) => {
            let Some(known) = schema["properties"].as_object() else { return };
            for (key, value) in values {
                match known.get(key) {
                    Some(schema) => walk(root, schema, value, &format!("{path}.{key}"), found),
                    None if schema["additionalProperties"] == Value::Bool(false) => found.push(unknown(path, key, known)),
                    None => {}
                }
            }
            for key in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                if !values.contains_key(key) {
                    found.push((format!("`{path}.{key}` is missing"), None));
                }
            }
        }
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                walk(root, &schema["items"], value, &format!("{path}[{index}]"), found);
            }
        }
        _ => {}
    }
}

fn unknown(path: &str, key: &str, known: &Map<String, Value>) -> Finding {
    let nearest = known.keys().max_by(|a, b| strsim::jaro_winkler(a, key).total_cmp(&strsim::jaro_winkler(b, key)));
    let nearest = nearest.filter(|name| strsim::jaro_winkler(name, key) > 0.7).map(|name| format!("{path}.{name}"));
    (format!("unknown key `{path}.{key}`"), nearest)
}

/// Follows a `$ref` within the schema, and the one alternative of an `anyOf` that is not null; not for ever, since the schema is the
/// plugin's own text.
fn target<'a>(root: &'a Value, mut schema: &'a Value) -> &'a Value {
    for _ in 0..32 {
        let referred = schema["$ref"].as_str().and_then(|path| path.strip_prefix('#')).and_then(|path| root.pointer(path));
        let alternatives =
            schema["anyOf"].as_array().map(|all| all.iter().filter(|one| one["type"] != "null").collect::<Vec<_>>());
        schema = match (referred, alternatives.as_deref()) {
            (Some(referred), _) => referred,
            (None, Some([only])) => only,
            _ => return schema,
        };
    }
    schema
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_schema_that_refers_to_itself_ends() {
        for schema in [json!({ "$ref": "#" }), json!({ "anyOf": [{ "$ref": "#" }] })] {
            let mut found = Vec::new();
            walk(&schema, &schema, &json!({ "a": { "b": [1] } }), "config", &mut found);
            assert_eq!(found, []);
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_path_and_the_nearest_one() {
        let schema = json!({ "type": "object", "additionalProperties": false, "properties": { "models": { "type": "array",
            "items": { "$ref": "#/$defs/Model" } } }, "$defs": { "Model": { "additionalProperties": false, "required": ["path"],
            "properties": { "path": {}, "threads": {} } } } });
        let mut found = Vec::new();
        walk(&schema, &schema, &json!({ "models": [{ "path": "x", "thread": 1 }] }), "config", &mut found);
        assert_eq!(found, [("unknown key `config.models[0].thread`".into(), Some("config.models[0].threads".into()))]);
        found.clear();
        walk(&schema, &schema, &json!({ "models": [{}] }), "config", &mut found);
        assert_eq!(found, [("`config.models[0].path` is missing".into(), None)]);
    }
}
