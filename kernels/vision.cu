// What the vision encoder does besides products, norms and attention: patches (pixels to normalised bf16) and add_position
// (the interpolated position table).
//
// Shapes  patches: pixels [num_patches, 3, frames, area] u8, out [num_patches, 3, temporal, area] bf16; a frame that is
//         missing repeats the last one.
//         add_position: x [num_patches, hidden], table [side * side, hidden] bf16, hidden a multiple of 8. Patches are in
//         merge-block order, one frame after the other.
// Bytes   patches 3 for each element (one byte read for `temporal / frames` elements); add_position 4 for each element, the
//         table from the L2 cache.
// Bound   memory bandwidth.
#include "prelude.cuh"

struct PatchesParams {
    const u8* pixels;
    bf16* out;
    u64 num_elements;
    u32 area;
    u32 temporal;
    u32 frames;
    float mean[3]; // of pixels from 0 to 255
    float std[3];
    u32 unused;
};
PARAMS(PatchesParams);

// Where the pixel of element `i` of the result is, and its channel.
__device__ __forceinline__ u64 pixel_of(const PatchesParams& p, u64 i, u32& channel) {
    const u64 plane = i / p.area;
    const u32 frame = min(u32(plane % p.temporal), p.frames - 1);
    const u64 source_plane = plane / p.temporal;
    channel = u32(source_plane % 3);
    return (source_plane * p.frames + frame) * p.area + i % p.area;
}

__device__ __forceinline__ float normalized(const PatchesParams& p, u32 value, u32 channel) {
    const float mean = channel == 0 ? p.mean[0] : channel == 1 ? p.mean[1] : p.mean[2];
    const float std = channel == 0 ? p.std[0] : channel == 1 ? p.std[1] : p.std[2];
    return __fdiv_rn(__fsub_rn(float(value), mean), std);
}

// Eight elements a thread, of one frame and channel: areas are multiples of 8.
extern "C" __global__ void __launch_bounds__(256) patches_v8(const PatchesParams p) {
    wait_for_predecessor();
    allow_successor();
    const u64 first = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (first >= p.num_elements) return;
    u32 channel;
    const uint2 raw = *reinterpret_cast<const uint2*>(p.pixels + pixel_of(p, first, channel));
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = normalized(p, ((i < 4 ? raw.x : raw.y) >> i % 4 * 8) & 0xff, channel);
    *reinterpret_cast<uint4*>(p.out + first) = pack(x, bf16());
}

extern "C" __global__ void __launch_bounds__(256) patches_v1(const PatchesParams p) {
    wait_for_predecessor();
    allow_successor();
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.num_elements) return;
    u32 channel;
    const u32 value = p.pixels[pixel_of(p, i, channel)];
    p.out[i].bits = u16(pack_bf16(normalized(p, value, channel), 0.0f));
}

struct PositionParams {
    uint4* x;
    const uint4* table;
    u32 row_vectors;
    u32 height;
    u32 width;
    u32 merge;
    u32 side;
    u32 unused;
};
PARAMS(PositionParams);

// The two table lines around patch `i` of `n`, and the weight of the second. Corners are aligned.
__device__ __forceinline__ void taps(u32 i, u32 n, u32 side, u32 (&lines)[2], float& weight) {
    const float source = __fdiv_rn(__fmul_rn(float(i), float(side - 1)), float(max(n - 1, 1u)));
    lines[0] = min(u32(source), side - 1);
    lines[1] = min(lines[0] + 1, side - 1);
    weight = __fsub_rn(source, float(lines[0]));
}

// One block per patch.
extern "C" __global__ void __launch_bounds__(256) add_position(const PositionParams p) {
    const u32 patch = blockIdx.x % (p.height * p.width);
    const u32 area = p.merge * p.merge, block = patch / area, inside = patch % area;
    const u32 blocks_per_line = p.width / p.merge;
    const u32 row = block / blocks_per_line * p.merge + inside / p.merge;
    const u32 column = block % blocks_per_line * p.merge + inside % p.merge;
    u32 r[2], c[2];
    float dr, dc;
    taps(row, p.height, p.side, r, dr);
    taps(column, p.width, p.side, c, dc);
    const float weights[4] = {__fmul_rn(1.0f - dr, 1.0f - dc), __fmul_rn(1.0f - dr, dc), __fmul_rn(dr, 1.0f - dc),
                              __fmul_rn(dr, dc)};
    wait_for_predecessor();
    allow_successor();
    uint4* x = p.x + u64(blockIdx.x) * p.row_vectors;
    for (u32 i = threadIdx.x; i < p.row_vectors; i += blockDim.x) {
        float position[8] = {};
#pragma unroll
        for (u32 corner = 0; corner < 4; corner++) {
            float line[8];
            unpack(p.table[u64(r[corner / 2] * p.side + c[corner % 2]) * p.row_vectors + i], line, bf16());
#pragma unroll
            for (int j = 0; j < 8; j++) position[j] = __fadd_rn(position[j], __fmul_rn(line[j], weights[corner]));
        }
        float values[8];
        unpack(x[i], values, bf16());
#pragma unroll
        for (int j = 0; j < 8; j++) values[j] += position[j];
        x[i] = pack(values, bf16());
    }
}
