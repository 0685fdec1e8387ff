//! Paid sessions in which this node works.

use fabstir_plugin_api::chain::{Amount, SessionId, Signature, Terms, Voucher};
use fabstir_plugin_api::transport::PeerId;
use rusqlite::{OptionalExtension, Row, Transaction, params};
use serde::{Deserialize, Serialize};

use super::{JournalError, text, value};
use crate::clock::now_ms;

/// A session as the node has it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SessionRow {
    pub terms: Terms,
    pub peer: PeerId,
    pub deposit: Amount,
    pub state: SessionState,
    /// The best voucher.
    pub voucher: Voucher,
    pub signature: Signature,
    /// What was delivered a moment ago and no voucher promised.
    pub exposed: Amount,
    /// What the contract has paid out, once it is settled.
    pub paid: Option<Amount>,
    pub why: Option<String>,
    pub opened_ms: u64,
    pub changed_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    /// It pays for requests.
    Open,
    /// The best voucher is being handed in: nothing more is delivered.
    Settling,
    Settled,
    /// Its time was over before a voucher was handed in, or there was none worth it.
    Lost,
}

impl SessionState {
    pub fn word(self) -> &'static str {
        match self {
            SessionState::Open => "open",
            SessionState::Settling => "settling",
            SessionState::Settled => "settled",
            SessionState::Lost => "lost",
        }
    }

    fn read(word: &str) -> Result<Self, JournalError> {
        let all = [SessionState::Open, SessionState::Settling, SessionState::Settled, SessionState::Lost];
        let found = all.into_iter().find(|state| state.word() == word);
        found.ok_or_else(|| JournalError::Corrupt(format!("a session is `{word}`")))
    }
}

/// Keeps a session with its first voucher here. One that is known gets the new voucher, peer and deposit.
pub fn fund(transaction: &Transaction<'_>, row: &SessionRow) -> Result<(), JournalError> {
    let at = now_ms() as i64;
    transaction.execute(
        "INSERT INTO sessions (id, terms, peer, deposit, state, voucher, signature, opened_ms, changed_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8)
         ON CONFLICT (id) DO UPDATE SET peer = ?3, deposit = ?4, voucher = ?6, signature = ?7, changed_ms = ?8",
        params![
            row.voucher.session,
            text(&row.terms)?,
            row.peer.0,
            row.deposit.to_string(),
            row.state.word(),
            text(&row.voucher)?,
            row.signature,
            at
        ],
    )?;
    Ok(())
}

/// Keeps a better voucher. `false` where a better one was kept already: two may come at the same time.
pub fn pay(transaction: &Transaction<'_>, voucher: &Voucher, signature: &[u8]) -> Result<bool, JournalError> {
    if let Some(known) = get(transaction, &voucher.session)?
        && known.voucher.amount > voucher.amount
    {
        return Ok(false);
    }
    let changed = transaction.execute(
        "UPDATE sessions SET voucher = ?2, signature = ?3, changed_ms = ?4 WHERE id = ?1 AND state = 'open'",
        params![voucher.session, text(voucher)?, signature, now_ms() as i64],
    )?;
    match changed {
        1 => Ok(true),
        _ => Err(JournalError::Corrupt("a voucher is for a session that is not open".into())),
    }
}

/// Notes what these sessions owe beyond their vouchers.
pub fn expose(transaction: &Transaction<'_>, exposed: &[(SessionId, Amount)]) -> Result<(), JournalError> {
    for (id, exposed) in exposed {
        transaction.execute("UPDATE sessions SET exposed = ?2 WHERE id = ?1", params![id, exposed.to_string()])?;
    }
    Ok(())
}

/// A session's next state.
pub fn turn(
    transaction: &Transaction<'_>,
    id: &SessionId,
    state: SessionState,
    paid: Option<Amount>,
    why: Option<&str>,
) -> Result<(), JournalError> {
    transaction.execute(
        "UPDATE sessions SET state = ?2, paid = ?3, why = ?4, changed_ms = ?5 WHERE id = ?1",
        params![id, state.word(), paid.map(|paid| paid.to_string()), why, now_ms() as i64],
    )?;
    Ok(())
}

pub fn get(connection: &rusqlite::Connection, id: &SessionId) -> Result<Option<SessionRow>, JournalError> {
    let row = connection.query_row(&format!("{SELECT} WHERE id = ?1"), [id], columns).optional()?;
    row.map(Columns::read).transpose()
}

/// Every session in one of these states, the oldest first.
pub fn list(connection: &rusqlite::Connection, states: &[SessionState]) -> Result<Vec<SessionRow>, JournalError> {
    let words: Vec<String> = states.iter().map(|state| format!("'{}'", state.word())).collect();
    let mut statement = connection.prepare(&format!("{SELECT} WHERE state IN ({}) ORDER BY opened_ms", words.join(", ")))?;
    let rows = statement.query_map([], columns)?.collect::<Result<Vec<Columns>, _>>()?;
    rows.into_iter().map(Columns::read).collect()
}

const SELECT: &str =
    "SELECT terms, peer, deposit, state, voucher, signature, exposed, paid, why, opened_ms, changed_ms FROM sessions";

/// A row as SQLite has it.
struct Columns {
    terms: String,
    peer: String,
    deposit: String,
    state: String,
    voucher: String,
    signature: Vec<u8>,
    exposed: String,
    paid: Option<String>,
    why: Option<String>,
    opened_ms: i64,
    changed_ms: i64,
}

fn columns(row: &Row<'_>) -> rusqlite::Result<Columns> {
    Ok(Columns {
        terms: row.get(0)?,
        peer: row.get(1)?,
        deposit: row.get(2)?,
        state: row.get(3)?,
        voucher: row.get(4)?,
        signature: row.get(5)?,
        exposed: row.get(6)?,
        paid: row.get(7)?,
        why: row.get(8)?,
        opened_ms: row.get(9)?,
        changed_ms: row.get(10)?,
    })
}

impl Columns {
    fn read(self) -> Result<SessionRow, JournalError> {
        Ok(SessionRow {
            terms: value(&self.terms)?,
            peer: PeerId(self.peer),
            deposit: amount(&self.deposit)?,
            state: SessionState::read(&self.state)?,
            voucher: value(&self.voucher)?,
            signature: self.signature,
            exposed: amount(&self.exposed)?,
            paid: self.paid.as_deref().map(amount).transpose()?,
            why: self.why,
            opened_ms: self.opened_ms as u64,
            changed_ms: self.changed_ms as u64,
        })
    }
}

fn amount(text: &str) -> Result<Amount, JournalError> {
    text.parse().map_err(|_| JournalError::Corrupt(format!("`{text}` is no amount")))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::market::Journal;

    /// A session in which a token read or generated costs one wei, and nothing is promised yet.
    pub(crate) fn row() -> SessionRow {
        let text = |digit: &str, count: usize| format!("0x{}", digit.repeat(count));
        SessionRow {
            terms: Terms {
                host: text("1", 40),
                client: text("2", 40),
                model: text("6", 64),
                coin: text("0", 40),
                price_input_per_mtok: Amount(1_000_000),
                price_output_per_mtok: Amount(1_000_000),
                expires_s: u64::MAX,
                settle_window_s: 60,
                valid_until_s: u64::MAX,
                nonce: text("7", 64),
            },
            peer: PeerId("peer".into()),
            deposit: Amount(9),
            state: SessionState::Open,
            voucher: Voucher {
                session: text("5", 64),
                host: text("1", 40),
                amount: Amount(0),
                input_tokens: 0,
                output_tokens: 0,
                transcript: text("0", 64),
            },
            signature: vec![],
            exposed: Amount(0),
            paid: None,
            why: None,
            opened_ms: 0,
            changed_ms: 0,
        }
    }

    #[tokio::test]
    async fn a_voucher_never_takes_the_place_of_a_better_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let journal = Journal::open(folder.path()).expect("opens");
        let voucher = |amount| Voucher { amount: Amount(amount), ..row().voucher };
        let id = || row().voucher.session;
        let row = row();
        journal.write(move |transaction| fund(transaction, &row)).await.expect("is kept");
        for (amount, taken) in [(5, true), (3, false), (5, true), (8, true), (7, false)] {
            let better = voucher(amount);
            let kept = journal.write(move |transaction| pay(transaction, &better, &[1])).await.expect("writes");
            assert_eq!(kept, taken, "{amount}");
        }
        let row = journal.write(move |transaction| get(transaction, &id())).await.expect("reads").expect("is there");
        assert_eq!(row.voucher, voucher(8));
        let settling = journal.write(move |transaction| turn(transaction, &id(), SessionState::Settling, None, None)).await;
        settling.expect("turns");
        let late = voucher(9);
        journal.write(move |transaction| pay(transaction, &late, &[1])).await.expect_err("is being handed in already");
    }
}
