// What the decode products of all 4-bit schemes share: x as operand, the loop over k, the sum over warps. No kernel. The
// schemes are structs `Int4` and `Nvfp4` (int4.cuh, nvfp4.cuh): how a warp loads and multiplies a span of k.
//
// Weights are the A operand. A tile is 16 rows of W by 64 k, 512 bytes, 16 for each lane (g = lane / 4, t = lane % 4):
// word w has row g + 8 (w % 2), k = 32 (w / 2) + 8t + j in nibble j. Nibbles j and j + 4 make a pair, so the 8 values of x
// that a lane loads are paired as 04 15 26 37.
#pragma once
#include "prelude.cuh"

// Row tiles of 16 that a block computes, and its most warps.
constexpr int ROW_TILES = 2;
constexpr int MAX_WARPS = 8;
constexpr int OUTPUTS = ROW_TILES * 16;

// The weights of a block: a matrix and the row tiles of 16 that it computes.
struct Operand {
    const uint4* codes; // [n / 16, k / 64, 32 lanes]
    const u32* scales;  // [n / 16, words of k, 16 rows]
    u32 k;              // with padding
    u32 tiles[ROW_TILES];
};

// The lane's rows of x: token g of every tile, or null.
template <int TOKEN_TILES> struct Rows {
    const u16* rows[TOKEN_TILES];
    u32 columns; // k without padding
};

// x of a span: for each 32 k, the lane's 8 values of each row. Zeros where there is no row and beyond the columns.
template <int SPAN, int TOKEN_TILES> struct Inputs {
    uint4 values[SPAN / 32][TOKEN_TILES];
};

template <int SPAN, int TOKEN_TILES>
__device__ __forceinline__ void load(Inputs<SPAN, TOKEN_TILES>& x, const Rows<TOKEN_TILES>& rows, u32 span, u32 lane) {
#pragma unroll
    for (int h = 0; h < SPAN / 32; h++) {
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) {
            const u32 column = span * SPAN + 32 * h + 8 * (lane % 4);
            x.values[h][i] = rows.rows[i] && column < rows.columns
                                 ? *reinterpret_cast<const uint4*>(rows.rows[i] + column)
                                 : make_uint4(0, 0, 0, 0);
        }
    }
}

// The two pairs of operand B for each of the two products over 32 k.
__device__ __forceinline__ void pair(u32 (&b)[4], const uint4& raw) {
    b[0] = __byte_perm(raw.x, raw.z, 0x5410);
    b[1] = __byte_perm(raw.x, raw.z, 0x7632);
    b[2] = __byte_perm(raw.y, raw.w, 0x5410);
    b[3] = __byte_perm(raw.y, raw.w, 0x7632);
}

// acc += W x: the block's warps share the spans of k. The first weights are loaded before the predecessor has ended.
template <typename Scheme, int TOKEN_TILES>
__device__ __forceinline__ void accumulate(float (&acc)[ROW_TILES][TOKEN_TILES][4], const Operand& operand,
                                           const Rows<TOKEN_TILES>& rows) {
    constexpr int SPAN = Scheme::SPAN;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
    const u32 num_spans = operand.k / SPAN;
    typename Scheme::Weights weights;
    if (warp < num_spans) Scheme::load(weights, operand, warp, lane);
    wait_for_predecessor();
    allow_successor();

    // The next span is on its way while this one is multiplied: its weights, and x where there are registers for it.
    constexpr bool NEXT_X = TOKEN_TILES == 1;
    Inputs<SPAN, TOKEN_TILES> inputs;
    if (NEXT_X && warp < num_spans) load(inputs, rows, warp, lane);
    for (u32 span = warp; span < num_spans; span += num_warps) {
        const u32 next = span + num_warps;
        const typename Scheme::Weights current = weights;
        if (next < num_spans) Scheme::load(weights, operand, next, lane);
        if (!NEXT_X) load(inputs, rows, span, lane);
        const Inputs<SPAN, TOKEN_TILES> x = inputs;
        if (NEXT_X && next < num_spans) load(inputs, rows, next, lane);
        Scheme::multiply(acc, current, x, lane);
    }
}

// The sums of the block's warps, added in their order, so that a result does not depend on the number of rows of x.
template <int TOKEN_TILES> struct WarpSums {
    float sums[MAX_WARPS][TOKEN_TILES * 8][OUTPUTS + 1];

    __device__ __forceinline__ void store(const float (&acc)[ROW_TILES][TOKEN_TILES][4]) {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sums[warp][8 * i + 2 * (lane % 4) + j % 2][16 * r + lane / 4 + 8 * (j / 2)] = acc[r][i][j];
    }

    __device__ __forceinline__ float total(u32 token, u32 output) const {
        float sum = 0.0f;
        for (u32 w = 0; w < blockDim.x / 32; w++) sum += sums[w][token][output];
        return sum;
    }
};
