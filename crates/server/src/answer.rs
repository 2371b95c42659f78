//! Bodies of whole answers, and the parts that chunks share with them: heads, usage, endings.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value, json};
use spark_api::TokenId;
use spark_text::Tokenizer;

use crate::Delta;
use crate::choice::{Finish, PromptReport, Stop};
use crate::dialect::Form;
use crate::generation::PromptInfo;
use crate::logprobs::{CompletionLogprobs, TokenNames};
use crate::params::{OutputParams, StreamParams};
use crate::parts::ToolCallStart;
use crate::timings::Timings;

/// `system_fingerprint`: the program that answered.
pub(crate) const FINGERPRINT: &str = concat!("spark-engine-", env!("CARGO_PKG_VERSION"));

/// What stays the same over an answer.
pub(crate) struct Shape {
    pub(crate) form: Form,
    /// What the client, or the server, calls the request.
    pub(crate) request_id: String,
    /// Of the answer.
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) model: String,
    /// When the request arrived.
    pub(crate) arrived: Instant,
    pub(crate) prompts: Vec<PromptInfo>,
    /// With which each choice is drawn.
    pub(crate) seeds: Vec<u64>,
    /// Choices per prompt.
    pub(crate) n: usize,
    /// Whether reasoning is looked for, and its tokens counted.
    pub(crate) reasons: bool,
    pub(crate) output: OutputParams,
    pub(crate) stream: StreamParams,
    pub(crate) tokenizer: Arc<Tokenizer>,
}

impl Shape {
    pub(crate) fn num_choices(&self) -> usize {
        self.prompts.len() * self.n
    }

    pub(crate) fn num_prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.tokens.len()).sum()
    }

    /// The prompt of a choice.
    pub(crate) fn prompt(&self, choice: usize) -> &PromptInfo {
        &self.prompts[choice / self.n]
    }

    /// The ids of a prompt, where they were asked for.
    fn prompt_ids<'a>(&self, prompt: &'a PromptInfo) -> Option<&'a [TokenId]> {
        self.output.return_token_ids.then_some(&prompt.tokens[..])
    }

    pub(crate) fn names(&self) -> TokenNames<'_> {
        TokenNames { tokenizer: &self.tokenizer, as_ids: self.output.tokens_as_ids }
    }

    /// The fields that every body of this answer begins with.
    pub(crate) fn head(&self, object: &str) -> Map<String, Value> {
        let mut head = Map::new();
        head.insert("id".into(), json!(self.id));
        head.insert("object".into(), json!(object));
        head.insert("created".into(), json!(self.created));
        head.insert("model".into(), json!(self.model));
        head.insert("system_fingerprint".into(), json!(FINGERPRINT));
        head
    }
}

/// What an answer has cost, in tokens.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    pub(crate) num_prompt: usize,
    pub(crate) num_completion: usize,
    pub(crate) num_cached: usize,
    /// Of the completion's.
    pub(crate) num_reasoning: usize,
}

impl Usage {
    /// Counts a delta of the only choice.
    pub(crate) fn add(&mut self, delta: &Delta) {
        self.num_completion += delta.tokens.len();
        self.num_reasoning += delta.num_reasoning_tokens;
        if let Some(prompt) = &delta.prompt {
            self.num_cached = prompt.num_cached_tokens;
        }
    }

    /// The `usage` object.
    pub(crate) fn into_json(self, shape: &Shape) -> Value {
        let mut usage = json!({
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_completion,
            "total_tokens": self.num_prompt + self.num_completion,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        });
        if shape.reasons {
            usage["completion_tokens_details"] = json!({"reasoning_tokens": self.num_reasoning});
        }
        usage
    }
}

/// One entry of `tool_calls`, whole or the beginning of a streamed one.
pub(crate) fn tool_call(start: &ToolCallStart, arguments: &str) -> Value {
    json!({"id": start.id, "type": "function", "function": {"name": start.name, "arguments": arguments}})
}

/// Reasoning under vLLM's name and under the one it had before, which most clients read.
pub(crate) fn put_reasoning(message: &mut Value, reasoning: &str) {
    message["reasoning"] = json!(reasoning);
    message["reasoning_content"] = json!(reasoning);
}

/// The `message` of a choice.
fn message(choice: &Delta) -> Value {
    let has_parts = !choice.tool_calls.is_empty() || !choice.reasoning.is_empty();
    let content = (!choice.text.is_empty() || !has_parts).then_some(&choice.text);
    let mut message = json!({"role": "assistant", "content": content});
    if !choice.reasoning.is_empty() {
        put_reasoning(&mut message, &choice.reasoning);
    }
    let mut calls: Vec<(&ToolCallStart, String)> = Vec::new();
    for delta in &choice.tool_calls {
        if let Some(start) = &delta.start {
            calls.push((start, String::new()));
        }
        if let Some((_, arguments)) = calls.last_mut() {
            arguments.push_str(&delta.arguments);
        }
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.iter().map(|(start, arguments)| tool_call(start, arguments)).collect();
    }
    message
}

/// `finish_reason` and `stop_reason`, null until the end.
pub(crate) fn put_finish(choice: &mut Value, finish: Option<&Finish>) {
    choice["finish_reason"] = json!(finish.map(|finish| finish.reason));
    choice["stop_reason"] = match finish.and_then(|finish| finish.stop.as_ref()) {
        None => Value::Null,
        Some(Stop::Token(id)) => json!(id),
        Some(Stop::Text(text)) => json!(text),
    };
}

/// What the answer says of its own time, where it has one choice: several share what they took.
pub(crate) fn put_timings(body: &mut Map<String, Value>, shape: &Shape, timings: Option<Timings>) {
    let Some(timings) = timings.filter(|_| shape.num_choices() == 1) else { return };
    body.insert("timings".into(), timings.llama());
    if shape.output.metrics {
        body.insert("metrics".into(), timings.vllm());
    }
}

/// The deltas of all choices, joined.
pub(crate) struct Answer(Vec<Delta>);

impl Answer {
    pub(crate) fn new(num_choices: usize) -> Self {
        Self((0..num_choices).map(|choice| Delta { choice, ..Delta::default() }).collect())
    }

    pub(crate) fn add(&mut self, delta: Delta) {
        let whole = &mut self.0[delta.choice];
        whole.text.push_str(&delta.text);
        whole.reasoning.push_str(&delta.reasoning);
        whole.tool_calls.extend(delta.tool_calls);
        whole.num_reasoning_tokens += delta.num_reasoning_tokens;
        whole.tokens.extend(delta.tokens);
        whole.logprobs.extend(delta.logprobs);
        whole.prompt = whole.prompt.take().or(delta.prompt);
        whole.timings = delta.timings.or(whole.timings);
        whole.finish = whole.finish.take().or(delta.finish);
    }

    /// The joined deltas, one a choice.
    pub(crate) fn into_choices(self) -> Vec<Delta> {
        self.0
    }

    pub(crate) fn into_json(self, shape: &Shape) -> Value {
        let num_tokens = self.0.iter().map(|choice| choice.tokens.len()).sum();
        let num_cached =
            cached_tokens(self.0.iter().step_by(shape.n).filter_map(|choice| choice.prompt.as_ref()));
        let usage = Usage {
            num_prompt: shape.num_prompt_tokens(),
            num_completion: num_tokens,
            num_cached,
            num_reasoning: self.0.iter().map(|choice| choice.num_reasoning_tokens).sum(),
        };
        let usage = usage.into_json(shape);
        let timings = self.0.first().and_then(|choice| choice.timings);
        let mut body = match shape.form.is_chat() {
            true => self.into_chat(shape, usage),
            false => self.into_completion(shape, usage),
        };
        put_timings(&mut body, shape, timings);
        Value::Object(body)
    }

    fn into_chat(self, shape: &Shape, usage: Value) -> Map<String, Value> {
        let mut body = shape.head("chat.completion");
        let names = shape.names();
        let is_batch = matches!(shape.form, Form::Batch);
        let first = self.0.first().filter(|_| !is_batch);
        let of_first = first.and_then(|choice| prompt_logprobs(shape, choice));
        let choices = self.0.into_iter().map(|choice| {
            let mut json = json!({
                "index": choice.choice,
                "message": message(&choice),
                "logprobs": shape.output.logprobs.map(|count| names.chat(&choice.logprobs, count)),
            });
            put_finish(&mut json, choice.finish.as_ref());
            json["token_ids"] = json!(shape.output.return_token_ids.then_some(&choice.tokens));
            if is_batch {
                // Each choice has a prompt of its own.
                json["prompt_logprobs"] = json!(prompt_logprobs(shape, &choice));
                json["prompt_token_ids"] = json!(shape.prompt_ids(shape.prompt(choice.choice)));
            }
            json
        });
        body.insert("choices".into(), Value::Array(choices.collect()));
        body.insert("usage".into(), usage);
        // Null where they were not asked for, as in vLLM: its clients read them without asking whether they are there.
        body.insert("prompt_logprobs".into(), json!(of_first));
        let prompt_ids =
            shape.prompts.first().filter(|_| !is_batch).and_then(|prompt| shape.prompt_ids(prompt));
        body.insert("prompt_token_ids".into(), json!(prompt_ids));
        body
    }

    fn into_completion(self, shape: &Shape, usage: Value) -> Map<String, Value> {
        let mut body = shape.head("text_completion");
        let choices = self.0.iter().map(|choice| {
            let prompt = shape.prompt(choice.choice);
            let logprobs = shape.output.logprobs.map(|count| {
                let mut logprobs = CompletionLogprobs::new(shape.names(), count);
                add_echo_logprobs(&mut logprobs, shape, choice);
                logprobs.add(&choice.logprobs);
                logprobs.into_json()
            });
            let mut json = json!({
                "index": choice.choice,
                "text": format!("{}{}", prompt.echo, choice.text),
                "logprobs": logprobs,
            });
            put_finish(&mut json, choice.finish.as_ref());
            json["prompt_logprobs"] = json!(prompt_logprobs(shape, choice));
            json["token_ids"] = json!(shape.output.return_token_ids.then_some(&choice.tokens));
            json["prompt_token_ids"] = json!(shape.prompt_ids(prompt));
            json
        });
        body.insert("choices".into(), Value::Array(choices.collect()));
        body.insert("usage".into(), usage);
        body
    }
}

/// Cached tokens over the reports of distinct prompts.
pub(crate) fn cached_tokens<'a>(reports: impl Iterator<Item = &'a PromptReport>) -> usize {
    reports.map(|report| report.num_cached_tokens).sum()
}

/// The echoed prompt's part of a completion's log-probabilities.
pub(crate) fn add_echo_logprobs(logprobs: &mut CompletionLogprobs<'_>, shape: &Shape, delta: &Delta) {
    if !shape.output.echo {
        return;
    }
    if let Some(report) = delta.prompt.as_ref().and_then(|prompt| prompt.logprobs.as_ref()) {
        logprobs.add_prompt(&shape.prompt(delta.choice).tokens, report);
    }
}

/// vLLM's `prompt_logprobs`: null, then one object per prompt token, by token id.
fn prompt_logprobs(shape: &Shape, choice: &Delta) -> Option<Value> {
    let count = shape.output.prompt_logprobs?;
    let report = choice.prompt.as_ref()?.logprobs.as_ref()?;
    Some(shape.names().by_id(report, count))
}
