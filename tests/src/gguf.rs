//! Model files that nobody should load. The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Writes a well-formed model whose one tensor takes `bytes`, which are not written: the file is as long as it says, with a hole.
pub fn announcing(path: &Path, bytes: u64) {
    const TEXT: u32 = 8;
    const U32: u32 = 4;
    let mut out = Vec::from(*b"GGUF");
    let u32s = |out: &mut Vec<u8>, value: u32| out.extend_from_slice(&value.to_le_bytes());
    let u64s = |out: &mut Vec<u8>, value: u64| out.extend_from_slice(&value.to_le_bytes());
    let text = |out: &mut Vec<u8>, text: &str| {
        u64s(out, text.len() as u64);
        out.extend_from_slice(text.as_bytes());
    };
    let numbers = [
        ("llama.block_count", 1),
        ("llama.embedding_length", 256),
        ("llama.context_length", 2048),
        ("llama.attention.head_count", 4),
        ("llama.feed_forward_length", 640),
    ];
    u32s(&mut out, 3);
    u64s(&mut out, 1);
    u64s(&mut out, 2 + numbers.len() as u64);
    text(&mut out, "general.architecture");
    u32s(&mut out, TEXT);
    text(&mut out, "llama");
    for (key, value) in numbers {
        text(&mut out, key);
        u32s(&mut out, U32);
        u32s(&mut out, value);
    }
    text(&mut out, "tokenizer.ggml.tokens");
    // An array: the type of its elements, their number, and they themselves.
    u32s(&mut out, 9);
    u32s(&mut out, TEXT);
    u64s(&mut out, 2);
    text(&mut out, "a");
    text(&mut out, "b");
    // One tensor of 32-bit floats at the start of the data.
    text(&mut out, "blk.0.ffn_up.weight");
    u32s(&mut out, 2);
    u64s(&mut out, 1 << 16);
    u64s(&mut out, bytes >> 18);
    u32s(&mut out, 0);
    u64s(&mut out, 0);
    let data = (out.len() as u64).next_multiple_of(32);
    let mut file = File::create(path).expect("a file can be made");
    file.write_all(&out).expect("a header can be written");
    file.set_len(data + bytes).expect("a file may have a hole");
}
