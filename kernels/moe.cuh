// The experts of a layer at decode, whatever the scheme of their weights. No kernel: the moe_*.cu make them, router.cu or
// moe.cu lists the pairs, moe.cu combines.
#pragma once
#include "decode_linear.cuh"
#include "pairs.cuh"

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

// gate_up of TOKEN_TILES * 8 pairs at a time. The block's warps share k.
template <typename Ring, int TOKEN_TILES, typename Shared>
__device__ __forceinline__ void gate_up(const MoeParams& p, const Group& group, const Operand<Ring::ROW_TILES>& operand,
                                        Shared& shared) {
    constexpr int HALF = Ring::ROW_TILES / 2 * 16, TOKENS = TOKEN_TILES * 8;
    const u32 warp = threadIdx.x / 32, intermediate = p.n / 2;
    Ring& ring = shared.rings[warp];
    auto& warps = reinterpret_cast<WarpSums<WARPS, Ring::ROW_TILES, TOKEN_TILES>&>(shared);
    static_assert(sizeof(warps) <= sizeof(shared), "sums of the warps do not fit");
    const float* row_scales = p.row_scales ? p.row_scales + u64(group.expert) * p.n : nullptr;
    for (u32 first = 0; first < group.count; first += TOKENS) {
        start(ring, operand, warp, WARPS);
        Rows<TOKEN_TILES, TOKEN_TILES == 1 ? 2 : 1, 2> rows = {p.x, p.x_columns, {}};
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
            const u32 position = first + 8 * i + threadIdx.x % 32 / 4;
            rows.rows[i] = position < group.count ? p.pairs[group.first + position] / p.top_k : NO_ROW;
        }
        float acc[Ring::ROW_TILES][TOKEN_TILES][4] = {};
        accumulate(acc, ring, operand, rows, warp, WARPS);
        __syncthreads();
        warps.store(acc, warp);
        __syncthreads();
        for (u32 i = threadIdx.x; i < TOKENS * HALF; i += WARPS * 32) {
            const u32 token = i / HALF, row = blockIdx.x * HALF + i % HALF;
            if (first + token >= group.count || row >= intermediate) continue;
            float gate = warps.total(token, i % HALF), up = warps.total(token, HALF + i % HALF);
            if (row_scales) {
                gate *= row_scales[row];
                up *= row_scales[intermediate + row];
            }
            gate = rounded<bf16>(gate);
            const float value = rounded<bf16>(__fdividef(gate, 1.0f + expf(-gate))) * rounded<bf16>(up);
            const u64 pair = p.pairs[group.first + first + token];
            static_cast<u16*>(p.out)[pair * intermediate + row] = u16(pack_bf16(value, 0.0f));
        }
        // The sums lie where the next weights go.
        __syncthreads();
    }
}

// inner[pair] = silu(gate x) * (up x), each rounded; block (i, a): ROW_TILES / 2 tiles of gate and the same of up, expert of group
// a. With two tiles of each, up to 16 pairs share one reading of the weights.
template <typename Scheme, int ROW_TILES, int STAGES> __device__ __forceinline__ void gate_up(const MoeParams& p) {
    typedef Ring<Scheme, ROW_TILES, STAGES> R;
    __shared__ struct { R rings[WARPS]; } shared;
    wait_for_predecessor();
    allow_successor();
    const Group group = load_group(p.groups + blockIdx.y);
    Operand<ROW_TILES> operand = operand_of<Scheme, ROW_TILES>(p, group);
    const u32 tiles = p.n / 32;
#pragma unroll
    for (int r = 0; r < ROW_TILES / 2; r++) {
        // Beyond the last tile the results are not stored.
        const u32 tile = min(blockIdx.x * (ROW_TILES / 2) + r, tiles - 1);
        operand.tiles[r] = tile;
        operand.tiles[ROW_TILES / 2 + r] = tiles + tile;
    }
    if (ROW_TILES == 2 || group.count <= 8) {
        gate_up<R, 1>(p, group, operand, shared);
    } else {
        gate_up<R, ROW_TILES == 2 ? 1 : 2>(p, group, operand, shared);
    }
}

// The groups are two kernels old here: gate_up lets this one start after it has waited for their maker. So weights come before
// gate_up has ended.
template <typename Ring, int TOKEN_TILES>
__device__ __forceinline__ void down(const MoeParams& p, const Group& group, const Operand<Ring::ROW_TILES>& operand, Ring& ring,
                                     u32 first_tile) {
    const u32 lane = threadIdx.x % 32;
    const float* row_scales = p.row_scales ? p.row_scales + u64(group.expert) * p.n : nullptr;
    for (u32 first = 0; first < group.count; first += TOKEN_TILES * 8) {
        if (first > 0) start(ring, operand, 0, 1);
        Rows<TOKEN_TILES, TOKEN_TILES == 1 ? 4 : 1, TOKEN_TILES == 1 ? 4 : 2> rows = {p.x, p.x_columns, {}};
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
            const u32 position = first + 8 * i + lane / 4;
            rows.rows[i] = position < group.count ? load_shared_value(p.pairs + group.first + position) : NO_ROW;
        }
        float acc[Ring::ROW_TILES][TOKEN_TILES][4] = {};
        accumulate(acc, ring, operand, rows, 0, 1);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const u32 position = first + 8 * i + 2 * (lane % 4) + j;
                if (position >= group.count) continue;
                const u64 pair = load_shared_value(p.pairs + group.first + position);
                float* out = static_cast<float*>(p.out) + pair * p.n;
#pragma unroll
                for (int r = 0; r < Ring::ROW_TILES; r++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const u32 row = (first_tile + r) * 16 + lane / 4 + 8 * half;
                        const float sum = acc[r][i][2 * half + j];
                        if (row < p.n) out[row] = row_scales ? sum * row_scales[row] : sum;
                    }
                }
            }
        }
        __syncwarp();
    }
}

// partial[pair] = down inner[pair], float32; a warp has ROW_TILES tiles of the expert of group blockIdx.y, and all of k.
template <typename Scheme, int ROW_TILES, int STAGES> __device__ __forceinline__ void down(const MoeParams& p) {
    typedef Ring<Scheme, ROW_TILES, STAGES> R;
    __shared__ R rings[WARPS];
    const u32 warp = threadIdx.x / 32, first_tile = (blockIdx.x * WARPS + warp) * ROW_TILES;
    const Group group = load_group(p.groups + blockIdx.y);
    Operand<ROW_TILES> operand = operand_of<Scheme, ROW_TILES>(p, group);
    const bool has_work = group.count > 0 && first_tile * 16 < p.padded_n;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) operand.tiles[r] = first_tile + r;
    if (has_work) start(rings[warp], operand, 0, 1);
    wait_for_predecessor();
    allow_successor();
    if (!has_work) return;
    if (group.count <= 8) {
        down<R, 1>(p, group, operand, rings[warp], first_tile);
    } else {
        down<R, 2>(p, group, operand, rings[warp], first_tile);
    }
}

// down and combine of a single row: out = sum over its experts, ascending, of weight * down inner. A block has one row tile, each
// warp one expert.
template <typename Scheme, int STAGES> __device__ __forceinline__ void down_row(const MoeParams& p) {
    typedef Ring<Scheme, 1, STAGES> R;
    __shared__ R rings[ROW_WARPS];
    __shared__ float values[ROW_WARPS][16], weights[ROW_WARPS];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Each group has one pair.
    Group group = {0, 0, 0, 0};
    if (warp < p.max_groups) group = load_group(p.groups + warp);
    Operand<1> operand = operand_of<Scheme, 1>(p, group);
    operand.tiles[0] = blockIdx.x;
    if (group.count > 0) start(rings[warp], operand, 0, 1);
    const u32 pair = group.count > 0 ? load_shared_value(p.pairs + group.first) : 0;
    wait_for_predecessor();
    allow_successor();
    if (group.count > 0) {
        const Rows<1, 4, 4> rows = {p.x, p.x_columns, {lane < 4 ? pair : NO_ROW}};
        float acc[1][1][4] = {};
        accumulate(acc, rings[warp], operand, rows, 0, 1);
        if (lane % 4 == 0) {
            values[warp][lane / 4] = acc[0][0][0];
            values[warp][lane / 4 + 8] = acc[0][0][2];
        }
    }
    if (lane == 0) weights[warp] = group.count > 0 ? load_shared_value(p.weights + pair) : 0.0f;
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

// STAGES of the ring for four row tiles; twice as many for two. At least BLOCKS blocks of gate_up with four on a multiprocessor.
#define EXPERTS(NAME, SCHEME, STAGES, BLOCKS)                                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 5) gate_up_few_##NAME(const MoeParams p) {                \
        gate_up<SCHEME, 2, 2 * STAGES>(p);                                                                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) gate_up_##NAME(const MoeParams p) {               \
        gate_up<SCHEME, 4, STAGES>(p);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 4) down_##NAME(const MoeParams p) {                       \
        down<SCHEME, 2, 2 * STAGES>(p);                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(ROW_WARPS * 32, 2) down_row_##NAME(const MoeParams p) {               \
        down_row<SCHEME, 2 * STAGES>(p);                                                                               \
    }
