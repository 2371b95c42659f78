// What the decoder's attention kernels share: parameters, the paged cache and its FP8 form, a head's norm and rotary
// embedding. No kernel.
#pragma once
#include "attention_copy.cuh"
#include "rope.cuh"

struct AttentionParams {
    const u16* qkv;           // [num_tokens, (num_heads + 2 num_kv_heads) head_dim]
    const u16* q_norm;        // [head_dim]
    const u16* k_norm;        // [head_dim]
    u16* out;                 // [num_tokens, num_heads head_dim]; prefill: q before it is replaced by the result
    u8* cache;                // of the layer: [block][kv_head][K | V][token][head_dim]
    u16* scales;              // of the layer, FP8: [block][kv_head][K | V][token] f16
    const u32* positions;     // [num_tokens][3]
    const u64* slot_mapping;  // [num_tokens], all bits set: padding
    const uint4* seqs;        // [num_seqs][2]: slot, query_start, query_len, context_len; blocks_start, 0, 0, 0
    const u32* block_tables;
    const u32* token_seqs;    // [num_tokens]
    float* partial;           // decode: [num_seqs][num_kv_heads][splits] records
    u32* counters;            // decode: [num_seqs][num_kv_heads], zero before and after
    u32 num_heads;
    u32 num_kv_heads;
    u32 group;                // num_heads / num_kv_heads
    u32 num_seqs;
    u32 block_size;           // a multiple of 16
    u32 block_magic;          // floor(2^32 / block_size) + 1
    u32 group_magic;          // floor(2^16 / group) + 1
    u32 is_decode;            // row i is sequence i
    u32 height_end;           // frequencies j with j % 3 = 1 below it turn with the height
    u32 width_end;            // j % 3 = 2: with the width
    float eps;
    float rope_factor;
    float inv_freq[64];
};
PARAMS(AttentionParams);

// log2(e) / sqrt(head_dim): the weights of the softmax are powers of two. An immediate operand where it is used.
template <int D> struct ScoreFactor {
    static_assert(D == 32 || D == 64 || D == 128, "the head widths of the decoder");
    static constexpr float VALUE = LOG2_E * (D == 32 ? 0.17677669529663687f : D == 64 ? 0.125f : 0.08838834764831845f);
};

// A sequence of the step.
struct Seq {
    u32 query_start, query_len, context_len;
    const u32* blocks;
};

__device__ __forceinline__ Seq load_seq(const AttentionParams& p, u32 seq) {
    const uint4 words = p.seqs[2 * seq];
    return {words.y, words.z, words.w, p.block_tables + p.seqs[2 * seq + 1].x};
}

// position / block_size: exact while position * block_size < 2^32, which the wrapper checks.
__device__ __forceinline__ u32 block_of(const AttentionParams& p, u32 position) {
    return __umulhi(position, p.block_magic);
}

// row / group: exact for the rows of a tile.
__device__ __forceinline__ u32 token_of(const AttentionParams& p, u32 row) { return row * p.group_magic >> 16; }

// Index in the layer's cache, in vectors of head_dim, of K of the block's first token; V lies block_size further.
__device__ __forceinline__ u64 first_vector(const AttentionParams& p, u32 block, u32 kv_head) {
    return (u64(block) * p.num_kv_heads + kv_head) * 2 * p.block_size;
}

// The e4m3 numbers of a word as f16, exactly: bytes 0 and 1 in `low`, 2 and 3 in `high`.
__device__ __forceinline__ void widen_e4m3(u32 word, u32& low, u32& high) {
#if __CUDA_ARCH__ >= 890
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}"
        : "=r"(low), "=r"(high)
        : "r"(word));
#else
    // The bits of e4m3, moved, are those of an f16 number that is 2^8 times too small, subnormal ones included.
    const u32 a = __byte_perm(word, 0, 0x1404), b = __byte_perm(word, 0, 0x3424);
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(low) : "r"(and_or(a >> 1, 0x3f803f80u, a & 0x80008000u)), "r"(0x5c005c00u));
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(high) : "r"(and_or(b >> 1, 0x3f803f80u, b & 0x80008000u)), "r"(0x5c005c00u));
#endif
}

constexpr float F16_MAX = 65504.0f;
// Over an FP8 cache, weights times the scales of V are multiplied by this before they become f16, and the results
// divided by it: small ones stay out of the subnormal numbers, and only values of 10^5 and more would reach the
// largest.
constexpr float WEIGHT_FACTOR = 256.0f;

// Nearest e4m3, ties to even, saturating; as the CPU backend.
__device__ __forceinline__ u32 e4m3_bits(float x) {
    const u32 bits = __float_as_uint(x), sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7fu;
    if (magnitude >= 0x43e00000u) return sign | 0x7eu; // 448
    if (magnitude < 0x3c800000u) {                     // 2^-6: subnormal
        return sign | u32(__float2int_rn(__uint_as_float(magnitude) * 512.0f));
    }
    return sign | (((magnitude + 0x7ffffu + ((magnitude >> 20) & 1)) >> 20) - (120u << 3));
}

__device__ __forceinline__ float f16_value(u32 bits) {
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(bits));
    return value;
}
// Nearest, ties to even; `x` is at most the largest f16.
__device__ __forceinline__ u32 f16_bits(float x) {
    u32 bits;
    asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

// The angles of a token in a warp: lane l has those of frequencies PAIRS l + i. Frequency j turns with time, height or
// width.
template <int D> struct Angles {
    static constexpr int PAIRS = D >= 64 ? D / 64 : 1;
    float cosine[PAIRS], sine[PAIRS];

    __device__ __forceinline__ void load(const AttentionParams& p, u32 row, u32 lane) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const u32 j = (PAIRS * lane + i) % 64;
            const u32 axis = j % 3 == 1 && j < p.height_end ? 1 : j % 3 == 2 && j < p.width_end ? 2 : 0;
            const float position = float(p.positions[3 * row + axis]);
            sine_cosine(__fmul_rn(position, p.inv_freq[j]), sine[i], cosine[i]);
            cosine[i] *= p.rope_factor;
            sine[i] *= p.rope_factor;
        }
    }
};

// A head's vector in a warp: lane l has elements j = PAIRS l + i and D / 2 + j, which the rotary embedding turns
// together.
template <int D> struct Head {
    static constexpr int PAIRS = D >= 64 ? D / 64 : 1;
    float first[PAIRS], second[PAIRS];

    static __device__ __forceinline__ u32 element(u32 lane, int i) { return PAIRS * lane + i; }
    static __device__ __forceinline__ bool active(u32 lane) { return PAIRS * lane < D / 2; }

    // Zeros, without touching memory, if not `is_valid`.
    __device__ __forceinline__ void load(const u16* vector, u32 lane, bool is_valid = true) {
        const bool is_loaded = is_valid && active(lane);
        if (PAIRS == 2) {
            const u32 a = is_loaded ? reinterpret_cast<const u32*>(vector)[lane] : 0;
            const u32 b = is_loaded ? reinterpret_cast<const u32*>(vector + D / 2)[lane] : 0;
            first[0] = __uint_as_float(a << 16);
            second[0] = __uint_as_float(b << 16);
            first[PAIRS - 1] = __uint_as_float(a & 0xffff0000u);
            second[PAIRS - 1] = __uint_as_float(b & 0xffff0000u);
        } else {
            first[0] = is_loaded ? to_float(bf16{vector[lane]}) : 0.0f;
            second[0] = is_loaded ? to_float(bf16{vector[D / 2 + lane]}) : 0.0f;
        }
    }

    // Stores bf16 numbers; with F16 f16 numbers, of which those of a bf16 vector up to the largest f16 are exact.
    template <bool F16> __device__ __forceinline__ void store(u16* vector, u32 lane) const {
        if (!active(lane)) return;
        if (PAIRS == 2) {
            reinterpret_cast<u32*>(vector)[lane] = packed<F16>(first[0], first[PAIRS - 1]);
            reinterpret_cast<u32*>(vector + D / 2)[lane] = packed<F16>(second[0], second[PAIRS - 1]);
        } else {
            vector[lane] = u16(packed<F16>(first[0], 0.0f));
            vector[D / 2 + lane] = u16(packed<F16>(second[0], 0.0f));
        }
    }
    template <bool F16> static __device__ __forceinline__ u32 packed(float low, float high) {
        if (!F16) return pack_bf16(low, high);
        return pack_f16(fminf(fmaxf(low, -F16_MAX), F16_MAX), fminf(fmaxf(high, -F16_MAX), F16_MAX));
    }

    // RMSNorm; rounds where the CPU backend does. D is a power of two, so that its product with 1 / D is the quotient.
    __device__ __forceinline__ void normalise(const Head& weight, float eps) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) squares = fmaf(first[i], first[i], fmaf(second[i], second[i], squares));
        const float factor = __frcp_rn(__fsqrt_rn(warp_sum(squares) * (1.0f / D) + eps));
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            first[i] = rounded<bf16>(rounded<bf16>(first[i] * factor) * weight.first[i]);
            second[i] = rounded<bf16>(rounded<bf16>(second[i] * factor) * weight.second[i]);
        }
    }

    // This if `condition`, else `other`.
    __device__ __forceinline__ Head or_else(bool condition, const Head& other) const {
        Head chosen;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            chosen.first[i] = condition ? first[i] : other.first[i];
            chosen.second[i] = condition ? second[i] : other.second[i];
        }
        return chosen;
    }

    // Turned by the lane's angles, rounded to bf16.
    __device__ __forceinline__ void rotate(const Angles<D>& angles) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) rotate_pair(first[i], second[i], angles.cosine[i], angles.sine[i]);
    }

    // Stores the vector as the FP8 cache has it, and returns the bits of its scale.
    __device__ __forceinline__ u32 store_e4m3(u8* vector, u32 lane) const {
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) largest = fmaxf(largest, fmaxf(fabsf(first[i]), fabsf(second[i])));
        u32 bits = f16_bits(fminf(__fdiv_rn(warp_max(largest), 448.0f), F16_MAX));
        if (bits == 0) bits = 0x3c00; // 1
        const float scale = f16_value(bits);
        if (active(lane)) {
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                vector[element(lane, i)] = u8(e4m3_bits(__fdiv_rn(first[i], scale)));
                vector[D / 2 + element(lane, i)] = u8(e4m3_bits(__fdiv_rn(second[i], scale)));
            }
        }
        return bits;
    }
};
