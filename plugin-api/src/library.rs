//! Opening a plugin's file. For hosts: the feature `host`.

use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::abi::{Root, RootError};

/// Why a file cannot be opened as a plugin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The dynamic loader's own words: a missing file, a missing dependency, an unresolved symbol.
    #[error("{path} cannot be loaded: {reason}", path = path.display())]
    Load { path: PathBuf, reason: String },
    #[error("{path} exports no plugin root", path = path.display())]
    NotAPlugin { path: PathBuf },
    #[error(transparent)]
    Root(#[from] RootError),
}

/// The dynamic loader's own words, which libloading keeps one level down.
fn said(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |cause| cause.to_string())
}

/// Opens a library with all its symbols resolved and visible to nobody else, and checks its port layout.
///
/// The library stays open until the process ends: nothing that runs threads can be unloaded safely. Opening the same path again
/// gives the same library.
///
/// # Safety
/// The file's initialisers run in this process. Nothing checks what they do.
pub unsafe fn open(path: &Path) -> Result<Root, OpenError> {
    // SAFETY: the caller answers for what the file's initialisers do.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|error| OpenError::Load { path: path.into(), reason: said(&error) })?;
    let library = std::mem::ManuallyDrop::new(library);
    // SAFETY: the symbol's address is read, not what it points to.
    let symbol = unsafe { library.get::<*const std::ffi::c_void>(Root::SYMBOL) }
        .map_err(|_| OpenError::NotAPlugin { path: path.into() })?;
    let header = symbol.into_raw();
    // SAFETY: the name is abi_stable's own, and the library is never closed.
    Ok(unsafe { Root::from_symbol(header.cast_const(), path)? })
}
