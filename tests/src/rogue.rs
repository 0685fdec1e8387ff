//! Shared libraries that claim to be plugins, written in C.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

/// A library to be made.
pub struct Rogue {
    /// What stands in the section that `#[plugin]` writes; `None` leaves the section out.
    pub manifest: Option<Vec<u8>>,
    /// C statements that run as soon as the file is opened.
    pub initialiser: &'static str,
    /// C declarations, such as a root symbol.
    pub declarations: &'static str,
}

impl Default for Rogue {
    fn default() -> Self {
        Self { manifest: Some(manifest("rogue").to_string().into()), initialiser: "", declarations: "" }
    }
}

/// A manifest that this node accepts, as `#[plugin]` would write it.
pub fn manifest(name: &str) -> Value {
    json!({
        "format": 1, "name": name, "version": "0.1.0", "description": "a rogue", "license": "MIT", "plugin_api": "0.1.0", "port": "1.0",
        "os": std::env::consts::OS, "arch": std::env::consts::ARCH, "panic": "unwind", "debug": false, "needs": [],
        "provides": [{ "kind": "inference", "version": "1.0", "methods": ["models", "load", "unload", "generate"] }],
    })
}

impl Rogue {
    /// A library whose manifest differs from a good one.
    pub fn claiming(change: impl FnOnce(&mut Value)) -> Self {
        let mut claimed = manifest("rogue");
        change(&mut claimed);
        Self { manifest: Some(claimed.to_string().into()), ..Self::default() }
    }

    /// Compiles it to `lib{name}.so` in `folder`.
    pub fn build(&self, folder: &Path, name: &str) -> PathBuf {
        let (source, library) = (folder.join(format!("{name}.c")), folder.join(format!("lib{name}.so")));
        let mut text = String::from("#include <stdlib.h>\n#include <unistd.h>\n");
        if let Some(manifest) = &self.manifest {
            let bytes: Vec<String> = manifest.iter().map(u8::to_string).collect();
            let section = "__attribute__((section(\".fabstir.plugin\"), used))";
            writeln!(text, "{section} static const unsigned char manifest[] = {{{}}};", bytes.join(","))
                .expect("a String takes any text");
        }
        let (declarations, initialiser) = (self.declarations, self.initialiser);
        writeln!(text, "{declarations}\n__attribute__((constructor)) static void opened(void) {{ {initialiser} }}")
            .expect("the same");
        std::fs::write(&source, text).expect("a file can be written");
        let output = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output();
        let output = output.unwrap_or_else(|error| panic!("`cc` is needed (apt-get install build-essential): {error}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        library
    }
}
