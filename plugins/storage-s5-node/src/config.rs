//! What the operator may set.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fabstir_plugin_api::prelude::*;
use iroh::EndpointId;

/// The `config` table of a storage-s5-node entry in `plugins.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The address and UDP port that this node has towards others, and asks them from. Port 0 takes a free one, another at each start.
    /// While another program has the port, others are asked from a free one, and nobody is served.
    /// Default: `"127.0.0.1:0"`, which reaches this machine alone. Example: `"0.0.0.0:5051"`.
    pub listen: Option<String>,
    /// Other S5 nodes, which are asked for blobs and pointers that are not here. Default: none.
    /// Example: `[{ node = "ae58ff8833241ac82d6ff7611046ed67b5072d142c588d0063e942d9a75502b6", address = "192.0.2.7:5051" }]`.
    pub peers: Vec<PeerConfig>,
    /// Whether everybody who reaches this node may read the blobs that are kept here, by their ids, and the pointers.
    /// Default: `false`. Example: `true`.
    pub serve_public: bool,
    /// Node ids of those who may read the blobs and the pointers here, and store pointers: 64 hexadecimal digits each. Default: none.
    /// Example: `["ae58ff8833241ac82d6ff7611046ed67b5072d142c588d0063e942d9a75502b6"]`.
    pub allow: Vec<String>,
    /// How long another node has to let this one in, to answer, and to send a MiB, in milliseconds, 100 to 600000: then the next one is
    /// asked. Default: `10000`. Example: `3000`.
    pub timeout_ms: Option<u64>,
    /// The folder that holds the blobs; made if it is missing. A relative path starts at the instance's own state folder.
    /// Default: `blobs`. Example: `"/var/lib/fabstir/s5"`.
    pub dir: Option<PathBuf>,
    /// The most bytes that all blobs together may take, those on their way included. Default: no limit but the disk, of which 1 GiB stays
    /// free, or a tenth of a smaller one. Example: `107374182400` (100 GiB).
    pub max_bytes: Option<u64>,
}

/// Another S5 node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its node id, 64 hexadecimal digits: whoever answers must prove that it is this one. Required.
    /// Example: `"ae58ff8833241ac82d6ff7611046ed67b5072d142c588d0063e942d9a75502b6"`.
    pub node: String,
    /// Its IP address and UDP port. Required. Example: `"192.0.2.7:5051"`.
    pub address: String,
}

/// A configuration that makes sense.
#[derive(Debug, Clone)]
pub struct Settings {
    pub listen: SocketAddr,
    pub peers: Vec<(EndpointId, SocketAddr)>,
    pub serve_public: bool,
    pub allow: HashSet<[u8; 32]>,
    pub timeout: Duration,
    pub folder: PathBuf,
    pub max_bytes: Option<u64>,
}

impl Config {
    /// Refuses values that fit their types and make no sense. Relative paths start at `state_dir`.
    pub fn check(self, state_dir: &Path) -> Result<Settings> {
        let listen = address(self.listen.as_deref().unwrap_or("127.0.0.1:0"))
            .map_err(|why| PluginError::invalid(format!("`listen` {why}, such as \"127.0.0.1:0\"")))?;
        let mut peers: Vec<(EndpointId, SocketAddr)> = Vec::new();
        for (place, peer) in (1..).zip(self.peers) {
            let wrong = |why: String| PluginError::invalid(format!("peer {place} of `peers`: {why}"));
            let node = key(&peer.node).map_err(|why| wrong(format!("`node` {why}")))?;
            let address = address(&peer.address).map_err(|why| wrong(format!("`address` {why}, such as \"192.0.2.7:5051\"")))?;
            if address.port() == 0 || address.ip().is_unspecified() {
                return Err(wrong(format!("nobody can be reached at `address` {address}")));
            }
            if listen.ip().is_loopback() && !address.ip().is_loopback() {
                return Err(wrong(format!("`listen` {listen} reaches this machine alone, and not {address}: set `listen`")));
            }
            if listen.is_ipv4() != address.is_ipv4() {
                return Err(wrong(format!("`listen` {listen} and `address` {address} must be of one kind, IPv4 or IPv6")));
            }
            if peers.iter().any(|(known, _)| *known == node) {
                return Err(wrong(format!("`node` {node} stands there twice")));
            }
            peers.push((node, address));
        }
        let mut allow = HashSet::new();
        for (place, text) in (1..).zip(&self.allow) {
            let key = key(text).map_err(|why| PluginError::invalid(format!("entry {place} of `allow` {why}")))?;
            allow.insert(*key.as_bytes());
        }
        let timeout = self.timeout_ms.unwrap_or(10_000);
        if !(100..=600_000).contains(&timeout) {
            return Err(PluginError::invalid(format!("`timeout_ms` is {timeout}: it must be 100 to 600000")));
        }
        if self.max_bytes == Some(0) {
            return Err(PluginError::invalid("`max_bytes` is 0, so no blob would fit: leave it out for no limit"));
        }
        let folder = self.dir.unwrap_or_else(|| "blobs".into());
        if folder.as_os_str().is_empty() {
            return Err(PluginError::invalid("`dir` is empty: name a folder, or leave it out"));
        }
        Ok(Settings {
            listen,
            peers,
            serve_public: self.serve_public,
            allow,
            timeout: Duration::from_millis(timeout),
            folder: state_dir.join(folder),
            max_bytes: self.max_bytes,
        })
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is no IP address with a port"))
}

/// A public key, which is what a node is known by.
fn key(text: &str) -> Result<EndpointId, String> {
    let mut bytes = [0; 32];
    let key = hex::decode_to_slice(text, &mut bytes).ok().and_then(|()| EndpointId::from_bytes(&bytes).ok());
    key.ok_or_else(|| format!("{text:?} is no node id of 64 hexadecimal digits"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NODE: &str = "ae58ff8833241ac82d6ff7611046ed67b5072d142c588d0063e942d9a75502b6";

    fn check(json: Value) -> Result<Settings> {
        let config: Config = serde_json::from_value(json).map_err(|error| PluginError::invalid(error.to_string()))?;
        config.check(Path::new("/state"))
    }

    #[track_caller]
    fn is_refused(json: Value, word: &str) {
        let error = check(json).expect_err("makes no sense");
        assert!(error.code == Code::InvalidArgument && error.message.contains(word), "{error}");
    }

    #[test]
    fn what_is_left_out_has_a_default_that_reaches_nobody() {
        let settings = check(json!({})).unwrap();
        assert_eq!((settings.listen.to_string().as_str(), settings.serve_public), ("127.0.0.1:0", false));
        assert!(settings.peers.is_empty() && settings.allow.is_empty());
        assert_eq!((settings.timeout, settings.max_bytes), (Duration::from_secs(10), None));
        assert_eq!(settings.folder, Path::new("/state/blobs"));
    }

    #[test]
    fn listen_and_peers_are_addresses_that_reach_each_other() {
        let peer = |address: &str| json!([{ "node": NODE, "address": address }]);
        let settings = check(json!({ "listen": "0.0.0.0:5051", "peers": peer("192.0.2.7:5051") })).unwrap();
        assert_eq!((settings.listen.port(), settings.peers[0].1.to_string().as_str()), (5051, "192.0.2.7:5051"));
        assert_eq!(settings.peers[0].0.to_string(), NODE);
        check(json!({ "listen": "[::1]:0", "peers": peer("[::1]:5051") })).unwrap();
        is_refused(json!({ "listen": "localhost:1" }), "`listen`");
        is_refused(json!({ "peers": peer("192.0.2.7:5051") }), "reaches this machine alone");
        is_refused(json!({ "listen": "0.0.0.0:0", "peers": peer("[2001:db8::1]:1") }), "of one kind");
        is_refused(json!({ "peers": peer("127.0.0.1:0") }), "nobody can be reached");
        is_refused(json!({ "peers": peer("example.org:1") }), "`address`");
        is_refused(
            json!({ "peers": [{ "node": NODE, "address": "127.0.0.1:1" }, { "node": NODE, "address": "127.0.0.1:2" }] }),
            "twice",
        );
        is_refused(json!({ "peers": [{ "node": "zz", "address": "127.0.0.1:1" }] }), "peer 1");
    }

    #[test]
    fn allow_holds_node_ids() {
        assert_eq!(check(json!({ "allow": [NODE, NODE] })).unwrap().allow.len(), 1);
        is_refused(json!({ "allow": [NODE, "everybody"] }), "entry 2 of `allow`");
    }

    #[test]
    fn serve_public_is_yes_or_no() {
        assert!(check(json!({ "serve_public": true })).unwrap().serve_public);
        is_refused(json!({ "serve_public": "yes" }), "boolean");
    }

    #[test]
    fn timeout_ms_has_bounds() {
        assert_eq!(check(json!({ "timeout_ms": 100 })).unwrap().timeout, Duration::from_millis(100));
        is_refused(json!({ "timeout_ms": 99 }), "100 to 600000");
    }

    #[test]
    fn dir_may_lie_elsewhere() {
        assert_eq!(check(json!({ "dir": "/srv/s5" })).unwrap().folder, Path::new("/srv/s5"));
        is_refused(json!({ "dir": "" }), "`dir`");
    }

    #[test]
    fn max_bytes_of_zero_is_refused() {
        assert_eq!(check(json!({ "max_bytes": 1 })).unwrap().max_bytes, Some(1));
        is_refused(json!({ "max_bytes": 0 }), "`max_bytes`");
    }

    #[test]
    fn unknown_keys_are_refused() {
        is_refused(json!({ "listens": "127.0.0.1:0" }), "listens");
        is_refused(json!({ "peers": [{ "node": NODE, "address": "127.0.0.1:1", "relay": "x" }] }), "relay");
    }
}
