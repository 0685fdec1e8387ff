//! A plugin's identity, readable without running any of its code.
//!
//! `#[plugin]` puts a JSON text into a section of the library of its own. It is written at compile time by the constant functions
//! below, because the interface versions it names are constants of other crates.

use serde::{Deserialize, Serialize};

use crate::interface::Method;
use crate::plugin::Provided;

/// The section's name, in ELF.
pub const SECTION: &str = ".fabstir.plugin";
/// The section's name, in Mach-O, without its segment.
pub const SECTION_MACHO: &str = "__fabstir";
/// The layout of the manifest itself.
pub const FORMAT: u32 = 1;

/// What a library says of itself before it is loaded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub name: String,
    pub version: String,
    pub description: String,
    pub license: String,
    /// The version of plugin-api that it was built with.
    pub plugin_api: String,
    /// The port layout that it was built with.
    pub port: String,
    pub os: String,
    pub arch: String,
    /// `unwind` or `abort`.
    pub panic: String,
    /// Whether debug assertions are compiled in.
    pub debug: bool,
    pub needs: Vec<String>,
    pub provides: Vec<Provided>,
}

/// The port layout's version: it moves only if the types of [`crate::abi`] do.
pub const PORT_VERSION: &str = "1.0.0";

/// What `#[plugin]` knows of a plugin.
#[derive(Debug, Clone, Copy)]
pub struct About {
    pub name: &'static str,
    pub version: &'static str,
    pub description: &'static str,
    pub license: &'static str,
    pub needs: &'static [&'static str],
    pub provides: &'static [Provides],
}

/// A kind that a plugin declares, with the optional methods that it implements.
#[derive(Debug, Clone, Copy)]
pub struct Provides {
    pub kind: &'static str,
    pub version: &'static str,
    pub methods: &'static [Method],
    pub optional: &'static [&'static str],
}

impl Provides {
    /// Whether calls of a method reach the plugin.
    pub fn declares(&self, method: &str) -> bool {
        self.methods.iter().any(|known| known.name == method && (known.required || self.optional.contains(&method)))
    }

    pub fn to_provided(self) -> Provided {
        let methods = self.methods.iter().map(|method| method.name.to_owned()).filter(|name| self.declares(name)).collect();
        Provided { kind: self.kind.to_owned(), version: self.version.to_owned(), methods }
    }

    /// Refuses, at compile time, to declare a method that the interface does not have.
    pub const fn check(self) -> Self {
        let mut index = 0;
        while index < self.optional.len() {
            let mut known = false;
            let mut method = 0;
            while method < self.methods.len() {
                if equal(self.methods[method].name, self.optional[index]) {
                    assert!(!self.methods[method].required, "a method in parentheses is required anyway: leave it out");
                    known = true;
                }
                method += 1;
            }
            assert!(known, "a method in parentheses is not one of the interface");
            index += 1;
        }
        self
    }
}

const fn equal(left: &str, right: &str) -> bool {
    let (left, right) = (left.as_bytes(), right.as_bytes());
    if left.len() != right.len() {
        return false;
    }
    let mut index = 0;
    while index < left.len() {
        if left[index] != right[index] {
            return false;
        }
        index += 1;
    }
    true
}

/// A manifest being written at compile time.
#[doc(hidden)]
pub struct Text {
    pub bytes: [u8; 8192],
    pub length: usize,
}

impl Text {
    const fn push(mut self, text: &str) -> Self {
        let text = text.as_bytes();
        let mut index = 0;
        while index < text.len() {
            self.bytes[self.length] = text[index];
            self.length += 1;
            index += 1;
        }
        self
    }

    const fn string(self, text: &str) -> Self {
        let mut out = self.push("\"");
        let bytes = text.as_bytes();
        let mut index = 0;
        while index < bytes.len() {
            let byte = bytes[index];
            if byte == b'"' || byte == b'\\' {
                out.bytes[out.length] = b'\\';
                out.length += 1;
            }
            out.bytes[out.length] = if byte < 0x20 { b' ' } else { byte };
            out.length += 1;
            index += 1;
        }
        out.push("\"")
    }

    const fn entry(self, key: &str, value: &str) -> Self {
        self.push(",\"").push(key).push("\":").string(value)
    }
}

/// Writes a plugin's manifest. A manifest over 8 KiB fails to compile.
#[doc(hidden)]
pub const fn write(about: &About, panic_unwinds: bool, debug: bool) -> Text {
    let mut out = Text { bytes: [0; 8192], length: 0 }
        .push("{\"format\":1")
        .entry("name", about.name)
        .entry("version", about.version)
        .entry("description", about.description)
        .entry("license", about.license)
        .entry("plugin_api", env!("CARGO_PKG_VERSION"))
        .entry("port", PORT_VERSION)
        .entry("os", std::env::consts::OS)
        .entry("arch", std::env::consts::ARCH)
        .entry("panic", if panic_unwinds { "unwind" } else { "abort" })
        .push(if debug { ",\"debug\":true" } else { ",\"debug\":false" })
        .push(",\"needs\":[");
    let mut index = 0;
    while index < about.needs.len() {
        out = if index > 0 { out.push(",") } else { out }.string(about.needs[index]);
        index += 1;
    }
    out = out.push("],\"provides\":[");
    index = 0;
    while index < about.provides.len() {
        let provides = &about.provides[index];
        out = if index > 0 { out.push(",") } else { out }
            .push("{\"kind\":")
            .string(provides.kind)
            .entry("version", provides.version)
            .push(",\"methods\":[");
        let (mut method, mut first) = (0, true);
        while method < provides.methods.len() {
            let known = &provides.methods[method];
            let mut declared = known.required;
            let mut optional = 0;
            while optional < provides.optional.len() {
                declared = declared || equal(known.name, provides.optional[optional]);
                optional += 1;
            }
            if declared {
                out = if first { out } else { out.push(",") }.string(known.name);
                first = false;
            }
            method += 1;
        }
        out = out.push("]}");
        index += 1;
    }
    out.push("]}")
}

/// The written bytes, in an array that fits.
#[doc(hidden)]
pub const fn fit<const N: usize>(text: &Text) -> [u8; N] {
    let mut bytes = [0; N];
    let mut index = 0;
    while index < N {
        bytes[index] = text.bytes[index];
        index += 1;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_at_compile_time_reads_back() {
        const ABOUT: About = About {
            name: "n",
            version: "1.2.3",
            description: "says \"hi\" \\ bye",
            license: "MIT",
            needs: &["gpu", "net"],
            provides: &[Provides {
                kind: "k",
                version: "1.0",
                methods: &[
                    Method { name: "must", required: true },
                    Method { name: "may", required: false },
                    Method { name: "other", required: false },
                ],
                optional: &["may"],
            }
            .check()],
        };
        const TEXT: Text = write(&ABOUT, true, false);
        const BYTES: [u8; TEXT.length] = fit(&TEXT);
        let manifest: Manifest = serde_json::from_slice(&BYTES).expect("valid JSON");
        assert_eq!(manifest.description, ABOUT.description);
        assert_eq!(manifest.needs, ["gpu", "net"]);
        assert_eq!(manifest.provides, [ABOUT.provides[0].to_provided()]);
        assert_eq!(manifest.provides[0].methods, ["must", "may"]);
    }
}
