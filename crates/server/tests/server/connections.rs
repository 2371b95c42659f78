//! What a connection may cost: too many, too slow, or speaking TLS. These tests use sockets.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::json;
use spark_server::{ApiKeys, Cors, HttpState, ServeOptions, Tls, serve};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName},
};

use crate::fake::{Fake, Script};
use crate::{front_end, ids};

/// What a test waits for something at most.
const DEADLINE: Duration = Duration::from_secs(20);
const GET: &[u8] = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n";

async fn start(engine: &Arc<Fake>, options: ServeOptions) -> SocketAddr {
    start_with(engine, options, ApiKeys::default()).await
}

async fn start_with(engine: &Arc<Fake>, options: ServeOptions, api_keys: ApiKeys) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let state = HttpState { front_end: front_end(engine, |_| {}), api_keys, max_body_bytes: 1 << 20 };
    tokio::spawn(serve(listener, state, options, std::future::pending()));
    address
}

async fn all(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut bytes = Vec::new();
    // A reset is an end as well.
    let _ = timeout(DEADLINE, stream.read_to_end(&mut bytes)).await.expect("the server ends the connection");
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn head(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut bytes = vec![0; 15];
    timeout(DEADLINE, stream.read_exact(&mut bytes)).await.expect("an answer").unwrap();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn one_connection_too_many_is_told_so_and_there_is_room_again_later() {
    let engine = Fake::new(Script::Hang(ids("ab")));
    let address = start(&engine, ServeOptions { max_connections: 2, ..ServeOptions::default() }).await;
    let mut first = TcpStream::connect(address).await.unwrap();
    let mut second = TcpStream::connect(address).await.unwrap();
    for stream in [&mut first, &mut second] {
        stream.write_all(GET).await.unwrap();
        assert_eq!(head(stream).await, "HTTP/1.1 200 OK");
    }
    let mut third = TcpStream::connect(address).await.unwrap();
    let refused = all(&mut third).await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("Retry-After: 1"), "{refused}");
    drop(first);
    let began = Instant::now();
    loop {
        let mut again = TcpStream::connect(address).await.unwrap();
        again.write_all(GET).await.unwrap();
        if head(&mut again).await == "HTTP/1.1 200 OK" {
            break;
        }
        assert!(began.elapsed() < DEADLINE, "the place of a closed connection is never free");
    }
}

#[tokio::test]
async fn headers_that_never_end_do_not_keep_a_connection() {
    let engine = Fake::new(Script::Hang(ids("ab")));
    let limit = Duration::from_millis(200);
    let address = start(&engine, ServeOptions { header_timeout: limit, ..ServeOptions::default() }).await;
    for begun in [&b""[..], b"GET /health HTTP/1.1\r\nX-Slow: "] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(begun).await.unwrap();
        let said = all(&mut stream).await;
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 408"), "{said}");
    }
}

#[tokio::test]
async fn a_client_that_never_reads_is_given_up() {
    // More than the buffers of a connection hold.
    let num_tokens = 60_000;
    let script = Script::Hang(vec![97; num_tokens]);
    let engine = Fake::with_limits(script, |limits| limits.max_model_len = 2 * num_tokens);
    let limit = Duration::from_millis(300);
    let address = start(&engine, ServeOptions { write_timeout: limit, ..ServeOptions::default() }).await;
    let body = json!({"prompt": "x", "stream": true, "max_tokens": num_tokens + 1}).to_string();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(head(&mut stream).await, "HTTP/1.1 200 OK");
    // Nothing is read from here on.
    let sender = engine.hanging.lock().unwrap()[0].clone();
    timeout(DEADLINE, sender.closed()).await.expect("the request of a client that never reads is cancelled");
}

/// Sends `text` and reads all that comes back.
async fn exchange(address: SocketAddr, text: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    all(&mut stream).await
}

fn post_head(num_bytes: usize) -> String {
    format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {num_bytes}\r\n\r\n"
    )
}

#[tokio::test]
async fn a_body_that_stops_coming_is_a_408() {
    let engine = Fake::new(Script::Hang(ids("ab")));
    let options = ServeOptions { body_timeout: Duration::from_millis(200), ..ServeOptions::default() };
    let address = start(&engine, options).await;
    for begun in ["", "{\"prompt\""] {
        let said = exchange(address, &(post_head(100) + begun)).await;
        assert!(said.starts_with("HTTP/1.1 408") && said.contains("RequestTimeoutError"), "{said}");
    }
}

#[tokio::test]
async fn bodies_share_a_bound_and_give_it_back() {
    let engine = Fake::says("xy");
    let options = ServeOptions { max_intake_bytes: 4000, ..ServeOptions::default() };
    let address = start(&engine, options).await;
    let body = r#"{"prompt": "x"}"#;
    let ask = async || exchange(address, &(post_head(body.len()) + body)).await;
    // One client holds all but what a second one needs.
    let mut slow = TcpStream::connect(address).await.unwrap();
    slow.write_all((post_head(100_000) + &" ".repeat(3990)).as_bytes()).await.unwrap();
    let began = Instant::now();
    loop {
        let said = ask().await;
        if said.starts_with("HTTP/1.1 503") {
            assert!(said.contains("retry-after: 1") && said.contains("4000 bytes"), "{said}");
            break;
        }
        assert!(began.elapsed() < DEADLINE, "the bytes of the slow client are never counted");
    }
    drop(slow);
    while !ask().await.starts_with("HTTP/1.1 200") {
        assert!(began.elapsed() < DEADLINE, "what a client held that went away never comes back");
    }
    for _ in 0..100 {
        let said = ask().await;
        assert!(said.starts_with("HTTP/1.1 200"), "what an answered request held has to come back: {said}");
    }
}

#[tokio::test]
async fn prompts_at_work_share_a_bound_and_give_it_back() {
    let engine = Fake::new(Script::Hang(ids("ab")));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // Room for one short prompt, which counts as 256 tokens, and not for two.
    let front_end = front_end(&engine, |options| options.max_num_queued_tokens = 300);
    let state = HttpState { front_end, api_keys: ApiKeys::default(), max_body_bytes: 1 << 20 };
    tokio::spawn(serve(listener, state, ServeOptions::default(), std::future::pending()));
    let body = r#"{"prompt": "x", "stream": true}"#;
    let ask = async || {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all((post_head(body.len()) + body).as_bytes()).await.unwrap();
        let head = head(&mut stream).await;
        (stream, head)
    };
    let (first, begun) = ask().await;
    assert_eq!(begun, "HTTP/1.1 200 OK");
    let refused = exchange(address, &(post_head(body.len()) + body)).await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("retry-after: 1"), "{refused}");
    assert!(refused.contains("300 tokens"), "{refused}");
    let page = exchange(address, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    let rejections = page.lines().find(|line| line.contains("reason=\"max_num_queued_tokens\"")).unwrap();
    assert!(rejections.ends_with(" 1"), "{rejections}");
    drop(first);
    let began = Instant::now();
    while ask().await.1 != "HTTP/1.1 200 OK" {
        assert!(began.elapsed() < DEADLINE, "the tokens of a client that went away never come back");
    }
}

#[tokio::test]
async fn pages_of_other_origins_are_refused_unless_they_are_named() {
    let engine = Fake::says("xy");
    let preflight = |origin: &str| {
        format!(
            "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: {origin}\r\n\
             Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization,content-type\r\n\r\n"
        )
    };
    let (good, evil) = ("https://good.example", "https://evil.example");
    let all_words = || vec!["*".to_owned()];
    let cors = Cors {
        origins: vec![good.to_owned()],
        methods: all_words(),
        headers: all_words(),
        credentials: false,
    };
    let closed = start(&engine, ServeOptions::default()).await;
    // A key is needed for calls, not for the question whether calls may be made.
    let options = ServeOptions { cors, ..ServeOptions::default() };
    let open = start_with(&engine, options, ApiKeys::new(["key"])).await;
    for (address, origin, is_allowed) in
        [(closed, good, false), (closed, evil, false), (open, evil, false), (open, good, true)]
    {
        let said = exchange(address, &preflight(origin)).await.to_lowercase();
        let allows = said.contains(&format!("access-control-allow-origin: {origin}"));
        assert_eq!(allows, is_allowed, "{origin}: {said}");
        if is_allowed {
            assert!(said.contains("access-control-allow-headers: authorization,content-type"), "{said}");
        }
    }
    let wrong = Cors { origins: vec!["no origin".to_owned()], ..Cors::default() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let state =
        HttpState { front_end: front_end(&engine, |_| {}), api_keys: ApiKeys::default(), max_body_bytes: 1 };
    let options = ServeOptions { cors: wrong, ..ServeOptions::default() };
    assert!(serve(listener, state, options, std::future::ready(())).await.is_err());
}

#[tokio::test]
async fn a_name_of_somebody_else_does_not_open_a_local_server() {
    let engine = Fake::says("xy");
    let local = start(&engine, ServeOptions::default()).await;
    let allowed_hosts = vec!["spark.example.org".to_owned()];
    let named = start(&engine, ServeOptions { allowed_hosts, ..ServeOptions::default() }).await;
    let with_key = start_with(&engine, ServeOptions::default(), ApiKeys::new(["key"])).await;
    for (address, host, status) in [
        (local, "evil.example", 403),
        (local, "spark.example.org", 403),
        (local, "localhost:8000", 200),
        (named, "spark.example.org:443", 200),
        (named, "evil.example", 403),
        (with_key, "evil.example", 200),
    ] {
        let said =
            exchange(address, &format!("GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))
                .await;
        assert!(said.starts_with(&format!("HTTP/1.1 {status}")), "{host}: {said}");
    }
}

fn client_config(certificate: &rcgen::Certificate) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

fn write(folder: &Path, made: &rcgen::CertifiedKey<rcgen::KeyPair>) -> Tls {
    let [certificate, key] = ["cert.pem", "key.pem"].map(|name| folder.join(name));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    Tls::open(&certificate, &key).unwrap()
}

#[tokio::test]
async fn tls_is_spoken_and_plain_http_is_not() {
    let engine = Fake::new(Script::Hang(ids("ab")));
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let tls = Some(write(folder.path(), &made));
    let address = start(&engine, ServeOptions { tls, ..ServeOptions::default() }).await;
    let connector = TlsConnector::from(Arc::new(client_config(&made.cert)));
    let stream = TcpStream::connect(address).await.unwrap();
    let mut stream = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
    stream.write_all(GET).await.unwrap();
    assert_eq!(head(&mut stream).await, "HTTP/1.1 200 OK");
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(GET).await.unwrap();
    assert!(!all(&mut plain).await.contains("200 OK"));
}
