// The choice of a row's experts from its logits, by one warp. No kernel: router.cu and, for a single row, moe.cuh use it.
#pragma once
#include "pairs.cuh"

constexpr u32 ALL = 0xffffffffu;
constexpr u32 MAX_EXPERTS = 256;

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(ALL, value, offset));
    return value;
}
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(ALL, value, offset);
    return value;
}

// What lane l of a warp knows of its row: choice l, where there is one.
struct Chosen {
    u32 expert = NO_EXPERT;
    float weight = 0.0f;
};

// The `top_k` most probable of n experts, ties to the lower one; lane l has the logits of experts l, l + 32, ..., rounded to bf16,
// anything where there is none.
template <u32 PER_LANE>
__device__ __forceinline__ Chosen choose(const float (&logits)[PER_LANE], u32 n, u32 top_k, bool renormalize) {
    const u32 lane = threadIdx.x % 32;
    float highest = __uint_as_float(0xff800000u);
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++)
        if (32 * i + lane < n) highest = fmaxf(highest, logits[i]);
    highest = warp_max(highest);
    float exponentials[PER_LANE], total = 0.0f;
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) {
        exponentials[i] = 32 * i + lane < n ? expf(logits[i] - highest) : 0.0f;
        total += exponentials[i];
    }
    total = warp_sum(total);
    // Bits of probabilities order like them, NaN above all; 0: there is no such expert or it is taken.
    u32 keys[PER_LANE];
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++)
        keys[i] = 32 * i + lane < n ? (__float_as_uint(__fdividef(exponentials[i], total)) & 0x7fffffffu) + 1 : 0;

    Chosen chosen;
    float sum = 0.0f;
    for (u32 choice = 0; choice < top_k; choice++) {
        u32 key = keys[0], index = lane;
#pragma unroll
        for (u32 i = 1; i < PER_LANE; i++) {
            if (keys[i] <= key) continue;
            key = keys[i];
            index = 32 * i + lane;
        }
        const u32 best = __reduce_max_sync(ALL, key);
        const u32 winner = __reduce_min_sync(ALL, key == best ? index : NO_EXPERT);
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++)
            if (32 * i + lane == winner) keys[i] = 0;
        const float value = __uint_as_float(best - 1);
        sum += value;
        if (lane == choice) chosen = {winner, value};
    }
    chosen.weight = lane < top_k ? rounded<bf16>(renormalize ? __fdividef(chosen.weight, sum) : chosen.weight) : 0.0f;
    return chosen;
}

// The logits of a row from their `splits` sums over parts of k, `stride` numbers from one to the next; from the second-level cache.
template <u32 PER_LANE>
__device__ __forceinline__ void add_logits(float (&logits)[PER_LANE], const float* partial, u64 stride, u32 splits, const float* bias,
                                           u32 n) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) logits[i] = 0.0f;
    // Many on their way at once.
#pragma unroll (16 / PER_LANE)
    for (u32 split = 0; split < splits; split++) {
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++)
            if (32 * i + lane < n) logits[i] += load_shared_value(partial + split * stride + 32 * i + lane);
    }
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) {
        if (bias && 32 * i + lane < n) logits[i] += bias[32 * i + lane];
        logits[i] = rounded<bf16>(logits[i]);
    }
}
