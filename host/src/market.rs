//! Money: what this node has ordered in the market's contracts, and the account that it acts with.
//!
//! The chain plugin holds no key. [`Desk`] answers what it asks to have signed, by the policy of [`crate::identity`], and follows an
//! order until the chain has carried it out or refused it.

mod amount;
mod desk;

pub use amount::{AmountError, coins, parse};
pub use desk::{Desk, DeskError, Limits};
