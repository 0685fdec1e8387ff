//! Amounts as people write them.

use fabstir_plugin_api::chain::Amount;

/// The decimals of the coins that Ethereum's chains use.
const DECIMALS: usize = 18;

/// The text is no amount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no amount: write a number and its unit, as in 0.05eth, 20gwei or 1000wei")]
pub struct AmountError(String);

/// Reads `0.05eth`, `20gwei`, `1000wei`. A number without a unit is refused: a factor of 10^18 is not to be guessed.
pub fn parse(text: &str) -> Result<Amount, AmountError> {
    let wrong = || AmountError(text.chars().take(60).collect());
    // `gwei` ends with `wei`, so it comes first.
    let units = [("eth", DECIMALS), ("gwei", 9), ("wei", 0)];
    let (number, decimals) =
        units.iter().find_map(|(unit, decimals)| Some((text.strip_suffix(unit)?.trim_end(), *decimals))).ok_or_else(wrong)?;
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let is_digits = |digits: &str| digits.bytes().all(|digit| digit.is_ascii_digit());
    let has_point = number.contains('.');
    if whole.is_empty() || !is_digits(whole) || !is_digits(part) || part.len() > decimals || (has_point && part.is_empty()) {
        return Err(wrong());
    }
    format!("{whole}{part:0<decimals$}").parse().map(Amount).map_err(|_| wrong())
}

/// An amount in whole coins, without zeros that say nothing.
pub fn coins(amount: Amount, coin: &str) -> String {
    let digits = format!("{:0>1$}", amount.0, DECIMALS + 1);
    let (whole, part) = digits.split_at(digits.len() - DECIMALS);
    match part.trim_end_matches('0') {
        "" => format!("{whole} {coin}"),
        part => format!("{whole}.{part} {coin}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_in_their_unit() {
        for (text, wei) in [
            ("1wei", 1),
            ("20gwei", 20_000_000_000),
            ("0.05eth", 50_000_000_000_000_000),
            ("0.05 eth", 50_000_000_000_000_000),
            ("1.5gwei", 1_500_000_000),
            ("340282366920938463463eth", 340_282_366_920_938_463_463_000_000_000_000_000_000),
            ("0.000000000000000001eth", 1),
        ] {
            assert_eq!(parse(text), Ok(Amount(wei)), "{text}");
        }
    }

    #[test]
    fn what_is_not_certain_is_refused() {
        for text in [
            "",
            "1",
            "eth",
            "-1eth",
            "+1eth",
            "1e3wei",
            "1.eth",
            ".5eth",
            "1.5wei",
            "0.0000000000000000001eth",
            "1,5eth",
            "340282366920938463464eth",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn amounts_are_shown_in_coins() {
        for (wei, shown) in [
            (0, "0 ETH"),
            (1, "0.000000000000000001 ETH"),
            (1_500_000_000_000_000_000, "1.5 ETH"),
            (20_000_000_000_000_000_000, "20 ETH"),
        ] {
            assert_eq!(coins(Amount(wei), "ETH"), shown);
        }
    }
}
