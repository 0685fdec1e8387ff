//! The outbox against a chain that forgets, delays, refuses, withholds and takes blocks back, in schedules drawn from a seed.
//!
//! A failure names its seed; `OUTBOX_SEED=<seed> cargo test --release -p chain-base replay -- --nocapture` runs that schedule alone.
//! The faults that others shipped are put in front of the unchanged machine, one at a time, and every one must be caught.

mod chain;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::mem;
use std::time::Instant;

use self::chain::{CAP, Chain, Crash, Dice, Memory, Tx};
use super::*;

const SCHEDULES: u64 = 10_000;

/// What others shipped, or might have.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// A transaction that an endpoint took counts as mined in the block of the moment.
    SentTakenAsMined,
    /// The dearer transaction asks the chain for the pending nonce.
    EscalationTakesPendingNonce,
    /// After a restart what is open is signed anew, with the next nonce.
    RestartSignsAnew,
    /// What was mined once is believed for ever.
    ReorgIgnored,
    /// A nonce that is used while no receipt is shown counts as used by somebody else.
    NullReceiptTakenAsForeign,
    /// The bytes are sent while the write that keeps them is still to come.
    StoredAfterSending,
}

/// Sits between the machine and the world and rewrites what passes.
#[derive(Default)]
struct Wrap {
    fault: Option<Fault>,
    restarts: u64,
    sent: HashMap<String, (Hash, BlockRef)>,
    mined: HashMap<String, (Receipt, Hash)>,
    signed_anew: HashMap<String, Vec<u8>>,
}

impl Wrap {
    fn action(&mut self, action: Action, chain: &Chain, outbox: &Outbox<Memory>) -> Action {
        let pending = || chain.pool.keys().copied().chain([chain.count().wrapping_sub(1)]).max().unwrap_or(0).wrapping_add(1);
        match (self.fault, action) {
            (Some(Fault::EscalationTakesPendingNonce), Action::Sign { key, id, intent, nonce, fees }) => {
                let is_bound = outbox.row(&key).unwrap().is_some_and(|row| row.nonce.is_some());
                Action::Sign { key, id, intent, nonce: if is_bound { pending() } else { nonce }, fees }
            }
            (Some(Fault::RestartSignsAnew), Action::Broadcast { key, id, raw }) if self.restarts > 0 => {
                let anew = self.signed_anew.entry(key.clone()).or_insert_with(|| {
                    let tx = Tx::read(&raw);
                    Tx::new(pending(), &key, tx.fees).raw()
                });
                Action::Broadcast { key, id, raw: anew.clone() }
            }
            (_, action) => action,
        }
    }

    fn event(&mut self, event: Event, chain: &Chain, outbox: &Outbox<Memory>) -> Event {
        match (self.fault, event) {
            (Some(Fault::SentTakenAsMined), Event::Sent { key, id, outcome }) => {
                if outcome.is_ok() {
                    let hash = outbox.row(&key).unwrap().unwrap().attempts.last().unwrap().hash;
                    self.sent.entry(key.clone()).or_insert((hash, chain.at(chain.tip())));
                }
                Event::Sent { key, id, outcome }
            }
            (Some(Fault::SentTakenAsMined), Event::Looked { key, id, receipt, canonical }) => match self.sent.get(&key) {
                Some((hash, block)) => {
                    let receipt = Receipt { hash: *hash, block: *block, succeeded: true, fee: None };
                    Event::Looked { key, id, receipt: Some(receipt), canonical: Some(block.hash) }
                }
                None => Event::Looked { key, id, receipt, canonical },
            },
            (Some(Fault::ReorgIgnored), Event::Looked { key, id, receipt, canonical }) => {
                let first = self.mined.get(&key).copied().or(receipt.map(|receipt| (receipt, receipt.block.hash)));
                if let Some((receipt, hash)) = first {
                    self.mined.insert(key.clone(), (receipt, hash));
                    return Event::Looked { key, id, receipt: Some(receipt), canonical: Some(hash) };
                }
                Event::Looked { key, id, receipt, canonical }
            }
            (Some(Fault::NullReceiptTakenAsForeign), Event::Found { key, id, .. }) => {
                let view = chain.view(0);
                Event::Found { key, id, used: Some(Used { by: [0xee; 32], block: view.finalized }) }
            }
            (_, event) => event,
        }
    }
}

/// How many faults the schedule threw, to see that none was idle.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    intents: u64,
    mined_final: u64,
    reverted: u64,
    replaced: u64,
    dead: u64,
    escalations: u64,
    reorgs: u64,
    deepest: u64,
    restarts: u64,
    full_disks: u64,
    errors: u64,
    drops: u64,
    foreign: u64,
    withheld: u64,
}

struct World {
    dice: Dice,
    now_ms: u64,
    step: u64,
    is_calm: bool,
    chain: Chain,
    disk: Memory,
    outbox: Outbox<Memory>,
    /// What is under way: when it arrives, and what. An answer dies with the process that waits for it; a transaction does not.
    requests: Vec<(u64, Action)>,
    answers: Vec<(u64, Event)>,
    wrap: Wrap,
    planned: BTreeMap<String, Intent>,
    /// What was ever handed to the network.
    nonce_of: HashMap<String, u64>,
    key_of: HashMap<u64, String>,
    tally: Tally,
    trace: bool,
    /// Only what happens on the chain is judged, not what was said or sent on the way.
    only_effects: bool,
    /// The rows as they were before the last write, for the fault that writes too late.
    late_writes: Option<Row>,
}

fn policy() -> Policy {
    Policy {
        patience_ms: 8_000,
        resend_ms: 6_000,
        query_ms: 1_000,
        answer_ms: 9_000,
        backoff_ms: (500, 8_000),
        max_open: 64,
        max_attempts: 64,
    }
}

impl World {
    fn new(seed: u64, fault: Option<Fault>) -> Self {
        let mut dice = Dice::new(seed);
        let (chain, disk) = (Chain::new(&mut dice), Memory::default());
        let outbox = Outbox::open(disk.clone(), policy()).unwrap();
        Self {
            dice,
            now_ms: 1_000_000,
            step: 0,
            is_calm: false,
            chain,
            disk,
            outbox,
            requests: Vec::new(),
            answers: Vec::new(),
            wrap: Wrap { fault, ..Wrap::default() },
            planned: BTreeMap::new(),
            nonce_of: HashMap::new(),
            key_of: HashMap::new(),
            tally: Tally::default(),
            trace: false,
            only_effects: false,
            late_writes: None,
        }
    }

    fn hit(&mut self, chance: u64) -> bool {
        !self.is_calm && self.dice.percent(chance)
    }

    fn plan(&mut self) {
        let key = format!("intent {}", self.planned.len());
        let deadline_s = self.dice.percent(20).then(|| self.now_ms / 1_000 + 5 + self.dice.below(60));
        let intent =
            Intent { key: key.clone(), to: [2; 20], value: 1, data: vec![3], gas_limit: 21_000, deadline_s, fee_cap: CAP };
        // A host that was not answered asks again with the same key, after a crash too.
        for attempt in 0.. {
            assert!(attempt < 9, "the disk has room again");
            match self.outbox.plan(intent.clone(), self.now_ms) {
                Ok(row) => {
                    assert_eq!(row.intent, intent);
                    break;
                }
                Err(_) => self.recover(),
            }
        }
        if self.dice.percent(30) {
            let again = self.outbox.plan(Intent { fee_cap: 1, ..intent.clone() }, self.now_ms).unwrap();
            assert_eq!(again.intent, intent);
            let other = Intent { value: 2, ..intent.clone() };
            assert!(matches!(self.outbox.plan(other, self.now_ms), Err(OutboxError::KeyTaken { .. })));
        }
        self.planned.insert(key, intent);
        self.tally.intents += 1;
    }

    /// After an error of the disk: where it was a crash, a new process with what is on the disk.
    fn recover(&mut self) {
        let has_crashed = mem::take(&mut self.disk.0.lock().has_crashed);
        self.disk.0.lock().is_full = false;
        if has_crashed {
            self.restart();
        }
    }

    fn restart(&mut self) {
        self.tally.restarts += 1;
        self.wrap.restarts += 1;
        if let Some(row) = self.late_writes.take() {
            let mut disk = self.disk.0.lock();
            disk.nonces.retain(|_, key| *key != row.intent.key);
            disk.rows.insert(row.number, row);
        }
        self.outbox = Outbox::open(self.disk.clone(), policy()).unwrap();
        self.answers.clear();
        // What had left the machine arrives; the rest never does.
        self.requests.retain(|(_, action)| matches!(action, Action::Broadcast { .. }));
    }

    fn step(&mut self) -> Result<(), String> {
        self.step += 1;
        self.now_ms += 200 + self.dice.below(1_500);
        if self.hit(3) {
            let (at, before) = (self.disk.0.lock().writes + 1 + self.dice.below(3), self.dice.percent(50));
            self.disk.0.lock().crash_at = Some((at, if before { Crash::BeforeWrite } else { Crash::AfterWrite }));
        }
        if self.hit(2) {
            self.tally.full_disks += 1;
            self.disk.0.lock().is_full = true;
        } else if self.dice.percent(40) {
            self.disk.0.lock().is_full = false;
        }
        if self.hit(2) {
            self.restart();
        }
        self.weather();
        self.watch()?;
        let due = match self.outbox.due(self.now_ms) {
            Ok(due) => due,
            Err(_) => {
                self.recover();
                return self.check();
            }
        };
        self.told(&due.changes)?;
        if self.disk.0.lock().has_crashed {
            // What had changed before the crash was told; nothing else came of it.
            self.recover();
            return self.check();
        }
        for action in due.actions {
            let action = self.wrap.action(action, &self.chain, &self.outbox);
            let wait = if self.hit(30) { self.dice.below(14_000) } else { self.dice.below(300) };
            self.requests.push((self.now_ms + wait, action));
        }
        self.arrive()?;
        self.check()
    }

    /// Blocks, reorgs, pools that forget, others that use the key.
    fn weather(&mut self) {
        if self.is_calm || self.dice.percent(60) {
            let limit = if self.is_calm { 4 } else { self.dice.below(4) };
            self.chain.mine(&mut self.dice, limit);
        }
        if self.hit(4) {
            let most = if self.dice.percent(50) { 4 } else { 64 };
            let depth = 1 + self.dice.below(most);
            self.tally.reorgs += 1;
            self.tally.deepest = self.tally.deepest.max(depth.min(self.chain.tip() - self.chain.finalized));
            self.chain.reorg(depth, &mut self.dice);
        }
        if self.hit(6) && self.chain.pool.pop_last().is_some() {
            self.tally.drops += 1;
        }
        if self.hit(1) {
            self.tally.foreign += 1;
            self.chain.foreign(&mut self.dice);
        }
        if self.hit(4) {
            self.chain.base_fee = (self.chain.base_fee * 3).min(CAP / 4);
        }
        self.chain.has_funds = self.is_calm || (if self.chain.has_funds { !self.dice.percent(2) } else { self.dice.percent(30) });
        if self.is_calm {
            self.chain.base_fee = self.chain.base_fee.min(2_000);
        }
    }

    fn watch(&mut self) -> Result<(), String> {
        if self.dice.percent(70) {
            let behind = if self.hit(15) { self.dice.below(8) } else { 0 };
            let view = self.chain.view(behind);
            let wait = if self.hit(10) { self.dice.below(5_000) } else { 0 };
            if wait > 0 {
                self.answers.push((self.now_ms + wait, Event::Head(view)));
            } else {
                self.tell(Event::Head(view))?;
            }
        }
        Ok(())
    }

    /// Requests reach the endpoint and answers come back.
    fn arrive(&mut self) -> Result<(), String> {
        let now = self.now_ms + 300;
        let (ready, later) = mem::take(&mut self.requests).into_iter().partition(|(at, _)| *at <= now);
        self.requests = later;
        for (_, action) in ready {
            let Some(event) = self.carry_out(action)? else { continue };
            let wait = if self.hit(20) { self.dice.below(12_000) } else { 0 };
            self.answers.push((self.now_ms + wait, event));
        }
        let (ready, later): (Vec<_>, _) = mem::take(&mut self.answers).into_iter().partition(|(at, _)| *at <= now);
        self.answers = later;
        let mut ready: std::collections::VecDeque<_> = ready.into();
        while let Some((_, event)) = ready.pop_front() {
            let restarts = self.tally.restarts;
            self.tell(event)?;
            if self.tally.restarts != restarts {
                break;
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, action: Action) -> Result<Option<Event>, String> {
        Ok(match action {
            Action::Sign { key, id, nonce, fees, .. } => {
                if self.hit(5) {
                    let forever = self.dice.percent(20);
                    return Ok(Some(Event::Refused { key, id, why: "policy".to_owned(), forever }));
                }
                let tx = Tx::new(nonce, &key, fees);
                Some(Event::Signed { key, id, raw: tx.raw(), hash: tx.hash })
            }
            Action::Broadcast { key, id, raw } => {
                if self.hit(10) {
                    self.tally.errors += 1;
                    let error = if self.dice.percent(50) { SendError::RateLimited } else { SendError::Unreachable };
                    return Ok(Some(Event::Sent { key, id, outcome: Err(error) }));
                }
                let tx = Tx::read(&raw);
                let first = *self.nonce_of.entry(tx.key.clone()).or_insert(tx.nonce);
                if first != tx.nonce && !self.only_effects {
                    return Err(format!("`{}` was sent with the nonces {first} and {}", tx.key, tx.nonce));
                }
                let holder = self.key_of.entry(tx.nonce).or_insert_with(|| tx.key.clone()).clone();
                if holder != tx.key && !self.only_effects {
                    return Err(format!("nonce {} was sent for `{holder}` and `{}`", tx.nonce, tx.key));
                }
                let mut outcome = self.chain.take(&raw);
                if self.hit(6) {
                    // It is out, and the answer is lost.
                    self.tally.errors += 1;
                    outcome = Err(SendError::Unreachable);
                } else if outcome.is_ok() && self.hit(6) {
                    self.tally.drops += 1;
                    self.chain.pool.remove(&tx.nonce);
                }
                Some(Event::Sent { key, id, outcome })
            }
            Action::Look { key, id, hashes, height } => {
                if self.hit(15) {
                    self.tally.errors += 1;
                    return Ok(Some(Event::Failed { key, id }));
                }
                let mut receipt = self.chain.receipt(&hashes);
                let mut canonical = height.and_then(|height| self.chain.blocks.get(height as usize)).map(|block| block.hash);
                if self.hit(12) {
                    self.tally.withheld += u64::from(receipt.is_some());
                    receipt = None;
                }
                if self.hit(5) {
                    canonical = None;
                }
                Some(Event::Looked { key, id, receipt, canonical })
            }
            Action::Find { key, id, nonce } => {
                if self.hit(30) {
                    self.tally.errors += 1;
                    return Ok(Some(Event::Failed { key, id }));
                }
                let found = self.chain.canonical().find(|(_, tx)| tx.nonce == nonce);
                let used = found.map(|(block, tx)| Used { by: tx.hash, block });
                let used = if self.hit(20) { None } else { used };
                Some(Event::Found { key, id, used })
            }
        })
    }

    fn tell(&mut self, event: Event) -> Result<(), String> {
        let event = self.wrap.event(event, &self.chain, &self.outbox);
        if self.trace {
            println!("{:4} {event:?}", self.step);
        }
        let before = match (&event, self.wrap.fault) {
            (Event::Signed { key, .. }, Some(Fault::StoredAfterSending)) => self.outbox.row(key).unwrap(),
            _ => None,
        };
        if let Some(row) = before.filter(|row| row.nonce.is_none()) {
            self.late_writes = Some(row);
        } else if self.dice.percent(20) {
            self.late_writes = None;
        }
        match self.outbox.on(self.now_ms, event) {
            Ok(changes) => self.told(&changes),
            Err(_) => {
                self.recover();
                Ok(())
            }
        }
    }

    /// What the host is told was true at some time, and what it is told is final is true.
    fn told(&mut self, changes: &[Change]) -> Result<(), String> {
        if self.only_effects {
            return Ok(());
        }
        for Change { row, .. } in changes {
            self.tally.escalations += u64::from(row.attempts.len() > 1 && row.state == State::Signed);
            let key = &row.intent.key;
            let is_final = |block: BlockRef| block.number <= self.chain.finalized && self.chain.at(block.number) == block;
            match &row.state {
                State::Mined(receipt) | State::Safe(receipt)
                    if !self.chain.seen.contains(&(receipt.hash, receipt.block.hash)) =>
                {
                    return Err(format!("`{key}` is told as mined in a block that never held it"));
                }
                State::Final(receipt) | State::Reverted(receipt)
                    if !is_final(receipt.block) || !same(&self.chain.receipt(&[receipt.hash]), receipt) =>
                {
                    return Err(format!("`{key}` is told as final and is not"));
                }
                State::Replaced { used, settled: true } => {
                    let holder = self.chain.canonical().find(|(_, tx)| Some(tx.nonce) == row.nonce);
                    if !is_final(used.block) || holder.map(|(block, tx)| (block, tx.hash)) != Some((used.block, used.by)) {
                        return Err(format!("`{key}` is told as replaced for ever and is not"));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        let open: Vec<Row> = self.outbox.open_rows().into_iter().map(|change| change.row).collect();
        if self.late_writes.is_none() && open != self.disk.open_rows().unwrap() {
            return Err("memory and disk differ".to_owned());
        }
        let mut carried_out = HashSet::new();
        for (_, tx) in self.chain.canonical().filter(|(_, tx)| !tx.key.is_empty()) {
            if !carried_out.insert(&tx.key) {
                return Err(format!("`{}` is in the chain twice", tx.key));
            }
        }
        Ok(())
    }

    /// Nothing disturbs any more: every intent must come to its end, and the ledger must say of each what the chain says.
    fn settle(&mut self) -> Result<(), String> {
        self.is_calm = true;
        {
            let mut disk = self.disk.0.lock();
            (disk.crash_at, disk.is_full) = (None, false);
        }
        for round in 0..1_200 {
            self.step()?;
            let open = self.outbox.open_rows();
            if open.is_empty() {
                break;
            }
            let is_gap = open.iter().any(|change| change.stuck == Some(Stuck::NonceGap));
            if is_gap && round % 50 == 49 && !open.iter().any(|change| change.row.nonce.is_none()) {
                self.plan();
            }
        }
        for key in self.planned.keys() {
            let row = self.disk.row(key).unwrap().ok_or(format!("`{key}` is not in the ledger"))?;
            let hashes: Vec<Hash> = row.attempts.iter().map(|attempt| attempt.hash).collect();
            let truth = self.chain.receipt(&hashes);
            let in_chain = self.chain.canonical().filter(|(_, tx)| tx.key == *key).count();
            let is_true = match &row.state {
                State::Final(receipt) => in_chain == 1 && receipt.succeeded && same(&truth, receipt),
                State::Reverted(receipt) => in_chain == 1 && !receipt.succeeded && same(&truth, receipt),
                State::Replaced { used, settled: true } => {
                    let holder = self.chain.canonical().find(|(_, tx)| Some(tx.nonce) == row.nonce);
                    in_chain == 0
                        && holder.is_some_and(|(block, tx)| tx.key.is_empty() && (tx.hash, block) == (used.by, used.block))
                }
                State::Dead { .. } => in_chain == 0 && row.nonce.is_none() && !self.nonce_of.contains_key(key),
                state => return Err(format!("`{key}` was lost: it is still {state:?}")),
            };
            if !is_true {
                return Err(format!("`{key}` is {:?}, and the chain has it {in_chain} times: {truth:?}", row.state));
            }
            let count = match row.state {
                State::Final(_) => &mut self.tally.mined_final,
                State::Reverted(_) => &mut self.tally.reverted,
                State::Replaced { .. } => &mut self.tally.replaced,
                _ => &mut self.tally.dead,
            };
            *count += 1;
        }
        Ok(())
    }
}

/// What a transaction cost is not part of what the simulated chain remembers.
fn same(truth: &Option<Receipt>, told: &Receipt) -> bool {
    truth.is_some_and(|truth| (truth.hash, truth.block, truth.succeeded) == (told.hash, told.block, told.succeeded))
}

fn schedule(seed: u64, fault: Option<Fault>, only_effects: bool, trace: bool) -> Result<Tally, String> {
    let mut world = World::new(seed, fault);
    (world.only_effects, world.trace) = (only_effects, trace);
    let (steps, intents) = (60 + world.dice.below(120), 1 + world.dice.below(6));
    for _ in 0..steps {
        if (world.planned.len() as u64) < intents && world.dice.percent(15) {
            world.plan();
        }
        world.step()?;
    }
    world.settle()?;
    Ok(world.tally)
}

/// Runs schedules until one fails, on both of a small machine's cores.
fn first_failure(seeds: u64, fault: Option<Fault>, only_effects: bool) -> (Tally, Option<(u64, String)>) {
    let run = |from: u64| {
        let mut sum = Tally::default();
        for seed in (from..seeds).step_by(2) {
            match schedule(seed, fault, only_effects, false) {
                Ok(tally) => sum = sum.with(tally),
                Err(why) => return (sum, Some((seed, why))),
            }
        }
        (sum, None)
    };
    std::thread::scope(|scope| {
        let odd = scope.spawn(|| run(1));
        let (sum, failure) = run(0);
        let (other_sum, other_failure) = odd.join().unwrap();
        (sum.with(other_sum), failure.or(other_failure))
    })
}

impl Tally {
    fn with(self, other: Tally) -> Tally {
        Tally {
            intents: self.intents + other.intents,
            mined_final: self.mined_final + other.mined_final,
            reverted: self.reverted + other.reverted,
            replaced: self.replaced + other.replaced,
            dead: self.dead + other.dead,
            escalations: self.escalations + other.escalations,
            reorgs: self.reorgs + other.reorgs,
            deepest: self.deepest.max(other.deepest),
            restarts: self.restarts + other.restarts,
            full_disks: self.full_disks + other.full_disks,
            errors: self.errors + other.errors,
            drops: self.drops + other.drops,
            foreign: self.foreign + other.foreign,
            withheld: self.withheld + other.withheld,
        }
    }
}

#[test]
fn in_ten_thousand_schedules_nothing_is_lost_and_nothing_is_done_twice() {
    let start = Instant::now();
    let (tally, failure) = first_failure(SCHEDULES, None, false);
    if let Some((seed, why)) = failure {
        panic!("seed {seed}: {why}\nreplay: OUTBOX_SEED={seed} cargo test --release -p chain-base replay -- --nocapture");
    }
    println!("{SCHEDULES} schedules in {:.1?}: {tally:?}", start.elapsed());
    // A schedule that never throws a fault shows nothing.
    for count in [tally.mined_final, tally.reverted, tally.replaced, tally.dead, tally.escalations, tally.withheld, tally.foreign]
    {
        assert!(count > 100, "{tally:?}");
    }
    assert_eq!(tally.deepest, 64);
}

#[test]
fn every_fault_that_others_shipped_is_caught() {
    for fault in [
        Fault::SentTakenAsMined,
        Fault::EscalationTakesPendingNonce,
        Fault::RestartSignsAnew,
        Fault::ReorgIgnored,
        Fault::NullReceiptTakenAsForeign,
        Fault::StoredAfterSending,
    ] {
        // Once by any rule, and once by what became of the money alone: the rules are not stricter than their purpose.
        for only_effects in [false, true] {
            let (_, failure) = first_failure(1_000, Some(fault), only_effects);
            let (seed, why) = failure.unwrap_or_else(|| panic!("{fault:?} passes 1,000 schedules, only effects: {only_effects}"));
            println!("{fault:?}: caught at seed {seed}: {why}");
        }
    }
}

#[test]
fn replay() {
    if let Ok(seed) = std::env::var("OUTBOX_SEED") {
        schedule(seed.parse().unwrap(), None, false, true).unwrap();
    }
}
