//! The program as a process: how it ends, what `generate` and `inspect` print, what it says about broken checkpoints.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use spark_engine::Dtype;
use spark_testing::{Oracle, media_path, model_dir, model_names};

use crate::{
    server::{COMPLETIONS, MODEL, case, endless},
    support::{
        self,
        server::{DEADLINE, SMALL, Server, Streamed, program, wait_for_exit},
    },
};

#[test]
fn sigterm_lets_running_streams_finish() {
    let mut server = Server::start(MODEL, &["--max-model-len", "4096"]);
    let num_tokens = 2000;
    let expected = server.ask(COMPLETIONS, &endless(num_tokens));
    let mut events = server.stream(COMPLETIONS, &endless(num_tokens));
    let first = events.next().expect("the stream has begun");
    server.terminate();
    server.wait_for_log("shutting down");
    refuse_new_requests(&server);
    let streamed = Streamed::read(std::iter::once(first).chain(events));
    assert!(streamed.done, "the stream ends with [DONE]");
    assert_eq!(streamed.token_ids, support::ids(&expected["choices"][0]["token_ids"]));
    assert_eq!(server.wait_for_exit(DEADLINE).code(), Some(0));
}

/// `nohup` ignores the signal on behalf of the program, which outlives its terminal then.
#[test]
fn a_closed_terminal_ends_a_server_in_order_unless_nohup_was_said() {
    let plain = program(&["serve", "--port", "0", &folder(MODEL), "--max-model-len", "4096"]);
    let mut ignoring = Command::new("sh");
    ignoring.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(plain.get_program()).args(plain.get_args());
    for (mut command, is_ignored) in [(plain, false), (ignoring, true)] {
        command.args(SMALL);
        let mut server = Server::launch(command);
        let mut events = server.stream(COMPLETIONS, &endless(1000));
        let first = events.next().expect("the stream has begun");
        kill_process(server.pid(), Signal::HUP).unwrap();
        if !is_ignored {
            server.wait_for_log("shutting down");
        }
        let streamed = Streamed::read(std::iter::once(first).chain(events));
        assert!(streamed.done && streamed.token_ids.len() == 1000, "ignored: {is_ignored}");
        if is_ignored {
            assert_eq!(server.get("/health").status, 200);
            server.terminate();
        }
        assert_eq!(server.wait_for_exit(DEADLINE).code(), Some(0));
    }
}

/// Waits until no request is taken any more: the connection is refused, or the answer is 503.
fn refuse_new_requests(server: &Server) {
    let body = json!({"prompt": "x", "max_tokens": 1}).to_string();
    let start = Instant::now();
    loop {
        let sent = server.send("POST", COMPLETIONS, &[("Content-Type", "application/json")], body.as_bytes());
        match sent {
            Err(_) => break,
            Ok(response) if response.status == 503 => break,
            Ok(response) => assert!(start.elapsed() < DEADLINE, "still answered: {response:?}"),
        }
    }
}

#[test]
fn a_server_without_requests_ends_at_once_on_sigterm() {
    let mut server = Server::start(MODEL, &[]);
    // A client that keeps its connection open must not hold up the end.
    let mut idle = TcpStream::connect(server.address()).unwrap();
    idle.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert_eq!(server.get("/health").status, 200);
    server.terminate();
    assert_eq!(server.wait_for_exit(Duration::from_secs(10)).code(), Some(0));
}

#[test]
fn half_a_request_does_not_hold_up_the_end() {
    let mut server = Server::start(MODEL, &["--max-model-len", "4096"]);
    let mut silent: Vec<_> = (0..2).map(|_| TcpStream::connect(server.address()).unwrap()).collect();
    silent[0].write_all(b"GET /health HT").unwrap();
    let head = format!("POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n");
    silent[1].write_all(format!("{head}Content-Length: 100\r\n\r\n{{\"prompt\"").as_bytes()).unwrap();
    let mut events = server.stream(COMPLETIONS, &endless(1000));
    let first = events.next().expect("the stream has begun");
    server.terminate();
    server.wait_for_log("shutting down");
    let streamed = Streamed::read(std::iter::once(first).chain(events));
    assert!(streamed.done, "the whole request is answered to its end");
    assert_eq!(streamed.token_ids.len(), 1000);
    // Far below the shutdown timeout of 30 s.
    assert_eq!(server.wait_for_exit(Duration::from_secs(10)).code(), Some(0));
}

#[test]
fn a_second_sigterm_ends_at_once() {
    let mut server = Server::start(MODEL, &["--max-model-len", "4096"]);
    let mut events: Vec<_> = (0..8).map(|_| server.stream(COMPLETIONS, &endless(4000))).collect();
    assert!(events.iter_mut().all(|events| events.next().is_some()));
    server.terminate();
    server.wait_for_log("shutting down");
    server.terminate();
    assert_eq!(server.wait_for_exit(Duration::from_secs(10)).code(), Some(0));
    for events in events {
        let streamed = Streamed::read(events);
        assert!(streamed.token_ids.len() < 4000, "the stream was cut short");
        assert_ne!(streamed.finish_reason.as_deref(), Some("length"), "and does not pretend to be complete");
    }
}

#[test]
fn a_drain_ends_at_its_deadline() {
    let mut server = Server::start(MODEL, &["--max-model-len", "4096", "--shutdown-timeout", "0"]);
    let mut events: Vec<_> = (0..8).map(|_| server.stream(COMPLETIONS, &endless(4000))).collect();
    assert!(events.iter_mut().all(|events| events.next().is_some()));
    server.terminate();
    assert_eq!(server.wait_for_exit(Duration::from_secs(10)).code(), Some(0));
    server.wait_for_log("shutdown timeout has passed");
}

#[test]
fn a_taken_port_is_an_error_before_anything_is_loaded() {
    let server = Server::start(MODEL, &[]);
    let port = server.address().port().to_string();
    let message = failure(&["serve", &folder(MODEL), "--port", &port]);
    assert!(message.contains(&port) && message.contains("cannot listen"), "{message}");
    assert_eq!(server.get("/health").status, 200);
}

fn folder(model: &str) -> String {
    model_dir(model).display().to_string()
}

/// Without `--max-tokens` an answer has what fits: the context, or 512 tokens of a raw prompt.
#[test]
fn generate_fits_into_any_context() {
    for (raw, max_model_len, expected) in [(false, 128, 128), (true, 128, 128), (true, 1024, 512)] {
        let length = max_model_len.to_string();
        let mut command = program(&["generate", &folder(MODEL), "Hello!", "--ignore-eos", "--verbose"]);
        command.args(SMALL).args(["--log-level", "warn", "--max-model-len", &length]);
        let Output { status, stderr, .. } = command.args(raw.then_some("--raw")).output().unwrap();
        let report = String::from_utf8(stderr).unwrap();
        assert!(status.success(), "{report}");
        let numbers: Vec<usize> =
            report.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect();
        // Prompt tokens, milliseconds, output tokens, speed.
        let [prompt, _, output, ..] = numbers[..] else { panic!("{report}") };
        assert_eq!(if expected == 512 { output } else { prompt + output }, expected, "{report}");
    }
}

#[test]
fn ctrl_c_ends_generate() {
    let mut command = program(&["generate", &folder(MODEL), "Hello!", "--ignore-eos", "-n", "4000"]);
    command.args(SMALL).args(["--max-model-len", "4096"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut first = [0];
    stdout.read_exact(&mut first).unwrap();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert_eq!(wait_for_exit(&mut child, DEADLINE).code(), Some(130));
    assert_eq!(rest.last(), Some(&b'\n'), "the shell's prompt gets a line of its own");
}

/// Runs `generate` on the fixture, with `input` on standard input; returns what it prints.
fn generate(arguments: &[&str], input: &str) -> String {
    let folder = folder(MODEL);
    let common = ["--temperature", "0", "--ignore-eos", "-n", "40", "--log-level", "warn"];
    let mut command = program(&["generate", &folder]);
    command.args(SMALL).args(common).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// The text of an oracle case, from the library; its ids are the oracle's.
fn oracle_text(name: &str) -> String {
    let case = case(name);
    let engine = support::builder(MODEL, Dtype::F32).build().unwrap();
    let answer = support::block_on(support::answer(&engine, support::chat_body(&case, 40)));
    assert_eq!(support::prompt_and_output(&answer).1, case.greedy_ids);
    answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

#[test]
fn generate_prints_the_answer() {
    let image = media_path("sky.png").display().to_string();
    assert_eq!(generate(&["What?", "--image", &image], ""), oracle_text("image0") + "\n");
    assert_eq!(generate(&["Hello!"], ""), oracle_text("text") + "\n");
    assert_eq!(generate(&[], "Hello!"), oracle_text("text") + "\n", "from standard input");
    assert_eq!(generate(&["-"], "Hello!"), oracle_text("text") + "\n", "from standard input, asked for");
}

#[test]
fn generate_continues_a_raw_prompt() {
    let engine = support::builder(MODEL, Dtype::F32).build().unwrap();
    let body = json!({"prompt": "Once upon", "max_tokens": 40, "temperature": 0, "ignore_eos": true});
    let answer: Value =
        support::block_on(async { engine.completion(body).await.unwrap().into_response().await.unwrap() });
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(!text.is_empty());
    assert_eq!(generate(&["--raw", "Once upon"], ""), format!("{text}\n"));
    assert_eq!(generate(&["--raw"], "Once upon"), format!("{text}\n"));
}

#[test]
fn inspect_describes_every_fixture() {
    let models = model_names("").unwrap();
    assert!(models.len() > 20);
    for model in models {
        let Output { status, stdout, stderr } =
            program(&["inspect", &folder(&model), "--json", "--tp", "2"]).output().unwrap();
        assert!(status.success(), "{model}: {}", String::from_utf8_lossy(&stderr));
        let report: Value = serde_json::from_slice(&stdout).unwrap();
        let family = Oracle::load(&model).unwrap().family;
        assert_eq!(report["text"]["moe"].is_object(), family.contains("moe"), "{model}: {report}");
        assert_eq!(report["vision"].is_object(), family.contains("vl"), "{model}: {report}");
        let text = &report["text"];
        let kv =
            ["num_hidden_layers", "num_key_value_heads", "head_dim"].map(|key| text[key].as_u64().unwrap());
        // Keys and values, two bytes each.
        assert_eq!(report["kv_bytes_per_token"]["bf16"], kv.iter().product::<u64>() * 4, "{model}");
        let weights = &report["weights"];
        let parts = weights["parts"].as_array().unwrap().iter().map(|part| part["bytes"].as_u64().unwrap());
        assert_eq!(parts.sum::<u64>(), weights["file_bytes"], "{model}");
        let ranks = report["ranks"].as_array().unwrap();
        assert_eq!(ranks.len(), 2, "{model}");
        for rank in ranks {
            assert_eq!(rank["kv_bytes_per_token"]["bf16"], kv.iter().product::<u64>() * 2, "{model}");
            let (read, held) = (rank["bytes_read"].as_u64().unwrap(), rank["bytes_held"].as_u64().unwrap());
            assert!(read > 0 && held > 0 && rank["tensors"].as_u64().unwrap() > 0, "{model}: {rank}");
            let exchanged = rank["bytes_read_in_exchange"].as_u64().unwrap();
            assert!(exchanged > 0 && exchanged <= read, "{model}: {rank}");
        }
        assert_eq!(report["tensor_parallel_size"], 2, "{model}");
    }
    inspect_tells_whole_experts();
    let plain = program(&["inspect", &folder(MODEL)]).output().unwrap();
    let plain = String::from_utf8(plain.stdout).unwrap();
    assert!(plain.contains("qwen3_vl_moe") && plain.contains("awq-int4-g128"), "{plain}");
    let message = failure(&["inspect", &folder(MODEL), "--tp", "3"]);
    assert!(message.contains("num_attention_heads") && message.contains("over 1, 2, 4 ranks"), "{message}");
    assert!(failure(&["inspect", &folder(MODEL), "--tp", "0"]).contains("0 ranks"));
    let held = |mode: &str| -> Vec<u64> {
        let model = folder("moe_vl_bf16");
        let arguments = ["inspect", &model, "--json", "--tp", "2", "--mm-encoder-tp-mode", mode];
        let report: Value = serde_json::from_slice(&program(&arguments).output().unwrap().stdout).unwrap();
        report["ranks"].as_array().unwrap().iter().map(|rank| rank["bytes_held"].as_u64().unwrap()).collect()
    };
    let (whole, split) = (held("data"), held("weights"));
    assert!(split[0] < whole[0] && split[1] < split[0], "{split:?} of {whole:?}: some biases are rank 0's");
}

/// Of ranks that hold whole experts: which, and that nothing of the others is read.
fn inspect_tells_whole_experts() {
    let inspect = |model: &str, arguments: &[&str]| {
        program(&[&["inspect", &folder(model), "--tp", "2"], arguments].concat()).output().unwrap().stdout
    };
    let report = |arguments: &[&str]| -> Value {
        serde_json::from_slice(&inspect(MODEL, &[&["--json"], arguments].concat())).unwrap()
    };
    let (slices, whole) = (report(&[]), report(&["--moe-parallel", "ep"]));
    let num_experts = whole["text"]["moe"]["num_experts"].as_u64().unwrap();
    let part = |name: &str| {
        let mut parts = whole["weights"]["parts"].as_array().unwrap().iter();
        parts.find(|part| part["part"] == name).unwrap()["bytes"].as_u64().unwrap()
    };
    assert_eq!((&slices["moe_parallel"], &whole["moe_parallel"]), (&"tp".into(), &"ep".into()));
    for (rank, first) in [(0, 0), (1, num_experts / 2)] {
        let (slices, whole) = (&slices["ranks"][rank], &whole["ranks"][rank]);
        assert_eq!(slices["experts"], json!({"start": 0, "end": num_experts}));
        assert_eq!(whole["experts"], json!({"start": first, "end": first + num_experts / 2}));
        let read = |rank: &Value| rank["bytes_read"].as_u64().unwrap();
        // Gate and up of AWQ lie by inputs, so that a slice of their outputs is all over the tensor.
        assert!(read(slices) - read(whole) > part("experts") / 8, "{slices} {whole}");
    }
    let text = String::from_utf8(inspect(MODEL, &["--moe-parallel", "ep"])).unwrap();
    let last = num_experts - 1;
    assert!(text.contains(&format!("rank 1 of 2   experts {} to {last}, ", num_experts / 2)), "{text}");
    let dense = failure(&["inspect", &folder("dense_vl_bf16"), "--moe-parallel", "ep"]);
    assert!(dense.contains("--moe-parallel: ep") && dense.contains("no experts"), "{dense}");
    let six = failure(&["inspect", &folder("moe_vl_bf16"), "--tp", "4", "--moe-parallel", "ep"]);
    assert!(six.contains("num_experts: 6") && six.contains("over 1, 2 ranks"), "{six}");
}

/// The plan of two GPUs counts from a configuration what `inspect` counts from the tensors.
#[test]
fn plan_holds_what_inspect_says() {
    let json = |arguments: &[&str]| -> Value {
        serde_json::from_slice(&program(arguments).output().unwrap().stdout).unwrap()
    };
    let whole_experts = ["--moe-parallel", "ep"];
    let split_encoder = ["--mm-encoder-tp-mode", "weights"];
    let (whole_experts, split_encoder) = (&whole_experts[..], &split_encoder[..]);
    let mut held = Vec::new();
    for (model, sharing) in [
        ("moe_vl_bf16", &[][..]),
        ("moe_vl_bf16", whole_experts),
        ("moe_vl_bf16", split_encoder),
        ("moe_vl_bf16", &[whole_experts, split_encoder].concat()),
        ("text_moe_bf16", whole_experts),
        ("dense_vl_bf16", split_encoder),
        ("dense_vl_bf16_tied", &[]),
        ("text_dense_f16", &[]),
    ] {
        let folder = folder(model);
        let inspected = json(&[&["inspect", &folder, "--json", "--tp", "2"], sharing].concat());
        let storage = ["--quantization", "bf16", "--kv-cache-dtype", "fp8"];
        let plan = ["plan", "--hardware", "h200x2", "--model", &folder, "--json"];
        let planned = json(&[&plan[..], &storage, sharing].concat());
        let [rank, memory] = [&inspected["ranks"][0], &planned["memory"]];
        let bytes = |value: &Value| value.as_f64().unwrap();
        assert_eq!(bytes(&memory["weights"]), bytes(&rank["bytes_held"]), "{model} {sharing:?}");
        let kv = &rank["kv_bytes_per_token"]["fp8"];
        assert_eq!(bytes(&memory["kv_bytes_per_token"]), bytes(kv), "{model} {sharing:?}");
        assert_eq!(planned["moe_parallel"], inspected["moe_parallel"], "{model} {sharing:?}");
        held.push((bytes(&memory["weights"]), planned["decode"][0]["bytes"]["experts"].clone()));
    }
    assert!(held[2].0 < held[0].0 && held[1].0 == held[0].0, "{held:?}");
    assert!(
        held[1].1.as_f64() > held[0].1.as_f64(),
        "a rank waits for the one with more of the experts: {held:?}"
    );
    let plan =
        |arguments: &[&str]| failure(&[&["plan", "--hardware", "gb10x2", "--model"], arguments].concat());
    let dense = plan(&["qwen3-vl-8b", "--moe-parallel", "ep"]);
    assert!(dense.contains("--moe-parallel: ep") && dense.contains("no experts"), "{dense}");
}

/// What the program says when it fails: exit code 1 and one error, no panic.
fn failure(arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = program(arguments).output().unwrap();
    let message = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    assert_eq!(message.matches("error: ").count(), 1, "{message}");
    assert!(stdout.is_empty());
    message
}

/// A copy of the fixture that a test may break.
fn copy(to: &Path) {
    for entry in std::fs::read_dir(model_dir(MODEL)).unwrap() {
        let from = entry.unwrap().path();
        let name = from.file_name().unwrap();
        if !name.to_string_lossy().starts_with("oracle") {
            std::fs::copy(&from, to.join(name)).unwrap();
        }
    }
}

/// Replaces text of equal length in every file of a folder.
fn rename(folder: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut num_found = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let places: Vec<usize> = bytes
            .windows(from.len())
            .enumerate()
            .filter(|(_, w)| *w == from.as_bytes())
            .map(|(at, _)| at)
            .collect();
        for at in &places {
            bytes[*at..*at + to.len()].copy_from_slice(to.as_bytes());
        }
        num_found += places.len();
        std::fs::write(&path, bytes).unwrap();
    }
    assert_eq!(num_found, 2, "{from} is in one shard and in the index");
}

#[test]
fn a_missing_model_is_named() {
    let message = failure(&["serve", "/no/such/folder", "--port", "0"]);
    assert!(message.contains("/no/such/folder"), "{message}");
    let empty = tempfile::tempdir().unwrap();
    let message = failure(&["serve", &empty.path().display().to_string(), "--port", "0"]);
    assert!(message.contains("config.json"), "{message}");
}

#[test]
fn a_truncated_shard_is_named_with_its_offset() {
    let name = "model-00001-of-00002.safetensors";
    for (num_kept, strategy, rules) in [
        (300_000, "eager", vec!["tensor `model.language_model.", "at offset ", "truncated"]),
        (300_000, "lazy", vec!["tensor `model.language_model.", "at offset ", "truncated"]),
        (1000, "eager", vec!["header"]),
        (4, "eager", vec!["4 bytes is too short"]),
        (0, "eager", vec!["0 bytes is too short"]),
    ] {
        let broken = tempfile::tempdir().unwrap();
        copy(broken.path());
        let shard = broken.path().join(name);
        let bytes = std::fs::read(&shard).unwrap();
        std::fs::write(&shard, &bytes[..num_kept]).unwrap();
        let folder = broken.path().display().to_string();
        let message = failure(&["serve", &folder, "--port", "0", "--safetensors-load-strategy", strategy]);
        assert!(message.contains(name), "{num_kept} bytes: {message}");
        for rule in rules {
            assert!(message.contains(rule), "{num_kept} bytes: {rule:?} is missing in {message}");
        }
    }
}

/// Writes zeros over a tensor, in whichever file it is.
fn clear_tensor(folder: &Path, name: &str) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let mut bytes = std::fs::read(&path).unwrap();
        let begin = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..begin]).unwrap();
        if let Some([from, to]) = header[name]["data_offsets"].as_array().map(Vec::as_slice) {
            let [from, to] = [from, to].map(|offset| begin + offset.as_u64().unwrap() as usize);
            bytes[from..to].fill(0);
            std::fs::write(&path, bytes).unwrap();
            return;
        }
    }
    panic!("no file has {name}");
}

#[test]
fn weights_that_are_all_zero_are_named_and_loaded() {
    let broken = tempfile::tempdir().unwrap();
    copy(broken.path());
    let module = "model.language_model.layers.1.mlp.experts.2.down_proj";
    clear_tensor(broken.path(), &format!("{module}.scales"));
    let mut command =
        program(&["generate", &broken.path().display().to_string(), "--raw", "-n", "2", "Once"]);
    let Output { status, stderr, .. } = command.args(SMALL).args(["--log-level", "warn"]).output().unwrap();
    let message = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{message}");
    assert!(
        message.contains(&format!("128 rows of 1 weights are all zero: {module} (128 of 128)")),
        "{message}"
    );
}

#[test]
fn unfilled_and_unused_tensors_are_named() {
    let broken = tempfile::tempdir().unwrap();
    copy(broken.path());
    let (from, to) = ("model.language_model.norm.weight", "model.language_model.nrom.weight");
    rename(broken.path(), from, to);
    let message = failure(&["serve", &broken.path().display().to_string(), "--port", "0"]);
    assert!(message.contains(from), "the parameter without a tensor: {message}");
    assert!(message.contains(to), "the tensor without a parameter: {message}");
}

/// Reads a server's log up to the line that says where it listens.
fn line_of_address(log: &mut impl BufRead) -> String {
    let mut line = String::new();
    while !line.contains("listening on http://") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "the server ends before it listens");
    }
    line
}

/// Whoever reads that the server listens may end it at once: it ends in order, and is not killed.
#[test]
fn a_signal_right_after_the_address_ends_the_server_in_order() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut command = program(&["serve", "--port", "0", &folder(MODEL)]);
        let mut child = command.args(SMALL).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        line_of_address(&mut log);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let status = wait_for_exit(&mut child, Duration::from_secs(20));
        assert_eq!(status.code(), Some(0), "{status}");
    }
}

/// Whoever reads the log may go away before the server does: a message that nobody takes is no reason to fail.
#[test]
fn a_log_without_a_reader_stops_nothing() {
    let mut command = program(&["serve", "--port", "0", &folder(MODEL)]);
    let mut child = command.args(SMALL).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let line = line_of_address(&mut log);
    drop(log);
    let address = line.split("http://").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(address).unwrap();
        let body = json!({"prompt": "x", "max_tokens": 1}).to_string();
        let head = format!(
            "POST {COMPLETIONS} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(wait_for_exit(&mut child, Duration::from_secs(20)).code(), Some(0));
}
