//! The work on real keys: the statement `commitment`, and the head of a small model.

use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::config::ModelConfig;
use crate::gguf::tests::gguf;

const HEAD: &str = "output-head:small";

fn open(folder: &Path, max_memory_mib: u64) -> Prover {
    drawing(folder, max_memory_mib, 4)
}

fn drawing(folder: &Path, max_memory_mib: u64, samples: u32) -> Prover {
    let path = folder.join("small.gguf");
    // Two rows of one block each: 64 equal weights of 1, and of -1.
    let block = |weight: u8| [&[0, 0x3c][..], &[weight; 32]].concat();
    fs::write(&path, gguf("token_embd.weight", 8, &[block(1), block(255)].concat(), None)).unwrap();
    let models = vec![ModelConfig { name: "small".into(), path, digest: None }];
    let config = Config { models, max_memory_mib, samples, ..Config::default() };
    Prover::open(&config, Store::open(folder).unwrap()).unwrap()
}

fn task(prover: &Prover, statement: &str, witness: Witness) -> Task {
    let model = prover.statements().into_iter().find_map(|statement| statement.model).unwrap();
    let word = |byte: u8| wire::hash_text(&[byte; 32]);
    let about = About { subject: wire::hash_text(&wire::word_of(5)), job: None, model, input: word(1), output: word(2) };
    Task { statement: statement.into(), about, witness }
}

fn prove(prover: &Prover, task: &Task) -> Result<Proof, Error> {
    let place = prover.place(&task.statement)?;
    prover.prove(place, task.about.clone(), prover.read(place, task)?, &|_| {}, &|| false)
}

fn verify(prover: &Prover, proof: &Proof) -> Verdict {
    prover.verify(prover.place(&proof.statement).unwrap(), proof).unwrap()
}

#[test]
fn of_thousands_of_changed_proofs_and_inputs_none_holds() {
    let folder = tempfile::tempdir().unwrap();
    let prover = open(folder.path(), 100);
    let good = prove(&prover, &task(&prover, "commitment", Witness::None)).unwrap();
    assert!(verify(&prover, &good).holds);
    let mut random = StdRng::seed_from_u64(1);
    for number in 0..3000 {
        let mut proof = good.clone();
        // Of every third, the public inputs; what they should be is made anew, so any change shows.
        let bytes = if number % 3 == 0 { &mut proof.public_inputs } else { &mut proof.proof };
        let length = bytes.len();
        let word = random.gen_range(0..length / 32) * 32;
        match random.gen_range(0..7) {
            0 => bytes[random.gen_range(word..word + 32)] ^= 1 << random.gen_range(0..8),
            1 => bytes[word..word + 32].fill(0),
            2 => bytes[word..word + 32].fill(0xff),
            3 => random.fill(&mut bytes[word..word + 32]),
            4 => random.fill(&mut bytes[..]),
            5 => bytes.truncate(random.gen_range(0..length)),
            _ => bytes.swap(word, (word + 32) % length),
        }
        let changed = proof != good;
        assert_eq!(verify(&prover, &proof).holds, !changed, "number {number}");
    }
    // Points that are on the curve and in the group, and of other proofs.
    let others: Vec<Proof> = (0..4).map(|_| prove(&prover, &task(&prover, "commitment", Witness::None)).unwrap()).collect();
    for other in &others {
        assert!(verify(&prover, other).holds && other.proof != good.proof);
        for (from, to) in [(0, 64), (64, 192), (192, 256), (0, 192), (64, 256)] {
            let mut mixed = good.clone();
            mixed.proof[from..to].copy_from_slice(&other.proof[from..to]);
            assert!(!verify(&prover, &mixed).holds, "bytes {from} to {to} of another proof");
        }
    }
}

#[test]
fn a_head_proves_what_it_chooses_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let prover = open(folder.path(), 100);
    let values: Vec<f32> = (0..32).map(|at| 1.0 + at as f32).collect();
    let draw = wire::hash_text(&[9; 32]);
    let answer =
        |values: &[f32], token| Witness::Answer { tokens: vec![token], states: vec![values.to_vec()], draw: draw.clone() };
    let good = prove(&prover, &task(&prover, HEAD, answer(&values, 0))).unwrap();
    assert!(verify(&prover, &good).holds);
    assert_eq!(good.public_inputs.len(), 64);
    let place = prover.place(HEAD).unwrap();
    let trace = prover.trace(place, &[0], &[values.clone()], &|| false).unwrap();
    assert_eq!(good.claim, Claim::Answer { trace, tokens: 1, draw: draw.clone() });
    assert!(matches!(prover.trace(place, &[0], &[values.clone()], &|| true), Err(Error::Ended)));

    let refused = |task: &Task, why: &str| {
        let error = PluginError::from(prove(&prover, task).unwrap_err());
        assert!(error.code == Code::InvalidArgument && error.message.contains(why), "{error}");
    };
    refused(&task(&prover, HEAD, answer(&values, 1)), "gives token 0 the logit");
    refused(&task(&prover, HEAD, answer(&values, 2)), "no token 2");
    refused(&task(&prover, HEAD, answer(&values[1..], 0)), "31 values");
    refused(&task(&prover, HEAD, answer(&[f32::NAN; 32], 0)), "finite");
    refused(&task(&prover, HEAD, Witness::None), "answer");
    let mut other = task(&prover, HEAD, answer(&values, 0));
    other.about.model = "0".repeat(64);
    refused(&other, "is about the model");

    let changes: [fn(&mut Proof); 6] = [
        |proof| proof.about.model = "0".repeat(64),
        |proof| {
            proof.about.subject = wire::hash_text(&wire::word_of(6));
            proof.public_inputs = answer::public_inputs(&wire::word_of(6), None);
        },
        |proof| proof.claim = Claim::None,
        |proof| {
            if let Claim::Answer { trace, .. } = &mut proof.claim {
                *trace = wire::hash_text(&[0xff; 32])
            }
        },
        |proof| {
            if let Claim::Answer { tokens, .. } = &mut proof.claim {
                *tokens = 9
            }
        },
        |proof| proof.about.job = Some(7),
    ];
    for change in changes {
        let mut proof = good.clone();
        change(&mut proof);
        let verdict = verify(&prover, &proof);
        assert!(!verdict.holds && verdict.why.is_some(), "{proof:?}");
    }
}

#[test]
fn the_number_of_draws_is_part_of_a_heads_program_and_of_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let programs = |samples| {
        let prover = drawing(folder.path(), 100, samples);
        for statement in ["commitment", HEAD] {
            prover.prepare(prover.place(statement).unwrap(), &|_| {}, &|| false).unwrap();
        }
        prover.statements().into_iter().map(|statement| statement.program.unwrap()).collect::<Vec<_>>()
    };
    let (four, two) = (programs(4), programs(2));
    assert_eq!(four[0], two[0], "the same keys");
    assert_ne!(four[1], two[1], "a contract that draws four refuses what two openings prove");
    assert_eq!(four, programs(4));
}

#[test]
fn what_is_prepared_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let prover = open(folder.path(), 100);
    for statement in ["commitment", HEAD] {
        let place = prover.place(statement).unwrap();
        assert_eq!(prover.estimate(place).prove_cpu_ms, None);
        prover.prepare(place, &|_| {}, &|| false).unwrap();
        assert!(prover.estimate(place).prove_cpu_ms.is_some(), "{statement}");
    }
}

#[test]
fn keys_are_not_made_from_a_file_that_was_replaced_since() {
    let folder = tempfile::tempdir().unwrap();
    let prover = open(folder.path(), 100);
    let path = folder.path().join("small.gguf");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() = 7;
    fs::write(&path, bytes).unwrap();
    let error = prover.prepare(prover.place(HEAD).unwrap(), &|_| {}, &|| false).unwrap_err();
    assert!(matches!(error, Error::Replaced(_)), "{error}");
}

#[test]
fn work_beyond_its_memory_is_refused_with_both_figures() {
    let folder = tempfile::tempdir().unwrap();
    let prover = open(folder.path(), 1);
    let error = PluginError::from(prove(&prover, &task(&prover, "commitment", Witness::None)).unwrap_err());
    assert_eq!(error.code, Code::Full);
    assert!(error.message.contains("16 MiB") && error.message.contains("`max_memory_mib` is 1"), "{error}");
}

#[test]
fn keys_of_one_head_are_not_taken_for_those_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let circuits: Vec<Word> = open(folder.path(), 100).known.iter().map(|known| known.circuit).collect();
    let same: Vec<Word> = open(folder.path(), 100).known.iter().map(|known| known.circuit).collect();
    assert_eq!(circuits, same);
    let path = folder.path().join("small.gguf");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() = 7;
    fs::write(&path, bytes).unwrap();
    let changed = Known::head(&ModelConfig { name: "small".into(), path, digest: None }).unwrap();
    assert_ne!(changed.circuit, circuits[1]);
}
