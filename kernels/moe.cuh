// The experts of a layer at decode, whatever the scheme of their weights. No kernel: the moe_*.cu make them, router.cu or
// moe.cu lists the pairs, moe.cu combines.
#pragma once
#include "choose.cuh"
#include "decode_linear.cuh"

struct MoeParams {
    const uint4* codes;      // of all experts, one after the other
    const u32* scales;       // null without scales
    const float* row_scales; // NVFP4: [experts, n], else null
    const u16* x;            // gate_up: [rows, x_columns]; down: [pairs, x_columns]
    void* out;               // gate_up: [pairs, n / 2] bf16; down: [pairs, n] f32; down_row, combine: [rows, n] bf16
    const float* partial;    // combine: [pairs, n]
    const u32* experts;      // [rows, top_k]
    const float* weights;    // [rows, top_k]
    Group* groups;           // [max_groups]
    u32* pairs;              // [rows * top_k] pairs by expert
    const float* logits;     // a single row: [splits, logits_stride], sums over parts of k; else null
    const float* router_bias; // [num_experts] or null
    const u32* counts;       // a single row: whether it is real, or null
    u32 n;                   // rows of an expert's matrix, without padding
    u32 padded_n;
    u32 k;                   // with padding
    u32 x_columns;           // k without padding
    u32 rows;
    u32 top_k;
    u32 num_experts; // that are held here: numbers in `experts` are theirs
    u32 max_groups;
    u32 splits;
    u32 logits_stride;
    u32 renormalize;
    u32 num_routed;  // a single row: logits of it
    u32 first_held;  // a single row: of the routed experts
    u32 padding;
};
PARAMS(MoeParams);

constexpr int WARPS = 4;
constexpr u32 MAX_TOP_K = 32;
// Most experts of the one row of down_row.
constexpr int ROW_WARPS = 8;

// The matrix of a group's expert.
template <typename Scheme, int ROW_TILES>
__device__ __forceinline__ Operand<ROW_TILES> operand_of(const MoeParams& p, const Group& group) {
    const u64 rows = u64(group.expert) * p.padded_n;
    const u64 codes = rows / 16 * (p.k / Scheme::SPAN) * (Scheme::VECTORS * 32);
    return {p.codes + codes, Scheme::WORDS > 0 ? p.scales + rows * (p.k / Scheme::K_PER_WORD) : nullptr, p.k, {}};
}

// The held expert of a single row that is number `place` of these by rising number, and its weight.
struct Expert {
    u32 expert; // or NO_EXPERT
    float weight;
};

// Where a block's warps find the choice of the one that has chosen.
struct RowExperts {
    Expert at[ROW_WARPS];
};

// Up to so many parts of the logits every warp chooses for itself. With more, a warp chooses for its block: they are the same few lines
// of the second-level cache for all blocks.
constexpr u32 MAX_OWN_SPLITS = 2;

template <u32 PER_LANE> __device__ __forceinline__ Chosen choose_row(const MoeParams& p) {
    float logits[PER_LANE];
    add_logits(logits, p.logits, p.logits_stride, p.splits, p.router_bias, p.num_routed);
    Chosen chosen = choose(logits, p.num_routed, p.top_k, p.renormalize != 0);
    chosen.expert = held_number(chosen.expert, p.first_held);
    return chosen;
}

__device__ __forceinline__ Expert if_held(const MoeParams& p, const Expert& found) {
    return found.expert < p.num_experts ? found : Expert{NO_EXPERT, 0.0f};
}

// For all threads of a block.
__device__ __forceinline__ Expert expert_at(const MoeParams& p, u32 place, RowExperts& row) {
    const u32 lane = threadIdx.x % 32;
    const bool is_own = p.splits <= MAX_OWN_SPLITS;
    Expert found = {NO_EXPERT, 0.0f};
    // On its way together with the logits, and looked at when they have been: to wait for it first costs every layer two trips to the
    // second-level cache.
    const u32 num_real = p.counts ? load_shared_value(p.counts) : 1;
    if (is_own || threadIdx.x < 32) {
        const Chosen chosen = p.num_routed <= 128 ? choose_row<4>(p) : choose_row<8>(p);
        u32 own_place = 0;
        for (u32 other = 0; other < p.top_k; other++) own_place += __shfl_sync(ALL, chosen.expert, other) < chosen.expert;
        if (is_own) {
            const u32 source = __ballot_sync(ALL, lane < p.top_k && own_place == place);
            if (source != 0 && num_real != 0) {
                const u32 from = __ffs(source) - 1;
                found = {__shfl_sync(ALL, chosen.expert, from), __shfl_sync(ALL, chosen.weight, from)};
            }
            return if_held(p, found);
        }
        if (lane < p.top_k) row.at[own_place] = {chosen.expert, chosen.weight};
    }
    __syncthreads();
    return place < p.top_k && num_real != 0 ? if_held(p, row.at[place]) : found;
}

// Which pair is at a place of a group: from the list, or, of a single row without one, that of the group's number.
struct ListedPairs {
    static constexpr int AHEAD = 4;
    const u32* pairs;
    __device__ __forceinline__ u32 at(u32 place) const { return pairs[place]; }
};
struct OnePair {
    static constexpr int AHEAD = 8;
    u32 pair;
    __device__ __forceinline__ u32 at(u32) const { return pair; }
};

// silu(gate) * up, each rounded, as bf16.
__device__ __forceinline__ u16 inner_value(float gate, float up) {
    gate = rounded<bf16>(gate);
    const float value = rounded<bf16>(__fdividef(gate, 1.0f + expf(-gate))) * rounded<bf16>(up);
    return u16(pack_bf16(value, 0.0f));
}

// What a block of gate_up works in: the ring, then the sums of its warps.
template <typename Scheme, int STAGES> union FewShared {
    Ring<Scheme, 2, STAGES> rings[WARPS];
    WarpSums<WARPS, 2, 1> sums;
};

// inner[pair] = silu(gate x) * (up x), each rounded, for the pairs of a group: 8 at a time, of row tile blockIdx.x of gate and of up. The
// block's warps share k.
template <typename Scheme, int STAGES, typename Pairs>
__device__ __forceinline__ void gate_up(const MoeParams& p, const Group& group, const Pairs& pairs,
                                        FewShared<Scheme, STAGES>& shared) {
    const u32 warp = threadIdx.x / 32, intermediate = p.n / 2;
    Operand<2> operand = operand_of<Scheme, 2>(p, group);
    operand.tiles[0] = blockIdx.x;
    operand.tiles[1] = p.n / 32 + blockIdx.x;
    const float* row_scales = p.row_scales ? p.row_scales + u64(group.expert) * p.n : nullptr;
    for (u32 first = 0; first < group.count; first += 8) {
        start(shared.rings[warp], operand, warp, WARPS);
        Rows<1, Pairs::AHEAD, 4> rows(p.x_columns);
        rows.set(0, p.x, pairs.at(min(first + threadIdx.x % 32 / 4, group.count - 1)) / p.top_k);
        float acc[2][1][4] = {};
        accumulate(acc, shared.rings[warp], operand, rows, warp, WARPS);
        __syncthreads();
        shared.sums.store(acc, warp);
        __syncthreads();
        for (u32 i = threadIdx.x; i < 8 * 16; i += WARPS * 32) {
            const u32 token = i / 16, row = blockIdx.x * 16 + i % 16;
            if (first + token >= group.count || row >= intermediate) continue;
            float gate = shared.sums.total(token, i % 16), up = shared.sums.total(token, 16 + i % 16);
            if (row_scales) {
                gate *= row_scales[row];
                up *= row_scales[intermediate + row];
            }
            static_cast<u16*>(p.out)[u64(pairs.at(first + token)) * intermediate + row] = inner_value(gate, up);
        }
        // The sums lie where the next weights go.
        __syncthreads();
    }
}

// For the expert of group blockIdx.y.
template <typename Scheme, int STAGES> __device__ __forceinline__ void gate_up_few(const MoeParams& p) {
    __shared__ FewShared<Scheme, STAGES> shared;
    wait_for_predecessor();
    allow_successor();
    const Group group = load_group(p.groups + blockIdx.y);
    gate_up(p, group, ListedPairs{p.pairs + group.first}, shared);
}

// The same for a single row whose logits are there, but no choice: inner[place], by rising expert.
template <typename Scheme, int STAGES> __device__ __forceinline__ void gate_up_row(const MoeParams& p) {
    __shared__ FewShared<Scheme, STAGES> shared;
    __shared__ RowExperts row;
    wait_for_predecessor();
    allow_successor();
    const u32 expert = expert_at(p, blockIdx.y, row).expert;
    if (expert == NO_EXPERT) return;
    gate_up(p, {expert, 0, 1, 0}, OnePair{blockIdx.y}, shared);
}

// down and combine of a single row: out = sum over its experts, ascending, of weight * down inner. A block has one row tile, each
// warp one expert. Without lists a block chooses as those of gate_up_row, which lets this kernel start after it has waited for the
// logits.
template <typename Scheme, int STAGES> __device__ __forceinline__ void down_row(const MoeParams& p) {
    typedef Ring<Scheme, 1, STAGES> R;
    extern __shared__ uint4 dynamic[];
    R* rings = reinterpret_cast<R*>(dynamic);
    __shared__ float values[ROW_WARPS][16], weights[ROW_WARPS];
    __shared__ RowExperts row_experts;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Each group has one pair.
    Group group = {0, 0, 0, 0};
    float weight = 0.0f;
    if (p.logits) {
        const Expert expert = expert_at(p, warp, row_experts);
        if (expert.expert != NO_EXPERT) group = {expert.expert, 0, 1, 0};
        weight = expert.weight;
    } else if (warp < p.max_groups) {
        group = load_group(p.groups + warp);
    }
    Operand<1> operand = operand_of<Scheme, 1>(p, group);
    operand.tiles[0] = blockIdx.x;
    if (group.count > 0) start(rings[warp], operand, 0, 1);
    u32 pair = warp;
    if (!p.logits) {
        pair = group.count > 0 ? load_shared_value(p.pairs + group.first) : 0;
        weight = group.count > 0 ? load_shared_value(p.weights + pair) : 0.0f;
    }
    wait_for_predecessor();
    allow_successor();
    if (group.count > 0) {
        Rows<1, 12, 4> rows(p.x_columns);
        rows.set(0, p.x, pair);
        float acc[1][1][4] = {};
        accumulate(acc, rings[warp], operand, rows, 0, 1);
        if (lane % 4 == 0) {
            values[warp][lane / 4] = acc[0][0][0];
            values[warp][lane / 4 + 8] = acc[0][0][2];
        }
    }
    if (lane == 0) weights[warp] = weight;
    const u32 row = blockIdx.x * 16 + lane;
    // Of a warp's own expert; the sums are those of `down` and `combine`, bit by bit.
    __syncwarp();
    if (p.row_scales && group.count > 0 && lane < 16 && row < p.n)
        values[warp][lane] *= p.row_scales[u64(group.expert) * p.n + row];
    const u32 num_groups = __syncthreads_count(lane == 0 && group.count > 0);
    if (warp > 0 || lane >= 16 || row >= p.n) return;
    float sum = 0.0f;
    for (u32 w = 0; w < num_groups; w++) sum = fmaf(values[w][lane], weights[w], sum);
    static_cast<u16*>(p.out)[row] = u16(pack_bf16(sum, 0.0f));
}

// STAGES of the ring of gate_up; ROW_STAGES of that of down_row, which is dynamic shared memory.
#define EXPERTS(NAME, SCHEME, STAGES, ROW_STAGES)                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 4) gate_up_row_##NAME(const MoeParams p) {                \
        gate_up_row<SCHEME, STAGES>(p);                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 5) gate_up_few_##NAME(const MoeParams p) {                \
        gate_up_few<SCHEME, STAGES>(p);                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(ROW_WARPS * 32, 2) down_row_##NAME(const MoeParams p) {               \
        down_row<SCHEME, ROW_STAGES>(p);                                                                               \
    }
