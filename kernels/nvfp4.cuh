// NVFP4 weights (e2m1 codes, an e4m3 scale per 16 inputs, a factor per matrix) as operand of bf16 products. No kernel.
//
// A code's three bits of exponent and mantissa at bits 6 to 8 are the bf16 number code * 2^-126, subnormal or not; its
// product with the scale (times 2^118) has at most 6 significant bits, so weights are exact in bf16. What is left, 2^8 and
// the matrix's factor, is in a scale per output row. About 3 instructions per weight, of which GB10 has 30 for each byte.
#pragma once
#include "decode_linear.cuh"

struct Nvfp4 {
    static constexpr int SPAN = 128;
    // k that shares a word of scales.
    static constexpr int K_PER_WORD = 64;

    // Codes of two tiles and the scales (4 in a word) of rows g and g + 8, for each row tile.
    struct Weights {
        uint4 codes[ROW_TILES][2];
        u32 scales[ROW_TILES][2][2];
    };

    static __device__ __forceinline__ void load(Weights& w, const Operand& operand, u32 span, u32 lane) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const u64 tile = u64(operand.tiles[r]) * (operand.k / 64) + 2 * span;
#pragma unroll
            for (int c = 0; c < 2; c++) {
                w.codes[r][c] = load_once(operand.codes + (tile + c) * 32 + lane);
                w.scales[r][c][0] = __ldg(operand.scales + (tile + c) * 16 + lane / 4);
                w.scales[r][c][1] = __ldg(operand.scales + (tile + c) * 16 + lane / 4 + 8);
            }
        }
    }

    // Byte `index` of a word of scales, times 2^118, as a pair of equal bf16 numbers. Scales are not negative.
    static __device__ __forceinline__ u32 scale_pair(u32 word, u32 index) {
        // An e4m3 number at the top of a float's mantissa is the number times 2^-120.
        const float scale = __uint_as_float((word >> (8 * index) & 0x7fu) << 20) * 0x1p120f * 0x1p118f;
        return __byte_perm(__float_as_uint(scale), 0, 0x3232);
    }

    // The pair of weights in nibbles j and j + 4.
    static __device__ __forceinline__ u32 weight_pair(u32 word, int j, u32 scale) {
        const u32 nibbles = word >> (4 * j);
        return multiply_bf16(((nibbles & 0x00070007u) << 6) | ((nibbles & 0x00080008u) << 12), scale);
    }

    template <int TOKEN_TILES>
    static __device__ __forceinline__ void multiply(float (&acc)[ROW_TILES][TOKEN_TILES][4], const Weights& w,
                                                    const Inputs<SPAN, TOKEN_TILES>& x, u32 lane) {
#pragma unroll
        for (int h = 0; h < SPAN / 32; h++) {
            u32 a[ROW_TILES][4][2];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                const uint4 codes = w.codes[r][h / 2];
                const u32 index = 2 * (h % 2) + lane % 4 / 2;
                const u32 upper_scale = scale_pair(w.scales[r][h / 2][0], index);
                const u32 lower_scale = scale_pair(w.scales[r][h / 2][1], index);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    a[r][j][0] = weight_pair(h % 2 ? codes.z : codes.x, j, upper_scale);
                    a[r][j][1] = weight_pair(h % 2 ? codes.w : codes.y, j, lower_scale);
                }
            }
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++) {
                u32 b[4];
                pair(b, x.values[h][i]);
#pragma unroll
                for (int j = 0; j < 4; j += 2)
#pragma unroll
                    for (int r = 0; r < ROW_TILES; r++)
                        mma_bf16(acc[r][i], a[r][j][0], a[r][j][1], a[r][j + 1][0], a[r][j + 1][1], b[j], b[j + 1]);
            }
        }
    }
};
