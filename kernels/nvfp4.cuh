// NVFP4 weights (e2m1 codes, an e4m3 scale per 16 inputs, a factor per matrix) as operand of bf16 products. No kernel.
//
// A code's three bits of exponent and mantissa at bits 6 to 8 are the bf16 number code * 2^-126, subnormal or not; its
// product with the scale (times 2^118) has at most 6 significant bits, so weights are exact in bf16. What is left, 2^8 and
// the matrix's factor, is in a scale per output row. About 3 instructions per weight; GB10 has time for 34 while memory brings one.
#pragma once
#include "decode_linear.cuh"

struct Nvfp4 {
    static constexpr int SPAN = 128;
    static constexpr int VECTORS = 2;
    static constexpr int GROUP = 0;
    static constexpr int K_PER_WORD = 64;
    static constexpr int WORDS = 2;
    static constexpr int FACTOR = 1;
    typedef NoGroup Group;

    template <typename Stage>
    static __device__ __forceinline__ void operand(u32 (&a)[4][2], const Stage& stage, Group, int r, int step, u32 lane) {
        const uint2 codes = reinterpret_cast<const uint2*>(&stage.codes[r][step / 2][lane])[step % 2];
        const u32* scales = stage.scales[r][step / 2] + lane / 4;
        const u32 index = 2 * (step % 2) + lane % 4 / 2;
        weights(a, 0, codes.x, scale_pair(scales[0], index));
        weights(a, 1, codes.y, scale_pair(scales[8], index));
    }

    // Byte `index` of a word of scales, times 2^118, as a pair of equal bf16 numbers. Scales are not negative.
    static __device__ __forceinline__ u32 scale_pair(u32 word, u32 index) {
        // An e4m3 number at the top of a float's mantissa is the number times 2^-120.
        const float scale = __uint_as_float((word >> (8 * index) & 0x7fu) << 20) * 0x1p120f * 0x1p118f;
        return __byte_perm(__float_as_uint(scale), 0, 0x3232);
    }

    // The four pairs of a row: nibbles j and j + 4, each part of a code moved to where a bf16 number has it.
    static __device__ __forceinline__ void weights(u32 (&a)[4][2], int half, u32 codes, u32 scale) {
        constexpr u32 VALUE = 0x01c001c0u, SIGN = 0x80008000u;
        a[0][half] = multiply_bf16(and_or(codes << 12, SIGN, codes << 6 & VALUE), scale);
        a[1][half] = multiply_bf16(and_or(codes << 8, SIGN, codes << 2 & VALUE), scale);
        a[2][half] = multiply_bf16(and_or(codes << 4, SIGN, codes >> 2 & VALUE), scale);
        a[3][half] = multiply_bf16(and_or(codes, SIGN, codes >> 6 & VALUE), scale);
    }
};
