//! Integration tests of the whole engine; one module a property. Shared helpers are in `support/`.
#![allow(clippy::unwrap_used, reason = "all of this is test code: a panic is a failed test")]

mod attacks;
mod bad_input;
mod batch;
mod bench;
mod bench_serve;
mod clients;
mod dashboard;
mod demo;
mod doctor;
mod eval;
mod fields;
mod golden;
mod invariance;
mod library;
mod lm_head;
mod load;
mod mistakes;
mod operation;
mod process;
mod quantize;
mod ranks;
mod server;
mod structured;
mod support;
mod video;
