//! The conformance suite on the built library.

use std::process::ExitCode;

use fabstir_plugin_testkit::{Subject, built_library};

fn main() -> ExitCode {
    fabstir_plugin_testkit::main(Subject { library: built_library("prover_ezkl"), config: serde_json::json!({}) })
}
