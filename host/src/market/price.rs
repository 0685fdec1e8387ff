//! What tokens cost.

use fabstir_plugin_api::chain::Amount;

/// Tokens that a price is for.
const MILLION: u128 = 1_000_000;

/// The prices of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prices {
    /// A million tokens read, in wei.
    pub input_per_mtok: u128,
    /// A million tokens generated, in wei.
    pub output_per_mtok: u128,
}

impl Prices {
    /// What so many tokens cost in all: rounded up to a whole wei, as the contract does it. What is more than can be counted is the
    /// most that can, which nobody's deposit covers.
    pub fn of(&self, input_tokens: u64, output_tokens: u64) -> Amount {
        let input = self.input_per_mtok.saturating_mul(input_tokens.into());
        let output = self.output_per_mtok.saturating_mul(output_tokens.into());
        Amount(input.saturating_add(output).div_ceil(MILLION))
    }

    /// Whether nothing is charged.
    pub fn is_free(&self) -> bool {
        self.input_per_mtok == 0 && self.output_per_mtok == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_started_wei_is_a_wei() {
        let prices = Prices { input_per_mtok: 1, output_per_mtok: 2_000_000 };
        assert_eq!(prices.of(0, 0), Amount(0));
        assert_eq!(prices.of(1, 0), Amount(1));
        assert_eq!(prices.of(1_000_000, 0), Amount(1));
        assert_eq!(prices.of(1_000_001, 3), Amount(8));
    }

    #[test]
    fn what_cannot_be_counted_is_more_than_anybody_has() {
        let dear = Prices { input_per_mtok: u128::MAX, output_per_mtok: u128::MAX };
        assert!(dear.of(2, 2).0 >= u128::MAX / MILLION);
    }
}
