//! Tests of the crate as a whole, on small checkpoints that they write themselves. Not the comparison with
//! transformers, which uses the fixtures.

mod cache;
pub(crate) mod dequantize;
mod exchange;
mod files;
mod hostile;
mod hub;
mod layout;
mod pull;
mod ranks;
mod schemes;
mod shards;
mod some;
mod stream;
mod whole_experts;
