// The linear layers of decode, whatever the scheme of the weights. No kernel: linear_int4.cu and linear_nvfp4.cu make them.
#pragma once
#include "decode_linear.cuh"

struct LinearParams {
    const uint4* codes;
    const u32* scales;
    const float* row_scales; // NVFP4: [n], else null
    const float* bias;       // [n] or null
    const u16* x;            // [rows, x_columns]
    void* out;               // [rows, n]
    u32 n;                   // rows of W, without padding
    u32 k;                   // with padding
    u32 x_columns;           // k without padding
    u32 rows;                // of x and out
    u32 out_is_f32;
    u32 padding;
};
PARAMS(LinearParams);

// One block per 32 rows of W.
template <typename Scheme, int TOKEN_TILES> __device__ __forceinline__ void linear(const LinearParams& p) {
    Operand operand = {p.codes, p.scales, p.k, {blockIdx.x * ROW_TILES, blockIdx.x * ROW_TILES + 1}};
    Rows<TOKEN_TILES> rows = {{}, p.x_columns};
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++) {
        const u32 token = 8 * i + threadIdx.x % 32 / 4;
        rows.rows[i] = token < p.rows ? p.x + u64(token) * p.x_columns : nullptr;
    }
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    accumulate<Scheme>(acc, operand, rows);

    __shared__ WarpSums<TOKEN_TILES> warps;
    warps.store(acc);
    __syncthreads();
    for (u32 i = threadIdx.x; i < TOKEN_TILES * 8 * OUTPUTS; i += blockDim.x) {
        const u32 token = i / OUTPUTS, n = blockIdx.x * OUTPUTS + i % OUTPUTS;
        if (token >= p.rows || n >= p.n) continue;
        float sum = warps.total(token, i % OUTPUTS);
        if (p.row_scales) sum *= p.row_scales[n];
        if (p.bias) sum += p.bias[n];
        const u64 at = u64(token) * p.n + n;
        if (p.out_is_f32) {
            static_cast<float*>(p.out)[at] = sum;
        } else {
            static_cast<u16*>(p.out)[at] = u16(pack_bf16(sum, 0.0f));
        }
    }
}

// At least BLOCKS blocks on a multiprocessor: two, where a thread can do with half of the registers without spilling.
#define LINEAR(NAME, SCHEME, TOKEN_TILES, BLOCKS)                                                                      \
    extern "C" __global__ void __launch_bounds__(MAX_WARPS * 32, BLOCKS) NAME(const LinearParams p) {                  \
        linear<SCHEME, TOKEN_TILES>(p);                                                                                \
    }
