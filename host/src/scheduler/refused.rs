//! Why a request got no answer.

use std::time::Duration;

use fabstir_plugin_api::error::{Code, PluginError};
use tracing::error;

use super::queue::Lane;
use crate::routes::PEER;

/// A request that was not admitted, or that failed for good.
///
/// The message is fit for clients. What a plugin said of its own troubles went to the log instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    pub code: Code,
    pub message: String,
    /// When to ask again. For `Overloaded` a promise: who comes back then, with the same request, is let in.
    pub retry_after: Option<Duration>,
}

impl Refused {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None }
    }

    pub(super) fn deadline(stage: &str) -> Self {
        Self::new(Code::DeadlineExceeded, format!("the request's time ran out {stage}"))
    }

    pub(super) fn unavailable(message: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(Code::Unavailable, message) }
    }

    /// A plugin's error that trying again would not mend.
    pub(super) fn by_plugin(lane: &Lane, error: PluginError) -> Self {
        let retry_after = error.retry_after_ms.map(Duration::from_millis);
        let message = match error.code {
            // About the request itself: the client has to know.
            Code::InvalidArgument | Code::NotFound | Code::TooLong | Code::Unimplemented => {
                return Self { code: error.code, message: error.message, retry_after };
            }
            // About money: another node asks for some that is not there, or was not allowed.
            Code::Denied if lane.plugin.starts_with(PEER) => {
                return Self { code: error.code, message: error.message, retry_after };
            }
            Code::DeadlineExceeded => return Self::deadline("in the model's plugin"),
            Code::Overloaded | Code::Unavailable | Code::Cancelled => "the model's plugin went away while it answered",
            Code::Full => "the model's plugin has no memory left for this request",
            _ => "the model's plugin failed on this request",
        };
        let Lane { plugin, generation, model } = lane;
        error!(%plugin, generation, %model, code = %error.code, %error, "Request failed in a plugin.");
        // What the operating system denies a plugin is no business of the client's.
        let code = if error.code == Code::Denied { Code::Internal } else { error.code };
        Self { code, message: message.into(), retry_after }
    }
}
