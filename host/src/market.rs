//! Money: what this node sells and buys in the market's contracts, and the account that it acts with.
//!
//! ```text
//! journal.rs     what was promised and ordered, on disk before it is acted on
//! desk.rs        orders to the chain plugin, and what it asks to have signed
//! history.rs     what has happened on the chain
//! earnings.rs    what this node has earned, as its journal has it
//! price.rs       what tokens cost; amount.rs: amounts as people write them
//! posting.rs     what a posted job asks for, and what comes of it
//! transcript.rs  what both sides of a paid session agree was said
//! seller.rs      the node as one who is paid
//! buyer.rs       this account as one who pays
//! ```
//!
//! The chain plugin holds no key. [`Desk`] answers what it asks to have signed, by the policy of [`crate::identity`], and follows an
//! order until the chain has carried it out or refused it.

mod amount;
pub mod buyer;
mod desk;
pub mod earnings;
pub mod history;
pub mod journal;
pub mod posting;
mod price;
pub mod proving;
pub mod seller;
pub mod transcript;

pub use amount::{AmountError, coins, parse};
pub use buyer::{Buyer, BuyerError};
pub use desk::{Desk, DeskError, Limits};
pub use journal::{Journal, JournalError};
pub use price::Prices;
pub use seller::{Seller, SellerError};

/// The chain's own coin, where a coin is named.
pub const NATIVE: &str = "0x0000000000000000000000000000000000000000";
