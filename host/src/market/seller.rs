//! The node as one who is paid: the account it acts with, for as long as there is a way to the chain.
//!
//! ```text
//! jobs.rs      posted jobs: judged, claimed, worked on, handed in
//! sessions.rs  paid sessions: offers, funding, vouchers
//! tab.rs       what one client owes in one of them
//! settling.rs  hands the best vouchers in, when their time has come
//! ```

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fabstir_plugin_api::chain::Chain;
use fabstir_plugin_api::error::PluginError;
use fabstir_plugin_api::transport::PeerId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::proving::{self, Prepared};
use super::{Desk, DeskError, Journal, JournalError, Limits, Prices};
use crate::clock::now_ms;
use crate::config::{self, Config};
use crate::identity::{Account, KeyError, Keyring, Password, PasswordError};
use crate::routes::{Route, Routes};
use crate::scheduler::Scheduler;

pub mod jobs;
pub mod sessions;
mod settling;
pub mod tab;

use sessions::Tabs;
use settling::Settling;

/// The pause before something is tried again that did not work.
const AGAIN: Duration = Duration::from_secs(2);

/// Why a node that is to be paid cannot be.
#[derive(Debug, thiserror::Error)]
pub enum SellerError {
    #[error("market.key: {0}")]
    Key(#[from] KeyError),
    #[error("keys.password_file: {0}")]
    Password(#[from] PasswordError),
    #[error(
        "market.key names an account, and keys.password_file is missing: a node that runs by itself can ask nobody for the password"
    )]
    NoPassword,
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What the lanes share: paid sessions and posted jobs.
pub struct Seller {
    pub config: config::Market,
    pub prices: Prices,
    pub journal: Journal,
    pub scheduler: Arc<Scheduler>,
    pub routes: watch::Receiver<Arc<Routes>>,
    /// What this node is called in the network, once it has joined one.
    pub peer: OnceLock<PeerId>,
    pub tabs: Tabs,
    settling: Settling,
    prepared: Prepared,
    /// When the node was started.
    started_ms: u64,
    account: Arc<Account>,
    desk: watch::Sender<Option<Arc<Desk>>>,
}

impl Seller {
    /// Opens the account and the journal. `None` where the configuration names no account: then nothing is charged.
    pub fn open(
        config: &Config,
        scheduler: Arc<Scheduler>,
        routes: watch::Receiver<Arc<Routes>>,
    ) -> Result<Option<Arc<Seller>>, SellerError> {
        let prices = Prices {
            input_per_mtok: config.network.price_input_wei_per_mtok.into(),
            output_per_mtok: config.network.price_output_wei_per_mtok.into(),
        };
        let Some(name) = &config.market.key else {
            if !prices.is_free() {
                tracing::warn!("Prices are set and market.key is not: they are told, and nothing is charged.");
            }
            return Ok(None);
        };
        let password = config.keys.password_file.as_ref().ok_or(SellerError::NoPassword)?;
        let password = Password::read(password)?;
        let account = Keyring::of(&config.node.data_dir).open(name, &password)?;
        Ok(Some(Arc::new(Seller {
            config: config.market.clone(),
            prices,
            journal: Journal::open(&config.node.data_dir)?,
            scheduler,
            routes,
            peer: OnceLock::new(),
            tabs: Tabs::default(),
            settling: Settling::default(),
            prepared: Prepared::default(),
            started_ms: now_ms(),
            account: Arc::new(account),
            desk: watch::Sender::new(None),
        })))
    }

    /// The desk, while there is one.
    ///
    /// # Errors
    /// `Unavailable` while no chain plugin is ready: what cannot be read and ordered is not promised.
    pub fn desk(&self) -> Result<Arc<Desk>, PluginError> {
        let unavailable = || PluginError::unavailable("the node has no way to the chain at the moment").retry_after(AGAIN);
        self.desk.borrow().clone().ok_or_else(unavailable)
    }

    /// Acts through the best chain plugin that there is, until `stop`; then lets what is in work end, and returns.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut routes = self.routes.clone();
        while !stop.is_cancelled() {
            let best = routes.borrow_and_update().chain.first().cloned();
            let generation = best.as_ref().map(|route| (route.plugin.clone(), route.generation));
            let is_another = |routes: &Arc<Routes>| {
                let best = routes.chain.first();
                best.map(|route| (&route.plugin, route.generation))
                    != generation.as_ref().map(|(plugin, number)| (plugin, *number))
            };
            let work = async {
                match best {
                    Some(route) => self.act(route, &stop).await,
                    None => stop.cancelled().await,
                }
                tokio::time::timeout(AGAIN, stop.cancelled()).await.is_ok()
            };
            let other = routes.wait_for(is_another);
            tokio::select! {
                // A plugin that cannot be acted through now may be later.
                _ = work => {}
                changed = other => if changed.is_err() { break },
            }
            self.desk.send_replace(None);
        }
        self.desk.send_replace(None);
    }

    /// One generation of the chain plugin. Ends where nothing can be done with it, and after `stop`.
    async fn act(self: &Arc<Self>, route: Arc<Route<dyn Chain>>, stop: &CancellationToken) {
        let desk = match self.sit_down(&route).await {
            Ok(desk) => desk,
            Err(error) => return tracing::error!(plugin = %route.plugin, %error, "The market cannot be acted in; trying again."),
        };
        tracing::info!(plugin = %route.plugin, account = %desk.account, chain = %desk.network.chain, "Acting in the market.");
        self.desk.send_replace(Some(desk.clone()));
        tokio::select! {
            // What is in work may end after `stop`, and what it brings is settled meanwhile.
            () = jobs::run(self, &desk, stop) => {}
            () = self.settle(&desk) => {}
            () = self.prepare_proofs(&desk) => {}
        }
    }

    /// Makes what proofs need, whenever there are other plugins. Ends with the plugins.
    async fn prepare_proofs(&self, desk: &Desk) {
        let mut routes = self.routes.clone();
        loop {
            let now = routes.borrow_and_update().clone();
            let again = match self.config.jobs {
                0 => None,
                _ => proving::prepare(&now, &desk.network, &self.prepared).await,
            };
            tokio::select! {
                () = tokio::time::sleep(again.unwrap_or_default()), if again.is_some() => {}
                () = self.prepared.damaged.notified() => {}
                changed = routes.changed() => if changed.is_err() {
                    return std::future::pending().await;
                },
            }
        }
    }

    async fn sit_down(&self, route: &Route<dyn Chain>) -> Result<Arc<Desk>, DeskError> {
        let limits = Limits {
            // The node itself sends nothing but fees.
            value_wei: 0,
            fee_wei: self.config.max_fee_wei.into(),
            daily_fee_wei: self.config.daily_fee_wei.into(),
        };
        Ok(Arc::new(Desk::begin(route.client.clone(), self.account.clone(), limits).await?))
    }
}
