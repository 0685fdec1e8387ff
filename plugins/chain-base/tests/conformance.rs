//! The conformance suite on the built library, with a development chain of its own.
//!
//! `FABSTIR_CHECK_CHAIN` may hold a configuration of this plugin, as JSON, to run the suite on another chain.

use std::process::ExitCode;

use fabstir_plugin_testkit::{Subject, built_library};
use fabstir_tests::dev_chain::DevChain;

/// Where the checks, each a process of its own, read which chain has been started for them.
const CHAIN: &str = "FABSTIR_CHECK_CHAIN";

fn main() -> ExitCode {
    let subject = |config| Subject { library: built_library("chain_base"), config };
    if let Ok(config) = std::env::var(CHAIN) {
        return match serde_json::from_str(&config) {
            Ok(config) => fabstir_plugin_testkit::main(subject(config)),
            Err(error) => failed(&format!("{CHAIN} is not JSON: {error}")),
        };
    }
    if std::env::args().any(|argument| matches!(argument.as_str(), "--list" | "--ignored" | "--help" | "-h")) {
        return fabstir_plugin_testkit::main(subject(serde_json::json!({})));
    }
    let chain = match DevChain::start() {
        Ok(chain) => chain,
        Err(why) => return failed(&why),
    };
    // SAFETY: the one other thread there is reads a pipe, and touches no environment.
    unsafe { std::env::set_var(CHAIN, chain.config().to_string()) };
    fabstir_plugin_testkit::main(subject(chain.config()))
}

fn failed(why: &str) -> ExitCode {
    eprintln!("{why}");
    ExitCode::from(2)
}
