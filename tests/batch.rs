//! `batch`: every line answered once and in order, whatever happens in between.

use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Instant,
};

use serde_json::{Value, json};
use spark_testing::Oracle;

use crate::{
    server::{CHAT, COMPLETIONS, MODEL},
    support::{
        chat_body,
        server::{DEADLINE, SMALL, program, wait_for_exit},
    },
};

const NUM_LINES: usize = 200;
/// Lines (from 0) that are no requests: the first is not JSON, the second has a URL that no batch can have.
const MALFORMED: usize = 7;
const UNSUPPORTED: usize = 23;

/// A batch of chats, some with an image, and completions, greedy and sampled.
fn requests() -> String {
    let cases = Oracle::load(MODEL).unwrap().cases;
    let line = |i: usize| {
        let max_tokens = 30 + i % 11;
        let (url, body) = match i % 4 {
            0 => (CHAT, chat_body(&cases[["text", "image0", "image1"][i / 4 % 3]], max_tokens)),
            1 => (
                COMPLETIONS,
                json!({"prompt": format!("Line {i}"), "max_tokens": max_tokens, "temperature": 0}),
            ),
            _ => (
                COMPLETIONS,
                json!({"prompt": ["a", "b"], "max_tokens": max_tokens, "temperature": 1, "seed": i}),
            ),
        };
        let url = if i == UNSUPPORTED { "/v1/embeddings" } else { url };
        json!({"custom_id": format!("request-{i}"), "method": "POST", "url": url, "body": body}).to_string()
    };
    let lines = (0..NUM_LINES).map(|i| if i == MALFORMED { "{\"custom_id\": ".to_owned() } else { line(i) });
    lines.collect::<Vec<_>>().join("\n")
}

fn arguments(input: &Path, output: &Path) -> Vec<String> {
    let folder = spark_testing::model_dir(MODEL);
    let paths = ["batch".into(), folder, "-i".into(), input.into(), "-o".into(), PathBuf::from(output)];
    let paths = paths.map(|path: PathBuf| path.display().to_string());
    paths.into_iter().chain(SMALL.map(String::from)).chain(["--max-inflight".into(), "8".into()]).collect()
}

fn run(input: &Path, output: &Path) -> Output {
    let arguments = arguments(input, output);
    program(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap()
}

/// Runs a batch and kills it when its output has `num_lines` lines.
fn run_and_kill(input: &Path, output: &Path, num_lines: usize) {
    let arguments = arguments(input, output);
    let mut command = program(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while num_newlines(output) < num_lines {
        assert!(
            start.elapsed() < DEADLINE && child.try_wait().unwrap().is_none(),
            "{} lines",
            num_newlines(output)
        );
        std::thread::yield_now();
    }
    child.kill().unwrap();
    assert_eq!(wait_for_exit(&mut child, DEADLINE).code(), None, "it was killed, so it has no exit code");
}

fn num_newlines(path: &Path) -> usize {
    std::fs::read(path).unwrap_or_default().iter().filter(|&&byte| byte == b'\n').count()
}

fn succeed(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The answers without what differs between two runs: ids of answers, when they were made, and what the prefix cache had.
fn answers(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let parse = |line: &str| {
        let mut answer: Value = serde_json::from_str(line).unwrap();
        let response = &mut answer["response"];
        response["request_id"].take();
        if let Some(body) = response["body"].as_object_mut() {
            body.remove("id");
            body.remove("created");
        }
        if let Some(usage) = response["body"]["usage"].as_object_mut() {
            usage.remove("prompt_tokens_details");
        }
        answer
    };
    assert!(text.ends_with('\n'));
    text.lines().map(parse).collect()
}

#[test]
fn a_killed_batch_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let [input, whole, killed] =
        ["in.jsonl", "whole.jsonl", "killed.jsonl"].map(|name| folder.path().join(name));
    std::fs::write(&input, requests()).unwrap();
    succeed(&run(&input, &whole));
    let expected = answers(&whole);
    check_uninterrupted(&expected);

    run_and_kill(&input, &killed, 20);
    let done = num_newlines(&killed);
    assert!((20..NUM_LINES).contains(&done), "killed after {done} lines");
    run_and_kill(&input, &killed, done + 20);
    // What a kill in the middle of a write leaves.
    let mut torn = std::fs::read(&killed).unwrap();
    assert!(num_newlines(&killed) < NUM_LINES);
    torn.extend(b"{\"id\":\"batch_req_");
    std::fs::write(&killed, torn).unwrap();
    succeed(&run(&input, &killed));
    let resumed = answers(&killed);
    assert_eq!(resumed.len(), NUM_LINES);
    for (i, (resumed, expected)) in resumed.iter().zip(&expected).enumerate() {
        assert_eq!(resumed, expected, "line {}", i + 1);
    }

    // Nothing is left to do: the file stays as it is.
    let before = std::fs::read(&killed).unwrap();
    succeed(&run(&input, &killed));
    assert_eq!(std::fs::read(&killed).unwrap(), before);
    refuse_another_batch(&input, &killed);
}

fn check_uninterrupted(answers: &[Value]) {
    assert_eq!(answers.len(), NUM_LINES);
    for (i, answer) in answers.iter().enumerate() {
        let status = &answer["response"]["status_code"];
        match i {
            MALFORMED => {
                assert_eq!(answer["custom_id"], Value::Null);
                assert!(answer.to_string().contains("line 8: not JSON"), "{answer}");
            }
            UNSUPPORTED => {
                assert_eq!(answer["custom_id"], "request-23");
                assert_eq!(status, 404, "{answer}");
                assert!(answer.to_string().contains("/v1/embeddings"), "{answer}");
            }
            _ => {
                assert_eq!(answer["custom_id"], format!("request-{i}"));
                assert_eq!((status, &answer["error"]), (&json!(200), &Value::Null), "{answer}");
                let num_tokens = answer["response"]["body"]["usage"]["completion_tokens"].as_u64();
                assert!(num_tokens > Some(0), "{answer}");
            }
        }
    }
    let oracle = Oracle::load(MODEL).unwrap();
    let ids = crate::support::ids(&answers[4]["response"]["body"]["choices"][0]["token_ids"]);
    assert_eq!(ids, oracle.cases["image0"].greedy_ids[..34], "line 5 is the oracle's first image");
}

fn refuse_another_batch(input: &Path, output: &Path) {
    let other = input.with_file_name("other.jsonl");
    std::fs::write(&other, requests().replace("request-3\"", "another-3\"")).unwrap();
    refuse(&other, output, &["line 4", "another batch"]);
}

/// Runs a batch that must fail, say `needles` and leave the file `output` as it is.
fn refuse(input: &Path, output: &Path, needles: &[&str]) {
    let before = std::fs::read(output).unwrap();
    let refused = run(input, output);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{message}");
    for needle in needles {
        assert!(message.contains(needle), "{needle:?} is missing in {message}");
    }
    assert!(std::fs::read(output).unwrap() == before, "{} was changed", output.display());
}

#[test]
fn what_an_answer_took_is_told_to_a_line_that_asks() {
    let folder = tempfile::tempdir().unwrap();
    let [input, output] = ["in.jsonl", "out.jsonl"].map(|name| folder.path().join(name));
    let timed = two_requests().replacen("\"prompt\":", "\"timings_per_token\":true,\"prompt\":", 1);
    std::fs::write(&input, timed).unwrap();
    succeed(&run(&input, &output));
    let timings = answers(&output).into_iter().map(|answer| answer["response"]["body"]["timings"].clone());
    let [asked, unasked] = timings.collect::<Vec<_>>().try_into().unwrap();
    assert_eq!(asked["predicted_n"], 2, "{asked}");
    assert_eq!(unasked, Value::Null);
}

/// Two completions with these ids.
fn two_requests() -> String {
    let body = json!({"prompt": "x", "max_tokens": 2});
    let line = |id| json!({"custom_id": id, "url": COMPLETIONS, "body": body}).to_string() + "\n";
    line("a") + &line("b")
}

#[test]
fn a_batch_does_not_write_over_its_input() {
    let folder = tempfile::tempdir().unwrap();
    let [input, symbolic, hard] = ["in.jsonl", "symbolic", "hard"].map(|name| folder.path().join(name));
    std::fs::write(&input, two_requests()).unwrap();
    std::os::unix::fs::symlink(&input, &symbolic).unwrap();
    std::fs::hard_link(&input, &hard).unwrap();
    for output in [&input, &symbolic, &hard] {
        refuse(&input, output, &["it is the input file"]);
    }
}

#[test]
fn a_batch_does_not_write_over_other_files() {
    let folder = tempfile::tempdir().unwrap();
    let [input, output] = ["in.jsonl", "notes.txt"].map(|name| folder.path().join(name));
    std::fs::write(&input, two_requests()).unwrap();
    let answer = |line: usize, id: &str| {
        format!("{{\"id\":\"batch_req_{line}\",\"custom_id\":\"{id}\",\"response\":{{}},\"error\":null}}\n")
    };
    let [a, b, x] = [answer(1, "a"), answer(2, "b"), answer(1, "x")];
    for (foreign, needles) in [
        ("milk\neggs\n", ["line 1", "is not an answer"]),
        ("milk", ["line 1", "has no end"]),
        ("\n", ["line 1", "is not an answer"]),
        ("7\n", ["line 1", "is not an answer"]),
        ("{\"custom_id\": \"a\"}\n", ["line 1", "is not an answer"]),
        (&two_requests(), ["line 1", "is not an answer"]),
        (&x, ["line 1", "another batch"]),
        (x.trim_end(), ["line 1", "has no end"]),
        (&(a.clone() + "milk"), ["line 2", "has no end"]),
        (&(a.clone() + "{\"id\": 5"), ["line 2", "has no end"]),
        (&(a.clone() + "{\"id\":\"batch_req_1"), ["line 2", "has no end"]),
        (&(a.clone() + &b + "{"), ["line 3", "after the answer to the last line"]),
        (&(a.clone() + &b + &b), ["line 3", "after the answer to the last line"]),
    ] {
        std::fs::write(&output, foreign).unwrap();
        refuse(&input, &output, &needles);
    }
    refuse(&input, Path::new("/dev/null"), &["not a regular file"]);
}

#[test]
fn two_batches_do_not_write_into_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let [input, output] = ["in.jsonl", "out.jsonl"].map(|name| folder.path().join(name));
    std::fs::write(&input, two_requests()).unwrap();
    let other = std::fs::File::create(&output).unwrap();
    other.lock().unwrap();
    refuse(&input, &output, &["another process"]);
}

#[test]
fn a_batch_of_errors_only_fails_and_keeps_them() {
    let folder = tempfile::tempdir().unwrap();
    let [input, output] = ["in.jsonl", "out.jsonl"].map(|name| folder.path().join(name));
    std::fs::write(&input, "# not\na batch\n").unwrap();
    let failed = run(&input, &output);
    let message = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1), "{message}");
    assert!(message.contains("all 2 lines of this run have an error"), "{message}");
    assert_eq!(answers(&output).len(), 2);
}

/// Lines as editors and other systems write them, and more at work than the queue would take.
#[test]
fn wrong_bytes_are_the_error_of_their_line() {
    let folder = tempfile::tempdir().unwrap();
    let [input, output] = ["in.jsonl", "out.jsonl"].map(|name| folder.path().join(name));
    let two = two_requests().replace('\n', "\r\n");
    let bytes =
        [b"\xef\xbb\xbf", two.as_bytes(), b"\r\n{\"custom_id\": \"\xff\"}\n", two.as_bytes()].concat();
    std::fs::write(&input, bytes).unwrap();
    let mut arguments = arguments(&input, &output);
    arguments.extend(["--max-num-seqs", "1", "--max-num-queued-reqs", "0"].map(String::from));
    succeed(&program(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap());
    let answers = answers(&output);
    let statuses: Vec<_> = answers.iter().map(|answer| &answer["response"]["status_code"]).collect();
    assert_eq!(statuses, [200, 200, 400, 200, 200], "{answers:?}");
    let message = answers[2]["error"]["message"].as_str().unwrap();
    assert!(message.starts_with("line 4: not UTF-8"), "the empty line counts: {message}");
    let ids = answers.iter().map(|answer| &answer["custom_id"]);
    assert_eq!(json!(ids.collect::<Vec<_>>()), json!(["a", "b", null, "a", "b"]));
}
