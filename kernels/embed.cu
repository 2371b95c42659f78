// embed: out[i] = table[tokens[i] - vocab_start], zeros for a token outside this rank's rows of the table (the other
// ranks add theirs).
//
// Shapes  tokens [num_tokens] u32, table [vocab_rows, hidden], out [num_tokens, hidden]; any dtype whose rows are a
//         multiple of 16 bytes: the kernel copies bytes.
// Bytes   2 * num_tokens * hidden * size of an element; a row of the table is read once per token.
// Bound   memory latency at decode (a row is 4 to 8 KB), memory bandwidth at prefill.
#include "prelude.cuh"

struct EmbedParams {
    const u32* tokens;
    const uint4* table;
    uint4* out;
    u32 row_vectors;
    u32 vocab_start;
    u32 vocab_rows;
    u32 num_tokens;
};
PARAMS(EmbedParams);

// One block per token.
extern "C" __global__ void __launch_bounds__(256) embed(const EmbedParams p) {
    wait_for_predecessor();
    allow_successor();
    const u32 row = p.tokens[blockIdx.x] - p.vocab_start;
    const bool is_here = row < p.vocab_rows;
    const uint4* source = p.table + u64(is_here ? row : 0) * p.row_vectors;
    uint4* target = p.out + u64(blockIdx.x) * p.row_vectors;
    for (u32 i = threadIdx.x; i < p.row_vectors; i += blockDim.x)
        target[i] = is_here ? load_once(source + i) : make_uint4(0, 0, 0, 0);
}
