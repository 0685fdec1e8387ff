//! Frames: what travels through a port, whichever carrier bears it.
//!
//! A head is one MessagePack map with short keys, so that either side may add keys that the other ignores:
//!
//! | key | meaning | in |
//! | --- | --- | --- |
//! | `k` | kind: `call`, `reply`, `item`, `end`, `credit`, `cancel`, `log` | all |
//! | `i` | call id: even when the host called, odd when the plugin did | all but `log` |
//! | `m` | method, `kind.name` | `call` |
//! | `d` | milliseconds left for the call | `call` |
//! | `t` | W3C `traceparent` | `call` |
//! | `n` | items in `b`, or items of credit granted | `item`, `call`, `credit` |
//! | `e` | MessagePack of a `PluginError`, as bytes | `reply`, `end` |
//! | `b` | the body: MessagePack values one after the other, as bytes | `call`, `reply`, `item`, `log` |
//!
//! Where a method takes or returns a [`Blob`], the body holds the blob's index and the bytes travel beside the head.

use std::ops::Range;
use std::sync::Arc;

use rmp::Marker;
use rmp::encode as write;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::abi::{Blob, Closed, Frame, Received};
use crate::error::{PluginError, Result};

/// The largest head, in bytes. Larger values travel as blobs or in several items.
pub const MAX_HEAD: usize = 16 << 20;
/// The largest blob, in bytes.
pub const MAX_BLOB: usize = 512 << 20;
/// The longest message of an error, in bytes; a longer one is cut.
const MAX_MESSAGE: usize = 64 << 10;
/// The most blobs in one frame.
pub const MAX_BLOBS: usize = 1024;

/// Takes frames that come from the other end.
///
/// Called on the other end's threads: an implementation must not block and must not run an author's code.
pub trait Inbox: Send + Sync {
    fn deliver(&self, frame: Received) -> std::result::Result<(), Closed>;
    fn close(&self, reason: &str);
}

impl<T: Inbox + ?Sized> Inbox for Arc<T> {
    fn deliver(&self, frame: Received) -> std::result::Result<(), Closed> {
        (**self).deliver(frame)
    }
    fn close(&self, reason: &str) {
        (**self).close(reason)
    }
}

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Starts a call.
    Call,
    /// Answers a call, once: with a value, with an error, or with the news that a stream follows.
    Reply,
    /// Items of a call's stream: downwards from the one who serves, upwards from the one who called.
    Item,
    /// The end of a stream.
    End,
    /// Leave to send more items.
    Credit,
    /// From the caller: it has given up. From the one who serves: it reads no more of the caller's stream.
    Cancel,
    /// A log record.
    Log,
    /// Of a newer version: ignored.
    Unknown,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Call => "call",
            Kind::Reply => "reply",
            Kind::Item => "item",
            Kind::End => "end",
            Kind::Credit => "credit",
            Kind::Cancel => "cancel",
            Kind::Log => "log",
            Kind::Unknown => "unknown",
        }
    }

    fn of(name: &[u8]) -> Self {
        match name {
            b"call" => Kind::Call,
            b"reply" => Kind::Reply,
            b"item" => Kind::Item,
            b"end" => Kind::End,
            b"credit" => Kind::Credit,
            b"cancel" => Kind::Cancel,
            b"log" => Kind::Log,
            _ => Kind::Unknown,
        }
    }
}

/// A frame being written. Fields other than the body come first; the body grows value by value.
pub struct Writer {
    frame: Frame,
    /// How many keys the map has so far; written over the map's marker at the end.
    keys: u8,
    /// Where the body's length stands, once it was begun.
    body: Option<usize>,
    count_at: Option<usize>,
}

const EXPECT_VEC: &str = "writing to a Vec does not fail";

impl Writer {
    pub fn new(kind: Kind, id: u64) -> Self {
        let mut head = Vec::with_capacity(96);
        // A fixmap marker, corrected in `finish`: no frame has 16 keys.
        head.push(0x80);
        let mut writer = Self { frame: Frame { head, blobs: Vec::new() }, keys: 0, body: None, count_at: None };
        writer.key("k");
        write::write_str(&mut writer.frame.head, kind.name()).expect(EXPECT_VEC);
        if kind != Kind::Log {
            writer.uint("i", id);
        }
        writer
    }

    fn key(&mut self, key: &str) {
        debug_assert!(self.body.is_none(), "the body is the last key");
        self.keys += 1;
        write::write_str(&mut self.frame.head, key).expect(EXPECT_VEC);
    }

    fn uint(&mut self, key: &str, value: u64) {
        self.key(key);
        write::write_uint(&mut self.frame.head, value).expect(EXPECT_VEC);
    }

    pub fn method(mut self, method: &str) -> Self {
        self.key("m");
        write::write_str(&mut self.frame.head, method).expect(EXPECT_VEC);
        self
    }

    pub fn deadline_ms(mut self, left: Option<u64>) -> Self {
        if let Some(left) = left {
            self.uint("d", left);
        }
        self
    }

    pub fn traceparent(mut self, traceparent: Option<&str>) -> Self {
        if let Some(traceparent) = traceparent {
            self.key("t");
            write::write_str(&mut self.frame.head, traceparent).expect(EXPECT_VEC);
        }
        self
    }

    pub fn count(mut self, count: u32) -> Self {
        self.uint("n", count.into());
        self
    }

    /// Leaves room for a count that `set_count` fills in.
    pub fn count_later(mut self) -> Self {
        self.key("n");
        write::write_u32(&mut self.frame.head, 0).expect(EXPECT_VEC);
        self.count_at = Some(self.frame.head.len() - 4);
        self
    }

    pub fn set_count(&mut self, count: u32) {
        if let Some(at) = self.count_at {
            self.frame.head[at..at + 4].copy_from_slice(&count.to_be_bytes());
        }
    }

    pub fn error(mut self, error: &PluginError) -> Self {
        let mut error = error.clone();
        if error.message.len() > MAX_MESSAGE {
            error.message = error.message.chars().take(MAX_MESSAGE / 4).collect();
        }
        let bytes = rmp_serde::to_vec_named(&error).unwrap_or_default();
        self.key("e");
        write::write_bin(&mut self.frame.head, &bytes).expect(EXPECT_VEC);
        self
    }

    fn begin_body(&mut self) {
        if self.body.is_none() {
            self.key("b");
            self.frame.head.push(Marker::Bin32.to_u8());
            self.body = Some(self.frame.head.len());
            self.frame.head.extend_from_slice(&[0; 4]);
        }
    }

    /// Appends a value to the body.
    pub fn value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<()> {
        self.begin_body();
        let before = self.frame.head.len();
        let mut serializer = rmp_serde::Serializer::new(&mut self.frame.head).with_struct_map();
        if let Err(error) = value.serialize(&mut serializer) {
            self.frame.head.truncate(before);
            return Err(PluginError::invalid(format!("a value cannot be encoded: {error}")));
        }
        Ok(())
    }

    /// Appends a blob: its bytes beside the head, its index in the body.
    pub fn blob(&mut self, blob: Blob) -> Result<()> {
        let index = self.frame.blobs.len();
        if index >= MAX_BLOBS || blob.len() > MAX_BLOB {
            return Err(PluginError::invalid(format!("a blob of {} bytes is over the limit of {MAX_BLOB}", blob.len())));
        }
        self.value(&(index as u32))?;
        self.frame.blobs.push(blob);
        Ok(())
    }

    /// Bytes in the frame so far, blobs included.
    pub fn size(&self) -> usize {
        self.frame.head.len() + self.frame.blobs.iter().map(|blob| blob.len()).sum::<usize>()
    }

    pub fn finish(mut self) -> Frame {
        if let Some(at) = self.body {
            let length = (self.frame.head.len() - at - 4) as u32;
            self.frame.head[at..at + 4].copy_from_slice(&length.to_be_bytes());
        }
        self.frame.head[0] = 0x80 | self.keys;
        self.frame
    }
}

/// A frame's head, read without touching the body.
#[derive(Debug, Clone)]
pub struct Head {
    pub kind: Kind,
    pub id: u64,
    pub method: Range<usize>,
    pub deadline_ms: Option<u64>,
    pub traceparent: Range<usize>,
    pub count: Option<u64>,
    pub error: Option<PluginError>,
    pub body: Range<usize>,
}

impl Head {
    /// Reads a head. Unknown keys are skipped.
    ///
    /// # Errors
    /// `Protocol` when the bytes are not a head: too long, not a map, cut off, or without a kind.
    pub fn read(bytes: &[u8]) -> Result<Head> {
        if bytes.len() > MAX_HEAD {
            return Err(PluginError::protocol(format!("a frame head of {} bytes is over the limit of {MAX_HEAD}", bytes.len())));
        }
        let mut cursor = Cursor { bytes, at: 0 };
        let keys = cursor.map()?;
        let mut kind = None;
        let mut head = Head {
            kind: Kind::Unknown,
            id: 0,
            method: 0..0,
            deadline_ms: None,
            traceparent: 0..0,
            count: None,
            error: None,
            body: 0..0,
        };
        for _ in 0..keys {
            let key = cursor.string()?;
            match &bytes[key] {
                b"k" => kind = Some(Kind::of(&bytes[cursor.string()?])),
                b"i" => head.id = cursor.uint()?,
                b"m" => head.method = cursor.string()?,
                b"d" => head.deadline_ms = Some(cursor.uint()?),
                b"t" => head.traceparent = cursor.string()?,
                b"n" => head.count = Some(cursor.uint()?),
                b"e" => {
                    let error = cursor.binary()?;
                    head.error = Some(rmp_serde::from_slice(&bytes[error]).map_err(|_| malformed("an error"))?);
                }
                b"b" => head.body = cursor.binary()?,
                _ => cursor.skip(0)?,
            }
        }
        head.kind = kind.ok_or_else(|| malformed("a kind"))?;
        Ok(head)
    }
}

fn malformed(what: &str) -> PluginError {
    PluginError::protocol(format!("a frame head is malformed: {what} was expected"))
}

/// Steps over MessagePack without building values.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn take(&mut self, length: usize) -> Result<Range<usize>> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len()).ok_or_else(|| malformed("more bytes"))?;
        let range = self.at..end;
        self.at = end;
        Ok(range)
    }

    fn big_endian(&mut self, length: usize) -> Result<u64> {
        let range = self.take(length)?;
        Ok(self.bytes[range].iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn marker(&mut self) -> Result<Marker> {
        let range = self.take(1)?;
        Ok(Marker::from_u8(self.bytes[range.start]))
    }

    fn map(&mut self) -> Result<u64> {
        match self.marker()? {
            Marker::FixMap(keys) => Ok(keys.into()),
            Marker::Map16 => self.big_endian(2),
            _ => Err(malformed("a map")),
        }
    }

    fn string(&mut self) -> Result<Range<usize>> {
        let length = match self.marker()? {
            Marker::FixStr(length) => length.into(),
            Marker::Str8 => self.big_endian(1)?,
            Marker::Str16 => self.big_endian(2)?,
            Marker::Str32 => self.big_endian(4)?,
            _ => return Err(malformed("a string")),
        };
        self.take(length as usize)
    }

    fn binary(&mut self) -> Result<Range<usize>> {
        let length = match self.marker()? {
            Marker::Bin8 => self.big_endian(1)?,
            Marker::Bin16 => self.big_endian(2)?,
            Marker::Bin32 => self.big_endian(4)?,
            _ => return Err(malformed("bytes")),
        };
        self.take(length as usize)
    }

    fn uint(&mut self) -> Result<u64> {
        match self.marker()? {
            Marker::FixPos(value) => Ok(value.into()),
            Marker::U8 => self.big_endian(1),
            Marker::U16 => self.big_endian(2),
            Marker::U32 => self.big_endian(4),
            Marker::U64 => self.big_endian(8),
            _ => Err(malformed("an unsigned integer")),
        }
    }

    fn skip(&mut self, depth: u32) -> Result<()> {
        if depth > 32 {
            return Err(malformed("less nesting"));
        }
        let (length, values) = match self.marker()? {
            Marker::FixPos(_) | Marker::FixNeg(_) | Marker::Null | Marker::True | Marker::False | Marker::Reserved => (0, 0),
            Marker::U8 | Marker::I8 => (1, 0),
            Marker::U16 | Marker::I16 | Marker::FixExt1 => (2, 0),
            Marker::FixExt2 => (3, 0),
            Marker::U32 | Marker::I32 | Marker::F32 => (4, 0),
            Marker::FixExt4 => (5, 0),
            Marker::U64 | Marker::I64 | Marker::F64 => (8, 0),
            Marker::FixExt8 => (9, 0),
            Marker::FixExt16 => (17, 0),
            Marker::FixStr(length) => (length.into(), 0),
            Marker::Str8 | Marker::Bin8 => (self.big_endian(1)?, 0),
            Marker::Str16 | Marker::Bin16 => (self.big_endian(2)?, 0),
            Marker::Str32 | Marker::Bin32 => (self.big_endian(4)?, 0),
            Marker::Ext8 => (self.big_endian(1)? + 1, 0),
            Marker::Ext16 => (self.big_endian(2)? + 1, 0),
            Marker::Ext32 => (self.big_endian(4)? + 1, 0),
            Marker::FixArray(count) => (0, count.into()),
            Marker::Array16 => (0, self.big_endian(2)?),
            Marker::Array32 => (0, self.big_endian(4)?),
            Marker::FixMap(count) => (0, 2 * u64::from(count)),
            Marker::Map16 => (0, 2 * self.big_endian(2)?),
            Marker::Map32 => (0, 2 * self.big_endian(4)?),
        };
        self.take(length as usize)?;
        for _ in 0..values {
            self.skip(depth + 1)?;
        }
        Ok(())
    }
}

/// Reads the values of a body, one after the other.
pub struct Reader {
    received: Received,
    rest: Range<usize>,
}

impl Reader {
    pub fn new(received: Received, body: Range<usize>) -> Self {
        Self { received, rest: body }
    }

    pub(crate) fn head(&self) -> &[u8] {
        self.received.head()
    }

    /// The next value.
    ///
    /// # Errors
    /// `Protocol` when there is none, or it is not what the method takes.
    pub fn value<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut bytes = &self.received.head()[self.rest.clone()];
        let before = bytes.len();
        let mut deserializer = rmp_serde::Deserializer::new(&mut bytes);
        let value = T::deserialize(&mut deserializer);
        drop(deserializer);
        self.rest.start += before - bytes.len();
        value.map_err(|error| PluginError::protocol(format!("a value cannot be read: {error}")))
    }

    /// The next value, a blob.
    pub fn blob(&mut self) -> Result<Blob> {
        let index: u32 = self.value()?;
        self.received
            .take_blob(index as usize)
            .ok_or_else(|| PluginError::protocol("a frame refers to a blob that it does not carry"))
    }
}

/// How values of one type travel: as MessagePack, or as a blob.
pub trait Codec {
    type Item: Send + 'static;
    /// Items of a stream that may be under way unread.
    const WINDOW: u32;
    fn put(item: Self::Item, writer: &mut Writer) -> Result<()>;
    fn take(reader: &mut Reader) -> Result<Self::Item>;
    fn schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema;
}

/// Values that travel inside the head.
pub struct Plain<T>(std::marker::PhantomData<T>);

impl<T: Serialize + DeserializeOwned + schemars::JsonSchema + Send + 'static> Codec for Plain<T> {
    type Item = T;
    const WINDOW: u32 = crate::session::WINDOW;

    fn put(item: T, writer: &mut Writer) -> Result<()> {
        writer.value(&item)
    }

    fn take(reader: &mut Reader) -> Result<T> {
        reader.value()
    }

    fn schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        generator.subschema_for::<T>()
    }
}

/// Bytes that travel beside the head.
pub struct Blobs;

impl Codec for Blobs {
    type Item = Blob;
    const WINDOW: u32 = crate::session::BLOB_WINDOW;

    fn put(item: Blob, writer: &mut Writer) -> Result<()> {
        writer.blob(item)
    }

    fn take(reader: &mut Reader) -> Result<Blob> {
        reader.blob()
    }

    fn schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "contentEncoding": "binary" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Frame {
        let mut writer = Writer::new(Kind::Call, 7).method("storage.head").deadline_ms(Some(1500)).count(64);
        writer.value("an id").expect("encodes");
        writer.blob(Blob::from(&b"bytes"[..])).expect("fits");
        writer.finish()
    }

    #[test]
    fn a_head_reads_back_as_it_was_written() {
        let received = Received::from(call());
        let head = Head::read(received.head()).expect("reads");
        assert_eq!((head.kind, head.id, head.deadline_ms, head.count), (Kind::Call, 7, Some(1500), Some(64)));
        assert_eq!(&received.head()[head.method.clone()], b"storage.head");
        let mut reader = Reader::new(received, head.body);
        assert_eq!(reader.value::<String>().expect("a string"), "an id");
        assert_eq!(&*reader.blob().expect("a blob"), b"bytes");
        assert!(reader.value::<String>().is_err());
    }

    #[test]
    fn the_bytes_of_a_head_never_change() {
        let golden = "86a16ba463616c6ca16907a16dac73746f726167652e68656164a164cd05dca16e40a162c600000007a5616e20696400";
        let written: String = call().head.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(written, golden);
    }

    #[test]
    fn unknown_keys_and_kinds_are_ignored() {
        let value = serde_json::json!({ "k": "later", "i": 3, "zz": { "deep": [1, [2.5, null, "x"]] } });
        let head = Head::read(&rmp_serde::to_vec_named(&value).expect("encodes")).expect("reads");
        assert_eq!((head.kind, head.id), (Kind::Unknown, 3));
    }

    #[test]
    fn a_head_cut_anywhere_or_filled_with_garbage_is_an_error_and_no_panic() {
        let frame = call();
        for end in 0..frame.head.len() {
            assert!(Head::read(&frame.head[..end]).is_err(), "cut at {end}");
        }
        let mut state = 1u64;
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..48)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 33) as u8
                })
                .collect();
            let _ = Head::read(&bytes);
        }
        let deep: Vec<u8> = [&[0x81, 0xa1, b'z'][..], &[0x91; 100_000][..]].concat();
        assert!(Head::read(&deep).is_err());
    }
}
