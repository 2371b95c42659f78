// moe_fp8: the products of a layer of experts with E4M3 weights at decode, as in moe_int4.
//
// Shapes  as moe_int4, with a scale per row and 128 inputs.
// Bytes   the weights of the chosen experts, n * k * (1 + 4 / 128) each, once for up to 16 of their rows.
// Bound   memory bandwidth.
#include "fp8.cuh"
#include "moe_many.cuh"

EXPERTS(fp8, Fp8, 4, 8)

EXPERTS_MANY(fp8, Fp8)
