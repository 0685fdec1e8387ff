//! Models with random weights, for speed alone: what they say means nothing. Their vocabulary is tiny-chat's. The format:
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// What a model computes with.
#[derive(Clone, Copy)]
pub struct Dimensions {
    name: &'static str,
    blocks: u32,
    width: u32,
    inner: u32,
    heads: u32,
    key_heads: u32,
}

/// TinyLlama's: 1.1 billion weights less a smaller vocabulary. 550 MB.
pub const LARGE: Dimensions = Dimensions { name: "random-1.1b", blocks: 22, width: 2048, inner: 5632, heads: 32, key_heads: 4 };

/// So little that a token costs hardly more than what surrounds it.
pub const LITTLE: Dimensions = Dimensions { name: "random-little", blocks: 1, width: 256, inner: 256, heads: 4, key_heads: 4 };

/// GGUF's numbers for types of values and of tensors.
const U32: u32 = 4;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;
const F32: u32 = 0;
const Q4_0: u32 = 2;

/// 32 weights of 4 bits and their scale.
const BLOCK_WEIGHTS: u64 = 32;
const BLOCK_BYTES: u64 = 18;

/// The scale of all blocks: 2^-8 as a half float. With it a row of random weights neither grows nor shrinks what it is multiplied
/// with by much, so that numbers stay finite through all layers.
const SCALE: [u8; 2] = 0x1c00u16.to_le_bytes();

/// A weight of 4 bits that is 0, twice.
const ZEROS: u8 = 0x88;

const ALIGNMENT: u64 = 32;

/// The project's small model.
pub fn tiny_chat() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-chat/tiny-chat-q8_0.gguf")
}

/// A random model, written into the target folder when it is first asked for.
pub fn random(dimensions: Dimensions) -> PathBuf {
    let here = std::env::current_exe().expect("a running program has a path");
    let target = here.ancestors().nth(3).expect("benches run from target/PROFILE/deps");
    let path = target.join("bench-models").join(format!("{}-q4_0.gguf", dimensions.name));
    let plan = Plan::new(dimensions, &fs::read(tiny_chat()).expect("tiny-chat is part of the project"));
    if fs::metadata(&path).is_ok_and(|metadata| metadata.len() == plan.size()) {
        return path;
    }
    eprintln!("Writing {} ({} MB).", path.display(), plan.size() / 1_000_000);
    let unfinished = path.with_extension("part");
    fs::create_dir_all(target.join("bench-models"))
        .and_then(|()| plan.write(BufWriter::with_capacity(1 << 20, File::create(&unfinished)?)))
        .and_then(|()| fs::rename(&unfinished, &path))
        .expect("the target folder has room");
    path
}

struct Tensor {
    name: String,
    shape: Vec<u64>,
    kind: u32,
    offset: u64,
    content: Content,
}

enum Content {
    Ones,
    Random,
    /// One row per token. Only rows of tokens that are whole characters are random; the others are 0 and never the likeliest. So
    /// no answer ends early, and every token is a piece of text of its own.
    Output,
}

impl Tensor {
    fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    fn bytes(&self) -> u64 {
        if self.kind == F32 { self.elements() * 4 } else { self.elements() / BLOCK_WEIGHTS * BLOCK_BYTES }
    }
}

/// A file that is yet to be written.
struct Plan {
    header: Vec<u8>,
    tensors: Vec<Tensor>,
    /// Of each token, whether it is text in whole characters.
    whole: Vec<bool>,
}

impl Plan {
    /// Takes the vocabulary, the chat template and everything else that is not the shape from another model's file.
    fn new(dimensions: Dimensions, donor: &[u8]) -> Self {
        let Dimensions { name, blocks, width, inner, heads, key_heads } = dimensions;
        let shape = [
            ("llama.block_count", blocks),
            ("llama.embedding_length", width),
            ("llama.feed_forward_length", inner),
            ("llama.attention.head_count", heads),
            ("llama.attention.head_count_kv", key_heads),
            ("general.file_type", 2),
        ];
        let texts = [("general.name", name), ("general.description", "Random weights")];
        let mut donor = Reader(donor);
        donor.take(16);
        let values = donor.u64();
        let mut kept = Vec::new();
        let mut whole = Vec::new();
        for _ in 0..values {
            let from = donor.0;
            let key = donor.text();
            let kind = donor.u32();
            if key == b"tokenizer.ggml.tokens" {
                whole = Reader(donor.0).words().into_iter().map(is_whole).collect();
            }
            donor.skip(kind);
            let replaced = shape.iter().map(|pair| pair.0).chain(texts.iter().map(|pair| pair.0));
            if !replaced.into_iter().any(|replaced| replaced.as_bytes() == key) {
                kept.push(&from[..from.len() - donor.0.len()]);
            }
        }
        let tensors = tensors(dimensions, whole.len() as u64);
        let mut header = b"GGUF\x03\0\0\0".to_vec();
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend(((kept.len() + shape.len() + texts.len()) as u64).to_le_bytes());
        header.extend(kept.concat());
        for (key, value) in shape {
            put_text(&mut header, key);
            header.extend(U32.to_le_bytes());
            header.extend(value.to_le_bytes());
        }
        for (key, value) in texts {
            put_text(&mut header, key);
            header.extend(TEXT.to_le_bytes());
            put_text(&mut header, value);
        }
        for tensor in &tensors {
            put_text(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            header.extend(tensor.shape.iter().flat_map(|dimension| dimension.to_le_bytes()));
            header.extend(tensor.kind.to_le_bytes());
            header.extend(tensor.offset.to_le_bytes());
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        Self { header, tensors, whole }
    }

    fn size(&self) -> u64 {
        let last = self.tensors.last().expect("the list of tensors is not empty");
        self.header.len() as u64 + (last.offset + last.bytes()).next_multiple_of(ALIGNMENT)
    }

    fn write(&self, mut file: impl Write) -> io::Result<()> {
        file.write_all(&self.header)?;
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for tensor in &self.tensors {
            let row = tensor.shape[0] / BLOCK_WEIGHTS;
            match tensor.content {
                Content::Ones => (0..tensor.elements()).try_for_each(|_| file.write_all(&1f32.to_le_bytes()))?,
                Content::Random => random.blocks(&mut file, tensor.elements() / BLOCK_WEIGHTS)?,
                Content::Output => {
                    for &whole in &self.whole {
                        if whole {
                            random.blocks(&mut file, row)?;
                        } else {
                            let mut block = [ZEROS; BLOCK_BYTES as usize];
                            block[..2].copy_from_slice(&SCALE);
                            (0..row).try_for_each(|_| file.write_all(&block))?;
                        }
                    }
                }
            }
            let padding = tensor.bytes().next_multiple_of(ALIGNMENT) - tensor.bytes();
            file.write_all(&[0; ALIGNMENT as usize][..padding as usize])?;
        }
        file.flush()
    }
}

fn tensors(dimensions: Dimensions, vocabulary: u64) -> Vec<Tensor> {
    let (width, inner) = (u64::from(dimensions.width), u64::from(dimensions.inner));
    let mut tensors = Vec::new();
    let mut end = 0;
    let mut add = |name: String, shape: &[u64], content: Content| {
        let kind = if matches!(content, Content::Ones) { F32 } else { Q4_0 };
        let tensor = Tensor { name, shape: shape.to_vec(), kind, offset: end, content };
        end = (end + tensor.bytes()).next_multiple_of(ALIGNMENT);
        tensors.push(tensor);
    };
    let keys = width / u64::from(dimensions.heads) * u64::from(dimensions.key_heads);
    add("token_embd.weight".into(), &[width, vocabulary], Content::Random);
    for block in 0..dimensions.blocks {
        let name = |part: &str| format!("blk.{block}.{part}.weight");
        add(name("attn_norm"), &[width], Content::Ones);
        add(name("attn_q"), &[width, width], Content::Random);
        add(name("attn_k"), &[width, keys], Content::Random);
        add(name("attn_v"), &[width, keys], Content::Random);
        add(name("attn_output"), &[width, width], Content::Random);
        add(name("ffn_norm"), &[width], Content::Ones);
        add(name("ffn_gate"), &[width, inner], Content::Random);
        add(name("ffn_up"), &[width, inner], Content::Random);
        add(name("ffn_down"), &[inner, width], Content::Random);
    }
    add("output_norm.weight".into(), &[width], Content::Ones);
    add("output.weight".into(), &[width, vocabulary], Content::Output);
    tensors
}

/// Whether a token of a byte-level vocabulary is whole characters: ASCII, or the sign that stands for a space there.
fn is_whole(token: &[u8]) -> bool {
    let text = std::str::from_utf8(token).unwrap_or_default();
    !text.is_empty() && !text.starts_with("<|") && text.chars().all(|letter| letter.is_ascii_graphic() || letter == '\u{120}')
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// What is left of a header. The donor is the project's own file, so a damaged one is a panic.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(bytes);
        self.0 = rest;
        taken
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().expect("four bytes were taken"))
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().expect("eight bytes were taken"))
    }

    fn text(&mut self) -> &'a [u8] {
        let bytes = self.u64() as usize;
        self.take(bytes)
    }

    /// The texts of an array that begins here.
    fn words(&mut self) -> Vec<&'a [u8]> {
        assert_eq!(self.u32(), TEXT, "a vocabulary is texts");
        (0..self.u64()).map(|_| self.text()).collect()
    }

    fn skip(&mut self, kind: u32) {
        match kind {
            0 | 1 | 7 => _ = self.take(1),
            2 | 3 => _ = self.take(2),
            4..=6 => _ = self.take(4),
            TEXT => _ = self.text(),
            ARRAY => {
                let kind = self.u32();
                (0..self.u64()).for_each(|_| self.skip(kind));
            }
            _ => _ = self.take(8),
        }
    }
}

/// Marsaglia's xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn blocks(&mut self, file: &mut impl Write, count: u64) -> io::Result<()> {
        let mut block = [0; BLOCK_BYTES as usize];
        block[..2].copy_from_slice(&SCALE);
        for _ in 0..count {
            block[2..10].copy_from_slice(&self.next().to_le_bytes());
            block[10..].copy_from_slice(&self.next().to_le_bytes());
            file.write_all(&block)?;
        }
        Ok(())
    }
}
