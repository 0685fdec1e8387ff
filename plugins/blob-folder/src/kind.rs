//! The storage kind on top of a folder: translation only.

use std::sync::Arc;

use fabstir_plugin_api::prelude::*;
use tracing::warn;

use crate::{Found, Id, Reader, Store, Taking, blocking};

/// Pieces that a get reads ahead of its consumer: they are large, so fewer of them wait for a slow one than in a stream of tokens.
const READ_AHEAD: usize = 2;

/// Takes a blob and stores it.
///
/// # Errors
/// As [`Storage::put`].
pub async fn put(store: &Arc<Store>, cx: &Cx, expect: Expect, mut data: Stream<Blob>) -> Result<Entry> {
    let expected = expect.id.as_deref().map(Id::parse).transpose()?;
    let mut taking = Taking::begin(store, expected, expect.size).await?;
    while let Some(piece) = data.next().await {
        taking = taking.write(piece?).await?;
    }
    let whole = taking.finish().await?;
    let (store, cx) = (store.clone(), cx.clone());
    Ok(blocking(move || store.keep(whole, || !cx.is_cancelled())).await?.into())
}

/// Gives away what a reader reads.
pub fn pieces(mut reader: Reader) -> Stream<Blob> {
    let (sender, stream) = Stream::channel(READ_AHEAD);
    tokio::spawn(async move {
        loop {
            match blocking(move || reader.next_piece().map(|piece| (piece, reader))).await {
                Ok((Some(piece), rest)) => {
                    reader = rest;
                    if sender.send(Blob::from(piece)).await.is_err() {
                        return;
                    }
                }
                Ok((None, _)) => return,
                Err(error) => {
                    warn!(%error, "Read failed.");
                    return sender.fail(error.into()).await;
                }
            }
        }
    });
    stream
}

/// The size of a blob.
///
/// # Errors
/// As [`Storage::head`].
pub async fn head(store: &Arc<Store>, id: &str) -> Result<Entry> {
    let (id, store) = (Id::parse(id)?, store.clone());
    let size = blocking(move || store.size(id)).await?;
    Ok(Found { id, size }.into())
}

/// Removes a blob.
///
/// # Errors
/// As [`Storage::delete`].
pub async fn delete(store: &Arc<Store>, id: &str) -> Result<bool> {
    let (id, store) = (Id::parse(id)?, store.clone());
    Ok(blocking(move || store.delete(id)).await?)
}

/// All blobs, in order of id.
pub fn list(store: &Arc<Store>, cx: &Cx) -> Stream<Entry> {
    let mut folders = store.folders();
    let (sender, stream) = cx.stream();
    tokio::spawn(async move {
        loop {
            match blocking(move || folders.next_blobs().map(|blobs| (blobs, folders))).await {
                Ok((Some(blobs), rest)) => {
                    folders = rest;
                    for blob in blobs {
                        if sender.send(blob.into()).await.is_err() {
                            return;
                        }
                    }
                }
                Ok((None, _)) => return,
                Err(error) => return sender.fail(error.into()).await,
            }
        }
    });
    stream
}
