// linear_fp8: out = x W^T + bias for E4M3 weights with a scale per row and 128 inputs, and the few rows of bf16 x of decode,
// activations unquantised.
//
// Shapes  as linear_int4.
// Bytes   n * k * (1 + 4 / 128) of weights, from memory once; x once more per 16 or 32 rows of W, from the L2 cache.
// Bound   memory bandwidth.
#include "fp8.cuh"
#include "linear_many.cuh"

LINEAR(fp8, Fp8, 2, 2)

LINEAR_MANY(fp8, Fp8)
