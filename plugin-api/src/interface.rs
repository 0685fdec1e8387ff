//! What `#[interface]` makes of a trait.

use std::sync::Arc;

use crate::session::{Incoming, ServeFuture, Session};

/// A kind of plugin, seen from both sides of the boundary. Implemented by `#[interface]` for `dyn Trait`.
pub trait Interface: Send + Sync + 'static {
    /// The kind's name, as in `plugins.toml` and in method names.
    const KIND: &'static str;
    /// `major.minor`. A minor adds optional methods, optional fields and variants; nothing else ever changes within a major.
    const VERSION: &'static str;
    const METHODS: &'static [Method];

    /// The trait itself, on the caller's side.
    fn client(session: Session) -> Arc<Self>;

    /// Decodes a call, makes it and encodes its answer, on the serving side.
    fn serve(target: Arc<Self>, call: Incoming) -> ServeFuture;

    /// Methods, parameters and types as JSON: committed, and compared in a test.
    fn describe() -> Description;
}

/// What [`Interface::describe`] returns.
pub type Description = serde_json::Value;

/// One method of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Method {
    pub name: &'static str,
    /// Whether every implementation provides it.
    pub required: bool,
}

#[doc(hidden)]
pub fn generator() -> schemars::SchemaGenerator {
    schemars::generate::SchemaSettings::draft2020_12()
        .with(|settings| settings.definitions_path = "/types".into())
        .into_generator()
}

#[doc(hidden)]
pub fn described(name: Option<&str>, stream: bool, schema: schemars::Schema) -> Description {
    let mut value = serde_json::json!({ "stream": stream, "schema": schema });
    if let Some(name) = name {
        value["name"] = name.into();
    }
    value
}

#[doc(hidden)]
pub fn document(
    kind: &str,
    version: &str,
    methods: Vec<(&str, bool, Vec<Description>, Description)>,
    mut generator: schemars::SchemaGenerator,
) -> Description {
    let methods: serde_json::Map<String, Description> = methods
        .into_iter()
        .map(|(name, required, parameters, returns)| {
            (name.to_owned(), serde_json::json!({ "required": required, "parameters": parameters, "returns": returns }))
        })
        .collect();
    serde_json::json!({ "kind": kind, "version": version, "methods": methods, "types": generator.take_definitions(true) })
}

/// Whether a plugin built against `theirs` works with a node that speaks `ours`: equal majors. What the older side lacks answers
/// `Unimplemented`.
pub fn is_compatible(ours: &str, theirs: &str) -> bool {
    let major = |version: &str| version.split('.').next().and_then(|major| major.parse::<u32>().ok());
    major(ours).is_some() && major(ours) == major(theirs)
}

/// What of `new` is not an addition to `old`, one sentence each. Empty when the change may ship in a minor version.
///
/// Both are results of [`Interface::describe`]. Objects may gain keys (methods, optional fields, types), lists of variants may gain
/// entries, and documentation may change. A field may not become required, nor anything disappear or change its type.
pub fn breaking_changes(old: &serde_json::Value, new: &serde_json::Value) -> Vec<String> {
    let mut found = Vec::new();
    compare("", old, new, &mut found);
    found
}

fn compare(path: &str, old: &serde_json::Value, new: &serde_json::Value, found: &mut Vec<String>) {
    use serde_json::Value;
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            // Below these, keys are names that an interface chose; elsewhere they are words of the schema.
            let names = ["/properties", "/types", "/methods"].iter().any(|end| path.ends_with(end));
            for (key, value) in old {
                if !names && matches!(key.as_str(), "description" | "title" | "doc" | "version" | "default") {
                    continue;
                }
                let path = format!("{path}/{key}");
                match new.get(key) {
                    None => found.push(format!("{path} was removed")),
                    Some(Value::Array(now)) if !names && key == "required" => {
                        if let Value::Array(before) = value {
                            for name in now.iter().filter(|name| !before.contains(name)) {
                                found.push(format!("{path}: {name} became required"));
                            }
                            for name in before.iter().filter(|name| !now.contains(name)) {
                                found.push(format!("{path}: {name} is no longer required, which old readers rely on"));
                            }
                        }
                    }
                    Some(now) => compare(&path, value, now, found),
                }
            }
            for (key, value) in new {
                let requires = !names && key == "required" && value.as_array().is_some_and(|names| !names.is_empty());
                if requires && !old.contains_key(key) {
                    found.push(format!("{path}/required appeared: {value}"));
                }
                let adds_method = path == "/methods" && !old.contains_key(key);
                if adds_method && value.get("required") == Some(&Value::Bool(true)) {
                    found.push(format!("{path}/{key} is a new method that is not optional"));
                }
            }
        }
        (Value::Array(old), Value::Array(new)) => {
            let names = old.iter().chain(new).all(Value::is_string);
            if names {
                for name in old.iter().filter(|name| !new.contains(name)) {
                    found.push(format!("{path}: {name} was removed"));
                }
                return;
            }
            if new.len() < old.len() {
                found.push(format!("{path} lost entries"));
            }
            for (index, (old, new)) in old.iter().zip(new).enumerate() {
                compare(&format!("{path}/{index}"), old, new, found);
            }
        }
        _ if old == new => {}
        _ => found.push(format!("{path} changed from {old} to {new}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn described() -> Value {
        json!({ "kind": "k", "version": "1.0", "methods": { "go": { "required": true, "params": [{ "name": "x", "schema": "X" }] } },
                "types": { "X": { "type": "object", "properties": { "a": { "type": "string" } }, "required": ["a"] } } })
    }

    fn changed(edit: impl FnOnce(&mut Value)) -> Vec<String> {
        let mut new = described();
        edit(&mut new);
        breaking_changes(&described(), &new)
    }

    #[test]
    fn additions_pass() {
        assert_eq!(changed(|new| new["methods"]["stop"] = json!({ "required": false })), [""; 0]);
        assert_eq!(changed(|new| new["types"]["X"]["properties"]["b"] = json!({ "type": "integer" })), [""; 0]);
        assert_eq!(changed(|new| new["version"] = json!("1.1")), [""; 0]);
    }

    #[test]
    fn everything_else_is_refused() {
        assert_eq!(changed(|new| new["methods"] = json!({})), ["/methods/go was removed"]);
        assert_eq!(changed(|new| new["methods"]["stop"] = json!({ "required": true })).len(), 1);
        assert_eq!(changed(|new| new["types"]["X"]["properties"]["a"]["type"] = json!("integer")).len(), 1);
        assert_eq!(changed(|new| new["types"]["X"]["required"] = json!(["a", "b"])).len(), 1);
        assert_eq!(changed(|new| new["methods"]["go"]["params"][0]["name"] = json!("y")).len(), 1);
        let versioned = json!({ "types": { "X": { "properties": { "version": { "type": "string" } } } } });
        let retyped = json!({ "types": { "X": { "properties": { "version": { "type": "integer" } } } } });
        assert_eq!(breaking_changes(&versioned, &retyped).len(), 1);
    }

    #[test]
    fn majors_must_be_equal() {
        assert!(is_compatible("1.0", "1.4") && is_compatible("1.4", "1.0"));
        assert!(!is_compatible("1.0", "2.0") && !is_compatible("1.0", "x"));
    }
}
