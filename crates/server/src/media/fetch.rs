//! Fetches media by http and https, for strangers: so that nobody reaches through this server what is not public. A name is
//! resolved once, every answer is judged, and the connection goes to a judged address; each redirect begins anew. No
//! proxies, no cookies, no credentials, no compression, no connection used twice.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use futures_util::StreamExt;
use hyper::client::conn::http1;
use hyper::header::{self, HeaderMap};
use hyper::{Request, Response, StatusCode, body::Incoming};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use url::{Host, Url};

use super::address::{Network, is_public, unwrapped};
use super::source::{Hold, Kind};
use crate::ApiError;

/// Redirects of one fetch, at most.
const MAX_REDIRECTS: usize = 5;
/// An address longer than this is none of a picture.
const MAX_URL_BYTES: usize = 8192;
/// Most bytes of an answer's headers, and most of them.
const MAX_HEADER_BYTES: usize = 32 << 10;
const MAX_HEADERS: usize = 100;
/// Fetches that are under way at once, over all requests; others wait within their time.
const MAX_FETCHES: usize = 64;

/// What may be fetched, and how long it may take. By default: from every public address, in vLLM's times.
#[derive(Debug, Clone)]
pub struct FetchPolicy {
    /// `--allowed-media-domains`: names that may be fetched from; with a dot before it, all names below it. Empty: all.
    pub domains: Vec<String>,
    /// `--allowed-media-networks`: networks that may be fetched from though they are not public, on any port.
    pub networks: Vec<Network>,
    /// Until there is a connection.
    pub connect_timeout: Duration,
    /// Until an image is here, redirects and waiting included.
    pub image_timeout: Duration,
    /// Until a video is here.
    pub video_timeout: Duration,
}

impl Default for FetchPolicy {
    fn default() -> Self {
        Self {
            domains: Vec::new(),
            networks: Vec::new(),
            connect_timeout: Duration::from_secs(5),
            image_timeout: Duration::from_secs(5),
            video_timeout: Duration::from_secs(30),
        }
    }
}

impl FetchPolicy {
    fn allows_domain(&self, host: &str) -> bool {
        let host = host.trim_end_matches('.');
        let matches = |domain: &String| {
            let domain = domain.trim_start_matches('*').to_ascii_lowercase();
            if domain.starts_with('.') { host.ends_with(&domain) } else { host == domain }
        };
        self.domains.is_empty() || self.domains.iter().any(matches)
    }

    fn allows_address(&self, address: IpAddr, port: u16) -> bool {
        let address = unwrapped(address);
        self.networks.iter().any(|network| network.contains(address))
            || (is_public(address) && matches!(port, 80 | 443))
    }
}

/// Why nothing came. Neither addresses nor what a server said is told: that would show what this server can reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum FetchError {
    #[error("the URL cannot be read: expected https://host/path, without a name or password")]
    Url,
    #[error("the URL leads to a host or port that this server may not ask")]
    Forbidden,
    #[error("the URL leads to no host, or to one that does not answer")]
    Unreachable,
    #[error("the host did not send the file in time")]
    Slow,
    #[error("the URL leads through more than 5 redirects, or to one that cannot be followed")]
    Redirects,
    #[error("the host answered with an error")]
    Status,
    #[error("the URL leads to something that is declared as neither image nor video")]
    Type,
    #[error("the host sent the file compressed, though it was asked not to")]
    Encoding,
    #[error("the file at the URL is over the limit of this server")]
    TooLarge,
    #[error("the file at the URL is empty")]
    Empty,
    #[error("the connection broke before the file was complete")]
    Broken,
}

/// Finds the addresses of a name.
trait Resolve: Send + Sync {
    fn resolve(
        &self,
        host: String,
        port: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;
}

/// The system's resolver.
struct System;

impl Resolve for System {
    fn resolve(
        &self,
        host: String,
        port: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>> {
        Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
    }
}

/// A client for media.
pub(super) struct Fetcher {
    policy: FetchPolicy,
    resolver: Box<dyn Resolve>,
    tls: Option<TlsConnector>,
    slots: tokio::sync::Semaphore,
}

/// What one address answered.
enum Step {
    File(Vec<u8>),
    Redirect(Url),
}

impl Fetcher {
    /// A client under this policy.
    pub(super) fn new(policy: &FetchPolicy) -> Self {
        let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        Self::with(policy.clone(), Box::new(System), roots)
    }

    fn with(policy: FetchPolicy, resolver: Box<dyn Resolve>, roots: RootCertStore) -> Self {
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .inspect_err(|error| tracing::error!("no media will be fetched by https: {error}"))
            .map(|builder| builder.with_root_certificates(roots).with_no_client_auth());
        let tls = config.ok().map(|config| TlsConnector::from(Arc::new(config)));
        Self { policy, resolver, tls, slots: tokio::sync::Semaphore::new(MAX_FETCHES) }
    }

    /// The file at `url`, at most `max_bytes`, with its share of the budget.
    ///
    /// # Errors
    /// 422 when there is none that may be had, 503 when the budget is spent.
    pub(super) async fn fetch(
        &self,
        kind: Kind,
        url: &str,
        max_bytes: usize,
        mut hold: Hold,
    ) -> Result<(Vec<u8>, Hold), ApiError> {
        let limit = match kind {
            Kind::Image => self.policy.image_timeout,
            Kind::Video => self.policy.video_timeout,
        };
        let work = async {
            let _slot = self.slots.acquire().await.map_err(|error| ApiError::internal(&error))?;
            self.follow(kind, url, max_bytes, &mut hold).await
        };
        let bytes = tokio::time::timeout(limit, work)
            .await
            .unwrap_or_else(|_| Err(refuse(kind, FetchError::Slow)))?;
        Ok((bytes, hold))
    }

    async fn follow(
        &self,
        kind: Kind,
        url: &str,
        max_bytes: usize,
        hold: &mut Hold,
    ) -> Result<Vec<u8>, ApiError> {
        if url.len() > MAX_URL_BYTES {
            return Err(refuse(kind, FetchError::Url));
        }
        let mut url = Url::parse(url).map_err(|_| refuse(kind, FetchError::Url))?;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.ask(&url).await.map_err(|error| refuse(kind, error))?;
            match self.read(&url, response, max_bytes, kind, hold).await? {
                Step::File(bytes) => return Ok(bytes),
                Step::Redirect(next) => url = next,
            }
        }
        Err(refuse(kind, FetchError::Redirects))
    }

    /// Sends one request to a judged address. The headers of the answer have arrived, its body has not.
    async fn ask(&self, url: &Url) -> Result<Response<Incoming>, FetchError> {
        let (host, port) = target(url)?;
        let name = host.to_string();
        if !self.policy.allows_domain(&name) {
            return Err(FetchError::Forbidden);
        }
        let connect = async {
            let stream = self.connect(&host, port).await?;
            if url.scheme() == "http" {
                return shake(stream).await;
            }
            let server = ServerName::try_from(name.trim_matches(['[', ']']).to_owned())
                .map_err(|_| FetchError::Url)?;
            let tls = self.tls.as_ref().ok_or(FetchError::Unreachable)?;
            shake(tls.connect(server, stream).await.map_err(|_| FetchError::Unreachable)?).await
        };
        let connected = tokio::time::timeout(self.policy.connect_timeout, connect).await;
        let (mut sender, connection) = connected.map_err(|_| FetchError::Slow)??;
        let authority = if url.port().is_some() { format!("{name}:{port}") } else { name };
        let request = Request::builder()
            .uri(&url[url::Position::BeforePath..url::Position::AfterQuery])
            .header(header::HOST, authority)
            .header(header::USER_AGENT, concat!("spark-engine/", env!("CARGO_PKG_VERSION")))
            .header(header::ACCEPT, "image/*, video/*")
            .header(header::ACCEPT_ENCODING, "identity")
            .header(header::CONNECTION, "close")
            .body(Body::empty())
            .map_err(|_| FetchError::Url)?;
        let mut response = sender.send_request(request).await.map_err(|_| FetchError::Broken)?;
        // The connection lives as long as its answer is read.
        response.extensions_mut().insert(connection);
        Ok(response)
    }

    /// Resolves once and judges every answer: a name that leads inside by one of them is not asked at all.
    async fn connect(&self, host: &Host<&str>, port: u16) -> Result<TcpStream, FetchError> {
        let addresses = match host {
            Host::Ipv4(v4) => vec![SocketAddr::from((*v4, port))],
            Host::Ipv6(v6) => vec![SocketAddr::from((*v6, port))],
            Host::Domain(name) => {
                let resolved = self.resolver.resolve((*name).to_owned(), port).await;
                resolved.map_err(|_| FetchError::Unreachable)?
            }
        };
        if addresses.iter().any(|address| !self.policy.allows_address(address.ip(), port)) {
            return Err(FetchError::Forbidden);
        }
        for address in addresses {
            if let Ok(stream) = TcpStream::connect(address).await {
                return Ok(stream);
            }
        }
        Err(FetchError::Unreachable)
    }

    async fn read(
        &self,
        url: &Url,
        response: Response<Incoming>,
        max_bytes: usize,
        kind: Kind,
        hold: &mut Hold,
    ) -> Result<Step, ApiError> {
        let (head, body) = response.into_parts();
        if head.status.is_redirection() && head.status != StatusCode::NOT_MODIFIED {
            return redirect(url, &head.headers).map(Step::Redirect).map_err(|error| refuse(kind, error));
        }
        check_head(head.status, &head.headers).map_err(|error| refuse(kind, error))?;
        let is_over = |num_bytes: u64| num_bytes > max_bytes as u64;
        if is_over(body.size_hint().lower()) {
            return Err(refuse(kind, FetchError::TooLarge));
        }
        let mut stream = Body::new(body).into_data_stream();
        let mut bytes = Vec::new();
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|_| refuse(kind, FetchError::Broken))?;
            if is_over(bytes.len() as u64 + piece.len() as u64) {
                return Err(refuse(kind, FetchError::TooLarge));
            }
            hold.grow(piece.len())?;
            bytes.extend_from_slice(&piece);
        }
        match bytes.is_empty() {
            true => Err(refuse(kind, FetchError::Empty)),
            false => Ok(Step::File(bytes)),
        }
    }
}

/// The task that moves the bytes of a connection; it ends when this is dropped.
#[derive(Clone)]
struct Connection(#[expect(dead_code, reason = "held for its end")] Arc<AbortOnDrop>);

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn shake<S>(stream: S) -> Result<(http1::SendRequest<Body>, Connection), FetchError>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = http1::Builder::new();
    builder.max_buf_size(MAX_HEADER_BYTES).max_headers(MAX_HEADERS);
    let (sender, connection) =
        builder.handshake(TokioIo::new(stream)).await.map_err(|_| FetchError::Unreachable)?;
    let task = tokio::spawn(async move { drop(connection.await) });
    Ok((sender, Connection(Arc::new(AbortOnDrop(task)))))
}

/// Host and port of an address that may be asked at all.
fn target(url: &Url) -> Result<(Host<&str>, u16), FetchError> {
    let has_credentials = !url.username().is_empty() || url.password().is_some();
    if !matches!(url.scheme(), "http" | "https") || has_credentials {
        return Err(FetchError::Url);
    }
    Ok((url.host().ok_or(FetchError::Url)?, url.port_or_known_default().ok_or(FetchError::Url)?))
}

/// Where a redirect leads; not from https to http.
fn redirect(url: &Url, headers: &HeaderMap) -> Result<Url, FetchError> {
    let location = headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
    let next = location.filter(|text| text.len() <= MAX_URL_BYTES).and_then(|text| url.join(text).ok());
    let next = next.ok_or(FetchError::Redirects)?;
    match url.scheme() == "https" && next.scheme() != "https" {
        true => Err(FetchError::Redirects),
        false => Ok(next),
    }
}

/// What the head of an answer says against it.
fn check_head(status: StatusCode, headers: &HeaderMap) -> Result<(), FetchError> {
    if status != StatusCode::OK {
        return Err(FetchError::Status);
    }
    if headers.get(header::CONTENT_ENCODING).is_some_and(|value| value != "identity") {
        return Err(FetchError::Encoding);
    }
    let Some(mime) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let mime = mime.to_str().map_err(|_| FetchError::Type)?.to_ascii_lowercase();
    let mime = mime.split(';').next().unwrap_or_default().trim();
    let is_media = mime.starts_with("image/") || mime.starts_with("video/");
    // What stores of files say of everything.
    match is_media || matches!(mime, "application/octet-stream" | "binary/octet-stream") {
        true => Ok(()),
        false => Err(FetchError::Type),
    }
}

fn refuse(kind: Kind, error: FetchError) -> ApiError {
    ApiError::Unprocessable { param: kind.param(), message: format!("{}: {error}", kind.param()) }
}

#[cfg(test)]
mod tests;
