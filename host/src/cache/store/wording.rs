//! The questions of the store: which of their vectors a storage plugin still has to be told of, and which it is to forget.

use rusqlite::params;

use super::super::key::Key;
use super::super::likeness::Wording;
use super::Shelf;

impl Shelf {
    /// Questions whose vectors nobody was told of yet, at most so many.
    pub fn to_place(&mut self, most: usize) -> rusqlite::Result<Vec<(Key, Wording)>> {
        let mut waiting =
            self.connection.prepare("SELECT key, space, question, vector FROM questions WHERE placed = 0 LIMIT ?1")?;
        let waiting = waiting.query_map([most as i64], |row| {
            let vector: Vec<u8> = row.get(3)?;
            Ok((Key(row.get(0)?), Wording { space: Key(row.get(1)?), text: row.get(2)?, vector: numbers(&vector) }))
        })?;
        waiting.collect()
    }

    pub fn placed(&mut self, keys: &[Key]) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction()?;
        for key in keys {
            transaction.execute("UPDATE questions SET placed = 1 WHERE key = ?1", [key.0])?;
        }
        transaction.commit()
    }

    /// Vectors that are to be forgotten, each with its space, at most so many.
    pub fn to_forget(&mut self, most: usize) -> rusqlite::Result<Vec<(Key, Key)>> {
        let mut gone = self.connection.prepare("SELECT space, key FROM gone ORDER BY space LIMIT ?1")?;
        let gone = gone.query_map([most as i64], |row| Ok((Key(row.get(0)?), Key(row.get(1)?))))?;
        gone.collect()
    }

    pub fn forgotten(&mut self, space: Key, keys: &[Key]) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction()?;
        for key in keys {
            transaction.execute("DELETE FROM gone WHERE space = ?1 AND key = ?2", params![space.0, key.0])?;
        }
        transaction.commit()
    }
}

pub(super) fn numbers(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).filter_map(|bytes| Some(f32::from_le_bytes(bytes.try_into().ok()?))).collect()
}
