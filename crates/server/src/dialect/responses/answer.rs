//! A response as it comes: its items, and the events of a stream in OpenAI's order.
//!
//! `response.created`, `response.in_progress`; for each item `response.output_item.added`, what it is made of, and
//! `response.output_item.done`; then `response.completed`, `.incomplete` or `.failed` with the whole object.

use serde_json::{Map, Value, json};
use spark_api::TokenLogprobs;

use super::object::{ResponseHead, failure_json, response_json, usage_json};
use crate::answer::{Shape, Usage, tool_call};
use crate::choice::Finish;
use crate::dialect::Form;
use crate::dialect::blocks::{Block, Blocks, Step};
use crate::ids::random_id;
use crate::{ApiError, Delta};

/// Writes the response.
#[derive(Default)]
pub(crate) struct ResponseWriter {
    blocks: Blocks,
    /// Of the items, one a block: their random parts.
    ids: Vec<String>,
    /// Of the blocks: what is known of the tokens of a text.
    logprobs: Vec<Vec<Value>>,
    /// Of tokens whose text has not come yet.
    pending: Vec<TokenLogprobs>,
    usage: Usage,
    finish: Option<Finish>,
    started: bool,
    /// Whether the engine has begun with it.
    begun: bool,
    num_events: u64,
}

impl ResponseWriter {
    /// The events of a delta.
    pub(crate) fn write(&mut self, shape: &Shape, delta: &Delta) -> Vec<Value> {
        let mut events = self.start(shape);
        for (step, logprobs) in self.take(shape, delta) {
            self.push_events(&step, &logprobs, &mut events);
        }
        events
    }

    /// The events of the end.
    pub(crate) fn finish(&mut self, shape: &Shape) -> Vec<Value> {
        let mut events = Vec::new();
        if let Some(step) = self.blocks.finish() {
            self.push_events(&step, &[], &mut events);
        }
        let response = self.ended(shape);
        let kind = format!("response.{}", response["status"].as_str().unwrap_or("completed"));
        self.push(&mut events, &kind, json!({"response": response}));
        events
    }

    /// The events of an answer that breaks off.
    pub(crate) fn fail(&mut self, shape: &Shape, error: &ApiError) -> Vec<Value> {
        let mut events = self.start(shape);
        let response = self.keep_failure(shape, error);
        self.push(&mut events, "response.failed", json!({"response": response}));
        events
    }

    /// Takes a delta in without events.
    pub(crate) fn collect(&mut self, shape: &Shape, delta: &Delta) {
        self.take(shape, delta);
    }

    /// The whole response, which is also stored if it should be.
    pub(crate) fn into_json(mut self, shape: &Shape) -> Value {
        self.ended(shape)
    }

    /// The object of a response that breaks off; one that others may ask for is stored.
    pub(crate) fn keep_failure(&mut self, shape: &Shape, error: &ApiError) -> Value {
        let Form::Response(head) = &shape.form else { return Value::Null };
        let mut response = response_json(shape, head, "failed", &self.items("incomplete"));
        response["error"] = failure_json(error);
        if let Some((store, _)) = &head.keep {
            store.put(&shape.id, response.clone(), head.input.clone(), None);
        }
        response
    }

    fn start(&mut self, shape: &Shape) -> Vec<Value> {
        let mut events = Vec::new();
        if let (false, Form::Response(head)) = (std::mem::replace(&mut self.started, true), &shape.form) {
            let response = response_json(shape, head, "in_progress", &[]);
            self.push(&mut events, "response.created", json!({"response": response.clone()}));
            self.push(&mut events, "response.in_progress", json!({"response": response}));
        }
        events
    }

    /// The steps of a delta, each with the log-probabilities of its text.
    fn take(&mut self, shape: &Shape, delta: &Delta) -> Vec<(Step, Vec<Value>)> {
        if let (false, Form::Response(head)) = (std::mem::replace(&mut self.begun, true), &shape.form)
            && let Some((store, _)) = head.keep.as_ref().filter(|_| head.is_background)
        {
            store.begin(&shape.id);
        }
        self.usage.num_prompt = shape.num_prompt_tokens();
        self.usage.add(delta);
        self.finish = self.finish.take().or_else(|| delta.finish.clone());
        self.pending.extend(delta.logprobs.iter().cloned());
        let steps = self.blocks.push(delta);
        steps.into_iter().map(|step| self.with_logprobs(shape, step)).collect()
    }

    fn with_logprobs(&mut self, shape: &Shape, step: Step) -> (Step, Vec<Value>) {
        let index = match &step {
            Step::Begin(_) => {
                self.ids.push(random_id());
                self.logprobs.push(Vec::new());
                return (step, Vec::new());
            }
            Step::Grow(index, _) => *index,
            Step::End(_) => return (step, Vec::new()),
        };
        let pending = std::mem::take(&mut self.pending);
        let is_text = matches!(self.blocks.row().get(index), Some(Block::Text(_)));
        let logprobs = match (shape.output.logprobs, shape.names()) {
            (Some(count), names) if is_text => match names.chat(&pending, count)["content"].take() {
                Value::Array(entries) => entries,
                _ => Vec::new(),
            },
            _ => Vec::new(),
        };
        if let Some(all) = self.logprobs.get_mut(index) {
            all.extend(logprobs.iter().cloned());
        }
        (step, logprobs)
    }

    /// The object at the end; stores it.
    fn ended(&mut self, shape: &Shape) -> Value {
        let Form::Response(head) = &shape.form else { return Value::Null };
        let is_cut = self.finish.as_ref().is_some_and(|finish| finish.reason == "length");
        let mut items = self.items("completed");
        // The end cut what came last.
        if let (true, Some(last)) = (is_cut, items.last_mut()) {
            last["status"] = json!("incomplete");
        }
        let status = if is_cut { "incomplete" } else { "completed" };
        let mut response = response_json(shape, head, status, &items);
        response["usage"] = usage_json(self.usage, shape);
        self.keep(shape, head, &response);
        response
    }

    fn keep(&self, shape: &Shape, head: &ResponseHead, response: &Value) {
        if let Some((store, history)) = &head.keep {
            let mut conversation = history.clone();
            conversation.push(self.turn());
            store.put(&shape.id, response.clone(), head.input.clone(), Some(conversation));
        }
    }

    /// The answer as a message of a chat, for the conversation to go on from.
    fn turn(&self) -> Value {
        let (mut text, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
        for block in self.blocks.row() {
            match block {
                Block::Reasoning(piece) => reasoning.push_str(piece),
                Block::Text(piece) => text.push_str(piece),
                Block::Call { start, arguments } => {
                    // What is not JSON cannot be told to the model as a call again.
                    let is_json = serde_json::from_str::<Map<String, Value>>(arguments).is_ok();
                    calls.push(tool_call(start, if is_json { arguments } else { "{}" }));
                }
            }
        }
        let mut turn = json!({"role": "assistant", "content": text});
        if !reasoning.is_empty() {
            turn["reasoning"] = json!(reasoning);
        }
        if !calls.is_empty() {
            turn["tool_calls"] = Value::Array(calls);
        }
        turn
    }

    fn items(&self, status: &str) -> Vec<Value> {
        (0..self.blocks.row().len()).map(|index| self.item(index, status)).collect()
    }

    fn item_id(&self, index: usize) -> String {
        let prefix = match self.blocks.row().get(index) {
            Some(Block::Reasoning(_)) => "rs",
            Some(Block::Call { .. }) => "fc",
            Some(Block::Text(_)) | None => "msg",
        };
        format!("{prefix}_{}", self.ids.get(index).map_or("", String::as_str))
    }

    /// An item with all that is known of it.
    fn item(&self, index: usize, status: &str) -> Value {
        let id = self.item_id(index);
        let content = self.part(index).into_iter().collect::<Vec<_>>();
        match self.blocks.row().get(index) {
            Some(Block::Reasoning(_)) => {
                json!({"id": id, "type": "reasoning", "summary": [], "content": content,
                    "encrypted_content": null, "status": status})
            }
            Some(Block::Call { start, arguments }) => {
                json!({"id": id, "type": "function_call", "call_id": start.id, "name": start.name,
                    "arguments": arguments, "status": status})
            }
            Some(Block::Text(_)) | None => {
                json!({"id": id, "type": "message", "role": "assistant", "content": content, "status": status})
            }
        }
    }

    /// The one part of an item; a call has none.
    fn part(&self, index: usize) -> Option<Value> {
        match self.blocks.row().get(index)? {
            Block::Reasoning(text) => Some(json!({"type": "reasoning_text", "text": text})),
            Block::Text(text) => Some(json!({"type": "output_text", "text": text, "annotations": [],
                "logprobs": self.logprobs.get(index)})),
            Block::Call { .. } => None,
        }
    }

    fn push(&mut self, events: &mut Vec<Value>, kind: &str, fields: Value) {
        let mut event = json!({"type": kind, "sequence_number": self.num_events});
        if let (Value::Object(event), Value::Object(fields)) = (&mut event, fields) {
            event.extend(fields);
        }
        self.num_events += 1;
        events.push(event);
    }

    fn push_events(&mut self, step: &Step, logprobs: &[Value], events: &mut Vec<Value>) {
        match step {
            Step::Begin(index) => self.push_begin(*index, events),
            Step::Grow(index, text) => {
                let mut fields = self.place(*index);
                fields["delta"] = json!(text);
                let kind = match self.blocks.row().get(*index) {
                    Some(Block::Reasoning(_)) => "response.reasoning_text.delta",
                    Some(Block::Call { .. }) => "response.function_call_arguments.delta",
                    Some(Block::Text(_)) | None => {
                        fields["logprobs"] = json!(logprobs);
                        "response.output_text.delta"
                    }
                };
                self.push(events, kind, fields);
            }
            Step::End(index) => self.push_end(*index, events),
        }
    }

    /// Which item, and which part of it, if it has parts.
    fn place(&self, index: usize) -> Value {
        let mut place = json!({"item_id": self.item_id(index), "output_index": index});
        if !matches!(self.blocks.row().get(index), Some(Block::Call { .. })) {
            place["content_index"] = json!(0);
        }
        place
    }

    fn push_begin(&mut self, index: usize, events: &mut Vec<Value>) {
        let mut item = self.item(index, "in_progress");
        let part = item.get_mut("content").map(|content| std::mem::replace(content, json!([]))[0].take());
        if let Some(arguments) = item.get_mut("arguments") {
            *arguments = json!("");
        }
        self.push(events, "response.output_item.added", json!({"output_index": index, "item": item}));
        if let Some(mut part) = part {
            part["text"] = json!("");
            let mut fields = self.place(index);
            fields["part"] = part;
            self.push(events, "response.content_part.added", fields);
        }
    }

    fn push_end(&mut self, index: usize, events: &mut Vec<Value>) {
        let mut fields = self.place(index);
        let kind = match self.blocks.row().get(index) {
            Some(Block::Reasoning(text)) => {
                fields["text"] = json!(text);
                "response.reasoning_text.done"
            }
            Some(Block::Call { start, arguments }) => {
                fields["name"] = json!(start.name);
                fields["arguments"] = json!(arguments);
                "response.function_call_arguments.done"
            }
            Some(Block::Text(text)) => {
                fields["text"] = json!(text);
                fields["logprobs"] = json!(self.logprobs.get(index));
                "response.output_text.done"
            }
            None => return,
        };
        self.push(events, kind, fields);
        if let Some(part) = self.part(index) {
            let mut fields = self.place(index);
            fields["part"] = part;
            self.push(events, "response.content_part.done", fields);
        }
        let item = self.item(index, "completed");
        self.push(events, "response.output_item.done", json!({"output_index": index, "item": item}));
    }
}
