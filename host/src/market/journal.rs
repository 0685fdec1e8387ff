//! The journal: what this node has promised, been promised and ordered, on disk before it acts on it.
//!
//! One SQLite file, written ahead (WAL) and forced to disk at each commit. After a crash the journal alone says what was under way: what
//! is not in it has not happened. Several processes may have it open, such as a running node and a command that shows what it earns.
//!
//! Everything that changes it goes through one thread. Changes that come while the disk is busy share the next commit, so that a hundred
//! vouchers at a time cost one write.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use fabstir_plugin_api::error::{Code, PluginError};
use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

pub mod jobs;
pub mod posted;
pub mod purchases;
pub mod sessions;

/// The layout of the tables, step by step: a file that has taken the first n steps says so in its `user_version`.
const LAYOUT: &[&str] = &[include_str!("journal/layout-1.sql")];

/// Changes that one commit may hold, and that may wait for theirs.
const MOST_IN_ONE: usize = 256;
const MOST_WAITING: usize = 4096;

/// How long another process may keep the file to itself.
const BUSY: Duration = Duration::from_secs(5);

/// Why the journal cannot be used. Nothing was changed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum JournalError {
    #[error("the journal {}: {reason}", file.display())]
    Open { file: PathBuf, reason: String },
    /// A newer node has written it.
    #[error("the journal {} was written by a newer node (layout {found}, this one knows {known}): update this node", file.display())]
    Newer { file: PathBuf, found: usize, known: usize },
    #[error("the journal's disk is full: nothing is promised until there is room")]
    Full,
    #[error("the journal cannot be written: {0}")]
    Write(String),
    /// A row is not what this node writes.
    #[error("the journal holds what cannot be read: {0}")]
    Corrupt(String),
    #[error("the journal is closed, or its disk fails: the log says why")]
    Closed,
}

impl From<rusqlite::Error> for JournalError {
    fn from(error: rusqlite::Error) -> Self {
        if matches!(error, rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::InvalidColumnType(..)) {
            return JournalError::Corrupt(error.to_string());
        }
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => JournalError::Full,
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => JournalError::Corrupt(error.to_string()),
            _ => JournalError::Write(error.to_string()),
        }
    }
}

impl From<JournalError> for PluginError {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::Full => PluginError::new(Code::Full, error.to_string()),
            _ => PluginError::internal(error.to_string()),
        }
    }
}

/// A change, and how to tell what came of it once it is on disk, or is not.
type Change = Box<dyn FnOnce(&Transaction<'_>) -> Told + Send>;
type Told = Box<dyn FnOnce(Result<(), JournalError>) + Send>;

/// The open journal. Clones are the same.
#[derive(Clone)]
pub struct Journal {
    changes: mpsc::SyncSender<Change>,
}

impl Journal {
    /// Where the journal of a data folder is.
    pub fn path(data_dir: &Path) -> PathBuf {
        data_dir.join("market").join("journal.sqlite")
    }

    /// Opens the journal of a data folder, and makes it where there is none.
    pub fn open(data_dir: &Path) -> Result<Journal, JournalError> {
        let file = Self::path(data_dir);
        let failed = |reason: String| JournalError::Open { file: file.clone(), reason };
        let folder = file.parent().unwrap_or(data_dir);
        std::fs::create_dir_all(folder).map_err(|error| failed(error.to_string()))?;
        let mut connection = Connection::open(&file).map_err(|error| failed(error.to_string()))?;
        prepare(&mut connection, &file)?;
        let (changes, queue) = mpsc::sync_channel(MOST_WAITING);
        let thread = thread::Builder::new().name("journal".into()).spawn(move || work(&mut connection, &queue));
        thread.map_err(|error| failed(error.to_string()))?;
        Ok(Journal { changes })
    }

    /// Makes a change, or reads; returns once it is on disk. A change that answers an error is undone, and so is one that panics.
    pub async fn write<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> Result<T, JournalError> + Send + 'static,
    ) -> Result<T, JournalError> {
        let (tell, told) = oneshot::channel();
        let change: Change = Box::new(move |transaction| {
            let outcome = in_part(transaction, change);
            // Whoever does not wait any more does not want to know.
            Box::new(move |committed| drop(tell.send(committed.and(outcome))))
        });
        if let Err(mpsc::TrySendError::Full(change)) = self.changes.try_send(change) {
            let changes = self.changes.clone();
            let sent = tokio::task::spawn_blocking(move || changes.send(change)).await;
            sent.ok().and_then(Result::ok).ok_or(JournalError::Closed)?;
        }
        told.await.unwrap_or(Err(JournalError::Closed))
    }
}

/// Opens the journal of a data folder to look at it, as another process than the one that writes it. `None` where there is none.
pub fn look(data_dir: &Path) -> Result<Option<Connection>, JournalError> {
    let file = Journal::path(data_dir);
    if !file.exists() {
        return Ok(None);
    }
    let failed = |reason: String| JournalError::Open { file: file.clone(), reason };
    let mut connection = Connection::open(&file).map_err(|error| failed(error.to_string()))?;
    prepare(&mut connection, &file)?;
    Ok(Some(connection))
}

fn prepare(connection: &mut Connection, file: &Path) -> Result<(), JournalError> {
    let failed = |error: rusqlite::Error| JournalError::Open { file: file.to_owned(), reason: error.to_string() };
    connection.busy_timeout(BUSY).map_err(failed)?;
    connection.pragma_update(None, "journal_mode", "wal").map_err(failed)?;
    connection.pragma_update(None, "synchronous", "full").map_err(failed)?;
    connection.pragma_update(None, "foreign_keys", true).map_err(failed)?;
    // One that is laid out already is not written to: that would need room on its disk.
    if layout(connection, file)? == LAYOUT.len() {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
    // Another process may have done it meanwhile.
    let found = layout(&transaction, file)?;
    for step in &LAYOUT[found..] {
        transaction.execute_batch(step).map_err(failed)?;
    }
    transaction.pragma_update(None, "user_version", LAYOUT.len() as u32).map_err(failed)?;
    transaction.commit().map_err(failed)
}

/// How far the tables of a file are laid out.
fn layout(connection: &Connection, file: &Path) -> Result<usize, JournalError> {
    let failed = |error: rusqlite::Error| JournalError::Open { file: file.to_owned(), reason: error.to_string() };
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(failed)?;
    match found as usize {
        found if found > LAYOUT.len() => Err(JournalError::Newer { file: file.to_owned(), found, known: LAYOUT.len() }),
        found => Ok(found),
    }
}

/// Commits what comes, as much at a time as has come, until nobody can send any more.
fn work(connection: &mut Connection, queue: &mpsc::Receiver<Change>) {
    while let Ok(first) = queue.recv() {
        let changes = std::iter::once(first).chain(queue.try_iter().take(MOST_IN_ONE - 1));
        let transaction = match connection.transaction_with_behavior(TransactionBehavior::Immediate) {
            Ok(transaction) => transaction,
            Err(error) => {
                let error = JournalError::from(error);
                tracing::error!(%error, "The journal cannot be written.");
                // Their senders are told by what is dropped; the next change tries again.
                changes.for_each(drop);
                continue;
            }
        };
        let told: Vec<Told> = changes.map(|change| change(&transaction)).collect();
        let committed = transaction.commit().map_err(JournalError::from);
        if let Err(error) = &committed {
            tracing::error!(%error, "The journal was not written.");
        }
        told.into_iter().for_each(|tell| tell(committed.clone()));
    }
}

/// One change within a commit that others share: it alone is undone where it fails.
fn in_part<T>(
    transaction: &Transaction<'_>,
    change: impl FnOnce(&Transaction<'_>) -> Result<T, JournalError>,
) -> Result<T, JournalError> {
    transaction.execute_batch("SAVEPOINT part")?;
    let changed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| change(transaction)));
    let changed = changed.unwrap_or_else(|_| Err(JournalError::Write("a change panicked".into())));
    let end = if changed.is_ok() { "RELEASE part" } else { "ROLLBACK TO part; RELEASE part" };
    transaction.execute_batch(end)?;
    changed
}

/// A value as the journal's text.
pub(super) fn text(value: &impl Serialize) -> Result<String, JournalError> {
    serde_json::to_string(value).map_err(|error| JournalError::Write(error.to_string()))
}

/// A value of the journal's text.
pub(super) fn value<T: DeserializeOwned>(text: &str) -> Result<T, JournalError> {
    serde_json::from_str(text).map_err(|error| JournalError::Corrupt(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(transaction: &Transaction<'_>, name: &str, value: &str) -> Result<(), JournalError> {
        transaction.execute("INSERT OR REPLACE INTO marks (name, value) VALUES (?1, ?2)", [name, value])?;
        Ok(())
    }

    async fn marks(journal: &Journal) -> Vec<String> {
        let read = journal.write(|transaction| {
            let mut statement = transaction.prepare("SELECT name FROM marks ORDER BY name")?;
            let names = statement.query_map([], |row| row.get(0))?;
            Ok(names.collect::<Result<Vec<String>, _>>()?)
        });
        read.await.expect("reads")
    }

    #[tokio::test]
    async fn a_change_that_fails_takes_none_of_its_neighbours_along() {
        let folder = tempfile::tempdir().expect("a folder");
        let journal = Journal::open(folder.path()).expect("opens");
        let changes = (0..64).map(|number| {
            journal.write(move |transaction| {
                mark(transaction, &format!("{number:02}"), "x")?;
                match number % 4 {
                    1 => Err(JournalError::Write("on purpose".into())),
                    3 => panic!("on purpose"),
                    _ => Ok(()),
                }
            })
        });
        let outcomes = futures::future::join_all(changes).await;
        for (number, outcome) in outcomes.iter().enumerate() {
            assert_eq!(outcome.is_ok(), number % 2 == 0, "{number}: {outcome:?}");
        }
        let kept: Vec<String> = (0..64).step_by(2).map(|number| format!("{number:02}")).collect();
        assert_eq!(marks(&journal).await, kept);
        drop(journal);
        let again = Journal::open(folder.path()).expect("opens again");
        assert_eq!(marks(&again).await, kept);
    }

    #[tokio::test]
    async fn a_file_of_a_newer_node_and_one_that_is_no_journal_are_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        drop(Journal::open(folder.path()).expect("opens"));
        let file = Journal::path(folder.path());
        Connection::open(&file).expect("opens").pragma_update(None, "user_version", 99).expect("is set");
        assert!(matches!(Journal::open(folder.path()), Err(JournalError::Newer { found: 99, .. })));
        std::fs::write(&file, [b'x'; 8192]).expect("writes");
        assert!(matches!(Journal::open(folder.path()), Err(JournalError::Open { .. })));
        assert_eq!(std::fs::read(&file).expect("reads"), [b'x'; 8192]);
    }

    #[tokio::test]
    async fn another_process_looks_while_the_journal_is_written() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(look(folder.path()).expect("nothing is no error").is_none());
        let journal = Journal::open(folder.path()).expect("opens");
        journal.write(|transaction| mark(transaction, "a", "1")).await.expect("writes");
        let looking = look(folder.path()).expect("opens").expect("is there");
        let read = looking.query_row("SELECT value FROM marks WHERE name = 'a'", [], |row| row.get::<_, String>(0));
        assert_eq!(read.expect("reads"), "1");
    }
}
