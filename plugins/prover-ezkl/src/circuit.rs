//! What is proven: the circuits, their public numbers, and how both come from what a proof is about.
//!
//! | circuit | private | public, as the contract takes them |
//! | --- | --- | --- |
//! | commitment | subject, model, input, output (the last three in halves of 128 bits) | subject, Poseidon of all seven |
//! | model | the input; subject and a digest of model, input and output, in limbs | subject, Poseidon of the input, Poseidon of the limbs, the outputs |
//!
//! The subject goes through the circuit from an input to an output. In a circuit of a model every number is held to a range, without
//! which an "input" could be found for any output, so there the subject travels in limbs that fit the range.

use fabstir_plugin_api::prelude::*;

use crate::config::ModelConfig;
use crate::error::EzklError;
use crate::field::{self, Word};
use crate::onnx::{self, Dim};

/// Numbers in a circuit are written with so many digits of this base, which sets their range.
pub const BASE: u32 = 128;
pub const LEGS: u32 = 3;
/// The largest number of that range.
pub const LARGEST: i64 = (1 << LIMB_BITS) - 1;
const LIMB_BITS: usize = 21;
/// Limbs of a number of 248 bits.
pub const LIMBS: usize = 12;

/// The numbers of a commitment's preimage.
const PREIMAGE: u64 = 7;
/// A commitment needs 289 rows, and 2^10 is the least that leaves room for blinding them.
const COMMITMENT_K: u32 = 10;

const LARGEST_MODEL: u64 = 64 << 20;
const EXAMPLES: usize = 8;

/// Changes whenever circuits are made in another way.
const RECIPE: &str = "fabstir prover-ezkl circuits 1";

/// Something that can be proven, before there are keys for it.
#[derive(Debug)]
pub struct Circuit {
    pub id: String,
    /// The bytes that ezkl compiles.
    pub onnx: Vec<u8>,
    pub model: Option<Model>,
    /// BLAKE3 of everything that keys are made from, in hexadecimal.
    pub recipe: String,
}

/// What only circuits of models have.
#[derive(Debug)]
pub struct Model {
    /// As an inference plugin tells it for a file without a template.
    pub digest: String,
    pub config: ModelConfig,
    /// How many numbers the input has.
    pub input: usize,
    /// The names of dimensions that the model leaves open.
    pub open: Vec<String>,
    pub examples: Vec<Vec<f32>>,
}

/// One output of a model: how many numbers, with how many binary places.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    pub length: usize,
    pub scale: u32,
}

/// What a proof is about, as numbers.
#[derive(Debug)]
pub struct Bound {
    pub subject: Word,
    /// What the circuit hashes together with the subject.
    pub preimage: Vec<Word>,
}

impl Circuit {
    pub fn commitment() -> Self {
        let onnx = onnx::first_of(PREIMAGE);
        Self { id: "commitment".into(), recipe: recipe(&[&onnx]), onnx, model: None }
    }

    /// Reads a model and its examples. Blocks on the disk.
    pub fn of_model(config: &ModelConfig) -> Result<Self, EzklError> {
        let bad = |why: String| EzklError::BadModel { name: config.name.clone(), path: config.path.clone(), why };
        let size = std::fs::metadata(&config.path).map_err(|error| bad(format!("it cannot be read ({error})")))?.len();
        if size > LARGEST_MODEL {
            return Err(bad(format!("it has {size} bytes, at most {LARGEST_MODEL} can be a circuit: take a smaller model")));
        }
        let bytes = std::fs::read(&config.path).map_err(|error| bad(format!("it cannot be read ({error})")))?;
        let shape = onnx::shape(&bytes).map_err(|error| bad(error.to_string()))?;
        let [input] = &*shape.inputs else {
            return Err(bad(format!("it has {} inputs, and one is supported: join them in the model", shape.inputs.len())));
        };
        if shape.outputs.is_empty() || input.len() == 0 {
            return Err(bad("an input or output without numbers".into()));
        }
        let open = input.dims.iter().filter_map(|dim| if let Dim::Open(name) = dim { Some(name.clone()) } else { None });
        let open = open.filter(|name| !name.is_empty()).collect();
        let examples = match &config.calibration {
            None => normal(EXAMPLES, input.len()),
            Some(path) => {
                let text = std::fs::read(path).map_err(|error| bad(format!("{} cannot be read ({error})", path.display())))?;
                serde_json::from_slice(&text)
                    .map_err(|error| bad(format!("{} is no list of lists of numbers ({error})", path.display())))?
            }
        };
        let wrong = |example: &Vec<f32>| example.len() != input.len() || example.iter().any(|value| !value.is_finite());
        if examples.is_empty() || examples.iter().any(wrong) {
            return Err(bad(format!("`calibration` needs one example or more, each of {} numbers", input.len())));
        }
        let onnx = onnx::bound(&bytes, 2 * LIMBS as u64, LIMBS as u64);
        let written = serde_json::to_vec(&examples).unwrap_or_default();
        let recipe = recipe(&[&onnx, &written, &config.scale().to_le_bytes()]);
        let model = Model { digest: digest(&bytes), config: config.clone(), input: input.len(), open, examples };
        Ok(Self { id: format!("onnx-model:{}", config.name), onnx, model: Some(model), recipe })
    }

    /// The rows of a commitment are known, those of a model are found by trying.
    pub fn fixed_k(&self) -> Option<u32> {
        self.model.is_none().then_some(COMMITMENT_K)
    }

    /// What ezkl tries the circuit with, all examples behind each other: input by input.
    pub fn calibration(&self) -> Option<serde_json::Value> {
        let model = self.model.as_ref()?;
        let about = vec![LARGEST; 2 * LIMBS * model.examples.len()];
        Some(serde_json::json!({ "input_data": [model.examples.concat(), about] }))
    }

    /// The numbers behind what a proof is about.
    ///
    /// # Errors
    /// A sentence, where they are none of this statement's.
    pub fn bind(&self, about: &About) -> Result<Bound, String> {
        let read = |name: &str, text: &str| {
            field::from_hex(text).ok_or_else(|| format!("`about.{name}` is not `0x` and 64 lower-case hexadecimal digits"))
        };
        let subject = read("subject", &about.subject)?;
        if subject[0] != 0 {
            return Err("`about.subject` is 2^248 or more".into());
        }
        let model = field::from_digits(&about.model).ok_or("`about.model` is not 64 lower-case hexadecimal digits")?;
        let (input, output) = (read("input", &about.input)?, read("output", &about.output)?);
        let preimage = match &self.model {
            None => [subject].into_iter().chain([model, input, output].iter().flat_map(halves)).collect(),
            Some(own) if own.digest != about.model => {
                return Err(format!("`about.model` is {}, the statement is about {}", about.model, own.digest));
            }
            Some(_) => {
                let mut tag = Word::default();
                let all = [model, input, output].concat();
                tag[1..].copy_from_slice(&blake3::derive_key("fabstir prover-ezkl 2026 about", &all)[..31]);
                limbs(&subject).into_iter().chain(limbs(&tag)).collect()
            }
        };
        Ok(Bound { subject, preimage })
    }

    /// What goes into the circuit.
    pub fn inputs(&self, bound: &Bound, values: &[Word]) -> Vec<Vec<String>> {
        let written = |words: &[Word]| words.iter().map(field::to_ezkl).collect();
        match self.model {
            None => vec![written(&bound.preimage)],
            Some(_) => vec![written(values), written(&bound.preimage)],
        }
    }

    /// The public numbers in the circuit's own order, from those of the contract: first what was hashed, then the outputs, of which the
    /// subject is the last.
    pub fn instances(&self, words: &[Word]) -> Vec<Word> {
        let Some((subject, rest)) = words.split_first() else { return Vec::new() };
        let subject = if self.model.is_some() { limbs(subject) } else { vec![*subject] };
        [rest, &subject].concat()
    }
}

fn recipe(parts: &[&[u8]]) -> String {
    let mut hash = blake3::Hasher::new();
    for part in [RECIPE.as_bytes(), crate::EZKL.as_bytes()].iter().chain(parts) {
        hash.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hash.finalize().to_hex().to_string()
}

/// As [`Loaded::digest`](fabstir_plugin_api::inference::Loaded::digest) has it, for one file and no template.
fn digest(model: &[u8]) -> String {
    let mut hash = blake3::Hasher::new();
    hash.update(&(model.len() as u64).to_le_bytes()).update(model).update(&0u64.to_le_bytes());
    hash.finalize().to_hex().to_string()
}

/// The upper and the lower 128 bits.
fn halves(word: &Word) -> [Word; 2] {
    let (mut upper, mut lower) = (Word::default(), Word::default());
    upper[16..].copy_from_slice(&word[..16]);
    lower[16..].copy_from_slice(&word[16..]);
    [upper, lower]
}

/// The limbs of a number below 2^248, the least significant first.
fn limbs(word: &Word) -> Vec<Word> {
    let bit = |at: usize| at < 256 && word[31 - at / 8] >> (at % 8) & 1 == 1;
    let limb = |limb: usize| (0..LIMB_BITS).filter(|at| bit(limb * LIMB_BITS + at)).map(|at| 1 << at).sum();
    (0..LIMBS).map(|at| field::from_integer(limb(at))).collect()
}

/// The integer that a number of an input becomes: the nearest multiple of 2^-scale, halves away from zero.
pub fn quantise(value: f32, scale: u32) -> Option<i64> {
    let scaled = (f64::from(value) * f64::from(1u32 << scale)).round();
    (scaled.abs() <= LARGEST as f64).then_some(scaled as i64)
}

/// The number that an integer of an output stands for. Exact: both fit 24 bits.
pub fn dequantise(integer: i64, scale: u32) -> f32 {
    (integer as f64 / (1u64 << scale) as f64) as f32
}

/// The one integer that [`dequantise`] makes this number from.
pub fn requantise(value: f32, scale: u32) -> Option<i64> {
    let integer = (f64::from(value) * (1u64 << scale) as f64).round();
    let integer = (integer.abs() <= LARGEST as f64).then_some(integer as i64)?;
    (dequantise(integer, scale).to_bits() == value.to_bits()).then_some(integer)
}

/// Normally distributed numbers, the same every time: sums of twelve uniform ones.
fn normal(rows: usize, length: usize) -> Vec<Vec<f32>> {
    let mut bytes = blake3::Hasher::new().update(b"examples").finalize_xof();
    let mut uniform = || {
        let mut four = [0; 4];
        bytes.fill(&mut four);
        u32::from_le_bytes(four) as f32 / u32::MAX as f32
    };
    (0..rows).map(|_| (0..length).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        let hex = |byte: &str| format!("0x{}", byte.repeat(32));
        About { subject: format!("0x00{}", "9f".repeat(31)), model: "0a".repeat(32), input: hex("bb"), output: hex("cc") }
    }

    #[test]
    fn each_digit_of_what_a_proof_is_about_changes_what_is_hashed() {
        let circuit = Circuit::commitment();
        let whole = circuit.bind(&about()).unwrap().preimage;
        assert_eq!(whole.len(), PREIMAGE as usize);
        for at in 0..64 {
            let turn = |text: &mut String, at: usize| {
                let other = if &text[at..=at] == "1" { "2" } else { "1" };
                text.replace_range(at..=at, other);
            };
            let mut others = vec![about(), about(), about()];
            turn(&mut others[0].model, at);
            turn(&mut others[1].input, at + 2);
            turn(&mut others[2].output, at + 2);
            if at >= 2 {
                others.push(about());
                turn(&mut others[3].subject, at + 2);
            }
            for other in others {
                assert_ne!(circuit.bind(&other).unwrap().preimage, whole);
            }
        }
    }

    #[test]
    fn what_is_no_word_is_refused_by_name() {
        let circuit = Circuit::commitment();
        let refused = |change: fn(&mut About), name: &str| {
            let mut other = about();
            change(&mut other);
            assert!(circuit.bind(&other).unwrap_err().contains(name));
        };
        refused(|about| about.subject = format!("0x01{}", "00".repeat(31)), "2^248");
        refused(|about| about.model.insert_str(0, "0x"), "about.model");
        refused(|about| about.input.truncate(20), "about.input");
        refused(|about| about.output.make_ascii_uppercase(), "about.output");
    }

    #[test]
    fn limbs_hold_all_248_bits() {
        let mut word = [0xff; 32];
        word[0] = 0;
        let limbs = limbs(&word);
        assert_eq!(limbs.len(), LIMBS);
        assert!(limbs[..11].iter().all(|limb| field::to_integer(limb) == Some(LARGEST)));
        assert_eq!(field::to_integer(&limbs[11]), Some((1 << (248 - 11 * LIMB_BITS)) - 1));
    }

    #[test]
    fn halves_round_away_from_zero_and_outputs_are_exact() {
        assert_eq!((quantise(0.5 / 128.0, 7), quantise(-0.5 / 128.0, 7), quantise(1.0, 7)), (Some(1), Some(-1), Some(128)));
        assert_eq!((quantise(f32::NAN, 7), quantise(f32::INFINITY, 7), quantise(20_000.0, 7)), (None, None, None));
        for integer in [0, 1, -1, LARGEST, -LARGEST, 77] {
            for scale in [0, 7, 14, 20] {
                assert_eq!(requantise(dequantise(integer, scale), scale), Some(integer));
            }
        }
        for wrong in [f32::NAN, -0.0, 0.001, 1e30, f32::INFINITY] {
            assert_eq!(requantise(wrong, 7), None, "{wrong}");
        }
    }
}
