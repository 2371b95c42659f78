// moe_bf16: the products of a layer of experts with bf16 weights at decode, as in moe_int4.
//
// Shapes  as moe_int4.
// Bytes   the weights of the chosen experts, 2 * n * k each, once for up to 16 of their rows.
// Bound   memory bandwidth.
#include "bf16.cuh"
#include "moe_many.cuh"

EXPERTS(bf16, Bf16, 4, 8)

EXPERTS_MANY(bf16, Bf16)
