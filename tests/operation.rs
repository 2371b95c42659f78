//! What operators have of the program: spans for a collector, reports of crashes, support bundles, the dashboard of `top`.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc::{Receiver, channel},
    thread,
    time::Instant,
};

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

use crate::{
    ranks::other_rank,
    server::{COMPLETIONS, MODEL, endless},
    support::server::{DEADLINE, Server, program},
};

/// A field of a protobuf message: its number, and its value as bytes (a number as eight of them, little-endian).
fn fields(mut message: &[u8]) -> Vec<(u64, Vec<u8>)> {
    fn varint(message: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = message[0];
            *message = &message[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }
    let mut fields = Vec::new();
    while !message.is_empty() {
        let tag = varint(&mut message);
        let length = match tag & 7 {
            0 => {
                let value = varint(&mut message).to_le_bytes().to_vec();
                fields.push((tag >> 3, value));
                continue;
            }
            1 => 8,
            2 => varint(&mut message) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        fields.push((tag >> 3, message[..length].to_vec()));
        message = &message[length..];
    }
    fields
}

/// The values of a field.
fn all(message: &[u8], number: u64) -> Vec<Vec<u8>> {
    fields(message).into_iter().filter(|(found, _)| *found == number).map(|(_, value)| value).collect()
}

fn one(message: &[u8], number: u64) -> Vec<u8> {
    all(message, number).pop().unwrap_or_default()
}

/// `KeyValue`s as JSON.
fn attributes(pairs: &[Vec<u8>]) -> BTreeMap<String, Value> {
    let number = |bytes: &[u8]| <[u8; 8]>::try_from(bytes).unwrap();
    let value = |any: &[u8]| match &fields(any)[..] {
        [(1, text)] => json!(String::from_utf8(text.clone()).unwrap()),
        [(3, bytes)] => json!(i64::from_le_bytes(number(bytes))),
        [(4, bytes)] => json!(f64::from_le_bytes(number(bytes))),
        other => panic!("{other:?}"),
    };
    pairs.iter().map(|pair| (String::from_utf8(one(pair, 1)).unwrap(), value(&one(pair, 2)))).collect()
}

/// A collector on a free port: every request's path and body; all are answered with 200.
fn collector() -> (String, Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, received) = channel();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream);
            while let Some((path, body)) = read_request(&mut reader) {
                if sender.send((path, body)).is_err() {
                    return;
                }
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                reader.get_mut().write_all(answer).unwrap();
            }
        }
    });
    (url, received)
}

fn read_request(reader: &mut impl BufRead) -> Option<(String, Vec<u8>)> {
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).ok().filter(|&count| count > 0)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim().to_lowercase().split_once(": ") {
            Some(("content-length", value)) => length = value.parse().unwrap(),
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((first.split(' ').nth(1).unwrap().to_owned(), body))
}

#[test]
fn a_collector_gets_a_span_for_every_request_and_nothing_that_it_said() {
    let (url, received) = collector();
    let mut server = Server::start(MODEL, &["--otlp-traces-endpoint", &url, "--crash-dir", "none"]);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let body =
        json!({"prompt": "a secret sentence", "max_tokens": 3, "temperature": 0.5, "ignore_eos": true});
    let headers = [("Content-Type", "application/json"), ("traceparent", parent), ("X-Request-Id", "mine")];
    let response = server.send("POST", COMPLETIONS, &headers, body.to_string().as_bytes()).unwrap();
    assert_eq!(response.status, 200);
    server.ask(COMPLETIONS, &json!({"prompt": "another", "max_tokens": 2}));
    // What has not been sent yet is sent at the end.
    server.terminate();
    assert_eq!(server.wait_for_exit(DEADLINE).code(), Some(0));
    let mut spans = Vec::new();
    while spans.len() < 2 {
        let (path, body) = received.recv_timeout(DEADLINE).expect("spans come");
        assert_eq!(path, "/v1/traces");
        assert!(!body.windows(6).any(|window| window == b"secret"));
        for resource_spans in all(&body, 1) {
            let resource = attributes(&all(&one(&resource_spans, 1), 1));
            assert_eq!(resource["service.name"], "spark-engine");
            for scope_spans in all(&resource_spans, 2) {
                spans.extend(all(&scope_spans, 2));
            }
        }
    }
    let told: Vec<_> = spans.iter().map(|span| attributes(&all(span, 9))).collect();
    let place =
        told.iter().position(|told| told["gen_ai.request.id"] == "cmpl-mine").expect("it has its name");
    let (span, told, other) = (&spans[place], &told[place], &spans[1 - place]);
    assert_eq!(one(span, 5), b"llm_request");
    assert_eq!(
        one(span, 1),
        [0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c]
    );
    assert_eq!(one(span, 4), [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31], "the parent");
    assert_ne!(one(other, 1), one(span, 1), "a trace of its own");
    assert_eq!(one(other, 4), [] as [u8; 0]);
    for (name, value) in [
        ("gen_ai.usage.completion_tokens", json!(3)),
        ("gen_ai.request.max_tokens", json!(3)),
        ("gen_ai.request.temperature", json!(0.5)),
        ("gen_ai.request.n", json!(1)),
    ] {
        assert_eq!(told[name], value, "{name}");
    }
    assert!(told["gen_ai.usage.prompt_tokens"].as_i64().unwrap() > 3);
    let seconds = |name: &str| told[name].as_f64().unwrap();
    assert!(seconds("gen_ai.latency.time_to_first_token") <= seconds("gen_ai.latency.e2e"));
    assert!(
        seconds("gen_ai.latency.time_in_model_inference") > 0.0
            && seconds("gen_ai.latency.time_in_queue") >= 0.0
    );
    let time = |number| u64::from_le_bytes(<[u8; 8]>::try_from(&one(span, number)[..]).unwrap());
    let (start, end) = (time(7), time(8));
    let shown = (end - start) as f64 / 1e9;
    assert!((shown - seconds("gen_ai.latency.e2e")).abs() < 0.05, "{shown}");
}

/// The reports below a folder.
fn reports(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_lost_rank_leaves_a_report() {
    let folder = tempfile::tempdir().unwrap();
    let crashes = folder.path().join("crashes");
    let server = Server::start(
        MODEL,
        &[
            "--tp",
            "2",
            "--device",
            "cpu",
            "--max-model-len",
            "4096",
            "--crash-dir",
            crashes.to_str().unwrap(),
        ],
    );
    server.ask(COMPLETIONS, &json!({"prompt": "a secret sentence", "max_tokens": 3, "request_id": "before"}));
    let body = json!({"prompt": "a secret sentence", "max_tokens": 4000, "ignore_eos": true, "request_id": "during"});
    let mut events = server.stream(COMPLETIONS, &body);
    assert!(events.next().is_some());
    kill_process(other_rank(&server), Signal::KILL).unwrap();
    let log = server.wait_for_log("a report of the failure is in ");
    let [report] = &reports(&crashes)[..] else { panic!("{:?}", reports(&crashes)) };
    assert!(log.contains(&report.display().to_string()), "{log}");
    let read = |name: &str| fs::read_to_string(report.join(name)).unwrap();
    let whole: Value = serde_json::from_str(&read("report.json")).unwrap();
    assert_eq!(
        (&whole["failure"]["kind"], &whole["failure"]["may_recover"]),
        (&json!("group"), &json!(true))
    );
    assert!(whole["failure"]["message"].as_str().unwrap().contains("rank 1"), "{whole}");
    assert_eq!(whole["facts"]["settings"]["max-model-len"]["value"], "4096");
    assert_eq!(whole["program_fingerprint"].as_str().unwrap().len(), 64);
    let steps = lines(&report.join("steps.jsonl"));
    assert!(steps.iter().any(|step| step["took_ms"].is_number()) && steps.len() > 3, "{steps:?}");
    let requests = lines(&report.join("requests.jsonl"));
    let state =
        |id: &str| requests.iter().find(|request| request["id"] == id).map(|request| &request["state"]);
    assert_eq!(
        (state("cmpl-during"), state("cmpl-before")),
        (Some(&json!("running")), Some(&json!("ended")))
    );
    assert!(read("log.txt").contains("listening on") && read("system.txt").contains("VmRSS"));
    for name in ["report.json", "steps.jsonl", "requests.jsonl", "log.txt", "system.txt"] {
        assert!(!read(name).contains("secret"), "{name}");
    }
}

/// Unpacks an archive with the system's own programs; gives all of its texts by name.
fn unpack(archive: &Path) -> BTreeMap<String, String> {
    let folder = tempfile::tempdir().unwrap();
    let mut tar = Command::new("tar");
    let status =
        tar.arg("-xzf").arg(archive).arg("--strip-components=1").arg("-C").arg(folder.path()).status();
    assert!(status.unwrap().success());
    let (mut open, mut texts) = (vec![folder.path().to_owned()], BTreeMap::new());
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            let name = path.strip_prefix(folder.path()).unwrap().display().to_string();
            texts.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
    texts
}

#[test]
fn a_support_bundle_has_what_is_needed_and_no_secret() {
    const SECRET: &str = "p1anted-s3cret";
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let key = format!("{SECRET}-admin");
    let server = Server::serve_with(
        Some(&spark_testing::model_dir(MODEL)),
        &[
            "--kv-cache-memory-bytes",
            "67108864",
            "--crash-dir",
            "none",
            "--api-key",
            &format!("{SECRET}-user"),
        ],
        &[("SPARK_ADMIN_API_KEY", &key)],
    );
    let crash = folder.path().join("crashes/crash-20261121-000000-1");
    fs::create_dir_all(&crash).unwrap();
    fs::write(crash.join("report.json"), json!({"environment": {"HF_TOKEN": SECRET}, "n": 7}).to_string())
        .unwrap();
    fs::write(crash.join("log.txt"), format!("INFO token={SECRET} kept\n")).unwrap();
    let log = format!(
        "INFO pull from https://me:{SECRET}@hub.example/x\nAuthorization: Bearer {SECRET}\nplain {SECRET}-known word\n\
         \u{1b}[32mINFO\u{1b}[0m request id=cmpl-1 prompt_tokens=12\n"
    );
    fs::write(path("engine.log"), log).unwrap();
    fs::write(path("serve.toml"), format!("port = 9000\napi-key = [\n  \"{SECRET}\",\n]\n")).unwrap();
    let mut command = program(&["support-bundle", "--url", &server.url(), "-o", &path("b.tar.gz")]);
    command.args([
        "--log",
        &path("engine.log"),
        "--config",
        &path("serve.toml"),
        "--crash-dir",
        &path("crashes"),
    ]);
    command.env("SPARK_ADMIN_API_KEY", &key).env("HF_TOKEN", format!("{SECRET}-known"));
    command.env("https_proxy", format!("http://me:{SECRET}@127.0.0.1:1")).env("NCCL_DEBUG", "INFO");
    let output = command.output().unwrap();
    let notes = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{notes} {}", String::from_utf8_lossy(&output.stderr));
    let texts = unpack(&folder.path().join("b.tar.gz"));
    for (name, text) in &texts {
        assert!(!text.contains(SECRET), "{name}: {text}");
    }
    assert!(!notes.contains(SECRET), "{notes}");
    for (name, needle) in [
        ("server/metrics.txt", "vllm:num_requests_running"),
        ("server/info.json", "\"max_model_len\""),
        ("server/info.json", "kv-cache-memory-bytes"),
        ("config.json", "9000"),
        ("environment.json", "NCCL_DEBUG"),
        ("logs/0-engine.log", "INFO request id=cmpl-1 prompt_tokens=12"),
        ("logs/0-engine.log", "hub.example/x"),
        ("crashes/crash-20261121-000000-1/report.json", "\"n\": 7"),
        ("crashes/crash-20261121-000000-1/log.txt", "kept"),
        ("doctor.json", "OS.KERNEL"),
        ("version.json", env!("CARGO_PKG_VERSION")),
    ] {
        let text = texts.get(name).unwrap_or_else(|| panic!("{name} is missing: {notes}"));
        assert!(text.contains(needle), "{name} has no {needle}: {text}");
    }
}

#[test]
fn top_prints_a_frame_of_a_running_server() {
    let server = Server::start(MODEL, &["--max-model-len", "4096", "--crash-dir", "none"]);
    let mut events = server.stream(COMPLETIONS, &endless(4000));
    assert!(events.next().is_some());
    let start = Instant::now();
    let top = |flag: &str| {
        let output = program(&["top", "--url", &server.url(), "--interval", "0.3", flag]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let numbers: Value = serde_json::from_str(&top("--json")).unwrap();
    assert_eq!(
        (&numbers["health"], &numbers["running"], &numbers["load"]),
        (&json!("ready"), &json!(1.0), &json!(1.0))
    );
    assert!(numbers["generation_tokens_per_s"].as_f64().unwrap() > 0.0, "{numbers}");
    assert!(numbers["step_s"]["p50"].as_f64().unwrap() > 0.0, "{numbers}");
    let frame = top("--once");
    for name in ["generated tokens", "first token p50/p90/p99", "KV cache used", "step on rank 0", "ready"] {
        assert!(frame.contains(name), "{frame}");
    }
    assert!(!frame.contains('\u{1b}') && start.elapsed() < DEADLINE);
    drop(events);
    let nowhere =
        program(&["top", "--url", "http://127.0.0.1:1", "--interval", "0.1", "--once"]).output().unwrap();
    assert!(!nowhere.status.success() && String::from_utf8_lossy(&nowhere.stderr).contains("127.0.0.1:1"));
}
