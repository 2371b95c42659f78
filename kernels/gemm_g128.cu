// gemm_g128: out = x W^T for 4-bit integer weights in groups of 128 and many rows of x: linear layers and experts at prefill. See
// gemm_int4.cuh.
#include "gemm_int4.cuh"

GEMM(gemm_g128_t16, Int4<128>, 16, 2, 8)
GEMM(gemm_g128_t32, Int4<128>, 32, 2, 4)
GEMM(gemm_g128_t64, Int4<128>, 64, 2, 4)
GEMM(gemm_g128_t64_wide, Int4<128>, 64, 4, 3)
GEMM(gemm_g128_t128, Int4<128>, 128, 4, 2)
