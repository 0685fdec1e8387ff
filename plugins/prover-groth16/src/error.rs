//! Why work with proofs failed.

use std::io;
use std::path::{Path, PathBuf};

use ark_relations::gr1cs::SynthesisError;
use fabstir_plugin_api::prelude::*;

/// Every way in which proving and checking can fail. A proof that is wrong is none of them: it is a verdict.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no statement `{asked}` here: there are {known}")]
    NoStatement { asked: String, known: String },
    #[error("the program {program} is not the one under which `{statement}` is proven here: {has}")]
    NoProgram { statement: String, program: String, has: String },
    /// The task is none of the statement's, or not true.
    #[error("{0}")]
    Task(String),
    #[error(
        "{what} needs about {needed_mib} MiB of memory, and `max_memory_mib` is {allowed_mib}: raise it, or leave this model out"
    )]
    Memory { what: String, needed_mib: u64, allowed_mib: u64 },
    /// What is kept is not what was kept.
    #[error("the keys in {} are damaged ({reason}){}", path.display(), after(set_aside))]
    Damaged { path: PathBuf, reason: String, set_aside: Option<PathBuf> },
    #[error("`{0}` is not prepared: prepare it first")]
    NotPrepared(String),
    #[error("the caller gave up")]
    Ended,
    /// A file that is no model that can be read.
    #[error("{}: {reason}", path.display())]
    Model { path: PathBuf, reason: String },
    #[error("{} is another file than at the start: start the plugin again to prove what it is now", .0.display())]
    Replaced(PathBuf),
    #[error("the circuit cannot be built: {0}")]
    Circuit(#[from] SynthesisError),
    /// Never by what a caller says.
    #[error("{0}")]
    Internal(String),
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

fn after(set_aside: &Option<PathBuf>) -> String {
    match set_aside {
        Some(path) => format!("; they lie in {} now, and `prepare` makes new ones", path.display()),
        None => ": `prepare` sets them aside, and makes new ones when it is asked once more".into(),
    }
}

impl Error {
    /// For `map_err` on calls of the operating system.
    pub fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }
}

impl From<Error> for PluginError {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NoStatement { .. } | Error::NoProgram { .. } => Code::NotFound,
            Error::Task(_) | Error::Model { .. } => Code::InvalidArgument,
            Error::Memory { .. } => Code::Full,
            Error::Damaged { .. } => Code::Corrupt,
            // Whoever waits for it may yet have it.
            Error::NotPrepared(_) | Error::Replaced(_) => Code::Unavailable,
            Error::Ended => Code::Cancelled,
            Error::Circuit(_) | Error::Internal(_) => Code::Internal,
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Code::Denied,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::Full,
                _ => Code::Internal,
            },
        };
        PluginError::new(code, error.to_string())
    }
}
