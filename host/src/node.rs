//! The node: every part started in its order, and ended in the reverse.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use futures::future::OptionFuture;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::cache::Cache;
use crate::config::{Config, Problems};
use crate::gateway::{self, ServeError};
use crate::identity::{IdentityError, NodeKey};
use crate::market::{Seller, SellerError};
use crate::network::Network;
use crate::scheduler::Scheduler;
use crate::supervisor::Supervisor;

/// Why a node cannot run.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("{}: {error}", folder.display())]
    DataDir { folder: std::path::PathBuf, error: std::io::Error },
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Market(#[from] SellerError),
    #[error(transparent)]
    Gateway(#[from] ServeError),
    #[error("signals cannot be received: {0}")]
    Signals(std::io::Error),
}

/// Reads the configuration again, for SIGHUP.
pub type Reread = Arc<dyn Fn() -> Result<Config, Problems> + Send + Sync>;

/// Runs a node until SIGTERM or Ctrl-C; then lets running requests end, and returns. A second signal returns at once.
///
/// SIGHUP reads the configuration again and applies it to the plugins: what is replaced loses no request.
pub async fn run(config: Config, reread: Reread) -> Result<(), NodeError> {
    let folder = config.node.data_dir.clone();
    std::fs::create_dir_all(&folder).map_err(|error| NodeError::DataDir { folder, error })?;
    let mut terminate = signal(SignalKind::terminate()).map_err(NodeError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(NodeError::Signals)?;
    let hangup = signal(SignalKind::hangup()).map_err(NodeError::Signals)?;

    let drain = Duration::from_millis(config.node.drain_timeout_ms);
    let supervisor = Supervisor::new(config.clone());
    let scheduler = Scheduler::new(config.scheduler.clone(), supervisor.subscribe());
    let stop = CancellationToken::new();
    let plugins = supervisor.clone();
    let texts: gateway::PluginTexts = Arc::new(move || {
        let plugins = plugins.clone();
        Box::pin(async move { plugins.metrics().await })
    });
    let metrics = gateway::Metrics::new(&scheduler, texts);
    let key = NodeKey::load_or_create(&config.node.data_dir.join("identity"))?;
    let seller = Seller::open(&config, scheduler.clone(), supervisor.subscribe())?;
    let network = Network::new(config.network.clone(), key, scheduler.clone(), seller.clone());
    metrics.register(|registry| network.register(registry));
    let cache = Cache::open(&config.cache, &config.node.data_dir, scheduler.clone(), supervisor.subscribe())?;
    if let Some(cache) = &cache {
        metrics.register(|registry| cache.register(registry));
    }
    let serving = gateway::serve(config.gateway, scheduler, cache, metrics, stop.clone()).await?;
    // The one line on standard output: for people, and for programs that asked for port 0.
    if let Err(error) = writeln!(std::io::stdout(), "Listening on http://{}", serving.address) {
        tracing::warn!(%error, "Nobody reads standard output.");
    }
    // Once it is certain that the node can serve, and said where.
    supervisor.start();
    announce(&supervisor);
    let market = seller.map(|seller| AbortOnDropHandle::new(tokio::spawn(seller.run(stop.clone()))));
    let peers = AbortOnDropHandle::new(tokio::spawn(network.run(supervisor.subscribe(), stop.clone())));
    let reloads = AbortOnDropHandle::new(tokio::spawn(reload_on(hangup, supervisor.clone(), reread)));

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    drop(reloads);
    stop.cancel();
    tracing::info!("Draining: running requests may end, new ones are refused.");
    let end = async {
        let drained = async { tokio::join!(serving.task, peers, OptionFuture::from(market)) };
        if tokio::time::timeout(drain, drained).await.is_err() {
            tracing::warn!("Requests were cut off: their time to end was over.");
        }
        supervisor.shutdown().await;
    };
    tokio::select! {
        () = end => tracing::info!("Stopped."),
        _ = terminate.recv() => tracing::warn!("Stopped at once by a second signal."),
        _ = interrupt.recv() => tracing::warn!("Stopped at once by a second signal."),
    }
    Ok(())
}

/// Says once in the log when the first model can be talked to.
fn announce(supervisor: &Supervisor) {
    let mut routes = supervisor.subscribe();
    tokio::spawn(async move {
        if let Ok(routes) = routes.wait_for(|routes| !routes.inference.is_empty()).await {
            let models: Vec<&str> =
                routes.inference.iter().flat_map(|route| route.models.iter().map(|model| model.id.as_str())).collect();
            tracing::info!(models = models.join(", "), "Ready.");
        }
    });
}

/// Applies the configuration at each SIGHUP, one after the other.
async fn reload_on(mut hangup: Signal, supervisor: Supervisor, reread: Reread) {
    while hangup.recv().await.is_some() {
        let config = match reread() {
            Ok(config) => config,
            Err(problems) => {
                tracing::error!("The configuration was not applied.\n{problems}");
                continue;
            }
        };
        for reloaded in supervisor.reload(config).await {
            match reloaded.result {
                Ok(outcome) => tracing::info!(plugin = %reloaded.id, outcome, "Configuration applied."),
                Err(error) => tracing::error!(plugin = %reloaded.id, "The plugin goes on as it was.\n{error}"),
            }
        }
    }
}
