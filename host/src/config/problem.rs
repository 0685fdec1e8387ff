//! What is wrong with a configuration, told so that it can be put right.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "from", rename_all = "kebab-case")]
pub enum Place {
    Default,
    File {
        file: PathBuf,
        /// From 1.
        line: usize,
        /// From 1, in characters.
        column: usize,
        /// The line itself.
        #[serde(skip)]
        text: String,
    },
    /// The variable's name.
    Environment {
        variable: String,
    },
    /// The flag as it was given.
    Flag {
        flag: String,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Default => f.write_str("default"),
            Place::File { file, line, column, .. } => write!(f, "{}:{line}:{column}", file.display()),
            Place::Environment { variable } => write!(f, "environment {variable}"),
            Place::Flag { flag } => write!(f, "flag {flag}"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// `C100` file, `C101` TOML, `C102` unknown key, `C103` wrong type, `C104` wrong value, `C105` missing key, `C106` a name
    /// used twice, `C107` settings that contradict each other.
    pub code: &'static str,
    /// One line: what is wrong.
    pub message: String,
    pub place: Place,
    /// The dotted key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The known key that the unknown one resembles most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nearest: Option<String>,
    /// Further facts, as label and text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<(String, String)>,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Problem {
    pub(super) fn new(code: &'static str, place: Place, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), place, key: None, nearest: None, notes: Vec::new(), fix: None }
    }

    pub(super) fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    pub(super) fn note(mut self, label: &str, text: impl Into<String>) -> Self {
        self.notes.push((label.into(), text.into()));
        self
    }

    pub(super) fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<(String, &str)> = Vec::new();
        let place = self.place.to_string();
        if self.place != Place::Default {
            let text = if let Place::File { text, .. } = &self.place { text.trim() } else { "" };
            rows.push((place, text));
        }
        rows.extend(self.nearest.iter().map(|nearest| ("nearest".to_string(), nearest.as_str())));
        rows.extend(self.notes.iter().map(|(label, text)| (label.clone(), text.as_str())));
        rows.extend(self.fix.iter().map(|fix| ("fix".to_string(), fix.as_str())));
        // A long place would push every other row far to the right.
        let width = rows.iter().map(|(label, _)| label.chars().count()).filter(|width| *width <= 40).max().unwrap_or(0);
        write!(f, "error[{}]: {}", self.code, self.message)?;
        for (label, text) in rows {
            write!(f, "\n  {}", format!("{label:<width$}  {text}").trim_end())?;
        }
        Ok(())
    }
}

/// Everything that is wrong, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            write!(f, "{problem}")?;
        }
        if self.0.len() > 1 {
            write!(f, "\n\n{} errors in the configuration", self.0.len())?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
