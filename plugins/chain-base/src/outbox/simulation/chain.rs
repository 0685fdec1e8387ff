//! The simulated world: what a schedule is drawn with, a disk that fails, and a chain that does not keep what it has.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::super::*;

/// What every intent of the simulation may cost.
pub const CAP: u128 = 1_000_000;

/// xorshift64*: enough to draw schedules, and the same everywhere.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

#[derive(Clone, Copy, PartialEq)]
pub enum Crash {
    BeforeWrite,
    AfterWrite,
}

/// What survives a crash, and what is about to happen to its writes.
#[derive(Default)]
pub struct Disk {
    pub rows: BTreeMap<u64, Row>,
    pub numbers: HashMap<String, u64>,
    pub nonces: BTreeMap<u64, String>,
    pub crash_at: Option<(u64, Crash)>,
    pub writes: u64,
    pub has_crashed: bool,
    pub is_full: bool,
}

#[derive(Clone, Default)]
pub struct Memory(pub Arc<Mutex<Disk>>);

impl Ledger for Memory {
    fn put(&mut self, row: &Row) -> Result<(), LedgerError> {
        let mut disk = self.0.lock();
        let failed = |why: &str| Err(LedgerError::Storage(why.to_owned()));
        if disk.has_crashed {
            return failed("the process is gone");
        }
        if disk.is_full {
            return failed("no space left");
        }
        disk.writes += 1;
        let crash = disk.crash_at.filter(|(at, _)| *at == disk.writes).map(|(_, crash)| crash);
        disk.has_crashed = crash.is_some();
        if crash == Some(Crash::BeforeWrite) {
            return failed("crash before the write");
        }
        let key = row.intent.key.clone();
        if let Some(nonce) = row.nonce {
            let holder = disk.nonces.entry(nonce).or_insert_with(|| key.clone()).clone();
            if holder != key {
                return Err(LedgerError::NonceTaken { nonce, holder, key });
            }
        }
        disk.numbers.insert(key, row.number);
        disk.rows.insert(row.number, row.clone());
        if crash.is_some() { failed("crash after the write") } else { Ok(()) }
    }

    fn row(&self, key: &str) -> Result<Option<Row>, LedgerError> {
        let disk = self.0.lock();
        Ok(disk.numbers.get(key).map(|number| disk.rows[number].clone()))
    }

    fn open_rows(&self) -> Result<Vec<Row>, LedgerError> {
        Ok(self.0.lock().rows.values().filter(|row| !row.state.is_closed()).cloned().collect())
    }

    fn newest(&self, limit: usize) -> Result<Vec<Row>, LedgerError> {
        Ok(self.0.lock().rows.values().rev().take(limit).cloned().collect())
    }

    fn free_nonce(&self, from: u64) -> Result<u64, LedgerError> {
        let disk = self.0.lock();
        Ok((from..).find(|nonce| !disk.nonces.contains_key(nonce)).expect("there are enough numbers"))
    }

    fn first_nonce(&self) -> Result<Option<u64>, LedgerError> {
        Ok(self.0.lock().nonces.keys().min().copied())
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Tx {
    pub hash: Hash,
    pub nonce: u64,
    /// Empty for a foreign one.
    pub key: String,
    pub fees: Fees,
}

impl Tx {
    pub fn new(nonce: u64, key: &str, fees: Fees) -> Self {
        let mut tx = Self { hash: [0; 32], nonce, key: key.to_owned(), fees };
        tx.hash = hash_of(&tx.raw());
        tx
    }

    pub fn raw(&self) -> Vec<u8> {
        let mut raw = self.nonce.to_le_bytes().to_vec();
        raw.extend(self.fees.max_fee.to_le_bytes());
        raw.extend(self.fees.priority_fee.to_le_bytes());
        raw.extend(self.key.as_bytes());
        raw
    }

    pub fn read(raw: &[u8]) -> Self {
        let fee = |at: usize| u128::from_le_bytes(raw[at..at + 16].try_into().unwrap());
        let nonce = u64::from_le_bytes(raw[..8].try_into().unwrap());
        Self::new(nonce, std::str::from_utf8(&raw[40..]).unwrap(), Fees { max_fee: fee(8), priority_fee: fee(24) })
    }
}

pub fn hash_of(bytes: &[u8]) -> Hash {
    let mut hash = [0; 32];
    for (lane, chunk) in hash.chunks_mut(8).enumerate() {
        let start = 0xcbf2_9ce4_8422_2325_u64 ^ (lane as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let sum = bytes.iter().fold(start, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        chunk.copy_from_slice(&(sum ^ (sum >> 29)).to_le_bytes());
    }
    hash
}

pub struct Block {
    pub hash: Hash,
    pub txs: Vec<Tx>,
    pub count_after: u64,
}

pub struct Chain {
    pub blocks: Vec<Block>,
    pub pool: BTreeMap<u64, Tx>,
    pub base_fee: u128,
    pub finalized: u64,
    pub lag_safe: u64,
    pub lag_final: u64,
    pub salt: u64,
    pub has_funds: bool,
    /// Each (transaction, block) that was canonical at some time.
    pub seen: HashSet<(Hash, Hash)>,
}

impl Chain {
    pub fn new(dice: &mut Dice) -> Self {
        let before = dice.below(3);
        let genesis = Block { hash: [1; 32], txs: Vec::new(), count_after: before };
        let lag_safe = 2 + dice.below(20);
        let lag_final = lag_safe + 1 + dice.below(64);
        let (pool, seen) = (BTreeMap::new(), HashSet::new());
        Self { blocks: vec![genesis], pool, base_fee: 1_000, finalized: 0, lag_safe, lag_final, salt: 0, has_funds: true, seen }
    }

    pub fn tip(&self) -> u64 {
        self.blocks.len() as u64 - 1
    }

    pub fn count(&self) -> u64 {
        self.blocks.last().unwrap().count_after
    }

    pub fn at(&self, number: u64) -> BlockRef {
        BlockRef { number, hash: self.blocks[number as usize].hash }
    }

    pub fn mine(&mut self, dice: &mut Dice, limit: u64) {
        self.salt += 1;
        let mut text = self.salt.to_le_bytes().to_vec();
        text.extend(self.blocks.last().unwrap().hash);
        let (hash, mut count, mut txs) = (hash_of(&text), self.count(), Vec::new());
        while (txs.len() as u64) < limit && self.pool.get(&count).is_some_and(|tx| tx.fees.max_fee >= self.base_fee) {
            let tx = self.pool.remove(&count).unwrap();
            self.seen.insert((tx.hash, hash));
            txs.push(tx);
            count += 1;
        }
        self.blocks.push(Block { hash, txs, count_after: count });
        self.pool.retain(|nonce, _| *nonce >= count);
        self.finalized = self.finalized.max(self.tip().saturating_sub(self.lag_final));
        let step = self.base_fee / 8;
        self.base_fee = if dice.percent(50) { (self.base_fee + step).min(CAP / 4) } else { (self.base_fee - step).max(100) };
    }

    pub fn reorg(&mut self, depth: u64, dice: &mut Dice) {
        let depth = depth.min(self.tip() - self.finalized);
        let (keeps, ours_back) = (self.blocks.len() - depth as usize, dice.below(101));
        for block in self.blocks.split_off(keeps) {
            for tx in block.txs {
                if dice.percent(ours_back) {
                    self.pool.insert(tx.nonce, tx);
                }
            }
        }
        if dice.percent(20) {
            self.foreign(dice);
        }
        for _ in 0..dice.below(depth + 3) {
            let limit = dice.below(3);
            self.mine(dice, limit);
        }
    }

    /// Somebody else uses the account's key, at the next nonce.
    pub fn foreign(&mut self, dice: &mut Dice) {
        let fees = Fees { max_fee: CAP * 2, priority_fee: CAP + u128::from(dice.below(1_000)) };
        self.pool.insert(self.count(), Tx::new(self.count(), "", fees));
    }

    pub fn take(&mut self, raw: &[u8]) -> Result<(), SendError> {
        let tx = Tx::read(raw);
        if tx.nonce < self.count() {
            return Err(SendError::NonceTooLow);
        }
        if !self.has_funds {
            return Err(SendError::InsufficientFunds);
        }
        if let Some(old) = self.pool.get(&tx.nonce) {
            if old.hash == tx.hash {
                return Err(SendError::AlreadyKnown);
            }
            let is_dearer = |new: u128, old: u128| new * 100 >= old * 110;
            if !is_dearer(tx.fees.max_fee, old.fees.max_fee) || !is_dearer(tx.fees.priority_fee, old.fees.priority_fee) {
                return Err(SendError::Underpriced);
            }
        } else if tx.fees.max_fee < self.base_fee / 2 {
            return Err(SendError::Underpriced);
        }
        self.pool.insert(tx.nonce, tx);
        Ok(())
    }

    pub fn canonical(&self) -> impl Iterator<Item = (BlockRef, &Tx)> {
        let numbered = self.blocks.iter().enumerate();
        numbered.flat_map(|(number, block)| {
            block.txs.iter().map(move |tx| (BlockRef { number: number as u64, hash: block.hash }, tx))
        })
    }

    pub fn receipt(&self, hashes: &[Hash]) -> Option<Receipt> {
        // A contract's answer may differ from one fork to the other.
        let succeeded = |block: BlockRef, tx: &Tx| (block.hash[0] ^ tx.hash[0]) & 7 != 0;
        let mut ours = self.canonical().filter(|(_, tx)| hashes.contains(&tx.hash));
        ours.next().map(|(block, tx)| Receipt { hash: tx.hash, block, succeeded: succeeded(block, tx), fee: Some(self.base_fee) })
    }

    /// As an endpoint sees it that lags some blocks behind.
    pub fn view(&self, behind: u64) -> View {
        let latest = self.tip().saturating_sub(behind).max(self.finalized);
        let safe = latest.saturating_sub(self.lag_safe).max(latest.min(self.finalized));
        let finalized = latest.saturating_sub(self.lag_final);
        let count = |number: u64| self.blocks[number as usize].count_after;
        let fees = Fees { max_fee: self.base_fee * 2, priority_fee: self.base_fee / 10 };
        let (latest, safe, finalized) = (self.at(latest), self.at(safe), self.at(finalized));
        View { latest, safe, finalized, count: count(latest.number), safe_count: count(safe.number), fees }
    }
}
