// swiglu: out = silu(gate) * up, silu rounded before the product as a model of modules does.
//
// Shapes  gate_up [rows, 2 * intermediate] (gate first), out [rows, intermediate]; bf16 or f32, intermediate a multiple
//         of 16 bytes.
// Bytes   3 * rows * intermediate * size of an element.
// Bound   latency at decode, memory bandwidth at prefill. Inside a MoE layer it is part of the gate_up kernel.
#include "prelude.cuh"

struct SwigluParams {
    const uint4* gate_up;
    uint4* out;
    u32 rows;
    u32 intermediate;
};
PARAMS(SwigluParams);

// `x / (1 + exp(-x))` for bf16 results, whose rounding hides the 2^-20 of the fast forms (a divisor beyond 2^126 gives 0, as it
// must); exact for float32.
__device__ __forceinline__ float silu(float x, bf16) { return __fdividef(x, 1.0f + __expf(-x)); }
__device__ __forceinline__ float silu(float x, float) { return x / (1.0f + expf(-x)); }

// One thread per 16 bytes of the result. Grid: (rows, pieces of a row).
template <typename T> __device__ __forceinline__ void swiglu(const SwigluParams& p) {
    constexpr int LENGTH = Vector<T>::LENGTH;
    const u32 row_vectors = p.intermediate / LENGTH;
    wait_for_predecessor();
    allow_successor();
    const u32 column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= row_vectors) return;
    const u64 row = u64(blockIdx.x) * row_vectors;
    float gate[LENGTH], up[LENGTH];
    unpack(p.gate_up[2 * row + column], gate, T());
    unpack(p.gate_up[2 * row + row_vectors + column], up, T());
#pragma unroll
    for (int j = 0; j < LENGTH; j++) up[j] *= rounded<T>(silu(gate[j], T()));
    p.out[row + column] = pack(up, T());
}

extern "C" __global__ void __launch_bounds__(256) swiglu_bf16(const SwigluParams p) { swiglu<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) swiglu_f32(const SwigluParams p) { swiglu<float>(p); }
