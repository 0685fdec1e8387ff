//! Names of blobs: the hash of the bytes, and S5's texts that carry it together with the size.
//!
//! S5 has two forms. The legacy one is `26 | 1f | hash | size`, most often in base58 (`z...`); the new one is `5b 82 | 1e | hash | size`, in
//! base32 (`blob...`). The size is little-endian with the zero bytes at its end cut off. Both may stand in hexadecimal, base32, base58 or
//! base64url, each with its multibase letter.

use std::fmt;

/// What legacy names begin with.
const LEGACY: &[u8] = &[0x26];
/// What new names begin with.
const NEW: &[u8] = &[0x5b, 0x82];
/// BLAKE3 as legacy names say it.
const LEGACY_BLAKE3: u8 = 0x1f;
/// BLAKE3 as multihash says it, and new names.
const BLAKE3: u8 = 0x1e;

/// Why a text names no blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("a blob's id is its BLAKE3 hash as 64 lower-case hexadecimal digits")]
    Id,
    #[error(
        "an S5 name of a blob is z, b, f or u and its bytes in that base: a prefix, a BLAKE3 hash and at most 8 bytes of size"
    )]
    Cid,
}

/// The BLAKE3 hash of a blob's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id([u8; 32]);

impl Id {
    /// Reads 64 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let is_lower = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let mut bytes = [0; 32];
        match is_lower && hex::decode_to_slice(text, &mut bytes).is_ok() {
            true => Ok(Self(bytes)),
            false => Err(NameError::Id),
        }
    }

    /// The hash with the byte before it that says BLAKE3; old portals know another one than new ones.
    pub fn multihash(&self, legacy: bool) -> Vec<u8> {
        [&[if legacy { LEGACY_BLAKE3 } else { BLAKE3 }], &self.0[..]].concat()
    }

    /// The id of a hash with a byte before it that says BLAKE3.
    pub fn of_multihash(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [BLAKE3 | LEGACY_BLAKE3, hash @ ..] => hash.try_into().ok().map(Self),
            _ => None,
        }
    }
}

impl From<blake3::Hash> for Id {
    fn from(hash: blake3::Hash) -> Self {
        Self(hash.into())
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// A blob's id and, where it is known, its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cid {
    pub id: Id,
    pub size: Option<u64>,
}

impl Cid {
    /// The legacy form in base58, which every portal reads.
    pub fn legacy(&self) -> String {
        let mut bytes = [LEGACY, &self.id.multihash(true)].concat();
        match self.size {
            // Its other writers give the empty blob a size byte.
            Some(0) => bytes.push(0),
            Some(size) => bytes.extend(trimmed(size)),
            None => {}
        }
        multibase::encode(multibase::Base::Base58Btc, bytes)
    }

    /// The new form in base32.
    pub fn blob(&self) -> String {
        let mut bytes = [NEW, &self.id.multihash(false)].concat();
        bytes.extend(trimmed(self.size.unwrap_or(0)));
        multibase::encode(multibase::Base::Base32Lower, bytes)
    }

    /// Reads either form in any of the bases.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        // The longest is hexadecimal: whatever is longer is not worth decoding.
        if text.len() > 1 + 2 * (2 + 33 + 8) || !text.starts_with(['z', 'b', 'f', 'u']) {
            return Err(NameError::Cid);
        }
        let (_, bytes) = multibase::decode(text).map_err(|_| NameError::Cid)?;
        let rest = bytes.strip_prefix(LEGACY).or_else(|| bytes.strip_prefix(NEW)).ok_or(NameError::Cid)?;
        let (multihash, size) = rest.split_at_checked(33).ok_or(NameError::Cid)?;
        let id = Id::of_multihash(multihash).ok_or(NameError::Cid)?;
        if size.len() > 8 {
            return Err(NameError::Cid);
        }
        let mut bytes = [0; 8];
        bytes[..size.len()].copy_from_slice(size);
        // New names of the empty blob have no size byte, as those of a blob whose size is not known.
        let known = !size.is_empty() || id == Id::from(blake3::hash(b""));
        Ok(Self { id, size: known.then_some(u64::from_le_bytes(bytes)) })
    }
}

/// The size in little-endian bytes without the zeros at their end.
fn trimmed(size: u64) -> impl Iterator<Item = u8> {
    let length = 8 - size.leading_zeros() as usize / 8;
    size.to_le_bytes().into_iter().take(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `Hello, world!`, as s5_core and @lumeweb/libs5 write it.
    const BLOB: &str = "blobb53pfycyq6lwes6ogtnjpmhsc75nucnizzye34dyu2cmnz7s7n6mnbu";
    const LEGACY_HEX: &str = "f261fede5c0b10f2ec4979c69b52f61e42ff5b413519ce09be0f14d098dcfe5f6f98d0d";
    const LEGACY_BASE58: &str = "z4odvyg7EbrxBZ5mJjwSJEr47rdfL4jbVDrBfQnzzwNUup8s6";

    fn hello() -> Cid {
        Cid { id: Id::from(blake3::hash(b"Hello, world!")), size: Some(13) }
    }

    #[test]
    fn names_are_those_that_other_programs_write() {
        assert_eq!(hello().blob(), BLOB);
        assert_eq!(hello().legacy(), LEGACY_BASE58);
        for text in [BLOB, LEGACY_HEX, LEGACY_BASE58] {
            assert_eq!(Cid::parse(text), Ok(hello()), "{text}");
        }
    }

    #[test]
    fn every_size_comes_back_in_every_base_and_form() {
        for size in [0, 1, 255, 256, 65_536, 1 << 30, u64::MAX] {
            let cid = Cid { id: Id::from(blake3::hash(&size.to_le_bytes())), size: Some(size) };
            let legacy = Cid::parse(&cid.legacy()).unwrap();
            assert_eq!(legacy, cid);
            let (_, bytes) = multibase::decode(cid.blob()).unwrap();
            for base in [multibase::Base::Base16Lower, multibase::Base::Base58Btc, multibase::Base::Base64Url] {
                let read = Cid::parse(&multibase::encode(base, &bytes)).unwrap();
                assert_eq!(read, Cid { size: (size > 0).then_some(size), ..cid });
            }
        }
        let empty = Cid { id: Id::from(blake3::hash(b"")), size: Some(0) };
        assert_eq!((Cid::parse(&empty.blob()), Cid::parse(&empty.legacy())), (Ok(empty), Ok(empty)));
        let unknown = Cid { size: None, ..hello() };
        assert_eq!(Cid::parse(&unknown.legacy()), Ok(unknown));
    }

    #[test]
    fn what_names_no_blob_is_refused() {
        let long = format!("f{}", "0".repeat(500));
        for text in ["", "z", "blob", "z11", "\u{1F600}", &LEGACY_HEX[..60], "f2620ede5", &long, "/etc/passwd", "../z4od"] {
            assert_eq!(Cid::parse(text), Err(NameError::Cid), "{text}");
        }
        let other_hash = LEGACY_HEX.replace("261f", "2612");
        assert_eq!(Cid::parse(&other_hash), Err(NameError::Cid));
        assert_eq!(Id::parse(&"AB".repeat(32)), Err(NameError::Id));
        assert_eq!(Id::parse(&"ab".repeat(32)).unwrap().to_string(), "ab".repeat(32));
    }
}
