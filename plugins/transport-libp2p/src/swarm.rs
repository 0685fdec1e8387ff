//! The libp2p swarm: which protocols, and with which bounds.

use std::sync::Arc;
use std::time::Duration;

use libp2p::identity::Keypair;
use libp2p::metrics::Registry;
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    StreamProtocol, Swarm, SwarmBuilder, connection_limits, identify, kad, mdns, memory_connection_limits, noise, ping, tcp,
    yamux,
};
use tracing::warn;

use crate::arrivals::Arrivals;
use crate::config::Settings;
use crate::error::NetworkError;
use crate::records::Records;
use crate::streams;

/// The distributed hash table. Not the public IPFS one.
pub const KAD: StreamProtocol = StreamProtocol::new("/fabstir/kad/1");

/// What nodes of one network have in common, told by identify.
const NETWORK: &str = "/fabstir/id/1";

/// How long a connection that nothing uses is kept.
const IDLE: Duration = Duration::from_secs(60);

/// How long it may take to make a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// Streams of one connection that are being negotiated at a time.
const NEGOTIATING: usize = 64;

/// Streams of other protocols on one connection, besides conversations: the hash table, identify, ping, and those being negotiated.
const OTHER_STREAMS: usize = 128;

/// The longest message of the hash table: 20 advertisements with 4 addresses each, and 20 nodes with 8.
const KAD_MESSAGE: usize = 64 << 10;

#[derive(NetworkBehaviour)]
pub struct Behaviour {
    // First, so that a connection is refused before anything is made for it.
    limits: connection_limits::Behaviour,
    memory: Toggle<memory_connection_limits::Behaviour>,
    pub kad: kad::Behaviour<Records>,
    mdns: Toggle<mdns::tokio::Behaviour>,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    pub streams: streams::Behaviour,
}

/// Makes the swarm. It neither listens nor dials yet.
pub fn build(
    keypair: Keypair,
    settings: &Settings,
    server: bool,
    arrivals: Arc<Arrivals>,
    registry: &mut Registry,
) -> Result<Swarm<Behaviour>, NetworkError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| NetworkError::Start(format!("{what}: {error}"));
    let per_connection = 2 * streams::OWN_PER_CONNECTION + OTHER_STREAMS;
    let multiplex = move || {
        let mut config = yamux::Config::default();
        config.set_max_num_streams(per_connection);
        config
    };
    let swarm = SwarmBuilder::with_existing_identity(keypair)
        .with_tokio()
        .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, multiplex)
        .map_err(|error| failed("noise", &error))?
        .with_quic_config(|mut config| {
            config.max_concurrent_stream_limit = (streams::OWN_PER_CONNECTION + OTHER_STREAMS) as u32;
            config
        })
        .with_dns()
        .map_err(|error| failed("cannot read how names are resolved (/etc/resolv.conf)", &error))?
        .with_bandwidth_metrics(registry)
        .with_behaviour(|keypair| behaviour(keypair, settings, server, arrivals))
        .map_err(|error| failed("behaviour", &error))?
        .with_swarm_config(|config| {
            config.with_idle_connection_timeout(IDLE).with_max_negotiating_inbound_streams(NEGOTIATING).with_smart_dial()
        })
        .with_connection_timeout(CONNECT)
        .build();
    Ok(swarm)
}

fn behaviour(keypair: &Keypair, settings: &Settings, server: bool, arrivals: Arc<Arrivals>) -> Behaviour {
    let own = keypair.public().to_peer_id();
    let most = settings.connections;
    let limits = connection_limits::ConnectionLimits::default()
        .with_max_pending_incoming(Some(64))
        .with_max_pending_outgoing(Some(64))
        .with_max_established_incoming(Some((most - most / 4).max(1)))
        .with_max_established(Some(most))
        .with_max_established_per_peer(Some(settings.connections_per_peer));
    let mut kad = kad::Behaviour::with_config(own, Records::new(own, settings.record_ttl), kad_config(settings));
    kad.set_mode(Some(if server { kad::Mode::Server } else { kad::Mode::Client }));
    let agent = concat!("fabstir-node/", env!("CARGO_PKG_VERSION"));
    let identify = identify::Config::new(NETWORK.into(), keypair.public())
        .with_agent_version(agent.into())
        .with_hide_listen_addrs(true)
        .with_push_listen_addr_updates(true);
    Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        memory: Toggle::from(settings.memory.map(memory_connection_limits::Behaviour::with_max_bytes)),
        kad,
        mdns: Toggle::from(settings.mdns.then(|| local_discovery(own)).flatten()),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::default(),
        streams: streams::Behaviour::new(arrivals, settings.streams_per_peer),
    }
}

fn kad_config(settings: &Settings) -> kad::Config {
    let mut config = kad::Config::new(KAD);
    config
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_provider_record_ttl(Some(settings.record_ttl))
        // Advertisements are repeated by us: at the interval, and when peers appear.
        .set_provider_publication_interval(None)
        .set_publication_interval(None)
        .set_replication_interval(None)
        .set_caching(kad::Caching::Disabled)
        // The network is walked by us, too: libp2p warns where there is nobody yet.
        .set_periodic_bootstrap_interval(None)
        .set_query_timeout(Duration::from_secs(30))
        .set_max_packet_size(KAD_MESSAGE);
    config
}

/// A network without multicast is no reason not to take part in the wider one.
fn local_discovery(own: libp2p::PeerId) -> Option<mdns::tokio::Behaviour> {
    mdns::tokio::Behaviour::new(mdns::Config::default(), own)
        .inspect_err(|error| warn!(%error, "mDNS does not work here: nodes on the local network are not found by themselves."))
        .ok()
}
