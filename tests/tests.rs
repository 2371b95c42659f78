//! Integration tests of the whole engine; one module a property. Shared helpers are in `support/`.

mod golden;
mod invariance;
mod library;
mod support;
