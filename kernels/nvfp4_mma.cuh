// The tensor cores' product of E2M1 codes with a scale for every 16 of them (sm_120a and sm_121a alone), and where its operands are in
// the lanes of a warp. No kernel.
//
// d += A B for A [16, 64] and B [64, 8]. Lane l, g = l / 4, t = l % 4, a word is 8 codes, the lowest 4 bits first:
//   a0 row g, k = 8t .. 8t + 7; a1 row g + 8, the same k; a2 row g, k = 32 + 8t ..; a3 row g + 8, k = 32 + 8t ..
//   b0 column g, k = 8t ..; b1 column g, k = 32 + 8t ..
//   d0, d1 row g, d2, d3 row g + 8, columns 2t, 2t + 1
// A word of scales is those of 64 k, E4M3 without sign, the lowest byte for k = 0 .. 15. They come from some lanes alone: of A, lane
// 2 * THREAD_A of every four has those of row g and the lane behind it those of row g + 8; of B, lane THREAD_B of every four has those
// of column g. So the lanes of a warp hold the scales of two products of A, and of up to four of B.
#pragma once
#include "prelude.cuh"

template <int THREAD_A, int THREAD_B>
__device__ __forceinline__ void mma_nvfp4(float (&d)[4], const uint4& a, u32 b0, u32 b1, u32 scales_a, u32 scales_b) {
    asm volatile("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {0, %12}, {%11}, {0, %13};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(scales_a), "r"(scales_b), "n"(THREAD_A),
                   "n"(THREAD_B));
}

// Starts a copy of 8 bytes to shared memory.
__device__ __forceinline__ void copy_async8(u32 shared, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(source) : "memory");
}
