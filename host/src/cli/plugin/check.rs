//! `fabstir-node plugin check`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use clap::Args;
use fabstir_plugin_testkit::{self as testkit, Options, Subject};
use serde_json::json;

use super::super::{Failure, print};

/// Holds a plugin against the conformance suite.
///
/// Every check runs in a process of its own and ends as pass, warn, fail, crash or skip with the reason. The exit code is 1 when
/// one fails or crashes. This runs the plugin: check only what you trust.
#[derive(Debug, Args)]
pub struct Check {
    /// The library.
    #[arg(required_unless_present = "list")]
    file: Option<PathBuf>,

    /// Runs only the check of this name; may be repeated.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,

    /// The plugin's settings as JSON, where it does not start without any.
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = settings)]
    config: serde_json::Value,

    /// The time that one check may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = testkit::TIMEOUT.as_secs(), value_parser = seconds())]
    timeout: u64,

    /// Prints every check with what it promises, and runs none.
    #[arg(long)]
    list: bool,

    /// Runs one check in this process and reports to the process that started it.
    #[arg(long, hide = true, value_name = "NAME")]
    child: Option<String>,
}

fn seconds() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..)
}

fn settings(text: &str) -> Result<serde_json::Value, String> {
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
    if value.is_object() { Ok(value) } else { Err("write a JSON object, as in {\"delay_ms\": 5}".into()) }
}

impl Check {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        if self.list {
            return list(json);
        }
        let file = self.file.unwrap_or_default();
        let library = std::path::absolute(&file).unwrap_or(file);
        let subject = Subject { library, config: self.config };
        if let Some(name) = &self.child {
            testkit::report_to_parent(&testkit::run_one(&subject, name));
            return Ok(());
        }
        // What cannot be a plugin is told once, not by every check.
        crate::loader::inspect(&subject.library)?;
        let timeout = self.timeout.to_string();
        let child = |subject: &Subject, name: &str| {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["plugin", "check", "--child", name, "--timeout", &timeout, "--config", &subject.config.to_string()]);
            command.arg(&subject.library);
            Ok(command)
        };
        let watch = |ran: &testkit::Ran| {
            if !json {
                // A closed output shows when the summary is written.
                let _ = writeln!(io::stdout(), "{ran}");
            }
        };
        let options = Options { only: &self.only, timeout: Duration::from_secs(self.timeout), child: &child, watch: &watch };
        let report =
            testkit::run(&subject, &options).map_err(|error| Failure::new(Failure::USAGE, "usage", format!("{error:#}")))?;
        print(json, &json!({ "good": report.is_good(), "library": report.library, "checks": report.checks }), report.summary())?;
        match report.is_good() {
            true => Ok(()),
            false => Err(Failure::silent()),
        }
    }
}

fn list(json: bool) -> Result<(), Failure> {
    let checks: Vec<_> = testkit::checks()
        .iter()
        .map(|check| json!({ "name": check.name, "kind": check.kind, "promise": check.promise }))
        .collect();
    let rows: Vec<[String; 3]> = testkit::checks()
        .iter()
        .map(|check| [check.name.to_string(), check.kind.unwrap_or("all").to_string(), check.promise.to_string()])
        .collect();
    Ok(print(json, &json!({ "checks": checks }), super::super::table(&rows))?)
}
