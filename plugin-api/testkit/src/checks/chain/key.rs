//! The accounts that checks act for.

use std::ops::Neg;

use fabstir_plugin_api::chain::{Account, Signature};
use k256::ecdsa::SigningKey;
use sha3::{Digest, Keccak256};

/// The accounts that development chains give money to: those of the words `test` (eleven times) `junk`. Each with the check that acts
/// for it, since two that act for one account at once would take each other's place.
const DEVELOPMENT: [(&str, &str); 10] = [
    ("revert-is-told, somebody else", "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"),
    ("order-is-carried-out", "59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d"),
    ("same-key-is-one-order", "5de4111afa1a4b94908f83103eb1f1706367c2e68ca870fc3fb9a804cdab365a"),
    ("order-survives-restart", "7c852118294e51e653712a81e05800f419141751be58f605c371e15141b007a6"),
    ("refusal-is-final", "47e179ec197488593b187f80a00eb0da91f1b9d0b13f8733639f19c30a34926a"),
    ("revert-is-told", "8b3a350cf5c34c9194ca85829a2df0ec3153be0318b5e2d3348e872092edffba"),
    ("events-resume", "92db14e403b83dfe3df233f83dfa3a0d7096f21ca9b0d6d6b8d88b2b4ec1564e"),
    ("wrong-signature-is-refused", "4bbbf85ce3377467afe5d46f804f221813b2bb87f24d81f60f1fcdbf7cbf4356"),
    ("vouchers-are-paid, host", "dbda1821b80551c9d65939329250298aa3472ba22feea921c0cf5d620ea67b97"),
    ("vouchers-are-paid, client", "2a871d0798f97d79848a013d4936a73bf4cc922c825d33c1cf7073dff6d409c6"),
];

#[derive(Clone)]
pub struct Key {
    secret: SigningKey,
    pub account: Account,
}

impl Key {
    /// The well-known account that nobody else acts for.
    ///
    /// # Panics
    /// Where the table has no account for this.
    pub fn development(whose: &str) -> Self {
        let found = DEVELOPMENT.iter().find(|(name, _)| *name == whose);
        let (_, digits) = found.unwrap_or_else(|| panic!("no development account is set aside for {whose}"));
        let byte = |at: usize| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).expect("the table is hexadecimal");
        Self::from_bytes(&std::array::from_fn(byte))
    }

    /// The same account in every run, without money.
    pub fn made_of(seed: &str) -> Self {
        Self::from_bytes(blake3::hash(format!("fabstir plugin check {seed}").as_bytes()).as_bytes())
    }

    fn from_bytes(bytes: &[u8; 32]) -> Self {
        let secret = SigningKey::from_bytes(bytes.into()).expect("all but one of 2^128 keys are valid");
        let point = secret.verifying_key().to_encoded_point(false);
        let hash = Keccak256::digest(&point.as_bytes()[1..]);
        let digits: String = hash[12..].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { secret, account: format!("0x{digits}") }
    }

    /// A signature over the Keccak-256 of a payload, with the lower s.
    pub fn sign(&self, payload: &[u8]) -> Signature {
        let (signature, recovery) =
            self.secret.sign_prehash_recoverable(&Keccak256::digest(payload)).expect("a hash of 32 bytes can be signed");
        [&signature.to_bytes()[..], &[27 + recovery.to_byte()]].concat()
    }

    /// The other signature that the curve takes for the same payload, and the chain does not.
    pub fn sign_with_high_s(&self, payload: &[u8]) -> Signature {
        let low = self.sign(payload);
        let signature = k256::ecdsa::Signature::from_slice(&low[..64]).expect("was just made");
        let (r, s) = signature.split_scalars();
        let high = k256::ecdsa::Signature::from_scalars(r.to_bytes(), s.neg().to_bytes()).expect("neither is zero");
        [&high.to_bytes()[..], &[27 + 28 - low[64]]].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_those_that_development_chains_give_money_to() {
        let accounts = DEVELOPMENT.map(|(name, _)| Key::development(name).account);
        let expected = [
            "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266",
            "0x70997970c51812dc3a010c7d01b50e0d17dc79c8",
            "0x3c44cdddb6a900fa2b585dd299e03d12fa4293bc",
            "0x90f79bf6eb2c4f870365e785982e1f101e93b906",
            "0x15d34aaf54267db7d7c367839aaf71a00a2c6a65",
            "0x9965507d1a55bcc2695c58ba16fb37d819b0a4dc",
            "0x976ea74026e726554db657fa54763abd0c3a0aa9",
            "0x14dc79964da2c08b23698b3d3cc7ca32193d9955",
            "0x23618e81e3f5cdf7f54c3d65f7fbc0abf5b21e8f",
            "0xa0ee7a142d267c1f36714e4a8f75612f20a79720",
        ];
        assert_eq!(accounts, expected);
    }

    #[test]
    fn s_is_low_and_can_be_made_high() {
        let (key, payload) = (Key::made_of("signer"), b"payload");
        let (low, high) = (key.sign(payload), key.sign_with_high_s(payload));
        assert_eq!((low.len(), high.len()), (65, 65));
        assert_eq!(low[..32], high[..32]);
        assert!(low[32] < 0x80 && high[32] >= 0x7f, "{:x} {:x}", low[32], high[32]);
        assert_eq!(u16::from(low[64]) + u16::from(high[64]), 55);
    }
}
