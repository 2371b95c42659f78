// moe_nvfp4: the two products of a layer of experts with NVFP4 weights at decode. gate_up: inner = silu(gate x) * up x for
// every pair (row, chosen expert); down: partial = down inner. moe.cu sorts the pairs before and adds them after.
//
// Shapes  as moe_int4, with a scale per 16 inputs and a factor per matrix.
// Bytes   the weights of the chosen experts, n * k * (1/2 + 1/16) each, once for up to 8 of their rows.
// Bound   memory bandwidth, as moe_int4.
#include "moe.cuh"
#include "nvfp4.cuh"

EXPERTS(nvfp4, Nvfp4, 2)
