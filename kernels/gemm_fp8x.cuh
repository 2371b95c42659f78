// The loop of the products with 4-bit integer weights and rows of x that were quantised to e4m3 (W4A8): m16n8k32, twice the rate of bf16.
// No kernel: gemm_fp8x_g*.cu make them; gemm.cuh has what is around it, fp8_rows.cu quantises x.
//
// A code in the low four bits of a byte is an e4m3 number as it is, code * 2^-9 (subnormal up to 7), so a word of 8 codes is two operand
// words after one shift and two masks. The low nibbles of a word are inputs 0, 4, 1, 5 of its 8, the upper ones 2, 6, 3, 7: x comes in that
// order. Zero points are left to the end of a group: sum (code - zero) x = sum code x - zero * sum x, with the sums of x made once.
//
// Sums. Tensor cores add products of e4m3 in about 13 bits of mantissa on sm_89 and sm_90 (float32 registers do not change that), so what
// they add is one group at most, and groups are added as float32: acc += scale * (sum - zero * sum of x). Two sets of sums, hence a
// warp of 32 rows of W by 32 of x, and eight of them. x has one scale for a row, applied at the end.
#pragma once
#include "gemm_stage.cuh"

// d = A B (or d + A B) for e4m3 A [16, 32] and B [32, 8], lanes as in mma_bf16 with four numbers for two. Not on sm_80, where the host
// does not launch what calls this.
template <bool IS_FIRST>
__device__ __forceinline__ void mma_fp8(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 890
    if (IS_FIRST) {
        asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
    } else {
        asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#endif
}

// Blocks on a multiprocessor: where products of e4m3 are made of others, those take registers.
#if __CUDA_ARCH__ == 900
constexpr int FP8X_BLOCKS = 1;
#else
constexpr int FP8X_BLOCKS = 2;
#endif

template <int GROUP> struct Int4Fp8 : PlainLoads {
    // Two tiles of 16 rows by 64 k.
    static constexpr int TILE_VECTORS = 64;
    static constexpr int WORD_K = GROUP / 2;
    static constexpr bool GROUPED = true;
    static constexpr bool FP8_X = true;
    // Products of 32 k of a group.
    static constexpr int GROUP_PRODUCTS = GROUP / 32;

    struct Group {};
};

// The end of a group for a row tile: acc += scale * (sums - zero * sum of x). `words` are the scales of row g and of row g + 8, `x_sums` those
// of the lane's two tokens in each token tile.
template <int TILES, int ALL>
__device__ __forceinline__ void add_group(float (&acc)[ALL][4], const float (&sums)[TILES][4], const char* words, const char* x_sums) {
    float scale[2], offset[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 bits = shared_load(words + 32 * half);
        // The lowest bits hold the zero point.
        const float value = __uint_as_float(bits & ~31u);
        scale[half] = value * 0x1p9f;
        offset[half] = -value * float(bits & 31u);
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const float2 x = *reinterpret_cast<const float2*>(x_sums + 32 * i);
#pragma unroll
        for (int j = 0; j < 4; j++)
            acc[i][j] = fmaf(scale[j / 2], sums[i][j], fmaf(offset[j / 2], j % 2 ? x.y : x.x, acc[i][j]));
    }
}

// acc += W x over the 128 k of a stage, for the first TILES token tiles of each warp.
template <typename S, int TILES> __device__ __forceinline__ void multiply_stage_fp8x(Sums<S>& acc, const char* stage) {
    using Scheme = typename S::Scheme;
    constexpr u32 LOW = 0x0f0f0f0fu;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 row_warp = warp % S::WARPS_ALONG_ROWS, first_token = warp / S::WARPS_ALONG_ROWS * TILES * 8;
    const char* tiles = stage + S::X_BYTES + row_warp * S::ROW_TILES * S::TILE_BYTES + Scheme::lane_codes(lane);
    const char* words = stage + S::SCALES_AT + row_warp * S::ROW_TILES * (64 * S::WORDS) + 4 * g;
    const char* x_sums = stage + S::SUMS_AT + 4 * first_token + 8 * t;
    const char* x = stage + first_token * (STEP * 2);
    const u32 lane_x = Scheme::lane_x(lane);
    float sums[S::ROW_TILES][TILES][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Of 64 k: 32 in two words, 32 in the others.
        u32 b[TILES][4];
#pragma unroll
        for (int i = 0; i < TILES; i++) load_pairs(b[i], x + 8 * i * (STEP * 2) + (lane_x ^ (half << 6)));
#pragma unroll
        for (int r = 0; r < S::ROW_TILES; r++) {
            const uint4 codes = shared_load4(tiles + r * S::TILE_BYTES + 512 * half);
#pragma unroll
            for (int part = 0; part < 2; part++) {
                const int product = 2 * half + part, word = product / Scheme::GROUP_PRODUCTS;
                const u32 top = part ? codes.z : codes.x, bottom = part ? codes.w : codes.y;
                const u32 a[4] = {top & LOW, bottom & LOW, (top >> 4) & LOW, (bottom >> 4) & LOW};
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    if (product % Scheme::GROUP_PRODUCTS == 0) {
                        mma_fp8<true>(sums[r][i], a, b[i][2 * part], b[i][2 * part + 1]);
                    } else {
                        mma_fp8<false>(sums[r][i], a, b[i][2 * part], b[i][2 * part + 1]);
                    }
                }
                if ((product + 1) % Scheme::GROUP_PRODUCTS == 0)
                    add_group<TILES>(acc[r], sums[r], words + 64 * S::WORDS * r + 64 * word, x_sums + 4 * S::TOKENS * word);
            }
        }
    }
}

// acc += W x over all steps, of which the first stages are on their way.
template <typename S, int TILES>
__device__ __forceinline__ void multiply_fp8x(Sums<S>& acc, const GemmParams& p, const WeightSources<S>& sources,
                                              const RowStarts<S>& x_rows, const char* shared, const Steps& steps) {
    const u32 shared_at = shared_address(shared);
    u32 stage = 0, free_stage = (S::STAGES - 1) * S::STAGE_BYTES;
#pragma unroll 1
    for (u32 step = 0; step < steps.count; step++) {
        wait_copies<S::STAGES - 2>();
        __syncthreads();
        const u32 next = step + S::STAGES - 1;
        if (next < steps.count) {
            x_rows.stage(p, shared_at + free_stage, steps.first + next);
            sources.stage(p, shared_at + free_stage, steps.first + next);
        }
        commit_copies();
        multiply_stage_fp8x<S, TILES>(acc, shared + stage);
        free_stage = stage;
        stage = stage + S::STAGE_BYTES == S::STAGES * S::STAGE_BYTES ? 0 : stage + S::STAGE_BYTES;
    }
}

// acc times the scales of its rows of x.
template <typename S> __device__ __forceinline__ void scale_rows(Sums<S>& acc, u32 warp_tokens, const float* scales) {
    const float* own = scales + threadIdx.x / (32 * S::WARPS_ALONG_ROWS) * warp_tokens + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < S::TOKEN_TILES; i++) {
        if (8 * i >= warp_tokens) continue;
#pragma unroll
        for (int r = 0; r < S::ROW_TILES; r++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[r][i][j] *= own[8 * i + j % 2];
    }
}
