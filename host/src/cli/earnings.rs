//! `fabstir-node earnings`.

use std::sync::Arc;

use clap::Args;
use fabstir_plugin_api::chain::{Amount, Balances, Chain, Heads, MarketEvent};
use serde_json::json;

use super::account::{Shared, cx, history, of_plugin, with_chain};
use super::network::on_threads;
use super::{Failure, print, table};
use crate::config::Config;
use crate::market::earnings::{Earnings as Earned, Sum};
use crate::market::{coins, journal};

/// Shows what this node has earned.
///
/// What was promised and handed in, and what is delivered and not promised yet, comes from the node's journal, which may be read while it runs. How much of it the chain has, and in how
/// sure a block, and what waits to be withdrawn, comes from the chain; where that cannot be reached, those lines say so.
#[derive(Debug, Args)]
pub struct Earnings {
    #[command(flatten)]
    shared: Shared,
}

/// What the chain has paid to this node.
#[derive(Debug, serde::Serialize)]
struct OnChain {
    coin: String,
    mined: Amount,
    safe: Amount,
    #[serde(rename = "final")]
    final_: Amount,
    /// Where it is paid; `None` where the account is no node.
    payout: Option<String>,
    /// What the market owes the payout account.
    credit: Option<Amount>,
}

impl Earnings {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        let config = self.shared.prepare(json)?;
        let earned = match journal::look(&config.node.data_dir)? {
            Some(journal) => Earned::read(&journal)?,
            None => Earned::default(),
        };
        let chain = self.shared.account.address(&config).and_then(|address| self.on_chain(&config, &address));
        let coin = chain.as_ref().map_or("ETH", |chain| &chain.coin).to_owned();
        let sum = |sum: Sum, one: &str| match sum.count {
            0 => coins(sum.amount, &coin),
            1 => format!("{}, 1 {one}", coins(sum.amount, &coin)),
            count => format!("{}, {count} {one}s", coins(sum.amount, &coin)),
        };
        let Earned { sessions, jobs } = &earned;
        let settled = earned.settled();
        let mut rows = vec![
            ["earned in all".to_owned(), coins(settled.amount, &coin)],
            ["  sessions, settled".into(), sum(sessions.settled, "session")],
            ["  jobs, settled".into(), sum(jobs.settled, "job")],
            ["not settled yet".into(), coins(earned.outstanding().amount, &coin)],
            ["  sessions, vouchered".into(), sum(sessions.vouchered, "session")],
            ["  sessions, settling".into(), sum(sessions.settling, "session")],
            ["  jobs, submitted".into(), sum(jobs.submitted, "job")],
        ];
        rows.push(["exposed now".into(), sum(sessions.exposed, "session")]);
        if sessions.lost.count > 0 {
            rows.push(["lost".into(), sum(sessions.lost, "session")]);
        }
        match &chain {
            Ok(chain) => {
                rows.push(["paid by the contract".into(), format!("{} mined", coins(chain.mined, &coin))]);
                rows.push([String::new(), format!("{} safe, {} final", coins(chain.safe, &coin), coins(chain.final_, &coin))]);
                rows.push(["to be withdrawn".into(), withdrawable(chain, &coin)]);
            }
            Err(failure) => {
                tracing::warn!(why = %failure.text(), "The chain cannot be asked.");
                rows.push(["paid by the contract".into(), "not known: the chain cannot be asked".into()]);
                rows.push(["to be withdrawn".into(), "not known".into()]);
            }
        }
        let value = json!({
            "earned": settled.amount,
            "outstanding": earned.outstanding().amount,
            "sessions": sessions,
            "jobs": jobs,
            "chain": chain.as_ref().ok(),
            "chain_error": chain.as_ref().err().map(Failure::text),
        });
        Ok(print(json, &value, table(&rows))?)
    }

    fn on_chain(&self, config: &Config, address: &str) -> Result<OnChain, Failure> {
        on_threads(with_chain(config, async |chain| {
            let mine = address.to_ascii_lowercase();
            let is_paid = move |event: &MarketEvent| paid(event).is_some_and(|(host, _)| host.to_ascii_lowercase() == mine);
            let told = history(chain, is_paid, self.shared.within()).await?;
            let (heads, balances, credit, coin) = balances(chain, address).await.map_err(|error| of_plugin(&error))?;
            let up_to = |number: u64| {
                let events = told.events().iter().filter(|(block, _)| *block <= number);
                Amount(events.filter_map(|(_, event)| paid(event)).map(|(_, amount)| amount.0).sum())
            };
            Ok(OnChain {
                coin,
                mined: up_to(u64::MAX),
                safe: up_to(heads.safe.number),
                final_: up_to(heads.final_.number),
                payout: balances.payout,
                credit,
            })
        }))
    }
}

async fn balances(
    chain: &Arc<dyn Chain>,
    address: &str,
) -> fabstir_plugin_api::error::Result<(Heads, Balances, Option<Amount>, String)> {
    let heads = chain.heads(&cx()).await?;
    let balances = chain.balances(&cx(), address.to_owned()).await?;
    let credit = match &balances.payout {
        Some(payout) => Some(chain.balances(&cx(), payout.clone()).await?.credit),
        None => None,
    };
    Ok((heads, balances, credit, chain.network(&cx()).await?.coin))
}

fn withdrawable(chain: &OnChain, coin: &str) -> String {
    match (&chain.payout, chain.credit) {
        (Some(payout), Some(credit)) => format!("{}, by {payout}", coins(credit, coin)),
        _ => "nothing: this account is no node of the market".into(),
    }
}

/// What an event pays, and to which node.
fn paid(event: &MarketEvent) -> Option<(&str, Amount)> {
    match event {
        MarketEvent::VoucherSettled { host, paid_now, .. } => Some((host, *paid_now)),
        MarketEvent::JobSettled { host, to_host, .. } => Some((host, *to_host)),
        _ => None,
    }
}
