//! Flags about images and videos: how large, how many, and where they may come from. Names are vLLM's where vLLM has them.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use clap::Args;
use spark_engine::{
    EngineOptions, ImageProcessorOverrides,
    server::{FetchPolicy, LocalMedia, Network, Options, VideoDecoder},
};

use super::decode_video;

/// Media that the engine takes of a video, at most: its temporal patches (768 frames of Qwen3-VL's processor, two each).
const PARTS_PER_VIDEO: usize = 384;
/// Most images of a prompt, and most videos, unless said otherwise.
const MAX_IMAGES: usize = 64;
const MAX_VIDEOS: usize = 4;

#[derive(Args)]
#[command(next_help_heading = "Images and videos")]
pub(crate) struct MediaArgs {
    /// Encoder cache in image tokens; also the largest image.
    #[arg(long, default_value_t = 16_384, value_name = "TOKENS")]
    encoder_cache_tokens: usize,
    /// Most image tokens encoded in a step.
    #[arg(long, default_value_t = 16_384, value_name = "TOKENS")]
    max_encoder_tokens_per_step: usize,
    /// Image processor settings as JSON, for example '{"max_pixels": 1048576}'.
    #[arg(long, value_name = "JSON")]
    mm_processor_kwargs: Option<String>,
    /// Most images and videos in a prompt: a number for both, or JSON such as '{"image": 4, "video": 1}' [default: 64 images, 4
    /// videos].
    #[arg(long, value_name = "LIMIT")]
    limit_mm_per_prompt: Option<String>,
    /// Host cache of processed images and videos, in GiB.
    #[arg(long, default_value_t = 4.0, value_name = "GIB")]
    mm_processor_cache_gb: f64,
    /// Fetch images and videos that requests name by https: or http:, from every public host. Off unless said.
    #[arg(long)]
    fetch_media: bool,
    /// Fetch from these hosts only (".example.org" stands for all below it); needs no --fetch-media.
    #[arg(long, value_name = "HOST", num_args = 1..)]
    allowed_media_domains: Vec<String>,
    /// Networks that may be fetched from though they are not public, on any port, such as 10.1.0.0/16.
    #[arg(long, value_name = "NETWORK", num_args = 1..)]
    allowed_media_networks: Vec<Network>,
    /// Seconds until a fetch must have a connection.
    #[arg(long, default_value_t = 5.0, value_name = "SECONDS")]
    media_connect_timeout: f64,
    /// Seconds that fetching one file may take [default: 5 for an image, 30 for a video].
    #[arg(long, value_name = "SECONDS")]
    media_fetch_timeout: Option<f64>,
    /// Largest file that is fetched or read, in MiB.
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    max_media_file_size: usize,
    /// A folder whose files requests may name by file:. None unless said.
    #[arg(long, value_name = "FOLDER")]
    allowed_local_media_path: Option<PathBuf>,
    /// Seconds that decoding one video file may take. Files need ffmpeg; frames (data:video/jpeg) do not.
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS")]
    video_decode_timeout: f64,
}

/// What the flags come to.
pub(crate) struct Media {
    args: MediaArgs,
    pub(crate) overrides: ImageProcessorOverrides,
    pub(crate) sizes: MediaSizes,
    fetch: Option<FetchPolicy>,
    local: Option<Arc<LocalMedia>>,
    decoder: VideoDecoder,
}

/// How many media there may be, and how large.
#[derive(Clone, Copy)]
pub(crate) struct MediaSizes {
    encoder_cache_tokens: usize,
    max_encoder_tokens_per_step: usize,
    max_images: usize,
    max_videos: usize,
}

impl MediaSizes {
    /// Sets what the engine has to know.
    pub(crate) fn apply(self, options: &mut EngineOptions) {
        options.encoder_cache_tokens = self.encoder_cache_tokens;
        options.max_encoder_tokens_per_step = self.max_encoder_tokens_per_step;
        let parts = self.max_videos.saturating_mul(PARTS_PER_VIDEO);
        options.limit_mm_per_prompt = self.max_images.saturating_add(parts);
    }
}

impl MediaArgs {
    /// Checks the flags and opens the folder of local media.
    ///
    /// # Errors
    /// Names the flag.
    pub(crate) fn read(self) -> anyhow::Result<Media> {
        let (max_images, max_videos) = match &self.limit_mm_per_prompt {
            Some(text) => parse_media_limit(text)?,
            None => (MAX_IMAGES, MAX_VIDEOS),
        };
        let overrides = match &self.mm_processor_kwargs {
            Some(json) => serde_json::from_str(json).context("--mm-processor-kwargs")?,
            None => ImageProcessorOverrides::default(),
        };
        let decode_timeout = seconds("--video-decode-timeout", self.video_decode_timeout)?;
        let decoder =
            VideoDecoder { sandbox: decode_video::sandbox(decode_timeout), timeout: decode_timeout };
        let local = self.allowed_local_media_path.as_deref().map(|path| {
            LocalMedia::open(path).with_context(|| format!("--allowed-local-media-path {}", path.display()))
        });
        Ok(Media {
            overrides,
            sizes: MediaSizes {
                encoder_cache_tokens: self.encoder_cache_tokens,
                max_encoder_tokens_per_step: self.max_encoder_tokens_per_step,
                max_images,
                max_videos,
            },
            fetch: self.fetch_policy()?,
            local: local.transpose()?.map(Arc::new),
            decoder,
            args: self,
        })
    }

    fn fetch_policy(&self) -> anyhow::Result<Option<FetchPolicy>> {
        if !self.fetch_media && self.allowed_media_domains.is_empty() {
            ensure!(
                self.allowed_media_networks.is_empty(),
                "--allowed-media-networks does not fetch by itself: give --fetch-media or --allowed-media-domains too"
            );
            return Ok(None);
        }
        let mut policy = FetchPolicy {
            domains: self.allowed_media_domains.clone(),
            networks: self.allowed_media_networks.clone(),
            connect_timeout: seconds("--media-connect-timeout", self.media_connect_timeout)?,
            ..FetchPolicy::default()
        };
        if let Some(timeout) = self.media_fetch_timeout {
            let timeout = seconds("--media-fetch-timeout", timeout)?;
            (policy.image_timeout, policy.video_timeout) = (timeout, timeout);
        }
        Ok(Some(policy))
    }
}

impl Media {
    /// Sets what the front end has to know.
    pub(crate) fn apply(self, options: &mut Options) {
        options.mm_processor_cache_bytes =
            (self.args.mm_processor_cache_gb.max(0.0) * f64::from(1 << 30)) as usize;
        (options.max_images, options.max_videos) = (self.sizes.max_images, self.sizes.max_videos);
        (options.fetch, options.local_media) = (self.fetch, self.local);
        options.max_media_file_bytes = self.args.max_media_file_size.saturating_mul(1 << 20);
        options.video_decoder = Some(self.decoder);
    }
}

fn seconds(flag: &str, value: f64) -> anyhow::Result<Duration> {
    ensure!(value > 0.0 && value <= 3600.0, "{flag} {value}: expected seconds, above 0 and at most 3600");
    Ok(Duration::from_secs_f64(value))
}

/// A number for both kinds, vLLM's `{"image": N, "video": M}`, or `image=N,video=M`. A kind that is not named keeps its
/// default.
fn parse_media_limit(text: &str) -> anyhow::Result<(usize, usize)> {
    if let Ok(limit) = text.parse() {
        return Ok((limit, limit));
    }
    let problem =
        || format!("--limit-mm-per-prompt {text}: expected a number or {{\"image\": N, \"video\": M}}");
    let (mut images, mut videos) = (MAX_IMAGES, MAX_VIDEOS);
    let mut set = |kind: &str, limit: Option<usize>| -> anyhow::Result<()> {
        match kind {
            "image" => images = limit.with_context(problem)?,
            "video" => videos = limit.with_context(problem)?,
            // What models of other kinds take; this one takes none of it.
            "audio" => {}
            _ => anyhow::bail!(problem()),
        }
        Ok(())
    };
    if text.contains('=') {
        for pair in text.split(',') {
            let (kind, limit) = pair.split_once('=').with_context(problem)?;
            set(kind.trim(), limit.trim().parse().ok())?;
        }
        return Ok((images, videos));
    }
    let limits: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(text).with_context(problem)?;
    for (kind, limit) in &limits {
        // vLLM also has {"count": N} with sizes for its memory profile.
        let count = limit.get("count").unwrap_or(limit);
        set(kind, count.as_u64().and_then(|count| usize::try_from(count).ok()))?;
    }
    Ok((images, videos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_limits_come_in_four_spellings() {
        assert_eq!(parse_media_limit("4").unwrap(), (4, 4));
        assert_eq!(parse_media_limit("image=2").unwrap(), (2, MAX_VIDEOS));
        assert_eq!(parse_media_limit("image=2,video=3").unwrap(), (2, 3));
        assert_eq!(parse_media_limit(r#"{"image": 7, "video": 0}"#).unwrap(), (7, 0));
        assert_eq!(parse_media_limit(r#"{"video": {"count": 1}, "audio": 0}"#).unwrap(), (MAX_IMAGES, 1));
        for wrong in ["many", "-1", "image=x", r#"{"image": -1}"#, r#"{"picture": 1}"#, "[]"] {
            assert!(parse_media_limit(wrong).is_err(), "{wrong}");
        }
    }
}
