//! What the contracts say, in the words of the kind: events and state.

use ethers::abi::RawLog;
use ethers::contract::EthLogDecode;
use ethers::types::{H256, U256};
use fabstir_plugin_api::prelude::*;

use crate::contracts::escrow::{self, ComputeEscrowEvents};
use crate::hex::{account_text, hash_text};

/// An event of the escrow contract; `None` for one that is not told, such as a withdrawal.
///
/// # Errors
/// `Internal` for a log of the contract that is not as its ABI says: then another contract stands at its address.
pub fn event(topics: Vec<H256>, data: Vec<u8>) -> Result<Option<MarketEvent>> {
    let first = topics.first().copied();
    let event = ComputeEscrowEvents::decode_log(&RawLog { topics, data }).map_err(|error| {
        let topic = first.map_or("no topic".into(), hash_text);
        PluginError::internal(format!("the escrow contract sent a log that its ABI does not have ({topic}): {error}"))
    })?;
    Ok(Some(match event {
        ComputeEscrowEvents::JobPostedFilter(event) => MarketEvent::JobPosted {
            job: job_id(event.job_id)?,
            client: account_text(event.client),
            terms: job_terms(event.terms),
            input_commitment: hash_text(event.input_commitment),
            input_ref: event.input_ref,
        },
        ComputeEscrowEvents::JobClaimedFilter(event) => MarketEvent::JobClaimed {
            job: job_id(event.job_id)?,
            host: account_text(event.host),
            deliver_by_s: event.deliver_by,
            attempt: event.attempt,
        },
        ComputeEscrowEvents::ClaimLostFilter(event) => {
            MarketEvent::ClaimLost { job: job_id(event.job_id)?, host: account_text(event.host), reopened: event.reopened }
        }
        ComputeEscrowEvents::ResultSubmittedFilter(event) => MarketEvent::ResultSubmitted {
            job: job_id(event.job_id)?,
            host: account_text(event.host),
            result: JobResult {
                output_commitment: hash_text(event.output_commitment),
                trace: (event.trace != [0; 32]).then(|| hash_text(event.trace)),
                input_tokens: event.in_tokens,
                output_tokens: event.out_tokens,
                result_ref: event.result_ref,
            },
        },
        ComputeEscrowEvents::ProofAcceptedFilter(event) => {
            MarketEvent::ProofAccepted { job: job_id(event.job_id)?, kind: event.kind, program: hash_text(event.program_id) }
        }
        ComputeEscrowEvents::ChallengedFilter(event) => {
            MarketEvent::Challenged { job: job_id(event.job_id)?, by: account_text(event.by) }
        }
        ComputeEscrowEvents::JobSettledFilter(event) => MarketEvent::JobSettled {
            job: job_id(event.job_id)?,
            host: account_text(event.host),
            to_host: Amount(event.to_host),
            to_client: Amount(event.to_client),
        },
        ComputeEscrowEvents::JobRefundedFilter(event) => MarketEvent::JobRefunded {
            job: job_id(event.job_id)?,
            client: account_text(event.client),
            amount: Amount(event.amount),
        },
        ComputeEscrowEvents::SessionOpenedFilter(event) => MarketEvent::SessionOpened {
            session: hash_text(event.session_id),
            deposit: Amount(event.terms.deposit),
            terms: session_terms(event.terms),
        },
        ComputeEscrowEvents::SessionToppedUpFilter(event) => {
            MarketEvent::SessionToppedUp { session: hash_text(event.session_id), deposit: Amount(event.total) }
        }
        ComputeEscrowEvents::VoucherSettledFilter(event) => MarketEvent::VoucherSettled {
            session: hash_text(event.session_id),
            host: account_text(event.host),
            amount: Amount(event.cumulative_amount),
            paid_now: Amount(event.paid_now),
        },
        ComputeEscrowEvents::SessionClosingFilter(event) => {
            MarketEvent::SessionClosing { session: hash_text(event.session_id), settle_by_s: event.settle_by }
        }
        ComputeEscrowEvents::SessionSettledFilter(event) => MarketEvent::SessionSettled {
            session: hash_text(event.session_id),
            to_host: Amount(event.to_host),
            to_client: Amount(event.to_client),
        },
        _ => return Ok(None),
    }))
}

pub fn job_id(id: U256) -> Result<JobId> {
    if id.bits() > 64 {
        return Err(PluginError::internal("a job has a number of more than 64 bits"));
    }
    Ok(id.as_u64())
}

pub fn session_terms(terms: escrow::SessionTerms) -> Terms {
    Terms {
        host: account_text(terms.host),
        client: account_text(terms.client),
        model: hash_text(terms.model_id),
        coin: account_text(terms.token),
        price_input_per_mtok: Amount(terms.price_in_per_m_tok),
        price_output_per_mtok: Amount(terms.price_out_per_m_tok),
        expires_s: terms.expiry,
        settle_window_s: terms.settle_window_secs,
        valid_until_s: terms.offer_valid_until,
        nonce: hash_text(terms.nonce),
    }
}

pub fn job_terms(terms: escrow::JobTerms) -> JobTerms {
    JobTerms {
        model: hash_text(terms.model_id),
        coin: account_text(terms.token),
        max_amount: Amount(terms.max_amount),
        price_input_per_mtok: Amount(terms.price_in_per_m_tok),
        price_output_per_mtok: Amount(terms.price_out_per_m_tok),
        max_input_tokens: terms.max_in_tokens,
        max_output_tokens: terms.max_out_tokens,
        claim_by_s: terms.claim_by,
        deliver_s: terms.deliver_secs,
        prove_s: terms.prove_secs,
        challenge_s: terms.challenge_secs,
        resolve_s: terms.resolve_secs,
        max_attempts: terms.max_attempts,
        host_bond: Amount(terms.host_bond),
        challenge_bond: Amount(terms.challenge_bond),
        proof_kind: terms.proof_kind,
        program: hash_text(terms.program_id),
        arbiter: account_text(terms.arbiter),
    }
}
