use super::*;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::sync::OnceLock;

use serde_json::{Value, json};

const NONCE: [u8; 16] = *b"sixteen bytes...";
const NOW: u64 = 1_800_000_000_000;

fn peer() -> PeerId {
    PeerId("12D3KooWpeer".into())
}

fn another_peer() -> PeerId {
    PeerId("12D3KooWother".into())
}

/// The key of RFC 8032's first test, so that the golden message stays the same.
fn key() -> &'static NodeKey {
    static KEY: OnceLock<NodeKey> = OnceLock::new();
    KEY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.key");
        std::fs::write(&path, "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60\n").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        NodeKey::load_or_create(folder.path()).unwrap()
    })
}

fn offer() -> Offer {
    Offer {
        name: "tiny-chat".into(),
        digest: Some("0123456789abcdef".repeat(4)),
        context: 2048,
        slots: 4,
        free: 3,
        price_input_wei_per_mtok: 0,
        price_output_wei_per_mtok: u128::MAX,
    }
}

fn record() -> Record {
    Record {
        peer: peer(),
        agent: "fabstir-node/0.1.0".into(),
        issued_ms: NOW - 1000,
        expires_ms: NOW + 60_000,
        nonce: NONCE,
        models: vec![offer(), Offer { name: "größer model:7b".into(), digest: None, ..offer() }],
    }
}

fn open(bytes: &[u8]) -> Result<Record, CapabilityError> {
    Sealed::read(bytes)?.open(&peer(), &peer(), &NONCE, NOW)
}

/// Signs what `seal` would refuse to sign.
fn forced(record: &Record) -> Vec<u8> {
    record.sealed(key()).unwrap()
}

/// What comes of a record that differs from a good one in this. Both sides judge it alike, except for what only the asker knows.
fn refusal(change: impl FnOnce(&mut Record)) -> CapabilityError {
    let mut record = record();
    change(&mut record);
    open(&forced(&record)).unwrap_err()
}

fn refusal_of_both(change: impl FnOnce(&mut Record)) -> CapabilityError {
    let mut record = record();
    change(&mut record);
    let error = open(&forced(&record)).unwrap_err();
    assert_eq!(record.seal(key()), Err(error.clone()), "the node itself does not notice");
    error
}

#[test]
fn a_record_arrives_as_it_was_sealed() {
    let bytes = record().seal(key()).unwrap();
    assert_eq!(Sealed::read(&bytes).unwrap().key(), &key().public_key());
    assert_eq!(open(&bytes), Ok(record()));
    let idle = Record { models: vec![], ..record() };
    assert_eq!(open(&idle.seal(key()).unwrap()), Ok(idle));
}

#[test]
fn the_form_never_changes() {
    let bytes = record().seal(key()).unwrap();
    assert_eq!(bytes[..9], *b"\x83\xa6record\xc5");
    let sealed = Sealed::read(&bytes).unwrap();
    // JSON has no bytes.
    let record = replaced(&sealed.record, b"\xc4\x10sixteen bytes...", b"\xb0sixteen bytes...");
    let fields: Value = rmp_serde::from_slice(&record).unwrap();
    let expected = json!({
        "peer": "12D3KooWpeer", "agent": "fabstir-node/0.1.0", "issued_ms": NOW - 1000, "expires_ms": NOW + 60_000,
        "nonce": "sixteen bytes...",
        "models": [
            {
                "name": "tiny-chat", "digest": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", "context": 2048,
                "slots": 4, "free": 3, "price_input_wei_per_mtok": "0",
                "price_output_wei_per_mtok": "340282366920938463463374607431768211455",
            },
            {
                "name": "größer model:7b", "context": 2048, "slots": 4, "free": 3, "price_input_wei_per_mtok": "0",
                "price_output_wei_per_mtok": "340282366920938463463374607431768211455",
            },
        ],
    });
    assert_eq!(fields, expected);
    assert_eq!(crate::loader::sha256(&bytes), "f3e9ac7f6c60ea5e4b22bc757611ba5b56c8a2c85f83ddc26e4b78e77a522854");
}

#[test]
fn every_changed_byte_breaks_the_signature() {
    let sealed = Sealed::read(&record().seal(key()).unwrap()).unwrap();
    for place in 0..sealed.record.len() {
        for bit in [0x01, 0x80] {
            let mut spoilt = sealed.clone();
            spoilt.record[place] ^= bit;
            let error = open(&spoilt.write()).unwrap_err();
            assert_eq!(error, CapabilityError::Signature(identity::VerifyError::Signature), "byte {place}");
        }
    }
    for place in 0..64 {
        let mut spoilt = sealed.clone();
        spoilt.signature[place] ^= 1;
        assert!(matches!(open(&spoilt.write()), Err(CapabilityError::Signature(_))), "byte {place}");
    }
}

#[test]
fn a_signature_for_another_purpose_is_none() {
    let mut sealed = Sealed::read(&record().seal(key()).unwrap()).unwrap();
    sealed.signature = key().sign(&sealed.record);
    assert!(matches!(open(&sealed.write()), Err(CapabilityError::Signature(_))));
}

#[test]
fn another_key_is_refused_whoever_it_says_it_is() {
    let other = NodeKey::ephemeral().unwrap();
    let bytes = record().seal(&other).unwrap();
    // The transport says that this key is another peer's.
    let sealed = Sealed::read(&bytes).unwrap();
    assert_eq!(sealed.open(&another_peer(), &peer(), &NONCE, NOW), Err(CapabilityError::AnotherKey));
    // The key is exchanged for the right one, the signature is not.
    let exchanged = Sealed { key: key().public_key(), ..sealed };
    assert!(matches!(open(&exchanged.write()), Err(CapabilityError::Signature(_))));
}

#[test]
fn a_record_about_another_peer_is_refused() {
    assert_eq!(refusal(|record| record.peer = another_peer()), CapabilityError::AnotherPeer);
}

#[test]
fn an_old_answer_is_no_answer() {
    let sealed = Sealed::read(&record().seal(key()).unwrap()).unwrap();
    let mut question = NONCE;
    question[15] ^= 1;
    assert_eq!(sealed.open(&peer(), &peer(), &question, NOW), Err(CapabilityError::AnotherQuestion));
}

#[test]
fn a_record_holds_for_its_time() {
    let at = |now_ms| Sealed::read(&record().seal(key()).unwrap()).unwrap().open(&peer(), &peer(), &NONCE, now_ms);
    assert_eq!(at(NOW + 59_999), Ok(record()));
    assert_eq!(at(NOW + 60_000), Err(CapabilityError::Expired { by_ms: 0 }));
    assert_eq!(at(u64::MAX), Err(CapabilityError::Expired { by_ms: u64::MAX - NOW - 60_000 }));
    assert_eq!(at(NOW - 61_000), Ok(record()), "60 s of skew are allowed");
    assert_eq!(at(NOW - 61_001), Err(CapabilityError::FromTheFuture { by_ms: 60_001 }));
    assert_eq!(at(0), Err(CapabilityError::FromTheFuture { by_ms: NOW - 1000 }));
}

#[test]
fn a_lifetime_has_a_limit() {
    let longest = Record { issued_ms: NOW, expires_ms: NOW + 600_000, ..record() };
    assert_eq!(open(&longest.seal(key()).unwrap()), Ok(longest));
    let lifetime = |issued_ms, expires_ms| {
        let error = refusal_of_both(|record| (record.issued_ms, record.expires_ms) = (issued_ms, expires_ms));
        assert_eq!(error, CapabilityError::Lifetime { issued_ms, expires_ms });
    };
    lifetime(NOW, NOW + 600_001);
    lifetime(NOW, u64::MAX);
    lifetime(0, NOW + 1);
    lifetime(NOW + 2, NOW + 2);
    lifetime(NOW + 2, NOW + 1);
}

#[test]
fn absurd_offers_are_refused() {
    let offered = |change: fn(&mut Offer)| refusal_of_both(|record| change(&mut record.models[1]));
    assert_eq!(offered(|offer| offer.context = 0), CapabilityError::NoContext);
    assert_eq!(offered(|offer| offer.free = 5), CapabilityError::Slots { slots: 4, free: 5 });
    assert_eq!(offered(|offer| offer.name = "tiny-chat".into()), CapabilityError::SameName);
    assert_eq!(offered(|offer| offer.digest = Some(String::new())), CapabilityError::Digest);
    assert_eq!(offered(|offer| offer.digest = Some("0".repeat(63))), CapabilityError::Digest);
    assert_eq!(offered(|offer| offer.digest = Some("A".repeat(64))), CapabilityError::Digest);
    let many = |record: &mut Record| {
        record.models = (0..65).map(|number| Offer { name: number.to_string(), digest: None, ..offer() }).collect();
    };
    let mut record = record();
    many(&mut record);
    assert_eq!(record.seal(key()), Err(CapabilityError::TooManyOffers { offers: 65 }));
    // 65 offers never fit a message, so that a reader meets them only as something too large.
    assert!(matches!(refusal(many), CapabilityError::TooLarge { .. }));
    assert_eq!(record.check(), Err(CapabilityError::TooManyOffers { offers: 65 }));
}

#[test]
fn texts_that_are_not_fit_to_be_shown_are_refused() {
    let refused = |text: &str, of_name: TextFault, of_agent: TextFault| {
        let error = refusal_of_both(|record| record.models[0].name = text.into());
        assert_eq!(error, CapabilityError::Text { what: "a model's name", fault: of_name }, "{text:?}");
        let error = refusal_of_both(|record| record.agent = text.into());
        assert_eq!(error, CapabilityError::Text { what: "the software's name", fault: of_agent }, "{text:?}");
    };
    refused("", TextFault::Empty, TextFault::Empty);
    refused(" \u{3000}", TextFault::Empty, TextFault::Empty);
    for text in ["a\nb", "a\u{1b}[2Jb", "a\0", "\u{7f}a", "a\u{9b}b", "a\u{202e}b", "a\u{200b}b", "\u{feff}a", "a\u{2028}b"] {
        refused(text, TextFault::Invisible, TextFault::Invisible);
    }
    let too_long = |most| TextFault::TooLong { bytes: 129, most };
    refused(&"x".repeat(129), too_long(128), too_long(64));
    let longest = Record { agent: "x".repeat(64), models: vec![Offer { name: "é".repeat(64), ..offer() }], ..record() };
    assert_eq!(open(&longest.seal(key()).unwrap()), Ok(longest));
}

#[test]
fn a_record_that_is_too_large_says_how_many_models_fit() {
    let models: Vec<_> = (0..MAX_OFFERS).map(|number| Offer { name: format!("model-{number}"), ..offer() }).collect();
    let record = Record { models, ..record() };
    let Err(CapabilityError::TooManyModels { models: MAX_OFFERS, bytes, fit }) = record.seal(key()) else {
        panic!("64 such models are too many");
    };
    assert!(bytes > MAX_RECORD && (8..MAX_OFFERS).contains(&fit), "{bytes} {fit}");
    let with = |count: usize| Record { models: record.models[..count].to_vec(), ..record.clone() };
    assert_eq!(open(&with(fit).seal(key()).unwrap()), Ok(with(fit)));
    assert!(matches!(with(fit + 1).seal(key()), Err(CapabilityError::TooManyModels { fit: same, .. }) if same == fit));
    let monstrous = Record { peer: PeerId("x".repeat(5000)), ..record };
    assert!(matches!(monstrous.seal(key()), Err(CapabilityError::TooLarge { .. })));
}

#[test]
fn what_is_too_large_is_not_even_read() {
    assert_eq!(Sealed::read(&[0xc1; MAX_RECORD + 1]), Err(CapabilityError::TooLarge { bytes: MAX_RECORD + 1 }));
    assert!(matches!(Sealed::read(&[0xc1; MAX_RECORD]), Err(CapabilityError::Unreadable { .. })));
}

/// A map with these keys, each with bytes of this length.
fn envelope(fields: &[(&str, usize)]) -> Vec<u8> {
    let mut out = vec![0x80 + fields.len() as u8];
    for (name, len) in fields {
        rmp::encode::write_str(&mut out, name).unwrap();
        rmp::encode::write_bin(&mut out, &vec![7; *len]).unwrap();
    }
    out
}

#[test]
fn an_envelope_of_another_shape_is_not_readable() {
    assert!(Sealed::read(&envelope(&[("signature", 64), ("key", 32), ("record", 5)])).is_ok(), "the order does not matter");
    let other: &[&[(&str, usize)]] = &[
        &[],
        &[("key", 32), ("signature", 64)],
        &[("record", 5), ("signature", 64)],
        &[("record", 5), ("key", 32)],
        &[("record", 5), ("key", 31), ("signature", 64)],
        &[("record", 5), ("key", 32), ("signature", 65)],
        &[("record", 5), ("key", 32), ("signature", 64), ("key", 32)],
    ];
    for fields in other {
        assert!(matches!(Sealed::read(&envelope(fields)), Err(CapabilityError::Unreadable { .. })), "{fields:?}");
    }
    let good = record().seal(key()).unwrap();
    for len in 0..good.len() {
        assert!(matches!(Sealed::read(&good[..len]), Err(CapabilityError::Unreadable { .. })), "{len} bytes");
    }
    assert!(matches!(Sealed::read(&[&good[..], b"\0"].concat()), Err(CapabilityError::Unreadable { .. })));
    // Lengths that a careless reader would make room for.
    for claim in [&b"\xdf\xff\xff\xff\xff"[..], b"\x81\xa6record\xc6\xff\xff\xff\xff", b"\x81\xa1x\xdd\xff\xff\xff\xff"] {
        assert!(matches!(Sealed::read(claim), Err(CapabilityError::Unreadable { .. })), "{claim:x?}");
    }
    // A value of nothing but lists in lists.
    let deep = [&b"\x84\xa1x"[..], &[0x91; 4000], b"\xc0"].concat();
    assert!(matches!(Sealed::read(&deep), Err(CapabilityError::Unreadable { .. })));
}

/// Signs any bytes as a record.
fn signed_bytes(record: Vec<u8>) -> Result<Record, CapabilityError> {
    let signature = key().sign(&signed(&record));
    open(&Sealed { record, key: key().public_key(), signature }.write())
}

#[test]
fn a_signed_record_of_another_shape_is_not_readable() {
    let good = rmp_serde::to_vec_named(&record()).unwrap();
    assert_eq!(signed_bytes(good.clone()), Ok(record()));
    let unreadable = |bytes: Vec<u8>| {
        let outcome = signed_bytes(bytes.clone());
        assert!(matches!(outcome, Err(CapabilityError::Unreadable { .. })), "{outcome:?} of {bytes:x?}");
    };
    unreadable(vec![]);
    unreadable(b"\x80".to_vec());
    unreadable([&good[..], b"\0"].concat());
    for len in 0..good.len() {
        unreadable(good[..len].to_vec());
    }
    // Prices in another form.
    let text = |price: &str| {
        let price = [&[0xa0 + price.len() as u8][..], price.as_bytes()].concat();
        replaced(&good, b"price_input_wei_per_mtok\xa10", &[b"price_input_wei_per_mtok", &price[..]].concat())
    };
    assert_eq!(signed_bytes(text("12")).unwrap().models[0].price_input_wei_per_mtok, 12);
    for price in ["", "-1", "+1", "01", "1e3", " 1", "0x1", "1.5"] {
        unreadable(text(price));
    }
    unreadable(replaced(&good, b"340282366920938463463374607431768211455", b"340282366920938463463374607431768211456"));
    unreadable(replaced(&good, b"price_input_wei_per_mtok\xa10", b"price_input_wei_per_mtok\x00"));
    unreadable(replaced(&good, b"\xa5slots\x04", b"\xa5slots\xff"));
    unreadable(replaced(&good, b"\xc4\x10sixteen bytes...", b"\xc4\x0fsixteen bytes.."));
}

fn replaced(bytes: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let place = bytes.windows(old.len()).position(|window| window == old).expect("is in the record");
    [&bytes[..place], new, &bytes[place + old.len()..]].concat()
}

#[test]
fn keys_of_newer_nodes_are_ignored() {
    let mut bytes = record().seal(key()).unwrap();
    bytes[0] += 1;
    bytes.extend(b"\xa5newer\x92\x01\x81\xa1x\xc0");
    assert_eq!(open(&bytes), Ok(record()));

    let good = rmp_serde::to_vec_named(&record()).unwrap();
    assert_eq!(good[0], 0x86);
    let newer = [&b"\x87\xa5newer\x92\x01\x02"[..], &good[1..]].concat();
    assert_eq!(signed_bytes(newer), Ok(record()));
    let newer = replaced(&good, b"\xa6models\x92\x87", b"\xa6models\x92\x88\xa5newer\xc3");
    assert_eq!(signed_bytes(newer), Ok(record()));
}

#[test]
fn no_noise_opens() {
    let good = record().seal(key()).unwrap();
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut readable = 0;
    for round in 0..20_000 {
        let mut bytes = good.clone();
        match round % 4 {
            0 => bytes = (0..random(MAX_RECORD + 10)).map(|_| random(256) as u8).collect(),
            1 => bytes.truncate(random(good.len())),
            2 => bytes.insert(random(good.len()), random(256) as u8),
            _ => {
                for _ in 0..1 + random(4) {
                    let place = random(bytes.len());
                    bytes[place] = random(256) as u8;
                }
            }
        }
        if bytes != good {
            readable += usize::from(Sealed::read(&bytes).is_ok());
            assert!(open(&bytes).is_err(), "{}", hex::encode(&bytes));
        }
        // Signed noise: whatever a malicious node puts into its record.
        if round % 4 == 3 {
            let mut noise = rmp_serde::to_vec_named(&record()).unwrap();
            let place = random(noise.len());
            noise[place] = random(256) as u8;
            let _ = signed_bytes(noise);
        }
    }
    assert!(readable > 1000, "the noise should reach the signature: {readable}");
}
