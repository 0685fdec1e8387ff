//! Why something about a proof could not be done.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fabstir_plugin_api::prelude::*;

/// Every way in which the plugin can fail. A proof that is wrong is none of them: that is a verdict.
#[derive(Debug, thiserror::Error)]
pub enum EzklError {
    #[error("cannot start {}: {source}: run `make ezkl`, or set `python` to an interpreter that has ezkl {}", python.display(), crate::EZKL)]
    NoPython { python: PathBuf, source: io::Error },
    #[error("{} has no ezkl that can be used ({said}): run `make ezkl`, or `pip install ezkl=={}` there", python.display(), crate::EZKL)]
    NoEzkl { python: PathBuf, said: String },
    #[error("{} has ezkl {found}, this plugin speaks with {}: run `make ezkl`, or `pip install ezkl=={0}` there", python.display(), crate::EZKL)]
    OtherEzkl { python: PathBuf, found: String },
    #[error("no statement `{asked}` here: there are {known}")]
    UnknownStatement { asked: String, known: String },
    #[error(
        "the proof is for other keys ({asked}) than those here ({here}): keys are made on each machine, so ask where the proof was made"
    )]
    UnknownProgram { asked: String, here: String },
    /// Not in the folder for state.
    #[error("no keys for `{0}` yet: prepare the statement first")]
    NotPrepared(String),
    /// The task does not fit its statement, or is not true.
    #[error("{0}")]
    BadTask(String),
    #[error("no ONNX model: the bytes are not what such a file has")]
    NotOnnx,
    #[error("model `{name}` ({}) cannot be proven: {why}", path.display())]
    BadModel { name: String, path: PathBuf, why: String },
    /// A number in the circuit left the range that the circuit has for it.
    #[error(
        "the input leads to numbers of more than {} in the circuit: scale the model's input down, or set a smaller `scale`",
        crate::circuit::LARGEST
    )]
    OutOfRange,
    #[error(
        "`{statement}` needs a circuit of 2^{k} rows ({rows} used), `max_k` is {max_k}: each step more about doubles time and memory; \
         raise it, or take a smaller model"
    )]
    TooBig { statement: String, k: u32, rows: u64, max_k: u32 },
    #[error("out of memory, or of threads, while {doing}: `memory_bytes` is {limit}: raise it, or take a smaller model")]
    OutOfMemory { doing: &'static str, limit: u64 },
    #[error("no end of {doing} within {} s, and the worker was ended: raise `{key}`, or take a smaller model", limit.as_secs())]
    TimedOut { doing: &'static str, limit: Duration, key: &'static str },
    #[error("the worker ended while {doing} ({how}): ask again, a new one starts by itself")]
    Died { doing: &'static str, how: String, killed: bool },
    #[error("ezkl failed at {doing}: {said}")]
    Failed { doing: &'static str, said: String },
    /// What a worker answered is not what was asked for.
    #[error("ezkl answered {doing} with something else: {said}")]
    Nonsense { doing: &'static str, said: String },
    #[error(
        "the proof that was made does not hold ({0}), so it is not handed out: `prepare` anew, and tell the plugin's authors"
    )]
    BadProof(String),
    #[error("what was kept for `{statement}` is not what its hash says ({what}): it was set aside in {}, the next `prepare` makes it again", aside.display())]
    Corrupt { statement: String, what: String, aside: PathBuf },
    #[error("the disk is full while writing to {}: keys take up to a gigabyte; free some space", .0.display())]
    DiskFull(PathBuf),
    #[error("the plugin is ending")]
    Ending,
    /// The operating system said no.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

impl EzklError {
    /// For `map_err` on calls of the operating system.
    pub fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull(path.to_owned()),
            _ => Self::Io { doing, path: path.to_owned(), source },
        }
    }
}

impl EzklError {
    /// What it is called where the plugin starts: without an engine its configuration is wrong.
    pub fn at_start(self) -> PluginError {
        let is_setting = matches!(self, Self::NoPython { .. } | Self::NoEzkl { .. } | Self::OtherEzkl { .. });
        let told = PluginError::from(self);
        if is_setting { PluginError::invalid(told.message) } else { told }
    }
}

impl From<EzklError> for PluginError {
    fn from(error: EzklError) -> Self {
        let code = match &error {
            EzklError::UnknownStatement { .. } | EzklError::UnknownProgram { .. } => Code::NotFound,
            EzklError::BadTask(_) | EzklError::NotOnnx | EzklError::BadModel { .. } | EzklError::OutOfRange => {
                Code::InvalidArgument
            }
            EzklError::TooBig { .. } | EzklError::OutOfMemory { .. } | EzklError::DiskFull(_) => Code::Full,
            // There was one at the start, so that it may come back.
            EzklError::NoPython { .. } | EzklError::NoEzkl { .. } | EzklError::OtherEzkl { .. } => Code::Unavailable,
            EzklError::NotPrepared(_) | EzklError::TimedOut { .. } | EzklError::Died { .. } | EzklError::Ending => {
                Code::Unavailable
            }
            EzklError::Corrupt { .. } => Code::Corrupt,
            EzklError::Failed { .. } | EzklError::Nonsense { .. } | EzklError::BadProof(_) => Code::Internal,
            EzklError::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Code::Denied,
                _ => Code::Internal,
            },
        };
        PluginError::new(code, error.to_string())
    }
}
