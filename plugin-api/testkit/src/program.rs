//! The test program that a plugin's `tests/conformance.rs` is: the parent of the checks, and each check's process.
//!
//! It understands what `cargo test` and cargo-nextest say to a test program.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::SystemTime;

use crate::report::Report;
use crate::{Options, Subject, TIMEOUT, child, harness, run, run_one};

/// Leads to one check. Not for people.
const CHECK_ONE: &str = "--check-one";

const HELP: &str = "\
Runs the conformance suite on the built library.

usage: conformance [NAME...] [--exact] [--skip NAME] [--list] [--json]

  NAME         run the checks whose names contain this; with --exact, the check of this name
  --skip NAME  leave out the checks whose names contain this
  --list       print the names of the checks
  --json       print the report as JSON";

/// What the program was asked to do.
#[derive(Debug, Default, PartialEq)]
struct Asked {
    check_one: Option<String>,
    names: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
    ignored: bool,
    json: bool,
    help: bool,
}

impl Asked {
    fn read(arguments: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut asked = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let mut value = |of: &str| arguments.next().ok_or_else(|| format!("{of} takes a value"));
            match argument.as_str() {
                CHECK_ONE => asked.check_one = Some(value(CHECK_ONE)?),
                "--exact" => asked.exact = true,
                "--list" => asked.list = true,
                "--ignored" => asked.ignored = true,
                "--json" => asked.json = true,
                "-h" | "--help" => asked.help = true,
                "--skip" => asked.skip.push(value("--skip")?),
                // Said to every test program. Checks run one after the other and their output is in the report.
                "--nocapture" | "--no-capture" | "--show-output" | "-q" | "--quiet" | "--include-ignored" => {}
                "--format" | "--test-threads" | "--color" | "-Z" => drop(value(&argument)?),
                other if ["--format=", "--test-threads=", "--color="].iter().any(|known| other.starts_with(known)) => {}
                other if other.starts_with('-') => return Err(format!("{other} is not an option of this program")),
                name => asked.names.push(name.to_owned()),
            }
        }
        Ok(asked)
    }

    fn wants(&self, check: &str) -> bool {
        let fits = |name: &String| if self.exact { check == name } else { check.contains(name.as_str()) };
        (self.names.is_empty() || self.names.iter().any(fits)) && !self.skip.iter().any(fits)
    }
}

/// The whole of a plugin's `tests/conformance.rs`.
pub fn main(subject: Subject) -> ExitCode {
    let asked = match Asked::read(std::env::args().skip(1)) {
        Ok(asked) => asked,
        Err(wrong) => {
            eprintln!("{wrong}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    if asked.help {
        println!("{HELP}");
        return ExitCode::SUCCESS;
    }
    if let Some(name) = &asked.check_one {
        child::report(&run_one(&subject, name));
        return ExitCode::SUCCESS;
    }
    let only: Vec<String> = applicable(&subject).filter(|name| asked.wants(name)).map(str::to_owned).collect();
    if asked.list {
        // No check is an ignored test; asked for those alone, there are none.
        only.iter().filter(|_| !asked.ignored).for_each(|name| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if only.is_empty() || asked.ignored {
        println!("no check was asked for");
        return ExitCode::SUCCESS;
    }

    let this_program = |_: &Subject, name: &str| {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([CHECK_ONE, name]);
        Ok(command)
    };
    if !asked.json {
        println!("\n{}", subject.library.display());
    }
    let report = run(
        &subject,
        &Options {
            only: &only,
            timeout: TIMEOUT,
            child: &this_program,
            watch: &|ran| {
                if !asked.json {
                    println!("{ran}");
                }
            },
        },
    );
    match report {
        Ok(report) => finish(&report, asked.json),
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(2)
        }
    }
}

fn finish(report: &Report, json: bool) -> ExitCode {
    if json {
        println!("{}", serde_json::to_string_pretty(report).expect("a report is made of strings and numbers"));
    } else {
        println!("{}\n", report.summary());
    }
    if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The checks of the kinds that the library provides; all, where it does not tell.
fn applicable(subject: &Subject) -> impl Iterator<Item = &'static str> {
    let provides: Option<Vec<String>> = harness::manifest(&subject.library)
        .ok()
        .map(|manifest| manifest.provides.into_iter().map(|provided| provided.kind).collect());
    crate::checks()
        .iter()
        .filter(move |check| match (check.kind, &provides) {
            (Some(kind), Some(provides)) => provides.iter().any(|provided| provided == kind),
            _ => true,
        })
        .map(|check| check.name)
}

/// The library that cargo has built for the running test program: `built_library("inference_echo")`.
///
/// Cargo puts it into the folder above the test program's, and a fresher copy beside the program where only tests were built.
///
/// # Panics
/// When there is no such library.
pub fn built_library(name: &str) -> PathBuf {
    let program = std::env::current_exe().expect("a running program has a path");
    let file = format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let age = |path: &PathBuf| path.metadata().and_then(|file| file.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    let found = program.ancestors().skip(1).take(2).map(|folder| folder.join(&file)).filter(|path| path.exists()).max_by_key(age);
    found.unwrap_or_else(|| panic!("{file} lies neither beside {} nor one folder above: build it first", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> Asked {
        Asked::read(arguments.iter().map(|&argument| argument.to_owned())).unwrap()
    }

    #[test]
    fn nextest_lists_and_then_runs_each_check_by_its_exact_name() {
        assert!(read(&["--list", "--format", "terse"]).list);
        assert!(read(&["--list", "--format", "terse", "--ignored"]).ignored);
        let asked = read(&["delete", "--exact", "--nocapture"]);
        assert!(asked.wants("delete") && !asked.wants("delete-more"));
    }

    #[test]
    fn cargo_test_filters_by_parts_of_names() {
        let asked = read(&["cancel", "--skip", "after", "--test-threads=1", "--color", "never", "-q"]);
        assert!(asked.wants("cancel-before") && !asked.wants("cancel-after") && !asked.wants("load"));
        assert!(read(&[]).wants("load"));
    }

    #[test]
    fn unknown_options_are_errors() {
        assert!(Asked::read(["--bench".to_owned()]).unwrap_err().contains("--bench"));
        assert!(Asked::read(["--skip".to_owned()]).is_err());
    }
}
