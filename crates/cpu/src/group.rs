//! The rank that a backend is, and what its operations bring together over the group. No transport: that is the
//! [`Collective`]'s.

use crate::tensor::CpuTensor;
use crate::weight::CpuLinear;
use spark_backend::{Collective, Error, Rank, Result};
use std::cell::RefCell;
use std::ops::Range;

/// A rank and its connection to the others; a group of one has none.
pub(crate) struct Group {
    rank: Rank,
    /// One thread drives a backend, and no collective calls another one: a cell is enough.
    collective: Option<RefCell<Box<dyn Collective>>>,
}

impl Group {
    pub(crate) fn single() -> Self {
        Self { rank: Rank::SINGLE, collective: None }
    }

    pub(crate) fn new(collective: Box<dyn Collective>) -> Self {
        let rank = collective.rank();
        Self { rank, collective: (rank.world() > 1).then(|| RefCell::new(collective)) }
    }

    pub(crate) fn rank(&self) -> Rank {
        self.rank
    }

    /// The rows that `weight` holds of `vocab_rows` rows that are shared out.
    pub(crate) fn share(
        &self,
        op: &'static str,
        weight: &CpuLinear,
        vocab_rows: usize,
    ) -> Result<Range<usize>> {
        let share = self.rank.range(vocab_rows);
        if share.len() == weight.n {
            return Ok(share);
        }
        let (index, world) = (self.rank.index(), self.rank.world());
        let want = format!("rows {share:?} of {vocab_rows}, the share of rank {index} of {world}");
        Err(Error::shape(op, want, format!("{} rows", weight.n)))
    }

    /// Adds up the ranks' `values` in float32; whether there was anything to add.
    pub(crate) fn all_reduce(&self, values: &mut [f32]) -> Result<bool> {
        let Some(collective) = &self.collective else { return Ok(false) };
        collective.borrow_mut().all_reduce(values)?;
        Ok(true)
    }

    /// The ranks' columns side by side: `[rows, local]` of each to `[rows, vocab_rows]`.
    pub(crate) fn gather_columns(&self, local: CpuTensor, vocab_rows: usize) -> Result<CpuTensor> {
        let Some(collective) = &self.collective else { return Ok(local) };
        let (rows, world) = (local.rows(), self.rank.world());
        let all = collective.borrow_mut().all_gather(local.values())?;
        if all.len() != world {
            return Err(Error::shape("logits", format!("values of {world} ranks"), all.len()));
        }
        let mut values = vec![0.0; rows * vocab_rows];
        for (index, part) in all.iter().enumerate() {
            let columns = Rank::new(index, world).map_or(0..0, |rank| rank.range(vocab_rows));
            if part.len() != rows * columns.len() {
                let want = format!("{} values of rank {index}", rows * columns.len());
                return Err(Error::shape("logits", want, part.len()));
            }
            for (row, part) in part.chunks_exact(columns.len().max(1)).enumerate() {
                values[row * vocab_rows + columns.start..][..columns.len()].copy_from_slice(part);
            }
        }
        Ok(CpuTensor::new(values, [rows, vocab_rows]))
    }

    /// The tensor of rank `root`, `shape`, on every rank.
    pub(crate) fn broadcast(
        &self,
        x: Option<CpuTensor>,
        shape: [usize; 2],
        root: usize,
    ) -> Result<CpuTensor> {
        const OP: &str = "broadcast";
        let Some(sender) = Rank::new(root, self.rank.world()) else {
            return Err(Error::shape(OP, format!("a rank under {}", self.rank.world()), root));
        };
        let Some(mut x) = x
            .or_else(|| (sender != self.rank).then(|| CpuTensor::new(vec![0.0; shape[0] * shape[1]], shape)))
        else {
            return Err(Error::shape(OP, "the root's tensor", "none"));
        };
        if x.shape != shape {
            return Err(Error::shape(OP, shape, x.shape));
        }
        if let Some(collective) = &self.collective {
            collective.borrow_mut().broadcast(&mut x.values, root)?;
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use spark_backend::{Backend, Dtype};
    use spark_testing::LocalGroup;

    use super::*;
    use crate::CpuBackend;

    #[test]
    fn every_rank_ends_with_the_roots_tensor() {
        let ranks = LocalGroup::ranks(3).into_iter().map(|rank| {
            std::thread::spawn(move || {
                let (group, shape) = (Group::new(Box::new(rank)), [2, 2]);
                let mine = CpuTensor::new(vec![group.rank().index() as f32 + 0.5; 4], shape);
                // The others bring nothing, or what is overwritten.
                let nothing = (group.rank().index() == 1).then(|| mine.clone());
                let of_one = group.broadcast(nothing, shape, 1).unwrap();
                let of_two = group.broadcast(Some(mine), shape, 2).unwrap();
                assert!(group.broadcast(Some(of_two.clone()), shape, 3).is_err());
                (of_one.values, of_two.values)
            })
        });
        for rank in ranks.collect::<Vec<_>>() {
            assert_eq!(rank.join().unwrap(), (vec![1.5; 4], vec![2.5; 4]));
        }
    }

    /// What `run` gives on each of three ranks in bfloat16.
    fn on_ranks<T: Send + 'static>(run: fn(CpuBackend) -> T) -> Vec<T> {
        let start = |group| {
            std::thread::spawn(move || {
                run(CpuBackend::new(Dtype::Bf16, Some(1)).unwrap().with_group(Box::new(group)))
            })
        };
        let ranks: Vec<_> = LocalGroup::ranks(3).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    }

    #[test]
    fn partial_sums_are_added_in_float32_and_rounded_once() {
        let sums = on_ranks(|b| {
            // Rounded after each addition, both small ones would be lost.
            let partial = if b.rank().is_first() { 1.0 } else { 1.0 / 256.0 };
            let mut residual = CpuTensor::new(vec![0.0], [1, 1]);
            let weight = CpuTensor::new(vec![2.0], [1, 1]);
            let partial = Some(CpuTensor::new(vec![partial], [1, 1]));
            let x = b.reduce_norm(partial, &mut residual, &weight, 0.0).unwrap();
            (residual.values, x.values)
        });
        assert_eq!(sums, vec![(vec![1.0 + 1.0 / 128.0], vec![2.0]); 3]);
    }

    #[test]
    fn uneven_columns_come_side_by_side() {
        let gathered = on_ranks(|b| {
            let columns = b.rank().range(5);
            let values = (0..2).flat_map(|row| columns.clone().map(move |column| (10 * row + column) as f32));
            let local = CpuTensor::new(values.collect(), [2, columns.len()]);
            b.group.gather_columns(local, 5).unwrap().values
        });
        let want: Vec<f32> = [0, 1, 2, 3, 4, 10, 11, 12, 13, 14].map(|value: u8| f32::from(value)).to_vec();
        assert_eq!(gathered, vec![want; 3]);
    }

    #[test]
    fn one_rank_needs_its_tensor_in_the_right_shape() {
        let (group, x) = (Group::single(), CpuTensor::new(vec![1.0; 4], [2, 2]));
        assert_eq!(group.broadcast(Some(x.clone()), [2, 2], 0).unwrap().values, [1.0; 4]);
        assert!(group.broadcast(None, [2, 2], 0).is_err());
        assert!(group.broadcast(Some(x.clone()), [4, 1], 0).is_err());
        assert!(group.broadcast(Some(x), [2, 2], 1).is_err());
    }
}
