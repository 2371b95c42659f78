//! What the program says to somebody who has asked for what cannot be, and when: before anything is loaded, prepared or measured.
//! Broken checkpoints are in `process`.

use std::path::Path;

use spark_testing::model_dir;

use crate::{
    server::MODEL,
    support::server::{SMALL, program},
};

/// Runs the program, which has to fail without a result; returns its messages.
fn failure(arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let output = program(arguments).envs(variables.iter().copied()).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    message
}

fn fixture(name: &str) -> String {
    model_dir(name).display().to_string()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn pull_trusts_the_certificates_that_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = folder.path().join("own.pem");
    let variables = [
        ("SSL_CERT_FILE", text(&certificates)),
        // Nobody listens there.
        ("HF_ENDPOINT", "https://127.0.0.1:1"),
        ("HF_HUB_CACHE", text(folder.path())),
    ];
    let message = failure(&["pull", "owner/name"], &variables);
    assert!(message.contains("SSL_CERT_FILE") && message.contains("own.pem"), "{message}");
}

#[test]
fn a_model_without_a_chat_template_is_asked_with_raw() {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(model_dir(MODEL)).unwrap() {
        let from = entry.unwrap().path();
        let name = from.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("oracle") && !name.starts_with("chat_template") {
            std::fs::copy(&from, folder.path().join(name)).unwrap();
        }
    }
    let message = failure(&[&["generate", text(folder.path()), "Hello!"], &SMALL[..]].concat(), &[]);
    assert!(message.contains("--raw") && !message.contains("/v1/"), "{message}");
}

#[test]
fn an_unknown_machine_is_named_with_its_flag() {
    // No resolver is asked for names with spaces.
    for flags in [["--nodes", "no such,nor this"], ["--leader", "no such"]] {
        let message =
            failure(&[&["generate", &fixture(MODEL), "--raw", "x", "--tp", "2"], &flags[..]].concat(), &[]);
        assert!(message.contains(&format!("{} no such: ", flags[0])), "{message}");
    }
}

#[test]
fn results_that_cannot_be_written_are_not_measured() {
    let folder = tempfile::tempdir().unwrap();
    let (missing, there) = (folder.path().join("missing/results.json"), folder.path().join("earlier.json"));
    std::fs::write(&there, "earlier results").unwrap();
    let model = fixture(MODEL);
    let sizes = ["--input-len", "4", "--output-len", "2", "--batch-size", "1", "--num-iters", "1"];
    let latency = [&["bench", "latency", &model, "--device", "cpu"], &sizes[..]].concat();
    let serve = ["bench", "serve", "--base-url", "http://127.0.0.1:1"].to_vec();
    for command in [latency, serve] {
        for path in [&missing, &folder.path().to_owned()] {
            let message = failure(&[&command[..], &["--output-json", text(path)]].concat(), &[]);
            assert!(message.contains(&format!("--output-json {}", text(path))), "{message}");
        }
    }
    let saved = ["bench", "serve", "--base-url", "http://127.0.0.1:1", "--save-result", "--result-dir"];
    let message = failure(&[&saved[..], &[text(&folder.path().join("missing"))]].concat(), &[]);
    assert!(message.contains("--result-dir"), "{message}");
    // What fails later leaves earlier results as they were.
    failure(&["bench", "latency", "/no/such/model", "--output-json", text(&there)], &[]);
    assert_eq!(std::fs::read_to_string(&there).unwrap(), "earlier results");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn quantize_looks_at_model_and_folder_before_it_prepares_prompts() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a"), "taken").unwrap();
    let fresh = folder.path().join("fresh");
    for (model, out, format, rule) in [
        ("dense_vl_bf16", folder.path(), "nvfp4", "is not empty"),
        ("dense_vl_awq", &fresh, "nvfp4", "quantised already"),
        // Its experts' inner size.
        ("moe_vl_bf16", &fresh, "awq", "multiples of the group size"),
    ] {
        let flags = ["--format", format, "--calibration", "/no/such/prompts", "--out", text(out)];
        let message = failure(&[&["quantize", &fixture(model)], &flags[..]].concat(), &[]);
        assert!(message.contains(rule), "{message}");
    }
    assert!(!fresh.exists());
}
