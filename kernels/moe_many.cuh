// The two products of a layer of experts for more than a few pairs, whatever the scheme of the weights. No kernel: the moe_*.cu make
// them.
//
// A block has 8 row tiles of an expert, two for each warp, and all of k; x of 8 or 16 pairs comes into shared memory once for all
// warps, some rounds ahead, as weights do. The additions are those of moe.cuh, bit by bit: what one of its four warps adds in
// gate_up is a lane of k here, one after the other.
#pragma once
#include "moe.cuh"
#include "rounds.cuh"

// Most token tiles at a time.
constexpr int MANY_TILES = 2;
// Lanes of k of gate_up; down has one.
constexpr u32 GATE_UP_LANES = WARPS;
static_assert(ROUND_STEPS == WARPS, "a warp copies a step of x");

template <typename Scheme> struct ManyShared {
    static constexpr int SPANS = ROUND_K / Scheme::SPAN;
    // 16-byte vectors of a lane for a round of a row tile: 2, 4, 8 for 4, 8, 16 bits. Rounds on their way, as in moe.rs: with few, blocks
    // of down begin beside the last ones of gate_up.
    static constexpr int VECTORS = SPANS * Scheme::VECTORS;
    static constexpr int STAGES = VECTORS == 8 ? 2 : 3;
    Ring<Scheme, MANY_ROW_TILES, STAGES * SPANS> rings[WARPS];
    uint4 x[STAGES][ROUND_STEPS][MANY_TILES][32];
};

// Rounds in order: all of a lane of k, then all of the next.
struct Round {
    u32 lane;
    u32 index; // in the lane

    __device__ __forceinline__ void advance(u32 per_lane) {
        index++;
        if (index == per_lane) index = 0, lane++;
    }
    template <typename Scheme> __device__ __forceinline__ u32 first_span(u32 lanes) const {
        return lane + lanes * (ROUND_K / Scheme::SPAN) * index;
    }
};

// How a block's weights and x come, round by round.
template <typename Scheme, int TOKEN_TILES> struct Pipeline {
    typedef ManyShared<Scheme> Shared;
    static constexpr u32 SPANS = Shared::SPANS, STAGES = Shared::STAGES;
    Shared& shared;
    const Source<Scheme, MANY_ROW_TILES>& source;
    u32 lanes, per_lane, num_spans;
    const uint4* rows[TOKEN_TILES]; // the lane's rows of x
    u32 x_vectors;                  // of a row
    Round next = {0, 0};
    u32 next_slot = 0;

    __device__ __forceinline__ Pipeline(Shared& shared_, const Source<Scheme, MANY_ROW_TILES>& source_, u32 k, u32 lanes_)
        : shared(shared_), source(source_), lanes(lanes_), num_spans(k / Scheme::SPAN) {
        per_lane = ((num_spans + lanes - 1) / lanes + SPANS - 1) / SPANS;
    }

    __device__ __forceinline__ void load_weights(u32 slot, const Round& round) {
        const u32 first = round.first_span<Scheme>(lanes);
#pragma unroll
        for (u32 s = 0; s < SPANS; s++)
            if (first + lanes * s < num_spans) shared.rings[threadIdx.x / 32].load(slot * SPANS + s, source, first + lanes * s);
    }
    // Warp i copies step i of every tile.
    __device__ __forceinline__ void load_x(u32 slot, const Round& round) {
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const u32 span = round.first_span<Scheme>(lanes) + warp * 32 / Scheme::SPAN * lanes;
        const u32 vector = span * (Scheme::SPAN / 8) + warp * 32 % Scheme::SPAN / 8 + lane % 4;
        const bool is_valid = vector < x_vectors;
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++)
            copy_async(shared_address(&shared.x[slot][warp][i][lane]), rows[i] + (is_valid ? vector : 0), is_valid);
    }
    // The first rounds but one; of their weights only what `load_weights` has not begun with.
    __device__ __forceinline__ void start(bool has_weights) {
        next = {0, 0};
        next_slot = 0;
#pragma unroll
        for (u32 s = 0; s + 1 < STAGES; s++) load(has_weights);
    }
    __device__ __forceinline__ void start_weights() {
        Round round = {0, 0};
#pragma unroll
        for (u32 s = 0; s + 1 < STAGES; s++) {
            if (round.lane < lanes) load_weights(s, round);
            round.advance(per_lane);
        }
    }
    __device__ __forceinline__ void load(bool has_weights) {
        if (next.lane < lanes) {
            if (!has_weights) load_weights(next_slot, next);
            load_x(next_slot, next);
        }
        commit_copies();
        next.advance(per_lane);
        next_slot = next_slot + 1 == STAGES ? 0 : next_slot + 1;
    }

    // acc += W x over all rounds that `start` has begun with; `end_of_lane` takes the sums of every lane of k and leaves zeros.
    template <typename F>
    __device__ __forceinline__ void multiply(float (&acc)[MANY_ROW_TILES][TOKEN_TILES][4], F end_of_lane) {
        u32 slot = 0;
#pragma unroll 1
        for (u32 k_lane = 0; k_lane < lanes; k_lane++) {
#pragma unroll 1
            for (u32 index = 0; index < per_lane; index++) {
                wait_copies<STAGES - 2>();
                __syncthreads();
                // Into the slot that all warps have done with.
                load(false);
                const u32 first_span = Round{k_lane, index}.first_span<Scheme>(lanes);
                multiply_round<Scheme, TOKEN_TILES, MANY_TILES>(acc, shared.rings[threadIdx.x / 32], slot * SPANS, shared.x[slot],
                                                                first_span, lanes, num_spans);
                slot = slot + 1 == STAGES ? 0 : slot + 1;
            }
            end_of_lane(k_lane);
        }
        wait_copies<0>();
        __syncthreads();
    }
};

// inner[pair] = silu(gate x) * (up x), each rounded, of up to 16 pairs at a time; a warp has a tile of gate and the same of up.
template <typename Scheme, int TOKEN_TILES>
__device__ __forceinline__ void gate_up_many(const MoeParams& p, const Group& group, u32 tile,
                                             const Source<Scheme, MANY_ROW_TILES>& source, ManyShared<Scheme>& shared) {
    typedef float Sums[MANY_ROW_TILES][TOKEN_TILES][4];
    const u32 lane = threadIdx.x % 32, intermediate = p.n / 2;
    const u32* pairs = p.pairs + group.first;
    Pipeline<Scheme, TOKEN_TILES> pipeline(shared, source, p.k, GATE_UP_LANES);
    pipeline.x_vectors = p.x_columns / 8;
    for (u32 first = 0; first < group.count; first += TOKEN_TILES * 8) {
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
            const u32 pair = pairs[min(first + 8 * i + lane / 4, group.count - 1)];
            pipeline.rows[i] = reinterpret_cast<const uint4*>(p.x) + u64(pair / p.top_k) * pipeline.x_vectors;
        }
        pipeline.start(false);
        // A tree over the lanes of k.
        Sums acc = {}, nodes[2] = {};
        pipeline.multiply(acc, [&](u32 k_lane) {
#pragma unroll
            for (int j = 0; j < MANY_ROW_TILES * TOKEN_TILES * 4; j++) {
                float& sum = (&acc[0][0][0])[j];
                float& low = (&nodes[0][0][0][0])[j];
                float& high = (&nodes[1][0][0][0])[j];
                if (k_lane == 0) low = sum;
                if (k_lane == 1) low += sum;
                if (k_lane == 2) high = sum;
                if (k_lane == 3) low += high + sum;
                sum = 0.0f;
            }
        });
        const Sums& totals = nodes[0];
        const float* row_scales = p.row_scales ? p.row_scales + u64(group.expert) * p.n : nullptr;
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const u32 position = first + 8 * i + 2 * (lane % 4) + j;
                if (position >= group.count) continue;
                u16* out = static_cast<u16*>(p.out) + u64(pairs[position]) * intermediate;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const u32 row = tile * 16 + lane / 4 + 8 * half;
                    if (row >= intermediate) continue;
                    float gate = totals[0][i][2 * half + j] * Scheme::FACTOR, up = totals[1][i][2 * half + j] * Scheme::FACTOR;
                    if (row_scales) {
                        gate *= row_scales[row];
                        up *= row_scales[intermediate + row];
                    }
                    out[row] = inner_value(gate, up);
                }
            }
        }
    }
}

template <typename Scheme> __device__ __forceinline__ void gate_up_many(const MoeParams& p) {
    extern __shared__ uint4 dynamic[];
    auto& shared = *reinterpret_cast<ManyShared<Scheme>*>(dynamic);
    wait_for_predecessor();
    allow_successor();
    const Group group = load_group(p.groups + blockIdx.y);
    if (group.count == 0) return;
    const u32 tiles = p.n / 32, tile = blockIdx.x * WARPS + threadIdx.x / 32;
    Operand<MANY_ROW_TILES> operand = operand_of<Scheme, MANY_ROW_TILES>(p, group);
    // Beyond the last tile the results are not stored.
    operand.tiles[0] = min(tile, tiles - 1);
    operand.tiles[1] = tiles + operand.tiles[0];
    const auto source = source_of<Scheme>(operand);
    if (group.count <= 8) {
        gate_up_many<Scheme, 1>(p, group, tile, source, shared);
    } else {
        gate_up_many<Scheme, MANY_TILES>(p, group, tile, source, shared);
    }
}

// partial[pair] = down inner[pair], float32. The groups are two kernels old here: gate_up lets this one start after it has waited
// for their maker. So weights come before gate_up has ended.
template <typename Scheme, int TOKEN_TILES>
__device__ __forceinline__ void down_many(const MoeParams& p, const Group& group, u32 first_tile,
                                          const Source<Scheme, MANY_ROW_TILES>& source, ManyShared<Scheme>& shared) {
    const u32 lane = threadIdx.x % 32;
    const u32* pairs = p.pairs + group.first;
    Pipeline<Scheme, TOKEN_TILES> pipeline(shared, source, p.k, 1);
    pipeline.x_vectors = p.x_columns / 8;
    pipeline.start_weights();
    u32 own_pairs[TOKEN_TILES];
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++) own_pairs[i] = load_shared_value(pairs + min(8 * i + lane / 4, group.count - 1));
    wait_for_predecessor();
    allow_successor();
    for (u32 first = 0; first < group.count; first += TOKEN_TILES * 8) {
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
            if (first > 0) own_pairs[i] = load_shared_value(pairs + min(first + 8 * i + lane / 4, group.count - 1));
            pipeline.rows[i] = reinterpret_cast<const uint4*>(p.x) + u64(own_pairs[i]) * pipeline.x_vectors;
        }
        pipeline.start(first == 0);
        float acc[MANY_ROW_TILES][TOKEN_TILES][4] = {};
        pipeline.multiply(acc, [](u32) {});
        const float* row_scales = p.row_scales ? p.row_scales + u64(group.expert) * p.n : nullptr;
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const u32 token = 2 * (lane % 4) + j, position = first + 8 * i + token;
                // Lane 4 g has the pair of token g.
                const u32 pair = __shfl_sync(ALL, own_pairs[i], 4 * token);
                if (position >= group.count) continue;
                float* out = static_cast<float*>(p.out) + u64(pair) * p.n;
#pragma unroll
                for (int r = 0; r < MANY_ROW_TILES; r++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const u32 row = (first_tile + r) * 16 + lane / 4 + 8 * half;
                        const float sum = acc[r][i][2 * half + j] * Scheme::FACTOR;
                        if (row < p.n) out[row] = row_scales ? sum * row_scales[row] : sum;
                    }
                }
            }
        }
    }
}

template <typename Scheme> __device__ __forceinline__ void down_many(const MoeParams& p) {
    extern __shared__ uint4 dynamic[];
    auto& shared = *reinterpret_cast<ManyShared<Scheme>*>(dynamic);
    const Group group = load_group(p.groups + blockIdx.y);
    if (group.count == 0) {
        wait_for_predecessor();
        allow_successor();
        return;
    }
    const u32 first_tile = (blockIdx.x * WARPS + threadIdx.x / 32) * MANY_ROW_TILES, tiles = p.padded_n / 16;
    Operand<MANY_ROW_TILES> operand = operand_of<Scheme, MANY_ROW_TILES>(p, group);
    // Beyond the last tiles the results are not stored.
#pragma unroll
    for (int r = 0; r < MANY_ROW_TILES; r++) operand.tiles[r] = min(first_tile, tiles - MANY_ROW_TILES) + r;
    const auto source = source_of<Scheme>(operand);
    if (group.count <= 8) {
        down_many<Scheme, 1>(p, group, first_tile, source, shared);
    } else {
        down_many<Scheme, MANY_TILES>(p, group, first_tile, source, shared);
    }
}

// At least as many blocks on a multiprocessor as its shared memory holds.
template <typename Scheme> constexpr int MANY_BLOCKS = __CUDA_ARCH__ == 900 ? (ManyShared<Scheme>::VECTORS == 2 ? 4 : 3) : 2;
#define EXPERTS_MANY(NAME, SCHEME)                                                                                     \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, MANY_BLOCKS<SCHEME>)                                      \
        gate_up_many_##NAME(const MoeParams p) {                                                                       \
        gate_up_many<SCHEME>(p);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, MANY_BLOCKS<SCHEME>)                                      \
        down_many_##NAME(const MoeParams p) {                                                                          \
        down_many<SCHEME>(p);                                                                                          \
    }
