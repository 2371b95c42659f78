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

// One thread per 16 bytes of the result.
template <typename T> __device__ __forceinline__ void swiglu(const SwigluParams& p) {
    constexpr int LENGTH = Vector<T>::LENGTH;
    const u32 row_vectors = p.intermediate / LENGTH;
    wait_for_predecessor();
    allow_successor();
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= u64(p.rows) * row_vectors) return;
    const u64 row = i / row_vectors, column = i % row_vectors;
    float gate[LENGTH], up[LENGTH];
    unpack(p.gate_up[2 * row * row_vectors + column], gate, T());
    unpack(p.gate_up[(2 * row + 1) * row_vectors + column], up, T());
#pragma unroll
    for (int j = 0; j < LENGTH; j++) up[j] *= rounded<T>(gate[j] / (1.0f + expf(-gate[j])));
    p.out[i] = pack(up, T());
}

extern "C" __global__ void __launch_bounds__(256) swiglu_bf16(const SwigluParams p) { swiglu<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) swiglu_f32(const SwigluParams p) { swiglu<float>(p); }
