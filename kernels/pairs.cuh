// The pairs (row of x, one of its experts) of a layer of experts by expert, for the few rows of decode: what router.cu and moe.cu
// make and the products of moe.cuh read. No kernel.
#pragma once
#include "prelude.cuh"

// The pairs of an expert: pair = row * top_k + choice, ascending.
struct Group {
    u32 expert;
    u32 first; // in the list of pairs
    u32 count; // 0: the group is not used
    u32 padding;
};

constexpr u32 MAX_PAIRS = 1024;
constexpr u32 NO_EXPERT = 0xffffffffu;
constexpr u32 LIST_THREADS = 256;
constexpr u32 LIST_WARPS = LIST_THREADS / 32;

// The number of an expert among those that are held, from `first_held` on: for every other one, and for NO_EXPERT, a number that no
// held one has.
__device__ __forceinline__ u32 held_number(u32 expert, u32 first_held) { return expert - first_held; }

// A value that another block of this launch or the kernel before the last has written: from the second-level cache.
__device__ __forceinline__ u32 load_shared_value(const u32* address) {
    u32 value;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(address));
    return value;
}
__device__ __forceinline__ float load_shared_value(const float* address) {
    return __uint_as_float(load_shared_value(reinterpret_cast<const u32*>(address)));
}
__device__ __forceinline__ Group load_group(const Group* address) {
    Group group;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(group.expert), "=r"(group.first), "=r"(group.count), "=r"(group.padding)
                 : "l"(address)
                 : "memory");
    return group;
}

// What `list_pairs` works in.
template <u32 MAX_EXPERTS> struct ListMemory {
    u32 chosen[MAX_PAIRS];
    // Pairs of each expert in a warp's part of the pairs, then where the next of them goes.
    u16 next[LIST_WARPS][MAX_EXPERTS];
    u32 warp_sums[LIST_WARPS];
};

// Lists `experts` [num_pairs] by expert: groups [max_groups] by rising expert, unused ones last, and their pairs. Experts that do
// not exist are left out. For one block of LIST_THREADS.
template <u32 MAX_EXPERTS>
__device__ __forceinline__ void list_pairs(ListMemory<MAX_EXPERTS>& memory, const u32* experts, u32 num_pairs, u32 num_experts,
                                           Group* groups, u32 max_groups, u32* pairs) {
    constexpr u32 PER_THREAD = MAX_EXPERTS / LIST_THREADS, ALL = 0xffffffffu;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Each warp has a run of pairs.
    const u32 run = (num_pairs + LIST_THREADS - 1) / LIST_THREADS * 32;
    for (u32 i = threadIdx.x; i < MAX_PAIRS; i += LIST_THREADS)
        memory.chosen[i] = i < num_pairs ? load_shared_value(experts + i) : NO_EXPERT;
    for (u32 i = threadIdx.x; i < LIST_WARPS * MAX_EXPERTS; i += LIST_THREADS) (&memory.next[0][0])[i] = 0;
    __syncthreads();
    for (u32 at = 0; at < run; at += 32) {
        const u32 expert = memory.chosen[warp * run + at + lane];
        const u32 alike = __match_any_sync(ALL, expert);
        if (expert < num_experts && lane == __ffs(alike) - 1) memory.next[warp][expert] += u16(__popc(alike));
        __syncwarp();
    }
    __syncthreads();

    // Sums over experts: pairs in the low half, used experts in the high half.
    u32 own = 0;
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; i++) {
        u32 count = 0;
        for (u32 w = 0; w < LIST_WARPS; w++) count += memory.next[w][threadIdx.x * PER_THREAD + i];
        own += count | (count > 0 ? 0x10000u : 0u);
    }
    u32 sum = own;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 before = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += before;
    }
    if (lane == 31) memory.warp_sums[warp] = sum;
    __syncthreads();
    u32 total = 0, start = sum - own;
    for (u32 w = 0; w < LIST_WARPS; w++) {
        if (w < warp) start += memory.warp_sums[w];
        total += memory.warp_sums[w];
    }
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; i++) {
        const u32 expert = threadIdx.x * PER_THREAD + i, first = start & 0xffffu;
        u32 next = first;
        for (u32 w = 0; w < LIST_WARPS; w++) {
            const u32 count = memory.next[w][expert];
            memory.next[w][expert] = u16(next);
            next += count;
        }
        if (next == first) continue;
        // The number of used experts is at most that of pairs and of experts, so at most max_groups.
        groups[start >> 16] = {expert, first, next - first, 0};
        start += (next - first) | 0x10000u;
    }
    for (u32 i = (total >> 16) + threadIdx.x; i < max_groups; i += LIST_THREADS) groups[i] = {0, 0, 0, 0};
    __syncthreads();
    for (u32 at = 0; at < run; at += 32) {
        const u32 pair = warp * run + at + lane, expert = memory.chosen[pair];
        const u32 alike = __match_any_sync(ALL, expert);
        const bool is_listed = expert < num_experts;
        u32 place = 0;
        if (is_listed) place = memory.next[warp][expert] + __popc(alike & ((1u << lane) - 1));
        __syncwarp();
        if (is_listed && lane == __ffs(alike) - 1) memory.next[warp][expert] += u16(__popc(alike));
        __syncwarp();
        if (is_listed) pairs[place] = pair;
    }
}
