//! What the store knows of the packs that nodes share, and which of its answers go into the next one.

use std::collections::{BTreeMap, BTreeSet};

use fabstir_plugin_api::inference::Chunk;
use rusqlite::params;

use super::super::Entry;
use super::super::key::Key;
use super::super::likeness::Wording;
use super::super::shared::{Erased, Listed};
use super::{Fresh, Shelf, integer};
use crate::clock::now_ms;

/// A node's part in what is shared.
#[derive(Debug, Default)]
pub(in super::super) struct Part {
    /// Of the newest list that this node has seen.
    pub revision: u64,
    /// The list that this node has made.
    pub own_list: Option<String>,
    pub own: BTreeMap<String, Listed>,
    /// Packs of other nodes that this one has read.
    pub read: BTreeSet<String>,
    /// Own packs whose blobs are to be deleted.
    pub dropped: Vec<String>,
    pub erased: Erased,
}

impl Shelf {
    /// Reads it, and drops own packs that are out of date, or hold what was erased since they were made.
    pub fn part(&mut self) -> rusqlite::Result<Part> {
        let now = integer(now_ms());
        let transaction = self.connection.transaction()?;
        transaction.execute("DELETE FROM packs WHERE own = 0 AND until_ms < ?1", [now])?;
        transaction.execute(
            "UPDATE packs SET dropped = 1 WHERE own = 1 AND (until_ms < ?1
               OR made_ms <= (SELECT coalesce(max(at_ms), 0) FROM erasures))",
            [now],
        )?;
        // What lives on goes into a new one.
        transaction
            .execute("UPDATE entries SET pack = NULL WHERE pack IN (SELECT id FROM packs WHERE own = 1 AND dropped = 1)", [])?;
        transaction.commit()?;

        let mut part = Part::default();
        (part.revision, part.own_list) = self.connection.query_row("SELECT revision, own FROM listed", [], |row| {
            Ok((row.get::<_, i64>(0)? as u64, row.get::<_, Option<String>>(1)?))
        })?;
        let mut packs = self.connection.prepare("SELECT id, size, made_ms, until_ms, own, dropped FROM packs")?;
        let mut rows = packs.query([])?;
        while let Some(row) = rows.next()? {
            let number = |column| row.get::<_, i64>(column).map(|number| number as u64);
            let id: String = row.get(0)?;
            match (row.get::<_, bool>(4)?, row.get::<_, bool>(5)?) {
                (false, _) => drop(part.read.insert(id)),
                (true, true) => part.dropped.push(id),
                (true, false) => {
                    part.own.insert(id, Listed { size: number(1)?, made_ms: number(2)?, until_ms: number(3)? });
                }
            }
        }
        let mut erased = self.connection.prepare("SELECT tenant, max(at_ms) FROM erasures GROUP BY tenant")?;
        let erased = erased.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)))?;
        part.erased = erased.collect::<rusqlite::Result<_>>()?;
        Ok(part)
    }

    /// Drops own packs of less than `small` bytes, if there are more than `most` of them: what they hold goes into fewer.
    pub fn merge_packs(&mut self, small: u64, most: usize) -> rusqlite::Result<()> {
        let few = "SELECT count(*) FROM packs WHERE own = 1 AND dropped = 0 AND size < ?1";
        if self.connection.query_row(few, [integer(small)], |row| row.get::<_, i64>(0))? as usize > most {
            self.connection.execute("UPDATE packs SET dropped = 1 WHERE own = 1 AND size < ?1", [integer(small)])?;
        }
        Ok(())
    }

    /// Answers that are in no pack, the newest first, of about `most` bytes in all.
    pub fn unshared(&mut self, most: u64) -> rusqlite::Result<Vec<Fresh>> {
        let mut unshared = self.connection.prepare(
            "SELECT key, tenant, model, plugin, stored_ms, bytes, chunks, hash, space, question, vector
               FROM entries JOIN answers USING (key) LEFT JOIN questions USING (key)
              WHERE pack IS NULL ORDER BY stored_ms DESC",
        )?;
        let mut rows = unshared.query([])?;
        let (mut answers, mut bytes) = (Vec::new(), 0);
        while bytes < most
            && let Some(row) = rows.next()?
        {
            bytes += row.get::<_, i64>(5)? as u64;
            let (chunks, hash): (Vec<u8>, Vec<u8>) = (row.get(6)?, row.get(7)?);
            let whole = blake3::hash(&chunks).as_bytes() == hash.as_slice();
            // One that has changed on the disk is found out, and removed, when it is looked for.
            let Some(chunks) = rmp_serde::from_slice::<Vec<Chunk>>(&chunks).ok().filter(|_| whole) else { continue };
            let wording = match row.get::<_, Option<[u8; 32]>>(8)? {
                None => None,
                Some(space) => {
                    let vector: Vec<u8> = row.get(10)?;
                    Some(Wording { space: Key(space), text: row.get(9)?, vector: super::wording::numbers(&vector) })
                }
            };
            let entry = Entry { plugin: row.get(3)?, stored_ms: row.get::<_, i64>(4)? as u64, chunks };
            answers.push(Fresh { key: Key(row.get(0)?), tenant: row.get(1)?, model: row.get(2)?, entry, wording });
        }
        Ok(answers)
    }

    /// Notes a pack of this node's.
    pub fn packed(&mut self, id: &str, listed: Listed, keys: &[Key]) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction()?;
        let Listed { size, made_ms, until_ms } = listed;
        transaction.execute(
            "INSERT OR REPLACE INTO packs VALUES (?1, ?2, ?3, ?4, 1, 0)",
            params![id, integer(size), integer(made_ms), integer(until_ms)],
        )?;
        for key in keys {
            transaction.execute("UPDATE entries SET pack = ?2 WHERE key = ?1 AND pack IS NULL", params![key.0, id])?;
        }
        transaction.commit()
    }

    /// Keeps the answers of another node's pack, save what is here already, too old or erased. Says how many that were.
    pub fn take_in(&mut self, id: &str, listed: Listed, answers: Vec<Fresh>) -> rusqlite::Result<u64> {
        let (now, mut taken) = (now_ms(), 0);
        let oldest = now.saturating_sub(self.ttl.as_millis() as u64);
        for mut fresh in answers {
            // A clock that is ahead is not to keep it for longer.
            fresh.entry.stored_ms = fresh.entry.stored_ms.min(now);
            let stored_ms = integer(fresh.entry.stored_ms);
            let whole = matches!(fresh.entry.chunks.last(), Some(Chunk::Done(_)));
            let unwanted = "SELECT EXISTS (SELECT 1 FROM entries WHERE key = ?1 AND stored_ms >= ?2)
                OR EXISTS (SELECT 1 FROM erasures WHERE (tenant IS NULL OR tenant = ?3) AND at_ms >= ?2)";
            let unwanted = self
                .connection
                .query_row(unwanted, params![fresh.key.0, stored_ms, fresh.tenant], |row| row.get::<_, bool>(0))?;
            if whole && !unwanted && fresh.entry.stored_ms >= oldest {
                self.keep(&fresh, Some(id))?;
                taken += 1;
            }
        }
        let Listed { size, made_ms, until_ms } = listed;
        self.connection.execute(
            "INSERT OR IGNORE INTO packs VALUES (?1, ?2, ?3, ?4, 0, 0)",
            params![id, integer(size), integer(made_ms), integer(until_ms)],
        )?;
        Ok(taken)
    }

    /// Erases what was erased on another node.
    pub fn erase_too(&mut self, erased: &Erased) -> rusqlite::Result<()> {
        for (tenant, at_ms) in erased {
            let known = "SELECT EXISTS (SELECT 1 FROM erasures WHERE tenant IS ?1 AND at_ms >= ?2)";
            if !self.connection.query_row(known, params![tenant, integer(*at_ms)], |row| row.get::<_, bool>(0))? {
                super::erase(&self.connection, tenant.as_deref(), *at_ms)?;
            }
        }
        Ok(())
    }

    /// Notes the list that is in force; `own` is its id where this node has made it.
    pub fn listed(&mut self, revision: u64, own: Option<&str>) -> rusqlite::Result<()> {
        self.connection.execute(
            "UPDATE listed SET revision = max(revision, ?1), own = coalesce(?2, own)",
            params![integer(revision), own],
        )?;
        Ok(())
    }

    /// The blob of a pack is deleted.
    pub fn forget_pack(&mut self, id: &str) -> rusqlite::Result<()> {
        self.connection.execute("DELETE FROM packs WHERE id = ?1", [id]).map(drop)
    }
}
