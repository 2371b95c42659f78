// moe: what stands around the products of a layer of experts. moe_sort: from a router's choice to lists of pairs (row, chosen
// expert) by expert, where router.cu has not made them. moe_combine: out = sum over a row's experts, ascending, of weight * partial,
// rounded once.
//
// Shapes  experts, weights [rows, top_k], top_k up to 32; up to 1024 experts and 1024 pairs; partial [rows * top_k, n] f32, out
//         [rows, n] bf16, n a multiple of 4. Experts that do not exist count nothing.
// Bytes   sort: a few KB. combine: rows * n * (4 * top_k + 2), mostly from the L2 cache, where `down` has just put it.
// Bound   latency.
#include "moe.cuh"

// One block.
extern "C" __global__ void __launch_bounds__(LIST_THREADS) moe_sort(const MoeParams p) {
    __shared__ ListMemory<1024> memory;
    wait_for_predecessor();
    allow_successor();
    list_pairs(memory, p.experts, p.rows * p.top_k, p.num_experts, p.groups, p.max_groups, p.pairs);
}

// One thread per 4 columns of a row (blockIdx.y).
extern "C" __global__ void __launch_bounds__(256) moe_combine(const MoeParams p) {
    // The row's choices by rising expert, whatever their order in the choice.
    __shared__ u32 choices[MAX_TOP_K];
    __shared__ float weights[MAX_TOP_K];
    wait_for_predecessor();
    allow_successor();
    const u32 column = 4 * (blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
    const u64 first_pair = u64(row) * p.top_k;
    u32 expert = NO_EXPERT;
    if (threadIdx.x < p.top_k) expert = p.experts[first_pair + threadIdx.x];
    if (threadIdx.x < 32) {
        u32 place = 0;
        for (u32 i = 0; i < p.top_k; i++) {
            const u32 other = __shfl_sync(0xffffffffu, expert, i);
            place += other < expert || (other == expert && i < threadIdx.x);
        }
        if (threadIdx.x < p.top_k) {
            choices[place] = expert < p.num_experts ? threadIdx.x : NO_EXPERT;
            weights[place] = p.weights[first_pair + threadIdx.x];
        }
    }
    __syncthreads();
    if (column >= p.n) return;
    float sum[4] = {};
#pragma unroll 8
    for (u32 i = 0; i < p.top_k; i++) {
        const u32 choice = choices[i];
        if (choice == NO_EXPERT) continue;
        float values[4];
        unpack(*reinterpret_cast<const uint4*>(p.partial + (first_pair + choice) * p.n + column), values, float());
#pragma unroll
        for (int j = 0; j < 4; j++) sum[j] = fmaf(values[j], weights[i], sum[j]);
    }
    u16* out = static_cast<u16*>(p.out) + u64(row) * p.n + column;
    *reinterpret_cast<uint2*>(out) = make_uint2(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]));
}
