// 4-bit integers with a scale and a zero point per group of 32, 64 or 128 inputs (AWQ, GPTQ) as operand. No kernel.
//
// A bf16 number whose upper 8 bits are zero is its lower 8 bits times 2^-133, subnormal or not. So the nibbles of a word become numbers
// by one logical operation for two, without a shift where they are the lower ones of a byte or the upper ones; times 2^127 or 2^123,
// less the zero point, the same instruction, they are (code - zero) / 64: exact. The scale is applied once per group, to the
// float32 sums, and 64 at the end. A scale word is the scale as f32 whose lowest 5 bits are the zero point: exact for f16 and bf16 scales.
#pragma once
#include "decode_linear.cuh"

template <int GROUP_> struct Int4 {
    static constexpr int SPAN = GROUP_ == 32 ? 64 : 128;
    static constexpr int VECTORS = SPAN / 64;
    static constexpr int GROUP = GROUP_;
    static constexpr int K_PER_WORD = GROUP_;
    static constexpr int WORDS = SPAN / GROUP_;
    static constexpr int FACTOR = 64;

    // Of rows g and g + 8: -zero / 64, twice.
    struct Group {
        u32 offsets[2];

        template <typename Stage> __device__ __forceinline__ void begin(const Stage& stage, int r, int step, u32 lane) {
            const u32* scales = stage.scales[r][step * 32 / GROUP] + lane / 4;
#pragma unroll
            for (int half = 0; half < 2; half++) offsets[half] = multiply_bf16((scales[8 * half] & 31u) * 0x00010001u, 0xff00ff00u);
        }
    };

    template <typename Stage>
    static __device__ __forceinline__ void operand(u32 (&a)[4][2], const Stage& stage, const Group& group, int r, int step, u32 lane) {
        const uint2 codes = reinterpret_cast<const uint2*>(&stage.codes[r][step / 2][lane])[step % 2];
        unzeroed(a, 0, codes.x, group.offsets[0]);
        unzeroed(a, 1, codes.y, group.offsets[1]);
    }

    // The four pairs of a row.
    static __device__ __forceinline__ void unzeroed(u32 (&a)[4][2], int half, u32 codes, u32 offset) {
        constexpr u32 LOW = 0x000f000fu, HIGH = 0x00f000f0u;
        // 2^127 and 2^123.
        constexpr u32 OF_LOW = 0x7f007f00u, OF_HIGH = 0x7d007d00u;
        const u32 upper = codes >> 8;
        a[0][half] = fma_bf16(codes & LOW, OF_LOW, offset);
        a[1][half] = fma_bf16(codes & HIGH, OF_HIGH, offset);
        a[2][half] = fma_bf16(upper & LOW, OF_LOW, offset);
        a[3][half] = fma_bf16(upper & HIGH, OF_HIGH, offset);
    }

    template <typename Stage>
    static __device__ __forceinline__ float scale(const Stage& stage, int r, int half, int step, u32 lane) {
        return __uint_as_float(stage.scales[r][step * 32 / GROUP][lane / 4 + 8 * half] & ~31u);
    }
};
