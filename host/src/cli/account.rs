//! The account that a command acts with.

use clap::Args;
use fabstir_plugin_api::chain::Amount;

use super::Failure;
use super::keys::PasswordArgs;
use crate::config::Config;
use crate::identity::{Account, Keyring};
use crate::market::{self, Buyer, BuyerError, JournalError};

#[derive(Debug, Clone, Args)]
pub(super) struct AccountArgs {
    /// The key to act with, instead of market.key of the configuration.
    #[arg(long, value_name = "NAME")]
    key: Option<String>,

    #[command(flatten)]
    password: PasswordArgs,
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

pub(super) fn amount(text: &str) -> Result<Amount, String> {
    market::parse(text).map_err(|error| error.to_string())
}

impl AccountArgs {
    /// The key's name.
    pub fn name<'a>(&'a self, config: &'a Config) -> Result<&'a str, Failure> {
        self.key.as_deref().or(config.market.key.as_deref()).ok_or_else(|| {
            let message = "no account: make a key with `fabstir-node keys new NAME`, and name it with --key or market.key";
            Failure::new(Failure::CONFIG, "no_account", message)
        })
    }

    /// Opens the key; its password is asked for where no file holds it.
    pub fn open(&self, config: &Config) -> Result<Account, Failure> {
        let (name, keyring) = (self.name(config)?, Keyring::of(&config.node.data_dir));
        let password = self.password.known(config, &keyring.find(name)?.path)?;
        Ok(keyring.open(name, &password)?)
    }

    /// The address of the key.
    pub fn address(&self, config: &Config) -> Result<String, Failure> {
        let entry = Keyring::of(&config.node.data_dir).find(self.name(config)?)?;
        match entry.address {
            Some(address) => Ok(address.to_string()),
            // Some programs leave the address out of the file.
            None => Ok(self.open(config)?.address().to_string()),
        }
    }
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
