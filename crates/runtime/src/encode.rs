//! The encoder's part of a step: which pictures a rank encodes, in which passes, and how all ranks get them.
//!
//! The encoder's weights are on every rank, and each picture is encoded by one. A picture takes as long as it has patches, so
//! those are what is divided evenly.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use spark_api::MediaHash;
use spark_backend::{Backend, Result};
use spark_models::Encoded;
use spark_scheduler::StepPlan;

use crate::ModelRunner;

/// A medium that a plan wants encoded.
struct Wanted {
    hash: MediaHash,
    grid: [usize; 3],
    pixels: Arc<[u8]>,
    num_tokens: usize,
    /// The rank that encodes it.
    rank: usize,
}

impl Wanted {
    fn num_patches(&self) -> usize {
        self.grid.iter().product()
    }

    /// Whether both can go through the encoder together.
    fn is_like(&self, other: &Self) -> bool {
        self.grid[0] == 1 && self.grid == other.grid && self.pixels.len() == other.pixels.len()
    }
}

impl<B: Backend> ModelRunner<B> {
    /// Drops and fills encoder-cache entries as the plan says.
    pub(crate) fn encode(&mut self, plan: &StepPlan) -> Result<()> {
        for hash in &plan.evict_media {
            self.encoder_cache.remove(hash);
        }
        let rank = self.backend.rank();
        let wanted = self.wanted(plan, rank.world());
        let mut mine =
            self.encode_mine(wanted.iter().filter(|medium| medium.rank == rank.index()).collect())?;
        // In the order of the plan, which is the same everywhere.
        for medium in &wanted {
            let encoded = mine.remove(&medium.hash);
            let encoded = if rank.world() == 1 { encoded } else { Some(self.exchange(medium, encoded)?) };
            self.encoder_cache.extend(encoded.map(|encoded| (medium.hash, encoded)));
        }
        Ok(())
    }

    /// What `plan` wants encoded, divided among `world` ranks.
    fn wanted(&self, plan: &StepPlan, world: usize) -> Vec<Wanted> {
        let medium = |encode: &spark_scheduler::EncodeMedia| {
            let planned = plan.seqs.iter().find(|p| p.seq == encode.seq);
            let slot = planned.expect("media are encoded in a step that uses them").slot;
            let item = &self.occupant(slot).media[encode.media_idx];
            Wanted {
                hash: encode.hash,
                grid: [item.grid.t, item.grid.h, item.grid.w],
                pixels: item.patches.clone(),
                num_tokens: encode.num_tokens,
                rank: 0,
            }
        };
        let mut wanted: Vec<Wanted> = plan.encode.iter().map(medium).collect();
        let sizes: Vec<usize> = wanted.iter().map(Wanted::num_patches).collect();
        for (medium, rank) in wanted.iter_mut().zip(divide(&sizes, world)) {
            medium.rank = rank;
        }
        wanted
    }

    /// Encodes; pictures of equal size, of whatever sequences, share a pass. All of them fit it: the plan has reserved their
    /// rows of the encoder cache, which is what the encoder's memory is sized by.
    fn encode_mine(&self, media: Vec<&Wanted>) -> Result<HashMap<MediaHash, Encoded<B>>> {
        let mut passes: Vec<Vec<&Wanted>> = Vec::new();
        for medium in media {
            match passes.iter_mut().find(|pass| pass[0].is_like(medium)) {
                Some(pass) => pass.push(medium),
                None => passes.push(vec![medium]),
            }
        }
        let mut all = HashMap::new();
        for pass in passes {
            let pixels: Cow<'_, [u8]> = match &pass[..] {
                [one] => Cow::Borrowed(&one.pixels),
                several => several.iter().map(|medium| &*medium.pixels).collect::<Vec<_>>().concat().into(),
            };
            let (grid, count) = (pass[0].grid, pass.len());
            let encoded = self.model.encode_all(&self.backend, &pixels, grid, count, &mut |_, _| {})?;
            all.extend(pass.iter().map(|medium| medium.hash).zip(encoded));
        }
        Ok(all)
    }

    /// Brings a medium from the rank that has encoded it to all others.
    fn exchange(&self, medium: &Wanted, encoded: Option<Encoded<B>>) -> Result<Encoded<B>> {
        let (backend, config) = (&self.backend, self.model.config());
        let shape = [medium.num_tokens, config.text.hidden_size];
        let exchange = |tensor: Option<B::Tensor>| {
            let is_mine = tensor.is_some();
            let tensor = backend.broadcast(tensor, shape, medium.rank)?;
            // What the encoder gave is kept already.
            if is_mine { Ok(tensor) } else { backend.keep(&tensor) }
        };
        let (embeddings, mut deepstack) = match encoded {
            Some(Encoded { embeddings, deepstack }) => (Some(embeddings), deepstack.into_iter()),
            None => (None, Vec::new().into_iter()),
        };
        Ok(Encoded {
            embeddings: exchange(embeddings)?,
            deepstack: (0..config.num_deepstack())
                .map(|_| exchange(deepstack.next()))
                .collect::<Result<_>>()?,
        })
    }
}

/// Which of `world` ranks takes each of `sizes`: the largest first, each to the rank that has least so far. Within a third of
/// the best division (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969).
fn divide(sizes: &[usize], world: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    // Stable: equal sizes stay in the order of the plan.
    order.sort_by_key(|&i| std::cmp::Reverse(sizes[i]));
    let (mut ranks, mut loads) = (vec![0; sizes.len()], vec![0; world]);
    for i in order {
        let rank = (0..world).min_by_key(|&rank| loads[rank]).unwrap_or(0);
        ranks[i] = rank;
        loads[rank] += sizes[i];
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_divided_by_their_size() {
        assert_eq!(divide(&[], 2), [0; 0]);
        assert_eq!(divide(&[5, 5, 5], 1), [0, 0, 0]);
        assert_eq!(divide(&[4, 4, 4, 4], 2), [0, 1, 0, 1]);
        assert_eq!(divide(&[1, 9, 1, 1, 6], 2), [1, 0, 1, 1, 1], "one large against all others");
        assert_eq!(divide(&[3], 4), [0]);
    }

    #[test]
    fn no_rank_has_much_more_than_its_share() {
        let sizes: Vec<usize> = (1..=32).map(|i| 64 * (i * i % 41 + 1)).collect();
        for world in [2, 4] {
            let ranks = divide(&sizes, world);
            let load = |rank| -> usize {
                sizes.iter().zip(&ranks).filter(|(_, r)| **r == rank).map(|(s, _)| s).sum()
            };
            let most = (0..world).map(load).max().unwrap();
            let share = sizes.iter().sum::<usize>().div_ceil(world);
            assert!(most <= share + share / 20, "{most} of {share}");
        }
    }
}
