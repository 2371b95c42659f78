//! Who uses which KV block, and which free blocks still hold something worth keeping. No device memory, only ids.
//!
//! A block is *in use* (`ref_count` > 0), *free*, or *cached*: free, but its content is known by a block hash and can
//! be taken back until it is evicted, least recently used first.

use std::collections::{BTreeMap, HashMap};

use crate::block_hash::BlockHash;

/// The KV pool's books.
pub(crate) struct BlockManager {
    block_size: usize,
    // [num_blocks]
    blocks: Vec<Block>,
    /// Free blocks without content, used as a stack.
    free: Vec<u32>,
    /// Free blocks with content, by the time of their release.
    evictable: BTreeMap<u64, u32>,
    /// Block of each hash, in use or evictable. Never iterated over: its order is not deterministic.
    by_hash: HashMap<BlockHash, u32>,
    num_releases: u64,
}

#[derive(Clone)]
struct Block {
    ref_count: u32,
    hash: Option<BlockHash>,
    /// Key in `evictable`; meaningful only there.
    released: u64,
}

impl BlockManager {
    pub(crate) fn new(num_blocks: usize, block_size: usize) -> Self {
        let num_blocks =
            u32::try_from(num_blocks).expect("the configuration was checked: block ids fit 32 bits");
        Self {
            block_size,
            blocks: vec![Block { ref_count: 0, hash: None, released: 0 }; num_blocks as usize],
            free: (0..num_blocks).rev().collect(),
            evictable: BTreeMap::new(),
            by_hash: HashMap::new(),
            num_releases: 0,
        }
    }

    /// Blocks that hold `num_tokens` tokens.
    pub(crate) fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    pub(crate) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be allocated now.
    pub(crate) fn num_free(&self) -> usize {
        self.free.len() + self.evictable.len()
    }

    /// Whether only one block table holds `block`.
    pub(crate) fn is_exclusive(&self, block: u32) -> bool {
        self.blocks[block as usize].ref_count == 1
    }

    /// How many leading hashes have a block, and how many of those blocks are free now (taking them uses them up).
    pub(crate) fn lookup(&self, hashes: &[BlockHash]) -> PrefixHit {
        let mut hit = PrefixHit { num_blocks: 0, num_free: 0 };
        for hash in hashes {
            let Some(&block) = self.by_hash.get(hash) else { break };
            hit.num_blocks += 1;
            hit.num_free += usize::from(self.blocks[block as usize].ref_count == 0);
        }
        hit
    }

    /// Appends the blocks of `hashes`, which `lookup` has just found, to `table`.
    pub(crate) fn share(&mut self, hashes: &[BlockHash], table: &mut Vec<u32>) {
        for hash in hashes {
            let id = *self.by_hash.get(hash).expect("lookup found a block for each of these hashes");
            let block = &mut self.blocks[id as usize];
            if block.ref_count == 0 {
                self.evictable.remove(&block.released);
            }
            block.ref_count += 1;
            table.push(id);
        }
    }

    /// Grows `table` to `len` blocks, evicting cached blocks where needed. `false`, and nothing done, if too few are free.
    pub(crate) fn grow(&mut self, table: &mut Vec<u32>, len: usize) -> bool {
        if len.saturating_sub(table.len()) > self.num_free() {
            return false;
        }
        while table.len() < len {
            let id =
                self.free.pop().or_else(|| self.evict()).expect("num_free counted the blocks of both lists");
            self.blocks[id as usize].ref_count = 1;
            table.push(id);
        }
        true
    }

    /// Makes a full, computed block findable. A block with the same content may be there already; that one stays.
    pub(crate) fn register(&mut self, block: u32, hash: BlockHash) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.by_hash.entry(hash) {
            entry.insert(block);
            self.blocks[block as usize].hash = Some(hash);
        }
    }

    /// Gives back one reference to each block of `table` and empties it.
    pub(crate) fn release(&mut self, table: &mut Vec<u32>) {
        // Last block first: a prefix is useless without its beginning, so the ends are evicted earlier.
        for id in table.drain(..).rev() {
            let block = &mut self.blocks[id as usize];
            block.ref_count -= 1;
            if block.ref_count > 0 {
                continue;
            }
            if block.hash.is_none() {
                self.free.push(id);
                continue;
            }
            block.released = self.num_releases;
            self.evictable.insert(self.num_releases, id);
            self.num_releases += 1;
        }
    }

    fn evict(&mut self) -> Option<u32> {
        let (_, id) = self.evictable.pop_first()?;
        let hash = self.blocks[id as usize].hash.take().expect("only blocks with a hash are evictable");
        self.by_hash.remove(&hash);
        Some(id)
    }

    /// Compares the books with the block tables that exist.
    pub(crate) fn check<'a>(&self, tables: impl Iterator<Item = &'a [u32]>) -> Result<(), String> {
        let mut ref_counts = vec![0_u32; self.blocks.len()];
        for table in tables {
            for &id in table {
                ref_counts[id as usize] += 1;
            }
        }
        let mut num_listed = vec![0_u32; self.blocks.len()];
        for &id in self.free.iter().chain(self.evictable.values()) {
            num_listed[id as usize] += 1;
        }
        for (id, block) in self.blocks.iter().enumerate() {
            if block.ref_count != ref_counts[id] {
                return Err(format!(
                    "block {id}: ref_count {}, but {} uses",
                    block.ref_count, ref_counts[id]
                ));
            }
            if num_listed[id] != u32::from(block.ref_count == 0) {
                return Err(format!(
                    "block {id}: {} uses, {} times listed free",
                    block.ref_count, num_listed[id]
                ));
            }
            if let Some(hash) = &block.hash
                && self.by_hash.get(hash) != Some(&(id as u32))
            {
                return Err(format!("block {id} has a hash that does not lead to it"));
            }
        }
        if self.free.iter().any(|&id| self.blocks[id as usize].hash.is_some()) {
            return Err("a block with content is listed as free without content".into());
        }
        if self.evictable.iter().any(|(&at, &id)| {
            let block = &self.blocks[id as usize];
            block.hash.is_none() || block.released != at
        }) {
            return Err("an evictable block has no content, or another release time".into());
        }
        let num_hashed = self.blocks.iter().filter(|block| block.hash.is_some()).count();
        match num_hashed == self.by_hash.len() {
            true => Ok(()),
            false => Err(format!("{num_hashed} blocks have a hash, {} hashes a block", self.by_hash.len())),
        }
    }
}

/// What the prefix cache holds of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PrefixHit {
    /// Leading blocks found.
    pub(crate) num_blocks: usize,
    /// Those of them that no sequence uses.
    pub(crate) num_free: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(i: u8) -> BlockHash {
        BlockHash([i; 32])
    }

    fn table(manager: &mut BlockManager, len: usize) -> Vec<u32> {
        let mut table = Vec::new();
        assert!(manager.grow(&mut table, len));
        table
    }

    #[test]
    fn grows_all_or_nothing() {
        let mut manager = BlockManager::new(4, 2);
        let mut a = table(&mut manager, 3);
        let mut b = table(&mut manager, 0);
        assert!(!manager.grow(&mut b, 2));
        assert!(b.is_empty());
        assert!(manager.grow(&mut b, 1));
        manager.check([&a[..], &b].into_iter()).unwrap();
        manager.release(&mut a);
        assert_eq!(manager.num_free(), 3);
        manager.check([&b[..]].into_iter()).unwrap();
    }

    #[test]
    fn released_content_is_found_until_evicted_from_its_end() {
        let mut manager = BlockManager::new(3, 2);
        let mut a = table(&mut manager, 3);
        (0..3).for_each(|i| manager.register(a[i], hash(i as u8)));
        let blocks = a.clone();
        manager.release(&mut a);
        let all = [hash(0), hash(1), hash(2)];
        assert_eq!(manager.lookup(&all), PrefixHit { num_blocks: 3, num_free: 3 });
        let mut b = table(&mut manager, 1);
        assert_eq!(b, [blocks[2]], "the end of the prefix goes first");
        assert_eq!(manager.lookup(&all), PrefixHit { num_blocks: 2, num_free: 2 });
        let mut c = Vec::new();
        manager.share(&all[..2], &mut c);
        assert_eq!(c, blocks[..2]);
        assert_eq!(manager.lookup(&all), PrefixHit { num_blocks: 2, num_free: 0 });
        assert!(!manager.grow(&mut b, 2));
        manager.check([&b[..], &c].into_iter()).unwrap();
    }

    #[test]
    fn the_first_of_two_equal_blocks_stays() {
        let mut manager = BlockManager::new(2, 2);
        let (mut a, mut b) = (table(&mut manager, 1), table(&mut manager, 1));
        manager.register(a[0], hash(7));
        manager.register(b[0], hash(7));
        let kept = a[0];
        manager.release(&mut b);
        manager.release(&mut a);
        let mut c = Vec::new();
        manager.share(&[hash(7)], &mut c);
        assert_eq!(c, [kept]);
        manager.check([&c[..]].into_iter()).unwrap();
    }

    #[test]
    fn check_sees_a_leak_and_a_double_use() {
        let mut manager = BlockManager::new(2, 2);
        let a = table(&mut manager, 1);
        assert!(manager.check(std::iter::empty()).is_err());
        assert!(manager.check([&a[..], &a].into_iter()).is_err());
    }
}
