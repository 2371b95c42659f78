// sample: from rows of logits to tokens and log-probabilities, as `crates/cpu/src/sampler.rs` does it for each row.
//
// Four launches with the whole grid between them, because what is kept depends on all logits of a row:
//   sample_scan    the highest logit: greedy rows and rows that draw among all tokens are done. Which path a row takes is
//                  data of its slot, so that a recorded step serves every mix.
//   sample_bins    for top-k, top-p, min-p and log-probabilities: how many candidates and how much mass lie at which
//                  distance from the highest; from that the bins in which the thresholds lie.
//   sample_list    candidates before those bins are drawn from at once; those inside are listed.
//   sample_select  lists are sorted and cut exactly, one block a row.
// Where each rank of a group has the logits of a share of the tokens, and no row of the step has filters or log-probabilities,
// two other launches do it, with an exchange of 32 bytes a row between them instead of all logits:
//   sample_share   as sample_scan; the best of the share are left as candidates.
//   sample_choose  the best of all ranks' candidates.
// A row of either kind is a job; the other launches go through the jobs with a fixed grid and end at once without any. They let
// their successor come before they wait, so that those that have nothing to do cost little.
//
// Shapes  logits [num_rows, columns >= vocab] f32; a slot's bias f32, stops (bits) and history u16 [stride].
// Bytes   4 * num_rows * columns, once for plain rows and three times for others, mostly from the L2 cache.
// Bound   memory bandwidth with many rows, latency with few.
#include "sample_slow.cuh"

// ---- sample_scan

// What a row falls back to when nothing is allowed: the highest under the mask, else the model's own choice.
struct Fallback {
    u64 masked, raw;
    __device__ __forceinline__ u32 token() const { return masked ? token_of(masked) : raw ? token_of(raw) : 0; }
};
// All threads.
__device__ __noinline__ Fallback unconstrained_argmax(const Source& s) {
    u64 masked = 0, raw = 0;
    for (u32 token = s.begin / 4 * 4 + 4 * threadIdx.x; token < min(s.vocab, s.columns); token += CHUNK) {
        float x[4];
        load_raw(s, token, x);
        for (u32 i = 0; i < 4; i++) {
            if (token + i >= s.vocab || !(x[i] > MINUS_INFINITY)) continue;
            const u64 key = ranked_equal_zeros(x[i], token + i);
            raw = key > raw ? key : raw;
            if (!s.mask || s.mask[token / 32] >> (token % 32 + i) & 1) masked = key > masked ? key : masked;
        }
    }
    return Fallback{block_max(masked), block_max(raw)};
}

// The highest logit of a part of a row that nothing changes. `early` is what the thread loaded before it knew the row's slot,
// if `has_early`.
__device__ __forceinline__ u64 plain_argmax(const Source& s, u32 first, u32 end, const float4& early, bool has_early) {
    constexpr u32 AHEAD = 4;
    float highest = MINUS_INFINITY;
    u32 best = 0;
    end = min(end, s.vocab);
    for (u32 token = first + 4 * threadIdx.x; token < end; token += AHEAD * CHUNK) {
        float x[AHEAD][4];
#pragma unroll
        for (u32 j = 0; j < AHEAD; j++) {
            if (j == 0 && has_early) x[j][0] = early.x, x[j][1] = early.y, x[j][2] = early.z, x[j][3] = early.w;
            else load_raw(s, token + j * CHUNK < end ? token + j * CHUNK : s.columns, x[j]);
        }
#pragma unroll
        for (u32 j = 0; j < AHEAD; j++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 other = token + j * CHUNK + i;
                if (x[j][i] > highest && other < end) highest = x[j][i], best = other;
            }
        }
        has_early = false;
    }
    return highest > MINUS_INFINITY ? ranked_equal_zeros(highest, best) : 0;
}

// What the last block of a row knows: the token, or the jobs that will find it; of a share the candidates. All threads.
template <bool IS_SHARE>
__device__ __forceinline__ void finish_scan(const SampleParams& p, u32 row, u32 index, const Slot& slot,
                                            const Source& s, bool wants_head) {
    __shared__ u64 gathered[2];
    Row& sums = p.rows[row];
    u32 depth = 0;
    if (threadIdx.x == 0) {
        gathered[0] = atomicExch(&sums.best, 0ull);
        gathered[1] = atomicExch(&sums.drawn, 0ull);
        const u32 highest = atomicExch(&sums.highest, 0u);
        sums.jobs[1].highest = highest ? from_order(highest) : MINUS_INFINITY;
        sums.jobs[1].nats = LINEAR_NATS;
        depth = atomicExch(&sums.depth, 0u);
    }
    __syncthreads();
    const u64 best = gathered[0];
    if (IS_SHARE) {
        Fallback fallback = {0, 0};
        if (!best) fallback = unconstrained_argmax(s);
        if (threadIdx.x == 0) p.candidates[row] = Candidate{best, gathered[1], fallback.masked, fallback.raw};
        return;
    }
    const bool is_filtered = index != NONE && best && slot.flags & HAS_FILTERS;
    u32 token = best ? token_of(best) : 0;
    if (index != NONE && !best) token = unconstrained_argmax(s).token();
    if (threadIdx.x != 0) return;
    if (is_filtered) {
        const float highest = __fdiv_rn(value_of(best), slot.temperature);
        const float lowest = fmaxf(__fdiv_rn(from_order(~depth), slot.temperature), highest + slot.floor);
        sums.jobs[0].highest = highest;
        sums.jobs[0].nats = fminf(fmaxf(highest - lowest, 1e-6f), LINEAR_NATS);
        sums.fallback = token;
    } else if (index != NONE) {
        if (best && gathered[1]) token = token_of(gathered[1]);
        commit(p, row, index, slot, token);
    } else {
        p.tokens[row] = NONE;
    }
    p.active[2 * row] = is_filtered;
    p.active[2 * row + 1] = wants_head;
}

// Grid: (blocks of a row, rows).
template <bool IS_SHARE> __device__ __forceinline__ void scan(const SampleParams& p) {
    wait_for_predecessor();
    allow_successor();
    const u32 row = blockIdx.y;
    // Four tokens of a thread start at a multiple of four: where a share does not, the first are not here.
    const u32 begin = IS_SHARE ? p.first_token : 0;
    const u32 first = begin / 4 * 4 + blockIdx.x * p.chunks_per_block * CHUNK;
    const u32 end = min(first + p.chunks_per_block * CHUNK, begin + p.columns);
    // With few rows latency counts: the logits need not wait for the slot.
    const bool has_early = p.chunks_per_block == 1 && (begin | p.columns) % 4 == 0;
    float4 early = make_float4(MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY);
    if (has_early && first + 4 * threadIdx.x < end)
        early = *reinterpret_cast<const float4*>(p.logits + u64(row) * p.columns + first - begin + 4 * threadIdx.x);
    const u32 wanted = p.sample_slots[row];
    const u32 index = wanted < p.num_slots ? wanted : NONE;
    const bool has_target = !IS_SHARE && p.targets[row] < p.vocab;
    if (index == NONE && !has_target) {
        if (!IS_SHARE && blockIdx.x == 0 && threadIdx.x == 0) {
            p.tokens[row] = NONE;
            p.active[2 * row] = p.active[2 * row + 1] = 0;
        }
        return;
    }
    Slot slot = {};
    Source s = raw_source(p, row);
    if (index != NONE) {
        slot = p.slots[index];
        s = slot_source(p, row, index, slot);
    }
    const bool wants_head = !IS_SHARE && (has_target || slot.flags & HAS_LOGPROBS);
    Row& sums = p.rows[row];
    u64 best = 0;
    if (!(s.bias || s.stops || s.history || s.mask || slot.flags & IS_RANDOM || wants_head)) {
        best = plain_argmax(s, first, end, early, has_early);
    } else {
        Drawn drawn = {0, MINUS_INFINITY};
        float highest = MINUS_INFINITY, lowest = -MINUS_INFINITY, head = MINUS_INFINITY;
        u32 highest_token = 0;
        const bool draws = slot.flags & IS_RANDOM && !(slot.flags & HAS_FILTERS);
        float next[4];
        load_raw(s, first + 4 * threadIdx.x, next);
        for (u32 chunk = first; chunk < end; chunk += CHUNK) {
            const u32 token = chunk + 4 * threadIdx.x;
            float x[4] = {next[0], next[1], next[2], next[3]};
            load_raw(s, token + CHUNK, next);
            if (wants_head) {
#pragma unroll
                for (u32 i = 0; i < 4; i++)
                    if (x[i] > head) head = x[i];
            }
            if (index == NONE) continue;
            adjust(s, token, x);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                if (x[i] > highest) highest = x[i], highest_token = token + i;
                if (x[i] > MINUS_INFINITY) lowest = fminf(lowest, x[i]);
            }
            if (draws) {
                if (s.temperature != 1.0f) divide(s, x);
                draw(drawn, x, token, slot);
            }
        }
        if (highest > MINUS_INFINITY) best = ranked_equal_zeros(highest, highest_token);
        const u64 score = block_max(drawn.best);
        const u64 heads = block_max(head > MINUS_INFINITY ? order(head) : 0);
        const u64 depth = block_max(highest > MINUS_INFINITY ? u32(~order(lowest)) : 0);
        if (threadIdx.x == 0) {
            if (score) atomicMax(&sums.drawn, score);
            if (heads) atomicMax(&sums.highest, u32(heads));
            if (depth && slot.flags & HAS_FILTERS) atomicMax(&sums.depth, u32(depth));
        }
    }
    best = block_max(best);
    if (threadIdx.x == 0 && best) atomicMax(&sums.best, best);
    if (is_last_block(&sums.blocks_done, gridDim.x)) finish_scan<IS_SHARE>(p, row, index, slot, s, wants_head);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) sample_scan(const SampleParams p) { scan<false>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) sample_share(const SampleParams p) { scan<true>(p); }

// One thread a row: the candidates of all ranks are few.
extern "C" __global__ void __launch_bounds__(128) sample_choose(const SampleParams p) {
    wait_for_predecessor();
    allow_successor();
    const u32 row = blockIdx.x * 128 + threadIdx.x;
    if (row >= p.num_rows) return;
    const u32 index = p.sample_slots[row];
    if (index >= p.num_slots) {
        p.tokens[row] = NONE;
        return;
    }
    Candidate all = {0, 0, 0, 0};
    for (u32 rank = 0; rank < p.world; rank++) {
        const Candidate& other = p.candidates[u64(rank) * p.candidate_rows + row];
        all.best = max(all.best, other.best);
        all.drawn = max(all.drawn, other.drawn);
        all.masked = max(all.masked, other.masked);
        all.raw = max(all.raw, other.raw);
    }
    u32 token = Fallback{all.masked, all.raw}.token();
    if (all.best) token = token_of(all.drawn ? all.drawn : all.best);
    commit(p, row, index, p.slots[index], token);
}

// ---- jobs

// A job of this step: which row, and whether for log-probabilities.
struct Place {
    u32 row;
    bool is_head;
    u32 index; // slot; NONE if log-probabilities are wanted of the prompt alone
    const Slot* slot; // null without
    Source source;
    Job* job;
    u32* bins;
    u64* list;
};

// Numbers of the jobs of this step in `jobs`; how many. All threads; up to THREADS jobs.
__device__ __forceinline__ u32 list_jobs(const SampleParams& p, u16 (&jobs)[THREADS]) {
    const bool is_active = threadIdx.x < 2 * p.num_rows && p.active[threadIdx.x];
    const u32 before = block_sum_before(u32(is_active));
    if (is_active) jobs[before] = u16(threadIdx.x);
    return u32(block_total(is_active));
}

__device__ __forceinline__ Place find_job(const SampleParams& p, u32 number) {
    Place place;
    place.row = number / 2;
    place.is_head = number % 2;
    const u32 wanted = p.sample_slots[place.row];
    place.index = wanted < p.num_slots ? wanted : NONE;
    place.slot = place.index != NONE ? p.slots + place.index : nullptr;
    place.source = place.is_head ? raw_source(p, place.row) : slot_source(p, place.row, place.index, *place.slot);
    place.job = &p.rows[place.row].jobs[number % 2];
    place.bins = p.bins + u64(number) * 2 * BINS;
    place.list = p.lists + u64(number) * LIST;
    return place;
}

// Logits from `token` on, adjusted (job 0) or raw (job 1), as the job sees them; and which of them are candidates.
__device__ __forceinline__ void find_candidates(const Place& place, float floor, u32 token, float (&x)[4],
                                                bool (&is_candidate)[4]) {
    if (place.is_head) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) is_candidate[i] = token + i < place.source.vocab;
    } else {
        if (place.source.temperature != 1.0f) divide(place.source, x);
#pragma unroll
        for (u32 i = 0; i < 4; i++) is_candidate[i] = x[i] > MINUS_INFINITY && x[i] >= floor;
    }
}

// The least logit of a candidate: min-p.
__device__ __forceinline__ float floor_of(const Place& place, float highest) {
    return place.is_head ? MINUS_INFINITY : __fadd_rn(highest, place.slot->floor);
}

// ---- sample_bins

// Bins of the thresholds, from how many candidates are in each bin. Two neighbouring bins a thread. Upper and lower bounds
// of the mass of a bin: `exp(-x)` lies between `1 - x` and `1 - x + x^2 / 2`, x at most the width of a bin (1/32).
__device__ __forceinline__ void finish_bins(const SampleParams& p, const Place& place) {
    __shared__ u32 found[3];
    const u32 bin = 2 * threadIdx.x;
    const float nats = place.job->nats, width = nats / LINEAR_BINS;
    u32 count[2];
    float lower[2], upper[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        count[i] = __ldcg(place.bins + 2 * (bin + i));
        const float inside = float(__ldcg(place.bins + 2 * (bin + i) + 1)) * (width / 1024.0f);
        const bool is_linear = bin + i < LINEAR_BINS;
        const float scale = expf(-float(bin + i) * width);
        lower[i] = is_linear ? scale * (float(count[i]) - inside) : 0.0f;
        const float slack = width * (0.5f * width + 1.0f / 512.0f);
        upper[i] = is_linear ? lower[i] + scale * float(count[i]) * slack : float(count[i]) * expf(-nats);
        place.bins[2 * (bin + i)] = 0;
        place.bins[2 * (bin + i) + 1] = 0;
    }
    if (threadIdx.x < 3) found[threadIdx.x] = BINS - 1;
    const u32 counts = block_sum_before(count[0] + count[1]);
    const float lowers = block_sum_before(lower[0] + lower[1]);
    const float uppers = block_sum_before(upper[0] + upper[1]);
    const u32 num_candidates = u32(block_total(count[0] + count[1]));
    const u32 top_k = min(place.is_head ? max(p.max_alternatives, 1u) : place.slot->top_k, num_candidates);
    const float top_p = place.is_head ? 1.0f : place.slot->top_p;
    const bool has_top_k = top_k > 0;
    const bool has_top_p = top_p < 1.0f;
    const float target = top_p * (float(__ldcg(&place.job->total)) * (1.0f / MASS_ONE));
    u32 c = counts;
    float l = lowers, u = uppers;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        c += count[i], l += lower[i], u += upper[i];
        if (c >= top_k) atomicMin(&found[0], bin + i);
        if (u >= target * 0.9999f) atomicMin(&found[1], bin + i);
        if (l >= target * 1.0001f) atomicMin(&found[2], bin + i);
    }
    __syncthreads();
    u32 first = BINS, last = BINS; // all are sure
    if (has_top_k) {
        first = place.is_head || has_top_p ? 0 : found[0];
        last = found[0];
    } else if (has_top_p) {
        first = min(found[1], found[2]);
        last = found[2];
    }
    // Candidates in the bins before the listed ones, and up to the last listed one.
    __shared__ u32 before[2];
    if (threadIdx.x < 2) before[threadIdx.x] = num_candidates;
    __syncthreads();
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        if (bin + i == first) before[0] = counts + (i ? count[0] : 0);
        if (bin + i == last) before[1] = counts + count[0] + (i ? count[1] : 0);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        Job& job = *place.job;
        const bool is_overflow = before[1] - before[0] > LIST;
        job.first_bin = is_overflow ? 0 : first;
        job.last_bin = is_overflow ? OVERFLOW : last;
        job.limit = has_top_k && first < BINS ? top_k - min(top_k, before[0]) : NONE;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) sample_bins(const SampleParams p) {
    __shared__ u16 jobs[THREADS];
    __shared__ u32 bins[BINS][2];
    allow_successor();
    wait_for_predecessor();
    const u32 num_blocks = (p.num_chunks + p.chunks_per_block - 1) / p.chunks_per_block;
    const u32 num_items = list_jobs(p, jobs) * num_blocks;
    for (u32 item = blockIdx.x; item < num_items; item += gridDim.x) {
        __syncthreads();
        const Place place = find_job(p, jobs[item / num_blocks]);
        for (u32 i = threadIdx.x; i < 2 * BINS; i += THREADS) (&bins[0][0])[i] = 0;
        const float highest = place.job->highest, floor = floor_of(place, highest);
        const float nats = place.job->nats, bins_per_nat = LINEAR_BINS / nats;
        // With top-k what counts is the mass of the top k, which are listed.
        const bool has_mass = place.is_head || (place.slot->top_p < 1.0f && place.slot->top_k == 0);
        const u32 first = item % num_blocks * p.chunks_per_block * CHUNK;
        const u32 end = min(first + p.chunks_per_block * CHUNK, p.columns);
        u64 total = 0;
        float next[4];
        load_raw(place.source, first + 4 * threadIdx.x, next);
        __syncthreads();
        for (u32 chunk = first; chunk < end; chunk += CHUNK) {
            const u32 token = chunk + 4 * threadIdx.x;
            float x[4] = {next[0], next[1], next[2], next[3]};
            load_raw(place.source, token + CHUNK, next);
            if (!place.is_head) adjust(place.source, token, x);
            bool is_candidate[4];
            find_candidates(place, floor, token, x, is_candidate);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                // Padding of the head counts in the sum, and nowhere else.
                if (has_mass && (is_candidate[i] || place.is_head) && x[i] > MINUS_INFINITY) total += mass(x[i], highest);
                if (!is_candidate[i]) continue;
                const float distance = __fsub_rn(highest, x[i]);
                const u32 bin = bin_of(distance, nats, bins_per_nat);
                atomicAdd(&bins[bin][0], 1u);
                if (has_mass && !place.is_head && bin < LINEAR_BINS)
                    atomicAdd(&bins[bin][1], u32((distance * bins_per_nat - float(bin)) * 1024.0f) + 1);
            }
        }
        total = block_total(total);
        for (u32 i = threadIdx.x; i < 2 * BINS; i += THREADS) {
            const u32 value = (&bins[0][0])[i];
            if (value) atomicAdd(place.bins + i, value);
        }
        if (threadIdx.x == 0 && total) atomicAdd(&place.job->total, total);
        if (is_last_block(&place.job->blocks_done, num_blocks)) finish_bins(p, place);
    }
}

// ---- sample_list

extern "C" __global__ void __launch_bounds__(THREADS, 2) sample_list(const SampleParams p) {
    __shared__ u16 jobs[THREADS];
    allow_successor();
    wait_for_predecessor();
    const u32 num_blocks = (p.num_chunks + p.chunks_per_block - 1) / p.chunks_per_block;
    const u32 num_items = list_jobs(p, jobs) * num_blocks;
    for (u32 item = blockIdx.x; item < num_items; item += gridDim.x) {
        __syncthreads();
        const Place place = find_job(p, jobs[item / num_blocks]);
        const Job& job = *place.job;
        const float highest = job.highest, floor = floor_of(place, highest);
        const float nats = job.nats, bins_per_nat = LINEAR_BINS / nats;
        const u32 first_bin = job.first_bin, last_bin = job.last_bin;
        if (last_bin == OVERFLOW) continue;
        const bool has_mass = !place.is_head && place.slot->top_p < 1.0f;
        const u32 first = item % num_blocks * p.chunks_per_block * CHUNK;
        const u32 end = min(first + p.chunks_per_block * CHUNK, p.columns);
        // Most logits are far below what is drawn from or listed: a product instead of the division is enough to see that. A bin and
        // a few units of the last place are left for its rounding.
        const float slack = nats / LINEAR_BINS + 1e-6f * (fabsf(highest) + nats);
        const float edge =
            last_bin < LINEAR_BINS ? highest - float(last_bin + 1) * (nats / LINEAR_BINS) : MINUS_INFINITY;
        const float least = fmaxf(edge, floor) - slack;
        const float reciprocal = place.is_head ? 1.0f : place.source.reciprocal;
        u64 sure_mass = 0;
        Drawn drawn = {0, MINUS_INFINITY};
        float next[4];
        load_raw(place.source, first + 4 * threadIdx.x, next);
        for (u32 chunk = first; chunk < end; chunk += CHUNK) {
            const u32 token = chunk + 4 * threadIdx.x;
            float x[4] = {next[0], next[1], next[2], next[3]};
            load_raw(place.source, token + CHUNK, next);
            if (!place.is_head) adjust(place.source, token, x);
            // A head's NaN comes first, as in the CPU's total order.
            const bool is_near = !(x[0] * reciprocal < least) || !(x[1] * reciprocal < least) ||
                                 !(x[2] * reciprocal < least) || !(x[3] * reciprocal < least);
            if (!__any_sync(0xffffffffu, is_near)) continue;
            bool is_candidate[4];
            find_candidates(place, floor, token, x, is_candidate);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 bin = is_candidate[i] ? bin_of(__fsub_rn(highest, x[i]), nats, bins_per_nat) : NONE;
                if (bin >= first_bin && bin <= last_bin)
                    place.list[atomicAdd(&place.job->list_length, 1u)] = ranked(x[i], token + i);
                if (bin >= first_bin) x[i] = MINUS_INFINITY;
                else if (has_mass) sure_mass += mass(x[i], highest);
            }
            if (first_bin > 0 && !place.is_head) draw(drawn, x, token, *place.slot);
        }
        if (place.is_head || first_bin == 0) continue;
        sure_mass = block_total(sure_mass);
        const u64 best = block_max(drawn.best);
        if (threadIdx.x == 0) {
            if (sure_mass) atomicAdd(&place.job->sure_mass, sure_mass);
            if (best) atomicMax(&place.job->drawn, best);
        }
    }
}

// ---- sample_select

// How many of the `length` sorted candidates in `keys` are kept, by top-k (`limit`), then top-p. All threads.
__device__ __forceinline__ u32 cut(const u64* keys, u32 length, const Slot& slot, const Job& job) {
    __shared__ u32 kept;
    const bool has_limit = job.limit != NONE;
    length = has_limit ? min(length, job.limit) : length;
    if (slot.top_p >= 1.0f) return length;
    const u32 each = (length + THREADS - 1) / THREADS, first = threadIdx.x * each;
    const u32 end = min(first + each, length);
    u64 own = 0;
    for (u32 i = first; i < end; i++) own += mass(value_of(keys[i]), job.highest);
    u64 before = job.sure_mass + block_sum_before(own);
    // After top-k all that is left is in the list; without it all of the row counts.
    const u64 total = has_limit ? block_total(own) : job.total;
    const double target = double(slot.top_p) * double(total);
    if (threadIdx.x == 0) kept = length;
    __syncthreads();
    for (u32 i = first; i < end; i++) {
        before += mass(value_of(keys[i]), job.highest);
        if (double(before) >= target) {
            atomicMin(&kept, i + 1);
            break;
        }
    }
    __syncthreads();
    return kept;
}

// The best score among sorted candidates.
__device__ __forceinline__ u64 draw_listed(const u64* keys, u32 length, const Slot& slot) {
    u64 best = 0;
    for (u32 i = threadIdx.x; i < length; i += THREADS) {
        const u32 token = token_of(keys[i]);
        const uint4 words = philox(token / 4, slot.generated, slot.seed);
        const u32 word = token % 4 == 0 ? words.x : token % 4 == 1 ? words.y : token % 4 == 2 ? words.z : words.w;
        const u64 candidate = ranked(score(value_of(keys[i]), word), token);
        best = candidate > best ? candidate : best;
    }
    return best;
}

// The most likely tokens with their ranks, from sorted candidates.
__device__ __forceinline__ void report(const SampleParams& p, u32 row, const u64* keys, u32 length, float normalizer) {
    const u32 count = min(length, p.max_alternatives);
    Alternative* out = p.alternatives + u64(row) * p.max_alternatives;
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        const float logit = value_of(keys[i]);
        u32 rank = i + 1;
        // Ties share the better rank.
        while (rank > 1 && !(value_of(keys[rank - 2]) > logit)) rank--;
        out[i] = Alternative{token_of(keys[i]), __fsub_rn(logit, normalizer), rank};
    }
    if (threadIdx.x == 0) p.details[row].num_alternatives = count;
}

// Log-probabilities of the tokens that the row's slot names: floats where other rows have alternatives.
__device__ __forceinline__ void report_named(const SampleParams& p, const Place& place, float normalizer) {
    const u32* named = p.named + u64(place.index) * MAX_NAMED;
    float* out = reinterpret_cast<float*>(p.alternatives + u64(place.row) * p.max_alternatives);
    for (u32 i = threadIdx.x; i < place.slot->num_named; i += THREADS)
        out[i] = __fsub_rn(place.source.logits[named[i]], normalizer);
}

// Log-probability and rank of one token. The `length` sorted keys are the highest of the row: where the token is as high as
// one of them, all that are higher are there. All threads.
__device__ __forceinline__ void report_token(const Source& s, u32 token, float normalizer, const u64* keys, u32 length,
                                             float& logprob, u32& rank) {
    const float logit = s.logits[token];
    u32 higher = 0;
    if (length && logit >= value_of(keys[length - 1])) {
        for (u32 i = threadIdx.x; i < length; i += THREADS) higher += value_of(keys[i]) > logit;
    } else {
#pragma unroll 4
        for (u32 other = 4 * threadIdx.x; other < s.vocab; other += CHUNK) {
            float x[4];
            load_raw(s, other, x);
#pragma unroll
            for (u32 i = 0; i < 4; i++) higher += other + i < s.vocab && x[i] > logit;
        }
    }
    higher = u32(block_total(higher));
    if (threadIdx.x == 0) {
        logprob = __fsub_rn(logit, normalizer);
        rank = higher + 1;
    }
}

// The token of a filtered row. All threads; `token` is that of thread 0.
__device__ __forceinline__ u32 select_token(const SampleParams& p, const Place& place, u64 (&keys)[LIST]) {
    const Job& job = *place.job;
    u64 best = job.drawn;
    if (job.last_bin == OVERFLOW) {
        best = draw_slowly(place.source, *place.slot, job.highest, keys);
    } else if (job.list_length) {
        const u32 length = job.list_length;
        sort_list(place.list, keys, length);
        const u64 listed = draw_listed(keys, cut(keys, length, *place.slot, job), *place.slot);
        best = listed > best ? listed : best;
    }
    best = block_max(best);
    return best ? token_of(best) : p.rows[place.row].fallback;
}

// The gathered numbers of a job are zero for the next step. All threads have read them.
__device__ __forceinline__ void clear(Job& job) {
    __syncthreads();
    if (threadIdx.x == 0) {
        job.total = job.sure_mass = job.drawn = 0;
        job.list_length = 0;
    }
}

// One block a row.
extern "C" __global__ void __launch_bounds__(THREADS, 1) sample_select(const SampleParams p) {
    __shared__ u64 keys[LIST];
    allow_successor();
    wait_for_predecessor();
    const u32 row = blockIdx.x;
    const bool is_filtered = p.active[2 * row], wants_head = p.active[2 * row + 1];
    if (!is_filtered && !wants_head) return;
    u32 token = p.tokens[row];
    if (is_filtered) {
        const Place place = find_job(p, 2 * row);
        token = select_token(p, place, keys);
        if (threadIdx.x == 0) commit(p, row, place.index, *place.slot, token);
        clear(*place.job);
    }
    if (!wants_head) return;
    const Place place = find_job(p, 2 * row + 1);
    const Job& job = *place.job;
    const float normalizer = float(double(job.highest) + log(double(job.total) / double(MASS_ONE)));
    u32 length = job.list_length;
    if (job.last_bin == OVERFLOW) length = list_highest(place.source, keys, p.max_alternatives);
    else sort_list(place.list, keys, length);
    if (place.slot && place.slot->num_named) report_named(p, place, normalizer);
    else report(p, row, keys, length, normalizer);
    Detail& detail = p.details[row];
    if (place.slot && place.slot->flags & HAS_LOGPROBS)
        report_token(place.source, token, normalizer, keys, length, detail.chosen, detail.chosen_rank);
    const u32 target = p.targets[row];
    if (target < p.vocab)
        report_token(place.source, target, normalizer, keys, length, detail.target, detail.target_rank);
    clear(*place.job);
}
