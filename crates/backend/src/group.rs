//! Ranks: which part of a model a process holds, and what ranks that compute on the host say to each other. No transport.

use std::ops::Range;

use crate::Result;

/// One process of a tensor-parallel group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rank {
    index: usize,
    world: usize,
}

impl Rank {
    /// The only rank of a group of one.
    pub const SINGLE: Rank = Rank { index: 0, world: 1 };

    /// Rank `index` of `world`; `None` unless `index < world`.
    pub fn new(index: usize, world: usize) -> Option<Self> {
        (index < world).then_some(Rank { index, world })
    }

    /// Its number, from 0.
    pub fn index(self) -> usize {
        self.index
    }

    /// Ranks in the group.
    pub fn world(self) -> usize {
        self.world
    }

    /// Whether this is rank 0: the one that holds the scheduler and adds what must be added once.
    pub fn is_first(self) -> bool {
        self.index == 0
    }

    /// This rank's share of `size` rows: equal parts, the first `size % world` ranks one more.
    pub fn range(self, size: usize) -> Range<usize> {
        let (each, more) = (size / self.world, size % self.world);
        let begin = self.index * each + self.index.min(more);
        begin..begin + each + usize::from(self.index < more)
    }

    /// Heads of keys and values that this rank holds of `num_kv_heads`: its share, or the one that its queries use where ranks
    /// are more than heads and each head is held by several.
    pub fn kv_heads(self, num_kv_heads: usize) -> Range<usize> {
        if self.world <= num_kv_heads {
            return self.range(num_kv_heads);
        }
        let head = self.index * num_kv_heads / self.world;
        head..head + 1
    }
}

/// What ranks of a group do together over host memory; every rank calls the same operations in the same order.
pub trait Collective: Send {
    /// Which rank this is.
    fn rank(&self) -> Rank;

    /// Every rank ends with the elementwise sum. Ranks are added in ascending order, so all get the same bits.
    ///
    /// # Errors
    /// A peer is gone, or brings another number of values.
    fn all_reduce(&mut self, values: &mut [f32]) -> Result<()>;

    /// Every rank ends with every rank's values, in rank order; lengths may differ.
    ///
    /// # Errors
    /// A peer is gone.
    fn all_gather(&mut self, mine: &[f32]) -> Result<Vec<Vec<f32>>>;

    /// Every rank ends with the values of rank `root`, whose number all know.
    ///
    /// # Errors
    /// A peer is gone, or `root` brings another number of values.
    fn broadcast(&mut self, values: &mut [f32], root: usize) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(world: usize) -> impl Iterator<Item = Rank> {
        (0..world).map(move |index| Rank::new(index, world).unwrap())
    }

    #[test]
    fn shares_cover_everything_once() {
        for (size, world) in [(151_936, 2), (7, 3), (2, 4), (0, 2), (5, 1)] {
            let mut next = 0;
            for rank in ranks(world) {
                let range = rank.range(size);
                assert_eq!(range.start, next);
                next = range.end;
            }
            assert_eq!(next, size);
        }
        assert_eq!(Rank::new(2, 2), None);
        assert_eq!(Rank::new(0, 0), None);
    }

    #[test]
    fn more_ranks_than_heads_share_them() {
        let held: Vec<_> = ranks(8).map(|rank| rank.kv_heads(4)).collect();
        assert_eq!(held, [0..1, 0..1, 1..2, 1..2, 2..3, 2..3, 3..4, 3..4]);
        let held: Vec<_> = ranks(2).map(|rank| rank.kv_heads(4)).collect();
        assert_eq!(held, [0..2, 2..4]);
    }
}
