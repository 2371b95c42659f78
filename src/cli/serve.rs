//! `spark-engine serve`: the HTTP server, its signals and its end.

use std::{
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use clap::{Args, builder::RangedU64ValueParser};
use serde_json::Value;
use spark_engine::{Failure, FailureHook, SparkEngine, server};
use tokio::net::TcpListener;

use super::{
    answers::AnswerArgs,
    args::{ModelArgs, Watchers},
    crash::{self, CrashReporter},
    log_tail, notify,
    otlp::Traces,
    ranks::{DEVICE_FAILED, PEER_LOST, RankArgs},
    signals::Signals,
};

/// What clients have to read their last bytes once the engine has nothing left to do.
const LAST_BYTES: Duration = Duration::from_secs(2);

/// Serve an OpenAI-compatible HTTP API.
#[derive(Args)]
#[command(args_override_self = true)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    answers: AnswerArgs,
    /// A TOML file with settings under the names of these flags (`port = 9000`); flags on the command line count more.
    #[arg(long, help_heading = "Server", env = "SPARK_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen on, or a name of one; 0.0.0.0 for all, :: for those of IPv6 too.
    #[arg(long, help_heading = "Server", default_value = "127.0.0.1", value_parser = address)]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one and prints it.
    #[arg(long, help_heading = "Server", default_value_t = 8000)]
    port: u16,
    /// Keys that clients must send as `Authorization: Bearer KEY`; several may be given.
    #[arg(long, help_heading = "Server", env = "SPARK_API_KEY", value_name = "KEY", num_args = 1.., hide_env_values = true)]
    api_key: Vec<String>,
    /// Keys for operators: they open everything, and once there is one, /metrics and /load open to nobody else.
    #[arg(long, help_heading = "Server", env = "SPARK_ADMIN_API_KEY", value_name = "KEY", num_args = 1.., hide_env_values = true)]
    admin_api_key: Vec<String>,
    /// Origins whose pages may call from a browser, such as https://chat.example.org, "localhost" (all of this
    /// machine) or "*"; by default none may.
    #[arg(long, help_heading = "Server", value_name = "ORIGIN", num_args = 1..)]
    allowed_origins: Vec<String>,
    /// Methods that these pages may use.
    #[arg(long, help_heading = "Server", value_name = "METHOD", num_args = 1.., default_value = "*")]
    allowed_methods: Vec<String>,
    /// Headers that these pages may send.
    #[arg(long, help_heading = "Server", value_name = "HEADER", num_args = 1.., default_value = "*")]
    allowed_headers: Vec<String>,
    /// These pages may send cookies and HTTP logins.
    #[arg(long, help_heading = "Server")]
    allow_credentials: bool,
    /// Public names under which a server without keys may be called on a loopback address, or "*". Other names are refused: a page
    /// could let its own name point here.
    #[arg(long, help_heading = "Server", value_name = "NAME", num_args = 1..)]
    allowed_hosts: Vec<String>,
    /// Largest request body, in bytes.
    #[arg(long, help_heading = "Server", default_value_t = server::DEFAULT_MAX_BODY_BYTES, value_name = "BYTES", value_parser = at_least_one())]
    max_body_bytes: usize,
    /// Most prompt tokens of all sequences at work, each counting as 256 at least; more get a 503. One alone is always taken.
    #[arg(long, help_heading = "Server", default_value_t = 1 << 26, value_name = "TOKENS")]
    max_num_queued_tokens: usize,
    /// Most connections at once; one more gets a 503.
    #[arg(long, help_heading = "Server", default_value_t = 4096, value_name = "N", value_parser = at_least_one())]
    max_connections: usize,
    /// How long a client may take to send a request's headers, or stay silent between requests, in seconds.
    #[arg(long, help_heading = "Server", default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    header_timeout: u64,
    /// How long a client may pause within a request's body, in seconds.
    #[arg(long, help_heading = "Server", default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    body_timeout: u64,
    /// Most bytes of request bodies that are being read and judged, over all clients; one more gets a 503.
    #[arg(long, help_heading = "Server", default_value_t = 1 << 30, value_name = "BYTES", value_parser = at_least_one())]
    max_intake_bytes: usize,
    /// How long a client may leave an answer unread, in seconds; its request is cancelled then.
    #[arg(long, help_heading = "Server", default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    write_timeout: u64,
    /// Certificate chain in PEM form: serve HTTPS. Read again when the file changes.
    #[arg(long, help_heading = "Server", value_name = "FILE", requires = "ssl_keyfile")]
    ssl_certfile: Option<PathBuf>,
    /// Private key of --ssl-certfile in PEM form.
    #[arg(long, help_heading = "Server", value_name = "FILE", requires = "ssl_certfile")]
    ssl_keyfile: Option<PathBuf>,
    /// After SIGTERM, SIGINT or SIGHUP: how long running requests may take to finish, in seconds.
    #[arg(long, help_heading = "Server", default_value_t = 30, value_name = "SECONDS")]
    shutdown_timeout: u64,
    /// Send a span for each request to this collector of OpenTelemetry (OTLP over HTTP, http://HOST:4318).
    #[arg(long, help_heading = "Server", value_name = "URL")]
    otlp_traces_endpoint: Option<String>,
    /// Where a folder is written when the engine fails: its last steps and requests (without what they say), log, memory. By
    /// default below $STATE_DIRECTORY or ~/.local/state/spark-engine; `none` writes none.
    #[arg(long, help_heading = "Server", env = "SPARK_CRASH_DIR", value_name = "FOLDER")]
    crash_dir: Option<PathBuf>,
    /// Open the page in a browser when the server is ready.
    #[arg(long, help_heading = "Server")]
    open: bool,
}

impl ServeArgs {
    pub(crate) fn ranks(&self) -> &RankArgs {
        &self.model.ranks
    }
}

pub(crate) fn run(args: ServeArgs, settings: Value) -> anyhow::Result<()> {
    log_tail::keep_panics();
    let crashes = args.crash_reporter(&settings);
    if args.model.ranks.is_follower()? {
        return args.model.follow().inspect_err(|error| {
            if let Some(crashes) = crashes {
                crashes.rank_failed(&format!("{error:#}"));
            }
        });
    }
    let options = args.options()?;
    let traces = args.otlp_traces_endpoint.as_deref().map(Traces::to).transpose()?.map(Arc::new);
    let ServeArgs { model, host, port, api_key, admin_api_key, .. } = args;
    for (flag, keys) in [("--api-key", &api_key), ("--admin-api-key", &admin_api_key)] {
        anyhow::ensure!(!keys.iter().any(String::is_empty), "{flag}: an empty key would let everybody in");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // Bound before loading, so that a taken port is known at once and not after minutes.
    let listener = runtime.block_on(TcpListener::bind((host, port))).with_context(|| {
        format!("--host {host} --port {port}: cannot listen there (--port 0 takes a free one)")
    })?;
    raise_open_files();
    let watchers = watchers(crashes, traces.as_ref(), settings);
    let engine = model.for_server(args.max_num_queued_tokens, args.answers, watchers).build()?;
    let address = listener.local_addr()?;
    let scheme = if options.tls.is_some() { "https" } else { "http" };
    // Before anybody is told that the server is there: whoever reads that may end it at once, and it ends in order.
    let signals = {
        let _entered = runtime.enter();
        Signals::take()?
    };
    announce(&engine, scheme, address, args.open);
    let state = server::HttpState {
        front_end: engine.front_end().clone(),
        api_keys: server::ApiKeys::new(api_key).with_admins(admin_api_key),
        max_body_bytes: args.max_body_bytes,
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let shutdown = async move {
        // An error means that the sender is gone, which is a stop as well.
        let _ = stopped.await;
    };
    let serving = server::serve(listener, state, options, shutdown);
    // Dropped before the runtime, which waits for the thread that waits for the engine.
    let stop_at_last = StopOnDrop(engine.clone());
    let failure = runtime.block_on(serve(
        engine,
        serving,
        signals,
        stop,
        Duration::from_secs(args.shutdown_timeout),
    ))?;
    // Threads end, and other ranks with them, before the process does.
    drop(stop_at_last);
    drop(runtime);
    if let Some(traces) = traces {
        traces.finish();
    }
    match failure {
        None => Ok(()),
        Some(Failure::Device(_)) => std::process::exit(DEVICE_FAILED),
        Some(Failure::Group(_) | Failure::Defect(_)) => std::process::exit(PEER_LOST),
    }
}

/// Reports of crashes and spans, where they are wanted.
fn watchers(crashes: Option<Arc<CrashReporter>>, traces: Option<&Arc<Traces>>, settings: Value) -> Watchers {
    let mut watchers = Watchers { settings, ..Watchers::default() };
    if let Some(traces) = traces {
        watchers.observers.add(traces.clone());
    }
    if let Some(crashes) = crashes {
        watchers.observers.add(crashes.clone());
        watchers.on_failure = FailureHook::new(move |report| crashes.engine_failed(report));
    }
    watchers
}

impl ServeArgs {
    /// Who writes reports of failures; `None` if nobody should, or could say where.
    fn crash_reporter(&self, settings: &Value) -> Option<Arc<CrashReporter>> {
        let folder = match &self.crash_dir {
            Some(folder) => Some(folder.clone()).filter(|folder| folder.as_os_str() != "none"),
            None => crash::default_folder(),
        };
        let folder = folder?;
        // Better known now than when there is something to report.
        if let Err(error) = crash::try_folder(&folder) {
            let folder = folder.display();
            tracing::warn!(
                "a failure would leave no report in {folder}: {error}; --crash-dir names another folder, or none"
            );
        }
        Some(CrashReporter::new(folder, settings.clone()))
    }
}

impl ServeArgs {
    /// What clients may take of the server.
    fn options(&self) -> anyhow::Result<server::ServeOptions> {
        let tls = match (&self.ssl_certfile, &self.ssl_keyfile) {
            (Some(certificates), Some(key)) => {
                let tls = server::Tls::open(certificates, key);
                Some(tls.context("--ssl-certfile and --ssl-keyfile: HTTPS cannot be served with them")?)
            }
            _ => None,
        };
        let cors = server::Cors {
            origins: words("--allowed-origins", &self.allowed_origins)?,
            methods: words("--allowed-methods", &self.allowed_methods)?,
            headers: words("--allowed-headers", &self.allowed_headers)?,
            credentials: self.allow_credentials,
        };
        cors.check()?;
        Ok(server::ServeOptions {
            max_connections: self.max_connections,
            header_timeout: Duration::from_secs(self.header_timeout),
            write_timeout: Duration::from_secs(self.write_timeout),
            body_timeout: Duration::from_secs(self.body_timeout),
            max_intake_bytes: self.max_intake_bytes,
            cors,
            allowed_hosts: words("--allowed-hosts", &self.allowed_hosts)?,
            tls,
        })
    }
}

/// A limit: with 0 the server would answer nobody.
fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// `--host`: an address, also in the brackets that it has in URLs, or a name as vLLM takes one. Of several that a name has the first
/// of IPv4, which all clients of this machine find.
fn address(text: &str) -> Result<IpAddr, String> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    if let Ok(address) = bare.parse() {
        return Ok(address);
    }
    let found = (bare, 0)
        .to_socket_addrs()
        .map_err(|error| format!("neither an address nor a known name ({error})"))?;
    let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    let first = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
    first.copied().ok_or_else(|| "a name without an address".to_owned())
}

/// The words of a list: one by one, or as the JSON list that vLLM's flags take.
fn words(flag: &str, given: &[String]) -> anyhow::Result<Vec<String>> {
    let mut words = Vec::new();
    for text in given {
        match text.starts_with('[') && text.ends_with(']') {
            true => words.extend(
                serde_json::from_str::<Vec<String>>(text)
                    .with_context(|| format!("{flag} {text}: not a list of texts"))?,
            ),
            false => words.push(text.clone()),
        }
    }
    Ok(words)
}

/// Ends the engine however the server ends, also by an error or a panic.
struct StopOnDrop(SparkEngine);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A connection is a file, and shells leave a process 1,024 of them by default: as many as the system lets it have without asking.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::debug!("cannot raise the number of open files: {error}");
    }
}

/// Says that the server is ready, and last where its page is.
fn announce(engine: &SparkEngine, scheme: &str, address: SocketAddr, open: bool) {
    let info = engine.info();
    tracing::info!(
        "{} ready: up to {} tokens a sequence, KV cache of {} tokens",
        info.architecture,
        info.limits.max_model_len,
        info.num_kv_tokens
    );
    tracing::info!("listening on {scheme}://{address} (try: curl {scheme}://{address}/v1/models)");
    // An address that means all of them is none to visit.
    let page = match (address.ip().is_unspecified(), address.is_ipv6()) {
        (false, _) => format!("{scheme}://{address}/"),
        (true, false) => format!("{scheme}://127.0.0.1:{}/", address.port()),
        (true, true) => format!("{scheme}://[::1]:{}/", address.port()),
    };
    tracing::info!("to chat, open {page} in a browser");
    if open {
        open_browser(&page);
    }
}

/// By the desktop's own program, which returns at once or lives as long as the browser.
fn open_browser(page: &str) {
    use std::process::{Command, Stdio};
    let mut command = Command::new("xdg-open");
    command.arg(page).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match command.spawn() {
        Ok(mut child) => {
            std::thread::spawn(move || child.wait());
        }
        Err(error) => tracing::warn!("--open: xdg-open cannot be started: {error}"),
    }
}

/// Serves until the first of the signals, then drains; a second signal or the deadline ends what is left. A connection
/// that waits for a request which never becomes whole holds nothing up: it is dropped soon after the last answer is made.
///
/// An engine that has lost its device or its ranks for good ends the server, because only a new process can serve again; what
/// it was is returned. After a defect the server stays and says so.
async fn serve(
    engine: SparkEngine,
    serving: impl Future<Output = std::io::Result<()>> + Send + 'static,
    mut signals: Signals,
    stop: tokio::sync::oneshot::Sender<()>,
    deadline: Duration,
) -> anyhow::Result<Option<Failure>> {
    let mut serving = tokio::spawn(serving);
    let waiting = engine.clone();
    let mut ended = tokio::task::spawn_blocking(move || waiting.join());
    notify::ready();
    tokio::select! {
        result = &mut serving => {
            result??;
            return Ok(None);
        }
        () = notify::stay_alive() => {}
        failure = fatal(&engine, &mut ended) => {
            tokio::time::sleep(LAST_BYTES).await;
            finish_now(&engine, serving).await;
            return Ok(Some(failure));
        }
        () = signals.next() => {}
    }
    notify::stopping();
    tracing::info!("shutting down: running requests have {} s to finish", deadline.as_secs());
    engine.drain();
    let _ = stop.send(());
    let last_bytes = async {
        // The engine has ended also when the task that waited for it has panicked, or has been asked before.
        if !ended.is_finished() {
            let _ = ended.await;
        }
        tokio::time::sleep(LAST_BYTES).await;
    };
    tokio::select! {
        result = &mut serving => result??,
        () = last_bytes => {
            tracing::info!("all requests are finished: dropping the connections that are left");
            serving.abort();
        }
        () = tokio::time::sleep(deadline) => {
            tracing::warn!("the shutdown timeout has passed: cancelling what is left");
            finish_now(&engine, serving).await;
        }
        () = signals.next() => finish_now(&engine, serving).await,
    }
    Ok(None)
}

/// Waits until the engine has failed in a way that ends the process; for ever if it does not.
async fn fatal(engine: &SparkEngine, ended: &mut tokio::task::JoinHandle<()>) -> Failure {
    // It has ended also when the task that waited for it has panicked.
    let _ = ended.await;
    match engine.failure() {
        Some(failure @ (Failure::Device(_) | Failure::Group(_))) => failure,
        Some(Failure::Defect(_)) | None => std::future::pending().await,
    }
}

/// Ends all requests, gives their last bytes a moment to leave, then drops the connections that are left (idle ones of
/// clients that keep them open, for example).
async fn finish_now(engine: &SparkEngine, serving: tokio::task::JoinHandle<std::io::Result<()>>) {
    engine.abort();
    let abort = serving.abort_handle();
    if tokio::time::timeout(Duration::from_millis(500), serving).await.is_err() {
        abort.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_let_nobody_in_are_refused() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: ServeArgs,
        }
        let parse = |flag: &str, value: &str| <Line as clap::Parser>::try_parse_from(["serve", flag, value]);
        for flag in [
            "--max-body-bytes",
            "--max-connections",
            "--max-intake-bytes",
            "--header-timeout",
            "--body-timeout",
            "--write-timeout",
        ] {
            assert!(parse(flag, "0").is_err(), "{flag}");
            assert!(parse(flag, "1").is_ok(), "{flag}");
        }
        assert_eq!(parse("--shutdown-timeout", "0").ok().map(|line| line.args.shutdown_timeout), Some(0));
        assert!(parse("--served-model-name", "").is_err());
        assert!(parse("--threads", "99999").is_err());
    }

    #[test]
    fn a_host_is_an_address_or_a_name() {
        assert_eq!(address("0.0.0.0").unwrap(), IpAddr::from([0, 0, 0, 0]));
        assert_eq!(address("[::1]"), address("::1"));
        assert!(address("localhost").unwrap().is_loopback());
        for text in ["", "http://localhost", "1.2.3.4:80", "no such name"] {
            assert!(address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn lists_come_word_by_word_or_as_json() {
        let given = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        assert_eq!(words("--x", &given(&["a", "b"])).unwrap(), ["a", "b"]);
        assert_eq!(words("--x", &given(&[r#"["a", "*"]"#, "b"])).unwrap(), ["a", "*", "b"]);
        assert!(words("--x", &given(&["[a]"])).unwrap_err().to_string().contains("--x [a]"));
    }
}
