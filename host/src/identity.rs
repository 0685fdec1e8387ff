//! Keys; nothing else touches a secret.
//!
//! - The node's key ([`NodeKey`], Ed25519): by it other nodes know this one, and with it the node signs what it says of itself.
//! - A [`GroupKey`] is common to an operator's nodes: what they share is sealed with it.
//! - Account keys ([`Account`], secp256k1): they own money on a chain. A [`Keyring`] keeps them, each in a file of its own that only a
//!   [`Password`] opens.
//! - A [`Signer`] signs with an account what its [`Policy`] allows, for those who hold no key themselves.
//!
//! Whoever needs a secret asks here, holds it in [`Zeroizing`](zeroize::Zeroizing) for no longer than the call, and neither logs nor
//! prints it: no type that holds one has a `Debug` or a `Display` that could do so by accident.

mod account;
mod group_key;
mod keyring;
mod keystore;
mod node_key;
mod policy;
mod private;

pub use account::{Account, Address, NotAKey, recover};
pub use group_key::GroupKey;
pub use keyring::{Entry, KeyError, Keyring, open, read_plain};
pub use keystore::{Password, PasswordError};
pub use node_key::{IdentityError, NodeKey, VerifyError, verify};
pub use policy::{Policy, Refusal, Signer};
