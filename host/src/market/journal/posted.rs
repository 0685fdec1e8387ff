//! The jobs that this account has posted, as a client.

use fabstir_plugin_api::chain::{Hash32, JobId, JobTerms};
use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

use super::{Journal, JournalError, text};

/// One of them. It is in the journal from before its order on, so that nothing that was paid for is forgotten.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Posted {
    pub order_key: String,
    /// Its number, once that is known.
    pub job: Option<JobId>,
    /// The model's digest.
    pub model: String,
    pub terms: JobTerms,
    pub input_commitment: Hash32,
    pub input_ref: String,
    /// When it was ordered, in milliseconds since 1970.
    pub posted_ms: u64,
}

const COLUMNS: &str = "order_key, job, model, terms, input_commitment, input_ref, posted_ms";

impl Journal {
    /// Keeps a job that is about to be ordered.
    pub async fn keep_posted(&self, posted: Posted) -> Result<(), JournalError> {
        let terms = text(&posted.terms)?;
        self.write(move |transaction| {
            let Posted { order_key, job, model, input_commitment, input_ref, posted_ms, .. } = posted;
            let insert = format!("INSERT INTO posted ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)");
            let (job, posted_ms) = (job.map(u64::cast_signed), posted_ms.cast_signed());
            transaction.execute(&insert, params![order_key, job, model, terms, input_commitment, input_ref, posted_ms])?;
            Ok(())
        })
        .await
    }

    /// Adds the number that the chain has given to a job.
    pub async fn number_posted(&self, order_key: &str, job: JobId) -> Result<(), JournalError> {
        let order_key = order_key.to_owned();
        self.write(move |transaction| {
            transaction.execute("UPDATE posted SET job = ?2 WHERE order_key = ?1", params![order_key, job.cast_signed()])?;
            Ok(())
        })
        .await
    }

    /// Forgets a job that was not ordered after all.
    pub async fn forget_posted(&self, order_key: &str) -> Result<(), JournalError> {
        let order_key = order_key.to_owned();
        self.write(move |transaction| {
            transaction.execute("DELETE FROM posted WHERE order_key = ?1", [order_key])?;
            Ok(())
        })
        .await
    }
}

/// All of them, in the order in which they were posted.
pub fn all(journal: &Connection) -> Result<Vec<Posted>, JournalError> {
    let mut statement = journal.prepare(&format!("SELECT {COLUMNS} FROM posted ORDER BY posted_ms, order_key"))?;
    let rows = statement.query_map([], read)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The one with this number, where it is this account's.
pub fn one(journal: &Connection, job: JobId) -> Result<Option<Posted>, JournalError> {
    let mut statement = journal.prepare(&format!("SELECT {COLUMNS} FROM posted WHERE job = ?1"))?;
    Ok(statement.query_row([job.cast_signed()], read).optional()?)
}

fn read(row: &Row<'_>) -> Result<Posted, rusqlite::Error> {
    let terms: String = row.get(3)?;
    let wrong = |error| rusqlite::Error::FromSqlConversionFailure(3, Type::Text, Box::new(error));
    Ok(Posted {
        order_key: row.get(0)?,
        job: row.get::<_, Option<i64>>(1)?.map(i64::cast_unsigned),
        model: row.get(2)?,
        terms: serde_json::from_str::<JobTerms>(&terms).map_err(wrong)?,
        input_commitment: row.get(4)?,
        input_ref: row.get(5)?,
        posted_ms: row.get::<_, i64>(6)?.cast_unsigned(),
    })
}

#[cfg(test)]
pub mod tests {
    use fabstir_plugin_api::chain::Amount;

    use super::*;
    use crate::market::journal::look;

    pub fn terms(max: u128) -> JobTerms {
        let nothing = format!("0x{}", "0".repeat(64));
        JobTerms {
            model: nothing.clone(),
            coin: crate::market::NATIVE.into(),
            max_amount: Amount(max),
            price_input_per_mtok: Amount(1_000_000),
            price_output_per_mtok: Amount(2_000_000),
            max_input_tokens: 1000,
            max_output_tokens: 100,
            claim_by_s: 1,
            deliver_s: 60,
            prove_s: 0,
            challenge_s: 60,
            resolve_s: 0,
            max_attempts: 1,
            host_bond: Amount(0),
            challenge_bond: Amount(0),
            proof_kind: 0,
            program: nothing,
            arbiter: crate::market::NATIVE.into(),
        }
    }

    fn posted(order_key: &str, posted_ms: u64) -> Posted {
        Posted {
            order_key: order_key.into(),
            job: None,
            model: "a".repeat(64),
            terms: terms(u128::MAX),
            input_commitment: format!("0x{}", "1".repeat(64)),
            input_ref: "data:,".into(),
            posted_ms,
        }
    }

    #[tokio::test]
    async fn a_job_is_known_before_it_has_a_number_and_forgotten_where_it_was_not_ordered() {
        let folder = tempfile::tempdir().expect("a folder");
        let journal = Journal::open(folder.path()).expect("opens");
        for (key, at) in [("two", 2), ("one", 1), ("three", 3)] {
            journal.keep_posted(posted(key, at)).await.expect("keeps");
        }
        assert!(journal.keep_posted(posted("two", 9)).await.is_err(), "one order is one job");
        journal.number_posted("two", 41).await.expect("numbers");
        journal.forget_posted("three").await.expect("forgets");
        let looking = look(folder.path()).expect("opens").expect("is there");
        let two = Posted { job: Some(41), ..posted("two", 2) };
        assert_eq!(all(&looking).expect("reads"), [posted("one", 1), two.clone()]);
        assert_eq!(one(&looking, 41).expect("reads"), Some(two));
        assert_eq!(one(&looking, 42).expect("reads"), None);
    }
}
