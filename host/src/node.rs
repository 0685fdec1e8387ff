//! The node: every part started in its order, and ended in the reverse.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Problems};
use crate::gateway::{self, ServeError};
use crate::scheduler::Scheduler;
use crate::supervisor::Supervisor;

/// Why a node cannot run.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("{}: {error}", folder.display())]
    DataDir { folder: std::path::PathBuf, error: std::io::Error },
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
    let mut hangup = signal(SignalKind::hangup()).map_err(NodeError::Signals)?;

    let drain = Duration::from_millis(config.node.drain_timeout_ms);
    let supervisor = Supervisor::new(config.clone());
    let scheduler = Scheduler::new(config.scheduler, supervisor.subscribe());
    let stop = CancellationToken::new();
    let plugins = supervisor.clone();
    let texts: gateway::PluginTexts = Arc::new(move || {
        let plugins = plugins.clone();
        Box::pin(async move { plugins.metrics().await })
    });
    let metrics = gateway::Metrics::new(&scheduler, texts);
    let serving = gateway::serve(config.gateway, scheduler, metrics, stop.clone()).await?;
    // Plugins start once it is certain that the node can serve.
    supervisor.start();
    // The one line on standard output: for people, and for programs that asked for port 0.
    println!("Listening on http://{}", serving.address);
    announce(&supervisor);

    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // A replacement may take as long as a model loads: signals are heard meanwhile.
            _ = hangup.recv() => drop(tokio::spawn(reload(supervisor.clone(), reread.clone()))),
        }
    }
    tracing::info!("Draining: running requests may end, new ones are refused.");
    stop.cancel();
    let end = async {
        if tokio::time::timeout(drain, serving.task).await.is_err() {
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

async fn reload(supervisor: Supervisor, reread: Reread) {
    let config = match reread() {
        Ok(config) => config,
        Err(problems) => {
            tracing::error!("The configuration was not applied.\n{problems}");
            return;
        }
    };
    for reloaded in supervisor.reload(config).await {
        match reloaded.result {
            Ok(outcome) => tracing::info!(plugin = %reloaded.id, outcome, "Configuration applied."),
            Err(error) => tracing::error!(plugin = %reloaded.id, "The plugin goes on as it was.\n{error}"),
        }
    }
}
