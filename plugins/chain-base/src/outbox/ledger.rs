//! Where the rows are: what a crash leaves behind is in here or does not exist.

use std::path::Path;

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use thiserror::Error;

use super::Row;

/// Keeps the rows. One process has it open.
pub trait Ledger: Send + 'static {
    /// Writes a row over the one of its key, all of it or nothing, and returns when it would survive the loss of power. On an error
    /// nothing is written, or the ledger refuses everything until it is opened anew.
    ///
    /// # Errors
    /// `NonceTaken` where the row's nonce was ever written with another key: this is the last line of defence, below all rules.
    fn put(&mut self, row: &Row) -> Result<(), LedgerError>;

    /// The row of a key, closed ones too.
    fn row(&self, key: &str) -> Result<Option<Row>, LedgerError>;

    /// All rows that are not closed, in the order of their numbers.
    fn open_rows(&self) -> Result<Vec<Row>, LedgerError>;

    /// The newest rows, closed ones too, newest first, at most `limit`.
    fn newest(&self, limit: usize) -> Result<Vec<Row>, LedgerError>;

    /// The smallest nonce from `from` on that was never written with any row.
    fn free_nonce(&self, from: u64) -> Result<u64, LedgerError>;

    /// The smallest nonce that any row was ever written with.
    fn first_nonce(&self) -> Result<Option<u64>, LedgerError>;
}

/// Why a ledger did not do something.
#[derive(Debug, Error)]
pub enum LedgerError {
    #[error("the ledger cannot be read or written: {0}")]
    Storage(String),
    #[error("nonce {nonce} belongs to `{holder}` and was to be written for `{key}`")]
    NonceTaken { nonce: u64, holder: String, key: String },
    #[error("the ledger's row of `{key}` cannot be read: {why}")]
    Damaged { key: String, why: String },
    #[error("the ledger is of `{found}`, not of `{wanted}`: give each account and chain its own file")]
    Foreign { found: String, wanted: String },
}

impl LedgerError {
    fn storage(error: impl Into<redb::Error>) -> Self {
        LedgerError::Storage(error.into().to_string())
    }
}

const OWNER: TableDefinition<(), &str> = TableDefinition::new("owner");
const ROWS: TableDefinition<&str, &[u8]> = TableDefinition::new("rows");
const NUMBERS: TableDefinition<u64, &str> = TableDefinition::new("numbers");
const OPEN: TableDefinition<u64, &str> = TableDefinition::new("open");
const NONCES: TableDefinition<u64, &str> = TableDefinition::new("nonces");

/// The ledger in a file. The file is locked while it is open, so that a second process with the same ledger does not start.
#[derive(Debug)]
pub struct RedbLedger {
    database: Database,
}

impl RedbLedger {
    /// Opens the ledger of one account on one chain, and makes it where there is none. `owner` names both, for example
    /// `eip155:8453:0xabc…`, and must be the same each time: nonces of another account or chain would be wrong here.
    pub fn open(path: &Path, owner: &str) -> Result<Self, LedgerError> {
        let database = Database::create(path).map_err(LedgerError::storage)?;
        let mut write = database.begin_write().map_err(LedgerError::storage)?;
        write.set_durability(Durability::Immediate).map_err(LedgerError::storage)?;
        {
            let mut table = write.open_table(OWNER).map_err(LedgerError::storage)?;
            let found = table.get(()).map_err(LedgerError::storage)?.map(|found| found.value().to_owned());
            match found {
                Some(found) if found != owner => return Err(LedgerError::Foreign { found, wanted: owner.to_owned() }),
                Some(_) => {}
                None => {
                    table.insert((), owner).map_err(LedgerError::storage)?;
                }
            }
            // A read does not have to ask whether a table is there yet.
            write.open_table(ROWS).map_err(LedgerError::storage)?;
            write.open_table(NUMBERS).map_err(LedgerError::storage)?;
            write.open_table(OPEN).map_err(LedgerError::storage)?;
            write.open_table(NONCES).map_err(LedgerError::storage)?;
        }
        write.commit().map_err(LedgerError::storage)?;
        Ok(Self { database })
    }

    fn rows_of<'a>(&self, keys: impl Iterator<Item = &'a String>) -> Result<Vec<Row>, LedgerError> {
        keys.map(|key| {
            let row = self.row(key)?;
            row.ok_or_else(|| LedgerError::Damaged { key: key.clone(), why: "it is listed, but not there".to_owned() })
        })
        .collect()
    }
}

impl Ledger for RedbLedger {
    fn put(&mut self, row: &Row) -> Result<(), LedgerError> {
        let key = row.intent.key.as_str();
        let bytes =
            serde_json::to_vec(row).map_err(|error| LedgerError::Damaged { key: key.to_owned(), why: error.to_string() })?;
        let mut write = self.database.begin_write().map_err(LedgerError::storage)?;
        write.set_durability(Durability::Immediate).map_err(LedgerError::storage)?;
        {
            write.open_table(ROWS).map_err(LedgerError::storage)?.insert(key, bytes.as_slice()).map_err(LedgerError::storage)?;
            write.open_table(NUMBERS).map_err(LedgerError::storage)?.insert(row.number, key).map_err(LedgerError::storage)?;
            let mut open = write.open_table(OPEN).map_err(LedgerError::storage)?;
            if row.state.is_closed() {
                open.remove(row.number).map_err(LedgerError::storage)?;
            } else {
                open.insert(row.number, key).map_err(LedgerError::storage)?;
            }
            if let Some(nonce) = row.nonce {
                let mut nonces = write.open_table(NONCES).map_err(LedgerError::storage)?;
                let before = nonces.insert(nonce, key).map_err(LedgerError::storage)?.map(|holder| holder.value().to_owned());
                if let Some(holder) = before.filter(|holder| holder != key) {
                    // Dropping the transaction undoes all of it.
                    return Err(LedgerError::NonceTaken { nonce, holder, key: key.to_owned() });
                }
            }
        }
        write.commit().map_err(LedgerError::storage)
    }

    fn row(&self, key: &str) -> Result<Option<Row>, LedgerError> {
        let read = self.database.begin_read().map_err(LedgerError::storage)?;
        let table = read.open_table(ROWS).map_err(LedgerError::storage)?;
        let Some(bytes) = table.get(key).map_err(LedgerError::storage)? else { return Ok(None) };
        let damaged = |error: serde_json::Error| LedgerError::Damaged { key: key.to_owned(), why: error.to_string() };
        serde_json::from_slice(bytes.value()).map(Some).map_err(damaged)
    }

    fn open_rows(&self) -> Result<Vec<Row>, LedgerError> {
        let read = self.database.begin_read().map_err(LedgerError::storage)?;
        let table = read.open_table(OPEN).map_err(LedgerError::storage)?;
        let mut keys = Vec::new();
        for entry in table.iter().map_err(LedgerError::storage)? {
            keys.push(entry.map_err(LedgerError::storage)?.1.value().to_owned());
        }
        self.rows_of(keys.iter())
    }

    fn newest(&self, limit: usize) -> Result<Vec<Row>, LedgerError> {
        let read = self.database.begin_read().map_err(LedgerError::storage)?;
        let table = read.open_table(NUMBERS).map_err(LedgerError::storage)?;
        let mut keys = Vec::new();
        for entry in table.iter().map_err(LedgerError::storage)?.rev().take(limit) {
            keys.push(entry.map_err(LedgerError::storage)?.1.value().to_owned());
        }
        self.rows_of(keys.iter())
    }

    fn free_nonce(&self, from: u64) -> Result<u64, LedgerError> {
        let read = self.database.begin_read().map_err(LedgerError::storage)?;
        let table = read.open_table(NONCES).map_err(LedgerError::storage)?;
        let mut free = from;
        for entry in table.range(from..).map_err(LedgerError::storage)? {
            if entry.map_err(LedgerError::storage)?.0.value() != free {
                break;
            }
            free += 1;
        }
        Ok(free)
    }

    fn first_nonce(&self) -> Result<Option<u64>, LedgerError> {
        let read = self.database.begin_read().map_err(LedgerError::storage)?;
        let table = read.open_table(NONCES).map_err(LedgerError::storage)?;
        Ok(table.first().map_err(LedgerError::storage)?.map(|(nonce, _)| nonce.value()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Attempt, BlockRef, Fees, Intent, Receipt, State};
    use super::*;

    fn row(number: u64, nonce: Option<u64>, state: State) -> Row {
        let intent = Intent {
            key: format!("key {number}"),
            to: [7; 20],
            value: u128::MAX,
            data: vec![0, 255],
            gas_limit: 21_000,
            deadline_s: None,
            fee_cap: u128::MAX,
        };
        let fees = Fees { max_fee: u128::MAX - 1, priority_fee: 3 };
        let attempts = nonce.map(|_| Attempt { fees, raw: vec![1, 2], hash: [9; 32], signed_ms: 5 }).into_iter().collect();
        Row { number, intent, planned_ms: 4, nonce, attempts, state }
    }

    fn last(number: u64) -> State {
        State::Final(Receipt { hash: [9; 32], block: BlockRef { number, hash: [8; 32] }, succeeded: true, fee: Some(u128::MAX) })
    }

    #[test]
    fn what_was_put_is_there_when_the_file_is_opened_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("outbox.redb");
        let rows = [
            row(0, Some(3), last(7)),
            row(1, Some(4), State::Broadcast),
            row(2, Some(6), State::Signed),
            row(3, None, State::Planned),
        ];
        let mut ledger = RedbLedger::open(&path, "eip155:1:0xa").unwrap();
        for row in &rows {
            ledger.put(&Row { state: State::Planned, ..row.clone() }).unwrap();
            ledger.put(row).unwrap();
        }
        assert!(RedbLedger::open(&path, "eip155:1:0xa").is_err(), "a second opener is refused while the first is there");
        drop(ledger);

        let ledger = RedbLedger::open(&path, "eip155:1:0xa").unwrap();
        assert_eq!(ledger.open_rows().unwrap(), rows[1..]);
        assert_eq!(ledger.row("key 0").unwrap().as_ref(), Some(&rows[0]));
        assert_eq!(ledger.row("key 9").unwrap(), None);
        assert_eq!(ledger.newest(2).unwrap(), [rows[3].clone(), rows[2].clone()]);
        assert_eq!([0, 3, 4, 5, 6, 9].map(|from| ledger.free_nonce(from).unwrap()), [0, 5, 5, 5, 7, 9]);
    }

    #[test]
    fn a_nonce_is_not_written_for_a_second_key() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = RedbLedger::open(&directory.path().join("outbox.redb"), "eip155:1:0xa").unwrap();
        ledger.put(&row(0, Some(3), last(7))).unwrap();
        assert!(matches!(ledger.put(&row(1, Some(3), State::Signed)), Err(LedgerError::NonceTaken { nonce: 3, .. })));
        assert_eq!(ledger.row("key 1").unwrap(), None, "nothing of the refused row is kept");
        assert_eq!(ledger.newest(9).unwrap().len(), 1);
        ledger.put(&row(1, Some(4), State::Signed)).unwrap();
    }

    #[test]
    fn the_ledger_of_another_account_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("outbox.redb");
        drop(RedbLedger::open(&path, "eip155:1:0xa").unwrap());
        assert!(matches!(RedbLedger::open(&path, "eip155:10:0xa"), Err(LedgerError::Foreign { .. })));
    }
}
