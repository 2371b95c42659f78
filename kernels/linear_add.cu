// linear_add: the end of a linear layer whose k was cut into parts (linear_many.cuh): out = sum over parts, as a tree, times the
// row's factor, plus bias.
//
// Shapes  partial [4 or 8 parts, rows, n padded to 32] f32, out [rows, columns] bf16 or f32, n of its columns from the first on.
// Bytes   rows * n * (4 * parts + 2), mostly from the L2 cache, where the blocks have just put it.
// Bound   latency.
#include "linear.cuh"

// One thread per 4 rows of W of a row of x (blockIdx.y).
template <int PARTS> __device__ __forceinline__ void add(const LinearParams& p) {
    wait_for_predecessor();
    allow_successor();
    const u32 stride = (p.n + 31) / 32 * 32, first = 4 * (blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
    if (first >= p.n) return;
    float4 nodes[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; i++)
        nodes[i] = *reinterpret_cast<const float4*>(p.partial + (u64(i) * p.rows + row) * stride + first);
#pragma unroll
    for (int width = 1; width < PARTS; width *= 2) {
#pragma unroll
        for (int i = 0; i < PARTS; i += 2 * width) {
            const float4 other = nodes[i + width];
            nodes[i].x += other.x, nodes[i].y += other.y, nodes[i].z += other.z, nodes[i].w += other.w;
        }
    }
    float sums[4] = {nodes[0].x, nodes[0].y, nodes[0].z, nodes[0].w};
    const u32 count = min(p.n - first, 4u);
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        if (j >= count) break;
        if (p.row_scales) sums[j] *= p.row_scales[first + j];
        if (p.bias) sums[j] += p.bias[first + j];
    }
    const u64 at = u64(row) * p.out_columns + first;
    // `out` starts at a column of a wider matrix.
    const u32 alignment = p.out_is_f32 ? 16 : 8;
    const bool is_whole = count == 4 && p.out_columns % 4 == 0 && u64(p.out) % alignment == 0;
    if (p.out_is_f32) {
        float* out = static_cast<float*>(p.out) + at;
        if (is_whole) {
            *reinterpret_cast<float4*>(out) = make_float4(sums[0], sums[1], sums[2], sums[3]);
        } else {
            for (u32 j = 0; j < count; j++) out[j] = sums[j];
        }
    } else {
        u16* out = static_cast<u16*>(p.out) + at;
        if (is_whole) {
            *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(sums[0], sums[1]), pack_bf16(sums[2], sums[3]));
        } else {
            for (u32 j = 0; j < count; j++) out[j] = u16(pack_bf16(sums[j], 0.0f));
        }
    }
}

extern "C" __global__ void __launch_bounds__(128) linear_add_4(const LinearParams p) { add<4>(p); }
extern "C" __global__ void __launch_bounds__(128) linear_add_8(const LinearParams p) { add<8>(p); }
