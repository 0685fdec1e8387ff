//! The serving side.

use super::outgoing::late;
use super::streams::{Inflow, ItemSource, Items, pump};
use std::ops::Range;
use std::task::Poll;

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
    /// Credit for the answer's stream, where the caller expects one.
    credit: Option<Arc<Semaphore>>,
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
        match self.inner.serving.part_of(self.id).get_mut(self.id) {
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

/// Forgets a served call when it ends, however it ends.
struct Served<'a> {
    inner: &'a Inner,
    id: u64,
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        self.inner.serving.remove(self.id);
    }
}

impl Inner {
    /// Takes a call in. Runs on the caller's thread, so nothing of the method runs here.
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
            let mut serving = self.serving.part_of(head.id);
            // Only a part with its share of the most calls asks how many there are in all.
            if serving.len() >= MAX_IN_FLIGHT / PARTS {
                drop(serving);
                if self.serving.len() >= MAX_IN_FLIGHT {
                    let busy = PluginError::new(Code::Overloaded, format!("{MAX_IN_FLIGHT} calls are running"));
                    self.refuse(head.id, busy.retry_after(Duration::from_millis(100)));
                    return Ok(());
                }
                serving = self.serving.part_of(head.id);
            }
            if serving.get(head.id).is_some() {
                return Err(PluginError::protocol("a call with the id of a running one"));
            }
            serving.insert(head.id, Serving { cx: cx.clone(), of_a_kind, credit: credit.clone(), inflow: None, upload: None });
        }
        let arguments = Reader::new(received, head.body);
        self.hand_over(Incoming { inner: self.clone(), id: head.id, cx, credit, method: head.method, arguments });
        Ok(())
    }

    fn refuse(&self, id: u64, error: PluginError) {
        // Nobody is left to be refused in a closed session.
        let _ = self.send(Writer::new(Kind::Reply, id).error(&error).finish());
    }
}

/// Serves a call to its end.
pub(super) async fn serve(inner: &Arc<Inner>, call: Incoming) {
    let id = call.id;
    let _served = Served { inner, id };
    let (cx, credit) = (call.cx.clone(), call.credit.clone());
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
        let upload = inner.serving.part_of(id).get_mut(id).and_then(|served| served.upload.take());
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
