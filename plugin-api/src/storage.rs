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

    /// Stores vectors under their keys, in place of what was there. When it returns, they survive a power cut; on an error none is stored.
    ///
    /// A namespace begins with its first vector, whose length all others must have. Vectors are compared by their direction alone.
    ///
    /// # Errors
    /// `InvalidArgument` for a vector of another length, of zeros only, or with what is no number, and for a name, a key or data that is too long.
    /// `Full` as in `put`.
    #[optional]
    async fn vectors_put(&self, cx: &Cx, namespace: String, vectors: Vec<Vector>) -> Result<()>;

    /// The stored vectors nearest to one, nearest first. May miss some of the nearest, as approximate indexes do; never gives one that was
    /// deleted before the call. A namespace without vectors has none to give.
    ///
    /// # Errors
    /// `InvalidArgument` as in `vectors_put`.
    #[optional]
    async fn vectors_find(&self, cx: &Cx, namespace: String, query: VectorQuery) -> Result<Vec<Near>>;

    /// Deletes vectors by their keys, or the whole namespace where `keys` is `None`; says how many there were. When it returns, they stay
    /// deleted through a power cut.
    #[optional]
    async fn vectors_delete(&self, cx: &Cx, namespace: String, keys: Option<Vec<String>>) -> Result<u64>;

    /// The newest known revision of a pointer: every place is asked, and what is not signed by its key is passed over.
    ///
    /// # Errors
    /// `NotFound`.
    #[optional]
    async fn pointer(&self, cx: &Cx, key: String) -> Result<Pointer>;

    /// The bytes that the holder of the key signs to move a pointer: its `signature` is not looked at. Asks nobody.
    ///
    /// # Errors
    /// `InvalidArgument` for what is no key, and for data of more than 48 bytes.
    #[optional]
    async fn pointer_payload(&self, cx: &Cx, pointer: Pointer) -> Result<Vec<u8>>;

    /// Moves a pointer, and has read it back when it returns.
    ///
    /// # Errors
    /// `InvalidArgument` for a wrong signature, and when a revision that is not older is known: the message names it.
    #[optional]
    async fn pointer_set(&self, cx: &Cx, pointer: Pointer) -> Result<()>;
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

/// A vector under a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Vector {
    /// Unique within the namespace, which is text of at most 128 bytes too.
    pub key: String,
    /// 1 to 4,096 numbers.
    pub values: Vec<f32>,
    /// Comes back with what is found: at most 4 KiB.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<u8>,
}

/// What is looked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VectorQuery {
    pub values: Vec<f32>,
    /// How many at most, up to 1,000.
    pub limit: u32,
    /// Only what is at least so similar: the cosine of the angle between the two, -1 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<f32>,
}

/// A stored vector that was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Near {
    pub key: String,
    /// The cosine of the angle between the two, -1 to 1.
    pub similarity: f32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<u8>,
}

/// Names a changing thing by a key: a small text of bytes, signed, of which the highest revision counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pointer {
    /// An Ed25519 public key, 64 lower-case hexadecimal digits.
    pub key: String,
    /// Each move has a higher one; below 2^48.
    pub revision: u64,
    /// At most 48 bytes; most often the id of a blob.
    pub data: Vec<u8>,
    /// 64 bytes, over [`Storage::pointer_payload`].
    pub signature: Vec<u8>,
}
