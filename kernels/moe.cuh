// The experts of a layer at decode, whatever the scheme of their weights. No kernel: moe_int4.cu and moe_nvfp4.cu make
// them, moe.cu sorts and combines.
#pragma once
#include "decode_linear.cuh"

// The pairs (row of x, one of its experts) of an expert: pair = row * top_k + choice, ascending.
struct Group {
    u32 expert;
    u32 first; // in the list of pairs
    u32 count; // 0: the group is not used
    u32 padding;
};

struct MoeParams {
    const uint4* codes;      // of all experts, one after the other
    const u32* scales;
    const float* row_scales; // NVFP4: [experts, n], else null
    const u16* x;            // gate_up: [rows, x_columns]; down: [pairs, x_columns]
    void* out;               // gate_up: [pairs, n / 2] bf16; down: [pairs, n] f32; combine: [rows, n] bf16
    const float* partial;    // combine: [pairs, n]
    const u32* experts;      // [rows, top_k]
    const float* weights;    // [rows, top_k]
    Group* groups;           // [max_groups]
    u32* pairs;              // [rows * top_k] pairs by expert
    u32 n;                   // rows of an expert's matrix, without padding
    u32 padded_n;
    u32 k;                   // with padding
    u32 x_columns;           // k without padding
    u32 rows;
    u32 top_k;
    u32 num_experts;
    u32 max_groups;
};
PARAMS(MoeParams);

// The matrix of a group's expert.
template <typename Scheme> __device__ __forceinline__ Operand operand_of(const MoeParams& p, const Group& group) {
    const u64 tiles = u64(group.expert) * (p.padded_n / 16);
    return {p.codes + tiles * (p.k / 64) * 32, p.scales + tiles * (p.k / Scheme::K_PER_WORD) * 16, p.k, {0, 0}};
}

// A block computes two row tiles of one expert for all its pairs, 8 at a time: few experts have more, and what is read
// again for them comes from the L2 cache. `Finish` takes (position in the group, the block's sums).
template <typename Scheme, typename Finish>
__device__ __forceinline__ void moe(const MoeParams& p, const Group& group, const Operand& operand, u32 pairs_per_row,
                                    Finish finish) {
    __shared__ WarpSums<1> warps;
    for (u32 start = 0; start < group.count; start += 8) {
        const u32 position = start + threadIdx.x % 32 / 4;
        Rows<1> rows = {{nullptr}, p.x_columns};
        if (position < group.count)
            rows.rows[0] = p.x + u64(p.pairs[group.first + position] / pairs_per_row) * p.x_columns;
        float acc[ROW_TILES][1][4] = {};
        accumulate<Scheme>(acc, operand, rows);
        __syncthreads();
        warps.store(acc);
        __syncthreads();
        finish(start, warps);
    }
}

// inner[pair] = silu(gate x) * (up x), each rounded; block (i, a): 16 rows of gate and the same of up, expert of group a.
template <typename Scheme> __device__ __forceinline__ void gate_up(const MoeParams& p) {
    wait_for_predecessor();
    const Group group = p.groups[blockIdx.y];
    Operand operand = operand_of<Scheme>(p, group);
    const u32 intermediate = p.n / 2;
    operand.tiles[0] = blockIdx.x;
    operand.tiles[1] = intermediate / 16 + blockIdx.x;
    const float* row_scales = p.row_scales ? p.row_scales + u64(group.expert) * p.n : nullptr;
    moe<Scheme>(p, group, operand, p.top_k, [&](u32 start, const WarpSums<1>& warps) {
        for (u32 i = threadIdx.x; i < 8 * 16; i += blockDim.x) {
            const u32 token = i / 16, row = blockIdx.x * 16 + i % 16;
            if (start + token >= group.count) continue;
            float gate = warps.total(token, i % 16), up = warps.total(token, 16 + i % 16);
            if (row_scales) {
                gate *= row_scales[row];
                up *= row_scales[intermediate + row];
            }
            gate = rounded<bf16>(gate);
            const float value = rounded<bf16>(gate / (1.0f + expf(-gate))) * rounded<bf16>(up);
            const u64 pair = p.pairs[group.first + start + token];
            static_cast<u16*>(p.out)[pair * intermediate + row] = u16(pack_bf16(value, 0.0f));
        }
    });
}

// partial[pair] = down inner[pair], float32; block (i, a): 32 rows of the expert of group a.
template <typename Scheme> __device__ __forceinline__ void down(const MoeParams& p) {
    wait_for_predecessor();
    const Group group = p.groups[blockIdx.y];
    Operand operand = operand_of<Scheme>(p, group);
    operand.tiles[0] = blockIdx.x * ROW_TILES;
    operand.tiles[1] = blockIdx.x * ROW_TILES + 1;
    const float* row_scales = p.row_scales ? p.row_scales + u64(group.expert) * p.n : nullptr;
    moe<Scheme>(p, group, operand, 1, [&](u32 start, const WarpSums<1>& warps) {
        for (u32 i = threadIdx.x; i < 8 * OUTPUTS; i += blockDim.x) {
            const u32 token = i / OUTPUTS, row = blockIdx.x * OUTPUTS + i % OUTPUTS;
            if (start + token >= group.count || row >= p.n) continue;
            const float sum = warps.total(token, i % OUTPUTS);
            const u64 pair = p.pairs[group.first + start + token];
            static_cast<float*>(p.out)[pair * p.n + row] = row_scales ? sum * row_scales[row] : sum;
        }
    });
}

// At least BLOCKS blocks on a multiprocessor, as in linear.cuh.
#define EXPERTS(NAME, SCHEME, BLOCKS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(MAX_WARPS * 32, BLOCKS) gate_up_##NAME(const MoeParams p) {           \
        gate_up<SCHEME>(p);                                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(MAX_WARPS * 32, BLOCKS) down_##NAME(const MoeParams p) {              \
        down<SCHEME>(p);                                                                                               \
    }
