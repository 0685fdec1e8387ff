//! What nodes and clients sign, and who has signed it.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Result, ensure};
use fabstir_plugin_api::chain::*;
use fabstir_plugin_api::error::{Code, PluginError};

use super::key::Key;
use super::{hash_of, same_account, session_terms, voucher};
use crate::harness::{During, Harness, patient, refused};
use crate::report::Outcome;

/// What an EIP-712 payload has: its mark, the domain, and the hash of what is said.
const PAYLOAD: usize = 2 + 32 + 32;

type ChangeVoucher = fn(&mut Voucher);
type ChangeTerms = fn(&mut Terms);
type SetInVoucher = fn(&mut Voucher, String);
type SetInTerms = fn(&mut Terms, String);

const OTHER_VOUCHERS: [(&str, ChangeVoucher); 6] = [
    ("session", |voucher| voucher.session = hash_of("other")),
    ("host", |voucher| voucher.host = Key::made_of("other").account),
    ("amount", |voucher| voucher.amount.0 += 1),
    ("input_tokens", |voucher| voucher.input_tokens += 1),
    ("output_tokens", |voucher| voucher.output_tokens += 1),
    ("transcript", |voucher| voucher.transcript = hash_of("other")),
];

const OTHER_TERMS: [(&str, ChangeTerms); 10] = [
    ("host", |terms| terms.host = Key::made_of("other").account),
    ("client", |terms| terms.client = Key::made_of("other").account),
    ("model", |terms| terms.model = hash_of("other")),
    ("coin", |terms| terms.coin = Key::made_of("other").account),
    ("price_input_per_mtok", |terms| terms.price_input_per_mtok.0 += 1),
    ("price_output_per_mtok", |terms| terms.price_output_per_mtok.0 += 1),
    ("expires_s", |terms| terms.expires_s += 1),
    ("settle_window_s", |terms| terms.settle_window_s += 1),
    ("valid_until_s", |terms| terms.valid_until_s += 1),
    ("nonce", |terms| terms.nonce = hash_of("other")),
];

async fn of_voucher(chain: &Arc<dyn Chain>, change: impl FnOnce(&mut Voucher)) -> Result<Payload, PluginError> {
    let mut voucher = voucher(1);
    change(&mut voucher);
    chain.voucher_payload(&patient(), voucher).await
}

async fn of_terms(chain: &Arc<dyn Chain>, change: impl FnOnce(&mut Terms)) -> Result<Payload, PluginError> {
    let mut terms = session_terms();
    change(&mut terms);
    chain.offer_payload(&patient(), terms).await
}

/// Payloads that must differ from each other, and have the form that is signed.
struct Payloads {
    start: Vec<u8>,
    seen: HashMap<Payload, String>,
}

impl Payloads {
    fn add(&mut self, what: String, payload: Payload) -> Result<()> {
        ensure!(payload.len() == PAYLOAD, "the payload of {what} has {} bytes, not {PAYLOAD}", payload.len());
        ensure!(payload.starts_with(&self.start), "the payload of {what} does not begin with 0x19, 0x01 and the domain");
        match self.seen.insert(payload, what.clone()) {
            None => Ok(()),
            Some(other) => Err(anyhow::anyhow!("the payloads of {what} and of {other} are the same")),
        }
    }
}

pub async fn payload_binds_every_field(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let chain = instance.client::<dyn Chain>();
    let domain = chain.network(&patient()).await.during("network")?.domain;
    let byte = |at: usize| domain.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
    let domain: Option<Vec<u8>> = (0..32).map(|number| byte(2 + 2 * number)).collect();
    let domain = domain.ok_or_else(|| anyhow::anyhow!("the network's domain is not 32 bytes in hexadecimal"))?;
    let mut payloads = Payloads { start: [&[0x19, 0x01], &domain[..]].concat(), seen: HashMap::new() };

    let same = of_voucher(&chain, |_| {}).await.during("voucher_payload")?;
    ensure!(of_voucher(&chain, |_| {}).await.during("voucher_payload")? == same, "one voucher has two payloads");
    payloads.add("a voucher".into(), same)?;
    for (field, change) in OTHER_VOUCHERS {
        let payload = of_voucher(&chain, change).await.during("voucher_payload")?;
        payloads.add(format!("a voucher with another {field}"), payload)?;
    }
    let largest = of_voucher(&chain, |voucher| {
        (voucher.amount, voucher.input_tokens, voucher.output_tokens) = (Amount(u128::MAX), u64::MAX, u64::MAX);
    });
    // A contract may hold less than this, but must not hold part of it.
    match largest.await {
        Ok(payload) => payloads.add("the largest voucher".into(), payload)?,
        answer => drop(refused("the largest voucher", answer, &[Code::InvalidArgument])?),
    }

    let same = of_terms(&chain, |_| {}).await.during("offer_payload")?;
    ensure!(of_terms(&chain, |_| {}).await.during("offer_payload")? == same, "terms have two payloads");
    payloads.add("terms".into(), same)?;
    for (field, change) in OTHER_TERMS {
        let payload = of_terms(&chain, change).await.during("offer_payload")?;
        payloads.add(format!("terms with another {field}"), payload)?;
    }
    // One offer can be funded by one client, and once: its session's name is not another's.
    let named = chain.session_id(&patient(), session_terms()).await.during("session_id")?;
    for (field, change) in OTHER_TERMS.iter().filter(|(field, _)| matches!(*field, "host" | "client" | "nonce")) {
        let mut terms = session_terms();
        change(&mut terms);
        let other = chain.session_id(&patient(), terms).await.during("session_id")?;
        ensure!(other != named, "terms with another {field} make the same session");
    }
    let swapped = of_terms(&chain, |terms| std::mem::swap(&mut terms.host, &mut terms.client)).await.during("offer_payload")?;
    payloads.add("terms with host and client swapped".into(), swapped)?;
    let largest = of_terms(&chain, |terms| {
        (terms.price_input_per_mtok, terms.price_output_per_mtok) = (Amount(u128::MAX), Amount(u128::MAX));
        (terms.expires_s, terms.settle_window_s, terms.valid_until_s) = (u64::MAX, u64::MAX, u64::MAX);
    });
    match largest.await {
        Ok(payload) => payloads.add("the largest terms".into(), payload)?,
        answer => drop(refused("the largest terms", answer, &[Code::InvalidArgument])?),
    }

    malformed_is_refused(&chain).await?;
    Ok(Outcome::Pass)
}

async fn malformed_is_refused(chain: &Arc<dyn Chain>) -> Result<()> {
    let invalid = &[Code::InvalidArgument];
    let hash = hash_of("malformed");
    for wrong in ["", "0x", &hash[..65], &format!("{hash}00"), &hash[2..], &format!("0x{}", "g".repeat(64)), "é"] {
        let fields: [(&str, SetInVoucher); 2] =
            [("session", |voucher, text| voucher.session = text), ("transcript", |voucher, text| voucher.transcript = text)];
        for (field, set) in fields {
            let answer = of_voucher(chain, |voucher| set(voucher, wrong.into())).await;
            refused(&format!("a voucher with {field} {wrong:?}"), answer, invalid)?;
        }
        let fields: [(&str, SetInTerms); 2] =
            [("model", |terms, text| terms.model = text), ("nonce", |terms, text| terms.nonce = text)];
        for (field, set) in fields {
            let answer = of_terms(chain, |terms| set(terms, wrong.into())).await;
            refused(&format!("terms with {field} {wrong:?}"), answer, invalid)?;
            let mut terms = session_terms();
            set(&mut terms, wrong.into());
            refused(&format!("session_id of terms with {field} {wrong:?}"), chain.session_id(&patient(), terms).await, invalid)?;
        }
    }
    let account = Key::made_of("malformed").account;
    for wrong in ["", "0x", &account[..41], &format!("{account}00"), &account[2..], &format!("0x{}", "g".repeat(40)), "é"] {
        let answer = of_voucher(chain, |voucher| voucher.host = wrong.into()).await;
        refused(&format!("a voucher with host {wrong:?}"), answer, invalid)?;
        let fields: [(&str, SetInTerms); 3] = [
            ("host", |terms, text| terms.host = text),
            ("client", |terms, text| terms.client = text),
            ("coin", |terms, text| terms.coin = text),
        ];
        for (field, set) in fields {
            let answer = of_terms(chain, |terms| set(terms, wrong.into())).await;
            refused(&format!("terms with {field} {wrong:?}"), answer, invalid)?;
            let mut terms = session_terms();
            set(&mut terms, wrong.into());
            refused(&format!("session_id of terms with {field} {wrong:?}"), chain.session_id(&patient(), terms).await, invalid)?;
        }
    }
    Ok(())
}

pub async fn signer_is_recovered(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let chain = instance.client::<dyn Chain>();
    let payloads =
        [of_voucher(&chain, |_| {}).await.during("voucher_payload")?, of_terms(&chain, |_| {}).await.during("offer_payload")?];
    for (number, payload) in payloads.iter().enumerate() {
        let key = Key::made_of(&format!("signer {number}"));
        let right = key.sign(payload);
        let signer =
            async |payload: &[u8], signature: &[u8]| chain.signer(&patient(), payload.to_vec(), signature.to_vec()).await;
        let account = signer(payload, &right).await.during("signer")?;
        ensure!(same_account(&account, &key.account), "signed by {}, the signer is said to be {account}", key.account);

        for at in 0..payload.len() {
            let mut other = payload.clone();
            other[at] ^= 1;
            is_not(&key, &format!("a payload with another byte {at}"), signer(&other, &right).await)?;
        }
        for at in 0..64 {
            let mut other = right.clone();
            other[at] ^= 1;
            is_not(&key, &format!("a signature with another byte {at}"), signer(payload, &other).await)?;
        }
        let ending = |last: u8| [&right[..64], &[last]].concat();
        is_not(&key, "a signature with the other parity", signer(payload, &ending(55 - right[64])).await)?;

        let zeros = [&[0; 64][..], &[27]].concat();
        let malformed = [
            ("of 0 bytes", Vec::new()),
            ("of 64 bytes", right[..64].to_vec()),
            ("of 66 bytes", [&right[..], &[0]].concat()),
            ("that ends with 0", ending(0)),
            ("that ends with 1", ending(1)),
            ("that ends with 26", ending(26)),
            ("that ends with 29", ending(29)),
            ("that ends with 255", ending(255)),
            ("with the higher s", key.sign_with_high_s(payload)),
            ("of zeros", zeros),
            ("of ones", [&[0xff; 64][..], &[27]].concat()),
        ];
        for (what, signature) in malformed {
            refused(&format!("a signature {what}"), signer(payload, &signature).await, &[Code::InvalidArgument])?;
        }
    }
    Ok(Outcome::Pass)
}

/// Whatever was given, it is not taken for signed by this key.
fn is_not(key: &Key, what: &str, answer: Result<Account, PluginError>) -> Result<()> {
    match answer {
        Ok(account) => {
            ensure!(!same_account(&account, &key.account), "{what} is taken for signed by {account}");
            Ok(())
        }
        answer => refused(what, answer, &[Code::InvalidArgument]).map(drop),
    }
}
