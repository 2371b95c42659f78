// The linear layers of decode for more rows of x than one product takes, whatever the scheme of the weights. No kernel: the
// linear_*.cu make them, linear_add.cu adds what they leave.
//
// A block has 128 rows of W, up to 64 rows of x and a part of k. x comes into shared memory once for all its warps, in operand order;
// a warp has two row tiles, unpacks them once, and multiplies them with every tile of x. The additions are those of linear.cuh, bit by
// bit: what one of its eight warps adds is a lane of k here. Two lanes in turn or one are a block's part, and the sums of the parts
// are further up in the tree.
#pragma once
#include "linear.cuh"
#include "rounds.cuh"

constexpr int MANY_WARPS = 4;
// Rounds on their way, as in linear.rs.
#if __CUDA_ARCH__ == 900
constexpr int MANY_STAGES = 3;
#else
constexpr int MANY_STAGES = 2;
#endif
static_assert(ROUND_STEPS == MANY_WARPS, "a warp copies a step of x");

// Dynamic shared memory; behind it room for the sums of a lane of k, where a block has two.
template <typename Scheme, int TOKEN_TILES> struct ManyShared {
    static constexpr int SPANS = ROUND_K / Scheme::SPAN;
    Ring<Scheme, MANY_ROW_TILES, MANY_STAGES * SPANS> rings[MANY_WARPS];
    uint4 x[MANY_STAGES][ROUND_STEPS][TOKEN_TILES][32];
};

// A block's rounds: all of its first lane of k, then all of its second.
struct Rounds {
    u32 first_lane;
    u32 per_lane;
    u32 count;

    template <typename Scheme> static __device__ __forceinline__ Rounds of(const LinearParams& p) {
        constexpr u32 SPANS = ROUND_K / Scheme::SPAN;
        const u32 lanes = WARPS / gridDim.y, first_lane = blockIdx.y * lanes, num_spans = p.k / Scheme::SPAN;
        const u32 spans = num_spans > first_lane ? (num_spans - first_lane + WARPS - 1) / WARPS : 0;
        const u32 per_lane = (spans + SPANS - 1) / SPANS;
        return {first_lane, per_lane, per_lane * lanes};
    }

    // The first span of a round; each further one is WARPS later.
    template <typename Scheme> __device__ __forceinline__ u32 first_span(u32 round) const {
        constexpr u32 SPANS = ROUND_K / Scheme::SPAN;
        const bool is_second = round >= per_lane;
        return first_lane + is_second + WARPS * SPANS * (is_second ? round - per_lane : round);
    }
};

// partial[part][row of x][row of W], part blockIdx.y of 4 or 8. Blocks over the same weights are neighbours.
template <typename Scheme, int TOKEN_TILES> __device__ __forceinline__ void linear_many(const LinearParams& p) {
    constexpr u32 SPANS = ROUND_K / Scheme::SPAN, THREADS = MANY_WARPS * 32;
    extern __shared__ uint4 dynamic[];
    auto& shared = *reinterpret_cast<ManyShared<Scheme, TOKEN_TILES>*>(dynamic);
    float* first_sums = reinterpret_cast<float*>(&shared + 1);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 first_token = blockIdx.x % p.token_blocks * (TOKEN_TILES * 8);
    // n is padded to two tiles. Beyond the last two the results are not stored.
    const u32 num_tiles = (p.n + 31) / 32 * 2, tile = (blockIdx.x / p.token_blocks * MANY_WARPS + warp) * MANY_ROW_TILES;
    Operand<MANY_ROW_TILES> operand = {p.codes, p.scales, p.k, {}};
#pragma unroll
    for (int r = 0; r < MANY_ROW_TILES; r++) operand.tiles[r] = min(tile, num_tiles - MANY_ROW_TILES) + r;
    const auto source = source_of<Scheme>(operand);
    const u32 num_spans = p.k / Scheme::SPAN;
    const Rounds rounds = Rounds::of<Scheme>(p);

    auto load_weights = [&](u32 slot, u32 round) {
        const u32 first_span = rounds.first_span<Scheme>(round);
#pragma unroll
        for (u32 s = 0; s < SPANS; s++)
            if (first_span + WARPS * s < num_spans) shared.rings[warp].load(slot * SPANS + s, source, first_span + WARPS * s);
    };
    // Warp i copies step i of every tile of x.
    const u32 token = first_token + lane / 4;
    const u16* x_row = p.x + u64(token) * p.x_columns;
    auto load_x = [&](u32 slot, u32 round) {
        const u32 span = rounds.first_span<Scheme>(round) + warp * 32 / Scheme::SPAN * WARPS;
        const u32 column = span * Scheme::SPAN + warp * 32 % Scheme::SPAN + 8 * (lane % 4);
#pragma unroll
        for (u32 i = 0; i < TOKEN_TILES; i++) {
            const bool is_valid = token + 8 * i < p.rows && column < p.x_columns;
            copy_async(shared_address(&shared.x[slot][warp][i][lane]), is_valid ? x_row + u64(8 * i) * p.x_columns + column : p.x, is_valid);
        }
    };
#pragma unroll
    for (u32 s = 0; s < MANY_STAGES; s++)
        if (s < rounds.count) load_weights(s, s);
    wait_for_predecessor();
    allow_successor();
#pragma unroll
    for (u32 s = 0; s < MANY_STAGES; s++) {
        if (s < rounds.count) load_x(s, s);
        commit_copies();
    }

    float acc[MANY_ROW_TILES][TOKEN_TILES][4] = {};
    u32 slot = 0;
    for (u32 round = 0; round < rounds.count; round++) {
        wait_copies<MANY_STAGES - 1>();
        __syncthreads();
        multiply_round<Scheme, TOKEN_TILES, TOKEN_TILES>(acc, shared.rings[warp], slot * SPANS, shared.x[slot],
                                                         rounds.first_span<Scheme>(round), WARPS, num_spans);
        if (round + 1 == rounds.per_lane && rounds.count > rounds.per_lane) {
            // The thread's own sums of its first lane of k.
#pragma unroll
            for (int i = 0; i < MANY_ROW_TILES * TOKEN_TILES * 4; i++) {
                float& sum = (&acc[0][0][0])[i];
                first_sums[i * THREADS + threadIdx.x] = sum;
                sum = 0.0f;
            }
        }
        const u32 next = round + MANY_STAGES;
        if (next < rounds.count) {
            // All warps have read the slot.
            __syncthreads();
            load_weights(slot, next);
            load_x(slot, next);
        }
        commit_copies();
        slot = slot + 1 == MANY_STAGES ? 0 : slot + 1;
    }
    if (rounds.count > rounds.per_lane) {
#pragma unroll
        for (int i = 0; i < MANY_ROW_TILES * TOKEN_TILES * 4; i++) (&acc[0][0][0])[i] += first_sums[i * THREADS + threadIdx.x];
    }
    if (tile >= num_tiles) return;
    const u32 stride = num_tiles * 16;
    float* partial = p.partial + (u64(blockIdx.y) * p.rows + first_token) * stride + tile * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const u32 at = 8 * i + 2 * (lane % 4) + j;
            if (first_token + at >= p.rows) continue;
#pragma unroll
            for (int r = 0; r < MANY_ROW_TILES; r++) {
#pragma unroll
                for (int half = 0; half < 2; half++)
                    partial[u64(at) * stride + 16 * r + 8 * half] = acc[r][i][2 * half + j] * Scheme::FACTOR;
            }
        }
    }
}

// At least BLOCKS blocks on a multiprocessor.
#define LINEAR_MANY_KERNEL(NAME, SCHEME, TOKEN_TILES, BLOCKS)                                                          \
    extern "C" __global__ void __launch_bounds__(MANY_WARPS * 32, BLOCKS)                                              \
        linear_many_##NAME##_t##TOKEN_TILES(const LinearParams p) {                                                    \
        linear_many<SCHEME, TOKEN_TILES>(p);                                                                           \
    }
#define LINEAR_MANY(NAME, SCHEME)                                                                                      \
    LINEAR_MANY_KERNEL(NAME, SCHEME, 4, 3)                                                                             \
    LINEAR_MANY_KERNEL(NAME, SCHEME, 8, 2)
