//! The file of an account key: Ethereum's Web3 Secret Storage, version 3, as geth, foundry and most wallets read and write it.
//!
//! ```text
//! derived    = scrypt(password, salt, n, r, p), or PBKDF2-HMAC-SHA256(password, salt, c)       32 bytes
//! ciphertext = AES-128-CTR(key = derived[0..16], iv) over the 32 bytes of the key
//! mac        = Keccak-256(derived[16..32] || ciphertext)
//! ```
//!
//! <https://ethereum.org/developers/docs/data-structures-and-encoding/web3-secret-storage/>
//!
//! The parts are RustCrypto's; only the order above is ours. The crate `eth-keystore`, which foundry uses, would spare these lines, but
//! it derives with n = 8192, a thirty-second of what geth takes and of what this module writes; it takes any cost that a file asks for,
//! panics on a short initialization vector, compares the code with `==`, and leaves keys in memory. In the tests it is the other side.
//!
//! The code does not cover the initialization vector: a damaged one gives another key without a word. What is written here holds the
//! address, and the address is compared.

use std::path::{Path, PathBuf};

use aes::cipher::{KeyIvInit, StreamCipher};
use pbkdf2::pbkdf2_hmac_array;
use pbkdf2::sha2::Sha256;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::account::{Account, Address, keccak256};
use super::private::{self, Unread};

type Cipher = ctr::Ctr128BE<aes::Aes128>;

/// The most bytes of a file; real ones have about 500.
pub(super) const MOST: usize = 16 << 10;

const MIB: u64 = 1 << 20;

/// The most memory that a file may ask for; geth's, like ours, ask for 256 MiB.
const MOST_MEMORY: u64 = 512 * MIB;

/// The most blocks that scrypt may mix, `n * r * p`: eight times as many as geth's files, a few seconds.
const MOST_BLOCKS: u64 = 1 << 24;

/// The most rounds of PBKDF2; geth's and OpenEthereum's files have 262,144 and 10,240.
const MOST_ROUNDS: u32 = 10_000_000;

/// What opens a file. It is overwritten when it is dropped.
pub struct Password(Zeroizing<Vec<u8>>);

/// Why there is no password.
#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    #[error("the password is empty")]
    Empty,
    /// Other programs would take the first line alone, so the file could not be opened there.
    #[error("the password has more than one line")]
    Lines,
    #[error(
        "the password file {} has mode {mode:04o}: other users of this machine can read it. Run `chmod 600 {}` if none of them may have",
        path.display(), path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("the password file {} cannot be read: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
}

impl Password {
    /// The most bytes of a password.
    const MOST: usize = 4096;

    pub fn new(text: Zeroizing<Vec<u8>>) -> Result<Password, PasswordError> {
        match text.as_slice() {
            [] => Err(PasswordError::Empty),
            text if text.contains(&b'\n') => Err(PasswordError::Lines),
            _ => Ok(Password(text)),
        }
    }

    /// The only line of a file that nobody but its owner may read.
    pub fn read(path: &Path) -> Result<Password, PasswordError> {
        let unreadable = |reason: String| PasswordError::Unreadable { path: path.to_owned(), reason };
        let mut text = private::read(path, Password::MOST).map_err(|error| match error {
            Unread::Exposed { mode } => PasswordError::Exposed { path: path.to_owned(), mode },
            Unread::NotAFile => unreadable("it is not a file".into()),
            Unread::TooLong => unreadable(format!("it has more than {} bytes", Password::MOST)),
            Unread::Io(reason) => unreadable(reason.to_string()),
        })?;
        for end in [b'\n', b'\r'] {
            if text.last() == Some(&end) {
                text.pop();
            }
        }
        Password::new(text)
    }

    pub fn is(&self, other: &Password) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

/// Why a file gives no key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum OpenError {
    /// The file is not what it should be. The reason repeats nothing of it: it may be a key that someone mistook for a keystore.
    Damaged(String),
    /// The code does not fit: the password is wrong, or the ciphertext, the code or the salt were changed.
    Password,
}

#[derive(Serialize, Deserialize)]
struct File {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    #[serde(alias = "Crypto")]
    crypto: Crypto,
    #[serde(default)]
    id: Value,
    version: u64,
}

#[derive(Serialize, Deserialize)]
struct Crypto {
    cipher: String,
    cipherparams: CipherParams,
    ciphertext: String,
    kdf: String,
    kdfparams: Value,
    mac: String,
}

#[derive(Serialize, Deserialize)]
struct CipherParams {
    iv: String,
}

#[derive(Deserialize)]
struct ScryptParams {
    dklen: u64,
    n: u64,
    r: u32,
    p: u32,
    salt: String,
}

#[derive(Deserialize)]
struct Pbkdf2Params {
    dklen: u64,
    c: u32,
    prf: String,
    salt: String,
}

/// How much work it is to try a password.
#[derive(Clone, Copy)]
pub(super) struct Cost {
    pub log_n: u8,
    pub r: u32,
    pub p: u32,
}

/// What geth takes: 256 MiB, and about a second.
pub(super) const STANDARD: Cost = Cost { log_n: 18, r: 8, p: 1 };

/// Writes a key down so that only the password gives it back. Takes as long as `cost` says.
pub(super) fn seal(account: &Account, password: &Password, cost: Cost) -> Result<String, getrandom::Error> {
    let (mut salt, mut iv) = ([0; 32], [0; 16]);
    getrandom::fill(&mut salt)?;
    getrandom::fill(&mut iv)?;
    let derived = derive(password, &salt, cost).expect("the cost is one of ours");
    let mut text = account.secret();
    cipher(&derived, &iv).apply_keystream(&mut *text);
    let crypto = Crypto {
        cipher: "aes-128-ctr".into(),
        cipherparams: CipherParams { iv: hex::encode(iv) },
        ciphertext: hex::encode(*text),
        kdf: "scrypt".into(),
        kdfparams: json!({ "dklen": 32, "n": 1u64 << cost.log_n, "p": cost.p, "r": cost.r, "salt": hex::encode(salt) }),
        mac: hex::encode(mac(&derived, &*text)),
    };
    let id = Value::String(uuid::Uuid::new_v4().to_string());
    let file = File { address: Some(hex::encode(account.address().0)), crypto, id, version: 3 };
    Ok(serde_json::to_string(&file).expect("text and numbers can be written") + "\n")
}

/// The key in a file. Takes as long as the file says, within limits.
pub(super) fn open(text: &[u8], password: &Password) -> Result<Account, OpenError> {
    let damaged = |reason: &str| OpenError::Damaged(reason.into());
    let file = parse(text)?;
    if file.version != 3 {
        return Err(OpenError::Damaged(format!("it has version {}, and only 3 is known", file.version)));
    }
    let crypto = &file.crypto;
    if crypto.cipher != "aes-128-ctr" {
        return Err(damaged("its cipher is not aes-128-ctr"));
    }
    let iv: [u8; 16] = bytes(&crypto.cipherparams.iv, "its iv is not 16 bytes in hex")?;
    let expected: [u8; 32] = bytes(&crypto.mac, "its mac is not 32 bytes in hex")?;
    // The ciphertext is decrypted in place.
    let mut secret = Zeroizing::new(bytes::<32>(&crypto.ciphertext, "its ciphertext is not 32 bytes in hex")?);
    let derived = match crypto.kdf.as_str() {
        "scrypt" => {
            let params: ScryptParams = params(&crypto.kdfparams)?;
            let cost = cost(&params)?;
            derive(password, &salt(&params.salt)?, cost).ok_or_else(|| damaged("its cost is none that scrypt knows"))?
        }
        "pbkdf2" => {
            let params: Pbkdf2Params = params(&crypto.kdfparams)?;
            if params.prf != "hmac-sha256" || params.dklen != 32 || !(1..=MOST_ROUNDS).contains(&params.c) {
                return Err(damaged("its kdfparams are not hmac-sha256, 32 bytes and at most 10,000,000 rounds"));
            }
            Zeroizing::new(pbkdf2_hmac_array::<Sha256, 32>(&password.0, &salt(&params.salt)?, params.c))
        }
        _ => return Err(damaged("its kdf is neither scrypt nor pbkdf2")),
    };
    if !bool::from(mac(&derived, &*secret).ct_eq(&expected)) {
        return Err(OpenError::Password);
    }
    cipher(&derived, &iv).apply_keystream(&mut *secret);
    let account = Account::from_bytes(&secret).map_err(|_| damaged("what it holds is no key"))?;
    match file.address.as_deref().filter(|text| !text.is_empty()) {
        Some(text) if Address::from_hex(text) != Some(account.address()) => {
            Err(OpenError::Damaged(format!("its address is not that of its key, {}", account.address())))
        }
        _ => Ok(account),
    }
}

/// The address that stands in a file, which nobody has held against the key yet. Many programs write none.
pub(super) fn address(text: &[u8]) -> Result<Option<Address>, OpenError> {
    match parse(text)?.address.filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => Address::from_hex(&text).map(Some).ok_or_else(|| OpenError::Damaged("its address is none".into())),
    }
}

fn parse(text: &[u8]) -> Result<File, OpenError> {
    serde_json::from_slice(text).map_err(|error| {
        OpenError::Damaged(format!("it is no keystore of version 3 (line {}, column {})", error.line(), error.column()))
    })
}

fn params<'a, T: Deserialize<'a>>(value: &'a Value) -> Result<T, OpenError> {
    T::deserialize(value).map_err(|_| OpenError::Damaged("its kdfparams are incomplete".into()))
}

fn bytes<const N: usize>(text: &str, reason: &str) -> Result<[u8; N], OpenError> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes).map_err(|_| OpenError::Damaged(reason.into()))?;
    Ok(bytes)
}

fn salt(text: &str) -> Result<Vec<u8>, OpenError> {
    hex::decode(text).map_err(|_| OpenError::Damaged("its salt is not hex".into()))
}

/// Within limits, or whoever gives somebody a file could take all memory, or an hour.
fn cost(params: &ScryptParams) -> Result<Cost, OpenError> {
    let (r, p) = (u64::from(params.r), u64::from(params.p));
    let blocks = params.n.checked_mul(r);
    let memory = blocks.and_then(|blocks| blocks.checked_mul(128));
    let all = blocks.and_then(|blocks| blocks.checked_mul(p));
    let bounded = memory.is_some_and(|memory| memory <= MOST_MEMORY) && all.is_some_and(|all| all <= MOST_BLOCKS);
    if params.dklen != 32 || !params.n.is_power_of_two() || params.n < 2 || r == 0 || p == 0 || !bounded {
        let reason = format!(
            "its kdfparams (dklen {}, n {}, r {}, p {}) are not 32, a power of two and a work of at most {} MiB and 2^24 blocks",
            params.dklen,
            params.n,
            params.r,
            params.p,
            MOST_MEMORY / MIB
        );
        return Err(OpenError::Damaged(reason));
    }
    Ok(Cost { log_n: params.n.ilog2() as u8, r: params.r, p: params.p })
}

fn derive(password: &Password, salt: &[u8], cost: Cost) -> Option<Zeroizing<[u8; 32]>> {
    let params = scrypt::Params::new(cost.log_n, cost.r, cost.p).ok()?;
    let mut derived = Zeroizing::new([0; 32]);
    scrypt::scrypt(&password.0, salt, &params, &mut *derived).ok()?;
    Some(derived)
}

fn cipher(derived: &[u8; 32], iv: &[u8; 16]) -> Cipher {
    Cipher::new_from_slices(&derived[..16], iv).expect("AES-128 takes 16 bytes and 16 bytes")
}

fn mac(derived: &[u8; 32], ciphertext: &[u8]) -> [u8; 32] {
    keccak256(&[&derived[16..], ciphertext].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For tests that are not about the work.
    const CHEAP: Cost = Cost { log_n: 1, r: 1, p: 1 };

    const KEY: &str = "7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d";

    fn password(text: &str) -> Password {
        Password::new(Zeroizing::new(text.into())).expect("a password")
    }

    fn account() -> Account {
        Account::from_hex(KEY.as_bytes()).expect("a key")
    }

    fn opened(text: &[u8], password: &Password) -> Result<Address, OpenError> {
        open(text, password).map(|account| account.address())
    }

    /// The vectors of the page that the module names.
    fn vectors() -> [Value; 2] {
        [
            json!({
                "crypto": {
                    "cipher": "aes-128-ctr",
                    "cipherparams": { "iv": "6087dab2f9fdbbfaddc31a909735c1e6" },
                    "ciphertext": "5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46",
                    "kdf": "pbkdf2",
                    "kdfparams": {
                        "c": 262144, "dklen": 32, "prf": "hmac-sha256",
                        "salt": "ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd",
                    },
                    "mac": "517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2",
                },
                "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
                "version": 3,
            }),
            json!({
                "crypto": {
                    "cipher": "aes-128-ctr",
                    "cipherparams": { "iv": "83dbcc02d8ccb40e466191a123791e0e" },
                    "ciphertext": "d172bf743a674da9cdad04534d56926ef8358534d458fffccd4e6ad2fbde479c",
                    "kdf": "scrypt",
                    "kdfparams": {
                        "dklen": 32, "n": 262144, "r": 1, "p": 8,
                        "salt": "ab0c7876052600dd703518d6fc3fe8984592145b591fc8fb5c6d43190334ba19",
                    },
                    "mac": "2103ac29920d71da29f15d75b4a16dbe95cfd7ff8faea1056c33131d846e3097",
                },
                "id": "3198bc9c-6672-5ab3-d995-4942343ae5b6",
                "version": 3,
            }),
        ]
    }

    #[test]
    fn the_published_vectors_open() {
        for vector in vectors() {
            let text = vector.to_string();
            let account = open(text.as_bytes(), &password("testpassword")).unwrap_or_else(|error| panic!("{error:?}"));
            assert_eq!(hex::encode(*account.secret()), KEY);
            assert_eq!(opened(text.as_bytes(), &password("testpasswore")), Err(OpenError::Password));
            // Old files have a capital.
            let old = text.replace("\"crypto\"", "\"Crypto\"");
            assert!(open(old.as_bytes(), &password("testpassword")).is_ok());
        }
    }

    #[test]
    fn what_is_sealed_opens_and_tells_nothing_else() {
        let account = account();
        let seal = |cost| seal(&account, &password("correct horse"), cost).expect("random numbers");
        let text = seal(STANDARD);
        assert_eq!(opened(text.as_bytes(), &password("correct horse")), Ok(account.address()));
        assert_eq!(address(text.as_bytes()), Ok(Some(account.address())));
        let file: Value = serde_json::from_str(&text).expect("json");
        let params = &file["crypto"]["kdfparams"];
        assert_eq!((params["n"].as_u64(), params["r"].as_u64(), params["p"].as_u64()), (Some(262_144), Some(8), Some(1)));
        assert!(!text.contains(KEY) && !text.contains("horse"));
        assert_eq!(opened(seal(CHEAP).as_bytes(), &password("correct hors")), Err(OpenError::Password));
        assert_ne!(seal(CHEAP), seal(CHEAP), "salt, iv and id are new each time");
    }

    #[test]
    fn a_file_with_a_changed_byte_gives_no_other_key() {
        let account = account();
        let password = password("p");
        let good = seal(&account, &password, CHEAP).expect("random numbers").into_bytes();
        let harmless = ["\"id\"", "\"p\""].len();
        let mut opened_all_the_same = 0;
        for place in 0..good.len() {
            for bit in [0x01, 0x02, 0x20, 0x80] {
                let mut spoilt = good.clone();
                spoilt[place] ^= bit;
                match opened(&spoilt, &password) {
                    Err(OpenError::Damaged(_) | OpenError::Password) => {}
                    // The name of the file's id, its digits, a capital: none of them is part of the key.
                    Ok(address) => {
                        assert_eq!(address, account.address(), "byte {place}");
                        opened_all_the_same += 1;
                    }
                }
            }
        }
        assert!(opened_all_the_same > harmless && opened_all_the_same < good.len(), "{opened_all_the_same}");
        for end in 0..good.len() - 2 {
            assert!(opened(&good[..end], &password).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn a_changed_iv_is_noticed_by_the_address() {
        let password = password("p");
        let text = seal(&account(), &password, CHEAP).expect("random numbers");
        let mut file: Value = serde_json::from_str(&text).expect("json");
        file["crypto"]["cipherparams"]["iv"] = "00".repeat(16).into();
        let refused = opened(file.to_string().as_bytes(), &password);
        assert!(matches!(&refused, Err(OpenError::Damaged(reason)) if reason.contains("address")), "{refused:?}");
    }

    #[test]
    fn a_file_cannot_ask_for_everything() {
        let [pbkdf2, scrypt] = vectors();
        let tries = [
            (&scrypt, "n", json!(1u64 << 40)),
            (&scrypt, "n", json!(3)),
            (&scrypt, "n", json!(1)),
            (&scrypt, "n", json!(0)),
            (&scrypt, "r", json!(u32::MAX)),
            (&scrypt, "r", json!(0)),
            (&scrypt, "p", json!(u32::MAX)),
            (&scrypt, "p", json!(0)),
            (&scrypt, "dklen", json!(1u64 << 40)),
            (&scrypt, "dklen", json!(31)),
            (&scrypt, "salt", json!("0g")),
            (&scrypt, "salt", Value::Null),
            (&pbkdf2, "c", json!(u32::MAX)),
            (&pbkdf2, "c", json!(0)),
            (&pbkdf2, "dklen", json!(16)),
            (&pbkdf2, "prf", json!("hmac-md5")),
        ];
        for (vector, name, value) in tries {
            let mut file = vector.clone();
            file["crypto"]["kdfparams"][name] = value.clone();
            let refused = opened(file.to_string().as_bytes(), &password("testpassword"));
            assert!(matches!(refused, Err(OpenError::Damaged(_))), "{name} = {value}: {refused:?}");
        }
    }

    #[test]
    fn the_reason_does_not_repeat_what_was_taken_for_a_keystore() {
        for text in [KEY.to_string(), format!("\"{KEY}\""), format!("{{\"crypto\": \"{KEY}\"}}"), format!("{{\"{KEY}\": 1}}")] {
            match opened(text.as_bytes(), &password("p")) {
                Err(OpenError::Damaged(reason)) => assert!(!reason.contains(&KEY[..8]), "{reason}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_password_is_the_only_line_of_its_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("password");
        let read = |text: &str, mode| {
            std::fs::write(&path, text).expect("write");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("mode");
            Password::read(&path)
        };
        for text in ["two words ", "two words \n", "two words \r\n"] {
            assert!(read(text, 0o600).expect(text).is(&password("two words ")), "{text:?}");
        }
        assert!(matches!(read("", 0o600).err(), Some(PasswordError::Empty)));
        assert!(matches!(read("\n", 0o600).err(), Some(PasswordError::Empty)));
        assert!(matches!(read("a\nb\n", 0o600).err(), Some(PasswordError::Lines)));
        assert!(matches!(read("a", 0o640).err(), Some(PasswordError::Exposed { mode: 0o640, .. })));
        assert!(matches!(read(&"a".repeat(5000), 0o600).err(), Some(PasswordError::Unreadable { .. })));
        assert!(matches!(Password::read(folder.path()).err(), Some(PasswordError::Unreadable { .. })));
    }
}
