//! A group whose ranks are threads of one process: what tests of several ranks use in place of a network. Not a transport
//! that anything but tests may rely on.

use std::sync::mpsc::{Receiver, Sender, channel};

use spark_backend::{Collective, Error, Rank, Result};

/// One rank of an in-process group. Each thread takes one; a rank that is dropped makes the others' next call fail.
#[derive(Debug)]
pub struct LocalGroup {
    rank: Rank,
    /// To every rank, itself included.
    to: Vec<Sender<Vec<f32>>>,
    /// From every rank.
    from: Vec<Receiver<Vec<f32>>>,
}

impl LocalGroup {
    /// The ranks of a group of `world`, in rank order.
    #[must_use]
    pub fn ranks(world: usize) -> Vec<LocalGroup> {
        let mut to: Vec<Vec<_>> = (0..world).map(|_| Vec::new()).collect();
        let mut from: Vec<Vec<_>> = (0..world).map(|_| Vec::new()).collect();
        for senders in &mut to {
            for receivers in &mut from {
                let (sender, receiver) = channel();
                senders.push(sender);
                receivers.push(receiver);
            }
        }
        let ends = to.into_iter().zip(from).enumerate();
        ends.filter_map(|(index, (to, from))| Some(LocalGroup { rank: Rank::new(index, world)?, to, from }))
            .collect()
    }

    /// Sends `values` to all and receives from all.
    fn exchange(&self, values: &[f32]) -> Result<Vec<Vec<f32>>> {
        for to in &self.to {
            to.send(values.to_vec()).map_err(|_| gone())?;
        }
        self.from.iter().map(|from| from.recv().map_err(|_| gone())).collect()
    }
}

fn gone() -> Error {
    Error::Device { op: "collective", message: "another rank of this process has ended".to_owned() }
}

impl Collective for LocalGroup {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn all_reduce(&mut self, values: &mut [f32]) -> Result<()> {
        let all = self.exchange(values)?;
        values.fill(0.0);
        for part in &all {
            if part.len() != values.len() {
                return Err(Error::shape("all_reduce", values.len(), part.len()));
            }
            values.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
        }
        Ok(())
    }

    fn all_gather(&mut self, mine: &[f32]) -> Result<Vec<Vec<f32>>> {
        self.exchange(mine)
    }

    fn broadcast(&mut self, values: &mut [f32], root: usize) -> Result<()> {
        let all = self.exchange(values)?;
        let Some(theirs) = all.get(root).filter(|theirs| theirs.len() == values.len()) else {
            return Err(Error::shape("broadcast", values.len(), all.get(root).map(Vec::len)));
        };
        values.copy_from_slice(theirs);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_end_with_the_same() {
        let threads = LocalGroup::ranks(3).into_iter().enumerate().map(|(index, mut rank)| {
            std::thread::spawn(move || {
                let mut sum = vec![1.0 + index as f32, 10.0];
                rank.all_reduce(&mut sum).unwrap();
                let all = rank.all_gather(&vec![index as f32; index]).unwrap();
                let mut root = vec![index as f32];
                rank.broadcast(&mut root, 1).unwrap();
                (sum, all, root)
            })
        });
        let threads: Vec<_> = threads.collect();
        for thread in threads {
            let (sum, all, root) = thread.join().unwrap();
            assert_eq!(sum, [6.0, 30.0]);
            assert_eq!(all, [vec![], vec![1.0], vec![2.0, 2.0]]);
            assert_eq!(root, [1.0]);
        }
    }

    #[test]
    fn a_rank_that_has_ended_is_an_error() {
        let mut ranks = LocalGroup::ranks(2);
        drop(ranks.pop());
        assert!(ranks[0].all_reduce(&mut [1.0]).is_err());
    }
}
