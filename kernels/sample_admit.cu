// sample_admit: what a sequence brings to its slot of the sampler. All of it comes in the parameters, so that no memory of
// the host has to outlive the call and a step in flight is not waited for; long lists take several launches.
//
// Shapes  up to 440 entries: a token and its bias, its place in the history, that it is a stop token, or which named one it is.
// Bytes   a few kilobytes.
// Bound   launch latency.
#include "sample.cuh"

constexpr u32 ENTRIES = 440;
// The top bits of an entry's token say what it is.
constexpr u32 KIND_SHIFT = 30, HISTORY = 0, BIAS = 1, NAMED = 3;

struct AdmitParams {
    Slot* slots;
    u32* last_tokens;
    float* bias;
    u32* stops;
    u16* history;
    u32* named;
    Slot slot;
    u32 index;
    u32 has_slot; // `slot` and `last_token` are to be written
    u32 last_token;
    u32 stride;
    u32 num_entries;
    u32 unused;
    u32 entries[ENTRIES][2];
};
PARAMS(AdmitParams);

extern "C" __global__ void __launch_bounds__(512) sample_admit(const __grid_constant__ AdmitParams p) {
    wait_for_predecessor();
    allow_successor();
    if (threadIdx.x == 0 && p.has_slot) {
        p.slots[p.index] = p.slot;
        p.last_tokens[p.index] = p.last_token;
    }
    if (threadIdx.x >= p.num_entries) return;
    const u32 entry = p.entries[threadIdx.x][0], value = p.entries[threadIdx.x][1];
    const u32 kind = entry >> KIND_SHIFT, token = entry & ((1u << KIND_SHIFT) - 1);
    const u64 offset = u64(p.index) * p.stride;
    if (kind == HISTORY) p.history[offset + token] = u16(value);
    else if (kind == BIAS) p.bias[offset + token] = __uint_as_float(value);
    else if (kind == NAMED) p.named[u64(p.index) * MAX_NAMED + value] = token;
    else atomicOr(p.stops + offset / 32 + token / 32, 1u << token % 32);
}
