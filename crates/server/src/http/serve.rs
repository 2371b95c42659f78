//! The accept loop and what a connection may cost: how many there are, how long a client may take to ask and to read. Deadlines of
//! the program and its signals are not here.

use std::{future::Future, io, sync::Arc, time::Duration};

use axum::{body::Body, extract::Request, middleware::from_fn_with_state};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;

use super::{
    Cors, HttpState, Tls,
    browsers::check_host,
    intake::{self, Intake},
    router,
};

use crate::metrics::Rejection;

/// Pause after a failed accept that is not one connection's fault: too many open files, for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What clients may take of the server.
#[derive(Clone)]
pub struct ServeOptions {
    /// Most connections at once; one more gets a 503 and is closed.
    pub max_connections: usize,
    /// From the first moment, or the end of the last answer, to the end of a request's headers.
    pub header_timeout: Duration,
    /// How long a client may leave an answer unread before it is given up.
    pub write_timeout: Duration,
    /// The longest pause within a request's body.
    pub body_timeout: Duration,
    /// Most bytes of bodies that are being read and judged, over all requests; one more gets a 503.
    pub max_intake_bytes: usize,
    /// Pages that may call from other origins.
    pub cors: Cors,
    /// Names under which a server without keys on a loopback address may be called, besides those that are never public; `*` is
    /// all.
    pub allowed_hosts: Vec<String>,
    /// Certificate and key; `None` serves plain HTTP.
    pub tls: Option<Tls>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            header_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(30),
            max_intake_bytes: 1 << 30,
            cors: Cors::default(),
            allowed_hosts: Vec::new(),
            tls: None,
        }
    }
}

/// Serves until `shutdown` completes; then takes no more connections and returns when all answers are finished.
///
/// # Errors
/// When [`ServeOptions::cors`] cannot be followed. What goes wrong with a connection ends that connection.
pub async fn serve(
    listener: TcpListener,
    state: HttpState,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let connections = Arc::new(Semaphore::new(options.max_connections.min(Semaphore::MAX_PERMITS)));
    let graceful = GracefulShutdown::new();
    let metrics = state.front_end.metrics.clone();
    let router = guarded(&listener, state, &options)?;
    let server = Arc::new(Server { router, options });
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut shutdown => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                if !is_of_one_connection(&error) {
                    tracing::error!("cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                continue;
            }
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else {
            metrics.rejected(Rejection::Connections);
            tokio::spawn(refuse(stream, server.options.tls.is_some()));
            continue;
        };
        let (server, watcher) = (server.clone(), graceful.watcher());
        tokio::spawn(async move {
            server.connection(stream, watcher).await;
            drop(permit);
        });
    }
    drop(listener);
    graceful.shutdown().await;
    Ok(())
}

/// The routes behind what only a server on the network needs.
fn guarded(listener: &TcpListener, state: HttpState, options: &ServeOptions) -> io::Result<axum::Router> {
    let cors = options.cors.layer().map_err(io::Error::other)?;
    let is_local = listener.local_addr()?.ip().is_loopback() && state.api_keys.is_open();
    let intake = (Intake::new(options.max_intake_bytes), options.body_timeout);
    let mut router = router(state).layer(from_fn_with_state(intake, intake::limit));
    if is_local {
        let allowed: Arc<[String]> = options.allowed_hosts.clone().into();
        router = router.layer(from_fn_with_state(allowed, check_host));
    }
    Ok(match cors {
        Some(cors) => router.layer(cors),
        None => router,
    })
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Tells a client that there are too many; one that speaks TLS would not understand, and only sees the end.
async fn refuse(mut stream: TcpStream, is_tls: bool) {
    const BODY: &str = r#"{"error":{"message":"too many connections; try again in a moment","type":"overloaded_error","param":null,"code":503}}"#;
    if is_tls {
        return;
    }
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    // Whoever does not take this within a moment goes without.
    let _ = timeout(Duration::from_secs(1), stream.write_all(answer.as_bytes())).await;
}

struct Server {
    router: axum::Router,
    options: ServeOptions,
}

impl Server {
    async fn connection(&self, stream: TcpStream, watcher: Watcher) {
        // A token must not wait for the acknowledgement of the one before.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("cannot set TCP_NODELAY on a connection: {error}");
        }
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.options.write_timeout));
        let stream = Box::pin(stream);
        match &self.options.tls {
            None => self.requests(stream, watcher).await,
            Some(tls) => match timeout(self.options.header_timeout, tls.accept(stream)).await {
                Ok(Ok(stream)) => self.requests(stream, watcher).await,
                Ok(Err(error)) => tracing::debug!("a TLS handshake has failed: {error}"),
                Err(_) => tracing::debug!("a TLS handshake took too long"),
            },
        }
    }

    async fn requests(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, watcher: Watcher) {
        let service = self.router.clone().map_request(|request: Request<Incoming>| request.map(Body::new));
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(self.options.header_timeout);
        let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
        if let Err(error) = watcher.watch(connection).await {
            tracing::debug!("a connection has ended: {error}");
        }
    }
}
