//! A map that forgets what was not used for longest once it holds more bytes than it may.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

/// Bounded by bytes, not by entries. A bound of 0 keeps nothing.
pub(crate) struct ByteLru<K, V> {
    max_bytes: usize,
    num_bytes: usize,
    /// Value, its bytes, and when it was used.
    entries: HashMap<K, (V, usize, u64)>,
    by_use: BTreeMap<u64, K>,
    clock: u64,
}

impl<K: Hash + Eq + Copy, V: Clone> ByteLru<K, V> {
    /// An empty map.
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, num_bytes: 0, entries: HashMap::new(), by_use: BTreeMap::new(), clock: 0 }
    }

    /// Looks up, and marks as used.
    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        self.clock += 1;
        let (value, _, used) = self.entries.get_mut(key)?;
        self.by_use.remove(used);
        *used = self.clock;
        self.by_use.insert(self.clock, *key);
        Some(value.clone())
    }

    /// Takes a value out.
    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let (value, num_bytes, used) = self.entries.remove(key)?;
        self.by_use.remove(&used);
        self.num_bytes -= num_bytes;
        Some(value)
    }

    /// Puts a value in, and others out. One that is too large for the whole map is not kept.
    pub(crate) fn insert(&mut self, key: K, value: V, num_bytes: usize) {
        if num_bytes > self.max_bytes {
            return;
        }
        self.clock += 1;
        if let Some((_, old_bytes, used)) = self.entries.insert(key, (value, num_bytes, self.clock)) {
            self.by_use.remove(&used);
            self.num_bytes -= old_bytes;
        }
        self.by_use.insert(self.clock, key);
        self.num_bytes += num_bytes;
        while self.num_bytes > self.max_bytes {
            let Some((_, oldest)) = self.by_use.pop_first() else { return };
            if let Some((_, bytes, _)) = self.entries.remove(&oldest) {
                self.num_bytes -= bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_go_first() {
        let mut lru = ByteLru::new(10);
        lru.insert(1, 'a', 4);
        lru.insert(2, 'b', 4);
        assert_eq!(lru.get(&1), Some('a'));
        lru.insert(3, 'c', 4);
        assert_eq!((lru.get(&1), lru.get(&2), lru.get(&3)), (Some('a'), None, Some('c')));
        lru.insert(3, 'd', 6);
        assert_eq!((lru.get(&1), lru.get(&3), lru.num_bytes), (Some('a'), Some('d'), 10));
        lru.insert(4, 'e', 11);
        assert_eq!((lru.get(&4), lru.num_bytes, lru.by_use.len()), (None, 10, 2));
        assert_eq!((lru.remove(&1), lru.remove(&1)), (Some('a'), None));
        assert_eq!((lru.num_bytes, lru.by_use.len()), (6, 1));
    }
}
