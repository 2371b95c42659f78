// How the results of the products for many rows leave: through shared memory, as rows of `out`. No kernel: see gemm.cuh.
#pragma once
#include "activation.cuh"
#include "gemm_stage.cuh"

// The results of a block in shared memory, [token][row of W], so that they leave in long runs. Rows of 4 floats more than they
// need: the 32 lanes that store go to 32 banks.
constexpr int RESULT_STRIDE = BLOCK_ROWS + 4;
constexpr int INNER_STRIDE = BLOCK_ROWS / 2 + 4;

template <typename S> __device__ __forceinline__ void put_results(const Sums<S>& acc, u32 warp_tokens, u32 part, float* results) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 row = warp % S::WARPS_ALONG_ROWS * S::ROW_TILES * 16 + lane / 4;
    const u32 first = warp / S::WARPS_ALONG_ROWS * warp_tokens;
#pragma unroll
    for (int i = 0; i < S::TOKEN_TILES; i++) {
        const u32 token = (first + 8 * i) % S::RESULT_TOKENS + lane % 4 * 2;
        if (8 * i >= warp_tokens || (first + 8 * i) / S::RESULT_TOKENS != part) continue;
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int r = 0; r < S::ROW_TILES; r++)
                results[(token + j % 2) * RESULT_STRIDE + row + 16 * r + 8 * (j / 2)] = acc[r][i][j];
    }
}

// silu(gate) * up, rounded as the CPU backend rounds: [token][64 rows of gate].
template <typename S>
__device__ __forceinline__ void put_inner(const GemmParams& p, const Sums<S>& acc, u32 warp_tokens, u32 part, const float* row_scales, float* results) {
    constexpr int HALF = S::ROW_TILES / 2;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 row = warp % S::WARPS_ALONG_ROWS * HALF * 16 + lane / 4;
    const u32 first = warp / S::WARPS_ALONG_ROWS * warp_tokens;
#pragma unroll
    for (int r = 0; r < HALF; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 at = row + 16 * r + 8 * half, feature = p.first_row + blockIdx.x * (BLOCK_ROWS / 2) + at;
            const bool is_scaled = row_scales && feature < p.num_rows;
            const float gate_scale = is_scaled ? row_scales[feature] : 1.0f;
            const float up_scale = is_scaled ? row_scales[p.n / 2 + feature] : 1.0f;
#pragma unroll
            for (int i = 0; i < S::TOKEN_TILES; i++) {
                const u32 token = (first + 8 * i) % S::RESULT_TOKENS + lane % 4 * 2;
                if (8 * i >= warp_tokens || (first + 8 * i) / S::RESULT_TOKENS != part) continue;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float gate = rounded<bf16>(acc[r][i][2 * half + j] * gate_scale);
                    const float up = rounded<bf16>(acc[r + HALF][i][2 * half + j] * up_scale);
                    const float value = rounded<bf16>(gate / (1.0f + expf(-gate))) * up;
                    results[(token + j) * INNER_STRIDE + at] = value;
                }
            }
        }
}

// 8 results of a token from shared memory to out, from `feature` (of W) on; `count` of them exist.
template <bool IS_F32>
__device__ __forceinline__ void store_run(float (&v)[8], void* out, u64 at, u32 count, bool is_aligned) {
    if (is_aligned && count >= 8) {
        if (IS_F32) {
            float4* target = reinterpret_cast<float4*>(static_cast<float*>(out) + at);
            target[0] = make_float4(v[0], v[1], v[2], v[3]);
            target[1] = make_float4(v[4], v[5], v[6], v[7]);
        } else {
            *reinterpret_cast<uint4*>(static_cast<u16*>(out) + at) = pack(v, bf16());
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        if (u32(j) >= count) break;
        if (IS_F32) {
            static_cast<float*>(out)[at + j] = v[j];
        } else {
            static_cast<u16*>(out)[at + j] = u16(pack_bf16(v[j], 0.0f));
        }
    }
}

// What is to be done with 8 results, of which the last is rounded by the store. `out`: where they go to.
__device__ __forceinline__ void finish_run(float (&v)[8], u32 after, const u16* out) {
    float before[8] = {};
    if (after == ADD) unpack(*reinterpret_cast<const uint4*>(out), before, bf16());
#pragma unroll
    for (int j = 0; j < 8; j++) {
        v[j] = rounded<bf16>(v[j]);
        if (after == GELU_TANH) {
            v[j] = gelu_tanh(v[j]);
        } else if (after == GELU_ERF) {
            v[j] = gelu_erf(v[j]);
        } else {
            v[j] += before[j];
        }
    }
}

// DOWN: a row's 128 results as f16 numbers of which the largest is at least 2^14, so that 11 bits are kept of all that matter: an
// eighth of the error of rounding to bf16.
template <typename S>
__device__ __forceinline__ void store_partial(const GemmParams& p, const float* results, const u32* rows, const float* row_scales, u32 block_row) {
    constexpr u32 RUNS = BLOCK_ROWS / 8;
    const u32 end = p.first_row + p.num_rows, num_factors = (p.out_columns + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (u32 i = threadIdx.x; i < S::RESULT_TOKENS * RUNS; i += S::THREADS) {
        const u32 token = i / RUNS, at = i % RUNS * 8, row = rows[token], feature = block_row + at;
        // Numbers of rows are multiples of 16.
        const bool exists = feature < end;
        float v[8], largest = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            v[j] = exists ? results[token * RESULT_STRIDE + at + j] * (row_scales ? row_scales[feature + j] : 1.0f) : 0.0f;
            largest = fmaxf(largest, fabsf(v[j]));
        }
#pragma unroll
        for (int step = RUNS / 2; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        const u32 exponent = max(__float_as_uint(largest) >> 23, 32u);
        const float scale = __uint_as_float((268u - exponent) << 23);
        if (row == NO_ROW || !exists) continue;
        const uint4 packed = make_uint4(pack_f16(v[0] * scale, v[1] * scale), pack_f16(v[2] * scale, v[3] * scale),
                                        pack_f16(v[4] * scale, v[5] * scale), pack_f16(v[6] * scale, v[7] * scale));
        *reinterpret_cast<uint4*>(static_cast<u16*>(p.out) + u64(row) * p.out_columns + feature - p.first_row) = packed;
        if (at == 0) p.factors[u64(row) * num_factors + (feature - p.first_row) / BLOCK_ROWS] = __uint_as_float((exponent - 14u) << 23);
    }
}

template <typename S>
__device__ __forceinline__ void store(const GemmParams& p, const float* results, const u32* rows, const float* row_scales, u32 block_row) {
    const bool is_inner = S::FOR_EXPERTS && (!S::FOR_LAYERS || p.what == GATE_UP);
    const bool is_f32 = p.what != STORE_BF16 && !is_inner;
    const u32 stride = is_inner ? INNER_STRIDE : RESULT_STRIDE, runs = is_inner ? BLOCK_ROWS / 16 : BLOCK_ROWS / 8;
    const float* bias = p.what == STORE_BF16 || p.what == STORE_F32 ? p.bias : nullptr;
    const bool is_aligned = (p.out_columns | p.first_column) % (is_f32 ? 4 : 8) == 0;
    const u64 split = p.what == STORE_SPLITS ? u64(blockIdx.y) * p.rows : 0;
    for (u32 i = threadIdx.x; i < S::RESULT_TOKENS * runs; i += S::THREADS) {
        const u32 token = i / runs, at = i % runs * 8, row = rows[token];
        const u32 feature = block_row + at, end = p.first_row + p.num_rows;
        if (row == NO_ROW || feature >= end) continue;
        const u32 count = end - feature;
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            const float4 four = *reinterpret_cast<const float4*>(results + token * stride + at + j);
            v[j] = four.x, v[j + 1] = four.y, v[j + 2] = four.z, v[j + 3] = four.w;
        }
        if (row_scales && !is_inner && p.what != STORE_SPLITS) {
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] *= u32(j) < count ? row_scales[feature + j] : 0.0f;
        }
        if (bias) {
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] += u32(j) < count ? bias[feature + j] : 0.0f;
        }
        const u64 to = (split + row) * p.out_columns + p.first_column + (feature - p.first_row);
        if constexpr (S::Scheme::HAS_AFTER) {
            if (S::FOR_LAYERS && p.after != NOTHING) finish_run(v, p.after, static_cast<const u16*>(p.out) + to);
        }
        if (is_f32) {
            store_run<true>(v, p.out, to, count, is_aligned);
        } else {
            store_run<false>(v, p.out, to, count, is_aligned);
        }
    }
}
