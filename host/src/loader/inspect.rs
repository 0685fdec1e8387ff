//! Reading what a file says of itself, without running it.

use std::path::Path;

use fabstir_plugin_api::chain::Chain;
use fabstir_plugin_api::inference::Inference;
use fabstir_plugin_api::interface::{Interface, is_compatible};
use fabstir_plugin_api::manifest::{FORMAT, Manifest, PORT_VERSION, SECTION, SECTION_MACHO};
use fabstir_plugin_api::prover::Prover;
use fabstir_plugin_api::storage::Storage;
use fabstir_plugin_api::transport::Transport;
use object::{Object, ObjectSection};

use super::display;
use super::error::{LoadError, Step};

/// The largest library that is read, in bytes. GPU builds of llama.cpp come to some hundred MiB.
const MAX_FILE: u64 = 4 << 30;

/// The kinds that this node speaks, with the version of each.
pub fn supported_interfaces() -> [(&'static str, &'static str); 5] {
    [
        (<dyn Chain as Interface>::KIND, <dyn Chain as Interface>::VERSION),
        (<dyn Inference as Interface>::KIND, <dyn Inference as Interface>::VERSION),
        (<dyn Prover as Interface>::KIND, <dyn Prover as Interface>::VERSION),
        (<dyn Storage as Interface>::KIND, <dyn Storage as Interface>::VERSION),
        (<dyn Transport as Interface>::KIND, <dyn Transport as Interface>::VERSION),
    ]
}

/// Reads a file's manifest. Executes nothing.
pub fn inspect(file: &Path) -> Result<Manifest, LoadError> {
    manifest(file, &read(file)?)
}

pub(super) fn read(file: &Path) -> Result<Vec<u8>, LoadError> {
    let failed = |error: std::io::Error| {
        LoadError::new(Step::Find, "P102", format!("{} cannot be read: {error}", display(file)))
            .fix("check the path and its permissions")
    };
    let facts = std::fs::metadata(file).map_err(failed)?;
    if !facts.is_file() || facts.len() > MAX_FILE {
        return Err(LoadError::new(Step::Find, "P102", format!("{} is not a file of at most 4 GiB", display(file))));
    }
    std::fs::read(file).map_err(failed)
}

pub(super) fn manifest(file: &Path, bytes: &[u8]) -> Result<Manifest, LoadError> {
    let error = |code, message: String| LoadError::new(Step::Read, code, message).note("file", display(file));
    let damaged = |why: String| {
        error("P104", "the library is truncated or damaged".into()).note("found", why).fix("install the plugin again")
    };
    if object::FileKind::parse(bytes).is_err() {
        return Err(error("P103", "the file is not a shared library".into())
            .fix("name the plugin's compiled library (`.so`), not its source, package or archive"));
    }
    let library = object::File::parse(bytes).map_err(|error| damaged(error.to_string()))?;
    let section = library.sections().find(|section| matches!(section.name(), Ok(SECTION | SECTION_MACHO)));
    let Some(section) = section else {
        return Err(error("P105", "the library is not a fabstir-node plugin".into())
            .note("found", format!("no section `{SECTION}`, which `#[plugin]` writes"))
            .fix("name a plugin built with fabstir-plugin-api and its feature `dylib`"));
    };
    let text = section.data().map_err(|error| damaged(error.to_string()))?;
    // An ELF file keeps section headers at its end, but segments may be cut as well.
    if let object::File::Elf64(elf) = &library {
        use object::read::elf::ProgramHeader;
        for segment in elf.elf_program_headers() {
            let (start, length) = segment.file_range(elf.endian());
            if start.checked_add(length).is_none_or(|end| end > bytes.len() as u64) {
                return Err(damaged(format!("a segment ends at byte {} of {}", start.saturating_add(length), bytes.len())));
            }
        }
    }
    let value: serde_json::Value =
        serde_json::from_slice(text).map_err(|why| damaged(format!("its manifest is not JSON: {why}")))?;
    if value["format"] != FORMAT {
        return Err(error("P201", format!("the manifest has format {}; this node reads format {FORMAT}", value["format"]))
            .fix("use a plugin and a node of the same generation"));
    }
    serde_json::from_value(value).map_err(|why| damaged(format!("its manifest does not fit: {why}")))
}

/// Whether this node can work with such a plugin.
pub(super) fn resolve(file: &Path, manifest: &Manifest) -> Result<(), LoadError> {
    let name = format!("`{}` {}", manifest.name, manifest.version);
    let error = |code, message: String| LoadError::new(Step::Resolve, code, message).note("file", display(file));
    if (manifest.os.as_str(), manifest.arch.as_str()) != (std::env::consts::OS, std::env::consts::ARCH) {
        return Err(error("P202", format!("{name} was built for another machine"))
            .note("found", format!("{} on {}", manifest.os, manifest.arch))
            .note("this node", format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH))
            .fix("install the build for this machine"));
    }
    if manifest.panic != "unwind" {
        return Err(error("P204", format!("{name} was built with `panic = \"{}\"`", manifest.panic))
            .note("because", "a panic in one call would end the whole process")
            .fix("build it with `panic = \"unwind\"`, Rust's default"));
    }
    if !is_compatible(PORT_VERSION, &manifest.port) {
        return Err(error("P205", format!("{name} was built for another plugin port"))
            .note("found", format!("port {} (plugin-api {})", manifest.port, manifest.plugin_api))
            .note("this node", format!("port {PORT_VERSION}"))
            .fix("install a build of the plugin for this node"));
    }
    let supported = supported_interfaces();
    for provided in &manifest.provides {
        let Some((kind, ours)) = supported.iter().find(|(kind, _)| *kind == provided.kind) else { continue };
        if !is_compatible(ours, &provided.version) {
            return Err(error("P203", format!("{name} speaks another version of {kind}"))
                .note("found", format!("{kind} {} (plugin-api {})", provided.version, manifest.plugin_api))
                .note("this node speaks", format!("{kind} {ours}"))
                .fix(format!("install a {} that speaks {kind} {ours}, or another version of the node", manifest.name)));
        }
    }
    let known = manifest.provides.iter().any(|provided| supported.iter().any(|(kind, _)| *kind == provided.kind));
    if !known {
        let found: Vec<&str> = manifest.provides.iter().map(|provided| provided.kind.as_str()).collect();
        let ours: Vec<&str> = supported.iter().map(|(kind, _)| *kind).collect();
        return Err(error("P206", format!("{name} provides no kind that this node uses"))
            .note("found", if found.is_empty() { "nothing".into() } else { found.join(", ") })
            .note("this node uses", ours.join(", "))
            .fix("remove its entry, or update the node"));
    }
    Ok(())
}
