// router: from the rows of decode to their experts. logits = x W^T + bias, rounded to bf16; softmax in float32; the top_k most
// probable experts, ties to the lower one; their probabilities, renormalised if asked, rounded to bf16; and the lists of pairs by
// expert that the products of moe.cuh read. router_choose does the softmax and what follows for logits that are there already.
//
// Shapes  x [rows, k] bf16, W [n, k] bf16 in the packed layout, n up to 256 experts, top_k up to 32; rows from the number in
//         `counts` on get no experts. Lists for up to 1024 pairs. What is written are numbers of held experts, from 0; those of
//         others are not below `num_held`, so for all who read them they do not exist.
// Bytes   2 * n * k of weights (30B: 512 KB).
// Bound   latency. Weights are loaded before the predecessor has ended, over many blocks, each a row tile and a part of k. The last
//         block of 8 rows has a warp choose for each, and the last one of all lists the pairs.
#include "choose.cuh"
#include "decode_linear.cuh"

struct RouterParams {
    const uint4* codes;
    const float* bias;  // [n] or null
    const u16* x;       // router: [rows, x_columns]; router_choose: logits [rows, n]
    float* partial;     // router: [splits, rows padded to 8, padded_n]
    u32* counters;      // router: [1 + rows / 8] zeros, and zeros again afterwards
    const u32* counts;  // how many rows are real, or null
    u32* experts;       // [rows, top_k]
    float* weights;     // [rows, top_k]
    Group* groups;      // [max_groups]
    u32* pairs;         // [rows * top_k]
    u32 n;
    u32 padded_n;
    u32 k;              // with padding
    u32 x_columns;      // k without padding
    u32 rows;
    u32 top_k;
    u32 renormalize;
    u32 max_groups;
    u32 first_held; // of the experts whose products follow
    u32 num_held;
};
PARAMS(RouterParams);

// Steps of 32 k of a warp.
constexpr u32 STEPS = 4;
constexpr u32 WARPS = LIST_WARPS;
static_assert(MAX_EXPERTS == LIST_THREADS, "a thread per expert");

// Puts the choice of a row where it belongs.
__device__ __forceinline__ void put(const RouterParams& p, u32 row, const Chosen& chosen) {
    const u32 lane = threadIdx.x % 32;
    if (lane < p.top_k) {
        const u64 at = u64(row) * p.top_k + lane;
        p.experts[at] = held_number(chosen.expert, p.first_held);
        p.weights[at] = chosen.weight;
    }
}

// The lists of a single row, by the warp that has chosen: lane l has choice l. Held experts come first.
__device__ __forceinline__ void list_row(const RouterParams& p, u32 chosen) {
    const u32 lane = threadIdx.x % 32, expert = held_number(chosen, p.first_held);
    u32 place = 0;
    for (u32 other = 0; other < p.top_k; other++) place += __shfl_sync(ALL, expert, other) < expert;
    if (lane >= p.top_k) return;
    // Without a choice all lanes have the same number.
    if (chosen == NO_EXPERT) place = lane;
    const bool is_used = expert < p.num_held;
    // As many groups as experts are held may be fewer than choices.
    if (place < p.max_groups) p.groups[place] = {is_used ? expert : 0, place, is_used, 0};
    p.pairs[place] = lane;
}

// True in the last of `num_blocks` blocks that come here; what the others wrote before is then seen. Leaves a zero.
__device__ __forceinline__ bool is_last(u32* counter, u32 num_blocks) {
    __shared__ u32 before;
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
        if (before == num_blocks - 1) *counter = 0;
    }
    __syncthreads();
    return before == num_blocks - 1;
}

typedef WarpSums<WARPS, 1, 1> Sums;

// Block (tile, split, i): the sums of 16 experts over WARPS * STEPS * 32 of k for rows 8 i to 8 i + 7.
__device__ __forceinline__ void multiply(const RouterParams& p, Sums& sums) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 first = (blockIdx.y * WARPS + warp) * STEPS;
    uint4 weights[STEPS][2];
#pragma unroll
    for (u32 s = 0; s < STEPS; s++) {
        const uint4* codes = p.codes + (u64(blockIdx.x) * (p.k / 32) + first + s) * 64 + lane;
        const bool is_inside = (first + s) * 32 < p.k;
        weights[s][0] = is_inside ? load_once(codes) : make_uint4(0, 0, 0, 0);
        weights[s][1] = is_inside ? load_once(codes + 32) : make_uint4(0, 0, 0, 0);
    }
    wait_for_predecessor();
    allow_successor();
    Rows<1, 1, 1> rows(p.x_columns);
    rows.set(0, p.x, min(blockIdx.z * 8 + lane / 4, p.rows - 1));
    uint4 x[STEPS][1];
#pragma unroll
    for (u32 s = 0; s < STEPS; s++) load(x[s], rows, (first + s) * 4 + lane % 4);
    float acc[1][1][4] = {};
#pragma unroll
    for (u32 s = 0; s < STEPS; s++) {
        const uint4 upper = weights[s][0], lower = weights[s][1];
        mma_bf16(acc[0][0], upper.x, lower.x, upper.y, lower.y, x[s][0].x, x[s][0].y);
        mma_bf16(acc[0][0], upper.z, lower.z, upper.w, lower.w, x[s][0].z, x[s][0].w);
    }
    sums.store(acc, warp);
    __syncthreads();
}

template <u32 PER_LANE> __device__ __forceinline__ void route(const RouterParams& p) {
    __shared__ union {
        Sums sums;
        ListMemory<MAX_EXPERTS> list;
    } shared;
    multiply(p, shared.sums);
    const u32 warp = threadIdx.x / 32;
    const u32 first_row = blockIdx.z * 8, padded_rows = gridDim.z * 8;
    if (threadIdx.x < 128) {
        const u32 row = first_row + threadIdx.x / 16, expert = blockIdx.x * 16 + threadIdx.x % 16;
        p.partial[(u64(blockIdx.y) * padded_rows + row) * p.padded_n + expert] =
            shared.sums.total(threadIdx.x / 16, threadIdx.x % 16);
    }
    if (!is_last(p.counters + 1 + blockIdx.z, gridDim.x * gridDim.y)) return;

    const u32 row = first_row + warp;
    const u32 num_real = p.counts ? p.counts[0] : p.rows;
    Chosen chosen;
    if (row < num_real && row < p.rows) {
        float logits[PER_LANE];
        const u64 stride = u64(padded_rows) * p.padded_n;
        add_logits(logits, p.partial + u64(row) * p.padded_n, stride, gridDim.y, p.bias, p.n);
        chosen = choose(logits, p.n, p.top_k, p.renormalize != 0);
    }
    if (row < p.rows) put(p, row, chosen);
    if (p.rows == 1) {
        if (warp == 0) list_row(p, chosen.expert);
        return;
    }
    if (gridDim.z > 1 && !is_last(p.counters, gridDim.z)) return;
    __syncthreads();
    list_pairs(shared.list, p.experts, p.rows * p.top_k, p.num_held, p.groups, p.max_groups, p.pairs);
}

// Up to 128 experts, and up to 256.
extern "C" __global__ void __launch_bounds__(LIST_THREADS, 2) router_128(const RouterParams p) { route<4>(p); }
extern "C" __global__ void __launch_bounds__(LIST_THREADS, 2) router_256(const RouterParams p) { route<8>(p); }

// Only the sums over parts of k, of a single row: partial [splits, padded_n]. The products of moe.cuh choose by themselves.
extern "C" __global__ void __launch_bounds__(LIST_THREADS, 2) router_row(const RouterParams p) {
    __shared__ Sums sums;
    multiply(p, sums);
    if (threadIdx.x < 16)
        p.partial[blockIdx.y * p.padded_n + blockIdx.x * 16 + threadIdx.x] = sums.total(0, threadIdx.x);
}

// A warp per row.
extern "C" __global__ void __launch_bounds__(LIST_THREADS) router_choose(const RouterParams p) {
    wait_for_predecessor();
    allow_successor();
    const u32 row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    if (p.counts && row >= p.counts[0]) {
        put(p, row, Chosen());
        return;
    }
    float logits[MAX_EXPERTS / 32];
#pragma unroll
    for (u32 i = 0; i < MAX_EXPERTS / 32; i++) {
        const u32 expert = 32 * i + lane;
        logits[i] = expert < p.n ? to_float(bf16{p.x[u64(row) * p.n + expert]}) : 0.0f;
    }
    put(p, row, choose(logits, p.n, p.top_k, p.renormalize != 0));
}
