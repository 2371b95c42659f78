// linear_bf16: out = x W^T + bias for bf16 weights and the few rows of bf16 x of decode: the head, the router of a layer whose
// rows are many, layers that a quantised checkpoint leaves as they were.
//
// Shapes  as linear_int4.
// Bytes   2 * n * k of weights, from memory once; x once more per 16 or 32 rows of W, from the L2 cache.
// Bound   memory bandwidth. With 32 rows of x, each byte of weights needs one of x from the L2 cache.
#include "bf16.cuh"
#include "linear_many.cuh"

LINEAR(bf16, Bf16, 3, 2)

LINEAR_MANY(bf16, Bf16)
