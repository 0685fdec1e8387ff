//! Makes real keys and proofs for the tests of the contracts, from the default model: run it in the root of the repository with
//! `cargo run --release -p prover-groth16 --example fixtures`.

use std::path::Path;

use fabstir_plugin_api::prelude::*;
use prover_groth16::{Config, Groth16, ModelConfig};
use serde_json::json;

#[path = "measure/states.rs"]
mod states;

const MODEL: &str = "models/tiny-chat/tiny-chat-q8_0.gguf";
const FILE: &str = "plugins/chain-base/contracts/test/fixtures/groth16.json";
const SAMPLES: u32 = 3;
const TOKENS: u32 = 11;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let state_dir = tempfile::tempdir()?;
    let model = ModelConfig { name: "tiny-chat".into(), path: MODEL.into(), digest: None };
    let config = Config { models: vec![model], samples: SAMPLES, ..Config::default() };
    let prover = Groth16::open(state_dir.path().to_owned(), config).await?;
    let head = states::head(Path::new(MODEL))?;
    let hash = |of: &str| blake3::hash(of.as_bytes());
    let mut subject = *hash("subject").as_bytes();
    subject[0] = 0;
    let seed = *hash("block").as_bytes();
    let text = |bytes: &[u8]| format!("0x{}", hex::encode(bytes));
    let digest = prover.statements(&Cx::new()).await?.into_iter().find_map(|statement| statement.model);
    let about = About {
        subject: text(&subject),
        job: None,
        model: digest.ok_or("no statement is about a model")?,
        input: text(hash("input").as_bytes()),
        output: text(hash("output").as_bytes()),
    };
    let task = |statement: &str, witness| Task { statement: statement.into(), about: about.clone(), witness };

    let receipt = proof(&prover, task("commitment", Witness::None)).await?;
    let name = "output-head:tiny-chat";
    let states = states::random(head.width(), TOKENS as usize, 7);
    let tokens = states.iter().map(|values| states::choice(&head, values)).collect::<Result<Vec<_>, _>>()?;
    let proven = proof(&prover, task(name, Witness::Answer { tokens, states, draw: text(&seed) })).await?;
    let Claim::Answer { trace, .. } = &proven.claim else { return Err("no answer was proven".into()) };
    let mut keys = Vec::new();
    for statement in ["commitment", name] {
        let artifact: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string("plugins/chain-base/contracts/artifacts/Groth16Verifier.json")?)?;
        let code = artifact["bytecode"].as_str().unwrap_or_default().len() / 2 - 1;
        let contract = prover.verifier(&Cx::new(), statement.into()).await?;
        keys.push(text(&contract.creation[0][code..]));
    }
    let fixture = json!({
        "commitment": {
            "key": keys[0],
            "program": receipt.program,
            "publicInputs": text(&receipt.public_inputs),
            "proof": text(&receipt.proof),
        },
        "head": {
            "key": keys[1],
            "program": proven.program,
            "subject": text(&subject),
            "seed": text(&seed),
            "trace": trace,
            "openings": text(&proven.proof),
        },
    });
    std::fs::write(FILE, format!("{}\n", serde_json::to_string_pretty(&fixture)?))?;
    Ok(())
}

async fn proof(prover: &Groth16, task: Task) -> Result<Proof> {
    let mut stream = prover.prove(&Cx::new(), task).await?;
    while let Some(step) = stream.next().await {
        if let Proving::Proof(proof) = step? {
            return Ok(proof);
        }
    }
    Err(PluginError::internal("the stream ended without a proof"))
}
