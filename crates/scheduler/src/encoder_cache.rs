//! Which encoded media the device keeps. Only sizes and reference counts: the embeddings are with the executor.
//!
//! An entry is referenced by every span whose rows are not all computed yet. Unreferenced entries stay until their
//! room is needed, least recently used first. An entry is shared by all sequences that show the same medium.

use std::collections::BTreeMap;

use spark_api::MediaHash;

/// The encoder cache's books. Sizes are in media tokens.
pub(crate) struct EncoderCache {
    capacity: usize,
    num_tokens: usize,
    num_releases: u64,
    entries: BTreeMap<MediaHash, Entry>,
    /// Unreferenced entries, by the time of their release.
    evictable: BTreeMap<u64, MediaHash>,
    /// Tokens of unreferenced entries.
    num_evictable_tokens: usize,
}

struct Entry {
    num_tokens: usize,
    ref_count: usize,
    /// Key in `evictable`; meaningful only there.
    released: u64,
}

/// What one step may still encode, and what it does.
pub(crate) struct EncodeBudget {
    max_tokens: usize,
    num_tokens: usize,
    /// Dropped before this step's encodes.
    pub(crate) evicted: Vec<MediaHash>,
}

/// Where a referenced entry comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Acquired {
    /// It was there.
    Hit,
    /// This step has to encode it.
    Encode,
}

impl EncodeBudget {
    pub(crate) fn new(max_tokens: usize) -> Self {
        Self { max_tokens, num_tokens: 0, evicted: Vec::new() }
    }

    /// The first medium of a step is always let through: else one over the bound would wait for ever.
    fn admits(&self, num_tokens: usize) -> bool {
        self.num_tokens == 0 || self.num_tokens + num_tokens <= self.max_tokens
    }
}

impl EncoderCache {
    pub(crate) fn new(capacity: usize) -> Self {
        let (entries, evictable) = (BTreeMap::new(), BTreeMap::new());
        Self { capacity, num_tokens: 0, num_releases: 0, entries, evictable, num_evictable_tokens: 0 }
    }

    /// Tokens of all entries.
    pub(crate) fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Whether `acquire` would succeed.
    pub(crate) fn can_acquire(&self, hash: &MediaHash, num_tokens: usize, budget: &EncodeBudget) -> bool {
        let in_use = self.num_tokens - self.num_evictable_tokens;
        self.entries.contains_key(hash) || (budget.admits(num_tokens) && in_use + num_tokens <= self.capacity)
    }

    /// Takes a reference to an entry, making it (and room for it) if need be. `None` if this step cannot.
    pub(crate) fn acquire(
        &mut self,
        hash: MediaHash,
        num_tokens: usize,
        budget: &mut EncodeBudget,
    ) -> Option<Acquired> {
        if !self.can_acquire(&hash, num_tokens, budget) {
            return None;
        }
        if let Some(entry) = self.entries.get_mut(&hash) {
            if entry.ref_count == 0 {
                self.evictable.remove(&entry.released);
                self.num_evictable_tokens -= entry.num_tokens;
            }
            entry.ref_count += 1;
            return Some(Acquired::Hit);
        }
        while self.num_tokens + num_tokens > self.capacity {
            let (_, victim) =
                self.evictable.pop_first().expect("can_acquire counted the unreferenced entries");
            let entry = self.entries.remove(&victim).expect("an evictable entry is an entry");
            self.num_tokens -= entry.num_tokens;
            self.num_evictable_tokens -= entry.num_tokens;
            budget.evicted.push(victim);
        }
        self.entries.insert(hash, Entry { num_tokens, ref_count: 1, released: 0 });
        self.num_tokens += num_tokens;
        budget.num_tokens += num_tokens;
        Some(Acquired::Encode)
    }

    /// Gives back a reference that `acquire` gave.
    pub(crate) fn release(&mut self, hash: &MediaHash) {
        let entry = self.entries.get_mut(hash).expect("a referenced entry is never evicted");
        entry.ref_count -= 1;
        if entry.ref_count == 0 {
            entry.released = self.num_releases;
            self.evictable.insert(self.num_releases, *hash);
            self.num_evictable_tokens += entry.num_tokens;
            self.num_releases += 1;
        }
    }

    /// Compares the books with the references that exist.
    pub(crate) fn check(&self, references: impl Iterator<Item = MediaHash>) -> Result<(), String> {
        let mut ref_counts: BTreeMap<MediaHash, usize> = BTreeMap::new();
        references.for_each(|hash| *ref_counts.entry(hash).or_default() += 1);
        if let Some(hash) = ref_counts.keys().find(|hash| !self.entries.contains_key(*hash)) {
            return Err(format!("medium {:02x?} is referenced, but not in the encoder cache", &hash[..4]));
        }
        let (mut num_tokens, mut num_evictable_tokens) = (0, 0);
        for (hash, entry) in &self.entries {
            let expect = ref_counts.get(hash).copied().unwrap_or(0);
            if entry.ref_count != expect {
                return Err(format!(
                    "medium {:02x?}: ref_count {}, {expect} uses",
                    &hash[..4],
                    entry.ref_count
                ));
            }
            let listed = self.evictable.get(&entry.released) == Some(hash);
            if listed != (expect == 0) {
                return Err(format!(
                    "medium {:02x?}: {expect} uses, listed as evictable: {listed}",
                    &hash[..4]
                ));
            }
            num_tokens += entry.num_tokens;
            num_evictable_tokens += if listed { entry.num_tokens } else { 0 };
        }
        let sums = (self.num_tokens, self.num_evictable_tokens);
        if sums != (num_tokens, num_evictable_tokens) || num_tokens > self.capacity {
            return Err(format!("encoder cache counts {sums:?}, has {num_tokens}, holds {}", self.capacity));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MediaHash = [1; 32];
    const B: MediaHash = [2; 32];
    const C: MediaHash = [3; 32];

    #[test]
    fn evicts_unreferenced_entries_oldest_first() {
        let mut cache = EncoderCache::new(10);
        let mut budget = EncodeBudget::new(100);
        assert_eq!(cache.acquire(A, 4, &mut budget), Some(Acquired::Encode));
        assert_eq!(cache.acquire(B, 4, &mut budget), Some(Acquired::Encode));
        assert_eq!(cache.acquire(C, 4, &mut budget), None, "both entries are in use");
        cache.release(&B);
        cache.release(&A);
        assert_eq!(cache.acquire(C, 4, &mut budget), Some(Acquired::Encode));
        assert_eq!(budget.evicted, [B]);
        assert_eq!(cache.acquire(A, 4, &mut budget), Some(Acquired::Hit));
        cache.check([A, C].into_iter()).unwrap();
    }

    #[test]
    fn a_shared_entry_stays_until_its_last_user_is_done() {
        let mut cache = EncoderCache::new(4);
        let mut budget = EncodeBudget::new(100);
        assert_eq!(cache.acquire(A, 4, &mut budget), Some(Acquired::Encode));
        assert_eq!(cache.acquire(A, 4, &mut budget), Some(Acquired::Hit));
        cache.release(&A);
        assert_eq!(cache.acquire(B, 1, &mut budget), None);
        cache.release(&A);
        assert_eq!(cache.acquire(B, 1, &mut budget), Some(Acquired::Encode));
        cache.check([B].into_iter()).unwrap();
        assert!(cache.check(std::iter::empty()).is_err());
    }

    #[test]
    fn one_medium_over_the_step_budget_passes_alone() {
        let mut cache = EncoderCache::new(100);
        let mut budget = EncodeBudget::new(8);
        assert_eq!(cache.acquire(A, 9, &mut budget), Some(Acquired::Encode));
        assert_eq!(cache.acquire(B, 1, &mut budget), None);
        assert_eq!(cache.acquire(B, 1, &mut EncodeBudget::new(8)), Some(Acquired::Encode));
    }
}
