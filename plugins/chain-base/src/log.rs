//! The log cursor: turns blocks into an ordered stream without gaps, and says what a reorganisation has taken back.
//!
//! A [`Reader`] knows nothing of a transport. It asks a [`Source`], one round at a time, and believes an answer only where the
//! chain was the same before and after it. What could not be read is an error, and an error leaves the cursor where it was: the same
//! blocks are asked for again. So everything is told at least once, in the order of the chain.
//!
//! A round's questions must be answered by one endpoint: two of them may be on two forks, and then each is right.

mod cursor;
#[cfg(test)]
mod simulation;

use std::collections::BTreeMap;

use async_trait::async_trait;
use futures::future::try_join_all;
use thiserror::Error;

pub use cursor::{Cursor, Hash, Point};

/// What a round asks of the chain.
#[async_trait]
pub trait Source: Send + Sync {
    /// The newest block.
    async fn head(&self) -> Result<Point, SourceError>;

    /// The block with this number on the chain of the moment; `None` where it has none.
    async fn block(&self, number: u64) -> Result<Option<Header>, SourceError>;

    /// All logs of the market in these blocks, both included. An answer that is not complete must be an error.
    async fn logs(&self, from: u64, to: u64) -> Result<Vec<Log>, SourceError>;
}

/// A block, as far as the reader needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub number: u64,
    pub hash: Hash,
    pub parent: Hash,
    /// Seconds since 1970.
    pub time_s: u64,
}

impl Header {
    fn point(&self) -> Point {
        Point { number: self.number, hash: self.hash }
    }
}

/// A log, as `eth_getLogs` tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    pub block_number: u64,
    pub block_hash: Hash,
    /// Its place in the block.
    pub index: u64,
    pub address: [u8; 20],
    pub topics: Vec<Hash>,
    pub data: Vec<u8>,
    pub tx_hash: Hash,
    /// The endpoint says that it was taken back. No answer about blocks of now has such a log.
    pub removed: bool,
}

/// Why a source has no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SourceError {
    /// So many blocks or logs are not answered at once: fewer may be.
    #[error("the endpoint refuses so large a range: {0}")]
    TooLarge(String),
    #[error("{0}")]
    Failed(String),
}

/// Why a round told nothing. The reader is where it was before it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RoundError {
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The chain changed while it was read: the next round reads it as it is then.
    #[error("the chain changed at block {0} while it was read")]
    Moved(u64),
    /// The endpoint has not come as far as the cursor: nothing is known to be taken back.
    #[error("the endpoint is at block {head}, and block {cursor} has been told already")]
    Behind { head: u64, cursor: u64 },
    /// The answers contradict each other or what was asked.
    #[error("the endpoint's answers make no sense: {0}")]
    Malformed(String),
}

/// Something for whoever follows the market.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    Log {
        cursor: Cursor,
        block: Header,
        log: Log,
    },
    /// Everything up to the end of this block has been told.
    UpTo {
        cursor: Cursor,
        block: Header,
    },
    /// The chain still agrees with all that was told in blocks up to `cursor.at().number`; every log of a later block is taken back.
    /// `None`: all of them are.
    Back {
        cursor: Option<Cursor>,
    },
}

/// What a round has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    pub notices: Vec<Notice>,
    /// There is more to read now: the next round need not wait for a new block.
    pub more: bool,
}

/// How many blocks the first round asks for: what the plans with the lowest limits nearly allow.
const FIRST_SPAN: u64 = 8;
/// How many blocks a round asks for at most.
const WIDEST_SPAN: u64 = 2_000;
/// After a range was refused, so many are read before a wider one is tried: an endpoint that has a limit is not tried every time.
const PATIENCE: u32 = 16;
/// How many headers are asked for at the same time.
const HEADERS_AT_ONCE: usize = 8;

/// Reads the market's logs, round by round.
#[derive(Debug)]
pub struct Reader {
    first_block: u64,
    cursor: Option<Cursor>,
    span: u64,
    patience: u32,
}

impl Reader {
    /// Goes on after the cursor, or begins with `first_block` where there is none.
    pub fn new(first_block: u64, after: Option<Cursor>) -> Self {
        Self { first_block, cursor: after, span: FIRST_SPAN, patience: 0 }
    }

    /// Where the reading stands: the cursor of the last notice.
    #[cfg(test)]
    fn cursor(&self) -> Option<&Cursor> {
        self.cursor.as_ref()
    }

    /// Reads the next blocks, or finds out how far the chain has been taken back.
    ///
    /// # Errors
    /// Nothing was told, and the next round begins where this one did. Also true when the future is dropped.
    pub async fn round(&mut self, source: &dyn Source) -> Result<Round, RoundError> {
        let head = source.head().await?;
        let from = match &self.cursor {
            None => self.first_block,
            // Some of the block's logs may be left to tell.
            Some(cursor) if cursor.index().is_some() => cursor.at().number,
            Some(cursor) => cursor.at().number.saturating_add(1),
        };
        if self.cursor.is_none() && from > head.number {
            return Ok(Round { notices: Vec::new(), more: false });
        }
        if let Some(cursor) = self.cursor.clone()
            && from > head.number
        {
            return Ok(match standing(source, &cursor, head).await? {
                Standing::Agrees(block) => Round { notices: vec![Notice::UpTo { cursor, block }], more: false },
                Standing::Left(ancestor) => self.go_back(ancestor),
            });
        }
        self.read(source, from, head).await
    }

    fn go_back(&mut self, cursor: Option<Cursor>) -> Round {
        self.cursor.clone_from(&cursor);
        Round { notices: vec![Notice::Back { cursor }], more: true }
    }

    /// Reads from `from` on, in a range that the endpoint answers.
    async fn read(&mut self, source: &dyn Source, from: u64, head: Point) -> Result<Round, RoundError> {
        loop {
            let to = head.number.min(from.saturating_add(self.span - 1));
            let width = to - from + 1;
            let end = header(source, to).await?;
            if to == head.number && end.hash != head.hash {
                return Err(RoundError::Moved(to));
            }
            // Asked between the two looks at the end of the range: so the cursor's block is known to lie under it.
            if let Some(cursor) = &self.cursor
                && let Standing::Left(ancestor) = standing(source, cursor, head).await?
            {
                return Ok(self.go_back(ancestor));
            }
            let logs = match source.logs(from, to).await {
                Ok(logs) => logs,
                Err(error) => {
                    // An endpoint for which a range is too much may only say that it failed, or nothing before the time is over.
                    self.span = (width / 2).max(1);
                    match error {
                        SourceError::TooLarge(_) if width > 1 => {
                            self.patience = PATIENCE;
                            continue;
                        }
                        error => return Err(error.into()),
                    }
                }
            };
            let logs = in_order(logs, from, to)?;
            let headers = headers(source, &logs, end).await?;
            if header(source, to).await? != end {
                return Err(RoundError::Moved(to));
            }
            let notices = self.tell(logs, &headers, end)?;
            if let Some(Notice::UpTo { cursor, .. }) = notices.last() {
                self.cursor = Some(cursor.clone());
            }
            self.widen(width);
            return Ok(Round { notices, more: to < head.number });
        }
    }

    /// Makes the notices of a range whose end is `end`. All that is known of the chain must fit together, or nothing is told.
    fn tell(&self, logs: Vec<Log>, headers: &BTreeMap<u64, Header>, end: Header) -> Result<Vec<Notice>, RoundError> {
        let mut known = BTreeMap::new();
        let mut learn = |number, hash| match known.insert(number, hash) {
            Some(other) if other != hash => Err(RoundError::Moved(number)),
            _ => Ok(()),
        };
        if let Some(cursor) = &self.cursor {
            cursor.ladder().iter().chain([&cursor.at()]).try_for_each(|point| learn(point.number, point.hash))?;
        }
        for header in headers.values() {
            learn(header.number, header.hash)?;
            // The parent is one more point of the ladder, and costs nothing.
            if let Some(before) = header.number.checked_sub(1) {
                learn(before, header.parent)?;
            }
        }
        let points = |below: u64| known.range(..below).map(|(&number, &hash)| Point { number, hash });

        let mut notices = Vec::with_capacity(logs.len() + 1);
        for log in logs {
            let block = *headers.get(&log.block_number).ok_or_else(|| absent(log.block_number))?;
            if block.hash != log.block_hash {
                return Err(RoundError::Moved(log.block_number));
            }
            if self.cursor.as_ref().is_some_and(|cursor| told(cursor, &log)) {
                continue;
            }
            let cursor = Cursor::new(block.point(), Some(log.index), points(block.number));
            notices.push(Notice::Log { cursor, block, log });
        }
        notices.push(Notice::UpTo { cursor: Cursor::new(end.point(), None, points(end.number)), block: end });
        Ok(notices)
    }

    /// A range was answered: the next may be wider, unless a wider one was refused not long ago.
    fn widen(&mut self, answered: u64) {
        self.patience = self.patience.saturating_sub(1);
        // Near the head ranges are short because there are no more blocks: that says nothing on what the endpoint would answer.
        if answered == self.span && self.patience == 0 {
            self.span = (self.span * 2).min(WIDEST_SPAN);
        }
    }
}

/// How the chain of the moment stands to a cursor.
enum Standing {
    /// The cursor's block is on it.
    Agrees(Header),
    /// It is not; the chain agrees up to here, or, where nothing is known on which it does, nowhere.
    Left(Option<Cursor>),
}

/// Looks whether the chain still has the cursor's block, and if not goes down the ladder to one that it has.
async fn standing(source: &dyn Source, cursor: &Cursor, head: Point) -> Result<Standing, RoundError> {
    let behind = head.number < cursor.at().number;
    if !behind {
        let block = header(source, cursor.at().number).await?;
        if block.hash == cursor.at().hash {
            return Ok(Standing::Agrees(block));
        }
    }
    let mut left = !behind;
    for (rung, point) in cursor.ladder().iter().enumerate().filter(|(_, point)| point.number <= head.number) {
        if header(source, point.number).await?.hash != point.hash {
            left = true;
        } else if left {
            return Ok(Standing::Left(cursor.back_to(rung)));
        } else {
            // An endpoint that lags has a shorter chain, but no other one. Whether the cursor's block is still there it cannot say.
            break;
        }
    }
    if left { Ok(Standing::Left(None)) } else { Err(RoundError::Behind { head: head.number, cursor: cursor.at().number }) }
}

/// Whether a log of the cursor's own block was told already.
fn told(cursor: &Cursor, log: &Log) -> bool {
    log.block_number == cursor.at().number && cursor.index().is_some_and(|index| log.index <= index)
}

/// The logs in the order of the chain, if the range may have them.
fn in_order(mut logs: Vec<Log>, from: u64, to: u64) -> Result<Vec<Log>, RoundError> {
    logs.sort_by_key(|log| (log.block_number, log.index));
    for log in &logs {
        if !(from..=to).contains(&log.block_number) {
            let number = log.block_number;
            return Err(RoundError::Malformed(format!("a log of block {number} among those of {from} to {to}")));
        }
        if log.removed {
            return Err(RoundError::Malformed(format!("log {} of block {} is marked as removed", log.index, log.block_number)));
        }
    }
    match logs.windows(2).find(|pair| (pair[0].block_number, pair[0].index) == (pair[1].block_number, pair[1].index)) {
        Some(pair) => Err(RoundError::Malformed(format!("log {} of block {} comes twice", pair[0].index, pair[0].block_number))),
        None => Ok(logs),
    }
}

/// The blocks that the logs are in, and the one that the range ends with.
async fn headers(source: &dyn Source, logs: &[Log], end: Header) -> Result<BTreeMap<u64, Header>, RoundError> {
    let mut headers = BTreeMap::from([(end.number, end)]);
    let mut numbers: Vec<u64> = logs.iter().map(|log| log.block_number).filter(|&number| number != end.number).collect();
    numbers.dedup();
    for some in numbers.chunks(HEADERS_AT_ONCE) {
        let found = try_join_all(some.iter().map(|&number| header(source, number))).await?;
        headers.extend(found.into_iter().map(|header| (header.number, header)));
    }
    Ok(headers)
}

/// A block that the chain must have, since its head is not below it.
async fn header(source: &dyn Source, number: u64) -> Result<Header, RoundError> {
    let header = source.block(number).await?.ok_or_else(|| absent(number))?;
    if header.number != number {
        return Err(RoundError::Malformed(format!("asked for block {number}, it answered with block {}", header.number)));
    }
    Ok(header)
}

fn absent(number: u64) -> RoundError {
    RoundError::Malformed(format!("block {number} is missing, though the head is not below it"))
}
