//! The interfaces as they are published: `interfaces/*.json` may only grow.

use fabstir_plugin_api::chain::Chain;
use fabstir_plugin_api::inference::Inference;
use fabstir_plugin_api::interface::{Interface, breaking_changes};
use fabstir_plugin_api::plugin::Plugin;
use fabstir_plugin_api::prover::Prover;
use fabstir_plugin_api::storage::Storage;
use fabstir_plugin_api::transport::Transport;

/// With `UPDATE_GOLDEN=1` an addition is written to the committed description; a breaking change never is.
fn compare<I: Interface + ?Sized>() {
    let path = format!("{}/interfaces/{}.json", env!("CARGO_MANIFEST_DIR"), I::KIND);
    let now = I::describe();
    let text = format!("{}\n", serde_json::to_string_pretty(&now).expect("JSON"));
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    if let Ok(committed) = std::fs::read_to_string(&path) {
        let committed: serde_json::Value = serde_json::from_str(&committed).expect("the committed description is JSON");
        let broken = breaking_changes(&committed, &now);
        assert!(broken.is_empty(), "{}: this needs a new major version:\n{}", I::KIND, broken.join("\n"));
        if committed == now {
            return;
        }
    }
    assert!(update, "{path} is out of date: run with UPDATE_GOLDEN=1, look at the change and raise the minor version");
    std::fs::write(&path, text).expect("writes");
}

#[test]
fn the_plugin_interface_only_grows() {
    compare::<dyn Plugin>();
}

#[test]
fn the_chain_interface_only_grows() {
    compare::<dyn Chain>();
}

#[test]
fn the_inference_interface_only_grows() {
    compare::<dyn Inference>();
}

#[test]
fn the_prover_interface_only_grows() {
    compare::<dyn Prover>();
}

#[test]
fn the_storage_interface_only_grows() {
    compare::<dyn Storage>();
}

#[test]
fn the_transport_interface_only_grows() {
    compare::<dyn Transport>();
}
