//! What has happened in the market, as far as somebody cares: its events, without those that the chain has taken back.

use std::sync::Arc;

use fabstir_plugin_api::chain::{Amount, Chain, JobId, JobResult, MarketEvent, Notice, Since};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{PluginError, Result};
use fabstir_plugin_api::stream::Stream;

type Keep = Box<dyn Fn(&MarketEvent) -> bool + Send>;

/// The events that `keep` lets through, from the market's first block on. Whatever reads from it waits for as long as the chain is out of
/// reach: the caller sets the limit.
pub struct History {
    notices: Stream<Notice>,
    keep: Keep,
    kept: Vec<(u64, MarketEvent)>,
    up_to: Option<u64>,
}

impl History {
    pub async fn begin(chain: &Arc<dyn Chain>, keep: impl Fn(&MarketEvent) -> bool + Send + 'static) -> Result<Self> {
        let notices = chain.events(&Cx::new(), Since::Beginning).await?;
        Ok(Self { notices, keep: Box::new(keep), kept: Vec::new(), up_to: None })
    }

    /// Reads until everything up to this block is known.
    pub async fn read_to(&mut self, block: u64) -> Result<()> {
        while self.up_to.is_none_or(|up_to| up_to < block) {
            let notice = self.notice().await?;
            self.take(notice);
        }
        Ok(())
    }

    /// Reads until one more event is known, and returns it with its block.
    pub async fn next(&mut self) -> Result<(u64, MarketEvent)> {
        loop {
            let (notice, before) = (self.notice().await?, self.kept.len());
            self.take(notice);
            if let Some(kept) = self.kept.get(before) {
                return Ok(kept.clone());
            }
        }
    }

    /// What is known, in the order of the chain, each with its block.
    pub fn events(&self) -> &[(u64, MarketEvent)] {
        &self.kept
    }

    async fn notice(&mut self) -> Result<Notice> {
        self.notices.next().await.unwrap_or_else(|| Err(PluginError::unavailable("the chain plugin has ended")))
    }

    fn take(&mut self, notice: Notice) {
        match notice {
            Notice::Event { block, event, .. } => {
                if (self.keep)(&event) {
                    self.kept.push((block.number, event));
                }
            }
            Notice::UpTo { block, .. } => self.up_to = Some(block.number),
            Notice::Back { number, .. } => {
                self.kept.retain(|(block, _)| number.is_some_and(|number| *block <= number));
                self.up_to = number;
            }
            Notice::Unknown => {}
        }
    }
}

/// The job that an event is of.
pub fn job_of(event: &MarketEvent) -> Option<JobId> {
    match event {
        MarketEvent::JobPosted { job, .. }
        | MarketEvent::JobClaimed { job, .. }
        | MarketEvent::ClaimLost { job, .. }
        | MarketEvent::ResultSubmitted { job, .. }
        | MarketEvent::ProofAccepted { job, .. }
        | MarketEvent::Challenged { job, .. }
        | MarketEvent::JobSettled { job, .. }
        | MarketEvent::JobRefunded { job, .. } => Some(*job),
        _ => None,
    }
}

/// What was handed in for a job, from its events.
pub fn result_in(events: &[(u64, MarketEvent)]) -> Option<&JobResult> {
    events.iter().rev().find_map(|(_, event)| match event {
        MarketEvent::ResultSubmitted { result, .. } => Some(result),
        _ => None,
    })
}

/// How the money of a job was divided once it was over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Division {
    pub to_host: Amount,
    pub to_client: Amount,
}

/// How the money of a job was divided, from its events.
pub fn division_in(events: &[(u64, MarketEvent)]) -> Option<Division> {
    events.iter().rev().find_map(|(_, event)| match event {
        MarketEvent::JobSettled { to_host, to_client, .. } => Some(Division { to_host: *to_host, to_client: *to_client }),
        MarketEvent::JobRefunded { amount, .. } => Some(Division { to_host: Amount(0), to_client: *amount }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use fabstir_plugin_api::chain::{Block, Cursor};

    use super::*;

    fn block(number: u64) -> Block {
        Block { number, hash: format!("0x{number:064x}"), time_s: number }
    }

    fn event(number: u64, job: JobId, amount: u128) -> Notice {
        let event = MarketEvent::JobRefunded { job, client: String::new(), amount: Amount(amount) };
        Notice::Event { cursor: Cursor(number.to_string()), block: block(number), event }
    }

    fn up_to(number: u64) -> Notice {
        Notice::UpTo { cursor: Cursor(number.to_string()), block: block(number) }
    }

    fn history(notices: Vec<Notice>) -> History {
        let notices = Stream::new(futures::stream::iter(notices.into_iter().map(Ok)));
        History { notices, keep: Box::new(|event| job_of(event) == Some(7)), kept: Vec::new(), up_to: None }
    }

    #[tokio::test]
    async fn what_the_chain_takes_back_is_forgotten_and_read_anew() {
        let back = Notice::Back { cursor: None, number: Some(2) };
        let mut history =
            history(vec![event(2, 8, 1), event(2, 7, 1), event(3, 7, 2), up_to(4), back, up_to(3), event(4, 7, 3), up_to(4)]);
        history.read_to(3).await.expect("reads");
        assert_eq!(history.events().len(), 2, "job 8 is not asked for");
        assert_eq!(division_in(history.events()).expect("is there").to_client, Amount(2));
        let (number, _) = history.next().await.expect("reads on");
        assert_eq!((number, history.events().len()), (4, 2), "block 3 was taken back");
        assert_eq!(division_in(history.events()).expect("is there").to_client, Amount(3));
        history.read_to(4).await.expect("reads");
        assert!(history.read_to(5).await.is_err(), "the end of the plugin is an error");
    }

    #[tokio::test]
    async fn everything_can_be_taken_back() {
        let mut history = history(vec![event(2, 7, 1), up_to(2), Notice::Back { cursor: None, number: None }, up_to(1)]);
        history.read_to(2).await.expect("reads");
        assert!(history.next().await.is_err());
        assert!(division_in(history.events()).is_none());
    }
}
