//! What a portal did wrong.

use std::error::Error;
use std::time::Duration;

/// Why a portal did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Nobody answers, the connection broke, it was too slow, or it has a fault of its own. Later it may work.
    #[error("{0}")]
    Unreachable(String),
    /// It wants to be left alone for so long.
    #[error("it wants no requests for {} s", .0.as_secs_f32().ceil())]
    Busy(Duration),
    #[error("it has no such thing")]
    Missing,
    /// It will say the same again.
    #[error("it answered with status {status} {why:?}")]
    Refused { status: u16, why: String },
    /// It sent what is not what was asked for.
    #[error("{0}")]
    Wrong(String),
}

/// The first wait before a portal is asked again, doubled each time.
const FIRST_WAIT: Duration = Duration::from_millis(250);

impl Fault {
    /// Of an exchange that did not come about or broke off. The address is left out: the portal's name stands beside it.
    pub fn unreachable(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        Self::Unreachable(text)
    }

    /// How long to wait before the portal is asked again for the `attempt`th time; `None` where that has no sense, or would take too long.
    pub fn wait(&self, attempt: u32, longest: Duration) -> Option<Duration> {
        match self {
            Self::Unreachable(_) => Some(FIRST_WAIT * (1 << attempt.min(8))),
            Self::Busy(rest) if *rest <= longest => Some(*rest),
            _ => None,
        }
    }
}
