// linear_nvfp4: out = x W^T + bias for NVFP4 weights (e2m1 codes, an e4m3 scale per 16 inputs, a factor per matrix) and the few
// rows of bf16 x of decode, activations unquantised.
//
// Shapes  as linear_int4.
// Bytes   n * k * (1/2 + 1/16) of weights, from memory once; x as in linear_int4.
// Bound   as linear_int4; on an H100 also the instructions that take codes apart.
#include "linear_many.cuh"
#include "nvfp4.cuh"

LINEAR(nvfp4, Nvfp4, 2, 2)

LINEAR_MANY(nvfp4, Nvfp4)
