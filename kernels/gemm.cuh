// out = x W^T for many rows of x, on tensor cores: linear layers, and the two products of a layer of experts over sorted lists of
// rows. No kernel: the gemm_*.cu make them, one file per scheme of weights. A scheme says how a lane gets its operand from a
// staged tile of weights, see the structs there.
//
// W is the A operand, in the packed layouts of decode_linear.cuh (4 bits) and of crates/cuda/src/kernels/pack.rs. A block computes
// 128 rows of W for TOKENS rows of x, 64 k at a time: both come through a ring of stages in shared memory by asynchronous copies. A
// lane's 16 bytes x[token g][8t .. 8t + 7] are its B operand of 32 k, so one conflict-free load brings it.
//
// Group scales: a scale is 2^e * f with 1 <= f < 2. 2^e goes into the operand, exactly; f is what the sums are in units of: where
// the group changes they are multiplied with the quotient of the two f, and at the end with the last f. So there is one set of sums.
#pragma once
#include "gemm_fp8x.cuh"
#include "gemm_pipeline.cuh"
#include "gemm_place.cuh"
#include "gemm_store.cuh"

// Sums of row tile `r` in units of `factor` of the group that follows.
template <typename S, int TILES>
__device__ __forceinline__ void change_group(Sums<S>& acc, typename S::Scheme::Group& group, int r, const char* words) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float quotient = group.change(half, shared_load(words + 64 * S::WORDS * r + 32 * half));
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            acc[r][i][2 * half] *= quotient;
            acc[r][i][2 * half + 1] *= quotient;
        }
    }
}

// The operands of some token tiles for 32 k.
template <int TOKENS> __device__ __forceinline__ void load_tokens(u32 (&b)[TOKENS][4], const char* x) {
#pragma unroll
    for (int i = 0; i < TOKENS; i++) load_pairs(b[i], x + 8 * i * (STEP * 2));
}

// acc += W x over the 64 k of a stage, for the first TILES token tiles of each warp. IS_NEW: groups of 128 begin with it. A row tile
// is dequantised while the one before it is multiplied.
template <typename S, int TILES, bool IS_NEW, typename Copies>
__device__ __forceinline__ void multiply(Sums<S>& acc, typename S::Scheme::Group (&groups)[S::ROW_TILES], const char* stage,
                                         const Copies& copies) {
    using Scheme = typename S::Scheme;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 row_warp = warp % S::WARPS_ALONG_ROWS, token_warp = warp / S::WARPS_ALONG_ROWS;
    const char* tiles = stage + S::X_BYTES + row_warp * S::ROW_TILES * S::TILE_BYTES;
    const char* words = stage + S::SCALES_AT + row_warp * S::ROW_TILES * (64 * S::WORDS) + 4 * g;
    const u32 lane_x = Scheme::lane_x(lane), lane_codes = Scheme::lane_codes(lane);
    const char* x = stage + token_warp * TILES * 8 * (STEP * 2);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Operands of row tiles at a time, and of token tiles: what is multiplied more often stays.
        constexpr int ROWS = S::ROW_TILES == 2 ? 2 : 1, TOKENS = S::ROW_TILES == 2 && TILES > 4 ? 4 : TILES;
        u32 b[TOKENS][4];
        if (TOKENS == TILES) load_tokens<TOKENS>(b, x + (lane_x ^ (half << 6)));
#pragma unroll
        for (int first = 0; first < S::ROW_TILES; first += ROWS) {
            u32 a[ROWS][8];
#pragma unroll
            for (int r = first; r < first + ROWS; r++) {
                if (Scheme::GROUPED && (Scheme::WORD_K == 32 || (half == 0 && (Scheme::WORD_K == 64 || IS_NEW))))
                    change_group<S, TILES>(acc, groups[r], r, words + (Scheme::WORD_K == 32 ? 64 * half : 0));
                typename Scheme::Raw raw;
                raw.load(tiles + r * S::TILE_BYTES, lane_codes, words + 64 * S::WORDS * r, half);
                raw.operand(a[r - first], groups[r], half, t);
            }
#pragma unroll
            for (int token = 0; token < TILES; token += TOKENS) {
                if (TOKENS < TILES) load_tokens<TOKENS>(b, x + 8 * token * (STEP * 2) + (lane_x ^ (half << 6)));
#pragma unroll
                for (int part = 0; part < 2; part++)
#pragma unroll
                    for (int i = 0; i < TOKENS; i++)
#pragma unroll
                        for (int r = 0; r < ROWS; r++)
                            mma_bf16(acc[first + r][token + i], a[r][4 * part], a[r][4 * part + 1], a[r][4 * part + 2],
                                     a[r][4 * part + 3], b[i][2 * part], b[i][2 * part + 1]);
                if (half == 0) copies(ROWS == 1 ? first : token / TOKENS, ROWS == 1 ? S::ROW_TILES : TILES / TOKENS);
            }
        }
    }
}

// acc += W x over all steps, of which the first stages are on their way.
template <typename S, int TILES>
__device__ __forceinline__ void multiply_converted(Sums<S>& acc, typename S::Scheme::Group (&groups)[S::ROW_TILES],
                                                   const GemmParams& p, const WeightSources<S>& sources,
                                                   const RowStarts<S>& x_rows, const char* shared, const Steps& steps) {
    const u32 shared_at = shared_address(shared);
    u32 stage = 0, free_stage = (S::STAGES - 1) * S::STAGE_BYTES;
    // Groups of 128 begin with every second step; numbers of steps are even.
    constexpr int AT_ONCE = S::Scheme::GROUPED && S::Scheme::WORD_K == 128 ? 2 : 1;
    // Behind which products weights are copied: where registers are enough.
    constexpr int LATER = __CUDA_ARCH__ >= 900 ? 2 : 3;
#pragma unroll 1
    for (u32 step = 0; step < steps.count; step += AT_ONCE) {
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            wait_copies<S::STAGES - 2>();
            __syncthreads();
            // What is copied for later, between the products.
            const u32 next = step + i + S::STAGES - 1, target = shared_at + free_stage;
            const bool past_end = next >= steps.count;
            const auto copies = [&](int done, int all) {
                if (done == 0) x_rows.stage(p, target, steps.first + next, past_end);
                if (done == min(LATER, all - 1)) {
                    sources.stage(p, target, steps.first + next, past_end);
                    commit_copies();
                }
            };
            if (i == 0) {
                multiply<S, TILES, true>(acc, groups, shared + stage, copies);
            } else {
                multiply<S, TILES, false>(acc, groups, shared + stage, copies);
            }
            free_stage = stage;
            stage = stage + S::STAGE_BYTES == S::STAGES * S::STAGE_BYTES ? 0 : stage + S::STAGE_BYTES;
        }
    }
}

template <typename S, int TILES>
__device__ __forceinline__ void multiply_all(Sums<S>& acc, typename S::Scheme::Group (&groups)[S::ROW_TILES], const GemmParams& p,
                                             const WeightSources<S>& sources, const RowStarts<S>& x_rows, const char* shared,
                                             const Steps& steps) {
    if constexpr (S::Scheme::FP8_X) {
        multiply_fp8x<S, TILES>(acc, p, sources, x_rows, shared, steps);
    } else if constexpr (S::Scheme::PIPELINED) {
        multiply_pipelined<S, TILES>(acc, p, sources, x_rows, shared_address(shared), steps);
    } else {
        multiply_converted<S, TILES>(acc, groups, p, sources, x_rows, shared, steps);
    }
}

template <typename S> __device__ __forceinline__ void gemm(const GemmParams& p) {
    using Scheme = typename S::Scheme;
    extern __shared__ __align__(128) char shared[];
    __shared__ __align__(16) RowStarts<S> x_rows;
    __shared__ u32 out_rows[S::TOKENS];
    __shared__ float x_scales[Scheme::FP8_X ? S::TOKENS : 1];
    const u32 shared_at = shared_address(shared);
    const bool is_experts = S::FOR_EXPERTS && (!S::FOR_LAYERS || p.tiles != nullptr);
    const bool is_gate_up = S::FOR_EXPERTS && p.what == GATE_UP;

    Place place = {blockIdx.x, 0};
    Tile tile = {0, 0, 0, 0};
    if (is_experts) {
        wait_for_predecessor();
        tile = p.tiles[blockIdx.y];
        if (tile.count == 0) return;
    } else {
        place = dense_place(p, S::TOKENS);
    }
    const u32 before = tile.expert * (p.padded_n / 16);
    const u32 num_tokens = is_experts ? tile.count : min(p.rows - place.token_block * S::TOKENS, u32(S::TOKENS));
    Weights weights = {before + p.first_row / 16 + place.row_block * BLOCK_TILES, before + p.padded_n / 16 - 1, 0};
    if (is_gate_up)
        weights = {before + place.row_block * (BLOCK_TILES / 2), before + p.num_rows / 16 - 1, p.num_rows / 16};
    const WeightSources<S> sources(p, weights);

    u32 first_step = 0, num_steps = p.k / STEP;
    if (S::FOR_LAYERS && p.what == STORE_SPLITS) {
        first_step = blockIdx.y * p.steps_per_split;
        num_steps = min(num_steps - first_step, p.steps_per_split);
    }
    // Weights are there before the predecessor has ended, x is not.
#pragma unroll
    for (int s = 0; s < S::STAGES - 1; s++)
        if (u32(s) < num_steps) sources.stage(p, shared_at + s * S::STAGE_BYTES, first_step + s);
    for (u32 i = threadIdx.x; i < S::TOKENS; i += S::THREADS) {
        u32 x_row = place.token_block * S::TOKENS + i, out_row = x_row;
        const bool exists = i < num_tokens;
        if (is_experts) {
            const u32 pair = exists ? p.pairs[tile.first + i] : 0, position = tile.first + i;
            x_row = is_gate_up ? pair / p.top_k : position;
            out_row = is_gate_up ? position : pair;
        }
        x_rows.set(i, exists ? x_row * (p.x_columns / 8) : 0);
        out_rows[i] = exists ? out_row : NO_ROW;
        if constexpr (Scheme::FP8_X) {
            if (!is_experts && i == threadIdx.x) wait_for_predecessor();
            x_scales[i] = exists ? p.x_scales[x_row] : 0.0f;
        }
    }
    if (!is_experts && !(Scheme::FP8_X && threadIdx.x < S::TOKENS)) wait_for_predecessor();
    allow_successor();
    __syncthreads();
#pragma unroll
    for (int s = 0; s < S::STAGES - 1; s++) {
        if (u32(s) < num_steps) x_rows.stage(p, shared_at + s * S::STAGE_BYTES, first_step + s);
        commit_copies();
    }

    Sums<S> acc = {};
    typename Scheme::Group groups[S::ROW_TILES];
    // Few rows are multiplied by warps of fewer: what an expert has beyond whole tiles is mostly little.
    const u32 warp_tokens = used_warp_tokens<S>(num_tokens);
    const Steps steps = {first_step, num_steps};
    if (warp_tokens == S::TOKEN_TILES * 8) {
        multiply_all<S, S::TOKEN_TILES>(acc, groups, p, sources, x_rows, shared, steps);
    } else if (warp_tokens == S::HALF_TILES * 8) {
        multiply_all<S, S::HALF_TILES>(acc, groups, p, sources, x_rows, shared, steps);
    } else {
        multiply_all<S, S::QUARTER_TILES>(acc, groups, p, sources, x_rows, shared, steps);
    }

    if constexpr (Scheme::FP8_X) {
        scale_rows<S>(acc, warp_tokens, x_scales);
    } else if constexpr (Scheme::GROUPED) {
#pragma unroll
        for (int r = 0; r < S::ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < S::TOKEN_TILES; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[r][i][j] *= groups[r].factor(j / 2);
    }
    // The stages are free: every copy has come, and every warp is past its last product.
    wait_copies<0>();
    __syncthreads();
    float* results = reinterpret_cast<float*>(shared);
    const float* row_scales = !Scheme::FP8_X && p.row_scales ? p.row_scales + u64(tile.expert) * p.n : nullptr;
    const u32 block_rows = is_gate_up ? BLOCK_ROWS / 2 : BLOCK_ROWS;
#pragma unroll 1
    for (u32 part = 0; part * S::RESULT_TOKENS < num_tokens; part++) {
        if constexpr (S::FOR_EXPERTS) {
            if (is_gate_up) {
                put_inner<S>(p, acc, warp_tokens, part, row_scales, results);
            } else {
                put_results<S>(acc, warp_tokens, part, results);
            }
        } else {
            put_results<S>(acc, warp_tokens, part, results);
        }
        __syncthreads();
        const u32* rows = out_rows + part * S::RESULT_TOKENS;
        const u32 block_row = p.first_row + place.row_block * block_rows;
        if constexpr (S::FOR_EXPERTS) {
            if (p.what == DOWN) {
                store_partial<S>(p, results, rows, row_scales, block_row);
            } else {
                store<S>(p, results, rows, row_scales, block_row);
            }
        } else {
            store<S>(p, results, rows, row_scales, block_row);
        }
        __syncthreads();
    }
}

// WARPS along the rows of W. At least BLOCKS blocks on a multiprocessor.
#define GEMM(NAME, SCHEME, TOKENS, WARPS, BLOCKS)                                                                      \
    extern "C" __global__ void __launch_bounds__(Shape<SCHEME, TOKENS, WARPS>::THREADS, BLOCKS)                        \
        NAME(const GemmParams p) {                                                                                     \
        gemm<Shape<SCHEME, TOKENS, WARPS>>(p);                                                                         \
    }
