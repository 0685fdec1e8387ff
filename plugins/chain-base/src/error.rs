//! Why the chain could not be asked, in the codes of the plugin interface.

use std::fmt::Display;

use fabstir_plugin_api::prelude::*;

/// For `map_err` on everything that reads: what cannot be read is no answer. Which endpoint failed and how stands in the log.
pub fn unread(error: impl Display) -> PluginError {
    PluginError::unavailable(format!("the chain cannot be read: {error}")).retry_after(std::time::Duration::from_secs(2))
}
