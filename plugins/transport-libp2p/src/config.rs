//! What the operator may set.

use std::time::Duration;

use fabstir_plugin_api::prelude::*;
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol as Part;

/// The `config` table of a transport-libp2p entry in `plugins.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Addresses to listen on, as multiaddresses. A visitor listens on none of them.
    /// Default: `["/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/udp/4001/quic-v1"]`. Example: `["/ip4/127.0.0.1/tcp/0"]` (any free port).
    pub listen: Vec<String>,
    /// Addresses under which others reach this node, where they differ from what it listens on: behind a port mapping, or by name.
    /// Default: none, and the addresses that it listens on are told. Example: `["/dns4/node.example.org/tcp/4001"]`.
    pub external: Vec<String>,
    /// Nodes to begin with, each with its id. They are dialled at the start, and again whenever they are lost. Default: none.
    /// Example: `["/ip4/203.0.113.7/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"]`.
    pub bootstrap: Vec<String>,
    /// Whether to find nodes on the local network, and be found by them, with mDNS. Default: true. Example: false.
    pub mdns: bool,
    /// The most connections at a time. A quarter of them is kept for those that this node makes itself. Default: 512.
    /// Example: 2000.
    pub connections: u32,
    /// The most connections with one peer at a time. Default: 4. Example: 2.
    pub connections_per_peer: u32,
    /// The most conversations at a time that one peer may have begun, those that wait included; it is told `busy` past that.
    /// Default: 128. Example: 16.
    pub streams_per_peer: u32,
    /// The most conversations of one protocol that wait to be accepted; peers are told `busy` past that. Default: 64. Example: 8.
    pub waiting: u32,
    /// The most memory of the whole process in MiB, past which no connection is made or taken. Default: no limit but those above.
    /// Example: 4096.
    pub memory_mib: Option<u32>,
    /// The most topics that this node advertises at a time. Default: 64. Example: 8.
    pub topics: u32,
    /// How long an advertisement is remembered after it was last heard, in seconds. The whole network should use the same.
    /// Default: 2700 (45 minutes). Example: 600.
    pub record_ttl_s: u32,
    /// How often this node repeats its own advertisements, in seconds; a third of `record_ttl_s` or less survives two that are lost.
    /// Default: 900 (15 minutes). Example: 200.
    pub republish_s: u32,
    /// How long a peer may take nothing of what is sent to it before its conversation is given up, in seconds. Default: 60.
    /// Example: 20.
    pub stall_s: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec!["/ip4/0.0.0.0/tcp/4001".into(), "/ip4/0.0.0.0/udp/4001/quic-v1".into()],
            external: vec![],
            bootstrap: vec![],
            mdns: true,
            connections: 512,
            connections_per_peer: 4,
            streams_per_peer: 128,
            waiting: 64,
            memory_mib: None,
            topics: 64,
            record_ttl_s: 45 * 60,
            republish_s: 15 * 60,
            stall_s: 60,
        }
    }
}

/// A configuration that makes sense.
#[derive(Debug, Clone)]
pub struct Settings {
    pub listen: Vec<Multiaddr>,
    pub external: Vec<Multiaddr>,
    /// Each with the id of the peer at its end.
    pub bootstrap: Vec<(libp2p::PeerId, Multiaddr)>,
    pub mdns: bool,
    pub connections: u32,
    pub connections_per_peer: u32,
    pub streams_per_peer: usize,
    pub waiting: usize,
    pub memory: Option<usize>,
    pub topics: usize,
    pub record_ttl: Duration,
    pub republish: Duration,
    pub stall: Duration,
}

impl Config {
    /// Refuses values that fit their types and make no sense.
    pub fn check(&self) -> Result<Settings> {
        for (key, value) in [
            ("connections", self.connections),
            ("connections_per_peer", self.connections_per_peer),
            ("streams_per_peer", self.streams_per_peer),
            ("waiting", self.waiting),
            ("record_ttl_s", self.record_ttl_s),
            ("republish_s", self.republish_s),
            ("stall_s", self.stall_s),
        ] {
            if value == 0 {
                return Err(PluginError::invalid(format!("`{key}` is 0, so nothing would work: leave it out for the default")));
            }
        }
        if self.memory_mib == Some(0) {
            return Err(PluginError::invalid("`memory_mib` is 0, so no connection would be made: leave it out for no limit"));
        }
        if self.republish_s >= self.record_ttl_s {
            return Err(PluginError::invalid(format!(
                "`republish_s` is {}, `record_ttl_s` is {}: advertisements would be forgotten before they are repeated",
                self.republish_s, self.record_ttl_s
            )));
        }
        Ok(Settings {
            listen: addresses("listen", &self.listen)?,
            external: addresses("external", &self.external)?,
            bootstrap: addresses("bootstrap", &self.bootstrap)?.into_iter().map(with_peer).collect::<Result<_>>()?,
            mdns: self.mdns,
            connections: self.connections,
            connections_per_peer: self.connections_per_peer,
            streams_per_peer: self.streams_per_peer as usize,
            waiting: self.waiting as usize,
            memory: self.memory_mib.map(|mib| (mib as usize) << 20),
            topics: self.topics as usize,
            record_ttl: Duration::from_secs(self.record_ttl_s.into()),
            republish: Duration::from_secs(self.republish_s.into()),
            stall: Duration::from_secs(self.stall_s.into()),
        })
    }
}

fn addresses(key: &str, texts: &[String]) -> Result<Vec<Multiaddr>> {
    texts
        .iter()
        .map(|text| {
            text.parse().map_err(|error| {
                PluginError::invalid(format!(
                    "`{key}`: {text:?} is no multiaddress ({error}): write it as /ip4/192.0.2.1/tcp/4001"
                ))
            })
        })
        .collect()
}

fn with_peer(address: Multiaddr) -> Result<(libp2p::PeerId, Multiaddr)> {
    match address.iter().last() {
        Some(Part::P2p(peer)) => Ok((peer, address)),
        _ => {
            Err(PluginError::invalid(format!("`bootstrap`: {address} does not say whose it is: append /p2p/ and the node's id")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Settings, String> {
        let config: Config = serde_json::from_str(json).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.message)
    }

    fn refused(json: &str) -> String {
        parse(json).expect_err(json)
    }

    #[test]
    fn defaults_listen_on_tcp_and_quic_and_forget_after_45_minutes() {
        let settings = parse("{}").unwrap();
        let listen: Vec<String> = settings.listen.iter().map(ToString::to_string).collect();
        assert_eq!(listen, ["/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/udp/4001/quic-v1"]);
        assert_eq!((settings.record_ttl.as_secs(), settings.republish.as_secs(), settings.stall.as_secs()), (2700, 900, 60));
        assert_eq!((settings.waiting, settings.streams_per_peer, settings.topics), (64, 128, 64));
        assert_eq!((settings.connections, settings.connections_per_peer, settings.memory), (512, 4, None));
        assert!(settings.mdns && settings.external.is_empty() && settings.bootstrap.is_empty());
    }

    #[test]
    fn addresses_must_be_multiaddresses_and_the_message_names_key_and_value() {
        for key in ["listen", "external", "bootstrap"] {
            let message = refused(&format!(r#"{{"{key}": ["127.0.0.1:4001"]}}"#));
            assert!(message.contains(key) && message.contains("127.0.0.1:4001"), "{message}");
        }
        assert!(parse(r#"{"listen": [], "external": ["/dns4/node.example.org/tcp/1"]}"#).is_ok());
    }

    #[test]
    fn bootstrap_addresses_end_with_the_id_of_a_peer() {
        let peer = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
        let settings = parse(&format!(r#"{{"bootstrap": ["/ip4/203.0.113.7/tcp/4001/p2p/{peer}"]}}"#)).unwrap();
        assert_eq!(settings.bootstrap[0].0.to_string(), peer);
        assert!(refused(r#"{"bootstrap": ["/ip4/203.0.113.7/tcp/4001"]}"#).contains("/p2p/"));
    }

    #[test]
    fn limits_of_zero_are_refused_by_name() {
        let keys = [
            "connections",
            "connections_per_peer",
            "streams_per_peer",
            "waiting",
            "memory_mib",
            "record_ttl_s",
            "republish_s",
            "stall_s",
        ];
        for key in keys {
            assert!(refused(&format!(r#"{{"{key}": 0}}"#)).contains(key));
        }
        assert_eq!(parse(r#"{"topics": 0, "memory_mib": 2}"#).unwrap().memory, Some(2 << 20));
    }

    #[test]
    fn repeating_later_than_forgetting_is_refused() {
        assert!(refused(r#"{"record_ttl_s": 10, "republish_s": 10}"#).contains("republish_s"));
        assert!(parse(r#"{"record_ttl_s": 3, "republish_s": 1}"#).is_ok());
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(refused(r#"{"listen_on": []}"#).contains("listen_on"));
        assert!(!parse(r#"{"mdns": false}"#).unwrap().mdns);
    }
}
