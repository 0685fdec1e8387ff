//! `fabstir-node job`: jobs posted for any node of the market, from the client's side.

use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use fabstir_plugin_api::chain::{Act, Amount, Chain, Job as Posting, JobId, JobState, Progress, Sure};
use fabstir_plugin_api::error::Code;
use serde_json::json;

use super::account::{Shared, at_desk, cx, done, history, of_plugin};
use super::network::on_threads;
use super::{Failure, print};
use crate::clock::now_ms;
use crate::market::history::{Division, History, division_in, job_of};
use crate::market::{Desk, coins};

mod dispute;
mod post;
mod result;
mod status;

/// Posts jobs for any node of the market, and fetches what comes of them.
///
/// A job stands on the chain with its prompt, which everybody can read, its prices and the amount that is put down for it. The first node
/// to claim it puts down a bond, works, and hands in what it commits to. It is paid when the client accepts, or when the time to object is
/// over; the rest comes back as credit, which `market withdraw` fetches. What nobody claims, or hands in, in time comes back whole.
#[derive(Debug, Args)]
pub struct Job {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Post(Box<post::Post>),
    /// Shows how far a job is, what comes next, and who was paid in the end.
    Status {
        /// The job's number. Without it, every job that was posted from this data folder.
        id: Option<JobId>,
        #[command(flatten)]
        shared: Shared,
    },
    Result(Box<result::ResultOf>),
    /// Takes back a job that nobody has claimed, or that its node is late with.
    ///
    /// The amount comes back as credit, and the bond of a node that is late comes with it.
    Cancel {
        /// The job's number.
        id: JobId,
        #[command(flatten)]
        shared: Shared,
    },
    /// Accepts the result of a job: its node is paid at once, and the rest comes back.
    ///
    /// Whoever wants to see the result first asks for both with `job result ID --accept`.
    Accept {
        /// The job's number.
        id: JobId,
        #[command(flatten)]
        shared: Shared,
    },
    Challenge(Box<dispute::Challenge>),
    /// Has the arbiter of a challenged job ruled, and divides its money as it says.
    ///
    /// Anyone may, client, node or arbiter. Where the arbiter has not ruled in time, the job ends as its contract says: a node that has
    /// proven is paid and has the bond of the challenge; otherwise its client has the money back, and the bond of a node that owed a proof.
    Resolve {
        /// The job's number.
        id: JobId,
        #[command(flatten)]
        shared: Shared,
    },
}

impl Job {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        match self.action {
            Action::Post(post) => post.execute(json),
            Action::Status { id: Some(id), shared } => status::one(id, &shared, json),
            Action::Status { id: None, shared } => status::all(&shared, json),
            Action::Result(result) => result.execute(json),
            Action::Cancel { id, shared } => cancel(id, &shared, json),
            Action::Challenge(challenge) => challenge.execute(json),
            Action::Resolve { id, shared } => dispute::resolve(id, &shared, json),
            Action::Accept { id, shared } => {
                let config = shared.prepare(json)?;
                let account = shared.account.open(&config)?;
                let (paid, coin) = on_threads(at_desk(&config, account, Amount(0), async |desk| {
                    Ok((accept(desk, id, shared.within()).await?, desk.network.coin.clone()))
                }))?;
                Ok(print(json, &json!({ "job": id, "order": paid.order, "division": paid.division }), paid.words(&coin))?)
            }
        }
    }
}

/// A job in the newest block, or in one that is as sure as that.
async fn read(chain: &Arc<dyn Chain>, id: JobId, sure: Sure) -> Result<Posting, Failure> {
    chain.job(&cx(), id, sure).await.map_err(|error| match error.code {
        Code::NotFound => Failure::new(Failure::FAILED, "no_job", format!("there is no job {id} in the market: {error}")),
        _ => of_plugin(&error),
    })
}

/// The time by the clock of the contracts, in seconds since 1970, or by this machine's if the newest block is old.
async fn now_s(chain: &Arc<dyn Chain>) -> Result<u64, Failure> {
    let heads = chain.heads(&cx()).await.map_err(|error| of_plugin(&error))?;
    Ok(heads.latest.time_s.max(now_ms() / 1000))
}

/// Everything that has happened to a job up to the newest block.
async fn events(chain: &Arc<dyn Chain>, id: JobId, within: Duration) -> Result<History, Failure> {
    history(chain, move |event| job_of(event) == Some(id), within).await
}

fn same(one: &str, other: &str) -> bool {
    one.eq_ignore_ascii_case(other)
}

/// An accepted result.
struct Paid {
    order: Progress,
    /// `None` where it cannot be read at the moment.
    division: Option<Division>,
}

impl Paid {
    fn words(&self, coin: &str) -> String {
        let divided = self.division.as_ref().map(|division| division.words(coin));
        [Some(done(&self.order, coin)), divided].into_iter().flatten().collect::<Vec<_>>().join("\n")
    }
}

impl Division {
    fn words(&self, coin: &str) -> String {
        format!("{} went to the node, {} came back as credit", coins(self.to_host, coin), coins(self.to_client, coin))
    }
}

/// Accepts what a job's node has handed in.
async fn accept(desk: &Desk, id: JobId, within: Duration) -> Result<Paid, Failure> {
    let job = read(&desk.chain, id, Sure::Latest).await?;
    if !matches!(job.state, JobState::Delivered | JobState::Proven) {
        let message = format!("job {id} {}: there is nothing to accept", status::state(&job, now_s(&desk.chain).await?));
        return Err(Failure::new(Failure::FAILED, "nothing", message));
    }
    only_client(desk, id, &job)?;
    let act = Act::AcceptResult { job: id };
    desk.quote(act.clone()).await?;
    let order = desk.carry_out(&format!("accept-{id}"), act, within).await?;
    // It is done, whether or not it can be seen now.
    let division = events(&desk.chain, id, within).await.ok().and_then(|history| division_in(history.events()));
    Ok(Paid { order, division })
}

fn only_client(desk: &Desk, id: JobId, job: &Posting) -> Result<(), Failure> {
    match same(&job.client, &desk.account) {
        true => Ok(()),
        false => Err(not_yours(desk, id, job)),
    }
}

fn not_yours(desk: &Desk, id: JobId, job: &Posting) -> Failure {
    let message = format!("job {id} was posted by {}, and this is {}: name its key with --key", job.client, desk.account);
    Failure::new(Failure::FAILED, "not_yours", message)
}

fn cancel(id: JobId, shared: &Shared, json: bool) -> Result<(), Failure> {
    let config = shared.prepare(json)?;
    let account = shared.account.open(&config)?;
    let (orders, job, coin) = on_threads(at_desk(&config, account, Amount(0), async |desk| {
        let (orders, job) = take_back(desk, id, shared.within()).await?;
        Ok((orders, job, desk.network.coin.clone()))
    }))?;
    let mut lines: Vec<String> = orders.iter().map(|order| done(order, &coin)).collect();
    lines.push(match job.state {
        JobState::Refunded => {
            format!("{} came back as credit: `fabstir-node market withdraw` fetches it", coins(job.terms.max_amount, &coin))
        }
        _ => format!("job {id} {}", status::state(&job, now_ms() / 1000)),
    });
    Ok(print(json, &json!({ "id": id, "orders": orders, "job": job }), lines.join("\n"))?)
}

/// Ends a job as far as its state lets its client do it: the orders that it took, and the job after them.
async fn take_back(desk: &Desk, id: JobId, within: Duration) -> Result<(Vec<Progress>, Posting), Failure> {
    let mut orders = Vec::new();
    loop {
        let job = read(&desk.chain, id, Sure::Latest).await?;
        let now = now_s(&desk.chain).await?;
        let is_overdue = job.until_s.is_some_and(|until| now > until);
        let (name, act) = match (job.state, is_overdue) {
            // Its client can do that at any time, whatever this machine's clock says.
            (JobState::Open, _) if same(&job.client, &desk.account) => ("cancel", Act::CancelJob { job: id }),
            (JobState::Open, false) => return Err(not_yours(desk, id, &job)),
            (JobState::Delivered, true) if status::owes_proof(&job) => ("expire", Act::ExpireJob { job: id }),
            (JobState::Open | JobState::Claimed, true) => ("expire", Act::ExpireJob { job: id }),
            _ if !orders.is_empty() => return Ok((orders, job)),
            _ => return Err(cannot_cancel(id, &job, now)),
        };
        desk.quote(act.clone()).await?;
        orders.push(desk.carry_out(&format!("{name}-{id}"), act, within).await?);
        // A node that is late has lost its claim, and the job may be open again.
        if job.state != JobState::Claimed {
            return Ok((orders, read(&desk.chain, id, Sure::Latest).await?));
        }
    }
}

fn cannot_cancel(id: JobId, job: &Posting, now: u64) -> Failure {
    let (code, next) = match job.state {
        JobState::Claimed => ("claimed", "it can be taken back only if the node is late".to_owned()),
        JobState::Settled | JobState::Refunded => ("over", "nothing is left to take back".to_owned()),
        _ => ("delivered", format!("`fabstir-node job result {id}` fetches what was handed in")),
    };
    Failure::new(Failure::FAILED, code, format!("job {id} {}: {next}", status::state(job, now)))
}
