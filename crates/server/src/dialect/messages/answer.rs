//! Anthropic's answer to a message: as one object, or as the events of a stream in their order.
//!
//! `message_start`; then for each block `content_block_start`, `content_block_delta`s, `content_block_stop`; then
//! `message_delta` with the reason of the end, and `message_stop`. A `ping` follows the start of the first block.

use serde_json::{Value, json};

use crate::Delta;
use crate::answer::{Shape, Usage};
use crate::choice::{Finish, Stop};
use crate::dialect::blocks::{Block, Blocks, Step};

/// Writes the answer as it comes.
#[derive(Default)]
pub(crate) struct MessageWriter {
    blocks: Blocks,
    usage: Usage,
    finish: Option<Finish>,
    started: bool,
}

impl MessageWriter {
    /// The events of a delta.
    pub(crate) fn write(&mut self, shape: &Shape, delta: &Delta) -> Vec<Value> {
        let mut events = Vec::new();
        let steps = self.take(delta);
        // The first delta says how much of the prompt was cached, which the start tells.
        if !std::mem::replace(&mut self.started, true) {
            let message = self.message(shape, &[]);
            events.push(json!({"type": "message_start", "message": message}));
        }
        events.extend(steps.iter().flat_map(|step| self.events(step)));
        events
    }

    /// The events of the end.
    pub(crate) fn finish(&mut self, shape: &Shape) -> Vec<Value> {
        let mut events: Vec<Value> = self.blocks.finish().iter().flat_map(|step| self.events(step)).collect();
        let (reason, sequence) = stop_reason(self.finish.as_ref());
        let usage = usage_json(self.usage, shape);
        events.push(json!({"type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence}, "usage": usage}));
        events.push(json!({"type": "message_stop"}));
        events
    }

    /// Takes a delta in without events.
    pub(crate) fn collect(&mut self, delta: &Delta) {
        self.take(delta);
    }

    /// The whole message.
    pub(crate) fn into_json(self, shape: &Shape) -> Value {
        let content: Vec<Value> = self.blocks.row().iter().map(whole_block).collect();
        self.message(shape, &content)
    }

    fn take(&mut self, delta: &Delta) -> Vec<Step> {
        self.usage.add(delta);
        self.finish = self.finish.take().or_else(|| delta.finish.clone());
        self.blocks.push(delta)
    }

    fn message(&self, shape: &Shape, content: &[Value]) -> Value {
        let (reason, sequence) = stop_reason(self.finish.as_ref());
        json!({
            "id": shape.id,
            "type": "message",
            "role": "assistant",
            "model": shape.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage_json(self.usage, shape),
        })
    }

    fn events(&self, step: &Step) -> Vec<Value> {
        match step {
            Step::Begin(index) => {
                let block = self.blocks.row().get(*index).map(empty_block);
                let start = json!({"type": "content_block_start", "index": index, "content_block": block});
                std::iter::once(start).chain((*index == 0).then(|| json!({"type": "ping"}))).collect()
            }
            Step::Grow(index, text) => {
                let delta = match self.blocks.row().get(*index) {
                    Some(Block::Reasoning(_)) => json!({"type": "thinking_delta", "thinking": text}),
                    Some(Block::Call { .. }) => json!({"type": "input_json_delta", "partial_json": text}),
                    Some(Block::Text(_)) | None => json!({"type": "text_delta", "text": text}),
                };
                vec![json!({"type": "content_block_delta", "index": index, "delta": delta})]
            }
            Step::End(index) => {
                let mut events = Vec::new();
                if let Some(Block::Reasoning(_)) = self.blocks.row().get(*index) {
                    let delta = json!({"type": "signature_delta", "signature": ""});
                    events.push(json!({"type": "content_block_delta", "index": index, "delta": delta}));
                }
                events.push(json!({"type": "content_block_stop", "index": index}));
                events
            }
        }
    }
}

/// `stop_reason` and `stop_sequence`; null until the end.
fn stop_reason(finish: Option<&Finish>) -> (Option<&'static str>, Option<&str>) {
    let Some(finish) = finish else { return (None, None) };
    match (finish.reason, &finish.stop) {
        ("length", _) => (Some("max_tokens"), None),
        ("tool_calls", _) => (Some("tool_use"), None),
        (_, Some(Stop::Text(text))) => (Some("stop_sequence"), Some(text)),
        _ => (Some("end_turn"), None),
    }
}

/// Tokens read from the cache are not among the input tokens here. Nothing is billed for writing it.
fn usage_json(usage: Usage, shape: &Shape) -> Value {
    json!({
        "input_tokens": shape.num_prompt_tokens().saturating_sub(usage.num_cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached,
        "output_tokens": usage.num_completion,
    })
}

/// Thoughts are not signed: they are in plain view, and are taken back without a signature.
fn empty_block(block: &Block) -> Value {
    match block {
        Block::Reasoning(_) => json!({"type": "thinking", "thinking": "", "signature": ""}),
        Block::Text(_) => json!({"type": "text", "text": ""}),
        Block::Call { start, .. } => {
            json!({"type": "tool_use", "id": start.id, "name": start.name, "input": {}})
        }
    }
}

fn whole_block(block: &Block) -> Value {
    let mut json = empty_block(block);
    match block {
        Block::Reasoning(text) => json["thinking"] = json!(text),
        Block::Text(text) => json["text"] = json!(text),
        Block::Call { arguments, .. } => {
            // The input has to be an object: what the model wrote instead is kept in one.
            json["input"] = match serde_json::from_str(arguments) {
                Ok(input @ Value::Object(_)) => input,
                _ if arguments.trim().is_empty() => json!({}),
                _ => json!({"unreadable": arguments}),
            };
        }
    }
    json
}
