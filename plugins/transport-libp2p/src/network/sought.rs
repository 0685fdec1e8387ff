//! Peers that this node tries to reach until it has: those that it begins with, and those that mDNS tells of.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use libp2p::{Multiaddr, PeerId};

use crate::addresses::PER_PEER;

/// Pauses between attempts to reach a peer: they double from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// Peers of the local network that are sought at a time; of more than these some are met through the others.
const LOCAL: usize = 256;

#[derive(Default)]
pub struct Sought(HashMap<PeerId, Target>);

/// An attempt that is due.
#[derive(Debug, PartialEq, Eq)]
pub struct Attempt {
    pub peer: PeerId,
    pub addresses: Vec<Multiaddr>,
    pub local: bool,
    /// Whether it is the first since the peer was seen or lost.
    pub is_first: bool,
}

struct Target {
    addresses: Vec<Multiaddr>,
    /// Told of by mDNS, and forgotten once it is met or gone; others are sought again whenever they are lost.
    local: bool,
    /// `None` while it is connected.
    next: Option<Instant>,
    pause: Duration,
}

impl Sought {
    /// Seeks a peer that this node begins with, under one more address.
    pub fn begin_with(&mut self, peer: PeerId, address: Multiaddr, now: Instant) {
        let target = self.0.entry(peer).or_insert_with(|| Target::new(false, now));
        target.addresses.push(address);
    }

    /// Whether there are peers to begin with.
    pub fn begins(&self) -> bool {
        self.0.values().any(|target| !target.local)
    }

    /// A peer that is not connected was seen on the local network. Where there are too many, the one goes that was tried in vain the most.
    pub fn seen(&mut self, peer: PeerId, address: Multiaddr, now: Instant) {
        if !self.0.contains_key(&peer) && self.0.values().filter(|target| target.local).count() >= LOCAL {
            let in_vain = self.0.iter().filter(|(_, target)| target.local).max_by_key(|(_, target)| target.pause);
            if let Some(peer) = in_vain.map(|(peer, _)| *peer) {
                self.0.remove(&peer);
            }
        }
        let target = self.0.entry(peer).or_insert_with(|| Target::new(true, now));
        // Who begins with a peer knows its addresses; this one comes from mDNS when it is dialled.
        if target.local && target.addresses.len() < PER_PEER && !target.addresses.contains(&address) {
            target.addresses.push(address);
        }
        target.seek(now);
    }

    /// An address on the local network is one no more.
    pub fn gone(&mut self, peer: &PeerId, address: &Multiaddr) {
        if let Some(target) = self.0.get_mut(peer).filter(|target| target.local) {
            target.addresses.retain(|known| known != address);
            if target.addresses.is_empty() {
                self.0.remove(peer);
            }
        }
    }

    /// It is connected. It may still have no room, and close the connection.
    pub fn reached(&mut self, peer: &PeerId) {
        if let Some(target) = self.0.get_mut(peer) {
            target.next = None;
        }
    }

    /// It has said who it is.
    pub fn met(&mut self, peer: &PeerId) {
        match self.0.get_mut(peer) {
            Some(target) if target.local => drop(self.0.remove(peer)),
            Some(target) => target.pause = FIRST_PAUSE,
            None => {}
        }
    }

    /// It is connected no more.
    pub fn lost(&mut self, peer: &PeerId, now: Instant) {
        if let Some(target) = self.0.get_mut(peer) {
            target.next = Some(now + target.pause);
        }
    }

    /// When the next attempt is due, those in the local network left out where they have no room.
    pub fn next_alarm(&self, local: bool) -> Option<Instant> {
        self.0.values().filter(|target| local || !target.local).filter_map(|target| target.next).min()
    }

    /// Takes an attempt that is due. Those come first that were tried the least.
    pub fn take_due(&mut self, now: Instant, local: bool) -> Option<Attempt> {
        let due = self.0.iter_mut().filter(|(_, target)| local || !target.local);
        let due = due.filter(|(_, target)| target.next.is_some_and(|next| next <= now));
        let (peer, target) = due.min_by_key(|(_, target)| (target.pause, target.next))?;
        let is_first = target.pause == FIRST_PAUSE;
        target.next = Some(now + target.pause);
        target.pause = (target.pause * 2).min(LAST_PAUSE);
        Some(Attempt { peer: *peer, addresses: target.addresses.clone(), local: target.local, is_first })
    }
}

impl Target {
    fn new(local: bool, now: Instant) -> Self {
        Self { addresses: vec![], local, next: Some(now), pause: FIRST_PAUSE }
    }

    fn seek(&mut self, next: Instant) {
        self.next = Some(next);
        self.pause = FIRST_PAUSE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Multiaddr {
        format!("/ip4/10.0.0.1/tcp/{port}").parse().unwrap()
    }

    /// When each attempt of the next ten minutes is made.
    fn attempts(sought: &mut Sought, from: Instant) -> Vec<Duration> {
        let mut made = vec![];
        while let Some(next) = sought.next_alarm(true).filter(|next| *next - from < Duration::from_secs(600)) {
            sought.take_due(next, true).unwrap();
            made.push(next - from);
        }
        made
    }

    #[test]
    fn an_attempt_that_fails_is_repeated_with_growing_pauses() {
        let (mut sought, now, peer) = (Sought::default(), Instant::now(), PeerId::random());
        sought.seen(peer, address(1), now);
        let made = attempts(&mut sought, now);
        assert_eq!(made[..4], [0, 500, 1500, 3500].map(Duration::from_millis));
        assert_eq!(made[made.len() - 1] - made[made.len() - 2], LAST_PAUSE);
        assert!(made.len() < 20, "{made:?}");
    }

    #[test]
    fn a_local_peer_is_sought_until_it_is_reached_or_gone() {
        let (mut sought, now, peer) = (Sought::default(), Instant::now(), PeerId::random());
        sought.seen(peer, address(1), now);
        sought.seen(peer, address(2), now);
        assert_eq!(sought.take_due(now, false), None);
        assert_eq!(
            sought.take_due(now, true),
            Some(Attempt { peer, addresses: vec![address(1), address(2)], local: true, is_first: true })
        );
        sought.gone(&peer, &address(1));
        assert!(sought.next_alarm(true).is_some());
        sought.gone(&peer, &address(2));
        assert_eq!(sought.next_alarm(true), None);
        sought.seen(peer, address(1), now);
        sought.reached(&peer);
        sought.met(&peer);
        sought.lost(&peer, now);
        assert_eq!(sought.next_alarm(true), None);
    }

    #[test]
    fn a_peer_that_has_no_room_is_tried_less_and_less() {
        for local in [true, false] {
            let (mut sought, mut now, peer) = (Sought::default(), Instant::now(), PeerId::random());
            match local {
                true => sought.seen(peer, address(1), now),
                false => sought.begin_with(peer, address(1), now),
            }
            let mut pauses = vec![];
            for _ in 0..4 {
                assert!(sought.take_due(now, true).is_some());
                // It takes the connection, and closes it.
                sought.reached(&peer);
                assert_eq!(sought.next_alarm(true), None);
                sought.lost(&peer, now);
                let next = sought.next_alarm(true).unwrap();
                pauses.push((next - now).as_millis());
                now = next;
            }
            assert_eq!(pauses, [1000, 2000, 4000, 8000], "local: {local}");
        }
    }

    #[test]
    fn a_peer_to_begin_with_is_sought_whenever_it_is_lost() {
        let (mut sought, now, peer) = (Sought::default(), Instant::now(), PeerId::random());
        sought.begin_with(peer, address(1), now);
        assert!(sought.begins() && sought.take_due(now, false).is_some());
        sought.reached(&peer);
        sought.met(&peer);
        assert_eq!(sought.next_alarm(true), None);
        sought.gone(&peer, &address(1));
        sought.lost(&peer, now);
        assert_eq!(sought.next_alarm(false), Some(now + FIRST_PAUSE));
    }

    #[test]
    fn a_crowd_on_the_local_network_is_sought_up_to_a_bound() {
        let (mut sought, now) = (Sought::default(), Instant::now());
        for port in 0..1000 {
            sought.seen(PeerId::random(), address(port), now);
        }
        let (peer, local) = (PeerId::random(), PeerId::random());
        sought.begin_with(peer, address(1), now);
        assert!(sought.take_due(now, true).is_some(), "one of them is tried in vain");
        for port in 0..100 {
            sought.seen(peer, address(port), now);
            sought.seen(local, address(port), now);
        }
        assert_eq!((sought.0.len(), sought.0[&peer].addresses.len(), sought.0[&local].addresses.len()), (LOCAL + 1, 1, PER_PEER));
    }
}
