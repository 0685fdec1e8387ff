//! Reads the header of a GGUF file.
//!
//! llama.cpp reads the file again when it loads it, but it asserts where it should answer, and an assert ends the process. So
//! every length in the header is held against the file here first: a file that is no GGUF, is cut short or is garbage ends in an
//! error that says which.
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Why a file cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GgufError {
    #[error("{path}: {reason}")]
    Unreadable { path: PathBuf, reason: String },
    /// The magic is wrong: another kind of file altogether.
    #[error("{path} is not a GGUF file: it begins with {found}, not with `GGUF`")]
    NotGguf { path: PathBuf, found: String },
    #[error("{path} is GGUF version {version}; versions 2 and 3 can be read")]
    Version { path: PathBuf, version: u32 },
    /// The file ends before the data that its header names.
    #[error("{path} is truncated: {expected} bytes expected, {found} found. Download or copy it again")]
    Truncated { path: PathBuf, expected: u64, found: u64 },
    #[error("{path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
}

/// A metadata value. Of long arrays only the length is kept: vocabularies are llama.cpp's business.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    /// A short array of whole numbers, such as one value per layer.
    Numbers(Vec<u64>),
    Array {
        len: u64,
    },
}

/// What the header of a file says, checked against the file's size.
#[derive(Debug, Clone, Default)]
pub struct Header {
    values: BTreeMap<String, Value>,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub weights: u64,
    /// Bytes of the tensors of each block (`blk.N.`), by number.
    pub block_weights: BTreeMap<u32, u64>,
}

const MAX_KEY: u64 = 65_535;
const MAX_TEXT: u64 = 4 << 20;
const KEPT_NUMBERS: u64 = 4096;
const MAX_DIMENSIONS: u32 = 4;

/// The numbers of the value types that are named below.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// llama.cpp's own limit, which it asserts.
const MAX_BLOCKS: u64 = 512;

/// The vocabulary's words: llama.cpp asserts that no two are the same.
const WORDS: &str = "tokenizer.ggml.tokens";

impl Header {
    /// Reads and checks the header of `path`, and of every part of a split model.
    pub fn read(path: &Path) -> Result<Header, GgufError> {
        let mut header = read_part(path)?;
        for part in header.parts(path)? {
            let part = read_part(&part)?;
            header.parameters += part.parameters;
            header.weights += part.weights;
            for (block, bytes) in part.block_weights {
                *header.block_weights.entry(block).or_default() += bytes;
            }
        }
        header.check_shape(path)?;
        Ok(header)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        match self.values.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn number(&self, key: &str) -> Option<u64> {
        match self.values.get(key)? {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.values.get(key)? {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// A value that is one number for all layers or an array with one per layer.
    pub fn per_layer(&self, key: &str, layer: usize) -> Option<u64> {
        match self.values.get(key)? {
            Value::Numbers(numbers) => numbers.get(layer).copied(),
            _ => self.number(key),
        }
    }

    pub fn array_len(&self, key: &str) -> Option<u64> {
        match self.values.get(key)? {
            Value::Array { len } => Some(*len),
            Value::Numbers(numbers) => Some(numbers.len() as u64),
            _ => None,
        }
    }

    /// The value of `{architecture}.{key}`.
    pub fn of_architecture(&self, key: &str) -> Option<u64> {
        self.number(&format!("{}.{key}", self.architecture()))
    }

    pub fn architecture(&self) -> &str {
        self.text("general.architecture").unwrap_or_default()
    }

    /// The other files of a split model, by llama.cpp's naming: `name-00001-of-00003.gguf`.
    pub(crate) fn parts(&self, path: &Path) -> Result<Vec<PathBuf>, GgufError> {
        let count = self.number("split.count").unwrap_or(1);
        if count <= 1 {
            return Ok(Vec::new());
        }
        let damaged = |reason: String| GgufError::Damaged { path: path.to_owned(), reason };
        let first = format!("-{:05}-of-{count:05}.gguf", 1);
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(stem) = name.strip_suffix(&first).filter(|_| count <= 99_999) else {
            return Err(damaged(format!(
                "it is one of {count} parts, and its name does not end in `{first}`: give the first part"
            )));
        };
        Ok((2..=count).map(|part| path.with_file_name(format!("{stem}-{part:05}-of-{count:05}.gguf"))).collect())
    }

    /// The values that llama.cpp divides by or asserts on.
    fn check_shape(&self, path: &Path) -> Result<(), GgufError> {
        let damaged = |reason: String| GgufError::Damaged { path: path.to_owned(), reason };
        let architecture = self.architecture();
        if architecture.is_empty() {
            return Err(damaged("it does not name its architecture (`general.architecture`)".into()));
        }
        if architecture == "clip" {
            return Err(damaged("it is a vision projector, which cannot run by itself".into()));
        }
        for key in ["block_count", "embedding_length", "context_length"] {
            match self.of_architecture(key) {
                None => return Err(damaged(format!("`{architecture}.{key}` is missing"))),
                Some(0) => return Err(damaged(format!("`{architecture}.{key}` is 0"))),
                Some(value) if value > u64::from(u32::MAX / 2) => {
                    return Err(damaged(format!("`{architecture}.{key}` is {value}")));
                }
                Some(_) => {}
            }
        }
        let blocks = self.of_architecture("block_count").unwrap_or(0);
        if blocks > MAX_BLOCKS {
            return Err(damaged(format!("`{architecture}.block_count` is {blocks}, at most {MAX_BLOCKS} can be read")));
        }
        for (key, value) in &self.values {
            if let Value::Float(value) = value
                && (value.is_nan() || (key.ends_with("epsilon") && *value < 0.0))
            {
                return Err(damaged(format!("`{key}` is {value}")));
            }
        }
        if self.array_len(WORDS).unwrap_or(0) == 0 {
            return Err(damaged(format!("it has no vocabulary (`{WORDS}`)")));
        }
        if self.weights == 0 {
            return Err(damaged("it has no tensors".into()));
        }
        Ok(())
    }
}

fn read_part(path: &Path) -> Result<Header, GgufError> {
    let unreadable = |error: io::Error| GgufError::Unreadable { path: path.to_owned(), reason: error.to_string() };
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(GgufError::Unreadable { path: path.to_owned(), reason: "it is not a file".into() });
    }
    Reader { input: BufReader::with_capacity(1 << 18, file), at: 0, len: metadata.len(), path }.header()
}

struct Reader<'a> {
    input: BufReader<File>,
    at: u64,
    len: u64,
    path: &'a Path,
}

impl Reader<'_> {
    fn header(mut self) -> Result<Header, GgufError> {
        let mut magic = [0; 4];
        let got = self.input.read(&mut magic).map_err(|error| self.unreadable(error))?;
        if got < 4 || &magic != b"GGUF" {
            let found = if got == 0 {
                "nothing (it is empty)".to_owned()
            } else {
                format!("{:?}", magic[..got].escape_ascii().to_string())
            };
            return Err(GgufError::NotGguf { path: self.path.to_owned(), found });
        }
        self.at = 4;
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version { path: self.path.to_owned(), version });
        }
        let tensors = self.count("tensors", 24)?;
        let values = self.count("metadata values", 13)?;
        let mut header = Header::default();
        for _ in 0..values {
            let key = self.key()?;
            let kind = self.u32()?;
            let value = if key == WORDS && kind == ARRAY { self.words()? } else { self.value(kind)? };
            if header.values.insert(key.clone(), value).is_some() {
                return Err(self.damaged(format!("`{key}` occurs twice")));
            }
        }
        self.tensors(&mut header, tensors)?;
        Ok(header)
    }

    fn tensors(&mut self, header: &mut Header, count: u64) -> Result<(), GgufError> {
        let alignment = header.number("general.alignment").unwrap_or(32);
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(self.damaged(format!("`general.alignment` is {alignment}, not a power of two")));
        }
        let mut end = 0;
        for _ in 0..count {
            let name = self.key()?;
            let dimensions = self.u32()?;
            if dimensions > MAX_DIMENSIONS {
                return Err(self.damaged(format!("tensor `{name}` has {dimensions} dimensions")));
            }
            let mut elements: u64 = 1;
            let mut row = 1;
            for dimension in 0..dimensions {
                let size = self.u64()?;
                if dimension == 0 {
                    row = size;
                }
                elements = elements
                    .checked_mul(size)
                    .filter(|&elements| elements > 0 && elements < 1 << 48)
                    .ok_or_else(|| self.damaged(format!("tensor `{name}` has no sensible size")))?;
            }
            let kind = self.u32()?;
            let (block, block_bytes) =
                type_size(kind).ok_or_else(|| self.damaged(format!("tensor `{name}` has the unknown type {kind}")))?;
            if row % block != 0 {
                return Err(self.damaged(format!("the rows of tensor `{name}` are not a whole number of blocks")));
            }
            if dimensions == 1
                && kind != llama_cpp_sys_2::GGML_TYPE_F32
                && (name.ends_with("norm.weight") || name.ends_with(".bias"))
            {
                // llama.cpp multiplies and adds these in 32 bits only, and asserts when it comes to it.
                return Err(self.damaged(format!("tensor `{name}` is not in 32-bit floats")));
            }
            let offset = self.u64()?;
            let bytes = elements / block * block_bytes;
            if offset % alignment != 0 {
                return Err(self.damaged(format!("tensor `{name}` is not aligned")));
            }
            let last = offset.checked_add(bytes).ok_or_else(|| self.damaged(format!("tensor `{name}` has no sensible place")))?;
            end = end.max(last);
            header.parameters += elements;
            header.weights += bytes;
            if let Some(number) = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok()) {
                *header.block_weights.entry(number).or_default() += bytes;
            }
        }
        let expected = self.at.next_multiple_of(alignment).saturating_add(end);
        if count > 0 && expected > self.len {
            return Err(GgufError::Truncated { path: self.path.to_owned(), expected, found: self.len });
        }
        Ok(())
    }

    fn value(&mut self, kind: u32) -> Result<Value, GgufError> {
        Ok(match kind {
            0 => Value::Unsigned(self.bytes::<1>()?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes()?).into()),
            7 => Value::Bool(self.bytes::<1>()?[0] != 0),
            TEXT => Value::Text(self.text(MAX_TEXT)?),
            ARRAY => self.array()?,
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            other => return Err(self.damaged(format!("a metadata value has the unknown type {other}"))),
        })
    }

    /// The vocabulary: reads its words only to see that they differ.
    fn words(&mut self) -> Result<Value, GgufError> {
        let kind = self.u32()?;
        if kind != TEXT {
            return Err(self.damaged(format!("`{WORDS}` is not an array of texts")));
        }
        let len = self.u64()?;
        self.require(len.saturating_mul(8))?;
        let mut seen = HashSet::with_capacity(len as usize);
        for _ in 0..len {
            let word = self.raw_text(MAX_KEY)?;
            // Empty words get names of their own.
            if !word.is_empty() && !seen.insert(word) {
                return Err(self.damaged("two words of its vocabulary are the same".into()));
            }
        }
        Ok(Value::Array { len })
    }

    fn array(&mut self) -> Result<Value, GgufError> {
        let kind = self.u32()?;
        let len = self.u64()?;
        if kind == TEXT {
            for _ in 0..len {
                let bytes = self.u64()?;
                self.skip(bytes)?;
            }
            return Ok(Value::Array { len });
        }
        let size: u64 = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            other => return Err(self.damaged(format!("an array has the unknown element type {other}"))),
        };
        if len <= KEPT_NUMBERS && !matches!(kind, 6 | 12) {
            let mut numbers = Vec::with_capacity(len as usize);
            for _ in 0..len {
                numbers.push(match self.value(kind)? {
                    Value::Unsigned(number) => number,
                    Value::Signed(number) => u64::try_from(number).unwrap_or(0),
                    Value::Bool(yes) => yes.into(),
                    _ => 0,
                });
            }
            return Ok(Value::Numbers(numbers));
        }
        let bytes = len.checked_mul(size).ok_or_else(|| self.damaged("an array has no sensible length".into()))?;
        self.skip(bytes)?;
        Ok(Value::Array { len })
    }

    /// How many things follow, each of which takes at least `least` bytes: a count that the file cannot hold is an error here,
    /// not an allocation later.
    fn count(&mut self, what: &str, least: u64) -> Result<u64, GgufError> {
        let count = self.u64()?;
        if count > (self.len - self.at) / least {
            return Err(self.damaged(format!("its header announces {count} {what}, more than {} bytes can hold", self.len)));
        }
        Ok(count)
    }

    fn key(&mut self) -> Result<String, GgufError> {
        self.text(MAX_KEY)
    }

    fn text(&mut self, most: u64) -> Result<String, GgufError> {
        let bytes = self.raw_text(most)?;
        String::from_utf8(bytes).map_err(|_| self.damaged("a text of its header is not UTF-8".into()))
    }

    fn raw_text(&mut self, most: u64) -> Result<Vec<u8>, GgufError> {
        let len = self.u64()?;
        if len > most {
            return Err(self.damaged(format!("a text of its header has {len} bytes")));
        }
        self.require(len)?;
        let mut bytes = vec![0; len as usize];
        self.input.read_exact(&mut bytes).map_err(|error| self.unreadable(error))?;
        self.at += len;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        self.require(N as u64)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|error| self.unreadable(error))?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn skip(&mut self, bytes: u64) -> Result<(), GgufError> {
        self.require(bytes)?;
        // `require` has held `bytes` against the size of a file, which fits an i64.
        match i64::try_from(bytes) {
            Ok(near) => self.input.seek_relative(near),
            Err(_) => self.input.seek(SeekFrom::End(0)).map(|_| ()),
        }
        .map_err(|error| self.unreadable(error))?;
        self.at += bytes;
        Ok(())
    }

    fn require(&self, bytes: u64) -> Result<(), GgufError> {
        let expected = self.at.saturating_add(bytes);
        if expected > self.len {
            return Err(GgufError::Truncated { path: self.path.to_owned(), expected, found: self.len });
        }
        Ok(())
    }

    fn unreadable(&self, error: io::Error) -> GgufError {
        GgufError::Unreadable { path: self.path.to_owned(), reason: error.to_string() }
    }

    fn damaged(&self, reason: String) -> GgufError {
        GgufError::Damaged { path: self.path.to_owned(), reason }
    }
}

/// Elements and bytes of one block of a tensor type; `None` for a type that llama.cpp does not know (any more).
fn type_size(kind: u32) -> Option<(u64, u64)> {
    if kind >= llama_cpp_sys_2::GGML_TYPE_COUNT {
        return None;
    }
    // SAFETY: both are look-ups in a constant table, and the type is within it.
    let (block, bytes) = unsafe { (llama_cpp_sys_2::ggml_blck_size(kind), llama_cpp_sys_2::ggml_type_size(kind)) };
    let block = u64::try_from(block).ok().filter(|&block| block > 0)?;
    (bytes > 0).then_some((block, bytes as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn tiny_chat() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny-chat/tiny-chat-q8_0.gguf")
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn the_header_of_a_real_model_is_read() {
        let header = Header::read(&tiny_chat()).unwrap();
        assert_eq!(header.architecture(), "llama");
        assert_eq!(header.of_architecture("block_count"), Some(4));
        assert_eq!(header.of_architecture("context_length"), Some(2048));
        assert_eq!(header.array_len("tokenizer.ggml.tokens"), Some(2560));
        assert_eq!(header.parameters, 3_410_176);
        assert!(header.text("tokenizer.chat_template").unwrap().contains("<|im_start|>"));
        assert_eq!(header.block_weights.len(), 4);
    }

    #[test]
    fn another_kind_of_file_is_named_as_such() {
        let error = Header::read(file(b"PK\x03\x04 a zip").path()).unwrap_err();
        assert!(matches!(error, GgufError::NotGguf { .. }), "{error}");
        assert!(error.to_string().contains("is not a GGUF file"), "{error}");
        assert!(matches!(Header::read(file(b"").path()).unwrap_err(), GgufError::NotGguf { .. }));
        assert!(matches!(Header::read(Path::new("/nowhere.gguf")).unwrap_err(), GgufError::Unreadable { .. }));
        assert!(matches!(Header::read(&std::env::temp_dir()).unwrap_err(), GgufError::Unreadable { .. }));
    }

    #[test]
    fn a_truncated_file_names_both_sizes() {
        let whole = std::fs::read(tiny_chat()).unwrap();
        for keep in [12, 100, 5_000, whole.len() / 2, whole.len() - 1] {
            match Header::read(file(&whole[..keep]).path()) {
                Err(GgufError::Truncated { expected, found, .. }) => {
                    assert_eq!(found, keep as u64);
                    assert!(expected > found);
                }
                // So few bytes left that the counts of the header give it away first.
                Err(GgufError::Damaged { .. }) if keep < 1000 => {}
                other => panic!("{keep} bytes: {other:?}"),
            }
        }
    }

    #[test]
    fn garbage_never_panics() {
        let whole = std::fs::read(tiny_chat()).unwrap();
        let header = &whole[..80_000];
        let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..300 {
            let mut bytes = header.to_vec();
            for _ in 0..1 + random() % 8 {
                // The early bytes hold the counts, so half of the hits go there.
                let place = if random() % 2 == 0 { random() % 2048 } else { random() % bytes.len() as u64 } as usize;
                bytes[place.max(4)] = random() as u8;
            }
            let _ = Header::read(file(&bytes).path());
        }
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((0..4096).map(|_| random() as u8));
        assert!(Header::read(file(&bytes).path()).is_err());
    }

    #[test]
    fn what_llama_cpp_asserts_is_refused_before() {
        let whole = std::fs::read(tiny_chat()).unwrap();
        let find = |text: &[u8]| whole.windows(text.len()).position(|window| window == text).unwrap() + text.len();
        let refusal = |place: usize, bytes: &[u8]| {
            let mut spoilt = whole.clone();
            spoilt[place..place + bytes.len()].copy_from_slice(bytes);
            Header::read(file(&spoilt).path()).unwrap_err().to_string()
        };
        // A value follows its key and four bytes of type.
        assert!(refusal(find(b"llama.block_count") + 4, &513u32.to_le_bytes()).contains("block_count"));
        assert!(refusal(find(b"llama.attention.layer_norm_rms_epsilon") + 4, &(-1f32).to_le_bytes()).contains("epsilon"));
        assert!(refusal(find(b"llama.rope.freq_base") + 4, &f32::NAN.to_le_bytes()).contains("freq_base"));
        // A tensor's type follows its name, the number of its dimensions and one size.
        assert!(refusal(find(b"output_norm.weight") + 12, &1u32.to_le_bytes()).contains("output_norm.weight"));
        // Two words of one letter each, in the vocabulary of single bytes.
        let word = find(b"\x01\0\0\0\0\0\0\0A\x01\0\0\0\0\0\0\0B");
        assert!(refusal(word - 1, b"A").contains("vocabulary"));
    }

    #[test]
    fn the_parts_of_a_split_model_are_found_by_name() {
        let mut header = Header::default();
        header.values.insert("split.count".into(), Value::Unsigned(3));
        let parts = header.parts(Path::new("models/big-00001-of-00003.gguf")).unwrap();
        assert_eq!(parts, ["models/big-00002-of-00003.gguf", "models/big-00003-of-00003.gguf"].map(PathBuf::from));
        assert!(header.parts(Path::new("models/big-00002-of-00003.gguf")).unwrap_err().to_string().contains("first part"));
    }

    #[test]
    fn other_versions_are_refused() {
        let error = Header::read(file(b"GGUF\x07\0\0\0aaaaaaaaaaaaaaaaaaaaaaaa").path()).unwrap_err();
        assert!(matches!(error, GgufError::Version { version: 7, .. }), "{error}");
    }
}
