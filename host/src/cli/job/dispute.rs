//! Objecting to a result, and what comes of it.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use fabstir_plugin_api::chain::{Act, Amount, Job as Posting, JobId, JobState, Progress, Sure};
use serde_json::json;

use super::super::account::{Shared, at_desk, done, limits, with_chain};
use super::super::network::on_threads;
use super::super::{Failure, print};
use super::{events, now_s, only_client, read, status};
use crate::market::history::{Division, division_in};
use crate::market::{Desk, NATIVE, coins};

/// Objects to the result of a job, with the bond that its terms name.
///
/// The arbiter of the terms decides: it can be asked only where they name one. If it rules for the node, that is paid and gets as much of
/// the bond as the ruling says; if it rules for the client, the amount comes back, and as much of the node's bond. `job resolve` carries a
/// ruling out.
#[derive(Debug, Args)]
pub struct Challenge {
    /// The job's number.
    id: JobId,

    /// A number for the arbiter, from 0 to 255, of a list that it has.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    reason: u8,

    /// A file that the arbiter will be shown: its hash goes to the chain, so that it cannot be another one later.
    #[arg(long, value_name = "FILE")]
    evidence: Option<PathBuf>,

    #[command(flatten)]
    shared: Shared,
}

impl Challenge {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.shared.prepare(json)?;
        let evidence = self.evidence()?;
        let account = self.shared.account.open(&config)?;
        let (id, within) = (self.id, self.shared.within());
        let (order, job, coin, now) = on_threads(with_chain(&config, async |chain| {
            let job = read(chain, id, Sure::Latest).await?;
            let now = now_s(chain).await?;
            can_object(id, &job, now)?;
            let bond = job.terms.challenge_bond;
            // The bond is all that this account sends along.
            let desk = Desk::begin(chain.clone(), account, limits(&config, bond)).await?;
            only_client(&desk, id, &job)?;
            let act = Act::Challenge { job: id, reason: self.reason, evidence: evidence.clone(), bond };
            desk.quote(act.clone()).await?;
            let order = desk.carry_out(&format!("challenge-{id}"), act, within).await?;
            Ok((order, read(chain, id, Sure::Latest).await?, desk.network.coin.clone(), now))
        }))?;
        let text = format!(
            "{}\n{} are put down for it; job {id} {}\n`fabstir-node job resolve {id}` carries its ruling out",
            done(&order, &coin),
            coins(job.terms.challenge_bond, &coin),
            status::state(&job, now)
        );
        Ok(print(json, &json!({ "id": id, "evidence": evidence, "order": order, "job": job }), text)?)
    }

    /// The hash of what the arbiter will be shown; zeros where that is nothing.
    fn evidence(&self) -> Result<String, Failure> {
        let Some(path) = &self.evidence else { return Ok(format!("0x{}", "0".repeat(64))) };
        let cannot = |error| Failure::new(Failure::FAILED, "file", format!("{} cannot be read: {error}", path.display()));
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(fs::File::open(path).map_err(cannot)?).map_err(cannot)?;
        Ok(format!("0x{}", hasher.finalize().to_hex()))
    }
}

fn can_object(id: JobId, job: &Posting, now: u64) -> Result<(), Failure> {
    let no =
        |code: &str, why: &str| Err(Failure::new(Failure::FAILED, code, format!("job {id} {}: {why}", status::state(job, now))));
    match job.state {
        JobState::Delivered | JobState::Proven if job.terms.arbiter == NATIVE => {
            no("no_arbiter", "its terms name no arbiter, so that nobody can object to its result")
        }
        JobState::Delivered | JobState::Proven if job.until_s.is_some_and(|until| now > until) => {
            no("late", "the time to object is over")
        }
        JobState::Delivered | JobState::Proven => Ok(()),
        _ => no("nothing", "there is no result to object to"),
    }
}

/// Ends a challenge, by its ruling or, where there was none in time, by the contract's own rule.
pub(super) fn resolve(id: JobId, shared: &Shared, json: bool) -> Result<(), Failure> {
    let config = shared.prepare(json)?;
    let account = shared.account.open(&config)?;
    let (order, job, division, coin, now) = on_threads(at_desk(&config, account, Amount(0), async |desk| {
        let order = end(desk, id, shared).await?;
        let job = read(&desk.chain, id, Sure::Latest).await?;
        let now = now_s(&desk.chain).await?;
        // It is done, whether or not it can be seen now.
        let division = events(&desk.chain, id, shared.within()).await.ok().and_then(|history| division_in(history.events()));
        Ok((order, job, division, desk.network.coin.clone(), now))
    }))?;
    let divided = division.as_ref().map(|division: &Division| division.words(&coin));
    let lines = [Some(done(&order, &coin)), Some(format!("job {id} {}", status::state(&job, now))), divided];
    let text = lines.into_iter().flatten().collect::<Vec<_>>().join("\n");
    Ok(print(json, &json!({ "id": id, "order": order, "job": job, "division": division }), text)?)
}

async fn end(desk: &Desk, id: JobId, shared: &Shared) -> Result<Progress, Failure> {
    let job = read(&desk.chain, id, Sure::Latest).await?;
    let now = now_s(&desk.chain).await?;
    if job.state != JobState::Challenged {
        let message = format!("job {id} {}: nobody objects to it", status::state(&job, now));
        return Err(Failure::new(Failure::FAILED, "nothing", message));
    }
    let (name, act) = match job.until_s.is_some_and(|until| now > until) {
        false => ("resolve", Act::Resolve { job: id }),
        true => ("expire", Act::ExpireJob { job: id }),
    };
    desk.quote(act.clone()).await?;
    Ok(desk.carry_out(&format!("{name}-{id}"), act, shared.within()).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::market::seller::jobs::example;

    #[test]
    fn only_a_result_that_is_there_can_be_objected_to_in_time_before_an_arbiter() {
        let row = example(7);
        let mut job = Posting {
            client: row.client,
            terms: row.terms,
            input_commitment: row.input_commitment,
            state: JobState::Delivered,
            host: None,
            until_s: Some(100),
            attempts: 1,
            proven: false,
        };
        let refused = |job: &Posting, now| can_object(7, job, now).err().map(|failure| failure.json["error"]["code"].clone());
        assert_eq!(refused(&job, 50), Some("no_arbiter".into()));
        job.terms.arbiter = format!("0x{}", "ab".repeat(20));
        assert_eq!(refused(&job, 100), None);
        assert_eq!(refused(&job, 101), Some("late".into()));
        job.state = JobState::Proven;
        assert_eq!(refused(&job, 50), None);
        for state in [JobState::Open, JobState::Claimed, JobState::Challenged, JobState::Settled] {
            job.state = state;
            assert_eq!(refused(&job, 50), Some("nothing".into()));
        }
    }
}
