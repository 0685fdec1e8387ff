//! What each act is on the contracts: whom to call, with how much and with what.

use ethers::abi::AbiEncode;
use ethers::types::{Address, Bytes, U256};
use fabstir_plugin_api::prelude::*;

use crate::config::Settings;
use crate::contracts::{escrow, nodes};
use crate::{hex, signed};

/// A call of a contract.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub to: Address,
    pub value: u128,
    pub data: Vec<u8>,
}

/// The call that an act is, when this account carries it out.
///
/// # Errors
/// `InvalidArgument` for what the contract cannot hold, `Unimplemented` for an act of a newer interface.
pub fn call(settings: &Settings, account: Address, act: &Act) -> Result<Call> {
    let to_escrow = |value: u128, data: Vec<u8>| Call { to: settings.escrow, value, data };
    let to_nodes = |value: u128, data: Vec<u8>| Call { to: settings.nodes, value, data };
    Ok(match act {
        Act::Register { payout, peer, stake } => {
            let payout = hex::account("payout", payout)?;
            let call = nodes::RegisterCall {
                payout,
                peer_id: Bytes::from(peer.as_bytes().to_vec()),
                record_hash: [0; 32],
                multiaddrs: Vec::new(),
            };
            to_nodes(stake.0, call.encode())
        }
        Act::BeginExit => to_nodes(0, nodes::BeginExitCall { id: account }.encode()),
        Act::FinishExit => to_nodes(0, nodes::FinishExitCall { id: account }.encode()),
        Act::Withdraw { coin, to } => {
            let call = escrow::WithdrawCall { token: hex::account("coin", coin)?, to: hex::account("to", to)? };
            to_escrow(0, call.encode())
        }
        Act::WithdrawStake { to } => to_nodes(0, nodes::WithdrawCall { to: hex::account("to", to)? }.encode()),
        Act::OpenSession { terms, deposit, offer } => {
            signed::signature(offer)?;
            let value = native(&terms.coin, *deposit)?;
            let call = escrow::OpenSessionCall { t: session_terms(terms, *deposit)?, host_offer_sig: offer.clone().into() };
            to_escrow(value, call.encode())
        }
        Act::TopUp { session, amount } => {
            let call = escrow::TopUpCall { session_id: hex::hash("session", session)?, amount: amount.0 };
            to_escrow(amount.0, call.encode())
        }
        Act::Settle { voucher, signature, close } => {
            signed::signature(signature)?;
            let (v, client_sig) = (self::voucher(voucher)?, Bytes::from(signature.clone()));
            let data = match close {
                true => escrow::SettleAndCloseCall { v, client_sig }.encode(),
                false => escrow::SettleCall { v, client_sig }.encode(),
            };
            to_escrow(0, data)
        }
        Act::CloseSession { session } => {
            to_escrow(0, escrow::CloseSessionCall { session_id: hex::hash("session", session)? }.encode())
        }
        Act::FinalizeSession { session } => {
            to_escrow(0, escrow::FinalizeSessionCall { session_id: hex::hash("session", session)? }.encode())
        }
        Act::PostJob { terms, input_commitment, input_ref } => {
            let value = native(&terms.coin, terms.max_amount)?;
            let call = escrow::PostJobCall {
                t: job_terms(terms)?,
                input_commitment: hex::hash("input_commitment", input_commitment)?,
                input_ref: input_ref.clone(),
            };
            to_escrow(value, call.encode())
        }
        Act::CancelJob { job } => to_escrow(0, escrow::CancelJobCall { job_id: U256::from(*job) }.encode()),
        Act::ClaimJob { job } => to_escrow(0, escrow::ClaimJobCall { job_id: U256::from(*job) }.encode()),
        Act::AbandonJob { job } => to_escrow(0, escrow::AbandonJobCall { job_id: U256::from(*job) }.encode()),
        Act::SubmitResult { job, result } => {
            let call = escrow::SubmitResultCall {
                job_id: U256::from(*job),
                output_commitment: hex::hash("output_commitment", &result.output_commitment)?,
                trace: result.trace.as_ref().map_or(Ok([0; 32]), |trace| hex::hash("trace", trace))?,
                in_tokens: result.input_tokens,
                out_tokens: result.output_tokens,
                result_ref: result.result_ref.clone(),
            };
            to_escrow(0, call.encode())
        }
        Act::SubmitProof { job, public_inputs, proof } => {
            let (public_inputs, proof) = (public_inputs.clone().into(), proof.clone().into());
            to_escrow(0, escrow::SubmitProofCall { job_id: U256::from(*job), public_inputs, proof }.encode())
        }
        Act::Challenge { job, reason, evidence, bond } => {
            let evidence_hash = hex::hash("evidence", evidence)?;
            to_escrow(bond.0, escrow::ChallengeCall { job_id: U256::from(*job), reason: *reason, evidence_hash }.encode())
        }
        Act::Resolve { job } => to_escrow(0, escrow::ResolveCall { job_id: U256::from(*job) }.encode()),
        Act::AcceptResult { job } => to_escrow(0, escrow::AcceptResultCall { job_id: U256::from(*job) }.encode()),
        Act::ExpireJob { job } => to_escrow(0, escrow::ExpireCall { job_id: U256::from(*job) }.encode()),
        Act::Unknown => return Err(PluginError::unimplemented("act")),
    })
}

/// The most gas that a call may use. Fixed, so that an order needs no endpoint to be taken; what is not used is not paid. Each is about
/// twice what `contracts/gas.md` has for the call, and what its data costs comes on top.
pub fn gas(act: &Act, data: &[u8]) -> u64 {
    let work = match act {
        Act::Register { .. } | Act::PostJob { .. } => 700_000,
        Act::OpenSession { .. } | Act::SubmitResult { .. } => 500_000,
        // What a verifier takes. One proof of Groth16 takes about 250,000, and an answer has up to 8 in half a kilobyte each; EZKL's
        // reusable verifier takes 1.6 million for proofs of 20 kilobytes.
        Act::SubmitProof { proof, .. } => (900_000 + 300_000 * (proof.len() as u64 / 448)).min(2_500_000),
        _ => 300_000,
    };
    // 16 for a byte of data and 8 for one in an event, and 40 where data is the larger part (EIP-7623).
    work + 64 * data.len() as u64
}

/// The gas that a call is likely to use, for calls that cannot be tried yet: the proof of a job that is not claimed, say.
pub fn likely_gas(act: &Act, data: &[u8]) -> u64 {
    match act {
        // `submitProof` itself, and a verification for each proof of Groth16 that is as long as this. Longer paths make it seem more, and
        // longer proofs than these are EZKL's.
        Act::SubmitProof { proof, .. } if proof.len() <= 8 << 10 => {
            (200_000 + 255_000 * (proof.len() as u64 / 448).max(1)).min(2_250_000) + 40 * data.len() as u64
        }
        _ => gas(act, data) / 2,
    }
}

/// What goes along with the call: the whole of it in the chain's own coin. Tokens of contracts are fetched by allowance, which this
/// plugin does not give.
fn native(coin: &str, amount: Amount) -> Result<u128> {
    match hex::account("coin", coin)?.is_zero() {
        true => Ok(amount.0),
        false => Err(PluginError::invalid(format!(
            "deposits are made in the chain's own coin (0x and 40 zeros), not in {coin}: approving tokens is not provided"
        ))),
    }
}

fn session_terms(terms: &Terms, deposit: Amount) -> Result<escrow::SessionTerms> {
    Ok(escrow::SessionTerms {
        host: hex::account("host", &terms.host)?,
        client: hex::account("client", &terms.client)?,
        model_id: hex::hash("model", &terms.model)?,
        token: hex::account("coin", &terms.coin)?,
        deposit: deposit.0,
        price_in_per_m_tok: terms.price_input_per_mtok.0,
        price_out_per_m_tok: terms.price_output_per_mtok.0,
        expiry: terms.expires_s,
        settle_window_secs: terms.settle_window_s,
        offer_valid_until: terms.valid_until_s,
        nonce: hex::hash("nonce", &terms.nonce)?,
    })
}

fn voucher(voucher: &Voucher) -> Result<escrow::Voucher> {
    Ok(escrow::Voucher {
        session_id: hex::hash("session", &voucher.session)?,
        host: hex::account("host", &voucher.host)?,
        cumulative_amount: voucher.amount.0,
        cumulative_in: voucher.input_tokens,
        cumulative_out: voucher.output_tokens,
        transcript_root: hex::hash("transcript", &voucher.transcript)?,
    })
}

fn job_terms(terms: &JobTerms) -> Result<escrow::JobTerms> {
    Ok(escrow::JobTerms {
        model_id: hex::hash("model", &terms.model)?,
        token: hex::account("coin", &terms.coin)?,
        max_amount: terms.max_amount.0,
        price_in_per_m_tok: terms.price_input_per_mtok.0,
        price_out_per_m_tok: terms.price_output_per_mtok.0,
        max_in_tokens: terms.max_input_tokens,
        max_out_tokens: terms.max_output_tokens,
        claim_by: terms.claim_by_s,
        deliver_secs: terms.deliver_s,
        prove_secs: terms.prove_s,
        challenge_secs: terms.challenge_s,
        resolve_secs: terms.resolve_s,
        max_attempts: terms.max_attempts,
        host_bond: terms.host_bond.0,
        challenge_bond: terms.challenge_bond.0,
        proof_kind: terms.proof_kind,
        program_id: hex::hash("program", &terms.program)?,
        arbiter: hex::account("arbiter", &terms.arbiter)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_of_any_number_of_draws_has_gas_enough_and_a_small_one_no_fortune() {
        let both = |bytes: usize| {
            let (act, data) =
                (Act::SubmitProof { job: 1, public_inputs: vec![0; 64], proof: vec![0; bytes] }, vec![0; bytes + 260]);
            (gas(&act, &data), likely_gas(&act, &data))
        };
        let gas = |bytes: usize| both(bytes).0;
        // By `test_whatChecksCost` a draw takes below 255,000, its data 16 a byte, and `submitProof` itself, with what `HeadVerifier` reads
        // of the job, below 200,000. An opening has 480 bytes and 32 for each level of its path.
        for (draws, levels) in (1..=8).flat_map(|draws| [0, 5, 13].map(|levels| (draws, levels))) {
            let bytes = 64 + draws * (480 + 32 * levels);
            let needed = 200_000 + 255_000 * draws as u64 + 40 * bytes as u64;
            let (most, likely) = both(bytes);
            assert!(most > needed, "{draws} draws, {levels} levels: {most} of {needed}");
            assert!(likely >= needed && likely <= 2 * needed, "{draws} draws, {levels} levels: likely {likely} of {needed}");
        }
        // The largest of EZKL's circuits that was measured took 1,583,510 with 19,780 bytes of data.
        assert!(gas(19_780) > 1_900_000 && both(19_780).1 > 1_583_510);
        assert!(gas(256) < 1_000_000, "a receipt is not priced as the largest of all");
    }
}
