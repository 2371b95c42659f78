//! The paged KV cache on the device: its size, its layout, where a layer begins. What is stored is written and read by
//! `kernels/attention*.cu`.

use spark_backend::{KvDtype, KvSpec};

use crate::{ALIGNMENT, DeviceSlice, Error, Result, Stream};

const OP: &str = "KV cache";
/// Tokens that attention takes at a time lie in one block.
const BLOCK_UNIT: usize = 16;
/// Largest block: the kernels divide positions by multiplying.
const MAX_BLOCK_SIZE: usize = 4096;
/// Pairs (sequence, kv head) whose context is read in parts; each needs a counter.
pub(super) const MAX_SPLIT_PAIRS: usize = 1024;

/// K and V of all layers and blocks: `[layer][block][kv_head][K | V][token][head_dim]` in bf16 or e4m3; behind them for e4m3
/// the scales `[layer][block][kv_head][K | V][token]` in f16, then counters of the decode kernel. Used by one stream.
#[derive(Debug, Clone)]
pub struct KvCache {
    slice: DeviceSlice,
    spec: KvSpec,
}

impl KvCache {
    /// A cache in `slice`. Its contents may be anything; the counters are set to zero.
    ///
    /// # Errors
    /// [`Error::Shape`] for a size or type that the kernels do not take and for a slice that is smaller than [`KvCache::num_bytes`];
    /// [`Error::Driver`].
    pub fn new(stream: &Stream, slice: &DeviceSlice, spec: KvSpec) -> Result<Self> {
        let num_bytes = Self::num_bytes(&spec)?;
        let slice = slice.slice(0, num_bytes)?;
        if !slice.address().is_multiple_of(ALIGNMENT) {
            return Err(Error::shape(OP, format!("a start aligned to {ALIGNMENT} bytes"), slice.address()));
        }
        stream.uses(OP, &[&slice])?;
        let cache = Self { slice, spec };
        stream.fill(&cache.slice.slice(num_bytes - COUNTER_BYTES, COUNTER_BYTES)?, 0)?;
        Ok(cache)
    }

    /// Bytes on the device: those of the pool, and a little beside it.
    ///
    /// # Errors
    /// [`Error::Shape`] for a size or type that the kernels do not take.
    pub fn num_bytes(spec: &KvSpec) -> Result<u64> {
        if !matches!(spec.head_dim, 32 | 64 | 128) {
            return Err(Error::shape(OP, "a head_dim of 32, 64 or 128", spec.head_dim));
        }
        if spec.block_size == 0
            || !spec.block_size.is_multiple_of(BLOCK_UNIT)
            || spec.block_size > MAX_BLOCK_SIZE
        {
            let expected = format!("a block_size that is a multiple of {BLOCK_UNIT} up to {MAX_BLOCK_SIZE}");
            return Err(Error::shape(OP, expected, spec.block_size));
        }
        if spec.dtype == KvDtype::F32 {
            return Err(Error::shape(OP, "Bf16 or Fp8", spec.dtype));
        }
        let sizes = [spec.num_layers, spec.num_blocks, spec.num_kv_heads, spec.block_size];
        let tokens = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(size as u64));
        let num_bytes = tokens
            .and_then(|tokens| tokens.checked_mul(2 * vector_bytes(spec)))
            .and_then(|num_bytes| num_bytes.checked_next_multiple_of(ALIGNMENT))
            .filter(|&num_bytes| num_bytes > 0 && num_bytes < 1 << 62);
        let expected = "sizes above 0 whose product fits 62 bits";
        Ok(num_bytes.ok_or_else(|| Error::shape(OP, expected, spec))? + COUNTER_BYTES)
    }

    /// What it holds.
    pub fn spec(&self) -> &KvSpec {
        &self.spec
    }

    /// All its bytes.
    pub fn slice(&self) -> &DeviceSlice {
        &self.slice
    }

    /// Vectors of `head_dim` in a layer.
    fn layer_vectors(&self) -> u64 {
        let spec = &self.spec;
        2 * (spec.num_blocks * spec.num_kv_heads * spec.block_size) as u64
    }

    /// Addresses of the values and scales of a layer; without scales 0.
    pub(super) fn layer(&self, layer: usize) -> [u64; 2] {
        let (vectors, head_dim) = (self.layer_vectors(), self.spec.head_dim as u64);
        let layer = layer as u64;
        match self.spec.dtype {
            KvDtype::Fp8 => {
                let scales = self.slice.address() + self.spec.num_layers as u64 * vectors * head_dim;
                [self.slice.address() + layer * vectors * head_dim, scales + 2 * layer * vectors]
            }
            _ => [self.slice.address() + layer * vectors * 2 * head_dim, 0],
        }
    }

    /// Address of [`MAX_SPLIT_PAIRS`] counters.
    pub(super) fn counters(&self) -> u64 {
        self.slice.address() + self.slice.num_bytes() - COUNTER_BYTES
    }
}

const COUNTER_BYTES: u64 = 4 * MAX_SPLIT_PAIRS as u64;

/// Bytes of K or V of a token and kv head.
fn vector_bytes(spec: &KvSpec) -> u64 {
    let head_dim = spec.head_dim as u64;
    if spec.dtype == KvDtype::Fp8 { head_dim + 2 } else { 2 * head_dim }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: KvSpec = KvSpec {
        num_layers: 3,
        num_kv_heads: 2,
        head_dim: 64,
        block_size: 32,
        num_blocks: 5,
        dtype: KvDtype::Fp8,
    };

    #[test]
    fn sizes_are_those_of_the_spec() {
        for dtype in [KvDtype::Bf16, KvDtype::Fp8] {
            let spec = KvSpec { dtype, ..SPEC };
            let want = spec.num_bytes().next_multiple_of(ALIGNMENT) + COUNTER_BYTES;
            assert_eq!(KvCache::num_bytes(&spec).unwrap(), want);
        }
    }

    #[test]
    fn what_the_kernels_do_not_take_is_refused() {
        for (spec, part) in [
            (KvSpec { head_dim: 80, ..SPEC }, "head_dim of 32, 64 or 128, got 80"),
            (KvSpec { block_size: 24, ..SPEC }, "multiple of 16 up to 4096, got 24"),
            (KvSpec { block_size: 0, ..SPEC }, "multiple of 16"),
            (KvSpec { dtype: KvDtype::F32, ..SPEC }, "Bf16 or Fp8, got F32"),
            (KvSpec { num_blocks: 0, ..SPEC }, "above 0"),
            (KvSpec { num_blocks: usize::MAX / 2, ..SPEC }, "62 bits"),
        ] {
            let error = KvCache::num_bytes(&spec).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
