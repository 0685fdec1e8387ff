//! A blob that comes in from a task that must not block.

use std::sync::Arc;

use super::{Id, Incoming, Result, Store, Whole, blocking};

/// Small pieces are gathered up to this size, so that a trip to another thread is paid once for many.
const GATHER: usize = 256 << 10;

/// An incoming blob between two pieces. Where it is dropped unfinished, its file is removed, and that too may block.
pub struct Taking<B: AsRef<[u8]> + Send + 'static> {
    incoming: Option<Incoming>,
    gathered: Vec<B>,
    bytes: usize,
}

impl<B: AsRef<[u8]> + Send + 'static> Taking<B> {
    pub async fn begin(store: &Arc<Store>, expect: Option<Id>, size: Option<u64>) -> Result<Self> {
        let store = store.clone();
        let incoming = blocking(move || store.begin(expect, size)).await?;
        Ok(Self { incoming: Some(incoming), gathered: Vec::new(), bytes: 0 })
    }

    pub async fn write(mut self, piece: B) -> Result<Self> {
        // Any number of them would be gathered.
        if piece.as_ref().is_empty() {
            return Ok(self);
        }
        self.bytes += piece.as_ref().len();
        self.gathered.push(piece);
        if self.bytes < GATHER { Ok(self) } else { blocking(move || self.flush()).await }
    }

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
