//! Nodes and clients of the market on a development chain.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::dev_chain::DevChain;
use crate::peers::{NET, Provider};
use crate::{Node, Place};

/// An account that a development chain gives money to.
#[derive(Debug, Clone, Copy)]
pub struct Account {
    pub key: &'static str,
    pub address: &'static str,
}

/// The one that has deployed the contracts.
pub const OWNER: Account = Account {
    key: "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80",
    address: "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266",
};
/// Two nodes, where each is paid, and two clients.
pub const NODE: Account = Account {
    key: "59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d",
    address: "0x70997970C51812dc3A010C7d01b50e0d17dc79C8",
};
pub const OTHER_NODE: Account = Account {
    key: "5de4111afa1a4b94908f83103eb1f1706367c2e68ca870fc3fb9a804cdab365a",
    address: "0x3C44CdDdB6a900fa2b585dd299e03d12FA4293BC",
};
pub const PAYOUT: Account = Account {
    key: "7c852118294e51e653712a81e05800f419141751be58f605c371e15141b007a6",
    address: "0x90F79bf6EB2c4f870365E785982E1f101E93b906",
};
pub const CLIENT: Account = Account {
    key: "47e179ec197488593b187f80a00eb0da91f1b9d0b13f8733639f19c30a34926a",
    address: "0x15d34AAf54267DB7D7c367839AAf71A00a2C6A65",
};
pub const OTHER_CLIENT: Account = Account {
    key: "8b3a350cf5c34c9194ca85829a2df0ec3153be0318b5e2d3348e872092edffba",
    address: "0x9965507D1a55bcC2695C58ba16FB37d819B0A4dc",
};

/// The entry of a chain plugin that leads to this chain.
pub fn base(chain: &DevChain) -> String {
    let table = toml::Table::try_from(chain.config()).expect("a table").to_string();
    let table = table.replace("[contracts]", "[plugin.config.contracts]");
    format!("[[plugin]]\nid = 'base'\nuse = 'chain-base'\n\n[plugin.config]\n{table}\n")
}

/// A place with an account's key in it, named `hot`, whose password is in a file. `sections` are tables of the configuration, `market` lines
/// of its section, `entries` the plugins besides the chain's.
pub fn place(chain: &DevChain, account: Account, sections: &str, market: &str, entries: &str) -> Place {
    let place = Place::new(&format!(
        "[keys]\npassword_file = 'password'\n\n[market]\nkey = 'hot'\n{market}\n\n{sections}\n\n{}{entries}",
        base(chain)
    ));
    for (name, text) in [("password", "a password of the test"), ("key", account.key)] {
        fs::set_permissions(place.file(name, text), fs::Permissions::from_mode(0o600)).expect("a mode can be set");
    }
    let key = place.path().join("key");
    place.ran(&["keys", "import", "hot", "--key-file", key.to_str().expect("a path of text")]);
    place
}

/// Prices at which a hundred tokens are worth more than their settlement costs: in wei for a million tokens.
pub const PRICES: &str =
    "[network]\nprice_input_wei_per_mtok = 1_000_000_000_000_000_000\nprice_output_wei_per_mtok = 4_000_000_000_000_000_000";

/// A place of a node that is registered, pays out to [`PAYOUT`], charges [`PRICES`] and can be reached by peers.
pub fn node_place(chain: &DevChain, account: Account, market: &str, entries: &str) -> Place {
    let place = place(chain, account, PRICES, market, &format!("{NET}{entries}"));
    place.ran(&["market", "register", "--stake", "1eth", "--payout", PAYOUT.address]);
    place
}

/// Such a node, running.
pub async fn node(chain: &DevChain, account: Account, market: &str, entries: &str) -> Provider {
    let node = Node::launch(node_place(chain, account, market, entries), &[]);
    node.healthy().await;
    node.logged(&["Acting in the market."]).await;
    Provider::of(node).await
}
