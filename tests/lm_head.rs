//! An output head that is made FP8 while it is loaded: what it costs in answers, and that `inspect` knows its
//! bytes.

use std::path::PathBuf;

use serde_json::Value;
use spark_engine::{Dtype, EngineBuilder, HeadDtype, SparkEngine};
use spark_testing::model_dir;

use crate::support::{
    server::program,
    taught::{Difference, other_answers, taught},
};

fn demo(head: HeadDtype) -> SparkEngine {
    let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "models/spark-tiny-vl/bf16"].iter().collect();
    let builder = EngineBuilder::new(folder.display().to_string()).dtype(Dtype::Bf16).threads(2);
    let builder = builder.lm_head_dtype(head).engine(|options| {
        options.max_model_len = Some(1024);
        options.max_num_seqs = 4;
        options.kv_cache_memory_bytes = Some(32 << 20);
    });
    builder.build().unwrap()
}

/// The demo model's head is its embeddings, of 128 inputs: a scale for each row.
#[test]
#[expect(clippy::print_stdout, reason = "what it costs is part of the result")]
fn an_fp8_head_says_what_a_bf16_head_says() {
    let [bf16, fp8] = [HeadDtype::Bf16, HeadDtype::Fp8].map(demo);
    let texts = taught(&bf16, 4);
    assert!(texts.len() >= 12, "{}", texts.len());
    let difference = Difference::of(&bf16, &fp8, &texts);
    let (others, all) = (other_answers(&bf16, &fp8, &texts), texts.len());
    let same = all - others.len();
    println!("{}; {same} of {all} greedy answers are the same, not {others:?}", difference.line());
    assert!(difference.mean > 0.0, "the head was not quantised");
    assert!(difference.mean < 0.02, "{}", difference.line());
    assert!(10 * same >= 9 * all, "only {same} of {all} answers are the same");
}

fn inspect(model: &str, arguments: &[&str]) -> Result<Value, String> {
    let mut command = program(&["inspect", "--json"]);
    let output = command.arg(model_dir(model)).args(arguments).output().unwrap();
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn inspect_counts_the_heads_bytes() {
    for (model, world) in [("moe_vl_bf16", "1"), ("dense_vl_bf16_tied", "1"), ("moe_vl_bf16", "2")] {
        let held = |arguments: &[&str]| {
            let report = inspect(model, &[&["--tp", world], arguments].concat()).unwrap();
            let ranks = report["ranks"].as_array().unwrap();
            let bytes: u64 = ranks.iter().map(|rank| rank["bytes_held"].as_u64().unwrap()).sum();
            (bytes, report)
        };
        let (auto, report) = held(&[]);
        let (fp8, _) = held(&["--lm-head-dtype", "fp8"]);
        let number = |key: &str| report["text"][key].as_u64().unwrap();
        let (rows, k) = (number("vocab_size"), number("hidden_size"));
        let after = rows * (k + 4 * k.div_ceil(128));
        let before = if report["lm_head"] == "own tensor" { 2 * rows * k } else { 0 };
        assert_eq!(fp8, auto + after - before, "{model}, {world} ranks");
    }
}
