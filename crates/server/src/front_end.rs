//! From a JSON body to queued sequences. HTTP, the `generate` command and the `batch` command all come through here.

use std::sync::Arc;

use futures_util::future::try_join_all;
use serde_json::{Value, json};
use spark_api::{Engine, Health, MediaItem, SubmitError, TokenId};
use spark_text::{ChatTemplate, GrammarStart, TextError, Tokenizer, expand_placeholders};
use spark_vision::ImageProcessor;

use crate::body::Body;
use crate::chat_request::{read_chat, segment_text};
use crate::completion_request::{PromptInput, read_prompts};
use crate::fields::{self, Endpoint, UnknownFields};
use crate::grammars::{AnswerGrammar, Grammars};
use crate::ids::{Seeds, unix_seconds};
use crate::images::{HeldImage, ImageFile, Images, media_item};
use crate::metrics::Metrics;
use crate::params::{Params, read_model};
use crate::parts::AnswerPlan;
use crate::pool::CpuPool;
use crate::structured::Wanted;
use crate::tools::Formats;
use crate::{ApiError, Generation, Options};

/// Most choices of one request over all its prompts.
const MAX_CHOICES: usize = 1024;

/// Answers OpenAI bodies with an engine. Shared by all connections; all methods take `&self`.
pub struct FrontEnd {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Option<Arc<ChatTemplate>>,
    formats: Option<Formats>,
    images: Option<Images>,
    pub(crate) options: Options,
    pub(crate) metrics: Arc<Metrics>,
    unknown: UnknownFields,
    pub(crate) seeds: Seeds,
    pub(crate) pool: CpuPool,
    grammars: Grammars,
    /// When it was made, for the list of models.
    created: u64,
}

/// The tokens of a conversation, with room for its images, which are still to be decoded.
pub(crate) struct ChatTokens {
    pub(crate) tokens: Vec<TokenId>,
    files: Vec<ImageFile>,
    /// Of the first placeholder of each image.
    offsets: Vec<usize>,
    answer: Option<AnswerPlan>,
    /// What the answer is held to, and where in the output that begins.
    wanted: Option<(Wanted, GrammarStart)>,
}

/// A prompt, ready for the engine.
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) media: Vec<MediaItem>,
    /// What `media` are part of. Kept until all sequences have ended, for the bound on their memory.
    pub(crate) images: Arc<[Arc<HeldImage>]>,
    /// What `echo` shows.
    pub(crate) echo: String,
    /// How outputs are taken apart; `None`: not at all.
    pub(crate) answer: Option<AnswerPlan>,
    /// What outputs are held to.
    pub(crate) grammar: Option<AnswerGrammar>,
}

impl FrontEnd {
    /// A front end. Without a template, chat is a 400; without an image processor, images are.
    pub fn new(
        engine: Arc<dyn Engine>,
        tokenizer: Arc<Tokenizer>,
        template: Option<Arc<ChatTemplate>>,
        image_processor: Option<Arc<ImageProcessor>>,
        options: Options,
    ) -> Self {
        let limits = &engine.info().limits;
        let images =
            image_processor.map(|processor| Images::new(processor, &options, limits.max_media_tokens));
        let grammars = Grammars::new(tokenizer.clone(), &limits.eos_token_ids);
        Self {
            metrics: Arc::new(Metrics::new(limits.max_model_len)),
            seeds: Seeds::new(options.seed),
            formats: template.as_ref().map(|template| Formats::new(&options, template)),
            engine,
            tokenizer,
            template,
            images,
            options,
            unknown: UnknownFields::default(),
            pool: CpuPool::new(),
            grammars,
            created: unix_seconds(),
        }
    }

    /// Queues a chat completion (the body of `POST /v1/chat/completions`).
    ///
    /// # Errors
    /// What is wrong with the body, or why the engine does not take it.
    pub async fn chat(&self, body: Value) -> Result<Generation, ApiError> {
        let mut body = self.open(Endpoint::Chat, body)?;
        let model = read_model(&mut body, &self.options)?;
        let params = self.read_params(Endpoint::Chat, &mut body)?;
        let prompt = self.chat_prompt(&mut body, params.structured.clone()).await?;
        self.submit(Endpoint::Chat, model, params, vec![prompt])
    }

    /// Queues a completion (the body of `POST /v1/completions`).
    ///
    /// # Errors
    /// As [`chat`](Self::chat).
    pub async fn completion(&self, body: Value) -> Result<Generation, ApiError> {
        let mut body = self.open(Endpoint::Completions, body)?;
        let model = read_model(&mut body, &self.options)?;
        let params = self.read_params(Endpoint::Completions, &mut body)?;
        let inputs = read_prompts(&mut body)?;
        if inputs.len() * params.n > MAX_CHOICES {
            let message = format!("{} prompts x n {} is over {MAX_CHOICES} choices", inputs.len(), params.n);
            return Err(ApiError::field("n", message));
        }
        let echo = params.output.echo;
        let mut prompts =
            try_join_all(inputs.into_iter().map(|input| self.completion_prompt(input, echo))).await?;
        if let Some(wanted) = params.structured.clone() {
            let grammar = self.grammars.compile(wanted, GrammarStart::Answer).await?;
            prompts.iter_mut().for_each(|prompt| prompt.grammar = Some(grammar.clone()));
        }
        self.submit(Endpoint::Completions, model, params, prompts)
    }

    /// Answers one line of an offline batch: status and body, as the server would.
    pub async fn handle(&self, url: &str, body: Value) -> (u16, Value) {
        let generation = match url {
            "/v1/chat/completions" => self.chat(body).await,
            "/v1/completions" => self.completion(body).await,
            other => Err(ApiError::RouteNotFound { path: other.chars().take(200).collect() }),
        };
        let answer = match generation {
            Ok(generation) if generation.is_streamed() => {
                Err(ApiError::field("stream", "a batch has no streams: leave stream out"))
            }
            Ok(generation) => generation.into_response().await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(body) => (200, body),
            Err(error) => (error.status(), error.to_json()),
        }
    }

    /// Whether the engine can serve.
    pub fn health(&self) -> Health {
        self.engine.health()
    }

    /// The page of `GET /metrics`.
    pub fn metrics(&self) -> String {
        self.metrics.render(self.options.model_name(), self.engine.info(), &self.engine.stats())
    }

    /// The body of `GET /v1/models`.
    pub fn models(&self) -> Value {
        let models: Vec<_> = self.options.served_names.iter().map(|name| self.model_json(name)).collect();
        json!({"object": "list", "data": models})
    }

    /// The body of `GET /v1/models/{name}`.
    ///
    /// # Errors
    /// When no model of that name is served.
    pub fn model(&self, name: &str) -> Result<Value, ApiError> {
        match self.options.served_names.iter().any(|served| served == name) {
            true => Ok(self.model_json(name)),
            false => Err(ApiError::ModelNotFound {
                model: name.chars().take(200).collect(),
                served: self.options.served_names.clone(),
            }),
        }
    }

    fn model_json(&self, name: &str) -> Value {
        json!({
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "spark-engine",
            "root": self.options.model_root,
            "parent": null,
            "max_model_len": self.engine.info().limits.max_model_len,
        })
    }

    fn open(&self, endpoint: Endpoint, body: Value) -> Result<Body, ApiError> {
        // Said before any work is done for a request that cannot be queued.
        match self.engine.health() {
            Health::Ready => {}
            Health::Stopping => return Err(SubmitError::Stopping.into()),
            Health::Failed(reason) => return Err(SubmitError::Failed(reason).into()),
        }
        let body = Body::new(body)?;
        fields::check(endpoint, body.fields(), &self.unknown)?;
        Ok(body)
    }

    fn read_params(&self, endpoint: Endpoint, body: &mut Body) -> Result<Params, ApiError> {
        Params::read(endpoint, body, &self.options, self.engine.info().limits.max_logprobs)
    }

    /// The prompt of a chat. Its images are decoded last: a small file can hold many pixels, which are not worth their
    /// time and memory if the prompt is refused.
    async fn chat_prompt(&self, body: &mut Body, structured: Option<Wanted>) -> Result<Prompt, ApiError> {
        let ChatTokens { tokens, files, offsets, answer, wanted } =
            self.chat_tokens(body, structured).await?;
        let max_model_len = self.engine.info().limits.max_model_len;
        if tokens.len() >= max_model_len {
            let message = format!(
                "the messages have {} tokens; with at least one output token that is over max_model_len ({max_model_len})",
                tokens.len()
            );
            return Err(ApiError::field("messages", message));
        }
        let grammar = match wanted {
            Some((wanted, start)) => Some(self.grammars.compile(wanted, start).await?),
            None => None,
        };
        let images: Arc<[_]> = match &self.images {
            Some(images) if !files.is_empty() => images.load(&self.pool, files).await?.into(),
            _ => Arc::default(),
        };
        let media = images.iter().zip(offsets).map(|(image, offset)| media_item(image, offset)).collect();
        Ok(Prompt { tokens, media, images, echo: String::new(), answer, grammar })
    }

    /// Renders a conversation, tokenises it and makes room for its images. `structured`: what its answer has to be where
    /// it calls no tools.
    pub(crate) async fn chat_tokens(
        &self,
        body: &mut Body,
        structured: Option<Wanted>,
    ) -> Result<ChatTokens, ApiError> {
        let (Some(template), Some(formats)) = (self.template.clone(), self.formats) else {
            return Err(ApiError::field("messages", "this model has no chat template; use /v1/completions"));
        };
        let mut chat = read_chat(body, template.accepts_parts(), formats)?;
        let files = self.inspect_images(std::mem::take(&mut chat.image_urls)).await?;
        let (tokenizer, max_bytes) = (self.tokenizer.clone(), self.max_text_bytes());
        let (mut tokens, answer, wanted) = self
            .pool
            .run(move || {
                let segments = chat.render(&template)?;
                check_length(
                    segments.iter().map(|segment| segment_text(segment).len()).sum(),
                    max_bytes,
                    "messages",
                )?;
                let tokens = tokenizer.encode(&segments).map_err(|error| refuse_text("messages", &error))?;
                let wanted = match chat.grammar(structured) {
                    Some(wanted) => Some((wanted, chat.grammar_start(&template, &segments)?)),
                    None => None,
                };
                Ok((tokens, chat.answer_plan(&segments), wanted))
            })
            .await?;
        let mut offsets = Vec::new();
        if let Some(placeholder) = self.engine.info().limits.image_token_id {
            let counts: Vec<usize> = files.iter().map(|file| file.num_tokens).collect();
            let expanded = expand_placeholders(&tokens, placeholder, &counts);
            (tokens, offsets) = expanded.map_err(|error| refuse_text("messages", &error))?;
        }
        Ok(ChatTokens { tokens, files, offsets, answer, wanted })
    }

    /// Judges images by their headers, one by one and together.
    async fn inspect_images(&self, urls: Vec<String>) -> Result<Vec<ImageFile>, ApiError> {
        if urls.is_empty() {
            return Ok(Vec::new());
        }
        let limits = &self.engine.info().limits;
        let Some(images) = self.images.as_ref().filter(|_| limits.image_token_id.is_some()) else {
            return Err(ApiError::field("messages", "this model does not take images"));
        };
        if urls.len() > limits.max_media {
            let message = format!("{} images in one prompt; the limit is {}", urls.len(), limits.max_media);
            return Err(ApiError::field("messages", message));
        }
        let files = try_join_all(urls.into_iter().map(|url| images.inspect(&self.pool, url))).await?;
        let num_tokens = files.iter().map(|file| file.num_tokens).fold(0, usize::saturating_add);
        if num_tokens >= limits.max_model_len {
            let message = format!(
                "the images need {num_tokens} tokens together; with at least one output token that is over max_model_len \
                 ({}): send fewer or smaller ones",
                limits.max_model_len
            );
            return Err(ApiError::field("messages", message));
        }
        Ok(files)
    }

    /// Tokenises one prompt of a completion. It is written by whoever would write the template, so its special tokens
    /// count; without media, placeholders among them are refused with the request.
    pub(crate) async fn completion_prompt(&self, input: PromptInput, echo: bool) -> Result<Prompt, ApiError> {
        let tokenizer = self.tokenizer.clone();
        let max_bytes = self.max_text_bytes();
        let work = move || match input {
            PromptInput::Ids(tokens) => {
                let echo = if echo { tokenizer.decode(&tokens, false) } else { String::new() };
                Ok(Prompt {
                    tokens,
                    media: Vec::new(),
                    images: Arc::default(),
                    echo,
                    answer: None,
                    grammar: None,
                })
            }
            PromptInput::Text(text) => {
                check_length(text.len(), max_bytes, "prompt")?;
                let tokens =
                    tokenizer.encode_trusted(&text).map_err(|error| refuse_text("prompt", &error))?;
                let echo = if echo { text } else { String::new() };
                Ok(Prompt {
                    tokens,
                    media: Vec::new(),
                    images: Arc::default(),
                    echo,
                    answer: None,
                    grammar: None,
                })
            }
        };
        self.pool.run(work).await
    }

    /// A text of more bytes has too many tokens: that need not be found out by tokenising it.
    fn max_text_bytes(&self) -> usize {
        self.engine.info().limits.max_model_len.saturating_mul(self.tokenizer.max_token_bytes())
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
