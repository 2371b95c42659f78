//! Fuzz targets: everything that reads bytes of strangers, fed with mutated ones by libFuzzer. One program with all targets,
//! so that they are built once; `SPARK_FUZZ_TARGET` names the one to run. `cargo xtask fuzz` builds and runs them. Not part of
//! the product, and no other tests.
#![no_main]

mod answer;
mod chat;
mod checkpoint;
mod config;
mod engine;
mod folder;
mod frames;
mod grammar;
mod image;
mod template;

use std::sync::OnceLock;

/// Reads one input; a panic, a hang or much memory is a finding.
type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 8] = [
    ("answer", answer::run),
    ("chat", chat::run),
    ("checkpoint", checkpoint::run),
    ("config", config::run),
    ("frames", frames::run),
    ("grammar", grammar::run),
    ("image", image::run),
    ("template", template::run),
];

fn target() -> Target {
    let name = std::env::var("SPARK_FUZZ_TARGET").unwrap_or_default();
    match TARGETS.iter().find(|(known, _)| *known == name) {
        Some((_, target)) => *target,
        None => {
            let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            panic!("SPARK_FUZZ_TARGET is {name:?}; it must be one of {}", names.join(", "));
        }
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static TARGET: OnceLock<Target> = OnceLock::new();
    TARGET.get_or_init(target)(data);
});
