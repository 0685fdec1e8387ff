use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;

use super::*;
use crate::topics::{SHARDS, Topic};

const TTL: Duration = Duration::from_secs(45 * 60);
const TIGHT: Bounds = Bounds { keys: 4, providers_per_key: 3, keys_per_provider: 2, records: 6 };

/// A store whose time stands still until a test moves it.
struct Timed {
    records: Records<Box<dyn Fn() -> Instant>>,
    now: Rc<Cell<Instant>>,
}

impl Timed {
    fn new(bounds: Bounds) -> Self {
        let now = Rc::new(Cell::new(Instant::now()));
        let clock = now.clone();
        Self { records: Records::with_clock(PeerId::random(), TTL, bounds, Box::new(move || clock.get())), now }
    }

    fn wait(&self, time: Duration) {
        self.now.set(self.now.get() + time);
    }

    fn keep(&mut self, topic: Topic, provider: PeerId) -> Result<(), Refused> {
        self.records.keep(&topic.key_of(&provider), provider, vec![])
    }

    fn shown(&self, topic: Topic) -> HashSet<PeerId> {
        topic.keys().flat_map(|key| self.records.providers(&key)).map(|record| record.provider).collect()
    }
}

fn topic(number: u8) -> Topic {
    fabstir_plugin_api::transport::Topic(vec![number; 32]).try_into().unwrap()
}

/// A peer of the given shard.
fn peer_in(shard: u8) -> PeerId {
    std::iter::repeat_with(PeerId::random).find(|peer| shard_of(peer) == shard).unwrap()
}

#[test]
fn none_is_offered_after_its_time() {
    let mut store = Timed::new(Bounds::default());
    let (early, late) = (PeerId::random(), PeerId::random());
    store.keep(topic(1), early).unwrap();
    store.wait(TTL / 3);
    store.keep(topic(1), late).unwrap();
    store.wait(TTL / 3 * 2 - Duration::from_millis(1));
    assert_eq!(store.shown(topic(1)), HashSet::from([early, late]));
    store.wait(Duration::from_millis(1));
    assert_eq!(store.shown(topic(1)), HashSet::from([late]));
    store.wait(TTL / 3);
    assert_eq!(store.shown(topic(1)), HashSet::new());
    // The room is free again, too.
    assert_eq!(store.records.len(), 2);
    store.records.forget();
    assert_eq!((store.records.len(), store.records.keys.len(), store.records.per_provider.len()), (0, 0, 0));
}

#[test]
fn what_is_said_again_is_kept_from_then_on_and_once() {
    let mut store = Timed::new(Bounds::default());
    let peer = PeerId::random();
    for _ in 0..5 {
        store.keep(topic(1), peer).unwrap();
        store.wait(TTL - Duration::from_secs(1));
        assert_eq!(store.shown(topic(1)), HashSet::from([peer]));
    }
    assert_eq!(store.records.len(), 1);
    store.wait(Duration::from_secs(1));
    assert!(store.shown(topic(1)).is_empty());
}

#[test]
fn own_advertisements_hold_until_they_are_withdrawn() {
    let mut store = Timed::new(TIGHT);
    let own = store.records.own;
    for number in 0..8 {
        store.keep(topic(number), own).unwrap();
    }
    store.wait(TTL * 100);
    store.records.forget();
    assert_eq!(store.shown(topic(7)), HashSet::from([own]));
    assert_eq!(store.records.provided().count(), 8);
    store.records.remove_provider(&topic(7).key_of(&own), &own);
    assert!(store.shown(topic(7)).is_empty());
    assert_eq!((store.records.provided().count(), store.records.len()), (7, 7));
}

#[test]
fn another_shard_or_form_is_refused() {
    let mut store = Timed::new(Bounds::default());
    let peer = PeerId::random();
    let mut kept = 0;
    for key in topic(1).keys() {
        match store.records.keep(&key, peer, vec![]) {
            Ok(()) => kept += 1,
            Err(refused) => assert_eq!(refused, Refused::Shard),
        }
    }
    assert_eq!(kept, 1);
    for key in [&b""[..], b"model", &[0; 50]] {
        assert_eq!(store.records.keep(&key.to_vec().into(), peer, vec![]), Err(Refused::Key));
    }
    let value = Record::new(topic(1).key_of(&peer), vec![1]);
    assert!(store.records.put(value.clone()).is_err() && store.records.get(&value.key).is_none());
}

#[test]
fn bounds_hold_for_the_key_the_provider_and_all() {
    let mut store = Timed::new(TIGHT);
    for _ in 0..3 {
        store.keep(topic(1), peer_in(0)).unwrap();
    }
    assert_eq!(store.keep(topic(1), peer_in(0)), Err(Refused::KeyFull));
    let busy = peer_in(1);
    store.keep(topic(1), busy).unwrap();
    store.keep(topic(2), busy).unwrap();
    assert_eq!(store.keep(topic(3), busy), Err(Refused::ProviderFull));
    store.keep(topic(3), peer_in(2)).unwrap();
    assert_eq!(store.records.len(), TIGHT.records);
    assert_eq!(store.keep(topic(3), peer_in(2)), Err(Refused::Full));
    // One that is known may always be said again.
    store.keep(topic(2), busy).unwrap();
    // What is over makes room by itself.
    store.wait(TTL);
    store.keep(topic(9), peer_in(3)).unwrap();
    assert_eq!(store.records.len(), 1);
}

#[test]
fn keys_are_bounded() {
    let mut store = Timed::new(Bounds { records: 100, ..TIGHT });
    for number in 0..4 {
        store.keep(topic(number), peer_in(0)).unwrap();
    }
    assert_eq!(store.keep(topic(4), peer_in(0)), Err(Refused::Full));
    store.keep(topic(3), peer_in(0)).unwrap();
}

#[test]
fn addresses_are_few_and_short() {
    let mut store = Timed::new(Bounds::default());
    let peer = PeerId::random();
    let long: Multiaddr = format!("/dns4/{}/tcp/1", "a".repeat(200)).parse().unwrap();
    let addresses: Vec<Multiaddr> = (0..10).map(|port| format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap()).collect();
    let key = topic(1).key_of(&peer);
    store.records.keep(&key, peer, [vec![long], addresses.clone()].concat()).unwrap();
    assert_eq!(store.records.providers(&key)[0].addresses, addresses[..ADDRESSES]);
}

#[test]
fn who_asks_several_times_learns_of_all_though_20_are_shown() {
    let mut store = Timed::new(Bounds::default());
    let peers: HashSet<PeerId> = (0..60).map(|_| peer_in(5)).collect();
    for peer in &peers {
        store.keep(topic(1), *peer).unwrap();
    }
    let key = topic(1).keys().nth(5).unwrap();
    let mut seen = HashSet::new();
    for _ in 0..200 {
        seen.extend(store.records.providers(&key).into_iter().take(20).map(|record| record.provider));
    }
    assert_eq!(seen, peers);
}

#[test]
fn a_thousand_providers_of_one_topic_fit() {
    let mut store = Timed::new(Bounds::default());
    let (mut kept, mut full) = (0, 0);
    for _ in 0..1000 {
        match store.keep(topic(1), PeerId::random()) {
            Ok(()) => kept += 1,
            Err(_) => full += 1,
        }
    }
    // 62.5 to a shard on average, of which 64 are kept.
    assert!(kept > 900, "{kept} kept, {full} refused");
    assert!(store.records.keys.len() <= SHARDS as usize);
}
