//! Lines that are to be opened to peers that are not connected yet.

use std::collections::HashMap;

use libp2p::swarm::DialError;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId};

use super::driver::{Driver, unreachable};
use crate::error::NetworkError;
use crate::streams::Open;

/// Peers that may be waited for at a time.
const PEERS: usize = 1024;

/// Lines that may wait for one peer.
const LINES: usize = 256;

/// Peers that are being reached, and what waits for them.
#[derive(Default)]
pub struct Opens(HashMap<PeerId, Waiting>);

struct Waiting {
    opens: Vec<Open>,
    /// Where to dial it, besides the addresses that are known.
    addresses: Vec<Multiaddr>,
    step: Step,
}

/// What is being tried.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Somebody else is dialling the peer.
    Others,
    /// The known addresses are being dialled.
    Known,
    /// The network is being asked where the peer is.
    Asking,
    /// What the network said is being dialled.
    Told,
}

impl Driver {
    /// Opens a line, connecting first where that is needed.
    pub(super) fn open(&mut self, peer: PeerId, addresses: Vec<Multiaddr>, open: Open) {
        if self.peers.contains_key(&peer) {
            return self.swarm.behaviour_mut().streams.open(peer, open);
        }
        if let Some(waiting) = self.opens.0.get_mut(&peer) {
            waiting.opens.retain(|open| !open.reply.is_closed());
            if waiting.opens.len() < LINES {
                waiting.addresses.extend(addresses);
                waiting.addresses.truncate(crate::addresses::PER_PEER);
                waiting.opens.push(open);
            } else {
                let _ = open.reply.send(Err(NetworkError::TooManyConversations(LINES)));
            }
            return;
        }
        if self.opens.0.len() >= PEERS {
            let cause = format!("{PEERS} other peers are being dialled");
            let _ = open.reply.send(Err(NetworkError::Unreachable { whom: peer.to_string(), cause }));
            return;
        }
        self.opens.0.insert(peer, Waiting { opens: vec![open], addresses, step: Step::Known });
        self.reach(peer, Step::Known);
    }

    /// Dials the addresses that are known of a peer.
    fn reach(&mut self, peer: PeerId, step: Step) {
        let Some(waiting) = self.opens.0.get_mut(&peer) else { return };
        waiting.step = step;
        let mut addresses = waiting.addresses.clone();
        addresses.extend(self.book.addresses(&peer));
        let dial = DialOpts::peer_id(peer)
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .addresses(addresses)
            .extend_addresses_through_behaviour()
            .build();
        match self.swarm.dial(dial) {
            Ok(()) => {}
            Err(DialError::DialPeerConditionFalse(_)) => {
                if let Some(waiting) = self.opens.0.get_mut(&peer) {
                    waiting.step = Step::Others;
                }
            }
            Err(DialError::NoAddresses) if step == Step::Known => self.ask_where(peer),
            Err(DialError::NoAddresses) => self.fail(peer, NetworkError::NoAddress),
            Err(error) => self.fail(peer, |whom| unreachable(&whom, &error)),
        }
    }

    fn ask_where(&mut self, peer: PeerId) {
        if let Some(waiting) = self.opens.0.get_mut(&peer) {
            waiting.step = Step::Asking;
            self.locate(peer);
        }
    }

    /// The network has said where a peer is, or that it does not know.
    pub(super) fn on_located(&mut self, peer: PeerId, addresses: Vec<Multiaddr>) {
        let Some(waiting) = self.opens.0.get_mut(&peer) else { return };
        if waiting.step != Step::Asking {
            return;
        }
        if addresses.is_empty() {
            return self.fail(peer, NetworkError::NoAddress);
        }
        waiting.addresses = addresses;
        self.reach(peer, Step::Told);
    }

    /// A connection to a peer stands.
    pub(super) fn on_reached(&mut self, peer: PeerId) {
        let Some(waiting) = self.opens.0.remove(&peer) else { return };
        for open in waiting.opens {
            self.swarm.behaviour_mut().streams.open(peer, open);
        }
    }

    /// An attempt to dial a peer has failed.
    pub(super) fn on_unreachable(&mut self, peer: PeerId, error: &DialError) {
        match self.opens.0.get(&peer).map(|waiting| waiting.step) {
            None | Some(Step::Asking) => {}
            Some(Step::Others) => self.reach(peer, Step::Known),
            Some(Step::Known) => {
                self.ask_where(peer);
            }
            Some(Step::Told) => self.fail(peer, |whom| unreachable(&whom, error)),
        }
    }

    fn fail(&mut self, peer: PeerId, error: impl Fn(String) -> NetworkError) {
        let Some(waiting) = self.opens.0.remove(&peer) else { return };
        for open in waiting.opens {
            // Who asked may have given up.
            let _ = open.reply.send(Err(error(peer.to_string())));
        }
    }
}
