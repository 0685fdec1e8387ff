//! What every plugin promises, whatever its kinds.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fabstir_plugin_api::abi::Frame;
use fabstir_plugin_api::chain::Chain;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::frame::{Kind, Writer};
use fabstir_plugin_api::inference::Inference;
use fabstir_plugin_api::interface::{Interface, Method, is_compatible};
use fabstir_plugin_api::plugin::Plugin;
use fabstir_plugin_api::prover::Prover;
use fabstir_plugin_api::storage::Storage;
use fabstir_plugin_api::transport::Transport;

use super::{chain, exercise, inference, prover, storage, transport};
use crate::harness::{During, Harness, Instance, refused, told};
use crate::process;
use crate::report::Outcome;

/// A kind that this suite knows: its interface version and methods.
fn known(kind: &str) -> Option<(&'static str, &'static [Method])> {
    fn of<K: Interface + ?Sized>() -> (&'static str, (&'static str, &'static [Method])) {
        (K::KIND, (K::VERSION, K::METHODS))
    }
    let known = [of::<dyn Chain>(), of::<dyn Inference>(), of::<dyn Prover>(), of::<dyn Storage>(), of::<dyn Transport>()];
    known.into_iter().find(|(name, _)| *name == kind).map(|(_, interface)| interface)
}

pub async fn load(harness: &Harness) -> Result<Outcome> {
    let instance = harness.connect()?;
    instance.answers().await?;
    let (described, manifest) = (instance.describe().await?, &harness.manifest);
    let identity = (&described.name, &described.version, &described.description, &described.license, &described.needs);
    let read = (&manifest.name, &manifest.version, &manifest.description, &manifest.license, &manifest.needs);
    ensure!(identity == read, "`describe` says {identity:?}, the manifest says {read:?}");
    ensure!(described.provides == manifest.provides, "`describe` and the manifest provide different kinds or methods");
    ensure!(!described.provides.is_empty(), "the plugin provides no kind");
    ensure!(manifest.panic == "unwind", "built with panic = \"{}\": a panic would end the whole process", manifest.panic);

    let mut unknown = Vec::new();
    for provided in &described.provides {
        match known(&provided.kind) {
            None => unknown.push(provided.kind.as_str()),
            Some((version, methods)) => {
                let (kind, built) = (&provided.kind, &provided.version);
                ensure!(is_compatible(version, built), "built for {kind} {built}, this suite speaks {kind} {version}");
                let missing = methods.iter().find(|method| method.required && !provided.methods.iter().any(|m| m == method.name));
                ensure!(
                    missing.is_none(),
                    "{kind} requires `{}`, which is not declared",
                    missing.map_or("", |method| method.name)
                );
            }
        }
    }
    if !unknown.is_empty() {
        return Ok(Outcome::warn(format!("this suite has no checks for the kind {}", unknown.join(", "))));
    }
    if manifest.debug {
        return Ok(Outcome::warn("a debug build: a node refuses it unless told otherwise"));
    }
    Ok(Outcome::Pass)
}

pub async fn describe_is_stable(harness: &Harness) -> Result<Outcome> {
    let instance = harness.connect()?;
    let first = instance.describe().await?;
    ensure!(instance.describe().await? == first, "the second answer differs from the first");
    instance.configure(instance.config()).await.during("configure")?;
    ensure!(instance.describe().await? == first, "the answer after `configure` differs from the one before");
    ensure!(harness.start().await?.describe().await? == first, "another instance gives another answer");
    Ok(Outcome::Pass)
}

pub async fn config_schema_refuses_unknown_keys(harness: &Harness) -> Result<Outcome> {
    let instance = harness.connect()?;
    let schema = instance.describe().await?.config_schema;
    let schema: serde_json::Value = serde_json::from_str(&schema).context("the schema is not JSON")?;
    ensure!(
        schema.get("additionalProperties") == Some(&serde_json::Value::Bool(false)),
        "the schema allows unknown keys: put `#[serde(deny_unknown_fields)]` on the configuration"
    );
    let key = "zz_no_such_key";
    let config = harness.config_with(key, 1.into())?;
    let error = refused("an unknown key", instance.configure(&config).await, &[Code::InvalidArgument])?;
    ensure!(error.message.contains(key), "the message does not name the key: {}", error.message);

    harness.start().await.context("the configuration that the check was given")?;
    let undocumented = schema.get("properties").and_then(serde_json::Value::as_object).into_iter().flatten();
    let undocumented: Vec<&str> =
        undocumented.filter(|(_, property)| property.get("description").is_none()).map(|(key, _)| key.as_str()).collect();
    if !undocumented.is_empty() {
        return Ok(Outcome::warn(format!("no doc comment on the key {}", undocumented.join(", "))));
    }
    Ok(Outcome::Pass)
}

pub async fn unconfigured_is_unavailable(harness: &Harness) -> Result<Outcome> {
    let instance = harness.connect()?;
    for (method, _) in declared(harness) {
        match instance.probe(&method, None).await {
            Some(error) if error.code == Code::Unavailable => {}
            answer => bail!("`{method}` before `configure`: {}", answered(&answer)),
        }
    }
    instance.answers().await?;
    Ok(Outcome::Pass)
}

pub async fn declared_methods_work(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    instance.plugin.health(&Cx::new().with_timeout(Duration::from_secs(5))).await.during("health")?;
    instance.plugin.metrics(&Cx::new().with_timeout(Duration::from_secs(5))).await.during("metrics")?;
    exercise(harness, &instance).await?;
    let mut unchecked = Vec::new();
    for provided in &harness.manifest.provides {
        match provided.kind.as_str() {
            "inference" => inference::optional_methods(&instance, &provided.methods).await?,
            "chain" => chain::exercise(&instance).await?,
            "prover" => prover::exercise(&instance).await?,
            "storage" => storage::exercise(&instance).await?,
            "transport" => transport::exercise(harness, &instance).await?,
            kind => unchecked.push(kind),
        }
    }
    // Whatever the kind: a declared method must reach the plugin.
    for (method, _) in declared(harness) {
        let answer = instance.probe(&method, None).await;
        let refused = answer.as_ref().is_some_and(|error| matches!(error.code, Code::Unimplemented | Code::Panicked));
        ensure!(!refused, "`{method}` is declared: {}", answered(&answer));
    }
    match unchecked[..] {
        [] => Ok(Outcome::Pass),
        _ => Ok(Outcome::warn(format!("methods of the kind {} were only reached, not used", unchecked.join(", ")))),
    }
}

pub async fn undeclared_are_unimplemented(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let mut undeclared = 0;
    for provided in &harness.manifest.provides {
        let methods = known(&provided.kind).map_or(&[][..], |(_, methods)| methods);
        for method in methods.iter().filter(|method| !provided.methods.iter().any(|declared| declared == method.name)) {
            undeclared += 1;
            expect_unimplemented(&instance, &format!("{}.{}", provided.kind, method.name)).await?;
        }
    }
    match undeclared {
        0 => Ok(Outcome::skip("every method of the plugin's kinds is declared")),
        _ => Ok(Outcome::Pass),
    }
}

pub async fn unknown_method_is_unimplemented(harness: &Harness) -> Result<Outcome> {
    let instance = harness.connect()?;
    let mut methods = vec!["plugin.zz_no_such_method".to_owned(), "zz_no_such_kind.method".to_owned(), "zz".to_owned()];
    methods.extend(harness.manifest.provides.iter().map(|provided| format!("{}.zz_no_such_method", provided.kind)));
    for configured in [false, true] {
        if configured {
            instance.configure(instance.config()).await.during("configure")?;
        }
        for method in &methods {
            expect_unimplemented(&instance, method).await?;
        }
    }
    Ok(Outcome::Pass)
}

async fn expect_unimplemented(instance: &Instance, method: &str) -> Result<()> {
    match instance.probe(method, None).await {
        Some(error) if error.code == Code::Unimplemented => Ok(()),
        answer => bail!("`{method}` is not declared: {}", answered(&answer)),
    }
}

pub async fn panic_contained(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    exercise(harness, &instance).await?;
    let nonsense = || serde_json::json!([[[{ "no": "argument looks like this" }]], -1, null]);
    for (method, required) in declared(harness) {
        for arguments in [Some(vec![nonsense(), nonsense(), nonsense()]), Some(vec![serde_json::Value::Null]), None] {
            let given = arguments.as_ref().map_or("no arguments", |_| "nonsense for arguments");
            match instance.probe(&method, arguments).await {
                Some(error) if error.code == Code::Panicked => bail!("`{method}` with {given}: {}", told(&error)),
                Some(error) if error.code == Code::DeadlineExceeded => bail!("`{method}` with {given} was not answered"),
                None if required && takes_arguments(&method) => bail!("`{method}` succeeded with {given}"),
                Some(_) | None => {}
            }
        }
    }
    instance.answers().await?;
    exercise(harness, &instance).await.context("after calls whose arguments cannot be read")?;
    Ok(Outcome::Pass)
}

pub async fn garbage_frames_are_survived(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let mut random = Random(1);
    let call = |id: u64, method: &str| Writer::new(Kind::Call, id).method(method).count(8).finish();
    let mut frames: Vec<Frame> = Vec::new();
    // Nothing, too much, and too deep.
    frames.push(Frame::default());
    frames.push(Frame { head: vec![0xc1; (16 << 20) + 1], blobs: Vec::new() });
    frames.push(Frame { head: [&[0x81, 0xa1, b'z'][..], &[0x91; 100_000]].concat(), blobs: Vec::new() });
    frames.push(Frame { head: vec![0xdf; 5], blobs: vec![vec![0; 10].into(); 5000] });
    // Every prefix of a call, and calls with flipped bytes.
    let whole = call((1 << 50) + 2, "plugin.ping").head;
    frames.extend((0..whole.len()).map(|end| Frame { head: whole[..end].to_vec(), blobs: Vec::new() }));
    for _ in 0..2000 {
        let mut head = whole.clone();
        let at = random.below(head.len());
        head[at] ^= 1 << random.below(8);
        frames.push(Frame { head, blobs: Vec::new() });
    }
    frames.extend((0..2000).map(|length| Frame { head: random.bytes(length % 64), blobs: Vec::new() }));
    // Well-formed frames that make no sense: for calls that do not run, with ids of the wrong end, with counts beyond reason.
    for kind in [Kind::Reply, Kind::Item, Kind::End, Kind::Credit, Kind::Cancel, Kind::Log, Kind::Unknown] {
        for id in [0, 1, 2, 3, (1 << 50) + 4, (1 << 50) + 5, u64::MAX - 1, u64::MAX] {
            for count in [0, 1, u32::MAX] {
                frames.push(Writer::new(kind, id).count(count).finish());
            }
        }
    }
    frames.push(call(7, "plugin.ping"));
    frames.push(call((1 << 50) + 6, ""));
    for _ in 0..2 {
        frames.push(call((1 << 50) + 8, "zz.same_id_twice"));
    }
    for (number, frame) in frames.into_iter().enumerate() {
        ensure!(instance.port.deliver(frame).is_ok(), "the plugin closed its port at garbage frame {number}");
    }
    instance.answers().await.context("after frames of garbage")?;
    exercise(harness, &instance).await.context("after frames of garbage")?;
    Ok(Outcome::Pass)
}

pub async fn hundred_concurrent_calls(harness: &Harness) -> Result<Outcome> {
    let instance = harness.start().await?;
    let pings = (0..100u32).map(|number| {
        let plugin = instance.plugin.clone();
        async move {
            let payload = vec![number as u8; number as usize * 1000];
            let answer = plugin.ping(&crate::harness::patient(), payload.clone().into()).await.during("ping")?;
            ensure!(*answer == *payload, "call {number} got the answer of another");
            Ok(())
        }
    });
    futures::future::try_join_all(pings).await?;
    if harness.provides("chain") {
        chain::hundred(&instance).await?;
    }
    if harness.provides("inference") {
        inference::hundred(&instance).await?;
    }
    if harness.provides("prover") {
        prover::hundred(&instance).await?;
    }
    if harness.provides("storage") {
        storage::hundred(&instance).await?;
    }
    if harness.provides("transport") {
        transport::hundred(harness, &instance).await?;
    }
    Ok(Outcome::Pass)
}

pub async fn shutdown_leaves_no_thread(harness: &Harness) -> Result<Outcome> {
    let Ok(before) = process::threads() else { return Ok(Outcome::skip("this system does not tell a process's threads")) };
    // What a first instance leaves may be kept for the life of the process; what a second one adds to it is a leak.
    for first in [true, false] {
        let earlier = process::threads()?;
        let instance = harness.start().await?;
        exercise(harness, &instance).await?;
        instance.shutdown().await?;
        // The SDK gives blocking work five seconds to end.
        let left = process::threads_since(&earlier, Duration::from_secs(6))?;
        ensure!(first || left.is_empty(), "a second instance left {} more: {}", left.len(), left.join(", "));
        if left.is_empty() {
            break;
        }
    }
    let kept = process::threads_since(&before, Duration::ZERO)?;
    match kept[..] {
        [] => Ok(Outcome::Pass),
        _ => Ok(Outcome::warn(format!("{} stay for the life of the process: {}", kept.len(), kept.join(", ")))),
    }
}

pub async fn thousand_starts_without_growth(harness: &Harness) -> Result<Outcome> {
    const WARM_UP: usize = 100;
    const PART: usize = 300;
    const PARTS: usize = 3;
    /// What the allocator may keep for each start.
    const ALLOWED: u64 = 8 << 10;

    if process::resident().is_err() {
        return Ok(Outcome::skip("this system does not tell a process's memory"));
    }
    let state_dir = harness.scratch().join("thousand");
    // What a first instance leaves for the life of the process is the business of `shutdown-leaves-no-thread`.
    let empty = process::threads()?;
    once(harness, &state_dir).await?;
    process::threads_since(&empty, Duration::from_secs(2))?;
    let before = process::threads()?;
    let began = Instant::now();
    let starts = async |count: usize| {
        for _ in 0..count {
            once(harness, &state_dir).await?;
            // One after the other: a thousand runtimes at once would measure something else.
            let left = process::threads_since(&before, Duration::from_secs(10))?;
            ensure!(left.is_empty(), "a start left {} running: {}", left.len(), left.join(", "));
        }
        Ok(())
    };
    starts(WARM_UP).await?;
    let files = process::open_files()?;
    // The allocator takes more for threads that run at the same time, once and no more; a leak grows in most parts.
    let mut parts = Vec::new();
    // What it keeps free for the next one is no leak.
    let resident = || {
        process::give_back_memory();
        process::resident()
    };
    for _ in 0..PARTS {
        let memory = resident()?;
        starts(PART).await?;
        parts.push(resident()?.saturating_sub(memory) / PART as u64);
    }
    parts.sort_unstable();
    let each = parts[PARTS / 2];
    let opened = process::open_files()?.saturating_sub(files);
    ensure!(opened == 0, "{opened} files stayed open after {} starts", PARTS * PART);
    ensure!(
        each <= ALLOWED,
        "memory grew by {each} bytes with each start: the median of {PARTS} parts of {PART} starts, of {parts:?}"
    );
    eprintln!("{} starts took {:?}, memory grew by {each} bytes with each", WARM_UP + PARTS * PART, began.elapsed());
    Ok(Outcome::Pass)
}

/// The whole life of an instance that does no work.
async fn once(harness: &Harness, state_dir: &Path) -> Result<()> {
    let instance = harness.connect_in(state_dir.to_owned())?;
    instance.describe().await?;
    instance.configure(instance.config()).await.during("configure")?;
    instance.shutdown().await
}

/// `kind.method` of every declared method, and whether its kind requires it.
fn declared(harness: &Harness) -> Vec<(String, bool)> {
    let mut declared = Vec::new();
    for provided in &harness.manifest.provides {
        for method in &provided.methods {
            let known = known(&provided.kind).map_or(&[][..], |(_, methods)| methods);
            let required = known.iter().any(|known| known.required && known.name == method);
            declared.push((format!("{}.{method}", provided.kind), required));
        }
    }
    declared
}

/// Whether an interface's method has parameters besides the context.
fn takes_arguments(method: &str) -> bool {
    let (kind, name) = method.split_once('.').unwrap_or((method, ""));
    let interface = match kind {
        "chain" => <dyn Chain as Interface>::describe(),
        "inference" => <dyn Inference as Interface>::describe(),
        "prover" => <dyn Prover as Interface>::describe(),
        "storage" => <dyn Storage as Interface>::describe(),
        "transport" => <dyn Transport as Interface>::describe(),
        _ => <dyn Plugin as Interface>::describe(),
    };
    interface["methods"][name]["parameters"].as_array().is_some_and(|parameters| !parameters.is_empty())
}

fn answered(answer: &Option<PluginError>) -> String {
    match answer {
        Some(error) => format!("answered with `{}`", told(error)),
        None => "succeeded".into(),
    }
}

/// A small generator of numbers that look random and are the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, bound: usize) -> usize {
        self.next() as usize % bound
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}
