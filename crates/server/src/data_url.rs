//! `data:` addresses with base64: one file, or the frames of a video. No other scheme, and nothing about what the bytes are.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::ApiError;

/// What frames in a `data:` address are declared as (vLLM's form): `data:video/jpeg;base64,FRAME,FRAME,...`.
const FRAMES: &str = "video/jpeg";

/// The bytes in a `data:` address.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Data {
    /// One file.
    File(Vec<u8>),
    /// The frames of a video, each an image file.
    Frames(Vec<Vec<u8>>),
}

/// Whether `url` is a `data:` address.
pub(crate) fn is_data(url: &str) -> bool {
    url.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("data:"))
}

/// The bytes in `url`, which [`is_data`]. `main` is the type that it must be declared as: `image` or `video`; at most
/// `max_frames` frames. `param` is named in errors.
///
/// # Errors
/// Another kind of data, too many frames, or broken base64. No part of the data is repeated in the message.
pub(crate) fn decode(
    url: &str,
    main: &str,
    param: &'static str,
    max_frames: usize,
) -> Result<Data, ApiError> {
    let refuse = |message: String| ApiError::field(param, message);
    let Some((header, data)) = url.get(5..).unwrap_or_default().split_once(',') else {
        return Err(refuse("the data: URL has no comma between its type and its data".into()));
    };
    let mut parts = header.split(';').map(str::trim);
    let mime = parts.next().unwrap_or_default();
    let is_main = mime.split_once('/').is_some_and(|(start, _)| start.eq_ignore_ascii_case(main));
    if !is_main {
        let article = if main == "image" { "an" } else { "a" };
        return Err(refuse(format!("the data: URL is not declared as {article} {main} (data:{main}/...)")));
    }
    if !parts.any(|part| part.eq_ignore_ascii_case("base64")) {
        return Err(refuse(format!("the data: URL is not base64 (data:{main}/...;base64,...)")));
    }
    let decode = |data: &str| {
        STANDARD.decode(data).map_err(|error| refuse(format!("the {main} is not valid base64: {error}")))
    };
    if !mime.eq_ignore_ascii_case(FRAMES) {
        return decode(data).map(Data::File);
    }
    let num_frames = data.bytes().filter(|&byte| byte == b',').count() + 1;
    if num_frames > max_frames {
        return Err(refuse(format!(
            "the video has {num_frames} frames; the limit is {max_frames}: send fewer"
        )));
    }
    data.split(',').map(decode).collect::<Result<_, _>>().map(Data::Frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(url: &str) -> Result<Data, ApiError> {
        decode(url, "image", "image_url", 3)
    }

    #[test]
    fn base64_files_and_frames_are_decoded() {
        assert_eq!(image("data:image/png;base64,AQID").unwrap(), Data::File(vec![1, 2, 3]));
        assert_eq!(image("DATA:IMAGE/JPEG;charset=x;BASE64,AQ==").unwrap(), Data::File(vec![1]));
        let video = |url: &str| decode(url, "video", "video_url", 3);
        assert_eq!(video("data:video/mp4;base64,AQID").unwrap(), Data::File(vec![1, 2, 3]));
        let frames = Data::Frames(vec![vec![1], vec![1, 2]]);
        assert_eq!(video("data:video/JPEG;base64,AQ==,AQI=").unwrap(), frames);
        assert!(video("data:video/jpeg;base64,,,").unwrap() == Data::Frames(vec![vec![]; 3]));
        let error = video("data:video/jpeg;base64,,,,").unwrap_err();
        assert!(error.to_string().contains("4 frames; the limit is 3"), "{error}");
    }

    #[test]
    fn everything_else_is_refused() {
        for (url, rule) in [
            ("data:image/png;base64", "no comma"),
            ("data:text/plain;base64,AQID", "not declared as an image"),
            ("data:video/mp4;base64,AQID", "not declared as an image"),
            ("data:,AQID", "not declared as an image"),
            ("data:ïmage/png;base64,AQID", "not declared as an image"),
            ("data:image/png,AQID", "not base64"),
            ("data:image/png;base64,A*ID", "not valid base64"),
            ("data:image/png;base64,AQ", "not valid base64"),
            ("data:image/png;base64,AQ ID", "not valid base64"),
        ] {
            let error = image(url).unwrap_err();
            assert!(error.to_string().contains(rule), "{url}: {error}");
            assert_eq!(error.status(), 400);
        }
        assert!(!is_data("https://example.com") && !is_data("dat") && !is_data("däta:x"));
    }
}
