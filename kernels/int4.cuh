// 4-bit integers with a scale and a zero point per group of 32, 64 or 128 inputs (AWQ, GPTQ) as operand. No kernel.
//
// `word & 0x000f000f | 0x43004300` is a pair of bf16 numbers 128 + code; less 128 + zero it is the weight without its scale: a
// small integer, exact. The scale is applied once per group, to the float32 sums. A scale word is the scale as f32 whose lowest 5
// bits are the zero point: exact for f16 and bf16 scales.
#pragma once
#include "decode_linear.cuh"

template <int GROUP_> struct Int4 {
    static constexpr int SPAN = GROUP_ == 32 ? 64 : 128;
    static constexpr int VECTORS = SPAN / 64;
    static constexpr int GROUP = GROUP_;
    static constexpr int K_PER_WORD = GROUP_;
    static constexpr int WORDS = SPAN / GROUP_;

    static __device__ __forceinline__ void pair(u32 (&b)[4], const uint4& x) { pair_by_four(b, x); }

    template <typename Stage>
    static __device__ __forceinline__ void operand(u32 (&a)[4][2], const Stage& stage, int r, int step, u32 lane) {
        const uint2 codes = reinterpret_cast<const uint2*>(&stage.codes[r][step / 2][lane])[step % 2];
        const u32* scales = stage.scales[r][step * 32 / GROUP] + lane / 4;
        unzeroed(a, 0, codes.x, scales[0]);
        unzeroed(a, 1, codes.y, scales[8]);
    }

    // The four pairs of a row.
    static __device__ __forceinline__ void unzeroed(u32 (&a)[4][2], int half, u32 codes, u32 scale_word) {
        // -(128 + zero), twice: the zero point is at most 31, and 1 is bit 0 of a bf16 number from 128 to 255.
        const u32 offset = 0xc300c300u + (scale_word & 31u) * 0x00010001u;
#pragma unroll
        for (int j = 0; j < 4; j++)
            a[j][half] = fma_bf16(and_or(codes >> (4 * j), 0x000f000fu, 0x43004300u), 0x3f803f80u, offset);
    }

    template <typename Stage>
    static __device__ __forceinline__ float scale(const Stage& stage, int r, int half, int step, u32 lane) {
        return __uint_as_float(stage.scales[r][step * 32 / GROUP][lane / 4 + 8 * half] & ~31u);
    }
};
