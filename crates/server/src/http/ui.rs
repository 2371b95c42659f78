//! The web page at `/`: the files that `ui/` builds, embedded in the program. No template and no data: whatever the page
//! shows, its script asks from the API, as any other client would.
//!
//! The page needs no API key, because it holds nothing that is not in the public program. Its calls do: it asks the user
//! for a key when the API answers 401.

use std::collections::HashMap;
use std::sync::LazyLock;

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::{no_route, wrong_method};

#[path = "../../assets/ui/assets.rs"]
mod assets;

/// Scripts, styles and fonts of this server only, nothing inline, no call to anybody else. Pictures may also be `data:`,
/// because that is what a person drops on the page.
const CONTENT_SECURITY_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; \
     font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// A file under `/assets/` has a hash of its content in its name, so it never changes.
const IMMUTABLE: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");
/// Anything else is asked for again, and usually answered with 304.
const REVALIDATED: HeaderValue = HeaderValue::from_static("no-cache");

/// A file of the page.
struct Asset {
    /// From the root of the server, with `/`.
    path: &'static str,
    content_type: &'static str,
    bytes: &'static [u8],
}

/// The files by path, with the `ETag` of each.
static FILES: LazyLock<HashMap<&str, (&Asset, String)>> = LazyLock::new(|| {
    let entry = |asset: &'static Asset| {
        let etag = format!("\"{}\"", &blake3::hash(asset.bytes).to_hex()[..32]);
        (asset.path, (asset, etag))
    };
    assets::ASSETS.iter().map(entry).collect()
});

/// The routes of the page. They are open: whoever merges them puts no key in front.
pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", get(file))
        .route("/licenses.txt", get(file))
        .route("/assets/{*path}", get(file))
        .method_not_allowed_fallback(wrong_method)
}

async fn file(uri: Uri, headers: HeaderMap) -> Response {
    let path = if uri.path() == "/" { "/index.html" } else { uri.path() };
    let Some((asset, etag)) = FILES.get(path) else { return no_route(uri).await.into_response() };
    let caching = if path.starts_with("/assets/") { IMMUTABLE } else { REVALIDATED };
    let common = [
        (header::CACHE_CONTROL, caching),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    if is_known(&headers, etag) {
        return (StatusCode::NOT_MODIFIED, common, [(header::ETAG, etag.as_str())]).into_response();
    }
    let own = [(header::CONTENT_TYPE, asset.content_type), (header::ETAG, etag)];
    (common, own, asset.bytes).into_response()
}

/// Whether the client has this very content.
fn is_known(headers: &HeaderMap, etag: &str) -> bool {
    let values = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let mut tags = values.flat_map(|value| value.split(',')).map(str::trim);
    tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::{Method, Request};
    use tower::ServiceExt as _;

    use super::*;

    async fn send(method: Method, path: &str, tag: Option<&str>) -> (StatusCode, HeaderMap, Vec<u8>) {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(tag) = tag {
            request = request.header(header::IF_NONE_MATCH, tag);
        }
        let response = routes::<()>().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        (status, headers, to_bytes(response.into_body(), 1 << 22).await.unwrap().to_vec())
    }

    #[tokio::test]
    async fn every_file_has_its_type_and_the_policy() {
        for asset in assets::ASSETS {
            let (status, headers, body) = send(Method::GET, asset.path, None).await;
            if asset.path == "/index.html" {
                // It has one address: `/`.
                assert_eq!(status, StatusCode::NOT_FOUND);
                continue;
            }
            assert_eq!((status, body.as_slice()), (StatusCode::OK, asset.bytes), "{}", asset.path);
            assert_eq!(headers[header::CONTENT_TYPE], asset.content_type, "{}", asset.path);
            assert_eq!(headers[header::CONTENT_SECURITY_POLICY], CONTENT_SECURITY_POLICY);
            assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
            let is_immutable = headers[header::CACHE_CONTROL] == IMMUTABLE;
            assert_eq!(is_immutable, asset.path.starts_with("/assets/"), "{}", asset.path);
        }
    }

    #[tokio::test]
    async fn the_page_names_only_files_that_are_there() {
        let (status, headers, body) = send(Method::GET, "/", None).await;
        assert_eq!((status, &headers[header::CACHE_CONTROL]), (StatusCode::OK, &REVALIDATED));
        let page = String::from_utf8(body).unwrap();
        let named = page.split('"').filter(|text| text.starts_with("./")).collect::<Vec<_>>();
        assert!(named.len() >= 3, "script, style and icon: {page}");
        for name in named {
            assert!(FILES.contains_key(&name[1..]), "{name}");
        }
        // What the policy would refuse.
        assert!(!page.contains("<style") && !page.contains("style=") && !page.contains("onload="), "{page}");
        assert!(page.matches("<script").count() == 1 && page.contains(" src=\"./assets/"), "{page}");
    }

    #[tokio::test]
    async fn a_known_file_is_not_sent_again() {
        let (_, headers, _) = send(Method::GET, "/", None).await;
        let etag = headers[header::ETAG].to_str().unwrap().to_owned();
        for tag in [&etag, &format!("W/{etag}"), &format!("\"x\", {etag}"), "*"] {
            let (status, headers, body) = send(Method::GET, "/", Some(tag)).await;
            assert_eq!((status, body.len()), (StatusCode::NOT_MODIFIED, 0), "{tag}");
            assert_eq!(headers[header::ETAG], etag.as_str());
        }
        assert_eq!(send(Method::GET, "/", Some("\"x\"")).await.0, StatusCode::OK);
        let (status, _, body) = send(Method::HEAD, "/", None).await;
        assert_eq!((status, body.len()), (StatusCode::OK, 0));
    }

    #[tokio::test]
    async fn other_paths_and_methods_are_refused() {
        for path in ["/assets/x.js", "/assets/../index.html", "/assets/%2e%2e/index.html", "/assets//"] {
            assert_eq!(send(Method::GET, path, None).await.0, StatusCode::NOT_FOUND, "{path}");
        }
        assert_eq!(send(Method::POST, "/", None).await.0, StatusCode::METHOD_NOT_ALLOWED);
    }

    #[test]
    fn the_page_is_small() {
        let num_bytes: usize = assets::ASSETS.iter().map(|asset| asset.bytes.len()).sum();
        assert!(num_bytes < 2_000_000, "{num_bytes} bytes; the limit is 2 MB");
    }
}
