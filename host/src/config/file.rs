//! A TOML file as values, each with the place where it stands.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Number, Value};
use toml_edit::{Document, Item, Key, TableLike};

use super::problem::{Place, Problem};

/// The steps from the root to a value: keys, and the positions of array items.
pub(super) type KeyPath = Vec<String>;

/// A parsed file.
pub(super) struct File {
    pub path: PathBuf,
    pub values: Map<String, Value>,
    text: String,
    spans: HashMap<KeyPath, Range<usize>>,
}

impl File {
    /// Reads and parses `path`; `shown` is its name in messages.
    pub fn read(path: &Path, shown: &Path) -> Result<Self, Box<Problem>> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            let reason = match error.kind() {
                std::io::ErrorKind::NotFound => "it does not exist".into(),
                std::io::ErrorKind::IsADirectory => "it is a folder".into(),
                std::io::ErrorKind::InvalidData => "it is not UTF-8 text".into(),
                _ => error.to_string(),
            };
            Problem::new("C100", Place::Default, format!("cannot read the configuration file {}: {reason}", shown.display()))
                .fix("name an existing file with --config, or run in the folder that holds plugins.toml")
        })?;
        Self::parse(text, shown)
    }

    pub fn parse(text: String, shown: &Path) -> Result<Self, Box<Problem>> {
        let mut file = Self { path: shown.into(), values: Map::new(), text, spans: HashMap::new() };
        let document = Document::parse(file.text.clone()).map_err(|error| {
            let span = error.span().unwrap_or_default();
            Problem::new(
                "C101",
                file.place_of(&span),
                format!("{} is not TOML: {}", shown.display(), error.message().replace('\n', ", ")),
            )
        })?;
        let mut path = KeyPath::new();
        file.values = file.table(document.as_table(), &mut path)?;
        Ok(file)
    }

    /// Where the key at `path` stands, or the nearest table around it that is written down.
    pub fn place(&self, path: &[String]) -> Place {
        let span = (0..=path.len()).rev().find_map(|length| self.spans.get(&path[..length]));
        self.place_of(span.unwrap_or(&(0..0)))
    }

    fn place_of(&self, span: &Range<usize>) -> Place {
        let mut offset = span.start.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        let start = self.text[..offset].rfind('\n').map_or(0, |newline| newline + 1);
        Place::File {
            file: self.path.clone(),
            line: self.text[..offset].matches('\n').count() + 1,
            column: self.text[start..offset].chars().count() + 1,
            text: self.text[start..].lines().next().unwrap_or_default().to_string(),
        }
    }

    fn table(&mut self, table: &dyn TableLike, path: &mut KeyPath) -> Result<Map<String, Value>, Box<Problem>> {
        let mut values = Map::new();
        for (name, item) in table.iter() {
            path.push(name.to_string());
            // A header such as [gateway] has its span on the table, a dotted or plain key has it on the key.
            let header =
                item.as_table().filter(|table| !table.is_dotted() && !table.is_implicit()).and_then(|table| table.span());
            if let Some(span) = header.or_else(|| table.key(name).and_then(Key::span)).or_else(|| item.span()) {
                self.spans.insert(path.clone(), span);
            }
            values.insert(name.to_string(), self.value(item, path)?);
            path.pop();
        }
        Ok(values)
    }

    fn items<'a>(
        &mut self,
        items: impl Iterator<Item = (Option<Range<usize>>, Item)> + 'a,
        path: &mut KeyPath,
    ) -> Result<Value, Box<Problem>> {
        let mut values = Vec::new();
        for (index, (span, item)) in items.enumerate() {
            path.push(index.to_string());
            if let Some(span) = span {
                self.spans.insert(path.clone(), span);
            }
            values.push(self.value(&item, path)?);
            path.pop();
        }
        Ok(Value::Array(values))
    }

    fn value(&mut self, item: &Item, path: &mut KeyPath) -> Result<Value, Box<Problem>> {
        if let Some(table) = item.as_table_like() {
            return Ok(Value::Object(self.table(table, path)?));
        }
        match item {
            Item::ArrayOfTables(tables) => {
                self.items(tables.iter().map(|table| (table.span(), Item::Table(table.clone()))), path)
            }
            Item::Value(toml_edit::Value::Array(array)) => {
                self.items(array.iter().map(|value| (value.span(), Item::Value(value.clone()))), path)
            }
            Item::Value(value) => scalar(value).ok_or_else(|| {
                let key = path.join(".");
                let message = format!("`{key}` is not a number that can be used");
                Box::new(Problem::new("C103", self.place(path), message).key(key))
            }),
            _ => Ok(Value::Null),
        }
    }
}

/// A plain value. `None` for `nan` and `inf`.
fn scalar(value: &toml_edit::Value) -> Option<Value> {
    match value {
        toml_edit::Value::String(text) => Some(text.value().as_str().into()),
        toml_edit::Value::Integer(number) => Some((*number.value()).into()),
        toml_edit::Value::Float(number) => Number::from_f64(*number.value()).map(Value::Number),
        toml_edit::Value::Boolean(truth) => Some((*truth.value()).into()),
        toml_edit::Value::Datetime(time) => Some(time.value().to_string().into()),
        toml_edit::Value::Array(_) | toml_edit::Value::InlineTable(_) => None,
    }
}

/// Reads the text of a flag or variable as a TOML value.
pub(super) fn literal(text: &str) -> Option<Value> {
    let file = File::parse(format!("value = {text}"), Path::new("")).ok()?;
    // Anything after the value, such as a second line, would be a second key.
    if file.values.len() == 1 { file.values.get("value").cloned() } else { None }
}
