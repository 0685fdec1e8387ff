//! Calls by their id.

use parking_lot::{Mutex, MutexGuard};

pub(super) const PARTS: usize = 256;

/// A map that is locked in parts. Threads of both ends come here twice for every call: at one lock they would wait for each other, and
/// in one map every entry would be on cache lines that the other end has just written.
///
/// Ids of one end are consecutive, so calls that run at the same time are in different parts, and a part has one entry or few.
pub(super) struct Table<T>(Box<[Part<T>]>);

#[repr(align(128))]
struct Part<T>(Mutex<Calls<T>>);

/// The calls in one part.
pub(super) struct Calls<T> {
    first: Option<(u64, T)>,
    more: Vec<(u64, T)>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self((0..PARTS).map(|_| Part(Mutex::new(Calls { first: None, more: Vec::new() }))).collect())
    }
}

impl<T> Table<T> {
    /// The part that a call is in. Ids of one end are every second number.
    pub fn part_of(&self, id: u64) -> MutexGuard<'_, Calls<T>> {
        self.0[(id >> 1) as usize % PARTS].0.lock()
    }

    /// Every part, one after the other.
    pub fn parts(&self) -> impl Iterator<Item = MutexGuard<'_, Calls<T>>> {
        self.0.iter().map(|part| part.0.lock())
    }

    pub fn remove(&self, id: u64) -> Option<T> {
        self.part_of(id).remove(id)
    }

    /// How many calls there are, where none comes or goes meanwhile. Not to be asked by who holds a part.
    pub fn len(&self) -> usize {
        self.parts().map(|part| part.len()).sum()
    }
}

impl<T> Calls<T> {
    /// `id` must not be there.
    pub fn insert(&mut self, id: u64, call: T) {
        match self.first {
            None => self.first = Some((id, call)),
            Some(_) => self.more.push((id, call)),
        }
    }

    pub fn remove(&mut self, id: u64) -> Option<T> {
        if self.first.as_ref().is_some_and(|(first, _)| *first == id) {
            return self.first.take().map(|(_, call)| call);
        }
        let index = self.more.iter().position(|(other, _)| *other == id)?;
        Some(self.more.swap_remove(index).1)
    }

    pub fn get(&self, id: u64) -> Option<&T> {
        self.iter().find(|(other, _)| *other == id).map(|(_, call)| call)
    }

    pub fn get_mut(&mut self, id: u64) -> Option<&mut T> {
        self.first.iter_mut().chain(&mut self.more).find(|(other, _)| *other == id).map(|(_, call)| call)
    }

    pub fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.more.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = &(u64, T)> {
        self.first.iter().chain(&self.more)
    }

    /// Takes all of them out.
    pub fn drain(&mut self) -> impl Iterator<Item = T> + use<T> {
        self.first.take().into_iter().chain(std::mem::take(&mut self.more)).map(|(_, call)| call)
    }
}
