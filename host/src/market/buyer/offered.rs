//! What a node offers, before anything is paid for it.

use std::time::Duration;

use fabstir_plugin_api::chain::{Account, Amount, ModelId, Signature, Terms};
use fabstir_plugin_api::error::{PluginError, Result};

use crate::market::{NATIVE, Prices};

/// The longest and the shortest that a session may last from now on.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);
const SHORTEST: Duration = Duration::from_secs(120);
/// The longest that a deposit may be held back after a session's end.
const LONGEST_WINDOW: Duration = Duration::from_secs(7 * 24 * 3600);

/// A node's terms, as it has sent them.
#[derive(Debug, Clone)]
pub struct Offered {
    pub terms: Terms,
    pub signature: Signature,
    /// How much it delivers ahead of what is paid.
    pub credit: Amount,
}

/// What the terms must be.
pub(super) struct Expected {
    pub client: Account,
    pub model: ModelId,
    /// Those that the node told everybody.
    pub prices: Prices,
    pub now_s: u64,
}

impl Expected {
    /// # Errors
    /// `Unavailable`, with what is wrong: another node may do better.
    pub fn check(&self, terms: &Terms, signer: &Account) -> Result<()> {
        let wrong = |why: String| Err(PluginError::unavailable(format!("the node's terms are not taken: {why}")));
        if !is(&terms.client, &self.client) {
            return wrong("they are for another account".into());
        }
        if !is(signer, &terms.host) {
            return wrong("their signature is not that of the host that they name".into());
        }
        if is(&terms.host, &self.client) {
            return wrong("the host is this very account".into());
        }
        if !is(&terms.model, &self.model) {
            return wrong("they are for another model than the one that the node offers".into());
        }
        if !is(&terms.coin, NATIVE) {
            return wrong("they are in another coin than that of the chain".into());
        }
        let (input, output) = (terms.price_input_per_mtok.0, terms.price_output_per_mtok.0);
        if input > self.prices.input_per_mtok || output > self.prices.output_per_mtok {
            let Prices { input_per_mtok, output_per_mtok } = self.prices;
            return wrong(format!(
                "{input} wei for a million tokens read and {output} for a million generated, where it told {input_per_mtok} and {output_per_mtok}"
            ));
        }
        if terms.expires_s < self.now_s + SHORTEST.as_secs() || terms.expires_s > self.now_s + LONGEST.as_secs() {
            return wrong(format!(
                "the session would end at {} (Unix time), and between 2 minutes and 7 days from now are taken",
                terms.expires_s
            ));
        }
        if terms.settle_window_s > LONGEST_WINDOW.as_secs() {
            return wrong(format!(
                "a deposit could be held back for {} s after its session, and 7 days are taken",
                terms.settle_window_s
            ));
        }
        if terms.valid_until_s <= self.now_s {
            return wrong("they have expired".into());
        }
        Ok(())
    }
}

/// Whether two hexadecimal texts mean the same: accounts are written in both cases.
pub(super) fn is(one: &str, other: &str) -> bool {
    one.eq_ignore_ascii_case(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::market::journal::purchases::tests::bought;

    #[test]
    fn terms_that_are_not_what_was_told_are_not_taken() {
        let now_s = 1_000_000;
        let good = Terms { expires_s: now_s + 3600, valid_until_s: now_s + 60, ..bought("5", 1).terms };
        let expected = Expected {
            client: good.client.to_uppercase().replace("0X", "0x"),
            model: good.model.clone(),
            prices: Prices { input_per_mtok: 1_000_000, output_per_mtok: 4_000_000 },
            now_s,
        };
        expected.check(&good, &good.host).expect("is taken");
        let other = format!("0x{}", "9".repeat(40));
        let bad = [
            (Terms { client: other.clone(), ..good.clone() }, "another account"),
            (Terms { host: other.clone(), ..good.clone() }, "signature"),
            (Terms { model: other.clone(), ..good.clone() }, "another model"),
            (Terms { coin: other, ..good.clone() }, "coin"),
            (Terms { price_input_per_mtok: Amount(1_000_001), ..good.clone() }, "1000001"),
            (Terms { price_output_per_mtok: Amount(4_000_001), ..good.clone() }, "4000001"),
            (Terms { expires_s: now_s + 119, ..good.clone() }, "2 minutes"),
            (Terms { expires_s: now_s + 7 * 86_400 + 1, ..good.clone() }, "7 days"),
            (Terms { settle_window_s: 7 * 86_400 + 1, ..good.clone() }, "held back"),
            (Terms { valid_until_s: now_s, ..good.clone() }, "expired"),
        ];
        for (terms, why) in bad {
            let error = expected.check(&terms, &good.host).expect_err(why);
            assert!(error.message.contains(why), "{error}");
        }
        let own = Terms { host: good.client.clone(), ..good.clone() };
        assert!(expected.check(&own, &own.host).expect_err("its own").message.contains("this very account"));
        // Cheaper than told is fine.
        expected.check(&Terms { price_input_per_mtok: Amount(0), ..good.clone() }, &good.host).expect("is taken");
    }
}
