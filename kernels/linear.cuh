// The linear layers of decode, whatever the scheme of the weights. No kernel: the linear_*.cu make them.
#pragma once
#include "decode_linear.cuh"

struct LinearParams {
    const uint4* codes;
    const u32* scales;       // null without scales
    const float* row_scales; // NVFP4: [n], else null
    const float* bias;       // [n] or null
    const u16* x;            // [rows, x_columns]
    void* out;               // [rows, out_columns], from the first column of this matrix on
    float* partial;          // linear_many: [parts, rows, n padded to 32]
    u32 n;                   // rows of W, without padding
    u32 k;                   // with padding
    u32 x_columns;           // k without padding
    u32 rows;                // of x and out
    u32 out_columns;
    u32 out_is_f32;
    u32 token_blocks; // blocks over rows of x
    u32 padding;
};
PARAMS(LinearParams);

constexpr int WARPS = 8;

// A block computes ROW_TILES * 16 rows of W for TOKEN_TILES * 8 rows of x. Blocks over the same weights are neighbours, so that
// all but one of them find these in the second-level cache.
template <typename Scheme, int ROW_TILES, int TOKEN_TILES, int STAGES>
__device__ __forceinline__ void linear(const LinearParams& p) {
    constexpr int OUTPUTS = ROW_TILES * 16, TOKENS = TOKEN_TILES * 8;
    __shared__ union {
        Ring<Scheme, ROW_TILES, STAGES> rings[WARPS];
        WarpSums<WARPS, ROW_TILES, TOKEN_TILES> warps;
    } shared;
    const u32 warp = threadIdx.x / 32, tile = blockIdx.x / p.token_blocks;
    const u32 first_token = blockIdx.x % p.token_blocks * TOKENS;
    Operand<ROW_TILES> operand = {p.codes, p.scales, p.k, {}};
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) operand.tiles[r] = tile * ROW_TILES + r;
    start(shared.rings[warp], operand, warp, WARPS);
    // All of x of the spans on their way where there are registers for it.
    constexpr int ALL = STAGES * Scheme::SPAN / 32, AHEAD = TOKEN_TILES == 1 ? (ALL < 16 ? ALL : 16) : TOKEN_TILES == 2 ? 4 : 1;
    Rows<TOKEN_TILES, AHEAD, AHEAD < 4 ? AHEAD : 4> rows(p.x_columns);
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++) {
        rows.set(i, p.x, min(first_token + 8 * i + threadIdx.x % 32 / 4, p.rows - 1));
    }
    wait_for_predecessor();
    allow_successor();
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    accumulate(acc, shared.rings[warp], operand, rows, warp, WARPS);

    __syncthreads();
    shared.warps.store(acc, warp);
    __syncthreads();
    for (u32 i = threadIdx.x; i < TOKENS * OUTPUTS; i += WARPS * 32) {
        const u32 token = first_token + i / OUTPUTS, n = tile * OUTPUTS + i % OUTPUTS;
        if (token >= p.rows || n >= p.n) continue;
        float sum = shared.warps.total(i / OUTPUTS, i % OUTPUTS);
        if (p.row_scales) sum *= p.row_scales[n];
        if (p.bias) sum += p.bias[n];
        const u64 at = u64(token) * p.out_columns + n;
        if (p.out_is_f32) {
            static_cast<float*>(p.out)[at] = sum;
        } else {
            static_cast<u16*>(p.out)[at] = u16(pack_bf16(sum, 0.0f));
        }
    }
}

// At least BLOCKS blocks on a multiprocessor.
#define LINEAR_KERNEL(NAME, SCHEME, ROW_TILES, TOKEN_TILES, STAGES, BLOCKS)                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                                                   \
        linear_##NAME##_r##ROW_TILES##_t##TOKEN_TILES(const LinearParams p) {                                          \
        linear<SCHEME, ROW_TILES, TOKEN_TILES, STAGES>(p);                                                             \
    }
// All shapes of a scheme; STAGES for two row tiles, twice as many for one; BLOCKS for four token tiles.
#define LINEAR(NAME, SCHEME, STAGES, BLOCKS)                                                                           \
    LINEAR_KERNEL(NAME, SCHEME, 1, 1, 2 * STAGES, 2)                                                                   \
    LINEAR_KERNEL(NAME, SCHEME, 2, 1, STAGES, 2)                                                                       \
    LINEAR_KERNEL(NAME, SCHEME, 1, 2, 2 * STAGES, 2)                                                                   \
    LINEAR_KERNEL(NAME, SCHEME, 2, 2, STAGES, 2)                                                                       \
    LINEAR_KERNEL(NAME, SCHEME, 2, 4, STAGES, BLOCKS)
