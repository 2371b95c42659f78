//! Chunks of streamed answers. The words are vLLM's: role first, then text, then `finish_reason`, then usage. A tool call
//! is OpenAI's: its id and name first, then its arguments, piece by piece.

use serde_json::{Map, Value, json};

use crate::Delta;
use crate::answer::{Shape, Usage, add_echo_logprobs, put_finish, put_reasoning, put_timings, tool_call};
use crate::logprobs::CompletionLogprobs;
use crate::progress::PromptProgress;
use crate::timings::Timings;

/// What has been written of each choice.
pub(crate) struct ChunkWriter {
    choices: Vec<Written>,
}

#[derive(Default, Clone)]
struct Written {
    started: bool,
    num_tokens: usize,
    num_reasoning_tokens: usize,
    num_cached_tokens: usize,
    timings: Option<Timings>,
    progress: PromptProgress,
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
        written.num_reasoning_tokens += delta.num_reasoning_tokens;
        written.timings = delta.timings.or(written.timings);
        if let Some(prompt) = &delta.prompt {
            written.num_cached_tokens = prompt.num_cached_tokens;
        }
        let mut chunks: Vec<Value> = written.progress(shape, delta).into_iter().collect();
        match shape.form.is_chat() {
            true => chunks.extend(written.chat(shape, delta)),
            false => chunks.extend(written.completion(shape, delta)),
        }
        chunks
    }

    /// The last chunk, if it was asked for: no choices, the usage of all.
    pub(crate) fn usage(&self, shape: &Shape) -> Option<Value> {
        if !shape.stream.include_usage {
            return None;
        }
        let usage = Usage {
            num_prompt: shape.num_prompt_tokens(),
            num_completion: self.choices.iter().map(|choice| choice.num_tokens).sum(),
            num_cached: self.choices.iter().step_by(shape.n).map(|choice| choice.num_cached_tokens).sum(),
            num_reasoning: self.choices.iter().map(|choice| choice.num_reasoning_tokens).sum(),
        };
        let mut chunk = shape.head(object(shape));
        chunk.insert("choices".into(), json!([]));
        chunk.insert("usage".into(), usage.into_json(shape));
        put_timings(&mut chunk, shape, self.choices.first().and_then(|choice| choice.timings));
        Some(Value::Object(chunk))
    }
}

fn object(shape: &Shape) -> &'static str {
    if shape.form.is_chat() { "chat.completion.chunk" } else { "text_completion" }
}

/// Whether a delta has anything that its reader asked for.
fn is_visible(shape: &Shape, delta: &Delta) -> bool {
    let tokens =
        !delta.tokens.is_empty() && (shape.output.return_token_ids || shape.output.logprobs.is_some());
    let parts = !delta.text.is_empty() || !delta.reasoning.is_empty() || !delta.tool_calls.is_empty();
    parts || delta.finish.is_some() || tokens
}

/// The `delta` objects of one delta, one per part; at least one.
fn parts(delta: &Delta) -> Vec<Value> {
    let mut parts = Vec::new();
    if !delta.reasoning.is_empty() {
        let mut part = json!({});
        put_reasoning(&mut part, &delta.reasoning);
        parts.push(part);
    }
    if !delta.text.is_empty() {
        parts.push(json!({"content": delta.text}));
    }
    for call in &delta.tool_calls {
        let mut entry = match &call.start {
            Some(start) => tool_call(start, &call.arguments),
            None => json!({"function": {"arguments": call.arguments}}),
        };
        entry["index"] = json!(call.index);
        parts.push(json!({"tool_calls": [entry]}));
    }
    if parts.is_empty() {
        // A token without text says so; an ending without a token says nothing.
        parts.push(if delta.tokens.is_empty() { json!({}) } else { json!({"content": ""}) });
    }
    parts
}

impl Written {
    /// llama-server's `prompt_progress`, in a chunk of its own.
    fn progress(&mut self, shape: &Shape, delta: &Delta) -> Option<Value> {
        let progress = self.progress.report(shape, delta)?;
        self.num_cached_tokens = progress.num_cached;
        let choice = match shape.form.is_chat() {
            true => json!({"index": delta.choice, "delta": {"role": "assistant", "content": null},
                "logprobs": null, "finish_reason": null}),
            false => json!({"index": delta.choice, "text": "", "logprobs": null, "finish_reason": null}),
        };
        let mut chunk = self.chunk(shape, delta.choice, choice);
        chunk.insert("prompt_progress".into(), progress.to_json());
        Some(Value::Object(chunk))
    }

    fn chat(&mut self, shape: &Shape, delta: &Delta) -> Vec<Value> {
        if !is_visible(shape, delta) {
            return Vec::new();
        }
        let mut chunks = Vec::new();
        if !std::mem::replace(&mut self.started, true) {
            let choice = json!({"index": delta.choice, "delta": {"role": "assistant", "content": ""},
                "logprobs": null, "finish_reason": null});
            // It says who speaks, before the first token: its usage counts none, as vLLM's.
            let silent = Self { num_tokens: 0, num_reasoning_tokens: 0, ..self.clone() };
            let mut chunk = silent.chunk(shape, delta.choice, choice);
            if shape.output.return_token_ids {
                chunk.insert("prompt_token_ids".into(), json!(&shape.prompt(delta.choice).tokens[..]));
            }
            chunks.push(Value::Object(chunk));
        }
        let logprobs = shape.output.logprobs.filter(|_| !delta.logprobs.is_empty());
        let mut logprobs = logprobs.map(|count| shape.names().chat(&delta.logprobs, count));
        let mut tokens = &delta.tokens[..];
        let mut parts = parts(delta).into_iter().peekable();
        while let Some(part) = parts.next() {
            // What is said about the tokens comes with the first part, the end with the last.
            let mut choice = json!({"index": delta.choice, "delta": part, "logprobs": logprobs.take()});
            put_finish(&mut choice, delta.finish.as_ref().filter(|_| parts.peek().is_none()));
            if shape.output.return_token_ids {
                choice["token_ids"] = json!(std::mem::take(&mut tokens));
            }
            let mut chunk = self.chunk(shape, delta.choice, choice);
            if parts.peek().is_none() {
                self.put_timings(shape, delta, &mut chunk);
            }
            chunks.push(Value::Object(chunk));
        }
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
        let mut chunk = self.chunk(shape, delta.choice, choice);
        self.put_timings(shape, delta, &mut chunk);
        Some(Value::Object(chunk))
    }

    /// With the last chunk all of it, as in a body; with every token what `timings_per_token` asks for.
    fn put_timings(&self, shape: &Shape, delta: &Delta, chunk: &mut Map<String, Value>) {
        if delta.finish.is_some() && !shape.stream.include_usage {
            put_timings(chunk, shape, self.timings);
        } else if let Some(timings) = delta.timings.filter(|_| shape.stream.timings) {
            chunk.insert("timings".into(), timings.llama());
        }
    }

    fn chunk(&self, shape: &Shape, choice: usize, json: Value) -> Map<String, Value> {
        let mut chunk = shape.head(object(shape));
        chunk.insert("choices".into(), Value::Array(vec![json]));
        if shape.stream.continuous_usage {
            let usage = Usage {
                num_prompt: shape.prompt(choice).tokens.len(),
                num_completion: self.num_tokens,
                num_cached: self.num_cached_tokens,
                num_reasoning: self.num_reasoning_tokens,
            };
            chunk.insert("usage".into(), usage.into_json(shape));
        }
        chunk
    }
}
