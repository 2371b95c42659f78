//! The paged KV cache: writing a token's K and V as they are stored, and reading blocks of them back. No attention.

use crate::attention::{KEY_BLOCK, KeyValues};
use crate::dot::LANES;
use crate::dtype::{E4M3_MAX, bf16_bits, bf16_value, e4m3_bits, e4m3_value};
use half::f16;
use spark_backend::{Error, KvDtype, KvSpec, Result, SeqInput};

/// The pool, `[layer][block][kv_head][K | V][token][head_dim]`.
pub(crate) struct KvPool {
    pub(crate) spec: KvSpec,
    store: Store,
}

enum Store {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
    /// E4M3 bytes, and fp16 scales `[layer][block][kv_head][K | V][token]`.
    Fp8(Vec<u8>, Vec<u16>),
}

/// A zeroed vector, or the error instead of an abort.
fn zeroed<T: Clone + Default>(len: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    let needed = len as u64 * size_of::<T>() as u64;
    values.try_reserve_exact(len).map_err(|_| Error::Memory { what: "KV cache", needed, available: 0 })?;
    values.resize(len, T::default());
    Ok(values)
}

impl KvPool {
    /// Allocates the pool.
    ///
    /// # Errors
    /// Sizes of zero or beyond the address space, or out of memory.
    pub(crate) fn new(spec: KvSpec) -> Result<Self> {
        let sizes = [spec.num_layers, spec.num_blocks, spec.num_kv_heads, 2, spec.block_size, spec.head_dim];
        let len = sizes.iter().try_fold(1usize, |len, &size| len.checked_mul(size));
        let Some(len) = len.filter(|&len| len > 0 && len < usize::MAX / 8) else {
            return Err(Error::shape("allocate_state", "sizes above 0 that fit the address space", spec));
        };
        let store = match spec.dtype {
            KvDtype::F32 => Store::F32(zeroed(len)?),
            KvDtype::Bf16 => Store::Bf16(zeroed(len)?),
            KvDtype::Fp8 => Store::Fp8(zeroed(len)?, zeroed(len / spec.head_dim)?),
        };
        Ok(Self { spec, store })
    }

    /// Index of the vector of (layer, slot, head, K or V), in vectors of `head_dim`.
    #[inline(always)]
    fn vector(&self, layer: usize, block: usize, head: usize, half: usize, token: usize) -> usize {
        let spec = &self.spec;
        ((((layer * spec.num_blocks + block) * spec.num_kv_heads + head) * 2) + half) * spec.block_size
            + token
    }

    /// Stores K (`half` 0) or V (`half` 1), `[head_dim]`, of a token. `slot` is `block * block_size + offset`, checked
    /// by the caller.
    pub(crate) fn write(&mut self, layer: usize, slot: usize, head: usize, half: usize, values: &[f32]) {
        let (block, token) = (slot / self.spec.block_size, slot % self.spec.block_size);
        let vector = self.vector(layer, block, head, half, token);
        let range = vector * self.spec.head_dim..(vector + 1) * self.spec.head_dim;
        match &mut self.store {
            Store::F32(store) => store[range].copy_from_slice(values),
            Store::Bf16(store) => {
                store[range].iter_mut().zip(values).for_each(|(out, &value)| *out = bf16_bits(value));
            }
            Store::Fp8(store, scales) => {
                let scale = fp8_scale(values);
                scales[vector] = scale.to_bits();
                let scale = scale.to_f32();
                store[range].iter_mut().zip(values).for_each(|(out, &value)| *out = e4m3_bits(value / scale));
            }
        }
    }

    /// Calls `put(d, value)` for the values of a stored vector.
    #[inline(always)]
    fn read(&self, vector: usize, mut put: impl FnMut(usize, f32)) {
        let range = vector * self.spec.head_dim..(vector + 1) * self.spec.head_dim;
        match &self.store {
            Store::F32(store) => store[range].iter().enumerate().for_each(|(d, &value)| put(d, value)),
            Store::Bf16(store) => {
                store[range].iter().enumerate().for_each(|(d, &bits)| put(d, bf16_value(bits)));
            }
            Store::Fp8(store, scales) => {
                let scale = f16::from_bits(scales[vector]).to_f32();
                store[range].iter().enumerate().for_each(|(d, &byte)| put(d, e4m3_value(byte) * scale));
            }
        }
    }
}

/// `amax / 448` as fp16; 1 where that is zero (or not a number), so that nothing is divided by zero.
fn fp8_scale(values: &[f32]) -> f16 {
    let amax = values.iter().fold(0.0f32, |amax, value| amax.max(value.abs()));
    let scale = f16::from_f32((amax / E4M3_MAX).min(f16::MAX.to_f32()));
    if scale > f16::ZERO { scale } else { f16::ONE }
}

/// The cache of one KV head of one sequence.
pub(crate) struct PagedKeyValues<'a> {
    pub(crate) pool: &'a KvPool,
    pub(crate) layer: usize,
    pub(crate) head: usize,
    pub(crate) seq: &'a SeqInput,
}

impl KeyValues for PagedKeyValues<'_> {
    #[inline(always)]
    fn load(&self, first: usize, count: usize, keys: &mut [f32], values: &mut [f32]) {
        let spec = &self.pool.spec;
        let width = spec.head_dim.next_multiple_of(LANES);
        for (j, values) in values.chunks_exact_mut(width).take(count).enumerate() {
            let position = first + j;
            let block = self.seq.block_table[position / spec.block_size] as usize;
            let token = position % spec.block_size;
            let key = self.pool.vector(self.layer, block, self.head, 0, token);
            self.pool.read(key, |d, value| keys[d * KEY_BLOCK + j] = value);
            let value = self.pool.vector(self.layer, block, self.head, 1, token);
            self.pool.read(value, |d, value| values[d] = value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn pool(dtype: KvDtype) -> KvPool {
        let spec =
            KvSpec { num_layers: 2, num_kv_heads: 2, head_dim: 8, block_size: 4, num_blocks: 3, dtype };
        KvPool::new(spec).unwrap()
    }

    fn stored(pool: &KvPool, vector: usize) -> Vec<f32> {
        let mut out = vec![0.0; pool.spec.head_dim];
        pool.read(vector, |d, value| out[d] = value);
        out
    }

    #[test]
    fn layout_is_layer_block_head_half_token() {
        let mut pool = pool(KvDtype::F32);
        let values: Vec<f32> = (1..=8).map(|v| v as f32).collect();
        pool.write(1, 4 + 3, 1, 1, &values);
        let vector = ((((3 + 1) * 2 + 1) * 2) + 1) * 4 + 3;
        let Store::F32(store) = &pool.store else { panic!("F32 was asked for") };
        assert_eq!(store[vector * 8..][..8], values);
        assert_eq!(store.iter().filter(|&&v| v != 0.0).count(), 8);
    }

    #[test]
    fn storage_rounds_as_its_type() {
        let mut random = Random::new(9);
        let values = random.normal(8);
        let mut bf16 = pool(KvDtype::Bf16);
        bf16.write(0, 0, 0, 0, &values);
        let want: Vec<f32> = values.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect();
        assert_eq!(stored(&bf16, 0), want);
        let mut fp8 = pool(KvDtype::Fp8);
        fp8.write(0, 0, 0, 0, &values);
        let amax = values.iter().fold(0.0f32, |a, v| a.max(v.abs()));
        for (got, want) in stored(&fp8, 0).into_iter().zip(&values) {
            // Half a unit of three mantissa bits, or half the smallest subnormal; the scale has eleven bits.
            assert!((got - want).abs() <= want.abs() / 16.0 + amax / 448.0 / 1024.0 + amax / 2048.0);
        }
        fp8.write(0, 0, 0, 0, &[0.0; 8]);
        assert_eq!(stored(&fp8, 0), [0.0; 8]);
        fp8.write(0, 0, 0, 0, &[1e-30; 8]);
        assert_eq!(stored(&fp8, 0), [0.0; 8]);
        fp8.write(0, 0, 0, 0, &[1e30; 8]);
        assert!(stored(&fp8, 0).iter().all(|v| v.is_finite()));
    }

    #[test]
    fn impossible_pools_are_errors() {
        let spec = pool(KvDtype::F32).spec;
        assert!(KvPool::new(KvSpec { num_blocks: 0, ..spec }).is_err());
        assert!(KvPool::new(KvSpec { num_blocks: usize::MAX / 2, ..spec }).is_err());
        assert!(KvPool::new(KvSpec { num_blocks: usize::MAX / 2048, ..spec }).is_err());
    }
}
