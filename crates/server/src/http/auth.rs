//! API keys. They are kept and compared as digests, so neither their text nor their length can leak.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use subtle::{Choice, ConstantTimeEq};

use crate::ApiError;

/// Routes that need no key: a load balancer must be able to ask.
const OPEN_ROUTES: &[&str] = &["/health"];

/// The keys that open a server.
#[derive(Clone, Default)]
pub struct ApiKeys(Arc<[[u8; 32]]>);

impl ApiKeys {
    /// Any of `keys` opens the server; an empty list leaves it open. Empty keys are dropped.
    pub fn new<S: AsRef<str>>(keys: impl IntoIterator<Item = S>) -> Self {
        let keys = keys.into_iter().filter(|key| !key.as_ref().is_empty());
        Self(keys.map(|key| digest(key.as_ref().as_bytes())).collect())
    }

    fn admit(&self, authorization: Option<&[u8]>) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let Some(given) = authorization.and_then(bearer) else { return false };
        let given = digest(given);
        // All keys are compared, whichever matches.
        let matches = self.0.iter().fold(Choice::from(0), |found, key| found | key.ct_eq(&given));
        matches.into()
    }
}

fn digest(key: &[u8]) -> [u8; 32] {
    *blake3::hash(key).as_bytes()
}

/// What follows `Bearer `, whose case does not matter.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
}

/// Lets a request pass if it may.
pub(super) async fn require_key(
    State(keys): State<ApiKeys>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let header = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    if keys.admit(header) || OPEN_ROUTES.contains(&request.uri().path()) {
        return Ok(next.run(request).await);
    }
    Err(ApiError::Unauthorized)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_key_opens() {
        let keys = ApiKeys::new(["one", "two", ""]);
        for header in ["Bearer one", "bearer two"] {
            assert!(keys.admit(Some(header.as_bytes())), "{header}");
        }
        for header in ["Bearer ", "Bearer", "Bearer on", "Bearer onee", "one", "Basic one", "Bearer  one", ""]
        {
            assert!(!keys.admit(Some(header.as_bytes())), "{header}");
        }
        assert!(!keys.admit(None));
        assert!(ApiKeys::default().admit(None));
    }
}
