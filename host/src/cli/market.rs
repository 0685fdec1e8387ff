//! `fabstir-node market`: this node's account in the market's contracts.

use clap::{Args, Subcommand};
use fabstir_plugin_api::chain::{Act, Amount, Balances};
use serde_json::json;

use super::account::{Shared, amount, at_desk, cx, done, with_chain};
use super::network::on_threads;
use super::{Failure, print, purchases, table};
use crate::config::Config;
use crate::identity::NodeKey;
use crate::market::buyer::Sweep;
use crate::market::{Buyer, DeskError, NATIVE, coins};

/// Shows and changes what this node has in the market's contracts.
///
/// It acts through the chain plugin of the configuration, with the account key that market.key names. Every order is on disk before it is
/// sent: a command that was cut off is given again, and nothing is done twice. While a node runs with the same account, it is the node
/// that acts, and these commands say so.
#[derive(Debug, Args)]
pub struct Market {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Shows the account, what it has and what the market holds for it.
    Status(Shared),
    /// Makes the account a node of the market: a stake, and where its earnings go.
    ///
    /// The payout account needs no key on this machine, and only its owner can change it later: who steals the key of this node cannot
    /// take what was earned.
    Register {
        /// What is put down, as in 0.05eth. It comes back after `exit`.
        #[arg(long, value_name = "AMOUNT", value_parser = amount)]
        stake: Amount,
        /// The account that is paid what this node earns, and gets the stake back.
        #[arg(long, value_name = "ACCOUNT")]
        payout: String,
        #[command(flatten)]
        shared: Shared,
    },
    /// Ends being a node of the market.
    ///
    /// Nothing more can be claimed. After the contract's delay, `exit` again frees the stake for the payout account.
    Exit(Shared),
    /// Fetches what the market owes this account.
    Withdraw {
        /// Where it goes. Left out, to the account itself.
        #[arg(long, value_name = "ACCOUNT")]
        to: Option<String>,
        #[command(flatten)]
        shared: Shared,
    },
    /// Fetches back what is left of sessions in which this account has paid.
    ///
    /// Sessions that a command has left behind are closed; their nodes may still hand in what was promised to them until the session's
    /// window is over, and `reclaim` after that fetches the rest. What came back is credit, which `withdraw` fetches.
    Reclaim(Shared),
}

impl Market {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        match self.action {
            Action::Status(shared) => status(&shared, json),
            Action::Reclaim(shared) => reclaim(&shared, json),
            Action::Register { stake, payout, shared } => {
                let config = shared.prepare(json)?;
                let key = NodeKey::load_or_create(&config.node.data_dir.join("identity"))
                    .map_err(|error| Failure::new(Failure::FAILED, "identity", error))?;
                // The network knows it by this key, whatever the transport calls it.
                let peer = hex::encode(key.public_key());
                shared.order(&config, "register", |_, _| Ok(Act::Register { payout, peer, stake }), stake, json)
            }
            Action::Exit(shared) => {
                let config = shared.prepare(json)?;
                shared.order(&config, "exit", |_, balances| exit(balances), Amount(0), json)
            }
            Action::Withdraw { to, shared } => {
                let config = shared.prepare(json)?;
                let withdraw = |account: &str, balances: &Balances| withdraw(account, balances, to);
                shared.order(&config, "withdraw", withdraw, Amount(0), json)
            }
        }
    }
}

fn exit(balances: &Balances) -> Result<Act, Failure> {
    match (&balances.payout, balances.exits_at_s) {
        (None, _) => Err(Failure::new(Failure::FAILED, "no_node", "this account is no node of the market: nothing to end")),
        (Some(_), None) => Ok(Act::BeginExit),
        (Some(_), Some(_)) => Ok(Act::FinishExit),
    }
}

fn withdraw(account: &str, balances: &Balances, to: Option<String>) -> Result<Act, Failure> {
    let to = to.unwrap_or_else(|| account.to_owned());
    match (balances.credit.0, balances.returned.0) {
        (0, 0) => Err(Failure::new(Failure::FAILED, "nothing", "the market owes this account nothing")),
        (0, _) => Ok(Act::WithdrawStake { to }),
        _ => Ok(Act::Withdraw { coin: NATIVE.into(), to }),
    }
}

impl Shared {
    /// Starts the plugin, orders one act and tells what came of it.
    fn order(
        &self,
        config: &Config,
        name: &str,
        act: impl FnOnce(&str, &Balances) -> Result<Act, Failure>,
        most: Amount,
        json: bool,
    ) -> Result<(), Failure> {
        let account = self.account.open(config)?;
        let (progress, coin) = on_threads(at_desk(config, account, most, async |desk| {
            let balances = desk.chain.balances(&cx(), desk.account.clone()).await.map_err(DeskError::from)?;
            let act = act(&desk.account, &balances)?;
            desk.quote(act.clone()).await?;
            let progress = desk.carry_out(name, act, self.within()).await?;
            Ok((progress, desk.network.coin.clone()))
        }))?;
        Ok(print(json, &json!(progress), done(&progress, &coin))?)
    }
}

fn status(shared: &Shared, json: bool) -> Result<(), Failure> {
    let config = shared.prepare(json)?;
    let name = shared.account.name(&config)?;
    let address = shared.account.address(&config)?;
    let (network, heads, balances) = on_threads(with_chain(&config, async |chain| {
        let read = async {
            let network = chain.network(&cx()).await?;
            let heads = chain.heads(&cx()).await?;
            let balances = chain.balances(&cx(), address.clone()).await?;
            Ok::<_, DeskError>((network, heads, balances))
        };
        Ok(read.await?)
    }))?;
    let shown = |amount: Amount| coins(amount, &network.coin);
    let node = match (&balances.payout, balances.exits_at_s) {
        (None, _) => "no node of the market".to_owned(),
        (Some(payout), None) => format!("a node, which pays out to {payout}"),
        (Some(payout), Some(at)) => format!("a node that leaves at {at} (Unix time), and pays out to {payout}"),
    };
    let rows = [
        ["account".into(), format!("{address} ({name}), {node}")],
        ["chain".into(), format!("{}, block {}", network.chain, heads.latest.number)],
        ["has".into(), shown(balances.coin)],
        ["credit".into(), shown(Amount(balances.credit.0 + balances.returned.0))],
        ["stake".into(), format!("{}, of which {} stand for jobs", shown(balances.stake), shown(balances.bonded))],
    ];
    let value = json!({ "account": address, "key": name, "network": network, "heads": heads, "balances": balances });
    Ok(print(json, &value, table(&rows))?)
}

fn reclaim(shared: &Shared, json: bool) -> Result<(), Failure> {
    let config = shared.prepare(json)?;
    let account = shared.account.open(&config)?;
    on_threads(async {
        // Nothing but fees is sent.
        let buyer = Buyer::begin(&config, account, Amount(0)).await?;
        buyer.sweep(Sweep::All).await;
        buyer.end().await;
        Ok(())
    })?;
    purchases::tell(&config, json)
}
