// E4M3 weights with a float32 scale per row and 128 inputs (blocks of 128 by 128 are expanded to rows) as operand of bf16
// products. No kernel.
//
// A tile is 16 rows by 32 k, 16 bytes of a lane: 8 codes of row g, 8 of row g + 8, in natural order. A code's seven bits of exponent
// and mantissa at bits 4 to 10 are the bf16 number code * 2^-120, subnormal or not; times 2^120 it is exact.
#pragma once
#include "decode_linear.cuh"

struct Fp8 {
    static constexpr int SPAN = 64;
    static constexpr int VECTORS = 2;
    static constexpr int GROUP = 128;
    static constexpr int K_PER_WORD = 128;
    static constexpr int WORDS = 1;
    static constexpr int FACTOR = 1;
    typedef NoGroup Group;

    template <typename Stage>
    static __device__ __forceinline__ void operand(u32 (&a)[4][2], const Stage& stage, Group, int r, int step, u32 lane) {
        const uint4 codes = stage.codes[r][step][lane];
        weights(a, 0, codes.x, codes.y);
        weights(a, 1, codes.z, codes.w);
    }

    static __device__ __forceinline__ void weights(u32 (&a)[4][2], int half, u32 low, u32 high) {
        a[0][half] = weight_pair(low, 0x1404);
        a[1][half] = weight_pair(low, 0x3424);
        a[2][half] = weight_pair(high, 0x1404);
        a[3][half] = weight_pair(high, 0x3424);
    }

    // Two neighbouring codes: at the upper ends of both halves, then moved apart from their signs.
    static __device__ __forceinline__ u32 weight_pair(u32 codes, u32 bytes) {
        const u32 wide = __byte_perm(codes, 0, bytes);
        // 2^120 as a pair.
        return multiply_bf16(and_or(wide, 0x80008000u, wide >> 4 & 0x07f007f0u), 0x7b807b80u);
    }

    template <typename Stage>
    static __device__ __forceinline__ float scale(const Stage& stage, int r, int half, int, u32 lane) {
        return __uint_as_float(stage.scales[r][0][lane / 4 + 8 * half]);
    }
};
