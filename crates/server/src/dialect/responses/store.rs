//! Responses that are remembered: for `previous_response_id`, for those who come back, and for work in the background.
//!
//! All in memory, bounded by bytes: what was not asked for longest goes first. What is at work in the background is
//! bounded by the engine's queue.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::AbortHandle;

use super::events::EventLog;
use crate::ApiError;
use crate::lru::ByteLru;

/// A response that has ended.
struct Ended {
    response: Value,
    /// What it was asked, as items.
    input: Arc<Vec<Value>>,
    /// Of one that was streamed in the background.
    events: Option<Arc<EventLog>>,
    /// The messages of the conversation, the answer included; `None` if it failed.
    conversation: Option<Arc<Vec<Value>>>,
}

/// A response that is at work in the background.
struct Running {
    response: Value,
    input: Arc<Vec<Value>>,
    events: Option<Arc<EventLog>>,
    task: AbortHandle,
}

/// The store of a front end.
pub(crate) struct ResponseStore(Mutex<State>);

struct State {
    ended: ByteLru<[u8; 32], Arc<Ended>>,
    running: HashMap<String, Running>,
}

/// Ids are the clients' text: they are looked up by what has one length.
fn key(id: &str) -> [u8; 32] {
    *blake3::hash(id.as_bytes()).as_bytes()
}

fn not_found(id: &str) -> ApiError {
    ApiError::ResponseNotFound { id: id.chars().take(100).collect() }
}

impl ResponseStore {
    /// A store of so many bytes of JSON.
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self(Mutex::new(State { ended: ByteLru::new(max_bytes), running: HashMap::new() }))
    }

    /// Keeps a response that has ended.
    pub(crate) fn put(
        &self,
        id: &str,
        response: Value,
        input: Arc<Vec<Value>>,
        conversation: Option<Vec<Value>>,
    ) {
        let all = conversation.iter().flatten().chain(input.iter()).chain([&response]);
        let num_bytes: usize = all.map(json_bytes).sum();
        let mut state = self.0.lock();
        let events = state.running.remove(id).and_then(|running| running.events);
        let num_bytes = num_bytes + events.as_ref().map_or(0, |events| events.num_bytes());
        let ended = Arc::new(Ended { response, input, events, conversation: conversation.map(Arc::new) });
        state.ended.insert(key(id), ended, num_bytes);
    }

    /// Starts work in the background, which puts its response here when it ends.
    pub(crate) fn start(
        self: Arc<Self>,
        id: String,
        (response, input, events): (Value, Arc<Vec<Value>>, Option<Arc<EventLog>>),
        work: impl Future<Output = ()> + Send + 'static,
    ) {
        // Held over the start, so that the work cannot end before it is known.
        let mut state = self.0.lock();
        let (store, own_id) = (self.clone(), id.clone());
        let task = tokio::spawn(async move {
            work.await;
            // An answer that is too large to keep has not replaced this.
            store.0.lock().running.remove(&own_id);
        });
        state.running.insert(id, Running { response, input, events, task: task.abort_handle() });
    }

    /// Work in the background has come out of the queue.
    pub(crate) fn begin(&self, id: &str) {
        if let Some(running) = self.0.lock().running.get_mut(id) {
            running.response["status"] = json!("in_progress");
        }
    }

    /// A response, whatever its state.
    pub(crate) fn get(&self, id: &str) -> Result<Value, ApiError> {
        let mut state = self.0.lock();
        match state.running.get(id) {
            Some(running) => Ok(running.response.clone()),
            None => {
                state.ended.get(&key(id)).map(|ended| ended.response.clone()).ok_or_else(|| not_found(id))
            }
        }
    }

    /// The items that a response was asked with, those of the conversation before it included.
    pub(crate) fn input(&self, id: &str) -> Result<Arc<Vec<Value>>, ApiError> {
        let mut state = self.0.lock();
        match state.running.get(id) {
            Some(running) => Ok(running.input.clone()),
            None => state.ended.get(&key(id)).map(|ended| ended.input.clone()).ok_or_else(|| not_found(id)),
        }
    }

    /// The events of a response that was streamed in the background.
    pub(crate) fn events(&self, id: &str) -> Result<Arc<EventLog>, ApiError> {
        let mut state = self.0.lock();
        let events = match state.running.get(id) {
            Some(running) => running.events.clone(),
            None => {
                state.ended.get(&key(id)).map(|ended| ended.events.clone()).ok_or_else(|| not_found(id))?
            }
        };
        events.ok_or_else(|| {
            let rule =
                "stream: only a response made with background: true and stream: true can be streamed again";
            ApiError::field("stream", rule)
        })
    }

    /// The items of a conversation that ended with a response, its output included; none if it is not stored.
    pub(crate) fn items_after(&self, id: &str) -> Vec<Value> {
        let Some(ended) = self.0.lock().ended.get(&key(id)) else { return Vec::new() };
        let output = ended.response["output"].as_array().cloned().unwrap_or_default();
        ended.input.iter().cloned().chain(output).collect()
    }

    /// The conversation that ended with a response.
    pub(crate) fn conversation(&self, id: &str) -> Result<Arc<Vec<Value>>, ApiError> {
        let field = "previous_response_id";
        let mut state = self.0.lock();
        if state.running.contains_key(id) {
            return Err(ApiError::field(field, format!("{field}: that response is still at work")));
        }
        let Some(ended) = state.ended.get(&key(id)) else {
            let id: String = id.chars().take(100).collect();
            let message = format!("{field}: no response {id:?} is stored here (any more)");
            return Err(ApiError::field(field, message));
        };
        ended.conversation.clone().ok_or_else(|| {
            ApiError::field(field, format!("{field}: that response has no answer to go on from"))
        })
    }

    /// Ends work in the background.
    pub(crate) fn cancel(&self, id: &str) -> Result<Value, ApiError> {
        let running = self.0.lock().running.remove(id);
        let Some(Running { mut response, input, task, .. }) = running else {
            let response = self.get(id)?;
            return match response["background"] == true {
                true => Ok(response),
                false => Err(ApiError::body("only a response in the background can be cancelled")),
            };
        };
        task.abort();
        response["status"] = json!("cancelled");
        self.put(id, response.clone(), input, None);
        Ok(response)
    }

    /// Forgets a response.
    pub(crate) fn delete(&self, id: &str) -> Result<(), ApiError> {
        let mut state = self.0.lock();
        if let Some(running) = state.running.remove(id) {
            running.task.abort();
            return Ok(());
        }
        state.ended.remove(&key(id)).map(|_| ()).ok_or_else(|| not_found(id))
    }
}

/// About what a value takes as JSON.
pub(super) fn json_bytes(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 16,
        Value::String(text) => 32 + text.len(),
        Value::Array(items) => 32 + items.iter().map(json_bytes).sum::<usize>(),
        Value::Object(map) => {
            64 + map.iter().map(|(key, value)| 32 + key.len() + json_bytes(value)).sum::<usize>()
        }
    }
}
