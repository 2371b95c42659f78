// bf16 weights as operand. No kernel.
//
// A tile is 16 rows by 32 k, 1024 bytes: 8 values of row g for every lane, then 8 of row g + 8, in natural order.
#pragma once
#include "decode_linear.cuh"

struct Bf16 {
    static constexpr int SPAN = 32;
    static constexpr int VECTORS = 2;
    static constexpr int GROUP = 0;
    static constexpr int K_PER_WORD = 32;
    static constexpr int WORDS = 0;
    static constexpr int FACTOR = 1;
    typedef NoGroup Group;

    template <typename Stage>
    static __device__ __forceinline__ void operand(u32 (&a)[4][2], const Stage& stage, Group, int r, int, u32 lane) {
        const uint4 upper = stage.codes[r][0][lane], lower = stage.codes[r][1][lane];
        a[0][0] = upper.x, a[1][0] = upper.y, a[2][0] = upper.z, a[3][0] = upper.w;
        a[0][1] = lower.x, a[1][1] = lower.y, a[2][1] = lower.z, a[3][1] = lower.w;
    }
};
