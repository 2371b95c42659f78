// gemm_fp8x_g32: out = x W^T for 4-bit integer weights in groups of 32 and many rows of x that were quantised to e4m3: linear layers and
// experts at prefill. See gemm_fp8x.cuh.
//
// Shapes  x [rows, k] e4m3 of fp8_rows.cu, W [n, k], n padded to a multiple of 32, k to one of 128.
// Bytes   W once for each 64 rows of x, x once for each panel of W, mostly from the L2 cache.
// Bound   tensor cores: 2 * rows * n * k operations at twice the rate of bf16.
#include "gemm.cuh"

GEMM(gemm_fp8x_g32, Int4Fp8<32>, 64, 4, FP8X_BLOCKS)
