//! The HTTP side of `pull`: what a model consists of, and ranges of its files. Everything a server says is checked
//! here before anyone uses it as a name or a size. Not the files on disk.

use std::collections::HashMap;
use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::uri::{Authority, Scheme, Uri};
use ureq::http::{Response, header};
use ureq::tls::TlsConfig;
use ureq::{Agent, Body, Proxy};

use crate::error::{Error, Result};
use crate::locate::is_inside;

/// Largest description of a model: some 200 bytes for each file.
const MAX_INFO: u64 = 64 << 20;
/// Longest chain of redirects.
const MAX_REDIRECTS: usize = 10;
/// Longest silence before a connection counts as broken.
const SILENCE: Duration = Duration::from_secs(60);

/// A hub: its address, the token for it, and connections to it.
pub(super) struct Hub {
    agent: Agent,
    /// Without a `/` at its end.
    endpoint: String,
    /// Whose requests may carry the token.
    origin: Uri,
    token: Option<String>,
}

/// A model as the hub describes it.
#[derive(Debug)]
pub(super) struct RemoteModel {
    /// Its id.
    pub(super) id: String,
    /// Where the description is from.
    pub(super) url: String,
    /// Hexadecimal.
    pub(super) commit: String,
    /// By name; every name stays inside the folder it is joined to.
    pub(super) files: HashMap<String, RemoteFile>,
}

/// A file as the hub announces it.
#[derive(Debug)]
pub(super) struct RemoteFile {
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) digest: Digest,
}

/// What a file's bytes have to give, in lower-case hexadecimal of the right length.
#[derive(Debug)]
pub(super) enum Digest {
    /// Of the bytes (files in large-file storage).
    Sha256(String),
    /// Of the git blob: `blob SIZE\0` and the bytes, by SHA-1 (all other files).
    Git(String),
}

impl Digest {
    pub(super) fn hex(&self) -> &str {
        match self {
            Digest::Sha256(hex) | Digest::Git(hex) => hex,
        }
    }
}

/// Why a range did not come.
pub(super) enum Fault {
    /// Trying again may help.
    Passing(String),
    /// It will not.
    Final(Error),
}

/// The description of a model, `/api/models/ID/revision/REVISION?blobs=true`, as far as it is needed.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Large>,
}

#[derive(Deserialize)]
struct Large {
    sha256: String,
    size: u64,
}

impl Hub {
    /// Checks the address; connects to nothing yet.
    pub(super) fn new(endpoint: &str, token: Option<&str>, tls: TlsConfig) -> Result<Self> {
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        let wrong = |reason: &str| Error::Option {
            option: "HF_ENDPOINT",
            reason: format!("{reason}; an address is like https://huggingface.co"),
        };
        let origin: Uri = endpoint.parse().map_err(|_| wrong("not an address"))?;
        if !matches!(origin.scheme_str(), Some("http" | "https")) || origin.query().is_some() {
            return Err(wrong("neither http:// nor https://, or with a query"));
        }
        if origin.authority().is_none_or(|authority| authority.as_str().contains('@')) {
            return Err(wrong("no host, or a password in it (use HF_TOKEN)"));
        }
        let local = matches!(origin.host(), Some("localhost" | "127.0.0.1" | "[::1]"));
        let config = Agent::config_builder()
            .user_agent(concat!("spark-engine/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .tls_config(tls)
            // Redirects are followed below, where the token is dropped.
            .max_redirects(0)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            // What runs on this machine is behind no proxy.
            .proxy(if local { None } else { Proxy::try_from_env() })
            .build();
        Ok(Hub { agent: config.new_agent(), endpoint, origin, token: token.map(str::to_owned) })
    }

    /// Asks what `model` consists of at `revision`.
    pub(super) fn model(&self, model: &str, revision: &str) -> Result<RemoteModel> {
        let url = format!("{}/api/models/{model}/revision/{}", self.endpoint, encode(revision, false));
        let response = self.get(&format!("{url}?blobs=true"), None)?;
        if response.status().as_u16() != 200 {
            return Err(Error::Hub { reason: refusal(&response, self.token.is_some()), url });
        }
        let mut bytes = Vec::new();
        let read = response.into_body().into_reader().take(MAX_INFO + 1).read_to_end(&mut bytes);
        read.map_err(|source| Error::Unreachable { url: url.clone(), source: Box::new(source.into()) })?;
        if bytes.len() as u64 > MAX_INFO {
            let reason = format!("the description of the model is above {MAX_INFO} bytes");
            return Err(Error::Hub { url, reason });
        }
        describe(model, &url, &bytes)
    }

    /// Asks for `file` from byte `from` on. What comes back is the body and the byte it begins with: 0 if the server
    /// ignored the wish.
    pub(super) fn file(
        &self,
        model: &RemoteModel,
        file: &RemoteFile,
        from: u64,
    ) -> Result<(Body, u64), Fault> {
        let url =
            format!("{}/{}/resolve/{}/{}", self.endpoint, model.id, model.commit, encode(&file.name, true));
        let response = self.get(&url, Some(from)).map_err(|error| match error {
            Error::Unreachable { source, .. } => Fault::Passing(source.to_string()),
            other => Fault::Final(other),
        })?;
        let wrong = |reason| Fault::Final(Error::Hub { url: url.clone(), reason });
        match response.status().as_u16() {
            200 => Ok((response.into_body(), 0)),
            206 => {
                let range = response.headers().get(header::CONTENT_RANGE);
                let range = range.and_then(|value| value.to_str().ok()).unwrap_or_default();
                if begins_at(range, from, file.size) {
                    return Ok((response.into_body(), from));
                }
                let range = printable(range);
                Err(wrong(format!("asked for bytes {from} to {}, got the range `{range}`", file.size)))
            }
            // What is here reaches beyond the server's file: it cannot be its beginning.
            416 if from > 0 => self.file(model, file, 0),
            status @ (408 | 429 | 500..) => Err(Fault::Passing(format!("the server answered {status}"))),
            _ => Err(wrong(refusal(&response, self.token.is_some()))),
        }
    }

    /// A GET that follows redirects. The token goes to the hub's own address only.
    fn get(&self, url: &str, from: Option<u64>) -> Result<Response<Body>> {
        let wrong = |url: &Uri, reason: String| Error::Hub { url: shown(url), reason };
        let mut at: Uri = url
            .parse()
            .map_err(|_| Error::Hub { url: self.endpoint.clone(), reason: "not an address".to_owned() })?;
        for _ in 0..=MAX_REDIRECTS {
            // Lengths and digests are those of the bytes as they are stored.
            let mut request = self.agent.get(&at).header(header::ACCEPT_ENCODING, "identity");
            if let Some(from) = from.filter(|&from| from > 0) {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| same_origin(&at, &self.origin)) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request
                .call()
                .map_err(|source| Error::Unreachable { url: shown(&at), source: Box::new(source) })?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            let next = location
                .and_then(|location| follow(&at, location))
                .ok_or_else(|| wrong(&at, "redirected to what is not an http or https address".to_owned()))?;
            if at.scheme() == Some(&Scheme::HTTPS) && next.scheme() != Some(&Scheme::HTTPS) {
                return Err(wrong(&at, format!("redirected from https to {}; refused", shown(&next))));
            }
            at = next;
        }
        Err(wrong(&at, format!("more than {MAX_REDIRECTS} redirects")))
    }
}

/// Reads and checks the description of a model.
fn describe(id: &str, url: &str, bytes: &[u8]) -> Result<RemoteModel> {
    let wrong = |reason| Error::Hub { url: url.to_owned(), reason };
    let info: Info = serde_json::from_slice(bytes)
        .map_err(|error| wrong(format!("the description of the model cannot be read: {error}")))?;
    if !matches!(info.sha.len(), 40 | 64) || !is_hex(&info.sha) {
        return Err(wrong(format!(
            "the commit is `{}`, not 40 or 64 hexadecimal digits",
            printable(&info.sha)
        )));
    }
    let mut files = HashMap::with_capacity(info.siblings.len());
    for sibling in info.siblings {
        let name = sibling.rfilename;
        let quoted = printable(&name);
        if !is_inside(&name) || name.len() > 512 || name.chars().any(char::is_control) {
            return Err(wrong(format!("the file name `{quoted}` would leave the model's folder; refused")));
        }
        let (size, digest) = match (sibling.lfs, sibling.size, sibling.blob_id) {
            (Some(large), ..) => (large.size, Digest::Sha256(large.sha256)),
            (None, Some(size), Some(id)) => (size, Digest::Git(id)),
            _ => {
                return Err(wrong(format!(
                    "size or digest of `{quoted}` is missing; nothing to check it by"
                )));
            }
        };
        let length = if matches!(digest, Digest::Sha256(_)) { 64 } else { 40 };
        if digest.hex().len() != length || !is_hex(digest.hex()) {
            let hex = printable(digest.hex());
            return Err(wrong(format!(
                "the digest of `{quoted}` is `{hex}`, not {length} hexadecimal digits"
            )));
        }
        files.insert(name.clone(), RemoteFile { name, size, digest });
    }
    Ok(RemoteModel { id: id.to_owned(), url: url.to_owned(), commit: info.sha, files })
}

/// Lower case only: a digest is a file name here, and the Python tools write it so.
fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a `Content-Range` is `bytes FROM-.../SIZE`.
fn begins_at(range: &str, from: u64, size: u64) -> bool {
    let parse = || {
        let (bytes, total) = range.strip_prefix("bytes ")?.split_once('/')?;
        let first: u64 = bytes.split_once('-')?.0.trim().parse().ok()?;
        let total = total.trim();
        Some(first == from && (total == "*" || total.parse() == Ok(size)))
    };
    parse().unwrap_or(false)
}

/// The target of a redirect: an address, `//HOST/PATH` or `/PATH`.
fn follow(from: &Uri, location: &str) -> Option<Uri> {
    let scheme = from.scheme_str()?;
    let next: Uri = if location.starts_with("//") {
        format!("{scheme}:{location}").parse().ok()?
    } else if location.starts_with('/') {
        format!("{scheme}://{}{location}", from.authority()?).parse().ok()?
    } else {
        location.parse().ok()?
    };
    let known = matches!(next.scheme_str(), Some("http" | "https"));
    (known && next.authority().is_some()).then_some(next)
}

/// Same scheme, host and port.
fn same_origin(a: &Uri, b: &Uri) -> bool {
    let port =
        |uri: &Uri| uri.port_u16().unwrap_or(if uri.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 });
    a.scheme() == b.scheme()
        && port(a) == port(b)
        && a.host().zip(b.host()).is_some_and(|(a, b)| a.eq_ignore_ascii_case(b))
}

/// An address for messages: signatures of storage servers stand in the query.
fn shown(uri: &Uri) -> String {
    let scheme = uri.scheme_str().unwrap_or("http");
    let host = uri.authority().map_or("", Authority::host);
    let port = uri.port_u16().map_or(String::new(), |port| format!(":{port}"));
    format!("{scheme}://{host}{port}{}", uri.path())
}

/// Text of a server, safe on a terminal and short.
fn printable(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// What a refusal means and what to do about it.
fn refusal(response: &Response<Body>, has_token: bool) -> String {
    let field = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(printable);
    let status = response.status().as_u16();
    let advice = match (field("x-error-code").as_deref(), status, has_token) {
        (Some("GatedRepo"), _, true) => {
            "the model is gated: ask for access on its page, with the account of HF_TOKEN"
        }
        (Some("GatedRepo"), _, false) => "the model is gated: ask for access on its page and set HF_TOKEN",
        (Some("RevisionNotFound"), ..) => "the model has no such revision",
        (Some("EntryNotFound"), ..) => "the model has no such file",
        (_, 401 | 403, false) => {
            "no such model, or a gated or private one: check the id, and set HF_TOKEN if it needs access"
        }
        (_, 401 | 403, true) => {
            "no such model, or HF_TOKEN gives no access to it: check the id, the token, and the model's page"
        }
        (_, 404, _) => "no such model or revision: check the id, `--revision` and HF_ENDPOINT",
        _ => "the hub refuses",
    };
    match field("x-error-message") {
        Some(message) => format!("{advice} (status {status}: {message})"),
        None => format!("{advice} (status {status})"),
    }
}

/// Percent-encodes what is not a letter, a digit or `-._~`; a `/` stays if it separates folders.
fn encode(text: &str, folders: bool) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (folders && byte == b'/');
        if plain {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_resolved_or_refused() {
        let from: Uri = "https://hub.example:8443/a/b".parse().unwrap();
        let follow = |location| follow(&from, location).map(|uri| uri.to_string());
        assert_eq!(follow("/c?d=1").as_deref(), Some("https://hub.example:8443/c?d=1"));
        assert_eq!(follow("//cdn.example/x").as_deref(), Some("https://cdn.example/x"));
        assert_eq!(follow("http://cdn.example/x").as_deref(), Some("http://cdn.example/x"));
        for refused in ["file:///etc/passwd", "c/d", "", "ftp://x/y", "https://"] {
            assert_eq!(follow(refused), None, "{refused}");
        }
    }

    #[test]
    fn origin_is_scheme_host_and_port() {
        let origin: Uri = "https://hub.example".parse().unwrap();
        let same = |other: &str| same_origin(&other.parse().unwrap(), &origin);
        assert!(same("https://HUB.example:443/x"));
        for other in ["http://hub.example/", "https://hub.example:444/", "https://hub.example.evil/"] {
            assert!(!same(other), "{other}");
        }
    }

    #[test]
    fn ranges_are_compared_with_what_was_asked() {
        assert!(begins_at("bytes 5-9/10", 5, 10));
        assert!(begins_at("bytes 5-9/*", 5, 10));
        for range in ["", "bytes 4-9/10", "bytes 5-9/11", "5-9/10", "bytes */10", "bytes 5/10"] {
            assert!(!begins_at(range, 5, 10), "{range}");
        }
    }

    #[test]
    fn addresses_of_hubs_are_checked() {
        for endpoint in
            ["", "hub.example", "ftp://hub.example", "https://user:word@hub.example", "https://h/?q"]
        {
            assert!(
                matches!(Hub::new(endpoint, None, TlsConfig::default()), Err(Error::Option { .. })),
                "{endpoint}"
            );
        }
        assert_eq!(
            Hub::new("https://hub.example/mirror/", None, TlsConfig::default())
                .map(|hub| hub.endpoint)
                .ok()
                .as_deref(),
            Some("https://hub.example/mirror")
        );
    }

    #[test]
    fn names_are_encoded() {
        assert_eq!(encode("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(encode("a b/ü.json", true), "a%20b/%C3%BC.json");
    }
}
