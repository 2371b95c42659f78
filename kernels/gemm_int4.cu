// gemm_int4: out = x W^T for 4-bit integer weights (AWQ, GPTQ: code, zero point and scale per group) and many rows of x: linear
// layers and experts at prefill. gemm.cuh has the product, int4.cuh the meaning of codes and scale words.
//
// Shapes  x [rows, k] bf16, W [n, k]; group size 32, 64, 128; n padded to a multiple of 32, k to one of 128 with zero scales.
// Bytes   W once for each 128 (or fewer) rows of x, x once for each panel of W, mostly from the L2 cache.
// Bound   tensor cores: 2 * rows * n * k operations. With few rows the bytes of W.
//
// `word & 0x000f000f | 0x43004300` is a pair of bf16 numbers 128 + code; times 2^e minus (128 + zero) * 2^e it is
// (code - zero) * 2^e, exact: one more instruction for two weights.
#include "gemm.cuh"

template <int GROUP> struct Int4 : PlainLoads {
    static constexpr int TILE_VECTORS = 32;
    static constexpr int WORD_K = GROUP;
    // Groups of 64 would need more registers than there are.
    static constexpr int HALVES_AT_ONCE = GROUP == 64 ? 1 : 2;
    static constexpr bool GROUPED = true;

    // Of rows g and g + 8: the scale word, and a pair of -(128 + zero) * 2^e. A scale of zero has 0 for 2^e, and 1 for f.
    struct Group {
        u32 word[2] = {};
        u32 offset[2];

        // The lowest bits hold the zero point.
        __device__ __forceinline__ float factor(int half) const { return __uint_as_float((word[half] & 0x007fffe0u) | 0x3f800000u); }

        // A pair of 2^e.
        __device__ __forceinline__ u32 power(int half) const { return __byte_perm(word[half] & 0xff800000u, 0, 0x3232); }

        __device__ __forceinline__ float change(int half, u32 next) {
            const float before = factor(half);
            word[half] = next;
            const u32 zero = next & 31u;
            offset[half] = multiply_bf16(power(half), 0xc300c300u | zero | zero << 16);
            return before * reciprocal(factor(half));
        }
    };

    struct Raw {
        uint2 codes;

        __device__ __forceinline__ void load(const char* tile, u32 lane_codes, const char*, int half) {
            codes = *reinterpret_cast<const uint2*>(tile + lane_codes + 8 * half);
        }

        // Pairs 04 15 of 16 k, then 26 37 of the next 16.
        __device__ __forceinline__ void operand(u32 (&a)[8], const Group& group, int, u32) const {
            const u32 upper = group.power(0), lower = group.power(1);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                a[2 * j] = weights(codes.x >> (4 * j), upper, group.offset[0]);
                a[2 * j + 1] = weights(codes.y >> (4 * j), lower, group.offset[1]);
            }
        }

        static __device__ __forceinline__ u32 weights(u32 codes, u32 power, u32 offset) {
            return fma_bf16(and_or(codes, 0x000f000fu, 0x43004300u), power, offset);
        }
    };

    static __device__ __forceinline__ void load_x(u32 (&b)[4], const char* at) { load_pairs_by_four(b, at); }
};

GEMM(gemm_g32_t16, Int4<32>, 16, 2, 8)
GEMM(gemm_g32_t32, Int4<32>, 32, 2, 4)
GEMM(gemm_g32_t64, Int4<32>, 64, 2, 4)
GEMM(gemm_g32_t64_wide, Int4<32>, 64, 4, 3)
GEMM(gemm_g32_t128, Int4<32>, 128, 2, 2)
GEMM(gemm_g64_t16, Int4<64>, 16, 2, 8)
GEMM(gemm_g64_t32, Int4<64>, 32, 2, 4)
GEMM(gemm_g64_t64, Int4<64>, 64, 2, 4)
GEMM(gemm_g64_t64_wide, Int4<64>, 64, 4, 3)
GEMM(gemm_g64_t128, Int4<64>, 128, 2, 2)
GEMM(gemm_g128_t16, Int4<128>, 16, 2, 8)
GEMM(gemm_g128_t32, Int4<128>, 32, 2, 4)
GEMM(gemm_g128_t64, Int4<128>, 64, 2, 4)
GEMM(gemm_g128_t64_wide, Int4<128>, 64, 4, 3)
GEMM(gemm_g128_t128, Int4<128>, 128, 2, 2)
