// linear_nvfp4: out = x W^T + bias for NVFP4 weights (e2m1 codes, an e4m3 scale per 16 inputs, a factor per matrix) and up
// to 32 rows of bf16 x: the linear layers of decode, activations unquantised. Every weight is read once.
//
// Shapes  x [rows, k] bf16, W [n, k], bias [n] f32 (may be absent), out [rows, n] bf16 or f32; n padded to a multiple of
//         32, k to one of 128 with zero scales; k itself a multiple of 16.
// Bytes   n * k * (1/2 + 1/16) of weights; x once more per 32 rows of W, from the L2 cache.
// Bound   memory bandwidth, as linear_int4.
#include "linear.cuh"
#include "nvfp4.cuh"

LINEAR(linear_nvfp4_t1, Nvfp4, 1, 2)
LINEAR(linear_nvfp4_t2, Nvfp4, 2, 2)
LINEAR(linear_nvfp4_t4, Nvfp4, 4, 1)
