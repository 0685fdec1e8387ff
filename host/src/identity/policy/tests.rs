//! Each refusal, and that nothing else is signed.

use super::super::account::{keccak256, recover};
use super::*;

const CONTRACT: [u8; 20] = [0xcc; 20];
const DOMAIN: [u8; 32] = [0xdd; 32];

fn signer() -> Signer {
    let account = Account::from_bytes(&[7; 32]).expect("a key");
    let policy = Policy {
        chain_id: 8453,
        contracts: vec![CONTRACT],
        domains: vec![DOMAIN],
        max_value_wei: 1000,
        max_fee_wei: 100_000,
        daily_fee_wei: 250_000,
    };
    Signer::new(account, policy)
}

fn bytes(content: &[u8]) -> Vec<u8> {
    match content {
        [0x00..=0x7f] => content.to_vec(),
        _ => [header(0x80, content.len()), content.to_vec()].concat(),
    }
}

fn header(short: u8, len: usize) -> Vec<u8> {
    match len {
        0..=55 => vec![short + len as u8],
        _ => {
            let digits: Vec<u8> = len.to_be_bytes().into_iter().skip_while(|byte| *byte == 0).collect();
            [&[short + 55 + digits.len() as u8], &digits[..]].concat()
        }
    }
}

fn number(number: u128) -> Vec<u8> {
    bytes(&number.to_be_bytes().into_iter().skip_while(|byte| *byte == 0).collect::<Vec<_>>())
}

fn list(items: &[Vec<u8>]) -> Vec<u8> {
    let content = items.concat();
    [header(0xc0, content.len()), content].concat()
}

fn fields() -> Vec<Vec<u8>> {
    // Chain, nonce, tip, fee, gas, recipient, value, data, access list.
    let (to, data) = (bytes(&CONTRACT), bytes(&[0xab; 100]));
    vec![number(8453), number(5), number(1), number(2), number(40_000), to, number(1000), data, list(&[])]
}

fn transaction(fields: &[Vec<u8>]) -> Vec<u8> {
    [vec![2], list(fields)].concat()
}

/// The transaction with one field changed.
fn with(field: usize, value: Vec<u8>) -> Vec<u8> {
    let mut fields = fields();
    fields[field] = value;
    transaction(&fields)
}

fn fee(nonce: u128, fee: u128) -> Vec<u8> {
    let mut fields = fields();
    (fields[1], fields[2], fields[3], fields[4]) = (number(nonce), number(0), number(1), number(fee));
    transaction(&fields)
}

#[test]
fn what_the_policy_allows_is_signed_by_the_account() {
    let signer = signer();
    let domain = [&[0x19, 0x01], &DOMAIN[..], &[1; 32]].concat();
    for payload in [transaction(&fields()), domain] {
        let signature = signer.sign(&payload).expect("is allowed");
        assert_eq!(recover(&keccak256(&payload), &signature), Some(signer.address()));
        assert_eq!(signer.sign(&payload), Ok(signature));
    }
}

#[test]
fn what_the_policy_does_not_name_is_refused() {
    use Refusal as R;
    let signer = signer();
    let other = [0xce; 20];
    for (payload, refusal) in [
        (with(0, number(1)), R::Chain { found: 1, allowed: 8453 }),
        (with(0, number(u128::MAX)), R::Chain { found: u128::MAX, allowed: 8453 }),
        (with(5, bytes(&[])), R::Creation),
        (with(5, bytes(&other)), R::Recipient(Address(other))),
        (with(6, number(1001)), R::Value { found: 1001, limit: 1000 }),
        (with(4, number(50_001)), R::Fee { found: 100_002, limit: 100_000 }),
        (with(3, number(u128::MAX)), R::Fee { found: u128::MAX, limit: 100_000 }),
        (with(8, list(&[list(&[bytes(&CONTRACT), list(&[])])])), R::AccessList),
        ([&[0x19, 0x01], &[0xde; 32][..], &[1; 32]].concat(), R::Domain),
        ([&[0x19, 0x01], &DOMAIN[..], &[1; 31]].concat(), R::Unknown),
        ([&[0x19, 0x01], &DOMAIN[..], &[1; 33]].concat(), R::Unknown),
        // A message of a wallet, an old transaction, one of EIP-2930, blobs, a delegation, a bare hash.
        (b"\x19Ethereum Signed Message:\n2hi".to_vec(), R::Unknown),
        (list(&fields()), R::Unknown),
        ([vec![1], list(&fields())].concat(), R::Unknown),
        ([vec![3], list(&fields())].concat(), R::Unknown),
        ([vec![4], list(&fields())].concat(), R::Unknown),
        (vec![0x55; 32], R::Unknown),
        (vec![], R::Unknown),
    ] {
        assert_eq!(signer.sign(&payload), Err(refusal), "{}", hex::encode(&payload));
    }
}

#[test]
fn every_value_has_one_encoding() {
    let signer = signer();
    let good = transaction(&fields());
    let signed = [&fields()[..], &[number(0), number(1), number(1)]].concat();
    let wrong = [
        ("trailing", [&good[..], &[0]].concat()),
        ("cut", good[..good.len() - 1].to_vec()),
        ("a field less", transaction(&fields()[..8])),
        ("a signed one", transaction(&signed)),
        ("no list", [vec![2], bytes(&fields().concat())].concat()),
        ("leading zero", with(0, bytes(&[0, 0x21, 0x05]))),
        ("zero as a byte", with(6, vec![0])),
        ("a byte with a length", with(1, vec![0x81, 5])),
        ("a long length for 20 bytes", with(5, [&[0xb8, 20][..], &CONTRACT].concat())),
        ("a length with a zero", with(7, [&[0xb9, 0, 100][..], &[0xab; 100]].concat())),
        ("a length beyond the end", with(7, vec![0xbf, 255, 255, 255, 255, 255, 255, 255, 255])),
        ("19 bytes", with(5, bytes(&CONTRACT[1..]))),
        ("a number of 17 bytes", with(6, bytes(&[1; 17]))),
        ("a nonce of 9 bytes", with(1, bytes(&[1; 9]))),
        ("a list for a number", with(6, list(&[]))),
        ("bytes for the access list", with(8, bytes(&[]))),
        ("a tip above the fee", with(2, number(3))),
    ];
    for (name, payload) in wrong {
        let refused = signer.sign(&payload);
        assert!(matches!(refused, Err(Refusal::Malformed(_))), "{name}: {refused:?}");
    }
}

#[test]
fn the_fees_of_a_day_count_once_for_each_nonce() {
    let signer = signer();
    let sign = |nonce, amount, day: u64| signer.sign_at(&fee(nonce, amount), DAY * day as u32 + Duration::from_secs(1));
    assert!(sign(0, 100_000, 1).is_ok());
    assert!(sign(1, 80_000, 1).is_ok());
    // Replaced, cheaper and dearer: the highest counts.
    assert!(sign(1, 100_000, 1).is_ok());
    assert!(sign(1, 10, 1).is_ok());
    assert_eq!(sign(2, 50_001, 1), Err(Refusal::DailyFee { found: 250_001, limit: 250_000 }));
    assert!(sign(2, 50_000, 1).is_ok());
    assert_eq!(sign(3, 1, 1), Err(Refusal::DailyFee { found: 250_001, limit: 250_000 }));
    // Another day; and a clock that goes back does not make one.
    assert!(sign(3, 100_000, 2).is_ok() && sign(4, 100_000, 2).is_ok());
    assert_eq!(sign(5, 50_001, 1), Err(Refusal::DailyFee { found: 250_001, limit: 250_000 }));
}

#[test]
fn no_bytes_make_the_reader_panic_and_none_but_the_good_are_signed() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let signer = signer();
    let good = transaction(&fields());
    for _ in 0..200_000 {
        let len = random() as usize % 200;
        let mut payload: Vec<u8> = (0..len).map(|_| random() as u8).collect();
        if let Some(first) = payload.first_mut() {
            *first = 2;
        }
        assert!(signer.sign(&payload).is_err(), "{}", hex::encode(&payload));
        // And those near the good one: whatever is signed says within the limits what it says.
        let mut near = good.clone();
        for _ in 0..=random() % 3 {
            let place = random() as usize % near.len();
            near[place] = random() as u8;
        }
        if let Ok(read) = Transaction::read(&near[1..])
            && near[0] == 2
            && signer.allow_transaction(&read, Duration::ZERO).is_ok()
        {
            assert!(read.chain_id == 8453 && read.to == Some(CONTRACT) && read.value <= 1000 && read.fee() <= 100_000);
        }
    }
}
