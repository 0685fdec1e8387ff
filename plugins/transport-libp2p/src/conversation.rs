//! One conversation: messages of two streams, to and from a peer.
//!
//! The direction to the peer is a task, which gathers what is ready into one write. The other one reads only when it is asked for a
//! message, so a consumer that does not read holds the peer back without a byte piling up here but what the connection grants.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use fabstir_plugin_api::prelude::{Blob, PluginError, Result, Stream};
use futures::io::BufReader;
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::error::NetworkError;
use crate::messages::{self, ACCEPTED, BUSY};

/// Small messages are gathered up to this size, so that a write is paid once for many.
const GATHER: usize = 64 << 10;

/// What a buffer may keep once it is written, after large messages.
const KEEP: usize = 2 * GATHER;

/// How much is read at once where messages are small.
const READ: usize = 16 << 10;

/// How long the acceptor may take to say whether it accepts; a little more than the 10 seconds that it has.
const ANSWER: Duration = Duration::from_secs(13);

/// A stream to a peer, shared by both directions and dropped by whichever gives up first.
pub struct Line(Arc<Mutex<Option<Held>>>);

struct Held {
    stream: libp2p::Stream,
    /// The stream's place among those that the peer, or we, may have open.
    _permit: OwnedSemaphorePermit,
}

impl Line {
    pub fn new(stream: libp2p::Stream, permit: OwnedSemaphorePermit) -> Self {
        Self(Arc::new(Mutex::new(Some(Held { stream, _permit: permit }))))
    }

    fn share(&self) -> Self {
        Self(self.0.clone())
    }

    /// Resets the stream, whoever else holds the line.
    fn hang_up(&self) {
        drop(self.0.lock().take());
    }

    fn with<T>(&self, work: impl FnOnce(Pin<&mut libp2p::Stream>) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match self.0.lock().as_mut() {
            Some(held) => work(Pin::new(&mut held.stream)),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Waits until the peer has said whether it accepts the conversation that we began.
    pub async fn accepted(&mut self) -> Result<(), NetworkError> {
        let mut status = [0];
        match timeout(ANSWER, self.read_exact(&mut status)).await {
            Err(_) => Err(NetworkError::Broken("the peer did not say whether it accepts".into())),
            Ok(Err(error)) => Err(messages::broken(error)),
            Ok(Ok(())) => match status {
                [ACCEPTED] => Ok(()),
                [BUSY] => Err(NetworkError::Busy),
                _ => Err(NetworkError::Garbage("neither accepted nor busy")),
            },
        }
    }

    /// Tells the peer that its conversation is accepted.
    pub async fn accept(&mut self, limit: Duration) -> Result<(), NetworkError> {
        let told = timeout(limit, async {
            self.write_all(&[ACCEPTED]).await?;
            self.flush().await
        });
        told.await.map_err(|_| NetworkError::Stalled(limit))?.map_err(messages::broken)
    }

    /// Tells the peer that there is no room for its conversation.
    pub async fn refuse(mut self, limit: Duration) {
        // A peer that does not want to know is not told.
        let _ = timeout(limit, async {
            self.write_all(&[BUSY]).await?;
            self.close().await
        })
        .await;
    }

    /// Waits until the peer gives up a conversation that waits; it may send nothing before it is accepted.
    pub async fn given_up(&mut self) {
        let mut byte = [0];
        let _ = self.read(&mut byte).await;
    }
}

impl AsyncRead for Line {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Line {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|stream| stream.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_flush(context))
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|stream| stream.poll_close(context))
    }
}

/// Begins a conversation on a line that both sides have agreed on: `outgoing` goes to the peer, what it sends comes back.
pub fn begin(line: Line, outgoing: Stream<Blob>, stall: Duration) -> Stream<Blob> {
    let (failed, failure) = oneshot::channel();
    let writing = line.share();
    let sender = tokio::spawn(async move {
        let mut writing = writing;
        if let Err(error) = send(outgoing, &mut writing, stall).await {
            writing.hang_up();
            // Nobody hears of it where the other direction is over.
            let _ = failed.send(error);
        }
    });
    let incoming = Incoming {
        line: line.share(),
        reader: BufReader::with_capacity(READ, line),
        failure,
        sender: sender.abort_handle(),
        state: State::Open,
    };
    Stream::new(futures::stream::unfold(incoming, |mut incoming| async move {
        let item = incoming.next().await?;
        Some((item, incoming))
    }))
}

async fn send(mut outgoing: Stream<Blob>, line: &mut Line, stall: Duration) -> Result<(), NetworkError> {
    let mut bytes = Vec::new();
    let mut ended = false;
    while !ended {
        let mut next = outgoing.next().await;
        loop {
            match next {
                Some(Ok(message)) => messages::put(&message, &mut bytes)?,
                Some(Err(error)) => return Err(NetworkError::GivenUp(error.message)),
                None => {
                    messages::put_end(&mut bytes);
                    ended = true;
                    break;
                }
            }
            if bytes.len() >= GATHER {
                break;
            }
            match futures::poll!(std::pin::pin!(outgoing.next())) {
                Poll::Ready(ready) => next = ready,
                Poll::Pending => break,
            }
        }
        write(&bytes, line, stall).await?;
        bytes.clear();
        if bytes.capacity() > KEEP {
            bytes = Vec::new();
        }
    }
    // The end has been written. A peer that has read it may drop the stream at once, before it is closed.
    let _ = limited(line.close(), stall).await;
    Ok(())
}

/// Writes and flushes; as long as some of it is taken now and then, it may take as long as it will.
async fn write(mut bytes: &[u8], line: &mut Line, stall: Duration) -> Result<(), NetworkError> {
    while !bytes.is_empty() {
        let written = limited(line.write(bytes), stall).await?;
        if written == 0 {
            return Err(messages::broken(io::ErrorKind::WriteZero.into()));
        }
        bytes = &bytes[written..];
    }
    limited(line.flush(), stall).await
}

async fn limited<T>(work: impl Future<Output = io::Result<T>>, stall: Duration) -> Result<T, NetworkError> {
    timeout(stall, work).await.map_err(|_| NetworkError::Stalled(stall))?.map_err(messages::broken)
}

/// The direction from the peer. Dropping it before its end gives the conversation up.
struct Incoming {
    line: Line,
    reader: BufReader<Line>,
    /// Why the other direction failed.
    failure: oneshot::Receiver<NetworkError>,
    sender: AbortHandle,
    state: State,
}

#[derive(PartialEq)]
enum State {
    Open,
    /// The peer has said that no more follows. The other direction goes on.
    Ended,
    Failed,
}

impl Incoming {
    async fn next(&mut self) -> Option<Result<Blob>> {
        if self.state != State::Open {
            return None;
        }
        let read = tokio::select! {
            // What the other direction knows is closer to the cause than what it does to this one.
            biased;
            Ok(error) = &mut self.failure, if !self.failure.is_terminated() => Err(error),
            read = messages::read(&mut self.reader) => read,
        };
        match read {
            Ok(Some(message)) => Some(Ok(message.into())),
            Ok(None) => {
                self.state = State::Ended;
                None
            }
            Err(error) => {
                let error = self.failure.try_recv().unwrap_or(error);
                self.state = State::Failed;
                self.give_up();
                Some(Err(PluginError::from(error)))
            }
        }
    }

    fn give_up(&self) {
        self.sender.abort();
        self.line.hang_up();
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if self.state != State::Ended {
            self.give_up();
        }
    }
}
