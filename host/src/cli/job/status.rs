//! How far a job is.

use std::sync::Arc;

use fabstir_plugin_api::chain::{Chain, Job as Posting, JobId, JobState, JobTerms, MarketEvent, Sure};
use fabstir_plugin_api::error::Code;
use serde_json::{Value, json};

use super::super::account::{Shared, cx, of_plugin, with_chain};
use super::super::network::on_threads;
use super::super::{Failure, print, table};
use super::{events, history, now_s, read, same};
use crate::config::Config;
use crate::market::history::{History, division_in, result_in};
use crate::market::journal::posted::{self, Posted};
use crate::market::{Journal, NATIVE, coins, earnings, journal};

/// A time on the chain, as people read it.
pub(super) fn moment(at_s: u64, now_s: u64) -> String {
    match at_s.checked_sub(now_s) {
        Some(left) => format!("{at_s} (Unix time), in {}", span(left)),
        None => format!("{at_s} (Unix time), {} ago", span(now_s - at_s)),
    }
}

/// A time span in its two largest units.
fn span(seconds: u64) -> String {
    let parts = [("d", seconds / 86400), ("h", seconds / 3600 % 24), ("min", seconds / 60 % 60), ("s", seconds % 60)];
    let parts = parts.iter().skip_while(|(_, count)| *count == 0).take(2).filter(|(_, count)| *count > 0);
    let parts: Vec<String> = parts.map(|(unit, count)| format!("{count} {unit}")).collect();
    if parts.is_empty() { "0 s".into() } else { parts.join(" ") }
}

/// Whether its node is not paid without a proof that it has not given yet.
pub(super) fn owes_proof(job: &Posting) -> bool {
    job.terms.proof_kind != 0 && !job.proven
}

/// The state as the rest of a sentence about the job.
pub(super) fn state(job: &Posting, now: u64) -> String {
    let host = job.host.as_deref().unwrap_or("a node");
    let until = job.until_s.map_or("a time that is not known".into(), |until| moment(until, now));
    let is_overdue = job.until_s.is_some_and(|until| now > until);
    match (job.state, is_overdue) {
        (JobState::Open, false) => format!("is open until {until}"),
        (JobState::Open, true) => format!("was not claimed, and could be until {until}"),
        (JobState::Claimed, false) => format!("is claimed by {host}, which has to hand in its result until {until}"),
        (JobState::Claimed, true) => format!("is claimed by {host}, which is late: its time was over at {until}"),
        (JobState::Delivered, false) if owes_proof(job) => format!("has a result, which its node has to prove until {until}"),
        (JobState::Delivered, true) if owes_proof(job) => {
            format!("has a result that was not proven: time for it was until {until}")
        }
        (JobState::Delivered | JobState::Proven, false) if job.terms.arbiter != NATIVE => {
            format!("has a result, to which its client can object until {until}")
        }
        (JobState::Delivered | JobState::Proven, false) => format!("has a result, and its node is paid at {until}"),
        (JobState::Delivered | JobState::Proven, true) => format!("has a result, to which nobody has objected until {until}"),
        (JobState::Challenged, false) => format!("is challenged; its arbiter decides until {until}"),
        (JobState::Challenged, true) => format!("is challenged, and its arbiter has not decided until {until}"),
        (JobState::Settled, _) => "is paid".into(),
        (JobState::Refunded, _) => "is over, and its amount came back".into(),
        (JobState::Unknown, _) => "is in a state that this node does not know: update it".into(),
    }
}

/// What comes next if nobody does anything, and what somebody can do.
fn next(id: JobId, job: &Posting, now: u64) -> Option<String> {
    let is_overdue = job.until_s.is_some_and(|until| now > until);
    Some(match (job.state, is_overdue) {
        (JobState::Open, false) => {
            format!("a node claims it, or `job cancel {id}` takes it back; after that time anyone can send the amount back")
        }
        (JobState::Open, true) => format!("`job cancel {id}` brings the amount back"),
        (JobState::Claimed, false) => "the node hands in its result, or loses its bond to the client".into(),
        (JobState::Claimed, true) => {
            format!("`job cancel {id}` takes the node's bond and brings the amount back")
        }
        (JobState::Delivered, false) if owes_proof(job) => "the node hands in its proof, or loses its bond and the amount".into(),
        (JobState::Delivered, true) if owes_proof(job) => {
            format!("`job cancel {id}` takes the node's bond and brings the amount back")
        }
        (JobState::Delivered | JobState::Proven, false) => {
            format!("`job result {id} --accept` fetches the result and pays the node; it is paid after that time in any case")
        }
        (JobState::Delivered | JobState::Proven, true) => "anyone can have the node paid now, and the node will".into(),
        (JobState::Challenged, false) => format!("the arbiter rules, and `job resolve {id}` carries that out"),
        (JobState::Challenged, true) => format!("`job resolve {id}` ends it as its contract says"),
        (JobState::Settled | JobState::Refunded, _) => "`market withdraw` fetches what came back".into(),
        (JobState::Unknown, _) => return None,
    })
}

fn word(state: JobState) -> &'static str {
    match state {
        JobState::Open => "open",
        JobState::Claimed => "claimed",
        JobState::Delivered => "delivered",
        JobState::Proven => "proven",
        JobState::Challenged => "challenged",
        JobState::Settled => "settled",
        JobState::Refunded => "refunded",
        JobState::Unknown => "unknown",
    }
}

pub(super) fn one(id: JobId, shared: &Shared, json: bool) -> Result<(), Failure> {
    let config = shared.prepare(json)?;
    let row = match journal::look(&config.node.data_dir)? {
        Some(journal) => posted::one(&journal, id)?,
        None => None,
    };
    let seen = on_threads(with_chain(&config, async |chain| {
        let coin = chain.network(&cx()).await.map_err(|error| of_plugin(&error))?.coin;
        let job = read(chain, id, Sure::Latest).await?;
        // Not there yet, where it was posted a moment ago.
        let safe = match chain.job(&cx(), id, Sure::Safe).await {
            Ok(safe) => Some(safe),
            Err(error) if error.code == Code::NotFound => None,
            Err(error) => return Err(of_plugin(&error)),
        };
        let now = now_s(chain).await?;
        let history = match job.state {
            JobState::Open | JobState::Claimed => None,
            _ => Some(events(chain, id, shared.within()).await?),
        };
        Ok((coin, job, safe, now, history))
    }))?;
    let (coin, job, safe, now, history) = seen;
    let happened = history.as_ref().map_or(&[][..], History::events);
    let (result, division) = (result_in(happened), division_in(happened));
    let is_mine = row.is_some() || shared.account.address(&config).is_ok_and(|address| same(&address, &job.client));
    let next = next(id, &job, now);
    let sure = match &safe {
        None => "no safe block has it yet".to_owned(),
        Some(safe) if safe.state == job.state => "so does the newest safe block".to_owned(),
        Some(safe) => format!("in the newest safe block it is {}", word(safe.state)),
    };
    let JobTerms { max_amount, price_input_per_mtok, price_output_per_mtok, host_bond, max_attempts, .. } = &job.terms;
    let shown = |amount| coins(amount, &coin);
    let mut rows = vec![
        ["job".to_owned(), format!("{id}, {}", state(&job, now))],
        ["sure".into(), format!("the newest block says so; {sure}")],
        ["client".into(), format!("{}{}", job.client, if is_mine { " (this account)" } else { "" })],
        ["most".into(), format!("{}, and a bond of {} from the node", shown(*max_amount), shown(*host_bond))],
        [
            "prices".into(),
            format!("{} in, {} out, per million tokens", shown(*price_input_per_mtok), shown(*price_output_per_mtok)),
        ],
    ];
    rows.extend(job.host.as_ref().map(|host| ["node".into(), format!("{host}, attempt {} of {max_attempts}", job.attempts)]));
    rows.extend(result.map(|result| {
        let price = shown(earnings::price(&job.terms, result));
        ["result".into(), format!("{} tokens read, {} generated: {price}", result.input_tokens, result.output_tokens)]
    }));
    if job.terms.proof_kind != 0 {
        let is = if job.proven { "accepted by the contract" } else { "not there yet" };
        rows.push(["proof".into(), format!("kind {}, program {}: {is}", job.terms.proof_kind, job.terms.program)]);
    }
    if job.terms.arbiter != NATIVE {
        let bond = shown(job.terms.challenge_bond);
        rows.push(["arbiter".into(), format!("{}, if its client objects, with {bond}", job.terms.arbiter)]);
    }
    rows.extend(division.map(|division| ["divided".into(), division.words(&coin)]));
    rows.extend(next.clone().map(|next| ["next".into(), next]));
    let value = json!({
        "id": id, "job": job, "safe": safe, "now_s": now, "mine": is_mine, "posted": row, "result": result, "division": division,
        "next": next,
    });
    Ok(print(json, &value, table(&rows))?)
}

pub(super) fn all(shared: &Shared, json: bool) -> Result<(), Failure> {
    let config = shared.prepare(json)?;
    let rows = match journal::look(&config.node.data_dir)? {
        Some(journal) => posted::all(&journal)?,
        None => Vec::new(),
    };
    if rows.is_empty() {
        return Ok(print(json, &json!({ "jobs": [] }), "No job was posted from here: `fabstir-node job post` posts one.")?);
    }
    let (seen, coin) = on_threads(with_chain(&config, async |chain| {
        let coin = chain.network(&cx()).await.map_err(|error| of_plugin(&error))?.coin;
        let rows = numbered(chain, &config, rows, shared).await?;
        let mut seen: Vec<(Posted, Option<Posting>)> = Vec::new();
        for row in rows {
            let job = match row.job {
                Some(id) => Some(read(chain, id, Sure::Latest).await?),
                None => None,
            };
            seen.push((row, job));
        }
        Ok((seen, coin))
    }))?;
    let mut lines = vec![["JOB", "STATE", "MOST", "MODEL"].map(str::to_owned)];
    lines.extend(seen.iter().map(|(row, job)| {
        [
            row.job.map_or("-".into(), |id| id.to_string()),
            job.as_ref().map_or("not on the chain yet", |job| word(job.state)).into(),
            coins(row.terms.max_amount, &coin),
            row.model.clone(),
        ]
    }));
    let jobs: Vec<Value> = seen.iter().map(|(row, job)| json!({ "posted": row, "job": job })).collect();
    Ok(print(json, &json!({ "jobs": jobs }), table(&lines))?)
}

/// The rows with the numbers that the chain has given since: of those whose command was cut off before it could tell.
async fn numbered(
    chain: &Arc<dyn Chain>,
    config: &Config,
    mut rows: Vec<Posted>,
    shared: &Shared,
) -> Result<Vec<Posted>, Failure> {
    if rows.iter().all(|row| row.job.is_some()) {
        return Ok(rows);
    }
    let wanted: Vec<String> = rows.iter().filter(|row| row.job.is_none()).map(|row| row.input_commitment.clone()).collect();
    let is_wanted = move |event: &MarketEvent| matches!(event, MarketEvent::JobPosted { input_commitment, .. } if wanted.contains(input_commitment));
    let told = history(chain, is_wanted, shared.within()).await?;
    let journal = Journal::open(&config.node.data_dir)?;
    for (_, event) in told.events() {
        let MarketEvent::JobPosted { job, terms, input_commitment, .. } = event else { continue };
        if rows.iter().any(|row| row.job == Some(*job)) {
            continue;
        }
        let is_it = |row: &&mut Posted| row.job.is_none() && row.input_commitment == *input_commitment && row.terms == *terms;
        if let Some(row) = rows.iter_mut().find(is_it) {
            row.job = Some(*job);
            journal.number_posted(&row.order_key, *job).await?;
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_from_now() {
        assert_eq!(moment(100, 100), "100 (Unix time), in 0 s");
        assert_eq!(moment(700, 100), "700 (Unix time), in 10 min");
        assert_eq!(moment(100, 3761), "100 (Unix time), 1 h 1 min ago");
        assert_eq!(span(86400 + 59), "1 d");
        assert_eq!(span(90), "1 min 30 s");
    }
}
