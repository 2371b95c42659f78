// FlashAttention-2 on the tensor cores for many queries: 128 rows against tiles of 32 or 64 keys, all in shared memory.
// A warp has 32 rows, so that what it loads of K and V is used twice. No kernel: attention_prefill.cu and
// vision_attention.cu say where rows and keys come from and which keys a row sees.
#pragma once
#include "attention_copy.cuh"

constexpr u32 TILE_ROWS = 128;
constexpr u32 TILE_THREADS = 128;
constexpr int ROW_BLOCKS = 2; // of 16 rows in a warp
// Steps of 16 columns whose loads the compiler may put before each other's products: with more it runs out of
// registers.
constexpr int SCORE_STEPS = 4;

// D is the width with padding: a multiple of 16. KEYS are those of a tile.
template <int D> struct TileShape {
    typedef RowLayout<D / 8> Layout;
    static constexpr u32 QUERY_BYTES = TILE_ROWS * Layout::STRIDE;
};

// What a warp has of its rows: lane (g, t) has rows 16 m + g + 8 h of the warp, columns 8 n + 2t and 2t + 1. COLUMNS, a
// multiple of 8, are those of V that count.
template <int COLUMNS> struct TileResult {
    float out[ROW_BLOCKS][COLUMNS / 8][4];
    float maximum[ROW_BLOCKS][2], sum[ROW_BLOCKS][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[m][n][i] = 0.0f;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                maximum[m][h] = minus_infinity();
                sum[m][h] = 0.0f;
            }
        }
    }
};

template <int KEYS> using TileScores = float[ROW_BLOCKS][KEYS / 8][4];

// scores = q K^T.
template <int D, int KEYS, bool F16>
__device__ __forceinline__ void tile_scores(TileScores<KEYS>& scores, u32 queries, u32 keys) {
    typedef typename TileShape<D>::Layout Layout;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[m][j][i] = 0.0f;
    // Rows that are 16 apart have their chunks at the same places.
    const u32 query_row = 16 * ROW_BLOCKS * warp + lane % 16, key_row = lane % 8 + 8 * (lane / 16);
#pragma unroll SCORE_STEPS
    for (int k = 0; k < D / 16; k++) {
        u32 q[ROW_BLOCKS][4];
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++)
            load_matrices(q[m], queries + Layout::at(query_row, 2 * k + lane / 16) + 16 * m * Layout::STRIDE);
        const u32 key = keys + Layout::at(key_row, 2 * k + lane / 8 % 2);
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            u32 r[4];
            load_matrices(r, key + 16 * j * Layout::STRIDE);
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++) {
                mma_16bit<F16>(scores[m][2 * j], q[m], r[0], r[1]);
                mma_16bit<F16>(scores[m][2 * j + 1], q[m], r[2], r[3]);
            }
        }
    }
}

// Scores, minus infinity where a row does not see a key, become weights 2^(factor * (score - maximum)); what was summed
// before is rescaled where a maximum grows. Every row sees a key of the first tile.
template <int COLUMNS, int KEYS>
__device__ __forceinline__ void tile_softmax(TileResult<COLUMNS>& result, TileScores<KEYS>& scores, float factor) {
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++) {
        float correction[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float highest = result.maximum[m][h];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
                highest = fmaxf(highest, fmaxf(scores[m][j][2 * h], scores[m][j][2 * h + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            correction[h] = exp2_fast((result.maximum[m][h] - highest) * factor);
            result.maximum[m][h] = highest;
            const float offset = -highest * factor;
            float sum = result.sum[m][h] * correction[h];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    scores[m][j][2 * h + i] = exp2_fast(fmaf(scores[m][j][2 * h + i], factor, offset));
                    sum += scores[m][j][2 * h + i];
                }
            }
            result.sum[m][h] = sum;
        }
        if (__any_sync(0xffffffffu, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) result.out[m][n][i] *= correction[i / 2];
        }
    }
}

// out += weights V.
template <int D, int COLUMNS, int KEYS, bool F16>
__device__ __forceinline__ void tile_values(TileResult<COLUMNS>& result, const TileScores<KEYS>& weights, u32 values) {
    typedef typename TileShape<D>::Layout Layout;
    const u32 lane = threadIdx.x % 32, value_row = lane % 16;
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++) {
        u32 a[ROW_BLOCKS][4];
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] = pack_16bit<F16>(weights[m][2 * j + i / 2][2 * (i % 2)],
                                          weights[m][2 * j + i / 2][2 * (i % 2) + 1]);
#pragma unroll
        for (int c = 0; c < COLUMNS / 8; c += 2) {
            u32 r[4];
            load_matrices_transposed(r, values + Layout::at(value_row, c + lane / 16) + 16 * j * Layout::STRIDE);
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++) {
                mma_16bit<F16>(result.out[m][c], a[m], r[0], r[1]);
                if (c + 1 < COLUMNS / 8) mma_16bit<F16>(result.out[m][c + 1], a[m], r[2], r[3]);
            }
        }
    }
}

// Divides by the sums of weights, and by the factor that the weights were multiplied with: the results are final.
template <int COLUMNS>
__device__ __forceinline__ void tile_finish(TileResult<COLUMNS>& result, float weight_factor = 1.0f) {
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = result.sum[m][h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float factor = sum > 0.0f ? __fdiv_rn(1.0f, sum * weight_factor) : 0.0f;
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
                result.out[m][n][2 * h] *= factor;
                result.out[m][n][2 * h + 1] *= factor;
            }
        }
}
