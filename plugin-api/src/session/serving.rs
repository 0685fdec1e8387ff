//! The serving side.

use super::outgoing::late;
use super::streams::{Inflow, ItemSource, Items, pump};
use std::ops::Range;
use std::sync::Weak;
use std::task::Poll;

use tokio::sync::Notify;

use super::*;

/// What a method's dispatcher returns.
pub type ServeFuture = Pin<Box<dyn Future<Output = Result<Outcome>> + Send>>;

/// A call that this end is serving.
pub(super) struct Serving {
    cx: Cx,
    /// Whether the method is one of a kind, and not of the plugin interface.
    pub(super) of_a_kind: bool,
    /// How many items of the answer's stream may still be sent; none where the caller expects no stream.
    pub(super) credit: Option<Arc<Semaphore>>,
    /// The stream that came along, once the method has asked for it.
    pub(super) inflow: Option<Inflow>,
    /// Ends when nobody reads that stream any more.
    upload: Option<oneshot::Receiver<()>>,
}

impl Serving {
    /// Cancels the call for the plugin's own end: the caller is told.
    pub(super) fn shut_down(&self) {
        self.cx.shut_down();
        self.cancel();
    }

    pub(super) fn cancel(&self) {
        self.cx.cancel();
        if let Some(credit) = &self.credit {
            credit.close();
        }
        if let Some(inflow) = &self.inflow {
            inflow.end(Some(PluginError::cancelled()));
        }
    }
}

/// A call to be served: its context, its method and its arguments, to be read in order.
pub struct Incoming {
    inner: Arc<Inner>,
    id: u64,
    cx: Cx,
    method: Range<usize>,
    arguments: Reader,
}

impl Incoming {
    pub fn cx(&self) -> &Cx {
        &self.cx
    }

    /// `kind.name`.
    pub fn method(&self) -> &str {
        // Checked when the call was accepted.
        std::str::from_utf8(&self.arguments.head()[self.method.clone()]).unwrap_or_default()
    }

    /// The next argument.
    pub fn arg<C: Codec>(&mut self) -> Result<C::Item> {
        C::take(&mut self.arguments).map_err(|error| PluginError::invalid(format!("`{}`: {}", self.method(), error.message)))
    }

    /// The stream that comes along with the call. To be asked for once.
    pub fn upload<C: Codec>(&mut self) -> Result<Stream<C::Item>> {
        let (inflow, events) = Inflow::new(C::WINDOW);
        let (running, over) = oneshot::channel();
        match self.inner.serving.lock().get_mut(&self.id) {
            Some(serving) if serving.upload.is_none() => {
                serving.inflow = Some(inflow);
                serving.upload = Some(over);
            }
            Some(_) => return Err(PluginError::protocol("a call has one stream at most")),
            None => return Err(PluginError::cancelled()),
        }
        let granted = Writer::new(Kind::Credit, self.id).count(C::WINDOW).finish();
        self.inner.send(granted).map_err(|Closed| self.inner.gone())?;
        Ok(Stream::remote(RemoteStream::up::<C>(self.inner.clone(), self.id, events, running)))
    }

    /// Ends the call with a value.
    pub fn value<C: Codec>(&self, value: C::Item) -> Result<Outcome> {
        let mut writer = Writer::new(Kind::Reply, self.id);
        C::put(value, &mut writer)?;
        Ok(Outcome(Answer::Value(writer)))
    }

    /// Answers the call with a stream.
    pub fn stream<C: Codec + 'static>(&self, items: Stream<C::Item>) -> Result<Outcome> {
        Ok(Outcome(Answer::Stream(Box::new(Items::<C>::new(items)))))
    }
}

/// How a call was answered.
pub struct Outcome(Answer);

enum Answer {
    Value(Writer),
    Stream(Box<dyn ItemSource>),
}

/// Forgets a served call when its task ends, however it ends.
struct Served {
    inner: Arc<Inner>,
    id: u64,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.inner.serving.lock().remove(&self.id);
    }
}

impl Inner {
    /// Starts a task for a call. Runs on the caller's thread, so it does no more than that.
    pub(super) fn accept(self: &Arc<Self>, head: Head, received: Received) -> Result<()> {
        if self.is_mine(head.id) {
            return Err(PluginError::protocol("a call with an id of this end's own"));
        }
        let of_a_kind = match std::str::from_utf8(&received.head()[head.method.clone()]) {
            Ok(method) if !method.is_empty() => !method.starts_with("plugin."),
            _ => return Err(PluginError::protocol("a call without a method")),
        };
        let mut cx = Cx::serving();
        if let Some(left) = head.deadline_ms {
            cx = cx.with_timeout(Duration::from_millis(left));
        }
        if let Ok(trace) = std::str::from_utf8(&received.head()[head.traceparent.clone()])
            && !trace.is_empty()
        {
            cx = cx.with_traceparent(trace);
        }
        let window = head.count.unwrap_or(0).min(1 << 20) as usize;
        let credit = (window > 0).then(|| Arc::new(Semaphore::new(window)));
        {
            let mut serving = self.serving.lock();
            if serving.len() >= MAX_IN_FLIGHT {
                drop(serving);
                let busy = PluginError::new(Code::Overloaded, format!("{MAX_IN_FLIGHT} calls are running"));
                self.refuse(head.id, busy.retry_after(Duration::from_millis(100)));
                return Ok(());
            }
            if serving.contains_key(&head.id) {
                return Err(PluginError::protocol("a call with the id of a running one"));
            }
            serving.insert(head.id, Serving { cx: cx.clone(), of_a_kind, credit: credit.clone(), inflow: None, upload: None });
        }
        let served = Served { inner: self.clone(), id: head.id };
        let call =
            Incoming { inner: self.clone(), id: head.id, cx, method: head.method, arguments: Reader::new(received, head.body) };
        self.hand_over(Job { served, call, credit });
        Ok(())
    }

    /// Gives a call to a task that has nothing to do, or to a new one. Tasks are kept because starting one costs more than a whole
    /// null call.
    fn hand_over(self: &Arc<Self>, job: Job) {
        let idle = self.idle.lock().pop();
        match idle {
            Some(server) => {
                *server.job.lock() = Some(job);
                server.called.notify_one();
            }
            None => drop(self.runtime.spawn(serve_calls(Arc::downgrade(self), job))),
        }
    }

    /// Ends the tasks that have nothing to do.
    pub(super) fn dismiss_servers(&self) {
        for server in self.idle.lock().drain(..) {
            server.called.notify_one();
        }
    }

    fn refuse(&self, id: u64, error: PluginError) {
        // Nobody is left to be refused in a closed session.
        let _ = self.send(Writer::new(Kind::Reply, id).error(&error).finish());
    }
}

/// A call on its way to the task that serves it.
struct Job {
    served: Served,
    call: Incoming,
    credit: Option<Arc<Semaphore>>,
}

/// A task that serves one call after the other, seen by those who have calls to serve.
#[derive(Default)]
pub(super) struct Server {
    job: Mutex<Option<Job>>,
    called: Notify,
}

/// Tasks that wait for a next call. More end when they have nothing to do.
const MAX_IDLE: usize = 64;

async fn serve_calls(inner: Weak<Inner>, first: Job) {
    let own = Arc::<Server>::default();
    let mut next = Some(first);
    while let Some(job) = next {
        run(job).await;
        {
            let Some(inner) = inner.upgrade() else { return };
            let mut idle = inner.idle.lock();
            // Looked at under the lock, which `dismiss_servers` takes after the flag is set.
            if idle.len() >= MAX_IDLE || inner.closed.load(Ordering::Acquire) {
                return;
            }
            idle.push(own.clone());
        }
        own.called.notified().await;
        next = own.job.lock().take();
    }
}

async fn run(job: Job) {
    let Job { served, call, credit } = job;
    let (inner, id) = (&served.inner, served.id);
    let cx = call.cx.clone();
    let _admitted = match inner.serve.admit(call.method()) {
        Ok(admitted) => admitted,
        Err(error) => return inner.refuse(id, error),
    };
    let work = AssertUnwindSafe(async { inner.serve.serve(call).await }).catch_unwind();
    let source = match bounded(&cx, work).await {
        None => return,
        Some(Ok(Outcome(Answer::Value(writer)))) => {
            let frame = writer.finish();
            if frame.head.len() > crate::frame::MAX_HEAD {
                return inner.refuse(id, PluginError::internal("the answer is over 16 MiB"));
            }
            // The caller's end may have closed meanwhile.
            let _ = inner.send(frame);
            return;
        }
        Some(Ok(Outcome(Answer::Stream(source)))) => source,
        Some(Err(error)) => return inner.refuse(id, error),
    };
    let Some(credit) = credit else {
        return inner.refuse(id, PluginError::protocol("the method answers with a stream, and the caller wants none"));
    };
    if inner.send(Writer::new(Kind::Reply, id).finish()).is_err() {
        return;
    }
    let work = AssertUnwindSafe(async {
        pump(inner, id, source, &credit).await;
        // The answer may end before the stream that came along: the call is over when both are.
        let upload = inner.serving.lock().get_mut(&id).and_then(|served| served.upload.take());
        if let Some(upload) = upload {
            // Nothing is ever sent: the sender is dropped with the stream.
            let _ = upload.await;
        }
        Ok(())
    });
    if let Some(Err(error)) = bounded(&cx, work.catch_unwind()).await {
        let _ = inner.send(Writer::new(Kind::End, id).error(&error).finish());
    }
}

/// Runs one stage of a call until it ends, panics, is late or is cancelled; `None` when nobody waits for an answer.
async fn bounded<T>(cx: &Cx, work: impl Future<Output = std::thread::Result<Result<T>>>) -> Option<Result<T>> {
    let deadline = async {
        match cx.deadline() {
            Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
            None => std::future::pending().await,
        }
    };
    // A cancelled method runs no further, but a call that is answered at once needs neither a waiter nor a timer: so the flag is looked
    // at before the work, and waited for after it.
    let given_up = std::future::poll_fn(|_| if cx.is_cancelled() { Poll::Ready(()) } else { Poll::Pending });
    tokio::select! {
        biased;
        () = given_up => {}
        result = work => return Some(result.unwrap_or_else(|panic| Err(panicked(panic)))),
        () = cx.cancelled() => {}
        () = deadline => {
            cx.cancel();
            return Some(Err(late("the call")));
        }
    }
    cx.is_shut_down().then(|| Err(PluginError::unavailable("the plugin is shutting down")))
}

pub(super) fn panicked(panic: Box<dyn Any + Send>) -> PluginError {
    let text = match panic.downcast_ref::<&str>() {
        Some(text) => (*text).to_owned(),
        None => panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a value that is no text".into()),
    };
    // The payload's own destructor may panic as well, and here nothing would catch it.
    std::mem::forget(panic);
    let place = logging::take_panic_location().map(|place| format!(" at {place}")).unwrap_or_default();
    PluginError::new(Code::Panicked, format!("panicked{place}: {text}"))
}
