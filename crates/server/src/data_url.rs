//! Image URLs: only `data:` with base64. Other schemes are refused, so the server never reads files or the network.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::ApiError;

/// The bytes in a `data:image/...;base64,...` URL.
///
/// # Errors
/// Another scheme, another kind of data, or broken base64. No part of the data is repeated in the message.
pub(crate) fn decode(url: &str) -> Result<Vec<u8>, ApiError> {
    let refuse = |message: &str| ApiError::field("image_url", message);
    let scheme = url.split(':').next().unwrap_or_default();
    if !scheme.eq_ignore_ascii_case("data") || scheme.len() == url.len() {
        return Err(refuse("only data: URLs are supported for images (data:image/png;base64,...)"));
    }
    let Some((header, data)) = url[scheme.len() + 1..].split_once(',') else {
        return Err(refuse("the data: URL has no comma between its type and its data"));
    };
    let mut parts = header.split(';').map(str::trim);
    let mime = parts.next().unwrap_or_default();
    let is_image = mime.get(..6).is_some_and(|start| start.eq_ignore_ascii_case("image/"));
    if !is_image {
        return Err(refuse("the data: URL is not declared as an image (data:image/...)"));
    }
    if !parts.any(|part| part.eq_ignore_ascii_case("base64")) {
        return Err(refuse("the data: URL is not base64 (data:image/png;base64,...)"));
    }
    STANDARD.decode(data).map_err(|error| refuse(&format!("the image is not valid base64: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_images_are_decoded() {
        assert_eq!(decode("data:image/png;base64,AQID").unwrap(), [1, 2, 3]);
        assert_eq!(decode("DATA:IMAGE/JPEG;charset=x;BASE64,AQ==").unwrap(), [1]);
    }

    #[test]
    fn everything_else_is_refused() {
        for (url, rule) in [
            ("http://localhost/x.png", "only data:"),
            ("https://example.com/x.png", "only data:"),
            ("file:///etc/passwd", "only data:"),
            ("data", "only data:"),
            ("", "only data:"),
            ("data:image/png;base64", "no comma"),
            ("data:text/plain;base64,AQID", "not declared as an image"),
            ("data:,AQID", "not declared as an image"),
            ("data:ïmage/png;base64,AQID", "not declared as an image"),
            ("data:image/png,AQID", "not base64"),
            ("data:image/png;base64,A*ID", "not valid base64"),
            ("data:image/png;base64,AQ", "not valid base64"),
            ("data:image/png;base64,AQ ID", "not valid base64"),
        ] {
            let error = decode(url).unwrap_err();
            assert!(error.to_string().contains(rule), "{url}: {error}");
            assert_eq!(error.status(), 400);
        }
    }
}
