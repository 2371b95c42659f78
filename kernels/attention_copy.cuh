// What all attention kernels share: matrix loads and the places of rows in shared memory, the exponential. No kernel.
#pragma once
#include "prelude.cuh"

// Starts a copy of the first `num_bytes` of 16, and of zeros behind them.
__device__ __forceinline__ void copy_async_part(u32 shared, const void* source, u32 num_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(num_bytes) : "memory");
}

// Starts a copy of 4 bytes to shared memory.
__device__ __forceinline__ void copy_async_word(u32 shared, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(source) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8. Lane (g, t) gets
// numbers 2t, 2t + 1 of row g of each.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
// Transposed: lane (g, t) gets number g of rows 2t, 2t + 1.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// As `mma_bf16`, of f16 numbers.
__device__ __forceinline__ void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Round to nearest even, two values at a time: `low` in the low half.
__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
// The operands of a product: bf16, or f16 over a cache in FP8, whose numbers f16 holds with less work and weights more
// exactly.
template <bool F16>
__device__ __forceinline__ void mma_16bit(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (F16)
        mma_f16(d, a[0], a[1], a[2], a[3], b0, b1);
    else
        mma_bf16(d, a[0], a[1], a[2], a[3], b0, b1);
}
template <bool F16> __device__ __forceinline__ u32 pack_16bit(float low, float high) {
    return F16 ? pack_f16(low, high) : pack_bf16(low, high);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr float LOG2_E = 1.4426950408889634f;
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// Rows of `CHUNKS` times 16 bytes in shared memory, such that eight rows at one chunk are in different banks: where the
// number of chunks is a power of two they change places, else a row gets an odd number of them.
template <int CHUNKS> struct RowLayout {
    static constexpr bool SWIZZLED = (CHUNKS & (CHUNKS - 1)) == 0;
    static constexpr int STRIDE = 16 * (SWIZZLED ? CHUNKS : CHUNKS | 1);

    static __device__ __forceinline__ u32 at(u32 row, u32 chunk) {
        if (!SWIZZLED) return row * STRIDE + chunk * 16;
        // Rows that share 128 bytes have the same key.
        constexpr u32 ROWS_PER_LINE = CHUNKS >= 8 ? 1 : 8 / CHUNKS;
        constexpr u32 KEYS = CHUNKS >= 8 ? 8 : CHUNKS;
        return row * STRIDE + ((chunk ^ (row / ROWS_PER_LINE % KEYS)) * 16);
    }
};
