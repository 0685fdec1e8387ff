use parking_lot::Mutex;
use tokio::sync::broadcast::Receiver;

use super::super::{Policy, RedbLedger, State};
use super::*;

/// A chain with one block per look at it, whose transactions are the bytes `[nonce, ...]`.
#[derive(Default)]
struct Small {
    blocks: Mutex<Vec<Vec<Vec<u8>>>>,
    pool: Mutex<Vec<Vec<u8>>>,
    sent: Mutex<Vec<Vec<u8>>>,
    /// How many calls fail before one succeeds.
    failing: Mutex<u32>,
    hides_receipts: bool,
    signed: Mutex<Vec<(String, u64)>>,
}

fn hash(of: &[u8]) -> Hash {
    let mut hash = [0; 32];
    hash[..of.len()].copy_from_slice(of);
    hash
}

fn block(number: u64) -> BlockRef {
    BlockRef { number, hash: [number as u8; 32] }
}

impl Small {
    fn fails(&self) -> Result<(), RpcError> {
        let mut failing = self.failing.lock();
        *failing = failing.saturating_sub(1);
        if *failing > 0 { Err(RpcError("429".to_owned())) } else { Ok(()) }
    }

    fn count(&self, up_to: usize) -> u64 {
        self.blocks.lock().iter().take(up_to + 1).map(|block| block.len() as u64).sum()
    }
}

#[async_trait]
impl Rpc for Small {
    async fn view(&self) -> Result<View, RpcError> {
        self.fails()?;
        let mined = std::mem::take(&mut *self.pool.lock());
        self.blocks.lock().push(mined);
        let latest = self.blocks.lock().len() - 1;
        let (safe, finalized) = (latest.saturating_sub(2), latest.saturating_sub(4));
        let fees = Fees { max_fee: 100, priority_fee: 1 };
        let (count, safe_count) = (self.count(latest), self.count(safe));
        Ok(View {
            latest: block(latest as u64),
            safe: block(safe as u64),
            finalized: block(finalized as u64),
            count,
            safe_count,
            fees,
        })
    }

    async fn send_raw(&self, raw: &[u8]) -> Result<(), SendError> {
        self.sent.lock().push(raw.to_vec());
        self.fails().map_err(|_| SendError::RateLimited)?;
        let is_known = self.blocks.lock().iter().flatten().any(|mined| mined[0] == raw[0]);
        let is_pending = self.pool.lock().iter().any(|pending| pending[0] == raw[0]);
        if is_known || is_pending {
            return Err(if is_known { SendError::NonceTooLow } else { SendError::AlreadyKnown });
        }
        self.pool.lock().push(raw.to_vec());
        Ok(())
    }

    async fn receipt(&self, of: Hash) -> Result<Option<Receipt>, RpcError> {
        self.fails()?;
        let at = self.blocks.lock().iter().position(|block| block.iter().any(|mined| hash(mined) == of));
        let at = at.filter(|_| !self.hides_receipts);
        Ok(at.map(|at| Receipt { hash: of, block: block(at as u64), succeeded: true, fee: Some(7) }))
    }

    async fn block_hash(&self, number: u64) -> Result<Option<Hash>, RpcError> {
        self.fails()?;
        Ok(Some(block(number).hash).filter(|_| number < self.blocks.lock().len() as u64))
    }

    async fn count_at(&self, number: u64) -> Result<u64, RpcError> {
        Ok(self.count(number as usize))
    }

    async fn sent_in(&self, number: u64) -> Result<(Hash, Vec<(u64, Hash)>), RpcError> {
        let sent = self.blocks.lock()[number as usize].iter().map(|raw| (u64::from(raw[0]), hash(raw))).collect();
        Ok((block(number).hash, sent))
    }
}

#[async_trait]
impl Signer for Small {
    async fn sign(&self, intent: &Intent, nonce: u64, fees: Fees) -> Result<(Vec<u8>, Hash), Refused> {
        if intent.value == 0 {
            return Err(Refused { why: "nothing is worth nothing".to_owned(), forever: true });
        }
        self.signed.lock().push((intent.key.clone(), nonce));
        let raw = vec![nonce as u8, fees.max_fee as u8, intent.key.len() as u8, 1];
        Ok((raw.clone(), hash(&raw)))
    }
}

fn intent(key: &str, value: u128) -> Intent {
    Intent { key: key.to_owned(), to: [1; 20], value, data: vec![], gas_limit: 21_000, deadline_s: None, fee_cap: 1_000 }
}

fn start(path: &std::path::Path, chain: &Arc<Small>) -> Driver {
    let policy = Policy { resend_ms: 50, query_ms: 2, backoff_ms: (2, 20), ..Policy::default() };
    let outbox = Outbox::open(RedbLedger::open(path, "test").unwrap(), policy).unwrap();
    let (short, long) = (Duration::from_millis(3), Duration::from_millis(20));
    let pace = Pace { head: short, head_backoff: long, tick: short, ..Pace::default() };
    Driver::start(outbox, chain.clone(), chain.clone(), pace)
}

async fn wait_for(changes: &mut Receiver<Change>, key: &str, is_it: impl Fn(&State) -> bool) -> Row {
    let found = async {
        loop {
            let change = changes.recv().await.unwrap();
            if change.row.intent.key == key && is_it(&change.row.state) {
                return change.row;
            }
        }
    };
    timeout(Duration::from_secs(60), found).await.expect("the change comes")
}

#[tokio::test]
async fn an_intent_is_carried_through_errors_to_its_final_block() {
    let directory = tempfile::tempdir().unwrap();
    let chain = Arc::new(Small { failing: Mutex::new(12), ..Small::default() });
    let driver = start(&directory.path().join("outbox.redb"), &chain);
    let mut changes = driver.changes();
    driver.plan(intent("first", 1)).await.unwrap();
    driver.plan(intent("refused", 0)).await.unwrap();
    driver.plan(intent("second", 1)).await.unwrap();
    let other = driver.plan(intent("second", 9)).await;
    assert!(matches!(other, Err(DriverError::Outbox(OutboxError::KeyTaken { .. }))));
    let row = wait_for(&mut changes, "second", |state| matches!(state, State::Final(_))).await;
    assert_eq!(row.nonce, Some(1), "a refused intent leaves no gap");
    assert!(matches!(driver.row("refused".to_owned()).await.unwrap().unwrap().state, State::Dead { .. }));
    assert_eq!(driver.newest(2).await.unwrap().len(), 2);
    driver.stop().await;
    assert_eq!(chain.blocks.lock().iter().flatten().count(), 2);
    assert_eq!(*chain.signed.lock(), [("first".to_owned(), 0), ("second".to_owned(), 1)]);
}

#[tokio::test]
async fn the_next_process_sends_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("outbox.redb");
    let chain = Arc::new(Small::default());
    let driver = start(&path, &chain);
    let mut changes = driver.changes();
    driver.plan(intent("only", 1)).await.unwrap();
    wait_for(&mut changes, "only", |state| *state == State::Signed).await;
    driver.stop().await;
    // The pool forgets, and so do the blocks.
    chain.pool.lock().clear();
    chain.blocks.lock().clear();

    let driver = start(&path, &chain);
    let mut changes = driver.changes();
    wait_for(&mut changes, "only", |state| matches!(state, State::Final(_))).await;
    driver.stop().await;
    assert_eq!(chain.signed.lock().len(), 1, "nothing was signed anew");
    assert!(chain.sent.lock().windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(chain.blocks.lock().iter().flatten().count(), 1);
}

#[tokio::test]
async fn a_foreign_transaction_is_found_in_its_block() {
    let directory = tempfile::tempdir().unwrap();
    let foreign = vec![0, 255, 255, 255];
    let chain = Arc::new(Small { pool: Mutex::new(vec![]), ..Small::default() });
    let driver = start(&directory.path().join("outbox.redb"), &chain);
    let mut changes = driver.changes();
    driver.plan(intent("late", 1)).await.unwrap();
    let row = wait_for(&mut changes, "late", |state| *state == State::Signed).await;
    assert_eq!(row.nonce, Some(0));
    // Whatever was sent has lost against somebody else's.
    chain.pool.lock().clear();
    for block in chain.blocks.lock().iter_mut() {
        block.clear();
    }
    chain.blocks.lock().push(vec![foreign.clone()]);
    let is_settled = |state: &State| matches!(state, State::Replaced { settled: true, .. });
    let row = wait_for(&mut changes, "late", is_settled).await;
    let State::Replaced { used, .. } = row.state else { unreachable!("it was waited for") };
    assert_eq!(used.by, hash(&foreign));
    driver.stop().await;
}

#[tokio::test]
async fn a_withheld_receipt_is_not_a_foreign_transaction() {
    let chain = Arc::new(Small { hides_receipts: true, ..Small::default() });
    let ours = vec![0, 100, 4, 1];
    chain.blocks.lock().extend([vec![], vec![ours.clone()], vec![], vec![]]);
    let hands = Hands { rpc: chain.clone(), signer: chain.clone(), slots: Arc::new(Semaphore::new(1)), pace: Pace::default() };
    let used = hands.find(0).await.unwrap();
    assert_eq!(used, Some(Used { by: hash(&ours), block: block(1) }));
    assert_eq!(hands.find(1).await.unwrap(), None);
}
