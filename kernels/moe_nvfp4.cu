// moe_nvfp4: the products of a layer of experts with NVFP4 weights at decode, as in moe_int4.
//
// Shapes  as moe_int4, with a scale per 16 inputs and a factor per matrix.
// Bytes   the weights of the chosen experts, n * k * (1/2 + 1/16) each, once for up to 16 of their rows.
// Bound   memory bandwidth, as moe_int4.
#include "moe_many.cuh"
#include "nvfp4.cuh"

EXPERTS(nvfp4, Nvfp4, 4, 6)

EXPERTS_MANY(nvfp4, Nvfp4)
