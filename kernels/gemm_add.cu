// gemm_add: the end of a product whose k was split over blocks: out = sum over splits, in their order, times the row's factor,
// plus bias.
//
// Shapes  partial [splits, rows, stride] f32, out [rows, columns] bf16 or f32, n of its columns from the first on.
// Bytes   rows * n * (4 * splits + 2), mostly from the L2 cache, where the blocks have just put it.
// Bound   latency: there are few rows, else k would not have been split.
#include "prelude.cuh"

struct GemmAddParams {
    const float* partial;
    const float* row_scales; // [n] or null
    const float* bias;       // [n] or null
    void* out;
    u32 n;
    u32 stride;
    u32 rows;
    u32 splits;
    u32 out_columns;
    u32 first_column;
    u32 out_is_f32;
    u32 padding;
};
PARAMS(GemmAddParams);

// One thread per 4 columns of a row (blockIdx.y).
extern "C" __global__ void __launch_bounds__(128) gemm_add(const GemmAddParams p) {
    wait_for_predecessor();
    allow_successor();
    const u32 column = 4 * (blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
    if (column >= p.n) return;
    // The stride is n with padding: four columns are always there.
    const float* partial = p.partial + u64(row) * p.stride + column;
    float sum[4] = {};
#pragma unroll 4
    for (u32 i = 0; i < p.splits; i++) {
        const float4 part = *reinterpret_cast<const float4*>(partial + u64(i) * p.rows * p.stride);
        sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
    }
    const u32 count = min(p.n - column, 4u);
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        if (j >= count) break;
        if (p.row_scales) sum[j] *= p.row_scales[column + j];
        if (p.bias) sum[j] += p.bias[column + j];
    }
    const u64 at = u64(row) * p.out_columns + p.first_column + column;
    const bool is_whole = count == 4 && (p.out_columns | p.first_column) % 4 == 0;
    if (is_whole && p.out_is_f32) {
        *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = make_float4(sum[0], sum[1], sum[2], sum[3]);
    } else if (is_whole) {
        *reinterpret_cast<uint2*>(static_cast<u16*>(p.out) + at) = make_uint2(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]));
    } else {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (j >= count) break;
            if (p.out_is_f32) {
                static_cast<float*>(p.out)[at + j] = sum[j];
            } else {
                static_cast<u16*>(p.out)[at + j] = u16(pack_bf16(sum[j], 0.0f));
            }
        }
    }
}
