//! Which products for many rows quantise x, so that tensor cores multiply both operands in a narrow type. The one place that decides; the
//! products are in `fp8x.rs` and `nvfp4_mma.rs`, those that leave x in bf16 in `gemm.rs`.

use super::gemm::Block;
use super::pack::Scheme;
use super::{Kernels, disjoint, to_u32};
use crate::{Arch, DeviceSlice, Error, Pool, Result, Stream};

/// What x becomes in products for many rows, by the scheme of the weights. The default quantises nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prefill {
    /// Rows beside 4-bit integer weights become FP8 (E4M3) with a scale for each row.
    pub fp8: bool,
    /// Rows beside NVFP4 weights become NVFP4.
    pub nvfp4: bool,
}

/// What x of a product becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quantised {
    Fp8,
    Nvfp4,
}

/// Fewest rows of a layer beside integers: up to 256 the inputs are cut into parts, which products in bf16 do.
const MIN_FP8_ROWS: usize = 257;
/// Fewest rows of a layer beside NVFP4: what is above the smallest blocks.
const MIN_NVFP4_ROWS: usize = 33;
/// Smallest block of rows of an expert.
const MIN_EXPERT_ROWS: usize = 64;

/// Scratch memory for `rows` rows of x that a kernel is to quantise, `k` numbers of bf16 each, a multiple of `unit`: `pieces` by name and
/// bytes, the codes first. Checks what such a kernel takes for granted.
pub(super) fn take_rows<const N: usize>(
    op: &'static str,
    stream: &Stream,
    pool: &Pool,
    (x, rows): (&DeviceSlice, usize),
    (k, unit): (usize, usize),
    pieces: [(&'static str, usize); N],
) -> Result<[DeviceSlice; N]> {
    if !k.is_multiple_of(unit) || x.num_bytes() < (2 * rows * k) as u64 {
        let expected = format!("{rows} rows of a multiple of {unit} bf16 numbers");
        return Err(Error::shape(op, expected, (k, x.num_bytes())));
    }
    // The kernels of products count pieces of 16 bytes.
    to_u32(op, pieces[0].1 / 16)?;
    let mut taken = Vec::with_capacity(N);
    for (what, num_bytes) in pieces {
        let piece = pool.take(what, num_bytes as u64)?;
        stream.uses(op, &[&piece, x])?;
        disjoint(op, &piece, &[x])?;
        taken.push(piece);
    }
    Ok(taken.try_into().expect("as many as were asked for"))
}

impl Prefill {
    fn check(self, arch: Arch) -> Result<()> {
        let lacking = match self {
            Self { fp8: true, .. } if arch == Arch::Sm80 => Some("FP8"),
            Self { nvfp4: true, .. } if !arch.has_fp4() => Some("NVFP4"),
            _ => None,
        };
        lacking.map_or(Ok(()), |kind| Err(Error::NoInstructions { kind, arch: arch.name() }))
    }

    fn of(self, scheme: Scheme) -> Option<Quantised> {
        match scheme {
            Scheme::Int4 { .. } if self.fp8 => Some(Quantised::Fp8),
            Scheme::Nvfp4 if self.nvfp4 => Some(Quantised::Nvfp4),
            _ => None,
        }
    }
}

impl Kernels {
    /// Quantises x as `prefill` says, from now on.
    ///
    /// # Errors
    /// [`Error::NoInstructions`] on an architecture without tensor cores for it.
    pub fn with_prefill(self, prefill: Prefill) -> Result<Self> {
        prefill.check(self.gemm.arch())?;
        Ok(Self { prefill, ..self })
    }

    /// What products for many rows quantise x to.
    pub fn prefill(&self) -> Prefill {
        self.prefill
    }

    /// What x becomes in a layer of `rows` rows.
    pub(super) fn quantised(&self, scheme: Scheme, rows: usize) -> Option<Quantised> {
        self.prefill.of(scheme).filter(|quantised| match quantised {
            Quantised::Fp8 => rows >= MIN_FP8_ROWS,
            Quantised::Nvfp4 => rows >= MIN_NVFP4_ROWS,
        })
    }

    /// What x becomes in a product of experts in blocks of `block`.
    pub(super) fn quantised_experts(&self, scheme: Scheme, block: Block) -> Option<Quantised> {
        self.prefill.of(scheme).filter(|_| block.tokens() >= MIN_EXPERT_ROWS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_architecture_without_the_instructions_is_refused() {
        let [fp8, nvfp4] = [(true, false), (false, true)].map(|(fp8, nvfp4)| Prefill { fp8, nvfp4 });
        let message = fp8.check(Arch::Sm80).unwrap_err().to_string();
        assert_eq!(message, "sm_80 has no tensor core instructions for FP8: leave activations in bf16");
        assert!(nvfp4.check(Arch::Sm90).is_err() && Prefill::default().check(Arch::Sm80).is_ok());
        assert!(fp8.check(Arch::Sm90).is_ok() && fp8.check(Arch::Sm121a).is_ok());
        assert!(nvfp4.check(Arch::Sm121a).is_ok() && nvfp4.check(Arch::Sm120a).is_ok());
    }

    #[test]
    fn each_scheme_has_its_own() {
        let int4 = Scheme::Int4 { group_size: 64 };
        let both = Prefill { fp8: true, nvfp4: true };
        assert_eq!(both.of(int4), Some(Quantised::Fp8));
        assert_eq!(both.of(Scheme::Nvfp4), Some(Quantised::Nvfp4));
        assert_eq!([both.of(Scheme::Bf16), both.of(Scheme::Fp8)], [None, None]);
        assert_eq!([Prefill::default().of(int4), Prefill::default().of(Scheme::Nvfp4)], [None, None]);
    }
}
