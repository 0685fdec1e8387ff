//! The market's contracts, through the shipped binary, on a development chain.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use fabstir_tests::dev_chain::DevChain;
use fabstir_tests::{Place, Ran};
use serde_json::Value;

/// Accounts that a development chain gives money to: one to act with, one to be paid.
const KEY: &str = "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80";
const PAYOUT: &str = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8";
const ETH: u128 = 1_000_000_000_000_000_000;

/// A place whose configuration leads to this chain, with a key that has money there.
fn place(config: &Value) -> Place {
    let mut table = toml::Table::try_from(config).expect("a table").to_string();
    table.push('\n');
    let text = format!(
        "[keys]\npassword_file = 'password'\n\n[market]\nkey = 'hot'\n\n[[plugin]]\nid = 'base'\nuse = 'chain-base'\nenabled = false\n\n\
         [plugin.config]\n{}",
        table.replace("[contracts]", "[plugin.config.contracts]")
    );
    let place = Place::new(&text);
    let password = place.file("password", "a password of the test");
    fs::set_permissions(password, fs::Permissions::from_mode(0o600)).expect("a mode can be set");
    let key = place.file("key", KEY);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("a mode can be set");
    place.run(&["keys", "import", "hot", "--key-file", key.to_str().expect("a path of text")]).json_of_success();
    place
}

trait Said {
    fn json_of_success(self) -> Ran;
    fn refusal(self, code: &str) -> String;
}

impl Said for Ran {
    #[track_caller]
    fn json_of_success(self) -> Ran {
        assert_eq!(self.code, 0, "{self:#?}");
        self
    }

    /// The message of an error with this code.
    #[track_caller]
    fn refusal(self, code: &str) -> String {
        assert_ne!(self.code, 0, "{self:#?}");
        let error = &self.json()["error"];
        assert_eq!(error["code"], code, "{error:#}");
        error["message"].as_str().expect("a message").to_owned()
    }
}

#[track_caller]
fn wei(value: &Value) -> u128 {
    value.as_str().and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("{value} is no amount"))
}

#[test]
fn an_account_becomes_a_node_and_leaves_and_every_wei_is_accounted_for() {
    let chain = DevChain::start().expect("a chain");
    let place = place(&chain.config());
    let status = || place.run(&["market", "status", "--json"]).json_of_success().json();
    let before = status();
    assert_eq!(before["balances"]["payout"], Value::Null);
    assert!(place.run(&["market", "status"]).out.contains("no node of the market"));
    assert!(place.run(&["market", "exit", "--json"]).refusal("no_node").contains("nothing to end"));
    assert!(place.run(&["market", "withdraw", "--json"]).refusal("nothing").contains("owes this account nothing"));

    let register = ["market", "register", "--stake", "1eth", "--payout", PAYOUT, "--json"];
    let done = place.run(&register).json_of_success().json();
    assert!(matches!(done["state"].as_str(), Some("mined" | "safe" | "final")), "{done:#}");
    let after = status();
    assert_eq!(after["balances"]["payout"], PAYOUT);
    assert_eq!(wei(&after["balances"]["stake"]), ETH);
    let spent = wei(&before["balances"]["coin"]) - wei(&after["balances"]["coin"]);
    assert_eq!(spent, ETH + wei(&done["fee"]), "the stake and the fee that was told, to the wei");

    // What the contract would refuse is not sent, and costs nothing.
    let again = place.run(&register).refusal("refused");
    assert!(again.contains("AlreadyRegistered") || again.contains("Registered"), "{again}");
    assert_eq!(status()["balances"], after["balances"]);

    let left = place.run(&["market", "exit", "--json"]).json_of_success().json();
    assert_ne!(left["transaction"], done["transaction"]);
    assert!(status()["balances"]["exits_at_s"].is_u64());
    assert!(place.run(&["market", "status"]).out.contains("a node that leaves"));
    let early = place.run(&["market", "exit", "--json"]).refusal("refused");
    assert!(!early.is_empty());
}

#[test]
fn what_the_policy_forbids_is_not_signed_and_the_next_order_goes_through() {
    let chain = DevChain::start().expect("a chain");
    let place = place(&chain.config());
    let register =
        |more: &[&str]| place.run(&[&["market", "register", "--stake", "1eth", "--payout", PAYOUT, "--json"], more].concat());
    let dear = register(&["--set", "market.max_fee_wei=1"]).refusal("dead");
    assert!(dear.contains("the limit is 1"), "{dear}");
    register(&[]).json_of_success();
}

#[test]
fn a_chain_that_is_away_is_an_error_and_the_order_is_kept() {
    let chain = DevChain::start().expect("a chain");
    let place = place(&chain.config());
    let away = ["--set", "plugin.base.config.rpc=[\"http://127.0.0.1:9\"]"];
    let status = place.run(&[&["market", "status", "--json"], &away[..]].concat());
    assert_eq!(status.code, 4, "{status:#?}");
    assert!(status.refusal("unreachable").contains("cannot be read"));
    let other = ["--set", "plugin.base.config.chain_id=8453"];
    let other = place.run(&[&["market", "status", "--json"], &other[..]].concat()).refusal("unreachable");
    assert!(other.contains("31337") && other.contains("8453"), "{other}");
    drop(chain);
}

#[test]
fn without_a_chain_plugin_or_a_key_the_next_step_is_named() {
    let nothing = Place::new("");
    assert!(nothing.run(&["market", "status", "--json"]).refusal("no_account").contains("keys new"));
    let no_unit = nothing.run(&["market", "register", "--stake", "1", "--payout", PAYOUT]);
    assert_eq!(no_unit.code, 2, "{no_unit:#?}");
    assert!(no_unit.err.contains("0.05eth"), "{no_unit:#?}");
    let place = place(&serde_json::json!({}));
    place.configure("[market]\nkey = 'hot'\n");
    assert!(place.run(&["market", "status", "--json"]).refusal("no_chain").contains("chain-base"));
}
