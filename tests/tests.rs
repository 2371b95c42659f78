//! Integration tests of the whole engine; one module a property. Shared helpers are in `support/`.

mod bad_input;
mod batch;
mod fields;
mod golden;
mod invariance;
mod library;
mod process;
mod server;
mod support;
