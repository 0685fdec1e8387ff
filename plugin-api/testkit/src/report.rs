//! How checks end, for people and for programs.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How one check ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Outcome {
    /// The plugin keeps the promise.
    Pass,
    /// It keeps the promise, but something will bother an operator.
    Warn { reason: String },
    /// It breaks the promise.
    Fail { reason: String },
    /// The process of the check died or did not end in time, so nothing else is known.
    Crash { reason: String },
    /// The check does not apply to the plugin, or the machine lacks what it takes.
    Skip { reason: String },
}

impl Outcome {
    pub fn warn(reason: impl Into<String>) -> Self {
        Self::Warn { reason: reason.into() }
    }

    pub fn fail(reason: impl Into<String>) -> Self {
        Self::Fail { reason: reason.into() }
    }

    pub fn crash(reason: impl Into<String>) -> Self {
        Self::Crash { reason: reason.into() }
    }

    pub fn skip(reason: impl Into<String>) -> Self {
        Self::Skip { reason: reason.into() }
    }

    /// The status as a word.
    pub fn status(&self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Warn { .. } => "warn",
            Self::Fail { .. } => "fail",
            Self::Crash { .. } => "crash",
            Self::Skip { .. } => "skip",
        }
    }

    /// Why, for every status but `Pass`.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Pass => None,
            Self::Warn { reason } | Self::Fail { reason } | Self::Crash { reason } | Self::Skip { reason } => Some(reason),
        }
    }

    /// Whether the plugin conforms as far as this check can tell.
    pub fn is_good(&self) -> bool {
        !matches!(self, Self::Fail { .. } | Self::Crash { .. })
    }
}

/// A check that has been run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ran {
    pub name: String,
    /// In milliseconds, the start of the process included.
    pub took_ms: u64,
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl fmt::Display for Ran {
    /// One row of the table; a reason of several lines is indented below it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {:<5}  {:<38} {:>7} ms", self.outcome.status(), self.name, self.took_ms)?;
        match self.outcome.reason().map(|reason| reason.trim_end().lines().collect::<Vec<_>>()).as_deref() {
            None | Some([]) => Ok(()),
            Some([line]) => write!(f, "  {line}"),
            Some(lines) => lines.iter().try_for_each(|line| write!(f, "\n         {line}")),
        }
    }
}

/// All checks of one library.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub library: PathBuf,
    pub checks: Vec<Ran>,
}

impl Report {
    /// Whether no check failed or crashed.
    pub fn is_good(&self) -> bool {
        self.checks.iter().all(|check| check.outcome.is_good())
    }

    /// How many checks ended how: `31 pass, 1 warn, 9 skip`.
    pub fn summary(&self) -> String {
        let counts = ["pass", "warn", "fail", "crash", "skip"].map(|status| {
            let count = self.checks.iter().filter(|check| check.outcome.status() == status).count();
            (count > 0).then(|| format!("{count} {status}"))
        });
        counts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.library.display())?;
        self.checks.iter().try_for_each(|check| writeln!(f, "{check}"))?;
        write!(f, "{}", self.summary())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let ran = |name: &str, outcome| Ran { name: name.into(), took_ms: 12, outcome };
        let checks = vec![
            ran("load", Outcome::Pass),
            ran("ranges", Outcome::skip("the plugin provides no storage")),
            ran("max-tokens", Outcome::crash("signal 6 (SIGABRT)\nlast words:\nassertion failed")),
        ];
        Report { library: "libx.so".into(), checks }
    }

    #[test]
    fn table_has_a_row_per_check_and_a_sum() {
        let table = "libx.so
  pass   load                                        12 ms
  skip   ranges                                      12 ms  the plugin provides no storage
  crash  max-tokens                                  12 ms
         signal 6 (SIGABRT)
         last words:
         assertion failed
1 pass, 1 crash, 1 skip";
        assert_eq!(report().to_string(), table);
        assert!(!report().is_good());
    }

    #[test]
    fn json_has_status_and_reason_and_reads_back() {
        let json = serde_json::to_string(&report()).unwrap();
        assert!(json.contains(r#"{"name":"load","took_ms":12,"status":"pass"}"#), "{json}");
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report());
    }
}
