//! Bytes written past the SDK: to the worker's standard error, and to its connection with the node.

use std::io::{self, Write};

use fabstir_plugin_api::frame::{Kind, Writer};
use fabstir_plugin_api::inference::{Chunk, Text};

/// The worker's socket is its standard input.
const SOCKET: libc::c_int = 0;

/// One line on standard error that never ends.
pub fn shout() -> ! {
    loop {
        // Whoever does not listen is shouted at all the same.
        let _ = io::stderr().write_all(&[b'a'; 4096]);
    }
}

/// Bytes that are no frames.
pub fn garbage() -> ! {
    let mut state = 1_u64;
    loop {
        let bytes: Vec<u8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as u8
            })
            .collect();
        write(&bytes);
    }
}

/// Well-formed frames that belong to no call: items of streams that were never opened, replies that nobody waits for.
pub fn frames() -> ! {
    loop {
        for (kind, id) in [(Kind::Item, 1_000_000), (Kind::Reply, 2_000_000), (Kind::End, 3_000_001), (Kind::Credit, 4_000_002)] {
            write(&frame(kind, id, 1));
        }
    }
}

/// For every stream that may be open one frame that claims more items than the node has ever granted.
pub fn overrun() {
    for id in (0..4000).step_by(2) {
        write(&frame(Kind::Item, id, 1 << 20));
    }
}

fn frame(kind: Kind, id: u64, count: u32) -> Vec<u8> {
    let mut writer = Writer::new(kind, id).count(count);
    let text = Text { text: "more ".repeat(200), tokens: 1, logprobs: Vec::new() };
    writer.value(&Chunk::Text(text)).expect("a text can be encoded");
    let frame = writer.finish();
    let mut bytes = Vec::from((frame.head.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&0_u32.to_le_bytes());
    bytes.extend_from_slice(&frame.head);
    bytes
}

/// Writes all of it, as fast as the node takes it. Ends the thread's work when the node has hung up.
fn write(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the pointer and the length are those of a live slice.
        let written = unsafe { libc::write(SOCKET, bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(written) {
            Ok(written) => bytes = &bytes[written..],
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
            // The node has closed the connection: what this thread was for is over, and the worker ends by itself.
            Err(_) => loop {
                std::thread::park();
            },
        }
    }
}
