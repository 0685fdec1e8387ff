//! The way of an answer from the engine's thread to the host.

use fabstir_plugin_api::prelude::*;
use tokio::runtime::Handle;

use crate::engine::{Flow, Resume, Sink};
use crate::error::Error;

/// Sends an answer's pieces as chunks of the call's stream.
///
/// The engine's thread must not wait for a slow reader. When the stream is full, a task waits with the piece instead, and the
/// generation stands still until the task is through: one piece per generation is all that ever piles up.
pub struct StreamSink {
    cx: Cx,
    sender: Sender<Chunk>,
    runtime: Handle,
    resume: Option<std::sync::Arc<Resume>>,
}

impl StreamSink {
    /// For the stream of the call that `cx` belongs to. To be made within the plugin's runtime.
    pub fn new(cx: &Cx, sender: Sender<Chunk>) -> Self {
        Self { cx: cx.clone(), sender, runtime: Handle::current(), resume: None }
    }
}

impl Sink for StreamSink {
    fn start(&mut self, resume: Resume) {
        self.resume = Some(resume.into());
    }

    fn piece(&mut self, text: Text) -> Flow {
        match self.sender.try_send(Chunk::Text(text)) {
            Ok(None) => Flow::Go,
            Err(_) => Flow::Stop,
            Ok(Some(chunk)) => {
                let (sender, resume) = (self.sender.clone(), self.resume.clone());
                self.runtime.spawn(async move {
                    // Sent, or the reader has gone: either way the engine goes on and sees which.
                    let _ = sender.send(chunk).await;
                    if let Some(resume) = resume {
                        resume.resume();
                    }
                });
                Flow::Wait
            }
        }
    }

    fn done(self: Box<Self>, last: Option<Text>, done: Done) {
        let mut rest = last.map(Chunk::Text).into_iter().chain([Chunk::Done(done)]);
        while let Some(chunk) = rest.next() {
            match self.sender.try_send(chunk) {
                Ok(None) => {}
                Err(_) => return,
                Ok(Some(chunk)) => {
                    let sender = self.sender;
                    self.runtime.spawn(async move {
                        for chunk in [chunk].into_iter().chain(rest) {
                            if sender.send(chunk).await.is_err() {
                                return;
                            }
                        }
                    });
                    return;
                }
            }
        }
    }

    fn fail(self: Box<Self>, error: Error) {
        let error = PluginError::from(error);
        if !self.sender.is_closed() && !self.sender.try_fail(error.clone()) {
            self.runtime.spawn(self.sender.fail(error));
        }
    }

    fn gone(&self) -> bool {
        self.sender.is_closed() || self.cx.is_cancelled()
    }
}
