// Products whose x is in shared memory, for all warps of a block: what linear_many.cuh and moe_many.cuh share. No kernel.
//
// A round is 128 k, or what is left of a lane of k: the spans that are added one after the other. x of a round lies in operand order:
// [step of 32 k][tile of 8 rows][lane of the warp], 16 bytes each, so that a warp reads it without conflicts.
#pragma once
#include "decode_linear.cuh"

constexpr int ROUND_K = 128;
constexpr int ROUND_STEPS = ROUND_K / 32;

// Row tiles of a warp.
constexpr int MANY_ROW_TILES = 2;

// acc += W x over the spans `first_span`, `first_span + stride`, ... of a round, whose weights are in the stages of `ring` from
// `slot` on. X_TILES are there, TOKEN_TILES are multiplied.
template <typename Scheme, int TOKEN_TILES, int X_TILES, typename Ring>
__device__ __forceinline__ void multiply_round(float (&acc)[MANY_ROW_TILES][TOKEN_TILES][4], const Ring& ring, u32 slot,
                                               const uint4 (&x)[ROUND_STEPS][X_TILES][32], u32 first_span, u32 stride,
                                               u32 num_spans) {
    constexpr int STEPS = Scheme::SPAN / 32, SPANS = ROUND_K / Scheme::SPAN;
    constexpr int GROUP_STEPS = Scheme::GROUP > 0 && Scheme::GROUP < Scheme::SPAN ? Scheme::GROUP / 32 : STEPS;
    const u32 lane = threadIdx.x % 32;
#pragma unroll 1
    for (u32 s = 0; s < SPANS; s++) {
        if (first_span + stride * s >= num_spans) break;
        const auto& stage = ring.stages[slot + s];
#pragma unroll 1
        for (int first_step = 0; first_step < STEPS; first_step += GROUP_STEPS) {
            float sums[MANY_ROW_TILES][TOKEN_TILES][4] = {};
            float(&target)[MANY_ROW_TILES][TOKEN_TILES][4] = Scheme::GROUP > 0 ? sums : acc;
            typename Scheme::Group groups[MANY_ROW_TILES];
#pragma unroll
            for (int r = 0; r < MANY_ROW_TILES; r++) groups[r].begin(stage, r, first_step, lane);
#pragma unroll 2
            for (int step = first_step; step < first_step + GROUP_STEPS; step++) {
                u32 a[MANY_ROW_TILES][4][2];
#pragma unroll
                for (int r = 0; r < MANY_ROW_TILES; r++) Scheme::operand(a[r], stage, groups[r], r, step, lane);
                // Products of the same sums are some apart: each waits for the one before.
                constexpr int AT_ONCE = TOKEN_TILES < 4 ? TOKEN_TILES : 4;
#pragma unroll
                for (int first = 0; first < TOKEN_TILES; first += AT_ONCE) {
                    uint4 b[AT_ONCE];
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) b[i] = x[s * STEPS + step][first + i][lane];
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
                        for (int r = 0; r < MANY_ROW_TILES; r++)
                            mma_bf16(target[r][first + i], a[r][0][0], a[r][0][1], a[r][1][0], a[r][1][1], b[i].x, b[i].y);
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
                        for (int r = 0; r < MANY_ROW_TILES; r++)
                            mma_bf16(target[r][first + i], a[r][2][0], a[r][2][1], a[r][3][0], a[r][3][1], b[i].z, b[i].w);
                }
            }
            if constexpr (Scheme::GROUP > 0) scale_sums<Scheme>(acc, sums, stage, first_step, lane);
        }
    }
}
