// Put behind after.h for modules with the choice of experts (pairs.cuh): their functions with PTX, and bf16 products.
#line 1 "choice.h"

// What the kernels of experts call their dynamic shared memory.
extern uint4 dynamic[] __attribute__((alias("shared")));

inline u32 load_shared_value(const u32* address) { return *address; }
inline Group load_group(const Group* address) { return *address; }
inline uint4 load_once(const uint4* address) { return *address; }
inline const char* advance_vectors(const void* base, u32 index) { return static_cast<const char*>(base) + 16ull * index; }

// Blocks run one after the other.
inline bool is_last(u32* counter, u32 num_blocks) {
    static u32 before;
    __syncthreads();
    if (threadIdx.x == 0) {
        before = (*counter)++;
        if (before == num_blocks - 1) *counter = 0;
    }
    __syncthreads();
    return before == num_blocks - 1;
}

// m16n8k16. Lane l, g = l / 4, t = l % 4: A in pairs, row g + 8 (i % 2), k = 2t + 8 (i / 2); B column g, k = 2t + 8i; D as for
// multiply_warp.
static void multiply_warp_bf16(Lanes& warp) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; half++) {
            const auto value = [&](int i) { return double(__uint_as_float(warp.in[lane][i] >> (16 * half) << 16)); };
            for (int i = 0; i < 4; i++) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = value(i);
            for (int i = 0; i < 2; i++) b[2 * t + 8 * i + half][g] = value(4 + i);
        }
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            double sum = warp.d[lane][i];
            for (int k = 0; k < 16; k++) sum += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
            warp.d[lane][i] = float(sum);
        }
}
inline void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Lanes& warp = own_warp();
    const unsigned lane = threadIdx.x % 32;
    const u32 in[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(warp.in[lane], in, sizeof in);
    memcpy(warp.d[lane], d, sizeof d);
    meet(warp.meeting, 32, [&] { multiply_warp_bf16(warp); });
    memcpy(d, warp.d[lane], sizeof d);
}
