//! Wrapper of `kernels/repack.cu`: what is copied to a staging area, and which launches bring it from there into the packed
//! layout. The staging areas themselves are in `loader.rs`; `pack.rs` makes the same layout on the host.

use std::borrow::Cow;

use spark_backend::{Dtype, Matrix, MatrixData};

use super::pack::{FP8_BLOCK, Layout, NVFP4_GROUP, TILE_ROWS};
use super::{Kernels, LoadedModule, PackedWeight, to_u32};
use crate::launch::{Kernel, Launch, Params};
use crate::{Error, Result, Stream};

const OP: &str = "repack";
const THREADS: usize = 256;
/// Bytes of a vector that a thread writes.
const VECTOR: usize = 16;
/// Every section of the staging area starts at a multiple of this, every matrix at a multiple of [`VECTOR`].
const SECTION: usize = 256;
/// In place of the place of zero points where there are none.
const NO_ZEROS: u64 = u64::MAX;
/// Most rows of a launch: the grid counts rows of tiles with 16 bits.
const MAX_ROWS: usize = 65_535 * TILE_ROWS - TILE_ROWS;

/// `RepackParams` of `kernels/repack.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct RepackParams {
    source: u64,
    zeros: u64,
    factors: u64,
    target: u64,
    row_scales: u64,
    source_stride: u64,
    zeros_stride: u64,
    target_stride: u64,
    first_row: u32,
    rows: u32,
    n: u32,
    k: u32,
    columns: u32,
    dtype: u32,
    group: u32,
    block_rows: u32,
    row_in_block: u32,
    padding: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 8 * 8 + 10 * 4 bytes, no padding.
unsafe impl Params for RepackParams {
    const NAME: &'static str = "RepackParams";
}

/// A kernel of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Codes4,
    Codes8,
    Codes16,
    ScalesInt4,
    ScalesNvfp4,
    ScalesFp8,
}

#[derive(Debug)]
pub(super) struct Repack {
    codes: [Kernel<RepackParams>; 3],
    scales: [Kernel<RepackParams>; 3],
}

impl Repack {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        let kernel = |name: &str| Kernel::new(module, &format!("repack_{name}"), 0);
        Ok(Self {
            codes: [kernel("codes_4")?, kernel("codes_8")?, kernel("codes_16")?],
            scales: [kernel("scales_int4")?, kernel("scales_nvfp4")?, kernel("scales_fp8")?],
        })
    }

    fn kernel(&self, op: Op) -> &Kernel<RepackParams> {
        match op {
            Op::Codes4 => &self.codes[0],
            Op::Codes8 => &self.codes[1],
            Op::Codes16 => &self.codes[2],
            Op::ScalesInt4 => &self.scales[0],
            Op::ScalesNvfp4 => &self.scales[1],
            Op::ScalesFp8 => &self.scales[2],
        }
    }
}

/// Where a transfer's result goes: addresses of codes, scales and row scales on the device, and what they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) codes: u64,
    pub(super) scales: u64,
    pub(super) row_scales: u64,
    pub(super) layout: Layout,
}

impl Target {
    pub(super) fn of(weight: &PackedWeight, layout: Layout) -> Self {
        Self {
            codes: weight.codes.address(),
            scales: weight.scales.address(),
            row_scales: weight.row_scales.as_ref().map_or(0, crate::DeviceSlice::address),
            layout,
        }
    }
}

/// Matrices that become rows `first_row..` of as many target matrices, from `first_matrix` on. They have been checked
/// (`Scheme::of`) and are alike: one shape and one form.
#[derive(Debug, Clone)]
pub(super) struct Transfer<'a> {
    matrices: Vec<&'a Matrix>,
    target: Target,
    first_matrix: usize,
    first_row: usize,
}

/// What fits a staging area: bytes to copy there, then launches.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    /// Bytes and where they go in the staging area, in ascending order.
    pub(super) copies: Vec<(usize, Cow<'a, [u8]>)>,
    /// With places in the staging area in place of addresses.
    launches: Vec<(Op, Launch, RepackParams)>,
    /// Bytes of the staging area that are used.
    pub(super) num_bytes: usize,
}

/// Whether two matrices may be in one transfer: the kernels see one shape and one form of their numbers.
fn alike(a: &Matrix, b: &Matrix) -> bool {
    use MatrixData::{Dense, Fp8, Int4, Nvfp4};
    let same_form = match (&a.data, &b.data) {
        (Dense { dtype: a, .. }, Dense { dtype: b, .. }) => a == b,
        (
            Int4 { zeros: a_zeros, scale_dtype: a_dtype, group_size: a_group, .. },
            Int4 { zeros: b_zeros, scale_dtype: b_dtype, group_size: b_group, .. },
        ) => (a_zeros.is_some(), a_dtype, a_group) == (b_zeros.is_some(), b_dtype, b_group),
        (Nvfp4 { .. }, Nvfp4 { .. }) => true,
        (Fp8 { block: a, .. }, Fp8 { block: b, .. }) => a == b,
        _ => false,
    };
    same_form && (a.n, a.k) == (b.n, b.k)
}

/// The transfers that bring `matrices` (for each matrix of the target its parts, one below the other) to `target`: what is alike
/// in neighbouring matrices goes together.
pub(super) fn transfers<'a>(target: Target, matrices: &[&'a [Matrix]]) -> Vec<Transfer<'a>> {
    let mut pieces = Vec::new();
    for (index, parts) in matrices.iter().enumerate() {
        let mut row = 0;
        for (position, part) in parts.iter().enumerate() {
            pieces.push((position, index, row, part));
            row += part.n;
        }
    }
    pieces.sort_by_key(|&(position, index, ..)| (position, index));
    let together = |a: &(usize, usize, usize, &Matrix), b: &(usize, usize, usize, &Matrix)| {
        (a.0, a.1 + 1, a.2) == (b.0, b.1, b.2) && alike(a.3, b.3)
    };
    pieces
        .chunk_by(together)
        .map(|group| Transfer {
            matrices: group.iter().map(|&(.., matrix)| matrix).collect(),
            target,
            first_matrix: group[0].1,
            first_row: group[0].2,
        })
        .collect()
}

/// Rows of a matrix as bytes.
struct Rows<'a> {
    codes: &'a [u8],
    scales: Cow<'a, [u8]>,
    zeros: &'a [u8],
    factor: Option<f32>,
}

/// Bytes of a row of codes, scales and zero points. Of FP8 scales those of a row of blocks.
fn row_bytes(matrix: &Matrix) -> [usize; 3] {
    let k = matrix.k;
    match &matrix.data {
        MatrixData::Dense { dtype, .. } => [k * dtype.size(), 0, 0],
        MatrixData::Fp8 { block, .. } => [k, 4 * k.div_ceil(block[1]), 0],
        MatrixData::Int4 { zeros, scale_dtype, group_size, .. } => {
            let groups = k.div_ceil(*group_size);
            [k / 2, groups * scale_dtype.size(), if zeros.is_some() { groups } else { 0 }]
        }
        MatrixData::Nvfp4 { .. } => [k / 2, k / NVFP4_GROUP, 0],
    }
}

fn rows_of(matrix: &Matrix, first: usize, rows: usize) -> Rows<'_> {
    let [code_bytes, scale_bytes, zero_bytes] = row_bytes(matrix);
    let part =
        |bytes, size: usize| -> &[u8] { &<_ as AsRef<[u8]>>::as_ref(bytes)[first * size..][..rows * size] };
    let (codes, scales, zeros, factor) = match &matrix.data {
        MatrixData::Dense { values, .. } => (values, Cow::Borrowed(&[][..]), None, None),
        MatrixData::Fp8 { values, scales, block } => {
            let per_block = scale_bytes / 4;
            let blocks = first / block[0]..(first + rows).div_ceil(block[0]);
            let scales = &scales[blocks.start * per_block..blocks.end * per_block];
            let scales = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
            (values, Cow::Owned(scales), None, None)
        }
        MatrixData::Int4 { codes, zeros, scales, .. } => {
            (codes, Cow::Borrowed(part(scales, scale_bytes)), zeros.as_ref(), None)
        }
        MatrixData::Nvfp4 { codes, scales, alpha } => {
            (codes, Cow::Borrowed(part(scales, scale_bytes)), None, Some(*alpha))
        }
    };
    let zeros = zeros.map_or(&[][..], |zeros| part(zeros, zero_bytes));
    Rows { codes: part(codes, code_bytes), scales, zeros, factor }
}

/// Sections of a staging area: what each holds of a matrix, how many bytes apart, where it starts.
struct Sections {
    strides: [usize; 3],
    starts: [usize; 4],
    end: usize,
}

impl Sections {
    /// For `count` matrices with these bytes each, and a factor each.
    fn new(bytes: [usize; 3], count: usize) -> Self {
        let strides = bytes.map(|bytes| bytes.next_multiple_of(VECTOR));
        let mut starts = [0; 4];
        let mut end = 0;
        for (start, size) in starts.iter_mut().zip([strides[0], strides[1], strides[2], 4]) {
            *start = end;
            end += (size * count).next_multiple_of(SECTION);
        }
        Self { strides, starts, end }
    }
}

impl<'a> Transfer<'a> {
    /// The batches for staging areas of `capacity` bytes.
    ///
    /// # Errors
    /// [`Error::Shape`] when a row alone is larger, or a number does not fit 32 bits.
    pub(super) fn batches(&self, capacity: usize) -> Result<Vec<Batch<'a>>> {
        let Some(matrix) = self.matrices.first() else { return Ok(Vec::new()) };
        let [codes, scales, zeros] = row_bytes(matrix);
        let mut batches = Vec::new();
        // FP8 has at most as many rows of blocks as rows.
        let whole = Sections::new([matrix.n * codes, matrix.n * scales, matrix.n * zeros], 1).end;
        if matrix.n <= MAX_ROWS && whole <= capacity {
            let count = (capacity / whole.max(1)).max(1);
            for (i, matrices) in self.matrices.chunks(count).enumerate() {
                batches.push(self.batch(matrices, i * count, 0..matrix.n)?);
            }
            return Ok(batches);
        }
        // Rounding, and a row of blocks more where pieces cut FP8 blocks.
        let spare = 4 * SECTION + 2 * scales;
        let rows = (capacity.saturating_sub(spare) / (codes + scales + zeros)).min(MAX_ROWS);
        // Whole tiles are written in whole vectors.
        let rows = if rows > TILE_ROWS { rows / TILE_ROWS * TILE_ROWS } else { rows };
        if rows == 0 {
            return Err(Error::shape(OP, format!("rows of at most {capacity} bytes"), matrix.k));
        }
        for (i, matrix) in self.matrices.chunks(1).enumerate() {
            for first in (0..matrix[0].n).step_by(rows) {
                batches.push(self.batch(matrix, i, first..matrix[0].n.min(first + rows))?);
            }
        }
        Ok(batches)
    }

    /// Rows `rows` of `matrices`, which are those from `index` on.
    fn batch(
        &self,
        matrices: &[&'a Matrix],
        index: usize,
        rows: std::ops::Range<usize>,
    ) -> Result<Batch<'a>> {
        let mut copies = Vec::new();
        let parts: Vec<Rows<'a>> = matrices.iter().map(|m| rows_of(m, rows.start, rows.len())).collect();
        let bytes =
            parts.first().map_or([0; 3], |part| [part.codes.len(), part.scales.len(), part.zeros.len()]);
        let sections = Sections::new(bytes, matrices.len());
        let factors: Vec<u8> =
            parts.iter().filter_map(|part| part.factor).flat_map(f32::to_le_bytes).collect();
        for (i, part) in parts.into_iter().enumerate() {
            let buffers = [Cow::Borrowed(part.codes), part.scales, Cow::Borrowed(part.zeros)];
            for (section, bytes) in buffers.into_iter().enumerate() {
                copies.push((sections.starts[section] + i * sections.strides[section], bytes));
            }
        }
        copies.push((sections.starts[3], factors.into()));
        copies.retain(|(_, bytes)| !bytes.is_empty());
        copies.sort_by_key(|&(at, _)| at);
        let launches = self.launches(&sections, matrices, index, rows)?;
        Ok(Batch { copies, launches, num_bytes: sections.end })
    }

    fn launches(
        &self,
        sections: &Sections,
        matrices: &[&Matrix],
        index: usize,
        rows: std::ops::Range<usize>,
    ) -> Result<Vec<(Op, Launch, RepackParams)>> {
        let (layout, matrix) = (self.target.layout, matrices[0]);
        let at = |section: usize| sections.starts[section] as u64;
        let (codes_op, scales_op, dtype, group, block_rows, has_zeros) = match &matrix.data {
            MatrixData::Dense { dtype, .. } => (Op::Codes16, None, *dtype, 0, 1, false),
            MatrixData::Fp8 { block, .. } => {
                (Op::Codes8, Some(Op::ScalesFp8), Dtype::F32, block[1], block[0], false)
            }
            MatrixData::Int4 { zeros, scale_dtype, group_size, .. } => {
                (Op::Codes4, Some(Op::ScalesInt4), *scale_dtype, *group_size, 1, zeros.is_some())
            }
            MatrixData::Nvfp4 { .. } => {
                (Op::Codes4, Some(Op::ScalesNvfp4), Dtype::F32, NVFP4_GROUP, 1, false)
            }
        };
        // A block of all inputs may be any larger number; the kernel divides by it.
        let group = group.min(layout.columns().next_multiple_of(FP8_BLOCK));
        let block_rows = block_rows.min(matrix.n);
        let first_row = self.first_row + rows.start;
        let first_matrix = (self.first_matrix + index) as u64;
        let [code_bytes, scale_bytes] =
            [layout.code_words(), layout.scale_words()].map(|words| 4 * words as u64);
        let codes = RepackParams {
            source: at(0),
            zeros: if has_zeros { at(2) } else { NO_ZEROS },
            factors: at(3),
            target: self.target.codes + first_matrix * code_bytes,
            row_scales: self.target.row_scales + 4 * first_matrix * layout.row_scales() as u64,
            source_stride: sections.strides[0] as u64,
            zeros_stride: sections.strides[2] as u64,
            target_stride: code_bytes,
            first_row: to_u32(OP, first_row)?,
            rows: to_u32(OP, rows.len())?,
            n: to_u32(OP, layout.n)?,
            k: to_u32(OP, layout.k)?,
            columns: to_u32(OP, layout.columns())?,
            dtype: match dtype {
                Dtype::F32 => 0,
                Dtype::F16 => 1,
                Dtype::Bf16 => 2,
            },
            group: to_u32(OP, group)?,
            block_rows: to_u32(OP, block_rows)?,
            row_in_block: to_u32(OP, rows.start % block_rows.max(1))?,
            padding: 0,
        };
        let tile_rows = (first_row + rows.len()).div_ceil(TILE_ROWS) - first_row / TILE_ROWS;
        let launch = |threads_per_tile_row: usize| {
            let blocks = to_u32(OP, threads_per_tile_row.div_ceil(THREADS))?;
            let grid = [blocks, to_u32(OP, tile_rows)?, to_u32(OP, matrices.len())?];
            Ok::<_, Error>(Launch { grid, num_threads: THREADS as u32, shared_bytes: 0 })
        };
        let vectors = layout.columns() * layout.scheme.bits() / 8 * TILE_ROWS / VECTOR;
        let mut launches = vec![(codes_op, launch(vectors)?, codes)];
        if let Some(op) = scales_op {
            let scales = RepackParams {
                source: at(1),
                target: self.target.scales + first_matrix * scale_bytes,
                source_stride: sections.strides[1] as u64,
                target_stride: scale_bytes,
                ..codes
            };
            launches.push((op, launch(layout.scale_words_per_row() * TILE_ROWS)?, scales));
        }
        Ok(launches)
    }
}

impl RepackParams {
    /// With addresses, where the staging area starts at `staging`.
    fn staged_at(self, staging: u64) -> Self {
        let zeros = if self.zeros == NO_ZEROS { 0 } else { staging + self.zeros };
        Self { source: staging + self.source, zeros, factors: staging + self.factors, ..self }
    }
}

impl Kernels {
    /// Launches what a batch needs.
    ///
    /// # Safety
    /// The batch's bytes must be, or be on their way through `stream`, in the staging area at address `staging`, which starts
    /// at a multiple of 256, and the transfer's target must be memory of the layout's size on the stream's device; both valid until
    /// the kernels have run.
    pub(super) unsafe fn repack(&self, stream: &Stream, batch: &Batch<'_>, staging: u64) -> Result<()> {
        for (op, launch, params) in &batch.launches {
            let params = params.staged_at(staging);
            // SAFETY: the caller's promise for staging and target; sizes and offsets come from the checked matrices and the
            // layout: vectors are aligned to 16 bytes (sections, strides, k a multiple of 16), row scales and factors to 4.
            unsafe { self.repack.kernel(*op).launch(stream, *launch, &params)? };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::pack::{PackedHost, by_halves, layouts};
    use super::super::testing::matrix_of;
    use super::*;
    use spark_backend::LinearWeight;
    use spark_testing::Random;

    /// What the kernels do, thread by thread, on memory of the host.
    struct Emulator {
        staging: Vec<u8>,
        codes: Vec<u8>,
        scales: Vec<u8>,
        row_scales: Vec<u8>,
    }

    const STAGING: u64 = 1 << 40;
    const CODES: u64 = 2 << 40;
    const SCALES: u64 = 3 << 40;
    const ROW_SCALES: u64 = 4 << 40;

    impl Emulator {
        fn read<const N: usize>(&self, address: u64) -> [u8; N] {
            let at = (address - STAGING) as usize;
            assert!(at.is_multiple_of(N), "a read of {N} bytes from byte {at}");
            self.staging[at..at + N].try_into().unwrap()
        }

        fn write(&mut self, address: u64, bytes: &[u8]) {
            let (memory, base) = match address >> 40 {
                2 => (&mut self.codes, CODES),
                3 => (&mut self.scales, SCALES),
                _ => (&mut self.row_scales, ROW_SCALES),
            };
            let at = (address - base) as usize;
            assert!(at.is_multiple_of(bytes.len()));
            memory[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn launch(&mut self, op: Op, launch: Launch, p: &RepackParams) {
            assert!(p.zeros != NO_ZEROS && launch.grid[1] <= 65_535 && launch.grid[2] <= 65_535);
            for z in 0..u64::from(launch.grid[2]) {
                for y in 0..launch.grid[1] {
                    for x in 0..launch.grid[0] * launch.num_threads {
                        self.thread(op, p, x, y, z);
                    }
                }
            }
        }

        fn thread(&mut self, op: Op, p: &RepackParams, x: u32, y: u32, z: u64) {
            let row = |in_tile: u32| ((p.first_row / 16 + y) * 16 + in_tile).wrapping_sub(p.first_row);
            let tile_row = u64::from(p.first_row / 16 + y);
            let source = p.source + z * p.source_stride;
            let matrix = p.target + z * p.target_stride;
            let (lane, g, t) = (x % 32, x % 32 / 4, x % 4);
            let vector = |vectors: u32| matrix + 16 * (tile_row * u64::from(vectors) + u64::from(x));
            match op {
                Op::Codes4 if x < p.columns / 2 => {
                    for (i, (half, k)) in [(0, 0), (8, 0), (0, 32), (8, 32)].into_iter().enumerate() {
                        let (row, k) = (row(g + half), x / 32 * 64 + t * 8 + k);
                        if row < p.rows {
                            let at = source + u64::from(row) * u64::from(p.k / 2) + u64::from(k / 2);
                            let natural = if k < p.k { self.read::<4>(at) } else { [0; 4] };
                            let word = by_halves(u32::from_le_bytes(natural));
                            self.write(vector(p.columns / 2) + 4 * i as u64, &word.to_le_bytes());
                        }
                    }
                }
                Op::Codes8 if x < p.columns => {
                    for half in 0..2 {
                        let (row, k) = (row(g + 8 * half), x / 32 * 32 + t * 8);
                        if row < p.rows {
                            let at = source + u64::from(row) * u64::from(p.k) + u64::from(k);
                            let run = if k < p.k { self.read::<8>(at) } else { [0; 8] };
                            self.write(vector(p.columns) + 8 * u64::from(half), &run);
                        }
                    }
                }
                Op::Codes16 if x < 2 * p.columns => {
                    let (row, k) = (row(lane / 4 + 8 * (x / 32 % 2)), x / 64 * 32 + t * 8);
                    if row < p.rows {
                        let bits = |i: u32| {
                            let index = u64::from(row) * u64::from(p.k) + u64::from(k + i);
                            if k < p.k { bf16_bits(self.element(source, index, p.dtype)) } else { 0 }
                        };
                        let run: Vec<u8> = (0..8).flat_map(|i| bits(i).to_le_bytes()).collect();
                        self.write(vector(2 * p.columns), &run);
                    }
                }
                Op::Codes4 | Op::Codes8 | Op::Codes16 => {}
                Op::ScalesInt4 | Op::ScalesNvfp4 | Op::ScalesFp8 => {
                    self.scale(op, p, [x, row(x % 16)], tile_row, z);
                }
            }
        }

        fn scale(&mut self, op: Op, p: &RepackParams, [x, row]: [u32; 2], tile_row: u64, z: u64) {
            let words = p.columns
                / if op == Op::ScalesInt4 {
                    p.group
                } else if op == Op::ScalesFp8 {
                    128
                } else {
                    64
                };
            let word = x / 16;
            if word >= words || row >= p.rows {
                return;
            }
            let source = p.source + z * p.source_stride;
            let value = match op {
                Op::ScalesInt4 if word < p.k.div_ceil(p.group) => {
                    let index = u64::from(row) * u64::from(p.k.div_ceil(p.group)) + u64::from(word);
                    let bits = self.element(source, index, p.dtype).to_bits();
                    let zero = match p.zeros {
                        0 => 8,
                        zeros => self.read::<1>(zeros + z * p.zeros_stride + index)[0],
                    };
                    (bits.saturating_add(16) & !31) | u32::from(zero) & 31
                }
                Op::ScalesInt4 => 0,
                Op::ScalesNvfp4 => {
                    let byte = |i: u32| {
                        let group = 4 * word + i;
                        let at = source + u64::from(row) * u64::from(p.k / 16) + u64::from(group);
                        if group < p.k / 16 { self.read::<1>(at)[0] } else { 0 }
                    };
                    let value = u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]);
                    if word == 0 {
                        let factor = f32::from_le_bytes(self.read(p.factors + 4 * z)) * 256.0;
                        let at = z * u64::from(p.n) + u64::from(p.first_row + row);
                        self.write(p.row_scales + 4 * at, &factor.to_le_bytes());
                    }
                    value
                }
                _ => {
                    let block = u64::from((p.row_in_block + row) / p.block_rows);
                    let index = block * u64::from(p.k.div_ceil(p.group)) + u64::from(word * 128 / p.group);
                    u32::from_le_bytes(self.read(source + 4 * index))
                }
            };
            let at = p.target + z * p.target_stride + 4 * (tile_row * u64::from(words) * 16 + u64::from(x));
            self.write(at, &value.to_le_bytes());
        }

        fn element(&self, source: u64, index: u64, dtype: u32) -> f32 {
            match dtype {
                0 => f32::from_le_bytes(self.read(source + 4 * index)),
                1 => half::f16::from_le_bytes(self.read(source + 2 * index)).to_f32(),
                _ => half::bf16::from_le_bytes(self.read(source + 2 * index)).to_f32(),
            }
        }
    }

    /// As in the kernel.
    fn bf16_bits(value: f32) -> u16 {
        let bits = value.to_bits();
        let rounded =
            if value.is_nan() { bits >> 16 | 0x40 } else { (bits + 0x7fff + (bits >> 16 & 1)) >> 16 };
        rounded as u16
    }

    /// Repacks `layers` of one layout through staging areas of `capacity` bytes; the number of launches.
    fn check(layers: &[LinearWeight], capacity: usize) -> usize {
        let packed = layers.iter().map(|layer| PackedHost::pack(layer).unwrap());
        let want = PackedHost::stack(packed).unwrap();
        let found: Vec<_> = layers.iter().map(|layer| layouts(layer).unwrap()[0]).collect();
        let layout = Layout { count: layers.len(), ..found[0].0 };
        let [codes, scales, row_scales, _] = layout.num_bytes().map(|num_bytes| vec![0; num_bytes as usize]);
        let mut emulator = Emulator { staging: Vec::new(), codes, scales, row_scales };
        let target = Target { codes: CODES, scales: SCALES, row_scales: ROW_SCALES, layout };
        let mut num_launches = 0;
        for transfer in transfers(target, &found.iter().map(|(_, parts)| *parts).collect::<Vec<_>>()) {
            for batch in transfer.batches(capacity).unwrap() {
                assert!(batch.num_bytes <= capacity, "{} of {capacity}", batch.num_bytes);
                emulator.staging = vec![0xee; batch.num_bytes];
                for (at, bytes) in &batch.copies {
                    emulator.staging[*at..at + bytes.len()].copy_from_slice(bytes);
                }
                for (op, launch, params) in &batch.launches {
                    emulator.launch(*op, *launch, &params.staged_at(STAGING));
                    num_launches += 1;
                }
            }
        }
        let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        assert!(emulator.codes == bytes(&want.codes), "codes of {layout:?}");
        assert!(emulator.scales == bytes(&want.scales), "scales of {layout:?}");
        let row_scales: Vec<u32> = want.row_scales.iter().map(|scale| scale.to_bits()).collect();
        assert!(emulator.row_scales == bytes(&row_scales), "row scales of {layout:?}");
        num_launches
    }

    /// Every form that a matrix can have.
    fn forms(k: usize) -> Vec<MatrixData> {
        let empty = || spark_backend::Bytes::new();
        let dense = |dtype| MatrixData::Dense { dtype, values: empty() };
        let int4 = |group_size, scale_dtype, zeros: bool| MatrixData::Int4 {
            codes: empty(),
            zeros: zeros.then(empty),
            scales: empty(),
            scale_dtype,
            group_size,
        };
        let fp8 = |block| MatrixData::Fp8 { values: empty(), scales: Vec::new(), block };
        vec![
            dense(Dtype::F32),
            dense(Dtype::F16),
            dense(Dtype::Bf16),
            int4(32, Dtype::F16, true),
            int4(64, Dtype::Bf16, false),
            int4(128, Dtype::F32, true),
            MatrixData::Nvfp4 { codes: empty(), scales: empty(), alpha: 0.0 },
            fp8([1, k]),
            fp8([128, 128]),
            fp8([24, 256]),
            fp8([1 << 20, 1 << 20]),
        ]
    }

    #[test]
    fn the_kernels_make_what_the_host_makes() {
        let mut random = Random::new(31);
        // The smallest, tails everywhere, parts that meet inside a tile, whole tiles.
        for (rows, k) in [(vec![1], 16), (vec![33], 208), (vec![40, 7, 17], 144), (vec![32, 64], 256)] {
            for form in forms(k) {
                let parts: Vec<_> = rows.iter().map(|&n| matrix_of(&mut random, [n, k], &form)).collect();
                let layer = LinearWeight { parts, bias: None };
                check(std::slice::from_ref(&layer), 1 << 20);
                // Pieces of some rows, whole tiles or not.
                for capacity in [1024 + 7 * (4 * k + 24), 1024 + 20 * (4 * k + 24)] {
                    check(std::slice::from_ref(&layer), capacity);
                }
            }
        }
    }

    #[test]
    fn experts_go_together() {
        let mut random = Random::new(32);
        let k = 64;
        for form in forms(k) {
            let mut layer = || LinearWeight {
                parts: vec![matrix_of(&mut random, [48, k], &form), matrix_of(&mut random, [48, k], &form)],
                bias: None,
            };
            let layers: Vec<_> = (0..7).map(|_| layer()).collect();
            let per_product = if matches!(form, MatrixData::Dense { .. }) { 1 } else { 2 };
            assert_eq!(check(&layers, 1 << 20), 2 * per_product, "one launch for gate, one for up");
            assert!(check(&layers, 8 << 10) > 2 * per_product);
        }
        // One that has other numbers goes alone.
        let forms = forms(k);
        let mut layer =
            |form| LinearWeight { parts: vec![matrix_of(&mut random, [32, k], form)], bias: None };
        let layers = [layer(&forms[0]), layer(&forms[0]), layer(&forms[2]), layer(&forms[0])];
        assert_eq!(check(&layers, 1 << 20), 3);
    }
}
