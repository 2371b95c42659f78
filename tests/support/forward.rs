//! One prefill through model and backend without an engine, keeping named intermediate results.

use std::collections::BTreeMap;

use spark_backend::{
    ActivationSpec, Backend, Dtype, KvDtype, KvSpec, SlotParams, StateSpec, StepInputs, VisualRows,
};
use spark_cpu::CpuBackend;
use spark_engine::ModelFiles;
use spark_models::{Encoded, Qwen3Vl, RopeIndex};
use spark_testing::{Case, media_bytes, model_dir};
use spark_vision::{Alpha, DecodeOptions, ImageProcessor, ImageProcessorOverrides};
use spark_weights::LoadOptions;

const BLOCK: usize = 32;

/// Values and shape of a tapped tensor.
pub(crate) type Tapped = (Vec<f32>, [usize; 2]);

/// A fixture on a CPU backend.
pub(crate) struct Forward {
    backend: CpuBackend,
    model: Qwen3Vl<CpuBackend>,
    processor: Option<ImageProcessor>,
    merge_size: usize,
}

impl Forward {
    pub(crate) fn load(name: &str, dtype: Dtype) -> Self {
        let files = ModelFiles::open(&model_dir(name).display().to_string(), None).unwrap();
        let mut backend = CpuBackend::new(dtype, Some(2)).unwrap();
        let mut params = files.checkpoint.load(&files.specs, &LoadOptions::default()).unwrap();
        let config = files.config.clone();
        let processor = config.vision.as_ref().map(|_| {
            let decode = DecodeOptions::new(Alpha::OverWhite);
            let none = ImageProcessorOverrides::default();
            ImageProcessor::from_folder(files.checkpoint.dir(), &none, decode, [0; 32]).unwrap()
        });
        let model =
            Qwen3Vl::load(files.config, files.has_lm_head, ([0.5; 3], [0.5; 3]), &mut params, &backend)
                .unwrap();
        params.finish().unwrap();
        let kv = KvSpec {
            num_layers: config.text.num_hidden_layers,
            num_kv_heads: config.text.num_key_value_heads,
            head_dim: config.text.head_dim,
            block_size: BLOCK,
            num_blocks: 32,
            dtype: if dtype == Dtype::F32 { KvDtype::F32 } else { KvDtype::Bf16 },
        };
        let vocab_size = config.text.vocab_size;
        let state = StateSpec {
            kv,
            num_slots: 1,
            max_num_tokens: 1024,
            vocab_size,
            max_blocks_per_seq: kv.num_blocks,
            encoder_cache_bytes: 0,
            activations: ActivationSpec::default(),
        };
        backend.allocate_state(state).unwrap();
        let merge_size = config.vision.as_ref().map_or(1, |v| v.spatial_merge_size);
        Self { backend, model, processor, merge_size }
    }

    /// Experts per token; 1 for a dense model.
    pub(crate) fn top_k(&self) -> usize {
        self.model.config().text.moe.as_ref().map_or(1, |moe| moe.num_experts_per_tok)
    }

    /// Prefills the prompt of `case` in one step. Logits are of every row.
    pub(crate) fn run(&mut self, case: &Case) -> BTreeMap<String, Tapped> {
        let mut taps = BTreeMap::new();
        let mut encoded = Vec::new();
        for name in &case.media {
            let image = self.processor.as_ref().unwrap().process(&media_bytes(name).unwrap()).unwrap();
            let backend = &self.backend;
            let mut tap = |key: &str, x: &_| drop(taps.insert(key.to_owned(), backend.to_host(x).unwrap()));
            encoded.push((
                image.grid_thw,
                self.model.encode(backend, &image.patches, image.grid_thw, &mut tap).unwrap(),
            ));
        }
        let runs = placeholder_runs(&case.prompt_ids, self.model.config().image_token_id);
        assert_eq!(runs.len(), encoded.len());
        let inputs = self.inputs(case, &runs, &encoded);
        self.backend.admit(0, SlotParams::greedy()).unwrap();
        let visual: Vec<_> = runs
            .iter()
            .zip(&encoded)
            .map(|(&(token_row, rows), (_, e))| VisualRows {
                embeddings: &e.embeddings,
                deepstack: &e.deepstack,
                token_row,
                source_row: 0,
                rows,
            })
            .collect();
        let model = &self.model;
        self.backend
            .step(&inputs, &mut |b| {
                model.forward(b, &visual, &mut |key, x| {
                    drop(taps.insert(key.to_owned(), b.to_host(x).unwrap()))
                })
            })
            .unwrap();
        self.backend.output().unwrap();
        taps
    }

    fn inputs(
        &self,
        case: &Case,
        runs: &[(usize, usize)],
        encoded: &[([usize; 3], Encoded<CpuBackend>)],
    ) -> StepInputs {
        let n = case.prompt_ids.len();
        let media: Vec<_> = runs.iter().zip(encoded).map(|(run, (grid, _))| (run.0, *grid)).collect();
        let rope = RopeIndex::new(n, &media, self.merge_size);
        let positions: Vec<_> = (0..n).map(|i| rope.position(i)).collect();
        for (axis, expected) in case.positions.iter().enumerate() {
            let got: Vec<i32> = positions.iter().map(|p| p[axis] as i32).collect();
            assert_eq!(&got, expected, "positions of axis {axis}");
        }
        assert_eq!(i64::from(rope.position(n)[0]), n as i64 + case.rope_delta, "position of the next token");
        StepInputs::whole_prompt(&case.prompt_ids, positions, BLOCK, (0..n as u32).collect())
    }
}

/// First row and length of each run of placeholders; runs are apart, because a token stands between any two images.
fn placeholder_runs(ids: &[u32], placeholder: Option<u32>) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (i, &id) in ids.iter().enumerate().filter(|(_, id)| Some(**id) == placeholder) {
        debug_assert_eq!(Some(id), placeholder);
        match runs.last_mut() {
            Some((start, len)) if *start + *len == i => *len += 1,
            _ => runs.push((i, 1)),
        }
    }
    runs
}
