//! The encoder's operations through the `Backend` trait, what is kept of media, and media in a step.

use spark_backend::{
    Activation, Backend, Dtype, KvDtype, LinearWeight, Matrix, MatrixData, Result, SlotParams, VectorWeight,
    VisionSpec,
};
use spark_cuda::{CudaBackend, CudaOptions, CudaTensor};
use spark_testing::{Random, rel_err, tolerance};

use super::backend::{Run, assert_rows_alike, cuda};
use super::tiny::{Chunk, HIDDEN, VOCAB, inputs};
use super::{cpu, kernel_options};

const WIDTH: usize = 144;
const INNER: usize = 208;
const PATCH: usize = 4;
const GRID: [usize; 3] = [2, 6, 8];
const NUM_PATCHES: usize = GRID[0] * GRID[1] * GRID[2];

fn spec() -> VisionSpec {
    VisionSpec {
        num_heads: 2,
        hidden_size: WIDTH,
        patch_size: PATCH,
        temporal_patch_size: 2,
        merge_size: 2,
        image_mean: [0.5, 0.4, 0.3],
        image_std: [0.5, 0.6, 0.7],
    }
}

/// One block and one merger.
struct Encoder<B: Backend> {
    embed: B::Linear,
    positions: B::Tensor,
    norms: [[B::Tensor; 2]; 3],
    qkv: B::Linear,
    proj: B::Linear,
    fc: [B::Linear; 2],
    merge: [B::Linear; 2],
}

impl<B: Backend> Encoder<B> {
    fn load(b: &B) -> Result<Self> {
        let mut random = Random::new(50);
        let mut linear = |n: usize, k: usize| {
            let values = random.bf16s(n * k, 1.0 / (k as f32).sqrt());
            let values: Vec<u8> =
                values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
            let data = MatrixData::Dense { dtype: Dtype::Bf16, values: values.into() };
            let bias = Some(random.bf16s(n, 0.1));
            b.linear_weight(LinearWeight { parts: vec![Matrix { n, k, data }], bias })
        };
        let (embed, qkv, proj) = (linear(WIDTH, 96)?, linear(3 * WIDTH, WIDTH)?, linear(WIDTH, WIDTH)?);
        let fc = [linear(INNER, WIDTH)?, linear(WIDTH, INNER)?];
        let merge = [linear(4 * WIDTH, 4 * WIDTH)?, linear(HIDDEN, 4 * WIDTH)?];
        let mut random = Random::new(51);
        let mut vector = |shape: [usize; 2], mean: f32| {
            let values = random.normals(shape[0] * shape[1], 0.3).iter().map(|v| v + mean).collect();
            b.vector(VectorWeight { values, shape })
        };
        let mut norm = || Result::Ok([vector([1, WIDTH], 1.0)?, vector([1, WIDTH], 0.0)?]);
        let norms = [norm()?, norm()?, norm()?];
        Ok(Self { embed, positions: vector([25, WIDTH], 0.0)?, norms, qkv, proj, fc, merge })
    }

    /// `[NUM_PATCHES / 4, HIDDEN]`, kept.
    fn forward(
        &self,
        b: &B,
        pixels: &[u8],
        tap: &mut dyn FnMut(&'static str, &B::Tensor),
    ) -> Result<B::Tensor> {
        let spec = spec();
        let norm = |x: &B::Tensor, i: usize| b.layer_norm(x, &self.norms[i][0], &self.norms[i][1], 1e-6);
        let patches = b.patches(&[pixels], NUM_PATCHES, &spec)?;
        tap("patches", &patches);
        let mut x = b.linear(&patches, &self.embed)?;
        b.add_position(&mut x, &self.positions, GRID, &spec)?;
        tap("positions", &x);
        let attended = b.vision_attend(&b.linear(&norm(&x, 0)?, &self.qkv)?, GRID, &spec)?;
        tap("attended", &attended);
        b.add(&mut x, &b.linear(&attended, &self.proj)?)?;
        let mut h = b.linear(&norm(&x, 1)?, &self.fc[0])?;
        b.activate(&mut h, Activation::GeluTanh)?;
        b.add(&mut x, &b.linear(&h, &self.fc[1])?)?;
        tap("block", &x);
        let normed = norm(&x, 2)?;
        let mut h = b.linear(&b.reshape(&normed, 4 * WIDTH)?, &self.merge[0])?;
        b.activate(&mut h, Activation::GeluErf)?;
        b.keep(&b.linear(&h, &self.merge[1])?)
    }
}

/// A backend with the text model and the encoder.
fn run<B: Backend>(backend: B) -> (Run<B>, Encoder<B>) {
    let encoder = Encoder::load(&backend).unwrap();
    (Run::new(backend, 4, KvDtype::Bf16), encoder)
}

fn encoded<B: Backend>(
    run: &Run<B>,
    encoder: &Encoder<B>,
    pixels: &[u8],
) -> (Vec<(&'static str, Vec<f32>)>, B::Tensor) {
    let (b, mut taps) = (&run.backend, Vec::new());
    let kept = encoder.forward(b, pixels, &mut |name, x| taps.push((name, b.to_host(x).unwrap().0))).unwrap();
    taps.push(("merged", b.to_host(&kept).unwrap().0));
    (taps, kept)
}

#[test]
fn an_encoded_medium_and_its_step_are_the_cpu_backends() {
    let options = CudaOptions { kernels: kernel_options(), ..CudaOptions::default() };
    let (mut gpu, gpu_encoder) = run(CudaBackend::new(&options).unwrap());
    let (mut cpu, cpu_encoder) = run(cpu(Dtype::Bf16));
    let pixels = Random::new(52).bytes(NUM_PATCHES * 3 * 2 * PATCH * PATCH);
    let (got, got_kept) = encoded(&gpu, &gpu_encoder, &pixels);
    let (want, want_kept) = encoded(&cpu, &cpu_encoder, &pixels);
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        let error = rel_err(got, want);
        let first: Vec<_> = got.iter().zip(want).take(6).collect();
        assert!(
            error < tolerance::BFLOAT16.hidden,
            "{name}: relative error {error}, first (got, want) {first:?}"
        );
    }
    // Eight of its rows enter a prompt; then one, in a step that looks like a decode step.
    let tokens: Vec<u32> = (0..12).collect();
    let mut steps =
        vec![(inputs(&[Chunk::known(0, 0, &tokens)]), 2, 8), (inputs(&[Chunk::known(0, 12, &[7])]), 0, 1)];
    for (step, row, rows) in &mut steps {
        step.has_media = true;
        let got = gpu.logits(step, Some((*row, &got_kept, *rows)));
        let want = cpu.logits(step, Some((*row, &want_kept, *rows)));
        // One row: an expert that is chosen otherwise would show as an error of its own size.
        assert_rows_alike(&got, &want, "a step with media");
    }
    assert_eq!(gpu.backend.num_replays(), 0);
    let plain = gpu.step(&inputs(&[Chunk::known(1, 0, &[(VOCAB - 1) as u32])]));
    assert_eq!((plain.sampled.len(), gpu.backend.num_replays()), (1, 1));
}

/// The store holds 100 rows; what is kept must survive that everything is moved, over short and long distances.
#[test]
fn kept_tensors_survive_a_move() {
    let run = cuda(2, &CudaOptions { kernels: kernel_options(), ..CudaOptions::default() });
    let b = &run.backend;
    let pixels = Random::new(53).bytes(96 * 100);
    // Pixels of patches, 96 numbers each, as rows: three rows are eight patches.
    let rows = |rows: usize, seed: usize| {
        let num_patches = rows / 3 * 8;
        let bytes: Vec<u8> = pixels.iter().cycle().skip(7 * seed).take(96 * num_patches).copied().collect();
        b.reshape(&b.patches(&[&bytes], num_patches, &spec()).unwrap(), HIDDEN).unwrap()
    };
    let host = |x: &CudaTensor| b.to_host(x).unwrap().0;
    let mut kept: Vec<(CudaTensor, Vec<f32>)> = Vec::new();
    for (seed, count) in [30, 3, 30, 6, 30].into_iter().enumerate() {
        let x = rows(count, seed);
        let values = host(&x);
        kept.push((b.keep(&x).unwrap(), values));
    }
    let x = rows(3, 9);
    let error = b.keep(&x).unwrap_err().to_string();
    assert!(error.contains("encoder cache"), "{error}");
    // 3 and 6 rows are free, and one more at the end: 9 fit only together.
    kept.remove(3);
    kept.remove(1);
    let x = rows(9, 11);
    let values = host(&x);
    kept.push((b.keep(&x).unwrap(), values));
    for (i, (kept, values)) in kept.iter().enumerate() {
        assert_eq!(&host(kept), values, "tensor {i}");
    }
}

#[test]
fn a_text_model_has_no_place_for_pixels() {
    let options = CudaOptions { kernels: kernel_options(), ..CudaOptions::default() };
    let mut backend = CudaBackend::new(&options).unwrap();
    let mut state = super::tiny::state(1, KvDtype::Bf16);
    state.activations.num_patches = 0;
    state.encoder_cache_bytes = 0;
    backend.allocate_state(state).unwrap();
    backend.admit(0, SlotParams::greedy()).unwrap();
    assert!(backend.patches(&[&[0; 96]], 1, &spec()).is_err());
}
