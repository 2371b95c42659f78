// Sorting a list of candidates, and what is done when too many lie near a threshold to be listed (flat distributions): one
// block goes through the row again and again, halving the range in which the threshold lies. Exact, not fast. No kernel.
#pragma once
#include "sample.cuh"

// Sorts `length` keys (up to LIST) by falling value. All threads.
__device__ __forceinline__ void sort_keys(u64 (&keys)[LIST], u32 length) {
    u32 size = 2;
    while (size < length) size *= 2;
    for (u32 i = length + threadIdx.x; i < size; i += THREADS) keys[i] = 0;
    __syncthreads();
    for (u32 run = 2; run <= size; run *= 2) {
        for (u32 apart = run / 2; apart > 0; apart /= 2) {
            for (u32 i = threadIdx.x; i < size / 2; i += THREADS) {
                const u32 low = 2 * i - (i & (apart - 1)), high = low + apart;
                const u64 a = keys[low], b = keys[high];
                const bool is_falling = (low & run) == 0;
                if ((a < b) == is_falling) keys[low] = b, keys[high] = a;
            }
            __syncthreads();
        }
    }
}

// The sorted list of a job in `keys`.
__device__ __forceinline__ void sort_list(const u64* list, u64 (&keys)[LIST], u32 length) {
    for (u32 i = threadIdx.x; i < length; i += THREADS) keys[i] = __ldcg(list + i);
    __syncthreads();
    sort_keys(keys, length);
}

// Calls `visit(key)` for every candidate of the row: finite logits not under `floor`; all tokens if `is_head`.
template <typename F>
__device__ __forceinline__ void for_candidates(const Source& s, bool is_head, float floor, F&& visit) {
    for (u32 token = 4 * threadIdx.x; token < s.vocab; token += CHUNK) {
        float x[4];
        load_raw(s, token, x);
        if (!is_head) scale(s, token, x);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const bool is_candidate = is_head || (x[i] > MINUS_INFINITY && x[i] >= floor);
            if (token + i < s.vocab && is_candidate) visit(ranked(x[i], token + i));
        }
    }
}

// How a row's candidates are weighed: each counts 1, or its mass.
struct Measure {
    const Source& source;
    bool is_head;
    float floor;
    float highest;
    bool by_mass;
};

// Of the candidates from `least` on: how many, how much, and the lowest of them; of those before, the highest.
struct Side {
    u64 count, sum, lowest, highest_before;
};
__device__ __noinline__ Side weigh(const Measure& m, u64 least) {
    u64 count = 0, sum = 0, lowest = ~0ull, before = 0;
    for_candidates(m.source, m.is_head, m.floor, [&](u64 key) {
        if (key < least) {
            before = key > before ? key : before;
            return;
        }
        count++;
        sum += m.by_mass ? mass(value_of(key), m.highest) : 1;
        lowest = key < lowest ? key : lowest;
    });
    return Side{block_total(count), block_total(sum), ~block_max(~lowest), block_max(before)};
}

// The lowest key of the fewest highest candidates that weigh at least `target`, of those from `least` on; 0 if all of them
// weigh less.
__device__ __noinline__ u64 find_threshold(const Measure& m, double target, u64 least, u64 (&keys)[LIST]) {
    __shared__ u32 length, place;
    const Side all = weigh(m, least);
    if (all.count == 0 || double(all.sum) < target) return 0;
    // The threshold lies in [low, high); `before` is what is not under `high`.
    u64 low = all.lowest, high = ~0ull, count = all.count, count_before = 0, before = 0;
    while (count - count_before > LIST) {
        const u64 middle = low + (high - low) / 2;
        const Side side = weigh(m, middle);
        if (side.count && double(side.sum) >= target) {
            low = side.lowest;
            count = side.count;
        } else {
            high = side.highest_before + 1;
            count_before = side.count;
            before = side.sum;
        }
    }
    if (threadIdx.x == 0) length = 0, place = NONE;
    __syncthreads();
    for_candidates(m.source, m.is_head, m.floor, [&](u64 key) {
        if (key >= low && key < high) keys[atomicAdd(&length, 1u)] = key;
    });
    __syncthreads();
    sort_keys(keys, length);
    const u32 each = (length + THREADS - 1) / THREADS, first = threadIdx.x * each, end = min(first + each, length);
    u64 own = 0;
    for (u32 i = first; i < end; i++) own += m.by_mass ? mass(value_of(keys[i]), m.highest) : 1;
    u64 sum = before + block_sum_before(own);
    for (u32 i = first; i < end; i++) {
        sum += m.by_mass ? mass(value_of(keys[i]), m.highest) : 1;
        if (double(sum) >= target) {
            atomicMin(&place, i);
            break;
        }
    }
    __syncthreads();
    const u64 threshold = place == NONE ? low : keys[place];
    __syncthreads();
    return threshold;
}

// The `count` highest tokens of the raw row, sorted, in `keys`; how many there are.
__device__ __noinline__ u32 list_highest(const Source& s, u64 (&keys)[LIST], u32 count) {
    __shared__ u32 length;
    const Measure by_count = {s, true, 0.0f, 0.0f, false};
    const u64 threshold = find_threshold(by_count, double(min(count, LIST)), 0, keys);
    if (threadIdx.x == 0) length = 0;
    __syncthreads();
    for_candidates(s, true, 0.0f, [&](u64 key) {
        if (key >= threshold) keys[atomicAdd(&length, 1u)] = key;
    });
    __syncthreads();
    sort_keys(keys, length);
    return length;
}

// The best score under the slot's filters; in every thread its own.
__device__ __noinline__ u64 draw_slowly(const Source& s, const Slot& slot, float highest, u64 (&keys)[LIST]) {
    const float floor = __fadd_rn(highest, slot.floor);
    u64 threshold = 0;
    if (slot.top_k) threshold = find_threshold(Measure{s, false, floor, highest, false}, double(slot.top_k), 0, keys);
    if (slot.top_p < 1.0f) {
        const Measure by_mass = {s, false, floor, highest, true};
        const u64 total = weigh(by_mass, threshold).sum;
        const u64 nucleus = find_threshold(by_mass, double(slot.top_p) * double(total), threshold, keys);
        threshold = nucleus > threshold ? nucleus : threshold;
    }
    u64 best = 0;
    for_candidates(s, false, floor, [&](u64 key) {
        if (key < threshold) return;
        const u32 token = token_of(key);
        const uint4 words = philox(token / 4, slot.generated, slot.seed);
        const u32 word = token % 4 == 0 ? words.x : token % 4 == 1 ? words.y : token % 4 == 2 ? words.z : words.w;
        const u64 candidate = ranked(score(value_of(key), word), token);
        best = candidate > best ? candidate : best;
    });
    return best;
}
