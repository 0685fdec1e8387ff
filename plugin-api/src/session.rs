//! Sessions: calls, streams, credit and cancellation over frames. One state machine, the same on both ends and over every carrier.
//!
//! Each end may call and each end may serve. A call has one reply and at most one stream in each direction; where it has both, either
//! may end first, and the call is over when both have ended, or with the first error. The sender of a stream
//! sends no more items than it was given credit for; the receiver gives credit as its consumer reads. A receiver that gets more than
//! it granted ends the stream: a flood never piles up in memory.
//!
//! Frames are handled on the thread that delivers them, but nothing of an author's runs there: a call becomes a task on the serving
//! end's own runtime, a reply wakes the caller, an item goes into the caller's queue.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use futures::FutureExt;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::abi::{Closed, Frame, Port, Received};
use crate::context::Cx;
use crate::error::{Code, PluginError, Result};
use crate::frame::{Codec, Head, Inbox, Kind, Reader, Writer};
use crate::logging::{self, Record};
use crate::stream::Stream;

mod desk;
mod outgoing;
mod serving;
mod streams;
mod table;

pub use outgoing::Request;
pub use serving::{Incoming, Outcome, ServeFuture};
pub use streams::RemoteStream;

use desk::Desk;
use outgoing::Outgoing;
use serving::Serving;
use table::{PARTS, Table};

/// Items that may be under way in one stream before the consumer has read any.
pub(crate) const WINDOW: u32 = 256;
/// The same for streams of blobs, whose pieces may be 1 MiB each.
pub(crate) const BLOB_WINDOW: u32 = 8;
/// Calls that one end serves at the same time.
const MAX_IN_FLIGHT: usize = 4096;

/// Which end of the connection this is. It decides the parity of call ids, so that both ends can number calls on their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Host,
    Plugin,
}

/// What one end does for the other.
pub trait Serve: Send + Sync + 'static {
    /// Whether a call may start. What is returned is kept until the call and its stream are over.
    fn admit(&self, method: &str) -> Result<Option<Box<dyn Any + Send>>>;

    /// Serves one call, on the session's runtime.
    fn serve(&self, call: Incoming) -> ServeFuture;

    /// Takes a log record of the other end, on the other end's thread.
    fn log(&self, record: Record);

    /// Hears that the other end broke the protocol.
    fn fault(&self, error: &PluginError);

    /// Hears that the session is over.
    fn closed(&self, reason: &str);
}

/// One end of a connection between host and plugin. Clones are the same end.
#[derive(Clone)]
pub struct Session(Arc<Inner>);

/// A session that does not keep itself alive.
#[derive(Clone)]
pub struct WeakSession(std::sync::Weak<Inner>);

impl WeakSession {
    pub fn upgrade(&self) -> Option<Session> {
        self.0.upgrade().map(Session)
    }
}

/// On cache lines of its own, apart from the count of its owners: every call changes that count, and reads most of this.
#[repr(align(128))]
struct Inner {
    role: Role,
    next: Apart<AtomicU64>,
    /// Where frames go; gone once the session is closed, so that the two ends do not keep each other alive.
    port: ArcSwapOption<Port>,
    closed: AtomicBool,
    reason: Mutex<String>,
    outgoing: Table<Outgoing>,
    serving: Table<Serving>,
    serve: Arc<dyn Serve>,
    runtime: Handle,
    desk: Apart<Desk>,
    /// Whether the task that watches deadlines has been started.
    sweeping: AtomicBool,
}

/// What changes with every call, beside what does not.
#[repr(align(128))]
#[derive(Default)]
struct Apart<T>(T);

impl Session {
    /// Makes an end that serves with `serve` on `runtime`. It can be called once `attach` has given it the other end's port.
    pub fn new(role: Role, serve: Arc<dyn Serve>, runtime: Handle) -> Self {
        Self(Arc::new(Inner {
            role,
            next: Apart(AtomicU64::new(if role == Role::Host { 2 } else { 1 })),
            port: ArcSwapOption::empty(),
            closed: AtomicBool::new(false),
            reason: Mutex::new(String::new()),
            outgoing: Table::default(),
            serving: Table::default(),
            serve,
            runtime,
            desk: Apart::default(),
            sweeping: AtomicBool::new(false),
        }))
    }

    pub fn attach(&self, port: Port) {
        if !self.is_closed() {
            self.0.port.store(Some(Arc::new(port)));
        }
    }

    pub fn downgrade(&self) -> WeakSession {
        WeakSession(Arc::downgrade(&self.0))
    }

    /// What the other end delivers to.
    pub fn inbox(&self) -> Arc<dyn Inbox> {
        Arc::new(End(self.0.clone()))
    }

    /// Starts a call of `method`, written `kind.name`.
    pub fn request<'a>(&'a self, cx: &'a Cx, method: &'a str) -> Request<'a> {
        Request::new(&self.0, cx, method)
    }

    /// Tells both ends that it is over: running calls fail with `Unavailable`, calls being served are cancelled.
    pub fn close(&self, reason: &str) {
        let port = self.0.port.load_full();
        self.0.shut(reason);
        if let Some(port) = port {
            port.close(reason);
        }
    }

    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }

    /// Cancels every call of a kind's method that is being served: all but those of the plugin interface itself.
    pub fn cancel_served(&self) {
        for part in self.0.serving.parts() {
            part.iter().filter(|(_, served)| served.of_a_kind).for_each(|(_, served)| served.shut_down());
        }
    }

    pub(crate) fn log(&self, record: &Record) {
        let mut writer = Writer::new(Kind::Log, 0);
        if writer.value(record).is_ok() {
            let frame = writer.finish();
            if frame.head.len() <= crate::frame::MAX_HEAD {
                // A closed session has nobody to log to.
                let _ = self.0.send(frame);
            }
        }
    }
}

impl Inner {
    fn send(&self, frame: Frame) -> std::result::Result<(), Closed> {
        self.port.load().as_ref().ok_or(Closed)?.deliver(frame)
    }

    fn is_mine(&self, id: u64) -> bool {
        id.is_multiple_of(2) == (self.role == Role::Host)
    }

    fn gone(&self) -> PluginError {
        let reason = self.reason.lock();
        let reason = if reason.is_empty() { "the plugin is gone" } else { &reason };
        PluginError::unavailable(reason)
    }

    fn shut(&self, reason: &str) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        *self.reason.lock() = reason.to_owned();
        self.port.store(None);
        let outgoing: Vec<Outgoing> = self.outgoing.parts().flat_map(|mut part| part.drain()).collect();
        for call in outgoing {
            call.fail(self.gone());
        }
        for part in self.serving.parts() {
            part.iter().for_each(|(_, served)| served.cancel());
        }
        self.desk.0.close();
        self.serve.closed(reason);
    }

    fn fault(&self, error: PluginError) {
        self.serve.fault(&error);
    }

    fn receive(self: &Arc<Self>, received: Received) -> Result<()> {
        let head = Head::read(received.head())?;
        match head.kind {
            Kind::Call => self.accept(head, received),
            Kind::Reply => self.replied(head, received),
            Kind::Item => self.item(head, received),
            Kind::End => self.ended(head),
            Kind::Credit => self.credited(head.id, head.count.unwrap_or(0)),
            Kind::Cancel => self.cancelled(head.id),
            Kind::Log => {
                let record = Reader::new(received, head.body).value()?;
                self.serve.log(record);
                Ok(())
            }
            Kind::Unknown => Ok(()),
        }
    }

    /// A cancel from the caller ends the call; one from the server says that it reads no more of the caller's stream.
    fn cancelled(&self, id: u64) -> Result<()> {
        if self.is_mine(id) {
            let mut outgoing = self.outgoing.part_of(id);
            if let Some(call) = outgoing.get(id) {
                call.stop_upload();
                let over = if call.is_answered() { outgoing.remove(id) } else { None };
                drop(outgoing);
                drop(over);
            }
        } else if let Some(served) = self.serving.part_of(id).get(id) {
            served.cancel();
        }
        Ok(())
    }
}

/// The end that a port leads to.
struct End(Arc<Inner>);

impl Inbox for End {
    fn deliver(&self, frame: Received) -> std::result::Result<(), Closed> {
        if self.0.closed.load(Ordering::Acquire) {
            return Err(Closed);
        }
        if let Err(error) = self.0.receive(frame) {
            self.0.fault(error);
        }
        Ok(())
    }

    fn close(&self, reason: &str) {
        self.0.shut(reason);
    }
}
