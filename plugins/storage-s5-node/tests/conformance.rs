//! The conformance suite on the built library: a node that nobody else reaches.

use std::process::ExitCode;

use fabstir_plugin_testkit::{Subject, built_library};

fn main() -> ExitCode {
    fabstir_plugin_testkit::main(Subject { library: built_library("storage_s5_node"), config: serde_json::json!({}) })
}
