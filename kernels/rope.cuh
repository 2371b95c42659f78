// The rotary embedding's arithmetic: sine and cosine of large angles, the rotation of a pair. No kernel.
#pragma once
#include "prelude.cuh"

// Sine and cosine of x >= 0, with errors under 2e-7 while x <= 2^20: x minus a multiple of pi / 2 is exact in its first
// step (the product is not rounded), and the library's own functions would go through local memory for large x.
__device__ __forceinline__ void sine_cosine(float x, float& sine, float& cosine) {
    const float n = rintf(x * 0.636619747f);
    float r = fmaf(n, -1.57079637f, x);
    r = fmaf(n, 4.37113883e-8f, r);
    r = fmaf(n, 1.71512451e-15f, r);
    const float z = r * r;
    const float s = fmaf(r * z, fmaf(z, fmaf(z, -1.95152959e-4f, 8.33216087e-3f), -1.66666655e-1f), r);
    const float c =
        fmaf(z * z, fmaf(z, fmaf(z, 2.44331571e-5f, -1.38873163e-3f), 4.16666456e-2f), fmaf(z, -0.5f, 1.0f));
    const u32 quadrant = u32(__float2int_rn(n)) & 3;
    sine = quadrant & 1 ? c : s;
    cosine = quadrant & 1 ? s : c;
    if (quadrant & 2) sine = -sine;
    if ((quadrant + 1) & 2) cosine = -cosine;
}

// Products and differences rounded one by one, as the CPU backend has them; the results rounded to bf16.
__device__ __forceinline__ void rotate_pair(float& first, float& second, float cosine, float sine) {
    const float a = first, b = second;
    first = rounded<bf16>(__fsub_rn(__fmul_rn(a, cosine), __fmul_rn(b, sine)));
    second = rounded<bf16>(__fadd_rn(__fmul_rn(b, cosine), __fmul_rn(a, sine)));
}
