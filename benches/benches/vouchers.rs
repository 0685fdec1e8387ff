//! What does it cost a node to take a voucher: to check who has signed it, and to have it on disk before more is delivered?
//!
//! Load: vouchers of one session, each a little higher, one at a time, and of 16 sessions at the same time. The chain plugin recovers the
//! signer, the journal commits and waits for the disk. The floor is what the disk takes for the least that would do: 512 bytes appended to a
//! file, and `fdatasync`. In turns, in one run, in the same folder.
//!
//! `make bench` runs it.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fabstir_benches::table::{Rounds, bar, print_machine};
use fabstir_benches::{cx, library, runtime};
use fabstir_host::market::Journal;
use fabstir_host::market::journal::sessions::{self, SessionRow, SessionState};
use fabstir_host::supervisor::Connected;
use fabstir_plugin_api::chain::{Amount, Chain, Signature, Terms, Voucher};
use fabstir_plugin_api::interface::Interface;
use fabstir_plugin_api::plugin::{Configure, Plugin};
use fabstir_plugin_api::transport::PeerId;
use k256::ecdsa::SigningKey;
use sha3::{Digest, Keccak256};

const ROUNDS: usize = 500;
const AT_ONCE: usize = 16;
/// Tokens that one voucher pays for where the node's defaults stand: a quarter of its credit.
const TOKENS: f64 = 64.0;

struct Subjects {
    chain: Arc<dyn Chain>,
    journal: Journal,
    file: File,
    key: SigningKey,
    _open: Connected,
}

fn hash(number: usize) -> String {
    format!("0x{number:064x}")
}

fn account(digit: &str) -> String {
    format!("0x{}", digit.repeat(40))
}

impl Subjects {
    async fn new(folder: &std::path::Path) -> Self {
        let connected = Connected::in_process(&library("chain-base"), "base").expect("the plugin opens");
        let config = serde_json::json!({
            // Nobody is asked: what a voucher needs, the plugin knows.
            "rpc": ["http://127.0.0.1:9"],
            "chain_id": 31337,
            "contracts": { "escrow": account("1"), "nodes": account("2"), "models": account("3"), "proofs": account("4") },
        });
        let configure = Configure {
            instance: "base".into(),
            state_dir: folder.to_owned(),
            config: config.to_string(),
            log_level: "error".into(),
        };
        let plugin = <dyn Plugin as Interface>::client(connected.session.clone());
        plugin.configure(&cx(), configure).await.expect("the plugin takes its configuration");
        let subjects = Self {
            chain: <dyn Chain as Interface>::client(connected.session.clone()),
            journal: Journal::open(folder).expect("the journal opens"),
            file: File::create(folder.join("floor")).expect("a file can be made"),
            key: SigningKey::from_slice(&[7; 32]).expect("a key"),
            _open: connected,
        };
        for session in 0..AT_ONCE {
            let (voucher, signature) = subjects.signed(session, 0).await;
            let terms = Terms {
                host: account("5"),
                client: account("6"),
                model: hash(9),
                coin: account("0"),
                price_input_per_mtok: Amount(1),
                price_output_per_mtok: Amount(1),
                expires_s: 1,
                settle_window_s: 1,
                valid_until_s: 1,
                nonce: hash(session),
            };
            let row = SessionRow {
                terms,
                peer: PeerId("peer".into()),
                deposit: Amount(u128::MAX),
                state: SessionState::Open,
                voucher,
                signature,
                exposed: Amount(0),
                paid: None,
                why: None,
                opened_ms: 0,
                changed_ms: 0,
            };
            subjects.journal.write(move |transaction| sessions::fund(transaction, &row)).await.expect("the journal writes");
        }
        subjects
    }

    async fn signed(&self, session: usize, amount: u128) -> (Voucher, Signature) {
        let (session, host, transcript) = (hash(session), account("5"), hash(1));
        let voucher =
            Voucher { session, host, amount: Amount(amount), input_tokens: 0, output_tokens: amount as u64, transcript };
        let payload = self.chain.voucher_payload(&cx(), voucher.clone()).await.expect("a payload");
        let (signature, id) = self.key.sign_prehash_recoverable(&Keccak256::digest(&payload)).expect("signs");
        (voucher, [&signature.to_bytes()[..], &[27 + u8::from(id.is_y_odd())]].concat())
    }

    fn floor(&mut self) -> Duration {
        let began = Instant::now();
        self.file.write_all(&[7; 512]).expect("the disk has room");
        self.file.sync_data().expect("the disk works");
        began.elapsed()
    }

    async fn check(&self, (voucher, signature): &(Voucher, Signature)) -> Duration {
        let began = Instant::now();
        let payload = self.chain.voucher_payload(&cx(), voucher.clone()).await.expect("a payload");
        self.chain.signer(&cx(), payload, signature.clone()).await.expect("a signer");
        began.elapsed()
    }

    async fn take(&self, signed: (Voucher, Signature)) -> Duration {
        let began = Instant::now();
        self.check(&signed).await;
        let (voucher, signature) = signed;
        let kept = self.journal.write(move |transaction| sessions::pay(transaction, &voucher, &signature));
        kept.await.expect("the journal writes");
        began.elapsed()
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn main() {
    // Where the node's data would be: a folder of the disk, not of memory.
    let folder = tempfile::tempdir_in(std::env::current_dir().expect("a folder")).expect("a folder can be made");
    print_machine();
    runtime().block_on(async {
        let mut subjects = Subjects::new(folder.path()).await;
        let names = ["floor: write, fdatasync", "check the signer", "check, and on disk", "16 at a time, each"];
        let mut rounds = Rounds::new("Taking a voucher", "ms", &names);
        for round in 1..=ROUNDS {
            let amount = round as u128 * 2;
            let signed = subjects.signed(0, amount).await;
            rounds.add(0, ms(subjects.floor()));
            rounds.add(1, ms(subjects.check(&signed).await));
            rounds.add(2, ms(subjects.take(signed).await));
            let many = futures::future::join_all((0..AT_ONCE).map(|session| subjects.signed(session, amount + 1))).await;
            let taken = futures::future::join_all(many.into_iter().map(|signed| subjects.take(signed))).await;
            rounds.add(3, ms(taken.into_iter().max().expect("there are some")));
        }
        rounds.print();
        bar("a voucher checked and on disk, p95 in ms", rounds.percentile(2, 0.95), 2.0, true);
        let check = rounds.median(1);
        for speed in [30.0, 250.0, 1500.0] {
            let share = check / (TOKENS / speed * 1e3 + check);
            println!(
                "  at {speed:>4} tokens/s a voucher comes every {:>6.1} ms: its check takes {:.3} %",
                TOKENS / speed * 1e3,
                share * 1e2
            );
        }
    });
}
