//! The caller's side.

use super::streams::{Inflow, ItemSource, Items, pump};
use super::*;

/// A call that this end has made and that is not over.
pub(super) struct Outgoing {
    reply: Option<oneshot::Sender<Result<Reader>>>,
    /// The stream that comes back, where the method has one.
    pub(super) inflow: Option<Inflow>,
    /// Credit for the stream that goes along, where the method takes one.
    upload: Option<Arc<Semaphore>>,
    /// Sends that stream; aborted when the call is forgotten.
    task: Option<AbortOnDrop>,
    deadline: Option<Instant>,
}

impl Outgoing {
    /// Whether the call waits for its reply though its time is over.
    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.reply.is_some() && self.deadline.is_some_and(|deadline| now > deadline)
    }

    pub(super) fn fail(self, error: PluginError) {
        self.stop_upload();
        match self.reply {
            // A caller that is gone needs no error.
            Some(reply) => drop(reply.send(Err(error))),
            None => {
                if let Some(inflow) = self.inflow {
                    inflow.end(Some(error));
                }
            }
        }
    }

    /// Whether the stream that goes along still goes on.
    pub(super) fn is_uploading(&self) -> bool {
        self.upload.as_ref().is_some_and(|credit| !credit.is_closed())
    }

    /// Whether nothing more can come back.
    pub(super) fn is_answered(&self) -> bool {
        self.reply.is_none() && self.inflow.is_none()
    }

    pub(super) fn stop_upload(&self) {
        if let Some(credit) = &self.upload {
            credit.close();
        }
    }
}

/// How often calls are looked through for one whose deadline has passed.
const SWEEP: Duration = Duration::from_millis(50);

impl Inner {
    /// Starts the task that ends calls whose deadline has passed. The serving end keeps deadlines to the millisecond; this is for
    /// an end that hangs, and one task for all calls costs less than a timer for each.
    fn watch_deadlines(self: &Arc<Self>) {
        if self.sweeping.load(Ordering::Relaxed) || self.sweeping.swap(true, Ordering::AcqRel) {
            return;
        }
        let weak = Arc::downgrade(self);
        self.runtime.spawn(async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                let Some(inner) = weak.upgrade() else { return };
                if inner.closed.load(Ordering::Acquire) {
                    return;
                }
                let now = Instant::now();
                let mut late = Vec::new();
                for part in inner.outgoing.parts() {
                    late.extend(part.iter().filter(|(_, call)| call.is_late(now)).map(|(id, _)| *id));
                }
                for id in late {
                    inner.expire(id);
                }
            }
        });
    }

    fn expire(&self, id: u64) {
        let call = self.outgoing.remove(id);
        if let Some(call) = call {
            // A closed session has cancelled everything already.
            let _ = self.send(Writer::new(Kind::Cancel, id).finish());
            call.fail(late("the call"));
        }
    }

    pub(super) fn replied(&self, head: Head, received: Received) -> Result<()> {
        if !self.is_mine(head.id) {
            return Err(PluginError::protocol("a reply to a call that this end did not make"));
        }
        let mut outgoing = self.outgoing.part_of(head.id);
        // A reply may cross a cancel on its way: then nobody waits for it.
        let Some(call) = outgoing.get_mut(head.id) else { return Ok(()) };
        let Some(reply) = call.reply.take() else {
            return Err(PluginError::protocol("a second reply to one call"));
        };
        if head.error.is_some() || call.inflow.is_none() {
            let call = outgoing.remove(head.id);
            drop(outgoing);
            if let Some(call) = call {
                call.stop_upload();
            }
        } else {
            drop(outgoing);
        }
        let answer = match head.error {
            Some(error) => Err(error),
            None => Ok(Reader::new(received, head.body)),
        };
        // The caller may have been dropped in this very moment.
        let _ = reply.send(answer);
        Ok(())
    }

    pub(super) fn credited(&self, id: u64, count: u64) -> Result<()> {
        if count > 1 << 20 {
            return Err(PluginError::protocol(format!("credit for {count} items at once")));
        }
        let credit = if self.is_mine(id) {
            self.outgoing.part_of(id).get(id).and_then(|call| call.upload.clone())
        } else {
            self.serving.part_of(id).get(id).and_then(|served| served.credit.clone())
        };
        if let Some(credit) = credit {
            if credit.available_permits() > 1 << 24 {
                return Err(PluginError::protocol("credit without end"));
            }
            credit.add_permits(count as usize);
        }
        Ok(())
    }

    /// The stream that goes along with a call has ended: the call is forgotten now, or when its answer ends.
    fn uploaded(&self, id: u64) {
        let mut outgoing = self.outgoing.part_of(id);
        let Some(call) = outgoing.get(id) else { return };
        call.stop_upload();
        let over = if call.is_answered() { outgoing.remove(id) } else { None };
        drop(outgoing);
        drop(over);
    }

    /// Forgets a call that its caller has given up, and tells the other end.
    pub(super) fn abandon(&self, id: u64) {
        let call = self.outgoing.remove(id);
        if call.is_some() {
            // A closed session has cancelled everything already.
            let _ = self.send(Writer::new(Kind::Cancel, id).finish());
        }
    }
}

/// Cancels the call when the future that makes it is dropped.
struct Guard<'a> {
    inner: &'a Inner,
    id: u64,
    armed: bool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.inner.abandon(self.id);
        }
    }
}

/// A call being put together. Nothing is sent before `send` or `open`.
#[must_use]
pub struct Request<'a> {
    inner: &'a Arc<Inner>,
    cx: &'a Cx,
    id: u64,
    method: &'a str,
    writer: Option<Writer>,
    upload: Option<Box<dyn ItemSource>>,
    error: Option<PluginError>,
}

impl<'a> Request<'a> {
    pub(super) fn new(inner: &'a Arc<Inner>, cx: &'a Cx, method: &'a str) -> Self {
        let id = inner.next.0.fetch_add(2, Ordering::Relaxed);
        Self { inner, cx, id, method, writer: None, upload: None, error: None }
    }

    fn writer(&mut self) -> &mut Writer {
        let (id, cx, method) = (self.id, self.cx, self.method);
        self.writer.get_or_insert_with(|| {
            Writer::new(Kind::Call, id)
                .method(method)
                .deadline_ms(cx.remaining().map(|left| left.as_millis() as u64))
                .traceparent(cx.traceparent())
                .count_later()
        })
    }

    /// Appends an argument.
    pub fn arg<C: Codec>(mut self, value: C::Item) -> Self {
        if self.error.is_none() {
            self.error = C::put(value, self.writer()).err();
        }
        self
    }

    /// The stream that goes along with the call. At most one.
    pub fn upload<C: Codec + 'static>(mut self, items: Stream<C::Item>) -> Self {
        self.upload = Some(Box::new(Items::<C>::new(items)));
        self
    }

    /// Makes the call and waits for its value. Dropping the future cancels the call.
    pub async fn send<C: Codec>(self) -> Result<C::Item> {
        let (mut reader, _) = self.exchange(0, None).await?;
        C::take(&mut reader)
    }

    /// Makes the call and waits until its stream has begun. Dropping the future, and later the stream, cancels the call.
    pub async fn open<C: Codec>(self) -> Result<Stream<C::Item>> {
        let (inner, id, deadline) = (self.inner.clone(), self.id, self.cx.deadline());
        let (inflow, events) = Inflow::new(C::WINDOW);
        let (_, mut guard) = self.exchange(C::WINDOW, Some(inflow)).await?;
        guard.armed = false;
        Ok(Stream::remote(RemoteStream::down::<C>(inner, id, events, deadline)))
    }

    async fn exchange(mut self, window: u32, inflow: Option<Inflow>) -> Result<(Reader, Guard<'a>)> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        if self.cx.is_cancelled() {
            return Err(PluginError::cancelled());
        }
        self.writer().set_count(window);
        let Some(writer) = self.writer.take() else { return Err(PluginError::protocol("a request was sent twice")) };
        let frame = writer.finish();
        if frame.head.len() > crate::frame::MAX_HEAD {
            return Err(PluginError::invalid(format!(
                "a request of {} bytes is over the limit of {} bytes",
                frame.head.len(),
                crate::frame::MAX_HEAD
            )));
        }
        let (reply, answer) = oneshot::channel();
        let deadline = self.cx.deadline();
        if deadline.is_some() {
            self.inner.watch_deadlines();
        }
        let credit = self.upload.is_some().then(|| Arc::new(Semaphore::new(0)));
        let streams = inflow.is_some();
        self.inner
            .outgoing
            .part_of(self.id)
            .insert(self.id, Outgoing { reply: Some(reply), inflow, upload: credit.clone(), task: None, deadline });
        let mut guard = Guard { inner: self.inner, id: self.id, armed: true };
        if self.inner.closed.load(Ordering::Acquire) || self.inner.send(frame).is_err() {
            return Err(self.inner.gone());
        }
        if let Some((items, credit)) = self.upload.take().zip(credit) {
            let (inner, id) = (self.inner.clone(), self.id);
            let task = AbortOnDrop(self.inner.runtime.spawn(upload(inner, id, items, credit)));
            if let Some(call) = self.inner.outgoing.part_of(self.id).get_mut(self.id) {
                call.task = Some(task);
            }
        }
        let answer = answer.await;
        // A unary call is forgotten with its reply, and so is one that failed.
        guard.armed = streams && matches!(answer, Ok(Ok(_)));
        match answer {
            Ok(answer) => answer.map(|reader| (reader, guard)),
            Err(_) => Err(self.inner.gone()),
        }
    }
}

/// Sends the stream that goes along with a call. A panic in it ends the stream with an error: the other end waits for its end.
async fn upload(inner: Arc<Inner>, id: u64, items: Box<dyn ItemSource>, credit: Arc<Semaphore>) {
    let sent = AssertUnwindSafe(pump(&inner, id, items, &credit)).catch_unwind().await;
    if let Err(panic) = sent {
        let error = super::serving::panicked(panic);
        // A closed session ends the stream by itself.
        let _ = inner.send(Writer::new(Kind::End, id).error(&error).finish());
    }
    inner.uploaded(id);
}

pub(super) fn late(what: &str) -> PluginError {
    PluginError::new(Code::DeadlineExceeded, format!("{what} did not end before its deadline"))
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
