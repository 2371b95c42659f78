//! From messages or a text to a prompt: rendered, tokenised, with its media. Reads no other fields and queues nothing.

use std::sync::Arc;

use futures_util::future::try_join_all;
use spark_api::{MediaItem, TokenId};
use spark_text::{
    ChatTemplate, GrammarStart, IMAGE_PLACEHOLDER, PlaceholderRun, TextError, Tokenizer, expand_media,
    expand_videos,
};

use crate::body::Body;
use crate::chat_request::{read_chat, segment_text};
use crate::completion_request::{IMAGE_MARK, PromptInput};
use crate::grammars::AnswerGrammar;
use crate::media::{HeldMedium, Kind, MediaFile, MediaUrl, VideoOptions, media_items};
use crate::params::{Params, Truncation};
use crate::parts::AnswerPlan;
use crate::structured::Wanted;
use crate::tools::Formats;
use crate::{ApiError, FrontEnd};

/// The tokens of a prompt, with room for its media, which are still to be decoded.
pub(crate) struct PromptTokens {
    pub(crate) tokens: Vec<TokenId>,
    files: Vec<MediaFile>,
    /// Of the first placeholder of each part of each medium.
    offsets: Vec<usize>,
    /// What was sent, if that was a text and nothing was cut off.
    pub(crate) text: Option<String>,
    /// What the answer shows of it.
    pub(crate) echo: String,
    answer: Option<AnswerPlan>,
    /// What the answer is held to, and where in the output that begins.
    wanted: Option<(Wanted, GrammarStart)>,
}

/// A prompt, ready for the engine.
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) media: Vec<MediaItem>,
    /// What `media` are part of. Kept until all sequences have ended, for the bound on their memory.
    pub(crate) images: Arc<[Arc<HeldMedium>]>,
    /// What the answer shows of it.
    pub(crate) echo: String,
    /// How outputs are taken apart; `None`: not at all.
    pub(crate) answer: Option<AnswerPlan>,
    /// What outputs are held to.
    pub(crate) grammar: Option<AnswerGrammar>,
}

impl FrontEnd {
    /// The prompt of a chat. Its media are decoded last: a small file can hold many pixels, which are not worth their
    /// time and memory if the prompt is refused.
    pub(crate) async fn chat_prompt(&self, body: &mut Body, params: &Params) -> Result<Prompt, ApiError> {
        let chat = self.fitting_tokens(body, params).await?;
        let mut prompts = self.with_media(vec![chat]).await?;
        prompts.pop().ok_or_else(|| ApiError::internal(&"a chat without a prompt"))
    }

    /// The tokens of a conversation that leave room for an answer.
    pub(crate) async fn fitting_tokens(
        &self,
        body: &mut Body,
        params: &Params,
    ) -> Result<PromptTokens, ApiError> {
        let chat = self.chat_tokens(body, params.structured.clone(), params.truncation).await?;
        self.check_room("messages", chat.tokens.len())?;
        Ok(chat)
    }

    /// The prompts of one request. Their media are loaded together: a request that held some of them while it
    /// waited for memory for others could wait for one that does the same.
    pub(crate) async fn with_media(&self, all: Vec<PromptTokens>) -> Result<Vec<Prompt>, ApiError> {
        let (mut files, mut prompts) = (Vec::new(), Vec::with_capacity(all.len()));
        let num_prompts = all.len();
        for PromptTokens { tokens, files: own, offsets, echo, answer, wanted, .. } in all {
            let grammar = match wanted {
                Some((wanted, start)) => Some(self.grammars.compile(wanted, start).await?),
                None => None,
            };
            let (media, images) = (Vec::new(), Arc::default());
            let prompt = Prompt { tokens, media, images, echo, answer, grammar };
            prompts.push((prompt, own.len(), offsets));
            files.extend(own);
        }
        let images = match &self.media {
            Some(media) if !files.is_empty() => media.load(&self.pool, files, num_prompts).await?,
            _ => Vec::new(),
        };
        let mut images = images.into_iter();
        let with_images = |(mut prompt, count, offsets): (Prompt, usize, Vec<usize>)| {
            prompt.images = images.by_ref().take(count).collect();
            prompt.media = media_items(&prompt.images, &offsets);
            prompt
        };
        Ok(prompts.into_iter().map(with_images).collect())
    }

    /// Renders a conversation, tokenises it and makes room for its media. `structured`: what its answer has to be where
    /// it calls no tools; `truncation`: what may be cut off.
    pub(crate) async fn chat_tokens(
        &self,
        body: &mut Body,
        structured: Option<Wanted>,
        truncation: Option<Truncation>,
    ) -> Result<PromptTokens, ApiError> {
        let (template, formats) = self.template_of_chats()?;
        let mut chat = read_chat(body, template.accepts_parts(), formats)?;
        let files = self.inspect_media(std::mem::take(&mut chat.media)).await?;
        let (tokenizer, max_bytes) = (self.tokenizer.clone(), self.max_text_bytes());
        let videos = files.iter().filter(|file| file.kind == Kind::Video);
        let times: Vec<Vec<f64>> = videos.map(|file| file.times.clone()).collect();
        let (tokens, answer, wanted) = self
            .pool
            .run(move || {
                let segments = chat.render(&template)?;
                check_length(
                    segments.iter().map(|segment| segment_text(segment).len()).sum(),
                    max_bytes,
                    "messages",
                )?;
                let refuse = |error: TextError| refuse_text("messages", &error);
                let shown = expand_videos(segments.clone(), &times).map_err(refuse)?;
                let tokens = tokenizer.encode(&shown).map_err(refuse)?;
                let wanted = match chat.grammar(structured) {
                    Some(wanted) => Some((wanted, chat.grammar_start(&template, &segments)?)),
                    None => None,
                };
                Ok((tokens, chat.answer_plan(&segments), wanted))
            })
            .await?;
        let (mut tokens, offsets) = self.expand(tokens, &files)?;
        if truncation.is_some_and(|truncation| truncation.cut(&mut tokens)) && !files.is_empty() {
            let message =
                "truncate_prompt_tokens would cut a conversation with pictures; leave messages out instead";
            return Err(ApiError::field("truncate_prompt_tokens", message));
        }
        Ok(PromptTokens { tokens, files, offsets, text: None, echo: String::new(), answer, wanted })
    }

    /// A conversation as the template writes it.
    pub(crate) async fn chat_text(&self, body: &mut Body) -> Result<String, ApiError> {
        let (template, formats) = self.template_of_chats()?;
        let chat = read_chat(body, template.accepts_parts(), formats)?;
        let render = move || Ok(chat.render(&template)?.iter().map(segment_text).collect());
        self.pool.run(render).await
    }

    fn template_of_chats(&self) -> Result<(Arc<ChatTemplate>, Formats), ApiError> {
        self.template.clone().zip(self.formats).ok_or_else(|| {
            ApiError::field("messages", "this model has no chat template; use /v1/completions")
        })
    }

    /// Makes each placeholder as long as the part of a medium that it stands for. Returns the index of the first of each.
    fn expand(
        &self,
        tokens: Vec<TokenId>,
        files: &[MediaFile],
    ) -> Result<(Vec<TokenId>, Vec<usize>), ApiError> {
        let limits = &self.engine.info().limits;
        let Some(image) = limits.image_token_id else { return Ok((tokens, Vec::new())) };
        let video = limits.video_token_id.unwrap_or(image);
        let runs = files.iter().flat_map(|file| {
            let id = if file.kind == Kind::Video { video } else { image };
            std::iter::repeat_n(PlaceholderRun { id, count: file.tokens_per_part }, file.num_parts())
        });
        let runs: Vec<_> = runs.collect();
        expand_media(&tokens, &[image, video], &runs).map_err(|error| refuse_text("messages", &error))
    }

    /// Judges media by their headers, one by one and together.
    async fn inspect_media(&self, urls: Vec<MediaUrl>) -> Result<Vec<MediaFile>, ApiError> {
        if urls.is_empty() {
            return Ok(Vec::new());
        }
        let limits = &self.engine.info().limits;
        let Some(media) = self.media.as_ref().filter(|_| limits.image_token_id.is_some()) else {
            return Err(ApiError::field("messages", "this model does not take images"));
        };
        let num_videos = urls.iter().filter(|url| url.kind == Kind::Video).count();
        if num_videos > 0 && !(media.takes_videos() && limits.video_token_id.is_some()) {
            return Err(ApiError::field("video_url", "this model does not take videos"));
        }
        let (max_images, max_videos) = (self.options.max_images, self.options.max_videos);
        for (found, limit, what) in [
            (urls.len() - num_videos, max_images.min(limits.max_media), "images"),
            (num_videos, max_videos.min(limits.max_media), "videos"),
        ] {
            if found > limit {
                let message = format!("{found} {what} in one prompt; the limit is {limit}");
                return Err(ApiError::field("messages", message));
            }
        }
        // Each is counted among its kind, for the messages.
        let mut counts = [0; 2];
        let files = urls.into_iter().map(|url| {
            let count = &mut counts[usize::from(url.kind == Kind::Video)];
            *count += 1;
            media.inspect(&self.pool, url, *count - 1)
        });
        let files = try_join_all(files).await?;
        let num_tokens = files.iter().map(MediaFile::num_tokens).fold(0, usize::saturating_add);
        if num_tokens >= limits.max_model_len {
            let what = if num_videos > 0 { "videos and images" } else { "images" };
            let message = format!(
                "the {what} need {num_tokens} tokens together; with at least one output token that is over max_model_len \
                 ({}): send fewer or smaller ones",
                limits.max_model_len
            );
            return Err(ApiError::field("messages", message));
        }
        let num_parts: usize = files.iter().map(MediaFile::num_parts).sum();
        if num_parts > limits.max_media {
            let message = format!(
                "the images and every two frames of the videos are {num_parts} media together; the limit is {}: send fewer",
                limits.max_media
            );
            return Err(ApiError::field("messages", message));
        }
        Ok(files)
    }

    /// Tokenises one prompt of a completion. It is written by whoever would write the template, so its special tokens
    /// count; without media, placeholders among them are refused with the request.
    pub(crate) async fn completion_tokens(
        &self,
        input: PromptInput,
        truncation: Option<Truncation>,
    ) -> Result<PromptTokens, ApiError> {
        let (input, images) = match input {
            PromptInput::WithImages { text, images } => (with_placeholders(&text, images.len())?, images),
            other => (other, Vec::new()),
        };
        let tokenizer = self.tokenizer.clone();
        let max_bytes = self.max_text_bytes();
        let work = move || {
            let (mut tokens, text) = match input {
                PromptInput::Text(mut text) => {
                    if let Some(truncation) = truncation {
                        truncation.cut_text(&mut text, max_bytes);
                    }
                    check_length(text.len(), max_bytes, "prompt")?;
                    (encode_prompt(&tokenizer, &text)?, Some(text))
                }
                other => {
                    check_length(other.text_bytes(), max_bytes, "prompt")?;
                    (other.into_tokens(&tokenizer)?, None)
                }
            };
            let is_cut = truncation.is_some_and(|truncation| truncation.cut(&mut tokens));
            Ok((tokens, text.filter(|_| !is_cut)))
        };
        let (tokens, text) = self.pool.run(work).await?;
        let prompt = PromptTokens {
            tokens,
            files: Vec::new(),
            offsets: Vec::new(),
            text,
            echo: String::new(),
            answer: None,
            wanted: None,
        };
        if images.is_empty() {
            return Ok(prompt);
        }
        self.add_images(prompt, images).await
    }

    /// Puts images, given as base64, where the placeholders of a prompt are.
    async fn add_images(&self, prompt: PromptTokens, images: Vec<String>) -> Result<PromptTokens, ApiError> {
        // What is declared does not matter: the bytes say what they are.
        let url = |data: String| MediaUrl {
            kind: Kind::Image,
            url: Some(format!("data:image/png;base64,{data}")),
            video: VideoOptions::default(),
            uuid: None,
        };
        let files = self.inspect_media(images.into_iter().map(url).collect()).await?;
        let (tokens, offsets) = self.expand(prompt.tokens, &files)?;
        self.check_room("prompt", tokens.len())?;
        Ok(PromptTokens { tokens, files, offsets, ..prompt })
    }

    /// Refuses a prompt that leaves no room for an answer, before its media are decoded.
    pub(crate) fn check_room(&self, param: &'static str, num_tokens: usize) -> Result<(), ApiError> {
        let max_model_len = self.engine.info().limits.max_model_len;
        if num_tokens < max_model_len {
            return Ok(());
        }
        let message = format!(
            "{param}: {num_tokens} tokens; with at least one output token that is over max_model_len ({max_model_len})"
        );
        Err(ApiError::field(param, message))
    }

    /// A text of more bytes has too many tokens: that need not be found out by tokenising it.
    fn max_text_bytes(&self) -> usize {
        self.engine.info().limits.max_model_len.saturating_mul(self.tokenizer.max_token_bytes())
    }
}

/// The text with placeholders for its marks.
fn with_placeholders(text: &str, num_images: usize) -> Result<PromptInput, ApiError> {
    let num_marks = text.matches(IMAGE_MARK).count();
    if num_marks != num_images {
        let message = format!(
            "prompt has {num_marks} marks {IMAGE_MARK} and {num_images} entries of multimodal_data: each mark stands for one"
        );
        return Err(ApiError::field("prompt", message));
    }
    Ok(PromptInput::Text(text.replace(IMAGE_MARK, IMAGE_PLACEHOLDER)))
}

fn encode_prompt(tokenizer: &Tokenizer, text: &str) -> Result<Vec<TokenId>, ApiError> {
    tokenizer.encode_trusted(text).map_err(|error| refuse_text("prompt", &error))
}

impl PromptInput {
    /// Bytes of its texts, which have to be tokenised.
    fn text_bytes(&self) -> usize {
        match self {
            Self::Text(text) | Self::WithImages { text, .. } => text.len(),
            Self::Ids(_) => 0,
            Self::Mixed(parts) => parts.iter().map(Self::text_bytes).sum(),
        }
    }

    fn into_tokens(self, tokenizer: &Tokenizer) -> Result<Vec<TokenId>, ApiError> {
        match self {
            Self::Text(text) | Self::WithImages { text, .. } => encode_prompt(tokenizer, &text),
            Self::Ids(tokens) => Ok(tokens),
            Self::Mixed(parts) => {
                let mut tokens = Vec::new();
                for part in parts {
                    tokens.append(&mut part.into_tokens(tokenizer)?);
                }
                Ok(tokens)
            }
        }
    }
}

fn check_length(num_bytes: usize, max_bytes: usize, param: &'static str) -> Result<(), ApiError> {
    if num_bytes <= max_bytes {
        return Ok(());
    }
    let message =
        format!("the text has {num_bytes} bytes; over {max_bytes} it cannot fit into max_model_len");
    Err(ApiError::field(param, message))
}

/// A client's mistake is told; a broken checkpoint is logged.
pub(crate) fn refuse_text(param: &'static str, error: &TextError) -> ApiError {
    match error {
        TextError::ReservedArgument { .. } => ApiError::field("chat_template_kwargs", error.to_string()),
        _ if error.is_request_error() => ApiError::field(param, error.to_string()),
        _ => ApiError::internal(error),
    }
}
