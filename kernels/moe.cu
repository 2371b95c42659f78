// moe: what stands around the products of a layer of experts. moe_sort: from the router's choice to lists of pairs (row,
// chosen expert) by expert. moe_combine: out = sum over a row's experts, ascending, of weight * partial, rounded once.
//
// Shapes  experts, weights [rows, top_k]; up to 1024 experts and 1024 pairs; partial [rows * top_k, n] f32, out [rows, n] bf16,
//         n a multiple of 4.
// Bytes   sort: a few KB. combine: rows * n * (4 * top_k + 2), mostly from the L2 cache, where `down` has just put it.
// Bound   latency.
#include "moe.cuh"

constexpr u32 SORT_THREADS = 1024;

// One block; thread e counts the pairs of expert e.
extern "C" __global__ void __launch_bounds__(SORT_THREADS) moe_sort(const MoeParams p) {
    __shared__ u32 chosen[SORT_THREADS];
    // Exclusive sums over experts: pairs in the low half, used experts in the high half.
    __shared__ u32 sums[2][SORT_THREADS];
    wait_for_predecessor();
    allow_successor();
    const u32 num_pairs = p.rows * p.top_k, expert = threadIdx.x;
    if (threadIdx.x < num_pairs) chosen[threadIdx.x] = p.experts[threadIdx.x];
    if (threadIdx.x < p.max_groups) p.groups[threadIdx.x] = {0, 0, 0, 0};
    __syncthreads();
    u32 count = 0;
    if (expert < p.num_experts)
        for (u32 pair = 0; pair < num_pairs; pair++) count += chosen[pair] == expert;
    const u32 own = count | (count > 0 ? 0x10000u : 0u);
    u32 from = 0;
    sums[0][threadIdx.x] = own;
    for (u32 step = 1; step < SORT_THREADS; step *= 2) {
        __syncthreads();
        const u32 before = threadIdx.x >= step ? sums[from][threadIdx.x - step] : 0;
        sums[1 - from][threadIdx.x] = sums[from][threadIdx.x] + before;
        from = 1 - from;
    }
    const u32 start = sums[from][threadIdx.x] - own;
    // The number of used experts is at most that of pairs and of experts, so at most max_groups.
    if (count > 0) {
        u32 at = start & 0xffffu;
        p.groups[start >> 16] = {expert, at, count, 0};
        for (u32 pair = 0; pair < num_pairs; pair++)
            if (chosen[pair] == expert) p.pairs[at++] = pair;
    }
}

// One thread per 4 columns of a row (blockIdx.y).
extern "C" __global__ void __launch_bounds__(256) moe_combine(const MoeParams p) {
    wait_for_predecessor();
    allow_successor();
    const u32 column = 4 * (blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
    if (column >= p.n) return;
    const u32* experts = p.experts + u64(row) * p.top_k;
    float sum[4] = {};
    // Ascending experts, whatever the order of the choice: the next one above the last.
    u32 least = 0;
    for (u32 i = 0; i < p.top_k; i++) {
        u32 next = 0xffffffffu, choice = 0;
        for (u32 j = 0; j < p.top_k; j++) {
            const u32 expert = experts[j];
            if (expert >= least && expert < next) {
                next = expert;
                choice = j;
            }
        }
        least = next + 1;
        const u64 pair = u64(row) * p.top_k + choice;
        const float weight = p.weights[pair];
        float values[4];
        unpack(*reinterpret_cast<const uint4*>(p.partial + pair * p.n + column), values, float());
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] = fmaf(values[j], weight, sum[j]);
    }
    u16* out = static_cast<u16*>(p.out) + u64(row) * p.n + column;
    *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]));
}
