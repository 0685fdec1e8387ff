//! Posted jobs from outside: what a client sends to the contract, and what the contract then holds. Spoken to the development chain
//! directly, so that a test of the node does not lean on the node's own client.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha3::{Digest, Keccak256};

use crate::dev_chain::DevChain;
use crate::market::Account;
use crate::{LIMIT, eventually};

const POST: &str = "postJob((bytes32,address,uint128,uint128,uint128,uint64,uint64,uint64,uint64,uint64,uint64,uint64,uint8,uint128,\
                    uint128,uint8,bytes32,address),bytes32,string)";

/// Requests that are sent to the chain together: it may carry out those of a batch in any order, and lose its place among their nonces.
const BATCH: usize = 1;

/// What a client asks for.
#[derive(Debug, Clone)]
pub struct Job {
    /// 64 hexadecimal digits: the digest of the model's file.
    pub digest: String,
    pub max_amount: u128,
    pub price_in: u128,
    pub price_out: u128,
    pub max_in: u64,
    pub max_out: u64,
    /// From now.
    pub claim_secs: u64,
    pub deliver_secs: u64,
    pub challenge_secs: u64,
    pub attempts: u8,
    pub bond: u128,
    pub proof_kind: u8,
    pub prompt: String,
    /// Whether the commitment is of the input.
    pub is_honest: bool,
}

impl Job {
    /// One that pays what [`crate::market::PRICES`] asks.
    pub fn of(digest: &str, prompt: &str) -> Self {
        Self {
            digest: digest.to_owned(),
            max_amount: 5_000_000_000_000_000,
            price_in: 1_000_000_000_000_000_000,
            price_out: 4_000_000_000_000_000_000,
            max_in: 64,
            max_out: 64,
            claim_secs: 600,
            deliver_secs: 600,
            challenge_secs: 600,
            attempts: 1,
            bond: 1_000_000_000_000_000,
            proof_kind: 0,
            prompt: prompt.to_owned(),
            is_honest: true,
        }
    }

    fn call(&self, now_s: u64) -> String {
        let document = json!({ "messages": [{ "role": "user", "content": self.prompt }], "temperature": 0.0 }).to_string();
        let mut commitment = *blake3::hash(document.as_bytes()).as_bytes();
        if !self.is_honest {
            commitment[0] ^= 1;
        }
        let input = format!("data:application/json;base64,{}", STANDARD.encode(document));
        let mut digest = [0; 64];
        hex::decode_to_slice(&self.digest, &mut digest[..32]).expect("a digest");
        let number = |value: u128| {
            let mut word = [0; 32];
            word[16..].copy_from_slice(&value.to_be_bytes());
            word
        };
        let words = [
            Keccak256::digest(digest).into(),
            number(0),
            number(self.max_amount),
            number(self.price_in),
            number(self.price_out),
            number(self.max_in.into()),
            number(self.max_out.into()),
            number((now_s + self.claim_secs).into()),
            number(self.deliver_secs.into()),
            number(60),
            number(self.challenge_secs.into()),
            number(60),
            number(self.attempts.into()),
            number(self.bond),
            number(0),
            number(self.proof_kind.into()),
            number(0),
            number(0),
            commitment,
            number(20 * 32),
            number(input.len() as u128),
        ];
        let mut arguments = words.concat();
        arguments.extend(input.as_bytes());
        arguments.resize(arguments.len().next_multiple_of(32), 0);
        format!("0x{}{}", hex::encode(selector(POST)), hex::encode(arguments))
    }
}

fn selector(signature: &str) -> Vec<u8> {
    Keccak256::digest(signature)[..4].to_vec()
}

/// A call with numbers and accounts.
fn call(signature: &str, arguments: &[&str]) -> String {
    let words: String = arguments.iter().map(|argument| format!("{:0>64}", argument.trim_start_matches("0x"))).collect();
    format!("0x{}{words}", hex::encode(selector(signature)))
}

/// The contract's states, by their numbers.
pub const OPEN: u128 = 1;
pub const CLAIMED: u128 = 2;
pub const DELIVERED: u128 = 3;
pub const SETTLED: u128 = 6;
pub const REFUNDED: u128 = 7;

/// What the contract holds of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub state: u128,
    pub attempts: u128,
    pub host: String,
    pub in_tokens: u128,
    pub out_tokens: u128,
    /// 64 hexadecimal digits.
    pub output: String,
}

/// The chain, as clients see it.
pub struct Clients {
    url: String,
    escrow: String,
    proofs: String,
    http: reqwest::Client,
}

impl Clients {
    pub fn of(chain: &DevChain) -> Self {
        let config = chain.config();
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let http = reqwest::Client::builder().no_proxy().build().expect("a client can be made");
        let contract = |name: &str| text(&config["contracts"][name]);
        Self { url: text(&config["rpc"][0]), escrow: contract("escrow"), proofs: contract("proofs"), http }
    }

    /// One call of the chain's JSON-RPC.
    pub async fn rpc(&self, method: &str, params: Value) -> Value {
        let answer = self.post_body(&json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params })).await;
        assert!(answer["error"].is_null(), "{method}: {answer:#}");
        answer["result"].clone()
    }

    async fn post_body(&self, body: &Value) -> Value {
        let request = self.http.post(&self.url).header("content-type", "application/json").body(body.to_string());
        let answer = request.send().await.expect("the chain answers").text().await.expect("the chain answers");
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("the chain answers no JSON ({error}): {answer}"))
    }

    /// Sends calls of the contract for an account, and returns their transactions.
    async fn send_all(&self, from: Account, calls: Vec<(String, u128)>) -> Vec<String> {
        let mut sent = Vec::new();
        // Given here, so that they are carried out in this order, whatever the chain makes of a batch.
        let mut nonces = number(&self.rpc("eth_getTransactionCount", json!([from.address, "pending"])).await)..;
        for batch in calls.chunks(BATCH) {
            let requests: Vec<Value> = batch
                .iter()
                .zip(&mut nonces)
                .map(|((data, value), nonce)| {
                    let (value, nonce) = (format!("0x{value:x}"), format!("0x{nonce:x}"));
                    let call = json!({
                        "from": from.address, "to": self.escrow, "data": data, "value": value, "nonce": nonce, "gas": "0x1c9c38",
                        // Full blocks make the next ones dearer: what is offered is enough for all of them.
                        "maxFeePerGas": "0x174876e800", "maxPriorityFeePerGas": "0x3b9aca00",
                    });
                    json!({ "jsonrpc": "2.0", "id": 1, "method": "eth_sendTransaction", "params": [call] })
                })
                .collect();
            let answers = self.post_body(&json!(requests)).await;
            let answers = answers.as_array().unwrap_or_else(|| panic!("{answers:#}")).iter();
            sent.extend(answers.map(|answer| answer["result"].as_str().unwrap_or_else(|| panic!("{answer:#}")).to_owned()));
        }
        sent
    }

    /// The receipt of a transaction, once it is in a block. One account's are in their order.
    async fn mined(&self, transaction: &str) -> Value {
        // Behind as many others as the test has sent.
        eventually("a transaction is in a block", 4 * LIMIT, async || {
            let receipt = self.rpc("eth_getTransactionReceipt", json!([transaction])).await;
            (!receipt.is_null()).then_some(receipt)
        })
        .await
    }

    /// Sends one call, and returns what its transaction has cost in fees.
    async fn send(&self, from: Account, data: String, value: u128) -> u128 {
        let sent = self.send_all(from, vec![(data, value)]).await;
        let receipt = self.mined(&sent[0]).await;
        assert_eq!(receipt["status"], "0x1", "{receipt:#}");
        fee(&receipt)
    }

    /// Names a verifier for proofs of kind 1. Any contract will do for one that nobody asks.
    pub async fn name_verifier(&self, owner: Account) {
        let words = format!("{:064x}{:064x}{:0>64}{:064x}{:064x}{:0<64}", 1, 0, &self.escrow[2..], 4 * 32, 1, "78");
        let data = format!("0x{}{words}", hex::encode(selector("setVerifier(uint8,bytes32,address,string)")));
        let call = json!({ "from": owner.address, "to": self.proofs, "data": data });
        let sent = self.rpc("eth_sendTransaction", json!([call])).await;
        self.mined(sent.as_str().expect("a hash")).await;
    }

    /// Posts a job, and returns its number.
    pub async fn post(&self, from: Account, job: &Job) -> u64 {
        self.post_all(from, std::slice::from_ref(job)).await.start
    }

    /// Posts jobs, and returns their numbers.
    pub async fn post_all(&self, from: Account, jobs: &[Job]) -> std::ops::Range<u64> {
        let first = self.next_job().await;
        let now_s = number(&self.rpc("eth_getBlockByNumber", json!(["latest", false])).await["timestamp"]) as u64;
        let calls = jobs.iter().map(|job| (job.call(now_s), job.max_amount)).collect();
        let sent = self.send_all(from, calls).await;
        self.mined(sent.last().expect("a job is posted")).await;
        let next = self.next_job().await;
        assert_eq!(next - first, jobs.len() as u64, "not every job was posted");
        first..next
    }

    /// Posts a job into the pool only, and returns the transaction.
    pub async fn post_unmined(&self, from: Account, job: &Job) -> String {
        let now_s = number(&self.rpc("eth_getBlockByNumber", json!(["latest", false])).await["timestamp"]) as u64;
        self.send_all(from, vec![(job.call(now_s), job.max_amount)]).await.remove(0)
    }

    /// The number of the job that a transaction has posted.
    pub async fn posted(&self, transaction: &str) -> u64 {
        let receipt = self.rpc("eth_getTransactionReceipt", json!([transaction])).await;
        number(&receipt["logs"][0]["topics"][1]) as u64
    }

    async fn next_job(&self) -> u64 {
        self.words(call("nextJobId()", &[])).await[0] as u64
    }

    /// What posting a job has cost in fees.
    pub async fn posting_fee(&self, job: u64) -> u128 {
        let logs = self.logs(POSTED_EVENT, job).await;
        let receipt = self.rpc("eth_getTransactionReceipt", json!([logs[0]["transactionHash"]])).await;
        fee(&receipt)
    }

    pub async fn cancel_all(&self, from: Account, jobs: impl IntoIterator<Item = u64>) {
        let calls = jobs.into_iter().map(|job| (call("cancelJob(uint256)", &[&format!("{job:x}")]), 0)).collect();
        let sent = self.send_all(from, calls).await;
        self.mined(sent.last().expect("a job is cancelled")).await;
    }

    /// Cancels a job by a transaction in the pool that pays more for its place than others do.
    pub async fn cancel_dearly(&self, from: Account, job: u64) {
        let data = call("cancelJob(uint256)", &[&format!("{job:x}")]);
        let (most, tip) = ("0x174876e800", "0x12a05f2000");
        let call = json!({
            "from": from.address, "to": self.escrow, "data": data, "gas": "0x1c9c38",
            "maxFeePerGas": most, "maxPriorityFeePerGas": tip,
        });
        self.rpc("eth_sendTransaction", json!([call])).await;
    }

    /// Accepts a result; returns the fee.
    pub async fn accept(&self, from: Account, job: u64) -> u128 {
        self.send(from, call("acceptResult(uint256)", &[&format!("{job:x}")]), 0).await
    }

    /// What the contract holds for an account, in the chain's coin.
    pub async fn credit(&self, account: &str) -> u128 {
        let zero = "0";
        self.words(call("credits(address,address)", &[zero, account])).await[0]
    }

    pub async fn balance(&self, account: &str) -> u128 {
        number(&self.rpc("eth_getBalance", json!([account, "latest"])).await)
    }

    pub async fn job(&self, job: u64) -> Held {
        let data = call("jobs(uint256)", &[&format!("{job:x}")]);
        let text = self.call(data).await;
        let word = |index: usize| text[index * 64..(index + 1) * 64].to_owned();
        let number = |index: usize| u128::from_str_radix(&word(index)[32..], 16).expect("a number");
        Held {
            state: number(2),
            attempts: number(3),
            host: format!("0x{}", &word(13)[24..]),
            in_tokens: number(24),
            out_tokens: number(25),
            output: word(29),
        }
    }

    /// How often the contract has told of this, for a job.
    pub async fn told(&self, event: &str, job: u64) -> usize {
        self.logs(event, job).await.len()
    }

    /// The block in which the contract has told of this last, for a job.
    pub async fn block_of(&self, event: &str, job: u64) -> u64 {
        let logs = self.logs(event, job).await;
        number(&logs.last().expect("it was told")["blockNumber"]) as u64
    }

    async fn logs(&self, event: &str, job: u64) -> Vec<Value> {
        let topic = format!("0x{}", hex::encode(Keccak256::digest(event)));
        let topics = json!([topic, format!("0x{job:064x}")]);
        let filter = json!({ "fromBlock": "0x0", "toBlock": "latest", "address": self.escrow, "topics": topics });
        self.rpc("eth_getLogs", json!([filter])).await.as_array().expect("a list").clone()
    }

    async fn call(&self, data: String) -> String {
        let answer = self.rpc("eth_call", json!([{ "to": self.escrow, "data": data }, "latest"])).await;
        answer.as_str().expect("a text").trim_start_matches("0x").to_owned()
    }

    async fn words(&self, data: String) -> Vec<u128> {
        let text = self.call(data).await;
        let words = text.as_bytes().chunks(64).map(|word| std::str::from_utf8(word).expect("digits"));
        words.map(|word| u128::from_str_radix(&word[32..], 16).expect("a number")).collect()
    }
}

const POSTED_EVENT: &str = "JobPosted(uint256,address,bytes32,(bytes32,address,uint128,uint128,uint128,uint64,uint64,uint64,uint64,uint64,\
                            uint64,uint64,uint8,uint128,uint128,uint8,bytes32,address),bytes32,string,address)";
pub const CLAIM_EVENT: &str = "JobClaimed(uint256,address,uint64,uint8)";
pub const RESULT_EVENT: &str = "ResultSubmitted(uint256,address,bytes32,bytes32,uint64,uint64,string,uint8,uint64)";

fn fee(receipt: &Value) -> u128 {
    number(&receipt["gasUsed"]) * number(&receipt["effectiveGasPrice"])
}

/// A number as JSON-RPC writes it.
pub fn number(value: &Value) -> u128 {
    let text = value.as_str().unwrap_or_else(|| panic!("{value} is no number"));
    u128::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|_| panic!("{value} is no number"))
}
