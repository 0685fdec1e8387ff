//! What is stored: rows in a database file, and what happened to them in which order. Everything else can be made from it.
//!
//! A namespace numbers its changes. A row bears the number of the change that put it, and keeps it: to replace a vector is to remove
//! its row and to put another. So the rows from a number on are what was put since; and from the first index of a namespace on, the
//! log says what was removed.

use std::fs;
use std::path::{Path, PathBuf};

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, TableError, WriteTransaction};

use super::direction::Direction;
use super::error::{Result, VectorError};

/// Memory in which the database keeps pages that it has read.
const PAGE_CACHE: usize = 64 << 20;

/// The layout that is described here.
const FORMAT: u64 = 1;

/// A log that is this long, and four times as long as there are rows, is of no use: an index is made anew faster.
const LONGEST_LOG: u64 = 100_000;

const NAMESPACES: TableDefinition<&str, &[u8]> = TableDefinition::new("namespaces");
const COUNTERS: TableDefinition<&str, u64> = TableDefinition::new("counters");

/// What a namespace's row in [`NAMESPACES`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespace {
    /// Never used twice, so what is left of a namespace is not taken for one that later has its name.
    pub number: u64,
    pub dimensions: u64,
    pub rows: u64,
    /// Of all rows.
    bytes: u64,
    /// The number of the next change.
    pub next: u64,
    /// From which change on the log has all removals; `None` where nothing is logged.
    pub logged: Option<u64>,
}

impl Namespace {
    fn read(stored: &[u8]) -> Result<Self> {
        let (fields, []) = stored.as_chunks::<8>() else { return Err(damaged("a namespace of odd length")) };
        let &[number, dimensions, rows, bytes, next, logged] = fields else {
            return Err(damaged("a namespace of another length"));
        };
        let value = u64::from_le_bytes;
        let logged = Some(value(logged)).filter(|from| *from != u64::MAX);
        Ok(Self {
            number: value(number),
            dimensions: value(dimensions),
            rows: value(rows),
            bytes: value(bytes),
            next: value(next),
            logged,
        })
    }

    fn write(&self) -> Vec<u8> {
        let Self { number, dimensions, rows, bytes, next, logged } = *self;
        [number, dimensions, rows, bytes, next, logged.unwrap_or(u64::MAX)].into_iter().flat_map(u64::to_le_bytes).collect()
    }
}

fn damaged(what: impl Into<String>) -> VectorError {
    VectorError::Damaged(what.into())
}

/// The names of a namespace's tables.
struct Tables {
    keys: String,
    rows: String,
    log: String,
}

impl Tables {
    fn of(number: u64) -> Self {
        Self { keys: format!("keys-{number}"), rows: format!("rows-{number}"), log: format!("log-{number}") }
    }

    /// Row by key.
    fn keys(&self) -> TableDefinition<'_, &'static str, u64> {
        TableDefinition::new(&self.keys)
    }

    /// Key, direction and data by row.
    fn rows(&self) -> TableDefinition<'_, u64, &'static [u8]> {
        TableDefinition::new(&self.rows)
    }

    /// Removed row by change.
    fn log(&self) -> TableDefinition<'_, u64, u64> {
        TableDefinition::new(&self.log)
    }
}

/// A vector that is to be stored.
#[derive(Debug)]
pub struct Row {
    pub key: String,
    pub direction: Direction,
    pub data: Vec<u8>,
}

impl Row {
    /// The length of the key in two bytes, the key, the numbers, the data.
    fn write(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(2 + self.key.len() + 4 * self.direction.numbers().len() + self.data.len());
        bytes.extend((self.key.len() as u16).to_le_bytes());
        bytes.extend(self.key.as_bytes());
        self.direction.write_to(&mut bytes);
        bytes.extend(&self.data);
        bytes
    }
}

/// A row in its stored form.
#[derive(Debug, Clone, Copy)]
pub struct Stored<'a> {
    pub key: &'a str,
    /// As [`Direction::cosine`] takes it.
    pub numbers: &'a [u8],
    pub data: &'a [u8],
}

impl<'a> Stored<'a> {
    fn read(bytes: &'a [u8], dimensions: u64) -> Result<Self> {
        let parts = || {
            let (length, rest) = bytes.split_first_chunk()?;
            let (key, rest) = rest.split_at_checked(u16::from_le_bytes(*length).into())?;
            let (numbers, data) = rest.split_at_checked(4 * dimensions as usize)?;
            Some(Self { key: str::from_utf8(key).ok()?, numbers, data })
        };
        parts().ok_or_else(|| damaged("a row of another form"))
    }
}

/// What happened to a namespace's rows.
#[derive(Debug)]
pub enum Change<'a> {
    Removed(u64),
    Put(u64, Stored<'a>),
}

/// What a delete has done.
#[derive(Debug)]
pub struct Deleted {
    /// How many rows there were.
    pub rows: u64,
    /// The namespace, if it has changed: without rows, it has ended.
    pub namespace: Option<Namespace>,
}

/// The database. One instance has it open at a time.
pub struct Truth {
    database: Database,
    folder: PathBuf,
    max_bytes: Option<u64>,
}

impl Truth {
    /// Opens the database in a folder, and makes both where they are missing.
    ///
    /// # Errors
    /// `InUse`, `Format`, and what the system says.
    pub fn open(folder: &Path, max_bytes: Option<u64>) -> Result<Self> {
        fs::create_dir_all(folder).map_err(VectorError::io("make the folder", folder))?;
        let database = match Database::builder().set_cache_size(PAGE_CACHE).create(folder.join("vectors.redb")) {
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => return Err(VectorError::InUse(folder.to_owned())),
            opened => opened?,
        };
        let transaction = database.begin_write()?;
        {
            let mut counters = transaction.open_table(COUNTERS)?;
            let found = counters.get("format")?.map(|found| found.value());
            match found {
                None => drop(counters.insert("format", FORMAT)?),
                Some(FORMAT) => {}
                Some(found) => return Err(VectorError::Format { found, dir: folder.to_owned() }),
            }
            // A read does not have to ask whether the table is there yet.
            transaction.open_table(NAMESPACES)?;
        }
        transaction.commit()?;
        // The names of the file and of its folder must survive a power cut, too.
        for folder in [Some(folder), folder.parent()].into_iter().flatten() {
            fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(VectorError::io("sync the folder", folder))?;
        }
        Ok(Self { database, folder: folder.to_owned(), max_bytes })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Stores rows of one namespace in place of those with the same keys; all of them, or none. `still_wanted` is asked at the last moment.
    /// Gives the namespace as it is afterwards, if there were any rows.
    ///
    /// # Errors
    /// `Dimension`, `QuotaFull`, `Cancelled`, and what the database says.
    pub fn put(&self, name: &str, rows: &[Row], still_wanted: &dyn Fn() -> bool) -> Result<Option<Namespace>> {
        let Some(first) = rows.first() else { return Ok(None) };
        let transaction = self.database.begin_write()?;
        let mut namespace = match find(&transaction, name)? {
            Some(namespace) => namespace,
            None => begin(&transaction, first.direction.numbers().len() as u64)?,
        };
        let before = namespace.bytes;
        {
            let tables = Tables::of(namespace.number);
            let mut keys = transaction.open_table(tables.keys())?;
            let mut stored = transaction.open_table(tables.rows())?;
            let mut log = transaction.open_table(tables.log())?;
            for row in rows {
                let length = row.direction.numbers().len();
                if length as u64 != namespace.dimensions {
                    return Err(VectorError::Dimension { expected: namespace.dimensions, actual: length });
                }
                let bytes = row.write();
                let number = namespace.change();
                let replaced = keys.insert(row.key.as_str(), number)?.map(|replaced| replaced.value());
                if let Some(replaced) = replaced {
                    namespace.remove(replaced, &mut stored, &mut log)?;
                }
                stored.insert(number, bytes.as_slice())?;
                namespace.rows += 1;
                namespace.bytes += bytes.len() as u64;
            }
        }
        self.count_bytes(&transaction, before, namespace.bytes)?;
        namespace.store(name, &transaction)?;
        if !still_wanted() {
            return Err(VectorError::Cancelled);
        }
        transaction.commit()?;
        Ok(Some(namespace))
    }

    /// Removes rows by their keys, or the whole namespace, which also ends with its last row.
    pub fn delete(&self, name: &str, keys: Option<&[String]>) -> Result<Deleted> {
        let transaction = self.database.begin_write()?;
        let Some(mut namespace) = find(&transaction, name)? else { return Ok(Deleted { rows: 0, namespace: None }) };
        let before = namespace;
        let tables = Tables::of(namespace.number);
        if let Some(keys) = keys {
            let mut by_key = transaction.open_table(tables.keys())?;
            let mut stored = transaction.open_table(tables.rows())?;
            let mut log = transaction.open_table(tables.log())?;
            for key in keys {
                let row = by_key.remove(key.as_str())?.map(|row| row.value());
                if let Some(row) = row {
                    namespace.remove(row, &mut stored, &mut log)?;
                }
            }
        }
        if keys.is_none() || namespace.rows == 0 {
            (namespace.rows, namespace.bytes) = (0, 0);
            transaction.delete_table(tables.keys())?;
            transaction.delete_table(tables.rows())?;
            transaction.delete_table(tables.log())?;
            transaction.open_table(NAMESPACES)?.remove(name)?;
        } else if namespace == before {
            return Ok(Deleted { rows: 0, namespace: None });
        } else {
            namespace.store(name, &transaction)?;
        }
        self.count_bytes(&transaction, before.bytes, namespace.bytes)?;
        transaction.commit()?;
        Ok(Deleted { rows: before.rows - namespace.rows, namespace: Some(namespace) })
    }

    /// Keeps the count of all bytes, and to the quota.
    fn count_bytes(&self, transaction: &WriteTransaction, before: u64, after: u64) -> Result<()> {
        let mut counters = transaction.open_table(COUNTERS)?;
        let stored = counters.get("bytes")?.map_or(0, |bytes| bytes.value());
        let wanted = (stored + after).saturating_sub(before);
        if let Some(max_bytes) = self.max_bytes
            && wanted > max_bytes
            && after > before
        {
            return Err(VectorError::QuotaFull { wanted, max_bytes });
        }
        counters.insert("bytes", wanted)?;
        Ok(())
    }

    /// The rows as they are now.
    pub fn read(&self) -> Result<Reading> {
        Ok(Reading(self.database.begin_read()?))
    }

    /// Logs a namespace's removals from now on, if that is not done yet. `None` where the namespace has ended.
    pub fn log(&self, name: &str, number: u64) -> Result<Option<Namespace>> {
        let found = self.read()?.namespace(name)?.filter(|namespace| namespace.number == number);
        if found.is_none_or(|namespace| namespace.logged.is_some()) {
            return Ok(found);
        }
        self.change_log(name, number, |namespace, _| {
            namespace.logged.get_or_insert(namespace.next);
            Ok(())
        })
    }

    /// Forgets the removals before a change: a snapshot has them.
    pub fn forget_log(&self, name: &str, number: u64, before: u64) -> Result<()> {
        let forgotten = self.change_log(name, number, |namespace, log| {
            if namespace.logged.is_some_and(|from| from < before) {
                log.retain_in(..before, |_, _| false)?;
                namespace.logged = Some(before);
            }
            Ok(())
        });
        forgotten.map(drop)
    }

    fn change_log(
        &self,
        name: &str,
        number: u64,
        change: impl FnOnce(&mut Namespace, &mut redb::Table<'_, u64, u64>) -> Result<()>,
    ) -> Result<Option<Namespace>> {
        let transaction = self.database.begin_write()?;
        let Some(mut namespace) = find(&transaction, name)?.filter(|namespace| namespace.number == number) else {
            return Ok(None);
        };
        change(&mut namespace, &mut transaction.open_table(Tables::of(number).log())?)?;
        namespace.store(name, &transaction)?;
        transaction.commit()?;
        Ok(Some(namespace))
    }
}

impl Namespace {
    /// The number of a change that is made now.
    fn change(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    fn remove(
        &mut self,
        row: u64,
        stored: &mut redb::Table<'_, u64, &'static [u8]>,
        log: &mut redb::Table<'_, u64, u64>,
    ) -> Result<()> {
        let removed = stored.remove(row)?.map(|bytes| bytes.value().len() as u64);
        self.bytes -= removed.ok_or_else(|| damaged("a key without its row"))?.min(self.bytes);
        self.rows -= 1;
        let change = self.change();
        if self.logged.is_some() {
            log.insert(change, row)?;
        }
        Ok(())
    }

    fn store(mut self, name: &str, transaction: &WriteTransaction) -> Result<()> {
        if self.logged.is_some_and(|from| self.next - from > LONGEST_LOG.max(4 * self.rows)) {
            transaction.delete_table(Tables::of(self.number).log())?;
            self.logged = None;
        }
        transaction.open_table(NAMESPACES)?.insert(name, self.write().as_slice())?;
        Ok(())
    }
}

fn find(transaction: &WriteTransaction, name: &str) -> Result<Option<Namespace>> {
    let table = transaction.open_table(NAMESPACES)?;
    let found = table.get(name)?;
    found.map(|found| Namespace::read(found.value())).transpose()
}

fn begin(transaction: &WriteTransaction, dimensions: u64) -> Result<Namespace> {
    let mut counters = transaction.open_table(COUNTERS)?;
    let number = counters.get("namespaces")?.map_or(0, |number| number.value());
    counters.insert("namespaces", number + 1)?;
    Ok(Namespace { number, dimensions, rows: 0, bytes: 0, next: 0, logged: None })
}

/// The rows as they were at one moment.
pub struct Reading(ReadTransaction);

impl Reading {
    pub fn namespace(&self, name: &str) -> Result<Option<Namespace>> {
        let found = self.0.open_table(NAMESPACES)?.get(name)?;
        found.map(|found| Namespace::read(found.value())).transpose()
    }

    /// The numbers of all namespaces.
    pub fn numbers(&self) -> Result<Vec<u64>> {
        let table = self.0.open_table(NAMESPACES)?;
        table.iter()?.map(|entry| Ok(Namespace::read(entry?.1.value())?.number)).collect()
    }

    /// Some rows by their numbers. Those that are not there are passed over.
    pub fn rows(
        &self,
        namespace: &Namespace,
        numbers: impl IntoIterator<Item = u64>,
        mut each: impl FnMut(u64, Stored<'_>),
    ) -> Result<()> {
        let table = self.0.open_table(Tables::of(namespace.number).rows())?;
        for number in numbers {
            if let Some(bytes) = table.get(number)? {
                each(number, Stored::read(bytes.value(), namespace.dimensions)?);
            }
        }
        Ok(())
    }

    /// All rows from one to before another, in order, until `each` says no.
    pub fn scan(
        &self,
        namespace: &Namespace,
        range: std::ops::Range<u64>,
        mut each: impl FnMut(u64, Stored<'_>) -> Result<bool>,
    ) -> Result<()> {
        let table = self.0.open_table(Tables::of(namespace.number).rows())?;
        for entry in table.range(range)? {
            let (number, bytes) = entry?;
            if !each(number.value(), Stored::read(bytes.value(), namespace.dimensions)?)? {
                break;
            }
        }
        Ok(())
    }

    /// What has changed from a change on: first all that was removed, then all that was put and is still there.
    ///
    /// # Errors
    /// `Index` where the log does not reach back so far.
    pub fn changes(&self, namespace: &Namespace, from: u64, mut each: impl FnMut(Change<'_>) -> Result<()>) -> Result<()> {
        if namespace.logged.is_none_or(|logged| logged > from) {
            return Err(VectorError::Index("what has changed since is not known any more".into()));
        }
        match self.0.open_table(Tables::of(namespace.number).log()) {
            Ok(log) => {
                for entry in log.range(from..)? {
                    each(Change::Removed(entry?.1.value()))?;
                }
            }
            Err(TableError::TableDoesNotExist(_)) => {}
            Err(error) => return Err(error.into()),
        }
        self.scan(namespace, from..u64::MAX, |number, row| each(Change::Put(number, row)).map(|()| true))
    }
}
