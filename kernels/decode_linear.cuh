// What the decode products of all schemes share: the way of weights into shared memory, x as operand, the loop over k, the
// sum over warps. No kernel. The schemes are structs `Bf16`, `Fp8`, `Int4` and `Nvfp4` (bf16.cuh, fp8.cuh, int4.cuh,
// nvfp4.cuh): how codes become operands.
//
// Weights are the A operand; lane l, g = l / 4, t = l % 4 has rows g and g + 8 of a tile of 16 rows of W and, of 32 k, those
// from 8t on. A tile of 4-bit codes is 16 rows by 64 k, 512 bytes, 16 for each lane: word w has row g + 8 (w % 2),
// k = 32 (w / 2) + 8t + j in nibble j; nibbles j and j + 4 make a pair, so the 8 values of x that a lane loads are paired as
// 04 15 26 37. Tiles of 8 and 16 bits are 16 rows by 32 k in natural order: see their schemes.
//
// k is cut in spans, and the spans of a product are dealt out to its warps in turn. A warp copies its weights into a ring of its
// own, some spans ahead, so that registers do not limit how many bytes are on their way; x comes from the first- or second-level
// cache into registers, a few steps of 32 k ahead.
#pragma once
#include "prelude.cuh"

// What a scheme has: SPAN, k of a span; VECTORS, 16-byte vectors of codes of a lane for a span of a row tile; WORDS, scale words of
// a row for a span (0: none); K_PER_WORD; GROUP, k after which sums are scaled (0: never); and the functions used below.

// The weights of a product: a matrix and the row tiles of 16 that are computed.
template <int ROW_TILES> struct Operand {
    const uint4* codes;
    const u32* scales; // [n / 16, words of k, 16 rows]
    u32 k;             // with padding
    u32 tiles[ROW_TILES];
};

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

    __device__ __forceinline__ void load(u32 slot, const Operand<ROW_TILES>& operand, u32 span, u32 lane) {
        const u32 num_spans = operand.k / Scheme::SPAN;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const uint4* codes = operand.codes + (u64(operand.tiles[r]) * num_spans + span) * (Scheme::VECTORS * 32) + lane;
#pragma unroll
            for (int v = 0; v < Scheme::VECTORS; v++)
                copy_async(shared_address(&stages[slot].codes[r][v][lane]), codes + 32 * v, true);
        }
        if constexpr (Scheme::WORDS > 0) {
            // 4 vectors for 16 rows of a word.
            constexpr int PER_TILE = 4 * Scheme::WORDS, TOTAL = ROW_TILES * PER_TILE;
            const u32 word = span * Scheme::SPAN / Scheme::K_PER_WORD;
#pragma unroll
            for (int first = 0; first < TOTAL; first += 32) {
                const u32 i = first + lane, r = i / PER_TILE;
                u32 tile = operand.tiles[0];
#pragma unroll
                for (int other = 1; other < ROW_TILES; other++) tile = r == other ? operand.tiles[other] : tile;
                const u32* scales = operand.scales + (u64(tile) * (operand.k / Scheme::K_PER_WORD) + word) * 16;
                u32* target = &stages[slot].scales[0][0][0];
                if (i < TOTAL) copy_async(shared_address(target + 4 * i), scales + 4 * (i % PER_TILE), true);
            }
        }
    }
};

constexpr u32 NO_ROW = 0xffffffffu;

// The lane's rows of x: token g of every tile. x is loaded AHEAD steps of 32 k before it is multiplied, or a whole span; UNROLL steps,
// a multiple of AHEAD, are unrolled.
template <int TOKEN_TILES_, int AHEAD_, int UNROLL_> struct Rows {
    static constexpr int TOKEN_TILES = TOKEN_TILES_, AHEAD = AHEAD_, UNROLL = UNROLL_;
    const u16* x;
    u32 columns;           // k without padding
    u32 rows[TOKEN_TILES]; // or NO_ROW
};

// The lane's 8 values at `column` of each row. Zeros where there is no row and beyond the columns.
template <typename Rows>
__device__ __forceinline__ void load(uint4 (&x)[Rows::TOKEN_TILES], const Rows& rows, u32 column) {
#pragma unroll
    for (int i = 0; i < Rows::TOKEN_TILES; i++)
        x[i] = rows.rows[i] != NO_ROW && column < rows.columns
                   ? *reinterpret_cast<const uint4*>(rows.x + (u64(rows.rows[i]) * rows.columns + column))
                   : make_uint4(0, 0, 0, 0);
}

// x of 4-bit codes: the two pairs of operand B for each of the two products over 32 k.
__device__ __forceinline__ void pair_by_four(u32 (&b)[4], const uint4& raw) {
    b[0] = __byte_perm(raw.x, raw.z, 0x5410);
    b[1] = __byte_perm(raw.x, raw.z, 0x7632);
    b[2] = __byte_perm(raw.y, raw.w, 0x5410);
    b[3] = __byte_perm(raw.y, raw.w, 0x7632);
}
// x of codes in natural order.
__device__ __forceinline__ void pair_by_two(u32 (&b)[4], const uint4& raw) {
    b[0] = raw.x;
    b[1] = raw.y;
    b[2] = raw.z;
    b[3] = raw.w;
}

// Puts the first spans of a warp on their way: spans first, first + stride, ... May be called before the predecessor has ended.
template <typename Ring>
__device__ __forceinline__ void start(Ring& ring, const Operand<Ring::ROW_TILES>& operand, u32 first, u32 stride) {
#pragma unroll
    for (int s = 0; s < Ring::STAGES; s++) {
        const u32 span = first + s * stride;
        if (span < operand.k / Ring::Scheme::SPAN) ring.load(s, operand, span, threadIdx.x % 32);
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
    constexpr int TOKEN_TILES = Rows::TOKEN_TILES, AHEAD = Rows::AHEAD < STEPS ? Rows::AHEAD : STEPS;
    constexpr int GROUP_STEPS = Scheme::GROUP > 0 && Scheme::GROUP < Scheme::SPAN ? Scheme::GROUP / 32 : STEPS;
    // Not more than needed: unrolled, operands of later steps are taken early, for which there are no registers.
    constexpr int UNROLL = Rows::UNROLL, GROUP_UNROLL = AHEAD > GROUP_STEPS ? STEPS / GROUP_STEPS : 1;
    const u32 lane = threadIdx.x % 32, num_spans = operand.k / Scheme::SPAN;
    const u32 lane_column = 8 * (lane % 4);
    uint4 x[AHEAD][TOKEN_TILES];
#pragma unroll
    for (int s = 0; s < AHEAD; s++) load(x[s], rows, first * Scheme::SPAN + 32 * s + lane_column);

    u32 slot = 0;
    for (u32 span = first; span < num_spans; span += stride) {
        wait_copies<STAGES - 1>();
        __syncwarp();
        const typename Ring::Stage& stage = ring.stages[slot];
        const u32 column = span * Scheme::SPAN + lane_column, next_column = column + stride * Scheme::SPAN;
#pragma unroll GROUP_UNROLL
        for (int first_step = 0; first_step < STEPS; first_step += GROUP_STEPS) {
            float sums[ROW_TILES][TOKEN_TILES][4] = {};
            float(&target)[ROW_TILES][TOKEN_TILES][4] = Scheme::GROUP > 0 ? sums : acc;
#pragma unroll UNROLL
            for (int step = first_step; step < first_step + GROUP_STEPS; step++) {
                u32 b[TOKEN_TILES][4];
#pragma unroll
                for (int i = 0; i < TOKEN_TILES; i++) Scheme::pair(b[i], x[step % AHEAD][i]);
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
                    // Four pairs for row g and row g + 8.
                    u32 a[4][2];
                    Scheme::operand(a, stage, r, step, lane);
#pragma unroll
                    for (int i = 0; i < TOKEN_TILES; i++) {
                        mma_bf16(target[r][i], a[0][0], a[0][1], a[1][0], a[1][1], b[i][0], b[i][1]);
                        mma_bf16(target[r][i], a[2][0], a[2][1], a[3][0], a[3][1], b[i][2], b[i][3]);
                    }
                }
                // Where x of a later step is: in this span or in the next.
                const int later = step + AHEAD;
                load(x[step % AHEAD], rows, later < STEPS ? column + 32 * later : next_column + 32 * (later - STEPS));
            }
            if constexpr (Scheme::GROUP > 0) scale_sums<Scheme>(acc, sums, stage, first_step, lane);
        }
        // All lanes have read the scales.
        __syncwarp();
        const u32 next = span + STAGES * stride;
        if (next < num_spans) ring.load(slot, operand, next, lane);
        commit_copies();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    // The ring may be used for something else now: what is still on its way is empty groups.
    wait_copies<0>();
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
