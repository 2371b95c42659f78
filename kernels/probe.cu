// probe: what the machine can do, with kernels that do nothing else: read, copy, multiply, start.
//
// Shapes  source and target of `len` pieces of 16 bytes; any contents. Results of products go nowhere.
// Bound   each kernel by what it measures.
// Used by `spark-engine probe`, and by `bench kernels --sms` for the ceiling; no model needs them.
#include "prelude.cuh"

struct ProbeParams {
    const uint4* source;
    uint4* target;
    u64 len;
    u32 repeats;
    u32 unused;
};
PARAMS(ProbeParams);

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

__device__ __forceinline__ uint4 load(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

// Loads that a thread has under way.
constexpr int LOADS = 8;

// Reads all of `source`. `target` is written if the sum is one that no contents are expected to have.
extern "C" __global__ void __launch_bounds__(256) probe_read(const ProbeParams p) {
    wait_for_predecessor();
    const u64 stride = u64(gridDim.x) * blockDim.x;
    u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    u32 sum = 0;
    for (; i + (LOADS - 1) * stride < p.len; i += LOADS * stride) {
        uint4 v[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) v[j] = load(p.source + i + j * stride);
#pragma unroll
        for (int j = 0; j < LOADS; j++) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < p.len; i += stride) sum += load(p.source + i).x;
    if (sum == 0x9e3779b9u) p.target[0] = make_uint4(sum, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(256) probe_copy(const ProbeParams p) {
    wait_for_predecessor();
    const u64 stride = u64(gridDim.x) * blockDim.x;
    u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + (LOADS - 1) * stride < p.len; i += LOADS * stride) {
        uint4 v[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) v[j] = load(p.source + i + j * stride);
#pragma unroll
        for (int j = 0; j < LOADS; j++) p.target[i + j * stride] = v[j];
    }
    for (; i < p.len; i += stride) p.target[i] = load(p.source + i);
}

// Does nothing, as the model's kernels begin: waits, then lets its successor in.
extern "C" __global__ void __launch_bounds__(32) probe_empty(const ProbeParams p) {
    wait_for_predecessor();
    allow_successor();
}
// The same with the successor let in first, so that it is on the multiprocessors when this one ends.
extern "C" __global__ void __launch_bounds__(32) probe_empty_early(const ProbeParams p) {
    allow_successor();
    wait_for_predecessor();
}

// Lasts `repeats` microseconds.
extern "C" __global__ void __launch_bounds__(32) probe_spin(const ProbeParams p) {
    wait_for_predecessor();
    const u64 start = nanoseconds();
    while (nanoseconds() - start < u64(p.repeats) * 1000) {
    }
}

// Sets the bit of every multiprocessor that a block runs on, in the words of `target`. Blocks last a little, so that each
// multiprocessor gets one.
extern "C" __global__ void __launch_bounds__(1024) probe_sms(const ProbeParams p) {
    wait_for_predecessor();
    const u64 start = nanoseconds();
    u32 sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    u32* const words = reinterpret_cast<u32*>(p.target);
    if (threadIdx.x == 0 && sm / 32 < p.len * 4) atomicOr(words + sm / 32, 1u << (sm % 32));
    while (nanoseconds() - start < u64(p.repeats) * 1000) {
    }
}

// Products that do not wait for each other.
constexpr int CHAINS = 8;

struct Bf16 {
    static constexpr u32 MASK = 0x807f807fu, BASE = 0x3c003c00u; // about 2^-7
    __device__ static __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        mma_bf16(d, a[0], a[1], a[2], a[3], b[0], b[1]);
    }
};
#if __CUDA_ARCH__ >= 890
struct E4m3 {
    static constexpr u32 MASK = 0x87878787u, BASE = 0x20202020u; // about 2^-3
    __device__ static __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};
#endif
#if __CUDA_ARCH__ >= 1200
struct E2m1 {
    static constexpr u32 MASK = 0xffffffffu, BASE = 0;
    __device__ static __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        // Scales of 2^-4.
        asm volatile("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {%11, %11}, {%10}, {%11, %11};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(0x18181818u), "h"(u16(0)));
    }
};
#endif

// `repeats` times CHAINS products in every warp. The first thread leaves cycles and nanoseconds of its block in `target`.
template <typename T> __device__ __forceinline__ void multiply(const ProbeParams& p) {
    wait_for_predecessor();
    // Numbers with changing bits: a GPU that multiplies zeros runs faster than one at work.
    u32 seed = (threadIdx.x + 1) * 0x9e3779b9u;
    u32 a[4], b[CHAINS][2];
    float d[CHAINS][4];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = (seed = seed * 1664525u + 1013904223u, seed >> 3) & T::MASK | T::BASE;
#pragma unroll
    for (int chain = 0; chain < CHAINS; chain++) {
#pragma unroll
        for (int i = 0; i < 2; i++) b[chain][i] = (seed = seed * 1664525u + 1013904223u, seed >> 3) & T::MASK | T::BASE;
#pragma unroll
        for (int i = 0; i < 4; i++) d[chain][i] = 0.0f;
    }
    const u64 nanos = nanoseconds();
    const long long cycles = clock64();
    for (u32 i = 0; i < p.repeats; i++) {
#pragma unroll
        for (int chain = 0; chain < CHAINS; chain++) T::multiply(d[chain], a, b[chain]);
    }
    float sum = 0.0f;
#pragma unroll
    for (int chain = 0; chain < CHAINS; chain++) sum += d[chain][0] + d[chain][1] + d[chain][2] + d[chain][3];
    u64* const out = reinterpret_cast<u64*>(p.target);
    // The sum is used, so that no product can be left out.
    if (sum == 12345.678f) out[2] = 1;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        out[0] = u64(clock64() - cycles);
        out[1] = nanoseconds() - nanos;
    }
}

extern "C" __global__ void __launch_bounds__(256) probe_mma_bf16(const ProbeParams p) { multiply<Bf16>(p); }
#if __CUDA_ARCH__ >= 890
extern "C" __global__ void __launch_bounds__(256) probe_mma_e4m3(const ProbeParams p) { multiply<E4m3>(p); }
#endif
#if __CUDA_ARCH__ >= 1200
extern "C" __global__ void __launch_bounds__(256) probe_mma_e2m1(const ProbeParams p) { multiply<E2m1>(p); }
#endif
