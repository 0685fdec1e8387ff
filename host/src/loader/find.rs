//! Names to files.

use std::path::{Path, PathBuf};

use super::display;
use super::error::{LoadError, Step};

/// The folder of the node's own binary, where the bundled plugins lie.
fn bundled() -> Option<PathBuf> {
    std::env::current_exe().ok()?.parent().map(Path::to_owned)
}

fn folders(dirs: &[PathBuf], bundled_only: bool) -> Vec<PathBuf> {
    let own = if bundled_only { &[] } else { dirs };
    own.iter().cloned().chain(bundled()).collect()
}

pub(super) fn find(use_: &str, dirs: &[PathBuf], base: &Path, bundled_only: bool) -> Result<PathBuf, LoadError> {
    let missing = |message: String| LoadError::new(Step::Find, "P101", message);
    let is_path = use_.contains('/') || Path::new(use_).extension().is_some();
    if is_path {
        let path = base.join(use_);
        if bundled_only && path.parent() != bundled().as_deref() {
            return Err(missing(format!("{} is not a bundled plugin", display(&path)))
                .note("because", "the node runs in safe mode")
                .fix("start the node without --safe-mode"));
        }
        return match path.is_file() {
            true => Ok(path),
            false => Err(missing(format!("there is no file {}", display(&path)))
                .fix("correct the path after `use`, or give the plugin's name")),
        };
    }
    let folders = folders(dirs, bundled_only);
    let name = file_name(use_);
    if let Some(path) = folders.iter().map(|folder| folder.join(&name)).find(|path| path.is_file()) {
        return Ok(path);
    }
    let known = installed(dirs, bundled_only);
    let known: Vec<String> = known.iter().filter_map(|path| plugin_name(path)).collect();
    let nearest = known.iter().max_by(|a, b| strsim::jaro(a, use_).total_cmp(&strsim::jaro(b, use_)));
    let searched: Vec<String> = folders.iter().map(|folder| display(folder)).collect();
    let mut error =
        missing(format!("no plugin `{use_}` is installed")).note("looked for", format!("{name} in {}", searched.join(", ")));
    if let Some(nearest) = nearest.filter(|nearest| strsim::jaro(nearest, use_) > 0.8) {
        error = error.note("nearest", nearest);
    }
    Err(error.fix("build or install the plugin, or add its folder to `plugins.dirs`"))
}

pub(super) fn file_name(name: &str) -> String {
    format!("{}{}{}", std::env::consts::DLL_PREFIX, name.replace('-', "_"), std::env::consts::DLL_SUFFIX)
}

fn plugin_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let name = name.strip_prefix(std::env::consts::DLL_PREFIX)?.strip_suffix(std::env::consts::DLL_SUFFIX)?;
    Some(name.replace('_', "-"))
}

/// The libraries in the searched folders that carry a manifest.
pub(super) fn installed(dirs: &[PathBuf], bundled_only: bool) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for folder in folders(dirs, bundled_only) {
        let mut here: Vec<PathBuf> = std::fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| plugin_name(path).is_some() && super::inspect(path).is_ok())
            .collect();
        here.sort();
        files.extend(here);
    }
    files
}
