//! The program as a process, and a small HTTP client for it. No assertions about answers; what cannot be reached panics.
//!
//! The client speaks HTTP/1.0: the body ends with the connection, so there are no chunks to decode. The `openai` client
//! of `tests/python/` covers HTTP/1.1.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use spark_testing::{Network, model_dir};

/// How long anything here may take before a test fails: far more than on an idle machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The program with `arguments` and nothing from the environment that would change what it does.
pub(crate) fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spark-engine"));
    command.args(arguments).env_remove("SPARK_API_KEY").env_remove("SPARK_LOG").env_remove("SPARK_MODEL");
    command
}

/// [`program`] on a node of `network`.
pub(crate) fn program_in(network: &Network, node: usize, arguments: &[&str]) -> Command {
    let [ip, words @ ..] = network.enter(node);
    let plain = program(arguments);
    let mut command = Command::new(ip);
    command.args(words).arg(plain.get_program()).args(plain.get_args());
    // What `program` leaves out.
    for (name, _) in plain.get_envs().filter(|(_, value)| value.is_none()) {
        command.env_remove(name);
    }
    command
}

/// Arguments that fit every fixture to a test machine: float32, as the oracle, and little memory.
pub(crate) const SMALL: [&str; 6] =
    ["--dtype", "float32", "--threads", "2", "--kv-cache-memory-bytes", "67108864"];

/// [`SMALL`] without the flags that `arguments` has too.
fn small_but(arguments: &[&str]) -> Vec<&'static str> {
    SMALL.chunks(2).filter(|pair| !arguments.contains(&pair[0])).flatten().copied().collect()
}

/// A running `serve`; killed when dropped.
pub(crate) struct Server {
    child: Child,
    address: SocketAddr,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    /// The text so far, and whether there will be no more.
    text: Mutex<(String, bool)>,
    grown: Condvar,
}

/// A whole response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    /// Status line and headers.
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

/// Data of server-sent events, one by one. Dropping it closes the connection.
pub(crate) struct Events(BufReader<TcpStream>);

impl Server {
    /// Serves fixture `model` on a free port and waits until it answers.
    pub(crate) fn start(model: &str, arguments: &[&str]) -> Self {
        Self::serve(Some(&model_dir(model)), &[&small_but(arguments), arguments].concat())
    }

    /// Serves the model in `folder`, by default the demo model, with `arguments` and no others.
    pub(crate) fn serve(folder: Option<&Path>, arguments: &[&str]) -> Self {
        Self::serve_with(folder, arguments, &[])
    }

    /// [`serve`](Self::serve) with variables in its environment.
    pub(crate) fn serve_with(folder: Option<&Path>, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut command = program(&["serve", "--port", "0"]);
        command.args(folder).args(arguments).envs(variables.iter().copied());
        Self::launch(command)
    }

    /// [`serve_with`](Self::serve_with) in the first namespace of `network`.
    pub(crate) fn serve_in(
        network: &Network,
        folder: Option<&Path>,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let host = network.address(0, 0).to_string();
        let mut command = program_in(network, 0, &["serve", "--port", "0", "--host", &host]);
        command.args(folder).args(arguments).envs(variables.iter().copied());
        Self::launch(command)
    }

    /// Starts a server and waits until it answers.
    pub(crate) fn launch(mut command: Command) -> Self {
        command.stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let log = Arc::new(Log::default());
        let (stderr, shared) = (child.stderr.take().expect("stderr is piped"), log.clone());
        std::thread::spawn(move || shared.follow(BufReader::new(stderr)));
        // Made before the wait, so that a server that never gets ready is killed too.
        let mut server = Self { child, address: SocketAddr::from(([127, 0, 0, 1], 0)), log };
        let text = server.log.wait_for("/v1/models)");
        let address = text.split("listening on http://").nth(1).and_then(|rest| rest.split(' ').next());
        server.address =
            address.and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no address in {text}"));
        server
    }

    /// What `--port 0` has become.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Everything on stderr so far, once `needle` is in it.
    pub(crate) fn wait_for_log(&self, needle: &str) -> String {
        self.log.wait_for(needle)
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.send("GET", path, &[], b"").expect("the server answers")
    }

    /// A body of any kind, declared as JSON.
    pub(crate) fn post_bytes(&self, path: &str, body: &[u8]) -> Response {
        self.send("POST", path, &[("Content-Type", "application/json")], body).expect("the server answers")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    /// The answer to a body that is expected to be answered.
    pub(crate) fn ask(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body);
        let shown: String = body.to_string().chars().take(500).collect();
        assert_eq!(response.status, 200, "{shown}: {}", String::from_utf8_lossy(&response.body));
        response.json()
    }

    /// A streamed answer: `body` with `stream` set.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Events {
        let mut body = body.clone();
        body["stream"] = Value::Bool(true);
        let json = [("Content-Type", "application/json")];
        let mut connection =
            self.open("POST", path, &json, body.to_string().as_bytes()).expect("the server accepts");
        let (status, head) = read_head(&mut connection).expect("the server answers");
        assert_eq!(status, 200, "{path}: {head}");
        Events(connection)
    }

    /// One request.
    ///
    /// # Errors
    /// When the server cannot be reached or closes the connection without an answer.
    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::io::Result<Response> {
        let mut connection = self.open(method, path, headers, body)?;
        let (status, head) = read_head(&mut connection)?;
        let mut body = Vec::new();
        connection.read_to_end(&mut body)?;
        Ok(Response { status, head, body })
    }

    fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::io::Result<BufReader<TcpStream>> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut head = format!(
            "{method} {path} HTTP/1.0\r\nHost: {}\r\nContent-Length: {}\r\n",
            self.address,
            body.len()
        );
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        // A server may refuse a body before it has read all of it; its answer is then still there to be read.
        let _ = stream.write_all(body);
        Ok(BufReader::new(stream))
    }

    /// Sum of a metric over its labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let page = String::from_utf8(self.get("/metrics").body).expect("metrics are text");
        let samples = page.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        let values: Vec<f64> = samples
            .map(|line| line.rsplit(' ').next().and_then(|v| v.parse().ok()).expect("a number"))
            .collect();
        assert!(!values.is_empty(), "/metrics has no {name}");
        values.iter().sum()
    }

    /// Waits until `metric` satisfies `condition`.
    pub(crate) fn wait_for_metric(&self, name: &str, condition: impl Fn(f64) -> bool) {
        let start = Instant::now();
        loop {
            let value = self.metric(name);
            if condition(value) {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "{name} is {value} after {DEADLINE:?}");
        }
    }

    /// Waits until nothing runs, nothing waits and no KV block is held.
    pub(crate) fn wait_until_idle(&self) {
        for name in ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"] {
            self.wait_for_metric(name, |value| value == 0.0);
        }
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        kill_process(self.pid(), Signal::TERM).expect("the process is a child of this one");
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// A file of the process in /proc, such as `stat`.
    pub(crate) fn proc_file(&self, name: &str) -> String {
        let path = format!("/proc/{}/{name}", self.pid().as_raw_nonzero());
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    /// Resident memory of the process, in KiB.
    pub(crate) fn resident_kib(&self) -> i64 {
        let status = self.proc_file("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let line = line.expect("Linux counts resident memory");
        line.trim().trim_end_matches(" kB").parse().expect("a number of KiB")
    }

    /// How many files and sockets the process has open.
    pub(crate) fn num_files(&self) -> usize {
        let path = format!("/proc/{}/fd", self.pid().as_raw_nonzero());
        std::fs::read_dir(&path).unwrap_or_else(|e| panic!("{path}: {e}")).count()
    }

    /// Waits until no more than `expected` files and sockets are open.
    pub(crate) fn wait_for_files(&self, expected: usize) {
        let start = Instant::now();
        while self.num_files() > expected {
            assert!(start.elapsed() < DEADLINE, "{} files are open, {expected} before", self.num_files());
            std::thread::yield_now();
        }
    }

    /// Waits for the end of the process.
    pub(crate) fn wait_for_exit(&mut self, within: Duration) -> ExitStatus {
        wait_for_exit(&mut self.child, within)
    }
}

/// Waits for the end of a process.
pub(crate) fn wait_for_exit(child: &mut Child, within: Duration) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("the process is a child of this one") {
            return status;
        }
        assert!(start.elapsed() < within, "the process runs on after {within:?}");
        std::thread::yield_now();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already; either way nothing is left to do about it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Log {
    fn follow(&self, lines: impl BufRead) {
        for line in lines.lines().map_while(Result::ok) {
            let mut log = self.text.lock().expect("no reader panics while it holds the lock");
            log.0 += &line;
            log.0.push('\n');
            self.grown.notify_all();
        }
        self.text.lock().expect("no reader panics while it holds the lock").1 = true;
        self.grown.notify_all();
    }

    fn wait_for(&self, needle: &str) -> String {
        let start = Instant::now();
        let mut log = self.text.lock().expect("the writer does not panic");
        while !log.0.contains(needle) {
            let (text, ended) = log.clone();
            let left = DEADLINE.checked_sub(start.elapsed()).filter(|_| !ended);
            let Some(left) = left else {
                // Panicking with the lock would hide this message behind another panic.
                drop(log);
                panic!("no {needle:?} after {:?} in:\n{text}", start.elapsed());
            };
            log = self.grown.wait_timeout(log, left).expect("the writer does not panic").0;
        }
        log.0.clone()
    }
}

/// Reads up to the empty line; returns the status and what was read.
fn read_head(connection: &mut impl BufRead) -> std::io::Result<(u16, String)> {
    let mut head = String::new();
    while connection.read_line(&mut head)? > 2 {}
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    match status {
        Some(status) => Ok((status, head)),
        None => Err(std::io::Error::other(format!("not an HTTP response: {head:?}"))),
    }
}

impl Response {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("not JSON ({e}): {}", String::from_utf8_lossy(&self.body)))
    }
}

impl Iterator for Events {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let mut line = String::new();
        loop {
            line.clear();
            // A connection that breaks ends the events as one that ends: who reads them expects [DONE].
            if self.0.read_line(&mut line).unwrap_or(0) == 0 {
                return None;
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(data.trim_end().to_owned());
            }
        }
    }
}

/// What a stream of one choice adds up to.
#[derive(Debug, Default)]
pub(crate) struct Streamed {
    pub(crate) text: String,
    pub(crate) token_ids: Vec<u32>,
    pub(crate) finish_reason: Option<String>,
    pub(crate) usage: Value,
    /// Whether `[DONE]` was the last event.
    pub(crate) done: bool,
}

impl Streamed {
    /// Reads to the end.
    pub(crate) fn read(events: impl Iterator<Item = String>) -> Self {
        let mut whole = Self::default();
        for data in events {
            whole.done = data == "[DONE]";
            if whole.done {
                continue;
            }
            let chunk: Value = serde_json::from_str(&data).unwrap_or_else(|e| panic!("{e}: {data}"));
            if let Value::Object(_) = &chunk["usage"] {
                whole.usage = chunk["usage"].clone();
            }
            for choice in chunk["choices"].as_array().into_iter().flatten() {
                let text = choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str());
                whole.text.push_str(text.unwrap_or_default());
                let ids = choice["token_ids"].as_array().into_iter().flatten();
                whole.token_ids.extend(ids.map(|id| id.as_u64().expect("an id is a number") as u32));
                if let Some(reason) = choice["finish_reason"].as_str() {
                    assert!(whole.finish_reason.is_none(), "a choice ends once");
                    whole.finish_reason = Some(reason.to_owned());
                }
            }
        }
        whole
    }
}
