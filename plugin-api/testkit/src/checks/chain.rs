//! What the chain kind promises.
//!
//! Some checks spend money, so the configuration must point to a development chain with the market's contracts on it: one like anvil's or
//! Hardhat's, which gives money to ten well-known accounts and puts each transaction into a block at once. Each check has accounts of its
//! own among them, so that checks may run beside each other on one chain. Where those accounts have nothing, which is so on every chain
//! that matters, or where no chain answers, these checks are skipped. To have no chain at all, the checks set the key `rpc`, where the
//! plugin's configuration has it, to a list of one address where nobody listens.

mod actor;
mod events;
mod key;
mod orders;
mod payloads;
mod restarts;
mod sessions;
mod unreachable;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::chain::*;
use fabstir_plugin_api::error::Code;

use crate::harness::{During, Harness, Instance, patient, told};
use crate::report::Outcome;

pub use events::{events_resume, unknown_is_not_found};
pub use orders::{order_is_carried_out, refusal_is_final, revert_is_told, same_key_is_one_order, wrong_signature_is_refused};
pub use payloads::{payload_binds_every_field, signer_is_recovered};
pub use restarts::{one_account_at_a_time, order_survives_restart};
pub use sessions::vouchers_are_paid;
pub use unreachable::{network_is_configured, unreachable_is_an_error};

/// How long something may take that takes milliseconds on a machine with nothing else to do.
const SOON: Duration = Duration::from_secs(15);

/// Between two looks at something that is about to change.
const LOOK: Duration = Duration::from_millis(10);

/// The chain's own coin; nobody, where an account is named.
const ZEROS: &str = "0x0000000000000000000000000000000000000000";

/// A thousandth of the coin.
const MILLI: u128 = 1_000_000_000_000_000;

/// Where nobody listens.
const NOBODY: &str = "http://127.0.0.1:9";

const EVERY_SURE: [Sure; 3] = [Sure::Latest, Sure::Safe, Sure::Final];

pub(super) async fn exercise(instance: &Instance) -> Result<()> {
    let chain = instance.client::<dyn Chain>();
    let network = chain.network(&patient()).await.during("network")?;
    ensure!(!network.contracts.is_empty(), "network names no contract");
    match chain.heads(&patient()).await {
        Ok(heads) => in_order(&heads),
        Err(error) if error.code == Code::Unavailable => Ok(()),
        Err(error) => bail!("heads: {}", told(&error)),
    }
}

pub(super) async fn hundred(instance: &Instance) -> Result<()> {
    let chain = instance.client::<dyn Chain>();
    let mut alone = Vec::new();
    for number in 0..100 {
        alone.push(chain.voucher_payload(&patient(), voucher(number)).await.during("voucher_payload")?);
    }
    let calls = alone.iter().enumerate().map(|(number, alone)| {
        let chain = chain.clone();
        async move {
            let payload = chain.voucher_payload(&patient(), voucher(number as u64)).await.during("voucher_payload")?;
            ensure!(payload == *alone, "voucher_payload {number} gives another answer among a hundred than alone");
            Ok(())
        }
    });
    futures::future::try_join_all(calls).await?;
    let count = alone.iter().collect::<std::collections::HashSet<_>>().len();
    ensure!(count == alone.len(), "a hundred vouchers have {count} payloads");
    Ok(())
}

/// Each block is at least as old as the one that is less sure.
fn in_order(heads: &Heads) -> Result<()> {
    let Heads { latest, safe, final_ } = heads;
    ensure!(final_.number <= safe.number && safe.number <= latest.number, "the heads are out of order: {heads:?}");
    for block in [latest, safe, final_] {
        ensure!(is_hash(&block.hash), "the hash of block {} is {:?}", block.number, block.hash);
    }
    Ok(())
}

/// The newest blocks, or why the check must be skipped.
async fn heads(chain: &Arc<dyn Chain>) -> Result<Result<Heads, Outcome>> {
    match chain.heads(&patient()).await {
        Ok(heads) => Ok(Ok(heads)),
        Err(error) if error.code == Code::Unavailable => Ok(Err(Outcome::skip(format!(
            "no chain answers ({}): start a development chain such as anvil, deploy the market's contracts on it, and point the \
             configuration there; the plugin's own `cargo test --test conformance` does so",
            error.message
        )))),
        Err(error) => bail!("heads: {}", told(&error)),
    }
}

/// The subject's configuration with no chain to reach, where it has the key for that.
fn without_chain(harness: &Harness, instance: &Instance) -> Result<Result<String, Outcome>> {
    let config: serde_json::Value = serde_json::from_str(instance.config()).context("the configuration is not JSON")?;
    if config.get("rpc").is_none() {
        return Ok(Err(Outcome::skip("the configuration has no key `rpc` that could be pointed to where no chain is")));
    }
    harness.config_with("rpc", serde_json::json!([NOBODY])).map(Ok)
}

/// Whether a text is `0x` and 64 hexadecimal digits in lower case.
fn is_hash(text: &str) -> bool {
    text.strip_prefix("0x")
        .is_some_and(|digits| digits.len() == 64 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')))
}

fn same_account(one: &str, other: &str) -> bool {
    one.eq_ignore_ascii_case(other)
}

/// 32 bytes that look random and are the same in every run.
fn hash_of(seed: &str) -> Hash32 {
    format!("0x{}", blake3::hash(format!("fabstir plugin check {seed}").as_bytes()).to_hex())
}

/// A name that no other check and no other run has.
fn unique(name: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    format!("{name}/{}/{now}/{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn voucher(number: u64) -> Voucher {
    Voucher {
        session: hash_of("session"),
        host: key::Key::made_of("host").account,
        amount: Amount(1_000_000 + u128::from(number)),
        input_tokens: 1000,
        output_tokens: 2000,
        transcript: hash_of("transcript"),
    }
}

fn session_terms() -> Terms {
    Terms {
        host: key::Key::made_of("host").account,
        client: key::Key::made_of("client").account,
        model: hash_of("model"),
        coin: ZEROS.into(),
        price_input_per_mtok: Amount(1_000_000_000_000),
        price_output_per_mtok: Amount(2_000_000_000_000),
        expires_s: 2_000_000_000,
        settle_window_s: 600,
        valid_until_s: 1_999_990_000,
        nonce: hash_of("nonce"),
    }
}

/// Terms that every market takes, with ten minutes to claim.
fn job_terms(heads: &Heads) -> JobTerms {
    JobTerms {
        model: hash_of("model"),
        coin: ZEROS.into(),
        max_amount: Amount(MILLI),
        price_input_per_mtok: Amount(1_000_000_000_000),
        price_output_per_mtok: Amount(1_000_000_000_000),
        max_input_tokens: 1000,
        max_output_tokens: 1000,
        // The clock of a chain where nothing happens stands still between two blocks.
        claim_by_s: heads.latest.time_s.max(now_s()) + 600,
        // What does not apply is zero: a contract need not keep it.
        deliver_s: 60,
        prove_s: 0,
        challenge_s: 60,
        resolve_s: 0,
        max_attempts: 1,
        host_bond: Amount(0),
        challenge_bond: Amount(0),
        proof_kind: 0,
        program: format!("0x{}", "0".repeat(64)),
        arbiter: ZEROS.into(),
    }
}

/// An act that posts a job, recognised later by its input.
fn posting(heads: &Heads) -> (Hash32, Act) {
    let input_commitment = hash_of(&unique("input"));
    let act =
        Act::PostJob { terms: job_terms(heads), input_commitment: input_commitment.clone(), input_ref: "check:input".into() };
    (input_commitment, act)
}

fn order(key: &str, act: &Act) -> Order {
    Order { key: key.into(), act: act.clone() }
}

fn job_terms_of(act: &Act) -> JobTerms {
    match act {
        Act::PostJob { terms, .. } => terms.clone(),
        other => panic!("{other:?} posts no job"),
    }
}
