// Rows and elements: gather_rows (out[i] = source[rows[i]]), add (x += y) and the activations (x = f(x)), rounded once.
//
// Shapes  gather: source [source_rows, columns], rows [num_rows] u32, out [num_rows, columns]; the others: vectors of 8.
//         All bf16 in vectors of 16 bytes.
// Bytes   gather 4 * num_rows * columns; add 6, activate 4 for each element.
// Bound   latency at decode, memory bandwidth at prefill and in the vision encoder.
#include "prelude.cuh"

struct GatherParams {
    const uint4* source;
    const u32* rows;
    uint4* out;
    u32 row_vectors;
    u32 source_rows;
};
PARAMS(GatherParams);

// One block per row; zeros for a row that is not there.
extern "C" __global__ void __launch_bounds__(256) gather_rows(const GatherParams p) {
    wait_for_predecessor();
    allow_successor();
    const u32 row = p.rows[blockIdx.x];
    const bool is_there = row < p.source_rows;
    const uint4* source = p.source + u64(is_there ? row : 0) * p.row_vectors;
    uint4* out = p.out + u64(blockIdx.x) * p.row_vectors;
    for (u32 i = threadIdx.x; i < p.row_vectors; i += blockDim.x)
        out[i] = is_there ? source[i] : make_uint4(0, 0, 0, 0);
}

struct ElementsParams {
    uint4* x;
    const uint4* y;
    u64 num_vectors;
};
PARAMS(ElementsParams);

extern "C" __global__ void __launch_bounds__(256) add(const ElementsParams p) {
    wait_for_predecessor();
    allow_successor();
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.num_vectors) return;
    float x[8], y[8];
    unpack(p.x[i], x, bf16());
    unpack(p.y[i], y, bf16());
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] += y[j];
    p.x[i] = pack(x, bf16());
}

// `x / (1 + exp(-z))`. The fast forms are within 2^-20, far below the rounding of the result; beyond 2^126 the divisor gives
// 0, as it must.
__device__ __forceinline__ float logistic_product(float x, float z) { return __fdividef(x, 1.0f + __expf(-z)); }

__device__ __forceinline__ float silu(float x) { return logistic_product(x, x); }
// `x / 2 * (1 + tanh(u))` is `x * sigmoid(2 u)`.
__device__ __forceinline__ float gelu_tanh(float x) {
    return logistic_product(x, 2.0f * 0.7978846f * fmaf(x * x * x, 0.044715f, x));
}
__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

template <typename F> __device__ __forceinline__ void activate(const ElementsParams& p, F function) {
    wait_for_predecessor();
    allow_successor();
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.num_vectors) return;
    float x[8];
    unpack(p.x[i], x, bf16());
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = function(x[j]);
    p.x[i] = pack(x, bf16());
}

extern "C" __global__ void __launch_bounds__(256) activate_silu(const ElementsParams p) {
    activate(p, [](float x) { return silu(x); });
}
extern "C" __global__ void __launch_bounds__(256) activate_gelu_tanh(const ElementsParams p) {
    activate(p, [](float x) { return gelu_tanh(x); });
}
extern "C" __global__ void __launch_bounds__(256) activate_gelu_erf(const ElementsParams p) {
    activate(p, [](float x) { return gelu_erf(x); });
}
