// Put behind the text of a module whose functions with PTX have lost their bodies: what these instructions do, by their definition in
// the PTX ISA, threads as fibers, and a program that launches kernels as it reads from its input. The bodies that no kernel uses are
// not needed. A copy to shared memory arrives when its thread waits for it; until then there are numbers that would show.
#line 1 "after.h"

Place3 threadIdx, blockIdx, blockDim, gridDim;
// `extern __shared__` of the kernels.
alignas(128) char shared[101376];

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "emulation: %s (block %u, %u, thread %u)\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
    exit(1);
}

struct Copy {
    unsigned target, num_bytes;
    char bytes[16];
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    bool has_ended;
};

struct Meeting {
    unsigned arrived, round;
};

struct Buffer {
    std::vector<char> bytes;
    char* begin; // aligned
    size_t len;
};

// What the lanes of a warp bring to an instruction that they execute together.
struct Lanes {
    Meeting meeting;
    unsigned in[32][8];
    float d[32][4];
    unsigned exchanged[32];
};

static std::vector<Fiber> fibers;
static std::vector<Lanes> warps;
static Meeting block_meeting;
static std::vector<Buffer> buffers;
static ucontext_t scheduler;
static void (*kernel)(const void*);
static const void* kernel_params;

static void let_others_run() {
    const Place3 own = threadIdx;
    swapcontext(&fibers[own.x].context, &scheduler);
    threadIdx = own;
}

// Returns when `count` have come; the last one does `work` first.
template <typename Work> static void meet(Meeting& meeting, unsigned count, Work work) {
    const unsigned round = meeting.round;
    if (++meeting.arrived == count) {
        work();
        meeting.arrived = 0;
        meeting.round++;
    }
    while (meeting.round == round) let_others_run();
}

void __syncthreads() {
    meet(block_meeting, blockDim.x, [] {});
}

static Lanes& own_warp() { return warps[threadIdx.x / 32]; }

unsigned __syncthreads_count(bool is_so) {
    static unsigned count, result;
    count += is_so;
    meet(block_meeting, blockDim.x, [] {
        result = count;
        count = 0;
    });
    return result;
}

const unsigned* gathered(unsigned value) {
    Lanes& warp = own_warp();
    const unsigned lane = threadIdx.x % 32;
    warp.in[lane][0] = value;
    meet(warp.meeting, 32, [&] {
        for (int i = 0; i < 32; i++) warp.exchanged[i] = warp.in[i][0];
    });
    return warp.exchanged;
}

unsigned long long __cvta_generic_to_shared(const void* pointer) {
    const char* at = static_cast<const char*>(pointer);
    if (at < shared || at >= shared + sizeof shared) fail("an address outside the shared memory of the launch");
    return static_cast<unsigned long long>(at - shared);
}

inline void wait_for_predecessor() {}
inline void allow_successor() {}

// Round to nearest even.
static u32 bf16_bits(float value) {
    const u32 bits = __float_as_uint(value);
    return value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

static u32 f16_bits(float value) {
    const u32 sign = __float_as_uint(value) >> 31 << 15;
    const double size = fabs(double(value));
    if (size >= 65520.0) return sign | 0x7c00u;
    int exponent;
    frexp(size, &exponent);
    // The distance of neighbours: 2^(exponent - 11), at least 2^-24.
    const int step = exponent - 11 < -24 ? -24 : exponent - 11;
    const u32 steps = u32(nearbyint(ldexp(size, -step)));
    return sign | (size == 0.0 ? 0u : step == -24 ? steps : (u32(step + 24) << 10) + steps);
}
inline u32 pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }

static void put_copy(u32 target, const void* source, u32 num_bytes, bool is_valid) {
    if (target % num_bytes || target + num_bytes > sizeof shared) fail("a copy to no place of shared memory");
    Copy copy = {target, num_bytes, {}};
    if (is_valid) {
        const char* at = static_cast<const char*>(source);
        bool is_inside = false;
        for (const Buffer& buffer : buffers) is_inside |= at >= buffer.begin && at + num_bytes <= buffer.begin + buffer.len;
        if (!is_inside || reinterpret_cast<uintptr_t>(at) % num_bytes) fail("a copy from outside of every buffer, or not aligned");
        memcpy(copy.bytes, at, num_bytes);
    }
    memset(shared + target, 0x7f, num_bytes);
    fibers[threadIdx.x].open.push_back(copy);
}
inline void copy_async(u32 shared, const void* source, bool is_valid) { put_copy(shared, source, 16, is_valid); }
inline void copy_async8(u32 shared, const void* source) { put_copy(shared, source, 8, true); }
inline void commit_copies() {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int N> inline void wait_copies() {
    std::vector<std::vector<Copy>>& groups = fibers[threadIdx.x].groups;
    while (groups.size() > N) {
        for (const Copy& copy : groups.front()) memcpy(shared + copy.target, copy.bytes, copy.num_bytes);
        groups.erase(groups.begin());
    }
}

static double e2m1_value(u32 code) {
    static const double SIZES[8] = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0};
    return code & 8 ? -SIZES[code & 7] : SIZES[code & 7];
}
static double ue4m3_value(u32 bits) {
    const u32 exponent = bits >> 3 & 15, mantissa = bits & 7;
    if ((bits & 0x7f) == 0x7f) return NAN;
    return exponent == 0 ? ldexp(mantissa, -9) : ldexp(8 + mantissa, int(exponent) - 10);
}

// m16n8k64, scale_vec::4X. Element i of a lane, g = lane / 4, t = lane % 4:
//   A (32): row g, for i / 8 odd g + 8; k = 8t + i % 8, from i = 16 on 32 more.   B (16): column g; k = 8t + i % 8, from i = 8 on 32 more.
//   Scales of A's row m: lane 4 (m % 8) + 2 * THREAD_A + m / 8.   Scales of B's column n: lane 4n + THREAD_B.   Byte k / 16 of the word.
//   D: row g, for i >= 2 g + 8; column 2t + i % 2.
static void multiply_warp(Lanes& warp, int thread_a, int thread_b) {
    double a[16][64], b[8][64];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 32; i++)
            a[g + 8 * (i / 8 % 2)][8 * t + i % 8 + 32 * (i / 16)] = e2m1_value(warp.in[lane][i / 8] >> (4 * (i % 8)) & 15);
        for (int i = 0; i < 16; i++) b[g][8 * t + i % 8 + 32 * (i / 8)] = e2m1_value(warp.in[lane][4 + i / 8] >> (4 * (i % 8)) & 15);
    }
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 64; k++) a[m][k] *= ue4m3_value(warp.in[4 * (m % 8) + 2 * thread_a + m / 8][6] >> (8 * (k / 16)) & 0xff);
    for (int n = 0; n < 8; n++)
        for (int k = 0; k < 64; k++) b[n][k] *= ue4m3_value(warp.in[4 * n + thread_b][7] >> (8 * (k / 16)) & 0xff);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const int m = lane / 4 + 8 * (i / 2), n = 2 * (lane % 4) + i % 2;
            double sum = warp.d[lane][i];
            for (int k = 0; k < 64; k++) sum += a[m][k] * b[n][k];
            warp.d[lane][i] = float(sum);
        }
}

template <int THREAD_A, int THREAD_B>
inline void mma_nvfp4(float (&d)[4], const uint4& a, u32 b0, u32 b1, u32 scales_a, u32 scales_b) {
    Lanes& warp = own_warp();
    const unsigned lane = threadIdx.x % 32;
    const u32 in[8] = {a.x, a.y, a.z, a.w, b0, b1, scales_a, scales_b};
    memcpy(warp.in[lane], in, sizeof in);
    memcpy(warp.d[lane], d, sizeof d);
    meet(warp.meeting, 32, [&] { multiply_warp(warp, THREAD_A, THREAD_B); });
    memcpy(d, warp.d[lane], sizeof d);
}

static void run_fiber() {
    kernel(kernel_params);
    fibers[threadIdx.x].has_ended = true;
    swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// `is_backward`: the threads get their turns in descending order.
static void run_block(bool is_backward) {
    const unsigned count = blockDim.x;
    fibers.resize(count);
    warps.assign((count + 31) / 32, Lanes{});
    block_meeting = {};
    memset(shared, 0x7f, sizeof shared);
    for (Fiber& fiber : fibers) {
        fiber.stack.resize(256 << 10);
        fiber.open.clear();
        fiber.groups.clear();
        fiber.has_ended = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    // Far more turns than any kernel here takes.
    for (unsigned long turns = 0, left = count; left > 0; turns++) {
        if (turns > 100000000) fail("threads wait for one another");
        left = 0;
        for (unsigned i = 0; i < count; i++) {
            threadIdx = {is_backward ? count - 1 - i : i, 0, 0};
            Fiber& fiber = fibers[threadIdx.x];
            if (fiber.has_ended) continue;
            swapcontext(&scheduler, &fiber.context);
            left += !fiber.has_ended;
        }
    }
    for (const Fiber& fiber : fibers)
        if (!fiber.open.empty()) fail("a copy that nobody waits for");
}

template <typename T> static T read_value() {
    T value;
    if (fread(&value, sizeof value, 1, stdin) != 1) fail("the input ends early");
    return value;
}
static std::vector<char> read_bytes() {
    std::vector<char> bytes(read_value<u64>());
    if (!bytes.empty() && fread(bytes.data(), bytes.size(), 1, stdin) != 1) fail("the input ends early");
    return bytes;
}

// Addresses in parameters are 0x5eed, 8 bits for the buffer, 40 for the byte in it.
static void put_addresses(std::vector<char>& params) {
    for (size_t i = 0; i + 8 <= params.size(); i += 8) {
        u64 word;
        memcpy(&word, &params[i], 8);
        if (word >> 48 != 0x5eed) continue;
        const u64 buffer = word >> 40 & 0xff;
        if (buffer >= buffers.size()) fail("an address in no buffer");
        word = reinterpret_cast<uintptr_t>(buffers[buffer].begin + (word & 0xffffffffff));
        memcpy(&params[i], &word, 8);
    }
}

// The kernels by name, made for each module.
struct Entry {
    const char* name;
    void (*launch)(const void*);
};
extern const Entry KERNELS[];

// Input: buffers, then launches. Output: the buffers as they are then.
int main() {
    buffers.resize(read_value<u64>());
    for (Buffer& buffer : buffers) {
        const std::vector<char> bytes = read_bytes();
        buffer.len = bytes.size();
        buffer.bytes.resize(bytes.size() + 256);
        buffer.begin = buffer.bytes.data() + (256 - reinterpret_cast<uintptr_t>(buffer.bytes.data()) % 256);
        memcpy(buffer.begin, bytes.data(), bytes.size());
    }
    for (u64 launches = read_value<u64>(); launches > 0; launches--) {
        const std::vector<char> name = read_bytes();
        kernel = nullptr;
        for (const Entry* entry = KERNELS; entry->name; entry++)
            if (std::string(name.begin(), name.end()) == entry->name) kernel = entry->launch;
        if (!kernel) fail("no such kernel");
        gridDim = {read_value<u32>(), 1, 1};
        gridDim.y = read_value<u32>();
        blockDim = {read_value<u32>(), 1, 1};
        std::vector<char> params = read_bytes();
        put_addresses(params);
        kernel_params = params.data();
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) run_block((blockIdx.x + blockIdx.y) % 2);
    }
    for (const Buffer& buffer : buffers)
        if (buffer.len > 0 && fwrite(buffer.begin, buffer.len, 1, stdout) != 1) fail("no output");
    return 0;
}
