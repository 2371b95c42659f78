// nvfp4_quantize: rows of x as NVFP4. nvfp4_mma_t64, nvfp4_mma_t128: out = x W^T of NVFP4 weights and NVFP4 rows of x, on tensor cores
// that multiply codes and scales as they are. For layers, and for experts over sorted lists of rows as gemm.cuh does them.
//
// Shapes  x [rows, k] in the order of nvfp4_quantize.cuh, k padded to a multiple of 128 with zeros; W [n, k] in the packed layout of
//         4 bits, n padded to a multiple of 32: its words and its scale words are operands as they are.
// Bytes   W once for each 128 (or 64) rows of x, 0.56 for a weight; x once for each panel of W, 0.56 for a number.
// Bound   tensor cores: 2 * rows * n * k operations, at four times the rate of bf16.
//
// Only for sm_120a and sm_121a: no other architecture has the instruction.
#include "gemm_place.cuh"
#include "gemm_store.cuh"
#include "nvfp4_mma.cuh"
#include "nvfp4_quantize.cuh"

struct Nvfp4MmaParams {
    GemmParams gemm;        // x: codes; row_scales: 2^8 times the matrix's factor
    const u32* x_scales;    // [rows, k / 64]
    const float* x_factors; // [rows]
};
PARAMS(Nvfp4MmaParams);

// Inputs of a stage: two products.
constexpr int NVFP4_STEP = 128;
// Bytes of a row of x and of a row tile of W in a stage, and of the scale words of either.
constexpr int X_ROW_BYTES = NVFP4_STEP / 2;
constexpr int X_ROW_SCALES = NVFP4_STEP / 16;
constexpr int W_TILE_BYTES = 16 * NVFP4_STEP / 2;
constexpr int W_TILE_SCALES = 16 * NVFP4_STEP / 16;
// Row scales of the packed layout are 2^8 times what they would be here.
constexpr float ROW_SCALE_FACTOR = 0x1p-8f;

// A warp has 64 rows of W and 64 rows of x; two warps lie along the rows of W. The names are those that gemm_store.cuh uses.
template <int TOKENS_> struct Nvfp4Shape {
    using Scheme = PlainLoads;
    static constexpr int TOKENS = TOKENS_, WARPS_ALONG_ROWS = 2, WARPS_ALONG_TOKENS = TOKENS / 64;
    static constexpr int THREADS = 32 * WARPS_ALONG_ROWS * WARPS_ALONG_TOKENS;
    static constexpr int ROW_TILES = 4, TOKEN_TILES = 8, HALF_TILES = 4, QUARTER_TILES = 2;
    static constexpr bool FOR_EXPERTS = true, FOR_LAYERS = true;
    // A stage: x, W, scales of W, scales of x.
    static constexpr int X_BYTES = TOKENS * X_ROW_BYTES;
    static constexpr int SCALES_AT = X_BYTES + BLOCK_TILES * W_TILE_BYTES;
    static constexpr int X_SCALES_AT = SCALES_AT + BLOCK_TILES * W_TILE_SCALES;
    static constexpr int STAGE_BYTES = X_SCALES_AT + TOKENS * X_ROW_SCALES;
    // As in nvfp4_mma.rs: two or three blocks fit on a multiprocessor.
    static constexpr int STAGES = 2;
    static constexpr int RESULT_TOKENS = STAGES * STAGE_BYTES >= 64 * (BLOCK_ROWS + 4) * 4 ? 64 : 32;
    static_assert(STAGE_BYTES % 16 == 0 && TOKENS == THREADS, "a thread copies the scales of a row of x");
};

// What a thread copies in every step.
template <typename S> struct Nvfp4Sources {
    static constexpr int VECTORS = W_TILE_BYTES / 16, SCALE_VECTORS = W_TILE_SCALES / 16, X_VECTORS = X_ROW_BYTES / 16;
    static constexpr int CODE_COPIES = BLOCK_TILES * VECTORS / S::THREADS, X_COPIES = S::TOKENS * X_VECTORS / S::THREADS;
    // In units of 16 bytes, of step 0.
    u32 codes[CODE_COPIES];
    u32 scales;

    __device__ __forceinline__ Nvfp4Sources(const GemmParams& p, const Weights& w) {
#pragma unroll
        for (int i = 0; i < CODE_COPIES; i++) {
            const u32 vector = threadIdx.x + S::THREADS * i;
            codes[i] = find_tile<S>(w, vector / VECTORS) * (p.k / NVFP4_STEP) * VECTORS + vector % VECTORS;
        }
        scales = find_tile<S>(w, threadIdx.x / SCALE_VECTORS % BLOCK_TILES) * (p.k / NVFP4_STEP) * SCALE_VECTORS + threadIdx.x % SCALE_VECTORS;
    }

    __device__ __forceinline__ void weights(const GemmParams& p, u32 stage, u32 step) const {
#pragma unroll
        for (int i = 0; i < CODE_COPIES; i++)
            copy_async(stage + S::X_BYTES + 16 * (threadIdx.x + S::THREADS * i), p.codes + (codes[i] + step * VECTORS), true);
        if (threadIdx.x < BLOCK_TILES * SCALE_VECTORS)
            copy_async(stage + S::SCALES_AT + 16 * threadIdx.x, reinterpret_cast<const uint4*>(p.scales) + (scales + step * SCALE_VECTORS), true);
    }

    // `rows`: the block's rows of x.
    static __device__ __forceinline__ void x(const Nvfp4MmaParams& p, const u32* rows, u32 stage, u32 step) {
        const u32 steps = p.gemm.k / NVFP4_STEP;
        const uint4* x = reinterpret_cast<const uint4*>(p.gemm.x);
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            const u32 vector = threadIdx.x + S::THREADS * i, row = rows[vector / X_VECTORS];
            copy_async(stage + 16 * vector, x + (u64(row * steps + step) * X_VECTORS + vector % X_VECTORS), true);
        }
        const uint2* x_scales = reinterpret_cast<const uint2*>(p.x_scales);
        copy_async8(stage + S::X_SCALES_AT + X_ROW_SCALES * threadIdx.x, x_scales + u64(rows[threadIdx.x] * steps + step));
    }
};

// acc += W x over the two products of a stage, for the first TILES token tiles of each warp.
template <typename S, int TILES> __device__ __forceinline__ void multiply_nvfp4(Sums<S>& acc, const char* stage) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 row_warp = warp % S::WARPS_ALONG_ROWS, token_warp = warp / S::WARPS_ALONG_ROWS;
    const u32 first_token = token_warp * TILES * 8 + g, first_tile = row_warp * S::ROW_TILES;
    const char* tiles = stage + S::X_BYTES + first_tile * W_TILE_BYTES + 16 * lane;
    // Lanes 0 and 1 of four have the scales of rows g and g + 8 for the first product, lanes 2 and 3 for the second.
    const char* scales = stage + S::SCALES_AT + first_tile * W_TILE_SCALES + t / 2 * 64 + t % 2 * 32 + 4 * g;
    // Lane 0 of four for the first product, lane 1 for the second.
    const char* x_scales = stage + S::X_SCALES_AT + first_token * X_ROW_SCALES + 4 * (t % 2);
    const char* x = stage + first_token * X_ROW_BYTES + 16 * t;

    u32 scales_a[S::ROW_TILES], scales_b[TILES];
    uint4 b[TILES];
#pragma unroll
    for (int r = 0; r < S::ROW_TILES; r++) scales_a[r] = shared_load(scales + r * W_TILE_SCALES);
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        b[i] = shared_load4(x + 8 * i * X_ROW_BYTES);
        scales_b[i] = shared_load(x_scales + 8 * i * X_ROW_SCALES);
    }
#pragma unroll
    for (int product = 0; product < 2; product++) {
        uint4 a[S::ROW_TILES];
#pragma unroll
        for (int r = 0; r < S::ROW_TILES; r++) a[r] = shared_load4(tiles + r * W_TILE_BYTES + 512 * product);
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < S::ROW_TILES; r++) {
                if (product == 0) {
                    mma_nvfp4<0, 0>(acc[r][i], a[r], b[i].x, b[i].y, scales_a[r], scales_b[i]);
                } else {
                    mma_nvfp4<1, 1>(acc[r][i], a[r], b[i].z, b[i].w, scales_a[r], scales_b[i]);
                }
            }
    }
}

// acc += W x over all steps, of which the first stages but one are on their way.
template <typename S, int TILES>
__device__ __forceinline__ void multiply_steps(Sums<S>& acc, const Nvfp4MmaParams& p, const Nvfp4Sources<S>& sources, const u32* rows,
                                               const char* shared, const Steps& steps) {
    const u32 shared_at = shared_address(shared);
    u32 stage = 0;
#pragma unroll 1
    for (u32 step = 0; step < steps.count; step++) {
        wait_copies<S::STAGES - 2>();
        // All copies for this stage have come, and all warps are past the stage that is filled now.
        __syncthreads();
        const u32 free_stage = (stage == 0 ? S::STAGES : stage) - 1, next = step + S::STAGES - 1;
        if (next < steps.count) {
            sources.weights(p.gemm, shared_at + free_stage * S::STAGE_BYTES, steps.first + next);
            sources.x(p, rows, shared_at + free_stage * S::STAGE_BYTES, steps.first + next);
        }
        commit_copies();
        multiply_nvfp4<S, TILES>(acc, shared + stage * S::STAGE_BYTES);
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
    }
}

// The sums of a token times its factor.
template <typename S> __device__ __forceinline__ void apply_factors(Sums<S>& acc, const float* factors, u32 warp_tokens) {
    const u32 first = threadIdx.x / 32 / S::WARPS_ALONG_ROWS * warp_tokens + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < S::TOKEN_TILES; i++) {
        if (8 * i >= warp_tokens) break;
        const float factor[2] = {factors[first + 8 * i], factors[first + 8 * i + 1]};
#pragma unroll
        for (int r = 0; r < S::ROW_TILES; r++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[r][i][j] *= factor[j % 2];
    }
}

// Which rows of W and of x the block multiplies. GATE_UP: as many of gate as of up.
template <typename S>
__device__ __forceinline__ Weights weights_of(const GemmParams& p, u32 expert, u32 row_block) {
    const u32 before = expert * (p.padded_n / 16);
    if (p.what == GATE_UP) return {before + row_block * (BLOCK_TILES / 2), before + p.num_rows / 16 - 1, p.num_rows / 16};
    return {before + p.first_row / 16 + row_block * BLOCK_TILES, before + p.padded_n / 16 - 1, 0};
}

template <typename S> __device__ __forceinline__ void store_all(const GemmParams& p, const Sums<S>& acc, const u32* out_rows, u32 num_tokens,
                                                                u32 warp_tokens, u32 expert, u32 row_block, float* results) {
    const bool is_gate_up = p.what == GATE_UP;
    const float* row_scales = p.row_scales + u64(expert) * p.n;
    const u32 block_row = p.first_row + row_block * (is_gate_up ? BLOCK_ROWS / 2 : BLOCK_ROWS);
#pragma unroll 1
    for (u32 part = 0; part * S::RESULT_TOKENS < num_tokens; part++) {
        if (is_gate_up) {
            put_inner<S>(p, acc, warp_tokens, part, row_scales, results);
        } else {
            put_results<S>(acc, warp_tokens, part, results);
        }
        __syncthreads();
        const u32* rows = out_rows + part * S::RESULT_TOKENS;
        if (p.what == DOWN) {
            store_partial<S>(p, results, rows, row_scales, block_row);
        } else {
            store<S>(p, results, rows, row_scales, block_row);
        }
        __syncthreads();
    }
}

template <typename S> __device__ __forceinline__ void nvfp4_mma(const Nvfp4MmaParams& params) {
    extern __shared__ __align__(128) char shared[];
    __shared__ u32 x_rows[S::TOKENS], out_rows[S::TOKENS];
    __shared__ float factors[S::TOKENS];
    const GemmParams& p = params.gemm;
    const u32 shared_at = shared_address(shared);
    const bool is_experts = p.tiles != nullptr, is_gate_up = p.what == GATE_UP;

    Place place = {blockIdx.x, 0};
    Tile tile = {0, 0, 0, 0};
    if (is_experts) {
        wait_for_predecessor();
        tile = p.tiles[blockIdx.y];
        if (tile.count == 0) return;
    } else {
        place = dense_place(p, S::TOKENS);
        tile.first = place.token_block * S::TOKENS;
        tile.count = min(p.rows - tile.first, u32(S::TOKENS));
    }
    const Nvfp4Sources<S> sources(p, weights_of<S>(p, tile.expert, place.row_block));
    Steps steps = {0, p.k / NVFP4_STEP};
    if (p.what == STORE_SPLITS) {
        // They are counted in 64 k.
        steps.first = blockIdx.y * (p.steps_per_split / 2);
        steps.count = min(steps.count - steps.first, p.steps_per_split / 2);
    }
    // Weights are there before the predecessor has ended, x is not.
#pragma unroll
    for (int s = 0; s < S::STAGES - 1; s++)
        if (u32(s) < steps.count) sources.weights(p, shared_at + s * S::STAGE_BYTES, steps.first + s);
    if (!is_experts) wait_for_predecessor();
    allow_successor();
    // A thread has a row of x. One that does not exist is the first: nothing of its results is stored.
    {
        const u32 i = threadIdx.x, position = tile.first + (i < tile.count ? i : 0);
        const u32 pair = is_experts ? p.pairs[position] : position, x_row = is_gate_up ? pair / p.top_k : position;
        x_rows[i] = x_row;
        out_rows[i] = i < tile.count ? (is_gate_up ? position : pair) : NO_ROW;
        factors[i] = params.x_factors[x_row] * ROW_SCALE_FACTOR;
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < S::STAGES - 1; s++) {
        if (u32(s) < steps.count) sources.x(params, x_rows, shared_at + s * S::STAGE_BYTES, steps.first + s);
        commit_copies();
    }

    Sums<S> acc = {};
    // Of few rows fewer are multiplied.
    const u32 warp_tokens = used_warp_tokens<S>(tile.count);
    if (warp_tokens == S::TOKEN_TILES * 8) {
        multiply_steps<S, S::TOKEN_TILES>(acc, params, sources, x_rows, shared, steps);
    } else if (warp_tokens == S::HALF_TILES * 8) {
        multiply_steps<S, S::HALF_TILES>(acc, params, sources, x_rows, shared, steps);
    } else {
        multiply_steps<S, S::QUARTER_TILES>(acc, params, sources, x_rows, shared, steps);
    }
    apply_factors<S>(acc, factors, warp_tokens);
    // The stages are free: every copy has come, and every warp is past its last product.
    wait_copies<0>();
    __syncthreads();
    store_all<S>(p, acc, out_rows, tile.count, warp_tokens, tile.expert, place.row_block, reinterpret_cast<float*>(shared));
}

extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS) nvfp4_quantize(const QuantizeParams p) { quantize_row(p); }
extern "C" __global__ void __launch_bounds__(64, 3) nvfp4_mma_t64(const Nvfp4MmaParams p) { nvfp4_mma<Nvfp4Shape<64>>(p); }
extern "C" __global__ void __launch_bounds__(128, 2) nvfp4_mma_t128(const Nvfp4MmaParams p) { nvfp4_mma<Nvfp4Shape<128>>(p); }
