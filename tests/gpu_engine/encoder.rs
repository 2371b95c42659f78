//! Two GPUs that encode pictures of mixed sizes together, against one of them alone: the tower of Qwen3-VL-30B-A3B with random
//! weights. Needs two GPUs and NCCL. How long it takes is measured by `bench vision`.

use serde_json::Value;
use spark_backend::{Backend, Rank};
use spark_comm::nccl::Group;
use spark_cuda::{CudaBackend, CudaOptions, KernelOptions};
use spark_engine::{EncoderSplit, EngineOptions, MemoryPlan, MemoryUse};
use spark_models::{ModelConfig, Qwen3Vl};
use spark_runtime::{EncodeBatch, Medium};
use spark_testing::{Random, rel_err, tolerance::BFLOAT16};

use crate::{KERNEL_DIR_VARIABLE, alone, team::in_ranks};

/// Both are computed in bf16, and each is off by as much as that may cost: the CPU backend's differ by 1.0 to 1.6 %.
const TOLERANCE: f64 = std::f64::consts::SQRT_2 * BFLOAT16.hidden;
/// Rows and columns of patches: some sizes several times, not side by side.
const SIZES: [[usize; 2]; 12] = [
    [30, 30],
    [36, 20],
    [46, 82],
    [30, 30],
    [44, 34],
    [40, 26],
    [64, 42],
    [30, 30],
    [16, 16],
    [70, 70],
    [36, 20],
    [2, 2],
];

#[test]
fn pictures_that_two_gpus_divide_are_those_of_one() {
    compare("encoder::pictures_that_two_gpus_divide_are_those_of_one", EncoderSplit::Data);
}

#[test]
fn pictures_of_two_gpus_that_split_the_weights_are_those_of_one() {
    compare("encoder::pictures_of_two_gpus_that_split_the_weights_are_those_of_one", EncoderSplit::Weights);
}

/// As whichever process this is of the test `name`. All ranks must end with the same bits.
fn compare(name: &str, split: EncoderSplit) {
    let _gpus = alone();
    in_ranks(name, 2, |group| {
        let want = encoded(split, None, group.rank());
        let got = encoded(split, Some(group), group.rank());
        assert_eq!(got.len(), want.len());
        let errors: Vec<f64> = got.iter().zip(&want).map(|(got, want)| rel_err(got, want)).collect();
        println!("{split:?}: relative errors of {} tensors: {errors:.4?}", errors.len());
        let worst = errors.into_iter().fold(0.0, f64::max);
        assert!(worst < TOLERANCE, "{split:?}: {worst}");
        let mut hasher = blake3::Hasher::new();
        for value in got.iter().flatten() {
            hasher.update(&value.to_le_bytes());
        }
        hasher.finalize().to_hex().to_string()
    });
}

/// The published encoder before a decoder that is as small as may be.
fn config() -> Value {
    let text = spark_models::published("qwen3-vl-30b-a3b").expect("it is published");
    let mut config: Value = serde_json::from_str(text).unwrap();
    config["text_config"]["num_hidden_layers"] = 3.into();
    config["text_config"]["num_experts"] = 8.into();
    config
}

/// Embeddings and levels of all pictures, on the GPU of `rank`, alone or with `group`.
fn encoded(split: EncoderSplit, group: Option<&Group>, rank: Rank) -> Vec<Vec<f32>> {
    let kernel_dir = std::env::var_os(KERNEL_DIR_VARIABLE).map(Into::into);
    let mut backend = CudaBackend::new(&CudaOptions {
        ordinal: rank.index(),
        kernels: KernelOptions { kernel_dir, ..KernelOptions::default() },
        group: group.cloned(),
        ..CudaOptions::default()
    })
    .unwrap();
    let json = config();
    let mut config = ModelConfig::parse(&json, None).unwrap();
    let vision = config.vision.as_mut().unwrap();
    vision.split = split;
    let (side, merge) = (vision.patch_size, vision.spatial_merge_size.pow(2));
    let num_patches: usize = SIZES.iter().map(|[rows, columns]| rows * columns).sum();
    let options = EngineOptions {
        max_model_len: Some(64),
        max_num_seqs: 1,
        max_num_batched_tokens: Some(64),
        kv_cache_memory_bytes: Some(64 << 20),
        encoder_cache_tokens: num_patches / merge,
        ..EngineOptions::default()
    };
    let before = backend.memory().unwrap();
    let (specs, rank) = (config.specs(true), backend.rank());
    let mut params = spark_weights::dummy_for_device(&json, &specs, 5, rank).unwrap();
    let model = Qwen3Vl::load(config, true, options.image_mean_std, &mut params, &backend).unwrap();
    params.finish().unwrap();
    let memory = MemoryUse { before, now: backend.memory().unwrap() };
    let bytes = |spec: &_| backend.activation_bytes(spec);
    let plan = MemoryPlan::new(model.config(), &options, backend.dtype(), memory, rank, bytes).unwrap();
    backend.allocate_state(plan.state(&options, model.config().text.vocab_size)).unwrap();
    let mut random = Random::new(31);
    let media = SIZES.map(|[rows, columns]| Medium {
        grid: [1, rows, columns],
        pixels: random.bytes(rows * columns * 3 * side * side).into(),
    });
    let batch = EncodeBatch::new(media.into(), model.config(), rank.world());
    // Twice: the second finds memory and communicators in use.
    drop(batch.encode(&model, &backend).unwrap());
    let encoded = batch.encode(&model, &backend).unwrap();
    let tensors = encoded.iter().flat_map(|one| std::iter::once(&one.embeddings).chain(&one.deepstack));
    tensors.map(|tensor| backend.to_host(tensor).unwrap().0).collect()
}
