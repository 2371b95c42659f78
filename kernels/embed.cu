// embed: out[i] = row tokens[i] of a table in the packed layout, zeros for a token outside the table. A token with bit 31 set
// is still on the device: the slot in the other bits sampled it last. The table's first row may be that of a later token: then
// it is one rank's share, and the others have the other rows.
//
// Shapes  tokens [num_tokens] u32, last_tokens [num_slots] u32, table [vocab_rows, hidden] bf16 in tiles of 16 rows and 32
//         columns (a row is 64 consecutive bytes of each), out [num_tokens, hidden] bf16; hidden a multiple of 8.
// Bytes   4 * num_tokens * hidden; a row of the table is read once per token.
// Bound   memory latency at decode (a row is 4 to 8 KB), memory bandwidth at prefill.
#include "prelude.cuh"

struct EmbedParams {
    const u32* tokens;
    const u32* last_tokens;
    const uint4* table;
    uint4* out;
    u32 row_vectors;
    u32 row_tiles;
    u32 first_row;
    u32 vocab_rows;
    u32 num_slots;
    u32 unused;
};
PARAMS(EmbedParams);

constexpr u32 PENDING = 0x80000000u;
constexpr u32 TILE_VECTORS = 64;

// One block per token.
extern "C" __global__ void __launch_bounds__(256) embed(const EmbedParams p) {
    wait_for_predecessor();
    allow_successor();
    u32 token = p.tokens[blockIdx.x];
    if (token & PENDING) {
        const u32 slot = token & ~PENDING;
        token = slot < p.num_slots ? p.last_tokens[slot] : p.first_row + p.vocab_rows;
    }
    // What comes before the first row is a large number here.
    const bool is_here = token - p.first_row < p.vocab_rows;
    const u32 row = is_here ? token - p.first_row : 0;
    // Of 16 rows the first eight come before the others in a tile, four vectors of each.
    const u32 inside = row % 16 / 8 * 32 + row % 8 * 4;
    const uint4* source = p.table + u64(row / 16) * p.row_tiles * TILE_VECTORS + inside;
    uint4* target = p.out + u64(blockIdx.x) * p.row_vectors;
    for (u32 i = threadIdx.x; i < p.row_vectors; i += blockDim.x)
        target[i] = is_here ? load_once(source + u64(i / 4) * TILE_VECTORS + i % 4) : make_uint4(0, 0, 0, 0);
}
