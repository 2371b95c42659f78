//! Chunks of streamed answers. The words are vLLM's: role first, then text, then `finish_reason`, then usage.

use serde_json::{Map, Value, json};

use crate::Delta;
use crate::answer::{Shape, add_echo_logprobs, put_finish, usage};
use crate::fields::Endpoint;
use crate::logprobs::CompletionLogprobs;

/// What has been written of each choice.
pub(crate) struct ChunkWriter {
    choices: Vec<Written>,
}

#[derive(Default, Clone)]
struct Written {
    started: bool,
    num_tokens: usize,
    num_cached_tokens: usize,
    /// Characters of tokens, for `text_offset`.
    offset: usize,
}

impl ChunkWriter {
    pub(crate) fn new(shape: &Shape) -> Self {
        Self { choices: vec![Written::default(); shape.num_choices()] }
    }

    /// The chunks of one delta: none while there is nothing to show.
    pub(crate) fn write(&mut self, shape: &Shape, delta: &Delta) -> Vec<Value> {
        let written = &mut self.choices[delta.choice];
        written.num_tokens += delta.tokens.len();
        if let Some(prompt) = &delta.prompt {
            written.num_cached_tokens = prompt.num_cached_tokens;
        }
        match shape.endpoint {
            Endpoint::Chat => written.chat(shape, delta),
            Endpoint::Completions => written.completion(shape, delta).into_iter().collect(),
        }
    }

    /// The last chunk, if it was asked for: no choices, the usage of all.
    pub(crate) fn usage(&self, shape: &Shape) -> Option<Value> {
        if !shape.stream.include_usage {
            return None;
        }
        let num_tokens = self.choices.iter().map(|choice| choice.num_tokens).sum();
        let num_cached = self.choices.iter().step_by(shape.n).map(|choice| choice.num_cached_tokens).sum();
        let mut chunk = shape.head(object(shape));
        chunk.insert("choices".into(), json!([]));
        chunk.insert("usage".into(), usage(shape.num_prompt_tokens(), num_tokens, num_cached));
        Some(Value::Object(chunk))
    }
}

fn object(shape: &Shape) -> &'static str {
    match shape.endpoint {
        Endpoint::Chat => "chat.completion.chunk",
        Endpoint::Completions => "text_completion",
    }
}

/// Whether a delta has anything that its reader asked for.
fn is_visible(shape: &Shape, delta: &Delta) -> bool {
    let tokens =
        !delta.tokens.is_empty() && (shape.output.return_token_ids || shape.output.logprobs.is_some());
    !delta.text.is_empty() || delta.finish.is_some() || tokens
}

impl Written {
    fn chat(&mut self, shape: &Shape, delta: &Delta) -> Vec<Value> {
        if !is_visible(shape, delta) {
            return Vec::new();
        }
        let mut chunks = Vec::new();
        if !std::mem::replace(&mut self.started, true) {
            let choice = json!({"index": delta.choice, "delta": {"role": "assistant", "content": ""},
                "logprobs": null, "finish_reason": null});
            let mut chunk = self.chunk(shape, delta.choice, choice);
            if shape.output.return_token_ids {
                chunk.insert("prompt_token_ids".into(), json!(&shape.prompt(delta.choice).tokens[..]));
            }
            chunks.push(Value::Object(chunk));
        }
        let content = match delta.text.is_empty() && delta.tokens.is_empty() {
            true => json!({}),
            false => json!({"content": delta.text}),
        };
        let logprobs = shape.output.logprobs.filter(|_| !delta.logprobs.is_empty());
        let logprobs = logprobs.map(|count| shape.names().chat(&delta.logprobs, count));
        let mut choice = json!({"index": delta.choice, "delta": content, "logprobs": logprobs});
        put_finish(&mut choice, delta.finish.as_ref());
        if shape.output.return_token_ids {
            choice["token_ids"] = json!(delta.tokens);
        }
        chunks.push(Value::Object(self.chunk(shape, delta.choice, choice)));
        chunks
    }

    fn completion(&mut self, shape: &Shape, delta: &Delta) -> Option<Value> {
        let prompt = shape.prompt(delta.choice);
        let echoes = shape.output.echo && delta.prompt.is_some();
        if !echoes && !is_visible(shape, delta) {
            return None;
        }
        let logprobs = shape.output.logprobs.filter(|_| echoes || !delta.logprobs.is_empty()).map(|count| {
            let mut logprobs = CompletionLogprobs::new(shape.names(), count).after(self.offset);
            add_echo_logprobs(&mut logprobs, shape, delta);
            logprobs.add(&delta.logprobs);
            self.offset = logprobs.offset();
            logprobs.into_json()
        });
        let echo = if echoes { prompt.echo.as_str() } else { "" };
        let mut choice =
            json!({"index": delta.choice, "text": format!("{echo}{}", delta.text), "logprobs": logprobs});
        put_finish(&mut choice, delta.finish.as_ref());
        if shape.output.return_token_ids {
            choice["token_ids"] = json!(delta.tokens);
            if !std::mem::replace(&mut self.started, true) {
                choice["prompt_token_ids"] = json!(&prompt.tokens[..]);
            }
        }
        Some(Value::Object(self.chunk(shape, delta.choice, choice)))
    }

    fn chunk(&self, shape: &Shape, choice: usize, json: Value) -> Map<String, Value> {
        let mut chunk = shape.head(object(shape));
        chunk.insert("choices".into(), Value::Array(vec![json]));
        if shape.stream.continuous_usage {
            let num_prompt_tokens = shape.prompt(choice).tokens.len();
            chunk.insert("usage".into(), usage(num_prompt_tokens, self.num_tokens, self.num_cached_tokens));
        }
        chunk
    }
}
