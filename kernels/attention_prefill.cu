// attention_prepare and attention_prefill: sequences with more than one row in the step, with or without earlier tokens
// in the cache. The first does RMSNorm and rotary embedding of q and k and writes K and V to the cache; the second is
// causal attention over the cache, so that a chunk sees what was stored, its own tokens too.
//
// Shapes  qkv [num_tokens, (num_heads + 2 num_kv_heads) head_dim], out [num_tokens, num_heads head_dim]. q waits in
//         `out` (FP8: as f16) between the two: a block reads exactly the rows that it writes. A tile has 128 rows, the
//         heads of a group together: TILE_ROWS / group tokens.
// Bytes   prepare: qkv once, out once, K and V. prefill: q, out; K and V once for each tile.
// Bound   prepare: memory bandwidth. prefill: tensor cores, 4 * head_dim * num_heads operations for each pair of a row
//         and a token that it sees.
#include "attention.cuh"
#include "attention_tile.cuh"

// One block for a row of the step. Rows of sequences with one row are the decode kernel's; rows of padding become zero.
template <int D, bool FP8> __device__ __forceinline__ void attention_prepare(const AttentionParams& p) {
    const u32 row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 num_items = p.num_heads + 2 * p.num_kv_heads;
    Head<D> q_norm, k_norm;
    q_norm.load(p.q_norm, lane);
    k_norm.load(p.k_norm, lane);
    wait_for_predecessor();
    allow_successor();
    const u64 slot = p.slot_mapping[row];
    u16* out = p.out + u64(row) * p.num_heads * D;
    if (slot == ~u64(0)) {
        for (u32 i = threadIdx.x; i < p.num_heads * D / 2; i += blockDim.x) reinterpret_cast<u32*>(out)[i] = 0;
        return;
    }
    if (p.seqs[2 * p.token_seqs[row]].z == 1) return;
    const u64 block = slot / p.block_size;
    const u32 token = u32(slot - block * p.block_size);
    Angles<D> angles;
    angles.load(p, row, lane);
    // Two heads at a time, so that more loads are on their way.
    constexpr u32 STEP = TILE_THREADS / 32;
    for (u32 first = warp; first < num_items; first += 2 * STEP) {
        Head<D> heads[2];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 item = first + i * STEP;
            heads[i].load(p.qkv + (u64(row) * num_items + item) * D, lane, item < num_items);
        }
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 item = first + i * STEP, half = item >= p.num_heads + p.num_kv_heads;
            if (item >= num_items) break;
            if (half == 0) {
                heads[i].normalise(q_norm.or_else(item < p.num_heads, k_norm), p.eps);
                heads[i].rotate(angles);
            }
            if (item < p.num_heads) {
                heads[i].template store<FP8>(out + item * D, lane);
                continue;
            }
            const u32 kv_head = item - p.num_heads - half * p.num_kv_heads;
            const u64 vector = ((block * p.num_kv_heads + kv_head) * 2 + half) * p.block_size + token;
            if (FP8) {
                const u32 scale = heads[i].store_e4m3(p.cache + vector * D, lane);
                if (lane == 0) p.scales[vector] = u16(scale);
            } else {
                heads[i].template store<false>(reinterpret_cast<u16*>(p.cache) + vector * D, lane);
            }
        }
    }
}

constexpr int TILE_KEYS = 64;

// Shared memory of a prefill block, in this order: q, two stages of K and V as stored, FP8: K and V as f16.
template <int D, bool FP8> struct Prefill {
    typedef TileShape<D> Tile;
    static constexpr u32 ROW_BYTES = FP8 ? D : 2 * D;
    static constexpr u32 VECTORS = ROW_BYTES / 16;
    typedef RowLayout<ROW_BYTES / 16> Stored;
    static constexpr u32 HALF_BYTES = TILE_KEYS * ROW_BYTES;
    static constexpr u32 STAGE_BYTES = 2 * HALF_BYTES + (FP8 ? 4 * TILE_KEYS : 0);
    static constexpr u32 KEY_BYTES = TILE_KEYS * Tile::Layout::STRIDE; // K, or V, in 16 bits
    static constexpr u32 WIDE = Tile::QUERY_BYTES + 2 * STAGE_BYTES;
    // Tokens of a tile that are in one block for certain, and how many times that is a tile.
    static constexpr u32 RUN = 16;
    static constexpr u32 RUNS = TILE_KEYS / RUN;
};

// Which sequence a tile is of, and which of its tiles.
struct TilePlace {
    u32 seq, tile;
};
__device__ __forceinline__ TilePlace find_tile(const AttentionParams& p, u32 index, u32 tile_tokens) {
    const u32 lane = threadIdx.x % 32;
    for (u32 first = 0; first < p.num_seqs; first += 32) {
        u32 tiles = 0;
        if (first + lane < p.num_seqs) {
            const u32 length = p.seqs[2 * (first + lane)].z;
            tiles = length > 1 ? (length + tile_tokens - 1) / tile_tokens : 0;
        }
        u32 end = tiles;
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) {
            const u32 before = __shfl_up_sync(0xffffffffu, end, step);
            if (lane >= step) end += before;
        }
        const u32 found = __ballot_sync(0xffffffffu, index < end);
        if (found) {
            const u32 at = __ffs(found) - 1;
            return {first + at, index - __shfl_sync(0xffffffffu, end - tiles, at)};
        }
        index -= __shfl_sync(0xffffffffu, end, 31);
    }
    return {p.num_seqs, 0};
}

// Starts the copy of the blocks' numbers of the keys from `first` on, so that no thread waits for them later.
template <int D, bool FP8>
__device__ __forceinline__ void load_blocks(const AttentionParams& p, const Seq& seq, u32 first, u32 end, u32* blocks) {
    const u32 position = first + Prefill<D, FP8>::RUN * threadIdx.x;
    if (threadIdx.x < Prefill<D, FP8>::RUNS && position < end)
        copy_async_word(shared_address(blocks + threadIdx.x), seq.blocks + block_of(p, position));
}

// Starts the copy of the keys from `first` on, of tokens up to `end`; `blocks` has the numbers of their blocks.
template <int D, bool FP8>
__device__ __forceinline__ void load_tile(const AttentionParams& p, const u32* blocks, u32 kv_head, u32 first, u32 end,
                                          u32 stage) {
    typedef Prefill<D, FP8> S;
    constexpr u32 ROWS_AT_ONCE = TILE_THREADS / S::VECTORS;
    // Rows of a thread in one run: their addresses are apart by a constant.
    constexpr u32 ROWS = ROWS_AT_ONCE < S::RUN ? S::RUN / ROWS_AT_ONCE : 1;
    const u32 v = threadIdx.x % S::VECTORS, to_values = p.block_size * S::ROW_BYTES;
#pragma unroll
    for (u32 i = 0; i < TILE_KEYS / (ROWS * ROWS_AT_ONCE); i++) {
        const u32 token = i * ROWS * ROWS_AT_ONCE + threadIdx.x / S::VECTORS;
        const u32 run = ROWS > 1 ? i : token / S::RUN, start = first + run * S::RUN;
        // A run's tokens lie together; the copy of what is behind the end needs an address all the same.
        const u32 in_block = start - block_of(p, start) * p.block_size + token % S::RUN;
        const u64 vector = first_vector(p, start < end ? blocks[run] : 0, kv_head) + in_block;
        const u8* source = p.cache + vector * S::ROW_BYTES + 16 * v;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            const bool there = first + token + r * ROWS_AT_ONCE < end;
            const u32 target = stage + S::Stored::at(token + r * ROWS_AT_ONCE, v);
            copy_async(target, source + r * ROWS_AT_ONCE * S::ROW_BYTES, there);
            copy_async(target + S::HALF_BYTES, source + r * ROWS_AT_ONCE * S::ROW_BYTES + to_values, there);
        }
    }
    // 8 scales for each thread.
    if (FP8 && threadIdx.x < 2 * TILE_KEYS / 8) {
        const u32 token = threadIdx.x * 8 % TILE_KEYS, position = first + token;
        const bool there = position < end;
        const u32 in_block = position - block_of(p, position) * p.block_size;
        const u64 vector = first_vector(p, there ? blocks[token / S::RUN] : 0, kv_head) + in_block;
        const u16* source = p.scales + vector + threadIdx.x * 8 / TILE_KEYS * p.block_size;
        // Zeros behind the end: what lies there may be no number.
        const u32 num_bytes = there ? min(16, 2 * (end - position)) : 0;
        copy_async_part(stage + 2 * S::HALF_BYTES + 16 * threadIdx.x, source, num_bytes);
    }
}

// FP8: the stage's K and V as f16, without their scales.
template <int D> __device__ __forceinline__ void widen_tile(const u8* stage, u8* wide) {
    typedef Prefill<D, true> S;
    constexpr u32 ROWS = 2 * TILE_KEYS; // K, then V
#pragma unroll
    for (u32 i = 0; i < ROWS * S::VECTORS / TILE_THREADS; i++) {
        const u32 at = i * TILE_THREADS + threadIdx.x, half = at / (TILE_KEYS * S::VECTORS);
        const u32 row = at / S::VECTORS % TILE_KEYS, v = at % S::VECTORS;
        const uint4 raw = *reinterpret_cast<const uint4*>(stage + half * S::HALF_BYTES + S::Stored::at(row, v));
        uint4 first, second;
        widen_e4m3(raw.x, first.x, first.y);
        widen_e4m3(raw.y, first.z, first.w);
        widen_e4m3(raw.z, second.x, second.y);
        widen_e4m3(raw.w, second.z, second.w);
        u8* target = wide + half * S::KEY_BYTES;
        *reinterpret_cast<uint4*>(target + S::Tile::Layout::at(row, 2 * v)) = first;
        *reinterpret_cast<uint4*>(target + S::Tile::Layout::at(row, 2 * v + 1)) = second;
    }
}

// FP8: numbers of a column times its scale; the weights' columns besides times their factor, at most the largest f16.
template <bool WEIGHTS>
__device__ __forceinline__ void scale_columns(TileScores<TILE_KEYS>& numbers, const u16* column_scales) {
    constexpr float factor = WEIGHTS ? WEIGHT_FACTOR : 1.0f;
    const u32 t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < TILE_KEYS / 8; j++) {
        const u32 pair = *reinterpret_cast<const u32*>(column_scales + 8 * j + 2 * t);
        const float scales[2] = {factor * f16_value(pair & 0xffff), factor * f16_value(pair >> 16)};
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float product = numbers[m][j][i] * scales[i % 2];
                numbers[m][j][i] = WEIGHTS ? fminf(product, F16_MAX) : product;
            }
    }
}

// The first row's token sees `seen` keys of this tile, the next one more. Rows without a token see what the last one
// sees; they are not stored.
__device__ __forceinline__ void mask_scores(const AttentionParams& p, TileScores<TILE_KEYS>& scores, int seen,
                                            u32 num_tokens) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32 token = token_of(p, 16 * ROW_BLOCKS * warp + 16 * m + 8 * h + lane / 4);
            const int limit = seen + int(min(token, num_tokens - 1)) - 2 * int(lane % 4);
#pragma unroll
            for (int j = 0; j < TILE_KEYS / 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (8 * j + i >= limit) scores[m][j][2 * h + i] = minus_infinity();
        }
}

// Grid (num_kv_heads, tiles of all sequences): the tiles with the most keys of a sequence come first.
template <int D, bool FP8> __device__ __forceinline__ void attention_prefill(const AttentionParams& p) {
    typedef Prefill<D, FP8> S;
    extern __shared__ __align__(128) u8 shared[];
    const u32 kv_head = blockIdx.x, group = p.group, tile_tokens = TILE_ROWS / group;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    wait_for_predecessor();
    allow_successor();
    const TilePlace place = find_tile(p, gridDim.y - 1 - blockIdx.y, tile_tokens);
    if (place.seq >= p.num_seqs) return;
    const Seq seq = load_seq(p, place.seq);
    const u32 first_token = place.tile * tile_tokens, num_tokens = min(tile_tokens, seq.query_len - first_token);
    const u32 first_position = seq.context_len - seq.query_len + first_token;
    const u32 end = first_position + num_tokens; // keys that the last row sees
    const u32 first_row = seq.query_start + first_token;

    // Block numbers of the tiles, by turns.
    __shared__ u32 blocks[2][S::RUNS];
    // What is needed after the loop waits here, not in registers.
    __shared__ u32 kept_tokens, kept_row;
    if (threadIdx.x == 0) {
        kept_tokens = num_tokens;
        kept_row = first_row;
    }
    load_blocks<D, FP8>(p, seq, 0, end, blocks[0]);
    load_blocks<D, FP8>(p, seq, TILE_KEYS, end, blocks[1]);
    commit_copies();
    const u32 queries = shared_address(shared);
    const u32 stages = queries + S::Tile::QUERY_BYTES;
    // Row r is head r % group of token r / group.
#pragma unroll 4
    for (u32 i = threadIdx.x; i < TILE_ROWS * (D / 8); i += TILE_THREADS) {
        const u32 row = i / (D / 8), v = i % (D / 8), token = token_of(p, row);
        const u32 head = kv_head * group + row - token * group;
        const bool there = token < num_tokens;
        const u16* source = p.out + (u64(first_row + (there ? token : 0)) * p.num_heads + head) * D + 8 * v;
        copy_async(queries + S::Tile::Layout::at(row, v), source, there);
    }
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    load_tile<D, FP8>(p, blocks[0], kv_head, 0, end, stages);
    commit_copies();

    TileResult<D> result;
    result.clear();
    const u32 num_tiles = (end + TILE_KEYS - 1) / TILE_KEYS;
    for (u32 tile = 0; tile < num_tiles; tile++) {
        const u32 stage_offset = S::Tile::QUERY_BYTES + tile % 2 * S::STAGE_BYTES;
        wait_copies<0>();
        __syncthreads();
        if (tile + 1 < num_tiles) {
            const u32 next = tile + 1;
            load_tile<D, FP8>(p, blocks[next % 2], kv_head, next * TILE_KEYS, end, stages + next % 2 * S::STAGE_BYTES);
            load_blocks<D, FP8>(p, seq, (next + 1) * TILE_KEYS, end, blocks[tile % 2]);
        }
        commit_copies();
        u32 keys = queries + stage_offset, values = keys + S::HALF_BYTES;
        const u16* scales = reinterpret_cast<const u16*>(shared + stage_offset + 2 * S::HALF_BYTES);
        if (FP8) {
            widen_tile<D>(shared + stage_offset, shared + S::WIDE);
            keys = queries + S::WIDE;
            values = keys + S::KEY_BYTES;
            __syncthreads();
        }
        TileScores<TILE_KEYS> scores;
        tile_scores<D, TILE_KEYS, FP8>(scores, queries, keys);
        if (FP8) scale_columns<false>(scores, scales);
        const int seen = int(first_position + 1) - int(tile * TILE_KEYS);
        if (seen < int(TILE_KEYS)) mask_scores(p, scores, seen, kept_tokens);
        tile_softmax<D, TILE_KEYS>(result, scores, ScoreFactor<D>::VALUE);
        if (FP8) scale_columns<true>(scores, scales + TILE_KEYS);
        tile_values<D, D, TILE_KEYS, FP8>(result, scores, values);
    }
    wait_copies<0>();
    tile_finish(result, FP8 ? WEIGHT_FACTOR : 1.0f);
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32 row = 32 * warp + 16 * m + 8 * h + g, token = token_of(p, row);
            if (token >= kept_tokens) continue;
            const u32 head = kv_head * group + row - token * group;
            u16* target = p.out + (u64(kept_row + token) * p.num_heads + head) * D + 2 * t;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<u32*>(target + 8 * n) = pack_bf16(result.out[m][n][2 * h], result.out[m][n][2 * h + 1]);
        }
}

#define PREFILL(D, NAME, FP8)                                                                                     \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) prepare_##NAME##_##D(const AttentionParams p) {    \
        attention_prepare<D, FP8>(p);                                                                             \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2) prefill_##NAME##_##D(const AttentionParams p) { \
        attention_prefill<D, FP8>(p);                                                                             \
    }
PREFILL(32, bf16, false)
PREFILL(64, bf16, false)
PREFILL(128, bf16, false)
PREFILL(32, fp8, true)
PREFILL(64, fp8, true)
PREFILL(128, fp8, true)
