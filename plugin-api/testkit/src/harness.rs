//! A plugin library, opened and connected: what every check works with.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use fabstir_plugin_api::abi::{Closed, Frame, Port, Received, Root};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::frame::{Codec, Head, Inbox, Kind, Reader, Writer};
use fabstir_plugin_api::interface::Interface;
use fabstir_plugin_api::logging::Record;
use fabstir_plugin_api::manifest::{Manifest, SECTION, SECTION_MACHO};
use fabstir_plugin_api::plugin::{Configure, Description, Plugin};
use fabstir_plugin_api::session::{Incoming, Role, Serve, ServeFuture, Session};
use object::{Object, ObjectSection};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::Subject;

/// What a call may take where a check does not say otherwise. Shorter than a check's own limit, so that the check can say which call.
const PATIENCE: Duration = Duration::from_secs(45);

/// Ids from here on belong to calls that a check makes frame by frame. Even, as all ids of the host.
const RAW: u64 = 1 << 40;

/// Reads what a library says of itself, without running any of its code.
pub fn manifest(library: &Path) -> Result<Manifest> {
    let bytes = std::fs::read(library).with_context(|| format!("cannot read {}", library.display()))?;
    let file = object::File::parse(&*bytes).with_context(|| format!("{} is no library", library.display()))?;
    let section = file.section_by_name(SECTION).or_else(|| file.section_by_name(SECTION_MACHO));
    let section = section.with_context(|| format!("{} has no manifest: it is not a plugin", library.display()))?;
    serde_json::from_slice(section.data()?).context("the manifest is not the JSON that `#[plugin]` writes")
}

/// An opened library and the means to start instances of its plugin.
pub struct Harness {
    root: Root,
    pub manifest: Manifest,
    config: serde_json::Value,
    scratch: TempDir,
    instances: AtomicU64,
    faults: Arc<Faults>,
}

impl Harness {
    /// Opens the library. It stays open until the process ends: unloading code that has run threads is not sound.
    pub fn open(subject: &Subject) -> Result<Self> {
        let path = subject.library.canonicalize().with_context(|| format!("cannot find {}", subject.library.display()))?;
        let manifest = manifest(&path)?;
        // SAFETY: running the initialisers of a plugin is what this process is for; it is a child that may crash.
        let root = unsafe { fabstir_plugin_api::library::open(&path) }?;
        let scratch = tempfile::Builder::new().prefix("plugin-check-").tempdir().context("no folder for temporary files")?;
        Ok(Self { root, manifest, config: subject.config.clone(), scratch, instances: AtomicU64::new(0), faults: Arc::default() })
    }

    /// Whether the plugin provides a kind.
    pub fn provides(&self, kind: &str) -> bool {
        self.manifest.provides.iter().any(|provided| provided.kind == kind)
    }

    /// Starts an instance with a state folder of its own, and does not configure it.
    pub fn connect(&self) -> Result<Instance> {
        let number = self.instances.fetch_add(1, Ordering::Relaxed);
        self.connect_in(self.scratch.path().join(format!("state-{number}")))
    }

    /// Starts an instance with the given state folder, and does not configure it.
    pub fn connect_in(&self, state_dir: PathBuf) -> Result<Instance> {
        let session = Session::new(Role::Host, self.faults.clone(), Handle::current());
        let tap = Arc::new(Tap { session: session.inbox(), raw: Mutex::default() });
        let port = self.root.connect(tap.clone())?;
        session.attach(port.clone());
        let plugin = <dyn Plugin as Interface>::client(session.clone());
        let config = self.config.to_string();
        Ok(Instance { plugin, session, port, tap, state_dir, config })
    }

    /// Starts an instance and gives it the subject's configuration.
    pub async fn start(&self) -> Result<Instance> {
        let instance = self.connect()?;
        instance.configure(&instance.config).await.during("configure")?;
        Ok(instance)
    }

    /// The subject's configuration with one more key.
    pub fn config_with(&self, key: &str, value: serde_json::Value) -> Result<String> {
        let mut config = self.config.clone();
        config.as_object_mut().context("the configuration to check with is not a table")?.insert(key.to_owned(), value);
        Ok(config.to_string())
    }

    /// How the plugin broke the protocol, if it did.
    pub fn first_fault(&self) -> Option<String> {
        self.faults.0.lock().first().cloned()
    }

    /// A folder that goes away with the check.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }
}

/// A running instance, seen from the host's side.
pub struct Instance {
    pub plugin: Arc<dyn Plugin>,
    pub session: Session,
    /// Leads to the plugin's end, past the session.
    pub port: Port,
    tap: Arc<Tap>,
    state_dir: PathBuf,
    config: String,
}

impl Instance {
    pub async fn configure(&self, config: &str) -> Result<(), PluginError> {
        let configure = Configure {
            instance: "check".into(),
            state_dir: self.state_dir.clone(),
            config: config.to_owned(),
            log_level: "warn".into(),
        };
        self.plugin.configure(&patient(), configure).await
    }

    /// The configuration that the check was given.
    pub fn config(&self) -> &str {
        &self.config
    }

    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// The client of a kind.
    pub fn client<K: Interface + ?Sized>(&self) -> Arc<K> {
        K::client(self.session.clone())
    }

    pub async fn describe(&self) -> Result<Description> {
        self.plugin.describe(&patient()).await.during("describe")
    }

    /// Whether the instance still answers.
    pub async fn answers(&self) -> Result<()> {
        let payload = &b"are you there"[..];
        let answer = self.plugin.ping(&Cx::new().with_timeout(Duration::from_secs(10)), payload.into()).await.during("ping")?;
        ensure!(&*answer == payload, "ping answered {} other bytes", answer.len());
        Ok(())
    }

    /// Makes a call with hand-written arguments and gives its error, or `None` where it succeeded.
    pub async fn probe(&self, method: &str, arguments: Option<Vec<serde_json::Value>>) -> Option<PluginError> {
        let cx = patient();
        let mut request = self.session.request(&cx, method);
        for argument in arguments.into_iter().flatten() {
            request = request.arg::<fabstir_plugin_api::frame::Plain<serde_json::Value>>(argument);
        }
        // Opened as a stream, whatever it is: then dropping the answer cancels what may still run.
        request.open::<Anything>().await.err()
    }

    /// Starts a call frame by frame, with credit for `credit` items of its stream.
    pub fn raw(
        &self,
        method: &str,
        deadline: Option<Duration>,
        credit: u32,
        arguments: impl FnOnce(&mut Writer) -> Result<(), PluginError>,
    ) -> Result<RawCall> {
        static NEXT: AtomicU64 = AtomicU64::new(RAW);
        let id = NEXT.fetch_add(2, Ordering::Relaxed);
        let (sender, frames) = mpsc::unbounded_channel();
        self.tap.raw.lock().insert(id, sender);
        let mut writer = Writer::new(Kind::Call, id).method(method);
        writer = writer.deadline_ms(deadline.map(|deadline| deadline.as_millis() as u64)).count(credit);
        arguments(&mut writer).during("writing the arguments")?;
        let call = RawCall { id, method: method.to_owned(), port: self.port.clone(), frames, sends_along: true };
        call.deliver(writer.finish())?;
        Ok(call)
    }

    /// Refuses new calls and waits for those that run.
    pub async fn drain(&self, limit: Duration) -> Result<()> {
        match self.plugin.drain(&Cx::new().with_timeout(limit)).await {
            Ok(()) => Ok(()),
            Err(error) if error.code == Code::DeadlineExceeded => {
                bail!("drain did not return within {} s: a call that is over still counts as running", limit.as_secs_f64())
            }
            Err(error) => Err(anyhow!("drain: {}", told(&error))),
        }
    }

    /// Ends the instance as the host does.
    pub async fn shutdown(self) -> Result<()> {
        self.plugin.shutdown(&patient()).await.during("shutdown")
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.session.close("the check is over");
    }
}

/// A call whose frames a check sends and receives itself.
pub struct RawCall {
    pub id: u64,
    method: String,
    port: Port,
    frames: mpsc::UnboundedReceiver<(Head, Received)>,
    /// Whether the check itself sends the stream that goes along, if there is one.
    sends_along: bool,
}

impl RawCall {
    fn deliver(&self, frame: Frame) -> Result<()> {
        self.port.deliver(frame).map_err(|Closed| anyhow!("`{}`: the plugin has closed its port", self.method))
    }

    pub fn cancel(&self) -> Result<()> {
        self.deliver(Writer::new(Kind::Cancel, self.id).finish())
    }

    /// Ends the stream that goes along with the call as soon as there is leave to send on it; `next` does that, and tells of nothing
    /// that concerns this stream.
    pub fn send_nothing_along(mut self) -> Self {
        self.sends_along = false;
        self
    }

    pub fn credit(&self, items: u32) -> Result<()> {
        self.deliver(Writer::new(Kind::Credit, self.id).count(items).finish())
    }

    /// The next frame of the call, or `None` if none comes in time.
    pub async fn next(&mut self, limit: Duration) -> Option<Head> {
        tokio::time::timeout(limit, async {
            loop {
                let (head, _) = self.frames.recv().await?;
                match head.kind {
                    Kind::Credit if !self.sends_along => self.deliver(Writer::new(Kind::End, self.id).finish()).ok()?,
                    Kind::Cancel if !self.sends_along => {}
                    _ => return Some(head),
                }
            }
        })
        .await
        .ok()
        .flatten()
    }

    /// The next frame, which must be of this kind and without an error.
    pub async fn expect(&mut self, kind: Kind) -> Result<Head> {
        let method = self.method.clone();
        match self.next_of(PATIENCE).await? {
            Head { error: Some(error), .. } => bail!("`{method}`: {}", told(&error)),
            head if head.kind == kind => Ok(head),
            head => bail!("`{method}` sent {:?} where {kind:?} was due", head.kind),
        }
    }

    /// The next frame, which must come.
    pub async fn next_of(&mut self, limit: Duration) -> Result<Head> {
        let method = self.method.clone();
        self.next(limit).await.with_context(|| format!("`{method}` sent nothing for {} s", limit.as_secs_f64()))
    }
}

/// Sends the frames of raw calls to those who made them, and all others to the session.
struct Tap {
    session: Arc<dyn Inbox>,
    raw: Mutex<HashMap<u64, mpsc::UnboundedSender<(Head, Received)>>>,
}

impl Inbox for Tap {
    fn deliver(&self, frame: Received) -> Result<(), Closed> {
        if let Ok(head) = Head::read(frame.head())
            && let Some(call) = self.raw.lock().get(&head.id)
        {
            // A check that has ended its call reads no more.
            let _ = call.send((head, frame));
            return Ok(());
        }
        self.session.deliver(frame)
    }

    fn close(&self, reason: &str) {
        self.raw.lock().clear();
        self.session.close(reason);
    }
}

/// The host's side of a check serves nothing; it notes what the plugin does wrong.
#[derive(Default)]
struct Faults(Mutex<Vec<String>>);

impl Serve for Faults {
    fn admit(&self, method: &str) -> Result<Option<Box<dyn std::any::Any + Send>>, PluginError> {
        Err(PluginError::unimplemented(method))
    }

    fn serve(&self, call: Incoming) -> ServeFuture {
        let refused = PluginError::unimplemented(call.method());
        Box::pin(async move { Err(refused) })
    }

    fn log(&self, record: Record) {
        // Quoted by the report if the process dies.
        eprintln!("{}: {} {:?}", record.target, record.message, record.fields);
    }

    fn fault(&self, error: &PluginError) {
        self.0.lock().push(error.message.clone());
    }

    fn closed(&self, _: &str) {}
}

/// A value of any type, unread.
pub struct Anything;

impl Codec for Anything {
    type Item = ();
    const WINDOW: u32 = 1;

    fn put((): (), _: &mut Writer) -> Result<(), PluginError> {
        Ok(())
    }

    fn take(_: &mut Reader) -> Result<(), PluginError> {
        Ok(())
    }

    fn schema(_: &mut fabstir_plugin_api::prelude::schemars::SchemaGenerator) -> fabstir_plugin_api::prelude::schemars::Schema {
        true.into()
    }
}

/// A context for calls that are expected to succeed.
pub fn patient() -> Cx {
    Cx::new().with_timeout(PATIENCE)
}

/// An error with its code, for a report.
pub fn told(error: &PluginError) -> String {
    format!("{}: {}", error.code, error.message)
}

/// Says during what a call failed.
pub trait During<T> {
    fn during(self, what: &str) -> Result<T>;
}

impl<T> During<T> for Result<T, PluginError> {
    fn during(self, what: &str) -> Result<T> {
        self.map_err(|error| anyhow!("{what}: {}", told(&error)))
    }
}

/// Insists that a call is refused with one of these codes.
pub fn refused<T>(what: &str, result: Result<T, PluginError>, codes: &[Code]) -> Result<PluginError> {
    match result {
        Err(error) if codes.contains(&error.code) => Ok(error),
        Err(error) => bail!("{what} was answered with `{}`, not with {codes:?}", told(&error)),
        Ok(_) => bail!("{what} succeeded, where {codes:?} was due"),
    }
}
