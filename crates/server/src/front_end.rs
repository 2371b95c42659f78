//! From a JSON body to queued sequences. HTTP, the `generate` command and the `batch` command all come through here.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use futures_util::future::try_join_all;
use serde_json::{Value, json};
use spark_api::{Engine, Health, SubmitError};
use spark_text::{ChatTemplate, GrammarStart, Tokenizer};
use spark_vision::{ImageProcessor, VideoProcessor};

use crate::body::Body;
use crate::completion_request::{PromptInput, read_prompts};
use crate::dialect::Form;
use crate::dialect::responses::ResponseStore;
use crate::fields::{self, Endpoint, UnknownFields};
use crate::grammars::Grammars;
use crate::ids::{Seeds, unix_seconds};
use crate::media::Media;
use crate::metrics::Metrics;
use crate::params::{Params, read_model};
use crate::pool::CpuPool;
use crate::tools::Formats;
use crate::{ApiError, Generation, Options};

/// What is said of conversations and their pictures is said of the prompts of a completion.
const NAMES_OF_PROMPTS: [(&str, &str); 2] = [("messages", "prompt"), ("image_url", "prompt")];
/// Most choices of one request over all its prompts.
pub(crate) const MAX_CHOICES: usize = 1024;

/// Answers OpenAI bodies with an engine. Shared by all connections; all methods take `&self`.
pub struct FrontEnd {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Option<Arc<ChatTemplate>>,
    pub(crate) formats: Option<Formats>,
    pub(crate) media: Option<Media>,
    pub(crate) options: Options,
    pub(crate) metrics: Arc<Metrics>,
    unknown: UnknownFields,
    pub(crate) seeds: Seeds,
    pub(crate) pool: CpuPool,
    pub(crate) grammars: Grammars,
    /// Answers that later requests may refer to.
    pub(crate) responses: Arc<ResponseStore>,
    /// Held by every generation at work.
    pub(crate) load: Arc<()>,
    /// Prompt tokens of every sequence at work.
    pub(crate) held_tokens: Arc<AtomicUsize>,
    /// When it was made, for the list of models.
    created: u64,
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
        let media = image_processor.map(|processor| Media::new(processor, &options, limits.max_media_tokens));
        let grammars = Grammars::new(tokenizer.clone(), &limits.eos_token_ids);
        Self {
            metrics: Arc::new(Metrics::new(limits.max_model_len)),
            seeds: Seeds::new(options.seed),
            formats: template.as_ref().map(|template| Formats::new(&options, template)),
            engine,
            tokenizer,
            template,
            media,
            unknown: UnknownFields::default(),
            pool: CpuPool::new(),
            grammars,
            responses: Arc::new(ResponseStore::new(options.max_response_bytes)),
            load: Arc::new(()),
            held_tokens: Arc::default(),
            options,
            created: unix_seconds(),
        }
    }

    /// The same, taking videos too. Nothing changes where images are not taken.
    #[must_use]
    pub fn with_videos(mut self, processor: Arc<VideoProcessor>) -> Self {
        self.media = self.media.map(|media| media.with_videos(processor));
        self
    }

    /// Whether it takes conversations.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Queues a chat completion (the body of `POST /v1/chat/completions`).
    ///
    /// # Errors
    /// What is wrong with the body, or why the engine does not take it.
    pub async fn chat(&self, body: Value) -> Result<Generation, ApiError> {
        let mut body = self.open(Endpoint::Chat, body)?;
        let model = read_model(&mut body, &self.options)?;
        let params = self.read_params(Endpoint::Chat, &mut body)?;
        let prompt = self.chat_prompt(&mut body, &params).await?;
        self.submit(Form::Chat, model, params, vec![prompt])
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
        self.queue_prompts(Form::Completion, model, params, inputs).await
    }

    /// Queues what goes on after each of several prompts.
    pub(crate) async fn queue_prompts(
        &self,
        form: Form,
        model: String,
        params: Params,
        inputs: Vec<PromptInput>,
    ) -> Result<Generation, ApiError> {
        if inputs.len() * params.n > MAX_CHOICES {
            let message = format!("{} prompts x n {} is over {MAX_CHOICES} choices", inputs.len(), params.n);
            return Err(ApiError::field("n", message));
        }
        let grammar = match params.structured.clone() {
            Some(wanted) => Some(self.grammars.compile(wanted, GrammarStart::Answer).await?),
            None => None,
        };
        let own_names = |error: ApiError| error.renamed(&NAMES_OF_PROMPTS);
        let tokens = inputs.into_iter().map(|input| self.completion_tokens(input, params.truncation));
        let mut tokens = try_join_all(tokens).await.map_err(own_names)?;
        if params.output.echo || form.shows_prompts() {
            tokens = self.with_echoes(&form, params.n, tokens).await?;
        }
        let mut prompts = self.with_media(tokens).await.map_err(own_names)?;
        prompts.iter_mut().for_each(|prompt| prompt.grammar.clone_from(&grammar));
        self.submit(form, model, params, prompts)
    }

    /// Answers one line of an offline batch: status and body, as the server would.
    pub async fn handle(&self, url: &str, body: Value) -> (u16, Value) {
        let generation = match url {
            "/v1/chat/completions" => self.chat(body).await,
            "/v1/completions" => self.completion(body).await,
            "/v1/responses" => self.response(body).await,
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

    /// How many answers are at work: queued, running, or held up by slow readers.
    pub fn load(&self) -> usize {
        Arc::strong_count(&self.load) - 1
    }

    /// The body of `GET /server_info`.
    pub fn server_info(&self) -> Value {
        let info = self.engine.info();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "served_model_name": self.options.served_names,
            "model": self.options.model_root,
            "architecture": info.architecture,
            "max_model_len": info.limits.max_model_len,
            "num_kv_tokens": info.num_kv_tokens,
            "block_size": info.block_size,
            "started": self.created,
            "settings": self.options.settings,
        })
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

    pub(crate) fn open(&self, endpoint: Endpoint, body: Value) -> Result<Body, ApiError> {
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

    pub(crate) fn read_params(&self, endpoint: Endpoint, body: &mut Body) -> Result<Params, ApiError> {
        Params::read(endpoint, body, &self.options, &self.engine.info().limits)
    }
}
