//! How many connections a door has at once, and of whom.

use std::collections::HashMap;
use std::sync::Arc;

use iroh::EndpointId;
use parking_lot::Mutex;

/// Connections at once.
const ALL: usize = 256;

/// Connections at once of those whom the operator has not named, so that those whom it has named find a place.
const STRANGERS: usize = 192;

/// Connections at once of one node.
const EACH: usize = 64;

/// The places behind a door.
#[derive(Debug, Default)]
pub struct Places(Mutex<Taken>);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    strangers: usize,
    by: HashMap<EndpointId, usize>,
}

/// A place that is taken. It is free again when this goes.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    who: EndpointId,
    friend: bool,
}

impl Places {
    pub fn take(self: &Arc<Self>, who: EndpointId, friend: bool) -> Option<Place> {
        let mut taken = self.0.lock();
        let own = taken.by.get(&who).copied().unwrap_or(0);
        if taken.all >= ALL || own >= EACH || (!friend && taken.strangers >= STRANGERS) {
            return None;
        }
        taken.all += 1;
        taken.strangers += usize::from(!friend);
        taken.by.insert(who, own + 1);
        Some(Place { places: self.clone(), who, friend })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock();
        taken.all -= 1;
        taken.strangers -= usize::from(!self.friend);
        match taken.by.get_mut(&self.who) {
            Some(own) if *own > 1 => *own -= 1,
            _ => drop(taken.by.remove(&self.who)),
        }
    }
}

#[cfg(test)]
mod tests {
    use iroh::SecretKey;

    use super::*;

    #[test]
    fn nobody_has_all_places_and_friends_find_one() {
        let places = Arc::new(Places::default());
        let who = || SecretKey::generate().public();
        let greedy = who();
        let mut held: Vec<Place> = (0..EACH).filter_map(|_| places.take(greedy, true)).collect();
        assert_eq!(held.len(), EACH);
        assert!(places.take(greedy, true).is_none());
        held.extend((0..ALL).filter_map(|_| places.take(who(), false)));
        assert_eq!(held.len(), EACH + STRANGERS);
        assert!(places.take(who(), true).is_none(), "all are taken");
        held.clear();
        assert!(places.0.lock().by.is_empty());
        held.extend((0..ALL).filter_map(|_| places.take(who(), false)));
        assert_eq!(held.len(), STRANGERS);
        assert!(places.take(who(), true).is_some());
    }
}
