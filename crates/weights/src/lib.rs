//! Checkpoints on their way into memory: files, formats, quantisation schemes and shards. Not the mathematics of any
//! model, and no device: what comes out are the canonical host forms of `spark_backend`.
//!
//! The path of a weight, file by file: [`Checkpoint::open`] finds the folder (`locate`), reads the index and every
//! shard's header strictly (`header`, `checkpoint`) and brings names into one form (`names`). A model states its
//! parameters as [`ParamSpec`]s; `plan` finds the tensors behind each, deciding the scheme from what is there
//! (`scheme`), and turns them into byte ranges, of which `region` leaves what a rank needs; `read` fetches the ranges (direct IO or mmap),
//! `exchange` those that another rank reads, `convert` brings them
//! into canonical form, `shard` cuts a rank's part, and [`Params`] hands the result out. [`pull()`] brings a checkpoint
//! from a Hugging Face hub to where `locate` looks.
//!
//! ```no_run
//! use spark_weights::{Checkpoint, LoadOptions, OpenOptions, ParamSpec, Shard};
//!
//! let checkpoint = Checkpoint::open("Qwen/Qwen3-VL-30B-A3B-Instruct", &OpenOptions::default())?;
//! let specs = vec![
//!     ParamSpec::vector("model.language_model.norm.weight", [1, 2048]),
//!     ParamSpec::linear("model.language_model.layers.0.self_attn.o_proj", 2048, 4096, Shard::Columns),
//! ];
//! let mut params = checkpoint.load(&specs, &LoadOptions::default())?;
//! let norm = params.vector("model.language_model.norm.weight")?;
//! # let _ = norm;
//! # Ok::<(), spark_weights::Error>(())
//! ```
#![deny(unsafe_code)]

mod bits;
mod cache;
mod checkpoint;
mod convert;
mod dummy;
mod error;
mod exchange;
mod fill;
mod fp8;
mod header;
mod load;
mod locate;
mod names;
mod params;
mod plan;
mod pull;
mod read;
mod region;
mod scheme;
mod shard;
mod spec;
mod stream;
mod summary;
mod zeros;

#[cfg(test)]
mod tests;

pub use checkpoint::{Checkpoint, OpenOptions};
pub use dummy::{dummy, dummy_for_device};
pub use error::{Error, Result};
pub use exchange::{Exchange, ExchangeError};
pub use fp8::to_fp8;
pub use header::{DiskType, TensorInfo};
pub use load::{LoadOptions, LoadProgress, LoadStrategy, ProgressFn};
pub use names::normalise;
pub use params::{Param, Params};
pub use pull::{PullOptions, PullProgress, PullProgressFn, Pulled, pull};
pub use spec::{ParamKind, ParamSpec, Shard};
pub use summary::{HeldNumbers, PartSummary, RankSummary, SchemeSummary, Summary, held_numbers};
