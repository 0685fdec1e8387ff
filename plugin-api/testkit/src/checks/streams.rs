//! Cancel, backpressure, deadlines and drain, watched frame by frame: what the SDK on the host's side would hide is seen here.

use std::any::Any;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::frame::{Head, Kind, Writer};

use super::{exercise, inference, storage, transport};
use crate::harness::{Harness, Instance, RawCall};
use crate::process;
use crate::report::Outcome;

/// How long a plugin may take to notice.
const GRACE: Duration = Duration::from_secs(2);

/// How long silence must last to be believed.
const SILENCE: Duration = Duration::from_millis(200);

/// A call that answers with a stream of several items.
pub struct LongStream {
    pub method: &'static str,
    pub arguments: Box<dyn Fn(&mut Writer) -> Result<(), PluginError>>,
    /// Calls that the plugin runs at the same time, where it has a limit.
    pub parallel: usize,
    /// Whether a stream goes along with the call, which then ends at once.
    pub takes_stream: bool,
    /// What must stay for as long as calls are made.
    pub _partner: Option<Box<dyn Any + Send>>,
}

impl LongStream {
    fn open(&self, instance: &Instance, deadline: Option<Duration>, credit: u32) -> Result<RawCall> {
        let call = instance.raw(self.method, deadline, credit, |writer| (self.arguments)(writer))?;
        Ok(if self.takes_stream { call.send_nothing_along() } else { call })
    }
}

/// Instances with a stream of each kind that the plugin provides.
async fn long_streams(harness: &Harness) -> Result<Vec<(Instance, LongStream)>> {
    let mut streams = Vec::new();
    if harness.provides("inference") {
        let instance = harness.start().await?;
        let stream = inference::long_stream(&instance).await?;
        streams.push((instance, stream));
    }
    if harness.provides("storage") {
        let instance = harness.start().await?;
        let stream = storage::long_stream(&instance).await?;
        streams.push((instance, stream));
    }
    if harness.provides("transport") {
        let instance = harness.start().await?;
        let stream = transport::long_stream(harness, &instance).await?;
        streams.push((instance, stream));
    }
    Ok(streams)
}

fn no_stream() -> Result<Outcome> {
    Ok(Outcome::skip("this suite knows no stream of the plugin's kinds"))
}

pub async fn cancel_before(harness: &Harness) -> Result<Outcome> {
    let streams = long_streams(harness).await?;
    for (instance, stream) in &streams {
        for _ in 0..20 {
            let mut call = stream.open(instance, None, 1)?;
            call.cancel()?;
            call.credit(1000)?;
            // What was under way when the cancel came may still arrive: the reply, and the one item there was credit for.
            let mut items = 0;
            while let Some(frame) = call.next(SILENCE / 10).await {
                items += if frame.kind == Kind::Item { frame.count.unwrap_or(1) } else { 0 };
            }
            ensure!(items <= 1, "`{}` sent {items} items after it was cancelled", stream.method);
        }
        is_free_again(harness, instance).await?;
    }
    if streams.is_empty() { no_stream() } else { Ok(Outcome::Pass) }
}

pub async fn cancel_during(harness: &Harness) -> Result<Outcome> {
    let streams = long_streams(harness).await?;
    for (instance, stream) in &streams {
        // One more than there are slots: a slot that stays taken shows.
        for _ in 0..=stream.parallel.min(256) {
            let mut call = open_when_free(instance, stream).await?;
            call.expect(Kind::Item).await?;
            call.cancel()?;
            call.credit(1000)?;
            let late = call.next(SILENCE / 40).await;
            ensure!(late.is_none(), "`{}` sent {late:?} after it was cancelled", stream.method);
        }
        let mut last = open_when_free(instance, stream).await?;
        last.expect(Kind::Item).await?;
        last.cancel()?;
        last.credit(1000)?;
        let late = last.next(SILENCE).await;
        ensure!(late.is_none(), "`{}` sent {late:?} after it was cancelled", stream.method);
        is_free_again(harness, instance).await?;
    }
    if streams.is_empty() { no_stream() } else { Ok(Outcome::Pass) }
}

pub async fn cancel_after(harness: &Harness) -> Result<Outcome> {
    let streams = long_streams(harness).await?;
    for (instance, stream) in &streams {
        let mut call = open_when_free(instance, stream).await?;
        read_to_end(&mut call).await?;
        for _ in 0..3 {
            call.cancel()?;
            call.credit(1000)?;
        }
        let late = call.next(SILENCE).await;
        ensure!(late.is_none(), "`{}` sent {late:?} after its end", stream.method);
        is_free_again(harness, instance).await?;
    }
    if streams.is_empty() { no_stream() } else { Ok(Outcome::Pass) }
}

pub async fn slow_consumer_keeps_memory_flat(harness: &Harness) -> Result<Outcome> {
    const ALLOWED: u64 = 24 << 20;
    let mut streams = long_streams(harness).await?;
    if harness.provides("storage") {
        // Large enough that keeping all of it would show.
        let instance = harness.start().await?;
        storage::pausing_reader(&instance).await?;
        let stream = storage::stream_of(&instance, 64 << 20).await?;
        streams.push((instance, stream));
    }
    for (instance, stream) in &streams {
        exercise(harness, instance).await?;
        process::give_back_memory();
        let Ok(before) = process::resident() else { return Ok(Outcome::skip("this system does not tell a process's memory")) };
        let mut call = open_when_free(instance, stream).await?;
        call.expect(Kind::Item).await?;
        let more = call.next(Duration::from_secs(1)).await;
        ensure!(more.is_none(), "`{}` sent {more:?} without credit", stream.method);
        let grown = process::resident()?.saturating_sub(before);
        ensure!(grown < ALLOWED, "`{}` piled up {} for a consumer that does not read", stream.method, process::mib(grown));
        instance.answers().await.context("while a stream is not read")?;
        call.cancel()?;
    }
    if streams.is_empty() { no_stream() } else { Ok(Outcome::Pass) }
}

pub async fn deadline_honoured(harness: &Harness) -> Result<Outcome> {
    let streams = long_streams(harness).await?;
    for (instance, stream) in &streams {
        let deadline = Duration::from_millis(400);
        let began = Instant::now();
        let mut call = stream.open(instance, Some(deadline), 1)?;
        // It is never given more credit, so only the deadline can end it.
        loop {
            let frame = call.next_of(deadline + GRACE).await?;
            match frame {
                Head { error: Some(error), .. } if error.code == Code::DeadlineExceeded => break,
                Head { error: Some(error), .. } => bail!("`{}` ended with `{}`", stream.method, crate::harness::told(&error)),
                Head { kind: Kind::End, .. } => bail!("`{}` ended well, with one item of credit", stream.method),
                _ => {}
            }
        }
        let took = began.elapsed();
        ensure!(took >= deadline, "`{}` ended {:?} before its deadline", stream.method, deadline - took);
        is_free_again(harness, instance).await?;
    }
    if harness.provides("storage") {
        storage::late_put(harness).await?;
    }
    if streams.is_empty() { no_stream() } else { Ok(Outcome::Pass) }
}

pub async fn drain_refuses_and_waits(harness: &Harness) -> Result<Outcome> {
    for (instance, stream) in &long_streams(harness).await? {
        let mut call = open_when_free(instance, stream).await?;
        call.expect(Kind::Item).await?;

        let drain = instance.drain(Duration::from_secs(30));
        tokio::pin!(drain);
        let early = tokio::time::timeout(SILENCE, &mut drain).await;
        ensure!(early.is_err(), "`drain` returned while `{}` was running", stream.method);
        let mut refused = stream.open(instance, None, 1)?;
        match refused.next_of(GRACE).await?.error {
            Some(error) if error.code == Code::Unavailable => {}
            answer => bail!("a draining plugin answered `{}` with {answer:?}, not with Unavailable", stream.method),
        }
        instance.answers().await.context("while it drains")?;

        read_to_end(&mut call).await.context("a stream that ran when `drain` was called")?;
        let ended = tokio::time::timeout(GRACE, &mut drain).await;
        ended.context("`drain` did not return when the last stream had ended")??;
    }
    let instance = harness.start().await?;
    instance.drain(GRACE).await.context("with nothing running")?;
    instance.shutdown().await?;
    Ok(Outcome::Pass)
}

/// Opens a stream with credit for one item, waiting while slots of calls that have just ended are being freed.
async fn open_when_free(instance: &Instance, stream: &LongStream) -> Result<RawCall> {
    let deadline = Instant::now() + GRACE;
    loop {
        let mut call = stream.open(instance, None, 1)?;
        match call.next_of(GRACE * 10).await? {
            Head { kind: Kind::Reply, error: None, .. } => return Ok(call),
            Head { error: Some(error), .. } if error.code == Code::Overloaded && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Head { error: Some(error), .. } if error.code == Code::Overloaded => {
                bail!("`{}` is still overloaded {} s after all calls were cancelled", stream.method, GRACE.as_secs())
            }
            Head { error: Some(error), .. } => bail!("`{}`: {}", stream.method, crate::harness::told(&error)),
            head => bail!("`{}` began with {:?}, not with a reply", stream.method, head.kind),
        }
    }
}

/// Gives credit until the stream ends, which it must without an error.
async fn read_to_end(call: &mut RawCall) -> Result<()> {
    call.credit(1 << 16)?;
    loop {
        match call.next_of(GRACE * 15).await? {
            Head { error: Some(error), .. } => bail!("the stream ended with `{}`", crate::harness::told(&error)),
            Head { kind: Kind::End, .. } => return Ok(()),
            _ => {}
        }
    }
}

/// Whether nothing of the calls before is left: the plugin still works, and has no call to wait for.
async fn is_free_again(harness: &Harness, instance: &Instance) -> Result<()> {
    instance.answers().await?;
    exercise(harness, instance).await.context("after a stream was given up")?;
    instance.drain(GRACE).await
}
