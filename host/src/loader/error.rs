//! What stopped a plugin from being loaded, told so that it can be put right.

use std::fmt;

use serde::Serialize;

/// The pipeline's steps, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    Find,
    Read,
    Resolve,
    Trust,
    Probe,
    Configure,
    Connect,
}

impl Step {
    pub const ALL: [Step; 7] = [Step::Find, Step::Read, Step::Resolve, Step::Trust, Step::Probe, Step::Configure, Step::Connect];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Find => "find the file",
            Step::Read => "read its manifest",
            Step::Resolve => "resolve its versions",
            Step::Trust => "trust it",
            Step::Probe => "probe it in a child process",
            Step::Configure => "check its configuration",
            Step::Connect => "start it",
        })
    }
}

/// A step that failed.
///
/// `P1xx` find and read, `P2xx` versions, `P3xx` trust, `P4xx` probe, `P5xx` configuration, `P6xx` start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LoadError {
    pub step: Step,
    pub code: &'static str,
    /// One line: what is wrong.
    pub message: String,
    /// Further facts, as label and text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<(String, String)>,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl LoadError {
    pub fn new(step: Step, code: &'static str, message: impl Into<String>) -> Self {
        Self { step, code, message: message.into(), notes: Vec::new(), fix: None }
    }

    pub fn note(mut self, label: &str, text: impl Into<String>) -> Self {
        self.notes.push((label.into(), text.into()));
        self
    }

    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]: {}", self.code, self.message)?;
        let fix = self.fix.iter().map(|fix| ("fix", fix.as_str()));
        let rows: Vec<(&str, &str)> = self.notes.iter().map(|(label, text)| (label.as_str(), text.as_str())).chain(fix).collect();
        let width = rows.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
        for (label, text) in rows {
            write!(f, "\n  {label:<width$}  {text}")?;
        }
        Ok(())
    }
}

impl std::error::Error for LoadError {}
