// What the sampling kernels share: their parameters, how a row of logits is read and adjusted, orders, the generator,
// reductions. No kernel.
//
// Everything that the CPU backend computes in one order is computed here in any order with the same result: maxima of
// (value, token), counts, and sums of probabilities as fixed-point integers. The exponential is the CPU backend's, bit for
// bit.
#pragma once
#include "prelude.cuh"

// Threads of every block here; each has four neighbouring logits of a chunk.
constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 CHUNK = 4 * THREADS;
// Distances from the highest logit are sorted into bins: LINEAR_BINS of one width over the distances that occur, at most
// LINEAR_NATS, then 16 for each doubling.
constexpr u32 BINS = 1024;
constexpr u32 LINEAR_BINS = 768;
constexpr float LINEAR_NATS = 24.0f;
// Candidates near a threshold that are sorted.
constexpr u32 LIST = 4096;
// Tokens that a slot may name.
constexpr u32 MAX_NAMED = 128;
constexpr u32 NONE = 0xffffffffu;
// Of a probability of 1: 2^43 times 2^20 tokens fit 64 bits.
constexpr float MASS_ONE = 8796093022208.0f;
constexpr float MINUS_INFINITY = __builtin_bit_cast(float, 0xff800000u);

// Which parts of `Slot` a row has to look at.
constexpr u32 HAS_BIAS = 1, HAS_STOPS = 2, HAS_PENALTIES = 4, IS_RANDOM = 8, HAS_FILTERS = 16, HAS_LOGPROBS = 32;

// Sampling parameters of a sequence; `SlotHeader` in `kernels/sampler.rs`.
struct Slot {
    u64 seed;
    float temperature;
    float floor; // natural logarithm of min-p; minus infinity is off
    float top_p;
    u32 top_k;
    float repetition;
    float presence;
    float frequency;
    u32 flags;
    u32 generated;
    u32 min_tokens;
    u32 num_named; // tokens whose log-probabilities are reported in place of the most likely ones
    u32 unused;
};

// The search for the candidates of a row: to draw one (job 0), or to report the most likely (job 1). What is gathered is zero
// between steps.
struct Job {
    u64 total;     // mass of all
    u64 sure_mass; // mass before the listed bins
    u64 drawn;     // best score of those before the listed bins
    float highest;
    float nats;    // that the linear bins cover
    u32 first_bin; // bins that are listed
    u32 last_bin;  // OVERFLOW: too many
    u32 limit;     // how many of the list are left by top-k; NONE: all
    u32 list_length;
    u32 blocks_done;
    u32 unused;
};
constexpr u32 OVERFLOW = 0x80000000u;

// What the blocks of a row gather. Zero between steps but for `fallback`.
struct Row {
    Job jobs[2];
    u64 best;    // adjusted
    u64 drawn;   // without filters
    u32 highest; // of the whole head
    u32 depth;   // complement of the lowest adjusted
    u32 blocks_done;
    u32 fallback; // the token with the highest logit
};

// Log-probabilities of a row; `Detail` in `kernels/sampler.rs`.
struct Detail {
    float chosen;
    u32 chosen_rank;
    float target;
    u32 target_rank;
    u32 num_alternatives;
    u32 unused[3];
};
struct Alternative {
    u32 token;
    float logprob;
    u32 rank;
};

// The best of one rank's share of a row, as keys of `ranked`; 0 is none.
struct Candidate {
    u64 best;   // adjusted
    u64 drawn;  // for random rows
    u64 masked; // of what the mask allows, and of all: looked for only if nothing is left after adjusting
    u64 raw;
};

struct SampleParams {
    const float* logits;
    const u32* sample_slots;
    const u32* mask_rows;
    const u32* masks;
    const u32* targets;
    Slot* slots;
    u32* last_tokens;
    const float* bias;
    const u32* stops;
    u16* history;
    Row* rows;
    u32* active; // [rows][2]: jobs of this step
    u32* bins;   // [rows][2][BINS][2]
    u64* lists;  // [rows][2][LIST]
    u32* tokens;
    Detail* details;
    Alternative* alternatives;
    Candidate* candidates; // [num_rows] of this rank, or [world][candidate_rows] of all
    const u32* named; // [num_slots][MAX_NAMED]
    u32 num_rows;
    u32 num_slots;
    u32 vocab;
    u32 columns;
    u32 stride;     // of bias, stops and history, in tokens
    u32 mask_words;
    u32 num_chunks; // of a row of `columns`
    u32 chunks_per_block;
    u32 max_alternatives;
    u32 first_token; // of the columns: not 0 for a rank's share
    u32 world;
    u32 candidate_rows;
};
PARAMS(SampleParams);

// ---- orders: integers that compare as floats do

// As `f32::total_cmp`.
__device__ __forceinline__ u32 order(float value) {
    const u32 bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_order(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
// Falling values, ties by rising token: the larger key comes first. Never 0.
__device__ __forceinline__ u64 ranked(float value, u32 token) { return u64(order(value)) << 32 | u32(~token); }
// As `ranked`, but zeros of both signs are equal, as `>` sees them.
__device__ __forceinline__ u64 ranked_equal_zeros(float value, u32 token) { return ranked(value + 0.0f, token); }
__device__ __forceinline__ u32 token_of(u64 key) { return ~u32(key); }
__device__ __forceinline__ float value_of(u64 key) { return from_order(u32(key >> 32)); }

// ---- the CPU backend's exponential (`crates/cpu/src/math.rs`) and generator (`crates/cpu/src/philox.rs`)

__device__ __forceinline__ float cpu_exp(float x) {
    constexpr float MAGIC = 12582912.0f;
    const float bounded = fminf(fmaxf(x, -87.0f), 88.0f);
    const float shifted = __fmaf_rn(bounded, 1.44269504088896340736f, MAGIC);
    const float n = __fsub_rn(shifted, MAGIC);
    const float r = __fmaf_rn(n, 2.1219444e-4f, __fmaf_rn(n, -0.6933594f, bounded));
    float p = 1.0f / 5040.0f;
    p = __fmaf_rn(p, r, 1.0f / 720.0f);
    p = __fmaf_rn(p, r, 1.0f / 120.0f);
    p = __fmaf_rn(p, r, 1.0f / 24.0f);
    p = __fmaf_rn(p, r, 1.0f / 6.0f);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fmaf_rn(p, r, 1.0f);
    p = __fmaf_rn(p, r, 1.0f);
    const float scaled = __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
    return x < -87.0f ? 0.0f : scaled;
}

// `exp(-distance)` as a fixed-point number.
__device__ __forceinline__ u64 mass(float logit, float highest) {
    return __float2ull_rn(cpu_exp(__fsub_rn(logit, highest)) * MASS_ONE);
}

__device__ __forceinline__ uint4 philox(u32 block, u32 index, u64 seed) {
    uint4 c = make_uint4(block, index, 0, 0);
    u32 k0 = u32(seed), k1 = u32(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        c = make_uint4(__umulhi(c.z, 0xcd9e8d57u) ^ c.y ^ k0, c.z * 0xcd9e8d57u,
                       __umulhi(c.x, 0xd2511f53u) ^ c.w ^ k1, c.x * 0xd2511f53u);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c;
}

// A word as a number in (0, 1].
__device__ __forceinline__ float unit(u32 word) {
    return __fmaf_rn(__uint2float_rn(word), 1.0f / 4294967296.0f, 1.0f / 8589934592.0f);
}
// `logit - ln(e)`, e exponentially distributed: the highest of the candidates is drawn.
__device__ __forceinline__ float score(float logit, u32 word) { return __fsub_rn(logit, logf(-log1pf(-unit(word)))); }
// Not under the score, and quick: e is not under the word's number.
__device__ __forceinline__ float most_score(float logit, u32 word) { return logit - __logf(unit(word)) + 1e-3f; }
// No candidate gains more: the least e is 2^-33.
constexpr float MOST_GAIN = 23.0f;

// ---- reductions over the block

__device__ __forceinline__ u64 warp_max(u64 key) {
    const u32 high = __reduce_max_sync(0xffffffffu, u32(key >> 32));
    const u32 low = __reduce_max_sync(0xffffffffu, u32(key >> 32) == high ? u32(key) : 0u);
    return u64(high) << 32 | low;
}
__device__ __forceinline__ u64 warp_sum(u64 value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}
// The highest key of the block, in every thread.
__device__ __forceinline__ u64 block_max(u64 key) {
    __shared__ u64 partial[WARPS];
    key = warp_max(key);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = key;
    __syncthreads();
    key = warp_max(partial[threadIdx.x % WARPS]);
    __syncthreads();
    return key;
}
// The sum over the block, in every thread.
__device__ __forceinline__ u64 block_total(u64 value) {
    __shared__ u64 partial[WARPS];
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_sum(threadIdx.x % 32 < WARPS ? partial[threadIdx.x % 32] : 0);
    __syncthreads();
    return value;
}
// The sum over the threads before this one.
template <typename T> __device__ __forceinline__ T block_sum_before(T value) {
    __shared__ T partial[WARPS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T sum = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const T other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    if (lane == 31) partial[warp] = sum;
    __syncthreads();
    T before = sum - value;
    for (u32 i = 0; i < warp; i++) before += partial[i];
    __syncthreads();
    return before;
}

// Whether all other blocks that count here are done; what they wrote is then visible. The counter is zero again.
__device__ __forceinline__ bool is_last_block(u32* counter, u32 num_blocks) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        // The barrier and the fence of one thread order what all threads of the block wrote.
        __threadfence();
        is_last = atomicAdd(counter, 1) == num_blocks - 1;
        if (is_last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

// ---- a row of logits

// How a row is read: as it is, or as its slot's parameters change it. Absent parts are null.
struct Source {
    const float* logits;
    const float* bias;
    const u32* stops;
    const u16* history;
    const u32* mask;
    float repetition, presence, frequency, temperature, reciprocal;
    u32 vocab, begin, columns; // tokens from `begin` to `columns` are here
    bool is_aligned;
};

__device__ __forceinline__ Source raw_source(const SampleParams& p, u32 row) {
    Source s = {};
    s.logits = p.logits + u64(row) * p.columns - p.first_token;
    s.vocab = p.vocab;
    s.begin = p.first_token;
    s.columns = p.first_token + p.columns;
    s.is_aligned = (p.first_token | p.columns) % 4 == 0;
    return s;
}

__device__ __forceinline__ Source slot_source(const SampleParams& p, u32 row, u32 index, const Slot& slot) {
    Source s = raw_source(p, row);
    const u64 offset = u64(index) * p.stride;
    if (slot.flags & HAS_BIAS) s.bias = p.bias + offset;
    if (slot.flags & HAS_STOPS && slot.generated < slot.min_tokens) s.stops = p.stops + offset / 32;
    if (slot.flags & HAS_PENALTIES) s.history = p.history + offset;
    const u32 mask = p.mask_rows[row];
    if (mask != NONE) s.mask = p.masks + u64(mask) * p.mask_words;
    s.repetition = slot.repetition;
    s.presence = slot.presence;
    s.frequency = slot.frequency;
    s.temperature = slot.flags & IS_RANDOM ? slot.temperature : 1.0f;
    s.reciprocal = __fdiv_rn(1.0f, s.temperature);
    return s;
}

// Four logits from `token` on (a multiple of 4), padding of the head included; minus infinity for what is not here.
__device__ __forceinline__ void load_raw(const Source& s, u32 token, float (&x)[4]) {
    if (s.is_aligned) {
        float4 v = make_float4(MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY);
        if (token < s.columns) v = *reinterpret_cast<const float4*>(s.logits + token);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            x[i] = token + i >= s.begin && token + i < s.columns ? s.logits[token + i] : MINUS_INFINITY;
    }
}

// Logit bias, minimum length, penalties and mask; no NaN, and minus infinity for what is no token.
__device__ __forceinline__ void adjust(const Source& s, u32 token, float (&x)[4]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        if (token + i >= s.vocab || x[i] != x[i]) x[i] = MINUS_INFINITY;
    if (token >= s.vocab) return;
    if (s.bias) {
        const float4 bias = *reinterpret_cast<const float4*>(s.bias + token);
        x[0] += bias.x, x[1] += bias.y, x[2] += bias.z, x[3] += bias.w;
    }
    if (s.stops) {
        const u32 stops = s.stops[token / 32] >> token % 32;
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (stops >> i & 1) x[i] = MINUS_INFINITY;
    }
    if (s.history) {
        const uint2 words = *reinterpret_cast<const uint2*>(s.history + token);
        const u32 seen[4] = {words.x & 0xffff, words.x >> 16, words.y & 0xffff, words.y >> 16};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            // Bit 15: in the prompt; below: how often in the output.
            const u32 count = seen[i] & 0x7fff;
            if (seen[i]) x[i] = x[i] > 0.0f ? __fdiv_rn(x[i], s.repetition) : __fmul_rn(x[i], s.repetition);
            if (count) x[i] = __fsub_rn(x[i], __fadd_rn(__fmul_rn(float(count), s.frequency), s.presence));
        }
    }
    if (s.mask) {
        const u32 allowed = s.mask[token / 32] >> token % 32;
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (!(allowed >> i & 1)) x[i] = MINUS_INFINITY;
    }
}

// Divided by the temperature, rounded correctly: the quotient with the rounded reciprocal is one unit off at most, and one step
// with its remainder makes it exact (Markstein), but for divisors of all ones.
__device__ __forceinline__ void divide(const Source& s, float (&x)[4]) {
    const bool is_exact = (__float_as_uint(s.temperature) & 0x7fffff) != 0x7fffff;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const float quotient = __fmul_rn(x[i], s.reciprocal);
        const float better = __fmaf_rn(__fmaf_rn(-quotient, s.temperature, x[i]), s.reciprocal, quotient);
        const bool is_normal = fabsf(quotient) < 1e30f && fabsf(quotient) > 1e-20f;
        x[i] = is_normal && is_exact ? better : __fdiv_rn(x[i], s.temperature);
    }
}

// As they are drawn from: adjusted and divided.
__device__ __forceinline__ void scale(const Source& s, u32 token, float (&x)[4]) {
    adjust(s, token, x);
    if (s.temperature != 1.0f) divide(s, x);
}

// The best score so far: a thread's, and what another candidate must reach to matter to the warp.
struct Drawn {
    u64 best;
    float least;
};

// Draws among four candidates from `token` on; a logit of minus infinity is none. All threads of a warp.
__device__ __forceinline__ void draw(Drawn& drawn, const float (&x)[4], u32 token, const Slot& slot) {
    const float most = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    if (most > MINUS_INFINITY && most + MOST_GAIN >= drawn.least) {
        const uint4 random = philox(token / 4, slot.generated, slot.seed);
        const u32 words[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (x[i] > MINUS_INFINITY && most_score(x[i], words[i]) >= drawn.least) {
                const u64 candidate = ranked(score(x[i], words[i]), token + i);
                drawn.best = candidate > drawn.best ? candidate : drawn.best;
            }
        }
    }
    __syncwarp();
    const u32 best = __reduce_max_sync(0xffffffffu, u32(drawn.best >> 32));
    if (best) drawn.least = from_order(best);
}

// The bin of a distance from the highest logit.
__device__ __forceinline__ u32 bin_of(float distance, float nats, float bins_per_nat) {
    if (distance < nats) return u32(distance * bins_per_nat);
    const u32 beyond = (__float_as_uint(distance) >> 19) - (__float_as_uint(nats) >> 19);
    return min(LINEAR_BINS + beyond, BINS - 1);
}

// The slot's next token: output, last token and history. `slot` is as it was before. One thread.
__device__ __forceinline__ void commit(const SampleParams& p, u32 row, u32 index, const Slot& slot, u32 token) {
    p.tokens[row] = token;
    p.last_tokens[index] = token;
    p.slots[index].generated = slot.generated + 1;
    if (slot.flags & HAS_PENALTIES) {
        u16& seen = p.history[u64(index) * p.stride + token];
        if ((seen & 0x7fff) != 0x7fff) seen += 1;
    }
}
