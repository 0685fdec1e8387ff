//! Numbers below the order of BN254's scalar field, as the contract and as EZKL write them.

/// A field element or any other number of 256 bits, most significant byte first.
pub type Word = [u8; 32];

/// The order of the field.
const ORDER: Word = [
    0x30, 0x64, 0x4e, 0x72, 0xe1, 0x31, 0xa0, 0x29, 0xb8, 0x50, 0x45, 0xb6, 0x81, 0x81, 0x58, 0x5d, 0x28, 0x33, 0xe8, 0x48, 0x79,
    0xb9, 0x70, 0x91, 0x43, 0xe1, 0xf5, 0x93, 0xf0, 0x00, 0x00, 0x01,
];

/// Whether a number is below the field's order.
pub fn is_element(word: &Word) -> bool {
    word < &ORDER
}

/// The element that stands for an integer; a negative one counts down from the field's order.
pub fn from_integer(value: i64) -> Word {
    let mut word = [0; 32];
    word[24..].copy_from_slice(&value.unsigned_abs().to_be_bytes());
    if value >= 0 { word } else { subtract(&ORDER, &word) }
}

/// The integer that an element stands for, where it has fewer than 62 bits.
pub fn to_integer(word: &Word) -> Option<i64> {
    let small = |word: &Word| {
        let low = u64::from_be_bytes(word[24..].try_into().expect("eight bytes"));
        (word[..24].iter().all(|byte| *byte == 0) && low < 1 << 62).then_some(low as i64)
    };
    if !is_element(word) {
        return None;
    }
    small(word).or_else(|| small(&subtract(&ORDER, word)).map(|value| -value))
}

fn subtract(from: &Word, what: &Word) -> Word {
    let (mut difference, mut borrow) = ([0; 32], false);
    for i in (0..32).rev() {
        let (first, under) = from[i].overflowing_sub(what[i]);
        let (second, again) = first.overflowing_sub(u8::from(borrow));
        difference[i] = second;
        borrow = under || again;
    }
    difference
}

/// As EZKL writes an element: hexadecimal, least significant byte first.
pub fn to_ezkl(word: &Word) -> String {
    let mut bytes = *word;
    bytes.reverse();
    hex::encode(bytes)
}

/// Reads what [`to_ezkl`] writes.
pub fn from_ezkl(text: &str) -> Option<Word> {
    let mut word = Word::default();
    hex::decode_to_slice(text, &mut word).ok()?;
    word.reverse();
    is_element(&word).then_some(word)
}

/// Reads 32 bytes as `0x` and 64 lower-case hexadecimal digits.
pub fn from_hex(text: &str) -> Option<Word> {
    from_digits(text.strip_prefix("0x")?)
}

/// Reads 32 bytes as 64 lower-case hexadecimal digits.
pub fn from_digits(text: &str) -> Option<Word> {
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return None;
    }
    let mut word = Word::default();
    hex::decode_to_slice(text, &mut word).ok()?;
    Some(word)
}

/// The form that [`from_hex`] reads.
pub fn to_hex(word: &Word) -> String {
    format!("0x{}", hex::encode(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_integer_comes_back_and_a_negative_one_counts_down_from_the_order() {
        for value in [0, 1, -1, 255, -256, (1 << 61) + 7, -(1 << 61)] {
            assert_eq!(to_integer(&from_integer(value)), Some(value));
        }
        let minus_one = to_ezkl(&from_integer(-1));
        assert_eq!(minus_one, "000000f093f5e1439170b97948e833285d588181b64550b829a031e1724e6430");
        assert_eq!(from_ezkl(&minus_one), Some(from_integer(-1)));
    }

    #[test]
    fn what_is_no_element_is_none() {
        assert_eq!(to_integer(&ORDER), None);
        assert_eq!(to_integer(&[0x20; 32]), None);
        assert_eq!(from_ezkl(&to_ezkl(&ORDER)), None);
        assert_eq!(from_hex("0x00"), None);
        assert_eq!(from_hex(&format!("0x{}", "AB".repeat(32))), None);
        assert_eq!(from_hex(&format!("0x{}", "ab".repeat(32))), Some([0xab; 32]));
    }
}
