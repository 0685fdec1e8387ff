//! Where peers can be dialled: which of the addresses that others name are of use, and a memory of them.

use std::collections::HashMap;
use std::net::IpAddr;

use libp2p::multiaddr::Protocol as Part;
use libp2p::{Multiaddr, PeerId};

/// Addresses that are remembered of one peer.
pub const PER_PEER: usize = 8;

/// Peers that addresses are remembered of.
const PEERS: usize = 2048;

/// From how far an address makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// From the same machine.
    Machine,
    /// From the same local network.
    Local,
    /// From everywhere, as far as one can see: public addresses, and names.
    Public,
}

/// Whether an address has a form that can be dialled: a host, and a TCP port or QUIC on a UDP port.
pub fn is_readable(address: &Multiaddr) -> bool {
    let bare = without_peer(address.clone());
    let mut parts = bare.iter();
    let host = matches!(parts.next(), Some(Part::Ip4(_) | Part::Ip6(_) | Part::Dns(_) | Part::Dns4(_) | Part::Dns6(_)));
    let port = match parts.next() {
        Some(Part::Tcp(_)) => true,
        Some(Part::Udp(_)) => matches!(parts.next(), Some(Part::QuicV1)),
        _ => false,
    };
    host && port && parts.next().is_none()
}

/// From how far an address makes sense; `None` for one that cannot be dialled from anywhere.
pub fn reach(address: &Multiaddr) -> Option<Reach> {
    match address.iter().next()? {
        Part::Ip4(ip) => reach_of(IpAddr::V4(ip)),
        Part::Ip6(ip) => reach_of(ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4)),
        Part::Dns(_) | Part::Dns4(_) | Part::Dns6(_) => Some(Reach::Public),
        _ => None,
    }
}

fn reach_of(ip: IpAddr) -> Option<Reach> {
    match ip {
        _ if ip.is_unspecified() || ip.is_multicast() => None,
        _ if ip.is_loopback() => Some(Reach::Machine),
        IpAddr::V4(ip) => {
            let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
            let local = ip.is_private() || ip.is_link_local() || shared;
            if ip.is_broadcast() { None } else { Some(if local { Reach::Local } else { Reach::Public }) }
        }
        IpAddr::V6(ip) => {
            let local = ip.segments()[0] & 0xfe00 == 0xfc00 || ip.segments()[0] & 0xffc0 == 0xfe80;
            Some(if local { Reach::Local } else { Reach::Public })
        }
    }
}

/// Of the addresses that a peer names, those that can be meant for us, given the one over which we talk to it: a peer that was met on
/// a public address is not dialled on our own machine or network.
pub fn usable(named: impl IntoIterator<Item = Multiaddr>, met: Option<&Multiaddr>) -> Vec<Multiaddr> {
    let least = met.and_then(reach).unwrap_or(Reach::Public);
    let mut usable: Vec<Multiaddr> = Vec::new();
    for address in named {
        let address = without_peer(address);
        if is_readable(&address) && reach(&address).is_some_and(|reach| reach >= least) && !usable.contains(&address) {
            usable.push(address);
        }
        if usable.len() == PER_PEER {
            break;
        }
    }
    usable
}

/// The address without the peer id at its end.
pub fn without_peer(mut address: Multiaddr) -> Multiaddr {
    if let Some(Part::P2p(_)) = address.iter().last() {
        address.pop();
    }
    address
}

/// The peer id at the end of an address.
pub fn peer_in(address: &Multiaddr) -> Option<PeerId> {
    match address.iter().last() {
        Some(Part::P2p(peer)) => Some(peer),
        _ => None,
    }
}

/// The address with the peer id at its end, as it is told to people and to other programs.
pub fn with_peer(address: Multiaddr, peer: PeerId) -> String {
    without_peer(address).with(Part::P2p(peer)).to_string()
}

/// Addresses of peers that are not connected, as they were last heard. Bounded: the peer that was heard of the longest ago goes first.
#[derive(Default)]
pub struct Book {
    peers: HashMap<PeerId, Noted>,
    ticks: u64,
}

struct Noted {
    addresses: Vec<Multiaddr>,
    tick: u64,
}

impl Book {
    /// Remembers addresses of a peer; those that are new come first.
    pub fn note(&mut self, peer: PeerId, addresses: impl IntoIterator<Item = Multiaddr>) {
        let mut fresh: Vec<Multiaddr> = Vec::new();
        for address in addresses.into_iter().map(without_peer) {
            if !fresh.contains(&address) && fresh.len() < PER_PEER {
                fresh.push(address);
            }
        }
        if fresh.is_empty() {
            return;
        }
        self.ticks += 1;
        let noted = self.peers.entry(peer).or_insert(Noted { addresses: vec![], tick: 0 });
        noted.tick = self.ticks;
        noted.addresses.retain(|known| !fresh.contains(known));
        fresh.append(&mut noted.addresses);
        fresh.truncate(PER_PEER);
        noted.addresses = fresh;
        if self.peers.len() > PEERS {
            self.drop_oldest();
        }
    }

    /// An eighth at once, so that the search is paid seldom.
    fn drop_oldest(&mut self) {
        let mut ticks: Vec<u64> = self.peers.values().map(|noted| noted.tick).collect();
        let (_, threshold, _) = ticks.select_nth_unstable(PEERS / 8);
        let threshold = *threshold;
        self.peers.retain(|_, noted| noted.tick > threshold);
    }

    pub fn addresses(&self, peer: &PeerId) -> Vec<Multiaddr> {
        self.peers.get(peer).map(|noted| noted.addresses.clone()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    #[test]
    fn reach_follows_from_the_first_part() {
        for (text, expected) in [
            ("/ip4/127.0.0.1/tcp/1", Some(Reach::Machine)),
            ("/ip6/::1/tcp/1", Some(Reach::Machine)),
            ("/ip6/::ffff:127.0.0.1/tcp/1", Some(Reach::Machine)),
            ("/ip4/10.1.2.3/udp/1/quic-v1", Some(Reach::Local)),
            ("/ip4/192.168.0.4/tcp/1", Some(Reach::Local)),
            ("/ip4/172.20.0.4/tcp/1", Some(Reach::Local)),
            ("/ip4/169.254.0.4/tcp/1", Some(Reach::Local)),
            ("/ip4/100.64.0.4/tcp/1", Some(Reach::Local)),
            ("/ip6/fe80::1/tcp/1", Some(Reach::Local)),
            ("/ip6/fd00::1/tcp/1", Some(Reach::Local)),
            ("/ip4/203.0.113.7/tcp/1", Some(Reach::Public)),
            ("/ip6/2001:db8::1/tcp/1", Some(Reach::Public)),
            ("/dns4/example.org/tcp/1", Some(Reach::Public)),
            ("/ip4/0.0.0.0/tcp/1", None),
            ("/ip4/224.0.0.1/tcp/1", None),
            ("/tcp/1", None),
        ] {
            assert_eq!(reach(&address(text)), expected, "{text}");
        }
    }

    #[test]
    fn addresses_to_dial_have_a_host_and_a_port() {
        let peer = PeerId::random();
        for good in ["/ip4/1.2.3.4/tcp/1", "/ip6/::1/udp/1/quic-v1", "/dns/a.b/tcp/1", &format!("/dns4/a.b/tcp/1/p2p/{peer}")] {
            assert!(is_readable(&address(good)), "{good}");
        }
        for bad in ["", "/ip4/1.2.3.4", "/tcp/1", "/ip4/1.2.3.4/udp/1", "/ip4/1.2.3.4/tcp/1/ws", &format!("/p2p/{peer}")] {
            assert!(!is_readable(&address(bad)), "{bad:?}");
        }
    }

    #[test]
    fn a_peer_met_in_public_is_not_dialled_on_our_own_network() {
        let named = ["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/203.0.113.7/tcp/1", "/ip4/0.0.0.0/tcp/1"].map(address);
        let usable_when_met = |met: &str| usable(named.clone(), Some(&address(met))).len();
        assert_eq!(usable_when_met("/ip4/203.0.113.9/tcp/9"), 1);
        assert_eq!(usable_when_met("/ip4/10.0.0.9/tcp/9"), 2);
        assert_eq!(usable_when_met("/ip4/127.0.0.1/tcp/9"), 3);
        assert_eq!(usable(named.clone(), None), [named[2].clone()]);
    }

    #[test]
    fn what_a_peer_names_is_bounded_and_without_repetition() {
        let named = (0..100).map(|port| address(&format!("/ip4/203.0.113.7/tcp/{}", port / 2)));
        assert_eq!(usable(named, None).len(), PER_PEER);
        let peer = PeerId::random();
        let twice = [format!("/ip4/203.0.113.7/tcp/1/p2p/{peer}"), "/ip4/203.0.113.7/tcp/1".into()].map(|text| address(&text));
        assert_eq!(usable(twice, None), [address("/ip4/203.0.113.7/tcp/1")]);
    }

    #[test]
    fn the_book_keeps_the_newest_addresses_and_peers() {
        let mut book = Book::default();
        let first = PeerId::random();
        book.note(first, [address("/ip4/203.0.113.7/tcp/1")]);
        book.note(first, [address("/ip4/203.0.113.7/tcp/2")]);
        assert_eq!(book.addresses(&first), ["/ip4/203.0.113.7/tcp/2", "/ip4/203.0.113.7/tcp/1"].map(address));
        let mut last = first;
        for _ in 0..3 * PEERS {
            last = PeerId::random();
            book.note(last, [address("/ip4/203.0.113.7/tcp/1")]);
        }
        assert!(book.peers.len() <= PEERS);
        assert!(book.addresses(&first).is_empty() && !book.addresses(&last).is_empty());
    }
}
