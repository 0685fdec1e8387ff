//! `fabstir-node run`.

use std::sync::Arc;

use clap::Args;

use super::{ConfigArgs, Failure, flag, log};
use crate::config::Sources;
use crate::node;

/// Starts the node.
///
/// It loads the plugins that plugins.toml names and serves clients until it gets SIGTERM or Ctrl-C; then it refuses new requests,
/// lets the running ones end, and leaves. A second signal ends it at once. SIGHUP makes it read the configuration again. Its
/// address goes to standard output, the log to standard error.
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    config: ConfigArgs,

    /// Where HTTP clients connect; the same as --set gateway.listen=ADDRESS.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,

    /// What is logged; the same as --set node.log=FILTER.
    ///
    /// A level (error, warn, info, debug, trace), or a list of target=level such as info,plugin::llama=debug.
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,

    /// Looks for plugins only beside the node's own binary; the same as --set node.safe_mode=true.
    ///
    /// For finding out which plugin breaks a start.
    #[arg(long)]
    safe_mode: bool,
}

impl Run {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let mut flags = self.config.flags();
        flags.extend(self.listen.iter().map(|address| flag(&format!("--listen {address}"), "gateway.listen", address)));
        flags.extend(self.log.iter().map(|filter| flag(&format!("--log {filter}"), "node.log", filter)));
        flags.extend(self.safe_mode.then(|| flag("--safe-mode", "node.safe_mode", "true")));
        let sources = Sources::of_process(self.config.config, flags);
        let config = sources.load()?.config;
        log::start(&config.node.log, json)?;
        // Relative paths in plugins' settings start at the file's folder, also for plugins in this process.
        std::env::set_current_dir(&config.base_dir).map_err(|error| {
            Failure::new(Failure::FAILED, "folder", format!("cannot work in {}: {error}", config.base_dir.display()))
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("node").build();
        let runtime =
            runtime.map_err(|error| Failure::new(Failure::FAILED, "runtime", format!("cannot start threads: {error}")))?;
        let reread: node::Reread = Arc::new(move || sources.load().map(|loaded| loaded.config));
        let result = runtime.block_on(node::run(config, reread));
        // Whatever still runs has had its time to drain.
        runtime.shutdown_background();
        result.map_err(|error| Failure::new(Failure::FAILED, "node", error))
    }
}
