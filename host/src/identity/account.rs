//! A key that owns money on a chain, in memory.

use std::fmt;

use k256::ecdsa::{RecoveryId, Signature, SigningKey, VerifyingKey};
use sha3::{Digest, Keccak256};
use zeroize::Zeroizing;

use super::private;

/// An account of an Ethereum chain: the last 20 bytes of the Keccak-256 of its public key.
///
/// It is written as EIP-55 says, with capitals that reveal a mistyped digit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub [u8; 20]);

impl Address {
    fn of(key: &VerifyingKey) -> Address {
        let point = key.to_encoded_point(false);
        let hash = keccak256(&point.as_bytes()[1..]);
        Address(hash[12..].try_into().expect("12 and 20 bytes are 32"))
    }

    /// 40 hex digits, with or without `0x`; capitals are not checked.
    pub(super) fn from_hex(text: &str) -> Option<Address> {
        let mut bytes = [0; 20];
        hex::decode_to_slice(text.strip_prefix("0x").unwrap_or(text), &mut bytes).ok()?;
        Some(Address(bytes))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = hex::encode(self.0);
        let hash = hex::encode(keccak256(digits.as_bytes()));
        f.write_str("0x")?;
        for (digit, by) in digits.chars().zip(hash.chars()) {
            write!(f, "{}", if by >= '8' { digit.to_ascii_uppercase() } else { digit })?;
        }
        Ok(())
    }
}

/// The bytes or digits are no secp256k1 key. The text says why without repeating them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAKey {
    #[error("a key is 64 hex digits, with or without 0x before them")]
    Digits,
    /// Zero, or not below the order of the group.
    #[error("no account has this number as its key")]
    Range,
}

/// A secp256k1 key. It is overwritten when it is dropped.
pub struct Account(SigningKey);

impl Account {
    /// A new key.
    pub fn random() -> Result<Account, getrandom::Error> {
        let mut secret = Zeroizing::new([0; 32]);
        loop {
            getrandom::fill(&mut *secret)?;
            // Fails for one of 2^128 numbers.
            if let Ok(account) = Account::from_bytes(&secret) {
                return Ok(account);
            }
        }
    }

    pub fn from_bytes(secret: &[u8; 32]) -> Result<Account, NotAKey> {
        SigningKey::from_slice(secret).map(Account).map_err(|_| NotAKey::Range)
    }

    /// A key as wallets export it: 64 hex digits, with or without `0x`, and white space around them.
    pub fn from_hex(text: &[u8]) -> Result<Account, NotAKey> {
        let text = text.trim_ascii();
        let mut secret = Zeroizing::new([0; 32]);
        hex::decode_to_slice(text.strip_prefix(b"0x").unwrap_or(text), &mut *secret).map_err(|_| NotAKey::Digits)?;
        Account::from_bytes(&secret)
    }

    /// Reads what [`Account::from_hex`] takes, from a pipe.
    pub fn read_hex(source: impl std::io::Read) -> Result<Account, NotAKey> {
        let text = private::read_from(source, MOST).map_err(|_| NotAKey::Digits)?;
        Account::from_hex(&text)
    }

    pub fn address(&self) -> Address {
        Address::of(self.0.verifying_key())
    }

    /// `r || s || v` over a hash of 32 bytes: v is 27 or 28, and s the smaller of its two values, as chains require. The same hash gives
    /// the same signature (RFC 6979). The caller knows what the hash stands for.
    pub(super) fn sign_hash(&self, hash: &[u8; 32]) -> [u8; 65] {
        let (signature, id) = self.0.sign_prehash_recoverable(hash).expect("a hash of 32 bytes can be signed");
        let mut bytes = [0; 65];
        bytes[..64].copy_from_slice(&signature.to_bytes());
        // The other half of the id is set for one of 2^128 signatures, and chains cannot say it.
        bytes[64] = 27 + u8::from(id.is_y_odd());
        bytes
    }

    pub(super) fn secret(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes().into())
    }
}

/// The most bytes in which a key may be written, white space included.
pub(super) const MOST: usize = 256;

/// Who made a signature over a hash. `None` where nobody did, or where it is not in the one form that chains accept: v 27 or 28, and s
/// the smaller of its two values.
pub fn recover(hash: &[u8; 32], signature: &[u8; 65]) -> Option<Address> {
    let odd = match signature[64] {
        27 => false,
        28 => true,
        _ => return None,
    };
    let signature = Signature::from_slice(&signature[..64]).ok()?;
    if signature.normalize_s().is_some() {
        return None;
    }
    let key = VerifyingKey::recover_from_prehash(hash, &signature, RecoveryId::new(odd, false)).ok()?;
    Some(Address::of(&key))
}

pub(super) fn keccak256(bytes: &[u8]) -> [u8; 32] {
    Keccak256::digest(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_the_capitals_of_eip_55() {
        for address in [
            "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
            "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
            "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
            "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
            "0x52908400098527886E0F7030069857D2E4169EE7",
            "0xde709f2102306220921060314715629080e2fb77",
        ] {
            let parsed = Address::from_hex(&address.to_lowercase()).expect("40 digits");
            assert_eq!(parsed.to_string(), address);
        }
    }

    #[test]
    fn a_key_has_the_address_that_others_compute() {
        // The first account of anvil and hardhat, and the key of the Web3 Secret Storage vectors.
        for (key, address) in [
            ("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80", "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"),
            ("7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d", "0x008AeEda4D805471dF9b2A5B0f38A0C3bCBA786b"),
        ] {
            for text in [key.to_string(), format!("0x{key}\n"), format!(" {}\r\n", key.to_uppercase())] {
                assert_eq!(Account::from_hex(text.as_bytes()).expect("a key").address().to_string(), address);
            }
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let order = "fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141";
        let refused = |text: &str| Account::from_hex(text.as_bytes()).err();
        for (text, why) in [
            ("", NotAKey::Digits),
            ("0x", NotAKey::Digits),
            (&order[1..], NotAKey::Digits),
            (&"0".repeat(65), NotAKey::Digits),
            (&"x".repeat(64), NotAKey::Digits),
            (&"0".repeat(64), NotAKey::Range),
            (order, NotAKey::Range),
        ] {
            assert_eq!(refused(text), Some(why), "{text}");
        }
        assert_eq!(refused(&order.replace("4141", "4140")), None, "the largest key");
        assert_eq!(Account::read_hex(&[b' '; 1 << 20][..]).err(), Some(NotAKey::Digits));
    }

    #[test]
    fn signatures_are_those_that_others_make() {
        // web3's documentation: `eth.accounts.sign("Some data", KEY)`.
        let key = b"0x4c0883a69102937d6231471b5dbb6204fe5129617082792ae468d01a3f362318";
        let account = Account::from_hex(key).expect("a key");
        assert_eq!(account.address().to_string(), "0x2c7536E3605D9C16a7a3D7b1898e529396a65c23");
        let hash = keccak256(b"\x19Ethereum Signed Message:\n9Some data");
        assert_eq!(hex::encode(hash), "1da44b586eb0729ff70a73c326926f6ed5a25f5b056e7f47fbc6e58d86871655");
        let signature = account.sign_hash(&hash);
        assert_eq!(
            hex::encode(signature),
            "b91467e570a6466aa9e9876cbcd013baba02900b8979d43fe208a4a4f339f5fd6007e74cd82e037b800186422fc2da167c747ef045e5d18a5f5d4300f8e1a0291c"
        );
        assert_eq!(recover(&hash, &signature), Some(account.address()));
    }

    #[test]
    fn a_signature_has_one_form_and_one_author() {
        let account = Account::from_bytes(&[7; 32]).expect("a key");
        for round in 0..64 {
            let hash = keccak256(&[round]);
            let signature = account.sign_hash(&hash);
            assert_eq!(recover(&hash, &signature), Some(account.address()));
            assert_ne!(recover(&keccak256(&[round, 0]), &signature), Some(account.address()));
            let mut other = signature;
            // The same signature with the larger s, which the curve accepts and chains do not.
            let parsed = Signature::from_slice(&signature[..64]).expect("a signature");
            let (r, s) = parsed.split_scalars();
            let large = Signature::from_scalars(r.to_bytes(), (-*s).to_bytes()).expect("a signature");
            other[..64].copy_from_slice(&large.to_bytes());
            other[64] = 27 + 28 - signature[64];
            assert_eq!(recover(&hash, &other), None);
            for v in [0, 1, 26, 29] {
                other = signature;
                other[64] = v;
                assert_eq!(recover(&hash, &other), None);
            }
        }
        assert_eq!(recover(&[1; 32], &[0; 65]), None);
    }

    #[test]
    fn new_keys_differ() {
        let key = || Account::random().expect("random numbers").address();
        assert_ne!(key(), key());
    }
}
