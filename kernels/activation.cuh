// The activations, of float32 numbers. No kernel.
#pragma once
#include "prelude.cuh"

// `x / (1 + exp(-z))`. The fast forms are within 2^-20, far below the rounding of the result; beyond 2^126 the divisor gives
// 0, as it must.
__device__ __forceinline__ float logistic_product(float x, float z) { return __fdividef(x, 1.0f + __expf(-z)); }

__device__ __forceinline__ float silu(float x) { return logistic_product(x, x); }
// `x / 2 * (1 + tanh(u))` is `x * sigmoid(2 u)`.
__device__ __forceinline__ float gelu_tanh(float x) {
    return logistic_product(x, 2.0f * 0.7978846f * fmaf(x * x * x, 0.044715f, x));
}
__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
