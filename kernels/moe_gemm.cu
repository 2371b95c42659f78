// What stands around the products of a layer of experts with many rows (gemm_*.cu). moe_count and moe_place: from the router's choice
// to a list of pairs (row, chosen expert), by expert and ascending, and the tiles of it that one block multiplies. moe_add: out =
// sum over a row's experts, ascending, of weight * partial, rounded once.
//
// Shapes  experts, weights [rows, top_k], an expert that does not exist stands for none; up to 1024 experts; partial [pairs, stride] f16 with
//         a factor for every 128; out [rows, out_columns] bf16; columns multiples of 16.
// Bytes   count and place: 8 for each pair. add: rows * columns * 2 * (top_k + 1).
// Bound   count and place: latency. add: memory bandwidth.
#include "prelude.cuh"

constexpr u32 MAX_EXPERTS = 1024;
constexpr u32 SORT_THREADS = 256;
constexpr u32 SORT_WARPS = SORT_THREADS / 32;
// Pairs of a warp and of a block.
constexpr u32 WARP_PAIRS = 256;
constexpr u32 BLOCK_PAIRS = SORT_WARPS * WARP_PAIRS;

// As in gemm_stage.cuh.
struct Tile {
    u32 expert;
    u32 first;
    u32 count;
    u32 padding;
};

struct MoeSortParams {
    const u32* experts; // [num_pairs]
    u32* counts;        // [blocks, num_experts]
    Tile* tiles;        // [max_tiles]
    u32* pairs;         // [num_pairs]
    u32 num_pairs;
    u32 num_experts;
    u32 tile_pairs; // most pairs of a tile
    u32 max_tiles;
};
PARAMS(MoeSortParams);

struct MoeAddParams {
    const u16* partial;   // [pairs, stride] f16
    const float* factors; // [pairs, stride / 128]
    const u32* experts;   // [rows, top_k]
    const float* weights; // [rows, top_k]
    u16* out;             // [rows, out_columns]
    u32 top_k;
    u32 num_experts;
    u32 columns; // that the launch adds
    u32 stride;
    u32 out_columns;
    u32 first_column; // of out
};
PARAMS(MoeAddParams);

// Block b counts the experts of its pairs.
extern "C" __global__ void __launch_bounds__(SORT_THREADS) moe_count(const MoeSortParams p) {
    __shared__ u32 counts[MAX_EXPERTS];
    for (u32 i = threadIdx.x; i < p.num_experts; i += SORT_THREADS) counts[i] = 0;
    wait_for_predecessor();
    allow_successor();
    __syncthreads();
    const u32 first = blockIdx.x * BLOCK_PAIRS, end = min(first + BLOCK_PAIRS, p.num_pairs);
    for (u32 pair = first + threadIdx.x; pair < end; pair += SORT_THREADS) {
        const u32 expert = p.experts[pair];
        if (expert < p.num_experts) atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < p.num_experts; i += SORT_THREADS) p.counts[u64(blockIdx.x) * p.num_experts + i] = counts[i];
}

// Sum of `value` over all threads before this one.
__device__ __forceinline__ u64 sum_before(u64 value) {
    __shared__ u64 warps[SORT_WARPS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = value;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u64 before = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += before;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    for (u32 i = 0; i < warp; i++) sum += warps[i];
    return sum - value;
}

// Block b puts its pairs at their places; block 0 also makes the tiles. A thread has EXPERTS neighbours.
extern "C" __global__ void __launch_bounds__(SORT_THREADS) moe_place(const MoeSortParams p) {
    constexpr u32 EXPERTS = MAX_EXPERTS / SORT_THREADS;
    // Where the next pair of an expert goes, for each warp.
    __shared__ u32 next[SORT_WARPS][MAX_EXPERTS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (u32 i = threadIdx.x; i < SORT_WARPS * MAX_EXPERTS; i += SORT_THREADS) next[i / MAX_EXPERTS][i % MAX_EXPERTS] = 0;
    wait_for_predecessor();
    allow_successor();
    __syncthreads();

    const u32 first = blockIdx.x * BLOCK_PAIRS + warp * WARP_PAIRS;
    u32 chosen[WARP_PAIRS / 32];
#pragma unroll
    for (u32 i = 0; i < WARP_PAIRS / 32; i++) {
        const u32 pair = first + 32 * i + lane;
        chosen[i] = pair < p.num_pairs ? p.experts[pair] : MAX_EXPERTS;
        if (chosen[i] >= p.num_experts) chosen[i] = MAX_EXPERTS;
        if (chosen[i] < MAX_EXPERTS) atomicAdd(&next[warp][chosen[i]], 1);
    }

    // Pairs of the thread's experts in all blocks, and in those before this one.
    u32 totals[EXPERTS] = {}, before[EXPERTS] = {};
    u64 sum = 0;
#pragma unroll
    for (u32 j = 0; j < EXPERTS; j++) {
        const u32 expert = EXPERTS * threadIdx.x + j;
        const u32 blocks = expert < p.num_experts ? gridDim.x : 0;
#pragma unroll 4
        for (u32 block = 0; block < blocks; block++) {
            const u32 count = p.counts[u64(block) * p.num_experts + expert];
            totals[j] += count;
            before[j] += block < blockIdx.x ? count : 0;
        }
        sum += totals[j] | u64((totals[j] + p.tile_pairs - 1) / p.tile_pairs) << 32;
    }
    // Pairs in the low half, tiles in the high half.
    u64 start = sum_before(sum);
#pragma unroll
    for (u32 j = 0; j < EXPERTS; j++) {
        const u32 expert = EXPERTS * threadIdx.x + j, first_pair = u32(start), num_tiles = (totals[j] + p.tile_pairs - 1) / p.tile_pairs;
        u32 at = first_pair + before[j];
#pragma unroll 1
        for (u32 w = 0; w < SORT_WARPS; w++) {
            const u32 count = next[w][expert];
            next[w][expert] = at;
            at += count;
        }
        if (blockIdx.x == 0)
            for (u32 i = 0; i < num_tiles; i++) {
                const u32 skipped = i * p.tile_pairs;
                p.tiles[u32(start >> 32) + i] = {expert, first_pair + skipped, min(p.tile_pairs, totals[j] - skipped), 0};
            }
        start += totals[j] | u64(num_tiles) << 32;
    }
    __shared__ u32 used_tiles;
    if (threadIdx.x == SORT_THREADS - 1) used_tiles = u32(start >> 32);
    __syncthreads();
    if (blockIdx.x == 0)
        for (u32 i = used_tiles + threadIdx.x; i < p.max_tiles; i += SORT_THREADS) p.tiles[i] = {0, 0, 0, 0};

#pragma unroll
    for (u32 i = 0; i < WARP_PAIRS / 32; i++) {
        const u32 expert = chosen[i], same = __match_any_sync(0xffffffffu, expert);
        const u32 rank = __popc(same & ((1u << lane) - 1));
        u32 at = 0;
        if (expert < MAX_EXPERTS) at = next[warp][expert];
        __syncwarp();
        if (expert < MAX_EXPERTS) {
            p.pairs[at + rank] = first + 32 * i + lane;
            if (rank == 0) next[warp][expert] = at + __popc(same);
        }
        __syncwarp();
    }
}

__device__ __forceinline__ void unpack_f16(u32 pair, float& low, float& high) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(pair));
}

// One thread per 8 columns of a row (blockIdx.y).
extern "C" __global__ void __launch_bounds__(256) moe_add(const MoeAddParams p) {
    // The row's choices by ascending expert.
    __shared__ u32 order[MAX_EXPERTS];
    __shared__ float weights[MAX_EXPERTS];
    wait_for_predecessor();
    allow_successor();
    const u64 first = u64(blockIdx.y) * p.top_k;
    const u32* experts = p.experts + first;
    u32 count = 0;
    for (u32 i = 0; i < p.top_k; i++) count += experts[i] < p.num_experts;
    for (u32 i = threadIdx.x; i < p.top_k; i += blockDim.x) {
        const u32 expert = experts[i];
        if (expert >= p.num_experts) continue;
        u32 rank = 0;
        for (u32 j = 0; j < p.top_k; j++) rank += experts[j] < expert || (experts[j] == expert && j < i);
        order[rank] = i;
        weights[rank] = p.weights[first + i];
    }
    __syncthreads();
    const u32 column = 8 * (blockIdx.x * blockDim.x + threadIdx.x), num_factors = (p.stride + 127) / 128;
    if (column >= p.columns) return;
    float sum[8] = {};
#pragma unroll 4
    for (u32 i = 0; i < count; i++) {
        const u64 pair = first + order[i];
        const uint4 raw = *reinterpret_cast<const uint4*>(p.partial + pair * p.stride + column);
        const float factor = p.factors[pair * num_factors + column / 128];
        const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float low, high;
            unpack_f16(words[j], low, high);
            // The factor is a power of two: the product is exact.
            sum[2 * j] = fmaf(low * factor, weights[i], sum[2 * j]);
            sum[2 * j + 1] = fmaf(high * factor, weights[i], sum[2 * j + 1]);
        }
    }
    *reinterpret_cast<uint4*>(p.out + u64(blockIdx.y) * p.out_columns + p.first_column + column) = pack(sum, bf16());
}
