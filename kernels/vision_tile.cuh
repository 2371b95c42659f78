// Attention of 128 rows without a mask, for heads of up to 80: a chunk of 32 keys is multiplied with q while the weights of the
// chunk before it are computed, so that a warp keeps its tensor core busy by itself. No kernel: see vision_attention.cu.
//
// q stays in registers. A row's weights are 2^(factor * (score - maximum)) of a maximum of before, until a weight would exceed 2^8
// (`slack` is that in units of scores): sums are rescaled rarely, and a lane compares what it has of a row without asking others.
#pragma once
#include "attention_tile.cuh"

constexpr int CHUNK_KEYS = 32;
constexpr int STAGE_KEYS = 64;
constexpr u32 NUM_STAGES = 3;

typedef TileScores<CHUNK_KEYS> ChunkScores;

// As `mma_bf16`, for a k of 8: a0 has row g, a1 row g + 8, k 2t and 2t + 1.
__device__ __forceinline__ void mma_bf16_k8(float (&d)[4], u32 a0, u32 a1, u32 b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
}

// What a warp has of its 32 rows. D, a multiple of 8, is the width of a head with padding.
template <int D> struct WarpRows {
    typedef RowLayout<D / 8> Layout;
    static constexpr int STEPS = D / 16, COLUMN_TILES = D / 8;
    static constexpr bool HAS_TAIL = D % 16 != 0;
    static constexpr u32 STAGE_BYTES = 2 * STAGE_KEYS * Layout::STRIDE; // K, V
    static_assert(TILE_ROWS == 2 * STAGE_KEYS, "q comes through a stage");

    u32 q[ROW_BLOCKS][STEPS][4];
    u32 q_tail[ROW_BLOCKS][2];
    TileResult<D> result;
    float factor, slack;

    __device__ __forceinline__ void load_queries(u32 queries) {
        const u32 lane = threadIdx.x % 32, first = 16 * ROW_BLOCKS * (threadIdx.x / 32);
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
            for (int k = 0; k < STEPS; k++)
                load_matrices(q[m][k], queries + Layout::at(first + lane % 16, 2 * k + lane / 16) + 16 * m * Layout::STRIDE);
        if (HAS_TAIL) {
            u32 r[4];
            load_matrices(r, queries + Layout::at(first + lane, D / 8 - 1));
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) q_tail[m][h] = r[2 * m + h];
        }
    }

    // Step `k` of the scores of a chunk, 16 columns; the last step may have 8.
    __device__ __forceinline__ void add_scores(ChunkScores& scores, u32 keys, int k) const {
        const u32 lane = threadIdx.x % 32;
        if (k < STEPS) {
            const u32 at = keys + Layout::at(lane % 8 + 8 * (lane / 16), 2 * k + lane / 8 % 2);
#pragma unroll
            for (int j = 0; j < CHUNK_KEYS / 16; j++) {
                u32 r[4];
                load_matrices(r, at + 16 * j * Layout::STRIDE);
#pragma unroll
                for (int m = 0; m < ROW_BLOCKS; m++) {
                    mma_16bit<false>(scores[m][2 * j], q[m][k], r[0], r[1]);
                    mma_16bit<false>(scores[m][2 * j + 1], q[m][k], r[2], r[3]);
                }
            }
        } else {
            u32 r[4];
            load_matrices(r, keys + Layout::at(lane, D / 8 - 1));
#pragma unroll
            for (int j = 0; j < CHUNK_KEYS / 8; j++)
#pragma unroll
                for (int m = 0; m < ROW_BLOCKS; m++) mma_bf16_k8(scores[m][j], q_tail[m][0], q_tail[m][1], r[j]);
        }
    }

    static __device__ __forceinline__ void clear(ChunkScores& scores) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * CHUNK_KEYS / 2; i++) scores[i / (CHUNK_KEYS / 2)][i / 4 % (CHUNK_KEYS / 8)][i % 4] = 0.0f;
    }

    // The highest of the lane's scores of row 16 m + g + 8 h.
    static __device__ __forceinline__ float highest(const ChunkScores& scores, int m, int h) {
        float value = fmaxf(scores[m][0][2 * h], scores[m][0][2 * h + 1]);
#pragma unroll
        for (int j = 1; j < CHUNK_KEYS / 8; j++) value = fmaxf(value, fmaxf(scores[m][j][2 * h], scores[m][j][2 * h + 1]));
        return value;
    }

    // Scales of all rows that have a higher score than before; their sums follow.
    __device__ __forceinline__ void raise(const ChunkScores& scores) {
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float value = fmaxf(result.maximum[m][h], highest(scores, m, h));
                value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
                value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
                const float correction = exp2_fast((result.maximum[m][h] - value) * factor);
                result.maximum[m][h] = value;
                result.sum[m][h] *= correction;
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++) {
                    result.out[m][n][2 * h] *= correction;
                    result.out[m][n][2 * h + 1] *= correction;
                }
            }
    }

    // The first chunk.
    __device__ __forceinline__ void begin(ChunkScores& scores, u32 keys) {
        result.clear();
        clear(scores);
#pragma unroll
        for (int k = 0; k < STEPS + HAS_TAIL; k++) add_scores(scores, keys, k);
    }

    // Scores of a chunk become weights and multiply V; meanwhile `next` gets the scores of the next chunk, if there is one.
    template <bool HAS_NEXT>
    __device__ __forceinline__ void advance(ChunkScores& scores, u32 values, ChunkScores& next, u32 next_keys) {
        constexpr int K_STEPS = STEPS + HAS_TAIL, PARTS = ROW_BLOCKS * CHUNK_KEYS / 8;
        u32 weights[CHUNK_KEYS / 16][ROW_BLOCKS][4];
        if (HAS_NEXT) clear(next);
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
            if (HAS_NEXT) add_scores(next, next_keys, k);
#pragma unroll
            for (int part = PARTS * k / K_STEPS; part < PARTS * (k + 1) / K_STEPS; part++) {
                const int m = part % ROW_BLOCKS, j = part / ROW_BLOCKS;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float offset = -result.maximum[m][h] * factor;
                    const float low = exp2_fast(fmaf(scores[m][j][2 * h], factor, offset));
                    const float high = exp2_fast(fmaf(scores[m][j][2 * h + 1], factor, offset));
                    result.sum[m][h] += low + high;
                    weights[j / 2][m][2 * (j % 2) + h] = pack_bf16(low, high);
                }
            }
        }
        bool is_over = false;
        const u32 lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < CHUNK_KEYS / 16; j++) {
#pragma unroll
            for (int c = 0; c + 1 < COLUMN_TILES; c += 2) {
                u32 r[4];
                load_matrices_transposed(r, values + Layout::at(lane % 16, c + lane / 16) + 16 * j * Layout::STRIDE);
#pragma unroll
                for (int m = 0; m < ROW_BLOCKS; m++) {
                    mma_16bit<false>(result.out[m][c], weights[j][m], r[0], r[1]);
                    mma_16bit<false>(result.out[m][c + 1], weights[j][m], r[2], r[3]);
                }
            }
            // Between the products: every row once.
            static_assert(CHUNK_KEYS / 16 == 2, "j is also the half of the rows");
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++)
                if (HAS_NEXT) is_over |= highest(next, m, j) > result.maximum[m][j] + slack;
        }
        if (HAS_TAIL) {
            u32 r[4];
            load_matrices_transposed(r, values + Layout::at(lane, D / 8 - 1));
#pragma unroll
            for (int j = 0; j < CHUNK_KEYS / 16; j++)
#pragma unroll
                for (int m = 0; m < ROW_BLOCKS; m++)
                    mma_16bit<false>(result.out[m][COLUMN_TILES - 1], weights[j][m], r[2 * j], r[2 * j + 1]);
        }
        if (HAS_NEXT && __any_sync(0xffffffffu, is_over)) raise(next);
    }
};

// Where a thread's pieces of a stage's K or V come from: the first POWER vectors of 16 bytes of a row by as many threads, those behind
// by others. Only VECTORS that exist are read; the others' places get numbers that no result depends on.
template <int D> struct StageSource {
    typedef RowLayout<D / 8> Layout;
    static constexpr u32 VECTORS = D / 8;
    static constexpr u32 POWER = VECTORS >= 8 ? 8 : 4, REST = VECTORS - POWER, AT_ONCE = TILE_THREADS / POWER;
    static_assert(VECTORS == 4 || REST <= 2, "a thread has at most one vector of the rest");

    const u16* source; // the stage
    u32 stride;
    u32 num_vectors;

    template <u32 ROWS> __device__ __forceinline__ void load(u32 target, u32 num_rows) const {
        const u32 row = threadIdx.x / POWER, v = threadIdx.x % POWER, last = num_rows - 1;
        const bool is_whole = num_rows >= ROWS;
        const u16* from = source + min(v, num_vectors - 1) * 8;
#pragma unroll
        for (u32 i = 0; i < ROWS / AT_ONCE; i++) {
            const u32 r = row + AT_ONCE * i;
            copy_async(target + Layout::at(r, v), from + (is_whole ? r : min(r, last)) * stride, true);
        }
        if constexpr (REST > 0) {
#pragma unroll
            for (u32 i = 0; i < (ROWS * REST + TILE_THREADS - 1) / TILE_THREADS; i++) {
                const u32 at = i * TILE_THREADS + threadIdx.x, r = at / REST, rest = POWER + at % REST;
                if (r < ROWS)
                    copy_async(target + Layout::at(r, rest), source + min(rest, num_vectors - 1) * 8 + min(r, last) * stride, true);
            }
        }
    }
};
