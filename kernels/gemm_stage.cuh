// What the products for many rows copy to shared memory: parameters, the shape of a block, the stages of weights and x. No kernel:
// see gemm.cuh.
#pragma once
#include "prelude.cuh"

constexpr int BLOCK_ROWS = 128;
constexpr int BLOCK_TILES = BLOCK_ROWS / 16;
constexpr int STEP = 64;
constexpr u32 NO_ROW = 0xffffffffu;

// Rows of x that one expert multiplies: a part of the sorted list of pairs.
struct Tile {
    u32 expert;
    u32 first; // in the list
    u32 count; // 0: unused
    u32 padding;
};

// What a launch does.
enum : u32 {
    STORE_BF16 = 0,
    STORE_F32 = 1,
    STORE_SPLITS = 2, // k is split over blockIdx.y: sums for gemm_add
    GATE_UP = 3,      // experts: inner[position in the list] = silu(gate x) * up x
    DOWN = 4,         // experts: partial[pair] = down inner[position in the list], f16 with a factor for every 128
};

// What becomes of the rounded results of STORE_BF16; out_columns is then a multiple of 8.
enum : u32 {
    NOTHING = 0,
    GELU_TANH = 1,
    GELU_ERF = 2,
    ADD = 3, // they are added to what `out` holds
};

struct GemmParams {
    const uint4* codes;
    const u32* scales;       // [n / 16, words of k, 16 rows] or null
    const float* row_scales; // [n] for each matrix, or null
    const float* bias;       // [n] or null
    const u16* x;            // [.., x_columns]
    void* out;               // [.., out_columns], for STORE_SPLITS [splits, rows, padded_n] f32
    const Tile* tiles;       // experts, else null
    const u32* pairs;        // experts: the list of pairs, by expert
    float* factors;          // DOWN: [pairs, out_columns / 128], powers of two
    u32 n;                   // rows of a matrix, without padding
    u32 padded_n;
    u32 k;                   // with padding
    u32 x_columns;           // k without padding
    u32 rows;                // of x, dense
    u32 out_columns;
    u32 first_column;        // of out, for first_row of W
    u32 first_row;           // of W that the launch computes, a multiple of 128
    u32 num_rows;            // of W that it computes; GATE_UP: of gate
    u32 what;
    u32 top_k;
    u32 panel;               // dense: blocks of 128 rows of W that share the second-level cache
    u32 steps_per_split;
    u32 after;
    // Of gemm_fp8x.cuh alone, whose x is e4m3: of its numbers, [rows of x, groups of k]; what each row is to be multiplied with.
    const float* x_sums;
    const float* x_scales;
};
PARAMS(GemmParams);

__device__ __forceinline__ u32 shared_load(const char* at) { return *reinterpret_cast<const u32*>(at); }
__device__ __forceinline__ uint4 shared_load4(const char* at) { return *reinterpret_cast<const uint4*>(at); }

// Round to nearest even: `low` in the low half.
__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// As `copy_async`, of 4 bytes.
__device__ __forceinline__ void copy_async_word(u32 shared, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(source) : "memory");
}

// base + index * BYTES, in one instruction.
template <int BYTES> __device__ __forceinline__ const char* advance(const char* base, u32 index) {
    u64 result;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(index), "n"(BYTES), "l"(u64(base)));
    return reinterpret_cast<const char*>(result);
}

// Four matrices of 8 rows of 16 bytes: lane l says where row l % 8 of matrix l / 8 is, and gets the two values 2t and 2t + 1 of row
// g of each.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}

// Of a number from 1 to 2, to the last bit.
__device__ __forceinline__ float reciprocal(float value) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// Which steps of 64 k a block multiplies.
struct Steps {
    u32 first;
    u32 count;
};

// How operands come from shared memory by plain loads of 16 bytes: 8 inputs of a lane lie side by side. The pieces of a token of odd
// number are exchanged by halves, so that the 8 lanes of a part of a load are in 32 banks.
struct PlainLoads {
    static constexpr bool PIPELINED = false;
    // Whether the kernel can go on with its results: `p.after`.
    static constexpr bool HAS_AFTER = false;
    // Whether x is e4m3. Two of its numbers then count as one of k: STEP is 128 of them.
    static constexpr bool FP8_X = false;

    static __device__ __forceinline__ u32 code_place(u32 vector) { return vector; }
    static __device__ __forceinline__ u32 x_place(u32 chunk, u32 token) { return chunk ^ (token & 1) << 2; }
    static __device__ __forceinline__ u32 lane_codes(u32 lane) { return 16 * lane; }
    // For the first 32 k of a step; bit 6 is turned for the others.
    static __device__ __forceinline__ u32 lane_x(u32 lane) {
        const u32 token = lane / 4;
        return token * (STEP * 2) + 16 * x_place(lane % 4, token);
    }
};

// The lane's 8 values of x.
__device__ __forceinline__ void load_pairs(u32 (&b)[4], const char* at) {
    const uint4 x = shared_load4(at);
    b[0] = x.x, b[1] = x.y, b[2] = x.z, b[3] = x.w;
}

// How warps share a block: each has up to 64 rows of x, and 64 rows of W with two warps along them. Four, with 32 rows each, need more
// instructions for a product, but are done sooner where a multiprocessor has no other block.
template <typename Scheme_, int TOKENS_, int ROW_WARPS = 2> struct Shape {
    using Scheme = Scheme_;
    static constexpr int TOKENS = TOKENS_;
    static constexpr int WARPS_ALONG_ROWS = ROW_WARPS;
    static constexpr int WARPS_ALONG_TOKENS = (TOKENS == 128 && ROW_WARPS == 2) || Scheme::FP8_X ? 2 : 1;
    static constexpr int THREADS = 32 * WARPS_ALONG_ROWS * WARPS_ALONG_TOKENS;
    static constexpr int ROW_TILES = BLOCK_TILES / WARPS_ALONG_ROWS;
    static constexpr int TOKEN_TILES = TOKENS / 8 / WARPS_ALONG_TOKENS;
    // What the larger blocks are for: those of 64 rows of x are for experts with two warps, else for layers; those of 128 with four
    // warps along rows are for both, and so are all of FP8_X.
    static constexpr bool FOR_EXPERTS = THREADS == 64 || (TOKENS == 128 && ROW_WARPS == 4) || Scheme::FP8_X;
    static constexpr bool FOR_LAYERS = THREADS != 64 || TOKENS < 64;
    // Token tiles of a warp where the block has fewer rows of x than it can have.
    static constexpr int HALF_TILES = TOKEN_TILES >= 8 || Scheme::FP8_X ? TOKEN_TILES / 2 : TOKEN_TILES;
    static constexpr int QUARTER_TILES = (TOKEN_TILES >= 8 && FOR_EXPERTS) || Scheme::FP8_X ? TOKEN_TILES / 4 : HALF_TILES;
    // Bytes of a stage: x, weights, scale words, sums of x.
    static constexpr int X_BYTES = TOKENS * STEP * 2;
    static constexpr int TILE_BYTES = Scheme::TILE_VECTORS * 16;
    static constexpr int WORDS = Scheme::WORD_K == 0 ? 0 : Scheme::WORD_K < STEP ? STEP / Scheme::WORD_K : 1;
    static constexpr int SCALES_AT = X_BYTES + BLOCK_TILES * TILE_BYTES;
    static constexpr int SUMS_AT = SCALES_AT + BLOCK_ROWS * 4 * WORDS;
    static constexpr int STAGE_BYTES = SUMS_AT + (Scheme::FP8_X ? TOKENS * 4 * WORDS : 0);
    // As in `shared_bytes` of gemm.rs: up to four. Where a multiprocessor has 100 KiB, two or more in a third of that, so that it has
    // several blocks; as many as fit where two do not fit its half.
    static constexpr int MOST = 100352 / STAGE_BYTES < 4 ? 100352 / STAGE_BYTES : 4;
    static constexpr int FEW = 32256 / STAGE_BYTES < 2 ? 2 : 32256 / STAGE_BYTES < 4 ? 32256 / STAGE_BYTES : 4;
#if __CUDA_ARCH__ == 900
    static constexpr int STAGES = MOST;
#else
    static constexpr int STAGES = 2 * STAGE_BYTES <= 49152 ? FEW : MOST;
#endif
    // Rows of x whose results are in shared memory at a time.
    static constexpr int FITTING = STAGES * STAGE_BYTES >= 64 * (BLOCK_ROWS + 4) * 4 ? 64 : 32;
    static constexpr int RESULT_TOKENS = TOKENS < FITTING ? TOKENS : FITTING;
};

// Where the block's weights are. Of tiles that do not exist the last one is taken instead; nothing of the results is stored.
struct Weights {
    u32 first_tile;  // of the block, of all matrices
    u32 last_tile;
    u32 up_distance; // GATE_UP: tiles from a row of gate to its row of up, else 0
};

// The global tile of tile `i` of the block. GATE_UP: each warp has as many tiles of gate as of up.
template <typename S> __device__ __forceinline__ u32 find_tile(const Weights& w, u32 i) {
    constexpr u32 HALF = S::ROW_TILES / 2;
    if (w.up_distance == 0) return min(w.first_tile + i, w.last_tile);
    const u32 warp = i / S::ROW_TILES, j = i % S::ROW_TILES;
    return min(w.first_tile + warp * HALF + j % HALF, w.last_tile) + (j >= HALF ? w.up_distance : 0);
}

// What a thread copies in every step. Codes: one 16-byte vector of every tile, or of every few.
template <typename S> struct WeightSources {
    using Scheme = typename S::Scheme;
    static constexpr int VECTORS = Scheme::TILE_VECTORS;
    static constexpr int COPIES = BLOCK_TILES * VECTORS / S::THREADS;
    static constexpr int CHUNKS = S::WORDS > 0 ? 4 * S::WORDS : 1;
    static constexpr int WORD_K = Scheme::WORD_K > 0 ? Scheme::WORD_K : STEP;

    // From the start of all weights, in units of 16 bytes: half the registers of addresses.
    u32 codes[COPIES];
    u32 scales;

    __device__ __forceinline__ WeightSources(const GemmParams& p, const Weights& w) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const u32 vector = threadIdx.x + S::THREADS * i;
            codes[i] = find_tile<S>(w, vector / VECTORS) * (p.k / STEP) * VECTORS + vector % VECTORS;
        }
        // [tile][word][16 rows]
        scales = find_tile<S>(w, threadIdx.x / CHUNKS % BLOCK_TILES) * (p.k / WORD_K) * 4 + threadIdx.x % CHUNKS;
    }

    // Zeros, and no traffic, if the step is `past_end`.
    __device__ __forceinline__ void stage(const GemmParams& p, u32 stage, u32 step, bool past_end = false) const {
        // With the step in the base fewer instructions, but more registers.
        const char* base = reinterpret_cast<const char*>(p.codes + (Scheme::PIPELINED ? u64(step) * VECTORS : 0));
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const u32 vector = threadIdx.x + S::THREADS * i;
            const u32 place = vector / VECTORS * VECTORS + Scheme::code_place(vector % VECTORS);
            copy_async(stage + S::X_BYTES + 16 * place, advance<16>(base, codes[i] + (Scheme::PIPELINED ? 0 : step * VECTORS)), !past_end);
        }
        if (S::WORDS > 0 && threadIdx.x < BLOCK_TILES * CHUNKS) {
            const u32 word = WORD_K > STEP ? step / (WORD_K / STEP) : step * (STEP / WORD_K);
            copy_async(stage + S::SCALES_AT + 16 * threadIdx.x, advance<16>(reinterpret_cast<const char*>(p.scales), scales + 4 * word), !past_end);
        }
    }
};

// Where the rows of x start, in units of 16 bytes: a thread copies a 16-byte piece of every few rows, whose starts lie side by side.
// Rows that do not exist are row 0: nothing of the results is stored.
template <typename S> struct RowStarts {
    using Scheme = typename S::Scheme;
    static constexpr int AT_ONCE = S::THREADS / 8;
    static constexpr int ROWS = S::TOKENS / AT_ONCE;
    u32 starts[AT_ONCE][ROWS];

    __device__ __forceinline__ void set(u32 token, u32 start) { starts[token % AT_ONCE][token / AT_ONCE] = start; }

    __device__ __forceinline__ void stage(const GemmParams& p, u32 stage, u32 step, bool past_end = false) const {
        const u32 chunk = threadIdx.x % 8, token = threadIdx.x / 8, column = step * STEP + 8 * chunk;
        const bool is_valid = column < p.x_columns && !past_end;
        const char* x = reinterpret_cast<const char*>(p.x + (is_valid ? column : 0));
        const u32 target = stage + token * (STEP * 2) + 16 * Scheme::x_place(chunk, token);
    // All loads come before all copies: the compiler guards each change from one to the other.
        u32 own[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) own[i] = starts[token][i];
#pragma unroll
        for (int i = 0; i < ROWS; i++) copy_async(target + AT_ONCE * i * (STEP * 2), advance<16>(x, own[i]), is_valid);
        if constexpr (Scheme::FP8_X) {
            // [word][token]
            for (u32 i = threadIdx.x; i < S::TOKENS * S::WORDS; i += S::THREADS) {
                const u32 row = i % S::TOKENS, word = (past_end ? 0 : step) * S::WORDS + i / S::TOKENS;
                const u32 at = starts[row % AT_ONCE][row / AT_ONCE] / (Scheme::WORD_K / 8) + word;
                copy_async_word(stage + S::SUMS_AT + 4 * i, advance<4>(reinterpret_cast<const char*>(p.x_sums), at));
            }
        }
    }
};

// The sums of a lane: rows g (0, 1) and g + 8 (2, 3) of a row tile, tokens 2t and 2t + 1 of a token tile.
template <typename S> using Sums = float[S::ROW_TILES][S::TOKEN_TILES][4];
