//! A hub on the loopback interface: answers one request a connection by what the test says. Not a whole HTTP server.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::{Value, json};

pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(super) const MODEL: &str = "owner/name";

/// A request as it came.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    /// With its query.
    pub(super) path: String,
    /// First byte of the range that was asked for.
    pub(super) from: Option<usize>,
    pub(super) authorization: Option<String>,
}

/// An answer.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    /// The connection ends after so many bytes of the body, whatever its length was said to be.
    pub(super) cut: Option<usize>,
}

impl Reply {
    pub(super) fn status(status: u16) -> Self {
        Reply { status, headers: Vec::new(), body: Vec::new(), cut: None }
    }

    pub(super) fn ok(body: &[u8]) -> Self {
        Reply { body: body.to_vec(), ..Reply::status(200) }
    }

    pub(super) fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    pub(super) fn cut(mut self, after: usize) -> Self {
        self.cut = Some(after);
        self
    }

    /// The wanted range of `body`.
    pub(super) fn range(body: &[u8], seen: &Seen) -> Self {
        let Some(from) = seen.from else { return Reply::ok(body) };
        let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
        Reply { status: 206, ..Reply::ok(&body[from..]).with("Content-Range", &range) }
    }
}

type Answer = dyn Fn(&Seen) -> Reply + Send + Sync;

/// Serves until it is dropped.
pub(super) struct Stub {
    pub(super) endpoint: String,
    log: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stub {
    pub(super) fn new(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let answer: Arc<Answer> = Arc::new(answer);
        let thread = std::thread::spawn({
            let (log, stop) = (Arc::clone(&log), Arc::clone(&stop));
            move || {
                let mut connections = Vec::new();
                for stream in listener.incoming().flatten() {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                    connections.push(std::thread::spawn(move || serve(stream, &log, &*answer)));
                }
                connections.into_iter().for_each(|connection| connection.join().unwrap());
            }
        });
        Stub { endpoint: format!("http://{address}"), log, stop, thread: Some(thread) }
    }

    /// Every request so far, in order.
    pub(super) fn seen(&self) -> Vec<Seen> {
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes `accept`.
        let _ = TcpStream::connect(self.endpoint.trim_start_matches("http://"));
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Vec<Seen>>, answer: &Answer) {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut seen = Seen { path: String::new(), from: None, authorization: None };
    let mut lines = BufReader::new((&stream).take(64 << 10)).lines();
    let Some(Ok(first)) = lines.next() else { return };
    seen.path = first.split(' ').nth(1).unwrap().to_owned();
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        match name.to_ascii_lowercase().as_str() {
            "authorization" => seen.authorization = Some(value.to_owned()),
            "range" => {
                let from = value.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
                seen.from = Some(from.unwrap().parse().unwrap());
            }
            _ => {}
        }
    }
    log.lock().unwrap().push(seen.clone());
    let reply = answer(&seen);
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    // The client may hang up first: that is its right.
    let sent = reply.cut.unwrap_or(reply.body.len());
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&reply.body[..sent]));
}

/// Files of a model and whether they are in large-file storage.
#[derive(Debug, Clone)]
pub(super) struct Files(pub(super) Vec<(&'static str, Vec<u8>, bool)>);

impl Files {
    pub(super) fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.iter().find(|file| file.0 == name).map(|file| &*file.1)
    }

    /// The answer of the hub to a question for the model.
    pub(super) fn info(&self) -> Value {
        let siblings: Vec<Value> = self
            .0
            .iter()
            .map(|(name, bytes, large)| {
                let mut entry = json!({ "rfilename": name, "size": bytes.len(), "blobId": git_hash(bytes) });
                if *large {
                    entry["lfs"] =
                        json!({ "sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 134 });
                }
                entry
            })
            .collect();
        json!({ "id": MODEL, "sha": COMMIT, "gated": false, "siblings": siblings })
    }

    /// What a hub that does everything right answers.
    pub(super) fn answer(&self, seen: &Seen) -> Reply {
        if seen.path == format!("/api/models/{MODEL}/revision/main?blobs=true") {
            return Reply::ok(self.info().to_string().as_bytes());
        }
        match self.get(name_of(seen)) {
            Some(bytes) => Reply::range(bytes, seen),
            None => Reply::status(404).with("X-Error-Code", "EntryNotFound"),
        }
    }
}

/// The file that a request is for.
pub(super) fn name_of(seen: &Seen) -> &str {
    let prefix = format!("/{MODEL}/resolve/{COMMIT}/");
    seen.path.strip_prefix(prefix.as_str()).unwrap_or("")
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

pub(super) fn git_hash(bytes: &[u8]) -> String {
    let blob = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
