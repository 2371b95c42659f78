//! Tensor parallelism without a network: ranks are threads over the CPU backend in float32, and what they compute together is
//! what one rank computes alone. Every fixture, the demo model, and random models of sizes that the fixtures do not have.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use spark_backend::{
    ActivationSpec, Backend, Dtype, KvDtype, KvSpec, Rank, SlotParams, StateSpec, StepInputs, VisualRows,
};
use spark_cpu::{CpuBackend, CpuTensor};
use spark_models::{Encoded, EncoderSplit, ModelConfig, MoeParallel, Qwen3Vl, RopeIndex};
use spark_testing::{
    LocalGroup, Oracle, Random, model_dir, model_names, rel_err, repository, tolerance::FLOAT32,
};
use spark_weights::{Checkpoint, LoadOptions, OpenOptions};

const BLOCK: usize = 32;
const NUM_BLOCKS: usize = 16;

/// A model to be loaded by several ranks.
struct Source {
    checkpoint: Checkpoint,
    config: ModelConfig,
    has_lm_head: bool,
    /// Random weights instead of the checkpoint's.
    is_dummy: bool,
}

impl Source {
    fn open(folder: &Path) -> Self {
        let checkpoint = Checkpoint::open(&folder.display().to_string(), &OpenOptions::default()).unwrap();
        let config = ModelConfig::parse(checkpoint.config(), checkpoint.generation_config()).unwrap();
        let has_lm_head = checkpoint.has_module("lm_head");
        Source { checkpoint, config, has_lm_head, is_dummy: false }
    }

    fn dummy(config: Value) -> Self {
        let checkpoint = Checkpoint::of_config(config, "nowhere".into());
        let config = ModelConfig::parse(checkpoint.config(), None).unwrap();
        Source { checkpoint, has_lm_head: !config.tie_word_embeddings, config, is_dummy: true }
    }

    /// The same with whole experts on every rank; `None` for a model without experts.
    fn with_whole_experts(mut self) -> Option<Self> {
        self.config.text.moe.is_some().then(|| self.config.share_experts(MoeParallel::Ep).unwrap())?;
        Some(self)
    }

    /// The same model, of whose encoder ranks split the weights.
    fn with_split_encoder(mut self) -> Self {
        self.config.vision.as_mut().unwrap().split = EncoderSplit::Weights;
        self
    }

    /// This model on a rank; alone without a group.
    fn load(&self, group: Option<LocalGroup>) -> Loaded {
        let backend = CpuBackend::new(Dtype::F32, Some(1)).unwrap();
        let mut backend = match group {
            Some(group) => backend.with_group(Box::new(group)),
            None => backend,
        };
        let rank = backend.rank();
        let specs = self.config.specs(self.has_lm_head);
        let mut params = if self.is_dummy {
            spark_weights::dummy(self.checkpoint.config(), &specs, 5, rank).unwrap()
        } else {
            self.checkpoint.load(&specs, &LoadOptions { rank, ..LoadOptions::default() }).unwrap()
        };
        let (config, mean_std) = (self.config.clone(), ([0.5; 3], [0.5; 3]));
        let model = Qwen3Vl::load(config, self.has_lm_head, mean_std, &mut params, &backend).unwrap();
        params.finish().unwrap();
        backend.allocate_state(state(&self.config, rank)).unwrap();
        Loaded { backend, model }
    }

    /// What `run` gives on each of `world` ranks; one of them alone if it is 1.
    fn on_ranks<T: Send>(&self, world: usize, run: impl Fn(Loaded) -> T + Sync) -> Vec<T> {
        if world == 1 {
            return vec![run(self.load(None))];
        }
        std::thread::scope(|scope| {
            let run = &run;
            let rank = |group| scope.spawn(move || run(self.load(Some(group))));
            let threads: Vec<_> = LocalGroup::ranks(world).into_iter().map(rank).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }
}

fn state(config: &ModelConfig, rank: Rank) -> StateSpec {
    StateSpec {
        kv: KvSpec {
            num_layers: config.text.num_hidden_layers,
            num_kv_heads: rank.kv_heads(config.text.num_key_value_heads).len(),
            head_dim: config.text.head_dim,
            block_size: BLOCK,
            num_blocks: NUM_BLOCKS,
            dtype: KvDtype::F32,
        },
        num_slots: 1,
        max_num_tokens: 512,
        vocab_size: config.text.vocab_size,
        max_blocks_per_seq: NUM_BLOCKS,
        encoder_cache_bytes: 0,
        activations: ActivationSpec::default(),
    }
}

/// A model on one rank.
struct Loaded {
    backend: CpuBackend,
    model: Qwen3Vl<CpuBackend>,
}

/// A picture of noise in a prompt.
#[derive(Clone)]
struct Picture {
    /// First placeholder.
    token_row: usize,
    grid: [usize; 3],
    pixels: Arc<[u8]>,
}

/// Pictures that are encoded, where a prompt has them.
fn visual_rows<'a>(
    pictures: &[Picture],
    encoded: &'a [Encoded<CpuBackend>],
) -> Vec<VisualRows<'a, CpuTensor>> {
    let rows = |(p, e): (&Picture, &'a Encoded<CpuBackend>)| VisualRows {
        embeddings: &e.embeddings,
        deepstack: &e.deepstack,
        token_row: p.token_row,
        source_row: 0,
        rows: e.embeddings.shape()[0],
    };
    pictures.iter().zip(encoded).map(rows).collect()
}

impl Loaded {
    /// Positions of a prompt and of what follows it.
    fn rope(&self, prompt_len: usize, pictures: &[Picture]) -> RopeIndex {
        let merge = self.model.config().vision.as_ref().map_or(1, |v| v.spatial_merge_size);
        let media: Vec<_> = pictures.iter().map(|p| (p.token_row, p.grid)).collect();
        RopeIndex::new(prompt_len, &media, merge)
    }

    fn encode(&self, pictures: &[Picture]) -> Vec<Encoded<CpuBackend>> {
        let Self { backend, model } = self;
        let encode = |p: &Picture| model.encode(backend, &p.pixels, p.grid, &mut |_, _| ()).unwrap();
        pictures.iter().map(encode).collect()
    }

    /// Logits of every row of a prompt, `[rows, vocab]`.
    fn logits(mut self, ids: &[u32], pictures: &[Picture]) -> Vec<f32> {
        let (rope, encoded) = (self.rope(ids.len(), pictures), self.encode(pictures));
        let Self { backend, model } = &mut self;
        let positions = (0..ids.len()).map(|i| rope.position(i)).collect();
        let inputs = StepInputs::whole_prompt(ids, positions, BLOCK, (0..ids.len() as u32).collect());
        let visual = visual_rows(pictures, &encoded);
        let mut logits = Vec::new();
        backend.admit(0, SlotParams::greedy()).unwrap();
        backend
            .step(&inputs, &mut |b| {
                model.forward(b, &visual, &mut |name, x| {
                    if name == "logits" {
                        logits = x.values().to_vec();
                    }
                })
            })
            .unwrap();
        backend.output().unwrap();
        logits
    }

    /// Answers with `count` tokens, sampled greedily on the rank, one a step.
    fn greedy(mut self, prompt: &[u32], pictures: &[Picture], count: usize) -> Vec<u32> {
        let (rope, encoded) = (self.rope(prompt.len(), pictures), self.encode(pictures));
        self.backend.admit(0, SlotParams::greedy()).unwrap();
        let (mut ids, mut done) = (prompt.to_vec(), 0);
        while ids.len() < prompt.len() + count {
            let rows = ids.len() - done;
            let positions = (done..ids.len()).map(|i| rope.position(i)).collect();
            let mut inputs = StepInputs::whole_prompt(&ids[done..], positions, BLOCK, vec![rows as u32 - 1]);
            inputs.slot_mapping = (done as u64..ids.len() as u64).collect();
            inputs.seqs[0].context_len = ids.len();
            inputs.seqs[0].block_table = (0..ids.len().div_ceil(BLOCK) as u32).collect();
            inputs.sample_slots = vec![Some(0)];
            let visual = if done == 0 { visual_rows(pictures, &encoded) } else { Vec::new() };
            done = ids.len();
            let model = &self.model;
            self.backend.step(&inputs, &mut |b| model.forward(b, &visual, &mut |_, _| ())).unwrap();
            ids.push(self.backend.output().unwrap().sampled[0].token);
        }
        ids.split_off(prompt.len())
    }
}

/// Compares the logits of a prompt on `world` ranks with those on one: close to it, the same on all ranks, and the most likely
/// token the same wherever it is so by more than the tolerance.
fn check_logits(source: &Source, world: usize, ids: &[u32], pictures: &[Picture], name: &str) {
    let run = |loaded: Loaded| loaded.logits(ids, pictures);
    let alone = source.on_ranks(1, run).remove(0);
    let ranks = source.on_ranks(world, run);
    for rank in &ranks {
        assert!(*rank == ranks[0], "{name}: ranks of {world} have different logits");
    }
    let error = rel_err(&ranks[0], &alone);
    assert!(error < FLOAT32.logits, "{name} on {world} ranks: logits are off by {error}");
    let vocab = source.config.text.vocab_size;
    let mut num_clear = 0;
    for (row, (got, want)) in ranks[0].chunks(vocab).zip(alone.chunks(vocab)).enumerate() {
        let (best, margin) = best(want);
        if margin > FLOAT32.logprob {
            assert_eq!(self::best(got).0, best, "{name} on {world} ranks, row {row}");
            num_clear += 1;
        }
    }
    assert!(num_clear * 10 > ids.len() * 9, "{name}: only {num_clear} of {} rows are clear", ids.len());
}

/// The largest logit's index, and how far the next one is.
fn best(logits: &[f32]) -> (usize, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    (order[0], logits[order[0]] - logits[order[1]])
}

/// Pictures of noise where a case of the oracle has its media.
fn pictures(config: &ModelConfig, ids: &[u32], grids: &[[u32; 3]]) -> Vec<Picture> {
    let Some(vision) = &config.vision else { return Vec::new() };
    let mut random = Random::new(11);
    let mut from = 0;
    grids
        .iter()
        .map(|grid| {
            let grid = grid.map(|side| side as usize);
            let token_row =
                from + ids[from..].iter().position(|id| Some(*id) == config.image_token_id).unwrap();
            let num_patches: usize = grid.iter().product();
            from = token_row + num_patches / (vision.spatial_merge_size * vision.spatial_merge_size);
            let len = num_patches * 3 * vision.patch_size * vision.patch_size;
            let pixels = random.bytes(len).into();
            Picture { token_row, grid, pixels }
        })
        .collect()
}

/// All cases of the fixtures on `world` ranks, which share experts so: logits, then the oracle's greedy answers. Those without
/// experts only where there is nothing to say about these.
fn check_fixtures(world: usize, parallel: MoeParallel) {
    let (mut num_checked, mut outside) = (0, Vec::new());
    for name in model_names("").unwrap() {
        let source = Source::open(&model_dir(&name));
        let source = match parallel {
            MoeParallel::Tp => Some(source),
            MoeParallel::Ep => source.with_whole_experts(),
        };
        let Some(source) = source else { continue };
        if source.config.check_ranks(world).is_err() {
            outside.push(name);
            continue;
        }
        num_checked += 1;
        let oracle = Oracle::load(&name).unwrap();
        let images = |case: &&spark_testing::Case| {
            let placeholder = source.config.image_token_id;
            !case.media.is_empty() && case.prompt_ids.iter().any(|id| Some(*id) == placeholder)
        };
        let with_image = oracle.cases.values().find(images);
        assert_eq!(with_image.is_some(), source.config.vision.is_some(), "{name}");
        if let Some(case) = with_image {
            let pictures = pictures(&source.config, &case.prompt_ids, &case.grid_thw);
            check_logits(&source, world, &case.prompt_ids, &pictures, &name);
        }
        let case = &oracle.cases["text"];
        let answers =
            source.on_ranks(world, |loaded| loaded.greedy(&case.prompt_ids, &[], case.greedy_ids.len()));
        for answer in answers {
            assert_eq!(answer, case.greedy_ids, "{name} on {world} ranks, {parallel:?}");
        }
    }
    assert!(num_checked > 10, "only {num_checked} fixtures");
    let six_experts = parallel == MoeParallel::Ep && world == 4;
    assert_eq!(outside, if six_experts { vec!["moe_vl_bf16"] } else { vec![] });
}

#[test]
fn fixtures_on_two_ranks() {
    check_fixtures(2, MoeParallel::Tp);
}

/// Each of their two KV heads is held by two ranks.
#[test]
fn fixtures_on_four_ranks() {
    check_fixtures(4, MoeParallel::Tp);
}

#[test]
fn fixtures_with_whole_experts_on_two_ranks() {
    check_fixtures(2, MoeParallel::Ep);
}

/// A token has fewer experts than there are ranks, so some ranks have nothing to do in a step.
#[test]
fn fixtures_with_whole_experts_on_four_ranks() {
    check_fixtures(4, MoeParallel::Ep);
}

#[test]
fn the_demo_model_on_two_and_four_ranks() {
    for format in ["bf16", "awq"] {
        let source = Source::open(&repository().join("models/spark-tiny-vl").join(format));
        let mut random = Random::new(3);
        let mut ids = random.token_ids(60, 1_200);
        ids[10..26].fill(source.config.image_token_id.unwrap());
        let pictures = pictures(&source.config, &ids, &[[1, 8, 8]]);
        for world in [2, 4] {
            check_logits(&source, world, &ids, &pictures, format);
        }
        let Some(source) = source.with_whole_experts() else { continue };
        for world in [2, 4] {
            check_logits(&source, world, &ids, &pictures, &format!("{format}, whole experts"));
        }
    }
}

/// Logits with pictures, and what is answered to them, where ranks split the encoder's weights. One head cannot be split.
#[test]
fn encoders_that_are_split_give_what_whole_ones_give() {
    let mut num_split = 0;
    let fixtures = model_names("").unwrap().into_iter().map(|name| (model_dir(&name), 2));
    let demo = repository().join("models/spark-tiny-vl/bf16");
    for (folder, world) in fixtures.chain([(demo.clone(), 2), (demo, 4)]) {
        let whole = Source::open(&folder);
        let Some(num_heads) = whole.config.vision.as_ref().map(|vision| vision.num_heads) else { continue };
        let split = Source::open(&folder).with_split_encoder();
        if !num_heads.is_multiple_of(world) {
            let error = split.config.check_ranks(world).unwrap_err().to_string();
            assert!(error.contains("vision_config.num_heads: 1 cannot be shared by 2 ranks"), "{error}");
            continue;
        }
        num_split += 1;
        let name = folder.display().to_string();
        let vocab = whole.config.text.vocab_size;
        let mut ids = Random::new(3).token_ids(60, vocab.min(1_200));
        let placeholder = whole.config.image_token_id.unwrap();
        ids.iter_mut().filter(|id| **id == placeholder).for_each(|id| *id = 0);
        ids[10..26].fill(placeholder);
        ids[30..36].fill(placeholder);
        let pictures = pictures(&whole.config, &ids, &[[1, 8, 8], [1, 4, 6]]);
        check_logits(&split, world, &ids, &pictures, &name);
        let greedy = |source: &Source, world| source.on_ranks(world, |l| l.greedy(&ids, &pictures, 12));
        let want = greedy(&whole, 1).remove(0);
        assert_eq!(greedy(&split, 1), [&want[..]], "{name}: one rank splits nothing");
        for got in greedy(&split, world) {
            assert_eq!(got, want, "{name} on {world} ranks");
        }
    }
    assert!(num_split > 8, "only {num_split}");
}

/// Sizes that a real model has relative to its groups: eight ranks, experts of 768 and 384 features.
fn config(num_kv_heads: usize, intermediate: usize, quantization: &Value) -> Value {
    json!({
        "model_type": "qwen3_moe", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": num_kv_heads, "head_dim": 32, "rms_norm_eps": 1e-6,
        "vocab_size": 303, "max_position_embeddings": 512, "rope_theta": 10000.0, "eos_token_id": 1,
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": intermediate,
        "norm_topk_prob": true, "mlp_only_layers": [1], "tie_word_embeddings": num_kv_heads == 2,
        "quantization_config": quantization,
    })
}

/// The random model of a rank is a shard of the random model of one, in every scheme; groups and blocks of 128 are cut at
/// 384 / 2 and 768 / 8; four KV heads on two ranks each, two on four each, and eight on one.
#[test]
fn random_models_on_eight_ranks() {
    let schemes = [
        json!(null),
        json!({"quant_method": "awq", "group_size": 128}),
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
        json!({"quant_method": "fp8", "weight_block_size": [128, 128]}),
    ];
    let ids: Vec<u32> = (0..40u32).map(|i| i * 97 % 303).collect();
    for quantization in schemes {
        for (world, num_kv_heads, intermediate) in [(2, 4, 384), (8, 4, 768), (8, 2, 768), (4, 8, 384)] {
            let source = Source::dummy(config(num_kv_heads, intermediate, &quantization));
            let name = format!("{quantization}, {num_kv_heads} KV heads");
            check_logits(&source, world, &ids, &[], &name);
        }
    }
}

/// Experts of 144 features, whose groups cannot be cut and of which eight ranks could not have equal parts; an expert a rank too.
#[test]
fn random_models_with_whole_experts() {
    let schemes = [
        json!(null),
        json!({"quant_method": "awq", "group_size": 16}),
        json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
        json!({"quant_method": "fp8", "weight_block_size": [128, 128]}),
    ];
    let ids: Vec<u32> = (0..40u32).map(|i| i * 97 % 303).collect();
    for quantization in schemes {
        let mut config = config(4, 144, &quantization);
        config["num_experts"] = json!(8);
        let source = || Source::dummy(config.clone());
        for world in [2, 8] {
            let whole = source().with_whole_experts().unwrap();
            check_logits(&whole, world, &ids, &[], &format!("{quantization}, whole experts"));
        }
    }
}

#[test]
fn a_model_that_cannot_be_split_says_so() {
    let source = Source::dummy(config(4, 768, &json!(null)));
    let backend = |world: usize| {
        let group = LocalGroup::ranks(world).remove(0);
        CpuBackend::new(Dtype::F32, Some(1)).unwrap().with_group(Box::new(group))
    };
    let specs = source.config.specs(true);
    let mut params = spark_weights::dummy(source.checkpoint.config(), &specs, 5, Rank::SINGLE).unwrap();
    let loaded = Qwen3Vl::load(source.config, true, ([0.5; 3], [0.5; 3]), &mut params, &backend(3));
    let message = loaded.err().unwrap().to_string();
    assert!(
        message.contains("num_attention_heads: 8") && message.contains("over 1, 2, 4, 8 ranks"),
        "{message}"
    );
}
