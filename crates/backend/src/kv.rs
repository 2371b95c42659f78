//! The layout of the paged KV cache.

/// How K and V are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    /// Float32, only with float32 computation.
    F32,
    /// bfloat16.
    Bf16,
    /// FP8 E4M3 with one fp16 scale per (token, kv head), for K and for V.
    Fp8,
}

/// Size and layout of the cache: `[layer][block][kv_head][K | V][token][head_dim]`, scales beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvSpec {
    /// Decoder layers.
    pub num_layers: usize,
    /// KV heads of this rank.
    pub num_kv_heads: usize,
    /// Head dimension.
    pub head_dim: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Storage type.
    pub dtype: KvDtype,
}

impl KvSpec {
    /// Bytes that one token takes in all layers.
    pub fn bytes_per_token(&self) -> usize {
        let per_vector = match self.dtype {
            KvDtype::F32 => 4 * self.head_dim,
            KvDtype::Bf16 => 2 * self.head_dim,
            KvDtype::Fp8 => self.head_dim + 2,
        };
        2 * self.num_layers * self.num_kv_heads * per_vector
    }

    /// Bytes of the whole pool.
    pub fn num_bytes(&self) -> u64 {
        self.bytes_per_token() as u64 * self.block_size as u64 * self.num_blocks as u64
    }
}
