//! What the operator may set.

use std::time::Duration;

use ethers::types::Address;
use fabstir_plugin_api::prelude::*;

/// The `config` table of a chain-base entry in `plugins.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the chain is asked: JSON-RPC over HTTP or HTTPS, best first. With several, one that fails or lags is passed over. An address may
    /// hold an API key: only its host is logged. Required. Example: `["https://mainnet.base.org", "https://base.example.org/v1/key"]`.
    pub rpc: Vec<String>,
    /// The chain's number; endpoints of another chain are not used. Required. Example: 8453 (Base), 84532 (Base Sepolia).
    pub chain_id: u64,
    /// Where the market's contracts are. Required.
    pub contracts: Contracts,
    /// The block in which the market was deployed: nothing before it is read. Default: 0. Example: 21000000.
    #[serde(default)]
    pub first_block: u64,
    /// How often the chain is asked for news, in milliseconds, 10 to 60000. Default: 1000. Example: 250.
    #[serde(default = "poll_ms")]
    pub poll_ms: u64,
    /// The most that is paid per unit of gas, in wei, however urgent. Default: 10000000000 (10 gwei). Example: 2000000000.
    #[serde(default = "max_fee_per_gas_wei")]
    pub max_fee_per_gas_wei: u64,
    /// How long a transaction may stay unmined before more is paid for it, in milliseconds, 100 to 3600000. Default: 15000.
    /// Example: 6000.
    #[serde(default = "patience_ms")]
    pub patience_ms: u64,
}

/// The addresses of the market's contracts, each `0x` and 40 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Contracts {
    /// ComputeEscrow: sessions and jobs, and their money.
    pub escrow: String,
    /// NodeRegistry: nodes and their stakes.
    pub nodes: String,
    /// ModelRegistry: names of models.
    pub models: String,
    /// ProofHub: verifiers of proofs.
    pub proofs: String,
}

fn poll_ms() -> u64 {
    1000
}

fn max_fee_per_gas_wei() -> u64 {
    10_000_000_000
}

fn patience_ms() -> u64 {
    15_000
}

/// A configuration that makes sense.
#[derive(Debug, Clone)]
pub struct Settings {
    pub rpc: Vec<String>,
    pub chain_id: u64,
    pub escrow: Address,
    pub nodes: Address,
    pub models: Address,
    pub proofs: Address,
    pub first_block: u64,
    pub poll: Duration,
    pub max_fee_per_gas: u128,
    pub patience: Duration,
}

impl Config {
    /// Refuses values that fit their types and make no sense.
    pub fn check(self) -> Result<Settings> {
        if self.rpc.is_empty() {
            return Err(PluginError::invalid("`rpc` is empty: name at least one endpoint, such as \"https://mainnet.base.org\""));
        }
        if self.chain_id == 0 {
            return Err(PluginError::invalid("`chain_id` is 0: Base is 8453, Base Sepolia 84532"));
        }
        let bounded = |key: &str, value: u64, least: u64, most: u64| match (least..=most).contains(&value) {
            true => Ok(Duration::from_millis(value)),
            false => Err(PluginError::invalid(format!("`{key}` is {value}: it must be {least} to {most} milliseconds"))),
        };
        let Contracts { escrow, nodes, models, proofs } = &self.contracts;
        Ok(Settings {
            poll: bounded("poll_ms", self.poll_ms, 10, 60_000)?,
            patience: bounded("patience_ms", self.patience_ms, 100, 3_600_000)?,
            escrow: contract("escrow", escrow)?,
            nodes: contract("nodes", nodes)?,
            models: contract("models", models)?,
            proofs: contract("proofs", proofs)?,
            chain_id: self.chain_id,
            first_block: self.first_block,
            max_fee_per_gas: self.max_fee_per_gas_wei.into(),
            rpc: self.rpc,
        })
    }
}

fn contract(name: &str, text: &str) -> Result<Address> {
    let wrong = |why: &str| PluginError::invalid(format!("`contracts.{name}` {why}: it is `0x` and 40 hexadecimal digits"));
    let address = crate::hex::address(text).ok_or_else(|| wrong("is no address"))?;
    if address.is_zero() { Err(wrong("is the address of nobody")) } else { Ok(address) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: impl FnOnce(&mut serde_json::Value)) -> Result<Settings> {
        let address = |digit: &str| format!("0x{}", digit.repeat(40));
        let mut json = serde_json::json!({
            "rpc": ["http://127.0.0.1:8545"],
            "chain_id": 31337,
            "contracts": { "escrow": address("1"), "nodes": address("2"), "models": address("3"), "proofs": address("4") },
        });
        change(&mut json);
        let config: Config = serde_json::from_value(json).map_err(|error| PluginError::invalid(error.to_string()))?;
        config.check()
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let settings = config(|_| {}).expect("is valid");
        assert_eq!(
            (settings.first_block, settings.poll, settings.patience),
            (0, Duration::from_secs(1), Duration::from_secs(15))
        );
        assert_eq!(settings.max_fee_per_gas, 10_000_000_000);
    }

    #[test]
    fn each_key_that_makes_no_sense_is_named() {
        let wrong = [
            ("rpc", serde_json::json!([])),
            ("chain_id", serde_json::json!(0)),
            ("poll_ms", serde_json::json!(9)),
            ("patience_ms", serde_json::json!(99)),
            ("first_blok", serde_json::json!(1)),
        ];
        for (key, value) in wrong {
            let error = config(|json| json[key] = value).expect_err(key);
            assert!(error.message.contains(key), "{key}: {error}");
        }
        for address in ["", "0x12", &format!("0x{}", "0".repeat(40)), &"1".repeat(40), &format!("0x{}", "g".repeat(40))] {
            let error = config(|json| json["contracts"]["escrow"] = address.into()).expect_err(address);
            assert!(error.message.contains("contracts.escrow"), "{error}");
        }
    }
}
