//! The conformance suite on the built library.

use std::process::ExitCode;

use fabstir_plugin_testkit::{Subject, built_library};

fn main() -> ExitCode {
    let config = serde_json::json!({ "listen": ["/ip4/127.0.0.1/tcp/0"], "mdns": false });
    fabstir_plugin_testkit::main(Subject { library: built_library("transport_libp2p"), config })
}
