//! API keys. They are kept and compared as digests, so neither their text nor their length can leak.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{self, HeaderName};
use axum::middleware::Next;
use axum::response::Response;
use subtle::{Choice, ConstantTimeEq};

use crate::ApiError;
use crate::client::within_client;

/// Anthropic's header of a key.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// Routes that need no key: a load balancer must be able to ask.
const OPEN_ROUTES: &[&str] = &["/health", "/live", "/ready", "/ping"];

/// Routes that tell about everybody's requests: with an admin key, only that opens them.
const ADMIN_ROUTES: &[&str] = &["/metrics", "/load", "/server_info"];

/// The keys that open a server.
#[derive(Clone, Default)]
pub struct ApiKeys {
    users: Arc<[Digest]>,
    admins: Arc<[Digest]>,
}

type Digest = [u8; 32];

impl ApiKeys {
    /// Any of `keys` opens the server; an empty list leaves it open. Empty keys are dropped.
    pub fn new<S: AsRef<str>>(keys: impl IntoIterator<Item = S>) -> Self {
        Self { users: digests(keys), admins: Arc::default() }
    }

    /// Also any of `keys`; and the routes that tell about everybody's requests open to these alone.
    #[must_use]
    pub fn with_admins<S: AsRef<str>>(self, keys: impl IntoIterator<Item = S>) -> Self {
        Self { admins: digests(keys), ..self }
    }

    /// Whether everybody may ask for answers.
    pub(super) fn is_open(&self) -> bool {
        self.users.is_empty()
    }

    /// `authorization` is OpenAI's header, `x_api_key` Anthropic's. Returns the hash of the key by which the request was
    /// admitted; `None` where none was needed.
    fn admit(
        &self,
        path: &str,
        authorization: Option<&[u8]>,
        x_api_key: Option<&[u8]>,
    ) -> Result<Option<Digest>, ApiError> {
        let for_admins = !self.admins.is_empty() && ADMIN_ROUTES.contains(&path);
        if !for_admins && self.is_open() {
            return Ok(None);
        }
        let given = authorization.and_then(bearer).or(x_api_key).ok_or(ApiError::Unauthorized)?;
        let given = digest(given);
        let (is_user, is_admin) = (is_among(&self.users, &given), is_among(&self.admins, &given));
        match (is_admin, is_user) {
            (true, _) => Ok(Some(given)),
            (false, true) if for_admins => Err(ApiError::AdminOnly),
            (false, true) => Ok(Some(given)),
            (false, false) => Err(ApiError::Unauthorized),
        }
    }
}

/// All keys are compared, whichever matches.
fn is_among(keys: &[Digest], given: &Digest) -> bool {
    keys.iter().fold(Choice::from(0), |found, key| found | key.ct_eq(given)).into()
}

fn digests<S: AsRef<str>>(keys: impl IntoIterator<Item = S>) -> Arc<[Digest]> {
    let keys = keys.into_iter().filter(|key| !key.as_ref().is_empty());
    keys.map(|key| digest(key.as_ref().as_bytes())).collect()
}

fn digest(key: &[u8]) -> Digest {
    *blake3::hash(key).as_bytes()
}

/// What follows `Bearer `, whose case does not matter.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
}

/// Lets a request pass if it may, and says whose it is.
pub(super) async fn require_key(
    State(keys): State<ApiKeys>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let client = check(&keys, &request)?;
    Ok(within_client(client, next.run(request)).await)
}

fn check(keys: &ApiKeys, request: &Request) -> Result<Option<Digest>, ApiError> {
    let header = |name: HeaderName| request.headers().get(name).map(|value| value.as_bytes());
    let path = request.uri().path();
    if OPEN_ROUTES.contains(&path) {
        return Ok(None);
    }
    keys.admit(path, header(header::AUTHORIZATION), header(X_API_KEY))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(keys: &ApiKeys, path: &str, authorization: Option<&str>, x_api_key: Option<&str>) -> u16 {
        let bytes = |text: Option<&str>| text.map(|text| text.as_bytes().to_vec());
        let (authorization, x_api_key) = (bytes(authorization), bytes(x_api_key));
        match keys.admit(path, authorization.as_deref(), x_api_key.as_deref()) {
            Ok(_) => 200,
            Err(error) => error.status(),
        }
    }

    #[test]
    fn only_a_whole_key_opens() {
        let keys = ApiKeys::new(["one", "two", ""]);
        for header in ["Bearer one", "bearer two"] {
            assert_eq!(status(&keys, "/", Some(header), None), 200, "{header}");
        }
        for header in [
            "Bearer ",
            "Bearer",
            "Bearer on",
            "Bearer onee",
            "one",
            "Basic one",
            "Bearer  one",
            "",
            "Bearer öne",
        ] {
            assert_eq!(status(&keys, "/", Some(header), None), 401, "{header}");
        }
        assert_eq!(status(&keys, "/", None, Some("one")), 200);
        assert_eq!(status(&keys, "/", None, Some("on")), 401);
        assert_eq!(status(&keys, "/", None, None), 401);
        assert_eq!(status(&ApiKeys::default(), "/", None, None), 200);
    }

    #[test]
    fn what_is_for_admins_opens_to_them_alone() {
        let keys = ApiKeys::new(["user"]).with_admins(["admin"]);
        for (path, user, admin) in [("/metrics", 403, 200), ("/load", 403, 200), ("/v1/models", 200, 200)] {
            assert_eq!(status(&keys, path, Some("Bearer user"), None), user, "{path}");
            assert_eq!(status(&keys, path, None, Some("admin")), admin, "{path}");
            assert_eq!(status(&keys, path, None, None), 401, "{path}");
        }
        let keys = ApiKeys::default().with_admins(["admin"]);
        assert_eq!(
            (status(&keys, "/v1/models", None, None), status(&keys, "/metrics", None, None)),
            (200, 401)
        );
        let keys = ApiKeys::new(["user"]);
        assert_eq!(
            status(&keys, "/metrics", Some("Bearer user"), None),
            200,
            "without admins users may see it"
        );
    }
}
