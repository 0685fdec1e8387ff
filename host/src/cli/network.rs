//! `fabstir-node find`, `peers` and `connect`: the network as one who asks sees it.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::transport::Peer;
use futures::stream;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::account::{Purse, SpendArgs};
use super::{ConfigArgs, Failure, log, print, purchases, table};
use crate::config::{self, Config};
use crate::consumer::{Found, Market, Visit, VisitError, Wanted, ask_all, find};
use crate::gateway;
use crate::market::Buyer;
use crate::market::buyer::{Receipt, Sweep};
use crate::network::capability::Offer;
use crate::scheduler::Scheduler;

/// How a command reaches the network.
#[derive(Debug, Clone, Args)]
pub(super) struct NetworkArgs {
    #[command(flatten)]
    pub config: ConfigArgs,

    /// A node to begin with, besides those that the configuration names; may be repeated.
    ///
    /// The address ends with the node's id, as its log shows it: /ip4/203.0.113.7/tcp/4001/p2p/12D3Koo...
    #[arg(long, value_name = "ADDRESS")]
    bootstrap: Vec<String>,

    /// What is logged, to standard error.
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    log: String,
}

impl NetworkArgs {
    /// Reads the configuration and starts the log.
    pub fn prepare(&self, json: bool) -> Result<Config, Failure> {
        let config = self.config.load()?.config;
        log::start(&self.log, json)?;
        Ok(config)
    }

    pub async fn visit(&self, config: &Config) -> Result<Visit, Failure> {
        Ok(Visit::begin(config, &self.bootstrap).await?)
    }
}

impl From<VisitError> for Failure {
    fn from(error: VisitError) -> Self {
        let (exit, code) = match &error {
            VisitError::NoTransport => (Failure::CONFIG, "no_transport"),
            VisitError::Unreachable(_) => (Failure::UNREACHABLE, "unreachable"),
            _ => (Failure::FAILED, "network"),
        };
        Failure::new(exit, code, error)
    }
}

/// Lists which nodes offer which models.
///
/// It joins the network for a moment, asks who offers the model, or whom it meets where none is named, and asks each of them what it
/// has now. Every line is what the node itself has signed. The cheapest come first, then those with a free slot, then the nearest.
#[derive(Debug, Args)]
pub struct Find {
    /// The model's name, or its digest: 64 hexadecimal digits, as this list shows them with --json. Without it, everything that is met.
    model: Option<String>,

    /// How long to look, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    wait: f64,

    #[command(flatten)]
    network: NetworkArgs,
}

/// Lists the nodes that are met in the network.
///
/// It joins for a moment, and shows who is connected: on the local network, by --bootstrap and by the configuration.
#[derive(Debug, Args)]
pub struct Peers {
    /// How long to look, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    wait: f64,

    #[command(flatten)]
    network: NetworkArgs,
}

/// Serves a model of the network on a local port.
///
/// Any OpenAI client can be pointed at the port. Requests go to the best node that offers the model, and to the next one if that
/// fails before its first token. An answer goes on after a broken connection, as long as its node is back within a minute. Its address
/// goes to standard output. Ctrl-C ends it.
///
/// With --max-spend, nodes that ask for money are asked too, and paid as their answers arrive: at the end a receipt per session goes to
/// standard error, or with --json as one value to standard output. A request that the budget does not allow is answered with status 402.
#[derive(Debug, Args)]
pub struct Connect {
    /// The model's name, or its digest: 64 hexadecimal digits, as `find --json` shows them.
    #[arg(long, short, value_name = "NAME")]
    model: String,

    /// Where clients connect.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8081")]
    listen: SocketAddr,

    #[command(flatten)]
    spend: SpendArgs,

    #[command(flatten)]
    network: NetworkArgs,
}

pub(super) fn threads() -> Result<tokio::runtime::Runtime, Failure> {
    let threads = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    threads.map_err(|error| Failure::new(Failure::FAILED, "runtime", format!("cannot start threads: {error}")))
}

/// Runs a command's work on threads of its own.
pub(super) fn on_threads<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = threads()?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}

pub(super) fn seconds(wait: f64) -> Result<Duration, Failure> {
    Duration::try_from_secs_f64(wait).map_err(|_| Failure::new(Failure::USAGE, "usage", "--wait is a number of seconds"))
}

/// How often it is looked again.
const LOOK: Duration = Duration::from_millis(250);

impl Find {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.network.prepare(json)?;
        let wait = seconds(self.wait)?;
        let wanted = self.model.as_deref().map(Wanted::parse);
        let found = on_threads(async {
            let visit = self.network.visit(&config).await?;
            let found = look(&visit, wanted.as_ref(), wait).await;
            visit.end().await;
            Ok(found)
        })?;
        if found.is_empty() && !json {
            let what = self.model.as_deref().map_or("offers a model".to_owned(), |model| format!("offers `{model}`"));
            let message =
                format!("nobody who {what} was found within {} s: name a node with --bootstrap, or look longer", self.wait);
            return Err(Failure::new(Failure::FAILED, "nobody", message));
        }
        let mut rows = vec![["MODEL", "CONTEXT", "FREE", "WEI/MTOK IN", "OUT", "LATENCY", "NODE"].map(str::to_owned)];
        for node in &found {
            let shown = |offer: &&Offer| wanted.as_ref().is_none_or(|wanted| wanted.is(offer));
            rows.extend(node.models.iter().filter(shown).map(|offer| row(node, offer)));
        }
        Ok(print(json, &json!({ "nodes": found }), table(&rows))?)
    }
}

fn row(node: &Found, offer: &Offer) -> [String; 7] {
    [
        offer.name.clone(),
        offer.context.to_string(),
        format!("{} of {}", offer.free, offer.slots),
        offer.price_input_wei_per_mtok.to_string(),
        offer.price_output_wei_per_mtok.to_string(),
        format!("{:.1} ms", node.latency_ms),
        node.peer.to_string(),
    ]
}

/// Looks until the time is over, or until two looks after another have found the same nodes.
pub(super) async fn look(visit: &Visit, wanted: Option<&Wanted>, wait: Duration) -> Vec<Found> {
    let until = Instant::now() + wait;
    let mut before: Vec<Found> = Vec::new();
    loop {
        let found = match wanted {
            Some(wanted) => find(&visit.transport, wanted).await,
            None => ask_all(&visit.transport, stream::iter(connected(visit).await)).await,
        };
        let over = Instant::now() >= until;
        if over || (!found.is_empty() && found.len() == before.len()) {
            return if found.len() < before.len() { before } else { found };
        }
        before = found;
        tokio::time::sleep(LOOK).await;
    }
}

async fn connected(visit: &Visit) -> Vec<Peer> {
    let peers = visit.transport.peers(&Cx::new().with_timeout(Duration::from_secs(5))).await;
    peers.unwrap_or_else(|error| {
        tracing::warn!(%error, "The plugin does not say who is connected.");
        Vec::new()
    })
}

impl Peers {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.network.prepare(json)?;
        let wait = seconds(self.wait)?;
        let peers = on_threads(async {
            let visit = self.network.visit(&config).await?;
            let until = Instant::now() + wait;
            let mut met = BTreeMap::new();
            while Instant::now() < until {
                met.extend(connected(&visit).await.into_iter().map(|peer| (peer.id.clone(), peer)));
                tokio::time::sleep(LOOK).await;
            }
            visit.end().await;
            Ok(met.into_values().collect::<Vec<Peer>>())
        })?;
        if peers.is_empty() && !json {
            let message = format!("nobody was met within {} s: name a node with --bootstrap, or look longer", self.wait);
            return Err(Failure::new(Failure::FAILED, "nobody", message));
        }
        let mut rows = vec![["NODE", "SOFTWARE", "ROUND TRIP", "ADDRESSES"].map(str::to_owned)];
        rows.extend(peers.iter().map(|peer| {
            let rtt = peer.rtt_ms.map_or("-".to_owned(), |rtt| format!("{rtt:.1} ms"));
            [peer.id.to_string(), plain(peer.agent.as_deref().unwrap_or("-")), rtt, plain(&peer.addresses.join(" "))]
        }));
        Ok(print(json, &json!({ "peers": peers }), table(&rows))?)
    }
}

/// What a stranger wrote, fit for a terminal.
pub(super) fn plain(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).take(300).collect()
}

/// A local port behind which the network serves a model.
pub(super) struct Local {
    pub address: SocketAddr,
    serving: gateway::Serving,
    stop: CancellationToken,
    visit: Visit,
    market: Arc<Market>,
    looking: tokio_util::task::AbortOnDropHandle<()>,
    buyer: Option<Arc<Buyer>>,
}

/// What a command has paid, and in which coin.
pub(super) struct Paid {
    pub receipts: Vec<Receipt>,
    pub coin: String,
}

impl Paid {
    /// Prints the receipts for people, where there are any.
    pub fn tell(&self) {
        if !self.receipts.is_empty() {
            eprintln!("{}", purchases::receipts(&self.receipts, &self.coin));
        }
    }
}

impl Local {
    /// With a purse, nodes that ask for money are paid from it.
    pub async fn open(
        network: &NetworkArgs,
        config: &Config,
        model: &str,
        listen: SocketAddr,
        purse: Option<Purse>,
    ) -> Result<Self, Failure> {
        let buyer = match purse {
            Some(purse) => Some(purse.begin(config).await?),
            None => None,
        };
        let visit = match (network.visit(config).await, &buyer) {
            (Err(failure), Some(buyer)) => {
                buyer.end().await;
                return Err(failure);
            }
            (visit, _) => visit?,
        };
        let payer = buyer.clone().map(|buyer| (buyer, visit.peer.clone()));
        let market = Arc::new(Market::new(visit.transport.clone(), Wanted::parse(model), payer));
        let routes = market.routes();
        // Another node is another chance, and there may be many.
        let scheduler =
            Scheduler::new(config::Scheduler { retries: config.scheduler.retries.max(3), ..config.scheduler.clone() }, routes);
        let looking = tokio::spawn({
            let market = market.clone();
            async move { market.run().await }
        });
        let metrics = gateway::Metrics::new(&scheduler, Arc::new(|| Box::pin(async { Vec::new() })));
        let stop = CancellationToken::new();
        let config = config::Gateway { listen, ..config.gateway.clone() };
        let serving = gateway::serve(config, scheduler, None, metrics, stop.clone()).await;
        let serving = serving.map_err(|error| Failure::new(Failure::FAILED, "gateway", error))?;
        let looking = tokio_util::task::AbortOnDropHandle::new(looking);
        Ok(Self { address: serving.address, serving, stop, visit, market, looking, buyer })
    }

    /// Lets running answers end, at most for so long; then gives back what was paid for and not used.
    pub async fn close(self, drain: Duration) -> Option<Paid> {
        let Self { serving, stop, visit, market, looking, buyer, .. } = self;
        stop.cancel();
        // Those that are left are cut off.
        let _ = tokio::time::timeout(drain, serving.task).await;
        drop(looking);
        let paid = match &buyer {
            Some(buyer) => {
                market.close().await;
                buyer.sweep(Sweep::End).await;
                let receipts = buyer.receipts().await.unwrap_or_else(|error| {
                    tracing::error!(%error, "What was bought cannot be read.");
                    Vec::new()
                });
                buyer.end().await;
                Some(Paid { receipts, coin: buyer.desk.network.coin.clone() })
            }
            None => None,
        };
        // With it go the sessions, so that the visit has nothing to wait for.
        drop(market);
        visit.end().await;
        paid
    }
}

impl Connect {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.network.prepare(json)?;
        let purse = self.spend.purse(&config)?;
        on_threads(async {
            let signals =
                |error: std::io::Error| Failure::new(Failure::FAILED, "signals", format!("signals cannot be received: {error}"));
            let mut terminate = signal(SignalKind::terminate()).map_err(signals)?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(signals)?;
            let local = tokio::select! {
                local = Local::open(&self.network, &config, &self.model, self.listen, purse) => local?,
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
            };
            writeln!(std::io::stdout(), "Listening on http://{}", local.address)?;
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            let end = local.close(Duration::from_millis(config.node.drain_timeout_ms));
            let paid = tokio::select! {
                paid = end => paid,
                _ = terminate.recv() => None,
                _ = interrupt.recv() => None,
            };
            match paid {
                Some(paid) if json => writeln!(std::io::stdout(), "{:#}", json!({ "purchases": paid.receipts }))?,
                Some(paid) => paid.tell(),
                None => {}
            }
            Ok(())
        })
    }
}
