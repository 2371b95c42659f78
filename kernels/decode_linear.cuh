// What the decode products of all schemes share: the way of weights into shared memory, x as operand, the loop over k, the
// sum over warps. No kernel. The schemes are structs `Bf16`, `Fp8`, `Int4` and `Nvfp4` (bf16.cuh, fp8.cuh, int4.cuh,
// nvfp4.cuh): how codes become operands.
//
// Weights are the A operand; lane l, g = l / 4, t = l % 4 has rows g and g + 8 of a tile of 16 rows of W and, of 32 k, those
// from 8t on. A tile of 4-bit codes is 16 rows by 64 k, 512 bytes, 16 for each lane: word w has row g + 8 (w % 2),
// k = 32 (w / 2) + 8t + 2j in nibble j and the next k in nibble j + 4, so that one operation takes a pair of neighbours to both halves
// of a register. Tiles of 8 and 16 bits are 16 rows by 32 k in natural order: see their schemes. So the 16 bytes of x that a lane
// loads are its B operand as they are.
//
// k is cut in spans, and the spans of a product are dealt out to its warps in turn. A warp copies its weights into a ring of its
// own, some spans ahead, so that registers do not limit how many bytes are on their way; x comes from the first- or second-level
// cache into registers, a few steps of 32 k ahead.
#pragma once
#include "prelude.cuh"

// What a scheme has: SPAN, k of a span; VECTORS, 16-byte vectors of codes of a lane for a span of a row tile; WORDS, scale words of
// a row for a span (0: none); K_PER_WORD; GROUP, k after which sums are scaled (0: never); FACTOR, a power of two that the sums are
// multiplied with at the end; Group, what a lane keeps of a row tile for a group; and the functions used below.

// The weights of a product: a matrix and the row tiles of 16 that are computed.
template <int ROW_TILES> struct Operand {
    const uint4* codes;
    const u32* scales; // [n / 16, words of k, 16 rows]
    u32 k;             // with padding
    u32 tiles[ROW_TILES];
};

// base + 16 * index, in one instruction.
__device__ __forceinline__ const char* advance_vectors(const void* base, u32 index) {
    u64 result;
    asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(result) : "r"(index), "l"(u64(base)));
    return reinterpret_cast<const char*>(result);
}

// Where a lane's codes and scale words of span 0 are, in vectors of 16 bytes: 4 of them are the words of 16 rows.
template <typename Scheme, int ROW_TILES> struct Source {
    static constexpr u32 PER_TILE = 4 * Scheme::WORDS, SCALE_VECTORS = ROW_TILES * PER_TILE;
    static_assert(SCALE_VECTORS <= 32, "more scale words than lanes copy");
    const uint4* codes;
    const u32* scales;
    u32 starts[ROW_TILES];
    u32 scale_start;
};
template <typename Scheme, int ROW_TILES>
__device__ __forceinline__ Source<Scheme, ROW_TILES> source_of(const Operand<ROW_TILES>& operand) {
    constexpr u32 PER_TILE = Source<Scheme, ROW_TILES>::PER_TILE;
    const u32 lane = threadIdx.x % 32;
    Source<Scheme, ROW_TILES> source = {operand.codes, operand.scales, {}, 0};
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        source.starts[r] = operand.tiles[r] * (operand.k / Scheme::SPAN) * (Scheme::VECTORS * 32) + lane;
        if constexpr (Scheme::WORDS > 0) {
            const u32 start = operand.tiles[r] * (operand.k / Scheme::K_PER_WORD) * 4 + lane % PER_TILE;
            source.scale_start = lane / PER_TILE == r ? start : source.scale_start;
        }
    }
    return source;
}

// The scale words of a span.
template <int ROW_TILES, int WORDS> struct Scales {
    alignas(16) u32 scales[ROW_TILES][WORDS][16];
};
template <int ROW_TILES> struct Scales<ROW_TILES, 0> {};

// A warp's spans on their way: STAGES of them.
template <typename Scheme_, int ROW_TILES_, int STAGES_> struct Ring {
    using Scheme = Scheme_;
    static constexpr int ROW_TILES = ROW_TILES_, STAGES = STAGES_;
    struct Stage : Scales<ROW_TILES, Scheme::WORDS> {
        uint4 codes[ROW_TILES][Scheme::VECTORS][32];
    };
    Stage stages[STAGES];

    __device__ __forceinline__ void load(u32 slot, const Source<Scheme, ROW_TILES>& source, u32 span) {
        const u32 lane = threadIdx.x % 32, stage = shared_address(&stages[slot]);
        const u32 codes_at = stage + u32(sizeof(Scales<ROW_TILES, Scheme::WORDS>)) * (Scheme::WORDS > 0);
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const char* codes = advance_vectors(source.codes, source.starts[r] + span * (Scheme::VECTORS * 32));
#pragma unroll
            for (int v = 0; v < Scheme::VECTORS; v++)
                copy_async(codes_at + (r * Scheme::VECTORS + v) * 512 + 16 * lane, codes + 512 * v, true);
        }
        if constexpr (Scheme::WORDS > 0) {
            const u32 word = span * Scheme::SPAN / Scheme::K_PER_WORD;
            if (lane < Source<Scheme, ROW_TILES>::SCALE_VECTORS)
                copy_async(stage + 16 * lane, advance_vectors(source.scales, source.scale_start + 4 * word), true);
        }
    }
};

// The lane's rows of x: token g of every tile. Tokens that do not exist are any that do: their results are not stored. x is loaded
// AHEAD steps of 32 k before it is multiplied, or whole spans; UNROLL steps, a multiple of AHEAD up to a span, are unrolled.
template <int TOKEN_TILES_, int AHEAD_, int UNROLL_> struct Rows {
    static constexpr int TOKEN_TILES = TOKEN_TILES_, AHEAD = AHEAD_, UNROLL = UNROLL_;
    const uint4* rows[TOKEN_TILES];
    u32 vectors; // of a row

    __device__ __forceinline__ explicit Rows(u32 columns) : vectors(columns / 8) {}
    __device__ __forceinline__ void set(int i, const u16* x, u32 row) {
        rows[i] = reinterpret_cast<const uint4*>(x) + u64(row) * vectors;
    }
};

// The lane's 8 values of each row from vector `vector` on. Zeros behind the last one: weights there are none where a group goes on.
template <typename Rows>
__device__ __forceinline__ void load(uint4 (&x)[Rows::TOKEN_TILES], const Rows& rows, u32 vector) {
#pragma unroll
    for (int i = 0; i < Rows::TOKEN_TILES; i++) x[i] = vector < rows.vectors ? rows.rows[i][vector] : make_uint4(0, 0, 0, 0);
}

// What a lane keeps of a row tile for a group, where that is nothing.
struct NoGroup {
    template <typename Stage> __device__ __forceinline__ void begin(const Stage&, int, int, u32) {}
};

// Puts the first spans of a warp on their way: spans first, first + stride, ... May be called before the predecessor has ended.
template <typename Ring>
__device__ __forceinline__ void start(Ring& ring, const Operand<Ring::ROW_TILES>& operand, u32 first, u32 stride) {
    const auto source = source_of<typename Ring::Scheme>(operand);
#pragma unroll
    for (int s = 0; s < Ring::STAGES; s++) {
        const u32 span = first + s * stride;
        if (span < operand.k / Ring::Scheme::SPAN) ring.load(s, source, span);
        commit_copies();
    }
}

// acc += scale * sums of a group.
template <typename Scheme, typename Stage, int ROW_TILES, int TOKEN_TILES>
__device__ __forceinline__ void scale_sums(float (&acc)[ROW_TILES][TOKEN_TILES][4],
                                           const float (&sums)[ROW_TILES][TOKEN_TILES][4], const Stage& stage, int step,
                                           u32 lane) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float scale = Scheme::scale(stage, r, half, step, lane);
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
                for (int j = 2 * half; j < 2 * half + 2; j++) acc[r][i][j] = fmaf(scale, sums[r][i][j], acc[r][i][j]);
        }
    }
}

// acc += W x over the spans that `start` has begun with. The additions of a result depend on its spans alone, not on the number
// of row tiles, token tiles or stages.
template <typename Ring, typename Rows>
__device__ __forceinline__ void accumulate(float (&acc)[Ring::ROW_TILES][Rows::TOKEN_TILES][4], Ring& ring,
                                           const Operand<Ring::ROW_TILES>& operand, const Rows& rows, u32 first, u32 stride) {
    using Scheme = typename Ring::Scheme;
    constexpr int ROW_TILES = Ring::ROW_TILES, STAGES = Ring::STAGES, STEPS = Scheme::SPAN / 32;
    constexpr int TOKEN_TILES = Rows::TOKEN_TILES, SPANS_AHEAD = Rows::AHEAD > STEPS ? Rows::AHEAD / STEPS : 1;
    constexpr int AHEAD = Rows::AHEAD < STEPS ? Rows::AHEAD : STEPS * SPANS_AHEAD;
    constexpr int GROUP_STEPS = Scheme::GROUP > 0 && Scheme::GROUP < Scheme::SPAN ? Scheme::GROUP / 32 : STEPS;
    // Not more than needed: unrolled, operands of later steps are taken early, for which there are no registers.
    constexpr int UNROLL = Rows::UNROLL, GROUP_UNROLL = AHEAD > GROUP_STEPS ? STEPS / GROUP_STEPS : 1;
    // Vectors of a row of x in a span.
    constexpr u32 SPAN_VECTORS = Scheme::SPAN / 8;
    const u32 lane = threadIdx.x % 32, num_spans = operand.k / Scheme::SPAN;
    const Source<Scheme, ROW_TILES> source = source_of<Scheme>(operand);
    uint4 x[AHEAD][TOKEN_TILES];
#pragma unroll
    for (int s = 0; s < AHEAD; s++) load(x[s], rows, (first + s / STEPS * stride) * SPAN_VECTORS + 4 * (s % STEPS) + lane % 4);

    u32 slot = 0, span = first;
    while (span < num_spans) {
#pragma unroll
        for (int ahead = 0; ahead < SPANS_AHEAD; ahead++) {
            if (ahead > 0 && span >= num_spans) break;
            wait_copies<STAGES - 1>();
            __syncwarp();
            const typename Ring::Stage& stage = ring.stages[slot];
            const u32 vector = span * SPAN_VECTORS + lane % 4, later_span = span + SPANS_AHEAD * stride;
            const u32 later_vector = later_span * SPAN_VECTORS + lane % 4;
#pragma unroll GROUP_UNROLL
            for (int first_step = 0; first_step < STEPS; first_step += GROUP_STEPS) {
                float sums[ROW_TILES][TOKEN_TILES][4] = {};
                float(&target)[ROW_TILES][TOKEN_TILES][4] = Scheme::GROUP > 0 ? sums : acc;
                typename Scheme::Group groups[ROW_TILES];
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) groups[r].begin(stage, r, first_step, lane);
#pragma unroll UNROLL
                for (int step = first_step; step < first_step + GROUP_STEPS; step++) {
                    uint4(&own)[TOKEN_TILES] = x[(ahead * STEPS + step) % AHEAD];
#pragma unroll
                    for (int r = 0; r < ROW_TILES; r++) {
                        // Four pairs for row g and row g + 8.
                        u32 a[4][2];
                        Scheme::operand(a, stage, groups[r], r, step, lane);
#pragma unroll
                        for (int i = 0; i < TOKEN_TILES; i++) {
                            mma_bf16(target[r][i], a[0][0], a[0][1], a[1][0], a[1][1], own[i].x, own[i].y);
                            mma_bf16(target[r][i], a[2][0], a[2][1], a[3][0], a[3][1], own[i].z, own[i].w);
                        }
                    }
                    // Where x of a later step is: in this span or in a later one.
                    const int later = step + AHEAD % (STEPS * SPANS_AHEAD);
                    if (AHEAD < STEPS && later < STEPS) {
                        load(own, rows, vector + 4 * later);
                    } else if (later_span < num_spans) {
                        load(own, rows, later_vector + 4 * (later % STEPS));
                    }
                }
                if constexpr (Scheme::GROUP > 0) scale_sums<Scheme>(acc, sums, stage, first_step, lane);
            }
            // All lanes have read the scales.
            __syncwarp();
            const u32 next = span + STAGES * stride;
            if (next < num_spans) ring.load(slot, source, next);
            commit_copies();
            slot = slot + 1 == STAGES ? 0 : slot + 1;
            span += stride;
        }
    }
    // The ring may be used for something else now: what is still on its way is empty groups.
    wait_copies<0>();
    if constexpr (Scheme::FACTOR != 1) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[r][i][j] *= Scheme::FACTOR;
    }
}

// The sums of the block's warps over the same outputs, added as a tree of fixed shape: the sum of some neighbours is a node of it.
template <int WARPS, int ROW_TILES, int TOKEN_TILES> struct WarpSums {
    float sums[WARPS][TOKEN_TILES * 8][ROW_TILES * 16 + 1];

    __device__ __forceinline__ void store(const float (&acc)[ROW_TILES][TOKEN_TILES][4], u32 warp) {
        const u32 lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sums[warp][8 * i + 2 * (lane % 4) + j % 2][16 * r + lane / 4 + 8 * (j / 2)] = acc[r][i][j];
    }

    __device__ __forceinline__ float total(u32 token, u32 output) const {
        float nodes[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) nodes[w] = sums[w][token][output];
#pragma unroll
        for (int width = 1; width < WARPS; width *= 2)
#pragma unroll
            for (int w = 0; w < WARPS; w += 2 * width) nodes[w] += nodes[w + width];
        return nodes[0];
    }
};
