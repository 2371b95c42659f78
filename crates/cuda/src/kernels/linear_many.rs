//! Wrapper of `kernels/linear_many.cuh` and `kernels/linear_add.cu`: linear layers for more rows of x than one product takes. The
//! choice between these kernels and others is in `linear.rs`.

use super::linear::{LinearParams, group_index};
use super::pack::{Scheme, padded_n};
use super::{LoadedModule, PackedWeight, to_u32};
use crate::launch::{Kernel, Launch};
use crate::{Arch, Error, Pool, Result, Stream, Tensor};

const OP: &str = "linear";
/// Constants of the kernel: rows of W and threads of a block, inputs of a round, rows of x of a tile.
const BLOCK_ROWS: usize = 128;
const NUM_THREADS: u32 = 128;
const ROUND_K: usize = 128;
const TOKEN_TILE: usize = 8;
/// Parts of k: those of `linear` in pairs, or each by itself.
const FEW_PARTS: usize = 4;
const MANY_PARTS: usize = 8;
/// Threads of a block that adds, and columns of a thread.
const ADD_THREADS: u32 = 128;
const ADD_COLUMNS: usize = 4;
/// Most dynamic shared memory of a block on a device whose blocks have 99 KiB.
const MAX_SHARED: usize = 100_352;

/// Tiles of 8 rows of x of a block, in the order of the kernels.
const TOKEN_TILES: [usize; 2] = [4, 8];

/// The kernels of one scheme, in the order of [`TOKEN_TILES`].
type ByTiles = [Kernel<LinearParams>; TOKEN_TILES.len()];

/// How a product is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// Index into [`TOKEN_TILES`].
    tiles: usize,
    /// Blocks over rows of x.
    token_blocks: usize,
    /// Blocks over rows of W.
    row_blocks: usize,
    /// Blocks over k.
    parts: usize,
}

impl Cut {
    /// Four parts of k where that is a block for each multiprocessor, else eight; eight also where the memory of a block does not
    /// hold the sums between two of them.
    fn new(rows: usize, n: usize, scheme: Scheme, arch: Arch, multiprocessors: usize) -> Self {
        let tiles = usize::from(rows > TOKEN_TILES[0] * TOKEN_TILE);
        let token_blocks = rows.div_ceil(TOKEN_TILES[tiles] * TOKEN_TILE);
        let row_blocks = n.div_ceil(BLOCK_ROWS);
        let is_enough = row_blocks * token_blocks * FEW_PARTS >= multiprocessors;
        let fits = arch == Arch::Sm90 || shared_bytes(arch, scheme, tiles, FEW_PARTS) <= MAX_SHARED;
        let parts = if is_enough && fits { FEW_PARTS } else { MANY_PARTS };
        Self { tiles, token_blocks, row_blocks, parts }
    }
}

/// Dynamic shared memory of a block: rounds of weights with their scale words and of x, and the sums between two parts in one.
fn shared_bytes(arch: Arch, scheme: Scheme, tiles: usize, parts: usize) -> usize {
    let stages = if arch == Arch::Sm90 { 3 } else { 2 };
    let tokens = TOKEN_TILES[tiles] * TOKEN_TILE;
    // Of FP8 there are two spans in a round, each with its scale word.
    let words = match scheme {
        Scheme::Fp8 => 2,
        _ => scheme.k_per_word().map_or(0, |k| ROUND_K / k),
    };
    let weights = BLOCK_ROWS * (ROUND_K * scheme.bits() / 8 + 4 * words);
    let between = if parts == FEW_PARTS { 4 * BLOCK_ROWS * tokens } else { 0 };
    stages * (weights + 2 * tokens * ROUND_K) + between
}

#[derive(Debug)]
pub(super) struct ManyLinear {
    arch: Arch,
    bf16: ByTiles,
    fp8: ByTiles,
    /// By group size: 32, 64, 128.
    int4: [ByTiles; 3],
    nvfp4: ByTiles,
    /// For four and for eight parts.
    add: [Kernel<LinearParams>; 2],
}

impl ManyLinear {
    /// The kernels of the modules that `module` loads.
    pub(super) fn new(arch: Arch, module: impl Fn(&'static str) -> Result<LoadedModule>) -> Result<Self> {
        let kernels = |module: &LoadedModule, name: &str, scheme: Scheme| {
            let kernel = |tiles: usize| {
                let most = [FEW_PARTS, MANY_PARTS].map(|parts| shared_bytes(arch, scheme, tiles, parts));
                let bytes = if arch == Arch::Sm90 || most[0] <= MAX_SHARED { most[0] } else { most[1] };
                let name = format!("linear_many_{name}_t{}", TOKEN_TILES[tiles]);
                Kernel::new(module, &name, to_u32(OP, bytes)?)
            };
            Ok::<_, Error>([kernel(0)?, kernel(1)?])
        };
        let int4 = module("linear_int4")?;
        let group = |group_size| kernels(&int4, &format!("g{group_size}"), Scheme::Int4 { group_size });
        let add = module("linear_add")?;
        Ok(Self {
            arch,
            bf16: kernels(&module("linear_bf16")?, "bf16", Scheme::Bf16)?,
            fp8: kernels(&module("linear_fp8")?, "fp8", Scheme::Fp8)?,
            int4: [group(32)?, group(64)?, group(128)?],
            nvfp4: kernels(&module("linear_nvfp4")?, "nvfp4", Scheme::Nvfp4)?,
            add: [Kernel::new(&add, "linear_add_4", 0)?, Kernel::new(&add, "linear_add_8", 0)?],
        })
    }

    fn kernel(&self, scheme: Scheme, tiles: usize) -> &Kernel<LinearParams> {
        let by_tiles = match scheme {
            Scheme::Bf16 => &self.bf16,
            Scheme::Fp8 => &self.fp8,
            Scheme::Int4 { group_size } => &self.int4[group_index(group_size)],
            Scheme::Nvfp4 => &self.nvfp4,
        };
        &by_tiles[tiles]
    }

    /// Puts the product of `params`, and the sum of its parts, into `stream`.
    ///
    /// # Safety
    /// `params` must be right for `weight`, `x` and `out` of a decode product but for what is set here: `partial`, `token_blocks`.
    pub(super) unsafe fn launch(
        &self,
        stream: &Stream,
        pool: &Pool,
        weight: &PackedWeight,
        [x, out]: [&Tensor; 2],
        params: LinearParams,
    ) -> Result<()> {
        let rows = x.rows();
        let cut = Cut::new(rows, weight.n, weight.scheme, self.arch, stream.num_sms() as usize);
        let partial =
            pool.take("sums of a layer in parts", (4 * cut.parts * rows * padded_n(weight.n)) as u64)?;
        stream.uses(OP, &[&partial])?;
        super::disjoint(OP, &partial, &[x.slice(), out.slice()])?;
        let params = params.in_parts(partial.address(), to_u32(OP, cut.token_blocks)?);
        let launch = Launch {
            grid: [to_u32(OP, cut.row_blocks * cut.token_blocks)?, to_u32(OP, cut.parts)?, 1],
            num_threads: NUM_THREADS,
            shared_bytes: to_u32(OP, shared_bytes(self.arch, weight.scheme, cut.tiles, cut.parts))?,
        };
        let add_launch = Launch {
            grid: [to_u32(OP, weight.n.div_ceil(ADD_COLUMNS * ADD_THREADS as usize))?, to_u32(OP, rows)?, 1],
            num_threads: ADD_THREADS,
            shared_bytes: 0,
        };
        // SAFETY: the caller's promise; `partial` holds [parts, rows, padded n] sums.
        unsafe {
            self.kernel(weight.scheme, cut.tiles).launch(stream, launch, &params)?;
            self.add[usize::from(cut.parts == MANY_PARTS)].launch(stream, add_launch, &params)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G128: Scheme = Scheme::Int4 { group_size: 128 };

    #[test]
    fn products_are_cut_so_that_multiprocessors_have_work() {
        let cut = |rows, n, sms| {
            let cut = Cut::new(rows, n, G128, Arch::Sm90, sms);
            (TOKEN_TILES[cut.tiles], cut.row_blocks * cut.token_blocks, cut.parts)
        };
        assert_eq!(cut(64, 5120, 132), (8, 40, 4));
        assert_eq!(cut(64, 2048, 132), (8, 16, 8));
        assert_eq!(cut(128, 5120, 132), (8, 80, 4));
        assert_eq!(cut(20, 100, 132), (4, 1, 8));
        assert_eq!(cut(33, 4096, 48), (8, 32, 4));
    }

    #[test]
    fn stages_fit_the_device() {
        let int4 = [32, 64, 128].map(|group_size| Scheme::Int4 { group_size });
        for scheme in [Scheme::Bf16, Scheme::Fp8, Scheme::Nvfp4].into_iter().chain(int4) {
            for rows in [17, 64, 128] {
                let bytes = |arch| {
                    let cut = Cut::new(rows, 1 << 14, scheme, arch, 48);
                    shared_bytes(arch, scheme, cut.tiles, cut.parts)
                };
                assert!(bytes(Arch::Sm121a) <= MAX_SHARED && bytes(Arch::Sm80) <= MAX_SHARED, "{scheme:?}");
                assert!(bytes(Arch::Sm90) <= 227 << 10, "{scheme:?}");
            }
        }
        assert_eq!(shared_bytes(Arch::Sm90, G128, 1, MANY_PARTS), 3 * (128 * (64 + 4) + 64 * 256));
    }
}
