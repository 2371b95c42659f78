//! What is behind the address of a medium: bytes of a `data:` address, of a server that may be asked, or of a file that may
//! be read. What the bytes are is not looked at here.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use spark_vision::SampleRate;

use super::fetch::Fetcher;
use super::local::LocalMedia;
use crate::pool::CpuPool;
use crate::{ApiError, Options, data_url};

/// What a message part calls its medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `image_url`
    Image,
    /// `video_url`
    Video,
}

impl Kind {
    /// The field that errors name.
    pub(crate) fn param(self) -> &'static str {
        match self {
            Self::Image => "image_url",
            Self::Video => "video_url",
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Video => "video",
        }
    }
}

/// Where a medium is, as the request has it: at an address, under a name that it was given before, or both.
pub(crate) struct MediaUrl {
    pub(crate) kind: Kind,
    /// `None` only with a `uuid`.
    pub(crate) url: Option<String>,
    /// What later requests may call it.
    pub(crate) uuid: Option<String>,
    pub(crate) video: VideoOptions,
}

/// What a request says about its videos (`media_io_kwargs.video`).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct VideoOptions {
    /// How many frames are looked at; of frames that come one by one, how many a second they are.
    pub(crate) rate: SampleRate,
}

/// Bytes of a medium, counted while they are held if they were not in the request.
pub(crate) struct Payload {
    pub(crate) bytes: Vec<u8>,
    _hold: Option<Hold>,
}

impl Payload {
    /// Bytes that count until they are dropped.
    pub(crate) fn held(bytes: Vec<u8>, hold: Hold) -> Self {
        Self { bytes, _hold: Some(hold) }
    }
}

/// What was behind an address.
pub(crate) enum Found {
    File(Payload),
    /// Each an image file.
    Frames(Vec<Payload>),
}

/// Bytes of fetched media that are held until they are decoded, over all requests. Nobody waits: requests that hold some
/// and want more would wait for each other.
#[derive(Clone)]
pub(crate) struct Budget {
    held: Arc<AtomicUsize>,
    limit: usize,
}

/// A share of the budget; given back when dropped.
pub(crate) struct Hold {
    budget: Budget,
    num_bytes: usize,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Self { held: Arc::default(), limit }
    }

    /// A share of nothing, to be grown.
    pub(crate) fn hold(&self) -> Hold {
        Hold { budget: self.clone(), num_bytes: 0 }
    }
}

impl Hold {
    /// Adds to the share.
    ///
    /// # Errors
    /// [`ApiError::MediaFull`] when all together hold too much.
    pub(crate) fn grow(&mut self, num_bytes: usize) -> Result<(), ApiError> {
        let Budget { held, limit } = &self.budget;
        self.num_bytes += num_bytes;
        match held.fetch_add(num_bytes, Relaxed).saturating_add(num_bytes) > *limit {
            true => Err(ApiError::MediaFull { limit: *limit }),
            false => Ok(()),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.num_bytes, Relaxed);
    }
}

/// Where media may come from.
pub(crate) struct Sources {
    /// `None`: nothing is fetched.
    fetcher: Option<Fetcher>,
    /// `None`: no file is read.
    local: Option<Arc<LocalMedia>>,
    budget: Budget,
    max_file_bytes: usize,
}

impl Sources {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            fetcher: options.fetch.as_ref().map(Fetcher::new),
            local: options.local_media.clone(),
            budget: Budget::new(options.max_fetched_bytes),
            max_file_bytes: options.max_media_file_bytes,
        }
    }

    /// What is behind an address. `max_frames` bounds the frames of a video.
    ///
    /// # Errors
    /// 400 for an address of a kind that is not allowed here, 422 for one that gives nothing, 503 when too much is held.
    pub(crate) async fn read(
        &self,
        pool: &CpuPool,
        kind: Kind,
        url: String,
        max_frames: usize,
    ) -> Result<Found, ApiError> {
        if data_url::is_data(&url) {
            let plain = |bytes| Payload { bytes, _hold: None };
            let work = move || match data_url::decode(&url, kind.name(), kind.param(), max_frames)? {
                data_url::Data::File(bytes) => Ok(Found::File(plain(bytes))),
                data_url::Data::Frames(frames) => Ok(Found::Frames(frames.into_iter().map(plain).collect())),
            };
            return pool.run(work).await;
        }
        let scheme = url.split_once(':').map_or("", |(scheme, _)| scheme).to_ascii_lowercase();
        let (max_bytes, hold) = (self.max_file_bytes, self.budget.hold());
        let (bytes, hold) = match (&*scheme, &self.fetcher, &self.local) {
            ("http" | "https", Some(fetcher), _) => fetcher.fetch(kind, &url, max_bytes, hold).await?,
            ("file", _, Some(local)) => {
                let local = local.clone();
                pool.run(move || local.read(kind, &url, max_bytes, hold)).await?
            }
            _ => return Err(self.refuse(kind)),
        };
        Ok(Found::File(Payload::held(bytes, hold)))
    }

    /// Says what is allowed instead. The address is not repeated.
    fn refuse(&self, kind: Kind) -> ApiError {
        let mut allowed = vec!["data:"];
        if self.fetcher.is_some() {
            allowed.extend(["https:", "http:"]);
        }
        if self.local.is_some() {
            allowed.push("file:");
        }
        let name = kind.name();
        let allowed = allowed.join(", ");
        ApiError::field(
            kind.param(),
            format!(
                "only {allowed} URLs are supported for {name}s on this server (data:{name}/...;base64,...)"
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_shared_and_comes_back() {
        let budget = Budget::new(10);
        let (mut first, mut second) = (budget.hold(), budget.hold());
        first.grow(6).unwrap();
        assert_eq!(second.grow(5).unwrap_err().status(), 503);
        drop(second);
        first.grow(4).unwrap();
        assert!(first.grow(1).is_err());
        drop(first);
        assert_eq!(budget.held.load(Relaxed), 0);
    }

    #[tokio::test]
    async fn schemes_are_closed_unless_they_were_opened() {
        let sources = Sources::new(&Options::new("x"));
        for url in [
            "http://localhost/x.png",
            "https://example.com/x.png",
            "HTTPS://example.com/x.png",
            "file:///etc/passwd",
            "gopher://x",
            "data",
            "",
            "\u{0}http://x",
        ] {
            let error = sources.read(&CpuPool::new(), Kind::Image, url.into(), 1).await.err().unwrap();
            assert!(error.to_string().starts_with("only data: URLs"), "{error}");
            assert_eq!(error.status(), 400);
        }
    }
}
