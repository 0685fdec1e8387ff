//! An answer on its way to the client.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use fabstir_plugin_api::error::PluginError;
use fabstir_plugin_api::inference::{Chunk, Finish, Generation, Text};
use fabstir_plugin_api::stream::Stream;
use futures::StreamExt;
use futures::future::BoxFuture;
use tokio::time::{Instant, Sleep};

use super::metrics::ModelMetrics;
use super::refused::Refused;
use super::waiting::Held;
use super::{Job, Scheduler, generating};

/// The stream of an answer's chunks. It ends after [`Chunk::Done`] or after an error.
///
/// A plugin that fails before its first output is replaced without a word. Dropping the answer cancels the generation and frees
/// its slot. The slot is free as well once the last chunk was read.
pub struct Answer {
    phase: Phase,
    scheduler: Arc<Scheduler>,
    metrics: ModelMetrics,
    plugin: String,
    digest: Option<String>,
    model: String,
    arrived: Instant,
    last_output: Option<Instant>,
    deadline: Pin<Box<Sleep>>,
}

#[expect(clippy::large_enum_variant, reason = "an answer streams for nearly all of its life, and there are few of them")]
enum Phase {
    Streaming(Run),
    Retrying(BoxFuture<'static, Result<Run, Refused>>),
    Over,
}

/// A generation in its slot. The stream comes first: dropped in this order, the plugin hears of the end before the slot is given
/// away.
pub(super) struct Run {
    pub stream: Stream<Chunk>,
    pub held: Held,
    /// What it takes to start anew; gone with the first output.
    pub again: Option<Box<(Job, Arc<Generation>)>>,
}

impl Answer {
    pub(super) fn new(scheduler: Arc<Scheduler>, run: Run) -> Answer {
        let (arrived, ends) = match &run.again {
            Some(begun) => (begun.0.arrived, begun.0.ends),
            None => (Instant::now(), Instant::now()),
        };
        let metrics = run.held.metrics.clone();
        metrics.queue_time.observe(arrived.elapsed().as_secs_f64());
        Answer {
            plugin: run.held.lane.plugin.clone(),
            digest: run.held.digest(),
            model: run.held.lane.model.clone(),
            phase: Phase::Streaming(run),
            scheduler,
            metrics,
            arrived,
            last_output: None,
            deadline: Box::pin(tokio::time::sleep_until(ends)),
        }
    }

    /// The plugin that answers: as long as nothing was said yet, another may still take its place.
    pub fn plugin(&self) -> &str {
        &self.plugin
    }

    /// The digest of the model that answers, where its plugin knows it.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// The next chunk; `None` after the end. A dropped call loses nothing.
    pub async fn next(&mut self) -> Option<Result<Chunk, Refused>> {
        StreamExt::next(self).await
    }

    fn note_output(&mut self, text: &Text) {
        let now = Instant::now();
        match self.last_output.replace(now) {
            None => self.metrics.first_token.observe((now - self.arrived).as_secs_f64()),
            // A piece may stand for several tokens: each took its share of the time.
            Some(last) => {
                let each = (now - last).as_secs_f64() / f64::from(text.tokens.max(1));
                for _ in 0..text.tokens {
                    self.metrics.inter_token.observe(each);
                }
            }
        }
    }

    fn finish(&mut self, chunk: &Chunk) {
        let Chunk::Done(done) = chunk else { return };
        if let Phase::Streaming(run) = std::mem::replace(&mut self.phase, Phase::Over) {
            drop(run.stream);
            run.held.served();
        }
        let reason = if done.finish == Finish::Length { "length" } else { "stop" };
        self.scheduler.metrics.finished(&self.model, reason);
        self.metrics.whole.observe(self.arrived.elapsed().as_secs_f64());
        self.metrics.prompt_tokens.inc_by(done.usage.prompt_tokens.into());
        self.metrics.generation_tokens.inc_by(done.usage.completion_tokens.into());
    }

    /// Ends with the error, or begins again where nothing has been said yet.
    fn fail(&mut self, error: PluginError) -> Option<Refused> {
        let Phase::Streaming(Run { stream, held, again }) = std::mem::replace(&mut self.phase, Phase::Over) else { return None };
        drop(stream);
        let Some((mut job, request)) = again.map(|again| *again) else {
            return Some(self.scheduler.refused(Refused::by_plugin(&held.lane, error)));
        };
        match self.scheduler.again(&mut job, held, error) {
            Ok(waiting) => {
                let scheduler = self.scheduler.clone();
                self.phase = Phase::Retrying(Box::pin(async move {
                    let (job, stream, held) = scheduler.run(waiting, job, &generating(&request)).await?;
                    Ok(Run { stream, held, again: Some(Box::new((job, request))) })
                }));
                None
            }
            Err(refused) => Some(self.scheduler.refused(refused)),
        }
    }
}

impl futures::Stream for Answer {
    type Item = Result<Chunk, Refused>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let answer = self.get_mut();
        loop {
            match &mut answer.phase {
                Phase::Streaming(run) => {
                    let Poll::Ready(item) = run.stream.poll_next_unpin(context) else {
                        ready!(answer.deadline.as_mut().poll(context));
                        if let Phase::Streaming(run) = std::mem::replace(&mut answer.phase, Phase::Over) {
                            drop(run.stream);
                            run.held.served();
                        }
                        return Poll::Ready(Some(Err(answer
                            .scheduler
                            .refused(Refused::deadline("while it was being answered")))));
                    };
                    match item {
                        Some(Ok(chunk)) => {
                            if let Chunk::Text(text) = &chunk {
                                if !text.text.is_empty() || !text.logprobs.is_empty() {
                                    run.again = None;
                                    run.held.acquit();
                                }
                                if text.tokens > 0 {
                                    answer.note_output(text);
                                }
                            }
                            answer.finish(&chunk);
                            return Poll::Ready(Some(Ok(chunk)));
                        }
                        ended => {
                            let error = match ended {
                                Some(Err(error)) => error,
                                _ => PluginError::unavailable("the plugin ended the answer without its last chunk")
                                    .retry_after(Duration::from_secs(1)),
                            };
                            if let Some(refused) = answer.fail(error) {
                                return Poll::Ready(Some(Err(refused)));
                            }
                        }
                    }
                }
                Phase::Retrying(starting) => match ready!(starting.as_mut().poll(context)) {
                    Ok(run) => {
                        answer.plugin.clone_from(&run.held.lane.plugin);
                        answer.digest = run.held.digest();
                        answer.phase = Phase::Streaming(run);
                    }
                    Err(refused) => {
                        answer.phase = Phase::Over;
                        return Poll::Ready(Some(Err(answer.scheduler.refused(refused))));
                    }
                },
                Phase::Over => return Poll::Ready(None),
            }
        }
    }
}
