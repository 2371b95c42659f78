// gemm_bf16: out = x W^T for bf16 weights and many rows of x: linear layers, logits, router, the vision encoder. gemm.cuh has the
// product.
//
// Shapes  x [rows, k] bf16, W [n, k] in tiles of 16 rows by 32 k: 32 times 16 bytes of rows g, then of rows g + 8.
// Bytes   W once for each 128 (or fewer) rows of x, x once for each panel of W, mostly from the L2 cache.
// Bound   tensor cores: 2 * rows * n * k operations. With few rows the bytes of W.
#include "gemm.cuh"

struct Bf16 {
    static constexpr int TILE_VECTORS = 128;
    static constexpr int WORD_K = 0;
    static constexpr bool PIPELINED = true;
    static constexpr bool HAS_AFTER = true;
    static constexpr bool GROUPED = false;
    static constexpr bool FP8_X = false;

    struct Group {
        __device__ __forceinline__ float factor(int) const { return 1.0f; }
        __device__ __forceinline__ float change(int, u32) { return 1.0f; }
    };

    // Loads of 16 bytes would bring rows g and g + 8 in other registers than the product takes. Matrix loads bring them as they are,
    // with k in another order, for both operands alike. Rows of both lie so that 8 of them are in 32 banks.
    static __device__ __forceinline__ u32 code_place(u32 vector) {
        // Row g of the tile's half, and which quarter of its 32 inputs.
        const u32 row = vector / 4 % 8;
        return vector ^ (row / 2 & 3);
    }
    static __device__ __forceinline__ u32 x_place(u32 chunk, u32 token) { return chunk ^ (token & 7); }

    // For the first 16 k: rows g, rows g + 8, both again for the next 8 inputs. Bit 5 is turned for the next 16.
    static __device__ __forceinline__ u32 lane_codes(u32 lane) { return 16 * code_place(lane / 8 % 2 * 32 + 4 * (lane % 8) + lane / 16); }
};

GEMM(gemm_bf16_t16, Bf16, 16, 2, 8)
GEMM(gemm_bf16_t32, Bf16, 32, 2, 4)
GEMM(gemm_bf16_t64, Bf16, 64, 2, 4)
GEMM(gemm_bf16_t64_wide, Bf16, 64, 4, 2)
GEMM(gemm_bf16_t128, Bf16, 128, 2, 2)
