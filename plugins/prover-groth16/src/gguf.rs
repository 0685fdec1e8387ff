//! Reads from a GGUF file what a proof is about: the model's digest and its output head.
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::wire::Word;

const MAX_NAME: u64 = 1 << 16;
const MAX_TEXT: u64 = 4 << 20;

/// Weights with one scale in a `Q8_0` block.
const BLOCK: usize = 32;

/// How the weights of a tensor are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    F32,
    F16,
    Bf16,
    Q8_0,
}

/// A model's file, and where its output head lies in it.
#[derive(Debug, Clone)]
pub struct Model {
    path: PathBuf,
    template: String,
    /// Values of a state.
    pub width: usize,
    /// Rows of the head.
    pub tokens: usize,
    format: Format,
    offset: u64,
}

#[derive(Debug, Clone, PartialEq)]
enum Value {
    Number(u64),
    Text(String),
    Other,
}

struct Tensor {
    name: String,
    dimensions: Vec<u64>,
    format: u32,
    offset: u64,
}

impl Model {
    /// Reads the header.
    ///
    /// # Errors
    /// `Model`, with what is wrong with the file or cannot be read here.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let refused = |reason: String| Error::Model { path: path.to_owned(), reason };
        let file = File::open(path).map_err(|error| refused(format!("cannot be read: {error}")))?;
        let size = file.metadata().map_err(|error| refused(error.to_string()))?.len();
        Reader { input: BufReader::new(file), at: 0, size }.model(path).map_err(refused)
    }

    /// The model's digest, by the recipe of `Loaded::digest`. Reads the whole file.
    pub fn digest(&self) -> Result<String, Error> {
        let io = |error| Error::io("read", &self.path)(error);
        let file = File::open(&self.path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&size.to_le_bytes());
        hasher.update_reader(file.take(size)).map_err(io)?;
        hasher.update(&(self.template.len() as u64).to_le_bytes()).update(self.template.as_bytes());
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// What identifies the head: a hash of its shape, its format and its bytes.
    pub fn head_hash(&self) -> Result<Word, Error> {
        let mut hasher = self.hasher();
        hasher.update_reader(self.bytes()?).map_err(Error::io("read", &self.path))?;
        Ok(hasher.finalize().into())
    }

    /// The weights of the head, one row for each token, if they are still those of this [`head_hash`](Self::head_hash).
    ///
    /// # Errors
    /// `Replaced` where the file has been.
    pub fn weights_of(&self, hash: &Word) -> Result<Vec<f32>, Error> {
        let bytes = self.read_head()?;
        if self.hasher().update(&bytes).finalize().as_bytes() != hash {
            return Err(Error::Replaced(self.path.clone()));
        }
        Ok(self.decoded(&bytes))
    }

    /// The weights of the head, one row for each token.
    pub fn weights(&self) -> Result<Vec<f32>, Error> {
        Ok(self.decoded(&self.read_head()?))
    }

    fn hasher(&self) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?} {} x {} ", self.format, self.tokens, self.width).as_bytes());
        hasher
    }

    fn read_head(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.bytes()?.read_to_end(&mut bytes).map_err(Error::io("read", &self.path))?;
        Ok(bytes)
    }

    fn decoded(&self, bytes: &[u8]) -> Vec<f32> {
        let pair = |pair: &[u8]| u16::from_le_bytes([pair[0], pair[1]]);
        match self.format {
            Format::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Format::F16 => bytes.chunks_exact(2).map(|b| from_f16(pair(b))).collect(),
            Format::Bf16 => bytes.chunks_exact(2).map(|b| f32::from_bits(u32::from(pair(b)) << 16)).collect(),
            Format::Q8_0 => {
                let blocks = bytes.chunks_exact(BLOCK + 2);
                let scaled = |block: &[u8]| {
                    let scale = from_f16(pair(block));
                    block[2..].iter().map(|weight| scale * f32::from(*weight as i8)).collect::<Vec<_>>()
                };
                blocks.flat_map(scaled).collect()
            }
        }
    }

    /// An error for what is wrong with this model.
    pub fn refused(&self, reason: impl Into<String>) -> Error {
        Error::Model { path: self.path.clone(), reason: reason.into() }
    }

    fn bytes(&self) -> Result<impl Read + use<>, Error> {
        let open = || {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.offset))?;
            Ok(file.take(self.format.bytes(self.tokens as u64 * self.width as u64)))
        };
        open().map_err(Error::io("read", &self.path))
    }
}

impl Format {
    fn bytes(self, weights: u64) -> u64 {
        match self {
            Format::F32 => weights * 4,
            Format::F16 | Format::Bf16 => weights * 2,
            Format::Q8_0 => weights / BLOCK as u64 * (BLOCK as u64 + 2),
        }
    }

    /// By GGML's numbers; the name of the type for those that are not read.
    fn of(number: u32) -> Result<Self, String> {
        const NAMES: [(u32, &str); 13] = [
            (2, "Q4_0"),
            (3, "Q4_1"),
            (6, "Q5_0"),
            (7, "Q5_1"),
            (10, "Q2_K"),
            (11, "Q3_K"),
            (12, "Q4_K"),
            (13, "Q5_K"),
            (14, "Q6_K"),
            (15, "Q8_K"),
            (20, "IQ4_NL"),
            (23, "IQ4_XS"),
            (39, "MXFP4"),
        ];
        match number {
            0 => Ok(Format::F32),
            1 => Ok(Format::F16),
            8 => Ok(Format::Q8_0),
            30 => Ok(Format::Bf16),
            _ => {
                Err(NAMES.iter().find(|(known, _)| *known == number).map_or(format!("type {number}"), |(_, name)| (*name).into()))
            }
        }
    }
}

struct Reader {
    input: BufReader<File>,
    at: u64,
    size: u64,
}

impl Reader {
    fn model(mut self, path: &Path) -> Result<Model, String> {
        if &self.take::<4>()? != b"GGUF" {
            return Err("is no GGUF file".into());
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("is GGUF version {version}; versions 2 and 3 can be read"));
        }
        let (tensors, values) = (self.u64()?, self.u64()?);
        let (mut alignment, mut template) = (32, String::new());
        for _ in 0..values {
            let key = self.text(MAX_NAME)?;
            let kind = self.u32()?;
            match (key.as_str(), self.value(kind)?) {
                ("general.alignment", Value::Number(number)) => alignment = number,
                ("tokenizer.chat_template", Value::Text(text)) => template = text,
                ("split.count", Value::Number(parts)) if parts > 1 => {
                    return Err(format!("is one of {parts} parts: models of one file can be read, merge the parts"));
                }
                _ => {}
            }
        }
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(format!("is damaged: `general.alignment` is {alignment}"));
        }
        let mut found = Vec::new();
        for _ in 0..tensors {
            let name = self.text(MAX_NAME)?;
            let dimensions = (0..self.u32()?.min(5)).map(|_| self.u64()).collect::<Result<_, _>>()?;
            let tensor = Tensor { name, dimensions, format: self.u32()?, offset: self.u64()? };
            if ["output.weight", "output.bias", "token_embd.weight"].contains(&tensor.name.as_str()) {
                found.push(tensor);
            }
        }
        let named = |name: &str| found.iter().find(|tensor| tensor.name == name);
        if named("output.bias").is_some() {
            return Err("its output head has a bias, which cannot be proven here".into());
        }
        // A model without a head of its own uses its embeddings once more.
        let head = named("output.weight").or_else(|| named("token_embd.weight")).ok_or("has no output head")?;
        let [width, tokens] = head.dimensions[..] else { return Err(format!("is damaged: `{}` is no matrix", head.name)) };
        let format = Format::of(head.format).map_err(|name| {
            format!("its output head (`{}`) is in {name}; F32, F16, BF16 and Q8_0 can be proven: quantise it with that type for the head", head.name)
        })?;
        let offset = self.at.next_multiple_of(alignment).checked_add(head.offset);
        let weights = width.checked_mul(tokens).filter(|weights| *weights > 0 && *weights < 1 << 40);
        let (Some(offset), Some(weights)) = (offset, weights) else {
            return Err(format!("is damaged: `{}` has no sensible size", head.name));
        };
        if format == Format::Q8_0 && width % BLOCK as u64 != 0 {
            return Err(format!("is damaged: the rows of `{}` are no whole blocks", head.name));
        }
        if offset.saturating_add(format.bytes(weights)) > self.size {
            return Err(format!("is truncated: `{}` ends after the file does", head.name));
        }
        Ok(Model { path: path.to_owned(), template, width: width as usize, tokens: tokens as usize, format, offset })
    }

    fn value(&mut self, kind: u32) -> Result<Value, String> {
        Ok(match kind {
            0 | 1 | 7 => Value::Number(self.take::<1>()?[0].into()),
            2 | 3 => Value::Number(u16::from_le_bytes(self.take()?).into()),
            4 | 5 => Value::Number(self.u32()?.into()),
            10 | 11 => Value::Number(self.u64()?),
            6 => self.skip(4)?,
            12 => self.skip(8)?,
            8 => Value::Text(self.text(MAX_TEXT)?),
            9 => {
                let kind = self.u32()?;
                let count = self.u64()?;
                let each = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    10..=12 => 8,
                    8 => {
                        for _ in 0..count {
                            let length = self.u64()?;
                            self.skip(length)?;
                        }
                        return Ok(Value::Other);
                    }
                    _ => return Err(format!("is damaged: an array of the unknown type {kind}")),
                };
                self.skip(count.checked_mul(each).ok_or("is damaged: an array without end")?)?
            }
            _ => return Err(format!("is damaged: a value of the unknown type {kind}")),
        })
    }

    fn text(&mut self, most: u64) -> Result<String, String> {
        let length = self.u64()?;
        if length > most {
            return Err(format!("is damaged: a text of {length} bytes, at most {most} can be read"));
        }
        self.room(length)?;
        let mut bytes = vec![0; length as usize];
        self.input.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        String::from_utf8(bytes).map_err(|_| "is damaged: a text that is not UTF-8".into())
    }

    fn skip(&mut self, bytes: u64) -> Result<Value, String> {
        self.room(bytes)?;
        self.input.seek_relative(bytes as i64).map_err(|error| error.to_string())?;
        Ok(Value::Other)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.room(N as u64)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    /// Moves on by so many bytes, if the file has them.
    fn room(&mut self, bytes: u64) -> Result<(), String> {
        self.at = self.at.checked_add(bytes).filter(|at| *at <= self.size).ok_or("is truncated")?;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.take().map(u64::from_le_bytes)
    }
}

/// IEEE 754 binary16.
fn from_f16(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let fraction = f32::from(bits & 0x3ff);
    match bits >> 10 & 0x1f {
        0 => sign * fraction * 2f32.powi(-24),
        31 => {
            if fraction == 0.0 {
                sign * f32::INFINITY
            } else {
                f32::NAN
            }
        }
        exponent => sign * (1024.0 + fraction) * 2f32.powi(i32::from(exponent) - 25),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A file with one head, 2 x 32, all weights 1 or 0.5.
    pub(crate) fn gguf(name: &str, format: u32, data: &[u8], extra: Option<&str>) -> Vec<u8> {
        let text = |bytes: &mut Vec<u8>, text: &str| {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        };
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((1 + extra.iter().count() as u64).to_le_bytes());
        bytes.extend(3u64.to_le_bytes());
        text(&mut bytes, "tokenizer.chat_template");
        bytes.extend(8u32.to_le_bytes());
        text(&mut bytes, "{{ x }}");
        text(&mut bytes, "words");
        bytes.extend([9u32, 8].map(u32::to_le_bytes).concat());
        bytes.extend(2u64.to_le_bytes());
        text(&mut bytes, "one");
        text(&mut bytes, "two");
        text(&mut bytes, "numbers");
        bytes.extend([9u32, 4].map(u32::to_le_bytes).concat());
        bytes.extend(3u64.to_le_bytes());
        bytes.extend([0; 12]);
        for name in [Some(name), extra].into_iter().flatten() {
            text(&mut bytes, name);
            bytes.extend(2u32.to_le_bytes());
            bytes.extend([32u64, 2].map(u64::to_le_bytes).concat());
            bytes.extend(format.to_le_bytes());
            bytes.extend(0u64.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(data);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Model, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let model = Model::read(file.path());
        file.keep().unwrap();
        model
    }

    fn weights(format: u32, data: &[u8]) -> Vec<f32> {
        let model = read(&gguf("output.weight", format, data, None)).unwrap();
        assert_eq!((model.width, model.tokens), (32, 2));
        let weights = model.weights().unwrap();
        std::fs::remove_file(&model.path).unwrap();
        weights
    }

    #[test]
    fn each_format_gives_the_same_weights() {
        let expected = [vec![1.0; 32], vec![-0.5; 32]].concat();
        let all = |one: &[u8], half: &[u8]| [one.repeat(32), half.repeat(32)].concat();
        assert_eq!(weights(0, &all(&1f32.to_le_bytes(), &(-0.5f32).to_le_bytes())), expected);
        assert_eq!(weights(1, &all(&[0, 0x3c], &[0, 0xb8])), expected);
        assert_eq!(weights(30, &all(&[0x80, 0x3f], &[0, 0xbf])), expected);
        let block = |scale: [u8; 2], weight: u8| [&scale[..], &[weight; 32]].concat();
        assert_eq!(weights(8, &[block([0, 0x38], 2), block([0, 0x38], 255)].concat()), expected);
    }

    #[test]
    fn halves_are_read_as_they_are() {
        for (bits, number) in [(0x0001, 5.960_464_5e-8), (0x7bff, 65504.0), (0x8000, 0.0), (0xc000, -2.0), (0x03ff, 6.097_555e-5)]
        {
            assert_eq!(from_f16(bits), number);
        }
        assert!(from_f16(0x7c00).is_infinite() && from_f16(0x7e00).is_nan());
    }

    #[test]
    fn what_cannot_be_proven_is_refused_by_name() {
        let data = vec![0; 256];
        let refused = |bytes: &[u8], why: &str| {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        refused(&gguf("output.weight", 14, &data, None), "Q6_K");
        refused(&gguf("output.weight", 0, &data, Some("output.bias")), "bias");
        refused(&gguf("blk.0.weight", 0, &data, None), "no output head");
        refused(&gguf("output.weight", 0, &data[1..], None), "truncated");
        refused(b"GGML", "no GGUF");
        refused(b"", "truncated");
        assert!(read(&gguf("token_embd.weight", 0, &data, None)).is_ok(), "a head that is tied to the embeddings");
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error() {
        let whole = gguf("output.weight", 0, &[0; 256], None);
        for end in 0..whole.len() {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &whole[..end]).unwrap();
            assert!(matches!(Model::read(file.path()), Err(Error::Model { .. })), "{end}");
        }
    }

    #[test]
    fn the_digest_follows_the_recipe() {
        let bytes = gguf("output.weight", 0, &[0; 256], None);
        let model = read(&bytes).unwrap();
        let mut hashed = (bytes.len() as u64).to_le_bytes().to_vec();
        hashed.extend(&bytes);
        hashed.extend(7u64.to_le_bytes());
        hashed.extend(b"{{ x }}");
        assert_eq!(model.digest().unwrap(), blake3::hash(&hashed).to_hex().to_string());
    }
}
