//! The contracts on a development chain. `make chain` installs it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use fabstir_plugin_api::prelude::*;
use serde_json::{Value, json};

use super::{Subject, about, classifier, commitment, config, crate_folder};
use crate::field::{self, Word};
use crate::{Config, Ezkl};

/// An account of every development chain.
const ACCOUNT: &str = "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266";

struct Chain {
    process: Child,
    address: String,
}

impl Drop for Chain {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Chain {
    fn start() -> Self {
        let anvil = crate_folder().join("../chain-base/contracts/node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil");
        assert!(anvil.exists(), "no development chain at {}: run `make chain`", anvil.display());
        let mut process = Command::new(anvil).args(["--port", "0"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map(Result::unwrap);
        let address = lines.find_map(|line| line.strip_prefix("Listening on ").map(str::to_owned)).unwrap();
        // It goes on writing.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, address }
    }

    fn call(&self, method: &str, params: Value) -> Result<Value, String> {
        let body = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params }).to_string();
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let head =
            format!("POST / HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nConnection: close\r\n", self.address);
        write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let mut answer: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        match answer.get("error") {
            Some(error) => Err(error.to_string()),
            None => Ok(answer["result"].take()),
        }
    }

    /// Sends a transaction and returns its receipt.
    fn send(&self, to: Option<&str>, data: &[u8]) -> Value {
        let transaction = json!({ "from": ACCOUNT, "to": to, "data": format!("0x{}", hex::encode(data)), "gas": "0x1c9c380" });
        let hash = self.call("eth_sendTransaction", json!([transaction])).unwrap();
        // The block comes a moment after the transaction.
        let receipt = (0..3000).find_map(|_| {
            let receipt = self.call("eth_getTransactionReceipt", json!([hash])).unwrap();
            if receipt.is_null() {
                std::thread::sleep(std::time::Duration::from_millis(10));
                return None;
            }
            Some(receipt)
        });
        let receipt = receipt.expect("the transaction is in a block");
        assert_eq!(receipt["status"], "0x1", "{receipt}");
        receipt
    }

    /// Deploys contracts as the interface says: each gets the addresses of those before it.
    fn deploy(&self, contract: &Contract) -> String {
        let mut addresses: Vec<String> = Vec::new();
        for code in &contract.creation {
            let before = addresses.iter().flat_map(|address| hex::decode(format!("{:0>64}", &address[2..])).unwrap());
            let code: Vec<u8> = code.iter().copied().chain(before).collect();
            let receipt = self.send(None, &code);
            println!("deployment: {} gas, {} bytes of code sent", gas(&receipt), code.len());
            addresses.push(receipt["contractAddress"].as_str().unwrap().to_owned());
        }
        addresses.pop().unwrap()
    }

    fn verifies(&self, verifier: &str, program: &str, public: &[u8], proof: &[u8]) -> bool {
        let call =
            json!({ "from": ACCOUNT, "to": verifier, "data": format!("0x{}", hex::encode(verify(program, public, proof))) });
        self.call("eth_call", json!([call, "latest"])).is_ok_and(|answer| answer == json!(field::to_hex(&field::from_integer(1))))
    }
}

fn gas(receipt: &Value) -> u64 {
    u64::from_str_radix(&receipt["gasUsed"].as_str().unwrap()[2..], 16).unwrap()
}

/// `verify(bytes32,bytes,bytes)`
fn verify(program: &str, public: &[u8], proof: &[u8]) -> Vec<u8> {
    let number = |value: usize| field::from_integer(value as i64);
    let padded =
        |bytes: &[u8]| [&number(bytes.len())[..], bytes, &vec![0; bytes.len().next_multiple_of(32) - bytes.len()]].concat();
    let (public, proof) = (padded(public), padded(proof));
    let head = [field::from_hex(program).unwrap(), number(96), number(96 + public.len())].concat();
    [&SELECTOR[..], &head, &public, &proof].concat()
}

/// As `solc --hashes` names it.
const SELECTOR: [u8; 4] = [0x5b, 0xf4, 0x8e, 0x3a];

/// Deploys the verifier of a statement, and holds the proof and others against it.
async fn checks(subject: &Subject, chain: &Chain, proof: &Proof) {
    let contract = subject.plugin.verifier(&Cx::new(), proof.statement.clone()).await.unwrap();
    let verifier = chain.deploy(&contract);
    let good = |public: &[u8], bytes: &[u8]| chain.verifies(&verifier, &proof.program, public, bytes);
    assert!(good(&proof.public_inputs, &proof.proof));
    let receipt = chain.send(Some(&verifier), &verify(&proof.program, &proof.public_inputs, &proof.proof));
    println!("{}: {} gas to verify, in a transaction of its own", proof.statement, gas(&receipt));

    // Another subject, which is a replay for another job, and every other byte of the public inputs.
    for at in 0..proof.public_inputs.len() {
        let mut public = proof.public_inputs.clone();
        public[at] ^= 1 << (at % 8);
        assert!(!good(&public, &proof.proof), "byte {at} of the public inputs");
    }
    for at in (0..proof.proof.len()).step_by(proof.proof.len() / 150) {
        let mut bytes = proof.proof.clone();
        bytes[at] ^= 1 << (at % 8);
        assert!(!good(&proof.public_inputs, &bytes), "byte {at} of the proof");
    }
    // The same numbers in another form: a multiple of the field's order more.
    let order = field::from_hex("0x30644e72e131a029b85045b68181585d2833e84879b9709143e1f593f0000001").unwrap();
    for at in 0..proof.public_inputs.len() / 32 {
        let mut public = proof.public_inputs.clone();
        let word: &mut Word = (&mut public[32 * at..32 * (at + 1)]).try_into().unwrap();
        *word = add(word, &order);
        assert!(!good(&public, &proof.proof), "word {at} and the order");
    }
    let (public, bytes) = (&proof.public_inputs, &proof.proof);
    assert!(!good(&public[..public.len() - 1], bytes) && !good(&[], bytes) && !good(&[&public[..], &[0; 32]].concat(), bytes));
    assert!(!good(public, &bytes[..bytes.len() - 32]) && !good(public, &[]) && !good(public, &[&bytes[..], &[0; 32]].concat()));
    assert!(!good(public, &vec![0; bytes.len()]) && !good(public, &vec![0xff; bytes.len()]));
    assert!(!chain.verifies(&verifier, &proof.about.input, public, bytes), "another program");
}

fn add(one: &Word, other: &Word) -> Word {
    let (mut sum, mut carry) = (Word::default(), 0);
    for at in (0..32).rev() {
        let byte = u16::from(one[at]) + u16::from(other[at]) + carry;
        (sum[at], carry) = (byte as u8, byte >> 8);
    }
    sum
}

#[tokio::test(flavor = "multi_thread")]
async fn the_contract_accepts_the_proof_and_no_other() {
    let chain = Chain::start();
    let subject = Subject::start(Config { models: vec![classifier()], ..config(2400) }).await;
    let proof = subject.prove(commitment()).await.unwrap();
    checks(&subject, &chain, &proof).await;

    // Keys of another set-up: its proofs are of no use here.
    let other = Subject::start(config(2500)).await;
    let foreign = other.prove(commitment()).await.unwrap();
    let contract = subject.plugin.verifier(&Cx::new(), "commitment".into()).await.unwrap();
    let verifier = chain.deploy(&contract);
    assert!(!chain.verifies(&verifier, &proof.program, &foreign.public_inputs, &foreign.proof));

    let id = "onnx-model:classifier";
    let statement = subject.prepare(id).await.unwrap();
    let task = Task {
        statement: id.into(),
        about: About { model: statement.model.unwrap(), ..about() },
        witness: Witness::Inputs(vec![vec![0.5; 16]]),
    };
    let proof = subject.prove(task).await.unwrap();
    checks(&subject, &chain, &proof).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_without_the_reusable_verifier_cannot_be_deployed() {
    let chain = Chain::start();
    let subject = Subject::start(config(2600)).await;
    subject.prepare("commitment").await.unwrap();
    let contract = Ezkl::verifier(&subject.plugin, &Cx::new(), "commitment".into()).await.unwrap();
    let code = [&contract.creation[1][..], &field::from_integer(77)].concat();
    let call = json!({ "from": ACCOUNT, "data": format!("0x{}", hex::encode(code)) });
    assert!(chain.call("eth_call", json!([call, "latest"])).is_err());
}
