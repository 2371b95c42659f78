// gemm_g64: out = x W^T for 4-bit integer weights in groups of 64 and many rows of x: linear layers and experts at prefill. See
// gemm_int4.cuh.
#include "gemm_int4.cuh"

GEMM(gemm_g64_t16, Int4<64>, 16, 2, 8)
GEMM(gemm_g64_t32, Int4<64>, 32, 2, 4)
GEMM(gemm_g64_t64, Int4<64>, 64, 2, 4)
GEMM(gemm_g64_t64_wide, Int4<64>, 64, 4, 3)
GEMM(gemm_g64_t128, Int4<64>, 128, 4, 2)
