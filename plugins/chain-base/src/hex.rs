//! Addresses, hashes and amounts between the text of the contract and the chain's numbers.

use ethers::types::{Address, H256, U256};
use fabstir_plugin_api::prelude::*;

/// `0x` and 40 hexadecimal digits.
pub fn address(text: &str) -> Option<Address> {
    bytes::<20>(text).map(Address::from)
}

/// As [`address`], for what a caller gave.
pub fn account(what: &str, text: &str) -> Result<Address> {
    address(text).ok_or_else(|| PluginError::invalid(format!("{what} is no account: it is `0x` and 40 hexadecimal digits")))
}

/// 32 bytes that a caller gave.
pub fn hash(what: &str, text: &str) -> Result<[u8; 32]> {
    bytes(text).ok_or_else(|| PluginError::invalid(format!("{what} is not `0x` and 64 hexadecimal digits")))
}

pub fn account_text(address: Address) -> Account {
    ethers::utils::to_checksum(&address, None)
}

pub fn hash_text(hash: impl Into<H256>) -> Hash32 {
    format!("{:#x}", hash.into())
}

/// An amount of the chain that must fit; contracts of this market hold none that does not.
pub fn amount(value: U256) -> Result<Amount> {
    if value.bits() > 128 {
        return Err(PluginError::internal("the chain gave an amount of more than 128 bits"));
    }
    Ok(Amount(value.as_u128()))
}

fn bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.strip_prefix("0x").filter(|digits| digits.len() == 2 * N && digits.is_ascii())?;
    let mut bytes = [0; N];
    for (place, byte) in bytes.iter_mut().enumerate() {
        let pair = &digits[2 * place..2 * place + 2];
        // `from_str_radix` would take a sign.
        let is_hex = pair.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = is_hex.then(|| u8::from_str_radix(pair, 16).ok()).flatten()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_form_is_read() {
        let zero = format!("0x{}", "0".repeat(40));
        assert_eq!(address(&zero), Some(Address::zero()));
        for wrong in
            ["", "0x", &zero[2..], &zero[..41], &format!("{zero}0"), &zero.replace("00", "+1"), &zero.replace("00", "ää")]
        {
            assert_eq!(address(wrong), None, "{wrong}");
        }
    }
}
