//! Storage: blobs, addressed by what they contain.

use async_trait::async_trait;
use fabstir_plugin_macros::interface;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::abi::Blob;
use crate::context::Cx;
use crate::error::Result;
use crate::stream::Stream;

/// Keeps blobs by content id: the BLAKE3 hash of their bytes, as 64 lower-case hexadecimal digits.
///
/// Blobs never change, so calls may be repeated freely: `put` of bytes that are there already stores nothing and succeeds.
/// Streams of bytes travel in pieces of at most 1 MiB; where a blob is cut has no meaning.
#[interface(kind = "storage", version = "1.0")]
#[async_trait]
pub trait Storage: Send + Sync {
    /// Stores the bytes of `data` and returns their id and size.
    ///
    /// When it returns, the blob survives a power cut. On an error, on cancel, and when `data` ends with an error, nothing is stored.
    ///
    /// # Errors
    /// `InvalidArgument` when `expect` names another id than the bytes have. `Full` when there is no room; blobs that were there stay.
    async fn put(&self, cx: &Cx, expect: Expect, data: Stream<Blob>) -> Result<Entry>;

    /// The bytes of a blob, or of a part of it.
    ///
    /// A read of the whole blob is checked against its id: on a mismatch the stream ends with `Corrupt`, so a consumer that must
    /// not act on bad bytes waits for the end. A part is as trustworthy as the medium.
    ///
    /// # Errors
    /// `NotFound`. `InvalidArgument` when the range starts past the end.
    async fn get(&self, cx: &Cx, id: String, range: Range) -> Result<Stream<Blob>>;

    /// A blob's size, without its bytes.
    ///
    /// # Errors
    /// `NotFound`.
    async fn head(&self, cx: &Cx, id: String) -> Result<Entry>;

    /// Removes a blob and says whether it was there.
    async fn delete(&self, cx: &Cx, id: String) -> Result<bool>;

    /// Every blob that is stored, in order of id. Blobs put or deleted meanwhile may be missing or present.
    async fn list(&self, cx: &Cx) -> Result<Stream<Entry>>;
}

/// What the caller knows about the bytes it puts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Expect {
    /// The id that the bytes must turn out to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The size in bytes, where it is known ahead: lets a full disk be told before anything is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// A part of a blob. The default is all of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Range {
    /// The first byte, from 0.
    #[serde(default)]
    pub offset: u64,
    /// How many bytes; `None` reads to the end. A length past the end reads to the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
}

/// A stored blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Entry {
    /// BLAKE3 of the bytes, 64 lower-case hexadecimal digits.
    pub id: String,
    /// In bytes.
    pub size: u64,
}
