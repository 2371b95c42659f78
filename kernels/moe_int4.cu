// moe_int4: the two products of a layer of experts with 4-bit integer weights at decode. gate_up: inner = silu(gate x) * up x
// for every pair (row, chosen expert); down: partial = down inner; down_row: down of a single row with the sum over its experts.
// router.cu or moe.cu lists the pairs before, moe.cu adds them after.
//
// Shapes  x [rows, hidden] bf16, inner [pairs, intermediate] bf16, partial [pairs, hidden] f32; per expert gate and up
//         [2 * intermediate, hidden], down [hidden, intermediate]; group size 32, 64, 128; intermediate a multiple of 16.
// Bytes   the weights of the chosen experts, n * k * (1/2 + 4 / group) each, once for up to 16 of their rows.
// Bound   memory bandwidth.
#include "int4.cuh"
#include "moe_many.cuh"

EXPERTS(g32, Int4<32>, 6, 12)
EXPERTS(g64, Int4<64>, 4, 6)
EXPERTS(g128, Int4<128>, 4, 6)

EXPERTS_MANY(g32, Int4<32>)
EXPERTS_MANY(g64, Int4<64>)
EXPERTS_MANY(g128, Int4<128>)
