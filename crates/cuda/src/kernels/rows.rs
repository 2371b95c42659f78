//! Wrappers of `kernels/rows.cu`, and copies of rows: what moves, adds and activates bf16 activations.

use spark_backend::{Activation, Dtype, Rank};

use super::{Kernels, LoadedModule, disjoint, to_u32, words};
use crate::launch::{Kernel, Launch, Params};
use crate::{DeviceSlice, Error, Result, Stream, Tensor};

/// Elements of 16 bytes.
const VECTOR: usize = 8;
const NUM_THREADS: u32 = 256;
/// Columns of a block of `join_columns`.
const JOIN_COLUMNS: usize = 4 * NUM_THREADS as usize;

/// `GatherParams` of `kernels/rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct GatherParams {
    source: u64,
    rows: u64,
    out: u64,
    row_vectors: u32,
    source_rows: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 3 * 8 + 2 * 4 bytes, no padding.
unsafe impl Params for GatherParams {
    const NAME: &'static str = "GatherParams";
}

/// `JoinParams` of `kernels/rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct JoinParams {
    parts: u64,
    out: u64,
    part_length: u64,
    columns: u32,
    each: u32,
    more: u32,
    unused: u32,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 3 * 8 + 4 * 4 bytes, no padding.
unsafe impl Params for JoinParams {
    const NAME: &'static str = "JoinParams";
}

/// `ElementsParams` of `kernels/rows.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct ElementsParams {
    x: u64,
    y: u64,
    num_vectors: u64,
}

// SAFETY: the fields are those of the kernel's struct in the same order; 3 * 8 bytes, no padding.
unsafe impl Params for ElementsParams {
    const NAME: &'static str = "ElementsParams";
}

#[derive(Debug)]
pub(super) struct Rows {
    gather: Kernel<GatherParams>,
    join: Kernel<JoinParams>,
    add: Kernel<ElementsParams>,
    silu: Kernel<ElementsParams>,
    gelu_tanh: Kernel<ElementsParams>,
    gelu_erf: Kernel<ElementsParams>,
}

impl Rows {
    pub(super) fn new(module: &LoadedModule) -> Result<Self> {
        Ok(Self {
            gather: Kernel::new(module, "gather_rows", 0)?,
            join: Kernel::new(module, "join_columns", 0)?,
            add: Kernel::new(module, "add", 0)?,
            silu: Kernel::new(module, "activate_silu", 0)?,
            gelu_tanh: Kernel::new(module, "activate_gelu_tanh", 0)?,
            gelu_erf: Kernel::new(module, "activate_gelu_erf", 0)?,
        })
    }
}

/// Some rows of a tensor and as many of another.
#[derive(Debug, Clone, Copy)]
pub struct RowRange {
    /// First row of the tensor that is changed.
    pub row: usize,
    /// First row of the source.
    pub source_row: usize,
    /// How many.
    pub rows: usize,
}

impl Kernels {
    /// `out[i] = source[rows[i]]`: `source` `[_, columns]`, `rows` `[rows of out]` u32, `out` `[_, columns]`. Zeros for a row
    /// that is not there.
    ///
    /// # Errors
    /// [`Error::Shape`], also for columns that are not a multiple of 8; [`Error::Driver`].
    pub fn gather_rows(
        &self,
        stream: &Stream,
        source: &Tensor,
        rows: &DeviceSlice,
        out: &Tensor,
    ) -> Result<()> {
        const OP: &str = "gather_rows";
        let columns = out.columns();
        source.expect(OP, [source.rows(), columns], Dtype::Bf16)?;
        out.expect(OP, [out.rows(), columns], Dtype::Bf16)?;
        whole_vectors(OP, columns)?;
        words(OP, rows, out.rows())?;
        stream.uses(OP, &[source.slice(), rows, out.slice()])?;
        disjoint(OP, out.slice(), &[source.slice(), rows])?;
        let params = GatherParams {
            source: source.address(),
            rows: rows.address(),
            out: out.address(),
            row_vectors: to_u32(OP, columns / VECTOR)?,
            source_rows: to_u32(OP, source.rows())?,
        };
        let num_threads = params.row_vectors.next_multiple_of(32).clamp(32, NUM_THREADS);
        let launch = Launch::blocks(to_u32(OP, out.rows())?, num_threads);
        // SAFETY: source, rows and result have the sizes that the parameters say and do not overlap; the kernel checks every
        // row.
        unsafe { self.rows.gather.launch(stream, launch, &params) }
    }

    /// Puts the columns of ranks side by side: `parts` `[world][part_length]` f32, of which the first `[rows, share]` are rank r's
    /// [share](Rank::range) of the columns of `out` `[rows, columns]` f32.
    ///
    /// # Errors
    /// [`Error::Shape`], also for parts that are too short; [`Error::Driver`].
    pub fn join_columns(
        &self,
        stream: &Stream,
        parts: &DeviceSlice,
        part_length: usize,
        world: usize,
        out: &Tensor,
    ) -> Result<()> {
        const OP: &str = "join_columns";
        let [rows, columns] = out.shape();
        out.expect(OP, [rows, columns], Dtype::F32)?;
        let Some(first) = Rank::new(0, world) else {
            return Err(Error::shape(OP, "at least one rank", world));
        };
        let needed = rows.saturating_mul(first.range(columns).len());
        if part_length < needed {
            return Err(Error::shape(OP, format!("parts of {needed} columns"), part_length));
        }
        words(OP, parts, part_length.saturating_mul(world))?;
        stream.uses(OP, &[parts, out.slice()])?;
        disjoint(OP, out.slice(), &[parts])?;
        let params = JoinParams {
            parts: parts.address(),
            out: out.address(),
            part_length: part_length as u64,
            columns: to_u32(OP, columns)?,
            each: to_u32(OP, columns / world)?,
            more: to_u32(OP, columns % world)?,
            unused: 0,
        };
        let grid = [to_u32(OP, columns.div_ceil(JOIN_COLUMNS))?, to_u32(OP, rows)?, 1];
        // SAFETY: every part holds the rank's share of every row, the result all of them; the ranges of ranks are those of
        // `Rank::range`, as in the kernel.
        unsafe {
            self.rows.join.launch(stream, Launch { grid, num_threads: NUM_THREADS, shared_bytes: 0 }, &params)
        }
    }

    /// Overwrites rows of `x` with rows of `source`; both `[_, columns]` of one dtype.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Driver`].
    pub fn set_rows(&self, stream: &Stream, x: &Tensor, source: &Tensor, range: RowRange) -> Result<()> {
        let [target, source] = row_slices("set_rows", [x, source], range)?;
        stream.copy(&target, &source)
    }

    /// Adds rows of `source` to rows of `x`; both `[_, columns]` bf16, whole vectors of 16 bytes.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Driver`].
    pub fn add_rows(&self, stream: &Stream, x: &Tensor, source: &Tensor, range: RowRange) -> Result<()> {
        const OP: &str = "add_rows";
        x.expect(OP, x.shape(), Dtype::Bf16)?;
        whole_vectors(OP, x.columns())?;
        let [target, source] = row_slices(OP, [x, source], range)?;
        self.add_elements(OP, stream, &target, &source)
    }

    /// `x += y`; both of one shape, bf16.
    ///
    /// # Errors
    /// [`Error::Shape`], also when the size is not a multiple of 8 elements; [`Error::Driver`].
    pub fn add(&self, stream: &Stream, x: &Tensor, y: &Tensor) -> Result<()> {
        const OP: &str = "add";
        x.expect(OP, x.shape(), Dtype::Bf16)?;
        y.expect(OP, x.shape(), Dtype::Bf16)?;
        whole_vectors(OP, x.rows() * x.columns())?;
        self.add_elements(OP, stream, x.slice(), y.slice())
    }

    fn add_elements(
        &self,
        op: &'static str,
        stream: &Stream,
        x: &DeviceSlice,
        y: &DeviceSlice,
    ) -> Result<()> {
        stream.uses(op, &[x, y])?;
        disjoint(op, x, &[y])?;
        self.elements(op, stream, &self.rows.add, x, y)
    }

    /// Applies `activation` to every element of `x`, bf16.
    ///
    /// # Errors
    /// [`Error::Shape`], also when the size is not a multiple of 8 elements; [`Error::Driver`].
    pub fn activate(&self, stream: &Stream, x: &Tensor, activation: Activation) -> Result<()> {
        const OP: &str = "activate";
        x.expect(OP, x.shape(), Dtype::Bf16)?;
        whole_vectors(OP, x.rows() * x.columns())?;
        stream.uses(OP, &[x.slice()])?;
        let kernel = match activation {
            Activation::Silu => &self.rows.silu,
            Activation::GeluTanh => &self.rows.gelu_tanh,
            Activation::GeluErf => &self.rows.gelu_erf,
        };
        self.elements(OP, stream, kernel, x.slice(), x.slice())
    }

    /// Launches `kernel` over the elements of `x` and, where it takes two, of `y`: as many, of this device.
    fn elements(
        &self,
        op: &'static str,
        stream: &Stream,
        kernel: &Kernel<ElementsParams>,
        x: &DeviceSlice,
        y: &DeviceSlice,
    ) -> Result<()> {
        let num_vectors = x.num_bytes() / 16;
        if x.num_bytes() != y.num_bytes() || !(x.address() | y.address()).is_multiple_of(16) {
            let expected = "as many elements of both, from addresses aligned to 16 bytes";
            return Err(Error::shape(op, expected, (x.num_bytes(), y.num_bytes())));
        }
        let num_blocks = num_vectors.div_ceil(u64::from(NUM_THREADS));
        let launch = Launch::blocks(to_u32(op, num_blocks as usize)?, NUM_THREADS);
        let params = ElementsParams { x: x.address(), y: y.address(), num_vectors };
        // SAFETY: both slices hold `num_vectors` aligned vectors of bf16 numbers.
        unsafe { kernel.launch(stream, launch, &params) }
    }
}

fn whole_vectors(op: &'static str, count: usize) -> Result<()> {
    match count.is_multiple_of(VECTOR) {
        true => Ok(()),
        false => Err(Error::shape(op, format!("a multiple of {VECTOR} elements"), count)),
    }
}

/// The bytes of a range of rows in `x` and in the source.
fn row_slices(
    op: &'static str,
    [x, source]: [&Tensor; 2],
    RowRange { row, source_row, rows }: RowRange,
) -> Result<[DeviceSlice; 2]> {
    source.expect(op, [source.rows(), x.columns()], x.dtype())?;
    let row_bytes = (x.columns() * x.dtype().size()) as u64;
    let slice = |tensor: &Tensor, first: usize| {
        if first.checked_add(rows).is_none_or(|end| end > tensor.rows()) {
            return Err(Error::shape(op, format!("rows within {}", tensor.rows()), (first, rows)));
        }
        tensor.slice().slice(first as u64 * row_bytes, rows as u64 * row_bytes)
    };
    Ok([slice(x, row)?, slice(source, source_row)?])
}
