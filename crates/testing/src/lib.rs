//! What every test needs and no product code may use: golden files, seeded data, error measures, tolerances.
//!
//! A dev-dependency only. It knows nothing of models, devices or requests: plain vectors, shapes and token ids.
//! The fixtures it reads are described in `tests/fixtures/README.md`.
#![forbid(unsafe_code)]

mod compare;
mod error;
mod fault_proxy;
mod fixtures;
mod local_group;
mod network;
mod oracle;
mod random;
mod tensors;
pub mod tolerance;

pub use compare::{Divergence, calc_diff, first_divergence, kl_divergence, max_abs_diff, rel_err};
pub use error::{Error, Result};
pub use fault_proxy::{Direction, FaultProxy};
pub use fixtures::{fixtures_dir, media_bytes, media_path, model_dir, model_names, read_json, repository};
pub use local_group::LocalGroup;
pub use network::{MTU, Network};
pub use oracle::{Case, Oracle, RankedStep};
pub use random::Random;
pub use tensors::{Tensors, Values};
