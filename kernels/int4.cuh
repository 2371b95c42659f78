// 4-bit integers with a scale and a zero point per group of 32, 64 or 128 inputs (AWQ, GPTQ) as operand. No kernel.
//
// `word & 0x000f000f | 0x43004300` is a pair of bf16 numbers 128 + code, exact. Scale and zero point come in once per group,
// on the float32 sums: acc += scale * (sum - (128 + zero) * sum_of_x), where sum_of_x is one more product, with a matrix of
// ones: it then lies in the lanes that need it. A scale word is the scale as f32 whose lowest 5 bits are the zero point:
// exact for f16 and bf16 scales.
#pragma once
#include "decode_linear.cuh"

template <int GROUP> struct Int4 {
    // k that a warp takes at a time: less with four times the scales.
    static constexpr int SPAN = GROUP == 32 ? 64 : 128;
    // k that shares a word of scales.
    static constexpr int K_PER_WORD = GROUP;

    // Codes of one or two tiles and the scales of rows g and g + 8, for each row tile.
    struct Weights {
        uint4 codes[ROW_TILES][SPAN / 64];
        u32 scales[ROW_TILES][SPAN / GROUP][2];
    };

    static __device__ __forceinline__ void load(Weights& w, const Operand& operand, u32 span, u32 lane) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const u64 tile = operand.tiles[r];
            const uint4* codes = operand.codes + (tile * (operand.k / 64) + span * (SPAN / 64)) * 32 + lane;
#pragma unroll
            for (int c = 0; c < SPAN / 64; c++) w.codes[r][c] = load_once(codes + 32 * c);
            const u32* scales = operand.scales + (tile * (operand.k / GROUP) + span * (SPAN / GROUP)) * 16 + lane / 4;
#pragma unroll
            for (int s = 0; s < SPAN / GROUP; s++) {
                w.scales[r][s][0] = __ldg(scales + 16 * s);
                w.scales[r][s][1] = __ldg(scales + 16 * s + 8);
            }
        }
    }

    template <int TOKEN_TILES>
    static __device__ __forceinline__ void multiply(float (&acc)[ROW_TILES][TOKEN_TILES][4], const Weights& w,
                                                    const Inputs<SPAN, TOKEN_TILES>& x, u32) {
        constexpr u32 MASK = 0x000f000fu, EXPONENT = 0x43004300u, ONES = 0x3f803f80u;
#pragma unroll
        for (int s = 0; s < SPAN / GROUP; s++) {
            float d[ROW_TILES][TOKEN_TILES][4] = {};
            float sums[TOKEN_TILES][4] = {};
#pragma unroll
            for (int h = s * GROUP / 32; h < (s + 1) * GROUP / 32; h++) {
                u32 a[ROW_TILES][4][2];
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
                    const uint4 codes = w.codes[r][h / 2];
                    const u32 upper = h % 2 ? codes.z : codes.x, lower = h % 2 ? codes.w : codes.y;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        a[r][j][0] = and_or(upper >> (4 * j), MASK, EXPONENT);
                        a[r][j][1] = and_or(lower >> (4 * j), MASK, EXPONENT);
                    }
                }
#pragma unroll
                for (int i = 0; i < TOKEN_TILES; i++) {
                    u32 b[4];
                    pair(b, x.values[h][i]);
#pragma unroll
                    for (int j = 0; j < 4; j += 2) {
                        mma_bf16(sums[i], ONES, ONES, ONES, ONES, b[j], b[j + 1]);
#pragma unroll
                        for (int r = 0; r < ROW_TILES; r++)
                            mma_bf16(d[r][i], a[r][j][0], a[r][j][1], a[r][j + 1][0], a[r][j + 1][1], b[j], b[j + 1]);
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const u32 word = w.scales[r][s][half];
                    const float scale = __uint_as_float(word & ~31u);
                    // 128 + zero: the zero point is at most 16, and 1 is bit 16 of a float of 128.
                    const float offset = __uint_as_float(0x43000000u | ((word & 31u) << 16));
#pragma unroll
                    for (int i = 0; i < TOKEN_TILES; i++) {
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            float& sum = acc[r][i][2 * half + j];
                            sum = fmaf(scale, fmaf(-offset, sums[i][j], d[r][i][2 * half + j]), sum);
                        }
                    }
                }
            }
        }
    }
};
