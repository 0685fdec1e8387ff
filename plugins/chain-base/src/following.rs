//! Following the market: the escrow's logs as notices of the kind.

use std::time::Duration;

use async_trait::async_trait;
use ethers::providers::{JsonRpcClient, Middleware, Provider, ProviderError, RpcError};
use ethers::types::{Address, BlockNumber, Filter, H256};
use fabstir_plugin_api::prelude::*;
use tokio::time::Instant;

use crate::hex::hash_text;
use crate::log::{self, Header, Log, Point, Reader, RoundError, Source, SourceError};
use crate::rpc::{CallError, Pool, range_too_large};
use crate::tell;

/// The longest pause after rounds that failed.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Tells what happens in the market after `reader`'s cursor, until nobody listens.
pub async fn follow(pool: Pool, escrow: Address, mut reader: Reader, poll: Duration, listener: Sender<Notice>) {
    let mut pause = poll;
    loop {
        let round = Instant::now();
        match read(&pool, escrow, &mut reader, &listener).await {
            Ok(more) => {
                pause = poll;
                if more {
                    continue;
                }
            }
            Err(Ended::Unheard) => return,
            Err(Ended::Failed(error)) => {
                pause = (pause * 2).min(LONGEST_PAUSE).max(poll);
                tracing::warn!(%error, pause_ms = pause.as_millis() as u64, "The market cannot be read; trying again from the same block.");
            }
            // What stands at the contract's address does not speak its language: going past it would be a gap.
            Err(Ended::Broken(error)) => {
                listener.try_fail(error);
                return;
            }
        }
        tokio::select! {
            () = tokio::time::sleep_until(round + pause) => {}
            () = listener.closed() => return,
        }
    }
}

enum Ended {
    Unheard,
    Failed(RoundError),
    Broken(PluginError),
}

/// One round, from one endpoint; whether there is more to read now.
async fn read(pool: &Pool, escrow: Address, reader: &mut Reader, listener: &Sender<Notice>) -> Result<bool, Ended> {
    let unread = |error: CallError| Ended::Failed(SourceError::Failed(error.to_string()).into());
    let source = Escrow { provider: Provider::new(pool.pinned().await.map_err(unread)?), escrow };
    let round = reader.round(&source).await.map_err(Ended::Failed)?;
    for notice in round.notices {
        let Some(notice) = notice_of(notice).map_err(Ended::Broken)? else { continue };
        listener.send(notice).await.map_err(|_| Ended::Unheard)?;
    }
    Ok(round.more)
}

/// `None` for a log that is not told.
fn notice_of(notice: log::Notice) -> Result<Option<Notice>> {
    let cursor = |cursor: log::Cursor| Cursor(cursor.to_string());
    Ok(match notice {
        log::Notice::Log { cursor: at, block, log } => {
            let topics = log.topics.into_iter().map(H256).collect();
            tell::event(topics, log.data)?.map(|event| Notice::Event { cursor: cursor(at), block: block_of(&block), event })
        }
        log::Notice::UpTo { cursor: at, block } => Some(Notice::UpTo { cursor: cursor(at), block: block_of(&block) }),
        log::Notice::Back { cursor: at } => {
            let number = at.as_ref().map(|at| at.at().number);
            Some(Notice::Back { cursor: at.map(cursor), number })
        }
    })
}

fn block_of(header: &Header) -> Block {
    Block { number: header.number, hash: hash_text(header.hash), time_s: header.time_s }
}

/// The escrow contract at one endpoint.
struct Escrow<C> {
    provider: Provider<C>,
    escrow: Address,
}

impl<C: JsonRpcClient> Escrow<C> {
    async fn header(&self, number: BlockNumber) -> Result<Option<Header>, SourceError> {
        let Some(block) = self.provider.get_block(number).await.map_err(failed)? else { return Ok(None) };
        let (Some(number), Some(hash)) = (block.number, block.hash) else {
            return Err(SourceError::Failed("the endpoint gave a block without a number".into()));
        };
        let time_s = u64::try_from(block.timestamp).map_err(|why| SourceError::Failed(format!("a block's time: {why}")))?;
        Ok(Some(Header { number: number.as_u64(), hash: hash.0, parent: block.parent_hash.0, time_s }))
    }
}

#[async_trait]
impl<C: JsonRpcClient> Source for Escrow<C> {
    async fn head(&self) -> Result<Point, SourceError> {
        let head = self.header(BlockNumber::Latest).await?;
        let head = head.ok_or_else(|| SourceError::Failed("the endpoint has no block at all".into()))?;
        Ok(Point { number: head.number, hash: head.hash })
    }

    async fn block(&self, number: u64) -> Result<Option<Header>, SourceError> {
        self.header(number.into()).await
    }

    async fn logs(&self, from: u64, to: u64) -> Result<Vec<Log>, SourceError> {
        let filter = Filter::new().address(self.escrow).from_block(from).to_block(to);
        let logs = self.provider.get_logs(&filter).await.map_err(failed)?;
        logs.into_iter().map(log_of).collect()
    }
}

fn log_of(log: ethers::types::Log) -> Result<Log, SourceError> {
    let missing = |what: &str| SourceError::Failed(format!("the endpoint gave a log without its {what}"));
    Ok(Log {
        block_number: log.block_number.ok_or_else(|| missing("block"))?.as_u64(),
        block_hash: log.block_hash.ok_or_else(|| missing("block's hash"))?.0,
        index: log.log_index.ok_or_else(|| missing("place"))?.as_u64(),
        address: log.address.0,
        topics: log.topics.into_iter().map(|topic| topic.0).collect(),
        data: log.data.to_vec(),
        tx_hash: log.transaction_hash.ok_or_else(|| missing("transaction"))?.0,
        removed: log.removed.unwrap_or(false),
    })
}

fn failed(error: ProviderError) -> SourceError {
    match error.as_error_response() {
        Some(answer) if range_too_large(answer) => SourceError::TooLarge(error.to_string()),
        _ => SourceError::Failed(error.to_string()),
    }
}
