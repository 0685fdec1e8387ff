//! The rows of posted jobs: what is known of each, what this node does for it, and what the market's events make of it.

use std::fmt;

use fabstir_plugin_api::chain::{Account, Amount, Hash32, JobId, JobResult, JobTerms, MarketEvent};
use fabstir_plugin_api::prover::Proof;
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

use super::{Journal, JournalError, text, value};
use crate::clock::now_ms;

/// Where a job is, for this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It may be taken.
    Seen,
    /// It is not taken, whatever happens.
    Declined,
    /// It could not be taken: its time went by, or somebody else was first.
    Missed,
    /// Its claim is ordered, or about to be.
    Claiming,
    Claimed,
    /// A model works on it.
    Working,
    /// Its result is on disk.
    Stored,
    /// Handing in its result is ordered, or about to be.
    Submitting,
    /// A proof of it is made, which its terms ask for.
    Proving,
    /// Its proof is on disk; handing it in is ordered, or about to be.
    Proved,
    /// All is done that this node has to do for it.
    Submitted,
    /// Giving it up is ordered, or about to be.
    Abandoning,
    /// Paid.
    Settled,
    /// Claimed, and not paid.
    Failed,
}

impl State {
    pub const ALL: [State; 14] = [
        State::Seen,
        State::Declined,
        State::Missed,
        State::Claiming,
        State::Claimed,
        State::Working,
        State::Stored,
        State::Submitting,
        State::Proving,
        State::Proved,
        State::Submitted,
        State::Abandoning,
        State::Settled,
        State::Failed,
    ];

    /// The states in which this node has something to do.
    pub const IN_WORK: [State; 8] = [
        State::Claiming,
        State::Claimed,
        State::Working,
        State::Stored,
        State::Submitting,
        State::Proving,
        State::Proved,
        State::Abandoning,
    ];

    /// The states in which its result is still to be handed in.
    pub const BEFORE_RESULT: [State; 5] = [State::Claiming, State::Claimed, State::Working, State::Stored, State::Submitting];

    /// The states in which a proof that its terms ask for is still to be made.
    pub const PROMISED: [State; 6] =
        [State::Claiming, State::Claimed, State::Working, State::Stored, State::Submitting, State::Proving];

    /// The states in which the contract may have its result.
    const HANDED_IN: [State; 4] = [State::Submitting, State::Proving, State::Proved, State::Submitted];

    pub fn word(self) -> &'static str {
        match self {
            State::Seen => "seen",
            State::Declined => "declined",
            State::Missed => "missed",
            State::Claiming => "claiming",
            State::Claimed => "claimed",
            State::Working => "working",
            State::Stored => "stored",
            State::Submitting => "submitting",
            State::Proving => "proving",
            State::Proved => "proved",
            State::Submitted => "submitted",
            State::Abandoning => "abandoning",
            State::Settled => "settled",
            State::Failed => "failed",
        }
    }

    pub fn of(word: &str) -> Option<State> {
        State::ALL.into_iter().find(|state| state.word() == word)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A job, as the journal has it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobRow {
    pub id: JobId,
    pub client: Account,
    pub terms: JobTerms,
    pub input_commitment: Hash32,
    /// Empty once nothing can come of the job any more.
    #[serde(skip)]
    pub input_ref: String,
    pub block: u64,
    pub state: State,
    pub cause: Option<String>,
    pub why: Option<String>,
    /// What the model is called here, once the job is taken.
    pub model: Option<String>,
    /// How often something was ordered for it that came to nothing: each time, orders have new keys.
    pub attempt: u32,
    pub result: Option<JobResult>,
    /// The tokens of its result, where a proof needs them.
    #[serde(skip)]
    pub tokens: Vec<u32>,
    /// The proof that was made of it last.
    #[serde(skip)]
    pub proof: Option<Proof>,
    pub paid: Option<Amount>,
    pub seen_ms: u64,
    pub changed_ms: u64,
}

/// A step of a job from one state to the next. It is made only from the state that it starts in.
#[derive(Debug, Clone)]
pub struct Step {
    pub to: State,
    /// The word for a cause, and a sentence.
    pub because: Option<(&'static str, String)>,
    pub model: Option<String>,
    pub result: Option<JobResult>,
    pub tokens: Option<Vec<u32>>,
    pub proof: Option<Proof>,
    /// Whether what was ordered has come to nothing.
    pub anew: bool,
}

impl Step {
    pub fn to(to: State) -> Step {
        Step { to, because: None, model: None, result: None, tokens: None, proof: None, anew: false }
    }

    pub fn because(self, cause: &'static str, why: impl Into<String>) -> Step {
        Step { because: Some((cause, why.into())), ..self }
    }
}

/// What an event of the market meant to a job of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meant {
    /// Nothing that this node has to do with.
    Nothing,
    /// There is a job to look at.
    Seen(JobId),
    /// A client objects to what this node has handed in.
    Challenged(JobId),
    Settled {
        job: JobId,
        paid: Amount,
    },
    /// It is over, and this node is not paid. `worked`: it was this node's to do.
    Over {
        job: JobId,
        cause: &'static str,
        worked: bool,
    },
}

const COLUMNS: &str = "id, client, terms, input_commitment, input_ref, block, state, cause, why, model, attempt, result, paid, \
                       seen_ms, changed_ms, proof, tokens";

/// The rows in these states, the first posted first, at most so many.
pub fn rows(connection: &Connection, states: &[State], most: usize) -> Result<Vec<JobRow>, JournalError> {
    let words: Vec<String> = states.iter().map(|state| format!("'{state}'")).collect();
    let query = format!("SELECT {COLUMNS} FROM jobs WHERE state IN ({}) ORDER BY id LIMIT ?1", words.join(", "));
    let mut statement = connection.prepare(&query)?;
    let mut found = statement.query([i64::try_from(most).unwrap_or(i64::MAX)])?;
    let mut rows = Vec::new();
    while let Some(row) = found.next()? {
        rows.push(job(row)?);
    }
    Ok(rows)
}

/// The rows in one state, or in any, the last posted first, at most so many.
pub fn last(connection: &Connection, state: Option<State>, most: usize) -> Result<Vec<JobRow>, JournalError> {
    let query = format!("SELECT {COLUMNS} FROM jobs WHERE ?1 IS NULL OR state = ?1 ORDER BY id DESC LIMIT ?2");
    let mut statement = connection.prepare(&query)?;
    let mut found = statement.query(params![state.map(State::word), i64::try_from(most).unwrap_or(i64::MAX)])?;
    let mut rows = Vec::new();
    while let Some(row) = found.next()? {
        rows.push(job(row)?);
    }
    Ok(rows)
}

/// How many jobs there are of each state and cause.
pub fn counts(connection: &Connection) -> Result<Vec<(State, Option<String>, u64)>, JournalError> {
    let mut statement = connection.prepare("SELECT state, cause, count(*) FROM jobs GROUP BY state, cause")?;
    let mut found = statement.query([])?;
    let mut counts = Vec::new();
    while let Some(row) = found.next()? {
        let state: String = row.get(0)?;
        let count: i64 = row.get(2)?;
        let state = State::of(&state).ok_or_else(|| JournalError::Corrupt(format!("a job is in the state {state:?}")))?;
        counts.push((state, row.get(1)?, u64::try_from(count).unwrap_or(0)));
    }
    Ok(counts)
}

/// One row.
pub fn row(connection: &Connection, id: JobId) -> Result<Option<JobRow>, JournalError> {
    let mut statement = connection.prepare(&format!("SELECT {COLUMNS} FROM jobs WHERE id = ?1"))?;
    let mut found = statement.query([integer(id)?])?;
    found.next()?.map(job).transpose()
}

fn job(row: &Row<'_>) -> Result<JobRow, JournalError> {
    let state: String = row.get(6)?;
    let natural = |column: usize| -> Result<u64, JournalError> {
        let number: i64 = row.get(column)?;
        u64::try_from(number).map_err(|_| JournalError::Corrupt(format!("a job's column {column} is {number}")))
    };
    let result: Option<String> = row.get(11)?;
    let paid: Option<String> = row.get(12)?;
    let proof: Option<String> = row.get(15)?;
    let tokens: Option<String> = row.get(16)?;
    let unread = |error: std::num::ParseIntError| JournalError::Corrupt(format!("a job was paid no amount: {error}"));
    Ok(JobRow {
        id: natural(0)?,
        client: row.get(1)?,
        terms: value(&row.get::<_, String>(2)?)?,
        input_commitment: row.get(3)?,
        input_ref: row.get(4)?,
        block: natural(5)?,
        state: State::of(&state).ok_or_else(|| JournalError::Corrupt(format!("a job is in the state {state:?}")))?,
        cause: row.get(7)?,
        why: row.get(8)?,
        model: row.get(9)?,
        attempt: row.get(10)?,
        result: result.as_deref().map(value).transpose()?,
        tokens: tokens.as_deref().map(value).transpose()?.unwrap_or_default(),
        proof: proof.as_deref().map(value).transpose()?,
        paid: paid.map(|paid| paid.parse().map_err(unread)).transpose()?,
        seen_ms: natural(13)?,
        changed_ms: natural(14)?,
    })
}

/// Makes a step; `false`, and nothing is changed, where the row is no longer in the state that it starts in.
pub fn step(connection: &Connection, id: JobId, from: State, step: &Step) -> Result<bool, JournalError> {
    let (cause, why) = step.because.clone().unzip();
    let result = step.result.as_ref().map(text).transpose()?;
    let proof = step.proof.as_ref().map(text).transpose()?;
    let tokens = step.tokens.as_ref().map(text).transpose()?;
    // What can never be worked on needs no input any more: it is the largest part of a row, and strangers write it.
    let is_over = matches!(step.to, State::Declined | State::Settled | State::Failed);
    let changed = connection.execute(
        "UPDATE jobs SET state = ?3, cause = coalesce(?4, cause), why = coalesce(?5, why), model = coalesce(?6, model), \
         result = coalesce(?7, result), proof = coalesce(?11, proof), tokens = coalesce(?12, tokens), attempt = attempt + ?8, changed_ms = ?9, input_ref = iif(?10, '', input_ref) \
         WHERE id = ?1 AND state = ?2",
        params![integer(id)?, from.word(), step.to.word(), cause, why, step.model, result, u32::from(step.anew), now()?, is_over, proof, tokens],
    )?;
    Ok(changed == 1)
}

/// Notes why a job that may still be taken is not taken now.
pub fn waits(connection: &Connection, id: JobId, cause: &str, why: &str) -> Result<(), JournalError> {
    connection.execute(
        "UPDATE jobs SET cause = ?2, why = ?3 WHERE id = ?1 AND state = 'seen' AND (cause IS NOT ?2 OR why IS NOT ?3)",
        params![integer(id)?, cause, why],
    )?;
    Ok(())
}

/// Gives up what waited past the time until which it could be claimed.
pub fn miss(connection: &Connection, now_s: u64) -> Result<usize, JournalError> {
    Ok(connection.execute(
        "UPDATE jobs SET state = 'missed', cause = coalesce(cause, 'time'), why = coalesce(why, 'its time to be claimed went by'), \
         changed_ms = ?2 WHERE state = 'seen' AND json_extract(terms, '$.claim_by_s') < ?1",
        params![integer(now_s)?, now()?],
    )?)
}

/// Takes note of an event. `account` is this node's, `takes` whether new jobs are wanted at all.
pub fn note(connection: &Connection, account: &str, takes: bool, block: u64, event: &MarketEvent) -> Result<Meant, JournalError> {
    let ours = |host: &Account| host.eq_ignore_ascii_case(account);
    match event {
        MarketEvent::JobPosted { job, client, terms, input_commitment, input_ref } => {
            if !takes && row(connection, *job)?.is_none() {
                return Ok(Meant::Nothing);
            }
            posted(connection, *job, client, terms, input_commitment, input_ref, block)
        }
        // The claim was made, and the answer to it did not come through.
        MarketEvent::JobClaimed { job, host, .. } if ours(host) => {
            let found = "state = 'claimed', cause = NULL, why = NULL";
            let changed = end(connection, *job, block, found, "('seen', 'missed')")?;
            Ok(if changed { Meant::Seen(*job) } else { Meant::Nothing })
        }
        MarketEvent::JobClaimed { job, .. } => {
            let lost = "state = 'missed', cause = 'lost', why = 'another node was first'";
            let changed = end(connection, *job, block, lost, "('seen')")?;
            Ok(if changed { Meant::Over { job: *job, cause: "lost", worked: false } } else { Meant::Nothing })
        }
        MarketEvent::ClaimLost { job, host, .. } if ours(host) => {
            let late = "state = 'failed', cause = coalesce(cause, 'time'), why = coalesce(why, 'it was not delivered in time')";
            let changed = end(connection, *job, block, late, WORKED)?;
            Ok(if changed { Meant::Over { job: *job, cause: "time", worked: true } } else { Meant::Nothing })
        }
        MarketEvent::ClaimLost { job, reopened: true, .. } => {
            let again = "state = 'seen', cause = NULL, why = NULL, attempt = attempt + 1";
            let changed = end(connection, *job, block, again, "('missed') AND cause = 'lost'")?;
            Ok(if changed { Meant::Seen(*job) } else { Meant::Nothing })
        }
        MarketEvent::Challenged { job, .. } => {
            let is_ours = row(connection, *job)?.is_some_and(|row| State::HANDED_IN.contains(&row.state));
            Ok(if is_ours { Meant::Challenged(*job) } else { Meant::Nothing })
        }
        MarketEvent::JobSettled { job, host, to_host, .. } if ours(host) => {
            let paid = format!("state = 'settled', cause = NULL, why = NULL, input_ref = '', paid = '{to_host}'");
            let changed = end(connection, *job, block, &paid, &format!("{WORKED} OR id = ?1 AND state = 'failed'"))?;
            Ok(if changed { Meant::Settled { job: *job, paid: *to_host } } else { Meant::Nothing })
        }
        MarketEvent::JobSettled { job, .. } => {
            let others = "state = 'failed', cause = 'lost', why = 'another node was paid for it'";
            let changed = end(connection, *job, block, others, WORKED)?;
            Ok(if changed { Meant::Over { job: *job, cause: "lost", worked: true } } else { Meant::Nothing })
        }
        MarketEvent::JobRefunded { job, .. } => {
            let gone = "state = 'missed', cause = 'gone', why = 'its client has its money back'";
            if end(connection, *job, block, gone, "('seen')")? {
                return Ok(Meant::Over { job: *job, cause: "gone", worked: false });
            }
            let refunded =
                "state = 'failed', cause = coalesce(cause, 'gone'), why = coalesce(why, 'its client has its money back')";
            let changed = end(connection, *job, block, refunded, WORKED)?;
            Ok(if changed { Meant::Over { job: *job, cause: "gone", worked: true } } else { Meant::Nothing })
        }
        _ => Ok(Meant::Nothing),
    }
}

/// What a claimed job can be in. A job that is being claimed is left to its order, which tells the same sooner.
const WORKED: &str = "('claimed', 'working', 'stored', 'submitting', 'proving', 'proved', 'submitted', 'abandoning')";

/// Lets an event change a row that is in one of these states.
fn end(connection: &Connection, id: JobId, block: u64, set: &str, states: &str) -> Result<bool, JournalError> {
    let changed = connection.execute(
        &format!("UPDATE jobs SET {set}, ended_block = ?2, changed_ms = ?3 WHERE id = ?1 AND state IN {states}"),
        params![integer(id)?, integer(block)?, now()?],
    )?;
    Ok(changed > 0)
}

/// A posting, which may have been told before, or stand in the place of another one that the chain has taken back.
fn posted(
    connection: &Connection,
    id: JobId,
    client: &str,
    terms: &JobTerms,
    commitment: &str,
    input_ref: &str,
    block: u64,
) -> Result<Meant, JournalError> {
    let (terms, now) = (text(terms)?, now()?);
    // What has come of a job is no answer to another one, whatever number that has.
    let same = "client = ?2 AND terms = ?3 AND input_commitment = ?4";
    let kept = ["result", "tokens", "proof", "model"].map(|column| format!("{column} = iif({same}, {column}, NULL)")).join(", ");
    // What is claimed is left alone: before any work, and before anything is handed in, the chain is asked what stands there.
    let changed = connection.execute(
        &format!(
            "INSERT INTO jobs (id, client, terms, input_commitment, input_ref, block, state, seen_ms, changed_ms) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, 'seen', ?7, ?7) \
         ON CONFLICT (id) DO UPDATE SET client = ?2, terms = ?3, input_commitment = ?4, input_ref = ?5, block = ?6, state = 'seen', \
         cause = NULL, why = NULL, ended_block = NULL, attempt = attempt + 1, seen_ms = ?7, changed_ms = ?7, \
         {kept} \
         WHERE state IN ('seen', 'declined', 'missed') \
         AND (cause = 'reorg' OR NOT ({same}))"
        ),
        params![integer(id)?, client, terms, commitment, input_ref, integer(block)?, now],
    )?;
    Ok(if changed > 0 { Meant::Seen(id) } else { Meant::Nothing })
}

/// The chain has taken back every block above this number. What they ended goes on; what was posted in them is nothing until it is told
/// again.
pub fn back(connection: &Connection, number: Option<u64>) -> Result<(), JournalError> {
    let above = number.map_or(Ok(-1), integer)?;
    let undo = |set: &str, condition: &str| -> Result<(), JournalError> {
        let query = format!("UPDATE jobs SET {set}, ended_block = NULL, changed_ms = ?2 WHERE ended_block > ?1 AND {condition}");
        connection.execute(&query, params![above, now()?])?;
        Ok(())
    };
    undo("state = 'submitted', paid = NULL", "state = 'settled' AND result IS NOT NULL")?;
    // What the chain says of the claim and of the result decides, when it is asked next.
    // Orders have new keys: those that were placed may be of a proof that is made anew, and a key stands for one order for ever.
    undo("state = 'stored', cause = NULL, why = NULL, attempt = attempt + 1", "state = 'failed' AND result IS NOT NULL")?;
    undo("state = 'claimed', cause = NULL, why = NULL", "state = 'failed' AND result IS NULL AND input_ref != ''")?;
    undo("state = 'seen', cause = NULL, why = NULL, attempt = attempt + 1", "state = 'missed'")?;
    connection.execute(
        "UPDATE jobs SET state = 'missed', cause = 'reorg', why = 'the chain has taken its posting back', changed_ms = ?2 \
         WHERE block > ?1 AND state IN ('seen', 'declined', 'missed')",
        params![above, now()?],
    )?;
    Ok(())
}

/// A single value.
pub fn mark(connection: &Connection, name: &str) -> Result<Option<String>, JournalError> {
    let mut statement = connection.prepare("SELECT value FROM marks WHERE name = ?1")?;
    Ok(statement.query_row([name], |row| row.get(0)).optional()?)
}

/// Sets a single value.
pub fn set_mark(connection: &Connection, name: &str, value: &str) -> Result<(), JournalError> {
    connection.execute("INSERT OR REPLACE INTO marks (name, value) VALUES (?1, ?2)", [name, value])?;
    Ok(())
}

fn integer(number: u64) -> Result<i64, JournalError> {
    i64::try_from(number).map_err(|_| JournalError::Write(format!("{number} is more than a column holds")))
}

fn now() -> Result<i64, JournalError> {
    integer(now_ms())
}

impl Journal {
    /// Whether this is the content id of a result that this node has stored for a job.
    pub async fn is_result(&self, id: &str) -> Result<bool, JournalError> {
        let commitment = format!("0x{id}");
        self.write(move |transaction| {
            let mut statement =
                transaction.prepare("SELECT 1 FROM jobs WHERE json_extract(result, '$.output_commitment') = ?1")?;
            Ok(statement.query_row([commitment], |_| Ok(())).optional()?.is_some())
        })
        .await
    }

    /// Makes a step of a job, and returns the row after it; `None` where it is no longer in that state.
    pub async fn step_job(&self, id: JobId, from: State, to: Step) -> Result<Option<JobRow>, JournalError> {
        self.write(move |transaction| match step(transaction, id, from, &to)? {
            true => row(transaction, id),
            false => Ok(None),
        })
        .await
    }

    /// The rows of jobs in these states, the first posted first.
    pub async fn jobs(&self, states: &'static [State], most: usize) -> Result<Vec<JobRow>, JournalError> {
        self.write(move |transaction| rows(transaction, states, most)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::market::seller::jobs::example;

    const US: &str = "0xAa00000000000000000000000000000000000001";
    const OTHERS: &str = "0xbb00000000000000000000000000000000000002";

    /// A journal in memory, with what happened to it.
    struct Told(Connection);

    impl Told {
        fn new() -> Self {
            let connection = Connection::open_in_memory().expect("opens");
            connection.execute_batch(include_str!("layout-1.sql")).expect("the layout is sound");
            Self(connection)
        }

        fn note(&self, block: u64, event: MarketEvent) -> Meant {
            note(&self.0, &US.to_lowercase(), true, block, &event).expect("is noted")
        }

        fn post(&self, block: u64, change: impl FnOnce(&mut JobRow)) -> Meant {
            let mut row = example(1);
            change(&mut row);
            let JobRow { id: job, client, terms, input_commitment, input_ref, .. } = row;
            self.note(block, MarketEvent::JobPosted { job, client, terms, input_commitment, input_ref })
        }

        fn step(&self, from: State, to: State) -> bool {
            step(&self.0, 1, from, &Step::to(to)).expect("is written")
        }

        fn row(&self) -> JobRow {
            row(&self.0, 1).expect("reads").expect("is there")
        }

        fn cause(&self) -> (State, Option<String>) {
            let row = self.row();
            (row.state, row.cause)
        }
    }

    fn claimed(host: &str) -> MarketEvent {
        MarketEvent::JobClaimed { job: 1, host: host.into(), deliver_by_s: 0, attempt: 1 }
    }

    fn lost(host: &str, reopened: bool) -> MarketEvent {
        MarketEvent::ClaimLost { job: 1, host: host.into(), reopened }
    }

    fn settled(host: &str) -> MarketEvent {
        MarketEvent::JobSettled { job: 1, host: host.into(), to_host: Amount(7), to_client: Amount(3) }
    }

    fn refunded() -> MarketEvent {
        MarketEvent::JobRefunded { job: 1, client: OTHERS.into(), amount: Amount(10) }
    }

    #[test]
    fn a_posting_that_is_told_twice_is_one_job_and_what_was_decided_stays() {
        let told = Told::new();
        assert_eq!(told.post(5, |_| ()), Meant::Seen(1));
        assert_eq!(told.row(), JobRow { block: 5, seen_ms: told.row().seen_ms, changed_ms: told.row().changed_ms, ..example(1) });
        assert_eq!(told.post(5, |_| ()), Meant::Nothing);
        assert!(told.step(State::Seen, State::Declined));
        assert_eq!(told.post(5, |_| ()), Meant::Nothing);
        assert_eq!(told.row().state, State::Declined);
        // What is declined for ever keeps nothing of what the stranger wrote.
        assert_eq!(told.row().input_ref, "");
    }

    #[test]
    fn another_job_under_the_same_number_replaces_only_what_is_not_in_work() {
        let told = Told::new();
        told.post(5, |_| ());
        told.step(State::Seen, State::Declined);
        assert_eq!(told.post(6, |row| row.terms.max_amount = Amount(9)), Meant::Seen(1));
        assert_eq!((told.row().state, told.row().terms.max_amount, told.row().attempt), (State::Seen, Amount(9), 1));
        told.step(State::Seen, State::Claiming);
        assert_eq!(told.post(7, |_| ()), Meant::Nothing);
        assert_eq!(told.row().terms.max_amount, Amount(9));
    }

    fn result() -> JobResult {
        JobResult {
            output_commitment: format!("0x{}", "0a".repeat(32)),
            trace: None,
            input_tokens: 1,
            output_tokens: 1,
            result_ref: String::new(),
        }
    }

    #[test]
    fn what_was_made_for_a_job_is_not_handed_in_for_another_of_its_number() {
        let worked = || {
            let told = Told::new();
            told.post(5, |_| ());
            let stored =
                Step { result: Some(result()), tokens: Some(vec![7]), model: Some("tiny".into()), ..Step::to(State::Missed) };
            assert!(step(&told.0, 1, State::Seen, &stored).expect("is written"));
            back(&told.0, Some(4)).expect("is undone");
            told
        };
        let told = worked();
        assert_eq!(told.post(6, |row| row.terms.max_amount = Amount(9)), Meant::Seen(1));
        let row = told.row();
        assert_eq!((row.result, row.tokens, row.proof, row.model), (None, vec![], None, None));
        // The same job, in another block: what was made is still its answer.
        let told = worked();
        assert_eq!(told.post(6, |_| ()), Meant::Seen(1));
        assert_eq!((told.row().result, told.row().tokens), (Some(result()), vec![7]));
    }

    #[test]
    fn a_job_that_goes_on_after_a_reorganisation_orders_under_new_keys() {
        let told = Told::new();
        told.post(5, |_| ());
        step(&told.0, 1, State::Seen, &Step { result: Some(result()), ..Step::to(State::Proved) }).expect("is written");
        assert!(matches!(told.note(9, refunded()), Meant::Over { .. }));
        let before = told.row().attempt;
        back(&told.0, Some(8)).expect("is undone");
        assert_eq!((told.row().state, told.row().attempt), (State::Stored, before + 1));
    }

    #[test]
    fn an_objection_is_told_of_what_this_node_has_handed_in_alone() {
        let told = Told::new();
        told.post(5, |_| ());
        let objection = || MarketEvent::Challenged { job: 1, by: OTHERS.into() };
        assert_eq!(told.note(6, objection()), Meant::Nothing);
        told.step(State::Seen, State::Submitted);
        assert_eq!(told.note(6, objection()), Meant::Challenged(1));
    }

    #[test]
    fn a_step_is_made_only_from_the_state_that_it_starts_in() {
        let told = Told::new();
        told.post(5, |_| ());
        assert!(!told.step(State::Claimed, State::Working));
        assert!(told.step(State::Seen, State::Claiming) && told.step(State::Claiming, State::Claimed));
        assert!(!told.step(State::Seen, State::Claiming));
        assert_eq!(told.row().state, State::Claimed);
    }

    #[test]
    fn what_others_do_to_a_job_that_was_only_seen_makes_it_missed_and_open_again() {
        let told = Told::new();
        told.post(5, |_| ());
        assert_eq!(told.note(6, claimed(OTHERS)), Meant::Over { job: 1, cause: "lost", worked: false });
        assert_eq!(told.cause(), (State::Missed, Some("lost".into())));
        assert_eq!(told.note(7, lost(OTHERS, true)), Meant::Seen(1));
        assert_eq!((told.cause(), told.row().attempt), ((State::Seen, None), 1));
        assert_eq!(told.note(8, refunded()), Meant::Over { job: 1, cause: "gone", worked: false });
        assert_eq!(told.note(9, lost(OTHERS, true)), Meant::Nothing);
        assert_eq!(told.cause(), (State::Missed, Some("gone".into())));
    }

    #[test]
    fn a_job_in_work_ends_as_the_contract_says() {
        let told = Told::new();
        told.post(5, |_| ());
        told.step(State::Seen, State::Claiming);
        assert_eq!(told.note(6, refunded()), Meant::Nothing, "its order tells");
        told.step(State::Claiming, State::Submitted);
        assert_eq!(told.note(8, settled(US)), Meant::Settled { job: 1, paid: Amount(7) });
        assert_eq!((told.row().state, told.row().paid), (State::Settled, Some(Amount(7))));

        let told = Told::new();
        told.post(5, |_| ());
        told.step(State::Seen, State::Working);
        assert_eq!(told.note(6, lost(US, true)), Meant::Over { job: 1, cause: "time", worked: true });
        assert_eq!(told.cause(), (State::Failed, Some("time".into())));
        // It is open again, and not for this node.
        assert_eq!(told.note(7, lost(OTHERS, true)), Meant::Nothing);
    }

    #[test]
    fn what_the_chain_takes_back_is_undone() {
        let told = Told::new();
        told.post(5, |_| ());
        told.note(6, claimed(OTHERS));
        back(&told.0, Some(5)).expect("is undone");
        assert_eq!(told.cause(), (State::Seen, None));
        back(&told.0, Some(4)).expect("is undone");
        assert_eq!(told.cause(), (State::Missed, Some("reorg".into())));
        assert_eq!(told.post(5, |_| ()), Meant::Seen(1));

        let stored = Step { result: Some(result()), ..Step::to(State::Submitted) };
        assert!(step(&told.0, 1, State::Seen, &stored).expect("is written"));
        told.note(9, settled(US));
        back(&told.0, Some(8)).expect("is undone");
        assert_eq!((told.row().state, told.row().paid), (State::Submitted, None));
        // What is in work stays: the chain is asked before it goes on.
        back(&told.0, None).expect("is undone");
        assert_eq!(told.row().state, State::Submitted);
    }

    #[test]
    fn what_waits_is_missed_with_what_it_waited_for() {
        let told = Told::new();
        told.post(5, |_| ());
        waits(&told.0, 1, "room", "no slot is free").expect("is written");
        let by = example(1).terms.claim_by_s;
        assert_eq!(miss(&told.0, by).expect("is written"), 0);
        assert_eq!(miss(&told.0, by + 1).expect("is written"), 1);
        assert_eq!(told.cause(), (State::Missed, Some("room".into())));
    }
}
