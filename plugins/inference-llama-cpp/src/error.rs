//! What can go wrong, and how the host hears of it.

use std::time::Duration;

use fabstir_plugin_api::prelude::{Code, PluginError};

use crate::gguf::GgufError;
use crate::memory::Misfit;

/// Why the engine refused or gave up.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The configuration contradicts itself.
    #[error("{0}")]
    Config(String),
    /// No model of this name is configured.
    #[error("no model `{0}` is configured here")]
    Unknown(String),
    /// The model is configured, but nobody loaded it.
    #[error("model `{0}` is not loaded")]
    NotLoaded(String),
    /// The file is missing, cut short, damaged or something else.
    #[error(transparent)]
    File(#[from] GgufError),
    #[error("model `{model}` {misfit}")]
    Memory { model: String, misfit: Misfit },
    /// llama.cpp refused the file; the reason is what it logged.
    #[error("model `{model}` cannot be loaded: {reason}")]
    Load { model: String, reason: String },
    /// Everybody who waited for the load has gone.
    #[error("the load was given up: nobody waits for it")]
    Abandoned,
    /// A value of the request cannot be honoured.
    #[error("{0}")]
    Invalid(String),
    /// The chat template failed on these messages; the text is the template's own.
    #[error("the model's chat template refuses the messages: {0}")]
    Template(String),
    #[error("the prompt has {prompt} tokens and the answer may have {answer}, but the context holds {context}")]
    TooLong { prompt: u32, answer: u32, context: u32 },
    /// Every slot generates.
    #[error("all {parallel} slots are busy")]
    Busy { parallel: u32, retry_after: Duration },
    /// The model was unloaded, or its engine ended.
    #[error("model `{0}` was unloaded")]
    Unloaded(String),
    /// llama.cpp or the engine failed on this generation.
    #[error("{0}")]
    Failed(String),
}

impl From<Error> for PluginError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        let code = match &error {
            Error::Config(_) | Error::Invalid(_) | Error::Template(_) => Code::InvalidArgument,
            Error::Unknown(_) | Error::NotLoaded(_) => Code::NotFound,
            Error::File(GgufError::Unreadable { .. }) => Code::NotFound,
            Error::File(_) | Error::Load { .. } => Code::InvalidArgument,
            Error::Memory { .. } => Code::Full,
            Error::Abandoned => Code::Cancelled,
            Error::TooLong { .. } => Code::TooLong,
            Error::Busy { retry_after, .. } => return PluginError::new(Code::Overloaded, message).retry_after(*retry_after),
            Error::Unloaded(_) => Code::Unavailable,
            Error::Failed(_) => Code::Internal,
        };
        PluginError::new(code, message)
    }
}
