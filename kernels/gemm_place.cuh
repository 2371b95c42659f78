// Which results of a product for many rows a block computes. No kernel: see gemm.cuh.
#pragma once
#include "gemm_stage.cuh"

// Rows of x of a warp if the block has `num_tokens`: all that it can have, or a half or a quarter.
template <typename S> __device__ __forceinline__ u32 used_warp_tokens(u32 num_tokens) {
    if (num_tokens <= S::QUARTER_TILES * 8 * S::WARPS_ALONG_TOKENS) return S::QUARTER_TILES * 8;
    return num_tokens <= S::HALF_TILES * 8 * S::WARPS_ALONG_TOKENS ? S::HALF_TILES * 8 : S::TOKEN_TILES * 8;
}

// Which rows of W and of x the block multiplies.
struct Place {
    u32 row_block;
    u32 token_block;
};

// Blocks that run at the same time share a panel of W, and go over the rows of x together.
__device__ __forceinline__ Place dense_place(const GemmParams& p, u32 tokens) {
    const u32 num_row_blocks = (p.num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS, num_token_blocks = (p.rows + tokens - 1) / tokens;
    const u32 in_panel = p.panel * num_token_blocks, panel = blockIdx.x / in_panel, rest = blockIdx.x % in_panel;
    const u32 width = min(p.panel, num_row_blocks - panel * p.panel);
    return {panel * p.panel + rest % width, rest / width};
}
