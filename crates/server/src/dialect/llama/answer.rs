//! Answers as llama-server writes them: one object a choice, whole or at the end of a stream, and one a token before that.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::LlamaHead;
use crate::Delta;
use crate::answer::Shape;
use crate::choice::{Finish, Stop};
use crate::progress::PromptProgress;

/// There are no slots: what clients send back means "any".
const NO_SLOT: i64 = -1;

/// Writes the chunks of a streamed answer.
pub(crate) struct LlamaWriter {
    head: Arc<LlamaHead>,
    choices: Vec<Written>,
}

/// What has been written of one choice.
#[derive(Default, Clone)]
struct Written {
    num_tokens: usize,
    num_cached_tokens: usize,
    has_new_line: bool,
    progress: PromptProgress,
}

impl LlamaWriter {
    pub(crate) fn new(head: Arc<LlamaHead>, shape: &Shape) -> Self {
        Self { head, choices: vec![Written::default(); shape.num_choices()] }
    }

    /// The chunks of one delta: the progress of its prompt, its token, its end.
    pub(crate) fn write(&mut self, shape: &Shape, delta: &Delta) -> Vec<Value> {
        let written = &mut self.choices[delta.choice];
        written.add(delta);
        let mut chunks: Vec<Value> = written.progress(shape, delta).into_iter().collect();
        let mut rest = delta.clone();
        if !delta.tokens.is_empty() {
            chunks.push(Value::Object(written.token(shape, delta)));
            rest.text.clear();
        }
        if delta.finish.is_some() {
            // Text that was held back comes without a token of its own.
            chunks.push(self.head.shown(written.last(shape, &self.head, &rest, &[])));
        }
        chunks
    }
}

impl Written {
    fn add(&mut self, delta: &Delta) {
        self.num_tokens += delta.tokens.len();
        self.has_new_line |= delta.text.contains('\n');
        if let Some(prompt) = &delta.prompt {
            self.num_cached_tokens = prompt.num_cached_tokens;
        }
    }

    fn chunk(&self, shape: &Shape, delta: &Delta, content: &str, tokens: &[u32]) -> Map<String, Value> {
        let mut chunk = Map::new();
        chunk.insert("index".into(), json!(delta.choice));
        chunk.insert("content".into(), json!(content));
        chunk.insert("tokens".into(), json!(tokens));
        chunk.insert("id_slot".into(), json!(NO_SLOT));
        chunk.insert("stop".into(), json!(false));
        chunk.insert("tokens_predicted".into(), json!(self.num_tokens));
        chunk.insert("tokens_evaluated".into(), json!(shape.prompt(delta.choice).tokens.len()));
        chunk
    }

    fn progress(&mut self, shape: &Shape, delta: &Delta) -> Option<Value> {
        let progress = self.progress.report(shape, delta)?;
        let mut chunk = self.chunk(shape, delta, "", &[]);
        chunk.insert("prompt_progress".into(), progress.to_json());
        if shape.stream.timings {
            chunk.insert("timings".into(), progress.timings().llama());
        }
        Some(Value::Object(chunk))
    }

    fn token(&self, shape: &Shape, delta: &Delta) -> Map<String, Value> {
        let mut chunk = self.chunk(shape, delta, &delta.text, &delta.tokens);
        if let Some(count) = shape.output.logprobs {
            chunk.insert("completion_probabilities".into(), shape.names().llama(&delta.logprobs, count));
        }
        if let Some(timings) = delta.timings.filter(|_| shape.stream.timings) {
            chunk.insert("timings".into(), timings.llama());
        }
        chunk
    }

    /// What is said at the end of a choice. `delta` has its text and its end.
    fn last(&self, shape: &Shape, head: &LlamaHead, delta: &Delta, tokens: &[u32]) -> Map<String, Value> {
        let prompt = shape.prompt(delta.choice);
        let (stop_type, stopping_word) = stop_type(delta.finish.as_ref());
        let is_full = prompt.tokens.len() + self.num_tokens >= head.max_model_len;
        let was_enough = head.settings.get("n_predict").is_some_and(|count| *count == self.num_tokens);
        let mut settings = head.settings.clone();
        settings.insert("seed".into(), json!(shape.seeds[delta.choice]));
        let mut body = self.chunk(shape, delta, &delta.text, tokens);
        body.insert("stop".into(), json!(true));
        body.insert("model".into(), json!(shape.model));
        body.insert("generation_settings".into(), Value::Object(settings));
        body.insert("prompt".into(), json!(prompt.echo));
        body.insert("has_new_line".into(), json!(self.has_new_line));
        body.insert("truncated".into(), json!(stop_type == "limit" && is_full && !was_enough));
        body.insert("stop_type".into(), json!(stop_type));
        body.insert("stopping_word".into(), json!(stopping_word));
        body.insert("tokens_cached".into(), json!(self.num_cached_tokens));
        body.insert("timings".into(), delta.timings.unwrap_or_default().llama());
        body
    }
}

impl LlamaHead {
    /// A whole answer: one object, or the list of those of several choices.
    pub(crate) fn whole(&self, shape: &Shape, choices: Vec<Delta>) -> Value {
        let object = |choice: Delta| {
            let mut written = Written::default();
            written.add(&choice);
            let tokens = if self.return_tokens { &choice.tokens[..] } else { &[] };
            let mut body = written.last(shape, self, &choice, tokens);
            if let Some(count) = shape.output.logprobs {
                let probabilities = shape.names().llama(&choice.logprobs, count);
                body.insert("completion_probabilities".into(), probabilities);
            }
            self.shown(body)
        };
        let mut objects: Vec<Value> = choices.into_iter().map(object).collect();
        match objects.pop() {
            Some(only) if objects.is_empty() => only,
            last => objects.into_iter().chain(last).collect(),
        }
    }

    /// What `response_fields` leaves of the last object. A path into an object is the name of what it leads to.
    fn shown(&self, body: Map<String, Value>) -> Value {
        if self.response_fields.is_empty() {
            return Value::Object(body);
        }
        let body = Value::Object(body);
        let at = |path: &String| {
            let value = path.split('/').try_fold(&body, |value, name| value.as_object()?.get(name))?;
            Some((path.clone(), value.clone()))
        };
        Value::Object(self.response_fields.iter().filter_map(at).collect())
    }
}

/// `stop_type` and `stopping_word`.
fn stop_type(finish: Option<&Finish>) -> (&'static str, &str) {
    match finish {
        None => ("none", ""),
        Some(Finish { stop: Some(Stop::Text(word)), .. }) => ("word", word),
        Some(Finish { reason: "length", .. }) => ("limit", ""),
        Some(_) => ("eos", ""),
    }
}
