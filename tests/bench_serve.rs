//! `spark-engine bench serve` against a server of a fixture: that every request arrives as it says, and that its numbers are
//! those of the server. Not how fast anything is.

use std::path::PathBuf;

use serde_json::Value;

use crate::{
    server::MODEL,
    support::server::{Server, program},
};

/// Runs `bench serve` against `server`; returns whether it ended well, stdout, stderr and the results, if there are any.
fn bench(server: &Server, flags: &[&str]) -> (bool, String, String, Value) {
    let folder = tempfile::tempdir().unwrap();
    let json: PathBuf = folder.path().join("results.json");
    let mut command = program(&["bench", "serve", "--base-url", &server.url(), "--output-json"]);
    command.arg(&json).args(flags).env_remove("OPENAI_API_KEY");
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let results = std::fs::read(&json).map_or(Value::Null, |bytes| serde_json::from_slice(&bytes).unwrap());
    (output.status.success(), text(&output.stdout), text(&output.stderr), results)
}

fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or_else(|| panic!("{name} is no number in {value}"))
}

#[test]
fn its_counts_are_those_of_the_server() {
    // The name says nothing about where the model is, so its tokenizer is the server's.
    let server = Server::start(MODEL, &["--served-model-name", "a-name"]);
    let sizes = ["--num-prompts", "12", "--input-len", "20", "--output-len", "5", "--max-concurrency", "4"];
    let flags = ["--save-detailed", "--goodput", "ttft:100000", "e2el:0.001"];
    let (is_success, text, log, results) = bench(&server, &[&sizes[..], &flags].concat());
    assert!(is_success, "{log}");
    assert!(
        text.contains("Successful requests:                     12") && text.contains("P99 ITL (ms):"),
        "{text}"
    );
    assert_eq!((number(&results, "completed"), number(&results, "failed")), (12.0, 0.0));
    assert_eq!(
        (&results["model_id"], &results["tokenizer_id"]),
        (&"a-name".into(), &"/tokenize of a-name".into())
    );
    assert_eq!(number(&results, "total_output_tokens"), 60.0);
    // One more request went before, which does not count.
    assert_eq!(server.metric("vllm:generation_tokens_total"), 65.0);
    let lens: f64 = results["input_lens"].as_array().unwrap().iter().map(|len| len.as_f64().unwrap()).sum();
    assert_eq!(lens, number(&results, "total_input_tokens"));
    assert_eq!(lens, number(&results, "server_input_tokens"), "the client counts tokens as the server does");
    let duration = number(&results, "duration");
    assert!((number(&results, "output_throughput") * duration - 60.0).abs() < 1e-6);
    assert!((number(&results, "request_throughput") * duration - 12.0).abs() < 1e-6);
    assert_eq!(number(&results, "request_goodput"), 0.0, "no answer takes a microsecond");
    assert!(number(&results, "max_concurrent_requests") <= 4.0);
    assert!(number(&results, "median_ttft_ms") <= number(&results, "median_e2el_ms"));
    assert!(
        results["ttfts"].as_array().unwrap().iter().all(|ttft| ttft.as_f64().unwrap() > 0.0),
        "{results}"
    );
}

#[test]
fn pictures_go_over_chat_and_a_sweep_is_a_table() {
    let server = Server::start(MODEL, &["--api-key", "k"]);
    let flags = ["--api-key", "k", "--num-prompts", "4", "--input-len", "8", "--output-len", "3"];
    let pictures = ["--backend", "openai-chat", "--dataset-name", "random-mm", "--random-mm-size", "64x64"];
    let sweep = ["--sweep-max-concurrency", "1,4"];
    let (is_success, text, log, results) = bench(&server, &[&flags[..], &pictures, &sweep].concat());
    assert!(is_success, "{log}");
    let runs = results["sweep"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    for (run, limit) in runs.iter().zip([1.0, 4.0]) {
        assert_eq!((number(run, "completed"), number(run, "max_concurrency")), (4.0, limit));
        assert!(
            number(run, "server_input_tokens") > number(run, "total_input_tokens"),
            "pictures are tokens too"
        );
    }
    assert!(
        text.contains("| at once |") && text.lines().last().unwrap().starts_with("|       4 |    inf |"),
        "{text}"
    );
}

#[test]
fn what_a_server_refuses_is_said() {
    let server = Server::start(MODEL, &["--api-key", "k", "--max-model-len", "64"]);
    let (is_success, _, log, _) = bench(&server, &["--num-prompts", "1"]);
    assert!(!is_success && log.contains("asking for its models") && log.contains("HTTP 401"), "{log}");
    let flags = ["--api-key", "k", "--num-prompts", "2", "--input-len", "100"];
    let (is_success, text, log, _) = bench(&server, &flags);
    assert!(
        !is_success && log.contains("the first request has failed") && log.contains("max_model_len"),
        "{log}"
    );
    assert_eq!(text, "");
    let (is_success, text, log, results) = bench(&server, &[&flags[..], &["--num-warmups", "0"]].concat());
    assert!(!is_success && log.contains("2 requests have failed: HTTP 400"), "{log}");
    assert!(text.contains("Failed requests:                         2"), "{text}");
    assert_eq!(number(&results, "failed"), 2.0);
}
