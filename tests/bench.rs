//! `spark-engine bench` on the CPU: that it measures what it says, in the words of the benchmarks that users compare with. Not how
//! fast anything is.

use std::path::PathBuf;

use serde_json::Value;
use spark_testing::model_dir;

use crate::support::server::program;

/// Runs `bench` with `arguments` and a file for the results; returns stdout and the results.
fn bench(arguments: &[&str]) -> (String, Value) {
    let folder = tempfile::tempdir().unwrap();
    let json: PathBuf = folder.path().join("results.json");
    let mut command = program(&["bench"]);
    let output =
        command.args(arguments).args(["--device", "cpu", "--output-json"]).arg(&json).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    (stdout.into_owned(), serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap())
}

fn fixture(name: &str) -> String {
    model_dir(name).display().to_string()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, got {value}"))
}

#[test]
fn latency_has_the_fields_of_vllm() {
    let model = fixture("moe_vl_awq");
    let sizes = ["--input-len", "24", "--output-len", "6", "--batch-size", "3", "--num-iters", "4"];
    let (text, results) = bench(&[&["latency", &model, "--num-iters-warmup", "1"], &sizes[..]].concat());
    assert!(text.contains("Avg latency: ") && text.contains("99% percentile latency: "), "{text}");
    let latencies = results["latencies"].as_array().unwrap();
    assert_eq!(latencies.len(), 4);
    let mean = latencies.iter().map(number).sum::<f64>() / 4.0;
    assert!((number(&results["avg_latency"]) - mean).abs() < 1e-9);
    let percentiles = &results["percentiles"];
    assert!(number(&percentiles["10"]) <= number(&percentiles["99"]), "{percentiles}");
    // One prefill step at least, and a step for each further token; the last may not be counted yet.
    assert!(number(&results["num_steps"]) >= 5.0, "{results}");
    let times = [number(&results["median_ttft_ms"]), number(&results["median_tpot_ms"])];
    assert!(times.iter().all(|time| *time > 0.0) && times[0] <= 1e3 * mean * 4.0, "{results}");
    // Two of a row's, and no more than there are.
    let experts = number(&results["distinct_experts"]);
    assert!((2.0..=6.0).contains(&experts), "{results}");
    assert!(
        text.contains(&format!("Distinct experts of a layer in a decode step: {experts:.1}\n")),
        "{text}"
    );
    let engine = &results["engine"];
    assert_eq!(
        (engine["model"].as_str(), engine["kv_cache_dtype"].as_str()),
        (Some("moe_vl_awq"), Some("bf16"))
    );
    assert!(number(&engine["startup_s"]["ready"]) >= number(&engine["startup_s"]["load"]), "{engine}");
}

#[test]
fn throughput_counts_all_tokens() {
    let model = fixture("text_moe_bf16");
    let sizes = ["--num-prompts", "7", "--max-concurrency", "3", "--input-len", "10", "--output-len", "5"];
    let (text, results) = bench(&[&["throughput", &model], &sizes[..]].concat());
    assert!(text.contains("Total num prompt tokens:  70\nTotal num output tokens:  35\n"), "{text}");
    assert_eq!((&results["num_requests"], &results["total_num_tokens"]), (&7.into(), &105.into()));
    let elapsed = number(&results["elapsed_time"]);
    assert!((number(&results["tokens_per_second"]) * elapsed - 105.0).abs() < 1e-6);
    assert!((number(&results["requests_per_second"]) * elapsed - 7.0).abs() < 1e-6);
}

#[test]
fn a_table_has_a_row_for_each_size() {
    let config = fixture("moe_vl_bf16");
    for quantization in ["awq", "nvfp4", "fp8", "none"] {
        let sizes = ["--pp", "48,2x32", "--tg", "4", "--batch", "1,3", "--depth", "8", "--repetitions", "2"];
        let model = ["table", "--config", &config, "--quantization", quantization];
        let (text, results) = bench(&[&model[..], &sizes[..]].concat());
        assert!(text.contains(&format!("weights random, {quantization}")), "{text}");
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| ")).skip(2).collect();
        let starts = ["| pp48           |     1 |", "| pp32           |     2 |"];
        let starts = starts.into_iter().chain(["| tg4 @ d8       |     1 |", "| tg4 @ d8       |     3 |"]);
        assert!(starts.zip(&rows).all(|(start, row)| row.starts_with(start)), "{text}");
        let tests = results["tests"].as_array().unwrap();
        assert_eq!((rows.len(), tests.len()), (4, 4), "{text}");
        for test in tests {
            assert_eq!(test["samples_ts"].as_array().unwrap().len(), 2, "{test}");
            assert!(number(&test["avg_ts"]) > 0.0, "{test}");
        }
        // A single row has the experts that it chooses; a prefill has no decode step.
        assert_eq!(number(&tests[2]["distinct_experts"]), 2.0, "{tests:?}");
        assert!(
            number(&tests[3]["distinct_experts"]) > 2.0 && tests[0]["distinct_experts"].is_null(),
            "{tests:?}"
        );
        let decode = &tests[3];
        assert_eq!(
            (&decode["n_gen"], &decode["n_depth"], &decode["n_batch"]),
            (&4.into(), &8.into(), &3.into())
        );
        assert!(number(&decode["decode_ts"]) > 0.0, "{decode}");
    }
}

#[test]
fn pictures_a_second_are_measured_together_and_one_by_one() {
    let config = fixture("moe_vl_bf16");
    let images = "3x32,1x64,2x32+1x64x32+1xmixed";
    for (flag, how) in [("--one-by-one", "one by one"), ("--repetitions=2", "together")] {
        let arguments = ["vision", "--config", &config, "--images", images, "--repetitions", "2", flag];
        let (text, results) = bench(&arguments);
        assert!(text.contains(&format!("pictures {how}")) && text.contains("| 3x32 "), "{text}");
        let tests = results["tests"].as_array().unwrap();
        assert_eq!(tests.len(), 3);
        for (test, (images, side, patches)) in
            tests.iter().zip([(3, Some(32), 12), (1, Some(64), 16), (4, None, 8 + 8 + 900)])
        {
            assert_eq!(test["samples_s"].as_array().unwrap().len(), 2, "{test}");
            assert!(number(&test["avg_images_per_second"]) > 0.0, "{test}");
            assert!(number(&test["avg_patches_per_second"]) > number(&test["avg_images_per_second"]));
            assert_eq!(test["images"], images, "{test}");
            assert_eq!(test["side"].as_u64(), side, "{test}");
            assert_eq!((&test["patches"], &test["largest_share"]), (&patches.into(), &1.0.into()), "{test}");
        }
        assert_eq!(tests[2]["sizes"], serde_json::json!([[32, 32], [32, 32], [64, 32], [480, 480]]));
    }
    let text_model = fixture("text_moe_bf16");
    let error = refused(&["vision", "--config", &text_model, "--device", "cpu"]);
    assert!(error.contains("no encoder"), "{error}");
    let error = refused(&["vision", "--config", &config, "--images", "1x50", "--device", "cpu"]);
    assert!(error.contains("a multiple of"), "{error}");
}

/// Two ranks divide pictures by patches, or split the encoder's weights, if there are heads for that.
#[test]
fn pictures_a_second_are_measured_with_ranks() {
    let config = fixture("moe_vl_bf16");
    let arguments = ["vision", "--config", &config, "--images", "3x32+1x64x32", "--tp", "2", "-r", "1"];
    for (mode, share) in [("data", 0.6), ("weights", 1.0)] {
        let (text, results) = bench(&[&arguments[..], &["--mm-encoder-tp-mode", mode]].concat());
        assert_eq!(number(&results["tests"][0]["largest_share"]), share, "8 and 4 of 20, or all: {text}");
    }
    let one_head = fixture("dense_vl_bf16_tied");
    let error = refused(&[
        "vision",
        "--config",
        &one_head,
        "--device",
        "cpu",
        "--tp",
        "2",
        "--mm-encoder-tp-mode",
        "weights",
    ]);
    for part in ["vision_config.num_heads: 1", "2 ranks", "--mm-encoder-tp-mode data over 1, 2, 4"] {
        assert!(error.contains(part), "{error}");
    }
}

/// The error of `bench` with `arguments`.
fn refused(arguments: &[&str]) -> String {
    let output = program(&["bench"]).args(arguments).output().unwrap();
    assert!(!output.status.success(), "{arguments:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let model = fixture("moe_vl_bf16");
    let error = refused(&["latency", &model, "--quantization", "awq", "--device", "cpu"]);
    assert!(error.contains("--quantization") && error.contains("--config"), "{error}");
    let error = refused(&["latency", "--config", &model, "--load-format", "auto"]);
    assert!(error.contains("random weights only"), "{error}");
    let error = refused(&["latency", "--config", "qwen3-31b"]);
    assert!(error.contains("qwen3-31b"), "{error}");
    let error = refused(&["latency", &model, "--batch-size", "0"]);
    assert!(error.contains("--batch-size"), "{error}");
}

/// On a machine without a GPU; with one, float32 is what is refused.
#[test]
fn a_gpu_is_used_when_asked_for_or_the_start_says_why_not() {
    let model = fixture("moe_vl_bf16");
    let error = refused(&["latency", &model, "--device", "cuda", "--dtype", "float32"]);
    assert!(
        error.contains("--dtype: a GPU computes in bfloat16 only") || error.contains("--device: cuda"),
        "{error}"
    );
}
