//! Transactions that are neither lost nor sent twice.
//!
//! What is to be done on the chain is an [`Intent`] under a key of the caller's. It is on disk before [`Outbox::plan`] returns, and
//! every transaction signed for it is on disk before it is sent. From there the same bytes are sent again, after a restart too, until
//! one block that is never taken back holds the intent's transaction, or another one under the same nonce.
//!
//! Four rules carry this:
//!
//! - A nonce belongs to one key from its first signature on, and a key to one nonce. A dearer transaction for the same intent has the
//!   same nonce, so that at most one of them can be in the chain. No nonce is ever taken from what is pending somewhere.
//! - Sent is not mined. Only a receipt says that something happened, and only a look at the canonical block after the chain has called
//!   its height final says that it stays.
//! - No answer is not an answer. A receipt that is not there may be withheld by an endpoint that lags: that a nonce went to a foreign
//!   transaction is believed when that transaction is shown, and that a block was taken back when another one stands at its height.
//! - Memory changes after the disk does. Each change is one write, so a crash between any two leaves a state from which the same rules
//!   go on.
//!
//! [`Outbox`] is a state machine without a clock, a task or a connection: it says what is due and is told what came of it. [`Driver`]
//! runs it against an endpoint and a signer.

mod driver;
mod ledger;
mod machine;
#[cfg(test)]
mod simulation;

use serde::{Deserialize, Serialize};

pub use driver::{Driver, DriverError, Pace, Refused, Rpc, RpcError, Signer};
pub use ledger::{Ledger, LedgerError, RedbLedger};
pub use machine::{Action, Event, Outbox, OutboxError, Policy, SendError};

/// A hash of a block or a transaction.
pub type Hash = [u8; 32];

/// What is to be done on the chain, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The caller's name for it, at most 200 bytes: the same key is the same intent, for ever.
    pub key: String,
    pub to: [u8; 20],
    pub value: u128,
    pub data: Vec<u8>,
    pub gas_limit: u64,
    /// Until when it may be signed for the first time, in seconds since 1970. Afterwards its nonce is bound and it is carried through:
    /// a deadline in the contract is what refuses it then.
    pub deadline_s: Option<u64>,
    /// What a unit of gas may cost at most, in wei.
    pub fee_cap: u128,
}

impl Intent {
    /// Whether both do the same on the chain. What it may cost and until when is not part of that: a caller that asks again after its
    /// configuration or an estimate has changed means the intent that is there.
    pub fn is_same_act(&self, other: &Intent) -> bool {
        (&self.key, self.to, self.value, &self.data) == (&other.key, other.to, other.value, &other.data)
    }
}

/// What is offered for a unit of gas, in wei.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fees {
    pub max_fee: u128,
    pub priority_fee: u128,
}

impl Fees {
    /// At least an eighth more in both fields than a transaction that is to be replaced, and what the market asks now if that is more;
    /// `None` where the cap does not allow it. Pools ask for a tenth; an eighth satisfies those that round.
    pub fn above(self, market: Fees, cap: u128) -> Option<Fees> {
        let dearer = |fee: u128| fee.saturating_add(fee.div_ceil(8).max(1));
        let (max_fee, priority_fee) = (dearer(self.max_fee), dearer(self.priority_fee));
        if max_fee > cap || priority_fee > cap {
            return None;
        }
        Some(Fees { max_fee: max_fee.max(market.max_fee), priority_fee: priority_fee.max(market.priority_fee) }.within(cap))
    }

    /// The market's fees as far as the cap allows them.
    pub fn within(self, cap: u128) -> Fees {
        let max_fee = self.max_fee.min(cap);
        Fees { max_fee, priority_fee: self.priority_fee.min(max_fee) }
    }
}

/// A block, by its height and its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRef {
    pub number: u64,
    pub hash: Hash,
}

/// The chain and the account at one moment, as one endpoint sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    pub latest: BlockRef,
    pub safe: BlockRef,
    pub finalized: BlockRef,
    /// How many transactions of the account the chain holds up to `latest`, and up to `safe`: the nonces below are used.
    pub count: u64,
    pub safe_count: u64,
    /// What the market asks for a transaction now.
    pub fees: Fees,
}

/// One transaction that was signed for an intent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    pub fees: Fees,
    pub raw: Vec<u8>,
    pub hash: Hash,
    pub signed_ms: u64,
}

/// A receipt of one of our transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    pub hash: Hash,
    pub block: BlockRef,
    /// False: the contract refused it, and the fee is gone.
    pub succeeded: bool,
    /// All that it cost beside its value, in wei, where the endpoint says so.
    pub fee: Option<u128>,
}

/// Who used a nonce, according to a canonical block that holds the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    pub by: Hash,
    pub block: BlockRef,
}

/// How far an intent is. All but the last three can be followed by any state from `Broadcast` on: blocks are taken back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// On disk, without a nonce.
    Planned,
    /// Signed and bound to its nonce; no endpoint has confirmed that it took it, but one may have.
    Signed,
    /// An endpoint took it. That says nothing about the chain.
    Broadcast,
    Mined(Receipt),
    /// In a block that the chain calls safe.
    Safe(Receipt),
    /// A foreign transaction has its nonce, in a safe block, and the bytes of the row cannot be carried out while it stands. Final once
    /// `settled`: only then may the intent be planned anew under another key, if the contract's state asks for it.
    Replaced {
        used: Used,
        settled: bool,
    },
    /// Carried out, for ever.
    Final(Receipt),
    /// Refused by the contract, for ever. Whether to try again is the caller's to decide from the contract's state.
    Reverted(Receipt),
    /// Never signed, and will not be.
    Dead {
        why: String,
    },
}

impl State {
    /// Nothing changes any more.
    pub fn is_closed(&self) -> bool {
        matches!(self, State::Final(_) | State::Reverted(_) | State::Dead { .. } | State::Replaced { settled: true, .. })
    }

    /// The block that the state rests on.
    pub fn block(&self) -> Option<BlockRef> {
        match self {
            State::Mined(receipt) | State::Safe(receipt) | State::Final(receipt) | State::Reverted(receipt) => {
                Some(receipt.block)
            }
            State::Replaced { used, .. } => Some(used.block),
            State::Planned | State::Signed | State::Broadcast | State::Dead { .. } => None,
        }
    }
}

/// An intent and all that was done for it: what the ledger keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Counts the intents of this ledger in the order in which they were planned.
    pub number: u64,
    pub intent: Intent,
    pub planned_ms: u64,
    /// There from the first signature on, and never another.
    pub nonce: Option<u64>,
    /// Every transaction that was signed, the dearest last. Any of them may be mined.
    pub attempts: Vec<Attempt>,
    pub state: State,
}

/// What holds a row up. Known to memory only: a restart finds it out again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stuck {
    /// A dearer transaction would pass the intent's cap; the last one is sent again and again.
    FeeCap,
    /// The account cannot pay for it.
    InsufficientFunds,
    /// The signer does not sign it now.
    Signer { why: String },
    /// A foreign transaction used the next nonce in a block that is not safe yet; nothing new is signed until it is.
    ForeignNonce,
    /// The row's nonce is used, none of its transactions has a receipt, and no endpoint shows by which transaction.
    NonceUsed,
    /// A nonce below this row's is held by nothing that is known, so the chain waits for it. The next new intent fills it.
    NonceGap,
}

/// A row that has changed, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub row: Row,
    pub stuck: Option<Stuck>,
}
