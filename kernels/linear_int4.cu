// linear_int4: out = x W^T + bias for 4-bit integer weights (AWQ, GPTQ: code, zero point and scale per group) and the few rows
// of bf16 x of decode.
//
// Shapes  x [rows, k] bf16, W [n, k], bias [n] f32 (may be absent), out [rows, n] bf16 or f32, possibly columns of a wider
//         matrix; group size 32, 64, 128; n padded to a multiple of 32, k to one of 128 with zero scales; k itself a multiple of 16.
// Bytes   n * k * (1/2 + 4 / group) of weights, from memory once; x once more per 16 or 32 rows of W, from the L2 cache.
// Bound   memory bandwidth for few rows of x; with 32, each byte of weights needs four of x from the L2 cache.
#include "int4.cuh"
#include "linear_many.cuh"

LINEAR(g32, Int4<32>, 4, 2)
LINEAR(g64, Int4<64>, 2, 1)
LINEAR(g128, Int4<128>, 2, 2)

LINEAR_MANY(g32, Int4<32>)
LINEAR_MANY(g64, Int4<64>)
LINEAR_MANY(g128, Int4<128>)
