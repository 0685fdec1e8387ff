//! A request's parameters, read strictly: a key is known, refused by name, or unknown with the nearest known one in the error.

use std::cell::Cell;
use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::error::ApiError;

/// The top level of a JSON object. Values stay text until they are taken: nothing is built that nobody asked for.
#[derive(Debug)]
pub(super) struct Fields<'a>(BTreeMap<String, &'a RawValue>);

impl<'a> Fields<'a> {
    /// Reads a body in which only `known` keys may occur.
    pub fn parse(body: &'a [u8], known: &[&[&str]]) -> Result<Self, ApiError> {
        let found = Cell::new(None);
        let mut json = serde_json::Deserializer::from_slice(body);
        let fields = Keys { known, wrong: &found }.deserialize(&mut json).and_then(|fields| json.end().map(|()| fields));
        match (fields, found.into_inner()) {
            (Ok(fields), _) => Ok(Self(fields)),
            (Err(_), Some(Wrong::Unknown(key))) => Err(unknown(key, known)),
            (Err(_), Some(Wrong::Twice(key))) => {
                let message = format!("`{key}` is given twice");
                Err(ApiError::invalid(key, message))
            }
            (Err(error), None) => {
                let place = format!("line {} column {}", error.line(), error.column());
                Err(ApiError::not_json(format!("the body is not a JSON object: {} at {place}", without_place(&error))))
            }
        }
    }

    /// The value of a key; `None` when it is absent or null.
    pub fn take<T: Deserialize<'a>>(&mut self, key: &'static str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.0.remove(key).filter(|raw| raw.get() != "null") else { return Ok(None) };
        let mut json = serde_json::Deserializer::from_str(raw.get());
        serde_path_to_error::deserialize(&mut json).map(Some).map_err(|error| {
            let path = match error.path().to_string() {
                path if path == "." => key.to_owned(),
                path if path.starts_with('[') => format!("{key}{path}"),
                path => format!("{key}.{path}"),
            };
            let message = format!("`{path}`: {}", without_place(error.inner()));
            ApiError::invalid(path, message)
        })
    }

    pub fn require<T: Deserialize<'a>>(&mut self, key: &'static str) -> Result<T, ApiError> {
        self.take(key)?.ok_or_else(|| ApiError::missing(key))
    }

    /// A number within bounds.
    pub fn number(&mut self, key: &'static str, least: f32, most: f32) -> Result<Option<f32>, ApiError> {
        match self.take::<f64>(key)? {
            Some(number) if !(f64::from(least)..=f64::from(most)).contains(&number) => {
                Err(ApiError::invalid(key, format!("`{key}` must lie between {least} and {most}, and is {number}")))
            }
            number => Ok(number.map(|number| number as f32)),
        }
    }

    /// A key that may be present with one of these values, given as JSON text, or null, and with no other.
    pub fn only(&mut self, key: &'static str, allowed: &[&str], otherwise: &str) -> Result<(), ApiError> {
        match self.0.remove(key) {
            Some(raw) if raw.get() != "null" && !allowed.contains(&raw.get()) => {
                Err(ApiError::unsupported(key, format!("`{key}`: {otherwise}")))
            }
            _ => Ok(()),
        }
    }
}

enum Wrong {
    Unknown(String),
    Twice(String),
}

/// Reads an object's keys and stops at the first that is wrong, so that a body of a million keys costs no more than its bytes.
struct Keys<'k> {
    known: &'k [&'k [&'k str]],
    wrong: &'k Cell<Option<Wrong>>,
}

impl<'a> DeserializeSeed<'a> for Keys<'_> {
    type Value = BTreeMap<String, &'a RawValue>;

    fn deserialize<D: Deserializer<'a>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for Keys<'_> {
    type Value = BTreeMap<String, &'a RawValue>;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            let wrong = match () {
                () if fields.contains_key(&key) => Wrong::Twice(key),
                () if !self.known.iter().any(|known| known.contains(&key.as_str())) => Wrong::Unknown(key),
                () => {
                    fields.insert(key, map.next_value()?);
                    continue;
                }
            };
            self.wrong.set(Some(wrong));
            return Err(serde::de::Error::custom("a wrong key"));
        }
        Ok(fields)
    }
}

fn unknown(key: String, known: &[&[&str]]) -> ApiError {
    // A key of any length comes back in the answer: a few words of it are enough.
    let key: String = key.chars().take(64).collect();
    let nearest = known
        .iter()
        .copied()
        .flatten()
        .map(|known| (strsim::damerau_levenshtein(&key, known), *known))
        .min()
        .filter(|(distance, known)| *distance <= 1 + known.len() / 3);
    let hint = nearest.map(|(_, known)| format!(": did you mean `{known}`?")).unwrap_or_default();
    let message = format!("unknown parameter `{key}`{hint}");
    ApiError::unknown_parameter(key, message)
}

/// What is wrong, without "at line 1 column 7": within a value that place would mislead.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[&[&str]] = &[&["model", "temperature"], &["messages", "n"]];

    fn message(error: ApiError) -> String {
        let body = error.body();
        format!("{} | {}", body["error"]["param"].as_str().unwrap_or("-"), body["error"]["message"].as_str().expect("a message"))
    }

    fn refusal(body: &str) -> String {
        message(Fields::parse(body.as_bytes(), KNOWN).expect_err("it is wrong"))
    }

    #[test]
    fn what_is_not_json_is_told_with_its_place() {
        assert_eq!(refusal("{\"model\": \n nope}"), "- | the body is not a JSON object: expected ident at line 2 column 3");
        assert_eq!(
            refusal("[1]"),
            "- | the body is not a JSON object: invalid type: sequence, expected an object at line 1 column 0"
        );
        assert_eq!(refusal("{} x"), "- | the body is not a JSON object: trailing characters at line 1 column 4");
        assert_eq!(refusal(""), "- | the body is not a JSON object: EOF while parsing a value at line 1 column 0");
    }

    #[test]
    fn an_unknown_key_comes_with_the_nearest() {
        assert_eq!(refusal(r#"{"temprature": 1}"#), "temprature | unknown parameter `temprature`: did you mean `temperature`?");
        assert_eq!(refusal(r#"{"zzz": 1}"#), "zzz | unknown parameter `zzz`");
        assert_eq!(refusal(r#"{"model": 1, "model": 2}"#), "model | `model` is given twice");
    }

    #[test]
    fn a_wrong_type_names_the_whole_path() {
        #[derive(Debug, Deserialize)]
        #[allow(dead_code)]
        struct Message {
            content: String,
        }
        let mut fields = Fields::parse(br#"{"messages": [{"content": "a"}, {"content": 7}]}"#, KNOWN).expect("an object");
        let error = fields.take::<Vec<Message>>("messages").expect_err("7 is no text");
        assert_eq!(message(error), "messages[1].content | `messages[1].content`: invalid type: integer `7`, expected a string");
    }

    #[test]
    fn null_is_absent_and_numbers_have_bounds() {
        let mut fields = Fields::parse(br#"{"model": null, "temperature": 9, "n": 2}"#, KNOWN).expect("an object");
        assert_eq!(fields.take::<String>("model").expect("no error"), None);
        let error = fields.number("temperature", 0.0, 5.0).expect_err("too hot");
        assert_eq!(message(error), "temperature | `temperature` must lie between 0 and 5, and is 9");
        let error = fields.only("n", &["1"], "one answer at a time").expect_err("two are asked for");
        assert_eq!(message(error), "n | `n`: one answer at a time");
    }
}
