//! llama-server's own completions: the way in and out of `/completion`. What bodies and answers look like is in the files
//! beside.

mod answer;
mod bias;
mod prompt;
mod request;
mod samplers;
mod settings;

use std::sync::Arc;

use serde_json::{Map, Value};

pub(crate) use self::answer::LlamaWriter;
use self::prompt::read_prompts;
use self::request::Asked;
use super::Form;
use crate::body::Body;
use crate::fields::Endpoint;
use crate::params::read_model;
use crate::{ApiError, FrontEnd, Generation};

/// What an answer of this dialect says and leaves out.
pub(crate) struct LlamaHead {
    /// `generation_settings`, but for the seed, which each choice has of its own.
    settings: Map<String, Value>,
    /// `return_tokens`: a body has its tokens. Chunks always have theirs.
    return_tokens: bool,
    /// `response_fields`: what is left of the answer; empty leaves everything.
    response_fields: Vec<String>,
    /// Tokens of a prompt and its answer together.
    max_model_len: usize,
}

impl LlamaHead {
    /// About as many as `generation_settings` has.
    pub(super) fn settings_bytes(&self) -> usize {
        self.settings.values().map(|value| value.to_string().len()).sum()
    }
}

impl FrontEnd {
    /// Queues a completion as llama-server has it (the body of `POST /completion`).
    ///
    /// # Errors
    /// What is wrong with the body, or why the engine does not take it.
    pub async fn llama_completion(&self, body: Value) -> Result<Generation, ApiError> {
        let mut body = self.open(Endpoint::Llama, body)?;
        let model = read_model(&mut body, &self.options)?;
        let bias = self.read_bias(&mut body).await?;
        let asked = Asked::read(&mut body, bias)?;
        let inputs = read_prompts(&mut body)?;
        let own_names = |error: ApiError| error.renamed(&asked.names);
        let mut completion = Body::new(Value::Object(asked.fields))?;
        let params = self.read_params(Endpoint::Completions, &mut completion).map_err(own_names)?;
        let head = LlamaHead {
            settings: settings::settings(&params, &asked.forms),
            return_tokens: asked.return_tokens,
            response_fields: asked.response_fields,
            max_model_len: self.engine.info().limits.max_model_len,
        };
        self.queue_prompts(Form::Llama(Arc::new(head)), model, params, inputs).await.map_err(own_names)
    }
}
