// What all kernels share: types, conversions, reductions, and inline PTX in place of NVIDIA's headers (NVRTC brings
// none, and none is needed). No kernel.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The size of a parameter struct on the host, given by the program that compiles this, must be its size here.
#define PARAMS(name) static_assert(sizeof(name) == SIZEOF_##name, #name " has another size on the host")

// A bfloat16 number as it is stored.
struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float(u32(value.bits) << 16); }
__device__ __forceinline__ float to_float(float value) { return value; }

// Round to nearest even, two values at a time: `low` in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// The value as `T` stores it.
template <typename T> __device__ __forceinline__ float rounded(float value);
template <> __device__ __forceinline__ float rounded<float>(float value) { return value; }
template <> __device__ __forceinline__ float rounded<bf16>(float value) {
    return __uint_as_float(pack_bf16(0.0f, value) & 0xffff0000u);
}

// 16 bytes of `T`: the widest load.
template <typename T> struct Vector {
    static constexpr int LENGTH = 16 / sizeof(T);
};

__device__ __forceinline__ void unpack(const uint4& raw, float (&values)[8], bf16) {
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = __uint_as_float(words[i] << 16);
        values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void unpack(const uint4& raw, float (&values)[4], float) {
    values[0] = __uint_as_float(raw.x);
    values[1] = __uint_as_float(raw.y);
    values[2] = __uint_as_float(raw.z);
    values[3] = __uint_as_float(raw.w);
}
__device__ __forceinline__ uint4 pack(const float (&v)[8], bf16) {
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}
__device__ __forceinline__ uint4 pack(const float (&v)[4], float) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}

// Programmatic dependent launch: a kernel starts while its predecessor ends. Before `wait_for_predecessor` it may touch
// only what no kernel writes (weights); every kernel calls it, so that waiting for one means waiting for all before it.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may be put on the multiprocessors as they become free. Only after `wait_for_predecessor`: then, where a kernel
// starts, all before its predecessor have ended, and it may read what they wrote before it waits (`down` of moe.cuh does).
__device__ __forceinline__ void allow_successor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Sum over the block, the same in every thread. One fixed order for a given number of threads (a multiple of 32).
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float partial[32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    value = lane < blockDim.x / 32 ? partial[lane] : 0.0f;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// 16 bytes that are read once: past the first-level cache.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

// (a & b) | c in one instruction.
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// a * b + c of two pairs of bf16 numbers, rounded once; subnormal numbers count.
__device__ __forceinline__ u32 fma_bf16(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// a * b, in the same way.
__device__ __forceinline__ u32 multiply_bf16(u32 a, u32 b) { return fma_bf16(a, b, 0x80008000u); }

// d += A B for A [16, 16] and B [16, 8]. Lane l, g = l / 4, t = l % 4: a0, a2 hold row g, a1, a3 row g + 8 (k 2t, 2t + 1
// in a0, a1; 2t + 8, 2t + 9 in a2, a3); b0, b1 column g, the same k; d0, d1 row g, d2, d3 row g + 8, columns 2t, 2t + 1.
__device__ __forceinline__ void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Address of `pointer`, which points to shared memory, as the instructions for it take it.
__device__ __forceinline__ u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// Starts a copy of 16 bytes to shared memory, past the first-level cache; zeros if not `is_valid` (the source is then not
// touched). Copies up to a `commit_copies` are a group; `wait_copies<N>` waits for all but the last N groups of the thread.
__device__ __forceinline__ void copy_async(u32 shared, const void* source, bool is_valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(is_valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
