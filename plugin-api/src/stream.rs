//! Streams of items, within a plugin and across the boundary.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::StreamExt;
use tokio::sync::mpsc;

use crate::error::{PluginError, Result};
use crate::session::RemoteStream;

/// A sequence of items that arrive over time and may end with an error.
///
/// Dropping a stream tells its producer to stop. A consumer that does not read holds the producer back: nothing piles up.
/// A consumer stops at the first `Err` and at `None`: what a producer sends after an error is lost.
pub struct Stream<T>(Source<T>);

enum Source<T> {
    Channel(mpsc::Receiver<Result<T>>),
    Remote(RemoteStream<T>),
    Other(Pin<Box<dyn futures::Stream<Item = Result<T>> + Send>>),
}

impl<T: Send + 'static> Stream<T> {
    /// A channel that holds at most `capacity` items: the producer's half and the stream.
    pub fn channel(capacity: usize) -> (Sender<T>, Stream<T>) {
        let (sender, receiver) = mpsc::channel(capacity.max(1));
        (Sender(sender), Stream(Source::Channel(receiver)))
    }

    /// A stream over any other asynchronous sequence.
    pub fn new(items: impl futures::Stream<Item = Result<T>> + Send + 'static) -> Self {
        Self(Source::Other(Box::pin(items)))
    }

    /// A stream over items that are there already.
    pub fn from_items<I>(items: I) -> Self
    where
        I: IntoIterator<Item = T>,
        I::IntoIter: Send + 'static,
    {
        Self::new(futures::stream::iter(items.into_iter().map(Ok)))
    }

    pub(crate) fn remote(remote: RemoteStream<T>) -> Self {
        Self(Source::Remote(remote))
    }

    /// The next item; `None` at the end.
    pub async fn next(&mut self) -> Option<Result<T>> {
        StreamExt::next(self).await
    }

    /// Reads to the end and returns every item, or the first error.
    pub async fn collect(mut self) -> Result<Vec<T>> {
        let mut items = Vec::new();
        while let Some(item) = self.next().await {
            items.push(item?);
        }
        Ok(items)
    }
}

impl<T: Send + 'static> futures::Stream for Stream<T> {
    type Item = Result<T>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match &mut self.0 {
            Source::Channel(receiver) => receiver.poll_recv(context),
            Source::Remote(remote) => remote.poll_next(context),
            Source::Other(items) => items.as_mut().poll_next(context),
        }
    }
}

/// The producer's half of a [`Stream`].
///
/// Every way of sending fails with `Cancelled` once the consumer has gone: stop working then. Dropping the last sender ends the stream.
pub struct Sender<T>(mpsc::Sender<Result<T>>);

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Sender<T> {
    /// Sends one item, waiting while the consumer is behind.
    pub async fn send(&self, item: T) -> Result<()> {
        self.0.send(Ok(item)).await.map_err(|_| PluginError::cancelled())
    }

    /// Like `send`, for threads outside the runtime: blocks while the consumer is behind.
    pub fn blocking_send(&self, item: T) -> Result<()> {
        self.0.blocking_send(Ok(item)).map_err(|_| PluginError::cancelled())
    }

    /// Sends without waiting; hands the item back in `Ok(Some(item))` when there is no room.
    pub fn try_send(&self, item: T) -> Result<Option<T>> {
        match self.0.try_send(Ok(item)) {
            Ok(()) => Ok(None),
            Err(mpsc::error::TrySendError::Full(Ok(item))) => Ok(Some(item)),
            Err(_) => Err(PluginError::cancelled()),
        }
    }

    /// Ends the stream with an error, waiting while the consumer is behind.
    pub async fn fail(self, error: PluginError) {
        // A consumer that has gone does not need the error.
        let _ = self.0.send(Err(error)).await;
    }

    /// Like `fail`, for threads outside the runtime.
    pub fn blocking_fail(self, error: PluginError) {
        let _ = self.0.blocking_send(Err(error));
    }

    /// Like `fail`, without waiting: whether there was room for the error.
    pub fn try_fail(&self, error: PluginError) -> bool {
        self.0.try_send(Err(error)).is_ok()
    }

    /// Whether the consumer has gone.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Waits until the consumer has gone.
    pub async fn closed(&self) {
        self.0.closed().await;
    }
}
