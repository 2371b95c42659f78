//! Fetching, against servers on the loopback that answer whatever a test wants. Names are resolved by the tests.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

use super::*;
use crate::media::source::Budget;

/// Answers of a name, one list for each time that it is asked; the last stays.
type Answers = Vec<Vec<IpAddr>>;

#[derive(Default)]
struct Names {
    answers: Mutex<HashMap<String, Answers>>,
    asked: Arc<AtomicUsize>,
}

impl Resolve for Names {
    fn resolve(
        &self,
        host: String,
        port: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>> {
        self.asked.fetch_add(1, Relaxed);
        let mut names = self.answers.lock().unwrap();
        let answer = match names.get_mut(&host) {
            Some(answers) if answers.len() > 1 => answers.remove(0),
            Some(answers) => answers[0].clone(),
            None => return Box::pin(async { Err(io::ErrorKind::NotFound.into()) }),
        };
        Box::pin(async move { Ok(answer.into_iter().map(|ip| SocketAddr::from((ip, port))).collect()) })
    }
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// A client that may ask 127.0.0.1 on any port, and knows some names.
fn fetcher(change: impl FnOnce(&mut FetchPolicy)) -> Fetcher {
    let names = Names::default();
    *names.answers.lock().unwrap() = [
        ("good.test", vec![ips(&["127.0.0.1"])]),
        ("also.good.test", vec![ips(&["127.0.0.1"])]),
        ("other.test", vec![ips(&["127.0.0.1"])]),
        ("inside.test", vec![ips(&["127.0.0.2"])]),
        // Public at first, then inside; and one of each at once.
        ("rebind.test", vec![ips(&["127.0.0.1"]), ips(&["10.0.0.1"])]),
        ("both.test", vec![ips(&["127.0.0.1", "169.254.169.254"])]),
    ]
    .map(|(name, answers)| (name.to_owned(), answers))
    .into();
    let mut policy = FetchPolicy {
        networks: vec!["127.0.0.1/32".parse().unwrap()],
        image_timeout: Duration::from_secs(20),
        ..FetchPolicy::default()
    };
    change(&mut policy);
    Fetcher::with(policy, Box::new(names), RootCertStore::empty())
}

/// A server that answers each connection with the same bytes after it has read a request, and says how often it was asked
/// and what the last request was.
struct Server {
    port: u16,
    count: Arc<AtomicUsize>,
    last: Arc<Mutex<String>>,
}

async fn serve(answer: impl Into<Vec<u8>>) -> Server {
    serve_with(Arc::new(answer.into()), false).await
}

/// `endless`: the answer is followed by zeros until the client is gone.
async fn serve_with(answer: Arc<Vec<u8>>, endless: bool) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (count, last) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(String::new())));
    let server = Server { port, count: count.clone(), last: last.clone() };
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (answer, count, last) = (answer.clone(), count.clone(), last.clone());
            tokio::spawn(async move {
                let mut request = vec![0; 16 << 10];
                let len = stream.read(&mut request).await.unwrap_or(0);
                *last.lock().unwrap() = String::from_utf8_lossy(&request[..len]).into_owned();
                count.fetch_add(1, Relaxed);
                let mut sent = stream.write_all(&answer).await;
                while endless && sent.is_ok() {
                    sent = stream.write_all(&[0; 4096]).await;
                }
                if answer.is_empty() {
                    // Holds the connection without a word.
                    drop(stream.read(&mut request).await);
                }
            });
        }
    });
    server
}

fn ok(headers: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
}

async fn fetch(fetcher: &Fetcher, url: &str) -> Result<Vec<u8>, ApiError> {
    let budget = Budget::new(1 << 20);
    fetcher.fetch(Kind::Image, url, 1000, budget.hold()).await.map(|(bytes, _)| bytes)
}

/// Fetches what must not be had: 422, with these words, and no address in them.
async fn refused(fetcher: &Fetcher, url: &str, rule: &str) {
    let error = fetch(fetcher, url).await.expect_err(url);
    assert_eq!(error.status(), 422, "{url}: {error}");
    assert!(error.to_string().contains(rule), "{url}: {error}");
    for secret in ["127.", "10.0", "169.", "test", "::"] {
        assert!(!error.to_string().contains(secret), "{url}: {error}");
    }
}

#[tokio::test]
async fn a_file_is_fetched_without_traces() {
    let server = serve(ok("Content-Type: image/png\r\nSet-Cookie: a=b\r\n", "picture")).await;
    let fetcher = fetcher(|_| {});
    for host in ["127.0.0.1", "good.test", "GOOD.test", "[::ffff:127.0.0.1]", "0x7f.1", "2130706433"] {
        let url = format!("http://{host}:{}/a%20b.png?x=1#part", server.port);
        // Whatever the spelling: it is the address that is judged, and this one is allowed here.
        assert_eq!(fetch(&fetcher, &url).await.unwrap(), b"picture", "{host}");
    }
    let request = server.last.lock().unwrap().to_ascii_lowercase();
    assert!(request.starts_with("get /a%20b.png?x=1 http/1.1\r\n"), "{request}");
    assert!(request.contains("accept-encoding: identity") && !request.contains("cookie"), "{request}");
    assert!(!request.contains("authorization") && !request.contains("referer"), "{request}");
    for mime in ["image/jpeg; charset=x", "VIDEO/mp4", "application/octet-stream"] {
        let server = serve(ok(&format!("Content-Type: {mime}\r\n"), "x")).await;
        fetch(&fetcher, &format!("http://good.test:{}/", server.port)).await.expect(mime);
    }
}

#[tokio::test]
async fn addresses_inside_are_not_asked() {
    let fetcher = fetcher(|_| {});
    for host in [
        "10.0.0.1",
        "127.0.0.2",
        "127.1.1.1",
        "0.0.0.0",
        "169.254.169.254",
        "192.168.0.1",
        "0251.0376.0251.0376",
        "0xa9fea9fe",
        "2852039166",
        "0177.0.0.2",
        "127.2",
        "[::1]",
        "[::]",
        "[::ffff:10.0.0.1]",
        "[::ffff:a9fe:a9fe]",
        "[64:ff9b::a9fe:a9fe]",
        "[fd00:ec2::254]",
        "[fe80::1]",
        "[2002:7f00:1::]",
        "inside.test",
        "both.test",
        "%31%30.0.0.1",
        "10。0。0。1",
        "１０.0.0.1",
    ] {
        refused(&fetcher, &format!("http://{host}/x.png"), "may not ask").await;
    }
    // Public addresses on ports of other services.
    refused(&fetcher, "http://1.1.1.1:22/x.png", "may not ask").await;
    refused(&fetcher, "https://[2606:4700::1111]:6379/", "may not ask").await;
    for url in [
        "http://user@good.test/",
        "http://user:secret@good.test/",
        "http://:secret@good.test/",
        "http://",
        "http:///",
        "http://good.test:99999/",
        "https://[::1",
        "http://good .test/",
        "https://exa\u{0}mple.com/",
        "http:",
    ] {
        refused(&fetcher, url, "").await;
    }
    refused(&fetcher, &format!("http://good.test/{}", "x".repeat(9000)), "cannot be read").await;
    refused(&fetcher, "http://absent.test/", "no host").await;
    // A backslash is a slash here and nowhere else: one parser both judges and asks.
    refused(&fetcher, "http://inside.test\\@good.test/", "may not ask").await;
}

#[tokio::test]
async fn a_name_is_resolved_once_and_each_time_judged() {
    let server = serve(ok("", "first")).await;
    let fetcher = fetcher(|_| {});
    let url = format!("http://rebind.test:{}/", server.port);
    assert_eq!(fetch(&fetcher, &url).await.unwrap(), b"first");
    // The name now leads inside.
    refused(&fetcher, &url, "may not ask").await;
    assert_eq!(server.count.load(Relaxed), 1);
}

#[tokio::test]
async fn domains_can_be_named() {
    let server = serve(ok("", "x")).await;
    let fetcher = fetcher(|policy| {
        policy.domains = vec!["Good.test".into(), ".other.test".into(), "*.third.test".into()]
    });
    let url = |host: &str| format!("http://{host}:{}/", server.port);
    assert!(fetch(&fetcher, &url("good.test")).await.is_ok());
    for host in
        ["also.good.test", "other.test", "127.0.0.1", "good.test.evil.test", "third.test", "xgood.test"]
    {
        refused(&fetcher, &url(host), "may not ask").await;
    }
    let allows = |host: &str| fetcher.policy.allows_domain(host);
    assert!(
        allows("a.other.test") && allows("a.b.third.test") && allows("good.test.") && !allows("aother.test")
    );
}

#[tokio::test]
async fn redirects_are_followed_by_hand() {
    let fetcher = fetcher(|_| {});
    let end = serve(ok("Content-Type: image/png\r\n", "end")).await;
    let to =
        |location: &str| format!("HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n");
    let first = serve(to(&format!("http://also.good.test:{}/x", end.port))).await;
    assert_eq!(fetch(&fetcher, &format!("http://good.test:{}/", first.port)).await.unwrap(), b"end");
    for location in [
        "http://127.0.0.2/",
        "http://localhost/",
        "http://inside.test/",
        "http://[::1]/",
        "file:///etc/passwd",
        "gopher://good.test/",
        "data:image/png;base64,AA==",
        "http://user@good.test/",
        "//10.0.0.1/x",
        "http://both.test/",
    ] {
        let server = serve(to(location)).await;
        refused(&fetcher, &format!("http://good.test:{}/", server.port), "").await;
    }
    let endless = serve(to("/again")).await;
    refused(&fetcher, &format!("http://good.test:{}/", endless.port), "redirects").await;
    assert_eq!(endless.count.load(Relaxed), 1 + MAX_REDIRECTS);
    let nowhere = serve("HTTP/1.1 301 Moved\r\nContent-Length: 0\r\n\r\n").await;
    refused(&fetcher, &format!("http://good.test:{}/", nowhere.port), "redirects").await;
    let (secure, plain) = (
        Url::parse("https://a/").unwrap(),
        HeaderMap::from_iter([(header::LOCATION, "http://a/".parse().unwrap())]),
    );
    assert_eq!(redirect(&secure, &plain), Err(FetchError::Redirects), "not from https to http");
}

#[tokio::test]
async fn answers_that_are_too_much_or_nothing_are_refused() {
    let fetcher = fetcher(|_| {});
    let long = "x".repeat(1001);
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n";
    for (name, answer, rule) in [
        ("long", ok("", &long), "over the limit"),
        ("a claim", "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nx".into(), "over the limit"),
        ("zero", ok("", ""), "empty"),
        ("HTML", ok("Content-Type: text/html\r\n", "<p>"), "declared as neither"),
        ("JSON", ok("Content-Type: application/json; image/png\r\n", "{}"), "declared as neither"),
        ("a bomb", ok("Content-Encoding: gzip\r\nContent-Type: image/png\r\n", "\u{1f}"), "compressed"),
        (
            "an error",
            "HTTP/1.1 500 Secret\r\nContent-Length: 6\r\n\r\nsecret".into(),
            "answered with an error",
        ),
        ("none", "HTTP/1.1 204 No\r\n\r\n".into(), "answered with an error"),
        ("a part", "HTTP/1.1 206 Part\r\nContent-Length: 1\r\n\r\nx".into(), "answered with an error"),
        ("cut", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx".into(), "broke"),
        ("no chunk", format!("{}zz\r\n", &chunked[..chunked.len() - 6]), "broke"),
        ("no HTTP", "SSH-2.0-OpenSSH\r\n".into(), "broke"),
        ("headers", format!("HTTP/1.1 200 OK\r\n{}\r\n", "A: b\r\n".repeat(200)), "broke"),
        ("a header", format!("HTTP/1.1 200 OK\r\nA: {}\r\n\r\n", "b".repeat(100_000)), "broke"),
    ] {
        let server = serve(answer).await;
        let url = format!("http://good.test:{}/", server.port);
        refused(&fetcher, &url, rule).await;
        assert_eq!(server.count.load(Relaxed), 1, "{name}");
    }
    for head in ["HTTP/1.1 200 OK\r\n\r\n", chunked] {
        let endless = serve_with(Arc::new(head.as_bytes().to_vec()), true).await;
        refused(&fetcher, &format!("http://good.test:{}/", endless.port), "over the limit").await;
    }
}

#[tokio::test]
async fn a_host_that_is_slow_costs_its_time_and_no_more() {
    let fetcher = fetcher(|policy| {
        policy.image_timeout = Duration::from_millis(100);
        policy.connect_timeout = Duration::from_millis(50);
    });
    let silent = serve(Vec::new()).await;
    refused(&fetcher, &format!("http://good.test:{}/", silent.port), "in time").await;
    // TLS that never begins: the time for the connection.
    refused(&fetcher, &format!("https://good.test:{}/", silent.port), "in time").await;
}

#[tokio::test]
async fn what_is_held_is_bounded() {
    let server = serve(ok("", &"x".repeat(600))).await;
    let (fetcher, budget) = (fetcher(|_| {}), Budget::new(1000));
    let url = format!("http://good.test:{}/", server.port);
    let get = || fetcher.fetch(Kind::Image, &url, 1000, budget.hold());
    let first = get().await.unwrap();
    assert_eq!(get().await.map(|_| ()).unwrap_err().status(), 503);
    drop(first);
    assert!(get().await.is_ok());
}

#[tokio::test]
async fn certificates_are_checked() {
    let key = rcgen::generate_simple_self_signed(["good.test".to_owned()]).unwrap();
    let certificate = key.cert.der().clone();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.clone()],
            PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()).into(),
        )
        .unwrap();
    let (acceptor, listener) =
        (TlsAcceptor::from(Arc::new(config)), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(mut stream) = acceptor.accept(stream).await {
                drop(stream.read(&mut [0; 4096]).await);
                drop(stream.write_all(ok("", "secure").as_bytes()).await);
                drop(stream.shutdown().await);
            }
        }
    });
    let mut trusting = fetcher(|_| {});
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    trusting.tls = Some(TlsConnector::from(Arc::new(config.with_no_client_auth())));
    let url = |host: &str| format!("https://{host}:{port}/");
    assert_eq!(fetch(&trusting, &url("good.test")).await.unwrap(), b"secure");
    refused(&trusting, &url("other.test"), "does not answer").await;
    refused(&fetcher(|_| {}), &url("good.test"), "does not answer").await;
}
