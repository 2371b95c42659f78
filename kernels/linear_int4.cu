// linear_int4: out = x W^T + bias for 4-bit integer weights (AWQ, GPTQ: code, zero point and scale per group) and up to 32
// rows of bf16 x: the linear layers of decode. Every weight is read once.
//
// Shapes  x [rows, k] bf16, W [n, k], bias [n] f32 (may be absent), out [rows, n] bf16 or f32; group size 32, 64, 128;
//         n padded to a multiple of 32, k to one of 128 with zero scales; k itself a multiple of 8.
// Bytes   n * k * (1/2 + 4 / group) of weights; x once more per 32 rows of W, from the L2 cache.
// Bound   memory bandwidth. Tensor cores multiply 8 rows of x at a time, used or not; on GB10 they wait for memory up to 32.
#include "int4.cuh"
#include "linear.cuh"

LINEAR(linear_g32_t1, Int4<32>, 1, 2)
LINEAR(linear_g32_t2, Int4<32>, 2, 1)
LINEAR(linear_g32_t4, Int4<32>, 4, 1)
LINEAR(linear_g64_t1, Int4<64>, 1, 2)
LINEAR(linear_g64_t2, Int4<64>, 2, 1)
LINEAR(linear_g64_t4, Int4<64>, 4, 1)
LINEAR(linear_g128_t1, Int4<128>, 1, 2)
LINEAR(linear_g128_t2, Int4<128>, 2, 1)
LINEAR(linear_g128_t4, Int4<128>, 4, 1)
