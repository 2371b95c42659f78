//! OpenAI's responses: the way in and out of `/v1/responses`. What bodies and events look like is in the files beside.

mod answer;
mod events;
mod input;
mod input_items;
mod object;
mod request;
mod store;

use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use serde_json::{Value, json};

pub(crate) use self::answer::ResponseWriter;
use self::events::EventLog;
pub(crate) use self::input_items::Page;
pub(crate) use self::object::ResponseHead;
use self::object::response_json;
use self::request::{Asked, to_chat};
pub(crate) use self::store::ResponseStore;
use super::Form;
use crate::body::Body;
use crate::fields::Endpoint;
use crate::params::{Params, read_model};
use crate::{ApiError, FrontEnd, Generation};

/// Names of the chat's fields in this dialect, where they differ.
const NAMES: [(&str, &str); 7] = [
    ("messages", "input"),
    ("image_url", "input"),
    ("video_url", "input"),
    ("max_tokens", "max_output_tokens"),
    ("response_format", "text"),
    ("reasoning_effort", "reasoning"),
    ("logprobs", "include"),
];

impl FrontEnd {
    /// Queues a response (the body of `POST /v1/responses`).
    ///
    /// # Errors
    /// What is wrong with the body, or why the engine does not take it.
    pub async fn response(&self, body: Value) -> Result<Generation, ApiError> {
        let mut body = self.open(Endpoint::Responses, body)?;
        let own_names = |error: ApiError| error.renamed(&NAMES);
        let Asked { chat, echo, history, items, is_stored, is_background } =
            to_chat(&mut body, &self.responses)?;
        let mut chat = Body::new(Value::Object(chat))?;
        let model = read_model(&mut chat, &self.options)?;
        let params = self.read_params(Endpoint::Chat, &mut chat).map_err(own_names)?;
        let head = ResponseHead {
            echo: with_sampling(echo, &params),
            keep: is_stored.then(|| (self.responses.clone(), history)),
            input: Arc::new(items),
            is_background,
        };
        let prompt = self.chat_prompt(&mut chat, &params).await.map_err(own_names)?;
        self.submit(Form::Response(Box::new(head)), model, params, vec![prompt]).map_err(own_names)
    }

    /// How many tokens a response would send to the model (the body of `POST /v1/responses/input_tokens`).
    ///
    /// # Errors
    /// What is wrong with the body.
    pub async fn count_response_tokens(&self, body: Value) -> Result<Value, ApiError> {
        let mut body = self.open(Endpoint::Responses, body)?;
        let mut chat = Body::new(Value::Object(to_chat(&mut body, &self.responses)?.chat))?;
        read_model(&mut chat, &self.options)?;
        let tokens = self.chat_tokens(&mut chat, None, None).await.map_err(|error| error.renamed(&NAMES))?;
        Ok(json!({"object": "response.input_tokens", "input_tokens": tokens.tokens.len()}))
    }

    /// A stored response (`GET /v1/responses/{id}`).
    ///
    /// # Errors
    /// When there is none of this id.
    pub fn stored_response(&self, id: &str) -> Result<Value, ApiError> {
        self.responses.get(id)
    }

    /// The events of a response that was streamed in the background, after number `after` (from the beginning without one): those
    /// that have been, then those that come (`GET /v1/responses/{id}?stream=true`).
    ///
    /// # Errors
    /// When there is none of this id, or it was not streamed in the background.
    pub fn response_events(
        &self,
        id: &str,
        after: Option<usize>,
    ) -> Result<impl Stream<Item = Value> + Send + use<>, ApiError> {
        let first = after.map_or(0, |after| after.saturating_add(1));
        Ok(self.responses.events(id)?.read(first))
    }

    /// A page of the items that a response was asked with (`GET /v1/responses/{id}/input_items`).
    ///
    /// # Errors
    /// When there is no such response, or no such page.
    pub(crate) fn response_input_items(&self, id: &str, page: &Page) -> Result<Value, ApiError> {
        page.of(&self.responses.input(id)?)
    }

    /// Cancels a response in the background (`POST /v1/responses/{id}/cancel`); one that has ended stays as it is.
    ///
    /// # Errors
    /// When there is none of this id, or it was not in the background.
    pub fn cancel_response(&self, id: &str) -> Result<Value, ApiError> {
        self.responses.cancel(id)
    }

    /// Forgets a stored response (`DELETE /v1/responses/{id}`), and cancels it if it is at work.
    ///
    /// # Errors
    /// When there is none of this id.
    pub fn delete_response(&self, id: &str) -> Result<Value, ApiError> {
        self.responses.delete(id)?;
        Ok(json!({"id": id, "object": "response", "deleted": true}))
    }
}

impl Generation {
    /// Goes on in the background, if the request asked for that, and gives the response as it is now.
    ///
    /// # Errors
    /// Gives the generation back if it is not for the background.
    pub fn into_background(self) -> Result<Value, Box<Self>> {
        let Form::Response(head) = &self.shape.form else { return Err(Box::new(self)) };
        let Some((store, _)) = head.keep.as_ref().filter(|_| head.is_background) else {
            return Err(Box::new(self));
        };
        let response = response_json(&self.shape, head, "queued", &[]);
        let (store, id, input) = (store.clone(), self.shape.id.clone(), head.input.clone());
        // Inside, the answer stores itself, or its failure; so there is nothing to do with the result.
        if self.is_streamed() {
            let (log, writer) = EventLog::new();
            let work = self.into_chunks().for_each(move |event| {
                writer.push(event);
                std::future::ready(())
            });
            store.start(id, (response.clone(), input, Some(log)), work);
        } else {
            let work = async move { drop(self.into_response().await) };
            store.start(id, (response.clone(), input, None), work);
        }
        Ok(response)
    }
}

/// Sampling as it is done, the model's own defaults included.
fn with_sampling(
    mut echo: serde_json::Map<String, Value>,
    params: &Params,
) -> serde_json::Map<String, Value> {
    // By way of decimal digits: 0.7 as an f32 is another number as an f64.
    let number = |value: f32| value.to_string().parse::<f64>().unwrap_or_default();
    echo.insert("temperature".into(), json!(number(params.sampling.temperature)));
    echo.insert("top_p".into(), json!(number(params.sampling.top_p)));
    echo.insert("max_output_tokens".into(), json!(params.max_tokens));
    echo
}
