//! How a conversation looks on the wire: what another implementation must write and read.
//!
//! A conversation is one libp2p stream, negotiated under the name of its protocol (multistream-select), over noise and yamux on TCP or
//! over QUIC. What follows the negotiation:
//!
//! ```text
//! acceptor -> opener    status: 1 byte    0 accepted, 1 busy; any other value is an error
//! both directions       messages, then the end
//!
//! message = length | bytes     length: unsigned varint (LEB128), 1 to 1,048,576, in its shortest form, so 3 bytes at most
//! end     = 0x00               a length of zero: no more follows from this side
//! ```
//!
//! - The opener sends nothing before it has read the status. The acceptor sends it within 10 seconds; after a 1 it closes the stream.
//! - After its end, a side closes its half of the stream, and may go on reading. The conversation is over when both have ended.
//! - A half that is closed or reset without an end has been given up. So has a conversation in which a length is no varint in its
//!   shortest form or more than 1 MiB: who sees that resets the stream. The end is written out because a QUIC stream that is dropped
//!   looks as if it had been closed in order.

use std::io;

use futures::{AsyncRead, AsyncReadExt};

use crate::error::NetworkError;

/// The conversation may begin.
pub const ACCEPTED: u8 = 0;
/// The acceptor has no room for the conversation now.
pub const BUSY: u8 = 1;

/// The most bytes that a message may have.
pub const MESSAGE: usize = 1 << 20;

const END: u8 = 0;

/// How much room is made for a message before its bytes have come: a length alone costs its receiver no more than that.
const TRUST: usize = 64 << 10;

/// Appends a message.
pub fn put(message: &[u8], to: &mut Vec<u8>) -> Result<(), NetworkError> {
    if message.is_empty() || message.len() > MESSAGE {
        return Err(NetworkError::MessageSize(message.len()));
    }
    let mut length = message.len();
    while length >= 0x80 {
        to.push(length as u8 | 0x80);
        length >>= 7;
    }
    to.push(length as u8);
    to.extend_from_slice(message);
    Ok(())
}

/// Appends the end.
pub fn put_end(to: &mut Vec<u8>) {
    to.push(END);
}

/// Reads the next message; `None` at the end.
pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Option<Vec<u8>>, NetworkError> {
    let mut length = 0;
    for index in 0.. {
        let mut byte = [0];
        from.read_exact(&mut byte).await.map_err(broken)?;
        let [byte] = byte;
        length |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            if byte == 0 && index > 0 {
                return Err(NetworkError::Garbage("the length of a message is not written in its shortest form"));
            }
            break;
        }
        if index == 2 {
            return Err(NetworkError::Garbage("the length of a message is over 1 MiB"));
        }
    }
    match length {
        0 => return Ok(None),
        1..=MESSAGE => {}
        _ => return Err(NetworkError::Garbage("the length of a message is over 1 MiB")),
    }
    let mut message = Vec::new();
    while message.len() < length {
        let begin = message.len();
        // Doubles with what has come, so that nobody makes us reserve what is never sent.
        let room = (length - begin).min(begin.max(TRUST));
        message.reserve_exact(room);
        message.resize(begin + room, 0);
        from.read_exact(&mut message[begin..]).await.map_err(broken)?;
    }
    Ok(Some(message))
}

/// An error of the stream, for people.
pub fn broken(error: io::Error) -> NetworkError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => NetworkError::Broken("the peer gave it up".into()),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::WriteZero => {
            NetworkError::Broken("the peer gave it up, or the connection was lost".into())
        }
        _ => NetworkError::Broken(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;
    use futures::io::Cursor;

    use super::*;

    fn written(message: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put(message, &mut bytes).unwrap();
        bytes
    }

    fn read_all(bytes: &[u8]) -> Result<Vec<Vec<u8>>, NetworkError> {
        let mut from = Cursor::new(bytes);
        block_on(async {
            let mut messages = Vec::new();
            while let Some(message) = read(&mut from).await? {
                messages.push(message);
            }
            Ok(messages)
        })
    }

    #[test]
    fn the_bytes_are_those_that_are_documented() {
        assert_eq!(written(b"hi"), *b"\x02hi");
        assert_eq!(written(&[7; 127])[..2], [0x7f, 7]);
        assert_eq!(written(&[7; 128])[..3], [0x80, 0x01, 7]);
        assert_eq!(written(&[7; 300])[..3], [0xac, 0x02, 7]);
        assert_eq!(written(&vec![7; MESSAGE])[..4], [0x80, 0x80, 0x40, 7]);
        let mut end = Vec::new();
        put_end(&mut end);
        assert_eq!(end, [0]);
    }

    #[test]
    fn messages_come_back_as_they_went_in() {
        let sizes = [1, 2, 127, 128, 16_383, 16_384, 65_535, 65_536, 65_537, 200_000, MESSAGE - 1, MESSAGE];
        let messages: Vec<Vec<u8>> = sizes.iter().map(|size| (0..*size).map(|at| at as u8).collect()).collect();
        let mut bytes = Vec::new();
        for message in &messages {
            put(message, &mut bytes).unwrap();
        }
        put_end(&mut bytes);
        assert_eq!(read_all(&bytes).unwrap(), messages);
    }

    #[test]
    fn sizes_out_of_bounds_are_not_written() {
        let mut bytes = Vec::new();
        assert!(matches!(put(&[], &mut bytes), Err(NetworkError::MessageSize(0))));
        assert!(matches!(put(&vec![0; MESSAGE + 1], &mut bytes), Err(NetworkError::MessageSize(size)) if size == MESSAGE + 1));
        assert!(bytes.is_empty());
    }

    #[test]
    fn lengths_out_of_bounds_or_in_a_longer_form_are_garbage() {
        for bytes in [
            &[0x81, 0x80, 0x40][..],      // 1 MiB and one byte
            &[0xff, 0xff, 0x7f],          // the most that three bytes can say
            &[0xff, 0xff, 0xff, 0x01],    // four bytes
            &[0x80, 0x80, 0x80, 0x80, 0], // an endless one
            &[0x81, 0x00],                // 1, written in two bytes
            &[0x80, 0x00],                // an end, written in two bytes
        ] {
            assert!(matches!(read_all(bytes), Err(NetworkError::Garbage(_))), "{bytes:02x?}");
        }
    }

    #[test]
    fn what_stops_in_the_middle_was_given_up() {
        let whole = [written(&[9; 300]), written(b"x"), vec![0]].concat();
        assert_eq!(read_all(&whole).unwrap().len(), 2);
        for end in 0..whole.len() {
            assert!(matches!(read_all(&whole[..end]), Err(NetworkError::Broken(_))), "cut at {end}");
        }
    }

    #[test]
    fn no_bytes_make_the_reader_panic_or_reserve_what_never_comes() {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        let (mut ended, mut garbage, mut broken) = (0, 0, 0);
        for _ in 0..20_000 {
            let mut bytes: Vec<u8> = (0..next() % 40).map(|_| next() as u8).collect();
            // Small lengths are common, so that the reader gets past the first message.
            for byte in bytes.iter_mut() {
                if next() % 3 == 0 {
                    *byte %= 4;
                }
            }
            match read_all(&bytes) {
                Ok(messages) => {
                    assert!(messages.iter().all(|message| !message.is_empty() && message.len() <= 40));
                    ended += 1;
                }
                Err(NetworkError::Garbage(_)) => garbage += 1,
                Err(NetworkError::Broken(_)) => broken += 1,
                Err(other) => panic!("{other}"),
            }
        }
        assert!(ended > 100 && garbage > 100 && broken > 100, "{ended} {garbage} {broken}");
    }
}
