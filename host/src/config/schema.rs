//! What may stand in the file, read from the schema of [`Config`], and the check of values against it.

use std::net::SocketAddr;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::problem::{Place, Problem};
use super::{Bytes, Config};

static SCHEMA: LazyLock<Value> = LazyLock::new(|| schemars::schema_for!(Config).to_value());

/// A node of the schema.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schema(&'static Value);

/// The documentation of a key.
#[derive(Debug, PartialEq)]
pub(super) struct Doc {
    pub meaning: String,
    pub default: Option<String>,
    pub example: Option<String>,
}

impl Schema {
    pub fn root() -> Self {
        Self(&SCHEMA)
    }

    /// The definition that a `$ref` names, or the node itself.
    fn target(self) -> Self {
        match self.0["$ref"].as_str().and_then(|name| SCHEMA.pointer(name.trim_start_matches('#'))) {
            Some(target) => Self(target),
            None => self,
        }
    }

    pub fn properties(self) -> Option<&'static Map<String, Value>> {
        self.target().0["properties"].as_object()
    }

    pub fn property(self, name: &str) -> Option<Self> {
        self.properties()?.get(name).map(Schema)
    }

    pub fn items(self) -> Option<Self> {
        self.target().0.get("items").map(Schema)
    }

    /// Whether any key may stand here: a plugin's `config` table.
    pub fn is_open(self) -> bool {
        self.target().0["additionalProperties"] == Value::Bool(true)
    }

    pub fn accepts(self, kind: &str) -> bool {
        match &self.target().0["type"] {
            Value::String(only) => only == kind,
            Value::Array(several) => several.iter().any(|one| one == kind),
            _ => false,
        }
    }

    pub fn required(self) -> impl Iterator<Item = &'static str> {
        self.target().0["required"].as_array().into_iter().flatten().filter_map(Value::as_str)
    }

    fn format(self) -> &'static str {
        self.target().0["format"].as_str().unwrap_or_default()
    }

    fn choices(self) -> Vec<&'static str> {
        self.target().0["enum"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
    }

    /// What the doc comment of the field says. A field's own comment wins over the one of its type.
    pub fn doc(self) -> Doc {
        let text = self.0["description"].as_str().or_else(|| self.target().0["description"].as_str()).unwrap_or_default();
        let line = |label: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(label));
            line.map(|rest| rest.trim().trim_end_matches('.').to_string())
        };
        let meaning: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with("Default:") && !line.starts_with("Example:"))
            .collect();
        Doc {
            meaning: meaning.join(" "),
            default: line("Default:"),
            example: line("Example:").map(|example| example.trim_matches('`').to_string()),
        }
    }

    /// The type in words.
    pub fn expects(self) -> String {
        let choices = self.choices();
        if !choices.is_empty() {
            return format!("one of {}", choices.iter().map(|choice| format!("\"{choice}\"")).collect::<Vec<_>>().join(", "));
        }
        match self.format() {
            "bytes" => "a size: a number of bytes, or text such as \"512MiB\"",
            "address" => "an address and a port as text",
            _ if self.accepts("integer") => "a whole number",
            _ if self.accepts("boolean") => "true or false",
            _ if self.accepts("string") => "text in quotes",
            _ if self.accepts("array") => "a list in square brackets",
            _ => "a table",
        }
        .into()
    }
}

/// Holds values against the schema and gathers everything that is wrong.
pub(super) struct Check<'a> {
    /// The place of the key at a path.
    pub place: &'a dyn Fn(&[String]) -> Place,
    /// The id of the nth plugin, for messages.
    pub plugin_id: &'a dyn Fn(&str) -> Option<String>,
    pub problems: Vec<Problem>,
}

impl Check<'_> {
    /// Checks the value at `path`, and everything in it.
    pub fn value(&mut self, path: &mut Vec<String>, value: &Value, schema: Schema) {
        if schema.is_open() && value.is_object() {
            return;
        }
        match value {
            Value::Object(table) if schema.properties().is_some() => self.table(path, table, schema),
            Value::Array(items) if schema.accepts("array") => {
                let Some(of) = schema.items() else { return };
                for (index, item) in items.iter().enumerate() {
                    path.push(index.to_string());
                    self.value(path, item, of);
                    path.pop();
                }
            }
            // Only a float with a whole value is near enough to an integer to deserve a word of its own; both are refused.
            Value::Number(number) if number.is_f64() || !schema.accepts("integer") => self.wrong_type(path, value, schema),
            Value::Number(number) => {
                let number = number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from)).unwrap_or_default();
                self.range(path, number, schema);
            }
            Value::Bool(_) if schema.accepts("boolean") => {}
            Value::String(text) if schema.accepts("string") => self.text(path, text, schema),
            _ => self.wrong_type(path, value, schema),
        }
    }

    fn table(&mut self, path: &mut Vec<String>, table: &Map<String, Value>, schema: Schema) {
        for (name, value) in table {
            path.push(name.clone());
            match schema.property(name) {
                Some(inner) => self.value(path, value, inner),
                None => self.problems.push(self.unknown(path, schema)),
            }
            path.pop();
        }
        for name in schema.required().filter(|name| !table.contains_key(*name)) {
            let problem = Problem::new("C105", (self.place)(path), format!("{} lacks `{name}`", self.name_of_table(path)));
            let example = schema.property(name).and_then(|field| field.doc().example);
            let problem = problem.key(join(path, name));
            self.problems.push(match example {
                Some(example) => problem.fix(format!("add a line such as `{example}`")),
                None => problem,
            });
        }
    }

    /// The problem of a key that is not known where it stands.
    pub fn unknown(&self, path: &[String], within: Schema) -> Problem {
        let (name, table) = path.split_last().map(|(name, table)| (name.as_str(), table)).unwrap_or_default();
        let problem = Problem::new("C102", (self.place)(path), format!("unknown key `{name}` in {}", self.name_of_table(table)))
            .key(path.join("."));
        let known: Vec<&str> = within.properties().into_iter().flatten().map(|(known, _)| known.as_str()).collect();
        if let Some(nearest) = nearest(name, known.iter().copied()) {
            let mut problem = problem.fix(format!("write `{nearest}` instead of `{name}`"));
            problem.nearest = Some(nearest.into());
            return problem;
        }
        let problem = problem.note("known keys", known.join(", "));
        match home_of(name) {
            Some(home) => problem.fix(format!("`{name}` belongs in [{home}]")),
            None => problem.fix("remove the key"),
        }
    }

    fn wrong_type(&mut self, path: &[String], value: &Value, schema: Schema) {
        let mut problem = self
            .about("C103", path, format!("{} must be {}", self.name_of_key(path), schema.expects()))
            .note("found", found(value));
        if path.len() == 1 && path[0] == "plugin" {
            problem = problem.fix("start each plugin with a line [[plugin]]");
        } else if schema.properties().is_some() {
            problem = problem.fix(format!("write it as a table: [{}]", path.join(".")));
        } else if let Some(example) = schema.doc().example {
            problem = problem.fix(format!("write something like `{example}`"));
        }
        self.problems.push(problem);
    }

    fn range(&mut self, path: &[String], number: i128, schema: Schema) {
        let (low, high) = match schema.format() {
            "int32" => (i128::from(i32::MIN), i128::from(i32::MAX)),
            "uint32" => (0, i128::from(u32::MAX)),
            _ => (0, i128::from(i64::MAX)),
        };
        let low = schema.target().0["minimum"].as_i64().map_or(low, i128::from);
        if number < low {
            let low = if schema.format() == "bytes" { Bytes(low as u64).to_string() } else { low.to_string() };
            let problem = self.about("C104", path, format!("{} must be at least {low}", self.name_of_key(path)));
            self.problems.push(problem.note("found", number.to_string()));
        } else if number > high {
            let problem = self.about("C104", path, format!("{} must be at most {high}", self.name_of_key(path)));
            self.problems.push(problem.note("found", number.to_string()));
        }
    }

    fn text(&mut self, path: &[String], text: &str, schema: Schema) {
        let choices = schema.choices();
        let verdict = match schema.format() {
            _ if !choices.is_empty() => choice(text, &choices),
            "bytes" => match text.parse::<Bytes>() {
                Ok(Bytes(bytes)) => return self.range(path, i128::from(bytes), schema),
                Err(reason) => Err((reason, None)),
            },
            "address" => address(text),
            "log-filter" => log_filter(text),
            "plugin-id" => plugin_id(text),
            "public-key" => public_key(text),
            "origin" => origin(text),
            "account" => account(text),
            _ if text.is_empty() => Err(("it is empty".into(), None)),
            _ => Ok(()),
        };
        if let Err((reason, fix)) = verdict {
            let problem = self.about("C104", path, format!("{} cannot be \"{text}\": {reason}", self.name_of_key(path)));
            let fix = fix.or_else(|| schema.doc().example.map(|example| format!("write something like `{example}`")));
            self.problems.push(match fix {
                Some(fix) => problem.fix(fix),
                None => problem,
            });
        }
    }

    fn about(&self, code: &'static str, path: &[String], message: String) -> Problem {
        Problem::new(code, (self.place)(path), message).key(path.join("."))
    }

    /// `gateway.listen`, or `rank` of [[plugin]] 2 (id `echo`).
    fn name_of_key(&self, path: &[String]) -> String {
        match path {
            [list, _, rest @ ..] if list == "plugin" && !rest.is_empty() => {
                format!("`{}` of {}", rest.join("."), self.name_of_table(&path[..2]))
            }
            path => format!("`{}`", path.join(".")),
        }
    }

    fn name_of_table(&self, path: &[String]) -> String {
        match path {
            [] => "the file's top level".into(),
            [list, entry] if list == "plugin" => {
                let id = (self.plugin_id)(entry).map_or(String::new(), |id| format!(" (id `{id}`)"));
                match entry.parse::<usize>() {
                    Ok(index) => format!("[[plugin]] {}{id}", index + 1),
                    Err(_) => format!("plugin `{entry}`"),
                }
            }
            [list, _, rest @ ..] if list == "plugin" => format!("`{}` of {}", rest.join("."), self.name_of_table(&path[..2])),
            path => format!("[{}]", path.join(".")),
        }
    }
}

fn join(path: &[String], name: &str) -> String {
    path.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join(".")
}

/// The known name that `name` was probably meant to be.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_ascii_lowercase().replace('-', "_");
    let name = plain(name);
    known
        .map(|known| (strsim::damerau_levenshtein(&name, &plain(known)), known))
        .filter(|(distance, known)| {
            // A name cut short or drawn out, such as `timeout` for `start_timeout_ms`, is far away in letters and still meant.
            let part = name.len() >= 4 && (plain(known).contains(&name) || name.contains(&plain(known)));
            *distance <= known.len().max(name.len()) / 3 || part
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}

/// The section that knows a key of this name.
fn home_of(name: &str) -> Option<&'static str> {
    Schema::root()
        .properties()?
        .iter()
        .find(|(_, section)| Schema(section).property(name).is_some())
        .map(|(section, _)| section.as_str())
}

fn found(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the text \"{text}\""),
        Value::Object(_) => "a table".into(),
        Value::Array(_) => "a list".into(),
        Value::Null => "nothing".into(),
        other => other.to_string(),
    }
}

type Verdict = Result<(), (String, Option<String>)>;

fn choice(text: &str, choices: &[&'static str]) -> Verdict {
    if choices.contains(&text) {
        return Ok(());
    }
    let list = choices.iter().map(|choice| format!("\"{choice}\"")).collect::<Vec<_>>().join(", ");
    let fix = nearest(text, choices.iter().copied()).map(|nearest| format!("write \"{nearest}\""));
    Err((format!("it is not one of {list}"), fix))
}

fn address(text: &str) -> Verdict {
    if text.parse::<SocketAddr>().is_ok() {
        return Ok(());
    }
    let suggestion = match text.rsplit_once(':') {
        None => text.parse::<u16>().ok().map(|port| format!("127.0.0.1:{port}")),
        Some((host, port)) => port.parse::<u16>().ok().and_then(|port| match host {
            "" | "*" => Some(format!("0.0.0.0:{port}")),
            "localhost" => Some(format!("127.0.0.1:{port}")),
            _ => None,
        }),
    };
    Err(("it is not an IP address with a port".into(), suggestion.map(|address| format!("write \"{address}\""))))
}

fn log_filter(text: &str) -> Verdict {
    const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
    let is_level = |text: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(text));
    for part in text.split(',').map(str::trim) {
        // tracing takes a bare word that is no level for the name of a target, and a misspelt level would log nothing at all.
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level.trim());
        if !is_level(level) {
            let fix = nearest(level, LEVELS.into_iter()).map(|near| format!("write `{near}` instead of `{level}`"));
            return Err((format!("`{level}` is not a level; levels are {}", LEVELS.join(", ")), fix));
        }
    }
    tracing_subscriber::EnvFilter::builder().parse(text).map(drop).map_err(|error| (error.to_string(), None))
}

fn plugin_id(text: &str) -> Verdict {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !text.is_empty() && text.len() <= 64 && text.chars().all(plain) && !text.starts_with('-') && !text.ends_with('-') {
        return Ok(());
    }
    let better: String = text.to_ascii_lowercase().chars().map(|c| if plain(c) { c } else { '-' }).take(64).collect();
    let better = better.trim_matches('-');
    let fix = (!better.is_empty()).then(|| format!("write \"{better}\""));
    Err(("an id is 1 to 64 lower-case letters, digits and `-` between them".into(), fix))
}

fn account(text: &str) -> Verdict {
    let digits = text.strip_prefix("0x").unwrap_or_default();
    match digits.len() == 40 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        true => Ok(()),
        false => Err(("an account is `0x` and 40 hexadecimal digits".into(), None)),
    }
}

fn public_key(text: &str) -> Verdict {
    let digits = text.strip_prefix("ed25519:").ok_or_else(|| ("it does not start with `ed25519:`".to_string(), None))?;
    if digits.len() != 64 || !digits.chars().all(|c| c.is_ascii_hexdigit()) {
        return Err((format!("64 hexadecimal digits must follow `ed25519:`, here are {} characters", digits.len()), None));
    }
    Ok(())
}

fn origin(text: &str) -> Verdict {
    if text == "*" {
        return Ok(());
    }
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    match rest {
        Some(host) if !host.is_empty() && !host.contains(['/', '?', '#', ' ']) => Ok(()),
        Some(host) if host.contains('/') => {
            let bare = text.len() - host.len() + host.find('/').unwrap_or(0);
            Err(("an origin ends after the host and port".into(), Some(format!("write \"{}\"", &text[..bare]))))
        }
        _ => Err(("an origin starts with http:// or https://, followed by a host".into(), None)),
    }
}
