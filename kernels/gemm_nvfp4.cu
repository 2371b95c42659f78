// gemm_nvfp4: out = x W^T for NVFP4 weights (e2m1 codes, an e4m3 scale per 16 inputs, a factor per matrix) and many rows of bf16 x.
// gemm.cuh has the product, nvfp4.cuh the meaning of codes and scale words.
//
// Shapes  x [rows, k] bf16, W [n, k]; n padded to a multiple of 32, k to one of 128 with zero scales.
// Bytes   W once for each 128 (or fewer) rows of x, x once for each panel of W, mostly from the L2 cache.
// Bound   tensor cores: 2 * rows * n * k operations. With few rows the bytes of W.
#include "gemm.cuh"

struct Nvfp4 : PlainLoads {
    static constexpr int TILE_VECTORS = 32;
    static constexpr int WORD_K = 64;
    static constexpr bool GROUPED = false;

    struct Group {
        __device__ __forceinline__ float factor(int) const { return 1.0f; }
        __device__ __forceinline__ float change(int, u32) { return 1.0f; }
    };

    struct Raw {
        uint2 codes;
        u32 scales[2];

        __device__ __forceinline__ void load(const char* tile, u32 lane_codes, const char* words, int half) {
            codes = *reinterpret_cast<const uint2*>(tile + lane_codes + 8 * half);
            scales[0] = shared_load(words);
            scales[1] = shared_load(words + 32);
        }

        __device__ __forceinline__ void operand(u32 (&a)[8], const Group&, int half, u32 t) const {
            const u32 shift = 16 * half + t / 2 * 8;
            const u32 upper_scale = scale_pair(scales[0] >> shift), lower_scale = scale_pair(scales[1] >> shift);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                a[2 * j] = weights(codes.x << (12 - 4 * j), upper_scale);
                a[2 * j + 1] = weights(codes.y << (12 - 4 * j), lower_scale);
            }
        }

        // The lowest byte, times 2^118, as a pair of equal bf16 numbers. An e4m3 number at the top of a float's mantissa is the
        // number times 2^-120.
        static __device__ __forceinline__ u32 scale_pair(u32 word) {
            const float scale = __uint_as_float((word & 0x7fu) << 20) * 0x1p120f * 0x1p118f;
            return __byte_perm(__float_as_uint(scale), 0, 0x3232);
        }

        // The pair of weights in the highest nibbles of both halves.
        static __device__ __forceinline__ u32 weights(u32 nibbles, u32 scale) {
            return multiply_bf16(and_or(nibbles, 0x80008000u, (nibbles >> 6) & 0x01c001c0u), scale);
        }
    };
};

GEMM(gemm_nvfp4_t16, Nvfp4, 16, 2, 8)
GEMM(gemm_nvfp4_t32, Nvfp4, 32, 2, 4)
GEMM(gemm_nvfp4_t64, Nvfp4, 64, 2, 4)
GEMM(gemm_nvfp4_t64_wide, Nvfp4, 64, 4, 3)
GEMM(gemm_nvfp4_t128, Nvfp4, 128, 4, 2)
