//! How much may be spent, and in which deposits.

use std::collections::BTreeMap;

use fabstir_plugin_api::chain::{Amount, SessionId};
use fabstir_plugin_api::error::{Code, PluginError};

use crate::market::coins;

/// A deposit is for at least so many times what a node delivers ahead of payment, where the budget has it.
const CREDITS: u128 = 16;
/// The part of the whole budget that a deposit is otherwise.
const PART: u128 = 4;

/// The budget does not allow a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a session with this node takes a deposit of at least {}, and {} of --max-spend {} is left: allow more with --max-spend, \
     or take a cheaper node",
    coins(*.needed, .coin), coins(*.left, .coin), coins(*.most, .coin)
)]
pub struct BudgetError {
    pub needed: Amount,
    pub left: Amount,
    pub most: Amount,
    pub coin: String,
}

impl From<BudgetError> for PluginError {
    fn from(error: BudgetError) -> Self {
        PluginError::new(Code::Denied, error.to_string())
    }
}

/// What may be spent, fees aside, and what of that is in deposits or gone.
#[derive(Debug)]
pub(super) struct Budget {
    most: Amount,
    coin: String,
    taken: BTreeMap<SessionId, Amount>,
}

impl Budget {
    pub fn new(most: Amount, coin: String) -> Self {
        Self { most, coin, taken: BTreeMap::new() }
    }

    pub fn left(&self) -> Amount {
        let taken = self.taken.values().fold(0u128, |sum, taken| sum.saturating_add(taken.0));
        Amount(self.most.0.saturating_sub(taken))
    }

    /// Sets a deposit aside for a session: for a request that needs `prompt`, with a node that delivers `credit` ahead.
    pub fn deposit(&mut self, session: &SessionId, credit: Amount, prompt: Amount) -> Result<Amount, BudgetError> {
        let left = self.left();
        let needed = Amount(credit.0.saturating_add(prompt.0).max(1));
        if left < needed {
            return Err(BudgetError { needed, left, most: self.most, coin: self.coin.clone() });
        }
        let wanted = (self.most.0 / PART).max(credit.0.saturating_mul(CREDITS)).max(needed.0);
        let deposit = left.min(Amount(wanted));
        self.taken.insert(session.clone(), deposit);
        Ok(deposit)
    }

    /// Takes what can still be spent from a deposit that was made before; whether the budget allows it.
    pub fn take(&mut self, session: &SessionId, amount: Amount) -> bool {
        let allowed = self.left() >= amount;
        if allowed {
            self.taken.insert(session.clone(), amount);
        }
        allowed
    }

    /// What a session has come to in the end.
    pub fn spent(&mut self, session: &SessionId, amount: Amount) {
        if let Some(taken) = self.taken.get_mut(session) {
            *taken = amount;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(number: u32) -> SessionId {
        format!("0x{number:064x}")
    }

    #[test]
    fn deposits_are_a_part_of_the_budget_and_never_more_than_is_left() {
        let mut budget = Budget::new(Amount(1000), "ETH".into());
        assert_eq!(budget.deposit(&session(1), Amount(10), Amount(0)), Ok(Amount(250)));
        // Sixteen credits are more than a quarter.
        assert_eq!(budget.deposit(&session(2), Amount(20), Amount(0)), Ok(Amount(320)));
        assert_eq!(budget.deposit(&session(3), Amount(1), Amount(400)), Ok(Amount(401)));
        assert_eq!(budget.deposit(&session(4), Amount(10), Amount(0)), Ok(Amount(29)));
        let refused = budget.deposit(&session(5), Amount(10), Amount(0)).expect_err("nothing is left");
        assert_eq!((refused.needed, refused.left, refused.most), (Amount(10), Amount(0), Amount(1000)));
        assert!(refused.to_string().contains("--max-spend"), "{refused}");
        // What comes back can be spent again.
        budget.spent(&session(1), Amount(50));
        assert_eq!(budget.deposit(&session(6), Amount(10), Amount(0)), Ok(Amount(200)));
    }

    #[test]
    fn a_deposit_of_before_is_used_only_where_the_budget_allows_all_of_it() {
        let mut budget = Budget::new(Amount(100), "ETH".into());
        assert!(!budget.take(&session(1), Amount(101)));
        assert!(budget.take(&session(1), Amount(100)));
        assert_eq!(budget.left(), Amount(0));
    }

    #[test]
    fn deposits_never_exceed_the_budget_however_they_come_and_go() {
        let mut seed = 7u64;
        let mut random = move |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..100 {
            let most = u128::from(random(10_000));
            let mut budget = Budget::new(Amount(most), "ETH".into());
            let mut deposits: BTreeMap<SessionId, u128> = BTreeMap::new();
            for number in 0..50 {
                if let Ok(deposit) = budget.deposit(&session(number), Amount(random(500).into()), Amount(random(500).into())) {
                    deposits.insert(session(number), deposit.0);
                }
                if random(3) == 0
                    && let Some((session, deposit)) = deposits.iter_mut().next_back()
                {
                    *deposit = u128::from(random(*deposit as u64 + 1));
                    budget.spent(session, Amount(*deposit));
                }
                let taken: u128 = deposits.values().sum();
                assert!(taken <= most, "{taken} of {most}");
                assert_eq!(budget.left(), Amount(most - taken));
            }
        }
    }
}
