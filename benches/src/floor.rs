//! The floor: what crossing between two tokio runtimes costs with nothing but channels.

use tokio::sync::mpsc;

/// Ping-pong partners on a second runtime, one for each call that is in flight.
pub struct Floor(Option<tokio::runtime::Runtime>);

impl Default for Floor {
    fn default() -> Self {
        Self(Some(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads start")))
    }
}

/// One caller's channel to its partner, and back.
pub struct Pair {
    there: mpsc::UnboundedSender<()>,
    back: mpsc::UnboundedReceiver<()>,
}

impl Floor {
    pub fn pair(&self) -> Pair {
        let (there, mut requests) = mpsc::unbounded_channel();
        let (answers, back) = mpsc::unbounded_channel();
        let runtime = self.0.as_ref().expect("taken only when dropped");
        runtime.spawn(async move { while requests.recv().await.is_some() && answers.send(()).is_ok() {} });
        Pair { there, back }
    }
}

impl Pair {
    /// There and back.
    pub async fn ping(&mut self) {
        self.there.send(()).expect("the partner lives");
        self.back.recv().await.expect("the partner answers");
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
