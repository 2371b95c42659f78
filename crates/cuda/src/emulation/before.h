// Put before the text of a module: what the compiler for GPUs knows by itself, for a C++ compiler. Threads are fibers of one thread
// of the processor; see after.h.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define __CUDA_ARCH__ 1210
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after the other, so one place is enough; `extern __shared__` is made `extern` beforehand.
#define __shared__ static

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Place3 {
    unsigned x, y, z;
};
// Of the fiber that runs.
extern Place3 threadIdx, blockIdx, blockDim, gridDim;

template <typename T> static inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> static inline T max(T a, T b) { return a < b ? b : a; }
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline float __fdividef(float a, float b) { return a / b; }
// The C library has a function of this name.
#define __expf expf
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned order) {
    const unsigned long long both = a | static_cast<unsigned long long>(b) << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<unsigned>(both >> (8 * (order >> (4 * i) & 7)) & 0xff) << (8 * i);
    return result;
}

void __syncthreads();
unsigned long long __cvta_generic_to_shared(const void* pointer);
// What all lanes of the warp bring; to be read before they meet again.
const unsigned* gathered(unsigned value);
static inline unsigned exchanged(unsigned value, unsigned from_lane) { return gathered(value)[from_lane]; }
static inline unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) { return exchanged(value, (threadIdx.x % 32) ^ mask); }
static inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return __uint_as_float(exchanged(__float_as_uint(value), (threadIdx.x % 32) ^ mask));
}
static inline unsigned __shfl_sync(unsigned, unsigned value, unsigned lane) { return exchanged(value, lane); }
static inline float __shfl_sync(unsigned, float value, unsigned lane) { return __uint_as_float(exchanged(__float_as_uint(value), lane)); }
static inline unsigned __shfl_up_sync(unsigned, unsigned value, unsigned by) {
    const unsigned lane = threadIdx.x % 32;
    return exchanged(value, lane >= by ? lane - by : lane);
}
static inline unsigned __match_any_sync(unsigned, unsigned value) {
    const unsigned* all = gathered(value);
    unsigned same = 0;
    for (int i = 0; i < 32; i++) same |= unsigned(all[i] == value) << i;
    return same;
}
static inline unsigned __ballot_sync(unsigned, bool is_so) { return __match_any_sync(0, is_so) ^ (is_so ? 0u : 0xffffffffu); }
static inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    const unsigned* all = gathered(value);
    for (int i = 0; i < 32; i++) value = max(value, all[i]);
    return value;
}
static inline unsigned __reduce_min_sync(unsigned, unsigned value) {
    const unsigned* all = gathered(value);
    for (int i = 0; i < 32; i++) value = min(value, all[i]);
    return value;
}
static inline void __syncwarp() { gathered(0); }
static inline int __popc(unsigned value) { return __builtin_popcount(value); }
static inline int __ffs(unsigned value) { return __builtin_ffs(int(value)); }
unsigned __syncthreads_count(bool is_so);

#line 1 "module"
