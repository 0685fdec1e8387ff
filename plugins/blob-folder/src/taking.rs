//! A blob that comes in from a task that must not block.

use std::sync::Arc;

use tokio::task::{JoinHandle, spawn_blocking};

use crate::{Ended, Id, Incoming, Result, Store, Whole};

/// Small pieces are gathered up to this size, so that a trip to another thread is paid once for many.
const GATHER: usize = 256 << 10;

/// An incoming blob between two pieces. Where it is dropped unfinished, its file is removed, and that too may block.
#[derive(Debug)]
pub struct Taking<B: AsRef<[u8]> + Send + 'static> {
    incoming: Option<Incoming>,
    gathered: Vec<B>,
    bytes: usize,
}

impl<B: AsRef<[u8]> + Send + 'static> Taking<B> {
    /// Begins to take a blob. `expect` and `size` are what is said about the bytes to come.
    ///
    /// # Errors
    /// As [`Store::begin`].
    pub async fn begin(store: &Arc<Store>, expect: Option<Id>, size: Option<u64>) -> Result<Self> {
        let store = store.clone();
        let incoming = blocking(move || store.begin(expect, size)).await?;
        Ok(Self { incoming: Some(incoming), gathered: Vec::new(), bytes: 0 })
    }

    /// Takes more of the bytes.
    ///
    /// # Errors
    /// As [`Incoming::write`], of these bytes or earlier ones.
    pub async fn write(mut self, piece: B) -> Result<Self> {
        // Any number of them would be gathered.
        if piece.as_ref().is_empty() {
            return Ok(self);
        }
        self.bytes += piece.as_ref().len();
        self.gathered.push(piece);
        if self.bytes < GATHER { Ok(self) } else { blocking(move || self.flush()).await }
    }

    /// Ends it, if it is what was expected.
    ///
    /// # Errors
    /// As [`Incoming::write`] and [`Incoming::finish`].
    pub async fn finish(self) -> Result<Whole> {
        blocking(move || self.flush()?.take().finish()).await
    }

    #[cfg(test)]
    pub fn gathered(&self) -> usize {
        self.gathered.len()
    }

    fn flush(mut self) -> Result<Self> {
        let mut incoming = self.take();
        self.bytes = 0;
        std::mem::take(&mut self.gathered).iter().try_for_each(|piece| incoming.write(piece.as_ref()))?;
        self.incoming = Some(incoming);
        Ok(self)
    }

    fn take(&mut self) -> Incoming {
        self.incoming.take().expect("it is taken by methods that consume this, or put it back")
    }
}

impl<B: AsRef<[u8]> + Send + 'static> Drop for Taking<B> {
    fn drop(&mut self) {
        if let Some(incoming) = self.incoming.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(move || drop(incoming));
        }
    }
}

/// Runs work that blocks on a thread that may.
///
/// # Errors
/// What it ends with, and [`Ended`] where the runtime does.
pub async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<Ended> + Send + 'static,
{
    finished(spawn_blocking(work)).await
}

/// Waits for work on a thread that may block.
///
/// # Errors
/// As [`blocking`].
pub async fn finished<T, E: From<Ended>>(work: JoinHandle<Result<T, E>>) -> Result<T, E> {
    match work.await {
        Ok(result) => result,
        Err(stopped) if stopped.is_panic() => std::panic::resume_unwind(stopped.into_panic()),
        Err(_) => Err(Ended.into()),
    }
}
