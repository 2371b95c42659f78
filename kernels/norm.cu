// norm: residual += partial, then out = RMSNorm(residual) * weight. Rounds where the CPU backend does: the sum, the
// normalised value, and the product with the weight; the statistic is float32.
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
