//! Groups 1 to 6: the wire, the keys, browsers and the log.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use serde_json::{Value, json};

use super::{chat, completion, exchange, post, refused, status_of, survives};
use crate::{
    server::{CHAT, COMPLETIONS, MODEL, check_canaries},
    support::server::{DEADLINE, Server},
};

const BODY: &str = r#"{"prompt": "x", "max_tokens": 1}"#;
const JSON: &str = "Host: x\r\nConnection: close\r\nContent-Type: application/json\r\n";

/// A request with `headers` (each ended) and `body`, as written.
fn raw(line: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("{line} HTTP/1.1\r\n{headers}\r\n{body}").into_bytes()
}

fn post_raw(headers: &str, body: &str) -> Vec<u8> {
    raw(&format!("POST {COMPLETIONS}"), &format!("{JSON}{headers}"), body)
}

/// A body in chunks of one byte.
fn byte_by_byte(body: &str) -> String {
    let chunks: String = body.chars().map(|char| format!("1\r\n{char}\r\n")).collect();
    chunks + "0\r\n\r\n"
}

#[test]
fn group_01_requests_that_are_no_http_are_refused() {
    let limits = ["--max-body-bytes", "100000", "--header-timeout", "1", "--body-timeout", "1"];
    survives(&limits, |server| {
        let length = BODY.len();
        let chunked = "Transfer-Encoding: chunked\r\n";
        let many: String = (0..10_000).map(|i| format!("X-{i}: y\r\n")).collect();
        let refusals = [
            ("a header of 1 MB", post_raw(&format!("X-Large: {}\r\n", "y".repeat(1 << 20)), "")),
            ("10,000 headers", post_raw(&many, "")),
            ("an address of 128 KB", raw(&format!("GET /{}", "a".repeat(128 << 10)), JSON, "")),
            ("a body over the limit", post_raw("Content-Length: 200000\r\n", &" ".repeat(200_000))),
            (
                "the same in chunks",
                post_raw(chunked, &format!("30d40\r\n{}\r\n0\r\n\r\n", " ".repeat(200_000))),
            ),
            ("a chunk of a size that is none", post_raw(chunked, "zz\r\nx\r\n0\r\n\r\n")),
            ("a chunk of 2^64 bytes", post_raw(chunked, "fffffffffffffffff\r\nx\r\n")),
            ("a negative length", post_raw("Content-Length: -1\r\n", BODY)),
            ("two lengths", post_raw(&format!("Content-Length: {length}\r\nContent-Length: 5\r\n"), BODY)),
            (
                "a compressed body",
                post_raw("Content-Encoding: gzip\r\nContent-Length: 3\r\n", "\u{1f}\u{7f}"),
            ),
            ("no HTTP at all", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec()),
            ("a line feed in a name", raw("GET /health\nX: y", JSON, "")),
        ];
        for (name, bytes) in refusals {
            let status = status_of(&exchange(server, &bytes));
            // What is not HTTP may also be met with the end of the connection.
            assert!(status == 0 || (400..500).contains(&status), "{name}: {status}");
        }
        let slow = exchange(server, &post_raw(chunked, &byte_by_byte(BODY)));
        assert_eq!(status_of(&slow), 200, "bytes one by one are slow, not wrong: {slow}");
    });
}

#[test]
fn group_01_a_request_cannot_hide_in_another() {
    survives(&[], |server| {
        let hidden = "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let both = format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n", hidden.len() + 5);
        let answer = exchange(server, &post_raw(&both, &format!("0\r\n\r\n{hidden}")));
        assert!(!answer.contains("\"list\""), "the hidden request was answered: {answer}");
        // Less than was promised: there is nothing to answer, and nothing to wait for once the client is gone.
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.write_all(&post_raw("Content-Length: 1000\r\n", BODY)).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let _ = stream.read_to_string(&mut answer);
        assert!(matches!(status_of(&answer), 0 | 400), "{answer}");
    });
}

#[test]
fn group_02_slow_idle_and_hasty_connections_are_bounded() {
    let limits = ["--header-timeout", "1", "--body-timeout", "1", "--max-connections", "600"];
    survives(&limits, |server| {
        let idle: Vec<TcpStream> = (0..500).map(|_| TcpStream::connect(server.address()).unwrap()).collect();
        check_canaries(server);
        for begun in [&b"GET /health HTTP/1.1\r\nX: "[..], &post_raw("Content-Length: 1000\r\n", "{")] {
            let status = status_of(&exchange(server, begun));
            assert!(matches!(status, 0 | 408), "{status}");
        }
        let last = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let hasty = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n".repeat(100) + last;
        let answers = exchange(server, hasty.as_bytes());
        assert_eq!(answers.matches("HTTP/1.1 200").count(), 101, "every request of a pipeline is answered");
        // Those that never said anything are closed by now or soon, while they are still open on this side.
        server.wait_for_files(100);
        drop(idle);
    });
}

#[test]
fn group_03_json_cannot_take_more_than_it_brings() {
    survives(&[], |server| {
        let ones = |count: usize| format!("[{}1]", "1,".repeat(count));
        let long_key = format!(r#"{{"{}": 1, "prompt": "x"}}"#, "k".repeat(10 << 20));
        for (name, body) in [
            ("10 million numbers", format!(r#"{{"prompt": {}}}"#, ones(10_000_000))),
            ("10 million lists", format!("[{}[]]", "[],".repeat(10_000_000))),
            ("a text of 30 MB", format!(r#"{{"prompt": "{}"}}"#, " ".repeat(30 << 20))),
            ("30 MB of one picture", format!(r#"{{"prompt": "{}"}}"#, "\u{1f600}".repeat(7 << 20))),
            ("not a number", r#"{"prompt": "x", "temperature": NaN}"#.to_owned()),
            ("infinity", r#"{"prompt": "x", "temperature": Infinity}"#.to_owned()),
        ] {
            assert_eq!(post(server, COMPLETIONS, name, body.as_bytes()), 400, "{name}");
        }
        for (name, body) in [
            ("a key of 10 MB", long_key.as_str()),
            ("a field twice", r#"{"prompt": "x", "max_tokens": 1, "max_tokens": 2}"#),
            ("a NUL in the text", r#"{"prompt": "a\u0000b", "max_tokens": 1}"#),
        ] {
            let status = post(server, COMPLETIONS, name, body.as_bytes());
            assert!(matches!(status, 200 | 400), "{name}: {status}");
        }
    });
}

#[test]
fn group_04_every_documented_route_needs_the_key_and_nobody_tells_it() {
    let key = "sk-a-key-nobody-should-see";
    let server = Server::start(MODEL, &["--api-key", key, "--admin-api-key", "sk-the-operators-key"]);
    let bearer = format!("Bearer {key}");
    let document = server.send("GET", "/openapi.json", &[("Authorization", &bearer)], b"").unwrap().json();
    let mut num_routes = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let path = path.replace("{id}", "x").replace("{name}", "x");
            let method = method.to_uppercase();
            for header in ["", "Bearer", "Bearer ", "Bearer sk-a-key-nobody-should-se", "Bearer ключ", key]
            {
                let headers = [("Content-Type", "application/json"), ("Authorization", header)];
                let status = server.send(&method, &path, &headers, b"{}").unwrap().status;
                let is_open = ["/health", "/live", "/ready", "/ping"].contains(&path.as_str());
                assert_eq!(status, if is_open { 200 } else { 401 }, "{method} {path} with {header:?}");
            }
            num_routes += 1;
        }
    }
    assert!(num_routes > 15, "{num_routes} routes");
    for (path, key, status) in
        [("/metrics", key, 403), ("/metrics", "sk-the-operators-key", 200), ("/v1/models", key, 200)]
    {
        let answer = server.send("GET", path, &[("x-api-key", key)], b"").unwrap();
        assert_eq!(answer.status, status, "{path}");
        assert!(!String::from_utf8_lossy(&answer.body).contains("sk-"), "{path} tells a key");
    }
    let log = server.wait_for_log("listening");
    assert!(!log.contains("sk-"), "the log tells a key: {log}");
}

#[test]
fn group_05_pages_of_others_get_nothing() {
    survives(&[], |server| {
        let evil = "Origin: https://evil.example\r\nConnection: close\r\n";
        let asked = raw(
            &format!("OPTIONS {CHAT}"),
            &format!("Host: x\r\n{evil}Access-Control-Request-Method: POST\r\n"),
            "",
        );
        let called = raw("GET /v1/models", &format!("Host: x\r\n{evil}"), "");
        for answer in [exchange(server, &asked), exchange(server, &called)] {
            assert!(!answer.to_lowercase().contains("access-control-"), "{answer}");
        }
        // What a form of another page can send without asking.
        let form = format!("Host: x\r\n{evil}Content-Type: text/plain\r\nContent-Length: {}\r\n", BODY.len());
        assert_eq!(status_of(&exchange(server, &raw(&format!("POST {COMPLETIONS}"), &form, BODY))), 415);
        let rebound =
            exchange(server, &raw("GET /v1/models", "Host: evil.example:8000\r\nConnection: close\r\n", ""));
        assert_eq!(status_of(&rebound), 403, "{rebound}");
        let page = exchange(server, &raw("GET /", "Host: x\r\nConnection: close\r\n", ""));
        assert!(page.contains("default-src 'none'") && !page.contains("unsafe-inline"), "{page}");
    });
}

#[test]
fn group_06_the_log_has_neither_prompts_nor_lines_of_clients() {
    let server = Server::start(MODEL, &["--log-level", "debug"]);
    let secret = "the-secret-of-a-prompt";
    let colour = "\u{1b}[31m\r\n2026-01-01 ERROR forged";
    let picture = "data:image/png;base64,c2VjcmV0LXBpY3R1cmU=";
    let content =
        json!([{"type": "text", "text": secret}, {"type": "image_url", "image_url": {"url": picture}}]);
    refused(
        &server,
        CHAT,
        "a broken picture",
        &chat("messages", json!([{"role": "user", "content": content}])),
    );
    for name in [colour, secret] {
        refused(&server, COMPLETIONS, "a model", &completion("model", json!(colour)));
        let mut body = completion("prompt", json!(name));
        body["request_id"] = json!(colour);
        body[colour] = json!(1);
        let status = post(&server, COMPLETIONS, "a forged name", body.to_string().as_bytes());
        assert!(matches!(status, 200 | 400), "{status}");
    }
    let body: Value = completion("request_id", json!("the-last-one"));
    server.ask(COMPLETIONS, &body);
    let log = server.wait_for_log("the-last-one");
    assert!(!log.contains(secret) && !log.contains("c2VjcmV0"), "{log}");
    assert!(!log.contains('\u{1b}'), "{log}");
    assert!(!log.lines().any(|line| line.starts_with("2026-01-01 ERROR forged")), "{log}");
    let line = log.lines().find(|line| line.contains("the-last-one")).unwrap();
    for field in ["prompt_tokens=1", "output_tokens=2", "cached_tokens=0", "finish=\"length\"", "ttft_ms="] {
        assert!(line.contains(field), "{field}: {line}");
    }
}
