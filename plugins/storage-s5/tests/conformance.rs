//! The conformance suite on the built library, with a portal of its own.
//!
//! `FABSTIR_CHECK_S5` may hold a configuration of this plugin, as JSON, to run the suite on other portals.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};

use fabstir_plugin_testkit::{Subject, built_library};
use serde_json::{Value, json};

/// Where the checks, each a process of its own, read which portal has been started for them.
const PORTAL: &str = "FABSTIR_CHECK_S5";

fn main() -> ExitCode {
    let subject = |config| Subject { library: built_library("storage_s5"), config };
    if let Ok(config) = std::env::var(PORTAL) {
        return match serde_json::from_str(&config) {
            Ok(config) => fabstir_plugin_testkit::main(subject(config)),
            Err(error) => failed(&format!("{PORTAL} is not JSON: {error}")),
        };
    }
    if std::env::args().any(|argument| matches!(argument.as_str(), "--list" | "--ignored" | "--help" | "-h")) {
        return fabstir_plugin_testkit::main(subject(json!({})));
    }
    let folder = match tempfile::tempdir() {
        Ok(folder) => folder,
        Err(why) => return failed(&why.to_string()),
    };
    let (mut portal, url) = match start(folder.path().as_os_str()) {
        Ok(started) => started,
        Err(why) => return failed(&why),
    };
    // Half of what the checks put is larger than one request may be here, so that both ways are walked.
    let config: Value = json!({ "portals": [{ "url": url }], "single_max_bytes": 1 << 20, "chunk_bytes": 4 << 20 });
    // SAFETY: there is no other thread.
    unsafe { std::env::set_var(PORTAL, config.to_string()) };
    let code = fabstir_plugin_testkit::main(subject(config));
    // It has no reason not to die.
    let _ = portal.kill().and_then(|()| portal.wait());
    code
}

fn start(folder: &std::ffi::OsStr) -> Result<(Child, String), String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_s5-portal"));
    command.args(["--listen", "127.0.0.1:0", "--dir"]).arg(folder).stdout(Stdio::piped());
    let mut portal = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let out = portal.stdout.take().ok_or("the portal has no output")?;
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line).map_err(|error| format!("the portal said nothing: {error}"))?;
    match line.trim().strip_prefix("Listening on ") {
        Some(url) => Ok((portal, url.to_owned())),
        None => Err(format!("the portal said {line:?}")),
    }
}

fn failed(why: &str) -> ExitCode {
    eprintln!("{why}");
    ExitCode::from(2)
}
