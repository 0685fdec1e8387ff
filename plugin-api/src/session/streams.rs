//! Streams between the ends: items against credit.

use std::task::{Context, Poll};

use super::*;

/// What arrives on a stream.
pub(super) enum Event {
    Items(Reader, u32),
    End(Option<PluginError>),
}

/// The receiving end's record of a stream: where items go, and how many more may come.
pub(super) struct Inflow {
    events: mpsc::UnboundedSender<Event>,
    granted: u64,
}

impl Inflow {
    pub(super) fn new(window: u32) -> (Self, mpsc::UnboundedReceiver<Event>) {
        // Unbounded in form only: what is granted bounds what arrives.
        let (events, receiver) = mpsc::unbounded_channel();
        (Self { events, granted: window.into() }, receiver)
    }

    pub(super) fn end(&self, error: Option<PluginError>) {
        // The consumer may have gone.
        let _ = self.events.send(Event::End(error));
    }

    fn take(&mut self, reader: Reader, count: u64) -> Result<()> {
        if count == 0 || count > self.granted {
            return Err(PluginError::protocol(format!("a stream sent {count} items with credit for {}", self.granted)));
        }
        self.granted -= count;
        let _ = self.events.send(Event::Items(reader, count as u32));
        Ok(())
    }
}

impl Inner {
    pub(super) fn item(&self, head: Head, received: Received) -> Result<()> {
        let count = head.count.unwrap_or(1);
        let reader = Reader::new(received, head.body);
        let id = head.id;
        if self.is_mine(id) {
            let mut outgoing = self.outgoing.part_of(id);
            let Some(inflow) = outgoing.get_mut(id).and_then(|call| call.inflow.as_mut()) else { return Ok(()) };
            if let Err(error) = inflow.take(reader, count) {
                inflow.end(Some(error.clone()));
                drop(outgoing);
                self.abandon(id);
                return Err(error);
            }
        } else {
            let mut serving = self.serving.part_of(id);
            let Some(inflow) = serving.get_mut(id).and_then(|served| served.inflow.as_mut()) else { return Ok(()) };
            if let Err(error) = inflow.take(reader, count) {
                inflow.end(Some(error.clone()));
                return Err(error);
            }
        }
        Ok(())
    }

    pub(super) fn ended(&self, head: Head) -> Result<()> {
        if self.is_mine(head.id) {
            let mut outgoing = self.outgoing.part_of(head.id);
            if head.error.is_none()
                && let Some(call) = outgoing.get_mut(head.id)
                && call.is_uploading()
            {
                // The stream in the other direction goes on.
                if let Some(inflow) = call.inflow.take() {
                    inflow.end(None);
                }
                return Ok(());
            }
            let call = outgoing.remove(head.id);
            drop(outgoing);
            if let Some(call) = call {
                call.stop_upload();
                if let Some(inflow) = &call.inflow {
                    inflow.end(head.error);
                }
            }
        } else if let Some(inflow) = self.serving.part_of(head.id).get(head.id).and_then(|served| served.inflow.as_ref()) {
            inflow.end(head.error);
        }
        Ok(())
    }

    /// Lets the producer send `count` more items.
    fn grant(&self, id: u64, count: u32) {
        {
            let (mut outgoing, mut serving);
            let inflow = if self.is_mine(id) {
                outgoing = self.outgoing.part_of(id);
                outgoing.get_mut(id).and_then(|call| call.inflow.as_mut())
            } else {
                serving = self.serving.part_of(id);
                serving.get_mut(id).and_then(|served| served.inflow.as_mut())
            };
            match inflow {
                Some(inflow) => inflow.granted += u64::from(count),
                None => return,
            }
        }
        // A closed session ends the stream by itself.
        let _ = self.send(Writer::new(Kind::Credit, id).count(count).finish());
    }
}

/// A stream whose items come from the other end.
pub struct RemoteStream<T> {
    inner: Arc<Inner>,
    id: u64,
    events: mpsc::UnboundedReceiver<Event>,
    batch: Option<(Reader, u32)>,
    take: fn(&mut Reader) -> Result<T>,
    window: u32,
    /// Items read since credit was last given.
    read: u32,
    deadline: Option<Pin<Box<tokio::time::Sleep>>>,
    over: bool,
    /// On the serving side: keeps the call running, though its answer may have ended.
    running: Option<oneshot::Sender<()>>,
}

impl<T> RemoteStream<T> {
    pub(super) fn down<C: Codec<Item = T>>(
        inner: Arc<Inner>,
        id: u64,
        events: mpsc::UnboundedReceiver<Event>,
        deadline: Option<Instant>,
    ) -> Self {
        let deadline = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline.into())));
        let mut stream = Self::new::<C>(inner, id, events);
        stream.deadline = deadline;
        stream
    }

    /// The stream that comes along with a call; `running` is dropped when nobody reads it any more.
    pub(super) fn up<C: Codec<Item = T>>(
        inner: Arc<Inner>,
        id: u64,
        events: mpsc::UnboundedReceiver<Event>,
        running: oneshot::Sender<()>,
    ) -> Self {
        let mut stream = Self::new::<C>(inner, id, events);
        stream.running = Some(running);
        stream
    }

    fn new<C: Codec<Item = T>>(inner: Arc<Inner>, id: u64, events: mpsc::UnboundedReceiver<Event>) -> Self {
        let take = C::take;
        Self { inner, id, events, batch: None, take, window: C::WINDOW, read: 0, deadline: None, over: false, running: None }
    }

    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<T>>> {
        loop {
            if self.over {
                return Poll::Ready(None);
            }
            if let Some((reader, left)) = &mut self.batch {
                let item = (self.take)(reader);
                *left -= 1;
                if *left == 0 {
                    self.batch = None;
                }
                if item.is_err() {
                    self.stop();
                    return Poll::Ready(Some(item));
                }
                self.read += 1;
                if self.read >= self.window / 2 {
                    self.inner.grant(self.id, self.read);
                    self.read = 0;
                }
                return Poll::Ready(Some(item));
            }
            match self.events.poll_recv(context) {
                Poll::Ready(Some(Event::Items(reader, count))) => self.batch = Some((reader, count)),
                Poll::Ready(Some(Event::End(error))) => {
                    self.over = true;
                    self.running = None;
                    return Poll::Ready(error.map(Err));
                }
                Poll::Ready(None) => {
                    self.over = true;
                    return Poll::Ready(Some(Err(self.inner.gone())));
                }
                Poll::Pending => match &mut self.deadline {
                    Some(deadline) => {
                        std::task::ready!(deadline.as_mut().poll(context));
                        self.stop();
                        return Poll::Ready(Some(Err(super::outgoing::late("the stream"))));
                    }
                    None => return Poll::Pending,
                },
            }
        }
    }
}

impl<T> RemoteStream<T> {
    /// Tells the producer that nobody reads any more.
    fn stop(&mut self) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        self.running = None;
        if self.inner.is_mine(self.id) {
            self.inner.abandon(self.id);
        } else if self.inner.serving.part_of(self.id).get_mut(self.id).is_some_and(|served| served.inflow.take().is_some()) {
            let _ = self.inner.send(Writer::new(Kind::Cancel, self.id).finish());
        }
    }
}

impl<T> Drop for RemoteStream<T> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Items that can be written into a frame as they become ready.
pub(super) trait ItemSource: Send {
    fn poll_put(&mut self, context: &mut Context<'_>, writer: &mut Writer) -> Poll<Option<Result<()>>>;
}

pub(super) struct Items<C: Codec>(Stream<C::Item>);

impl<C: Codec> Items<C> {
    pub(super) fn new(items: Stream<C::Item>) -> Self {
        Self(items)
    }
}

impl<C: Codec> ItemSource for Items<C> {
    fn poll_put(&mut self, context: &mut Context<'_>, writer: &mut Writer) -> Poll<Option<Result<()>>> {
        let item = std::task::ready!(futures::Stream::poll_next(Pin::new(&mut self.0), context));
        Poll::Ready(item.map(|item| item.and_then(|item| C::put(item, writer))))
    }
}

const MAX_BATCH: u32 = 128;
const MAX_BATCH_BYTES: usize = 256 << 10;

/// Sends a stream's items while there is credit: everything that is ready at one moment goes into one frame.
///
/// Returns when the stream has ended, which is told to the other end, or when the other end wants no more.
pub(super) async fn pump(inner: &Inner, id: u64, mut source: Box<dyn ItemSource>, credit: &Semaphore) {
    loop {
        match credit.acquire().await {
            Ok(permit) => permit.forget(),
            Err(_) => return,
        }
        let mut writer = Writer::new(Kind::Item, id).count_later();
        let mut count = 0;
        let mut end = None;
        match std::future::poll_fn(|context| source.poll_put(context, &mut writer)).await {
            Some(Ok(())) => count = 1,
            Some(Err(error)) => end = Some(Some(error)),
            None => end = Some(None),
        }
        while end.is_none() && count < MAX_BATCH && writer.size() < MAX_BATCH_BYTES {
            let Ok(permit) = credit.try_acquire() else { break };
            match futures::poll!(std::future::poll_fn(|context| source.poll_put(context, &mut writer))) {
                Poll::Ready(Some(Ok(()))) => {
                    permit.forget();
                    count += 1;
                }
                Poll::Ready(Some(Err(error))) => end = Some(Some(error)),
                Poll::Ready(None) => end = Some(None),
                Poll::Pending => break,
            }
        }
        if count > 0 {
            writer.set_count(count);
            let frame = writer.finish();
            if frame.head.len() > crate::frame::MAX_HEAD {
                end = Some(Some(PluginError::internal("an item of the stream is over 16 MiB: send it in pieces")));
            } else if inner.send(frame).is_err() {
                return;
            }
        }
        if let Some(error) = end {
            let mut writer = Writer::new(Kind::End, id);
            if let Some(error) = &error {
                writer = writer.error(error);
            }
            let _ = inner.send(writer.finish());
            return;
        }
    }
}
