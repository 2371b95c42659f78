// The loop of the products whose operands need no arithmetic: those of the next 16 k come from shared memory while these are
// multiplied, also from one stage to the next, so that tensor cores do not wait for a stage's first loads. No kernel: see gemm.cuh.
#pragma once
#include "gemm_stage.cuh"

// The same value, which the compiler then keeps instead of computing it again in every step.
__device__ __forceinline__ u32 kept(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

// What a warp multiplies of 16 k.
template <typename S, int TILES> struct Operands {
    u32 w[S::ROW_TILES][4];
    u32 x[TILES][2];

    // `w_at`, `x_at`: the lane's places in the stage for its first 16 k.
    __device__ __forceinline__ void load(u32 w_at, u32 x_at, int part) {
#pragma unroll
        for (int r = 0; r < S::ROW_TILES; r++)
            load_matrices(w[r], (w_at ^ (32 * (part % 2))) + S::TILE_BYTES * r + S::TILE_BYTES / 2 * (part / 2));
#pragma unroll
        for (int i = 0; i < TILES; i += 2) {
            u32 both[4];
            load_matrices(both, (x_at ^ (32 * part)) + 8 * i * (STEP * 2));
            x[i][0] = both[0], x[i][1] = both[1], x[i + 1][0] = both[2], x[i + 1][1] = both[3];
        }
    }

    __device__ __forceinline__ void multiply(Sums<S>& acc) const {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < S::ROW_TILES; r++) mma_bf16(acc[r][i], w[r][0], w[r][1], w[r][2], w[r][3], x[i][0], x[i][1]);
    }
};

// acc += W x over all steps, of which the first stages are on their way.
template <typename S, int TILES>
__device__ __forceinline__ void multiply_pipelined(Sums<S>& acc, const GemmParams& p, const WeightSources<S>& sources,
                                                   const RowStarts<S>& x_rows, u32 shared_at, const Steps& steps) {
    static_assert(S::STAGE_BYTES % 128 == 0 && S::X_BYTES % 128 == 0 && TILES % 2 == 0, "places of pieces are bits of an address");
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 row_warp = warp % S::WARPS_ALONG_ROWS, token_warp = warp / S::WARPS_ALONG_ROWS;
    const u32 lane_w = kept(S::X_BYTES + row_warp * S::ROW_TILES * S::TILE_BYTES + S::Scheme::lane_codes(lane));
    // Two token tiles, and both halves of 16 k.
    const u32 token = lane / 16 * 8 + lane % 8;
    const u32 lane_x = kept((token_warp * TILES * 8 + token) * (STEP * 2) + 16 * S::Scheme::x_place(lane / 8 % 2, token));
    Operands<S, TILES> even, odd;
    u32 stage = shared_at, free_stage = shared_at + (S::STAGES - 1) * S::STAGE_BYTES;
    wait_copies<S::STAGES - 2>();
    __syncthreads();
    even.load(stage + lane_w, stage + lane_x, 0);
#pragma unroll 1
    for (u32 step = 0; step < steps.count; step++) {
        // Copies for later go between the products. Two warps have twice as many each: too many registers.
        constexpr bool IS_BETWEEN = S::THREADS == 128;
        const u32 next = step + S::STAGES - 1;
        const bool past_end = next >= steps.count;
        if (!IS_BETWEEN && !past_end) {
            x_rows.stage(p, free_stage, steps.first + next);
            sources.stage(p, free_stage, steps.first + next);
        }
        odd.load(stage + lane_w, stage + lane_x, 1);
        if (IS_BETWEEN) x_rows.stage(p, free_stage, steps.first + next, past_end);
        even.multiply(acc);
        even.load(stage + lane_w, stage + lane_x, 2);
        if (IS_BETWEEN) sources.stage(p, free_stage, steps.first + next, past_end);
        commit_copies();
        odd.multiply(acc);
        odd.load(stage + lane_w, stage + lane_x, 3);
        even.multiply(acc);
        wait_copies<S::STAGES - 2>();
        // All warps have what they need of this stage: it is the next one to be filled.
        __syncthreads();
        free_stage = stage;
        stage = stage + S::STAGE_BYTES == shared_at + S::STAGES * S::STAGE_BYTES ? shared_at : stage + S::STAGE_BYTES;
        // Behind the last step nothing of this is multiplied.
        even.load(stage + lane_w, stage + lane_x, 0);
        odd.multiply(acc);
    }
}
