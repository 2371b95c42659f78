//! What the operator chose: served names, defaults of sampling, limits, keys. Read from flags by the program.

use std::sync::Arc;
use std::time::Duration;

use spark_api::SamplingParams;
use spark_text::ToolFormat;

use crate::{FetchPolicy, LocalMedia, Observers, VideoDecoder};

/// Options of a [`FrontEnd`](crate::FrontEnd).
#[derive(Debug, Clone)]
pub struct Options {
    /// Names that `model` may have; answers carry the one that was asked for. Not empty.
    pub served_names: Vec<String>,
    /// Shown as `root` in the list of models: where the model came from.
    pub model_root: String,
    /// What a request gets that does not say otherwise.
    pub sampling_defaults: SamplingDefaults,
    /// `--return-tokens-as-token-ids`: the default of the field.
    pub tokens_as_token_ids: bool,
    /// `--enable-force-include-usage`: every chunk of every stream has its usage.
    pub force_include_usage: bool,
    /// `--enable-per-request-metrics`: answers say what they took in vLLM's words (`metrics`) too.
    pub per_request_metrics: bool,
    /// `--enable-tokenizer-info-endpoint`: `GET /tokenizer_info` shows the tokenizer's settings and the chat template.
    pub tokenizer_info: bool,
    /// `--mm-processor-cache-gb` in bytes: processed images kept on the host.
    pub mm_processor_cache_bytes: usize,
    /// Most bytes of decoded pixels in work at once, over all requests.
    pub max_decoding_bytes: usize,
    /// Most bytes of image patches that requests hold until their sequences end, over all requests; an image that several
    /// hold counts once, and what the cache holds does not count. Requests over it wait.
    pub max_media_bytes: usize,
    /// `--limit-mm-per-prompt`: most images of a prompt, within what the engine takes.
    pub max_images: usize,
    /// Most videos of a prompt, likewise; to the engine each temporal patch of a video is a medium.
    pub max_videos: usize,
    /// `--fetch-media`, `--allowed-media-domains`: what may be fetched by http and https. `None`: nothing.
    pub fetch: Option<FetchPolicy>,
    /// `--allowed-local-media-path`: whose files may be named by `file:`. `None`: none.
    pub local_media: Option<Arc<LocalMedia>>,
    /// `--max-media-file-size`: most bytes of one file that is fetched or read.
    pub max_media_file_bytes: usize,
    /// Most bytes of such files that are held until they are decoded, over all requests.
    pub max_fetched_bytes: usize,
    /// What decodes video files. `None`: videos come as frames.
    pub video_decoder: Option<VideoDecoder>,
    /// Most bytes of stored responses (`store` of `/v1/responses`); the oldest are forgotten. 0 stores none.
    pub max_response_bytes: usize,
    /// `--max-num-queued-tokens`: most prompt tokens of all sequences at work. A sequence counts as 256 at least. One request
    /// alone is always taken.
    pub max_num_queued_tokens: usize,
    /// Whether each request is a line in the log: what it took, not what it said.
    pub log_requests: bool,
    /// What the server says of its settings at `/server_info`: no secrets.
    pub settings: serde_json::Value,
    /// Who is told of requests that have ended.
    pub observers: Observers,
    /// Silence on a stream after which a comment keeps proxies from closing the connection.
    pub keep_alive: Duration,
    /// `--tool-call-parser`: how tool calls are found in an output.
    pub tool_call_parser: ToolCallParser,
    /// `--reasoning-parser`: how reasoning is found in an output.
    pub reasoning_parser: ReasoningParser,
    /// First of the seeds for requests that bring none; `None` starts anywhere.
    pub seed: Option<u64>,
}

impl Options {
    /// Options for one served name, neutral in everything else.
    pub fn new(served_name: impl Into<String>) -> Self {
        let name = served_name.into();
        Self {
            model_root: name.clone(),
            served_names: vec![name],
            sampling_defaults: SamplingDefaults::neutral(),
            tokens_as_token_ids: false,
            force_include_usage: false,
            per_request_metrics: false,
            tokenizer_info: false,
            mm_processor_cache_bytes: 4 << 30,
            // vLLM's bound on the decoded bytes of one request; here it bounds all requests together.
            max_decoding_bytes: 715_827_880,
            // Twice the images that fill a context of 262,144 tokens, at 3 KiB a token.
            max_media_bytes: 2 << 30,
            max_images: usize::MAX,
            max_videos: usize::MAX,
            fetch: None,
            local_media: None,
            // vLLM's.
            max_media_file_bytes: 256 << 20,
            max_fetched_bytes: 1 << 30,
            video_decoder: None,
            max_response_bytes: 256 << 20,
            // 256 MiB of prompts, or 262,144 sequences.
            max_num_queued_tokens: 1 << 26,
            log_requests: false,
            settings: serde_json::Value::Null,
            observers: Observers::default(),
            keep_alive: Duration::from_secs(15),
            tool_call_parser: ToolCallParser::Auto,
            reasoning_parser: ReasoningParser::Auto,
            seed: None,
        }
    }

    /// The name that metrics and answers carry by default.
    pub fn model_name(&self) -> &str {
        self.served_names.first().map_or("", String::as_str)
    }
}

/// How tool calls are found in an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolCallParser {
    /// As the chat template shows them to the model.
    Auto,
    /// In this format, whatever the template shows.
    Format(ToolFormat),
    /// Not at all: requests with tools are refused.
    None,
}

/// How reasoning is found in an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningParser {
    /// Between `<think>` and `</think>`, if the chat template knows them.
    Auto,
    /// Between `<think>` and `</think>`, whatever the template knows.
    Qwen3,
    /// Not at all: it stays in the content.
    None,
}

/// Sampling of a request that does not say otherwise: `generation_config.json`, as vLLM's `--generation-config auto`.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingDefaults {
    /// Temperature.
    pub temperature: f32,
    /// `top_k`; 0 keeps all tokens.
    pub top_k: u32,
    /// `top_p`.
    pub top_p: f32,
    /// `min_p`.
    pub min_p: f32,
    /// Repetition penalty.
    pub repetition_penalty: f32,
    /// `max_new_tokens` of the file, if it has one.
    pub max_tokens: Option<usize>,
}

impl SamplingDefaults {
    /// OpenAI's defaults: temperature 1, nothing else.
    pub fn neutral() -> Self {
        let neutral = SamplingParams::greedy(1);
        Self {
            temperature: 1.0,
            top_k: neutral.top_k,
            top_p: neutral.top_p,
            min_p: neutral.min_p,
            repetition_penalty: neutral.repetition_penalty,
            max_tokens: None,
        }
    }
}
