//! A plugin instance: the part of every plugin that is the same. `#[plugin]` ties an author's type to it.

use std::any::Any;
use std::future::Future;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::{Mutex, RwLock};
use serde::de::DeserializeOwned;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::Notify;

use crate::abi::{Blob, Port};
use crate::context::{Cx, Host};
use crate::error::{PluginError, Result};
use crate::frame::Inbox;
use crate::interface::Interface;
use crate::logging::{self, Record, Sink};
use crate::manifest::About;
use crate::plugin::{Configure, Description, Health, Lifecycle, Plugin};
use crate::session::{Incoming, Role, Serve, ServeFuture, Session, WeakSession};

/// What an author's `init` gives back, boxed.
pub type InitFuture<T> = Pin<Box<dyn Future<Output = Result<T>> + Send>>;

/// The author's part, as `#[plugin]` describes it.
pub trait Author: Send + Sync + 'static {
    type Plugin: Lifecycle + 'static;
    const ABOUT: About;

    fn schema() -> schemars::Schema;
    fn init(host: Host, config: String) -> InitFuture<Self::Plugin>;
    /// Serves a call of one of the declared kinds.
    fn serve(plugin: Arc<Self::Plugin>, kind: &str, call: Incoming) -> Option<ServeFuture>;
}

/// Reads the operator's `config` table into the author's type.
pub fn parse_config<T: DeserializeOwned>(json: &str) -> Result<T> {
    serde_json::from_str(json).map_err(|error| PluginError::invalid(format!("the config table does not fit: {error}")))
}

/// Starts an instance that talks to `host`, and returns what the host talks to.
pub fn connect<A: Author>(host: Port) -> std::result::Result<Arc<dyn Inbox>, String> {
    let (session, _) = start::<A>()?;
    session.attach(host);
    Ok(session.inbox())
}

/// Starts an instance that talks to a host over `socket`, which its own runtime reads and writes.
pub fn connect_socket<A: Author>(socket: UnixStream) -> std::result::Result<(), String> {
    let (session, runtime) = start::<A>()?;
    let _entered = runtime.enter();
    let socket = socket.set_nonblocking(true).and_then(|()| tokio::net::UnixStream::from_std(socket));
    crate::ipc::carry(socket.map_err(|error| format!("the connection to the node cannot be used: {error}"))?, &session);
    Ok(())
}

fn start<A: Author>() -> std::result::Result<(Session, Handle), String> {
    let sink = Arc::<Sink>::default();
    let threads = sink.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64)
        .thread_name(A::ABOUT.name)
        .on_thread_start(move || logging::enter_thread(threads.clone()))
        .enable_all()
        .build()
        .map_err(|error| format!("no runtime could be started: {error}"))?;
    let handle = runtime.handle().clone();
    let state = Arc::new(State::<A> {
        plugin: RwLock::new(None),
        host: OnceLock::new(),
        sink: sink.clone(),
        configuring: AtomicBool::new(false),
        draining: AtomicBool::new(false),
        running: Arc::default(),
        runtime: Mutex::new(Some(runtime)),
        session: OnceLock::new(),
    });
    let session = Session::new(Role::Plugin, Arc::new(Instance(state.clone())), handle.clone());
    sink.attach(session.downgrade());
    // The cell is empty: nothing has run yet.
    let _ = state.session.set(session.downgrade());
    logging::started(sink);
    Ok((session, handle))
}

struct Instance<A: Author>(Arc<State<A>>);

struct State<A: Author> {
    /// Gone once the instance has ended.
    plugin: RwLock<Option<Arc<A::Plugin>>>,
    host: OnceLock<Host>,
    sink: Arc<Sink>,
    configuring: AtomicBool,
    draining: AtomicBool,
    running: Arc<Running>,
    runtime: Mutex<Option<Runtime>>,
    session: OnceLock<WeakSession>,
}

#[derive(Default)]
struct Running {
    count: AtomicUsize,
    idle: Notify,
}

/// Counts a call of a kind for as long as it or its stream runs.
struct Counted(Arc<Running>);

impl Drop for Counted {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

impl<A: Author> State<A> {
    fn plugin(&self) -> Option<Arc<A::Plugin>> {
        self.plugin.read().clone()
    }

    fn stop_runtime(&self) {
        let Some(runtime) = self.runtime.lock().take() else { return };
        logging::ended(&self.sink);
        let plugin = self.plugin.write().take();
        // A runtime may not be dropped on one of its own threads, and the author's `Drop` may not run on the host's.
        let stop = move || {
            {
                let _entered = runtime.enter();
                drop(plugin);
            }
            runtime.shutdown_timeout(Duration::from_secs(5));
        };
        if let Err(error) = std::thread::Builder::new().name("plugin-stop".into()).spawn(stop) {
            tracing::warn!(%error, "No thread could be started to stop the plugin's runtime.");
        }
    }
}

impl<A: Author> Serve for Instance<A> {
    fn admit(&self, method: &str) -> Result<Option<Box<dyn Any + Send>>> {
        let (kind, name) = method.split_once('.').unwrap_or((method, ""));
        if kind == <dyn Plugin as Interface>::KIND {
            return Ok(None);
        }
        let declared = A::ABOUT.provides.iter().any(|provides| provides.kind == kind && provides.declares(name));
        if !declared {
            return Err(PluginError::unimplemented(method));
        }
        if self.0.plugin.read().is_none() {
            return Err(PluginError::unavailable("the plugin has not been configured"));
        }
        let counted = Counted(self.0.running.clone());
        counted.0.count.fetch_add(1, Ordering::AcqRel);
        // Looked at after counting, so that `drain` cannot miss a call that has begun.
        if self.0.draining.load(Ordering::Acquire) {
            return Err(PluginError::unavailable("the plugin is draining"));
        }
        Ok(Some(Box::new(counted)))
    }

    fn serve(&self, call: Incoming) -> ServeFuture {
        let kind = call.method().split_once('.').map_or("", |(kind, _)| kind);
        if kind == <dyn Plugin as Interface>::KIND {
            return <dyn Plugin as Interface>::serve(self.0.clone(), call);
        }
        // `admit` has let the call through, so the kind is a declared one.
        let kind = A::ABOUT.provides.iter().map(|provides| provides.kind).find(|declared| *declared == kind);
        let served = self.0.plugin().zip(kind).and_then(|(plugin, kind)| A::serve(plugin, kind, call));
        served.unwrap_or_else(|| Box::pin(async { Err(PluginError::unavailable("the plugin has ended")) }))
    }

    fn log(&self, _: Record) {}

    fn fault(&self, error: &PluginError) {
        tracing::warn!(%error, "The host sent a frame that cannot be read.");
    }

    fn closed(&self, _: &str) {
        self.0.stop_runtime();
    }
}

#[async_trait]
impl<A: Author> Plugin for State<A> {
    async fn describe(&self, _: &Cx) -> Result<Description> {
        let about = A::ABOUT;
        Ok(Description {
            name: about.name.into(),
            version: about.version.into(),
            description: about.description.into(),
            license: about.license.into(),
            provides: about.provides.iter().map(|provides| provides.to_provided()).collect(),
            needs: about.needs.iter().map(|need| (*need).to_owned()).collect(),
            config_schema: A::schema().as_value().to_string(),
        })
    }

    async fn configure(&self, _: &Cx, configure: Configure) -> Result<()> {
        if self.configuring.swap(true, Ordering::AcqRel) {
            return Err(PluginError::invalid("an instance is configured once"));
        }
        let mut attempt = Attempt { configuring: &self.configuring, failed: true };
        self.sink.set_level(&configure.log_level);
        let host = Host::new(configure.instance, configure.state_dir);
        std::fs::create_dir_all(host.state_dir())?;
        let plugin = A::init(host.clone(), configure.config).await?;
        attempt.failed = false;
        // Both are empty: `configuring` lets one through.
        let _ = self.host.set(host);
        let _ = self.plugin.write().replace(Arc::new(plugin));
        Ok(())
    }

    async fn health(&self, _: &Cx) -> Result<Health> {
        match self.plugin() {
            Some(plugin) => Ok(plugin.health().await),
            None => Ok(Health::Starting { doing: "waiting for its configuration".into(), percent: None }),
        }
    }

    async fn ping(&self, _: &Cx, payload: Blob) -> Result<Blob> {
        Ok(payload)
    }

    async fn metrics(&self, _: &Cx) -> Result<String> {
        Ok(self.host.get().map(Host::encode_metrics).unwrap_or_default())
    }

    async fn drain(&self, _: &Cx) -> Result<()> {
        self.draining.store(true, Ordering::Release);
        loop {
            let idle = self.running.idle.notified();
            if self.running.count.load(Ordering::Acquire) == 0 {
                return Ok(());
            }
            idle.await;
        }
    }

    async fn shutdown(&self, _: &Cx) -> Result<()> {
        self.draining.store(true, Ordering::Release);
        if let Some(session) = self.session.get().and_then(WeakSession::upgrade) {
            session.cancel_served();
        }
        let Some(plugin) = self.plugin() else { return Ok(()) };
        match tokio::time::timeout(Duration::from_secs(10), plugin.shutdown()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(PluginError::internal("the plugin's shutdown did not end within 10 seconds")),
        }
    }
}

/// Allows another `configure` after one that failed, panicked or was given up.
struct Attempt<'a> {
    configuring: &'a AtomicBool,
    failed: bool,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.failed {
            self.configuring.store(false, Ordering::Release);
        }
    }
}

impl<A: Author> Drop for State<A> {
    fn drop(&mut self) {
        self.stop_runtime();
    }
}
