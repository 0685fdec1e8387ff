//! `fabstir-node cache`: what is kept of earlier answers. Reads and writes the store's file, whether the node runs or not.

use clap::{Args, Subcommand};
use serde_json::json;

use super::{ConfigArgs, Failure, print, table};
use crate::cache::store::{Look, Share, Stock, remove_aside};

/// Shows and removes the answers that are kept to be given again.
#[derive(Debug, Args)]
pub struct Cache {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Stats(Stats),
    Flush(Flush),
}

/// Shows how much is kept, for whom and of which model, and what it has saved.
///
/// A tenant is one API key with one `user` of the request's body, told apart by a hash of both; `-` are all who send neither.
#[derive(Debug, Args)]
struct Stats {
    #[command(flatten)]
    config: ConfigArgs,
}

/// Removes kept answers, and leaves nothing of them in the file.
///
/// Without --tenant all go. What is being generated meanwhile may be kept again.
/// Where answers are shared, the running node erases them there, and the other nodes at their next round.
#[derive(Debug, Args)]
struct Flush {
    /// Removes those of one tenant only, named as `cache stats` names it.
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,

    #[command(flatten)]
    config: ConfigArgs,
}

/// What stands for the tenant without a name.
const NOBODY: &str = "-";

impl Cache {
    pub fn execute(self, json: bool) -> Result<(), Failure> {
        match self.command {
            Command::Stats(stats) => stats.execute(json),
            Command::Flush(flush) => flush.execute(json),
        }
    }
}

impl Stats {
    fn execute(self, json: bool) -> Result<(), Failure> {
        let mut stock = match look(&self.config)? {
            Some(look) => look.stock().map_err(unread)?,
            None => Stock::default(),
        };
        stock.tenants.iter_mut().filter(|share| share.name.is_empty()).for_each(|share| share.name = NOBODY.into());
        let text = match stock.models.is_empty() {
            true => "no answers are kept".to_owned(),
            false => format!("{}\n\n{}", shares("MODEL", &stock.models), shares("TENANT", &stock.tenants)),
        };
        Ok(print(json, &json!(stock), text)?)
    }
}

fn shares(of: &str, shares: &[Share]) -> String {
    let mut rows = vec![[of, "ANSWERS", "KIB", "HITS", "TOKENS SAVED"].map(str::to_owned)];
    rows.extend(shares.iter().map(|share| {
        let Share { name, entries, bytes, hits, tokens_saved } = share;
        [name.clone(), entries.to_string(), bytes.div_ceil(1024).to_string(), hits.to_string(), tokens_saved.to_string()]
    }));
    table(&rows)
}

impl Flush {
    fn execute(self, json: bool) -> Result<(), Failure> {
        let tenant = self.tenant.as_deref().map(|name| if name == NOBODY { "" } else { name });
        remove_aside(&self.config.load()?.config.node.data_dir);
        let removed = match look(&self.config)? {
            Some(look) => look.flush(tenant).map_err(unread)?,
            None => 0,
        };
        Ok(print(json, &json!({ "removed": removed }), format!("removed {removed} kept answers"))?)
    }
}

fn look(config: &ConfigArgs) -> Result<Option<Look>, Failure> {
    Look::open(&config.load()?.config.node.data_dir).map_err(unread)
}

fn unread(error: rusqlite::Error) -> Failure {
    let help = "a node that starts sets aside what it cannot read";
    Failure::new(Failure::FAILED, "cache", format!("the file of kept answers cannot be used: {error}; {help}"))
}
