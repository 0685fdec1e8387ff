//! Bytes that only the holder of a key can read, in the chunks that S5 uses: each 256 KiB of plain text are sealed by XChaCha20-Poly1305
//! with the chunk's number as the nonce, little-endian, and grow by a tag of 16 bytes.
//!
//! A key seals one blob and no other: with a second one, equal nonces would meet. Chunks cannot be changed, swapped or moved unnoticed.
//! That whole chunks are missing at the end is not noticed here but by the blob's id.

use std::fmt;

use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::stream::Stream;
use futures::stream::try_unfold;
use zeroize::Zeroizing;

/// Bytes of plain text in a chunk.
const CHUNK: usize = 256 << 10;
/// Bytes by which a chunk grows.
const TAG: usize = 16;

/// The key of one sealed blob.
#[derive(Clone)]
pub struct Key(Zeroizing<[u8; 32]>);

impl Key {
    /// A fresh key.
    pub fn random() -> std::result::Result<Self, getrandom::Error> {
        let mut bytes = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *bytes)?;
        Ok(Self(bytes))
    }

    /// Reads 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = Zeroizing::new([0; 32]);
        hex::decode_to_slice(text, &mut *bytes).ok().map(|()| Self(bytes))
    }

    /// The key as 64 hexadecimal digits, for the one who shall keep it.
    pub fn reveal(&self) -> Zeroizing<String> {
        Zeroizing::new(hex::encode(*self.0))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// How many bytes so much plain text has when it is sealed.
pub fn sealed_size(size: u64) -> u64 {
    size + size.div_ceil(CHUNK as u64) * TAG as u64
}

/// Seals bytes as they come. The key must be a fresh one.
pub fn seal(plain: Stream<Blob>, key: &Key) -> Stream<Blob> {
    let cipher = XChaCha20Poly1305::new((&*key.0).into());
    in_chunks(plain, CHUNK, move |number, mut chunk| {
        // Fails for chunks of 256 GiB and more.
        let sealed = cipher.encrypt_in_place(&nonce(number), b"", &mut chunk);
        sealed.map_err(|_| PluginError::internal("a chunk is too large to be sealed"))?;
        Ok(chunk)
    })
}

/// Opens sealed bytes as they come. The stream ends with `Corrupt` at a chunk that this key did not seal in this place.
pub fn open(sealed: Stream<Blob>, key: &Key) -> Stream<Blob> {
    let cipher = XChaCha20Poly1305::new((&*key.0).into());
    in_chunks(sealed, CHUNK + TAG, move |number, mut chunk| {
        let opened = cipher.decrypt_in_place(&nonce(number), b"", &mut chunk);
        opened.map_err(|_| {
            PluginError::new(Code::Corrupt, "the bytes were not sealed with this key: give the one that `put --private` printed")
        })?;
        Ok(chunk)
    })
}

fn nonce(number: u64) -> XNonce {
    let mut nonce = XNonce::default();
    nonce[..8].copy_from_slice(&number.to_le_bytes());
    nonce
}

/// Cuts a stream into chunks of one size, the last one smaller, and gives what `work` makes of each with its number.
fn in_chunks(
    bytes: Stream<Blob>,
    size: usize,
    work: impl FnMut(u64, Vec<u8>) -> Result<Vec<u8>> + Send + 'static,
) -> Stream<Blob> {
    let state = (bytes, Blob::new(), 0, 0, work);
    Stream::new(try_unfold(state, move |(mut bytes, mut piece, mut used, number, mut work)| async move {
        let mut chunk = Vec::with_capacity(size + TAG);
        while chunk.len() < size {
            if used == piece.len() {
                let Some(next) = bytes.next().await.transpose()? else { break };
                (piece, used) = (next, 0);
                continue;
            }
            let now = (size - chunk.len()).min(piece.len() - used);
            chunk.extend_from_slice(&piece[used..used + now]);
            used += now;
        }
        if chunk.is_empty() {
            return Ok(None);
        }
        let chunk = work(number, chunk)?;
        Ok(Some((Blob::from(chunk), (bytes, piece, used, number + 1, work))))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(bytes: &[u8], piece: usize) -> Stream<Blob> {
        let pieces: Vec<Blob> = bytes.chunks(piece).map(Blob::from).collect();
        Stream::from_items(pieces)
    }

    async fn all(stream: Stream<Blob>) -> Result<Vec<u8>> {
        Ok(stream.collect().await?.iter().flat_map(|blob| blob.to_vec()).collect())
    }

    #[tokio::test]
    async fn bytes_of_any_size_come_back_and_the_size_is_known_ahead() {
        let key = Key::random().unwrap();
        for size in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7] {
            let plain: Vec<u8> = (0..size).map(|at| (at * 31 % 251) as u8).collect();
            let sealed = all(seal(stream(&plain, 100_003), &key)).await.unwrap();
            assert_eq!(sealed.len() as u64, sealed_size(size as u64));
            assert_eq!(all(open(stream(&sealed, 65_536), &key)).await.unwrap(), plain);
        }
    }

    #[tokio::test]
    async fn other_keys_and_changed_or_moved_chunks_open_nothing() {
        let key = Key::random().unwrap();
        let sealed = all(seal(stream(&vec![5; 2 * CHUNK], CHUNK), &key)).await.unwrap();
        let mut changed = sealed.clone();
        changed[CHUNK + TAG] ^= 1;
        let (first, second) = sealed.split_at(CHUNK + TAG);
        assert_ne!(first, second, "equal chunks do not look equal");
        for (what, bytes) in
            [("changed", changed.clone()), ("swapped", [second, first].concat()), ("cut", sealed[..sealed.len() - 1].to_vec())]
        {
            assert_eq!(all(open(stream(&bytes, CHUNK), &key)).await.unwrap_err().code, Code::Corrupt, "{what}");
        }
        let other = Key::random().unwrap();
        assert_eq!(all(open(stream(&sealed, CHUNK), &other)).await.unwrap_err().code, Code::Corrupt);
    }

    #[tokio::test]
    async fn chunks_are_those_that_libsodium_makes() {
        let key = Key::parse("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f").unwrap();
        let short = all(seal(stream(b"abc", 3), &key)).await.unwrap();
        assert_eq!(hex::encode(short), "f464eff38558fe6c891c797d3f4d8e12629267");
        // A chunk of zeros, and `d` with the nonce 1.
        let two = all(seal(stream(&[&[0; CHUNK][..], b"d"].concat(), CHUNK), &key)).await.unwrap();
        assert_eq!(hex::encode(&two[CHUNK + TAG..]), "de795ec2b1996491741efc6fa483eee1bd");
        let whole = <sha2::Sha256 as sha2::Digest>::digest(&two);
        assert_eq!(hex::encode(whole), "a2a976f4ada45fcf5a9b5ac1e217cfd13347c6006e831f335e4c4f3303c1a520");
    }

    #[test]
    fn key_is_read_back_and_never_shown() {
        let key = Key::random().unwrap();
        assert_eq!(*Key::parse(&key.reveal()).unwrap().0, *key.0);
        assert_eq!(format!("{key:?}"), "Key(..)");
        assert!(Key::parse("00").is_none() && Key::parse(&"zz".repeat(32)).is_none());
    }
}
