// Weights as checkpoints hold them, row by row, brought into the packed layout (crates/cuda/src/kernels/pack.rs makes the
// same on the host, docs/kernels/weights.md draws it). One launch takes several matrices of one shape (experts), or some
// rows of one matrix; they become rows of larger matrices (gate and up of one product).
// Bytes: each is read once and written once. Bound: the copy that brings the source to the device.
#include "prelude.cuh"

struct RepackParams {
    // Of the first matrix: codes or scales, and what goes with them.
    const u8* source;
    const u8* zeros;      // INT4: zero points, or null for 8
    const float* factors; // NVFP4: [matrices]
    u8* target;           // the part of the first target matrix that the kernel writes: codes or scales
    float* row_scales;    // NVFP4: [n] of the first target matrix
    // Bytes from one matrix to the next.
    u64 source_stride, zeros_stride, target_stride;
    u32 first_row;    // where the source's first row goes
    u32 rows;         // of the source
    u32 n;            // rows of the target
    u32 k;            // inputs, a multiple of 16
    u32 columns;      // inputs of the target, with padding
    u32 dtype;        // of the source where it has one: 0 float32, 1 float16, 2 bfloat16
    u32 group;        // inputs that share a scale in the source
    u32 block_rows;   // FP8: rows that share a scale in the source
    u32 row_in_block; // FP8: place of the source's first row in its block
    u32 padding;
};
PARAMS(RepackParams);

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Bits of the nearest bfloat16, ties to even; a NaN stays one.
__device__ __forceinline__ u32 bf16_bits(float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

__device__ __forceinline__ float element(const u8* values, u64 index, u32 dtype) {
    if (dtype == 0) return reinterpret_cast<const float*>(values)[index];
    const u16 bits = reinterpret_cast<const u16*>(values)[index];
    return dtype == 1 ? half_to_float(bits) : __uint_as_float(u32(bits) << 16);
}

// Which row of the source becomes row `in_tile` of this block's 16 target rows; above `rows` (as unsigned) for none.
__device__ __forceinline__ u32 source_row(const RepackParams& p, u32 in_tile) {
    return (p.first_row / 16 + blockIdx.y) * 16 + in_tile - p.first_row;
}

// The vector of 16 bytes that this thread writes; null behind the last one of a row of tiles.
__device__ __forceinline__ uint4* target_vector(const RepackParams& p, u32 vector, u32 vectors) {
    if (vector >= vectors) return nullptr;
    u8* matrix = p.target + blockIdx.z * p.target_stride;
    return reinterpret_cast<uint4*>(matrix) + (u64(p.first_row / 16 + blockIdx.y) * vectors + vector);
}

// The eight codes of a word: the even ones to its lower half, the odd ones to the upper half.
__device__ __forceinline__ u32 by_halves(u32 natural) {
    auto half = [](u32 bytes) {
        const u32 pairs = (bytes | bytes >> 4) & 0x00ff00ffu;
        return (pairs | pairs >> 8) & 0xffffu;
    };
    return half(natural & 0x0f0f0f0fu) | half(natural >> 4 & 0x0f0f0f0fu) << 16;
}

// 4-bit codes [rows, k / 2] bytes. Grid: vectors of a row of tiles, rows of tiles, matrices.
extern "C" __global__ void __launch_bounds__(256) repack_codes_4(RepackParams p) {
    wait_for_predecessor();
    const u32 vector = blockIdx.x * blockDim.x + threadIdx.x;
    uint4* target = target_vector(p, vector, p.columns / 2);
    if (!target) return;
    const u8* source = p.source + blockIdx.z * p.source_stride;
    const u32 lane = vector % 32, k0 = vector / 32 * 64 + lane % 4 * 8;
    const u32 upper = source_row(p, lane / 4), lower = source_row(p, lane / 4 + 8);
    auto word = [&](u32 row, u32 k) {
        if (row >= p.rows || k >= p.k) return 0u;
        return by_halves(*reinterpret_cast<const u32*>(source + u64(row) * (p.k / 2) + k / 2));
    };
    const uint4 v = make_uint4(word(upper, k0), word(lower, k0), word(upper, k0 + 32), word(lower, k0 + 32));
    if (upper < p.rows && lower < p.rows) {
        *target = v;
    } else if (upper < p.rows) {
        target->x = v.x, target->z = v.z;
    } else if (lower < p.rows) {
        target->y = v.y, target->w = v.w;
    }
}

// E4M3 values [rows, k]. Grid as above.
extern "C" __global__ void __launch_bounds__(256) repack_codes_8(RepackParams p) {
    wait_for_predecessor();
    const u32 vector = blockIdx.x * blockDim.x + threadIdx.x;
    uint4* target = target_vector(p, vector, p.columns);
    if (!target) return;
    const u8* source = p.source + blockIdx.z * p.source_stride;
    const u32 lane = vector % 32, k = vector / 32 * 32 + lane % 4 * 8;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 row = source_row(p, lane / 4 + 8 * half);
        if (row >= p.rows) continue;
        uint2 v = make_uint2(0, 0);
        if (k < p.k) v = *reinterpret_cast<const uint2*>(source + u64(row) * p.k + k);
        reinterpret_cast<uint2*>(target)[half] = v;
    }
}

// Values [rows, k] of `dtype`. Grid as above.
extern "C" __global__ void __launch_bounds__(256) repack_codes_16(RepackParams p) {
    wait_for_predecessor();
    const u32 vector = blockIdx.x * blockDim.x + threadIdx.x;
    uint4* target = target_vector(p, vector, 2 * p.columns);
    if (!target) return;
    const u32 lane = vector % 32, half = vector / 32 % 2, k = vector / 64 * 32 + lane % 4 * 8;
    const u32 row = source_row(p, lane / 4 + 8 * half);
    if (row >= p.rows) return;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (k < p.k) {
        const u64 index = u64(row) * p.k + k;
        const u8* source = p.source + blockIdx.z * p.source_stride + index * (p.dtype == 0 ? 4 : 2);
        const uint4* vectors = reinterpret_cast<const uint4*>(source);
        if (p.dtype == 2) {
            v = vectors[0];
        } else {
            u32 words[4];
            const uint4 first = vectors[0], second = p.dtype == 0 ? vectors[1] : first;
            const u32 raw[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float low = p.dtype == 0 ? __uint_as_float(raw[2 * i]) : half_to_float(u16(raw[i]));
                const float high = p.dtype == 0 ? __uint_as_float(raw[2 * i + 1]) : half_to_float(u16(raw[i] >> 16));
                words[i] = bf16_bits(low) | bf16_bits(high) << 16;
            }
            v = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
    *target = v;
}

// Where a word of scales is written: words [columns / k_per_word, 16] of a row of tiles. Null when there is none, else `row`
// and `word` are its place in the source.
__device__ __forceinline__ u32* scale_word(const RepackParams& p, u32 words, u32& row, u32& word) {
    const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    row = source_row(p, index % 16), word = index / 16;
    if (word >= words || row >= p.rows) return nullptr;
    u8* matrix = p.target + blockIdx.z * p.target_stride;
    return reinterpret_cast<u32*>(matrix) + (u64(p.first_row / 16 + blockIdx.y) * words * 16 + index);
}

// INT4: scales [rows, groups] of `dtype`, zero points [rows, groups] u8. Grid: words of a row of tiles, rows of tiles,
// matrices.
extern "C" __global__ void __launch_bounds__(256) repack_scales_int4(RepackParams p) {
    wait_for_predecessor();
    u32 row, word;
    u32* target = scale_word(p, p.columns / p.group, row, word);
    if (!target) return;
    const u32 groups = (p.k + p.group - 1) / p.group;
    u32 result = 0;
    if (word < groups) {
        const u64 index = u64(row) * groups + word;
        const u32 bits = __float_as_uint(element(p.source + blockIdx.z * p.source_stride, index, p.dtype));
        const u32 rounded = bits > 0xffffffffu - 16u ? 0xffffffffu : bits + 16u;
        const u32 zero = p.zeros ? p.zeros[blockIdx.z * p.zeros_stride + index] : 8u;
        result = (rounded & ~31u) | (zero & 31u);
    }
    *target = result;
}

// NVFP4: E4M3 scales [rows, k / 16], four a word; the matrix's factor to every row. Grid as above.
extern "C" __global__ void __launch_bounds__(256) repack_scales_nvfp4(RepackParams p) {
    wait_for_predecessor();
    u32 row, word;
    u32* target = scale_word(p, p.columns / 64, row, word);
    if (!target) return;
    const u32 groups = p.k / 16;
    const u8* source = p.source + blockIdx.z * p.source_stride + u64(row) * groups;
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) {
        if (4 * word + i < groups) result |= u32(source[4 * word + i]) << (8 * i);
    }
    *target = result;
    // The kernels compute with 2^-8 of the weights.
    if (word == 0) p.row_scales[blockIdx.z * u64(p.n) + p.first_row + row] = p.factors[blockIdx.z] * 256.0f;
}

// FP8: float32 scales [blocks of rows, blocks of inputs], from the block of the first row on. Grid as above.
extern "C" __global__ void __launch_bounds__(256) repack_scales_fp8(RepackParams p) {
    wait_for_predecessor();
    u32 row, word;
    u32* target = scale_word(p, p.columns / 128, row, word);
    if (!target) return;
    const u32 blocks = (p.k + p.group - 1) / p.group;
    const u64 index = u64((p.row_in_block + row) / p.block_rows) * blocks + word * 128 / p.group;
    *target = reinterpret_cast<const u32*>(p.source + blockIdx.z * p.source_stride)[index];
}
