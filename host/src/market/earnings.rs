//! What this node has earned, as its journal has it.

use fabstir_plugin_api::chain::{Amount, JobResult, JobTerms};
use rusqlite::Connection;
use serde::Serialize;

use super::journal::sessions::{SessionState, list};
use super::journal::value;
use super::{JournalError, Prices};

/// Sessions or jobs, and what they come to together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Sum {
    pub count: u64,
    pub amount: Amount,
}

impl Sum {
    fn add(&mut self, amount: Amount) {
        self.count += 1;
        self.amount.0 = self.amount.0.saturating_add(amount.0);
    }

    fn and(self, other: Sum) -> Sum {
        Sum { count: self.count + other.count, amount: Amount(self.amount.0.saturating_add(other.amount.0)) }
    }
}

/// Paid sessions, by how far their money has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct OfSessions {
    /// Promised in vouchers, which are not handed in yet.
    pub vouchered: Sum,
    /// Delivered, and promised by no voucher: what would be lost if every client left now.
    pub exposed: Sum,
    /// In vouchers that are being handed in.
    pub settling: Sum,
    /// Paid by the contract.
    pub settled: Sum,
    /// In vouchers that the contract did not take.
    pub lost: Sum,
}

/// Posted jobs, by how far their money has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct OfJobs {
    /// Handed in; the client has not accepted yet, and the time to object is not over.
    pub submitted: Sum,
    /// Paid by the contract.
    pub settled: Sum,
}

/// All of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Earnings {
    pub sessions: OfSessions,
    pub jobs: OfJobs,
}

impl Earnings {
    /// # Errors
    /// `Corrupt` for a row that this node cannot have written: a sum without it would be wrong.
    pub fn read(journal: &Connection) -> Result<Earnings, JournalError> {
        Ok(Earnings { sessions: sessions(journal)?, jobs: jobs(journal)? })
    }

    /// What the contract has paid.
    pub fn settled(&self) -> Sum {
        self.sessions.settled.and(self.jobs.settled)
    }

    /// What is promised or handed in, and not paid yet.
    pub fn outstanding(&self) -> Sum {
        self.sessions.vouchered.and(self.sessions.settling).and(self.jobs.submitted)
    }
}

fn sessions(journal: &Connection) -> Result<OfSessions, JournalError> {
    let mut of = OfSessions::default();
    let all = [SessionState::Open, SessionState::Settling, SessionState::Settled, SessionState::Lost];
    for row in list(journal, &all)? {
        match row.state {
            SessionState::Open => {
                of.vouchered.add(row.voucher.amount);
                if row.exposed.0 > 0 {
                    of.exposed.add(row.exposed);
                }
            }
            SessionState::Settling => of.settling.add(row.voucher.amount),
            SessionState::Settled => of.settled.add(paid(row.paid)?),
            SessionState::Lost => {
                let paid = row.paid.unwrap_or_default();
                of.settled.amount.0 = of.settled.amount.0.saturating_add(paid.0);
                of.lost.add(Amount(row.voucher.amount.0.saturating_sub(paid.0)));
            }
        }
    }
    Ok(of)
}

fn jobs(journal: &Connection) -> Result<OfJobs, JournalError> {
    let mut of = OfJobs::default();
    let mut statement = journal.prepare("SELECT state, terms, result, paid FROM jobs WHERE state IN ('submitted', 'settled')")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let (state, terms): (String, String) = (row.get(0)?, row.get(1)?);
        let (result, paid): (Option<String>, Option<String>) = (row.get(2)?, row.get(3)?);
        match state.as_str() {
            "settled" => of.settled.add(self::paid(paid.as_deref().map(amount).transpose()?)?),
            _ => {
                let result = result.ok_or_else(|| JournalError::Corrupt("a job was handed in without a result".into()))?;
                of.submitted.add(price(&value(&terms)?, &value(&result)?));
            }
        }
    }
    Ok(of)
}

/// What the contract pays for a result.
pub fn price(terms: &JobTerms, result: &JobResult) -> Amount {
    let prices = Prices { input_per_mtok: terms.price_input_per_mtok.0, output_per_mtok: terms.price_output_per_mtok.0 };
    prices.of(result.input_tokens, result.output_tokens).min(terms.max_amount)
}

fn paid(paid: Option<Amount>) -> Result<Amount, JournalError> {
    paid.ok_or_else(|| JournalError::Corrupt("something was paid, and not how much".into()))
}

fn amount(text: &str) -> Result<Amount, JournalError> {
    text.parse().map_err(|_| JournalError::Corrupt(format!("`{text}` is no amount")))
}

#[cfg(test)]
mod tests {
    use fabstir_plugin_api::chain::{Terms, Voucher};
    use rusqlite::params;

    use super::*;
    use crate::market::Journal;
    use crate::market::journal::{look, posted::tests::terms, text};

    fn voucher(amount: u128) -> String {
        let hash = format!("0x{}", "1".repeat(64));
        let voucher = Voucher {
            session: hash.clone(),
            host: crate::market::NATIVE.into(),
            amount: Amount(amount),
            input_tokens: 1,
            output_tokens: 1,
            transcript: hash,
        };
        text(&voucher).expect("is written")
    }

    fn session_terms() -> Terms {
        Terms {
            host: crate::market::NATIVE.into(),
            client: crate::market::NATIVE.into(),
            model: format!("0x{}", "1".repeat(64)),
            coin: crate::market::NATIVE.into(),
            price_input_per_mtok: Amount(1),
            price_output_per_mtok: Amount(1),
            expires_s: 1,
            settle_window_s: 1,
            valid_until_s: 1,
            nonce: format!("0x{}", "1".repeat(64)),
        }
    }

    #[test]
    fn everything_is_counted_where_its_money_is() {
        let folder = tempfile::tempdir().expect("a folder");
        drop(Journal::open(folder.path()).expect("opens"));
        let journal = look(folder.path()).expect("opens").expect("is there");
        assert_eq!(Earnings::read(&journal).expect("reads"), Earnings::default());
        for (id, state, promised, paid) in [
            ("a", "open", 1, None),
            ("b", "open", 2, None),
            ("c", "settling", 10, None),
            ("d", "settled", 100, Some("99")),
            ("e", "lost", 1000, None),
        ] {
            let insert = "INSERT INTO sessions (id, terms, peer, deposit, state, voucher, signature, paid, opened_ms, changed_ms) \
                          VALUES (?1, ?5, '', '0', ?2, ?3, x'', ?4, 0, 0)";
            let terms = text(&session_terms()).expect("is written");
            journal.execute(insert, params![id, state, voucher(promised), paid, terms]).expect("is written");
        }
        let result = |input_tokens| {
            let result = JobResult {
                output_commitment: String::new(),
                trace: None,
                input_tokens,
                output_tokens: 3,
                result_ref: String::new(),
            };
            text(&result).expect("is written")
        };
        for (id, state, most, result, paid) in [
            (1, "seen", 1000, None, None),
            (2, "working", 1000, None, None),
            (3, "submitted", 1000, Some(result(4)), None),
            (4, "submitted", 5, Some(result(4)), None),
            (5, "settled", 1000, Some(result(4)), Some("7")),
            (6, "failed", 1000, Some(result(4)), None),
        ] {
            let insert = "INSERT INTO jobs (id, client, terms, input_commitment, input_ref, block, state, result, paid, seen_ms, \
                          changed_ms) VALUES (?1, '', ?2, '', '', 0, ?3, ?4, ?5, 0, 0)";
            let terms = text(&terms(most)).expect("is written");
            journal.execute(insert, params![id, terms, state, result, paid]).expect("is written");
        }
        let earnings = Earnings::read(&journal).expect("reads");
        let sum = |count, amount| Sum { count, amount: Amount(amount) };
        assert_eq!(earnings.sessions.vouchered, sum(2, 3));
        assert_eq!(earnings.sessions.settling, sum(1, 10));
        assert_eq!(earnings.sessions.settled, sum(1, 99), "what was paid, not what was promised");
        assert_eq!(earnings.sessions.lost, sum(1, 1000));
        assert_eq!(
            earnings.jobs.submitted,
            sum(2, 4 + 6 + 5),
            "a wei for a token read, two for one generated, and never above the most"
        );
        assert_eq!(earnings.jobs.settled, sum(1, 7));
        assert_eq!(earnings.settled(), sum(2, 106));
        assert_eq!(earnings.outstanding(), sum(5, 28));
        journal.execute("UPDATE sessions SET voucher = '{' WHERE id = 'a'", []).expect("is written");
        assert!(matches!(Earnings::read(&journal), Err(JournalError::Corrupt(_))));
    }
}
