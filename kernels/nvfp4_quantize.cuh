// Rows of bf16 numbers as E2M1 codes with an E4M3 scale for every 16 and a float32 factor for a row, in the order in which
// nvfp4_mma.cu reads them. Arithmetic alone, nothing that only some processors have, so the same text runs anywhere. No kernel.
//
// The factor of a row is its largest magnitude / (6 * 448), or one that is given for all rows. A scale is largest of 16 / (6 * factor),
// rounded to E4M3; a code is number / (scale * factor), rounded to E2M1; ties go to the even code in both.
#pragma once
#include "prelude.cuh"

constexpr float E2M1_MAX = 6.0f;
constexpr float E4M3_MAX = 448.0f;
// Rows below this are zero: the numbers that follow from the factor would not all be normal.
constexpr float LEAST_AMAX = 0x1p-90f;

// Bits of the E4M3 number nearest to `value`, which is not negative; at most 448.
__device__ __forceinline__ u32 to_e4m3(float value) {
    value = fminf(value, E4M3_MAX);
    // Below 2^-6 steps are 2^-9: 1.5 * 2^23 leaves a whole number of them in the lowest bits.
    const u32 small = __float_as_uint(value * 512.0f + 12582912.0f) & 15u;
    const u32 bits = __float_as_uint(value);
    const u32 large = ((bits + 0x0007ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    return value < 0x1p-6f ? small : large;
}

// The value of an E4M3 number without sign.
__device__ __forceinline__ float from_e4m3(u32 bits) { return __uint_as_float(bits << 20) * 0x1p120f; }

// Bits of the E2M1 number nearest to `value`; at most 6.
__device__ __forceinline__ u32 to_e2m1(float value) {
    const float size = fabsf(value);
    const u32 code = u32(size > 0.25f) + u32(size >= 0.75f) + u32(size > 1.25f) + u32(size >= 1.75f) + u32(size > 2.5f) +
                     u32(size >= 3.5f) + u32(size > 5.0f);
    return code | (__float_as_uint(value) >> 31) << 3;
}

// The larger magnitude, as bits: numbers that are not finite are larger than all others.
__device__ __forceinline__ u32 max_magnitude(u32 most, const uint4& eight) {
    const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; i++) most = max(most, max(words[i] & 0x7fffu, words[i] >> 16 & 0x7fffu));
    return most;
}

// A row's factor from its largest magnitude: not a number if that is not finite, so that no result hides it.
__device__ __forceinline__ float row_factor(u32 most) {
    const float amax = __uint_as_float(most << 16);
    if (most >= 0x7f80u) return __uint_as_float(0x7fc00000u);
    return amax < LEAST_AMAX ? 0.0f : amax / (E2M1_MAX * E4M3_MAX);
}

// Where the word of 8 inputs from 8 * run on is in a row: of 128 k, a lane's four words for two products lie side by side.
__device__ __forceinline__ u32 word_place(u32 run) {
    const u32 t = run % 4, half = run / 4 % 2, product = run / 8 % 2;
    return run / 16 * 16 + 4 * t + 2 * product + half;
}

// Eight codes as the packed weights have them: number j of a run in nibble j / 2, of an odd one in nibble j / 2 + 4.
__device__ __forceinline__ u32 codes_of(const uint4& eight, float inverse) {
    float v[8];
    unpack(eight, v, bf16());
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) word |= to_e2m1(v[j] * inverse) << (4 * (j / 2 + j % 2 * 4));
    return word;
}

struct QuantizeParams {
    const u16* x;      // [rows, columns] bf16
    u32* codes;        // [rows, padded / 8]
    u8* scales;        // [rows, padded / 16]
    float* factors;    // [rows]
    u32 columns;       // a multiple of 16
    u32 padded;        // a multiple of 128
    float given;       // the factor of every row, or 0: its own
    u32 padding;
};
PARAMS(QuantizeParams);

constexpr u32 QUANTIZE_THREADS = 128;

// The largest over the block, the same in every thread.
__device__ __forceinline__ u32 block_max(u32 value) {
    __shared__ u32 most[QUANTIZE_THREADS / 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = value;
    __syncthreads();
#pragma unroll
    for (u32 warp = 0; warp < QUANTIZE_THREADS / 32; warp++) value = max(value, most[warp]);
    return value;
}

// A block has row blockIdx.x. Zeros behind the last column.
__device__ __forceinline__ void quantize_row(const QuantizeParams& p) {
    wait_for_predecessor();
    allow_successor();
    const uint4* x = reinterpret_cast<const uint4*>(p.x + u64(blockIdx.x) * p.columns);
    float factor = p.given;
    if (factor == 0.0f) {
        u32 most = 0;
        for (u32 i = threadIdx.x; i < p.columns / 8; i += QUANTIZE_THREADS) most = max_magnitude(most, x[i]);
        factor = row_factor(block_max(most));
    }
    if (threadIdx.x == 0) p.factors[blockIdx.x] = factor;
    u32* codes = p.codes + u64(blockIdx.x) * (p.padded / 8);
    u8* scales = p.scales + u64(blockIdx.x) * (p.padded / 16);
    for (u32 group = threadIdx.x; group < p.padded / 16; group += QUANTIZE_THREADS) {
        uint4 low = make_uint4(0, 0, 0, 0), high = low;
        if (group < p.columns / 16) low = x[2 * group], high = x[2 * group + 1];
        const float amax = __uint_as_float(max_magnitude(max_magnitude(0, low), high) << 16);
        // Of a row of zeros, or one that is not finite, every code and scale is zero.
        const u32 scale = factor > 0.0f ? to_e4m3(amax / (E2M1_MAX * factor)) : 0;
        const float inverse = scale > 0 ? 1.0f / (from_e4m3(scale) * factor) : 0.0f;
        scales[group] = u8(scale);
        codes[word_place(2 * group)] = scale > 0 ? codes_of(low, inverse) : 0;
        codes[word_place(2 * group + 1)] = scale > 0 ? codes_of(high, inverse) : 0;
    }
}
