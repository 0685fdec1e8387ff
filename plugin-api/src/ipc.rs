//! The same port over a socket: frames between the host and a plugin in a worker process.
//!
//! Both ends are tasks of the runtimes that serve the calls, so that a call changes threads as often as in one process: once on its
//! way there, once on its way back. In a worker that is the plugin's own runtime, which makes the bytes below, like the port's
//! layout, a promise between separately compiled programs.
//!
//! On the wire a frame is a header of two little-endian `u32`s, the head's length and the number of blobs, then one `u32` per blob
//! with its length, then the head, then the blobs. A head length of `u32::MAX` says goodbye: a reason follows, with its length where
//! the number of blobs stands. Frames that arrive are handed on by the task that reads the socket. Frames that leave are written at
//! once by whoever sends them, as far as the socket takes them; the rest waits for a writer task.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

use crate::abi::{Blob, Closed, Frame, Port, Received};
use crate::frame::{Inbox, MAX_BLOB, MAX_BLOBS, MAX_HEAD};
use crate::session::Session;

/// The reason that `inbox` is closed with when the peer ends without a goodbye.
pub const ENDED: &str = "the worker process ended";

const GOODBYE: u32 = u32::MAX;
/// Bytes that may wait for a peer that does not read. Credit keeps a healthy peer far below.
const MAX_QUEUED: usize = 1 << 30;

/// Carries the frames of a session over `socket`. Must be called on the runtime that is to drive the socket.
///
/// When the peer says goodbye or is gone, the session is closed with the reason.
pub fn carry(socket: UnixStream, session: &Session) {
    let (reader, writer) = socket.into_split();
    let out = Arc::new(Out { socket: writer, queue: Mutex::default(), more: Notify::new(), closed: AtomicBool::new(false) });
    // Before the first frame is read: its answer needs a way back.
    session.attach(Port::new(out.clone()));
    tokio::spawn(write_queued(out.clone()));
    let inbox = session.inbox();
    tokio::spawn(async move {
        let reason = read(reader, &inbox).await;
        out.end();
        inbox.close(&reason);
    });
}

/// The bytes that say goodbye, for an end that has no session yet.
pub fn goodbye(reason: &str) -> Vec<u8> {
    let mut bytes = GOODBYE.to_le_bytes().to_vec();
    bytes.extend_from_slice(&(reason.len() as u32).to_le_bytes());
    bytes.extend_from_slice(reason.as_bytes());
    bytes
}

struct Out {
    socket: OwnedWriteHalf,
    queue: Mutex<Queue>,
    more: Notify,
    closed: AtomicBool,
}

#[derive(Default)]
struct Queue {
    bytes: VecDeque<Vec<u8>>,
    /// How much of the first entry has been written.
    written: usize,
    total: usize,
}

impl Out {
    fn end(&self) {
        self.closed.store(true, Ordering::Release);
        self.more.notify_one();
    }

    fn send(&self, parts: &[&[u8]]) -> Result<(), Closed> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Closed);
        }
        let mut queue = self.queue.lock();
        let mut written = 0;
        if queue.bytes.is_empty() {
            let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            match self.socket.try_write_vectored(&slices) {
                Ok(count) => written = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    drop(queue);
                    self.end();
                    return Err(Closed);
                }
            }
        }
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if written == total {
            return Ok(());
        }
        if queue.total + total - written > MAX_QUEUED {
            drop(queue);
            self.end();
            return Err(Closed);
        }
        let mut rest = Vec::with_capacity(total - written);
        let mut skip = written;
        for part in parts {
            let skipped = skip.min(part.len());
            rest.extend_from_slice(&part[skipped..]);
            skip -= skipped;
        }
        queue.total += rest.len();
        queue.bytes.push_back(rest);
        drop(queue);
        self.more.notify_one();
        Ok(())
    }
}

impl Inbox for Out {
    fn deliver(&self, frame: Received) -> Result<(), Closed> {
        let mut header = Vec::with_capacity(8 + 4 * frame.blob_count());
        header.extend_from_slice(&(frame.head().len() as u32).to_le_bytes());
        header.extend_from_slice(&(frame.blob_count() as u32).to_le_bytes());
        for blob in frame.blobs() {
            header.extend_from_slice(&(blob.len() as u32).to_le_bytes());
        }
        let mut parts = vec![&header[..], frame.head()];
        parts.extend(frame.blobs());
        self.send(&parts)
    }

    fn close(&self, reason: &str) {
        // A peer that is gone needs no goodbye.
        let _ = self.send(&[&goodbye(reason)]);
        self.end();
    }
}

/// Writes what could not be written at once. Ends when the port is closed and nothing is left, and then shuts the socket down.
async fn write_queued(out: Arc<Out>) {
    loop {
        let more = out.more.notified();
        let idle = out.queue.lock().bytes.is_empty();
        if idle {
            if out.closed.load(Ordering::Acquire) {
                break;
            }
            more.await;
            continue;
        }
        if out.socket.writable().await.is_err() {
            break;
        }
        let mut queue = out.queue.lock();
        let from = queue.written;
        let Some(first) = queue.bytes.front() else { continue };
        match out.socket.try_write(&first[from..]) {
            Ok(count) => {
                queue.total -= count;
                queue.written += count;
                if queue.bytes.front().is_some_and(|first| queue.written == first.len()) {
                    queue.bytes.pop_front();
                    queue.written = 0;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    out.closed.store(true, Ordering::Release);
    // The other direction's half may hold the socket open; the peer must see the end all the same.
    let _ = shut_down_writing(&out.socket);
}

fn shut_down_writing(socket: &OwnedWriteHalf) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let stream: &UnixStream = socket.as_ref();
    // SAFETY: the descriptor is open for as long as `socket` is borrowed.
    match unsafe { libc::shutdown(stream.as_raw_fd(), libc::SHUT_WR) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Hands frames on until the peer is done; returns why it ended.
async fn read(reader: OwnedReadHalf, inbox: &Arc<dyn Inbox>) -> String {
    let mut reader = BufReader::with_capacity(64 << 10, reader);
    loop {
        match read_frame(&mut reader).await {
            Ok(Incoming::Frame(frame)) => {
                if inbox.deliver(frame.into()).is_err() {
                    return "this end was closed".into();
                }
            }
            Ok(Incoming::Goodbye(reason)) => return reason,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return ENDED.into(),
            Err(error) => return format!("the connection to the worker process broke: {error}"),
        }
    }
}

enum Incoming {
    Frame(Frame),
    Goodbye(String),
}

async fn read_frame(reader: &mut BufReader<OwnedReadHalf>) -> io::Result<Incoming> {
    let head = reader.read_u32_le().await?;
    let count = reader.read_u32_le().await? as usize;
    if head == GOODBYE {
        let reason = read_bytes(reader, count.min(64 << 10)).await?;
        return Ok(Incoming::Goodbye(String::from_utf8_lossy(&reason).into_owned()));
    }
    if head as usize > MAX_HEAD || count > MAX_BLOBS {
        return Err(over_limit(format!("a frame announces a head of {head} bytes and {count} blobs")));
    }
    let mut lengths = Vec::with_capacity(count);
    for _ in 0..count {
        lengths.push(reader.read_u32_le().await? as usize);
    }
    if lengths.iter().sum::<usize>() > MAX_BLOB {
        return Err(over_limit("a frame announces more than 512 MiB of blobs".into()));
    }
    let head = read_bytes(reader, head as usize).await?;
    let mut blobs = Vec::with_capacity(count);
    for length in lengths {
        blobs.push(Blob::from(read_bytes(reader, length).await?));
    }
    Ok(Incoming::Frame(Frame { head, blobs }))
}

fn over_limit(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// Reads `length` bytes. Memory grows with what arrives, not with what is announced.
async fn read_bytes(reader: &mut BufReader<OwnedReadHalf>, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(length.min(2 << 20));
    let read = reader.take(length as u64).read_to_end(&mut bytes).await?;
    if read < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}
