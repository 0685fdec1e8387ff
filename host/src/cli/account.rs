//! The account that a command acts with, and the chain plugin that it acts through.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use fabstir_plugin_api::chain::{Amount, Chain, MarketEvent, Progress};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};

use super::keys::PasswordArgs;
use super::{ConfigArgs, Failure, log};
use crate::config::Config;
use crate::identity::{Account, Keyring};
use crate::market::history::History;
use crate::market::{self, Buyer, BuyerError, Desk, DeskError, JournalError, Limits, coins};
use crate::supervisor::{Alone, AloneError};

/// Which account a command acts with.
#[derive(Debug, Clone, Args)]
pub(super) struct AccountArgs {
    /// The key to act with, instead of market.key of the configuration.
    #[arg(long, value_name = "NAME")]
    key: Option<String>,

    #[command(flatten)]
    password: PasswordArgs,
}

impl AccountArgs {
    pub fn name<'a>(&'a self, config: &'a Config) -> Result<&'a str, Failure> {
        self.key.as_deref().or(config.market.key.as_deref()).ok_or_else(|| {
            let message = "no account: make a key with `fabstir-node keys new NAME`, and name it with --key or market.key";
            Failure::new(Failure::CONFIG, "no_account", message)
        })
    }

    /// Its address. The password is asked for only where the key's file does not name the address, as that of some programs.
    pub fn address(&self, config: &Config) -> Result<String, Failure> {
        let entry = Keyring::of(&config.node.data_dir).find(self.name(config)?)?;
        match entry.address {
            Some(address) => Ok(address.to_string()),
            None => Ok(self.open(config)?.address().to_string()),
        }
    }

    /// The key itself.
    pub fn open(&self, config: &Config) -> Result<Account, Failure> {
        let (name, keyring) = (self.name(config)?, Keyring::of(&config.node.data_dir));
        let password = self.password.known(config, &keyring.find(name)?.path)?;
        Ok(keyring.open(name, &password)?)
    }
}

/// Whether, and how much, a command may spend.
#[derive(Debug, Clone, Args)]
pub(super) struct SpendArgs {
    /// Pays nodes that ask for money, at most this much in all, as in 0.01eth.
    ///
    /// It caps the deposits of the sessions that are opened, less what has come back of them. Fees of the chain come on top, within
    /// market.max_fee_wei and market.daily_fee_wei. What is not used comes back as credit of the account, which `market withdraw` fetches.
    /// It needs a chain plugin in the configuration, and a key that owns the money. Without it, only nodes that ask for none are asked.
    #[arg(long, value_name = "AMOUNT", value_parser = amount)]
    max_spend: Option<Amount>,

    #[command(flatten)]
    account: AccountArgs,
}

/// An account that may spend, until it begins to.
pub(super) struct Purse {
    account: Account,
    most: Amount,
}

impl SpendArgs {
    /// The account and what it may spend; `None` where it may spend nothing. To be called on a thread that may ask the terminal.
    pub fn purse(&self, config: &Config) -> Result<Option<Purse>, Failure> {
        let Some(most) = self.max_spend else { return Ok(None) };
        if most.0 == 0 {
            return Err(Failure::new(Failure::USAGE, "usage", "--max-spend of nothing buys nothing: leave it out"));
        }
        Ok(Some(Purse { account: self.account.open(config)?, most }))
    }

    pub fn is_some(&self) -> bool {
        self.max_spend.is_some()
    }
}

impl Purse {
    /// Begins to act, and looks after what earlier runs have left.
    pub async fn begin(self, config: &Config) -> Result<std::sync::Arc<Buyer>, Failure> {
        let buyer = Buyer::begin(config, self.account, self.most).await?;
        buyer.sweep(market::buyer::Sweep::Start).await;
        Ok(buyer)
    }
}

/// What the commands share that act in the market, or look at it.
#[derive(Debug, Args)]
pub(super) struct Shared {
    /// How long to wait for the chain, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    wait: u64,

    /// What is logged, to standard error.
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    log: String,

    #[command(flatten)]
    pub account: AccountArgs,

    #[command(flatten)]
    config: ConfigArgs,
}

impl Shared {
    /// Reads the configuration and starts the log.
    pub fn prepare(&self, json: bool) -> Result<Config, Failure> {
        let config = self.config.load()?.config;
        log::start(&self.log, json)?;
        Ok(config)
    }

    pub fn within(&self) -> Duration {
        Duration::from_secs(self.wait)
    }
}

/// An amount of a command line.
pub(super) fn amount(text: &str) -> Result<Amount, String> {
    market::parse(text).map_err(|error| error.to_string())
}

/// An account of a command line.
pub(super) fn account(text: &str) -> Result<String, String> {
    let is_one =
        text.strip_prefix("0x").is_some_and(|digits| digits.len() == 40 && digits.bytes().all(|b| b.is_ascii_hexdigit()));
    if is_one { Ok(text.to_lowercase()) } else { Err("an account is 0x and 40 hexadecimal digits".into()) }
}

/// The time that a call to the plugin may take.
pub(super) fn cx() -> Cx {
    Cx::new().with_timeout(Duration::from_secs(30))
}

/// Starts the chain plugin of the configuration, works with it and ends it.
pub(super) async fn with_chain<T>(
    config: &Config,
    work: impl AsyncFnOnce(&Arc<dyn Chain>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let plugin = Alone::start(config.clone(), |routes| &routes.chain).await?;
    let done = work(&plugin.client).await;
    plugin.end().await;
    done
}

/// As [`with_chain`], acting for an account. `most` is what one transaction may send along.
pub(super) async fn at_desk<T>(
    config: &Config,
    account: Account,
    most: Amount,
    work: impl AsyncFnOnce(&Desk) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let limits = limits(config, most);
    with_chain(config, async |chain| work(&Desk::begin(chain.clone(), account, limits).await?).await).await
}

/// What an account may spend. `most` is what one transaction may send along.
pub(super) fn limits(config: &Config, most: Amount) -> Limits {
    Limits { value_wei: most.0, fee_wei: config.market.max_fee_wei.into(), daily_fee_wei: config.market.daily_fee_wei.into() }
}

/// What has happened in the market up to the newest block.
pub(super) async fn history(
    chain: &Arc<dyn Chain>,
    keep: impl Fn(&MarketEvent) -> bool + Send + 'static,
    within: Duration,
) -> Result<History, Failure> {
    let read = async {
        let heads = chain.heads(&cx()).await?;
        let mut history = History::begin(chain, keep).await?;
        history.read_to(heads.latest.number).await?;
        Ok(history)
    };
    let message = format!("the market's history could not be read within {} s: give it longer with --wait", within.as_secs());
    let late = |_| Failure::new(Failure::UNREACHABLE, "unreachable", message);
    tokio::time::timeout(within, read).await.map_err(late)?.map_err(|error| of_plugin(&error))
}

/// What a carried out order has cost, in words.
pub(super) fn done(progress: &Progress, coin: &str) -> String {
    format!(
        "done in block {}, transaction {}, fee {}",
        progress.block.map_or("?".into(), |block| block.to_string()),
        progress.transaction.as_deref().unwrap_or("?"),
        progress.fee.map_or("unknown".into(), |fee| coins(fee, coin)),
    )
}

impl From<AloneError> for Failure {
    fn from(error: AloneError) -> Self {
        match &error {
            AloneError::None { kind } => {
                let ours = match *kind {
                    "chain" => "chain-base",
                    "prover" => "prover-groth16",
                    _ => "storage-disk",
                };
                let message = format!(
                    "{error}: add an entry with use = \"{ours}\" to plugins.toml, as the comments of the shipped file show"
                );
                Failure::new(Failure::CONFIG, &format!("no_{kind}"), message)
            }
            AloneError::Start { .. } => Failure::new(Failure::FAILED, "plugin", error),
        }
    }
}

impl From<DeskError> for Failure {
    fn from(error: DeskError) -> Self {
        let code = match &error {
            DeskError::Plugin(error) => return of_plugin(error),
            DeskError::Unsigned(_) => "unsigned",
            DeskError::Network(_) => "network",
            DeskError::Refused(_) => "refused",
            DeskError::Reverted { .. } => "reverted",
            DeskError::Dead { .. } => "dead",
            DeskError::Pending { .. } => "pending",
        };
        Failure::new(Failure::FAILED, code, error)
    }
}

impl From<BuyerError> for Failure {
    fn from(error: BuyerError) -> Self {
        match error {
            BuyerError::Plugin(error) => error.into(),
            BuyerError::Journal(error) => error.into(),
            BuyerError::Desk(error) => error.into(),
        }
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        Failure::new(Failure::FAILED, "journal", error)
    }
}

/// What the chain plugin says that it could not do.
pub(super) fn of_plugin(error: &PluginError) -> Failure {
    match error.code {
        Code::Unavailable | Code::DeadlineExceeded => Failure::new(Failure::UNREACHABLE, "unreachable", error),
        _ => Failure::new(Failure::FAILED, "plugin", error),
    }
}
