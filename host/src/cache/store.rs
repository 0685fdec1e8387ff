//! The answers that are kept: one SQLite file, and one thread that reads and writes it.
//!
//! Nothing here is worth waiting for. Writes are not forced to disk; a queue that is full, a disk that hangs and a row that cannot be read all
//! mean that an answer is generated once more. A file that cannot be used is set aside, and the node begins with an empty one.
//!
//! A look comes after the writes that were asked for before it, since one thread does both: an answer is found as soon as it was given.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use fabstir_plugin_api::inference::Chunk;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, params};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tracing::{error, warn};

use super::Entry;
use super::key::Key;
use super::likeness::Wording;
use super::metrics::Metrics;
use super::veto::Question;
use crate::clock::now_ms;

mod sharing;
mod wording;

pub(super) use sharing::Part;

/// The layout of the tables. A file with another one is set aside.
const LAYOUT: u32 = 2;

/// Looks and writes that may wait for the thread.
const MOST_WAITING: usize = 1024;

/// Bytes of answers that may wait with it.
const MOST_WAITING_BYTES: u64 = 64 << 20;

/// How long a command of the operator may keep the file to itself, and how long that command waits for the node.
const BUSY: Duration = Duration::from_millis(100);
const PATIENT: Duration = Duration::from_secs(5);

/// What a row takes beside its answer, roughly: keys, columns, indexes.
const ROW: u64 = 300;

/// No answer may take more than this part of the store.
const LARGEST: u64 = 8;

/// How far the store is emptied when it is full, in percent: so that it does not have to be done for each answer.
const EMPTIED_TO: u64 = 90;

/// How often what is too old is removed.
const SWEEP: Duration = Duration::from_secs(60);

/// An answer to be kept.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Fresh {
    pub key: Key,
    pub tenant: String,
    pub model: String,
    pub entry: Entry,
    /// For those that may be found under other words.
    pub wording: Option<Wording>,
}

impl Fresh {
    /// What it takes in memory, about.
    fn bytes(&self) -> u64 {
        let chunk = |chunk: &Chunk| match chunk {
            Chunk::Text(text) => text.text.len() + text.logprobs.len() * 512,
            _ => 0,
        };
        self.entry.chunks.iter().map(|item| chunk(item) as u64 + 64).sum()
    }
}

/// Bytes that are counted as waiting until it is dropped.
struct Waits(Arc<AtomicU64>, u64);

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// Work for the store's thread.
type Work = Box<dyn FnOnce(&mut Shelf) + Send>;

/// The open store. Clones are the same.
#[derive(Clone)]
pub(super) struct Store {
    /// `None` where there is no store: then nothing is found, and nothing kept.
    work: Option<mpsc::SyncSender<Work>>,
    /// Bytes of the answers that wait to be kept.
    waiting: Arc<AtomicU64>,
    /// How long a look may take. A disk that hangs costs a request so much, and no more.
    pub look: Duration,
}

/// What a store may take.
pub(super) struct Limits {
    pub max_bytes: u64,
    pub ttl: Duration,
    pub look: Duration,
}

impl Store {
    /// Opens the store of a data folder, and makes it where there is none.
    pub fn open(data_dir: &Path, limits: Limits, metrics: Metrics) -> Store {
        let Limits { max_bytes, ttl, look } = limits;
        let file = path(data_dir);
        let opened = Shelf::open(file.clone(), max_bytes, ttl, metrics).and_then(|mut shelf| {
            let (work, queue) = mpsc::sync_channel::<Work>(MOST_WAITING);
            let thread = thread::Builder::new().name("cache".into()).spawn(move || {
                loop {
                    match queue.recv_timeout(SWEEP) {
                        Ok(work) => work(&mut shelf),
                        Err(RecvTimeoutError::Timeout) => shelf.tidy(),
                        Err(RecvTimeoutError::Disconnected) => return,
                    }
                }
            });
            thread.map_err(|error| error.to_string())?;
            Ok(work)
        });
        match opened {
            Ok(work) => Store { work: Some(work), waiting: Arc::default(), look },
            Err(reason) => {
                error!(file = %file.display(), reason, "No answers are kept: their file can be neither used nor replaced.");
                Store { work: None, waiting: Arc::default(), look }
            }
        }
    }

    /// Whether a data folder has one.
    pub fn is_there(data_dir: &Path) -> bool {
        path(data_dir).exists()
    }

    /// The answer with a key, unless it is older.
    pub async fn find(&self, key: Key, since_ms: u64) -> Option<Entry> {
        self.ask(self.look, move |shelf| shelf.find(key, since_ms)).await?
    }

    /// The first answer of `near` whose question asks the same as `question`, and how alike the two are.
    pub async fn alike(&self, near: Vec<(Key, f32)>, question: Wording, since_ms: u64) -> Option<(Entry, f32)> {
        self.ask(self.look, move |shelf| shelf.alike(near, &question, since_ms)).await?
    }

    /// Keeps an answer, where there is room in the queue.
    pub fn keep(&self, fresh: Fresh) {
        let (bytes, waiting) = (fresh.bytes(), self.waiting.clone());
        if waiting.fetch_add(bytes, Ordering::Relaxed) + bytes > MOST_WAITING_BYTES {
            waiting.fetch_sub(bytes, Ordering::Relaxed);
            return;
        }
        let waits = Waits(waiting, bytes);
        self.tell(move |shelf| {
            drop(waits);
            shelf.keep(&fresh, None)
        });
    }

    /// What `work` finds; `None` where it fails, or takes longer than `limit`.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(&mut Shelf) -> rusqlite::Result<T> + Send + 'static,
    ) -> Option<T> {
        let (tell, told) = oneshot::channel();
        self.tell(move |shelf| work(shelf).map(|found| drop(tell.send(found))));
        tokio::time::timeout(limit, told).await.ok()?.ok()
    }

    fn tell(&self, work: impl FnOnce(&mut Shelf) -> rusqlite::Result<()> + Send + 'static) {
        if let Some(queue) = &self.work {
            let _ = queue.try_send(Box::new(move |shelf| {
                if let Err(error) = work(shelf) {
                    shelf.failed(&error);
                }
            }));
        }
    }
}

/// Where the store of a data folder is.
fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("cache").join("answers.sqlite")
}

/// The name of a store that was set aside.
fn aside(file: &Path) -> PathBuf {
    file.with_extension("sqlite.aside")
}

/// The thread's side of it.
pub(super) struct Shelf {
    file: PathBuf,
    connection: Connection,
    max_bytes: u64,
    ttl: Duration,
    metrics: Metrics,
    bytes: u64,
    swept: Instant,
}

impl Shelf {
    fn open(file: PathBuf, max_bytes: u64, ttl: Duration, metrics: Metrics) -> Result<Shelf, String> {
        let folder = file.parent().ok_or("it lies in no folder")?;
        // Answers are the clients' own: nobody else on this machine has a business with them.
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|error| error.to_string())?;
        let connection = match connect(&file, PATIENT) {
            Ok(connection) => connection,
            Err(error) if is_broken(&error) => replace(&file, &error)?,
            Err(error) => return Err(error.to_string()),
        };
        connection.busy_timeout(BUSY).map_err(|error| error.to_string())?;
        let mut shelf = Shelf { file, connection, max_bytes, ttl, metrics, bytes: 0, swept: Instant::now() };
        shelf.tidy();
        Ok(shelf)
    }

    fn find(&mut self, key: Key, since_ms: u64) -> rusqlite::Result<Option<Entry>> {
        let look =
            "SELECT plugin, stored_ms, chunks, hash FROM entries JOIN answers USING (key) WHERE key = ?1 AND stored_ms >= ?2";
        let found = self.connection.query_row(look, params![key.0, integer(since_ms)], |row| {
            let (plugin, stored_ms): (String, i64) = (row.get(0)?, row.get(1)?);
            let (chunks, hash): (Vec<u8>, Vec<u8>) = (row.get(2)?, row.get(3)?);
            let whole = blake3::hash(&chunks).as_bytes() == hash.as_slice();
            let chunks: Option<Vec<Chunk>> = rmp_serde::from_slice(&chunks).ok().filter(|_| whole);
            Ok(chunks.map(|chunks| Entry { plugin, stored_ms: stored_ms as u64, chunks }))
        });
        match found.optional()? {
            None => Ok(None),
            Some(None) => {
                warn!("A kept answer has changed on the disk, and is thrown away.");
                self.connection.execute("DELETE FROM entries WHERE key = ?1", [key.0])?;
                Ok(None)
            }
            Some(Some(entry)) => {
                let used = "UPDATE entries SET hits = hits + 1, used_ms = ?2 WHERE key = ?1";
                // The answer is there whether this can be noted or not.
                if let Err(error) = self.connection.execute(used, params![key.0, integer(now_ms())]) {
                    self.failed(&error);
                }
                Ok(Some(entry))
            }
        }
    }

    fn alike(&mut self, near: Vec<(Key, f32)>, asked: &Wording, since_ms: u64) -> rusqlite::Result<Option<(Entry, f32)>> {
        let question = Question::new(&asked.text);
        for (key, similarity) in near {
            let known = "SELECT question FROM questions WHERE key = ?1 AND space = ?2";
            let known = self.connection.query_row(known, [key.0, asked.space.0], |row| row.get::<_, String>(0)).optional()?;
            let Some(known) = known else {
                // Its answer went, and the vector was not told: with a file that was set aside, for example.
                self.connection.execute("INSERT OR IGNORE INTO gone VALUES (?1, ?2)", [asked.space.0, key.0])?;
                continue;
            };
            match Question::new(&known).differs(&question) {
                Some(veto) => self.metrics.veto(veto),
                None => {
                    if let Some(entry) = self.find(key, since_ms)? {
                        return Ok(Some((entry, similarity)));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Keeps an answer that was given here, or came in a pack of another node.
    fn keep(&mut self, fresh: &Fresh, pack: Option<&str>) -> rusqlite::Result<()> {
        let Fresh { key, tenant, model, entry, wording } = fresh;
        let chunks =
            rmp_serde::to_vec_named(&entry.chunks).map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
        let aside = wording.as_ref().map_or(0, |wording| wording.text.len() + 4 * wording.vector.len());
        let bytes = (chunks.len() + aside) as u64 + ROW;
        if bytes > self.max_bytes / LARGEST {
            return Ok(());
        }
        let tokens =
            entry.chunks.iter().map(|chunk| if let Chunk::Done(done) = chunk { done.usage.completion_tokens } else { 0 });
        let transaction = self.connection.transaction()?;
        transaction.execute("DELETE FROM entries WHERE key = ?1", [key.0])?;
        transaction.execute(
            "INSERT INTO entries VALUES (?1, ?2, ?3, ?4, ?5, ?5, 0, ?6, ?7, ?8)",
            params![key.0, tenant, model, entry.plugin, integer(entry.stored_ms), tokens.sum::<u32>(), integer(bytes), pack],
        )?;
        let hash = blake3::hash(&chunks);
        transaction.execute("INSERT INTO answers VALUES (?1, ?2, ?3)", params![key.0, chunks, hash.as_bytes()])?;
        if let Some(Wording { space, text, vector }) = wording {
            let vector: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
            transaction.execute("INSERT INTO questions VALUES (?1, ?2, ?3, ?4, 0)", params![key.0, space.0, text, vector])?;
            transaction.execute("DELETE FROM gone WHERE space = ?1 AND key = ?2", [space.0, key.0])?;
        }
        transaction.commit()?;
        self.metrics.stored.inc();
        self.bytes += bytes;
        if self.bytes > self.max_bytes || self.swept.elapsed() > SWEEP {
            self.tidy();
        } else {
            self.metrics.entries.inc();
            self.metrics.bytes.set(self.bytes as i64);
        }
        Ok(())
    }

    /// Removes what is too old, and makes room where that is not enough.
    fn tidy(&mut self) {
        self.swept = Instant::now();
        if let Err(error) = self.make_room() {
            self.failed(&error);
        }
    }

    fn make_room(&mut self) -> rusqlite::Result<()> {
        let oldest = integer(now_ms().saturating_sub(self.ttl.as_millis() as u64));
        self.connection.execute("DELETE FROM entries WHERE stored_ms < ?1", [oldest])?;
        self.connection.execute("DELETE FROM erasures WHERE at_ms < ?1", [oldest])?;
        let aside = aside(&self.file);
        if fs::metadata(&aside).and_then(|aside| aside.modified()).is_ok_and(|at| at.elapsed().is_ok_and(|age| age > self.ttl)) {
            let _ = fs::remove_file(aside);
        }
        // Counted anew: the operator may have emptied the store beside the node.
        let (mut entries, mut bytes) = totals(&self.connection)?;
        if bytes > self.max_bytes {
            let target = self.max_bytes / 100 * EMPTIED_TO;
            // What an answer is worth: the tokens that it has saved and would save once more, for each byte that it takes, and less with each
            // hour since it was last wanted.
            let mut worst = self.connection.prepare(
                "SELECT key, bytes FROM entries ORDER BY tokens * (hits + 1.0) / bytes / (1.0 + max(0, ?1 - used_ms) / 3600000.0), used_ms",
            )?;
            let mut rows = worst.query([integer(now_ms())])?;
            let mut given_up = Vec::new();
            while bytes > target
                && let Some(row) = rows.next()?
            {
                given_up.push(row.get::<_, Vec<u8>>(0)?);
                bytes = bytes.saturating_sub(row.get::<_, i64>(1)? as u64);
            }
            drop(rows);
            drop(worst);
            let transaction = self.connection.transaction()?;
            for key in &given_up {
                transaction.execute("DELETE FROM entries WHERE key = ?1", [key])?;
            }
            transaction.commit()?;
            entries = entries.saturating_sub(given_up.len() as u64);
            self.metrics.evicted.inc_by(given_up.len() as u64);
        }
        self.bytes = bytes;
        self.metrics.entries.set(entries as i64);
        self.metrics.bytes.set(bytes as i64);
        Ok(())
    }

    /// A file that cannot be read is set aside; whatever else went wrong is tried again with the next answer.
    fn failed(&mut self, error: &rusqlite::Error) {
        if !is_broken(error) {
            return warn!(%error, "The store of kept answers failed.");
        }
        // Closed before another takes its name: closing removes what was written ahead, by name.
        if let Ok(none) = Connection::open_in_memory() {
            self.connection = none;
        }
        match replace(&self.file, error) {
            Ok(connection) => {
                self.connection = connection;
                self.bytes = 0;
                self.metrics.entries.set(0);
                self.metrics.bytes.set(0);
            }
            Err(reason) => error!(reason, "The store of kept answers is broken, and cannot be replaced."),
        }
    }
}

/// Whether a file is beyond repair, or of another version.
fn is_broken(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

/// Sets a file aside, and begins with an empty one.
fn replace(file: &Path, why: &rusqlite::Error) -> Result<Connection, String> {
    set_aside(file, why)?;
    connect(file, BUSY).map_err(|error| error.to_string())
}

/// Opens the file, and lays it out where there is none.
fn connect(file: &Path, busy: Duration) -> rusqlite::Result<Connection> {
    let connection = Connection::open(file)?;
    // A file that only its owner reads, even if the folder was there before with other rights.
    let _ = fs::set_permissions(file, fs::Permissions::from_mode(0o600));
    prepare(&connection, busy)?;
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if tables == 0 {
        connection
            .execute_batch(&format!("BEGIN; {} PRAGMA user_version = {LAYOUT}; COMMIT;", include_str!("store/layout.sql")))?;
    }
    check_layout(&connection)?;
    Ok(connection)
}

fn prepare(connection: &Connection, busy: Duration) -> rusqlite::Result<()> {
    connection.busy_timeout(busy)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    // A crash of the machine loses the last answers, and leaves a file that can be read.
    connection.pragma_update(None, "synchronous", "normal")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // What was removed is not to be found in the file any more.
    connection.pragma_update(None, "secure_delete", true)
}

/// # Errors
/// As for a file that is no database: the rows of another layout cannot be read either.
fn check_layout(connection: &Connection) -> rusqlite::Result<()> {
    let layout: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let other = format!("it has the layout {layout} of another version, this one knows {LAYOUT}");
    let failure = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_NOTADB);
    if layout == LAYOUT { Ok(()) } else { Err(rusqlite::Error::SqliteFailure(failure, Some(other))) }
}

/// Moves a file out of the way that cannot be used. The last one so moved goes.
fn set_aside(file: &Path, why: &rusqlite::Error) -> Result<(), String> {
    let to = aside(file);
    for written_ahead in ["-wal", "-shm"] {
        let mut name = file.as_os_str().to_owned();
        name.push(written_ahead);
        // Most often there is none.
        let _ = fs::remove_file(name);
    }
    fs::rename(file, &to).map_err(|error| format!("{why}; and it cannot be moved away: {error}"))?;
    warn!(error = %why, kept_as = %to.display(), "The file of kept answers cannot be used, and is set aside.");
    Ok(())
}

/// Removes what was kept for a tenant, or for all, and notes it for the nodes that share it.
fn erase(connection: &Connection, tenant: Option<&str>, at_ms: u64) -> rusqlite::Result<usize> {
    let removed = "DELETE FROM entries WHERE (?1 IS NULL OR tenant = ?1) AND stored_ms <= ?2";
    let removed = connection.execute(removed, params![tenant, integer(at_ms)])?;
    connection.execute("INSERT INTO erasures VALUES (?1, ?2)", params![tenant, integer(at_ms)])?;
    Ok(removed)
}

fn totals(connection: &Connection) -> rusqlite::Result<(u64, u64)> {
    connection.query_row("SELECT count(*), coalesce(sum(bytes), 0) FROM entries", [], |row| {
        Ok((row.get::<_, i64>(0)? as u64, row.get::<_, i64>(1)? as u64))
    })
}

/// SQLite's numbers are signed.
fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// What is kept for one tenant, or for one model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Share {
    pub name: String,
    pub entries: u64,
    pub bytes: u64,
    pub hits: u64,
    pub tokens_saved: u64,
}

/// What is kept in all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Stock {
    pub tenants: Vec<Share>,
    pub models: Vec<Share>,
}

/// Removes a file that was set aside: whose answers lie in it cannot be told any more.
pub fn remove_aside(data_dir: &Path) {
    // Most often there is none.
    let _ = fs::remove_file(aside(&path(data_dir)));
}

/// The store as another process than the node has it.
pub struct Look {
    connection: Connection,
}

impl Look {
    /// Opens the store of a data folder beside the node; `None` where there is none.
    ///
    /// # Errors
    /// A file that cannot be read, or was laid out by another version.
    pub fn open(data_dir: &Path) -> rusqlite::Result<Option<Look>> {
        let file = path(data_dir);
        if !file.exists() {
            return Ok(None);
        }
        let connection = Connection::open_with_flags(&file, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        prepare(&connection, PATIENT)?;
        check_layout(&connection)?;
        Ok(Some(Look { connection }))
    }

    /// What is kept, counted.
    pub fn stock(&self) -> rusqlite::Result<Stock> {
        let shares = |column: &str| {
            let mut counted = self.connection.prepare(&format!(
                "SELECT {column}, count(*), sum(bytes), sum(hits), sum(hits * tokens) FROM entries GROUP BY 1 ORDER BY 3 DESC"
            ))?;
            let natural = |row: &rusqlite::Row<'_>, column: usize| Ok::<_, rusqlite::Error>(row.get::<_, i64>(column)? as u64);
            let shares = counted.query_map([], |row| {
                Ok(Share {
                    name: row.get(0)?,
                    entries: natural(row, 1)?,
                    bytes: natural(row, 2)?,
                    hits: natural(row, 3)?,
                    tokens_saved: natural(row, 4)?,
                })
            })?;
            shares.collect::<rusqlite::Result<Vec<_>>>()
        };
        Ok(Stock { tenants: shares("tenant")?, models: shares("model")? })
    }

    /// Removes what is kept for one tenant, or for all; says how many answers that were. They are gone from the file when it returns.
    pub fn flush(&self, tenant: Option<&str>) -> rusqlite::Result<usize> {
        // Also what a clock that was ahead has stamped.
        let latest = "SELECT coalesce(max(stored_ms), 0) FROM entries WHERE ?1 IS NULL OR tenant = ?1";
        let latest = self.connection.query_row(latest, [tenant], |row| row.get::<_, i64>(0))? as u64;
        let removed = erase(&self.connection, tenant, latest.max(now_ms()))?;
        // What was written ahead holds old pages too.
        let busy: bool = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
        if busy {
            let why =
                format!("{removed} answers are removed, but another program reads the file, so that its bytes are still there");
            return Err(rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY), Some(why)));
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use fabstir_plugin_api::inference::Text;

    use super::*;
    use crate::scheduler::tests::done;

    fn fresh(number: u8, tenant: &str, length: usize) -> Fresh {
        let text = Chunk::Text(Text { text: "x".repeat(length), tokens: 1, logprobs: Vec::new() });
        let entry = Entry { plugin: "p".into(), stored_ms: now_ms(), chunks: vec![text, Chunk::Done(done())] };
        Fresh { key: Key([number; 32]), tenant: tenant.into(), model: "m".into(), entry, wording: None }
    }

    fn open(folder: &Path, max_bytes: u64) -> (Store, Metrics) {
        let metrics = Metrics::default();
        // However long the disk takes.
        let limits = Limits { max_bytes, ttl: Duration::from_secs(3600), look: Duration::from_secs(30) };
        (Store::open(folder, limits, metrics.clone()), metrics)
    }

    #[tokio::test]
    async fn what_was_kept_is_found_at_once_and_after_a_restart() {
        let folder = tempfile::tempdir().expect("a folder");
        let kept = fresh(1, "a", 10);
        let entry = kept.entry.clone();
        let (store, metrics) = open(folder.path(), 1 << 20);
        store.keep(kept);
        assert_eq!(store.find(Key([1; 32]), 0).await.as_ref(), Some(&entry));
        assert_eq!(store.find(Key([1; 32]), now_ms() + 1000).await, None, "it is older");
        assert_eq!(store.find(Key([2; 32]), 0).await, None);
        assert_eq!((metrics.entries.get(), metrics.stored.get()), (1, 1));
        drop(store);
        let (again, metrics) = open(folder.path(), 1 << 20);
        assert_eq!(again.find(Key([1; 32]), 0).await, Some(entry));
        assert_eq!(metrics.entries.get(), 1);
    }

    #[tokio::test]
    async fn a_full_store_gives_up_what_is_asked_for_least() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, metrics) = open(folder.path(), 64 << 10);
        store.keep(fresh(0, "a", 4000));
        for number in 1..40 {
            store.keep(fresh(number, "a", 4000));
            assert!(store.find(Key([0; 32]), 0).await.is_some(), "{number}");
        }
        assert!(
            metrics.bytes.get() <= 64 << 10 && metrics.evicted.get() > 20,
            "{} {}",
            metrics.bytes.get(),
            metrics.evicted.get()
        );
        assert!(store.find(Key([39; 32]), 0).await.is_some(), "the last one stays");
        assert!(store.find(Key([1; 32]), 0).await.is_none());
        store.keep(fresh(99, "a", 9000));
        assert_eq!(store.find(Key([99; 32]), 0).await, None, "one answer is too much of the store");
    }

    #[tokio::test]
    async fn what_cannot_be_used_is_set_aside() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = path(folder.path());
        for broken in
            [&b"no database, and long enough to be told so by its first bytes, which are looked at............"[..], b""]
        {
            drop(open(folder.path(), 1 << 20));
            // Its thread closes the file a moment later, and takes this one along.
            while file.with_extension("sqlite-wal").exists() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            match broken {
                b"" => Connection::open(&file).expect("opens").pragma_update(None, "user_version", 99).expect("is set"),
                bytes => fs::write(&file, bytes).expect("writes"),
            }
            let (store, _) = open(folder.path(), 1 << 20);
            store.keep(fresh(1, "a", 10));
            assert!(store.find(Key([1; 32]), 0).await.is_some());
            assert!(aside(&file).exists());
            fs::remove_file(aside(&file)).expect("goes");
        }
    }

    #[tokio::test]
    async fn a_changed_answer_is_not_given() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, _) = open(folder.path(), 1 << 20);
        store.keep(fresh(1, "a", 10));
        assert!(store.find(Key([1; 32]), 0).await.is_some());
        let other = Connection::open(path(folder.path())).expect("opens");
        other.execute("UPDATE answers SET chunks = CAST(replace(chunks, 'xx', 'yy') AS BLOB)", []).expect("changes");
        assert_eq!(store.find(Key([1; 32]), 0).await, None);
        let left: i64 = other.query_row("SELECT count(*) FROM answers", [], |row| row.get(0)).expect("counts");
        assert_eq!(left, 0);
    }

    #[tokio::test]
    async fn one_tenants_answers_are_erased_and_the_others_stay() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(Look::open(folder.path()).expect("nothing is no error").is_none());
        let (store, _) = open(folder.path(), 1 << 20);
        let secret = "a text that stands nowhere else";
        let mut mine = fresh(1, "a", 10);
        mine.entry.chunks[0] = Chunk::Text(Text { text: secret.into(), ..Text::default() });
        store.keep(mine);
        store.keep(fresh(2, "b", 10));
        assert!(store.find(Key([2; 32]), 0).await.is_some());
        let look = Look::open(folder.path()).expect("opens").expect("is there");
        let stock = look.stock().expect("counts");
        assert_eq!(stock.tenants.len(), 2);
        assert_eq!((stock.models[0].entries, stock.models[0].hits, stock.models[0].tokens_saved), (2, 1, 1));
        assert_eq!(look.flush(Some("a")).expect("removes"), 1);
        assert_eq!(store.find(Key([1; 32]), 0).await, None);
        assert!(store.find(Key([2; 32]), 0).await.is_some());
        for file in fs::read_dir(folder.path().join("cache")).expect("a folder") {
            let bytes = fs::read(file.expect("a file").path()).expect("reads");
            assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()));
        }
    }
}
