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
unsigned exchanged(unsigned value, unsigned from_lane);
static inline unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) { return exchanged(value, (threadIdx.x % 32) ^ mask); }
static inline float __shfl_xor_sync(unsigned, float value, int mask) {
    return __uint_as_float(exchanged(__float_as_uint(value), (threadIdx.x % 32) ^ mask));
}

#line 1 "module"
