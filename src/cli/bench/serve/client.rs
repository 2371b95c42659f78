//! HTTP/1.1 to one server, over as many connections as are needed at once; connections are used again. Knows bodies as
//! bytes: what a stream of them means is read in `answer.rs`.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, Uri,
    body::Incoming,
    client::conn::http1::{SendRequest, handshake},
    header,
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, crypto::ring, pki_types::ServerName},
};

use crate::cli::trust;

type Sender = SendRequest<Full<Bytes>>;

/// A server, and the idle connections to it. Cheap to clone.
#[derive(Clone)]
pub(super) struct Client(Arc<Inner>);

struct Inner {
    host: String,
    port: u16,
    /// What stands before every path, without a slash at its end.
    prefix: String,
    api_key: Option<String>,
    tls: Option<TlsConnector>,
    idle: Mutex<Vec<Sender>>,
}

impl Client {
    /// For the server at `url`, with or without `/v1` at its end.
    ///
    /// # Errors
    /// When `url` is no http or https address.
    pub(super) fn new(url: &str, api_key: Option<String>) -> anyhow::Result<Self> {
        let trimmed = url.trim().trim_end_matches('/');
        let trimmed = trimmed.strip_suffix("/v1").unwrap_or(trimmed);
        let uri: Uri = trimmed.parse().with_context(|| format!("--base-url {url}: not an address"))?;
        let is_tls = uri.scheme_str() == Some("https");
        ensure!(
            matches!(uri.scheme_str(), Some("http" | "https")) && uri.query().is_none(),
            "--base-url {url}: expected an address such as http://localhost:8000"
        );
        let host = uri.host().with_context(|| format!("--base-url {url}: it names no host"))?;
        let inner = Inner {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            api_key,
            tls: if is_tls { Some(tls()?) } else { None },
            idle: Mutex::default(),
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Sends a JSON body; the answer's headers have arrived, its body has not.
    ///
    /// # Errors
    /// When there is no connection, or it breaks.
    pub(super) async fn post(&self, path: &str, body: Bytes) -> anyhow::Result<Reply> {
        self.send(&Method::POST, path, body).await
    }

    /// The JSON at `path`.
    ///
    /// # Errors
    /// When the status is not 200 or the body is not JSON.
    pub(super) async fn get_json(&self, path: &str) -> anyhow::Result<Value> {
        self.send(&Method::GET, path, Bytes::new()).await?.json().await
    }

    /// What the server answers to `body` as JSON.
    ///
    /// # Errors
    /// As [`get_json`](Self::get_json).
    pub(super) async fn post_json(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.post(path, Bytes::from(body.to_string())).await?.json().await
    }

    async fn send(&self, method: &Method, path: &str, body: Bytes) -> anyhow::Result<Reply> {
        // An idle connection may be closed just now by the server: then nothing was sent, and a new one is opened.
        while let Some(mut sender) = self.take_idle() {
            if sender.ready().await.is_err() {
                continue;
            }
            match sender.send_request(self.request(method, path, body.clone())?).await {
                Ok(response) => return Ok(Reply { response, sender, client: self.clone() }),
                Err(error) if error.is_canceled() || error.is_incomplete_message() => {}
                Err(error) => return Err(error).context("the connection broke"),
            }
        }
        let mut sender = self.connect().await?;
        let response = sender.send_request(self.request(method, path, body)?).await;
        Ok(Reply { response: response.context("the connection broke")?, sender, client: self.clone() })
    }

    fn request(&self, method: &Method, path: &str, body: Bytes) -> anyhow::Result<Request<Full<Bytes>>> {
        let Inner { host, port, prefix, api_key, .. } = &*self.0;
        let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{prefix}{path}"))
            .header(header::HOST, format!("{host}:{port}"))
            .header(header::USER_AGENT, concat!("spark-engine/", env!("CARGO_PKG_VERSION")))
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = api_key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        request.body(Full::new(body)).context("--endpoint or the key has characters that HTTP does not take")
    }

    fn take_idle(&self) -> Option<Sender> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    async fn connect(&self) -> anyhow::Result<Sender> {
        let Inner { host, port, tls, .. } = &*self.0;
        let stream = TcpStream::connect((host.as_str(), *port))
            .await
            .with_context(|| format!("cannot connect to {host}:{port}"))?;
        // A request must not wait for the acknowledgement of the one before.
        stream.set_nodelay(true)?;
        match tls {
            None => start(stream).await,
            Some(tls) => {
                let name = ServerName::try_from(host.clone()).context("the host has no name for TLS")?;
                start(tls.connect(name, stream).await.context("TLS handshake")?).await
            }
        }
    }
}

/// Speaks HTTP on `stream`, as long as somebody holds the sender.
async fn start(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> anyhow::Result<Sender> {
    let (sender, connection) = handshake(TokioIo::new(stream)).await.context("HTTP handshake")?;
    // Its end is seen by the sender.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

fn tls() -> anyhow::Result<TlsConnector> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(trust::roots()?)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// An answer under way.
pub(super) struct Reply {
    response: Response<Incoming>,
    sender: Sender,
    client: Client,
}

impl Reply {
    pub(super) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// The next bytes of the body; `None` at its end, when the connection may be used again.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Bytes>> {
        while let Some(frame) = self.response.body_mut().frame().await {
            if let Ok(data) = frame.context("the connection broke")?.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// Gives the connection back. The body has been read to its end.
    pub(super) fn finish(self) {
        let Self { sender, client, .. } = self;
        if !sender.is_closed() {
            client.0.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        }
    }

    /// All that is left of the body, as text.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) async fn text(mut self) -> anyhow::Result<String> {
        let mut bytes = Vec::new();
        while let Some(data) = self.next().await? {
            bytes.extend_from_slice(&data);
        }
        self.finish();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    async fn json(self) -> anyhow::Result<Value> {
        let status = self.status();
        let text = self.text().await?;
        if status != 200 {
            bail!("{}", refusal(status, &text));
        }
        serde_json::from_str(&text).with_context(|| format!("HTTP {status} with a body that is not JSON"))
    }
}

/// `HTTP 400: ...` in one line, with the server's message or the beginning of what it sent instead.
pub(super) fn refusal(status: u16, body: &str) -> String {
    let message = serde_json::from_str::<Value>(body).ok();
    let message = message.as_ref().and_then(|body| body["error"]["message"].as_str()).unwrap_or(body);
    let line: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    format!("HTTP {status}: {line}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let parts = |url: &str| {
            let client = Client::new(url, None).unwrap();
            let Inner { host, port, prefix, tls, .. } = &*client.0;
            (host.clone(), *port, prefix.clone(), tls.is_some())
        };
        assert_eq!(parts("http://localhost:8000/v1/"), ("localhost".into(), 8000, String::new(), false));
        assert_eq!(parts("https://example.com/a/v1"), ("example.com".into(), 443, "/a".into(), true));
        assert_eq!(parts("http://[::1]:9"), ("::1".into(), 9, String::new(), false));
        for url in ["localhost:8000", "ftp://x", "http://x?y=1", ""] {
            assert!(
                Client::new(url, None).is_err_and(|error| error.to_string().contains("--base-url")),
                "{url}"
            );
        }
    }

    #[test]
    fn refusals_are_one_line() {
        assert_eq!(refusal(400, r#"{"error": {"message": "no\ntools"}}"#), "HTTP 400: no tools");
        assert_eq!(refusal(502, "<html>"), "HTTP 502: <html>");
    }
}
