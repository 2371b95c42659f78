// Rows and elements: gather_rows (out[i] = source[rows[i]]), join_columns (parts of ranks side by side), add (x += y) and the
// activations (x = f(x)), rounded once.
//
// Shapes  join: parts [world][part_length] f32, of which rank r's [num_rows, its columns] are the first, out [num_rows, columns]
//         f32. gather: source [source_rows, columns], rows [num_rows] u32, out [num_rows, columns]; the others: vectors of 8.
//         These all bf16 in vectors of 16 bytes.
// Bytes   join 8 * num_rows * columns; gather 4 * num_rows * columns; add 6, activate 4 for each element.
// Bound   latency at decode, memory bandwidth at prefill and in the vision encoder.
#include "activation.cuh"

struct GatherParams {
    const uint4* source;
    const u32* rows;
    uint4* out;
    u32 row_vectors;
    u32 source_rows;
};
PARAMS(GatherParams);

// One block per row; zeros for a row that is not there.
extern "C" __global__ void __launch_bounds__(256) gather_rows(const GatherParams p) {
    wait_for_predecessor();
    allow_successor();
    const u32 row = p.rows[blockIdx.x];
    const bool is_there = row < p.source_rows;
    const uint4* source = p.source + u64(is_there ? row : 0) * p.row_vectors;
    uint4* out = p.out + u64(blockIdx.x) * p.row_vectors;
    for (u32 i = threadIdx.x; i < p.row_vectors; i += blockDim.x)
        out[i] = is_there ? source[i] : make_uint4(0, 0, 0, 0);
}

struct JoinParams {
    const float* parts;
    float* out;
    u64 part_length;
    u32 columns;
    u32 each; // columns of a rank; the first `more` ranks have one more
    u32 more;
    u32 unused;
};
PARAMS(JoinParams);

// Grid: (1024 columns, rows).
extern "C" __global__ void __launch_bounds__(256) join_columns(const JoinParams p) {
    wait_for_predecessor();
    allow_successor();
    const u32 row = blockIdx.y, border = p.more * (p.each + 1);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 column = (blockIdx.x * 4 + i) * 256 + threadIdx.x;
        if (column >= p.columns) return;
        const bool has_more = column < border;
        const u32 width = p.each + has_more;
        const u32 inside = has_more ? column : column - border;
        const u32 rank = inside / width + (has_more ? 0 : p.more);
        p.out[u64(row) * p.columns + column] = p.parts[rank * p.part_length + u64(row) * width + inside % width];
    }
}

struct ElementsParams {
    uint4* x;
    const uint4* y;
    u64 num_vectors;
};
PARAMS(ElementsParams);

extern "C" __global__ void __launch_bounds__(256) add(const ElementsParams p) {
    wait_for_predecessor();
    allow_successor();
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.num_vectors) return;
    float x[8], y[8];
    unpack(p.x[i], x, bf16());
    unpack(p.y[i], y, bf16());
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] += y[j];
    p.x[i] = pack(x, bf16());
}

template <typename F> __device__ __forceinline__ void activate(const ElementsParams& p, F function) {
    wait_for_predecessor();
    allow_successor();
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.num_vectors) return;
    float x[8];
    unpack(p.x[i], x, bf16());
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = function(x[j]);
    p.x[i] = pack(x, bf16());
}

extern "C" __global__ void __launch_bounds__(256) activate_silu(const ElementsParams p) {
    activate(p, [](float x) { return silu(x); });
}
extern "C" __global__ void __launch_bounds__(256) activate_gelu_tanh(const ElementsParams p) {
    activate(p, [](float x) { return gelu_tanh(x); });
}
extern "C" __global__ void __launch_bounds__(256) activate_gelu_erf(const ElementsParams p) {
    activate(p, [](float x) { return gelu_erf(x); });
}
