//! The conformance suite on the built library, with the project's own small model.

use std::process::ExitCode;

use fabstir_plugin_testkit::{Subject, built_library};

fn main() -> ExitCode {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-chat/tiny-chat-q8_0.gguf");
    let config = serde_json::json!({ "models": [{ "id": "tiny-chat", "path": model, "threads": 1 }] });
    fabstir_plugin_testkit::main(Subject { library: built_library("inference_llama_cpp"), config })
}
