// norm: residual += partial, then out = RMSNorm(residual) * weight. Rounds where the CPU backend does: the sum, the
// normalised value, and the product with the weight; the statistic is float32.
// norm_ranks: the same where partial is the sum over ranks whose memory this one can write: the sum is in the same launch.
// layer_norm: out = (x - mean) / deviation * weight + bias, rounded once.
//
// Shapes  partial (may be absent), residual, out [rows, columns], weight [columns]; bf16 or f32, columns a multiple of
//         16 bytes and at most 4 vectors of 16 bytes for each of 1024 threads. layer_norm: x, out [rows, columns], weight,
//         bias [columns], bf16.
// Bytes   rows * columns * size * (4 with partial: two reads, two writes; 2 without) + columns * size.
// Bound   latency at decode (one row is one block; the weight is loaded before the predecessor has ended), memory
//         bandwidth at prefill.
#include "prelude.cuh"

struct NormParams {
    const uint4* partial;
    uint4* residual;
    const uint4* weight;
    uint4* out;
    u32 columns;
    float eps;
};
PARAMS(NormParams);

// One block per row; thread i holds vectors i, i + blockDim, ... of the row in registers: memory is read once.
template <typename T, int VECTORS> __device__ __forceinline__ void norm(const NormParams& p) {
    constexpr int LENGTH = Vector<T>::LENGTH;
    const u32 row_vectors = p.columns / LENGTH;
    const u64 row = u64(blockIdx.x) * row_vectors;
    float weight[LENGTH];
    // The first vector is the only one up to a hidden size of 8192: it is what the overlap is for.
    uint4 first_weight = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < row_vectors) first_weight = p.weight[threadIdx.x];
    wait_for_predecessor();
    allow_successor();

    float x[VECTORS][LENGTH];
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const u32 i = threadIdx.x + v * blockDim.x;
        if (i < row_vectors) {
            unpack(p.residual[row + i], x[v], T());
            if (p.partial) {
                float partial[LENGTH];
                unpack(p.partial[row + i], partial, T());
#pragma unroll
                for (int j = 0; j < LENGTH; j++) x[v][j] = rounded<T>(x[v][j] + partial[j]);
                p.residual[row + i] = pack(x[v], T());
            }
#pragma unroll
            for (int j = 0; j < LENGTH; j++) squares = fmaf(x[v][j], x[v][j], squares);
        }
    }
    const float mean = __fdiv_rn(block_sum(squares), float(p.columns));
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(mean + p.eps));
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const u32 i = threadIdx.x + v * blockDim.x;
        if (i < row_vectors) {
            unpack(v == 0 ? first_weight : p.weight[i], weight, T());
#pragma unroll
            for (int j = 0; j < LENGTH; j++) x[v][j] = rounded<T>(x[v][j] * factor) * weight[j];
            p.out[row + i] = pack(x[v], T());
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024) norm_bf16_v1(const NormParams p) { norm<bf16, 1>(p); }
extern "C" __global__ void __launch_bounds__(1024) norm_bf16_v4(const NormParams p) { norm<bf16, 4>(p); }
extern "C" __global__ void __launch_bounds__(1024) norm_f32_v1(const NormParams p) { norm<float, 1>(p); }
extern "C" __global__ void __launch_bounds__(1024) norm_f32_v4(const NormParams p) { norm<float, 4>(p); }

struct RanksNormParams {
    const uint4* partial;
    uint4* residual;
    const uint4* weight;
    uint4* out;
    u32* epochs; // [max_rows]: exchanges of a row so far
    const u32* given_up;
    uint4* mailboxes[8]; // of each rank: [2][world][max_rows][row vectors][2]
    u32 columns;
    float eps;
    u32 rank;
    u32 world;
    u32 max_rows;
    u32 unused;
};
PARAMS(RanksNormParams);

// 8 bytes arrive as one, so each carries 4 of data and the number of the exchange: nothing else has to say that they are there.
__device__ __forceinline__ void send(uint4* mailbox, const uint4& v, u32 epoch) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(mailbox), "r"(v.x), "r"(epoch), "r"(v.y) : "memory");
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(mailbox + 1), "r"(v.z), "r"(epoch), "r"(v.w) : "memory");
}
__device__ __forceinline__ uint4 receive(const uint4* mailbox, u32 epoch, const u32* given_up) {
    u32 x, y, z, w, flags[4];
    for (u32 looks = 1;; looks++) {
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x), "=r"(flags[0]), "=r"(y), "=r"(flags[1])
                     : "l"(mailbox)
                     : "memory");
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(z), "=r"(flags[2]), "=r"(w), "=r"(flags[3])
                     : "l"(mailbox + 1)
                     : "memory");
        if (flags[0] == epoch && flags[1] == epoch && flags[2] == epoch && flags[3] == epoch) break;
        // A rank that is gone never writes: the host then ends the wait, and does not use what comes of it.
        if (looks % 4096 == 0 && *reinterpret_cast<const volatile u32*>(given_up)) break;
    }
    return make_uint4(x, y, z, w);
}

// norm of rows of which each rank has a partial sum. Every thread sends its vector to all others and waits for theirs; it sums them in
// the order of the ranks, so that all have the same bits. Two halves of a mailbox in turn are enough: who has received an exchange
// knows that the sender has read everything of the one before.
extern "C" __global__ void __launch_bounds__(1024) norm_ranks(const RanksNormParams p) {
    const u32 row_vectors = p.columns / 8, i = threadIdx.x;
    const u64 at = u64(blockIdx.x) * row_vectors + i;
    const bool is_here = i < row_vectors;
    uint4 weight = make_uint4(0, 0, 0, 0);
    if (is_here) weight = p.weight[i];
    wait_for_predecessor();
    allow_successor();
    const u32 epoch = p.epochs[blockIdx.x] + 1;
    float x[8], squares = 0.0f;
    if (is_here) {
        const uint4 mine = p.partial[at];
        const u64 half = u64(epoch & 1) * p.world;
        for (u32 to = 0; to < p.world; to++)
            if (to != p.rank)
                send(p.mailboxes[to] + (((half + p.rank) * p.max_rows + blockIdx.x) * row_vectors + i) * 2, mine, epoch);
        unpack(p.residual[at], x, bf16());
        float sum[8] = {};
        for (u32 from = 0; from < p.world; from++) {
            uint4 other = mine;
            if (from != p.rank) {
                const u64 slot = (((half + from) * p.max_rows + blockIdx.x) * row_vectors + i) * 2;
                other = receive(p.mailboxes[p.rank] + slot, epoch, p.given_up);
            }
            float values[8];
            unpack(other, values, bf16());
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] = from == 0 ? values[j] : sum[j] + values[j];
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            x[j] = rounded<bf16>(x[j] + rounded<bf16>(sum[j]));
            squares = fmaf(x[j], x[j], squares);
        }
        p.residual[at] = pack(x, bf16());
    }
    const float mean = __fdiv_rn(block_sum(squares), float(p.columns));
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(mean + p.eps));
    if (is_here) {
        float w[8];
        unpack(weight, w, bf16());
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = rounded<bf16>(x[j] * factor) * w[j];
        p.out[at] = pack(x, bf16());
    }
    // All threads have read it before the sum over the block.
    if (i == 0) p.epochs[blockIdx.x] = epoch;
}

struct LayerNormParams {
    const uint4* x;
    const uint4* weight;
    const uint4* bias;
    uint4* out;
    u32 columns;
    float eps;
};
PARAMS(LayerNormParams);

// As `norm`: one block per row, which is read once.
template <int VECTORS> __device__ __forceinline__ void layer_norm(const LayerNormParams& p) {
    const u32 row_vectors = p.columns / 8;
    const u64 row = u64(blockIdx.x) * row_vectors;
    wait_for_predecessor();
    allow_successor();
    float x[VECTORS][8];
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const u32 i = threadIdx.x + v * blockDim.x;
        if (i < row_vectors) {
            unpack(p.x[row + i], x[v], bf16());
#pragma unroll
            for (int j = 0; j < 8; j++) sum += x[v][j];
        }
    }
    const float mean = __fdiv_rn(block_sum(sum), float(p.columns));
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        if (threadIdx.x + v * blockDim.x < row_vectors) {
#pragma unroll
            for (int j = 0; j < 8; j++) squares = fmaf(x[v][j] - mean, x[v][j] - mean, squares);
        }
    }
    // The partial sums of the mean are read by all warps before they are overwritten.
    __syncthreads();
    const float variance = __fdiv_rn(block_sum(squares), float(p.columns));
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(variance + p.eps));
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const u32 i = threadIdx.x + v * blockDim.x;
        if (i < row_vectors) {
            float weight[8], bias[8];
            unpack(p.weight[i], weight, bf16());
            unpack(p.bias[i], bias, bf16());
#pragma unroll
            for (int j = 0; j < 8; j++) x[v][j] = fmaf(__fmul_rn(x[v][j] - mean, factor), weight[j], bias[j]);
            p.out[row + i] = pack(x[v], bf16());
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024) layer_norm_v1(const LayerNormParams p) { layer_norm<1>(p); }
extern "C" __global__ void __launch_bounds__(1024) layer_norm_v4(const LayerNormParams p) { layer_norm<4>(p); }
