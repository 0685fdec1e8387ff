//! The bytes of a record: MessagePack, read strictly where nothing is signed yet.

use rmp::decode::{read_bin_len, read_map_len, read_str_from_slice};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{CapabilityError, Record, Sealed};

pub(super) fn unreadable(reason: impl ToString) -> CapabilityError {
    CapabilityError::Unreadable { reason: reason.to_string() }
}

impl Sealed {
    pub(super) fn write(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.record.len() + 160);
        // A `Vec` takes everything that is written to it.
        let written = (|| {
            rmp::encode::write_map_len(&mut out, 3)?;
            for (key, bytes) in [("record", &self.record[..]), ("key", &self.key), ("signature", &self.signature)] {
                rmp::encode::write_str(&mut out, key)?;
                rmp::encode::write_bin(&mut out, bytes)?;
            }
            Ok::<_, rmp::encode::ValueWriteError>(())
        })();
        written.expect("a vector can be written to");
        out
    }
}

/// By hand and not by serde, which also takes lists for maps and texts for bytes: there is one way to write these three fields.
pub(super) fn read(bytes: &[u8]) -> Result<Sealed, CapabilityError> {
    let mut rest = bytes;
    let (mut record, mut key, mut signature) = (None, None, None);
    for _ in 0..read_map_len(&mut rest).map_err(unreadable)? {
        let (name, after) = read_str_from_slice(rest).map_err(|_| unreadable("a key of its map is not text"))?;
        rest = after;
        let place = match name {
            "record" => &mut record,
            "key" => &mut key,
            "signature" => &mut signature,
            _ => {
                IgnoredAny::deserialize(&mut rmp_serde::Deserializer::new(&mut rest)).map_err(unreadable)?;
                continue;
            }
        };
        let len = read_bin_len(&mut rest).map_err(unreadable)? as usize;
        let (value, after) = rest.split_at_checked(len).ok_or_else(|| unreadable("it ends early"))?;
        rest = after;
        if place.replace(value).is_some() {
            return Err(unreadable("a key of its map occurs twice"));
        }
    }
    if !rest.is_empty() {
        return Err(unreadable("something follows it"));
    }
    let record = record.ok_or_else(|| unreadable("`record` is missing"))?.to_vec();
    let key = key.and_then(|key| key.try_into().ok()).ok_or_else(|| unreadable("`key` is not there with 32 bytes"))?;
    let signature = signature.and_then(|bytes| bytes.try_into().ok());
    let signature = signature.ok_or_else(|| unreadable("`signature` is not there with 64 bytes"))?;
    Ok(Sealed { record, key, signature })
}

pub(super) fn record(bytes: &[u8]) -> Result<Record, CapabilityError> {
    let mut rest = bytes;
    let record = Record::deserialize(&mut rmp_serde::Deserializer::new(&mut rest)).map_err(unreadable)?;
    if !rest.is_empty() {
        return Err(unreadable("something follows what is signed"));
    }
    Ok(record)
}

/// Bytes of a fixed number, as MessagePack's `bin`.
pub(super) mod bin {
    use std::fmt;

    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::Serializer;

    pub fn serialize<S: Serializer, const N: usize>(bytes: &[u8; N], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>, const N: usize>(deserializer: D) -> Result<[u8; N], D::Error> {
        struct Bytes<const N: usize>;

        impl<const N: usize> Visitor<'_> for Bytes<N> {
            type Value = [u8; N];

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{N} bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<[u8; N], E> {
                bytes.try_into().map_err(|_| E::invalid_length(bytes.len(), &self))
            }
        }

        deserializer.deserialize_bytes(Bytes)
    }
}

/// A large number, as decimal digits.
pub(super) mod decimal {
    use serde::Deserialize;
    use serde::de::{Deserializer, Error};
    use serde::ser::Serializer;

    pub fn serialize<S: Serializer>(number: &u128, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u128, D::Error> {
        let text = String::deserialize(deserializer)?;
        // Numbers are written in one way only: no sign, no leading zero.
        let number = text.parse::<u128>().ok().filter(|number| number.to_string() == text);
        number.ok_or_else(|| D::Error::custom("a price is not a whole number of at most 128 bits in decimal digits"))
    }
}
