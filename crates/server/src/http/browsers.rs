//! What browsers may do on behalf of pages that are not this server's: calls across origins (CORS, closed unless the operator names
//! who), and names that a page's owner has pointed at this machine (DNS rebinding). Programs are not concerned: they send no
//! `Origin`, and the `Host` that they were given.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    extract::{Request, State},
    http::{HeaderName, HeaderValue, Method, header},
    middleware::Next,
    response::Response,
};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use super::request_id::REQUEST_ID;
use crate::ApiError;

/// How long a browser may remember what it was told.
const MAX_AGE: Duration = Duration::from_secs(600);
/// Stands for all, in each list.
const ANY: &str = "*";
/// Stands for every page of this machine, whatever its port: llama-server's word.
const LOCALHOST: &str = "localhost";
const LOOPBACK: &[&str] = &["localhost", "127.0.0.1", "[::1]"];
/// Ends of names that no public name server answers.
const PRIVATE_SUFFIXES: &[&str] = &[".localhost", ".local", ".internal", ".lan", ".home.arpa"];

/// Which pages of other origins may call the API: vLLM's flags of the same names. By default none may.
#[derive(Clone, Debug, Default)]
pub struct Cors {
    /// `--allowed-origins`: such as `https://chat.example.org`; `*` is all, `localhost` every page of this machine. Empty:
    /// no page of another origin.
    pub origins: Vec<String>,
    /// `--allowed-methods`; `*` is all.
    pub methods: Vec<String>,
    /// `--allowed-headers`; `*` is all.
    pub headers: Vec<String>,
    /// `--allow-credentials`: pages may send cookies and HTTP logins.
    pub credentials: bool,
}

/// What is wrong with [`Cors`].
#[derive(Debug, thiserror::Error)]
pub enum CorsError {
    /// A word that no header can carry.
    #[error("{flag} {value:?}: not a valid {what}")]
    Word {
        /// The flag.
        flag: &'static str,
        /// What it has.
        value: String,
        /// What it should have.
        what: &'static str,
    },
    /// An origin has a scheme and a host, and nothing behind them.
    #[error(
        "--allowed-origins {0:?}: an origin is a scheme and a host, such as https://chat.example.org, without a path; or \
         \"localhost\", or \"*\""
    )]
    Origin(String),
    /// Browsers refuse that.
    #[error("--allow-credentials: name the origins; with \"*\" browsers refuse it")]
    CredentialsForAll,
}

impl Cors {
    /// The layer that answers browsers; `None` when every origin is refused, which is what no answer means to them.
    ///
    /// # Errors
    /// What is wrong with the lists.
    pub(super) fn layer(&self) -> Result<Option<CorsLayer>, CorsError> {
        if self.origins.is_empty() {
            return Ok(None);
        }
        if self.credentials && is_all(&self.origins) {
            return Err(CorsError::CredentialsForAll);
        }
        let origins = match is_all(&self.origins) {
            true => AllowOrigin::any(),
            false => {
                let is_word = |text: &&String| **text == LOCALHOST;
                let has_local = self.origins.iter().any(|text| is_word(&text));
                let named = self.origins.iter().filter(|text| !is_word(text)).map(|text| origin(text));
                let named = named.collect::<Result<Vec<_>, _>>()?;
                AllowOrigin::predicate(move |origin, _| {
                    named.contains(origin) || has_local && is_loopback(origin.as_bytes())
                })
            }
        };
        let methods = match is_all(&self.methods) {
            true => AllowMethods::mirror_request(),
            false => AllowMethods::list(parsed::<Method>("--allowed-methods", "method", &self.methods)?),
        };
        let headers = match is_all(&self.headers) {
            // A literal "*" would leave out `Authorization`.
            true => AllowHeaders::mirror_request(),
            false => {
                AllowHeaders::list(parsed::<HeaderName>("--allowed-headers", "header name", &self.headers)?)
            }
        };
        let layer = CorsLayer::new().allow_origin(origins).allow_methods(methods).allow_headers(headers);
        let layer = layer.expose_headers([REQUEST_ID, header::RETRY_AFTER]).max_age(MAX_AGE);
        Ok(Some(layer.allow_credentials(self.credentials)))
    }

    /// Whether the lists can be followed.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self) -> Result<(), CorsError> {
        self.layer().map(drop)
    }
}

/// Whether a page is of this machine, by its origin.
fn is_loopback(origin: &[u8]) -> bool {
    let Ok(origin) = std::str::from_utf8(origin) else { return false };
    let Some(("http" | "https", host)) = origin.split_once("://") else { return false };
    // The port is the digits behind the last colon, which `[::1]` has inside.
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    LOOPBACK.contains(&name)
}

fn is_all(list: &[String]) -> bool {
    list.iter().any(|word| word == ANY)
}

fn origin(text: &str) -> Result<HeaderValue, CorsError> {
    let host = text.split_once("://").filter(|(scheme, _)| !scheme.is_empty()).map(|(_, host)| host);
    match (host, HeaderValue::from_str(text)) {
        (Some(host), Ok(value)) if !host.is_empty() && !host.contains(['/', '?', '#', '@']) => Ok(value),
        _ => Err(CorsError::Origin(text.to_owned())),
    }
}

fn parsed<T: std::str::FromStr>(
    flag: &'static str,
    what: &'static str,
    list: &[String],
) -> Result<Vec<T>, CorsError> {
    let word =
        |value: &String| value.parse().map_err(|_| CorsError::Word { flag, value: value.clone(), what });
    list.iter().map(word).collect()
}

/// Refuses requests that a browser sends to a public name. Meant for a server without keys that listens on this machine only: a
/// page whose owner lets its name resolve to 127.0.0.1 could read its answers else.
pub(super) async fn check_host(
    State(allowed): State<Arc<[String]>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let header = request
        .headers()
        .get(header::HOST)
        .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    // The absolute form of a target counts more than the header.
    let host = request.uri().authority().map(|authority| authority.as_str().to_owned()).or(header);
    match host {
        Some(host) if !is_private(&host, &allowed) => {
            Err(ApiError::HostNotAllowed { host: host.chars().take(200).collect() })
        }
        _ => Ok(next.run(request).await),
    }
}

/// Whether `host` (with or without a port) is a name that no page's owner controls.
fn is_private(host: &str, allowed: &[String]) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name.parse::<IpAddr>().is_ok()
        || !name.contains(['.', '@'])
        || PRIVATE_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
        || allowed.iter().any(|allowed| allowed == ANY || allowed.eq_ignore_ascii_case(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_names_are_told_from_private_ones() {
        let allowed = ["spark.example.org".to_owned()];
        for host in [
            "127.0.0.1:8000",
            "[::1]:8000",
            "localhost",
            "LOCALHOST:80",
            "spark",
            "x.localhost:1",
            "spark.local.",
            "Spark.Example.org:443",
            "10.0.0.7",
        ] {
            assert!(is_private(host, &allowed), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "a@evil.example",
        ] {
            assert!(!is_private(host, &allowed), "{host}");
        }
        assert!(is_private("evil.example", &["*".to_owned()]));
    }

    #[test]
    fn pages_of_this_machine_are_told_from_those_that_sound_alike() {
        for origin in [
            "http://localhost",
            "https://localhost:8080",
            "http://127.0.0.1:3000",
            "http://[::1]",
            "http://[::1]:1",
        ] {
            assert!(is_loopback(origin.as_bytes()), "{origin}");
        }
        for origin in [
            "http://notlocalhost",
            "http://localhost.evil.example",
            "http://localhost:80@evil.example",
            "http://localhost:",
            "http://127.0.0.1.evil.example",
            "http://[::1]evil",
            "file://localhost",
            "null",
            "localhost",
        ] {
            assert!(!is_loopback(origin.as_bytes()), "{origin}");
        }
    }

    #[test]
    fn lists_that_cannot_be_followed_are_named() {
        let cors = |origins: &[&str], methods: &str, credentials| Cors {
            origins: origins.iter().map(|&text| text.to_owned()).collect(),
            methods: vec![methods.to_owned()],
            headers: vec!["content-type".to_owned()],
            credentials,
        };
        assert!(Cors::default().layer().unwrap().is_none());
        cors(&["*"], "*", false).check().unwrap();
        cors(&["localhost", "https://a.example"], "*", true).check().unwrap();
        cors(&["https://a.example", "http://b.example:3000"], "GET", true).check().unwrap();
        for (origin, methods, credentials, says) in [
            ("https://a.example/page", "GET", false, "without a path"),
            ("a.example", "GET", false, "a scheme and a host"),
            ("https://a.example", "G T", false, "--allowed-methods \"G T\""),
            ("*", "GET", true, "name the origins"),
        ] {
            let text = cors(&[origin], methods, credentials).check().unwrap_err().to_string();
            assert!(text.contains(says), "{text}");
        }
    }
}
