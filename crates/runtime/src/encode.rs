//! Media through the encoder: which rank encodes which, in which passes, and how all ranks get them. When is not known here.
//!
//! Where every rank has the encoder's weights, each medium is encoded by one. A medium takes as long as it has patches, so those are
//! what is divided evenly. Where ranks have parts of the weights, all of them encode all media.

use std::sync::Arc;

use spark_backend::{Backend, Rank, Result};
use spark_models::{Encoded, ModelConfig, Qwen3Vl};
use spark_scheduler::StepPlan;

use crate::ModelRunner;

/// A medium to be encoded.
#[derive(Debug, Clone)]
pub struct Medium {
    /// Frames, rows and columns of patches.
    pub grid: [usize; 3],
    /// `[patches, 3, frames, patch, patch]`.
    pub pixels: Arc<[u8]>,
}

impl Medium {
    fn num_patches(&self) -> usize {
        self.grid.iter().product()
    }

    /// Whether both can go through the encoder together.
    fn is_like(&self, other: &Self) -> bool {
        self.grid[0] == 1 && self.grid == other.grid && self.pixels.len() == other.pixels.len()
    }
}

/// Media that the ranks of a group encode together, each rank with the same list.
#[derive(Debug)]
pub struct EncodeBatch {
    media: Vec<Medium>,
    /// For each the rank that encodes it; `None` where every rank takes part in all of them.
    ranks: Option<Vec<usize>>,
}

impl EncodeBatch {
    /// Divides `media` among `world` ranks as `model` says.
    pub fn new(media: Vec<Medium>, model: &ModelConfig, world: usize) -> Self {
        let is_split = model.vision.as_ref().is_some_and(|vision| vision.parts(world) > 1);
        let divided = (world > 1 && !is_split).then(|| {
            let sizes: Vec<usize> = media.iter().map(Medium::num_patches).collect();
            divide(&sizes, world)
        });
        Self { media, ranks: divided }
    }

    /// Patches of all of them.
    pub fn num_patches(&self) -> usize {
        self.media.iter().map(Medium::num_patches).sum()
    }

    /// Patches of the rank that has most.
    pub fn most_patches(&self) -> usize {
        let Some(ranks) = &self.ranks else { return self.num_patches() };
        let mut loads = vec![0; ranks.iter().max().map_or(0, |rank| rank + 1)];
        for (medium, &rank) in self.media.iter().zip(ranks) {
            loads[rank] += medium.num_patches();
        }
        loads.into_iter().max().unwrap_or(0)
    }

    /// Encodes this rank's share and brings what each rank has to all others: all media, in order, to be kept. The backend's
    /// encoder cache must hold them.
    ///
    /// # Errors
    /// A model without an encoder, pixels that do not fit their grid; device or peer failure.
    pub fn encode<B: Backend>(&self, model: &Qwen3Vl<B>, backend: &B) -> Result<Vec<Encoded<B>>> {
        let mut all = self.encode_share(model, backend)?;
        if let Some(ranks) = &self.ranks {
            // In the order of the list, which is the same everywhere.
            for ((medium, &rank), encoded) in self.media.iter().zip(ranks).zip(&mut all) {
                *encoded = Some(exchange(model, backend, medium, rank, encoded.take())?);
            }
        }
        Ok(all.into_iter().map(|encoded| encoded.expect("each medium is of a rank")).collect())
    }

    /// Whether `rank` encodes medium `index`.
    fn is_of(&self, index: usize, rank: Rank) -> bool {
        self.ranks.as_ref().is_none_or(|ranks| ranks[index] == rank.index())
    }

    /// What this rank encodes, at its place; pictures of equal size share a pass.
    fn encode_share<B: Backend>(&self, model: &Qwen3Vl<B>, backend: &B) -> Result<Vec<Option<Encoded<B>>>> {
        let mut passes: Vec<Vec<usize>> = Vec::new();
        for (index, medium) in self.media.iter().enumerate() {
            if !self.is_of(index, backend.rank()) {
                continue;
            }
            match passes.iter_mut().find(|pass| self.media[pass[0]].is_like(medium)) {
                Some(pass) => pass.push(index),
                None => passes.push(vec![index]),
            }
        }
        let mut all: Vec<Option<Encoded<B>>> = self.media.iter().map(|_| None).collect();
        for pass in passes {
            let pixels: Vec<&[u8]> = pass.iter().map(|&index| &*self.media[index].pixels).collect();
            let encoded = model.encode_all(backend, &pixels, self.media[pass[0]].grid, &mut |_, _| {})?;
            for (index, encoded) in pass.into_iter().zip(encoded) {
                all[index] = Some(encoded);
            }
        }
        Ok(all)
    }
}

/// Brings a medium from the rank that has encoded it to all others.
fn exchange<B: Backend>(
    model: &Qwen3Vl<B>,
    backend: &B,
    medium: &Medium,
    rank: usize,
    encoded: Option<Encoded<B>>,
) -> Result<Encoded<B>> {
    let config = model.config();
    let patches_per_token = config.vision.as_ref().map_or(1, |vision| vision.spatial_merge_size.pow(2));
    let shape = [medium.num_patches() / patches_per_token, config.text.hidden_size];
    let exchange = |tensor: Option<B::Tensor>| {
        let is_mine = tensor.is_some();
        let tensor = backend.broadcast(tensor, shape, rank)?;
        // What the encoder gave is kept already.
        if is_mine { Ok(tensor) } else { backend.keep(&tensor) }
    };
    let (embeddings, mut deepstack) = match encoded {
        Some(Encoded { embeddings, deepstack }) => (Some(embeddings), deepstack.into_iter()),
        None => (None, Vec::new().into_iter()),
    };
    Ok(Encoded {
        embeddings: exchange(embeddings)?,
        deepstack: (0..config.num_deepstack()).map(|_| exchange(deepstack.next())).collect::<Result<_>>()?,
    })
}

impl<B: Backend> ModelRunner<B> {
    /// Drops and fills encoder-cache entries as the plan says. All media fit a pass: the plan has reserved their rows of the
    /// encoder cache, which is what the encoder's memory is sized by.
    pub(crate) fn encode(&mut self, plan: &StepPlan) -> Result<()> {
        for hash in &plan.evict_media {
            self.encoder_cache.remove(hash);
        }
        if plan.encode.is_empty() {
            return Ok(());
        }
        let medium = |encode: &spark_scheduler::EncodeMedia| {
            let planned = plan.seqs.iter().find(|p| p.seq == encode.seq);
            let slot = planned.expect("media are encoded in a step that uses them").slot;
            let item = &self.occupant(slot).media[encode.media_idx];
            Medium { grid: [item.grid.t, item.grid.h, item.grid.w], pixels: item.patches.clone() }
        };
        let media = plan.encode.iter().map(medium).collect();
        let batch = EncodeBatch::new(media, self.model.config(), self.backend.rank().world());
        let encoded = batch.encode(&self.model, &self.backend)?;
        self.encoder_cache.extend(plan.encode.iter().map(|encode| encode.hash).zip(encoded));
        Ok(())
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
