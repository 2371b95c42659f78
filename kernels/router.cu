// router: from the rows of decode to their experts. logits = x W^T + bias, rounded to bf16; softmax in float32; the top_k most
// probable experts, ties to the lower one; their probabilities, renormalised if asked, rounded to bf16; and the lists of pairs by
// expert that the products of moe.cuh read. router_choose does the softmax and what follows for logits that are there already.
//
// Shapes  x [rows, k] bf16, W [n, k] bf16 in the packed layout, n up to 256 experts, top_k up to 32; rows from the number in
//         `counts` on get no experts. Lists for up to 1024 pairs.
// Bytes   2 * n * k of weights (30B: 512 KB).
// Bound   latency. Weights are loaded before the predecessor has ended, over many blocks, each a row tile and a part of k. The last
//         block of 8 rows has a warp choose for each, and the last one of all lists the pairs.
#include "decode_linear.cuh"
#include "pairs.cuh"

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
};
PARAMS(RouterParams);

constexpr u32 MAX_EXPERTS = 256;
constexpr u32 ALL = 0xffffffffu;
// Steps of 32 k of a warp.
constexpr u32 STEPS = 4;
constexpr u32 WARPS = LIST_WARPS;
static_assert(MAX_EXPERTS == LIST_THREADS, "a thread per expert");

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

// The choice of a row by one warp; lane l has the logits of experts l, l + 32, ..., anything where there is none. Returns the expert
// of choice l, or none.
template <u32 PER_LANE>
__device__ __forceinline__ u32 choose(const RouterParams& p, u32 row, const float (&logits)[PER_LANE]) {
    const u32 lane = threadIdx.x % 32;
    float highest = __uint_as_float(0xff800000u);
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++)
        if (32 * i + lane < p.n) highest = fmaxf(highest, logits[i]);
    highest = warp_max(highest);
    float exponentials[PER_LANE], total = 0.0f;
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++) {
        exponentials[i] = 32 * i + lane < p.n ? expf(logits[i] - highest) : 0.0f;
        total += exponentials[i];
    }
    total = warp_sum(total);
    // Bits of probabilities order like them, NaN above all; 0: there is no such expert or it is taken.
    u32 keys[PER_LANE];
#pragma unroll
    for (u32 i = 0; i < PER_LANE; i++)
        keys[i] = 32 * i + lane < p.n ? (__float_as_uint(__fdividef(exponentials[i], total)) & 0x7fffffffu) + 1 : 0;

    u32 expert = NO_EXPERT;
    float probability = 0.0f, sum = 0.0f;
    for (u32 choice = 0; choice < p.top_k; choice++) {
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
        if (lane == choice) {
            expert = winner;
            probability = value;
        }
    }
    if (lane < p.top_k) {
        const u64 at = u64(row) * p.top_k + lane;
        p.experts[at] = expert;
        p.weights[at] = rounded<bf16>(p.renormalize ? __fdividef(probability, sum) : probability);
    }
    return expert;
}

__device__ __forceinline__ u32 choose_none(const RouterParams& p, u32 row) {
    const u32 lane = threadIdx.x % 32;
    if (lane < p.top_k) {
        const u64 at = u64(row) * p.top_k + lane;
        p.experts[at] = NO_EXPERT;
        p.weights[at] = 0.0f;
    }
    return NO_EXPERT;
}

// The lists of a single row, by the warp that has chosen: lane l has choice l.
__device__ __forceinline__ void list_row(const RouterParams& p, u32 expert) {
    const u32 lane = threadIdx.x % 32;
    u32 place = 0;
    for (u32 other = 0; other < p.top_k; other++) place += __shfl_sync(ALL, expert, other) < expert;
    if (lane >= p.top_k) return;
    const bool is_used = expert != NO_EXPERT;
    p.groups[is_used ? place : lane] = {is_used ? expert : 0, place, is_used, 0};
    p.pairs[is_used ? place : lane] = lane;
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

// Block (tile, split, i): 16 experts, WARPS * STEPS * 32 of k, rows 8 i to 8 i + 7.
template <u32 PER_LANE> __device__ __forceinline__ void route(const RouterParams& p) {
    __shared__ union {
        WarpSums<WARPS, 1, 1> warps;
        ListMemory<MAX_EXPERTS> list;
    } shared;
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
    const u32 first_row = blockIdx.z * 8, padded_rows = gridDim.z * 8;
    const u32 token = first_row + lane / 4;
    const Rows<1, 1, 1> rows = {p.x, p.x_columns, {token < p.rows ? token : NO_ROW}};
    uint4 x[STEPS][1];
#pragma unroll
    for (u32 s = 0; s < STEPS; s++) load(x[s], rows, (first + s) * 32 + 8 * (lane % 4));
    float acc[1][1][4] = {};
#pragma unroll
    for (u32 s = 0; s < STEPS; s++) {
        const uint4 upper = weights[s][0], lower = weights[s][1];
        mma_bf16(acc[0][0], upper.x, lower.x, upper.y, lower.y, x[s][0].x, x[s][0].y);
        mma_bf16(acc[0][0], upper.z, lower.z, upper.w, lower.w, x[s][0].z, x[s][0].w);
    }
    shared.warps.store(acc, warp);
    __syncthreads();
    if (threadIdx.x < 128) {
        const u32 row = first_row + threadIdx.x / 16, expert = blockIdx.x * 16 + threadIdx.x % 16;
        p.partial[(u64(blockIdx.y) * padded_rows + row) * p.padded_n + expert] =
            shared.warps.total(threadIdx.x / 16, threadIdx.x % 16);
    }
    if (!is_last(p.counters + 1 + blockIdx.z, gridDim.x * gridDim.y)) return;

    const u32 row = first_row + warp;
    const u32 num_real = p.counts ? p.counts[0] : p.rows;
    u32 expert = NO_EXPERT;
    if (row < p.rows && row >= num_real) expert = choose_none(p, row);
    if (row < p.rows && row < num_real) {
        float logits[PER_LANE];
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) logits[i] = 0.0f;
        const float* partial = p.partial + u64(row) * p.padded_n + lane;
        // Many on their way at once.
#pragma unroll (16 / PER_LANE)
        for (u32 split = 0; split < gridDim.y; split++) {
#pragma unroll
            for (u32 i = 0; i < PER_LANE; i++)
                if (32 * i + lane < p.n)
                    logits[i] += load_shared_value(partial + u64(split) * padded_rows * p.padded_n + 32 * i);
        }
#pragma unroll
        for (u32 i = 0; i < PER_LANE; i++) {
            if (p.bias && 32 * i + lane < p.n) logits[i] += p.bias[32 * i + lane];
            logits[i] = rounded<bf16>(logits[i]);
        }
        expert = choose(p, row, logits);
    }
    if (p.rows == 1) {
        if (warp == 0) list_row(p, expert);
        return;
    }
    if (gridDim.z > 1 && !is_last(p.counters, gridDim.z)) return;
    __syncthreads();
    list_pairs(shared.list, p.experts, p.rows * p.top_k, p.n, p.groups, p.max_groups, p.pairs);
}

// Up to 128 experts, and up to 256.
extern "C" __global__ void __launch_bounds__(LIST_THREADS, 2) router_128(const RouterParams p) { route<4>(p); }
extern "C" __global__ void __launch_bounds__(LIST_THREADS, 2) router_256(const RouterParams p) { route<8>(p); }

// A warp per row.
extern "C" __global__ void __launch_bounds__(LIST_THREADS) router_choose(const RouterParams p) {
    wait_for_predecessor();
    allow_successor();
    const u32 row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    if (p.counts && row >= p.counts[0]) {
        choose_none(p, row);
        return;
    }
    float logits[MAX_EXPERTS / 32];
#pragma unroll
    for (u32 i = 0; i < MAX_EXPERTS / 32; i++) {
        const u32 expert = 32 * i + lane;
        logits[i] = expert < p.n ? to_float(bf16{p.x[u64(row) * p.n + expert]}) : 0.0f;
    }
    choose(p, row, logits);
}
