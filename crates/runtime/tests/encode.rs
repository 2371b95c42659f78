//! Media of many sizes through the encoder on several ranks, which are threads over the CPU backend in float32: what every rank ends
//! with is what one rank encodes. Who asks for media, and when, is tested elsewhere.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]

use spark_backend::{Backend, Dtype};
use spark_cpu::CpuBackend;
use spark_models::{EncoderSplit, ModelConfig, Qwen3Vl};
use spark_runtime::{EncodeBatch, Medium};
use spark_testing::{LocalGroup, Random, read_json, rel_err, tolerance::FLOAT32};

/// Two heads, three levels; random weights.
const MODEL: &str = "models/moe_vl_bf16/config.json";
/// Rows and columns of patches; several of some sizes, not side by side.
const SIZES: [[usize; 2]; 12] =
    [[4, 4], [8, 6], [4, 4], [2, 10], [16, 12], [8, 6], [6, 8], [4, 4], [2, 2], [20, 4], [8, 6], [14, 14]];

/// Pictures of noise, and two frames of a video among them that are as large as a picture.
fn media(config: &ModelConfig) -> Vec<Medium> {
    let mut random = Random::new(21);
    let side = config.vision.as_ref().unwrap().patch_size;
    let mut medium = |[rows, columns]: [usize; 2], frames: usize| {
        let len = rows * columns * 3 * frames * side * side;
        Medium { grid: [1, rows, columns], pixels: random.bytes(len).into() }
    };
    let mut media: Vec<Medium> = SIZES.map(|size| medium(size, 1)).into();
    media.insert(5, medium(SIZES[1], 2));
    media
}

/// Values of every medium, embeddings before levels, on each of `world` ranks.
fn encoded(split: EncoderSplit, world: usize) -> Vec<Vec<Vec<f32>>> {
    let json: serde_json::Value = read_json(MODEL).unwrap();
    let mut config = ModelConfig::parse(&json, None).unwrap();
    config.vision.as_mut().unwrap().split = split;
    let (json, config) = (&json, &config);
    let run = |group: Option<LocalGroup>| {
        let backend = CpuBackend::new(Dtype::F32, Some(1)).unwrap();
        let backend = match group {
            Some(group) => backend.with_group(Box::new(group)),
            None => backend,
        };
        let (specs, rank) = (config.specs(true), backend.rank());
        let mut params = spark_weights::dummy(json, &specs, 5, rank).unwrap();
        let model = Qwen3Vl::load(config.clone(), true, ([0.5; 3], [0.5; 3]), &mut params, &backend).unwrap();
        let batch = EncodeBatch::new(media(config), config, rank.world());
        let encoded = batch.encode(&model, &backend).unwrap();
        let values = encoded.iter().map(|one| {
            let tensors = std::iter::once(&one.embeddings).chain(&one.deepstack);
            tensors.flat_map(|tensor| tensor.values().to_vec()).collect()
        });
        values.collect()
    };
    if world == 1 {
        return vec![run(None)];
    }
    std::thread::scope(|scope| {
        let start = |group| scope.spawn(move || run(Some(group)));
        let threads: Vec<_> = LocalGroup::ranks(world).into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn every_rank_has_what_one_rank_encodes_bit_by_bit() {
    let alone = encoded(EncoderSplit::Data, 1).remove(0);
    assert_eq!(alone.len(), SIZES.len() + 1);
    assert!(alone[0] != alone[2], "two pictures of a size, which share a pass");
    let config = ModelConfig::parse(&read_json(MODEL).unwrap(), None).unwrap();
    let tokens = |[rows, columns]: [usize; 2]| rows * columns / 4;
    let row = (1 + config.num_deepstack()) * config.text.hidden_size;
    assert_eq!(alone[1].len(), tokens(SIZES[1]) * row);
    for world in [2, 4] {
        for rank in encoded(EncoderSplit::Data, world) {
            assert!(rank == alone, "{world} ranks");
        }
    }
}

/// Sums are of other numbers then.
#[test]
fn ranks_that_split_the_weights_agree_with_one_that_has_them_all() {
    let alone = encoded(EncoderSplit::Data, 1).remove(0);
    assert!(encoded(EncoderSplit::Weights, 1) == [&alone[..]], "one rank splits nothing");
    let ranks = encoded(EncoderSplit::Weights, 2);
    assert!(ranks[0] == ranks[1]);
    for (got, want) in ranks[0].iter().zip(&alone) {
        let error = rel_err(got, want);
        assert!(error < FLOAT32.hidden, "{error}");
    }
}

#[test]
fn the_fullest_rank_is_known() {
    let mut config = ModelConfig::parse(&read_json(MODEL).unwrap(), None).unwrap();
    let all = media(&config);
    let num_patches: usize = all.iter().map(|medium| medium.grid.iter().product::<usize>()).sum();
    let batch = |config: &ModelConfig, world| EncodeBatch::new(all.clone(), config, world);
    assert_eq!(batch(&config, 1).num_patches(), num_patches);
    assert_eq!(batch(&config, 1).most_patches(), num_patches);
    let two = batch(&config, 2).most_patches();
    assert!(2 * two >= num_patches && 2 * two < num_patches + num_patches / 20, "{two} of {num_patches}");
    assert_eq!(batch(&config, 100).most_patches(), 14 * 14, "the largest is of one rank");
    config.vision.as_mut().unwrap().split = EncoderSplit::Weights;
    assert_eq!(batch(&config, 2).most_patches(), num_patches, "every rank has a part of each");
}
