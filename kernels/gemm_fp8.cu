// gemm_fp8: out = x W^T for FP8 weights (e4m3, a float32 scale per block of 128 inputs of a row) and many rows of bf16 x. gemm.cuh has
// the product.
//
// Shapes  x [rows, k] bf16, W [n, k] in tiles of 16 rows by 32 k, 16 bytes a lane: 8 of row g, 8 of row g + 8.
// Bytes   W once for each 128 (or fewer) rows of x, x once for each panel of W, mostly from the L2 cache.
// Bound   tensor cores: 2 * rows * n * k operations. With few rows the bytes of W.
//
// The bits of an e4m3 number moved to the top of a bf16's mantissa are the number times 2^-120; the product with a power of two is exact.
#include "gemm.cuh"

struct Fp8 : PlainLoads {
    static constexpr int TILE_VECTORS = 64;
    static constexpr int WORD_K = 128;
    static constexpr bool GROUPED = true;

    // Of rows g and g + 8: the scale. Exponents from -100 to 22 are exact; the power leaves out 2^16. A scale of zero has 2^-23, with
    // which every product is below the smallest bf16 number.
    struct Group {
        u32 word[2] = {};

        __device__ __forceinline__ float mantissa(int half) const { return __uint_as_float((word[half] & 0x007fffffu) | 0x3f800000u); }
        __device__ __forceinline__ float factor(int half) const { return mantissa(half) * 0x1p16f; }

        // A pair of 2^(e + 104).
        __device__ __forceinline__ u32 power(int half) const { return __byte_perm((word[half] & 0x7f800000u) + (104u << 23), 0, 0x3232); }

        __device__ __forceinline__ float change(int half, u32 next) {
            const float before = mantissa(half);
            word[half] = next;
            return before * reciprocal(mantissa(half));
        }
    };

    struct Raw {
        uint4 codes;

        __device__ __forceinline__ void load(const char* tile, u32 lane_codes, const char*, int half) {
            codes = shared_load4(tile + lane_codes + 512 * half);
        }

        __device__ __forceinline__ void operand(u32 (&a)[8], const Group& group, int, u32) const {
            const u32 power[2] = {group.power(0), group.power(1)};
            const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
            for (int row = 0; row < 2; row++)
#pragma unroll
                for (int j = 0; j < 4; j++) a[2 * j + row] = weights(words[2 * row + j / 2], j % 2 ? 0x3424 : 0x1404, power[row]);
        }

        // Two bytes as pair.
        static __device__ __forceinline__ u32 weights(u32 word, u32 bytes, u32 power) {
            const u32 top = __byte_perm(word, 0, bytes);
            return multiply_bf16(and_or(top, 0x80008000u, (top >> 4) & 0x07f007f0u), power);
        }
    };
};

GEMM(gemm_fp8_t16, Fp8, 16, 2, 8)
GEMM(gemm_fp8_t32, Fp8, 32, 2, 4)
GEMM(gemm_fp8_t64, Fp8, 64, 2, 4)
GEMM(gemm_fp8_t64_wide, Fp8, 64, 4, 3)
GEMM(gemm_fp8_t128, Fp8, 128, 4, 2)
