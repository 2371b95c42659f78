// vision_prepare and vision_attention: the encoder's attention. 2-D rotary embedding of q and k (the first half of the
// angles turns with the patch's row, the second with its column), then full attention inside each frame, of any number
// of images in one launch.
//
// Shapes  qkv [num_patches, 3, num_heads, head_dim], out [num_patches, num_heads, head_dim]; head_dim a multiple of 4,
//         up to 128. Patches come merge block after merge block. Between the two: q, k, v
//         [3][num_heads][num_patches][D], D the width with zeros behind. v is read where it is if its vectors are whole
//         multiples of 16 bytes.
// Bytes   prepare: qkv in, 2 or 3 * num_heads * num_patches * D * 2 out. attention: q and out once, k and v once for
//         each tile of 128 rows.
// Bound   prepare: memory bandwidth. attention: tensor cores, 4 * D operations for each pair of patches of a frame and
//         head.
#include "rope.cuh"
#include "vision_tile.cuh"

constexpr u32 MAX_IMAGES = 64;

// Frames of one size, one after the other.
struct Image {
    u32 first_patch;
    u32 first_tile;
    u32 height; // of a frame, in patches
    u32 width;
};

struct VisionAttentionParams {
    const u16* qkv;
    u16* rotated; // [3][num_heads][num_patches][D]; without the third part where v is read from qkv
    u16* out;
    u32 num_patches;
    u32 num_heads;
    u32 head_dim;
    u32 merge;
    u32 num_images;
    float factor; // of the scores, times log2(e)
    float slack;  // see vision_tile.cuh
    u32 unused;
    float inv_freq[32];
    Image images[MAX_IMAGES];
};
PARAMS(VisionAttentionParams);

// The last image for which `start` is at most `index`.
template <typename Start> __device__ __forceinline__ u32 find_image(u32 num_images, u32 index, const Start& start) {
    u32 image = 0;
    while (image + 1 < num_images && start(image + 1) <= index) image++;
    return image;
}

template <int PAIRS> struct Bits {
    u32 words[PAIRS / 2];

    __device__ __forceinline__ void load(const u16* source) {
        if (PAIRS == 4) {
            const uint2 raw = *reinterpret_cast<const uint2*>(source);
            words[0] = raw.x;
            words[PAIRS / 2 - 1] = raw.y;
        } else {
            words[0] = *reinterpret_cast<const u32*>(source);
        }
    }
    __device__ __forceinline__ void store(u16* target) const {
        if (PAIRS == 4)
            *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[PAIRS / 2 - 1]);
        else
            *reinterpret_cast<u32*>(target) = words[0];
    }
};

// The heads of a patch, turned, to their places; behind each the zeros up to D. A thread has PAIRS pairs (j, j +
// head_dim / 2) of a head.
template <int D, int PAIRS>
__device__ __forceinline__ void turn_heads(const VisionAttentionParams& p, const u16* source, u32 patch, u32 parts,
                                           const float* cosines, const float* sines) {
    const u32 half = p.head_dim / 2;
    constexpr u32 GROUPS = D / (2 * PAIRS);
    for (u32 i = threadIdx.x; i < parts * p.num_heads * GROUPS; i += blockDim.x) {
        const u32 head = i / GROUPS, j = PAIRS * (i % GROUPS); // head: part * num_heads + head of the part
        u16* target = p.rotated + (u64(head) * p.num_patches + patch) * D;
        Bits<PAIRS> first = {}, second = {};
        if (j >= half) {
            // The D - head_dim columns of padding, 2 * PAIRS for each thread that has no pair.
            first.store(target + p.head_dim + 2 * (j - half));
            second.store(target + p.head_dim + 2 * (j - half) + PAIRS);
            continue;
        }
        const u16* vector = source + u64(head) * p.head_dim + j;
        first.load(vector);
        second.load(vector + half);
        if (head < 2 * p.num_heads) {
#pragma unroll
            for (int w = 0; w < PAIRS / 2; w++) {
                float a[2] = {__uint_as_float(first.words[w] << 16), __uint_as_float(first.words[w] & 0xffff0000u)};
                float b[2] = {__uint_as_float(second.words[w] << 16), __uint_as_float(second.words[w] & 0xffff0000u)};
#pragma unroll
                for (int k = 0; k < 2; k++) rotate_pair(a[k], b[k], cosines[j + 2 * w + k], sines[j + 2 * w + k]);
                first.words[w] = pack_bf16(a[0], a[1]);
                second.words[w] = pack_bf16(b[0], b[1]);
            }
        }
        first.store(target + j);
        second.store(target + half + j);
    }
}

// One block for a patch.
template <int D> __device__ __forceinline__ void vision_prepare(const VisionAttentionParams& p) {
    wait_for_predecessor();
    allow_successor();
    const u32 patch = blockIdx.x, quarter = p.head_dim / 4;
    const Image& image = p.images[find_image(p.num_images, patch, [&](u32 i) { return p.images[i].first_patch; })];
    const u32 in_frame = (patch - image.first_patch) % (image.height * image.width);
    const u32 area = p.merge * p.merge, block = in_frame / area, within = in_frame % area;
    const u32 blocks_wide = image.width / p.merge;
    const u32 row = block / blocks_wide * p.merge + within / p.merge;
    const u32 column = block % blocks_wide * p.merge + within % p.merge;
    __shared__ float cosines[64], sines[64];
    if (threadIdx.x < 2 * quarter) {
        const bool is_row = threadIdx.x < quarter;
        const float inv_freq = p.inv_freq[is_row ? threadIdx.x : threadIdx.x - quarter];
        const float angle = __fmul_rn(float(is_row ? row : column), inv_freq);
        sine_cosine(angle, sines[threadIdx.x], cosines[threadIdx.x]);
    }
    __syncthreads();
    const u16* source = p.qkv + u64(patch) * 3 * p.num_heads * p.head_dim;
    const u32 parts = p.head_dim % 8 == 0 ? 2 : 3;
    // PAIRS neighbours of the first half and as many of the second: 8 bytes each where the halves are multiples of
    // that.
    if (p.head_dim % 8 == 0)
        turn_heads<D, 4>(p, source, patch, parts, cosines, sines);
    else
        turn_heads<D, 2>(p, source, patch, parts, cosines, sines);
}

// The same value, of which the compiler then knows nothing: what is computed from it where it is used takes no
// registers before.
__device__ __forceinline__ u32 opaque(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Starts the copy of `ROWS` rows of D numbers that are `stride` numbers apart; zeros from row `valid_rows` and from
// vector `valid_vectors` on.
template <int D, int ROWS>
__device__ __forceinline__ void load_rows(const u16* source, u32 stride, u32 valid_rows, u32 valid_vectors, u32 target) {
    constexpr u32 VECTORS = D / 8;
    static_assert(ROWS * VECTORS % TILE_THREADS == 0, "every thread has as many vectors");
    // The places of the vectors are computed again each time: they would take registers through the whole kernel.
    const u32 thread = opaque(threadIdx.x);
#pragma unroll
    for (u32 i = 0; i < ROWS * VECTORS / TILE_THREADS; i++) {
        const u32 at = i * TILE_THREADS + thread, row = at / VECTORS, v = at % VECTORS;
        const bool there = row < valid_rows && v < valid_vectors;
        copy_async(target + TileShape<D>::Layout::at(row, v), source + (there ? row * stride + v * 8 : 0), there);
    }
}

// A tile of 128 rows of a frame.
struct FrameTile {
    u32 first_patch; // of the frame
    u32 length;      // of the frame
    u32 first_row;   // in the frame
    u32 num_rows;
};
__device__ __forceinline__ FrameTile find_frame_tile(const VisionAttentionParams& p, u32 tile) {
    const Image& image = p.images[find_image(p.num_images, tile, [&](u32 i) { return p.images[i].first_tile; })];
    const u32 length = image.height * image.width, frame_tiles = (length + TILE_ROWS - 1) / TILE_ROWS;
    const u32 in_image = tile - image.first_tile, frame = in_image / frame_tiles;
    const u32 first_row = in_image % frame_tiles * TILE_ROWS;
    return {image.first_patch + frame * length, length, first_row, min(TILE_ROWS, length - first_row)};
}

template <int KEYS> __device__ __forceinline__ void mask_keys(TileScores<KEYS>& scores, int seen) {
    const int limit = seen - 2 * int(threadIdx.x % 4);
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (8 * j + i % 2 >= limit) scores[m][j][i] = minus_infinity();
}

// Where a tile of rows finds q, k and v.
struct TileSources {
    const u16* queries; // of its first row, rows of D
    const u16* keys;    // of its frame, rows of D
    const u16* values;  // of its frame
    u32 value_stride;
    u32 value_vectors; // of 16 bytes, in a row
};
template <int D> __device__ __forceinline__ TileSources tile_sources(const VisionAttentionParams& p, const FrameTile& at) {
    const u32 head = blockIdx.y;
    const u64 part = u64(p.num_heads) * p.num_patches * D;
    const u16* queries = p.rotated + (u64(head) * p.num_patches + at.first_patch) * D;
    const u16* keys = queries + part;
    queries += u64(at.first_row) * D;
    if (p.head_dim % 8 != 0) return {queries, keys, keys + part, D, D / 8};
    const u32 stride = 3 * p.num_heads * p.head_dim;
    const u16* values = p.qkv + u64(at.first_patch) * stride + (2 * p.num_heads + head) * p.head_dim;
    return {queries, keys, values, stride, p.head_dim / 8};
}

template <int D> __device__ __forceinline__ void store_tile(const VisionAttentionParams& p, TileResult<D>& result) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    tile_finish(result);
    const FrameTile at = find_frame_tile(p, opaque(blockIdx.x));
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32 row = 16 * ROW_BLOCKS * warp + 16 * m + 8 * h + lane / 4;
            if (row >= at.num_rows) continue;
            const u64 patch = u64(at.first_patch) + at.first_row + row;
            u16* target = p.out + (patch * p.num_heads + blockIdx.y) * p.head_dim;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const u32 column = 8 * n + 2 * (lane % 4);
                if (column < p.head_dim)
                    *reinterpret_cast<u32*>(target + column) =
                        pack_bf16(result.out[m][n][2 * h], result.out[m][n][2 * h + 1]);
            }
        }
}

// Grid (tiles of 128 rows of all frames, num_heads), for heads of more than 80. Of a stage of 64 keys, KEYS pass through the
// softmax together: with fewer there are registers enough.
template <int D, int KEYS> __device__ __forceinline__ void attend_wide(const VisionAttentionParams& p) {
    typedef TileShape<D> Shape;
    constexpr u32 KEY_BYTES = STAGE_KEYS * Shape::Layout::STRIDE; // K, or V
    extern __shared__ __align__(128) u8 shared[];
    wait_for_predecessor();
    allow_successor();
    const FrameTile at = find_frame_tile(p, blockIdx.x);
    const u32 length = at.length;
    const TileSources from = tile_sources<D>(p, at);
    const u32 queries = shared_address(shared), stages = queries + Shape::QUERY_BYTES;
    load_rows<D, TILE_ROWS>(from.queries, D, at.num_rows, D / 8, queries);
    load_rows<D, STAGE_KEYS>(from.keys, D, length, D / 8, stages);
    load_rows<D, STAGE_KEYS>(from.values, from.value_stride, length, from.value_vectors, stages + KEY_BYTES);
    commit_copies();
    TileResult<D> result;
    result.clear();
    const u32 num_tiles = (length + STAGE_KEYS - 1) / STAGE_KEYS;
    for (u32 tile = 0; tile < num_tiles; tile++) {
        wait_copies<0>();
        __syncthreads();
        if (tile + 1 < num_tiles) {
            const u32 first = (tile + 1) * STAGE_KEYS, stage = stages + (tile + 1) % 2 * 2 * KEY_BYTES;
            load_rows<D, STAGE_KEYS>(from.keys + u64(first) * D, D, length - first, D / 8, stage);
            load_rows<D, STAGE_KEYS>(from.values + u64(first) * from.value_stride, from.value_stride, length - first,
                                     from.value_vectors, stage + KEY_BYTES);
        }
        commit_copies();
        const u32 stage = stages + tile % 2 * 2 * KEY_BYTES;
#pragma unroll 1
        for (u32 first = 0; first < STAGE_KEYS; first += KEYS) {
            TileScores<KEYS> scores;
            tile_scores<D, KEYS, false>(scores, queries, stage + first * Shape::Layout::STRIDE);
            // Keys of these that there are; keys that are not have come after others.
            const int seen = int(length - tile * STAGE_KEYS - first);
            if (seen < KEYS) mask_keys<KEYS>(scores, seen);
            tile_softmax<D, KEYS>(result, scores, p.factor);
            tile_values<D, D, KEYS, false>(result, scores, stage + KEY_BYTES + first * Shape::Layout::STRIDE);
        }
    }
    wait_copies<0>();
    store_tile(p, result);
}

// The same grid, for heads of up to 80.
template <int D> __device__ __forceinline__ void attend(const VisionAttentionParams& p) {
    typedef WarpRows<D> Warp;
    constexpr u32 CHUNK_BYTES = CHUNK_KEYS * Warp::Layout::STRIDE, VALUES_AT = 2 * CHUNK_BYTES;
    extern __shared__ __align__(128) u8 shared[];
    wait_for_predecessor();
    allow_successor();
    const FrameTile at = find_frame_tile(p, blockIdx.x);
    const u32 length = at.length, num_chunks = (length + CHUNK_KEYS - 1) / CHUNK_KEYS;
    const TileSources from = tile_sources<D>(p, at);
    StageSource<D> keys = {from.keys, D, D / 8}, values = {from.values, from.value_stride, from.value_vectors};
    u32 num_loaded = 0; // keys
    const auto load_stage = [&](u32 target) {
        if (num_loaded < length) {
            keys.template load<STAGE_KEYS>(target, length - num_loaded);
            values.template load<STAGE_KEYS>(target + VALUES_AT, length - num_loaded);
            keys.source += STAGE_KEYS * D;
            values.source += STAGE_KEYS * values.stride;
            num_loaded += STAGE_KEYS;
        }
        commit_copies();
    };
    const u32 stages = shared_address(shared);
    u32 stage = stages, next = stage + Warp::STAGE_BYTES, free = next + Warp::STAGE_BYTES;
    const StageSource<D> queries = {from.queries, D, D / 8};
    queries.template load<TILE_ROWS>(free, at.num_rows);
    load_stage(stage);
    load_stage(next);
    wait_copies<1>();
    __syncthreads();

    Warp warp;
    warp.factor = p.factor;
    warp.slack = p.slack;
    warp.load_queries(free);
    ChunkScores even, odd;
    warp.begin(even, stage);
    warp.raise(even);
    const auto finish = [&](ChunkScores& scores, u32 chunk, u32 values_at) {
        const int seen = int(length - chunk * CHUNK_KEYS);
        if (seen < CHUNK_KEYS) mask_keys<CHUNK_KEYS>(scores, seen);
        warp.template advance<false>(scores, values_at, scores, 0);
    };
    for (u32 chunk = 0;; chunk += 2) {
        if (chunk + 1 == num_chunks) {
            finish(even, chunk, stage + VALUES_AT);
            break;
        }
        warp.template advance<true>(even, stage + VALUES_AT, odd, stage + CHUNK_BYTES);
        if (chunk + 2 == num_chunks) {
            finish(odd, chunk + 1, stage + VALUES_AT + CHUNK_BYTES);
            break;
        }
        wait_copies<0>();
        // The stage before this one is free: q, or what all warps have multiplied.
        __syncthreads();
        load_stage(free);
        warp.template advance<true>(odd, stage + VALUES_AT + CHUNK_BYTES, even, next);
        const u32 before = stage;
        stage = next;
        next = free;
        free = before;
    }
    wait_copies<0>();
    store_tile(p, warp.result);
}

// Heads of at most D.
#define VISION(D, BODY)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) vision_prepare_##D(const __grid_constant__ VisionAttentionParams p) { \
        vision_prepare<D>(p);                                                                                  \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2)                                              \
        vision_attention_##D(const __grid_constant__ VisionAttentionParams p) {                                \
        BODY(p);                                                                                               \
    }
VISION(32, attend<32>)
VISION(64, attend<64>)
VISION(72, attend<72>)
VISION(80, attend<80>)
VISION(96, (attend_wide<96, 64>))
VISION(128, (attend_wide<128, 32>))
