//! The encoding of transactions, read strictly: every value has one encoding, and all others are errors.
//!
//! <https://ethereum.org/developers/docs/data-structures-and-encoding/rlp/>

/// Why bytes are not RLP, or not what was expected there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed(pub &'static str);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Item<'a> {
    Bytes(&'a [u8]),
    /// The encoded items, one after the other.
    List(&'a [u8]),
}

impl<'a> Item<'a> {
    pub fn bytes(self) -> Result<&'a [u8], Malformed> {
        match self {
            Item::Bytes(bytes) => Ok(bytes),
            Item::List(_) => Err(Malformed("a list stands where bytes belong")),
        }
    }

    /// A number of at most 128 bits, without leading zeros.
    pub fn number(self) -> Result<u128, Malformed> {
        match self.bytes()? {
            [0, ..] => Err(Malformed("a number begins with a zero")),
            bytes if bytes.len() > 16 => Err(Malformed("a number has more than 16 bytes")),
            bytes => Ok(bytes.iter().fold(0, |number, byte| number << 8 | u128::from(*byte))),
        }
    }
}

/// The first item of `bytes`, and what follows it.
pub(super) fn read(bytes: &[u8]) -> Result<(Item<'_>, &[u8]), Malformed> {
    let (&head, rest) = bytes.split_first().ok_or(Malformed("it ends too early"))?;
    let (len, rest) = match head {
        0x00..=0x7f => return Ok((Item::Bytes(&bytes[..1]), rest)),
        0x80..=0xb7 => (usize::from(head - 0x80), rest),
        0xb8..=0xbf => long(usize::from(head - 0xb7), rest)?,
        0xc0..=0xf7 => (usize::from(head - 0xc0), rest),
        0xf8..=0xff => long(usize::from(head - 0xf7), rest)?,
    };
    let (content, rest) = rest.split_at_checked(len).ok_or(Malformed("it ends too early"))?;
    match (head < 0xc0, content) {
        (true, [0x00..=0x7f]) => Err(Malformed("a byte that stands for itself has a length")),
        (true, content) => Ok((Item::Bytes(content), rest)),
        (false, content) => Ok((Item::List(content), rest)),
    }
}

/// A length of more than 55, in as many bytes as it needs.
fn long(digits: usize, bytes: &[u8]) -> Result<(usize, &[u8]), Malformed> {
    let (digits, rest) = bytes.split_at_checked(digits).ok_or(Malformed("it ends too early"))?;
    if digits.len() > 4 {
        return Err(Malformed("a length has more than 4 bytes"));
    }
    let len = digits.iter().fold(0, |len, byte| len << 8 | usize::from(*byte));
    match digits[0] == 0 || len <= 55 {
        true => Err(Malformed("a length is longer than it needs to be")),
        false => Ok((len, rest)),
    }
}
