// 4-bit integer weights (AWQ, GPTQ: code, zero point and scale per group) as operand of the products for many rows. No kernel:
// gemm_g32.cu, gemm_g64.cu and gemm_g128.cu make them. gemm.cuh has the product, int4.cuh the meaning of codes and scale words.
//
// Shapes  x [rows, k] bf16, W [n, k]; group size 32, 64, 128; n padded to a multiple of 32, k to one of 128 with zero scales.
// Bytes   W once for each 128 (or fewer) rows of x, x once for each panel of W, mostly from the L2 cache.
// Bound   tensor cores: 2 * rows * n * k operations. With few rows the bytes of W.
//
// `word & 0x000f000f` is a pair of subnormal bf16 numbers code * 2^-133, and `word & 0x00f000f0` one of code * 2^-129. Times a power of
// two plus -zero * 2^(e - 24) they are (code - zero) * 2^(e - 24), exact: two instructions for two weights. 2^24 is left for the end,
// so that the powers are numbers for every scale up to 2^18.
#pragma once
#include "gemm.cuh"

template <int GROUP> struct Int4 : PlainLoads {
    static constexpr int TILE_VECTORS = 32;
    static constexpr int WORD_K = GROUP;
    static constexpr bool GROUPED = true;

    // Of rows g and g + 8: f, a pair of 2^(e + 109), and one of -zero * 2^(e - 24). With a scale of zero every weight is below the
    // smallest bf16 number.
    struct Group {
        float mantissa[2] = {};
        u32 power[2];
        u32 offset[2];

        __device__ __forceinline__ float factor(int half) const { return mantissa[half] * 0x1p24f; }

        __device__ __forceinline__ float change(int half, u32 next) {
            const float before = mantissa[half];
            // The lowest bits hold the zero point.
            mantissa[half] = __uint_as_float((next & 0x007fffe0u) | 0x3f800000u);
            power[half] = __byte_perm((next & 0xff800000u) + (109u << 23), 0, 0x3232);
            const u32 zero = next & 31u;
            offset[half] = multiply_bf16(power[half], zero | zero << 16) ^ 0x80008000u;
            return before * reciprocal(mantissa[half]);
        }
    };

    struct Raw {
        uint2 codes;

        __device__ __forceinline__ void load(const char* tile, u32 lane_codes, const char*, int half) {
            codes = *reinterpret_cast<const uint2*>(tile + lane_codes + 8 * half);
        }

        // Pairs 01 23 of 16 k, then 45 67 of the next 16.
        __device__ __forceinline__ void operand(u32 (&a)[8], const Group& group, int, u32) const {
            const u32 words[2] = {codes.x, codes.y};
#pragma unroll
            for (int row = 0; row < 2; row++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const u32 word = j < 2 ? words[row] : words[row] >> 8;
                    // 2^4 less for the upper nibble of a byte.
                    const u32 power = j % 2 == 0 ? group.power[row] : group.power[row] - 0x02000200u;
                    a[2 * j + row] = fma_bf16(word & (j % 2 == 0 ? 0x000f000fu : 0x00f000f0u), power, group.offset[row]);
                }
        }
    };
};
