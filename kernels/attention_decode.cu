// attention_decode: sequences with one row in the step. RMSNorm and rotary embedding of q and k, K and V of the new
// token into the cache, softmax(q K^T / sqrt(head_dim)) V over the whole context, all in one launch.
//
// Shapes  qkv, out: one row for each sequence; context 1 to 2^20. Grid (num_splits, num_kv_heads, num_seqs), 4 warps.
//         The context lengths are device data: a graph is recorded once for all of them.
// Bytes   context * num_kv_heads * 2 * (2 head_dim, or head_dim + 2 for FP8) for each sequence, read once: the query
//         heads of a kv head are the rows of one product.
// Bound   memory bandwidth; with short contexts latency.
//
// A block has a part of the context of one kv head; its warps take chunks of 16 tokens in turn, each with a pipeline of
// its own in shared memory and a softmax of its own. The last block of a (sequence, kv head) to arrive adds the parts
// in their order. The new token's K and V never come back from memory: the block that has its position puts the stored
// form into its chunk.
#include "attention.cuh"

constexpr u32 WARPS = 4;
constexpr u32 CHUNK = 16; // tokens
constexpr u32 MAX_GROUP = 16;

template <int D, bool FP8> struct Shape {
    static constexpr u32 ROW_BYTES = FP8 ? D : 2 * D;
    static constexpr u32 VECTORS = ROW_BYTES / 16; // of 16 bytes in a row
    typedef RowLayout<ROW_BYTES / 16> Layout;
    static constexpr u32 STAGES = FP8 ? 4 : 2;
    // K, V, and for FP8 their scales.
    static constexpr u32 TILE_BYTES = CHUNK * ROW_BYTES;
    static constexpr u32 STAGE_BYTES = 2 * TILE_BYTES + (FP8 ? 4 * CHUNK : 0);
    static constexpr u32 WARP_BYTES = STAGES * STAGE_BYTES;
    static constexpr u32 Q_STRIDE = D + 8;
    // The pipelines become each warp's results after the loop.
    static_assert(WARP_BYTES >= MAX_GROUP * D * 4, "a warp's results must fit its pipeline");
};

// What a block leaves for the last one: `[group][D]` sums, then maximum and sum of weights of each row. Multiples of 16
// bytes.
template <int D> __device__ __forceinline__ u64 partial_floats(u32 group) { return u64(group) * D + 2 * MAX_GROUP; }

// The part of a context that a split has, in chunks; a whole number of chunks for each warp. Padding has a context of
// 0. A part costs its chunks, and the last block's time to add it: up to SINGLE chunks one part is fastest, beyond
// about as many parts as a part has chunks.
struct Part {
    u32 first, end, num_parts;
};
__device__ __forceinline__ Part part_of(u32 context_len, u32 split, u32 num_splits) {
    constexpr u32 SINGLE = 3 * WARPS;
    const u32 chunks = (context_len + CHUNK - 1) / CHUNK;
    const u32 least = chunks <= SINGLE ? SINGLE : u32(sqrtf(float(chunks)));
    const u32 length = (max((chunks + num_splits - 1) / num_splits, least) + WARPS - 1) / WARPS * WARPS;
    return {split * length, min(chunks, (split + 1) * length), (chunks + length - 1) / length};
}

// Starts the copy of a chunk, which lies in `block`. Tokens from `stored` on are not there yet: zeros.
template <int D, bool FP8>
__device__ __forceinline__ void load_chunk(const AttentionParams& p, u32 block, u32 kv_head, u32 chunk, u32 stored,
                                           u32 stage, u32 lane) {
    typedef Shape<D, FP8> S;
    const u32 position = chunk * CHUNK;
    const u64 vector = first_vector(p, block, kv_head) + (position - block_of(p, position) * p.block_size);
    const u8* keys = p.cache + vector * S::ROW_BYTES;
    const u64 to_values = u64(p.block_size) * S::ROW_BYTES;
    constexpr u32 COPIES = CHUNK * S::VECTORS; // of K; a power of two, 32 or more
#pragma unroll
    for (u32 i = 0; i < COPIES / 32; i++) {
        const u32 token = (32 * i + lane) / S::VECTORS, v = (32 * i + lane) % S::VECTORS;
        const u8* source = keys + token * S::ROW_BYTES + 16 * v;
        const u32 target = stage + S::Layout::at(token, v);
        const bool there = position + token < stored;
        copy_async(target, source, there);
        copy_async(target + S::TILE_BYTES, source + to_values, there);
    }
    if (FP8 && lane < 4) {
        const u16* source = p.scales + vector + (lane / 2) * p.block_size + 8 * (lane % 2);
        // Zeros behind the stored tokens: what lies there may be no number.
        const u32 first = position + 8 * (lane % 2);
        const u32 num_bytes = first < stored ? min(16, 2 * (stored - first)) : 0;
        copy_async_part(stage + 2 * S::TILE_BYTES + 16 * lane, source, num_bytes);
    }
}

// The block that chunk `chunk` lies in; of no chunk from `end` on.
__device__ __forceinline__ u32 chunk_block(const AttentionParams& p, const Seq& seq, u32 chunk, u32 end) {
    return chunk < end ? seq.blocks[block_of(p, chunk * CHUNK)] : 0;
}

// A warp's rows g and g + 8.
template <int D> struct Result {
    float out[D / 8][4];
    float maximum[2], sum[2];
};

// The warp's query fragments: operand A, 16 rows.
template <int D> struct Queries {
    u32 a[D / 16][4];
};
template <int D, bool FP8> __device__ __forceinline__ void load_queries(Queries<D>& q, const u16* rows, u32 lane) {
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u16* row = rows + (g + 8 * half) * Shape<D, FP8>::Q_STRIDE + 16 * k;
            if (FP8) {
                // A word of K holds elements 4t to 4t + 3: two for each operand.
                const uint2 words = *reinterpret_cast<const uint2*>(row + 4 * t);
                q.a[k][half] = words.x;
                q.a[k][2 + half] = words.y;
            } else {
                q.a[k][half] = *reinterpret_cast<const u32*>(row + 2 * t);
                q.a[k][2 + half] = *reinterpret_cast<const u32*>(row + 8 + 2 * t);
            }
        }
    }
}

// s = q K^T of a chunk: 16 rows, 2 times 8 keys. Two sums for each number, so that a product waits for every other one
// only.
template <int D, bool FP8>
__device__ __forceinline__ void multiply_keys(float (&s)[2][4], const Queries<D>& q, u32 stage, u32 lane) {
    typedef typename Shape<D, FP8>::Layout Layout;
    float odd_sums[2][4] = {};
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[j][i] = 0.0f;
    if (FP8) {
        const u32 row = lane % 16;
#pragma unroll
        for (int k = 0; k < D / 16; k += 2) {
            u32 r[4];
            load_matrices(r, stage + Layout::at(row, k + lane / 16));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 low, high;
                widen_e4m3(r[i], low, high);
                mma_16bit<true>(i / 2 ? odd_sums[i % 2] : s[i % 2], q.a[k + i / 2], low, high);
            }
        }
    } else {
        const u32 row = lane % 8 + 8 * (lane / 16);
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            u32 r[4];
            load_matrices(r, stage + Layout::at(row, 2 * k + lane / 8 % 2));
            float(&sums)[2][4] = k % 2 ? odd_sums : s;
            mma_16bit<false>(sums[0], q.a[k], r[0], r[1]);
            mma_16bit<false>(sums[1], q.a[k], r[2], r[3]);
        }
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[j][i] += odd_sums[j][i];
}

// out += p V of a chunk. FP8: of 16 columns, n-tile 2c has the even and 2c + 1 the odd ones.
template <int D, bool FP8>
__device__ __forceinline__ void multiply_values(float (&out)[D / 8][4], const u32 (&a)[4], u32 stage, u32 lane) {
    typedef typename Shape<D, FP8>::Layout Layout;
    const u32 row = lane % 16;
    if (FP8) {
#pragma unroll
        for (int c = 0; c < D / 16; c += 2) {
            u32 r[4];
            load_matrices_transposed(r, stage + Layout::at(row, c + lane / 16));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // A word holds columns 2g and 2g + 1 of one key, then of the next: an operand is one column of both.
                u32 even[2], odd[2];
                widen_e4m3(__byte_perm(r[2 * i], 0, 0x3120), even[0], odd[0]);
                widen_e4m3(__byte_perm(r[2 * i + 1], 0, 0x3120), even[1], odd[1]);
                mma_16bit<true>(out[2 * (c + i)], a, even[0], even[1]);
                mma_16bit<true>(out[2 * (c + i) + 1], a, odd[0], odd[1]);
            }
        }
    } else {
#pragma unroll
        for (int c = 0; c < D / 8; c += 2) {
            u32 r[4];
            load_matrices_transposed(r, stage + Layout::at(row, c + lane / 16));
            mma_16bit<false>(out[c], a, r[0], r[1]);
            mma_16bit<false>(out[c + 1], a, r[2], r[3]);
        }
    }
}

// One chunk: `seen` of its keys count (1 to 16).
template <int D, bool FP8>
__device__ __forceinline__ void attend_chunk(Result<D>& result, const Queries<D>& q, u32 stage,
                                             const u8* stage_pointer, u32 seen, u32 lane) {
    typedef Shape<D, FP8> S;
    float s[2][4];
    multiply_keys<D, FP8>(s, q, stage, lane);
    const u32 t = lane % 4;
    constexpr float factor = ScoreFactor<D>::VALUE;
    const u32* scales = reinterpret_cast<const u32*>(stage_pointer + 2 * S::TILE_BYTES);
    float highest[2] = {result.maximum[0], result.maximum[1]};
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const u32 pair = FP8 ? scales[4 * j + t] : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float scale = FP8 ? factor * f16_value(i % 2 ? pair >> 16 : pair & 0xffff) : factor;
            s[j][i] = 8 * j + 2 * t + i % 2 < seen ? s[j][i] * scale : minus_infinity();
            highest[i / 2] = fmaxf(highest[i / 2], s[j][i]);
        }
    }
    float weights[2][4], correction[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        highest[h] = fmaxf(highest[h], __shfl_xor_sync(0xffffffffu, highest[h], 1));
        highest[h] = fmaxf(highest[h], __shfl_xor_sync(0xffffffffu, highest[h], 2));
        correction[h] = exp2_fast(result.maximum[h] - highest[h]);
        result.maximum[h] = highest[h];
        result.sum[h] *= correction[h];
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const u32 pair = FP8 ? scales[8 + 4 * j + t] : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float weight = exp2_fast(s[j][i] - highest[i / 2]);
            result.sum[i / 2] += weight;
            const float scale = FP8 ? WEIGHT_FACTOR * f16_value(i % 2 ? pair >> 16 : pair & 0xffff) : 1.0f;
            weights[j][i] = FP8 ? fminf(weight * scale, F16_MAX) : weight;
        }
    }
    if (__any_sync(0xffffffffu, correction[0] != 1.0f || correction[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) result.out[n][i] *= correction[i / 2];
    }
    const u32 a[4] = {pack_16bit<FP8>(weights[0][0], weights[0][1]), pack_16bit<FP8>(weights[0][2], weights[0][3]),
                      pack_16bit<FP8>(weights[1][0], weights[1][1]), pack_16bit<FP8>(weights[1][2], weights[1][3])};
    multiply_values<D, FP8>(result.out, a, stage + S::TILE_BYTES, lane);
}

// The new token's K and V as they are stored, in shared memory.
template <int D, bool FP8> struct NewToken {
    __align__(16) u8 vectors[2][Shape<D, FP8>::ROW_BYTES];
    u32 scales[2];
};

// Puts the new token into row `token` of a chunk.
template <int D, bool FP8>
__device__ __forceinline__ void insert(u8* stage, const NewToken<D, FP8>& fresh, u32 token, u32 lane) {
    typedef Shape<D, FP8> S;
    for (u32 i = lane; i < 2 * S::VECTORS; i += 32) {
        const u32 half = i / S::VECTORS, v = i % S::VECTORS;
        *reinterpret_cast<uint4*>(stage + half * S::TILE_BYTES + S::Layout::at(token, v)) =
            *reinterpret_cast<const uint4*>(fresh.vectors[half] + 16 * v);
    }
    if (FP8 && lane < 2)
        reinterpret_cast<u16*>(stage + 2 * S::TILE_BYTES)[lane * CHUNK + token] = u16(fresh.scales[lane]);
}

// The block's query rows into `rows`; with `is_last` the new token's K and V into `fresh` and the cache. A warp has
// every fourth of q's heads, K and V; it loads all of its vectors first and works on two at a time, as it waits for
// nothing else.
template <int D, bool FP8>
__device__ __forceinline__ void prepare(const AttentionParams& p, const Seq& seq, u32 row, u32 kv_head, bool is_last,
                                        u16* rows, NewToken<D, FP8>& fresh, const Head<D>& q_norm, const Head<D>& k_norm,
                                        const Angles<D>& angles) {
    typedef Shape<D, FP8> S;
    constexpr u32 ROUNDS = (MAX_GROUP + 2 + 2 * WARPS - 1) / (2 * WARPS);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u16* source = p.qkv + u64(row) * (p.num_heads + 2 * p.num_kv_heads) * D;
    const u32 items = p.group + (is_last ? 2 : 0);
    Head<D> heads[ROUNDS][2];
#pragma unroll
    for (u32 i = 0; i < 2 * ROUNDS; i++) {
        const u32 item = warp + i * WARPS, half = item - p.group; // 0: K, 1: V
        const u32 index = item < p.group ? kv_head * p.group + item : p.num_heads + half * p.num_kv_heads + kv_head;
        heads[i / 2][i % 2].load(source + u64(index) * D, lane, item < items);
        // Rows without a head are zero.
        if (item >= p.group && item < MAX_GROUP)
            for (u32 j = lane; j < D / 2; j += 32) reinterpret_cast<u32*>(rows + item * S::Q_STRIDE)[j] = 0;
    }
#pragma unroll
    for (u32 round = 0; round < ROUNDS; round++) {
        if (2 * round * WARPS >= items) break;
        Head<D> turned[2];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 item = warp + (2 * round + i) * WARPS;
            turned[i] = heads[round][i];
            turned[i].normalise(q_norm.or_else(item < p.group, k_norm), p.eps);
            turned[i].rotate(angles);
            // V stays as it is.
            turned[i] = turned[i].or_else(item <= p.group, heads[round][i]);
        }
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 item = warp + (2 * round + i) * WARPS, half = item - p.group;
            if (item < p.group) {
                turned[i].template store<FP8>(rows + item * S::Q_STRIDE, lane);
            } else if (item < items) {
                if (FP8) {
                    const u32 scale = turned[i].store_e4m3(fresh.vectors[half], lane);
                    if (lane == 0) fresh.scales[half] = scale;
                } else {
                    turned[i].template store<false>(reinterpret_cast<u16*>(fresh.vectors[half]), lane);
                }
            }
        }
    }
    __syncthreads();
    if (!is_last) return;
    const u32 position = seq.context_len - 1, block = block_of(p, position);
    const u64 vector = first_vector(p, seq.blocks[block], kv_head) + (position - block * p.block_size);
    for (u32 i = threadIdx.x; i < 2 * S::VECTORS; i += blockDim.x) {
        const u32 half = i / S::VECTORS, v = i % S::VECTORS;
        u8* target = p.cache + (vector + half * p.block_size) * S::ROW_BYTES + 16 * v;
        *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(fresh.vectors[half] + 16 * v);
    }
    if (FP8 && threadIdx.x < 2) p.scales[vector + threadIdx.x * p.block_size] = u16(fresh.scales[threadIdx.x]);
}

// Adds one, and says what was there: release and acquire for the whole block, which meets before and after.
__device__ __forceinline__ u32 count_arrival(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// The weight of a part with this maximum, beside the highest.
__device__ __forceinline__ float part_weight(float maximum, float highest) {
    return maximum == minus_infinity() ? 0.0f : exp2_fast(maximum - highest);
}

// Adds the warps' results: `store(row, column, 4 sums, maximum, sum of weights)` is called once for each 4 columns.
template <int D, bool FP8, typename Store>
__device__ __forceinline__ void merge_warps(const u8* shared, const float (*maxima)[MAX_GROUP],
                                            const float (*sums)[MAX_GROUP], u32 group, const Store& store) {
    for (u32 i = threadIdx.x; i < group * (D / 4); i += blockDim.x) {
        const u32 row = i / (D / 4), column = 4 * (i % (D / 4));
        float highest = minus_infinity();
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) highest = fmaxf(highest, maxima[w][row]);
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float sum = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            // A warp without chunks has left nothing.
            if (maxima[w][row] == minus_infinity()) continue;
            const float weight = part_weight(maxima[w][row], highest);
            const float4 x = reinterpret_cast<const float4*>(shared + w * Shape<D, FP8>::WARP_BYTES)[i];
            total.x = fmaf(x.x, weight, total.x);
            total.y = fmaf(x.y, weight, total.y);
            total.z = fmaf(x.z, weight, total.z);
            total.w = fmaf(x.w, weight, total.w);
            sum = fmaf(sums[w][row], weight, sum);
        }
        store(row, column, total, highest, sum);
    }
}

__device__ __forceinline__ void store_out(u16* out, const float4& total, float sum) {
    const float factor = sum > 0.0f ? __fdiv_rn(1.0f, sum) : 0.0f;
    *reinterpret_cast<uint2*>(out) =
        make_uint2(pack_bf16(total.x * factor, total.y * factor), pack_bf16(total.z * factor, total.w * factor));
}

// Four sums of up to `BATCH` parts from `first` on; zeros behind the last part.
template <int BATCH>
__device__ __forceinline__ void load_parts(float4 (&x)[BATCH], const float4* sums, u64 stride, u32 first, u32 num_parts) {
#pragma unroll
    for (u32 j = 0; j < BATCH; j++) {
        x[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + j < num_parts) x[j] = __ldcg(sums + (first + j) * stride);
    }
}

// The last block of a (sequence, kv head): adds the parts, at most 32, in their order. What does not depend on each
// other is loaded together: what counts here is latency.
template <int D>
__device__ __forceinline__ void merge_parts(const float* records, u32 num_parts, u32 group, float* weights, u16* out) {
    constexpr u32 ROWS = MAX_GROUP / WARPS, BATCH = 16;
    const u64 stride = partial_floats<D>(group);
    __shared__ float totals[MAX_GROUP];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float4* sums = reinterpret_cast<const float4*>(records);
    const u32 columns = group * (D / 4);
    // weights[part][row]: a warp for each row, a lane for each part.
    float2 numbers[ROWS];
#pragma unroll
    for (u32 i = 0; i < ROWS; i++) {
        const u32 row = warp + i * WARPS;
        numbers[i] = make_float2(minus_infinity(), 0.0f);
        if (lane < num_parts && row < group)
            numbers[i] = __ldcg(reinterpret_cast<const float2*>(records + lane * stride + group * D) + row);
    }
    float4 x[BATCH];
    if (threadIdx.x < columns) load_parts(x, sums + threadIdx.x, stride / 4, 0, num_parts);
#pragma unroll
    for (u32 i = 0; i < ROWS; i++) {
        const u32 row = warp + i * WARPS;
        const float weight = part_weight(numbers[i].x, warp_max(numbers[i].x));
        const float sum = warp_sum(numbers[i].y * weight);
        weights[lane * MAX_GROUP + row] = weight;
        if (lane == 0) totals[row] = sum;
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < columns; i += blockDim.x) {
        const u32 row = i / (D / 4);
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (u32 first = 0; first < num_parts; first += BATCH) {
            if (first > 0 || i >= blockDim.x) load_parts(x, sums + i, stride / 4, first, num_parts);
#pragma unroll
            for (u32 j = 0; j < BATCH; j++) {
                // Parts behind the last one have weight 0.
                const float weight = weights[(first + j) * MAX_GROUP + row];
                total.x = fmaf(x[j].x, weight, total.x);
                total.y = fmaf(x[j].y, weight, total.y);
                total.z = fmaf(x[j].z, weight, total.z);
                total.w = fmaf(x[j].w, weight, total.w);
            }
        }
        store_out(out + 4 * i, total, totals[row]);
    }
}

template <int D, bool FP8> __device__ __forceinline__ void attention_decode(const AttentionParams& p) {
    typedef Shape<D, FP8> S;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ __align__(16) u16 rows[MAX_GROUP * S::Q_STRIDE];
    __shared__ NewToken<D, FP8> fresh;
    __shared__ float maxima[WARPS][MAX_GROUP], sums[WARPS][MAX_GROUP];
    __shared__ u32 ticket;
    const u32 split = blockIdx.x, kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Head<D> q_norm, k_norm;
    q_norm.load(p.q_norm, lane);
    k_norm.load(p.k_norm, lane);
    // Before the predecessor has ended: the step's data and the K and V of earlier steps. A step begins with the copy
    // of its data, and nothing overlaps with that, so no kernel that is still running writes them.
    const Seq seq = load_seq(p, blockIdx.z);
    const Part part = part_of(seq.context_len, split, gridDim.x);
    const bool is_active = seq.query_len == 1 && split < part.num_parts, is_last = split == part.num_parts - 1;
    u8* pipeline = shared + warp * S::WARP_BYTES;
    const u32 pipeline_address = shared_address(pipeline);
    const u32 stored = seq.context_len - 1;
    const u32 end = is_active ? part.end : 0; // without work no chunk
    u32 blocks[S::STAGES];
#pragma unroll
    for (u32 i = 0; i < S::STAGES; i++) blocks[i] = chunk_block(p, seq, part.first + warp + i * WARPS, end);
#pragma unroll
    for (u32 i = 0; i < S::STAGES - 1; i++) {
        const u32 chunk = part.first + warp + i * WARPS;
        if (chunk < end)
            load_chunk<D, FP8>(p, blocks[i], kv_head, chunk, stored, pipeline_address + i * S::STAGE_BYTES, lane);
        commit_copies();
    }
    const u32 row = p.is_decode ? blockIdx.z : seq.query_start;
    Angles<D> angles;
    if (is_active) angles.load(p, row, lane);
    wait_for_predecessor();
    allow_successor();

    u16* out = p.out + (u64(row) * p.num_heads + kv_head * p.group) * D;
    if (!is_active) {
        // Padding has a row of its own in a decode step; longer queries are another kernel's.
        if (seq.query_len != 1 && p.is_decode && split == 0)
            for (u32 i = threadIdx.x; i < p.group * D / 2; i += blockDim.x) reinterpret_cast<u32*>(out)[i] = 0;
        return;
    }
    prepare<D, FP8>(p, seq, row, kv_head, is_last, rows, fresh, q_norm, k_norm, angles);
    Queries<D> q;
    load_queries<D, FP8>(q, rows, lane);

    Result<D> result = {};
    result.maximum[0] = result.maximum[1] = minus_infinity();
    u32 stage = 0, next_stage = S::STAGES - 1, next_block = blocks[S::STAGES - 1];
    for (u32 chunk = part.first + warp; chunk < part.end; chunk += WARPS) {
        const u32 next = chunk + (S::STAGES - 1) * WARPS;
        if (next < part.end)
            load_chunk<D, FP8>(p, next_block, kv_head, next, stored, pipeline_address + next_stage * S::STAGE_BYTES,
                               lane);
        // On its way while this chunk is multiplied.
        next_block = chunk_block(p, seq, next + WARPS, part.end);
        commit_copies();
        wait_copies<S::STAGES - 1>();
        __syncwarp();
        u8* current = pipeline + stage * S::STAGE_BYTES;
        const u32 seen = min(CHUNK, seq.context_len - chunk * CHUNK);
        if (stored / CHUNK == chunk) {
            insert<D, FP8>(current, fresh, stored % CHUNK, lane);
            __syncwarp();
        }
        attend_chunk<D, FP8>(result, q, pipeline_address + stage * S::STAGE_BYTES, current, seen, lane);
        __syncwarp();
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
        next_stage = next_stage + 1 == S::STAGES ? 0 : next_stage + 1;
    }
    wait_copies<0>();
    __syncwarp();

    // The warp's results into its pipeline: [16 rows][D].
    constexpr float FACTOR = 1.0f / WEIGHT_FACTOR;
    float* own = reinterpret_cast<float*>(pipeline);
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        result.sum[h] += __shfl_xor_sync(0xffffffffu, result.sum[h], 1);
        result.sum[h] += __shfl_xor_sync(0xffffffffu, result.sum[h], 2);
        if (t == 0) {
            maxima[warp][g + 8 * h] = result.maximum[h];
            sums[warp][g + 8 * h] = result.sum[h];
        }
        float* target = own + (g + 8 * h) * D;
        if (FP8) {
#pragma unroll
            for (int c = 0; c < D / 16; c++)
                *reinterpret_cast<float4*>(target + 16 * c + 4 * t) =
                    make_float4(FACTOR * result.out[2 * c][2 * h], FACTOR * result.out[2 * c + 1][2 * h],
                                FACTOR * result.out[2 * c][2 * h + 1], FACTOR * result.out[2 * c + 1][2 * h + 1]);
        } else {
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<float2*>(target + 8 * n + 2 * t) =
                    make_float2(result.out[n][2 * h], result.out[n][2 * h + 1]);
        }
    }
    __syncthreads();
    const u32 group = p.group;
    if (part.num_parts == 1) {
        merge_warps<D, FP8>(shared, maxima, sums, group, [=](u32 r, u32 column, const float4& total, float, float sum) {
            store_out(out + r * D + column, total, sum);
        });
        return;
    }
    const u32 pair = blockIdx.z * p.num_kv_heads + kv_head;
    float* records = p.partial + u64(pair) * gridDim.x * partial_floats<D>(group);
    float* record = records + split * partial_floats<D>(group);
    const auto keep = [=](u32 r, u32 column, const float4& total, float highest, float sum) {
        *reinterpret_cast<float4*>(record + r * D + column) = total;
        if (column == 0) *reinterpret_cast<float2*>(record + group * D + 2 * r) = make_float2(highest, sum);
    };
    merge_warps<D, FP8>(shared, maxima, sums, group, keep);
    // What this block has written is there before its count, and what the others have after it.
    __syncthreads();
    if (threadIdx.x == 0) ticket = count_arrival(p.counters + pair);
    __syncthreads();
    if (ticket != part.num_parts - 1) return;
    if (threadIdx.x == 0) p.counters[pair] = 0;
    merge_parts<D>(records, part.num_parts, group, reinterpret_cast<float*>(shared), out);
}

#define DECODE(D)                                                                                             \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) decode_bf16_##D(const AttentionParams p) {    \
        attention_decode<D, false>(p);                                                                        \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) decode_fp8_##D(const AttentionParams p) {     \
        attention_decode<D, true>(p);                                                                         \
    }
DECODE(32)
DECODE(64)
DECODE(128)
