use super::super::{BlockRef, RedbLedger};
use super::*;

fn outbox() -> Outbox<RedbLedger> {
    // The file lives on while it is open.
    let directory = tempfile::tempdir().unwrap();
    let policy = Policy { patience_ms: 8_000, resend_ms: 6_000, ..Policy::default() };
    Outbox::open(RedbLedger::open(&directory.path().join("outbox.redb"), "test").unwrap(), policy).unwrap()
}

/// An outbox with one intent that is signed with the market's fees and that an endpoint has taken.
fn taken() -> (Outbox<RedbLedger>, View) {
    let mut outbox = outbox();
    let block = |number| BlockRef { number, hash: [number as u8; 32] };
    let fees = Fees { max_fee: 1_000, priority_fee: 10 };
    let view = View { latest: block(9), safe: block(5), finalized: block(3), count: 4, safe_count: 2, fees };
    outbox.on(0, Event::Head(view)).unwrap();
    outbox.plan(one("a"), 0).unwrap();
    let signed = sign(&mut outbox, 0);
    assert_eq!(signed, (4, fees), "the first nonce of a ledger is the chain's count");
    send(&mut outbox, 0, Ok(()));
    (outbox, view)
}

fn one(key: &str) -> Intent {
    Intent { key: key.to_owned(), to: [0; 20], value: 0, data: vec![], gas_limit: 1, deadline_s: None, fee_cap: 1_200 }
}

/// Signs what is due to be signed.
fn sign(outbox: &mut Outbox<RedbLedger>, now_ms: u64) -> (u64, Fees) {
    let is_sign = |action: &Action| matches!(action, Action::Sign { .. });
    let action = outbox.due(now_ms).unwrap().actions.into_iter().find(is_sign).expect("something is to be signed");
    let Action::Sign { key, id, nonce, fees, .. } = action else { unreachable!("it was looked for") };
    let raw = [nonce.to_le_bytes().to_vec(), fees.max_fee.to_le_bytes().to_vec()].concat();
    outbox.on(now_ms, Event::Signed { key, id, raw, hash: [fees.max_fee as u8; 32] }).unwrap();
    (nonce, fees)
}

/// Answers what is due to be sent.
fn send(outbox: &mut Outbox<RedbLedger>, now_ms: u64, outcome: Result<(), SendError>) -> Vec<Vec<u8>> {
    let mut sent = Vec::new();
    for action in outbox.due(now_ms).unwrap().actions {
        if let Action::Broadcast { key, id, raw } = action {
            sent.push(raw);
            outbox.on(now_ms, Event::Sent { key, id, outcome }).unwrap();
        }
    }
    sent
}

fn signs(outbox: &mut Outbox<RedbLedger>, now_ms: u64) -> usize {
    outbox.due(now_ms).unwrap().actions.iter().filter(|action| matches!(action, Action::Sign { .. })).count()
}

#[test]
fn a_dearer_transaction_has_the_same_nonce_and_at_the_cap_the_same_bytes_are_sent_on() {
    let (mut outbox, mut view) = taken();
    view.latest.number += 1;
    outbox.on(8_000, Event::Head(view)).unwrap();
    assert_eq!(sign(&mut outbox, 8_000), (4, Fees { max_fee: 1_125, priority_fee: 12 }));
    let bytes = send(&mut outbox, 8_000, Ok(()));
    view.latest.number += 1;
    outbox.on(20_000, Event::Head(view)).unwrap();
    let due = outbox.due(20_000).unwrap();
    assert_eq!(due.changes.last().and_then(|change| change.stuck.clone()), Some(Stuck::FeeCap));
    assert_eq!(
        due.actions.iter().filter(|action| matches!(action, Action::Broadcast { raw, .. } if *raw == bytes[0])).count(),
        1
    );
    assert_eq!(outbox.row("a").unwrap().unwrap().attempts.len(), 2);
}

#[test]
fn nothing_is_made_dearer_while_the_chain_stands_still_or_the_account_is_empty() {
    let (mut outbox, mut view) = taken();
    assert_eq!(signs(&mut outbox, 1_000_000), 0, "no block has passed it over");
    assert_eq!(signs(&mut outbox, 1_500_000), 0, "what was sent meanwhile is overdue");
    assert_eq!(send(&mut outbox, 2_000_000, Err(SendError::InsufficientFunds)).len(), 1);
    view.latest.number += 1;
    outbox.on(2_000_000, Event::Head(view)).unwrap();
    assert_eq!(signs(&mut outbox, 2_100_000), 0, "dearer is not easier to pay");
}

#[test]
fn no_nonce_is_bound_above_a_foreign_one_that_may_be_taken_back() {
    let (mut outbox, mut view) = taken();
    outbox.plan(one("b"), 0).unwrap();
    // The ledger knows of nonce 4; somebody else used 5.
    (view.count, view.safe_count) = (6, 5);
    outbox.on(100, Event::Head(view)).unwrap();
    let due = outbox.due(100).unwrap();
    assert!(!due.actions.iter().any(|action| matches!(action, Action::Sign { .. })));
    assert_eq!(due.changes[0].stuck, Some(Stuck::ForeignNonce));
    view.safe_count = 6;
    outbox.on(200, Event::Head(view)).unwrap();
    assert_eq!(sign(&mut outbox, 200).0, 6);
}

#[test]
fn an_intent_whose_deadline_passed_unsigned_is_dead_and_leaves_no_gap() {
    let mut outbox = outbox();
    outbox.plan(Intent { deadline_s: Some(5), ..one("late") }, 0).unwrap();
    let changes = outbox.due(5_000).unwrap().changes;
    assert!(matches!(changes[0].row, Row { state: State::Dead { .. }, nonce: None, .. }));
    assert!(outbox.open_rows().is_empty());
}
