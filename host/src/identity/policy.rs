//! What a chain plugin may have signed.
//!
//! Chain plugins hold no keys. They bring the very bytes whose hash is signed, the [`Signer`] reads them, and what its [`Policy`] does not
//! allow is refused. Two forms are known, and nothing else is ever signed:
//!
//! - an unsigned transaction of EIP-1559, `0x02 || rlp([chain_id, nonce, max_priority_fee_per_gas, max_fee_per_gas, gas_limit, to, value,
//!   data, access_list])`;
//! - typed data of EIP-712, `0x19 0x01 || domain separator || hash of the struct`, for a domain that the policy names.
//!
//! Each has one encoding: bytes that another reader could take for something else are refused, not interpreted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, MutexGuard};

use super::account::{Account, Address, keccak256};

mod rlp;

use rlp::{Item, Malformed};

/// The limits of what one account signs.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The only chain, by its number.
    pub chain_id: u64,
    /// The only recipients of transactions.
    pub contracts: Vec<[u8; 20]>,
    /// The only domains of typed data, each as its EIP-712 separator.
    pub domains: Vec<[u8; 32]>,
    /// The most that one transaction sends along.
    pub max_value_wei: u128,
    /// The most that one transaction can cost in fees: `gas_limit * max_fee_per_gas`.
    pub max_fee_wei: u128,
    /// The most that the transactions of one day can cost in fees. A replaced transaction counts once, at the highest fee signed for its
    /// nonce.
    pub daily_fee_wei: u128,
}

/// Why something was not signed. Nothing of the kind was signed for the plugin, and asking again does not help, except after
/// `DailyFee`, the next day.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("it is neither an unsigned transaction of EIP-1559 nor typed data of EIP-712")]
    Unknown,
    #[error("its bytes are no transaction: {0}")]
    Malformed(&'static str),
    #[error("it is for the chain {found}, and the key is used on {allowed}")]
    Chain { found: u128, allowed: u64 },
    #[error("it creates a contract")]
    Creation,
    #[error("its recipient {0} is none of the contracts that the key is used with")]
    Recipient(Address),
    #[error("it sends {found} wei, and the limit is {limit}")]
    Value { found: u128, limit: u128 },
    #[error("it can cost {found} wei in fees, and the limit is {limit}")]
    Fee { found: u128, limit: u128 },
    #[error("with it, the transactions of this day can cost {found} wei in fees, and the limit is {limit}")]
    DailyFee { found: u128, limit: u128 },
    #[error("it has an access list")]
    AccessList,
    #[error("its EIP-712 domain is none that the key is used with")]
    Domain,
}

impl From<Malformed> for Refusal {
    fn from(error: Malformed) -> Self {
        Refusal::Malformed(error.0)
    }
}

/// An account and what it may be asked for.
pub struct Signer {
    account: Arc<Account>,
    policy: Policy,
    today: Mutex<Day>,
}

/// The fees of one day, the highest for each nonce.
#[derive(Default)]
struct Day {
    /// Since 1970, in UTC.
    number: u64,
    fees: HashMap<u64, u128>,
}

impl Day {
    /// But for one nonce.
    fn spent(&self, but: Option<u64>) -> u128 {
        let others = self.fees.iter().filter(|(nonce, _)| Some(**nonce) != but);
        others.fold(0u128, |sum, (_, fee)| sum.saturating_add(*fee))
    }
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

impl Signer {
    /// The day's fees begin at zero: whoever starts anew may spend them anew.
    pub fn new(account: impl Into<Arc<Account>>, policy: Policy) -> Signer {
        Signer { account: account.into(), policy, today: Mutex::default() }
    }

    pub fn address(&self) -> Address {
        self.account.address()
    }

    /// Signs the Keccak-256 of `payload`, if the policy allows it: `r || s || v`, with v 27 or 28. The same payload gives the same
    /// signature.
    pub fn sign(&self, payload: &[u8]) -> Result<[u8; 65], Refusal> {
        // A clock before 1970 stays in one day, which allows less, not more.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.sign_at(payload, now)
    }

    /// What the transactions of this day may still cost in fees, in wei.
    pub fn fees_left(&self) -> u128 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.policy.daily_fee_wei.saturating_sub(self.day_of(now).spent(None))
    }

    /// Later days only: a clock that is set back opens no second purse.
    fn day_of(&self, now: Duration) -> MutexGuard<'_, Day> {
        let mut today = self.today.lock();
        let number = now.as_secs() / DAY.as_secs();
        if number > today.number {
            *today = Day { number, fees: HashMap::new() };
        }
        today
    }

    fn sign_at(&self, payload: &[u8], now: Duration) -> Result<[u8; 65], Refusal> {
        match payload {
            [0x02, rest @ ..] => self.allow_transaction(&Transaction::read(rest)?, now)?,
            [0x19, 0x01, rest @ ..] if rest.len() == 64 => {
                if !self.policy.domains.iter().any(|domain| domain == &rest[..32]) {
                    return Err(Refusal::Domain);
                }
            }
            _ => return Err(Refusal::Unknown),
        }
        Ok(self.account.sign_hash(&keccak256(payload)))
    }

    fn allow_transaction(&self, transaction: &Transaction, now: Duration) -> Result<(), Refusal> {
        let policy = &self.policy;
        if transaction.chain_id != u128::from(policy.chain_id) {
            return Err(Refusal::Chain { found: transaction.chain_id, allowed: policy.chain_id });
        }
        let to = transaction.to.ok_or(Refusal::Creation)?;
        if !policy.contracts.contains(&to) {
            return Err(Refusal::Recipient(Address(to)));
        }
        if transaction.value > policy.max_value_wei {
            return Err(Refusal::Value { found: transaction.value, limit: policy.max_value_wei });
        }
        let fee = transaction.fee();
        if fee > policy.max_fee_wei {
            return Err(Refusal::Fee { found: fee, limit: policy.max_fee_wei });
        }
        let mut today = self.day_of(now);
        let spent = today.spent(Some(transaction.nonce));
        let highest = today.fees.get(&transaction.nonce).copied().unwrap_or(0).max(fee);
        let found = spent.saturating_add(highest);
        if found > policy.daily_fee_wei {
            return Err(Refusal::DailyFee { found, limit: policy.daily_fee_wei });
        }
        today.fees.insert(transaction.nonce, highest);
        Ok(())
    }
}

/// What of a transaction the policy looks at.
#[derive(Debug)]
struct Transaction {
    chain_id: u128,
    nonce: u64,
    max_fee_per_gas: u128,
    gas_limit: u128,
    /// `None` creates a contract.
    to: Option<[u8; 20]>,
    value: u128,
}

impl Transaction {
    fn read(bytes: &[u8]) -> Result<Transaction, Refusal> {
        let (item, rest) = rlp::read(bytes)?;
        if !rest.is_empty() {
            return Err(Refusal::Malformed("bytes follow it"));
        }
        let Item::List(mut fields) = item else { return Err(Refusal::Malformed("it is not a list")) };
        let mut next = || -> Result<Item<'_>, Malformed> {
            let (item, rest) = rlp::read(fields)?;
            fields = rest;
            Ok(item)
        };
        let chain_id = next()?.number()?;
        let nonce = u64::try_from(next()?.number()?).map_err(|_| Refusal::Malformed("its nonce has more than 8 bytes"))?;
        let tip = next()?.number()?;
        let max_fee_per_gas = next()?.number()?;
        let gas_limit = next()?.number()?;
        let to = match next()?.bytes()? {
            [] => None,
            to => Some(to.try_into().map_err(|_| Refusal::Malformed("its recipient has not 20 bytes"))?),
        };
        let value = next()?.number()?;
        next()?.bytes()?;
        let Item::List(access_list) = next()? else { return Err(Refusal::Malformed("its access list is not a list")) };
        if !fields.is_empty() {
            return Err(Refusal::Malformed("it has more than nine fields"));
        }
        if !access_list.is_empty() {
            return Err(Refusal::AccessList);
        }
        if tip > max_fee_per_gas {
            return Err(Refusal::Malformed("its tip is above its fee"));
        }
        Ok(Transaction { chain_id, nonce, max_fee_per_gas, gas_limit, to, value })
    }

    /// Stops at the largest number, which is above any limit but itself.
    fn fee(&self) -> u128 {
        self.gas_limit.saturating_mul(self.max_fee_per_gas)
    }
}

#[cfg(test)]
mod tests;
