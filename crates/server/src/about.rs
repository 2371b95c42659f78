//! What the server tells those who come from llama-server (`/props`) and vLLM (`/tokenizer_info`) of its model.

use serde_json::{Map, Value, json};

use crate::answer::FINGERPRINT;
use crate::completion_request::IMAGE_MARK;
use crate::{ApiError, FrontEnd};

/// Class of a tokenizer whose settings name none.
const TOKENIZER_CLASS: &str = "PreTrainedTokenizerFast";

impl FrontEnd {
    /// The body of `GET /props`, as far as it has a meaning here.
    pub fn props(&self) -> Value {
        let limits = &self.engine.info().limits;
        let defaults = &self.options.sampling_defaults;
        let has_images = self.media.is_some() && limits.image_token_id.is_some();
        let has_videos = has_images
            && limits.video_token_id.is_some()
            && self.media.as_ref().is_some_and(|media| media.takes_videos());
        let mut props = json!({
            "default_generation_settings": {
                "n_ctx": limits.max_model_len,
                "params": {
                    "temperature": decimal(defaults.temperature),
                    "top_k": defaults.top_k,
                    "top_p": decimal(defaults.top_p),
                    "min_p": decimal(defaults.min_p),
                },
            },
            "model_alias": self.options.model_name(),
            "model_path": self.options.model_root,
            "modalities": {"vision": has_images, "video": has_videos, "audio": false},
            "media_marker": IMAGE_MARK,
            "build_info": FINGERPRINT,
        });
        for name in ["bos_token", "eos_token"] {
            props[name] = content_of(&self.tokenizer.config()[name]);
        }
        if let Some(source) = self.shown_template() {
            props["chat_template"] = json!(source);
        }
        props
    }

    /// The body of `GET /tokenizer_info`: `tokenizer_config.json` without paths, and the chat template that is in use.
    ///
    /// # Errors
    /// A 404 unless `--enable-tokenizer-info-endpoint` is given.
    pub fn tokenizer_info(&self) -> Result<Value, ApiError> {
        if !self.options.tokenizer_info {
            return Err(ApiError::RouteNotFound { path: "/tokenizer_info".to_owned() });
        }
        let empty = Map::new();
        let config = self.tokenizer.config().as_object().unwrap_or(&empty);
        let shown = config.iter().filter(|(name, _)| !["vocab_file", "merges_file"].contains(&name.as_str()));
        let mut info: Map<_, _> = shown.map(|(name, value)| (name.clone(), content_of(value))).collect();
        info.entry("tokenizer_class").or_insert_with(|| json!(TOKENIZER_CLASS));
        if let Some(source) = self.shown_template() {
            info.insert("chat_template".to_owned(), json!(source));
        }
        Ok(Value::Object(info))
    }

    /// The chat template, which is the operator's: shown with the tokenizer's settings only.
    fn shown_template(&self) -> Option<String> {
        self.template.as_ref().filter(|_| self.options.tokenizer_info)?.source()
    }
}

/// By way of decimal digits: 0.7 as an f32 is another number as an f64.
pub(crate) fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_default()
}

/// Added tokens are objects in the file; who reads their names wants the text.
fn content_of(value: &Value) -> Value {
    match value {
        Value::Object(fields) => match fields.get("content") {
            Some(content) => content.clone(),
            None => fields.iter().map(|(name, value)| (name.clone(), content_of(value))).collect(),
        },
        Value::Array(items) => items.iter().map(content_of).collect(),
        other => other.clone(),
    }
}
