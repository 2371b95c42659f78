//! How large the pool of activations must be, from the sizes of the model and of the largest step. Bounds, not layouts:
//! what is taken when is in `ops.rs` and in the wrappers.

use spark_backend::{ActivationSpec, Rank};

use crate::kernels::PARTIAL_BYTES as MOE_PARTIAL_BYTES;
use crate::{Kernels, Prefill, SampleOut, Sampler, StepLimits};

/// Added for what does not grow with the rows: sums of products and of contexts that are computed in parts, one or two for
/// each multiprocessor, and counters.
const SLACK: u64 = 48 << 20;
/// Results of experts at a time, as `moe_gemm` divides them, with their factors: four bytes for each 256.
const PARTIAL_BYTES: usize = MOE_PARTIAL_BYTES + MOE_PARTIAL_BYTES / 64;
/// Fewest columns of them.
const PARTIAL_COLUMNS: usize = 128;

/// Bytes of what else lives besides KV pool and encoder cache: sampling state, inputs and outputs of a step.
pub(super) fn state_bytes(spec: &ActivationSpec) -> u64 {
    let limits = StepLimits {
        max_num_tokens: spec.num_tokens,
        num_slots: spec.num_slots,
        max_logit_rows: spec.num_logit_rows.max(spec.num_slots),
        // The tables of ordinary contexts; longer ones are small beside the pool that they need.
        max_blocks_per_seq: 1024,
        vocab_size: spec.vocab_rows,
    };
    Sampler::num_bytes(spec.num_slots, spec.vocab_rows)
        + SampleOut::num_bytes(limits.max_logit_rows)
        + limits.num_bytes() as u64
}

/// Bytes that hold all activations of the largest step or the largest medium on `rank`.
pub(super) fn activation_bytes(spec: &ActivationSpec, rank: Rank, prefill: Prefill) -> u64 {
    let quantised = if prefill == Prefill::default() { 0 } else { quantised_bytes(spec) };
    let most = (step_bytes(spec, rank) + quantised).max(encoder_bytes(spec));
    // Pieces come and go in different sizes: an eighth for holes.
    most + most / 8 + SLACK
}

/// A decoder layer, or the head, in its widest moment.
fn step_bytes(spec: &ActivationSpec, rank: Rank) -> u64 {
    let rows = spec.num_tokens;
    let query = spec.num_heads * spec.head_dim;
    let qkv = query + 2 * spec.num_kv_heads * spec.head_dim;
    // Residual, what is added to it, normalised x; with ranks what is still being summed.
    let stream = (3 + usize::from(rank.world() > 1)) * rows * spec.hidden_size * 2;
    let attention = rows * (qkv + query) * 2;
    let pairs = rows * spec.top_k;
    let most = PARTIAL_BYTES.max(pairs * PARTIAL_COLUMNS * 4);
    // Logits of the router, the choice, its order, inner values in bf16, results.
    let experts = rows * spec.num_experts * 2
        + pairs * (32 + 2 * spec.moe_intermediate_size)
        + most.min(pairs * spec.hidden_size * 4);
    let dense = rows * 3 * spec.intermediate_size * 2;
    // Logits of ranks are gathered first, each rank's in as much space as the largest share, then put side by side.
    let gathered = match rank.world() {
        1 => 0,
        world => world * 4 * (spec.vocab_rows.div_ceil(world) + 4),
    };
    let head = spec.num_logit_rows * (spec.vocab_rows * 4 + gathered + spec.hidden_size * 2);
    (stream + attention.max(experts).max(dense).max(head)) as u64
}

/// Rows that a product has quantised: a byte for each number, and at most four for each 32 of a row.
fn quantised_bytes(spec: &ActivationSpec) -> u64 {
    let widest = spec.hidden_size.max(spec.num_heads * spec.head_dim).max(spec.intermediate_size);
    let padded = |columns: usize| columns.next_multiple_of(128);
    let numbers = (spec.num_tokens * padded(widest))
        .max(spec.num_tokens * spec.top_k * padded(spec.moe_intermediate_size));
    (numbers + numbers / 4) as u64
}

/// A block of the encoder, the embedding of patches, or a merger, in its widest moment.
fn encoder_bytes(spec: &ActivationSpec) -> u64 {
    let (patches, hidden) = (spec.num_patches, spec.vision_hidden_size);
    if patches == 0 {
        return 0;
    }
    let row = 2 * patches as u64;
    let heads = spec.vision_num_heads * spec.vision_head_dim;
    let rotated = Kernels::vision_attend_scratch_bytes(patches, spec.vision_num_heads, spec.vision_head_dim);
    // x, q, k and v, what attention gives where normalised x was, and what it needs or what follows.
    let attention = row * (2 * hidden + 3 * heads) as u64 + rotated.max(row * hidden as u64);
    let mlp = row * (2 * hidden + spec.vision_intermediate_size) as u64;
    // Pixels are a byte each.
    let embedding = row * (spec.patch_size + spec.patch_size / 2 + hidden) as u64;
    let tokens = patches / spec.patches_per_token.max(1);
    let merger = 3 * row * hidden as u64 + 2 * (tokens * spec.hidden_size) as u64;
    attention.max(mlp).max(embedding).max(merger)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::FreeRuns;

    /// Qwen3-VL-30B-A3B, 2048 tokens a step, an image of 16,384 tokens.
    const LARGE: ActivationSpec = ActivationSpec {
        num_slots: 64,
        num_tokens: 2048,
        num_logit_rows: 192,
        vocab_rows: 151_936,
        hidden_size: 2048,
        num_heads: 32,
        num_kv_heads: 4,
        head_dim: 128,
        intermediate_size: 6144,
        num_experts: 128,
        top_k: 8,
        moe_intermediate_size: 768,
        num_patches: 65_536,
        patch_size: 1536,
        vision_hidden_size: 1152,
        vision_num_heads: 16,
        vision_head_dim: 72,
        vision_intermediate_size: 4304,
        patches_per_token: 4,
    };

    #[test]
    fn the_pool_is_what_the_largest_needs() {
        const MIB: u64 = 1 << 20;
        let text = ActivationSpec { num_patches: 0, ..LARGE };
        let bytes = activation_bytes(&text, Rank::SINGLE, Prefill::default()) / MIB;
        assert!((200..300).contains(&bytes), "{bytes} MiB: experts");
        let bytes = activation_bytes(&LARGE, Rank::SINGLE, Prefill::default()) / MIB;
        assert!((1100..1400).contains(&bytes), "{bytes} MiB: the encoder");
        assert_eq!(activation_bytes(&ActivationSpec::default(), Rank::SINGLE, Prefill::default()), SLACK);
        let state = state_bytes(&LARGE) / MIB;
        assert!((60..90).contains(&state), "{state} MiB: 6 bytes a token and slot");
    }

    /// Codes, sums of groups of 32 and scales of the rows of each product.
    #[test]
    fn quantised_rows_fit_beside_the_rest() {
        let pairs = LARGE.num_tokens * LARGE.top_k;
        let query = LARGE.num_heads * LARGE.head_dim;
        for (rows, columns) in [
            (LARGE.num_tokens, LARGE.hidden_size),
            (LARGE.num_tokens, query),
            (LARGE.num_tokens, LARGE.intermediate_size),
            (pairs, LARGE.moe_intermediate_size),
        ] {
            let padded = columns.next_multiple_of(128);
            let taken = (rows * (padded + 4 * padded / 32 + 4)) as u64;
            assert!(taken <= quantised_bytes(&LARGE), "{rows} x {columns}: {taken}");
        }
        let fp8 = Prefill { fp8: true, ..Prefill::default() };
        let text = ActivationSpec { num_patches: 0, ..LARGE };
        let [with, without] = [fp8, Prefill::default()].map(|it| activation_bytes(&text, Rank::SINGLE, it));
        assert!(with >= without + quantised_bytes(&text));
    }

    /// A pool as large as it needs to be, and what is taken from it.
    struct Simulated(FreeRuns);

    impl Simulated {
        fn take(&mut self, num_bytes: usize) -> (u64, u64) {
            self.0.take("a tensor", num_bytes as u64).unwrap()
        }

        fn drop<const N: usize>(&mut self, pieces: [(u64, u64); N]) {
            pieces.into_iter().for_each(|(offset, num_bytes)| self.0.put_back(offset, num_bytes));
        }
    }

    /// Highest byte in use by the calls of two layers and the head, in the order of the model and of the wrappers.
    fn simulated_step(spec: &ActivationSpec, rows: usize, world: usize) -> u64 {
        let mut pool = Simulated(FreeRuns::new(0, 1 << 60));
        let row = 2 * rows;
        let (hidden, query) = (row * spec.hidden_size, row * spec.num_heads * spec.head_dim);
        let qkv = query + 2 * row * spec.num_kv_heads * spec.head_dim;
        let pairs = rows * spec.top_k;
        let residual = pool.take(hidden);
        let mut partial = None;
        for _ in 0..2 {
            let x = pool.take(hidden);
            if let Some(partial) = partial.take() {
                pool.drop([partial]);
            }
            let qkv = pool.take(qkv);
            let attended = pool.take(query);
            let scratch = pool.take(2 << 20);
            pool.drop([scratch]);
            let out = pool.take(hidden);
            pool.drop([attended, qkv, x]);
            let x = pool.take(hidden);
            pool.drop([out]);
            let choice = [pool.take(4 * pairs), pool.take(4 * pairs)];
            let logits = pool.take(row * spec.num_experts);
            pool.drop([logits]);
            let sum = pool.take(hidden);
            let inner = [
                pool.take(16 << 10),
                pool.take(8 * pairs),
                pool.take(2 * pairs * spec.moe_intermediate_size),
            ];
            let results = pool.take((2 * pairs * spec.hidden_size).min(128 << 20).max(256 * pairs));
            let factors = pool.take(pairs * spec.hidden_size / 32);
            pool.drop([results, factors]);
            pool.drop(inner);
            pool.drop(choice);
            pool.drop([x]);
            partial = Some(sum);
        }
        let x = pool.take(hidden);
        let last = spec.num_logit_rows.min(rows);
        let gathered = pool.take(2 * last * spec.hidden_size);
        let parts = (world > 1)
            .then(|| pool.take(4 * world * (last * spec.vocab_rows.div_ceil(world)).next_multiple_of(4)));
        let logits = pool.take(4 * last * spec.vocab_rows);
        pool.drop([gathered, logits, x, residual]);
        if let Some(parts) = parts {
            pool.drop([parts]);
        }
        pool.0.high_water
    }

    #[test]
    fn steps_of_every_size_fit() {
        for num_tokens in [256, 2048, 8192, 16_384] {
            let spec = ActivationSpec { num_tokens, num_patches: 0, ..LARGE };
            let bytes = activation_bytes(&spec, Rank::SINGLE, Prefill::default());
            for rows in
                [1, 7, 64, 200, 256, 2048, 3000, 8192, 16_384].into_iter().filter(|&rows| rows <= num_tokens)
            {
                let used = simulated_step(&spec, rows, 1);
                assert!(used <= bytes, "{rows} of {num_tokens} rows: {used} of {bytes} bytes");
            }
            let (used, bytes) = (simulated_step(&spec, num_tokens, 1) as f64, bytes as f64);
            assert!(used > 0.6 * (bytes - SLACK as f64), "{num_tokens} rows: {used} of {bytes} bytes");
        }
    }

    /// Many rows with logits, of which all shares are gathered and then put side by side.
    #[test]
    fn gathered_logits_fit() {
        for world in [2, 3, 8] {
            let rank = Rank::new(0, world).unwrap();
            for num_logit_rows in [64, 1000] {
                let spec = ActivationSpec { num_tokens: 1024, num_logit_rows, num_patches: 0, ..LARGE };
                let (used, bytes) =
                    (simulated_step(&spec, 1024, world), activation_bytes(&spec, rank, Prefill::default()));
                assert!(used <= bytes, "{world} ranks, {num_logit_rows} rows: {used} of {bytes} bytes");
                let alone = activation_bytes(&spec, Rank::SINGLE, Prefill::default());
                assert!(num_logit_rows == 64 || used > alone, "it needs more than one rank's {alone} bytes");
            }
        }
    }

    /// As [`simulated_step`], for two blocks and a merger between them.
    fn simulated_encoder(spec: &ActivationSpec, patches: usize) -> u64 {
        let mut pool = Simulated(FreeRuns::new(0, 1 << 60));
        let row = 2 * patches;
        let hidden = row * spec.vision_hidden_size;
        let heads = row * spec.vision_num_heads * spec.vision_head_dim;
        let [pixels, rows] = [pool.take(row / 2 * spec.patch_size), pool.take(row * spec.patch_size)];
        pool.drop([pixels]);
        let x = pool.take(hidden);
        pool.drop([rows]);
        for _ in 0..2 {
            let norm = pool.take(hidden);
            let qkv = pool.take(3 * heads);
            pool.drop([norm]);
            let attended = pool.take(heads);
            let scratch = Kernels::vision_attend_scratch_bytes(patches, spec.vision_num_heads, 72);
            let rotated = pool.take(scratch as usize);
            pool.drop([rotated]);
            let projected = pool.take(hidden);
            pool.drop([projected, attended, qkv]);
            let norm = pool.take(hidden);
            let inner = pool.take(row * spec.vision_intermediate_size);
            pool.drop([norm]);
            let out = pool.take(hidden);
            pool.drop([out, inner]);
            let [norm, inner] = [pool.take(hidden), pool.take(hidden)];
            let merged = pool.take(row / 4 * spec.hidden_size);
            pool.drop([inner, norm, merged]);
        }
        pool.drop([x]);
        pool.0.high_water
    }

    #[test]
    fn media_of_every_size_fit() {
        // Of two ranks that split the encoder's weights, or of one.
        let half = ActivationSpec { vision_num_heads: 8, vision_intermediate_size: 2152, ..LARGE };
        for (num_patches, of) in [(4096, LARGE), (65_536, LARGE), (4096, half), (65_536, half)] {
            let spec = ActivationSpec { num_tokens: 64, num_patches, ..of };
            let bytes = activation_bytes(&spec, Rank::SINGLE, Prefill::default());
            for patches in
                [4, 1024, 4096, 30_000, 65_536].into_iter().filter(|&patches| patches <= num_patches)
            {
                let used = simulated_encoder(&spec, patches);
                assert!(used <= bytes, "{patches} of {num_patches} patches: {used} of {bytes} bytes");
            }
        }
        let [whole, split] = [LARGE, half].map(|spec| {
            let bytes = activation_bytes(&spec, Rank::SINGLE, Prefill::default()) as f64;
            let used = simulated_encoder(&spec, 65_536) as f64;
            assert!(used > 0.7 * bytes, "{used} of {bytes} bytes");
            bytes
        });
        assert!(split < 0.75 * whole, "{split} of {whole}: x stays as wide");
    }
}
