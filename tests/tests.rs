//! Integration tests of the whole engine; one module a property. Shared helpers are in `support/`.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]

mod bad_input;
mod batch;
mod bench;
mod demo;
mod eval;
mod fields;
mod golden;
mod invariance;
mod library;
mod process;
mod quantize;
mod server;
mod structured;
mod support;
