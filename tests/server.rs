//! `serve` as its clients see it: streams, the official client, keys, cancellation, many clients at once, idleness.
//! Wrong requests are in `bad_input.rs`, what the fields mean in `fields.rs`, the end of the process in `process.rs`.

use std::{
    io::Write,
    net::TcpStream,
    process::Command,
    sync::mpsc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use spark_testing::{Case, Oracle, Random, media_path};

use crate::support::{
    self, chat_body,
    server::{Server, Streamed},
};

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";

/// The fixture that most tests serve.
pub(crate) const MODEL: &str = "moe_vl_awq";

pub(crate) fn case(name: &str) -> Case {
    Oracle::load(MODEL).unwrap().cases.remove(name).unwrap()
}

/// A completion that runs for `max_tokens` whatever is sampled.
pub(crate) fn endless(max_tokens: usize) -> Value {
    json!({"prompt": "Count:", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "return_token_ids": true})
}

/// `body` with more fields.
pub(crate) fn with(mut body: Value, fields: Value) -> Value {
    let Value::Object(fields) = fields else { panic!("fields are an object") };
    for (name, value) in fields {
        body[name] = value;
    }
    body
}

/// The oracle's answers, with and without an image: what a healthy server gives at any time.
pub(crate) fn check_canaries(server: &Server) {
    for name in ["text", "image0"] {
        let case = case(name);
        let answer = server.ask(CHAT, &chat_body(&case, case.greedy_ids.len()));
        let (prompt, output) = support::prompt_and_output(&answer);
        assert_eq!(prompt, case.prompt_ids, "{name}");
        assert_eq!(output, case.greedy_ids, "{name}");
    }
}

#[test]
fn the_openai_client_works() {
    let python = std::env::var("SPARK_TEST_PYTHON").expect(
        "SPARK_TEST_PYTHON names a Python with tests/python/requirements.txt; `cargo xtask ci` sets it",
    );
    // The demo model: the script compares what it answers.
    let server = Server::serve(None, &["--threads", "2", "--kv-cache-memory-bytes", "67108864"]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/openai_client.py");
    let image = media_path("demo.png");
    let output = Command::new(python).arg(script).arg(server.url()).arg(image).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("all checks passed"), "{stdout}");
}

/// Requests of many kinds: chats with and without images, completions, greedy and sampled, of different lengths.
fn mixed_body(i: usize) -> (&'static str, Value) {
    let max_tokens = 6 + i % 19;
    let mut body = match i % 4 {
        0 => chat_body(&case(["image0", "image1", "images"][i / 4 % 3]), max_tokens),
        1 => chat_body(&case("chat"), max_tokens),
        _ => with(endless(max_tokens), json!({"prompt": format!("Request {i} says:"), "ignore_eos": false})),
    };
    if i % 4 == 3 {
        // Sampled bytes are rarely whole characters, and some are stop tokens: a stream must not show that differently.
        (body["temperature"], body["top_k"], body["seed"]) = (json!(1.5), json!(0), json!(i));
    }
    (if i % 4 < 2 { CHAT } else { COMPLETIONS }, body)
}

#[test]
fn sixty_four_streams_lose_nothing() {
    let server = Server::start(MODEL, &["--max-num-seqs", "64"]);
    let requests: Vec<_> = (0..64).map(mixed_body).collect();
    let expected: Vec<_> = requests.iter().map(|(path, body)| server.ask(path, body)).collect();
    let streamed: Vec<Streamed> = std::thread::scope(|scope| {
        let stream = |(path, body): &(&str, Value)| {
            let mut body = body.clone();
            body["stream_options"] = json!({"include_usage": true});
            Streamed::read(server.stream(path, &body))
        };
        let threads: Vec<_> = requests.iter().map(|request| scope.spawn(move || stream(request))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut num_sampled = 0;
    for (i, (answer, streamed)) in expected.iter().zip(&streamed).enumerate() {
        let choice = &answer["choices"][0];
        let text = choice["text"].as_str().or_else(|| choice["message"]["content"].as_str()).unwrap();
        assert!(streamed.done, "stream {i} ends with [DONE]");
        assert_eq!(streamed.token_ids, support::ids(&choice["token_ids"]), "stream {i}");
        assert_eq!(streamed.text, text, "stream {i}");
        assert_eq!(streamed.finish_reason.as_deref(), choice["finish_reason"].as_str(), "stream {i}");
        for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(streamed.usage[key], answer["usage"][key], "stream {i}: {key}");
        }
        assert_eq!(streamed.usage["completion_tokens"], streamed.token_ids.len(), "stream {i}");
        num_sampled += streamed.token_ids.len();
    }
    assert!(num_sampled > 64 * 5, "{num_sampled} tokens");
    assert_eq!(server.metric("vllm:generation_tokens_total"), 2.0 * num_sampled as f64);
    server.wait_until_idle();
}

/// Blocks for about a quarter of what the sequences need: they push each other out and are computed again.
#[test]
fn streams_survive_preemption() {
    let plenty = Server::start(MODEL, &["--max-model-len", "512"]);
    let body = |i: usize| with(endless(200), json!({"prompt": format!("Sequence number {i}")}));
    let expected: Vec<_> =
        (0..16).map(|i| plenty.ask(COMPLETIONS, &body(i))["choices"][0]["token_ids"].clone()).collect();
    assert_eq!(plenty.metric("vllm:num_preemptions_total"), 0.0);
    drop(plenty);
    // 1 KiB a token in float32, so 1024 tokens for 16 x 220.
    let server = Server::start(MODEL, &["--max-model-len", "512", "--kv-cache-memory-bytes", "1048576"]);
    std::thread::scope(|scope| {
        for (i, expected) in expected.iter().enumerate() {
            let server = &server;
            scope.spawn(move || {
                let streamed = Streamed::read(server.stream(COMPLETIONS, &body(i)));
                assert!(streamed.done, "stream {i}");
                assert_eq!(streamed.token_ids, support::ids(expected), "stream {i}");
            });
        }
    });
    assert!(server.metric("vllm:num_preemptions_total") > 0.0, "the cache was large enough for all");
    server.wait_until_idle();
}

#[test]
fn a_full_queue_is_a_503_that_says_when_to_come_back() {
    let arguments = ["--max-num-seqs", "1", "--max-num-queued-reqs", "2", "--max-model-len", "4096"];
    let server = Server::start(MODEL, &arguments);
    let mut running = server.stream(COMPLETIONS, &endless(4000));
    assert!(running.next().is_some());
    let waiting = [hang_up_later(&server, &endless(5)), hang_up_later(&server, &endless(5))];
    server.wait_for_metric("vllm:num_requests_waiting", |waiting| waiting == 2.0);
    let refused = server.post(COMPLETIONS, &endless(5));
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!(503)));
    assert!(refused.head.to_lowercase().contains("retry-after: 1"), "{}", refused.head);
    drop((running, waiting));
    server.wait_until_idle();
    check_canaries(&server);
}

/// Processor time of all threads of the server so far, in clock ticks (proc_pid_stat(5): fields 14 and 15).
fn cpu_ticks(server: &Server) -> u64 {
    let stat = server.proc_file("stat");
    // The second field is the name in brackets, which may hold spaces.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn an_idle_server_uses_no_processor() {
    let server = Server::start(MODEL, &[]);
    check_canaries(&server);
    server.wait_until_idle();
    let (start, before) = (Instant::now(), cpu_ticks(&server));
    // Nobody sends: this waits for ten seconds of wall time.
    let (_sender, receiver) = mpsc::channel::<()>();
    assert_eq!(receiver.recv_timeout(Duration::from_secs(10)), Err(mpsc::RecvTimeoutError::Timeout));
    let ticks = cpu_ticks(&server) - before;
    let used = ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
    let share = used / start.elapsed().as_secs_f64();
    assert!(share < 0.01, "an idle server used {:.2} % of a core", share * 100.0);
    check_canaries(&server);
}

#[test]
fn keys_are_needed_everywhere_but_for_health() {
    let server = Server::start(MODEL, &["--api-key", "first", "second"]);
    let body = json!({"prompt": "x", "max_tokens": 1}).to_string();
    let status = |method: &str, path: &str, key: Option<&str>| {
        let bearer = format!("Bearer {}", key.unwrap_or_default());
        let mut headers = vec![("Content-Type", "application/json")];
        if key.is_some() {
            headers.push(("Authorization", bearer.as_str()));
        }
        let body = if method == "POST" { body.as_bytes() } else { b"" };
        server.send(method, path, &headers, body).unwrap()
    };
    for (method, path) in
        [("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/version")]
    {
        for key in [None, Some("wrong"), Some("")] {
            let refused = status(method, path, key);
            assert_eq!(refused.status, 401, "{path} with {key:?}");
            assert_eq!(refused.json()["error"]["code"], 401);
        }
        for key in ["first", "second"] {
            assert_eq!(status(method, path, Some(key)).status, 200, "{path} with {key}");
        }
    }
    assert_eq!(status("GET", "/health", None).status, 200);
}

#[test]
fn a_client_that_goes_away_frees_its_blocks() {
    let server = Server::start(MODEL, &["--max-model-len", "4096"]);
    let mut events = server.stream(COMPLETIONS, &endless(4000));
    for _ in 0..3 {
        assert!(events.next().is_some_and(|data| data.contains("token_ids")));
    }
    assert_eq!(server.metric("vllm:num_requests_running"), 1.0);
    assert!(server.metric("vllm:kv_cache_usage_perc") > 0.0);
    drop(events);
    server.wait_until_idle();
    let generated = server.metric("vllm:generation_tokens_total");
    assert!(generated < 3900.0, "{generated} tokens were generated for nobody");
    assert_eq!(server.metric("vllm:request_success_total"), 1.0, "the one request is counted, as aborted");
    check_canaries(&server);
}

#[test]
fn a_waiting_client_that_goes_away_is_forgotten() {
    let server = Server::start(MODEL, &["--max-model-len", "4096", "--max-num-seqs", "1"]);
    let mut running = server.stream(COMPLETIONS, &endless(4000));
    assert!(running.next().is_some());
    // The head of a stream comes with the first token, so a waiting request is sent and not read.
    let waiting = hang_up_later(&server, &endless(4000));
    server.wait_for_metric("vllm:num_requests_waiting", |waiting| waiting == 1.0);
    drop(waiting);
    server.wait_for_metric("vllm:num_requests_waiting", |waiting| waiting == 0.0);
    assert_eq!(server.metric("vllm:num_requests_running"), 1.0, "the other one goes on");
    drop(running);
    server.wait_until_idle();
}

/// A request that is sent and whose answer is not read.
fn hang_up_later(server: &Server, body: &Value) -> TcpStream {
    let body = body.to_string();
    let mut stream = TcpStream::connect(server.address()).unwrap();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    stream
}

#[test]
fn hostile_clients_leave_nothing_behind() {
    let server = Server::start(MODEL, &["--max-num-seqs", "8", "--max-model-len", "2048"]);
    std::thread::scope(|scope| {
        for client in 0..40 {
            let server = &server;
            scope.spawn(move || hostile_client(server, client));
        }
    });
    server.wait_until_idle();
    assert_eq!(server.get("/health").status, 200);
    check_canaries(&server);
}

/// Goes away in the middle of its request, before the answer, or after a few events, as its number says.
fn hostile_client(server: &Server, client: usize) {
    let mut random = Random::new(client as u64);
    let (path, mut body) = mixed_body(client);
    (body["max_tokens"], body["ignore_eos"]) = (json!(1500), json!(true));
    match client % 4 {
        0 => {
            let text = body.to_string();
            let cut = random.below(text.len());
            let mut stream = TcpStream::connect(server.address()).unwrap();
            let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n");
            let request = format!(
                "{head}Content-Length: {}\r\n\r\n{}",
                text.len(),
                String::from_utf8_lossy(&text.as_bytes()[..cut])
            );
            stream.write_all(request.as_bytes()).unwrap();
        }
        1 => {
            // Not streamed: there is nothing to read before the end, so this goes away blindly.
            drop(hang_up_later(
                server,
                &json!({"prompt": "x", "max_tokens": 1500, "ignore_eos": true, "n": 3}),
            ));
        }
        _ => {
            let num_events = random.below(30);
            let read = server.stream(path, &body).take(num_events).count();
            assert_eq!(read, num_events, "client {client}");
        }
    }
}

/// When an answer began and ended.
fn times(server: &Server, body: &Value) -> (Instant, Instant) {
    let mut events = server.stream(COMPLETIONS, body);
    let first = events.next().map(|_| Instant::now()).unwrap();
    assert!(Streamed::read(events).done);
    (first, Instant::now())
}

#[test]
fn the_priority_policy_prefers_lower_numbers() {
    for (policy, urgent_first) in [("priority", true), ("fcfs", false)] {
        let arguments = ["--scheduling-policy", policy, "--max-num-seqs", "1", "--max-model-len", "4096"];
        let server = Server::start(MODEL, &arguments);
        let mut running = server.stream(COMPLETIONS, &endless(4000));
        assert!(running.next().is_some());
        let with_priority = |priority: i32| with(endless(20), json!({"priority": priority}));
        let (patient, urgent) = std::thread::scope(|scope| {
            let patient = scope.spawn(|| times(&server, &with_priority(5)));
            server.wait_for_metric("vllm:num_requests_waiting", |waiting| waiting == 1.0);
            let urgent = scope.spawn(|| times(&server, &with_priority(-5)));
            server.wait_for_metric("vllm:num_requests_waiting", |waiting| waiting == 2.0);
            drop(running);
            (patient.join().unwrap(), urgent.join().unwrap())
        });
        assert_eq!(urgent.0 < patient.0, urgent_first, "{policy}");
        let (first, second) = if urgent_first { (urgent, patient) } else { (patient, urgent) };
        assert!(first.0 < second.0 && first.1 <= second.1, "{policy}");
    }
}

#[test]
fn a_repeated_prompt_is_found_in_the_prefix_cache() {
    let server = Server::start(MODEL, &[]);
    let case = case("chat");
    let body = chat_body(&case, 8);
    let first = server.ask(CHAT, &body);
    let hits = server.metric("vllm:prefix_cache_hits_total");
    assert_eq!((hits, &first["usage"]["prompt_tokens_details"]["cached_tokens"]), (0.0, &json!(0)));
    let second = server.ask(CHAT, &body);
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    // All whole blocks but for those of the last token, which is always computed.
    assert!(
        cached >= 96 && cached < case.prompt_ids.len() as u64,
        "{cached} of {} tokens",
        case.prompt_ids.len()
    );
    assert_eq!(server.metric("vllm:prefix_cache_hits_total"), cached as f64);
    assert_eq!(first["choices"][0]["token_ids"], second["choices"][0]["token_ids"]);
    let salted = server.ask(CHAT, &with(body.clone(), json!({"cache_salt": "other"})));
    assert_eq!(salted["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "a salt separates caches");
    let without = Server::start(MODEL, &["--no-enable-prefix-caching"]);
    without.ask(CHAT, &body);
    assert_eq!(without.ask(CHAT, &body)["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(without.metric("vllm:prefix_cache_hits_total"), 0.0);
}
