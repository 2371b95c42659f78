// fp8_rows_g*: rows of bf16 numbers as e4m3 with a scale for each row, in the order that gemm_fp8x.cuh reads, and the sums of each group.
//
// Shapes  x [rows, columns] bf16, columns a multiple of 8; codes [rows, padded] e4m3, padded a multiple of 128, zeros behind the last
//         column; sums [rows, padded / group] f32, of the codes' numbers; scales [rows] f32.
// Bytes   rows * columns * 3, and a second read of x from the cache.
// Bound   memory bandwidth.
//
// The largest number of a row becomes 448, the others are rounded to the nearest, ties to even. In 64 inputs byte 16 t + j (j < 8) is input
// 8 t + o[j], byte 16 t + 8 + j input 32 + 8 t + o[j], o = 0 4 1 5 2 6 3 7.
#include "prelude.cuh"

struct Fp8RowsParams {
    const u16* x;
    u8* codes;
    float* sums;
    float* scales;
    u32 rows;
    u32 columns;
    u32 padded;
    u32 padding;
};
PARAMS(Fp8RowsParams);

constexpr u32 WARPS = 4;
constexpr float LARGEST = 448.0f;

// `low` in the low byte. Not on sm_80, where the host does not launch this.
__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
    u16 packed = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

// The sum of two e4m3 numbers.
__device__ __forceinline__ float sum_e4m3(u32 pair) {
    float low = 0.0f, high = 0.0f;
#if __CUDA_ARCH__ >= 890
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(u16(pair)));
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(low), "=f"(high) : "r"(halves));
#endif
    return low + high;
}

// A warp for each row, 8 inputs a lane.
template <int GROUP> __device__ __forceinline__ void quantize(const Fp8RowsParams& p) {
    constexpr u32 ALL = 0xffffffffu;
    const u32 lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
    wait_for_predecessor();
    allow_successor();
    if (row >= p.rows) return;
    const u16* x = p.x + u64(row) * p.columns;
    float largest = 0.0f;
    for (u32 at = 8 * lane; at < p.columns; at += 256) {
        float v[8];
        unpack(*reinterpret_cast<const uint4*>(x + at), v, bf16());
#pragma unroll
        for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(v[j]));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, step));
    // Below 2^-110 a row is zeros.
    const bool is_zero = !(largest >= 0x1p-110f);
    const float inverse = is_zero ? 0.0f : LARGEST / largest;
    if (lane == 0) p.scales[row] = is_zero ? 0.0f : largest / LARGEST;
    for (u32 at = 8 * lane; at < p.padded; at += 256) {
        float v[8] = {};
        if (at < p.columns) unpack(*reinterpret_cast<const uint4*>(x + at), v, bf16());
        u32 pairs[4]; // inputs 0 4, 1 5, 2 6, 3 7
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            pairs[j] = pack_e4m3(v[j] * inverse, v[j + 4] * inverse);
            sum += sum_e4m3(pairs[j]);
        }
        const u32 run = at % 64 / 8;
        const u64 target = u64(row) * p.padded + at / 64 * 64 + 16 * (run % 4) + 8 * (run / 4);
        *reinterpret_cast<uint2*>(p.codes + target) = make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
        // 128 inputs, so 16 lanes, are there or not together.
        const u32 there = p.padded - (at - 8 * lane) >= 256 ? ALL : 0xffffu;
#pragma unroll
        for (int step = GROUP / 16; step > 0; step /= 2) sum += __shfl_xor_sync(there, sum, step);
        if (at % GROUP == 0) p.sums[u64(row) * (p.padded / GROUP) + at / GROUP] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) fp8_rows_g32(const Fp8RowsParams p) { quantize<32>(p); }
extern "C" __global__ void __launch_bounds__(32 * WARPS) fp8_rows_g64(const Fp8RowsParams p) { quantize<64>(p); }
extern "C" __global__ void __launch_bounds__(32 * WARPS) fp8_rows_g128(const Fp8RowsParams p) { quantize<128>(p); }
