//! Every check fails when its promise is broken: held against a plugin that breaks one at a time.
//!
//! What an author cannot break, because the SDK answers for it (unknown methods, garbage frames, deadlines, drain), is not here.

use std::process::{Command, ExitCode};
use std::time::Duration;

use fabstir_plugin_testkit::{Options, Outcome, Report, Subject, built_library, report_to_parent, run, run_one};

/// The fault, the check that must find it, how it ends and what the reason says.
const FAULTS: &[(&str, &str, &str, &str)] = &[
    ("hangs", "declared-methods-work", "crash", "not over after"),
    ("exits", "describe-is-stable", "crash", "exited with 3 without a report"),
    ("aborts", "generate-ends-with-done", "crash", "SIGABRT"),
    ("stalls", "max-tokens", "crash", "not over after"),
    ("panics", "declared-methods-work", "fail", "panicked"),
    ("leaks-thread", "shutdown-leaves-no-thread", "fail", "left 1"),
    ("leaks-memory", "thousand-starts-without-growth", "fail", "memory grew"),
    ("leaks-file", "thousand-starts-without-growth", "fail", "files stayed open"),
    ("leaks-slot", "cancel-during", "fail", "still overloaded"),
    ("piles-up", "slow-consumer-keeps-memory-flat", "fail", "piled up"),
    ("long-vectors", "declared-methods-work", "fail", "not 1"),
    ("forgets-load", "models-and-load", "fail", "not loaded"),
    ("no-done", "generate-ends-with-done", "fail", "without `Done`"),
    ("miscounts", "usage-adds-up", "fail", "the usage says"),
    ("ignores-stop", "stop-strings", "fail", "part of the answer"),
    ("ignores-max-tokens", "max-tokens", "fail", "max_tokens 1"),
    ("ignores-seed", "seed-repeats", "fail", "two answers"),
    ("takes-all", "too-long-is-refused", "fail", "succeeded"),
    ("any-model", "unknown-model-is-not-found", "fail", "succeeded"),
    ("one-slot", "parallel-generations", "fail", "overloaded"),
    ("changes-bytes", "put-get-round-trip", "fail", "other bytes"),
    ("short-ranges", "ranges", "fail", "were due"),
    ("finds-all", "missing-is-not-found", "fail", "succeeded"),
    ("ignores-expect", "wrong-expectation-stores-nothing", "fail", "succeeded"),
    ("lists-twice", "put-twice", "fail", "2 times"),
    ("keeps-deleted", "delete", "fail", "a second delete"),
    ("unordered", "list-in-order", "fail", "not in order"),
    ("stores-half", "cancelled-put-stores-nothing", "fail", "stored"),
    // The fixture keeps blobs in memory, which is what this check is there to find.
    ("", "large-blob-in-bounded-memory", "fail", "memory grew"),
];

fn subject(fault: &str) -> Subject {
    Subject { library: built_library("faulty"), config: serde_json::json!({ "fault": fault }) }
}

fn check(fault: &str, only: &[String], timeout: Duration) -> Report {
    let child = |subject: &Subject, name: &str| {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--check-one", name, subject.config["fault"].as_str().unwrap_or_default()]);
        Ok(command)
    };
    run(&subject(fault), &Options { only, timeout, child: &child, watch: &|_| {} }).expect("the names are those of checks")
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--check-one", name, fault] => {
            report_to_parent(&run_one(&subject(fault), name));
            ExitCode::SUCCESS
        }
        // What cargo-nextest asks first, and how it then runs the one test of this program.
        arguments if arguments.contains(&"--list") => {
            if !arguments.contains(&"--ignored") {
                println!("every_check_finds_its_fault: test");
            }
            ExitCode::SUCCESS
        }
        _ => every_check_finds_its_fault(),
    }
}

fn every_check_finds_its_fault() -> ExitCode {
    let mut wrong = 0;
    for (fault, name, status, words) in FAULTS {
        let limit = Duration::from_secs(if *words == "not over after" { 2 } else { 60 });
        let report = check(fault, &[(*name).to_owned()], limit);
        let outcome = &report.checks[0].outcome;
        let as_due = outcome.status() == *status && outcome.reason().is_some_and(|reason| reason.contains(words));
        wrong += usize::from(!as_due);
        let verdict = if as_due { "ok" } else { "WRONG" };
        println!("{verdict:5}  {fault:20} {}", report.checks[0]);
    }
    println!("and without a fault:");
    for ran in check("", &[], Duration::from_secs(60)).checks {
        // What the fixture is not, or does not do, is held against the plugins alone that are, or do.
        let not_its_kinds = [
            "the plugin provides no transport",
            "the plugin provides no chain",
            "the plugin provides no prover",
            "the plugin does not declare `vectors_put`",
            "the plugin does not declare `pointer`",
        ];
        let is_of_another_kind = ran.outcome.reason().is_some_and(|reason| not_its_kinds.contains(&reason));
        let exempt = is_of_another_kind || ran.name == "large-blob-in-bounded-memory" || ran.name == "put-get-round-trip";
        if ran.outcome != Outcome::Pass && !exempt {
            wrong += 1;
            println!("WRONG  {ran}");
        }
    }
    println!("{} faults tried, {wrong} wrong", FAULTS.len());
    if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
